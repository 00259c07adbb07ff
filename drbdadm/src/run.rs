//! Carrying out a command on the chosen resources. Spec: config-and-drbdadm.md §8.4, §9, §10.

use bstr::{BString, ByteSlice};
use drbd_conf::dump::{json, text, xml};
use drbd_conf::model::{Resource, Volume};

use crate::app::{App, Exit};
use crate::backend::{Call, Program, Stderr, Step};
use crate::cli::Format;
use crate::command::{Action, TimeClass};
use crate::lines::{self, Ends, Lines};
use crate::select::{Target, volumes};
use crate::stages::{Job, Stage, Stages};
use crate::{adjust, create_md, handler, print, proxy, registry, sh, split_brain, wait};

/// What a run has collected so far.
#[derive(Default)]
pub struct Work {
    /// Jobs of up and adjust.
    pub stages: Stages,
    /// Resource of the previous `up` job: its resource jobs are queued once.
    last_up: Option<usize>,
    /// Indexes that a JSON dump shows.
    dumped: Vec<usize>,
}

/// One resource or volume. Returns its exit code; one of 20 and more ends the program.
///
/// # Errors
/// The program ends at once.
pub fn one(app: &App, work: &mut Work, target: Target, all: bool) -> Result<i32, Exit> {
    let Some(resource) = app.resource(target) else { return Ok(0) };
    let action = app.invocation.command.action;
    let code = match action {
        Action::Dump => dump(app, work, resource, target, all)?,
        Action::Up => {
            up(app, work, resource, target)?;
            0
        }
        Action::Adjust => {
            adjust::adjust(app, &mut work.stages, resource)?;
            0
        }
        Action::Syncer => {
            adjust::apply_options(app, &mut work.stages, resource);
            0
        }
        Action::Sh => sh::of_resource(app, resource, target)?,
        Action::ShBecomePrimary => sh::become_primary(app, resource, target),
        Action::Handler => handler::run(app, resource, target),
        Action::Proxy => proxy::run(app, resource, all)?,
        Action::ExplainSplitBrain => split_brain::explain(app, resource)?,
        Action::ResolveSplitBrain => split_brain::resolve(app, resource)?,
        Action::Connect => connect(app, resource)?,
        Action::NetOptions | Action::Disconnect => of_connection(app, resource)?,
        Action::SetupResource => {
            let command = app.invocation.command;
            let call = lines(app, resource).setup_resource(command.name, command.time);
            app.backend.run(&call).code
        }
        Action::NewResource => {
            let step = lines(app, resource).new_resource();
            run_steps(app, &[step])
        }
        _ => each_volume(app, resource, target)?,
    };
    if code >= 20 { Err(Exit(code)) } else { Ok(code) }
}

/// Builder of calls for a resource.
pub fn lines<'a>(app: &'a App, resource: &'a Resource) -> Lines<'a> {
    Lines { resource, extra: &app.invocation.backend_options }
}

/// Runs steps until one fails.
pub fn run_steps(app: &App, steps: &[Step]) -> i32 {
    for step in steps {
        let result = app.backend.run(&step.call);
        if result.code != 0 && !step.ignore_code {
            return result.code;
        }
        if let Some(link) = &step.link
            && !app.backend.dry_run
            && result.code == 0
        {
            registry::register(link, app.config_file().as_bstr());
        }
    }
    0
}

/// The volumes of a target in ascending order; the first failure ends the resource.
fn each_volume(app: &App, resource: &Resource, target: Target) -> Result<i32, Exit> {
    for volume in chosen_volumes(resource, target) {
        let code = volume_command(app, resource, volume)?;
        if code != 0 {
            return Ok(code);
        }
    }
    Ok(0)
}

/// The named volume, or all of the resource.
pub fn chosen_volumes(resource: &Resource, target: Target) -> &[Volume] {
    let list = volumes(resource);
    match target.volume {
        Some(at) => list.get(at..=at).unwrap_or_default(),
        None => list,
    }
}

fn volume_command(app: &App, resource: &Resource, volume: &Volume) -> Result<i32, Exit> {
    let command = app.invocation.command;
    let lines = lines(app, resource);
    let minor = volume.minor.unwrap_or_default();
    Ok(match command.action {
        Action::SetupMinor => {
            app.backend.run(&lines.setup_minor(command.name, minor, command.time)).code
        }
        Action::Meta => app.backend.run(&lines.meta(volume, command.name)).code,
        Action::Attach => run_steps(app, &lines.attach(volume, &volume.disk_options)),
        Action::SetupOrMeta => setup_or_meta(app, &lines, volume),
        Action::Outdate => outdate(app, &lines, volume),
        Action::Resize => run_steps(app, &lines.resize(volume, Stderr::Inherit)),
        Action::CheckResize => check_resize(app, &lines, volume),
        Action::CreateMd => create_md::run(app, &lines, volume),
        Action::NewMinor => run_steps(app, &[lines.new_minor(volume)]),
        Action::WaitConnect => {
            app.backend.run(&lines.wait_connect(volume, app.invocation.stacked)).code
        }
        _ => 0,
    })
}

/// drbdsetup; what it can not answer drbdmeta does. Spec §9.1.
fn setup_or_meta(app: &App, lines: &Lines<'_>, volume: &Volume) -> i32 {
    let command = app.invocation.command;
    let minor = volume.minor.unwrap_or_default();
    let call = lines.setup_minor(command.name, minor, TimeClass::Short).stderr(Stderr::Capture);
    let result = app.backend.run(&call);
    if app.backend.dry_run {
        return app.backend.run(&lines.meta(volume, command.name)).code;
    }
    match result.code {
        0 => 0,
        11 | 17 => {
            print::stderr(&result.stderr);
            result.code
        }
        _ => app.backend.run(&lines.meta(volume, command.name)).code,
    }
}

/// Spec §9.2.
fn outdate(app: &App, lines: &Lines<'_>, volume: &Volume) -> i32 {
    let minor = volume.minor.unwrap_or_default();
    let call = lines.setup_minor("outdate", minor, TimeClass::Short).stderr(Stderr::Discard);
    let code = app.backend.run(&call).code;
    if app.backend.dry_run {
        return app.backend.run(&lines.meta(volume, "outdate")).code;
    }
    match code {
        0 | 17 => code,
        5 => match app.backend.run(&lines.meta(volume, "outdate")).code {
            0 => 0,
            _ => 5,
        },
        _ => app.backend.run(&lines.meta(volume, "outdate")).code,
    }
}

/// Spec §9.3.
fn check_resize(app: &App, lines: &Lines<'_>, volume: &Volume) -> i32 {
    match run_steps(app, &lines.resize(volume, Stderr::Discard)) {
        0 => 0,
        _ => app.backend.run(&lines.meta(volume, "check-resize")).code,
    }
}

/// The addresses of a connection; in a dry run an unknown peer is `N/A`.
///
/// # Errors
/// alternate-link-address stands on one side only.
pub fn ends(app: &App, resource: &Resource) -> Result<(Ends, bool), Exit> {
    let Some(me) = resource.me() else { return Err(Exit(10)) };
    let peer = app.peer(resource);
    let ends = lines::ends(me, peer).map_err(|_| {
        let at = drbd_conf::resolve::place(&app.loaded.sources, resource);
        print::complain(format!(
            "{at}:\n\talternate-link-address must be on both hosts or on none."
        ));
        Exit(10)
    })?;
    Ok((ends, peer.is_some()))
}

/// Complains if the peer is not known.
///
/// # Errors
/// The program ends: nothing can be connected.
pub fn needs_peer(app: &App, resource: &Resource, known: bool) -> Result<(), Exit> {
    if known || app.backend.dry_run {
        return Ok(());
    }
    let name = &resource.name;
    print::complain(format!("resource {name}: cannot configure network without knowing my peer."));
    Err(Exit(20))
}

fn connect(app: &App, resource: &Resource) -> Result<i32, Exit> {
    let (ends, known) = ends(app, resource)?;
    needs_peer(app, resource, known)?;
    Ok(run_steps(app, &[lines(app, resource).connect(&ends)]))
}

fn of_connection(app: &App, resource: &Resource) -> Result<i32, Exit> {
    let command = app.invocation.command;
    let Some(me) = resource.me() else { return Err(Exit(10)) };
    let ends = if command.peer {
        let (ends, known) = ends(app, resource)?;
        needs_peer(app, resource, known)?;
        ends
    } else {
        let chosen = app.invocation.peer.as_ref().map(|p| p.as_bstr());
        let peer = drbd_conf::resolve::peer(resource, chosen).ok();
        lines::ends(me, peer).map_err(|_| Exit(10))?
    };
    let call = lines(app, resource)
        .of_connection(command.name, ends.me.as_bstr(), ends.peer.as_bstr())
        .args(app.invocation.backend_options.iter().cloned());
    Ok(app.backend.run(&call).code)
}

/// `up`: queues jobs. Spec §10.
fn up(app: &App, work: &mut Work, resource: &Resource, target: Target) -> Result<(), Exit> {
    let lines = lines(app, resource);
    let list = chosen_volumes(resource, target);
    if list.is_empty() {
        return Ok(());
    }
    if work.last_up != Some(target.resource) {
        work.last_up = Some(target.resource);
        let (ends, known) = ends(app, resource)?;
        let name = &resource.name;
        work.stages
            .push(Stage::CreateRes, Job::new("new-resource", name, vec![lines.new_resource()]));
        let connect = if known || app.backend.dry_run {
            Job::new("connect", name, vec![lines.connect(&ends)])
        } else {
            Job::without_peer(name)
        };
        work.stages.push(Stage::AdjustNet, connect);
    }
    for volume in list {
        let name = &resource.name;
        work.stages
            .push(Stage::CreateRes, Job::new("new-minor", name, vec![lines.new_minor(volume)]));
        let attach = lines.attach(volume, &volume.disk_options);
        work.stages.push(Stage::AdjustDisk, Job::new("attach", name, attach));
    }
    Ok(())
}

/// After the last resource.
///
/// # Errors
/// The program ends with a code of 20 and more.
pub fn finish(app: &App, mut work: Work, code: i32) -> Result<i32, Exit> {
    match app.invocation.command.action {
        Action::Up | Action::Adjust | Action::Syncer => {
            let progress = app.invocation.command.name == "adjust-with-progress"
                && !app.backend.dry_run
                && !app.backend.verbose;
            Ok(work.stages.run(app, progress)?.max(code))
        }
        Action::Dump if app.invocation.format == Format::Json => {
            dump_json(app, &work.dumped);
            Ok(code)
        }
        Action::Dump if whole_dump(app) => {
            print_dump(app, None)?;
            Ok(code)
        }
        _ => Ok(code),
    }
}

fn whole_dump(app: &App) -> bool {
    app.invocation.names.first().is_none_or(|n| n == "all")
}

fn dump(
    app: &App,
    work: &mut Work,
    resource: &Resource,
    target: Target,
    all: bool,
) -> Result<i32, Exit> {
    work.dumped.push(target.resource);
    if all || app.invocation.format == Format::Json {
        // Everything is printed at once when all resources have been chosen.
        return Ok(0);
    }
    print_dump(app, Some(resource))?;
    Ok(0)
}

fn print_dump(app: &App, resource: Option<&Resource>) -> Result<(), Exit> {
    let sources = &app.loaded.sources;
    let config = &app.loaded.config;
    let context =
        text::Context { sources, node: app.node.as_bstr(), verbose: app.invocation.verbose > 0 };
    let is_xml = app.invocation.command.name == "dump-xml" || app.invocation.format == Format::Xml;
    let out = match (resource, is_xml) {
        (None, false) => text::whole(config, &context),
        (None, true) => xml::whole(config, sources),
        (Some(resource), false) => text::one(resource, &context),
        (Some(resource), true) => xml::one(resource, sources),
    };
    match out {
        Ok(out) => {
            print::stdout(&out);
            Ok(())
        }
        Err(e) => {
            print::complain(e.to_string());
            Err(Exit(2))
        }
    }
}

fn dump_json(app: &App, only: &[usize]) {
    let only = (!whole_dump(app)).then_some(only);
    let dump = json::dump(&app.loaded.config, &app.loaded.sources, app.node.as_bstr(), only);
    let mut text = serde_json::to_vec_pretty(&dump).unwrap_or_default();
    text.push(b'\n');
    print::stdout(&text);
}

/// Commands that take no resource.
///
/// # Errors
/// The program ends at once.
pub fn without_resources(app: &App) -> Result<i32, Exit> {
    let command = app.invocation.command;
    let code = match command.action {
        Action::WaitConInt => wait::wait_con_int(app),
        Action::ShStatus => sh::status(app),
        _ => sh::without_resources(app),
    };
    if code >= 10 {
        print::complain(format!("command {} exited with code {code}", command.name));
        return Err(Exit(code));
    }
    Ok(code)
}

/// A call of drbdsetup that only reads.
pub fn show_call(resource: &BString) -> Call {
    let mut call = Call::new(Program::Setup, resource, TimeClass::Short)
        .arg("show")
        .arg(resource.clone())
        .stderr(Stderr::Discard);
    call.silent = true;
    call.capture_stdout = true;
    call
}
