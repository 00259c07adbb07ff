//! The command line as observed with the original: getopt's rules, options for the backend.

use bstr::BString;
use drbdadm::cli::{Invocation, Outcome, parse};

fn understood(args: &[&str]) -> Outcome {
    let args: Vec<BString> = args.iter().map(|a| BString::from(*a)).collect();
    parse(&"drbdadm".into(), &args)
}

fn runs(args: &[&str]) -> Box<Invocation> {
    match understood(args) {
        Outcome::Run(invocation) => invocation,
        other => panic!("{args:?}: {other:?}"),
    }
}

fn refused(args: &[&str]) -> String {
    match understood(args) {
        Outcome::End { stderr, code: 1, .. } => stderr.to_string(),
        other => panic!("{args:?}: {other:?}"),
    }
}

fn words(list: &[BString]) -> Vec<String> {
    list.iter().map(ToString::to_string).collect()
}

#[test]
fn options_stand_anywhere_and_may_be_abbreviated() {
    let i = runs(&["up", "r0", "-d", "--config-f", "x", "-vv", "--stack", "r1"]);
    assert_eq!((i.command.name, i.dry_run, i.verbose, i.stacked), ("up", 1, 2, true));
    assert_eq!(i.config_file, Some("x".into()));
    assert_eq!(words(&i.names), ["r0", "r1"]);
    assert_eq!(runs(&["-cfile", "up", "r0"]).config_file, Some("file".into()));
    assert_eq!(runs(&["-dSc", "f", "up", "r0"]).config_file, Some("f".into()));
}

#[test]
fn options_of_the_command_go_to_the_backend_in_order() {
    let i = runs(&["primary", "--forc=yes", "r0"]);
    assert_eq!(words(&i.backend_options), ["--force=yes"]);
    let i = runs(&["connect", "--timeout", "r0", "--tcp-cork", "r1"]);
    assert_eq!(words(&i.backend_options), ["--timeout=r0", "--tcp-cork"]);
    assert_eq!(words(&i.names), ["r1"]);
    let i = runs(&["--", "--overwrite-data-of-peer", "primary", "r0"]);
    assert_eq!(words(&i.backend_options), ["--overwrite-data-of-peer"]);
    let i = runs(&["foo", "up", "r0"]);
    assert_eq!(words(&i.backend_options), ["foo"]);
    let i = runs(&["-W--foo=bar", "up", "r0"]);
    assert_eq!(words(&i.backend_options), ["--foo=bar"]);
    assert_eq!(words(&runs(&["create-md", "--size=5", "r0"]).backend_options), ["--size=5"]);
}

#[test]
fn mistakes_are_named_as_getopt_names_them() {
    let check = |args: &[&str], want: &str| assert_eq!(refused(args), want, "{args:?}");
    check(&["--nosuch", "up"], "drbdadm: unrecognized option '--nosuch'\ntry 'drbdadm help'\n");
    check(&["up", "-x"], "drbdadm: invalid option -- 'x'\ntry 'drbdadm help'\n");
    check(&["up", "-c"], "drbdadm: option requires an argument -- 'c'\ntry 'drbdadm help'\n");
    check(
        &["up", "--size=5", "r0"],
        "drbdadm: unrecognized option '--size'\ntry 'drbdadm help up'\n",
    );
    check(
        &["connect", "--al"],
        "drbdadm: option '--al' is ambiguous; possibilities: '--al-extents' '--al-updates' \
         '--al-updates' '--allow-two-primaries' '--always-asbp' '--allow-two-primaries' \
         '--always-asbp'\ntry 'drbdadm help'\n",
    );
    check(&["nosuch", "r0"], "drbdadm: Unknown command 'nosuch'\n");
    check(
        &["-t", "x", "up", "r0"],
        "The --config-to-test (-t) option is only allowed with the dump and sh-nop commands\n",
    );
}

#[test]
fn our_own_options_need_their_full_names() {
    assert_eq!(runs(&["--node-name=zulu", "dump"]).node_name, Some("zulu".into()));
    assert!(refused(&["--node=zulu", "dump"]).contains("unrecognized option '--node=zulu'"));
    assert!(refused(&["dump", "--format=yaml"]).contains("text, xml or json"));
}

#[test]
fn help_lists_the_options_of_a_command() {
    let Outcome::End { stdout, code: 0, .. } = understood(&["help", "detach"]) else {
        panic!("help ends with 0");
    };
    let text = stdout.to_string();
    assert!(text.starts_with("\nUSAGE: drbdadm detach [OPTION...] {all|RESOURCE...}\n"), "{text}");
    assert!(text.contains("\nOPTIONS FOR detach:\n  --force[=...]\n"), "{text}");
}
