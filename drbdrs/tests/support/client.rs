//! An NBD client that says exactly what a test wants.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const DISC: u16 = 2;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
pub const ZEROES: u16 = 6;
pub const STATUS: u16 = 7;

pub struct Client {
    pub socket: UnixStream,
}

impl Client {
    pub fn raw(path: &Path) -> Self {
        let socket = UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        socket.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut client = Self { socket };
        assert_eq!(&client.take(18)[..16], b"NBDMAGICIHAVEOPT");
        client.send(&3_u32.to_be_bytes());
        client
    }

    /// `contexts`: implies structured replies.
    pub fn open(path: &Path, structured: bool, contexts: &[&str]) -> Self {
        let mut client = Self::raw(path);
        if structured {
            assert_eq!(client.option(8, &[]).last().unwrap().0, 1);
        }
        if !contexts.is_empty() {
            let mut data = string("r0/0");
            data.extend(u32::try_from(contexts.len()).unwrap().to_be_bytes());
            contexts.iter().for_each(|context| data.extend(string(context)));
            assert_eq!(client.option(10, &data).len(), contexts.len() + 1);
        }
        let answer = client.go("r0/0");
        assert_eq!(answer.0, 1, "{}", String::from_utf8_lossy(&answer.1));
        client
    }

    pub fn go(&mut self, name: &str) -> (u32, Vec<u8>) {
        let mut data = string(name);
        data.extend([0, 0]);
        self.option(7, &data).pop().unwrap()
    }

    pub fn option(&mut self, number: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        let mut bytes = b"IHAVEOPT".to_vec();
        bytes.extend(number.to_be_bytes());
        bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        bytes.extend(data);
        self.send(&bytes);
        let mut replies = Vec::new();
        loop {
            let head = self.take(20);
            let kind = be32(&head[12..]);
            let data = self.take(be32(&head[16..]) as usize);
            replies.push((kind, data));
            if kind == 1 || kind >> 31 == 1 {
                return replies;
            }
        }
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    pub fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.socket.read_exact(&mut bytes).unwrap();
        bytes
    }

    pub fn request(&mut self, command: u16, flags: u16, cookie: u64, offset: u64, len: u32) {
        self.send(&request(command, flags, cookie, offset, len));
    }

    /// Cookie and error.
    pub fn simple(&mut self) -> (u64, u32) {
        let head = self.take(16);
        assert_eq!(be32(&head), 0x6744_6698, "{head:x?}");
        (be64(&head[8..]), be32(&head[4..]))
    }

    /// Cookie, last?, kind, body.
    pub fn chunk(&mut self) -> (u64, bool, u16, Vec<u8>) {
        let head = self.take(20);
        assert_eq!(be32(&head), 0x668e_33ef, "{head:x?}");
        let body = self.take(be32(&head[16..]) as usize);
        (be64(&head[8..]), head[5] & 1 == 1, u16::from_be_bytes([head[6], head[7]]), body)
    }

    /// Writes, and waits for the reply.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> u32 {
        self.request(WRITE, 0, 1, offset, u32::try_from(data.len()).unwrap());
        self.send(data);
        self.simple().1
    }

    /// With simple replies.
    pub fn read(&mut self, offset: u64, len: u32) -> Vec<u8> {
        self.request(READ, 0, 2, offset, len);
        assert_eq!(self.simple(), (2, 0));
        self.take(len as usize)
    }

    pub fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        match self.socket.read_to_end(&mut rest) {
            Ok(_) => true,
            Err(error) => error.kind() == ErrorKind::ConnectionReset,
        }
    }
}

pub fn request(command: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

pub fn string(text: &str) -> Vec<u8> {
    let mut bytes = u32::try_from(text.len()).unwrap().to_be_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

pub fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[..4].try_into().unwrap())
}

pub fn be64(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes[..8].try_into().unwrap())
}
