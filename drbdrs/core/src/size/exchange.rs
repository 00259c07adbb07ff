//! P_SIZES: what the peer offers, and what becomes of it here. Spec: states-and-generations.md §5.4.

use alloc::format;

use drbd_types::{Cstate, Dstate, Fields, Role, SectorCount};
use drbd_wire::packet::Sizes;

use super::{Change, Lines, Peer, Quantities, Severity, new_size};
use crate::state::facts::has_disk;

/// P_SIZES flag: the resize was forced.
pub const FORCED: u16 = 1;
/// P_SIZES flag: the new storage counts as clean (`--assume-clean`).
pub const ASSUME_CLEAN: u16 = 2;

/// A P_SIZES and what it meets here.
#[derive(Clone, Copy, Debug)]
pub struct Received<'a> {
    /// The packet.
    pub packet: &'a Sizes,
    /// The volume's state.
    pub fields: &'a Fields,
    /// Own sizes. `p_size` is that of the last packet and not looked at.
    pub own: &'a Quantities,
}

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// With disk: this is the administrator's limit from now on; then the size is set with the
    /// flags of the packet, and failing that ends the connection.
    SetSize {
        /// Limit, in sectors; 0: none.
        u_size: SectorCount,
    },
    /// Without disk: the device takes this size. The bitmap of a disk that is still Negotiating
    /// must follow it.
    TakeSize(SectorCount),
    /// Without disk: nothing.
    Keep,
    /// The connection ends in StandAlone.
    Disconnect,
}

/// Result of [`received`]. Whatever the verdict, the peer's size is remembered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// What happens.
    pub verdict: Verdict,
    /// The peer's largest size, to be remembered.
    pub p_size: SectorCount,
    /// To be logged, before the verdict is carried out.
    pub lines: Lines,
}

/// Decides about a P_SIZES, up to the setting of the size. The volume has a disk if its state says
/// so: while it is Negotiating it has none.
pub fn received(r: &Received<'_>) -> Decision {
    let mut lines = Lines::new();
    let verdict =
        if has_disk(r.fields) { with_disk(r, &mut lines) } else { without_disk(r, &mut lines) };
    Decision { verdict, p_size: r.packet.d_size, lines }
}

fn with_disk(r: &Received<'_>, lines: &mut Lines) -> Verdict {
    let (packet, own, f) = (r.packet, r.own, r.fields);
    warn_if_different("lower level device sizes", packet.d_size, own.max, lines);
    warn_if_different("user requested size", packet.u_size, own.u_size, lines);
    let u_size = if f.conn == Cstate::WFReportParams {
        let wanted = [own.u_size, packet.u_size].into_iter().filter(|u| u.0 != 0);
        wanted.min().unwrap_or_default()
    } else {
        packet.u_size
    };
    let agreed = Quantities { u_size, p_size: packet.d_size, ..*own };
    let (size, said) = new_size(&agreed, Peer::Counts);
    lines.extend(said);
    let nobody_else_knows = f.conn < Cstate::Connected || f.pdsk == Dstate::Diskless;
    if size < own.current && f.disk >= Dstate::Outdated && nobody_else_knows {
        let current = own.current;
        let text = format!("The peer's disk size is too small! ({size} < {current} sectors)");
        lines.push((Severity::Error, text));
        return Verdict::Disconnect;
    }
    if u_size != own.u_size {
        let old = own.u_size;
        let text = format!("Peer sets u_size to {u_size} sectors (old: {old})");
        lines.push((Severity::Info, text));
    }
    Verdict::SetSize { u_size }
}

/// Without disk the peer's size is believed.
fn without_disk(r: &Received<'_>, lines: &mut Lines) -> Verdict {
    let (packet, current) = (r.packet, r.own.current);
    let said = [packet.c_size, packet.u_size, packet.d_size];
    let Some(size) = said.into_iter().find(|size| size.0 != 0) else { return Verdict::Keep };
    if size == current {
        return Verdict::Keep;
    }
    if current.0 != 0 && packet.d_size.0 == 0 {
        let text =
            format!("Ignored diskless peer device size (peer:{size} != me:{current} sectors)!");
        lines.push((Severity::Warn, text));
        return Verdict::Keep;
    }
    if size < current && r.fields.role == Role::Primary {
        let text = format!(
            "The peer's device size is too small! ({size} < {current} sectors); demote me first!"
        );
        lines.push((Severity::Error, text));
        return Verdict::Disconnect;
    }
    Verdict::TakeSize(size)
}

/// Both are known and differ by more than an eighth of one of them.
fn warn_if_different(what: &str, peer: SectorCount, own: SectorCount, lines: &mut Lines) {
    let difference = peer.0.abs_diff(own.0);
    let both_known = peer.0 != 0 && own.0 != 0;
    if both_known && (difference > peer.0 >> 3 || difference > own.0 >> 3) {
        let text = format!("Considerable difference in {what}: {peer}s vs. {own}s");
        lines.push((Severity::Warn, text));
    }
}

/// What becomes of storage that the device has won.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewStorage {
    /// There is none, or its time has not come.
    None,
    /// It counts as clean; [`NewStorage::SUPPRESSED`] is logged.
    Suppressed,
    /// It is resynced now.
    Resync,
    /// It is to be resynced as soon as both disks are there: `grow-resync-due` is set.
    Due,
}

impl NewStorage {
    /// The line about new storage that counts as clean.
    pub const SUPPRESSED: &'static str = "Resync of new storage suppressed with --assume-clean";
}

/// What the second half of processing does. Spec: §5.4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// A P_SIZES is sent (normal, with the flags of the packet).
    pub send_sizes: bool,
    /// What becomes of new storage. `resize-pending` is cleared, unless the volume is still in the
    /// handshake.
    pub new_storage: NewStorage,
}

/// Decides what follows after the size was set. `fields` and `current` are those of now;
/// `capacity_changed`: the backing device has another size than when last looked at;
/// `grown` is what setting the size because of this packet did.
pub fn answer(
    packet: &Sizes,
    fields: &Fields,
    current: SectorCount,
    capacity_changed: bool,
    resize_pending: bool,
    grown: Change,
) -> Answer {
    if fields.conn <= Cstate::WFReportParams {
        return Answer { send_sizes: false, new_storage: NewStorage::None };
    }
    let send_sizes = packet.c_size.0 == 0 || packet.c_size != current || capacity_changed;
    let grew = grown == Change::Grew && fields.conn == Cstate::Connected;
    let both_there = fields.pdsk >= Dstate::Inconsistent && fields.disk >= Dstate::Inconsistent;
    let new_storage = if !(resize_pending || grew) {
        NewStorage::None
    } else if !both_there {
        NewStorage::Due
    } else if packet.dds_flags & ASSUME_CLEAN != 0 {
        NewStorage::Suppressed
    } else {
        NewStorage::Resync
    };
    Answer { send_sizes, new_storage }
}

#[cfg(test)]
mod tests {
    use super::super::tests::quantities;
    use super::super::{Surroundings, set_size};
    use super::*;
    use crate::resync::chance::Chance;
    use Dstate::{Consistent, DUnknown, Diskless, Inconsistent, Negotiating, Outdated, UpToDate};
    use alloc::vec::Vec;
    use drbd_types::ByteLen;

    fn packet(d: u64, u: u64, c: u64) -> Sizes {
        Sizes {
            d_size: SectorCount(d),
            u_size: SectorCount(u),
            c_size: SectorCount(c),
            max_bio_size: ByteLen(1 << 20),
            queue_order_type: 0,
            dds_flags: 0,
            limits: None,
        }
    }

    const PARAMS: Fields = Fields { conn: Cstate::WFReportParams, disk: UpToDate, ..Fields::NEW };
    const UP: Fields =
        Fields { conn: Cstate::Connected, disk: UpToDate, pdsk: UpToDate, ..Fields::NEW };

    fn decide(
        fields: &Fields,
        own: &Quantities,
        packet: &Sizes,
    ) -> (Verdict, Vec<(Severity, alloc::string::String)>) {
        let decision = received(&Received { packet, fields, own });
        assert_eq!(decision.p_size, packet.d_size);
        (decision.verdict, decision.lines)
    }

    const fn set(u: u64) -> Verdict {
        Verdict::SetSize { u_size: SectorCount(u) }
    }

    #[test]
    #[rustfmt::skip]
    fn with_a_disk() {
        type Row = (&'static str, Fields, (u64, u64, u64, u64), (u64, u64, u64), Verdict, &'static [&'static str]);
        // own: max, la_size, u_size, current; packet: d, u, c
        let rows: &[Row] = &[
            ("equal", PARAMS, (1000, 1000, 0, 1000), (1000, 0, 1000), set(0), &[]),
            ("the peer is larger", PARAMS, (1000, 1000, 0, 1000), (1100, 0, 1000), set(0), &[]),
            ("much larger", PARAMS, (1000, 1000, 0, 1000), (1200, 0, 1000), set(0),
                &["Considerable difference in lower level device sizes: 1200s vs. 1000s"]),
            ("an eighth is not considerable", PARAMS, (1000, 1000, 0, 1000), (1125, 0, 1000), set(0), &[]),
            ("too small", PARAMS, (1000, 1000, 0, 1000), (900, 0, 900), Verdict::Disconnect,
                &["The peer's disk size is too small! (900 < 1000 sectors)"]),
            ("too small for a bad disk", Fields { disk: Inconsistent, ..PARAMS }, (1000, 1000, 0, 1000), (900, 0, 900), set(0), &[]),
            ("too small for an old disk", Fields { disk: Outdated, ..PARAMS }, (1000, 1000, 0, 1000), (900, 0, 900), Verdict::Disconnect,
                &["The peer's disk size is too small! (900 < 1000 sectors)"]),
            ("the peer attaches a smaller disk", Fields { pdsk: Diskless, ..UP }, (1000, 1000, 0, 1000), (900, 0, 1000), Verdict::Disconnect,
                &["The peer's disk size is too small! (900 < 1000 sectors)"]),
            ("online shrink by the peer", UP, (1000, 1000, 0, 1000), (1000, 900, 900), set(900),
                &["Peer sets u_size to 900 sectors (old: 0)"]),
            ("online growth by the peer takes the limit away", UP, (1000, 900, 900, 900), (1000, 0, 1000), set(0),
                &["Peer sets u_size to 0 sectors (old: 900)"]),
            ("handshake: the smaller limit, own", PARAMS, (1000, 900, 900, 900), (1000, 950, 900), set(900), &[]),
            ("handshake: the smaller limit, peer's", PARAMS, (1000, 900, 950, 900), (1000, 900, 900), set(900),
                &["Peer sets u_size to 900 sectors (old: 950)"]),
            ("handshake: only one limit", PARAMS, (1000, 900, 900, 900), (1000, 0, 900), set(900), &[]),
            ("different limits", PARAMS, (1000, 400, 400, 400), (1000, 800, 400), set(400),
                &["Considerable difference in user requested size: 800s vs. 400s"]),
            ("a diskless peer", PARAMS, (1000, 800, 0, 800), (0, 0, 800), set(0), &[]),
            ("an impossible limit", UP, (1000, 1000, 0, 1000), (1000, 2000, 1000), set(2000),
                &["Requested disk size is too big (1000 > 500)", "Peer sets u_size to 2000 sectors (old: 0)"]),
        ];
        for (what, f, own, p, verdict, said) in rows {
            let own = quantities(own.0, own.1, own.2, 0, own.3);
            let (got, lines) = decide(f, &own, &packet(p.0, p.1, p.2));
            let texts: Vec<&str> = lines.iter().map(|(_, text)| text.as_str()).collect();
            assert_eq!((got, texts.as_slice()), (*verdict, *said), "{what}");
        }
    }

    #[test]
    #[rustfmt::skip]
    fn without_a_disk() {
        let diskless = Fields { disk: Diskless, ..PARAMS };
        let primary = Fields { role: Role::Primary, ..diskless };
        let take = |n| Verdict::TakeSize(SectorCount(n));
        let rows = [
            ("current size", diskless, 0, (1000, 0, 900), take(900)),
            ("else the wish", diskless, 0, (1000, 800, 0), take(800)),
            ("else the disk", diskless, 0, (1000, 0, 0), take(1000)),
            ("nobody knows", diskless, 700, (0, 0, 0), Verdict::Keep),
            ("known", diskless, 900, (1000, 0, 900), Verdict::Keep),
            ("another diskless node", diskless, 900, (0, 0, 1000), Verdict::Keep),
            ("... but better than nothing", diskless, 0, (0, 0, 1000), take(1000)),
            ("smaller", diskless, 900, (1000, 0, 800), take(800)),
            ("smaller under a Primary", primary, 900, (1000, 0, 800), Verdict::Disconnect),
            ("larger under a Primary", primary, 900, (1000, 0, 1000), take(1000)),
            ("Negotiating has no disk", Fields { disk: Negotiating, ..primary }, 900, (1000, 0, 800), Verdict::Disconnect),
        ];
        for (what, f, current, p, verdict) in rows {
            let own = quantities(0, 0, 0, 0, current);
            let (got, lines) = decide(&f, &own, &packet(p.0, p.1, p.2));
            assert_eq!(got, verdict, "{what}");
            let silent = !matches!(what, "another diskless node") && verdict != Verdict::Disconnect;
            assert_eq!(lines.is_empty(), silent, "{what}");
        }
    }

    #[test]
    #[rustfmt::skip]
    fn what_follows() {
        use NewStorage::{Due, None, Resync, Suppressed};
        let source = Fields { conn: Cstate::SyncSource, pdsk: Inconsistent, ..UP };
        let alone = Fields { pdsk: Diskless, ..UP };
        let mine = SectorCount(1000);
        let (same, grew, zero) = (Change::Unchanged, Change::Grew, Change::GrewFromZero);
        // what, state, c_size, flags, capacity changed, resize pending, change, send, new storage
        let rows = [
            ("handshake", PARAMS, 0, 0, true, true, grew, false, None),
            ("nothing new", UP, 1000, 0, false, false, same, false, None),
            ("asked", UP, 0, 0, false, false, same, true, None),
            ("different", UP, 900, 0, false, false, same, true, None),
            ("a new device", UP, 1000, 0, true, false, same, true, None),
            ("the peer resized", UP, 0, 0, false, false, grew, true, Resync),
            ("the answer to the own resize", UP, 1000, 0, false, true, same, false, Resync),
            ("clean", UP, 1000, ASSUME_CLEAN, false, true, same, false, Suppressed),
            ("forced is not clean", UP, 1000, FORCED, false, true, same, false, Resync),
            ("the peer has no disk", alone, 1000, 0, false, true, same, false, Due),
            ("grown in a resync", source, 1000, 0, false, false, grew, false, None),
            ("a first size is no growth", UP, 1000, 0, false, false, zero, false, None),
        ];
        for (what, f, c, flags, capacity, pending, change, send_sizes, new_storage) in rows {
            let packet = Sizes { dds_flags: flags, ..packet(1000, 0, c) };
            let got = answer(&packet, &f, mine, capacity, pending, change);
            assert_eq!(got, Answer { send_sizes, new_storage }, "{what}");
        }
    }

    /// A recorded online growth from 8 to 9 MiB, and on to 10 MiB with --assume-clean: the one node
    /// resizes and asks, the other one follows and answers, both begin the resync of the new part.
    #[test]
    fn recorded_growth() {
        let steps = [
            (16_384, 18_432, 0, NewStorage::Resync),
            (18_432, 20_480, ASSUME_CLEAN, NewStorage::Suppressed),
        ];
        for (before, after, dds_flags, new_storage) in steps {
            let request = Sizes { dds_flags, ..packet(32_688, after, 0) };
            let own = quantities(32_688, before, before, 0, before);
            let said = alloc::format!("Peer sets u_size to {after} sectors (old: {before})");
            let (verdict, lines) = decide(&UP, &own, &request);
            assert_eq!((verdict, lines), (set(after), Lines::from([(Severity::Info, said)])));
            let q = Quantities { u_size: SectorCount(after), p_size: request.d_size, ..own };
            let how = Surroundings {
                peer: Peer::Counts,
                new_al: false,
                md_moved: false,
                bitmap: SectorCount(before),
            };
            let plan = set_size(&q, &how).0.unwrap();
            assert_eq!((plan.size, plan.change), (SectorCount(after), Change::Grew));
            let got = answer(&request, &UP, plan.size, false, false, plan.change);
            assert_eq!(got, Answer { send_sizes: true, new_storage });
            // Back at the node that began.
            let reply = Sizes { c_size: plan.size, ..request };
            let own = quantities(32_688, after, after, 32_688, after);
            assert_eq!(decide(&UP, &own, &reply), (set(after), Lines::new()));
            let got = answer(&reply, &UP, plan.size, false, true, Change::Unchanged);
            assert_eq!(got, Answer { send_sizes: false, new_storage }, "it ends here");
        }
    }

    /// A good disk never shrinks because of a connection that is being made, and two nodes that
    /// accept each other in the handshake agree about the size.
    #[test]
    fn two_nodes_agree() {
        let mut chance = Chance::new(5);
        let mut agreed = 0;
        for _ in 0..50_000 {
            let mut node = || {
                let max = 1 + chance.below(20) * 100;
                let la = if chance.percent(20) { 0 } else { (1 + chance.below(20) * 100).min(max) };
                let u = if chance.percent(50) { 0 } else { 1 + chance.below(20) * 100 };
                let q = quantities(max, la, u, 0, la);
                let disk = chance.of(&[Inconsistent, Outdated, Consistent, UpToDate]);
                (q, Fields { disk, pdsk: DUnknown, ..PARAMS })
            };
            let (a, b) = (node(), node());
            let result = |own: &(Quantities, Fields), other: &(Quantities, Fields)| {
                let p = packet(other.0.max.0, other.0.u_size.0, other.0.current.0);
                match decide(&own.1, &own.0, &p).0 {
                    Verdict::SetSize { u_size } => {
                        let q = Quantities { u_size, p_size: p.d_size, ..own.0 };
                        Some(new_size(&q, Peer::Counts).0)
                    }
                    Verdict::TakeSize(_) | Verdict::Keep | Verdict::Disconnect => None,
                }
            };
            let (size_a, size_b) = (result(&a, &b), result(&b, &a));
            for (node, size) in [(&a, size_a), (&b, size_b)] {
                if let Some(size) = size
                    && node.1.disk >= Outdated
                {
                    assert!(size >= node.0.current, "{a:?}\n{b:?}");
                }
            }
            if let (Some(size_a), Some(size_b)) = (size_a, size_b) {
                assert_eq!(size_a, size_b, "{a:?}\n{b:?}");
                agreed += 1;
            }
        }
        assert!(agreed > 1000);
    }
}
