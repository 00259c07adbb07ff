//! The client: one thread that keeps a number of writes in flight on one connection.
//!
//! It is the same for all servers. What it has to send at one moment goes out in one system call,
//! and so do the answers come in, so that it takes as little as possible from the processors that
//! the servers share with it.

use std::io::{Error, ErrorKind, IoSlice, Read as _, Result};
use std::time::{Duration, Instant};

use drbdrs_workload::nbd::{self, Client, Command, Server, Stream};

/// Length of the head of an answer.
const REPLY_LEN: usize = 16;

/// Where writes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Anywhere.
    Random,
    /// One behind the other, from the beginning again at the end.
    Sequential,
}

/// What the client does.
#[derive(Clone, Copy, Debug)]
pub struct Job {
    /// Where to.
    pub order: Order,
    /// Bytes of a write.
    pub len: usize,
    /// Writes in flight.
    pub depth: usize,
    /// How long new ones are started.
    pub time: Duration,
}

/// What it saw.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// How long each write took.
    pub latencies: Vec<Duration>,
    /// From the first request to the last answer.
    pub took: Duration,
}

impl Sample {
    /// Writes in a second.
    #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
    pub fn iops(&self) -> f64 {
        self.latencies.len() as f64 / self.took.as_secs_f64().max(1e-9)
    }
}

/// Loads a server.
///
/// # Errors
/// The connection is lost, or a write failed.
pub fn run(server: &Server, job: &Job, seed: u64) -> Result<Sample> {
    let client = Client::open(server)?;
    let places = client.size() / job.len as u64;
    if places == 0 || job.depth == 0 {
        return Err(Error::new(ErrorKind::InvalidInput, "the device is too small"));
    }
    let mut load = Load {
        stream: client.into_stream(),
        job: *job,
        data: random_bytes(job.len),
        places,
        next: seed | 1,
        started: vec![None; job.depth],
        heads: Vec::new(),
        sample: Sample::default(),
    };
    load.go()?;
    Ok(load.sample)
}

struct Load {
    stream: Box<dyn Stream>,
    job: Job,
    data: Vec<u8>,
    places: u64,
    next: u64,
    /// By cookie.
    started: Vec<Option<Instant>>,
    heads: Vec<[u8; nbd::REQUEST_LEN]>,
    sample: Sample,
}

impl Load {
    fn go(&mut self) -> Result<()> {
        let begin = Instant::now();
        let end = begin + self.job.time;
        let mut slots: Vec<usize> = (0..self.job.depth).collect();
        let mut replies = vec![0; REPLY_LEN * self.job.depth];
        let (mut filled, mut in_flight) = (0, 0);
        loop {
            in_flight += slots.len();
            self.send(&slots)?;
            slots.clear();
            if in_flight == 0 {
                break;
            }
            filled += match self.stream.read(&mut replies[filled..])? {
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                got => got,
            };
            let now = Instant::now();
            let whole = filled / REPLY_LEN * REPLY_LEN;
            for reply in replies[..whole].chunks_exact(REPLY_LEN) {
                let slot = self.answered(reply, now)?;
                in_flight -= 1;
                if now < end {
                    slots.push(slot);
                }
            }
            replies.copy_within(whole..filled, 0);
            filled -= whole;
        }
        self.sample.took = begin.elapsed();
        Ok(())
    }

    fn send(&mut self, slots: &[usize]) -> Result<()> {
        self.heads.clear();
        let now = Instant::now();
        for slot in slots {
            let at = self.place() * self.job.len as u64;
            let command = Command::Write { fua: false };
            self.heads.push(nbd::request(command, *slot as u64, at, self.job.len)?);
            self.started[*slot] = Some(now);
        }
        let mut parts: Vec<IoSlice<'_>> = Vec::with_capacity(2 * slots.len());
        for head in &self.heads {
            parts.extend([IoSlice::new(head), IoSlice::new(&self.data)]);
        }
        write_all(&mut *self.stream, &mut parts)
    }

    fn answered(&mut self, reply: &[u8], now: Instant) -> Result<usize> {
        let reply = nbd::parse_reply(reply)?;
        if reply.error != 0 {
            return Err(Error::other(format!("a write failed with NBD error {}", reply.error)));
        }
        let slot = usize::try_from(reply.cookie).map_err(Error::other)?;
        let started = self.started.get_mut(slot).and_then(Option::take);
        let started = started.ok_or_else(|| Error::other("an answer to no request"))?;
        self.sample.latencies.push(now - started);
        Ok(slot)
    }

    fn place(&mut self) -> u64 {
        match self.job.order {
            Order::Random => {
                self.next ^= self.next << 13;
                self.next ^= self.next >> 7;
                self.next ^= self.next << 17;
            }
            Order::Sequential => self.next = self.next.wrapping_add(1),
        }
        self.next % self.places
    }
}

fn write_all(stream: &mut dyn Stream, mut parts: &mut [IoSlice<'_>]) -> Result<()> {
    while !parts.is_empty() {
        match stream.write_vectored(parts)? {
            0 => return Err(ErrorKind::WriteZero.into()),
            sent => IoSlice::advance_slices(&mut parts, sent),
        }
    }
    Ok(())
}

/// Data that nothing on the way can shorten.
pub fn random_bytes(len: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
