//! The power is cut, and the disk has kept what it liked of all that it had not been told to flush: some writes, not
//! others, and halves of some. A process works on a store on a disk that records what comes to it; afterwards the record is
//! played up to random places, and the store opened on what is left. Under `Disk`, all that was acknowledged before such a
//! place must be there; under `Process`, all of it but the last. Nothing may be invented, and nothing is corrupt: it is a power
//! cut, and no damage.
//!
//! The disk is a FUSE file system with one file, under a loop device: the kernel hands on each write and each flush as it
//! comes, and nothing is needed but root, loop devices, /dev/fuse and mkfs.ext4. (A network block device would need a
//! module that many kernels lack, as `dm-log-writes` does, and the recorder of qemu a server beside the test.) Where
//! they are missing, it skips, aloud; `ONLYONCE_REQUIRE_POWER_LOSS` makes that a failure. `ONLYONCE_TORN_REPLAYS` (default
//! 20, in each durability) and `ONLYONCE_TORN_SEED` (default: drawn, and printed) set how often and how.
#![cfg(target_os = "linux")]

#[path = "common/chronicle.rs"]
mod chronicle;
#[path = "common/disk.rs"]
mod disk;
#[path = "common/tape.rs"]
mod tape;
#[path = "common/torture.rs"]
mod torture;

use std::time::Duration;

use chronicle::{Chronicle, Found, Verdict};
use disk::Disk;
use onlyonce::{Durability, ManualClock, Timestamp};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use tape::{Event, Player, Recording, TapedDisk};
use torture::{Life, number, open, spawn_at};

const DISK_MIB: usize = 128;
/// Cuts of one recording.
const CUTS: u64 = 25;

/// The process that is recorded. Run by the tests below, never by itself.
#[test]
#[ignore = "run by the tests that record it"]
fn child() {
    torture::child();
}

/// Records some lives of one store, each of them killed, so that the next one recovers.
fn record(life: Life, lives: u64, rng: &mut StdRng) -> Option<(Recording, Chronicle)> {
    let taped = TapedDisk::new(DISK_MIB, rng.random_range(1..30));
    if taped.is_none() {
        let why = "needs root, loop devices, /dev/fuse and mkfs.ext4";
        assert!(std::env::var_os("ONLYONCE_REQUIRE_POWER_LOSS").is_none(), "tests with disks are required: {why}");
        eprintln!("SKIPPED: {why}");
    }
    let disk = taped?;
    let mut chronicle = Chronicle::after(Found::nothing());
    for number in 0..lives {
        let clock_ms = chronicle.latest(|_| true).0;
        let store = disk.root().join("store");
        let (mut child, listener) = spawn_at(&store, life, clock_ms, rng.random(), number, disk.clock());
        listener.wait_for(2);
        std::thread::sleep(Duration::from_millis(rng.random_range(100..500)));
        child.kill().unwrap();
        child.wait().unwrap();
        chronicle.add(listener.all());
    }
    Some((disk.eject(), chronicle))
}

/// How the store came out of one cut.
struct Replay {
    verdict: Verdict,
    /// Of what is missing, the acknowledgements that had arrived before the cut.
    lost: usize,
    acknowledged: usize,
    torn: usize,
    dropped: usize,
}

fn replay(player: &mut Player<'_>, chronicle: &Chronicle, cut: u64, rng: &mut StdRng) -> Result<Replay, String> {
    let remains = player.cut(cut as usize, rng);
    let disk = Disk::holding(&remains.image).ok_or("the file system does not come back")?;
    // An acknowledgement that arrived when so much had come to the disk was given before the cut.
    let (clock_ms, token) = chronicle.latest(|line| line.at <= cut);
    let path = disk.root().join("store");
    let acknowledged = chronicle.acknowledged(|line| line.at <= cut);
    let store = match open(&path, &ManualClock::at(Timestamp::from_unix_ms(clock_ms)), Durability::Disk) {
        Ok(store) => store,
        Err(error) => return Err(format!("{acknowledged} acknowledged, and it does not open: {error}")),
    };
    let found = chronicle.find(&store);
    let verdict = chronicle.judge(&found, token);
    drop(store);
    let lost = verdict.missing.iter().filter(|line| chronicle.lines[**line].at <= cut).count();
    Ok(Replay { verdict, lost, acknowledged, torn: remains.torn, dropped: remains.lost })
}

fn seed() -> u64 {
    let seed = number("ONLYONCE_TORN_SEED").unwrap_or_else(|| rand::rng().random());
    eprintln!("ONLYONCE_TORN_SEED={seed}");
    seed
}

/// The places of the cuts, in their order: anywhere, and as often before a flush, where the most is open.
fn places(recording: &Recording, count: u64, rng: &mut StdRng) -> Vec<u64> {
    let is_flush = |place: usize| matches!(recording.events.get(place), Some(Event::Flush));
    let end = recording.events.len();
    let mut cuts: Vec<u64> = (0..count)
        .map(|_| {
            let place = rng.random_range(0..=end);
            let flush = (place..end).find(|place| is_flush(*place)).filter(|_| rng.random_bool(0.5));
            flush.unwrap_or(place) as u64
        })
        .collect();
    cuts.sort_unstable();
    cuts
}

/// Records and replays until it is enough, and gives every replay to `check`.
fn replays(durability: Durability, check: impl Fn(&Replay, &str)) {
    let mut rng = StdRng::seed_from_u64(seed());
    let replays = number("ONLYONCE_TORN_REPLAYS").unwrap_or(20);
    let (mut done, mut acknowledged, mut torn, mut dropped, mut at_stake) = (0, 0, 0, 0, 0);
    while done < replays {
        let (flush_ms, sync_ms) = (*[5, 20, 100, 60_000].choose(&mut rng).unwrap(), rng.random_range(5..100));
        let life = Life { durability, flush_ms, sync_ms, ..Life::default() };
        let Some((recording, chronicle)) = record(life, 2, &mut rng) else { return };
        let mut player = Player::new(&recording);
        for cut in places(&recording, CUTS.min(replays - done), &mut rng) {
            let end = recording.events.len();
            let what = format!("replay {done}, a seal every {flush_ms} ms, cut at {cut} of {end}");
            let replay = replay(&mut player, &chronicle, cut, &mut rng);
            done += 1;
            let replay = replay.unwrap_or_else(|error| panic!("{what}: {error}"));
            assert!(replay.verdict.wrong.is_empty(), "{what}: {:?}", replay.verdict.wrong);
            check(&replay, &what);
            acknowledged += replay.acknowledged;
            torn += replay.torn;
            dropped += replay.dropped;
            at_stake += u64::from(replay.acknowledged > 0);
        }
    }
    eprintln!(
        "{durability:?}: {replays} replays, {at_stake} with something at stake, {acknowledged} acknowledged completions, \
         {torn} writes torn, {dropped} left out"
    );
    assert!(at_stake > 0 && torn > 0 && dropped > 0, "too little was at stake");
}

#[test]
fn what_was_acknowledged_on_disk_survives_torn_and_reordered_writes() {
    replays(Durability::Disk, |replay, what| {
        assert_eq!(replay.lost, 0, "{what}: of {} acknowledged completions", replay.acknowledged);
    });
}

#[test]
fn under_process_torn_and_reordered_writes_take_the_last_and_nothing_before() {
    replays(Durability::Process, |replay, what| {
        let overtaken = &replay.verdict.overtaken;
        assert!(overtaken.is_empty(), "{what}: missing, and later ones are there: {overtaken:?}");
    });
}

#[test]
fn without_syncs_torn_and_reordered_writes_lose_what_was_acknowledged() {
    let mut rng = StdRng::seed_from_u64(seed());
    let life = Life { durability: Durability::Process, flush_ms: 60_000, pace: 1, rest_us: 300, ..Life::default() };
    let Some((recording, chronicle)) = record(life, 1, &mut rng) else { return };
    let mut player = Player::new(&recording);
    let end = recording.events.len() as u64;
    let (lost, acknowledged) = match replay(&mut player, &chronicle, end, &mut rng) {
        Ok(replay) => (replay.lost, replay.acknowledged),
        // Not even the store is there.
        Err(_) => (1, 1),
    };
    eprintln!("without syncs, {lost} of {acknowledged} acknowledged completions were lost");
    assert!(lost > 0, "the test cannot see a loss");
}
