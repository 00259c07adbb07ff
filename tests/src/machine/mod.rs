//! Machines made of namespaces: their own root directory, host name, network and processes, on a
//! switch that joins them. What cluster managers and their scripts expect of a host is there.

use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::nodes::{Did, eventually};

const BOOT: &str = include_str!("boot.sh");

/// Namespaces that last as long as this value, or the process that made it.
#[derive(Debug)]
struct Holder {
    unshare: Child,
    /// Process 1 in them; the shell there ends with its input.
    pid: u32,
    _input: ChildStdin,
}

impl Holder {
    /// Runs a script with bash as process 1 and waits until it says `up`.
    fn new(script: &str, env: &[(&str, &str)]) -> Result<Self> {
        let mut command = Command::new("unshare");
        command.args(["-m", "-u", "-i", "-p", "-n", "-f", "--kill-child", "bash", "-c", script]);
        command.envs(env.iter().copied()).env("HOME", "/root").env_remove("CARGO");
        // unshare(1) complains when it is killed; the script says what is wrong on standard output.
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut unshare = command.spawn()?;
        let input = unshare.stdin.take().context("a pipe")?;
        let output = unshare.stdout.take().context("a pipe")?;
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(output), &mut line)?;
        let id = unshare.id();
        let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children"))?;
        let pid = children.split_whitespace().next().and_then(|word| word.parse().ok());
        let holder = Self { unshare, pid: pid.unwrap_or_default(), _input: input };
        ensure!(line == "up\n" && pid.is_some(), "the machine does not come up: {line}");
        Ok(holder)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        // It may have ended.
        let _ = pid.map(|pid| kill_process(pid, Signal::KILL));
        let _ = self.unshare.wait();
    }
}

/// A switch, and a folder for what outlasts the machines.
#[derive(Debug)]
pub struct Lab {
    switch: Holder,
    dir: TempDir,
}

/// What a machine is made with.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// Host name.
    pub name: String,
    /// Address and prefix length on the switch.
    pub address: String,
    /// Programs that are found in /usr/sbin.
    pub programs: Vec<PathBuf>,
    /// Is the daemon's status file also /proc/drbd?
    pub proc_drbd: bool,
    /// Root file system below the machine's own changes; not the host's.
    pub root: Option<PathBuf>,
}

/// A machine that runs.
#[derive(Debug)]
pub struct Machine {
    holder: Holder,
    /// Host name.
    pub name: String,
    /// What it has as /srv: its disks.
    pub disks: PathBuf,
    port: String,
}

fn run(command: &mut Command) -> Result<String> {
    Did::from(command.stdin(Stdio::null()).output()?).ok().with_context(|| format!("{command:?}"))
}

fn enter(pid: u32) -> Command {
    let mut command = Command::new("nsenter");
    command.args(["-t", &pid.to_string()]);
    command
}

impl Lab {
    /// A switch without machines.
    ///
    /// # Errors
    /// No namespaces.
    pub fn new() -> Result<Self> {
        let script = "exec 2>&1; ip link add name switch type bridge && ip link set switch up && echo up && cat >/dev/null";
        Ok(Self { switch: Holder::new(script, &[])?, dir: TempDir::new()? })
    }

    /// Folder of the lab.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    fn switch(&self, words: &[&str]) -> Result<()> {
        run(enter(self.switch.pid).args(["-n", "ip"]).args(words)).map(drop)
    }

    /// Starts a machine and connects it. /srv is what it was when a machine of this name ran last.
    ///
    /// # Errors
    /// It does not start.
    pub fn boot(&self, config: &Config) -> Result<Machine> {
        let dir = self.dir.path().join(&config.name);
        std::fs::create_dir_all(dir.join("root"))?;
        std::fs::create_dir_all(dir.join("srv"))?;
        let programs = self.copies(&config.programs)?;
        let env = [
            ("DIR", &*dir.display().to_string()),
            ("NAME", &config.name),
            ("PROGRAMS", &programs.join(" ")),
            ("PROC_DRBD", if config.proc_drbd { "1" } else { "" }),
            ("LOWER", &config.root.as_ref().map_or(String::new(), |p| p.display().to_string())),
        ];
        let holder = Holder::new(BOOT, &env)?;
        // Names of interfaces are short: at most 15 letters.
        let port = config.name.clone();
        let [inside, outside] = [holder.pid, self.switch.pid].map(|pid| pid.to_string());
        let words = ["link", "add", "eth0", "netns", &inside, "type", "veth", "peer", "name"];
        run(Command::new("ip").args(words).args([&port, "netns", &outside]))?;
        self.switch(&["link", "set", &port, "master", "switch", "up"])?;
        let disks = dir.join("srv");
        let machine = Machine { holder, name: config.name.clone(), disks, port };
        machine.run("ip", &["addr", "add", &config.address, "brd", "+", "dev", "eth0"])?.ok()?;
        machine.run("ip", &["link", "set", "eth0", "up"])?.ok()?;
        Ok(machine)
    }

    /// Programs as they are now: those in the build folder may be built anew meanwhile.
    fn copies(&self, programs: &[PathBuf]) -> Result<Vec<String>> {
        let dir = self.dir.path().join("programs");
        std::fs::create_dir_all(&dir)?;
        let copy = |program: &PathBuf| {
            let to = dir.join(program.file_name().context("a program")?);
            if !to.exists() {
                std::fs::copy(program, &to)?;
            }
            Ok(to.display().to_string())
        };
        programs.iter().map(copy).collect()
    }

    /// The current is gone: nothing of the machine says goodbye.
    ///
    /// # Errors
    /// Its cable can not be unplugged.
    pub fn power_off(&self, machine: Machine) -> Result<()> {
        self.plug(&machine, false)?;
        let port = machine.port.clone();
        drop(machine);
        // Its network outlives it as long as sockets there wait for answers.
        self.switch(&["link", "delete", &port])
    }

    /// Plugs the cable of a machine in or out.
    ///
    /// # Errors
    /// There is none.
    pub fn plug(&self, machine: &Machine, is_in: bool) -> Result<()> {
        self.switch(&["link", "set", &machine.port, if is_in { "up" } else { "down" }])
    }
}

impl Machine {
    /// A program in it.
    pub fn command(&self, program: &str) -> Command {
        let mut command = enter(self.holder.pid);
        command.args(["-m", "-u", "-i", "-p", "-n", "--", "env", "-i", "HOME=/root"]);
        command.arg("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        command.arg(program).stdin(Stdio::null());
        command
    }

    /// Runs a program.
    ///
    /// # Errors
    /// It can not be run.
    pub fn run(&self, program: &str, words: &[&str]) -> Result<Did> {
        Ok(self.command(program).args(words).output()?.into())
    }

    /// Runs a script with bash.
    ///
    /// # Errors
    /// It can not be run.
    pub fn sh(&self, script: &str) -> Result<Did> {
        self.run("bash", &["-c", script])
    }

    /// Writes a file; a script if it begins like one.
    ///
    /// # Errors
    /// It can not be written.
    pub fn write(&self, path: &str, text: &str) -> Result<()> {
        use std::io::Write as _;
        let mode = if text.starts_with("#!") { "755" } else { "644" };
        let script =
            "mkdir -p \"$(dirname \"$1\")\" && rm -f \"$1\" && cat >\"$1\" && chmod $2 \"$1\"";
        let mut command = self.command("bash");
        command.args(["-c", script, "bash", path, mode]).stdin(Stdio::piped());
        let mut child = command.stdout(Stdio::null()).spawn()?;
        child.stdin.take().context("a pipe")?.write_all(text.as_bytes())?;
        ensure!(child.wait()?.success(), "{path} can not be written");
        Ok(())
    }

    /// Starts the daemon as a service would be, and waits until it answers. Its log is /srv/log.
    ///
    /// # Errors
    /// It does not run.
    pub fn start_daemon(&self) -> Result<()> {
        self.sh("setsid drbdrs >>/srv/log 2>&1 </dev/null &")?.ok()?;
        eventually(|| {
            let did = self.run("drbdsetup", &["status"])?;
            Ok(if did.code == 0 { Ok(()) } else { Err(format!("{did:?}")) })
        })
    }

    /// Waits until a command ends with 0.
    ///
    /// # Errors
    /// Not within a minute.
    pub fn until(&self, script: &str) -> Result<()> {
        let look = || {
            let did = self.sh(script)?;
            Ok(if did.code == 0 { Ok(()) } else { Err(format!("{did:?}")) })
        };
        eventually(look).with_context(|| format!("{script} on {}", self.name))
    }

    /// The ends of these files, for failures.
    pub fn tails(&self, files: &[&str]) -> String {
        let script = format!("tail -v -n 60 {}", files.join(" "));
        self.sh(&script).map_or_else(|e| e.to_string(), |did| format!("{}{}", did.out, did.err))
    }

    /// Process 1, as the host numbers it.
    pub fn pid(&self) -> u32 {
        self.holder.pid
    }
}
