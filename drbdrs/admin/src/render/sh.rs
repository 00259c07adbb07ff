//! Short outputs for scripts. Spec: status-and-integration.md §2.5, §2.6.

use std::fmt::Write;

use drbd_types::Role;

use super::progress;
use crate::{Resource, Snapshot, Volume};

/// `drbdsetup role`, without line end.
#[must_use]
pub fn role(volume: &Volume) -> String {
    unless_unconfigured(volume, || format!("{}/{}", volume.role, volume.peer_role))
}

/// `drbdsetup cstate`.
#[must_use]
pub fn cstate(volume: &Volume) -> String {
    unless_unconfigured(volume, || volume.cstate.to_string())
}

/// `drbdsetup dstate`.
#[must_use]
pub fn dstate(volume: &Volume) -> String {
    unless_unconfigured(volume, || format!("{}/{}", volume.disk, volume.peer_disk))
}

fn unless_unconfigured(volume: &Volume, text: impl Fn() -> String) -> String {
    if volume.is_unconfigured() { "Unconfigured".into() } else { text() }
}

/// `drbdsetup sh-status`: one block per volume, for `eval`, in the order in which the resources
/// were created.
#[must_use]
pub fn sh_status(snapshot: &Snapshot) -> String {
    let mut text = String::new();
    for resource in &snapshot.resources {
        for volume in &resource.volumes {
            text.push_str(&block(resource, volume));
        }
        if resource.volumes.is_empty() {
            text.push_str(&unknown(u32::MAX, &resource.name));
        }
    }
    text
}

/// The block of a minor that does not exist.
#[must_use]
pub fn sh_status_unknown(minor: u32) -> String {
    unknown(minor, "")
}

fn unknown(minor: u32, resource: &str) -> String {
    let known = "NA # not available or not yet created";
    head(minor, resource, "-1", known) + UNCONFIGURED
}

const UNCONFIGURED: &str = "_cstate=Unconfigured\n_role=\n_peer=\n_disk=\n_pdsk=\n_flags_susp=\n\
    _flags_aftr_isp=\n_flags_peer_isp=\n_flags_user_isp=\n_resynced_percent=\n\n\
    _sh_status_process\n\n\n";

fn head(minor: u32, resource: &str, volume: &str, known: &str) -> String {
    let name = escaped(resource);
    format!("_minor={minor}\n_res_name={name}\n_volume={volume}\n_known={known}\n\n")
}

fn block(resource: &Resource, volume: &Volume) -> String {
    let number = volume.volume.to_string();
    if volume.is_unconfigured() && volume.role != Role::Primary {
        return head(volume.minor, &resource.name, &number, "Unconfigured") + UNCONFIGURED;
    }
    let mut text = head(volume.minor, &resource.name, &number, "Configured");
    let flag = |set| if set { "1" } else { "" };
    // Writing to a string does not fail.
    let _ = write!(
        text,
        "_cstate={}\n_role={}\n_peer={}\n_disk={}\n_pdsk={}\n\n",
        volume.cstate, volume.role, volume.peer_role, volume.disk, volume.peer_disk
    );
    let _ = write!(
        text,
        "_flags_susp={}\n_flags_aftr_isp={}\n_flags_peer_isp={}\n_flags_user_isp={}\n\n",
        flag(resource.suspended.user),
        flag(volume.paused_after),
        flag(volume.paused_peer),
        flag(volume.paused_user)
    );
    let percent = progress(volume).map(|p| format!("{}.{}", p.permille / 10, p.permille % 10));
    let percent = percent.unwrap_or_default();
    let _ = write!(text, "_resynced_percent={percent}\n\n_sh_status_process\n\n\n");
    text
}

/// For the shell: everything that is not plain gets a backslash.
fn escaped(name: &str) -> String {
    let mut text = String::new();
    for c in name.chars() {
        if !(c.is_ascii_alphanumeric() || "%+-./:=@_".contains(c)) {
            text.push('\\');
        }
        text.push(c);
    }
    text
}
