//! The NBD server with a client that says exactly what a test wants, also what no client should.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod support;

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use drbdrs::plane::buf::PoolSize;
use drbdrs::plane::io::Choice;
use drbdrs::plane::run::{Command, Notice};
use proptest::prelude::*;
use support::client::{
    Client, DISC, FLUSH, READ, STATUS, TRIM, WRITE, ZEROES, be32, be64, request,
};
use support::{Limits, Node, Setup, VOLUME};

fn on_both(setup: &Setup, test: impl Fn(&Node)) {
    for io in [Choice::Auto, Choice::Threads] {
        test(&Node::new(Setup { io, ..setup.clone() }));
    }
}

/// A device that takes only small pieces.
fn small() -> Setup {
    let limits =
        Limits { max_io: 8192, max_discard: 16_384, max_write_zeroes: 0, ..Limits::default() };
    Setup { limits, ..Setup::default() }
}

fn mark(at: usize) -> u8 {
    u8::try_from(at / 512 % 251).unwrap()
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(mark).collect()
}

#[test]
fn requests_are_cut_to_what_the_device_takes() {
    on_both(&small(), |node| {
        let mut client = Client::open(&node.unix(), false, &[]);
        let data = pattern(300 * 512);
        assert_eq!(client.write(1536, &data), 0);
        assert!(client.read(1536, 300 * 512) == data);
        assert_eq!(client.read(0, 1536), [0; 1536]);
        client.request(ZEROES, 0, 3, 2048, 100_352);
        assert_eq!(client.simple(), (3, 0));
        assert!(client.read(2048, 100_352).iter().all(|b| *b == 0));
        assert!(client.read(2048 + 100_352, 512).iter().all(|b| *b == mark(100_864)));
        client.request(ZEROES, 16, 4, 0, 4096);
        assert_eq!(client.simple(), (4, 95), "fast zeroes are not possible");
        client.request(TRIM, 1, 5, 0, 1 << 20);
        assert_eq!(client.simple(), (5, 0));
        assert!(client.read(0, 1 << 20).iter().all(|b| *b == 0));
    });
}

#[test]
fn structured_reads_come_in_chunks_that_cover_everything() {
    on_both(&small(), |node| {
        let mut client = Client::open(&node.unix(), true, &[]);
        let data = pattern(100 * 512);
        assert_eq!(client.write(0, &data), 0);
        client.request(READ, 0, 9, 512, 90 * 512);
        let mut seen = [None; 90];
        loop {
            let (cookie, is_last, kind, body) = client.chunk();
            assert_eq!((cookie, kind), (9, 1));
            let at = usize::try_from(be64(&body)).unwrap();
            for (n, sector) in body[8..].chunks(512).enumerate() {
                assert!(seen[at / 512 - 1 + n].replace(()).is_none(), "twice");
                assert!(sector == &data[at + n * 512..at + n * 512 + 512]);
            }
            if is_last {
                break;
            }
        }
        assert!(seen.iter().all(Option::is_some));
        client.request(READ, 4, 10, 512, 90 * 512);
        let (cookie, is_last, kind, body) = client.chunk();
        assert_eq!((cookie, is_last, kind, be64(&body)), (10, true, 1, 512));
        assert!(body[8..] == data[512..91 * 512], "one chunk was wanted");
        client.request(READ, 0, 11, 1, 512);
        let (cookie, is_last, kind, body) = client.chunk();
        assert_eq!((cookie, is_last, kind, be32(&body)), (11, true, 0x8001, 22));
    });
}

#[test]
fn refused_requests_leave_the_stream_in_step() {
    on_both(&Setup::default(), |node| {
        let size = 64 << 20;
        for structured in [false, true] {
            let mut client = Client::open(&node.unix(), structured, &[]);
            let refused = [
                (WRITE, 0, 100, 512, 22),
                (WRITE, 0, 0, 513, 22),
                (WRITE, 0, 0, 0, 22),
                (WRITE, 0, size, 512, 28),
                (WRITE, 0, u64::MAX - 511, 1024, 28),
                (WRITE, 0, 0, (32 << 20) + 512, 22),
                (WRITE, 64, 0, 512, 22),
                (WRITE, 2, 0, 512, 22),
                (TRIM, 0, size - 512, 1024, 22),
                (ZEROES, 0, size, 512, 28),
                (99, 0, 0, 512, 22),
            ];
            for (n, (command, flags, offset, len, error)) in (0..).zip(refused) {
                client.request(command, flags, n, offset, len);
                if command == WRITE {
                    client.send(&vec![1; len as usize]);
                }
                assert_eq!(client.simple(), (n, error), "request {n}");
            }
            client.request(STATUS, 0, 50, 0, 512);
            if structured {
                assert_eq!(client.chunk().2, 0x8001, "no context was chosen");
            } else {
                assert_eq!(client.simple(), (50, 22));
            }
            client.request(FLUSH, 0, 51, 0, 0);
            assert_eq!(client.simple(), (51, 0));
            client.request(DISC, 0, 52, 0, 0);
            assert!(client.is_closed());
        }
        node.wait_for_users(0);
    });
}

#[test]
fn replies_come_after_a_goodbye_and_after_half_a_close() {
    on_both(&Setup::default(), |node| {
        for goodbye in [true, false] {
            let mut client = Client::open(&node.unix(), false, &[]);
            for n in 0..20 {
                client.request(READ, 0, n, n * 4096, 4096);
            }
            if goodbye {
                client.request(DISC, 0, 99, 0, 0);
            } else {
                client.socket.shutdown(std::net::Shutdown::Write).unwrap();
            }
            let mut cookies: Vec<_> = (0..20)
                .map(|_| {
                    let (cookie, error) = client.simple();
                    assert_eq!(error, 0);
                    assert_eq!(client.take(4096), [0; 4096]);
                    cookie
                })
                .collect();
            cookies.sort_unstable();
            assert_eq!(cookies, (0..20).collect::<Vec<_>>());
            assert!(client.is_closed());
        }
        node.wait_for_users(0);
    });
}

#[test]
fn clients_may_die_at_any_byte() {
    on_both(&small(), |node| {
        let mut all = request(WRITE, 0, 1, 0, 65_536);
        all.extend(pattern(65_536));
        all.extend(request(READ, 0, 2, 0, 1 << 20));
        for cut in [1, 27, 28, 29, 4000, 8220, 8221, 50_000, 65_564, 65_580, all.len()] {
            let mut client = Client::open(&node.unix(), cut % 2 == 0, &[]);
            client.send(&all[..cut]);
            drop(client);
        }
        let mut garbage = Client::open(&node.unix(), false, &[]);
        garbage.send(&[0x11; 28]);
        assert!(garbage.is_closed());
        node.wait_for_users(0);
        let mut client = Client::open(&node.unix(), false, &[]);
        assert!(client.read(0, 65_536) == pattern(65_536));
    });
}

#[test]
fn clients_that_do_not_read_stop_only_themselves() {
    let pool = PoolSize { front: 64 << 20, ..PoolSize::default() };
    on_both(&Setup { pool, ..Setup::default() }, |node| {
        let mut lazy = Client::open(&node.unix(), true, &[]);
        lazy.socket.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
        for n in 0..5000 {
            if lazy.socket.write_all(&request(READ, 0, n, 0, 1 << 20)).is_err() {
                break;
            }
        }
        let mut other = Client::open(&node.unix(), false, &[]);
        let before = Instant::now();
        for n in 0..50_u8 {
            assert_eq!(other.write(u64::from(n) * 4096, &[n; 4096]), 0);
        }
        assert_eq!(other.read(49 * 4096, 4096), [49; 4096]);
        assert!(before.elapsed() < Duration::from_secs(5), "{:?}", before.elapsed());
        drop(lazy);
        node.wait_for_users(1);
    });
}

#[test]
fn many_large_reads_in_one_piece_do_not_wait_for_each_other() {
    on_both(&Setup::default(), |node| {
        let clients: Vec<_> = (0..6).map(|_| Client::open(&node.unix(), false, &[])).collect();
        let threads: Vec<_> = clients
            .into_iter()
            .map(|mut client| {
                std::thread::spawn(move || {
                    for n in 0..4 {
                        client.request(READ, 0, n, 0, 32 << 20);
                    }
                    for _ in 0..4 {
                        assert_eq!(client.simple().1, 0);
                        client.take(32 << 20);
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

#[test]
fn the_state_of_blocks_is_told() {
    on_both(&Setup::default(), |node| {
        let contexts = ["base:allocation", "drbd:out-of-sync"];
        let mut client = Client::open(&node.unix(), true, &contexts);
        assert_eq!(client.write(1 << 20, &[1; 65_536]), 0);
        client.request(STATUS, 0, 1, 0, 2 << 20);
        // Nobody knows what is in sync: then a hole says nothing.
        for (context, is_last) in [(1, false), (2, true)] {
            let (_, last, kind, body) = client.chunk();
            let expected = [be32(&body), be32(&body[4..]), be32(&body[8..])];
            assert_eq!((last, kind, expected), (is_last, 5, [context, 2 << 20, 0]));
        }
    });
}

#[test]
fn holes_and_out_of_sync_blocks_are_extents() {
    on_both(&Setup::default(), |node| {
        node.replace(|engine| engine.oos = Some(65_536..131_072));
        let mut client = Client::open(&node.unix(), true, &["base:allocation", "drbd:out-of-sync"]);
        assert_eq!(client.write(1 << 20, &[1; 65_536]), 0);
        let mut ask = |flags| {
            client.request(STATUS, flags, 1, 0, 2 << 20);
            [client.chunk().3, client.chunk().3].map(|body| {
                let numbers: Vec<_> = body[4..].chunks(4).map(be32).collect();
                numbers.chunks(2).map(|pair| (pair[0], pair[1])).collect::<Vec<_>>()
            })
        };
        let [holes, oos] = ask(0);
        assert_eq!(oos, [(65_536, 0), (65_536, 1), ((2 << 20) - 131_072, 0)]);
        let expected =
            [(65_536, 3), (65_536, 0), ((1 << 20) - 131_072, 3), (65_536, 0), (983_040, 3)];
        assert_eq!(holes, expected);
        let [holes, oos] = ask(8);
        assert_eq!((holes, oos), (vec![(65_536, 3)], vec![(65_536, 0)]), "one was wanted");
    });
}

#[test]
fn a_secondary_is_refused_or_waited_for() {
    let limits = Limits { is_primary: false, ..Limits::default() };
    let node = Node::new(Setup { limits, ..Setup::default() });
    let mut client = Client::raw(&node.unix());
    let (kind, text) = client.go("r0/0");
    let text = String::from_utf8(text).unwrap();
    assert_eq!(kind, 1 << 31 | 2);
    assert_eq!(text, "r0/0 is Secondary on this node: it can only be used where it is Primary");
    let (kind, _) = client.go("r1");
    assert_eq!(kind, 1 << 31 | 6);

    let offer = node.offer();
    let primary = drbd_core::action::DeviceOffer { is_primary: true, ..offer };
    node.publish(offer);
    node.change(|entry| entry.patience = Duration::from_secs(20));
    let waiter = std::thread::spawn(move || client.go("r0"));
    std::thread::sleep(Duration::from_millis(50));
    assert!(!waiter.is_finished());
    node.publish(primary);
    assert_eq!(waiter.join().unwrap().0, 1);

    node.publish(offer);
    let registry = node.registry.clone();
    let promoted = node.entry(primary);
    node.change(move |entry| {
        let (registry, promoted) = (registry.clone(), promoted.clone());
        entry.promote = Some(Arc::new(move || {
            registry.set(promoted.clone());
            Ok(())
        }));
    });
    assert_eq!(Client::raw(&node.unix()).go("").0, 1, "promoted when it was opened");
    node.publish(offer);
    node.change(|entry| entry.promote = Some(Arc::new(|| Err("not today".into()))));
    assert_eq!(Client::raw(&node.unix()).go(""), (1 << 31 | 2, b"not today".to_vec()));
}

#[test]
fn users_are_counted_and_can_be_sent_away() {
    on_both(&Setup::default(), |node| {
        let mut clients: Vec<_> = (0..3).map(|_| Client::open(&node.unix(), false, &[])).collect();
        node.wait_for_users(3);
        drop(clients.pop());
        node.wait_for_users(2);
        assert!(node.handle.send(Command::DetachClients(Some(VOLUME))).is_ok());
        assert!(clients.iter_mut().all(Client::is_closed));
        node.wait_for_users(0);
        let notices = node.notices.lock().unwrap();
        let users: Vec<_> = notices
            .iter()
            .filter_map(|notice| match notice {
                Notice::Users(_, users) => Some(*users),
                _ => None,
            })
            .collect();
        assert_eq!(users, [1, 2, 3, 2, 1, 0]);
    });
}

#[test]
fn an_idle_plane_does_nothing() {
    on_both(&Setup::default(), |node| {
        let _client = Client::open(&node.unix(), false, &[]);
        node.wait_for_users(1);
        let before = (node.inspect(|engine| engine.handled), cpu_time());
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(node.inspect(|engine| engine.handled), before.0);
        let used = cpu_time() - before.1;
        // Other tests of this process run beside it under `cargo test`.
        if std::env::var_os("NEXTEST").is_some() {
            assert!(used < Duration::from_millis(20), "{used:?} of CPU while idle");
        }
    });
}

fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::try_from(time).unwrap()
}

/// Runs in a process of its own, since the limit is that of the process.
#[test]
fn helper_that_runs_out_of_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    if std::env::var_os("DRBDRS_TEST_DESCRIPTORS").is_none() {
        return;
    }
    let node = Node::new(Setup::default());
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: Some(64), maximum }).unwrap();
    let mut all: Vec<_> = std::iter::from_fn(|| std::fs::File::open("/dev/null").ok()).collect();
    assert!(all.len() < 64);
    all.pop();
    // Takes the last one: there is none for the server's end.
    let path = node.unix();
    let opening = std::thread::spawn(move || Client::open(&path, false, &[]));
    std::thread::sleep(Duration::from_millis(300));
    assert!(!opening.is_finished());
    drop(all);
    let mut client = opening.join().unwrap();
    assert_eq!(client.write(0, &[5; 512]), 0);
    println!("\nstill there");
}

#[test]
fn descriptors_run_out_and_come_back() {
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", "helper_that_runs_out_of_descriptors"])
        .env("DRBDRS_TEST_DESCRIPTORS", "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&child.stdout).into_owned();
    let errors = String::from_utf8_lossy(&child.stderr);
    assert!(child.status.success() && text.contains("still there"), "{text}{errors}");
}

/// A stream of requests, some of them damaged.
fn streams() -> impl Strategy<Value = Vec<u8>> {
    let one = (0_u16..9, 0_u16..40, 0_u64..40_000, 0_u32..300, any::<bool>()).prop_map(
        |(command, flags, sector, sectors, is_odd)| {
            let len = sectors * 512 + u32::from(is_odd);
            let mut bytes = request(command, flags, sector, sector * 512, len);
            if command == WRITE {
                bytes.extend(vec![7; len as usize]);
            }
            bytes
        },
    );
    let damage = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3);
    (prop::collection::vec(one, 1..20), damage).prop_map(|(requests, damage)| {
        let mut bytes = requests.concat();
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        bytes
    })
}

#[test]
fn any_stream_of_requests_is_survived() {
    for io in [Choice::Auto, Choice::Threads] {
        let node = Node::new(Setup { io, ..small() });
        let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
            cases: 60,
            failure_persistence: None,
            ..ProptestConfig::default()
        });
        let strategy = (streams(), any::<bool>());
        let result = runner.run(&strategy, |(stream, structured)| {
            let contexts: &[&str] = if structured { &["base:allocation"] } else { &[] };
            let mut client = Client::open(&node.unix(), structured, contexts);
            let mut reader = client.socket.try_clone().unwrap();
            let reading = std::thread::spawn(move || {
                // Until the end, or until nothing comes for a moment.
                reader.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
                while matches!(reader.read(&mut [0; 65_536]), Ok(1..)) {}
            });
            // The server may have hung up in the middle.
            let _ = client.socket.write_all(&stream);
            let _ = client.socket.shutdown(std::net::Shutdown::Write);
            reading.join().unwrap();
            Ok(())
        });
        result.unwrap();
        node.wait_for_users(0);
        let mut client = Client::open(&node.unix(), false, &[]);
        assert_eq!(client.write(0, &[5; 512]), 0);
        assert_eq!(client.read(0, 512), [5; 512]);
    }
}
