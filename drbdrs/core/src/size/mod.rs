//! How large the device is: what both disks can offer, what the administrators want, and what was
//! agreed before.
//!
//! All functions are pure: they return what is to be done and said. Sizes are sectors everywhere.
//! Spec: states-and-generations.md §5; io-path-and-resync.md §13.1, §13.3.

mod command;
mod exchange;
mod request;

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use drbd_types::{Failure, HumanKib, SectorCount};
use drbdmeta::layout::{DATA_SECTORS_MAX, Layout, Placement};

pub use crate::generation::decide::Severity;
pub use command::{Attach, Refused, Resize, check_attach, check_resize};
pub use exchange::{
    ASSUME_CLEAN, Answer, Decision, FORCED, NewStorage, Received, Verdict, answer, received,
};
pub use request::{
    PEER_LIMIT_MIN, REQUEST_MAX, max_request, max_request_of_device, max_request_to_send,
};

/// Lines for the volume's log, in this order.
pub type Lines = Vec<(Severity, String)>;

/// What a size follows from, in sectors. Spec: §5.1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quantities {
    /// The largest size that this node can offer; 0 without disk. See [`max_size`].
    pub max: SectorCount,
    /// Last agreed size, as stored in the superblock; 0: never.
    pub la_size: SectorCount,
    /// Limit set by the administrator; 0: none.
    pub u_size: SectorCount,
    /// The peer's largest size by its last P_SIZES; 0: unknown, or the peer has no disk.
    pub p_size: SectorCount,
    /// Size of the device now.
    pub current: SectorCount,
}

/// May a resize that nobody can agree to go on without the peer?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// It counts.
    Counts,
    /// Not connected, and the administrator says that the peer has the space
    /// (`--assume-peer-has-space`).
    AssumedToHaveSpace,
}

/// The largest size that a disk can offer ("max"), with what is to be said about a disk that is
/// larger than the format allows. `backing` is the capacity of the backing device. The supported
/// limit is 2^41 sectors. Spec: §5.1, metadata.md §6.
pub fn max_size(
    placement: Placement,
    layout: &Layout,
    backing: SectorCount,
) -> (SectorCount, Lines) {
    let (available, limit) = match placement {
        Placement::Internal if backing.0 == 0 => (SectorCount(0), DATA_SECTORS_MAX),
        Placement::Internal => (layout.usable().min(backing), DATA_SECTORS_MAX),
        Placement::FlexExternal | Placement::Indexed(_) => {
            (backing, layout.usable().min(DATA_SECTORS_MAX))
        }
    };
    let mut lines = Lines::new();
    if available > limit {
        lines.push((
            Severity::Warn,
            format!(
                "==> truncating very big lower level device to currently maximum possible {limit} \
                 sectors <=="
            ),
        ));
        if matches!(placement, Placement::Indexed(_)) {
            let text = "==>> using internal or flexible meta data may help <<==";
            lines.push((Severity::Warn, text.into()));
        }
    }
    (available.min(limit), lines)
}

/// The size that the device should have. Spec: §5.2.
pub fn new_size(q: &Quantities, peer: Peer) -> (SectorCount, Lines) {
    let mut lines = Lines::new();
    let Quantities { max, la_size, u_size, mut p_size, .. } = *q;
    if peer == Peer::AssumedToHaveSpace {
        let text = "Resize while not connected was forced by the user!";
        lines.push((Severity::Warn, text.into()));
        p_size = max;
    }
    let known = |size: SectorCount| (size.0 != 0).then_some(size);
    let size = match (known(max), known(p_size), known(la_size)) {
        (Some(max), Some(p_size), _) => max.min(p_size),
        (Some(limit), None, Some(la_size)) | (None, Some(limit), Some(la_size)) => {
            la_size.min(limit)
        }
        (Some(size), None, None) | (None, Some(size), None) | (None, None, Some(size)) => size,
        (None, None, None) => SectorCount(0),
    };
    if size.0 == 0 {
        lines.push((Severity::Error, "Both nodes diskless!".into()));
    }
    match known(u_size) {
        Some(u_size) if u_size > size => {
            let (wanted, possible) = (u_size.0 / 2, size.0 / 2);
            let text = format!("Requested disk size is too big ({wanted} > {possible})");
            lines.push((Severity::Error, text));
            (size, lines)
        }
        Some(u_size) => (u_size, lines),
        None => (size, lines),
    }
}

/// The line about a new size. Spec: §5.3 step 4.
pub fn size_line(size: SectorCount) -> String {
    let kib = size.0 / 2;
    format!("size = {} ({kib} KB)", HumanKib(kib))
}

/// What else decides about setting the size. Spec: §5.3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Surroundings {
    /// See [`Peer`].
    pub peer: Peer,
    /// Another shape of the activity log is asked for.
    pub new_al: bool,
    /// The meta-data is or gets another place or length.
    pub md_moved: bool,
    /// Size that the bitmap in memory is made for.
    pub bitmap: SectorCount,
}

/// How the size changed, measured by what was agreed before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Not at all.
    Unchanged,
    /// It became larger.
    Grew,
    /// There was none before.
    GrewFromZero,
    /// It became smaller.
    Shrunk,
}

/// Why the whole bitmap is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rewrite {
    /// The changed parts of it.
    SizeChanged,
    /// All of it.
    Moved,
    /// All of it.
    SizeChangedAndMoved,
}

impl Rewrite {
    /// The line about it.
    pub const fn text(self) -> &'static str {
        match self {
            Self::SizeChanged => "Writing the whole bitmap, size changed",
            Self::Moved => "Writing the whole bitmap, md moved",
            Self::SizeChangedAndMoved => "Writing the whole bitmap, size changed and md moved",
        }
    }

    /// All pages, not only those that changed.
    pub const fn is_whole(self) -> bool {
        match self {
            Self::SizeChanged => false,
            Self::Moved | Self::SizeChangedAndMoved => true,
        }
    }
}

/// What setting the size has to do. Spec: §5.3 steps 4 to 6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The size.
    pub size: SectorCount,
    /// Bitmap and device are to be given this size; then [`size_line`] is logged. New bits are set
    /// unless the new storage counts as clean.
    pub resize: bool,
    /// Superblock, activity log and bitmap are to be written anew.
    pub rewrite: Option<Rewrite>,
    /// How the size changes.
    pub change: Change,
}

/// Decides about a new size of a device with disk, steps 2 to 6. `q.max` is that of the place
/// that the meta-data will have. The lines come in any case.
///
/// # Errors
/// [`Failure::ImplicitShrink`] or [`Failure::MetaSpace`]; everything stays as it was.
/// Spec: §5.3.
pub fn set_size(q: &Quantities, s: &Surroundings) -> (Result<Plan, Failure>, Lines) {
    let (size, mut lines) = new_size(q, s.peer);
    if size < q.la_size {
        if s.new_al && q.u_size.0 == 0 {
            let text =
                format!("Implicit shrink not allowed. Use --size={size}s for explicit shrink.");
            lines.push((Severity::Warn, text));
            return (Err(Failure::ImplicitShrink), lines);
        }
        if q.u_size > size {
            return (Err(Failure::MetaSpace), lines);
        }
    }
    let moved = s.md_moved || s.new_al;
    let plan = Plan {
        size,
        resize: size != q.current || size != s.bitmap,
        rewrite: match (size != q.la_size, moved) {
            (true, true) => Some(Rewrite::SizeChangedAndMoved),
            (true, false) => Some(Rewrite::SizeChanged),
            (false, true) => Some(Rewrite::Moved),
            (false, false) => None,
        },
        change: change(q.la_size, size),
    };
    (Ok(plan), lines)
}

fn change(before: SectorCount, after: SectorCount) -> Change {
    match after.cmp(&before) {
        core::cmp::Ordering::Less => Change::Shrunk,
        core::cmp::Ordering::Equal => Change::Unchanged,
        core::cmp::Ordering::Greater if before.0 == 0 => Change::GrewFromZero,
        core::cmp::Ordering::Greater => Change::Grew,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resync::chance::Chance;
    use drbd_types::ByteLen;
    use drbdmeta::layout::AlGeometry;

    pub(super) fn quantities(max: u64, la: u64, u: u64, p: u64, current: u64) -> Quantities {
        Quantities {
            max: SectorCount(max),
            la_size: SectorCount(la),
            u_size: SectorCount(u),
            p_size: SectorCount(p),
            current: SectorCount(current),
        }
    }

    fn texts(lines: &Lines) -> Vec<&str> {
        lines.iter().map(|(_, text)| text.as_str()).collect()
    }

    /// Spec: metadata.md §1: what fits on devices with meta-data.
    #[test]
    fn what_a_disk_can_offer() {
        let al = AlGeometry::default();
        let max = |placement, meta: u64, backing: u64| {
            let layout = Layout::expected(placement, ByteLen(meta), al).unwrap();
            max_size(placement, &layout, SectorCount(backing))
        };
        let (internal, flex) = (Placement::Internal, Placement::FlexExternal);
        let rows = [
            (internal, 64 << 20, 131_072, 130_992),
            (internal, 134_218_240, 262_145, 262_056),
            (internal, 1 << 20, 0, 0),
            (flex, 1 << 20, 131_072, 131_072),
            (Placement::Indexed(1), 256 << 20, 8_587_575_296, 8_587_575_296),
            (flex, 1 << 20, 0, 0),
        ];
        for (placement, meta, backing, expected) in rows {
            let (size, lines) = max(placement, meta, backing);
            assert_eq!((size.0, lines.len()), (expected, 0), "{placement:?} {meta} {backing}");
        }
        let (size, lines) = max(flex, 1 << 20, 70_000_000);
        assert_eq!(size.0, 64_749_568);
        assert_eq!(
            texts(&lines),
            [
                "==> truncating very big lower level device to currently maximum possible 64749568 sectors <=="
            ]
        );
        let (size, lines) = max(Placement::Indexed(0), 128 << 20, 1 << 34);
        assert_eq!((size.0, lines.len()), (8_587_575_296, 2));
    }

    #[test]
    #[rustfmt::skip]
    fn sizes() {
        // what, max, la, u, p, result, lines
        type Row = (&'static str, u64, u64, u64, u64, u64, &'static [&'static str]);
        let rows: &[Row] = &[
            ("both: the smaller", 1000, 0, 0, 800, 800, &[]),
            ("both: what was agreed does not matter", 1000, 500, 0, 1200, 1000, &[]),
            ("alone: what was agreed", 1000, 500, 0, 0, 500, &[]),
            ("alone, shrunk disk", 400, 500, 0, 0, 400, &[]),
            ("alone, new", 1000, 0, 0, 0, 1000, &[]),
            ("diskless: the peer's", 0, 0, 0, 800, 800, &[]),
            ("diskless with memory", 0, 500, 0, 800, 500, &[]),
            ("diskless, the peer is smaller", 0, 500, 0, 300, 300, &[]),
            ("only memory", 0, 500, 0, 0, 500, &[]),
            ("nothing", 0, 0, 0, 0, 0, &["Both nodes diskless!"]),
            ("wanted", 1000, 500, 200, 0, 200, &[]),
            ("wanted, exactly", 1000, 500, 500, 0, 500, &[]),
            ("wanted too much", 1000, 500, 600, 0, 500, &["Requested disk size is too big (300 > 250)"]),
            ("wanted from nobody", 0, 0, 8, 0, 0, &["Both nodes diskless!", "Requested disk size is too big (4 > 0)"]),
        ];
        for (what, max, la, u, p, expected, said) in rows {
            let (size, lines) = new_size(&quantities(*max, *la, *u, *p, 0), Peer::Counts);
            assert_eq!((size.0, texts(&lines).as_slice()), (*expected, *said), "{what}");
        }
        let q = quantities(1000, 500, 0, 0, 500);
        let (size, lines) = new_size(&q, Peer::AssumedToHaveSpace);
        assert_eq!(size.0, 1000);
        assert_eq!(texts(&lines), ["Resize while not connected was forced by the user!"]);
    }

    #[test]
    fn no_size_is_larger_than_a_disk() {
        let mut chance = Chance::new(3);
        for _ in 0..100_000 {
            let mut any = || if chance.percent(30) { 0 } else { chance.any() >> 13 };
            let q = quantities(any(), any(), any(), any(), any());
            let peer = chance.of(&[Peer::Counts, Peer::AssumedToHaveSpace]);
            let (size, lines) = new_size(&q, peer);
            for limit in [q.max, if peer == Peer::Counts { q.p_size } else { q.max }] {
                assert!(limit.0 == 0 || size <= limit, "{q:?} {peer:?} {size:?}");
            }
            let refused = lines.iter().any(|(_, text)| text.starts_with("Requested"));
            if q.u_size.0 != 0 {
                assert_eq!(refused, size != q.u_size, "{q:?} {peer:?}");
            }
            let nothing =
                q.max.0 == 0 && q.la_size.0 == 0 && (q.p_size.0 == 0 || peer != Peer::Counts);
            assert_eq!(size.0 == 0, nothing, "{q:?} {peer:?}");
        }
    }

    /// From the reference's log.
    #[test]
    fn size_lines() {
        let rows = [
            (65_456, "size = 32 MB (32728 KB)"),
            (98_224, "size = 48 MB (49112 KB)"),
            (130_992, "size = 64 MB (65496 KB)"),
            (16, "size = 8 KB (8 KB)"),
            (19_999, "size = 9999 KB (9999 KB)"),
        ];
        for (sectors, text) in rows {
            assert_eq!(size_line(SectorCount(sectors)), text);
        }
    }

    const KEEP: Surroundings = Surroundings {
        peer: Peer::Counts,
        new_al: false,
        md_moved: false,
        bitmap: SectorCount(500),
    };

    fn rows_of(q: &Quantities, s: &Surroundings) -> (u64, bool, Option<Rewrite>, Change) {
        let plan = set_size(q, s).0.unwrap();
        (plan.size.0, plan.resize, plan.rewrite, plan.change)
    }

    #[test]
    fn setting_a_size() {
        let same = quantities(1000, 500, 0, 0, 500);
        assert_eq!(rows_of(&same, &KEEP), (500, false, None, Change::Unchanged));
        let moved = Surroundings { md_moved: true, ..KEEP };
        let expected = (500, false, Some(Rewrite::Moved), Change::Unchanged);
        assert_eq!(rows_of(&same, &moved), expected);
        let grows = quantities(1000, 500, 0, 800, 500);
        let expected = (800, true, Some(Rewrite::SizeChanged), Change::Grew);
        assert_eq!(rows_of(&grows, &KEEP), expected);
        let expected = (800, true, Some(Rewrite::SizeChangedAndMoved), Change::Grew);
        assert_eq!(rows_of(&grows, &moved), expected);
        let new = quantities(1000, 0, 0, 0, 0);
        let none = Surroundings { bitmap: SectorCount(0), ..KEEP };
        let expected = (1000, true, Some(Rewrite::SizeChanged), Change::GrewFromZero);
        assert_eq!(rows_of(&new, &none), expected);
        let shrinks = quantities(1000, 500, 200, 800, 500);
        let expected = (200, true, Some(Rewrite::SizeChanged), Change::Shrunk);
        assert_eq!(rows_of(&shrinks, &KEEP), expected);
        // Attach: the agreed size is known, the bitmap is not there yet.
        let attach = quantities(1000, 500, 0, 0, 0);
        assert_eq!(rows_of(&attach, &none), (500, true, None, Change::Unchanged));
        let texts = [Rewrite::SizeChanged, Rewrite::Moved, Rewrite::SizeChangedAndMoved];
        assert_eq!(texts.map(Rewrite::is_whole), [false, true, true]);
        assert!(texts.iter().all(|r| r.text().starts_with("Writing the whole bitmap, ")));
    }

    #[test]
    fn setting_a_size_that_does_not_fit() {
        // A longer activity log takes space from the data. Spec: metadata.md §9.3.
        let q = quantities(368_104, 368_200, 0, 400_000, 368_200);
        let new_al = Surroundings { new_al: true, ..KEEP };
        let (refused, lines) = set_size(&q, &new_al);
        assert_eq!(refused, Err(Failure::ImplicitShrink));
        assert_eq!(
            texts(&lines),
            ["Implicit shrink not allowed. Use --size=368104s for explicit shrink."]
        );
        let explicit = Quantities { u_size: SectorCount(368_104), ..q };
        assert_eq!(set_size(&explicit, &new_al).0.map(|plan| plan.change), Ok(Change::Shrunk));
        let too_much = Quantities { u_size: SectorCount(368_200), ..q };
        let (refused, lines) = set_size(&too_much, &new_al);
        assert_eq!((refused, lines.len()), (Err(Failure::MetaSpace), 1));
        // Without a new activity log only a configured size refuses.
        assert_eq!(set_size(&q, &KEEP).0.map(|plan| plan.change), Ok(Change::Shrunk));
        assert_eq!(set_size(&too_much, &KEEP).0, Err(Failure::MetaSpace));
    }
}
