//! W6: a consumer's day. Batches of 500 with some duplicates, while buckets rotate: first at full speed, then on a schedule at
//! half that rate, where latency counts from the scheduled time.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use onlyonce::{Claim, Durability, Lease, Store};

use super::{Run, remove, say};
use crate::args::Workload;
use crate::keys::{Key, RESULT, key, mix};
use crate::machine::directory_bytes;
use crate::measure::{Latencies, wait_until, worst_of_slices};
use crate::row::Row;

const BATCH: u64 = 500;
const BUCKET: Duration = Duration::from_secs(2);
const WINDOW: Duration = Duration::from_secs(24);
const MEMORY: usize = 1 << 30;

pub fn run(run: &Run) -> Result<Vec<Row>> {
    let dir = run.directory("day");
    std::fs::create_dir_all(&dir)?;
    let store = Store::builder()
        .durability(Durability::Process)
        .window(WINDOW)
        .bucket(BUCKET)
        .memory_budget(MEMORY)
        .open(dir.join("store"))?;
    let day = run.scale.day;
    let mut consumer = Consumer::new(&store);

    let closed_for = (day / 4).min(Duration::from_secs(120));
    say(&format!("W6: at full speed, for {} s", closed_for.as_secs()));
    let start = Instant::now();
    let mut closed = Phase::new("closed loop")?;
    while start.elapsed() < closed_for {
        let batch = consumer.next_batch();
        let called = Instant::now();
        consumer.work(&batch)?;
        closed.add((called - start).as_secs_f64(), called.elapsed());
    }
    let rate = closed.batches() as f64 * BATCH as f64 / start.elapsed().as_secs_f64();

    // Background work of the first part must not run in the second.
    store.flush()?;
    let open_for = day.saturating_sub(closed_for);
    say(&format!("W6: at half of {:.2} M/s, for {} s", rate / 1e6, open_for.as_secs()));
    let every = Duration::from_secs_f64(BATCH as f64 / (rate / 2.0));
    let start = Instant::now();
    let mut open = Phase::new("open loop at half")?;
    let mut due = start;
    while due - start < open_for {
        let batch = consumer.next_batch();
        wait_until(due);
        consumer.work(&batch)?;
        open.add((due - start).as_secs_f64(), due.elapsed());
        due += every;
    }
    let open_rate = open.batches() as f64 * BATCH as f64 / start.elapsed().as_secs_f64();
    consumer.verify()?;

    let live: u64 = store.stats().buckets.iter().map(|bucket| bucket.keys).sum::<u64>() + store.stats().unflushed;
    let filter_bytes = store.stats().filter_bytes;
    let disk = directory_bytes(&dir);
    let rows = [closed.row(rate, consumer.asked)?, open.row(open_rate, consumer.asked)?].map(|mut row| {
        row.buckets = Some((WINDOW.as_secs() / BUCKET.as_secs()) as u32);
        row.figures.ram_bytes_per_key = Some(filter_bytes as f64 / live.max(1) as f64);
        row.figures.disk_bytes_per_key = Some(disk as f64 / live.max(1) as f64);
        row.more("memory_budget_mib", (MEMORY >> 20) as f64);
        row.more("duplicates_percent", 100.0 * consumer.duplicates as f64 / consumer.asked as f64);
        row
    });
    drop(consumer);
    store.close().wait()?;
    remove(&dir)?;
    Ok(rows.into())
}

/// Generates batches, processes them, and checks the answers.
struct Consumer<'a> {
    store: &'a Store,
    /// The number of the next new key. All below it are completed.
    next: u64,
    draws: u64,
    asked: u64,
    duplicates: u64,
    acquired: u64,
    completed: u64,
    /// Past values of `next` with their times, to choose keys that are still in the window.
    marks: VecDeque<(Instant, u64)>,
}

struct Batch {
    keys: Vec<Key>,
    new: u64,
}

impl<'a> Consumer<'a> {
    fn new(store: &'a Store) -> Self {
        let marks = VecDeque::from([(Instant::now(), 0)]);
        Self { store, next: 0, draws: 0, asked: 0, duplicates: 0, acquired: 0, completed: 0, marks }
    }

    fn draw(&mut self, below: u64) -> u64 {
        self.draws += 1;
        mix(self.draws) % below
    }

    /// One key in a hundred is a duplicate: nine of ten of those are recent, the others at most half a window old.
    fn next_batch(&mut self) -> Batch {
        let now = Instant::now();
        if self.marks.back().is_none_or(|(at, _)| now - *at > Duration::from_millis(100)) {
            self.marks.push_back((now, self.next));
        }
        while self.marks.len() > 1 && self.marks.front().is_some_and(|(at, _)| now - *at > WINDOW / 2) {
            self.marks.pop_front();
        }
        let oldest = self.marks.front().map_or(0, |(_, next)| *next);
        let known = self.next;
        let mut batch = Batch { keys: Vec::with_capacity(BATCH as usize), new: 0 };
        for _ in 0..BATCH {
            let number = if known > oldest && self.draw(100) == 0 {
                let back = if self.draw(10) == 0 { known - oldest } else { (known - oldest).min(20_000) };
                known - 1 - self.draw(back)
            } else {
                batch.new += 1;
                self.next += 1;
                self.next - 1
            };
            batch.keys.push(key(number));
        }
        batch
    }

    fn work(&mut self, batch: &Batch) -> Result<()> {
        let mut leases: Vec<(Lease, &[u8])> = Vec::with_capacity(batch.keys.len());
        let mut duplicates = 0;
        for claim in self.store.claim_batch(&batch.keys).wait()? {
            match claim? {
                Claim::Acquired(lease) => leases.push((lease, RESULT)),
                Claim::Completed(first) => {
                    ensure!(first.result() == Some(RESULT), "a duplicate got a different result");
                    duplicates += 1;
                }
                Claim::InProgress(_) => anyhow::bail!("a completed key is reported as in progress"),
            }
        }
        let acquired = leases.len() as u64;
        for completed in self.store.complete_batch(leases).wait() {
            completed?;
            self.completed += 1;
        }
        ensure!(acquired == batch.new, "{} keys of a batch were new, but {acquired} were acquired", batch.new);
        self.asked += batch.keys.len() as u64;
        self.acquired += acquired;
        self.duplicates += duplicates;
        Ok(())
    }

    fn verify(&self) -> Result<()> {
        let distinct = self.next;
        ensure!(
            self.acquired == distinct && self.completed == distinct,
            "{distinct} distinct keys were claimed, {} acquired and {} completed",
            self.acquired,
            self.completed
        );
        Ok(())
    }
}

/// The measurements of a part of the day.
struct Phase {
    case: &'static str,
    latencies: Latencies,
    /// For each batch, its time in seconds and its latency in milliseconds.
    points: Vec<[f64; 2]>,
}

impl Phase {
    fn new(case: &'static str) -> Result<Self> {
        Ok(Self { case, latencies: Latencies::new()?, points: Vec::new() })
    }

    fn add(&mut self, at_s: f64, latency: Duration) {
        self.latencies.add(latency);
        self.points.push([at_s, latency.as_secs_f64() * 1e3]);
    }

    fn batches(&self) -> usize {
        self.points.len()
    }

    fn row(&self, rate: f64, asked: u64) -> Result<Row> {
        let mut row = Row::new(Workload::W6, self.case, "onlyonce");
        row.keys = asked;
        row.batch = BATCH as u32;
        row.figures.ops_per_s = Some(rate);
        row.latencies(&self.latencies);
        // Slowdown as buckets rotate: the median batch of the last fifth, divided by that of the second fifth.
        let fifth = self.points.len() / 5;
        if fifth > 0 {
            let median = |part: &[[f64; 2]]| -> Result<f64> {
                let mut latencies = Latencies::new()?;
                for [_, ms] in part {
                    latencies.add(Duration::from_secs_f64(ms / 1e3));
                }
                Ok(latencies.at(0.5))
            };
            row.more("slowdown", median(&self.points[4 * fifth..])? / median(&self.points[fifth..2 * fifth])?);
        }
        let mut throughput: Vec<[f64; 2]> = Vec::new();
        for [at, _] in &self.points {
            let second = at.floor();
            match throughput.last_mut() {
                Some(last) if last[0] == second => last[1] += BATCH as f64 / 1e6,
                _ => throughput.push([second, BATCH as f64 / 1e6]),
            }
        }
        // The last second is incomplete.
        throughput.pop();
        row.series.insert("throughput_m_per_s".to_owned(), throughput);
        row.series.insert("worst_batch_ms".to_owned(), worst_of_slices(&self.points, 1.0));
        Ok(row)
    }
}
