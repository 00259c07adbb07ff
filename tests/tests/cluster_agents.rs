//! The scripts through which cluster managers drive DRBD: the originals of drbd-utils, unmodified,
//! with the kernel's DRBD and with drbdrs, and our own. All must end alike.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use drbdrs_tests::guest::{self, Disk, Guest};
use drbdrs_tests::machine::{Config, Lab, Machine};
use drbdrs_tests::need::{Case, Need, suite};
use drbdrs_tests::nodes::Programs;
use drbdrs_tests::ocf;

const DRBDDISK: &str = "/etc/ha.d/resource.d/drbddisk";
const INIT: &str = "/etc/init.d/drbd";
const OCF: &str = "/usr/lib/ocf/resource.d/linbit/drbd";
const OCF_FUNCTIONS: &str = "/usr/lib/ocf/lib/heartbeat/ocf-shellfuncs";

fn main() {
    let original = [Need::Root, Need::File(DRBDDISK), Need::Program("qemu-io")];
    let agent = [Need::Root, Need::File(OCF), Need::File(OCF_FUNCTIONS)];
    let with_kernel = [&original[..], &[Need::Guest]].concat();
    let tests: [Case<'_>; 4] = [
        ("drbddisk_and_the_init_script_end_as_with_the_kernel", &with_kernel, with_the_kernel),
        ("our_drbddisk_ends_as_the_original", &original, own_drbddisk),
        ("the_original_ocf_agent_ends_and_calls_as_with_the_kernel", &agent, || {
            ocf::follow_trace(OCF.as_ref(), true)
        }),
        ("our_ocf_agent_ends_as_the_original_with_the_kernel", &[Need::Root], || {
            ocf::follow_trace(&shipped("ocf/drbd"), false)
        }),
    ];
    suite(&tests);
}

/// An agent of this tree.
fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../conf/agents").join(name)
}

/// A situation, how it comes about, and what is asked of the script in it.
struct Situation {
    name: &'static str,
    prepare: &'static str,
    actions: &'static [&'static str],
}

const OF_DRBDDISK: &[Situation] = &[
    Situation {
        name: "not set up",
        prepare: "drbdadm down all",
        actions: &["r0 status", "r0 stop", "r0 start"],
    },
    Situation {
        name: "unknown resource",
        prepare: "true",
        actions: &["nosuch status", "nosuch stop"],
    },
    Situation {
        name: "wrong words",
        prepare: "true",
        actions: &["status", "", "r0 monitor", "r0 start now"],
    },
    Situation {
        name: "Secondary, Inconsistent",
        prepare: "drbdadm up r0",
        actions: &["r0 status", "r0 start", "r0 stop", "stop"],
    },
    Situation {
        name: "Secondary, UpToDate",
        prepare: "drbdadm primary --force r0 && drbdadm secondary r0",
        actions: &["r0 status", "r0 start", "r0 status", "r0 start", "r0 stop", "r0 stop"],
    },
    Situation {
        name: "Primary, device open",
        prepare: "drbdadm primary r0 && hold_r0",
        actions: &["r0 start", "r0 stop", "r0 status"],
    },
    Situation {
        name: "Primary, device closed again",
        prepare: "release_r0",
        actions: &["r0 status", "r0 stop", "r0 status"],
    },
    Situation {
        name: "no driver",
        prepare: "drbdadm down all && unload",
        // Stopping differs on purpose: without a driver nothing is Primary, and the original loads it.
        actions: &["r0 status"],
    },
];

const OF_INIT: &[Situation] = &[
    Situation {
        name: "loaded, not set up",
        prepare: "load && drbdadm down all",
        actions: &["status", "reload", "bogus"],
    },
    Situation { name: "stopped", prepare: "drbdadm down all", actions: &["start", "status"] },
    Situation { name: "started", prepare: "true", actions: &["start", "reload", "force-reload"] },
    Situation { name: "Primary", prepare: "drbdadm primary --force r0", actions: &["status"] },
];

/// Where a script runs.
trait World {
    /// Standard output and exit code.
    fn run(&self, script: &str) -> Result<(String, i32)>;

    fn did(&self, script: &Path, situations: &[Situation]) -> Result<Vec<(String, String)>> {
        let mut rows = Vec::new();
        for situation in situations {
            let (said, code) = self.run(&format!("exec 2>&1; {}", situation.prepare))?;
            ensure!(code == 0, "{}: {said}\n{rows:#?}", situation.prepare);
            for action in situation.actions {
                let command = format!("{} {action} 2>/run/complaints", script.display());
                let (said, code) = self.run(&command)?;
                let complaints = || self.run("cat /run/complaints");
                ensure!(code < 126, "{action} can not be run: {said}{}", complaints()?.0);
                let said = said.lines().next().unwrap_or_default().trim_end();
                // Usage is for people.
                let said = if matches!(code, 1 | 10) { "" } else { said };
                rows.push((format!("{}: {action}", situation.name), format!("{code} {said}")));
            }
        }
        Ok(rows)
    }
}

/// Resource r0, of one volume; the peer is never there.
fn configuration(disk: &str) -> String {
    format!(
        "global {{ usage-count no; }}\n\
         common {{ startup {{ wfc-timeout 2; degr-wfc-timeout 2; outdated-wfc-timeout 2; }} }}\n\
         resource r0 {{\n\
           volume 0 {{ device minor 0; disk {disk}; meta-disk internal; }}\n\
           on alpha {{ address 10.7.0.1:7788; }}\n\
           on beta {{ address 10.7.0.2:7788; }}\n\
         }}\n"
    )
}

struct Kernel(Guest);

impl Kernel {
    fn new() -> Result<Self> {
        let config = guest::Config::new("alpha").disk(Disk::Size(24 << 20));
        let guest = Guest::boot(config)?;
        let library = "/lib/x86_64-linux-gnu/libtinfo.so.6";
        guest.put(library, &std::fs::read(library)?)?;
        guest.put_program(Path::new("/usr/bin/bash"), "/usr/bin/bash")?;
        guest.ok("[ -e /bin/bash ] || ln -s /usr/bin/bash /bin/bash")?;
        for script in [DRBDDISK, INIT, "/lib/lsb/init-functions"] {
            if let Ok(content) = std::fs::read(script) {
                guest.put(script, &content)?;
            }
        }
        guest.put("/etc/drbd.conf", configuration("/dev/vda").as_bytes())?;
        guest.ok("chmod 755 /etc/ha.d/resource.d/drbddisk /etc/init.d/drbd; mkdir -p /run/lock")?;
        guest.ok("ip addr add 10.7.0.1/24 dev lo; drbdadm create-md --force r0 2>&1")?;
        Ok(Self(guest))
    }
}

impl World for Kernel {
    fn run(&self, script: &str) -> Result<(String, i32)> {
        let functions =
            "hold_r0() { sleep 1000 </dev/drbd0 >/dev/null 2>&1 & echo $! >/run/holder; }
            release_r0() { kill $(cat /run/holder); sleep 1; }
            unload() { rmmod drbd; }
            load() { modprobe drbd; }\n";
        let output = self.0.run_for(&format!("{functions}{script}"), Duration::from_secs(120))?;
        Ok((output.out, output.status))
    }
}

/// Opens the device until the sleep is killed.
const HOLD: &str = "#!/bin/bash
{ sleep 1000 & echo $! >/run/holder; wait; } \
    | qemu-io -f raw 'nbd+unix:///r0/0?socket=/run/drbd/nbd.sock'
";

struct Own {
    machine: Machine,
    _lab: Lab,
}

impl Own {
    fn new() -> Result<Self> {
        let lab = Lab::new()?;
        let machine = lab.boot(&Config {
            name: "alpha".into(),
            address: "10.7.0.1/24".into(),
            programs: Programs::build().paths(),
            proc_drbd: true,
            ..Config::default()
        })?;
        machine.write("/etc/drbd.conf", &configuration("/srv/disk0"))?;
        // What stands in the place of a front end's device node.
        machine.sh("truncate -s 24M /srv/disk0; mknod /dev/drbd0 b 147 0")?.ok()?;
        machine.write("/srv/hold", HOLD)?;
        machine.start_daemon()?;
        machine.run("drbdadm", &["create-md", "--force", "r0"])?.ok()?;
        Ok(Self { machine, _lab: lab })
    }
}

impl World for Own {
    fn run(&self, script: &str) -> Result<(String, i32)> {
        let functions = "hold_r0() { setsid /srv/hold >/dev/null 2>&1 & sleep 1; }
            release_r0() { kill $(cat /run/holder); sleep 1; }
            daemon() { pidof drbdrs; }
            unload() { kill $(daemon); while daemon >/dev/null; do sleep 0.1; done; }
            load() { (setsid drbdrs >>/srv/log 2>&1 </dev/null &)
                until drbdsetup status; do sleep 0.1; done; }\n";
        let did = self.machine.sh(&format!("{functions}{script}"))?;
        Ok((did.out, did.code))
    }
}

/// A table for people; what differs is marked.
fn table(name: &str, columns: &[&str], results: &[&Vec<(String, String)>]) -> (String, usize) {
    let mut text = format!("\n| {name} | {} | equal |\n", columns.join(" | "));
    let mut different = 0;
    for (row, (action, first)) in results[0].iter().enumerate() {
        let of_row: Vec<&str> =
            results.iter().map(|r| r.get(row).map_or("", |(_, did)| did.as_str())).collect();
        let equal = of_row.iter().all(|did| did == first);
        different += usize::from(!equal);
        let _ = writeln!(text, "| {action} | {} | {equal} |", of_row.join(" | "));
    }
    (text, different)
}

fn with_the_kernel() -> Result<()> {
    let (kernel, own) = std::thread::scope(|scope| {
        let kernel = scope.spawn(|| -> Result<_> {
            let world = Kernel::new()?;
            let disk = world.did(DRBDDISK.as_ref(), OF_DRBDDISK)?;
            Ok((disk, world.did(INIT.as_ref(), OF_INIT)?))
        });
        let own = || -> Result<_> {
            let world = Own::new()?;
            let disk = world.did(DRBDDISK.as_ref(), OF_DRBDDISK)?;
            let init = world.did(INIT.as_ref(), OF_INIT);
            Ok((disk, init.with_context(|| world.machine.tails(&["/srv/log"]))?))
        };
        (kernel.join(), own())
    });
    let kernel = kernel.ok().context("the guest's thread")?.context("the kernel's world")?;
    let own = own?;
    let columns = ["original, kernel", "original, drbdrs"];
    let (disk, wrong) = table("drbddisk", &columns, &[&kernel.0, &own.0]);
    let (init, also) = table("init script", &columns, &[&kernel.1, &own.1]);
    println!("{disk}{init}");
    ensure!(wrong + also == 0, "{disk}{init}");
    Ok(())
}

fn own_drbddisk() -> Result<()> {
    let script = std::fs::read_to_string(shipped("heartbeat/drbddisk"))?;
    let (ours, theirs) = std::thread::scope(|scope| {
        let ours = scope.spawn(|| -> Result<_> {
            let world = Own::new()?;
            world.machine.write("/srv/drbddisk", &script)?;
            world.did("/srv/drbddisk".as_ref(), OF_DRBDDISK)
        });
        let theirs = || Own::new()?.did(DRBDDISK.as_ref(), OF_DRBDDISK);
        (ours.join(), theirs())
    });
    let (ours, theirs) = (ours.ok().context("a thread")??, theirs?);
    let (text, different) = table("drbddisk", &["original", "own"], &[&theirs, &ours]);
    println!("{text}");
    ensure!(different == 0, "{text}");
    Ok(())
}
