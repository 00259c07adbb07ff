//! A long life of the engine and the Linux DRBD 8.4 as a pair: what both show at each step, and
//! random operations from a seed.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use drbd_core::admin::Command as Order;
use drbd_core::config::{DiskConfig, NetConfig, Protocol, ResyncConfig};
use drbd_types::{Cstate, Sector};
use drbd_wire::Command;
use drbdrs_tests::interop::row;
use drbdrs_tests::kernel_life::{ACTS, Life};
use drbdrs_tests::kernel_pair::{Both, LONG, VOLUME, disk_config, fresh_image, net_config};
use drbdrs_tests::packet_proxy::Sender;
use drbdrs_tests::proc_status::{Fields, agree, text};
use libtest_mimic::Arguments;

fn main() {
    let args = Arguments::from_args();
    let tests = vec![
        row(10, "both", "both_status_views_agree_at_every_step", views),
        row(11, "both", "a_long_life_of_random_operations", longevity),
    ];
    libtest_mimic::run(&args, tests).exit();
}

/// Both views agree, as soon as nothing is under way.
fn look(both: &Both, what: &str) -> Result<(Fields, Fields)> {
    let start = Instant::now();
    loop {
        let own = text(&both.own.status()?, "C");
        let kernel = both.kernel.guest.proc_drbd()?;
        let fields = (Fields::of(&own, 0)?, Fields::of(&kernel, 0)?);
        let agreed = agree(&fields.0, &fields.1);
        if agreed.is_ok() {
            println!("{what}: {:?}", fields.0);
            return Ok(fields);
        }
        if start.elapsed() > Duration::from_secs(20) {
            agreed.with_context(|| format!("{what}\n{own}\n{kernel}"))?;
        }
        sleep(Duration::from_millis(50));
    }
}

/// How much a counter grew.
fn grown(before: &Fields, after: &Fields, name: &str) -> Result<u64> {
    Ok(after.get(name)?.parse::<u64>()?.saturating_sub(before.get(name)?.parse()?))
}

fn views() -> Result<()> {
    let mut both = Both::boot(fresh_image(b'v')?)?;
    let net = NetConfig { verify_alg: "sha1".into(), ..net_config(Protocol::C) };
    both.up_with(&net, "verify-alg sha1;", "resync-rate 2M;")?;
    look(&both, "new")?;
    let resync = ResyncConfig { resync_rate: 2 << 10, c_plan_ahead: 0, ..Default::default() };
    let config = Box::new(DiskConfig { resync, ..disk_config() });
    both.own.ok(Order::DiskOptions { volume: VOLUME, config })?;
    both.own.ok(Order::Primary { volume: VOLUME, force: true })?;
    both.own.wait("a resync", |s| s.conn == Cstate::SyncSource)?;
    both.own.ok(Order::PauseSync(VOLUME))?;
    look(&both, "paused by us")?;
    both.kernel.guest.ok("drbdadm pause-sync r0")?;
    look(&both, "paused by both")?;
    both.own.ok(Order::ResumeSync(VOLUME))?;
    look(&both, "paused by the kernel")?;
    both.kernel.guest.ok("drbdadm resume-sync r0")?;
    both.in_sync()?;
    let before = look(&both, "in sync")?;
    for n in 0..20 {
        both.own.write(n * 400, vec![b'w'; 8192])?;
    }
    let after = look(&both, "we have written")?;
    both.kernel.guest.ok("true")?;
    ensure!(grown(&before.0, &after.0, "ns")? == 160, "what we sent");
    ensure!(grown(&before.1, &after.1, "nr")? == 160, "what the kernel received");
    ensure!(grown(&before.0, &after.0, "dw")? == grown(&before.1, &after.1, "dw")?, "written");
    both.own.ok(Order::Secondary(VOLUME))?;
    let before = look(&both, "both Secondary")?;
    both.kernel.guest.ok("drbdadm primary r0 && \
         dd if=/dev/urandom of=/dev/drbd0 bs=64k seek=3 count=9 oflag=direct 2>&1")?;
    let after = look(&both, "the kernel has written")?;
    ensure!(grown(&before.1, &after.1, "ns")? == 576, "what the kernel sent");
    ensure!(grown(&before.0, &after.0, "nr")? == 576, "what we received");
    ensure!(grown(&before.0, &after.0, "dw")? == grown(&before.1, &after.1, "dw")?, "written");
    for order in [
        Order::Verify { volume: VOLUME, start: Some(Sector(0)), stop: None },
        Order::Detach { volume: VOLUME, force: false },
    ] {
        both.own.ok(order)?;
        both.own.wait("the end of a verify", |s| !s.conn.is_verify())?;
        look(&both, "after a command of ours")?;
    }
    both.kernel.guest.ok("dd if=/dev/urandom of=/dev/drbd0 bs=4k seek=30 count=9 oflag=direct")?;
    both.attach_again()?;
    both.in_sync()?;
    look(&both, "attached again")?;
    both.kernel.guest.ok("drbdadm detach r0")?;
    look(&both, "the kernel without disk")?;
    both.kernel.guest.ok("drbdadm attach r0")?;
    both.in_sync()?;
    look(&both, "the kernel with disk")?;
    both.cut(true);
    both.own.wait("the loss", |s| s.conn < Cstate::Connected)?;
    both.kernel.guest.wait_for("! grep -q cs:Connected /proc/drbd", LONG)?;
    // Alone, each shows its own half.
    let own = text(&both.own.status()?, "C");
    both.ensure(own.contains("ro:Secondary/Unknown ds:UpToDate/DUnknown C r"), &own)?;
    let shown = both.kernel.shown()?;
    ensure!(shown.roles == "Primary/Unknown" && shown.disks == "UpToDate/DUnknown", "{shown:?}");
    both.cut(false);
    both.in_sync()?;
    look(&both, "connected again")?;
    both.compare()
}

struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

/// What may come late.
const LATE: [Command; 12] = [
    Command::Sizes,
    Command::Uuids,
    Command::State,
    Command::SyncUuid,
    Command::CompressedBitmap,
    Command::Bitmap,
    Command::StateChgReply,
    Command::ConnStChgReply,
    Command::BarrierAck,
    Command::WriteAck,
    Command::RsWriteAck,
    Command::RsDataReply,
];

/// `DRBDRS_SECONDS` is how long (100), `DRBDRS_SEED` decides what happens.
fn longevity() -> Result<()> {
    let variable = |name| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    let length = Duration::from_secs(variable("DRBDRS_SECONDS").unwrap_or(100));
    let seed = variable("DRBDRS_SEED").unwrap_or(1);
    let mut random = Random(seed ^ 0x5eed);
    let mut life = Life::begin(Sender::Own)?;
    let start = Instant::now();
    let mut step = 0_u32;
    while start.elapsed() < length {
        step += 1;
        let mut story = Vec::new();
        let outcome = happen(&mut life, &mut random, &mut story);
        println!("{:.1?} {step}: {}", start.elapsed(), story.join(", "));
        let outcome = outcome.and_then(|()| life.settle());
        outcome.with_context(|| format!("seed {seed}, step {step}: {}", story.join(", ")))?;
    }
    println!("{step} steps");
    Ok(())
}

fn happen(life: &mut Life, random: &mut Random, story: &mut Vec<String>) -> Result<()> {
    for _ in 0..random.below(3) {
        life.write()?;
    }
    if random.below(2) == 0 {
        let from = if random.below(2) == 0 { Sender::Own } else { Sender::Kernel };
        let kind = (from, LATE[usize::try_from(random.below(LATE.len() as u64))?]);
        let delay = (random.below(2) == 0).then(|| Duration::from_millis(20 + random.below(400)));
        story.push(format!("late {kind:?} {delay:?}"));
        match delay {
            Some(delay) => life.both.gate.delay(kind, delay),
            None => life.both.gate.hold(kind),
        }
    }
    let pause = Duration::from_millis(random.below(700));
    let outcome = operation(life, random, story, pause);
    life.both.gate.open();
    outcome
}

fn operation(
    life: &mut Life,
    random: &mut Random,
    story: &mut Vec<String>,
    pause: Duration,
) -> Result<()> {
    match random.below(20) {
        0 => {
            story.push("our crash".into());
            life.crash_own()?;
            life.write()
        }
        1 => {
            story.push("the kernel's crash".into());
            life.write()?;
            life.both.gate.open();
            life.crash_kernel()
        }
        2..=4 => {
            story.push("roles".into());
            life.both.gate.open();
            life.settle()?;
            life.swap_roles()
        }
        5..=8 => {
            story.push("link".into());
            life.both.cut(true);
            life.write()?;
            sleep(pause);
            life.write()?;
            life.both.cut(false);
            sleep(pause);
            Ok(())
        }
        _ => {
            let mut pick = || -> Result<_> {
                let n = usize::try_from(random.below(ACTS.len() as u64 + 1))?;
                Ok(ACTS.get(n).copied())
            };
            let (own, kernel) = (pick()?, pick()?);
            story.push(format!("own {own:?}, kernel {kernel:?}"));
            life.act(own, kernel, |life| {
                life.write()?;
                sleep(pause);
                life.both.gate.open();
                Ok(())
            })
        }
    }
}
