//! The packet numbers. Spec: wire-protocol.md §4.1.

use core::fmt;

macro_rules! commands {
    ($( $variant:ident = $number:literal, $name:literal, $log_name:literal; )*) => {
        /// Number of a packet.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u16)]
        pub enum Command {
            $( #[doc = concat!("`", $name, "`, logged as `", $log_name, "`.")] $variant = $number, )*
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

            /// The name in the protocol.
            pub const fn name(self) -> &'static str {
                match self { $( Self::$variant => $name, )* }
            }

            /// The command with this name in the protocol.
            pub fn from_name(name: &str) -> Option<Self> {
                match name { $( $name => Some(Self::$variant), )* _ => None }
            }

            /// The name in the log.
            pub const fn log_name(self) -> &'static str {
                match self { $( Self::$variant => $log_name, )* }
            }
        }
    };
}

commands! {
    Data = 0x00, "P_DATA", "Data";
    DataReply = 0x01, "P_DATA_REPLY", "DataReply";
    RsDataReply = 0x02, "P_RS_DATA_REPLY", "RSDataReply";
    Barrier = 0x03, "P_BARRIER", "Barrier";
    Bitmap = 0x04, "P_BITMAP", "ReportBitMap";
    BecomeSyncTarget = 0x05, "P_BECOME_SYNC_TARGET", "BecomeSyncTarget";
    BecomeSyncSource = 0x06, "P_BECOME_SYNC_SOURCE", "BecomeSyncSource";
    UnplugRemote = 0x07, "P_UNPLUG_REMOTE", "UnplugRemote";
    DataRequest = 0x08, "P_DATA_REQUEST", "DataRequest";
    RsDataRequest = 0x09, "P_RS_DATA_REQUEST", "RSDataRequest";
    SyncParam = 0x0a, "P_SYNC_PARAM", "SyncParam";
    Protocol = 0x0b, "P_PROTOCOL", "ReportProtocol";
    Uuids = 0x0c, "P_UUIDS", "ReportUUIDs";
    Sizes = 0x0d, "P_SIZES", "ReportSizes";
    State = 0x0e, "P_STATE", "ReportState";
    SyncUuid = 0x0f, "P_SYNC_UUID", "ReportSyncUUID";
    AuthChallenge = 0x10, "P_AUTH_CHALLENGE", "AuthChallenge";
    AuthResponse = 0x11, "P_AUTH_RESPONSE", "AuthResponse";
    StateChgReq = 0x12, "P_STATE_CHG_REQ", "StateChgRequest";
    Ping = 0x13, "P_PING", "Ping";
    PingAck = 0x14, "P_PING_ACK", "PingAck";
    RecvAck = 0x15, "P_RECV_ACK", "RecvAck";
    WriteAck = 0x16, "P_WRITE_ACK", "WriteAck";
    RsWriteAck = 0x17, "P_RS_WRITE_ACK", "RSWriteAck";
    Superseded = 0x18, "P_SUPERSEDED", "Superseded";
    NegAck = 0x19, "P_NEG_ACK", "NegAck";
    NegDataReply = 0x1a, "P_NEG_DREPLY", "NegDReply";
    NegRsDataReply = 0x1b, "P_NEG_RS_DREPLY", "NegRSDReply";
    BarrierAck = 0x1c, "P_BARRIER_ACK", "BarrierAck";
    StateChgReply = 0x1d, "P_STATE_CHG_REPLY", "StateChgReply";
    OvRequest = 0x1e, "P_OV_REQUEST", "OVRequest";
    OvReply = 0x1f, "P_OV_REPLY", "OVReply";
    OvResult = 0x20, "P_OV_RESULT", "OVResult";
    CsumRsRequest = 0x21, "P_CSUM_RS_REQUEST", "CsumRSRequest";
    RsIsInSync = 0x22, "P_RS_IS_IN_SYNC", "CsumRSIsInSync";
    SyncParam89 = 0x23, "P_SYNC_PARAM89", "SyncParam89";
    CompressedBitmap = 0x24, "P_COMPRESSED_BITMAP", "CBitmap";
    DelayProbe = 0x27, "P_DELAY_PROBE", "DelayProbe";
    OutOfSync = 0x28, "P_OUT_OF_SYNC", "OutOfSync";
    RsCancel = 0x29, "P_RS_CANCEL", "RSCancel";
    ConnStChgReq = 0x2a, "P_CONN_ST_CHG_REQ", "conn_st_chg_req";
    ConnStChgReply = 0x2b, "P_CONN_ST_CHG_REPLY", "conn_st_chg_reply";
    RetryWrite = 0x2c, "P_RETRY_WRITE", "retry_write";
    ProtocolUpdate = 0x2d, "P_PROTOCOL_UPDATE", "protocol_update";
    Trim = 0x31, "P_TRIM", "Trim";
    RsThinReq = 0x32, "P_RS_THIN_REQ", "rs_thin_req";
    RsDeallocated = 0x33, "P_RS_DEALLOCATED", "rs_deallocated";
    WriteSame = 0x34, "P_WSAME", "WriteSame";
    Zeroes = 0x36, "P_ZEROES", "Zeroes";
    InitialMeta = 0xfff1, "P_INITIAL_META", "InitialMeta";
    InitialData = 0xfff2, "P_INITIAL_DATA", "InitialData";
    ConnectionFeatures = 0xfffe, "P_CONNECTION_FEATURES", "ConnectionFeatures";
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
            assert_eq!(Command::from_name(command.name()), Some(*command));
        }
        assert_eq!(Command::from_number(0x25), None);
        let name = CommandName::from(Command::AuthChallenge);
        assert_eq!(name.to_string(), "AuthChallenge (0x0010)");
    }
}
