//! The journal: a text file with a line for each record. A last line that is cut short never
//! counted, since a request is sent only after its line has been written.

use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind, Result, Write as _};
use std::path::{Path, PathBuf};

use crate::ledger::{Ledger, Record, Write};

/// How sure a line must be before its request is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// It survives the end of this process.
    Process,
    /// It survives a power cut of this machine.
    Machine,
}

/// A journal and what it says.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    durability: Durability,
    /// Of the content that it writes.
    pub(crate) identity: u64,
    ledger: Ledger,
}

fn broken(line: &str) -> Error {
    Error::new(ErrorKind::InvalidData, format!("a broken journal: {line:?}"))
}

fn line(record: &Record) -> String {
    match record {
        Record::Clock(clock) => format!("clock {clock}\n"),
        Record::Write(Write { number, first, count, is_zeroes, fua }) => {
            let kind = if *is_zeroes { "zeroes" } else { "write" };
            let fua = if *fua { " fua" } else { "" };
            format!("{kind} {number} {first} {count}{fua}\n")
        }
        Record::Done(number) => format!("done {number}\n"),
        Record::Flushed(asked) => format!("flushed {asked}\n"),
        Record::Settled => "settled\n".into(),
        Record::Verified { first, count, number } => format!("verified {first} {count} {number}\n"),
    }
}

fn parse(line: &str) -> Option<Record> {
    let mut words = line.split(' ');
    let kind = words.next()?;
    let mut number = || words.next()?.parse::<u64>().ok();
    let record = match kind {
        "clock" => Record::Clock(number()?),
        "write" | "zeroes" => {
            let (id, first, count) = (number()?, number()?, number()?.try_into().ok()?);
            let fua = match words.next() {
                None => false,
                Some("fua") => true,
                Some(_) => return None,
            };
            Record::Write(Write { number: id, first, count, is_zeroes: kind == "zeroes", fua })
        }
        "done" => Record::Done(number()?),
        "flushed" => Record::Flushed(number()?),
        "settled" => Record::Settled,
        "verified" => {
            let (first, count, id) = (number()?, number()?.try_into().ok()?, number()?);
            Record::Verified { first, count, number: id }
        }
        _ => return None,
    };
    words.next().is_none().then_some(record)
}

impl Journal {
    /// A new one, for a device that reads as zeroes. The identity goes into the content, so that
    /// what another journal's run left is not taken for one's own.
    ///
    /// # Errors
    /// There is one, or it can not be written.
    pub fn create(
        path: &Path,
        sectors: u64,
        identity: u64,
        durability: Durability,
    ) -> Result<Self> {
        let mut file = OpenOptions::new().append(true).create_new(true).open(path)?;
        file.write_all(header(identity, sectors).as_bytes())?;
        let journal =
            Self { path: path.into(), file, durability, identity, ledger: Ledger::new(sectors) };
        journal.sync()?;
        Ok(journal)
    }

    /// One that another process left.
    ///
    /// # Errors
    /// There is none, or it is broken.
    pub fn open(path: &Path, durability: Durability) -> Result<Self> {
        let text = std::fs::read_to_string(path)?;
        let whole = text.rfind('\n').map_or(0, |at| at + 1);
        let file = OpenOptions::new().append(true).open(path)?;
        file.set_len(whole as u64)?;
        let mut lines = text.get(..whole).unwrap_or_default().lines();
        let head = lines.next().unwrap_or_default();
        let (identity, sectors) = parse_header(head).ok_or_else(|| broken(head))?;
        let mut ledger = Ledger::new(sectors);
        for line in lines {
            let record = parse(line).ok_or_else(|| broken(line))?;
            ledger.apply(&record).ok_or_else(|| broken(line))?;
        }
        Ok(Self { path: path.into(), file, durability, identity, ledger })
    }

    /// What may be read.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Says what is about to happen, or what has happened.
    ///
    /// # Errors
    /// It can not be written.
    pub fn append(&mut self, record: &Record) -> Result<()> {
        let line = line(record);
        self.file.write_all(line.as_bytes())?;
        if matches!(record, Record::Write(_)) {
            self.sync()?;
        }
        self.ledger.apply(record).ok_or_else(|| broken(&line))
    }

    /// All that has been acknowledged is now on both nodes.
    ///
    /// # Errors
    /// It can not be written.
    pub fn settle(&mut self) -> Result<()> {
        self.append(&Record::Settled)
    }

    /// Writes it anew, as short as it can be; every sector must have been verified.
    pub(crate) fn compact(&mut self) -> Result<()> {
        let new = self.path.with_extension("new");
        let mut text = header(self.identity, self.ledger.len());
        let records = self.ledger.compact();
        text.extend(records.iter().map(line));
        std::fs::write(&new, text)?;
        self.file = OpenOptions::new().append(true).open(&new)?;
        self.sync()?;
        std::fs::rename(&new, &self.path)?;
        let mut ledger = Ledger::new(self.ledger.len());
        for record in &records {
            ledger.apply(record).ok_or_else(|| broken(&line(record)))?;
        }
        self.ledger = ledger;
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        match self.durability {
            Durability::Process => Ok(()),
            Durability::Machine => self.file.sync_data(),
        }
    }
}

fn header(identity: u64, sectors: u64) -> String {
    format!("drbdrs-workload 1 {identity} {sectors}\n")
}

fn parse_header(line: &str) -> Option<(u64, u64)> {
    let (identity, sectors) = line.strip_prefix("drbdrs-workload 1 ")?.split_once(' ')?;
    Some((identity.parse().ok()?, sectors.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::Loss;

    #[test]
    fn the_next_process_knows_what_the_last_one_knew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let write = |number, fua, is_zeroes| {
            Record::Write(Write { number, first: 3, count: 2, is_zeroes, fua })
        };
        let records = [
            write(1, true, false),
            Record::Done(1),
            Record::Flushed(2),
            Record::Settled,
            write(5, false, true),
            Record::Verified { first: 4, count: 1, number: 1 },
            Record::Clock(20),
        ];
        let mut journal = Journal::create(&path, 8, 7, Durability::Machine).unwrap();
        records.iter().for_each(|record| journal.append(record).unwrap());
        assert!(records.iter().all(|record| parse(line(record).trim_end()) == Some(*record)));
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"write 21 0 1").unwrap();
        let mut journal = Journal::open(&path, Durability::Process).unwrap();
        assert_eq!((journal.identity, journal.ledger().clock()), (7, 20));
        assert_eq!(journal.ledger().legal(3, Loss::Nothing), [1, 5]);
        assert_eq!(journal.ledger().legal(4, Loss::Nothing), [1]);
        assert!(!journal.ledger().is_written(0), "it was cut short");
        journal.append(&Record::Verified { first: 3, count: 1, number: 1 }).unwrap();
        journal.compact().unwrap();
        let journal = Journal::open(&path, Durability::Process).unwrap();
        assert_eq!(journal.ledger().legal(3, Loss::Newest), [1]);
        assert_eq!(journal.ledger().clock(), 21);
    }

    #[test]
    fn broken_lines_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for (n, line) in ["nonsense", "write 1 2", "done 7", "write 1 0 1 soon", "write 1 9 1"]
            .into_iter()
            .enumerate()
        {
            let path = dir.path().join(n.to_string());
            std::fs::write(&path, format!("{}{line}\n", header(1, 8))).unwrap();
            assert!(Journal::open(&path, Durability::Process).is_err(), "{line}");
        }
    }
}
