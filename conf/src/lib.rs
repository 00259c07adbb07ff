//! The configuration language of DRBD 8.3 and 8.4.
