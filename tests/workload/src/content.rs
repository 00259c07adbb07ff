//! What a sector says about itself.

/// Bytes of a sector, the unit of everything here.
pub const SECTOR: usize = 512;

const MAGIC: u64 = 0x6472_6264_7273_0001;

/// What was found in a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Only zeroes.
    Zeroes,
    /// The write of this number.
    Write(u64),
    /// Nothing that this journal ever wrote there.
    Alien,
}

/// Content of a sector after write `number` of the journal with this identity.
pub fn sector(journal: u64, sector: u64, number: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    let words = [MAGIC, journal, sector, number];
    for (n, place) in bytes.chunks_exact_mut(8).enumerate() {
        // All words differ, so that a part of another sector shows.
        let word = words[n % 4] ^ ((n as u64 / 4) << 56);
        place.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// Appends the sectors of a write.
pub fn fill(into: &mut Vec<u8>, journal: u64, first: u64, count: u32, number: u64) {
    for at in first..first + u64::from(count) {
        into.extend_from_slice(&sector(journal, at, number));
    }
}

/// What this is.
pub fn read(journal: u64, at: u64, bytes: &[u8]) -> Found {
    if bytes.iter().all(|byte| *byte == 0) {
        return Found::Zeroes;
    }
    let number = bytes.get(24..32).and_then(|word| word.try_into().ok()).map(u64::from_le_bytes);
    match number {
        Some(number) if bytes == sector(journal, at, number) => Found::Write(number),
        _ => Found::Alien,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_knows_its_place_and_its_write() {
        let bytes = sector(7, 8, 9);
        assert_eq!(read(7, 8, &bytes), Found::Write(9));
        assert_eq!(read(7, 9, &bytes), Found::Alien);
        assert_eq!(read(6, 8, &bytes), Found::Alien);
        assert_eq!(read(7, 8, &[0; SECTOR]), Found::Zeroes);
    }

    #[test]
    fn a_torn_sector_is_alien() {
        let (old, new) = (sector(7, 8, 9), sector(7, 8, 10));
        for cut in 1..15 {
            let torn = [&new[..cut * 32], &old[cut * 32..]].concat();
            assert_eq!(read(7, 8, &torn), Found::Alien, "{cut}");
        }
    }
}
