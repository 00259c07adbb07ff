//! Our `/proc/drbd` of an engine, and its comparison with that of a guest.

use anyhow::{Context as _, Result, ensure};
use drbd_admin::render::{ProcOptions, proc};
use drbd_admin::{
    Address, Connection, Counters, Family, OptionSet, OptionValue, Resource, Snapshot, Volume,
    WriteOrdering,
};
use drbd_core::engine::status::{Status, VolumeStatus};

/// The text of `/proc/drbd` for an engine whose connection has this protocol (A, B or C).
pub fn text(status: &Status, protocol: &str) -> String {
    let address = || Address { family: Family::Ipv4, addr: "127.0.0.1".into(), port: 7789 };
    let mut options = OptionSet::default();
    options.set("protocol", OptionValue::Text(protocol.to_owned()));
    let connection = status.has_net.then(|| Connection {
        local: address(),
        peer: address(),
        peer_name: None,
        options,
        state: status.conn,
        is_congested: false,
        agreed: status.version.and_then(|v| u8::try_from(v).ok()),
        ap_in_flight: None,
        rs_in_flight: None,
        reason: None,
    });
    let write_ordering = match status.ordering {
        'n' => WriteOrdering::None,
        'd' => WriteOrdering::Drain,
        _ => WriteOrdering::Flush,
    };
    let volumes = status.volumes.iter().map(|v| volume(v, status.epochs)).collect();
    let name = "r0".to_owned();
    let resource = Resource { name, write_ordering, connection, volumes, ..Resource::default() };
    let snapshot = Snapshot { resources: vec![resource], ..Snapshot::default() };
    proc(&snapshot, &ProcOptions::default())
}

fn volume(v: &VolumeStatus, epochs: usize) -> Volume {
    let s = v.state;
    Volume {
        role: s.role,
        peer_role: s.peer,
        cstate: s.conn,
        disk: s.disk,
        peer_disk: s.pdsk,
        paused_after: s.aftr_isp,
        paused_peer: s.peer_isp,
        paused_user: s.user_isp,
        is_al_suspended: v.al_suspended,
        size: v.size.0,
        counters: Counters {
            sent: v.sent,
            received: v.received,
            written: v.written,
            read: v.read,
            al_writes: v.al_writes,
            bm_writes: 0,
            local_pending: v.local_pending,
            peer_pending: v.peer_pending,
            unacked: v.owed,
            application_pending: v.app_pending,
            epochs: u64::try_from(epochs).unwrap_or(u64::MAX).max(1),
            out_of_sync: v.out_of_sync_bits,
        },
        ..Volume::new(v.nr.0, v.minor.0)
    }
}

/// A volume's two lines, in fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fields {
    words: Vec<String>,
}

impl Fields {
    /// Those of a minor number.
    ///
    /// # Errors
    /// There are none.
    pub fn of(text: &str, minor: u32) -> Result<Self> {
        let lines: Vec<&str> = text.lines().collect();
        let prefix = format!("{minor}: ");
        let at = lines.iter().position(|l| l.trim_start().starts_with(&prefix));
        let at = at.with_context(|| format!("no minor {minor} in {text}"))?;
        let both = lines[at..].iter().take(2).flat_map(|l| l.split_whitespace());
        Ok(Self { words: both.map(str::to_owned).collect() })
    }

    /// A field's value.
    ///
    /// # Errors
    /// There is none.
    pub fn get(&self, name: &str) -> Result<&str> {
        let prefix = format!("{name}:");
        let found = self.words.iter().find_map(|w| w.strip_prefix(&prefix));
        found.with_context(|| format!("no {name} in {:?}", self.words))
    }

    /// Words without a name: the protocol, and the flags.
    fn plain(&self) -> Vec<&str> {
        self.words.iter().skip(1).filter(|w| !w.contains(':')).map(String::as_str).collect()
    }
}

/// Both sides of a volume agree, once nothing is under way: states mirrored, what is out of sync,
/// gauges, and counters of what has crossed the link since it was last connected by both.
///
/// # Errors
/// They don't.
pub fn agree(own: &Fields, kernel: &Fields) -> Result<()> {
    let context = || format!("own: {own:?}\nkernel: {kernel:?}");
    let mirrored = |value: &str| {
        value.split_once('/').map_or_else(|| value.to_owned(), |(a, b)| format!("{b}/{a}"))
    };
    for name in ["ro", "ds"] {
        ensure!(own.get(name)? == mirrored(kernel.get(name)?), "{name} differs\n{}", context());
    }
    let cstate = match kernel.get("cs")? {
        "SyncSource" => "SyncTarget",
        "SyncTarget" => "SyncSource",
        "PausedSyncS" => "PausedSyncT",
        "PausedSyncT" => "PausedSyncS",
        "VerifyS" => "VerifyT",
        "VerifyT" => "VerifyS",
        "Ahead" => "Behind",
        "Behind" => "Ahead",
        same => same,
    };
    ensure!(own.get("cs")? == cstate, "cs differs\n{}", context());
    for name in ["oos", "lo", "pe", "ua", "ap", "ep", "wo", "bm"] {
        ensure!(own.get(name)? == kernel.get(name)?, "{name} differs\n{}", context());
    }
    ensure!(own.plain().len() == kernel.plain().len(), "fields differ\n{}", context());
    ensure!(own.plain().first() == kernel.plain().first(), "protocol differs\n{}", context());
    let flags = |fields: &Fields| fields.plain().get(1).map(|f| f.chars().collect::<Vec<_>>());
    let (Some(a), Some(b)) = (flags(own), flags(kernel)) else {
        anyhow::bail!("no flags\n{}", context());
    };
    // Paused by the peer here is paused by the user, or by resync-after, there.
    ensure!(a.first() == b.first(), "suspension differs\n{}", context());
    ensure!((a[2] == 'p') == (b[3] == 'u' || b[1] == 'a'), "pauses differ\n{}", context());
    ensure!((b[2] == 'p') == (a[3] == 'u' || a[1] == 'a'), "pauses differ\n{}", context());
    Ok(())
}
