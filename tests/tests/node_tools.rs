//! Programs that people use, on a replicated device: what they write is right on both nodes, under
//! every protocol.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use drbdrs_tests::need::{Case, Need, suite};
use drbdrs_tests::nodes::{Did, Node, Pair, Programs, eventually};

const MIB: u64 = 1 << 20;
const FIO: Need = Need::File("/usr/bin/fio");
const NBDCOPY: Need = Need::File("/usr/bin/nbdcopy");
const NBDFUSE: Need = Need::File("/usr/bin/nbdfuse");
const FUSE: Need = Need::File("/dev/fuse");
const MKFS: Need = Need::File("/usr/sbin/mkfs.ext4");
const QEMU_IMG: Need = Need::File("/usr/bin/qemu-img");

fn main() {
    let tests: [Case<'_>; 5] = [
        ("fio_verifies_under_protocol_a", &[FIO, QEMU_IMG], || fio("A")),
        ("fio_verifies_under_protocol_b", &[FIO, QEMU_IMG], || fio("B")),
        ("fio_verifies_under_protocol_c", &[FIO, QEMU_IMG], || fio("C")),
        ("a_file_system_through_nbdcopy", &[NBDCOPY, MKFS, QEMU_IMG], copied),
        ("a_file_system_through_nbdfuse", &[NBDFUSE, FUSE, MKFS, QEMU_IMG], mounted),
    ];
    suite(&tests);
}

fn pair(protocol: &str, size: u64) -> Result<Pair> {
    let body =
        format!("disk {{ c-plan-ahead 0; resync-rate 100M; }} net {{ protocol {protocol}; }}");
    let mut pair = Pair::new(&Programs::build(), 1, size, &body, "")?;
    pair.in_sync("")?;
    Ok(pair)
}

fn run(program: &str, words: &[&str], dir: &Path) -> Result<String> {
    let mut command = Command::new("timeout");
    command.arg("120").arg(program).args(words).current_dir(dir).stdin(Stdio::null());
    Did::from(command.output()?).ok().with_context(|| format!("{program} {words:?}"))
}

/// The roles change, and the other node gives out the same as the first did.
fn other_node_has(pair: &Pair, image: &Path) -> Result<()> {
    let [alpha, beta] = &pair.nodes;
    eventually(|| {
        let did = alpha.adm(&["secondary", "r0"])?;
        Ok(if did.code == 0 { Ok(()) } else { Err(format!("{did:?}")) })
    })?;
    beta.adm(&["primary", "r0"])?.ok()?;
    compare(beta, image, pair.dir.path())
}

fn compare(node: &Node, image: &Path, dir: &Path) -> Result<()> {
    let image = image.display().to_string();
    let words = ["compare", "-f", "raw", "-F", "raw", &image, &node.uri(0)];
    let text = run("qemu-img", &words, dir)?;
    ensure!(text.contains("Images are identical"), "{text}");
    Ok(())
}

/// What the device contains.
fn image(node: &Node, dir: &Path) -> Result<std::path::PathBuf> {
    let path = dir.join("image");
    let shown = path.display().to_string();
    run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &node.uri(0), &shown], dir)?;
    Ok(path)
}

/// Depth and sizes; offsets are multiples of 512.
const JOBS: [(&str, &str, &str); 5] = [
    ("1", "512-16k", "6M"),
    ("4", "1M-32M", "40M"),
    ("16", "4k-4k", "12M"),
    ("32", "512-64k", "20M"),
    ("64", "4k-256k", "32M"),
];

fn fio(protocol: &str) -> Result<()> {
    let pair = pair(protocol, 48 * MIB)?;
    let [alpha, _] = &pair.nodes;
    let dir = pair.dir.path();
    for (depth, sizes, amount) in JOBS {
        let uri = format!("--uri={}", alpha.uri(0));
        let depth = format!("--iodepth={depth}");
        let sizes = format!("--bsrange={sizes}");
        let amount = format!("--size={amount}");
        let words = [
            "--name=verify",
            "--ioengine=nbd",
            &uri,
            "--rw=randwrite",
            &sizes,
            "--blockalign=512",
            // Overlapping writes in flight have no order.
            "--serialize_overlap=1",
            &depth,
            &amount,
            "--verify=crc32c",
            "--verify_fatal=1",
            "--do_verify=1",
            "--fsync=97",
            "--minimal",
            "--verify_state_save=0",
        ];
        run("fio", &words, dir)?;
    }
    let image = image(alpha, dir)?;
    other_node_has(&pair, &image)
}

/// A file system with something in it.
fn fill(target: &str, dir: &Path) -> Result<()> {
    let files = dir.join("files");
    std::fs::create_dir_all(files.join("folder"))?;
    for n in 0..40_u8 {
        let len = usize::from(n) * 9000 + 1;
        std::fs::write(files.join("folder").join(n.to_string()), vec![n; len])?;
    }
    let files = files.display().to_string();
    run("/usr/sbin/mkfs.ext4", &["-q", "-F", "-d", &files, target], dir).map(drop)
}

/// Checks it, and reads files back.
fn check(target: &str, dir: &Path) -> Result<()> {
    run("/usr/sbin/fsck.ext4", &["-f", "-n", target], dir)?;
    for n in [0_u8, 17, 39] {
        let out = dir.join("back").display().to_string();
        let dump = format!("dump /folder/{n} {out}");
        run("/usr/sbin/debugfs", &["-R", &dump, target], dir)?;
        let bytes = std::fs::read(&out)?;
        ensure!(bytes == vec![n; usize::from(n) * 9000 + 1], "file {n} is different");
    }
    Ok(())
}

fn copied() -> Result<()> {
    let pair = pair("C", 48 * MIB)?;
    let [alpha, beta] = &pair.nodes;
    let dir = pair.dir.path();
    let size = drbdrs_workload::nbd::Client::open(&alpha.server())?.size();
    let path = dir.join("made");
    std::fs::File::create(&path)?.set_len(size)?;
    let shown = path.display().to_string();
    fill(&shown, dir)?;
    run("nbdcopy", &["--flush", &shown, &alpha.uri(0)], dir)?;
    compare(alpha, &path, dir)?;
    other_node_has(&pair, &path)?;
    let back = dir.join("copy").display().to_string();
    run("nbdcopy", &[&beta.uri(0), &back], dir)?;
    check(&back, dir)
}

/// The device as a file, for programs that know nothing of NBD.
struct Mount {
    child: Child,
    file: std::path::PathBuf,
}

impl Mount {
    fn new(node: &Node, dir: &Path, name: &str) -> Result<Self> {
        let file = dir.join(name);
        std::fs::File::create(&file)?;
        let child = Command::new("nbdfuse").arg(&file).arg(node.uri(0)).spawn()?;
        let mount = Self { child, file };
        eventually(|| {
            let len = std::fs::metadata(&mount.file)?.len();
            Ok(if len > 0 { Ok(()) } else { Err("it is not mounted".into()) })
        })?;
        Ok(mount)
    }

    fn end(mut self) -> Result<()> {
        let status = Command::new("umount").arg(&self.file).status()?;
        ensure!(status.success(), "it can not be unmounted");
        ensure!(self.child.wait()?.success(), "nbdfuse has failed");
        Ok(())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // After end() both have nothing left to do.
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = Command::new("umount").arg("-l").arg(&self.file).status();
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn mounted() -> Result<()> {
    let pair = pair("C", 48 * MIB)?;
    let [alpha, beta] = &pair.nodes;
    let dir = pair.dir.path();
    let mount = Mount::new(alpha, dir, "alpha-device")?;
    let target = mount.file.display().to_string();
    fill(&target, dir)?;
    check(&target, dir)?;
    mount.end()?;
    let image = image(alpha, dir)?;
    other_node_has(&pair, &image)?;
    let mount = Mount::new(beta, dir, "beta-device")?;
    check(&mount.file.display().to_string(), dir)?;
    mount.end()
}
