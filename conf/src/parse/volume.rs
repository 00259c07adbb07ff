//! Volumes and the statements device, disk, meta-disk. Spec: config-and-drbdadm.md §3 `vstmt`, §4.4.

use bstr::{BString, ByteSlice};

use super::{Form, Parsed, Parser};
use crate::keyword::Keyword;
use crate::lex::{Kind, Token};
use crate::model::{MetaDisk, MetaIndex, Span, Volume};
use crate::options::Section;

/// Largest minor number of a device node.
pub(crate) const MINOR_MAX: u32 = 1_048_575;
/// Largest volume number.
pub(crate) const VOLUME_MAX: u32 = 65_535;

impl Parser<'_> {
    /// `volume N { ... }` into the sorted list.
    ///
    /// `names`: of the host section, for which each device is claimed; none on resource level
    /// and in stacked sections, whose devices are claimed where they are inherited or resolved.
    pub(super) fn volume(
        &mut self,
        volumes: &mut Vec<Volume>,
        names: &[BString],
        stacked: bool,
    ) -> Parsed {
        let keyword = self.statement;
        let number = self.number()?;
        let vnr = self.leading_number(&number, "volume", VOLUME_MAX);
        let mut volume = Volume { vnr, span: keyword, ..Volume::default() };
        self.punct(b'{')?;
        let depth = self.depth;
        loop {
            let token = self.next();
            if token.kind == Kind::Punct(b'}') {
                break;
            }
            let mut result = self.volume_statement(&mut volume, &token, stacked);
            if result.is_ok() && token.kind == Kind::Key(Keyword::Device) && !names.is_empty() {
                // As all complaints in here it names the line of the word `volume`.
                volume.device_span = Some(keyword);
                result = self.claim_device(names, &mut volume);
            }
            if !self.go_on(result, depth)? {
                break;
            }
        }
        self.statement = keyword;
        self.insert_volume(volumes, volume);
        Ok(())
    }

    fn volume_statement(&mut self, volume: &mut Volume, token: &Token, stacked: bool) -> Parsed {
        match token.kind {
            Kind::Key(Keyword::Device) => self.device(volume, token.span),
            Kind::Key(Keyword::Disk) if !stacked => self.disk(volume, token.span),
            Kind::Key(Keyword::MetaDisk | Keyword::FlexibleMetaDisk) if !stacked => {
                let flexible = token.kind == Kind::Key(Keyword::FlexibleMetaDisk);
                self.meta_disk(volume, flexible, token.span)
            }
            _ => {
                let what = "device | disk | meta-disk | flex-meta-disk | }";
                Err(self.expected(what, token, Form::Numbered))
            }
        }
    }

    /// Keeps volumes sorted; a repeated number is refused (the original prints "internal error").
    fn insert_volume(&mut self, volumes: &mut Vec<Volume>, volume: Volume) {
        match volumes.binary_search_by_key(&volume.vnr, |v| v.vnr) {
            Ok(at) if volumes.get(at).is_some_and(|v| v.implicit) => {
                volumes.insert(at + 1, volume);
            }
            Ok(_) => {
                let vnr = volume.vnr;
                self.later(&format!("conflicting use of volume '{vnr}' ..."));
            }
            Err(at) => volumes.insert(at, volume),
        }
    }

    /// The implicit volume 0, made when needed.
    pub(super) fn implicit_volume<'v>(&mut self, volumes: &'v mut Vec<Volume>) -> &'v mut Volume {
        let at = volumes.iter().position(|v| v.vnr == 0);
        if volumes.first().is_some_and(|v| !v.implicit) {
            self.later("mixing explicit and implicit volumes is not allowed");
        }
        let at = at.unwrap_or_else(|| {
            let span = self.statement;
            volumes.insert(0, Volume { implicit: true, span, ..Volume::default() });
            0
        });
        volumes.get_mut(at).expect("the position was found or inserted just above")
    }

    /// Numbers after `volume` and `minor`: the leading digits count.
    fn leading_number(&mut self, token: &Token, what: &str, max: u32) -> u32 {
        let digits: Vec<u8> = token.text.iter().copied().take_while(u8::is_ascii_digit).collect();
        let value = digits.to_str().ok().and_then(|t| t.parse::<u32>().ok()).unwrap_or(u32::MAX);
        if digits.len() != token.text.len() {
            self.later(&format!("{what} number '{}' must not have a unit", token.text));
        } else if value > max {
            self.later(&format!("{what} number {} out of range [0..{max}].", token.text));
        }
        value.min(max)
    }

    /// What follows `device`. Spec §4.4, §6.4.
    pub(super) fn device(&mut self, volume: &mut Volume, span: Span) -> Parsed {
        let mut name = None;
        let mut token = self.next();
        if token.kind != Kind::Key(Keyword::Minor) {
            if !matches!(token.kind, Kind::Word | Kind::Quoted) {
                // As the original: nothing is said here; what follows is not a statement then.
                // A device that the volume already has counts as given once more.
                volume.claimed = false;
                return Ok(());
            }
            name = Some(self.device_name(token.text));
            token = self.next();
        }
        let mut minor = None;
        match token.kind {
            Kind::Key(Keyword::Minor) => {
                let number = self.number()?;
                minor = Some(self.leading_number(&number, "minor", MINOR_MAX));
                self.punct(b';')?;
            }
            Kind::Punct(b';') => {}
            _ => return Err(self.expected("minor | ;", &token, Form::Plain)),
        }
        volume.device_span = Some(span);
        volume.claimed = false;
        volume.name_span = name.is_some().then_some(span);
        self.set_device(volume, name, minor);
        volume.minor_span = volume.minor.is_some().then_some(span);
        Ok(())
    }

    /// The whole name of a device that may be written without `/dev/`.
    fn device_name(&mut self, written: BString) -> BString {
        if written.starts_with(b"drbd") {
            return BString::from(bstr::concat([b"/dev/".as_slice(), &written]));
        }
        if !written.starts_with(b"/dev/drbd") {
            self.later(
                "device name must start with /dev/drbd\n\t(/dev/ is optional, but drbd is required)",
            );
        }
        written
    }

    fn set_device(&mut self, volume: &mut Volume, name: Option<BString>, minor: Option<u32>) {
        let Some(name) = name else {
            volume.minor = minor;
            volume.device = None;
            return;
        };
        let rest = name.strip_prefix(b"/dev/drbd");
        let rest = rest.unwrap_or_default();
        let digits = decimal(rest);
        match (minor, digits) {
            (None, Some(number)) => volume.minor = Some(number),
            (Some(minor), Some(number)) => {
                volume.minor = Some(minor);
                if minor != number {
                    self.minor_mismatch(minor);
                }
            }
            (Some(minor), None) => {
                volume.minor = Some(minor);
                if rest.first() != Some(&b'_') {
                    self.later(
                        "arbitrary device name must start with /dev/drbd_\n\t\
                         mind the '_'! (/dev/ is optional, but drbd_ is required)",
                    );
                }
            }
            (None, None) => {
                volume.minor = (self.request.node_minor)(name.as_bstr());
                if volume.minor.is_none() {
                    self.later("no minor given nor device name contains a minor number");
                }
            }
        }
        volume.device = Some(name);
    }

    fn minor_mismatch(&mut self, minor: u32) {
        self.later(&format!(
            "explicit minor number must match with device name\n\
             \tTry \"device /dev/drbd{minor} minor {minor};\",\n\
             \tor leave off either device name or explicit minor.\n\
             \tArbitrary device names must start with /dev/drbd_\n\
             \tmind the '_'! (/dev/ is optional, but drbd_ is required)"
        ));
    }

    /// What follows `disk` where a volume may have one: a device, or options.
    pub(super) fn disk(&mut self, volume: &mut Volume, span: Span) -> Parsed {
        let token = match self.inputs.last() {
            Some(input) => input.lexer.peek(),
            None => self.next(),
        };
        match token.kind {
            Kind::Punct(b'{') => {
                volume.disk_options = self.option_section(Section::Disk)?;
                Ok(())
            }
            Kind::Word | Kind::Quoted => {
                self.next();
                self.refuse_v9_disk_none(&token, span)?;
                self.punct(b';')?;
                volume.disk = Some(token.text);
                volume.disk_span = Some(span);
                Ok(())
            }
            _ => Err(self.not_a_word("TK_STRING | {", &token)),
        }
    }

    /// What follows `meta-disk` and `flexible-meta-disk`.
    pub(super) fn meta_disk(&mut self, volume: &mut Volume, flexible: bool, span: Span) -> Parsed {
        let device = self.word("TK_STRING")?.text;
        let internal = device == "internal";
        let mut index = if internal { MetaIndex::Internal } else { MetaIndex::Flexible };
        if flexible || internal {
            self.punct(b';')?;
        } else {
            let token = self.next();
            match token.kind {
                Kind::Punct(b';') => {}
                Kind::Punct(b'[') => {
                    index = MetaIndex::Indexed(self.number()?.text);
                    self.punct(b']')?;
                    self.punct(b';')?;
                }
                _ => return Err(self.expected("[ | ;", &token, Form::Plain)),
            }
        }
        volume.meta_disk = Some(MetaDisk { device, index, span });
        Ok(())
    }
}

/// A text of nothing but digits that fits a minor number.
fn decimal(text: &[u8]) -> Option<u32> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    text.to_str().ok()?.parse().ok()
}
