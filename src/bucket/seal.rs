//! Sealing: keys whose work has ended leave the hot table for their buckets, sorted, as whole runs.

use super::set::BucketSet;
use super::window::Slice;
use crate::codec::{put_value, row_key};
use crate::entry::Entry;
use crate::error::Result;
use crate::invariant::Invariant;
use crate::storage::db::Db;

/// A completed or released key on its way to its bucket.
pub(crate) struct Row<'a> {
    pub(crate) digest: u64,
    pub(crate) key: &'a [u8],
    pub(crate) entry: &'a Entry<&'a [u8]>,
}

/// Where a seal takes its rows from.
pub(crate) trait Rows {
    /// The slices of time that have rows, each with their number.
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
                let time_ms = row.entry.time_ms();
                if row.key.is_empty() || !slice.contains(time_ms) {
                    return Err(broken(Invariant::KeyInSlice, format_args!("one of {time_ms} in {slice}")));
                }
                put_value(row.entry, slice.start_ms, &mut value)
                    .ok_or_else(|| broken(Invariant::OnlyEndedSealed, format_args!("a key in flight in {slice}")))?;
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::bucket::set::{Probe, look_up};
    use crate::clock::Now;
    use crate::config::Span;
    use crate::entry::{Done, Kept};
    use crate::error::Error;
    use crate::storage::directory::Directory;

    const SLICE: Slice = Slice { start_ms: 5_000, width_ms: 1_000 };

    /// Rows as they come: digest, key and when it was completed. And how many are said to come.
    struct Given(&'static [(u64, &'static [u8], u64)], usize);

    impl Rows for Given {
        fn slices(&self) -> Vec<(Slice, usize)> {
            vec![(SLICE, self.1)]
        }

        fn visit(&self, _: Slice, mut visit: impl FnMut(Row<'_>) -> Result<()>) -> Result<()> {
            self.0.iter().try_for_each(|(digest, key, completed_ms)| {
                let done = Done { token: 1, completed_ms: *completed_ms, fingerprint: None, result: Kept::Absent };
                visit(Row { digest: *digest, key, entry: &Entry::Completed(done) })
            })
        }
    }

    fn open(dir: &tempfile::TempDir) -> (Db, BucketSet) {
        let directory = Directory::acquire(&dir.path().join("store"), Duration::ZERO).unwrap();
        let (db, families) = Db::open(directory, 32 << 20, Duration::ZERO, || Ok(Vec::new())).unwrap();
        let span = Span { window_ms: 10_000, bucket_ms: 1_000 };
        let set =
            BucketSet::open(&db, &families, span, &Now { time_ms: 5_500, ..Now::default() }, 0, 1 << 20, None).unwrap();
        (db, set)
    }

    #[test]
    fn a_run_that_is_not_sorted_or_whole_or_of_its_bucket_is_not_written() {
        for (rows, count, said) in [
            (&[(2, b"a" as &[u8], 5_500), (1, b"b", 5_500)][..], 2, "strictly rise"),
            (&[(1, b"b", 5_500), (1, b"a", 5_500)], 2, "strictly rise"),
            (&[(1, b"a", 5_500), (1, b"a", 5_600)], 2, "strictly rise"),
            (&[(1, b"a", 4_999)], 1, "within the slice"),
            (&[(1, b"a", 6_000)], 1, "within the slice"),
            (&[(1, b"", 5_500)], 1, "within the slice"),
            (&[(1, b"a", 5_500)], 2, "all keys that were counted"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let (db, set) = open(&dir);
            let error = seal(&db, &set, &Given(rows, count)).unwrap_err();
            assert!(matches!(&error, Error::Broken { invariant, .. } if invariant.contains(said)), "{error}");
            assert!(set.poison().reason().is_some_and(|reason| reason.contains(said)));
            assert!(db.runs().unwrap().is_empty(), "{rows:?}");
        }
    }

    #[test]
    fn a_key_outside_its_bucket_is_corruption() {
        let dir = tempfile::tempdir().unwrap();
        let (db, set) = open(&dir);
        let bucket = set.ensure(&db, SLICE).unwrap();
        let (mut key, mut value) = (Vec::new(), Vec::new());
        row_key(7, b"k", &mut key);
        let find = || {
            let probe = Probe { place: 0, digest: 7, key: b"k", slots: u64::MAX };
            look_up(&db, &set.view(), &[probe], |_, _, _| {})
        };
        for (completed_ms, is_inside) in [(5_999, true), (6_000, false)] {
            let done = Done { token: 1, completed_ms, fingerprint: None, result: Kept::Absent };
            put_value(&Entry::Completed(done), SLICE.start_ms, &mut value).unwrap();
            db.add_run(&bucket.family, |sink| sink.put(&key, &value)).unwrap();
            match find() {
                Ok(()) => assert!(is_inside),
                Err(Error::Corrupt { detail, .. }) => assert!(!is_inside && detail.contains("6000"), "{detail}"),
                Err(error) => panic!("{error}"),
            }
        }
    }
}
