//! The protocol: examples of the document, strictness of requests, bounds.

use drbd_admin::{Answer, Envelope, Request, Resource, Snapshot, Target, Volume, wire};

const DOCUMENT: &str = include_str!("../../docs/admin-protocol.md");

/// Lines of all blocks that are marked so.
fn examples(mark: &str) -> Vec<&'static str> {
    let blocks = DOCUMENT.split("```").skip(1).step_by(2);
    blocks.filter_map(|b| b.strip_prefix(mark)).flat_map(|b| b.trim().lines()).collect()
}

#[test]
fn examples_of_requests_are_requests() {
    let lines = examples("json request\n");
    assert!(lines.len() >= 12);
    for line in lines {
        let request: Envelope = wire::decode(line.as_bytes()).expect(line);
        let again = wire::encode(&request).unwrap();
        assert_eq!(wire::decode::<Envelope>(&again).unwrap(), request);
    }
}

#[test]
fn examples_of_answers_are_answers() {
    let lines = examples("json answer\n");
    assert!(lines.len() >= 8);
    for line in lines {
        let answer: Answer = wire::decode(line.as_bytes()).expect(line);
        let again = wire::encode(&answer).unwrap();
        assert_eq!(wire::decode::<Answer>(&again).unwrap(), answer);
    }
}

#[test]
fn every_command_is_in_the_document() {
    let error = wire::decode::<Envelope>(br#"{"version":1,"request":{"command":"x"}}"#);
    let error = error.unwrap_err().to_string();
    // serde lists all tags: "unknown variant `x`, expected one of `new-resource`, ...".
    let tags: Vec<&str> = error.split('`').skip(3).step_by(2).collect();
    assert!(tags.len() > 25, "{error}");
    for tag in tags {
        assert!(DOCUMENT.contains(&format!("`{tag}`")), "{tag} is not described");
    }
}

#[test]
fn unknown_members_of_requests_are_refused() {
    let refused = |line: &str| wire::decode::<Envelope>(line.as_bytes()).is_err();
    assert!(!refused(r#"{"version":1,"request":{"command":"primary","target":{"minor":0}}}"#));
    for line in [
        r#"{"version":1,"request":{"command":"primary","target":{"minor":0},"forced":true}}"#,
        r#"{"version":1,"extra":1,"request":{"command":"primary","target":{"minor":0}}}"#,
        r#"{"version":1,"request":{"command":"primary"}}"#,
        r#"{"version":1,"request":{"command":"primary","target":{"minor":-1}}}"#,
        r#"{"version":1,"request":{"command":"primary","target":"some"}}"#,
        r#"{"version":1,"request":{"command":"fault-set","fault":{"fault":"disk","x":1}}}"#,
        "",
        "[]",
    ] {
        assert!(refused(line), "{line}");
    }
}

#[test]
fn unknown_members_of_answers_are_skipped() {
    let line = br#"{"answer":"done","code":1,"later":[1,2]}"#;
    assert!(matches!(wire::decode::<Answer>(line), Ok(Answer::Done(r)) if r.code == 1));
}

#[test]
fn snapshots_survive_the_line() {
    let mut volume = Volume::new(1, 11);
    volume.progress = Some(Default::default());
    volume.generations = Some(Default::default());
    volume.caches = Some(Default::default());
    let resource = Resource { name: "r ö".into(), volumes: vec![volume], ..Resource::default() };
    let snapshot = Snapshot { resources: vec![resource], ..Snapshot::default() };
    let answer = Answer::Snapshot(Box::new(snapshot));
    let line = wire::encode(&answer).unwrap();
    assert_eq!(line.iter().filter(|b| **b == b'\n').count(), 1);
    assert_eq!(wire::decode::<Answer>(&line).unwrap(), answer);
}

#[test]
fn states_travel_by_name() {
    let text = serde_json::to_string(&Volume::new(0, 0)).unwrap();
    assert!(text.contains(r#""cstate":"StandAlone","disk":"Diskless","peer_disk":"DUnknown""#));
    let wrong = text.replace("Diskless", "diskless");
    let error = serde_json::from_str::<Volume>(&wrong).unwrap_err().to_string();
    assert!(error.contains("'diskless' is no Dstate"), "{error}");
}

#[test]
fn selecting_answers_like_the_original() {
    let resource = |name: &str, minor| Resource {
        name: name.into(),
        volumes: vec![Volume::new(0, minor), Volume::new(1, minor + 1)],
        ..Resource::default()
    };
    let all =
        Snapshot { resources: vec![resource("b", 4), resource("a", 2)], ..Snapshot::default() };
    let minors: Vec<u32> = all.by_minor().iter().map(|(_, v)| v.minor).collect();
    assert_eq!(minors, [2, 3, 4, 5]);
    let one = all.clone().select(&Target::Minor(5)).unwrap();
    assert_eq!((one.resources.len(), one.resources[0].volumes[0].volume), (1, 1));
    let named = all.clone().select(&Target::Resource("a".into())).unwrap();
    assert_eq!(named.resources[0].volumes.len(), 2);
    let reply = all.clone().select(&Target::Minor(9)).unwrap_err();
    assert!(reply.message("9").starts_with("9: Failure: (127) Device minor not allocated\n"));
    let reply = all.select(&Target::Resource("c".into())).unwrap_err();
    assert_eq!(reply.code, 158);
    assert!(Request::Status { target: Target::All }.is_read_only());
}
