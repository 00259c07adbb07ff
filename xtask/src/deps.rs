//! `cargo xtask deps`: every dependency has an accepted licence, comes from the registry, and has no
//! known advisory, as far as the advisories are on this machine.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use cargo_metadata::MetadataCommand;
use serde::Deserialize;

use crate::run::{self, Failure};

/// The part of deny.toml that is read here; `cargo deny` understands the rest.
#[derive(Deserialize)]
struct Deny {
    licenses: Licenses,
}

#[derive(Deserialize)]
struct Licenses {
    allow: BTreeSet<String>,
}

/// Checks all packages that Cargo.lock names.
pub(crate) fn deps() -> Result<(), Failure> {
    let text = std::fs::read_to_string(run::top().join("deny.toml"))?;
    let deny: Deny = toml::from_str(&text).map_err(|e| Failure(format!("deny.toml: {e}")))?;
    let mut bad = Vec::new();
    let mut seen = 0;
    for manifest in ["Cargo.toml", "fuzz/Cargo.toml"] {
        let manifest = run::top().join(manifest);
        if !manifest.exists() {
            continue;
        }
        let metadata = MetadataCommand::new()
            .manifest_path(&manifest)
            .exec()
            .map_err(|e| Failure(format!("{}: {e}", manifest.display())))?;
        for package in &metadata.packages {
            seen += 1;
            let name = format!("{} {}", package.name, package.version);
            match &package.license {
                Some(l) if is_allowed(l, &deny.licenses.allow) => {}
                Some(l) => bad.push(format!("{name}: licence `{l}` is not accepted")),
                None => bad.push(format!("{name}: no licence named")),
            }
            if let Some(source) = &package.source
                && !source.is_crates_io()
            {
                bad.push(format!("{name}: comes from {source}, not from the registry"));
            }
        }
    }
    if bad.is_empty() {
        println!("deps: {seen} packages, licences and sources accepted");
    } else {
        return Err(Failure(bad.join("\n")));
    }
    if !run::has("cargo-deny") {
        println!("deps: advisories not checked: cargo-deny is not installed");
        return Ok(());
    }
    run::cargo(&["deny", "--offline", "check", "licenses", "bans", "sources"])?;
    let cargo_home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let cargo_home = cargo_home.or_else(|| std::env::home_dir().map(|home| home.join(".cargo")));
    if !cargo_home.is_some_and(|home| has_advisories(&home)) {
        println!(
            "deps: advisories not checked: no copy of them here (`cargo deny fetch` gets one)"
        );
        return Ok(());
    }
    run::cargo(&["deny", "--offline", "check", "advisories"])
}

/// Is there a copy of the database of advisories where cargo-deny keeps it?
fn has_advisories(cargo_home: &Path) -> bool {
    let folder = std::fs::read_dir(cargo_home.join("advisory-dbs"));
    folder.is_ok_and(|mut entries| entries.any(|e| e.is_ok_and(|e| e.path().is_dir())))
}

/// Evaluates a licence expression: `/` and `OR` need one accepted side, `AND` both.
fn is_allowed(expression: &str, allow: &BTreeSet<String>) -> bool {
    let text = expression.replace('/', " OR ").replace(['(', ')'], " ");
    // Parentheses only ever group ORs inside an AND in the wild, and AND of all its parts is
    // stricter than what is meant, never laxer: each AND part needs one accepted alternative.
    text.split(" AND ").all(|part| part.split(" OR ").any(|one| allow.contains(one.trim())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions() {
        let allow: BTreeSet<String> = ["MIT", "Unicode-3.0"].map(str::to_owned).into();
        assert!(is_allowed("MIT OR Apache-2.0", &allow));
        assert!(is_allowed("MIT/Apache-2.0", &allow));
        assert!(is_allowed("(MIT OR Apache-2.0) AND Unicode-3.0", &allow));
        assert!(!is_allowed("GPL-2.0", &allow));
        assert!(!is_allowed("MIT AND GPL-2.0", &allow));
    }
}
