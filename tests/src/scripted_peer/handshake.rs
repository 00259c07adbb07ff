//! Features, authentication and the exchange of parameters. Spec: wire-protocol.md §3.

use std::io::Read;

use anyhow::{Context as _, Result, ensure};
use drbd_types::{ByteLen, Cstate, Dstate, Fields, Gi, Role, SectorCount, StateWord};
use drbd_wire::frame::Phase;
use drbd_wire::packet::{
    ControllerParams, FeatureOffer, Features, ProtocolParams, QueueLimits, Sizes, SyncParams, Uuids,
};
use drbd_wire::{Algorithm, Context, Packet};

use super::ScriptedPeer;

/// What 8.4.11 offers.
pub const OFFER: FeatureOffer = FeatureOffer { min: 86, max: 101, features: Features::OURS };

/// An offer that ends in this version.
pub const fn offer(max: u32) -> FeatureOffer {
    FeatureOffer { max, ..OFFER }
}

/// What is sent for a connection with one volume.
#[derive(Clone, Debug)]
pub struct Parameters {
    /// P_PROTOCOL.
    pub protocol: ProtocolParams,
    /// P_SYNC_PARAM.
    pub sync: SyncParams,
    /// P_SIZES.
    pub sizes: Sizes,
    /// P_UUIDS; none without a disk.
    pub uuids: Option<Uuids>,
    /// P_STATE.
    pub state: StateWord,
}

impl Parameters {
    /// Those of a new disk of so many sectors, protocol C, without further options.
    pub const fn fresh(version: u32, sectors: u64) -> Self {
        let max = Context { version, ..Context::FRESH }.data_max();
        Self {
            protocol: ProtocolParams {
                protocol: 3,
                after_sb: [0; 3],
                discard_my_data: false,
                dry_run: false,
                two_primaries: 0,
                integrity_alg: String::new(),
            },
            sync: SyncParams {
                resync_rate: 250,
                verify_alg: String::new(),
                csums_alg: String::new(),
                controller: Some(ControllerParams {
                    plan_ahead: 20,
                    delay_target: 10,
                    fill_target: 100,
                    max_rate: 102_400,
                }),
            },
            sizes: Sizes {
                d_size: SectorCount(sectors),
                u_size: SectorCount(0),
                c_size: SectorCount(sectors),
                max_bio_size: ByteLen(max as u64),
                queue_order_type: 0,
                dds_flags: 0,
                limits: Some(QueueLimits {
                    physical_block: 512,
                    logical_block: 512,
                    alignment_offset: 0,
                    io_min: 512,
                    io_opt: 0,
                    can_discard: true,
                    discard_zeroes: false,
                    can_write_same: false,
                }),
            },
            uuids: Some(Uuids {
                current: Gi::JUST_CREATED,
                bitmap: Gi(0),
                history: [Gi(0); 2],
                dirty_bits: SectorCount(sectors).bits_ceil().0,
                flags: 0,
            }),
            state: first_state(Role::Secondary, Dstate::Inconsistent),
        }
    }
}

/// A first P_STATE. Spec §3.3.
pub const fn first_state(role: Role, disk: Dstate) -> StateWord {
    Fields { role, disk, conn: Cstate::WFConnection, ..Fields::NEW }.pack()
}

/// What the node under test sent.
#[derive(Clone, Debug)]
pub struct Theirs {
    /// P_PROTOCOL.
    pub protocol: ProtocolParams,
    /// P_SYNC_PARAM.
    pub sync: SyncParams,
    /// P_SIZES.
    pub sizes: Sizes,
    /// P_UUIDS, unless it has no disk.
    pub uuids: Option<Uuids>,
    /// P_STATE.
    pub state: Fields,
}

impl ScriptedPeer {
    /// Exchanges P_CONNECTION_FEATURES; from then on packets look as agreed.
    ///
    /// # Errors
    /// Something else came.
    pub fn features(&mut self, ours: FeatureOffer) -> Result<FeatureOffer> {
        self.send(&Packet::Features(ours))?;
        let theirs = self.expect("features", |packet| match packet {
            Packet::Features(offer) => Some(*offer),
            _ => None,
        })?;
        let agreed = Context {
            version: ours.max.min(theirs.max),
            features: ours.features & theirs.features,
            integrity: None,
        };
        for half in [&mut self.data, &mut self.meta] {
            half.context = agreed;
            half.reader.context = agreed;
            half.reader.phase = Phase::Running;
        }
        Ok(theirs)
    }

    /// Proves that both know the secret. Spec §3.2.
    ///
    /// # Errors
    /// The other side does not, or something else came.
    pub fn authenticate(&mut self, algorithm: Algorithm, secret: &[u8]) -> Result<()> {
        let mut mine = vec![0; 64];
        std::fs::File::open("/dev/urandom")?.read_exact(&mut mine)?;
        self.data.reader.phase = Phase::Handshake;
        self.send(&Packet::AuthChallenge(mine.as_slice().into()))?;
        let challenge = self.expect("a challenge", |packet| match packet {
            Packet::AuthChallenge(bytes) => Some(bytes.clone()),
            _ => None,
        })?;
        let answer = algorithm.respond(secret, &challenge).context("no such authentication")?;
        self.send(&Packet::AuthResponse(answer.into()))?;
        let response = self.expect("a response", |packet| match packet {
            Packet::AuthResponse(bytes) => Some(bytes.clone()),
            _ => None,
        })?;
        self.data.reader.phase = Phase::Running;
        ensure!(algorithm.is_response(secret, &mine, &response), "the response is wrong");
        Ok(())
    }

    /// Sends our parameters, without waiting for theirs.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn send_parameters(&mut self, ours: &Parameters) -> Result<()> {
        self.send(&Packet::Protocol(ours.protocol.clone()))?;
        self.data.context.integrity = Algorithm::from_name(&ours.protocol.integrity_alg);
        self.send(&Packet::SyncParam(ours.sync.clone()))?;
        self.send(&Packet::Sizes(ours.sizes))?;
        if let Some(uuids) = ours.uuids {
            self.send(&Packet::Uuids(uuids))?;
        }
        self.send(&Packet::State(ours.state))
    }

    /// Receives their parameters.
    ///
    /// # Errors
    /// Something else came.
    pub fn receive_parameters(&mut self) -> Result<Theirs> {
        let protocol = self.expect("P_PROTOCOL", |packet| match packet {
            Packet::Protocol(params) => Some(params.clone()),
            _ => None,
        })?;
        let sync = self.expect("P_SYNC_PARAM", |packet| match packet {
            Packet::SyncParam(params) => Some(params.clone()),
            _ => None,
        })?;
        let sizes = self.expect("P_SIZES", |packet| match packet {
            Packet::Sizes(sizes) => Some(*sizes),
            _ => None,
        })?;
        let mut uuids = None;
        let word = loop {
            let next = self.expect("P_UUIDS or P_STATE", |packet| match packet {
                Packet::Uuids(_) | Packet::State(_) => Some(packet.clone()),
                _ => None,
            })?;
            match next {
                Packet::State(word) => break word,
                Packet::Uuids(found) => uuids = Some(found),
                _ => {}
            }
        };
        Ok(Theirs { protocol, sync, sizes, uuids, state: word.unpack()? })
    }

    /// Both.
    ///
    /// # Errors
    /// Something else came.
    pub fn exchange(&mut self, ours: &Parameters) -> Result<Theirs> {
        self.send_parameters(ours)?;
        self.receive_parameters()
    }
}
