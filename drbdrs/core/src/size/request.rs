//! How large one request may be. Spec: io-path-and-resync.md §13.1, wire-protocol.md §14.1.

use drbd_types::ByteLen;

/// The largest request of all: 1 MiB.
pub const REQUEST_MAX: ByteLen = ByteLen(1 << 20);
/// What every peer can take; assumed of a peer that was never seen.
pub const PEER_LIMIT_MIN: ByteLen = ByteLen(4096);

/// Largest data request of a protocol version. What a block's header can express is 32 KiB up to
/// version 94.
pub const fn max_request(version: u32) -> ByteLen {
    match version {
        0..=94 => ByteLen(32 << 10),
        95..=99 => ByteLen(128 << 10),
        _ => REQUEST_MAX,
    }
}

/// The peer's limit, from the field of its P_SIZES. Only up to version 93 the field counts: later
/// peers split what their disk can not take. To be stored in the meta-data.
pub fn max_request_to_send(version: u32, field: ByteLen) -> ByteLen {
    let limit = max_request(version);
    if version < 94 { limit.min(field).max(PEER_LIMIT_MIN) } else { limit }
}

/// Largest request of the device. `own` is the limit of the own disk, `None` without disk;
/// `peer` is that of [`max_request_to_send`], or while not connected the stored one (0 is never
/// stored by us, but found). `before` is the device's limit now: under a Primary
/// (`is_primary`) it does not shrink.
pub fn max_request_of_device(
    own: Option<ByteLen>,
    peer: ByteLen,
    before: ByteLen,
    is_primary: bool,
) -> ByteLen {
    let own = own.unwrap_or(REQUEST_MAX);
    let limit = own.min(peer.max(PEER_LIMIT_MIN)).min(REQUEST_MAX);
    if is_primary { limit.max(before) } else { limit }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn kib(n: u64) -> ByteLen {
        ByteLen(n << 10)
    }

    #[test]
    fn versions() {
        let rows = [(86, 32), (94, 32), (95, 128), (99, 128), (100, 1024), (101, 1024)];
        for (version, size) in rows {
            assert_eq!(max_request(version), kib(size), "{version}");
        }
        let rows = [(93, 8, 8), (93, 64, 32), (93, 0, 4), (94, 8, 32), (101, 4, 1024)];
        for (version, field, size) in rows {
            assert_eq!(max_request_to_send(version, kib(field)), kib(size), "{version} {field}");
        }
    }

    #[test]
    fn the_device() {
        let own = Some(kib(512));
        assert_eq!(max_request_of_device(own, kib(1024), kib(4), false), kib(512));
        assert_eq!(max_request_of_device(own, kib(0), kib(4), false), kib(4), "never seen a peer");
        assert_eq!(max_request_of_device(None, kib(128), kib(4), false), kib(128));
        assert_eq!(max_request_of_device(own, kib(32), kib(512), true), kib(512), "in use");
        assert_eq!(max_request_of_device(own, kib(32), kib(512), false), kib(32));
        let huge = Some(kib(4096));
        assert_eq!(max_request_of_device(huge, kib(8192), kib(4), false), REQUEST_MAX);
    }
}
