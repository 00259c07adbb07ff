//! adjust: compares what runs with what is configured and queues the difference.
//!
//! Spec: config-and-drbdadm.md §11. Where the original never settles (options given twice, clamped
//! values, changed meta-data index, several surplus volumes) this settles in one run (§19).

use bstr::{BString, ByteSlice};
use drbd_conf::model::{
    Address, Family, HostSection, MetaIndex, Opt, OptionList, Resource, Volume,
};
use drbd_conf::options::{Kind, OptionSpec, parse_number};
use drbd_conf::parse::{Loaded, Main, Request, load};
use drbd_conf::source::SystemLoader;

use crate::app::{App, Exit};
use crate::lines::{self, Ends, Lines};
use crate::run::{ends, lines as lines_of, show_call};
use crate::select::volumes;
use crate::stages::{Job, Stage, Stages};
use crate::{host, print};

/// Queues what makes the running resource equal to the configured one.
///
/// # Errors
/// What runs can not be understood, or the peer is not known.
pub fn adjust(app: &App, stages: &mut Stages, resource: &Resource) -> Result<(), Exit> {
    let shown = app.backend.execute(&show_call(&resource.name));
    let loaded = parse_running(resource, shown.stdout)?;
    let running = loaded.as_ref().and_then(|l| l.config.resources.first());
    let (ends, known) = ends(app, resource)?;
    let name = &resource.name;
    let lines = lines_of(app, resource);
    let compare = Compare { verbose: app.invocation.verbose };
    match running {
        None => stages
            .push(Stage::CreateRes, Job::new("new-resource", name, vec![lines.new_resource()])),
        Some(running) => {
            if !compare.lists(&resource.options, &running.options) {
                let call =
                    lines.setup_resource("resource-options", crate::command::TimeClass::Short);
                let call = with_defaults(call, app, &resource.options, 2);
                stages.push(
                    Stage::AdjustRes,
                    Job::new("resource-options", name, Lines::single("resource-options", call)),
                );
            }
        }
    }
    let running_volumes =
        running.and_then(|r| section(r, "_this_host")).map_or(&[][..], |h| &h.volumes);
    crate::proxy::look_at_settings(app, resource);
    adjust_volumes(app, stages, resource, running_volumes, &compare);
    adjust_net(app, stages, resource, running, &ends, known, &compare);
    Ok(())
}

/// The 8.3 command `syncer`: options of the file to what runs, nothing else. Spec §17.
pub fn apply_options(app: &App, stages: &mut Stages, resource: &Resource) {
    let name = &resource.name;
    let lines = lines_of(app, resource);
    let call = lines.setup_resource("resource-options", crate::command::TimeClass::Short);
    let call = with_defaults(call, app, &resource.options, 2);
    stages.push(
        Stage::AdjustRes,
        Job::new("resource-options", name, Lines::single("resource-options", call)),
    );
    for volume in volumes(resource) {
        stages.push(Stage::AdjustDisk, disk_options(app, resource, volume));
    }
    if let Ok((ends, true)) = ends(app, resource) {
        stages.push(Stage::AdjustNet, net_options(app, resource, &ends));
    }
}

/// Reads the output of `drbdsetup show`; nothing runs if it does not look like a resource.
fn parse_running(resource: &Resource, text: Vec<u8>) -> Result<Option<Loaded>, Exit> {
    let begins = text
        .trim_ascii_start()
        .strip_prefix(b"resource")
        .is_some_and(|rest| rest.trim_ascii_start().find_byte(b'{').is_some_and(|p| p > 0));
    if !begins {
        return Ok(None);
    }
    let main = Main::Show { resource: resource.name.as_bstr(), text };
    let request = Request { main, test: None, recover: false, node_minor: host::node_minor };
    let loaded = load(&request, &SystemLoader).map_err(|_| Exit(10))?;
    for item in loaded.diagnostics.items.iter().filter(|i| !i.native_only) {
        print::stderr(&item.text);
    }
    if loaded.exit.is_some() {
        return Err(Exit(10));
    }
    Ok(Some(loaded))
}

fn section<'r>(running: &'r Resource, name: &str) -> Option<&'r HostSection> {
    running.hosts.iter().find(|h| h.names.iter().any(|n| n == name))
}

/// Puts `--set-defaults` and the options of a list behind the first `head` words of a call.
fn with_defaults(
    mut call: crate::backend::Call,
    app: &App,
    list: &OptionList,
    head: usize,
) -> crate::backend::Call {
    call.args.truncate(head);
    call.arg("--set-defaults")
        .args(lines::options(list))
        .args(app.invocation.backend_options.iter().cloned())
}

fn disk_options(app: &App, resource: &Resource, volume: &Volume) -> Job {
    let minor = volume.minor.unwrap_or_default();
    let call = lines_of(app, resource).setup_minor(
        "disk-options",
        minor,
        crate::command::TimeClass::Medium,
    );
    let mut list = volume.disk_options.clone();
    list.items.retain(|o| !is_attach_only(o.spec));
    let call = with_defaults(call, app, &list, 2);
    Job::new("disk-options", &resource.name, Lines::single("disk-options", call))
}

fn net_options(app: &App, resource: &Resource, ends: &Ends) -> Job {
    let call = lines_of(app, resource).of_connection(
        "net-options",
        ends.me.as_bstr(),
        ends.peer.as_bstr(),
    );
    let call = with_defaults(call, app, &resource.net, 3);
    Job::new("net-options", &resource.name, Lines::single("net-options", call))
}

fn is_attach_only(spec: &OptionSpec) -> bool {
    matches!(spec.name, "size" | "max-bio-bvecs" | "use-bmbv")
}

/// What a volume needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Needs {
    detach: bool,
    del_minor: bool,
    new_minor: bool,
    attach: bool,
    disk_options: bool,
    resize: bool,
    /// max-bio-bvecs was compared: it stands first in the attach line.
    compared: bool,
}

fn adjust_volumes(
    app: &App,
    stages: &mut Stages,
    resource: &Resource,
    running: &[Volume],
    compare: &Compare,
) {
    let configured = volumes(resource);
    let mut numbers: Vec<u32> = configured.iter().chain(running).map(|v| v.vnr).collect();
    numbers.sort_unstable();
    numbers.dedup();
    for vnr in numbers {
        let c = configured.iter().find(|v| v.vnr == vnr);
        let r = running.iter().find(|v| v.vnr == vnr);
        let needs = volume_needs(c, r, compare);
        queue_volume(app, stages, resource, c, r, needs);
    }
}

fn volume_needs(c: Option<&Volume>, r: Option<&Volume>, compare: &Compare) -> Needs {
    let has_disk = |v: &Volume| v.disk.is_some();
    match (c, r) {
        (None, None) => Needs::default(),
        (None, Some(r)) => Needs { detach: has_disk(r), del_minor: true, ..Needs::default() },
        (Some(_), None) => Needs { new_minor: true, attach: true, ..Needs::default() },
        (Some(c), Some(r)) if c.minor != r.minor => Needs {
            detach: has_disk(r),
            del_minor: true,
            new_minor: true,
            attach: true,
            ..Needs::default()
        },
        (Some(c), Some(r)) => {
            let bvecs_differ = !compare.option("max-bio-bvecs", &c.disk_options, &r.disk_options);
            if !same_disk(c, r) || bvecs_differ {
                return Needs {
                    detach: has_disk(r),
                    attach: true,
                    compared: true,
                    ..Needs::default()
                };
            }
            let resize = !compare.option("size", &c.disk_options, &r.disk_options);
            let rest = |list: &OptionList| OptionList {
                items: list.items.iter().filter(|o| !is_attach_only(o.spec)).cloned().collect(),
            };
            let same = compare.lists(&rest(&c.disk_options), &rest(&r.disk_options));
            Needs { disk_options: !same, resize, ..Needs::default() }
        }
    }
}

/// Same backing disk and same place of the meta-data, including the index.
fn same_disk(c: &Volume, r: &Volume) -> bool {
    if c.disk != r.disk {
        return false;
    }
    let index = |v: &Volume| v.meta_disk.as_ref().map(|m| m.index.clone());
    let device = |v: &Volume| v.meta_disk.as_ref().map(|m| m.device.clone());
    match (index(c), index(r)) {
        (Some(MetaIndex::Internal), Some(MetaIndex::Internal)) | (None, None) => true,
        (Some(MetaIndex::Indexed(a)), Some(MetaIndex::Indexed(b))) => {
            let number = |t: &BString| t.to_str().ok().and_then(|t| t.parse::<u64>().ok());
            device(c) == device(r) && number(&a) == number(&b)
        }
        (Some(MetaIndex::Flexible), Some(MetaIndex::Flexible)) => device(c) == device(r),
        (_, _) => false,
    }
}

fn queue_volume(
    app: &App,
    stages: &mut Stages,
    resource: &Resource,
    c: Option<&Volume>,
    r: Option<&Volume>,
    needs: Needs,
) {
    let name = &resource.name;
    let lines = lines_of(app, resource);
    if let Some(minor) = r.and_then(|r| r.minor) {
        let medium = crate::command::TimeClass::Medium;
        if needs.detach {
            let call = lines.setup_minor("detach", minor, medium);
            stages.push(Stage::CreateRes, Job::new("detach", name, Lines::single("detach", call)));
        }
        if needs.del_minor {
            let plain = Lines { resource, extra: &[] };
            let call = plain.setup_minor("del-minor", minor, crate::command::TimeClass::Short);
            stages.push(
                Stage::CreateRes,
                Job::new("del-minor", name, Lines::single("del-minor", call)),
            );
        }
    }
    let Some(c) = c else { return };
    if needs.new_minor {
        stages.push(Stage::PrepareDisk, Job::new("new-minor", name, vec![lines.new_minor(c)]));
    }
    if needs.attach {
        let mut list = c.disk_options.clone();
        if needs.compared {
            move_to_front(&mut list, "max-bio-bvecs");
        }
        stages.push(Stage::AdjustDisk, Job::new("attach", name, lines.attach(c, &list)));
    }
    if needs.disk_options {
        stages.push(Stage::AdjustDisk, disk_options(app, resource, c));
    }
    if needs.resize {
        let steps = lines.resize(c, crate::backend::Stderr::Inherit);
        stages.push(Stage::AdjustDisk, Job::new("resize", name, steps));
    }
}

fn move_to_front(list: &mut OptionList, name: &str) {
    if let Some(at) = list.items.iter().position(|o| o.spec.name == name) {
        let option = list.items.remove(at);
        list.items.insert(0, option);
    }
}

fn adjust_net(
    app: &App,
    stages: &mut Stages,
    resource: &Resource,
    running: Option<&Resource>,
    ends: &Ends,
    known: bool,
    compare: &Compare,
) {
    let name = &resource.name;
    let lines = lines_of(app, resource);
    let own = running.and_then(|r| section(r, "_this_host")).and_then(|h| h.address.as_ref());
    let peer = running.and_then(|r| section(r, "_remote_host")).and_then(|h| h.address.as_ref());
    let same = running.is_some() && same_ends(app, resource, own, peer, known, compare);
    if same {
        let net = running.map(|r| r.net.clone()).unwrap_or_default();
        if !compare.lists(&resource.net, &net) {
            stages.push(Stage::AdjustNet, net_options(app, resource, ends));
        }
        return;
    }
    if let (Some(own), Some(peer)) = (own, peer) {
        let (own, peer) = (lines::address(own), lines::address(peer));
        let call = lines.of_connection("disconnect", own.as_bstr(), peer.as_bstr());
        stages.push(
            Stage::PrepareNet,
            Job::new("disconnect", name, Lines::single("disconnect", call)),
        );
    }
    let job = if known || app.backend.dry_run {
        Job::new("connect", name, vec![lines.connect(ends)])
    } else {
        Job::without_peer(name)
    };
    stages.push(Stage::AdjustNet, job);
}

fn same_ends(
    app: &App,
    resource: &Resource,
    own: Option<&Address>,
    peer: Option<&Address>,
    known: bool,
    compare: &Compare,
) -> bool {
    let me = resource.me();
    let chosen = app.invocation.peer.as_ref().map(|p| p.as_bstr());
    let other = drbd_conf::resolve::peer(resource, chosen).ok();
    let inside = me.and_then(|m| m.proxy.as_ref()).and_then(|p| p.inside.as_ref());
    let other = inside.or_else(|| other.and_then(|p| p.address.as_ref()));
    let own_configured = me.and_then(|m| m.address.as_ref());
    let same = match (own, peer) {
        (None, None) => !known && other.is_none(),
        (own, peer) => same_address(own, own_configured) && same_address(peer, other),
    };
    if !same && compare.verbose > 2 && peer.is_some() {
        let show = |a: Option<&Address>| a.map(lines::address).unwrap_or_default();
        print::complain(format!(
            "Network addresses differ:\n\trunning: {} -- {}\n\t config: {} -- {}",
            show(own),
            show(peer),
            show(own_configured),
            show(other)
        ));
    }
    same
}

/// By value for ipv4 and ipv6, by text for others; ports by text.
fn same_address(a: Option<&Address>, b: Option<&Address>) -> bool {
    let (Some(a), Some(b)) = (a, b) else { return a.is_none() && b.is_none() };
    if a.family != b.family || a.port != b.port {
        return false;
    }
    let text = |x: &Address| x.addr.to_str().ok().map(ToOwned::to_owned);
    match a.family {
        Family::Ipv4 => {
            let parse = |x| text(x).and_then(|t| t.parse::<std::net::Ipv4Addr>().ok());
            parse(a).is_some() && parse(a) == parse(b) || a.addr == b.addr
        }
        Family::Ipv6 => {
            let bare =
                |x| text(x).and_then(|t| t.split('%').next()?.parse::<std::net::Ipv6Addr>().ok());
            bare(a).is_some() && bare(a) == bare(b) || a.addr == b.addr
        }
        Family::Ssocks | Family::Sdp => a.addr == b.addr,
    }
}

/// Comparison of option lists, explained with -vvv.
struct Compare {
    verbose: u32,
}

impl Compare {
    /// Configured and running lists say the same. Spec §11.3.
    fn lists(&self, c: &OptionList, r: &OptionList) -> bool {
        for option in &r.items {
            let Some(configured) = last(c, option.spec) else {
                if !is_default(option) {
                    self.say(
                        3,
                        &format!("Only in running config {}: {}", option.spec.name, shown(option)),
                    );
                    return false;
                }
                self.say(
                    4,
                    &format!("Is default: '{}' equal: r={}", option.spec.name, shown(option)),
                );
                continue;
            };
            let (name, running, wanted) = (option.spec.name, shown(option), shown(configured));
            if !same_value(configured, option) {
                self.say(3, &format!("Value of '{name}' differs: r={running} c={wanted}"));
                return false;
            }
            self.say(4, &format!("Value of '{name}' equal: r={running} c={wanted}"));
        }
        for option in &c.items {
            let is_last = last(c, option.spec).is_some_and(|l| std::ptr::eq(l, option));
            if is_last && last(r, option.spec).is_none() && !is_default(option) {
                self.say(
                    3,
                    &format!("Only in config file {}: {}", option.spec.name, shown(option)),
                );
                return false;
            }
        }
        true
    }

    /// One option says the same on both sides.
    fn option(&self, name: &str, c: &OptionList, r: &OptionList) -> bool {
        let only = |list: &OptionList| OptionList {
            items: list.items.iter().filter(|o| o.spec.name == name).cloned().collect(),
        };
        self.lists(&only(c), &only(r))
    }

    fn say(&self, level: u32, text: &str) {
        if self.verbose >= level {
            print::complain(text);
        }
    }
}

/// The one that applies: the last of its name.
fn last<'l>(list: &'l OptionList, spec: &OptionSpec) -> Option<&'l Opt> {
    list.items.iter().rfind(|o| std::ptr::eq(o.spec, spec))
}

fn shown(option: &Opt) -> BString {
    option.value.clone().unwrap_or_else(|| "yes".into())
}

fn same_value(c: &Opt, r: &Opt) -> bool {
    let (a, b) = (shown(c), shown(r));
    match c.spec.kind {
        Kind::Number { unit, min, .. } => {
            let value = |t: &BString| parse_number(t, unit).ok();
            // The driver takes values below the smallest as the smallest.
            let clamped = |v: Option<u64>| {
                v.map(|v| if c.spec.name == "al-extents" { v.max(min) } else { v })
            };
            value(&a).is_some() && clamped(value(&a)) == clamped(value(&b))
        }
        Kind::Enum { .. } if c.spec.name == "protocol" => a.eq_ignore_ascii_case(&b),
        _ => a == b,
    }
}

fn is_default(option: &Opt) -> bool {
    let text = shown(option);
    match option.spec.kind {
        Kind::Number { unit, default, .. } => parse_number(&text, unit) == Ok(default),
        Kind::Bool { default } => (text != "no") == default,
        Kind::Enum { default, .. } if option.spec.name == "protocol" => {
            text.eq_ignore_ascii_case(default.as_bytes())
        }
        Kind::Enum { default, .. } => text == default,
        Kind::Text { .. } => text.is_empty(),
        Kind::ResyncAfter => text == "-1",
        Kind::Flag | Kind::Address => false,
    }
}
