//! Tests of the disk, on both implementations of I/O.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use drbd_core::action::DigestUse;
use drbd_core::event::{DiskAnswer, Opened, WriteFlags};
use drbd_types::{ByteOffset, Sector, SectorCount, SectorRange};
use drbdmeta::layout::Placement;
use proptest::prelude::*;

use super::super::ZEROES_LEN;
use super::super::buf::Pool;
use super::super::buf::{PoolSize, Zone};
use super::super::fault::Faults;
use super::super::fault::{Effect, Rule};
use super::super::io::{Backend, Choice, backend};
use super::*;
use drbd_core::ids::BufId;
use drbd_wire::Algorithm;

/// A disk with everything that it needs.
struct Rig {
    io: Box<dyn Backend>,
    pool: Pool,
    faults: Faults,
    zeroes: BufId,
    disk: Disk,
    now: Tick,
    events: Vec<Event>,
    next: u64,
    dir: tempfile::TempDir,
}

impl Rig {
    fn new(choice: Choice, len: u64) -> Option<Self> {
        Self::new_in(choice, len, &std::env::temp_dir())
    }

    fn new_in(choice: Choice, len: u64, place: &Path) -> Option<Self> {
        let io = match backend(choice) {
            Ok(io) => io,
            Err(_) if choice == Choice::Ring => return None,
            Err(error) => panic!("{error}"),
        };
        let dir = tempfile::tempdir_in(place).unwrap();
        let path = dir.path().join("disk");
        std::fs::File::create(&path).unwrap().set_len(len).unwrap();
        let mut pool = Pool::new(PoolSize { disk: 2 << 20, ..PoolSize::default() }).unwrap();
        let zeroes = pool.alloc(Zone::Meta, ZEROES_LEN).unwrap();
        let mut disk = Disk::new(VolumeNr(3));
        disk.configure(paths(&path));
        let (faults, events) = (Faults::new(1), Vec::new());
        Some(Self { io, pool, faults, zeroes, disk, now: Tick(0), events, next: 0, dir })
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    fn with(&mut self, act: impl FnOnce(&mut Disk, &mut Env<'_>)) {
        let digests = [Some(Algorithm::Crc32c), None];
        let mut env = Env {
            io: &mut *self.io,
            pool: &mut self.pool,
            faults: &mut self.faults,
            zeroes: self.zeroes,
            digests,
            now: self.now,
            events: &mut self.events,
        };
        act(&mut self.disk, &mut env);
    }

    fn data(&mut self, op: DiskOp) -> IoId {
        self.next += 1;
        let io = IoId(self.next);
        self.with(|disk, env| disk.data(env, io, op));
        io
    }

    fn meta(&mut self, op: MetaOp) -> IoId {
        self.next += 1;
        let io = IoId(self.next);
        self.with(|disk, env| disk.meta(env, io, op));
        io
    }

    /// Lets the kernel work for a moment.
    fn turn(&mut self, limit: Duration) {
        self.with(|disk, env| disk.run(env));
        let limit = if self.disk.is_ready() { Duration::ZERO } else { limit };
        let mut done = Vec::new();
        self.io.wait(Some(limit), &mut done).unwrap();
        for done in done {
            assert_eq!(done.tag.part, io::Part::Disk(3));
            self.with(|disk, env| disk.done(env, done.tag.key, done.op, done.result));
        }
    }

    fn data_answer(&mut self, io: IoId) -> Result<DiskAnswer, IoFailure> {
        match self.answer(io) {
            Event::Disk { result, .. } => result,
            other => panic!("{other:?}"),
        }
    }

    fn meta_answer(&mut self, io: IoId) -> Result<MetaAnswer, IoFailure> {
        match self.answer(io) {
            Event::Meta { result, .. } => result,
            other => panic!("{other:?}"),
        }
    }

    fn answer(&mut self, wanted: IoId) -> Event {
        for _ in 0..1000 {
            let found = self.events.iter().position(|event| {
                matches!(event, Event::Disk { io, .. } | Event::Meta { io, .. } if *io == wanted)
            });
            if let Some(at) = found {
                return self.events.swap_remove(at);
            }
            self.turn(Duration::from_secs(1));
        }
        panic!("{wanted:?} was never answered");
    }

    fn open(&mut self) -> Opened {
        let io = self.meta(MetaOp::Open);
        match self.meta_answer(io) {
            Ok(MetaAnswer::Opened(opened)) => opened,
            other => panic!("{other:?}: {:?}", self.disk.take_open_error()),
        }
    }

    fn write(&mut self, at: u64, bytes: &[u8], flags: WriteFlags) -> Result<DiskAnswer, IoFailure> {
        let buf = self.pool.alloc(Zone::Front, bytes.len()).unwrap();
        self.pool.bytes_mut(buf).copy_from_slice(bytes);
        let io = self.data(DiskOp::Write { range: range(at, bytes.len()), buf, flags });
        let answer = self.data_answer(io);
        self.pool.release(buf);
        answer
    }

    fn read(&mut self, at: u64, len: usize) -> Result<Vec<u8>, IoFailure> {
        let (range, buf, digest) = (range(at, len), None, None);
        let io = self.data(DiskOp::Read { range, buf, check_zero: false, digest });
        let buf = self.data_answer(io)?.buf.unwrap();
        let bytes = self.pool.bytes(buf).to_vec();
        self.pool.release(buf);
        Ok(bytes)
    }

    fn is_tidy(&mut self) {
        assert_eq!((self.disk.in_flight(), self.io.in_flight()), (0, 0));
        self.pool.release(self.zeroes);
        assert!(self.pool.is_idle(), "buffers are lost");
        self.zeroes = self.pool.alloc(Zone::Meta, ZEROES_LEN).unwrap();
    }
}

fn paths(path: &Path) -> DiskPaths {
    DiskPaths { backing: path.into(), meta: None, placement: Placement::Internal }
}

fn range(at: u64, len: usize) -> SectorRange {
    SectorRange::new(Sector(at / 512), SectorCount(len as u64 / 512)).unwrap()
}

fn on_both(len: u64, test: impl Fn(&mut Rig)) {
    for choice in [Choice::Ring, Choice::Threads] {
        match Rig::new(choice, len) {
            Some(mut rig) => {
                test(&mut rig);
                rig.is_tidy();
            }
            None => println!("skipped: no ring here"),
        }
    }
}

const FUA: WriteFlags = WriteFlags { fua: true, preflush: true, sync: true };

#[test]
fn data_is_written_read_and_taken_away() {
    on_both(8 << 20, |rig| {
        let opened = rig.open();
        assert_eq!(opened.backing, SectorCount(16_384));
        assert_eq!(opened.limits.logical_block, 512);
        rig.write(512, &[7; 70_144], WriteFlags::default()).unwrap();
        rig.write(1 << 20, &[9; 1 << 20], FUA).unwrap();
        assert!(rig.read(512, 70_144).unwrap().iter().all(|b| *b == 7));
        assert!(rig.read(1 << 20, 1 << 20).unwrap().iter().all(|b| *b == 9));
        let flush = rig.data(DiskOp::Flush);
        assert!(rig.data_answer(flush).is_ok());
        for (op, at) in [
            (DiskOp::Discard { range: range(1536, 20_480) }, 1536),
            (DiskOp::WriteZeroes { range: range(30_208, 20_480), may_unmap: false }, 30_208),
            (DiskOp::WriteZeroes { range: range(50_688, 19_456), may_unmap: true }, 50_688),
        ] {
            let io = rig.data(op);
            rig.data_answer(io).unwrap();
            assert!(rig.read(at, 19_456).unwrap().iter().all(|b| *b == 0), "{op:?}");
        }
        assert_eq!(rig.read(1024, 512).unwrap(), [7; 512]);
        assert_eq!(rig.read(22_016, 512).unwrap(), [7; 512]);
        assert_eq!(rig.read(70_144, 512).unwrap(), [7; 512]);
    });
}

#[test]
fn what_is_in_memory_needs_no_kernel_to_wait() {
    for choice in [Choice::Ring, Choice::Threads] {
        let Some(mut rig) = Rig::new_in(choice, 1 << 20, Path::new("/dev/shm")) else { continue };
        rig.open();
        let block = Box::new([7; 4096]);
        let io = rig.meta(MetaOp::Write { at: ByteOffset(8192), block, stable: true });
        // Data before it, the block, and the flush behind it, one after the other.
        let mut rounds = 0;
        while rig.disk.is_ready() {
            assert!(rig.events.is_empty());
            rig.with(|disk, env| disk.run(env));
            rounds += 1;
        }
        assert!((2..=3).contains(&rounds), "{rounds} rounds");
        assert_eq!((rig.events.len(), rig.io.in_flight()), (1, 0));
        assert_eq!(rig.meta_answer(io), Ok(MetaAnswer::Done));
        assert_eq!(rig.read(8192, 4096), Ok(vec![7; 4096]));
        rig.is_tidy();
    }
}

#[test]
fn reads_are_looked_at_on_the_way() {
    on_both(1 << 20, |rig| {
        rig.open();
        rig.write(4096, &[1; 4096], WriteFlags::default()).unwrap();
        for (at, zero) in [(0, true), (4096, false)] {
            let buf = rig.pool.alloc(Zone::Front, 8192).unwrap();
            let digest = Some(DigestUse::Csums);
            let (range, buf_wanted) = (range(at, 4096), Some(buf));
            let io = rig.data(DiskOp::Read { range, buf: buf_wanted, check_zero: true, digest });
            let answer = rig.data_answer(io).unwrap();
            let expected = Algorithm::Crc32c.digest(&[u8::from(!zero); 4096]);
            assert_eq!((answer.buf, answer.is_zero), (None, Some(zero)));
            assert_eq!(answer.digest, Some(expected));
            rig.pool.release(buf);
        }
    });
}

#[test]
fn behind_the_end_is_an_error() {
    on_both(1 << 20, |rig| {
        rig.open();
        assert_eq!(rig.read((1 << 20) - 512, 1024), Err(IoFailure::Device(libc::EIO)));
    });
}

#[test]
fn meta_data_is_blocks() {
    on_both(64 << 20, |rig| {
        rig.open();
        for (at, stable) in [(1 << 20, true), (2 << 20, false)] {
            let block = Box::new([5; 4096]);
            let io = rig.meta(MetaOp::Write { at: ByteOffset(at), block, stable });
            assert_eq!(rig.meta_answer(io), Ok(MetaAnswer::Done));
        }
        let io = rig.meta(MetaOp::Fill { at: ByteOffset(3 << 20), blocks: 33, value: 0xff });
        assert_eq!(rig.meta_answer(io), Ok(MetaAnswer::Done));
        let io = rig.meta(MetaOp::Fill { at: ByteOffset(2 << 20), blocks: 1, value: 0 });
        assert_eq!(rig.meta_answer(io), Ok(MetaAnswer::Done));
        let io = rig.meta(MetaOp::Flush);
        assert_eq!(rig.meta_answer(io), Ok(MetaAnswer::Done));
        let io = rig.meta(MetaOp::Read { at: ByteOffset(1 << 20), blocks: 4096 });
        let Ok(MetaAnswer::Blocks(blocks)) = rig.meta_answer(io) else { panic!() };
        let numbers: Vec<_> = blocks.iter().map(|block| block.0).collect();
        let expected: Vec<_> = std::iter::once(0).chain(512..545).collect();
        assert_eq!(numbers, expected);
        assert!(blocks[0].1.iter().all(|b| *b == 5) && blocks[33].1.iter().all(|b| *b == 255));
    });
}

#[test]
fn a_closed_disk_answers_and_closing_waits_for_the_rest() {
    on_both(1 << 20, |rig| {
        let io = rig.data(DiskOp::Flush);
        assert_eq!(rig.data_answer(io), Err(IoFailure::Gone));
        rig.open();
        let flush = rig.data(DiskOp::Flush);
        let close = rig.meta(MetaOp::Close);
        let late = rig.data(DiskOp::Flush);
        assert_eq!(rig.data_answer(late), Err(IoFailure::Gone));
        let first = loop {
            match rig.events.first() {
                Some(event) => break event.clone(),
                None => rig.turn(Duration::from_secs(1)),
            }
        };
        assert!(matches!(first, Event::Disk { io, result: Ok(_) } if io == flush), "{first:?}");
        rig.data_answer(flush).unwrap();
        assert_eq!(rig.meta_answer(close), Ok(MetaAnswer::Done));
        assert!(!rig.disk.is_open());
        rig.open();
    });
}

#[test]
fn a_disk_that_grows_is_measured_again() {
    on_both(1 << 20, |rig| {
        let io = rig.meta(MetaOp::Measure);
        assert_eq!(rig.meta_answer(io), Err(IoFailure::Gone));
        rig.open();
        let file = std::fs::OpenOptions::new().write(true).open(rig.path()).unwrap();
        file.set_len((2 << 20) + 700).unwrap();
        let io = rig.meta(MetaOp::Measure);
        let Ok(MetaAnswer::Opened(opened)) = rig.meta_answer(io) else { panic!() };
        assert!((4096..=4097).contains(&opened.backing.0), "{opened:?}");
        assert_eq!(opened.meta_device.0, opened.backing.0 * 512);
        // Closing the file has dropped the lock of this process; nobody else was there.
        drop(file);
        rig.write((2 << 20) - 512, &[1; 512], WriteFlags::default()).unwrap();
    });
}

#[test]
fn a_file_belongs_to_one_volume() {
    on_both(1 << 20, |rig| {
        rig.open();
        let error = OpenDisk::open(&paths(&rig.path())).unwrap_err();
        assert_eq!(error.errno, libc::EBUSY);
        assert!(error.text.contains(&format!("pid:{}", std::process::id())), "{error}");
        let close = rig.meta(MetaOp::Close);
        rig.meta_answer(close).unwrap();
        assert!(OpenDisk::open(&paths(&rig.path())).is_ok());
    });
}

#[test]
fn helper_that_holds_a_lock_for_another_test() {
    let Ok(path) = std::env::var("DRBDRS_TEST_LOCK") else { return };
    let open = OpenDisk::open(&paths(Path::new(&path)));
    println!("\nlocked {}", open.is_ok());
    // Until the other test closes our input.
    let _ = std::io::stdin().lines().count();
}

#[test]
fn the_process_that_has_a_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let mut other = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture"])
        .arg("plane::disk::tests::helper_that_holds_a_lock_for_another_test")
        .env("DRBDRS_TEST_LOCK", &path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let out = BufReader::new(other.stdout.take().unwrap());
    let mut lines = out.lines().map_while(Result::ok);
    assert_eq!(lines.find(|line| line.contains("locked")), Some("locked true".into()));
    let error = OpenDisk::open(&paths(&path)).unwrap_err();
    assert!(error.text.contains(&format!("lock currently held by pid:{}", other.id())), "{error}");
    assert_eq!(error.errno, libc::EBUSY);
    drop(other.stdin.take());
    other.wait().unwrap();
    assert!(OpenDisk::open(&paths(&path)).is_ok());
}

#[test]
fn what_cannot_be_opened_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let missing = OpenDisk::open(&paths(&dir.path().join("none"))).unwrap_err();
    assert!(missing.errno == libc::ENOENT && missing.text.contains("none"), "{missing}");
    let folder = OpenDisk::open(&paths(dir.path())).unwrap_err();
    assert_eq!(folder.errno, libc::ENOTBLK);
    let path = dir.path().join("disk");
    std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let twice = DiskPaths { meta: Some(path.clone()), ..paths(&path) };
    assert!(OpenDisk::open(&twice).unwrap_err().text.contains("as its own meta-disk"));
    assert!(OpenDisk::open(&paths(&path)).is_ok(), "the claim was given back");
}

fn rule(area: Area, kind: Kind, effect: Effect) -> Rule {
    Rule {
        volume: None,
        area: Some(area),
        kind: Some(kind),
        bytes: None,
        ppm: 1_000_000,
        times: None,
        effect,
    }
}

#[test]
fn a_failed_flush_stays_failed_until_the_disk_is_opened_again() {
    on_both(1 << 20, |rig| {
        rig.open();
        let fault = Rule { times: Some(1), ..rule(Area::Data, Kind::Flush, Effect::Fail(5)) };
        rig.faults.set(vec![fault]);
        for _ in 0..2 {
            let io = rig.data(DiskOp::Flush);
            assert_eq!(rig.data_answer(io), Err(IoFailure::Device(5)));
        }
        assert!(rig.write(0, &[1; 512], WriteFlags::default()).is_ok());
        let close = rig.meta(MetaOp::Close);
        rig.meta_answer(close).unwrap();
        rig.open();
        let io = rig.data(DiskOp::Flush);
        assert!(rig.data_answer(io).is_ok());
    });
}

#[test]
fn faults_strike_one_kind_delay_and_stall() {
    on_both(1 << 20, |rig| {
        rig.open();
        rig.faults.set(vec![rule(Area::Data, Kind::Write, Effect::Fail(28))]);
        let failed = rig.write(0, &[1; 512], WriteFlags::default());
        assert_eq!(failed, Err(IoFailure::Device(28)));
        assert!(rig.read(0, 512).is_ok());
        let delay = Effect::Delay(Duration::from_millis(3));
        rig.faults.set(vec![rule(Area::Data, Kind::Read, delay)]);
        let (range, buf, digest) = (range(0, 512), None, None);
        let op = DiskOp::Read { range, buf, check_zero: false, digest };
        let io = rig.data(op);
        assert_eq!(rig.disk.next_deadline(), Some(Tick(3000)));
        rig.now = Tick(2999);
        rig.with(Disk::resume);
        assert_eq!(rig.io.in_flight(), 0);
        rig.now = Tick(3000);
        rig.with(Disk::resume);
        let buf = rig.data_answer(io).unwrap().buf.unwrap();
        rig.pool.release(buf);
        rig.faults.set(vec![rule(Area::Data, Kind::Read, Effect::Stall)]);
        let io = rig.data(op);
        rig.now = Tick(u64::MAX);
        rig.with(Disk::resume);
        assert_eq!((rig.io.in_flight(), rig.disk.next_deadline()), (0, None));
        rig.faults.set(Vec::new());
        rig.with(Disk::faults_changed);
        let buf = rig.data_answer(io).unwrap().buf.unwrap();
        rig.pool.release(buf);
        rig.now = Tick(0);
    });
}

#[test]
fn reads_wait_for_memory_and_go_on() {
    on_both(8 << 20, |rig| {
        rig.open();
        let (buf, digest) = (None, None);
        let ios: Vec<_> = (0..5)
            .map(|n| {
                let range = range(n << 20, 1 << 20);
                rig.data(DiskOp::Read { range, buf, check_zero: false, digest })
            })
            .collect();
        assert_eq!(rig.io.in_flight(), 2, "the zone has 2 MiB");
        for io in ios {
            let buf = rig.data_answer(io).unwrap().buf.unwrap();
            rig.pool.release(buf);
            assert_eq!(rig.disk.starved.is_empty(), !rig.pool.take_wake(Zone::Disk));
            rig.with(Disk::resume);
        }
    });
}

/// A disk that only takes whole blocks of 4096 bytes: all is as on any other disk.
fn behaves_on_large_blocks(steps: &[(u8, u64, u64)]) {
    on_both(256 << 10, |rig| {
        rig.open();
        rig.disk.open.as_mut().unwrap().data.align = 4096;
        let mut model = vec![0; 256 << 10];
        let mut waiting = Vec::new();
        for (n, (kind, at, len)) in steps.iter().enumerate() {
            let (at, len) = (at * 512, usize::try_from(*len * 512).unwrap());
            let place = usize::try_from(at).unwrap();
            let part = place..(place + len).min(model.len());
            let range = range(at, part.len());
            let mark = u8::try_from(n % 255 + 1).unwrap();
            // Overlapping writes in flight have no order; neighbours in one block must work.
            let meets =
                waiting.iter().any(|(_, _, other): &(IoId, BufId, std::ops::Range<usize>)| {
                    other.start < part.end && part.start < other.end
                });
            if meets || waiting.len() > 5 {
                for (io, buf, _) in std::mem::take(&mut waiting) {
                    rig.data_answer(io).unwrap();
                    rig.pool.release(buf);
                }
            }
            let buf = rig.pool.alloc(Zone::Front, part.len()).unwrap();
            rig.pool.bytes_mut(buf).fill(mark);
            let (op, value) = match kind % 3 {
                0 => (DiskOp::Discard { range }, 0),
                1 => (DiskOp::WriteZeroes { range, may_unmap: mark.is_multiple_of(2) }, 0),
                _ => (DiskOp::Write { range, buf, flags: WriteFlags::default() }, mark),
            };
            let io = rig.data(op);
            model[part.clone()].fill(value);
            waiting.push((io, buf, part));
        }
        for (io, buf, _) in waiting {
            rig.data_answer(io).unwrap();
            rig.pool.release(buf);
        }
        for at in (0..model.len()).step_by(7 * 512) {
            let len = (7 * 512).min(model.len() - at);
            assert!(rig.read(at as u64, len).unwrap() == model[at..at + len], "{steps:?} {at}");
        }
        let mut on_disk = vec![0; model.len()];
        let file = std::fs::File::open(rig.path()).unwrap();
        file.read_exact_at(&mut on_disk, 0).unwrap();
        assert!(on_disk == model);
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_io_works_on_large_blocks(
        steps in prop::collection::vec((any::<u8>(), 0_u64..500, 1_u64..60), 1..40),
    ) {
        behaves_on_large_blocks(&steps);
    }
}

/// What the kernel still writes for a process that is gone keeps its open file.
#[test]
fn a_file_that_is_still_being_written_is_not_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let disk = OpenDisk::open(&paths(&path)).unwrap();
    let in_flight = rustix::io::dup(&disk.data.file).unwrap();
    drop(disk);
    let error = OpenDisk::open_within(&paths(&path), Duration::from_millis(20)).unwrap_err();
    assert_eq!(error.errno, libc::EBUSY);
    assert!(error.text.contains("have not ended"), "{error}");
    let end = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        drop(in_flight);
    });
    assert!(OpenDisk::open(&paths(&path)).is_ok());
    end.join().unwrap();
}
