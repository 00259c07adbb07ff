//! Bodies of the fuzz targets, callable from ordinary tests.
//!
//! A body panics when a promise is broken, and must return in short time for any input.

#![forbid(unsafe_code)]

use std::path::Path;

use bstr::{BStr, ByteSlice};
use drbd_admin::render::{
    self, Colour, Compat, Events, Events2, Events2Options, ProcOptions, ShowOptions, StatusOptions,
};
use drbd_admin::{Answer, Snapshot, Update, wire};
use drbd_conf::check::{Names, check_resource};
use drbd_conf::dump::{json, text, xml};
use drbd_conf::expand::{Minors, expand, translate};
use drbd_conf::parse::{Loaded, Main, Request, load};
use drbd_conf::resolve::{Here, resolve};
use drbd_conf::source::MemoryLoader;

/// Host name under which configurations are looked at.
const NODE: &str = "alpha";

/// The configuration language: everything that drbdadm does before it prints, on hostile files.
///
/// The input is cut at NUL bytes: the first part is the main file, the others are files that it
/// can include. A configuration that is accepted must be readable again from its own dump.
pub fn conf_parse(data: &[u8]) {
    let mut parts = data.split(|b| *b == 0);
    let main = parts.next().unwrap_or_default();
    show(main);
    let names = ["a.res", "d/b.res", "d/c.res"];
    let files = MemoryLoader::default().with("t.conf", main);
    let files = names.iter().zip(parts).fold(files, |files, (name, part)| files.with(*name, part));
    for recover in [false, true] {
        let Some(mut loaded) = read(&files, recover) else { return };
        let accepted = loaded.exit.is_none();
        let dump = use_everything(&mut loaded);
        for item in &loaded.diagnostics.items {
            let _ = item.rendered(&loaded.sources);
        }
        if let (true, None, Some(dump)) = (accepted, loaded.exit, dump) {
            stays_the_same(&dump);
        }
    }
}

/// What `drbdsetup show` is said to have printed: hostile, because anything can be in PATH.
fn show(text: &[u8]) {
    let main = Main::Show { resource: "r".into(), text: text.into() };
    let request = Request { main, test: None, recover: false, node_minor: |_| None };
    if let Ok(mut loaded) = load(&request, &MemoryLoader::default()) {
        use_everything(&mut loaded);
    }
}

/// Meta-data: everything that is decoded from a disk or from the text of a dump. The first byte
/// says what the rest is.
pub fn meta_data(data: &[u8]) {
    let Some((kind, rest)) = data.split_first() else { return };
    match kind % 6 {
        0 => drbdmeta::fuzz::superblock(rest),
        1 => drbdmeta::fuzz::al_block(rest),
        2 => drbdmeta::fuzz::al_replay(rest),
        3 => drbdmeta::fuzz::al_old(rest),
        4 => drbdmeta::fuzz::dump_text(rest),
        _ => drbdmeta::fuzz::notes(rest),
    }
}

/// Peer protocol: a stream of packets.
pub fn packets(data: &[u8]) {
    drbd_wire::fuzz::packets(data);
}

/// Peer protocol: a compressed bitmap.
pub fn bitmap_rle(data: &[u8]) {
    drbd_wire::fuzz::bitmap_rle(data);
}

/// Admin protocol: a line from a client, as the daemon takes it, or a line from a daemon, with every
/// view of the state that is in it. The first byte says which.
pub fn admin(data: &[u8]) {
    let Some((kind, line)) = data.split_first() else { return };
    if kind.is_multiple_of(2) {
        let Ok(envelope) = wire::request(line) else { return };
        let again = wire::encode(&envelope).unwrap_or_default();
        assert_eq!(wire::request(&again), Ok(envelope), "a request changes on its way");
        return;
    }
    match wire::decode(line) {
        Ok(Answer::Snapshot(snapshot)) => render_everything(&snapshot),
        Ok(Answer::Update(update)) => {
            for statistics in [false, true] {
                let options = Events2Options { timestamps: Some(-1), statistics, full: false };
                let _ = Events2::new(options).update(&update);
            }
            let _ = Events::default().update(&update);
        }
        Ok(Answer::Helper(call)) => {
            let _ = (Events2::default().helper(&call), Events::default().helper(&call));
        }
        Ok(Answer::Done(reply)) => {
            let _ = (reply.message("0"), reply.exit());
        }
        _ => {}
    }
}

fn render_everything(snapshot: &Snapshot) {
    for (compat, details) in [(Compat::V84, 2), (Compat::V83, 0)] {
        let _ = render::proc(snapshot, &ProcOptions { compat, details });
    }
    for (verbose, width) in [(false, 1), (true, 80)] {
        let options = StatusOptions { verbose, statistics: verbose, colour: Colour::On, width };
        let _ = render::status(snapshot, &options);
    }
    for defaults in [false, true] {
        let options = ShowOptions { defaults };
        let _ = (render::show(snapshot, &options), render::show_json(snapshot, &options));
    }
    let _ = (render::status_json(snapshot).to_string(), render::sh_status(snapshot));
    for (_, volume) in snapshot.by_minor() {
        let _ = (render::role(volume), render::cstate(volume), render::dstate(volume));
        if let Some(generations) = &volume.generations {
            let _ = (render::show_gi(generations), render::get_gi(generations));
        }
    }
    let options = Events2Options { timestamps: Some(0), statistics: true, full: true };
    let mut events2 = Events2::new(options);
    let _ = (events2.initial(snapshot), Events::default().initial(snapshot));
    // What was just printed is no change.
    for resource in &snapshot.resources {
        let same = snapshot.resources.iter().filter(|r| r.name == resource.name).count();
        let name = resource.name.clone();
        let update = Update { at_us: 0, name, resource: Some(resource.clone()) };
        let said = events2.update(&update);
        let numbers: Vec<u16> = resource.volumes.iter().map(|v| v.volume).collect();
        let is_sane = same == 1 && numbers.is_sorted_by(|a, b| a < b);
        assert!(said.is_empty() || !is_sane, "a change out of nothing: {said}");
    }
}

/// The engine: a hostile peer, failing disks, a restless administrator.
pub fn engine(data: &[u8]) {
    drbd_sim::fuzz::engine(data);
}

/// The negotiation of the NBD server, in pieces of any length (the first byte).
pub fn nbd_handshake(data: &[u8]) {
    drbdrs::front::nbd::handshake::fuzz(data);
}

fn read(files: &MemoryLoader, recover: bool) -> Option<Loaded> {
    let main = Main::File(Path::new("t.conf"));
    let request = Request { main, test: None, recover, node_minor: |_| None };
    load(&request, files).ok()
}

/// Returns the plain dump.
fn use_everything(loaded: &mut Loaded) -> Option<Vec<u8>> {
    let here =
        Here { node: NODE.into(), has_address: &|_| false, by_proxy: false, terminal: false };
    resolve(loaded, &here);
    let context = text::Context { sources: &loaded.sources, node: NODE.into(), verbose: false };
    let dump = text::whole(&loaded.config, &context).ok().map(|d| d.to_vec());
    let _ = xml::whole(&loaded.config, &loaded.sources);
    expand(&mut loaded.config);
    let minors = Minors::of(&loaded.config);
    let names = Names::of(&loaded.config);
    for at in 0..loaded.config.resources.len() {
        check_resource(loaded, at, &names, None, false);
        translate(loaded, at, &minors, &NODE.into(), false);
    }
    let _ = json::dump(&loaded.config, &loaded.sources, NODE.into(), None);
    dump
}

fn stays_the_same(dump: &[u8]) {
    let files = MemoryLoader::default().with("t.conf", dump);
    let Some(mut again) = read(&files, false) else { return };
    let text = dump.as_bstr();
    assert!(again.exit.is_none(), "dump is not readable: {text}\n{:?}", again.diagnostics);
    let second = use_everything(&mut again).unwrap_or_default();
    assert_eq!(lines(text), lines(second.as_bstr()), "dump of the dump differs");
}

fn lines(dump: &BStr) -> Vec<&BStr> {
    dump.lines().filter(|l| !l.trim_ascii_start().starts_with(b"# ")).map(|l| l.as_bstr()).collect()
}
