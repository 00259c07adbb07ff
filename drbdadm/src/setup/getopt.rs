//! Splitting a command line by getopt_long's rules, with its messages.

use bstr::{BString, ByteSlice};

/// What an option takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Takes {
    /// Nothing.
    Nothing,
    /// A value, in the same word only.
    Maybe,
    /// A value.
    Value,
}

/// A row of getopt's table.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub(super) name: &'static str,
    pub(super) takes: Takes,
    /// Never abbreviated.
    pub(super) is_exact: bool,
}

/// Words without options, and options with their values, in order.
pub(super) type Split = (Vec<BString>, Vec<(&'static str, Option<BString>)>);

/// Splits; `program` is what the messages begin with.
///
/// # Errors
/// getopt's message.
pub(super) fn split(program: &str, table: &[Row], args: &[BString]) -> Result<Split, String> {
    let (mut words, mut options) = (Vec::new(), Vec::new());
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        if arg == "--" {
            words.extend(args.by_ref().cloned());
            break;
        }
        let Some(text) = arg.strip_prefix(b"--") else {
            match arg.strip_prefix(b"-") {
                Some([letter, ..]) if !looks_like_number(arg) => {
                    let letter = BString::from(vec![*letter]);
                    return Err(format!("{program}: invalid option -- '{letter}'\n"));
                }
                _ => words.push(arg.clone()),
            }
            continue;
        };
        let (name, value) = match text.split_once_str("=") {
            Some((name, value)) => (name, Some(BString::from(value))),
            None => (text, None),
        };
        let row = find(program, table, name, text)?;
        let long = row.name;
        let value = match (row.takes, value) {
            (Takes::Nothing, Some(_)) => {
                return Err(format!("{program}: option '--{long}' doesn't allow an argument\n"));
            }
            (Takes::Value, None) => {
                Some(args.next().cloned().ok_or_else(|| {
                    format!("{program}: option '--{long}' requires an argument\n")
                })?)
            }
            (_, value) => value,
        };
        options.push((long, value));
    }
    Ok((words, options))
}

/// A negative number where a word is expected is no option.
fn looks_like_number(arg: &[u8]) -> bool {
    arg.get(1).is_some_and(u8::is_ascii_digit)
}

fn find<'t>(program: &str, table: &'t [Row], name: &[u8], text: &[u8]) -> Result<&'t Row, String> {
    if let Some(row) = table.iter().find(|r| r.name.as_bytes() == name) {
        return Ok(row);
    }
    let text = text.as_bstr();
    let starts = |r: &&Row| !r.is_exact && r.name.as_bytes().starts_with(name);
    let found: Vec<&Row> = table.iter().filter(starts).collect();
    match found.as_slice() {
        [] => Err(format!("{program}: unrecognized option '--{text}'\n")),
        [row] => Ok(row),
        rows => {
            let names: Vec<String> = rows.iter().map(|r| format!(" '--{}'", r.name)).collect();
            let names = names.concat();
            Err(format!("{program}: option '--{text}' is ambiguous; possibilities:{names}\n"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Vec<Row> {
        let row = |name, takes| Row { name, takes, is_exact: false };
        vec![
            row("force", Takes::Maybe),
            row("resync-rate", Takes::Value),
            row("resync-after", Takes::Value),
            row("now", Takes::Nothing),
            Row { name: "socket", takes: Takes::Value, is_exact: true },
        ]
    }

    fn run(args: &[&str]) -> Result<(Vec<String>, Vec<String>), String> {
        let args: Vec<BString> = args.iter().map(|a| BString::from(*a)).collect();
        let (words, options) = split("attach", &table(), &args)?;
        let option = |(n, v): &(&str, Option<BString>)| {
            v.as_ref().map_or_else(|| (*n).to_owned(), |v| format!("{n}={v}"))
        };
        let words = words.iter().map(ToString::to_string).collect();
        Ok((words, options.iter().map(option).collect()))
    }

    #[test]
    fn options_stand_anywhere() {
        let (words, options) =
            run(&["0", "--force", "a", "--resync-rate", "1M", "--resync-a=3", "--", "--now"])
                .unwrap();
        assert_eq!(words, ["0", "a", "--now"]);
        assert_eq!(options, ["force", "resync-rate=1M", "resync-after=3"]);
        assert_eq!(run(&["--force=", "-1", "-"]).unwrap().0, ["-1", "-"]);
    }

    #[test]
    fn mistakes_have_getopts_messages() {
        let rows = [
            (vec!["--nosuch"], "attach: unrecognized option '--nosuch'\n"),
            (vec!["--nosuch=1"], "attach: unrecognized option '--nosuch=1'\n"),
            (vec!["--sock=1"], "attach: unrecognized option '--sock=1'\n"),
            (vec!["--now=1"], "attach: option '--now' doesn't allow an argument\n"),
            (vec!["--resync-r"], "attach: option '--resync-rate' requires an argument\n"),
            (vec!["-x"], "attach: invalid option -- 'x'\n"),
            (
                vec!["--resync=1"],
                "attach: option '--resync=1' is ambiguous; possibilities: '--resync-rate' \
                 '--resync-after'\n",
            ),
        ];
        for (args, message) in rows {
            assert_eq!(run(&args).unwrap_err(), message);
        }
    }
}
