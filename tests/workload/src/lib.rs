//! A workload that knows what it has been promised.
//!
//! Clients write blocks that describe themselves through NBD, with many requests in flight, and a
//! [`journal`] says before each request what is about to be written and after each reply what has
//! been promised. After a crash [`verify`] reads everything and judges: for each sector the values
//! that may legally be there are known, from the last write that must have survived to the last one
//! that was asked for. The journal is a file, so that the next process goes on where one ended.
//!
//! What it can not judge: writes of others to the same device, and a server that does a request of
//! a client that is gone after a later one of the next client; all clients of a server that lives
//! on must be closed there before the next ones start.

#![forbid(unsafe_code)]

pub mod content;
pub mod journal;
pub mod ledger;
pub mod nbd;
pub mod run;
pub mod verify;
