//! `resource` and `common` sections. Spec: config-and-drbdadm.md §3 `rstmt`, §6.4.

use bstr::{BStr, BString, ByteSlice};

use super::limits::COMPLAINTS_MAX;
use super::unique::Conflict;
use super::{Form, Parsed, Parser, Stop, check_resource_name, empty_resource};
use crate::keyword::Keyword;
use crate::lex::{Kind, Token};
use crate::model::{HostKind, HostSection, Opt, OptionList, Resource, Span};
use crate::options::{self, Section};

impl Parser<'_> {
    /// Claims a name; a second use ends parsing (except in the output of `show`).
    pub(super) fn unique(&mut self, what: &str, key: &BStr, span: Span) -> Parsed {
        if self.is_show() {
            return Ok(());
        }
        self.uniques
            .claim(what, key, span, &self.sources, &mut self.diagnostics)
            .map_err(|Conflict| Stop(10))
    }

    /// `common { }`.
    pub(super) fn common(&mut self) -> Parsed {
        let brace = self.punct(b'{')?;
        self.unique("resource section", "common".into(), brace.span)?;
        let mut common = empty_resource("common".into(), brace.span);
        let result = self.resource_body(&mut common);
        if result.is_ok() && !common.hosts.is_empty() {
            let span = self.section;
            self.later_at(span, "in the common section, there are no host sections allowed.");
        }
        common.hosts.clear();
        self.config.common = Some(common);
        result
    }

    /// `resource NAME { }`.
    pub(super) fn resource(&mut self) -> Parsed {
        let name = self.word("TK_STRING")?;
        if let Err(text) = check_resource_name(name.text.as_bstr()) {
            self.diagnostics.error(text, Some(name.span));
            return Err(Stop(1));
        }
        let brace = self.punct(b'{')?;
        self.count_resource()?;
        self.unique("resource section", name.text.as_bstr(), brace.span)?;
        let mut res = empty_resource(name.text, brace.span);
        let result = self.resource_body(&mut res);
        self.v9_finish(&mut res);
        if result.is_ok() && !self.stepped_over {
            self.compare_volume_sets(&res);
        }
        self.config.resources.push(res);
        result
    }

    /// Statements up to `}` or the end of the file.
    fn resource_body(&mut self, res: &mut Resource) -> Parsed {
        let depth = self.depth;
        loop {
            let token = self.next();
            self.statement = token.span;
            let result = match token.kind {
                // A resource that ends with its file is complete, as in the original.
                Kind::Punct(b'}') | Kind::End => return Ok(()),
                Kind::Key(k) => self.resource_statement(res, k, &token),
                _ => match self.v9_resource_statement(res, &token) {
                    Ok(false) => Err(self.not_a_resource_statement(&token)),
                    Ok(true) => Ok(()),
                    Err(stop) => Err(stop),
                },
            };
            if !self.go_on(result, depth)? {
                return Ok(());
            }
        }
    }

    fn not_a_resource_statement(&mut self, token: &Token) -> Stop {
        let what = "protocol | on | disk | net | syncer | startup | handlers | ignore-on | \
                    stacked-on-top-of";
        let stop = self.expected(what, token, Form::Numbered);
        self.explain_if_v9(token);
        stop
    }

    fn resource_statement(
        &mut self,
        res: &mut Resource,
        keyword: Keyword,
        token: &Token,
    ) -> Parsed {
        match keyword {
            Keyword::Protocol => self.protocol(res, token),
            Keyword::On => {
                let names = self.hosts(b'{')?;
                self.host(res, HostKind::On, names)
            }
            Keyword::ThisHost | Keyword::RemoteHost => {
                self.punct(b'{')?;
                self.host(res, HostKind::On, vec![token.text.clone()])
            }
            Keyword::Floating => self.floating(res),
            Keyword::StackedOnTopOf => self.stacked(res),
            Keyword::IgnoreOn => self.ignore_on(res),
            Keyword::Device | Keyword::Disk | Keyword::MetaDisk | Keyword::FlexibleMetaDisk => {
                self.resource_volume_statement(res, keyword, token)
            }
            Keyword::Volume => {
                let mut volumes = std::mem::take(&mut res.volumes);
                let result = self.volume(&mut volumes, &[], false);
                res.volumes = volumes;
                result
            }
            Keyword::Net => {
                res.net.items.extend(self.named_section(res, Section::Net)?.items);
                Ok(())
            }
            Keyword::Options => {
                res.options.items.extend(self.named_section(res, Section::Options)?.items);
                Ok(())
            }
            Keyword::Handlers => {
                res.handlers.items.extend(self.named_section(res, Section::Handlers)?.items);
                Ok(())
            }
            Keyword::Startup => {
                self.unique_section(res, "startup section", "startup")?;
                self.startup(res)
            }
            Keyword::Syncer => {
                self.unique_section(res, "syncer section", "syncer")?;
                self.syncer(res)
            }
            Keyword::Proxy => {
                self.unique_section(res, "proxy section", "proxy")?;
                let (options, plugins) = self.proxy_options()?;
                res.proxy.items.extend(options.items);
                res.plugins.extend(plugins);
                Ok(())
            }
            _ => Err(self.not_a_resource_statement(token)),
        }
    }

    fn unique_section(&mut self, res: &Resource, what: &str, key: &str) -> Parsed {
        let key = BString::from(bstr::concat([res.name.as_slice(), b":", key.as_bytes()]));
        let span = self.statement;
        self.unique(what, key.as_bstr(), span)
    }

    fn named_section(&mut self, res: &Resource, section: Section) -> Parsed<OptionList> {
        let (what, key) = match section {
            Section::Net => ("net section", "net"),
            Section::Handlers => ("handlers section", "handlers"),
            Section::Disk => ("disk section", "disk"),
            _ => ("resource options section", "res_options"),
        };
        self.unique_section(res, what, key)?;
        self.option_section(section)
    }

    /// `protocol X;` of 8.3 counts as an option of `net { }`.
    fn protocol(&mut self, res: &mut Resource, token: &Token) -> Parsed {
        let key = BString::from(bstr::concat([res.name.as_slice(), b": protocol"]));
        self.unique("protocol statement", key.as_bstr(), token.span)?;
        let value = self.word("TK_STRING")?;
        let upper = value.text.to_ascii_uppercase();
        if !matches!(upper.as_slice(), b"A" | b"B" | b"C") {
            let text = format!("unknown protocol '{}', should be one of A,B,C", value.text);
            self.diagnostics.error(text, Some(value.span));
        }
        self.punct(b';')?;
        if let Some(spec) = options::row_of(Section::Net, "protocol") {
            res.net.items.push(Opt { spec, value: Some(upper.into()), span: token.span });
        }
        Ok(())
    }

    fn ignore_on(&mut self, res: &Resource) -> Parsed {
        let at = self.place(self.statement);
        let span = self.statement;
        let text =
            format!("{at} in resource {}, WARN: The 'ignore-on' keyword is deprecated.", res.name);
        self.diagnostics.remark(text, Some(span));
        self.word("TK_STRING")?;
        self.punct(b';')?;
        Ok(())
    }

    /// A bare device, disk or meta-disk on resource level: the implicit volume 0.
    fn resource_volume_statement(
        &mut self,
        res: &mut Resource,
        keyword: Keyword,
        token: &Token,
    ) -> Parsed {
        if keyword == Keyword::Disk {
            let next = self.inputs.last().map_or(Kind::End, |i| i.lexer.peek().kind);
            match next {
                Kind::Punct(b'{') => {
                    res.disk.items.extend(self.named_section(res, Section::Disk)?.items);
                    return Ok(());
                }
                Kind::Word | Kind::Quoted => {}
                _ => {
                    let token = self.next();
                    return Err(self.not_a_word("TK_STRING | {", &token));
                }
            }
        }
        if keyword == Keyword::Device {
            let key = BString::from(bstr::concat([res.name.as_slice(), b":device"]));
            self.unique("device statement", key.as_bstr(), token.span)?;
        }
        let mut volumes = std::mem::take(&mut res.volumes);
        let volume = self.implicit_volume(&mut volumes);
        let result = match keyword {
            Keyword::Device => self.device(volume, token.span),
            Keyword::Disk => self.disk(volume, token.span),
            _ => self.meta_disk(volume, keyword == Keyword::FlexibleMetaDisk, token.span),
        };
        res.volumes = volumes;
        result
    }

    /// All hosts must have the same volumes of the same kind. Spec §6.4.
    fn compare_volume_sets(&mut self, res: &Resource) {
        if self.is_show() {
            return;
        }
        let Some((first, others)) = res.hosts.split_first() else { return };
        for other in others {
            for text in volume_set_differences(&res.name, first, other) {
                self.later(&text);
            }
            if self.diagnostics.items.len() >= COMPLAINTS_MAX {
                return;
            }
        }
    }
}

/// How messages name a host section: its host names.
pub(crate) fn section_names(host: &HostSection) -> BString {
    match (&host.kind, host.names.is_empty()) {
        (HostKind::StackedOn(_), true) => "UNKNOWN".into(),
        _ => BString::from(bstr::join(" ", &host.names)),
    }
}

/// The complaints about volumes that only one of two host sections has.
pub(crate) fn volume_set_differences(
    resource: &BString,
    first: &HostSection,
    other: &HostSection,
) -> Vec<String> {
    let (names, other_names) = (section_names(first), section_names(other));
    let mut texts = Vec::new();
    let mut a = first.volumes.iter().peekable();
    let mut b = other.volumes.iter().peekable();
    while texts.len() < COMPLAINTS_MAX {
        let (mine, theirs) = (a.peek(), b.peek());
        let order = match (mine, theirs) {
            (None, None) => return texts,
            (Some(_), None) => std::cmp::Ordering::Less,
            (None, Some(_)) => std::cmp::Ordering::Greater,
            (Some(x), Some(y)) => x.vnr.cmp(&y.vnr),
        };
        match order {
            std::cmp::Ordering::Less => {
                let vnr = a.next().map_or(0, |v| v.vnr);
                texts.push(format!(
                    "in resource {resource}, on {names} {{ ... }}: volume {vnr} not defined on \
                     {other_names}"
                ));
            }
            std::cmp::Ordering::Greater => {
                let vnr = b.next().map_or(0, |v| v.vnr);
                texts.push(format!(
                    "in resource {resource}, on {names} {{ ... }}: volume {vnr} missing (present \
                     on {other_names})"
                ));
            }
            std::cmp::Ordering::Equal => {
                if let (Some(x), Some(y)) = (a.next(), b.next())
                    && x.implicit != y.implicit
                {
                    texts.push(format!(
                        "in resource {resource}, on {names} resp. {other_names}: volume {} must \
                         not be implicit on one but not the other",
                        x.vnr
                    ));
                }
            }
        }
    }
    texts
}
