//! The power is cut: ext4 on a loop device, shut down without flushing its journal, as a machine that goes dark leaves
//! it. Some cuts come while the store recovers from the one before. Under `Disk`, what was acknowledged must be there; under
//! `Process`, only the last of it may be missing, no older than the interval between two syncs. With syncs left out the
//! same tests must find losses, or they could not see one.
//!
//! Needs root, loop devices, mkfs.ext4 and python3 (for one ioctl), and skips, aloud, where they are missing;
//! `ONLYONCE_REQUIRE_POWER_LOSS` makes that a failure. `ONLYONCE_POWER_ROUNDS` (default 10, in each durability) and
//! `ONLYONCE_POWER_SEED` (default: drawn, and printed) set how often and how.

#[path = "common/chronicle.rs"]
mod chronicle;
#[path = "common/disk.rs"]
mod disk;
#[path = "common/torture.rs"]
mod torture;

use std::path::Path;
use std::time::{Duration, Instant};

use chronicle::{Chronicle, Found, Verdict};
use disk::Disk;
use onlyonce::{Durability, ManualClock, Timestamp};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use torture::{Life, Line, Oracle, number, open, spawn_at};

/// How much older than the sync interval a completion may be that is lost, on a machine that has nothing else to do.
const MARGIN_MS: u64 = 100;
/// How often at most the disk turns between a completion and the end of the sync that covers it: one sync may be under way
/// and miss it, the next has to end, and each writes the log, the file system's journal and its end. How long a turn
/// takes, on a machine that may be busy, the child says with its pulse.
const TURNS: u64 = 8;

/// The process whose power is cut. Run by the tests below, never by itself.
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

/// What a process had said when its power was cut.
struct Said {
    lines: Vec<Line>,
    /// What arrived after these may be void: a sync that is under way in that moment can come back as if it had worked.
    /// From a machine that goes dark nothing arrives.
    certain: usize,
    /// On the clock of the lines, in microseconds.
    cut_us: u64,
}

/// One power cut after the other, each with a life before it.
struct Torment<'a> {
    disk: &'a Disk,
    store: &'a Path,
    rng: StdRng,
    begun: Instant,
    lives: u64,
}

impl<'a> Torment<'a> {
    fn new(disk: &'a Disk, store: &'a Path) -> Self {
        Self { disk, store, rng: StdRng::seed_from_u64(seed()), begun: Instant::now(), lives: 0 }
    }

    /// Lets a child live until `wait` comes back, and cuts its power.
    fn cut(&mut self, life: Life, clock_ms: u64, wait: impl FnOnce(&torture::Listener, &mut StdRng)) -> Said {
        let cutter = self.disk.arm();
        let begun = self.begun;
        let us = move || begun.elapsed().as_micros() as u64;
        let (mut child, listener) = spawn_at(self.store, life, clock_ms, self.rng.random(), self.lives, us);
        self.lives += 1;
        wait(&listener, &mut self.rng);
        let (certain, cut_us) = (listener.so_far(), us());
        cutter.cut();
        // Its writes fail now, so that it may have ended by itself.
        let _ = child.kill();
        child.wait().unwrap();
        let commit_s = self.rng.random_range(1..30);
        assert!(self.disk.unmount() && self.disk.mount(commit_s), "the disk does not come back");
        Said { lines: listener.all(), certain, cut_us }
    }

    /// Lets a child work on the open store for so long.
    fn cut_at_work(&mut self, life: Life, clock_ms: u64, for_ms: std::ops::Range<u64>) -> Said {
        self.cut(life, clock_ms, |listener, rng| {
            listener.wait_for(2);
            std::thread::sleep(Duration::from_millis(rng.random_range(for_ms)));
        })
    }

    /// Cuts the power while the store opens, and recovers from the last cut, or soon after.
    fn cut_in_recovery(&mut self, life: Life, clock_ms: u64) -> Said {
        self.cut(life, clock_ms, |listener, rng| {
            listener.wait_for(1);
            std::thread::sleep(Duration::from_micros(rng.random_range(0..40_000)));
        })
    }
}

fn has_opened(lines: &[Line]) -> bool {
    lines.iter().any(|line| line.text == "open")
}

#[test]
fn what_was_acknowledged_on_disk_survives_a_power_cut() {
    let Some(disk) = disk() else { return };
    let path = disk.root().join("store");
    let mut torment = Torment::new(&disk, &path);
    let (mut oracle, mut cuts, mut in_recovery) = (Oracle::new(), 0, 0);
    for round in 0..rounds() {
        let flush_ms = *[5, 20, 100].choose(&mut torment.rng).unwrap();
        let life = Life { durability: Durability::Disk, flush_ms, ..Life::default() };
        let said = torment.cut_at_work(life, oracle.clock_ms, 0..400);
        oracle.hear_all(&said.lines, said.certain);
        cuts += 1;
        while torment.rng.random_bool(0.5) {
            let said = torment.cut_in_recovery(life, oracle.clock_ms);
            oracle.hear_all(&said.lines, said.certain);
            cuts += 1;
            in_recovery += u64::from(!has_opened(&said.lines));
        }
        let clock = ManualClock::at(Timestamp::from_unix_ms(oracle.clock_ms));
        let store = open(&path, &clock, Durability::Disk).unwrap_or_else(|error| panic!("round {round}: {error}"));
        oracle.check(&store);
        drop(store);
    }
    let acknowledged = oracle.acknowledged;
    eprintln!("Disk: {cuts} power cuts, {in_recovery} of them in a recovery, {acknowledged} completions acknowledged");
    assert!(acknowledged > 10 * rounds(), "too little was at stake");
}

/// How a store that may lose the last of what it acknowledged came out of one or more cuts.
struct Loss {
    verdict: Verdict,
    /// Of what is missing, the most time that was between its acknowledgement and the cut; and what it may be.
    oldest_ms: u64,
    may_lose_ms: u64,
    /// Acknowledgements that were older.
    at_stake: usize,
    in_recovery: u64,
    cuts: u64,
    /// What the store has now.
    found: Found,
}

/// Cuts the power of a store under `Process`, and looks what is left, as if it synced so often.
fn lose(torment: &mut Torment<'_>, before: Found, life: Life, interval_ms: u64, recoveries: bool) -> Loss {
    let life = Life { pulse: true, ..life };
    let mut chronicle = Chronicle::after(before);
    let (mut cuts_us, mut in_recovery, mut turn_us) = (Vec::new(), 0, 0);
    let (mut clock_ms, mut token) = chronicle.latest(|_| true);
    let mut add = |chronicle: &mut Chronicle, said: Said| {
        let cut_us = said.cut_us;
        in_recovery += u64::from(!has_opened(&said.lines));
        turn_us = turn_us.max(slowest_turn_us(&said));
        chronicle.add(said.lines);
        // Tokens are reserved on the disk before they are given.
        token = chronicle.latest(|line| line.at <= cut_us).1;
        cuts_us.push(cut_us);
        chronicle.latest(|_| true).0
    };
    let work_ms = interval_ms + 5 * MARGIN_MS;
    let said = torment.cut_at_work(life, clock_ms, work_ms..work_ms + 500);
    clock_ms = add(&mut chronicle, said);
    while recoveries && torment.rng.random_bool(0.5) {
        let said = torment.cut_in_recovery(life, clock_ms);
        clock_ms = add(&mut chronicle, said);
    }
    let store = open(torment.store, &ManualClock::at(Timestamp::from_unix_ms(clock_ms)), Durability::Process);
    let store = store.unwrap_or_else(|error| panic!("the store does not open: {error}"));
    let found = chronicle.find(&store);
    let verdict = chronicle.judge(&found, token);
    drop(store);
    if let Some(line) = verdict.overtaken.first() {
        let missing = &verdict.missing;
        let story = chronicle.story(*line, &found);
        panic!("{life:?}: {missing:?} of {} lines are missing, cuts at {cuts_us:?}: {story}", chronicle.lines.len());
    }
    let may_lose_ms = interval_ms + MARGIN_MS + TURNS * turn_us / 1_000;
    let age_ms = |line: usize| cuts_us[chronicle.life(line)].saturating_sub(chronicle.lines[line].at) / 1_000;
    let oldest_ms = verdict.missing.iter().map(|line| age_ms(*line)).max().unwrap_or(0);
    let done = |line: &usize| ["done ", "dup "].iter().any(|word| chronicle.lines[*line].text.starts_with(word));
    let at_stake = (0..chronicle.lines.len()).filter(done).filter(|line| age_ms(*line) > may_lose_ms).count();
    let cuts = cuts_us.len() as u64;
    Loss { verdict, oldest_ms, may_lose_ms, at_stake, in_recovery, cuts, found }
}

/// The longest time between two beats of the pulse before the cut, the last of which it may have prevented.
fn slowest_turn_us(said: &Said) -> u64 {
    let beats = said.lines.iter().filter(|line| line.text == "pulse").map(|line| line.at);
    let beats: Vec<u64> = beats.filter(|at| *at < said.cut_us).chain([said.cut_us]).collect();
    beats.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0)
}

#[test]
fn under_process_a_power_cut_takes_no_more_than_the_last_interval() {
    let Some(disk) = disk() else { return };
    let path = disk.root().join("store");
    let mut torment = Torment::new(&disk, &path);
    let mut found = Found::nothing();
    let (mut cuts, mut in_recovery, mut there, mut missing, mut at_stake, mut oldest_ms) = (0, 0, 0, 0, 0, 0);
    for round in 0..3 * rounds() {
        // A machine with much else to do leaves little time in which something is old enough to be at stake.
        if round >= rounds() && at_stake as u64 > 10 * rounds() {
            break;
        }
        let rng = &mut torment.rng;
        let life = Life {
            durability: Durability::Process,
            // A seal puts what was completed before it on the disk: where there are few, the interval alone does.
            flush_ms: *[5, 20, 200, 60_000].choose(rng).unwrap(),
            sync_ms: *[50, 100, 200].choose(rng).unwrap(),
            pace: *[1, 20, 50].choose(rng).unwrap(),
            budget_mib: *[32, 256].choose(rng).unwrap(),
            // Without a rest, its threads leave the disk's no time.
            rest_us: *[200, 1_000].choose(rng).unwrap(),
            ..Life::default()
        };
        let loss = lose(&mut torment, found, life, life.sync_ms, true);
        let Loss { verdict, oldest_ms: lost_ms, may_lose_ms, .. } = &loss;
        assert!(verdict.wrong.is_empty(), "round {round}, {life:?}: {:?}", verdict.wrong);
        let overtaken = &verdict.overtaken;
        assert!(overtaken.is_empty(), "round {round}, {life:?}: missing, and later ones are there: {overtaken:?}");
        assert!(lost_ms <= may_lose_ms, "round {round}, {life:?}: lost after {lost_ms} ms, more than {may_lose_ms}");
        (cuts, in_recovery) = (cuts + loss.cuts, in_recovery + loss.in_recovery);
        (there, missing) = (there + verdict.there, missing + verdict.missing.len());
        at_stake += loss.at_stake;
        oldest_ms = oldest_ms.max(lost_ms.saturating_sub(life.sync_ms));
        found = loss.found;
    }
    let acknowledged = there + missing;
    eprintln!(
        "Process: {cuts} power cuts, {in_recovery} of them in a recovery, {acknowledged} completions acknowledged; \
         {missing} were lost, all of them the last, the oldest {oldest_ms} ms more than the interval before the cut"
    );
    assert!(at_stake as u64 > 10 * rounds(), "too little was at stake: {at_stake}");
}

/// A life in which nothing reaches the disk but by chance: no syncs, and no seals, which sync what was completed before
/// them.
fn without_syncs() -> Life {
    Life {
        durability: Durability::Process,
        flush_ms: 60_000,
        pace: 1,
        budget_mib: 2_048,
        rest_us: 300,
        ..Life::default()
    }
}

#[test]
fn without_syncs_the_same_test_finds_losses() {
    let Some(disk) = disk() else { return };
    let path = disk.root().join("store");
    let mut torment = Torment::new(&disk, &path);
    let mut oracle = Oracle::new();
    let said = torment.cut_at_work(without_syncs(), oracle.clock_ms, 300..400);
    oracle.hear_all(&said.lines, said.certain);
    let acknowledged = oracle.acknowledged as usize;
    let missing = match open(&path, &ManualClock::at(Timestamp::from_unix_ms(oracle.clock_ms)), Durability::Process) {
        Ok(store) => oracle.missing(&store),
        // Not even the store is there.
        Err(_) => acknowledged,
    };
    eprintln!("without syncs, {missing} of {acknowledged} completions were lost");
    assert!(missing > 0, "the test cannot see a loss");
}

#[test]
fn without_syncs_a_power_cut_takes_more_than_the_last_interval() {
    let Some(disk) = disk() else { return };
    for number in 0..20 {
        let path = disk.root().join(format!("store-{number}"));
        let loss = lose(&mut Torment::new(&disk, &path), Found::nothing(), without_syncs(), 50, false);
        eprintln!("without syncs, lost after {} ms, where {} are allowed", loss.oldest_ms, loss.may_lose_ms);
        if loss.oldest_ms > loss.may_lose_ms {
            return;
        }
    }
    panic!("the test cannot see a loss, or the disk is too slow to tell");
}
