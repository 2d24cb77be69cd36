//! Sealing: keys whose work has ended leave the hot table for their buckets, sorted, as whole runs.

use super::set::BucketSet;
use super::window::Slice;
use crate::codec::{put_value, row_key};
use crate::entry::Entry;
use crate::error::{Error, Result};
use crate::storage::db::Db;

/// A completed or released key on its way to its bucket.
pub(crate) struct Row<'a> {
    pub(crate) digest: u64,
    pub(crate) key: &'a [u8],
    pub(crate) entry: &'a Entry<&'a [u8]>,
}

/// Where a seal takes its rows from.
pub(crate) trait Rows {
    /// The slices of time that have rows, each with their number or more.
    fn slices(&self) -> Vec<(Slice, usize)>;

    /// Visits the rows of a slice, each key once, in the order of their digests and keys.
    fn visit(&self, slice: Slice, visit: impl FnMut(Row<'_>) -> Result<()>) -> Result<()>;
}

/// Writes the rows to the buckets of their time, and marks them in the filter. When this returns the buckets
/// answer for them. Doing it again after a crash changes nothing.
pub(crate) fn seal(db: &Db, set: &BucketSet, rows: &impl Rows) -> Result<()> {
    for (slice, count) in rows.slices() {
        let bucket = set.ensure(db, slice)?;
        let mut digests = Vec::with_capacity(count);
        let (mut key, mut value) = (Vec::new(), Vec::new());
        db.add_run(&bucket.family, |sink| {
            rows.visit(slice, |row| {
                row_key(row.digest, row.key, &mut key);
                put_value(row.entry, slice.start_ms, &mut value).ok_or_else(|| Error::Corrupt {
                    place: "the memtable".to_owned(),
                    detail: "a key in flight was about to be moved to a bucket".to_owned(),
                })?;
                digests.push(row.digest);
                sink.put(&key, &value)
            })
        })?;
        set.mark(&bucket, &digests);
    }
    Ok(())
}
