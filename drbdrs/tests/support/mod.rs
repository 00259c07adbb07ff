//! A double of the engine that does everything on the own disk, and a plane around it with an open
//! NBD door.

#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    clippy::unwrap_used,
    reason = "support of tests; every suite uses some of it"
)]

pub mod client;

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use drbd_core::action::{Action, Actions, AppError, DeviceOffer, DiskOp, MetaOp};
use drbd_core::admin::Command as AdminCommand;
use drbd_core::event::{AppOp, AppRequest, Event, MetaAnswer};
use drbd_core::ids::{AppId, BufId, IoId, Ticket};
use drbd_types::{SectorRange, Tick, VolumeNr};
use drbdmeta::layout::Placement;
use drbdrs::front::nbd::door::{Door, Entry, Listen, Registry};
use drbdrs::front::nbd::handshake::Export;
use drbdrs::front::nbd::server::Extent;
use drbdrs::plane::buf::PoolSize;
use drbdrs::plane::disk::DiskPaths;
use drbdrs::plane::io::Choice;
use drbdrs::plane::run::{Command, Config, Handle, Machine, Notice, spawn};

pub const VOLUME: VolumeNr = VolumeNr(0);

/// Everything goes to the own disk.
pub struct PassThrough {
    /// By `IoId`: the request, and the buffer of a write.
    open: Vec<Option<(AppId, Option<BufId>)>>,
    free: Vec<usize>,
    pub users: u32,
    limits: Limits,
    /// Bytes that are out of sync.
    pub oos: Option<std::ops::Range<u64>>,
    pub handled: u64,
    /// Changes that a test wants.
    pub pending: Mutex<Vec<Change>>,
}

pub type Change = Box<dyn FnOnce(&mut PassThrough) + Send>;

/// What the device is to offer, where it is not what the disk says.
#[derive(Clone, Debug)]
pub struct Limits {
    pub max_io: u32,
    pub max_discard: u32,
    pub max_write_zeroes: u32,
    pub is_primary: bool,
}

impl Default for Limits {
    fn default() -> Self {
        let max = 128 << 20;
        Self { max_io: 1 << 20, max_discard: max, max_write_zeroes: max, is_primary: true }
    }
}

impl PassThrough {
    pub fn new(limits: Limits) -> Self {
        let (open, free) = (Vec::new(), Vec::new());
        Self { open, free, users: 0, limits, oos: None, handled: 0, pending: Mutex::default() }
    }

    fn on_app(&mut self, AppRequest { id, volume, op }: AppRequest, out: &mut Actions) {
        let (op, buf) = match op {
            AppOp::Read { range, buf } => {
                let buf = Some(buf);
                (DiskOp::Read { range, buf, check_zero: false, digest: None }, None)
            }
            AppOp::Write { range, buf, flags } => (DiskOp::Write { range, buf, flags }, Some(buf)),
            AppOp::Discard { range } => (DiskOp::Discard { range }, None),
            AppOp::WriteZeroes { range, may_unmap } => {
                (DiskOp::WriteZeroes { range, may_unmap }, None)
            }
            AppOp::Flush => (DiskOp::Flush, None),
        };
        let place = self.free.pop().unwrap_or_else(|| {
            self.open.push(None);
            self.open.len() - 1
        });
        self.open[place] = Some((id, buf));
        out.push(Action::Disk { io: IoId(place as u64), volume, op });
    }
}

impl Machine for PassThrough {
    fn handle(&mut self, _now: Tick, event: Event, out: &mut Actions) {
        self.handled += 1;
        let changes = std::mem::take(&mut *self.pending.lock().unwrap());
        changes.into_iter().for_each(|change| change(self));
        match event {
            Event::App(request) => self.on_app(request, out),
            Event::Disk { io, result } => {
                let place = usize::try_from(io.0).unwrap();
                let (id, buf) = self.open[place].take().expect("answered once");
                self.free.push(place);
                let result = result.map(|_| ()).map_err(|_| AppError::Io);
                out.push(Action::CompleteApp { id, result, data: None });
                out.extend(buf.map(Action::FreeBuf));
            }
            Event::Admin { ticket, .. } => {
                let (io, op) = (IoId(ticket.0.into()), MetaOp::Open);
                out.push(Action::Meta { io, volume: VOLUME, op });
            }
            Event::Meta { result, .. } => {
                let Ok(MetaAnswer::Opened(opened)) = result else { return };
                let offer = DeviceOffer {
                    size: opened.backing,
                    is_primary: self.limits.is_primary,
                    is_continued: false,
                    max_io: self.limits.max_io,
                    max_discard: self.limits.max_discard,
                    max_write_zeroes: self.limits.max_write_zeroes,
                    logical_block: opened.limits.logical_block,
                    physical_block: opened.limits.physical_block,
                };
                out.push(Action::Device { volume: VOLUME, offer });
            }
            Event::OpenCount { users, .. } => self.users = users,
            _ => {}
        }
    }

    fn next_deadline(&self) -> Option<Tick> {
        None
    }

    fn out_of_sync(
        &self,
        _volume: VolumeNr,
        range: SectorRange,
        _most: usize,
        out: &mut Vec<Extent>,
    ) -> bool {
        let Some(oos) = &self.oos else { return false };
        let (start, end) = (range.start.0 * 512, range.end().0 * 512);
        let cuts = [start, oos.start.clamp(start, end), oos.end.clamp(start, end), end];
        for (pair, flags) in cuts.windows(2).zip([0, 1, 0]) {
            if pair[1] > pair[0] {
                out.push(Extent { len: pair[1] - pair[0], flags });
            }
        }
        true
    }
}

/// A node with one volume, `r0/0`, on a file.
pub struct Node {
    pub handle: Handle<PassThrough>,
    pub registry: Registry,
    pub door: Door,
    pub dir: tempfile::TempDir,
    pub notices: Arc<Mutex<Vec<Notice>>>,
    devices: Receiver<DeviceOffer>,
    thread: Option<JoinHandle<()>>,
}

/// How a node is set up.
#[derive(Clone)]
pub struct Setup {
    pub io: Choice,
    pub len: u64,
    pub limits: Limits,
    pub pool: PoolSize,
    /// `None`: in the usual place for temporary files.
    pub folder: Option<PathBuf>,
    /// Instead of a file of that length.
    pub device: Option<PathBuf>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            io: Choice::from_env().unwrap(),
            len: 64 << 20,
            limits: Limits::default(),
            pool: PoolSize::default(),
            folder: None,
            device: None,
        }
    }
}

impl Node {
    pub fn new(setup: Setup) -> Self {
        let dir = match &setup.folder {
            Some(folder) => tempfile::tempdir_in(folder).unwrap(),
            None => tempfile::tempdir().unwrap(),
        };
        let path = setup.device.clone().unwrap_or_else(|| {
            let path = dir.path().join("disk");
            std::fs::File::create(&path).unwrap().set_len(setup.len).unwrap();
            path
        });
        let (send, devices) = sync_channel(16);
        let notices = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&notices);
        let sink = Box::new(move |notice: Notice| {
            // Kept before anybody hears of it and looks for it.
            kept.lock().unwrap().push(notice.clone());
            if let Notice::Device(_, offer) = notice {
                send.send(offer).unwrap();
            }
        });
        let config = Config { io: setup.io, pool: setup.pool, is_pinned: false, seed: 1 };
        let limits = setup.limits.clone();
        let (handle, thread) = spawn("r0", config, move || PassThrough::new(limits), sink).unwrap();
        let registry = Registry::default();
        let listen = [
            Listen::Tcp("127.0.0.1:0".parse().unwrap()),
            Listen::Unix(dir.path().join("nbd.sock")),
        ];
        let door = Door::open(&listen, registry.clone()).unwrap();
        let mut node = Self { handle, registry, door, dir, notices, devices, thread: Some(thread) };
        node.attach(&path);
        node
    }

    fn attach(&mut self, path: &Path) {
        let placement = Placement::FlexExternal;
        let paths = DiskPaths { backing: path.into(), meta: None, placement };
        assert!(self.handle.send(Command::Disk(VOLUME, paths)).is_ok());
        let event = Event::Admin { ticket: Ticket(0), command: AdminCommand::Secondary(VOLUME) };
        assert!(self.handle.send(Command::Event(event)).is_ok());
        let offer = self.devices.recv_timeout(Duration::from_secs(10)).expect("attached");
        self.publish(offer);
    }

    pub fn publish(&self, offer: DeviceOffer) {
        self.registry.set(self.entry(offer));
    }

    /// The export, with such an offer.
    pub fn entry(&self, offer: DeviceOffer) -> Entry {
        let plane = self.handle.clone();
        let export =
            Export { name: "r0/0".into(), description: "a test".into(), volume: VOLUME, offer };
        Entry {
            export,
            hand_over: Arc::new(move |session| plane.send(Command::Client(session)).is_ok()),
            promote: None,
            patience: Duration::ZERO,
        }
    }

    /// What was offered first.
    pub fn offer(&self) -> DeviceOffer {
        let notices = self.notices.lock().unwrap();
        let found = notices.iter().find_map(|notice| match notice {
            Notice::Device(_, offer) => Some(*offer),
            _ => None,
        });
        found.expect("attached")
    }

    /// Changes the entry of the device as it was offered first.
    pub fn change(&self, change: impl FnOnce(&mut Entry)) {
        let mut entry = self.entry(self.offer());
        change(&mut entry);
        self.registry.set(entry);
    }

    /// Changes the double.
    pub fn replace(&self, change: impl FnOnce(&mut PassThrough) + Send + 'static) {
        let change = Mutex::new(Some(change));
        self.inspect(move |engine| {
            let change = change.lock().unwrap().take();
            engine.pending.lock().unwrap().push(Box::new(change.expect("called once")));
        });
        // The next event carries it out.
        let event = Event::OpenCount { volume: VOLUME, users: 0 };
        assert!(self.handle.send(Command::Event(event)).is_ok());
    }

    pub fn disk(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    pub fn unix(&self) -> PathBuf {
        self.dir.path().join("nbd.sock")
    }

    /// `nbd+unix:///r0/0?socket=...`
    pub fn uri(&self) -> String {
        format!("nbd+unix:///r0/0?socket={}", self.unix().display())
    }

    pub fn tcp_uri(&self) -> String {
        format!("nbd://127.0.0.1:{}/r0/0", self.door.tcp()[0].port())
    }

    /// Looks at the engine.
    pub fn inspect<T: Send + 'static>(
        &self,
        look: impl FnOnce(&PassThrough) -> T + Send + 'static,
    ) -> T {
        let (send, answer) = sync_channel(1);
        let look = Box::new(move |engine: &PassThrough| send.send(look(engine)).unwrap());
        assert!(self.handle.send(Command::Inspect(look)).is_ok());
        match answer.recv_timeout(Duration::from_secs(10)) {
            Ok(value) => value,
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                panic!("the plane does not answer")
            }
        }
    }

    /// Waits until no client is there.
    pub fn wait_for_users(&self, users: u32) {
        for _ in 0..500 {
            if self.inspect(|engine| engine.users) == users {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("{} users instead of {users}", self.inspect(|engine| engine.users));
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.handle.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let result = thread.join();
            assert!(result.is_ok() || std::thread::panicking(), "the plane has panicked");
        }
    }
}
