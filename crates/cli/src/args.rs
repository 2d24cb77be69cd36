//! The arguments of the command. The doc comments of the fields are the text of `--help`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Parser, Subcommand, ValueEnum};

use crate::json_field::FieldPath;

/// The limit of the library. Checked here, so that a scope over it is an error of usage.
const SCOPE_LIMIT: usize = 255;

/// Removes duplicate lines, and shows what an onlyonce store holds.
///
/// Exit codes: 0 success; 1 `get` found no entry; 2 bad usage, bad input, or an error of the store or of a file; 130 ended
/// by Ctrl-C.
#[derive(Parser)]
#[command(version, max_term_width = 100)]
pub(crate) struct Args {
    /// Log what the store does to standard error
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
/// Lines keep their bytes and their order. A line ends at "\n"; a "\r" before it is part of the line. If the last line of a
/// file has no "\n" and another line follows, one "\n" is inserted between them.
///
/// A UTF-8 byte order mark at the start of an input (with --key, at the start of any line) is removed from the key and from
/// the output. UTF-16 input is an error. With --key, blank lines (spaces, tabs and "\r" only) are dropped and counted.
///
/// The lines of a batch are written and flushed before their keys are recorded. If the process is killed and run again on
/// the same input, it repeats at most the lines of one batch and loses none. Ctrl-C finishes the current batch; a second
/// Ctrl-C exits immediately. If the reader of the output closes it, the exit code is 0, and the keys of unwritten lines are
/// not recorded. Lines that are in a pipe but not yet read count as written.
///
/// At the end, a summary goes to standard error: `lines=N passed=N duplicates=N missing=N blank=N seconds=S`. A key that
/// another program has claimed counts as a duplicate.
#[derive(clap::Args)]
pub(crate) struct Filter {
    /// The directory of the store; created if it does not exist
    #[arg(long, value_name = "DIR")]
    pub(crate) store: PathBuf,

    /// How long a key is remembered, such as 24h or "7 days" [default: the last window of the store, or 24h for a new
    /// store]. A shorter window deletes expired keys permanently
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(crate) window: Option<Duration>,

    /// The width of a time bucket. Expired keys are deleted by whole buckets [default: 1/24 of the window]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(crate) bucket: Option<Duration>,

    /// The key is this field of the JSON line, such as .id, .user.id, .items[0].id or .["a b"]. Several make a composite key
    ///
    /// Paths are jq paths that select one field. .items.0 is the same as .items[0], and ."a b" the same as .["a b"]. Array
    /// indexes start at 0. The key of a string is its characters; the key of a number or boolean is its JSON text as written.
    /// So "1" and 1 are the same key, and 1 and 1.0 are not. A field is missing if it is absent, null, an object or an array.
    /// If a name occurs twice in an object, the last one counts.
    #[arg(long = "key", value_name = "PATH")]
    pub(crate) keys: Vec<FieldPath>,

    /// The key is the whole line without its "\n" (the default without --key)
    #[arg(long, conflicts_with = "keys")]
    pub(crate) content: bool,

    /// The scope of the keys. Equal keys in different scopes are different keys
    #[arg(long, default_value = "", hide_default_value = true, value_parser = scope())]
    pub(crate) scope: OsString,

    /// What a recorded key survives
    #[arg(long, value_enum, default_value_t = Durability::Disk)]
    pub(crate) durability: Durability,

    /// The maximum number of lines of a batch. A slow input makes smaller batches: no line waits for the next one
    #[arg(long, value_name = "N", default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) batch: u32,

    /// What to do with a line that has no key: it is not JSON, lacks a field, or its key is empty or over 65,535 bytes
    #[arg(long, value_enum, default_value_t = OnMissingKey::Fail)]
    pub(crate) on_missing_key: OnMissingKey,

    /// The maximum length of a line without its "\n"
    #[arg(long, value_name = "BYTES", default_value_t = 16 << 20, value_parser = clap::value_parser!(u64).range(1..=1 << 32))]
    pub(crate) max_line: u64,

    /// Print the summary as a JSON object
    #[arg(long)]
    pub(crate) json: bool,

    /// The files to read; "-" is standard input, the default
    #[arg(value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
}

/// Print the entry of a key as JSON; exit 1 if there is none
///
/// The members "key" and "scope" identify the key, and `get --json` accepts them as they are printed. "key" is a string, an
/// array of strings for a composite key, or {"content": HASH} for a whole line. Bytes that are not UTF-8 are printed as
/// {"hex": DIGITS}. "scope" is null if the key has none.
///
/// No other process may have the store open. The directory must be writable.
#[derive(clap::Args)]
pub(crate) struct Get {
    /// The directory of the store
    #[arg(long, value_name = "DIR")]
    pub(crate) store: PathBuf,

    /// The scope of the key
    #[arg(long, default_value = "", hide_default_value = true, value_parser = scope())]
    pub(crate) scope: OsString,

    /// KEY is a whole line, as `filter --content` reads it
    #[arg(long)]
    pub(crate) content: bool,

    /// KEY is JSON: an object that `get` printed, or only the value of its member "key"
    #[arg(long, conflicts_with = "content")]
    pub(crate) json: bool,

    /// The key. Several are the parts of a composite key, in the order of `filter --key`
    #[arg(value_name = "KEY", required = true)]
    pub(crate) keys: Vec<OsString>,
}

/// Print the number of keys and the size of a store
///
/// No other process may have the store open. The directory must be writable.
#[derive(clap::Args)]
pub(crate) struct Stats {
    /// The directory of the store
    #[arg(long, value_name = "DIR")]
    pub(crate) store: PathBuf,

    /// Print a JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Durability {
    /// Synced to disk before the next batch, after the lines if the output is a file: survives a power failure
    Disk,
    /// Written to the operating system before the next batch: survives a crash of the process; a power failure can lose the last second
    Process,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnMissingKey {
    /// Exit with code 2 and the number of the line; all lines before it are written and recorded
    Fail,
    /// Write it every time
    Pass,
    /// Drop it
    Drop,
}

fn scope() -> impl TypedValueParser<Value = OsString> {
    OsStringValueParser::new().try_map(|scope| match scope.len() {
        len if len > SCOPE_LIMIT => Err(format!("the scope has {len} bytes; the limit is {SCOPE_LIMIT}")),
        _ => Ok(scope),
    })
}
