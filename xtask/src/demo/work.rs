//! A workload that knows what it has been promised: for every block the last write that was
//! acknowledged, and the one that was under way when the node died.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use super::nbd::Client;
use crate::run::Failure;

const BLOCK: usize = 4096;
/// Every writer has blocks of its own.
const WRITERS: u64 = 4;
const BLOCKS_OF_A_WRITER: u64 = 2048;

/// What may be read from a block: numbers of its writes.
#[derive(Clone, Copy, Debug, Default)]
struct Block {
    acknowledged: u64,
    under_way: u64,
}

/// What all writers know.
#[derive(Debug, Default)]
pub(super) struct Promises(BTreeMap<u64, Block>);

/// Writers at work.
pub(super) struct Work {
    is_over: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    writers: Vec<JoinHandle<BTreeMap<u64, Block>>>,
}

fn content(block: u64, number: u64) -> Vec<u8> {
    let words = [block.to_le_bytes(), number.to_le_bytes()].concat();
    words.repeat(BLOCK / 16)
}

impl Promises {
    /// Starts the writers.
    pub(super) fn write(&self, socket: &Path, export: &str) -> Work {
        let (is_over, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let writer = |n: u64| {
            let first = n * BLOCKS_OF_A_WRITER;
            let range = first..first + BLOCKS_OF_A_WRITER;
            let known = self.0.range(range).map(|(at, block)| (*at, *block)).collect();
            let (socket, export) = (socket.to_owned(), export.to_owned());
            let (is_over, count) = (Arc::clone(&is_over), Arc::clone(&count));
            std::thread::spawn(move || write(socket, export, first, known, &is_over, &count))
        };
        let writers = (0..WRITERS).map(writer).collect();
        Work { is_over, count, writers }
    }

    /// Reads every block that was ever written; how many blocks there are.
    pub(super) fn check(&mut self, socket: &Path, export: &str) -> Result<usize, Failure> {
        let mut client = Client::open(socket, export)?;
        let mut data = vec![0; BLOCK];
        for (at, block) in &mut self.0 {
            client.read(at * BLOCK as u64, &mut data)?;
            let allowed = [block.acknowledged, block.under_way];
            let found = allowed.into_iter().find(|number| {
                let is_empty = *number == 0 && data.iter().all(|byte| *byte == 0);
                is_empty || (*number != 0 && data == content(*at, *number))
            });
            let Some(found) = found else {
                return Err(Failure(format!(
                    "block {at}: neither write {} nor write {} is there",
                    block.acknowledged, block.under_way
                )));
            };
            *block = Block { acknowledged: found, under_way: found };
        }
        Ok(self.0.len())
    }
}

/// Writes until it is over or the server dies.
fn write(
    socket: PathBuf,
    export: String,
    first: u64,
    mut known: BTreeMap<u64, Block>,
    is_over: &AtomicBool,
    count: &AtomicU64,
) -> BTreeMap<u64, Block> {
    let Ok(mut client) = Client::open(&socket, &export) else { return known };
    let mut random = first.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    while !is_over.load(Ordering::Relaxed) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let at = first + random % BLOCKS_OF_A_WRITER;
        let block = known.entry(at).or_default();
        block.under_way += 1;
        if client.write(at * BLOCK as u64, &content(at, block.under_way)).is_err() {
            break;
        }
        block.acknowledged = block.under_way;
        count.fetch_add(1, Ordering::Relaxed);
    }
    known
}

impl Work {
    /// Acknowledged writes so far.
    pub(super) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Ends the writers, if their server has not.
    pub(super) fn end(self, promises: &mut Promises) -> Result<u64, Failure> {
        self.is_over.store(true, Ordering::Relaxed);
        for writer in self.writers {
            let known = writer.join().map_err(|_| Failure("a writer has panicked".into()))?;
            promises.0.extend(known);
        }
        Ok(self.count.load(Ordering::Relaxed))
    }
}
