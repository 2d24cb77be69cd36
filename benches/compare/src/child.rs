//! The parts that run in a process of their own: what a tracer counts, and what is killed.

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

/// What the process does when it is started by the bench itself.
#[derive(Subcommand)]
pub enum Child {
    /// Lives synced lives for a time, and says how many and when.
    #[command(hide = true)]
    SyncedLives { dir: PathBuf, way: Way, milliseconds: u64 },
    /// Fills a store and closes it.
    #[command(hide = true)]
    Fill { dir: PathBuf, keys: u64, buckets: u32 },
    /// Fills a cache, and says how much more memory the process has then: in a process of its own, where nobody has
    /// left memory behind.
    #[command(hide = true)]
    MokaBytes { keys: u64 },
    /// Records keys in a store until it is killed.
    #[command(hide = true)]
    Work { dir: PathBuf, keys: u64, buckets: u32 },
}

impl Child {
    pub fn run(&self) -> Result<()> {
        match self {
            Self::SyncedLives { dir, way, milliseconds } => {
                synced_lives(dir, *way, Duration::from_millis(*milliseconds))
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
                moka.settle()?;
                println!("{}", machine::resident_bytes()?.saturating_sub(before));
                Ok(())
            }
            Self::Work { dir, keys, buckets } => {
                end_with_parent();
                let store = open_filled(dir, *keys, *buckets)?;
                println!("open");
                let mut from = NEW;
                loop {
                    for recorded in store.record_batch(&keys::keys(from, BATCH))? {
                        recorded?;
                    }
                    from += BATCH as u64;
                }
            }
        }
    }
}

/// Opens a store that a child has filled, on the real clock.
pub fn open_filled(dir: &Path, keys: u64, buckets: u32) -> Result<Store> {
    Ok(Store::builder()
        .durability(onlyonce::Durability::Process)
        .window(BUCKET * buckets)
        .bucket(BUCKET)
        .memory_budget(usize::try_from(memory_for(keys))?)
        .open(dir.join("store"))?)
}

/// A started child, killed with its owner. It ends by itself where its owner is killed: its input ends then.
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
        // Waiting for a child closes its input unless somebody else has it.
        let input = child.stdin.take();
        Ok(Self { child, _input: input })
    }
}

impl Drop for Tethered {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// In a child: ends the process when the one that started it is gone.
fn end_with_parent() {
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(1);
    });
}

/// Starts a child that works until it is killed, lets it work, and kills it.
pub fn work_and_kill(dir: &Path, keys: u64, buckets: u32, work: Duration) -> Result<()> {
    let mut worker = Tethered::start("work", dir, keys, buckets)?;
    let stdout = worker.child.stdout.take().context("the child has no output")?;
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line)?;
    if line.trim() != "open" {
        bail!("the child does not open the store");
    }
    std::thread::sleep(work);
    if let Some(status) = worker.child.try_wait()? {
        bail!("the child that works ended with {status}, before it was killed");
    }
    Ok(())
}

/// Fills a store in a process of its own, which ends well.
pub fn fill_and_close(dir: &Path, keys: u64, buckets: u32) -> Result<()> {
    let status = Tethered::start("fill", dir, keys, buckets)?.child.wait()?;
    if !status.success() {
        bail!("the child that fills the store ended with {status}");
    }
    Ok(())
}

/// The memory that moka takes for so many keys.
pub fn moka_bytes(keys: u64) -> Result<u64> {
    let output = Command::new(std::env::current_exe()?)
        .arg("moka-bytes")
        .arg(keys.to_string())
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        bail!("the child that fills moka ended with {}", output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().parse()?)
}

#[derive(Serialize, Deserialize)]
struct Lived {
    lives: u64,
    /// In seconds since the Unix epoch, as the tracer prints it.
    begin_s: f64,
    end_s: f64,
}

fn synced_lives(dir: &Path, way: Way, duration: Duration) -> Result<()> {
    let setup = Setup { dir, durability: Durability::Disk, keys: 1_000_000, buckets: 24, filter_bytes: 0 };
    let store = subject::open(Kind::Onlyonce, &setup)?;
    let begin_s = now_s()?;
    let (lives, _) = insert_for(&*store, way, duration)?;
    let lived = Lived { lives, begin_s, end_s: now_s()? };
    store.close()?;
    let mut stdout = std::io::stdout().lock();
    serde_json::to_writer(&mut stdout, &lived)?;
    Ok(writeln!(stdout)?)
}

fn now_s() -> Result<f64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64())
}

/// How many syncs a claim and completion of onlyonce costs, as strace counts them, those of its background included. `None` where
/// there is no strace.
pub fn syncs_per_life(dir: &Path, way: Way, duration: Duration) -> Result<Option<f64>> {
    if !machine::has("strace") {
        return Ok(None);
    }
    std::fs::create_dir_all(dir)?;
    let trace = dir.join("trace");
    let output = Command::new("strace")
        .args(["-f", "--seccomp-bpf", "-ttt", "-e", "trace=fdatasync,fsync", "-o"])
        .arg(&trace)
        .arg(std::env::current_exe()?)
        .arg("synced-lives")
        .arg(dir)
        .arg(way.name())
        .arg(duration.as_millis().to_string())
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .output()?;
    if !output.status.success() {
        // Some containers forbid tracing: that is no fault of who is measured.
        eprintln!("strace counts nothing: {}", String::from_utf8_lossy(&output.stderr).trim());
        remove(dir)?;
        return Ok(None);
    }
    let lived: Lived = serde_json::from_slice(&output.stdout).context("the traced child says nothing")?;
    let syncs = std::fs::read_to_string(&trace)?
        .lines()
        .filter(|line| line.contains("sync(") && is_between(line, lived.begin_s, lived.end_s))
        .count();
    remove(dir)?;
    Ok(Some(syncs as f64 / lived.lives as f64))
}

/// A line is a process, a time and a call.
fn is_between(line: &str, begin_s: f64, end_s: f64) -> bool {
    line.split_whitespace()
        .nth(1)
        .and_then(|time| time.parse().ok())
        .is_some_and(|time| (begin_s..=end_s).contains(&time))
}
