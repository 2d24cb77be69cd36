//! The goals for onlyonce and the measured values. Most goals are ratios within one run.

use crate::args::Workload::{self, W1, W2, W3, W4, W5, W6, W7, W8, W9};
use crate::keys::{Key, RESULT};
use crate::row::Row;
use crate::subject::Kind;
use crate::table::{number, rate};
use crate::workloads::BATCH;

/// The embedded stores to compare with. Plain RocksDB has goals of its own.
const EMBEDDED: [&str; 4] = ["fjall", "redb", "lmdb", "sqlite"];

pub struct Goal {
    pub workload: Workload,
    pub aim: &'static str,
    pub measured: String,
    /// `None` if it was not measured.
    pub is_reached: Option<bool>,
}

/// All goals with their measured values in these rows.
pub fn goals(rows: &[Row]) -> Vec<Goal> {
    let rows = Rows(rows);
    let batch = BATCH as u32;
    let mut goals = Vec::new();
    let mut goal = |workload, aim, measured: Option<(String, bool)>| {
        let (measured, is_reached) = match measured {
            Some((measured, is_reached)) => (measured, Some(is_reached)),
            None => ("not measured".to_owned(), None),
        };
        goals.push(Goal { workload, aim, measured, is_reached });
    };

    let new = rows.find(W1, "new keys", "onlyonce", 1, batch);
    let beside = |name| rows.of_same_keys(W1, "new keys", "onlyonce", name, batch);
    goal(W1, "batches: at least 8 M/s per thread", new.and_then(|row| at_least_rate(row, 8e6)));
    goal(
        W1,
        "batches: at least a quarter of the rate of the bare filter",
        beside("bloom").map(|(ours, theirs)| (format!("{} times", number(theirs / ours)), theirs / ours <= 4.0)),
    );
    goal(
        W1,
        "batches: at least 10 times RocksDB with as many column families",
        beside("rocksdb-families").map(|(ours, theirs)| times(ours, theirs, 10.0)),
    );

    for (case, aim, aim_of_rate) in [
        (
            "recent",
            "recent, batches: at least 5 times the best embedded peer",
            "recent, batches: at least 4 M/s per thread",
        ),
        (
            "recent, flushed",
            "recent and flushed, batches: at least 5 times the best embedded peer",
            "recent and flushed, batches: at least 4 M/s per thread",
        ),
    ] {
        let ours = rows.find(W2, case, "onlyonce", 1, batch);
        goal(W2, aim_of_rate, ours.and_then(|row| at_least_rate(row, 4e6)));
        goal(W2, aim, rows.beside_best(ours, &EMBEDDED, W2, "recent", 1, batch, 5.0));
    }
    goal(
        W2,
        "uniform, batches: no slower than the best embedded peer",
        rows.beside_best(rows.find(W2, "uniform", "onlyonce", 1, batch), &EMBEDDED, W2, "uniform", 1, batch, 1.0),
    );
    goal(
        W2,
        "uniform, single: no slower than the best embedded peer",
        rows.beside_best(rows.find(W2, "uniform", "onlyonce", 1, 1), &EMBEDDED, W2, "uniform", 1, 1, 1.0),
    );

    let record = rows.find(W3, "record", "onlyonce", 1, batch);
    let single = rows.find(W3, "record", "onlyonce", 1, 1);
    let best = |ours, peers: &[&str], batch, factor| rows.beside_best(ours, peers, W3, "record", 1, batch, factor);
    goal(W3, "batches, 1 thread: at least 7 times the best embedded peer", best(record, &EMBEDDED, batch, 7.0));
    goal(W3, "batches, 1 thread: at least 4 times pipelined Redis, everysec", best(record, &["redis"], batch, 4.0));
    goal(W3, "batches, 1 thread: at least 6 times default RocksDB", best(record, &["rocksdb-default"], batch, 6.0));
    let peers: Vec<&str> = Kind::ALL
        .iter()
        .filter(|kind| **kind != Kind::Onlyonce && kind.is_persistent())
        .map(|kind| kind.name())
        .collect();
    goal(W3, "single: at least 2 times the best peer", best(single, &peers, 1, 2.0));
    let key_bytes = size_of::<Key>() as f64;
    goal(
        W3,
        "disk: at most key and result and 28 bytes per key",
        record.and_then(|row| at_most(row.figures.disk_bytes_per_key?, key_bytes + 28.0, "bytes")),
    );
    goal(
        W3,
        "write amplification at most 2.5, the log included",
        record.and_then(|row| at_most(row.figures.write_amp?, 2.5, "times")),
    );

    let life = rows.find(W4, "claim, complete", "onlyonce", 1, batch);
    goal(W4, "batches: at least 4 times the best embedded peer's insert", best(life, &EMBEDDED, batch, 4.0));
    goal(
        W4,
        "disk: at most key and result and 28 bytes per key",
        life.and_then(|row| at_most(row.figures.disk_bytes_per_key?, key_bytes + RESULT.len() as f64 + 28.0, "bytes")),
    );
    goal(
        W4,
        "write amplification at most 2.5, the log included",
        life.and_then(|row| at_most(row.figures.write_amp?, 2.5, "times")),
    );

    let syncs = |case| rows.of(W5, case, "onlyonce").and_then(|row| row.more.get("syncs_per_cycle").copied());
    goal(W5, "alone: at most 1.3 syncs per cycle", syncs("alone").and_then(|syncs| at_most(syncs, 1.3, "syncs")));
    goal(
        W5,
        "64 callers: at least 30 cycles per sync",
        syncs("64 callers").map(|syncs| (format!("{} cycles", number(1.0 / syncs)), syncs <= 1.0 / 30.0)),
    );
    let synced = rows.of(W5, "batches", "onlyonce");
    goal(
        W5,
        "batches: at least 3 times the best peer, synced",
        rows.beside_best(synced, &peers, W5, "batches", 1, batch, 3.0),
    );

    let day = rows.of(W6, "open loop at half", "onlyonce");
    goal(
        W6,
        "at half of the maximum rate: p99.9 of a batch under 3 ms",
        day.and_then(|row| at_most(row.figures.p999_us? / 1e3, 3.0, "ms")),
    );
    goal(
        W6,
        "at half of the maximum rate: the worst batch under 50 ms",
        day.and_then(|row| at_most(row.figures.worst_us? / 1e3, 50.0, "ms")),
    );
    goal(
        W6,
        "no slowdown as buckets rotate (median batch at the end at most 1.1 times that at the beginning)",
        day.and_then(|row| at_most(*row.more.get("slowdown")?, 1.1, "times")),
    );

    let expiry = rows.of(W7, "many keys expire", "onlyonce");
    let more = |row: Option<&Row>, name: &str| row.and_then(|row| row.more.get(name).copied());
    goal(
        W7,
        "no claim waits more than 10 ms because a bucket is dropped",
        more(expiry, "worst_wait_ms").and_then(|ms| at_most(ms, 10.0, "ms")),
    );
    goal(W7, "the disk space is freed within 2 s", more(expiry, "disk_free_s").and_then(|s| at_most(s, 2.0, "s")));

    let opening = |case, name, most, unit| {
        let row = rows.of(W8, case, "onlyonce");
        more(row, name).and_then(|value| at_most(value, most, unit)).map(|(text, is_reached)| {
            (format!("{text}, {} M keys", number(row.map_or(0, |row| row.keys) as f64 / 1e6)), is_reached)
        })
    };
    goal(
        W8,
        "100 M keys, clean close: first claim within 300 ms",
        opening("clean close", "first_claim_ms", 300.0, "ms"),
    );
    goal(W8, "100 M keys, SIGKILL: first claim within 1 s", opening("SIGKILL", "first_claim_ms", 1_000.0, "ms"));
    goal(
        W8,
        "100 M keys, clean close: filters complete within 5 s",
        opening("clean close", "filters_complete_s", 5.0, "s"),
    );
    goal(W8, "100 M keys, SIGKILL: filters complete within 5 s", opening("SIGKILL", "filters_complete_s", 5.0, "s"));

    goal(W9, "new keys: with 32 buckets at most 1.3 times the cost with 2", rows.growth_in_buckets());
    goal(W9, "new keys: with the most keys at most 3 times the cost with the fewest", rows.growth_in_keys());

    goal(
        W1,
        "filters: at most 3 bytes per live key, with 24 buckets",
        new.and_then(|row| at_most(row.figures.ram_bytes_per_key?, 3.0, "bytes")),
    );
    goal(
        W1,
        "less than 1 % of new keys are looked up on disk, with 24 buckets",
        more(new, "to_disk_percent").and_then(|percent| at_most(percent, 1.0, "%")),
    );
    goals
}

fn at_most(value: f64, most: f64, unit: &str) -> Option<(String, bool)> {
    Some((format!("{} {unit}", number(value)), value <= most))
}

fn at_least_rate(row: &Row, least: f64) -> Option<(String, bool)> {
    let per_s = row.figures.ops_per_s?;
    Some((rate(per_s), per_s >= least))
}

fn times(ours: f64, theirs: f64, least: f64) -> (String, bool) {
    (format!("{} times", number(ours / theirs)), ours / theirs >= least)
}

struct Rows<'a>(&'a [Row]);

impl<'a> Rows<'a> {
    fn find(&self, workload: Workload, case: &str, subject: &str, threads: u32, batch: u32) -> Option<&'a Row> {
        self.with_most_keys(|row| {
            row.workload == workload
                && row.case == case
                && row.subject == subject
                && (row.threads, row.batch) == (threads, batch)
        })
    }

    /// The row of a case that has only one.
    fn of(&self, workload: Workload, case: &str, subject: &str) -> Option<&'a Row> {
        self.0.iter().find(|row| row.workload == workload && row.case == case && row.subject == subject)
    }

    /// The row with the most keys.
    fn with_most_keys(&self, is_one: impl Fn(&Row) -> bool) -> Option<&'a Row> {
        // The first one with this many keys: W1 measures the largest store first.
        self.0.iter().rev().filter(|row| is_one(row)).max_by_key(|row| row.keys)
    }

    /// The rates of two subjects at the largest number of keys that both have.
    fn of_same_keys(&self, workload: Workload, case: &str, ours: &str, theirs: &str, batch: u32) -> Option<(f64, f64)> {
        let is_one = |row: &&Row, subject: &str| {
            row.workload == workload
                && row.case == case
                && row.subject == subject
                && (row.threads, row.batch) == (1, batch)
        };
        let pairs = self.0.iter().filter(|row| is_one(row, theirs)).filter_map(|theirs| {
            let ours = self.0.iter().find(|row| is_one(row, ours) && row.keys == theirs.keys)?;
            Some((theirs.keys, ours.figures.ops_per_s?, theirs.figures.ops_per_s?))
        });
        pairs.max_by_key(|(keys, ..)| *keys).map(|(_, ours, theirs)| (ours, theirs))
    }

    /// The rate of onlyonce compared with the best of some peers.
    #[expect(clippy::too_many_arguments, reason = "they identify a row of the table")]
    fn beside_best(
        &self,
        ours: Option<&Row>,
        peers: &[&str],
        workload: Workload,
        case: &str,
        threads: u32,
        batch: u32,
        least: f64,
    ) -> Option<(String, bool)> {
        let theirs = peers.iter().filter_map(|peer| {
            let row = self.find(workload, case, peer, threads, batch)?;
            Some((*peer, row.figures.ops_per_s?))
        });
        let (peer, theirs) = theirs.max_by(|(_, one), (_, other)| one.total_cmp(other))?;
        let (text, is_reached) = times(ours?.figures.ops_per_s?, theirs, least);
        Some((format!("{text} ({peer}, {})", rate(theirs)), is_reached))
    }

    fn grown(&self) -> impl Iterator<Item = &'a Row> {
        self.0.iter().filter(|row| row.workload == W9 && row.case == "new keys")
    }

    /// The worst over all numbers of keys.
    fn growth_in_buckets(&self) -> Option<(String, bool)> {
        let cost = |row: &Row| row.figures.ops_per_s.map(|rate| 1.0 / rate);
        let of = |few: &Row| {
            let many = self.grown().find(|row| row.keys == few.keys && row.buckets == Some(32))?;
            Some((cost(many)? / cost(few)?, few.keys))
        };
        let (worst, keys) = self
            .grown()
            .filter(|row| row.buckets == Some(2))
            .filter_map(of)
            .max_by(|(one, _), (other, _)| one.total_cmp(other))?;
        Some((format!("{} times, with {} M keys", number(worst), number(keys as f64 / 1e6)), worst <= 1.3))
    }

    /// The worst over all numbers of buckets.
    fn growth_in_keys(&self) -> Option<(String, bool)> {
        let fewest = self.grown().map(|row| row.keys).min()?;
        let most = self.grown().map(|row| row.keys).max()?;
        let of = |few: &Row| {
            let many = self.grown().find(|row| row.keys == most && row.buckets == few.buckets)?;
            Some(few.figures.ops_per_s? / many.figures.ops_per_s?)
        };
        let worst = self.grown().filter(|row| row.keys == fewest).filter_map(of).max_by(f64::total_cmp)?;
        let keys = |keys: u64| number(keys as f64 / 1e6);
        Some((format!("{} times, {} M and {} M keys", number(worst), keys(most), keys(fewest)), worst <= 3.0))
    }
}
