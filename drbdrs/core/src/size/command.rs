//! Sizes in commands: what resize and attach refuse. Spec: states-and-generations.md §5.5, §5.7;
//! metadata.md §6, rows 12 to 17.

use alloc::format;
use alloc::string::String;

use drbd_types::{Cstate, Dstate, Failure, Fields, Role, SectorCount};
use drbdmeta::layout::{AL_BLOCKS_MAX, AL_BLOCKS_MIN, AlGeometry, Placement};

use super::{Lines, Peer, Quantities, Severity, new_size};

/// What the resize command asks for besides the size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resize {
    /// `--assume-peer-has-space`.
    pub forced: bool,
    /// `--assume-clean`.
    pub no_resync: bool,
    /// Another shape of the activity log.
    pub al: Option<AlGeometry>,
}

/// May this resize begin? `version` is the agreed protocol version, or that of the last
/// connection.
///
/// # Errors
/// The first check of §5.5 that fails.
pub fn check_resize(fields: &Fields, version: u32, resize: &Resize) -> Result<(), Failure> {
    let refuse_if = |condition, failure| if condition { Err(failure) } else { Ok(()) };
    let nobody = fields.role == Role::Secondary && fields.peer == Role::Secondary;
    refuse_if(fields.disk < Dstate::Inconsistent, Failure::NoDisk)?;
    refuse_if(fields.conn > Cstate::Connected, Failure::ResizeDuringResync)?;
    refuse_if(nobody, Failure::NeedPrimaryToResize)?;
    refuse_if(resize.no_resync && version < 93, Failure::AssumeCleanProtocol)?;
    let Some(al) = resize.al else { return Ok(()) };
    refuse_if(al.blocks() > AL_BLOCKS_MAX, Failure::AlTooBig)?;
    refuse_if(al.blocks() < AL_BLOCKS_MIN, Failure::AlTooSmall)?;
    let alone = fields.conn != Cstate::Connected && !resize.forced;
    refuse_if(alone, Failure::LayoutNotConnected)
}

/// A disk that is about to be attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attach {
    /// Its sizes; `u_size` is the one of the new configuration, `current` that of the device (a
    /// Primary without disk has one).
    pub sizes: Quantities,
    /// Where the meta-data is.
    pub placement: Placement,
    /// Capacity of the device that carries the meta-data.
    pub md_device: SectorCount,
    /// The superblock says that the data is consistent.
    pub is_consistent: bool,
}

/// A refused attach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Why.
    pub failure: Failure,
    /// More lines for the user.
    pub info: Option<String>,
    /// For the log.
    pub lines: Lines,
}

/// May the disk be attached, as far as sizes are concerned? Returns what is to be logged.
///
/// # Errors
/// The disk, or the meta-data device, is too small, or consistent data would be cut off.
pub fn check_attach(a: &Attach) -> Result<Lines, Refused> {
    let refused = |failure, lines| Err(Refused { failure, info: None, lines });
    let error = |text: String| Lines::from([(Severity::Error, text)]);
    let Quantities { max, u_size, la_size, current, .. } = a.sizes;
    if max < u_size {
        let text = format!("max capacity {max} smaller than disk size {u_size}");
        return refused(Failure::DiskTooSmall, error(text));
    }
    let needed = md_device_min(a.placement);
    if a.md_device < needed {
        let text = format!(
            "refusing attach: md-device too small, at least {needed} sectors needed for this \
             meta-disk type"
        );
        return refused(Failure::MetaTooSmall, error(text));
    }
    if max < current {
        return refused(Failure::DiskTooSmall, Lines::new());
    }
    let (size, mut lines) = new_size(&a.sizes, Peer::Counts);
    if !a.is_consistent || size >= la_size {
        return Ok(lines);
    }
    if size == u_size {
        let text = format!("truncating a consistent device during attach ({size} < {la_size})");
        lines.push((Severity::Warn, text));
        return Ok(lines);
    }
    let text = format!("refusing to truncate a consistent device ({size} < {la_size})");
    lines.push((Severity::Error, text));
    let info = format!(
        "To-be-attached device has last effective > current size, and is consistent\n\
         ({la_size} > {size} sectors). Refusing to attach."
    );
    Err(Refused { failure: Failure::ImplicitShrink, info: Some(info), lines })
}

/// The smallest device for meta-data that is attached.
fn md_device_min(placement: Placement) -> SectorCount {
    match placement {
        Placement::Internal | Placement::FlexExternal => SectorCount(2048),
        Placement::Indexed(n) => SectorCount(262_144 * (u64::from(n) + 1)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::quantities;
    use super::*;

    const UP: Fields = Fields {
        role: Role::Primary,
        peer: Role::Secondary,
        conn: Cstate::Connected,
        disk: Dstate::UpToDate,
        pdsk: Dstate::UpToDate,
        ..Fields::NEW
    };

    #[test]
    #[rustfmt::skip]
    fn resize() {
        let plain = Resize { forced: false, no_resync: false, al: None };
        let al = |stripes, stripe_blocks| Resize { al: Some(AlGeometry { stripes, stripe_blocks }), ..plain };
        let alone = Fields { conn: Cstate::WFConnection, peer: Role::Unknown, ..UP };
        let secondary = Fields { role: Role::Secondary, ..UP };
        let rows = [
            ("fine", UP, 101, plain, None),
            ("no disk", Fields { disk: Dstate::Diskless, ..UP }, 101, plain, Some(138)),
            ("an Inconsistent disk is one", Fields { disk: Dstate::Inconsistent, ..UP }, 101, plain, None),
            ("a Negotiating one is not yet", Fields { disk: Dstate::Negotiating, ..UP }, 101, plain, Some(138)),
            ("resync", Fields { conn: Cstate::SyncSource, ..UP }, 101, plain, Some(130)),
            ("verify", Fields { conn: Cstate::VerifyT, ..UP }, 101, plain, Some(130)),
            ("nobody Primary", secondary, 101, plain, Some(131)),
            ("the peer is Primary", Fields { peer: Role::Primary, ..secondary }, 101, plain, None),
            ("the peer is unknown", Fields { role: Role::Secondary, ..alone }, 101, plain, None),
            ("old peer", UP, 92, Resize { no_resync: true, ..plain }, Some(153)),
            ("clean", UP, 93, Resize { no_resync: true, ..plain }, None),
            ("16 GiB", UP, 101, al(1, 4_194_304), None),
            ("too long", UP, 101, al(2, 2_097_153), Some(167)),
            ("far too long", UP, 101, al(u32::MAX, u32::MAX), Some(167)),
            ("too short", UP, 101, al(1, 7), Some(168)),
            ("none", UP, 101, al(0, 8), Some(168)),
            ("alone", alone, 101, al(1, 8), Some(166)),
            ("alone, forced", alone, 101, Resize { forced: true, ..al(1, 8) }, None),
            ("alone without a new activity log", alone, 101, plain, None),
        ];
        for (what, fields, version, resize, number) in rows {
            let got = check_resize(&fields, version, &resize).err().map(Failure::number);
            assert_eq!(got, number, "{what}");
        }
    }

    fn attach(max: u64, la: u64, u: u64, current: u64) -> Attach {
        Attach {
            sizes: quantities(max, la, u, 0, current),
            placement: Placement::Internal,
            md_device: SectorCount(2048),
            is_consistent: true,
        }
    }

    #[test]
    #[rustfmt::skip]
    fn attaching() {
        type Row = (&'static str, Attach, Result<&'static [&'static str], (i32, &'static [&'static str])>);
        let rows: &[Row] = &[
            ("fine", attach(4016, 4016, 0, 0), Ok(&[])),
            ("new", attach(4016, 0, 0, 0), Ok(&[])),
            ("grown meanwhile", attach(5000, 4016, 0, 0), Ok(&[])),
            ("configured too large", attach(4016, 0, 4017, 0), Err((111, &["max capacity 4016 smaller than disk size 4017"]))),
            ("in use", attach(4016, 4016, 0, 4024), Err((111, &[]))),
            ("small meta-data device", Attach { md_device: SectorCount(2047), ..attach(4016, 0, 0, 0) },
                Err((112, &["refusing attach: md-device too small, at least 2048 sectors needed for this meta-disk type"]))),
            ("slot beyond the end", Attach { md_device: SectorCount(524_287), placement: Placement::Indexed(1), ..attach(4016, 0, 0, 0) },
                Err((112, &["refusing attach: md-device too small, at least 524288 sectors needed for this meta-disk type"]))),
            ("slot that fits", Attach { md_device: SectorCount(524_288), placement: Placement::Indexed(1), ..attach(4016, 0, 0, 0) }, Ok(&[])),
            ("would cut", attach(4008, 4016, 0, 0), Err((170, &["refusing to truncate a consistent device (4008 < 4016)"]))),
            ("would cut, smaller wish", attach(4008, 4016, 4000, 0), Ok(&["truncating a consistent device during attach (4000 < 4016)"])),
            ("would cut bad data", Attach { is_consistent: false, ..attach(4008, 4016, 0, 0) }, Ok(&[])),
        ];
        for (what, a, expected) in rows {
            let texts = |lines: &Lines| lines.iter().map(|l| l.1.clone()).collect::<alloc::vec::Vec<_>>();
            match (check_attach(a), expected) {
                (Ok(lines), Ok(said)) => assert_eq!(texts(&lines), *said, "{what}"),
                (Err(refused), Err((number, said))) => {
                    assert_eq!(refused.failure.number(), *number, "{what}");
                    assert_eq!(texts(&refused.lines), *said, "{what}");
                    assert_eq!(refused.info.is_some(), *number == 170, "{what}");
                }
                (got, _) => panic!("{what}: {got:?}"),
            }
        }
        let refused = check_attach(&attach(4008, 4016, 0, 0)).unwrap_err();
        assert_eq!(refused.info.unwrap(), "To-be-attached device has last effective > current size, and is consistent\n(4016 > 4008 sectors). Refusing to attach.");
    }
}
