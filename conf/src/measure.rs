//! What numbers of options count, in words, as `drbdsetup show` comments them.
//! Spec: status-and-integration.md §2.7.

use crate::options::OptionSpec;

/// `bytes`, `1/10 seconds`, ...; nothing for plain counts.
pub fn of(option: &OptionSpec) -> Option<&'static str> {
    Some(match option.name {
        "resync-rate" | "c-max-rate" | "c-min-rate" => "bytes/second",
        "size" | "start" | "stop" | "sndbuf-size" | "rcvbuf-size" | "congestion-fill"
        | "c-fill-target" => "bytes",
        "connect-int" | "ping-int" => "seconds",
        "timeout" | "ping-timeout" | "c-plan-ahead" | "c-delay-target" | "disk-timeout" => {
            "1/10 seconds"
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use crate::options::{Kind, OPTIONS, Section};

    #[test]
    fn every_scaled_number_has_a_measure() {
        for option in OPTIONS.iter().filter(|o| o.unit().shift() != 0) {
            assert!(super::of(option).is_some(), "{}", option.name);
        }
        let named = |o: &&&crate::options::OptionSpec| super::of(o).is_some();
        for option in OPTIONS
            .iter()
            .filter(|o| o.section != Section::Proxy)
            .collect::<Vec<_>>()
            .iter()
            .filter(named)
        {
            assert!(matches!(option.kind, Kind::Number { .. }), "{}", option.name);
        }
    }
}
