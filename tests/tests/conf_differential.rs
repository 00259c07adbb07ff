//! 2,000 random configurations: the original drbdadm and ours, without an unexplained difference.

use std::process::Command;

use drbdrs_tests::need::{Need, ORIGINAL_DRBDADM, trial};
use libtest_mimic::{Arguments, Failed};

fn main() {
    let args = Arguments::from_args();
    let needs = [Need::File(ORIGINAL_DRBDADM)];
    let tests = vec![trial("random_configurations_against_the_original", &needs, random)];
    libtest_mimic::run(&args, tests).exit();
}

fn random() -> Result<(), Failed> {
    let output = Command::new(env!("CARGO_BIN_EXE_conf-soak"))
        .args(["--cases", "2000", "--seed", "1"])
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{text}{}", String::from_utf8_lossy(&output.stderr));
    if output.status.success() { Ok(()) } else { Err(text.into_owned().into()) }
}
