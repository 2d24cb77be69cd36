//! Damaged files: flipped bits, removed bytes, zeroed blocks and missing files, in every kind of file that a store has.
//! After any damage the store fails with an error that names the file, or answers correctly: never a wrong answer, a
//! panic, a hang, or a store that is silently empty.
//!
//! What nothing on disk can reveal has a test of its own, which says so: damage to the last records of a killed process, after
//! the last mark of its journal, looks like the torn tail that a power cut leaves.
//!
//! `ONLYONCE_CORRUPTION_ROUNDS` (default: 600) sets the rounds, `ONLYONCE_CORRUPTION_SEED` (default: random, and
//! printed) the seed, and `ONLYONCE_CORRUPTION_FIRST` the first round. A round depends on the seed and its number
//! alone, so that it can be repeated: the same kind of file and of damage, but not the same byte, because each store
//! has a new random secret.

mod common;
#[path = "common/damage.rs"]
mod damage;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::START_MS;
use damage::{BLOCK, DATA_START, Damage, Harm, Image, KINDS, Others, Prediction, Segment, kind, predict};
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

/// One change of one key, and the lsn of the journal's next fragment after it.
struct Event {
    key: String,
    state: State,
    lsn: u64,
}

/// A store with data of every kind, and its expected state.
struct Base {
    image: Image,
    /// The same store earlier.
    earlier: Vec<Image>,
    /// True if it was closed; otherwise it is as a crash leaves it.
    closed: bool,
    /// The state of each key before the first event.
    before: BTreeMap<String, State>,
    /// The changes at the end of the journal.
    events: Vec<Event>,
    /// The number in the offset and the message of completions, each with the number of events before it.
    side_writes: Vec<(usize, u64)>,
    now_ms: u64,
    /// The lsn of the journal's next fragment before the first event.
    before_lsn: u64,
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

impl Base {
    /// Closed or crashed; the last process flushed keys first, or found keys in the journal; and written with system calls or
    /// through a mapping.
    fn all() -> Vec<Self> {
        let kinds = [(false, false), (false, true), (true, false), (true, true)];
        let kinds = kinds.into_iter().flat_map(|(closed, flush_first)| {
            [Durability::Disk, Durability::Process].map(|durability| (closed, flush_first, durability))
        });
        kinds.map(|(closed, flush_first, durability)| Self::new(closed, flush_first, durability)).collect()
    }

    fn new(closed: bool, flush_first: bool, durability: Durability) -> Self {
        let dir = scratch();
        let path = dir.path().join("store");
        let clock = ManualClock::at(Timestamp::from_unix_ms(START_MS));
        let open = || builder(&clock).durability(durability).open(&path).unwrap();
        let mut keys: Vec<String> = (0..40).map(|i| format!("never-seen-{i}")).collect();
        let mut add = |key: String| {
            keys.push(key.clone());
            key
        };
        let mut earlier = Vec::new();
        let store = open();
        for bucket in 0..2 {
            // The first bucket has one SST of several blocks, the second has two. More buckets would make each open slower.
            for sst in 0..1 + bucket {
                (0..10).for_each(|i| complete(&store, &add(format!("flushed-{bucket}-{sst}-{i}"))));
                let many = if bucket == 0 { 200 } else { 10 };
                let recorded: Vec<String> = (0..many).map(|i| add(format!("recorded-{bucket}-{sst}-{i}"))).collect();
                store.record_batch(&recorded).wait().unwrap();
                (0..3).for_each(|i| leave_in_flight(&store, &add(format!("in-flight-{bucket}-{sst}-{i}"))));
                earlier.push(Image::read(&path));
                store.flush().unwrap();
            }
            clock.advance(Duration::from_secs(10));
        }
        // Records that the last process finds in the journal.
        (0..10).for_each(|i| complete(&store, &add(format!("journal-{i}"))));
        (0..3).for_each(|i| leave_in_flight(&store, &add(format!("journal-in-flight-{i}"))));
        store.forget("flushed-0-0-0").wait().unwrap();
        let Claim::Acquired(lease) = store.claim(add("journal-with-more".to_owned())).wait().unwrap() else {
            panic!("the key is new")
        };
        complete_with(lease, "the result of journal-with-more", 1);
        store.close().wait().unwrap();
        drop(store);
        earlier.push(Image::read(&path));
        let store = open();
        wait_for_filters(&path.join("filters"), 2);
        if flush_first {
            clock.advance(Duration::from_secs(10));
            (0..10).for_each(|i| complete(&store, &add(format!("flushed-late-{i}"))));
            store.flush().unwrap();
        }

        let new: Vec<String> = (0..12).map(|i| add(format!("last-{i}"))).collect();
        let before = keys.iter().map(|key| (key.clone(), State::of(&store, key).unwrap())).collect();
        earlier.push(Image::read_at_rest(&path));
        let before_lsn = Image::read(&path).next_lsn();
        let mut events = Vec::new();
        let mut side_writes = vec![(0, 1)];
        let mut add_event = |key: &str| {
            let state = State::of(&store, key).unwrap();
            events.push(Event { key: key.to_owned(), state, lsn: Image::read(&path).next_lsn() });
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
        let Claim::Acquired(lease) = store.claim("in-flight-1-0-0").wait().unwrap() else {
            panic!("its process has ended")
        };
        add_event("in-flight-1-0-0");
        let last_token = lease.token().get();
        lease.complete("at the second attempt").wait().unwrap();
        add_event("in-flight-1-0-0");
        if closed {
            earlier.push(Image::read(&path));
            store.close().wait().unwrap();
        }
        let image = Image::read_at_rest(&path);
        Self { image, earlier, closed, before, events, side_writes, now_ms: clock_ms(&clock), before_lsn, last_token }
    }

    /// How many events there are in a journal that ends at this lsn.
    fn events_before(&self, lsn: u64) -> usize {
        self.events.iter().filter(|event| event.lsn <= lsn).count()
    }

    /// How many events this damage must leave, and whether it must be an error.
    fn expectation(&self, damaged: &Image) -> Expectation {
        match predict(&self.image, damaged) {
            Prediction::Corrupt => Expectation { events: self.events.len(), is_error: true, is_known: true },
            Prediction::EndsAt(lsn) => {
                Expectation { events: self.events_before(lsn), is_error: false, is_known: lsn >= self.before_lsn }
            }
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

/// What damage to the journal must lead to.
#[derive(Debug, Clone, Copy)]
struct Expectation {
    /// How many events there are.
    events: usize,
    is_error: bool,
    /// Whether the state before the first event is known. The journal may end before it.
    is_known: bool,
}

impl Expectation {
    /// Nothing is lost.
    fn all(base: &Base) -> Self {
        Self { events: base.events.len(), is_error: false, is_known: true }
    }
}

/// The result of an examination of a damaged store.
#[derive(Debug)]
enum Findings {
    OpenFailed(Error),
    /// Some calls failed, the first of them with this error; the other answers are correct.
    CallFailed(Error),
    /// All answers are correct, without the last `missing` events.
    Correct {
        missing: usize,
    },
}

/// Opens the store in `path`, and checks every key. The first events must be stored, as many as expected.
fn examine(base: &Base, path: &Path, expectation: Expectation, rng: &mut StdRng) -> Result<Findings, String> {
    let clock = ManualClock::at(Timestamp::from_unix_ms(base.now_ms));
    let store = match builder(&clock).open(path) {
        Ok(store) => store,
        Err(error) => return Ok(Findings::OpenFailed(error)),
    };
    if !expectation.is_known {
        store.close().wait().unwrap();
        return Ok(Findings::Correct { missing: base.events.len() });
    }
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
    let Some(events) = (expectation.events..=all).rev().find(|events| fits(*events).is_none()) else {
        let (key, state, state_after) = fits(expectation.events).unwrap();
        return Err(format!("{key} is {state:?}, but was {state_after:?} after {} events", expectation.events));
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
                    // Not captured, so that it is printed although the process aborts.
                    let _ = writeln!(std::io::stderr(), "round {round} hangs");
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
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Named {
    File,
    /// What the file is a part of: the database, or another segment of the journal. RocksDB sometimes reads a damaged
    /// properties block before its checksum, and does not name the file then. An SST may be missing because the manifest is
    /// an old one.
    Database,
    Nothing,
}

impl Named {
    fn by(error: &Error, damage: &Damage) -> Self {
        let swapped = match &damage.harm {
            Harm::Swapped { with } => Some(with),
            _ => None,
        };
        let names = [&damage.file].into_iter().chain(swapped).map(|file| Self::file(error, file));
        names.min().unwrap()
    }

    fn file(error: &Error, file: &Path) -> Self {
        let file = file.file_name().unwrap().to_string_lossy();
        let named = match error {
            Error::Corrupt { place, detail } if !place.contains(&*file) && !detail.contains(&*file) => {
                let is_near = file.ends_with(".sst") && place.ends_with("/db")
                    || file.ends_with(".journal") && (place.contains("/journal/") || place.ends_with("/journal"))
                    || file.starts_with("MANIFEST") && (place.contains(".sst of ") || detail.contains("MANIFEST file"))
                    || file == "CURRENT" && place.contains("MANIFEST");
                return if is_near { Self::Database } else { Self::Nothing };
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
fn round(bases: &[Base], foreign: &Image, path: &Path, seed: u64, round: u64, tally: &Mutex<Tally>) {
    let mut rng = StdRng::seed_from_u64(seed << 32 ^ round);
    let base = &bases[rng.random_range(0..bases.len())];
    let mut image = base.image.clone();
    let others = Others { earlier: &base.earlier, foreign };
    let damage = Damage::draw(&image, &others, &mut rng);
    if !damage.inflict(&mut image, &others) {
        return;
    }
    if number("ONLYONCE_CORRUPTION_FIRST").is_some() {
        eprintln!("round {round}: {damage:?}");
    }
    let begun = Instant::now();
    image.write(path);
    let expectation = base.expectation(&image);
    let findings = std::panic::catch_unwind(AssertUnwindSafe(|| examine(base, path, expectation, &mut rng)));
    let mut tally = tally.lock().unwrap();
    let count = tally.counts.entry(kind(&damage.file)).or_default();
    count.rounds += 1;
    count.time += begun.elapsed();
    let why = match findings {
        Err(_) => "a panic".to_owned(),
        Ok(Err(why)) => why,
        Ok(Ok(Findings::OpenFailed(error) | Findings::CallFailed(error))) => match Named::by(&error, &damage) {
            Named::Nothing => format!("it fails with an error that does not name the file: {error:?}"),
            _ if kind(&damage.file) == "journal" && !expectation.is_error && !is_exchanged(&damage) => {
                format!("it fails, but nothing on disk says that something is missing: {error:?}")
            }
            Named::File => return count.rejected += 1,
            Named::Database => return count.rejected_without_file += 1,
        },
        Ok(Ok(findings)) if expectation.is_error && !is_exchanged(&damage) => format!("no error: {findings:?}"),
        Ok(Ok(Findings::Correct { missing: 0 })) => return count.correct += 1,
        Ok(Ok(Findings::Correct { .. })) => return count.correct_without_tail += 1,
    };
    let why = format!("round {round} of seed {seed}, closed: {}, {damage:?}, {expectation:?}: {why}", base.closed);
    eprintln!("{why}");
    tally.failures.push(why);
}

/// Whether there is another file in its place now, which may be an error of its own.
fn is_exchanged(damage: &Damage) -> bool {
    matches!(damage.harm, Harm::Replaced { .. } | Harm::Swapped { .. })
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

/// Another store with files of every kind.
fn foreign() -> Image {
    let dir = scratch();
    let path = dir.path().join("store");
    let clock = ManualClock::at(Timestamp::from_unix_ms(START_MS));
    let store = builder(&clock).open(&path).unwrap();
    for bucket in 0..2 {
        (0..20).for_each(|i| complete(&store, &format!("foreign-{bucket}-{i}")));
        store.flush().unwrap();
        clock.advance(Duration::from_secs(10));
    }
    wait_for_filters(&path.join("filters"), 1);
    (0..20).for_each(|i| complete(&store, &format!("foreign-{i}")));
    store.close().wait().unwrap();
    Image::read(&path)
}

#[test]
fn damage_to_any_file_causes_no_wrong_answer() {
    let (rounds, seed) = (rounds(), seed());
    let first = number("ONLYONCE_CORRUPTION_FIRST").unwrap_or(0);
    eprintln!("ONLYONCE_CORRUPTION_SEED={seed} ONLYONCE_CORRUPTION_ROUNDS={rounds}");
    let (bases, foreign) = (Base::all(), foreign());
    let tally = Mutex::new(Tally::default());
    let begun = Instant::now();
    in_parallel(first, first + rounds, |number, path| round(&bases, &foreign, path, seed, number, &tally));
    let tally = tally.into_inner().unwrap();
    tally.print();
    let elapsed = begun.elapsed();
    eprintln!("{rounds} rounds in {elapsed:.1?}, {:.1?} each", elapsed / u32::try_from(rounds.max(1)).unwrap());
    let failures = &tally.failures;
    assert!(failures.is_empty(), "{} failures: {:#?}", failures.len(), &failures[..failures.len().min(20)]);
    let missed: Vec<_> = KINDS.iter().filter(|(kind, _)| !tally.counts.contains_key(kind)).collect();
    assert!(rounds < DEFAULT_ROUNDS || missed.is_empty(), "no file of these kinds was damaged: {missed:?}");
}

/// The offsets at which the records of a manifest begin, and its end. It is shorter than a block of its log.
fn manifest_records(manifest: &[u8]) -> Vec<usize> {
    let mut starts = vec![0];
    let mut at = 0;
    while let Some(&[_, _, _, _, low, high, _]) = manifest.get(at..).and_then(|rest| rest.first_chunk::<7>()) {
        at += 7 + usize::from(u16::from_le_bytes([low, high]));
        starts.push(at);
    }
    assert!(at == manifest.len() && at < 32 << 10, "{at} of {}", manifest.len());
    starts
}

/// Each record has a checksum, and none says how many there are.
#[test]
fn a_manifest_that_lacks_some_of_its_records_causes_no_wrong_answer() {
    let bases = Base::all();
    let is_manifest = |path: &&PathBuf| kind(path) == "MANIFEST";
    let mut cuts = Vec::new();
    for (number, base) in bases.iter().enumerate() {
        let path = base.image.files.keys().find(is_manifest).unwrap();
        let starts = manifest_records(&base.image.files[path]);
        // With more rounds, any number of records.
        let most = if rounds() > DEFAULT_ROUNDS { starts.len() } else { 4 };
        for (first, start) in starts.iter().enumerate() {
            cuts.extend(starts.iter().skip(first + 1).take(most).map(|end| (number, path, *start..*end)));
        }
    }
    let (failures, rejected) = (Mutex::new(Vec::new()), AtomicU64::new(0));
    in_parallel(0, cuts.len() as u64, |round, path| {
        let (number, manifest, cut) = &cuts[round as usize];
        let base = &bases[*number];
        let mut image = base.image.clone();
        image.files.get_mut(*manifest).unwrap().drain(cut.clone());
        image.write(path);
        match examine(base, path, Expectation::all(base), &mut StdRng::seed_from_u64(round)) {
            Ok(Findings::Correct { missing: 0 }) => {}
            Ok(Findings::OpenFailed(Error::Corrupt { .. }) | Findings::CallFailed(Error::Corrupt { .. })) => {
                rejected.fetch_add(1, Ordering::Relaxed);
            }
            other => failures.lock().unwrap().push(format!("closed: {}, {cut:?}: {other:?}", base.closed)),
        }
    });
    let (failures, rejected) = (failures.into_inner().unwrap(), rejected.into_inner());
    eprintln!("{} cuts, {rejected} rejected", cuts.len());
    assert!(failures.is_empty(), "{} of {}: {:#?}", failures.len(), cuts.len(), &failures[..failures.len().min(20)]);
    assert!(rejected > cuts.len() as u64 / 2);
}

/// RocksDB deletes what its manifest does not list, and the journal says whether the manifest is whole.
#[test]
fn an_open_that_cannot_read_the_journal_changes_nothing_in_the_database() {
    let base = Base::new(false, true, Durability::Disk);
    let dir = scratch();
    let path = dir.path().join("store");
    let segments = base.image.segments();
    for segment in &segments {
        let mut image = base.image.clone();
        let bytes = image.files.get_mut(&segment.file).unwrap();
        bytes[..DATA_START].fill(0x5a);
        image.write(&path);
        let opened = builder(&ManualClock::at(Timestamp::from_unix_ms(base.now_ms))).open(&path);
        let Err(Error::Corrupt { place, .. }) = opened else { panic!("{opened:?}") };
        assert!(place.contains("journal"), "{place}");
        let after = Image::read(&path);
        let database = |image: &Image| -> Vec<_> {
            let files = image.files.iter().filter(|(path, _)| path.starts_with("db"));
            files.map(|(path, bytes)| (path.clone(), bytes.clone())).collect()
        };
        assert!(database(&after) == database(&image), "{:?}", after.files.keys());
        std::fs::remove_dir_all(&path).unwrap();
    }
}

/// Examines a store whose journal is damaged. It must be exactly as predicted: corrupt, or without the events that are lost.
fn assert_predicted(base: &Base, damaged: &Image, path: &Path, what: &str) -> Prediction {
    damaged.write(path);
    let prediction = predict(&base.image, damaged);
    let expectation = base.expectation(damaged);
    let findings = examine(base, path, expectation, &mut StdRng::seed_from_u64(0));
    match (&findings, prediction) {
        (Ok(Findings::OpenFailed(Error::Corrupt { place, .. })), Prediction::Corrupt) => {
            assert!(place.contains(".journal"), "{what}: {place}");
        }
        (Ok(Findings::Correct { missing }), Prediction::EndsAt(_)) => {
            assert_eq!(*missing, base.events.len() - expectation.events, "{what}, {prediction:?}");
        }
        _ => panic!("{what}: {findings:?}, but {prediction:?}"),
    }
    prediction
}

/// The segment with the last fragments.
fn last_written(image: &Image) -> Segment {
    image.segments().into_iter().rfind(|segment| !segment.fragments.is_empty()).unwrap()
}

#[test]
fn a_journal_that_ends_at_any_byte_is_corrupt_or_has_everything_before_it() {
    for closed in [false, true] {
        let base = Base::new(closed, true, Durability::Disk);
        let last = last_written(&base.image);
        // With many rounds, every byte.
        let step = if rounds() > DEFAULT_ROUNDS { 1 } else { 17 };
        let missed = AtomicU64::new(0);
        // Before the first event is the checkpoint of the flush. Nothing is left in a running journal that says that it was on
        // disk if all of this is lost.
        let begin = last.fragments.iter().find(|fragment| fragment.lsn >= base.before_lsn).unwrap().at;
        let begin = if closed { DATA_START } else { begin };
        let ends: Vec<_> = (begin..last.end()).step_by(step).chain([last.end()]).collect();
        in_parallel(0, ends.len() as u64, |number, path| {
            let at = ends[number as usize];
            let mut image = base.image.clone();
            image.files.get_mut(&last.file).unwrap()[at..].fill(0);
            let prediction = assert_predicted(&base, &image, path, &format!("zeros from {at}, closed: {closed}"));
            // The bytes after `at` may have been zeros before.
            let is_same = image.files == base.image.files;
            assert!(!is_same || prediction != Prediction::Corrupt, "nothing is damaged at {at}, closed: {closed}");
            missed.fetch_add(u64::from(!is_same && prediction != Prediction::Corrupt), Ordering::Relaxed);
        });
        let missed = missed.into_inner();
        assert_eq!(missed == 0, closed, "{missed} of {} ends look like a torn tail, closed: {closed}", ends.len());
    }
}

#[test]
fn damage_in_a_journal_is_corruption_if_it_was_synced_and_a_torn_tail_if_not() {
    let base = Base::new(false, false, Durability::Disk);
    let seed = seed();
    eprintln!("ONLYONCE_CORRUPTION_SEED={seed}");
    let last = last_written(&base.image);
    let stated = last.fragments.iter().map(|fragment| fragment.durable_lsn).max().unwrap();
    let proven = last.fragments.iter().find(|fragment| fragment.lsn >= stated).unwrap().at;
    let [corrupt, torn] = [(); 2].map(|()| AtomicU64::new(0));
    in_parallel(0, rounds() / 4, |number, path| {
        let mut rng = StdRng::seed_from_u64(seed << 32 ^ number);
        let mut image = base.image.clone();
        let bytes = image.files.get_mut(&last.file).unwrap();
        // Half of them after the bytes that the last write proves to be synced.
        let begin = if rng.random_bool(0.5) { proven } else { DATA_START };
        let at = rng.random_range(begin..last.end());
        let end = rng.random_range(at..last.end().min(at + 40)) + 1;
        for byte in &mut bytes[at..end] {
            *byte ^= rng.random_range(1..=255_u8);
        }
        let what = format!("round {number} of seed {seed}: {at}..{end} of {}", last.end());
        match assert_predicted(&base, &image, path, &what) {
            Prediction::Corrupt => corrupt.fetch_add(1, Ordering::Relaxed),
            Prediction::EndsAt(_) => torn.fetch_add(1, Ordering::Relaxed),
        };
    });
    let [corrupt, torn] = [corrupt, torn].map(AtomicU64::into_inner);
    eprintln!("{corrupt} times corrupt, {torn} times a torn tail");
    assert!(corrupt > 0 && torn > 0, "{corrupt}, {torn}");
}

#[test]
fn damage_to_what_a_killed_process_wrote_after_its_last_mark_looks_like_a_torn_tail() {
    let dir = scratch();
    let (path, copy) = (dir.path().join("store"), dir.path().join("copy"));
    let clock = ManualClock::at(Timestamp::from_unix_ms(START_MS));
    let store = builder(&clock).open(&path).unwrap();
    // A mark is written within 100 ms, so it takes a few attempts to be faster.
    let (last, image) = (0..1_000)
        .find_map(|number| {
            let key = format!("last-{number}");
            complete(&store, &key);
            let image = Image::read(&path);
            let last = last_written(&image);
            let fragment = last.fragments.last().unwrap();
            (fragment.end - fragment.at > 40).then_some((key, image))
        })
        .expect("an image without a mark at its end");
    let segment = last_written(&image);
    let end = segment.end();
    let mut unmarked = image.clone();
    unmarked.files.get_mut(&segment.file).unwrap()[end - 1] ^= 1;
    unmarked.write(&copy);
    let found = builder(&clock).open(&copy).unwrap();
    assert!(
        matches!(found.check(&last).wait().unwrap(), KeyStatus::InProgress(_) | KeyStatus::New),
        "it is not noticed"
    );
    drop(found);
    std::fs::remove_dir_all(&copy).unwrap();

    let mut marked = Image::read_at_rest(&path);
    assert_eq!(marked.files[&segment.file][..end], image.files[&segment.file][..end], "only the mark is new");
    assert!(marked.next_lsn() > image.next_lsn());
    marked.files.get_mut(&segment.file).unwrap()[end - 1] ^= 1;
    marked.write(&copy);
    let Err(Error::Corrupt { place, .. }) = builder(&clock).open(&copy) else { panic!("it is not noticed") };
    assert!(place.contains(segment.file.file_name().unwrap().to_str().unwrap()), "{place}");
}

/// A killed store with large records, some of which are in two segments: keys with the lsn of the next fragment after each.
struct LongRecords {
    image: Image,
    records: Vec<(String, u64)>,
    now_ms: u64,
}

impl LongRecords {
    fn new() -> Self {
        let dir = scratch();
        let path = dir.path().join("store");
        let clock = ManualClock::at(Timestamp::from_unix_ms(START_MS));
        // Segments of at most a mebibyte, so that the last record does not fit into one.
        let store = builder(&clock).spare_segments(0).result_limit(2 << 20).open(&path).unwrap();
        let mut records = Vec::new();
        let sizes = [100, 100_000, 100, 170_000, 33_000, 100, 500_000, 100, 1_500_000];
        for (number, bytes) in sizes.into_iter().enumerate() {
            let key = format!("long-{number}");
            let Claim::Acquired(lease) = store.claim(&key).wait().unwrap() else { panic!("{key} is new") };
            lease.complete(vec![b'r'; bytes]).wait().unwrap();
            records.push((key, Image::read(&path).next_lsn()));
        }
        let image = Image::read(&path);
        let segments = image.segments();
        assert!(segments.len() > 3 && segments.last().is_some_and(|segment| !segment.fragments[0].begins_record));
        Self { image, records, now_ms: clock_ms(&clock) }
    }

    fn open(&self, path: &Path) -> onlyonce::Result<Store> {
        builder(&ManualClock::at(Timestamp::from_unix_ms(self.now_ms))).open(path)
    }

    fn check(&self, damaged: &Image, path: &Path, what: &str) -> Prediction {
        damaged.write(path);
        let prediction = predict(&self.image, damaged);
        match (self.open(path), prediction) {
            (Ok(store), Prediction::EndsAt(lsn)) => {
                for (key, end) in &self.records {
                    let stored = matches!(store.check(key).wait().unwrap(), KeyStatus::Completed(_));
                    assert_eq!(stored, *end <= lsn, "{what}: {key}, which ends at {end}, of {prediction:?}");
                }
            }
            (Err(Error::Corrupt { place, .. }), Prediction::Corrupt) => {
                assert!(place.contains(".journal"), "{what}: {place}");
            }
            (opened, _) => {
                let segments = self.image.segments();
                panic!("{what}: {:?}, but {prediction:?}; {segments:#?}", opened.map(drop));
            }
        }
        prediction
    }
}

#[test]
fn a_record_in_several_segments_is_atomic() {
    let long = LongRecords::new();
    let segments = long.image.segments();
    // Around the ends of fragments and of blocks, so that headers are torn, too. What was written after it is lost as well, as
    // a power cut leaves it: the last record is not synced.
    let last = long.records.len() - 2;
    let from_lsn = long.records[last].1;
    let mut ends = BTreeSet::new();
    for (index, segment) in segments.iter().enumerate() {
        for fragment in segment.fragments.iter().filter(|fragment| fragment.lsn >= from_lsn) {
            for edge in
                [fragment.at, fragment.at + 16, fragment.at / BLOCK * BLOCK + BLOCK, fragment.end - 4, fragment.end]
            {
                ends.extend((edge.saturating_sub(2)..edge + 3).map(|at| (index, at.max(DATA_START))));
            }
        }
    }
    let ends: Vec<_> = ends.into_iter().collect();
    let torn = AtomicU64::new(0);
    in_parallel(0, ends.len() as u64, |number, path| {
        let (index, at) = ends[number as usize];
        let mut image = long.image.clone();
        for (other, segment) in segments.iter().enumerate().skip(index) {
            let bytes = image.files.get_mut(&segment.file).unwrap();
            let from = if other == index { at.min(bytes.len()) } else { DATA_START };
            bytes[from..].fill(0);
        }
        let prediction = long.check(&image, path, &format!("{:?} from {at}", segments[index].file));
        torn.fetch_add(u64::from(matches!(prediction, Prediction::EndsAt(_))), Ordering::Relaxed);
    });
    assert!(torn.into_inner() > 0);
}

#[test]
fn a_block_of_zeros_is_corruption_if_it_was_synced_and_a_torn_tail_if_not() {
    let long = LongRecords::new();
    let segments = long.image.segments();
    let sectors: Vec<_> = segments
        .iter()
        .flat_map(|segment| {
            (DATA_START / 512..segment.end().div_ceil(512)).step_by(7).map(move |sector| (segment, sector))
        })
        .collect();
    in_parallel(0, sectors.len() as u64, |number, path| {
        let mut rng = StdRng::seed_from_u64(number);
        // A few sectors, and in every second round all sectors after them.
        let (segment, sector) = sectors[number as usize];
        let mut image = long.image.clone();
        let bytes = image.files.get_mut(&segment.file).unwrap();
        let from = sector * 512;
        let to = if rng.random_bool(0.5) { bytes.len() } else { from + 512 * rng.random_range(1..16) };
        let to = to.min(bytes.len());
        bytes[from..to].fill(0);
        long.check(&image, path, &format!("zeros from {from} to {to} of {:?}", segment.file));
    });
}

#[test]
fn a_missing_segment_is_corruption_that_names_it_unless_nothing_in_it_is_needed() {
    let long = LongRecords::new();
    let dir = scratch();
    let path = dir.path().join("store");
    let segments = long.image.segments();
    let files: Vec<_> = long.image.files.keys().filter(|file| kind(file) == "journal").cloned().collect();
    assert!(files.len() > segments.len(), "there is a spare segment");
    let mut noticed = 0;
    for file in files {
        let name = file.file_name().unwrap().to_str().unwrap();
        let bytes = &long.image.files[&file];
        for len in [
            0,
            bytes.len() / 2 / BLOCK * BLOCK,
            bytes.len() - BLOCK,
            bytes.len() - 1,
            bytes.len() + 1,
            bytes.len() + BLOCK,
        ] {
            let mut image = long.image.clone();
            image.files.get_mut(&file).unwrap().resize(len, 0);
            let prediction = long.check(&image, &path, &format!("{name} with {len} bytes"));
            assert!(len % BLOCK == 0 && len > 0 || prediction == Prediction::Corrupt);
            std::fs::remove_dir_all(&path).unwrap();
        }
        let mut image = long.image.clone();
        image.files.remove(&file);
        if long.check(&image, &path, &format!("without {name}")) == Prediction::Corrupt {
            noticed += 1;
            let Err(Error::Corrupt { place, detail }) = long.open(&path) else { panic!("it was corrupt") };
            let text = format!("{place}: {detail}");
            // No other segment names the first one.
            let is_first = segments[0].file == file && detail.contains("the segment before it");
            assert!(is_first || text.contains(name), "{name} is missing: {text}");
        }
        std::fs::remove_dir_all(&path).unwrap();
    }
    assert!(noticed >= segments.len(), "{noticed} of {}", segments.len());
}

#[test]
fn a_torn_tail_does_not_come_back_and_new_records_are_not_confused_with_it() {
    let dir = scratch();
    let path = dir.path().join("store");
    let clock = ManualClock::at(Timestamp::from_unix_ms(START_MS));
    let open = |path: &Path| {
        builder(&clock).durability(Durability::Process).sync_interval(Duration::from_secs(3_600)).open(path)
    };
    let store = open(&path).unwrap();
    let keys: Vec<String> = (0..8).map(|i| format!("key-{i}")).collect();
    let mut ends = Vec::new();
    for key in &keys {
        complete(&store, key);
        ends.push(Image::read(&path).next_lsn());
    }
    let image = Image::read_at_rest(&path);
    drop(store);
    let last = last_written(&image);
    let bytes = &image.files[&last.file];
    for fragment in &last.fragments {
        let mut torn = image.clone();
        // One byte of it: what is after it is still there.
        torn.files.get_mut(&last.file).unwrap()[fragment.end - 1] ^= 1;
        if predict(&image, &torn) == Prediction::Corrupt {
            continue;
        }
        let copy = dir.path().join("copy");
        torn.write(&copy);
        let store = open(&copy).unwrap_or_else(|error| panic!("torn at {} of {}: {error}", fragment.at, bytes.len()));
        let check = |store: &Store| {
            for (key, end) in keys.iter().zip(&ends) {
                let stored = matches!(store.check(key).wait().unwrap(), KeyStatus::Completed(_));
                assert_eq!(stored, *end <= fragment.lsn, "{key}, which ends at {end}, torn at {}", fragment.lsn);
            }
        };
        check(&store);
        complete(&store, "after the loss");
        // Killed again, and then closed.
        let again = dir.path().join("again");
        Image::read_at_rest(&copy).write(&again);
        store.close().wait().unwrap();
        for reopened in [&copy, &again] {
            let store = open(reopened).unwrap();
            assert!(matches!(store.check("after the loss").wait().unwrap(), KeyStatus::Completed(_)));
            check(&store);
            drop(store);
            std::fs::remove_dir_all(reopened).unwrap();
        }
    }
}

#[test]
fn an_older_manifest_that_lacks_the_newest_ssts_is_corruption() {
    for (closed, flush_first) in [(false, true), (true, true), (true, false), (false, false)] {
        let base = Base::new(closed, flush_first, Durability::Disk);
        let dir = scratch();
        let path = dir.path().join("store");
        let manifest = base.image.newest_manifest();
        let bytes = &base.image.files[&manifest];
        let mut noticed = 0;
        // An earlier version of the same file is a prefix of it, which ends between two records.
        let ends = manifest_ends(bytes);
        for end in &ends {
            let mut image = base.image.clone();
            image.files.get_mut(&manifest).unwrap().truncate(*end);
            image.write(&path);
            let what = format!("closed: {closed}, flushed: {flush_first}, {end} of {} bytes", bytes.len());
            match examine(&base, &path, Expectation::all(&base), &mut StdRng::seed_from_u64(0)) {
                Ok(Findings::OpenFailed(Error::Corrupt { place, detail })) => {
                    let text = format!("{place}: {detail}");
                    assert!(
                        ["MANIFEST", ".sst", "column family"].iter().any(|name| text.contains(name)),
                        "{what}: {text}"
                    );
                    noticed += 1;
                }
                Ok(Findings::Correct { missing: 0 }) => {}
                other => panic!("{what}: {other:?}"),
            }
            std::fs::remove_dir_all(&path).unwrap();
        }
        eprintln!("{noticed} of {} prefixes are corrupt", ends.len());
        assert!(!flush_first || noticed > 0);
        // The previous file, with the name of it in CURRENT.
        for earlier in &base.earlier {
            let mut image = base.image.clone();
            image.files.retain(|file, _| kind(file) != "MANIFEST" && kind(file) != "CURRENT");
            let old = earlier.files.iter().filter(|(file, _)| kind(file) == "MANIFEST" || kind(file) == "CURRENT");
            image.files.extend(old.map(|(file, bytes)| (file.clone(), bytes.clone())));
            if image.files == base.image.files {
                continue;
            }
            image.write(&path);
            let findings = examine(&base, &path, Expectation::all(&base), &mut StdRng::seed_from_u64(0));
            assert!(
                matches!(findings, Ok(Findings::OpenFailed(Error::Corrupt { .. }) | Findings::Correct { missing: 0 })),
                "closed: {closed}, flushed: {flush_first}: {findings:?}"
            );
            std::fs::remove_dir_all(&path).unwrap();
        }
    }
}

/// The ends of the records of a manifest, which has the form of RocksDB's logs.
fn manifest_ends(bytes: &[u8]) -> Vec<usize> {
    let mut ends = vec![0];
    // A header has a checksum (4 bytes), the length of the payload (2) and a type (1).
    while let Some(header) = bytes.get(ends[ends.len() - 1]..).and_then(|rest| rest.first_chunk::<7>()) {
        ends.push(ends[ends.len() - 1] + header.len() + usize::from(u16::from_le_bytes([header[4], header[5]])));
    }
    assert_eq!(ends.pop(), Some(bytes.len()), "the undamaged manifest cannot be parsed");
    ends
}

#[test]
fn a_missing_or_empty_directory_is_an_error_that_names_it_or_loses_nothing() {
    for closed in [false, true] {
        let base = Base::new(closed, true, Durability::Disk);
        let dir = scratch();
        let path = dir.path().join("store");
        for (part, is_empty) in
            ["db", "journal", "ssts", "filters"].into_iter().flat_map(|part| [(part, false), (part, true)])
        {
            base.image.write(&path);
            std::fs::remove_dir_all(path.join(part)).unwrap();
            if is_empty {
                std::fs::create_dir(path.join(part)).unwrap();
            }
            let findings = examine(&base, &path, Expectation::all(&base), &mut StdRng::seed_from_u64(0));
            let what = format!("{part}, empty: {is_empty}, closed: {closed}: {findings:?}");
            match (part, &findings) {
                ("ssts" | "filters", Ok(Findings::Correct { missing: 0 })) => {}
                ("db" | "journal", Ok(Findings::OpenFailed(Error::Corrupt { place, detail }))) => {
                    assert!(format!("{place}: {detail}").contains(path.join(part).to_str().unwrap()), "{what}");
                }
                _ => panic!("{what}"),
            }
            std::fs::remove_dir_all(&path).unwrap();
        }
    }
}

/// So many of the earlier images were taken right before a flush.
const FLUSHED: usize = 3;

/// The files of one directory from another image.
fn with_part(base: &Image, part: &str, other: &Image) -> Image {
    let mut image = base.clone();
    image.files.retain(|file, _| !file.starts_with(part));
    let theirs = other.files.iter().filter(|(file, _)| file.starts_with(part));
    image.files.extend(theirs.map(|(file, bytes)| (file.clone(), bytes.clone())));
    image
}

#[test]
fn an_older_database_or_a_part_of_another_store_is_corruption_or_loses_nothing() {
    let foreign = foreign();
    for closed in [false, true] {
        let base = Base::new(closed, true, Durability::Disk);
        let dir = scratch();
        let path = dir.path().join("store");
        let examine = |image: &Image| {
            image.write(&path);
            let findings = examine(&base, &path, Expectation::all(&base), &mut StdRng::seed_from_u64(0));
            std::fs::remove_dir_all(&path).unwrap();
            findings
        };
        for (index, earlier) in base.earlier.iter().enumerate() {
            let findings = examine(&with_part(&base.image, "db", earlier));
            assert!(
                matches!(findings, Ok(Findings::OpenFailed(Error::Corrupt { .. }) | Findings::Correct { missing: 0 })),
                "closed: {closed}, the database of image {index}: {findings:?}"
            );
        }
        for part in ["db", "journal"] {
            let findings = examine(&with_part(&base.image, part, &foreign));
            let is_corrupt = matches!(findings, Ok(Findings::OpenFailed(Error::Corrupt { .. })));
            assert!(is_corrupt, "closed: {closed}, {part} of another store: {findings:?}");
        }
    }
}

#[test]
fn an_older_directory_of_the_journal_is_noticed_if_the_database_was_flushed_since() {
    let base = Base::new(true, true, Durability::Disk);
    let dir = scratch();
    let path = dir.path().join("store");
    for (index, earlier) in base.earlier.iter().enumerate() {
        with_part(&base.image, "journal", earlier).write(&path);
        let clock = ManualClock::at(Timestamp::from_unix_ms(base.now_ms));
        match builder(&clock).open(&path) {
            Ok(store) => {
                assert!(index >= FLUSHED, "the journal of image {index}");
                store.close().wait().unwrap();
            }
            Err(Error::Corrupt { place, detail }) => {
                assert!(place.contains("journal") || detail.contains("flush"), "image {index}: {place}: {detail}");
            }
            Err(error) => panic!("image {index}: {error}"),
        }
        std::fs::remove_dir_all(&path).unwrap();
    }
    assert!(base.earlier.len() > FLUSHED);
}
