//! Opening a store: create or check it, replay the journal, and write what this opening changes.
//!
//! Order: the options, the retention floor and a new block of tokens are synced before the first call. Otherwise tokens could
//! be handed out a second time after a power cut, and a late holder would pass for the current one.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::core::{Engine, Tables};
use super::execute::apply;
use super::health::Health;
use super::meta_entries::{
    CLOCK, FLOOR, FORMAT, HIGH_WATER, ON_INTERRUPT, SECRET, SPAN, STREAM_TIME, TOKENS, corrupt_meta, meta,
};
use super::request::KeyRef;
use super::sequence::Sequence;
use super::timekeeping;
use super::writer::Writer;
use crate::buckets::filters::Filters;
use crate::buckets::registry::BucketRegistry;
use crate::clock::ClockState;
use crate::codec;
use crate::config::{Durability, Options, Stored};
use crate::digest::Digester;
use crate::fs::directory::Directory;
use crate::journal::replayed::{Replay, Totals};
use crate::journal::store_journal::{JournalReplay, MANIFEST, Segments, StoreJournal};
use crate::memtable::table::{MemTable, Shard};
use crate::metrics::Metrics;
use crate::rocks::db::Db;
use crate::rocks::manifest;
use crate::stats::Counters;
use crate::testing::failpoint::Failpoint;
use crate::testing::sync_shim::{AtomicU64, Mutex};
use onlyonce_core::machine::{self, Crash, Event, Opened, Policy};
use onlyonce_core::{Error, Result};

/// The filters' share of the memory budget, in sixteenths. Unflushed keys have four, the block cache four, the recent cache one.
const FILTER_SIXTEENTHS: usize = 7;

/// The recent cache gets the memory budget divided by this.
const RECENT_SHARE: usize = 16;

impl Engine {
    /// Opens or creates the store in `directory`, and replays the journal into the memtable.
    pub(crate) fn open(directory: Directory, options: &Options) -> Result<Self> {
        let (path, journal_path) = (directory.root().to_owned(), directory.journal());
        let seed = || {
            let entries = first_meta_entries(options, &path)?;
            StoreJournal::create(&journal_path)?;
            Ok(entries)
        };
        let directory = Arc::new(directory);
        let segments =
            Segments { are_synced_often: options.durability == Durability::Disk, spare_bytes: options.spare_segments };
        let read = || JournalReplay::read(&journal_path, &directory, segments);
        // Before the database is opened, which deletes what its manifest does not list. Another version may write another journal.
        let replay = match directory.holds_a_store()? {
            true => {
                manifest::require(&directory.database())?;
                Some(read().map_err(|error| unsupported_format(&directory).unwrap_or(error))?)
            }
            false => None,
        };
        let stated = replay.as_ref().and_then(|replay| replay.manifest);
        let (db, families) = Db::open(Arc::clone(&directory), options.memory_budget, options.lock_wait, stated, seed)?;
        let db = Arc::new(db);
        check_format(&db, &path)?;
        let journal_replay = replay.map_or_else(read, Ok)?;
        let secret = meta(&db, SECRET)?;
        let digester = Digester::new(&secret);
        let memtable = MemTable::new(options.memory_budget / RECENT_SHARE);
        let poison = Arc::clone(memtable.poison());
        let mut replay = Replay::default();
        let (journal, replayed_bytes) = StoreJournal::open(journal_replay, &db, |number, record| {
            replay.add(number, record, |key, event| {
                let digest = digester.digest(key);
                apply_replayed(&mut memtable.shard(digest), digest, key, event);
            })
        })?;
        let replayed = Totals { bytes: replayed_bytes, ..replay.totals };
        drop(replay);
        let StoredMeta { stored, tokens } = StoredMeta::read(&db)?;
        let stored_span = stored.span;
        let config = options.check(Some(stored))?;
        if replayed.last_number >= tokens {
            return Err(Error::Corrupt {
                place: "`tokens` in `meta`".to_owned(),
                detail: format!(
                    "the journal has record {}, but only the numbers below {tokens} were reserved",
                    replayed.last_number
                ),
            });
        }
        let timeline = Arc::new(timekeeping::resume(&db, &options.clock, &config, stored_span, replayed.time_ms)?);
        let filter_budget = (config.memory_budget / 16).saturating_mul(FILTER_SIXTEENTHS) as u64;
        let filters = Filters::find(&db, &secret, &families)?;
        let now = timeline.now();
        let (span, expected) = (config.span, config.bucket_keys);
        let buckets = BucketRegistry::open(&db, &families, span, &now, expected, filter_budget, filters.geometry())?;
        let buckets = buckets.of(&poison);
        let policy = Policy {
            window_ms: config.span.window_ms,
            on_interrupt: config.on_interrupt,
            is_stream: timeline.is_stream(),
            opened: Opened::at(now),
            first_token: tokens,
        };
        let sequence = Sequence::after(tokens).of(&poison);
        let (waiters, backlog) = (Arc::default(), Arc::default());
        let health = Arc::new(Health::new(poison, &waiters, &backlog));
        let metrics = Arc::new(Metrics::new(&path));
        let engine = Self {
            config,
            policy,
            digester,
            writer: Writer::new(journal, sequence, &db, &health, &timeline, &metrics, replayed.bytes),
            timeline,
            health,
            tables: Tables {
                db,
                memtable,
                buckets,
                filters,
                flush_lock: Mutex::new(()),
                flush_generation: AtomicU64::new(0),
            },
            backlog,
            waiters,
            delivered_below: AtomicU64::new(0),
            counters: Counters::default(),
            metrics,
            replayed,
        };
        Failpoint::OpenReplayed.pass();
        engine.mark_crashed_attempts()?;
        engine.persist_opening()?;
        Ok(engine)
    }

    /// Marks the keys that were leased when the journal was written: the process that held them has crashed. A held key
    /// becomes free if the store is opened with `OnInterrupt::Rerun`.
    fn mark_crashed_attempts(&self) -> Result<()> {
        let now = self.timeline.now();
        for shard in self.tables.memtable.shards() {
            let keys: Vec<_> = shard.in_flight().map(|(digest, key, _)| (digest, key.to_vec())).collect();
            drop(shard);
            for (digest, key) in keys {
                self.execute_in_memory(KeyRef::of(digest, &key), Crash, now, |()| ())?;
            }
        }
        Ok(())
    }

    /// Syncs what this opening changes, before the first call: options, the retention floor and tokens.
    fn persist_opening(&self) -> Result<()> {
        self.health.check_invariants()?;
        self.timeline.ask_to_be_saved();
        let manifest = self.tables.db.manifest()?;
        self.writer.write(true, |tx| {
            tx.put_meta(MANIFEST, &manifest.encode());
            tx.put_meta(SPAN, &codec::put_span(self.config.span));
            tx.put_meta(ON_INTERRUPT, &codec::put_on_interrupt(self.config.on_interrupt));
            if let Some(ahead_ms) = self.config.max_ahead_ms {
                tx.put_meta(STREAM_TIME, &ahead_ms.to_le_bytes());
            }
        })?;
        Failpoint::OpenOptionsWritten.pass();
        self.writer.reserve_tokens(0)?;
        // A flush has nothing to do if only this was written.
        self.writer.journal_bytes.store(self.replayed.bytes, Ordering::Relaxed);
        Failpoint::OpenTokensReserved.pass();
        tracing::info!(
            path = %self.tables.db.directory().root().display(),
            journal_records = self.replayed.records,
            unflushed = self.tables.memtable.flushable(),
            interrupted = self.tables.memtable.in_flight(),
            buckets = self.tables.buckets.snapshot().newest_first().len(),
            "store opened"
        );
        Ok(())
    }
}

/// The meta entries of a new store.
fn first_meta_entries(options: &Options, path: &Path) -> Result<Vec<(&'static str, Vec<u8>)>> {
    // Checked before anything is created. The options of an existing store are checked once its stored ones are read.
    let config = options.check(None)?;
    let mut secret = codec::Secret::default();
    // A model run is repeatable only if its keys fall into the same shards each time.
    if !cfg!(shuttle) {
        getrandom::fill(&mut secret).map_err(|error| Error::io("drawing a secret for", path, error.to_string()))?;
    }
    let format = if config.max_ahead_ms.is_some() { codec::STREAM_FORMAT } else { codec::FORMAT };
    let mut meta_entries = vec![
        (FORMAT, format.to_le_bytes().to_vec()),
        (SECRET, secret.to_vec()),
        (SPAN, codec::put_span(config.span)),
        (ON_INTERRUPT, codec::put_on_interrupt(config.on_interrupt)),
        (TOKENS, 1_u64.to_le_bytes().to_vec()),
        (HIGH_WATER, 0_u64.to_le_bytes().to_vec()),
        (FLOOR, 0_u64.to_le_bytes().to_vec()),
    ];
    meta_entries.push(match config.max_ahead_ms {
        Some(ahead_ms) => (STREAM_TIME, ahead_ms.to_le_bytes().to_vec()),
        None => (CLOCK, codec::put_clock(&ClockState::default())),
    });
    Ok(meta_entries)
}

/// Fails if the store has another format.
fn check_format(db: &Db, path: &Path) -> Result<()> {
    check_supported(u32::from_le_bytes(meta(db, FORMAT)?), path)
}

/// The error of a store of another format, whose journal cannot be read.
fn unsupported_format(directory: &Directory) -> Option<Error> {
    let format = Db::read_meta(directory, FORMAT)?.try_into().ok()?;
    check_supported(u32::from_le_bytes(format), directory.root()).err()
}

fn check_supported(format: u32, path: &Path) -> Result<()> {
    match format {
        codec::FORMAT | codec::STREAM_FORMAT => Ok(()),
        found => {
            let supported = codec::STREAM_FORMAT;
            Err(Error::UnsupportedFormat { path: path.to_owned(), found, supported })
        }
    }
}

/// The meta entries that an open needs, as they are after the replay.
struct StoredMeta {
    stored: Stored,
    /// Tokens and record numbers below this one were reserved.
    tokens: u64,
}

impl StoredMeta {
    fn read(db: &Db) -> Result<Self> {
        let is_stream = u32::from_le_bytes(meta(db, FORMAT)?) == codec::STREAM_FORMAT;
        let max_ahead_ms = if is_stream { Some(u64::from_le_bytes(meta(db, STREAM_TIME)?)) } else { None };
        let span = codec::read_span(&meta::<16>(db, SPAN)?).ok_or_else(|| corrupt_meta(SPAN))?;
        let on_interrupt = codec::read_on_interrupt(&meta::<1>(db, ON_INTERRUPT)?);
        let on_interrupt = on_interrupt.ok_or_else(|| corrupt_meta(ON_INTERRUPT))?;
        Ok(Self { stored: Stored { span, on_interrupt, max_ahead_ms }, tokens: u64::from_le_bytes(meta(db, TOKENS)?) })
    }
}

/// Replays an event of the journal in the memtable.
fn apply_replayed(shard: &mut Shard<'_>, digest: u64, key: &[u8], event: Event<&[u8]>) {
    let change = machine::replay(shard.get(digest, key).as_ref(), event);
    apply(shard, digest, key, change, 0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::fixture::{fill, small_engine};
    use onlyonce_core::machine::{CompletedEntry, Entry, Holder, OwnWindow, Processing};
    use onlyonce_core::{PriorAttempt, StoredResult};

    #[test]
    fn the_recent_cache_has_a_sixteenth_of_the_memory_budget() {
        let dir = tempfile::tempdir().unwrap();
        let engine = small_engine(&dir);
        for digest in 0..6 {
            fill(&engine, digest, 1 << 20);
            engine.flush().unwrap();
        }
        let cached = |digest: &u64| engine.tables.memtable.recent().get(*digest, b"k").is_some();
        assert_eq!((0..6).filter(cached).collect::<Vec<_>>(), [4, 5], "two MiB of six");
    }

    #[test]
    fn a_store_of_another_format_is_rejected_also_if_its_journal_cannot_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let engine = small_engine(&dir);
        engine.writer.write(true, |tx| tx.put_meta(FORMAT, &99_u32.to_le_bytes())).unwrap();
        engine.flush().unwrap();
        engine.close().unwrap();
        drop(engine);
        let journal = dir.path().join("store/journal");
        for is_readable in [true, false] {
            if !is_readable {
                for entry in std::fs::read_dir(&journal).unwrap() {
                    std::fs::write(entry.unwrap().path(), vec![7; 64 << 10]).unwrap();
                }
            }
            let directory = Directory::acquire(&dir.path().join("store"), std::time::Duration::ZERO).unwrap();
            let rejected = Engine::open(directory, &Options::default()).map(drop);
            assert!(matches!(rejected, Err(Error::UnsupportedFormat { found: 99, .. })), "{rejected:?}");
        }
    }

    #[test]
    fn records_of_two_holders_replay_to_the_same_state_in_either_order() {
        let processing = |token| {
            let holder = Holder::Interrupted(PriorAttempt::Crashed);
            Processing { token, attempt: 1, since_ms: 5, own_window: OwnWindow::NONE, fingerprint: None, holder }
        };
        let claimed = |token| Event::Claimed(processing(token));
        let finished = |token| Event::Released(processing(token));
        let completed = |token| {
            Event::Completed(CompletedEntry {
                token,
                completed_ms: 5,
                own_window: OwnWindow::NONE,
                fingerprint: None,
                result: StoredResult::None,
            })
        };
        let after = |events: &[Event<&[u8]>]| {
            let table = MemTable::new(0);
            for event in events {
                apply_replayed(&mut table.shard(5), 5, b"k", event.clone());
            }
            table.shard(5).get(5, b"k")
        };
        for late in [claimed(2), finished(2), completed(2)] {
            let alone = after(std::slice::from_ref(&late));
            assert_eq!(alone.as_ref().map(Entry::token), Some(2));
            assert_eq!(matches!(alone, Some(Entry::Completed(_))), matches!(late, Event::Completed(_)));
            for early in [claimed(1), finished(1), completed(1), Event::Forgotten { token: 1 }] {
                assert_eq!(after(&[early.clone(), late.clone()]), alone, "{early:?}, {late:?}");
                assert_eq!(after(&[late.clone(), early.clone()]), alone, "{late:?}, {early:?}");
            }
            assert_eq!(after(&[late, Event::Forgotten { token: 3 }]), None);
        }
    }
}
