//! A client that knows the NBD protocol well enough to break every rule of it: a daemon takes
//! damaged handshakes and requests from it, keeps its memory, and serves others as before.
//! `DRBDRS_SESSIONS`, `DRBDRS_SEED`: how many connections, and which.

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use drbdrs_tests::need::trial;
use drbdrs_tests::nodes::{Node, Pair, Programs};
use drbdrs_workload::nbd::Client;
use libtest_mimic::{Arguments, Failed};

/// What all clients together may cost, KiB: the buffers of requests, which have a limit.
const MEMORY_KIB: u64 = 160 << 10;
const CLIENTS: u64 = 4;

fn main() {
    let args = Arguments::from_args();
    let trial = trial("malformed_nbd_input_is_survived", &[], || {
        fuzz().map_err(|e| Failed::from(format!("{e:#}")))
    });
    libtest_mimic::run(&args, vec![trial]).exit();
}

fn number(name: &str, default: u64) -> Result<u64> {
    Ok(std::env::var(name).map_or(Ok(default), |text| text.parse())?)
}

fn fuzz() -> Result<()> {
    let mut pair = Pair::new(&Programs::build(), 1, 8 << 20, "", "")?;
    pair.in_sync("")?;
    let alpha = &pair.nodes[0];
    let (sessions, seed) = (number("DRBDRS_SESSIONS", 4000)?, number("DRBDRS_SEED", 1)?);
    let socket = alpha.run_dir().join("nbd.sock");
    let before = memory(alpha, "VmRSS")?;
    let start = Instant::now();
    let threads: Vec<_> = (0..CLIENTS)
        .map(|n| {
            let socket = socket.clone();
            std::thread::spawn(move || {
                // The daemon may hang up at any byte.
                let served = |session: &u64| {
                    let mut random = Random::new(seed << 32 | n << 24 | session);
                    run(&socket, &mut random).unwrap_or(false)
                };
                (0..sessions / CLIENTS).filter(served).count()
            })
        })
        .collect();
    let mut served = 0;
    for thread in threads {
        served += thread.join().map_err(|_| anyhow::anyhow!("a client has panicked"))?;
    }
    ensure!(served as u64 > sessions / 10, "only {served} sessions got as far as requests");
    let cost = memory(alpha, "VmHWM")?.saturating_sub(before);
    let still_there = || -> Result<()> {
        let mut client = Client::open(&alpha.server())?;
        client.write(4096, &[0x5a; 4096])?;
        let mut bytes = [0; 4096];
        client.read(4096, &mut bytes)?;
        ensure!(bytes == [0x5a; 4096], "it reads something else");
        Ok(())
    };
    still_there().with_context(|| pair.log_tails())?;
    ensure!(!alpha.log()?.contains("panicked"), "{}", alpha.log_tail());
    ensure!(cost < MEMORY_KIB, "{cost} KiB more than before");
    let time = start.elapsed();
    println!(
        "seed {seed}: {sessions} sessions, {served} with answers to requests, in {time:?}; {cost} \
         KiB of memory"
    );
    Ok(())
}

/// A figure of /proc/pid/status, in KiB.
fn memory(node: &Node, name: &str) -> Result<u64> {
    let pid = node.pid().context("it runs")?;
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find(|line| line.starts_with(name)).context("no such line")?;
    Ok(line.split_whitespace().nth(1).context("a figure")?.parse()?)
}

struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        let mut random = Self((seed + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        for _ in 0..4 {
            random.next();
        }
        random
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 16) % end
    }

    fn one_in(&mut self, end: u64) -> bool {
        self.below(end) == 0
    }

    /// Mostly small, sometimes at a limit.
    fn length(&mut self) -> u32 {
        let limits = [0, 1, 511, 65_535, 32 << 20, (32 << 20) + 1, u32::MAX >> 1, u32::MAX];
        match self.below(12) {
            0 => limits[usize::try_from(self.below(8)).unwrap_or(0)],
            _ => u32::try_from(self.below(64)).unwrap_or(0) * 512,
        }
    }

    fn bytes(&mut self, len: u64) -> Vec<u8> {
        (0..len).map(|_| self.next().to_le_bytes()[3]).collect()
    }
}

fn string(text: &[u8]) -> Vec<u8> {
    let len = u32::try_from(text.len()).unwrap_or(0);
    [&len.to_be_bytes()[..], text].concat()
}

/// An option of the handshake. Lengths inside need not fit.
fn option(random: &mut Random) -> Vec<u8> {
    let number =
        [1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 77][usize::try_from(random.below(11)).unwrap_or(0)];
    let name: &[u8] = [&b"r0/0"[..], b"r0", b"", b"nosuch", &[0xff; 300]]
        [usize::try_from(random.below(5)).unwrap_or(0)];
    let mut data = match number {
        1 => name.to_vec(),
        6 | 7 => {
            let count = u16::try_from(random.below(5)).unwrap_or(0);
            let infos = random.bytes(u64::from(count) * 2);
            [string(name), count.to_be_bytes().to_vec(), infos].concat()
        }
        9 | 10 => {
            let count = u32::try_from(random.below(4)).unwrap_or(0);
            let queries = (0..count).flat_map(|_| string(b"base:allocation")).collect();
            [string(name), count.to_be_bytes().to_vec(), queries].concat()
        }
        _ => Vec::new(),
    };
    if random.one_in(6) {
        let len = random.below(5000);
        data.extend(random.bytes(len));
    }
    let len =
        if random.one_in(12) { random.length() } else { u32::try_from(data.len()).unwrap_or(0) };
    [&b"IHAVEOPT"[..], &u32::to_be_bytes(number), &len.to_be_bytes(), &data].concat()
}

/// GO for the export that there is, so that requests follow.
fn go() -> Vec<u8> {
    let data = [string(b"r0/0"), vec![0, 0]].concat();
    let len = u32::try_from(data.len()).unwrap_or(0);
    [&b"IHAVEOPT"[..], &7_u32.to_be_bytes(), &len.to_be_bytes(), &data].concat()
}

fn request(random: &mut Random) -> Vec<u8> {
    let command = u16::try_from(random.below(10)).unwrap_or(0);
    let flags = if random.one_in(3) { u16::try_from(random.below(256)).unwrap_or(0) } else { 0 };
    let offset = match random.below(8) {
        0 => u64::MAX - random.below(4096),
        1 => random.next(),
        _ => random.below(16_384) * 512,
    };
    let len = random.length();
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(random.next().to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    if command == 1 {
        bytes.extend(random.bytes(u64::from(len).min(40_000)));
    }
    bytes
}

fn damage(bytes: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..random.below(4) {
        let at = usize::try_from(random.below(bytes.len().max(1) as u64)).unwrap_or(0);
        match random.below(4) {
            0 => bytes.truncate(at),
            1 => {
                let len = random.below(64);
                let garbage = random.bytes(len);
                bytes.splice(at..at, garbage);
            }
            _ => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << random.below(8);
                }
            }
        }
    }
}

/// Does it contain an answer to a request, simple or structured?
fn has_answer(heard: &[u8]) -> bool {
    let magics = [0x6744_6698_u32.to_be_bytes(), 0x668e_33ef_u32.to_be_bytes()];
    heard.windows(4).any(|four| magics.iter().any(|magic| four == magic))
}

/// One connection. Was a request answered?
fn run(socket: &Path, random: &mut Random) -> std::io::Result<bool> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_write_timeout(Some(Duration::from_millis(200)))?;
    stream.set_read_timeout(Some(Duration::from_millis(5)))?;
    let flags = if random.one_in(10) { 0xff } else { 3_u32 };
    let mut bytes = flags.to_be_bytes().to_vec();
    for _ in 0..random.below(4) {
        bytes.extend(option(random));
    }
    if !random.one_in(4) {
        bytes.extend(go());
        for _ in 0..random.below(30) {
            bytes.extend(request(random));
        }
    }
    if random.one_in(2) {
        damage(&mut bytes, random);
    }
    let listens = !random.one_in(3);
    let mut rest = &bytes[..];
    let mut heard = vec![0; 1 << 16];
    let mut is_served = false;
    while !rest.is_empty() {
        let end = if random.one_in(4) { 16 } else { 100_000 };
        let most = 1 + random.below(end);
        let (now, later) = rest.split_at(rest.len().min(usize::try_from(most).unwrap_or(1)));
        stream.write_all(now)?;
        rest = later;
        if listens {
            // Nothing to hear yet is no error.
            let len = stream.read(&mut heard).unwrap_or(0);
            is_served |= has_answer(&heard[..len]);
        }
    }
    match random.below(3) {
        0 => {}
        1 => stream.shutdown(Shutdown::Write)?,
        _ => stream.shutdown(Shutdown::Both)?,
    }
    while listens && let Ok(len @ 1..) = stream.read(&mut heard) {
        is_served |= has_answer(&heard[..len]);
    }
    Ok(is_served)
}
