//! Random configurations: mostly valid, some broken on the level of tokens.

use std::path::Path;

use drbd_conf::options::{Kind, OPTIONS, OptionSpec, Section, Unit};

use super::random::Random;

/// Lines of the main file and of one included file.
#[derive(Clone, Debug)]
pub struct Config {
    main: Vec<String>,
    included: Vec<String>,
}

impl Config {
    /// Makes one.
    pub fn generate(random: &mut Random) -> Self {
        let mut g =
            Generator { random, lines: Vec::new(), resources: Vec::new(), minor: 0, port: 7700 };
        if g.random.chance(92) {
            g.global();
        }
        if g.random.chance(50) {
            g.common();
        }
        let count = 1 + g.random.below(3);
        for _ in 0..count {
            g.resource();
        }
        let mut main = std::mem::take(&mut g.lines);
        let mut included = Vec::new();
        if g.random.chance(15) {
            g.resource();
            included = std::mem::take(&mut g.lines);
            let pattern =
                g.random.pick(&["inc.d/*.res", "inc.d/a.res", "inc.d/?.res", "./inc.d/[a-c].res"]);
            let at = usize::try_from(g.random.below(main.len() as u64 + 1)).unwrap_or(0);
            // Only between top level statements, or the line is an error (which is fine too).
            let at = if g.random.chance(80) { main.len() } else { at };
            main.insert(at, format!("include \"{pattern}\";"));
        }
        let mut config = Self { main, included };
        if random.chance(18) {
            for _ in 0..=random.below(2) {
                config.mutate(random);
            }
        }
        config
    }

    /// Files with their lines.
    pub fn files(&self) -> [(&'static str, &[String]); 2] {
        [("t.conf", &self.main), ("inc.d/a.res", &self.included)]
    }

    /// All text.
    pub fn text(&self) -> String {
        format!("{}\n{}\n", self.main.join("\n"), self.included.join("\n"))
    }

    /// Number of lines.
    pub fn len(&self) -> usize {
        self.main.len() + self.included.len()
    }

    /// Has it no lines?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Without `count` lines from line `at` on.
    #[must_use]
    pub fn without(&self, at: usize, count: usize) -> Self {
        let keep = |i: usize| i < at || i >= at + count;
        let part = |lines: &[String], from: usize| {
            lines
                .iter()
                .enumerate()
                .filter(|(i, _)| keep(i + from))
                .map(|(_, l)| l.clone())
                .collect()
        };
        Self { main: part(&self.main, 0), included: part(&self.included, self.main.len()) }
    }

    /// Writes the files.
    ///
    /// # Errors
    /// They can not be written.
    pub fn write(&self, directory: &Path) -> std::io::Result<()> {
        std::fs::create_dir_all(directory.join("inc.d"))?;
        for (name, lines) in self.files() {
            let mut text = lines.join("\n");
            text.push('\n');
            std::fs::write(directory.join(name), text)?;
        }
        Ok(())
    }

    /// One change on the level of tokens.
    fn mutate(&mut self, random: &mut Random) {
        let at = usize::try_from(random.below(self.main.len() as u64)).unwrap_or(0);
        let Some(line) = self.main.get_mut(at) else { return };
        let indent: String = line.chars().take_while(|c| *c == ' ').collect();
        let mut words: Vec<String> = split(line);
        if words.is_empty() {
            return;
        }
        let word = usize::try_from(random.below(words.len() as u64)).unwrap_or(0);
        match random.below(5) {
            0 => {
                words.remove(word);
            }
            1 => words.insert(word, words[word].clone()),
            2 if word + 1 < words.len() => words.swap(word, word + 1),
            3 => words.insert(word, junk(random)),
            _ => words[word] = junk(random),
        }
        *line = format!("{indent}{}", words.join(" "));
    }
}

/// Words, numbers, quoted texts and single punctuation of a line.
fn split(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut rest = line.trim();
    while let Some(first) = rest.chars().next() {
        let len = match first {
            '"' => rest.get(1..).and_then(|r| r.find('"')).map_or(rest.len(), |p| p + 2),
            c if c.is_ascii_alphanumeric() || "/._-".contains(c) => rest
                .find(|c: char| !(c.is_ascii_alphanumeric() || "/._-".contains(c)))
                .unwrap_or(rest.len()),
            c => c.len_utf8(),
        };
        let (word, tail) = rest.split_at(len.min(rest.len()));
        words.push(word.to_owned());
        rest = tail.trim_start();
    }
    words
}

fn junk(random: &mut Random) -> String {
    const WORDS: [&str; 44] = [
        "{",
        "}",
        ";",
        ":",
        "[",
        "]",
        "yes",
        "no",
        "on",
        "disk",
        "net",
        "resource",
        "minor",
        "0",
        "1",
        "-5",
        "5M",
        "12345678",
        "123456789",
        "10K",
        "10k",
        "1T",
        "0x10",
        "\"\"",
        "\"a b\"",
        "\"x",
        "'x'",
        "=",
        "$",
        "#",
        "1.2.3.4",
        "1.2.3",
        "::1",
        "fe80::1%eth0",
        "ab:cd:ef",
        "timeout",
        "syncer",
        "volume",
        "device",
        "internal",
        "meta-disk",
        "address",
        "\u{e4}",
        "\u{1}",
    ];
    match random.below(20) {
        0 => "w".repeat(120 + usize::try_from(random.below(20)).unwrap_or(0)),
        1 => format!("\"{}\"", "q".repeat(250 + usize::try_from(random.below(12)).unwrap_or(0))),
        2 => random.below(u64::MAX).to_string(),
        3 => OPTIONS[usize::try_from(random.below(OPTIONS.len() as u64)).unwrap_or(0)].name.into(),
        _ => random.pick(&WORDS).to_owned(),
    }
}

struct Generator<'r> {
    random: &'r mut Random,
    lines: Vec<String>,
    resources: Vec<String>,
    minor: u64,
    port: u64,
}

impl Generator<'_> {
    fn line(&mut self, depth: usize, text: impl Into<String>) {
        self.lines.push(format!("{}{}", "    ".repeat(depth), text.into()));
    }

    fn global(&mut self) {
        self.line(0, "global {");
        if self.random.chance(92) {
            self.line(1, "disable-ip-verification;");
        }
        for (name, max) in [
            ("minor-count", 255),
            ("dialog-refresh", 600),
            ("cmd-timeout-short", 900),
            ("cmd-timeout-medium", 900),
            ("cmd-timeout-long", 900),
        ] {
            if self.random.chance(12) {
                let over = if self.random.chance(10) { 3 } else { 1 };
                let value = self.random.below(max * over + 1);
                self.line(1, format!("{name} {value};"));
            }
        }
        if self.random.chance(20) {
            let value = self.random.pick(&["yes", "no", "ask"]);
            self.line(1, format!("usage-count {value};"));
        }
        if self.random.chance(8) {
            self.line(1, "udev-always-use-vnr;");
        }
        self.line(0, "}");
    }

    fn common(&mut self) {
        self.line(0, "common {");
        self.sections(1);
        self.line(0, "}");
    }

    fn resource(&mut self) {
        let number = self.resources.len();
        let name = match self.random.below(12) {
            0 => format!("\"r {number}\""),
            1 => format!("res_{number}.x"),
            2 => format!("{number}r/s"),
            _ => format!("r{number}"),
        };
        self.resources.push(name.clone());
        self.line(0, format!("resource {name} {{"));
        let early = self.random.chance(50);
        if early {
            self.sections(1);
        }
        let lower = self.resources.first().cloned().filter(|_| number > 0);
        match (self.random.below(10), lower) {
            (0, Some(lower)) => self.stacked(&lower),
            (1 | 2, _) => self.floating(),
            (3 | 4, _) => self.resource_level(),
            (5 | 6, _) => self.volumes(),
            (_, _) => self.implicit(),
        }
        if !early {
            self.sections(1);
        }
        self.line(0, "}");
    }

    fn hosts(&mut self) -> Vec<&'static str> {
        let mut hosts = match self.random.below(12) {
            0 => vec!["alpha"],
            1 if self.random.chance(30) => vec!["bravo", "charlie"],
            2 | 3 => vec!["alpha", "bravo", "charlie"],
            4 => vec!["alpha delta", "bravo"],
            5 => vec!["bravo", "alpha"],
            _ => vec!["alpha", "bravo"],
        };
        if self.random.chance(1) {
            hosts.push("alpha");
        }
        hosts
    }

    fn address(&mut self) -> String {
        self.port += 1;
        let last = 1 + self.random.below(200);
        let port = if self.random.below(300) == 0 { self.random.below(80_000) } else { self.port };
        match self.random.below(14) {
            0 => format!("ipv6 [fd01::{last}]:{port}"),
            1 => format!("ipv4 10.0.0.{last}:{port}"),
            2 => format!("ssocks 10.0.0.{last}:{port}"),
            3 => format!("sdp 10.0.0.{last}:{port}"),
            4 => format!("127.0.0.1:{port}"),
            5 => format!("ipv6 [::1]:{port}"),
            _ => format!("10.0.0.{last}:{port}"),
        }
    }

    fn device(&mut self, minor: u64) -> String {
        match self.random.below(9) {
            0 | 1 => format!("device minor {minor};"),
            2 => format!("device drbd{minor};"),
            3 => format!("device /dev/drbd_x{minor} minor {minor};"),
            4 => format!("device /dev/drbd{minor} minor {minor};"),
            5 if self.random.chance(5) => format!("device /dev/drbdx{minor} minor {minor};"),
            5 if self.random.chance(4) => format!("device /dev/foo{minor};"),
            _ => format!("device /dev/drbd{minor};"),
        }
    }

    fn disk(&mut self) -> String {
        let number = self.random.below(1000);
        match self.random.below(8) {
            0 => format!("disk \"/dev/my disk{number}\";"),
            1 => format!("disk /dev/mapper/vg-lv{number};"),
            _ => format!("disk /dev/sd{number};"),
        }
    }

    fn meta_disk(&mut self) -> String {
        let number = self.random.below(100_000);
        match self.random.below(8) {
            0 => format!("meta-disk /dev/md{number}[{}];", self.random.below(4)),
            1 => format!("flexible-meta-disk /dev/md{number};"),
            2 => format!("meta-disk /dev/md{number};"),
            3 => "flexible-meta-disk internal;".into(),
            _ => "meta-disk internal;".into(),
        }
    }

    /// device, disk, meta-disk; each may be left out.
    fn volume_statements(&mut self, depth: usize, minor: u64, keep_percent: u64) {
        // Where statements are to be complete, something is missing only now and then.
        let keep_percent =
            if keep_percent >= 90 && !self.random.chance(3) { 100 } else { keep_percent };
        let mut lines = vec![self.device(minor), self.disk(), self.meta_disk()];
        if self.random.chance(15) {
            lines.rotate_left(1);
        }
        for text in lines {
            if self.random.chance(keep_percent) {
                self.line(depth, text);
            }
        }
        if depth == 3 && self.random.chance(20) || self.random.chance(1) {
            self.section(depth, Section::Disk, "disk");
        }
    }

    fn next_minor(&mut self) -> u64 {
        if !self.random.chance(1) {
            self.minor += 1;
        }
        self.minor
    }

    fn implicit(&mut self) {
        let minor = self.next_minor();
        for host in self.hosts() {
            self.line(1, format!("on {host} {{"));
            self.volume_statements(2, minor, 98);
            self.host_rest();
            self.line(1, "}");
        }
    }

    fn host_rest(&mut self) {
        if self.random.chance(99) {
            let address = self.address();
            self.line(2, format!("address {address};"));
        }
        if self.random.chance(3) {
            self.section(2, Section::Options, "options");
        }
    }

    fn resource_level(&mut self) {
        let minor = self.next_minor();
        let late = self.random.chance(10);
        if !late {
            self.volume_statements(1, minor, 90);
        }
        for host in self.hosts() {
            self.line(1, format!("on {host} {{"));
            self.volume_statements(2, minor, 15);
            self.host_rest();
            self.line(1, "}");
        }
        if late {
            self.volume_statements(1, minor, 90);
        }
    }

    fn volumes(&mut self) {
        let count = 1 + self.random.below(3);
        let on_resource = self.random.chance(50);
        let first = self.minor + 1;
        self.minor += count;
        if on_resource {
            for n in 0..count {
                self.volume(1, n, first + n, 95);
            }
        }
        for host in self.hosts() {
            self.line(1, format!("on {host} {{"));
            for n in 0..count {
                if !on_resource || self.random.chance(20) {
                    let keep = if on_resource { 30 } else { 98 };
                    self.volume(2, n, first + n, keep);
                }
            }
            self.host_rest();
            self.line(1, "}");
        }
    }

    fn volume(&mut self, depth: usize, number: u64, minor: u64, keep_percent: u64) {
        if self.random.chance(1) {
            return;
        }
        self.line(depth, format!("volume {number} {{"));
        self.volume_statements(depth + 1, minor, keep_percent);
        self.line(depth, "}");
    }

    fn floating(&mut self) {
        let minor = self.next_minor();
        self.volume_statements(1, minor, 97);
        for _ in 0..2 + u64::from(self.random.chance(10)) {
            let address = self.address();
            if self.random.chance(60) {
                self.line(1, format!("floating {address};"));
            } else {
                self.line(1, format!("floating {address} {{"));
                self.volume_statements(2, minor, 20);
                self.line(1, "}");
            }
        }
    }

    fn stacked(&mut self, lower: &str) {
        let minor = self.next_minor();
        self.line(1, format!("stacked-on-top-of {lower} {{"));
        let device = self.device(minor);
        self.line(2, device);
        let address = self.address();
        self.line(2, format!("address {address};"));
        self.line(1, "}");
        self.line(1, "on charlie {");
        self.volume_statements(2, minor, 99);
        self.host_rest();
        self.line(1, "}");
    }

    fn sections(&mut self, depth: usize) {
        if self.random.chance(35) {
            let protocol = if self.random.chance(2) {
                "D"
            } else {
                self.random.pick(&["A", "B", "C", "a", "c"])
            };
            self.line(depth, format!("protocol {protocol};"));
        }
        for (section, name, percent) in [
            (Section::Net, "net", 45),
            (Section::Disk, "disk", 40),
            (Section::Options, "options", 15),
            (Section::Handlers, "handlers", 15),
            (Section::Proxy, "proxy", 4),
        ] {
            if self.random.chance(percent) {
                self.section(depth, section, name);
            }
        }
        if self.random.chance(20) {
            self.startup(depth);
        }
        if self.random.chance(15) {
            self.syncer(depth);
        }
    }

    fn section(&mut self, depth: usize, section: Section, name: &str) {
        self.line(depth, format!("{name} {{"));
        let rows: Vec<&OptionSpec> = OPTIONS.iter().filter(|o| o.section == section).collect();
        for _ in 0..self.random.below(4) {
            let row = self.random.pick(&rows);
            let text = self.option(row, row.name);
            self.line(depth + 1, text);
        }
        if self.random.chance(8) && matches!(section, Section::Disk | Section::Net) {
            let old: &[&str] = match section {
                Section::Disk => {
                    &["no-disk-barrier;", "no-disk-flushes;", "no-md-flushes;", "rate 5M;"]
                }
                _ => &["no-tcp-cork;"],
            };
            let text = self.random.pick(old);
            self.line(depth + 1, text);
        }
        self.line(depth, "}");
    }

    fn option(&mut self, row: &OptionSpec, name: &str) -> String {
        match row.kind {
            Kind::Number { unit, min, max, .. } => {
                let value = self.number(unit, min, max);
                format!("{name} {value};")
            }
            Kind::Bool { .. } => {
                let value = self.random.pick(&["", " yes", " no", " no", " yes", " true"]);
                let value = if value == " true" && self.random.chance(97) { " no" } else { value };
                format!("{name}{value};")
            }
            Kind::Enum { values, .. } => {
                let value = self.random.pick(values);
                let value = if self.random.chance(3) { "nonsense" } else { value };
                format!("{name} {value};")
            }
            Kind::ResyncAfter => {
                let value = match (self.random.below(4), self.resources.first().cloned()) {
                    (0, _) => "nosuch".into(),
                    (1, Some(first)) => format!("\"{}/0\"", first.trim_matches('"')),
                    (_, Some(first)) => first,
                    (_, None) => "r0".into(),
                };
                format!("{name} {value};")
            }
            _ => {
                let value = self.random.pick(&[
                    "sha1",
                    "crc32c",
                    "\"a b\"",
                    "\"x\\\"y\"",
                    "5",
                    "on",
                    "/bin/true",
                    "\"echo $DRBD_RESOURCE; exit 3\"",
                    "\"\"",
                ]);
                format!("{name} {value};")
            }
        }
    }

    fn number(&mut self, unit: Unit, min: u64, max: u64) -> String {
        let span = max - min + 1;
        let value = match self.random.below(60) {
            0..5 => min,
            5..10 => max,
            10 => max + 1,
            11 => min.saturating_sub(1),
            _ => min + self.random.below(span),
        };
        match self.random.below(60) {
            0..4 if unit.shift() == 10 => format!("{value}k"),
            4..8 if unit.shift() == 9 => format!("{value}s"),
            8..10 if unit.shift() != 0 => format!("{}K", value.div_ceil(2).max(1)),
            10 => "10M".into(),
            11..15 => format!("\"{value}\""),
            15 if self.random.chance(30) => format!("{value}x"),
            16 if self.random.chance(30) => "\"\"".into(),
            _ => value.to_string(),
        }
    }

    fn startup(&mut self, depth: usize) {
        self.line(depth, "startup {");
        let rows: Vec<&OptionSpec> =
            OPTIONS.iter().filter(|o| o.section == Section::Startup).collect();
        for _ in 0..self.random.below(3) {
            let row = self.random.pick(&rows);
            let text = self.option(row, row.name);
            self.line(depth + 1, text);
        }
        if self.random.chance(25) {
            let names =
                self.random.pick(&["alpha", "alpha", "both", "alpha bravo", "zulu", "bravo"]);
            self.line(depth + 1, format!("become-primary-on {names};"));
        }
        if self.random.chance(15) {
            self.line(depth + 1, "stacked-timeouts;");
        }
        self.line(depth, "}");
    }

    fn syncer(&mut self, depth: usize) {
        self.line(depth, "syncer {");
        let rows: Vec<&OptionSpec> = OPTIONS.iter().filter(|o| o.syncer).collect();
        for _ in 0..self.random.below(3) {
            let row = self.random.pick(&rows);
            let name = match row.name {
                "resync-rate" => "rate",
                "resync-after" => "after",
                other => other,
            };
            let text = self.option(row, name);
            self.line(depth + 1, text);
        }
        self.line(depth, "}");
    }
}

/// A command line that needs no engine.
pub(super) fn arguments(random: &mut Random) -> Vec<String> {
    const COMMANDS: [&str; 44] = [
        "attach",
        "status",
        "disk-options",
        "detach",
        "connect",
        "net-options",
        "disconnect",
        "up",
        "resource-options",
        "down",
        "primary",
        "secondary",
        "invalidate",
        "invalidate-remote",
        "outdate",
        "resize",
        "verify",
        "pause-sync",
        "resume-sync",
        "wait-connect",
        "role",
        "cstate",
        "dstate",
        "create-md",
        "show-gi",
        "get-gi",
        "dump-md",
        "wipe-md",
        "apply-al",
        "new-resource",
        "new-minor",
        "sh-new-minor",
        "suspend-io",
        "resume-io",
        "set-gi",
        "new-current-uuid",
        "check-resize",
        "sh-b-pri",
        "fence-peer",
        "split-brain",
        "before-resync-target",
        "proxy-up",
        "proxy-down",
        "adjust",
    ];
    const SH: [&str; 9] = [
        "sh-resource",
        "sh-dev",
        "sh-minor",
        "sh-ll-dev",
        "sh-md-dev",
        "sh-md-idx",
        "sh-ip",
        "sh-udev",
        "sh-lr-of",
    ];
    let mut args: Vec<String> = vec!["-c".into(), "t.conf".into()];
    let name = match random.below(10) {
        0..=5 => "all",
        6 => "r0",
        7 => "r0/0",
        8 => "minor-1",
        _ => "r1",
    };
    match random.below(10) {
        0 | 1 => args.push("dump".into()),
        2 => args.push("dump-xml".into()),
        3 => args.extend(["-d".into(), random.pick(&["dump", "dump-xml"]).into()]),
        4 => {
            let command = random.pick(&["sh-nop", "sh-resources", "sh-mod-parms"]);
            args.push(command.into());
        }
        5 => args.extend([random.pick(&SH).into(), name.into()]),
        6 => args.extend(["-d".into(), "up".into(), name.into()]),
        _ => args.extend(["-d".into(), random.pick(&COMMANDS).into(), name.into()]),
    }
    if args.iter().any(|a| a == "-d") && random.chance(12) {
        // Twice: own addresses are verified, and what --peer does is said.
        args.push("-d".into());
    }
    // Not the same one twice: the original adjusts it differently the second time.
    if args.last().is_some_and(|a| a == "r0") && random.chance(40) {
        args.push(random.pick(&["r1", "r2", "r3/0"]).into());
    }
    if random.chance(10) {
        args.insert(0, "-S".into());
    }
    if random.chance(10) {
        args.insert(0, random.pick(&["--peer=charlie", "--peer=bravo", "--peer=zulu"]).into());
    }
    args
}
