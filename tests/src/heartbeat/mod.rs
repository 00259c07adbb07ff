//! Two nodes under Heartbeat 3 in haresources mode and an iSCSI client, on machines made of
//! namespaces: timings, addresses and names of a site that ran DRBD in the kernel.

mod client;

use std::time::Duration;

use anyhow::{Context as _, Result};

pub use self::client::Client;
use crate::machine::{Config, Lab, Machine};
use crate::nodes::{Programs, eventually};

/// The address that moves.
const SERVICE: &str = "192.168.103.36";
/// Addresses of the nodes.
const ADDRESSES: [&str; 2] = ["192.168.103.99", "192.168.103.91"];
const DRBDDISK: &str = include_str!("../../../conf/agents/heartbeat/drbddisk");
const NBDFILE: &str = include_str!("nbdfile");

const CONFIGURATION: &str = "global { usage-count no; }
resource r0 {
  net { protocol C; ping-timeout 5; connect-int 1; ping-int 1; }
  disk { c-plan-ahead 0; resync-rate 200M; }
  volume 0 { device minor 0; disk /srv/disk0; meta-disk internal; }
  on iscsi-server0 { address 192.168.103.99:7788; }
  on iscsi-server1 { address 192.168.103.91:7788; }
}
";
const HA_CF: &str = "logfile /var/log/ha-log
debugfile /var/log/ha-debug
node iscsi-server0
node iscsi-server1
keepalive 1
warntime 2
deadtime 3
initdead 6
udpport 694
ucast eth0 192.168.103.99
ucast eth0 192.168.103.91
auto_failback off
";
const HARESOURCES: &str = "iscsi-server0 drbddisk::r0 nbdfile::r0 192.168.103.36/24 tgt\n";
const TARGETS: &str = "default-driver iscsi
<target iqn.2013-11.edu.uoc:ha-disk>
    backing-store /run/r0/disk
</target>
";
const HOSTS: &str = "127.0.0.1 localhost
192.168.103.99 iscsi-server0
192.168.103.91 iscsi-server1
192.168.103.36 iscsi-server-ha
192.168.103.93 iscsi-client
";
/// What the packages make at boot.
const PREPARE: &str =
    "mkdir -p /run/heartbeat/{ccm,dopd,crm,rsctmp} /run/lock/subsys /run/resource-agents
chown -R hacluster:haclient /run/heartbeat
chmod 600 /etc/ha.d/authkeys
rm -f /var/log/ha-* /var/lib/heartbeat/hostcache /sbin/reboot
truncate -s 64M /srv/disk0
printf '#!/bin/sh\\necho \"$0 $*\" >>/srv/reboots\\n' >/sbin/reboot
chmod 755 /sbin/reboot";

/// How a node leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaving {
    /// Heartbeat is stopped.
    Clean,
    /// The current fails.
    PowerOff,
}

/// Both nodes, and the client.
#[derive(Debug)]
pub struct Site {
    lab: Lab,
    programs: Programs,
    nodes: [Option<Machine>; 2],
    client: Machine,
}

impl Site {
    /// Boots the machines, makes equal disks and starts Heartbeat on both nodes.
    ///
    /// # Errors
    /// Something does not come up.
    pub fn new(programs: Programs) -> Result<Self> {
        let lab = Lab::new()?;
        let client = lab.boot(&Config {
            name: "iscsi-client".into(),
            address: "192.168.103.93/24".into(),
            ..Config::default()
        })?;
        // Not every kernel has it. Without it a client that has met silence tries again after 3 s, then
        // after 6 s, however early the service is back.
        client.sh("sysctl -q -w net.ipv4.tcp_rto_max_ms=1000 || true")?.ok()?;
        let mut site = Self { lab, programs, nodes: [None, None], client };
        for number in 0..2 {
            site.boot(number)?;
            site.node(number)?.run("drbdadm", &["create-md", "--force", "r0"])?.ok()?;
            site.up(number)?;
        }
        let first = site.node(0)?;
        first.until("drbdadm cstate r0 | grep -q ^Connected")?;
        first.run("drbdadm", &["new-current-uuid", "--clear-bitmap", "r0/0"])?.ok()?;
        site.in_sync(0)?;
        site.start_heartbeat(0)?;
        site.start_heartbeat(1)?;
        site.until_active(0)?;
        Ok(site)
    }

    /// A node that runs.
    ///
    /// # Errors
    /// It is off.
    pub fn node(&self, number: usize) -> Result<&Machine> {
        self.nodes.get(number).and_then(Option::as_ref).context("the node is off")
    }

    /// Boots a node; nothing of the cluster runs yet.
    fn boot(&mut self, number: usize) -> Result<()> {
        let name = format!("iscsi-server{number}");
        let address = format!("{}/24", ADDRESSES[number]);
        let programs = self.programs.paths();
        let machine = self.lab.boot(&Config { name, address, programs, ..Config::default() })?;
        for (path, text) in [
            ("/etc/drbd.conf", CONFIGURATION),
            ("/etc/ha.d/ha.cf", HA_CF),
            ("/etc/ha.d/haresources", HARESOURCES),
            ("/etc/ha.d/authkeys", "auth 1\n1 sha1 RandomSecretPassword\n"),
            ("/etc/ha.d/resource.d/drbddisk", DRBDDISK),
            ("/etc/ha.d/resource.d/nbdfile", NBDFILE),
            ("/etc/tgt/targets.conf", TARGETS),
            ("/etc/hosts", HOSTS),
        ] {
            machine.write(path, text)?;
        }
        machine.sh(PREPARE)?.ok()?;
        machine.start_daemon()?;
        self.nodes[number] = Some(machine);
        Ok(())
    }

    fn up(&self, number: usize) -> Result<()> {
        self.node(number)?.run("drbdadm", &["up", "r0"])?.ok().map(drop)
    }

    fn start_heartbeat(&self, number: usize) -> Result<()> {
        let script = "/usr/libexec/heartbeat/heartbeat </dev/null >/var/log/start.out 2>&1";
        self.node(number)?.sh(script)?.ok().map(drop)
    }

    /// Waits until the disks of a node and its peer are equal.
    ///
    /// # Errors
    /// They do not get so.
    pub fn in_sync(&self, number: usize) -> Result<()> {
        let node = self.node(number)?;
        node.until("drbdadm dstate r0 | grep -q UpToDate/UpToDate").with_context(|| self.logs())
    }

    /// Has it the service address, and does the target answer there?
    fn is_active(&self, number: usize) -> Result<bool> {
        let script = format!("ip addr show eth0 | grep -q {SERVICE}/ && pidof tgtd >/dev/null");
        Ok(self.node(number)?.sh(&script)?.code == 0)
    }

    /// Waits until a node serves.
    ///
    /// # Errors
    /// It does not.
    pub fn until_active(&self, number: usize) -> Result<()> {
        let look = || Ok(if self.is_active(number)? { Ok(()) } else { Err(self.logs()) });
        eventually(look)
    }

    /// A client of the service address.
    ///
    /// # Errors
    /// It can not open the device.
    pub fn client(&self) -> Result<Client> {
        let url = format!("iscsi://{SERVICE}/iqn.2013-11.edu.uoc:ha-disk/1");
        // The target may just be starting.
        let open = || Ok(Client::open(&self.client, &url).map_err(|e| format!("{e:#}")));
        eventually(open).with_context(|| self.logs())
    }

    /// Ends a client whose service does not come back.
    pub fn end_client(&self) {
        // There may be none.
        let _ = self.client.sh("kill -KILL $(pidof qemu-io)");
    }

    /// A node leaves, and the other one takes over.
    ///
    /// # Errors
    /// It does not.
    pub fn leave(&mut self, number: usize, how: Leaving) -> Result<()> {
        match how {
            Leaving::Clean => {
                // It ends when all is over; nobody waits.
                let script =
                    "setsid /usr/libexec/heartbeat/heartbeat -k >/dev/null 2>&1 </dev/null &";
                self.node(number)?.sh(script)?.ok()?;
            }
            Leaving::PowerOff => {
                let machine = self.nodes[number].take().context("the node is off")?;
                self.lab.power_off(machine)?;
            }
        }
        Ok(())
    }

    /// The node that left is there again, as a passive one with good data.
    ///
    /// # Errors
    /// It does not come back.
    pub fn come_back(&mut self, number: usize) -> Result<()> {
        if self.nodes[number].is_none() {
            self.boot(number)?;
            self.up(number)?;
        } else {
            self.node(number)?.until("! pidof heartbeat")?;
        }
        self.node(number)?.sh("rm -f /var/log/ha-log")?.ok()?;
        self.start_heartbeat(number)?;
        self.in_sync(number)?;
        // Earlier it would not take over, and it does not say when its peer knows.
        let is_ready = "grep -q 'remote resource transition completed' /var/log/ha-log && \
                        grep -q 'Initial resource acquisition complete' /var/log/ha-log";
        self.node(number)?.until(is_ready)?;
        std::thread::sleep(Duration::from_secs(5));
        Ok(())
    }

    /// What both nodes logged last.
    pub fn logs(&self) -> String {
        let of = |number| {
            let files = ["/var/log/ha-log", "/srv/log", "/srv/nbdfile.log", "/srv/reboots"];
            self.node(number).map_or_else(|e| e.to_string(), |node| node.tails(&files))
        };
        format!("{}\n{}", of(0), of(1))
    }
}
