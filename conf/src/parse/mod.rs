//! Tokens to [`Config`]: the grammar of drbd.conf, its uniqueness rules and its messages.
//!
//! No function here calls itself through the input: includes are a stack of open files, nested
//! blocks of `skip` and `plugin` are counted. Errors are of two kinds, as in the original: *at
//! once* ([`Stop`], nothing more is read) and *later* (noted, reading goes on, exit code 10).
//! With [`Request::recover`] an at-once error is noted too and reading goes on at the next
//! statement; that mode is for people, who want to see more than one error.
//! Spec: config-and-drbdadm.md §3, §6.

mod address;
mod host;
mod limits;
mod options;
pub(crate) use options::section_name as section_title;
mod resource;
pub(crate) use resource::{section_names, volume_set_differences};
pub mod unique;
mod v9;
mod volume;

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use bstr::{BStr, BString, ByteSlice};

use crate::diag::Diagnostics;
use crate::keyword::Keyword;
use crate::lex::{Flaw, Kind, Lexer, Token};
use crate::model::{Config, FileId, Resource, Span};
use crate::source::{Loader, Source, Sources, absolute_path, glob};
use limits::{COMPLAINTS_MAX, ERRORS_MAX};
use unique::Uniques;

/// The first of the files to be read.
#[derive(Clone, Debug)]
pub enum Main<'a> {
    /// A file, named in messages as given.
    File(&'a Path),
    /// Standard input; called `STDIN`.
    Stdin(Vec<u8>),
    /// What `drbdsetup show` printed for a resource (spec §11.2): uniqueness and ranges are not
    /// checked, `_this_host` and `_remote_host` sections are host sections.
    Show {
        /// Name of the resource.
        resource: &'a BStr,
        /// The text.
        text: Vec<u8>,
    },
}

/// What to read.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// The main file.
    pub main: Main<'a>,
    /// The file of `--config-to-test`, read after it.
    pub test: Option<&'a Path>,
    /// Go on after syntax errors at the next statement.
    pub recover: bool,
    /// Minor of the block device node of this name, if there is one with DRBD's major number.
    pub node_minor: fn(&BStr) -> Option<u32>,
}

/// Result of [`load`].
#[derive(Clone, Debug)]
pub struct Loaded {
    /// What was understood.
    pub config: Config,
    /// All files that were read.
    pub sources: Sources,
    /// Complaints in order.
    pub diagnostics: Diagnostics,
    /// Exit code, if the configuration is not valid: 10, or another one for some errors.
    pub exit: Option<u8>,
    /// Names and minors that must be unique, for sections resolved later.
    pub uniques: Uniques,
    /// End of the main file: messages found after parsing name it (spec §6.1 step 4).
    pub end: Span,
}

/// An error that ends parsing, with the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stop(pub(crate) u8);

type Parsed<T = ()> = Result<T, Stop>;

/// An error of opening the main file; nothing was read.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct OpenError(#[from] std::io::Error);

/// Reads a configuration with everything it includes.
///
/// # Errors
/// The main file can not be opened or read. All other problems are in [`Loaded`].
pub fn load(request: &Request<'_>, loader: &dyn Loader) -> Result<Loaded, OpenError> {
    let mut sources = Sources::default();
    let (source, directory) = match &request.main {
        Main::File(path) => {
            let bytes = loader.read(path)?;
            if let Ok(real) = loader.canonical(path) {
                sources.first_time(real);
            }
            let absolute = absolute_path(loader, path);
            let directory = absolute.parent().map(Path::to_path_buf).unwrap_or_default();
            let name = BString::from(path.as_os_str().as_bytes());
            let absolute = BString::from(absolute.as_os_str().as_bytes());
            (Source { name, absolute, bytes: bytes.into() }, directory)
        }
        Main::Stdin(bytes) => (nameless("STDIN".into(), bytes), PathBuf::new()),
        Main::Show { resource, text } => {
            (nameless(format!("drbdsetup show {resource}").into(), text), PathBuf::new())
        }
    };
    let bytes = source.bytes.clone();
    let main = sources.add(source);
    let mut parser = Parser::new(request, loader, sources);
    let lexer = Lexer::new(bytes, main);
    parser.inputs.push(Input { lexer, directory, pending: Vec::new() });
    parser.run();
    Ok(parser.finish(main))
}

fn nameless(name: BString, bytes: &[u8]) -> Source {
    Source { absolute: name.clone(), name, bytes: bytes.into() }
}

/// An open file.
struct Input {
    lexer: Lexer,
    directory: PathBuf,
    /// Files to be read before this one goes on; the last one is next.
    pending: Vec<Pending>,
}

/// A file that an `include` named and that is not open yet.
struct Pending {
    path: PathBuf,
    name: BString,
}

struct Parser<'a> {
    request: &'a Request<'a>,
    loader: &'a dyn Loader,
    sources: Sources,
    diagnostics: Diagnostics,
    config: Config,
    uniques: Uniques,
    /// Open files; the last one is being read.
    inputs: Vec<Input>,
    /// First word of the current statement: semantic errors name its line.
    statement: Span,
    /// Where the current host section, or the last option section in it, begins.
    section: Span,
    /// End of the main file, once reached.
    end: Span,
    test_opened: bool,
    v9: v9::Version9,
    /// Braces that are open in the current file.
    depth: u32,
    /// The token taken last.
    last: Kind,
    /// An error in the current top level statement was stepped over: what is missing in it may
    /// be what could not be read.
    stepped_over: bool,
    amount: limits::Amount,
}

impl<'a> Parser<'a> {
    fn new(request: &'a Request<'a>, loader: &'a dyn Loader, sources: Sources) -> Self {
        Self {
            request,
            loader,
            sources,
            diagnostics: Diagnostics::default(),
            config: Config::default(),
            uniques: Uniques::default(),
            inputs: Vec::new(),
            statement: Span::default(),
            section: Span::default(),
            end: Span::default(),
            test_opened: false,
            v9: v9::Version9::default(),
            depth: 0,
            last: Kind::End,
            stepped_over: false,
            amount: limits::Amount::default(),
        }
    }

    fn is_show(&self) -> bool {
        matches!(self.request.main, Main::Show { .. })
    }

    fn finish(self, main: FileId) -> Loaded {
        let invalid = self.diagnostics.has_errors().then_some(10);
        let exit = self.diagnostics.fatal.or(invalid);
        let end = Span { file: main, ..self.end };
        Loaded {
            config: self.config,
            sources: self.sources,
            diagnostics: self.diagnostics,
            exit,
            uniques: self.uniques,
            end,
        }
    }

    /// Reads everything.
    fn run(&mut self) {
        loop {
            match self.top_level() {
                Ok(true) => {}
                Ok(false) => return,
                Err(Stop(code)) => {
                    self.diagnostics.fatal.get_or_insert(code);
                    if !self.request.recover || self.diagnostics.error_count() >= ERRORS_MAX {
                        return;
                    }
                    self.skip_to_top_level();
                }
            }
        }
    }

    /// One statement of the top level; `false` at the end of everything.
    fn top_level(&mut self) -> Parsed<bool> {
        if let Some(file) = self.inputs.last_mut().and_then(|i| i.pending.pop()) {
            self.open_include(&file);
            return Ok(true);
        }
        // A resource may have ended with its file and left its brace open.
        self.depth = 0;
        self.stepped_over = false;
        if self.diagnostics.items.len() >= COMPLAINTS_MAX {
            return Err(self.too_many_complaints());
        }
        let token = self.next();
        self.statement = token.span;
        match token.kind {
            Kind::End => return Ok(self.end_of_file(token.span)),
            Kind::Key(Keyword::Global) => self.global(token.span)?,
            Kind::Key(Keyword::Common) => self.common()?,
            Kind::Key(Keyword::Resource) => self.resource()?,
            Kind::Key(Keyword::Skip) => self.skip()?,
            Kind::Key(Keyword::Include) => self.include()?,
            _ if self.module_version(&token)? => {}
            _ => {
                let what = "global | common | resource | skip | include";
                let stop = self.expected(what, &token, Form::Plain);
                self.explain_if_v9(&token);
                return Err(stop);
            }
        }
        Ok(true)
    }

    /// The current file has ended; `false` if it was the last one.
    fn end_of_file(&mut self, at: Span) -> bool {
        self.inputs.pop();
        if !self.inputs.is_empty() {
            return true;
        }
        if !self.test_opened {
            self.end = at;
        }
        match self.request.test {
            Some(path) if !self.test_opened => {
                self.test_opened = true;
                self.open_test_file(path)
            }
            _ => false,
        }
    }

    fn open_test_file(&mut self, path: &Path) -> bool {
        match self.loader.read(path) {
            Ok(bytes) => {
                let absolute = absolute_path(self.loader, path);
                let name = BString::from(path.as_os_str().as_bytes());
                self.open(name, &absolute, bytes);
                true
            }
            Err(_) => {
                let text = format!("Can not open '{}'.", path.display());
                self.diagnostics.error(text, None);
                self.diagnostics.fatal.get_or_insert(20);
                false
            }
        }
    }

    fn open(&mut self, name: BString, absolute: &Path, bytes: Vec<u8>) {
        let directory = absolute.parent().map(Path::to_path_buf).unwrap_or_default();
        let bytes: std::sync::Arc<[u8]> = bytes.into();
        let absolute = BString::from(absolute.as_os_str().as_bytes());
        let id = self.sources.add(Source { name, absolute, bytes: bytes.clone() });
        let lexer = Lexer::new(bytes, id);
        self.inputs.push(Input { lexer, directory, pending: Vec::new() });
    }

    /// `include PATTERN ;`. Spec §3.1.
    fn include(&mut self) -> Parsed {
        let pattern = self.word("TK_STRING")?;
        self.punct(b';')?;
        if self.is_stdin() && self.inputs.len() == 1 {
            // Standard input has no directory to which the pattern could be relative.
            let text = "chdir(\"STDIN\") failed: No such file or directory";
            let hint = "include does not work in standard input: give a file with -c";
            self.diagnostics.error(text, Some(pattern.span)).hint = Some(hint.into());
            return Err(Stop(1));
        }
        let directory = self.inputs.last().map(|i| i.directory.clone()).unwrap_or_default();
        let found = glob(self.loader, &directory, pattern.text.as_bstr());
        if found.is_empty() && !pattern.text.iter().any(|b| matches!(b, b'?' | b'*' | b'[')) {
            self.missing_include(&pattern);
        }
        if let Some(input) = self.inputs.last_mut() {
            // Last in, first out: the first of the sorted names is to be read first.
            let files = found.into_iter().rev().map(|(path, name)| Pending { path, name });
            input.pending.extend(files);
        }
        Ok(())
    }

    fn missing_include(&mut self, pattern: &Token) {
        let at = self.place(pattern.span);
        let text = format!("{at} Failed to open include file '{}'.", pattern.text);
        self.diagnostics.error(text, Some(pattern.span));
    }

    fn is_stdin(&self) -> bool {
        matches!(self.request.main, Main::Stdin(_))
    }

    fn open_include(&mut self, file: &Pending) {
        let Ok(real) = self.loader.canonical(&file.path) else { return };
        if !self.sources.first_time(real) {
            return;
        }
        let at = self.place(self.statement);
        match self.loader.read_included(&file.path) {
            Ok(bytes) => {
                let absolute = absolute_path(self.loader, &file.path);
                self.open(file.name.clone(), &absolute, bytes);
            }
            Err(e) => {
                let text = format!("{at} Failed to open include file '{}'.", file.name);
                let span = self.statement;
                self.diagnostics.error(text, Some(span)).note = Some(e.to_string());
            }
        }
    }

    /// `skip [ WORD ] { ... }`. Spec §3.
    fn skip(&mut self) -> Parsed {
        let start = self.statement;
        let mut token = self.next();
        if matches!(token.kind, Kind::Word | Kind::Quoted) {
            token = self.next();
        }
        if token.kind != Kind::Punct(b'{') {
            return Err(self.expected("[ some_text ] {", &token, Form::Plain));
        }
        let mut depth = 1usize;
        while depth > 0 {
            match self.next().kind {
                Kind::Punct(b'{') => depth += 1,
                Kind::Punct(b'}') => depth -= 1,
                Kind::End => {
                    let at = self.place(start);
                    let text = format!("{at} reached eof while parsing this skip block.");
                    self.diagnostics.error(text, Some(start));
                    return Err(Stop(10));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// After a syntax error: goes on at the next word that can only begin a top level statement.
    fn skip_to_top_level(&mut self) {
        loop {
            let Some(input) = self.inputs.last() else { return };
            let next = input.lexer.peek().kind;
            if next == Kind::End || is_top_level(next) {
                return;
            }
            self.next();
        }
    }

    /// After a statement of a section whose `depth` braces are open: does the section go on?
    ///
    /// With [`Request::recover`] an at-once error is stepped over together with the rest of its
    /// statement. It is passed on where the braces do not fit: then the next statement of the top
    /// level is the next sure place.
    ///
    /// # Errors
    /// The statement's error, if it ends the section.
    fn go_on(&mut self, statement: Parsed, depth: u32) -> Parsed<bool> {
        let Err(stop) = statement else {
            if self.diagnostics.items.len() >= COMPLAINTS_MAX {
                return Err(self.too_many_complaints());
            }
            return Ok(true);
        };
        if !self.request.recover || self.diagnostics.error_count() >= ERRORS_MAX {
            return Err(stop);
        }
        loop {
            match (self.depth.cmp(&depth), self.last) {
                (std::cmp::Ordering::Less, _) => break,
                (std::cmp::Ordering::Equal, Kind::Punct(b';' | b'}')) => break,
                _ => {}
            }
            let next = self.inputs.last().map_or(Kind::End, |i| i.lexer.peek().kind);
            if matches!(next, Kind::End) || is_top_level(next) {
                return Err(stop);
            }
            // The end of the section is left for the section to see.
            if self.depth == depth && next == Kind::Punct(b'}') {
                break;
            }
            self.next();
        }
        self.diagnostics.fatal.get_or_insert(stop.0);
        self.stepped_over = true;
        Ok(self.depth >= depth)
    }

    // Tokens and messages.

    fn next(&mut self) -> Token {
        let token = match self.inputs.last_mut() {
            Some(input) => input.lexer.next(),
            None => Token { kind: Kind::End, text: BString::default(), span: self.end },
        };
        match token.kind {
            Kind::Punct(b'{') => self.depth = self.depth.saturating_add(1),
            Kind::Punct(b'}') => self.depth = self.depth.saturating_sub(1),
            _ => {}
        }
        self.last = token.kind;
        token
    }

    /// `file:line:` of a place, as messages show it while parsing.
    fn place(&self, span: Span) -> String {
        format!("{}:{}:", self.sources.name(span.file), span.line)
    }

    /// Notes a syntax error. Spec §6.3.
    fn expected(&mut self, what: &str, token: &Token, form: Form) -> Stop {
        let at = self.place(token.span);
        // Where no word is read, an open quote is just that byte.
        let text = match token.kind {
            Kind::Bad(Flaw::Unterminated) => token.text.get(..1).unwrap_or_default().as_bstr(),
            _ => token.text.as_bstr(),
        };
        let shown = text.get(..20).unwrap_or(text).as_bstr();
        let more = if text.len() > 20 { "..." } else { "" };
        let mut text = format!("{at} Parse error: '{what}' expected,\n\tbut got '").into_bytes();
        text.extend_from_slice(shown);
        text.extend_from_slice(more.as_bytes());
        text.push(b'\'');
        if form == Form::Numbered {
            text.extend_from_slice(format!(" (TK {})", token.number()).as_bytes());
        }
        let hint = options::hint(what, token);
        self.diagnostics.error(text, Some(token.span)).hint = hint;
        Stop(10)
    }

    /// Takes a word; lexical errors are noticed here.
    fn word(&mut self, what: &str) -> Parsed<Token> {
        let token = self.next();
        match token.kind {
            Kind::Word | Kind::Quoted => Ok(token),
            _ => Err(self.not_a_word(what, &token)),
        }
    }

    /// The complaint about a token that should have been a word.
    fn not_a_word(&mut self, what: &str, token: &Token) -> Stop {
        let Kind::Bad(flaw) = token.kind else {
            return self.expected(what, token, Form::Numbered);
        };
        let at = self.place(token.span);
        let head = token.text.get(..20).unwrap_or(&token.text).as_bstr();
        let mut text = format!("{at} {} >>>", flaw.text()).into_bytes();
        text.extend_from_slice(head);
        text.extend_from_slice(b"...<<<");
        self.diagnostics.error(text, Some(token.span));
        Stop(10)
    }

    fn number(&mut self) -> Parsed<Token> {
        let token = self.next();
        match token.kind {
            Kind::Number => Ok(token),
            _ => Err(self.expected("TK_INTEGER", &token, Form::Numbered)),
        }
    }

    fn punct(&mut self, byte: u8) -> Parsed<Token> {
        let token = self.next();
        if token.kind == Kind::Punct(byte) {
            return Ok(token);
        }
        let what = char::from(byte).to_string();
        Err(self.expected(&what, &token, Form::Numbered))
    }

    /// Notes an error that does not stop parsing, at the current statement.
    fn later(&mut self, text: &str) {
        let span = self.statement;
        self.later_at(span, text);
    }

    fn later_at(&mut self, span: Span, text: &str) {
        let at = self.place(span);
        self.diagnostics.error(format!("{at} {text}"), Some(span));
    }

    /// The part of a host list that messages show.
    fn join(names: &[BString]) -> BString {
        BString::from(bstr::join(" ", names))
    }
}

/// Begins this a statement of the top level, and nothing else?
fn is_top_level(kind: Kind) -> bool {
    matches!(kind, Kind::Key(Keyword::Resource | Keyword::Common | Keyword::Global))
}

/// Whether a syntax error shows the token's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Plain,
    Numbered,
}

/// Is a resource name usable? Spec §6.3.
///
/// # Errors
/// The original's complaint.
pub fn check_resource_name(name: &BStr) -> Result<(), &'static str> {
    if name.is_empty() {
        return Err("Resource name is empty.");
    }
    if name.iter().any(|b| *b < 0x20 || *b == 0x7f) {
        return Err("Resource name is invalid - please don't use control characters.");
    }
    Ok(())
}

/// A resource while it is being read.
fn empty_resource(name: BString, span: Span) -> Resource {
    Resource { name, span, ..Resource::default() }
}
