//! Rows of figures, one per measurement; medians over rounds; and their file.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::args::Workload;

/// A measurement, or after [`medians`] the median of all rounds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Row {
    pub workload: Workload,
    /// The measurement within the workload.
    pub case: String,
    pub subject: String,
    /// `process`, `disk`, or `none`.
    pub durability: String,
    pub keys: u64,
    pub buckets: Option<u32>,
    pub threads: u32,
    /// Keys per call.
    pub batch: u32,
    #[serde(flatten)]
    pub figures: Figures,
    /// Figures of this workload only. The name ends with the unit.
    #[serde(default)]
    pub more: BTreeMap<String, f64>,
    pub note: Option<String>,
    pub rounds: usize,
    /// The slowest and the fastest round.
    pub lowest_ops_per_s: Option<f64>,
    pub highest_ops_per_s: Option<f64>,
    /// For plots: seconds, and a value.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub series: BTreeMap<String, Vec<[f64; 2]>>,
}

/// The figures of most workloads. `None` if not applicable.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Figures {
    pub ops_per_s: Option<f64>,
    pub p50_us: Option<f64>,
    pub p99_us: Option<f64>,
    pub p999_us: Option<f64>,
    pub worst_us: Option<f64>,
    /// CPU time: for checks of the calling thread, otherwise of all threads and of the server.
    pub cpu_us_per_key: Option<f64>,
    pub ram_bytes_per_key: Option<f64>,
    pub disk_bytes_per_key: Option<f64>,
    pub write_amp: Option<f64>,
    pub fsyncs_per_s: Option<f64>,
}

impl Row {
    pub fn new(workload: Workload, case: &str, subject: &str) -> Self {
        Self {
            workload,
            case: case.to_owned(),
            subject: subject.to_owned(),
            durability: "process".to_owned(),
            keys: 0,
            buckets: None,
            threads: 1,
            batch: 1,
            figures: Figures::default(),
            more: BTreeMap::new(),
            note: None,
            rounds: 1,
            lowest_ops_per_s: None,
            highest_ops_per_s: None,
            series: BTreeMap::new(),
        }
    }

    pub fn latencies(&mut self, latencies: &crate::measure::Latencies) {
        self.figures.p50_us = Some(latencies.at(0.5));
        self.figures.p99_us = Some(latencies.at(0.99));
        self.figures.p999_us = Some(latencies.at(0.999));
        self.figures.worst_us = Some(latencies.worst());
    }

    pub fn more(&mut self, name: &str, value: f64) {
        self.more.insert(name.to_owned(), value);
    }

    /// Whether two rows are the same measurement in different rounds.
    fn is_same(&self, other: &Self) -> bool {
        let of = |row: &Self| (row.workload, row.buckets, row.threads, row.batch);
        of(self) == of(other)
            && self.case == other.case
            && self.subject == other.subject
            && self.durability == other.durability
            // The number of keys differs between rounds of a fixed time.
            && (self.keys == other.keys || self.workload == Workload::W5)
    }
}

/// One row per measurement, with the median of each figure over the rounds, and the maximum of `worst`.
pub fn medians(rows: Vec<Row>) -> Vec<Row> {
    let mut groups: Vec<Vec<Row>> = Vec::new();
    for row in rows {
        match groups.iter_mut().find(|group| group[0].is_same(&row)) {
            Some(group) => group.push(row),
            None => groups.push(vec![row]),
        }
    }
    groups.into_iter().map(|group| median_row(&group)).collect()
}

fn median_row(group: &[Row]) -> Row {
    let of =
        |figure: fn(&Figures) -> Option<f64>| median(group.iter().filter_map(|row| figure(&row.figures)).collect());
    let rates = || group.iter().filter_map(|row| row.figures.ops_per_s);
    let mut row = group[0].clone();
    row.figures = Figures {
        ops_per_s: of(|f| f.ops_per_s),
        p50_us: of(|f| f.p50_us),
        p99_us: of(|f| f.p99_us),
        p999_us: of(|f| f.p999_us),
        worst_us: group.iter().filter_map(|row| row.figures.worst_us).reduce(f64::max),
        cpu_us_per_key: of(|f| f.cpu_us_per_key),
        ram_bytes_per_key: of(|f| f.ram_bytes_per_key),
        disk_bytes_per_key: of(|f| f.disk_bytes_per_key),
        write_amp: of(|f| f.write_amp),
        fsyncs_per_s: of(|f| f.fsyncs_per_s),
    };
    for (name, value) in &mut row.more {
        if let Some(median) = median(group.iter().filter_map(|row| row.more.get(name).copied()).collect()) {
            *value = median;
        }
    }
    row.rounds = group.len();
    row.lowest_ops_per_s = rates().reduce(f64::min);
    row.highest_ops_per_s = rates().reduce(f64::max);
    row
}

/// For an even number of values, the lower of the two in the middle, which is a measured value.
fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len().checked_sub(1)? / 2).copied()
}

/// The machine, the commit and the command of a run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Circumstances {
    pub machine: String,
    pub commit: String,
    pub command: String,
    pub fsyncs_per_s: f64,
    /// The load average before the run.
    pub load: f64,
    pub rounds: usize,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Line {
    Circumstances(Circumstances),
    Row(Box<Row>),
}

/// Writes the circumstances and the rows, one object per line.
pub fn write(path: &Path, circumstances: &Circumstances, rows: &[Row]) -> Result<()> {
    let file = fs::File::create(path).with_context(|| format!("{} cannot be written", path.display()))?;
    let mut file = BufWriter::new(file);
    serde_json::to_writer(&mut file, circumstances)?;
    writeln!(file)?;
    for row in rows {
        serde_json::to_writer(&mut file, row)?;
        writeln!(file)?;
    }
    Ok(file.flush()?)
}

/// Reads several files of [`write`] as one run. The circumstances are those of the first file.
pub fn read_all(paths: &[impl AsRef<Path>]) -> Result<(Circumstances, Vec<Row>)> {
    let mut all: Option<(Circumstances, Vec<Row>)> = None;
    for path in paths {
        let (circumstances, rows) = read(path.as_ref())?;
        let Some((first, all)) = &mut all else {
            all = Some((circumstances, rows));
            continue;
        };
        let (was, is) = (&first.commit, &circumstances.commit);
        ensure!(was == is, "{} was measured on commit {is}, the files before it on {was}", path.as_ref().display());
        first.command = format!("{}`, then `{}", first.command, circumstances.command);
        first.rounds = first.rounds.max(circumstances.rounds);
        // Of equal measurements, keep one.
        let new: Vec<Row> = rows.into_iter().filter(|row| !all.iter().any(|other| other.is_same(row))).collect();
        all.extend(new);
    }
    all.context("no file of figures")
}

/// Reads a file of [`write`].
fn read(path: &Path) -> Result<(Circumstances, Vec<Row>)> {
    let text = fs::read_to_string(path).with_context(|| format!("{} cannot be read", path.display()))?;
    let (mut circumstances, mut rows) = (None, Vec::new());
    for (number, line) in text.lines().enumerate() {
        let line = serde_json::from_str(line)
            .with_context(|| format!("line {} of {} is not a row", number + 1, path.display()))?;
        match line {
            Line::Circumstances(read) => circumstances = Some(read),
            Line::Row(row) => rows.push(*row),
        }
    }
    Ok((circumstances.with_context(|| format!("{} has no circumstances", path.display()))?, rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_become_medians() {
        let row = |rate| {
            let mut row = Row::new(Workload::W3, "record", "redb");
            row.figures.ops_per_s = Some(rate);
            row.figures.worst_us = Some(rate);
            row
        };
        let rows = medians(vec![row(3.0), row(1.0), row(2.0)]);
        assert_eq!(rows.len(), 1);
        assert_eq!(rows[0].figures.ops_per_s, Some(2.0));
        assert_eq!(rows[0].figures.worst_us, Some(3.0));
        assert_eq!(rows[0].lowest_ops_per_s, Some(1.0));
        assert_eq!(rows[0].rounds, 3);
    }

    #[test]
    fn files_of_one_commit_are_read_as_one_run() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, commit: &str, workload| {
            let circumstances = Circumstances {
                machine: "two cores".to_owned(),
                commit: commit.to_owned(),
                command: name.to_owned(),
                fsyncs_per_s: 1.0,
                load: 0.0,
                rounds: 1,
            };
            let path = dir.path().join(name);
            write(&path, &circumstances, &[Row::new(workload, "", "redb")]).unwrap();
            path
        };
        let (one, two) = (file("one", "c1", Workload::W1), file("two", "c1", Workload::W6));
        let (circumstances, rows) = read_all(&[&one, &two, &one]).unwrap();
        assert_eq!(circumstances.command, "one`, then `two`, then `one");
        assert_eq!(rows.len(), 2);
        let other = file("three", "c2", Workload::W6);
        let error = read_all(&[&one, &other]).unwrap_err().to_string();
        assert!(error.contains("three") && error.contains("c1"), "{error}");
    }
}
