//! The daemon from its start to its end: settings, lock, sockets, signals.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};
use std::time::Duration;

use drbd_admin::render::{Compat, ProcOptions};
use drbd_conf::settings::{FrontEnd, Settings, StatusFormat};
use rustix::fs::{FlockOperation, flock};
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};

use crate::control::{Control, Program};
use crate::front::kernel::guard;
use crate::front::nbd::door::{Door, Listen};
use crate::status::file::StatusFile;

/// Where handlers are looked for when there is no drbdadm beside the daemon.
const HELPER: &str = "/sbin/drbdadm";

/// Why the daemon does not run.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Another one does, with the same sockets.
    #[error("another drbdrs runs already: {} is locked", .0.display())]
    AlreadyRunning(PathBuf),
    /// Something cannot be had.
    #[error("{what}: {error}")]
    Io {
        /// What was wanted.
        what: String,
        /// Why not.
        error: io::Error,
    },
}

fn wanted(what: impl Into<String>) -> impl FnOnce(io::Error) -> StartError {
    let what = what.into();
    move |error| StartError::Io { what, error }
}

/// Puts everything that a daemon leaves in the file system into one directory.
pub fn move_to(settings: &mut Settings, run_dir: &Path) {
    settings.node.admin_socket = run_dir.join("drbdrs.sock");
    settings.node.status_file = run_dir.join("proc-drbd");
    if !settings.nbd.unix_socket.as_os_str().is_empty() {
        settings.nbd.unix_socket = run_dir.join("nbd.sock");
    }
    settings.node.device_dir = run_dir.join("dev");
    settings.node.take_over = false;
    // A block device is seen by the whole machine: only if it was asked for.
    settings.node.front_ends.retain(|front| *front != FrontEnd::Auto);
}

/// Runs the daemon until it is told to end.
///
/// # Errors
/// It cannot start; the text says what is missing.
pub fn run(settings: Settings) -> Result<(), StartError> {
    let socket = settings.node.admin_socket.clone();
    if let Some(folder) = socket.parent() {
        let made = DirBuilder::new().recursive(true).mode(0o755).create(folder);
        made.map_err(wanted(folder.display().to_string()))?;
    }
    let _lock = lock(&socket)?;
    guard::flusher();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(wanted("the runtime"))?;
    let local = tokio::task::LocalSet::new();
    let result = local.block_on(&runtime, serve(settings, &socket));
    // Nobody waits for tasks that are left.
    runtime.shutdown_timeout(Duration::from_millis(100));
    result
}

async fn serve(settings: Settings, socket: &Path) -> Result<(), StartError> {
    let mut ends = Vec::new();
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        ends.push(signal(kind).map_err(wanted("signals"))?);
    }
    let mut hang_up = signal(SignalKind::hangup()).map_err(wanted("signals"))?;
    let listener = listen(socket).map_err(wanted(socket.display().to_string()))?;
    let compat = match settings.node.status_format {
        StatusFormat::V84 => Compat::V84,
        StatusFormat::V83 => Compat::V83,
    };
    let options = ProcOptions { compat, details: 0 };
    let file = StatusFile::new(&settings.node.status_file, options);
    let mut places: Vec<Listen> = settings.nbd.listen.iter().copied().map(Listen::Tcp).collect();
    if !settings.nbd.unix_socket.as_os_str().is_empty() {
        places.push(Listen::Unix(settings.nbd.unix_socket.clone()));
    }
    let helper = helper(&settings, socket);
    let metrics = match settings.metrics.listen {
        Some(address) => Some(listen_for_metrics(address).await?),
        None => None,
    };
    let control = Control::start(settings, helper, Some(file), listener);
    if let Some(listener) = metrics {
        control.serve_metrics(listener);
    }
    let door = Door::open(&places, control.door()).map_err(wanted("NBD"))?;
    tracing::info!(
        "drbd: initialized. Version: {} (api:1/proto:86-101), drbdrs {}",
        drbd_admin::render::RELEASE,
        env!("CARGO_PKG_VERSION")
    );
    notify("READY=1");
    let [terminate, interrupt] = &mut ends[..] else { return Ok(()) };
    let mut alive = watchdog().map(tokio::time::interval);
    loop {
        tokio::select! {
            () = tick(&mut alive) => notify("WATCHDOG=1"),
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            // A closed terminal is no reason to take devices away.
            _ = hang_up.recv() => tracing::info!("drbd: SIGHUP has no meaning here"),
        }
    }
    tracing::info!("drbd: going down");
    notify("STOPPING=1");
    control.shut_down().await;
    drop(door);
    let _ = std::fs::remove_file(socket);
    tracing::info!("drbd: module cleanup done.");
    Ok(())
}

/// Only one daemon may have these sockets.
fn lock(socket: &Path) -> Result<File, StartError> {
    let path = socket.with_extension("lock");
    let mut options = OpenOptions::new();
    let file = options.write(true).create(true).truncate(false).mode(0o600).open(&path);
    let file = file.map_err(wanted(path.display().to_string()))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(StartError::AlreadyRunning(path)),
        Err(error) => Err(wanted(path.display().to_string())(error.into())),
    }
}

/// The socket of a daemon that is gone is in the way; the lock says that it is gone.
fn listen(socket: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(socket)?;
    // Everybody may look; who may do more is decided by who they are.
    std::fs::set_permissions(socket, Permissions::from_mode(0o666))?;
    Ok(listener)
}

async fn listen_for_metrics(address: std::net::SocketAddr) -> Result<TcpListener, StartError> {
    let name = || format!("metrics at {address}");
    let listener = TcpListener::bind(address).await.map_err(wanted(name()))?;
    let at = listener.local_addr().map_err(wanted(name()))?;
    tracing::info!("drbd: metrics at http://{at}/metrics");
    if !at.ip().is_loopback() {
        tracing::warn!("drbd: whoever can reach {at} can read the metrics: there is no password");
    }
    Ok(listener)
}

fn helper(settings: &Settings, socket: &Path) -> Program {
    let own = std::env::current_exe().ok();
    let beside = own.as_deref().and_then(Path::parent).map(|folder| folder.join("drbdadm"));
    let given = Some(settings.node.handler_program.clone()).filter(|p| !p.as_os_str().is_empty());
    let path = given.or_else(|| beside.filter(|path| path.exists()));
    let seconds = settings.node.handler_timeout;
    Program {
        path: path.unwrap_or_else(|| HELPER.into()),
        timeout: (seconds > 0).then(|| Duration::from_secs(seconds.into())),
        socket: std::path::absolute(socket).unwrap_or_else(|_| socket.into()),
    }
}

/// How often systemd wants to hear that the control plane is alive: twice as often as it must.
fn watchdog() -> Option<Duration> {
    let variable = |name| std::env::var(name).ok()?.parse::<u64>().ok();
    let own = u64::from(std::process::id());
    let is_ours = variable("WATCHDOG_PID").is_none_or(|pid| pid == own);
    let limit = variable("WATCHDOG_USEC").filter(|limit| is_ours && *limit > 1)?;
    Some(Duration::from_micros(limit / 2))
}

async fn tick(interval: &mut Option<tokio::time::Interval>) {
    match interval {
        Some(interval) => drop(interval.tick().await),
        None => std::future::pending().await,
    }
}

/// Tells systemd, if it wants to know.
fn notify(state: &str) {
    let Some(at) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let address = match at.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&at),
    };
    let sent = address
        .and_then(|address| UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address));
    if let Err(error) = sent {
        tracing::warn!("NOTIFY_SOCKET: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_daemon_is_refused_and_a_dead_ones_socket_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("drbdrs.sock");
        let first = lock(&socket).unwrap();
        assert!(matches!(lock(&socket), Err(StartError::AlreadyRunning(_))));
        drop(first);
        lock(&socket).unwrap();
        drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _guard = runtime.enter();
        listen(&socket).unwrap();
        assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o666);
    }

    #[test]
    fn a_run_directory_holds_everything() {
        let mut settings = Settings::default();
        move_to(&mut settings, Path::new("/tmp/x"));
        for path in
            [&settings.node.admin_socket, &settings.node.status_file, &settings.nbd.unix_socket]
        {
            assert_eq!(path.parent(), Some(Path::new("/tmp/x")));
        }
        settings.nbd.unix_socket = PathBuf::new();
        move_to(&mut settings, Path::new("/tmp/x"));
        assert_eq!(settings.nbd.unix_socket, PathBuf::new());
    }
}
