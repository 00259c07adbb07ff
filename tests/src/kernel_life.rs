//! A pair to which much happens: commands on both sides, writes of the Primary, and how an
//! administrator brings it together again.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use drbd_core::admin::Command as Order;
use drbd_core::config::{NetConfig, Protocol};
use drbd_types::{Cstate, Dstate, Role, Sector};

use crate::kernel_pair::{Both, LONG, VOLUME, fresh_image, net_config};
use crate::packet_proxy::Sender;
use crate::proc_status::{Fields, agree, text};

/// Commands of one side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Disconnect and connect.
    Reconnect,
    /// The Secondary's data is thrown away.
    Invalidate,
    /// Online verify.
    Verify,
    /// Detach, and attach again.
    Detach,
    /// Pause and resume the resync.
    Pause,
    /// The Primary becomes Secondary and Primary again; a Secondary declares itself Outdated.
    Role,
}

/// All of them.
pub const ACTS: [Act; 6] =
    [Act::Reconnect, Act::Invalidate, Act::Verify, Act::Detach, Act::Pause, Act::Role];

/// The pair. Only one side is ever Primary, so no split brain can come of what happens.
pub struct Life {
    /// Both nodes.
    pub both: Both,
    net: NetConfig,
    /// Who is meant to be Primary.
    pub primary: Sender,
    written: u64,
}

impl Life {
    /// A new pair in a new guest, in sync.
    ///
    /// # Errors
    /// It does not come up.
    pub fn begin(primary: Sender) -> Result<Self> {
        let mut both = Both::boot(fresh_image(b'r')?)?;
        let net = NetConfig { verify_alg: "crc32c".into(), ..net_config(Protocol::C) };
        both.fresh(&net, "verify-alg crc32c;", "")?;
        let mut life = Self { both, net, primary, written: 0 };
        life.settle()?;
        Ok(life)
    }

    /// The Primary begins to write some blocks, each time other ones.
    ///
    /// # Errors
    /// A node is gone.
    pub fn write(&mut self) -> Result<()> {
        self.written += 1;
        let block = self.written * 37 % 1500;
        if self.primary == Sender::Own {
            let data = vec![u8::try_from(self.written % 250)?; 3 * 4096];
            let op = self.both.own.write_op(block * 8, data)?;
            return self.both.own.begin(0, op).map(drop);
        }
        let script = format!(
            "dd if=/dev/urandom of=/dev/drbd0 bs=4k seek={block} count=3 oflag=direct 2>&1"
        );
        self.both.kernel.guest.spawn(&script).map(drop)
    }

    /// The link breaks; both sides have noticed.
    ///
    /// # Errors
    /// They do not.
    pub fn cut(&self) -> Result<()> {
        self.both.cut(true);
        self.both.own.wait("the loss", |s| s.conn < Cstate::Connected)?;
        self.both.kernel.guest.wait_for("! grep -q cs:Connected /proc/drbd", LONG).map(drop)
    }

    /// Both sides act at once; `meanwhile` runs when they have begun. Commands may be refused.
    ///
    /// # Errors
    /// A command gets no answer.
    pub fn act(
        &mut self,
        own: Option<Act>,
        kernel: Option<Act>,
        meanwhile: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let script = kernel.map(|act| self.script(act));
        let job = script.map(|script| self.both.kernel.guest.spawn(&script)).transpose()?;
        let mut tickets = Vec::new();
        for order in own.map(|act| self.orders(act)).unwrap_or_default() {
            tickets.push((format!("{order:?}"), self.both.own.begin_command(order)?));
            sleep(Duration::from_millis(50));
        }
        meanwhile(self)?;
        for (what, ticket) in tickets {
            self.both.own.finish_command(ticket, &what)?;
        }
        if let Some(job) = job {
            job.wait(LONG)?;
        }
        Ok(())
    }

    fn orders(&self, act: Act) -> Vec<Order> {
        let is_primary = self.primary == Sender::Own;
        match act {
            Act::Reconnect => {
                vec![Order::Disconnect { force: false }, Order::Connect(Box::new(self.net.clone()))]
            }
            Act::Invalidate if is_primary => vec![Order::InvalidateRemote(VOLUME)],
            Act::Invalidate => vec![Order::Invalidate(VOLUME)],
            Act::Verify => {
                vec![Order::Verify { volume: VOLUME, start: Some(Sector(0)), stop: None }]
            }
            // It is attached again by `settle`: the activity log is applied first.
            Act::Detach => vec![Order::Detach { volume: VOLUME, force: false }],
            Act::Pause => vec![Order::PauseSync(VOLUME), Order::ResumeSync(VOLUME)],
            Act::Role if is_primary => {
                vec![Order::Secondary(VOLUME), Order::Primary { volume: VOLUME, force: false }]
            }
            Act::Role => vec![Order::Outdate(VOLUME)],
        }
    }

    fn script(&self, act: Act) -> String {
        let is_primary = self.primary == Sender::Kernel;
        let script = match act {
            Act::Reconnect => "drbdadm disconnect r0; drbdadm connect r0",
            Act::Invalidate if is_primary => "drbdadm invalidate-remote r0",
            Act::Invalidate => "drbdadm invalidate r0",
            Act::Verify => "drbdadm verify r0",
            Act::Detach => "drbdadm detach r0; drbdadm attach r0",
            Act::Pause => "drbdadm pause-sync r0; drbdadm resume-sync r0",
            Act::Role if is_primary => "drbdadm secondary r0; drbdadm primary r0",
            Act::Role => "drbdadm outdate r0",
        };
        format!("( {script} ) 2>&1")
    }

    /// The engine loses power and comes back.
    ///
    /// # Errors
    /// Its meta-data is unusable.
    pub fn crash_own(&mut self) -> Result<()> {
        self.both.crash()?;
        self.both.attach()?;
        self.both.own.ok(Order::Connect(Box::new(self.net.clone())))
    }

    /// The guest loses power and comes back.
    ///
    /// # Errors
    /// It does not come up.
    pub fn crash_kernel(&mut self) -> Result<()> {
        self.both.kernel.guest.power_cut()?;
        self.both.start_kernel("verify-alg crc32c;")
    }

    /// The other side becomes Primary. All is well before.
    ///
    /// # Errors
    /// The Primary does not step down.
    pub fn swap_roles(&mut self) -> Result<()> {
        match self.primary {
            Sender::Own => self.both.own.ok(Order::Secondary(VOLUME))?,
            Sender::Kernel => {
                self.both.kernel.guest.wait_for("drbdadm secondary r0", LONG)?;
            }
        }
        self.primary = self.primary.other();
        Ok(())
    }

    /// What an administrator would do, until all is well: both connected and UpToDate, disks equal,
    /// and both status views agree.
    ///
    /// # Errors
    /// They do not come together.
    pub fn settle(&mut self) -> Result<()> {
        let outcome = self.come_together();
        self.both.tell(outcome)
    }

    fn come_together(&mut self) -> Result<()> {
        let start = Instant::now();
        loop {
            self.help_own()?;
            let is_well = self.help_kernel()?;
            let s = self.both.own.state()?;
            if is_well
                && s.conn == Cstate::Connected
                && (s.disk, s.pdsk) == (Dstate::UpToDate, Dstate::UpToDate)
                && (s.role == Role::Primary) == (self.primary == Sender::Own)
            {
                break;
            }
            if start.elapsed() > LONG {
                bail!("the pair does not come together: {s:?}");
            }
            sleep(Duration::from_millis(100));
        }
        self.views_agree()?;
        self.both.compare()
    }

    fn help_own(&mut self) -> Result<()> {
        let s = self.both.own.state()?;
        let own = &mut self.both.own;
        if s.user_isp {
            own.command(Order::ResumeSync(VOLUME))?;
        }
        if s.conn == Cstate::StandAlone {
            own.command(Order::Connect(Box::new(self.net.clone())))?;
        }
        if self.primary == Sender::Own && s.role == Role::Secondary && s.disk == Dstate::UpToDate {
            own.command(Order::Primary { volume: VOLUME, force: false })?;
        }
        if s.disk == Dstate::Diskless {
            // Perhaps it is attached by the time.
            let _ = self.both.attach_again();
        }
        Ok(())
    }

    fn help_kernel(&self) -> Result<bool> {
        let shown = self.both.kernel.shown()?;
        let mut script = String::new();
        if shown.cstate.starts_with("PausedSync") {
            script += "drbdadm resume-sync r0;";
        }
        if shown.cstate == "StandAlone" {
            script += "drbdadm connect r0;";
        }
        if shown.disks.starts_with("Diskless") {
            script += "drbdadm attach r0;";
        }
        let is_primary = shown.roles.starts_with("Primary");
        if self.primary == Sender::Kernel && !is_primary && shown.disks.starts_with("UpToDate") {
            script += "drbdadm primary r0;";
        }
        if !script.is_empty() {
            self.both.kernel.guest.run(&script)?;
        }
        Ok(shown.cstate == "Connected"
            && shown.disks == "UpToDate/UpToDate"
            && is_primary == (self.primary == Sender::Kernel))
    }

    /// `/proc/drbd` of both sides agree, as soon as nothing is under way.
    ///
    /// # Errors
    /// They don't.
    pub fn views_agree(&self) -> Result<()> {
        let start = Instant::now();
        loop {
            let own = text(&self.both.own.status()?, "C");
            let kernel = self.both.kernel.guest.proc_drbd()?;
            let agreed = agree(&Fields::of(&own, 0)?, &Fields::of(&kernel, 0)?);
            if agreed.is_ok() || start.elapsed() > Duration::from_secs(20) {
                return agreed.with_context(|| format!("{own}\n{kernel}"));
            }
            ensure!(self.both.own.state()?.conn >= Cstate::Connected, "the link was lost");
            sleep(Duration::from_millis(100));
        }
    }
}
