//! The engine and the Linux DRBD 8.4 as one pair: split brain and its policies, fencing, sizes,
//! congestion, and disks that move from one implementation to the other.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use drbd_core::action::Handler;
use drbd_core::admin::Command;
use drbd_core::config::{DiskConfig, Fencing, NetConfig, OnCongestion, Protocol};
use drbd_core::generation::splitbrain::{OnePrimary, Policies, TwoPrimaries, ZeroPrimaries};
use drbd_types::{Cstate, Dstate, SectorCount};
use drbdrs_tests::interop::row;
use drbdrs_tests::kernel_pair::{
    Both, LONG, VOLUME, apply_al, data_len, disk_config, fresh_image, net_config,
};
use libtest_mimic::Arguments;

fn main() {
    let args = Arguments::from_args();
    let tests = vec![
        row(5, "both", "split_brain_and_all_policies", split_brain),
        row(5, "Primary", "fencing_on_both_sides", fencing),
        row(6, "Primary", "sizes_change_from_either_side", sizes),
        row(6, "Primary", "congestion_ahead_and_behind", congestion),
        row(7, "both", "a_disk_moves_between_the_implementations", migration),
    ];
    libtest_mimic::run(&args, tests).exit();
}

/// A row: policies in the spelling of both, who is Primary at the reconnect, and what comes out.
struct Row {
    zero: ZeroPrimaries,
    one: OnePrimary,
    two: TwoPrimaries,
    own_primary: bool,
    kernel_primary: bool,
    kernel_words: &'static str,
    /// `Some(true)`: the engine is the source; `None`: unresolved.
    source: Option<bool>,
}

const fn outcome(
    zero: ZeroPrimaries,
    kernel_words: &'static str,
    primaries: (bool, bool),
    source: Option<bool>,
) -> Row {
    let (own_primary, kernel_primary) = primaries;
    let (one, two) = (OnePrimary::Disconnect, TwoPrimaries::Disconnect);
    Row { zero, one, two, own_primary, kernel_primary, kernel_words, source }
}

/// We were Primary when the link broke and wrote five blocks, then the kernel was and wrote three.
fn split_brain() -> Result<()> {
    use ZeroPrimaries::{
        DiscardLeastChanges, DiscardLocal, DiscardOlderPrimary, DiscardRemote,
        DiscardYoungerPrimary, DiscardZeroChanges, Disconnect,
    };
    let nobody = (false, false);
    let rows = [
        outcome(Disconnect, "", nobody, None),
        outcome(
            DiscardYoungerPrimary,
            "after-sb-0pri discard-younger-primary;",
            nobody,
            Some(true),
        ),
        outcome(DiscardOlderPrimary, "after-sb-0pri discard-older-primary;", nobody, Some(false)),
        outcome(DiscardZeroChanges, "after-sb-0pri discard-zero-changes;", nobody, None),
        outcome(DiscardLeastChanges, "after-sb-0pri discard-least-changes;", nobody, Some(true)),
        outcome(DiscardLocal, "after-sb-0pri discard-node-bravo;", nobody, Some(false)),
        outcome(DiscardRemote, "after-sb-0pri discard-node-alpha;", nobody, Some(true)),
        Row {
            one: OnePrimary::DiscardSecondary,
            ..outcome(Disconnect, "after-sb-1pri discard-secondary;", (true, false), Some(true))
        },
        Row {
            one: OnePrimary::DiscardSecondary,
            ..outcome(Disconnect, "after-sb-1pri discard-secondary;", (false, true), Some(false))
        },
        Row {
            one: OnePrimary::Consensus,
            ..outcome(
                DiscardOlderPrimary,
                "after-sb-0pri discard-older-primary; after-sb-1pri consensus;",
                (true, false),
                None,
            )
        },
    ];
    let mut both = Both::boot(fresh_image(0)?)?;
    for row in &rows {
        one_split(&mut both, row).with_context(|| {
            format!("{} {:?}", row.kernel_words, (row.own_primary, row.kernel_primary))
        })?;
    }
    Ok(())
}

fn one_split(both: &mut Both, row: &Row) -> Result<()> {
    let policies = Policies { zero: row.zero, one: row.one, two: row.two };
    let net = NetConfig { after_sb: policies, ..net_config(Protocol::C) };
    both.fresh(&net, row.kernel_words, "")?;
    both.own.ok(Command::Primary { volume: VOLUME, force: false })?;
    both.cut(true);
    both.own.wait("the loss", |s| s.conn < Cstate::Connected)?;
    both.kernel.guest.wait_for("! grep -q 'cs:Connected' /proc/drbd", LONG)?;
    both.own.write(0, vec![b'o'; 5 * 4096])?;
    if !row.own_primary {
        both.own.ok(Command::Secondary(VOLUME))?;
    }
    both.kernel.guest.ok(
        "drbdadm primary r0 && dd if=/dev/urandom of=/dev/drbd0 bs=4k seek=100 count=3 oflag=direct",
    )?;
    if !row.kernel_primary {
        both.kernel.guest.ok("drbdadm secondary r0")?;
    }
    both.kernel.guest.take_log()?;
    both.cut(false);
    match row.source {
        Some(is_source) => {
            both.in_sync()?;
            both.compare()?;
            let side = if is_source { "this node" } else { "peer node" };
            let log = both.own.log();
            let text = format!("automatically solved. Sync from {side}");
            both.ensure(log.contains(&text), &text)?;
            let image = both.own.image(0)?;
            both.ensure((image[0] == b'o') == is_source, "the winner's data")?;
        }
        None => {
            let text = "Split-Brain detected but unresolved, dropping connection!";
            // Whoever decides first drops the connection; the other may never decide.
            let start = std::time::Instant::now();
            let mut kernel = String::new();
            while !both.own.log().contains(text) && !kernel.contains(text) {
                both.ensure(start.elapsed() < LONG, text)?;
                kernel += &both.kernel.guest.take_log()?;
            }
            std::thread::sleep(std::time::Duration::from_millis(300));
            both.ensure(
                both.own.calls()?.contains(&Handler::InitialSplitBrain),
                "initial-split-brain is called",
            )?;
        }
    }
    Ok(())
}

fn fencing() -> Result<()> {
    let mut both = Both::boot(fresh_image(0)?)?;
    both.fresh(&net_config(Protocol::C), "", "fencing resource-only;")?;
    let config = Box::new(DiskConfig { fencing: Fencing::ResourceAndStonith, ..disk_config() });
    both.own.ok(Command::DiskOptions { volume: VOLUME, config })?;
    both.own.ok(Command::Primary { volume: VOLUME, force: false })?;
    // A handler without a result leaves I/O frozen; the connection comes back, and it goes on.
    both.cut(true);
    let op = both.own.write_op(0, vec![b'f'; 4096])?;
    let id = both.own.begin(0, op)?;
    both.own.wait("frozen I/O", |s| s.susp_fen)?;
    both.cut(false);
    both.own.finish(id)?;
    both.in_sync()?;
    both.compare()?;
    let log = both.own.log();
    both.ensure(!log.contains("Began resync"), "resent, without a resync")?;
    // The peer is outdated by the handler.
    both.own.set_handler(Handler::FencePeer, 4)?;
    both.cut(true);
    both.own.wait("a fenced peer", |s| s.pdsk == Dstate::Outdated && !s.susp_fen)?;
    both.own.write(80, vec![b'g'; 4096])?;
    both.kernel.guest.wait_for("! grep -q 'cs:Connected' /proc/drbd", LONG)?;
    both.kernel.guest.ok("drbdadm outdate r0")?;
    let refused = both.kernel.guest.run("drbdadm primary r0")?;
    both.ensure(refused.status != 0, "an outdated node is not promoted")?;
    both.cut(false);
    both.in_sync()?;
    both.compare()?;
    both.ensure(both.own.calls()?.contains(&Handler::UnfencePeer), "unfence-peer")?;
    // The kernel leaves gracefully, and outdates itself.
    both.kernel.guest.ok("drbdadm disconnect r0")?;
    both.own.wait("the end", |s| s.conn < Cstate::Connected)?;
    both.kernel.guest.wait_for("grep -q 'ds:Outdated' /proc/drbd", LONG)?;
    both.kernel.guest.ok("drbdadm connect r0")?;
    both.in_sync()
}

fn sizes() -> Result<()> {
    let mut both = Both::boot(fresh_image(0)?)?;
    both.fresh(&net_config(Protocol::C), "", "")?;
    both.own.ok(Command::Primary { volume: VOLUME, force: false })?;
    // Smaller from here, larger from there.
    let small = SectorCount(8192);
    let shrink = Command::Resize {
        volume: VOLUME,
        size: small,
        force: false,
        assume_clean: false,
        al: Default::default(),
    };
    both.own.ok(shrink)?;
    both.kernel.guest.wait_for("[ $(cat /sys/block/drbd0/size) = 8192 ]", LONG)?;
    ensure!(both.own.status()?.volumes[0].size == small);
    both.own.write(0, vec![b'1'; 4096])?;
    both.kernel.guest.ok("drbdadm -- --assume-clean resize r0 || drbdsetup-84 resize 0 || /lib/drbd/drbdsetup-84 resize 0")?;
    both.in_sync()?;
    let size = both.own.status()?.volumes[0].size;
    both.ensure(size.0 > 8192, "it has grown")?;
    both.own.write(size.0 - 8, vec![b'2'; 4096])?;
    both.in_sync()?;
    both.compare()
}

fn congestion() -> Result<()> {
    let mut both = Both::boot(fresh_image(0)?)?;
    let net = NetConfig {
        on_congestion: OnCongestion::PullAhead,
        congestion_fill: SectorCount(256),
        timeout: drbd_types::Deciseconds(600),
        ..net_config(Protocol::A)
    };
    both.fresh(&net, "", "")?;
    both.own.ok(Command::Primary { volume: VOLUME, force: false })?;
    use drbdrs_tests::proxy::Direction;
    for proxy in [&both.outgoing, &both.incoming] {
        proxy.hold(Direction::FromTarget);
        proxy.hold(Direction::ToTarget);
    }
    for n in 0..12_u64 {
        both.own.write(n * 128, vec![b'a' + u8::try_from(n)?; 65536])?;
    }
    both.own.wait("Ahead", |s| s.conn == Cstate::Ahead)?;
    for proxy in [&both.outgoing, &both.incoming] {
        proxy.release(Direction::FromTarget);
        proxy.release(Direction::ToTarget);
    }
    both.in_sync()?;
    both.compare()?;
    let log = both.own.log();
    both.ensure(log.contains("conn( Ahead -> SyncSource )"), "back from Ahead")
}

/// Disks change their owner: cleanly, and after a crash of the Primary.
fn migration() -> Result<()> {
    let mut both = Both::boot(fresh_image(0)?)?;
    let net = net_config(Protocol::C);
    both.fresh(&net, "", "")?;
    both.kernel.guest.ok(
        "drbdadm primary r0 && dd if=/dev/urandom of=/dev/drbd0 bs=64k count=8 oflag=direct && \
         drbdadm secondary r0",
    )?;
    both.compare()?;
    let slots = both.own.status()?.volumes[0].slots;
    // The kernel's disk under the engine, the engine's under the kernel: cleanly stopped.
    swap(&mut both)?;
    both.attach()?;
    ensure!(both.own.status()?.volumes[0].slots == slots, "the same generations");
    both.own.ok(Command::Connect(Box::new(net.clone())))?;
    both.in_sync()?;
    let log = both.own.log();
    both.ensure(log.contains("uuid_compare()=0 by rule 40"), "no resync")?;
    both.compare()?;
    // The Primary is killed; its disk goes on under the other implementation.
    both.own.ok(Command::Primary { volume: VOLUME, force: false })?;
    for n in 0..20_u64 {
        both.own.write(n * 77, vec![b'k'; 4096])?;
    }
    swap(&mut both)?;
    both.attach()?;
    both.own.ok(Command::Connect(Box::new(net)))?;
    both.in_sync()?;
    both.compare()?;
    let log = both.own.log();
    both.ensure(log.contains("uuid_compare()=-1 by rule 40"), "the crashed Primary is the source")
}

/// Stops both and exchanges their disks. The engine is not asked: it is gone.
fn swap(both: &mut Both) -> Result<()> {
    let image = both.own.image(0)?;
    both.kernel.guest.run("drbdadm down r0")?;
    both.kernel.guest.ok("sync")?;
    both.kernel.guest.shutdown()?;
    let path = both.kernel.guest.disk_image(0).context("no disk")?.to_owned();
    let theirs = fs::read(&path)?;
    fs::write(&path, &image)?;
    both.restart(apply_al(theirs)?);
    both.kernel.guest.start()?;
    both.kernel.configure("protocol C; connect-int 2; ping-timeout 30;", "")?;
    both.kernel.guest.ok("drbdadm up r0")?;
    ensure!(data_len()? > 0);
    Ok(())
}
