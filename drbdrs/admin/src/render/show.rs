//! `drbdsetup show`: what `drbdadm adjust` reads. Spec: status-and-integration.md §2.7.

use std::fmt::Write;

use drbd_conf::measure;
use drbd_conf::options::{Kind, OPTIONS, OptionSpec, Section};

use crate::{Backing, MetaIndex, OptionSet, OptionValue, Resource, Snapshot, Volume};

/// What is shown.
#[derive(Clone, Copy, Debug, Default)]
pub struct ShowOptions {
    /// `--show-defaults`.
    pub defaults: bool,
}

/// One block per resource, an empty line between two.
#[must_use]
pub fn show(snapshot: &Snapshot, options: &ShowOptions) -> String {
    let one = |r| resource(r, options.defaults);
    snapshot.resources.iter().map(one).collect::<Vec<_>>().join("\n")
}

/// Text with its depth.
struct Block {
    text: String,
    depth: usize,
    defaults: bool,
}

impl Block {
    fn line(&mut self, line: impl std::fmt::Display) {
        let indent = self.depth * 4;
        // Writing to a string does not fail.
        let _ = writeln!(self.text, "{:indent$}{line}", "");
    }

    fn open(&mut self, name: impl std::fmt::Display) {
        self.line(format_args!("{name} {{"));
        self.depth += 1;
    }

    fn close(&mut self) {
        self.depth -= 1;
        self.line('}');
    }

    fn options(&mut self, name: &str, section: Section, set: &OptionSet) {
        self.open(name);
        for spec in OPTIONS.iter().filter(|o| o.section == section) {
            let value = set.effective(spec);
            let is_default = value == OptionValue::default_of(spec);
            if !is_default || self.defaults {
                self.option(spec, &value, is_default);
            }
        }
        self.close();
    }

    fn option(&mut self, spec: &OptionSpec, value: &OptionValue, is_default: bool) {
        let notes: Vec<&str> =
            measure::of(spec).into_iter().chain(is_default.then_some("default")).collect();
        let comment =
            if notes.is_empty() { String::new() } else { format!(" # {}", notes.join(", ")) };
        let value = match (value, spec.kind) {
            // Shown by its minor number; no default line for it in the original.
            (OptionValue::None, _) => return,
            (OptionValue::Number(n), _) => format!("{n}{}", spec.unit().letter()),
            (OptionValue::Bool(b), _) => (if *b { "yes" } else { "no" }).into(),
            (OptionValue::Text(t), Kind::Enum { .. }) => t.clone(),
            (OptionValue::Text(t), _) => quoted(t),
        };
        self.line(format_args!("{:<16}\t{value};{comment}", spec.name));
    }
}

/// In double quotes, with backslashes in front of what would end them.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

fn resource(resource: &Resource, defaults: bool) -> String {
    let mut block = Block { text: String::new(), depth: 0, defaults };
    block.open(format_args!("resource {}", word(&resource.name)));
    // The original forgets the options of a resource without volumes.
    if !resource.volumes.is_empty() || !resource.options.0.is_empty() {
        block.options("options", Section::Options, &resource.options);
    }
    if let Some(connection) = &resource.connection {
        block.options("net", Section::Net, &connection.options);
        block.open("_remote_host");
        block.line(format_args!("address\t\t\t{};", connection.peer));
        block.close();
    }
    block.open("_this_host");
    if let Some(connection) = &resource.connection {
        block.line(format_args!("address\t\t\t{};", connection.local));
    }
    for volume in &resource.volumes {
        show_volume(&mut block, volume);
    }
    block.close();
    block.close();
    block.text
}

/// Names that a configuration can not have without quotes get them.
fn word(name: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "%+-./:@_".contains(c);
    if !name.is_empty() && name.chars().all(plain) { name.into() } else { quoted(name) }
}

fn show_volume(block: &mut Block, volume: &Volume) {
    block.open(format_args!("volume {}", volume.volume));
    block.line(format_args!("device\t\t\tminor {};", volume.minor));
    if let Some(Backing { disk, meta_disk, meta_index, options, .. }) = &volume.backing {
        block.line(format_args!("disk\t\t\t{};", quoted(disk)));
        match meta_index {
            MetaIndex::Internal => block.line("meta-disk\t\t\tinternal;"),
            MetaIndex::Flexible => {
                block.line(format_args!("meta-disk\t\t\t{};", quoted(meta_disk)))
            }
            MetaIndex::Index(n) => {
                block.line(format_args!("meta-disk\t\t\t{} [ {n} ];", quoted(meta_disk)));
            }
        }
        block.options("disk", Section::Disk, options);
    }
    block.close();
}
