//! SIGKILL at random moments, repeatedly, on one store. The store must agree with the reports of each killed child.
//! `ONLYONCE_KILL_ROUNDS` (default: 50) sets the kills, and `ONLYONCE_KILL_SEED` (default: random, and printed) the seed.

#[path = "common/torture.rs"]
mod torture;

use std::process::Stdio;
use std::time::Duration;

use onlyonce::{Durability, ManualClock, Timestamp};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use torture::{ChildOptions, Oracle, REOPENS, command, number, open, start};

/// The process that is killed. Only the test below runs it.
#[test]
#[ignore = "run by the test that kills it"]
fn child() {
    torture::child();
}

#[test]
fn acknowledged_completions_survive_sigkill_and_other_keys_are_no_duplicates() {
    let rounds = number("ONLYONCE_KILL_ROUNDS").unwrap_or(50);
    let seed = number("ONLYONCE_KILL_SEED").unwrap_or_else(|| rand::rng().random());
    eprintln!("ONLYONCE_KILL_SEED={seed} ONLYONCE_KILL_ROUNDS={rounds}");
    let mut rng = StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let mut oracle = Oracle::new();
    let options = ChildOptions { durability: Durability::Process, ..ChildOptions::default() };
    for round in 0..rounds {
        let mut command = command(&path, options, oracle.clock_ms, rng.random(), round);
        command.stderr(Stdio::inherit());
        if rng.random_bool(0.5) {
            command.env(REOPENS, "1");
        }
        let (mut child, listener) = start(&mut command, || 0);
        // Some are killed during the open, most during the work, some during the close.
        if rng.random_bool(0.75) {
            listener.wait_for(2);
        }
        std::thread::sleep(Duration::from_millis(rng.random_range(3..250)));
        assert!(child.try_wait().unwrap().is_none(), "the child ended by itself, in round {round} of seed {seed}");
        child.kill().unwrap();
        child.wait().unwrap();
        // A line that arrives after the kill was reported before it.
        oracle.apply_all(&listener.all(), usize::MAX);
        let clock = ManualClock::at(Timestamp::from_unix_ms(oracle.clock_ms));
        let store = open(&path, &clock, Durability::Process)
            .unwrap_or_else(|error| panic!("round {round} of seed {seed}: {error}"));
        oracle.check(&store);
        if rng.random_bool(0.5) {
            store.close().wait().unwrap();
        }
    }
    let Oracle { opened, acknowledged, .. } = oracle;
    eprintln!("{rounds} kills, {opened} of them with an open store, {acknowledged} completions acknowledged");
    assert!(opened * 2 > rounds, "too few children had opened their store when they were killed");
    assert!(acknowledged > 25 * rounds, "too few completions were acknowledged");
}
