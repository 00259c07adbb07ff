//! Changes of the state vector: requests that may be refused, facts that may not, requests that
//! need the peer, and what follows at once. Spec: states-and-generations.md §2.6 to §2.8.
//!
//! What follows later, in the order of the changes, is in [`super::after`].

use alloc::format;
use alloc::vec::Vec;

use drbd_types::{Cstate, Dstate, Fields, Refusal, Role, StateWord, VolumeNr};
use drbd_wire::Packet;
use drbdmeta::superblock::Flags;

use crate::action::Action;
use crate::config::Fencing;
use crate::log_line::Severity;
use crate::state::check::{self, NetView};
use crate::state::cluster::{self, cluster_wide};
use crate::state::facts;
use crate::state::line;
use crate::state::sanitize::{Surroundings, sanitize};

use super::Core;
use super::after::Work;
use super::proc::Cx;

/// How a request is made.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Opt {
    /// A fact: only the hard rules count.
    pub(super) hard: bool,
    /// A refusal is logged.
    pub(super) verbose: bool,
    /// Until the consequences are carried out.
    pub(super) wait: bool,
    /// Under the state mutex.
    pub(super) serialize: bool,
    /// The peer is not asked.
    pub(super) local_only: bool,
    /// Outdating a disk that is worse than that is skipped.
    pub(super) ignore_outdate_failure: bool,
    /// A transient state is reported, not waited for.
    pub(super) once: bool,
}

impl Opt {
    pub(super) const HARD: Self = Self { hard: true, ..Self::QUIET };
    pub(super) const VERBOSE: Self = Self { verbose: true, ..Self::QUIET };
    pub(super) const QUIET: Self = Self {
        hard: false,
        verbose: false,
        wait: false,
        serialize: false,
        local_only: false,
        ignore_outdate_failure: false,
        once: false,
    };
    /// One try, not logged.
    pub(super) const QUIET_ATTEMPT: Self = Self { once: true, ..Self::QUIET };
    /// For commands: logged, one at a time, until everything is carried out.
    pub(super) const COMMAND: Self =
        Self { verbose: true, wait: true, serialize: true, ..Self::QUIET };
}

/// A change that was not refused. The numbers are those of the original's codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Done {
    /// Something changed.
    Changed,
    /// It was so already.
    Nothing,
}

pub(super) type Changed = Result<Done, Refusal>;

/// A part of a state vector: which bits, and their values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) mask: StateWord,
    pub(super) val: StateWord,
}

impl Wanted {
    pub(super) const NOTHING: Self = Self { mask: StateWord(0), val: StateWord(0) };

    pub(super) const fn role(role: Role) -> Self {
        Self::NOTHING.and(StateWord::ROLE, role.number() as u32)
    }

    pub(super) const fn conn(conn: Cstate) -> Self {
        Self::NOTHING.and(StateWord::CONN, (conn.number() as u32) << 4)
    }

    pub(super) const fn disk(disk: Dstate) -> Self {
        Self::NOTHING.and_disk(disk)
    }

    pub(super) const fn pdsk(pdsk: Dstate) -> Self {
        Self::NOTHING.and_pdsk(pdsk)
    }

    pub(super) const fn and_disk(self, disk: Dstate) -> Self {
        self.and(StateWord::DISK, (disk.number() as u32) << 9)
    }

    pub(super) const fn and_pdsk(self, pdsk: Dstate) -> Self {
        self.and(StateWord::PDSK, (pdsk.number() as u32) << 13)
    }

    /// One of the flags.
    pub(super) const fn flag(flag: StateWord, is_set: bool) -> Self {
        Self::NOTHING.and(flag, if is_set { flag.0 } else { 0 })
    }

    const fn and(self, mask: StateWord, val: u32) -> Self {
        Self { mask: StateWord(self.mask.0 | mask.0), val: StateWord(self.val.0 & !mask.0 | val) }
    }

    /// Does it name this part?
    pub(super) const fn has(self, part: StateWord) -> bool {
        self.mask.0 & part.0 != 0
    }

    /// Without this part.
    pub(super) const fn without(self, part: StateWord) -> Self {
        Self { mask: StateWord(self.mask.0 & !part.0), val: StateWord(self.val.0 & !part.0) }
    }

    pub(super) fn apply(self, to: &Fields) -> Fields {
        // Only words of our own, or words that were checked when they came.
        cluster::apply(*to, self.mask, self.val).unwrap_or(*to)
    }
}

impl Core {
    /// What sanitising needs besides the states.
    pub(super) fn surroundings(&self, nr: VolumeNr) -> Surroundings {
        let volume = self.volume(nr);
        Surroundings {
            fencing: volume.map_or(Fencing::DontCare, |v| v.config.fencing),
            on_no_data: self.config.on_no_data,
            candidate: volume.and_then(|v| v.candidate),
            exposed_is_current: volume
                .is_some_and(|v| v.disk.is_some() && v.exposed == v.slots().current),
        }
    }

    /// What the rules need to know.
    fn net_view(&self, nr: VolumeNr) -> check::Cx {
        let net = self.conn.net.as_ref();
        let volume = self.volume(nr);
        check::Cx {
            net: NetView {
                present: net.is_some(),
                two_primaries: net.is_some_and(|n| n.two_primaries),
                has_verify_alg: net.is_some_and(|n| !n.verify_alg.is_empty()),
                version: self.conn.version,
                peer_is_primary_elsewhere: self
                    .volumes
                    .values()
                    .any(|v| v.nr != nr && v.state.peer == Role::Primary),
            },
            fencing: volume.map_or(Fencing::DontCare, |v| v.config.fencing),
            is_open: volume.is_some_and(|v| v.users > 0),
            state_sent: self.conn.state_sent,
        }
    }

    /// A fact about one volume.
    pub(super) fn force(&mut self, nr: VolumeNr, change: impl FnOnce(&mut Fields)) -> Changed {
        let mut new = self.state(nr);
        change(&mut new);
        self.set_state(nr, new, Opt::HARD)
    }

    /// Decides about a change and stores it. Spec §2.6 `set_state`.
    pub(super) fn set_state(&mut self, nr: VolumeNr, new: Fields, opt: Opt) -> Changed {
        let old = self.state(nr);
        let (new, warning) = sanitize(&old, new, &self.surroundings(nr));
        if new == old {
            return Ok(Done::Nothing);
        }
        self.check(nr, &old, &new, opt)?;
        if let Some(warning) = warning {
            self.log(Severity::Warn, Some(nr), warning.text());
        }
        if let Some(text) = line::change(&old, &new) {
            self.info(nr, text);
        }
        if let Some(text) = line::suspension(&old, &new) {
            self.log(Severity::Info, None, text);
        }
        self.store(nr, &old, &new);
        Ok(Done::Changed)
    }

    fn check(&mut self, nr: VolumeNr, old: &Fields, new: &Fields, opt: Opt) -> Result<(), Refusal> {
        let result = check::hard(old, new).and_then(|()| {
            if opt.hard { Ok(()) } else { check::check(old, new, &self.net_view(nr)) }
        });
        if let Err(refusal) = result {
            self.log_refusal(nr, old, new, refusal, opt);
        }
        result
    }

    fn log_refusal(
        &mut self,
        nr: VolumeNr,
        old: &Fields,
        new: &Fields,
        refusal: Refusal,
        opt: Opt,
    ) {
        if opt.verbose {
            for text in line::refused(refusal, old, new).into_iter().flatten() {
                self.log(Severity::Error, Some(nr), text);
            }
        }
    }

    /// Stores a state and does what follows at once. Spec §2.8.
    fn store(&mut self, nr: VolumeNr, old: &Fields, new: &Fields) {
        self.state_version += 1;
        self.touch();
        if let Some(volume) = self.volume_mut(nr) {
            volume.state = *new;
        }
        // The suspend bits belong to the resource.
        for volume in self.volumes.values_mut() {
            volume.state.susp = new.susp;
            volume.state.susp_nod = new.susp_nod;
            volume.state.susp_fen = new.susp_fen;
        }
        self.follow_at_once(nr, old, new);
        self.queue_work(Work::Volume { nr, old: *old, new: *new });
        self.out.push(Action::Changed);
    }

    fn follow_at_once(&mut self, nr: VolumeNr, old: &Fields, new: &Fields) {
        if facts::must_replicate(old) != facts::must_replicate(new) {
            self.close_epoch();
        }
        if old.disk == Dstate::Attaching && new.disk >= Dstate::Negotiating {
            self.log_slots(nr, "attached to UUIDs");
        }
        if old.conn == Cstate::WFReportParams
            && new.conn != Cstate::WFReportParams
            && !self.volumes.values().any(|v| v.state.conn == Cstate::WFReportParams)
        {
            self.conn.state_sent = false;
        }
        self.follow_resumption(nr, old, new);
        // The former needs what the latter forgets.
        self.note_generation_due(nr, old, new);
        self.follow_resync(nr, old, new);
        self.follow_flags(nr, old, new);
        if old.disk == Dstate::Inconsistent
            && old.pdsk == Dstate::Inconsistent
            && old.peer == Role::Secondary
            && new.peer == Role::Primary
            && let Some(volume) = self.volume_mut(nr)
        {
            volume.marks.consider_resync = true;
        }
        if old.conn < Cstate::Connected && new.conn >= Cstate::Connected {
            self.conn.connects += 1;
            if let Some(volume) = self.volume_mut(nr)
                && core::mem::take(&mut volume.marks.al_suspended)
            {
                volume.marks.wrote_without_log = true;
                self.info(nr, "Resumed AL updates");
            }
        }
        if old.disk != Dstate::Failed
            && new.disk == Dstate::Failed
            && let Some(volume) = self.volume_mut(nr)
        {
            volume.marks.failure_untold = true;
            if facts::report_out_of_sync(old) {
                volume.peer_lacking = Some(volume.exposed);
            }
        }
        self.announce_device(nr);
    }

    /// The stored flags follow the state. Spec §3.6, §2.8 step 11.
    fn follow_flags(&mut self, nr: VolumeNr, old: &Fields, new: &Fields) {
        let Some(volume) = self.volume_mut(nr) else { return };
        if new.disk < Dstate::Inconsistent {
            return;
        }
        let crashed = volume.marks.crashed_primary;
        let Some(disk) = volume.disk.as_mut() else { return };
        let mut flags = facts::stored_flags(disk.superblock.flags, new, crashed);
        // Bits that are only in memory are covered by the activity log until they are on disk, and
        // nobody looks at the log of a Secondary.
        if disk.has_unwritten_bits() {
            flags |= disk.superblock.flags & Flags::PRIMARY;
        }
        let has_changed = flags != disk.superblock.flags;
        disk.superblock.flags = flags;
        if old.disk < Dstate::Consistent && new.disk >= Dstate::Consistent {
            volume.exposed = disk.superblock.current;
            volume.lacking = None;
            // This disk has them: that is to be seen from its identifiers.
            let lacking = volume.peer_lacking.take();
            if lacking.is_some_and(|lacking| lacking.same(disk.superblock.current)) {
                volume.marks.generation_due = true;
            }
        }
        if has_changed {
            self.mark_dirty(nr);
        }
    }

    // ---- connection level ----

    /// A fact about the connection.
    pub(super) fn force_conn(&mut self, conn: Cstate) {
        // A lost connection stays lost in the way in which it was lost first (rule H5).
        let _ = self.set_conn(Wanted::conn(conn), Opt::HARD);
    }

    /// Decides about a change of all volumes and stores it. Spec §2.7 `conn_request`, without the
    /// part that asks the peer.
    pub(super) fn set_conn(&mut self, wanted: Wanted, opt: Opt) -> Changed {
        self.check_conn(wanted, opt)?;
        let old_level = self.conn.level;
        let numbers: Vec<VolumeNr> = self.volume_numbers().collect();
        let old: Vec<Fields> = numbers.iter().map(|nr| self.state(*nr)).collect();
        let new_level = self.wanted_level(wanted);
        self.conn.level = new_level;
        let mut has_changed = old_level != new_level;
        let mut news = Vec::with_capacity(numbers.len());
        for (nr, before) in numbers.iter().zip(&old) {
            // A volume before may have changed the suspend bits, which all share.
            let now = self.state(*nr);
            let wanted_state = self.skip_outdating(before, wanted.apply(&now), opt);
            let (new, warning) = sanitize(&now, wanted_state, &self.surroundings(*nr));
            if new != now {
                if let Some(warning) = warning {
                    self.log(Severity::Warn, Some(*nr), warning.text());
                }
                has_changed = true;
                self.store(*nr, &now, &new);
            }
            news.push(self.state(*nr));
        }
        let changes: Vec<(Fields, Fields)> = old.into_iter().zip(news).collect();
        let lines = line::connection_change((old_level, new_level), &changes);
        for (nr, text) in numbers.iter().zip(lines.volumes) {
            if let Some(text) = text {
                self.info(*nr, text);
            }
        }
        if let Some(text) = lines.connection {
            self.log(Severity::Info, None, text);
        }
        if !has_changed {
            return Ok(Done::Nothing);
        }
        self.touch();
        self.state_version += 1;
        self.out.push(Action::Changed);
        self.queue_work(Work::Connection { old: old_level, new: new_level });
        Ok(Done::Changed)
    }

    fn wanted_level(&self, wanted: Wanted) -> Cstate {
        if wanted.has(StateWord::CONN) {
            conn_number(wanted.val).and_then(Cstate::from_number).unwrap_or(self.conn.level)
        } else {
            self.conn.level
        }
    }

    fn skip_outdating(&self, old: &Fields, mut new: Fields, opt: Opt) -> Fields {
        if opt.ignore_outdate_failure && new.disk == Dstate::Outdated && old.disk < Dstate::Outdated
        {
            new.disk = old.disk;
        }
        new
    }

    /// The checks of a change of all volumes; the first refusal counts.
    fn check_conn(&mut self, wanted: Wanted, opt: Opt) -> Result<(), Refusal> {
        let level = self.conn.level;
        let new_level = self.wanted_level(wanted);
        if wanted.has(StateWord::CONN) {
            check::hard_conn(level, new_level)?;
        }
        for nr in self.volume_numbers() {
            let old = self.state(nr);
            let asked = self.skip_outdating(&old, wanted.apply(&old), opt);
            let (new, _) = sanitize(&old, asked, &self.surroundings(nr));
            if new != old
                && let Err(refusal) = self.check(nr, &old, &new, opt)
            {
                if opt.verbose {
                    let lines = line::refused_connection(refusal, level, wanted.mask, wanted.val);
                    for text in lines.into_iter().flatten() {
                        self.log(Severity::Error, None, text);
                    }
                }
                return Err(refusal);
            }
        }
        Ok(())
    }

    // ---- the peer's requests ----

    /// P_STATE_CHG_REQ and, below version 100 or for the connection, P_CONN_ST_CHG_REQ.
    /// Returns the answer. Spec §2.7 "Answering side".
    pub(super) fn answer_state_request(
        &mut self,
        nr: VolumeNr,
        mask: StateWord,
        val: StateWord,
        is_connection: bool,
    ) -> i32 {
        let is_locked = if is_connection { self.conn.is_locked } else { self.is_state_locked(nr) };
        if self.conn.resolve_conflicts && is_locked {
            return Refusal::ConcurrentChange.number();
        }
        let (mask, val) = cluster::from_peer(mask, val);
        let wanted = Wanted { mask, val };
        let asked = self.wanted_level(wanted);
        let result = if is_connection
            && !matches!(asked, Cstate::Disconnecting | Cstate::TearDown)
            && asked != self.conn.level
        {
            // Only the end of the connection is the peer's to ask for.
            Err(Refusal::NotSupported)
        } else if is_connection {
            let opt = Opt { local_only: true, ignore_outdate_failure: true, ..Opt::VERBOSE };
            self.set_conn(wanted, opt)
        } else {
            match cluster::apply(self.state(nr), mask, val) {
                Ok(new) if self.would_replace_good_data(nr, &new) => Err(Refusal::NoUpToDateDisk),
                // A volume does not leave the connection alone, or nothing could end that any more.
                Ok(new)
                    if new.role == Role::Unknown
                        || (new.conn < Cstate::WFReportParams
                            && new.conn != self.state(nr).conn) =>
                {
                    Err(Refusal::NotSupported)
                }
                Ok(new) => self.set_state(nr, new, Opt::VERBOSE),
                Err(_) => Err(Refusal::NotSupported),
            }
        };
        match result {
            Ok(Done::Changed) => 1,
            Ok(Done::Nothing) => 2,
            Err(refusal) => refusal.number(),
        }
    }

    /// The peer, a Primary, asks to give up its disk while ours lacks its last writes. With an
    /// Outdated one the end of the exchange of bitmaps would upgrade ours; with an Inconsistent one
    /// the peer would refuse itself after our consent, which has ended the resync here alone.
    fn would_replace_good_data(&self, nr: VolumeNr, new: &Fields) -> bool {
        let old = self.state(nr);
        new.peer == Role::Primary
            && new.pdsk <= Dstate::Failed
            && old.pdsk > Dstate::Failed
            && old.disk < Dstate::UpToDate
    }

    /// Which mutex guards a volume's state: below version 100 all share that of the connection.
    pub(super) fn is_state_locked(&self, nr: VolumeNr) -> bool {
        if self.shares_mutex() {
            self.conn.is_locked
        } else {
            self.volume(nr).is_some_and(|v| v.is_locked)
        }
    }

    const fn shares_mutex(&self) -> bool {
        // Before the first connection the version is 80, but there is nobody to share with.
        self.conn.version >= 86 && self.conn.version < 100
    }

    fn set_state_locked(&mut self, nr: VolumeNr, is_locked: bool) {
        if self.shares_mutex() {
            self.conn.is_locked = is_locked;
        } else if let Some(volume) = self.volume_mut(nr) {
            volume.is_locked = is_locked;
        }
        self.touch();
    }
}

/// Takes the state mutex of a volume.
pub(super) async fn lock(cx: &Cx, nr: VolumeNr) -> Lock {
    cx.until(move |core| {
        if core.is_state_locked(nr) {
            return None;
        }
        let is_shared = core.shares_mutex();
        core.set_state_locked(nr, true);
        Some(Lock { nr, is_shared })
    })
    .await
}

/// A state mutex that is held.
#[must_use]
pub(super) struct Lock {
    nr: VolumeNr,
    /// It was taken on the connection.
    is_shared: bool,
}

impl Lock {
    pub(super) fn release(self, cx: &Cx) {
        cx.with(|core| {
            if self.is_shared {
                core.conn.is_locked = false;
            } else if let Some(volume) = core.volume_mut(self.nr) {
                volume.is_locked = false;
            }
            core.touch();
        });
    }
}

/// Waits until the consequences of everything that happened so far are carried out.
pub(super) async fn settled(cx: &Cx) {
    let queued = cx.with(|core| core.work_queued);
    cx.until(move |core| (core.work_done >= queued).then_some(())).await;
}

/// A request for one volume. In a transient state it waits for the next change.
/// Spec §2.6 `request`.
pub(super) async fn request(cx: &Cx, nr: VolumeNr, wanted: Wanted, opt: Opt) -> Changed {
    loop {
        let version = cx.with(|core| core.state_version);
        let lock = if opt.serialize { Some(lock(cx, nr).await) } else { None };
        let result = attempt(cx, nr, wanted, opt).await;
        if let Some(lock) = lock {
            lock.release(cx);
        }
        if opt.once || result != Err(Refusal::InTransientState) {
            if opt.wait && result == Ok(Done::Changed) {
                settled(cx).await;
            }
            return result;
        }
        cx.until(move |core| (core.state_version != version).then_some(())).await;
    }
}

async fn attempt(cx: &Cx, nr: VolumeNr, wanted: Wanted, opt: Opt) -> Changed {
    let (old, new) = cx.with(|core| {
        let old = core.state(nr);
        let (new, _) = sanitize(&old, wanted.apply(&old), &core.surroundings(nr));
        (old, new)
    });
    check::hard(&old, &new)?;
    let asks = !opt.hard && cluster_wide(&old, &new);
    if asks {
        let asked = ask_peer(cx, nr, wanted, &old, &new).await;
        if let Err(refusal) = asked {
            cx.with(|core| core.log_refusal(nr, &old, &new, refusal, opt));
            return Err(refusal);
        }
    }
    cx.with(|core| {
        let state = core.state(nr);
        let result = core.set_state(nr, wanted.apply(&state), opt);
        let state = core.state(nr);
        if asks && wanted.apply(&state) != state && state.conn >= Cstate::Connected {
            // Something came between: the peer, which consented, takes it for done.
            core.send_state(nr, state);
        }
        result
    })
}

/// Asks the peer, unless it turns out that this is not necessary any more.
async fn ask_peer(
    cx: &Cx,
    nr: VolumeNr,
    wanted: Wanted,
    old: &Fields,
    new: &Fields,
) -> Result<(), Refusal> {
    cx.with(|core| {
        // Here "it was illegal before" is no excuse.
        check::check_cluster_wide(old, new, &core.net_view(nr))?;
        if !core.conn.is_up {
            return Err(Refusal::FailedByPeer);
        }
        if let Some(volume) = core.volume_mut(nr) {
            volume.reply = None;
        }
        core.send(nr, Packet::StateChgReq(wanted.mask, wanted.val));
        Ok(())
    })?;
    cx.until(move |core| {
        if let Some(reply) = core.volume_mut(nr).and_then(|v| v.reply.take()) {
            return Some(if reply >= 1 { Ok(()) } else { Err(Refusal::FailedByPeer) });
        }
        let old = core.state(nr);
        let (new, _) = sanitize(&old, wanted.apply(&old), &core.surroundings(nr));
        if let Err(refusal) = check::hard(&old, &new) {
            return Some(Err(refusal));
        }
        if !cluster_wide(&old, &new) {
            return Some(Ok(()));
        }
        check::check_cluster_wide(&old, &new, &core.net_view(nr)).err().map(Err)
    })
    .await
}

/// A request for the connection. Spec §2.7 `conn_request`.
pub(super) async fn conn_request(cx: &Cx, wanted: Wanted, opt: Opt) -> Changed {
    let disconnects = conn_number(wanted.val) == Some(Cstate::Disconnecting.number())
        && wanted.has(StateWord::CONN);
    let asks = cx.with(|core| {
        disconnects
            && core.conn.level == Cstate::WFReportParams
            && core.conn.is_up
            && !opt.local_only
            && !opt.hard
    });
    if asks {
        cx.with(|core| core.check_conn(wanted, opt))?;
        cx.until(|core| {
            let is_free = !core.conn.is_locked;
            core.conn.is_locked |= is_free;
            is_free.then_some(())
        })
        .await;
        let result = ask_peer_to_disconnect(cx, wanted, opt).await;
        cx.with(|core| {
            core.conn.is_locked = false;
            core.touch();
        });
        if let Err(refusal) = result {
            if opt.verbose && refusal != Refusal::InTransientState {
                cx.with(|core| {
                    let text = format!("State change failed: {}", refusal.text());
                    core.log(Severity::Error, None, text);
                });
            }
            return Err(refusal);
        }
    }
    let result = cx.with(|core| core.set_conn(wanted, opt));
    if opt.wait && result == Ok(Done::Changed) {
        settled(cx).await;
    }
    result
}

async fn ask_peer_to_disconnect(cx: &Cx, wanted: Wanted, opt: Opt) -> Result<(), Refusal> {
    cx.with(|core| {
        core.conn.reply = None;
        core.conn.disconnect_sent = true;
        let packet = if core.conn.version >= 100 {
            Packet::ConnStChgReq(wanted.mask, wanted.val)
        } else {
            Packet::StateChgReq(wanted.mask, wanted.val)
        };
        core.send(VolumeNr(0), packet);
    });
    cx.until(move |core| {
        if let Some(reply) = core.conn.reply.take() {
            return Some(if reply >= 1 { Ok(()) } else { Err(Refusal::FailedByPeer) });
        }
        if core.conn.level != Cstate::WFReportParams {
            return Some(Ok(()));
        }
        match core.check_conn(wanted, Opt { verbose: false, ..opt }) {
            Err(refusal) => Some(Err(refusal)),
            Ok(()) => None,
        }
    })
    .await
}

impl Core {
    /// P_STATE_CHG_REPLY, P_CONN_ST_CHG_REPLY.
    pub(super) fn on_state_reply(&mut self, nr: VolumeNr, code: i32, is_connection: bool) {
        if code < 1 {
            let whom = if is_connection { None } else { Some(nr) };
            self.log(Severity::Error, whom, line::refused_by_peer(code));
        }
        // Below version 100 both kinds have the same answer.
        if is_connection || (self.conn.version < 100 && self.conn.disconnect_sent) {
            self.conn.reply = Some(code);
        } else if let Some(volume) = self.volume_mut(nr) {
            volume.reply = Some(code);
        }
        self.touch();
    }
}

/// The connection state of a word, as a number.
fn conn_number(word: StateWord) -> Option<u8> {
    u8::try_from(word.0 >> 4 & 31).ok()
}
