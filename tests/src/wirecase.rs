//! Recorded sessions: their four streams, cut into packets.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use drbd_wire::frame::Phase;
use drbd_wire::packet::{FeatureOffer, Features};
use drbd_wire::{Algorithm, Context, Packet, Reader, Stream, Want};

/// Who sent a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// Node a.
    A2b,
    /// Node b.
    B2a,
}

/// One packet of a recorded stream.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// First byte in the stream.
    pub offset: usize,
    /// What its header was read with.
    pub context: Context,
    /// Volume of the header.
    pub volume: u16,
    /// The packet.
    pub packet: Packet,
    /// Its data.
    pub data: Vec<u8>,
    /// All its bytes.
    pub bytes: Vec<u8>,
}

/// A session: name and the packets of its four streams.
#[derive(Debug)]
pub struct Session {
    /// Folder and number.
    pub name: String,
    /// Algorithm and secret, if it was authenticated.
    pub secret: Option<(String, String)>,
    /// Agreed version.
    pub version: u32,
    /// Agreed features.
    pub features: Features,
    /// The packets.
    pub streams: BTreeMap<(Stream, Direction), Vec<Recorded>>,
    /// The recorded order of all packets.
    pub order: Vec<At>,
    /// Configured options.
    options: BTreeMap<String, String>,
    /// Nodes that a script played.
    scripts: Vec<Direction>,
}

/// A packet and when it was seen.
#[derive(Clone, Copy, Debug)]
pub struct At {
    /// Since the start of the recording, microseconds.
    pub micros: u64,
    /// Its stream.
    pub stream: Stream,
    /// Its sender.
    pub direction: Direction,
    /// First byte in the stream.
    pub offset: usize,
}

impl Session {
    /// A packet by its place.
    pub fn packet(&self, at: &At) -> Option<&Recorded> {
        let stream = self.streams.get(&(at.stream, at.direction))?;
        let found = stream.binary_search_by_key(&at.offset, |recorded| recorded.offset).ok()?;
        stream.get(found)
    }

    /// Was this node played by a script?
    pub fn is_script(&self, node: Direction) -> bool {
        self.scripts.contains(&node)
    }

    /// A configured option.
    pub fn option(&self, name: &str) -> Option<&str> {
        self.options.get(name).map(String::as_str)
    }
}

/// All sessions below a folder.
///
/// # Errors
/// Something can not be read or decoded.
pub fn sessions(root: &Path) -> Result<Vec<Session>> {
    let mut folders = vec![root.to_owned()];
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            if path.is_dir() {
                folders.push(path);
            } else if let Some(number) =
                name.strip_suffix(".xz").unwrap_or(name).strip_suffix(".data.a2b")
            {
                found.push((folder.clone(), number.to_owned()));
            }
        }
    }
    found.sort();
    found.iter().map(|(folder, number)| session(root, folder, number)).collect()
}

fn session(root: &Path, folder: &Path, number: &str) -> Result<Session> {
    let name = format!("{}/{number}", folder.strip_prefix(root)?.display());
    read_session(folder, number, &name).with_context(|| name.clone())
}

fn read_session(folder: &Path, number: &str, name: &str) -> Result<Session> {
    let mut bytes = BTreeMap::new();
    for (stream, stream_name) in [(Stream::Data, "data"), (Stream::Meta, "meta")] {
        for (direction, direction_name) in [(Direction::A2b, "a2b"), (Direction::B2a, "b2a")] {
            let file = folder.join(format!("{number}.{stream_name}.{direction_name}"));
            bytes.insert((stream, direction), read_maybe_xz(&file)?);
        }
    }
    let offers: Vec<_> = [Direction::A2b, Direction::B2a]
        .map(|direction| features_of(&bytes[&(Stream::Data, direction)]))
        .into_iter()
        .collect::<Result<_>>()?;
    let version = offers.iter().map(|o| if o.max == 0 { o.min } else { o.max }).min();
    let version = version.context("no offers")?.min(101);
    let features = offers.iter().fold(Features::OURS, |all, offer| all & offer.features);
    let mut streams = BTreeMap::new();
    for (key, bytes) in &bytes {
        let packets = cut(key.0, bytes, version, features);
        streams.insert(*key, packets.with_context(|| format!("{key:?}"))?);
    }
    let secret = secret_of(folder)?;
    let order = order_of(&read_maybe_xz(&folder.join(format!("{number}.order")))?)?;
    let (options, scripts) = manifest_of(folder)?;
    Ok(Session {
        name: name.to_owned(),
        secret,
        version,
        features,
        streams,
        order,
        options,
        scripts,
    })
}

/// Lines of seconds, connection, direction and offset.
fn order_of(text: &[u8]) -> Result<Vec<At>> {
    let lines = std::str::from_utf8(text)?.lines();
    lines.filter(|line| !line.starts_with('#') && !line.trim().is_empty()).map(at_of).collect()
}

fn at_of(line: &str) -> Result<At> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [time, stream, direction, offset, ..] = words.as_slice() else { bail!("{line}") };
    let (seconds, fraction) = time.split_once('.').context("time")?;
    let micros = seconds.parse::<u64>()? * 1_000_000 + format!("{fraction:0<6}").parse::<u64>()?;
    let stream = if stream.ends_with("meta") { Stream::Meta } else { Stream::Data };
    let direction = match *direction {
        "a2b" | "a>b" => Direction::A2b,
        "b2a" | "b>a" => Direction::B2a,
        other => bail!("direction {other}"),
    };
    Ok(At { micros, stream, direction, offset: offset.trim_start_matches('@').parse()? })
}

fn manifest_of(folder: &Path) -> Result<(BTreeMap<String, String>, Vec<Direction>)> {
    let manifest = folder.join("manifest.json");
    if !manifest.exists() {
        return Ok(Default::default());
    }
    let value: serde_json::Value = serde_json::from_slice(&fs::read(manifest)?)?;
    let config = value["config"].as_object().into_iter().flatten();
    let options = config.filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned()))).collect();
    let nodes = [("a", Direction::A2b), ("b", Direction::B2a)].into_iter();
    let scripts = nodes.filter(|(name, _)| value[*name].as_str() == Some("test script"));
    Ok((options, scripts.map(|(_, node)| node).collect()))
}

fn read_maybe_xz(file: &Path) -> Result<Vec<u8>> {
    if file.exists() {
        return Ok(fs::read(file)?);
    }
    let packed = PathBuf::from(format!("{}.xz", file.display()));
    let mut bytes = Vec::new();
    let packed = fs::File::open(&packed).with_context(|| packed.display().to_string())?;
    lzma_rust2::XzReader::new(packed, false).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn secret_of(folder: &Path) -> Result<Option<(String, String)>> {
    let manifest = folder.join("manifest.json");
    if !manifest.exists() {
        return Ok(None);
    }
    let value: serde_json::Value = serde_json::from_slice(&fs::read(manifest)?)?;
    let text = |at: usize| value["secret"][at].as_str().map(str::to_owned);
    Ok(text(0).zip(text(1)))
}

fn features_of(bytes: &[u8]) -> Result<FeatureOffer> {
    let start = if bytes.starts_with(&[0x83, 0x74, 0x02, 0x67, 0xff, 0xf2]) { 8 } else { 0 };
    let mut reader = Reader::new(Stream::Data, Phase::Handshake);
    ensure!(reader.feed(&bytes[start..start + 8])?.is_none(), "no features packet");
    match reader.feed(&bytes[start + 8..start + 80])?.map(|incoming| incoming.packet) {
        Some(Packet::Features(offer)) => Ok(offer),
        other => bail!("expected features, found {other:?}"),
    }
}

/// Cuts a stream, from its first byte to its last.
fn cut(stream: Stream, bytes: &[u8], version: u32, features: Features) -> Result<Vec<Recorded>> {
    let is_opener = bytes.starts_with(&[0x83, 0x74, 0x02, 0x67, 0xff]) && bytes[5] != 0xfe;
    let first = match (is_opener, stream) {
        (true, _) => Phase::Initial,
        (false, Stream::Data) => Phase::Handshake,
        (false, Stream::Meta) => Phase::Running,
    };
    let mut reader = Reader::new(stream, first);
    let agreed = Context { version, features, integrity: None };
    if first == Phase::Running {
        reader.context = agreed;
    }
    let mut out: Vec<Recorded> = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        // Authentication packets come in the handshake phase, with the agreed header.
        if reader.context.version > 0 {
            let command = if version >= 100 { bytes[at + 7] } else { bytes[at + 5] };
            let is_auth = stream == Stream::Data && [0x10, 0x11].contains(&command);
            reader.phase = if is_auth { Phase::Handshake } else { Phase::Running };
        }
        let packet = one(&mut reader, bytes, at).with_context(|| format!("offset {at}"))?;
        at += packet.bytes.len();
        match &packet.packet {
            Packet::InitialData => reader.phase = Phase::Handshake,
            Packet::InitialMeta | Packet::Features(_) => reader.context = agreed,
            Packet::Protocol(params) | Packet::ProtocolUpdate(params) => {
                reader.context.integrity = Algorithm::from_name(&params.integrity_alg);
            }
            _ => {}
        }
        out.push(packet);
    }
    ensure!(reader.is_between_packets());
    Ok(out)
}

fn one(reader: &mut Reader, bytes: &[u8], start: usize) -> Result<Recorded> {
    let context = reader.context;
    let mut at = start;
    let mut take = |len: usize| -> Result<&[u8]> {
        let piece = bytes.get(at..at + len).context("the stream ends in a packet")?;
        at += len;
        Ok(piece)
    };
    loop {
        let Want::Inline(len) = reader.want() else { bail!("data before a packet") };
        let Some(incoming) = reader.feed(take(len)?)? else { continue };
        let mut data = Vec::new();
        if let Want::Data(len) = reader.want()
            && incoming.data_len > 0
        {
            data = take(len)?.to_vec();
            reader.data_done();
        }
        let bytes = bytes[start..at].to_vec();
        let (volume, packet) = (incoming.volume, incoming.packet);
        return Ok(Recorded { offset: start, context, volume, packet, data, bytes });
    }
}
