//! SIGKILL at random moments, over and over, on one store. The pipe is the oracle: what a child had said before it
//! died must hold afterwards. `ONLYONCE_KILL_ROUNDS` (default 50) and `ONLYONCE_KILL_SEED` (default: drawn, and printed)
//! set how often and how.

#[path = "common/torture.rs"]
mod torture;

use std::process::Stdio;
use std::time::Duration;

use onlyonce::{Durability, ManualClock, Timestamp};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use torture::{Life, Oracle, WHOLE_LIFE, command, number, open, start};

/// The process that is killed. Run by the test below, never by itself.
#[test]
#[ignore = "run by the test that kills it"]
fn child() {
    torture::child();
}

#[test]
fn what_was_acknowledged_survives_sigkill_and_what_was_not_is_no_duplicate() {
    let rounds = number("ONLYONCE_KILL_ROUNDS").unwrap_or(50);
    let seed = number("ONLYONCE_KILL_SEED").unwrap_or_else(|| rand::rng().random());
    eprintln!("ONLYONCE_KILL_SEED={seed} ONLYONCE_KILL_ROUNDS={rounds}");
    let mut rng = StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let mut oracle = Oracle::new();
    let life = Life { durability: Durability::Process, ..Life::default() };
    for round in 0..rounds {
        let mut command = command(&path, life, oracle.clock_ms, rng.random(), round);
        command.stderr(Stdio::inherit());
        if rng.random_bool(0.5) {
            command.env(WHOLE_LIFE, "1");
        }
        let (mut child, listener) = start(&mut command, || 0);
        // Some die while they open, most while they work, some while they close.
        if rng.random_bool(0.75) {
            listener.wait_for(2);
        }
        std::thread::sleep(Duration::from_millis(rng.random_range(3..250)));
        assert!(child.try_wait().unwrap().is_none(), "the child ended by itself, in round {round} of seed {seed}");
        child.kill().unwrap();
        child.wait().unwrap();
        // A line that arrives after the kill was said before it.
        oracle.hear_all(&listener.all(), usize::MAX);
        let clock = ManualClock::at(Timestamp::from_unix_ms(oracle.clock_ms));
        let store = open(&path, &clock, Durability::Process)
            .unwrap_or_else(|error| panic!("round {round} of seed {seed}: {error}"));
        oracle.check(&store);
        if rng.random_bool(0.5) {
            store.close().wait().unwrap();
        }
    }
    let Oracle { opened, acknowledged, .. } = oracle;
    eprintln!("{rounds} kills, {opened} after the store was open, {acknowledged} completions acknowledged");
    assert!(opened * 2 > rounds, "too few children lived long enough to be worth killing");
    assert!(acknowledged > 25 * rounds, "too little was at stake");
}
