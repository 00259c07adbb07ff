//! Syntax that only version 9 files have: accepted where it means a two-node resource, refused by
//! name otherwise. Spec: config-and-drbdadm.md §18.
//!
//! The words are not reserved (an 8.4 file may use them as names), so they arrive here as plain
//! words where no 8.4 statement begins.

use std::collections::HashSet;

use bstr::{BString, ByteSlice};

use super::limits::COMPLAINTS_MAX;
use super::options::NOT_AN_OPTION;
use super::{Form, Parsed, Parser, Stop};
use crate::keyword::Keyword;
use crate::lex::{Kind, Lexer, Token};
use crate::model::{Address, HostSection, Opt, Resource, Span};
use crate::options::{self, Section};

/// Options of version 9 that do nothing here; what is refused: [`asks_for_version_9`].
const IGNORED_OPTIONS: [&str; 12] = [
    "auto-promote",
    "quorum",
    "on-no-quorum",
    "quorum-minimum-redundancy",
    "on-suspended-primary-outdated",
    "peer-ack-window",
    "peer-ack-delay",
    "twopc-timeout",
    "twopc-retry-timeout",
    "auto-promote-timeout",
    "max-io-depth",
    "drbd8-api-compatibility",
];

/// Net and disk options of version 9 that are refused by name.
const REFUSED_OPTIONS: [&str; 12] = [
    "load-balance-paths",
    "allow-remote-read",
    "tls",
    "tls-keyring",
    "tls-privkey",
    "tls-certificate",
    "rdma-ctrl-rcvbuf-size",
    "rdma-ctrl-sndbuf-size",
    "max-bio-size",
    "block-size",
    "discard-granularity",
    "bitmap",
];

/// Statements of version 9 that are refused by name.
const REFUSED_STATEMENTS: [&str; 7] = [
    "template-file",
    "_peer_node_id",
    "_cstate",
    "_unknown",
    "via",
    "outside-address",
    "tiebreaker",
];

/// Which drivers a file wants, by the last part of the statement's name.
const MODULE_VERSION: [&str; 6] = ["eq", "ne", "gt", "ge", "lt", "le"];

/// Does the value ask for something that is not done here? Who relies on it must know: without
/// quorum both nodes may go on when they have lost each other.
fn asks_for_version_9(option: &str, value: &[u8]) -> bool {
    matches!(option, "auto-promote" | "quorum") && !matches!(value, b"no" | b"off")
}

/// What the current resource has said in version 9 syntax.
#[derive(Default)]
pub(super) struct Version9 {
    addresses: Vec<(BString, Address)>,
    connections: usize,
    /// Hosts whose address may still come from a connection.
    awaiting: Vec<BString>,
    /// Where the next `connection` of the resource is, if that has been looked for.
    ahead: Option<Ahead>,
}

/// The next `connection` on the level of the resource.
#[derive(Clone, Copy)]
enum Ahead {
    /// There is none up to the end of the resource.
    None,
    /// It is at this offset of the file.
    At(u32),
}

/// The host section of this name says the same address already.
fn has_address(res: &Resource, name: &BString, address: &Address) -> bool {
    let same = |a: &Address| a.addr == address.addr && a.port == address.port;
    res.hosts.iter().any(|h| h.names.contains(name) && h.address.as_ref().is_some_and(same))
}

/// Offset of the word `connection` in the braces in which the lexer stands.
fn find_connection(mut lexer: Lexer) -> Option<u32> {
    let mut depth = 0usize;
    loop {
        let token = lexer.next();
        match token.kind {
            Kind::End => return None,
            Kind::Punct(b'{') => depth += 1,
            Kind::Punct(b'}') => depth = depth.checked_sub(1)?,
            Kind::Word if depth == 0 && token.text == "connection" => {
                return Some(token.span.offset);
            }
            _ => {}
        }
    }
}

impl Parser<'_> {
    fn refuse_v9(&mut self, span: Span, construct: &str) -> Stop {
        let text = format!("'{construct}' belongs to DRBD 9 and is not supported");
        self.later_at(span, &text);
        Stop(10)
    }

    fn refuse_more_than_two(&mut self, span: Span) -> Stop {
        self.later_at(span, "more than two nodes (DRBD 9) are not supported");
        Stop(10)
    }

    /// Behind the original's complaint about a word: it belongs to version 9.
    fn explain_v9(&mut self, token: &Token, construct: &str) {
        let at = self.place(token.span);
        if let Some(complaint) = self.diagnostics.items.last_mut() {
            let text = format!("{at} '{construct}' belongs to DRBD 9 and is not supported\n");
            complaint.text.extend_from_slice(text.as_bytes());
        }
    }

    /// The same if the word is one of the constructs that are refused by name.
    pub(super) fn explain_if_v9(&mut self, token: &Token) {
        let Ok(word) = token.text.to_str() else { return };
        let refused = REFUSED_STATEMENTS.contains(&word) || REFUSED_OPTIONS.contains(&word);
        if token.kind == Kind::Word && refused {
            self.explain_v9(token, word);
        }
    }

    fn refuse_v9_option(&mut self, token: &Token, value: &BString) -> Stop {
        let stop = self.expected(NOT_AN_OPTION, token, Form::Plain);
        self.explain_v9(token, &format!("{} {value}", token.text));
        stop
    }

    /// `require-drbd-module-version-ge 9.0.1;`; `false`: something else.
    pub(super) fn module_version(&mut self, token: &Token) -> Parsed<bool> {
        let comparison = token.text.strip_prefix(b"require-drbd-module-version-");
        let known = |c: &[u8]| MODULE_VERSION.iter().any(|m| m.as_bytes() == c);
        if token.kind != Kind::Word || !comparison.is_some_and(known) {
            return Ok(false);
        }
        let is_number = |part: &[u8]| !part.is_empty() && part.iter().all(u8::is_ascii_digit);
        let version = self.inputs.last().map(|i| i.lexer.peek().text).unwrap_or_default();
        if version.split_str(".").count() != 3 || !version.split_str(".").all(is_number) {
            return Ok(false);
        }
        self.next();
        self.punct(b';')?;
        Ok(true)
    }

    pub(super) fn refuse_v9_disk_none(&mut self, token: &Token, span: Span) -> Parsed {
        if token.kind == Kind::Word && token.text == "none" {
            return Err(self.refuse_v9(span, "disk none"));
        }
        Ok(())
    }

    /// An option that the 8.4 table does not have; `false`: not one of version 9 either.
    pub(super) fn v9_option(&mut self, section: Section, token: &Token) -> Parsed<bool> {
        let Ok(word) = token.text.to_str() else { return Ok(false) };
        if token.kind != Kind::Word {
            return Ok(false);
        }
        match (section, word) {
            (Section::Options, w) if IGNORED_OPTIONS.contains(&w) => {
                let value = self.v9_value()?;
                if asks_for_version_9(w, &value) {
                    return Err(self.refuse_v9_option(token, &value));
                }
            }
            (Section::Handlers, "quorum-lost" | "disconnected") => {
                self.v9_value()?;
            }
            (Section::Net, "transport") => {
                let value = self.v9_value()?;
                if value != "tcp" {
                    return Err(self.refuse_v9_option(token, &value));
                }
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Value of an ignored option: anything up to the semicolon.
    fn v9_value(&mut self) -> Parsed<BString> {
        let token = self.next();
        match token.kind {
            Kind::Punct(b';') => return Ok("yes".into()),
            Kind::Key(Keyword::Yes | Keyword::No) => {}
            Kind::Word | Kind::Quoted | Kind::Number => {}
            _ => return Err(self.not_a_word("TK_STRING | TK_INTEGER", &token)),
        }
        self.punct(b';')?;
        Ok(token.text)
    }

    /// A statement of a resource; `false`: not one of version 9.
    pub(super) fn v9_resource_statement(
        &mut self,
        res: &mut Resource,
        token: &Token,
    ) -> Parsed<bool> {
        let Ok(word) = token.text.to_str() else { return Ok(false) };
        if token.kind != Kind::Word {
            return Ok(false);
        }
        match word {
            "connection" => self.connection(res, token.span)?,
            "connection-mesh" => self.connection_mesh(res, token.span)?,
            _ => return self.module_version(token),
        }
        Ok(true)
    }

    /// `connection-mesh { hosts a b; net { } }`.
    fn connection_mesh(&mut self, res: &mut Resource, span: Span) -> Parsed {
        self.count_connection(span)?;
        self.punct(b'{')?;
        loop {
            let token = self.next();
            self.statement = token.span;
            match token.kind {
                Kind::Punct(b'}') => return Ok(()),
                Kind::Key(Keyword::Net) => self.connection_net(res)?,
                Kind::Word if token.text == "hosts" => {
                    if self.hosts(b';')?.len() > 2 {
                        return Err(self.refuse_more_than_two(token.span));
                    }
                }
                _ => return Err(self.expected("hosts | net", &token, Form::Plain)),
            }
        }
    }

    fn count_connection(&mut self, span: Span) -> Parsed {
        self.v9.connections += 1;
        if self.v9.connections > 1 {
            return Err(self.refuse_more_than_two(span));
        }
        Ok(())
    }

    /// `connection [name] { host a address ..; host b ..; path { } net { } disk { } }`.
    fn connection(&mut self, res: &mut Resource, span: Span) -> Parsed {
        self.count_connection(span)?;
        let token = self.next();
        match token.kind {
            Kind::Punct(b'{') => {}
            _ => {
                if !matches!(token.kind, Kind::Word | Kind::Quoted) {
                    return Err(self.not_a_word("TK_STRING | {", &token));
                }
                self.punct(b'{')?;
            }
        }
        let (mut hosts, mut paths, mut depth) = (0usize, 0usize, 1usize);
        while depth > 0 {
            let token = self.next();
            self.statement = token.span;
            match token.kind {
                Kind::Punct(b'}') => depth -= 1,
                Kind::Key(Keyword::Net) if depth == 1 => self.connection_net(res)?,
                Kind::Key(Keyword::Disk) if depth == 1 => {
                    let list = self.option_section(Section::Disk)?;
                    res.disk.items.extend(list.items);
                }
                Kind::Word if token.text == "path" && depth == 1 => {
                    paths += 1;
                    if paths > 1 {
                        return Err(self.refuse_v9(token.span, "path (more than one)"));
                    }
                    hosts = 0;
                    self.punct(b'{')?;
                    depth += 1;
                }
                Kind::Word if token.text == "host" => {
                    hosts += 1;
                    if hosts > 2 {
                        return Err(self.refuse_more_than_two(token.span));
                    }
                    self.connection_host(res, token.span)?;
                }
                Kind::Word if token.text == "volume" => {
                    return Err(self.refuse_v9(token.span, "volume in connection"));
                }
                _ => return Err(self.expected("host | net | path", &token, Form::Plain)),
            }
        }
        self.give_addresses(res);
        Ok(())
    }

    /// `host name [address addr | port n];`
    fn connection_host(&mut self, res: &Resource, span: Span) -> Parsed {
        let name = self.word("TK_STRING")?.text;
        let token = self.next();
        match token.kind {
            Kind::Punct(b';') => return Ok(()),
            Kind::Key(Keyword::Address) => {
                let address = self.address(span)?;
                if !has_address(res, &name, &address) {
                    self.unique_address(&address, std::slice::from_ref(&name))?;
                }
                self.v9.addresses.push((name, address));
            }
            Kind::Word if token.text == "port" || token.text == "via" => {
                let word = token.text.to_string();
                return Err(self.refuse_v9(token.span, &word));
            }
            _ => return Err(self.expected("address | ;", &token, Form::Plain)),
        }
        self.punct(b';')?;
        Ok(())
    }

    fn connection_net(&mut self, res: &mut Resource) -> Parsed {
        let list = self.option_section(Section::Net)?;
        res.net.items.extend(list.items);
        Ok(())
    }

    /// `node-id N;` of a host section.
    pub(super) fn v9_host_statement(
        &mut self,
        host: &mut HostSection,
        token: &Token,
    ) -> Parsed<bool> {
        if token.kind != Kind::Word || token.text != "node-id" {
            return Ok(false);
        }
        let number = self.number()?;
        let id = self.range("node-id", &number, options::Unit::One, 0, 31)?;
        host.node_id = u32::try_from(id).ok();
        self.punct(b';')?;
        Ok(true)
    }

    /// `net { fencing X; }` of version 9 is a disk option here.
    pub(super) fn v9_net_fencing(&mut self, res: &mut Resource) {
        let is_fencing = |o: &Opt| o.spec.name == "fencing" && o.spec.section == Section::Disk;
        let moved: Vec<Opt> = res.net.items.extract_if(.., |o| is_fencing(o)).collect();
        res.disk.items.extend(moved);
    }

    /// A host without address: will a connection section of this resource give it one?
    pub(super) fn v9_address_may_follow(&mut self, host: &mut HostSection) -> bool {
        let known = self.v9.addresses.iter().find(|(name, _)| host.names.contains(name));
        if let Some((_, address)) = known {
            host.address = Some(address.clone());
            return true;
        }
        if !self.connection_ahead() {
            return false;
        }
        self.v9.awaiting.extend(host.names.first().cloned());
        true
    }

    /// Is there a `connection` further on in the resource? Looked for once, not for every host.
    fn connection_ahead(&mut self) -> bool {
        let Some(lexer) = self.inputs.last().map(|i| i.lexer.clone()) else { return false };
        match self.v9.ahead {
            Some(Ahead::None) => false,
            Some(Ahead::At(offset)) if lexer.peek().span.offset <= offset => true,
            _ => {
                let found = find_connection(lexer);
                self.v9.ahead = Some(found.map_or(Ahead::None, Ahead::At));
                found.is_some()
            }
        }
    }

    fn give_addresses(&mut self, res: &mut Resource) {
        for host in &mut res.hosts {
            if host.address.is_none() {
                let known = self.v9.addresses.iter().find(|(name, _)| host.names.contains(name));
                host.address = known.map(|(_, address)| address.clone());
            }
        }
    }

    /// End of a resource: hosts that were promised an address and got none.
    pub(super) fn v9_finish(&mut self, res: &mut Resource) {
        self.v9_net_fencing(res);
        let v9 = std::mem::take(&mut self.v9);
        if self.stepped_over {
            return;
        }
        let awaiting: HashSet<BString> = v9.awaiting.into_iter().collect();
        for host in res.hosts.iter().filter(|h| h.address.is_none()) {
            let Some(name) = host.names.first().filter(|n| awaiting.contains(*n)) else { continue };
            if self.diagnostics.items.len() >= COMPLAINTS_MAX {
                return;
            }
            let text = format!(
                "in resource {}, on {name} {{ ... }}: 'address' keyword missing.",
                res.name
            );
            self.later_at(host.span, &text);
        }
    }
}
