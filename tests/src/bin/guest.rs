//! Builds the image of the kernel guests; with a script, also boots a guest and runs it there.
//!
//! `guest [--if-missing]`, `guest --run SCRIPT` (a file, or `-` for standard input). The guest has
//! one disk of 64 MiB.

use std::io::Read;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use drbdrs_tests::guest::{Config, Disk, Guest, image};

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        [] => {
            let image = image::rebuild()?;
            println!("guest: {} {}", image.kernel.display(), image.initrd.display());
        }
        ["--if-missing"] => {
            let image = image::image()?;
            println!("guest: {} {}", image.kernel.display(), image.initrd.display());
        }
        ["--run", file] => run(file)?,
        _ => bail!("usage: guest [--if-missing | --run SCRIPT]"),
    }
    Ok(())
}

fn run(file: &str) -> Result<()> {
    let script = if file == "-" {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text)?;
        text
    } else {
        std::fs::read_to_string(file)?
    };
    let start = Instant::now();
    let guest = Guest::boot(Config::new("guest").disk(Disk::Size(64 << 20)))?;
    eprintln!("guest: up after {:.1} s", start.elapsed().as_secs_f32());
    let output = guest.run_for(&script, Duration::from_secs(3600))?;
    println!("{}", output.out.trim_end());
    drop(guest);
    std::process::exit(output.status)
}
