//! wait-con-int: waiting for the peers at boot, with a dialog. Spec: config-and-drbdadm.md §12.2.

use std::fs::OpenOptions;
use std::io::{BufRead, Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::app::App;
use crate::backend::BOUND;
use crate::run::lines;
use crate::select::volumes;
use crate::{host, print};

/// Waits for all resources of the selected kind. Always 0.
pub fn wait_con_int(app: &App) -> i32 {
    let stacked = app.invocation.stacked;
    if app.backend.dry_run && !host::on_terminal() {
        remark_about_the_console();
    }
    let here =
        app.loaded.config.resources.iter().filter(|r| !r.is_ignored() && r.is_stacked() == stacked);
    let mut children = Vec::new();
    for resource in here {
        for volume in volumes(resource) {
            let call = lines(app, resource).wait_connect(volume, false);
            if app.backend.dry_run {
                app.backend.run(&call);
            } else if let Some(child) = start(app, &call.args) {
                children.push(child);
            }
        }
    }
    if !app.backend.dry_run {
        Waiting { children }.wait(app);
    }
    0
}

fn start(app: &App, args: &[bstr::BString]) -> Option<Child> {
    use std::os::unix::ffi::OsStrExt;
    let me = std::env::current_exe().ok()?;
    let word = |w: &bstr::BString| std::ffi::OsStr::from_bytes(w).to_owned();
    let mut command = Command::new(me);
    command.arg(BOUND).arg(word(&app.backend.setup)).args(args.iter().map(word));
    match command.stdin(Stdio::null()).spawn() {
        Ok(child) => Some(child),
        Err(e) => {
            print::complain(format!("Can not exec: {e}"));
            None
        }
    }
}

fn remark_about_the_console() {
    let text = b"WARN: stdin/stdout is not a TTY; using /dev/console";
    print::stderr(text);
    print::stdout(text);
}

struct Waiting {
    children: Vec<Child>,
}

impl Waiting {
    /// Reaps the children that have ended; true when none is left.
    fn all_ended(&mut self) -> bool {
        self.children.retain_mut(|c| matches!(c.try_wait(), Ok(None)));
        self.children.is_empty()
    }

    fn wait(&mut self, app: &App) {
        let mut console = Console::open();
        for _ in 0..10 {
            let second = Instant::now() + Duration::from_secs(1);
            while Instant::now() < second {
                if self.all_ended() {
                    return;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            console.say(".");
        }
        console.say(&notice(app));
        if !console.interactive {
            let pid = std::process::id();
            console.say(&format!(
                " To abort waiting for DRBD connections, kill this process: kill {pid}\n"
            ));
            for child in &mut self.children {
                let _ = child.wait();
            }
            return;
        }
        for command in [
            &["plymouth", "quit"][..],
            &["usplash_write", "QUIT"],
            &["stty", "echo", "icanon", "icrnl"],
        ] {
            if let Some((program, args)) = command.split_first() {
                let quiet = Command::new(program).args(args).stderr(Stdio::null()).status();
                drop(quiet);
            }
        }
        self.dialog(app, &mut console);
        console.say("\n");
    }

    fn dialog(&mut self, app: &App, console: &mut Console) {
        let refresh = app.loaded.config.global.dialog_refresh.unwrap_or(1);
        let input = console.read_lines();
        let start = Instant::now();
        let mut abort = Abort::default();
        console.say(" To abort waiting enter 'yes' [ -- ]: ");
        loop {
            let seconds = start.elapsed().as_secs();
            console.say(&format!("\x1b[s\x1b[31G[{seconds:4}]:\x1b[u"));
            // Children are looked at once a second even if the display is refreshed rarely.
            let round = Duration::from_secs(u64::from(refresh.max(1)));
            let until = Instant::now() + round;
            while Instant::now() < until {
                if self.all_ended() {
                    return;
                }
                match input.recv_timeout(Duration::from_millis(50)) {
                    Ok(chunk) => match abort.feed(&chunk) {
                        Verdict::Abort => return self.stop(),
                        Verdict::Other => {
                            console.say(" To abort waiting enter 'yes' [ -- ]:");
                        }
                        Verdict::Nothing => {}
                    },
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => {
                        std::thread::sleep(Duration::from_millis(50));
                    }
                }
            }
        }
    }

    fn stop(&mut self) {
        for child in &mut self.children {
            if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
                let _ = kill_process(pid, Signal::INT);
            }
        }
        for child in &mut self.children {
            let _ = child.wait();
        }
    }
}

/// What was typed so far.
#[derive(Default)]
struct Abort {
    line: Vec<u8>,
    interrupts: u32,
}

enum Verdict {
    Abort,
    Other,
    Nothing,
}

impl Abort {
    /// A line `yes`, or three times ctrl-C or ctrl-D on a terminal without line mode.
    fn feed(&mut self, bytes: &[u8]) -> Verdict {
        let mut verdict = Verdict::Nothing;
        for byte in bytes {
            match byte {
                3 | 4 => {
                    self.interrupts += 1;
                    if self.interrupts >= 3 {
                        return Verdict::Abort;
                    }
                }
                b'\n' | b'\r' => {
                    if self.line == b"yes" {
                        return Verdict::Abort;
                    }
                    self.line.clear();
                    verdict = Verdict::Other;
                }
                _ if self.line.len() < 64 => self.line.push(*byte),
                _ => {}
            }
        }
        verdict
    }
}

/// Where the dialog takes place.
struct Console {
    interactive: bool,
    file: Option<std::fs::File>,
}

impl Console {
    fn open() -> Self {
        if host::on_terminal() {
            return Self { interactive: true, file: None };
        }
        remark_about_the_console();
        match OpenOptions::new().read(true).write(true).open("/dev/console") {
            Ok(file) => Self { interactive: true, file: Some(file) },
            Err(_) => Self { interactive: false, file: None },
        }
    }

    fn say(&mut self, text: &str) {
        match &mut self.file {
            Some(file) => {
                let _ = file.write_all(text.as_bytes());
            }
            None => print::stdout(text.as_bytes()),
        }
    }

    /// Lines (or single bytes of a raw terminal) as they are typed.
    fn read_lines(&self) -> Receiver<Vec<u8>> {
        let (send, receive) = channel();
        let file = self.file.as_ref().and_then(|f| f.try_clone().ok());
        std::thread::spawn(move || {
            let mut chunk = [0u8; 64];
            let mut stdin = std::io::stdin().lock();
            let mut file = file;
            loop {
                let got = match &mut file {
                    Some(file) => file.read(&mut chunk),
                    None => stdin.fill_buf().map(<[u8]>::len).and_then(|n| {
                        let n = n.min(chunk.len());
                        stdin.read(&mut chunk[..n])
                    }),
                };
                match got {
                    Ok(n) if n > 0 => {
                        if send.send(chunk.get(..n).unwrap_or_default().to_vec()).is_err() {
                            return;
                        }
                    }
                    _ => return,
                }
            }
        });
        receive
    }
}

/// Explains the waiting; the values are those of the first resource of the file.
fn notice(app: &App) -> String {
    let first = app.loaded.config.resources.first();
    let value = |name: &str| {
        let option = first?.startup.items.iter().find(|o| o.spec.name == name)?;
        option.value.as_ref().map(ToString::to_string)
    };
    let seconds = |name: &str| value(name).unwrap_or_else(|| "0".into());
    let name = first.map(|r| r.name.to_string()).unwrap_or_default();
    let bar = "*".repeat(63);
    format!(
        "\n{bar}\n Waiting at boot for the DRBD peers to appear.\n   - If this node was already \
         degraded before the reboot, the limit\n     is {} seconds. [degr-wfc-timeout]\n   - \
         Otherwise it is {} seconds. [wfc-timeout]\n   (Values of resource '{name}'; 0 means for \
         ever.)\n{bar}\n",
        seconds("degr-wfc-timeout"),
        seconds("wfc-timeout")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_line_of_yes_or_three_interrupts_abort() {
        let mut abort = Abort::default();
        assert!(matches!(abort.feed(b"no\n"), Verdict::Other));
        assert!(matches!(abort.feed(b"ye"), Verdict::Nothing));
        assert!(matches!(abort.feed(b"s\n"), Verdict::Abort));
        let mut abort = Abort::default();
        assert!(matches!(abort.feed(&[3, 4]), Verdict::Nothing));
        assert!(matches!(abort.feed(&[3]), Verdict::Abort));
        assert!(matches!(Abort::default().feed(&vec![b'x'; 1 << 20]), Verdict::Nothing));
    }
}
