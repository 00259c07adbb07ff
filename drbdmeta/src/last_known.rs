//! The note about where internal meta-data was last seen.
//!
//! Spec: metadata.md §9.1.

use alloc::string::{String, ToString};

/// Content of a last-known file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LastKnown {
    /// Length of the backing device in bytes.
    pub device_len: u64,
    /// Its name.
    pub device: Option<String>,
    /// Identity of the device; 0: none.
    pub device_uuid: u64,
}

impl LastKnown {
    /// Reads the text; `None` if it does not begin with a number.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim_start();
        let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (digits, rest) = text.split_at_checked(end)?;
        let device_len = digits.parse().ok()?;
        let mut words = rest.split_whitespace();
        let mut next = words.next();
        let device = next.filter(|w| *w != "uuid:").map(ToString::to_string);
        if device.is_some() {
            next = words.next();
        }
        let uuid = if next == Some("uuid:") { words.next() } else { None };
        let device_uuid = uuid.and_then(|u| u64::from_str_radix(u, 16).ok()).unwrap_or(0);
        Some(Self { device_len, device, device_uuid })
    }

    /// The text to write.
    pub fn to_text(&self) -> String {
        let name = self.device.as_deref().unwrap_or_default();
        let mut text = alloc::format!("{}\t{name}\n", self.device_len);
        if self.device_uuid != 0 {
            text.push_str(&alloc::format!("uuid:\t{:016X}\n", self.device_uuid));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_lines_survive_and_the_second_may_lack() {
        let full = LastKnown {
            device_len: 67_108_864,
            device: Some("/dev/vda".into()),
            device_uuid: 0xCC3F_B016_5281_AA92,
        };
        assert_eq!(full.to_text(), "67108864\t/dev/vda\nuuid:\tCC3FB0165281AA92\n");
        assert_eq!(LastKnown::parse(&full.to_text()), Some(full.clone()));
        let short = LastKnown { device: None, device_uuid: 0, ..full };
        assert_eq!(LastKnown::parse("67108864"), Some(short));
        assert_eq!(LastKnown::parse("garbage\n"), None);
    }
}
