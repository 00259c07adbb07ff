//! The state of a volume in 32 bits, as it travels and as the status interface shows it.
//! Spec: states-and-generations.md §1.1, wire-protocol.md §14.3.

use crate::{Cstate, Dstate, Role};

/// 32 bits of state, or of a mask that picks some of its fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct StateWord(pub u32);

impl StateWord {
    /// Mask of the own role.
    pub const ROLE: Self = Self(0x0000_0003);
    /// Mask of the peer's role.
    pub const PEER: Self = Self(0x0000_000C);
    /// Mask of the connection state.
    pub const CONN: Self = Self(0x0000_01F0);
    /// Mask of the own disk state.
    pub const DISK: Self = Self(0x0000_1E00);
    /// Mask of the peer's disk state.
    pub const PDSK: Self = Self(0x0001_E000);
    /// I/O suspended by the administrator.
    pub const SUSP: Self = Self(1 << 17);
    /// Resync paused by a dependency.
    pub const AFTR_ISP: Self = Self(1 << 18);
    /// Resync paused by the peer.
    pub const PEER_ISP: Self = Self(1 << 19);
    /// Resync paused by the administrator.
    pub const USER_ISP: Self = Self(1 << 20);
    /// I/O suspended, no data accessible.
    pub const SUSP_NOD: Self = Self(1 << 21);
    /// I/O suspended, the peer is being fenced.
    pub const SUSP_FEN: Self = Self(1 << 22);

    /// Does it share a bit with the other?
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// The fields.
    ///
    /// # Errors
    /// A number that stands for nothing.
    pub const fn unpack(self) -> Result<Fields, BadStateWord> {
        let word = self.0;
        let (Some(role), Some(peer), Some(conn), Some(disk), Some(pdsk)) = (
            Role::from_number((word & 3) as u8),
            Role::from_number((word >> 2 & 3) as u8),
            Cstate::from_number((word >> 4 & 31) as u8),
            Dstate::from_number((word >> 9 & 15) as u8),
            Dstate::from_number((word >> 13 & 15) as u8),
        ) else {
            return Err(BadStateWord(word));
        };
        Ok(Fields {
            role,
            peer,
            conn,
            disk,
            pdsk,
            susp: self.has(Self::SUSP),
            aftr_isp: self.has(Self::AFTR_ISP),
            peer_isp: self.has(Self::PEER_ISP),
            user_isp: self.has(Self::USER_ISP),
            susp_nod: self.has(Self::SUSP_NOD),
            susp_fen: self.has(Self::SUSP_FEN),
        })
    }
}

/// A state word with a number that stands for nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadStateWord(pub u32);

impl core::fmt::Display for BadStateWord {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "state word {:#010x} has an unknown role, connection or disk state", self.0)
    }
}

impl core::error::Error for BadStateWord {}

/// The fields of a state word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fields {
    /// Own role.
    pub role: Role,
    /// Role of the peer.
    pub peer: Role,
    /// Connection and replication.
    pub conn: Cstate,
    /// Own disk.
    pub disk: Dstate,
    /// The peer's disk.
    pub pdsk: Dstate,
    /// I/O suspended by the administrator.
    pub susp: bool,
    /// Resync paused by a dependency.
    pub aftr_isp: bool,
    /// Resync paused by the peer.
    pub peer_isp: bool,
    /// Resync paused by the administrator.
    pub user_isp: bool,
    /// I/O suspended, no data accessible.
    pub susp_nod: bool,
    /// I/O suspended, the peer is being fenced.
    pub susp_fen: bool,
}

impl Fields {
    /// A new volume of a resource without connection.
    pub const NEW: Self = Self {
        role: Role::Secondary,
        peer: Role::Unknown,
        conn: Cstate::StandAlone,
        disk: Dstate::Diskless,
        pdsk: Dstate::DUnknown,
        susp: false,
        aftr_isp: false,
        peer_isp: false,
        user_isp: false,
        susp_nod: false,
        susp_fen: false,
    };

    /// As it travels.
    pub const fn pack(self) -> StateWord {
        StateWord(
            self.role.number() as u32
                | (self.peer.number() as u32) << 2
                | (self.conn.number() as u32) << 4
                | (self.disk.number() as u32) << 9
                | (self.pdsk.number() as u32) << 13
                | (self.susp as u32) << 17
                | (self.aftr_isp as u32) << 18
                | (self.peer_isp as u32) << 19
                | (self.user_isp as u32) << 20
                | (self.susp_nod as u32) << 21
                | (self.susp_fen as u32) << 22,
        )
    }

    /// I/O waits, for whatever reason.
    pub const fn is_suspended(self) -> bool {
        self.susp || self.susp_nod || self.susp_fen
    }

    /// A resync is to wait, for whatever reason.
    pub const fn is_paused(self) -> bool {
        self.aftr_isp || self.peer_isp || self.user_isp
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recorded_words_are_read_and_written() {
        // Spec: wire-protocol.md §14.3, examples.
        let word = StateWord(0x0001_10A9);
        let fields = word.unpack().unwrap();
        assert_eq!((fields.role, fields.peer), (Role::Primary, Role::Secondary));
        assert_eq!(fields.conn, Cstate::Connected);
        assert_eq!((fields.disk, fields.pdsk), (Dstate::UpToDate, Dstate::UpToDate));
        assert_eq!(fields.pack(), word);
        let target = StateWord(0x0001_0AE6).unpack().unwrap();
        assert_eq!(target.conn, Cstate::WFBitMapT);
        assert_eq!((target.disk, target.pdsk), (Dstate::Outdated, Dstate::UpToDate));
        let first = StateWord(0x0000_C882).unpack().unwrap();
        assert_eq!((first.conn, first.pdsk), (Cstate::WFConnection, Dstate::DUnknown));
    }

    #[test]
    fn all_23_bits_survive() {
        for bit in 0..23 {
            let word = StateWord(1 << bit);
            assert_eq!(word.unpack().unwrap().pack(), word, "bit {bit}");
        }
    }

    #[test]
    fn numbers_that_stand_for_nothing_are_refused() {
        for word in [3, 3 << 2, 31 << 4, 9 << 9, 15 << 13] {
            assert_eq!(StateWord(word).unpack(), Err(BadStateWord(word)));
        }
        assert_eq!(StateWord(0xFF80_0000).unpack().map(Fields::pack), Ok(StateWord(0)));
    }
}
