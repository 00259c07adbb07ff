//! Runs the recorded runs of one case within the private host that its caller made.
//!
//! Arguments: folder of the fixtures, name of the case, drbdadm, stand-in. Prints the results as
//! JSON.

use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::Context;
use drbdrs_tests::confcase::{Case, Got, Run};

fn main() -> anyhow::Result<()> {
    let words: Vec<_> = std::env::args_os().skip(1).collect();
    let [folder, name, drbdadm, stand_in] = words.as_slice() else {
        anyhow::bail!("usage: conf-case-runner FOLDER CASE DRBDADM STANDIN");
    };
    let folder = Path::new(folder);
    let file = folder.join(format!("{}.expected.json", name.to_string_lossy()));
    let case: Case = serde_json::from_slice(&std::fs::read(&file)?)?;
    let mut results = Vec::new();
    for run in &case.runs {
        let result = one(folder, &case, run, Path::new(drbdadm), Path::new(stand_in));
        results.push(result.with_context(|| format!("{}: {:?}", case.name, run.args))?);
    }
    println!("{}", serde_json::to_string(&results)?);
    Ok(())
}

fn one(
    folder: &Path,
    case: &Case,
    run: &Run,
    drbdadm: &Path,
    stand_in: &Path,
) -> anyhow::Result<Got> {
    let _ = std::fs::remove_dir_all("/var/run/drbd");
    let top = tempfile::tempdir()?;
    let (work, tools) = (top.path().join("w"), top.path().join("bin"));
    std::fs::create_dir(&work)?;
    std::fs::create_dir(&tools)?;
    for name in &case.files {
        let to = work.join(name);
        std::fs::create_dir_all(to.parent().unwrap_or(&work))?;
        std::fs::copy(folder.join(name), to)?;
    }
    for name in &case.directories {
        std::fs::create_dir_all(work.join(name))?;
    }
    symlink(drbdadm, tools.join("drbdadm"))?;
    for tool in ["drbdsetup-84", "drbdsetup-83", "drbdsetup", "drbdmeta", "drbd-proxy-ctl"] {
        symlink(stand_in, tools.join(tool))?;
    }
    let rules = serde_json::json!({ "running": run.running, "backend": run.backend });
    std::fs::write(top.path().join("rules.json"), rules.to_string())?;
    std::fs::write(top.path().join("stdin"), run.stdin.as_deref().unwrap_or_default())?;
    let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", tools.display());
    // The shell keeps argv[0] the plain name that users type.
    let output = Command::new("sh")
        .args(["-c", "exec drbdadm \"$@\"", "sh"])
        .args(&run.args)
        .current_dir(&work)
        .env_clear()
        .env("PATH", path)
        .env("LC_ALL", "C")
        .env("HOME", "/")
        .env("STANDIN_DIR", top.path())
        .envs(run.env.iter().flatten())
        .stdin(Stdio::from(std::fs::File::open(top.path().join("stdin"))?))
        .output()?;
    let fix = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes);
        let text = text.replace(&work.to_string_lossy().into_owned(), "@DIR@");
        text.replace(&top.path().to_string_lossy().into_owned(), "@TMP@")
    };
    let calls = std::fs::read(top.path().join("calls")).unwrap_or_default();
    let rc = output.status.code().or_else(|| output.status.signal().map(|s| -s));
    Ok(Got {
        rc: rc.unwrap_or(-99),
        stdout: fix(&output.stdout),
        stderr: fix(&output.stderr),
        calls: fix(&calls).lines().map(ToOwned::to_owned).collect(),
    })
}
