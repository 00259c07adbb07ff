//! Numbers and structures of the kernel's ublk driver, as `linux/ublk_cmd.h` has them: part of the
//! kernel's stable interface, in the byte order of the machine.

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Where commands that concern devices go.
pub const CONTROL: &str = "/dev/ublk-control";

/// Requests of one queue that the driver can have at most: the table of each queue has this room.
pub const QUEUE_DEPTH_MAX: usize = 4096;
/// "Not for a queue", and "choose an id".
pub const NO_QUEUE: u16 = u16::MAX;
/// See [`NO_QUEUE`].
pub const ANY_ID: u32 = u32::MAX;

const READ: u32 = 2 << 30;
const READ_WRITE: u32 = 3 << 30;

/// An ioctl number of the driver.
const fn number(direction: u32, size: usize, nr: u32) -> u32 {
    #[expect(clippy::cast_possible_truncation, reason = "structures of some bytes")]
    let size = size as u32;
    direction | size << 16 | (b'u' as u32) << 8 | nr
}

/// Commands to [`CONTROL`].
pub mod control {
    use super::{ControlCommand, READ, READ_WRITE, number};

    const fn get(nr: u32) -> u32 {
        number(READ, size_of::<ControlCommand>(), nr)
    }

    const fn set(nr: u32) -> u32 {
        number(READ_WRITE, size_of::<ControlCommand>(), nr)
    }

    /// [`super::DeviceInfo`] of a device.
    pub const GET_DEV_INFO: u32 = get(0x02);
    /// A new device.
    pub const ADD_DEV: u32 = set(0x04);
    /// Makes the disk; waits until all requests of all queues are fetched.
    pub const START_DEV: u32 = set(0x06);
    /// Removes the disk; waits for its requests.
    pub const STOP_DEV: u32 = set(0x07);
    /// [`super::Params`], before the start.
    pub const SET_PARAMS: u32 = set(0x08);
    /// [`super::Params`].
    pub const GET_PARAMS: u32 = get(0x09);
    /// A new server wants a device that has lost its own.
    pub const START_USER_RECOVERY: u32 = set(0x10);
    /// It is ready; waits like [`START_DEV`].
    pub const END_USER_RECOVERY: u32 = set(0x11);
    /// What the driver can do: [`super::Features`].
    pub const GET_FEATURES: u32 = get(0x13);
    /// The end of a device.
    pub const DEL_DEV_ASYNC: u32 = get(0x14);
    /// Another size of a disk that runs.
    pub const UPDATE_SIZE: u32 = set(0x15);
}

/// Commands to the device of a queue.
pub mod io {
    use super::{IoCommand, READ_WRITE, number};

    /// Wait for a request.
    pub const FETCH: u32 = number(READ_WRITE, size_of::<IoCommand>(), 0x20);
    /// A request has ended; wait for the next one.
    pub const COMMIT_AND_FETCH: u32 = number(READ_WRITE, size_of::<IoCommand>(), 0x21);
}

/// Operations of [`IoDesc`].
pub mod op {
    /// Read.
    pub const READ: u8 = 0;
    /// Write.
    pub const WRITE: u8 = 1;
    /// Flush.
    pub const FLUSH: u8 = 2;
    /// Discard.
    pub const DISCARD: u8 = 3;
    /// Zero out.
    pub const WRITE_ZEROES: u8 = 5;
}

/// Through volatile caches.
pub const IO_FUA: u32 = 1 << 13;
/// Zeroes, but the space stays.
pub const IO_NO_UNMAP: u32 = 1 << 15;

bitflags::bitflags! {
    /// What a device, or the driver, can do.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Features: u64 {
        /// A device outlives its server.
        const USER_RECOVERY = 1 << 3;
        /// The next server gets the requests that the last one had.
        const USER_RECOVERY_REISSUE = 1 << 4;
        /// Users without privileges may have devices.
        const UNPRIVILEGED = 1 << 5;
        /// Commands are ioctl numbers.
        const IOCTL_ENCODE = 1 << 6;
        /// Data is moved by reading and writing the device of the queue.
        const USER_COPY = 1 << 7;
        /// [`control::UPDATE_SIZE`].
        const UPDATE_SIZE = 1 << 10;
        /// Others; nothing here uses them.
        const _ = !0;
    }
}

/// States of a device.
pub mod state {
    /// Not started, or stopped.
    pub const DEAD: u16 = 0;
    /// It works.
    pub const LIVE: u16 = 1;
    /// Its server is gone; requests wait for another one.
    pub const QUIESCED: u16 = 2;
}

/// A command to [`CONTROL`]; in the second half of a large submission.
#[derive(Clone, Copy, Debug, IntoBytes, Immutable)]
#[repr(C)]
pub struct ControlCommand {
    /// Of which device.
    pub device: u32,
    /// [`NO_QUEUE`].
    pub queue: u16,
    /// Bytes of the structure.
    pub len: u16,
    /// Its address.
    pub address: u64,
    /// A number, for some commands.
    pub data: u64,
    /// Only for users without privileges.
    pub path_len: u16,
    /// Nothing.
    pub pad: u16,
    /// Nothing.
    pub reserved: u32,
}

/// A command to the device of a queue.
#[derive(Clone, Copy, Debug, IntoBytes, Immutable)]
#[repr(C)]
pub struct IoCommand {
    /// Which queue.
    pub queue: u16,
    /// Which request.
    pub tag: u16,
    /// Bytes, or a negative errno.
    pub result: i32,
    /// Not with [`Features::USER_COPY`].
    pub address: u64,
}

/// A device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct DeviceInfo {
    /// Queues.
    pub queues: u16,
    /// Requests of a queue.
    pub depth: u16,
    /// See [`state`].
    pub state: u16,
    /// Nothing.
    pub pad0: u16,
    /// Bytes of the largest request.
    pub max_io: u32,
    /// Its id.
    pub id: u32,
    /// The process that serves it.
    pub pid: i32,
    /// Nothing.
    pub pad1: u32,
    /// [`Features`].
    pub flags: u64,
    /// Whatever the server likes; the driver only keeps it.
    pub mark: u64,
    /// Its owner.
    pub uid: u32,
    /// Its owner.
    pub gid: u32,
    /// Nothing.
    pub reserved: [u64; 2],
}

/// A request of a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct IoDesc {
    /// Operation in the lowest byte; flags.
    pub op_flags: u32,
    /// Length.
    pub sectors: u32,
    /// Where it begins.
    pub start: u64,
    /// Not with [`Features::USER_COPY`].
    pub address: u64,
}

/// [`Params::attributes`]: it turns.
pub const ATTR_ROTATIONAL: u32 = 1 << 1;
/// [`Params::attributes`]: needs flushes.
pub const ATTR_VOLATILE_CACHE: u32 = 1 << 2;
/// [`Params::attributes`]: has [`IO_FUA`].
pub const ATTR_FUA: u32 = 1 << 3;
/// [`Params::types`]: the ordinary ones.
pub const PARAM_BASIC: u32 = 1;
/// [`Params::types`]: discards and zeroes.
pub const PARAM_DISCARD: u32 = 2;

/// How the disk looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Params {
    /// Bytes of this structure.
    pub len: u32,
    /// Which parts count.
    pub types: u32,
    /// Abilities.
    pub attributes: u32,
    /// log2 of the block size.
    pub logical_shift: u8,
    /// log2 of the block size of the medium.
    pub physical_shift: u8,
    /// log2 of the best size of requests.
    pub io_opt_shift: u8,
    /// log2 of the smallest good size of requests.
    pub io_min_shift: u8,
    /// Largest read or write.
    pub max_sectors: u32,
    /// Borders that no request crosses.
    pub chunk_sectors: u32,
    /// Size.
    pub sectors: u64,
    /// Gaps in memory.
    pub virt_boundary: u64,
    /// Where discards begin.
    pub discard_alignment: u32,
    /// What discards are multiples of.
    pub discard_granularity: u32,
    /// Largest discard; 0: none.
    pub max_discard_sectors: u32,
    /// Largest zero-out; 0: as data.
    pub max_zeroes_sectors: u32,
    /// Ranges of one discard.
    pub max_discard_segments: u16,
    /// Nothing.
    pub reserved: u16,
    /// To the end of the alignment.
    pub pad: u32,
}

/// Where the data of a request is in the device of its queue.
pub const fn data_at(queue: u16, tag: u16, offset: u32) -> u64 {
    const DATA: u64 = 0x8000_0000;
    const TAG_SHIFT: u32 = 25;
    const QUEUE_SHIFT: u32 = TAG_SHIFT + 16;
    DATA + ((queue as u64) << QUEUE_SHIFT | (tag as u64) << TAG_SHIFT | offset as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_sizes_are_those_of_the_kernel() {
        assert_eq!(control::ADD_DEV, 0xC020_7504);
        assert_eq!(control::GET_DEV_INFO, 0x8020_7502);
        assert_eq!(io::FETCH, 0xC010_7520);
        assert_eq!(size_of::<DeviceInfo>(), 64);
        assert_eq!(size_of::<IoDesc>(), 24);
        // The kernel's structure begins so; more of it is not used.
        assert_eq!(std::mem::offset_of!(Params, discard_alignment), 40);
        assert_eq!(size_of::<Params>(), 64);
        assert_eq!(data_at(0, 0, 0), 0x8000_0000);
        assert_eq!(data_at(1, 3, 512), 0x8000_0000 + (1 << 41) + (3 << 25) + 512);
    }
}
