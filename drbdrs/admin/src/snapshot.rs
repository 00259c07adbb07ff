//! The state of a node at one moment: everything that any status view shows.
//!
//! Rendering is done by the reader. Amounts are as the engine counts them (sectors, bitmap bits,
//! 64 bits); wrapping, halving and rounding to what the original prints is the renderer's work.

use drbd_types::{Cstate, Dstate, Failure, Gi, Role};
use serde::{Deserialize, Serialize};

use crate::names;
use crate::{Address, Handshake, Latencies, MetaIndex, OptionSet, Reply, Target};

/// State of a node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Microseconds since 1970, UTC.
    pub at_us: u64,
    /// Who answers.
    pub daemon: Daemon,
    /// Resources in the order of their creation.
    pub resources: Vec<Resource>,
}

/// The daemon.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Daemon {
    /// Release of drbdrs.
    pub release: String,
    /// Identification of the build, at most 23 characters; stands for `srcversion`.
    pub build: String,
    /// Process.
    pub pid: u32,
    /// Faults that are switched on: number and words.
    #[serde(default)]
    pub faults: Vec<(u32, String)>,
}

/// A resource.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Resource {
    /// Its name.
    pub name: String,
    /// Section `options`, what is not default.
    #[serde(default)]
    pub options: OptionSet,
    /// Why I/O is suspended.
    #[serde(default)]
    pub suspended: Suspended,
    /// Write ordering in use.
    #[serde(default)]
    pub write_ordering: WriteOrdering,
    /// Exists while there is a network configuration.
    #[serde(default)]
    pub connection: Option<Connection>,
    /// Since when the two nodes are not together, microseconds since 1970; absent while they are.
    #[serde(default)]
    pub apart_since_us: Option<u64>,
    /// They have been, in the life of this daemon.
    #[serde(default)]
    pub has_been_together: bool,
    /// In ascending order of their numbers.
    #[serde(default)]
    pub volumes: Vec<Volume>,
}

/// Why I/O of a resource is suspended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Suspended {
    /// By the administrator.
    pub user: bool,
    /// Neither node has usable data.
    pub no_data: bool,
    /// The peer is being fenced.
    pub fencing: bool,
}

impl Suspended {
    /// For any reason.
    #[must_use]
    pub const fn is_any(self) -> bool {
        self.user || self.no_data || self.fencing
    }
}

/// A connection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Connection {
    /// Own end.
    pub local: Address,
    /// The peer's end.
    pub peer: Address,
    /// Host name of the peer, where it is known.
    #[serde(default)]
    pub peer_name: Option<String>,
    /// Section `net`, what is not default.
    #[serde(default)]
    pub options: OptionSet,
    /// Its own state, at most `WFReportParams`.
    #[serde(with = "names::cstate")]
    pub state: Cstate,
    /// The send queue of the data stream is more than 80 % full.
    pub is_congested: bool,
    /// Protocol version that was agreed on.
    #[serde(default)]
    pub agreed: Option<u8>,
    /// Sectors of application writes that the peer has not acknowledged.
    #[serde(default)]
    pub ap_in_flight: Option<u64>,
    /// Sectors of resync requests that are open.
    #[serde(default)]
    pub rs_in_flight: Option<u64>,
    /// Why it is not Connected.
    #[serde(default)]
    pub reason: Option<Reason>,
}

/// Why something is as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// Stable code, e.g. `split-brain`.
    pub code: String,
    /// In words.
    pub text: String,
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Volume {
    /// Number in the resource.
    pub volume: u16,
    /// Minor number.
    pub minor: u32,
    /// Own role.
    #[serde(with = "names::role")]
    pub role: Role,
    /// The peer's role.
    #[serde(with = "names::role")]
    pub peer_role: Role,
    /// Connection and replication.
    #[serde(with = "names::cstate")]
    pub cstate: Cstate,
    /// Own disk.
    #[serde(with = "names::dstate")]
    pub disk: Dstate,
    /// The peer's disk.
    #[serde(with = "names::dstate")]
    pub peer_disk: Dstate,
    /// Resync paused by `resync-after`.
    pub paused_after: bool,
    /// Resync paused by the peer.
    pub paused_peer: bool,
    /// Resync paused by the administrator.
    pub paused_user: bool,
    /// No new application I/O is accepted now.
    pub is_blocked: bool,
    /// No activity log is written now.
    pub is_al_suspended: bool,
    /// Somebody has the device open.
    #[serde(default)]
    pub is_open: bool,
    /// Sectors of the device; 0: not known.
    pub size: u64,
    /// Device nodes and exports through which it is used.
    #[serde(default)]
    pub devices: Vec<String>,
    /// The disk, while one is attached.
    #[serde(default)]
    pub backing: Option<Backing>,
    /// Generation identifiers and flags in memory, while a disk is attached.
    #[serde(default)]
    pub generations: Option<Generations>,
    /// Counters and gauges.
    #[serde(default)]
    pub counters: Counters,
    /// The resync or verify that runs or is paused.
    #[serde(default)]
    pub progress: Option<Progress>,
    /// Which time-out a wait for the peer has.
    #[serde(default)]
    pub wait_class: WaitClass,
    /// Caches for `proc_details`: resync extents and activity log.
    #[serde(default)]
    pub caches: Option<(Cache, Cache)>,
    /// Requests that wait for the activity log.
    #[serde(default)]
    pub blocked_on_al: u64,
    /// Why it does not do what one would expect.
    #[serde(default)]
    pub reason: Option<Reason>,
    /// The last handshake.
    #[serde(default)]
    pub handshake: Option<Handshake>,
    /// When this node began a generation that its peer does not have, microseconds since 1970: from
    /// then on it may have written alone.
    #[serde(default)]
    pub alone_since_us: Option<u64>,
    /// The age of the oldest application request, microseconds.
    #[serde(default)]
    pub oldest_request_us: Option<u64>,
    /// How long requests took.
    #[serde(default)]
    pub latencies: Latencies,
}

/// An attached disk; not shown any more once it is Failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backing {
    /// Data disk.
    pub disk: String,
    /// Meta-data device.
    pub meta_disk: String,
    /// Place on it.
    pub meta_index: MetaIndex,
    /// Identity of the device in the meta-data; 0: none.
    #[serde(default)]
    pub device_uuid: u64,
    /// Section `disk`, what is not default.
    #[serde(default)]
    pub options: OptionSet,
}

/// Generation identifiers, in hexadecimal, and flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Generations {
    /// Current, bitmap, younger and older history.
    #[serde(with = "hex")]
    pub slots: [Gi; 4],
    /// Data is consistent.
    pub consistent: bool,
    /// Data was or is up to date.
    pub up_to_date: bool,
    /// Node was or is Primary.
    pub primary: bool,
    /// Node was or is connected.
    pub connected: bool,
    /// All bits were being set.
    pub full_sync: bool,
    /// The peer's data is old or inconsistent.
    pub peer_outdated: bool,
    /// Crashed as Primary, and has not seen its peer since.
    pub crashed_primary: bool,
}

pub(crate) mod hex {
    use drbd_types::Gi;
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    #[allow(clippy::trivially_copy_pass_by_ref, reason = "the signature is serde's")]
    pub(crate) fn serialize<S: Serializer>(slots: &[Gi; 4], to: S) -> Result<S::Ok, S::Error> {
        slots.map(|gi| gi.to_string()).serialize(to)
    }

    pub(crate) fn deserialize<'d, D: Deserializer<'d>>(from: D) -> Result<[Gi; 4], D::Error> {
        let texts = <[String; 4]>::deserialize(from)?;
        let mut slots = [Gi::default(); 4];
        for (slot, text) in slots.iter_mut().zip(texts) {
            let plain = text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit());
            let value = u64::from_str_radix(&text, 16).ok().filter(|_| plain);
            *slot = Gi(value.ok_or_else(|| D::Error::custom("not a generation identifier"))?);
        }
        Ok(slots)
    }
}

/// Counters and gauges of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Sectors sent to the peer.
    pub sent: u64,
    /// Sectors received.
    pub received: u64,
    /// Sectors written to the local disk.
    pub written: u64,
    /// Sectors read from it.
    pub read: u64,
    /// Transactions of the activity log.
    pub al_writes: u64,
    /// Writes of bitmap blocks; 0 in the 8.4 views.
    pub bm_writes: u64,
    /// Local I/O open: `lo`, lower-pending.
    pub local_pending: u64,
    /// Answers of the peer awaited: `pe`, pending.
    pub peer_pending: u64,
    /// Requests of the peer not answered: `ua`, unacked.
    pub unacked: u64,
    /// Application requests open: `ap`, upper-pending.
    pub application_pending: u64,
    /// Open epochs.
    pub epochs: u64,
    /// Bits out of sync; 0 without disk.
    pub out_of_sync: u64,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            sent: 0,
            received: 0,
            written: 0,
            read: 0,
            al_writes: 0,
            bm_writes: 0,
            local_pending: 0,
            peer_pending: 0,
            unacked: 0,
            application_pending: 0,
            epochs: 1,
            out_of_sync: 0,
        }
    }
}

/// How writes of the peer are kept in order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WriteOrdering {
    /// Not at all.
    None,
    /// By waiting.
    Drain,
    /// By flushes.
    #[default]
    Flush,
}

impl WriteOrdering {
    /// The word in status outputs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Drain => "drain",
            Self::Flush => "flush",
        }
    }

    /// The letter behind `wo:`.
    #[must_use]
    pub const fn letter(self) -> char {
        match self {
            Self::None => 'n',
            Self::Drain => 'd',
            Self::Flush => 'f',
        }
    }
}

/// A resync or verify in numbers; those of §1.5, computed by the engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Bits to do at the beginning.
    pub total: u64,
    /// Bits left.
    pub left: u64,
    /// Done, of 1000, in the coarse steps of the original.
    pub permille: u32,
    /// Estimated seconds to go.
    pub finish: u64,
    /// KiB/s of about the last twenty seconds.
    pub speed: u64,
    /// KiB/s since the start, without pauses.
    pub average: u64,
    /// KiB/s of the last three to six seconds.
    pub recent: u64,
    /// Nothing moved for three minutes.
    pub is_stalled: bool,
    /// KiB/s that the controller asks for; known to SyncTarget and VerifyS.
    #[serde(default)]
    pub want: Option<u64>,
    /// Bit that the run has come to.
    pub position: u64,
    /// First sector of a verify.
    #[serde(default)]
    pub start_sector: u64,
    /// Verify ends here.
    #[serde(default)]
    pub stop_sector: Option<u64>,
    /// Milliseconds since the start, pauses included.
    pub elapsed_ms: u64,
    /// Milliseconds of pauses.
    pub paused_ms: u64,
    /// Window of `recent`.
    #[serde(default)]
    pub short: Window,
    /// Window of `speed`.
    #[serde(default)]
    pub long: Window,
    /// Bits that could not be synchronised.
    #[serde(default)]
    pub failed: u64,
    /// Bits whose checksums were equal.
    #[serde(default)]
    pub same_checksum: u64,
}

/// What was done in a span of time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// The span.
    pub ms: u64,
    /// Sectors done in it.
    pub sectors: u64,
}

/// Which time-out a wait for the peer has. Spec: states-and-generations.md §10.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WaitClass {
    /// `wfc-timeout`.
    #[default]
    Default,
    /// `degr-wfc-timeout`: crashed as Primary without connection.
    Degraded,
    /// `outdated-wfc-timeout`: the peer's disk is Outdated.
    PeerOutdated,
}

/// Statistics of a cache of extents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cache {
    /// Extents in use.
    pub used: u64,
    /// Places.
    pub size: u64,
    /// Found in the cache.
    pub hits: u64,
    /// Not found.
    pub misses: u64,
    /// No place was free.
    pub starving: u64,
    /// The cache was locked.
    pub locked: u64,
    /// Replaced.
    pub changed: u64,
}

impl Resource {
    /// Primary if any volume is.
    #[must_use]
    pub fn role(&self) -> Role {
        let primary = self.volumes.iter().any(|v| v.role == Role::Primary);
        if primary { Role::Primary } else { Role::Secondary }
    }

    /// The peer's role: the highest of its volumes.
    #[must_use]
    pub fn peer_role(&self) -> Role {
        let has = |role| self.volumes.iter().any(|v| v.peer_role == role);
        match (has(Role::Primary), has(Role::Secondary)) {
            (true, _) => Role::Primary,
            (false, true) => Role::Secondary,
            (false, false) => Role::Unknown,
        }
    }
}

impl Volume {
    /// A new volume.
    #[must_use]
    pub fn new(volume: u16, minor: u32) -> Self {
        Self {
            volume,
            minor,
            role: Role::Secondary,
            peer_role: Role::Unknown,
            cstate: Cstate::StandAlone,
            disk: Dstate::Diskless,
            peer_disk: Dstate::DUnknown,
            paused_after: false,
            paused_peer: false,
            paused_user: false,
            is_blocked: false,
            is_al_suspended: false,
            is_open: false,
            size: 0,
            devices: Vec::new(),
            backing: None,
            generations: None,
            counters: Counters::default(),
            progress: None,
            wait_class: WaitClass::Default,
            caches: None,
            blocked_on_al: 0,
            reason: None,
            handshake: None,
            alone_since_us: None,
            oldest_request_us: None,
            latencies: Latencies::default(),
        }
    }

    /// Neither disk nor network.
    #[must_use]
    pub fn is_unconfigured(&self) -> bool {
        self.cstate == Cstate::StandAlone && self.disk == Dstate::Diskless
    }
}

impl Snapshot {
    /// All volumes with their resources, in ascending order of their minor numbers.
    #[must_use]
    pub fn by_minor(&self) -> Vec<(&Resource, &Volume)> {
        let of = |r| -> Vec<(&Resource, &Volume)> { volumes_of(r).collect() };
        let mut all: Vec<_> = self.resources.iter().flat_map(of).collect();
        all.sort_by_key(|(_, v)| v.minor);
        all
    }

    /// Only what is asked for.
    ///
    /// # Errors
    /// It does not exist: the reply of the original.
    pub fn select(mut self, target: &Target) -> Result<Self, Reply> {
        match target {
            Target::All => return Ok(self),
            Target::Resource(name) => {
                self.resources.retain(|r| r.name == *name);
                if self.resources.is_empty() {
                    return Err(Reply::failed(Failure::ResourceUnknown, "unknown resource"));
                }
            }
            Target::Minor(minor) => {
                for resource in &mut self.resources {
                    resource.volumes.retain(|v| v.minor == *minor);
                }
                self.resources.retain(|r| !r.volumes.is_empty());
                if self.resources.is_empty() {
                    return Err(Reply::failed(Failure::MinorUnknown, "unknown minor"));
                }
            }
        }
        Ok(self)
    }
}

fn volumes_of(resource: &Resource) -> impl Iterator<Item = (&Resource, &Volume)> {
    resource.volumes.iter().map(move |v| (resource, v))
}
