//! The endpoint for Prometheus: GET /metrics, and nothing else.
//!
//! No HTTP library: one fixed page, no bodies, no connection that is used twice. What a client can
//! cost is bounded: connections, bytes and time of a request, time of an answer, and how often the
//! resources are asked.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use drbd_admin::Target;
use drbd_admin::render::metrics;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};

use super::registry::Node;

/// Clients at the same time; more are sent away.
const CLIENTS_MAX: u32 = 16;
/// Longest head of a request.
const HEAD_MAX: usize = 8 << 10;
/// Longest time for a request to arrive.
const REQUEST_MAX: Duration = Duration::from_secs(5);
/// Longest time for an answer to be read.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// A page is given out again for so long, whoever asks.
const FRESH: Duration = Duration::from_millis(500);
/// Pause when there are no descriptors for another client.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// What a request comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    /// The metrics; without the page for HEAD.
    Metrics { body: bool },
    /// A refusal.
    Refused(&'static str),
}

/// The page that was made last.
#[derive(Default)]
struct Page(Mutex<Option<(Instant, Rc<str>)>>);

impl Page {
    async fn get(&self, node: &Node) -> Rc<str> {
        // One client asks the resources, the others wait for what it gets.
        let mut last = self.0.lock().await;
        if let Some((at, text)) = &*last
            && at.elapsed() < FRESH
        {
            return Rc::clone(text);
        }
        node.refresh(&Target::All).await;
        let text: Rc<str> = metrics(&node.snapshot()).into();
        *last = Some((Instant::now(), Rc::clone(&text)));
        text
    }
}

/// Counts the clients.
struct Guard(Rc<Cell<u32>>);

impl Guard {
    fn enter(count: &Rc<Cell<u32>>) -> Option<Self> {
        if count.get() >= CLIENTS_MAX {
            return None;
        }
        count.set(count.get() + 1);
        Some(Self(Rc::clone(count)))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// Serves clients, for ever.
pub(super) async fn serve(node: Rc<Node>, listener: TcpListener) {
    let count = Rc::new(Cell::new(0));
    let page = Rc::new(Page::default());
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!("metrics: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Some(guard) = Guard::enter(&count) else { continue };
        let (node, page) = (Rc::clone(&node), Rc::clone(&page));
        tokio::task::spawn_local(async move {
            let _guard = guard;
            if let Err(error) = answer(&node, &page, stream).await {
                tracing::debug!("metrics client: {error}");
            }
        });
    }
}

async fn answer(node: &Node, page: &Page, mut stream: TcpStream) -> std::io::Result<()> {
    let head = timeout(REQUEST_MAX, head(&mut stream)).await??;
    let (status, text, body) = match wanted(&head) {
        Wanted::Metrics { body } => ("200 OK", page.get(node).await, body),
        Wanted::Refused(status) => (status, format!("{status}\n").into(), true),
    };
    let allow = if status.starts_with("405") { "Allow: GET, HEAD\r\n" } else { "" };
    let mut reply = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n\
         Content-Length: {}\r\n{allow}Connection: close\r\n\r\n",
        text.len()
    );
    if body {
        reply.push_str(&text);
    }
    timeout(ANSWER_MAX, async {
        stream.write_all(reply.as_bytes()).await?;
        stream.shutdown().await
    })
    .await?
}

/// What the client sends up to the end of its head, or as much as is allowed.
async fn head(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut head = Vec::new();
    let mut limited = stream.take(u64::try_from(HEAD_MAX).unwrap_or(u64::MAX));
    while !is_complete(&head) && limited.read_buf(&mut head).await? > 0 {}
    Ok(head)
}

fn is_complete(head: &[u8]) -> bool {
    let ends_with_empty_line = |end: &[u8]| head.windows(end.len()).any(|window| window == end);
    ends_with_empty_line(b"\r\n\r\n") || ends_with_empty_line(b"\n\n")
}

/// Understands the first line; nothing else counts.
fn wanted(head: &[u8]) -> Wanted {
    if !is_complete(head) {
        return Wanted::Refused(match head.len() {
            HEAD_MAX.. => "431 Request Header Fields Too Large",
            _ => "400 Bad Request",
        });
    }
    let line = head.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let words: Vec<&[u8]> = line.trim_ascii_end().split(|byte| *byte == b' ').collect();
    let [method, target, version] = words[..] else {
        return Wanted::Refused("400 Bad Request");
    };
    if !version.starts_with(b"HTTP/1.") {
        return Wanted::Refused("505 HTTP Version Not Supported");
    }
    let path = target.split(|byte| *byte == b'?').next().unwrap_or_default();
    match (method, path) {
        (b"GET", b"/metrics") => Wanted::Metrics { body: true },
        (b"HEAD", b"/metrics") => Wanted::Metrics { body: false },
        (b"GET" | b"HEAD", _) => Wanted::Refused("404 Not Found"),
        _ => Wanted::Refused("405 Method Not Allowed"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn requests() {
        let refused = |status| Wanted::Refused(status);
        let rows = [
            ("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", Wanted::Metrics { body: true }),
            ("GET /metrics?name=r0 HTTP/1.0\n\n", Wanted::Metrics { body: true }),
            ("HEAD /metrics HTTP/1.1\r\n\r\n", Wanted::Metrics { body: false }),
            ("GET / HTTP/1.1\r\n\r\n", refused("404 Not Found")),
            ("GET /metrics/../x HTTP/1.1\r\n\r\n", refused("404 Not Found")),
            ("POST /metrics HTTP/1.1\r\n\r\n", refused("405 Method Not Allowed")),
            ("GET /metrics HTTP/2\r\n\r\n", refused("505 HTTP Version Not Supported")),
            ("GET /metrics\r\n\r\n", refused("400 Bad Request")),
            ("GET  /metrics HTTP/1.1\r\n\r\n", refused("400 Bad Request")),
            ("\r\n\r\n", refused("400 Bad Request")),
            ("GET /metrics HTTP/1.1\r\n", refused("400 Bad Request")),
            ("", refused("400 Bad Request")),
        ];
        for (head, expected) in rows {
            assert_eq!(wanted(head.as_bytes()), expected, "{head:?}");
        }
        let long = vec![b'a'; HEAD_MAX];
        assert_eq!(wanted(&long), refused("431 Request Header Fields Too Large"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(head in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = wanted(&head);
        }
    }
}
