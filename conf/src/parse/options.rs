//! Option sections: `net { }`, `disk { }`, `options { }`, `startup { }`, `handlers { }`,
//! `proxy { }`, 8.3's `syncer { }`, and `global { }`.
//!
//! Spec: config-and-drbdadm.md §3, §5, §6.2.

use bstr::{BString, ByteSlice};

use super::limits::NAMES_MAX;
use super::{Form, Parsed, Parser, Stop};
use crate::keyword::{Keyword, is_obsolete};
use crate::lex::{Kind, Token};
use crate::model::{Opt, OptionList, Resource, Span, UsageCount};
use crate::options::{self, Found, OptionSpec, Section, Unit, ValueError, parse_number};

/// What may follow the name of a boolean.
const BOOLEAN: &str = "yes | no | ;";
/// What stands where no option begins.
pub(super) const NOT_AN_OPTION: &str = "an option keyword";

/// What to do about a syntax error, where something better than the message can be said.
pub(super) fn hint(expected: &str, token: &Token) -> Option<String> {
    let word = token.text.to_str().ok()?;
    match (expected, token.kind) {
        (NOT_AN_OPTION, Kind::Word) => {
            let best = nearest(word)?;
            Some(format!("did you mean '{best}'?"))
        }
        (NOT_AN_OPTION | "a syncer option keyword", Kind::Key(Keyword::Option(_))) => {
            let found = options::find_anywhere(word.as_bytes())?;
            Some(format!("'{word}' belongs into {} {{ }}", section_name(found.spec.section)))
        }
        (";", _) => Some("a statement ends with ';': is one missing before this word?".into()),
        ("TK_STRING" | "TK_STRING | TK_INTEGER", Kind::Key(_)) => {
            Some(format!("'{word}' is a reserved word; quote it to use it as a name or value"))
        }
        (_, Kind::End) => Some("the file ends here: is a '}' missing?".into()),
        _ => None,
    }
}

/// The option whose name is nearest, if it is near.
fn nearest(word: &str) -> Option<&'static str> {
    let names = options::OPTIONS.iter().map(|o| o.name);
    let (distance, name) = names.map(|n| (distance(word, n), n)).min()?;
    (distance <= 2 && word.len() < 64).then_some(name)
}

/// Edit distance; words are short.
fn distance(a: &str, b: &str) -> usize {
    if a.len().abs_diff(b.len()) > 2 {
        return usize::MAX;
    }
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut previous = i;
        let mut left = i + 1;
        for (slot, y) in row.iter_mut().skip(1).zip(b.bytes()) {
            let above = *slot;
            let cost = previous + usize::from(x != y);
            left = cost.min(above + 1).min(left + 1);
            previous = above;
            *slot = left;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or(usize::MAX)
}

/// The keyword of an option section.
pub(crate) fn section_name(section: Section) -> &'static str {
    match section {
        Section::Disk => "disk",
        Section::Net => "net",
        Section::Options => "options",
        Section::Startup => "startup",
        Section::Handlers => "handlers",
        Section::Proxy => "proxy",
        Section::Command => "command line",
    }
}

impl Parser<'_> {
    /// `{ option... }` of a section other than startup, syncer and proxy.
    pub(super) fn option_section(&mut self, section: Section) -> Parsed<OptionList> {
        let mut list = OptionList::default();
        let depth = self.open_section()?;
        loop {
            let token = self.next();
            self.statement = token.span;
            if token.kind == Kind::Punct(b'}') {
                return Ok(list);
            }
            let result = self.option(section, &token, &mut list);
            if !self.go_on(result, depth)? {
                return Ok(list);
            }
        }
    }

    /// The `{` of a section; returns how many braces are open in it.
    fn open_section(&mut self) -> Parsed<u32> {
        let brace = self.punct(b'{')?;
        self.section = brace.span;
        Ok(self.depth)
    }

    /// One option of a section.
    fn option(&mut self, section: Section, token: &Token, list: &mut OptionList) -> Parsed {
        match token.kind {
            Kind::Key(k) if is_obsolete(k) => self.obsolete(token),
            Kind::Key(Keyword::UseBmbv) if section == Section::Disk => {
                let value = if self.boolean(BOOLEAN)? { "yes" } else { "no" };
                let text = "'use-bmbv' means nothing any more and is ignored";
                self.diagnostics.native_remark(text, token.span);
                let spec = &options::USE_BMBV;
                list.items.push(Opt { spec, value: Some(value.into()), span: token.span });
                self.count_option()
            }
            Kind::Key(Keyword::DiscardMyData) if section == Section::Net && self.is_show() => {
                self.boolean(BOOLEAN)?;
                Ok(())
            }
            // Version 9 has it here; it goes to the disk options when the resource ends.
            Kind::Key(_) if section == Section::Net && token.text == "fencing" => {
                match options::find(Section::Disk, &token.text) {
                    Some(found) => self.option_value(token, found, list, Form::Numbered),
                    None => Err(self.not_an_option(token)),
                }
            }
            Kind::Key(_) => match options::find(section, &token.text) {
                Some(found) => self.option_value(token, found, list, Form::Numbered),
                None => Err(self.not_an_option(token)),
            },
            _ => {
                if self.v9_option(section, token)? {
                    return Ok(());
                }
                Err(self.not_an_option(token))
            }
        }
    }

    fn not_an_option(&mut self, token: &Token) -> Stop {
        let what = if token.kind == Kind::End { "an option" } else { NOT_AN_OPTION };
        let stop = self.expected(what, token, Form::Plain);
        self.explain_if_v9(token);
        stop
    }

    /// What follows an option's name.
    pub(super) fn option_value(
        &mut self,
        token: &Token,
        found: Found,
        list: &mut OptionList,
        semicolon: Form,
    ) -> Parsed {
        let spec = found.spec;
        let value = if let Some(implied) = found.implied {
            self.semicolon(semicolon)?;
            BString::from(implied)
        } else if spec.is_bool() {
            // 8.3 had it in `syncer` without a value, and the original still asks for that.
            let what = if semicolon == Form::Plain { ";" } else { BOOLEAN };
            BString::from(if self.boolean(what)? { "yes" } else { "no" })
        } else {
            let value = self.value()?;
            let text = self.checked(spec, value)?;
            self.semicolon(semicolon)?;
            text
        };
        list.items.push(Opt { spec, value: Some(value), span: token.span });
        self.count_option()
    }

    fn semicolon(&mut self, form: Form) -> Parsed {
        let token = self.next();
        if token.kind == Kind::Punct(b';') {
            return Ok(());
        }
        Err(self.expected(";", &token, form))
    }

    /// `;`, `yes;` or `no;`.
    fn boolean(&mut self, expected: &str) -> Parsed<bool> {
        let token = self.next();
        let value = match token.kind {
            Kind::Punct(b';') => return Ok(true),
            Kind::Key(Keyword::Yes) => true,
            Kind::Key(Keyword::No) => false,
            _ => return Err(self.expected(expected, &token, Form::Plain)),
        };
        self.punct(b';')?;
        Ok(value)
    }

    /// A word, a number or the keyword `on`. Spec §2.1.
    pub(super) fn value(&mut self) -> Parsed<Token> {
        let token = self.next();
        match token.kind {
            Kind::Word | Kind::Quoted | Kind::Number | Kind::Key(Keyword::On) => Ok(token),
            _ => Err(self.not_a_word("TK_STRING | TK_INTEGER", &token)),
        }
    }

    /// Checks what the parser checks; returns the text to keep.
    fn checked(&mut self, spec: &'static OptionSpec, value: Token) -> Parsed<BString> {
        if spec.checked != options::Checked::Parser {
            return Ok(value.text);
        }
        if spec.name == "protocol" {
            let upper = value.text.to_ascii_uppercase();
            if !matches!(upper.as_slice(), b"A" | b"B" | b"C") {
                let text = format!("unknown protocol '{}', should be one of A,B,C", value.text);
                self.diagnostics.error(text, Some(value.span));
            }
            return Ok(upper.into());
        }
        if let options::Kind::Number { unit, min, max, .. } = spec.kind {
            self.range(spec.name, &value, unit, min, max)?;
        }
        Ok(value.text)
    }

    /// Checks a number; a bad one ends parsing, one out of range does not. Spec §5.1, §6.2.
    pub(super) fn range(
        &mut self,
        name: &str,
        token: &Token,
        unit: Unit,
        min: u64,
        max: u64,
    ) -> Parsed<u64> {
        let value = match parse_number(&token.text, unit) {
            Ok(value) => value,
            Err(e) => {
                let code = if e == ValueError::Empty { 100 } else { 20 };
                self.diagnostics.error(e.to_string(), Some(token.span));
                return Err(Stop(code));
            }
        };
        if !(min..=max).contains(&value) {
            let u = unit.letter();
            let text = &token.text;
            let text = format!("{name} {text} => {value}{u} out of range [{min}..{max}]{u}.");
            if self.is_show() {
                // What runs is a fact; it is only mentioned.
                let at = self.place(self.statement);
                let span = self.statement;
                self.diagnostics.remark(format!("{at} {text}"), Some(span));
            } else {
                self.later(&text);
            }
        }
        Ok(value)
    }

    /// `startup { }`.
    pub(super) fn startup(&mut self, res: &mut Resource) -> Parsed {
        let depth = self.open_section()?;
        loop {
            let token = self.next();
            self.statement = token.span;
            if token.kind == Kind::Punct(b'}') {
                return Ok(());
            }
            let result = self.startup_statement(&token, res);
            if !self.go_on(result, depth)? {
                return Ok(());
            }
        }
    }

    fn startup_statement(&mut self, token: &Token, res: &mut Resource) -> Parsed {
        match token.kind {
            Kind::Key(Keyword::StackedTimeouts) => {
                self.punct(b';')?;
                res.stacked_timeouts = Some(token.span);
            }
            Kind::Key(Keyword::BecomePrimaryOn) => {
                res.become_primary_on = self.hosts(b';')?;
                res.become_primary_on_span = Some(token.span);
            }
            _ => {
                let mut list = std::mem::take(&mut res.startup);
                let result = self.option(Section::Startup, token, &mut list);
                res.startup = list;
                result?;
            }
        }
        Ok(())
    }

    /// One or more names up to `end`. Spec §6.3, "list of hosts".
    pub(super) fn hosts(&mut self, end: u8) -> Parsed<Vec<BString>> {
        let mut names = Vec::new();
        loop {
            let token = self.next();
            match token.kind {
                Kind::Word | Kind::Quoted if names.len() < NAMES_MAX => names.push(token.text),
                Kind::Word | Kind::Quoted => {
                    self.later_at(token.span, &format!("more than {NAMES_MAX} host names"));
                    return Err(Stop(10));
                }
                Kind::Punct(p) if p == end && !names.is_empty() => return Ok(names),
                Kind::Punct(p) if p == end => {
                    return Err(self.expected("TK_STRING", &token, Form::Numbered));
                }
                _ => {
                    let what = format!("TK_STRING | '{}'", char::from(end));
                    return Err(self.expected(&what, &token, Form::Numbered));
                }
            }
        }
    }

    /// 8.3's `syncer { }`: options go to the sections that have them now. Spec §4.6, §5.5.
    pub(super) fn syncer(&mut self, res: &mut Resource) -> Parsed {
        let depth = self.open_section()?;
        loop {
            let token = self.next();
            self.statement = token.span;
            let result = match token.kind {
                Kind::Punct(b'}') => return Ok(()),
                // The original refuses these here although its other sections take them.
                Kind::Key(k) if is_obsolete(k) => self.obsolete(&token),
                Kind::Key(_) => self.syncer_option(&token, res),
                _ => Err(self.not_a_syncer_option(&token)),
            };
            if !self.go_on(result, depth)? {
                return Ok(());
            }
        }
    }

    /// An option of 8.3 without a meaning: its value is read and forgotten.
    fn obsolete(&mut self, token: &Token) -> Parsed {
        self.value()?;
        self.punct(b';')?;
        let text = format!("'{}' means nothing any more and is ignored", token.text);
        self.diagnostics.native_remark(text, token.span);
        Ok(())
    }

    fn not_a_syncer_option(&mut self, token: &Token) -> Stop {
        self.expected("a syncer option keyword", token, Form::Plain)
    }

    fn syncer_option(&mut self, token: &Token, res: &mut Resource) -> Parsed {
        let found = [Section::Disk, Section::Net, Section::Options]
            .into_iter()
            .find_map(|s| options::find(s, &token.text).filter(|f| f.syncer));
        let Some(found) = found else { return Err(self.not_a_syncer_option(token)) };
        let mut list = OptionList::default();
        self.option_value(token, found, &mut list, Form::Plain)?;
        let target = match found.spec.section {
            Section::Disk => &mut res.disk,
            Section::Net => &mut res.net,
            _ => &mut res.options,
        };
        target.items.extend(list.items);
        Ok(())
    }

    /// `proxy { }` of a resource: options and plugins.
    pub(super) fn proxy_options(&mut self) -> Parsed<(OptionList, Vec<BString>)> {
        let mut list = OptionList::default();
        let mut plugins = Vec::new();
        let depth = self.open_section()?;
        loop {
            let token = self.next();
            self.statement = token.span;
            let result = match token.kind {
                Kind::Punct(b'}') => return Ok((list, plugins)),
                Kind::Key(Keyword::Plugin) => self.plugins().map(|lines| plugins.extend(lines)),
                _ => self.option(Section::Proxy, &token, &mut list),
            };
            if !self.go_on(result, depth)? {
                return Ok((list, plugins));
            }
        }
    }

    /// `plugin { words; ... }`: lines of any tokens.
    fn plugins(&mut self) -> Parsed<Vec<BString>> {
        let token = self.next();
        if token.kind != Kind::Punct(b'{') {
            return Err(self.plugin_error(&token, "expected \"{\" after \"proxy\" keyword"));
        }
        let mut lines = Vec::new();
        let mut words: Vec<BString> = Vec::new();
        loop {
            let token = self.next();
            match token.kind {
                Kind::Punct(b'}') if words.is_empty() => return Ok(lines),
                Kind::Punct(b'}') => {
                    return Err(self.plugin_error(&token, "Missing \";\" before  \"}\""));
                }
                Kind::Punct(b';') => {
                    if !words.is_empty() {
                        lines.push(Self::join(&words));
                        words.clear();
                    }
                }
                Kind::End => return Err(self.plugin_error(&token, "Unexpected end-of-file")),
                _ => words.push(token.text),
            }
        }
    }

    fn plugin_error(&mut self, token: &Token, text: &str) -> Stop {
        self.later_at(token.span, text);
        Stop(10)
    }

    /// `global { }`. Spec §3, §5.4.
    pub(super) fn global(&mut self, at: Span) -> Parsed {
        self.unique("global section", "global".into(), at)?;
        if !self.config.resources.is_empty() {
            let place = self.place(at);
            let text = format!(
                "{place} You should put the global {{}} section\n\tin front of any resource {{}} section"
            );
            self.diagnostics.remark(text, Some(at));
        }
        self.config.global.span = Some(at);
        self.punct(b'{')?;
        let depth = self.depth;
        loop {
            let token = self.next();
            self.statement = token.span;
            let result = match token.kind {
                Kind::Punct(b'}') => return Ok(()),
                Kind::Key(k) => self.global_option(&token, k),
                _ => Err(self.not_a_global_option(&token)),
            };
            if !self.go_on(result, depth)? {
                return Ok(());
            }
        }
    }

    fn not_a_global_option(&mut self, token: &Token) -> Stop {
        let what = "dialog-refresh | minor-count | disable-ip-verification";
        self.expected(what, token, Form::Plain)
    }

    fn global_option(&mut self, token: &Token, keyword: Keyword) -> Parsed {
        match keyword {
            Keyword::DisableIpVerification => self.config.global.disable_ip_verification = true,
            Keyword::UdevAlwaysUseVnr => self.config.global.udev_always_use_vnr = true,
            Keyword::MinorCount => {
                self.config.global.minor_count = Some(self.global_number("minor-count", 1, 255)?);
            }
            Keyword::DialogRefresh => {
                let value = self.global_number("dialog-refresh", 0, 600)?;
                self.config.global.dialog_refresh = Some(value);
            }
            Keyword::CmdTimeoutShort => {
                let value = self.global_number("cmd-timeout-short", 0, 900)?;
                self.config.global.cmd_timeout_short = Some(value);
            }
            Keyword::CmdTimeoutMedium => {
                let value = self.global_number("cmd-timeout-medium", 0, 900)?;
                self.config.global.cmd_timeout_medium = Some(value);
            }
            Keyword::CmdTimeoutLong => {
                let value = self.global_number("cmd-timeout-long", 0, 900)?;
                self.config.global.cmd_timeout_long = Some(value);
            }
            Keyword::UsageCount => {
                let value = self.next();
                self.config.global.usage_count = match value.kind {
                    Kind::Key(Keyword::Yes) => UsageCount::Yes,
                    Kind::Key(Keyword::No) => UsageCount::No,
                    Kind::Key(Keyword::Ask) => UsageCount::Ask,
                    _ => return Err(self.expected("yes | no | ask", &value, Form::Plain)),
                };
            }
            _ => return Err(self.not_a_global_option(token)),
        }
        self.punct(b';')?;
        let name = token.text.to_string();
        self.config.global.spans.insert(name, token.span);
        Ok(())
    }

    fn global_number(&mut self, name: &str, min: u64, max: u64) -> Parsed<u32> {
        let token = self.number()?;
        let value = self.range(name, &token, Unit::One, min, max)?;
        Ok(u32::try_from(value).unwrap_or(u32::MAX))
    }
}
