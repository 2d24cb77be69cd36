//! Measurements in a child process, which is traced or killed.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use onlyonce::Store;
use serde::{Deserialize, Serialize};

use crate::keys::{self, NEW, RESULT};
use crate::machine;
use crate::subject::{self, Durability, Kind, Setup, Subject, memory_for};
use crate::subjects::moka::Moka;
use crate::subjects::onlyonce::{BUCKET, OnlyOnce};
use crate::workloads::durable::{Way, insert_for};
use crate::workloads::{BATCH, fill, remove};

/// What a child process does.
#[derive(Subcommand)]
pub enum Child {
    /// Claims and completes keys with syncs for a time, and prints how many and when.
    #[command(hide = true)]
    SyncedCycles { dir: PathBuf, way: Way, milliseconds: u64 },
    /// Fills a store and closes it.
    #[command(hide = true)]
    Fill { dir: PathBuf, keys: u64, buckets: u32 },
    /// Fills a cache and prints how much the memory of the process has grown. A new process has no freed memory to reuse.
    #[command(hide = true)]
    MokaBytes { keys: u64 },
    /// Records keys in a store until it is killed.
    #[command(hide = true)]
    Work { dir: PathBuf, keys: u64, buckets: u32 },
}

impl Child {
    pub fn run(&self) -> Result<()> {
        match self {
            Self::SyncedCycles { dir, way, milliseconds } => {
                synced_cycles(dir, *way, Duration::from_millis(*milliseconds))
            }
            Self::Fill { dir, keys, buckets } => {
                end_with_parent();
                let setup =
                    Setup { dir, durability: Durability::Process, keys: *keys, buckets: *buckets, filter_bytes: 0 };
                std::fs::create_dir_all(dir)?;
                let store = OnlyOnce::open(&setup)?;
                fill(&store, *keys, *buckets, &[])?;
                Box::new(store).close()
            }
            Self::MokaBytes { keys } => {
                let (dir, keys) = (Path::new(""), *keys);
                let setup = Setup { dir, durability: Durability::Process, keys, buckets: 1, filter_bytes: 0 };
                let before = machine::resident_bytes()?;
                let moka = Moka::new(&setup);
                fill(&moka, keys, 1, RESULT)?;
                moka.finish_background_work()?;
                println!("{}", machine::resident_bytes()?.saturating_sub(before));
                Ok(())
            }
            Self::Work { dir, keys, buckets } => {
                end_with_parent();
                let store = open_filled(dir, *keys, *buckets)?;
                println!("open");
                let mut from = NEW;
                loop {
                    for recorded in store.record_batch(&keys::keys(from, BATCH)).wait()? {
                        recorded?;
                    }
                    from += BATCH as u64;
                }
            }
        }
    }
}

/// Opens a store that a child filled, with the real clock.
pub fn open_filled(dir: &Path, keys: u64, buckets: u32) -> Result<Store> {
    Ok(Store::builder()
        .durability(onlyonce::Durability::Process)
        .window(BUCKET * buckets)
        .bucket(BUCKET)
        .memory_budget(usize::try_from(memory_for(keys))?)
        .open(dir.join("store"))?)
}

/// A child process. It is killed when this value is dropped, and exits by itself if its parent is killed, because its input ends.
struct Tethered {
    child: std::process::Child,
    _input: Option<std::process::ChildStdin>,
}

impl Tethered {
    /// Starts this program again.
    fn start(name: &str, dir: &Path, keys: u64, buckets: u32) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(name).arg(dir).arg(keys.to_string()).arg(buckets.to_string());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        // `Child::wait` closes the input unless it was taken.
        let input = child.stdin.take();
        Ok(Self { child, _input: input })
    }
}

impl Drop for Tethered {
    fn drop(&mut self) {
        // The child may have exited already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// In a child: exits when the parent process has exited.
fn end_with_parent() {
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(1);
    });
}

/// Starts a child that records keys, and kills it after a time.
pub fn work_and_kill(dir: &Path, keys: u64, buckets: u32, work: Duration) -> Result<()> {
    let mut worker = Tethered::start("work", dir, keys, buckets)?;
    let stdout = worker.child.stdout.take().context("the child has no output")?;
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line)?;
    if line.trim() != "open" {
        bail!("the child process did not open the store");
    }
    std::thread::sleep(work);
    if let Some(status) = worker.child.try_wait()? {
        bail!("the child process exited with {status} before it was killed");
    }
    Ok(())
}

/// Fills a store in a child process, which closes it.
pub fn fill_and_close(dir: &Path, keys: u64, buckets: u32) -> Result<()> {
    let status = Tethered::start("fill", dir, keys, buckets)?.child.wait()?;
    if !status.success() {
        bail!("the child process that fills the store failed: {status}");
    }
    Ok(())
}

/// The memory that moka needs for this many keys.
pub fn moka_bytes(keys: u64) -> Result<u64> {
    let output = Command::new(std::env::current_exe()?)
        .arg("moka-bytes")
        .arg(keys.to_string())
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        bail!("the child process that fills moka failed: {}", output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().parse()?)
}

#[derive(Serialize, Deserialize)]
struct Counted {
    cycles: u64,
    /// In seconds since the Unix epoch, as strace prints it.
    begin_s: f64,
    end_s: f64,
}

fn synced_cycles(dir: &Path, way: Way, duration: Duration) -> Result<()> {
    let setup = Setup { dir, durability: Durability::Disk, keys: 1_000_000, buckets: 24, filter_bytes: 0 };
    let store = subject::open(Kind::Onlyonce, &setup)?;
    let begin_s = now_s()?;
    let (cycles, _) = insert_for(&*store, way, duration)?;
    let counted = Counted { cycles, begin_s, end_s: now_s()? };
    store.close()?;
    let mut stdout = std::io::stdout().lock();
    serde_json::to_writer(&mut stdout, &counted)?;
    Ok(writeln!(stdout)?)
}

fn now_s() -> Result<f64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64())
}

/// The number of syncs per claim-complete cycle of onlyonce, counted by strace, background syncs included. `None` without
/// strace.
pub fn syncs_per_cycle(dir: &Path, way: Way, duration: Duration) -> Result<Option<f64>> {
    if !machine::has("strace") {
        return Ok(None);
    }
    std::fs::create_dir_all(dir)?;
    let trace = dir.join("trace");
    let output = Command::new("strace")
        .args(["-f", "--seccomp-bpf", "-ttt", "-e", "trace=fdatasync,fsync", "-o"])
        .arg(&trace)
        .arg(std::env::current_exe()?)
        .arg("synced-cycles")
        .arg(dir)
        .arg(way.name())
        .arg(duration.as_millis().to_string())
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .output()?;
    if !output.status.success() {
        // Some containers forbid tracing, which is not an error of the store.
        eprintln!("strace failed: {}", String::from_utf8_lossy(&output.stderr).trim());
        remove(dir)?;
        return Ok(None);
    }
    let counted: Counted =
        serde_json::from_slice(&output.stdout).context("the traced child process printed no result")?;
    let syncs = std::fs::read_to_string(&trace)?
        .lines()
        .filter(|line| line.contains("sync(") && is_between(line, counted.begin_s, counted.end_s))
        .count();
    remove(dir)?;
    Ok(Some(syncs as f64 / counted.cycles as f64))
}

/// A line has a process, a time and a system call.
fn is_between(line: &str, begin_s: f64, end_s: f64) -> bool {
    line.split_whitespace()
        .nth(1)
        .and_then(|time| time.parse().ok())
        .is_some_and(|time| (begin_s..=end_s).contains(&time))
}
