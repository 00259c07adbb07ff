//! Two nodes with the real engine, each on a plane of its own, over loopback: one on the ring, the
//! other on helper threads.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod support;

use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use drbd_core::Engine;
use drbd_core::admin::Command as Admin;
use drbd_core::config::{DiskConfig, NetConfig, Protocol};
use drbd_core::engine::status::Status;
use drbd_core::event::Event;
use drbd_core::ids::Ticket;
use drbd_types::{ByteLen, Cstate, Deciseconds, Dstate, Minor, VolumeNr};
use drbdmeta::al::initialised_block;
use drbdmeta::layout::{AlGeometry, Layout, Placement};
use drbdmeta::superblock::Superblock;
use drbdrs::front::nbd::door::{Door, Entry, Listen, Registry};
use drbdrs::front::nbd::handshake::Export;
use drbdrs::plane::disk::DiskPaths;
use drbdrs::plane::io::Choice;
use drbdrs::plane::link::Addresses;
use drbdrs::plane::run::{Command, Config, Handle, Notice, spawn};
use drbdrs_tests::kernel_pair::apply_al;
use support::client::Client;

const VOLUME: VolumeNr = VolumeNr(0);
const BYTES: u64 = 24 << 20;
const DATA: usize = 20 << 20;
const LIMIT: Duration = Duration::from_secs(60);

struct Node {
    handle: Handle<Engine>,
    thread: Option<JoinHandle<()>>,
    replies: Receiver<(Ticket, i32)>,
    tickets: u32,
    _door: Door,
    socket: PathBuf,
    disk: PathBuf,
}

/// As create-md leaves a disk.
fn create(path: &Path) {
    let file = std::fs::File::create(path).unwrap();
    file.set_len(BYTES).unwrap();
    let geometry = AlGeometry::default();
    let layout = Layout::for_new(Placement::Internal, ByteLen(BYTES), geometry).unwrap();
    for t in 0..layout.al_geometry.blocks() {
        file.write_all_at(&initialised_block(), layout.al_block(t).0).unwrap();
    }
    file.write_all_at(&Superblock::new(&layout, 0).to_disk(), layout.superblock.0).unwrap();
}

impl Node {
    fn start(dir: &Path, name: &str, io: Choice, addresses: Addresses, seed: u64) -> Self {
        let (answer, replies) = sync_channel(64);
        let registry = Registry::default();
        let own: Arc<OnceLock<Handle<Engine>>> = Arc::default();
        let (plane, exports) = (Arc::clone(&own), registry.clone());
        let sink = Box::new(move |notice: Notice| match notice {
            Notice::Reply(ticket, reply) => answer.send((ticket, reply.code)).unwrap(),
            Notice::Call(call, ..) => {
                let plane = plane.get().unwrap();
                let _ = plane.send(Command::Event(Event::Handler { call, exit: 0 }));
            }
            Notice::Device(volume, offer) => {
                let plane = plane.get().unwrap().clone();
                let (name, description) = ("r0/0".into(), String::new());
                exports.set(Entry {
                    export: Export { name, description, volume, offer },
                    hand_over: Arc::new(move |s| plane.send(Command::Client(s)).is_ok()),
                    promote: None,
                    patience: Duration::from_secs(10),
                });
            }
            _ => {}
        });
        let config = Config { io, is_pinned: false, seed, ..Config::default() };
        let (handle, thread) = spawn("r0", config, move || Engine::new(seed), sink).unwrap();
        let _ = own.set(handle.clone());
        let socket = dir.join(format!("{name}.sock"));
        let door = Door::open(&[Listen::Unix(socket.clone())], registry).unwrap();
        let disk = dir.join(name);
        let mut node = Self {
            handle,
            thread: Some(thread),
            replies,
            tickets: 0,
            _door: door,
            socket,
            disk: disk.clone(),
        };
        let paths = DiskPaths { backing: disk, meta: None, placement: Placement::Internal };
        assert!(node.handle.send(Command::Disk(VOLUME, paths)).is_ok());
        assert!(node.handle.send(Command::Addresses(addresses)).is_ok());
        node.ok(Admin::NewVolume { volume: VOLUME, minor: Minor(0) });
        let mut disk = DiskConfig::default();
        disk.resync.c_max_rate = 4_000_000;
        disk.resync.resync_rate = 4_000_000;
        disk.resync.c_plan_ahead = 0;
        node.ok(Admin::Attach { volume: VOLUME, config: Box::new(disk) });
        node
    }

    fn connect(&mut self, protocol: Protocol) {
        let net = NetConfig {
            protocol,
            connect_int: 1,
            socket_check_timeout: Deciseconds(1),
            integrity_alg: "crc32c".into(),
            ..NetConfig::default()
        };
        self.ok(Admin::Connect(Box::new(net)));
    }

    fn ok(&mut self, command: Admin) {
        self.tickets += 1;
        let ticket = Ticket(self.tickets);
        let shown = format!("{command:?}");
        assert!(self.handle.send(Command::Event(Event::Admin { ticket, command })).is_ok());
        let (got, code) = self.replies.recv_timeout(LIMIT).expect(&shown);
        assert_eq!(got, ticket);
        assert!((1..102).contains(&code), "{shown}: {code}");
    }

    fn status(&self) -> Status {
        let (send, answer) = sync_channel(1);
        let look = Box::new(move |engine: &Engine| send.send(engine.status()).unwrap());
        assert!(self.handle.send(Command::Inspect(look)).is_ok());
        answer.recv_timeout(LIMIT).expect("the plane answers")
    }

    fn wait(&self, what: &str, holds: impl Fn(&Status) -> bool) {
        let end = Instant::now() + LIMIT;
        while !holds(&self.status()) {
            assert!(Instant::now() < end, "{what}: {:?}", self.status());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn wait_in_sync(&self) {
        self.wait("in sync", |status| {
            let state = status.volumes[0].state;
            state.conn == Cstate::Connected
                && state.disk == Dstate::UpToDate
                && state.pdsk == Dstate::UpToDate
        });
    }

    /// The process is gone, without a word.
    fn kill(mut self) {
        assert!(self.handle.send(Command::Stop).is_ok());
        self.thread.take().unwrap().join().unwrap();
    }

    fn data(&self) -> Vec<u8> {
        let mut bytes = vec![0; DATA];
        std::fs::File::open(&self.disk).unwrap().read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.handle.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            assert!(thread.join().is_ok() || std::thread::panicking(), "the plane has panicked");
        }
    }
}

fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn block(n: u64, round: u8) -> Vec<u8> {
    (0..4096_u64).map(|at| u8::try_from((n * 7 + at / 512) % 251).unwrap() ^ round).collect()
}

/// Some scattered writes; each must read back.
fn scribble(client: &mut Client, round: u8) {
    for n in 0..200_u64 {
        let at = n * 37 % 5000 * 4096 % (DATA as u64 - 4096);
        assert_eq!(client.write(at / 4096 * 4096, &block(n, round)), 0);
    }
    assert_eq!(client.write(8 << 20, &vec![round; 3 << 20]), 0);
    assert!(client.read(8 << 20, 3 << 20).iter().all(|b| *b == round));
}

#[test]
fn what_is_written_here_is_there_also_after_a_kill_and_a_resync() {
    for (protocol, seed) in [(Protocol::C, 1), (Protocol::B, 2), (Protocol::A, 3)] {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (free_address(), free_address());
        let here = Addresses { own: a, peer: b, send_buffer: 0, receive_buffer: 0 };
        let there = Addresses { own: b, peer: a, ..here };
        create(&dir.path().join("a"));
        create(&dir.path().join("b"));
        let mut first = Node::start(dir.path(), "a", Choice::Auto, here, seed);
        let mut second = Node::start(dir.path(), "b", Choice::Threads, there, seed + 100);
        first.connect(protocol);
        second.connect(protocol);
        first.wait("connected", |status| status.volumes[0].state.conn == Cstate::Connected);
        first.ok(Admin::Primary { volume: VOLUME, force: true });
        let mut client = Client::open(&first.socket, false, &[]);
        scribble(&mut client, 1);
        first.wait_in_sync();
        second.wait_in_sync();
        scribble(&mut client, 2);
        let mut expected = first.data();
        second.wait("written", |status| status.volumes[0].owed == 0);
        // Protocols A and B answer before the peer's disk has it.
        let end = Instant::now() + LIMIT;
        while second.data() != expected {
            assert!(Instant::now() < end, "the disks differ");
            std::thread::sleep(Duration::from_millis(20));
        }

        second.kill();
        scribble(&mut client, 3);
        // As `drbdadm up` does before it attaches.
        let image = std::fs::read(dir.path().join("b")).unwrap();
        std::fs::write(dir.path().join("b"), apply_al(image).unwrap()).unwrap();
        let mut second = Node::start(dir.path(), "b", Choice::Threads, there, seed + 200);
        second.connect(protocol);
        second.wait_in_sync();
        first.wait_in_sync();
        expected = first.data();
        assert!(second.data() == expected, "the disks differ after the resync");

        // Without an own disk everything comes from the peer.
        first.ok(Admin::Detach { volume: VOLUME, force: false });
        assert!(client.read(8 << 20, 3 << 20).iter().all(|b| *b == 3));
        assert_eq!(client.write(0, &block(5, 9)), 0);
        assert_eq!(client.read(0, 4096), block(5, 9));
        drop(client);
        first.wait("closed", |status| status.volumes[0].users == 0);
        first.ok(Admin::Secondary(VOLUME));
        assert_eq!(second.data()[..4096], block(5, 9));
    }
}
