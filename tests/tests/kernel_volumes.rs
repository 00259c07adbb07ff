//! Two volumes replicated between the engine and the Linux DRBD 8.4: file systems that change
//! sides, load with many requests at once, large requests, and one order over both volumes.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::process::Command as Program;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use drbd_core::admin::Command;
use drbd_core::config::Protocol;
use drbd_types::{Cstate, VolumeNr};
use drbdrs_tests::interop::row;
use drbdrs_tests::kernel_pair::{Both, LONG, data_len, fresh_image, net_config};
use libtest_mimic::Arguments;

fn main() {
    let args = Arguments::from_args();
    let tests = vec![
        row(1, "both", "file_systems_and_load_on_two_volumes", everything),
        row(1, "both", "two_volumes_have_one_order", one_order),
    ];
    libtest_mimic::run(&args, tests).exit();
}

const MIB: usize = 1 << 20;

fn pair() -> Result<Both> {
    let mut both = Both::boot_with(vec![fresh_image(0)?, fresh_image(0)?])?;
    both.fresh(&net_config(Protocol::C), "", "")?;
    Ok(both)
}

fn own_role(both: &mut Both, is_primary: bool) -> Result<()> {
    for volume in [VolumeNr(0), VolumeNr(1)] {
        both.own.ok(if is_primary {
            Command::Primary { volume, force: false }
        } else {
            Command::Secondary(volume)
        })?;
    }
    Ok(())
}

fn everything() -> Result<()> {
    let mut both = pair()?;
    kernel_makes_a_file_system(&mut both).context("a file system of the kernel")?;
    we_make_a_file_system(&mut both).context("a file system of ours")?;
    kernel_load(&mut both).context("load of the kernel")?;
    own_load(&mut both).context("load of ours")
}

fn kernel_makes_a_file_system(both: &mut Both) -> Result<()> {
    both.kernel.guest.ok(
        "drbdadm primary r0 && /sbin/mke2fs -q -F -t ext4 /dev/drbd0 && mkdir -p /mnt/d && \
         mount -t ext4 -o discard /dev/drbd0 /mnt/d && \
         dd if=/dev/urandom of=/mnt/d/large bs=256k count=8 2>/dev/null && \
         for i in $(seq 60); do echo $i > /mnt/d/f$i; done && rm /mnt/d/f7 && sync && \
         sha1sum /mnt/d/large > /tmp/sum && umount /mnt/d && drbdadm secondary r0",
    )?;
    both.compare()?;
    own_role(both, true)?;
    // The whole device, as an application here sees it.
    let mut device = Vec::new();
    for at in (0..data_len()?).step_by(MIB) {
        let len = MIB.min(data_len()? - at);
        device.extend(both.own.read(at as u64 / 512, len as u64 / 512)?);
    }
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("device");
    fs::write(&file, &device)?;
    let checked = Program::new("e2fsck").args(["-f", "-n"]).arg(&file).output()?;
    both.ensure(checked.status.success(), &String::from_utf8_lossy(&checked.stdout))?;
    let dump = |name: &str| -> Result<Vec<u8>> {
        let request = format!("cat {name}");
        let output = Program::new("debugfs").args(["-R", &request]).arg(&file).output()?;
        Ok(output.stdout)
    };
    let digest: String = drbd_wire::Algorithm::Sha1.digest(&dump("large")?).as_bytes().iter().fold(
        String::new(),
        |mut text, byte| {
            text += &format!("{byte:02x}");
            text
        },
    );
    let sum = both.kernel.guest.ok("cat /tmp/sum")?;
    both.ensure(sum.starts_with(&digest), "the file's digest")?;
    both.ensure(dump("f33")? == b"33\n", "a small file")
}

/// We are Primary.
fn we_make_a_file_system(both: &mut Both) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let content = folder.path().join("content");
    fs::create_dir(&content)?;
    let large: Vec<u8> = (0..900_000_u32).flat_map(|n| n.to_le_bytes()).take(3 * MIB).collect();
    fs::write(content.join("large"), &large)?;
    fs::write(content.join("small"), "small\n")?;
    let file = folder.path().join("device");
    fs::File::create(&file)?.set_len(data_len()? as u64)?;
    let made = Program::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-d"])
        .args([&content, &file])
        .output()?;
    ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let device = fs::read(&file)?;
    for at in (0..data_len()?).step_by(MIB) {
        let part = &device[at..data_len()?.min(at + MIB)];
        both.own.write(at as u64 / 512, part.to_vec())?;
    }
    own_role(both, false)?;
    both.compare()?;
    both.kernel.guest.ok("drbdadm primary r0 && /sbin/e2fsck -fn /dev/drbd0 && \
         mount -t ext4 /dev/drbd0 /mnt/d && cat /mnt/d/small")?;
    let found = both.kernel.guest.get("/mnt/d/large")?;
    both.ensure(found == large, "the large file")?;
    both.kernel.guest.ok("umount /mnt/d").map(drop)
}

/// The kernel is Primary.
fn kernel_load(both: &mut Both) -> Result<()> {
    let fio = |device: u8| {
        format!(
            "fio --name=j{device} --filename=/dev/drbd{device} --direct=1 --ioengine=libaio \
             --iodepth=32 --rw=randwrite --bsrange=4k-64k --size=6m --verify=crc32c \
             --do_verify=1 --verify_fatal=1 --output=/tmp/fio{device}"
        )
    };
    let script = format!(
        "{} & a=$!; {}; b=$?; wait $a && [ $b = 0 ] || {{ cat /tmp/fio*; exit 1; }}; \
         dd if=/dev/urandom of=/dev/drbd1 bs=1M count=6 oflag=direct 2>&1",
        fio(0),
        fio(1)
    );
    let output = both.kernel.guest.run_for(&script, LONG)?;
    both.ensure(output.status == 0, &output.out)?;
    both.compare()?;
    both.kernel.guest.ok("drbdadm secondary r0").map(drop)
}

/// 32 requests at once on each of both volumes, and then every block is read back.
fn own_load(both: &mut Both) -> Result<()> {
    own_role(both, true)?;
    let mut pending = VecDeque::new();
    let mut expected: BTreeMap<(u16, u64), u8> = BTreeMap::new();
    let mut seed = 11_u64;
    for n in 0..600_u64 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let volume = u16::try_from(n % 2)?;
        // Requests that are under way at the same time must not overlap: slots of 16 KiB.
        let slot = n % 350;
        let blocks = 1 + (seed >> 60) % 4;
        let fill = u8::try_from(seed >> 32 & 0xff)?;
        let data = vec![fill; usize::try_from(blocks * 4096)?];
        for block in 0..blocks {
            expected.insert((volume, slot * 4 + block), fill);
        }
        let op = both.own.write_op(slot * 32, data)?;
        pending.push_back(both.own.begin(volume, op)?);
        if pending.len() == 64
            && let Some(id) = pending.pop_front()
        {
            both.own.finish(id)?;
        }
    }
    for id in pending {
        both.own.finish(id)?;
    }
    both.own.write(8192, vec![b'M'; MIB])?;
    for block in 1024..1024 + 256 {
        expected.insert((0, block), b'M');
    }
    for volume in 0..2_u16 {
        let image = both.own.image(volume)?;
        for ((_, block), fill) in expected.iter().filter(|((v, _), _)| *v == volume) {
            let at = usize::try_from(block * 4096)?;
            ensure!(image[at..at + 4096].iter().all(|b| b == fill), "block {block} of {volume}");
        }
    }
    both.compare()?;
    own_role(both, false)
}

/// Each write waits for the one before, alternately on both volumes. Whenever the link breaks, the
/// peer has a beginning of that sequence, never a hole.
fn one_order() -> Result<()> {
    let mut both = Both::boot_with(vec![fresh_image(0)?, fresh_image(0)?])?;
    let net = net_config(Protocol::A);
    for round in 0..3_u64 {
        both.fresh(&net, "", "")?;
        own_role(&mut both, true)?;
        let mut n = 0;
        let mut alive = true;
        while alive {
            let fill = u8::try_from(1 + n % 250)?;
            let op = both.own.write_op(n / 2 * 8, vec![fill; 4096])?;
            let id = both.own.begin(u16::try_from(n % 2)?, op)?;
            both.own.finish(id)?;
            n += 1;
            if n == 40 + round * 90 {
                both.cut(true);
            }
            alive = n < 60 + round * 90;
        }
        both.own.wait("the loss", |s| s.conn < Cstate::Connected)?;
        both.kernel.guest.wait_for("! grep -q cs:Connected /proc/drbd", LONG)?;
        both.kernel.guest.ok("drbdadm down r0; sync")?;
        let disks = [read_disk(&both, 0)?, read_disk(&both, 1)?];
        let got = prefix(&disks, n)?;
        println!("the kernel has {got} of {n}");
        ensure!(got < n, "the link was cut in time");

        both.fresh(&net, "", "")?;
        let load = both.kernel.guest.spawn(
            "drbdadm primary r0; i=0; while [ $i -lt 400 ]; do \
             head -c 4096 /dev/zero | tr '\\000' \"\\\\$(printf %03o $((1 + i % 250)))\" | \
             dd of=/dev/drbd$((i % 2)) bs=4096 seek=$((i / 2)) count=1 iflag=fullblock oflag=direct 2>/dev/null; \
             i=$((i + 1)); done",
        )?;
        std::thread::sleep(Duration::from_millis(1500 + round * 700));
        both.cut(true);
        both.own.wait("the loss", |s| s.conn < Cstate::Connected)?;
        let disks = [both.own.image(0)?, both.own.image(1)?];
        let got = prefix(&disks, 400)?;
        println!("we have {got}");
        both.ensure(got > 0, "something came")?;
        load.wait(LONG)?;
        both.cut(false);
        both.in_sync()?;
        both.compare()?;
    }
    Ok(())
}

fn read_disk(both: &Both, index: usize) -> Result<Vec<u8>> {
    Ok(fs::read(both.kernel.guest.disk_image(index).context("no disk")?)?)
}

/// How many writes of the sequence are there; no later one may be.
fn prefix(disks: &[Vec<u8>; 2], all: u64) -> Result<u64> {
    let has = |n: u64| -> Result<bool> {
        let at = usize::try_from(n / 2 * 4096)?;
        let disk = &disks[usize::try_from(n % 2)?];
        let fill = u8::try_from(1 + n % 250)?;
        Ok(disk[at..at + 4096].iter().all(|b| *b == fill))
    };
    let mut got = 0;
    while got < all && has(got)? {
        got += 1;
    }
    for n in got..all {
        ensure!(!has(n)?, "write {n} is there, write {got} is not");
    }
    Ok(got)
}
