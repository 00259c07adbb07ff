//! The admin socket: who may ask what, deadlines, streams. The protocol is described in
//! `drbdrs/docs/admin-protocol.md`.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use drbd_admin::{Answer, Envelope, REQUEST_MAX, Reply, Request, Target, wire};
use drbd_types::Failure;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::registry::{Item, Node};
use super::takeover::Stage;
use super::{commands, why};

/// Clients at the same time.
const CLIENTS_MAX: u32 = 512;
/// Clients of other users, who may only look.
const GUESTS_MAX: u32 = 128;
/// A command without a time limit of its own ends its wait after this.
const DEADLINE: Duration = Duration::from_secs(600);
/// When a command has taken so long, its client is told what it waits for; and as often again.
const EXPLAIN: Duration = Duration::from_millis(300);
/// A client that does not read for so long is given up.
const WRITE_MAX: Duration = Duration::from_secs(30);
/// Pause when there are no descriptors for another client.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Counts the clients.
#[derive(Default)]
struct Count {
    all: Cell<u32>,
    guests: Cell<u32>,
}

struct Guard {
    count: Rc<Count>,
    is_guest: bool,
}

impl Guard {
    fn enter(count: &Rc<Count>, is_guest: bool) -> Option<Self> {
        let (all, guests) = (count.all.get(), count.guests.get());
        if all >= CLIENTS_MAX || (is_guest && guests >= GUESTS_MAX) {
            return None;
        }
        count.all.set(all + 1);
        count.guests.set(guests + u32::from(is_guest));
        Some(Self { count: Rc::clone(count), is_guest })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.count.all.set(self.count.all.get() - 1);
        self.count.guests.set(self.count.guests.get() - u32::from(self.is_guest));
    }
}

/// Serves clients, for ever.
pub(super) async fn serve(node: Rc<Node>, listener: UnixListener) {
    let count = Rc::new(Count::default());
    let own = rustix::process::geteuid().as_raw();
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!("admin socket: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(peer) = stream.peer_cred() else { continue };
        let is_guest = peer.uid() != 0 && peer.uid() != own;
        let Some(guard) = Guard::enter(&count, is_guest) else {
            tracing::warn!("admin socket: too many clients, one of uid {} refused", peer.uid());
            continue;
        };
        let node = Rc::clone(&node);
        tokio::task::spawn_local(async move {
            let _guard = guard;
            if let Err(error) = Client::new(node, stream, is_guest).run().await {
                tracing::debug!("admin client: {error}");
            }
        });
    }
}

struct Client {
    node: Rc<Node>,
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    is_guest: bool,
}

type Io = std::io::Result<()>;

fn closed() -> std::io::Error {
    std::io::ErrorKind::UnexpectedEof.into()
}

impl Client {
    fn new(node: Rc<Node>, stream: UnixStream, is_guest: bool) -> Self {
        let (reader, writer) = stream.into_split();
        Self { node, reader: BufReader::new(reader), writer, is_guest }
    }

    async fn run(mut self) -> Io {
        let mut line = Vec::new();
        let max = u64::try_from(REQUEST_MAX).unwrap_or(u64::MAX);
        loop {
            line.clear();
            let got = (&mut self.reader).take(max).read_until(b'\n', &mut line).await?;
            if got == 0 {
                return Ok(());
            }
            if line.last() != Some(&b'\n') {
                if line.len() >= REQUEST_MAX {
                    let text = format!("a request has at most {REQUEST_MAX} bytes");
                    self.done(Reply::failed(Failure::BadRequest, &text)).await?;
                }
                return Ok(());
            }
            match wire::request(&line) {
                Ok(envelope) if self.is_guest && !envelope.request.is_read_only() => {
                    self.done(Reply::failed(Failure::Permission, "")).await?;
                }
                Ok(envelope) => self.answer(envelope).await?,
                Err(reply) => self.done(reply).await?,
            }
        }
    }

    async fn answer(&mut self, envelope: Envelope) -> Io {
        self.node.will.reaches(Stage::Promoting).await;
        match envelope.request {
            Request::Status { target } => {
                self.node.refresh(&target).await;
                match self.node.snapshot().select(&target) {
                    Ok(mut snapshot) => {
                        if self.is_guest {
                            why::without_secrets(&mut snapshot);
                        }
                        self.write(&Answer::Snapshot(Box::new(snapshot))).await?;
                        self.done(Reply::SUCCESS).await
                    }
                    Err(reply) => self.done(reply).await,
                }
            }
            Request::Watch { target } => self.watch(&target).await,
            Request::ShowStuck { target } => {
                self.node.refresh(&target).await;
                let exists = self.node.snapshot().select(&target).map(|_| ());
                let text = why::stuck(&self.node, &target);
                self.text(exists, text).await
            }
            Request::Why { target } => {
                self.node.refresh(&target).await;
                match self.node.snapshot().select(&target) {
                    Ok(snapshot) => {
                        let text = why::why(&self.node, &snapshot);
                        self.text(Ok(()), text).await
                    }
                    Err(reply) => self.done(reply).await,
                }
            }
            request => {
                let limit = envelope.timeout_ms.map_or(DEADLINE, Duration::from_millis);
                self.change(request, limit.min(DEADLINE)).await
            }
        }
    }

    async fn text(&mut self, exists: Result<(), Reply>, text: String) -> Io {
        match exists {
            Ok(()) => {
                self.write(&Answer::Text { text }).await?;
                self.done(Reply::SUCCESS).await
            }
            Err(reply) => self.done(reply).await,
        }
    }

    /// A command that changes something: carried out by a task of its own, which goes on when the
    /// client is gone.
    async fn change(&mut self, request: Request, limit: Duration) -> Io {
        let end = Instant::now() + limit;
        let shown = request.clone();
        let node = Rc::clone(&self.node);
        let (to, mut answer) = oneshot::channel();
        let (turn, my_turn) = oneshot::channel::<()>();
        tokio::task::spawn_local(async move {
            // Nobody waits for it any more: it is not even begun.
            if my_turn.await.is_err() {
                return;
            }
            let reply = commands::run(&node, request).await;
            let _ = to.send(reply);
        });
        let mut turn = Some(turn);
        // The next command of this resource waits for this one, as long as the client does.
        let (place, asked) = (Rc::clone(&self.node), shown.clone());
        let lock = async move {
            place.will.reaches(Stage::Done).await;
            let order = if may_overtake(&asked) { None } else { order_of(&place, &asked) };
            match order {
                Some(order) => Some(order.lock_owned().await),
                None => None,
            }
        };
        tokio::pin!(lock);
        let mut held = None;
        let mut told = String::new();
        let mut next = Instant::now() + EXPLAIN;
        let mut may_close = true;
        loop {
            tokio::select! {
                biased;
                reply = &mut answer => {
                    let reply = reply.unwrap_or_else(|_| super::registry::gone());
                    drop(held);
                    return self.done(reply).await;
                }
                lock = &mut lock, if turn.is_some() => {
                    held = lock;
                    if let Some(turn) = turn.take() {
                        let _ = turn.send(());
                    }
                }
                more = self.reader.fill_buf(), if may_close => {
                    if more?.is_empty() {
                        return Err(closed());
                    }
                    // The next request is there already.
                    may_close = false;
                }
                () = tokio::time::sleep_until(next.min(end)) => {
                    let reason = if turn.is_some() {
                        "another command for the same resource".to_owned()
                    } else {
                        why::waiting(&self.node, &shown)
                    };
                    if Instant::now() >= end {
                        let text = format!(
                            "not done within {} s, waiting for {reason}; it goes on",
                            limit.as_secs_f64()
                        );
                        return self.done(Reply::failed(Failure::Interrupted, &text)).await;
                    }
                    next = Instant::now() + EXPLAIN;
                    if reason != told {
                        told.clone_from(&reason);
                        self.write(&Answer::Waiting { reason }).await?;
                    }
                }
            }
        }
    }

    /// A snapshot, and then everything that changes.
    async fn watch(&mut self, target: &Target) -> Io {
        self.node.refresh(target).await;
        // Without an await between: no change is missed or seen twice.
        let mut items = self.node.subscribe();
        let mut snapshot = self.node.snapshot();
        snapshot = match snapshot.clone().select(target) {
            Ok(selected) => selected,
            Err(_) => {
                snapshot.resources.clear();
                snapshot
            }
        };
        if self.is_guest {
            why::without_secrets(&mut snapshot);
        }
        let mut filter = Filter { target, was_there: !snapshot.resources.is_empty() };
        self.write(&Answer::Snapshot(Box::new(snapshot))).await?;
        let mut scratch = [0; 256];
        loop {
            tokio::select! {
                item = items.recv() => match item {
                    Ok(item) => {
                        if let Some(answer) = filter.pass(&self.node, &item, self.is_guest) {
                            self.write(&answer).await?;
                        }
                    }
                    Err(RecvError::Lagged(count)) => self.write(&Answer::Skipped { count }).await?,
                    Err(RecvError::Closed) => return Ok(()),
                },
                got = self.reader.read(&mut scratch) => if got? == 0 {
                    return Ok(());
                },
            }
        }
    }

    async fn done(&mut self, reply: Reply) -> Io {
        self.write(&Answer::Done(reply)).await
    }

    async fn write(&mut self, answer: &Answer) -> Io {
        let line = wire::encode(answer).map_err(std::io::Error::other)?;
        let written = tokio::time::timeout(WRITE_MAX, self.writer.write_all(&line)).await;
        written.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
    }
}

/// These are the way out when another command is stuck.
fn may_overtake(request: &Request) -> bool {
    matches!(
        request,
        Request::Detach { force: true, .. }
            | Request::Disconnect { force: true, .. }
            | Request::ResumeIo { .. }
            | Request::FaultSet { .. }
            | Request::FaultClear { .. }
    )
}

fn order_of(node: &Node, request: &Request) -> Option<Arc<tokio::sync::Mutex<()>>> {
    let id = node.id_of(&why::resource_of(node, request)?)?;
    node.with(id, |r| Arc::clone(&r.order))
}

/// What a watcher gets to see.
struct Filter<'a> {
    target: &'a Target,
    was_there: bool,
}

impl Filter<'_> {
    fn pass(&mut self, node: &Node, item: &Item, is_guest: bool) -> Option<Answer> {
        let mut answer = item.answer.clone();
        if is_guest
            && let Answer::Update(update) = &mut answer
            && let Some(resource) = &mut update.resource
        {
            why::hide(resource);
        }
        match self.target {
            Target::All => Some(answer),
            Target::Resource(name) => (item.resource == *name).then_some(answer),
            Target::Minor(minor) => self.of_minor(node, *minor, answer, &item.resource),
        }
    }

    fn of_minor(
        &mut self,
        node: &Node,
        minor: u32,
        mut answer: Answer,
        resource: &str,
    ) -> Option<Answer> {
        match &mut answer {
            Answer::Update(update) => {
                if let Some(resource) = &mut update.resource {
                    resource.volumes.retain(|v| v.minor == minor);
                    if resource.volumes.is_empty() {
                        update.resource = None;
                    }
                }
                let is_there = update.resource.is_some();
                // Another resource that never had it is of no interest.
                let owner =
                    node.volume_of(minor).and_then(|(id, _)| node.with(id, |r| r.name.clone()));
                let is_other = owner.is_some_and(|owner| owner != resource);
                if is_other || (!is_there && !self.was_there) {
                    return None;
                }
                self.was_there = is_there;
                Some(answer)
            }
            Answer::Helper(call) => {
                call.volume.is_some_and(|(_, of)| of == minor).then_some(answer)
            }
            Answer::Progress { minor: of, .. } => (*of == minor).then_some(answer),
            _ => Some(answer),
        }
    }
}
