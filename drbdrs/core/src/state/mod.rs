//! The state of a volume: what a requested change becomes, whether it is allowed, whom it
//! concerns, and what the log says about it.
//!
//! A change runs through these functions in this order, whoever asks for it:
//!
//! ```text
//! cluster::apply -> sanitize::sanitize -> check::hard | check::check -> cluster::cluster_wide
//! ```
//!
//! All are pure functions of the old and the new fields. Nothing here stores a state or carries
//! out a consequence. Rules bear the numbers of the specification's tables.
//! Spec: states-and-generations.md §1, §2, §3.6.

pub mod check;
pub mod cluster;
#[cfg(test)]
mod exhaustive;
pub mod facts;
pub mod line;
#[cfg(test)]
mod recorded;
pub mod sanitize;
