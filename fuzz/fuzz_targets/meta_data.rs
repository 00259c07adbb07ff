//! Meta-data: superblocks, activity logs, text dumps, notes.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| drbdrs_fuzz_bodies::meta_data(data));
