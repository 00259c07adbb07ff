//! `cargo xtask demo`: what the programs can do, shown in a new directory, without root.

use std::fs;
use std::path::{Path, PathBuf};

use crate::run::{self, Failure};

/// Builds, then walks through configuration and meta-data of a two-node resource.
pub(crate) fn demo(keep: bool) -> Result<(), Failure> {
    run::cargo(&["build", "--release", "-p", "drbdadm", "-p", "drbdmeta"])?;
    let bin = target_dir()?.join("release");
    let dir = std::env::temp_dir().join(format!("drbdrs-demo-{}", std::process::id()));
    fs::create_dir(&dir)?;
    let result = walk(&bin, &dir);
    if keep {
        println!("\nthe demo's files are in {}", dir.display());
    } else {
        fs::remove_dir_all(&dir)?;
    }
    result
}

fn target_dir() -> Result<PathBuf, Failure> {
    let metadata = cargo_metadata::MetadataCommand::new()
        .current_dir(run::top())
        .no_deps()
        .exec()
        .map_err(|e| Failure(e.to_string()))?;
    Ok(metadata.target_directory.into_std_path_buf())
}

fn walk(bin: &Path, dir: &Path) -> Result<(), Failure> {
    let disk = dir.join("alpha.img");
    fs::File::create(&disk)?.set_len(64 << 20)?;
    fs::write(dir.join("drbd.conf"), configuration(&disk))?;
    let adm = |words: &[&str]| {
        let program = bin.join("drbdadm");
        let mut all = vec!["-c", "drbd.conf"];
        all.extend(words);
        run::command(&program.to_string_lossy(), &all).dir(dir).env("__DRBD_NODE__", "alpha").run()
    };
    println!("\n== a configuration, as drbdadm understands it");
    adm(&["dump"])?;
    println!("\n== what `drbdadm up` would run (a dry run, as the original prints it)");
    adm(&["-d", "up", "r0"])?;
    println!("\n== with everything that is inherited (--format json also says from where)");
    adm(&["-d", "dump", "r0"])?;
    println!("\n== meta-data on a plain file");
    let meta = |words: &[&str]| {
        let program = bin.join("drbdmeta");
        let mut all = vec!["--force", "0", "v08", "alpha.img", "internal"];
        all.extend(words);
        run::command(&program.to_string_lossy(), &all).dir(dir).run()
    };
    meta(&["create-md"])?;
    meta(&["show-gi"])?;
    meta(&["check"])?;
    println!("\nThe mirror itself (the daemon) is not part of this version yet; see CHANGELOG.md.");
    Ok(())
}

fn configuration(disk: &Path) -> String {
    format!(
        "global {{ usage-count no; disable-ip-verification; }}\n\
         common {{ net {{ protocol C; }} disk {{ resync-rate 10M; }} }}\n\
         resource r0 {{\n    device minor 0;\n    disk \"{}\";\n    meta-disk internal;\n    \
         on alpha {{ address 127.0.0.1:7789; }}\n    on bravo {{ address 127.0.0.1:7790; }}\n}}\n",
        disk.display()
    )
}
