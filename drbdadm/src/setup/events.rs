//! `events` and `events2`: what happens, line by line, until nobody reads any more.

use std::io::Write;

use drbd_admin::render::{Events, Events2, Events2Options};
use drbd_admin::wire::Client;
use drbd_admin::{Answer, Snapshot, Target, Update};
use rustix::event::{PollFd, PollFlags, poll};

use super::Failed;
use super::parse::Invocation;
use super::request::target;
use super::run::{Session, closed, look_up, lost};

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
    follow(session.watch(target)?, writer, &object)
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

fn follow(mut client: Client, mut writer: Writer, object: &str) -> Result<u8, Failed> {
    loop {
        if client.is_drained() && is_reader_gone(&client) {
            return Ok(0);
        }
        let answer = match client.next(None) {
            Ok(Some(answer)) => answer,
            // The driver of the original went away: the end.
            Ok(None) => return Ok(0),
            Err(e) => return Err(lost(object, &e)),
        };
        let text = match answer {
            Answer::Snapshot(snapshot) => writer.initial(&snapshot),
            Answer::Update(update) => writer.update(&update),
            Answer::Helper(call) => match &mut writer {
                Writer::Old(events) => events.helper(&call),
                Writer::New(events) => {
                    events.set_offset(offset(call.at_us));
                    events.helper(&call)
                }
            },
            Answer::Progress { minor, permille } => match &mut writer {
                Writer::Old(events) => events.progress(minor, permille),
                Writer::New(_) => String::new(),
            },
            Answer::Skipped { count } => match &writer {
                Writer::Old(_) => String::new(),
                Writer::New(_) => Events2::skipped(count),
            },
            Answer::Done(reply) => {
                if reply.is_success() {
                    return Err(closed(object));
                }
                return Err(Failed::new(reply.exit(), reply.message(object)));
            }
            Answer::Waiting { .. } | Answer::Text { .. } => String::new(),
        };
        if write(&text).is_err() {
            return Ok(0);
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

/// Seconds that the local clock is east of UTC at this moment.
fn offset(at_us: u64) -> i32 {
    let at = i64::try_from(at_us).ok().and_then(|us| jiff::Timestamp::from_microsecond(us).ok());
    at.map_or(0, |at| jiff::tz::TimeZone::system().to_offset(at).seconds())
}

fn write(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Waits until the daemon says something, or nobody reads stdout any more.
fn is_reader_gone(client: &Client) -> bool {
    let stdout = std::io::stdout();
    loop {
        let mut fds =
            [PollFd::new(client, PollFlags::IN), PollFd::new(&stdout, PollFlags::empty())];
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
            Ok(_) => {
                let [socket, out] = fds;
                let gone = out.revents().intersects(PollFlags::ERR | PollFlags::HUP);
                return gone && !socket.revents().contains(PollFlags::IN);
            }
        }
    }
}
