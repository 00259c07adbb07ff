//! The engine against a peer that is played packet by packet: every packet type, at the right and at
//! the wrong time. Spec: wire-protocol.md §4.2, §5.5, §6, §8, §9, §16; io-path-and-resync.md §13.5.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::cast_possible_truncation, reason = "small numbers")]

mod bad;
mod conflicts;
mod defects;
mod disk;
mod frozen;
mod generations;
mod grow;
mod matrix;
mod peer;
mod resync;
mod rig;
mod traps;
mod writes;

/// The table names only tests that exist.
#[test]
fn the_table_of_defects_names_tests_of_this_suite() {
    let table = include_str!("../../../docs/defects.md");
    let sources = [
        include_str!("defects.rs"),
        include_str!("generations.rs"),
        include_str!("peer.rs"),
        include_str!("resync.rs"),
        include_str!("traps.rs"),
        include_str!("writes.rs"),
        include_str!("../../src/peer_write/epochs.rs"),
        include_str!("../../src/request/progress.rs"),
    ]
    .concat();
    let names = table.split('`').filter(|word| {
        word.starts_with("defect_") || word.starts_with("trap_") || word.starts_with("a_late")
    });
    let mut count = 0;
    for name in names {
        assert!(sources.contains(&format!("fn {name}(")), "{name} is nowhere");
        count += 1;
    }
    assert!(count > 40, "{count}");
}
