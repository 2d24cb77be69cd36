//! Recovery at open: replays the journal, and rebuilds filters while the store already serves calls.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::registry::{Bucket, BucketRegistry};
use crate::codec::{Event, digest_of_entry_key, read_record};
use crate::rocks::db::Db;
use crate::testing::failpoint::Failpoint;
use onlyonce_core::{Error, Result};

/// Digests inserted into the filter in one batch.
const DIGEST_BATCH: usize = 8_192;

/// Totals of a journal replay.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Replayed {
    pub(crate) records: u64,
    pub(crate) bytes: u64,
    /// The newest time of all records and keys.
    pub(crate) time_ms: u64,
    /// The time of the oldest record.
    pub(crate) oldest_ms: Option<u64>,
    /// The highest record number.
    pub(crate) last_number: u64,
}

/// Passes every event of the journal to `apply`, in order.
pub(crate) fn replay(db: &Db, mut apply: impl FnMut(&[u8], Event)) -> Result<Replayed> {
    let mut replayed = Replayed::default();
    db.for_each_record(|number, record| {
        // On stream time a key may be newer than its record.
        let mut newest_ms = 0;
        let read = read_record(record, |key, event| {
            newest_ms = newest_ms.max(event.time_ms());
            apply(key, event);
        });
        let time_ms = read.ok_or_else(|| Error::Corrupt {
            place: format!("journal record {number}"),
            detail: "unknown record format".to_owned(),
        })?;
        replayed.records += 1;
        replayed.bytes += record.len() as u64;
        replayed.time_ms = replayed.time_ms.max(time_ms).max(newest_ms);
        replayed.oldest_ms = Some(replayed.oldest_ms.map_or(time_ms, |oldest_ms| oldest_ms.min(time_ms)));
        if number <= replayed.last_number {
            return Err(Error::Corrupt {
                place: format!("journal record {number}"),
                detail: format!("it follows record {}", replayed.last_number),
            });
        }
        replayed.last_number = number;
        Ok(())
    })?;
    Ok(replayed)
}

/// Inserts all keys of a bucket into the filter, which covers the bucket from then on. Stops and returns false when
/// `should_continue` returns false.
pub(crate) fn rebuild_filter(
    db: &Db,
    registry: &BucketRegistry,
    bucket: &Arc<Bucket>,
    should_continue: &impl Fn() -> bool,
) -> Result<bool> {
    // Reserves room for all keys at once.
    let mut expected = bucket.keys.load(Ordering::Relaxed);
    let finished = for_each_digest(db, registry, bucket, should_continue, |digests| {
        registry.mark_counted(bucket, digests, expected.max(digests.len() as u64));
        Failpoint::FilterHalfRebuilt.pass();
        expected = expected.saturating_sub(digests.len() as u64);
    })?;
    if finished {
        registry.set_filtered(bucket);
    }
    Ok(finished)
}

/// Moves a bucket that has outgrown its column or its base to the newest base. Stops when `should_continue` returns
/// false; keys moved by then do no harm.
pub(crate) fn move_filter(
    db: &Db,
    registry: &BucketRegistry,
    bucket: &Arc<Bucket>,
    should_continue: &impl Fn() -> bool,
) -> Result<()> {
    // Chosen before the keys are read: keys that are flushed meanwhile go to this matrix or one above it. In the
    // other order they could be inserted into a matrix that is about to be freed.
    let Some(target) = registry.target_for(bucket) else { return Ok(()) };
    if for_each_digest(db, registry, bucket, should_continue, |digests| {
        registry.insert_moved(bucket, &target, digests)
    })? {
        registry.moved(bucket, &target);
    }
    Ok(())
}

/// Passes the digests of a bucket's keys to `visit` in batches, as long as `should_continue` returns true and the
/// bucket exists. True if all digests were visited.
fn for_each_digest(
    db: &Db,
    registry: &BucketRegistry,
    bucket: &Arc<Bucket>,
    should_continue: &impl Fn() -> bool,
    mut visit: impl FnMut(&[u64]),
) -> Result<bool> {
    let mut digests = Vec::with_capacity(DIGEST_BATCH);
    let mut finished = true;
    db.for_each_key(&bucket.family, |entry_key| {
        let digest = digest_of_entry_key(entry_key).ok_or_else(|| Error::Corrupt {
            place: format!("an entry of {}", bucket.range),
            detail: "its key is too short".to_owned(),
        })?;
        digests.push(digest);
        if digests.len() == DIGEST_BATCH {
            visit(&digests);
            digests.clear();
            finished = should_continue() && registry.snapshot().has(bucket);
        }
        Ok(finished)
    })?;
    if finished && !digests.is_empty() {
        visit(&digests);
    }
    Ok(finished)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::codec::{RecordKind, RecordWriter};
    use crate::entry::CompletedEntry;
    use crate::fs::directory::Directory;
    use onlyonce_core::StoredResult;

    #[test]
    fn a_replay_reports_the_totals_and_the_newest_time_of_its_records() {
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory::acquire(&dir.path().join("store"), Duration::ZERO).unwrap();
        let (db, _) = Db::open(directory, 32 << 20, Duration::ZERO, || Ok(Vec::new())).unwrap();
        let completed =
            |completed_ms| CompletedEntry { token: 1, completed_ms, fingerprint: None, result: StoredResult::None };
        let mut bytes = 0;
        // On stream time a record may be older than its keys, and than the record before it.
        for (number, record_ms, completed_ms) in [(3, 500, 900), (4, 700, 600), (7, 100, 100)] {
            let mut record = RecordWriter::new(RecordKind::Completed, record_ms, 0);
            record.completed(b"k", &completed(completed_ms));
            let record = record.finish();
            bytes += record.len() as u64;
            db.write(false, |tx| {
                tx.put_record(number, &record);
                Ok(())
            })
            .unwrap();
        }
        let mut events = 0;
        let replayed = replay(&db, |key, event| {
            assert!(key == b"k" && matches!(event, Event::Completed(_)));
            events += 1;
        })
        .unwrap();
        assert_eq!((events, replayed.records, replayed.bytes), (3, 3, bytes));
        assert_eq!((replayed.time_ms, replayed.oldest_ms, replayed.last_number), (900, Some(100), 7));
    }
}
