//! Admin protocol: requests as the daemon takes them, answers with every status view.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| drbdrs_fuzz_bodies::admin(data));
