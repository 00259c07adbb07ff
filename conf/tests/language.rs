//! The crate as its users see it: samples, hostile input, dumps that can be read again.

use bstr::{BStr, BString, ByteSlice};
use drbd_conf::dump::{json, text, xml};
use drbd_conf::expand::{Minors, expand, translate};
use drbd_conf::parse::{Loaded, Main, Request, load};
use drbd_conf::resolve::{Here, resolve};
use drbd_conf::source::{MemoryLoader, SystemLoader};
use drbd_conf::{check, effective, options};
use proptest::prelude::*;

fn request(main: Main<'_>, recover: bool) -> Request<'_> {
    Request { main, test: None, recover, node_minor: |_| None }
}

fn parse(input: &[u8], recover: bool) -> Loaded {
    let loader = MemoryLoader::default().with("t.conf", input);
    let main = Main::File(std::path::Path::new("t.conf"));
    load(&request(main, recover), &loader).expect("the file is there")
}

/// Everything that drbdadm does with a configuration before it prints.
fn everything(loaded: &mut Loaded, node: &str) -> Option<BString> {
    let here =
        Here { node: node.into(), has_address: &|_| false, by_proxy: false, terminal: false };
    resolve(loaded, &here);
    let context = text::Context { sources: &loaded.sources, node: node.into(), verbose: false };
    let dump = text::whole(&loaded.config, &context).ok()?;
    let _ = xml::whole(&loaded.config, &loaded.sources);
    expand(&mut loaded.config);
    let minors = Minors::of(&loaded.config);
    let names = check::Names::of(&loaded.config);
    for at in 0..loaded.config.resources.len() {
        check::check_resource(loaded, at, &names, None, false);
        translate(loaded, at, &minors, &node.into(), false);
    }
    let _ = json::dump(&loaded.config, &loaded.sources, node.into(), None);
    Some(dump)
}

fn without_comments(dump: &BStr) -> Vec<&BStr> {
    dump.lines().filter(|l| !l.starts_with(b"# ")).map(|l| l.as_bstr()).collect()
}

#[test]
fn samples_are_valid_for_each_of_their_nodes() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    for (file, node, here) in
        [("drbd.conf", "alpha", 3), ("drbd.conf", "charlie", 1), ("iscsi-8.3.conf", "iscsi2", 1)]
    {
        let path = folder.join(file);
        let mut loaded = load(&request(Main::File(&path), false), &SystemLoader).unwrap();
        assert_eq!(loaded.exit, None, "{:?}", loaded.diagnostics);
        everything(&mut loaded, node).unwrap();
        assert_eq!(loaded.exit, None, "{:?}", loaded.diagnostics);
        let count = loaded.config.resources.iter().filter(|r| !r.is_ignored()).count();
        assert_eq!(count, here, "{file} {node}");
    }
}

#[test]
fn values_have_a_type_and_an_origin() {
    let input = b"common { disk { c-max-rate 100M; } net { timeout 70; } }\n\
        resource r {\n syncer { rate 10M; }\n net { timeout 80; }\n device minor 1; disk /d; meta-disk internal;\n\
        on alpha { address 10.0.0.1:1; } on bravo { address 10.0.0.2:1; } }\n";
    let mut loaded = parse(input, false);
    everything(&mut loaded, "alpha");
    assert_eq!(loaded.exit, None, "{:?}", loaded.diagnostics);
    let resource = &loaded.config.resources[0];
    let row = |s, n| options::row_of(s, n).unwrap();
    let timeout = effective::effective(row(options::Section::Net, "timeout"), &resource.net);
    assert_eq!(timeout.value, Ok(options::Value::Number(80)));
    assert!(matches!(timeout.origin, effective::Origin::Written(s) if s.line == 4));
    let disk = &resource.me().unwrap().volumes[0].disk_options;
    let rate = effective::effective(row(options::Section::Disk, "resync-rate"), disk);
    assert_eq!(rate.value, Ok(options::Value::Number(10 * 1024)), "KiB per second");
    let max = effective::effective(row(options::Section::Disk, "c-max-rate"), disk);
    assert!(matches!(max.origin, effective::Origin::Written(s) if s.line == 1));
    let flushes = effective::effective(row(options::Section::Disk, "md-flushes"), disk);
    assert_eq!(flushes.origin, effective::Origin::Default);
}

#[test]
fn several_errors_are_found_in_one_run() {
    let input = b"resource r {\n net { tmeout 5; }\n}\nresource s {\n disk { al-extents; }\n}\n\
        resource t {\n net { timeout 0; }\n}\n";
    let once = parse(input, false);
    assert_eq!(once.diagnostics.error_count(), 1);
    let all = parse(input, true);
    assert_eq!(all.diagnostics.error_count(), 3, "{:?}", all.diagnostics);
    let shown = all.diagnostics.items[0].rendered(&all.sources).to_string();
    assert!(shown.starts_with("t.conf:2: Parse error: 'an option keyword' expected,\n"), "{shown}");
    assert!(shown.contains("2 |  net { tmeout 5; }"), "{shown}");
    assert!(shown.contains("did you mean 'timeout'?"), "{shown}");
}

#[test]
fn every_range_is_kept_at_both_ends() {
    for row in options::OPTIONS {
        let options::Kind::Number { min, max, unit, .. } = row.kind else { continue };
        let value = |n: u64| row.parse_value(Some(format!("{n}").as_bytes().as_bstr()));
        assert_eq!(value(min), Ok(options::Value::Number(min)), "{}", row.name);
        assert_eq!(value(max), Ok(options::Value::Number(max)), "{}", row.name);
        assert!(value(max + 1).is_err(), "{}", row.name);
        assert!(min == 0 || value(min - 1).is_err(), "{}", row.name);
        let _ = unit;
    }
}

#[test]
fn numbers_are_scaled_as_the_original_scales_them() {
    use options::{Unit, ValueError, parse_number};
    let good = |text: &str, unit, want| {
        assert_eq!(parse_number(text.as_bytes(), unit), Ok(want), "{text}");
    };
    good("1000s", Unit::Kib, 500);
    good("24k", Unit::Sector, 48);
    good("1", Unit::Kib, 1);
    good("1M", Unit::Kib, 1024);
    good("1s", Unit::Kib, 1);
    good("10K", Unit::One, 10_240);
    good(" 7", Unit::One, 7);
    good("-1", Unit::One, u64::MAX);
    assert_eq!(parse_number(b"", Unit::One), Err(ValueError::Empty));
    assert!(matches!(parse_number(b"5x", Unit::One), Err(ValueError::NotANumber(_))));
    assert!(parse_number(b"99999999999999999999", Unit::One).is_err());
    assert!(matches!(
        parse_number(b"18446744073709551615G", Unit::One),
        Err(ValueError::Overflow(_))
    ));
}

#[test]
fn include_loops_end_and_missing_files_are_named() {
    let loader = MemoryLoader::default()
        .with("a.conf", "include \"b.conf\";\ninclude \"*.conf\";\ninclude \"nowhere\";\n")
        .with("b.conf", "include \"a.conf\";\n");
    let main = Main::File(std::path::Path::new("a.conf"));
    let loaded = load(&request(main, false), &loader).unwrap();
    let texts: Vec<String> = loaded.diagnostics.items.iter().map(|d| d.text.to_string()).collect();
    assert_eq!(texts, ["a.conf:3: Failed to open include file 'nowhere'.\n"]);
}

#[test]
fn deep_and_long_input_costs_no_stack_and_no_time() {
    let mut deep = b"skip {".to_vec();
    deep.extend(std::iter::repeat_n(b'{', 1_000_000));
    assert_eq!(parse(&deep, true).exit, Some(10));
    let mut plugins = b"resource r { proxy { plugin {".to_vec();
    plugins.extend(std::iter::repeat_n(b'{', 1_000_000));
    assert_eq!(parse(&plugins, true).exit, Some(10));
    let many = "resource ".repeat(200_000);
    assert_eq!(parse(many.as_bytes(), true).exit, Some(10));
    let long =
        format!("resource r {{ handlers {{ split-brain \"{}\"; }} }}", "x".repeat(5_000_000));
    assert_eq!(parse(long.as_bytes(), true).exit, Some(10));
    let chain: MemoryLoader = (0..1000).fold(MemoryLoader::default(), |loader, i| {
        loader.with(format!("f{i}"), format!("include f{};\n", i + 1))
    });
    let main = Main::File(std::path::Path::new("f0"));
    let loaded = load(&request(main, false), &chain).unwrap();
    let said: Vec<_> = loaded.diagnostics.items.iter().map(|d| d.text.to_string()).collect();
    assert_eq!(said, ["f999:1: Failed to open include file 'f1000'.\n"]);
}

#[test]
fn errors_inside_a_resource_do_not_hide_the_next_ones() {
    let input = b"global { bogus 1; minor-count 500; }
resource r {
 net { tmeout 5; timeout 60 ping-int 5; max-buffers 1; nested { a; } }
 frobnicate { x { y; } z; }
 disk { resync-rate 10X; }
 on alpha { weird 1; device minor 1; disk /d; meta-disk internal; address 10.0.0.1:7 }
 on bravo { device minor 1; address 10.0.0.2:7; }
}
resource s { net { timeout } on alpha { device minor 1; } }
";
    let all = parse(input, true);
    let lines: Vec<u32> =
        all.diagnostics.items.iter().filter_map(|d| d.span).map(|s| s.line).collect();
    // Nothing is said about what the second host lacks: it may be what could not be read.
    assert_eq!(lines, [1, 1, 3, 3, 3, 3, 4, 5, 6, 6, 9, 9], "{:?}", all.diagnostics);
    assert_eq!(all.config.resources.len(), 2);
    assert_eq!(all.config.resources[0].hosts.len(), 2);
    let rate = all.diagnostics.items[7].rendered(&all.sources).to_string();
    assert!(rate.starts_with("10X is not a valid number\n  --> t.conf:5\n"), "{rate}");
    assert_eq!(parse(input, false).diagnostics.error_count(), 1, "as the original");
}

#[test]
fn small_files_do_not_ask_for_endless_work() {
    let refused = |text: String, word: &str| {
        for recover in [false, true] {
            let loaded = parse(text.as_bytes(), recover);
            assert_eq!(loaded.exit, Some(10));
            let said = format!("{:?}", loaded.diagnostics);
            assert!(said.contains(word), "{word}: {}", said.len());
            assert!(loaded.diagnostics.items.len() <= 1001);
        }
    };
    // Refused before the work is done: at the first host.
    let volumes: String = (0..5000)
        .map(|i| format!("volume {i} {{ device minor {i}; disk /d{i}; meta-disk internal; }}"))
        .collect();
    let names: String = (0..256).map(|i| format!("a{i} ")).collect();
    let text = format!("resource r {{ {volumes} on {names} {{ address 10.0.0.1:7; }} }}");
    refused(text, "more than 1048576 volumes");
    let names: String = (0..300).map(|i| format!("a{i} ")).collect();
    refused(format!("resource r {{ on {names} {{ }} }}"), "more than 256 host names");
    let options = "max-buffers 1; ".repeat(5000);
    let loaded = parse(format!("resource r {{ net {{ {options} }} }}").as_bytes(), false);
    assert_eq!((loaded.exit, loaded.diagnostics.items.len()), (Some(10), 1001));
    let bare: String = (0..20_000).map(|i| format!("on a{i} {{}} ")).collect();
    refused(format!("resource r {{ {bare} }}"), "keyword missing");
}

#[test]
fn two_node_files_of_version_9_are_read_and_others_refused() {
    let two = b"resource r { device minor 1; disk /d; meta-disk internal;
        on alpha { node-id 0; } on bravo { node-id 1; }
        connection { host alpha address 10.0.0.1:7; host bravo address 10.0.0.2:7; net { protocol A; } } }";
    let loaded = parse(two, false);
    assert_eq!(loaded.exit, None, "{:?}", loaded.diagnostics);
    let hosts = &loaded.config.resources[0].hosts;
    assert!(hosts.iter().all(|h| h.address.is_some()));
    for (text, word) in [
        ("connection-mesh { hosts a b c; }", "more than two nodes (DRBD 9)"),
        ("template-file x;", "'template-file' belongs to DRBD 9"),
        ("net { transport rdma; }", "'transport rdma' belongs to DRBD 9"),
        ("on alpha { disk none; }", "'disk none' belongs to DRBD 9"),
        ("net { load-balance-paths yes; }", "'load-balance-paths' belongs to DRBD 9"),
    ] {
        let loaded = parse(format!("resource r {{ {text} }}").as_bytes(), false);
        assert_eq!(loaded.exit, Some(10), "{text}");
        let said = loaded.diagnostics.items[0].text.to_string();
        assert!(said.contains(word), "{text}: {said}");
    }
}

/// The first line is the original's, which tools know; the second one says why.
#[test]
fn what_version_9_alone_can_do_is_refused_and_what_asks_for_nothing_is_accepted() {
    let options = "t.conf:1: Parse error: 'an option keyword' expected,\n\tbut got ";
    let statements = "t.conf:1: Parse error: 'protocol | on | disk | net | syncer | startup | handlers | \
                      ignore-on | stacked-on-top-of' expected,\n\tbut got ";
    for (text, first, construct) in [
        ("options { quorum majority; }", options, "quorum majority"),
        ("options { quorum 2; on-no-quorum io-error; }", options, "quorum 2"),
        ("options { auto-promote; }", options, "auto-promote yes"),
        ("net { transport rdma; }", options, "transport rdma"),
        ("disk { bitmap no; }", options, "bitmap"),
        ("template-file x;", statements, "template-file"),
    ] {
        let loaded = parse(format!("resource r {{ {text} }}").as_bytes(), false);
        assert_eq!(loaded.exit, Some(10), "{text}");
        let said = loaded.diagnostics.items[0].text.to_string();
        assert!(said.starts_with(first), "{text}: {said}");
        let why = format!("\nt.conf:1: '{construct}' belongs to DRBD 9 and is not supported\n");
        assert!(said.ends_with(&why), "{text}: {said}");
    }
    for text in [
        "resource r { options { quorum off; auto-promote no; on-no-quorum io-error; } }",
        "resource r { net { transport tcp; } handlers { quorum-lost x; } }",
        "require-drbd-module-version-ge 9.0.16; resource r { }",
        "resource r { require-drbd-module-version-lt 9.10.0; }",
    ] {
        let loaded = parse(text.as_bytes(), false);
        assert!(loaded.exit.is_none() && loaded.diagnostics.items.is_empty(), "{text}: {loaded:?}");
    }
    for version in ["9.0", "9", "9.0.x", "9.0.0.0", "{"] {
        let text = format!("require-drbd-module-version-ge {version}; resource r {{ }}");
        assert_eq!(parse(text.as_bytes(), false).exit, Some(10), "{version}");
    }
}

#[test]
fn use_bmbv_is_shown_but_stands_for_nothing() {
    let loaded = parse(b"resource r { disk { use-bmbv; } }", false);
    let resource = &loaded.config.resources[0];
    let value = resource.disk.items[0].value.as_ref().unwrap();
    assert_eq!((loaded.exit, value.as_slice()), (None, &b"yes"[..]));
    let rows = effective::section(options::Section::Disk, &resource.disk);
    assert!(rows.iter().all(|row| row.origin == effective::Origin::Default));
}

/// Words of the language, for inputs that get deep into the parser.
fn words() -> impl Strategy<Value = Vec<u8>> {
    let word = prop_oneof![
        prop::sample::select(vec![
            "global",
            "common",
            "resource",
            "skip",
            "include",
            "r0",
            "on",
            "alpha",
            "bravo",
            "{",
            "}",
            ";",
            ":",
            "[",
            "]",
            "device",
            "minor",
            "1",
            "disk",
            "/dev/x",
            "meta-disk",
            "internal",
            "address",
            "10.0.0.1",
            "7789",
            "net",
            "timeout",
            "60",
            "syncer",
            "rate",
            "10M",
            "volume",
            "0",
            "floating",
            "stacked-on-top-of",
            "protocol",
            "C",
            "startup",
            "become-primary-on",
            "handlers",
            "split-brain",
            "\"a b\"",
            "options",
            "proxy",
            "plugin",
            "inside",
            "outside",
            "ipv6",
            "::1",
            "yes",
            "no",
            "connection",
            "host",
            "node-id",
            "path",
            "hosts",
            "\"",
            "\\",
        ])
        .prop_map(|w| w.as_bytes().to_vec()),
        prop::collection::vec(any::<u8>(), 1..6),
    ];
    prop::collection::vec(word, 0..120).prop_map(|words| words.join(&b' '))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_input_panics_and_accepted_input_dumps_stably(input in words()) {
        let mut loaded = parse(&input, false);
        let accepted = loaded.exit.is_none();
        let dump = everything(&mut loaded, "alpha");
        everything(&mut parse(&input, true), "alpha");
        for item in &loaded.diagnostics.items {
            let _ = item.rendered(&loaded.sources);
        }
        if let (true, None, Some(dump)) = (accepted, loaded.exit, dump) {
            let mut again = parse(&dump, false);
            prop_assert_eq!(again.exit, None, "{}\n{:?}", dump, again.diagnostics);
            let second = everything(&mut again, "alpha").unwrap_or_default();
            prop_assert_eq!(without_comments(dump.as_bstr()), without_comments(second.as_bstr()));
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(input in prop::collection::vec(any::<u8>(), 0..400)) {
        everything(&mut parse(&input, true), "alpha");
    }
}
