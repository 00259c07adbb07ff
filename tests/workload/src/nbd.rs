//! As much of an NBD client as the workload needs: simple replies, any number of requests in flight.

use std::fmt;
use std::io::{Error, ErrorKind, Read, Result, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

const IHAVEOPT: u64 = 0x4948_4156_454F_5054;
const NBDMAGIC: u64 = 0x4E42_444D_4147_4943;
const OPTION_REPLY: u64 = 0x3_E889_0455_65A9;
const REQUEST: u32 = 0x2560_9513;
const REPLY: u32 = 0x6744_6698;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const INFO_EXPORT: [u8; 2] = [0, 0];

/// Without an answer for so long the server counts as lost.
const PATIENCE: Duration = Duration::from_secs(120);

/// What is asked of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Reading.
    Read,
    /// Writing.
    Write {
        /// Answered only when it is stable.
        fua: bool,
    },
    /// Making stable what has been answered.
    Flush,
    /// Zeroes without data on the wire.
    Zeroes {
        /// Answered only when it is stable.
        fua: bool,
    },
}

impl Command {
    fn numbers(self) -> (u16, u16) {
        match self {
            Self::Read => (0, 0),
            Self::Write { fua } => (1, fua.into()),
            Self::Flush => (3, 0),
            Self::Zeroes { fua } => (6, fua.into()),
        }
    }
}

/// Where a server is, and which of its exports is meant.
#[derive(Clone, Debug)]
pub struct Server {
    /// Its socket.
    pub address: Address,
    /// Name of the export.
    pub export: String,
}

/// The socket of a server.
#[derive(Clone, Debug)]
pub enum Address {
    /// A unix socket.
    Unix(PathBuf),
    /// Host and port.
    Tcp(String),
}

impl Server {
    /// An export behind a unix socket.
    pub fn unix(path: impl Into<PathBuf>, export: &str) -> Self {
        Self { address: Address::Unix(path.into()), export: export.into() }
    }
}

/// What a connection is made of.
pub trait Stream: Read + Write + Send {}
impl Stream for UnixStream {}
impl Stream for TcpStream {}

/// A connection to an export.
pub struct Client {
    stream: Box<dyn Stream>,
    size: u64,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("size", &self.size).finish_non_exhaustive()
    }
}

/// Length of the head of a request.
pub const REQUEST_LEN: usize = 28;

/// The head of a request; the data of a write follows it.
///
/// # Errors
/// It is too long.
pub fn request(command: Command, cookie: u64, at: u64, len: usize) -> Result<[u8; REQUEST_LEN]> {
    let (number, flags) = command.numbers();
    let len = u32::try_from(len).map_err(|_| bad("too long"))?;
    let mut head = [0; REQUEST_LEN];
    let (magic, rest) = head.split_at_mut(4);
    magic.copy_from_slice(&REQUEST.to_be_bytes());
    let (words, rest) = rest.split_at_mut(4);
    words[..2].copy_from_slice(&flags.to_be_bytes());
    words[2..].copy_from_slice(&number.to_be_bytes());
    rest[..8].copy_from_slice(&cookie.to_be_bytes());
    rest[8..16].copy_from_slice(&at.to_be_bytes());
    rest[16..].copy_from_slice(&len.to_be_bytes());
    Ok(head)
}

/// Takes the head of an answer apart.
///
/// # Errors
/// It is none.
pub fn parse_reply(head: &[u8]) -> Result<Reply> {
    let Some((head, [])) = head.split_first_chunk::<16>() else { return Err(bad("a short reply")) };
    let [a, b, c, d, error @ .., _, _, _, _, _, _, _, _] = *head;
    if u32::from_be_bytes([a, b, c, d]) != REPLY {
        return Err(bad("not a reply"));
    }
    let [.., p, q, r, s, t, u, v, w] = *head;
    let cookie = u64::from_be_bytes([p, q, r, s, t, u, v, w]);
    Ok(Reply { error: u32::from_be_bytes(error), cookie })
}

/// The head of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// As in the request.
    pub cookie: u64,
    /// 0: done.
    pub error: u32,
}

fn bad(text: &str) -> Error {
    Error::new(ErrorKind::InvalidData, text.to_owned())
}

fn connect(address: &Address) -> Result<Box<dyn Stream>> {
    Ok(match address {
        Address::Unix(path) => {
            let stream = UnixStream::connect(path)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            Box::new(stream)
        }
        Address::Tcp(address) => {
            let stream = TcpStream::connect(address)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_nodelay(true)?;
            Box::new(stream)
        }
    })
}

impl Client {
    /// Opens an export.
    ///
    /// # Errors
    /// There is no such server, or it refuses; then its text is that of the error.
    pub fn open(server: &Server) -> Result<Self> {
        let mut client = Self { stream: connect(&server.address)?, size: 0 };
        if client.u64()? != NBDMAGIC || client.u64()? != IHAVEOPT {
            return Err(bad("not an NBD server"));
        }
        client.bytes::<2>()?;
        let name = server.export.as_bytes();
        let len = u32::try_from(name.len()).map_err(|_| bad("a long name"))?;
        let mut hello = 3_u32.to_be_bytes().to_vec();
        hello.extend(IHAVEOPT.to_be_bytes());
        hello.extend(OPT_GO.to_be_bytes());
        hello.extend((len + 6).to_be_bytes());
        hello.extend(len.to_be_bytes());
        hello.extend(name);
        hello.extend([0, 0]);
        client.stream.write_all(&hello)?;
        client.answers_to_go()?;
        Ok(client)
    }

    fn answers_to_go(&mut self) -> Result<()> {
        loop {
            if self.u64()? != OPTION_REPLY {
                return Err(bad("no reply to the option"));
            }
            let (_, kind, len) = (self.u32()?, self.u32()?, self.u32()?);
            let mut text = vec![0; usize::try_from(len.min(65_536)).unwrap_or(0)];
            self.stream.read_exact(&mut text)?;
            match (kind, text.split_first_chunk::<2>()) {
                (REP_ACK, _) => return Ok(()),
                (REP_INFO, Some((&INFO_EXPORT, rest))) => {
                    let size = rest.first_chunk().ok_or_else(|| bad("a short reply"))?;
                    self.size = u64::from_be_bytes(*size);
                }
                (kind, _) if kind >> 31 == 1 => {
                    let text = String::from_utf8_lossy(&text).into_owned();
                    return Err(Error::other(format!("refused ({:#x}): {text}", kind)));
                }
                _ => {}
            }
        }
    }

    /// The connection itself, for those who talk without waiting for single answers.
    pub fn into_stream(self) -> Box<dyn Stream> {
        self.stream
    }

    /// Size of the export in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Sends a request; its data, if it writes, right behind.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn ask(
        &mut self,
        command: Command,
        cookie: u64,
        at: u64,
        len: usize,
        data: &[u8],
    ) -> Result<()> {
        let mut request = request(command, cookie, at, len)?.to_vec();
        request.extend(data);
        self.stream.write_all(&request)
    }

    /// Takes the head of the next answer; the data of a read that is done follows.
    ///
    /// # Errors
    /// The connection is lost, or the server silent.
    pub fn reply(&mut self) -> Result<Reply> {
        parse_reply(&self.bytes::<16>()?)
    }

    /// Takes the data of a read.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn data(&mut self, into: &mut [u8]) -> Result<()> {
        self.stream.read_exact(into)
    }

    /// Reads, with nothing else in flight.
    ///
    /// # Errors
    /// The connection is lost, or the server can not read.
    pub fn read(&mut self, at: u64, into: &mut [u8]) -> Result<()> {
        self.ask(Command::Read, 0, at, into.len(), &[])?;
        match self.reply()?.error {
            0 => self.data(into),
            error => Err(Error::other(format!("reading at {at}: NBD error {error}"))),
        }
    }

    /// Writes, with nothing else in flight.
    ///
    /// # Errors
    /// The connection is lost, or the server can not write.
    pub fn write(&mut self, at: u64, data: &[u8]) -> Result<()> {
        self.ask(Command::Write { fua: false }, 0, at, data.len(), data)?;
        match self.reply()?.error {
            0 => Ok(()),
            error => Err(Error::other(format!("writing at {at}: NBD error {error}"))),
        }
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_be_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_be_bytes(self.bytes()?))
    }
}
