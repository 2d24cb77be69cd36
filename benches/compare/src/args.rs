//! The arguments, and the size of a run.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::child::Child;
use crate::subject::Kind;

/// Measures onlyonce and comparable stores in one run.
#[derive(Parser)]
pub struct Args {
    /// Fewer keys and one round: about five minutes in all
    #[arg(long)]
    pub quick: bool,
    /// Only these workloads, such as W1,W4
    #[arg(long, value_delimiter = ',', ignore_case = true)]
    pub only: Vec<Workload>,
    /// Only these subjects, such as onlyonce,redb
    #[arg(long, value_delimiter = ',')]
    pub subjects: Vec<Kind>,
    /// Write the figures to this file, one JSON object per line
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write a page with tables and plots to this directory
    #[arg(long, value_name = "DIR")]
    pub report: Option<PathBuf>,
    /// Measure nothing; read the figures from files that --json wrote on one commit: FILE,FILE
    #[arg(long, value_name = "FILE", value_delimiter = ',')]
    pub from: Vec<PathBuf>,
    /// Rounds of each measurement with the smaller number of keys; the tables show medians [default: 3, or 1 with
    /// --quick]
    #[arg(long)]
    pub rounds: Option<usize>,
    /// The maximum number of keys of any workload
    #[arg(long)]
    pub keys: Option<u64>,
    /// The length of the consumer's day (W6) in seconds [default: 600, or 30 with --quick]
    #[arg(long, value_name = "SECONDS")]
    pub day: Option<u64>,
    /// The directory for the data during the run [default: the directory for temporary files]
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// Answer one key wrong, so that the run must fail
    #[arg(long, hide = true)]
    pub plant_wrong_answer: bool,
    #[command(subcommand)]
    pub child: Option<Child>,
}

impl Args {
    /// The command that repeats the measurement, without the options for output files.
    pub fn command(&self) -> String {
        let mut command = "cargo run --release -p onlyonce-compare --".to_owned();
        let mut add = |argument: String| {
            command.push(' ');
            command.push_str(&argument);
        };
        if self.quick {
            add("--quick".to_owned());
        }
        if !self.only.is_empty() {
            add(format!("--only {}", joined(self.only.iter().map(|workload| format!("{workload:?}")))));
        }
        if !self.subjects.is_empty() {
            add(format!("--subjects {}", joined(self.subjects.iter().map(|kind| kind.name().to_owned()))));
        }
        if let Some(rounds) = self.rounds {
            add(format!("--rounds {rounds}"));
        }
        if let Some(keys) = self.keys {
            add(format!("--keys {keys}"));
        }
        if let Some(day) = self.day {
            add(format!("--day {day}"));
        }
        command.trim_end_matches(" --").to_owned()
    }
}

fn joined(names: impl Iterator<Item = String>) -> String {
    names.collect::<Vec<_>>().join(",")
}

/// The workloads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[value(rename_all = "verbatim")]
pub enum Workload {
    /// Checks of new keys.
    W1,
    /// Checks of known keys.
    W2,
    /// Records of new keys.
    W3,
    /// Claim, then complete.
    W4,
    /// Claim, then complete, both synced.
    W5,
    /// A consumer's day.
    W6,
    /// Expiry of a bucket with many keys.
    W7,
    /// Opening.
    W8,
    /// The cost of more keys and more buckets.
    W9,
}

impl Workload {
    pub const ALL: [Self; 9] =
        [Self::W1, Self::W2, Self::W3, Self::W4, Self::W5, Self::W6, Self::W7, Self::W8, Self::W9];

    pub fn title(self) -> &'static str {
        match self {
            Self::W1 => "W1: checks of new keys",
            Self::W2 => "W2: checks of known keys",
            Self::W3 => "W3: records of new keys, including flush to the final files",
            Self::W4 => "W4: claim, then complete, including flush to the final files",
            Self::W5 => "W5: claim, then complete, each cycle synced to disk",
            Self::W6 => "W6: a consumer's day",
            Self::W7 => "W7: many keys expire at once",
            Self::W8 => "W8: opening",
            Self::W9 => "W9: growth",
        }
    }
}

/// The number of keys of the comparisons.
#[derive(Debug, Clone)]
pub struct Size {
    /// W1: live keys of the subjects that can be filled with this many in reasonable time.
    pub live: u64,
    /// W1 and W2: live keys in the comparison of all subjects.
    pub compared: u64,
    /// W1 and W2: checked keys.
    pub probes: u64,
    /// W3 and W4: keys in batches, and single keys.
    pub batched: u64,
    pub single: u64,
    /// W3 and W4: calling threads.
    pub threads: Vec<u32>,
}

impl Size {
    fn small() -> Self {
        Self {
            live: 5_000_000,
            compared: 1_000_000,
            probes: 250_000,
            batched: 1_000_000,
            single: 100_000,
            threads: vec![1],
        }
    }

    fn large() -> Self {
        Self {
            live: 100_000_000,
            compared: 6_000_000,
            probes: 1_000_000,
            batched: 6_000_000,
            single: 500_000,
            threads: vec![1, 2],
        }
    }
}

/// The size of each workload.
#[derive(Debug, Clone)]
pub struct Scale {
    pub rounds: usize,
    /// W1 to W4, the smaller size first. A full run includes the measurements of a quick run, so that a quick run can be compared
    /// with the page. Only these have several rounds.
    pub sizes: Vec<Size>,
    /// W5: the time of each measurement.
    pub synced: Duration,
    /// W6: the total time.
    pub day: Duration,
    /// W7: keys that expire.
    pub leaving: u64,
    /// W8: keys in the opened store.
    pub opened: u64,
    /// W9: the largest number of keys, and the divisors for the smaller ones.
    pub grown: u64,
    pub grown_parts: [u64; 3],
}

impl Scale {
    pub fn of(args: &Args) -> Self {
        let mut scale = if args.quick {
            Self {
                rounds: 1,
                sizes: vec![Size::small()],
                synced: Duration::from_secs(2),
                day: Duration::from_secs(30),
                leaving: 1_000_000,
                opened: 3_000_000,
                grown: 3_000_000,
                grown_parts: [10, 3, 1],
            }
        } else {
            Self {
                rounds: 3,
                sizes: vec![Size::small(), Size::large()],
                synced: Duration::from_secs(3),
                day: Duration::from_secs(600),
                leaving: 10_000_000,
                opened: 100_000_000,
                grown: 100_000_000,
                grown_parts: [100, 10, 1],
            }
        };
        if let Some(keys) = args.keys {
            let sizes = scale.sizes.iter_mut().flat_map(|size| {
                [&mut size.live, &mut size.compared, &mut size.probes, &mut size.batched, &mut size.single]
            });
            for count in sizes.chain([&mut scale.leaving, &mut scale.opened, &mut scale.grown]) {
                *count = keys.min(*count);
            }
            // With a bound on keys, sizes can be equal. Measure each once.
            scale.sizes.dedup_by_key(|size| (size.live, size.compared, size.batched));
        }
        scale.rounds = args.rounds.unwrap_or(scale.rounds).max(1);
        scale.day = args.day.map_or(scale.day, Duration::from_secs);
        scale
    }
}
