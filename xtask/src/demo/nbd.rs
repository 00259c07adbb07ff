//! As much of an NBD client as the demo needs, so that it needs no other program.

use std::io::{Error, ErrorKind, Read, Result, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

const IHAVEOPT: u64 = 0x4948_4156_454F_5054;
const NBDMAGIC: u64 = 0x4E42_444D_4147_4943;
const OPTION_REPLY: u64 = 0x3_E889_0455_65A9;
const REQUEST: u32 = 0x2560_9513;
const REPLY: u32 = 0x6744_6698;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const READ: u16 = 0;
const WRITE: u16 = 1;

/// A connection to an export.
pub(super) struct Client(UnixStream);

fn bad(text: &str) -> Error {
    Error::new(ErrorKind::InvalidData, text.to_owned())
}

impl Client {
    /// Opens an export.
    pub(super) fn open(socket: &Path, export: &str) -> Result<Self> {
        let mut client = Self(UnixStream::connect(socket)?);
        if client.u64()? != NBDMAGIC || client.u64()? != IHAVEOPT {
            return Err(bad("not an NBD server"));
        }
        client.bytes::<2>()?;
        let mut hello = vec![0, 0, 0, 3];
        hello.extend(IHAVEOPT.to_be_bytes());
        hello.extend(OPT_GO.to_be_bytes());
        let name = u32::try_from(export.len()).map_err(|_| bad("a long name"))?;
        hello.extend((name + 6).to_be_bytes());
        hello.extend(name.to_be_bytes());
        hello.extend(export.as_bytes());
        hello.extend([0, 0]);
        client.0.write_all(&hello)?;
        loop {
            if client.u64()? != OPTION_REPLY {
                return Err(bad("no reply to the option"));
            }
            let (_, kind, len) = (client.u32()?, client.u32()?, client.u32()?);
            let mut text = vec![0; usize::try_from(len.min(65_536)).unwrap_or(0)];
            client.0.read_exact(&mut text)?;
            match kind {
                REP_ACK => return Ok(client),
                kind if kind >> 31 == 1 => return Err(bad(&String::from_utf8_lossy(&text))),
                _ => {}
            }
        }
    }

    /// Writes; returns when the write is acknowledged.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        self.ask(WRITE, offset, data.len(), data)
    }

    /// Reads.
    pub(super) fn read(&mut self, offset: u64, data: &mut [u8]) -> Result<()> {
        self.ask(READ, offset, data.len(), &[])?;
        self.0.read_exact(data)
    }

    fn ask(&mut self, kind: u16, offset: u64, len: usize, data: &[u8]) -> Result<()> {
        let mut request = REQUEST.to_be_bytes().to_vec();
        request.extend([0, 0]);
        request.extend(kind.to_be_bytes());
        request.extend([0; 8]);
        request.extend(offset.to_be_bytes());
        request.extend(u32::try_from(len).map_err(|_| bad("too long"))?.to_be_bytes());
        request.extend(data);
        self.0.write_all(&request)?;
        if self.u32()? != REPLY {
            return Err(bad("not a reply"));
        }
        let error = self.u32()?;
        self.bytes::<8>()?;
        if error == 0 { Ok(()) } else { Err(bad(&format!("NBD error {error}"))) }
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.0.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_be_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_be_bytes(self.bytes()?))
    }
}
