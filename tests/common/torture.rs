//! A process that is made to die, and the oracle that knows what it had said.
//!
//! The child works on a store with several threads, while others seal it and move its clock many times as fast as real
//! time, so that buckets come and go all the while. It says what it does, before and after, in lines on a pipe. Whoever
//! made it die opens the store and checks G1 to G4 for every key it has ever heard of.

#![allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use onlyonce::{
    Builder, Claim, Completed, Completion, Durability, Key, KeyStatus, Lease, ManualClock, PriorAttempt, RecordOutcome,
    Store, Timestamp,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

pub const WINDOW_MS: u64 = 60_000;
const BUCKET_MS: u64 = 2_500;
const THREADS: u64 = 4;
const POOL: u64 = 400;
/// So many of its own keys a thread knows that the oldest of them are about to run out.
const OWN: usize = 60;
const STORE: &str = "ONLYONCE_KILL_STORE";
const CHILD_SEED: &str = "ONLYONCE_KILL_CHILD_SEED";
const CLOCK: &str = "ONLYONCE_KILL_CLOCK";
const ROUND: &str = "ONLYONCE_KILL_ROUND";
const DURABILITY: &str = "ONLYONCE_KILL_DURABILITY";
const FLUSH_MS: &str = "ONLYONCE_KILL_FLUSH_MS";
const SYNC_MS: &str = "ONLYONCE_KILL_SYNC_MS";
const PACE: &str = "ONLYONCE_KILL_PACE";
const BUDGET: &str = "ONLYONCE_KILL_BUDGET";
const REST_US: &str = "ONLYONCE_KILL_REST_US";
const PULSE: &str = "ONLYONCE_KILL_PULSE";
/// Where it is set, a child also forgets keys, and closes its store and opens it again.
pub const WHOLE_LIFE: &str = "ONLYONCE_KILL_WHOLE_LIFE";

/// Longer than any life: what is not synced by its own call is not synced.
const NEVER_MS: u64 = 3_600_000;

/// So many keys an oracle asks for until it lets go of those that were left for good.
const KNOWN: usize = 20_000;

fn durability(name: &str) -> Durability {
    if name == "Disk" { Durability::Disk } else { Durability::Process }
}

/// What a child does.
#[derive(Debug, Clone, Copy)]
pub struct Life {
    pub durability: Durability,
    /// It seals after so long at most.
    pub flush_ms: u64,
    /// Under [`Durability::Process`] it syncs so often.
    pub sync_ms: u64,
    /// How many times as fast as real time its clock goes.
    pub pace: u64,
    /// The store's memory. The less, the more it seals by itself.
    pub budget_mib: usize,
    /// How long its threads rest between two calls.
    pub rest_us: u64,
    /// Whether it says how quick its disk is.
    pub pulse: bool,
}

impl Default for Life {
    fn default() -> Self {
        Self {
            durability: Durability::Disk,
            flush_ms: 20,
            sync_ms: NEVER_MS,
            pace: 100,
            budget_mib: 32,
            rest_us: 0,
            pulse: false,
        }
    }
}

/// What a child said, and what the listener's clock showed when it arrived.
#[derive(Debug, Clone)]
pub struct Line {
    pub text: String,
    pub at: u64,
}

/// Starts the test executable's own `child`.
pub fn spawn(path: &Path, life: Life, oracle: &Oracle, seed: u32, round: u64) -> (Child, Listener) {
    spawn_at(path, life, oracle.clock_ms, seed, round, || 0)
}

/// The same, with the store's time to begin with and a clock for the lines as they arrive.
pub fn spawn_at(
    path: &Path,
    life: Life,
    clock_ms: u64,
    seed: u32,
    round: u64,
    listeners_clock: impl Fn() -> u64 + Send + 'static,
) -> (Child, Listener) {
    start(&mut command(path, life, clock_ms, seed, round), listeners_clock)
}

/// What is started there.
pub fn command(path: &Path, life: Life, clock_ms: u64, seed: u32, round: u64) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "child", "--ignored", "--nocapture", "--test-threads=1"])
        .env(STORE, path)
        .env(DURABILITY, format!("{:?}", life.durability))
        .env(FLUSH_MS, life.flush_ms.to_string())
        .env(SYNC_MS, life.sync_ms.to_string())
        .env(PACE, life.pace.to_string())
        .env(BUDGET, life.budget_mib.to_string())
        .env(REST_US, life.rest_us.to_string())
        .env(PULSE, life.pulse.to_string())
        .env(CLOCK, clock_ms.to_string())
        .env(CHILD_SEED, seed.to_string())
        .env(ROUND, round.to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    command
}

/// Starts a child, with a clock for the lines as they arrive.
pub fn start(command: &mut Command, listeners_clock: impl Fn() -> u64 + Send + 'static) -> (Child, Listener) {
    let mut child = command.spawn().unwrap();
    let out = child.stdout.take().unwrap();
    let heard = Arc::new(Mutex::new(Vec::new()));
    let lines = Arc::clone(&heard);
    let thread = std::thread::spawn(move || {
        let mut out = BufReader::new(out);
        let mut line = String::new();
        while out.read_line(&mut line).unwrap() > 0 {
            // A line without its end was being written when the child died.
            if let Some(text) = line.strip_suffix('\n').and_then(|line| line.strip_prefix('@')) {
                let line = Line { text: text.to_owned(), at: listeners_clock() };
                lines.lock().unwrap().push(line);
            }
            line.clear();
        }
    });
    (child, Listener { heard, thread })
}

/// Hears what a child says.
pub struct Listener {
    heard: Arc<Mutex<Vec<Line>>>,
    thread: JoinHandle<()>,
}

impl Listener {
    /// How many lines have arrived.
    pub fn so_far(&self) -> usize {
        self.heard.lock().unwrap().len()
    }

    /// Waits until so many have arrived; or the child has said its last.
    pub fn wait_for(&self, lines: usize) {
        while self.so_far() < lines && !self.thread.is_finished() {
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// Everything, when the child has said its last.
    pub fn all(self) -> Vec<Line> {
        self.thread.join().unwrap();
        std::mem::take(&mut self.heard.lock().unwrap())
    }
}

pub fn open(path: &Path, clock: &ManualClock, durability: Durability) -> onlyonce::Result<Store> {
    builder(clock, durability).open(path)
}

fn builder(clock: &ManualClock, durability: Durability) -> Builder {
    Store::builder()
        .window(Duration::from_millis(WINDOW_MS))
        .bucket(Duration::from_millis(BUCKET_MS))
        .lease(Duration::from_secs(24 * 60 * 60))
        .durability(durability)
        .sync_interval(Duration::from_millis(NEVER_MS))
        .memory_budget(32 << 20)
        .lock_wait(Duration::from_secs(10))
        .clock(clock.clone())
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is set by the parent"))
}

/// Lets others run.
fn rest() {
    match variable(REST_US).parse().unwrap() {
        0 => std::thread::yield_now(),
        rest_us => std::thread::sleep(Duration::from_micros(rest_us)),
    }
}

/// Says something to the parent: whole lines, one write, so that threads do not mix theirs.
fn say(lines: &str) {
    let mut out = std::io::stdout().lock();
    out.write_all(lines.as_bytes()).unwrap();
    out.flush().unwrap();
}

/// From now on a panic in any thread ends the process: else the others would go on, and nobody would hear of it.
pub fn end_at_panic() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tell(panic);
        std::process::abort();
    }));
}

/// What the process does that is to die.
pub fn child() {
    end_at_panic();
    let clock = ManualClock::at(Timestamp::from_unix_ms(variable(CLOCK).parse().unwrap()));
    let (seed, round): (u64, u64) = (variable(CHILD_SEED).parse().unwrap(), variable(ROUND).parse().unwrap());
    let flush_ms: u64 = variable(FLUSH_MS).parse().unwrap();
    let pace = Duration::from_millis(variable(PACE).parse().unwrap());
    let whole = std::env::var_os(WHOLE_LIFE).is_some();
    for opening in 0.. {
        let builder = builder(&clock, durability(&variable(DURABILITY)))
            .sync_interval(Duration::from_millis(variable(SYNC_MS).parse().unwrap()))
            .memory_budget(variable(BUDGET).parse::<usize>().unwrap() << 20);
        say("\n@opening\n");
        let store = builder.open(variable(STORE)).unwrap();
        // Somebody may have died here whose last words did not count, and the store knows their time.
        // The listener knows nothing of the store's time: it goes by the wall clock, which must not be tolerated beside it.
        clock.set_wall(Timestamp::from_unix_ms(store.stats().now.as_unix_ms()));
        say("@open\n");
        let seed = seed + opening;
        let stage = &Stage {
            store: &store,
            clock: &clock,
            whole,
            standing_still: Mutex::new(()),
            over: AtomicBool::new(false),
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stage.is_over() {
                    std::thread::sleep(Duration::from_millis(1));
                    let _standing_still = stage.standing_still.lock().unwrap();
                    clock.advance(pace);
                }
            });
            if variable(PULSE) == "true" {
                scope.spawn(|| pulse(&Path::new(&variable(STORE)).with_extension("pulse")));
            }
            scope.spawn(|| {
                let mut rng = StdRng::seed_from_u64(seed ^ 0x5ea1);
                while !stage.is_over() {
                    std::thread::sleep(Duration::from_millis(rng.random_range(0..flush_ms)));
                    store.flush().unwrap();
                }
            });
            scope.spawn(|| watch(stage, StdRng::seed_from_u64(seed ^ 0x3a7c4)));
            for thread in 0..THREADS {
                let worker = format!("{}-{opening}", round * THREADS + thread);
                scope.spawn(move || work(stage, StdRng::seed_from_u64(seed + thread), &worker));
            }
            if whole {
                let lasts = StdRng::seed_from_u64(seed ^ 0xc105e).random_range(100..1_500);
                std::thread::sleep(Duration::from_millis(lasts));
                stage.over.store(true, Ordering::Relaxed);
            }
        });
        store.close().wait().unwrap();
    }
}

/// Says after every turn of the disk that it has turned: one block of a file of its own, written where it lies, so that
/// nothing of the store's goes to the disk with it.
fn pulse(path: &Path) {
    let block = [1; 4_096];
    let file = File::create(path).unwrap();
    file.write_all_at(&block, 0).unwrap();
    file.sync_all().unwrap();
    while file.write_all_at(&block, 0).and_then(|()| file.sync_data()).is_ok() {
        say("@pulse\n");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Where the threads of a child work, between an opening and a closing.
struct Stage<'a> {
    store: &'a Store,
    clock: &'a ManualClock,
    whole: bool,
    /// While it is locked, time stands still.
    standing_still: Mutex<()>,
    over: AtomicBool,
}

impl Stage<'_> {
    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    fn now_ms(&self) -> u64 {
        onlyonce::Clock::wall(self.clock).as_unix_ms()
    }

    /// A claim of one key, said where it was given.
    fn acquire(&self, key: &str) -> Option<Lease> {
        let Claim::Acquired(lease) = self.store.claim(with_window(key)).wait().unwrap() else { return None };
        self.say_got(key, &lease);
        Some(lease)
    }

    fn say_got(&self, key: &str, lease: &Lease) {
        let prior = lease.attempt().prior().map_or("none".to_owned(), |prior| format!("{prior:?}"));
        say(&format!("@got {key} {} {prior} {}\n", lease.token().get(), self.now_ms()));
    }

    /// Completes leases of these keys with padded results, and says so before and after. One alone takes a message and an
    /// offset along.
    fn complete(&self, leases: Vec<(String, Lease)>, padding: usize) {
        let started = self.now_ms();
        let tried: String =
            leases.iter().map(|(key, lease)| format!("@try {key} result-{}\n", lease.token().get())).collect();
        say(&tried);
        let results: Vec<String> = leases.iter().map(|(_, lease)| format!("result-{}", lease.token().get())).collect();
        let (keys, mut leases): (Vec<String>, Vec<_>) = leases.into_iter().unzip();
        let completed = if let (1, [key], [result]) = (leases.len(), &keys[..], &results[..]) {
            let lease = leases.remove(0);
            let token = lease.token().get();
            let padded = format!("{result}{}{WITH_MORE}", ".".repeat(padding));
            let completion = Completion::new(padded).offset(key.as_str(), 0, token).message(
                "torture",
                key.as_str(),
                result.as_str(),
            );
            vec![lease.complete(completion).wait()]
        } else {
            let padded = results.iter().map(|result| format!("{result}{}", ".".repeat(padding)));
            self.store.complete_batch(leases.into_iter().zip(padded)).wait()
        };
        assert!(completed.iter().all(Result::is_ok), "{completed:?}");
        let ended = self.now_ms();
        let done = keys.iter().zip(&results);
        say(&done.map(|(key, result)| format!("@done {key} {result} {started} {ended}\n")).collect::<String>());
    }

    /// Forgets a key that is completed, if it is anything, and that nobody completes meanwhile.
    fn forget(&self, key: &str) {
        say(&format!("@forget {key}\n"));
        self.store.forget(key).wait().unwrap();
        say(&format!("@forgot {key}\n"));
    }
}

/// Ends a result that came with an offset and a message.
const WITH_MORE: char = '+';

/// What a child calls a result: without its padding, and `-` where there is none.
pub fn name(result: Option<&[u8]>) -> String {
    result.map_or("-".to_owned(), |bytes| String::from_utf8_lossy(bytes).trim_end_matches(['.', WITH_MORE]).to_owned())
}

/// The messages of a store's outbox: a key, and what it was completed with.
pub type Messages = BTreeSet<(String, String)>;

pub fn messages(store: &Store) -> Messages {
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    store
        .outbox(usize::MAX)
        .wait()
        .unwrap()
        .into_iter()
        .map(|message| (text(message.key), text(message.payload)))
        .collect()
}

/// What a completion took along must be there with it.
pub fn has_come_along(store: &Store, messages: &Messages, key: &str, first: &Completed) -> Result<(), String> {
    if first.result().is_none_or(|result| !result.ends_with(&[WITH_MORE as u8])) {
        return Ok(());
    }
    let result = name(first.result());
    if !messages.contains(&(key.to_owned(), result.clone())) {
        return Err(format!("G1: {key} is completed with {result}, and its message is not there"));
    }
    // Under `Disk` each question syncs.
    if first.token().get().is_multiple_of(16) {
        let offset = store.offset(key, 0).wait().unwrap();
        if offset != Some(first.token().get()) {
            return Err(format!("G1: {key} is completed with {result}, and its offset is {offset:?}"));
        }
    }
    Ok(())
}

/// Says of keys that have just been completed that they are: whoever is told so relies on it as much as the one who
/// completed them.
fn watch(stage: &Stage<'_>, mut rng: StdRng) {
    while !stage.is_over() {
        let keys: Vec<String> = (0..100).map(|_| format!("k{}", rng.random_range(0..POOL))).collect();
        let mut said = String::new();
        for (key, check) in keys.iter().zip(stage.store.check_batch(&keys).wait().unwrap()) {
            if let KeyStatus::Completed(first) = check.unwrap()
                && first.completed_at().as_unix_ms() + 1_000 > stage.now_ms()
            {
                let result = name(first.result());
                said.push_str(&format!("@dup {key} {result} {}\n", first.completed_at().as_unix_ms()));
            }
        }
        say(&said);
        rest();
    }
}

fn work(stage: &Stage<'_>, mut rng: StdRng, worker: &str) {
    // Keys that this thread has recorded, and nobody else works on.
    let mut own = VecDeque::new();
    let mut step = 0_u64;
    while !stage.is_over() {
        step += 1;
        rest();
        if stage.whole && rng.random_bool(0.05) {
            if rng.random_bool(0.5) {
                forget_own(stage, &mut rng, &mut own);
            } else {
                forget_fought_over(stage, &mut rng);
            }
            continue;
        }
        if rng.random_bool(0.05) {
            let keys: Vec<String> = (0..rng.random_range(1..30)).map(|i| format!("r{worker}-{step}-{i}")).collect();
            let started = stage.now_ms();
            say(&keys.iter().map(|key| format!("@try {key} -\n")).collect::<String>());
            let recorded = stage.store.record_batch(keys.iter().map(|key| with_window(key))).wait().unwrap();
            assert!(recorded.into_iter().all(|recorded| matches!(recorded, Ok(RecordOutcome::First))));
            let ended = stage.now_ms();
            say(&keys.iter().map(|key| format!("@done {key} - {started} {ended}\n")).collect::<String>());
            own.extend(keys.into_iter().take(2));
            if own.len() > OWN {
                own.pop_front();
            }
            continue;
        }
        let keys: Vec<String> =
            (0..rng.random_range(1..4)).map(|_| format!("k{}", rng.random_range(0..POOL))).collect();
        let mut leases = Vec::new();
        for (key, claimed) in
            keys.iter().zip(stage.store.claim_batch(keys.iter().map(|key| with_window(key))).wait().unwrap())
        {
            if let Claim::Acquired(lease) = claimed.unwrap() {
                stage.say_got(key, &lease);
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
                lease.release().wait().unwrap();
            }),
            2 => leases.into_iter().for_each(|(_, lease)| std::mem::forget(lease)),
            _ => {
                // Now and then over several pages and blocks of the log.
                let padding = if rng.random_bool(0.01) { rng.random_range(0..100_000) } else { 0 };
                stage.complete(leases, padding);
            }
        }
    }
}

/// Some keys have a window of their own.
fn window_ms(key: &str) -> u64 {
    if key.ends_with('3') { 2 * WINDOW_MS / 3 } else { WINDOW_MS }
}

/// What a call that claims or records the key passes.
fn with_window(key: &str) -> Key<'_> {
    match window_ms(key) {
        WINDOW_MS => Key::from(key),
        own_ms => Key::from(key).window(Duration::from_millis(own_ms)),
    }
}

/// Forgets a key that was just recorded, or one whose bucket is about to go, and may complete it anew.
fn forget_own(stage: &Stage<'_>, rng: &mut StdRng, own: &mut VecDeque<String>) {
    let key = if rng.random_bool(0.5) { own.pop_front() } else { own.pop_back() };
    let Some(key) = key else { return };
    stage.forget(&key);
    if rng.random_bool(0.5) {
        let lease = stage.acquire(&key).expect("a forgotten key is free");
        assert_eq!(lease.attempt().prior(), None, "and its next claim is its first");
        stage.complete(vec![(key.clone(), lease)], 0);
        own.push_back(key);
    }
}

/// Completes and forgets a key that other threads are waiting for. Time stands still meanwhile, so that they do not get it
/// for the end of its window.
fn forget_fought_over(stage: &Stage<'_>, rng: &mut StdRng) {
    let key = format!("h{}", rng.random_range(0..4));
    let Some(lease) = stage.acquire(&key) else { return };
    let _standing_still = stage.standing_still.lock().unwrap();
    stage.complete(vec![(key.clone(), lease)], 0);
    if rng.random_bool(0.9) {
        stage.forget(&key);
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
    /// It was completed, and is being forgotten; whether it is is open.
    Forgetting { result: String },
}

pub struct Oracle {
    said: BTreeMap<String, Said>,
    /// Messages that came with what is completed, and were removed from the outbox.
    messages: Messages,
    last_token: u64,
    pub clock_ms: u64,
    /// Lives in which the store was opened, and completions that were acknowledged in them.
    pub opened: u64,
    pub acknowledged: u64,
}

impl Oracle {
    pub fn new() -> Self {
        let (said, messages) = (BTreeMap::new(), Messages::new());
        Self { said, messages, last_token: 0, clock_ms: 1_700_000_000_000, opened: 0, acknowledged: 0 }
    }

    /// Takes in all that one child said, in the order it said it. Behind the first `certain` lines, what it says of
    /// completions may be void.
    pub fn hear_all(&mut self, lines: &[Line], certain: usize) {
        let tokens_before = self.last_token;
        self.opened += u64::from(lines.iter().any(|line| line.text == "open"));
        for (place, Line { text: line, .. }) in lines.iter().enumerate() {
            if line == "opening" {
                // Whoever held a key is gone, and nobody needs to have looked since.
                for said in self.said.values_mut().filter(|said| **said == Said::Got) {
                    *said = Said::Left;
                }
                continue;
            }
            if line == "open" || line == "pulse" {
                continue;
            }
            if let Some(token) = line.strip_prefix("got ").and_then(|rest| rest.split(' ').nth(1)) {
                let token: u64 = token.parse().unwrap();
                assert!(token > tokens_before, "G3: {token} after {tokens_before}");
            }
            if ["done ", "dup ", "forgot "].iter().any(|word| line.starts_with(word)) {
                if place >= certain {
                    continue;
                }
                self.acknowledged += u64::from(line.starts_with("done "));
            }
            self.hear(line);
        }
    }

    /// How many completions that were acknowledged, and whose window is not over, the store does not know.
    pub fn missing(&self, store: &Store) -> usize {
        let now_ms = store.stats().now.as_unix_ms();
        let done = self.said.iter().filter(
            |(key, said)| matches!(said, Said::Done { started_ms, .. } if now_ms < started_ms + window_ms(key)),
        );
        let keys: Vec<&String> = done.map(|(key, _)| key).collect();
        let checks = keys.chunks(1_000).flat_map(|keys| store.check_batch(keys.iter().copied()).wait().unwrap());
        checks.filter(|check| !matches!(check, Ok(KeyStatus::Completed(_)))).count()
    }

    fn hear(&mut self, line: &str) {
        let words: Vec<&str> = line.split(' ').collect();
        match words.as_slice() {
            ["got", key, token, prior, at] => {
                let (token, at_ms): (u64, u64) = (token.parse().unwrap(), at.parse().unwrap());
                match self.said.get(*key) {
                    // The claim was answered before it was said, at `at` or earlier.
                    Some(Said::Done { started_ms, result, .. }) => assert!(
                        at_ms >= started_ms + window_ms(key),
                        "G1: {key}, completed at {started_ms} with {result}, was given out again by {at_ms}"
                    ),
                    Some(Said::Got) => panic!("G3: {key} has two holders"),
                    Some(Said::Tried { .. } | Said::Left | Said::Forgetting { .. }) | None => {}
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
            ["forget", key] => {
                if let Some(Said::Done { result, .. }) = self.said.get(*key) {
                    let forgetting = Said::Forgetting { result: result.clone() };
                    self.said.insert((*key).to_owned(), forgetting);
                }
            }
            ["forgot", key] => {
                // It may have been said late, when the key was somebody else's again.
                if let Some(said @ Said::Forgetting { .. }) = self.said.get_mut(*key) {
                    *said = Said::Left;
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
    pub fn check(&mut self, store: &Store) {
        let now_ms = store.stats().now.as_unix_ms();
        self.clock_ms = now_ms;
        let keys: Vec<String> = self.said.keys().cloned().collect();
        // The first of them are asked while the filter is being rebuilt, the last by the filter.
        let checks = keys.chunks(1_000).flat_map(|keys| store.check_batch(keys).wait().unwrap());
        let mut passed = Vec::new();
        self.messages.extend(messages(store));
        for (key, check) in keys.iter().cloned().zip(checks) {
            let check = check.unwrap();
            if let KeyStatus::Completed(first) = &check {
                has_come_along(store, &self.messages, &key, first).unwrap();
            }
            let said = self.said.get_mut(&key).unwrap();
            match (&*said, check) {
                (Said::Done { result, started_ms, ended_ms }, KeyStatus::Completed(completed)) => {
                    assert!(now_ms < ended_ms + window_ms(&key), "G4: {key} is remembered too long");
                    assert!((*started_ms..=*ended_ms).contains(&completed.completed_at().as_unix_ms()), "G1: {key}");
                    assert_eq!(&name(completed.result()), result, "G1: {key} has another result");
                }
                (Said::Done { started_ms, .. }, check) => {
                    assert!(
                        now_ms >= started_ms + window_ms(&key),
                        "G1: {key} was acknowledged: {said:?}, but is {check:?}"
                    );
                    passed.push(key);
                }
                (Said::Tried { result } | Said::Forgetting { result }, KeyStatus::Completed(completed)) => {
                    // The completion was written, and only the acknowledgement was lost; or the end of it was not.
                    assert_eq!(&name(completed.result()), result, "{key}");
                    let at_ms = completed.completed_at().as_unix_ms();
                    *said = Said::Done { result: result.clone(), started_ms: at_ms, ended_ms: at_ms };
                }
                (Said::Got | Said::Left, KeyStatus::Completed(_)) => panic!("G2: {key} was never completed: {said:?}"),
                (_, KeyStatus::New) => *said = Said::Left,
                (_, KeyStatus::InProgress(other)) => panic!("G2: {key} is blocked by the dead: {other:?}"),
            }
        }
        for key in passed {
            self.said.remove(&key);
        }
        for (key, with) in messages(store) {
            // A completion that is not there cannot have left a message.
            let is_void = matches!(self.said.get(&key), Some(Said::Done { result, .. }) if *result != with);
            let token = |result: &str| result.rsplit('-').next().and_then(|token| token.parse::<u64>().ok());
            let Some(Said::Done { result, .. }) = self.said.get(&key) else { continue };
            assert!(!is_void || token(result) > token(&with), "{key} has a message of {with}, and {result} before it");
        }
        self.messages
            .retain(|(key, with)| matches!(self.said.get(key), Some(Said::Done { result, .. }) if result == with));
        store
            .remove_messages(store.outbox(usize::MAX).wait().unwrap().into_iter().map(|message| message.id))
            .wait()
            .unwrap();
        if self.said.len() > KNOWN {
            self.said.retain(|key, said| *said != Said::Left || !key.starts_with('r'));
        }
        // A key that was left by the dead is told so, and its token is higher than all before.
        let left = self.said.iter().find(|(_, said)| **said == Said::Left).map(|(key, _)| key.clone());
        if let Some(key) = left {
            let Claim::Acquired(lease) = store.claim(&key).wait().unwrap() else { panic!("G2: {key} can be claimed") };
            assert!(lease.token().get() > self.last_token, "G3: {} after {}", lease.token().get(), self.last_token);
            assert_ne!(lease.attempt().prior(), Some(PriorAttempt::LeaseExpired));
            self.last_token = lease.token().get();
            lease.release().wait().unwrap();
        }
    }
}

/// A number from the environment.
pub fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().expect(name))
}
