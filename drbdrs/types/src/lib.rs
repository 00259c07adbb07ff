//! Units, numbers and every user-visible spelling of drbdrs.
