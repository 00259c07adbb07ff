//! Reading everything after a crash, and judging it.

use std::io::{Error, Result};

use crate::content::{self, Found, SECTOR};
use crate::journal::Journal;
use crate::ledger::{Ledger, Loss, Record};
use crate::nbd::{Client, Server};

/// Sectors that are read at once.
const CHUNK: u64 = 512;
/// Complaints that are kept.
const COMPLAINTS: usize = 20;

/// What was read.
#[derive(Clone, Debug, Default)]
pub struct Verdict {
    /// Sectors that were ever written.
    pub sectors: u64,
    /// Acknowledged writes that are gone, counted once for each sector. Zero unless that is legal.
    pub gone: u64,
    /// Sectors with something that may not be there, in words; not all if there are many.
    pub complaints: Vec<String>,
}

impl Verdict {
    fn complain(&mut self, text: String) {
        if self.complaints.len() < COMPLAINTS {
            self.complaints.push(text);
        }
    }

    /// Nothing to complain of.
    ///
    /// # Errors
    /// With what is wrong.
    pub fn ok(self) -> Result<Self> {
        if self.complaints.is_empty() {
            Ok(self)
        } else {
            Err(Error::other(self.complaints.join("\n")))
        }
    }
}

/// Reads the whole device. If all is legal, what was read is what may be read from now on.
///
/// # Errors
/// It can not be read, or the journal not be written.
pub fn verify(server: &Server, journal: &mut Journal, loss: Loss) -> Result<Verdict> {
    let mut client = Client::open(server)?;
    let mut found = Vec::new();
    let mut bytes = vec![0; SECTOR * usize::try_from(CHUNK).unwrap_or(0)];
    let len = journal.ledger().len();
    for first in (0..len).step_by(usize::try_from(CHUNK).unwrap_or(1)) {
        let count = usize::try_from(CHUNK.min(len - first)).unwrap_or(0);
        let bytes = bytes.get_mut(..count * SECTOR).unwrap_or_default();
        client.read(first * SECTOR as u64, bytes)?;
        let sectors = (first..).zip(bytes.chunks_exact(SECTOR));
        found.extend(sectors.map(|(at, sector)| content::read(journal.identity, at, sector)));
    }
    let (verdict, numbers) = judge(journal.ledger(), &found, loss);
    if verdict.complaints.is_empty() {
        for (first, number) in (0..).zip(numbers) {
            if journal.ledger().is_written(first) {
                journal.append(&Record::Verified { first, count: 1, number })?;
            }
        }
        journal.compact()?;
    }
    Ok(verdict)
}

/// The verdict, and which write each sector contains.
fn judge(ledger: &Ledger, found: &[Found], loss: Loss) -> (Verdict, Vec<u64>) {
    let mut verdict = Verdict::default();
    let mut numbers = Vec::with_capacity(found.len());
    for (at, found) in (0..).zip(found) {
        let number = ledger.which(at, *found, loss);
        if number.is_none() {
            let legal = ledger.legal(at, loss);
            verdict.complain(format!("sector {at}: {found:?}, but legal are {legal:?}"));
        }
        let number = number.unwrap_or(0);
        numbers.push(number);
        verdict.sectors += u64::from(ledger.is_written(at));
        verdict.gone += ledger.count_newer(at, number) as u64;
    }
    let newest = found.iter().filter_map(|found| match found {
        Found::Write(number) => Some(*number),
        Found::Zeroes | Found::Alien => None,
    });
    if let (Loss::Newest, Some(newest)) = (loss, newest.max()) {
        for (at, number) in (0..).zip(&numbers) {
            if let Some(gone) = ledger.newer_before(at, *number, newest) {
                verdict.complain(format!(
                    "sector {at}: write {number}, but write {gone} was acknowledged before write \
                     {newest} was asked for, which is there"
                ));
            }
        }
    }
    (verdict, numbers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::Write;

    fn complaints(records: &[Record], found: &[Found], loss: Loss) -> usize {
        let mut ledger = Ledger::new(4);
        records.iter().for_each(|record| ledger.apply(record).unwrap());
        judge(&ledger, found, loss).0.complaints.len()
    }

    fn write(number: u64, first: u64) -> Record {
        Record::Write(Write { number, first, count: 1, is_zeroes: false, fua: false })
    }

    #[test]
    fn the_newest_may_be_lost_but_nothing_before_something_that_is_there() {
        let records = [write(1, 0), Record::Done(1), write(3, 1), Record::Done(3)];
        let [none, first, second] = [Found::Zeroes, Found::Write(1), Found::Write(3)];
        for (found, nothing, newest) in [
            ([none, none], 2, 0),
            ([first, none], 1, 0),
            ([first, second], 0, 0),
            ([none, second], 1, 1),
            ([Found::Alien, second], 1, 2),
        ] {
            let found = [found[0], found[1], none, none];
            assert_eq!(complaints(&records, &found, Loss::Nothing), nothing, "{found:?}");
            assert_eq!(complaints(&records, &found, Loss::Newest), newest, "{found:?}");
        }
    }
}
