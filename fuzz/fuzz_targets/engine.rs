//! The whole engine: events of a hostile peer, failing disks, a restless administrator.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| drbdrs_fuzz_bodies::engine(data));
