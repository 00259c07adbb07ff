//! Streams of packets: both streams, all phases, versions and features.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| drbdrs_fuzz_bodies::packets(data));
