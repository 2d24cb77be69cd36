//! Sealing: completed keys leave the hot table for their buckets, sorted, as whole runs.

use super::set::BucketSet;
use super::window::Slice;
use crate::codec::{put_value, row_key};
use crate::entry::Done;
use crate::error::Result;
use crate::invariant::Invariant;
use crate::storage::db::Db;

/// A completed key on its way to its bucket.
pub(crate) struct Row<'a> {
    pub(crate) digest: u64,
    pub(crate) key: &'a [u8],
    pub(crate) done: &'a Done<&'a [u8]>,
}

/// Where a seal takes its rows from.
pub(crate) trait Rows {
    /// The slices of time that have rows, each with their number.
    fn slices(&self) -> Vec<(Slice, usize)>;

    /// Visits the rows of a slice, each key once, in the order of their digests and keys.
    fn visit(&self, slice: Slice, visit: impl FnMut(Row<'_>) -> Result<()>) -> Result<()>;
}

/// Writes the rows to the buckets of their completion, and marks them in the filter. When this returns the buckets
/// answer for them. Doing it again after a crash changes nothing.
pub(crate) fn seal(db: &Db, set: &BucketSet, rows: &impl Rows) -> Result<()> {
    for (slice, count) in rows.slices() {
        let bucket = set.ensure(db, slice)?;
        let mut digests = Vec::with_capacity(count);
        let (mut key, mut before, mut value) = (Vec::new(), Vec::new(), Vec::new());
        let broken = |invariant, detail: std::fmt::Arguments<'_>| set.poison().broken(invariant, detail);
        db.add_run(&bucket.family, |sink| {
            rows.visit(slice, |row| {
                std::mem::swap(&mut key, &mut before);
                row_key(row.digest, row.key, &mut key);
                if key <= before {
                    let (key, before) = (key.escape_ascii(), before.escape_ascii());
                    return Err(broken(Invariant::RunSorted, format_args!("{key} after {before} in {slice}")));
                }
                if row.key.is_empty() || !slice.contains(row.done.completed_ms) {
                    let completed_ms = row.done.completed_ms;
                    return Err(broken(Invariant::KeyInSlice, format_args!("one of {completed_ms} in {slice}")));
                }
                put_value(row.done, slice.start_ms, &mut value);
                digests.push(row.digest);
                sink.put(&key, &value)
            })?;
            if digests.len() != count {
                return Err(broken(Invariant::RunWhole, format_args!("{} of {count} keys in {slice}", digests.len())));
            }
            Ok(())
        })?;
        set.mark(&bucket, &digests);
    }
    Ok(())
}
