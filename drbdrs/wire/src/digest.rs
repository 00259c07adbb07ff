//! Digests and the challenge-response arithmetic. Spec: wire-protocol.md §3.2, §11.

use core::fmt;

use hmac::{Hmac, KeyInit, Mac};
use md5::Md5;
use sha1::Sha1;
use sha2::{Digest as _, Sha224, Sha256, Sha384, Sha512};

/// A digest of up to 64 bytes; empty where a packet has none.
#[derive(Clone, Copy)]
pub struct Digest {
    bytes: [u8; Self::MAX],
    len: u8,
}

impl Digest {
    /// The longest digest.
    pub const MAX: usize = 64;
    /// No digest.
    pub const NONE: Self = Self { bytes: [0; Self::MAX], len: 0 };

    /// From its bytes. `None` beyond [`Self::MAX`].
    pub fn new(from: &[u8]) -> Option<Self> {
        let mut bytes = [0; Self::MAX];
        bytes.get_mut(..from.len())?.copy_from_slice(from);
        Some(Self { bytes, len: u8::try_from(from.len()).ok()? })
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..usize::from(self.len)).unwrap_or_default()
    }

    /// Without bytes?
    pub const fn is_none(&self) -> bool {
        self.len == 0
    }
}

impl PartialEq for Digest {
    fn eq(&self, other: &Self) -> bool {
        self.as_bytes() == other.as_bytes()
    }
}

impl Eq for Digest {}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("#")?;
        for byte in self.as_bytes() {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

/// A digest algorithm, named as the kernel names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// `crc32c`, 4 bytes, little endian.
    Crc32c,
    /// `md5`, 16 bytes.
    Md5,
    /// `sha1`, 20 bytes.
    Sha1,
    /// `sha224`, 28 bytes.
    Sha224,
    /// `sha256`, 32 bytes.
    Sha256,
    /// `sha384`, 48 bytes.
    Sha384,
    /// `sha512`, 64 bytes.
    Sha512,
}

impl Algorithm {
    /// All that are supported.
    pub const ALL: &'static [Self] = &[
        Self::Crc32c,
        Self::Md5,
        Self::Sha1,
        Self::Sha224,
        Self::Sha256,
        Self::Sha384,
        Self::Sha512,
    ];

    /// The name in drbd.conf and on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Crc32c => "crc32c",
            Self::Md5 => "md5",
            Self::Sha1 => "sha1",
            Self::Sha224 => "sha224",
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
            Self::Sha512 => "sha512",
        }
    }

    /// The algorithm of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|algorithm| algorithm.name() == name)
    }

    /// Length of its digests, bytes.
    pub const fn len(self) -> usize {
        match self {
            Self::Crc32c => 4,
            Self::Md5 => 16,
            Self::Sha1 => 20,
            Self::Sha224 => 28,
            Self::Sha256 => 32,
            Self::Sha384 => 48,
            Self::Sha512 => 64,
        }
    }

    /// Never: every algorithm has a length.
    pub const fn is_empty(self) -> bool {
        false
    }

    /// Digest of some data.
    pub fn digest(self, data: &[u8]) -> Digest {
        match self {
            Self::Crc32c => made(&crc32c::crc32c(data).to_le_bytes()),
            Self::Md5 => made(&Md5::digest(data)),
            Self::Sha1 => made(&Sha1::digest(data)),
            Self::Sha224 => made(&Sha224::digest(data)),
            Self::Sha256 => made(&Sha256::digest(data)),
            Self::Sha384 => made(&Sha384::digest(data)),
            Self::Sha512 => made(&Sha512::digest(data)),
        }
    }

    /// Answer to a challenge (RFC 2104). `None` for algorithms that have no such construction.
    pub fn respond(self, secret: &[u8], challenge: &[u8]) -> Option<Digest> {
        match self {
            Self::Crc32c => None,
            Self::Md5 => respond::<Hmac<Md5>>(secret, challenge),
            Self::Sha1 => respond::<Hmac<Sha1>>(secret, challenge),
            Self::Sha224 => respond::<Hmac<Sha224>>(secret, challenge),
            Self::Sha256 => respond::<Hmac<Sha256>>(secret, challenge),
            Self::Sha384 => respond::<Hmac<Sha384>>(secret, challenge),
            Self::Sha512 => respond::<Hmac<Sha512>>(secret, challenge),
        }
    }

    /// Does the response fit? Takes the same time wherever it differs.
    pub fn is_response(self, secret: &[u8], challenge: &[u8], response: &[u8]) -> bool {
        let Some(right) = self.respond(secret, challenge) else { return false };
        let right = right.as_bytes();
        right.len() == response.len()
            && right.iter().zip(response).fold(0, |differs, (a, b)| differs | (a ^ b)) == 0
    }
}

fn made(bytes: &[u8]) -> Digest {
    Digest::new(bytes).unwrap_or(Digest::NONE)
}

fn respond<M: Mac + KeyInit>(secret: &[u8], challenge: &[u8]) -> Option<Digest> {
    // Any length of key is allowed by the construction.
    let mut mac = <M as KeyInit>::new_from_slice(secret).ok()?;
    mac.update(challenge);
    Digest::new(&mac.finalize().into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_digests() {
        // Spec §11.1: 4096 zero bytes.
        assert_eq!(Algorithm::Crc32c.digest(&[0; 4096]).as_bytes(), [0x89, 0x41, 0xf9, 0x98]);
        for algorithm in Algorithm::ALL {
            assert_eq!(algorithm.digest(b"abc").as_bytes().len(), algorithm.len());
            assert_eq!(Algorithm::from_name(algorithm.name()), Some(*algorithm));
        }
    }

    #[test]
    fn responses_fit_only_their_challenge() {
        // RFC 2202, test case 2.
        let md5 = Algorithm::Md5.respond(b"Jefe", b"what do ya want for nothing?").unwrap();
        assert_eq!(md5.as_bytes()[..4], [0x75, 0x0c, 0x78, 0x3e]);
        assert!(Algorithm::Md5.is_response(
            b"Jefe",
            b"what do ya want for nothing?",
            md5.as_bytes()
        ));
        assert!(!Algorithm::Md5.is_response(b"Jefe", b"something else", md5.as_bytes()));
        assert!(!Algorithm::Sha1.is_response(b"Jefe", b"x", md5.as_bytes()), "wrong length");
        assert_eq!(Algorithm::Crc32c.respond(b"a", b"b"), None);
    }
}
