//! Torn and reordered writes: after a power cut the disk has some of the writes since its last flush, and parts of
//! others. A process works on a store on a disk that records its writes; then the recording is replayed up to random
//! events, and the store is opened on the result. Under `Disk`, every completion that was acknowledged before that
//! event must be stored; under `Process`, only the most recent ones can be missing. No key may be invented, and no file
//! may count as corrupt.
//!
//! The disk is a FUSE file system with one file, under a loop device, which receives each write and flush in order. It
//! needs only root, loop devices, /dev/fuse and mkfs.ext4. (A network block device and `dm-log-writes` need modules
//! that many kernels lack, and the recorder of qemu needs a server.) Without them the tests print that they are
//! skipped, or fail if `ONLYONCE_REQUIRE_POWER_LOSS` is set. `ONLYONCE_TORN_REPLAYS` (default: 20, in each durability)
//! sets the replays, and `ONLYONCE_TORN_SEED` (default: random, and printed) the seed.
#![cfg(target_os = "linux")]

#[path = "common/disk.rs"]
mod disk;
#[path = "common/run_log.rs"]
mod run_log;
#[path = "common/tape.rs"]
mod tape;
#[path = "common/torture.rs"]
mod torture;

use std::time::Duration;

use disk::Disk;
use onlyonce::{Durability, ManualClock, Timestamp};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use run_log::{Contents, RunLog, Verdict};
use tape::{Event, Player, Recording, TapedDisk};
use torture::{ChildOptions, number, open, spawn_at};

const DISK_MIB: usize = 128;
/// The power cuts per recording.
const CUTS: u64 = 25;

/// The process whose writes are recorded. Only the tests below run it.
#[test]
#[ignore = "run by the tests that record it"]
fn child() {
    torture::child();
}

/// Records several children on one store, each of which is killed, so that the next one recovers.
fn record(options: ChildOptions, children: u64, rng: &mut StdRng) -> Option<(Recording, RunLog)> {
    let taped = TapedDisk::new(DISK_MIB, rng.random_range(1..30));
    if taped.is_none() {
        let why = "needs root, loop devices, /dev/fuse and mkfs.ext4";
        assert!(std::env::var_os("ONLYONCE_REQUIRE_POWER_LOSS").is_none(), "tests with disks are required: {why}");
        eprintln!("SKIPPED: {why}");
    }
    let disk = taped?;
    let mut run_log = RunLog::after(Contents::nothing());
    for number in 0..children {
        let clock_ms = run_log.latest(|_| true).0;
        let store = disk.root().join("store");
        let (mut child, listener) = spawn_at(&store, options, clock_ms, rng.random(), number, disk.clock());
        listener.wait_for(2);
        std::thread::sleep(Duration::from_millis(rng.random_range(100..500)));
        child.kill().unwrap();
        child.wait().unwrap();
        run_log.add(listener.all());
    }
    Some((disk.eject(), run_log))
}

/// The state of the store after one power cut.
struct Replay {
    verdict: Verdict,
    /// The missing completions whose acknowledgement had arrived before the cut.
    lost: usize,
    acknowledged: usize,
    torn: usize,
    dropped: usize,
}

fn replay(player: &mut Player<'_>, run_log: &RunLog, cut: u64, rng: &mut StdRng) -> Result<Replay, String> {
    let remains = player.cut(cut as usize, rng);
    let disk = Disk::holding(&remains.image).ok_or("the file system cannot be mounted")?;
    // The clock counts events: an acknowledgement with at most `cut` events was given before the cut.
    let (clock_ms, token) = run_log.latest(|line| line.at <= cut);
    let path = disk.root().join("store");
    let acknowledged = run_log.acknowledged(|line| line.at <= cut);
    let store = match open(&path, &ManualClock::at(Timestamp::from_unix_ms(clock_ms)), Durability::Disk) {
        Ok(store) => store,
        Err(error) => return Err(format!("{acknowledged} acknowledged, but the store does not open: {error}")),
    };
    let contents = run_log.find(&store);
    let verdict = run_log.judge(&contents, token);
    drop(store);
    let lost = verdict.missing.iter().filter(|line| run_log.lines[**line].at <= cut).count();
    Ok(Replay { verdict, lost, acknowledged, torn: remains.torn, dropped: remains.lost })
}

fn seed() -> u64 {
    let seed = number("ONLYONCE_TORN_SEED").unwrap_or_else(|| rand::rng().random());
    eprintln!("ONLYONCE_TORN_SEED={seed}");
    seed
}

/// The events of the power cuts, in order: half of them random, half of them just before a flush, where most writes are
/// unflushed.
fn random_cuts(recording: &Recording, count: u64, rng: &mut StdRng) -> Vec<u64> {
    let is_flush = |event: usize| matches!(recording.events.get(event), Some(Event::Flush));
    let end = recording.events.len();
    let mut cuts: Vec<u64> = (0..count)
        .map(|_| {
            let event = rng.random_range(0..=end);
            let flush = (event..end).find(|event| is_flush(*event)).filter(|_| rng.random_bool(0.5));
            flush.unwrap_or(event) as u64
        })
        .collect();
    cuts.sort_unstable();
    cuts
}

/// Records and replays the configured number of times, and passes every replay to `check`.
fn replays(durability: Durability, check: impl Fn(&Replay, &str)) {
    let mut rng = StdRng::seed_from_u64(seed());
    let replays = number("ONLYONCE_TORN_REPLAYS").unwrap_or(20);
    let (mut done, mut acknowledged, mut torn, mut dropped, mut at_stake) = (0, 0, 0, 0, 0);
    while done < replays {
        let (flush_ms, sync_ms) = (*[5, 20, 100, 60_000].choose(&mut rng).unwrap(), rng.random_range(5..100));
        let options = ChildOptions { durability, flush_ms, sync_ms, ..ChildOptions::default() };
        let Some((recording, run_log)) = record(options, 2, &mut rng) else { return };
        let mut player = Player::new(&recording);
        for cut in random_cuts(&recording, CUTS.min(replays - done), &mut rng) {
            let end = recording.events.len();
            let what = format!("replay {done}, a flush every {flush_ms} ms, cut at {cut} of {end}");
            let replay = replay(&mut player, &run_log, cut, &mut rng);
            done += 1;
            let replay = replay.unwrap_or_else(|error| panic!("{what}: {error}"));
            assert!(replay.verdict.violations.is_empty(), "{what}: {:?}", replay.verdict.violations);
            check(&replay, &what);
            acknowledged += replay.acknowledged;
            torn += replay.torn;
            dropped += replay.dropped;
            at_stake += u64::from(replay.acknowledged > 0);
        }
    }
    eprintln!(
        "{durability:?}: {replays} replays, {at_stake} with acknowledged completions, {acknowledged} acknowledged completions, \
         {torn} writes torn, {dropped} writes lost"
    );
    assert!(at_stake > 0 && torn > 0 && dropped > 0, "too few completions were acknowledged, or too few writes lost");
}

#[test]
fn acknowledged_completions_survive_torn_and_reordered_writes_under_disk() {
    replays(Durability::Disk, |replay, what| {
        assert_eq!(replay.lost, 0, "{what}: of {} acknowledged completions", replay.acknowledged);
    });
}

#[test]
fn under_process_torn_and_reordered_writes_lose_only_the_most_recent_completions() {
    replays(Durability::Process, |replay, what| {
        let gaps = &replay.verdict.gaps;
        assert!(gaps.is_empty(), "{what}: missing, but later ones are stored: {gaps:?}");
    });
}

#[test]
fn without_syncs_torn_and_reordered_writes_lose_acknowledged_completions() {
    let mut rng = StdRng::seed_from_u64(seed());
    let options = ChildOptions {
        durability: Durability::Process,
        flush_ms: 60_000,
        pace: 1,
        rest_us: 300,
        ..ChildOptions::default()
    };
    let Some((recording, run_log)) = record(options, 1, &mut rng) else { return };
    let mut player = Player::new(&recording);
    let end = recording.events.len() as u64;
    let (lost, acknowledged) = match replay(&mut player, &run_log, end, &mut rng) {
        Ok(replay) => (replay.lost, replay.acknowledged),
        // The store itself is lost.
        Err(_) => (1, 1),
    };
    eprintln!("without syncs, {lost} of {acknowledged} acknowledged completions were lost");
    assert!(lost > 0, "the test cannot detect a loss");
}
