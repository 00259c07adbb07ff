//! Exchanging a request, and what comes of it.

use std::io::{ErrorKind, IsTerminal};
use std::time::{Duration, Instant};

use drbd_admin::wire::{Client, WireError};
use drbd_admin::{Answer, Reply, Request, Snapshot, Target};
use drbd_types::Failure;

use super::object::minor_of_path;
use super::parse::Invocation;
use super::request::{build, reason};
use super::{Context, Failed, events, lock, view, wait};
use crate::print;
use crate::registry::{Link, unregister};

/// Runs a command; returns its exit code.
pub(super) fn run(i: Invocation) -> Result<u8, Failed> {
    let result = match i.command.name {
        "events" | "events2" => events::run(&i),
        "wait-connect" | "wait-sync" => wait::run(&i),
        name if view::is_view(name) => view::run(&i),
        _ => match change(&i) {
            Err(Failed { code: NO_DAEMON, .. }) if is_done_without_daemon(i.command.name) => Ok(0),
            result => result,
        },
    };
    result.map_err(|failed| match failed.code {
        NO_DAEMON => Failed { code: 20, ..failed },
        _ => failed,
    })
}

/// Internal code of "nobody listens there"; users see 20.
pub(super) const NO_DAEMON: u8 = 255;

/// Without a daemon these have nothing to do: they are called while the system goes down.
fn is_done_without_daemon(name: &str) -> bool {
    matches!(name, "down" | "secondary" | "disconnect" | "detach")
}

/// A connection to the daemon with a deadline for every request.
pub(super) struct Session {
    client: Client,
    deadline: Duration,
}

/// What came before the last line of an answer.
pub(super) struct Told {
    pub(super) reply: Reply,
    pub(super) snapshot: Option<Snapshot>,
    pub(super) text: String,
}

impl Session {
    /// Connects.
    ///
    /// # Errors
    /// Nobody listens there, or it is not allowed.
    pub(super) fn open(context: &Context) -> Result<Self, Failed> {
        let client = Client::connect(&context.socket).map_err(|e| {
            let absent = matches!(e.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused);
            let code = if absent { NO_DAEMON } else { 20 };
            let (socket, reason) = (context.socket.display(), reason(&e));
            let hint = if absent { "Make sure that drbdrs is running!\n" } else { "" };
            Failed::new(
                code,
                format!("Could not connect to the drbdrs daemon at '{socket}': {reason}\n{hint}"),
            )
        })?;
        Ok(Self { client, deadline: context.deadline })
    }

    /// Sends a request without time limit and hands out the connection.
    ///
    /// # Errors
    /// The daemon is gone.
    pub(super) fn watch(mut self, target: Target) -> Result<Client, Failed> {
        let request = Request::Watch { target }.enveloped();
        self.client.send(&request).map_err(|e| lost("watch", &e))?;
        Ok(self.client)
    }

    /// Sends a request and collects the answer.
    ///
    /// # Errors
    /// The daemon is gone, sends nonsense, or does not answer in time.
    pub(super) fn ask(&mut self, object: &str, request: Request) -> Result<Told, Failed> {
        let mut envelope = request.enveloped();
        envelope.timeout_ms = u64::try_from(self.deadline.as_millis()).ok();
        self.client.send(&envelope).map_err(|e| lost(object, &e))?;
        let end = Instant::now() + self.deadline;
        let mut waits_for = String::from("the daemon");
        let (mut snapshot, mut text) = (None, String::new());
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.client.next(Some(left)) {
                Ok(Some(Answer::Done(reply))) => return Ok(Told { reply, snapshot, text }),
                Ok(Some(Answer::Snapshot(s))) => snapshot = Some(*s),
                Ok(Some(Answer::Text { text: more })) => text.push_str(&more),
                Ok(Some(Answer::Waiting { reason })) => waits_for = reason,
                Ok(Some(_)) => {}
                Ok(None) => return Err(closed(object)),
                Err(e) if e.is_timeout() => {
                    let seconds = self.deadline.as_secs_f64();
                    return Err(Failed::new(
                        20,
                        format!("{object}: not done within {seconds} s, waiting for {waits_for}\n"),
                    ));
                }
                Err(e) => return Err(lost(object, &e)),
            }
        }
    }

    /// State of a target.
    ///
    /// # Errors
    /// Those of [`Session::ask`]; the inner one: the target does not exist.
    pub(super) fn snapshot(
        &mut self,
        object: &str,
        target: Target,
    ) -> Result<Result<Snapshot, Reply>, Failed> {
        let told = self.ask(object, Request::Status { target })?;
        Ok(match told.snapshot {
            Some(snapshot) if told.reply.is_success() => Ok(snapshot),
            _ if told.reply.is_success() => Ok(Snapshot::default()),
            _ => Err(told.reply),
        })
    }
}

/// The daemon is gone, or is none.
pub(super) fn lost(object: &str, error: &WireError) -> Failed {
    let reason = reason(error);
    Failed::new(20, format!("{object}: the connection to the daemon failed: {reason}\n"))
}

/// The daemon ended the connection.
pub(super) fn closed(object: &str) -> Failed {
    Failed::new(20, format!("{object}: the daemon closed the connection\n"))
}

/// The minor behind a path, which may be a link or a front end's device node.
pub(super) fn look_up(
    context: &Context,
) -> impl FnMut(&std::path::Path) -> Result<Option<u32>, Failed> {
    let context = context.clone();
    move |path| {
        if let Some(minor) = minor_of_path(path, &Snapshot::default()) {
            return Ok(Some(minor));
        }
        if !path.exists() {
            return Ok(None);
        }
        let told = Session::open(&context)?.snapshot(&path.to_string_lossy(), Target::All)?;
        Ok(told.ok().and_then(|snapshot| minor_of_path(path, &snapshot)))
    }
}

fn change(i: &Invocation) -> Result<u8, Failed> {
    let request = build(i, &mut look_up(&i.context))?;
    let object = i.shown_object();
    let mut session = Session::open(&i.context)?;
    let _lock = match lock_of(&request).filter(|_| i.command.locks) {
        Some(minor) => Some(lock::take(&i.context, minor)?),
        None => None,
    };
    let links = links_of(&mut session, &object, &request)?;
    let is_down = matches!(request, Request::Down { .. });
    let told = session.ask(&object, request)?;
    print::stdout(told.text.as_bytes());
    let reply = told.reply;
    if is_down && reply.code == Failure::ResourceUnknown.number() {
        // Down it is.
        if std::io::stderr().is_terminal() {
            print::complain("Resource unknown");
        }
        return Ok(0);
    }
    print::stderr(reply.message(&object).as_bytes());
    if reply.is_success() {
        let other = Some(i.context.socket.as_path()).filter(|_| !i.context.is_default);
        links.iter().for_each(|link| unregister(link, other));
    }
    Ok(reply.exit())
}

/// The minor whose lock a request needs.
fn lock_of(request: &Request) -> Option<u32> {
    let target = match request {
        Request::Attach { minor, .. } | Request::DelMinor { minor } => return Some(*minor),
        Request::Primary { target, .. }
        | Request::Secondary { target }
        | Request::DiskOptions { target, .. }
        | Request::Detach { target, .. }
        | Request::Resize { target, .. }
        | Request::NewCurrentUuid { target, .. }
        | Request::Invalidate { target }
        | Request::InvalidateRemote { target }
        | Request::PauseSync { target }
        | Request::ResumeSync { target }
        | Request::SuspendIo { target }
        | Request::ResumeIo { target }
        | Request::Outdate { target }
        | Request::Verify { target, .. } => target,
        _ => return None,
    };
    match target {
        Target::Minor(minor) => Some(*minor),
        Target::Resource(_) | Target::All => None,
    }
}

/// Registered configuration files that nobody needs once the request is done.
fn links_of(session: &mut Session, object: &str, request: &Request) -> Result<Vec<Link>, Failed> {
    Ok(match request {
        Request::DelMinor { minor } => vec![Link::Minor(*minor)],
        Request::DelResource { resource } => vec![Link::Resource(resource.as_str().into())],
        Request::Down { target } => {
            let all = session.snapshot(object, target.clone())?.unwrap_or_default().resources;
            let minors = |r: &drbd_admin::Resource| -> Vec<Link> {
                r.volumes.iter().map(|v| Link::Minor(v.minor)).collect()
            };
            all.iter()
                .flat_map(|r| {
                    let name = Link::Resource(r.name.as_str().into());
                    minors(r).into_iter().chain(std::iter::once(name))
                })
                .collect()
        }
        _ => Vec::new(),
    })
}
