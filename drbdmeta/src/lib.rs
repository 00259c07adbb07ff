//! DRBD meta-data on disk: library and command.
