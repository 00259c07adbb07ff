//! Task runner: demo, test, lint, deps, fuzz, bench.

fn main() {}
