//! The same tests for both implementations.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};

use super::super::buf::{PoolSize, Zone};
use super::*;

const TAG: Tag = Tag { part: Part::Link, key: 7 };

/// Runs a test on both; where the ring is forbidden only on the threads.
fn on_both(test: impl Fn(&mut dyn Backend, &mut Pool)) {
    for choice in [Choice::Ring, Choice::Threads] {
        match backend(choice) {
            Ok(mut io) => {
                let mut pool = Pool::new(PoolSize::default()).unwrap();
                test(&mut *io, &mut pool);
                assert_eq!(io.in_flight(), 0, "{}", io.name());
            }
            Err(error) if choice == Choice::Ring => println!("skipped: no ring here: {error}"),
            Err(error) => panic!("{error}"),
        }
    }
}

fn one(io: &mut dyn Backend) -> Done {
    let mut done = Vec::new();
    let mut rounds = 0;
    while done.is_empty() {
        io.wait(Some(Duration::from_secs(10)), &mut done).unwrap();
        rounds += 1;
        assert!(rounds < 10, "nothing ended in time");
    }
    assert_eq!(done.len(), 1, "{done:?}");
    done.remove(0)
}

fn file() -> Fd {
    Fd::new(tempfile::tempfile().unwrap().into())
}

fn pair() -> (Fd, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (Fd::new(ours.into()), theirs)
}

#[test]
fn files_are_written_read_flushed_and_punched() {
    on_both(|io, pool| {
        let file = file();
        let buf = pool.alloc(Zone::Disk, 8192).unwrap();
        pool.bytes_mut(buf).fill(5);
        for durable in [false, true] {
            let from = pool.lend(buf, 0..8192);
            io.submit(TAG, Op::Write { file: Fd::clone(&file), at: 4096, from, durable });
            let done = one(io);
            assert_eq!((done.tag, &done.result), (TAG, &Ok(8192)));
            done.op.give_back(pool);
        }
        io.submit(TAG, Op::Sync { file: Fd::clone(&file) });
        assert_eq!(one(io).result, Ok(0));
        let punch =
            Op::Allocate { file: Fd::clone(&file), how: Allocate::Punch, at: 4096, len: 4096 };
        io.submit(TAG, punch);
        assert_eq!(one(io).result, Ok(0));
        let into = pool.lend_mut(buf, 0..8192);
        io.submit(TAG, Op::Read { file, at: 4096, into });
        let done = one(io);
        assert_eq!(done.result, Ok(8192));
        done.op.give_back(pool);
        assert!(pool.bytes(buf)[..4096].iter().all(|b| *b == 0));
        assert!(pool.bytes(buf)[4096..].iter().all(|b| *b == 5));
        pool.release(buf);
        assert!(pool.is_idle());
    });
}

#[test]
fn an_error_of_a_file_is_its_errno() {
    on_both(|io, pool| {
        let read_only = Fd::new(std::fs::File::open("/dev/null").unwrap().into());
        let buf = pool.alloc(Zone::Disk, 1).unwrap();
        let from = pool.lend(buf, 0..1);
        io.submit(TAG, Op::Write { file: read_only, at: 0, from, durable: false });
        assert_eq!(one(io).result, Err(libc::EBADF));
    });
}

#[test]
fn a_receive_fills_one_buffer_and_then_the_other() {
    on_both(|io, pool| {
        let (ours, mut theirs) = pair();
        let (a, b) = (pool.alloc(Zone::Net, 4).unwrap(), pool.alloc(Zone::Net, 100).unwrap());
        let into = [Some(pool.lend_mut(a, 0..4)), Some(pool.lend_mut(b, 10..100))];
        io.submit(TAG, Op::Recv { socket: Fd::clone(&ours), into });
        let mut done = Vec::new();
        io.wait(Some(Duration::from_millis(5)), &mut done).unwrap();
        assert!(done.is_empty(), "nothing to receive yet");
        theirs.write_all(b"abcdefg").unwrap();
        let done = one(io);
        assert_eq!(done.result, Ok(7));
        done.op.give_back(pool);
        assert_eq!((pool.bytes(a), &pool.bytes(b)[10..13]), (&b"abcd"[..], &b"efg"[..]));
        drop(theirs);
        let into = [Some(pool.lend_mut(a, 0..4)), None];
        io.submit(TAG, Op::Recv { socket: ours, into });
        assert_eq!(one(io).result, Ok(0), "the end");
    });
}

#[test]
fn many_parts_go_out_in_order_and_a_gone_receiver_is_an_error_and_no_signal() {
    on_both(|io, pool| {
        let (ours, mut theirs) = pair();
        let buf = pool.alloc(Zone::Net, SEND_PARTS).unwrap();
        for (n, byte) in (0..).zip(pool.bytes_mut(buf)) {
            *byte = n;
        }
        let from = (0..SEND_PARTS).map(|n| pool.lend(buf, n..n + 1)).collect();
        io.submit(TAG, Op::Send { socket: Fd::clone(&ours), from });
        let done = one(io);
        assert_eq!(done.result, Ok(64));
        done.op.give_back(pool);
        let mut got = [0; SEND_PARTS];
        theirs.read_exact(&mut got).unwrap();
        assert!(got.iter().enumerate().all(|(n, b)| n == usize::from(*b)));
        drop(theirs);
        let from = vec![pool.lend(buf, 0..1)];
        io.submit(TAG, Op::Send { socket: ours, from });
        assert_eq!(one(io).result, Err(libc::EPIPE));
    });
}

#[test]
fn both_directions_of_a_socket_wait_at_once() {
    on_both(|io, pool| {
        let (ours, mut theirs) = pair();
        let out = pool.alloc(Zone::Net, 1 << 20).unwrap();
        let back = pool.alloc(Zone::Net, 1).unwrap();
        let into = [Some(pool.lend_mut(back, 0..1)), None];
        io.submit(TAG, Op::Recv { socket: Fd::clone(&ours), into });
        let mut sent = 0;
        let reader = std::thread::spawn(move || {
            let mut all = vec![0; 3 << 20];
            std::thread::sleep(Duration::from_millis(20));
            theirs.read_exact(&mut all).unwrap();
            theirs.write_all(b"!").unwrap();
            theirs
        });
        while sent < 3 << 20 {
            let len = ((3 << 20) - sent).min(1 << 20);
            let from = vec![pool.lend(out, 0..len)];
            io.submit(TAG, Op::Send { socket: Fd::clone(&ours), from });
            let done = one(io);
            sent += done.result.unwrap() as usize;
            assert!(matches!(done.op, Op::Send { .. }));
            done.op.give_back(pool);
        }
        let done = one(io);
        assert_eq!(done.result, Ok(1));
        done.op.give_back(pool);
        assert_eq!(pool.bytes(back), b"!");
        reader.join().unwrap();
    });
}

#[test]
fn connections_are_made_accepted_and_refused() {
    on_both(|io, _| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let listener = Fd::new(listener.into());
        io.submit(TAG, Op::Accept { socket: Fd::clone(&listener), accepted: None });
        let mut done = Vec::new();
        io.wait(Some(Duration::from_millis(1)), &mut done).unwrap();
        assert!(done.is_empty());
        let socket = || {
            let kind = rustix::net::SocketType::STREAM;
            Fd::new(rustix::net::socket(rustix::net::AddressFamily::INET, kind, None).unwrap())
        };
        io.submit(Tag { key: 8, ..TAG }, Op::Connect { socket: socket(), to });
        while done.len() < 2 {
            io.wait(Some(Duration::from_secs(10)), &mut done).unwrap();
        }
        assert!(done.iter().all(|done| done.result.is_ok()), "{done:?}");
        assert!(
            done.iter().any(|d| matches!(d.op, Op::Accept { accepted: Some(_), .. })),
            "{done:?}"
        );
        drop(listener);
        done.clear();
        let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        io.submit(TAG, Op::Connect { socket: socket(), to: gone });
        assert_eq!(one(io).result, Err(libc::ECONNREFUSED));
    });
}

#[test]
fn waiting_operations_can_be_cancelled() {
    on_both(|io, pool| {
        let (ours, _theirs) = pair();
        let buf = pool.alloc(Zone::Net, 4).unwrap();
        let into = [Some(pool.lend_mut(buf, 0..4)), None];
        let recv = io.submit(TAG, Op::Recv { socket: ours, into });
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = Fd::new(listener.into());
        let accept = io.submit(TAG, Op::Accept { socket, accepted: None });
        for key in [recv, accept] {
            io.cancel(key);
            let done = one(io);
            assert_eq!(done.result, Err(libc::ECANCELED), "{done:?}");
            done.op.give_back(pool);
        }
        io.cancel(recv);
        let mut done = Vec::new();
        io.wait(Some(Duration::from_millis(1)), &mut done).unwrap();
        assert!(done.is_empty(), "a late cancel hits nothing: {done:?}");
        pool.release(buf);
        assert!(pool.is_idle());
    });
}

#[test]
fn calls_run_beside_and_wake_the_plane() {
    on_both(|io, _| {
        static RAN: AtomicBool = AtomicBool::new(false);
        RAN.store(false, Ordering::SeqCst);
        io.submit(TAG, Op::Call(Some(Box::new(|| RAN.store(true, Ordering::SeqCst)))));
        assert_eq!(one(io).result, Ok(0));
        assert!(RAN.load(Ordering::SeqCst));
        io.submit(TAG, Op::Call(Some(Box::new(|| panic!("expected by this test")))));
        assert_eq!(one(io).result, Err(libc::EIO), "a panic there ends only the call");
    });
}

#[test]
fn a_closed_number_that_is_used_again_is_watched_again() {
    on_both(|io, pool| {
        let buf = pool.alloc(Zone::Net, 4).unwrap();
        for _ in 0..3 {
            let (ours, mut theirs) = pair();
            let into = [Some(pool.lend_mut(buf, 0..4)), None];
            io.submit(TAG, Op::Recv { socket: ours, into });
            io.wait(Some(Duration::ZERO), &mut Vec::new()).unwrap();
            theirs.write_all(b"x").unwrap();
            let done = one(io);
            assert_eq!(done.result, Ok(1));
            done.op.give_back(pool);
        }
    });
}

#[test]
fn a_dropped_backend_lets_go_of_waiting_sockets() {
    for choice in [Choice::Ring, Choice::Threads] {
        let Ok(mut io) = backend(choice) else { continue };
        let mut pool = Pool::new(PoolSize::default()).unwrap();
        let (a, mut b) = (TcpListener::bind("127.0.0.1:0").unwrap(), Vec::new());
        let mut client = TcpStream::connect(a.local_addr().unwrap()).unwrap();
        let socket = Fd::new(a.accept().unwrap().0.into());
        let buf = pool.alloc(Zone::Net, 4).unwrap();
        let into = [Some(pool.lend_mut(buf, 0..4)), None];
        io.submit(TAG, Op::Recv { socket, into });
        io.wait(Some(Duration::ZERO), &mut Vec::new()).unwrap();
        drop(io);
        assert_eq!(client.read_to_end(&mut b).unwrap(), 0, "closed with its last reference");
    }
}
