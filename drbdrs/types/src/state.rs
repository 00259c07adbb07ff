//! Roles and disk states with the numbers of the wire. Spec: states-and-generations.md §1.2, §1.4.
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
    }
}
