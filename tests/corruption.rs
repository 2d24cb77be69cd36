//! Damaged files: bits flipped, bytes cut, blocks zeroed, files gone, in every kind of file that a store has. Whatever
//! the damage, the store refuses with an error that says where it is, or answers as if nothing had happened: never a
//! wrong answer, a panic, a hang, or a store that is silently empty.
//!
//! Of the log of a store that had crashed two things are left out, for nobody could tell: whole records that are taken out
//! of its very beginning, and whole records that are taken out of what no later write knows to be synced.
//!
//! `ONLYONCE_CORRUPTION_ROUNDS` (600 if not set), `ONLYONCE_CORRUPTION_SEED` (default: drawn, and printed) and
//! `ONLYONCE_CORRUPTION_FIRST` (the round to begin with) set how often and how. Each round draws from the seed and its
//! own number, so that one can be repeated alone; to the kind of file and of damage, not to the byte, for a store's files
//! hold a secret that is drawn anew.

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

/// What a key is, as far as it outlives the process.
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

/// One change of one key, and how long the newest log was when it was written.
struct Event {
    key: String,
    state: State,
    log_bytes: usize,
}

/// A store with all that a store can hold, and what is true of it.
struct Base {
    image: Image,
    /// Whether it was closed, or is as a crash leaves it.
    closed: bool,
    /// The newest log.
    log: PathBuf,
    /// What each key was before the newest log was begun.
    before: BTreeMap<String, State>,
    /// What the newest log says.
    events: Vec<Event>,
    /// What completions took along, the offset and the message each: behind how many events of the newest log.
    along: Vec<(usize, u64)>,
    /// Whether this life began with it, so that nothing can have stood before it.
    is_first: bool,
    /// So many bytes of it were synced before its last write was made, which says so.
    vouched: usize,
    now_ms: u64,
    last_token: u64,
}

/// Where files cost nothing to sync, if this machine has such a place.
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

/// Completes with an offset and a message that says the same.
fn complete_with(lease: Lease, result: &str, offset: u64) {
    let message = format!("message {offset}");
    lease
        .complete(Completion::new(result).offset("orders", 3, offset).message("topic", "key", message))
        .wait()
        .unwrap();
}

/// Claims, and lets nobody know that the work was dropped: its process is going to die.
fn leave_in_flight(store: &Store, key: &str) {
    let Claim::Acquired(lease) = store.claim(key).wait().unwrap() else { panic!("{key} is free") };
    std::mem::forget(lease);
}

/// Waits until the filters of so many ended buckets are on disk.
fn wait_for_filters(dir: &Path, count: usize) {
    let deadline = Instant::now() + Duration::from_secs(60);
    let whole = |name: &std::ffi::OsStr| name.to_string_lossy().ends_with(".filter");
    while std::fs::read_dir(dir).unwrap().filter(|entry| whole(&entry.as_ref().unwrap().file_name())).count() < count {
        assert!(Instant::now() < deadline, "no filters are kept");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn log_bytes(path: &Path) -> usize {
    std::fs::metadata(path).unwrap().len() as usize
}

impl Base {
    /// Closed or not; and with a last life that has sealed keys before the newest log, or that has found some in the
    /// journal.
    fn all() -> Vec<Self> {
        [(false, false), (false, true), (true, false), (true, true)]
            .map(|(closed, seal)| Self::new(closed, seal))
            .into()
    }

    fn new(closed: bool, seal: bool) -> Self {
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
            // The first bucket has one run of several blocks, the second has two runs: an open costs what it has buckets.
            for run in 0..1 + bucket {
                (0..10).for_each(|i| complete(&store, &add(format!("sealed-{bucket}-{run}-{i}"))));
                let many = if bucket == 0 { 200 } else { 10 };
                let recorded: Vec<String> = (0..many).map(|i| add(format!("recorded-{bucket}-{run}-{i}"))).collect();
                store.record_batch(&recorded).wait().unwrap();
                (0..3).for_each(|i| leave_in_flight(&store, &add(format!("in-flight-{bucket}-{run}-{i}"))));
                store.flush().unwrap();
            }
            clock.advance(Duration::from_secs(10));
        }
        // A second life: what the log held is in a table of the journal now.
        (0..10).for_each(|i| complete(&store, &add(format!("journal-{i}"))));
        (0..3).for_each(|i| leave_in_flight(&store, &add(format!("journal-in-flight-{i}"))));
        store.forget("sealed-0-0-0").wait().unwrap();
        let Claim::Acquired(lease) = store.claim(add("journal-with-more".to_owned())).wait().unwrap() else {
            panic!("it is new")
        };
        complete_with(lease, "the result of journal-with-more", 1);
        store.close().wait().unwrap();
        drop(store);
        let store = builder(&clock).open(&path).unwrap();
        wait_for_filters(&path.join("filters"), 2);
        if seal {
            clock.advance(Duration::from_secs(10));
            (0..10).for_each(|i| complete(&store, &add(format!("sealed-late-{i}"))));
            store.flush().unwrap();
        }

        let new: Vec<String> = (0..12).map(|i| add(format!("log-{i}"))).collect();
        let before = keys.iter().map(|key| (key.clone(), State::of(&store, key).unwrap())).collect();
        let newest = Image::read_at_rest(&path).newest(".log");
        let log = path.join(&newest);
        let mut events = Vec::new();
        let mut along = vec![(0, 1)];
        let mut note = |key: &str| {
            let state = State::of(&store, key).unwrap();
            events.push(Event { key: key.to_owned(), state, log_bytes: log_bytes(&log) });
        };
        for (i, key) in new.iter().enumerate() {
            let Claim::Acquired(lease) = store.claim(key).wait().unwrap() else { panic!("{key} is new") };
            note(key);
            match i % 3 {
                0 => complete_with(lease, &format!("the result of {key}"), 2 + i as u64),
                1 => lease.release().wait().unwrap(),
                _ => {
                    std::mem::forget(lease);
                    continue;
                }
            }
            note(key);
            if i % 3 == 0 {
                // Two events of each of the keys before, or one.
                along.push((i / 3 * 5 + 2, 2 + i as u64));
            }
        }
        store.forget("sealed-1-0-0").wait().unwrap();
        note("sealed-1-0-0");
        let vouched = log_bytes(&log);
        let Claim::Acquired(lease) = store.claim("in-flight-1-0-0").wait().unwrap() else {
            panic!("its process is gone")
        };
        note("in-flight-1-0-0");
        let last_token = lease.token().get();
        lease.complete("at the second attempt").wait().unwrap();
        note("in-flight-1-0-0");
        if closed {
            store.close().wait().unwrap();
        }
        Self {
            image: Image::read_at_rest(&path),
            closed,
            log: newest,
            before,
            events,
            along,
            is_first: !seal,
            vouched,
            now_ms: clock_ms(&clock),
            last_token,
        }
    }

    /// What each key is after the first `events` events of the newest log.
    fn truth(&self, events: usize) -> BTreeMap<&str, &State> {
        let mut truth: BTreeMap<&str, &State> = self.before.iter().map(|(key, state)| (key.as_str(), state)).collect();
        for event in self.events.iter().take(events) {
            truth.insert(&event.key, &event.state);
        }
        truth
    }
}

fn clock_ms(clock: &ManualClock) -> u64 {
    onlyonce::Clock::wall(clock).as_unix_ms()
}

/// What a store said when it was asked about everything.
#[derive(Debug)]
enum Said {
    RefusedToOpen(Error),
    /// It refused some questions, the first of them so, and answered the others rightly.
    RefusedToAnswer(Error),
    /// All is as it was, but for the last so many events of its log.
    Answered {
        missing: usize,
    },
}

/// Opens what is in `path`, asks every key, and compares. `certain` is how many events of the newest log must be there.
fn interrogate(base: &Base, path: &Path, certain: usize, rng: &mut StdRng) -> Result<Said, String> {
    let clock = ManualClock::at(Timestamp::from_unix_ms(base.now_ms));
    let store = match builder(&clock).open(path) {
        Ok(store) => store,
        Err(error) => return Ok(Said::RefusedToOpen(error)),
    };
    let mut answers: BTreeMap<&str, State> = BTreeMap::new();
    let mut refused = Vec::new();
    let keys: Vec<&str> = base.before.keys().map(String::as_str).collect();
    match store.check_batch(keys.iter().copied()).wait() {
        Ok(checks) => {
            for (key, check) in keys.iter().zip(checks) {
                match check {
                    Ok(KeyStatus::Completed(completed)) => drop(answers.insert(key, State::Completed(completed))),
                    Ok(KeyStatus::New) => drop(answers.insert(key, State::Absent)),
                    Ok(KeyStatus::InProgress(other)) => return Err(format!("{key} is held by the dead: {other:?}")),
                    Err(error) => refused.push(error),
                }
            }
        }
        Err(error) => refused.push(error),
    }
    // One by one, too: all that a batch cannot tell from new keys, or did not get to, and a few of the others.
    for key in &keys {
        let asked = !key.contains("sealed") && !key.contains("recorded") || !answers.contains_key(key);
        if !asked && !rng.random_bool(0.02) {
            continue;
        }
        match (State::of(&store, key), answers.get(key)) {
            (Err(error), _) => refused.push(error),
            (Ok(State::Completed(one)), Some(many)) if State::Completed(one.clone()) != *many => {
                return Err(format!("{key} is {one:?} alone and {many:?} in a batch"));
            }
            (Ok(state), _) => drop(answers.insert(key, state)),
        }
    }
    let fits = |events: usize| {
        let truth = base.truth(events);
        answers.iter().find(|(key, state)| truth[**key] != *state).map(|(key, state)| (*key, state, truth[key]))
    };
    let all = base.events.len();
    let Some(events) = (certain..=all).rev().find(|events| fits(*events).is_none()) else {
        let (key, state, truth) = fits(all).unwrap();
        return Err(format!("{key} is {state:?}, and was {truth:?}"));
    };
    let along: Vec<u64> = base.along.iter().filter(|(after, _)| *after <= events).map(|(_, offset)| *offset).collect();
    match store.outbox(usize::MAX).wait() {
        Ok(messages) => {
            let said: Vec<&[u8]> = messages.iter().map(|message| &*message.payload).collect();
            let sent: Vec<String> = along.iter().map(|offset| format!("message {offset}")).collect();
            if !said.iter().copied().eq(sent.iter().map(String::as_bytes)) {
                return Err(format!("the outbox has {messages:?}, and had {sent:?}"));
            }
        }
        Err(error) => refused.push(error),
    }
    match store.offset("orders", 3).wait() {
        Ok(offset) if offset == along.last().copied() => {}
        Ok(offset) => return Err(format!("the offset is {offset:?}, and was {:?}", along.last())),
        Err(error) => refused.push(error),
    }
    // Tokens go on, whatever was lost.
    match store.claim("a new one").wait() {
        Ok(Claim::Acquired(lease)) if lease.token().get() > base.last_token => drop(lease.release().wait()),
        Ok(other) => return Err(format!("a new key after token {}: {other:?}", base.last_token)),
        Err(error) => refused.push(error),
    }
    // A merge in the background may have found the damage only now.
    refused.extend(store.close().wait().err());
    Ok(match refused.first() {
        None => Said::Answered { missing: all - events },
        Some(error) => Said::RefusedToAnswer(error.clone()),
    })
}

/// How many events of the newest log a damage leaves certain.
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
    // The last write says what was synced before it. What lies behind that may be what a crash leaves.
    let is_told = damage.at < base.vouched && damaged_to <= base.events[all - 2].log_bytes;
    if is_told && (base.is_first || damage.at >= third_write(base)) {
        return all;
    }
    base.events.iter().filter(|event| event.log_bytes <= damage.at).count()
}

/// Where the newest log's records end, and the first begins.
fn record_edges(base: &Base) -> Vec<usize> {
    edges(&base.image.files[&base.log])
}

fn edges(log: &[u8]) -> Vec<usize> {
    let mut edges = vec![0];
    // A header is a checksum (4), the length of what follows it (2) and a type (1).
    while let Some(header) = log.get(edges[edges.len() - 1]..).and_then(|rest| rest.first_chunk::<7>()) {
        edges.push(edges[edges.len() - 1] + header.len() + usize::from(u16::from_le_bytes([header[4], header[5]])));
    }
    assert_eq!(edges.last(), Some(&log.len()), "the records of the undamaged log are not understood");
    edges
}

/// Where the newest log's third write begins: of those before it nobody knows whether they stood in an older log. Its first
/// record is RocksDB's own, about the log before it.
fn third_write(base: &Base) -> usize {
    record_edges(base)[3]
}

/// Whether a damage takes whole records out of the newest log as a crash leaves it, and that makes the log of another life:
/// of one in which they were not written, or had gone with an older log.
fn makes_another_life(base: &Base, damage: &Damage) -> bool {
    let Harm::CutOut { len } = damage.harm else { return false };
    if base.closed || damage.file != base.log {
        return false;
    }
    let edges = record_edges(base);
    let is_whole = edges.contains(&damage.at) && edges.contains(&(damage.at + len));
    is_whole && (damage.at >= base.vouched || !base.is_first && damage.at < third_write(base))
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

/// Ends the process, with a word, where a round does not end.
struct Watchdog {
    round: Arc<AtomicU64>,
}

impl Watchdog {
    const PATIENCE_S: u32 = 60;

    fn new() -> Self {
        let round = Arc::new(AtomicU64::new(0));
        let watched = Arc::downgrade(&round);
        std::thread::spawn(move || {
            // Seconds that were seen to pass: a machine that was asleep has not kept the round from ending.
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

/// What an error says of the place.
#[derive(Debug, PartialEq)]
enum Named {
    File,
    /// The database, for RocksDB does not know better: a garbled block of properties is sometimes read before its
    /// checksum, and then nobody knows whose it is.
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
            // A merge in the background had found it, and RocksDB writes no more.
            Error::WriteFailed { source } => source.to_string().contains(&*file),
            Error::Poisoned { reason } => reason.contains(&*file),
            // Without its lock file a store is no store.
            Error::NotAStore { .. } => file == "onlyonce.lock",
            _ => false,
        };
        if named { Self::File } else { Self::Nothing }
    }
}

/// What came of the rounds of one kind of file.
#[derive(Default)]
struct Count {
    rounds: u64,
    refused: u64,
    refused_without_file: u64,
    answered: u64,
    answered_without_last: u64,
    time: Duration,
}

/// What came of the rounds.
#[derive(Default)]
struct Tally {
    counts: BTreeMap<&'static str, Count>,
    wrong: Vec<String>,
}

impl Tally {
    fn print(&self) {
        let columns = ["kind", "rounds", "refused by name", "refused", "right", "right to its end", "us each"];
        eprintln!("{}", columns.map(|column| format!("{column:>17}")).concat());
        for (kind, _) in KINDS {
            let Some(count) = self.counts.get(kind) else { continue };
            let micros = count.time.as_micros() as u64 / count.rounds;
            let Count { rounds, refused, refused_without_file, answered, answered_without_last, .. } = count;
            let figures = [rounds, refused, refused_without_file, answered, answered_without_last, &micros];
            eprintln!("{kind:>17}{}", figures.map(|figure| format!("{figure:>17}")).concat());
        }
    }
}

/// Damages one file of one store and asks it everything.
fn round(bases: &[Base], path: &Path, seed: u64, round: u64, tally: &Mutex<Tally>) {
    let mut rng = StdRng::seed_from_u64(seed << 32 ^ round);
    let base = &bases[rng.random_range(0..bases.len())];
    let mut image = base.image.clone();
    let damage = Damage::draw(&image, &mut rng);
    if makes_another_life(base, &damage) || !damage.inflict(&mut image) {
        return;
    }
    let begun = Instant::now();
    image.write(path);
    let certain = certain(base, &damage);
    let said = std::panic::catch_unwind(AssertUnwindSafe(|| interrogate(base, path, certain, &mut rng)));
    let mut tally = tally.lock().unwrap();
    let count = tally.counts.entry(kind(&damage.file)).or_default();
    count.rounds += 1;
    count.time += begun.elapsed();
    let why = match said {
        Err(_) => "a panic".to_owned(),
        Ok(Err(why)) => why,
        Ok(Ok(Said::RefusedToOpen(error) | Said::RefusedToAnswer(error))) => match Named::by(&error, &damage) {
            Named::File => return count.refused += 1,
            Named::Database => return count.refused_without_file += 1,
            Named::Nothing => format!("it is refused for another reason: {error:?}"),
        },
        Ok(Ok(Said::Answered { missing: 0 })) => return count.answered += 1,
        Ok(Ok(Said::Answered { .. })) => return count.answered_without_last += 1,
    };
    let why = format!("round {round} of seed {seed}, closed: {}, {damage:?}: {why}", base.closed);
    eprintln!("{why}");
    tally.wrong.push(why);
}

/// Calls `work` with every number below `end` from `first` on, on a few threads, each with a directory of its own.
fn in_parallel(first: u64, end: u64, work: impl Fn(u64, &Path) + Sync) {
    let dir = scratch();
    let next = AtomicU64::new(first);
    std::thread::scope(|scope| {
        // An open waits for threads and files more than it computes.
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
fn no_damage_to_any_file_makes_a_wrong_answer() {
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
    let wrong = &tally.wrong;
    assert!(wrong.is_empty(), "{} wrong: {:#?}", wrong.len(), &wrong[..wrong.len().min(20)]);
    let missed: Vec<_> = KINDS.iter().filter(|(kind, _)| !tally.counts.contains_key(kind)).collect();
    assert!(rounds < DEFAULT_ROUNDS || missed.is_empty(), "no file of these kinds was damaged: {missed:?}");
}

#[test]
fn a_log_cut_at_any_byte_loses_only_what_lies_behind_the_cut() {
    let base = Base::new(false, true);
    let whole = base.image.files[&base.log].len();
    // At every byte where the rounds are many.
    let step = if rounds() > DEFAULT_ROUNDS { 1 } else { 7 };
    in_parallel(0, (whole / step) as u64 + 1, |number, path| {
        let mut image = base.image.clone();
        let at = number as usize * step;
        image.files.get_mut(&base.log).unwrap().truncate(at);
        image.write(path);
        let there = base.events.iter().filter(|event| event.log_bytes <= at).count();
        let said = interrogate(&base, path, there, &mut StdRng::seed_from_u64(number)).unwrap();
        let Said::Answered { missing } = said else { panic!("cut at {at} of {whole}: {said:?}") };
        assert_eq!(missing, base.events.len() - there, "cut at {at} of {whole}");
    });
}

#[test]
fn a_bad_place_in_a_log_is_corrupt_where_it_was_synced_and_its_end_where_it_was_not() {
    let base = Base::new(false, false);
    let seed = seed();
    eprintln!("ONLYONCE_CORRUPTION_SEED={seed}");
    let whole = base.image.files[&base.log].len();
    let last_but_one = base.events[base.events.len() - 2].log_bytes;
    in_parallel(0, rounds() / 4, |number, path| {
        let mut rng = StdRng::seed_from_u64(seed << 32 ^ number);
        let mut image = base.image.clone();
        let log = image.files.get_mut(&base.log).unwrap();
        // Half of them behind what the last write knows to be synced.
        let begin = if rng.random_bool(0.5) { base.vouched } else { 0 };
        let at = rng.random_range(begin..whole);
        let end = rng.random_range(at..whole.min(at + 40)) + 1;
        for byte in &mut log[at..end] {
            *byte ^= rng.random_range(1..=255_u8);
        }
        image.write(path);
        let there = base.events.iter().filter(|event| event.log_bytes <= at).count();
        let said = interrogate(&base, path, there, &mut rng);
        let what = format!("round {number} of seed {seed}: {at}..{end} of {whole}: {said:?}");
        match said {
            Ok(Said::RefusedToOpen(Error::Corrupt { place, .. })) => {
                assert!(at < base.vouched && place.ends_with(base.log.to_str().unwrap()), "{what}");
            }
            Ok(Said::Answered { missing }) => {
                assert_eq!(missing, base.events.len() - there, "{what}");
                assert!(at >= base.vouched || end > last_but_one, "{what}");
            }
            _ => panic!("{what}"),
        }
    });
}

/// Rows over several blocks of the log, and a small one between them and at the end, each with the log's length behind it.
fn long_rows() -> (Image, PathBuf, Vec<(String, usize)>, u64) {
    let dir = scratch();
    let path = dir.path().join("store");
    let clock = ManualClock::at(Timestamp::from_unix_ms(START_MS));
    let store = builder(&clock).open(&path).unwrap();
    let log = Image::read(&path).newest(".log");
    let mut rows = Vec::new();
    for (number, bytes) in [100, 100_000, 100, 70_000, 33_000, 100, 120_000].into_iter().enumerate() {
        let key = format!("long-{number}");
        let Claim::Acquired(lease) = store.claim(&key).wait().unwrap() else { panic!("{key} is new") };
        lease.complete(vec![b'r'; bytes]).wait().unwrap();
        rows.push((key, log_bytes(&path.join(&log))));
    }
    (Image::read(&path), log, rows, clock_ms(&clock))
}

#[test]
fn a_row_over_several_blocks_of_the_log_is_there_whole_or_not_at_all() {
    let (image, log, rows, now_ms) = long_rows();
    let whole = image.files[&log].len();
    // Around the ends of blocks and of rows, where headers lie and are cut in two.
    let edges = (0..=whole).step_by(32 * 1024).chain(rows.iter().map(|(_, end)| *end));
    let cuts: BTreeSet<usize> = edges.flat_map(|edge| edge.saturating_sub(8)..(edge + 9).min(whole + 1)).collect();
    let cuts: Vec<usize> = cuts.into_iter().collect();
    in_parallel(0, cuts.len() as u64, |number, path| {
        let cut = cuts[number as usize];
        let mut image = image.clone();
        image.files.get_mut(&log).unwrap().truncate(cut);
        image.write(path);
        let store = builder(&ManualClock::at(Timestamp::from_unix_ms(now_ms))).open(path);
        let store = store.unwrap_or_else(|error| panic!("cut at {cut} of {whole}: {error}"));
        for (key, end) in &rows {
            let there = matches!(store.check(key).wait().unwrap(), KeyStatus::Completed(_));
            assert_eq!(there, *end <= cut, "{key}, which ends at {end}, cut at {cut} of {whole}");
        }
    });
}

#[test]
fn a_block_of_zeros_is_corrupt_where_the_log_was_synced_and_its_end_where_it_was_not() {
    let (image, log, rows, now_ms) = long_rows();
    let whole = image.files[&log].len();
    let sectors = whole.div_ceil(512);
    // The last claim and the last completion say that everything up to the completion before them was synced.
    let vouched = rows[rows.len() - 2].1;
    let last_claim = vouched..vouched + 200;
    in_parallel(0, sectors as u64 / 4, |number, path| {
        let mut rng = StdRng::seed_from_u64(number);
        // A few sectors, and in every second round all behind them.
        let from = number as usize * 4 * 512;
        let torn = rng.random_bool(0.5);
        let to = if torn { whole } else { (from + 512 * rng.random_range(1..16)).min(whole) };
        let mut image = image.clone();
        image.files.get_mut(&log).unwrap()[from..to].fill(0);
        image.write(path);
        let what = format!("zeros from {from} to {to} of {whole}");
        match builder(&ManualClock::at(Timestamp::from_unix_ms(now_ms))).open(path) {
            Ok(store) => {
                assert!(from >= vouched || to > last_claim.start, "{what}: what follows is forgotten in silence");
                for (key, end) in &rows {
                    let there = matches!(store.check(key).wait().unwrap(), KeyStatus::Completed(_));
                    assert_eq!(there, *end <= from, "{what}: {key}, which ends at {end}");
                }
            }
            Err(Error::Corrupt { place, .. }) => {
                assert!(from < vouched && to <= last_claim.end, "{what}: nobody was told of what was there");
                assert!(place.ends_with(log.to_str().unwrap()), "{what}: {place}");
            }
            Err(error) => panic!("{what}: {error}"),
        }
    });
}

#[test]
fn a_log_that_is_gone_or_torn_before_a_newer_one_is_corrupt() {
    let dir = scratch();
    let path = dir.path().join("store");
    let clock = ManualClock::at(Timestamp::from_unix_ms(START_MS));
    // Two logs that are both needed: the journal's memtable has been full once, and the removal of a sealed key, which
    // waits in its bucket's memtable, holds the older log back.
    let open = |path: &Path| builder(&clock).memory_budget(1 << 30).durability(Durability::Disk).open(path);
    let store = open(&path).unwrap();
    complete(&store, "sealed and forgotten");
    store.flush().unwrap();
    store.forget("sealed and forgotten").wait().unwrap();
    // A quarter of it behind the older log, so that the newer one has been noted.
    let keys: Vec<String> = (0..96).map(|i| format!("key-{i}")).collect();
    for key in &keys {
        let Claim::Acquired(lease) = store.claim(key).wait().unwrap() else { panic!("{key} is new") };
        lease.complete(vec![b'r'; 900_000]).wait().unwrap();
    }
    let image = Image::read_at_rest(&path);
    store.close().wait().unwrap();
    let logs = image.logs();
    let [older, newer] = logs.as_slice() else { panic!("two logs: {logs:?}") };
    let whole = image.files[older].len();

    let copy = dir.path().join("copy");
    let try_with = |damaged: &Image| {
        damaged.write(&copy);
        let opened = open(&copy);
        let answers = opened.map(|store| {
            let checks: Vec<KeyStatus> = keys.iter().map(|key| store.check(key).wait().unwrap()).collect();
            let forgotten = store.check("sealed and forgotten").wait().unwrap();
            store.close().wait().unwrap();
            (checks.iter().filter(|check| matches!(check, KeyStatus::Completed(_))).count(), forgotten)
        });
        std::fs::remove_dir_all(&copy).unwrap();
        answers
    };
    assert_eq!(try_with(&image).unwrap(), (keys.len(), KeyStatus::New), "as a crash leaves it");
    for cut in [1, 3, 1_000, 900_000, 5_000_000, whole - 10, whole] {
        let mut damaged = image.clone();
        damaged.files.get_mut(older).unwrap().truncate(whole - cut);
        let answers = try_with(&damaged);
        assert!(matches!(&answers, Err(Error::Corrupt { .. })), "the older without its last {cut} bytes: {answers:?}");
    }
    for gone in [older, newer] {
        let mut damaged = image.clone();
        damaged.files.remove(gone);
        let answers = try_with(&damaged);
        assert!(matches!(&answers, Err(Error::Corrupt { .. })), "{gone:?} is gone: {answers:?}");
    }
}

/// What RocksDB writes to a log before all else: how long the one before it was.
fn predecessor(log: u64, len: usize) -> Vec<u8> {
    let checked = [&[130][..], &log.to_le_bytes(), &(len as u64).to_le_bytes(), &99_u64.to_le_bytes()].concat();
    let crc = crc32c::crc32c(&checked).rotate_right(15).wrapping_add(0xa282_ead8);
    let len = u16::try_from(checked.len() - 1).unwrap();
    [&crc.to_le_bytes()[..], &len.to_le_bytes(), &checked].concat()
}

#[test]
fn a_log_that_a_power_cut_ended_between_two_records_ends_there_though_a_newer_one_was_begun() {
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
    let whole = &image.files[&log];
    assert_eq!(whole.len(), ends[keys.len() - 1]);
    let edges = edges(whole);
    for edge in edges[..edges.len() - 1].iter().copied() {
        let mut torn = image.clone();
        torn.files.get_mut(&log).unwrap().truncate(edge);
        torn.files.insert(newer.clone(), predecessor(number, whole.len()));
        let copy = dir.path().join("copy");
        torn.write(&copy);
        let store = open(&copy).unwrap_or_else(|error| panic!("cut at {edge} of {}: {error}", whole.len()));
        for (key, end) in keys.iter().zip(&ends) {
            let there = matches!(store.check(key).wait().unwrap(), KeyStatus::Completed(_));
            assert_eq!(there, *end <= edge, "{key}, which ends at {end}, cut at {edge}");
        }
        // What comes now is not taken for what was lost.
        complete(&store, "after it");
        store.close().wait().unwrap();
        let reopened = open(&copy).unwrap();
        assert!(matches!(reopened.check("after it").wait().unwrap(), KeyStatus::Completed(_)));
        drop(reopened);
        std::fs::remove_dir_all(&copy).unwrap();
    }
}
