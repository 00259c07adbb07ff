//! Lines on the socket, and a blocking client.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use drbd_types::Failure;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{Answer, Envelope, LINE_MAX, Reply, VERSION};

/// What goes wrong with lines.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The socket.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// A line is too long.
    #[error("a line is longer than {0} bytes")]
    TooLong(usize),
    /// A line is cut off.
    #[error("the connection ended within a line")]
    Cut,
    /// A line is not what it should be.
    #[error("not understood: {0}")]
    Json(#[from] serde_json::Error),
}

impl WireError {
    /// Nothing came in time.
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        let kind = |e: &io::Error| e.kind();
        matches!(self, Self::Io(e)
            if matches!(kind(e), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut))
    }
}

/// A message as a line.
///
/// # Errors
/// A text in it can not be written as JSON.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, WireError> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(line)
}

/// The message of a line, with or without its end.
///
/// # Errors
/// Not JSON, or another message; the error says what was expected.
pub fn decode<T: DeserializeOwned>(line: &[u8]) -> Result<T, WireError> {
    Ok(serde_json::from_slice(line)?)
}

/// A request as the daemon takes it: version known, members known, values of options possible.
///
/// # Errors
/// Failure 126 with an explanation, to be sent as the answer.
pub fn request(line: &[u8]) -> Result<Envelope, Reply> {
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let refuse = |text: String| Reply::failed(Failure::BadRequest, &text);
    let Version { version } = decode(line).map_err(|e| refuse(e.to_string()))?;
    if version != VERSION {
        return Err(refuse(format!(
            "version {version} of the admin protocol is not spoken here, only {VERSION}"
        )));
    }
    let envelope: Envelope = decode(line).map_err(|e| refuse(e.to_string()))?;
    envelope.request.check().map_err(|e| refuse(e.to_string()))?;
    Ok(envelope)
}

/// Reads a line of at most `max` bytes into `line`, which may hold the beginning of it from an
/// earlier call that ran into a time-out. False: the stream ended before the line began.
///
/// # Errors
/// The stream fails, ends within the line, or the line is too long.
pub fn read_line(
    from: &mut impl BufRead,
    line: &mut Vec<u8>,
    max: usize,
) -> Result<bool, WireError> {
    let room = u64::try_from(max.saturating_sub(line.len())).unwrap_or(u64::MAX);
    from.take(room).read_until(b'\n', line)?;
    match line.last() {
        Some(b'\n') => Ok(true),
        None => Ok(false),
        Some(_) if line.len() >= max => Err(WireError::TooLong(max)),
        Some(_) => Err(WireError::Cut),
    }
}

/// A connection to the daemon.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
    line: Vec<u8>,
}

impl Client {
    /// Connects to a daemon.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        Ok(Self { stream: BufReader::new(stream), line: Vec::new() })
    }

    /// Is nothing read ahead? Then the socket tells when there is more.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.stream.buffer().is_empty()
    }

    /// Sends a request.
    ///
    /// # Errors
    /// The daemon is gone.
    pub fn send(&mut self, request: &Envelope) -> Result<(), WireError> {
        let line = encode(request)?;
        self.stream.get_mut().write_all(&line)?;
        Ok(())
    }

    /// The next line of the answer; `None`: the daemon closed the connection.
    ///
    /// After a time-out ([`WireError::is_timeout`]) it can be called again.
    ///
    /// # Errors
    /// Nothing came within `timeout`, the daemon is gone, or sent something unknown.
    pub fn next(&mut self, timeout: Option<Duration>) -> Result<Option<Answer>, WireError> {
        // A time-out of zero would mean none.
        let timeout = timeout.map(|t| t.max(Duration::from_millis(1)));
        self.stream.get_ref().set_read_timeout(timeout)?;
        if !read_line(&mut self.stream, &mut self.line, LINE_MAX)? {
            return Ok(None);
        }
        let answer = decode(&self.line);
        self.line.clear();
        answer.map(Some)
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.get_ref().as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Reply, Request, Target};

    #[test]
    fn lines_are_bounded_and_complete() {
        let read = |text: &[u8], max| {
            let mut line = Vec::new();
            let result = read_line(&mut BufReader::new(text), &mut line, max);
            result.map(|more| (more, line)).map_err(|e| e.to_string())
        };
        assert_eq!(read(b"ab\ncd\n", 10), Ok((true, b"ab\n".to_vec())));
        assert_eq!(read(b"ab\n", 3), Ok((true, b"ab\n".to_vec())));
        assert_eq!(read(b"abc\n", 3), Err("a line is longer than 3 bytes".into()));
        assert_eq!(read(b"", 3), Ok((false, vec![])));
        assert_eq!(read(b"ab", 3), Err("the connection ended within a line".into()));
    }

    #[test]
    fn requests_are_refused_with_a_reason() {
        let reason = |line: &str| request(line.as_bytes()).unwrap_err().info.join("");
        assert_eq!(request(b"x").unwrap_err().code, 126);
        assert_eq!(
            reason(r#"{"version":2,"request":{"command":"later"}}"#),
            "version 2 of the admin protocol is not spoken here, only 1"
        );
        assert!(reason(r#"{"version":1,"request":{"command":"later"}}"#).contains("later"));
        let options = r#"{"version":1,"request":{"command":"new-resource","resource":"r","options":{"on-no-data-accessible":"x"}}}"#;
        assert_eq!(reason(options), r#"Option --on-no-data-accessible: invalid argument '"x"'"#);
        let size = r#"{"version":1,"request":{"command":"disk-options","target":"all","options":{"size":8}}}"#;
        assert_eq!(reason(size), "unknown option 'size'");
        let fine = r#"{"version":1,"request":{"command":"disk-options","target":"all"}}"#;
        assert!(request(fine.as_bytes()).is_ok());
        for name in ["", "a/b", "a\nb"] {
            let line = encode(&Request::DelResource { resource: name.into() }.enveloped()).unwrap();
            assert!(request(&line).unwrap_err().info[0].contains("name"), "{name:?}");
        }
    }

    #[test]
    fn client_and_server_understand_each_other() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut client = Client { stream: BufReader::new(ours), line: Vec::new() };
        let request = Request::Secondary { target: Target::Minor(7) }.enveloped();
        client.send(&request).unwrap();
        let mut line = Vec::new();
        read_line(&mut BufReader::new(&theirs), &mut line, crate::REQUEST_MAX).unwrap();
        assert_eq!(decode::<Envelope>(&line).unwrap(), request);

        assert!(client.next(Some(Duration::ZERO)).unwrap_err().is_timeout());
        // Half a line before the time-out is not lost.
        theirs.write_all(b"{\"answer\":\"done\",").unwrap();
        assert!(client.next(Some(Duration::from_millis(1))).unwrap_err().is_timeout());
        theirs.write_all(b"\"code\":1}\n").unwrap();
        assert_eq!(client.next(None).unwrap(), Some(Answer::Done(Reply::SUCCESS)));
        drop(theirs);
        assert_eq!(client.next(None).unwrap(), None);
    }
}
