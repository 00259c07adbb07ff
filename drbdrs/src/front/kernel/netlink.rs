//! Generic netlink: a request to a family of the kernel, and its answer.
//!
//! Written here because it is a page of layouts: what the published crates add is more than what we
//! would use. Spec: linux/netlink.h, linux/genetlink.h.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::net::netlink::{GENERIC, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, sockopt};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// An answer that takes longer will not come.
const ANSWER_MAX: Duration = Duration::from_secs(30);
/// `NLMSG_ERROR`.
const ERROR: u16 = 2;
/// `NLM_F_REQUEST | NLM_F_ACK`.
const REQUEST_ACK: u16 = 1 | 4;
/// `NLA_F_NESTED`.
const NESTED: u16 = 1 << 15;
/// The family that knows all others.
const CONTROL: u16 = 16;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;

/// `nlmsghdr` and `genlmsghdr`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Head {
    len: u32,
    kind: u16,
    flags: u16,
    seq: u32,
    port: u32,
    command: u8,
    version: u8,
    reserved: u16,
}
const _: () = assert!(size_of::<Head>() == 20);
/// Without the part of generic netlink, which errors do not have.
const PLAIN_HEAD: usize = 16;

/// `nlattr`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct AttributeHead {
    len: u16,
    kind: u16,
}

/// Attributes of a request, one behind the other.
#[derive(Clone, Debug, Default)]
pub(super) struct Attributes(Vec<u8>);

impl Attributes {
    /// None yet.
    pub(super) fn new() -> Self {
        Self::default()
    }

    fn push(&mut self, kind: u16, bytes: &[u8]) {
        let whole = size_of::<AttributeHead>() + bytes.len();
        let len = u16::try_from(whole).expect("our attributes are short");
        self.0.extend_from_slice(AttributeHead { len, kind }.as_bytes());
        self.0.extend_from_slice(bytes);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    /// A number of 32 bits.
    #[must_use]
    pub(super) fn u32(mut self, kind: u16, value: u32) -> Self {
        self.push(kind, value.as_bytes());
        self
    }

    /// A number of 64 bits.
    #[must_use]
    pub(super) fn u64(mut self, kind: u16, value: u64) -> Self {
        self.push(kind, value.as_bytes());
        self
    }

    /// A text, ended by a zero.
    #[must_use]
    pub(super) fn text(mut self, kind: u16, value: &str) -> Self {
        self.push(kind, &[value.as_bytes(), &[0]].concat());
        self
    }

    /// Others within it.
    #[must_use]
    pub(super) fn nested(mut self, kind: u16, inner: &Self) -> Self {
        self.push(kind | NESTED, &inner.0);
        self
    }
}

/// An answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Answer(Vec<u8>);

impl Answer {
    /// The first attribute of this kind.
    fn get(&self, wanted: u16) -> Option<&[u8]> {
        let mut rest = &self.0[..];
        while let Ok((head, _)) = AttributeHead::read_from_prefix(rest) {
            let len = usize::from(head.len);
            let value = rest.get(size_of::<AttributeHead>()..len)?;
            if head.kind & !NESTED == wanted {
                return Some(value);
            }
            rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        }
        None
    }

    /// A number of 16 bits.
    pub(super) fn u16(&self, kind: u16) -> Option<u16> {
        self.get(kind).and_then(|value| u16::read_from_bytes(value).ok())
    }

    /// A number of 32 bits.
    pub(super) fn u32(&self, kind: u16) -> Option<u32> {
        self.get(kind).and_then(|value| u32::read_from_bytes(value).ok())
    }
}

/// A family of generic netlink.
#[derive(Debug)]
pub(super) struct Family {
    socket: OwnedFd,
    id: u16,
    next: u32,
}

impl Family {
    /// Looks for it by its name.
    ///
    /// # Errors
    /// The kernel does not know it, or has no netlink.
    pub(super) fn find(name: &str) -> io::Result<Self> {
        let (family, kind) = (AddressFamily::NETLINK, SocketType::RAW);
        let flags = SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(family, kind, flags, Some(GENERIC))?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(ANSWER_MAX))?;
        let mut control = Self { socket, id: CONTROL, next: 1 };
        let name = Attributes::new().text(FAMILY_NAME, name);
        let answer = control.ask(GET_FAMILY, &name)?;
        let id = answer.u16(FAMILY_ID).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { id, ..control })
    }

    /// Carries out a command. The answer is empty if the kernel only says that it is done.
    ///
    /// # Errors
    /// The kernel refuses, with its error number.
    pub(super) fn ask(&mut self, command: u8, attributes: &Attributes) -> io::Result<Answer> {
        let seq = self.next;
        self.next = seq.wrapping_add(1);
        let len = u32::try_from(size_of::<Head>() + attributes.0.len());
        let head = Head {
            len: len.map_err(io::Error::other)?,
            kind: self.id,
            flags: REQUEST_ACK,
            seq,
            port: 0,
            command,
            version: 1,
            reserved: 0,
        };
        let message = [head.as_bytes(), &attributes.0].concat();
        let kernel = SocketAddrNetlink::new(0, 0);
        rustix::net::sendto(&self.socket, &message, SendFlags::empty(), &kernel)?;
        let mut answer = Answer::default();
        let mut buffer = vec![0; 16 << 10];
        loop {
            let (got, _) =
                match rustix::net::recv(&self.socket, &mut buffer[..], RecvFlags::empty()) {
                    Err(rustix::io::Errno::INTR) => continue,
                    other => other?,
                };
            if take(&buffer[..got], seq, &mut answer)? {
                return Ok(answer);
            }
        }
    }
}

/// Takes in a datagram. True: it says that the command is done.
fn take(datagram: &[u8], seq: u32, answer: &mut Answer) -> io::Result<bool> {
    let mut rest = datagram;
    while let Ok((len, _)) = u32::read_from_prefix(rest) {
        let len = usize::try_from(len).map_err(io::Error::other)?;
        let message = rest.get(..len).filter(|_| len >= PLAIN_HEAD);
        let message = message.ok_or(io::ErrorKind::InvalidData)?;
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        let number = |at: usize| message.get(at..).and_then(|m| i32::read_from_prefix(m).ok());
        let kind = message.get(4..).and_then(|m| u16::read_from_prefix(m).ok()).map(|(k, _)| k);
        if number(8).is_none_or(|(of, _)| of.cast_unsigned() != seq) {
            continue;
        }
        if kind == Some(ERROR) {
            let (error, _) = number(PLAIN_HEAD).ok_or(io::ErrorKind::InvalidData)?;
            return match error {
                0 => Ok(true),
                negative => Err(io::Error::from_raw_os_error(negative.saturating_neg())),
            };
        }
        answer.0 = message.get(size_of::<Head>()..).unwrap_or_default().to_vec();
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_found_again() {
        let inner = Attributes::new().u32(1, 7);
        let all = Attributes::new().text(2, "nbd").u64(3, 9).nested(4, &inner).u32(5, 11);
        assert_eq!(all.0.len(), 8 + 12 + 12 + 8);
        assert_eq!(all.0[..8], *b"\x08\x00\x02\x00nbd\0");
        assert_eq!(all.0[20..32], *b"\x0c\x00\x04\x80\x08\x00\x01\x00\x07\x00\x00\x00");
        let answer = Answer(all.0);
        assert_eq!((answer.u32(5), answer.u32(6), answer.u32(3)), (Some(11), None, None));
        // Cut off within an attribute, and one that has no length.
        assert_eq!(Answer(answer.0[..38].to_vec()).u32(5), None);
        assert_eq!(Answer(vec![0; 64]).u32(5), None);
    }

    #[test]
    fn datagrams_of_any_form_are_taken_in_or_refused() {
        let message = |kind: u16, seq: u32, body: &[u8]| {
            let len = u32::try_from(PLAIN_HEAD + body.len()).unwrap();
            let head = [len.as_bytes(), kind.as_bytes(), &[0, 0], seq.as_bytes(), &[0; 4]].concat();
            [head, body.to_vec()].concat()
        };
        let mut answer = Answer::default();
        let told = Attributes::new().u32(1, 3);
        let data = message(20, 5, &[&[1, 1, 0, 0], &told.0[..]].concat());
        let done = message(ERROR, 5, &[0; 4]);
        assert!(take(&[data.clone(), done].concat(), 5, &mut answer).unwrap());
        assert_eq!(answer.u32(1), Some(3));
        let refused = message(ERROR, 5, (-28_i32).as_bytes());
        assert_eq!(take(&refused, 5, &mut answer).unwrap_err().raw_os_error(), Some(28));
        assert!(!take(&refused, 6, &mut answer).unwrap(), "an answer to somebody else");
        assert!(!take(&data, 5, &mut answer).unwrap());
        for cut in 4..data.len() {
            assert!(take(&data[..cut], 5, &mut answer).is_err());
        }
    }

    #[test]
    fn the_kernel_knows_its_control_family() {
        // Its own name leads to its own number.
        match Family::find("nlctrl") {
            Ok(family) => assert_eq!(family.id, CONTROL),
            Err(error) => assert!(error.raw_os_error().is_some(), "{error}"),
        }
        let error = Family::find("drbdrs-nonsense").unwrap_err();
        assert!(error.raw_os_error().is_some(), "{error}");
    }
}
