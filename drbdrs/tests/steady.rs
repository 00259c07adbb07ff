//! In the steady state nothing is allocated per I/O.

#![expect(unsafe_code, reason = "an allocator that counts has the interface of an allocator")]
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::{Read, Write};
use std::sync::atomic::{AtomicUsize, Ordering};

use drbdrs::plane::io::Choice;
use support::client::{Client, FLUSH, READ, WRITE, request};
use support::{Node, Setup};

static COUNT: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static IS_IGNORED: Cell<bool> = const { Cell::new(false) };
}

struct Counting;

// SAFETY: everything is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !IS_IGNORED.try_with(Cell::get).unwrap_or(true) {
            COUNT.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: the caller's promise about the layout is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: it came from `alloc` above.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations of the other threads while this one does so many rounds of writes, reads, a flush.
fn rounds(client: &mut Client, structured: bool, count: u64) -> usize {
    let before = COUNT.load(Ordering::Relaxed);
    let mut buffer = vec![0; 70_000];
    for n in 0..count {
        let at = n % 100 * 65_536;
        for len in [512_u32, 4096, 65_536] {
            let mut bytes = request(WRITE, 0, n, at, len);
            bytes.resize(bytes.len() + len as usize, 7);
            client.socket.write_all(&bytes).unwrap();
            client.socket.read_exact(&mut buffer[..16]).unwrap();
            client.socket.write_all(&request(READ, 0, n, at, len)).unwrap();
            let head = if structured { 28 } else { 16 };
            client.socket.read_exact(&mut buffer[..head + len as usize]).unwrap();
        }
        client.socket.write_all(&request(FLUSH, 0, n, 0, 0)).unwrap();
        client.socket.read_exact(&mut buffer[..16]).unwrap();
    }
    COUNT.load(Ordering::Relaxed) - before
}

#[test]
fn nothing_is_allocated_per_request() {
    IS_IGNORED.set(true);
    for io in [Choice::Auto, Choice::Threads] {
        let memory = std::path::PathBuf::from("/dev/shm");
        let folder = memory.is_dir().then_some(memory);
        let node = Node::new(Setup { io, folder, ..Setup::default() });
        for structured in [false, true] {
            let mut client = Client::open(&node.unix(), structured, &[]);
            let warming_up = rounds(&mut client, structured, 100);
            assert!(warming_up > 0, "the counter counts");
            let count = rounds(&mut client, structured, 100);
            assert_eq!(count, 0, "{io:?}, structured {structured}: allocations");
        }
    }
}
