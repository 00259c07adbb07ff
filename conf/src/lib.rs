//! The configuration language of DRBD 8.3 and 8.4 (and two-node files of version 9).
//!
//! `parse` reads, `resolve` finds this host's side, `expand` inherits, `check` complains, `dump`
//! prints; `effective` says what applies and where it was written. `options` is the one table of
//! option names, ranges, units and defaults. `settings` are drbdrs' own settings (TOML).
//! Entry point: [`parse::load`].

#![forbid(unsafe_code)]
#![warn(clippy::indexing_slicing)]

mod keyword;
mod lex;

pub mod check;
pub mod diag;
pub mod dump;
pub mod effective;
pub mod expand;
pub mod measure;
pub mod model;
pub mod options;
pub mod parse;
pub mod resolve;
pub mod settings;
pub mod source;
