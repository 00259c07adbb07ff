//! DRBD peer protocol 86..101: bytes to typed packets and back.
