//! drbdadm: from drbd.conf to steps, printed or run.

fn main() {}
