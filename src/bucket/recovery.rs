//! What happens at open: the journal is read back, and the filter is rebuilt while the store already answers.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::set::{Bucket, BucketSet};
use crate::codec::{Event, digest_of_row, read_row};
use crate::error::{Error, Result};
use crate::kill_point::KillPoint;
use crate::storage::db::Db;

/// Digests that go into the filter at a time.
const CHUNK: usize = 8_192;

/// What the journal says of the store as a whole.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Replayed {
    pub(crate) rows: u64,
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
    db.for_each_row(|number, row| {
        // On stream time a key may be newer than the row that it came with.
        let mut newest_ms = 0;
        let read = read_row(row, |key, event| {
            newest_ms = newest_ms.max(event.time_ms());
            apply(key, event);
        });
        let time_ms = read.ok_or_else(|| Error::Corrupt {
            place: format!("the journal's row {number}"),
            detail: "it is not in a format that this version writes".to_owned(),
        })?;
        replayed.rows += 1;
        replayed.bytes += row.len() as u64;
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
/// `go_on` says so.
pub(crate) fn rebuild_filter(
    db: &Db,
    set: &BucketSet,
    bucket: &Arc<Bucket>,
    go_on: &impl Fn() -> bool,
) -> Result<bool> {
    // Room for all of them is made once.
    let mut expected = bucket.keys.load(Ordering::Relaxed);
    let finished = for_each_digest(db, set, bucket, go_on, |digests| {
        set.mark_counted(bucket, digests, expected.max(digests.len() as u64));
        KillPoint::FilterHalfRebuilt.pass();
        expected = expected.saturating_sub(digests.len() as u64);
    })?;
    if finished {
        set.set_filtered(bucket);
    }
    Ok(finished)
}

/// Moves a bucket that has outgrown its column, or lies in a base that was too small, to the newest base. Gives up when
/// `go_on` says so; what has moved by then does no harm.
pub(crate) fn move_filter(db: &Db, set: &BucketSet, bucket: &Arc<Bucket>, go_on: &impl Fn() -> bool) -> Result<()> {
    // Before the keys are read: what comes after them goes to this layer, or one above it.
    let Some(home) = set.home_for(bucket) else { return Ok(()) };
    if for_each_digest(db, set, bucket, go_on, |digests| set.move_in(bucket, &home, digests))? {
        set.moved(bucket, &home);
    }
    Ok(())
}

/// Hands out the digests of a bucket's keys, some at a time, as long as `go_on` says so and the bucket is there. True if
/// those were all.
fn for_each_digest(
    db: &Db,
    set: &BucketSet,
    bucket: &Arc<Bucket>,
    go_on: &impl Fn() -> bool,
    mut visit: impl FnMut(&[u64]),
) -> Result<bool> {
    let mut digests = Vec::with_capacity(CHUNK);
    let mut finished = true;
    db.for_each_key(&bucket.family, |row_key| {
        let digest = digest_of_row(row_key).ok_or_else(|| Error::Corrupt {
            place: format!("a row of the bucket {}", bucket.slice),
            detail: "its key is too short".to_owned(),
        })?;
        digests.push(digest);
        if digests.len() == CHUNK {
            visit(&digests);
            digests.clear();
            finished = go_on() && set.view().has(bucket);
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
    use crate::codec::{RowKind, RowWriter};
    use crate::entry::{Done, Kept};
    use crate::storage::directory::Directory;

    #[test]
    fn what_a_replay_says_of_the_journal_is_the_sum_and_the_newest_of_its_rows() {
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory::acquire(&dir.path().join("store"), Duration::ZERO).unwrap();
        let (db, _) = Db::open(directory, 32 << 20, Duration::ZERO, || Ok(Vec::new())).unwrap();
        let done = |completed_ms| Done { token: 1, completed_ms, fingerprint: None, result: Kept::Absent };
        let mut bytes = 0;
        // On stream time a row may be older than its keys, and than the row before it.
        for (number, row_ms, completed_ms) in [(3, 500, 900), (4, 700, 600), (7, 100, 100)] {
            let mut row = RowWriter::new(RowKind::Completed, row_ms, 0);
            row.completed(b"k", &done(completed_ms));
            let row = row.finish();
            bytes += row.len() as u64;
            db.write(false, |tx| {
                tx.put_row(number, &row);
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
        assert_eq!((events, replayed.rows, replayed.bytes), (3, 3, bytes));
        assert_eq!((replayed.time_ms, replayed.oldest_ms, replayed.last_number), (900, Some(100), 7));
    }
}
