//! The power is cut: ext4 on a loop device, shut down without flushing its journal, as a machine that goes dark leaves
//! it. What was acknowledged under `Disk` must be there; with syncs left out the same test must find losses, or it could
//! not see one.
//!
//! Needs root, loop devices, mkfs.ext4 and python3 (for one ioctl), and skips, aloud, where they are missing;
//! `ONLYONCE_REQUIRE_POWER_LOSS` makes that a failure. `ONLYONCE_POWER_ROUNDS` (default 10) and `ONLYONCE_POWER_SEED`
//! (default: drawn, and printed) set how often and how.

#[path = "common/torture.rs"]
mod torture;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use onlyonce::{Durability, ManualClock};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tempfile::TempDir;
use torture::{Oracle, number, open, spawn};

/// The process whose power is cut. Run by the tests below, never by itself.
#[test]
#[ignore = "run by the tests that cut its power"]
fn child() {
    torture::child();
}

/// EXT4_IOC_SHUTDOWN with EXT4_GOING_FLAGS_NOLOGFLUSH: from here on nothing reaches the device.
const SHUTDOWN: &str = "import fcntl, os, struct, sys; \
    fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), 0x8004587d, struct.pack('I', 2))";

/// A file system in a file, unmounted at the end.
struct Disk {
    dir: TempDir,
}

fn runs(program: &str, args: &[&str]) -> bool {
    Command::new(program).args(args).stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|s| s.success())
}

impl Disk {
    /// `None` where this machine cannot do it.
    fn new() -> Option<Self> {
        let disk = Self { dir: tempfile::tempdir().unwrap() };
        let image = std::fs::File::create(disk.image()).unwrap();
        image.set_len(512 << 20).unwrap();
        std::fs::create_dir(disk.root()).unwrap();
        let image = disk.image();
        (runs("mkfs.ext4", &["-q", "-F", image.to_str()?]) && disk.mount(5) && runs("python3", &["-c", "pass"]))
            .then_some(disk)
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    /// `commit_s`: how often the file system commits its journal by itself.
    fn mount(&self, commit_s: u32) -> bool {
        let (image, root) = (self.image(), self.root());
        let options = format!("loop,commit={commit_s}");
        runs("mount", &["-o", &options, image.to_str().unwrap(), root.to_str().unwrap()])
    }

    fn unmount(&self) -> bool {
        // The killed child's files may be open for a moment more.
        (0..500).any(|_| {
            runs("umount", &[self.root().to_str().unwrap()]) || {
                std::thread::sleep(Duration::from_millis(10));
                false
            }
        })
    }

    fn cut(&self) {
        assert!(runs("python3", &["-c", SHUTDOWN, self.root().to_str().unwrap()]), "the power cannot be cut");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        runs("umount", &[self.root().to_str().unwrap()]);
    }
}

/// A disk; or none, said aloud.
fn disk() -> Option<Disk> {
    let disk = Disk::new();
    if disk.is_none() {
        let why = "needs root, loop devices, mkfs.ext4 and python3";
        assert!(std::env::var_os("ONLYONCE_REQUIRE_POWER_LOSS").is_none(), "the power-loss tests are required: {why}");
        eprintln!("SKIPPED: {why}");
    }
    disk
}

/// Lets a child work, cuts its power, and gives what it had said. Some cuts come while it recovers from the last one.
fn round(disk: &Disk, store: &Path, durability: Durability, oracle: &mut Oracle, rng: &mut StdRng, round: u64) {
    let (mut child, listener) = spawn(store, durability, oracle, rng.random(), round);
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
        round(&disk, &path, Durability::Disk, &mut oracle, &mut rng, number);
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
        round(&disk, &path, Durability::Process, &mut oracle, &mut rng, number);
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
