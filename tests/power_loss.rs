//! The power is cut: ext4 on a loop device, shut down without flushing its journal, as a machine that goes dark leaves
//! it. What was acknowledged under `Disk` must be there; with syncs left out the same test must find losses, or it could
//! not see one.
//!
//! Needs root, loop devices, mkfs.ext4 and python3 (for one ioctl), and skips, aloud, where they are missing;
//! `ONLYONCE_REQUIRE_POWER_LOSS` makes that a failure. `ONLYONCE_POWER_ROUNDS` (default 10) and `ONLYONCE_POWER_SEED`
//! (default: drawn, and printed) set how often and how.

#[path = "common/disk.rs"]
mod disk;
#[path = "common/torture.rs"]
mod torture;

use std::path::Path;
use std::time::Duration;

use disk::Disk;
use onlyonce::{Durability, ManualClock};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use torture::{Life, Oracle, number, open, spawn};

/// The process whose power is cut. Run by the tests below, never by itself.
#[test]
#[ignore = "run by the tests that cut its power"]
fn child() {
    torture::child();
}

fn disk() -> Option<Disk> {
    disk::or_skip(Disk::new(512))
}

/// Lets a child work, cuts its power, and gives what it had said. Some cuts come while it recovers from the last one.
fn round(disk: &Disk, store: &Path, life: Life, oracle: &mut Oracle, rng: &mut StdRng, round: u64) {
    let (mut child, listener) = spawn(store, life, oracle, rng.random(), round);
    std::thread::sleep(Duration::from_millis(rng.random_range(10..400)));
    // What arrives after the cut may be void: a sync that is under way in that moment can come back as if it had worked.
    // From a machine that goes dark nothing arrives.
    let certain = listener.so_far();
    disk.cut();
    // Its writes fail now, so that it may have ended by itself.
    let _ = child.kill();
    child.wait().unwrap();
    oracle.hear_all(&listener.all(), certain);
    assert!(disk.unmount() && disk.mount(rng.random_range(1..30)), "the disk does not come back");
}

fn seed() -> u64 {
    let seed = number("ONLYONCE_POWER_SEED").unwrap_or_else(|| rand::rng().random());
    eprintln!("ONLYONCE_POWER_SEED={seed}");
    seed
}

#[test]
fn what_was_acknowledged_on_disk_survives_a_power_cut() {
    let Some(disk) = disk() else { return };
    let mut rng = StdRng::seed_from_u64(seed());
    let rounds = number("ONLYONCE_POWER_ROUNDS").unwrap_or(10);
    let path = disk.root().join("store");
    let mut oracle = Oracle::new();
    for number in 0..rounds {
        round(&disk, &path, Life { durability: Durability::Disk, seal_ms: 20 }, &mut oracle, &mut rng, number);
        let clock = ManualClock::at(oracle.clock_ms);
        let store = open(&path, &clock, Durability::Disk).unwrap_or_else(|error| panic!("round {number}: {error}"));
        oracle.check(&store);
        drop(store);
    }
    let Oracle { opened, acknowledged, .. } = oracle;
    eprintln!("{rounds} power cuts, {opened} after the store was open, {acknowledged} completions acknowledged");
    assert!(acknowledged > 10 * rounds, "too little was at stake");
}

#[test]
fn without_syncs_the_same_test_finds_losses() {
    let Some(disk) = disk() else { return };
    let mut rng = StdRng::seed_from_u64(seed());
    for number in 0..20 {
        let path = disk.root().join(format!("store-{number}"));
        let mut oracle = Oracle::new();
        // A seal puts what was completed before it on the disk: here there is none.
        let life = Life { durability: Durability::Process, seal_ms: 60_000 };
        round(&disk, &path, life, &mut oracle, &mut rng, number);
        let clock = ManualClock::at(oracle.clock_ms);
        let missing = match open(&path, &clock, Durability::Process) {
            Ok(store) => oracle.missing(&store),
            // Not even the store is there.
            Err(_) => 1,
        };
        if oracle.acknowledged > 0 && missing > 0 {
            eprintln!("{missing} of {} acknowledged completions lost in round {number}", oracle.acknowledged);
            return;
        }
    }
    panic!("twenty power cuts without a sync lost nothing: the test cannot see a loss");
}
