//! Compressed bitmaps: decoded, and made again.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| drbdrs_fuzz_bodies::bitmap_rle(data));
