//! How far one application request has come: the facts and what follows from them.
//!
//! A request has a local part and a network part. Events change facts; whether the request may be
//! completed to the application, with which result, and whether it may be forgotten, follows from
//! the facts alone. Spec: io-path-and-resync.md §1.5, §1.7.
//!
//! Differences from the original: a request is withheld while I/O is suspended by looking at the
//! suspension itself, not by a mark on the request, so that the end of a suspension completes
//! whatever waits for nothing else (defect 14.12); and a write of protocol A that was only handed
//! to the transport is sent again after a suspension (defect 14.8).

use crate::config::Protocol;

/// The local part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Local {
    /// There is none.
    None,
    /// The disk has it.
    Pending,
    /// The disk has it, but nobody waits for it any more: it counts as failed.
    Aborted,
    /// Done.
    Ok,
    /// Failed.
    Error,
}

/// What the peer gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remote {
    /// Nothing.
    None,
    /// The data of a write, acknowledged as this protocol demands.
    Mirror(Protocol),
    /// Only the place of a write.
    OutOfSync,
    /// A read request.
    Read,
}

/// What happened to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Happened {
    /// The disk did it.
    LocalOk,
    /// The disk did not.
    LocalError,
    /// The disk is given up while it still has the request.
    LocalAborted,
    /// The packet is completely in the hands of the transport.
    Sent,
    /// P_RECV_ACK.
    RecvAck,
    /// P_WRITE_ACK.
    WriteAck,
    /// P_RS_WRITE_ACK: as P_WRITE_ACK, and the peer cleared its bits.
    RsWriteAck,
    /// P_NEG_ACK.
    NegAck,
    /// P_SUPERSEDED.
    Superseded,
    /// P_BARRIER_ACK of its epoch.
    BarrierAck,
    /// P_DATA_REPLY.
    DataReply,
    /// P_NEG_DREPLY.
    NegDataReply,
    /// The connection is gone for good, as far as this request is concerned.
    ConnectionLost,
}

/// The facts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Local part.
    pub local: Local,
    /// What the peer gets.
    pub remote: Remote,
    /// The packet waits for the transport.
    is_queued: bool,
    /// An answer of the peer is expected.
    is_pending: bool,
    /// The peer has the data, or (A, B) is assumed to have it.
    remote_ok: bool,
    /// Nothing more is expected from the peer.
    remote_done: bool,
    /// The peer has cleared its bits for this write.
    peer_in_sync: bool,
}

impl Progress {
    /// A request with these parts, neither begun.
    pub const fn new(has_local: bool, remote: Remote) -> Self {
        let (is_queued, is_pending) = match remote {
            Remote::None => (false, false),
            Remote::OutOfSync => (true, false),
            Remote::Mirror(_) | Remote::Read => (true, true),
        };
        Self {
            local: if has_local { Local::Pending } else { Local::None },
            remote,
            is_queued,
            is_pending,
            remote_ok: false,
            remote_done: false,
            peer_in_sync: false,
        }
    }

    /// One more fact.
    pub fn on(&mut self, happened: Happened) {
        match happened {
            Happened::LocalOk => self.local = Local::Ok,
            Happened::LocalError => self.local = Local::Error,
            Happened::LocalAborted => {
                if self.local == Local::Pending {
                    self.local = Local::Aborted;
                }
            }
            Happened::Sent => self.on_sent(),
            Happened::RecvAck | Happened::WriteAck => self.on_answer(true),
            Happened::RsWriteAck => {
                self.on_answer(true);
                self.peer_in_sync = true;
            }
            Happened::NegAck => self.on_answer(false),
            Happened::NegDataReply => {
                self.on_answer(false);
                self.remote_done = true;
            }
            Happened::Superseded | Happened::DataReply => {
                self.on_answer(true);
                self.remote_done = true;
            }
            Happened::BarrierAck => self.remote_done = true,
            Happened::ConnectionLost => {
                self.is_queued = false;
                self.is_pending = false;
                self.remote_ok = false;
                self.remote_done = true;
            }
        }
    }

    fn on_sent(&mut self) {
        self.is_queued = false;
        match self.remote {
            // Nobody will acknowledge this write before its barrier: the transport has it, and
            // that is what protocol A promises.
            Remote::Mirror(Protocol::A) => {
                if self.is_pending {
                    self.is_pending = false;
                    self.remote_ok = true;
                }
            }
            Remote::OutOfSync => self.remote_done = true,
            Remote::Mirror(Protocol::B | Protocol::C) | Remote::Read | Remote::None => {}
        }
    }

    fn on_answer(&mut self, ok: bool) {
        // An answer proves that the packet left, whatever the transport reports later.
        self.is_queued = false;
        self.is_pending = false;
        self.remote_ok = ok;
    }

    /// A write that was not acknowledged by a barrier goes out once more on a new connection.
    /// Returns whether it must be sent. Spec §1.9 "Resend".
    ///
    /// In the original one that the peer acknowledged itself is not sent again, which relies on
    /// the peer not having lost its cache meanwhile. Nothing proves that.
    pub const fn resend(&mut self) -> bool {
        if !self.is_unacknowledged_mirror() {
            return false;
        }
        self.is_queued = true;
        self.is_pending = true;
        self.remote_ok = false;
        true
    }

    /// The peer still owes an answer (the counter `pe`).
    pub const fn is_pending(&self) -> bool {
        self.is_pending
    }

    /// Mirrored, and its epoch is neither acknowledged nor lost.
    pub const fn is_unacknowledged_mirror(&self) -> bool {
        matches!(self.remote, Remote::Mirror(_)) && !self.remote_done
    }

    /// Does nobody work on it any more, apart from its epoch?
    pub const fn is_finished(&self) -> bool {
        !matches!(self.local, Local::Pending) && !self.is_queued && !self.is_pending
    }

    /// May it be completed while I/O is suspended? Only if its epoch was acknowledged: then it is
    /// on both nodes whatever the suspension leads to. Spec §15 invariant 5.
    pub const fn outlasts_suspension(&self) -> bool {
        matches!(self.remote, Remote::Mirror(_)) && self.remote_done && self.remote_ok
    }

    /// Success needs one copy. Spec §15 invariant 1.
    pub const fn is_success(&self) -> bool {
        matches!(self.local, Local::Ok) || self.remote_ok
    }

    /// The peer has it.
    pub const fn is_on_peer(&self) -> bool {
        self.remote_ok
    }

    /// Both copies are good.
    pub const fn is_on_both(&self) -> bool {
        matches!(self.local, Local::Ok) && self.remote_ok
    }

    /// Both copies are good and the peer has cleared its bits: the own ones may be cleared.
    pub const fn is_in_sync_on_peer(&self) -> bool {
        self.is_on_both() && self.peer_in_sync
    }

    /// May it leave the log, once it has been completed?
    pub const fn may_be_forgotten(&self) -> bool {
        let disk_has_it = matches!(self.local, Local::Pending | Local::Aborted);
        let peer_may_need_it = !matches!(self.remote, Remote::None) && !self.remote_done;
        !disk_has_it && !peer_may_need_it && !self.is_queued
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Happened::*;

    fn write(protocol: Protocol) -> Progress {
        Progress::new(true, Remote::Mirror(protocol))
    }

    fn after(mut progress: Progress, events: &[Happened]) -> Progress {
        for event in events {
            progress.on(*event);
        }
        progress
    }

    /// Spec §1.8: what completes a write, per protocol.
    #[test]
    fn a_write_completes_when_its_protocol_allows() {
        let done = |protocol, events: &[Happened]| after(write(protocol), events).is_finished();
        assert!(!done(Protocol::C, &[LocalOk, Sent]));
        assert!(done(Protocol::C, &[LocalOk, Sent, WriteAck]));
        assert!(!done(Protocol::C, &[Sent, WriteAck]), "the own disk has not answered");
        assert!(!done(Protocol::B, &[LocalOk, Sent]));
        assert!(done(Protocol::B, &[LocalOk, Sent, RecvAck]));
        assert!(!done(Protocol::A, &[LocalOk]), "still in our queue");
        assert!(done(Protocol::A, &[LocalOk, Sent]));
        assert!(done(Protocol::C, &[LocalOk, WriteAck]), "the answer overtakes the report");
    }

    #[test]
    fn a_write_fails_only_if_both_copies_failed() {
        assert!(after(write(Protocol::C), &[LocalError, Sent, WriteAck]).is_success());
        assert!(after(write(Protocol::C), &[LocalOk, Sent, NegAck]).is_success());
        assert!(!after(write(Protocol::C), &[LocalError, Sent, NegAck]).is_success());
        assert!(!after(write(Protocol::C), &[LocalError, ConnectionLost]).is_success());
        assert!(after(write(Protocol::A), &[LocalError, Sent]).is_success());
        assert!(!after(write(Protocol::A), &[LocalError, Sent, ConnectionLost]).is_success());
    }

    #[test]
    fn a_mirrored_write_is_kept_until_its_epoch_is_acknowledged() {
        let acked = after(write(Protocol::C), &[LocalOk, Sent, WriteAck]);
        assert!(!acked.may_be_forgotten());
        assert!(after(acked, &[BarrierAck]).may_be_forgotten());
        let lost = after(acked, &[ConnectionLost]);
        assert!(lost.may_be_forgotten() && !lost.is_on_both(), "its bits will be set");
        let refused = after(write(Protocol::C), &[LocalOk, Sent, NegAck]);
        assert!(!refused.may_be_forgotten(), "it still counts in its epoch");
    }

    #[test]
    fn an_aborted_write_is_kept_until_the_disk_lets_go() {
        let aborted = after(write(Protocol::C), &[LocalAborted, Sent, WriteAck, BarrierAck]);
        assert!(aborted.is_finished() && aborted.is_success() && !aborted.may_be_forgotten());
        let late = after(aborted, &[LocalError]);
        assert!(late.may_be_forgotten() && !late.is_on_both());
        assert_eq!(after(write(Protocol::C), &[LocalOk, LocalAborted]).local, Local::Ok);
    }

    /// Defect 14.8 of the original: what protocol A only handed to the transport was never sent
    /// again.
    #[test]
    fn defect_14_8_protocol_a_is_resent_until_its_barrier_ack() {
        let mut sent = after(write(Protocol::A), &[LocalOk, Sent]);
        assert!(sent.resend() && sent.is_pending());
        let mut acked = after(write(Protocol::A), &[LocalOk, Sent, BarrierAck]);
        assert!(!acked.resend());
    }

    #[test]
    fn only_what_a_barrier_confirmed_is_not_resent() {
        let mut flushed = after(write(Protocol::C), &[LocalOk, Sent, WriteAck, BarrierAck]);
        assert!(!flushed.resend() && flushed.may_be_forgotten() && flushed.is_on_both());
        let mut acked = after(write(Protocol::C), &[LocalOk, Sent, WriteAck]);
        assert!(acked.resend() && !acked.is_finished(), "it may be in a cache that is gone");
        let mut open = after(write(Protocol::C), &[LocalOk, Sent]);
        assert!(open.resend() && !open.is_finished());
        let mut read = Progress::new(false, Remote::Read);
        assert!(!read.resend());
    }

    #[test]
    fn only_a_barrier_ack_outlasts_a_suspension() {
        let acked = after(write(Protocol::C), &[LocalOk, Sent, WriteAck]);
        assert!(!acked.outlasts_suspension());
        assert!(after(acked, &[BarrierAck]).outlasts_suspension());
        assert!(!after(acked, &[ConnectionLost]).outlasts_suspension());
    }

    #[test]
    fn out_of_sync_reports_are_done_when_sent() {
        let report = Progress::new(true, Remote::OutOfSync);
        assert!(!report.is_finished());
        let sent = after(report, &[Sent, LocalOk]);
        assert!(sent.is_finished() && sent.may_be_forgotten() && !sent.is_on_both());
    }

    #[test]
    fn the_own_bits_are_cleared_only_with_both_copies_and_the_peers_word() {
        let both = after(write(Protocol::C), &[LocalOk, Sent, RsWriteAck, BarrierAck]);
        assert!(both.is_in_sync_on_peer());
        let own_failed = after(write(Protocol::C), &[LocalError, Sent, RsWriteAck, BarrierAck]);
        assert!(!own_failed.is_in_sync_on_peer());
        assert!(!after(both, &[ConnectionLost]).is_in_sync_on_peer());
    }

    #[test]
    fn reads_end_with_the_reply() {
        let read = Progress::new(false, Remote::Read);
        let replied = after(read, &[Sent, DataReply]);
        assert!(replied.is_finished() && replied.is_success() && replied.may_be_forgotten());
        let refused = after(read, &[Sent, NegDataReply]);
        assert!(refused.is_finished() && !refused.is_success() && refused.may_be_forgotten());
    }
}
