//! Measures latencies and rates of calls. The time to generate keys is excluded.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use hdrhistogram::Histogram;

use crate::keys::{Key, key};
use crate::machine::thread_cpu;

/// The latencies of calls.
pub struct Latencies(Histogram<u64>);

impl Latencies {
    pub fn new() -> Result<Self> {
        // Up to an hour, in nanoseconds, to three digits.
        Ok(Self(Histogram::new_with_bounds(1, 3_600_000_000_000, 3)?))
    }

    pub fn add(&mut self, latency: Duration) {
        self.0.saturating_record(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX));
    }

    pub fn merge(&mut self, other: &Self) -> Result<()> {
        self.0.add(&other.0).map_err(|error| anyhow!("cannot add latencies: {error}"))
    }

    /// In microseconds.
    pub fn at(&self, quantile: f64) -> f64 {
        self.0.value_at_quantile(quantile) as f64 / 1e3
    }

    /// In microseconds.
    pub fn worst(&self) -> f64 {
        self.0.max() as f64 / 1e3
    }
}

/// The results of calls.
pub struct Called {
    /// The sum of the answers.
    pub answers: u64,
    pub latencies: Latencies,
}

impl Called {
    pub fn new() -> Result<Self> {
        Ok(Self { answers: 0, latencies: Latencies::new()? })
    }

    /// Adds a call with each batch in turn. Reads the clock once per call.
    pub fn call_each(&mut self, keys: &[Key], batch: usize, call: impl Fn(&[Key]) -> Result<usize>) -> Result<()> {
        let mut before = Instant::now();
        for keys in keys.chunks(batch) {
            self.answers += call(keys)? as u64;
            let now = Instant::now();
            self.latencies.add(now - before);
            before = now;
        }
        Ok(())
    }
}

/// Calls with each batch in turn.
pub fn call_each(keys: &[Key], batch: usize, call: impl Fn(&[Key]) -> Result<usize>) -> Result<Called> {
    let mut called = Called::new()?;
    called.call_each(keys, batch, call)?;
    Ok(called)
}

/// The results of reads.
pub struct Probed {
    /// The number of keys and the sum of the answers.
    pub keys: u64,
    pub answers: u64,
    pub ops_per_s: f64,
    /// Of the calling thread.
    pub cpu_us_per_key: Option<f64>,
    pub latencies: Latencies,
}

/// Calls with `count` keys that `pick` chooses, generated in chunks outside of the measured time. Rate and latencies come from
/// different chunks, because reading the clock costs as much as a fast answer.
pub fn probe(
    count: u64,
    batch: usize,
    pick: impl Fn(u64) -> u64,
    call: impl Fn(&[Key]) -> Result<usize>,
) -> Result<Probed> {
    const PIECE: usize = 32 * 512;
    let mut probed = Probed { keys: 0, answers: 0, ops_per_s: 0.0, cpu_us_per_key: None, latencies: Latencies::new()? };
    let mut timed = Duration::ZERO;
    let mut cpu = Some(Duration::ZERO);
    let mut timed_keys = 0;
    let mut piece = Vec::with_capacity(PIECE);
    let pieces = count.div_ceil(PIECE as u64).max(3);
    for number in 0..pieces {
        let from = number * PIECE as u64;
        piece.clear();
        piece.extend((from..from + PIECE as u64).map(|i| key(pick(i))));
        if number % 4 == 0 {
            let called = call_each(&piece, batch, &call)?;
            probed.answers += called.answers;
            // The first chunk is a warm-up.
            if number > 0 || pieces < 5 {
                probed.latencies.merge(&called.latencies)?;
            }
        } else {
            let cpu_before = thread_cpu();
            let start = Instant::now();
            for keys in piece.chunks(batch) {
                probed.answers += call(keys)? as u64;
            }
            timed += start.elapsed();
            let used = thread_cpu().zip(cpu_before).map(|(after, before)| after.saturating_sub(before));
            cpu = cpu.zip(used).map(|(sum, used)| sum + used);
            timed_keys += piece.len();
        }
        probed.keys += piece.len() as u64;
    }
    // The kernel updates it every few milliseconds.
    let cpu = cpu.filter(|_| timed > Duration::from_millis(100));
    probed.cpu_us_per_key = cpu.map(|cpu| cpu.as_secs_f64() * 1e6 / timed_keys as f64);
    probed.ops_per_s = timed_keys as f64 / timed.as_secs_f64();
    Ok(probed)
}

/// Calls on a fixed schedule until `stop`. Returns the scheduled time of each call in seconds from the start, and the time from
/// then to its answer in milliseconds, which includes queueing.
pub fn pulse(
    start: Instant,
    every: Duration,
    stop: impl Fn() -> bool,
    mut call: impl FnMut() -> Result<()>,
) -> Result<Vec<[f64; 2]>> {
    let mut beats = Vec::new();
    let mut due = Instant::now();
    while !stop() {
        wait_until(due);
        call()?;
        beats.push([(due - start).as_secs_f64(), due.elapsed().as_secs_f64() * 1e3]);
        due += every;
    }
    Ok(beats)
}

/// Sleeps, and yields for the last part, because a sleep overshoots by more than a fast call takes.
pub fn wait_until(due: Instant) {
    const OVERSHOOT: Duration = Duration::from_micros(150);
    let left = due.saturating_duration_since(Instant::now());
    if left > OVERSHOOT {
        std::thread::sleep(left - OVERSHOOT);
    }
    while Instant::now() < due {
        std::thread::yield_now();
    }
}

/// The worst value of each time interval, for plots.
pub fn worst_of_slices(points: &[[f64; 2]], width: f64) -> Vec<[f64; 2]> {
    let mut slices: Vec<[f64; 2]> = Vec::new();
    for &[at, value] in points {
        let slice = (at / width).floor() * width;
        match slices.last_mut() {
            Some(last) if last[0] == slice => last[1] = last[1].max(value),
            _ => slices.push([slice, value]),
        }
    }
    slices
}
