//! From the options of requests to the engine's settings. Ranges and defaults are those of the one
//! table in `drbd_conf::options`; a set contains only what is not default.
//! Spec: config-and-drbdadm.md §5.

use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::path::PathBuf;

use drbd_admin::{Address, Family, MetaIndex, OptionSet, Reply, Section};
use drbd_core::config::{
    DiskConfig, Fencing, NetConfig, OnCongestion, OnIoError, OnNoData, Protocol, ReadBalancing,
    ResourceConfig, ResyncConfig, Secret,
};
use drbd_core::generation::decide::RrConflict;
use drbd_core::generation::splitbrain::{OnePrimary, Policies, TwoPrimaries, ZeroPrimaries};
use drbd_types::{Deciseconds, Failure, Minor, SectorCount};
use drbdmeta::layout::Placement;

use crate::plane::disk::DiskPaths;
use crate::plane::link::Addresses;

/// The values of one section.
struct Values<'a> {
    section: Section,
    set: &'a OptionSet,
}

impl Values<'_> {
    /// Within its range; requests are checked, and the widths here hold every range of the table.
    fn number<T: TryFrom<u64> + Default>(&self, name: &str) -> T {
        T::try_from(self.set.number(self.section, name)).unwrap_or_default()
    }

    fn tenths(&self, name: &str) -> Deciseconds {
        Deciseconds(self.number(name))
    }

    fn flag(&self, name: &str) -> bool {
        self.set.flag(self.section, name)
    }

    fn text(&self, name: &str) -> String {
        self.set.text(self.section, name)
    }

    fn pick<T: Copy + Default>(&self, name: &str, values: &[(&str, T)]) -> T {
        let text = self.text(name);
        values.iter().find(|(known, _)| *known == text).map(|(_, v)| *v).unwrap_or_default()
    }
}

/// Section `disk`.
#[must_use]
pub fn disk(set: &OptionSet) -> DiskConfig {
    let v = Values { section: Section::Disk, set };
    DiskConfig {
        size: SectorCount(v.number("size")),
        on_io_error: v.pick(
            "on-io-error",
            &[
                ("pass_on", OnIoError::PassOn),
                ("call-local-io-error", OnIoError::CallLocalIoError),
                ("detach", OnIoError::Detach),
            ],
        ),
        fencing: v.pick(
            "fencing",
            &[
                ("resource-only", Fencing::ResourceOnly),
                ("resource-and-stonith", Fencing::ResourceAndStonith),
            ],
        ),
        disk_flushes: v.flag("disk-flushes"),
        disk_drain: v.flag("disk-drain"),
        md_flushes: v.flag("md-flushes"),
        al_extents: v.number("al-extents"),
        al_updates: v.flag("al-updates"),
        read_balancing: v.pick(
            "read-balancing",
            &[
                ("prefer-remote", ReadBalancing::PreferRemote),
                ("round-robin", ReadBalancing::RoundRobin),
                ("least-pending", ReadBalancing::LeastPending),
                ("when-congested-remote", ReadBalancing::WhenCongestedRemote),
                ("32K-striping", ReadBalancing::Striping(15)),
                ("64K-striping", ReadBalancing::Striping(16)),
                ("128K-striping", ReadBalancing::Striping(17)),
                ("256K-striping", ReadBalancing::Striping(18)),
                ("512K-striping", ReadBalancing::Striping(19)),
                ("1M-striping", ReadBalancing::Striping(20)),
            ],
        ),
        resync_after: set.resync_after().map(Minor),
        resync: ResyncConfig {
            resync_rate: v.number("resync-rate"),
            c_plan_ahead: v.number("c-plan-ahead"),
            c_delay_target: v.number("c-delay-target"),
            c_fill_target: v.number("c-fill-target"),
            c_max_rate: v.number("c-max-rate"),
        },
        c_min_rate: v.number("c-min-rate"),
        disk_timeout: v.tenths("disk-timeout"),
        rs_discard_granularity: v.number("rs-discard-granularity"),
        discard_zeroes_if_aligned: v.flag("discard-zeroes-if-aligned"),
    }
}

/// Section `net`, without the two options that belong to one attempt.
#[must_use]
pub fn net(set: &OptionSet) -> NetConfig {
    let v = Values { section: Section::Net, set };
    NetConfig {
        protocol: v.pick("protocol", &[("A", Protocol::A), ("B", Protocol::B), ("C", Protocol::C)]),
        timeout: v.tenths("timeout"),
        ko_count: v.number("ko-count"),
        connect_int: v.number("connect-int"),
        ping_int: v.number("ping-int"),
        ping_timeout: v.tenths("ping-timeout"),
        socket_check_timeout: v.tenths("socket-check-timeout"),
        max_buffers: v.number("max-buffers"),
        max_epoch_size: v.number("max-epoch-size"),
        two_primaries: v.flag("allow-two-primaries"),
        always_asbp: v.flag("always-asbp"),
        after_sb: after_sb(&v),
        rr_conflict: v.pick(
            "rr-conflict",
            &[("call-pri-lost", RrConflict::CallPriLost), ("violently", RrConflict::Violently)],
        ),
        cram_hmac_alg: v.text("cram-hmac-alg"),
        shared_secret: Secret(v.text("shared-secret")),
        integrity_alg: v.text("data-integrity-alg"),
        verify_alg: v.text("verify-alg"),
        csums_alg: v.text("csums-alg"),
        csums_after_crash_only: v.flag("csums-after-crash-only"),
        use_rle: v.flag("use-rle"),
        on_congestion: v.pick(
            "on-congestion",
            &[("pull-ahead", OnCongestion::PullAhead), ("disconnect", OnCongestion::Disconnect)],
        ),
        congestion_fill: SectorCount(v.number("congestion-fill")),
        congestion_extents: v.number("congestion-extents"),
        ..NetConfig::default()
    }
}

fn after_sb(v: &Values<'_>) -> Policies {
    Policies {
        zero: v.pick(
            "after-sb-0pri",
            &[
                ("discard-younger-primary", ZeroPrimaries::DiscardYoungerPrimary),
                ("discard-older-primary", ZeroPrimaries::DiscardOlderPrimary),
                ("discard-zero-changes", ZeroPrimaries::DiscardZeroChanges),
                ("discard-least-changes", ZeroPrimaries::DiscardLeastChanges),
                ("discard-local", ZeroPrimaries::DiscardLocal),
                ("discard-remote", ZeroPrimaries::DiscardRemote),
            ],
        ),
        one: v.pick(
            "after-sb-1pri",
            &[
                ("consensus", OnePrimary::Consensus),
                ("discard-secondary", OnePrimary::DiscardSecondary),
                ("call-pri-lost-after-sb", OnePrimary::CallPriLost),
                ("violently-as0p", OnePrimary::ViolentlyAs0p),
            ],
        ),
        two: v.pick(
            "after-sb-2pri",
            &[
                ("call-pri-lost-after-sb", TwoPrimaries::CallPriLost),
                ("violently-as0p", TwoPrimaries::ViolentlyAs0p),
            ],
        ),
    }
}

/// Section `options`.
#[must_use]
pub fn resource(set: &OptionSet) -> ResourceConfig {
    let v = Values { section: Section::Options, set };
    let on_no_data = v.pick("on-no-data-accessible", &[("suspend-io", OnNoData::SuspendIo)]);
    ResourceConfig { on_no_data }
}

/// What the plane opens.
///
/// # Errors
/// 116: a slot that no device can have.
pub fn disk_paths(disk: &str, meta_disk: &str, index: MetaIndex) -> Result<DiskPaths, Reply> {
    let placement = match index {
        MetaIndex::Internal => Placement::Internal,
        MetaIndex::Flexible => Placement::FlexExternal,
        MetaIndex::Index(slot) => Placement::Indexed(u8::try_from(slot).map_err(|_| {
            Reply::failed(Failure::MetaIndexInvalid, "the index of the meta-data is above 255")
        })?),
    };
    let meta = (!placement.is_internal()).then(|| PathBuf::from(meta_disk));
    Ok(DiskPaths { backing: disk.into(), meta, placement })
}

/// Where to listen and connect.
///
/// # Errors
/// 162: not an address, or of a family that sockets in user space do not have.
pub fn addresses(local: &Address, peer: &Address, net: &OptionSet) -> Result<Addresses, Reply> {
    let v = Values { section: Section::Net, set: net };
    let (own, peer) = (address(local)?, address(peer)?);
    if own.is_ipv4() != peer.is_ipv4() {
        let text = "the two addresses of a connection must be of the same family";
        return Err(Reply::failed(Failure::InvalidRequest, text));
    }
    Ok(Addresses {
        own,
        peer,
        send_buffer: v.number("sndbuf-size"),
        receive_buffer: v.number("rcvbuf-size"),
    })
}

/// One end.
///
/// # Errors
/// As for [`addresses`].
pub fn address(from: &Address) -> Result<SocketAddr, Reply> {
    let wrong = |why: &str| Reply::failed(Failure::InvalidRequest, &format!("{from}: {why}"));
    let (host, zone) = match from.addr.split_once('%') {
        Some((host, zone)) => (host, Some(zone)),
        None => (from.addr.as_str(), None),
    };
    let ip: IpAddr = host.parse().map_err(|_| wrong("not an address"))?;
    match (from.family, ip, zone) {
        (Family::Sdp | Family::Ssocks, ..) => {
            Err(wrong("this address family is not supported, use ipv4 or ipv6"))
        }
        (Family::Ipv4, IpAddr::V4(_), None) => Ok(SocketAddr::new(ip, from.port)),
        (Family::Ipv6, IpAddr::V6(ip), zone) => {
            let scope = zone.map_or(Some(0), scope).ok_or_else(|| wrong("no such interface"))?;
            Ok(SocketAddrV6::new(ip, from.port, 0, scope).into())
        }
        _ => Err(wrong("not an address of its family")),
    }
}

fn scope(zone: &str) -> Option<u32> {
    if let Ok(number) = zone.parse() {
        return Some(number);
    }
    let socket = std::net::UdpSocket::bind("[::]:0").ok()?;
    rustix::net::netdevice::name_to_index(&socket, zone).ok()
}

/// `DRBD_PEER_AF` and `DRBD_PEER_ADDRESS` of handlers. Spec: states-and-generations.md §12.1.
#[must_use]
pub fn peer_environment(peer: &SocketAddr) -> (&'static str, String) {
    match peer.ip() {
        IpAddr::V4(ip) => ("ipv4", ip.to_string()),
        IpAddr::V6(ip) => ("ipv6", ip.segments().map(|group| format!("{group:04x}")).join(":")),
    }
}

#[cfg(test)]
mod tests {
    use drbd_admin::OptionValue;
    use drbd_conf::options::{Kind, OPTIONS};

    use super::*;

    #[test]
    fn defaults_of_table_and_engine_are_equal() {
        let none = OptionSet::default();
        assert_eq!(disk(&none), DiskConfig::default());
        assert_eq!(net(&none), NetConfig::default());
        assert_eq!(resource(&none), ResourceConfig::default());
    }

    /// Names of options that have no effect in 8.4 or belong to the plane.
    const WITHOUT_FIELD: &[&str] = &[
        "max-bio-bvecs",
        "disk-barrier",
        "disable-write-same",
        "unplug-watermark",
        "sndbuf-size",
        "rcvbuf-size",
        "tcp-cork",
        "cpu-mask",
    ];

    /// Every value of every option reaches the engine as a value of its own: a name that is
    /// misspelt here would leave the default.
    #[test]
    fn every_option_reaches_the_engine() {
        let shown = |section, set: &OptionSet| match section {
            Section::Disk => format!("{:?}", disk(set)),
            Section::Net => {
                let net = net(set);
                format!("{net:?} {}", net.shared_secret.0)
            }
            _ => format!("{:?}", resource(set)),
        };
        let rows = OPTIONS
            .iter()
            .filter(|r| matches!(r.section, Section::Disk | Section::Net | Section::Options))
            .filter(|r| !WITHOUT_FIELD.contains(&r.name));
        let mut count = 0;
        for row in rows {
            let values: Vec<OptionValue> = match row.kind {
                Kind::Number { min, max, default, .. } => {
                    let all = [min, max, default].map(OptionValue::Number);
                    let mut all = all.to_vec();
                    all.dedup();
                    if min == default || max == default {
                        all.pop();
                    }
                    all
                }
                Kind::Bool { .. } | Kind::Flag => {
                    vec![OptionValue::Bool(true), OptionValue::Bool(false)]
                }
                Kind::Enum { values, .. } => {
                    values.iter().map(|v| OptionValue::Text((*v).into())).collect()
                }
                Kind::Text { .. } | Kind::Address => {
                    ["", "x"].map(|t| OptionValue::Text(t.into())).to_vec()
                }
                Kind::ResyncAfter => vec![OptionValue::None, OptionValue::Number(7)],
            };
            let results: std::collections::BTreeSet<String> = values
                .iter()
                .map(|value| {
                    let mut set = OptionSet::default();
                    set.set(row.name, value.clone());
                    assert_eq!(set.check(row.section), Ok(()), "{}", row.name);
                    shown(row.section, &set)
                })
                .collect();
            assert_eq!(results.len(), values.len(), "{}: {results:#?}", row.name);
            count += 1;
        }
        assert!(count > 40, "{count}");
    }

    #[test]
    fn addresses_are_read() {
        let read = |family, addr: &str| {
            address(&Address { family, addr: addr.into(), port: 7 }).map(|a| a.to_string())
        };
        assert_eq!(read(Family::Ipv4, "10.1.1.1").unwrap(), "10.1.1.1:7");
        assert_eq!(read(Family::Ipv6, "fe80::1%3").unwrap(), "[fe80::1%3]:7");
        assert_eq!(read(Family::Ipv6, "::1%lo").unwrap(), "[::1%1]:7");
        for (family, addr) in [
            (Family::Ipv4, "::1"),
            (Family::Ipv6, "1.1.1.1"),
            (Family::Ipv4, "host"),
            (Family::Ipv4, "1.1.1.1%1"),
            (Family::Sdp, "1.1.1.1"),
            (Family::Ipv6, "::1%no-such-device"),
        ] {
            assert_eq!(read(family, addr).unwrap_err().code, 162, "{addr}");
        }
        let six = "[1:2::3]:7".parse().unwrap();
        let (family, text) = peer_environment(&six);
        assert_eq!((family, text.as_str()), ("ipv6", "0001:0002:0000:0000:0000:0000:0000:0003"));
    }
}
