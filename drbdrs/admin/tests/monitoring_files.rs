//! The dashboard and the alert rules name only metrics and labels that the exporter has.

use std::collections::BTreeSet;

use drbd_admin::Snapshot;
use drbd_admin::render::metrics;

const DASHBOARD: &str = include_str!("../../monitoring/grafana-dashboard.json");
const ALERTS: &str = include_str!("../../monitoring/prometheus-alerts.yml");

/// Names of all metrics; parts of a histogram by their own names.
fn exported() -> BTreeSet<String> {
    let page = metrics(&Snapshot::default());
    let mut names = BTreeSet::new();
    for line in page.lines() {
        let Some(rest) = line.strip_prefix("# TYPE ") else { continue };
        let (name, kind) = rest.split_once(' ').expect("a kind");
        if kind == "histogram" {
            names.extend(["bucket", "sum", "count"].map(|part| format!("{name}_{part}")));
        } else {
            names.insert(name.to_owned());
        }
    }
    names
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').filter(|word| !word.is_empty())
}

/// All words of an expression that look like one of our metrics.
fn metrics_in(text: &str) -> BTreeSet<&str> {
    let prefixes = ["drbd_", "drbdrs_", "drbdreactor_"];
    words(text).filter(|word| prefixes.iter().any(|prefix| word.starts_with(prefix))).collect()
}

/// Labels that an expression selects or groups by.
fn labels_in(expression: &str) -> BTreeSet<&str> {
    let mut labels = BTreeSet::new();
    for part in expression.split('{').skip(1) {
        let selector = part.split('}').next().unwrap_or_default();
        let equations = selector.split(", ").filter_map(|e| e.split(['=', '!']).next());
        labels.extend(equations);
    }
    for keyword in ["by (", "on ("] {
        for part in expression.split(keyword).skip(1) {
            labels.extend(part.split(')').next().unwrap_or_default().split(", "));
        }
    }
    labels
}

fn check(expressions: &[String]) {
    let exported = exported();
    let known = ["instance", "name", "volume", "minor", "kind", "stage", "le"];
    assert!(expressions.len() > 5, "{expressions:?}");
    for expression in expressions {
        let names = metrics_in(expression);
        assert!(!names.is_empty(), "{expression}");
        for name in names {
            assert!(exported.contains(name), "{name} in {expression}");
        }
        for label in labels_in(expression) {
            // The label of a state has the metric's name.
            let is_known = known.contains(&label) || exported.contains(label);
            assert!(is_known, "label {label} in {expression}");
        }
    }
}

#[test]
fn dashboard() {
    let dashboard: serde_json::Value = serde_json::from_str(DASHBOARD).unwrap();
    let mut expressions = Vec::new();
    let mut ids = BTreeSet::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "an id twice: {}", panel["title"]);
        for target in panel["targets"].as_array().unwrap() {
            expressions.push(target["expr"].as_str().unwrap().to_owned());
        }
    }
    check(&expressions);
    for name in metrics_in(&dashboard["templating"].to_string()) {
        assert!(exported().contains(name), "{name}");
    }
}

#[test]
fn alerts() {
    // Expressions stand behind `expr:`, folded ones on the deeper lines after it.
    let mut expressions: Vec<String> = Vec::new();
    let mut is_folded = false;
    for line in ALERTS.lines() {
        let indent = line.len() - line.trim_start().len();
        match line.trim_start().strip_prefix("expr: ") {
            Some(rest) => {
                is_folded = rest == ">-";
                expressions.push(if is_folded { String::new() } else { rest.to_owned() });
            }
            None if is_folded && indent > 8 => {
                let last = expressions.last_mut().unwrap();
                last.push_str(line.trim());
                last.push(' ');
            }
            None => is_folded = false,
        }
    }
    assert_eq!(expressions.len(), ALERTS.matches("- alert: ").count());
    check(&expressions);
}

#[test]
fn a_wrong_name_is_found() {
    for expression in ["drbd_device_sate == 1", "drbd_device_open{nmae=\"r0\"}"] {
        let expressions = vec![expression.to_owned(); 6];
        assert!(std::panic::catch_unwind(|| check(&expressions)).is_err(), "{expression}");
    }
}

/// Those of drbd-reactor. Spec: status-and-integration.md §6.2.
#[test]
fn drbd_reactors_metrics_are_all_there() {
    let exported = exported();
    let parts = [
        ("drbdreactor_", "up"),
        ("drbd_", "version"),
        ("drbd_resource_", "resources role suspended maypromote promotionscore forceiofailures"),
        ("drbd_connection_", "state congested apinflight_bytes rsinflight_bytes"),
        ("drbd_peerdevice_", "outofsync_bytes sent_bytes received_bytes"),
        (
            "drbd_device_",
            "state client unintentionaldiskless quorum open alsuspended size_bytes \
             read_bytes_total written_bytes_total alwrites_total bmwrites_total upperpending \
             lowerpending",
        ),
    ];
    for (prefix, names) in parts {
        for name in names.split_whitespace() {
            assert!(exported.contains(&format!("{prefix}{name}")), "{prefix}{name}");
        }
    }
}
