//! A daemon that is a thread of the test.

#![allow(dead_code, unreachable_pub, reason = "every suite uses another part")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};

use drbd_admin::{Answer, Envelope, Request, wire};

/// A daemon that answers every request with what the script says, and tells the requests.
pub struct Daemon {
    folder: tempfile::TempDir,
    pub requests: Receiver<Envelope>,
}

/// What a line of the daemon is.
pub enum Say {
    Line(Answer),
    /// Nothing more, but the connection stays.
    Hang,
}

impl Daemon {
    pub fn new(script: impl Fn(&Request) -> Vec<Say> + Send + 'static) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("sock")).unwrap();
        let (send, requests) = channel();
        std::thread::spawn(move || {
            // Connections that are to hang stay here.
            let mut kept = Vec::new();
            for stream in listener.incoming() {
                let mut stream: UnixStream = stream.unwrap();
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                let mut line = String::new();
                while reader.read_line(&mut line).is_ok_and(|n| n > 0) {
                    let envelope: Envelope = wire::decode(line.as_bytes()).unwrap();
                    line.clear();
                    let says = script(&envelope.request);
                    if send.send(envelope).is_err() {
                        return;
                    }
                    let mut hangs = false;
                    for say in says {
                        match say {
                            Say::Line(answer) => {
                                if stream.write_all(&wire::encode(&answer).unwrap()).is_err() {
                                    break;
                                }
                            }
                            Say::Hang => hangs = true,
                        }
                    }
                    if hangs {
                        kept.push(stream.try_clone().unwrap());
                        break;
                    }
                }
            }
        });
        Self { folder, requests }
    }

    pub fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_drbdsetup"));
        command.args(line.split_whitespace()).env("DRBDRS_ADMIN_SOCKET", self.socket());
        command.stdin(Stdio::null());
        command
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("sock")
    }

    pub fn run(&self, line: &str) -> (i32, String, String) {
        texts(self.command(line).output().unwrap())
    }

    /// The requests so far.
    pub fn told(&self) -> Vec<Request> {
        self.requests.try_iter().map(|e| e.request).collect()
    }
}

pub fn texts(output: Output) -> (i32, String, String) {
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}
