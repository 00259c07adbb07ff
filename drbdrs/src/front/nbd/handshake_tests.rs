//! Tests of the negotiation.

use super::super::proto::opt;
use super::*;
use proptest::prelude::*;

struct Some1;

impl Exports for Some1 {
    fn list(&self) -> Vec<(String, String)> {
        vec![("r0/0".into(), "first".into()), ("r1/0".into(), String::new())]
    }

    fn find(&self, name: &str) -> Result<Export, Refusal> {
        match name {
            "r0/0" | "" => Ok(tests_export("r0/0")),
            "r1/0" => Err(Refusal::NotNow("r1/0 is Secondary".into())),
            "gone" => Err(Refusal::ShuttingDown),
            _ => Err(Refusal::Unknown),
        }
    }
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = U64::new(proto::OPTION_MAGIC).as_bytes().to_vec();
    bytes.extend_from_slice(U32::new(number).as_bytes());
    bytes.extend_from_slice(U32::new(u32::try_from(data.len()).unwrap()).as_bytes());
    bytes.extend_from_slice(data);
    bytes
}

fn go(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = string(name);
    data.extend_from_slice(U16::new(u16::try_from(wanted.len()).unwrap()).as_bytes());
    wanted.iter().for_each(|w| data.extend_from_slice(U16::new(*w).as_bytes()));
    data
}

fn queries(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = string(name);
    data.extend_from_slice(U32::new(u32::try_from(queries.len()).unwrap()).as_bytes());
    queries.iter().for_each(|query| data.extend(string(query)));
    data
}

/// All replies: type and data.
fn replies(mut out: &[u8]) -> Vec<(u32, Vec<u8>)> {
    let mut all = Vec::new();
    while !out.is_empty() {
        let number = |at: usize| u32::from_be_bytes(out[at..at + 4].try_into().unwrap());
        assert_eq!(out[..8], proto::OPTION_REPLY_MAGIC.to_be_bytes());
        let len = number(16) as usize;
        all.push((number(12), out[20..20 + len].to_vec()));
        out = &out[20 + len..];
    }
    all
}

fn started(flags: u32) -> Handshake {
    let mut out = Vec::new();
    let mut handshake = Handshake::new(&mut out);
    assert_eq!(&out[..16], b"NBDMAGICIHAVEOPT");
    assert_eq!(out[16..], [0, 3]);
    out.clear();
    assert_eq!(handshake.feed(&flags.to_be_bytes(), &Some1, &mut out), Progress::More);
    assert!(out.is_empty());
    handshake
}

fn kinds(replies: &[(u32, Vec<u8>)]) -> Vec<u32> {
    replies.iter().map(|reply| reply.0).collect()
}

fn ask(handshake: &mut Handshake, number: u32, data: &[u8]) -> (Progress, Vec<(u32, Vec<u8>)>) {
    let mut out = Vec::new();
    let progress = handshake.feed(&option(number, data), &Some1, &mut out);
    (progress, replies(&out))
}

#[test]
fn exports_are_listed() {
    let (progress, got) = ask(&mut started(3), opt::LIST, &[]);
    assert_eq!(progress, Progress::More);
    assert_eq!(kinds(&got), [rep::SERVER, rep::SERVER, rep::ACK]);
    assert_eq!(got[0].1, b"\0\0\0\x04r0/0first");
    assert_eq!(kinds(&ask(&mut started(3), opt::LIST, b"x").1), [rep::ERR_INVALID]);
}

#[test]
fn go_chooses_and_tells_sizes() {
    let mut handshake = started(3);
    let (progress, got) = ask(&mut handshake, opt::GO, &go("", &[info::NAME, info::BLOCK_SIZE]));
    assert_eq!(kinds(&got), [rep::INFO, rep::INFO, rep::INFO, rep::ACK]);
    assert_eq!(got[0].1[..10], [0, 0, 0, 0, 0, 0, 0, 16, 0, 0], "1 MiB");
    assert_eq!(got[1].1, b"\0\x01r0/0");
    assert_eq!(got[2].1, [0, 3, 0, 0, 2, 0, 0, 0, 16, 0, 2, 0, 0, 0], "512, 4096, 32 MiB");
    let Progress::Chosen(chosen) = progress else { panic!("{progress:?}") };
    assert_eq!((chosen.export.name.as_str(), chosen.structured), ("r0/0", false));
    let (progress, got) = ask(&mut started(3), opt::INFO, &go("r0/0", &[]));
    assert_eq!((progress, kinds(&got)), (Progress::More, vec![rep::INFO, rep::INFO, rep::ACK]));
}

#[test]
fn refusals_say_why() {
    for (name, kind, text) in [
        ("r1/0", rep::ERR_POLICY, "r1/0 is Secondary"),
        ("other", rep::ERR_UNKNOWN, "there is no export \"other\" here"),
        ("gone", rep::ERR_SHUTDOWN, "shutting down"),
    ] {
        let (progress, got) = ask(&mut started(3), opt::GO, &go(name, &[]));
        assert_eq!((progress, got), (Progress::More, vec![(kind, text.as_bytes().to_vec())]));
    }
    let (_, got) = ask(&mut started(3), 5, &[]);
    assert_eq!(kinds(&got), [rep::ERR_UNSUP], "TLS");
    for malformed in
        [&b""[..], b"\0\0\0\x09r0/0\0\0", b"\0\0\0\x04r0/0\0\x01", b"\0\0\0\x04r0/0\0\0x"]
    {
        let (progress, got) = ask(&mut started(3), opt::GO, malformed);
        assert_eq!((progress, kinds(&got)), (Progress::More, vec![rep::ERR_INVALID]));
    }
}

#[test]
fn the_old_way_works_and_ends_without_words() {
    let mut out = Vec::new();
    let progress = started(1).feed(&option(opt::EXPORT_NAME, b"r0/0"), &Some1, &mut out);
    assert!(matches!(progress, Progress::Chosen(_)));
    assert_eq!(out.len(), 8 + 2 + 124);
    out.clear();
    started(3).feed(&option(opt::EXPORT_NAME, b"r0/0"), &Some1, &mut out);
    assert_eq!(out.len(), 10, "no zeroes");
    out.clear();
    let progress = started(3).feed(&option(opt::EXPORT_NAME, b"r1/0"), &Some1, &mut out);
    assert_eq!((progress, out.len()), (Progress::Close, 0));
    assert_eq!(ask(&mut started(0), opt::LIST, &[]).0, Progress::Close, "not fixed");
}

#[test]
fn contexts_need_structured_replies_and_belong_to_an_export() {
    let mut handshake = started(3);
    let all = queries("r0/0", &["base:allocation", "drbd:out-of-sync", "other:thing"]);
    let (_, got) = ask(&mut handshake, opt::SET_META_CONTEXT, &all);
    assert_eq!(kinds(&got), [rep::ERR_INVALID]);
    assert_eq!(kinds(&ask(&mut handshake, opt::STRUCTURED_REPLY, &[]).1), [rep::ACK]);
    let (_, got) = ask(&mut handshake, opt::LIST_META_CONTEXT, &queries("r0/0", &["drbd:"]));
    assert_eq!(got[0], (rep::META_CONTEXT, b"\0\0\0\0drbd:out-of-sync".to_vec()));
    assert_eq!(got.len(), 2);
    let (_, got) = ask(&mut handshake, opt::LIST_META_CONTEXT, &queries("r0/0", &[]));
    assert_eq!(got.len(), 3);
    let (_, got) = ask(&mut handshake, opt::SET_META_CONTEXT, &queries("r0/0", &["base:"]));
    assert_eq!(kinds(&got), [rep::ACK], "a namespace is no context");
    let (_, got) = ask(&mut handshake, opt::SET_META_CONTEXT, &all);
    assert_eq!(got[0].1, b"\0\0\0\x01base:allocation");
    let Progress::Chosen(chosen) = ask(&mut handshake, opt::GO, &go("", &[])).0 else { panic!() };
    assert!(chosen.structured && chosen.contexts == Contexts::all());
    let other = queries("none", &["base:allocation"]);
    let (_, got) = ask(&mut started(3), opt::SET_META_CONTEXT, &other);
    assert_eq!(kinds(&got), [rep::ERR_INVALID]);
}

#[test]
fn long_and_strange_options_cost_nothing() {
    let mut handshake = started(3);
    let (progress, got) = ask(&mut handshake, opt::GO, &vec![0; 40_000]);
    assert_eq!((progress, kinds(&got)), (Progress::More, vec![rep::ERR_TOO_BIG]));
    assert_eq!(kinds(&ask(&mut handshake, opt::LIST, &[]).1).len(), 3, "the stream is in step");
    let mut out = Vec::new();
    let mut huge = option(opt::GO, &[]);
    huge[12..].copy_from_slice(&[255; 4]);
    assert_eq!(handshake.feed(&huge, &Some1, &mut out), Progress::Close);
    assert_eq!(started(3).feed(&[1; 16], &Some1, &mut out), Progress::Close, "no magic");
    let mut out = Vec::new();
    let mut fresh = Handshake::new(&mut out);
    assert_eq!(fresh.feed(&[0, 0, 1, 3], &Some1, &mut out), Progress::Close, "unknown flags");
    let (progress, got) = ask(&mut started(3), opt::ABORT, &[]);
    assert_eq!((progress, kinds(&got)), (Progress::Close, vec![rep::ACK]));
}

proptest! {
    #[test]
    fn any_bytes_are_survived(data in prop::collection::vec(any::<u8>(), 0..300)) {
        fuzz(&data);
    }

    /// Real options with damaged bytes, cut anywhere.
    #[test]
    fn damaged_options_are_survived(
        piece in 1_u8..50,
        numbers in prop::collection::vec(1_u32..12, 1..8),
        damage in prop::collection::vec((0_usize..400, any::<u8>()), 0..4),
    ) {
        let mut data = vec![piece, 0, 0, 0, 3];
        for number in numbers {
            let body = if number > 8 { queries("r0/0", &["base:allocation"]) } else { go("r0/0", &[1, 2]) };
            data.extend(option(number, if number < 6 { &[] } else { &body }));
        }
        for (at, value) in damage {
            let at = at % data.len();
            data[at] = value;
        }
        fuzz(&data);
    }
}
