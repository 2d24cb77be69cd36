//! Writes the page: goals, tables and plots.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::args::Workload;
use crate::goals::goals;
use crate::plot::{Axes, Line, bars, lines};
use crate::row::{Circumstances, Row};
use crate::table::{count, rows_of, table};

/// The file name of the page.
pub const PAGE: &str = "benchmarks.md";

/// A case of onlyonce that is compared with the case "recent" of peers.
const FLUSHED: &str = "recent, flushed";

/// The reasons for missed goals. Maintained by hand.
const LIMITS: &str = include_str!("../limits.md");

/// The directory of the plots, next to the page.
const PLOTS: &str = "benchmarks";

pub fn goals_table(rows: &[Row]) -> String {
    let mut text = "| workload | goal | measured | reached |\n|---|---|---|---|\n".to_owned();
    for goal in goals(rows) {
        let reached = match goal.is_reached {
            Some(true) => "yes",
            Some(false) => "**no**",
            None => "",
        };
        // Writing to a string cannot fail.
        let _ = writeln!(text, "| {:?} | {} | {} | {reached} |", goal.workload, goal.aim, goal.measured);
    }
    text
}

/// Writes the page and its plots.
pub fn write(dir: &Path, circumstances: &Circumstances, rows: &[Row]) -> Result<()> {
    let plots = dir.join(PLOTS);
    fs::create_dir_all(&plots).with_context(|| format!("cannot create {}", plots.display()))?;
    for entry in fs::read_dir(&plots)?.flatten() {
        // Plots of an earlier page.
        if entry.path().extension().is_some_and(|extension| extension == "svg") {
            fs::remove_file(entry.path())?;
        }
    }
    let mut page = format!(
        "# Benchmarks\n\n\
         onlyonce and comparable stores, on the same keys, in one run: `{}`, commit {}.\n\n\
         {}. At the start of the run, the disk synced {:.0} small appends per second, and the load average was {:.1}. \
         Ratios carry over to other machines; absolute figures do not.\n\n\
         Keys are 36 bytes and look like UUIDs; results are 17 bytes. {} The column *onlyonce* is the rate of onlyonce divided by \
         the rate of the row. Each measurement checks its answers: if the number of new keys reported differs from the number of \
         distinct keys, the run fails. [How to run it, and what is counted](../benches/compare/README.md).\n\n\
         ## Goals\n\n{}\n",
        circumstances.command,
        circumstances.commit,
        circumstances.machine,
        circumstances.fsyncs_per_s,
        circumstances.load,
        match circumstances.rounds {
            1 => "There was one round.".to_owned(),
            rounds => format!(
                "Figures of W5 and of the smaller sizes of W1 to W4 are medians of {rounds} rounds, in which the subjects \
                 alternate; *worst* is the worst of all rounds. All others were measured once."
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
    fs::write(&path, page.trim_end().to_owned() + "\n").with_context(|| format!("cannot write {}", path.display()))
}

/// The description of a workload.
fn words(workload: Workload) -> &'static str {
    match workload {
        Workload::W1 => {
            "Checks of new keys, one at a time and in batches of 512. The large size has only subjects that can be filled in \
             reasonable time: onlyonce, RocksDB with a column family per bucket, and a bare Bloom filter with as many bits as \
             that of onlyonce. The other rows have fewer keys, which makes them faster. The smallest size is that of a quick \
             run (`--quick`), which gives the same ratios except for noise."
        }
        Workload::W2 => {
            "Checks of known keys: of the most recent hundredth (for onlyonce also after a flush to disk), and of any key."
        }
        Workload::W3 => {
            "New keys without a result: `record` of onlyonce, insert-if-absent of peers, one transaction per call. The time \
             includes the flush or checkpoint. Write amplification is the number of bytes passed to `write` (for Redis: pages \
             dirtied by the server) per byte of key and result. Disk is without the segments of onlyonce's journal, which are \
             allocated in advance and used again; a column of their own has their size."
        }
        Workload::W4 => "Two calls: claim, then complete with a result. Peers only do the insert of W3.",
        Workload::W5 => {
            "As W4, synced to disk before the answer. Syncs per cycle are counted by strace in a separate run, syncs of \
             flushes included. Tracing slows each sync a little, and a slower sync is shared by more callers."
        }
        Workload::W6 => {
            "Batches of 500 are claimed and completed. One key in a hundred is a duplicate, mostly of a recent key. Buckets \
             are 2 seconds wide and the window 24 seconds, so buckets rotate all the time. First at full speed, then on a \
             schedule at half that rate, where latency counts from the scheduled time. *slowdown*: the median batch of the last \
             fifth divided by that of the second fifth."
        }
        Workload::W7 => {
            "All keys of a bucket expire at once, during 5,000 claims per second. Latency counts from the scheduled time. For \
             comparison, the same on plain RocksDB: `delete_range` with a compaction, and a compaction with a TTL. The disk \
             counts as free when 70 % of the space are freed."
        }
        Workload::W8 => {
            "The time from the call of `open` to the answer of the first claim, and until every bucket has a filter: after a \
             clean close, and after a kill while keys were recorded at full speed."
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
            // One plot per number of keys.
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
                let title = format!("{workload:?}, {case}{live}{way}: keys per second");
                let sized = keys.filter(|_| workload == Workload::W1);
                let name = format!("{workload:?}-{case}{}", sized.map_or_else(String::new, |keys| format!("-{keys}")));
                bars(&add(&name.to_lowercase(), title.clone()), &title, &shown)?;
            }
        }
        Workload::W6 => {
            for row in &of {
                // A short run may not have a complete second.
                for (name, points) in row.series.iter().filter(|(_, points)| !points.is_empty()) {
                    let unit = if name.starts_with("worst") { "worst batch, ms" } else { "M keys per second" };
                    let title = format!("W6, {}: {unit}", row.case);
                    let line = Line { name: row.case.clone(), points: points.clone() };
                    let axes = Axes { title: &title, x: "seconds", y: unit, is_x_log: false };
                    lines(&add(&format!("w6-{}-{name}", row.case), title.clone()), &axes, &[line])?;
                }
            }
        }
        Workload::W7 => {
            let title = "W7: the slowest claim in each interval of 50 ms".to_owned();
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
                let title = format!("W9, {case}, batches of 512: M keys per second");
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

/// The label of a row in a plot.
fn label(row: &Row) -> String {
    if row.case == FLUSHED { format!("{}, flushed", row.subject) } else { row.subject.clone() }
}
