//! One node, every branch.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use drbd_types::{Deciseconds, Tick};
use drbd_wire::command::CommandName;
use drbd_wire::frame::Phase;
use drbd_wire::packet::{FeatureOffer, Features};
use drbd_wire::{Algorithm, Command, Context, Packet, PeerError, Stream};

use super::*;
use crate::config::{NetConfig, Secret};

const S: u64 = 1_000_000;
/// Default times of the packets: 4 × 0.5 s, and of the check: 0.5 s.
const PACKET: u64 = 2 * S;
const CHECK: u64 = S / 2;

/// A link and what it did last.
struct Rig {
    link: Link,
    now: u64,
    out: Vec<LinkAction>,
}

/// Seeds whose first coins are these. Every waiting takes one coin as well.
fn seed(coins: &[bool]) -> u64 {
    (0..)
        .find(|seed| {
            let mut coin = Coin(*seed);
            coins.iter().all(|wanted| coin.heads() == *wanted)
        })
        .unwrap()
}

const HEADS: bool = true;
const TAILS: bool = false;

impl Rig {
    fn new(net: &NetConfig, coins: &[bool]) -> Self {
        let link = Link::new(LinkConfig::new(net).unwrap(), seed(coins));
        let mut rig = Self { link, now: 0, out: vec![] };
        rig.link.start(Tick(0), &mut rig.out);
        assert_eq!(rig.take(), [LinkAction::Listen, LinkAction::Connect { attempt: 1 }]);
        rig
    }

    fn plain(coins: &[bool]) -> Self {
        Self::new(&NetConfig::default(), coins)
    }

    fn take(&mut self) -> Vec<LinkAction> {
        core::mem::take(&mut self.out)
    }

    fn event(&mut self, event: LinkEvent) -> Vec<LinkAction> {
        self.link.handle(Tick(self.now), event, &mut self.out);
        self.take()
    }

    /// Goes to the next deadline, which must be this far away.
    fn timer(&mut self, after: u64) -> Vec<LinkAction> {
        assert_eq!(self.link.next_deadline(), Some(Tick(self.now + after)));
        self.link.on_timer(Tick(self.now + after - 1), &mut self.out);
        assert_eq!(self.take(), [], "too early");
        self.now += after;
        self.link.on_timer(Tick(self.now), &mut self.out);
        self.take()
    }

    fn refused(&mut self, attempt: u32) {
        assert_eq!(self.event(LinkEvent::ConnectFailed { attempt }), []);
    }

    /// The peer opens a connection and says what it is.
    fn accept(&mut self, socket: u32, packet: Packet) -> Vec<LinkAction> {
        let socket = SocketId(socket);
        let expected =
            LinkAction::Receive { socket, phase: Phase::Initial, context: Context::FRESH };
        assert_eq!(self.event(LinkEvent::Accepted { socket }), [expected]);
        self.event(LinkEvent::Packet { socket, packet })
    }

    fn closed(&mut self, socket: u32) -> Vec<LinkAction> {
        self.event(LinkEvent::Closed { socket: SocketId(socket), how: HangUp::ShutDown })
    }

    fn packet(&mut self, packet: Packet) -> Vec<LinkAction> {
        self.event(LinkEvent::Packet { socket: SocketId(1), packet })
    }

    fn bad(&mut self, error: PeerError) -> Vec<LinkAction> {
        self.event(LinkEvent::BadPacket { socket: SocketId(1), error })
    }

    /// Up to the features: socket 1 is data, opened by us; socket 2 is meta, accepted.
    fn to_features(net: &NetConfig) -> Self {
        let mut rig = Self::new(net, &[]);
        rig.event(connected(1, 1));
        assert_eq!(rig.accept(2, Packet::InitialMeta), []);
        let out = rig.timer(CHECK);
        assert_eq!(out[0], LinkAction::StopListening);
        assert_eq!(out[2], receive(Context::FRESH));
        rig
    }

    /// Up to the challenge: features are agreed, our challenge is 64 times 7.
    fn to_challenge() -> Self {
        let mut rig = Self::to_features(&secret_net());
        let out = rig.packet(offer(86, 101, 15));
        assert_eq!(out.last(), Some(&LinkAction::Random));
        let out = rig.event(LinkEvent::Random(Box::new([7; 64])));
        let packet = Packet::AuthChallenge(Box::new([7; 64]));
        assert_eq!(out, [send(1, agreed(), packet), receive(agreed())]);
        rig
    }

    fn to_response() -> Self {
        let mut rig = Self::to_challenge();
        let out = rig.packet(Packet::AuthChallenge(Box::new([9; 64])));
        let digest = Algorithm::Sha256.respond(b"geheim", &[9; 64]).unwrap();
        assert_eq!(
            out,
            [send(1, agreed(), Packet::AuthResponse(digest.into())), receive(agreed())]
        );
        rig
    }
}

fn secret_net() -> NetConfig {
    NetConfig {
        cram_hmac_alg: "sha256".into(),
        shared_secret: Secret("geheim".into()),
        ..NetConfig::default()
    }
}

fn agreed() -> Context {
    Context { version: 101, features: Features::OURS, integrity: None }
}

fn connected(attempt: u32, socket: u32) -> LinkEvent {
    LinkEvent::Connected { attempt, socket: SocketId(socket) }
}

fn send(socket: u32, context: Context, packet: Packet) -> LinkAction {
    LinkAction::Send { socket: SocketId(socket), context, packet }
}

fn receive(context: Context) -> LinkAction {
    LinkAction::Receive { socket: SocketId(1), phase: Phase::Handshake, context }
}

fn close(socket: u32) -> LinkAction {
    LinkAction::Close { socket: SocketId(socket) }
}

fn offer(min: u32, max: u32, features: u32) -> Packet {
    Packet::Features(FeatureOffer { min, max, features: Features::from_bits_retain(features) })
}

fn warn(text: &str) -> LinkAction {
    log(Severity::Warn, text)
}

fn logs(out: &[LinkAction]) -> Vec<String> {
    let lines = out.iter().filter_map(|action| match action {
        LinkAction::Log(line) => Some(line.text.clone()),
        _ => None,
    });
    lines.collect()
}

/// The end of an attempt: lines of the log, both sockets closed, verdict.
fn check_failed(rig: &Rig, out: &[LinkAction], verdict: Verdict, lines: &[&str]) {
    assert_eq!(logs(out), lines);
    assert_eq!(out[..2], [close(1), close(2)]);
    let last = out.last();
    assert!(
        matches!(last, Some(LinkAction::Failed { verdict: v, .. }) if *v == verdict),
        "{last:?}"
    );
    let pause = (verdict == Verdict::Retry).then_some(Tick(rig.now + S));
    assert_eq!(rig.link.next_deadline(), pause);
}

const STANDALONE: &str = "Discarding network configuration.";
const AUTH_FATAL: &str = "Authentication of peer failed";
const AUTH_RETRY: &str = "Authentication of peer failed, trying again.";

// --- Two sockets ---

#[test]
fn first_connection_is_data_second_is_meta() {
    let mut rig = Rig::plain(&[HEADS]);
    let out = rig.event(connected(1, 1));
    assert_eq!(out, [send(1, Context::FRESH, Packet::InitialData)]);
    // 10 s and one seventh.
    assert_eq!(rig.timer(11_428_571), [LinkAction::Connect { attempt: 2 }]);
    let out = rig.event(connected(2, 2));
    assert_eq!(out, [send(2, Context::FRESH, Packet::InitialMeta)]);
    let out = rig.timer(CHECK);
    let features = offer(86, 101, 15);
    assert_eq!(
        out,
        [LinkAction::StopListening, send(1, Context::FRESH, features), receive(Context::FRESH)]
    );
    let out = rig.packet(offer(86, 101, 15));
    assert_eq!(
        out.last(),
        Some(&LinkAction::Established {
            data: SocketId(1),
            meta: SocketId(2),
            version: 101,
            features: Features::OURS,
            we_resolve_conflicts: false,
        })
    );
    assert_eq!(rig.link.next_deadline(), None);
    assert_eq!(rig.link.stream_of(SocketId(1)), Some(Stream::Data));
    assert_eq!(rig.link.stream_of(SocketId(2)), Some(Stream::Meta));
    assert_eq!(rig.link.stream_of(SocketId(3)), None);
}

#[test]
fn whoever_accepts_the_meta_stream_resolves_conflicts() {
    let mut rig = Rig::to_features(&NetConfig::default());
    let out = rig.packet(offer(86, 101, 15));
    let Some(LinkAction::Established { we_resolve_conflicts: true, .. }) = out.last() else {
        panic!("{out:?}")
    };
}

#[test]
fn a_peer_that_is_the_only_one_to_connect() {
    let mut rig = Rig::plain(&[TAILS]);
    // Its data connection comes while our attempt is on its way to nowhere.
    assert_eq!(rig.accept(1, Packet::InitialData), []);
    assert_eq!(rig.timer(10 * S), [LinkAction::CancelConnect { attempt: 1 }]);
    // Its meta connection comes while we wait.
    assert_eq!(rig.accept(2, Packet::InitialMeta), []);
    rig.timer(CHECK);
    let out = rig.packet(offer(86, 101, 15));
    assert!(matches!(
        out.last(),
        Some(LinkAction::Established { data: SocketId(1), meta: SocketId(2), .. })
    ));
}

#[test]
fn an_accepted_stream_ends_the_waiting_with_an_attempt() {
    let mut rig = Rig::plain(&[HEADS]);
    rig.refused(1);
    assert_eq!(rig.accept(1, Packet::InitialData), [LinkAction::Connect { attempt: 2 }]);
    assert_eq!(
        rig.event(connected(2, 2)),
        [send(2, Context::FRESH, Packet::InitialMeta)],
        "the other one is meta"
    );
}

#[test]
fn an_attempt_is_cancelled_when_it_is_not_needed_and_its_late_answers_are_dropped() {
    let mut rig = Rig::plain(&[]);
    rig.accept(1, Packet::InitialData);
    assert_eq!(rig.accept(2, Packet::InitialMeta), [LinkAction::CancelConnect { attempt: 1 }]);
    assert_eq!(rig.event(connected(1, 3)), [close(3)]);
    assert_eq!(rig.event(LinkEvent::ConnectFailed { attempt: 1 }), []);
    rig.timer(CHECK);
    assert_eq!(rig.event(connected(1, 4)), [close(4)], "during the handshake");
    assert_eq!(rig.event(LinkEvent::Accepted { socket: SocketId(5) }), [close(5)]);
    assert_eq!(rig.event(LinkEvent::ConnectFailed { attempt: 1 }), []);
    rig.packet(offer(86, 101, 15));
    assert_eq!(rig.event(connected(1, 6)), [close(6)], "afterwards");
    assert_eq!(rig.event(LinkEvent::Accepted { socket: SocketId(7) }), [close(7)]);
    assert_eq!(rig.event(LinkEvent::ConnectFailed { attempt: 1 }), []);
    assert_eq!(rig.event(LinkEvent::ListenFailed { errno: 98 }), []);
}

#[test]
fn waiting_is_jittered_by_a_seventh() {
    for (coin, time) in [(HEADS, 11_428_571), (TAILS, 8_571_429)] {
        let mut rig = Rig::plain(&[coin]);
        rig.refused(1);
        assert_eq!(rig.timer(time), [LinkAction::Connect { attempt: 2 }]);
    }
}

#[test]
fn crossed_data_takes_the_newer_one() {
    // The first coin is that of the waiting.
    let crossed = warn("initial packet S crossed");
    let mut rig = Rig::plain(&[HEADS, HEADS, TAILS]);
    rig.event(connected(1, 1));
    assert_eq!(rig.accept(2, Packet::InitialData), [crossed.clone(), close(1)]);
    assert_eq!(rig.timer(8_571_429), [LinkAction::Connect { attempt: 2 }], "heads waits anew");

    let mut rig = Rig::plain(&[HEADS, TAILS]);
    rig.event(connected(1, 1));
    let connect = LinkAction::Connect { attempt: 2 };
    assert_eq!(rig.accept(2, Packet::InitialData), [crossed, close(1), connect], "tails connects");
}

#[test]
fn crossed_data_while_connecting() {
    let crossed = warn("initial packet S crossed");
    let mut rig = Rig::plain(&[HEADS]);
    rig.accept(1, Packet::InitialData);
    let cancel = LinkAction::CancelConnect { attempt: 1 };
    let out = rig.accept(2, Packet::InitialData);
    assert_eq!(out, [crossed.clone(), close(1), cancel], "a peer that connects twice; heads");

    let mut rig = Rig::plain(&[TAILS]);
    rig.accept(1, Packet::InitialData);
    assert_eq!(rig.accept(2, Packet::InitialData), [crossed, close(1)], "tails goes on");
    assert_eq!(rig.event(connected(1, 3)), [send(3, Context::FRESH, Packet::InitialMeta)]);
}

#[test]
fn crossed_meta_during_the_check_begins_it_again() {
    let crossed = warn("initial packet M crossed");
    for (coin, expected) in [(HEADS, None), (TAILS, Some(LinkAction::Connect { attempt: 2 }))] {
        let mut rig = Rig::plain(&[coin]);
        rig.accept(1, Packet::InitialData);
        rig.event(connected(1, 2));
        rig.now += CHECK / 2;
        assert_eq!(rig.accept(3, Packet::InitialMeta), [crossed.clone(), close(2)]);
        assert_eq!(rig.closed(3), [close(3)], "the peer did the same");
        let out = rig.timer(CHECK);
        assert_eq!(out, expected.into_iter().collect::<Vec<_>>());
    }
}

#[test]
fn crossed_meta_that_stays_makes_us_the_resolver() {
    let mut rig = Rig::plain(&[]);
    rig.accept(1, Packet::InitialData);
    rig.event(connected(1, 2));
    rig.accept(3, Packet::InitialMeta);
    rig.timer(CHECK);
    let out = rig.packet(offer(86, 101, 15));
    assert!(matches!(
        out.last(),
        Some(LinkAction::Established {
            data: SocketId(1),
            meta: SocketId(3),
            we_resolve_conflicts: true,
            ..
        })
    ));
}

#[test]
fn crossed_data_during_the_check_of_a_lost_meta() {
    let mut rig = Rig::plain(&[HEADS, TAILS]);
    rig.accept(1, Packet::InitialData);
    rig.event(connected(1, 2));
    rig.closed(2);
    // Data crosses; both are not there, so the check ends as the coin says: heads, waiting.
    assert_eq!(rig.accept(3, Packet::InitialData), [warn("initial packet S crossed"), close(1)]);
    assert_eq!(rig.timer(CHECK), []);
    assert_eq!(rig.timer(8_571_429), [LinkAction::Connect { attempt: 2 }]);
}

#[test]
fn sockets_that_die_during_the_check() {
    // Our own connection completed the pair: wait. An accepted one did: connect.
    let mut rig = Rig::plain(&[TAILS]);
    rig.accept(1, Packet::InitialData);
    rig.event(connected(1, 2));
    assert_eq!(rig.closed(1), [close(1)]);
    assert_eq!(rig.timer(CHECK), []);
    assert_eq!(rig.timer(8_571_429), [LinkAction::Connect { attempt: 2 }]);
    assert_eq!(
        rig.event(connected(2, 3)),
        [send(3, Context::FRESH, Packet::InitialData)],
        "data is missing now"
    );

    let mut rig = Rig::plain(&[]);
    rig.event(connected(1, 1));
    rig.accept(2, Packet::InitialMeta);
    assert_eq!(rig.closed(2), [close(2)]);
    assert_eq!(rig.timer(CHECK), [LinkAction::Connect { attempt: 2 }]);
}

#[test]
fn a_data_socket_that_dies_while_waiting_is_replaced() {
    let mut rig = Rig::plain(&[HEADS]);
    rig.event(connected(1, 1));
    assert_eq!(rig.closed(1), [close(1)]);
    assert_eq!(rig.timer(11_428_571), [LinkAction::Connect { attempt: 2 }]);
    assert_eq!(rig.event(connected(2, 2)), [send(2, Context::FRESH, Packet::InitialData)]);
}

#[test]
fn strangers_are_sent_away() {
    let error = warn("Error receiving initial packet");
    let magic = PeerError::Magic { magic: 0x4745_5420, version: 0 };
    let nonsense = [
        LinkEvent::BadPacket { socket: SocketId(5), error: magic },
        LinkEvent::Closed { socket: SocketId(5), how: HangUp::Reset },
        LinkEvent::Packet { socket: SocketId(5), packet: Packet::Ping },
    ];
    for event in nonsense {
        // While connecting there is nothing else to do.
        let mut rig = Rig::plain(&[]);
        rig.event(LinkEvent::Accepted { socket: SocketId(5) });
        assert_eq!(rig.event(event.clone()), [error.clone(), close(5)]);
        assert_eq!(rig.event(event.clone()), [], "only once");
        // While waiting, a coin says whether to connect.
        for (coin, expected) in [(HEADS, None), (TAILS, Some(LinkAction::Connect { attempt: 2 }))] {
            let mut rig = Rig::plain(&[HEADS, coin]);
            rig.refused(1);
            rig.event(LinkEvent::Accepted { socket: SocketId(5) });
            let out = rig.event(event.clone());
            assert_eq!(out[..2], [error.clone(), close(5)]);
            assert_eq!(out[2..], expected.into_iter().collect::<Vec<_>>());
        }
    }
}

#[test]
fn silent_strangers_have_a_time_and_a_number() {
    let mut rig = Rig::plain(&[]);
    rig.event(LinkEvent::Accepted { socket: SocketId(5) });
    rig.now += 1;
    for socket in 6..=9 {
        rig.event(LinkEvent::Accepted { socket: SocketId(socket) });
    }
    let out = rig.event(LinkEvent::Accepted { socket: SocketId(10) });
    assert_eq!(out[0], close(5), "the oldest one makes place");
    let out = rig.timer(PACKET);
    assert_eq!(logs(&out).len(), 5);
    assert_eq!(out.iter().filter(|a| matches!(a, LinkAction::Close { .. })).count(), 5);
    // They do not hold up the peer.
    let mut rig = Rig::plain(&[]);
    rig.event(LinkEvent::Accepted { socket: SocketId(5) });
    rig.accept(1, Packet::InitialData);
    rig.accept(2, Packet::InitialMeta);
    let out = rig.timer(CHECK);
    assert_eq!(out[..2], [LinkAction::StopListening, close(5)]);
}

#[test]
fn listening_that_fails_is_the_end() {
    let mut rig = Rig::plain(&[]);
    rig.accept(1, Packet::InitialData);
    let out = rig.event(LinkEvent::ListenFailed { errno: 98 });
    assert_eq!(logs(&out), ["bind before listen failed, err = -98", STANDALONE]);
    assert_eq!(out[..2], [LinkAction::CancelConnect { attempt: 1 }, close(1)]);
    let reason = LinkFailure::Listen(98);
    assert_eq!(out.last(), Some(&LinkAction::Failed { verdict: Verdict::StandAlone, reason }));
    assert_eq!(rig.link.next_deadline(), None);
}

#[test]
fn stop_closes_what_there_is() {
    let mut rig = Rig::plain(&[]);
    rig.accept(1, Packet::InitialData);
    rig.event(LinkEvent::Accepted { socket: SocketId(5) });
    rig.link.stop(&mut rig.out);
    let cancel = LinkAction::CancelConnect { attempt: 1 };
    assert_eq!(rig.take(), [LinkAction::StopListening, cancel, close(1), close(5)]);
    rig.link.stop(&mut rig.out);
    assert_eq!(rig.take(), []);
    assert_eq!(rig.event(connected(1, 6)), [close(6)]);

    let mut rig = Rig::to_features(&NetConfig::default());
    rig.link.stop(&mut rig.out);
    assert_eq!(rig.take(), [close(1), close(2)]);

    let mut rig = Rig::to_features(&NetConfig::default());
    rig.packet(offer(86, 101, 15));
    assert_eq!(rig.closed(2), [], "for the engine to say");
    rig.link.start(Tick(rig.now), &mut rig.out);
    let again = [close(1), close(2), LinkAction::Listen, LinkAction::Connect { attempt: 2 }];
    assert_eq!(rig.take(), again);
}

#[test]
fn a_peer_that_may_not_have_accepted_yet_has_more_time() {
    let mut rig = Rig::plain(&[HEADS]);
    rig.event(connected(1, 1));
    rig.timer(11_428_571);
    rig.event(connected(2, 2));
    rig.timer(CHECK);
    let out = rig.timer(10 * S + PACKET);
    let line = "the peer sent nothing in time during the handshake";
    check_failed(&rig, &out, Verdict::Retry, &[line]);
}

#[test]
fn own_socket_check_timeout() {
    let net = NetConfig { socket_check_timeout: Deciseconds(30), ..NetConfig::default() };
    let mut rig = Rig::new(&net, &[]);
    rig.event(connected(1, 1));
    rig.accept(2, Packet::InitialMeta);
    rig.timer(3 * S);
}

// --- Features ---

#[test]
fn versions_and_features_are_the_common_ones() {
    let cases = [
        // (mine, the peer's min, max, flags) -> (version, flags), line of the flags
        ((86, 101), (86, 101, 15), (101, 15), "0xf TRIM THIN_RESYNC WRITE_SAME WRITE_ZEROES."),
        ((86, 101), (86, 96, 5), (96, 5), "0x5 TRIM WRITE_SAME."),
        ((86, 95), (86, 101, 0), (95, 0), "0x0 none."),
        ((86, 101), (86, 0, 8), (86, 8), "0x8 WRITE_ZEROES."),
        ((90, 90), (86, 101, 0xf0), (90, 0), "0x0 none."),
        (
            (86, 101),
            (101, 122, 0xffff_ffff),
            (101, 15),
            "0xf TRIM THIN_RESYNC WRITE_SAME WRITE_ZEROES.",
        ),
    ];
    for ((min, max), (peer_min, peer_max, flags), (version, features), line) in cases {
        let mut rig = Rig::to_features(&NetConfig::default());
        let mut config = LinkConfig::new(&NetConfig::default()).unwrap();
        config.versions = min..=max;
        rig.link.set_config(config);
        let out = rig.packet(offer(peer_min, peer_max, flags));
        let first =
            alloc::format!("Handshake successful: Agreed network protocol version {version}");
        let second = alloc::format!("Feature flags enabled on protocol level: {line}");
        assert_eq!(logs(&out), [first, second]);
        let Some(LinkAction::Established { version: v, features: f, .. }) = out.last() else {
            panic!("{out:?}")
        };
        assert_eq!((*v, f.bits()), (version, features));
    }
}

#[test]
fn no_common_version() {
    for (min, max) in [(102, 120), (80, 85), (85, 0)] {
        let mut rig = Rig::to_features(&NetConfig::default());
        let out = rig.packet(offer(min, max, 15));
        let peer_max = if max == 0 { min } else { max };
        let line = alloc::format!(
            "incompatible DRBD dialects: I support 86-101, peer supports {min}-{peer_max}"
        );
        check_failed(&rig, &out, Verdict::StandAlone, &[&line, STANDALONE]);
    }
}

#[test]
fn other_packets_instead_of_features() {
    let line = "expected ConnectionFeatures packet, received: AuthChallenge (0x0010)";
    let mut rig = Rig::to_features(&NetConfig::default());
    let out = rig.packet(Packet::AuthChallenge(Box::new([1; 64])));
    check_failed(&rig, &out, Verdict::StandAlone, &[line, STANDALONE]);

    let mut rig = Rig::to_features(&NetConfig::default());
    let out = rig.bad(PeerError::UnexpectedData(CommandName::new(0x0b)));
    let line = "expected ConnectionFeatures packet, received: ReportProtocol (0x000b)";
    check_failed(&rig, &out, Verdict::StandAlone, &[line, STANDALONE]);

    let mut rig = Rig::to_features(&NetConfig::default());
    let command = Command::ConnectionFeatures.into();
    let out = rig.bad(PeerError::Length { command, length: 80, allowed: "72 bytes" });
    let line = "ConnectionFeatures: 80 bytes are not possible (allowed: 72 bytes)";
    check_failed(&rig, &out, Verdict::StandAlone, &[line, STANDALONE]);
}

#[test]
fn noise_silence_and_death_are_worth_another_attempt() {
    let mut rig = Rig::to_features(&NetConfig::default());
    let out = rig.bad(PeerError::Magic { magic: 1, version: 0 });
    let line = "Wrong magic value 0x00000001 in protocol version 0";
    check_failed(&rig, &out, Verdict::Retry, &[line]);

    let mut rig = Rig::to_features(&NetConfig::default());
    let out = rig.timer(PACKET);
    let line = "the peer sent nothing in time during the handshake";
    check_failed(&rig, &out, Verdict::Retry, &[line]);
    let again = [LinkAction::Listen, LinkAction::Connect { attempt: 2 }];
    assert_eq!(rig.timer(S), again, "by itself, after a second");

    for socket in [1, 2] {
        let mut rig = Rig::to_features(&NetConfig::default());
        let out = rig.closed(socket);
        check_failed(&rig, &out, Verdict::Retry, &["connection lost during the handshake"]);
    }
    let mut rig = Rig::to_features(&NetConfig::default());
    assert_eq!(rig.closed(9), [], "another socket");
    assert_eq!(rig.event(LinkEvent::Random(Box::new([1; 64]))), [], "not asked for");
}

#[test]
fn a_stop_during_the_pause_ends_it() {
    let mut rig = Rig::to_features(&NetConfig::default());
    rig.closed(1);
    rig.link.stop(&mut rig.out);
    assert_eq!(rig.link.next_deadline(), None);
}

#[test]
fn dry_run_needs_version_92() {
    for (max, is_refused) in [(91, true), (92, false)] {
        let net = NetConfig { tentative: true, ..secret_net() };
        let mut rig = Rig::to_features(&net);
        rig.packet(offer(86, max, 15));
        rig.event(LinkEvent::Random(Box::new([7; 64])));
        rig.packet(Packet::AuthChallenge(Box::new([9; 64])));
        let response = Algorithm::Sha256.respond(b"geheim", &[7; 64]).unwrap();
        let out = rig.packet(Packet::AuthResponse(response.into()));
        if is_refused {
            let proven = "Peer authenticated using 32 bytes HMAC";
            let line = "--dry-run is not supported by peer";
            assert_eq!(logs(&out), [proven, line, STANDALONE]);
        } else {
            assert!(matches!(out.last(), Some(LinkAction::Established { version: 92, .. })));
        }
    }
}

// --- Authentication ---

#[test]
fn a_peer_that_knows_the_secret() {
    let mut rig = Rig::to_response();
    let response = Algorithm::Sha256.respond(b"geheim", &[7; 64]).unwrap();
    let out = rig.packet(Packet::AuthResponse(response.into()));
    assert_eq!(logs(&out), ["Peer authenticated using 32 bytes HMAC"]);
    assert!(matches!(out.last(), Some(LinkAction::Established { .. })));
}

#[test]
fn the_whole_challenge_is_answered() {
    let mut rig = Rig::to_challenge();
    let out = rig.packet(Packet::AuthChallenge(Box::new([9; 128])));
    let digest = Algorithm::Sha256.respond(b"geheim", &[9; 128]).unwrap();
    assert_eq!(out[0], send(1, agreed(), Packet::AuthResponse(digest.into())));
}

#[test]
fn challenges_that_are_refused() {
    let mut reflected = vec![7; 64];
    reflected.extend([1, 2, 3]);
    let packets = [
        (vec![1; 63], "AuthChallenge payload too small."),
        (vec![], "AuthChallenge payload too small."),
        (vec![1; 129], "expected AuthChallenge payload too big."),
        (vec![7; 64], "Peer presented the same challenge!"),
        (reflected, "Peer presented the same challenge!"),
    ];
    for (bytes, line) in packets {
        let mut rig = Rig::to_challenge();
        let out = rig.packet(Packet::AuthChallenge(bytes.into()));
        check_failed(&rig, &out, Verdict::StandAlone, &[line, AUTH_FATAL, STANDALONE]);
    }
    let mut rig = Rig::to_challenge();
    let command = Command::AuthChallenge.into();
    let out = rig.bad(PeerError::Length { command, length: 1 << 20, allowed: "" });
    let line = "expected AuthChallenge payload too big.";
    check_failed(&rig, &out, Verdict::StandAlone, &[line, AUTH_FATAL, STANDALONE]);
}

#[test]
fn other_packets_instead_of_a_challenge() {
    let mut rig = Rig::to_challenge();
    let out = rig.bad(PeerError::UnexpectedData(Command::Protocol.into()));
    let line = "expected AuthChallenge packet, received: ReportProtocol (0x000b)";
    check_failed(&rig, &out, Verdict::StandAlone, &[line, AUTH_FATAL, STANDALONE]);

    let mut rig = Rig::to_challenge();
    let out = rig.packet(Packet::AuthResponse(Box::new([1; 32])));
    let line = "expected AuthChallenge packet, received: AuthResponse (0x0011)";
    check_failed(&rig, &out, Verdict::StandAlone, &[line, AUTH_FATAL, STANDALONE]);
}

#[test]
fn responses_that_are_refused() {
    let wrong = "the peer's response does not fit the shared secret";
    let mut rig = Rig::to_response();
    let out = rig.packet(Packet::AuthResponse(Box::new([1; 32])));
    check_failed(&rig, &out, Verdict::StandAlone, &[wrong, AUTH_FATAL, STANDALONE]);

    let size = "expected AuthResponse payload of wrong size";
    for len in [0, 31, 33] {
        let mut rig = Rig::to_response();
        let out = rig.packet(Packet::AuthResponse(vec![1; len].into()));
        check_failed(&rig, &out, Verdict::Retry, &[size, AUTH_RETRY]);
    }
    let mut rig = Rig::to_response();
    let command = Command::AuthResponse.into();
    let out = rig.bad(PeerError::Length { command, length: 1 << 20, allowed: "" });
    check_failed(&rig, &out, Verdict::Retry, &[size, AUTH_RETRY]);
}

#[test]
fn other_packets_instead_of_a_response() {
    let line = "expected AuthResponse packet, received: AuthChallenge (0x0010)";
    let mut rig = Rig::to_response();
    let out = rig.packet(Packet::AuthChallenge(Box::new([1; 64])));
    check_failed(&rig, &out, Verdict::Retry, &[line, AUTH_RETRY]);

    let line = "expected AuthResponse packet, received: Unknown (0x0025)";
    let mut rig = Rig::to_response();
    let out = rig.bad(PeerError::UnexpectedData(CommandName::new(0x25)));
    check_failed(&rig, &out, Verdict::Retry, &[line, AUTH_RETRY]);
}

#[test]
fn slow_peers_and_dead_ones_during_authentication() {
    let slow = "the peer sent nothing in time during the handshake";
    for mut rig in [Rig::to_challenge(), Rig::to_response()] {
        let out = rig.timer(PACKET);
        check_failed(&rig, &out, Verdict::Retry, &[slow, AUTH_RETRY]);
    }
    let mut rig = Rig::to_response();
    let out = rig.closed(1);
    let dead = "connection lost during the handshake";
    check_failed(&rig, &out, Verdict::Retry, &[dead, AUTH_RETRY]);
    let mut rig = Rig::to_features(&secret_net());
    rig.packet(offer(86, 101, 15));
    let out = rig.bad(PeerError::Padding);
    check_failed(&rig, &out, Verdict::Retry, &["Header padding is not zero", AUTH_RETRY]);
}

#[test]
fn nothing_is_taken_that_was_not_asked_for() {
    let mut rig = Rig::to_features(&secret_net());
    rig.packet(offer(86, 101, 15));
    // Random bytes are awaited; no packet has been asked for.
    assert_eq!(rig.packet(Packet::AuthChallenge(Box::new([1; 64]))), []);
    let out = rig.event(LinkEvent::Random(Box::new([7; 64])));
    assert_eq!(out.len(), 2);
    assert_eq!(rig.event(LinkEvent::Random(Box::new([8; 64]))), [], "only once");
    let socket = SocketId(2);
    assert_eq!(rig.event(LinkEvent::Packet { socket, packet: Packet::Ping }), []);
}

#[test]
fn algorithms_that_can_not_authenticate_are_refused() {
    for name in ["crc32c", "rot13"] {
        let net = NetConfig { cram_hmac_alg: name.into(), ..NetConfig::default() };
        assert_eq!(LinkConfig::new(&net), Err(UnknownAuth));
    }
    let config = LinkConfig::new(&secret_net()).unwrap();
    assert!(!alloc::format!("{config:?}").contains("geheim"));
}
