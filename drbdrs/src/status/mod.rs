//! What people and monitoring programs look at.

pub mod file;
