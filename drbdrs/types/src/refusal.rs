//! Results of state changes: numbers, texts, exit codes. Spec: states-and-generations.md §2.1.

use core::fmt;

macro_rules! refusals {
    ($( $variant:ident = $number:literal, $exit:literal, $text:literal; )*) => {
        /// Why a change of state is refused.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Refusal {
            $( #[doc = $text] $variant, )*
        }

        impl Refusal {
            /// All of them.
            pub const ALL: &'static [Self] = &[ $( Self::$variant, )* ];

            /// The number that travels and that users see.
            pub const fn number(self) -> i32 {
                match self { $( Self::$variant => $number, )* }
            }

            /// The refusal with this number.
            pub const fn from_number(number: i32) -> Option<Self> {
                match number { $( $number => Some(Self::$variant), )* _ => None }
            }

            /// The text that users see.
            pub const fn text(self) -> &'static str {
                match self { $( Self::$variant => $text, )* }
            }

            /// Exit code of the command that was refused.
            pub const fn exit(self) -> u8 {
                match self { $( Self::$variant => $exit, )* }
            }
        }
    };
}

refusals! {
    TwoPrimaries = -1, 11, "Multiple primaries not allowed by config";
    NoUpToDateDisk = -2, 17, "Need access to UpToDate data";
    NoLocalDisk = -4, 16, "Can not resync without local disk";
    NoRemoteDisk = -5, 11, "Can not resync without remote disk";
    ConnectedOutdates = -6, 11, "Refusing to be Outdated while Connected";
    PrimaryNop = -7, 11, "Refusing to be Primary while peer is not outdated";
    ResyncRunning = -8, 11, "Can not start OV/resync since it is already active";
    AlreadyStandalone = -9, 11, "Can not disconnect a StandAlone device";
    FailedByPeer = -10, 11, "State change was refused by peer node";
    IsDiskless = -11, 11, "Device is diskless, the requested operation requires a disk";
    DeviceInUse = -12, 11, "Device is held open by someone";
    NoNetConfig = -13, 11, "Have no net/connection configuration";
    NoVerifyAlg = -14, 11, "Need a verify algorithm to start online verify";
    NeedConnection = -15, 11, "Need a connection to start verify or resync";
    LowerThanOutdated = -16, 5, "Disk state is lower than outdated";
    NotSupported = -17, 11, "Peer does not support protocol";
    InTransientState = -18, 11, "In transient state, retry after next state change";
    ConcurrentChange = -19, 11, "Concurrent state changes detected and aborted";
    OtherVolumePeerPrimary = -20, 11, "Other vol primary on peer not allowed by config";
    OutdateWithoutConnection = -21, 11, "Need a connection for a graceful disconnect/outdate peer";
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

impl core::error::Error for Refusal {}

/// The text of any number that a peer may answer with.
pub const fn text_of(number: i32) -> &'static str {
    match Refusal::from_number(number) {
        Some(refusal) => refusal.text(),
        None if number > -1 => "TOO_LARGE",
        None => "TOO_SMALL",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_go_both_ways() {
        for refusal in Refusal::ALL {
            assert_eq!(Refusal::from_number(refusal.number()), Some(*refusal));
        }
        assert_eq!(Refusal::from_number(-3), None);
        assert_eq!(Refusal::NoUpToDateDisk.exit(), 17);
    }

    #[test]
    fn answers_outside_the_table_have_names_too() {
        assert_eq!(text_of(-22), "TOO_SMALL");
        assert_eq!(text_of(0), "TOO_LARGE");
        assert_eq!(text_of(-10), "State change was refused by peer node");
    }
}
