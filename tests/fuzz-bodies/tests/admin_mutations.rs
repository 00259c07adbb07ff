//! Snapshots with impossible numbers, names and states: no view panics, none takes long.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use serde_json::Value;

/// xorshift; the seed is the test's name.
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

fn mutate(value: &mut Value, chance: &mut Chance) {
    if chance.next().is_multiple_of(12) {
        match value {
            Value::Number(_) => {
                let extremes = [0, 1, 255, 65_535, u64::from(u32::MAX), u64::MAX - 1, u64::MAX];
                let random = chance.next() >> (chance.next() % 64);
                let pick = usize::try_from(chance.next() % 10).unwrap();
                *value = extremes.get(pick).copied().unwrap_or(random).into();
            }
            Value::String(text) if chance.next().is_multiple_of(4) => {
                text.push_str(" \u{1b}\n:;\"\\")
            }
            Value::Bool(b) => *b = !*b,
            Value::Array(list) if chance.next().is_multiple_of(2) => {
                if let Some(first) = list.first().cloned() {
                    list.push(first);
                }
            }
            _ => {}
        }
    }
    match value {
        Value::Array(list) => list.iter_mut().for_each(|v| mutate(v, chance)),
        Value::Object(object) => object.values_mut().for_each(|v| mutate(v, chance)),
        _ => {}
    }
}

#[test]
fn no_snapshot_breaks_a_view() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/admin");
    let mut chance = Chance(0x9E37_79B9_7F4A_7C15);
    let mut decoded = 0;
    for entry in std::fs::read_dir(corpus).unwrap() {
        let data = std::fs::read(entry.unwrap().path()).unwrap();
        let Ok(value) = serde_json::from_slice::<Value>(&data[1..]) else { continue };
        for _ in 0..15 {
            let mut value = value.clone();
            mutate(&mut value, &mut chance);
            let line = [vec![data[0]], serde_json::to_vec(&value).unwrap()].concat();
            let is_answer = drbd_admin::wire::decode::<drbd_admin::Answer>(&line[1..]).is_ok();
            decoded += usize::from(is_answer);
            drbdrs_fuzz_bodies::admin(&line);
        }
    }
    assert!(decoded > 500, "only {decoded} mutations are still answers");
}
