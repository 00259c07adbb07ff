//! The disk of a volume: its data area and its meta-data. Does what [`DiskOp`] and [`MetaOp`] say.
//!
//! An action becomes a job, a job is a stack of steps, one step at a time is with the kernel.
//! Guarantees: every action is answered exactly once; a failed flush stays failed until the disk
//! is closed, since nobody knows what the kernel has dropped; nothing waits but jobs, for memory
//! ([`Disk::resume`]), for another write of the same block of a device with large blocks, or for a
//! fault point ([`Disk::next_deadline`]).

mod job;
mod open;
mod plan;
mod run;
mod scan;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use drbd_core::action::{DiskOp, MetaOp};
use drbd_core::event::{Event, IoFailure, MetaAnswer};
use drbd_core::ids::IoId;
use drbd_core::slab::{Key, Slab};
use drbd_types::{Failure, Tick, VolumeNr};

use self::job::{Job, Part, Step, Which};
use self::plan::Abilities;
use super::Env;
use super::fault::{Access, Area, Kind, Verdict};
use super::helpers;
use super::io::{self, Fd, Op, Tag};

pub use self::open::{Device, DiskPaths, OpenDisk, OpenError, is_rotational};

/// Most that is punched or zeroed with one call, bytes: a call that takes seconds delays others.
const ALLOCATE_MAX: u64 = 1 << 30;

/// Where a helper thread leaves its answer.
type Slot<T> = Arc<Mutex<Option<T>>>;

/// What runs on a helper thread.
enum Call {
    Open(Slot<Result<OpenDisk, OpenError>>),
    Scan(Slot<Result<scan::Found, i32>>),
    Measure(Slot<Result<[u64; 2], i32>>),
}

/// Who is waited for.
#[expect(clippy::large_enum_variant, reason = "calls are rare, and jobs must not allocate")]
enum Entry {
    Job(Job),
    Call(IoId, Call),
}

/// The disk.
pub struct Disk {
    volume: VolumeNr,
    paths: Option<DiskPaths>,
    open: Option<OpenDisk>,
    has_fua: bool,
    flush_failed: Option<i32>,
    entries: Slab<Entry>,
    /// Steps on files in memory, for [`Disk::run`].
    ready: VecDeque<(Key<Entry>, Op)>,
    /// Wait for memory.
    starved: VecDeque<Key<Entry>>,
    /// Wait for another write.
    blocked: VecDeque<Key<Entry>>,
    /// Wait at a fault point.
    held: Vec<(Key<Entry>, Option<Tick>)>,
    /// Bytes that are being written, on devices with large blocks.
    locks: Vec<(u64, u64)>,
    closing: Option<IoId>,
    /// Why the last open failed.
    open_error: Option<OpenError>,
}

impl Disk {
    /// A disk that is not open.
    pub fn new(volume: VolumeNr) -> Self {
        Self {
            volume,
            paths: None,
            open: None,
            has_fua: true,
            flush_failed: None,
            entries: Slab::new(),
            ready: VecDeque::new(),
            starved: VecDeque::new(),
            blocked: VecDeque::new(),
            held: Vec::new(),
            locks: Vec::new(),
            closing: None,
            open_error: None,
        }
    }

    /// What the next [`MetaOp::Open`] opens.
    pub fn configure(&mut self, paths: DiskPaths) {
        self.paths = Some(paths);
    }

    /// Is it open?
    pub const fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// The open devices.
    pub const fn devices(&self) -> Option<&OpenDisk> {
        self.open.as_ref()
    }

    /// Why the last open failed, in words; told once.
    pub const fn take_open_error(&mut self) -> Option<OpenError> {
        self.open_error.take()
    }

    /// Actions without answer.
    pub const fn in_flight(&self) -> usize {
        self.entries.len()
    }

    /// When [`Self::resume`] is due.
    pub fn next_deadline(&self) -> Option<Tick> {
        self.held.iter().filter_map(|held| held.1).min()
    }

    /// Does an action on the data.
    pub fn data(&mut self, env: &mut Env<'_>, io: IoId, op: DiskOp) {
        let Some(can) = self.abilities(Area::Data) else {
            return env.events.push(Event::Disk { io, result: Err(IoFailure::Gone) });
        };
        match plan::data(io, op, &can) {
            Some(job) => self.start(env, job),
            None => {
                let result = Err(IoFailure::Device(libc::EINVAL));
                env.events.push(Event::Disk { io, result });
            }
        }
    }

    /// Does an action on the meta-data.
    pub fn meta(&mut self, env: &mut Env<'_>, io: IoId, op: MetaOp) {
        match op {
            MetaOp::Open => return self.start_open(env, io),
            MetaOp::Close => return self.close(env, io),
            MetaOp::Measure => return self.start_measure(env, io),
            _ => {}
        }
        let Some(can) = self.abilities(Area::Meta) else {
            return env.events.push(Event::Meta { io, result: Err(IoFailure::Gone) });
        };
        let own = Part { buf: Which::Own, start: 0, len: 4096 };
        let mut job = Job::new(io, Area::Meta, &[]);
        match op {
            MetaOp::Read { at, blocks } => return self.start_scan(env, io, at.0, blocks),
            MetaOp::Write { at, block, stable } => {
                let write = Step::Write { at: at.0, part: own, durable: stable };
                plan::push_write(&mut job.steps, write, &can);
                if stable {
                    job.steps.push_all(&[Step::Flush]);
                }
                job.steps.push_all(&[Step::Own { len: 4096, fill: None }]);
                job.block = Some(block);
            }
            MetaOp::Fill { at, blocks, value: 0 } => {
                let len = u64::from(blocks) * 4096;
                job.steps.push_all(&[Step::Punch { at: at.0, len }]);
            }
            MetaOp::Fill { at, blocks, value } => {
                let len = u64::from(blocks) * 4096;
                let own = u32::try_from(len.min(super::ZEROES_LEN as u64)).unwrap_or(4096);
                job.steps.push_all(&[
                    Step::Own { len: own, fill: Some(value) },
                    Step::Repeat { at: at.0, len },
                ]);
            }
            MetaOp::Flush => job.steps.push_all(&[Step::Flush]),
            MetaOp::Open | MetaOp::Measure | MetaOp::Close => {}
        }
        self.start(env, job);
    }

    /// A step of a job has ended.
    pub fn done(&mut self, env: &mut Env<'_>, key: u64, op: Op, result: Result<u32, i32>) {
        op.give_back(env.pool);
        let key = Key::from_raw(key);
        if let Some(Entry::Call(..)) = self.entries.get(key) {
            if let Some(Entry::Call(io, call)) = self.entries.remove(key) {
                self.called(env, io, call);
            }
        } else if let Some(Entry::Job(job)) = self.entries.get_mut(key)
            && let Some(step) = job.current.take()
        {
            match self.after(key, step, result) {
                Ok(()) => self.advance(env, key),
                Err(errno) => self.finish(env, key, Err(errno)),
            }
        }
    }

    /// Is there anything for [`Self::run`] to do?
    pub fn is_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Carries out the steps on files in memory: there is no device to wait for. What follows from
    /// them is left for the next time.
    pub fn run(&mut self, env: &mut Env<'_>) {
        for _ in 0..self.ready.len() {
            let Some((key, mut op)) = self.ready.pop_front() else { return };
            let result = helpers::run(&mut op).map_err(rustix::io::Errno::raw_os_error);
            self.done(env, key.raw(), op, result);
        }
    }

    /// Goes on with what waited for memory or time.
    pub fn resume(&mut self, env: &mut Env<'_>) {
        // Those that must go on waiting stand in the queue again afterwards.
        for _ in 0..self.starved.len() {
            if let Some(key) = self.starved.pop_front() {
                self.advance(env, key);
            }
        }
        let now = env.now;
        let mut at = 0;
        while let Some((key, until)) = self.held.get(at).copied() {
            if until.is_some_and(|until| until <= now) {
                self.held.swap_remove(at);
                self.pass(env, key);
            } else {
                at += 1;
            }
        }
    }

    /// The fault points have changed: what is held there asks again.
    pub fn faults_changed(&mut self, env: &mut Env<'_>) {
        for (key, _) in std::mem::take(&mut self.held) {
            self.advance(env, key);
        }
    }

    /// `None`: closed, or about to be.
    fn abilities(&self, area: Area) -> Option<Abilities> {
        if self.closing.is_some() { None } else { self.abilities_of(area) }
    }

    fn abilities_of(&self, area: Area) -> Option<Abilities> {
        let open = self.open.as_ref()?;
        let device = match area {
            Area::Data => &open.data,
            Area::Meta => open.meta(),
        };
        let limits = open.opened.limits;
        Some(Abilities { align: device.align, limits, has_fua: self.has_fua })
    }

    fn device(&self, area: Area) -> Option<&Device> {
        let open = self.open.as_ref()?;
        Some(match area {
            Area::Data => &open.data,
            Area::Meta => open.meta(),
        })
    }

    fn start(&mut self, env: &mut Env<'_>, job: Job) {
        let key = self.entries.insert(Entry::Job(job));
        self.advance(env, key);
    }

    fn start_open(&mut self, env: &mut Env<'_>, io: IoId) {
        let fault = env.faults.check(
            env.now,
            self.volume,
            &Access { area: Area::Data, kind: Kind::Open, bytes: 0..0 },
        );
        let refused = match (&self.paths, fault) {
            (_, Verdict::Fail(errno)) => Some(IoFailure::Device(errno)),
            (None, _) => Some(IoFailure::Open(Failure::OpenBackingDevice)),
            _ if self.open.is_some() => Some(IoFailure::Open(Failure::DiskConfigured)),
            (Some(_), _) => None,
        };
        if let Some(failure) = refused {
            let result = Err(failure);
            return env.events.push(Event::Meta { io, result });
        }
        let Some(paths) = self.paths.clone() else { return };
        let slot = Slot::default();
        let answer = Arc::clone(&slot);
        let key = self.entries.insert(Entry::Call(io, Call::Open(slot)));
        self.call(env, key, move || put(&answer, OpenDisk::open(&paths)));
    }

    fn start_scan(&mut self, env: &mut Env<'_>, io: IoId, at: u64, blocks: u32) {
        let fault = env.faults.check(
            env.now,
            self.volume,
            &Access { area: Area::Meta, kind: Kind::Read, bytes: 0..0 },
        );
        if let Verdict::Fail(errno) = fault {
            let result = Err(IoFailure::Device(errno));
            return env.events.push(Event::Meta { io, result });
        }
        let Some(file) = self.device(Area::Meta).map(|device| Fd::clone(&device.file)) else {
            return;
        };
        let slot = Slot::default();
        let answer = Arc::clone(&slot);
        let key = self.entries.insert(Entry::Call(io, Call::Scan(slot)));
        self.call(env, key, move || put(&answer, scan::scan(&*file, at, blocks)));
    }

    fn start_measure(&mut self, env: &mut Env<'_>, io: IoId) {
        let Some(open) = self.open.as_ref().filter(|_| self.closing.is_none()) else {
            return env.events.push(Event::Meta { io, result: Err(IoFailure::Gone) });
        };
        let files = open.files();
        let slot = Slot::default();
        let answer = Arc::clone(&slot);
        let key = self.entries.insert(Entry::Call(io, Call::Measure(slot)));
        self.call(env, key, move || put(&answer, open::measure(&files)));
    }

    fn call(&self, env: &mut Env<'_>, key: Key<Entry>, work: impl FnOnce() + Send + 'static) {
        env.io.submit(self.tag(key), Op::Call(Some(Box::new(work))));
    }

    fn called(&mut self, env: &mut Env<'_>, io: IoId, call: Call) {
        let result = match call {
            Call::Open(slot) => match take(&slot) {
                Some(Ok(open)) => {
                    let opened = open.opened;
                    self.open = Some(open);
                    self.has_fua = true;
                    self.flush_failed = None;
                    self.open_error = None;
                    Ok(MetaAnswer::Opened(opened))
                }
                Some(Err(error)) => {
                    tracing::error!("{error}");
                    let failure = error.failure;
                    self.open_error = Some(error);
                    Err(IoFailure::Open(failure))
                }
                None => Err(IoFailure::Device(libc::EIO)),
            },
            Call::Measure(slot) => match (take(&slot), &mut self.open) {
                (Some(Ok(lens)), Some(open)) => {
                    open.resized(lens);
                    Ok(MetaAnswer::Opened(open.opened))
                }
                (Some(Err(errno)), _) => Err(IoFailure::Device(errno)),
                (_, None) => Err(IoFailure::Gone),
                (None, _) => Err(IoFailure::Device(libc::EIO)),
            },
            Call::Scan(slot) => match take(&slot) {
                Some(Ok(found)) => Ok(MetaAnswer::Blocks(found)),
                Some(Err(errno)) => Err(IoFailure::Device(errno)),
                None => Err(IoFailure::Device(libc::EIO)),
            },
        };
        env.events.push(Event::Meta { io, result });
        self.close_if_idle(env);
    }

    fn close(&mut self, env: &mut Env<'_>, io: IoId) {
        if self.open.is_none() && self.entries.is_empty() {
            let result = Ok(MetaAnswer::Done);
            return env.events.push(Event::Meta { io, result });
        }
        if let Some(earlier) = self.closing.replace(io) {
            let result = Err(IoFailure::Gone);
            env.events.push(Event::Meta { io: earlier, result });
        }
        self.close_if_idle(env);
    }

    fn close_if_idle(&mut self, env: &mut Env<'_>) {
        if self.entries.is_empty()
            && let Some(io) = self.closing.take()
        {
            self.open = None;
            env.events.push(Event::Meta { io, result: Ok(MetaAnswer::Done) });
        }
    }

    fn tag(&self, key: Key<Entry>) -> Tag {
        Tag { part: io::Part::Disk(self.volume.0), key: key.raw() }
    }

    fn job(&mut self, key: Key<Entry>) -> Option<&mut Job> {
        match self.entries.get_mut(key)? {
            Entry::Job(job) => Some(job),
            Entry::Call(..) => None,
        }
    }
}

fn put<T>(slot: &Slot<T>, value: T) {
    *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(value);
}

/// `None`: the helper thread has panicked.
fn take<T>(slot: &Slot<T>) -> Option<T> {
    slot.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// Only zero bytes?
fn is_zero(bytes: &[u8]) -> bool {
    // Folding lets the compiler use wide registers, pieces let it stop early.
    bytes.chunks(1024).all(|piece| piece.iter().fold(0, |all, byte| all | byte) == 0)
}
