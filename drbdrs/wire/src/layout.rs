//! Fixed parts of packets, as they lie on the wire. Spec: wire-protocol.md §2, §4.3, §4.4, §14.

use zerocopy::byteorder::big_endian::{I32, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

macro_rules! wire {
    ($(#[$doc:meta])* $name:ident, $size:literal { $( $(#[$field_doc:meta])* $field:ident : $ty:ty, )* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
        #[repr(C)]
        pub(crate) struct $name {
            $( $(#[$field_doc])* pub(crate) $field: $ty, )*
        }
        const _: () = assert!(size_of::<$name>() == $size);
    };
}

wire! {
    /// Header 80.
    Header80, 8 { magic: U32, command: U16, length: U16, }
}
wire! {
    /// Header 95.
    Header95, 8 { magic: U16, command: U16, length: U32, }
}
wire! {
    /// Header 100.
    Header100, 16 { magic: U32, volume: U16, command: U16, length: U32, pad: U32, }
}
wire! {
    /// Block header.
    Block, 24 {
        sector: U64,
        /// Opaque.
        block_id: [u8; 8],
        seq_num: U32,
        dp_flags: U32,
    }
}
wire! {
    /// Block header with a size.
    BlockSize, 28 { block: Block, size: U32, }
}
wire! {
    /// Block request and block acknowledgement; the last word is undefined in requests and the
    /// sequence number in acknowledgements.
    BlockRequest, 24 {
        sector: U64,
        /// Opaque.
        block_id: [u8; 8],
        size: U32,
        last: U32,
    }
}
wire! {
    /// Block description.
    BlockDesc, 16 { sector: U64, size: U32, undefined: U32, }
}
wire! {
    /// Barrier: opaque number and zero. Barrier acknowledgement: number and count.
    Barrier, 8 {
        /// Opaque.
        number: [u8; 4],
        second: U32,
    }
}
wire! {
    /// P_PROTOCOL without the name.
    Protocol, 24 {
        protocol: U32,
        after_sb_0p: U32,
        after_sb_1p: U32,
        after_sb_2p: U32,
        conn_flags: U32,
        two_primaries: U32,
    }
}
wire! {
    /// Names of P_SYNC_PARAM89.
    SyncNames, 132 { resync_rate: U32, verify_alg: [u8; 64], csums_alg: [u8; 64], }
}
wire! {
    /// Controller settings of P_SYNC_PARAM89.
    SyncController, 16 {
        c_plan_ahead: U32,
        c_delay_target: U32,
        c_fill_target: U32,
        c_max_rate: U32,
    }
}
wire! {
    /// P_UUIDS.
    Uuids, 48 {
        current: U64,
        bitmap: U64,
        history_1: U64,
        history_2: U64,
        dirty_bits: U64,
        flags: U64,
    }
}
wire! {
    /// P_SIZES.
    Sizes, 32 {
        d_size: U64,
        u_size: U64,
        c_size: U64,
        max_bio_size: U32,
        queue_order_type: U16,
        dds_flags: U16,
    }
}
wire! {
    /// Queue limits of P_SIZES.
    QueueLimits, 24 {
        physical_block_size: U32,
        logical_block_size: U32,
        alignment_offset: U32,
        io_min: U32,
        io_opt: U32,
        discard_enabled: u8,
        discard_zeroes_data: u8,
        write_same_capable: u8,
        zero: u8,
    }
}
wire! {
    /// Mask and value of a state request; two numbers of a delay probe.
    Pair, 8 { first: U32, second: U32, }
}
wire! {
    /// One number.
    One, 4 { value: U32, }
}
wire! {
    /// One signed number.
    Signed, 4 { value: I32, }
}
wire! {
    /// P_SYNC_UUID.
    Long, 8 { value: U64, }
}
wire! {
    /// P_CONNECTION_FEATURES.
    Features, 72 {
        protocol_min: U32,
        feature_flags: U32,
        protocol_max: U32,
        reserved: [u8; 60],
    }
}
