//! Handles that engine and shell exchange. All are plain numbers without meaning of their own.

macro_rules! handle {
    ($(#[$doc:meta])* $name:ident($raw:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $raw);
    };
}

handle! {
    /// One disk or meta-data action. Chosen by the engine, never used twice in its life; every
    /// action that carries one is answered by exactly one event that carries it.
    IoId(u64)
}
handle! {
    /// One request of the upper layer. Chosen by the shell, unique among the open ones.
    AppId(u64)
}
handle! {
    /// A payload buffer in the shell's pool.
    BufId(u32)
}
handle! {
    /// One send whose hand-over to the transport the engine wants to know.
    SendToken(u64)
}
handle! {
    /// One call of a handler program.
    CallId(u32)
}
handle! {
    /// One command of the administrator.
    Ticket(u32)
}
handle! {
    /// A socket. Chosen by the shell, never used twice in the life of a link.
    SocketId(u32)
}
