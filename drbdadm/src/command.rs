//! The one table of commands. Spec: config-and-drbdadm.md §9; order of the help text §7.6, §7.7.

/// What a command works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Once for each volume; a volume may be named.
    Volume,
    /// Needs one volume.
    OneVolume,
    /// The whole resource.
    Resource,
    /// No resource.
    Nothing,
}

/// Time limit of backend calls. Spec §8.3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeClass {
    /// `cmd-timeout-short`.
    Short,
    /// `cmd-timeout-medium`.
    Medium,
    /// `cmd-timeout-long`.
    Long,
    /// No limit.
    None,
}

/// How a command is carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// `drbdsetup-84 NAME MINOR opts`.
    SetupMinor,
    /// `drbdsetup-84 NAME RES opts`.
    SetupResource,
    /// `drbdmeta MINOR v08 MD MIDX NAME opts`.
    Meta,
    /// drbdsetup, and if it can not do it drbdmeta. Spec §9.1.
    SetupOrMeta,
    /// Spec §9: apply-al, then attach.
    Attach,
    /// `connect`.
    Connect,
    /// `net-options`.
    NetOptions,
    /// `disconnect`.
    Disconnect,
    /// `up`.
    Up,
    /// `resize`.
    Resize,
    /// `check-resize`.
    CheckResize,
    /// `outdate`.
    Outdate,
    /// `adjust`, `adjust-with-progress`.
    Adjust,
    /// `wait-connect`.
    WaitConnect,
    /// `wait-con-int`.
    WaitConInt,
    /// `dump`, `dump-xml`.
    Dump,
    /// `create-md`.
    CreateMd,
    /// `new-resource`.
    NewResource,
    /// `new-minor`, `sh-new-minor`.
    NewMinor,
    /// `proxy-up`, `proxy-down`.
    Proxy,
    /// A handler.
    Handler,
    /// An `sh-` command that prints.
    Sh,
    /// `sh-b-pri`.
    ShBecomePrimary,
    /// `sh-status`.
    ShStatus,
    /// Prints the list of hidden commands.
    Hidden,
    /// 8.3's `syncer`.
    Syncer,
    /// Our own commands: lint, completion, man.
    Native,
    /// `check`.
    Check,
    /// `split-brain explain`.
    ExplainSplitBrain,
    /// `split-brain resolve`.
    ResolveSplitBrain,
}

/// In which list of the help a command stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Block {
    /// Usual commands.
    Normal,
    /// For shell scripts.
    Scripts,
    /// Called by the engine.
    Handlers,
    /// For experts.
    Experts,
    /// Known, but in no list of the original.
    Unlisted,
}

/// One command.
#[derive(Debug, PartialEq, Eq)]
pub struct Command {
    /// Its name.
    pub name: &'static str,
    /// What it works on.
    pub level: Level,
    /// Verifies the own address.
    pub ip: bool,
    /// Needs the peer.
    pub peer: bool,
    /// Limit of its backend calls.
    pub time: TimeClass,
    /// How it is carried out.
    pub action: Action,
    /// Where the help lists it.
    pub block: Block,
    /// One line for manual and completion.
    pub help: &'static str,
}

impl Command {
    /// `dump` and `dump-xml` show what is written; other commands what applies.
    pub fn is_dump(&self) -> bool {
        self.action == Action::Dump
    }

    /// Names for resources are needed.
    pub fn needs_names(&self) -> bool {
        let may_mean_all = matches!(self.action, Action::Check | Action::ExplainSplitBrain);
        self.level != Level::Nothing && !self.is_dump() && self.name != "status" && !may_mean_all
    }

    /// Options that only drbdrs has; all but those of `status` take a value.
    pub fn own_options(&self) -> &'static [&'static str] {
        match self.action {
            Action::Check => &crate::check::OPTIONS,
            Action::ResolveSplitBrain => &["keep", "yes-lose-changes-of"],
            _ if self.name == "status" => &["json", "watch"],
            _ => &[],
        }
    }
}

macro_rules! commands {
    ($( $block:ident $name:literal $level:ident $ip:literal $peer:literal $time:ident $action:ident $help:literal; )*) => {
        /// All commands, in the order of the help texts.
        pub static COMMANDS: &[Command] = &[ $( Command {
            name: $name, level: Level::$level, ip: $ip, peer: $peer, time: TimeClass::$time,
            action: Action::$action, block: Block::$block, help: $help,
        }, )* ];
    };
}

commands! {
    Normal "attach" Volume false false Medium Attach "attach the backing disk";
    Normal "status" Resource false false Short SetupResource "show the status";
    Normal "disk-options" Volume false false Medium SetupMinor "change options of an attached disk";
    Normal "detach" Volume false false Medium SetupMinor "detach the backing disk";
    Normal "connect" Resource true true Short Connect "connect to the peer";
    Normal "net-options" Resource true true Short NetOptions "change options of the connection";
    Normal "disconnect" Resource false false Short Disconnect "end the connection";
    Normal "up" Volume true true Medium Up "create, attach and connect";
    Normal "resource-options" Resource false false Short SetupResource "change options of the resource";
    Normal "down" Resource false false Medium SetupResource "disconnect, detach and remove";
    Normal "primary" Volume false false Medium SetupMinor "make this node Primary";
    Normal "secondary" Volume false false Medium SetupMinor "make this node Secondary";
    Normal "invalidate" Volume false false Short SetupOrMeta "the local data is not to be used";
    Normal "invalidate-remote" Volume true false Medium SetupMinor "the peer's data is not to be used";
    Normal "outdate" Volume false false Short Outdate "the local data is known to be old";
    Normal "resize" Volume true false Short Resize "use the new size of the backing disks";
    Normal "verify" Volume true false Short SetupMinor "compare the disks of both nodes";
    Normal "pause-sync" Volume true false Short SetupMinor "pause the resync";
    Normal "resume-sync" Volume true false Short SetupMinor "go on with the resync";
    Normal "adjust" Resource true true Short Adjust "make the running state equal to the file";
    Normal "adjust-with-progress" Resource true true Short Adjust "the same, showing steps";
    Normal "wait-connect" Volume true false None WaitConnect "wait for the peer";
    Normal "wait-con-int" Nothing false false None WaitConInt "wait for all peers, with a dialog";
    Normal "role" Volume false false Short SetupMinor "show the roles";
    Normal "cstate" Volume false false Short SetupMinor "show the connection state";
    Normal "dstate" Volume false false Short SetupOrMeta "show the disk states";
    Normal "dump" Resource true false Short Dump "print the configuration";
    Normal "dump-xml" Resource true false Short Dump "print the configuration as XML";
    Normal "create-md" Volume false false Long CreateMd "initialise the meta-data";
    Normal "show-gi" Volume false false Short SetupOrMeta "explain the data generations";
    Normal "get-gi" Volume false false Short SetupOrMeta "show the data generations";
    Normal "dump-md" Volume false false Long Meta "print the meta-data";
    Normal "wipe-md" Volume false false Long Meta "destroy the meta-data";
    Normal "apply-al" Volume false false Long Meta "apply the activity log";
    Normal "hidden-commands" Nothing false false None Hidden "list further commands";

    Scripts "sh-nop" Nothing false false None Sh "check the configuration";
    Scripts "sh-resources" Nothing false false None Sh "names of all resources";
    Scripts "sh-resource" Resource false false None Sh "name of the resource";
    Scripts "sh-mod-parms" Nothing false false None Sh "parameters of the module";
    Scripts "sh-dev" Volume false false None Sh "device";
    Scripts "sh-udev" OneVolume false false None Sh "names for udev";
    Scripts "sh-minor" Volume false false None Sh "minor number";
    Scripts "sh-ll-dev" Volume false false None Sh "backing disk";
    Scripts "sh-md-dev" Volume false false None Sh "meta-data device";
    Scripts "sh-md-idx" Volume false false None Sh "meta-data index";
    Scripts "sh-ip" Volume false false None Sh "own address";
    Scripts "sh-lr-of" Volume false false None Sh "resource below";
    Scripts "sh-b-pri" Volume false false None ShBecomePrimary "become Primary where configured";
    Scripts "sh-status" Nothing false false Short ShStatus "status for scripts";
    Scripts "proxy-up" Resource false true Short Proxy "add the proxy connection";
    Scripts "proxy-down" Resource false true Short Proxy "remove the proxy connection";
    Scripts "new-resource" Resource false false Short NewResource "create a resource";

    Handlers "before-resync-target" OneVolume false false Long Handler "run the handler";
    Handlers "after-resync-target" OneVolume false false Long Handler "run the handler";
    Handlers "before-resync-source" OneVolume false false Long Handler "run the handler";
    Handlers "pri-on-incon-degr" OneVolume false false Long Handler "run the handler";
    Handlers "pri-lost-after-sb" OneVolume false false Long Handler "run the handler";
    Handlers "fence-peer" Resource false false Long Handler "run the handler";
    Handlers "unfence-peer" Resource false false Long Handler "run the handler";
    Handlers "local-io-error" OneVolume false false Long Handler "run the handler";
    Handlers "pri-lost" OneVolume false false Long Handler "run the handler";
    Handlers "initial-split-brain" OneVolume false false Long Handler "run the handler";
    Handlers "split-brain" OneVolume false false Long Handler "run the handler";
    Handlers "out-of-sync" OneVolume false false Long Handler "run the handler";

    Experts "sh-new-minor" Volume false false Short NewMinor "create a minor";
    Experts "new-minor" Volume false false Short NewMinor "create a minor";
    Experts "suspend-io" Volume false false Short SetupMinor "suspend I/O";
    Experts "resume-io" Volume false false Short SetupMinor "resume I/O";
    Experts "set-gi" OneVolume false false Long Meta "set the data generations";
    Experts "new-current-uuid" OneVolume false false Short SetupMinor "begin a new data generation";
    Experts "check-resize" Volume false false Short CheckResize "prepare for a moved end of the disk";

    Unlisted "syncer" Resource true true Short Syncer "8.3: apply the options of the file";
    Unlisted "why" Resource false false Short SetupResource "explain what the resource does or waits for";
    Unlisted "split-brain explain" Resource false false Short ExplainSplitBrain "say what happened in a split brain, and what resolves it";
    Unlisted "split-brain resolve" Resource false false Short ResolveSplitBrain "give up the changes of one node";
    Unlisted "check" Resource false false Short Check "one line and an exit code of 0 to 3 for Nagios and SNMP";
    Unlisted "lint" Nothing false false None Native "check the configuration, with explanations";
    Unlisted "completion" Nothing false false None Native "print the completion script for a shell";
    Unlisted "man" Nothing false false None Native "print the manual page";
}

/// Finds a command by its exact name.
pub fn find(name: &[u8]) -> Option<&'static Command> {
    COMMANDS.iter().find(|c| c.name.as_bytes() == name)
}

/// The second word of a command of two words. A handler has the name of the first one; the daemon
/// calls it with `minor-N`.
pub fn find_pair(first: &Command, second: &[u8]) -> Option<&'static Command> {
    let second = std::str::from_utf8(second).ok()?;
    find(format!("{} {second}", first.name).as_bytes())
}

/// Old names that still work, with a remark. Spec §7.3.
pub fn find_old(name: &[u8]) -> Option<(&'static str, &'static Command)> {
    match name {
        b"state" => Some(("state", find(b"role")?)),
        b"outdate-peer" => Some(("outdate-peer", find(b"fence-peer")?)),
        _ => None,
    }
}
