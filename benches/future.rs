//! The cost of awaited calls: cycles (a claim and its completion) of single keys and of batches, blocking and awaited.
//!
//! `cargo bench --features tokio --bench future [-- KEYS]`, 1,000,000 keys a line by default. 36-byte keys, 17-byte
//! results, a runtime of two workers. Each line is the best of three rounds; `x` compares it with blocking calls.

#![allow(clippy::print_stdout, reason = "a bench reports on standard output")]

use std::time::{Duration, Instant};

use onlyonce::{Claim, Durability, Store};

const BATCH: usize = 512;
const TASKS: usize = 1_000;
const THREADS: usize = 64;
const ROUNDS: usize = 3;
const RESULT: &[u8] = b"result-0123456789";

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn key(i: usize) -> String {
    let mix = |i: u64| {
        let x = (i ^ (i >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb)
    };
    let (a, b) = (mix(2 * i as u64 + 1), mix(2 * i as u64 + 2));
    format!("{a:016x}-{b:016x}-{:02x}", i & 0xff)
}

/// The result of one measurement.
#[derive(Clone, Copy, Default)]
struct Figures {
    rate: f64,
    cycles_per_sync: f64,
    cpu_us: f64,
}

/// CPU seconds of this process, if the system reports them. Load on the machine affects them much less than it affects rates.
fn cpu_seconds() -> f64 {
    const TICKS_A_SECOND: f64 = 100.0;
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // After the name, which may contain any character, user and system time are the 12th and 13th field.
    let fields = stat.rsplit(')').next().unwrap_or_default();
    fields.split_whitespace().skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>()
        / TICKS_A_SECOND
}

/// The part of `keys` that this worker processes.
fn share(keys: usize, workers: usize, worker: usize) -> std::ops::Range<usize> {
    keys * worker / workers..keys * (worker + 1) / workers
}

fn measure(
    durability: Durability,
    keys: usize,
    work: impl FnOnce(&Store) -> Result<(), Failure>,
) -> Result<Figures, Failure> {
    let dir = tempfile::tempdir()?;
    let store = Store::builder().durability(durability).open(dir.path().join("store"))?;
    let (before, start, cpu) = (store.stats(), Instant::now(), cpu_seconds());
    work(&store)?;
    let (elapsed, cpu) = (start.elapsed(), cpu_seconds() - cpu);
    let after = store.stats();
    let cycles = (after.completed - before.completed) as f64;
    assert_eq!(cycles, keys as f64, "every key is completed once");
    store.close().wait()?;
    let syncs = (after.journal_syncs - before.journal_syncs).max(1) as f64;
    Ok(Figures { rate: cycles / elapsed.as_secs_f64(), cycles_per_sync: cycles / syncs, cpu_us: cpu * 1e6 / cycles })
}

/// Threads with blocking calls: batch by batch, or key by key if `batch` is 1.
fn blocking(store: &Store, keys: usize, workers: usize, batch: usize) -> Result<(), Failure> {
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..workers)
            .map(|worker| {
                scope.spawn(move || -> Result<(), Failure> {
                    let keys: Vec<String> = share(keys, workers, worker).map(key).collect();
                    for keys in keys.chunks(batch) {
                        if let [key] = keys {
                            if let Claim::Acquired(lease) = store.claim(key).wait()? {
                                lease.complete(RESULT).wait()?;
                            }
                            continue;
                        }
                        let mut leases = Vec::with_capacity(keys.len());
                        for claim in store.claim_batch(keys).wait()? {
                            if let Claim::Acquired(lease) = claim? {
                                leases.push((lease, RESULT));
                            }
                        }
                        for completed in store.complete_batch(leases).wait() {
                            completed?;
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| "a worker panicked")?)
    })
}

/// Tasks that do the same with awaited calls.
fn awaited(store: &Store, keys: usize, workers: usize, batch: usize) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let workers: Vec<_> = (0..workers)
            .map(|worker| {
                let store = store.clone();
                tokio::spawn(async move {
                    let keys: Vec<String> = share(keys, workers, worker).map(key).collect();
                    for keys in keys.chunks(batch) {
                        if let [key] = keys {
                            if let Claim::Acquired(lease) = store.claim(key).await? {
                                lease.complete(RESULT).await?;
                            }
                            continue;
                        }
                        let mut leases = Vec::with_capacity(keys.len());
                        for claim in store.claim_batch(keys).await? {
                            if let Claim::Acquired(lease) = claim? {
                                leases.push((lease, RESULT));
                            }
                        }
                        for completed in store.complete_batch(leases).await {
                            completed?;
                        }
                    }
                    Ok::<_, Failure>(())
                })
            })
            .collect();
        for worker in workers {
            worker.await??;
        }
        Ok(())
    })
}

fn report(what: &str, figures: Figures, blocking: Figures) {
    let Figures { rate, cycles_per_sync, cpu_us } = figures;
    let times = rate / blocking.rate;
    println!(
        "{what:<36} {rate:>9.0} cycles/s {times:>5.2} x {cycles_per_sync:>8.0} a sync {cpu_us:>6.2} us of CPU a cycle"
    );
}

fn main() -> Result<(), Failure> {
    let keys: usize = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(1_000_000);
    let singles = keys / 5;
    type Work = fn(&Store, usize, usize, usize) -> Result<(), Failure>;
    for durability in [Durability::Disk, Durability::Process] {
        println!("{durability:?}");
        let lines: [(&str, Work, usize, usize, usize); 7] = [
            ("batches of 512, 1 thread, blocking", blocking, keys, 1, BATCH),
            ("batches of 512, 2 threads, blocking", blocking, keys, 2, BATCH),
            ("batches of 512, 1 task", awaited, keys, 1, BATCH),
            ("batches of 512, 2 tasks", awaited, keys, 2, BATCH),
            ("batches of 512, 8 tasks", awaited, keys, 8, BATCH),
            ("single keys, 64 threads, blocking", blocking, singles, THREADS, 1),
            ("single keys, 1,000 tasks", awaited, singles, TASKS, 1),
        ];
        let mut best = [Figures::default(); 7];
        for _ in 0..ROUNDS {
            for (best, (_, work, keys, workers, batch)) in best.iter_mut().zip(lines) {
                let figures = measure(durability, keys, |store| work(store, keys, workers, batch))?;
                if figures.rate > best.rate {
                    *best = figures;
                }
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        for (index, (what, ..)) in lines.iter().enumerate() {
            report(what, best[index], best[if index < 5 { index % 2 } else { 5 }]);
        }
    }
    Ok(())
}
