//! Roles, connection states and disk states with the numbers of the wire.
//! Spec: states-and-generations.md §1.2, §1.3, §1.4.
//!
//! The order of the variants is the order of the numbers: rules compare states with `<`.

use core::fmt;

macro_rules! numbered {
    ($(#[$doc:meta])* $name:ident { $( $variant:ident = $number:literal $what:literal, )* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum $name {
            $( #[doc = $what] $variant = $number, )*
        }

        impl $name {
            /// All of them, by number.
            pub const ALL: &'static [Self] = &[ $( Self::$variant, )* ];

            /// The number in the state word.
            pub const fn number(self) -> u8 {
                match self { $( Self::$variant => $number, )* }
            }

            /// The state with this number.
            pub const fn from_number(number: u8) -> Option<Self> {
                match number { $( $number => Some(Self::$variant), )* _ => None }
            }

            /// The name as status output and logs spell it.
            pub const fn name(self) -> &'static str {
                match self { $( Self::$variant => stringify!($variant), )* }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.name())
            }
        }
    };
}

numbered! {
    /// Role of a node.
    Role {
        Unknown = 0 "Of the peer, while there is no connection.",
        Primary = 1 "Applications use the device.",
        Secondary = 2 "They do not.",
    }
}

numbered! {
    /// State of a disk.
    Dstate {
        Diskless = 0 "No backing device.",
        Attaching = 1 "Meta-data is being read.",
        Failed = 2 "Error or detach in progress.",
        Negotiating = 3 "Attached while connected, the real state is not agreed yet.",
        Inconsistent = 4 "Not usable as a whole.",
        Outdated = 5 "Consistent, but known to be old.",
        DUnknown = 6 "Of the peer: not known.",
        Consistent = 7 "Consistent; current or old is to be decided.",
        UpToDate = 8 "Consistent and current.",
    }
}

numbered! {
    /// State of the connection and of the replication of a volume.
    Cstate {
        StandAlone = 0 "No network configuration in use; nothing is tried.",
        Disconnecting = 1 "On the way to StandAlone.",
        Unconnected = 2 "About to try to connect.",
        Timeout = 3 "Lost: the peer did not answer in time.",
        BrokenPipe = 4 "Lost: sending or receiving failed.",
        NetworkFailure = 5 "Lost: any other local reason to reconnect.",
        ProtocolError = 6 "Lost: the peer sent something impossible.",
        TearDown = 7 "Lost: the peer disconnects.",
        WFConnection = 8 "Trying to connect and listening.",
        WFReportParams = 9 "Both streams are there, parameters are exchanged.",
        Connected = 10 "Normal, no resync runs.",
        StartingSyncS = 11 "A full resync was requested, this node is source.",
        StartingSyncT = 12 "A full resync was requested, this node is target.",
        WFBitMapS = 13 "Source, bitmaps are exchanged.",
        WFBitMapT = 14 "Target, bitmaps are exchanged.",
        WFSyncUUID = 15 "Target, waits for the sync identifier.",
        SyncSource = 16 "Source of a resync.",
        SyncTarget = 17 "Target of a resync.",
        VerifyS = 18 "Online verify, this node asks.",
        VerifyT = 19 "Online verify, this node answers.",
        PausedSyncS = 20 "Source of a paused resync.",
        PausedSyncT = 21 "Target of a paused resync.",
        Ahead = 22 "Congestion: this node only reports changed blocks.",
        Behind = 23 "The peer is Ahead.",
    }
}

impl Cstate {
    /// A resync runs or is paused: the states 16, 17, 20 and 21.
    pub const fn is_sync(self) -> bool {
        matches!(self, Self::SyncSource | Self::SyncTarget | Self::PausedSyncS | Self::PausedSyncT)
    }

    /// A verify runs.
    pub const fn is_verify(self) -> bool {
        matches!(self, Self::VerifyS | Self::VerifyT)
    }

    /// The connection is lost and will be tried again: Timeout..TearDown.
    pub const fn is_lost(self) -> bool {
        (self as u8) >= Self::Timeout as u8 && (self as u8) <= Self::TearDown as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_go_both_ways() {
        for state in Dstate::ALL {
            assert_eq!(Dstate::from_number(state.number()), Some(*state));
        }
        assert_eq!(Dstate::from_number(9), None);
        assert_eq!(Role::from_number(1).map(Role::name), Some("Primary"));
        assert!(Dstate::DUnknown < Dstate::Consistent, "the rules rely on this order");
        assert_eq!(Cstate::ALL.len(), 24);
        for (number, state) in (0..).zip(Cstate::ALL) {
            assert_eq!((state.number(), Cstate::from_number(number)), (number, Some(*state)));
        }
        assert!(Cstate::PausedSyncT.is_sync() && !Cstate::VerifyS.is_sync());
        assert!(Cstate::TearDown.is_lost() && !Cstate::WFConnection.is_lost());
    }
}
