//! The command `onlyonce`: `filter`, `get` and `stats`.

#[allow(rustdoc::broken_intra_doc_links, reason = "doc comments are the text of --help, where [0] is a part of a path")]
mod args;
mod batch;
mod filter;
mod input;
mod json_field;
mod line_key;
mod named_key;
mod opening;
mod progress;
mod report;
mod summary;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use clap::Parser;
use tracing::Level;

use crate::args::{Args, Command};

/// `get` found no entry.
const NOT_FOUND: u8 = 1;
/// Bad usage, bad input, or an error of the store or of a file.
const FAILED: u8 = 2;
/// Ended by Ctrl-C: 128 plus the number of the signal, as in shells.
const INTERRUPTED: u8 = 130;

fn main() -> ExitCode {
    let args = Args::parse();
    tracing_subscriber::fmt()
        .with_max_level(if args.verbose { Level::DEBUG } else { Level::WARN })
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
    let exit = match &args.command {
        Command::Filter(filter) => filter::run(filter, args.verbose),
        Command::Get(get) => report::get(get),
        Command::Stats(stats) => report::stats(stats),
    };
    ExitCode::from(exit.unwrap_or_else(|error| {
        // If standard error is closed, only the exit code reports the failure.
        let _ = writeln!(std::io::stderr(), "onlyonce: {error:#}");
        FAILED
    }))
}
