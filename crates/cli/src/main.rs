//! The command line: `onlyonce filter`, `get` and `stats`.

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

/// `get` found nothing.
const NOTHING: u8 = 1;
/// Bad usage, bad input, or a store or file that refuses.
const FAILED: u8 = 2;
/// Ended by Ctrl-C: 128 and the number of the signal, as shells say it.
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
        complain(&error);
        FAILED
    }))
}

/// Says on standard error what went wrong. Where nobody listens there, the exit code has to do.
fn complain(error: &anyhow::Error) {
    let _ = writeln!(std::io::stderr(), "onlyonce: {error:#}");
}
