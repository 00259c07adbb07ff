//! Reserved words. Spec: config-and-drbdadm.md §2.2; token numbers §6.3.

use crate::options;

macro_rules! keywords {
    ($( $name:ident $text:literal $number:literal; )*) => {
        /// A reserved word.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub(crate) enum Keyword {
            $(
                #[doc = concat!("`", $text, "`.")]
                $name,
            )*
            /// An option or handler name; the number that messages show.
            Option(u16),
        }

        impl Keyword {
            /// The number behind `TK` in messages.
            pub(crate) fn number(self) -> u16 {
                match self {
                    $( Self::$name => $number, )*
                    Self::Option(n) => n,
                }
            }
        }

        fn structural(word: &[u8]) -> Option<Keyword> {
            // The match compiles to comparisons by length and content.
            let word = std::str::from_utf8(word).ok()?;
            match word {
                $( $text => Some(Keyword::$name), )*
                _ => None,
            }
        }
    };
}

keywords! {
    Global "global" 258;
    Resource "resource" 259;
    On "on" 260;
    StackedOnTopOf "stacked-on-top-of" 261;
    IgnoreOn "ignore-on" 262;
    Net "net" 263;
    Disk "disk" 264;
    Skip "skip" 265;
    Syncer "syncer" 266;
    Startup "startup" 267;
    DisableIpVerification "disable-ip-verification" 268;
    DialogRefresh "dialog-refresh" 269;
    Handlers "handlers" 271;
    Common "common" 272;
    Address "address" 273;
    AlternateLinkAddress "alternate-link-address" 274;
    Device "device" 275;
    Minor "minor" 276;
    MetaDisk "meta-disk" 277;
    FlexibleMetaDisk "flexible-meta-disk" 278;
    MinorCount "minor-count" 279;
    UsageCount "usage-count" 296;
    Ask "ask" 297;
    Yes "yes" 298;
    No "no" 299;
    ThisHost "_this_host" 300;
    RemoteHost "_remote_host" 301;
    Proxy "proxy" 302;
    Inside "inside" 303;
    Outside "outside" 304;
    Plugin "plugin" 307;
    Sci "sci" 311;
    Sdp "sdp" 312;
    Ssocks "ssocks" 313;
    Ipv4 "ipv4" 314;
    Ipv6 "ipv6" 315;
    DiscardMyData "discard-my-data" 317;
    Include "include" 318;
    Floating "floating" 320;
    Volume "volume" 322;
    CmdTimeoutShort "cmd-timeout-short" 323;
    CmdTimeoutMedium "cmd-timeout-medium" 324;
    CmdTimeoutLong "cmd-timeout-long" 325;
    Options "options" 327;
    UdevAlwaysUseVnr "udev-always-use-vnr" 328;
    BecomePrimaryOn "become-primary-on" 294;
    StackedTimeouts "stacked-timeouts" 294;
    Protocol "protocol" 289;
    UseBmbv "use-bmbv" 284;
    Obsolete0 "delay-probe-volume" 321;
    Obsolete1 "delay-probe-interval" 321;
    Obsolete2 "throttle-threshold" 321;
    Obsolete3 "hold-off-threshold" 321;
}

/// The keyword that `word` is, if any.
pub(crate) fn keyword(word: &[u8]) -> Option<Keyword> {
    // The shortest keywords have two letters, the longest 25.
    if word.len() < 2 || word.len() > 32 {
        return None;
    }
    structural(word)
        .or_else(|| options::find_anywhere(word).map(|found| Keyword::Option(found.token)))
}

/// Words that were options of 8.3 and are ignored.
pub(crate) fn is_obsolete(keyword: Keyword) -> bool {
    matches!(
        keyword,
        Keyword::Obsolete0 | Keyword::Obsolete1 | Keyword::Obsolete2 | Keyword::Obsolete3
    )
}
