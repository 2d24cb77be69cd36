//! The page: goals and measured values, tables, and plots.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::args::Workload;
use crate::goals::goals;
use crate::plot::{Axes, Line, bars, lines};
use crate::row::{Circumstances, Row};
use crate::table::{count, rows_of, table};

/// The page's name in its directory.
pub const PAGE: &str = "benchmarks.md";

/// The case that is shown beside the case `recent` of the peers, which have no flush.
const FLUSHED: &str = "recent, flushed";

/// Why goals are missed. Written by hand.
const LIMITS: &str = include_str!("../limits.md");

/// The directory of the plots, beside the page.
const PLOTS: &str = "benchmarks";

pub fn goals_table(rows: &[Row]) -> String {
    let mut text = "| workload | goal | measured | reached |\n|---|---|---|---|\n".to_owned();
    for goal in goals(rows) {
        let reached = match goal.is_reached {
            Some(true) => "yes",
            Some(false) => "**no**",
            None => "",
        };
        // Writing to a string does not fail.
        let _ = writeln!(text, "| {:?} | {} | {} | {reached} |", goal.workload, goal.aim, goal.measured);
    }
    text
}

/// Writes the page and its plots.
pub fn write(dir: &Path, circumstances: &Circumstances, rows: &[Row]) -> Result<()> {
    let plots = dir.join(PLOTS);
    fs::create_dir_all(&plots).with_context(|| format!("{} cannot be made", plots.display()))?;
    for entry in fs::read_dir(&plots)?.flatten() {
        // Plots of an earlier page.
        if entry.path().extension().is_some_and(|extension| extension == "svg") {
            fs::remove_file(entry.path())?;
        }
    }
    let mut page = format!(
        "# Benchmarks\n\n\
         onlyonce beside its peers, on the same keys, in one run: `{}`, commit {}.\n\n\
         {}. The disk synced {:.0} small appends a second when the run began; the load average was {:.1}. \
         Absolute figures do not carry over to other machines, and ratios only roughly.\n\n\
         Keys are 36 bytes and look like UUIDs; results are 17 bytes. {} The column *onlyonce* is the rate of onlyonce divided by \
         the rate of the row. Each measurement checks its answers: as many first answers as distinct keys, or the \
         run fails. [How to run it, and what is counted](../benches/compare/README.md).\n\n\
         ## Goals\n\n{}\n",
        circumstances.command,
        circumstances.commit,
        circumstances.machine,
        circumstances.fsyncs_per_s,
        circumstances.load,
        match circumstances.rounds {
            1 => "There was one round.".to_owned(),
            rounds => format!(
                "Figures of W5, and of the smaller sizes of W1 to W4, are medians of {rounds} rounds, in which the subjects took \
                 turns; the worst is the worst of all rounds. The others were measured once."
            ),
        },
        goals_table(rows),
    );
    page.push_str(LIMITS);
    page.push('\n');
    for workload in Workload::ALL.into_iter().filter(|workload| rows.iter().any(|row| row.workload == *workload)) {
        writeln!(page, "## {}\n\n{}\n", workload.title(), words(workload))?;
        for plot in draw(&plots, workload, rows)? {
            writeln!(page, "![{}]({PLOTS}/{})\n", plot.title, plot.file)?;
        }
        writeln!(page, "{}\n", table(workload, rows))?;
    }
    let path = dir.join(PAGE);
    fs::write(&path, page.trim_end().to_owned() + "\n").with_context(|| format!("{} cannot be written", path.display()))
}

/// What a reader must know about a workload's figures.
fn words(workload: Workload) -> &'static str {
    match workload {
        Workload::W1 => {
            "Checks of unknown keys, one at a time and in batches of 512. With many live keys only the subjects that can \
             be filled in time: onlyonce, RocksDB with a column family for each bucket, and a bare Bloom filter with as \
             many bits as onlyonce's. The other rows are of stores with fewer keys, which makes them faster. The smallest \
             stores are those of a quick run (`--quick`), which gives the same ratios apart from noise."
        }
        Workload::W2 => {
            "Checks of known keys: the last hundredth right after they were inserted (and, for onlyonce, again after they \
             were flushed to disk), and any of all keys."
        }
        Workload::W3 => {
            "New keys without a result: `record` of onlyonce, and an insert-if-absent of peers, one transaction a call. \
             The time ends when everything is flushed or checkpointed. Write amplification counts all bytes passed to \
             `write` (of Redis: pages dirtied by the server) for each byte of key and result."
        }
        Workload::W4 => "Two calls: claim, then complete with a result. Peers do only the insert of W3.",
        Workload::W5 => {
            "As W4, and each call returns when it is on disk. Syncs per claim and completion (a *life*) are counted by \
             strace in a separate run, those of flushes included; tracing slows each sync down a little, and a slower \
             sync is shared by more callers."
        }
        Workload::W6 => {
            "Batches of 500 are claimed and completed; one key in a hundred is a duplicate, mostly a recent one. Buckets \
             are 2 seconds wide and the window 24, so that buckets are created and dropped all the time. First at full \
             speed; then on a schedule at half that rate, where latency counts from when a batch was due. *slowdown*: the \
             median batch of the last fifth divided by that of the second."
        }
        Workload::W7 => {
            "All keys of a bucket expire at once, while a caller claims 5,000 keys a second; each wait counts from when \
             the claim was due. For comparison, the same on plain RocksDB: `delete_range` and a compaction, and a \
             compaction of a database with a TTL. The disk counts as free when seven tenths of the space are returned."
        }
        Workload::W8 => {
            "The time from the call of `open` to the answer to a first claim, and until every bucket has its filter, \
             after a clean close and after a kill while keys were recorded at full speed."
        }
        Workload::W9 => "onlyonce with more keys and with more buckets, batches of 512.",
    }
}

struct Plot {
    title: String,
    file: String,
}

fn draw(dir: &Path, workload: Workload, rows: &[Row]) -> Result<Vec<Plot>> {
    let mut drawn = Vec::new();
    let mut add = |name: &str, title: String| {
        let file = format!("{}.svg", name.replace([' ', ','], "-").replace("--", "-"));
        let path = dir.join(&file);
        drawn.push(Plot { title, file });
        path
    };
    let of = rows_of(workload, rows);
    match workload {
        Workload::W1 | Workload::W2 | Workload::W3 | Workload::W4 | Workload::W5 => {
            // Stores of different sizes do not belong in one picture.
            let size = |row: &Row| (workload != Workload::W5).then_some(row.keys);
            let most = of.iter().filter(|row| row.workload == workload).filter_map(|row| size(row)).max();
            let has_picture = |row: &Row| match workload {
                Workload::W5 => true,
                Workload::W1 => row.batch > 1,
                _ => row.batch > 1 && size(row) == most,
            };
            let mut pictures: Vec<(&str, Option<u64>)> = Vec::new();
            for row in of.iter().filter(|row| row.workload == workload && row.case != FLUSHED && has_picture(row)) {
                if !pictures.contains(&(&row.case, size(row))) {
                    pictures.push((&row.case, size(row)));
                }
            }
            for (case, keys) in pictures {
                let is_shown = |row: &&&Row| {
                    let is_way = workload == Workload::W5 || row.batch > 1 && row.threads == 1;
                    let is_case =
                        row.case == case || row.workload != workload || case == "recent" && row.case == FLUSHED;
                    is_way && is_case && size(row) == keys
                };
                let mut shown: Vec<(String, f64)> =
                    of.iter().filter(is_shown).filter_map(|row| Some((label(row), row.figures.ops_per_s?))).collect();
                shown.sort_by(|(_, one), (_, other)| other.total_cmp(one));
                let way = if workload == Workload::W5 { "" } else { ", batches of 512, 1 thread" };
                let live = keys.map_or_else(String::new, |keys| format!(", {} keys", count(keys)));
                let title = format!("{workload:?}, {case}{live}{way}: keys a second");
                let sized = keys.filter(|_| workload == Workload::W1);
                let name = format!("{workload:?}-{case}{}", sized.map_or_else(String::new, |keys| format!("-{keys}")));
                bars(&add(&name.to_lowercase(), title.clone()), &title, &shown)?;
            }
        }
        Workload::W6 => {
            for row in &of {
                // A day of some seconds may not have one that is whole.
                for (name, points) in row.series.iter().filter(|(_, points)| !points.is_empty()) {
                    let unit = if name.starts_with("worst") { "worst batch, ms" } else { "M keys a second" };
                    let title = format!("W6, {}: {unit}", row.case);
                    let line = Line { name: row.case.clone(), points: points.clone() };
                    let axes = Axes { title: &title, x: "seconds", y: unit, is_x_log: false };
                    lines(&add(&format!("w6-{}-{name}", row.case), title.clone()), &axes, &[line])?;
                }
            }
        }
        Workload::W7 => {
            let title = "W7: the longest wait of a claim, in each twentieth of a second".to_owned();
            let all: Vec<Line> = of
                .iter()
                .filter_map(|row| Some(Line { name: row.subject.clone(), points: row.series.values().next()?.clone() }))
                .collect();
            let axes = Axes { title: &title, x: "seconds", y: "ms", is_x_log: false };
            lines(&add("w7-waits", title.clone()), &axes, &all)?;
        }
        Workload::W8 => {}
        Workload::W9 => {
            for case in ["new keys", "uniform", "record"] {
                let title = format!("W9, {case}, batches of 512: M keys a second");
                let line = |buckets: u32| Line {
                    name: format!("{buckets} buckets"),
                    points: of
                        .iter()
                        .filter(|row| row.case == case && row.buckets == Some(buckets))
                        .filter_map(|row| Some([row.keys as f64, row.figures.ops_per_s? / 1e6]))
                        .collect(),
                };
                let axes = Axes { title: &title, x: "keys", y: "M/s", is_x_log: true };
                lines(&add(&format!("w9-{case}"), title.clone()), &axes, &[line(2), line(8), line(32)])?;
            }
        }
    }
    Ok(drawn)
}

/// The subject, and what sets its row apart from another of the same picture.
fn label(row: &Row) -> String {
    if row.case == FLUSHED { format!("{}, flushed", row.subject) } else { row.subject.clone() }
}
