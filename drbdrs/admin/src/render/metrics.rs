//! Metrics in Prometheus' text format: names and labels of drbd-reactor's exporter, and our own
//! under `drbdrs_`. Spec: status-and-integration.md §6.2.

use std::fmt::{Display, Write};

use drbd_types::{Cstate, Dstate, Role};

use super::events2_full::{may_promote, promotion_score};
use super::split_brain::SplitBrain;
use super::{connection_name, progress, replication_name};
use crate::{Connection, Resource, Snapshot, Volume};

/// What the exporter's utils are: the tools that ours stand for.
const UTILS: &str = "9.22.0";

/// States of a connection, as DRBD 9 names them.
const CONNECTION_STATES: [&str; 10] = [
    "StandAlone",
    "Disconnecting",
    "Unconnected",
    "Timeout",
    "BrokenPipe",
    "NetworkFailure",
    "ProtocolError",
    "TearDown",
    "Connecting",
    "Connected",
];

/// Disk states of DRBD 9 that 8.4 does not have are never set.
const DISK_STATES: [&str; 10] = [
    "Diskless",
    "Attaching",
    "Detaching",
    "Failed",
    "Negotiating",
    "Inconsistent",
    "Outdated",
    "DUnknown",
    "Consistent",
    "UpToDate",
];

type Labels<'a> = Vec<(&'static str, &'a dyn Display)>;

/// The page being written.
struct Page<'s> {
    text: String,
    snapshot: &'s Snapshot,
}

/// Everything at this moment.
#[must_use]
pub fn metrics(snapshot: &Snapshot) -> String {
    let mut page = Page { text: String::new(), snapshot };
    page.node();
    page.resources();
    page.connections();
    page.peer_devices();
    page.devices();
    page.extras();
    page.latencies();
    page.text
}

impl Page<'_> {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.text, "# TYPE {name} {kind}\n# HELP {name} {help}");
    }

    fn sample(&mut self, name: &str, labels: &Labels<'_>, value: impl Display) {
        self.text.push_str(name);
        for (n, (label, of)) in labels.iter().enumerate() {
            let before = if n == 0 { '{' } else { ',' };
            let _ = write!(self.text, "{before}{label}=\"{}\"", escaped(&of.to_string()));
        }
        if !labels.is_empty() {
            self.text.push('}');
        }
        let _ = writeln!(self.text, " {value}");
    }

    /// One sample for each state, 1 for the present one.
    fn states(&mut self, name: &'static str, labels: Labels<'_>, all: &[&str], now: &str) {
        for state in all {
            let mut labels = labels.clone();
            labels.push((name, state));
            self.sample(name, &labels, u8::from(*state == now));
        }
    }

    fn node(&mut self) {
        let snapshot = self.snapshot;
        self.head("drbdreactor_up", "gauge", "Boolean whether the exporter is up");
        self.sample("drbdreactor_up", &Vec::new(), 1);
        self.head(
            "drbd_version",
            "gauge",
            "Version of the driver that drbdrs stands for, and of the tools",
        );
        self.sample("drbd_version", &vec![("kmod", &super::RELEASE), ("utils", &UTILS)], 1);
        self.head("drbdrs_build_info", "gauge", "Release of drbdrs");
        self.sample("drbdrs_build_info", &vec![("release", &snapshot.daemon.release)], 1);
        self.head("drbdrs_faults", "gauge", "Faults that are switched on for rehearsals");
        self.sample("drbdrs_faults", &Vec::new(), snapshot.daemon.faults.len());
        self.head("drbd_resource_resources", "gauge", "Number of resources");
        self.sample("drbd_resource_resources", &Vec::new(), snapshot.resources.len());
    }

    /// One metric with a sample for each resource.
    fn each_resource<V: Display>(
        &mut self,
        name: &'static str,
        help: &str,
        value: impl Fn(&Resource) -> V,
    ) {
        self.head(name, "gauge", help);
        for resource in &self.snapshot.resources {
            self.sample(name, &vec![("name", &resource.name)], value(resource));
        }
    }

    fn resources(&mut self) {
        let role = "drbd_resource_role";
        self.head(role, "gauge", "Role of the resource");
        let all: Vec<&str> = Role::ALL.iter().map(|role| role.name()).collect();
        for resource in &self.snapshot.resources {
            self.states(role, vec![("name", &resource.name)], &all, resource.role().name());
        }
        let is = u8::from;
        self.each_resource("drbd_resource_suspended", "Boolean whether I/O is suspended", |r| {
            is(r.suspended.is_any())
        });
        self.each_resource(
            "drbd_resource_maypromote",
            "Boolean whether the resource may be promoted",
            |r| is(may_promote(r)),
        );
        self.each_resource(
            "drbd_resource_promotionscore",
            "How good this node is for a promotion",
            promotion_score,
        );
        self.each_resource(
            "drbd_resource_forceiofailures",
            "Boolean whether I/O is made to fail",
            |_| 0,
        );
    }

    fn each_connection<V: Display>(
        &mut self,
        name: &'static str,
        help: &str,
        value: impl Fn(&Connection) -> V,
    ) {
        self.head(name, "gauge", help);
        for resource in &self.snapshot.resources {
            if let Some(connection) = &resource.connection {
                self.sample(name, &of_connection(resource), value(connection));
            }
        }
    }

    fn connections(&mut self) {
        let state = "drbd_connection_state";
        self.head(state, "gauge", "State of the connection");
        for resource in &self.snapshot.resources {
            if let Some(connection) = &resource.connection {
                let now = connection_name(connection.state);
                self.states(state, of_connection(resource), &CONNECTION_STATES, now);
            }
        }
        let bytes = |sectors: Option<u64>| sectors.unwrap_or(0).saturating_mul(512);
        self.each_connection(
            "drbd_connection_congested",
            "Boolean whether the connection is congested",
            |c| u8::from(c.is_congested),
        );
        self.each_connection(
            "drbd_connection_apinflight_bytes",
            "Application writes that the peer has not acknowledged",
            |c| bytes(c.ap_in_flight),
        );
        self.each_connection(
            "drbd_connection_rsinflight_bytes",
            "Resync requests that are open",
            |c| bytes(c.rs_in_flight),
        );
    }

    /// One metric with a sample for each volume of a connection.
    fn each_peer_device<V: Display>(
        &mut self,
        (name, kind): (&'static str, &str),
        help: &str,
        value: impl Fn(&Volume) -> V,
    ) {
        self.head(name, kind, help);
        for resource in self.snapshot.resources.iter().filter(|r| r.connection.is_some()) {
            for volume in &resource.volumes {
                self.sample(name, &of_peer_device(resource, volume), value(volume));
            }
        }
    }

    fn peer_devices(&mut self) {
        let bytes = |sectors: u64| sectors.saturating_mul(512);
        self.each_peer_device(
            ("drbd_peerdevice_outofsync_bytes", "gauge"),
            "What is out of sync with the peer",
            |v| v.counters.out_of_sync.saturating_mul(4096),
        );
        self.each_peer_device(
            ("drbd_peerdevice_sent_bytes", "counter"),
            "Data sent to the peer",
            |v| bytes(v.counters.sent),
        );
        self.each_peer_device(
            ("drbd_peerdevice_received_bytes", "counter"),
            "Data received from the peer",
            |v| bytes(v.counters.received),
        );
    }

    /// One metric with a sample for each volume.
    fn each_device<V: Display>(
        &mut self,
        (name, kind): (&'static str, &str),
        help: &str,
        value: impl Fn(&Volume) -> V,
    ) {
        self.head(name, kind, help);
        for resource in &self.snapshot.resources {
            for volume in &resource.volumes {
                self.sample(name, &of_device(resource, volume), value(volume));
            }
        }
    }

    fn devices(&mut self) {
        let state = "drbd_device_state";
        self.head(state, "gauge", "State of the disk");
        for resource in &self.snapshot.resources {
            for volume in &resource.volumes {
                let labels = of_device(resource, volume);
                self.states(state, labels, &DISK_STATES, volume.disk.name());
            }
        }
        let is = u8::from;
        let bytes = |sectors: u64| sectors.saturating_mul(512);
        let gauge = |name| (name, "gauge");
        let counter = |name| (name, "counter");
        self.each_device(
            gauge("drbd_device_client"),
            "Boolean whether it has no disk on purpose",
            |_| 0,
        );
        self.each_device(
            gauge("drbd_device_unintentionaldiskless"),
            "Boolean whether it has lost its disk, or has none attached",
            |v| is(v.disk == Dstate::Diskless),
        );
        self.each_device(gauge("drbd_device_quorum"), "Boolean whether it has quorum", |_| 1);
        self.each_device(gauge("drbd_device_open"), "Boolean whether somebody uses it", |v| {
            is(v.is_open)
        });
        self.each_device(
            gauge("drbd_device_alsuspended"),
            "Boolean whether no activity log is written",
            |v| is(v.is_al_suspended),
        );
        self.each_device(gauge("drbd_device_size_bytes"), "Size of the device", |v| bytes(v.size));
        self.each_device(
            counter("drbd_device_read_bytes_total"),
            "Data read from the own disk",
            |v| bytes(v.counters.read),
        );
        self.each_device(
            counter("drbd_device_written_bytes_total"),
            "Data written to the own disk",
            |v| bytes(v.counters.written),
        );
        self.each_device(
            counter("drbd_device_alwrites_total"),
            "Transactions of the activity log",
            |v| v.counters.al_writes,
        );
        self.each_device(counter("drbd_device_bmwrites_total"), "Writes of bitmap blocks", |v| {
            v.counters.bm_writes
        });
        self.each_device(
            gauge("drbd_device_upperpending"),
            "Requests of applications that are not completed",
            |v| v.counters.application_pending,
        );
        self.each_device(
            gauge("drbd_device_lowerpending"),
            "Requests to the own disk that are not completed",
            |v| v.counters.local_pending,
        );
    }

    /// What drbd-reactor does not have.
    fn extras(&mut self) {
        let now = self.snapshot.at_us;
        self.each_resource(
            "drbdrs_resource_splitbrain",
            "Boolean whether a split brain waits for a decision",
            |r| u8::from(SplitBrain::of(r) == SplitBrain::Open),
        );
        self.each_resource(
            "drbdrs_resource_apart_seconds",
            "Since when the two nodes are not together; 0 while they are",
            |r| seconds(r.apart_since_us.map_or(0, |at| now.saturating_sub(at))),
        );
        let replication = "drbdrs_peerdevice_replication_state";
        let peer_disk = "drbdrs_peerdevice_disk_state";
        let mut all: Vec<&str> = Cstate::ALL.iter().map(|state| replication_name(*state)).collect();
        all.dedup();
        self.head(replication, "gauge", "State of the replication");
        for resource in self.snapshot.resources.iter().filter(|r| r.connection.is_some()) {
            for volume in &resource.volumes {
                let labels = of_peer_device(resource, volume);
                self.states(replication, labels, &all, replication_name(volume.cstate));
            }
        }
        self.head(peer_disk, "gauge", "State of the peer's disk");
        for resource in self.snapshot.resources.iter().filter(|r| r.connection.is_some()) {
            for volume in &resource.volumes {
                let labels = of_peer_device(resource, volume);
                self.states(peer_disk, labels, &DISK_STATES, volume.peer_disk.name());
            }
        }
        let gauge = |name| (name, "gauge");
        self.each_peer_device(
            gauge("drbdrs_peerdevice_resync_left_bytes"),
            "What a resync or verify that runs has still to do",
            |v| progress(v).map_or(0, |p| p.left.saturating_mul(4096)),
        );
        self.each_peer_device(
            gauge("drbdrs_peerdevice_resync_bytes_per_second"),
            "Rate of a resync or verify that runs, of about the last twenty seconds",
            |v| progress(v).map_or(0, |p| p.speed.saturating_mul(1024)),
        );
        self.each_device(
            gauge("drbdrs_device_oldest_request_seconds"),
            "Age of the oldest request of an application; 0 if there is none",
            |v| seconds(v.oldest_request_us.unwrap_or(0)),
        );
    }

    fn latencies(&mut self) {
        let name = "drbdrs_request_duration_seconds";
        let help = "How long requests of applications took: in total, waiting before the start \
                    (queue), at the own disk, and for the peer's answer";
        self.head(name, "histogram", help);
        for resource in &self.snapshot.resources {
            for volume in &resource.volumes {
                for histogram in &volume.latencies.histograms {
                    let mut labels = of_device(resource, volume);
                    labels.push(("kind", &histogram.kind));
                    labels.push(("stage", &histogram.stage));
                    let limits = volume.latencies.limits_us.iter().map(|us| seconds(*us));
                    let limits = limits.chain(std::iter::once("+Inf".to_owned()));
                    let mut sum = 0_u64;
                    for (limit, count) in limits.zip(&histogram.counts) {
                        sum = sum.saturating_add(*count);
                        let mut labels = labels.clone();
                        labels.push(("le", &limit));
                        self.sample(&format!("{name}_bucket"), &labels, sum);
                    }
                    self.sample(&format!("{name}_sum"), &labels, seconds(histogram.sum_us));
                    self.sample(&format!("{name}_count"), &labels, sum);
                }
            }
        }
    }
}

fn of_connection(resource: &Resource) -> Labels<'_> {
    vec![("name", &resource.name), ("conn_name", &"peer"), ("peer_node_id", &0)]
}

fn of_peer_device<'a>(resource: &'a Resource, volume: &'a Volume) -> Labels<'a> {
    let mut labels = of_connection(resource);
    labels.push(("volume", &volume.volume));
    labels
}

fn of_device<'a>(resource: &'a Resource, volume: &'a Volume) -> Labels<'a> {
    vec![("name", &resource.name), ("volume", &volume.volume), ("minor", &volume.minor)]
}

/// Without rounding: `0.00005`, `12.5`, `0`.
fn seconds(us: u64) -> String {
    let text = format!("{}.{:06}", us / 1_000_000, us % 1_000_000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Histogram, Latencies};

    #[test]
    fn samples_have_the_form_of_the_text_format() {
        let mut volume = Volume::new(3, 7);
        volume.size = 16;
        volume.latencies = Latencies {
            limits_us: vec![50, 1_000_000],
            histograms: vec![Histogram {
                kind: "write".into(),
                stage: "disk".into(),
                counts: vec![2, 0, 1],
                sum_us: 2_500_000,
            }],
        };
        let name = "a\"\\\nb".to_owned();
        let resource = Resource { name, volumes: vec![volume], ..Resource::default() };
        let text = metrics(&Snapshot { resources: vec![resource], ..Snapshot::default() });
        let labels = r#"name="a\"\\\nb",volume="3",minor="7""#;
        for line in [
            "# TYPE drbd_device_size_bytes gauge\n# HELP drbd_device_size_bytes Size of the device"
                .to_owned(),
            "drbdreactor_up 1".into(),
            r#"drbd_version{kmod="8.4.11",utils="9.22.0"} 1"#.into(),
            format!("drbd_device_size_bytes{{{labels}}} 8192"),
            format!(r#"drbd_device_state{{{labels},drbd_device_state="Diskless"}} 1"#),
            format!(r#"drbd_device_state{{{labels},drbd_device_state="UpToDate"}} 0"#),
            format!(
                "drbdrs_request_duration_seconds_bucket{{{labels},kind=\"write\",stage=\"disk\",\
                 le=\"0.00005\"}} 2"
            ),
            format!(
                "drbdrs_request_duration_seconds_bucket{{{labels},kind=\"write\",stage=\"disk\",\
                 le=\"1\"}} 2"
            ),
            format!(
                "drbdrs_request_duration_seconds_bucket{{{labels},kind=\"write\",stage=\"disk\",\
                 le=\"+Inf\"}} 3"
            ),
            format!(
                "drbdrs_request_duration_seconds_sum{{{labels},kind=\"write\",stage=\"disk\"}} 2.5"
            ),
        ] {
            assert!(text.contains(&format!("{line}\n")), "no {line} in\n{text}");
        }
        assert!(!text.contains("drbd_connection_state{"), "there is no connection");
    }

    #[test]
    fn every_state_has_a_name_in_the_lists() {
        for state in Cstate::ALL {
            assert!(CONNECTION_STATES.contains(&connection_name(*state)), "{state}");
        }
        for state in Dstate::ALL {
            assert!(DISK_STATES.contains(&state.name()), "{state}");
        }
    }

    #[test]
    fn times() {
        let rows = [(0, "0"), (50, "0.00005"), (10_000_000, "10"), (12_500_000, "12.5")];
        for (us, text) in rows {
            assert_eq!(seconds(us), text);
        }
    }
}
