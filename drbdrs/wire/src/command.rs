//! The packet numbers. Spec: wire-protocol.md §4.1.

use core::fmt;

macro_rules! commands {
    ($( $variant:ident = $number:literal, $name:literal; )*) => {
        /// Number of a packet.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u16)]
        pub enum Command {
            $( #[doc = concat!("Logged as `", $name, "`.")] $variant = $number, )*
        }

        impl Command {
            /// All of them, by number.
            pub const ALL: &'static [Self] = &[ $( Self::$variant, )* ];

            /// The number on the wire.
            pub const fn number(self) -> u16 {
                self as u16
            }

            /// The command with this number.
            pub const fn from_number(number: u16) -> Option<Self> {
                match number { $( $number => Some(Self::$variant), )* _ => None }
            }

            /// The name in the log.
            pub const fn log_name(self) -> &'static str {
                match self { $( Self::$variant => $name, )* }
            }
        }
    };
}

commands! {
    Data = 0x00, "Data";
    DataReply = 0x01, "DataReply";
    RsDataReply = 0x02, "RSDataReply";
    Barrier = 0x03, "Barrier";
    Bitmap = 0x04, "ReportBitMap";
    BecomeSyncTarget = 0x05, "BecomeSyncTarget";
    BecomeSyncSource = 0x06, "BecomeSyncSource";
    UnplugRemote = 0x07, "UnplugRemote";
    DataRequest = 0x08, "DataRequest";
    RsDataRequest = 0x09, "RSDataRequest";
    SyncParam = 0x0a, "SyncParam";
    Protocol = 0x0b, "ReportProtocol";
    Uuids = 0x0c, "ReportUUIDs";
    Sizes = 0x0d, "ReportSizes";
    State = 0x0e, "ReportState";
    SyncUuid = 0x0f, "ReportSyncUUID";
    AuthChallenge = 0x10, "AuthChallenge";
    AuthResponse = 0x11, "AuthResponse";
    StateChgReq = 0x12, "StateChgRequest";
    Ping = 0x13, "Ping";
    PingAck = 0x14, "PingAck";
    RecvAck = 0x15, "RecvAck";
    WriteAck = 0x16, "WriteAck";
    RsWriteAck = 0x17, "RSWriteAck";
    Superseded = 0x18, "Superseded";
    NegAck = 0x19, "NegAck";
    NegDataReply = 0x1a, "NegDReply";
    NegRsDataReply = 0x1b, "NegRSDReply";
    BarrierAck = 0x1c, "BarrierAck";
    StateChgReply = 0x1d, "StateChgReply";
    OvRequest = 0x1e, "OVRequest";
    OvReply = 0x1f, "OVReply";
    OvResult = 0x20, "OVResult";
    CsumRsRequest = 0x21, "CsumRSRequest";
    RsIsInSync = 0x22, "CsumRSIsInSync";
    SyncParam89 = 0x23, "SyncParam89";
    CompressedBitmap = 0x24, "CBitmap";
    DelayProbe = 0x27, "DelayProbe";
    OutOfSync = 0x28, "OutOfSync";
    RsCancel = 0x29, "RSCancel";
    ConnStChgReq = 0x2a, "conn_st_chg_req";
    ConnStChgReply = 0x2b, "conn_st_chg_reply";
    RetryWrite = 0x2c, "retry_write";
    ProtocolUpdate = 0x2d, "protocol_update";
    Trim = 0x31, "Trim";
    RsThinReq = 0x32, "rs_thin_req";
    RsDeallocated = 0x33, "rs_deallocated";
    WriteSame = 0x34, "WriteSame";
    Zeroes = 0x36, "Zeroes";
    InitialMeta = 0xfff1, "InitialMeta";
    InitialData = 0xfff2, "InitialData";
    ConnectionFeatures = 0xfffe, "ConnectionFeatures";
}

/// A number that came from outside, with its name if it has one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct CommandName(u16);

impl CommandName {
    /// Any number.
    pub const fn new(number: u16) -> Self {
        Self(number)
    }

    /// The number.
    pub const fn number(self) -> u16 {
        self.0
    }

    /// The name in the log.
    pub const fn log_name(self) -> &'static str {
        match Command::from_number(self.0) {
            Some(command) => command.log_name(),
            None => "Unknown",
        }
    }
}

impl From<Command> for CommandName {
    fn from(command: Command) -> Self {
        Self(command.number())
    }
}

/// Name and number, as the original logs an unexpected packet.
impl fmt::Display for CommandName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (0x{:04x})", self.log_name(), self.0)
    }
}

impl fmt::Debug for CommandName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    #[test]
    fn numbers_and_names() {
        for command in Command::ALL {
            assert_eq!(Command::from_number(command.number()), Some(*command));
        }
        assert_eq!(Command::from_number(0x25), None);
        let name = CommandName::from(Command::AuthChallenge);
        assert_eq!(name.to_string(), "AuthChallenge (0x0010)");
    }
}
