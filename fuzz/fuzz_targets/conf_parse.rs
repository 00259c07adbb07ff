//! The configuration language: parse, resolve, expand, check, dump.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| drbdrs_fuzz_bodies::conf_parse(data));
