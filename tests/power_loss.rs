//! Power cuts: ext4 on a loop device, shut down without flushing its journal, as a power cut leaves it. Some cuts
//! happen while the store recovers from the cut before. Under `Disk`, every acknowledged completion must be stored;
//! under `Process`, only those of the last sync interval can be missing. Without syncs the same tests must find losses,
//! which proves that they can.
//!
//! Needs root, loop devices, mkfs.ext4 and python3 (for one ioctl). Without them the tests print that they are skipped,
//! or fail if `ONLYONCE_REQUIRE_POWER_LOSS` is set. `ONLYONCE_POWER_ROUNDS` (default: 10, in each durability) sets the
//! rounds, and `ONLYONCE_POWER_SEED` (default: random, and printed) the seed.

#[path = "common/disk.rs"]
mod disk;
#[path = "common/run_log.rs"]
mod run_log;
#[path = "common/torture.rs"]
mod torture;

use std::path::Path;
use std::time::{Duration, Instant};

use disk::Disk;
use onlyonce::{Durability, ManualClock, Timestamp};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use run_log::{Contents, RunLog, Verdict};
use torture::{ChildOptions, Line, Oracle, number, open, spawn_at};

/// How much older than the sync interval a lost completion may be, on an idle machine.
const MARGIN_MS: u64 = 100;
/// The most disk writes between a completion and the end of the sync that covers it: a running sync can miss it, the
/// next one has to end, and each writes the log, the file system's journal and its commit block. The child's `pulse`
/// lines measure a write.
const WRITES: u64 = 8;

/// The process whose power is cut. Only the tests below run it.
#[test]
#[ignore = "run by the tests that cut its power"]
fn child() {
    torture::child();
}

fn disk() -> Option<Disk> {
    disk::or_skip(Disk::in_memory(512))
}

fn seed() -> u64 {
    let seed = number("ONLYONCE_POWER_SEED").unwrap_or_else(|| rand::rng().random());
    eprintln!("ONLYONCE_POWER_SEED={seed}");
    seed
}

fn rounds() -> u64 {
    number("ONLYONCE_POWER_ROUNDS").unwrap_or(10)
}

/// The reports of a process until its power cut.
struct ChildOutput {
    lines: Vec<Line>,
    /// Later lines may be void: a sync that runs during the cut can return success. On a real machine those lines never
    /// arrive.
    certain: usize,
    /// The time of the cut on the clock of the lines, in microseconds.
    cut_us: u64,
}

/// A machine with repeated power cuts.
struct Machine<'a> {
    disk: &'a Disk,
    store: &'a Path,
    rng: StdRng,
    begun: Instant,
    children: u64,
}

impl<'a> Machine<'a> {
    fn new(disk: &'a Disk, store: &'a Path) -> Self {
        Self { disk, store, rng: StdRng::seed_from_u64(seed()), begun: Instant::now(), children: 0 }
    }

    /// Starts a child, and cuts its power once `wait` returns.
    fn cut(
        &mut self,
        options: ChildOptions,
        clock_ms: u64,
        wait: impl FnOnce(&torture::Listener, &mut StdRng),
    ) -> ChildOutput {
        let cutter = self.disk.arm();
        let begun = self.begun;
        let us = move || begun.elapsed().as_micros() as u64;
        let (mut child, listener) = spawn_at(self.store, options, clock_ms, self.rng.random(), self.children, us);
        self.children += 1;
        wait(&listener, &mut self.rng);
        let (certain, cut_us) = (listener.line_count(), us());
        cutter.cut();
        // Its writes fail now, so that it may end before the kill.
        let _ = child.kill();
        child.wait().unwrap();
        let commit_s = self.rng.random_range(1..30);
        assert!(self.disk.unmount() && self.disk.mount(commit_s), "the disk cannot be mounted again");
        ChildOutput { lines: listener.all(), certain, cut_us }
    }

    /// Cuts the power after a child has worked on the open store for a time within `for_ms`.
    fn cut_at_work(&mut self, options: ChildOptions, clock_ms: u64, for_ms: std::ops::Range<u64>) -> ChildOutput {
        self.cut(options, clock_ms, |listener, rng| {
            listener.wait_for(2);
            std::thread::sleep(Duration::from_millis(rng.random_range(for_ms)));
        })
    }

    /// Cuts the power during the open, which recovers from the cut before, or soon after it.
    fn cut_in_recovery(&mut self, options: ChildOptions, clock_ms: u64) -> ChildOutput {
        self.cut(options, clock_ms, |listener, rng| {
            listener.wait_for(1);
            std::thread::sleep(Duration::from_micros(rng.random_range(0..40_000)));
        })
    }
}

fn has_opened(lines: &[Line]) -> bool {
    lines.iter().any(|line| line.text == "open")
}

#[test]
fn acknowledged_completions_survive_a_power_cut_under_disk() {
    let Some(disk) = disk() else { return };
    let path = disk.root().join("store");
    let mut machine = Machine::new(&disk, &path);
    let (mut oracle, mut cuts, mut in_recovery) = (Oracle::new(), 0, 0);
    for round in 0..rounds() {
        let flush_ms = *[5, 20, 100].choose(&mut machine.rng).unwrap();
        let options = ChildOptions { durability: Durability::Disk, flush_ms, ..ChildOptions::default() };
        let output = machine.cut_at_work(options, oracle.clock_ms, 0..400);
        oracle.apply_all(&output.lines, output.certain);
        cuts += 1;
        while machine.rng.random_bool(0.5) {
            let output = machine.cut_in_recovery(options, oracle.clock_ms);
            oracle.apply_all(&output.lines, output.certain);
            cuts += 1;
            in_recovery += u64::from(!has_opened(&output.lines));
        }
        let clock = ManualClock::at(Timestamp::from_unix_ms(oracle.clock_ms));
        let store = open(&path, &clock, Durability::Disk).unwrap_or_else(|error| panic!("round {round}: {error}"));
        oracle.check(&store);
        drop(store);
    }
    let acknowledged = oracle.acknowledged;
    eprintln!(
        "Disk: {cuts} power cuts, {in_recovery} of them during recovery, {acknowledged} completions acknowledged"
    );
    assert!(acknowledged > 10 * rounds(), "too few completions were acknowledged");
}

/// The losses of a store under `Process` after one or more power cuts.
struct Loss {
    verdict: Verdict,
    /// The longest time between the acknowledgement of a missing completion and the cut, and its upper bound.
    oldest_ms: u64,
    may_lose_ms: u64,
    /// The number of acknowledgements that are older than the bound.
    at_stake: usize,
    in_recovery: u64,
    cuts: u64,
    /// The contents of the store after the cuts.
    contents: Contents,
}

/// Cuts the power of a store under `Process`, and compares its losses with this sync interval.
fn lose(
    machine: &mut Machine<'_>,
    before: Contents,
    options: ChildOptions,
    interval_ms: u64,
    recoveries: bool,
) -> Loss {
    let options = ChildOptions { pulse: true, ..options };
    let mut run_log = RunLog::after(before);
    let (mut cuts_us, mut in_recovery, mut write_us) = (Vec::new(), 0, 0);
    let (mut clock_ms, mut token) = run_log.latest(|_| true);
    let mut add = |run_log: &mut RunLog, output: ChildOutput| {
        let cut_us = output.cut_us;
        in_recovery += u64::from(!has_opened(&output.lines));
        write_us = write_us.max(slowest_write_us(&output));
        run_log.add(output.lines);
        // Tokens are reserved on the disk before they are granted.
        token = run_log.latest(|line| line.at <= cut_us).1;
        cuts_us.push(cut_us);
        run_log.latest(|_| true).0
    };
    let work_ms = interval_ms + 5 * MARGIN_MS;
    let output = machine.cut_at_work(options, clock_ms, work_ms..work_ms + 500);
    clock_ms = add(&mut run_log, output);
    while recoveries && machine.rng.random_bool(0.5) {
        let output = machine.cut_in_recovery(options, clock_ms);
        clock_ms = add(&mut run_log, output);
    }
    let store = open(machine.store, &ManualClock::at(Timestamp::from_unix_ms(clock_ms)), Durability::Process);
    let store = store.unwrap_or_else(|error| panic!("the store does not open: {error}"));
    let contents = run_log.find(&store);
    let verdict = run_log.judge(&contents, token);
    drop(store);
    if let Some(line) = verdict.gaps.first() {
        let missing = &verdict.missing;
        let key_history = run_log.key_history(*line, &contents);
        panic!(
            "{options:?}: {missing:?} of {} lines are missing, cuts at {cuts_us:?}: {key_history}",
            run_log.lines.len()
        );
    }
    let may_lose_ms = interval_ms + MARGIN_MS + WRITES * write_us / 1_000;
    let age_ms = |line: usize| cuts_us[run_log.run_of(line)].saturating_sub(run_log.lines[line].at) / 1_000;
    let oldest_ms = verdict.missing.iter().map(|line| age_ms(*line)).max().unwrap_or(0);
    let done = |line: &usize| ["done ", "dup "].iter().any(|word| run_log.lines[*line].text.starts_with(word));
    let at_stake = (0..run_log.lines.len()).filter(done).filter(|line| age_ms(*line) > may_lose_ms).count();
    let cuts = cuts_us.len() as u64;
    Loss { verdict, oldest_ms, may_lose_ms, at_stake, in_recovery, cuts, contents }
}

/// The longest time between two `pulse` lines before the cut, the end of which can be the cut.
fn slowest_write_us(output: &ChildOutput) -> u64 {
    let beats = output.lines.iter().filter(|line| line.text == "pulse").map(|line| line.at);
    let beats: Vec<u64> = beats.filter(|at| *at < output.cut_us).chain([output.cut_us]).collect();
    beats.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0)
}

#[test]
fn under_process_a_power_cut_loses_at_most_the_last_sync_interval() {
    let Some(disk) = disk() else { return };
    let path = disk.root().join("store");
    let mut machine = Machine::new(&disk, &path);
    let mut contents = Contents::nothing();
    let (mut cuts, mut in_recovery, mut present, mut missing, mut at_stake, mut oldest_ms) = (0, 0, 0, 0, 0, 0);
    for round in 0..3 * rounds() {
        // On a busy machine few acknowledgements are older than the bound: up to three times the rounds.
        if round >= rounds() && at_stake as u64 > 10 * rounds() {
            break;
        }
        let rng = &mut machine.rng;
        let options = ChildOptions {
            durability: Durability::Process,
            // A flush also syncs the completions before it: with rare flushes, only the interval does.
            flush_ms: *[5, 20, 200, 60_000].choose(rng).unwrap(),
            sync_ms: *[50, 100, 200].choose(rng).unwrap(),
            pace: *[1, 20, 50].choose(rng).unwrap(),
            budget_mib: *[32, 256].choose(rng).unwrap(),
            // Without a pause, the child's threads starve those that write to the disk.
            rest_us: *[200, 1_000].choose(rng).unwrap(),
            ..ChildOptions::default()
        };
        let loss = lose(&mut machine, contents, options, options.sync_ms, true);
        let Loss { verdict, oldest_ms: lost_ms, may_lose_ms, .. } = &loss;
        assert!(verdict.violations.is_empty(), "round {round}, {options:?}: {:?}", verdict.violations);
        let gaps = &verdict.gaps;
        assert!(gaps.is_empty(), "round {round}, {options:?}: missing, but later ones are stored: {gaps:?}");
        assert!(lost_ms <= may_lose_ms, "round {round}, {options:?}: lost after {lost_ms} ms, more than {may_lose_ms}");
        (cuts, in_recovery) = (cuts + loss.cuts, in_recovery + loss.in_recovery);
        (present, missing) = (present + verdict.present, missing + verdict.missing.len());
        at_stake += loss.at_stake;
        oldest_ms = oldest_ms.max(lost_ms.saturating_sub(options.sync_ms));
        contents = loss.contents;
    }
    let acknowledged = present + missing;
    eprintln!(
        "Process: {cuts} power cuts, {in_recovery} of them during recovery, {acknowledged} completions acknowledged; \
         {missing} were lost, all of them the most recent, the oldest {oldest_ms} ms more than the interval before the cut"
    );
    assert!(at_stake as u64 > 10 * rounds(), "too few old acknowledgements: {at_stake}");
}

/// A child without syncs and without flushes, which sync the completions before them: data reaches the disk only by chance.
fn without_syncs() -> ChildOptions {
    ChildOptions {
        durability: Durability::Process,
        flush_ms: 60_000,
        pace: 1,
        budget_mib: 2_048,
        rest_us: 300,
        ..ChildOptions::default()
    }
}

#[test]
fn without_syncs_the_test_under_disk_finds_losses() {
    let Some(disk) = disk() else { return };
    let path = disk.root().join("store");
    let mut machine = Machine::new(&disk, &path);
    let mut oracle = Oracle::new();
    let output = machine.cut_at_work(without_syncs(), oracle.clock_ms, 300..400);
    oracle.apply_all(&output.lines, output.certain);
    let acknowledged = oracle.acknowledged as usize;
    let missing = match open(&path, &ManualClock::at(Timestamp::from_unix_ms(oracle.clock_ms)), Durability::Process) {
        Ok(store) => oracle.missing(&store),
        // The store itself is lost.
        Err(_) => acknowledged,
    };
    eprintln!("without syncs, {missing} of {acknowledged} completions were lost");
    assert!(missing > 0, "the test cannot detect a loss");
}

#[test]
fn without_syncs_a_power_cut_loses_more_than_the_last_sync_interval() {
    let Some(disk) = disk() else { return };
    for number in 0..20 {
        let path = disk.root().join(format!("store-{number}"));
        let loss = lose(&mut Machine::new(&disk, &path), Contents::nothing(), without_syncs(), 50, false);
        eprintln!("without syncs, lost after {} ms, where {} are allowed", loss.oldest_ms, loss.may_lose_ms);
        if loss.oldest_ms > loss.may_lose_ms {
            return;
        }
    }
    panic!("the test cannot detect a loss, or the disk is too slow");
}
