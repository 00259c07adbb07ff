//! drbdrs' own settings: what DRBD never had. `/etc/drbd.d/drbdrs.toml`.
//!
//! Unknown keys and wrong types are refused with file and line. `conf/examples/drbdrs.toml` shows
//! every key with its default, and a test keeps the two equal.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use crate::source::read_limited;

/// Where the settings are.
pub const PATH: &str = "/etc/drbd.d/drbdrs.toml";
/// The same, seen from the directory of `drbd.conf`.
pub const BESIDE: &str = "drbd.d/drbdrs.toml";

/// All settings.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Settings {
    /// The node's daemon.
    pub node: Node,
    /// The NBD server.
    pub nbd: Nbd,
    /// Block devices through the kernel's NBD driver.
    pub nbd_kernel: NbdKernel,
    /// Metrics.
    pub metrics: Metrics,
    /// How disks and sockets are driven.
    pub io: Io,
    /// What differs for single resources, by name.
    pub resource: BTreeMap<String, ResourceSettings>,
}

/// `[node]`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Node {
    /// Unix socket on which commands arrive.
    pub admin_socket: PathBuf,
    /// Status file in the form of /proc/drbd.
    pub status_file: PathBuf,
    /// Its form.
    pub status_format: StatusFormat,
    /// Program that is called for handlers, as the original's `usermode_helper`; empty: the drbdadm
    /// beside the daemon, else `/sbin/drbdadm`.
    pub handler_program: PathBuf,
    /// Longest run of a handler in seconds; 0: no limit.
    pub handler_timeout: u32,
    /// Log filter: `error`, `warn`, `info`, `debug`, `trace`.
    pub log_level: LogLevel,
    /// Form of log lines.
    pub log_format: LogFormat,
    /// Front ends of all volumes for which nothing else is said.
    pub front_ends: Vec<FrontEnd>,
    /// Where links to block devices are made: `drbdN` and `drbd/by-res/...`; empty: nowhere.
    pub device_dir: PathBuf,
    /// Resources of a daemon that has ended are as they were when it is started again, until the
    /// machine boots.
    pub take_over: bool,
}

impl Default for Node {
    fn default() -> Self {
        Self {
            admin_socket: "/run/drbd/drbdrs.sock".into(),
            status_file: "/run/drbd/proc-drbd".into(),
            status_format: StatusFormat::V84,
            handler_program: PathBuf::new(),
            handler_timeout: 600,
            log_level: LogLevel::Info,
            log_format: LogFormat::Text,
            front_ends: vec![FrontEnd::Auto, FrontEnd::Nbd],
            device_dir: "/dev".into(),
            take_over: true,
        }
    }
}

/// Form of the status file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum StatusFormat {
    /// That of 8.4.
    #[serde(rename = "8.4")]
    V84,
    /// That of 8.3.
    #[serde(rename = "8.3")]
    V83,
}

/// Which log lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogLevel {
    /// Somebody must act.
    Error,
    /// Degraded, handled.
    Warn,
    /// State changes and commands.
    Info,
    /// Protocol steps.
    Debug,
    /// Single requests.
    Trace,
}

/// Form of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// `[nbd]`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Nbd {
    /// Unix socket; empty: none.
    pub unix_socket: PathBuf,
    /// TCP addresses.
    pub listen: Vec<SocketAddr>,
    /// What a client of a Secondary gets.
    pub secondary: SecondaryPolicy,
    /// The first client makes the node Primary, the end of the last one Secondary.
    pub promote_on_open: bool,
}

impl Default for Nbd {
    fn default() -> Self {
        Self {
            unix_socket: "/run/drbd/nbd.sock".into(),
            listen: Vec::new(),
            secondary: SecondaryPolicy::Refuse,
            promote_on_open: false,
        }
    }
}

/// What a client of a Secondary's export gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SecondaryPolicy {
    /// An error.
    Refuse,
    /// It waits until the node is Primary.
    WaitForPromotion,
}

/// `[nbd-kernel]`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct NbdKernel {
    /// Connections between the driver and the daemon, 1..=16.
    pub connections: u32,
    /// How long the driver waits for a daemon that is gone, seconds.
    pub dead_timeout: u32,
}

impl Default for NbdKernel {
    fn default() -> Self {
        Self { connections: 1, dead_timeout: 600 }
    }
}

/// `[metrics]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Metrics {
    /// Address of the HTTP endpoint, or a port of the loopback interface; none: off.
    #[serde(deserialize_with = "address_or_port")]
    pub listen: Option<SocketAddr>,
}

fn address_or_port<'d, D: Deserializer<'d>>(from: D) -> Result<Option<SocketAddr>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected \"ADDRESS:PORT\", or a port of the loopback interface")]
    enum Place {
        Port(u16),
        Address(SocketAddr),
    }
    Ok(Some(match Place::deserialize(from)? {
        Place::Port(port) => (Ipv4Addr::LOCALHOST, port).into(),
        Place::Address(address) => address,
    }))
}

/// `[io]`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Io {
    /// How disks and sockets are driven.
    pub backend: IoBackend,
}

impl Default for Io {
    fn default() -> Self {
        Self { backend: IoBackend::Auto }
    }
}

/// How disks and sockets are driven.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IoBackend {
    /// io_uring where the kernel allows it, else threads.
    Auto,
    /// io_uring, or an error.
    IoUring,
    /// epoll and a pool of threads.
    Threads,
}

/// `[resource.NAME]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct ResourceSettings {
    /// Front ends of all its volumes; none: see [`Node::front_ends`].
    pub front_ends: Option<Vec<FrontEnd>>,
    /// See [`Nbd::secondary`].
    pub secondary: Option<SecondaryPolicy>,
    /// See [`Nbd::promote_on_open`].
    pub promote_on_open: Option<bool>,
    /// What differs for single volumes, by number.
    pub volume: BTreeMap<VolumeNumber, VolumeSettings>,
}

/// Number of a volume, 0..=65535.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct VolumeNumber(pub u16);

impl<'de> Deserialize<'de> for VolumeNumber {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        // Keys of TOML are texts.
        let text = String::deserialize(from)?;
        let is_plain = text.bytes().all(|b| b.is_ascii_digit());
        let number = text.parse().ok().filter(|_| is_plain).map(Self);
        number
            .ok_or_else(|| D::Error::custom(format!("'{text}' is not a volume number (0..65535)")))
    }
}

/// `[resource.NAME.volume.N]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct VolumeSettings {
    /// Front ends of this volume.
    pub front_ends: Option<Vec<FrontEnd>>,
}

impl Settings {
    /// The front ends of a volume, in the order in which they are wanted.
    #[must_use]
    pub fn front_ends(&self, resource: &str, volume: u16) -> &[FrontEnd] {
        let own = self.resource.get(resource);
        let of_volume = own
            .and_then(|r| r.volume.get(&VolumeNumber(volume)))
            .and_then(|v| v.front_ends.as_deref());
        of_volume.or_else(|| own?.front_ends.as_deref()).unwrap_or(&self.node.front_ends)
    }
}

/// How a volume is given to its users. It gets one block device at most: of the drivers that are
/// named, the first that the kernel has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FrontEnd {
    /// A block device through the best driver that the kernel has, or none.
    Auto,
    /// A block device through ublk.
    Ublk,
    /// A block device through the kernel's NBD driver.
    NbdKernel,
    /// An export of the NBD server.
    Nbd,
}

/// Why settings can not be used; the text begins with `file:line:`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SettingsError(String);

/// Reads settings from text; `name` is shown in errors.
///
/// # Errors
/// Not TOML, an unknown key, a wrong type, or a volume number that is none.
pub fn parse(name: &str, text: &str) -> Result<Settings, SettingsError> {
    toml::from_str(text).map_err(|e| {
        let start = e.span().map_or(0, |s| s.start);
        let message = e.message().trim_end().replace('\n', "; ");
        SettingsError(format!("{name}:{}: {message}", line_of(text.as_bytes(), start)))
    })
}

/// The line, counted from 1, of a byte.
fn line_of(text: &[u8], offset: usize) -> usize {
    text.iter().take(offset).filter(|b| **b == b'\n').count() + 1
}

/// Reads the settings file; one that does not exist means the defaults.
///
/// # Errors
/// The file exists and can not be read or used.
pub fn load(path: &Path) -> Result<Settings, SettingsError> {
    let name = path.display().to_string();
    let bytes = match std::fs::File::open(path).and_then(read_limited) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Settings::default()),
        Err(e) => return Err(SettingsError(format!("{name}:1: {e}"))),
    };
    match std::str::from_utf8(&bytes) {
        Ok(text) => parse(&name, text),
        Err(e) => {
            let line = line_of(&bytes, e.valid_up_to());
            Err(SettingsError(format!("{name}:{line}: a byte that is not UTF-8")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sample_says_the_defaults() {
        let sample = include_str!("../examples/drbdrs.toml");
        let settings = parse("drbdrs.toml", sample).unwrap();
        assert_eq!(settings, Settings::default());
    }

    #[test]
    fn mistakes_name_file_and_line() {
        let check = |text: &str, start: &str| {
            let error = parse("f.toml", text).unwrap_err().to_string();
            assert!(error.starts_with(start), "{error}");
        };
        check("[node]\nadmin-sokcet = \"/x\"\n", "f.toml:2: unknown field `admin-sokcet`");
        check("[nbd]\n\nlisten = [\"nonsense\"]\n", "f.toml:3: ");
        check("[io\n", "f.toml:1: ");
        check("[resource.r0.volume.x]\n", "f.toml:1: 'x' is not a volume number");
        check("\n[resource.r0]\nvolume.70000.front-ends = []\n", "f.toml:3: '70000' is not");
        check("\n[resource]\nr0 = { volume = { \"-1\" = {} } }\n", "f.toml:3: '-1' is not");
        check("[metrics]\nlisten = \"9942\"\n", "f.toml:2: expected \"ADDRESS:PORT\"");
        check("[metrics]\nlisten = 70000\n", "f.toml:2: expected \"ADDRESS:PORT\"");
        check("a = 1\n\u{0}", "f.toml:");
    }

    #[test]
    fn resources_override() {
        let text = "[resource.r0]\nfront-ends = [\"ublk\", \"nbd\"]\n\
                    [resource.r0.volume.1]\nfront-ends = [\"nbd-kernel\"]\n";
        let settings = parse("f", text).unwrap();
        let r0 = &settings.resource["r0"];
        assert_eq!(r0.front_ends, Some(vec![FrontEnd::Ublk, FrontEnd::Nbd]));
        assert_eq!(r0.volume[&VolumeNumber(1)].front_ends, Some(vec![FrontEnd::NbdKernel]));
        assert_eq!(settings.front_ends("r0", 0), [FrontEnd::Ublk, FrontEnd::Nbd]);
        assert_eq!(settings.front_ends("r0", 1), [FrontEnd::NbdKernel]);
        assert_eq!(settings.front_ends("r1", 1), [FrontEnd::Auto, FrontEnd::Nbd]);
    }

    #[test]
    fn a_port_alone_is_for_this_machine() {
        for (text, address) in [
            ("9942", Some("127.0.0.1:9942")),
            ("\"[::1]:9942\"", Some("[::1]:9942")),
            ("\"0.0.0.0:1\"", Some("0.0.0.0:1")),
        ] {
            let settings = parse("f", &format!("[metrics]\nlisten = {text}\n")).unwrap();
            assert_eq!(settings.metrics.listen, address.map(|a| a.parse().unwrap()));
        }
        assert_eq!(parse("f", "[metrics]\n").unwrap().metrics.listen, None);
    }

    #[test]
    fn a_missing_file_means_the_defaults() {
        let nowhere = Path::new("/nonexistent/drbdrs.toml");
        assert_eq!(load(nowhere), Ok(Settings::default()));
    }

    #[test]
    fn files_that_are_no_text_are_refused_with_their_line() {
        let path = std::env::temp_dir().join(format!("drbdrs-settings-{}", std::process::id()));
        std::fs::write(&path, b"[node]\nlog-level = \"info\"\n# \xff\n").unwrap();
        let error = load(&path).unwrap_err().to_string();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(error, format!("{}:3: a byte that is not UTF-8", path.display()));
        let error = load(Path::new("/")).unwrap_err().to_string();
        assert!(error.starts_with("/:1: "), "{error}");
    }
}
