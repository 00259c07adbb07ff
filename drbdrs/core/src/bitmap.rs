//! The bitmap in memory: one bit per 4 KiB of data, set where the peer may differ.
//!
//! It is kept in pages of 4096 bytes, the unit in which it is read and written. Pages without a
//! clear or without a set bit need no memory of their own: what is kept grows with what is partly
//! dirty, so that 16 TiB of data cost about 1.2 MB while they are in sync.
//!
//! Invariants: the counter equals the number of set bits; bits behind the end are never set,
//! counted or shown (spec invariants 15 and 20); a page has memory only while it has both set and
//! clear bits. Ranges that reach beyond the end are cut. The last 64 bits are bits like all others
//! (defect 14.1 of the reference).
//!
//! Reading, writing and the order of the two are the caller's business; this module only remembers
//! which pages differ from what was last handed out for writing.
//! Spec: io-path-and-resync.md §7; metadata.md §4.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ops::Range;

use drbd_types::SectorCount;
use drbd_types::units::SECTORS_PER_BIT;
pub use drbdmeta::bitmap::BITS_PER_PAGE;
use drbdmeta::layout::DATA_SECTORS_MAX;

/// Bytes of one page.
pub const PAGE_BYTES: usize = 4096;
/// Words of one page.
const PAGE_WORDS: usize = 512;
/// [`PAGE_WORDS`] for numbers of words in the whole bitmap.
const WORDS_PER_PAGE: u64 = 512;

/// All bits of the page are set; it has no memory of its own.
const FULL: u8 = 1;
/// Bits were set since the page was last taken for writing.
const SET: u8 = 2;
/// Bits were cleared since the page was last taken for writing.
const CLEARED: u8 = 4;
const CHANGED: u8 = SET | CLEARED;

/// A page with both set and clear bits.
#[derive(Clone, Debug)]
struct Mixed {
    /// Set bits; more than none, less than all that are valid.
    count: u64,
    words: [u64; PAGE_WORDS],
}

/// The bitmap of one volume.
#[derive(Clone, Debug)]
pub struct Bitmap {
    size: SectorCount,
    bits: u64,
    count: u64,
    /// Pages with memory of their own.
    mixed: usize,
    /// Pages with a mark of change.
    changed: u32,
    /// For each page [`FULL`], [`SET`], [`CLEARED`]; apart from the pointers, which would
    /// otherwise grow to twice their size.
    marks: Vec<u8>,
    pages: Vec<Option<Box<Mixed>>>,
}

impl Bitmap {
    /// The bitmap of a device of this size, without set bits and without changed pages.
    ///
    /// # Panics
    /// The device is larger than the 1 PiB that the format supports; callers check sizes before.
    #[must_use]
    pub fn new(size: SectorCount) -> Self {
        let mut bitmap = Self {
            size: SectorCount(0),
            bits: 0,
            count: 0,
            mixed: 0,
            changed: 0,
            marks: Vec::new(),
            pages: Vec::new(),
        };
        bitmap.resize(size, false);
        bitmap
    }

    /// Number of bits: sectors / 8, rounded up.
    #[must_use]
    pub const fn bits(&self) -> u64 {
        self.bits
    }

    /// Set bits. Costs nothing.
    #[must_use]
    pub const fn count(&self) -> u64 {
        self.count
    }

    /// Number of pages.
    #[must_use]
    pub fn pages(&self) -> u32 {
        u32::try_from(self.pages.len()).expect("1 PiB has 2^23 pages")
    }

    /// Takes over a page as it was read from disk. What lies behind the last bit is ignored. The
    /// page counts as unchanged afterwards: it is what is on disk. A page that does not exist is
    /// ignored.
    pub fn load_page(&mut self, page: u32, bytes: &[u8; PAGE_BYTES]) {
        let page = place(page);
        let valid = self.valid_bits(page);
        if valid == 0 {
            return;
        }
        let mut words = [0; PAGE_WORDS];
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        mask_tail(&mut words, valid);
        self.count -= self.count_of(page);
        self.count += self.replace(page, &words);
        self.unmark(page);
    }

    /// A page as it is to be on disk; zeros behind the last bit, and for a page that does not
    /// exist.
    #[must_use]
    pub fn page_bytes(&self, page: u32) -> Box<[u8; PAGE_BYTES]> {
        let page = place(page);
        let mut bytes = Box::new([0; PAGE_BYTES]);
        if self.count_of(page) > 0 {
            let words = self.words_of(page);
            for (bytes, word) in bytes.as_chunks_mut().0.iter_mut().zip(&words) {
                *bytes = word.to_le_bytes();
            }
        }
        bytes
    }

    /// Sets these bits and says how many of them were clear.
    pub fn set(&mut self, bits: Range<u64>) -> u64 {
        let newly = self.update(bits, true);
        self.count += newly;
        newly
    }

    /// Clears these bits and says how many of them were set.
    pub fn clear(&mut self, bits: Range<u64>) -> u64 {
        let newly = self.update(bits, false);
        self.count -= newly;
        newly
    }

    /// Sets all bits.
    pub fn set_all(&mut self) {
        self.set(0..self.bits);
    }

    /// Clears all bits.
    pub fn clear_all(&mut self) {
        self.clear(0..self.bits);
    }

    /// Set bits among these.
    #[must_use]
    pub fn count_in(&self, bits: Range<u64>) -> u64 {
        if bits.start == 0 && bits.end >= self.bits {
            return self.count;
        }
        let pieces = pieces(bits.start..bits.end.min(self.bits));
        pieces
            .map(|(page, bits)| match self.pages.get(page) {
                Some(Some(mixed)) => masks(bits)
                    .map(|(word, mask)| u64::from((mixed.words[word] & mask).count_ones()))
                    .sum(),
                _ if self.is_full(page) => bits.end - bits.start,
                _ => 0,
            })
            .sum()
    }

    /// Set bits, counted one by one.
    #[cfg(any(test, feature = "check"))]
    pub(crate) fn recount(&self) -> u64 {
        let pages = (0..self.pages.len()).map(|page| match self.pages.get(page) {
            Some(Some(mixed)) => {
                let words = mixed.words.iter().filter(|word| **word != 0);
                words.map(|word| u64::from(word.count_ones())).sum()
            }
            _ => self.count_of(page),
        });
        pages.sum()
    }

    /// Is this bit set? One behind the end is not.
    #[must_use]
    pub fn is_set(&self, bit: u64) -> bool {
        self.word(bit / 64) & (1 << (bit % 64)) != 0
    }

    /// The first set bit from here on. Pages of one colour are passed without looking into them.
    #[must_use]
    pub fn next_set(&self, from: u64) -> Option<u64> {
        if self.count == 0 { None } else { self.next(from, true) }
    }

    /// The first clear bit from here on; `None` if all up to the end are set.
    #[must_use]
    pub fn next_clear(&self, from: u64) -> Option<u64> {
        if self.count == self.bits { None } else { self.next(from, false) }
    }

    /// Bits `64 * index ..`, the lowest first; zeros behind the end.
    #[must_use]
    pub fn word(&self, index: u64) -> u64 {
        let (page, word) = word_place(index);
        match self.pages.get(page) {
            Some(Some(mixed)) => mixed.words[word],
            _ if self.is_full(page) => self.valid_word(index),
            _ => 0,
        }
    }

    /// Sets bits `64 * index ..` where this word has ones, and says how many were clear. Ones
    /// behind the end are ignored.
    pub fn or_word(&mut self, index: u64, word: u64) -> u64 {
        let new = word & self.valid_word(index) & !self.word(index);
        if new == 0 {
            return 0;
        }
        let (page, at) = word_place(index);
        let mixed = self.materialise(page);
        mixed.words[at] |= new;
        let newly = u64::from(new.count_ones());
        mixed.count += newly;
        self.settle(page);
        self.mark(page, SET);
        self.count += newly;
        newly
    }

    /// The device has another size now. Bits that remain keep their values. The blocks that come
    /// with growth, and the last old one if it was not whole, are set on demand; otherwise new bits
    /// are clear. Which pages have to be written is not decided here: after a change of size all of
    /// them, see [`Self::mark_all_changed`].
    ///
    /// # Panics
    /// As [`Self::new`].
    pub fn resize(&mut self, size: SectorCount, set_new: bool) {
        assert!(size <= DATA_SECTORS_MAX, "{size} sectors are more than 1 PiB");
        let (old_size, old_bits) = (self.size, self.bits);
        let bits = size.bits_ceil().0;
        let last = self.pages.len().saturating_sub(1);
        if bits < old_bits {
            self.clear(bits..old_bits);
        }
        // A page of one colour has no count of its own: it follows from the number of its bits,
        // which changes now.
        if self.is_full(last) {
            self.materialise(last);
        }
        let pages = usize::try_from(bits.div_ceil(BITS_PER_PAGE)).expect("2^23 pages at most");
        self.pages.resize_with(pages, || None);
        self.pages.shrink_to_fit();
        self.marks.resize(pages, 0);
        self.marks.shrink_to_fit();
        (self.size, self.bits) = (size, bits);
        self.settle(last.min(pages.saturating_sub(1)));
        let changed = self.marks.iter().filter(|m| **m & CHANGED != 0).count();
        self.changed = u32::try_from(changed).expect("2^23 pages at most");
        if set_new && size > old_size {
            self.set(old_size.0 / SECTORS_PER_BIT..bits);
        }
    }

    /// The first page from this one on that changed since it was last taken for writing.
    #[must_use]
    pub fn next_changed(&self, from_page: u32) -> Option<u32> {
        if self.changed == 0 {
            return None;
        }
        let from = place(from_page);
        let ahead = self.marks.get(from..)?.iter().position(|m| m & CHANGED != 0)?;
        u32::try_from(from + ahead).ok()
    }

    /// Was anything in this page set or cleared since it was last taken for writing?
    #[must_use]
    pub fn is_changed(&self, page: u32) -> bool {
        self.marks_of(place(page)) & CHANGED != 0
    }

    /// Was anything in this page set since it was last taken for writing? Such a page must be on
    /// disk before an extent of it leaves the activity log; one with only cleared bits need not.
    #[must_use]
    pub fn was_set_since_write(&self, page: u32) -> bool {
        self.marks_of(place(page)) & SET != 0
    }

    /// A copy of the page for writing. Its marks are taken away now, before the write starts, so
    /// that a change during the write marks it again. Spec: io-path §7.4.
    #[must_use = "the page counts as written"]
    pub fn take_for_write(&mut self, page: u32) -> Box<[u8; PAGE_BYTES]> {
        self.unmark(place(page));
        self.page_bytes(page)
    }

    /// The byte that the whole page consists of on disk, if it is entirely clear or entirely set.
    #[must_use]
    pub fn uniform(&self, page: u32) -> Option<u8> {
        let at = place(page);
        let count = self.count_of(at);
        if count == 0 {
            Some(0)
        } else if count == BITS_PER_PAGE {
            Some(0xFF)
        } else {
            None
        }
    }

    /// The page is being written without a copy, as [`Self::uniform`] says. Otherwise as
    /// [`Self::take_for_write`].
    pub fn mark_written(&mut self, page: u32) {
        self.unmark(place(page));
    }

    /// The write of a taken page failed: it counts as changed in both ways, since the marks that it
    /// had are gone.
    pub fn write_failed(&mut self, page: u32) {
        self.mark(place(page), CHANGED);
    }

    /// Every page has to be written, whatever is in it.
    pub fn mark_all_changed(&mut self) {
        for marks in &mut self.marks {
            *marks |= CHANGED;
        }
        self.changed = self.pages();
    }

    /// Bytes of memory that it takes.
    #[must_use]
    pub fn memory(&self) -> usize {
        size_of::<Self>()
            + self.marks.capacity()
            + self.pages.capacity() * size_of::<Option<Box<Mixed>>>()
            + self.mixed * size_of::<Mixed>()
    }

    fn update(&mut self, bits: Range<u64>, value: bool) -> u64 {
        let bits = bits.start..bits.end.min(self.bits);
        pieces(bits).map(|(page, bits)| self.update_page(page, bits, value)).sum()
    }

    /// Changes a piece of a page; `bits` count from its start and are not beyond the end.
    fn update_page(&mut self, page: usize, bits: Range<u64>, value: bool) -> u64 {
        let valid = self.valid_bits(page);
        let before = self.count_of(page);
        if before == if value { valid } else { 0 } {
            return 0;
        }
        let newly = if bits.end - bits.start == valid {
            self.release(page);
            self.set_full(page, value);
            if value { valid - before } else { before }
        } else {
            let newly = self.materialise(page).write(bits, value);
            self.settle(page);
            newly
        };
        if newly > 0 {
            self.mark(page, if value { SET } else { CLEARED });
        }
        newly
    }

    fn next(&self, from: u64, value: bool) -> Option<u64> {
        if from >= self.bits {
            return None;
        }
        let first = usize::try_from(from / BITS_PER_PAGE).ok()?;
        let mut offset = from % BITS_PER_PAGE;
        let pages = self.pages.iter().zip(&self.marks).zip(0..).skip(first);
        for ((page, marks), number) in pages {
            let found = match page {
                Some(mixed) => mixed.next(offset, value),
                None => ((marks & FULL != 0) == value).then_some(offset),
            };
            offset = 0;
            if let Some(found) = found {
                // In the last page clear bits may have been found behind the end.
                let found = number * BITS_PER_PAGE + found;
                return (found < self.bits).then_some(found);
            }
        }
        None
    }

    /// Bits that a page has; fewer in the last one, none in one that does not exist.
    fn valid_bits(&self, page: usize) -> u64 {
        let start = u64::try_from(page).unwrap_or(u64::MAX).saturating_mul(BITS_PER_PAGE);
        self.bits.saturating_sub(start).min(BITS_PER_PAGE)
    }

    /// Ones where a word has bits.
    fn valid_word(&self, index: u64) -> u64 {
        low_ones(self.bits.saturating_sub(index.saturating_mul(64)))
    }

    fn marks_of(&self, page: usize) -> u8 {
        self.marks.get(page).copied().unwrap_or(0)
    }

    fn is_full(&self, page: usize) -> bool {
        self.marks_of(page) & FULL != 0
    }

    fn count_of(&self, page: usize) -> u64 {
        match self.pages.get(page) {
            Some(Some(mixed)) => mixed.count,
            _ if self.is_full(page) => self.valid_bits(page),
            _ => 0,
        }
    }

    fn words_of(&self, page: usize) -> [u64; PAGE_WORDS] {
        if let Some(Some(mixed)) = self.pages.get(page) {
            return mixed.words;
        }
        let mut words = [if self.is_full(page) { !0 } else { 0 }; PAGE_WORDS];
        mask_tail(&mut words, self.valid_bits(page));
        words
    }

    fn set_full(&mut self, page: usize, full: bool) {
        if let Some(marks) = self.marks.get_mut(page) {
            *marks = *marks & !FULL | if full { FULL } else { 0 };
        }
    }

    fn mark(&mut self, page: usize, new: u8) {
        if let Some(marks) = self.marks.get_mut(page) {
            self.changed += u32::from(*marks & CHANGED == 0);
            *marks |= new;
        }
    }

    fn unmark(&mut self, page: usize) {
        if let Some(marks) = self.marks.get_mut(page) {
            self.changed -= u32::from(*marks & CHANGED != 0);
            *marks &= !CHANGED;
        }
    }

    fn release(&mut self, page: usize) {
        self.mixed -= usize::from(self.pages[page].take().is_some());
    }

    /// Gives an existing page memory of its own; [`Self::settle`] takes it away again.
    fn materialise(&mut self, page: usize) -> &mut Mixed {
        if self.pages[page].is_none() {
            let (count, words) = (self.count_of(page), self.words_of(page));
            self.set_full(page, false);
            self.mixed += 1;
            self.pages[page] = Some(Box::new(Mixed { count, words }));
        }
        self.pages[page].as_mut().expect("just made")
    }

    /// Releases the memory of a page that has become one colour.
    fn settle(&mut self, page: usize) {
        let valid = self.valid_bits(page);
        if let Some(Some(mixed)) = self.pages.get(page)
            && (mixed.count == 0 || mixed.count == valid)
        {
            let full = mixed.count > 0;
            self.release(page);
            self.set_full(page, full);
        }
    }

    /// Puts masked words in the place of a page and says how many are set.
    fn replace(&mut self, page: usize, words: &[u64; PAGE_WORDS]) -> u64 {
        let count = words.iter().map(|w| u64::from(w.count_ones())).sum();
        if count == 0 || count == self.valid_bits(page) {
            self.release(page);
            self.set_full(page, count > 0);
        } else {
            let mixed = self.materialise(page);
            mixed.words = *words;
            mixed.count = count;
        }
        count
    }
}

impl Mixed {
    fn write(&mut self, bits: Range<u64>, value: bool) -> u64 {
        let mut newly = 0;
        for (word, mask) in masks(bits) {
            let word = &mut self.words[word];
            let new = if value { !*word & mask } else { *word & mask };
            *word ^= new;
            newly += u64::from(new.count_ones());
        }
        if value {
            self.count += newly;
        } else {
            self.count -= newly;
        }
        newly
    }

    fn next(&self, from: u64, value: bool) -> Option<u64> {
        let flip = if value { 0 } else { !0 };
        masks(from..BITS_PER_PAGE).zip(from / 64..).find_map(|((word, mask), number)| {
            let hits = (self.words[word] ^ flip) & mask;
            (hits != 0).then(|| number * 64 + u64::from(hits.trailing_zeros()))
        })
    }
}

fn place(page: u32) -> usize {
    usize::try_from(page).unwrap_or(usize::MAX)
}

fn word_place(index: u64) -> (usize, usize) {
    let page = usize::try_from(index / WORDS_PER_PAGE).unwrap_or(usize::MAX);
    (page, usize::try_from(index % WORDS_PER_PAGE).expect("below 512"))
}

/// Cuts a range at the borders of pages: page, and bits counted from its start.
fn pieces(bits: Range<u64>) -> impl Iterator<Item = (usize, Range<u64>)> {
    let mut at = bits.start;
    core::iter::from_fn(move || {
        if at >= bits.end {
            return None;
        }
        let page = at / BITS_PER_PAGE;
        let start = page * BITS_PER_PAGE;
        let end = bits.end.min(start + BITS_PER_PAGE);
        let piece = at - start..end - start;
        at = end;
        Some((usize::try_from(page).expect("the range was cut to the pages"), piece))
    })
}

/// The words that hold these bits of a page, each with ones where the range is.
fn masks(bits: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let words = bits.start / 64..bits.end.div_ceil(64);
    words.map(move |word| {
        let first = word * 64;
        let below = low_ones(bits.start.saturating_sub(first));
        let mask = low_ones(bits.end - first) & !below;
        (usize::try_from(word).expect("below 512"), mask)
    })
}

/// A word whose lowest `n` bits are ones; all for 64 and more.
const fn low_ones(n: u64) -> u64 {
    if n >= 64 { !0 } else { (1 << n) - 1 }
}

fn mask_tail(words: &mut [u64; PAGE_WORDS], valid: u64) {
    for (word, first) in words.iter_mut().zip((0..).step_by(64)) {
        *word &= low_ones(valid.saturating_sub(first));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::BTreeSet;
    use bitvec::prelude::*;
    use proptest::prelude::*;

    const SECTORS_PER_PAGE: u64 = BITS_PER_PAGE * SECTORS_PER_BIT;

    /// The obvious thing: one bit after the other, and sets of page numbers.
    struct Model {
        bits: BitVec<u64, Lsb0>,
        set: BTreeSet<u32>,
        cleared: BTreeSet<u32>,
        size: u64,
    }

    impl Model {
        fn new(size: u64) -> Self {
            let mut bits = bitvec![u64, Lsb0; 0; at(size.div_ceil(8))];
            bits.set_uninitialized(false);
            Self { bits, set: BTreeSet::new(), cleared: BTreeSet::new(), size }
        }

        fn change(&mut self, range: Range<u64>, value: bool) -> u64 {
            let (mut newly, end) = (0, range.end.min(wide(self.bits.len())));
            let mut start = range.start;
            while start < end {
                let page = start / BITS_PER_PAGE;
                let next = end.min((page + 1) * BITS_PER_PAGE);
                let piece = &mut self.bits[at(start)..at(next)];
                let new = if value { piece.count_zeros() } else { piece.count_ones() };
                piece.fill(value);
                if new > 0 {
                    let marks = if value { &mut self.set } else { &mut self.cleared };
                    marks.insert(u32::try_from(page).unwrap());
                }
                newly += wide(new);
                start = next;
            }
            newly
        }

        fn pages(&self) -> u32 {
            u32::try_from(self.bits.len().div_ceil(32_768)).unwrap()
        }

        fn page(&self, page: u32) -> [u8; PAGE_BYTES] {
            let mut bytes = [0; PAGE_BYTES];
            let words = self.bits.as_raw_slice().iter().skip(place(page) * 512).take(512);
            for (i, word) in words.enumerate() {
                bytes[i * 8..i * 8 + 8].copy_from_slice(&word.to_le_bytes());
            }
            bytes
        }

        fn unmark(&mut self, page: u32) {
            self.set.remove(&page);
            self.cleared.remove(&page);
        }

        fn resize(&mut self, size: u64, set_new: bool) {
            let (old_size, bits) = (self.size, size.div_ceil(8));
            self.change(bits..u64::MAX, false);
            self.bits.resize(at(bits), false);
            self.bits.set_uninitialized(false);
            let pages = self.pages();
            self.set.retain(|p| *p < pages);
            self.cleared.retain(|p| *p < pages);
            self.size = size;
            if set_new && size > old_size {
                self.change(old_size / 8..bits, true);
            }
        }
    }

    fn at(bit: u64) -> usize {
        usize::try_from(bit).unwrap()
    }

    fn wide(n: usize) -> u64 {
        u64::try_from(n).unwrap()
    }

    #[derive(Clone, Debug)]
    enum Op {
        Set(Range<u64>),
        Clear(Range<u64>),
        SetAll,
        ClearAll,
        OrWord(u64, u64),
        Load(u32, Vec<(u64, bool)>, u8),
        Take(u32),
        Failed(u32),
        MarkAll,
        Resize(u64, bool),
    }

    const MAX_BITS: u64 = 4 * BITS_PER_PAGE;

    fn bit() -> impl Strategy<Value = u64> {
        // Near borders of words and pages more often than elsewhere.
        prop_oneof![
            0..MAX_BITS,
            (0..MAX_BITS / 64 + 2, 0..3u64).prop_map(|(w, o)| (w * 64 + o).saturating_sub(1)),
            (0..6u64, 0..130u64).prop_map(|(p, o)| (p * BITS_PER_PAGE + o).saturating_sub(65)),
        ]
    }

    fn range() -> impl Strategy<Value = Range<u64>> {
        prop_oneof![
            (bit(), bit()).prop_map(|(a, b)| a..b),
            (bit(), 0..200u64).prop_map(|(a, n)| a..a + n),
            (bit(), Just(u64::MAX)).prop_map(|(a, b)| a..b),
            (0..4u64, 1..3u64).prop_map(|(p, n)| p * BITS_PER_PAGE..(p + n) * BITS_PER_PAGE),
        ]
    }

    fn sectors() -> impl Strategy<Value = u64> {
        (bit(), 0..8u64).prop_map(|(b, s)| (b * 8).saturating_sub(s))
    }

    fn op() -> impl Strategy<Value = Op> {
        let load = (0..6u32, prop::collection::vec((bit(), any::<bool>()), 0..40));
        let fill = prop_oneof![Just(0u8), Just(0xFF), any::<u8>()];
        prop_oneof![
            6 => range().prop_map(Op::Set),
            6 => range().prop_map(Op::Clear),
            1 => Just(Op::SetAll),
            1 => Just(Op::ClearAll),
            3 => (bit(), any::<u64>()).prop_map(|(b, w)| Op::OrWord(b / 64, w)),
            2 => (load, fill).prop_map(|((p, bits), f)| Op::Load(p, bits, f)),
            3 => (0..6u32).prop_map(Op::Take),
            1 => (0..6u32).prop_map(Op::Failed),
            1 => Just(Op::MarkAll),
            1 => (sectors(), any::<bool>()).prop_map(|(s, n)| Op::Resize(s, n)),
        ]
    }

    fn apply(op: Op, bitmap: &mut Bitmap, model: &mut Model) {
        match op {
            Op::Set(r) => assert_eq!(bitmap.set(r.clone()), model.change(r, true)),
            Op::Clear(r) => assert_eq!(bitmap.clear(r.clone()), model.change(r, false)),
            Op::SetAll => {
                bitmap.set_all();
                model.change(0..u64::MAX, true);
            }
            Op::ClearAll => {
                bitmap.clear_all();
                model.change(0..u64::MAX, false);
            }
            Op::OrWord(index, word) => {
                let ones = (0..64).filter(|b| word >> b & 1 == 1).map(|b| index * 64 + b);
                let newly: u64 = ones.map(|b| model.change(b..b + 1, true)).sum();
                assert_eq!(bitmap.or_word(index, word), newly);
            }
            Op::Load(page, bits, fill) => {
                let mut bytes = [fill; PAGE_BYTES];
                for (bit, value) in bits {
                    let bit = at(bit % BITS_PER_PAGE);
                    bytes[bit / 8] &= !(1 << (bit % 8));
                    bytes[bit / 8] |= u8::from(value) << (bit % 8);
                }
                bitmap.load_page(page, &bytes);
                let start = place(page) * 32_768;
                let end = model.bits.len().min(start + 32_768);
                if start < end {
                    let bytes = bytes.view_bits::<Lsb0>();
                    model.bits[start..end].clone_from_bitslice(&bytes[..end - start]);
                }
                model.unmark(page);
            }
            Op::Take(page) => {
                assert!(*bitmap.take_for_write(page) == model.page(page), "page {page}");
                model.unmark(page);
            }
            Op::Failed(page) => {
                bitmap.write_failed(page);
                if page < model.pages() {
                    model.set.insert(page);
                    model.cleared.insert(page);
                }
            }
            Op::MarkAll => {
                bitmap.mark_all_changed();
                model.set = (0..model.pages()).collect();
                model.cleared = model.set.clone();
            }
            Op::Resize(sectors, set_new) => {
                bitmap.resize(SectorCount(sectors), set_new);
                model.resize(sectors, set_new);
            }
        }
    }

    fn compare(bitmap: &Bitmap, model: &Model, probes: &[u64], ranges: &[Range<u64>]) {
        let bits = wide(model.bits.len());
        assert_eq!((bitmap.bits(), bitmap.pages()), (bits, model.pages()));
        assert_eq!(bitmap.count(), wide(model.bits.count_ones()));
        assert_eq!(bitmap.recount(), bitmap.count());
        for &from in probes {
            let rest = model.bits.get(at(from)..);
            let offset = |found: Option<usize>| found.map(|o| from + wide(o));
            let first_one = rest.and_then(|r| offset(r.first_one()));
            let first_zero = rest.and_then(|r| offset(r.first_zero()));
            assert_eq!(bitmap.next_set(from), first_one, "from {from}");
            assert_eq!(bitmap.next_clear(from), first_zero, "from {from}");
            assert_eq!(bitmap.is_set(from), model.bits.get(at(from)).is_some_and(|b| *b));
            let words = model.bits.as_raw_slice();
            assert_eq!(bitmap.word(from), words.get(at(from)).copied().unwrap_or(0));
        }
        for r in ranges {
            let end = r.end.min(bits);
            let count =
                if r.start < end { model.bits[at(r.start)..at(end)].count_ones() } else { 0 };
            assert_eq!(bitmap.count_in(r.clone()), wide(count), "{r:?}");
        }
        for page in 0..model.pages() + 1 {
            assert!(*bitmap.page_bytes(page) == model.page(page), "page {page}");
            let (set, cleared) = (model.set.contains(&page), model.cleared.contains(&page));
            assert_eq!(bitmap.was_set_since_write(page), set, "page {page}");
            assert_eq!(bitmap.is_changed(page), set || cleared, "page {page}");
            let next = model.set.union(&model.cleared).find(|p| **p >= page);
            assert_eq!(bitmap.next_changed(page), next.copied());
        }
        // Memory is there exactly for pages with both values.
        let mixed = model.bits.chunks(32_768).filter(|p| p.any() && p.not_all()).count();
        assert_eq!(bitmap.pages.iter().flatten().count(), mixed);
        assert_eq!(bitmap.mixed, mixed);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]
        #[test]
        fn does_what_a_plain_row_of_bits_does(
            size in sectors(),
            ops in prop::collection::vec(op(), 1..25),
            mut probes in prop::collection::vec(bit(), 8),
            ranges in prop::collection::vec(range(), 8),
        ) {
            let (mut bitmap, mut model) = (Bitmap::new(SectorCount(size)), Model::new(size));
            probes.extend(probes.clone().iter().map(|b| b / 64));
            for op in ops {
                apply(op, &mut bitmap, &mut model);
                compare(&bitmap, &model, &probes, &ranges);
            }
        }
    }

    #[test]
    fn the_last_64_bits_survive_an_attach() {
        // Defect 14.1: 64 MiB, all 16384 bits on disk, the reference keeps 16320.
        let mut bitmap = Bitmap::new(SectorCount(131_072));
        bitmap.load_page(0, &[0xFF; PAGE_BYTES]);
        assert_eq!((bitmap.bits(), bitmap.count()), (16_384, 16_384));
        assert!(bitmap.is_set(16_383) && !bitmap.is_set(16_384));
        assert_eq!(bitmap.next_changed(0), None);
    }

    #[test]
    fn bits_are_where_the_disk_has_them() {
        // Spec: metadata.md §4: bit n is bit n mod 8 of byte n div 8.
        let mut bitmap = Bitmap::new(SectorCount(SECTORS_PER_PAGE * 2));
        bitmap.set(32_768 + 12..32_768 + 13);
        let bytes = bitmap.page_bytes(1);
        assert_eq!(bytes[1], 1 << 4);
        assert_eq!(bytes.iter().map(|b| b.count_ones()).sum::<u32>(), 1);
    }

    #[test]
    fn growth_sets_the_block_that_was_not_whole() {
        let mut bitmap = Bitmap::new(SectorCount(12));
        bitmap.resize(SectorCount(16), true);
        assert_eq!(bitmap.word(0), 0b10);
        bitmap.resize(SectorCount(32), false);
        assert_eq!(bitmap.word(0), 0b10);
        bitmap.resize(SectorCount(40), true);
        assert_eq!(bitmap.word(0), 0b1_0010);
    }

    #[test]
    fn a_change_during_a_write_marks_the_page_again() {
        let mut bitmap = Bitmap::new(SectorCount(SECTORS_PER_PAGE));
        bitmap.set(0..1);
        let written = bitmap.take_for_write(0);
        assert!(!bitmap.is_changed(0));
        bitmap.clear(0..1);
        assert!(bitmap.is_changed(0) && !bitmap.was_set_since_write(0));
        assert_eq!(written[0], 1);
    }

    #[test]
    fn memory_is_for_what_is_partly_dirty() {
        let mut bitmap = Bitmap::new(SectorCount(16 << 40 >> 9));
        assert_eq!(bitmap.pages(), 131_072);
        let clean = bitmap.memory();
        assert!(clean < 1_200_000, "{clean}");
        bitmap.set_all();
        assert_eq!((bitmap.memory(), bitmap.count()), (clean, 1 << 32));
        assert_eq!(bitmap.next_clear(0), None);
        bitmap.clear(5..6);
        assert_eq!(bitmap.memory(), clean + 4104);
        assert_eq!((bitmap.next_clear(0), bitmap.next_clear(6)), (Some(5), None));
        assert_eq!(bitmap.or_word(0, !0), 1);
        assert_eq!(bitmap.memory(), clean);
    }

    #[test]
    fn no_size_and_no_place_is_out_of_bounds() {
        let mut bitmap = Bitmap::new(SectorCount(0));
        assert_eq!((bitmap.bits(), bitmap.pages(), bitmap.next_set(0)), (0, 0, None));
        bitmap.set_all();
        bitmap.mark_all_changed();
        assert_eq!((bitmap.count(), bitmap.next_changed(0)), (0, None));
        let bitmap = Bitmap::new(DATA_SECTORS_MAX);
        assert_eq!(bitmap.pages(), 1 << 23);
        for bit in [u64::MAX, 1 << 38, u64::MAX / 64] {
            assert!(!bitmap.is_set(bit) && bitmap.next_clear(bit).is_none());
            assert_eq!((bitmap.word(bit), bitmap.count_in(bit..u64::MAX)), (0, 0));
        }
    }
}
