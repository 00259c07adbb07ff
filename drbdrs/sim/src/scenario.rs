//! What is to happen in a run: a configuration, fault rates, and a list of operations, all from one
//! number. Every rate is drawn anew for each run, many of them zero ("swarm testing"), so that rare
//! combinations come up.

use drbd_core::admin::Command;
use drbd_core::config::{
    DiskConfig, Fencing, NetConfig, OnCongestion, OnIoError, OnNoData, Protocol, ReadBalancing,
    ResourceConfig, ResyncConfig, Secret,
};
use drbd_core::generation::decide::RrConflict;
use drbd_core::generation::splitbrain::{OnePrimary, Policies, TwoPrimaries, ZeroPrimaries};
use drbd_types::{Deciseconds, Sector, SectorCount, VolumeNr};

use crate::chance::Chance;
use crate::world::{Clock, Faults, FenceStyle};

/// How a write is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// As data.
    Plain,
    /// Through the cache.
    Fua,
    /// With a flush before.
    Preflush,
    /// As a discard.
    Discard,
    /// As zeroes.
    Zeroes,
}

/// One operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// The application writes, on a node that is Primary (this one, if both are).
    Write {
        /// Preferred node.
        node: usize,
        /// Volume.
        volume: u16,
        /// First sector.
        start: u64,
        /// Sectors.
        len: u64,
        /// How.
        how: How,
    },
    /// The application reads.
    Read {
        /// Preferred node.
        node: usize,
        /// Volume.
        volume: u16,
        /// First sector.
        start: u64,
        /// Sectors.
        len: u64,
    },
    /// The application flushes.
    Flush {
        /// Preferred node.
        node: usize,
        /// Volume.
        volume: u16,
    },
    /// A command.
    Admin {
        /// Where.
        node: usize,
        /// What.
        command: Command,
    },
    /// `attach` with the node's settings.
    Attach {
        /// Where.
        node: usize,
        /// Volume.
        volume: u16,
    },
    /// `disconnect` and `connect` with the node's settings.
    Connect {
        /// Where.
        node: usize,
    },
    /// A node stops and starts again later.
    Stop {
        /// Which.
        node: usize,
        /// It loses the caches of its disks.
        power_cut: bool,
        /// Microseconds until it starts.
        down: u64,
    },
    /// What one node sends is held; both: a partition.
    Block {
        /// Node 0 is not heard.
        zero: bool,
        /// Node 1 is not heard.
        one: bool,
        /// Microseconds.
        time: u64,
    },
    /// All connections break.
    Reset,
    /// A sector becomes unreadable.
    Bad {
        /// Where.
        node: usize,
        /// Volume.
        volume: u16,
        /// Which.
        sector: u64,
    },
    /// A disk stops working, or works again.
    Dead {
        /// Where.
        node: usize,
        /// Volume.
        volume: u16,
        /// It is dead.
        is_dead: bool,
    },
}

/// The two nodes.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Sizes of the volumes, sectors.
    pub volumes: Vec<u64>,
    /// The backing devices are larger by this, sectors; a resize may use it.
    pub spare: u64,
    /// The connection.
    pub net: NetConfig,
    /// The disks, by node.
    pub disk: [DiskConfig; 2],
    /// The resource.
    pub resource: ResourceConfig,
    /// The disks start equal and UpToDate; otherwise as `create-md` leaves them.
    pub is_in_sync: bool,
    /// The disks forget what was not flushed.
    pub is_volatile: bool,
    /// Sectors that are written whole.
    pub atom: u64,
    /// Fault rates.
    pub faults: Faults,
    /// Largest delay of a message, microseconds.
    pub net_delay: u64,
    /// Largest time of a disk operation, microseconds.
    pub disk_delay: u64,
    /// Send buffer, bytes.
    pub send_buffer: u64,
    /// How fencing works.
    pub fence_style: FenceStyle,
    /// Clocks.
    pub clocks: [Clock; 2],
}

/// A whole run.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// The number it came from.
    pub seed: u64,
    /// The two nodes.
    pub setup: Setup,
    /// Time in microseconds, and what happens then.
    pub ops: Vec<(u64, Op)>,
}

fn side(chance: &mut Chance) -> usize {
    usize::from(chance.chance(1, 2))
}

fn count(setup: &Setup) -> u16 {
    u16::try_from(setup.volumes.len()).unwrap_or(0)
}

fn pick<T: Clone>(chance: &mut Chance, from: &[T]) -> T {
    let at = usize::try_from(chance.below(from.len() as u64)).unwrap_or(0);
    from[at].clone()
}

impl Scenario {
    /// The scenario of a number.
    pub fn new(seed: u64) -> Self {
        let mut chance = Chance::new(seed ^ 0xD8BD_0000);
        let setup = setup(&mut chance);
        let ops = operations(&mut chance, &setup);
        Self { seed, setup, ops }
    }

    /// Has it a volume that is large enough for many extents and pages, and for a long resync?
    pub fn is_large(&self) -> bool {
        is_large(&self.setup.volumes)
    }

    /// A Primary that becomes the target of a resync again and again: it loses its disk, goes on
    /// with the peer's, gets its disk back, and reads what it wrote meanwhile.
    pub fn primary_as_target(seed: u64) -> Self {
        let mut chance = Chance::new(seed ^ 0x7A26_0000);
        let mut setup = setup(&mut chance);
        setup.is_in_sync = true;
        setup.faults = Faults::NONE;
        let main = side(&mut chance);
        let volume = 0;
        let nr = VolumeNr(volume);
        let size = setup.volumes[0];
        let mut ops = vec![(
            0,
            Op::Admin { node: main, command: Command::Primary { volume: nr, force: false } },
        )];
        let mut at = 1_000_000;
        for _ in 0..4 {
            let detach = Command::Detach { volume: nr, force: false };
            ops.push((at, Op::Admin { node: main, command: detach }));
            at += 1_000_000;
            let starts: Vec<u64> = (0..12).map(|_| chance.below(size - 16)).collect();
            for start in &starts {
                let (node, start, how) = (main, *start, How::Plain);
                ops.push((at, Op::Write { node, volume, start, len: 16, how }));
            }
            at += 1_000_000;
            ops.push((at, Op::Attach { node: main, volume }));
            for _ in 0..60 {
                at += chance.below(20_000);
                let start = pick(&mut chance, &starts);
                ops.push((at, Op::Read { node: main, volume, start, len: 16 }));
            }
            at += 3_000_000;
        }
        Self { seed, setup, ops }
    }
}

fn is_large(volumes: &[u64]) -> bool {
    volumes.iter().any(|sectors| *sectors > 100_000)
}

fn setup(chance: &mut Chance) -> Setup {
    let volumes: Vec<u64> = (0..pick(chance, &[1_u64, 1, 1, 2, 3]))
        .map(|_| pick(chance, &[512_u64, 2048, 16_384, 16_392, 40_000, 65_536, 700_000]))
        .collect();
    let protocol = pick(chance, &[Protocol::A, Protocol::B, Protocol::C, Protocol::C, Protocol::C]);
    let two_primaries = protocol == Protocol::C && chance.chance(1, 6);
    let is_volatile = chance.chance(3, 4);
    let fencing = pick(
        chance,
        &[
            Fencing::DontCare,
            Fencing::DontCare,
            Fencing::ResourceOnly,
            if protocol == Protocol::A { Fencing::DontCare } else { Fencing::ResourceAndStonith },
        ],
    );
    let mut net = net(chance, protocol, two_primaries);
    if volumes.len() > 1 {
        // Older versions know no volumes.
        net.versions.1 = net.versions.1.max(100);
    }
    if net.versions.1 < 87 {
        net.integrity_alg.clear();
    }
    let is_large = is_large(&volumes);
    let disk = [(); 2].map(|()| {
        let mut config = disk(chance, fencing, is_volatile);
        if is_large {
            // A full resync is to end in a reasonable time.
            config.resync.resync_rate = config.resync.resync_rate.max(10_000);
        }
        config
    });
    Setup {
        volumes,
        spare: pick(chance, &[0, 0, 8192]),
        net,
        disk,
        resource: ResourceConfig {
            on_no_data: pick(chance, &[OnNoData::IoError, OnNoData::SuspendIo]),
        },
        is_in_sync: chance.chance(5, 6),
        is_volatile,
        atom: pick(chance, &[1, 8]),
        faults: faults(chance),
        net_delay: pick(chance, &[50, 200, 2000, 20_000]),
        disk_delay: pick(chance, &[50, 500, 5000, 30_000]),
        send_buffer: pick(chance, &[16 << 10, 128 << 10, 1 << 20]),
        fence_style: match fencing {
            Fencing::DontCare => FenceStyle::Broken,
            _ => pick(
                chance,
                &[FenceStyle::Outdate, FenceStyle::Shoot, FenceStyle::Outdate, FenceStyle::Broken],
            ),
        },
        clocks: [(); 2].map(|()| Clock {
            offset: chance.below(1 << 40),
            drift: i64::try_from(chance.below(100_000)).unwrap_or(0) - 50_000,
        }),
    }
}

fn net(chance: &mut Chance, protocol: Protocol, two_primaries: bool) -> NetConfig {
    let alg = |chance: &mut Chance, of| {
        if chance.chance(1, of) { "crc32c".to_owned() } else { String::new() }
    };
    let pulls_ahead = protocol == Protocol::A && chance.chance(1, 2);
    NetConfig {
        protocol,
        timeout: Deciseconds(pick(chance, &[10, 60])),
        ko_count: pick(chance, &[0, 2, 7]),
        connect_int: pick(chance, &[1, 3, 10]),
        ping_int: pick(chance, &[1, 3, 10]),
        ping_timeout: Deciseconds(pick(chance, &[3, 5])),
        max_buffers: pick(chance, &[32, 80, 2048]),
        max_epoch_size: pick(chance, &[1, 3, 20, 2048]),
        two_primaries,
        always_asbp: chance.chance(1, 8),
        after_sb: if chance.chance(1, 3) {
            Policies {
                zero: pick(
                    chance,
                    &[
                        ZeroPrimaries::Disconnect,
                        ZeroPrimaries::DiscardYoungerPrimary,
                        ZeroPrimaries::DiscardOlderPrimary,
                        ZeroPrimaries::DiscardZeroChanges,
                        ZeroPrimaries::DiscardLeastChanges,
                    ],
                ),
                one: pick(
                    chance,
                    &[
                        OnePrimary::Disconnect,
                        OnePrimary::Consensus,
                        OnePrimary::DiscardSecondary,
                        OnePrimary::CallPriLost,
                        OnePrimary::ViolentlyAs0p,
                    ],
                ),
                two: pick(
                    chance,
                    &[
                        TwoPrimaries::Disconnect,
                        TwoPrimaries::CallPriLost,
                        TwoPrimaries::ViolentlyAs0p,
                    ],
                ),
            }
        } else {
            Policies::default()
        },
        rr_conflict: pick(
            chance,
            &[
                RrConflict::Disconnect,
                RrConflict::Disconnect,
                RrConflict::CallPriLost,
                RrConflict::Violently,
            ],
        ),
        cram_hmac_alg: if chance.chance(1, 8) { "sha1".to_owned() } else { String::new() },
        shared_secret: Secret("secret".to_owned()),
        integrity_alg: alg(chance, 6),
        verify_alg: alg(chance, 2),
        csums_alg: alg(chance, 4),
        csums_after_crash_only: chance.chance(1, 3),
        use_rle: chance.chance(3, 4),
        on_congestion: if pulls_ahead { OnCongestion::PullAhead } else { OnCongestion::Block },
        congestion_fill: SectorCount(if pulls_ahead {
            pick(chance, &[0, 16, 100, 1000])
        } else {
            0
        }),
        congestion_extents: if pulls_ahead { pick(chance, &[67, 1237]) } else { 1237 },
        versions: (86, pick(chance, &[101, 101, 101, 101, 100, 97, 96, 95, 94, 90, 86])),
        features: pick(chance, &[15, 15, 15, 0, 1, 7]),
        ..NetConfig::default()
    }
}

fn disk(chance: &mut Chance, fencing: Fencing, is_volatile: bool) -> DiskConfig {
    let trusts = !is_volatile && chance.chance(1, 2);
    DiskConfig {
        on_io_error: pick(
            chance,
            &[OnIoError::Detach, OnIoError::Detach, OnIoError::PassOn, OnIoError::CallLocalIoError],
        ),
        fencing,
        disk_flushes: !trusts,
        disk_drain: !(trusts && chance.chance(1, 2)),
        md_flushes: !trusts,
        al_extents: 67,
        al_updates: chance.chance(9, 10),
        read_balancing: pick(
            chance,
            &[
                ReadBalancing::PreferLocal,
                ReadBalancing::PreferRemote,
                ReadBalancing::RoundRobin,
                ReadBalancing::LeastPending,
                ReadBalancing::Striping(15),
            ],
        ),
        resync: ResyncConfig {
            resync_rate: pick(chance, &[250, 10_000, 100_000]),
            c_plan_ahead: pick(chance, &[0, 5, 20]),
            c_delay_target: pick(chance, &[1, 10]),
            c_fill_target: pick(chance, &[0, 100, 10_000]),
            c_max_rate: pick(chance, &[4000, 100_000, 1_000_000]),
        },
        c_min_rate: pick(chance, &[0, 250, 4000]),
        disk_timeout: Deciseconds(pick(chance, &[0, 0, 0, 20])),
        rs_discard_granularity: pick(chance, &[0, 0, 8192, 65_536]),
        discard_zeroes_if_aligned: chance.chance(3, 4),
        ..DiskConfig::default()
    }
}

fn faults(chance: &mut Chance) -> Faults {
    let mut rate = |of: u64, most: u64| {
        if chance.chance(1, of) { u32::try_from(1 + chance.below(most)).unwrap_or(0) } else { 0 }
    };
    Faults {
        write_error: rate(5, 3000),
        read_error: rate(5, 3000),
        meta_error: rate(8, 2000),
        slow_disk: rate(4, 20_000),
        reset: rate(3, 10_000),
        slow_net: rate(4, 5000),
        stray: rate(6, 300_000),
        stall: pick(chance, &[50_000, 1_000_000, 8_000_000]),
    }
}

/// How often each kind of operation comes.
struct Mix {
    write: u64,
    read: u64,
    flush: u64,
    role: u64,
    connection: u64,
    disk: u64,
    sync: u64,
    suspend: u64,
    stop: u64,
    network: u64,
    bad: u64,
    options: u64,
}

fn operations(chance: &mut Chance, setup: &Setup) -> Vec<(u64, Op)> {
    let mut often =
        |of: u64, most: u64| if chance.chance(1, of) { 1 + chance.below(most) } else { 0 };
    let mix = Mix {
        write: 30 + often(1, 60),
        read: often(2, 30),
        flush: often(2, 10),
        role: often(1, 6),
        connection: often(3, 5),
        disk: often(4, 5),
        sync: often(3, 4),
        suspend: often(5, 4),
        stop: often(2, 5),
        network: often(2, 5),
        bad: often(5, 4),
        options: often(6, 3),
    };
    let places: Vec<(u16, u64)> = (0..4 + chance.below(12))
        .map(|_| {
            let volume = u16::try_from(chance.below(setup.volumes.len() as u64)).unwrap_or(0);
            let size = setup.volumes[usize::from(volume)];
            (volume, chance.below(size.saturating_sub(40).max(1)))
        })
        .collect();
    let number = 10 + chance.below(90);
    let span = pick(chance, &[1_000_000_u64, 10_000_000, 40_000_000]);
    let main = side(chance);
    let mut ops = Vec::new();
    for volume in 0..count(setup) {
        let force = !setup.is_in_sync;
        let command = Command::Primary { volume: VolumeNr(volume), force };
        ops.push((0, Op::Admin { node: main, command }));
    }
    let mut at = 0;
    for _ in 0..number {
        // Often many at a time.
        if chance.chance(1, 3) {
            at += chance.below(span * 3 / number);
        } else {
            at += chance.below(300);
        }
        let op = operation(chance, setup, &mix, &places, main);
        ops.push((at, op));
    }
    ops
}

fn operation(
    chance: &mut Chance,
    setup: &Setup,
    mix: &Mix,
    places: &[(u16, u64)],
    main: usize,
) -> Op {
    let node = if chance.chance(3, 4) { main } else { 1 - main };
    let any = side(chance);
    let (volume, place) = pick(chance, places);
    let nr = VolumeNr(volume);
    let size = setup.volumes[usize::from(volume)];
    let start = (place + chance.below(24)).min(size - 1);
    let len = pick(chance, &[1, 2, 7, 8, 8, 8, 16, 33]).min(size - start);
    let kinds = [
        mix.write,
        mix.read,
        mix.flush,
        mix.role,
        mix.connection,
        mix.disk,
        mix.sync,
        mix.suspend,
        mix.stop,
        mix.network,
        mix.bad,
        mix.options,
    ];
    let mut draw = chance.below(kinds.iter().sum());
    let mut kind = 0;
    for (at, weight) in kinds.iter().enumerate() {
        if draw < *weight {
            kind = at;
            break;
        }
        draw -= weight;
    }
    let admin = |node, command| Op::Admin { node, command };
    match kind {
        0 => {
            let how = pick(
                chance,
                &[
                    How::Plain,
                    How::Plain,
                    How::Plain,
                    How::Plain,
                    How::Plain,
                    How::Plain,
                    How::Fua,
                    How::Preflush,
                    How::Discard,
                    How::Zeroes,
                ],
            );
            Op::Write { node, volume, start, len, how }
        }
        1 => Op::Read { node, volume, start, len },
        2 => Op::Flush { node, volume },
        3 => match chance.below(5) {
            0 => admin(any, Command::Secondary(nr)),
            1 => admin(any, Command::Primary { volume: nr, force: chance.chance(1, 6) }),
            _ => admin(node, Command::Primary { volume: nr, force: false }),
        },
        4 => match chance.below(3) {
            0 => admin(any, Command::Disconnect { force: chance.chance(1, 3) }),
            _ => Op::Connect { node: any },
        },
        5 => match chance.below(3) {
            0 => admin(any, Command::Detach { volume: nr, force: chance.chance(1, 3) }),
            _ => Op::Attach { node: any, volume },
        },
        6 => match chance.below(9) {
            0 => admin(any, Command::Invalidate(nr)),
            1 => admin(any, Command::InvalidateRemote(nr)),
            2 | 3 => {
                let start = chance.chance(1, 2).then(|| Sector(chance.below(size)));
                admin(any, Command::Verify { volume: nr, start, stop: None })
            }
            4 => admin(any, Command::PauseSync(nr)),
            5 | 6 => admin(any, Command::ResumeSync(nr)),
            7 => admin(any, Command::Outdate(nr)),
            _ => admin(
                any,
                Command::Resize {
                    volume: nr,
                    size: SectorCount(0),
                    force: false,
                    assume_clean: false,
                    al: Default::default(),
                },
            ),
        },
        7 => match chance.below(3) {
            0 => admin(node, Command::SuspendIo(nr)),
            _ => admin(node, Command::ResumeIo(nr)),
        },
        8 => Op::Stop {
            node: any,
            power_cut: chance.chance(1, 2),
            down: pick(chance, &[1000, 300_000, 5_000_000]),
        },
        9 => match chance.below(4) {
            0 => Op::Reset,
            1 => Op::Block { zero: true, one: false, time: chance.below(4_000_000) },
            2 => Op::Block { zero: false, one: true, time: chance.below(4_000_000) },
            _ => Op::Block { zero: true, one: true, time: chance.below(12_000_000) },
        },
        10 => match chance.below(4) {
            0 => Op::Dead { node: any, volume, is_dead: true },
            1 => Op::Dead { node: any, volume, is_dead: false },
            _ => Op::Bad { node: any, volume, sector: start },
        },
        _ => {
            if chance.chance(1, 2) {
                let mut net = setup.net.clone();
                net.max_buffers = pick(chance, &[32, 2048]);
                net.max_epoch_size = pick(chance, &[1, 5, 2048]);
                net.ping_int = pick(chance, &[1, 10]);
                admin(any, Command::NetOptions(Box::new(net)))
            } else {
                let mut config = setup.disk[any].clone();
                config.c_min_rate = pick(chance, &[0, 250, 4000]);
                config.resync.c_plan_ahead = pick(chance, &[0, 5, 20]);
                config.al_extents = pick(chance, &[67, 100]);
                admin(any, Command::DiskOptions { volume: nr, config: Box::new(config) })
            }
        }
    }
}
