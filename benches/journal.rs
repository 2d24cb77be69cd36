//! The journal of `crates/journal` beside RocksDB's write-ahead log, with the records of a store: `cargo bench --bench journal`.
//!
//! Both write the same records in alternating rounds, on the same directory, and every figure is the median of the rounds.

use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

use onlyonce_journal::{Access, Directory, Durability, Journal, Options};
use rocksdb::{DB, WriteBatch};

const ROUNDS: usize = 5;

/// What appends a record and syncs it if asked.
trait Log: Sync {
    fn append(&self, record: &[u8], number: u64, durability: Durability);
}

struct Rocks(DB);

impl Log for Rocks {
    /// As the store does: a row with a number and a header that says how far the log was synced, then a sync of its own.
    fn append(&self, record: &[u8], number: u64, durability: Durability) {
        let mut batch = WriteBatch::with_capacity_bytes(256);
        batch.put(number.to_be_bytes(), record);
        batch.put_log_data(&[1, 2, 3, 4, 5, 6, 7, 8]);
        self.0.write(batch).expect("the write succeeds");
        if durability == Durability::Disk {
            self.0.flush_wal(true).expect("the sync succeeds");
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
    Rocks(DB::open(&options, path).expect("RocksDB opens"))
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
