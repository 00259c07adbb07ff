//! The text of /proc/drbd. Spec: status-and-integration.md §1.

use std::fmt::{self, Write};

use drbd_types::{Cstate, Dstate, Role};

use super::{bits_to_kib, progress, wrapped_kib};
use crate::options::Section;
use crate::{Cache, Connection, Progress, Resource, Snapshot, Volume};

/// The release of the reference that all status views imitate.
pub const RELEASE: &str = "8.4.11";

/// Which release's form.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compat {
    /// 8.4.11.
    #[default]
    V84,
    /// 8.3.11: its header; all else is the same in states that we can be in.
    V83,
}

/// How the text is written.
#[derive(Clone, Copy, Debug, Default)]
pub struct ProcOptions {
    /// Which release's form.
    pub compat: Compat,
    /// `proc_details` of the module: 0, 1 or 2.
    pub details: u8,
}

/// More bits than this are shown in MiB.
const SHOWN_IN_MIB_ABOVE: u64 = 1 << 20;

/// The whole file.
#[must_use]
pub fn proc(snapshot: &Snapshot, options: &ProcOptions) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = write_all(&mut text, snapshot, options);
    text
}

fn write_all(out: &mut String, snapshot: &Snapshot, options: &ProcOptions) -> fmt::Result {
    match options.compat {
        Compat::V84 => writeln!(out, "version: {RELEASE} (api:1/proto:86-101)")?,
        Compat::V83 => writeln!(out, "version: 8.3.11 (api:88/proto:86-96)")?,
    }
    writeln!(out, "srcversion: {:<24}", snapshot.daemon.build)?;
    let mut next = 0;
    for (resource, volume) in snapshot.by_minor() {
        if volume.minor != next {
            out.push('\n');
        }
        next = volume.minor.saturating_add(1);
        if volume.is_unconfigured() && volume.role != Role::Primary {
            writeln!(out, "{:2}: cs:Unconfigured", volume.minor)?;
        } else {
            device(out, resource, volume, options.details)?;
        }
    }
    Ok(())
}

fn device(out: &mut String, resource: &Resource, volume: &Volume, details: u8) -> fmt::Result {
    let protocol = resource.connection.as_ref().map_or_else(|| " ".into(), protocol);
    writeln!(
        out,
        "{:2}: cs:{} ro:{}/{} ds:{}/{} {protocol} {}",
        volume.minor,
        volume.cstate,
        volume.role,
        volume.peer_role,
        volume.disk,
        volume.peer_disk,
        flags(resource, volume)
    )?;
    let c = &volume.counters;
    let kib = wrapped_kib;
    write!(out, "    ns:{} nr:{}", kib(c.sent), kib(c.received))?;
    write!(out, " dw:{} dr:{}", kib(c.written), kib(c.read))?;
    write!(out, " al:{} bm:{}", c.al_writes, c.bm_writes)?;
    write!(out, " lo:{} pe:{} ua:{}", c.local_pending, c.peer_pending, c.unacked)?;
    write!(out, " ap:{} ep:{}", c.application_pending, c.epochs)?;
    let ordering = resource.write_ordering.letter();
    writeln!(out, " wo:{ordering} oos:{}", bits_to_kib(c.out_of_sync))?;
    let running = matches!(
        volume.cstate,
        Cstate::SyncSource | Cstate::SyncTarget | Cstate::VerifyS | Cstate::VerifyT
    );
    if let Some(run) = progress(volume).filter(|_| running) {
        let agreed = resource.connection.as_ref().and_then(|c| c.agreed);
        progress_lines(out, volume, run, details, agreed)?;
    }
    if details >= 1 && volume.disk >= Dstate::Failed {
        if let Some((resync, act_log)) = volume.caches {
            cache(out, "resync", resync)?;
            cache(out, "act_log", act_log)?;
        }
        if details >= 2 {
            writeln!(out, "\tblocked on activity log: {}", volume.blocked_on_al)?;
        }
    }
    Ok(())
}

fn protocol(connection: &Connection) -> String {
    connection.options.text(Section::Net, "protocol")
}

/// The fifth flag, why the device blocks, is not used by current kernels.
fn flags(resource: &Resource, volume: &Volume) -> String {
    let pick = |set, letter| if set { letter } else { '-' };
    [
        if resource.suspended.is_any() { 's' } else { 'r' },
        pick(volume.paused_after, 'a'),
        pick(volume.paused_peer, 'p'),
        pick(volume.paused_user, 'u'),
        '-',
        pick(volume.is_al_suspended, 's'),
    ]
    .iter()
    .collect()
}

fn progress_lines(
    out: &mut String,
    volume: &Volume,
    run: &Progress,
    details: u8,
    agreed: Option<u8>,
) -> fmt::Result {
    let x = usize::try_from(run.permille.min(1000) / 50).unwrap_or(20);
    let (done, open) = ("=".repeat(x.saturating_sub(1)), ".".repeat(20 - x));
    let word = if volume.cstate.is_verify() { "verified" } else { "sync'ed" };
    let (whole, tenth) = (run.permille / 10, run.permille % 10);
    write!(out, "\t[{done}>{open}] {word}:{whole:3}.{tenth}% ")?;
    let left = run.left.min(run.total);
    if run.total > SHOWN_IN_MIB_ABOVE {
        writeln!(out, "({}/{})M", bits_to_kib(left >> 10), bits_to_kib(run.total >> 10))?;
    } else {
        writeln!(out, "({}/{})K", bits_to_kib(left), bits_to_kib(run.total))?;
    }
    let (hours, minutes, seconds) = (run.finish / 3600, run.finish % 3600 / 60, run.finish % 60);
    write!(out, "\tfinish: {hours}:{minutes:02}:{seconds:02} speed: {} (", grouped(run.speed))?;
    if details >= 1 {
        write!(out, "{} -- ", grouped(run.recent))?;
    }
    write!(out, "{})", grouped(run.average))?;
    if let (Cstate::SyncTarget | Cstate::VerifyS, Some(want)) = (volume.cstate, run.want) {
        write!(out, " want: {}", grouped(want))?;
    }
    writeln!(out, " K/sec{}", if run.is_stalled { " (stalled)" } else { "" })?;
    if details >= 1 {
        position_line(out, volume, run, agreed)?;
    }
    Ok(())
}

fn position_line(
    out: &mut String,
    volume: &Volume,
    run: &Progress,
    agreed: Option<u8>,
) -> fmt::Result {
    let bits = volume.size.div_ceil(8);
    let percent = run.position / (bits / 100 + 1);
    let (position, all) = (run.position.saturating_mul(8), bits.saturating_mul(8));
    write!(out, "\t{percent:3}% sector pos: {position}/{all}")?;
    let has_stop = agreed.is_none_or(|version| version >= 97 && version != 100);
    if let (Cstate::VerifyS, Some(stop), true) = (volume.cstate, run.stop_sector, has_stop) {
        write!(out, " stop sector: {stop}")?;
    }
    writeln!(out)
}

fn cache(out: &mut String, name: &str, cache: Cache) -> fmt::Result {
    let Cache { used, size, hits, misses, starving, locked, changed } = cache;
    writeln!(
        out,
        "\t{name}: used:{used}/{size} hits:{hits} misses:{misses} starving:{starving} \
         locked:{locked} changed:{changed}"
    )
}

/// At most two commas: the first group may have more than three digits.
fn grouped(value: u64) -> String {
    match value {
        0..1000 => value.to_string(),
        1000..1_000_000 => format!("{},{:03}", value / 1000, value % 1000),
        _ => format!("{},{:03},{:03}", value / 1_000_000, value % 1_000_000 / 1000, value % 1000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_grouped() {
        let rows = [(0, "0"), (999, "999"), (1000, "1,000"), (12_544, "12,544")];
        let large =
            [(999_999, "999,999"), (1_000_000, "1,000,000"), (u64::MAX, "18446744073709,551,615")];
        for (value, text) in rows.into_iter().chain(large) {
            assert_eq!(grouped(value), text);
        }
    }

    /// The sample of the 8.3 documentation. Spec: status-and-integration.md §1.7, §1.8.
    #[test]
    fn the_8_3_form() {
        let mut volume = Volume::new(0, 0);
        volume.cstate = Cstate::SyncSource;
        volume.role = Role::Primary;
        volume.peer_role = Role::Secondary;
        volume.disk = Dstate::UpToDate;
        volume.peer_disk = Dstate::Inconsistent;
        volume.counters.sent = 3744;
        volume.counters.read = 5072;
        volume.counters.peer_pending = 6;
        volume.counters.out_of_sync = 55_847;
        volume.progress = Some(Progress {
            total: 56_309,
            left: 55_847,
            permille: 19,
            finish: 781,
            speed: 264,
            average: 264,
            ..Progress::default()
        });
        let connection = serde_json::from_str(
            r#"{"local":{"family":"ipv4","addr":"1.1.1.1","port":1},
                "peer":{"family":"ipv4","addr":"1.1.1.2","port":1},
                "state":"WFReportParams","is_congested":false}"#,
        );
        let resource = Resource {
            connection: Some(connection.unwrap()),
            volumes: vec![volume, Volume::new(1, 3)],
            ..Resource::default()
        };
        let mut snapshot = Snapshot { resources: vec![resource], ..Snapshot::default() };
        snapshot.daemon.build = "F937DCB2E5D83C6CCE4A6C9".into();
        let options = ProcOptions { compat: Compat::V83, details: 0 };
        assert_eq!(
            proc(&snapshot, &options),
            "version: 8.3.11 (api:88/proto:86-96)\n\
             srcversion: F937DCB2E5D83C6CCE4A6C9 \n \
             0: cs:SyncSource ro:Primary/Secondary ds:UpToDate/Inconsistent C r-----\n    \
             ns:1872 nr:0 dw:0 dr:2536 al:0 bm:0 lo:0 pe:6 ua:0 ap:0 ep:1 wo:f oos:223388\n\
             \t[>....................] sync'ed:  1.9% (223388/225236)K\n\
             \tfinish: 0:13:01 speed: 264 (264) K/sec\n\
             \n 3: cs:Unconfigured\n"
        );
    }

    #[test]
    fn counters_wrap_as_in_the_kernel() {
        assert_eq!(wrapped_kib((1 << 32) - 1), 2_147_483_647);
        assert_eq!(wrapped_kib(1 << 32), 0);
    }
}
