//! What the benchmarks share: the client that loads every server alike, and the costs of processes.

pub mod load;
pub mod process;
