//! How fast a peer's disk is filled, and how fast nbdcopy does the same between two servers.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use drbdrs_tests::nodes::{Node, Pair, eventually};
use drbdrs_workload::nbd::{Address, Client, Server};
use serde::Serialize;

use crate::points::median;
use crate::servers::{NBDKIT_FILE, Servers};

/// Length of the areas that differ before a bitmap resync; as many others between them do not.
const CHUNK: u64 = 64 << 10;

/// The figures of one way to copy.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Copied {
    pub(crate) backing: &'static str,
    pub(crate) what: &'static str,
    pub(crate) mib: f64,
    pub(crate) gib_per_second: f64,
    pub(crate) seconds_of_runs: Vec<f64>,
}

pub(crate) const FULL: &str = "drbdrs full resync";
pub(crate) const BITMAP: &str = "drbdrs bitmap resync";
pub(crate) const NBDCOPY: &str = "nbdcopy";

/// Everything, in turn, several times.
pub(crate) fn measure(
    servers: &mut Servers,
    backing: &'static str,
    runs: u32,
) -> Result<Vec<Copied>> {
    let peer = servers.target(NBDKIT_FILE).map(|target| target.server.clone());
    let other = match servers.nbdkit_file("nbdcopy") {
        Ok((server, _)) => peer.zip(Some(server)),
        Err(_) => None,
    };
    let mut seconds = [const { Vec::new() }; 3];
    let mut bytes = [0; 3];
    for _ in 0..runs {
        let pair = servers.pair_c()?;
        let steps = [full(pair)?, bitmap(pair)?];
        for (place, (size, took)) in steps.into_iter().enumerate() {
            bytes[place] = size;
            seconds[place].push(took.as_secs_f64());
        }
        if let Some((from, to)) = &other {
            match nbdcopy(from, to) {
                Ok((size, took)) => {
                    bytes[2] = size;
                    seconds[2].push(took.as_secs_f64());
                }
                Err(error) => servers.missing.push(format!("{NBDCOPY}: {error:#}")),
            }
        }
    }
    let rows = [FULL, BITMAP, NBDCOPY].into_iter().zip(bytes).zip(seconds);
    let rows = rows.filter(|(_, seconds)| !seconds.is_empty());
    Ok(rows.map(|((what, bytes), seconds)| copied(backing, what, bytes, seconds)).collect())
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn copied(
    backing: &'static str,
    what: &'static str,
    bytes: u64,
    seconds_of_runs: Vec<f64>,
) -> Copied {
    let mib = bytes as f64 / f64::from(1 << 20);
    let gib_per_second = mib / 1024.0 / median(seconds_of_runs.clone());
    Copied { backing, what, mib, gib_per_second, seconds_of_runs }
}

/// All blocks of the second node are declared stale.
fn full(pair: &Pair) -> Result<(u64, Duration)> {
    let [source, target] = &pair.nodes;
    let seen = source.log()?.len();
    target.adm(&["invalidate", "r0"])?.ok()?;
    let took = resync_time(source, seen)?;
    source.until("ds:UpToDate/UpToDate")?;
    Ok((Client::open(&export(source))?.size(), took))
}

/// Half of the blocks are written while the second node is away.
fn bitmap(pair: &Pair) -> Result<(u64, Duration)> {
    let [source, target] = &pair.nodes;
    target.adm(&["disconnect", "r0"])?.ok()?;
    source.until("cs:WFConnection")?;
    let mut client = Client::open(&export(source))?;
    let data = drbdrs_benches::load::random_bytes(usize::try_from(CHUNK)?);
    let chunks = client.size() / CHUNK / 2;
    for chunk in 0..chunks {
        client.write(chunk * 2 * CHUNK, &data)?;
    }
    drop(client);
    let seen = source.log()?.len();
    target.adm(&["connect", "r0"])?.ok()?;
    let took = resync_time(source, seen)?;
    source.until("ds:UpToDate/UpToDate")?;
    Ok((chunks * CHUNK, took))
}

fn export(node: &Node) -> Server {
    Server::unix(node.run_dir().join("nbd.sock"), "r0/0")
}

/// From its beginning to its end as the source logs them.
fn resync_time(source: &Node, seen: usize) -> Result<Duration> {
    let line_time = |text: &str, words: &str| {
        let line = text.lines().find(|line| line.contains(words))?;
        time_of_day(line)
    };
    let (begin, end) = eventually(|| {
        let log = source.log()?;
        let new = log.get(seen..).context("the log is shorter")?;
        let begin = line_time(new, "Began resync as SyncSource");
        let end = line_time(new, "Resync done");
        Ok(begin.zip(end).ok_or_else(|| new.to_owned()))
    })?;
    const DAY: Duration = Duration::from_secs(86_400);
    Ok(if end < begin { end + DAY - begin } else { end - begin })
}

/// Of a log line that begins with a time as `2026-01-31T12:34:56.123456Z`.
fn time_of_day(line: &str) -> Option<Duration> {
    let (_, rest) = line.split_once('T')?;
    let (time, _) = rest.split_once('Z')?;
    let mut parts = time.splitn(3, ':');
    let hours: u32 = parts.next()?.parse().ok()?;
    let minutes: u32 = parts.next()?.parse().ok()?;
    let seconds: f64 = parts.next()?.parse().ok()?;
    Some(
        Duration::from_secs((hours * 3600 + minutes * 60).into())
            + Duration::from_secs_f64(seconds),
    )
}

fn nbdcopy(from: &Server, to: &Server) -> Result<(u64, Duration)> {
    let start = Instant::now();
    let mut command = Command::new("nbdcopy");
    command.arg(uri(from)?).arg(uri(to)?).stdin(Stdio::null());
    let output = command.output().context("nbdcopy can not be started")?;
    let took = start.elapsed();
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok((Client::open(to)?.size(), took))
}

fn uri(server: &Server) -> Result<String> {
    let Address::Unix(path) = &server.address else { anyhow::bail!("not a unix socket") };
    Ok(format!("nbd+unix:///{}?socket={}", server.export, path.display()))
}
