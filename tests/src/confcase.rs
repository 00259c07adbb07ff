//! Recorded cases of the configuration language: reading them, running them in a private host.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use crate::need;

/// A case: files, and runs of drbdadm on them.
#[derive(Clone, Debug, Deserialize)]
pub struct Case {
    /// Name without endings.
    pub name: String,
    /// The private host.
    pub host: Host,
    /// Files, relative to the folder of the fixtures.
    pub files: Vec<String>,
    /// Empty directories.
    #[serde(default)]
    pub directories: Vec<String>,
    /// The original is questionable in all runs of this case.
    #[serde(default)]
    pub may_differ: Option<String>,
    /// Runs of the tool for 8.4.
    #[serde(default)]
    pub runs: Vec<Run>,
}

/// The private host of a case.
#[derive(Clone, Debug, Deserialize)]
pub struct Host {
    /// Node name.
    pub name: String,
    /// Addresses besides loopback.
    #[serde(default)]
    pub ipv4: Vec<String>,
    /// Addresses besides loopback.
    #[serde(default)]
    pub ipv6: Vec<String>,
}

/// What a stand-in answers.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Answer {
    /// Exit code.
    #[serde(default)]
    pub rc: i32,
    /// For stdout.
    #[serde(default)]
    pub stdout: String,
    /// For stderr.
    #[serde(default)]
    pub stderr: String,
    /// Seconds before answering.
    #[serde(default)]
    pub sleep: Option<f64>,
}

/// One run, recorded.
#[derive(Clone, Debug, Deserialize)]
pub struct Run {
    /// Arguments.
    pub args: Vec<String>,
    /// Exit code.
    pub rc: i32,
    /// stdout.
    #[serde(default)]
    pub stdout: String,
    /// stderr.
    #[serde(default)]
    pub stderr: String,
    /// stdin.
    #[serde(default)]
    pub stdin: Option<String>,
    /// More environment.
    #[serde(default)]
    pub env: Option<BTreeMap<String, String>>,
    /// Answers of stand-ins by command line prefix.
    #[serde(default)]
    pub backend: Option<serde_json::Map<String, serde_json::Value>>,
    /// What `drbdsetup-84 show` prints, by resource.
    #[serde(default)]
    pub running: Option<BTreeMap<String, String>>,
    /// Backend calls in order.
    #[serde(default)]
    pub calls: Vec<String>,
    /// The original is questionable in this run.
    #[serde(default)]
    pub may_differ: Option<String>,
}

/// What a run did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Got {
    /// Exit code.
    pub rc: i32,
    /// stdout.
    pub stdout: String,
    /// stderr.
    pub stderr: String,
    /// Backend calls.
    pub calls: Vec<String>,
}

/// Reads all cases of a folder, sorted by name.
///
/// # Errors
/// A file can not be read or is no case.
pub fn read_all(folder: &Path) -> anyhow::Result<Vec<Case>> {
    let mut cases = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.to_string_lossy().ends_with(".expected.json") {
            cases.push(serde_json::from_slice(&std::fs::read(&path)?)?);
        }
    }
    cases.sort_by(|a: &Case, b: &Case| a.name.cmp(&b.name));
    Ok(cases)
}

/// Runs all runs of a case in a private host, with the helper program `runner`.
///
/// # Errors
/// The private host can not be made, or the helper fails.
pub fn run_case(
    folder: &Path,
    case: &Case,
    drbdadm: &Path,
    runner: &Path,
    stand_in: &Path,
) -> anyhow::Result<Vec<Got>> {
    let mut setup = format!("hostname {} 2>/dev/null; ip link set lo up; ", case.host.name);
    for ip in &case.host.ipv4 {
        setup.push_str(&format!("ip addr add {ip}/24 dev lo; "));
    }
    for ip in &case.host.ipv6 {
        setup.push_str(&format!("ip -6 addr add {ip}/64 dev lo nodad; "));
    }
    setup.push_str(
        "mount -t tmpfs none /var/run 2>/dev/null || mount -t tmpfs none /run; exec \"$@\"",
    );
    let output = Command::new("unshare")
        .args(need::unshare_options())
        .args(["sh", "-c", &setup, "sh"])
        .arg(runner)
        .args([folder.as_os_str(), case.name.as_ref(), drbdadm.as_os_str(), stand_in.as_os_str()])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()?;
    anyhow::ensure!(output.status.success(), "{}: helper ended with {}", case.name, output.status);
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Takes out what is allowed to differ: version texts, and the two limits that the original prints
/// in every global section because its built-in limits are not the documented ones.
pub fn loosened(text: &str) -> String {
    let versions = [
        "Version: ",
        "GIT-hash: ",
        "DRBDADM_BUILDTAG=",
        "DRBDADM_API_VERSION=",
        "DRBD_KERNEL_VERSION_CODE=",
        "DRBDADM_VERSION_CODE=",
        "DRBDADM_VERSION=",
        "_drbd_version=",
        "_drbd_api=",
    ];
    let text = text.replace("    cmd-timeout-medium 600;\n", "");
    let text = text.replace("    cmd-timeout-long 0;\n", "");
    let line = |l: &str| match versions.iter().find(|v| l.starts_with(**v)) {
        Some(v) => (*v).to_owned(),
        None => l.trim_end_matches([' ', '\t']).to_owned(),
    };
    text.split('\n').map(line).collect::<Vec<_>>().join("\n")
}

/// One host name was recorded with a blank in it, and hostname(1) said so: not drbdadm's words.
fn without_usage_of_hostname(stderr: &str) -> &str {
    let mut rest = stderr;
    while rest.starts_with("Usage: hostname") || rest.len() < stderr.len() {
        let Some((line, tail)) = rest.split_once('\n') else { break };
        let is_usage = line.is_empty() || line.starts_with([' ', 'U', 'P', 'D']);
        if !is_usage {
            break;
        }
        rest = tail;
    }
    rest
}

/// What has to be equal: exit code, stdout, first line of stderr.
pub fn key(rc: i32, stdout: &str, stderr: &str) -> (i32, String, String) {
    let stderr = loosened(without_usage_of_hostname(stderr));
    (rc, loosened(stdout), stderr.lines().next().unwrap_or_default().to_owned())
}
