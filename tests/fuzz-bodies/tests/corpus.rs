//! Replays corpora and past failures of all fuzz targets with the ordinary compiler.

use std::path::Path;

#[test]
fn corpora_and_regressions_hold() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let fuzz = here.ancestors().nth(2).unwrap().join("fuzz");
    type Body = fn(&[u8]);
    let targets: [(&str, Body); 7] = [
        ("admin", drbdrs_fuzz_bodies::admin),
        ("bitmap_rle", drbdrs_fuzz_bodies::bitmap_rle),
        ("conf_parse", drbdrs_fuzz_bodies::conf_parse),
        ("engine", drbdrs_fuzz_bodies::engine),
        ("meta_data", drbdrs_fuzz_bodies::meta_data),
        ("nbd_handshake", drbdrs_fuzz_bodies::nbd_handshake),
        ("packets", drbdrs_fuzz_bodies::packets),
    ];
    for (target, body) in targets {
        let mut count = 0;
        for folder in ["corpus", "regressions"] {
            let Ok(entries) = std::fs::read_dir(fuzz.join(folder).join(target)) else { continue };
            for entry in entries {
                body(&std::fs::read(entry.unwrap().path()).unwrap());
                count += 1;
            }
        }
        assert!(count > 50, "{target}: only {count} inputs");
    }
}
