//! Options with values, as they travel: what is not named has the default of `conf::options`.

use std::collections::BTreeMap;

use drbd_conf::options::{Kind, OptionSpec, Value, parse_number, row_of};
use serde::{Deserialize, Serialize};

pub use drbd_conf::options::Section;

/// A value in JSON: number in the option's unit, boolean, text; null resets `resync-after`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum OptionValue {
    /// `yes` or `no`.
    Bool(bool),
    /// A number in the unit of the option table.
    Number(u64),
    /// An enumeration or a text.
    Text(String),
    /// `resync-after` after nothing.
    None,
}

/// Options of one section by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct OptionSet(pub BTreeMap<String, OptionValue>);

/// Why a name or value is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    /// Not a name of a resource.
    #[error("'{}' is not a name of a resource", .0.escape_debug())]
    Name(String),
    /// No option of this name in the section.
    #[error("unknown option '{0}'")]
    Unknown(String),
    /// Not a value of the option: malformed, out of range, or of another type.
    #[error("Option --{name}: invalid argument '{value}'")]
    Value {
        /// The option.
        name: String,
        /// What was given.
        value: String,
    },
}

impl OptionValue {
    /// The value that a text on a command line means.
    ///
    /// The driver of the reference stores some numbers without looking at their range, and its
    /// drbdadm may pass them on: those (`Checked::Backend`) are clamped, not refused.
    ///
    /// # Errors
    /// Malformed, or outside of a range that the reference keeps as well.
    pub fn parse(spec: &'static OptionSpec, text: &str) -> Result<Self, OptionError> {
        let bad = || OptionError::Value { name: spec.name.into(), value: text.into() };
        match spec.kind {
            Kind::Number { unit, min, max, .. } => {
                let value = parse_number(text.as_bytes(), unit).map_err(|_| bad())?;
                match spec.checked {
                    _ if (min..=max).contains(&value) => Ok(Self::Number(value)),
                    drbd_conf::options::Checked::Backend => Ok(Self::Number(value.clamp(min, max))),
                    drbd_conf::options::Checked::Parser => Err(bad()),
                }
            }
            Kind::Bool { .. } | Kind::Flag => match text {
                "yes" => Ok(Self::Bool(true)),
                "no" => Ok(Self::Bool(false)),
                _ => Err(bad()),
            },
            Kind::ResyncAfter if text == "-1" => Ok(Self::None),
            Kind::ResyncAfter => text
                .parse::<u64>()
                .ok()
                .filter(|minor| *minor <= MINOR_MAX)
                .map(Self::Number)
                .ok_or_else(bad),
            Kind::Enum { .. } | Kind::Text { .. } | Kind::Address => {
                match spec.parse_value(Some(text.into())).map_err(|_| bad())? {
                    Value::Enum(name) => Ok(Self::Text(name.into())),
                    _ => Ok(Self::Text(text.into())),
                }
            }
        }
    }

    /// Is this a value that the option can have?
    fn fits(&self, spec: &OptionSpec) -> bool {
        match (self, spec.kind) {
            (Self::Number(n), Kind::Number { min, max, .. }) => (min..=max).contains(n),
            (Self::Number(n), Kind::ResyncAfter) => *n <= MINOR_MAX,
            (Self::None, Kind::ResyncAfter) | (Self::Bool(_), Kind::Bool { .. } | Kind::Flag) => {
                true
            }
            (Self::Text(t), Kind::Enum { values, .. }) => values.contains(&t.as_str()),
            (Self::Text(t), Kind::Text { max }) => t.len() <= max,
            (Self::Text(_), Kind::Address) => true,
            _ => false,
        }
    }

    /// The default of an option.
    #[must_use]
    pub fn default_of(spec: &OptionSpec) -> Self {
        match spec.kind {
            Kind::Number { default, .. } => Self::Number(default),
            Kind::Bool { default } => Self::Bool(default),
            Kind::Enum { default, .. } => Self::Text(default.into()),
            Kind::Text { .. } | Kind::Address => Self::Text(String::new()),
            Kind::ResyncAfter => Self::None,
            Kind::Flag => Self::Bool(false),
        }
    }
}

/// Largest minor number.
pub(crate) const MINOR_MAX: u64 = (1 << 20) - 1;

impl OptionSet {
    /// Sets an option.
    pub fn set(&mut self, name: &str, value: OptionValue) {
        self.0.insert(name.into(), value);
    }

    /// Are all of them options of the section, with values that they can have?
    ///
    /// The daemon asks this of every request before it uses the values.
    ///
    /// # Errors
    /// The first that is not.
    pub fn check(&self, section: Section) -> Result<(), OptionError> {
        for (name, value) in &self.0 {
            let spec = row_of(section, name).ok_or_else(|| OptionError::Unknown(name.clone()))?;
            if !value.fits(spec) {
                let value = serde_json::to_string(value).unwrap_or_default();
                return Err(OptionError::Value { name: name.clone(), value });
            }
        }
        Ok(())
    }

    /// What applies: the value, or the default.
    #[must_use]
    pub fn effective(&self, spec: &OptionSpec) -> OptionValue {
        let own = self.0.get(spec.name).filter(|v| v.fits(spec));
        own.cloned().unwrap_or_else(|| OptionValue::default_of(spec))
    }

    fn by_name(&self, section: Section, name: &str) -> OptionValue {
        row_of(section, name).map_or(OptionValue::None, |spec| self.effective(spec))
    }

    /// A number that applies; 0 for what is not a number.
    #[must_use]
    pub fn number(&self, section: Section, name: &str) -> u64 {
        match self.by_name(section, name) {
            OptionValue::Number(n) => n,
            _ => 0,
        }
    }

    /// A boolean that applies; false for what is none.
    #[must_use]
    pub fn flag(&self, section: Section, name: &str) -> bool {
        self.by_name(section, name) == OptionValue::Bool(true)
    }

    /// A text or enumeration that applies; empty for what is none.
    #[must_use]
    pub fn text(&self, section: Section, name: &str) -> String {
        match self.by_name(section, name) {
            OptionValue::Text(t) => t,
            _ => String::new(),
        }
    }

    /// The minor number of `resync-after`.
    #[must_use]
    pub fn resync_after(&self) -> Option<u32> {
        match self.0.get("resync-after") {
            Some(OptionValue::Number(n)) => u32::try_from(*n).ok(),
            _ => None,
        }
    }

    /// These options changed by those of a request: `*-options` with or without `--set-defaults`.
    /// Values that are the default are left out.
    #[must_use]
    pub fn changed(&self, section: Section, by: &Self, set_defaults: bool) -> Self {
        let mut all = if set_defaults { BTreeMap::new() } else { self.0.clone() };
        all.extend(by.0.iter().map(|(n, v)| (n.clone(), v.clone())));
        let is_default = |name: &str, value: &OptionValue| {
            row_of(section, name).is_some_and(|s| OptionValue::default_of(s) == *value)
        };
        all.retain(|name, value| !is_default(name, value));
        Self(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(section: Section, name: &str) -> &'static OptionSpec {
        row_of(section, name).unwrap()
    }

    #[test]
    fn texts_become_typed_values() {
        let parse = |section, name, text| OptionValue::parse(row(section, name), text);
        let rate = parse(Section::Disk, "resync-rate", "1M");
        assert_eq!(rate, Ok(OptionValue::Number(1024)));
        let bad = parse(Section::Disk, "resync-rate", "-5").unwrap_err();
        assert_eq!(bad.to_string(), "Option --resync-rate: invalid argument '-5'");
        // The reference's drbdadm passes these on unseen, and its driver takes them.
        let timeout = parse(Section::Disk, "disk-timeout", "99999");
        assert_eq!(timeout, Ok(OptionValue::Number(6000)));
        let al = parse(Section::Disk, "al-extents", "1");
        assert_eq!(al, Ok(OptionValue::Number(67)));
        assert!(parse(Section::Net, "ping-int", "99999").is_err());
        let protocol = parse(Section::Net, "protocol", "a");
        assert_eq!(protocol, Ok(OptionValue::Text("A".into())));
        assert!(parse(Section::Net, "use-rle", "on").is_err());
        assert_eq!(parse(Section::Disk, "resync-after", "-1"), Ok(OptionValue::None));
        assert!(parse(Section::Disk, "resync-after", "1048576").is_err());
    }

    #[test]
    fn what_is_not_named_has_its_default() {
        let json = r#"{"resync-rate":300,"disk-flushes":false,"fencing":"resource-only","resync-after":4}"#;
        let set: OptionSet = serde_json::from_str(json).unwrap();
        assert_eq!(set.check(Section::Disk), Ok(()));
        assert_eq!(set.number(Section::Disk, "resync-rate"), 300);
        assert_eq!(set.number(Section::Disk, "c-max-rate"), 102_400);
        assert!(!set.flag(Section::Disk, "disk-flushes"));
        assert!(set.flag(Section::Disk, "md-flushes"));
        assert_eq!(set.text(Section::Disk, "fencing"), "resource-only");
        assert_eq!(set.resync_after(), Some(4));
        assert_eq!(
            serde_json::from_str::<OptionSet>(&serde_json::to_string(&set).unwrap()).unwrap(),
            set
        );
    }

    #[test]
    fn values_of_requests_are_checked() {
        let check = |json: &str| {
            let set: OptionSet = serde_json::from_str(json).unwrap();
            set.check(Section::Net).map_err(|e| e.to_string())
        };
        assert!(check(r#"{"timeout":60}"#).is_ok());
        assert_eq!(check(r#"{"fencing":"x"}"#), Err("unknown option 'fencing'".into()));
        for bad in
            [r#"{"timeout":0}"#, r#"{"timeout":"60"}"#, r#"{"protocol":"c"}"#, r#"{"use-rle":1}"#]
        {
            assert!(check(bad).unwrap_err().contains("invalid argument"), "{bad}");
        }
    }

    #[test]
    fn changes_keep_or_reset_the_rest() {
        let set = |json: &str| serde_json::from_str::<OptionSet>(json).unwrap();
        let running = set(r#"{"timeout":90,"protocol":"A"}"#);
        let change = set(r#"{"protocol":"C","ping-int":5}"#);
        let kept = running.changed(Section::Net, &change, false);
        assert_eq!(kept, set(r#"{"timeout":90,"ping-int":5}"#));
        let reset = running.changed(Section::Net, &change, true);
        assert_eq!(reset, set(r#"{"ping-int":5}"#));
    }
}
