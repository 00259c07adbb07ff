//! Small virtual machines with an unmodified Linux kernel, its in-kernel DRBD 8.4 and the original
//! tools: what drbdrs is compared with, and what it replicates with.
//!
//! A guest needs [`QEMU`] and Debian's apt, but no privileges; the first use builds its
//! image (see [`image`]; `cargo xtask guest` does it ahead of time). It runs under software
//! emulation, 10 to 30 times slower than the host: good for behaviour, and for speed only as a
//! ratio within one guest.
//!
//! ```no_run
//! use drbdrs_tests::guest::{Config, Disk, Guest};
//! # fn main() -> anyhow::Result<()> {
//! let mut guest = Guest::boot(Config::new("alpha").disk(Disk::Size(64 << 20)))?;
//! guest.put("/etc/drbd.conf", b"...")?;
//! let output = guest.run("drbdadm create-md --force r0 && drbdadm up r0")?;
//! println!("{} {}", output.status, output.out);
//! println!("{}\n{}", guest.proc_drbd()?, guest.take_log()?);
//! guest.power_cut()?; // nothing is flushed inside; what reached the disk stays
//! guest.start()?; // the same disks again
//! guest.shutdown()?;
//! # Ok(()) }
//! ```
//!
//! * Disks are `/dev/vda`, `/dev/vdb`, ... with a volatile write cache and discard; discarded parts
//!   read as zeroes. Images that the guest made go away with the [`Guest`].
//! * `eth0` is for control only. `eth1` is the [`Link`]: with [`Link::Host`] the guest is
//!   [`GUEST`] and reaches the host's 127.0.0.1 as [`HOST`]; [`Guest::forward`] gives the host a
//!   port that leads into the guest. DRBD doesn't check where a connection comes from, so
//!   `address 10.0.3.15:7789` and, for the peer on the host, `address 10.0.3.2:PORT` work. With
//!   [`Pair`] two guests share a wire. No guest has a default route.
//! * A forwarded port accepts connections even while nobody listens in the guest, and then closes
//!   them. Between tests and guest a [`crate::proxy::Proxy`] can delay, hold and cut.
//! * [`Guest::set_link`] pulls the cable of `eth1`; [`Guest::freeze`] stops the whole machine.
//! * `drbdadm` is the front end of version 9, which hands over to `/lib/drbd/drbdadm-84`.
//! * The shell prefers its own applets: programs that exist beside them (`/sbin/blkdiscard`,
//!   `/sbin/mke2fs`) need their full path.
//! * Programs built on the host run in the guest (same Debian release): [`Guest::put_program`].
//! * Several guests can run at once; each dies, by its process id, with its [`Guest`].

mod agent;
mod config;
mod cpio;
pub mod image;
mod modules;
mod monitor;
mod packages;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

pub use self::agent::{Job, Output};
pub use self::config::{Config, Disk, Link, Pair};
use self::monitor::Monitor;

/// The guest on its link to the host.
pub const GUEST: &str = "10.0.3.15";
/// The host's loopback, seen from the guest.
pub const HOST: &str = "10.0.3.2";
/// How long ordinary calls may take.
pub const DEADLINE: Duration = Duration::from_secs(60);
/// How long a boot may take: usually 6 to 10 seconds, more when many run at once.
const BOOT_DEADLINE: Duration = Duration::from_secs(180);
/// The emulator.
pub const QEMU: &str = "qemu-system-x86_64";

/// A virtual machine; it runs unless [`Guest::power_cut`] or [`Guest::shutdown`] ended it.
#[derive(Debug)]
pub struct Guest {
    config: Config,
    folder: tempfile::TempDir,
    disks: Vec<PathBuf>,
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    guard: Child,
    process: Child,
    monitor: Monitor,
    control: u16,
}

impl Drop for Running {
    fn drop(&mut self) {
        // By their ids, and reaped, the guard first: nothing can hit another process. Either may
        // have ended already.
        let _ = self.guard.kill();
        let _ = self.guard.wait();
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Guest {
    /// Boots a guest and waits until it takes commands. Builds the image if there is none yet.
    ///
    /// # Errors
    /// No image, no QEMU, or the guest does not come up.
    pub fn boot(config: Config) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("drbdrs-guest-").tempdir()?;
        let mut disks = Vec::new();
        for (i, disk) in config.disks.iter().enumerate() {
            disks.push(match disk {
                Disk::Size(bytes) => {
                    let path = folder.path().join(format!("disk{i}"));
                    File::create(&path)?.set_len(*bytes)?;
                    path
                }
                Disk::Image(path) => fs::canonicalize(path)?,
            });
        }
        let mut guest = Self { config, folder, disks, running: None };
        guest.start()?;
        Ok(guest)
    }

    /// Boots again, with the same disks. Forwarded ports must be made anew.
    ///
    /// # Errors
    /// It runs already, or does not come up.
    pub fn start(&mut self) -> Result<()> {
        ensure!(self.running.is_none(), "{} runs already", self.config.name);
        let image = image::image()?;
        let _ = fs::remove_file(self.console());
        let _ = fs::remove_file(self.folder.path().join("monitor"));
        self.running = Some(self.launch(&image)?);
        let outcome = self.come_up();
        if outcome.is_err() {
            self.running = None;
        }
        outcome
    }

    fn launch(&self, image: &image::Image) -> Result<Running> {
        let mut command = Command::new(QEMU);
        command.args(self.arguments(image)).stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(File::create(self.folder.path().join("stderr"))?);
        let mut process = command.spawn().with_context(|| format!("cannot start {QEMU}"))?;
        let monitor = self.connect(&mut process);
        match monitor.and_then(|monitor| Ok((monitor, self.guard(process.id())?))) {
            Ok((monitor, guard)) => Ok(Running { guard, process, monitor, control: 0 }),
            Err(e) => {
                let _ = process.kill();
                let _ = process.wait();
                Err(e)
            }
        }
    }

    /// A process that notices, by the end of its input, that this one was killed, and cleans up.
    fn guard(&self, pid: u32) -> Result<Child> {
        let script = "trap '' INT TERM HUP; read -r _; kill -9 \"$1\"; rm -rf \"$2\"";
        let mut command = Command::new("sh");
        command.args(["-c", script, "guard", &pid.to_string()]).arg(self.folder.path());
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(command.spawn()?)
    }

    fn arguments(&self, image: &image::Image) -> Vec<String> {
        let mut words: Vec<String> = Vec::new();
        let mut add = |list: &[&str]| words.extend(list.iter().map(|w| (*w).to_owned()));
        // Hardware virtualisation is not used even where it exists: the same everywhere.
        add(&["-machine", "pc", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "1"]);
        add(&["-m", &self.config.memory_mib.to_string(), "-nodefaults", "-display", "none"]);
        add(&["-no-reboot", "-serial", &format!("file:{}", self.console().display())]);
        let monitor = self.folder.path().join("monitor");
        add(&["-qmp", &format!("unix:{},server=on,wait=off", monitor.display())]);
        add(&["-kernel", &image.kernel.display().to_string()]);
        add(&["-initrd", &image.initrd.display().to_string()]);
        let (netdev, address) = match &self.config.link {
            Link::Host => {
                let net = "user,id=link,restrict=off,net=10.0.3.0/24,host=10.0.3.2";
                (net.to_owned(), format!("{GUEST}/24"))
            }
            // The other forms of this back end delay small frames by 40 ms.
            Link::Wire { address, local, remote } => (
                format!("socket,id=link,udp=127.0.0.1:{remote},localaddr=127.0.0.1:{local}"),
                address.clone(),
            ),
        };
        let host = address.split(['.', '/']).nth(3).unwrap_or("15").parse().unwrap_or(15_u8);
        add(&["-netdev", "user,id=control,net=10.0.2.0/24,hostfwd=tcp:127.0.0.1:0-:2222"]);
        add(&["-device", "virtio-net-pci,netdev=control,romfile="]);
        add(&["-netdev", &netdev]);
        let mac = format!("mac=52:54:00:00:07:{host:02x}");
        add(&["-device", &format!("virtio-net-pci,netdev=link,id=link0,romfile=,{mac}")]);
        if let Some(file) = &self.config.capture {
            let file = file.display();
            add(&["-object", &format!("filter-dump,id=dump,netdev=link,file={file}")]);
        }
        for disk in &self.disks {
            // Only a crash of the host could lose what QEMU has written: no need to wait for it.
            let options = "if=virtio,format=raw,cache=unsafe,discard=unmap";
            add(&["-drive", &format!("file={},{options}", disk.display())]);
        }
        let modules = self.config.modules.join(",");
        add(&[
            "-append",
            &format!(
                "console=ttyS0 quiet panic=-1 no_timer_check tsc=reliable mitigations=off \
                 drbdrs.name={} drbdrs.modules={modules} \
                 drbdrs.net=eth0:10.0.2.15/24,eth1:{address}",
                self.config.name
            ),
        ]);
        words
    }

    fn console(&self) -> PathBuf {
        self.folder.path().join("console")
    }

    /// What the guest wrote on its serial console: panics, and complaints of its first process.
    pub fn console_text(&self) -> String {
        let text = fs::read(self.console()).unwrap_or_default();
        String::from_utf8_lossy(&text).into_owned()
    }

    fn connect(&self, process: &mut Child) -> Result<Monitor> {
        let path = self.folder.path().join("monitor");
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            match Monitor::connect(&path) {
                Ok(monitor) => return Ok(monitor),
                Err(e) if Instant::now() > end => return Err(e),
                Err(_) => {}
            }
            if let Some(status) = process.try_wait()? {
                let said = fs::read_to_string(self.folder.path().join("stderr"))?;
                bail!("{QEMU} ended with {status}: {said}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn come_up(&mut self) -> Result<()> {
        let end = Instant::now() + BOOT_DEADLINE;
        while !self.console_text().contains("guest-ready") {
            ensure!(self.is_running()?, "the guest ended: {}", self.console_text());
            ensure!(Instant::now() < end, "the guest is too slow: {}", self.console_text());
            std::thread::sleep(Duration::from_millis(50));
        }
        let control = self.forwarded("control", 2222)?;
        self.running()?.control = control;
        // The first process has started the server, but perhaps it does not listen yet.
        while !self.run("true").is_ok_and(|o| o.status == 0) {
            ensure!(Instant::now() < end, "the guest takes no commands: {}", self.console_text());
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    fn running(&mut self) -> Result<&mut Running> {
        self.running.as_mut().with_context(|| format!("{} does not run", self.config.name))
    }

    fn control(&self) -> Result<u16> {
        let running = self.running.as_ref();
        Ok(running.with_context(|| format!("{} does not run", self.config.name))?.control)
    }

    /// Is the machine on? It turns itself off when the kernel panics.
    ///
    /// # Errors
    /// The process can not be asked.
    pub fn is_running(&mut self) -> Result<bool> {
        match &mut self.running {
            Some(running) => Ok(running.process.try_wait()?.is_none()),
            None => Ok(false),
        }
    }

    /// Process id of the machine.
    pub fn pid(&self) -> Option<u32> {
        self.running.as_ref().map(|r| r.process.id())
    }

    /// The image of a disk on the host. Reading it while the guest runs gives what it has written
    /// so far; writing then is wrong.
    pub fn disk_image(&self, index: usize) -> Option<&Path> {
        self.disks.get(index).map(PathBuf::as_path)
    }

    /// Runs a shell script.
    ///
    /// # Errors
    /// It lasts longer than [`DEADLINE`], or the guest is gone. A bad exit status is no error.
    pub fn run(&self, script: &str) -> Result<Output> {
        self.run_for(script, DEADLINE)
    }

    /// Runs a shell script that may take longer, or must be quick.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_for(&self, script: &str, deadline: Duration) -> Result<Output> {
        self.spawn(script)?.wait(deadline)
    }

    /// Runs a shell script that must succeed; returns what it says.
    ///
    /// # Errors
    /// As [`Self::run`], or the exit status is not 0.
    pub fn ok(&self, script: &str) -> Result<String> {
        let output = self.run(script)?;
        ensure!(output.status == 0, "exit status {} of: {script}\n{}", output.status, output.out);
        Ok(output.out)
    }

    /// Starts a shell script; meanwhile the test can do something else.
    ///
    /// # Errors
    /// The guest is gone.
    pub fn spawn(&self, script: &str) -> Result<Job> {
        Job::start(self.control()?, script)
    }

    /// Runs a script again and again until it succeeds.
    ///
    /// # Errors
    /// It does not within the deadline.
    pub fn wait_for(&self, script: &str, deadline: Duration) -> Result<String> {
        let end = Instant::now() + deadline;
        loop {
            let output = self.run_for(script, deadline)?;
            if output.status == 0 {
                return Ok(output.out);
            }
            if Instant::now() > end {
                let state = self.proc_drbd().unwrap_or_default();
                bail!("after {deadline:?} still not: {script}\n{}\n{state}", output.out);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Writes a file, making its folder; 10 MB take about a second.
    ///
    /// # Errors
    /// The guest has no room or is gone.
    pub fn put(&self, path: &str, content: &[u8]) -> Result<()> {
        agent::put(self.control()?, path, content, DEADLINE)
    }

    /// Copies a program of the host into the guest and checks that it can be started there.
    ///
    /// # Errors
    /// It lacks libraries in the guest.
    pub fn put_program(&self, program: &Path, path: &str) -> Result<()> {
        let content = fs::read(program).with_context(|| program.display().to_string())?;
        self.put(path, &content)?;
        // A static program is refused by the loader, with another exit status.
        let loader = "/lib64/ld-linux-x86-64.so.2";
        let check = format!(
            "chmod 755 {path}; {loader} --verify {path}; [ $? = 1 ] || \
             ! {loader} --list {path} | grep 'not found'"
        );
        self.ok(&check).with_context(|| format!("{} in the guest", program.display())).map(drop)
    }

    /// Reads a file or a whole device.
    ///
    /// # Errors
    /// It can not be read.
    pub fn get(&self, path: &str) -> Result<Vec<u8>> {
        self.bytes(&format!("cat '{path}'"))
    }

    /// Standard output of a script that must succeed, as bytes.
    ///
    /// # Errors
    /// As [`Self::ok`].
    pub fn bytes(&self, script: &str) -> Result<Vec<u8>> {
        let (out, status) = self.spawn(script)?.wait_bytes(DEADLINE)?;
        let text = || String::from_utf8_lossy(&out[..out.len().min(2000)]).into_owned();
        ensure!(status == 0, "exit status {status} of: {script}\n{}", text());
        Ok(out)
    }

    /// `/proc/drbd`.
    ///
    /// # Errors
    /// The guest is gone.
    pub fn proc_drbd(&self) -> Result<String> {
        let script = "cat /proc/drbd";
        // Rarely a control connection stalls on a busy host; asking again does no harm here.
        let output = self.run_for(script, DEADLINE / 4).or_else(|_| self.run(script))?;
        ensure!(output.status == 0, "exit status {} of: {script}\n{}", output.status, output.out);
        Ok(output.out)
    }

    /// The kernel's log, everything that is still in its buffer.
    ///
    /// # Errors
    /// The guest is gone.
    pub fn log(&self) -> Result<String> {
        self.ok("dmesg")
    }

    /// The kernel's log since the last call.
    ///
    /// # Errors
    /// The guest is gone.
    pub fn take_log(&self) -> Result<String> {
        self.ok("dmesg -c")
    }

    /// Opens a port of the host (127.0.0.1, a free number) that leads to a port of the guest's
    /// link.
    ///
    /// # Errors
    /// The link does not lead to the host.
    pub fn forward(&mut self, port: u16) -> Result<u16> {
        ensure!(matches!(self.config.link, Link::Host), "the link leads to another guest");
        let text = format!("hostfwd_add link tcp:127.0.0.1:0-{GUEST}:{port}");
        let said = self.running()?.monitor.text(&text)?;
        ensure!(said.trim().is_empty(), "{text}: {said}");
        self.forwarded("link", port)
    }

    /// The host's port behind which a port of the guest is.
    fn forwarded(&mut self, netdev: &str, port: u16) -> Result<u16> {
        let text = self.running()?.monitor.text("info usernet")?;
        let mut is_ours = false;
        let mut found = None;
        // Protocol[State] FD SourceAddress Port DestAddress Port RecvQ SendQ
        for line in text.lines() {
            if line.contains("VLAN") || line.contains("Hub") {
                is_ours = line.contains(&format!("({netdev})"));
            }
            let words: Vec<&str> = line.split_whitespace().collect();
            if is_ours
                && let ["TCP[HOST_FORWARD]", _, _, host, _, guest, ..] = words.as_slice()
                && guest.parse() == Ok(port)
            {
                found = host.parse().ok();
            }
        }
        found.with_context(|| format!("port {port} of {netdev} is not forwarded: {text}"))
    }

    /// Pulls or plugs the cable of the link. Frames in flight are lost; connections stay open on
    /// both sides, as with a real cable.
    ///
    /// # Errors
    /// The guest is gone.
    pub fn set_link(&mut self, up: bool) -> Result<()> {
        let arguments = json!({ "name": "link0", "up": up });
        self.running()?.monitor.call("set_link", &arguments).map(drop)
    }

    /// Stops the whole machine: no packet is answered any more.
    ///
    /// # Errors
    /// The guest is gone.
    pub fn freeze(&mut self) -> Result<()> {
        self.running()?.monitor.call("stop", &json!({})).map(drop)
    }

    /// Lets a frozen machine go on.
    ///
    /// # Errors
    /// The guest is gone.
    pub fn thaw(&mut self) -> Result<()> {
        self.running()?.monitor.call("cont", &json!({})).map(drop)
    }

    /// Pulls the plug: nothing inside is flushed; the disks keep what the guest had written.
    ///
    /// # Errors
    /// It does not run.
    pub fn power_cut(&mut self) -> Result<()> {
        ensure!(self.running.take().is_some(), "{} does not run", self.config.name);
        Ok(())
    }

    /// Turns the machine off the orderly way. Resources of DRBD are not taken down first: that is
    /// for a script to do.
    ///
    /// # Errors
    /// It does not turn off in time; then it is killed.
    pub fn shutdown(&mut self) -> Result<()> {
        self.spawn("sync; poweroff -f")?;
        let end = Instant::now() + DEADLINE;
        while self.is_running()? {
            if Instant::now() > end {
                self.running = None;
                bail!("the guest does not turn off: {}", self.console_text());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.running = None;
        Ok(())
    }
}
