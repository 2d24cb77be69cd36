//! Damaged files: flipped bits, removed bytes, zeroed blocks and missing files, in every kind of file that a store has.
//! After any damage the store fails with an error that names the file, or answers correctly: never a wrong answer, a
//! panic, a hang, or a store that is silently empty.
//!
//! Two damages to the log of a crashed store are excluded, because nothing on disk can reveal them: whole records
//! removed from its start, and whole records removed after the last proof of a sync.
//!
//! `ONLYONCE_CORRUPTION_ROUNDS` (default: 600) sets the rounds, `ONLYONCE_CORRUPTION_SEED` (default: random, and
//! printed) the seed, and `ONLYONCE_CORRUPTION_FIRST` the first round. A round depends on the seed and its number
//! alone, so that it can be repeated: the same kind of file and of damage, but not the same byte, because each store
//! has a new random secret.

mod common;
#[path = "common/damage.rs"]
mod damage;

use std::collections::{BTreeMap, BTreeSet};
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::START_MS;
use damage::{Damage, Harm, Image, KINDS, kind};
use onlyonce::{
    Builder, Claim, Completed, Completion, Durability, Error, KeyStatus, Lease, LeaseState, ManualClock, PriorAttempt,
    Store, StoredKey, Timestamp,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tempfile::TempDir;

const DEFAULT_ROUNDS: u64 = 600;

/// The persistent state of a key.
#[derive(Debug, Clone, PartialEq)]
enum State {
    Absent,
    Processing { token: u64, attempt: u32, released: bool },
    Completed(Completed),
}

impl State {
    fn of(store: &Store, key: &str) -> onlyonce::Result<Self> {
        Ok(match store.inspect(key).wait()? {
            None => Self::Absent,
            Some(StoredKey::Processing { token, attempt, state, .. }) => Self::Processing {
                token: token.get(),
                attempt,
                released: state == LeaseState::Free(PriorAttempt::Released),
            },
            Some(StoredKey::Completed(completed)) => Self::Completed(completed),
            Some(other) => panic!("{other:?}"),
        })
    }
}

/// One change of one key, and the length of the newest log after it.
struct Event {
    key: String,
    state: State,
    log_bytes: usize,
}

/// A store with data of every kind, and its expected state.
struct Base {
    image: Image,
    /// True if it was closed; otherwise it is as a crash leaves it.
    closed: bool,
    /// The newest log.
    log: PathBuf,
    /// The state of each key before the first record of the newest log.
    before: BTreeMap<String, State>,
    /// The changes in the newest log.
    events: Vec<Event>,
    /// The number in the offset and the message of completions, each with the number of events of the newest log before it.
    side_writes: Vec<(usize, u64)>,
    /// True if the last process started with the newest log, so that no older log belongs to it.
    is_first: bool,
    /// The bytes of the newest log that were synced before its last write, which proves it.
    proven_synced: usize,
    now_ms: u64,
    last_token: u64,
}

/// A directory in memory if there is one, because its syncs cost nothing.
fn scratch() -> TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory).unwrap() } else { tempfile::tempdir().unwrap() }
}

fn builder(clock: &ManualClock) -> Builder {
    Store::builder()
        .window(Duration::from_secs(60))
        .bucket(Duration::from_secs(10))
        .lease(Duration::from_secs(3_600))
        .memory_budget(32 << 20)
        .durability(Durability::Disk)
        .lock_wait(Duration::ZERO)
        .clock(clock.clone())
}

fn complete(store: &Store, key: &str) {
    let Claim::Acquired(lease) = store.claim(key).wait().unwrap() else { panic!("{key} is new") };
    lease.complete(format!("the result of {key}")).wait().unwrap();
}

/// Completes with an offset and a message with the same number.
fn complete_with(lease: Lease, result: &str, offset: u64) {
    let message = format!("message {offset}");
    lease
        .complete(Completion::new(result).offset("orders", 3, offset).message("topic", "key", message))
        .wait()
        .unwrap();
}

/// Claims a key, and leaks the lease, as a crash does.
fn leave_in_flight(store: &Store, key: &str) {
    let Claim::Acquired(lease) = store.claim(key).wait().unwrap() else { panic!("{key} is unclaimed") };
    std::mem::forget(lease);
}

/// Waits until the filters of this many ended buckets are on disk.
fn wait_for_filters(dir: &Path, count: usize) {
    let deadline = Instant::now() + Duration::from_secs(60);
    let is_filter = |name: &std::ffi::OsStr| name.to_string_lossy().ends_with(".filter");
    while std::fs::read_dir(dir).unwrap().filter(|entry| is_filter(&entry.as_ref().unwrap().file_name())).count()
        < count
    {
        assert!(Instant::now() < deadline, "no filter file was written");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn log_bytes(path: &Path) -> usize {
    std::fs::metadata(path).unwrap().len() as usize
}

impl Base {
    /// Closed or crashed, and with a last process that flushed keys before the newest log, or found keys in the journal.
    fn all() -> Vec<Self> {
        [(false, false), (false, true), (true, false), (true, true)]
            .map(|(closed, flush_first)| Self::new(closed, flush_first))
            .into()
    }

    fn new(closed: bool, flush_first: bool) -> Self {
        let dir = scratch();
        let path = dir.path().join("store");
        let clock = ManualClock::at(Timestamp::from_unix_ms(START_MS));
        let mut keys: Vec<String> = (0..40).map(|i| format!("never-seen-{i}")).collect();
        let mut add = |key: String| {
            keys.push(key.clone());
            key
        };
        let store = builder(&clock).open(&path).unwrap();
        for bucket in 0..2 {
            // The first bucket has one SST of several blocks, the second has two. More buckets would make each open slower.
            for sst in 0..1 + bucket {
                (0..10).for_each(|i| complete(&store, &add(format!("flushed-{bucket}-{sst}-{i}"))));
                let many = if bucket == 0 { 200 } else { 10 };
                let recorded: Vec<String> = (0..many).map(|i| add(format!("recorded-{bucket}-{sst}-{i}"))).collect();
                store.record_batch(&recorded).wait().unwrap();
                (0..3).for_each(|i| leave_in_flight(&store, &add(format!("in-flight-{bucket}-{sst}-{i}"))));
                store.flush().unwrap();
            }
            clock.advance(Duration::from_secs(10));
        }
        // A second process: its open has moved the log's records to an SST of the journal.
        (0..10).for_each(|i| complete(&store, &add(format!("journal-{i}"))));
        (0..3).for_each(|i| leave_in_flight(&store, &add(format!("journal-in-flight-{i}"))));
        store.forget("flushed-0-0-0").wait().unwrap();
        let Claim::Acquired(lease) = store.claim(add("journal-with-more".to_owned())).wait().unwrap() else {
            panic!("the key is new")
        };
        complete_with(lease, "the result of journal-with-more", 1);
        store.close().wait().unwrap();
        drop(store);
        let store = builder(&clock).open(&path).unwrap();
        wait_for_filters(&path.join("filters"), 2);
        if flush_first {
            clock.advance(Duration::from_secs(10));
            (0..10).for_each(|i| complete(&store, &add(format!("flushed-late-{i}"))));
            store.flush().unwrap();
        }

        let new: Vec<String> = (0..12).map(|i| add(format!("log-{i}"))).collect();
        let before = keys.iter().map(|key| (key.clone(), State::of(&store, key).unwrap())).collect();
        let newest = Image::read_at_rest(&path).newest(".log");
        let log = path.join(&newest);
        let mut events = Vec::new();
        let mut side_writes = vec![(0, 1)];
        let mut add_event = |key: &str| {
            let state = State::of(&store, key).unwrap();
            events.push(Event { key: key.to_owned(), state, log_bytes: log_bytes(&log) });
        };
        for (i, key) in new.iter().enumerate() {
            let Claim::Acquired(lease) = store.claim(key).wait().unwrap() else { panic!("{key} is new") };
            add_event(key);
            match i % 3 {
                0 => complete_with(lease, &format!("the result of {key}"), 2 + i as u64),
                1 => lease.release().wait().unwrap(),
                _ => {
                    std::mem::forget(lease);
                    continue;
                }
            }
            add_event(key);
            if i % 3 == 0 {
                // Each earlier key has two events or one.
                side_writes.push((i / 3 * 5 + 2, 2 + i as u64));
            }
        }
        store.forget("flushed-1-0-0").wait().unwrap();
        add_event("flushed-1-0-0");
        let proven_synced = log_bytes(&log);
        let Claim::Acquired(lease) = store.claim("in-flight-1-0-0").wait().unwrap() else {
            panic!("its process has ended")
        };
        add_event("in-flight-1-0-0");
        let last_token = lease.token().get();
        lease.complete("at the second attempt").wait().unwrap();
        add_event("in-flight-1-0-0");
        if closed {
            store.close().wait().unwrap();
        }
        Self {
            image: Image::read_at_rest(&path),
            closed,
            log: newest,
            before,
            events,
            side_writes,
            is_first: !flush_first,
            proven_synced,
            now_ms: clock_ms(&clock),
            last_token,
        }
    }

    /// The state of each key after the first `events` events of the newest log.
    fn state_after(&self, events: usize) -> BTreeMap<&str, &State> {
        let mut state_after: BTreeMap<&str, &State> =
            self.before.iter().map(|(key, state)| (key.as_str(), state)).collect();
        for event in self.events.iter().take(events) {
            state_after.insert(&event.key, &event.state);
        }
        state_after
    }
}

fn clock_ms(clock: &ManualClock) -> u64 {
    onlyonce::Clock::wall(clock).as_unix_ms()
}

/// The result of an examination of a damaged store.
#[derive(Debug)]
enum Findings {
    OpenFailed(Error),
    /// Some calls failed, the first of them with this error; the other answers are correct.
    CallFailed(Error),
    /// All answers are correct, without the last `missing` events of the log.
    Correct {
        missing: usize,
    },
}

/// Opens the store in `path`, and checks every key. The first `certain` events of the newest log must be stored.
fn examine(base: &Base, path: &Path, certain: usize, rng: &mut StdRng) -> Result<Findings, String> {
    let clock = ManualClock::at(Timestamp::from_unix_ms(base.now_ms));
    let store = match builder(&clock).open(path) {
        Ok(store) => store,
        Err(error) => return Ok(Findings::OpenFailed(error)),
    };
    let mut answers: BTreeMap<&str, State> = BTreeMap::new();
    let mut rejected = Vec::new();
    let keys: Vec<&str> = base.before.keys().map(String::as_str).collect();
    match store.check_batch(keys.iter().copied()).wait() {
        Ok(checks) => {
            for (key, check) in keys.iter().zip(checks) {
                match check {
                    Ok(KeyStatus::Completed(completed)) => drop(answers.insert(key, State::Completed(completed))),
                    Ok(KeyStatus::New) => drop(answers.insert(key, State::Absent)),
                    Ok(KeyStatus::InProgress(other)) => {
                        return Err(format!("{key} is blocked by an ended process: {other:?}"));
                    }
                    Err(error) => rejected.push(error),
                }
            }
        }
        Err(error) => rejected.push(error),
    }
    // Single calls: for keys that look new in a batch, for keys without an answer, and for a few others.
    for key in &keys {
        let is_needed = !key.contains("flushed") && !key.contains("recorded") || !answers.contains_key(key);
        if !is_needed && !rng.random_bool(0.02) {
            continue;
        }
        match (State::of(&store, key), answers.get(key)) {
            (Err(error), _) => rejected.push(error),
            (Ok(State::Completed(one)), Some(many)) if State::Completed(one.clone()) != *many => {
                return Err(format!("{key} is {one:?} alone and {many:?} in a batch"));
            }
            (Ok(state), _) => drop(answers.insert(key, state)),
        }
    }
    let fits = |events: usize| {
        let state_after = base.state_after(events);
        answers
            .iter()
            .find(|(key, state)| state_after[**key] != *state)
            .map(|(key, state)| (*key, state, state_after[key]))
    };
    let all = base.events.len();
    let Some(events) = (certain..=all).rev().find(|events| fits(*events).is_none()) else {
        let (key, state, state_after) = fits(all).unwrap();
        return Err(format!("{key} is {state:?}, but was {state_after:?}"));
    };
    let side_writes: Vec<u64> =
        base.side_writes.iter().filter(|(after, _)| *after <= events).map(|(_, offset)| *offset).collect();
    match store.outbox(usize::MAX).wait() {
        Ok(messages) => {
            let findings: Vec<&[u8]> = messages.iter().map(|message| &*message.payload).collect();
            let sent: Vec<String> = side_writes.iter().map(|offset| format!("message {offset}")).collect();
            if !findings.iter().copied().eq(sent.iter().map(String::as_bytes)) {
                return Err(format!("the outbox has {messages:?}, but had {sent:?}"));
            }
        }
        Err(error) => rejected.push(error),
    }
    match store.offset("orders", 3).wait() {
        Ok(offset) if offset == side_writes.last().copied() => {}
        Ok(offset) => return Err(format!("the offset is {offset:?}, but was {:?}", side_writes.last())),
        Err(error) => rejected.push(error),
    }
    // Tokens increase whatever was lost.
    match store.claim("a new key").wait() {
        Ok(Claim::Acquired(lease)) if lease.token().get() > base.last_token => drop(lease.release().wait()),
        Ok(other) => return Err(format!("a new key after token {}: {other:?}", base.last_token)),
        Err(error) => rejected.push(error),
    }
    // A compaction in the background may have found the damage in the meantime.
    rejected.extend(store.close().wait().err());
    Ok(match rejected.first() {
        None => Findings::Correct { missing: all - events },
        Some(error) => Findings::CallFailed(error.clone()),
    })
}

/// How many events of the newest log must survive this damage.
fn certain(base: &Base, damage: &Damage) -> usize {
    let all = base.events.len();
    if base.closed || damage.file != base.log {
        return all;
    }
    let damaged_to = match damage.harm {
        Harm::Flipped { .. } => damage.at + 1,
        Harm::CutOut { len } | Harm::Zeroed { len } => damage.at + len,
        Harm::CutTail => usize::MAX,
        Harm::Deleted => return all,
    };
    // The last write proves what was synced before it. Later records look like the unsynced tail of a crash.
    let is_told = damage.at < base.proven_synced && damaged_to <= base.events[all - 2].log_bytes;
    if is_told && (base.is_first || damage.at >= third_write(base)) {
        return all;
    }
    base.events.iter().filter(|event| event.log_bytes <= damage.at).count()
}

/// The start of the newest log's first record, and the end of each record.
fn record_edges(base: &Base) -> Vec<usize> {
    edges(&base.image.files[&base.log])
}

fn edges(log: &[u8]) -> Vec<usize> {
    let mut edges = vec![0];
    // A header has a checksum (4 bytes), the length of the payload (2) and a type (1).
    while let Some(header) = log.get(edges[edges.len() - 1]..).and_then(|rest| rest.first_chunk::<7>()) {
        edges.push(edges[edges.len() - 1] + header.len() + usize::from(u16::from_le_bytes([header[4], header[5]])));
    }
    assert_eq!(edges.last(), Some(&log.len()), "the undamaged log cannot be parsed");
    edges
}

/// The start of the newest log's third write: writes before it could be in an older log. The first record is RocksDB's
/// own, about the log before it.
fn third_write(base: &Base) -> usize {
    record_edges(base)[3]
}

/// True if a damage removes whole records from the newest log of a crashed store so that the result is a valid log:
/// that of a process that never wrote them, or wrote them to an older log.
fn is_undetectable(base: &Base, damage: &Damage) -> bool {
    let Harm::CutOut { len } = damage.harm else { return false };
    if base.closed || damage.file != base.log {
        return false;
    }
    let edges = record_edges(base);
    let is_whole = edges.contains(&damage.at) && edges.contains(&(damage.at + len));
    is_whole && (damage.at >= base.proven_synced || !base.is_first && damage.at < third_write(base))
}

fn rounds() -> u64 {
    number("ONLYONCE_CORRUPTION_ROUNDS").unwrap_or(DEFAULT_ROUNDS)
}

fn seed() -> u64 {
    number("ONLYONCE_CORRUPTION_SEED").unwrap_or_else(|| rand::rng().random::<u32>().into())
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().expect(name))
}

/// Aborts the process with a message if a round hangs.
struct Watchdog {
    round: Arc<AtomicU64>,
}

impl Watchdog {
    const PATIENCE_S: u32 = 60;

    fn new() -> Self {
        let round = Arc::new(AtomicU64::new(0));
        let watched = Arc::downgrade(&round);
        std::thread::spawn(move || {
            // Counts its own wakeups, not the clock: the suspend of a machine is not a hang.
            let (mut last, mut seconds) = (u64::MAX, 0);
            while let Some(round) = watched.upgrade().map(|round| round.load(Ordering::Relaxed)) {
                seconds = if round == last { seconds + 1 } else { 0 };
                last = round;
                if seconds > Self::PATIENCE_S {
                    eprintln!("round {round} hangs");
                    std::process::abort();
                }
                std::thread::sleep(Duration::from_secs(1));
            }
        });
        Self { round }
    }

    fn begin(&self, round: u64) {
        self.round.store(round, Ordering::Relaxed);
    }
}

/// What an error names.
#[derive(Debug, PartialEq)]
enum Named {
    File,
    /// The database. RocksDB sometimes reads a damaged properties block before its checksum, and does not name the file
    /// then.
    Database,
    Nothing,
}

impl Named {
    fn by(error: &Error, damage: &Damage) -> Self {
        let file = damage.file.file_name().unwrap().to_string_lossy();
        let named = match error {
            Error::Corrupt { place, detail } if !place.contains(&*file) && !detail.contains(&*file) => {
                return if file.ends_with(".sst") && place.ends_with("/db") { Self::Database } else { Self::Nothing };
            }
            Error::Corrupt { .. } => true,
            // A compaction in the background found it first, so that RocksDB rejects writes.
            Error::WriteFailed { source } => source.to_string().contains(&*file),
            Error::Poisoned { reason } => reason.contains(&*file),
            // A directory without the lock file is not a store.
            Error::NotAStore { .. } => file == "onlyonce.lock",
            _ => false,
        };
        if named { Self::File } else { Self::Nothing }
    }
}

/// The results of the rounds of one kind of file.
#[derive(Default)]
struct Count {
    rounds: u64,
    rejected: u64,
    rejected_without_file: u64,
    correct: u64,
    correct_without_tail: u64,
    time: Duration,
}

/// The results of all rounds.
#[derive(Default)]
struct Tally {
    counts: BTreeMap<&'static str, Count>,
    failures: Vec<String>,
}

impl Tally {
    fn print(&self) {
        let columns = ["kind", "rounds", "rejected by name", "rejected", "correct", "correct, no tail", "us each"];
        eprintln!("{}", columns.map(|column| format!("{column:>17}")).concat());
        for (kind, _) in KINDS {
            let Some(count) = self.counts.get(kind) else { continue };
            let micros = count.time.as_micros() as u64 / count.rounds;
            let Count { rounds, rejected, rejected_without_file, correct, correct_without_tail, .. } = count;
            let cells = [rounds, rejected, rejected_without_file, correct, correct_without_tail, &micros];
            eprintln!("{kind:>17}{}", cells.map(|cell| format!("{cell:>17}")).concat());
        }
    }
}

/// Damages one file of one store, and examines the store.
fn round(bases: &[Base], path: &Path, seed: u64, round: u64, tally: &Mutex<Tally>) {
    let mut rng = StdRng::seed_from_u64(seed << 32 ^ round);
    let base = &bases[rng.random_range(0..bases.len())];
    let mut image = base.image.clone();
    let damage = Damage::draw(&image, &mut rng);
    if is_undetectable(base, &damage) || !damage.inflict(&mut image) {
        return;
    }
    let begun = Instant::now();
    image.write(path);
    let certain = certain(base, &damage);
    let findings = std::panic::catch_unwind(AssertUnwindSafe(|| examine(base, path, certain, &mut rng)));
    let mut tally = tally.lock().unwrap();
    let count = tally.counts.entry(kind(&damage.file)).or_default();
    count.rounds += 1;
    count.time += begun.elapsed();
    let why = match findings {
        Err(_) => "a panic".to_owned(),
        Ok(Err(why)) => why,
        Ok(Ok(Findings::OpenFailed(error) | Findings::CallFailed(error))) => match Named::by(&error, &damage) {
            Named::File => return count.rejected += 1,
            Named::Database => return count.rejected_without_file += 1,
            Named::Nothing => format!("it fails with an error that does not name the file: {error:?}"),
        },
        Ok(Ok(Findings::Correct { missing: 0 })) => return count.correct += 1,
        Ok(Ok(Findings::Correct { .. })) => return count.correct_without_tail += 1,
    };
    let why = format!("round {round} of seed {seed}, closed: {}, {damage:?}: {why}", base.closed);
    eprintln!("{why}");
    tally.failures.push(why);
}

/// Calls `work` for each number in `first..end` on several threads, each with its own directory.
fn in_parallel(first: u64, end: u64, work: impl Fn(u64, &Path) + Sync) {
    let dir = scratch();
    let next = AtomicU64::new(first);
    std::thread::scope(|scope| {
        // More threads than cores, because an open mostly waits.
        for worker in 0..2 * std::thread::available_parallelism().unwrap().get() {
            let (work, next, path) = (&work, &next, dir.path().join(worker.to_string()));
            scope.spawn(move || {
                let watchdog = Watchdog::new();
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= end {
                        return;
                    }
                    if number > first && number.is_multiple_of(50_000) {
                        eprintln!("round {number} of {end}");
                    }
                    watchdog.begin(number);
                    work(number, &path);
                    let _ = std::fs::remove_dir_all(&path);
                }
            });
        }
    });
}

#[test]
fn damage_to_any_file_causes_no_wrong_answer() {
    let (rounds, seed) = (rounds(), seed());
    let first = number("ONLYONCE_CORRUPTION_FIRST").unwrap_or(0);
    eprintln!("ONLYONCE_CORRUPTION_SEED={seed} ONLYONCE_CORRUPTION_ROUNDS={rounds}");
    let bases = Base::all();
    let tally = Mutex::new(Tally::default());
    let begun = Instant::now();
    in_parallel(first, first + rounds, |number, path| round(&bases, path, seed, number, &tally));
    let tally = tally.into_inner().unwrap();
    tally.print();
    let elapsed = begun.elapsed();
    eprintln!("{rounds} rounds in {elapsed:.1?}, {:.1?} each", elapsed / u32::try_from(rounds.max(1)).unwrap());
    let failures = &tally.failures;
    assert!(failures.is_empty(), "{} failures: {:#?}", failures.len(), &failures[..failures.len().min(20)]);
    let missed: Vec<_> = KINDS.iter().filter(|(kind, _)| !tally.counts.contains_key(kind)).collect();
    assert!(rounds < DEFAULT_ROUNDS || missed.is_empty(), "no file of these kinds was damaged: {missed:?}");
}

#[test]
fn a_log_truncated_at_any_byte_loses_only_the_records_after_it() {
    let base = Base::new(false, true);
    let log_len = base.image.files[&base.log].len();
    // With many rounds, every byte.
    let step = if rounds() > DEFAULT_ROUNDS { 1 } else { 7 };
    in_parallel(0, (log_len / step) as u64 + 1, |number, path| {
        let mut image = base.image.clone();
        let at = number as usize * step;
        image.files.get_mut(&base.log).unwrap().truncate(at);
        image.write(path);
        let stored = base.events.iter().filter(|event| event.log_bytes <= at).count();
        let findings = examine(&base, path, stored, &mut StdRng::seed_from_u64(number)).unwrap();
        let Findings::Correct { missing } = findings else { panic!("truncated at {at} of {log_len}: {findings:?}") };
        assert_eq!(missing, base.events.len() - stored, "truncated at {at} of {log_len}");
    });
}

#[test]
fn damage_in_a_log_is_corruption_if_it_was_synced_and_a_torn_tail_if_not() {
    let base = Base::new(false, false);
    let seed = seed();
    eprintln!("ONLYONCE_CORRUPTION_SEED={seed}");
    let log_len = base.image.files[&base.log].len();
    let last_but_one = base.events[base.events.len() - 2].log_bytes;
    in_parallel(0, rounds() / 4, |number, path| {
        let mut rng = StdRng::seed_from_u64(seed << 32 ^ number);
        let mut image = base.image.clone();
        let log = image.files.get_mut(&base.log).unwrap();
        // Half of them after the bytes that the last write proves to be synced.
        let begin = if rng.random_bool(0.5) { base.proven_synced } else { 0 };
        let at = rng.random_range(begin..log_len);
        let end = rng.random_range(at..log_len.min(at + 40)) + 1;
        for byte in &mut log[at..end] {
            *byte ^= rng.random_range(1..=255_u8);
        }
        image.write(path);
        let stored = base.events.iter().filter(|event| event.log_bytes <= at).count();
        let findings = examine(&base, path, stored, &mut rng);
        let what = format!("round {number} of seed {seed}: {at}..{end} of {log_len}: {findings:?}");
        match findings {
            Ok(Findings::OpenFailed(Error::Corrupt { place, .. })) => {
                assert!(at < base.proven_synced && place.ends_with(base.log.to_str().unwrap()), "{what}");
            }
            Ok(Findings::Correct { missing }) => {
                assert_eq!(missing, base.events.len() - stored, "{what}");
                assert!(at >= base.proven_synced || end > last_but_one, "{what}");
            }
            _ => panic!("{what}"),
        }
    });
}

/// Records over several blocks of the log, and a small one between them and at the end, each with the log's length after it.
fn long_records() -> (Image, PathBuf, Vec<(String, usize)>, u64) {
    let dir = scratch();
    let path = dir.path().join("store");
    let clock = ManualClock::at(Timestamp::from_unix_ms(START_MS));
    let store = builder(&clock).open(&path).unwrap();
    let log = Image::read(&path).newest(".log");
    let mut records = Vec::new();
    for (number, bytes) in [100, 100_000, 100, 70_000, 33_000, 100, 120_000].into_iter().enumerate() {
        let key = format!("long-{number}");
        let Claim::Acquired(lease) = store.claim(&key).wait().unwrap() else { panic!("{key} is new") };
        lease.complete(vec![b'r'; bytes]).wait().unwrap();
        records.push((key, log_bytes(&path.join(&log))));
    }
    (Image::read(&path), log, records, clock_ms(&clock))
}

#[test]
fn a_record_over_several_blocks_of_the_log_is_atomic() {
    let (image, log, records, now_ms) = long_records();
    let log_len = image.files[&log].len();
    // Around the ends of blocks and of records, so that headers are truncated, too.
    let edges = (0..=log_len).step_by(32 * 1024).chain(records.iter().map(|(_, end)| *end));
    let cuts: BTreeSet<usize> = edges.flat_map(|edge| edge.saturating_sub(8)..(edge + 9).min(log_len + 1)).collect();
    let cuts: Vec<usize> = cuts.into_iter().collect();
    in_parallel(0, cuts.len() as u64, |number, path| {
        let cut = cuts[number as usize];
        let mut image = image.clone();
        image.files.get_mut(&log).unwrap().truncate(cut);
        image.write(path);
        let store = builder(&ManualClock::at(Timestamp::from_unix_ms(now_ms))).open(path);
        let store = store.unwrap_or_else(|error| panic!("truncated at {cut} of {log_len}: {error}"));
        for (key, end) in &records {
            let stored = matches!(store.check(key).wait().unwrap(), KeyStatus::Completed(_));
            assert_eq!(stored, *end <= cut, "{key}, which ends at {end}, truncated at {cut} of {log_len}");
        }
    });
}

#[test]
fn a_block_of_zeros_is_corruption_if_it_was_synced_and_a_torn_tail_if_not() {
    let (image, log, records, now_ms) = long_records();
    let log_len = image.files[&log].len();
    let sectors = log_len.div_ceil(512);
    // The last claim and the last completion prove that everything up to the completion before them was synced.
    let proven_synced = records[records.len() - 2].1;
    let last_claim = proven_synced..proven_synced + 200;
    in_parallel(0, sectors as u64 / 4, |number, path| {
        let mut rng = StdRng::seed_from_u64(number);
        // A few sectors, and in every second round all sectors after them.
        let from = number as usize * 4 * 512;
        let torn = rng.random_bool(0.5);
        let to = if torn { log_len } else { (from + 512 * rng.random_range(1..16)).min(log_len) };
        let mut image = image.clone();
        image.files.get_mut(&log).unwrap()[from..to].fill(0);
        image.write(path);
        let what = format!("zeros from {from} to {to} of {log_len}");
        match builder(&ManualClock::at(Timestamp::from_unix_ms(now_ms))).open(path) {
            Ok(store) => {
                assert!(
                    from >= proven_synced || to > last_claim.start,
                    "{what}: later records are lost without an error"
                );
                for (key, end) in &records {
                    let stored = matches!(store.check(key).wait().unwrap(), KeyStatus::Completed(_));
                    assert_eq!(stored, *end <= from, "{what}: {key}, which ends at {end}");
                }
            }
            Err(Error::Corrupt { place, .. }) => {
                assert!(from < proven_synced && to <= last_claim.end, "{what}: an error without a lost synced record");
                assert!(place.ends_with(log.to_str().unwrap()), "{what}: {place}");
            }
            Err(error) => panic!("{what}: {error}"),
        }
    });
}

#[test]
fn a_missing_or_truncated_log_before_a_newer_one_is_corruption() {
    let dir = scratch();
    let path = dir.path().join("store");
    let clock = ManualClock::at(Timestamp::from_unix_ms(START_MS));
    // Two logs that are both needed: the journal's memtable was full once, and the removal of a flushed key, which is
    // still in its bucket's memtable, keeps the older log.
    let open = |path: &Path| builder(&clock).memory_budget(1 << 30).durability(Durability::Disk).open(path);
    let store = open(&path).unwrap();
    complete(&store, "flushed and forgotten");
    store.flush().unwrap();
    store.forget("flushed and forgotten").wait().unwrap();
    // A quarter of it after the older log, so that the file manifest has the newer one.
    let keys: Vec<String> = (0..96).map(|i| format!("key-{i}")).collect();
    for key in &keys {
        let Claim::Acquired(lease) = store.claim(key).wait().unwrap() else { panic!("{key} is new") };
        lease.complete(vec![b'r'; 900_000]).wait().unwrap();
    }
    let image = Image::read_at_rest(&path);
    store.close().wait().unwrap();
    let logs = image.logs();
    let [older, newer] = logs.as_slice() else { panic!("two logs: {logs:?}") };
    let log_len = image.files[older].len();

    let copy = dir.path().join("copy");
    let try_with = |damaged: &Image| {
        damaged.write(&copy);
        let opened = open(&copy);
        let answers = opened.map(|store| {
            let checks: Vec<KeyStatus> = keys.iter().map(|key| store.check(key).wait().unwrap()).collect();
            let forgotten = store.check("flushed and forgotten").wait().unwrap();
            store.close().wait().unwrap();
            (checks.iter().filter(|check| matches!(check, KeyStatus::Completed(_))).count(), forgotten)
        });
        std::fs::remove_dir_all(&copy).unwrap();
        answers
    };
    assert_eq!(try_with(&image).unwrap(), (keys.len(), KeyStatus::New), "as a crash leaves it");
    for cut in [1, 3, 1_000, 900_000, 5_000_000, log_len - 10, log_len] {
        let mut damaged = image.clone();
        damaged.files.get_mut(older).unwrap().truncate(log_len - cut);
        let answers = try_with(&damaged);
        assert!(
            matches!(&answers, Err(Error::Corrupt { .. })),
            "the older log without its last {cut} bytes: {answers:?}"
        );
    }
    for missing_log in [older, newer] {
        let mut damaged = image.clone();
        damaged.files.remove(missing_log);
        let answers = try_with(&damaged);
        assert!(matches!(&answers, Err(Error::Corrupt { .. })), "{missing_log:?} is missing: {answers:?}");
    }
}

/// The first record of a log, written by RocksDB: the length of the log before it.
fn predecessor(log: u64, len: usize) -> Vec<u8> {
    let checked = [&[130][..], &log.to_le_bytes(), &(len as u64).to_le_bytes(), &99_u64.to_le_bytes()].concat();
    let crc = crc32c::crc32c(&checked).rotate_right(15).wrapping_add(0xa282_ead8);
    let len = u16::try_from(checked.len() - 1).unwrap();
    [&crc.to_le_bytes()[..], &len.to_le_bytes(), &checked].concat()
}

#[test]
fn a_log_that_a_power_cut_truncated_between_two_records_ends_there_although_a_newer_one_exists() {
    let dir = scratch();
    let path = dir.path().join("store");
    let clock = ManualClock::at(Timestamp::from_unix_ms(START_MS));
    let open = |path: &Path| builder(&clock).durability(Durability::Process).open(path);
    let store = open(&path).unwrap();
    let log = Image::read(&path).newest(".log");
    let keys: Vec<String> = (0..8).map(|i| format!("key-{i}")).collect();
    let mut ends = Vec::new();
    for key in &keys {
        complete(&store, key);
        ends.push(log_bytes(&path.join(&log)));
    }
    let image = Image::read_at_rest(&path);
    drop(store);
    let number: u64 = log.file_stem().unwrap().to_str().unwrap().parse().unwrap();
    let newer = log.with_file_name(format!("{:06}.log", number + 1));
    let bytes = &image.files[&log];
    assert_eq!(bytes.len(), ends[keys.len() - 1]);
    let edges = edges(bytes);
    for edge in edges[..edges.len() - 1].iter().copied() {
        let mut torn = image.clone();
        torn.files.get_mut(&log).unwrap().truncate(edge);
        torn.files.insert(newer.clone(), predecessor(number, bytes.len()));
        let copy = dir.path().join("copy");
        torn.write(&copy);
        let store = open(&copy).unwrap_or_else(|error| panic!("truncated at {edge} of {}: {error}", bytes.len()));
        for (key, end) in keys.iter().zip(&ends) {
            let stored = matches!(store.check(key).wait().unwrap(), KeyStatus::Completed(_));
            assert_eq!(stored, *end <= edge, "{key}, which ends at {end}, truncated at {edge}");
        }
        // New records are not confused with the lost ones.
        complete(&store, "after the loss");
        store.close().wait().unwrap();
        let reopened = open(&copy).unwrap();
        assert!(matches!(reopened.check("after the loss").wait().unwrap(), KeyStatus::Completed(_)));
        drop(reopened);
        std::fs::remove_dir_all(&copy).unwrap();
    }
}
