//! Carrying out the steps of a job.

use drbd_core::action::DigestUse;
use drbd_core::event::{DiskAnswer, Event, IoFailure, MetaAnswer};
use drbd_core::ids::BufId;
use drbd_core::slab::Key;

use super::super::buf::Zone;
use super::super::fault::{Area, Verdict};
use super::super::io::{Allocate, Fd, Op};
use super::super::{Env, ZEROES_LEN};
use super::job::{Job, Lock, Part, Step, Wanted, Which};
use super::plan;
use super::{ALLOCATE_MAX, Disk, Entry, is_zero};

/// What became of a step.
enum Next {
    /// It is done.
    Go,
    /// It is with the kernel, or waits.
    Wait,
}

impl Disk {
    /// Goes on with a job until it waits or ends.
    pub(super) fn advance(&mut self, env: &mut Env<'_>, key: Key<Entry>) {
        if !self.has_lock(key) || !self.has_new_buffer(env, key) {
            return;
        }
        loop {
            let volume = self.volume;
            let Some(job) = self.job(key) else { return };
            let Some(step) = job.steps.pop() else { return self.finish(env, key, Ok(())) };
            let verdict = match step.access(job.area) {
                Some(access) => env.faults.check(env.now, volume, &access),
                None => Verdict::Pass,
            };
            let until = match verdict {
                Verdict::Pass => match self.carry_out(env, key, step) {
                    Ok(Next::Go) => continue,
                    Ok(Next::Wait) => return,
                    Err(errno) => return self.finish(env, key, Err(errno)),
                },
                Verdict::Fail(errno) => {
                    let result = self.after(key, step, Err(errno));
                    return self.finish(env, key, result.and(Err(errno)));
                }
                Verdict::Until(until) => Some(until),
                Verdict::Stalled => None,
            };
            job.current = Some(step);
            return self.held.push((key, until));
        }
    }

    /// A fault point lets a job go on with the step that it held.
    pub(super) fn pass(&mut self, env: &mut Env<'_>, key: Key<Entry>) {
        let Some(step) = self.job(key).and_then(|job| job.current.take()) else { return };
        match self.carry_out(env, key, step) {
            Ok(Next::Go) => self.advance(env, key),
            Ok(Next::Wait) => {}
            Err(errno) => self.finish(env, key, Err(errno)),
        }
    }

    /// Takes the lock that a job wants, or lets it wait for whoever has it.
    fn has_lock(&mut self, key: Key<Entry>) -> bool {
        let Some(job) = self.job(key) else { return false };
        let Lock::Wanted(start, end) = job.lock else { return true };
        if self.locks.iter().any(|lock| lock.0 < end && start < lock.1) {
            self.blocked.push_back(key);
            return false;
        }
        self.locks.push((start, end));
        if let Some(job) = self.job(key) {
            job.lock = Lock::Held(start, end);
        }
        true
    }

    /// Gets the buffer of a read that came without one.
    fn has_new_buffer(&mut self, env: &mut Env<'_>, key: Key<Entry>) -> bool {
        let can = self.abilities_of(Area::Data);
        let (Some(job), Some(can)) = (self.job(key), can) else { return false };
        let Some((range, len)) = job.new_buf else { return true };
        let Some(buf) = env.pool.alloc(Zone::Disk, len as usize) else {
            self.starved.push_back(key);
            return false;
        };
        job.new_buf = None;
        job.wanted.buf = Some(buf);
        if let Some(steps) = plan::read(range, buf, &can) {
            job.steps.push_all(steps.as_slice());
        }
        true
    }

    /// Does a step, or hands it to the kernel.
    fn carry_out(&mut self, env: &mut Env<'_>, key: Key<Entry>, step: Step) -> Result<Next, i32> {
        let flush_failed = self.flush_failed;
        let Some(area) = self.job(key).map(|job| job.area) else { return Ok(Next::Wait) };
        let align = self.abilities_of(area).map_or(1, |can| can.align);
        let Some(job) = self.job(key) else { return Ok(Next::Wait) };
        match step {
            Step::ZeroData { at, len } => {
                let zeroes = u32::try_from(ZEROES_LEN).unwrap_or(u32::MAX);
                plan::zero_data(at, len, align, zeroes, &mut job.steps);
                return Ok(Next::Go);
            }
            Step::Punch { len: 0, .. }
            | Step::Zero { len: 0, .. }
            | Step::Repeat { len: 0, .. } => {
                return Ok(Next::Go);
            }
            Step::Repeat { at, len } => {
                let own = job.own.map_or(0, |own| env.pool.len(own)) as u64;
                let now = u32::try_from(len.min(own)).unwrap_or(u32::MAX);
                if now == 0 {
                    return Err(libc::EINVAL);
                }
                let part = Part { buf: Which::Own, start: 0, len: now };
                let done = u64::from(now);
                job.steps.push_all(&[
                    Step::Write { at, part, durable: false },
                    Step::Repeat { at: at + done, len: len - done },
                ]);
                return Ok(Next::Go);
            }
            Step::Copy { from, to } => {
                copy(env, job, from, to);
                return Ok(Next::Go);
            }
            Step::Clear { part } => {
                let buf = buffer(env, job, part.buf);
                env.pool.bytes_mut(buf)[place(part)].fill(0);
                return Ok(Next::Go);
            }
            Step::Own { len, fill } => return Ok(self.own(env, key, len, fill)),
            Step::Flush => {
                if let Some(errno) = flush_failed {
                    return Err(errno);
                }
            }
            Step::Read { .. } | Step::Write { .. } | Step::Punch { .. } | Step::Zero { .. } => {}
        }
        self.submit(env, key, step);
        Ok(Next::Wait)
    }

    /// Gives a job a buffer of its own.
    fn own(&mut self, env: &mut Env<'_>, key: Key<Entry>, len: u32, fill: Option<u8>) -> Next {
        let Some(job) = self.job(key) else { return Next::Wait };
        let zone = if job.area == Area::Meta { Zone::Meta } else { Zone::Disk };
        if job.own.is_none_or(|own| env.pool.len(own) < len as usize) {
            if let Some(old) = job.own.take() {
                env.pool.release(old);
            }
            let Some(buf) = env.pool.alloc(zone, len as usize) else {
                job.steps.push_all(&[Step::Own { len, fill }]);
                self.starved.push_back(key);
                return Next::Wait;
            };
            job.own = Some(buf);
        }
        if let Some(own) = job.own {
            if let Some(value) = fill {
                env.pool.bytes_mut(own).fill(value);
            }
            if let Some(block) = job.block.take() {
                env.pool.bytes_mut(own).copy_from_slice(&*block);
            }
        }
        Next::Go
    }

    fn submit(&mut self, env: &mut Env<'_>, key: Key<Entry>, step: Step) {
        let Some(area) = self.job(key).map(|job| job.area) else { return };
        let Some(device) = self.device(area) else { return };
        let (file, is_memory) = (Fd::clone(&device.file), device.is_memory);
        let Some(job) = self.job(key) else { return };
        job.current = Some(step);
        let op = match step {
            Step::Read { at, part } => {
                let buf = buffer(env, job, part.buf);
                Op::Read { file, at, into: env.pool.lend_mut(buf, place(part)) }
            }
            Step::Write { at, part, durable } => {
                let buf = buffer(env, job, part.buf);
                Op::Write { file, at, from: env.pool.lend(buf, place(part)), durable }
            }
            Step::Punch { at, len } => {
                Op::Allocate { file, how: Allocate::Punch, at, len: len.min(ALLOCATE_MAX) }
            }
            Step::Zero { at, len } => {
                Op::Allocate { file, how: Allocate::Zero, at, len: len.min(ALLOCATE_MAX) }
            }
            Step::Flush => Op::Sync { file },
            Step::ZeroData { .. }
            | Step::Own { .. }
            | Step::Copy { .. }
            | Step::Clear { .. }
            | Step::Repeat { .. } => unreachable!("{step:?} does not touch the device"),
        };
        // The kernel would give each of them to a thread of its own.
        if is_memory && matches!(op, Op::Read { .. } | Op::Write { .. } | Op::Sync { .. }) {
            self.ready.push_back((key, op));
        } else {
            env.io.submit(self.tag(key), op);
        }
    }

    /// What a step's end means: nothing, more steps, or the failure of the job.
    pub(super) fn after(
        &mut self,
        key: Key<Entry>,
        step: Step,
        result: Result<u32, i32>,
    ) -> Result<(), i32> {
        if step == Step::Flush
            && let Err(errno) = result
            && !is_passing(errno)
        {
            self.flush_failed = Some(errno);
            return Err(errno);
        }
        if let (Step::Write { durable: true, .. }, Err(libc::EOPNOTSUPP)) = (step, result) {
            self.has_fua = false;
        }
        let Some(job) = self.job(key) else { return Ok(()) };
        match (step, result) {
            (_, Err(errno)) if is_passing(errno) => job.steps.push_all(&[step]),
            (Step::Read { at, part }, Ok(done)) if done < part.len => {
                // The device has become shorter.
                if done == 0 {
                    return Err(libc::EIO);
                }
                let part = part.rest(done);
                job.steps.push_all(&[Step::Read { at: at + u64::from(done), part }]);
            }
            (Step::Write { at, part, durable }, Ok(done)) if done < part.len => {
                if done == 0 {
                    return Err(libc::ENOSPC);
                }
                let part = part.rest(done);
                job.steps.push_all(&[Step::Write { at: at + u64::from(done), part, durable }]);
            }
            (Step::Write { at, part, durable: true }, Err(libc::EOPNOTSUPP)) => {
                job.steps.push_all(&[Step::Write { at, part, durable: false }, Step::Flush]);
            }
            (Step::Punch { at, len }, Ok(_)) if len > ALLOCATE_MAX => {
                let rest = Step::Punch { at: at + ALLOCATE_MAX, len: len - ALLOCATE_MAX };
                job.steps.push_all(&[rest]);
            }
            (Step::Zero { at, len }, Ok(_)) if len > ALLOCATE_MAX => {
                let rest = Step::Zero { at: at + ALLOCATE_MAX, len: len - ALLOCATE_MAX };
                job.steps.push_all(&[rest]);
            }
            (Step::Punch { at, len }, Err(libc::EOPNOTSUPP | libc::EINVAL)) => {
                job.steps.push_all(&[Step::Zero { at, len }]);
            }
            (Step::Zero { at, len }, Err(libc::EOPNOTSUPP | libc::EINVAL)) => {
                job.steps.push_all(&[Step::ZeroData { at, len }]);
            }
            (_, Err(errno)) => return Err(errno),
            (_, Ok(_)) => {}
        }
        Ok(())
    }

    /// Answers a job.
    pub(super) fn finish(&mut self, env: &mut Env<'_>, key: Key<Entry>, result: Result<(), i32>) {
        let Some(Entry::Job(mut job)) = self.entries.remove(key) else { return };
        if let Some(own) = job.own.take() {
            env.pool.release(own);
        }
        let io = job.io;
        let result = result.map_err(IoFailure::Device);
        env.events.push(match job.area {
            Area::Meta => Event::Meta { io, result: result.map(|()| MetaAnswer::Done) },
            Area::Data => {
                let answer = match result {
                    Ok(()) => Ok(answer(env, job.wanted)),
                    Err(failure) => {
                        if let (true, Some(buf)) = (job.wanted.is_new, job.wanted.buf) {
                            env.pool.release(buf);
                        }
                        Err(failure)
                    }
                };
                Event::Disk { io, result: answer }
            }
        });
        if let Lock::Held(start, end) = job.lock {
            self.locks.retain(|lock| *lock != (start, end));
            for _ in 0..self.blocked.len() {
                if let Some(key) = self.blocked.pop_front() {
                    self.advance(env, key);
                }
            }
        }
        self.close_if_idle(env);
    }
}

/// The same call may simply be made again.
const fn is_passing(errno: i32) -> bool {
    matches!(errno, libc::EINTR | libc::EAGAIN)
}

fn answer(env: &Env<'_>, wanted: Wanted) -> DiskAnswer {
    let Some(buf) = wanted.buf else { return DiskAnswer::default() };
    let algorithm = wanted.digest.and_then(|digest| match digest {
        DigestUse::Csums => env.digests[0],
        DigestUse::Verify => env.digests[1],
    });
    let bytes = || &env.pool.bytes(buf)[..wanted.len as usize];
    DiskAnswer {
        buf: wanted.is_new.then_some(buf),
        is_zero: wanted.check_zero.then(|| is_zero(bytes())),
        digest: algorithm.map(|algorithm| algorithm.digest(bytes())),
    }
}

fn buffer(env: &Env<'_>, job: &Job, which: Which) -> BufId {
    match which {
        Which::Lent(buf) => buf,
        Which::Zeroes => env.zeroes,
        Which::Own => job.own.expect("plans get the buffer before they use it"),
    }
}

fn place(part: Part) -> std::ops::Range<usize> {
    part.start as usize..part.start as usize + part.len as usize
}

fn copy(env: &mut Env<'_>, job: &Job, from: Part, to: Part) {
    let (source, target) = (buffer(env, job, from.buf), buffer(env, job, to.buf));
    let lease = env.pool.lend(source, place(from));
    env.pool.bytes_mut(target)[place(to)].copy_from_slice(lease.bytes());
    env.pool.take_back(lease);
}
