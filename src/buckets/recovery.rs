//! What happens at open: the journal is read back, and the filter is rebuilt while the store already answers.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::registry::{Bucket, BucketRegistry};
use crate::codec::{Event, digest_of_entry_key, read_record};
use crate::rocks::db::Db;
use crate::testing::failpoint::Failpoint;
use onlyonce_core::{Error, Result};

/// Digests that go into the filter at a time.
const DIGEST_BATCH: usize = 8_192;

/// What the journal says of the store as a whole.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Replayed {
    pub(crate) records: u64,
    pub(crate) bytes: u64,
    /// The newest time in it.
    pub(crate) time_ms: u64,
    /// When the oldest of its rows was written.
    pub(crate) oldest_ms: Option<u64>,
    /// The highest number in it.
    pub(crate) last_number: u64,
}

/// Hands every event of the journal to `apply`, in order.
pub(crate) fn replay(db: &Db, mut apply: impl FnMut(&[u8], Event)) -> Result<Replayed> {
    let mut replayed = Replayed::default();
    db.for_each_record(|number, record| {
        // On stream time a key may be newer than the row that it came with.
        let mut newest_ms = 0;
        let read = read_record(record, |key, event| {
            newest_ms = newest_ms.max(event.time_ms());
            apply(key, event);
        });
        let time_ms = read.ok_or_else(|| Error::Corrupt {
            place: format!("the journal's row {number}"),
            detail: "it is not in a format that this version writes".to_owned(),
        })?;
        replayed.records += 1;
        replayed.bytes += record.len() as u64;
        replayed.time_ms = replayed.time_ms.max(time_ms).max(newest_ms);
        replayed.oldest_ms = Some(replayed.oldest_ms.map_or(time_ms, |oldest_ms| oldest_ms.min(time_ms)));
        if number <= replayed.last_number {
            return Err(Error::Corrupt {
                place: format!("the journal's row {number}"),
                detail: format!("it comes after row {}", replayed.last_number),
            });
        }
        replayed.last_number = number;
        Ok(())
    })?;
    Ok(replayed)
}

/// Brings the keys of a bucket back into the filter, which answers for it from then on. Gives up, with false, when
/// `should_continue` says so.
pub(crate) fn rebuild_filter(
    db: &Db,
    registry: &BucketRegistry,
    bucket: &Arc<Bucket>,
    should_continue: &impl Fn() -> bool,
) -> Result<bool> {
    // Room for all of them is made once.
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

/// Moves a bucket that has outgrown its column, or lies in a base that was too small, to the newest base. Gives up when
/// `should_continue` says so; what has moved by then does no harm.
pub(crate) fn move_filter(
    db: &Db,
    registry: &BucketRegistry,
    bucket: &Arc<Bucket>,
    should_continue: &impl Fn() -> bool,
) -> Result<()> {
    // Before the keys are read: what comes after them goes to this layer, or one above it.
    let Some(target) = registry.target_for(bucket) else { return Ok(()) };
    if for_each_digest(db, registry, bucket, should_continue, |digests| {
        registry.insert_moved(bucket, &target, digests)
    })? {
        registry.moved(bucket, &target);
    }
    Ok(())
}

/// Hands out the digests of a bucket's keys, some at a time, as long as `should_continue` says so and the bucket is there. True if
/// those were all.
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
            place: format!("a row of the bucket {}", bucket.range),
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
    use crate::entry::{CompletedEntry, OwnWindow};
    use crate::fs::directory::Directory;
    use onlyonce_core::StoredResult;

    #[test]
    fn what_a_replay_says_of_the_journal_is_the_sum_and_the_newest_of_its_rows() {
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory::acquire(&dir.path().join("store"), Duration::ZERO).unwrap();
        let (db, _) = Db::open(directory, 32 << 20, Duration::ZERO, || Ok(Vec::new())).unwrap();
        let done = |completed_ms| CompletedEntry {
            token: 1,
            completed_ms,
            own_window: OwnWindow::NONE,
            fingerprint: None,
            result: StoredResult::None,
        };
        let mut bytes = 0;
        // On stream time a row may be older than its keys, and than the row before it.
        for (number, record_ms, completed_ms) in [(3, 500, 900), (4, 700, 600), (7, 100, 100)] {
            let mut record = RecordWriter::new(RecordKind::Completed, record_ms, 0);
            record.completed(b"k", &done(completed_ms));
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
