//! What a daemon leaves to the next one, and how that goes on where it ended.
//!
//! ```text
//!   every change --> Will: the commands that make the resources as they are, in a file
//!   start --> the commands of the predecessor, then everybody else's
//! ```
//!
//! The file means something until the machine boots again, as the configuration of a kernel does.
//! A Primary becomes Primary again when the engine says that it may be so for whoever has its device
//! open; that may have to wait for the peer.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use drbd_admin::{MetaIndex, Request, Target};
use drbd_core::engine::resume::Resumption;
use drbd_types::Role;
use serde::{Deserialize, Serialize};
use tokio::process::Command;
use tokio::sync::watch;

use super::registry::{Node, Record};
use super::{commands, convert, devices};
use crate::plane::disk::OpenDisk;

/// How long commands wait for volumes that are to be Primary again.
const PEER_MAX: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(50);
/// Pause before a promotion that was refused is tried again.
const AGAIN: Duration = Duration::from_secs(1);
const AGAIN_MAX: Duration = Duration::from_secs(30);
/// How long the writes of a predecessor may take to end: disks try again for tens of seconds.
const WRITES_MAX: Duration = Duration::from_secs(180);
/// Says which run of the machine this is.
const BOOT: &str = "/proc/sys/kernel/random/boot_id";
/// Where drbdmeta is when it is not beside the daemon.
const DRBDMETA: &str = "/sbin/drbdmeta";

/// What stands in the file.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
struct Text {
    boot: String,
    requests: Vec<Request>,
}

/// The file.
#[derive(Debug)]
pub(super) struct Will {
    path: PathBuf,
    boot: String,
    written: RefCell<Vec<Request>>,
    /// The predecessor's is carried out, or the own one is final: nothing is written.
    is_held: Cell<bool>,
    is_sealed: Cell<bool>,
    stage: watch::Sender<Stage>,
    /// Minors that are to be Primary again as soon as they may.
    resuming: RefCell<BTreeSet<u32>>,
}

/// How far the predecessor's will is carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stage {
    /// Resources are made. Nobody may look.
    Making,
    /// Peers are awaited. Nobody else may change anything.
    Promoting,
    /// Over.
    Done,
}

impl Will {
    /// Beside the admin socket.
    pub(super) fn beside(socket: &Path) -> Self {
        Self {
            path: socket.with_extension("state"),
            boot: std::fs::read_to_string(BOOT).unwrap_or_default().trim().to_owned(),
            written: RefCell::default(),
            is_held: Cell::new(true),
            is_sealed: Cell::new(false),
            stage: watch::Sender::new(Stage::Making),
            resuming: RefCell::default(),
        }
    }

    /// Waits until it has got so far.
    pub(super) async fn reaches(&self, stage: Stage) {
        // The sender lives as long as this.
        let _ = self.stage.subscribe().wait_for(|now| *now >= stage).await;
    }

    /// It need not be Primary again, or is it.
    pub(super) fn forget_role(&self, minor: u32) {
        self.resuming.borrow_mut().remove(&minor);
    }

    /// What the predecessor has left, if it ran since the machine was booted.
    fn read(&self) -> Vec<Request> {
        let text = match std::fs::read(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
            Err(error) => {
                tracing::warn!("{}: {error}", self.path.display());
                return Vec::new();
            }
        };
        match serde_json::from_slice::<Text>(&text) {
            Ok(text) if text.boot == self.boot => {
                self.written.replace(text.requests.clone());
                text.requests
            }
            Ok(_) => Vec::new(),
            Err(error) => {
                tracing::warn!("{} is not understood: {error}", self.path.display());
                Vec::new()
            }
        }
    }

    /// The resources are like this now.
    pub(super) fn write(&self, records: &[Record]) {
        if self.is_held.get() {
            return;
        }
        let role = |minor: &u32| Request::Primary { target: Target::Minor(*minor), force: false };
        let mut requests: Vec<_> = records.iter().flat_map(requests_of).collect();
        requests.extend(self.resuming.borrow().iter().map(role));
        self.replace(requests);
    }

    /// The daemon ends: from here on it does not matter what becomes of the resources, except that
    /// what was demoted is not Primary.
    pub(super) fn seal(&self) {
        self.is_held.set(true);
        self.is_sealed.set(true);
    }

    /// A resource was taken down in good order. Volumes that wait to be Primary again go on waiting.
    pub(super) fn has_ended(&self, minors: &[u32]) {
        let waiting = self.resuming.borrow();
        let is_over = |request: &Request| {
            matches!(request, Request::Primary { target: Target::Minor(minor), .. }
                if minors.contains(minor) && !waiting.contains(minor))
        };
        let left = self.written.borrow().iter().filter(|r| !is_over(r)).cloned().collect();
        self.replace(left);
    }

    fn replace(&self, requests: Vec<Request>) {
        if *self.written.borrow() == requests {
            return;
        }
        let text = Text { boot: self.boot.clone(), requests };
        if let Err(error) = self.put(&text) {
            tracing::warn!("{} can not be written: {error}", self.path.display());
        }
        // A failure is said once for each change.
        self.written.replace(text.requests);
    }

    /// Whoever reads it sees all of one version, whatever happens meanwhile.
    fn put(&self, text: &Text) -> io::Result<()> {
        let beside = self.path.with_extension("state.new");
        let mut options = std::fs::OpenOptions::new();
        // There may be secrets in it.
        options.write(true).create(true).truncate(true).mode(0o600);
        let mut file = options.open(&beside)?;
        file.write_all(&serde_json::to_vec(text)?)?;
        std::fs::rename(&beside, &self.path)
    }
}

/// The commands that make a resource as it is.
fn requests_of(record: &Record) -> Vec<Request> {
    let shown = super::snapshot::resource(record);
    let resource = &record.name;
    let options = record.options.clone();
    let mut requests = vec![Request::NewResource { resource: resource.clone(), options }];
    let mut roles = Vec::new();
    for volume in shown.volumes {
        let (minor, nr) = (volume.minor, volume.volume);
        requests.push(Request::NewMinor { resource: resource.clone(), minor, volume: nr });
        if let Some(backing) = volume.backing {
            let drbd_admin::Backing { disk, meta_disk, meta_index, options, .. } = backing;
            requests.push(Request::Attach { minor, disk, meta_disk, meta_index, options });
        }
        if volume.role == Role::Primary {
            roles.push(Request::Primary { target: Target::Minor(minor), force: false });
        }
    }
    if let Some(network) = record.network.as_ref().filter(|network| !network.is_pending) {
        requests.push(Request::Connect {
            resource: resource.clone(),
            local: network.local.clone(),
            peer: network.peer.clone(),
            options: network.options.clone(),
            discard_my_data: false,
            tentative: false,
        });
    }
    requests.extend(roles);
    requests
}

/// Goes on where the predecessor ended; then commands are taken.
pub(super) async fn take_over(node: Rc<Node>) {
    let is_wanted = node.settings.node.take_over;
    let requests = if is_wanted { node.will.read() } else { Vec::new() };
    if !requests.is_empty() {
        tracing::info!("drbd: taking over the resources of a daemon that is gone");
    }
    let mut roles = Vec::new();
    for request in requests {
        match request {
            Request::Primary { target: Target::Minor(minor), .. } => roles.push(minor),
            request => {
                carry_out(&node, request).await;
            }
        }
    }
    node.will.stage.send_replace(Stage::Promoting);
    let resumed = roles.into_iter().map(|minor| {
        node.will.resuming.borrow_mut().insert(minor);
        tokio::task::spawn_local(resume(Rc::clone(&node), minor))
    });
    let resumed: Vec<_> = resumed.collect();
    let all = async {
        for one in resumed {
            let _ = one.await;
        }
    };
    // Those that wait for their peer go on doing so; the administrator may decide.
    let _ = tokio::time::timeout(PEER_MAX, all).await;
    if is_wanted && !node.will.is_sealed.get() {
        node.will.is_held.set(false);
        node.with_all(|all| node.will.write(all));
    }
    node.will.stage.send_replace(Stage::Done);
}

/// Makes a volume Primary again as soon as it may be so for those who still have its device open; if
/// it may not, they get errors instead of waiting for ever.
async fn resume(node: Rc<Node>, minor: u32) {
    let Some((id, nr)) = node.volume_of(minor) else { return };
    let mut pause = AGAIN;
    loop {
        if node.will.is_sealed.get() || !node.will.resuming.borrow().contains(&minor) {
            return;
        }
        let known = node.with(id, |r| r.status_of(nr).map(|v| (v.resumption, v.state.role)));
        match known.flatten() {
            // The administrator has decided.
            Some((_, Role::Primary)) => break,
            Some((Resumption::Waits, _)) => tokio::time::sleep(PAUSE).await,
            Some((Resumption::Ready, _)) => {
                let request = Request::Primary { target: Target::Minor(minor), force: false };
                if carry_out(&node, request).await {
                    break;
                }
                // A refusal for good shows itself as the end of the right to go on.
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(AGAIN_MAX);
            }
            Some((Resumption::No, _)) | None => {
                tracing::error!(
                    "drbd: minor {minor} was Primary and may not go on so: it has no disk, or others \
                     may have written; whoever has its device open must let go of it"
                );
                devices::give_up(&node, id, nr).await;
                break;
            }
        }
    }
    node.will.forget_role(minor);
    node.with_all(|all| node.will.write(all));
}

/// True: it is done.
async fn carry_out(node: &Rc<Node>, request: Request) -> bool {
    if node.will.is_sealed.get() {
        return false;
    }
    if let Request::Attach { minor, disk, meta_disk, meta_index, .. } = &request {
        wait_for_writes(disk, meta_disk, *meta_index).await;
        apply_al(*minor, meta_disk, *meta_index).await;
    }
    let shown = format!("{request:?}");
    let reply = commands::run(node, request).await;
    if !reply.is_success() {
        let text = reply.message("taking over");
        tracing::error!("drbd: {}: {shown}", text.trim_end().replace('\n', " "));
    }
    reply.is_success()
}

/// What the predecessor was writing when it died may still be on its way to the disk. If it came
/// there after what is written from now on, it would destroy that. As long as it is on its way, the
/// disk is in use.
async fn wait_for_writes(disk: &str, meta_disk: &str, index: MetaIndex) {
    let Ok(paths) = convert::disk_paths(disk, meta_disk, index) else { return };
    let end = tokio::time::Instant::now() + WRITES_MAX;
    while tokio::time::Instant::now() < end {
        let paths = paths.clone();
        let open = move || OpenDisk::open(&paths).map(drop).map_err(|error| error.errno);
        match tokio::task::spawn_blocking(open).await {
            Ok(Err(libc::EBUSY)) => tokio::time::sleep(PAUSE).await,
            // Any other error is told by the attach.
            _ => return,
        }
    }
}

/// Marks what the predecessor may have been writing, as drbdadm does before each attach.
async fn apply_al(minor: u32, meta_disk: &str, index: MetaIndex) {
    let own = std::env::current_exe().ok();
    let beside = own.as_deref().and_then(Path::parent).map(|folder| folder.join("drbdmeta"));
    let program = beside.filter(|path| path.exists()).unwrap_or_else(|| DRBDMETA.into());
    let index = match index {
        MetaIndex::Internal => "internal".to_owned(),
        MetaIndex::Flexible => "flex-external".to_owned(),
        MetaIndex::Index(n) => n.to_string(),
    };
    let mut command = Command::new(&program);
    command.args([&minor.to_string(), "v08", meta_disk, &index, "apply-al"]);
    // It asks whether the minor is attached, and the daemon does not answer before this is done.
    command.env("DRBDRS_ADMIN_SOCKET", "/nonexistent").stdin(std::process::Stdio::null());
    match command.output().await {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            tracing::error!("drbd: drbdmeta {minor} apply-al: {}: {}", output.status, said.trim());
        }
        Err(error) => tracing::error!("drbd: {}: {error}", program.display()),
    }
}

/// Minors of a resource.
pub(super) fn minors(record: &Record) -> Vec<u32> {
    record.volumes.values().map(|volume| volume.minor).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_written_since_the_boot_is_taken_over() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("drbdrs.sock");
        let primary = |minor| Request::Primary { target: Target::Minor(minor), force: false };
        let requests = vec![
            Request::NewResource { resource: "r0".into(), options: Default::default() },
            primary(1),
            primary(2),
        ];
        let will = Will::beside(&socket);
        assert_eq!(will.read(), []);
        will.replace(requests.clone());
        assert_eq!(Will::beside(&socket).read(), requests);
        will.has_ended(&[1]);
        assert_eq!(Will::beside(&socket).read(), [requests[0].clone(), primary(2)]);
        let later = Will { boot: "another".into(), ..Will::beside(&socket) };
        assert_eq!(later.read(), []);
        std::fs::write(socket.with_extension("state"), "{").unwrap();
        assert_eq!(later.read(), []);
    }
}
