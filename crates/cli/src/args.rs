//! What the command line is told. The comments of the fields are its `--help`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Parser, Subcommand, ValueEnum};

use crate::json_field::FieldPath;

/// The library's limit, checked before anything is read.
const SCOPE_LIMIT: usize = 255;

/// Deduplicates lines, and looks into an onlyonce store.
///
/// Exit codes: 0 done, 1 `get` found nothing, 2 bad usage or input, or a store or file that refuses, 130 ended by
/// Ctrl-C.
#[derive(Parser)]
#[command(version, max_term_width = 100)]
pub(crate) struct Args {
    /// Say on standard error what the store does
    #[arg(short, long, global = true)]
    pub(crate) verbose: bool,

    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    Filter(Filter),
    Get(Get),
    Stats(Stats),
}

/// Write each line whose key is new to standard output, and record its key
///
/// Lines are written byte for byte and in order; a line ends at "\n", and a "\r" before it is part of the line. Only
/// where the last line of a file has no "\n" and another line follows, one is put between them.
///
/// A UTF-8 byte order mark at the start of an input (with --key, of any line) is left out of the key and of the output.
/// Text in UTF-16 is refused. With --key, blank lines are left out and counted: those of spaces, tabs and "\r" alone.
///
/// A batch's lines are written and flushed before their keys are recorded: killed at any moment and run again on the
/// same input, it repeats at most the lines of one batch, and loses none. Ctrl-C finishes the batch under way; a second
/// one ends at once. When nobody reads the output any more it ends with exit code 0, and what could not be written is not
/// recorded; what was written and never read from the pipe is.
///
/// At the end a summary goes to standard error: `lines=N passed=N duplicates=N missing=N blank=N seconds=S`. A key that
/// another program holds in progress counts as a duplicate.
#[derive(clap::Args)]
pub(crate) struct Filter {
    /// The store's directory; made where there is none
    #[arg(long, value_name = "DIR")]
    pub(crate) store: PathBuf,

    /// How long a key is remembered, such as 24h or "7 days" [default: as the store was last opened; 24h for a new
    /// one]. What a narrower window has let go of is gone for good
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(crate) window: Option<Duration>,

    /// The width of the time slices that keys are dropped in [default: a 24th of the window]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(crate) bucket: Option<Duration>,

    /// The key is this field of the JSON line, such as .id, .user.id, .items[0].id or .["a b"]; several make a composite key
    ///
    /// Paths are those of jq that name one field: .items.0 is .items[0], ."a b" is .["a b"]. A place in an array counts from
    /// 0.
    /// Text counts by its characters, numbers and booleans by their JSON text as it stands: "1" and 1 are the same key,
    /// 1 and 1.0 are not. A field that is absent, null, an object or an array is missing. Of a name that stands twice,
    /// the last counts.
    #[arg(long = "key", value_name = "PATH")]
    pub(crate) keys: Vec<FieldPath>,

    /// The key is the line itself, without its "\n" (the default without --key)
    #[arg(long, conflicts_with = "keys")]
    pub(crate) content: bool,

    /// Keep the keys apart from those of other scopes in the store
    #[arg(long, default_value = "", hide_default_value = true, value_parser = scope())]
    pub(crate) scope: OsString,

    /// When a recorded key is safe
    #[arg(long, value_enum, default_value_t = Durability::Disk)]
    pub(crate) durability: Durability,

    /// The most lines of a batch. A slow input makes smaller ones: no line waits for the next
    #[arg(long, value_name = "N", default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) batch: u32,

    /// What to do with a line that has no key: it is no JSON, lacks a field, or its key is empty or over 65,535 bytes
    #[arg(long, value_enum, default_value_t = OnMissingKey::Fail)]
    pub(crate) on_missing_key: OnMissingKey,

    /// The longest line that is accepted, without its "\n"
    #[arg(long, value_name = "BYTES", default_value_t = 16 << 20, value_parser = clap::value_parser!(u64).range(1..=1 << 32))]
    pub(crate) max_line: u64,

    /// Write the summary as one JSON object
    #[arg(long)]
    pub(crate) json: bool,

    /// The files to read, "-" for standard input (the default)
    #[arg(value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
}

/// Print what is stored of a key, as JSON; exit 1 where nothing is
///
/// Its members "key" and "scope" name the key so that `get --json` reads it back: "key" is text, an array of the parts of a
/// composite key, or {"content": HASH} of a whole line; bytes that are no text are {"hex": DIGITS}. "scope" is null where
/// there is none.
///
/// Nobody else may have the store open meanwhile, and its directory must be writable.
#[derive(clap::Args)]
pub(crate) struct Get {
    /// The store's directory
    #[arg(long, value_name = "DIR")]
    pub(crate) store: PathBuf,

    /// The scope the key is in
    #[arg(long, default_value = "", hide_default_value = true, value_parser = scope())]
    pub(crate) scope: OsString,

    /// KEY is a whole line, as `filter --content` reads it
    #[arg(long)]
    pub(crate) content: bool,

    /// KEY is JSON: what `get` printed, with its scope, or the value of its "key" alone
    #[arg(long, conflicts_with = "content")]
    pub(crate) json: bool,

    /// The key; several are the parts of a composite key, in the order of `filter --key`
    #[arg(value_name = "KEY", required = true)]
    pub(crate) keys: Vec<OsString>,
}

/// Print how much a store holds
///
/// Nobody else may have the store open meanwhile, and its directory must be writable.
#[derive(clap::Args)]
pub(crate) struct Stats {
    /// The store's directory
    #[arg(long, value_name = "DIR")]
    pub(crate) store: PathBuf,

    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Durability {
    /// On the disk before the next batch, and the lines before them where the output is a file: survives a power cut
    Disk,
    /// With the operating system before the next batch: survives a kill; a power cut can take the last second
    Process,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnMissingKey {
    /// End with the line's number and exit code 2, all lines before it written and recorded
    Fail,
    /// Write it, each time
    Pass,
    /// Leave it out
    Drop,
}

fn scope() -> impl TypedValueParser<Value = OsString> {
    OsStringValueParser::new().try_map(|scope| match scope.len() {
        len if len > SCOPE_LIMIT => Err(format!("it is {len} bytes long, over the limit of {SCOPE_LIMIT}")),
        _ => Ok(scope),
    })
}
