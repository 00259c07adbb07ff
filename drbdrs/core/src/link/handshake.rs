//! Features and authentication, on the data stream. Spec: wire-protocol.md §3.1, §3.2.
//!
//! ```text
//!   Features --> (no secret) ---------------------------------> agreed
//!       \--> Random --> Challenge --> Response --(it fits)--> agreed
//! ```
//!
//! Both nodes do the same. Each packet has the same time, but the features have more if the peer
//! has shown no sign of itself yet; what is not waited for is not read.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;

use drbd_types::Tick;
use drbd_wire::command::CommandName;
use drbd_wire::frame::Phase;
use drbd_wire::packet::{FeatureOffer, Features};
use drbd_wire::{Command, Context, Packet, PeerError};

use super::establish::Env;
use super::{
    Auth, CHALLENGE_LEN, LinkAction, LinkConfig, LinkEvent, LinkFailure, Pair, close_late, log,
};
use crate::log_line::Severity;

/// Longest challenge of a peer, bytes.
const CHALLENGE_MAX: usize = 128;
/// First version with a dry run.
const DRY_RUN_SINCE: u32 = 92;

/// What an event led to.
#[derive(Debug)]
pub(super) enum Progress {
    Continue,
    Failed(LinkFailure),
    Agreed { pair: Pair, version: u32, features: Features },
}

#[derive(Clone, Debug)]
pub(super) struct Handshake {
    pub(super) pair: Pair,
    pub(super) deadline: Tick,
    step: Step,
}

#[derive(Clone, Debug)]
enum Step {
    Features,
    Random(Agreed),
    Challenge(Agreed, Box<[u8; CHALLENGE_LEN]>),
    Response(Agreed, Box<[u8; CHALLENGE_LEN]>),
}

/// What the features packets say.
#[derive(Clone, Debug)]
struct Agreed {
    version: u32,
    features: Features,
    /// The settings of the moment at which authentication began.
    auth: Option<Auth>,
}

impl Agreed {
    const fn context(&self) -> Context {
        Context { version: self.version, features: self.features, integrity: None }
    }
}

impl Handshake {
    pub(super) fn begin(env: &mut Env<'_>, pair: Pair) -> Self {
        let offer = FeatureOffer {
            min: *env.config.versions.start(),
            max: *env.config.versions.end(),
            features: env.config.features,
        };
        let packet = Packet::Features(offer);
        env.out.push(LinkAction::Send { socket: pair.data, context: Context::FRESH, packet });
        let mut handshake = Self { pair, deadline: env.now, step: Step::Features };
        handshake.receive(env, Context::FRESH);
        if pair.is_unanswered {
            // The original accepts nothing while it tries to connect, which takes it that long
            // where our port can not be reached; each attempt given up meanwhile costs it as
            // long once more, so without patience it may never catch up.
            handshake.deadline = handshake.deadline.after(env.config.connect_int);
        }
        handshake
    }

    pub(super) const fn is_authenticating(&self) -> bool {
        !matches!(self.step, Step::Features)
    }

    pub(super) const fn timed_out(&self) -> LinkFailure {
        LinkFailure::TimedOut
    }

    pub(super) fn on_event(&mut self, env: &mut Env<'_>, event: LinkEvent) -> Progress {
        let is_ours = |socket| socket == self.pair.data;
        let result = match event {
            LinkEvent::Packet { socket, packet } if is_ours(socket) => self.on_packet(env, packet),
            LinkEvent::BadPacket { socket, error } if is_ours(socket) => Err(self.judge(error)),
            LinkEvent::Closed { socket, .. } if is_ours(socket) || socket == self.pair.meta => {
                Err(LinkFailure::Closed)
            }
            LinkEvent::Random(mine) => {
                self.on_random(env, mine);
                Ok(None)
            }
            event @ (LinkEvent::Packet { .. }
            | LinkEvent::BadPacket { .. }
            | LinkEvent::Closed { .. }
            | LinkEvent::ListenFailed { .. }
            | LinkEvent::Connected { .. }
            | LinkEvent::ConnectFailed { .. }
            | LinkEvent::Accepted { .. }) => {
                close_late(&event, env.out);
                Ok(None)
            }
        };
        match result {
            Ok(None) => Progress::Continue,
            Ok(Some(agreed)) => Progress::Agreed {
                pair: self.pair,
                version: agreed.version,
                features: agreed.features,
            },
            Err(failure) => Progress::Failed(failure),
        }
    }

    /// Asks for the next packet, which has its full time.
    fn receive(&mut self, env: &mut Env<'_>, context: Context) {
        self.deadline = env.now.after(env.config.packet_time());
        let socket = self.pair.data;
        env.out.push(LinkAction::Receive { socket, phase: Phase::Handshake, context });
    }

    fn on_packet(
        &mut self,
        env: &mut Env<'_>,
        packet: Packet,
    ) -> Result<Option<Agreed>, LinkFailure> {
        match core::mem::replace(&mut self.step, Step::Features) {
            Step::Features => {
                let Packet::Features(offer) = packet else {
                    return Err(LinkFailure::FeaturesExpected(name(&packet)));
                };
                self.on_features(env, offer)
            }
            Step::Challenge(agreed, mine) => {
                // Kept for the judgement of a failure.
                self.step = Step::Challenge(agreed.clone(), mine.clone());
                let Packet::AuthChallenge(theirs) = packet else {
                    return Err(LinkFailure::ChallengeExpected(name(&packet)));
                };
                self.on_challenge(env, agreed, mine, &theirs)
            }
            Step::Response(agreed, mine) => {
                self.step = Step::Response(agreed.clone(), mine.clone());
                let Packet::AuthResponse(response) = packet else {
                    return Err(LinkFailure::ResponseExpected(name(&packet)));
                };
                check_response(env, &agreed, &mine[..], &response)?;
                finish(env.config, agreed).map(Some)
            }
            // Nothing was asked for.
            step @ Step::Random(_) => {
                self.step = step;
                Ok(None)
            }
        }
    }

    fn on_features(
        &mut self,
        env: &mut Env<'_>,
        offer: FeatureOffer,
    ) -> Result<Option<Agreed>, LinkFailure> {
        let agreed = negotiate(env.config, offer)?;
        let line =
            format!("Handshake successful: Agreed network protocol version {}", agreed.version);
        env.out.push(log(Severity::Info, line));
        env.out.push(log(Severity::Info, features_line(agreed.features)));
        if agreed.auth.is_none() {
            return finish(env.config, agreed).map(Some);
        }
        self.deadline = env.now.after(env.config.packet_time());
        self.step = Step::Random(agreed);
        env.out.push(LinkAction::Random);
        Ok(None)
    }

    fn on_random(&mut self, env: &mut Env<'_>, mine: Box<[u8; CHALLENGE_LEN]>) {
        let Step::Random(agreed) = &self.step else { return };
        let agreed = agreed.clone();
        let context = agreed.context();
        let packet = Packet::AuthChallenge(Box::from(&mine[..]));
        env.out.push(LinkAction::Send { socket: self.pair.data, context, packet });
        self.step = Step::Challenge(agreed, mine);
        self.receive(env, context);
    }

    fn on_challenge(
        &mut self,
        env: &mut Env<'_>,
        agreed: Agreed,
        mine: Box<[u8; CHALLENGE_LEN]>,
        theirs: &[u8],
    ) -> Result<Option<Agreed>, LinkFailure> {
        if theirs.len() > CHALLENGE_MAX {
            return Err(LinkFailure::ChallengeTooBig);
        }
        let first = theirs.first_chunk().ok_or(LinkFailure::ChallengeTooSmall)?;
        if *first == *mine {
            return Err(LinkFailure::Reflection);
        }
        let response = agreed
            .auth
            .as_ref()
            .and_then(|auth| auth.algorithm.respond(auth.secret.0.as_bytes(), theirs));
        // Without an answer the peer will refuse us; settings are checked long before.
        let packet = Packet::AuthResponse(response.map_or_else(Box::default, Box::from));
        let context = agreed.context();
        env.out.push(LinkAction::Send { socket: self.pair.data, context, packet });
        self.step = Step::Response(agreed, mine);
        self.receive(env, context);
        Ok(None)
    }

    /// What a packet that could not be decoded means in this step.
    fn judge(&self, error: PeerError) -> LinkFailure {
        let (command, is_size) = match error {
            PeerError::UnexpectedData(command) | PeerError::UnexpectedMeta(command) => {
                (command, false)
            }
            PeerError::Length { command, .. }
            | PeerError::TooShort { command, .. }
            | PeerError::NoPayloadExpected { command, .. }
            | PeerError::MetaSize { command, .. }
            | PeerError::Field { command, .. }
            | PeerError::Unterminated { command, .. } => (command, true),
            PeerError::Magic { .. }
            | PeerError::Padding
            | PeerError::SyncParamTooLong { .. }
            | PeerError::BitmapTooSmall(_)
            | PeerError::BitmapTooLarge(_)
            | PeerError::BitmapEncoding(_)
            | PeerError::BitmapOverflow { .. }
            | PeerError::BitmapCode { .. }
            | PeerError::BitmapPlain { .. } => return LinkFailure::Garbage(error),
        };
        let is = |expected: Command| is_size && command == CommandName::from(expected);
        match &self.step {
            Step::Features if is(Command::ConnectionFeatures) => LinkFailure::FeaturesSize(error),
            Step::Features => LinkFailure::FeaturesExpected(command),
            // The reader lets small ones pass.
            Step::Challenge(..) if is(Command::AuthChallenge) => LinkFailure::ChallengeTooBig,
            Step::Random(_) | Step::Challenge(..) => LinkFailure::ChallengeExpected(command),
            Step::Response(..) if is(Command::AuthResponse) => LinkFailure::ResponseSize,
            Step::Response(..) => LinkFailure::ResponseExpected(command),
        }
    }
}

fn name(packet: &Packet) -> CommandName {
    packet.command(0).into()
}

/// Spec §3.1.
fn negotiate(config: &LinkConfig, offer: FeatureOffer) -> Result<Agreed, LinkFailure> {
    let (min, max) = (*config.versions.start(), *config.versions.end());
    let (peer_min, peer_max) = (offer.min, if offer.max == 0 { offer.min } else { offer.max });
    if max < peer_min || min > peer_max {
        return Err(LinkFailure::Dialects { min, max, peer_min, peer_max });
    }
    Ok(Agreed {
        version: max.min(peer_max),
        features: config.features & offer.features,
        auth: config.auth.clone(),
    })
}

fn check_response(
    env: &mut Env<'_>,
    agreed: &Agreed,
    mine: &[u8],
    response: &[u8],
) -> Result<(), LinkFailure> {
    // Only reached with authentication; without it nothing could fit.
    let Some(auth) = &agreed.auth else { return Err(LinkFailure::WrongResponse) };
    if response.len() != auth.algorithm.len() {
        return Err(LinkFailure::ResponseSize);
    }
    if !auth.algorithm.is_response(auth.secret.0.as_bytes(), mine, response) {
        return Err(LinkFailure::WrongResponse);
    }
    let line = format!("Peer authenticated using {} bytes HMAC", response.len());
    env.out.push(log(Severity::Info, line));
    Ok(())
}

fn finish(config: &LinkConfig, agreed: Agreed) -> Result<Agreed, LinkFailure> {
    if config.is_dry_run && agreed.version < DRY_RUN_SINCE {
        return Err(LinkFailure::NoDryRun);
    }
    Ok(agreed)
}

fn features_line(features: Features) -> String {
    let names = [
        (Features::TRIM, " TRIM"),
        (Features::THIN_RESYNC, " THIN_RESYNC"),
        (Features::WSAME, " WRITE_SAME"),
        (Features::WZEROES, " WRITE_ZEROES"),
    ];
    let mut line = format!("Feature flags enabled on protocol level: {:#x}", features.bits());
    if features.is_empty() {
        line.push_str(" none");
    }
    for (_, name) in names.iter().filter(|(flag, _)| features.contains(*flag)) {
        line.push_str(name);
    }
    line.push('.');
    line
}
