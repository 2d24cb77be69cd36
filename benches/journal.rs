//! The journal of `crates/journal` beside RocksDB's write-ahead log, with the records of a store: `cargo bench --bench journal`.
//!
//! Both write the same records in alternating rounds, on the same directory, and every figure is the median of the rounds. Callers
//! of RocksDB share syncs as those of the store do.

use std::hint::black_box;
use std::path::Path;
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use onlyonce_journal::{Access, Directory, Durability, Journal, Options};
use rocksdb::{DB, WriteBatch};

const ROUNDS: usize = 5;

/// What appends a record and syncs it if asked.
trait Log: Sync {
    fn append(&self, record: &[u8], number: u64, durability: Durability);
}

struct Rocks {
    db: DB,
    syncs: Mutex<Syncs>,
    synced: Condvar,
}

/// Which of the writes are on disk.
#[derive(Default)]
struct Syncs {
    written: u64,
    synced: u64,
    is_syncing: bool,
}

impl Rocks {
    /// As the store did when it wrote to RocksDB's log: the first waiter syncs for all whose writes are made, and yields while more arrive.
    fn sync(&self) {
        let mut state = self.syncs.lock().expect("no caller panics");
        state.written += 1;
        let mine = state.written;
        while state.synced < mine {
            if state.is_syncing {
                state = self.synced.wait(state).expect("no caller panics");
                continue;
            }
            state.is_syncing = true;
            for _ in 0..16 {
                let before = state.written;
                drop(state);
                (0..2).for_each(|_| std::thread::yield_now());
                state = self.syncs.lock().expect("no caller panics");
                if state.written == before {
                    break;
                }
            }
            let covered = state.written;
            drop(state);
            self.db.flush_wal(true).expect("the sync succeeds");
            state = self.syncs.lock().expect("no caller panics");
            (state.is_syncing, state.synced) = (false, covered);
            self.synced.notify_all();
        }
    }
}

impl Log for Rocks {
    /// As the store does: a record with a number and a header that says how far the log was synced, then a shared sync.
    fn append(&self, record: &[u8], number: u64, durability: Durability) {
        let mut batch = WriteBatch::with_capacity_bytes(256);
        batch.put(number.to_be_bytes(), record);
        batch.put_log_data([1, 2, 3, 4, 5, 6, 7, 8]);
        self.db.write(batch).expect("the write succeeds");
        if durability == Durability::Disk {
            self.sync();
        }
    }
}

impl Log for Journal<Directory> {
    fn append(&self, record: &[u8], _: u64, durability: Durability) {
        Journal::append(self, &[record], durability).expect("the append succeeds");
    }
}

fn rocks(path: &Path) -> Rocks {
    let mut options = rocksdb::Options::default();
    options.create_if_missing(true);
    options.set_write_buffer_size(32 << 20);
    options.set_max_write_buffer_number(4);
    options.set_bytes_per_sync(1 << 20);
    let db = DB::open(&options, path).expect("RocksDB opens");
    Rocks { db, syncs: Mutex::default(), synced: Condvar::new() }
}

/// As a store does: mapped if its records are not synced one by one.
fn journal(path: &Path, durability: Durability) -> Journal<Directory> {
    std::fs::create_dir(path).expect("the directory is new");
    let access = if durability == Durability::Disk { Access::Write } else { Access::Map };
    let directory = Directory::new(path, access).expect("the directory can be read");
    Journal::create(directory, &Options::default(), &[]).expect("the journal is new")
}

/// A way to append.
struct Case {
    name: &'static str,
    threads: u64,
    records: u64,
    bytes: usize,
    durability: Durability,
}

const CASES: &[Case] = &[
    Case { name: "unsynced, single", threads: 1, records: 400_000, bytes: 66, durability: Durability::Process },
    Case { name: "unsynced, 512 keys", threads: 1, records: 4_000, bytes: 27_000, durability: Durability::Process },
    Case { name: "unsynced, 2 threads", threads: 2, records: 200_000, bytes: 66, durability: Durability::Process },
    Case { name: "synced, single", threads: 1, records: 3_000, bytes: 66, durability: Durability::Disk },
    Case { name: "synced, 512 keys", threads: 1, records: 1_500, bytes: 27_000, durability: Durability::Disk },
    Case { name: "synced, 64 threads", threads: 64, records: 400, bytes: 66, durability: Durability::Disk },
];

impl Case {
    /// Records a second.
    fn run(&self, log: &impl Log) -> f64 {
        let record = vec![7; self.bytes];
        let start = Instant::now();
        std::thread::scope(|scope| {
            for thread in 0..self.threads {
                let record = &record;
                scope.spawn(move || {
                    for i in 0..self.records {
                        log.append(black_box(record), thread << 40 | i, self.durability);
                    }
                });
            }
        });
        (self.threads * self.records) as f64 / start.elapsed().as_secs_f64()
    }
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

fn main() {
    println!("records a second      RocksDB    journal   ratio   (medians of {ROUNDS} rounds)");
    for case in CASES {
        let (mut of_rocks, mut of_journal) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let dir = tempfile::tempdir_in(".").expect("the directory is new");
            let (rocks, journal) =
                (rocks(&dir.path().join("rocks")), journal(&dir.path().join("journal"), case.durability));
            of_rocks.push(case.run(&rocks));
            std::thread::sleep(Duration::from_millis(300));
            let stop = std::sync::atomic::AtomicBool::new(false);
            of_journal.push(std::thread::scope(|scope| {
                scope.spawn(|| {
                    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                        journal.maintain().expect("the maintenance succeeds");
                        std::thread::sleep(Duration::from_millis(20));
                    }
                });
                let rate = case.run(&journal);
                stop.store(true, std::sync::atomic::Ordering::Relaxed);
                rate
            }));
            std::thread::sleep(Duration::from_millis(300));
        }
        let (rocks, journal) = (median(of_rocks), median(of_journal));
        println!("{:<20} {rocks:>9.0} {journal:>10.0} {:>7.2}", case.name, journal / rocks);
    }
}
