//! The whole engine: any bytes become a sequence of events of a hostile peer, failing disks and a
//! restless administrator.
//!
//! The shell ([`crate::script`]) panics when the engine breaks a promise: a handle used twice, a
//! buffer freed twice or while the disk has it, a request or command answered twice. At the end the
//! peer is gone and all I/O is answered: then nothing may be left without answer, and no buffer
//! lent.

use std::collections::BTreeMap;

use crate::script::{Held, Script, ScriptDisk};
use drbd_core::admin::Command;
use drbd_core::config::{
    DiskConfig, Fencing, NetConfig, OnCongestion, OnIoError, OnNoData, Protocol, ReadBalancing,
    ResourceConfig,
};
use drbd_core::event::{AppOp, Event, IoFailure, StreamLoss, WriteFlags};
use drbd_types::{
    ByteLen, Cstate, Dstate, Fields, Gi, Minor, Role, Sector, SectorCount, SectorRange, StateWord,
    VolumeNr,
};
use drbd_wire::packet::{
    AckKind, BarrierId, Block, BlockAck, BlockDesc, BlockId, BlockRequest, ControllerParams,
    DpFlags, FeatureOffer, Features, ProtocolParams, RequestKind, Sizes, SyncParams, Uuids,
};
use drbd_wire::{Digest, Packet, PeerError, Stream};
use drbdmeta::superblock::Flags;

/// More steps than that only take time.
const STEPS_MAX: usize = 400;

struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((first, rest)) => {
                self.0 = rest;
                *first
            }
            None => 0,
        }
    }

    fn number(&mut self) -> u64 {
        let bytes: [u8; 8] = core::array::from_fn(|_| self.byte());
        u64::from_le_bytes(bytes)
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> Option<T> {
        let at = usize::from(self.byte()).checked_rem(from.len())?;
        from.get(at).copied()
    }

    fn flag(&mut self) -> bool {
        self.byte() & 1 == 1
    }
}

struct Fuzz<'a> {
    input: Bytes<'a>,
    script: Script,
    /// Handles that the engine has sent.
    ids: Vec<(BlockId, u64)>,
    /// Numbers of epochs that it has ended.
    barriers: Vec<BarrierId>,
    /// Resync requests of the engine.
    asked: Vec<(u64, u32)>,
    seq: u32,
    net: NetConfig,
}

/// Feeds the bytes.
///
/// # Panics
/// The engine breaks a promise.
pub fn engine(data: &[u8]) {
    let mut input = Bytes(data);
    let mut disks = BTreeMap::new();
    let volumes = 1 + u16::from(input.byte() % 2);
    for nr in 0..volumes {
        disks.insert(nr, disk(&mut input));
    }
    let mut script = Script::new(disks);
    script.is_resolver = input.flag();
    let version = [101, 101, 101, 100, 97, 96, 95, 90, 89, 86];
    let max = input.pick(&version).unwrap_or(101);
    let features = Features::from_bits_retain(u32::from(input.byte() & 15));
    script.offer = FeatureOffer { min: 86, max, features };
    let net = net(&mut input);
    let mut fuzz = Fuzz {
        input,
        script,
        ids: Vec::new(),
        barriers: Vec::new(),
        asked: Vec::new(),
        seq: 0,
        net,
    };
    fuzz.begin(volumes);
    for _ in 0..STEPS_MAX {
        if fuzz.input.0.is_empty() {
            break;
        }
        fuzz.step();
        fuzz.look();
        let broken = fuzz.script.engine.audit();
        assert!(broken.is_empty(), "{broken:?}");
    }
    fuzz.end();
}

fn disk(input: &mut Bytes<'_>) -> ScriptDisk {
    let sectors = [16_384, 4096, 65_536, 1001][usize::from(input.byte() % 4)];
    let kind = input.byte();
    let bits: Vec<u64> = (0..u64::from(input.byte() % 8)).map(|n| n * 37 % 120).collect();
    ScriptDisk::new(
        sectors,
        |sb| {
            sb.la_size = SectorCount(sectors);
            if kind & 1 == 0 {
                sb.current = Gi(0x1111_0000 * u64::from(1 + (kind >> 1 & 1)));
                sb.flags |= Flags::CONSISTENT | Flags::WAS_UP_TO_DATE;
            }
            if kind & 4 != 0 {
                sb.bitmap = Gi(0x1111_0000);
            }
            if kind & 8 != 0 {
                sb.flags |= Flags::CRASHED_PRIMARY;
            }
            if kind & 16 != 0 {
                sb.flags |= Flags::FULL_SYNC;
            }
            if kind & 32 != 0 {
                sb.flags |= Flags::PEER_OUTDATED;
            }
        },
        bits,
    )
}

fn net(input: &mut Bytes<'_>) -> NetConfig {
    let protocol = input.pick(&[Protocol::A, Protocol::B, Protocol::C, Protocol::C]);
    let protocol = protocol.unwrap_or_default();
    let congestion = protocol == Protocol::A && input.flag();
    let bits = input.byte();
    NetConfig {
        protocol,
        two_primaries: protocol == Protocol::C && bits & 1 == 1,
        use_rle: bits & 2 == 0,
        always_asbp: bits & 4 != 0,
        verify_alg: if bits & 8 == 0 { "crc32c".into() } else { String::new() },
        csums_alg: if bits & 16 == 0 { String::new() } else { "crc32c".into() },
        integrity_alg: if bits & 32 == 0 { String::new() } else { "crc32c".into() },
        max_epoch_size: if bits & 64 == 0 { 2048 } else { 2 },
        on_congestion: if congestion { OnCongestion::PullAhead } else { OnCongestion::Block },
        congestion_fill: SectorCount(if congestion { 16 } else { 0 }),
        discard_my_data: bits & 128 != 0,
        ..NetConfig::default()
    }
}

fn config(input: &mut Bytes<'_>) -> DiskConfig {
    let bits = input.byte();
    let on_io_error = [OnIoError::Detach, OnIoError::PassOn, OnIoError::CallLocalIoError];
    let fencing = [Fencing::DontCare, Fencing::ResourceOnly, Fencing::ResourceAndStonith];
    let balancing = [
        ReadBalancing::PreferLocal,
        ReadBalancing::PreferRemote,
        ReadBalancing::RoundRobin,
        ReadBalancing::LeastPending,
    ];
    DiskConfig {
        on_io_error: input.pick(&on_io_error).unwrap_or_default(),
        fencing: input.pick(&fencing).unwrap_or_default(),
        read_balancing: input.pick(&balancing).unwrap_or_default(),
        disk_flushes: bits & 1 == 0,
        disk_drain: bits & 2 == 0,
        md_flushes: bits & 4 == 0,
        al_updates: bits & 8 == 0,
        al_extents: if bits & 16 == 0 { 1237 } else { 7 },
        rs_discard_granularity: if bits & 32 == 0 { 0 } else { 65_536 },
        ..DiskConfig::default()
    }
}

impl Fuzz<'_> {
    fn begin(&mut self, volumes: u16) {
        for nr in 0..volumes {
            let (volume, minor) = (VolumeNr(nr), Minor(u32::from(nr)));
            self.script.begin(Command::NewVolume { volume, minor });
            if !self.input.byte().is_multiple_of(8) {
                let config = Box::new(config(&mut self.input));
                self.script.begin(Command::Attach { volume, config });
            }
        }
        if self.input.byte().is_multiple_of(4) {
            self.script.begin(Command::Primary { volume: VolumeNr(0), force: true });
        }
        self.script.begin(Command::Connect(Box::new(self.net.clone())));
        for _ in 0..30 {
            self.script.pass(100_000);
        }
        if !self.input.byte().is_multiple_of(8) {
            self.greet();
        }
    }

    /// A handshake as a real peer makes it.
    fn greet(&mut self) {
        let params = self.protocol();
        self.data(0, Packet::Protocol(params), 0);
        let volumes: Vec<u16> = self.script.disks.keys().copied().collect();
        for nr in volumes {
            let params = self.sync_param();
            self.data(nr, params, 0);
            let own = self.script.volume(nr);
            let size = own.as_ref().map_or(SectorCount(16_384), |v| v.size);
            let sizes = Sizes {
                d_size: size,
                u_size: SectorCount(0),
                c_size: size,
                max_bio_size: ByteLen(1 << 20),
                queue_order_type: 0,
                dds_flags: 0,
                limits: None,
            };
            self.data(nr, Packet::Sizes(sizes), 0);
            let current = own.map_or(Gi(0x1111_0000), |v| v.slots.current);
            let (current, bitmap) = match self.input.byte() % 4 {
                0 => (Gi(0x2222_0000), current),
                1 => (Gi(0x1111_0000), Gi(0)),
                _ => (current, Gi(0)),
            };
            let uuids = Uuids { current, bitmap, history: [Gi(0); 2], dirty_bits: 0, flags: 0 };
            self.data(nr, Packet::Uuids(uuids), 0);
            let role =
                if self.input.byte().is_multiple_of(3) { Role::Primary } else { Role::Secondary };
            let disk = self.input.pick(&[Dstate::UpToDate, Dstate::UpToDate, Dstate::Inconsistent]);
            let state = Fields {
                role,
                conn: Cstate::WFConnection,
                disk: disk.unwrap_or(Dstate::UpToDate),
                ..Fields::NEW
            };
            self.data(nr, Packet::State(state.pack()), 0);
        }
    }

    fn data(&mut self, volume: u16, packet: Packet, len: u64) {
        self.script.peer(Stream::Data, volume, packet, len);
    }

    fn protocol(&mut self) -> ProtocolParams {
        ProtocolParams {
            protocol: self.net.protocol.number(),
            after_sb: self.net.after_sb.numbers(),
            discard_my_data: self.input.byte() % 32 == 31,
            dry_run: self.input.byte() % 32 == 31,
            two_primaries: u32::from(self.net.two_primaries),
            integrity_alg: self.net.integrity_alg.clone(),
        }
    }

    fn sync_param(&mut self) -> Packet {
        let controller = self.input.flag().then(|| ControllerParams {
            plan_ahead: u32::from(self.input.byte()),
            delay_target: u32::from(self.input.byte()),
            fill_target: u32::from(self.input.byte()),
            max_rate: u32::from(self.input.byte()) << 10,
        });
        Packet::SyncParam(SyncParams {
            resync_rate: u32::from(self.input.byte()) << 8,
            verify_alg: self.net.verify_alg.clone(),
            csums_alg: self.net.csums_alg.clone(),
            controller,
        })
    }

    /// What the engine sent: its handles and wishes make later packets fit.
    fn look(&mut self) {
        while let Some(sent) = self.script.sent.pop_front() {
            match sent.packet {
                Packet::Data(b, _) | Packet::Trim(b, _) | Packet::Zeroes(b, _) => {
                    self.ids.push((b.id, b.sector.0));
                }
                Packet::Request(RequestKind::Data, r) => self.ids.push((r.id, r.sector.0)),
                Packet::Request(_, r) | Packet::CsumRequest(r, _) => {
                    self.asked.push((r.sector.0, r.size));
                }
                Packet::Barrier(id) => self.barriers.push(id),
                _ => {}
            }
        }
        if self.ids.len() > 64 {
            self.ids.drain(..32);
        }
    }

    fn step(&mut self) {
        let kind = self.input.byte();
        match kind % 16 {
            0..=5 => self.data_packet(),
            6..=8 => self.meta_packet(),
            9 | 10 => self.application(),
            11 => self.admin(),
            12 | 13 => self.io(),
            14 => {
                let time = [1_000, 100_000, 500_000, 3_000_000];
                self.script.pass(self.input.pick(&time).unwrap_or(1000));
            }
            _ => self.trouble(),
        }
    }

    fn volume(&mut self) -> u16 {
        match self.input.byte() {
            0..=180 => 0,
            181..=250 => 1,
            _ => 7,
        }
    }

    fn sector(&mut self) -> u64 {
        match self.input.byte() {
            0..=200 => u64::from(self.input.byte()) * 8,
            201..=230 => u64::from(self.input.byte()),
            231..=250 => 16_384 - u64::from(self.input.byte()),
            _ => self.input.number(),
        }
    }

    fn size(&mut self) -> u32 {
        match self.input.byte() {
            0..=180 => 4096,
            181..=200 => 512,
            201..=230 => 65_536,
            231..=240 => 1 << 20,
            _ => u32::try_from(self.input.number() & 0xffff_ffff).unwrap_or(0),
        }
    }

    /// The bytes that the reader would have let through as data.
    fn data_len(&mut self) -> u64 {
        u64::from(self.size()).clamp(512, 1 << 20) / 512 * 512
    }

    fn block(&mut self) -> Block {
        self.seq = self.seq.wrapping_add(1);
        let seq = if self.input.byte() < 240 { self.seq } else { u32::from(self.input.byte()) };
        let flags = match self.input.byte() {
            0..=180 => DpFlags::SEND_WRITE_ACK,
            181..=200 => DpFlags::SEND_RECEIVE_ACK,
            _ => DpFlags::from_bits_retain(u32::from(self.input.byte()) << 1),
        };
        let id = BlockId::from_number(u64::from(self.seq));
        Block { sector: Sector(self.sector()), id, seq, flags }
    }

    fn request(&mut self) -> BlockRequest {
        let id = BlockId::SYNCER;
        BlockRequest { sector: Sector(self.sector()), id, size: self.size(), undefined: 0 }
    }

    fn data_packet(&mut self) {
        let volume = self.volume();
        let len = self.data_len();
        let (packet, len) = match self.input.byte() % 24 {
            0..=4 => (Packet::Data(self.block(), Digest::NONE), len),
            5 => (Packet::Trim(self.block(), self.size()), 0),
            6 => (Packet::Zeroes(self.block(), self.size()), 0),
            7 => {
                let mut block = self.block();
                (block.id, block.sector.0) = self.any_id();
                (Packet::DataReply(block, Digest::NONE), len)
            }
            8 | 9 => {
                let mut block = self.block();
                let (sector, size) = self.asked.pop().unwrap_or((block.sector.0, 4096));
                block.sector = Sector(sector);
                (Packet::RsDataReply(block, Digest::NONE), u64::from(size).max(512))
            }
            10 => {
                let (sector, size) = self.asked.pop().unwrap_or((8, 4096));
                let desc = BlockDesc { sector: Sector(sector), size, undefined: 0 };
                (Packet::RsDeallocated(desc), 0)
            }
            11 | 12 => (Packet::Barrier(BarrierId::from_number(self.seq)), 0),
            13 => {
                let kinds = [
                    RequestKind::Data,
                    RequestKind::Resync,
                    RequestKind::ThinResync,
                    RequestKind::Verify,
                ];
                let kind = self.input.pick(&kinds).unwrap_or(RequestKind::Data);
                (Packet::Request(kind, self.request()), 0)
            }
            14 => (Packet::CsumRequest(self.request(), Digest::NONE), 0),
            15 => {
                let mut request = self.request();
                if let Some((sector, size)) = self.asked.pop() {
                    (request.sector, request.size) = (Sector(sector), size);
                }
                (Packet::OvReply(request, Digest::NONE), 0)
            }
            16 => {
                let (sector, size) = (Sector(self.sector()), self.size());
                (Packet::OutOfSync(BlockDesc { sector, size, undefined: 0 }), 0)
            }
            17 => (self.bitmap(volume), 0),
            18 => (Packet::SyncUuid(Gi(self.input.number())), 0),
            19 | 20 => (Packet::State(self.state()), 0),
            21 => {
                let (mask, val) = self.change();
                let is_conn = self.input.byte().is_multiple_of(4);
                let packet = if is_conn {
                    Packet::ConnStChgReq(mask, val)
                } else {
                    Packet::StateChgReq(mask, val)
                };
                (packet, 0)
            }
            22 => (self.parameters(), 0),
            _ => return self.greet(),
        };
        self.data(volume, packet, len);
    }

    fn bitmap(&mut self, volume: u16) -> Packet {
        let bits = self.script.volume(volume).map_or(0, |v| v.size.0.div_ceil(8));
        let words = usize::try_from(bits.div_ceil(64)).unwrap_or(0).min(512);
        match self.input.byte() % 4 {
            0 => Packet::Bitmap(Box::default()),
            1 => Packet::Bitmap((0..words * 8).map(|_| self.input.byte()).collect()),
            2 => Packet::CompressedBitmap(
                (0..self.input.byte() % 16).map(|n| n.wrapping_mul(31)).collect(),
            ),
            _ => {
                let body: Vec<u8> =
                    (0..1 + self.input.byte() % 24).map(|_| self.input.byte()).collect();
                Packet::CompressedBitmap(body.into())
            }
        }
    }

    fn state(&mut self) -> StateWord {
        if self.input.byte() > 240 {
            return StateWord(u32::try_from(self.input.number() & 0xffff_ffff).unwrap_or(0));
        }
        let role = if self.input.flag() { Role::Primary } else { Role::Secondary };
        let conn = self.input.pick(Cstate::ALL).unwrap_or(Cstate::Connected);
        let disk = self.input.pick(Dstate::ALL).unwrap_or(Dstate::UpToDate);
        let pdsk = self.input.pick(Dstate::ALL).unwrap_or(Dstate::UpToDate);
        let bits = self.input.byte();
        let mut state = Fields { role, conn, disk, pdsk, ..Fields::NEW };
        state.user_isp = bits & 7 == 7;
        state.aftr_isp = bits & 56 == 56;
        state.pack()
    }

    fn change(&mut self) -> (StateWord, StateWord) {
        let val = self.state();
        let masks = [0x3, 0x1e00, 0x1f0, 0x1e003, u32::MAX];
        let mask = StateWord(self.input.pick(&masks).unwrap_or(3));
        (mask, StateWord(val.0 & mask.0))
    }

    fn parameters(&mut self) -> Packet {
        match self.input.byte() % 6 {
            0 => Packet::Protocol(self.protocol()),
            1 => Packet::ProtocolUpdate(self.protocol()),
            2 => self.sync_param(),
            3 => Packet::UnplugRemote,
            4 => Packet::Uuids(Uuids {
                current: Gi(0x1111_0000 * u64::from(self.input.byte() % 3)),
                bitmap: Gi(0x1111_0000 * u64::from(self.input.byte() % 3)),
                history: [Gi(self.input.number()), Gi(0)],
                dirty_bits: u64::from(self.input.byte()),
                flags: u64::from(self.input.byte() & 15),
            }),
            _ => {
                let size = match self.input.byte() {
                    0..=100 => 16_384,
                    101..=150 => 20_000,
                    151..=200 => 0,
                    _ => self.input.number(),
                };
                Packet::Sizes(Sizes {
                    d_size: SectorCount(size),
                    u_size: SectorCount(u64::from(self.input.byte() / 250) * 8000),
                    c_size: SectorCount(if self.input.flag() { size } else { 0 }),
                    max_bio_size: ByteLen(u64::from(self.input.byte()) << 12),
                    queue_order_type: 0,
                    dds_flags: u16::from(self.input.byte() & 3),
                    limits: None,
                })
            }
        }
    }

    fn any_id(&mut self) -> (BlockId, u64) {
        let known = self.ids.len();
        if known == 0 || self.input.byte() > 240 {
            return (BlockId::from_number(self.input.number()), 8);
        }
        let at = usize::from(self.input.byte()) % known;
        self.ids.get(at).copied().unwrap_or((BlockId::SYNCER, 8))
    }

    fn meta_packet(&mut self) {
        let volume = self.volume();
        let packet = match self.input.byte() % 12 {
            0 => Packet::Ping,
            1 | 2 => Packet::PingAck,
            3 | 4 => {
                let count = u32::from(self.input.byte() % 4);
                let number = if self.barriers.is_empty() {
                    BarrierId::from_number(u32::from(self.input.byte()))
                } else {
                    self.barriers.remove(0)
                };
                Packet::BarrierAck(number, count)
            }
            5 => Packet::StateChgReply(i32::from(self.input.byte() % 3) - 1),
            6 => Packet::ConnStChgReply(i32::from(self.input.byte() % 3) - 1),
            _ => {
                let kinds = [
                    AckKind::WriteAck,
                    AckKind::WriteAck,
                    AckKind::RecvAck,
                    AckKind::RsWriteAck,
                    AckKind::Superseded,
                    AckKind::NegAck,
                    AckKind::NegDataReply,
                    AckKind::NegRsDataReply,
                    AckKind::OvResult,
                    AckKind::RsIsInSync,
                    AckKind::RsCancel,
                    AckKind::RetryWrite,
                ];
                let kind = self.input.pick(&kinds).unwrap_or(AckKind::WriteAck);
                let (id, sector) = match self.input.byte() {
                    0..=170 => self.any_id(),
                    171..=220 => (BlockId::SYNCER, self.sector()),
                    221..=230 => (BlockId::OUT_OF_SYNC, self.sector()),
                    _ => (BlockId::from_number(self.input.number()), self.sector()),
                };
                let (sector, size) = (Sector(sector), self.size());
                Packet::Ack(kind, BlockAck { sector, id, size, seq: self.seq })
            }
        };
        self.script.peer(Stream::Meta, volume, packet, 0);
    }

    fn application(&mut self) {
        let volume = VolumeNr(self.volume());
        let start = Sector(self.sector());
        let len = SectorCount(u64::from(self.size()).min(1 << 20) / 512);
        let Some(range) = SectorRange::new(start, len) else { return };
        let bits = self.input.byte();
        let flags = WriteFlags { fua: bits & 1 == 1, preflush: bits & 2 == 2, sync: bits & 4 == 4 };
        let kind = self.input.byte() % 8;
        self.script.app(volume, |script| match kind {
            0 | 1 => AppOp::Read { range, buf: script.buf(len.0 * 512) },
            2..=4 => AppOp::Write { range, buf: script.buf(len.0 * 512), flags },
            5 => AppOp::Discard { range },
            6 => AppOp::WriteZeroes { range, may_unmap: bits & 8 == 8 },
            _ => AppOp::Flush,
        });
    }

    fn admin(&mut self) {
        let volume = VolumeNr(self.volume());
        let flag = self.input.flag();
        let command = match self.input.byte() % 24 {
            0 | 1 => Command::Primary { volume, force: flag },
            2 => Command::Secondary(volume),
            3 => Command::Detach { volume, force: flag },
            4 | 5 => {
                if let Some(disk) = self.script.disks.get_mut(&volume.0) {
                    disk.apply_al();
                }
                Command::Attach { volume, config: Box::new(config(&mut self.input)) }
            }
            6 | 7 => Command::Connect(Box::new(self.net.clone())),
            8 => Command::Disconnect { force: flag },
            9 => Command::Invalidate(volume),
            10 => Command::InvalidateRemote(volume),
            11 => Command::Outdate(volume),
            12 => Command::Verify { volume, start: None, stop: flag.then_some(Sector(800)) },
            13 => Command::PauseSync(volume),
            14 => Command::ResumeSync(volume),
            15 => Command::SuspendIo(volume),
            16 => Command::ResumeIo(volume),
            17 => Command::NewCurrentUuid { volume, clear_bitmap: flag },
            18 => {
                let size = SectorCount(u64::from(self.input.byte()) * 100);
                let assume_clean = self.input.flag();
                Command::Resize { volume, size, force: flag, assume_clean, al: Default::default() }
            }
            19 => {
                let on_no_data = if flag { OnNoData::SuspendIo } else { OnNoData::IoError };
                Command::ResourceOptions(ResourceConfig { on_no_data })
            }
            20 => Command::NetOptions(Box::new(net(&mut self.input))),
            21 => Command::DiskOptions { volume, config: Box::new(config(&mut self.input)) },
            22 => Command::DelVolume(volume),
            _ => Command::NewVolume { volume, minor: Minor(u32::from(volume.0)) },
        };
        self.script.begin(command);
    }

    /// I/O is held, answered out of order, fails.
    fn io(&mut self) {
        match self.input.byte() % 8 {
            0 => self.script.holds = true,
            1 => {
                self.script.holds = false;
                self.script.answer_all();
            }
            kind => {
                let held = self.script.held.len();
                if held == 0 {
                    return;
                }
                let at = usize::from(self.input.byte()) % held;
                let failure = (kind == 7).then_some(IoFailure::Device(5));
                // Devices are closed, programs end.
                let can_fail = !matches!(self.script.held.get(at), Some(Held::Call(..)));
                self.script.answer(at, failure.filter(|_| can_fail));
            }
        }
    }

    fn trouble(&mut self) {
        match self.input.byte() % 8 {
            0 => {
                let volume = VolumeNr(self.volume());
                let must_wait = self.input.flag();
                self.script.feed(Event::Dependency { volume, must_wait });
            }
            1 => {
                let volume = VolumeNr(self.volume());
                let users = u32::from(self.input.byte() % 2);
                self.script.feed(Event::OpenCount { volume, users });
            }
            2 => {
                let stream = if self.input.flag() { Stream::Data } else { Stream::Meta };
                self.script.feed(Event::SendQueue {
                    stream,
                    waiting: ByteLen(u64::from(self.input.byte())),
                    is_congested: self.input.flag(),
                    moved: u64::from(self.input.byte()),
                });
            }
            3 => {
                let exits = ["FencePeer", "BeforeResyncTarget", "BeforeResyncSource"];
                let exit = i32::from(self.input.byte() % 9);
                self.script.exits.insert(self.input.pick(&exits).unwrap_or("FencePeer"), exit);
            }
            4 => self.script.is_reachable = self.input.flag(),
            _ if !self.script.is_up => {
                self.script.is_reachable = true;
                self.script.pass(12_000_000);
                self.greet();
            }
            kind => {
                let stream = if self.input.flag() { Stream::Data } else { Stream::Meta };
                let how = match kind {
                    5 => StreamLoss::Closed,
                    6 => StreamLoss::Reset,
                    _ => StreamLoss::Bad { error: PeerError::Padding },
                };
                self.script.lose(stream, how);
            }
        }
    }

    /// Everything comes to its end: the peer is gone, disks answer, suspensions are lifted.
    fn end(mut self) {
        let script = &mut self.script;
        script.holds = false;
        script.answer_all();
        script.is_reachable = false;
        script.feed(Event::StreamLost { stream: Stream::Data, how: StreamLoss::Reset });
        script.feed(Event::StreamLost { stream: Stream::Meta, how: StreamLoss::Reset });
        for _ in 0..3 {
            script.begin(Command::Disconnect { force: true });
            script.pass(70_000_000);
            for nr in [0, 1, 7] {
                script.begin(Command::ResumeIo(VolumeNr(nr)));
            }
            script.pass(1_000_000);
        }
        for nr in [0, 1, 7] {
            script.begin(Command::Detach { volume: VolumeNr(nr), force: true });
            script.begin(Command::ResumeIo(VolumeNr(nr)));
        }
        script.pass(70_000_000);
        let waits = script.engine.waits();
        assert_eq!(script.unanswered(), 0, "without answer: {waits:#?}");
        assert_eq!(script.buffers(), 0, "buffers are lent: {waits:#?}");
        let broken = script.engine.audit_idle();
        assert!(broken.is_empty(), "{broken:?} {waits:#?}");
    }
}
