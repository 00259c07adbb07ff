//! The replication engine: a deterministic function from events to actions.
//!
//! [`engine::Engine`] is the whole; the other modules are its parts, each with its own tests.
//! Nothing in this crate can name a clock, a socket, a file, a thread or a source of randomness.

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod action;
pub mod admin;
pub mod al;
pub mod bitmap;
pub mod config;
pub mod engine;
pub mod event;
pub mod generation;
pub mod ids;
pub mod interval;
pub mod latency;
pub mod link;
pub mod log_line;
pub mod peer_write;
pub mod plant;
pub mod request;
pub mod resync;
pub mod size;
pub mod slab;
pub mod state;

pub use engine::Engine;
