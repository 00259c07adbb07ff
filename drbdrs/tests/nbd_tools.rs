//! The NBD server with the programs that people use. On the ring and on helper threads, through a
//! unix socket and TCP.

mod support;

use std::process::Command;

use drbdrs::plane::io::Choice;
use drbdrs_tests::need::{Need, trial};
use libtest_mimic::{Arguments, Failed, Trial};
use support::{Node, Setup};

const NBDINFO: Need = Need::File("/usr/bin/nbdinfo");
const NBDCOPY: Need = Need::File("/usr/bin/nbdcopy");
const NBDSH: Need = Need::File("/usr/lib/python3/dist-packages/nbd.py");
const QEMU_IO: Need = Need::File("/usr/bin/qemu-io");
const QEMU_IMG: Need = Need::File("/usr/bin/qemu-img");
const FIO: Need = Need::File("/usr/bin/fio");

type Body = fn(Choice) -> Result<(), Failed>;

fn main() {
    let args = Arguments::from_args();
    let tests: [(&str, &[Need], Body); 7] = [
        ("nbdinfo_shows_the_export", &[NBDINFO], info),
        ("nbdcopy_there_and_back", &[NBDCOPY], copy),
        ("qemu_io_patterns_of_all_sizes", &[QEMU_IO], patterns),
        ("qemu_img_compares_equal", &[QEMU_IMG], compare),
        ("fio_verifies_random_writes", &[FIO], fio),
        ("nbdsh_flags_and_errors", &[NBDSH], shell),
        ("several_connections_flush_for_each_other", &[NBDSH], multi),
    ];
    let mut trials: Vec<Trial> = Vec::new();
    for (name, needs, body) in tests {
        for (on, choice) in [("ring", Choice::Ring), ("threads", Choice::Threads)] {
            trials.push(trial(&format!("{name}_{on}"), needs, move || body(choice)));
        }
    }
    libtest_mimic::run(&args, trials).exit();
}

fn node(io: Choice) -> Node {
    Node::new(Setup { io, ..Setup::default() })
}

fn run(program: &str, args: &[&str]) -> Result<String, Failed> {
    let output = Command::new("timeout")
        .arg("120")
        .arg(program)
        .args(args)
        // Some leave files where they run.
        .current_dir(std::env::temp_dir())
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        Ok(text)
    } else {
        Err(format!("{program} {args:?}: {}\n{text}{errors}", output.status).into())
    }
}

fn info(io: Choice) -> Result<(), Failed> {
    let node = node(io);
    for uri in [node.uri(), node.tcp_uri()] {
        let text = run("nbdinfo", &[&uri])?;
        for line in [
            "export-size: 67108864 (64M)",
            "is_read_only: false",
            "can_multi_conn: true",
            "can_fua: true",
            "can_flush: true",
            "can_trim: true",
            "can_zero: true",
            "can_fast_zero: true",
            "can_cache: true",
            "can_df: true",
            "base:allocation",
            "drbd:out-of-sync",
            "block_size_minimum: 512",
            "block_size_maximum: 33554432",
            "protocol: newstyle-fixed without TLS, using structured packets",
        ] {
            assert!(text.contains(line), "{line:?} is not in\n{text}");
        }
    }
    let list = run("nbdinfo", &["--list", &node.tcp_uri()])?;
    assert!(list.contains("export=\"r0/0\"") && list.contains("a test"), "{list}");
    node.wait_for_users(0);
    Ok(())
}

fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

fn copy(io: Choice) -> Result<(), Failed> {
    let node = node(io);
    let there = node.dir.path().join("there");
    let back = node.dir.path().join("back");
    let mut content = pattern(64 << 20, 7);
    content[3 << 20..9 << 20].fill(0);
    std::fs::write(&there, &content)?;
    run("nbdcopy", &["--flush", &there.display().to_string(), &node.uri()])?;
    assert!(std::fs::read(node.disk())? == content, "the disk differs");
    run("nbdcopy", &[&node.tcp_uri(), &back.display().to_string()])?;
    assert!(std::fs::read(&back)? == content, "what comes back differs");
    node.wait_for_users(0);
    Ok(())
}

fn patterns(io: Choice) -> Result<(), Failed> {
    let node = node(io);
    let mut script = Vec::new();
    let sizes = ["512", "1k", "4k", "7k", "64k", "1000k", "1M", "1537k", "8M", "32M"];
    for (n, size) in sizes.iter().enumerate() {
        let at = n * 512 * 37;
        script.push(format!("write -P {} {at} {size}", n + 1));
        script.push(format!("read -P {} {at} {size}", n + 1));
    }
    for line in [
        "write -f -P 9 0 64k",
        "write -z 4k 8k",
        "write -z -u 16k 8k",
        "discard 32k 8k",
        "flush",
        "read -P 0 4k 8k",
        "read -P 0 16k 8k",
        "read -P 0 32k 8k",
        "read -P 9 12k 4k",
        "aio_write -P 3 1M 4M",
        "aio_write -P 4 5M 4M",
        "aio_flush",
        "read -P 3 1M 4M",
        "read -P 4 5M 4M",
    ] {
        script.push(line.into());
    }
    let uri = node.uri();
    let mut args = vec!["-f", "raw", "-t", "none"];
    for line in &script {
        args.extend(["-c", line.as_str()]);
    }
    args.push(&uri);
    let text = run("qemu-io", &args)?;
    assert!(!text.contains("failed"), "{text}");
    Ok(())
}

fn compare(io: Choice) -> Result<(), Failed> {
    let node = node(io);
    let image = node.dir.path().join("image");
    std::fs::write(&image, pattern(64 << 20, 3))?;
    let path = image.display().to_string();
    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", &path, &node.uri()])?;
    let text = run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &path, &node.tcp_uri()])?;
    assert!(text.contains("Images are identical"), "{text}");
    Ok(())
}

fn fio(io: Choice) -> Result<(), Failed> {
    let node = node(io);
    for (depth, size) in [("1", "512-16k"), ("16", "4k"), ("64", "4k-256k"), ("4", "1M-8M")] {
        let args = [
            "--name=verify".to_string(),
            "--ioengine=nbd".into(),
            format!("--uri={}", node.uri()),
            "--rw=randwrite".into(),
            format!(
                "--bsrange={}",
                if size.contains('-') { size.into() } else { format!("{size}-{size}") }
            ),
            "--blockalign=512".into(),
            // Overlapping writes in flight have no order.
            "--serialize_overlap=1".into(),
            format!("--iodepth={depth}"),
            "--size=48M".into(),
            "--verify=crc32c".into(),
            "--verify_fatal=1".into(),
            "--do_verify=1".into(),
            "--fsync=97".into(),
            "--minimal".into(),
            "--verify_state_save=0".into(),
        ];
        let args: Vec<_> = args.iter().map(String::as_str).collect();
        run("fio", &args)?;
    }
    node.wait_for_users(0);
    Ok(())
}

fn nbdsh(uri: &str, script: &str) -> Result<String, Failed> {
    let setup = format!(
        "import errno\n\
         h.add_meta_context('base:allocation')\n\
         h.add_meta_context('drbd:out-of-sync')\n\
         h.set_strict_mode(0)\n\
         h.connect_uri('{uri}')\n\
         def fails(number, call, *args):\n\
         \x20   try:\n\
         \x20       call(*args)\n\
         \x20   except nbd.Error as e:\n\
         \x20       assert e.errnum == number, (e.errnum, number, str(e))\n\
         \x20       return\n\
         \x20   raise AssertionError('no error')\n\
         {script}"
    );
    // What nbdsh is; by its name it may find another Python.
    run("/usr/bin/python3", &["-m", "nbd", "-c", &setup])
}

fn shell(io: Choice) -> Result<(), Failed> {
    let node = node(io);
    let script = "
size = h.get_size()
fails(errno.EINVAL, h.pread, 512, 100)
fails(errno.EINVAL, h.pread, 100, 0)
fails(errno.EINVAL, h.pread, 1024, size - 512)
fails(errno.ENOSPC, h.pwrite, b'x' * 1024, size - 512)
fails(errno.EINVAL, h.pwrite, b'x' * 100, 0)
fails(errno.ENOSPC, h.zero, 1024, size - 512)
fails(errno.EINVAL, h.trim, 1024, size - 512)
assert h.pread(512, size - 512) == bytes(512)
h.pwrite(b'a' * 65536, 4096, nbd.CMD_FLAG_FUA)
assert h.pread(65536, 4096, nbd.CMD_FLAG_DF) == b'a' * 65536
h.pwrite(b'b' * (32 << 20), 512)
assert h.pread(32 << 20, 512) == b'b' * (32 << 20)
assert h.pread(32 << 20, 512, nbd.CMD_FLAG_DF) == b'b' * (32 << 20)
h.zero(8192, 4096, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
h.zero(8192, 16384, nbd.CMD_FLAG_FAST_ZERO)
h.trim(1 << 20, 1 << 20, nbd.CMD_FLAG_FUA)
h.cache(1 << 20, 0)
h.flush()
assert h.pread(8192, 4096) == bytes(8192)
assert h.pread(8192, 16384) == bytes(8192)
assert h.pread(1 << 20, 1 << 20) == bytes(1 << 20)
seen = {}
def extents(context, offset, entries, error):
    seen[context] = list(entries)
h.block_status(size, 0, extents)
assert set(seen) == {'base:allocation', 'drbd:out-of-sync'}, seen
assert seen['base:allocation'] == [size, 0] == seen['drbd:out-of-sync'], seen
fails(errno.EINVAL, h.block_status, 100, 0, extents)
h.shutdown()
print('done')
";
    for uri in [node.uri(), node.tcp_uri()] {
        assert_eq!(nbdsh(&uri, script)?, "done\n");
    }
    node.wait_for_users(0);
    Ok(())
}

fn multi(io: Choice) -> Result<(), Failed> {
    let node = node(io);
    let script = format!(
        "
others = []
for n in range(8):
    o = nbd.NBD()
    o.connect_uri('{}')
    assert o.can_multi_conn()
    others.append(o)
waiting = []
for n in range(400):
    o = others[n % 8]
    waiting.append((o, o.aio_pwrite(nbd.Buffer.from_bytearray(bytearray([n % 251] * 8192)), n * 8192)))
for o, cookie in waiting:
    while not o.aio_command_completed(cookie):
        o.poll(-1)
h.flush()
for n in range(400):
    assert h.pread(8192, n * 8192) == bytes([n % 251] * 8192), n
print('done')
",
        node.uri()
    );
    assert_eq!(nbdsh(&node.uri(), &script)?, "done\n");
    node.wait_for_users(0);
    Ok(())
}
