//! The command `drbdmeta`.

fn main() {}
