//! A child process that is killed, and the oracle that checks the store against the child's reports.
//!
//! The child works on a store with several threads, while other threads flush it and run its clock many times as fast
//! as real time, so that buckets are created and dropped. It reports each step before and after it, as lines on a pipe.
//! The parent then opens the store, and checks G1 to G4 for every reported key.
//!
//! The parent's clock starts at the last reported time. It must not be behind the child's clock. A kill can separate a call
//! from its report, and then the store has times that the parent does not expect: a completion has at least the time of the
//! attempt before it, and a key can be acquired again once its window is over. So the child reports each tick of its clock
//! before the tick.

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
/// How many of its own keys a thread remembers: enough that the windows of the oldest are about to end.
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
/// If set, the child also forgets keys, and closes and reopens its store.
pub const REOPENS: &str = "ONLYONCE_KILL_REOPENS";

/// Longer than any child runs: there is no sync besides those of calls.
const NEVER_MS: u64 = 3_600_000;

/// Above this number of keys the oracle stops tracking released keys that no child uses again.
const MAX_TRACKED_KEYS: usize = 20_000;

fn durability(name: &str) -> Durability {
    if name == "Disk" { Durability::Disk } else { Durability::Process }
}

/// The options of a child.
#[derive(Debug, Clone, Copy)]
pub struct ChildOptions {
    pub durability: Durability,
    /// The longest time between two flushes.
    pub flush_ms: u64,
    /// The sync interval under [`Durability::Process`].
    pub sync_ms: u64,
    /// How many times as fast as real time the clock runs.
    pub pace: u64,
    /// The store's memory budget. A smaller one causes more flushes.
    pub budget_mib: usize,
    /// The pause of each thread between two calls.
    pub rest_us: u64,
    /// Whether the child measures its disk: one `pulse` line per sync of another file.
    pub pulse: bool,
}

impl Default for ChildOptions {
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

/// A line of a child, and the time on the listener's clock when it arrived.
#[derive(Debug, Clone)]
pub struct Line {
    pub text: String,
    pub at: u64,
}

/// Starts the test `child` of this executable.
pub fn spawn(path: &Path, options: ChildOptions, oracle: &Oracle, seed: u32, round: u64) -> (Child, Listener) {
    spawn_at(path, options, oracle.clock_ms, seed, round, || 0)
}

/// As [`spawn`], with the initial time of the store, and a clock for the lines.
pub fn spawn_at(
    path: &Path,
    options: ChildOptions,
    clock_ms: u64,
    seed: u32,
    round: u64,
    listeners_clock: impl Fn() -> u64 + Send + 'static,
) -> (Child, Listener) {
    start(&mut command(path, options, clock_ms, seed, round), listeners_clock)
}

/// The command that starts a child.
pub fn command(path: &Path, options: ChildOptions, clock_ms: u64, seed: u32, round: u64) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "child", "--ignored", "--nocapture", "--test-threads=1"])
        .env(STORE, path)
        .env(DURABILITY, format!("{:?}", options.durability))
        .env(FLUSH_MS, options.flush_ms.to_string())
        .env(SYNC_MS, options.sync_ms.to_string())
        .env(PACE, options.pace.to_string())
        .env(BUDGET, options.budget_mib.to_string())
        .env(REST_US, options.rest_us.to_string())
        .env(PULSE, options.pulse.to_string())
        .env(CLOCK, clock_ms.to_string())
        .env(CHILD_SEED, seed.to_string())
        .env(ROUND, round.to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    command
}

/// Starts a child, with a clock for its lines.
pub fn start(command: &mut Command, listeners_clock: impl Fn() -> u64 + Send + 'static) -> (Child, Listener) {
    let mut child = command.spawn().unwrap();
    let out = child.stdout.take().unwrap();
    let received = Arc::new(Mutex::new(Vec::new()));
    let lines = Arc::clone(&received);
    let thread = std::thread::spawn(move || {
        let mut out = BufReader::new(out);
        let mut line = String::new();
        while out.read_line(&mut line).unwrap() > 0 {
            // A line without a line feed is incomplete: the child was killed while it wrote it.
            if let Some(text) = line.strip_suffix('\n').and_then(|line| line.strip_prefix('@')) {
                let line = Line { text: text.to_owned(), at: listeners_clock() };
                lines.lock().unwrap().push(line);
            }
            line.clear();
        }
    });
    (child, Listener { received, thread })
}

/// Reads the lines of a child.
pub struct Listener {
    received: Arc<Mutex<Vec<Line>>>,
    thread: JoinHandle<()>,
}

impl Listener {
    /// How many lines have arrived.
    pub fn line_count(&self) -> usize {
        self.received.lock().unwrap().len()
    }

    /// Waits until this many lines have arrived, or the child has ended.
    pub fn wait_for(&self, lines: usize) {
        while self.line_count() < lines && !self.thread.is_finished() {
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// All lines, once the child has ended.
    pub fn all(self) -> Vec<Line> {
        self.thread.join().unwrap();
        std::mem::take(&mut self.received.lock().unwrap())
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

/// Pauses between two calls.
fn rest() {
    match variable(REST_US).parse().unwrap() {
        0 => std::thread::yield_now(),
        rest_us => std::thread::sleep(Duration::from_micros(rest_us)),
    }
}

/// Writes complete lines to the parent, in one write, so that threads do not mix their lines.
fn report(lines: &str) {
    let mut out = std::io::stdout().lock();
    out.write_all(lines.as_bytes()).unwrap();
    out.flush().unwrap();
}

/// Makes a panic in any thread abort the process: otherwise the other threads would continue and hide it.
pub fn end_at_panic() {
    let default_hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        default_hook(panic);
        std::process::abort();
    }));
}

/// The work of the child process.
pub fn child() {
    end_at_panic();
    let clock = ManualClock::at(Timestamp::from_unix_ms(variable(CLOCK).parse().unwrap()));
    let (seed, round): (u64, u64) = (variable(CHILD_SEED).parse().unwrap(), variable(ROUND).parse().unwrap());
    let flush_ms: u64 = variable(FLUSH_MS).parse().unwrap();
    let pace = Duration::from_millis(variable(PACE).parse().unwrap());
    let reopens = std::env::var_os(REOPENS).is_some();
    for opening in 0.. {
        let builder = builder(&clock, durability(&variable(DURABILITY)))
            .sync_interval(Duration::from_millis(variable(SYNC_MS).parse().unwrap()))
            .memory_budget(variable(BUDGET).parse::<usize>().unwrap() << 20);
        report("\n@opening\n");
        let store = builder.open(variable(STORE)).unwrap();
        // The store's time can be later than the parent's: the lines of an earlier child may not have counted.
        // Reports carry the wall clock's time, so that it must equal the store's time.
        clock.set_wall(Timestamp::from_unix_ms(store.stats().now.as_unix_ms()));
        report("@open\n");
        let seed = seed + opening;
        let session = &Session {
            store: &store,
            clock: &clock,
            reopens,
            clock_lock: Mutex::new(()),
            over: AtomicBool::new(false),
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !session.is_over() {
                    std::thread::sleep(Duration::from_millis(1));
                    let _clock_stopped = session.clock_lock.lock().unwrap();
                    // Reported first, so that no call has a later time than the reports.
                    report(&format!("@clock {}\n", session.now_ms() + pace.as_millis() as u64));
                    clock.advance(pace);
                }
            });
            if variable(PULSE) == "true" {
                scope.spawn(|| pulse(&Path::new(&variable(STORE)).with_extension("pulse")));
            }
            scope.spawn(|| {
                let mut rng = StdRng::seed_from_u64(seed ^ 0x5ea1);
                while !session.is_over() {
                    std::thread::sleep(Duration::from_millis(rng.random_range(0..flush_ms)));
                    store.flush().unwrap();
                }
            });
            scope.spawn(|| watch(session, StdRng::seed_from_u64(seed ^ 0x3a7c4)));
            for thread in 0..THREADS {
                let worker = format!("{}-{opening}", round * THREADS + thread);
                scope.spawn(move || work(session, StdRng::seed_from_u64(seed + thread), &worker));
            }
            if reopens {
                let lasts = StdRng::seed_from_u64(seed ^ 0xc105e).random_range(100..1_500);
                std::thread::sleep(Duration::from_millis(lasts));
                session.over.store(true, Ordering::Relaxed);
            }
        });
        store.close().wait().unwrap();
    }
}

/// Reports each sync of the disk: overwrites one block of a separate file, so that the sync writes nothing of the store.
fn pulse(path: &Path) {
    let block = [1; 4_096];
    let file = File::create(path).unwrap();
    file.write_all_at(&block, 0).unwrap();
    file.sync_all().unwrap();
    while file.write_all_at(&block, 0).and_then(|()| file.sync_data()).is_ok() {
        report("@pulse\n");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// One open store of a child, shared by its threads.
struct Session<'a> {
    store: &'a Store,
    clock: &'a ManualClock,
    reopens: bool,
    /// The clock is stopped while this is locked.
    clock_lock: Mutex<()>,
    over: AtomicBool,
}

impl Session<'_> {
    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    fn now_ms(&self) -> u64 {
        onlyonce::Clock::wall(self.clock).as_unix_ms()
    }

    /// Claims one key, and reports the lease if it is acquired.
    fn acquire(&self, key: &str) -> Option<Lease> {
        let Claim::Acquired(lease) = self.store.claim(with_window(key)).wait().unwrap() else { return None };
        self.report_acquired(key, &lease);
        Some(lease)
    }

    fn report_acquired(&self, key: &str, lease: &Lease) {
        let prior = lease.attempt().prior().map_or("none".to_owned(), |prior| format!("{prior:?}"));
        report(&format!("@got {key} {} {prior} {}\n", lease.token().get(), self.now_ms()));
    }

    /// Completes the leases of these keys with padded results, and reports it before and after. A single lease is
    /// completed with a message and an offset.
    fn complete(&self, leases: Vec<(String, Lease)>, padding: usize) {
        let started = self.now_ms();
        let tried: String =
            leases.iter().map(|(key, lease)| format!("@try {key} result-{}\n", lease.token().get())).collect();
        report(&tried);
        let results: Vec<String> = leases.iter().map(|(_, lease)| format!("result-{}", lease.token().get())).collect();
        let (keys, mut leases): (Vec<String>, Vec<_>) = leases.into_iter().unzip();
        let completed = if let (1, [key], [result]) = (leases.len(), &keys[..], &results[..]) {
            let lease = leases.remove(0);
            let token = lease.token().get();
            let padded = format!("{result}{}{WITH_SIDE_WRITES}", ".".repeat(padding));
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
        report(&done.map(|(key, result)| format!("@done {key} {result} {started} {ended}\n")).collect::<String>());
    }

    /// Forgets a completed or unknown key that no other thread completes at the same time.
    fn forget(&self, key: &str) {
        report(&format!("@forget {key}\n"));
        self.store.forget(key).wait().unwrap();
        report(&format!("@forgot {key}\n"));
    }
}

/// The last byte of a result that was completed with an offset and a message.
const WITH_SIDE_WRITES: char = '+';

/// The result as children report it: without its padding, and `-` for no result.
pub fn name(result: Option<&[u8]>) -> String {
    result.map_or("-".to_owned(), |bytes| {
        String::from_utf8_lossy(bytes).trim_end_matches(['.', WITH_SIDE_WRITES]).to_owned()
    })
}

/// The messages of a store's outbox: a key and the result of its completion.
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

/// Checks that the offset and the message of a completion are stored.
pub fn check_side_writes(store: &Store, messages: &Messages, key: &str, first: &Completed) -> Result<(), String> {
    if first.result().is_none_or(|result| !result.ends_with(&[WITH_SIDE_WRITES as u8])) {
        return Ok(());
    }
    let result = name(first.result());
    if !messages.contains(&(key.to_owned(), result.clone())) {
        return Err(format!("G1: {key} is completed with {result}, but its message is missing"));
    }
    // Only for some keys, because `offset` syncs under `Disk`.
    if first.token().get().is_multiple_of(16) {
        let offset = store.offset(key, 0).wait().unwrap();
        if offset != Some(first.token().get()) {
            return Err(format!("G1: {key} is completed with {result}, but its offset is {offset:?}"));
        }
    }
    Ok(())
}

/// Reports keys that were completed recently: an answer `Completed` must be as durable as the completion itself.
fn watch(session: &Session<'_>, mut rng: StdRng) {
    while !session.is_over() {
        let keys: Vec<String> = (0..100).map(|_| format!("k{}", rng.random_range(0..POOL))).collect();
        let mut reported = String::new();
        for (key, check) in keys.iter().zip(session.store.check_batch(&keys).wait().unwrap()) {
            if let KeyStatus::Completed(first) = check.unwrap()
                && first.completed_at().as_unix_ms() + 1_000 > session.now_ms()
            {
                let result = name(first.result());
                reported.push_str(&format!("@dup {key} {result} {}\n", first.completed_at().as_unix_ms()));
            }
        }
        report(&reported);
        rest();
    }
}

fn work(session: &Session<'_>, mut rng: StdRng, worker: &str) {
    // Keys that only this thread uses.
    let mut own = VecDeque::new();
    let mut step = 0_u64;
    while !session.is_over() {
        step += 1;
        rest();
        if session.reopens && rng.random_bool(0.05) {
            if rng.random_bool(0.5) {
                forget_own(session, &mut rng, &mut own);
            } else {
                forget_contended(session, &mut rng);
            }
            continue;
        }
        if rng.random_bool(0.05) {
            let keys: Vec<String> = (0..rng.random_range(1..30)).map(|i| format!("r{worker}-{step}-{i}")).collect();
            let started = session.now_ms();
            report(&keys.iter().map(|key| format!("@try {key} -\n")).collect::<String>());
            let recorded = session.store.record_batch(keys.iter().map(|key| with_window(key))).wait().unwrap();
            assert!(recorded.into_iter().all(|recorded| matches!(recorded, Ok(RecordOutcome::First))));
            let ended = session.now_ms();
            report(&keys.iter().map(|key| format!("@done {key} - {started} {ended}\n")).collect::<String>());
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
            keys.iter().zip(session.store.claim_batch(keys.iter().map(|key| with_window(key))).wait().unwrap())
        {
            if let Claim::Acquired(lease) = claimed.unwrap() {
                session.report_acquired(key, &lease);
                leases.push((key.clone(), lease));
            }
        }
        match rng.random_range(0..10) {
            0 => leases.into_iter().for_each(|(key, lease)| {
                report(&format!("@left {key}\n"));
                drop(lease);
            }),
            1 => leases.into_iter().for_each(|(key, lease)| {
                report(&format!("@left {key}\n"));
                lease.release().wait().unwrap();
            }),
            2 => leases.into_iter().for_each(|(_, lease)| std::mem::forget(lease)),
            _ => {
                // Rarely larger than several pages and log blocks.
                let padding = if rng.random_bool(0.01) { rng.random_range(0..100_000) } else { 0 };
                session.complete(leases, padding);
            }
        }
    }
}

/// Some keys have their own window.
pub fn window_ms(key: &str) -> u64 {
    if key.ends_with('3') { 2 * WINDOW_MS / 3 } else { WINDOW_MS }
}

/// What a call that claims or records the key passes.
fn with_window(key: &str) -> Key<'_> {
    match window_ms(key) {
        WINDOW_MS => Key::from(key),
        own_ms => Key::from(key).window(Duration::from_millis(own_ms)),
    }
}

/// Forgets a key that was just recorded, or one whose bucket is about to expire, and may complete it again.
fn forget_own(session: &Session<'_>, rng: &mut StdRng, own: &mut VecDeque<String>) {
    let key = if rng.random_bool(0.5) { own.pop_front() } else { own.pop_back() };
    let Some(key) = key else { return };
    session.forget(&key);
    if rng.random_bool(0.5) {
        let lease = session.acquire(&key).expect("a forgotten key is new");
        assert_eq!(lease.attempt().prior(), None, "the next claim of a forgotten key is its first");
        session.complete(vec![(key.clone(), lease)], 0);
        own.push_back(key);
    }
}

/// Completes and forgets a key that other threads want. The clock is stopped meanwhile, so that they cannot acquire it
/// because its window ends.
fn forget_contended(session: &Session<'_>, rng: &mut StdRng) {
    let key = format!("h{}", rng.random_range(0..4));
    let Some(lease) = session.acquire(&key) else { return };
    let _clock_stopped = session.clock_lock.lock().unwrap();
    session.complete(vec![(key.clone(), lease)], 0);
    if rng.random_bool(0.9) {
        session.forget(&key);
    }
}

/// The state of a key according to the children's reports.
#[derive(Debug, Clone, PartialEq)]
enum Reported {
    /// Claimed, and not reported as ended.
    Got,
    /// Released, dropped, or found to be neither completed nor claimed.
    Left,
    /// A completion was started; it is unknown whether it was written.
    Tried { result: String },
    /// Completed between these two times.
    Done { result: String, started_ms: u64, ended_ms: u64 },
    /// Completed, and `forget` was started; it is unknown whether it was written.
    Forgetting { result: String },
}

pub struct Oracle {
    reported: BTreeMap<String, Reported>,
    /// The completions of this opening whose key was acquired again, and the time by which it was: a key and the result of
    /// its completion. A thread that is descheduled may report its completion after that.
    replaced: BTreeMap<(String, String), u64>,
    /// Messages of stored completions that were removed from the outbox.
    messages: Messages,
    last_token: u64,
    pub clock_ms: u64,
    /// Children that opened the store, and completions that they acknowledged.
    pub opened: u64,
    pub acknowledged: u64,
}

impl Oracle {
    pub fn new() -> Self {
        let (reported, messages) = (BTreeMap::new(), Messages::new());
        let (replaced, clock_ms) = (BTreeMap::new(), 1_700_000_000_000);
        Self { reported, replaced, messages, last_token: 0, clock_ms, opened: 0, acknowledged: 0 }
    }

    /// Applies the lines of one child in their order. After the first `certain` lines, reports of completions may be void.
    pub fn apply_all(&mut self, lines: &[Line], certain: usize) {
        let tokens_before = self.last_token;
        self.opened += u64::from(lines.iter().any(|line| line.text == "open"));
        for (place, Line { text: line, .. }) in lines.iter().enumerate() {
            if line == "opening" {
                // The holders of all keys have ended, whether or not a claim has noticed it.
                for reported in self.reported.values_mut().filter(|reported| **reported == Reported::Got) {
                    *reported = Reported::Left;
                }
                // The threads of an opening end before the next one.
                self.replaced.clear();
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
            self.apply(line);
        }
    }

    /// How many acknowledged completions within their window are missing in the store.
    pub fn missing(&self, store: &Store) -> usize {
        let now_ms = store.stats().now.as_unix_ms();
        let done = self.reported.iter().filter(
            |(key, reported)| matches!(reported, Reported::Done { started_ms, .. } if now_ms < started_ms + window_ms(key)),
        );
        let keys: Vec<&String> = done.map(|(key, _)| key).collect();
        let checks = keys.chunks(1_000).flat_map(|keys| store.check_batch(keys.iter().copied()).wait().unwrap());
        checks.filter(|check| !matches!(check, Ok(KeyStatus::Completed(_)))).count()
    }

    fn apply(&mut self, line: &str) {
        let words: Vec<&str> = line.split(' ').collect();
        match words.as_slice() {
            ["got", key, token, prior, at] => {
                let (token, at_ms): (u64, u64) = (token.parse().unwrap(), at.parse().unwrap());
                match self.reported.get(*key) {
                    Some(Reported::Done { started_ms, result, .. }) => {
                        check_acquired_again(key, result, *started_ms, at_ms);
                    }
                    Some(Reported::Got) => panic!("G3: {key} has two holders"),
                    Some(Reported::Tried { .. } | Reported::Left | Reported::Forgetting { .. }) | None => {}
                }
                assert_ne!(*prior, "LeaseExpired", "leases last a day");
                if let Some(Reported::Tried { result } | Reported::Done { result, .. }) = self.reported.get(*key) {
                    self.replaced.insert(((*key).to_owned(), result.clone()), at_ms);
                }
                self.tokens_seen(token);
                self.clock_ms = self.clock_ms.max(at_ms);
                self.reported.insert((*key).to_owned(), Reported::Got);
            }
            ["left", key] => {
                self.reported.insert((*key).to_owned(), Reported::Left);
            }
            ["try", key, result] => {
                self.reported.insert((*key).to_owned(), Reported::Tried { result: (*result).to_owned() });
            }
            ["done", key, result, started, ended] => {
                let (started_ms, ended_ms) = (started.parse().unwrap(), ended.parse().unwrap());
                self.clock_ms = self.clock_ms.max(ended_ms);
                match self.reported.get(*key) {
                    Some(Reported::Tried { result: last } | Reported::Done { result: last, .. }) if last == result => {
                        let done = Reported::Done { result: (*result).to_owned(), started_ms, ended_ms };
                        self.reported.insert((*key).to_owned(), done);
                    }
                    // It is reported late, after another thread acquired the key.
                    reported => match self.replaced.remove(&((*key).to_owned(), (*result).to_owned())) {
                        Some(by_ms) => check_acquired_again(key, result, started_ms, by_ms),
                        None => panic!("the child reported {line:?}, but the key was {reported:?}"),
                    },
                }
            }
            ["clock", at] => self.clock_ms = self.clock_ms.max(at.parse().unwrap()),
            ["dup", key, result, at] => {
                let at_ms = at.parse().unwrap();
                // It may be reported late, after another thread acquired the key: then it is ignored.
                if matches!(self.reported.get(*key), Some(Reported::Tried { result: tried }) if tried == result) {
                    let done = Reported::Done { result: (*result).to_owned(), started_ms: at_ms, ended_ms: at_ms };
                    self.reported.insert((*key).to_owned(), done);
                }
            }
            ["forget", key] => {
                if let Some(Reported::Done { result, .. }) = self.reported.get(*key) {
                    let forgetting = Reported::Forgetting { result: result.clone() };
                    self.reported.insert((*key).to_owned(), forgetting);
                }
            }
            ["forgot", key] => {
                // It may be reported late, after another thread acquired the key.
                if let Some(reported @ Reported::Forgetting { .. }) = self.reported.get_mut(*key) {
                    *reported = Reported::Left;
                }
            }
            _ => panic!("the child reported {line:?}"),
        }
    }

    /// The threads of one child report their tokens in any order. Each token must be higher than all tokens of earlier
    /// children, which `apply_all` checks.
    fn tokens_seen(&mut self, token: u64) {
        self.last_token = self.last_token.max(token);
    }

    /// Looks every key up and compares it with the reports; then takes over the store's state.
    pub fn check(&mut self, store: &Store) {
        let now_ms = store.stats().now.as_unix_ms();
        self.clock_ms = now_ms;
        let keys: Vec<String> = self.reported.keys().cloned().collect();
        // The first keys are looked up while the filter is rebuilt, the last ones with the filter.
        let checks = keys.chunks(1_000).flat_map(|keys| store.check_batch(keys).wait().unwrap());
        let mut expired = Vec::new();
        self.messages.extend(messages(store));
        for (key, check) in keys.iter().cloned().zip(checks) {
            let check = check.unwrap();
            if let KeyStatus::Completed(first) = &check {
                check_side_writes(store, &self.messages, &key, first).unwrap();
                assert!(
                    first.completed_at().as_unix_ms() <= now_ms,
                    "{key} is {first:?}, later than the present {now_ms}: the child's clock was ahead of its reports"
                );
            }
            let reported = self.reported.get_mut(&key).unwrap();
            match (&*reported, check) {
                (Reported::Done { result, started_ms, ended_ms }, KeyStatus::Completed(completed)) => {
                    assert!(now_ms < ended_ms + window_ms(&key), "G4: {key} is remembered after its window");
                    let at_ms = completed.completed_at().as_unix_ms();
                    assert!(
                        (*started_ms..=*ended_ms).contains(&at_ms) && &name(completed.result()) == result,
                        "G1: {key} was acknowledged: {reported:?}, but is {completed:?}"
                    );
                }
                (Reported::Done { started_ms, .. }, check) => {
                    assert!(
                        now_ms >= started_ms + window_ms(&key),
                        "G1: {key} was acknowledged: {reported:?}, but is {check:?}"
                    );
                    expired.push(key);
                }
                (Reported::Tried { result } | Reported::Forgetting { result }, KeyStatus::Completed(completed)) => {
                    // The completion was written, but not acknowledged; or the `forget` was not written.
                    assert_eq!(&name(completed.result()), result, "{key}");
                    let at_ms = completed.completed_at().as_unix_ms();
                    *reported = Reported::Done { result: result.clone(), started_ms: at_ms, ended_ms: at_ms };
                }
                (Reported::Got | Reported::Left, KeyStatus::Completed(_)) => {
                    panic!("G2: {key} was never completed: {reported:?}")
                }
                (_, KeyStatus::New) => *reported = Reported::Left,
                (_, KeyStatus::InProgress(other)) => panic!("G2: {key} is blocked by an ended process: {other:?}"),
            }
        }
        for key in expired {
            self.reported.remove(&key);
        }
        for (key, with) in messages(store) {
            // A message must not be stored without its completion.
            let is_void = matches!(self.reported.get(&key), Some(Reported::Done { result, .. }) if *result != with);
            let token = |result: &str| result.rsplit('-').next().and_then(|token| token.parse::<u64>().ok());
            let Some(Reported::Done { result, .. }) = self.reported.get(&key) else { continue };
            assert!(
                !is_void || token(result) > token(&with),
                "{key} has a message of {with}, but its completion {result} is older"
            );
        }
        self.messages.retain(
            |(key, with)| matches!(self.reported.get(key), Some(Reported::Done { result, .. }) if result == with),
        );
        store
            .remove_messages(store.outbox(usize::MAX).wait().unwrap().into_iter().map(|message| message.id))
            .wait()
            .unwrap();
        if self.reported.len() > MAX_TRACKED_KEYS {
            self.reported.retain(|key, reported| *reported != Reported::Left || !key.starts_with('r'));
        }
        // A key of an ended process can be claimed, with a token that is higher than all before.
        let left = self.reported.iter().find(|(_, reported)| **reported == Reported::Left).map(|(key, _)| key.clone());
        if let Some(key) = left {
            let Claim::Acquired(lease) = store.claim(&key).wait().unwrap() else { panic!("G2: {key} can be claimed") };
            assert!(lease.token().get() > self.last_token, "G3: {} after {}", lease.token().get(), self.last_token);
            assert_ne!(lease.attempt().prior(), Some(PriorAttempt::LeaseExpired));
            self.last_token = lease.token().get();
            lease.release().wait().unwrap();
        }
    }
}

/// Fails if a key was acquired again within its window. The claim was answered before it was reported, by `by_ms` or earlier.
fn check_acquired_again(key: &str, result: &str, started_ms: u64, by_ms: u64) {
    assert!(
        by_ms >= started_ms + window_ms(key),
        "G1: {key}, completed at {started_ms} with {result}, was acquired again by {by_ms}"
    );
}

/// A number from the environment.
pub fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().expect(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(lines: &[&str]) -> Oracle {
        let mut oracle = Oracle::new();
        let lines: Vec<Line> = lines.iter().map(|text| Line { text: (*text).to_owned(), at: 0 }).collect();
        oracle.apply_all(&lines, usize::MAX);
        oracle
    }

    fn done(result: &str, started_ms: u64, ended_ms: u64) -> Reported {
        Reported::Done { result: result.to_owned(), started_ms, ended_ms }
    }

    const FIRST: [&str; 3] = ["opening", "got k 1 none 90", "try k r1"];

    #[test]
    fn a_completion_that_is_reported_late_does_not_overwrite_the_next_one() {
        let second = ["got k 2 none 60200", "try k r2", "done k r2 60300 60300"];
        for late in 0..=second.len() {
            let (before, after_it) = second.split_at(late);
            let oracle = after(&[&FIRST[..], before, &["done k r1 100 200"], after_it].concat());
            assert_eq!(oracle.reported["k"], done("r2", 60_300, 60_300), "after {before:?}");
            assert_eq!((oracle.acknowledged, oracle.clock_ms), (2, 1_700_000_000_000));
        }
        let known = ["dup k r1 150", "done k r1 100 200"];
        assert_eq!(after(&[&FIRST[..], &known].concat()).reported["k"], done("r1", 100, 200));
        let left = ["got k 2 none 60200", "left k", "done k r1 100 200"];
        assert_eq!(after(&[&FIRST[..], &left].concat()).reported["k"], Reported::Left);
    }

    #[test]
    fn a_completion_that_is_reported_late_is_compared_with_the_next_claim() {
        for lines in [
            &["got k 2 none 60099", "done k r1 100 200"][..],
            &["dup k r1 100", "got k 2 none 60099"],
            &["done k r1 100 200", "got k 2 none 60099"],
            // No thread of this opening can report it.
            &["got k 2 none 60200", "opening", "done k r1 100 200"],
            &["done k r9 100 200"],
        ] {
            let applied = std::panic::catch_unwind(|| after(&[&FIRST[..], lines].concat()));
            assert!(applied.is_err(), "{lines:?}");
        }
    }

    #[test]
    fn the_clock_is_the_last_reported_one() {
        let lines = ["opening", "open", "clock 1700000000300", "got k 1 none 1700000000200"];
        assert_eq!(after(&lines).clock_ms, 1_700_000_000_300);
    }
}
