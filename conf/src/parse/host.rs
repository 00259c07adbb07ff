//! Host sections: `on`, `floating`, `stacked-on-top-of`. Spec: config-and-drbdadm.md §3, §4.4, §6.4.

use bstr::{BStr, BString, ByteSlice};

use super::resource::section_names;
use super::{Form, Parsed, Parser, Stop};
use crate::keyword::Keyword;
use crate::lex::{Kind, Token};
use crate::model::{
    Address, Family, HostKind, HostSection, MetaIndex, OptionList, ProxySection, Resource, Span,
    Volume,
};
use crate::options::Section;

/// Name of a floating section: its address.
fn floating_name(address: &Address) -> BString {
    match address.family {
        Family::Ipv6 => format!("ipv6 {}", address.endpoint()).into(),
        Family::Ipv4 | Family::Ssocks | Family::Sdp => address.endpoint(),
    }
}

fn new_host(kind: HostKind, names: Vec<BString>, span: Span) -> HostSection {
    HostSection {
        kind,
        names,
        address: None,
        alternate_address: None,
        volumes: Vec::new(),
        options: OptionList::default(),
        proxy: None,
        node_id: None,
        span,
    }
}

impl Parser<'_> {
    /// `on names {` has been read, or `_this_host {`.
    pub(super) fn host(
        &mut self,
        res: &mut Resource,
        kind: HostKind,
        names: Vec<BString>,
    ) -> Parsed {
        let span = self.statement;
        self.section = span;
        let mut host = new_host(kind, names, span);
        self.claim_host(res, &host)?;
        let result = self.host_body(res, &mut host);
        res.hosts.push(host);
        result
    }

    fn claim_host(&mut self, res: &Resource, host: &HostSection) -> Parsed {
        for name in &host.names {
            let key = BString::from(bstr::concat([res.name.as_slice(), b": on ", name]));
            self.unique("host section", key.as_bstr(), host.span)?;
        }
        Ok(())
    }

    /// `floating addr ;` or `floating addr { }`.
    pub(super) fn floating(&mut self, res: &mut Resource) -> Parsed {
        let span = self.statement;
        self.section = span;
        let address = self.address(span)?;
        let name = floating_name(&address);
        let mut host = new_host(HostKind::Floating, vec![name], span);
        self.unique_address(&address, &host.names)?;
        host.address = Some(address);
        let token = self.next();
        let result = match token.kind {
            Kind::Punct(b';') => {
                self.claim_host(res, &host)?;
                self.end_of_host(res, &mut host, span)
            }
            Kind::Punct(b'{') => {
                self.claim_host(res, &host)?;
                self.host_body(res, &mut host)
            }
            _ => return Err(self.expected("{ | ;", &token, Form::Numbered)),
        };
        res.hosts.push(host);
        result
    }

    fn host_body(&mut self, res: &Resource, host: &mut HostSection) -> Parsed {
        let depth = self.depth;
        loop {
            let token = self.next();
            self.statement = token.span;
            let result = match token.kind {
                Kind::Punct(b'}') => return self.end_of_host(res, host, token.span),
                Kind::Key(k) => self.host_statement(res, host, k, &token),
                _ => match self.v9_host_statement(host, &token) {
                    Ok(false) => Err(self.not_a_host_statement(&token)),
                    Ok(true) => Ok(()),
                    Err(stop) => Err(stop),
                },
            };
            if !self.go_on(result, depth)? {
                let end = self.statement;
                return self.end_of_host(res, host, end);
            }
        }
    }

    fn not_a_host_statement(&mut self, token: &Token) -> Stop {
        let what = "disk | device | address | meta-disk | flexible-meta-disk";
        let stop = self.expected(what, token, Form::Plain);
        self.explain_if_v9(token);
        stop
    }

    fn host_statement(
        &mut self,
        res: &Resource,
        host: &mut HostSection,
        keyword: Keyword,
        token: &Token,
    ) -> Parsed {
        match keyword {
            Keyword::Address => {
                if host.kind == HostKind::Floating {
                    let text = "address statement not allowed for floating {} host sections";
                    self.later(text);
                    return Err(Stop(10));
                }
                host.address = Some(self.host_address(res, host, "address")?);
                Ok(())
            }
            Keyword::AlternateLinkAddress => {
                host.alternate_address = Some(self.host_address(res, host, "alt-address")?);
                Ok(())
            }
            Keyword::Device | Keyword::Disk | Keyword::MetaDisk | Keyword::FlexibleMetaDisk => {
                self.host_volume_statement(res, host, keyword, token)
            }
            Keyword::Volume => {
                let mut volumes = std::mem::take(&mut host.volumes);
                let result = self.volume(&mut volumes, &host.names, false);
                host.volumes = volumes;
                result
            }
            Keyword::Options => {
                host.options = self.option_section(Section::Options)?;
                Ok(())
            }
            Keyword::Proxy => self.host_proxy(host),
            _ => Err(self.not_a_host_statement(token)),
        }
    }

    fn host_address(&mut self, res: &Resource, host: &HostSection, key: &str) -> Parsed<Address> {
        let span = self.statement;
        self.claim_statement(res, host, &format!("{key} statement"), key)?;
        let address = self.address(span)?;
        self.unique_address(&address, &host.names)?;
        self.punct(b';')?;
        Ok(address)
    }

    fn claim_statement(
        &mut self,
        res: &Resource,
        host: &HostSection,
        what: &str,
        key: &str,
    ) -> Parsed {
        let span = self.statement;
        for name in &host.names {
            let key = bstr::concat([res.name.as_slice(), b":", name, b":", key.as_bytes()]);
            self.unique(what, key.as_bstr(), span)?;
        }
        Ok(())
    }

    /// A bare device, disk or meta-disk: the implicit volume 0 of the host.
    fn host_volume_statement(
        &mut self,
        res: &Resource,
        host: &mut HostSection,
        keyword: Keyword,
        token: &Token,
    ) -> Parsed {
        let mut volumes = std::mem::take(&mut host.volumes);
        let result = self.host_volume_body(res, host, &mut volumes, keyword, token);
        host.volumes = volumes;
        result?;
        if keyword == Keyword::Device { self.claim_devices(host) } else { Ok(()) }
    }

    fn host_volume_body(
        &mut self,
        res: &Resource,
        host: &HostSection,
        volumes: &mut Vec<Volume>,
        keyword: Keyword,
        token: &Token,
    ) -> Parsed {
        // `disk /dev/x;` and `disk { }` share one name, as in the original.
        let key = match keyword {
            Keyword::Device => "device",
            Keyword::Disk => "disk",
            _ => "meta-disk",
        };
        self.claim_statement(res, host, &format!("{key} statement"), key)?;
        let volume = self.implicit_volume(volumes);
        match keyword {
            Keyword::Device => self.device(volume, token.span),
            Keyword::Disk => self.disk(volume, token.span),
            _ => self.meta_disk(volume, keyword == Keyword::FlexibleMetaDisk, token.span),
        }
    }

    /// Claims the minors and device names of volumes that have one and are not claimed yet.
    fn claim_devices(&mut self, host: &mut HostSection) -> Parsed {
        let HostSection { names, volumes, .. } = host;
        volumes.iter_mut().try_for_each(|volume| self.claim_device(names, volume))
    }

    /// Claims a volume's minor and device name for every host name, once.
    pub(super) fn claim_device(&mut self, names: &[BString], volume: &mut Volume) -> Parsed {
        let Some(minor) = volume.minor.filter(|_| !volume.claimed) else { return Ok(()) };
        volume.claimed = true;
        let span = volume.device_span.unwrap_or(volume.span);
        for name in names {
            self.claim_minor(name.as_bstr(), minor, span)?;
            if let Some(device) = &volume.device {
                let key = bstr::concat([b"device:".as_slice(), name, b":", device]);
                self.unique("device", key.as_bstr(), span)?;
            }
        }
        Ok(())
    }

    fn claim_minor(&mut self, host: &BStr, minor: u32, span: Span) -> Parsed {
        let minor = minor.to_string();
        let key = bstr::concat([b"device-minor:".as_slice(), host, b":", minor.as_bytes()]);
        self.unique("device-minor", key.as_bstr(), span)
    }

    /// `proxy on names { }` of a host section.
    fn host_proxy(&mut self, host: &mut HostSection) -> Parsed {
        let span = self.statement;
        let token = self.next();
        if token.kind != Kind::Key(Keyword::On) {
            return Err(self.expected("TK_ON", &token, Form::Numbered));
        }
        let on = self.hosts(b'{')?;
        let depth = self.depth;
        let mut proxy = ProxySection { on, span, ..ProxySection::default() };
        loop {
            let token = self.next();
            if token.kind == Kind::Punct(b'}') {
                break;
            }
            let result = self.host_proxy_statement(&token, &mut proxy);
            if !self.go_on(result, depth)? {
                break;
            }
        }
        for (missing, word) in [(&proxy.inside, "inside"), (&proxy.outside, "outside")] {
            if missing.is_none() && !self.stepped_over {
                let text = format!(
                    "in section: on {} {{ proxy on {} {{ ... }} }}: '{word}' keyword missing.",
                    section_names(host),
                    Self::join(&proxy.on)
                );
                self.later_at(span, &text);
            }
        }
        host.proxy = Some(proxy);
        Ok(())
    }

    fn host_proxy_statement(&mut self, token: &Token, proxy: &mut ProxySection) -> Parsed {
        match token.kind {
            Kind::Key(Keyword::Inside | Keyword::Outside) => {
                let address = self.address(token.span)?;
                self.unique_address(&address, &proxy.on)?;
                self.punct(b';')?;
                if token.kind == Kind::Key(Keyword::Inside) {
                    proxy.inside = Some(address);
                } else {
                    proxy.outside = Some(address);
                }
            }
            Kind::Key(Keyword::Options) => {
                let (options, plugins) = self.proxy_options()?;
                proxy.options.items.extend(options.items);
                proxy.plugins.extend(plugins);
            }
            _ => return Err(self.expected("inside | outside", token, Form::Plain)),
        }
        Ok(())
    }

    /// `stacked-on-top-of LOWER { }`.
    pub(super) fn stacked(&mut self, res: &mut Resource) -> Parsed {
        let span = self.statement;
        self.section = span;
        let lower = self.word("TK_STRING")?.text;
        let key = BString::from(bstr::concat([b"stacked:".as_slice(), &lower]));
        self.unique("stacked-on-top-of", key.as_bstr(), span)?;
        self.punct(b'{')?;
        let depth = self.depth;
        let mut host = new_host(HostKind::StackedOn(lower), Vec::new(), span);
        loop {
            // Complaints about statements in here name the line at which the section begins.
            self.statement = span;
            let token = self.next();
            let result = match token.kind {
                Kind::Punct(b'}') => break,
                Kind::Key(k) => self.stacked_statement(res, &mut host, k, &token),
                _ => Err(self.not_a_stacked_statement(&token)),
            };
            if !self.go_on(result, depth)? {
                break;
            }
        }
        // The volumes are complete only after resolution; only the address must be there.
        self.inherit(res, &mut host, true)?;
        if host.address.is_none() && !self.stepped_over {
            self.missing(res, &host, "address");
        }
        res.hosts.push(host);
        Ok(())
    }

    fn not_a_stacked_statement(&mut self, token: &Token) -> Stop {
        self.expected("device | address | proxy", token, Form::Plain)
    }

    fn stacked_statement(
        &mut self,
        res: &Resource,
        host: &mut HostSection,
        keyword: Keyword,
        token: &Token,
    ) -> Parsed {
        match keyword {
            Keyword::Device => {
                let mut volumes = std::mem::take(&mut host.volumes);
                let volume = self.implicit_volume(&mut volumes);
                let result = self.device(volume, token.span);
                host.volumes = volumes;
                result
            }
            Keyword::Address => {
                let key = bstr::concat([res.name.as_slice(), b":stacked:address"]);
                let span = token.span;
                self.unique("address statement", key.as_bstr(), span)?;
                host.address = Some(self.stacked_address(span)?);
                Ok(())
            }
            Keyword::AlternateLinkAddress => {
                host.alternate_address = Some(self.stacked_address(token.span)?);
                Ok(())
            }
            Keyword::Volume => {
                let mut volumes = std::mem::take(&mut host.volumes);
                let result = self.volume(&mut volumes, &[], true);
                host.volumes = volumes;
                result
            }
            Keyword::Proxy => self.host_proxy(host),
            _ => Err(self.not_a_stacked_statement(token)),
        }
    }

    fn stacked_address(&mut self, span: Span) -> Parsed<Address> {
        let address = self.address(span)?;
        self.unique_address(&address, &[])?;
        self.punct(b';')?;
        Ok(address)
    }

    /// Resource level volumes fill what the host's volumes lack. Spec §4.4.
    fn inherit(
        &mut self,
        res: &Resource,
        host: &mut HostSection,
        stacked: bool,
    ) -> Parsed<Vec<usize>> {
        self.count_volumes(res.volumes.len(), host)?;
        let mut inherited_disks = Vec::new();
        for from in &res.volumes {
            let found = host.volumes.binary_search_by_key(&from.vnr, |v| v.vnr);
            let at = match found {
                Ok(at) => at,
                Err(at) => {
                    let span = from.span;
                    let fresh = Volume {
                        vnr: from.vnr,
                        implicit: from.implicit,
                        span,
                        ..Volume::default()
                    };
                    host.volumes.insert(at, fresh);
                    at
                }
            };
            let Some(volume) = host.volumes.get_mut(at) else { continue };
            if volume.disk.is_none() && !stacked && from.disk.is_some() {
                volume.disk.clone_from(&from.disk);
                volume.disk_span = from.disk_span;
                inherited_disks.push(at);
            }
            if volume.minor.is_none() {
                volume.minor = from.minor;
                volume.minor_span = from.minor_span;
            }
            // A name of another minor would make a pair that no dump could be read from again.
            if volume.device.is_none() && volume.minor == from.minor {
                volume.device.clone_from(&from.device);
                volume.name_span = from.name_span;
            }
            if volume.meta_disk.is_none() && !stacked {
                volume.meta_disk.clone_from(&from.meta_disk);
            }
        }
        Ok(inherited_disks)
    }

    /// The host section is complete: inheritance, then what must be there and must be unique.
    fn end_of_host(&mut self, res: &Resource, host: &mut HostSection, end: Span) -> Parsed {
        let inherited = self.inherit(res, host, false)?;
        self.statement = end;
        if host.volumes.iter().any(|v| v.implicit) && host.volumes.iter().any(|v| v.vnr != 0) {
            let text =
                format!("in resource {}: you must not mix implicit and explicit volumes", res.name);
            self.later_at(end, &text);
        }
        for volume in &mut host.volumes {
            // Where an inherited device is claimed: at the end of the host section.
            volume.device_span.get_or_insert(end);
        }
        self.claim_inherited_disks(host, &inherited, end)?;
        self.claim_devices(host)?;
        if !self.is_show() && !self.stepped_over {
            self.complain_about_missing(res, host);
        }
        self.claim_meta_disks(host, end)
    }

    fn claim_inherited_disks(
        &mut self,
        host: &HostSection,
        inherited: &[usize],
        end: Span,
    ) -> Parsed {
        for at in inherited {
            let Some(disk) = host.volumes.get(*at).and_then(|v| v.disk.as_ref()) else { continue };
            for name in &host.names {
                let key = bstr::concat([b"disk:".as_slice(), name, b":", disk]);
                self.unique("disk", key.as_bstr(), end)?;
            }
        }
        Ok(())
    }

    fn claim_meta_disks(&mut self, host: &HostSection, end: Span) -> Parsed {
        for volume in &host.volumes {
            let Some(meta) = &volume.meta_disk else { continue };
            let index: &[u8] = match &meta.index {
                MetaIndex::Internal => continue,
                MetaIndex::Flexible => b"flexible",
                MetaIndex::Indexed(n) => n,
            };
            for name in &host.names {
                let key = bstr::concat([name.as_slice(), b":", &meta.device, b"[", index, b"]"]);
                self.unique("meta-disk", key.as_bstr(), end)?;
            }
        }
        Ok(())
    }

    /// "keyword missing". Spec §6.4.
    fn complain_about_missing(&mut self, res: &Resource, host: &mut HostSection) {
        if host.address.is_none() && !self.v9_address_may_follow(host) {
            self.missing(res, host, "address");
        }
        for volume in &host.volumes {
            if volume.minor.is_none() && volume.device.is_none() {
                self.missing(res, host, "device");
            }
            if volume.disk.is_none() {
                self.missing(res, host, "disk");
            }
            if volume.meta_disk.is_none() {
                self.missing(res, host, "meta-disk");
                self.missing(res, host, "meta-index");
            }
        }
    }

    fn missing(&mut self, res: &Resource, host: &HostSection, word: &str) {
        let span = self.section;
        let text = format!(
            "in resource {}, on {} {{ ... }}: '{word}' keyword missing.",
            res.name,
            section_names(host)
        );
        self.later_at(span, &text);
    }
}
