//! The backend calls that commands stand for. Spec: config-and-drbdadm.md §9.

use bstr::{BStr, BString, ByteSlice};
use drbd_conf::model::{Address, HostSection, MetaIndex, OptionList, Resource, Volume};

use crate::backend::{Call, Program, Stderr, Step};
use crate::command::TimeClass;
use crate::registry::Link;

/// Meta-data device of a volume: the disk itself for internal meta-data.
pub fn meta_device(volume: &Volume) -> BString {
    match &volume.meta_disk {
        Some(meta) if meta.index != MetaIndex::Internal => meta.device.clone(),
        _ => volume.disk.clone().unwrap_or_default(),
    }
}

/// Index as drbdsetup wants it: `internal`, a number, or `flexible`.
pub fn meta_index(volume: &Volume) -> BString {
    match volume.meta_disk.as_ref().map(|m| &m.index) {
        None | Some(MetaIndex::Internal) => "internal".into(),
        Some(MetaIndex::Flexible) => "flexible".into(),
        Some(MetaIndex::Indexed(index)) => index.clone(),
    }
}

/// Index as drbdmeta wants it.
fn meta_index_for_drbdmeta(volume: &Volume) -> BString {
    let index = meta_index(volume);
    if index == "flexible" { "flex-external".into() } else { index }
}

/// `family:addr:port`.
pub fn address(address: &Address) -> BString {
    format!("{}:{}", address.family.name(), address.endpoint()).into()
}

/// `--name=value` for every option of a list, in its order.
pub fn options(list: &OptionList) -> Vec<BString> {
    let word = |o: &drbd_conf::model::Opt| {
        let name = o.spec.name.as_bytes();
        match &o.value {
            Some(value) => BString::from(bstr::concat([b"--", name, b"=", value])),
            None => BString::from(bstr::concat([b"--", name])),
        }
    };
    list.items.iter().map(word).collect()
}

/// The two ends of a connection as words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ends {
    /// Own address.
    pub me: BString,
    /// The peer's, or `N/A`.
    pub peer: BString,
    /// Second addresses, both or none.
    pub alternate: Option<(BString, BString)>,
}

/// Why a connection can not be made from the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OneSidedAlternate;

/// Addresses of both ends. With a local proxy the peer is its inside address.
///
/// # Errors
/// Only one of the two sections has an alternate-link-address.
pub fn ends(me: &HostSection, peer: Option<&HostSection>) -> Result<Ends, OneSidedAlternate> {
    let own = me.address.as_ref().map_or_else(|| "N/A".into(), address);
    let inside = me.proxy.as_ref().and_then(|p| p.inside.as_ref());
    let other = inside.or_else(|| peer.and_then(|p| p.address.as_ref()));
    let other = other.map_or_else(|| "N/A".into(), address);
    let alternate = match (&me.alternate_address, peer.map(|p| &p.alternate_address)) {
        (Some(a), Some(Some(b))) => Some((address(a), address(b))),
        (Some(_), Some(None)) | (None, Some(Some(_))) => return Err(OneSidedAlternate),
        (_, _) => None,
    };
    Ok(Ends { me: own, peer: other, alternate })
}

fn step(name: &'static str, call: Call) -> Step {
    Step { call, ignore_code: false, link: None, name }
}

/// Calls about one volume.
#[derive(Clone, Copy)]
pub struct Lines<'a> {
    /// Resource.
    pub resource: &'a Resource,
    /// Backend options of the command line.
    pub extra: &'a [BString],
}

impl Lines<'_> {
    /// `drbdmeta MINOR v08 MD MIDX COMMAND opts`.
    pub fn meta(&self, volume: &Volume, command: &str) -> Call {
        let minor = volume.minor.unwrap_or_default();
        Call::new(Program::Meta, &self.resource.name, TimeClass::Long)
            .arg(minor.to_string())
            .arg("v08")
            .arg(meta_device(volume))
            .arg(meta_index_for_drbdmeta(volume))
            .arg(command)
            .args(self.extra.iter().cloned())
    }

    /// `drbdsetup-84 COMMAND MINOR opts`.
    pub fn setup_minor(&self, command: &str, minor: u32, time: TimeClass) -> Call {
        let mut call = Call::new(Program::Setup, &self.resource.name, time)
            .arg(command)
            .arg(minor.to_string())
            .args(self.extra.iter().cloned());
        call.export_resource = true;
        call
    }

    /// `drbdsetup-84 COMMAND RES opts`.
    pub fn setup_resource(&self, command: &str, time: TimeClass) -> Call {
        let mut call = Call::new(Program::Setup, &self.resource.name, time)
            .arg(command)
            .arg(self.resource.name.clone())
            .args(self.extra.iter().cloned());
        call.export_resource = true;
        call
    }

    /// apply-al, then attach.
    pub fn attach(&self, volume: &Volume, disk: &OptionList) -> Vec<Step> {
        let minor = volume.minor.unwrap_or_default();
        let attach = Call::new(Program::Setup, &self.resource.name, TimeClass::Medium)
            .arg("attach")
            .arg(minor.to_string())
            .arg(volume.disk.clone().unwrap_or_default())
            .arg(meta_device(volume))
            .arg(meta_index(volume))
            .args(options(disk))
            .args(self.extra.iter().cloned());
        vec![step("apply-al", self.apply_al(volume)), step("attach", attach)]
    }

    /// apply-al does not get the options of attach; the original passes it all of them, so that
    /// `attach --size=…` fails.
    fn apply_al(&self, volume: &Volume) -> Call {
        let is_disk_option = |o: &BString| {
            let word = o.strip_prefix(b"--").unwrap_or_default();
            let name = word.split_once_str("=").map_or(word, |(name, _)| name);
            drbd_conf::options::find(drbd_conf::options::Section::Disk, name).is_some()
        };
        let extra: Vec<BString> =
            self.extra.iter().filter(|o| !is_disk_option(o)).cloned().collect();
        Lines { resource: self.resource, extra: &extra }.meta(volume, "apply-al")
    }

    /// new-resource.
    pub fn new_resource(&self) -> Step {
        let call = Call::new(Program::Setup, &self.resource.name, TimeClass::Short)
            .arg("new-resource")
            .arg(self.resource.name.clone())
            .args(options(&self.resource.options))
            .args(self.extra.iter().cloned());
        let link = Some(Link::Resource(self.resource.name.clone()));
        Step { link, ..step("new-resource", call) }
    }

    /// new-minor.
    pub fn new_minor(&self, volume: &Volume) -> Step {
        let minor = volume.minor.unwrap_or_default();
        let call = Call::new(Program::Setup, &self.resource.name, TimeClass::Short)
            .arg("new-minor")
            .arg(self.resource.name.clone())
            .arg(minor.to_string())
            .arg(volume.vnr.to_string());
        Step { link: Some(Link::Minor(minor)), ..step("new-minor", call) }
    }

    /// connect.
    pub fn connect(&self, ends: &Ends) -> Step {
        let mut call = Call::new(Program::Setup, &self.resource.name, TimeClass::Short)
            .arg("connect")
            .arg(self.resource.name.clone())
            .arg(ends.me.clone())
            .arg(ends.peer.clone());
        if let Some((own, peer)) = &ends.alternate {
            call = call.arg("--alternate-address").arg(own.clone());
            call = call.arg("--alternate-peer-address").arg(peer.clone());
        }
        let call = call.args(options(&self.resource.net)).args(self.extra.iter().cloned());
        step("connect", call)
    }

    /// disconnect, net-options: commands about a pair of addresses.
    pub fn of_connection(&self, command: &'static str, me: &BStr, peer: &BStr) -> Call {
        Call::new(Program::Setup, &self.resource.name, TimeClass::Short)
            .arg(command)
            .arg(me)
            .arg(peer)
    }

    /// resize, and check-resize behind it.
    pub fn resize(&self, volume: &Volume, stderr: Stderr) -> Vec<Step> {
        let minor = volume.minor.unwrap_or_default();
        let size = volume.disk_options.items.iter().find(|o| o.spec.name == "size");
        let size = size.and_then(|o| o.value.as_ref());
        let mut resize = Call::new(Program::Setup, &self.resource.name, TimeClass::Short)
            .arg("resize")
            .arg(minor.to_string())
            .stderr(stderr);
        if let Some(size) = size {
            resize = resize.arg(bstr::concat([b"--size=".as_slice(), size]));
        }
        let resize = resize.args(self.extra.iter().cloned());
        let check = Call::new(Program::Setup, &self.resource.name, TimeClass::Short)
            .arg("check-resize")
            .arg(minor.to_string())
            .stderr(stderr);
        let check = Step { ignore_code: true, ..step("check-resize", check) };
        vec![step("resize", resize), check]
    }

    /// One call as a job.
    pub fn single(name: &'static str, call: Call) -> Vec<Step> {
        vec![step(name, call)]
    }

    /// wait-connect with the startup options, or the one time-out of stacked resources.
    pub fn wait_connect(&self, volume: &Volume, stacked: bool) -> Call {
        let mut call = Call::new(Program::Setup, &self.resource.name, TimeClass::None)
            .arg("wait-connect")
            .arg(volume.minor.unwrap_or_default().to_string());
        call.report_code = false;
        if !stacked || self.resource.stacked_timeouts.is_some() {
            return call.args(options(&self.resource.startup));
        }
        let interval = self.resource.net.items.iter().find(|o| o.spec.name == "connect-int");
        let interval = interval.and_then(|o| o.value.as_ref());
        let seconds = interval.and_then(|v| v.to_str().ok()?.parse::<u64>().ok()).unwrap_or(10);
        call.arg("--wfc-timeout").arg(seconds.saturating_mul(2).to_string())
    }
}
