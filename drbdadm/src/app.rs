//! One run: read the configuration, check it, choose resources, carry out the command.
//!
//! Spec: config-and-drbdadm.md §6.1 (order of work), §7.4, §8.4.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use bstr::{BString, ByteSlice};
use drbd_conf::diag::{Diagnostic, Severity};
use drbd_conf::expand::Minors;
use drbd_conf::model::{HostSection, Resource};
use drbd_conf::parse::{Loaded, Main, Request, load};
use drbd_conf::resolve::{Here, NoPeer, resolve};
use drbd_conf::source::{SEARCH_PATH, SystemLoader, read_limited};
use drbd_conf::{check, expand, resolve as resolution};

use crate::backend::{Backend, Call, Program, limits};
use crate::cli::Invocation;
use crate::command::{Action, Level, TimeClass};
use crate::host::{self, Addresses};
use crate::select::{self, Refused, Target};
use crate::{print, registry, run};

/// The program ends with this code; what is to be said has been said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit(pub i32);

impl From<Refused> for Exit {
    fn from(refused: Refused) -> Self {
        Self(refused.0)
    }
}

/// Everything that commands need.
pub struct App {
    /// The command line.
    pub invocation: Invocation,
    /// The configuration.
    pub loaded: Loaded,
    /// Name of this host.
    pub node: BString,
    /// Addresses of this host.
    pub addresses: Addresses,
    /// stdin and stdout are terminals.
    pub terminal: bool,
    /// stderr is a terminal.
    pub person: bool,
    /// How backends are called.
    pub backend: Backend,
}

/// The status of one resource or of everything in one call of the backend, without time limit.
fn whole_status(invocation: &Invocation) -> Result<i32, Exit> {
    let backend = programs(invocation)?;
    let name = match invocation.names.as_slice() {
        [] => BString::from("all"),
        [one] => one.clone(),
        [_, _, ..] => {
            print::complain("status --json and --watch take one resource, or all");
            return Err(Exit(1));
        }
    };
    let call = Call::new(Program::Setup, &name, TimeClass::None)
        .args([BString::from("status"), name.clone()])
        .args(invocation.backend_options.iter().cloned());
    Ok(backend.run(&call).code)
}

/// Runs a command line that was understood.
pub fn run(invocation: Invocation) -> i32 {
    if invocation.is_whole_status() {
        return whole_status(&invocation).unwrap_or_else(|Exit(code)| code);
    }
    if invocation.command.action == Action::Check {
        return crate::check::run(invocation);
    }
    match App::prepare(invocation).and_then(|app| app.execute()) {
        Ok(code) | Err(Exit(code)) => code,
    }
}

impl App {
    /// Steps 1 to 5 of spec §6.1.
    pub(crate) fn prepare(invocation: Invocation) -> Result<Self, Exit> {
        let backend = programs(&invocation)?;
        let node = invocation.node_name.clone().unwrap_or_else(host::node_name);
        let lint = invocation.command.name == "lint";
        let terminal = host::on_terminal();
        if uses_registry(&invocation) && invocation.names.len() > 1 {
            print::complain("You should not use this command with multiple resources!");
        }
        let person = host::errors_are_read_by_a_person();
        let loaded = read(&invocation, person)?;
        if !lint {
            report(&loaded, 0, person);
            if let Some(code) = loaded.exit {
                return Err(Exit(code.into()));
            }
        }
        let addresses = Addresses::read();
        let mut app = Self { invocation, loaded, node, addresses, terminal, person, backend };
        app.backend.limits = limits(&app.loaded.config.global);
        app.resolve();
        if let Some(code) = app.loaded.exit.filter(|_| !lint) {
            return Err(Exit(code.into()));
        }
        if app.shows_effective() {
            expand::expand(&mut app.loaded.config);
        }
        Ok(app)
    }

    /// Plain dumps show what is written; everything else what applies.
    fn shows_effective(&self) -> bool {
        let i = &self.invocation;
        !i.command.is_dump()
            || i.dry_run > 0
            || i.verbose > 0
            || i.format == crate::cli::Format::Json
    }

    fn resolve(&mut self) {
        let said = self.loaded.diagnostics.items.len();
        let addresses = self.addresses.clone();
        let here = Here {
            node: self.node.as_bstr(),
            has_address: &|a| addresses.has(a),
            by_proxy: self.invocation.command.action == Action::Proxy,
            terminal: self.terminal,
        };
        resolve(&mut self.loaded, &here);
        if self.invocation.command.name != "lint" {
            report(&self.loaded, said, self.person);
        }
    }

    /// Everything that can be said about the configuration, whatever else is wrong with it.
    fn lint(&mut self) -> i32 {
        let minors = Minors::of(&self.loaded.config);
        let names = check::Names::of(&self.loaded.config);
        for at in 0..self.loaded.config.resources.len() {
            check::check_resource(&mut self.loaded, at, &names, None, true);
            expand::translate(&mut self.loaded, at, &minors, &self.node, true);
        }
        crate::native::lint(self)
    }

    /// Steps 6 to 8.
    fn execute(mut self) -> Result<i32, Exit> {
        let command = self.invocation.command;
        if command.action == Action::Native {
            return Ok(self.lint());
        }
        if command.level == Level::Nothing {
            return run::without_resources(&self);
        }
        if self.loaded.config.resources.is_empty() && !command.is_dump() {
            print::complain("no resources defined!");
            return Err(Exit(1));
        }
        self.check_all()?;
        self.dispatch()
    }

    /// Step 7: checks and translations of every resource in file order.
    fn check_all(&mut self) -> Result<(), Exit> {
        let minors = Minors::of(&self.loaded.config);
        let names = check::Names::of(&self.loaded.config);
        self.advise_peer_outdater();
        let peer = self.invocation.peer.clone();
        for at in 0..self.loaded.config.resources.len() {
            self.remark_ignored_peer(at);
            let said = self.loaded.diagnostics.items.len();
            let chosen = peer.as_ref().map(|p| p.as_bstr());
            check::check_resource(&mut self.loaded, at, &names, chosen, self.terminal);
            report(&self.loaded, said, self.person);
            if self.loaded.diagnostics.has_errors() {
                return Err(Exit(10));
            }
            if self.invocation.command.is_dump() {
                continue;
            }
            let said = self.loaded.diagnostics.items.len();
            expand::translate(&mut self.loaded, at, &minors, &self.node, self.terminal);
            report(&self.loaded, said, self.person);
            if let Some(code) = self.loaded.exit {
                return Err(Exit(code.into()));
            }
            if self.loaded.diagnostics.has_errors() {
                return Err(Exit(10));
            }
        }
        Ok(())
    }

    /// Once per run: fencing over Heartbeat's channel needs privileges. Spec §6.5.
    fn advise_peer_outdater(&self) {
        let names_it = |r: &Resource| {
            let handler = r.handlers.items.iter().find(|o| o.spec.name == "fence-peer");
            let text = handler.and_then(|o| o.value.as_ref());
            text.is_some_and(|t| t.contains_str("drbd-peer-outdater"))
        };
        if self.loaded.config.resources.iter().any(names_it) {
            print::complain(
                "WARN:\n  fence-peer calls drbd-peer-outdater: dopd must be able to run drbdsetup \
                 and drbdmeta as root.",
            );
        }
    }

    /// Step 8: chooses resources and runs the command on them.
    fn dispatch(mut self) -> Result<i32, Exit> {
        let names = self.invocation.names.clone();
        let command = self.invocation.command;
        let takes_all = names.is_empty() || names.first().is_some_and(|n| n == "all");
        let mut work = run::Work::default();
        if takes_all {
            let node = self.node.clone();
            let stacked = self.invocation.stacked;
            let chosen = select::all(&self.loaded.config, command, stacked, node.as_bstr())?;
            self.verify_all()?;
            let mut code = 0;
            for target in chosen {
                self.report_peer(target);
                code = code.max(run::one(&self, &mut work, target, takes_all)?);
            }
            return run::finish(&self, work, code);
        }
        let mut code = 0;
        for name in &names {
            let mut stacked = self.invocation.stacked;
            let node = self.node.clone();
            let config = &self.loaded.config;
            let target = select::one(config, command, name, &mut stacked, node.as_bstr())?;
            self.invocation.stacked = stacked;
            let Some(resource) = self.loaded.config.resources.get(target.resource) else {
                continue;
            };
            if !command.is_dump() && !select::right_kind(resource, self.invocation.stacked) {
                code = code.max(1);
                continue;
            }
            if !self.verify_one(target) && !command.is_dump() {
                return Err(Exit(10));
            }
            self.report_peer(target);
            code = code.max(run::one(&self, &mut work, target, false)?);
        }
        run::finish(&self, work, code)
    }

    /// With `all` every resource of this host is looked at, also where `-S` selects others.
    fn verify_all(&self) -> Result<(), Exit> {
        let targets = (0..self.loaded.config.resources.len())
            .map(|resource| Target { resource, volume: None });
        let good = targets.filter(|t| !self.verify_one(*t)).count() == 0;
        if good { Ok(()) } else { Err(Exit(10)) }
    }

    /// Checks the own address of a resource where the command wants that. Spec §6.6.
    fn verify_one(&self, target: Target) -> bool {
        let i = &self.invocation;
        // A program that asks for the configuration may ask for another node's.
        let is_json = i.format == crate::cli::Format::Json;
        let skipped =
            self.loaded.config.global.disable_ip_verification || i.dry_run == 1 || is_json;
        let Some(resource) = self.resource(target) else { return true };
        if !i.command.ip || skipped || resource.is_ignored() {
            return true;
        }
        select::verify_address(resource, &self.loaded.sources, &self.addresses, i.stacked)
    }

    /// The resource of a target.
    pub fn resource(&self, target: Target) -> Option<&Resource> {
        self.loaded.config.resources.get(target.resource)
    }

    /// The peer's section.
    pub fn peer<'r>(&self, resource: &'r Resource) -> Option<&'r HostSection> {
        let chosen = self.invocation.peer.as_ref();
        resolution::peer(resource, chosen.map(|p| p.as_bstr())).ok()
    }

    /// Says that `--peer` has no effect on this resource. Spec §6.5.
    fn remark_ignored_peer(&self, at: usize) {
        let Some(resource) = self.loaded.config.resources.get(at) else { return };
        let i = &self.invocation;
        let Some(name) = i.peer.as_ref().filter(|_| i.dry_run > 1) else { return };
        if !resource.is_ignored() && resource.hosts.len() == 2 {
            let at = resolution::place(&self.loaded.sources, resource);
            print::complain(format!(
                "{at}:\n\tIgnoring --peer '{name}': there are only two host sections."
            ));
        }
    }

    /// Complains if the command needs the peer and can not know it. Spec §6.5.
    fn report_peer(&self, target: Target) {
        let Some(resource) = self.resource(target) else { return };
        if !self.invocation.command.peer {
            return;
        }
        let chosen = self.invocation.peer.as_ref();
        if let Err(why) = resolution::peer(resource, chosen.map(|p| p.as_bstr())) {
            let text = why.text(&self.loaded.sources, resource);
            print::complain(&text);
            if matches!(why, NoPeer::Myself(_)) {
                print::complain(&text);
            }
        }
    }

    /// Absolute path of the main configuration file.
    pub fn config_file(&self) -> BString {
        self.loaded.sources.main().into()
    }
}

/// Prints complaints from number `from` on.
fn report(loaded: &Loaded, from: usize, person: bool) {
    for item in loaded.diagnostics.items.get(from..).unwrap_or_default() {
        print_one(item, loaded, person);
    }
}

fn print_one(item: &Diagnostic, loaded: &Loaded, person: bool) {
    if item.native_only {
        return;
    }
    let with_excerpt = person && item.severity == Severity::Error;
    if with_excerpt {
        print::stderr(&item.rendered(&loaded.sources));
    } else {
        print::stderr(&item.text);
    }
}

/// Chooses and reads the configuration. Spec §1.1, §1.4.
fn read(invocation: &Invocation, person: bool) -> Result<Loaded, Exit> {
    let test = invocation.config_to_test.as_ref().map(|t| Path::new(OsStr::from_bytes(t)));
    let lint = invocation.command.name == "lint";
    let request =
        |main| Request { main, test, recover: person || lint, node_minor: host::node_minor };
    if let Some(file) = &invocation.config_file {
        if file == "-" {
            let bytes = read_limited(std::io::stdin()).map_err(|e| {
                print::complain(format!("Can not read standard input: {e}"));
                Exit(20)
            })?;
            return load(&request(Main::Stdin(bytes)), &SystemLoader).map_err(|_| Exit(20));
        }
        let path = Path::new(OsStr::from_bytes(file));
        return load(&request(Main::File(path)), &SystemLoader).map_err(|e| {
            print::complain(format!("Can not open '{file}'."));
            if person {
                print::complain(format!("   {e}"));
            }
            Exit(20)
        });
    }
    let registered = if uses_registry(invocation) {
        invocation.names.first().and_then(|name| registry::lookup(name.as_bstr()))
    } else {
        None
    };
    let path = match registered {
        Some(path) => path,
        None => search()?,
    };
    load(&request(Main::File(&path)), &SystemLoader).map_err(|e| {
        print::complain(format!("Can not open '{}': {}", path.display(), reason(&e)));
        Exit(10)
    })
}

fn uses_registry(invocation: &Invocation) -> bool {
    let command = invocation.command;
    command.action == Action::Handler || command.name == "sh-udev"
}

fn search() -> Result<PathBuf, Exit> {
    let found = SEARCH_PATH.iter().find(|p| std::fs::File::open(p).is_ok());
    found.map(PathBuf::from).ok_or_else(|| {
        print::complain("Can not open '/etc/drbd.conf': No such file or directory");
        Exit(10)
    })
}

/// The system's words without Rust's number.
fn reason(error: &impl std::fmt::Display) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or(&text).to_owned()
}

/// Names of the backends. Spec §1.3.
fn programs(invocation: &Invocation) -> Result<Backend, Exit> {
    let chosen = |given: &Option<BString>, plain: &str| match given {
        Some(path) => {
            if is_executable(Path::new(OsStr::from_bytes(path))) {
                return Ok(path.clone());
            }
            print::complain("Can not find command (drbdsetup/drbdmeta)");
            Err(Exit(20))
        }
        None => Ok(beside(plain)),
    };
    Ok(Backend {
        setup: chosen(&invocation.drbdsetup, "drbdsetup-84")?,
        meta: chosen(&invocation.drbdmeta, "drbdmeta")?,
        proxy_ctl: chosen(&invocation.drbd_proxy_ctl, "drbd-proxy-ctl")?,
        dry_run: invocation.dry_run > 0,
        verbose: invocation.verbose > 0,
        varname: invocation.sh_varname.clone(),
        limits: [0; 3],
    })
}

/// Called with a path: the backend in the same directory, if it is there.
fn beside(plain: &str) -> BString {
    let path = full_program();
    let directory = path.as_deref().and_then(Path::parent).filter(|d| !d.as_os_str().is_empty());
    match directory.map(|d| d.join(plain)) {
        Some(candidate) if is_executable(&candidate) => {
            BString::from(candidate.as_os_str().as_bytes())
        }
        _ => plain.into(),
    }
}

/// argv[0], if it names a directory.
fn full_program() -> Option<PathBuf> {
    let program = std::env::args_os().next()?;
    program.as_bytes().contains(&b'/').then(|| PathBuf::from(program))
}

fn is_executable(path: &Path) -> bool {
    rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok() && path.is_file()
}
