//! The negotiation of the NBD server.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| drbdrs_fuzz_bodies::nbd_handshake(data));
