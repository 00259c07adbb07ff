//! Arguments: what was asked for.
//!
//! Spec: metadata.md §8.1.

use drbdmeta::layout::{AL_BLOCKS_MAX_TOOL, AL_BLOCKS_MIN, AlGeometry, Placement};

use super::Exit;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    GetGi,
    ShowGi,
    DumpMd,
    RestoreMd,
    VerifyDump,
    ApplyAl,
    WipeMd,
    Outdate,
    Invalidate,
    Dstate,
    CheckResize,
    CreateMd,
    ForgetPeer,
    ReadDevUuid,
    WriteDevUuid,
    SetGi,
    Check,
}

/// Name, whether it changes something, how many arguments it takes.
const COMMANDS: [(&str, Command, bool, usize); 17] = [
    ("get-gi", Command::GetGi, false, 0),
    ("show-gi", Command::ShowGi, false, 0),
    ("dump-md", Command::DumpMd, false, 0),
    ("restore-md", Command::RestoreMd, true, 1),
    ("verify-dump", Command::VerifyDump, false, 1),
    ("apply-al", Command::ApplyAl, true, 0),
    ("wipe-md", Command::WipeMd, true, 0),
    ("outdate", Command::Outdate, true, 0),
    ("invalidate", Command::Invalidate, true, 0),
    ("dstate", Command::Dstate, false, 0),
    ("check-resize", Command::CheckResize, true, 0),
    ("create-md", Command::CreateMd, true, 1),
    ("forget-peer", Command::ForgetPeer, true, 0),
    ("read-dev-uuid", Command::ReadDevUuid, false, 0),
    ("write-dev-uuid", Command::WriteDevUuid, true, 1),
    ("set-gi", Command::SetGi, true, 1),
    ("check", Command::Check, false, 0),
];

impl Command {
    pub(super) fn modifies(self) -> bool {
        COMMANDS.iter().any(|row| row.1 == self && row.2)
    }

    pub(super) fn name(self) -> &'static str {
        COMMANDS.iter().find(|row| row.1 == self).map_or("", |row| row.0)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BitmapMode {
    Automatic,
    Zeroout,
    Pwrite,
    Skip,
    SetAll,
}

/// Options as given.
#[derive(Clone, Debug)]
pub(super) struct Options {
    pub(super) force: bool,
    pub(super) verbose: u32,
    pub(super) ignore_sanity_checks: bool,
    pub(super) dry_run: bool,
    pub(super) no_backup: bool,
    pub(super) json: bool,
    pub(super) peer_max_bio_size: u32,
    pub(super) al_stripes: Option<u32>,
    pub(super) al_stripe_blocks: Option<u32>,
    pub(super) node_id: Option<u32>,
    pub(super) bitmap_mode: BitmapMode,
    pub(super) var_lib: String,
}

impl Options {
    /// Shape of the activity log as asked for.
    pub(super) fn al(&self) -> AlGeometry {
        let default = AlGeometry::default();
        AlGeometry {
            stripes: self.al_stripes.unwrap_or(default.stripes),
            stripe_blocks: self.al_stripe_blocks.unwrap_or(default.stripe_blocks),
        }
    }

    pub(super) fn has_al(&self) -> bool {
        self.al_stripes.is_some() || self.al_stripe_blocks.is_some()
    }
}

/// A complete command line.
#[derive(Clone, Debug)]
pub(super) struct Invocation {
    pub(super) options: Options,
    /// As given.
    pub(super) device: String,
    /// `None`: the device is `-`.
    pub(super) minor: Option<u32>,
    /// Device that carries the meta-data.
    pub(super) path: String,
    pub(super) placement: Placement,
    pub(super) command: Command,
    pub(super) arguments: Vec<String>,
    /// The command line with options first, for the head of a dump.
    pub(super) permuted: String,
}

const USAGE: &str = "
USAGE: drbdmeta [--force] DEVICE FORMAT [FORMAT ARGS...] COMMAND [CMD ARGS...]

FORMATS:
  v06 minor
  v07 device index
  v08 device index
  v09 device index

COMMANDS:
  get-gi --node-id {val} 
  show-gi --node-id {val} 
  dump-md 
  restore-md file
  verify-dump file
  apply-al 
  wipe-md 
  outdate 
  invalidate 
  dstate 
  check-resize 
  create-md [--peer-max-bio-size {val}] [--al-stripes {val}] [--al-stripe-size-kB {val}] {max_peers}
  forget-peer --node-id {val} 
";

const EXTENSIONS: &str = "  check 

Not in the original: check, dump-md --json, --no-backup, --var-lib-drbd DIR.
";

/// Long name, short name, takes a value.
const OPTIONS: [(&str, Option<char>, bool); 12] = [
    ("force", Some('f'), false),
    ("verbose", Some('v'), false),
    ("ignore-sanity-checks", None, false),
    ("dry-run", None, false),
    ("peer-max-bio-size", Some('p'), true),
    ("al-stripes", Some('s'), true),
    ("al-stripe-size-kB", Some('z'), true),
    ("node-id", Some('i'), true),
    ("initialize-bitmap", Some('b'), true),
    ("no-backup", None, false),
    ("json", None, false),
    ("var-lib-drbd", None, true),
];

fn usage() -> Exit {
    super::talk::out(USAGE);
    super::talk::out(EXTENSIONS);
    Exit::silent(20)
}

/// Reads a command line.
pub(super) fn parse(argv: &[String]) -> Result<Invocation, Exit> {
    let (program, rest) = argv.split_first().ok_or_else(usage)?;
    let mut options = Options {
        force: false,
        verbose: 0,
        ignore_sanity_checks: false,
        dry_run: false,
        no_backup: false,
        json: false,
        peer_max_bio_size: 0,
        al_stripes: None,
        al_stripe_blocks: None,
        node_id: None,
        bitmap_mode: BitmapMode::Automatic,
        var_lib: "/var/lib/drbd".into(),
    };
    if rest.len() < 3 {
        return Err(usage());
    }
    let (front, words) = split_options(rest, &mut options)?;
    check_al(&options)?;
    let permuted = std::iter::once(program).chain(&front).chain(&words).cloned();
    let permuted = permuted.collect::<Vec<_>>().join(" ");
    positional(options, words, permuted)
}

/// Options (with their values) and everything else, each in order.
fn split_options(
    rest: &[String],
    options: &mut Options,
) -> Result<(Vec<String>, Vec<String>), Exit> {
    let (mut front, mut words) = (Vec::new(), Vec::new());
    let mut iter = rest.iter();
    while let Some(arg) = iter.next() {
        if arg == "--" {
            front.push(arg.clone());
            words.extend(iter.by_ref().cloned());
        } else if let Some(long) = arg.strip_prefix("--") {
            front.push(arg.clone());
            let (name, given) = match long.split_once('=') {
                Some((name, value)) => (name, Some(value.to_string())),
                None => (long, None),
            };
            let &(name, _, takes) = find_long(name).ok_or_else(usage)?;
            let value = match (takes, given) {
                (false, Some(_)) => return Err(usage()),
                (true, None) => Some(iter.next().ok_or_else(usage)?.clone()),
                (_, given) => given,
            };
            if takes && !long.contains('=') {
                front.extend(value.clone());
            }
            set(options, name, value.as_deref().unwrap_or_default())?;
        } else if let Some(cluster) = arg.strip_prefix('-').filter(|c| !c.is_empty()) {
            front.push(arg.clone());
            short_cluster(cluster, &mut iter, &mut front, options)?;
        } else {
            words.push(arg.clone());
        }
    }
    Ok((front, words))
}

fn short_cluster(
    cluster: &str,
    iter: &mut std::slice::Iter<'_, String>,
    front: &mut Vec<String>,
    options: &mut Options,
) -> Result<(), Exit> {
    let mut rest = cluster.chars();
    while let Some(short) = rest.next() {
        let found = OPTIONS.iter().find(|row| row.1 == Some(short));
        let &(name, _, takes) = found.ok_or_else(usage)?;
        if !takes {
            set(options, name, "")?;
            continue;
        }
        let mut value = rest.as_str().to_string();
        if value.is_empty() {
            value.clone_from(iter.next().ok_or_else(usage)?);
            front.push(value.clone());
        }
        return set(options, name, &value);
    }
    Ok(())
}

fn find_long(name: &str) -> Option<&'static (&'static str, Option<char>, bool)> {
    if let Some(exact) = OPTIONS.iter().find(|row| row.0 == name) {
        return Some(exact);
    }
    let mut begins = OPTIONS.iter().filter(|row| row.0.starts_with(name));
    begins.next().filter(|_| begins.next().is_none())
}

fn set(options: &mut Options, name: &str, value: &str) -> Result<(), Exit> {
    match name {
        "force" => options.force = true,
        "verbose" => options.verbose += 1,
        "ignore-sanity-checks" => options.ignore_sanity_checks = true,
        "dry-run" => options.dry_run = true,
        "no-backup" => options.no_backup = true,
        "json" => options.json = true,
        "var-lib-drbd" => options.var_lib = value.to_string(),
        "peer-max-bio-size" => {
            let size = number(value, 1)?;
            let fits = u32::try_from(size).ok().filter(|s| *s <= 1 << 20);
            let text = "peer-max-bio-size out of range (0...1M)";
            options.peer_max_bio_size = fits.ok_or_else(|| Exit::new(10, text))?;
        }
        "al-stripes" => options.al_stripes = Some(small(value, 1)?),
        "al-stripe-size-kB" => options.al_stripe_blocks = Some(small(value, 1024)? / 4),
        "node-id" => {
            let id = small(value, 1)?;
            if id > 31 {
                return Err(Exit::new(10, "node-id out of range (0...31)"));
            }
            options.node_id = Some(id);
        }
        "initialize-bitmap" => {
            options.bitmap_mode = match value {
                "automatic" => BitmapMode::Automatic,
                "zeroout" => BitmapMode::Zeroout,
                "pwrite" => BitmapMode::Pwrite,
                "skip" => BitmapMode::Skip,
                "set-all" => BitmapMode::SetAll,
                _ => {
                    let text = format!(
                        "invalid initialize-bitmap-mode \"{value}\", should be one of \
                         automatic|zeroout|pwrite|skip"
                    );
                    return Err(Exit::new(10, text));
                }
            }
        }
        _ => return Err(usage()),
    }
    Ok(())
}

fn small(text: &str, unit: u64) -> Result<u32, Exit> {
    let value = number(text, unit)?;
    u32::try_from(value).map_err(|_| Exit::new(20, format!("{text}: out of range")))
}

/// A number with at most one unit letter, in multiples of `unit` bytes; rounds up.
fn number(text: &str, unit: u64) -> Result<u64, Exit> {
    if text.is_empty() {
        return Err(Exit::new(100, "missing number argument"));
    }
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, suffix) = text.split_at_checked(digits).unwrap_or((text, ""));
    if number.is_empty() || suffix.chars().count() > 1 {
        return Err(Exit::new(20, format!("{text} is not a valid number")));
    }
    let factor = match suffix {
        "" => unit,
        "k" | "K" => 1 << 10,
        "m" | "M" => 1 << 20,
        "g" | "G" => 1 << 30,
        "s" => 512,
        _ => return Err(Exit::new(20, format!("{text} is not a valid unit"))),
    };
    let bytes = number.parse::<u64>().ok().and_then(|n| n.checked_mul(factor));
    let bytes = bytes.ok_or_else(|| Exit::new(20, format!("{text}: out of range")))?;
    Ok(bytes.div_ceil(unit))
}

fn check_al(options: &Options) -> Result<(), Exit> {
    let blocks = options.al().blocks();
    if blocks > AL_BLOCKS_MAX_TOOL {
        return Err(Exit::new(10, "invalid (too large) al-stripe* settings"));
    }
    if blocks < AL_BLOCKS_MIN {
        return Err(Exit::new(10, "invalid (too small) al-stripe* settings"));
    }
    Ok(())
}

fn positional(options: Options, words: Vec<String>, permuted: String) -> Result<Invocation, Exit> {
    let mut words = words.into_iter();
    let (Some(device), Some(format)) = (words.next(), words.next()) else { return Err(usage()) };
    let minor = minor_of(&device)?;
    if !matches!(format.as_str(), "v06" | "v07" | "v08" | "v09") {
        return Err(Exit::new(20, format!("Unknown format '{format}'.")));
    }
    if format != "v08" {
        return Err(Exit::new(20, format!("format {format} is not supported, only v08")));
    }
    let (Some(path), Some(index)) = (words.next(), words.next()) else {
        return Err(Exit::new(20, "Too few arguments for format"));
    };
    let placement = placement(&index)?;
    let name = words.next().ok_or_else(|| Exit::new(20, "command missing"))?;
    let found = COMMANDS.iter().find(|row| row.0 == name);
    let unknown = || Exit::new(20, format!("Unknown command '{name}'."));
    let &(_, command, _, arity) = found.ok_or_else(unknown)?;
    let mut arguments: Vec<String> = words.collect();
    if arguments.len() > arity {
        super::talk::err("Ignoring additional arguments\n");
        arguments.truncate(arity);
    }
    Ok(Invocation { options, device, minor, path, placement, command, arguments, permuted })
}

fn placement(index: &str) -> Result<Placement, Exit> {
    match index {
        "internal" | "flex-internal" => return Ok(Placement::Internal),
        "flex-external" => return Ok(Placement::FlexExternal),
        _ => {}
    }
    let value = match (index.strip_prefix("0x"), index.strip_prefix('0')) {
        (Some(hex), _) => u8::from_str_radix(hex, 16),
        (None, Some(octal)) if !octal.is_empty() => u8::from_str_radix(octal, 8),
        _ => index.parse(),
    };
    let text = || Exit::new(20, format!("'{index}' is not a valid index number."));
    value.map(Placement::Indexed).map_err(|_| text())
}

fn minor_of(device: &str) -> Result<Option<u32>, Exit> {
    if device == "-" {
        return Ok(None);
    }
    let digits = device.strip_prefix("/dev/drbd").unwrap_or(device);
    if let Ok(minor) = digits.parse() {
        return Ok(Some(minor));
    }
    block_minor(device).map(Some).ok_or_else(|| {
        let text = format!("Cannot determine minor device number of drbd device '{device}'");
        Exit::new(20, text)
    })
}

fn block_minor(path: &str) -> Option<u32> {
    const DRBD_MAJOR: u32 = 147;
    let stat = rustix::fs::stat(path).ok()?;
    let is_block =
        rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::BlockDevice;
    let ours = rustix::fs::major(stat.st_rdev) == DRBD_MAJOR;
    (is_block && ours).then(|| rustix::fs::minor(stat.st_rdev))
}

/// Options that do not belong to the command.
pub(super) fn check_combination(run: &Invocation) -> Result<(), Exit> {
    let (options, command) = (&run.options, run.command);
    let refuse = |text: String| Err(Exit::new(10, text));
    if options.peer_max_bio_size != 0 && command != Command::CreateMd {
        return refuse("The --peer-max-bio-size option is only allowed with create-md".into());
    }
    let may_stripe = matches!(command, Command::CreateMd | Command::RestoreMd);
    if options.has_al() && !may_stripe {
        return refuse(
            "The --al-stripe* options are only allowed with create-md and restore-md".into(),
        );
    }
    let may_node =
        matches!(command, Command::GetGi | Command::ShowGi | Command::SetGi | Command::ForgetPeer);
    if options.node_id.is_some() && !may_node {
        let name = command.name();
        return refuse(format!("The {name} command does not accept the --node-id option"));
    }
    if options.node_id.is_some_and(|id| id != 0) {
        super::talk::err("Not v09, implicitly set --node-id = 0\n");
    }
    if options.json && command != Command::DumpMd {
        return refuse("The --json option is only allowed with dump-md".into());
    }
    Ok(())
}
