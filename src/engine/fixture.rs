//! What the unit tests of the engine share.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use onlyonce_core::machine::{CompletedEntry, Entry, OwnWindow};
use onlyonce_core::{Claim, RecordOutcome, StoredResult, Timestamp};

use super::core::Engine;
use super::response::Grant;
use crate::clock::ManualClock;
use crate::config::{Durability, Options};
use crate::fs::directory::Directory;

pub(super) fn engine(dir: &tempfile::TempDir, options: &Options) -> Engine {
    let directory = Directory::acquire(&dir.path().join("store"), Duration::ZERO).unwrap();
    Engine::open(directory, options).unwrap()
}

/// An engine with the smallest memory budget, on a clock that stands still.
pub(super) fn small_engine(dir: &tempfile::TempDir) -> Engine {
    let clock = Arc::new(ManualClock::at(Timestamp::from_unix_ms(1_000_000)));
    engine(dir, &Options { memory_budget: 32 << 20, clock, ..Options::default() })
}

/// Short windows on a clock that the test advances.
pub(super) fn short_windows(clock: &ManualClock) -> Options {
    Options {
        clock: Arc::new(clock.clone()),
        window: Some(Duration::from_secs(10)),
        bucket: Some(Duration::from_secs(1)),
        memory_budget: 32 << 20,
        durability: Durability::Process,
        ..Options::default()
    }
}

pub(super) fn record(engine: &Engine, key: &str) {
    let outcome = engine.record(&engine.request([key]).unwrap()).unwrap().pop().unwrap();
    assert_eq!(outcome.unwrap(), RecordOutcome::First);
}

pub(super) fn claim(engine: &Engine, key: &str) -> Grant {
    match engine.claim(&engine.request([key]).unwrap()).unwrap().pop().unwrap() {
        Ok(Claim::Acquired(grant)) => grant,
        other => panic!("{key}: {other:?}"),
    }
}

/// Adds a completed key with a result of `bytes` to the memtable.
pub(super) fn fill(engine: &Engine, digest: u64, bytes: usize) {
    let result = vec![0; bytes];
    let done = CompletedEntry {
        token: digest,
        completed_ms: engine.now().time_ms,
        own_window: OwnWindow::NONE,
        fingerprint: None,
        result: StoredResult::Bytes(result.as_slice()),
    };
    engine.tables.memtable.shard(digest).set(digest, b"k", Entry::Completed(done));
}

pub(super) fn flush_generation(engine: &Engine) -> u64 {
    engine.tables.flush_generation.load(Ordering::Relaxed)
}
