//! `events` and `events2`: what happens, line by line, until nobody reads any more.

use std::io::Write;

use drbd_admin::render::{Events, Events2, Events2Options};
use drbd_admin::wire::Client;
use drbd_admin::{Answer, Snapshot, Target, Update};
use rustix::event::{PollFd, PollFlags, poll};

use super::parse::Invocation;
use super::request::target;
use super::run::{Session, closed, look_up, lost};
use super::{Failed, offset};

/// One of the two formats.
enum Writer {
    Old(Events),
    New(Box<Events2>),
}

/// Prints until stdout is closed; with `--now` only what exists.
pub(super) fn run(i: &Invocation) -> Result<u8, Failed> {
    let target = target(i, &mut look_up(&i.context))?;
    let session = Session::open(&i.context)?;
    let object = i.shown_object();
    if i.has("now") {
        return now(i, session, &object, target);
    }
    let only = match target {
        Target::Minor(minor) => Some(minor),
        Target::Resource(_) | Target::All => None,
    };
    let writer = match i.command.name {
        "events" => Writer::Old(Events::new(only)),
        _ => Writer::New(Box::new(Events2::new(options(i)))),
    };
    let polled = i.has("poll").then_some(target.clone());
    let follower = Follower { i, object, client: session.watch(target)?, writer, polled };
    follower.run()
}

/// A stream of events being printed.
struct Follower<'i> {
    i: &'i Invocation,
    object: String,
    client: Client,
    writer: Writer,
    /// What `n` on stdin asks for; nothing once stdin has ended.
    polled: Option<Target>,
}

/// What there is to do.
enum Ready {
    /// The daemon said something.
    Daemon,
    /// stdin has something.
    Stdin,
    /// Nobody reads stdout any more.
    Closed,
}

fn options(i: &Invocation) -> Events2Options {
    Events2Options {
        timestamps: i.has("timestamps").then_some(0),
        statistics: i.has("statistics"),
        full: i.has("full"),
    }
}

fn now(i: &Invocation, mut session: Session, object: &str, target: Target) -> Result<u8, Failed> {
    // What does not exist has no lines.
    let snapshot = session.snapshot(object, target)?.unwrap_or_default();
    let mut writer = Writer::New(Box::new(Events2::new(options(i))));
    let text = writer.initial(&snapshot);
    Ok(write(&text).map_or(0, |()| 0))
}

impl Follower<'_> {
    fn run(mut self) -> Result<u8, Failed> {
        loop {
            let ready = if self.client.is_drained() { self.wait() } else { Ready::Daemon };
            let text = match ready {
                Ready::Closed => return Ok(0),
                Ready::Stdin => self.poll()?,
                Ready::Daemon => match self.client.next(None) {
                    Ok(Some(answer)) => self.text_of(answer)?,
                    // The driver of the original went away: the end.
                    Ok(None) => return Ok(0),
                    Err(e) => return Err(lost(&self.object, &e)),
                },
            };
            if write(&text).is_err() {
                return Ok(0);
            }
        }
    }

    fn text_of(&mut self, answer: Answer) -> Result<String, Failed> {
        Ok(match answer {
            Answer::Snapshot(snapshot) => self.writer.initial(&snapshot),
            Answer::Update(update) => self.writer.update(&update),
            Answer::Helper(call) => match &mut self.writer {
                Writer::Old(events) => events.helper(&call),
                Writer::New(events) => {
                    events.set_offset(offset(call.at_us));
                    events.helper(&call)
                }
            },
            Answer::Progress { minor, permille } => match &mut self.writer {
                Writer::Old(events) => events.progress(minor, permille),
                Writer::New(_) => String::new(),
            },
            Answer::Skipped { count } => match &self.writer {
                Writer::Old(_) => String::new(),
                Writer::New(_) => Events2::skipped(count),
            },
            Answer::Done(reply) if reply.is_success() => return Err(closed(&self.object)),
            Answer::Done(reply) => {
                return Err(Failed::new(reply.exit(), reply.message(&self.object)));
            }
            Answer::Waiting { .. } | Answer::Text { .. } => String::new(),
        })
    }

    /// Reads what stdin has; for every line asks for the numbers of now.
    fn poll(&mut self) -> Result<String, Failed> {
        let mut bytes = [0; 256];
        // Not buffered: poll(2) must see what is left.
        let count = rustix::io::read(std::io::stdin(), &mut bytes).unwrap_or(0);
        let (Some(target), true) = (self.polled.clone(), count > 0) else {
            self.polled = None;
            return Ok(String::new());
        };
        if !bytes.get(..count).unwrap_or_default().contains(&b'\n') {
            return Ok(String::new());
        }
        let snapshot = Session::open(&self.i.context)?.snapshot(&self.object, target)?;
        Ok(match (&mut self.writer, snapshot) {
            (Writer::New(events), Ok(snapshot)) => {
                events.set_offset(offset(snapshot.at_us));
                events.poll(&snapshot)
            }
            _ => String::new(),
        })
    }

    /// Waits until there is something to do.
    fn wait(&self) -> Ready {
        let (stdout, stdin) = (std::io::stdout(), std::io::stdin());
        let asked = if self.polled.is_some() { PollFlags::IN } else { PollFlags::empty() };
        loop {
            let mut fds = [
                PollFd::new(&self.client, PollFlags::IN),
                PollFd::new(&stdout, PollFlags::empty()),
                PollFd::new(&stdin, asked),
            ];
            let count = if self.polled.is_some() { 3 } else { 2 };
            match poll(fds.get_mut(..count).unwrap_or_default(), None) {
                Err(rustix::io::Errno::INTR) => continue,
                Err(_) => return Ready::Daemon,
                Ok(_) => {}
            }
            let [socket, out, input] = &fds;
            if !(socket.revents() & (PollFlags::IN | PollFlags::HUP)).is_empty() {
                return Ready::Daemon;
            }
            if out.revents().intersects(PollFlags::ERR | PollFlags::HUP) {
                return Ready::Closed;
            }
            if !input.revents().is_empty() {
                return Ready::Stdin;
            }
        }
    }
}

impl Writer {
    fn initial(&mut self, snapshot: &Snapshot) -> String {
        match self {
            Self::Old(events) => events.initial(snapshot),
            Self::New(events) => {
                events.set_offset(offset(snapshot.at_us));
                events.initial(snapshot)
            }
        }
    }

    fn update(&mut self, update: &Update) -> String {
        match self {
            Self::Old(events) => events.update(update),
            Self::New(events) => {
                events.set_offset(offset(update.at_us));
                events.update(update)
            }
        }
    }
}

fn write(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}
