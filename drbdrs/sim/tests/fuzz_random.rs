//! The fuzz body of the engine with random bytes. `FUZZ_SEEDS=from..to` runs others, or more;
//! `FUZZ_CORPUS=folder` keeps the inputs.

use drbd_sim::chance::Chance;

fn bytes(seed: u64) -> Vec<u8> {
    let mut chance = Chance::new(seed);
    let len = 40 + chance.below(2000);
    // Runs of small numbers lead further than noise.
    (0..len).map(|_| u8::try_from(chance.any() >> 56 >> chance.below(3)).unwrap_or(0)).collect()
}

#[test]
fn random_events_break_no_promise() {
    let range = std::env::var("FUZZ_SEEDS").unwrap_or_else(|_| "0..300".into());
    let (from, to) = range.split_once("..").expect("from..to");
    let (from, to): (u64, u64) = (from.parse().expect("from"), to.parse().expect("to"));
    let mut broken = Vec::new();
    let corpus = std::env::var_os("FUZZ_CORPUS").map(std::path::PathBuf::from);
    for seed in from..to {
        if let Some(folder) = &corpus {
            std::fs::write(folder.join(format!("{seed:05}")), bytes(seed)).expect("writable");
        }
        if std::panic::catch_unwind(|| drbd_sim::fuzz::engine(&bytes(seed))).is_err() {
            eprintln!("seed {seed}");
            broken.push(seed);
            if broken.len() > 5 {
                break;
            }
        }
    }
    assert!(broken.is_empty(), "seeds {broken:?}");
}
