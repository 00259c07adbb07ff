//! `drbdadm dump`. Spec: config-and-drbdadm.md §13.1.

use bstr::{BStr, BString, ByteSlice};

use super::{TEXT_MAX, TooLong, quoted, quoted_host};
use crate::model::{
    Address, Config, Global, HostKind, HostSection, MetaIndex, OptionList, Resource, UsageCount,
    Volume,
};
use crate::source::Sources;

/// What a dump says besides the configuration itself.
pub struct Context<'a> {
    /// Files, for the comments.
    pub sources: &'a Sources,
    /// Local host name.
    pub node: &'a BStr,
    /// `-v` was given: the global section is shown even if it says nothing.
    pub verbose: bool,
}

/// The whole configuration.
///
/// # Errors
/// A value is too long for the original's printer.
pub fn whole(config: &Config, context: &Context<'_>) -> Result<BString, TooLong> {
    let mut p = Printer::default();
    p.line(&[b"# ", context.sources.main()]);
    p.global(&config.global, context.verbose);
    if let Some(common) = &config.common {
        p.line(&[b"common {"]);
        p.depth += 1;
        p.sections(common)?;
        p.depth -= 1;
        p.line(&[b"}"]);
        p.line(&[]);
    }
    for resource in &config.resources {
        p.resource(resource, context)?;
    }
    Ok(p.out.into())
}

/// One resource.
///
/// # Errors
/// A value is too long for the original's printer.
pub fn one(resource: &Resource, context: &Context<'_>) -> Result<BString, TooLong> {
    let mut p = Printer::default();
    p.resource(resource, context)?;
    Ok(p.out.into())
}

#[derive(Default)]
struct Printer {
    out: Vec<u8>,
    depth: usize,
}

impl Printer {
    fn indent(&mut self) {
        self.out.resize(self.out.len() + 4 * self.depth, b' ');
    }

    fn line(&mut self, parts: &[&[u8]]) {
        if !parts.is_empty() {
            self.indent();
        }
        for part in parts {
            self.out.extend_from_slice(part);
        }
        self.out.push(b'\n');
    }

    /// Name padded to `width`, blank, value right-aligned in at least 3, semicolon.
    fn padded(&mut self, name: &str, width: usize, value: &[u8]) {
        self.indent();
        let width = width.saturating_sub(4 * self.depth);
        self.out.extend_from_slice(format!("{name:<width$} ").as_bytes());
        for _ in value.len()..3 {
            self.out.push(b' ');
        }
        self.out.extend_from_slice(value);
        self.out.extend_from_slice(b";\n");
    }

    fn word(&self, text: &BStr) -> Result<BString, TooLong> {
        let text = quoted(text);
        if text.len() > TEXT_MAX { Err(TooLong) } else { Ok(text) }
    }

    fn global(&mut self, global: &Global, verbose: bool) {
        let shown = global.minor_count.is_some()
            || global.disable_ip_verification
            || global.dialog_refresh.unwrap_or(1) != 1
            || global.usage_count != UsageCount::Ask
            || verbose;
        if !shown {
            return;
        }
        self.line(&[b"global {"]);
        self.depth += 1;
        if global.disable_ip_verification {
            self.line(&[b"disable-ip-verification;"]);
        }
        let number = |p: &mut Self, name: &str, value: Option<u32>, default: u32| {
            if let Some(value) = value.filter(|v| *v != default) {
                p.line(&[format!("{name} {value};").as_bytes()]);
            }
        };
        number(self, "minor-count", global.minor_count, 0);
        number(self, "dialog-refresh", global.dialog_refresh, 1);
        match global.usage_count {
            UsageCount::Yes => self.line(&[b"usage-count yes;"]),
            UsageCount::No => self.line(&[b"usage-count no;"]),
            UsageCount::Ask => {}
        }
        // The documented defaults, which the original compares with. Unset ones are not shown.
        number(self, "cmd-timeout-short", global.cmd_timeout_short, 5);
        number(self, "cmd-timeout-medium", global.cmd_timeout_medium, 121);
        number(self, "cmd-timeout-long", global.cmd_timeout_long, 600);
        self.depth -= 1;
        self.line(&[b"}"]);
        self.line(&[]);
    }

    fn resource(&mut self, res: &Resource, context: &Context<'_>) -> Result<(), TooLong> {
        let name = self.word(res.name.as_bstr())?;
        let ignored = if res.is_ignored() { "ignored" } else { "not ignored" };
        let stacked = if res.is_stacked() { "stacked" } else { "not stacked" };
        let file = context.sources.absolute(res.span.file);
        self.line(&[
            format!("# resource {name} on {}: {ignored}, {stacked}", context.node).as_bytes()
        ]);
        self.line(&[format!("# defined at {file}:{}", res.span.line).as_bytes()]);
        self.line(&[b"resource ", &name, b" {"]);
        self.depth += 1;
        for host in &res.hosts {
            self.host(host)?;
        }
        self.sections(res)?;
        self.depth -= 1;
        self.line(&[b"}"]);
        self.line(&[]);
        Ok(())
    }

    fn sections(&mut self, res: &Resource) -> Result<(), TooLong> {
        self.options("options", &res.options)?;
        self.options("net", &res.net)?;
        self.options("disk", &res.disk)?;
        self.startup(res)?;
        self.proxy_options("proxy", &res.proxy, &res.plugins)?;
        self.options("handlers", &res.handlers)
    }

    fn option_lines(&mut self, list: &OptionList) -> Result<(), TooLong> {
        for option in &list.items {
            match &option.value {
                // yes, no and the keyword `on` are values that the parser takes unquoted.
                Some(value) if option.spec.is_bool() => self.padded(option.spec.name, 24, value),
                Some(value) if value == "on" => self.padded(option.spec.name, 24, value),
                Some(value) => {
                    let value = self.word(value.as_bstr())?;
                    self.padded(option.spec.name, 24, &value);
                }
                None => self.line(&[option.spec.name.as_bytes(), b";"]),
            }
        }
        Ok(())
    }

    fn options(&mut self, name: &str, list: &OptionList) -> Result<(), TooLong> {
        if list.items.is_empty() {
            return Ok(());
        }
        self.line(&[name.as_bytes(), b" {"]);
        self.depth += 1;
        self.option_lines(list)?;
        self.depth -= 1;
        self.line(&[b"}"]);
        Ok(())
    }

    fn startup(&mut self, res: &Resource) -> Result<(), TooLong> {
        if res.startup.items.is_empty()
            && res.stacked_timeouts.is_none()
            && res.become_primary_on.is_empty()
        {
            return Ok(());
        }
        self.line(&[b"startup {"]);
        self.depth += 1;
        self.option_lines(&res.startup)?;
        if res.stacked_timeouts.is_some() {
            self.line(&[b"stacked-timeouts;"]);
        }
        if !res.become_primary_on.is_empty() {
            let names = host_list(&res.become_primary_on);
            self.padded("become-primary-on", 24, &names);
        }
        self.depth -= 1;
        self.line(&[b"}"]);
        Ok(())
    }

    fn proxy_options(
        &mut self,
        name: &str,
        list: &OptionList,
        plugins: &[BString],
    ) -> Result<(), TooLong> {
        if list.items.is_empty() && plugins.is_empty() {
            return Ok(());
        }
        self.line(&[name.as_bytes(), b" {"]);
        self.depth += 1;
        self.option_lines(list)?;
        if !plugins.is_empty() {
            self.line(&[b"plugin {"]);
            self.depth += 1;
            for plugin in plugins {
                self.line(&[plugin, b";"]);
            }
            self.depth -= 1;
            self.line(&[b"}"]);
        }
        self.depth -= 1;
        self.line(&[b"}"]);
        Ok(())
    }

    fn host(&mut self, host: &HostSection) -> Result<(), TooLong> {
        match &host.kind {
            HostKind::On => self.line(&[b"on ", &host_list(&host.names), b" {"]),
            HostKind::Floating => {
                if let Some(address) = &host.address {
                    let family = address.family.name().as_bytes();
                    self.line(&[b"floating ", family, b" ", &address.endpoint(), b" {"]);
                }
            }
            HostKind::StackedOn(lower) => {
                self.line(&[b"stacked-on-top-of ", &quoted(lower.as_bstr()), b" {"]);
                self.depth += 1;
                self.line(&[b"# on ", &BString::from(bstr::join(" ", &host.names)), b" "]);
                self.depth -= 1;
            }
        }
        let stacked = matches!(host.kind, HostKind::StackedOn(_));
        self.depth += 1;
        self.options("options", &host.options)?;
        for volume in &host.volumes {
            self.volume(volume, stacked)?;
        }
        if let (Some(address), false) = (&host.address, host.kind == HostKind::Floating) {
            self.address("address", address);
        }
        if let Some(address) = &host.alternate_address {
            self.address("alternate-link-address", address);
        }
        if let Some(proxy) = &host.proxy {
            self.line(&[b"proxy on ", &host_list(&proxy.on), b" {"]);
            self.depth += 1;
            if let Some(inside) = &proxy.inside {
                self.address("inside", inside);
            }
            if let Some(outside) = &proxy.outside {
                self.address("outside", outside);
            }
            self.proxy_options("options", &proxy.options, &proxy.plugins)?;
            self.depth -= 1;
            self.line(&[b"}"]);
        }
        self.depth -= 1;
        self.line(&[b"}"]);
        Ok(())
    }

    fn address(&mut self, name: &str, address: &Address) {
        let family = address.family.name();
        let text = format!("{name:<16} {family} {};", address.endpoint());
        self.line(&[text.as_bytes()]);
    }

    fn volume(&mut self, volume: &Volume, stacked: bool) -> Result<(), TooLong> {
        if !volume.implicit {
            self.line(&[format!("volume {} {{", volume.vnr).as_bytes()]);
            self.depth += 1;
        }
        self.options("disk", &volume.disk_options)?;
        self.device(volume)?;
        if !stacked {
            if let Some(disk) = &volume.disk {
                let disk = self.word(disk.as_bstr())?;
                self.padded("disk", 24, &disk);
            }
            self.meta_disk(volume)?;
        }
        if !volume.implicit {
            self.depth -= 1;
            self.line(&[b"}"]);
        }
        Ok(())
    }

    fn device(&mut self, volume: &Volume) -> Result<(), TooLong> {
        let Some(minor) = volume.minor else { return Ok(()) };
        self.indent();
        let blanks = 19usize.saturating_sub(4 * self.depth);
        self.out.extend_from_slice(b"device");
        self.out.resize(self.out.len() + blanks, b' ');
        if let Some(device) = &volume.device {
            let device = self.word(device.as_bstr())?;
            self.out.extend_from_slice(&device);
            self.out.push(b' ');
        }
        self.out.extend_from_slice(format!("minor {minor};\n").as_bytes());
        Ok(())
    }

    fn meta_disk(&mut self, volume: &Volume) -> Result<(), TooLong> {
        let Some(meta) = &volume.meta_disk else { return Ok(()) };
        match &meta.index {
            MetaIndex::Internal => self.padded("meta-disk", 24, b"internal"),
            MetaIndex::Flexible => {
                let device = self.word(meta.device.as_bstr())?;
                self.line(&[format!("{:<16} {device};", "meta-disk").as_bytes()]);
            }
            MetaIndex::Indexed(index) => {
                let device = self.word(meta.device.as_bstr())?;
                self.line(&[format!("{:<16} {device} [{index}];", "meta-disk").as_bytes()]);
            }
        }
        Ok(())
    }
}

/// Host names joined by blanks; quoted where they could not be read again otherwise.
fn host_list(names: &[BString]) -> BString {
    let is_special = |n: &BString| n == "_this_host" || n == "_remote_host";
    let shown = |n: &BString| if is_special(n) { n.clone() } else { quoted_host(n.as_bstr()) };
    bstr::join(" ", names.iter().map(shown)).into()
}
