//! From actions to steps.

use drbd_core::action::DiskOp;
use drbd_core::event::{DiskLimits, WriteFlags};
use drbd_core::ids::{BufId, IoId};
use drbd_types::SectorRange;

use super::super::fault::Area;
use super::job::{Job, Lock, Part, Step, Steps, Wanted, Which};

/// What a plan depends on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Abilities {
    pub(super) align: u32,
    pub(super) limits: DiskLimits,
    /// Writes can go through volatile caches by themselves.
    pub(super) has_fua: bool,
}

impl Job {
    pub(super) fn new(io: IoId, area: Area, steps: &[Step]) -> Self {
        Self {
            io,
            area,
            steps: Steps::new(steps),
            wanted: Wanted::default(),
            new_buf: None,
            own: None,
            block: None,
            lock: Lock::None,
            current: None,
        }
    }
}

/// The job of an action on the data. `None`: longer than any buffer.
pub(super) fn data(io: IoId, op: DiskOp, can: &Abilities) -> Option<Job> {
    match op {
        DiskOp::Read { range, buf, check_zero, digest } => {
            let (_, len) = bytes(range)?;
            let len = u32::try_from(len).ok()?;
            let mut job = Job::new(io, Area::Data, &[]);
            job.wanted = Wanted { buf, is_new: buf.is_none(), len, check_zero, digest };
            match buf {
                Some(buf) => job.steps.push_all(read(range, buf, can)?.as_slice()),
                None => job.new_buf = Some((range, len)),
            }
            Some(job)
        }
        DiskOp::Write { range, buf, flags } => write(io, range, buf, flags, can),
        DiskOp::Discard { range } => {
            let (at, len) = bytes(range)?;
            Some(locked(Job::new(io, Area::Data, &discard(at, len, &can.limits)), at, len, can))
        }
        DiskOp::WriteZeroes { range, may_unmap } => {
            let (at, len) = bytes(range)?;
            let step = if may_unmap { Step::Punch { at, len } } else { Step::Zero { at, len } };
            Some(locked(Job::new(io, Area::Data, &[step]), at, len, can))
        }
        DiskOp::Flush => Some(Job::new(io, Area::Data, &[Step::Flush])),
    }
}

/// At most four steps.
#[derive(Debug)]
pub(super) struct Few([Step; 4], usize);

impl Few {
    fn new(steps: &[Step]) -> Self {
        let mut few = Self([Step::Flush; 4], steps.len());
        few.0[..steps.len()].copy_from_slice(steps);
        few
    }

    pub(super) fn as_slice(&self) -> &[Step] {
        &self.0[..self.1]
    }
}

/// A read of a range into a buffer, through a bounce buffer where the range is not aligned.
pub(super) fn read(range: SectorRange, buf: BufId, can: &Abilities) -> Option<Few> {
    let (at, len) = bytes(range)?;
    let len = u32::try_from(len).ok()?;
    let whole = Part { buf: Which::Lent(buf), start: 0, len };
    if is_aligned(at, len.into(), can.align) {
        return Some(Few::new(&[Step::Read { at, part: whole }]));
    }
    let (start, outer) = outwards(at, len.into(), can.align);
    let outer = u32::try_from(outer).ok()?;
    let inner = Part { buf: Which::Own, start: offset(at, start), len };
    Some(Few::new(&[
        Step::Own { len: outer, fill: None },
        Step::Read { at: start, part: Part { buf: Which::Own, start: 0, len: outer } },
        Step::Copy { from: inner, to: whole },
    ]))
}

fn write(
    io: IoId,
    range: SectorRange,
    buf: BufId,
    flags: WriteFlags,
    can: &Abilities,
) -> Option<Job> {
    let (at, len) = bytes(range)?;
    let size = u32::try_from(len).ok()?;
    let part = Part { buf: Which::Lent(buf), start: 0, len: size };
    let mut job = Job::new(io, Area::Data, &[]);
    if is_aligned(at, len, can.align) {
        push_write(&mut job.steps, Step::Write { at, part, durable: flags.fua }, can);
    } else {
        let (start, outer) = outwards(at, len, can.align);
        let outer = u32::try_from(outer).ok()?;
        let all = Part { buf: Which::Own, start: 0, len: outer };
        let inner = Part { buf: Which::Own, start: offset(at, start), len: size };
        push_write(&mut job.steps, Step::Write { at: start, part: all, durable: flags.fua }, can);
        job.steps.push_all(&[
            Step::Own { len: outer, fill: None },
            Step::Read { at: start, part: all },
            Step::Copy { from: part, to: inner },
        ]);
    }
    if flags.preflush {
        job.steps.push_all(&[Step::Flush]);
    }
    Some(locked(job, at, len, can))
}

/// A write; where the device cannot write through its caches, a flush behind it.
pub(super) fn push_write(steps: &mut Steps, step: Step, can: &Abilities) {
    match step {
        Step::Write { at, part, durable: true } if !can.has_fua => {
            steps.push_all(&[Step::Write { at, part, durable: false }, Step::Flush]);
        }
        _ => steps.push_all(&[step]),
    }
}

/// The aligned middle is given back, the rest is zeroed. Spec: io-path-and-resync.md §3.4.
pub(super) fn discard(at: u64, len: u64, limits: &DiskLimits) -> [Step; 3] {
    let zero = |at, len| Step::Punch { at, len };
    let nothing = Step::ZeroData { at, len: 0 };
    let unit = u64::from(limits.discard_granularity);
    if !limits.can_discard || unit == 0 {
        return [Step::Zero { at, len }, nothing, nothing];
    }
    let start = at.next_multiple_of(unit);
    let end = (at + len) / unit * unit;
    if start >= end {
        return [zero(at, len), nothing, nothing];
    }
    [zero(at, start - at), Step::Punch { at: start, len: end - start }, zero(end, at + len - end)]
}

/// Zeroes as data. What is not aligned goes through a bounce buffer, block by block.
pub(super) fn zero_data(at: u64, len: u64, align: u32, zeroes: u32, steps: &mut Steps) {
    if len == 0 {
        return;
    }
    let unit = u64::from(align);
    let into_block = at % unit;
    if into_block == 0 && len >= unit {
        let now = (len / unit * unit).min(u64::from(zeroes) / unit * unit);
        let size = u32::try_from(now).unwrap_or(zeroes);
        let part = Part { buf: Which::Zeroes, start: 0, len: size };
        let rest = Step::ZeroData { at: at + now, len: len - now };
        return steps.push_all(&[Step::Write { at, part, durable: false }, rest]);
    }
    let now = len.min(unit - into_block);
    let block = Part { buf: Which::Own, start: 0, len: align };
    let hole = Part {
        buf: Which::Own,
        start: u32::try_from(into_block).unwrap_or(0),
        len: u32::try_from(now).unwrap_or(align),
    };
    steps.push_all(&[
        Step::Own { len: align, fill: None },
        Step::Read { at: at - into_block, part: block },
        Step::Clear { part: hole },
        Step::Write { at: at - into_block, part: block, durable: false },
        Step::ZeroData { at: at + now, len: len - now },
    ]);
}

/// Writes into one block of a device with large blocks must not meet.
fn locked(mut job: Job, at: u64, len: u64, can: &Abilities) -> Job {
    if can.align > 512 {
        let (start, outer) = outwards(at, len, can.align);
        job.lock = Lock::Wanted(start, start + outer);
    }
    job
}

/// Where and how much, in bytes.
fn bytes(range: SectorRange) -> Option<(u64, u64)> {
    Some((range.start.0.checked_mul(512)?, range.len.to_bytes()?.0))
}

fn is_aligned(at: u64, len: u64, align: u32) -> bool {
    at.is_multiple_of(align.into()) && len.is_multiple_of(align.into())
}

fn outwards(at: u64, len: u64, align: u32) -> (u64, u64) {
    let unit = u64::from(align);
    let start = at / unit * unit;
    (start, (at + len).next_multiple_of(unit) - start)
}

fn offset(at: u64, start: u64) -> u32 {
    u32::try_from(at - start).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: DiskLimits = DiskLimits {
        max_io: 1 << 20,
        can_discard: true,
        discard_granularity: 65_536,
        logical_block: 512,
        physical_block: 4096,
    };
    const K: u64 = 1024;

    fn punch(at: u64, len: u64) -> Step {
        Step::Punch { at, len }
    }

    #[test]
    fn a_discard_gives_back_whole_granules_and_zeroes_the_rest() {
        let nothing = |at| Step::ZeroData { at, len: 0 };
        assert_eq!(
            discard(60 * K, 200 * K, &LIMITS),
            [punch(60 * K, 4 * K), punch(64 * K, 192 * K), punch(256 * K, 4 * K)]
        );
        assert_eq!(
            discard(64 * K, 64 * K, &LIMITS),
            [punch(64 * K, 0), punch(64 * K, 64 * K), punch(128 * K, 0)]
        );
        let small = discard(10 * K, 60 * K, &LIMITS);
        assert_eq!(small, [punch(10 * K, 60 * K), nothing(10 * K), nothing(10 * K)]);
        let cannot = DiskLimits { can_discard: false, ..LIMITS };
        let zero = Step::Zero { at: 0, len: 128 * K };
        assert_eq!(discard(0, 128 * K, &cannot), [zero, nothing(0), nothing(0)]);
    }

    #[test]
    fn zeroes_as_data_bounce_only_what_is_not_aligned() {
        let mut steps = Steps::new(&[Step::ZeroData { at: 3584, len: 70_000 - 304 }]);
        let mut writes = Vec::new();
        while let Some(step) = steps.pop() {
            match step {
                Step::ZeroData { at, len } => zero_data(at, len, 4096, 65_536, &mut steps),
                Step::Write { at, part, .. } => writes.push((at, part.len, part.buf)),
                Step::Clear { part } => writes.push((u64::from(part.start), part.len, part.buf)),
                _ => {}
            }
        }
        let expected = [
            (3584, 512, Which::Own),
            (0, 4096, Which::Own),
            (4096, 65_536, Which::Zeroes),
            (0, 3648, Which::Own),
            (69_632, 4096, Which::Own),
        ];
        assert_eq!(writes, expected);
    }
}
