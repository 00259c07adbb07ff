//! The endpoint for Prometheus: what it says is what the status says, and nobody can hurt the
//! daemon through it.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use drbdrs_tests::exposition::Page;
use drbdrs_tests::need::trial;
use drbdrs_tests::nodes::{Node, Pair, Programs, eventually};
use drbdrs_workload::nbd::Client;
use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::Value;

const DISK: u64 = 8 << 20;
const FAST: &str = "disk { c-plan-ahead 0; resync-rate 100M; }";
const SETTINGS: &str = "[metrics]\nlisten = 0\n";

type Body = fn() -> Result<()>;

fn main() {
    let args = Arguments::from_args();
    let tests: [(&str, Body); 4] = [
        ("it_is_off_unless_it_is_set", off),
        ("metrics_say_what_the_status_says", equal),
        ("latencies_are_counted_by_kind_and_stage", latencies),
        ("hostile_clients_are_bounded", hostile),
    ];
    let trials: Vec<Trial> = tests
        .into_iter()
        .map(|(name, body)| {
            trial(name, &[], move || body().map_err(|e| Failed::from(format!("{e:#}"))))
        })
        .collect();
    libtest_mimic::run(&args, trials).exit();
}

fn pair(settings: &str) -> Result<Pair> {
    let mut pair = Pair::new(&Programs::build(), 1, DISK, FAST, "")?;
    pair.in_sync(settings)?;
    Ok(pair)
}

/// Where the log says that the metrics are.
fn address(node: &Node) -> Result<SocketAddr> {
    let log = node.log()?;
    let at = log.split("metrics at http://").nth(1).context("no metrics in the log")?;
    Ok(at.split('/').next().context("an address")?.parse()?)
}

/// Sends this, and reads until the other side closes.
fn exchange(at: SocketAddr, request: &[u8]) -> Result<String> {
    let mut stream = TcpStream::connect(at)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.write_all(request)?;
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply)?;
    Ok(String::from_utf8(reply)?)
}

fn scrape(node: &Node) -> Result<Page> {
    // What was made for another scrape may be half a second old.
    std::thread::sleep(Duration::from_millis(600));
    let reply = exchange(address(node)?, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")?;
    let (head, body) = reply.split_once("\r\n\r\n").context("a head")?;
    ensure!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    ensure!(head.contains("\r\nContent-Type: text/plain; version=0.0.4"), "{head}");
    ensure!(head.contains(&format!("\r\nContent-Length: {}\r\n", body.len())), "{head}");
    Page::parse(body)
}

fn off() -> Result<()> {
    let pair = pair("")?;
    for node in &pair.nodes {
        ensure!(address(node).is_err(), "it listens");
        let pid = node.pid().context("a pid")?;
        // Sockets of this process that listen: the peer's port, and no other.
        let mine = inodes(pid)?;
        let tcp = std::fs::read_to_string(format!("/proc/{pid}/net/tcp"))?;
        let is_mine = |line: &&str| {
            let words: Vec<&str> = line.split_whitespace().collect();
            words.get(3) == Some(&"0A") && words.get(9).is_some_and(|i| mine.contains(&(*i).into()))
        };
        ensure!(tcp.lines().filter(is_mine).count() <= 1, "{tcp}");
    }
    Ok(())
}

fn inodes(pid: u32) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        // One may be closed meanwhile.
        let Ok(target) = std::fs::read_link(entry?.path()) else { continue };
        let text = target.display().to_string();
        if let Some(inode) = text.strip_prefix("socket:[").and_then(|t| t.strip_suffix(']')) {
            found.push(inode.to_owned());
        }
    }
    Ok(found)
}

fn json(node: &Node) -> Result<Value> {
    let text = node.setup(&["status", "--json", "r0"])?.ok()?;
    let mut all: Vec<Value> = serde_json::from_str(&text)?;
    all.pop().context("a resource")
}

#[expect(clippy::cast_precision_loss, reason = "small numbers")]
fn agree(node: &Node) -> Result<()> {
    let (page, status) = (scrape(node)?, json(node)?);
    let minor = node.minors("@0");
    let name: &[(&str, &str)] = &[("name", "r0")];
    let device: &[(&str, &str)] = &[("name", "r0"), ("volume", "0"), ("minor", &minor)];
    let peer: &[(&str, &str)] = &[("name", "r0"), ("conn_name", "peer"), ("peer_node_id", "0")];
    let peer_device: &[(&str, &str)] =
        &[("name", "r0"), ("conn_name", "peer"), ("peer_node_id", "0"), ("volume", "0")];
    ensure!(page.value("drbdreactor_up", &[])? == 1.0);
    ensure!(page.value("drbd_version", &[("kmod", "8.4.11")])? == 1.0);
    ensure!(page.value("drbd_resource_resources", &[])? == 1.0);
    ensure!(page.value("drbd_resource_suspended", name)? == 0.0);
    let is = |metric: &str, labels, value: &Value| -> Result<()> {
        let state = page.state(metric, labels)?;
        ensure!(value == state.as_str(), "{metric}: {state} instead of {value}");
        Ok(())
    };
    is("drbd_resource_role", name, &status["role"])?;
    let own = &status["devices"][0];
    is("drbd_device_state", device, &own["disk-state"])?;
    let number = |metric: &str, labels, value: &Value, unit: u64| -> Result<()> {
        let found = page.value(metric, labels)?;
        let wanted = (value.as_u64().context("a number")? * unit) as f64;
        ensure!(found == wanted, "{metric}: {found} instead of {wanted}");
        Ok(())
    };
    for (metric, member, unit) in [
        ("drbd_device_size_bytes", "size", 1024),
        ("drbd_device_read_bytes_total", "read", 1024),
        ("drbd_device_written_bytes_total", "written", 1024),
        ("drbd_device_alwrites_total", "al-writes", 1),
        ("drbd_device_bmwrites_total", "bm-writes", 1),
        ("drbd_device_upperpending", "upper-pending", 1),
        ("drbd_device_lowerpending", "lower-pending", 1),
    ] {
        number(metric, device, &own[member], unit)?;
    }
    let Some(connection) = status["connections"].get(0) else {
        ensure!(page.all("drbd_connection_state", &[]).next().is_none(), "there is none");
        return Ok(());
    };
    is("drbd_connection_state", peer, &connection["connection-state"])?;
    number("drbd_connection_apinflight_bytes", peer, &connection["ap-in-flight"], 512)?;
    let theirs = &connection["peer_devices"][0];
    is("drbdrs_peerdevice_replication_state", peer_device, &theirs["replication-state"])?;
    is("drbdrs_peerdevice_disk_state", peer_device, &theirs["peer-disk-state"])?;
    for (metric, member) in [
        ("drbd_peerdevice_sent_bytes", "sent"),
        ("drbd_peerdevice_received_bytes", "received"),
        ("drbd_peerdevice_outofsync_bytes", "out-of-sync"),
    ] {
        number(metric, peer_device, &theirs[member], 1024)?;
    }
    Ok(())
}

fn equal() -> Result<()> {
    let pair = pair(SETTINGS)?;
    let [alpha, beta] = &pair.nodes;
    let both = |_: &str| pair.nodes.iter().try_for_each(agree);
    both("connected")?;
    Client::open(&alpha.server())?.write(4096, &[7; 64 << 10])?;
    alpha.until(" ap:0 ")?;
    both("written")?;
    let page = scrape(alpha)?;
    ensure!(page.value("drbd_device_written_bytes_total", &[])? == f64::from(64 << 10));
    ensure!(page.value("drbdrs_resource_apart_seconds", &[])? == 0.0);
    beta.adm(&["disconnect", "r0"])?.ok()?;
    alpha.until("cs:WFConnection")?;
    Client::open(&alpha.server())?.write(4096, &[8; 12 << 10])?;
    alpha.until(" ap:0 ")?;
    both("apart")?;
    let page = scrape(alpha)?;
    ensure!(page.value("drbd_peerdevice_outofsync_bytes", &[])? == f64::from(12 << 10));
    ensure!(page.value("drbdrs_resource_apart_seconds", &[])? > 0.0);
    ensure!(page.value("drbdrs_resource_splitbrain", &[("name", "r0")])? == 0.0);
    beta.adm(&["connect", "r0"])?.ok()?;
    pair.until_in_sync()?;
    both("again")?;
    alpha.adm(&["secondary", "r0"])?.ok()?;
    alpha.adm(&["detach", "r0"])?.ok()?;
    both("without disk")?;
    ensure!(scrape(alpha)?.value("drbd_device_unintentionaldiskless", &[])? == 1.0);
    alpha.adm(&["down", "r0"])?.ok()?;
    let page = scrape(alpha)?;
    ensure!(page.value("drbd_resource_resources", &[])? == 0.0);
    ensure!(page.all("drbd_device_size_bytes", &[]).next().is_none(), "it is gone");
    Ok(())
}

fn latencies() -> Result<()> {
    let pair = pair(SETTINGS)?;
    let [alpha, _] = &pair.nodes;
    let mut client = Client::open(&alpha.server())?;
    let count = |kind: &str, stage: &str| -> Result<(f64, f64)> {
        let labels = [("kind", kind), ("stage", stage)];
        let page = scrape(alpha)?;
        let one = |part: &str| {
            let name = format!("drbdrs_request_duration_seconds_{part}");
            page.value(&name, &labels).unwrap_or(0.0)
        };
        Ok((one("count"), one("sum")))
    };
    // A new client may have looked around.
    let before = count("read", "total")?.0;
    for n in 0..10 {
        client.write(n << 20 & 0x003f_ffff, &[1; 4096])?;
    }
    client.ask(drbdrs_workload::nbd::Command::Flush, 0, 0, 0, &[])?;
    ensure!(client.reply()?.error == 0, "the flush failed");
    let mut bytes = [0; 4096];
    for _ in 0..3 {
        client.read(0, &mut bytes)?;
    }
    for stage in ["total", "queue", "disk", "peer"] {
        let (number, sum) = count("write", stage)?;
        ensure!(number == 10.0, "{number} writes, {stage}");
        ensure!(sum < 60.0, "{sum} s, {stage}");
    }
    let (total, disk) = (count("write", "total")?.1, count("write", "disk")?.1);
    ensure!(total >= disk && disk > 0.0, "{total} {disk}");
    ensure!(count("read", "total")?.0 - before == 3.0, "reads");
    ensure!(count("read", "peer")?.0 == 0.0, "they were read here");
    ensure!(count("flush", "total")?.0 == 1.0 && count("flush", "disk")?.0 == 1.0, "flushes");
    Ok(())
}

fn hostile() -> Result<()> {
    let pair = pair(SETTINGS)?;
    let [alpha, _] = &pair.nodes;
    let at = address(alpha)?;
    let open = || -> Result<usize> {
        Ok(std::fs::read_dir(format!("/proc/{}/fd", alpha.pid().context("a pid")?))?.count())
    };
    scrape(alpha)?;
    let before = open()?;
    for (request, status) in [
        (&b"GET /x HTTP/1.1\r\n\r\n"[..], "404"),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n", "405"),
        (b"\x16\x03\x01\x02\x00\x01\n\n", "400"),
        (b"GET /metrics HTTP/9.9\r\n\r\n", "505"),
        (&[b'a'; 8192], "431"),
        (&[0xff; 8192], "431"),
    ] {
        let reply = exchange(at, request)?;
        ensure!(reply.starts_with(&format!("HTTP/1.1 {status} ")), "{status}: {reply}");
    }
    // Crowds that say nothing, or drop by drop, and one that does not read.
    let mut crowd = Vec::new();
    for n in 0..200 {
        let mut stream = TcpStream::connect(at)?;
        if n % 3 == 0 {
            // It may be sent away already.
            let _ = stream.write_all(b"GET /met");
        }
        if n % 3 == 1 {
            let _ = stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n");
        }
        crowd.push(stream);
    }
    // The daemon has other things to do meanwhile.
    let start = Instant::now();
    alpha.setup(&["status", "r0"])?.ok()?;
    Client::open(&alpha.server())?.write(0, &[1; 4096])?;
    ensure!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    ensure!(open()? <= before + 16 + 8, "{} descriptors, before {before}", open()?);
    // They are sent away after a while, also while they stay.
    eventually(|| {
        let page = scrape(alpha);
        Ok(page.map_err(|e| format!("{e:#}")).map(drop))
    })?;
    drop(crowd);
    eventually(|| {
        let now = open()?;
        Ok(if now <= before { Ok(()) } else { Err(format!("{now} descriptors, not {before}")) })
    })?;
    agree(alpha)
}
