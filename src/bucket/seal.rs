//! Sealing: completed keys leave the hot table for their buckets, sorted, as whole runs.

use std::sync::Arc;

use super::set::BucketSet;
use super::window::Slice;
use crate::codec::{put_value, row_key};
use crate::entry::Done;
use crate::error::Result;
use crate::storage::db::Db;

/// A completed key on its way to its bucket.
pub(crate) struct Row {
    /// The slice of time it was completed in.
    pub(crate) slice: Slice,
    pub(crate) digest: u64,
    pub(crate) key: Arc<[u8]>,
    pub(crate) done: Done,
}

/// Sorts the rows, no key of which may come twice, writes them to the buckets of their completion, and marks them in the
/// filter. When this returns the buckets answer for them. Doing it again after a crash changes nothing.
pub(crate) fn seal(db: &Db, set: &BucketSet, rows: &mut [Row]) -> Result<()> {
    rows.sort_unstable_by(|a, b| (a.slice, a.digest).cmp(&(b.slice, b.digest)).then_with(|| a.key.cmp(&b.key)));
    for run in rows.chunk_by(|a, b| a.slice == b.slice) {
        let Some(slice) = run.first().map(|row| row.slice) else { continue };
        let bucket = set.ensure(db, slice)?;
        let (mut key, mut value) = (Vec::new(), Vec::new());
        db.add_run(&bucket.family, |sink| {
            for row in run {
                row_key(row.digest, &row.key, &mut key);
                put_value(&row.done, slice.start_ms, &mut value);
                sink.put(&key, &value)?;
            }
            Ok(())
        })?;
        let digests: Vec<u64> = run.iter().map(|row| row.digest).collect();
        set.mark(&bucket, &digests);
    }
    Ok(())
}
