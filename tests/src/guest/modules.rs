//! Kernel modules for the guest: unpacked, with the tables that modprobe reads.
//!
//! What depmod would find out stands in each module's `.modinfo` section as `name=value` strings.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// Parts of the module tree that the guest gets: folders, or single modules.
const WANTED: &[&str] = &[
    "drivers/block",
    "drivers/md",
    "drivers/virtio",
    "drivers/net/virtio_net",
    "drivers/net/net_failover",
    "net/core",
    "net/sched/sch_netem",
    "lib",
    "mm",
    "fs/ext4",
    "fs/jbd2",
    "fs/mbcache",
    "crypto",
    "arch/x86/crypto",
];

/// Without these the guest is useless.
const ESSENTIAL: &[&str] =
    &["drbd", "nbd", "ublk_drv", "virtio_blk", "virtio_net", "ext4", "loop", "brd"];

/// A module.
struct Module {
    /// Path below `/lib/modules/VERSION`, without compression ending.
    path: String,
    content: Vec<u8>,
    needs: Vec<String>,
    aliases: Vec<String>,
}

/// The modules and tables below `/lib/modules/VERSION`: path and content.
///
/// # Errors
/// Something can not be read, or an essential module is not there.
pub(super) fn collect(folder: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let mut found = BTreeMap::new();
    for wanted in WANTED {
        let path = folder.join("kernel").join(wanted);
        let mut files = Vec::new();
        if path.is_dir() {
            walk(&path, &mut files)?;
        } else {
            let endings = ["ko", "ko.xz"].map(|ending| path.with_extension(ending));
            files.extend(endings.into_iter().filter(|p| p.is_file()));
        }
        for file in files {
            let Some(name) = module_name(&file) else { continue };
            let module = load(folder, &file).with_context(|| file.display().to_string())?;
            found.insert(name, module);
        }
    }
    let builtin = fs::read_to_string(folder.join("modules.builtin"))?;
    let builtin: BTreeSet<String> =
        builtin.lines().filter_map(|line| module_name(Path::new(line))).collect();
    for essential in ESSENTIAL {
        let is_there = found.contains_key(*essential) || builtin.contains(*essential);
        ensure!(is_there, "the kernel package has no module {essential}");
    }
    let mut out = tables(&found);
    out.extend(found.into_values().map(|m| (m.path, m.content)));
    for table in ["modules.builtin", "modules.builtin.modinfo", "modules.order"] {
        if let Ok(content) = fs::read(folder.join(table)) {
            out.push((table.to_owned(), content));
        }
    }
    Ok(out)
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() { walk(&path, files)? } else { files.push(path) }
    }
    Ok(())
}

/// `dm-mod.ko.xz` is module `dm_mod`.
fn module_name(file: &Path) -> Option<String> {
    let name = file.file_name()?.to_str()?;
    let name = name.strip_suffix(".xz").unwrap_or(name).strip_suffix(".ko")?;
    Some(name.replace('-', "_"))
}

fn load(folder: &Path, file: &Path) -> Result<Module> {
    let packed = fs::read(file)?;
    let path = file.strip_prefix(folder)?.to_str().context("a name that is no text")?;
    let (path, content) = match path.strip_suffix(".xz") {
        Some(path) => {
            let mut content = Vec::new();
            lzma_rust2::XzReader::new(packed.as_slice(), false).read_to_end(&mut content)?;
            (path, content)
        }
        None => (path, packed),
    };
    let mut module =
        Module { path: path.to_owned(), content, needs: Vec::new(), aliases: Vec::new() };
    // Strings of the section lie one after the other, each ended by a zero.
    for text in module.content.split(|byte| *byte == 0) {
        if let Some(list) = text.strip_prefix(b"depends=") {
            let list = String::from_utf8_lossy(list).replace('-', "_");
            module.needs = list.split(',').filter(|n| !n.is_empty()).map(str::to_owned).collect();
        } else if let Some(alias) = text.strip_prefix(b"alias=") {
            module.aliases.push(String::from_utf8_lossy(alias).into_owned());
        }
    }
    Ok(module)
}

fn tables(modules: &BTreeMap<String, Module>) -> Vec<(String, Vec<u8>)> {
    let mut dependencies = String::new();
    let mut aliases = String::new();
    for (name, module) in modules {
        let mut needs = Vec::new();
        let mut seen = BTreeSet::from([name.clone()]);
        closure(modules, module, &mut seen, &mut needs);
        dependencies.push_str(&format!("{}: {}\n", module.path, needs.join(" ")));
        for alias in &module.aliases {
            aliases.push_str(&format!("alias {} {name}\n", normalised(alias)));
        }
    }
    vec![
        ("modules.dep".to_owned(), dependencies.into_bytes()),
        ("modules.alias".to_owned(), aliases.into_bytes()),
        ("modules.symbols".to_owned(), Vec::new()),
    ]
}

/// All that a module needs, the module that must be loaded first last.
fn closure(
    modules: &BTreeMap<String, Module>,
    module: &Module,
    seen: &mut BTreeSet<String>,
    out: &mut Vec<String>,
) {
    for need in &module.needs {
        let Some(found) = modules.get(need) else { continue };
        if seen.insert(need.clone()) {
            out.push(found.path.clone());
            closure(modules, found, seen, out);
        }
    }
}

/// Dashes become underscores, as in the names that modprobe is asked for; not inside brackets.
fn normalised(alias: &str) -> String {
    let mut in_brackets = false;
    let one = |c| {
        in_brackets = (in_brackets || c == '[') && c != ']';
        if c == '-' && !in_brackets { '_' } else { c }
    };
    alias.chars().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_name_everything_that_is_needed() {
        let module = |path: &str, needs: &[&str]| Module {
            path: path.to_owned(),
            content: Vec::new(),
            needs: needs.iter().map(|n| (*n).to_owned()).collect(),
            aliases: vec!["crypto-md[4-5]".to_owned()],
        };
        let modules = BTreeMap::from([
            ("a".to_owned(), module("k/a.ko", &["b", "builtin"])),
            ("b".to_owned(), module("k/b.ko", &["c"])),
            ("c".to_owned(), module("k/c.ko", &[])),
        ]);
        let tables = tables(&modules);
        assert_eq!(tables[0].1, b"k/a.ko: k/b.ko k/c.ko\nk/b.ko: k/c.ko\nk/c.ko: \n");
        assert!(tables[1].1.starts_with(b"alias crypto_md[4-5] a\n"));
        assert_eq!(module_name(Path::new("x/dm-mod.ko.xz")).as_deref(), Some("dm_mod"));
    }
}
