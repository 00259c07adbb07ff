//! Which requests are possible.

use drbd_core::action::DeviceOffer;

use super::super::proto::{self, NbdError, RequestFlags, RequestHead, cmd};
use super::{Client, Kind};

/// What a request asks for, if it may.
pub(super) fn check(
    head: &RequestHead,
    offer: Option<&DeviceOffer>,
    client: &Client,
) -> Result<(Kind, bool), NbdError> {
    let offer = offer.ok_or(NbdError::Perm)?;
    let flags = RequestFlags::from_bits(head.flags.get()).ok_or(NbdError::Inval)?;
    let allowed = |more: RequestFlags| RequestFlags::FUA | more;
    let (kind, allowed) = match head.command.get() {
        cmd::READ => {
            let whole = !client.structured || flags.contains(RequestFlags::DF);
            let df = if client.structured { RequestFlags::DF } else { RequestFlags::empty() };
            (Kind::Read { whole }, allowed(df))
        }
        cmd::WRITE => (Kind::Write, allowed(RequestFlags::empty())),
        cmd::FLUSH => return Ok((Kind::Flush, false)),
        cmd::DISC => return Ok((Kind::Flush, false)),
        cmd::TRIM => (Kind::Trim, allowed(RequestFlags::empty())),
        cmd::CACHE => (Kind::Trim, allowed(RequestFlags::empty())),
        cmd::WRITE_ZEROES => {
            let keep = flags.contains(RequestFlags::NO_HOLE);
            let is_native = offer.max_write_zeroes > 0;
            if !is_native && flags.contains(RequestFlags::FAST_ZERO) {
                return Err(NbdError::NotSup);
            }
            let kind = if is_native { Kind::Zeroes { keep } } else { Kind::ZeroData };
            (kind, allowed(RequestFlags::NO_HOLE | RequestFlags::FAST_ZERO))
        }
        cmd::BLOCK_STATUS if client.contexts.is_empty() => return Err(NbdError::Inval),
        cmd::BLOCK_STATUS => {
            let one = flags.contains(RequestFlags::REQ_ONE);
            (Kind::Status { one }, allowed(RequestFlags::REQ_ONE))
        }
        _ => return Err(NbdError::Inval),
    };
    if !allowed.contains(flags) {
        return Err(NbdError::Inval);
    }
    let (start, len) = (head.offset.get(), u64::from(head.length.get()));
    if len == 0 || !start.is_multiple_of(512) || !len.is_multiple_of(512) {
        return Err(NbdError::Inval);
    }
    let size = offer.size.to_bytes().map_or(0, |bytes| bytes.0);
    if start.checked_add(len).is_none_or(|end| end > size) {
        let is_write = matches!(kind, Kind::Write | Kind::Zeroes { .. } | Kind::ZeroData);
        return Err(if is_write { NbdError::NoSpc } else { NbdError::Inval });
    }
    let is_data = matches!(kind, Kind::Read { .. } | Kind::Write);
    if is_data && head.length.get() > proto::LENGTH_MAX {
        return Err(NbdError::Inval);
    }
    if kind == Kind::Trim && offer.max_discard == 0 && head.command.get() == cmd::TRIM {
        return Err(NbdError::NotSup);
    }
    Ok((kind, flags.contains(RequestFlags::FUA)))
}
