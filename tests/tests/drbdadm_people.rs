//! What drbdadm gives to people: complaints on a terminal, names to choose from, completion, manual.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use drbdrs_tests::need::{Need, trial};
use drbdrs_tests::program;
use libtest_mimic::{Arguments, Failed};

const GOOD: &str = "global { dialog-refresh 3; }
common { startup { become-primary-on alpha; } }
resource r0 {
    disk /dev/x;
    net { timeout 70; }
    on alpha { device minor 7; meta-disk internal; address 192.0.2.1:7789; }
    on bravo { device minor 7; meta-disk internal; address 192.0.2.2:7789; }
}
";

const BAD: &str = "resource r0 {
    net { tmeout 60; max-buffers 1; }
    frobnicate yes;
    on alpha { device minor 7; disk /d; meta-disk internal; address 127.0.0.1:7789; }
}
resource r1 { on alpha { device minor 7; } }
";

fn main() {
    let args = Arguments::from_args();
    let tests = vec![
        trial("names_to_choose_from", &[], names),
        trial("errors_on_a_terminal", &[Need::File("/usr/bin/script")], terminal),
        trial("lint_reads_the_settings_too", &[], lint),
        trial("every_value_has_a_place", &[], places),
        trial("bash_completes", &[Need::File("/bin/bash")], completion),
        trial("manual_is_formatted_without_warnings", &[Need::File("/usr/bin/man")], manual),
    ];
    libtest_mimic::run(&args, tests).exit();
}

type Outcome = Result<(), Failed>;

/// A folder with `t.conf` and a call of drbdadm on it.
struct Scene {
    folder: tempfile::TempDir,
    drbdadm: PathBuf,
}

impl Scene {
    fn new(text: &str) -> Result<Self, Failed> {
        let folder = tempfile::tempdir()?;
        std::fs::write(folder.path().join("t.conf"), text)?;
        Ok(Self { folder, drbdadm: program("drbdadm") })
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.current_dir(self.folder.path()).env_remove("__DRBD_NODE__").stdin(Stdio::null());
        command
    }

    /// Exit code, stdout, stderr.
    fn run(&self, node: &str, words: &[&str]) -> Result<(Option<i32>, String, String), Failed> {
        let mut command = self.command(&self.drbdadm);
        let output = command.args(["--node-name", node, "-c", "t.conf"]).args(words).output()?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok((output.status.code(), text(&output.stdout), text(&output.stderr)))
    }
}

fn expect(text: &str, part: &str) -> Outcome {
    if text.contains(part) { Ok(()) } else { Err(format!("no {part:?} in:\n{text}").into()) }
}

fn names() -> Outcome {
    let scene = Scene::new(GOOD)?;
    let names = "   this host is called 'zulu'; the file has: alpha bravo\n";
    let (code, _, stderr) = scene.run("zulu", &["-d", "up", "all"])?;
    assert_eq!(code, Some(1));
    // The original's words come first.
    assert!(stderr.starts_with("WARN: no normal resources defined for this host (zulu)!?\n"));
    assert!(stderr.ends_with(names), "{stderr}");
    let (code, _, stderr) = scene.run("zulu", &["-d", "up", "r0"])?;
    assert_eq!(code, Some(1));
    let first = "'r0' not defined in your config (for this host).\n";
    assert_eq!(stderr, format!("{first}{names}"));
    let (_, _, stderr) = scene.run("alpha", &["-d", "up", "r1"])?;
    assert_eq!(stderr, "'r1' not defined in your config (for this host).\n", "nothing to choose");
    Ok(())
}

fn terminal() -> Outcome {
    let scene = Scene::new(BAD)?;
    let call = format!("{} --node-name alpha -c t.conf dump", scene.drbdadm.display());
    let output =
        scene.command(Path::new("/usr/bin/script")).args(["-qec", &call, "log"]).output()?;
    assert_eq!(output.status.code(), Some(10));
    let said = String::from_utf8_lossy(&output.stdout).replace('\r', "");
    assert!(said.starts_with("t.conf:2: Parse error: 'an option keyword' expected,\n"), "{said}");
    expect(&said, "2 |     net { tmeout 60; max-buffers 1; }\n  |           ^^^^^^\n")?;
    expect(&said, "did you mean 'timeout'?")?;
    for more in ["t.conf:2: max-buffers 1 =>", "t.conf:3: Parse error", "t.conf:6: conflicting use"]
    {
        expect(&said, more)?;
    }
    // A program gets what the original prints: one error of this kind, and nothing around it.
    let (code, _, stderr) = scene.run("alpha", &["dump"])?;
    assert_eq!(code, Some(10));
    assert_eq!(
        stderr,
        "t.conf:2: Parse error: 'an option keyword' expected,\n\tbut got 'tmeout'\n"
    );
    Ok(())
}

fn lint() -> Outcome {
    let scene = Scene::new(GOOD)?;
    assert_eq!(scene.run("alpha", &["lint"])?.0, Some(0));
    let folder = scene.folder.path().join("drbd.d");
    std::fs::create_dir(&folder)?;
    std::fs::write(folder.join("drbdrs.toml"), "[node]\n\nadmin-sokcet = \"/x\"\n")?;
    let (code, stdout, _) = scene.run("alpha", &["lint"])?;
    assert_eq!(code, Some(10), "{stdout}");
    expect(&stdout, "drbd.d/drbdrs.toml:3: unknown field `admin-sokcet`")?;
    expect(&stdout, "1 resources, 1 of them for this host (alpha); 1 errors")
}

fn places() -> Outcome {
    let scene = Scene::new(GOOD)?;
    let (code, stdout, stderr) = scene.run("alpha", &["dump", "--format", "json"])?;
    assert_eq!(code, Some(0), "{stderr}");
    let json: serde_json::Value = serde_json::from_str(&stdout)?;
    let file = scene.folder.path().join("t.conf").canonicalize()?;
    let check = |pointer: &str, line: u32| {
        let from = json.pointer(pointer).and_then(|v| v.pointer("/from")).and_then(|v| v.as_str());
        let want = if line == 0 { "default".into() } else { format!("{}:{line}", file.display()) };
        assert_eq!(from, Some(want.as_str()), "{pointer}");
    };
    check("/global/dialog-refresh", 1);
    check("/global/cmd-timeout-short", 0);
    check("/resources/0/become-primary-on", 2);
    check("/resources/0/net/timeout", 5);
    check("/resources/0/net/ping-int", 0);
    check("/resources/0/hosts/0/address", 6);
    check("/resources/0/hosts/1/volumes/0/minor", 7);
    check("/resources/0/hosts/1/volumes/0/device", 7);
    check("/resources/0/hosts/1/volumes/0/disk", 4);
    check("/resources/0/hosts/1/volumes/0/meta-disk", 7);
    let value = |pointer: &str| json.pointer(pointer).cloned().unwrap_or_default();
    assert_eq!(value("/resources/0/net/timeout/value"), 70);
    assert_eq!(value("/resources/0/net/timeout/unit"), "0.1 s");
    let rate = "/resources/0/hosts/0/volumes/0/disk-options/resync-rate";
    assert_eq!(value(&format!("{rate}/unit")), "KiB/s");
    Ok(())
}

fn completion() -> Outcome {
    let scene = Scene::new(GOOD)?;
    let script = scene.command(&scene.drbdadm).args(["completion", "bash"]).output()?;
    std::fs::write(scene.folder.path().join("completion"), script.stdout)?;
    let complete = |words: &[&str]| -> Result<String, Failed> {
        let list = words.iter().map(|w| format!("'{w}'")).collect::<Vec<_>>().join(" ");
        let last = words.len() - 1;
        let call = format!(
            "set -u; . ./completion; compopt() {{ :; }}; COMP_WORDS=({list}); COMP_CWORD={last}; \
             COMPREPLY=(); _drbdadm; echo \"${{COMPREPLY[*]-}}\""
        );
        let output = scene.command(Path::new("/bin/bash")).args(["-c", &call]).output()?;
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
        Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
    };
    assert_eq!(complete(&["drbdadm", "disk-"])?, "disk-options");
    assert_eq!(complete(&["drbdadm", "dump", "--form"])?, "--format");
    assert_eq!(complete(&["drbdadm", "net-options", "--ping-i"])?, "--ping-int=");
    assert_eq!(complete(&["drbdadm", "dump", "--format", "j"])?, "json");
    assert_eq!(complete(&["drbdadm", "-c", "t.c"])?, "t.conf");
    Ok(())
}

fn manual() -> Outcome {
    let scene = Scene::new(GOOD)?;
    let page = scene.command(&scene.drbdadm).arg("man").output()?.stdout;
    let mut man = scene
        .command(Path::new("/usr/bin/man"))
        .args(["--warnings=w", "--encoding=UTF-8", "-l", "-"])
        .env("MANPAGER", "cat")
        .env("MANWIDTH", "100")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut stdin = man.stdin.take().ok_or("no stdin")?;
    stdin.write_all(&page)?;
    drop(stdin);
    let output = man.wait_with_output()?;
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    let text = String::from_utf8_lossy(&output.stdout);
    expect(&text, "administers replicated block devices")?;
    expect(&text, "1..600, default 60, in units of 0.1 s")?;
    expect(&text, "adjust-with-progress resource")
}
