//! Errors of commands: numbers and texts. Spec: status-and-integration.md §2.13.
//!
//! Numbers from 101 on; what a state change is refused for has negative ones, see [`crate::refusal`].

use core::fmt;

macro_rules! failures {
    ($( $variant:ident = $number:literal, $text:literal; )*) => {
        /// Why a command can not be done.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Failure {
            $( #[doc = concat!("```text\n", $text, "\n```")] $variant, )*
        }

        impl Failure {
            /// All of them.
            pub const ALL: &'static [Self] = &[ $( Self::$variant, )* ];

            /// The number that users see.
            pub const fn number(self) -> i32 {
                match self { $( Self::$variant => $number, )* }
            }

            /// The failure with this number.
            pub const fn from_number(number: i32) -> Option<Self> {
                match number { $( $number => Some(Self::$variant), )* _ => None }
            }

            /// The text that users see; some have line ends in them.
            pub const fn text(self) -> &'static str {
                match self { $( Self::$variant => $text, )* }
            }
        }
    };
}

failures! {
    LocalAddressInUse = 102, "Local address(port) already in use.";
    PeerAddressInUse = 103, "Remote address(port) already in use.";
    OpenBackingDevice = 104, "Can not open backing device.";
    OpenMetaDevice = 105, "Can not open meta device.";
    LowerDeviceInUse = 106, "Lower device already in use.";
    DiskNotBlockDevice = 107, "Lower device is not a block device.";
    MetaNotBlockDevice = 108, "Meta device is not a block device.";
    LowerDeviceOpen = 109, "Open of lower device failed.";
    MetaDeviceOpen = 110, "Open of meta device failed.";
    DiskTooSmall = 111, "Low.dev. smaller than requested DRBD-dev. size.";
    MetaTooSmall = 112, "Meta device too small.";
    DiskFirst = 113, "You have to use the disk command first.";
    DiskClaimed = 114, "Lower device is already claimed. This usually means it is mounted.";
    MetaClaimed = 115, "Meta device is already claimed. This usually means it is mounted.";
    MetaIndexInvalid = 116, "Lower device / meta device / index combination invalid.";
    DeviceTooLarge = 117, "Currently we only support devices up to 3.998TB.\n(up to 2TB in case you do not have CONFIG_LBD set)\nContact office@linbit.com, if you need more.";
    MetaIo = 118, "IO error(s) occurred during initial access to meta-data.\n";
    NoMetaData = 119, "No valid meta-data signature found.\n\n\t==> Use 'drbdadm create-md res' to initialize meta-data area. <==\n";
    AuthAlg = 120, "The 'cram-hmac-alg' you specified is not known in the kernel. (Maybe you need to modprobe it, or modprobe hmac?)";
    AuthAlgNoDigest = 121, "The 'cram-hmac-alg' you specified is not a digest.";
    NoMemory = 122, "kmalloc() failed. Out of memory?";
    DiscardImpossible = 123, "--discard-my-data not allowed when primary.";
    DiskConfigured = 124, "Device is attached to a disk (use detach first)";
    NetConfigured = 125, "Device has a net-config (use disconnect first)";
    BadRequest = 126, "UnknownMandatoryTag";
    MinorUnknown = 127, "Device minor not allocated";
    StateInvalid = 128, "Resulting device state would be invalid";
    Interrupted = 129, "Interrupted by Signal";
    ResizeDuringResync = 130, "Resize not allowed during resync.";
    NeedPrimaryToResize = 131, "Need one Primary node to resize.";
    ResyncAfterInvalid = 132, "The resync-after minor number is invalid";
    ResyncAfterCycle = 133, "This would cause a resync-after dependency cycle";
    PauseIsSet = 134, "Sync-pause flag is already set";
    PauseIsClear = 135, "Sync-pause flag is already cleared";
    DiskBelowOutdated = 136, "Disk state is lower than outdated";
    UnknownRequest = 137, "Kernel does not know how to handle your request.\nMaybe API_VERSION mismatch?";
    NoDisk = 138, "Device does not have a disk-config";
    ProtocolCRequired = 139, "Protocol C required";
    NoLargeMemory = 140, "vmalloc() failed. Out of memory?";
    IntegrityAlg = 141, "The 'data-integrity-alg' you specified is not known in the kernel. (Maybe you need to modprobe it, or modprobe hmac?)";
    IntegrityAlgNoDigest = 142, "The 'data-integrity-alg' you specified is not a digest.";
    CpuMask = 143, "Invalid cpu-mask.";
    ChecksumAlg = 144, "CSUMSAlgNotAvail";
    ChecksumAlgNoDigest = 145, "CSUMSAlgNotDigest";
    VerifyAlg = 146, "VERIFYAlgNotAvail";
    VerifyAlgNoDigest = 147, "VERIFYAlgNotDigest";
    ChecksumsRunning = 148, "Can not change csums-alg while resync is in progress";
    VerifyRunning = 149, "Can not change verify-alg while online verify runs";
    NotLastLostData = 150, "Can only attach to the data we lost last (see kernel log).";
    NeedStandAlone = 151, "Need to be StandAlone";
    Permission = 152, "Permission denied. CAP_SYS_ADMIN necessary";
    AssumeCleanProtocol = 153, "Protocol version 93 required to use --assume-clean";
    StonithProtocol = 154, "Fencing policy resource-and-stonith only with prot B or C allowed";
    PullAheadProtocol = 155, "on-congestion policy pull-ahead only with prot A allowed";
    PauseIsClearAfter = 156, "Sync-pause flag is already cleared.\nNote: Resync pause caused by a local resync-after dependency.";
    PauseIsClearPeer = 157, "Sync-pause flag is already cleared.\nNote: Resync pause caused by the peer node.";
    ResourceUnknown = 158, "Unknown resource";
    ResourceInUse = 159, "Resource still in use (delete all minors first)";
    MinorConfigured = 160, "Minor still configured (down it first)";
    MinorOrVolumeExists = 161, "Minor or volume exists already (delete it first)";
    InvalidRequest = 162, "Invalid configuration request";
    NeedProtocol100 = 163, "Prot version 100 required in order to change\nthese network options while connected";
    TwoPrimariesRunning = 164, "Can not clear allow_two_primaries as long as\nthere a primaries on both sides";
    MetaUnclean = 165, "Unclean meta-data found.\nYou need to 'drbdadm apply-al res'\n";
    LayoutNotConnected = 166, "DRBD need to be connected for online MD layout change\n";
    AlTooBig = 167, "Resulting AL area too big\n";
    AlTooSmall = 168, "Resulting AL are too small\n";
    MetaSpace = 169, "Resulting AL does not fit into available meta data space\n";
    ImplicitShrink = 170, "Implicit device shrinking not allowed. See kernel log.\n";
}

/// Exit code of a command that failed with any of these.
pub const EXIT: u8 = 10;

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

impl core::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_without_gaps() {
        for (number, failure) in (102..).zip(Failure::ALL) {
            assert_eq!(failure.number(), number);
            assert_eq!(Failure::from_number(number), Some(*failure));
        }
        assert_eq!(Failure::ALL.len(), 69);
        assert_eq!(Failure::from_number(101), None);
        assert_eq!(Failure::MinorUnknown.text(), "Device minor not allocated");
    }
}
