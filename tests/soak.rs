//! A long run at full speed with expiring buckets, killed and reopened every few seconds: every answer is checked, and
//! memory, open files and disk space must not grow.
//!
//! The child processes numbered deliveries in batches and writes each batch to a ledger, before and after: a plain
//! file, which survives a kill. It also checks batches of the last two windows, mostly those whose window is just
//! ending. The next child reads the ledger, and continues from it.
//!
//! `ONLYONCE_SOAK_SECONDS` (default: 10) sets the duration, and `ONLYONCE_SOAK_SEED` (default: random, and printed) the
//! seed.

#[path = "common/torture.rs"]
mod torture;

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use onlyonce::{Claim, Clock, Completed, Durability, KeyStatus, ManualClock, Store, Timestamp};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use torture::number;

const STORE: &str = "ONLYONCE_SOAK_STORE";
const LEDGERS: &str = "ONLYONCE_SOAK_LEDGERS";
const WINDOW: &str = "ONLYONCE_SOAK_WINDOW_MS";
const CHILD_SEED: &str = "ONLYONCE_SOAK_CHILD_SEED";

const WORKERS: u64 = 2;
const BATCH: u64 = 512;
/// The number of buckets per window.
const BUCKETS: u64 = 16;
const BUDGET_BYTES: usize = 64 << 20;

/// Memory of a process besides the budget: its code, RocksDB's structures, current batches, and the free memory of the
/// allocator, which with glibc is more than half of the used memory.
const RSS_MARGIN_BYTES: u64 = 160 << 20;
/// A child that runs this long is checked for slow growth: its last quarter may exceed its second quarter, when every
/// part has been in use once, by this percentage.
const LONG_RUN: Duration = Duration::from_secs(60);
const GROWTH_PERCENT: u64 = 15;
/// Slack for the number of open files: a compaction opens some more.
const GROWTH_FILES: u64 = 20;
/// RocksDB keeps at most 512 files open.
const FILES_MAX: u64 = 600;
/// The disk space of a remembered key, with its share of a filter, and with a second copy during compactions.
const DISK_BYTES_PER_KEY: u64 = 3 * 90;
/// Disk space of the logs and the journal.
const DISK_MARGIN_BYTES: u64 = 256 << 20;

fn open(path: &Path, clock: &ManualClock, window_ms: u64) -> Store {
    let store = Store::builder()
        .window(Duration::from_millis(window_ms))
        .bucket(Duration::from_millis(window_ms / BUCKETS))
        .lease(Duration::from_secs(24 * 60 * 60))
        .durability(Durability::Process)
        .memory_budget(BUDGET_BYTES)
        .lock_wait(Duration::from_secs(20))
        .clock(clock.clone())
        .open(path)
        .unwrap();
    // Answers are checked with the wall clock, so that the store's time must equal it.
    clock.set_wall(Timestamp::from_unix_ms(store.stats().now.as_unix_ms()));
    store
}

fn clock() -> ManualClock {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    ManualClock::at(Timestamp::from_unix_ms(u64::try_from(now.as_millis()).unwrap()))
}

/// The deliveries `first..first + BATCH` of a worker, completed between these two times.
#[derive(Debug, Clone, Copy)]
struct Batch {
    first: u64,
    started_ms: u64,
    ended_ms: u64,
}

fn key(worker: u64, delivery: u64) -> String {
    format!("worker-{worker}/delivery-{delivery:016}")
}

fn result(worker: u64, delivery: u64) -> [u8; 16] {
    let mixed = (delivery ^ worker << 60).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (u128::from(mixed) << 64 | u128::from(delivery)).to_le_bytes()
}

/// The ledger of a worker, as in its file.
struct Ledger {
    known: VecDeque<Batch>,
    /// The batch that was started, and may be completed.
    uncertain: Option<u64>,
    next: u64,
    last_token: u64,
}

impl Ledger {
    fn read(path: &Path) -> Self {
        let mut ledger = Self { known: VecDeque::new(), uncertain: None, next: 0, last_token: 0 };
        let text = fs::read_to_string(path).unwrap_or_default();
        // A line without a line feed is incomplete: the child was killed while it wrote it.
        for line in text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
            let mut words = line.split(' ');
            let word = words.next().unwrap();
            let numbers: Vec<u64> = words.map(|word| word.parse().unwrap()).collect();
            match (word, numbers.as_slice()) {
                ("try", &[first]) => {
                    ledger.uncertain = Some(first);
                    ledger.next = first + BATCH;
                }
                ("done", &[first, started_ms, ended_ms, token]) => {
                    ledger.uncertain = None;
                    ledger.next = ledger.next.max(first + BATCH);
                    ledger.last_token = ledger.last_token.max(token);
                    ledger.known.push_back(Batch { first, started_ms, ended_ms });
                }
                _ => panic!("the ledger has {line:?}"),
            }
        }
        ledger
    }

    /// Removes batches that are older than two windows.
    fn trim(&mut self, now_ms: u64, window_ms: u64) {
        // Keeps the last one, which determines the next delivery.
        while self.known.len() > 1 && self.known.front().is_some_and(|old| old.ended_ms + 2 * window_ms < now_ms) {
            self.known.pop_front();
        }
    }

    /// Writes a new file without the removed batches, and returns it for further lines.
    fn rewrite(&self, path: &Path) -> File {
        let new = path.with_extension("new");
        let mut text: String = self.known.iter().map(|batch| done_line(batch, self.last_token)).collect();
        if let Some(first) = self.uncertain {
            text.push_str(&format!("try {first}\n"));
        }
        fs::write(&new, text).unwrap();
        fs::rename(&new, path).unwrap();
        File::options().append(true).open(path).unwrap()
    }
}

fn done_line(batch: &Batch, token: u64) -> String {
    format!("done {} {} {} {token}\n", batch.first, batch.started_ms, batch.ended_ms)
}

/// A thread of the child.
struct Worker<'a> {
    number: u64,
    store: &'a Store,
    clock: &'a ManualClock,
    window_ms: u64,
    ledger: Ledger,
}

impl Worker<'_> {
    fn keys(&self, batch: Batch) -> Vec<String> {
        (batch.first..batch.first + BATCH).map(|delivery| key(self.number, delivery)).collect()
    }

    /// Checks the answer `Completed`: it must have the stored result, within the window.
    fn check_completed(&self, batch: Batch, delivery: u64, before_ms: u64, completed: &Completed) {
        let name = key(self.number, delivery);
        assert!(before_ms < batch.ended_ms + self.window_ms, "G4: {name} is remembered after its window: {batch:?}");
        assert_eq!(completed.result(), Some(&result(self.number, delivery)[..]), "G1: {name} has a different result");
        let at_ms = completed.completed_at().as_unix_ms();
        assert!((batch.started_ms..=batch.ended_ms).contains(&at_ms), "G1: {name}: {at_ms} is not in {batch:?}");
    }

    /// Checks the answer `New`: the window must have ended.
    fn check_expired(&self, batch: Batch, delivery: u64) {
        let now_ms = self.clock.wall().as_unix_ms();
        let name = key(self.number, delivery);
        assert!(now_ms >= batch.started_ms + self.window_ms, "G1: {name} is forgotten at {now_ms}: {batch:?}");
    }

    /// Checks every key of a batch.
    fn check(&self, batch: Batch) {
        let before_ms = self.clock.wall().as_unix_ms();
        for (delivery, check) in (batch.first..).zip(self.store.check_batch(self.keys(batch)).wait().unwrap()) {
            match check.unwrap() {
                KeyStatus::Completed(completed) => self.check_completed(batch, delivery, before_ms, &completed),
                KeyStatus::New => self.check_expired(batch, delivery),
                KeyStatus::InProgress(other) => panic!("{delivery} of {batch:?} is in progress: {other:?}"),
            }
        }
    }

    /// Claims keys of a batch again, as a duplicate delivery does.
    fn claim_again(&self, batch: Batch, keys: usize) {
        let before_ms = self.clock.wall().as_unix_ms();
        let keys = self.keys(batch).into_iter().take(keys);
        for (delivery, claim) in (batch.first..).zip(self.store.claim_batch(keys).wait().unwrap()) {
            match claim.unwrap() {
                Claim::Completed(completed) => self.check_completed(batch, delivery, before_ms, &completed),
                // Dropped, so that it is not completed again.
                Claim::Acquired(_) => self.check_expired(batch, delivery),
                Claim::InProgress(other) => panic!("{delivery} of {batch:?} is in progress: {other:?}"),
            }
        }
    }

    /// A batch that was being completed during a kill is completed atomically.
    fn check_uncertain(&mut self) {
        let Some(first) = self.ledger.uncertain.take() else { return };
        let batch = Batch { first, started_ms: 0, ended_ms: u64::MAX / 2 };
        let checks: Vec<KeyStatus> =
            self.store.check_batch(self.keys(batch)).wait().unwrap().into_iter().map(Result::unwrap).collect();
        let completed: Vec<&Completed> = checks
            .iter()
            .filter_map(|check| if let KeyStatus::Completed(completed) = check { Some(completed) } else { None })
            .collect();
        match completed.first() {
            None => assert!(checks.iter().all(|check| matches!(check, KeyStatus::New)), "G2: {checks:?}"),
            Some(one) => {
                assert_eq!(completed.len() as u64, BATCH, "half of {batch:?} is completed");
                let at_ms = one.completed_at().as_unix_ms();
                let batch = Batch { first, started_ms: at_ms, ended_ms: at_ms };
                for (delivery, completed) in (first..).zip(completed) {
                    self.check_completed(batch, delivery, 0, completed);
                }
                self.ledger.known.push_back(batch);
            }
        }
    }

    /// Processes the next deliveries, which are new.
    fn deliver(&mut self, file: &mut File, tokens_before: u64) {
        let first = self.ledger.next;
        self.ledger.next += BATCH;
        let mut batch = Batch { first, started_ms: 0, ended_ms: 0 };
        file.write_all(format!("try {first}\n").as_bytes()).unwrap();
        let mut leases = Vec::with_capacity(BATCH as usize);
        let mut last_token = tokens_before;
        for (delivery, claim) in (first..).zip(self.store.claim_batch(self.keys(batch)).wait().unwrap()) {
            let Claim::Acquired(lease) = claim.unwrap() else { panic!("G2: {delivery} of {batch:?} is new") };
            assert!(lease.token().get() > last_token, "G3: {} after {last_token}", lease.token().get());
            last_token = lease.token().get();
            leases.push((lease, result(self.number, delivery)));
        }
        batch.started_ms = self.clock.wall().as_unix_ms();
        let completed = self.store.complete_batch(leases).wait();
        assert!(completed.iter().all(Result::is_ok), "{completed:?}");
        batch.ended_ms = self.clock.wall().as_unix_ms();
        file.write_all(done_line(&batch, last_token).as_bytes()).unwrap();
        self.ledger.last_token = last_token;
        self.ledger.known.push_back(batch);
    }

    /// A batch whose window is just ending.
    fn ending(&self) -> Option<Batch> {
        let began_ms = self.clock.wall().as_unix_ms().checked_sub(self.window_ms)?;
        let index = self.ledger.known.partition_point(|batch| batch.ended_ms < began_ms);
        self.ledger.known.get(index).copied()
    }

    /// Checks keys of known batches and keys that were never delivered. Returns the number of answers.
    fn recheck(&self, rng: &mut StdRng) -> u64 {
        let known = &self.ledger.known;
        let drawn = known[rng.random_range(0..known.len())];
        let batch = if rng.random_bool(0.3) { self.ending().unwrap_or(drawn) } else { drawn };
        // An acquired key is dropped, and stays in memory for a window: only few of them.
        let is_over = self.clock.wall().as_unix_ms() >= batch.started_ms + self.window_ms;
        if rng.random_bool(0.5) && !is_over {
            self.claim_again(batch, BATCH as usize);
        } else if rng.random_bool(0.05) {
            self.claim_again(batch, 8);
        } else {
            self.check(batch);
        }
        let never = (0..32).map(|_| key(self.number, rng.random_range(1 << 50..1 << 51)));
        for check in self.store.check_batch(never).wait().unwrap() {
            assert!(matches!(check, Ok(KeyStatus::New)), "G5: {check:?} of a key that was never delivered");
        }
        BATCH
    }
}

/// The process that is killed. Only the test below runs it.
#[test]
#[ignore = "run by the test that kills it"]
fn child() {
    torture::end_at_panic();
    let variable = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("{name} is set by the parent"));
    let (path, ledgers) = (variable(STORE), variable(LEDGERS));
    let (window_ms, seed): (u64, u64) = (variable(WINDOW).parse().unwrap(), variable(CHILD_SEED).parse().unwrap());
    let clock = &clock();
    let store = &open(Path::new(&path), clock, window_ms);
    let ledger_of = |number: u64| Path::new(&ledgers).join(format!("worker-{number}"));
    // The highest token of all threads before.
    let tokens_before = (0..WORKERS).map(|number| Ledger::read(&ledger_of(number)).last_token).max().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut last = Instant::now();
            loop {
                std::thread::sleep(Duration::from_millis(1));
                let elapsed = Duration::from_millis(u64::try_from(last.elapsed().as_millis()).unwrap());
                last += elapsed;
                clock.advance(elapsed);
            }
        });
        for number in 0..WORKERS {
            let path = ledger_of(number);
            scope.spawn(move || {
                let mut rng = StdRng::seed_from_u64(seed + number);
                let mut worker = Worker { number, store, clock, window_ms, ledger: Ledger::read(&path) };
                worker.check_uncertain();
                // A crash most likely loses the batches that were acknowledged last.
                worker.ledger.known.iter().rev().take(20).for_each(|batch| worker.check(*batch));
                worker.ledger.trim(clock.wall().as_unix_ms(), window_ms);
                let mut file = worker.ledger.rewrite(&path);
                let mut tokens = tokens_before;
                loop {
                    worker.deliver(&mut file, tokens);
                    tokens = worker.ledger.last_token;
                    worker.ledger.trim(clock.wall().as_unix_ms(), window_ms);
                    let rechecked = if rng.random_bool(0.3) { worker.recheck(&mut rng) } else { 0 };
                    let line = format!("@{BATCH} {rechecked}\n");
                    std::io::stdout().lock().write_all(line.as_bytes()).unwrap();
                }
            });
        }
    });
}

/// A measurement of the child.
#[derive(Debug, Default, Clone, Copy)]
struct Sample {
    at: Duration,
    rss_bytes: u64,
    files: u64,
    disk_bytes: u64,
    /// The total number of completed keys.
    keys: u64,
}

/// The maximum of each value between these fractions of the whole time.
fn largest(samples: &[Sample], total: Duration, from: f64, to: f64) -> Sample {
    let within = samples.iter().filter(|sample| sample.at >= total.mul_f64(from) && sample.at <= total.mul_f64(to));
    within.fold(Sample::default(), |largest, sample| Sample {
        rss_bytes: largest.rss_bytes.max(sample.rss_bytes),
        files: largest.files.max(sample.files),
        disk_bytes: largest.disk_bytes.max(sample.disk_bytes),
        ..*sample
    })
}

/// Memory and open files of a child in its second and its last quarter: the medians of the samples.
fn growth(samples: &[Sample]) -> [(u64, u64); 2] {
    let quarter = samples.len() / 4;
    let middle = |samples: &[Sample], of: fn(&Sample) -> u64| {
        let mut values: Vec<u64> = samples.iter().map(of).collect();
        values.sort_unstable();
        values[values.len() / 2]
    };
    let (begun, ending) = (&samples[quarter..2 * quarter], &samples[3 * quarter..]);
    [|sample: &Sample| sample.rss_bytes, |sample: &Sample| sample.files]
        .map(|of| (middle(begun, of), middle(ending, of)))
}

fn resident_bytes(process: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
}

fn bytes_below(path: &Path) -> u64 {
    // Files are deleted concurrently.
    let Ok(entries) = fs::read_dir(path) else { return 0 };
    let bytes = |entry: fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => bytes_below(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    };
    entries.flatten().map(bytes).sum()
}

struct Soak {
    dir: tempfile::TempDir,
    window_ms: u64,
    begun: Instant,
    samples: Vec<Sample>,
    keys: AtomicU64,
    rechecked: AtomicU64,
}

impl Soak {
    fn store(&self) -> std::path::PathBuf {
        self.dir.path().join("store")
    }

    fn spawn(&self, seed: u32) -> Child {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--ignored", "--nocapture", "--test-threads=1"])
            .env(STORE, self.store())
            .env(LEDGERS, self.dir.path())
            .env(WINDOW, self.window_ms.to_string())
            .env(CHILD_SEED, seed.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Runs a child for this long, measures it, and kills it.
    fn run_child(&mut self, lasts: Duration, seed: u32) {
        let mut child = self.spawn(seed);
        let out = child.stdout.take().unwrap();
        let (keys, rechecked) = (&self.keys, &self.rechecked);
        let (begun, store) = (self.begun, self.store());
        let samples = std::thread::scope(|scope| {
            scope.spawn(move || {
                for line in BufReader::new(out).lines().map_while(Result::ok) {
                    let Some((more, again)) = line.strip_prefix('@').and_then(|line| line.split_once(' ')) else {
                        continue;
                    };
                    keys.fetch_add(more.parse().unwrap(), Ordering::Relaxed);
                    rechecked.fetch_add(again.parse().unwrap(), Ordering::Relaxed);
                }
            });
            let mut samples = Vec::new();
            let born = Instant::now();
            while born.elapsed() < lasts {
                std::thread::sleep(Duration::from_millis(100));
                let ended = child.try_wait().unwrap();
                assert!(ended.is_none(), "the child ended by itself: {ended:?}");
                let Some(rss_bytes) = resident_bytes(child.id()) else { continue };
                samples.push(Sample {
                    at: begun.elapsed(),
                    rss_bytes,
                    files: fs::read_dir(format!("/proc/{}/fd", child.id())).map_or(0, Iterator::count) as u64,
                    disk_bytes: bytes_below(&store),
                    keys: keys.load(Ordering::Relaxed),
                });
            }
            child.kill().unwrap();
            child.wait().unwrap();
            samples
        });
        if lasts >= LONG_RUN {
            let [memory, files] = growth(&samples);
            let [begun, ending] = [memory.0, memory.1].map(|bytes| bytes >> 20);
            eprintln!(
                "a child of {} s: memory {begun} MiB in its second quarter and {ending} in its last, open files {} and {}",
                lasts.as_secs(),
                files.0,
                files.1,
            );
            for ((begun, ending), slack) in [(memory, 0), (files, GROWTH_FILES)] {
                assert!(
                    ending <= begun + begun * GROWTH_PERCENT / 100 + slack,
                    "memory or open files grow: {begun} to {ending}"
                );
            }
        }
        self.samples.extend(samples);
    }

    /// Opens the store and checks every key of the ledgers.
    fn check_all(&self) -> u64 {
        let clock = clock();
        let store = open(&self.store(), &clock, self.window_ms);
        let mut checked = 0;
        for number in 0..WORKERS {
            let ledger = Ledger::read(&self.dir.path().join(format!("worker-{number}")));
            let mut worker = Worker { number, store: &store, clock: &clock, window_ms: self.window_ms, ledger };
            worker.check_uncertain();
            for batch in &worker.ledger.known {
                worker.check(*batch);
                checked += BATCH;
            }
        }
        store.close().wait().unwrap();
        checked
    }

    /// In no sample may the disk space exceed the bound for the keys that are remembered at that time.
    fn check_disk(&self) {
        let kept = Duration::from_millis(self.window_ms + 3 * self.window_ms / BUCKETS);
        let mut from = 0;
        for sample in &self.samples {
            while self.samples[from].at + kept < sample.at {
                from += 1;
            }
            // Between two children there are no reports, and the last report may be missing: the sample before counts.
            let remembered = sample.keys - self.samples[from.saturating_sub(1)].keys;
            let bound = remembered * DISK_BYTES_PER_KEY + DISK_MARGIN_BYTES;
            assert!(sample.disk_bytes <= bound, "{sample:?}: {remembered} keys are remembered");
        }
    }
}

#[test]
fn a_store_at_full_speed_stays_correct_and_bounded_through_kills_and_expiry() {
    let seconds = number("ONLYONCE_SOAK_SECONDS").unwrap_or(10);
    let seed = number("ONLYONCE_SOAK_SEED").unwrap_or_else(|| rand::rng().random());
    eprintln!("ONLYONCE_SOAK_SEED={seed} ONLYONCE_SOAK_SECONDS={seconds}");
    let mut rng = StdRng::seed_from_u64(seed);
    let total = Duration::from_secs(seconds);
    let mut soak = Soak {
        dir: tempfile::tempdir().unwrap(),
        window_ms: (seconds * 200).clamp(1_600, 8_000),
        begun: Instant::now(),
        samples: Vec::new(),
        keys: AtomicU64::new(0),
        rechecked: AtomicU64::new(0),
    };
    let mut kills = 0;
    while let left = total.saturating_sub(soak.begun.elapsed())
        && !left.is_zero()
    {
        // In a long test the first child and some others run for long, to detect slow growth.
        let is_long = seconds >= 600 && (kills == 0 || rng.random_bool(0.01));
        let lasts = if is_long {
            (total / 12).max(LONG_RUN)
        } else {
            (total / 4).min(Duration::from_millis(rng.random_range(1_500..6_000)))
        };
        soak.run_child(lasts.min(left), rng.random());
        kills += 1;
    }
    let checked = soak.check_all();
    let keys = soak.keys.load(Ordering::Relaxed);
    let rechecked = soak.rechecked.load(Ordering::Relaxed);
    let (early, late) = (largest(&soak.samples, total, 0.05, 0.15), largest(&soak.samples, total, 0.9, 1.0));
    let most = largest(&soak.samples, total, 0.0, 1.0);
    let mib = |bytes: u64| bytes >> 20;
    eprintln!(
        "{keys} keys in {seconds} s ({} a second), {rechecked} keys checked again and {checked} at the end, {kills} kills\n\
         at 10 %, at the end, at most: memory {}, {}, {} MiB of a budget of {}; open files {}, {}, {}; disk {}, {}, {} MiB",
        keys / seconds,
        mib(early.rss_bytes),
        mib(late.rss_bytes),
        mib(most.rss_bytes),
        BUDGET_BYTES >> 20,
        early.files,
        late.files,
        most.files,
        mib(early.disk_bytes),
        mib(late.disk_bytes),
        mib(most.disk_bytes),
    );
    assert!(most.rss_bytes <= BUDGET_BYTES as u64 + RSS_MARGIN_BYTES, "it uses too much memory");
    assert!(most.files <= FILES_MAX, "it has too many files open");
    soak.check_disk();
    assert!(keys > 1_000 * seconds && rechecked > 100 * seconds, "too few keys");
}
