//! Payload memory: one mapping, cut into zones, each with a buddy allocator of 4 KiB to 32 MiB.
//!
//! ```text
//!   alloc --> owned (references counted) --lend--> Reading, any number at once
//!                 |   ^                 \-lend_mut-> Writing, alone
//!              release  take_back
//! ```
//!
//! Invariants: blocks never overlap; a block is free exactly when its count of references is zero;
//! every lease is a reference; while a [`Writing`] exists nobody else looks at the block, while a
//! [`Reading`] exists nobody changes it. The mapping lives as long as the pool or any lease.
//! A lease that is dropped instead of being taken back keeps its block for ever: that is safe, and
//! what happens when a ring dies with I/O in flight.
//!
//! Zones keep the parts of the plane from starving each other: a front end that is full of requests
//! that wait for the peer must not take the memory into which the peer's answer is received.
//! Nothing is allocated from the heap after the pool was made.
#![expect(unsafe_code, reason = "maps memory and hands out slices of it; see the invariants above")]

use std::fmt;
use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

pub use drbd_core::ids::BufId;
use rustix::mm::{MapFlags, MlockFlags, ProtFlags};
use zerocopy::FromZeros;

/// Smallest block, bytes.
pub const PAGE: usize = 4096;
/// Largest block, bytes.
pub const BLOCK_MAX: usize = 32 << 20;
/// log2 of `BLOCK_MAX / PAGE`.
const ORDER_MAX: u8 = 13;
const ORDERS: usize = ORDER_MAX as usize + 1;
/// End of a list. Page 0 is a real page, so list links hold the page number plus one.
const NIL: u32 = 0;

/// Whose memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zone {
    /// Requests of applications.
    Front,
    /// Reads for the peer, bounce buffers.
    Disk,
    /// What is received from the peer, and heads of packets.
    Net,
    /// Blocks of meta-data.
    Meta,
    /// What clients send and get besides data.
    Clients,
}

/// Bytes of each zone; rounded up to whole blocks of 1 MiB, or of 32 MiB beyond that size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolSize {
    /// [`Zone::Front`].
    pub front: usize,
    /// [`Zone::Disk`].
    pub disk: usize,
    /// [`Zone::Net`].
    pub net: usize,
    /// [`Zone::Meta`].
    pub meta: usize,
    /// [`Zone::Clients`].
    pub clients: usize,
}

impl Default for PoolSize {
    /// Address space only: memory is used page by page, when it is needed for the first time.
    fn default() -> Self {
        Self { front: 64 << 20, disk: 32 << 20, net: 32 << 20, meta: 1 << 20, clients: 8 << 20 }
    }
}

/// The mapping.
struct Arena {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to no thread; who may touch which part is decided by the pool.
unsafe impl Send for Arena {}
// SAFETY: as above; all access goes through leases and the pool, which keep writers alone.
unsafe impl Sync for Arena {}

impl Arena {
    fn new(len: usize) -> io::Result<Self> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let how = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new anonymous mapping at a place of the kernel's choice touches nothing else.
        let base = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, access, how) }?;
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, len })
    }

    /// # Safety
    /// `start + len` is inside the mapping, and nobody writes there while the slice lives.
    unsafe fn slice(&self, start: usize, len: usize) -> &[u8] {
        // SAFETY: inside the mapping by the caller's promise; anonymous memory is initialised.
        let first = unsafe { self.base.add(start) };
        // SAFETY: as above, and nobody writes.
        unsafe { std::slice::from_raw_parts(first.as_ptr(), len) }
    }

    /// # Safety
    /// `start + len` is inside the mapping, and nobody else touches it while the slice lives.
    #[expect(clippy::mut_from_ref, reason = "exclusiveness is the caller's promise")]
    unsafe fn slice_mut(&self, start: usize, len: usize) -> &mut [u8] {
        // SAFETY: inside the mapping by the caller's promise; anonymous memory is initialised.
        let first = unsafe { self.base.add(start) };
        // SAFETY: as above, and nobody else has it.
        unsafe { std::slice::from_raw_parts_mut(first.as_ptr(), len) }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the pool and all leases, which are the only users, are gone.
        let result = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert!(result.is_ok(), "the mapping is ours");
    }
}

/// Permission to read a part of a buffer, for the kernel or a helper thread.
#[must_use = "a lease that is not taken back keeps its buffer for ever"]
pub struct Reading {
    arena: Arc<Arena>,
    buf: BufId,
    start: usize,
    len: usize,
}

/// Permission to write a part of a buffer, for the kernel or a helper thread. There is only one.
#[must_use = "a lease that is not taken back keeps its buffer for ever"]
pub struct Writing {
    arena: Arc<Arena>,
    buf: BufId,
    start: usize,
    len: usize,
}

macro_rules! lease {
    ($name:ident) => {
        impl $name {
            /// Of which buffer.
            pub const fn buf(&self) -> BufId {
                self.buf
            }

            /// Bytes of the part.
            pub const fn len(&self) -> usize {
                self.len
            }

            /// Nothing?
            pub const fn is_empty(&self) -> bool {
                self.len == 0
            }

            /// Makes the part shorter from the front.
            pub fn advance(&mut self, by: usize) {
                let by = by.min(self.len);
                self.start += by;
                self.len -= by;
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({} +{})", stringify!($name), self.buf.0, self.len)
            }
        }
    };
}
lease!(Reading);
lease!(Writing);

impl Reading {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `lend` checked the place; no `Writing` exists while this lease does.
        unsafe { self.arena.slice(self.start, self.len) }
    }
}

impl Writing {
    /// The bytes.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: `lend_mut` checked the place; this lease is the only access to the block.
        unsafe { self.arena.slice_mut(self.start, self.len) }
    }
}

/// One page of the mapping. All zero: nothing begins here.
#[derive(Clone, Copy, Default, FromZeros)]
struct Page {
    /// References to the block that begins here.
    refs: u32,
    /// Length that was asked for, bytes.
    len: u32,
    /// In a list of free blocks: neighbours, page number plus one.
    next: u32,
    prev: u32,
    /// `Reading`s of the block.
    readers: u16,
    order: u8,
    state: PageState,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, FromZeros)]
#[repr(u8)]
enum PageState {
    #[default]
    Inside = 0,
    Free,
    Used,
    /// Used, and a `Writing` exists.
    Written,
}

struct ZoneState {
    /// Pages of the zone.
    pages: Range<u32>,
    /// Heads of the lists of free blocks, page number plus one.
    free: [u32; ORDERS],
    free_pages: u32,
    /// Somebody was sent away, and afterwards a block was released.
    is_wanted: bool,
    is_woken: bool,
}

/// The pool.
pub struct Pool {
    arena: Arc<Arena>,
    pages: Vec<Page>,
    zones: [ZoneState; 5],
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("bytes", &self.arena.len).finish_non_exhaustive()
    }
}

impl Pool {
    /// Maps the memory. Nothing of it is resident yet.
    ///
    /// # Errors
    /// The address space is limited.
    pub fn new(size: PoolSize) -> io::Result<Self> {
        let sizes = [size.front, size.disk, size.net, size.meta, size.clients].map(whole_blocks);
        let total = sizes.iter().sum::<usize>();
        let pages = total / PAGE;
        if u32::try_from(pages).is_err() {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let arena = Arc::new(Arena::new(total)?);
        let mut at = 0;
        let zones = sizes.map(|bytes| {
            let start = at;
            at += count(bytes / PAGE);
            ZoneState {
                pages: start..at,
                free: [NIL; ORDERS],
                free_pages: at - start,
                is_wanted: false,
                is_woken: false,
            }
        });
        // Zeroed memory of this size comes from the kernel and is not touched here: a hundred idle
        // resources would have 70 MB of it.
        let pages = Page::new_vec_zeroed(pages).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let mut pool = Self { arena, pages, zones };
        for zone in 0..pool.zones.len() {
            pool.fill(zone);
        }
        Ok(pool)
    }

    /// Keeps the memory from being paged out, from the first use of each page on.
    ///
    /// # Errors
    /// Not permitted, or beyond the limit of locked memory.
    pub fn lock_memory(&self) -> io::Result<()> {
        let base = self.arena.base.as_ptr().cast();
        // SAFETY: the range is our mapping, and locking changes no content.
        Ok(unsafe { rustix::mm::mlock_with(base, self.arena.len, MlockFlags::ONFAULT) }?)
    }

    /// A buffer of this many bytes, at a multiple of 4096, with one reference. `None` if the zone
    /// is exhausted: the caller waits for [`Self::take_wake`]. Its content is arbitrary.
    ///
    /// # Panics
    /// More than [`BLOCK_MAX`] bytes.
    pub fn alloc(&mut self, zone: Zone, len: usize) -> Option<BufId> {
        assert!(len <= BLOCK_MAX, "a buffer of {len} bytes");
        let order = order_of(len);
        let Some(page) = self.cut(zone as usize, order) else {
            self.zones[zone as usize].is_wanted = true;
            return None;
        };
        self.zones[zone as usize].free_pages -= 1 << order;
        self.pages[page as usize] =
            Page { refs: 1, len: count(len), order, state: PageState::Used, ..Page::default() };
        Some(BufId(page))
    }

    /// Bytes that are free in a zone, perhaps in pieces.
    pub fn free_bytes(&self, zone: Zone) -> usize {
        self.zones[zone as usize].free_pages as usize * PAGE
    }

    /// Since the last call: was somebody refused, and has something been released since?
    pub fn take_wake(&mut self, zone: Zone) -> bool {
        std::mem::take(&mut self.zones[zone as usize].is_woken)
    }

    /// Will [`Self::take_wake`] say so?
    pub const fn is_woken(&self, zone: Zone) -> bool {
        self.zones[zone as usize].is_woken
    }

    /// Length that was asked for.
    pub fn len(&self, buf: BufId) -> usize {
        self.used(buf).len as usize
    }

    /// Is everything free?
    pub fn is_idle(&self) -> bool {
        self.zones.iter().all(|zone| zone.free_pages == count(zone.pages.len()))
    }

    /// One more reference.
    pub fn retain(&mut self, buf: BufId) {
        self.used_mut(buf).refs += 1;
    }

    /// One reference less; the last one frees the buffer.
    pub fn release(&mut self, buf: BufId) {
        let page = self.used_mut(buf);
        page.refs -= 1;
        if page.refs > 0 {
            return;
        }
        assert!(page.readers == 0 && page.state == PageState::Used, "leases are references");
        let order = page.order;
        let zone = self.zone_of(buf.0);
        let state = &mut self.zones[zone];
        state.free_pages += 1 << order;
        state.is_woken |= std::mem::take(&mut state.is_wanted);
        self.join(zone, buf.0, order);
    }

    /// The content.
    ///
    /// # Panics
    /// Somebody is writing it.
    pub fn bytes(&self, buf: BufId) -> &[u8] {
        let page = self.used(buf);
        assert!(page.state == PageState::Used, "buffer {} is being written", buf.0);
        // SAFETY: used blocks are inside the mapping, and nobody writes: no `Writing` exists, and
        // `bytes_mut` and `lend_mut` borrow the pool.
        unsafe { self.arena.slice(start_of(buf), page.len as usize) }
    }

    /// The content, to be changed.
    ///
    /// # Panics
    /// Somebody is reading or writing it.
    pub fn bytes_mut(&mut self, buf: BufId) -> &mut [u8] {
        let page = self.used(buf);
        assert!(page.state == PageState::Used && page.readers == 0, "buffer {} is lent", buf.0);
        let len = page.len as usize;
        // SAFETY: used blocks are inside the mapping; there is no lease, and the pool is borrowed.
        unsafe { self.arena.slice_mut(start_of(buf), len) }
    }

    /// Lends a part for reading.
    ///
    /// # Panics
    /// Outside of the buffer, or somebody is writing it.
    pub fn lend(&mut self, buf: BufId, part: Range<usize>) -> Reading {
        let page = self.used_mut(buf);
        assert!(page.state == PageState::Used, "buffer {} is being written", buf.0);
        let (start, len) = place(buf, page.len, &part);
        page.refs += 1;
        page.readers = page.readers.checked_add(1).expect("a buffer has few readers");
        Reading { arena: Arc::clone(&self.arena), buf, start, len }
    }

    /// Lends a part for writing.
    ///
    /// # Panics
    /// Outside of the buffer, or somebody is reading or writing it.
    pub fn lend_mut(&mut self, buf: BufId, part: Range<usize>) -> Writing {
        let page = self.used_mut(buf);
        assert!(page.state == PageState::Used && page.readers == 0, "buffer {} is lent", buf.0);
        let (start, len) = place(buf, page.len, &part);
        page.refs += 1;
        page.state = PageState::Written;
        Writing { arena: Arc::clone(&self.arena), buf, start, len }
    }

    /// Ends a lease.
    pub fn take_back(&mut self, lease: Reading) {
        self.check_ours(&lease.arena);
        self.used_mut(lease.buf).readers -= 1;
        self.release(lease.buf);
    }

    /// Ends a lease.
    pub fn take_back_mut(&mut self, lease: Writing) {
        self.check_ours(&lease.arena);
        self.used_mut(lease.buf).state = PageState::Used;
        self.release(lease.buf);
    }

    fn check_ours(&self, arena: &Arc<Arena>) {
        assert!(Arc::ptr_eq(&self.arena, arena), "a lease of another pool");
    }

    fn used(&self, buf: BufId) -> &Page {
        let page = self.pages.get(buf.0 as usize).filter(|page| page.refs > 0);
        page.unwrap_or_else(|| panic!("buffer {} is not in use", buf.0))
    }

    fn used_mut(&mut self, buf: BufId) -> &mut Page {
        let page = self.pages.get_mut(buf.0 as usize).filter(|page| page.refs > 0);
        page.unwrap_or_else(|| panic!("buffer {} is not in use", buf.0))
    }

    fn zone_of(&self, page: u32) -> usize {
        self.zones.iter().position(|z| z.pages.contains(&page)).expect("zones cover the pool")
    }

    /// Puts the whole zone into the lists, in the largest blocks that fit.
    fn fill(&mut self, zone: usize) {
        let Range { mut start, end } = self.zones[zone].pages;
        while start < end {
            // Buddies are counted from the start of the zone.
            let order = (0..=ORDER_MAX).rev().find(|o| end - start >= 1 << o).unwrap_or_default();
            self.push(zone, start, order);
            start += 1 << order;
        }
    }

    /// Takes a free block of exactly this order, splitting a larger one if needed.
    fn cut(&mut self, zone: usize, order: u8) -> Option<u32> {
        let found = (order..=ORDER_MAX).find(|o| self.zones[zone].free[usize::from(*o)] != NIL)?;
        let page = self.zones[zone].free[usize::from(found)] - 1;
        self.unlink(zone, page);
        for smaller in (order..found).rev() {
            self.push(zone, page + (1 << smaller), smaller);
        }
        Some(page)
    }

    /// Gives a block back and joins it with its free neighbours.
    fn join(&mut self, zone: usize, mut page: u32, mut order: u8) {
        self.pages[page as usize] = Page::default();
        let Range { start, end } = self.zones[zone].pages;
        while order < ORDER_MAX {
            let buddy = start + ((page - start) ^ (1 << order));
            let is_joinable = buddy + (1 << order) <= end
                && matches!(self.pages[buddy as usize],
                    Page { state: PageState::Free, order: o, .. } if o == order);
            if !is_joinable {
                break;
            }
            self.unlink(zone, buddy);
            page = page.min(buddy);
            order += 1;
        }
        self.push(zone, page, order);
    }

    fn push(&mut self, zone: usize, page: u32, order: u8) {
        let head = &mut self.zones[zone].free[usize::from(order)];
        let next = std::mem::replace(head, page + 1);
        if next != NIL {
            self.pages[next as usize - 1].prev = page + 1;
        }
        self.pages[page as usize] = Page { next, order, state: PageState::Free, ..Page::default() };
    }

    fn unlink(&mut self, zone: usize, page: u32) {
        let Page { next, prev, order, .. } = std::mem::take(&mut self.pages[page as usize]);
        match prev {
            NIL => self.zones[zone].free[usize::from(order)] = next,
            prev => self.pages[prev as usize - 1].next = next,
        }
        if next != NIL {
            self.pages[next as usize - 1].prev = prev;
        }
    }
}

fn whole_blocks(bytes: usize) -> usize {
    let unit = if bytes >= BLOCK_MAX { BLOCK_MAX } else { 1 << 20 };
    bytes.max(1).next_multiple_of(unit)
}

fn order_of(len: usize) -> u8 {
    let pages = len.div_ceil(PAGE).max(1).next_power_of_two();
    u8::try_from(pages.trailing_zeros()).expect("at most 64")
}

fn place(buf: BufId, len: u32, part: &Range<usize>) -> (usize, usize) {
    assert!(part.start <= part.end && part.end <= len as usize, "{part:?} of {len} bytes");
    (start_of(buf) + part.start, part.len())
}

const fn start_of(buf: BufId) -> usize {
    buf.0 as usize * PAGE
}

fn count(n: usize) -> u32 {
    u32::try_from(n).expect("the pool has at most 2^32 pages, a buffer at most 32 MiB")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn small() -> Pool {
        Pool::new(PoolSize { front: 1 << 20, disk: 3 << 20, net: 33 << 20, meta: 1, clients: 1 })
            .unwrap()
    }

    #[test]
    fn a_zone_is_bounded_and_says_when_it_is_worth_trying_again() {
        let mut pool = small();
        let all: Vec<_> = std::iter::from_fn(|| pool.alloc(Zone::Front, 65_536)).collect();
        assert_eq!(all.len(), 16);
        assert!(pool.alloc(Zone::Disk, 1 << 20).is_some(), "zones do not starve each other");
        assert!(!pool.take_wake(Zone::Front));
        pool.release(all[3]);
        assert!(pool.take_wake(Zone::Front) && !pool.take_wake(Zone::Front));
        assert_eq!(pool.free_bytes(Zone::Front), 65_536);
        assert!(pool.alloc(Zone::Front, 65_537).is_none());
        assert_eq!(pool.alloc(Zone::Front, 65_536), Some(all[3]));
    }

    #[test]
    fn the_largest_block_exists_where_the_zone_is_large_enough() {
        let mut pool = small();
        assert!(pool.alloc(Zone::Net, BLOCK_MAX).is_some());
        assert!(pool.alloc(Zone::Net, BLOCK_MAX).is_some(), "33 MiB are rounded to 64");
        assert!(pool.alloc(Zone::Net, 1).is_none());
        assert!(pool.alloc(Zone::Disk, 2 << 20).is_some() && pool.alloc(Zone::Disk, 1).is_some());
    }

    #[test]
    fn a_buffer_lives_until_its_last_lease_is_back() {
        let mut pool = small();
        let buf = pool.alloc(Zone::Meta, 5000).unwrap();
        pool.bytes_mut(buf).fill(7);
        let (a, b) = (pool.lend(buf, 0..5000), pool.lend(buf, 4000..5000));
        pool.release(buf);
        assert_eq!((a.bytes()[4999], b.len()), (7, 1000));
        pool.take_back(a);
        assert!(!pool.is_idle());
        pool.take_back(b);
        assert!(pool.is_idle());
    }

    #[test]
    #[should_panic(expected = "is lent")]
    fn what_is_read_cannot_be_changed() {
        let mut pool = small();
        let buf = pool.alloc(Zone::Meta, 1).unwrap();
        let _lease = pool.lend(buf, 0..1);
        pool.bytes_mut(buf);
    }

    #[test]
    #[should_panic(expected = "is being written")]
    fn what_is_written_cannot_be_read() {
        let mut pool = small();
        let buf = pool.alloc(Zone::Meta, 1).unwrap();
        let _lease = pool.lend_mut(buf, 0..1);
        pool.bytes(buf);
    }

    #[test]
    #[should_panic(expected = "is not in use")]
    fn a_freed_number_means_nothing() {
        let mut pool = small();
        let buf = pool.alloc(Zone::Meta, 1).unwrap();
        pool.release(buf);
        pool.release(buf);
    }

    #[test]
    fn leases_outlive_the_pool() {
        let mut pool = small();
        let buf = pool.alloc(Zone::Meta, 4096).unwrap();
        let mut lease = pool.lend_mut(buf, 1..4096);
        drop(pool);
        let thread = std::thread::spawn(move || {
            lease.bytes_mut().fill(9);
            lease.bytes_mut()[4094]
        });
        assert_eq!(thread.join().unwrap(), 9);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Any order of allocations and releases: blocks never overlap, and in the end everything
        /// is one piece again.
        #[test]
        fn blocks_never_overlap(steps in prop::collection::vec((0_usize..60_000, any::<u16>()), 1..200)) {
            let mut pool = small();
            let mut held: Vec<(BufId, u8)> = Vec::new();
            for (n, (len, pick)) in steps.into_iter().enumerate() {
                if pick % 3 == 0 && !held.is_empty() {
                    let (buf, mark) = held.swap_remove(usize::from(pick) % held.len());
                    prop_assert!(pool.bytes(buf).iter().all(|b| *b == mark));
                    pool.release(buf);
                } else if let Some(buf) = pool.alloc(Zone::Disk, len) {
                    let mark = u8::try_from(n % 251).unwrap();
                    pool.bytes_mut(buf).fill(mark);
                    held.push((buf, mark));
                }
            }
            for (buf, mark) in held {
                prop_assert!(pool.bytes(buf).iter().all(|b| *b == mark));
                pool.release(buf);
            }
            prop_assert!(pool.is_idle());
            prop_assert!(pool.alloc(Zone::Disk, 2 << 20).is_some());
        }
    }
}
