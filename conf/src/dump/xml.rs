//! `drbdadm dump-xml`. Spec: config-and-drbdadm.md §13.2.

use bstr::{BStr, BString, ByteSlice};

use super::{TEXT_MAX, TooLong};
use crate::model::{
    Address, Config, Global, HostKind, HostSection, MetaIndex, OptionList, Resource, Volume,
};
use crate::source::Sources;

/// The whole configuration.
///
/// # Errors
/// A value is too long for the original's printer.
pub fn whole(config: &Config, sources: &Sources) -> Result<BString, TooLong> {
    let mut p = Printer::default();
    p.open(&format!("config file=\"{}\"", escaped(sources.main())));
    p.global(&config.global);
    if let Some(common) = &config.common {
        p.open("common");
        p.sections(common)?;
        p.close("common");
    }
    for resource in &config.resources {
        p.resource(resource, sources)?;
    }
    p.close("config");
    Ok(p.out)
}

/// One resource, not indented.
///
/// # Errors
/// A value is too long for the original's printer.
pub fn one(resource: &Resource, sources: &Sources) -> Result<BString, TooLong> {
    let mut p = Printer::default();
    p.resource(resource, sources)?;
    Ok(p.out)
}

fn escaped(text: &BStr) -> BString {
    let mut out = Vec::with_capacity(text.len());
    for byte in text.iter() {
        match byte {
            b'\'' => out.extend_from_slice(b"&apos;"),
            b'"' => out.extend_from_slice(b"&quot;"),
            b'<' => out.extend_from_slice(b"&lt;"),
            b'>' => out.extend_from_slice(b"&gt;"),
            b'&' => out.extend_from_slice(b"&amp;"),
            _ => out.push(*byte),
        }
    }
    out.into()
}

#[derive(Default)]
struct Printer {
    out: BString,
    depth: usize,
}

impl Printer {
    fn line(&mut self, text: impl AsRef<[u8]>) {
        let width = self.out.len() + 4 * self.depth;
        self.out.resize(width, b' ');
        self.out.extend_from_slice(text.as_ref());
        self.out.push(b'\n');
    }

    fn open(&mut self, tag: &str) {
        self.line(format!("<{tag}>"));
        self.depth += 1;
    }

    fn close(&mut self, tag: &str) {
        self.depth = self.depth.saturating_sub(1);
        self.line(format!("</{tag}>"));
    }

    fn element(&mut self, tag: &str, attributes: &str, text: &BStr) {
        let mut line = format!("<{tag}{attributes}>").into_bytes();
        line.extend_from_slice(&escaped(text));
        line.extend_from_slice(format!("</{tag}>").as_bytes());
        self.line(line);
    }

    fn global(&mut self, global: &Global) {
        let refresh = global.dialog_refresh.unwrap_or(1);
        if global.minor_count.is_none() && !global.disable_ip_verification && refresh == 1 {
            return;
        }
        self.open("global");
        if global.disable_ip_verification {
            self.line("<disable-ip-verification/>");
        }
        if let Some(count) = global.minor_count {
            self.line(format!("<minor-count count=\"{count}\"/>"));
        }
        if refresh != 1 {
            self.line(format!("<dialog-refresh refresh=\"{refresh}\"/>"));
        }
        self.close("global");
    }

    fn resource(&mut self, res: &Resource, sources: &Sources) -> Result<(), TooLong> {
        let name = escaped(res.name.as_bstr());
        let file = escaped(sources.absolute(res.span.file));
        let line = res.span.line;
        self.open(&format!("resource name=\"{name}\" conf-file-line=\"{file}:{line}\""));
        for host in &res.hosts {
            self.host(host)?;
        }
        self.sections(res)?;
        self.close("resource");
        Ok(())
    }

    fn sections(&mut self, res: &Resource) -> Result<(), TooLong> {
        self.options("options", &res.options)?;
        self.options("net", &res.net)?;
        self.options("disk", &res.disk)?;
        self.startup(res)?;
        self.proxy("proxy", &res.proxy, &res.plugins)?;
        self.options("handlers", &res.handlers)
    }

    fn option_lines(&mut self, list: &OptionList) -> Result<(), TooLong> {
        for option in &list.items {
            let name = option.spec.name;
            let Some(value) = &option.value else {
                self.line(format!("<option name=\"{name}\"/>"));
                continue;
            };
            let value = escaped(value.as_bstr());
            if value.len() > TEXT_MAX {
                return Err(TooLong);
            }
            let mut line = format!("<option name=\"{name}\" value=\"").into_bytes();
            line.extend_from_slice(&value);
            line.extend_from_slice(b"\"/>");
            self.line(line);
        }
        Ok(())
    }

    fn options(&mut self, name: &str, list: &OptionList) -> Result<(), TooLong> {
        if list.items.is_empty() {
            return Ok(());
        }
        self.open(&format!("section name=\"{name}\""));
        self.option_lines(list)?;
        self.close("section");
        Ok(())
    }

    fn startup(&mut self, res: &Resource) -> Result<(), TooLong> {
        if res.startup.items.is_empty()
            && res.stacked_timeouts.is_none()
            && res.become_primary_on.is_empty()
        {
            return Ok(());
        }
        self.open("section name=\"startup\"");
        self.option_lines(&res.startup)?;
        if res.stacked_timeouts.is_some() {
            self.line("<option name=\"stacked-timeouts\"/>");
        }
        if !res.become_primary_on.is_empty() {
            let names = BString::from(bstr::join(" ", &res.become_primary_on));
            let names = escaped(names.as_bstr());
            self.line(format!("<option name=\"become-primary-on\" value=\"{names}\"/>"));
        }
        self.close("section");
        Ok(())
    }

    fn proxy(&mut self, name: &str, list: &OptionList, plugins: &[BString]) -> Result<(), TooLong> {
        if list.items.is_empty() && plugins.is_empty() {
            return Ok(());
        }
        self.open(&format!("section name=\"{name}\""));
        self.option_lines(list)?;
        if !plugins.is_empty() {
            self.open("section name=\"plugin\"");
            for plugin in plugins {
                self.line(format!("<option name=\"{}\"/>", escaped(plugin.as_bstr())));
            }
            self.close("section");
        }
        self.close("section");
        Ok(())
    }

    fn host(&mut self, host: &HostSection) -> Result<(), TooLong> {
        if host.kind == HostKind::Floating {
            self.open("host floating=\"1\"");
        } else {
            let names = BString::from(bstr::join(" ", &host.names));
            self.open(&format!("host name=\"{}\"", escaped(names.as_bstr())));
        }
        self.options("options", &host.options)?;
        for volume in &host.volumes {
            self.volume(volume)?;
        }
        if let Some(address) = &host.address {
            self.address("address", address);
        }
        if let Some(proxy) = &host.proxy {
            let on = BString::from(bstr::join(" ", &proxy.on));
            self.open(&format!("proxy hostname=\"{}\"", escaped(on.as_bstr())));
            if let Some(inside) = &proxy.inside {
                self.address("inside", inside);
            }
            if let Some(outside) = &proxy.outside {
                self.address("outside", outside);
            }
            self.proxy("options", &proxy.options, &proxy.plugins)?;
            self.close("proxy");
        }
        self.close("host");
        Ok(())
    }

    fn address(&mut self, tag: &str, address: &Address) {
        let family = address.family.name();
        let attributes = format!(" family=\"{family}\" port=\"{}\"", address.port);
        self.element(tag, &attributes, address.addr.as_bstr());
    }

    fn volume(&mut self, volume: &Volume) -> Result<(), TooLong> {
        self.open(&format!("volume vnr=\"{}\"", volume.vnr));
        self.options("disk", &volume.disk_options)?;
        if let Some(minor) = volume.minor {
            let device = volume.device.clone().unwrap_or_default();
            self.element("device", &format!(" minor=\"{minor}\""), device.as_bstr());
        }
        if let Some(disk) = &volume.disk {
            self.element("disk", "", disk.as_bstr());
        }
        if let Some(meta) = &volume.meta_disk {
            match &meta.index {
                MetaIndex::Internal => self.element("meta-disk", "", "internal".into()),
                MetaIndex::Flexible => self.element("meta-disk", "", meta.device.as_bstr()),
                MetaIndex::Indexed(index) => {
                    let attributes = format!(" index=\"{index}\"");
                    self.element("meta-disk", &attributes, meta.device.as_bstr());
                }
            }
        }
        self.close("volume");
        Ok(())
    }
}
