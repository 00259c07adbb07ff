//! The state of a recorded node when its session began: disks, generations, bits, settings.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result};
use drbd_core::config::{DiskConfig, NetConfig, OnCongestion, Protocol, ResyncConfig};
use drbd_core::generation::splitbrain::Policies;
use drbd_sim::script::{Script, ScriptDisk};
use drbd_types::{Dstate, Fields, Gi, Role, SectorCount};
use drbd_wire::bitmap::{decode_plain, decode_runs};
use drbd_wire::packet::{AckKind, BlockId, FeatureOffer, ProtocolParams, Sizes, SyncParams, Uuids};
use drbd_wire::{Digest, Packet, Stream};
use drbdmeta::superblock::Flags;

use crate::wirecase::{Direction, Session};

/// What the engine begins with.
pub(super) struct Start {
    pub(super) disks: BTreeMap<u16, ScriptDisk>,
    /// Settings of the disk; `None`: there is no disk yet.
    pub(super) volumes: BTreeMap<u16, Option<DiskConfig>>,
    pub(super) primaries: Vec<u16>,
    /// Volumes whose resync was paused.
    pub(super) paused: Vec<u16>,
    pub(super) net: NetConfig,
    pub(super) is_resolver: bool,
    pub(super) offer: FeatureOffer,
}

/// The first packets of a volume.
#[derive(Default)]
struct First {
    sizes: Option<Sizes>,
    uuids: Option<Uuids>,
    state: Option<Fields>,
    params: Option<SyncParams>,
}

pub(super) fn disk_of(params: &SyncParams) -> DiskConfig {
    let controller = params.controller.map_or_else(ResyncConfig::default, |c| ResyncConfig {
        c_plan_ahead: c.plan_ahead,
        c_delay_target: c.delay_target,
        c_fill_target: c.fill_target,
        c_max_rate: c.max_rate,
        resync_rate: params.resync_rate,
    });
    let resync = ResyncConfig { resync_rate: params.resync_rate, ..controller };
    DiskConfig { resync, ..DiskConfig::default() }
}

pub(super) fn net_of(params: &ProtocolParams) -> Option<NetConfig> {
    Some(NetConfig {
        protocol: Protocol::from_number(params.protocol)?,
        after_sb: Policies::from_peer(Policies::default().numbers())?,
        two_primaries: params.two_primaries != 0,
        integrity_alg: params.integrity_alg.clone(),
        ..NetConfig::default()
    })
}

pub(super) fn of(session: &Session, me: Direction) -> Result<Start> {
    let other = if me == Direction::A2b { Direction::B2a } else { Direction::A2b };
    let data = &session.streams[&(Stream::Data, me)];
    let meta = &session.streams[&(Stream::Meta, me)];
    let mut volumes: BTreeMap<u16, First> = BTreeMap::new();
    let mut protocol = None;
    for recorded in data {
        let first = volumes.entry(recorded.volume).or_default();
        match &recorded.packet {
            Packet::Sizes(sizes) => {
                first.sizes.get_or_insert(*sizes);
            }
            Packet::Uuids(uuids) if first.state.is_none() => {
                first.uuids.get_or_insert(*uuids);
            }
            Packet::State(word) => {
                first.state.get_or_insert(word.unpack().ok().context("state")?);
            }
            Packet::SyncParam(params) => {
                first.params.get_or_insert_with(|| params.clone());
            }
            Packet::Protocol(params) => {
                protocol.get_or_insert_with(|| params.clone());
            }
            _ => {}
        }
    }
    volumes.retain(|_, first| first.sizes.is_some());
    let mut net = net_of(&protocol.context("no P_PROTOCOL")?).context("unknown protocol")?;
    net.versions = (86, session.version);
    net.use_rle = session.option("use-rle") != Some("no");
    net.features = session.features.bits();
    if session.option("on-congestion") == Some("pull-ahead") {
        net.on_congestion = OnCongestion::PullAhead;
        net.congestion_fill = congestion(session, me);
    }
    let mut start = Start {
        disks: BTreeMap::new(),
        volumes: BTreeMap::new(),
        primaries: Vec::new(),
        paused: Vec::new(),
        net,
        is_resolver: !matches!(meta.first().map(|r| &r.packet), Some(Packet::InitialMeta)),
        offer: FeatureOffer { min: 86, max: session.version, features: session.features },
    };
    for (nr, first) in volumes {
        let state = first.state.unwrap_or(Fields::NEW);
        if let Some(params) = &first.params {
            start.net.verify_alg.clone_from(&params.verify_alg);
            start.net.csums_alg.clone_from(&params.csums_alg);
        }
        if state.role == Role::Primary {
            start.primaries.push(nr);
        }
        if state.user_isp {
            start.paused.push(nr);
        }
        let Some((sizes, uuids)) =
            first.sizes.zip(first.uuids).filter(|_| state.disk >= Dstate::Inconsistent)
        else {
            start.volumes.insert(nr, None);
            continue;
        };
        let size = if sizes.c_size.0 > 0 { sizes.c_size } else { sizes.d_size };
        let bits = bits_of(session, me, other, nr, size, &uuids);
        let disk = ScriptDisk::new(
            sizes.d_size.0,
            |superblock| {
                superblock.la_size = size;
                superblock.current = uuids.current;
                superblock.bitmap = uuids.bitmap;
                superblock.history = uuids.history;
                if state.role == Role::Primary && uuids.bitmap.0 > 0 {
                    // The promotion makes the generation that the bitmap belongs to.
                    superblock.current = Gi(uuids.bitmap.0 & !1);
                    superblock.bitmap = Gi(0);
                }
                superblock.flags |= flags_of(&state, &uuids);
            },
            bits,
        );
        start.disks.insert(nr, disk);
        let mut config = first.params.as_ref().map_or_else(DiskConfig::default, disk_of);
        config.size = sizes.u_size;
        if let Some(bytes) = session.option("rs-discard-granularity") {
            config.rs_discard_granularity = bytes.parse()?;
        }
        start.volumes.insert(nr, Some(config));
    }
    Ok(start)
}

/// How many sectors were in flight when the recorded node pulled ahead. (What its sender had not
/// handed to TCP did not count yet, which a recording does not show.)
fn congestion(session: &Session, me: Direction) -> SectorCount {
    let mut writes = std::collections::VecDeque::new();
    for at in &session.order {
        match session.packet(at).map(|r| (&r.packet, r.data.len())) {
            Some((Packet::Data(..), len)) if at.direction == me => writes.push_back(len as u64),
            Some((Packet::BarrierAck(_, count), _)) if at.direction != me => {
                writes.drain(..writes.len().min(*count as usize));
            }
            Some((Packet::OutOfSync(_), _)) if at.direction == me => break,
            _ => {}
        }
    }
    SectorCount(writes.iter().sum::<u64>() / 512)
}

fn flags_of(state: &Fields, uuids: &Uuids) -> Flags {
    let mut flags = match state.disk {
        Dstate::UpToDate => Flags::CONSISTENT | Flags::WAS_UP_TO_DATE,
        // Without fencing a disk that was UpToDate comes up so; Consistent needs more.
        Dstate::Consistent => Flags::CONSISTENT | Flags::WAS_UP_TO_DATE,
        Dstate::Outdated => Flags::CONSISTENT,
        _ => Flags::empty(),
    };
    flags.set(Flags::CRASHED_PRIMARY, uuids.flags & 2 != 0);
    flags.set(Flags::PEER_OUTDATED, state.pdsk == Dstate::Outdated);
    flags
}

/// The set bits. Their number is in P_UUIDS; which ones they are shows in the first bitmap that the
/// node sends, unless it is the answer of a target.
fn bits_of(
    session: &Session,
    me: Direction,
    other: Direction,
    nr: u16,
    size: SectorCount,
    uuids: &Uuids,
) -> Vec<u64> {
    let all = size.bits_ceil().0;
    let count = uuids.dirty_bits;
    if count == 0 || count >= all {
        return (0..if count == 0 { 0 } else { all }).collect();
    }
    let own = transfer(session, me, nr, all);
    if own.len() as u64 == count {
        return own.into_iter().collect();
    }
    // A target answers with the union: prefer bits that the source has not.
    let peer = transfer(session, other, nr, all);
    let mut bits: Vec<u64> = own.difference(&peer).copied().collect();
    bits.extend(own.intersection(&peer));
    bits.extend((0..all).filter(|bit| !own.contains(bit)));
    bits.truncate(usize::try_from(count).unwrap_or(usize::MAX));
    bits
}

/// The bits of the first bitmap that a node sends.
fn transfer(session: &Session, from: Direction, nr: u16, bits: u64) -> BTreeSet<u64> {
    let mut set = BTreeSet::new();
    let mut position = 0;
    for recorded in &session.streams[&(Stream::Data, from)] {
        if recorded.volume != nr {
            continue;
        }
        let chunk = recorded.context.bitmap_chunk();
        let at = match &recorded.packet {
            Packet::CompressedBitmap(body) => {
                decode_runs(body, position, bits, |run| set.extend(run))
            }
            Packet::Bitmap(body) if !body.is_empty() => {
                decode_plain(body, position, bits, chunk, |at, word| {
                    set.extend((0..64).filter(|bit| word >> bit & 1 == 1).map(|bit| at + bit));
                })
            }
            _ => continue,
        };
        match at {
            Ok(at) if at < bits => position = at,
            _ => break,
        }
    }
    set
}

/// What the recorded node found on its disk, from what it answered.
pub(super) fn oracles(script: &mut Script, session: &Session, me: Direction) {
    let other = if me == Direction::A2b { Direction::B2a } else { Direction::A2b };
    let mut digests: BTreeMap<u64, Digest> = BTreeMap::new();
    let mut zero: BTreeSet<u64> = BTreeSet::new();
    let mut equal: BTreeSet<u64> = BTreeSet::new();
    for recorded in session.streams.iter().filter(|(k, _)| k.1 == me).flat_map(|(_, s)| s) {
        match &recorded.packet {
            Packet::RsDeallocated(desc) => drop(zero.insert(desc.sector.0)),
            Packet::OvReply(request, digest) | Packet::CsumRequest(request, digest) => {
                digests.insert(request.sector.0, *digest);
            }
            Packet::Ack(AckKind::OvResult, ack) if ack.id != BlockId::OUT_OF_SYNC => {
                equal.insert(ack.sector.0);
            }
            Packet::Ack(AckKind::RsIsInSync, ack) => drop(equal.insert(ack.sector.0)),
            _ => {}
        }
    }
    // Equal means: the same digest as the peer's.
    for recorded in &session.streams[&(Stream::Data, other)] {
        if let Packet::OvReply(request, digest) | Packet::CsumRequest(request, digest) =
            &recorded.packet
            && equal.contains(&request.sector.0)
        {
            digests.insert(request.sector.0, *digest);
        }
    }
    let other_digest = Digest::new(&[0xEE; 16]);
    script.digest = Box::new(move |range| digests.get(&range.start.0).copied().or(other_digest));
    script.is_zero = Box::new(move |range| zero.contains(&range.start.0));
}
