//! SIGKILL at random moments, over and over, on one store. The pipe is the oracle: what a child had said before it
//! died must hold afterwards.
//!
//! A child works on the store with several threads, while others seal it and move its clock a hundred times as fast as
//! real time, so that buckets come and go all the while. The parent kills it, opens the store, and checks G1 to G4 for
//! every key it has ever heard of. `ONLYONCE_KILL_ROUNDS` (default 50) and `ONLYONCE_KILL_SEED` (default: printed)
//! set how often and how.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use onlyonce::{Check, Claim, Durability, ManualClock, Prior, Recorded, Store};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const WINDOW_MS: u64 = 60_000;
const BUCKET_MS: u64 = 2_500;
const THREADS: u64 = 4;
const POOL: u64 = 400;
const STORE: &str = "ONLYONCE_KILL_STORE";
const CHILD_SEED: &str = "ONLYONCE_KILL_CHILD_SEED";
const CLOCK: &str = "ONLYONCE_KILL_CLOCK";
const ROUND: &str = "ONLYONCE_KILL_ROUND";

fn open(path: &Path, clock: &ManualClock) -> onlyonce::Result<Store> {
    Store::builder()
        .window(Duration::from_millis(WINDOW_MS))
        .bucket(Duration::from_millis(BUCKET_MS))
        .lease(Duration::from_secs(24 * 60 * 60))
        .durability(Durability::Process)
        .memory_budget(32 << 20)
        .lock_wait(Duration::from_secs(10))
        .clock(clock.clone())
        .open(path)
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is set by the parent"))
}

/// Says something to the parent: whole lines, one write, so that threads do not mix theirs.
fn say(lines: &str) {
    let mut out = std::io::stdout().lock();
    out.write_all(lines.as_bytes()).unwrap();
    out.flush().unwrap();
}

/// The process that is killed. Run by the test below, never by itself.
#[test]
#[ignore = "run by the test that kills it"]
fn child() {
    let clock = ManualClock::at(variable(CLOCK).parse().unwrap());
    let (seed, round): (u64, u64) = (variable(CHILD_SEED).parse().unwrap(), variable(ROUND).parse().unwrap());
    let store = open(Path::new(&variable(STORE)), &clock).unwrap();
    say("\n@open\n");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            loop {
                std::thread::sleep(Duration::from_millis(1));
                clock.advance(Duration::from_millis(100));
            }
        });
        scope.spawn(|| {
            let mut rng = StdRng::seed_from_u64(seed ^ 0x5ea1);
            loop {
                std::thread::sleep(Duration::from_millis(rng.random_range(0..20)));
                store.seal().unwrap();
            }
        });
        scope.spawn(|| watch(&store, &clock, StdRng::seed_from_u64(seed ^ 0x3a7c4)));
        for thread in 0..THREADS {
            let (store, clock) = (&store, &clock);
            scope.spawn(move || work(store, clock, StdRng::seed_from_u64(seed + thread), round * THREADS + thread));
        }
    });
}

fn now_ms(clock: &ManualClock) -> u64 {
    onlyonce::Clock::wall_ms(clock)
}

/// Says of keys that have just been completed that they are: whoever is told so relies on it as much as the one who
/// completed them.
fn watch(store: &Store, clock: &ManualClock, mut rng: StdRng) {
    loop {
        let keys: Vec<String> = (0..100).map(|_| format!("k{}", rng.random_range(0..POOL))).collect();
        let mut said = String::new();
        for (key, check) in keys.iter().zip(store.check_batch(&keys).unwrap()) {
            if let Check::Completed(first) = check.unwrap()
                && first.completed_at_ms() + 1_000 > now_ms(clock)
            {
                let result = String::from_utf8_lossy(first.result().unwrap()).into_owned();
                said.push_str(&format!("@dup {key} {result} {}\n", first.completed_at_ms()));
            }
        }
        say(&said);
        std::thread::yield_now();
    }
}

fn work(store: &Store, clock: &ManualClock, mut rng: StdRng, worker: u64) {
    for step in 0_u64.. {
        if rng.random_bool(0.05) {
            let keys: Vec<String> = (0..rng.random_range(1..30)).map(|i| format!("r{worker}-{step}-{i}")).collect();
            let started = now_ms(clock);
            say(&keys.iter().map(|key| format!("@try {key} -\n")).collect::<String>());
            let recorded = store.record_batch(&keys).unwrap();
            assert!(recorded.into_iter().all(|recorded| matches!(recorded, Ok(Recorded::First))));
            let ended = now_ms(clock);
            say(&keys.iter().map(|key| format!("@done {key} - {started} {ended}\n")).collect::<String>());
            continue;
        }
        let keys: Vec<String> =
            (0..rng.random_range(1..4)).map(|_| format!("k{}", rng.random_range(0..POOL))).collect();
        let mut leases = Vec::new();
        for (key, claimed) in keys.iter().zip(store.claim_batch(&keys).unwrap()) {
            if let Claim::Acquired(lease) = claimed.unwrap() {
                let prior = lease.prior().map_or("none".to_owned(), |prior| format!("{prior:?}"));
                say(&format!("@got {key} {} {prior} {}\n", lease.token(), now_ms(clock)));
                leases.push((key.clone(), lease));
            }
        }
        match rng.random_range(0..10) {
            0 => leases.into_iter().for_each(|(key, lease)| {
                say(&format!("@left {key}\n"));
                drop(lease);
            }),
            1 => leases.into_iter().for_each(|(key, lease)| {
                say(&format!("@left {key}\n"));
                lease.release().unwrap();
            }),
            2 => leases.into_iter().for_each(|(_, lease)| std::mem::forget(lease)),
            _ => {
                let started = now_ms(clock);
                let tried: String =
                    leases.iter().map(|(key, lease)| format!("@try {key} result-{}\n", lease.token())).collect();
                say(&tried);
                let results: Vec<String> =
                    leases.iter().map(|(_, lease)| format!("result-{}", lease.token())).collect();
                let (keys, leases): (Vec<String>, Vec<_>) = leases.into_iter().unzip();
                let completed = store.complete_batch(leases.into_iter().zip(results.clone()));
                assert!(completed.iter().all(Result::is_ok), "{completed:?}");
                let ended = now_ms(clock);
                let done: String = keys
                    .iter()
                    .zip(&results)
                    .map(|(key, result)| format!("@done {key} {result} {started} {ended}\n"))
                    .collect();
                say(&done);
            }
        }
    }
}

/// What the parent knows of a key from what the children said.
#[derive(Debug, Clone, PartialEq)]
enum Said {
    /// Claimed, and not known to be given up.
    Got,
    /// Released, dropped, or found to be neither completed nor claimed.
    Left,
    /// A completion was begun; whether it was written is open.
    Tried { result: String },
    /// Completed between these two times.
    Done { result: String, started_ms: u64, ended_ms: u64 },
}

#[derive(Default)]
struct Oracle {
    said: BTreeMap<String, Said>,
    last_token: u64,
    clock_ms: u64,
}

impl Oracle {
    /// Takes in what one child said, in the order it said it.
    fn hear(&mut self, line: &str) {
        let words: Vec<&str> = line.split(' ').collect();
        match words.as_slice() {
            ["got", key, token, prior, at] => {
                let (token, at_ms): (u64, u64) = (token.parse().unwrap(), at.parse().unwrap());
                match self.said.get(*key) {
                    // The claim was answered before it was said, at `at` or earlier.
                    Some(Said::Done { started_ms, result, .. }) => assert!(
                        at_ms >= started_ms + WINDOW_MS,
                        "G1: {key}, completed at {started_ms} with {result}, was given out again by {at_ms}"
                    ),
                    Some(Said::Got) => panic!("G3: {key} has two holders"),
                    Some(Said::Tried { .. } | Said::Left) | None => {}
                }
                assert_ne!(*prior, "LeaseExpired", "leases last a day");
                self.tokens_seen(token);
                self.clock_ms = self.clock_ms.max(at_ms);
                self.said.insert((*key).to_owned(), Said::Got);
            }
            ["left", key] => {
                self.said.insert((*key).to_owned(), Said::Left);
            }
            ["try", key, result] => {
                self.said.insert((*key).to_owned(), Said::Tried { result: (*result).to_owned() });
            }
            ["done", key, result, started, ended] => {
                let (started_ms, ended_ms) = (started.parse().unwrap(), ended.parse().unwrap());
                self.clock_ms = self.clock_ms.max(ended_ms);
                let done = Said::Done { result: (*result).to_owned(), started_ms, ended_ms };
                self.said.insert((*key).to_owned(), done);
            }
            ["dup", key, result, at] => {
                let at_ms = at.parse().unwrap();
                // It may have been said late, when the key was somebody else's again: then it says nothing.
                if matches!(self.said.get(*key), Some(Said::Tried { result: tried }) if tried == result) {
                    let done = Said::Done { result: (*result).to_owned(), started_ms: at_ms, ended_ms: at_ms };
                    self.said.insert((*key).to_owned(), done);
                }
            }
            _ => panic!("the child said {line:?}"),
        }
    }

    /// Tokens of one child come in any order, for its threads speak when they can. None may be as low as any of the
    /// children before it: checked per round.
    fn tokens_seen(&mut self, token: u64) {
        self.last_token = self.last_token.max(token);
    }

    /// Looks every key up and compares; then what is known is what the store says.
    fn check(&mut self, store: &Store) {
        let now_ms = store.stats().now_ms;
        let keys: Vec<String> = self.said.keys().cloned().collect();
        // The first of them are asked while the filter is being rebuilt, the last by the filter.
        let checks = keys.chunks(1_000).flat_map(|keys| store.check_batch(keys).unwrap());
        let mut passed = Vec::new();
        for (key, check) in keys.iter().cloned().zip(checks) {
            let check = check.unwrap();
            let said = self.said.get_mut(&key).unwrap();
            match (&*said, check) {
                (Said::Done { result, started_ms, ended_ms }, Check::Completed(completed)) => {
                    assert!(now_ms < ended_ms + WINDOW_MS, "G4: {key} is remembered too long");
                    assert!((*started_ms..=*ended_ms).contains(&completed.completed_at_ms()), "G1: {key}");
                    let stored = completed.result().map(|bytes| String::from_utf8_lossy(bytes).into_owned());
                    assert_eq!(stored.as_deref().unwrap_or("-"), result, "G1: {key} has another result");
                }
                (Said::Done { started_ms, .. }, check) => {
                    assert!(now_ms >= started_ms + WINDOW_MS, "G1: {key} was acknowledged: {said:?}, but is {check:?}");
                    passed.push(key);
                }
                (Said::Tried { result }, Check::Completed(completed)) => {
                    // It was written, and only the acknowledgement was lost.
                    let stored = completed.result().map(|bytes| String::from_utf8_lossy(bytes).into_owned());
                    assert_eq!(stored.as_deref().unwrap_or("-"), result, "{key}");
                    let at_ms = completed.completed_at_ms();
                    *said = Said::Done { result: result.clone(), started_ms: at_ms, ended_ms: at_ms };
                }
                (Said::Got | Said::Left, Check::Completed(_)) => panic!("G2: {key} was never completed: {said:?}"),
                (Said::Got | Said::Left | Said::Tried { .. }, Check::New) => *said = Said::Left,
                (_, Check::InProgress(other)) => panic!("G2: {key} is blocked by the dead: {other:?}"),
            }
        }
        for key in passed {
            self.said.remove(&key);
        }
        // A key that was left by the dead is told so, and its token is higher than all before.
        let left = self.said.iter().find(|(_, said)| **said == Said::Left).map(|(key, _)| key.clone());
        if let Some(key) = left {
            let Claim::Acquired(lease) = store.claim(&key).unwrap() else { panic!("G2: {key} can be claimed") };
            assert!(lease.token() > self.last_token, "G3: {} after {}", lease.token(), self.last_token);
            assert_ne!(lease.prior(), Some(Prior::LeaseExpired));
            self.last_token = lease.token();
            lease.release().unwrap();
        }
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().expect(name))
}

#[test]
fn what_was_acknowledged_survives_sigkill_and_what_was_not_is_no_duplicate() {
    let rounds = number("ONLYONCE_KILL_ROUNDS").unwrap_or(50);
    let seed = number("ONLYONCE_KILL_SEED").unwrap_or_else(|| rand::rng().random());
    eprintln!("ONLYONCE_KILL_SEED={seed} ONLYONCE_KILL_ROUNDS={rounds}");
    let mut rng = StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let mut oracle = Oracle { clock_ms: 1_700_000_000_000, ..Oracle::default() };
    let (mut opened, mut acknowledged) = (0, 0);
    for round in 0..rounds {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--ignored", "--nocapture", "--test-threads=1"])
            .env(STORE, &path)
            .env(CLOCK, oracle.clock_ms.to_string())
            .env(CHILD_SEED, rng.random::<u32>().to_string())
            .env(ROUND, round.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = child.stdout.take().unwrap();
        let tokens_before = oracle.last_token;
        // Some die while they open, most while they work.
        let life = Duration::from_millis(rng.random_range(3..300));
        let reader = std::thread::spawn(move || {
            let mut lines = Vec::new();
            let mut out = BufReader::new(out);
            let mut line = String::new();
            while out.read_line(&mut line).unwrap() > 0 {
                // A line without its end was being written when the child died.
                if let Some(line) = line.strip_suffix('\n').and_then(|line| line.strip_prefix('@')) {
                    lines.push(line.to_owned());
                }
                line.clear();
            }
            lines
        });
        let start = Instant::now();
        std::thread::sleep(life);
        assert!(child.try_wait().unwrap().is_none(), "the child ended by itself, in round {round} of seed {seed}");
        child.kill().unwrap();
        child.wait().unwrap();
        let lines = reader.join().unwrap();
        assert!(start.elapsed() < Duration::from_secs(60));
        for line in &lines {
            if line == "open" {
                opened += 1;
                continue;
            }
            if let Some(token) = line.strip_prefix("got ").and_then(|rest| rest.split(' ').nth(1)) {
                let token: u64 = token.parse().unwrap();
                assert!(token > tokens_before, "G3: {token} after {tokens_before}");
            }
            acknowledged += usize::from(line.starts_with("done "));
            oracle.hear(line);
        }
        let clock = ManualClock::at(oracle.clock_ms);
        let store = open(&path, &clock).unwrap_or_else(|error| panic!("round {round} of seed {seed}: {error}"));
        oracle.clock_ms = store.stats().now_ms;
        oracle.check(&store);
        if rng.random_bool(0.5) {
            store.close().unwrap();
        }
    }
    eprintln!("{rounds} kills, {opened} after the store was open, {acknowledged} completions acknowledged");
    assert!(opened * 2 > rounds, "too few children lived long enough to be worth killing");
    assert!(acknowledged > 100 * rounds as usize / 4, "too little was at stake");
}
