//! Flush: writes ended keys, sorted, from the memtable to their buckets as whole SSTs.

use super::range::BucketRange;
use super::registry::BucketRegistry;
use crate::codec::{put_entry_key, put_value};
use crate::invariant::Invariant;
use crate::rocks::db::Db;
use onlyonce_core::Result;
use onlyonce_core::machine::Entry;

/// A completed or released key that is flushed to its bucket.
pub(crate) struct FlushEntry<'a> {
    pub(crate) digest: u64,
    pub(crate) key: &'a [u8],
    pub(crate) entry: &'a Entry<&'a [u8]>,
}

/// The source of a flush's entries.
pub(crate) trait FlushSource {
    /// The time ranges that have entries, each with the number of its entries.
    fn ranges(&self) -> Vec<(BucketRange, usize)>;

    /// Visits the entries of a range ordered by digest and key, each key once.
    fn visit(&self, range: BucketRange, visit: impl FnMut(FlushEntry<'_>) -> Result<()>) -> Result<()>;
}

/// Writes the entries to their buckets and inserts them into the filter. When it returns, lookups in the buckets find
/// the keys. Idempotent: a repeated flush after a crash changes nothing.
pub(crate) fn flush(db: &Db, registry: &BucketRegistry, source: &impl FlushSource) -> Result<()> {
    for (range, count) in source.ranges() {
        let bucket = registry.ensure(db, range)?;
        let mut digests = Vec::with_capacity(count);
        let (mut key, mut before, mut value) = (Vec::new(), Vec::new(), Vec::new());
        let broken = |invariant, detail: std::fmt::Arguments<'_>| registry.poison().broken(invariant, detail);
        db.add_sst(&bucket.family, |sst| {
            source.visit(range, |entry| {
                std::mem::swap(&mut key, &mut before);
                put_entry_key(entry.digest, entry.key, &mut key);
                if key <= before {
                    let (key, before) = (key.escape_ascii(), before.escape_ascii());
                    return Err(broken(Invariant::SstSorted, format_args!("{key} after {before} in {range}")));
                }
                let time_ms = entry.entry.time_ms();
                if entry.key.is_empty() || !range.contains(time_ms) {
                    return Err(broken(Invariant::KeyInRange, format_args!("a key at {time_ms} in {range}")));
                }
                put_value(entry.entry, range.start_ms, &mut value)
                    .ok_or_else(|| broken(Invariant::OnlyEndedFlushed, format_args!("a key in flight in {range}")))?;
                digests.push(entry.digest);
                sst.put(&key, &value)
            })?;
            if digests.len() != count {
                return Err(broken(
                    Invariant::SstComplete,
                    format_args!("{} of {count} keys in {range}", digests.len()),
                ));
            }
            Ok(())
        })?;
        registry.mark(&bucket, &digests);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::buckets::registry::{Probe, look_up};
    use crate::clock::Now;
    use crate::config::Span;
    use crate::fs::directory::Directory;
    use onlyonce_core::Error;
    use onlyonce_core::StoredResult;
    use onlyonce_core::machine::{CompletedEntry, OwnWindow};

    const RANGE: BucketRange = BucketRange { start_ms: 5_000, width_ms: 1_000 };

    /// Entries in their given order (digest, key, completion time), and the number of entries that is announced.
    struct Given(&'static [(u64, &'static [u8], u64)], usize);

    impl FlushSource for Given {
        fn ranges(&self) -> Vec<(BucketRange, usize)> {
            vec![(RANGE, self.1)]
        }

        fn visit(&self, _: BucketRange, mut visit: impl FnMut(FlushEntry<'_>) -> Result<()>) -> Result<()> {
            self.0.iter().try_for_each(|(digest, key, completed_ms)| {
                let completed = CompletedEntry {
                    token: 1,
                    completed_ms: *completed_ms,
                    own_window: OwnWindow::NONE,
                    fingerprint: None,
                    result: StoredResult::None,
                };
                visit(FlushEntry { digest: *digest, key, entry: &Entry::Completed(completed) })
            })
        }
    }

    fn open(dir: &tempfile::TempDir) -> (Db, BucketRegistry) {
        let directory = Directory::acquire(&dir.path().join("store"), Duration::ZERO).unwrap();
        let (db, families) = Db::open(directory, 32 << 20, Duration::ZERO, None, || Ok(Vec::new())).unwrap();
        let span = Span { window_ms: 10_000, bucket_ms: 1_000 };
        let registry =
            BucketRegistry::open(&db, &families, span, &Now { time_ms: 5_500, ..Now::default() }, 0, 1 << 20, None)
                .unwrap();
        (db, registry)
    }

    #[test]
    fn an_sst_that_is_unsorted_or_incomplete_or_outside_its_bucket_is_not_written() {
        for (source, count, expected) in [
            (&[(2, b"a" as &[u8], 5_500), (1, b"b", 5_500)][..], 2, "strictly rise"),
            (&[(1, b"b", 5_500), (1, b"a", 5_500)], 2, "strictly rise"),
            (&[(1, b"a", 5_500), (1, b"a", 5_600)], 2, "strictly rise"),
            (&[(1, b"a", 4_999)], 1, "within the range"),
            (&[(1, b"a", 6_000)], 1, "within the range"),
            (&[(1, b"", 5_500)], 1, "within the range"),
            (&[(1, b"a", 5_500)], 2, "all keys that were counted"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let (db, registry) = open(&dir);
            let error = flush(&db, &registry, &Given(source, count)).unwrap_err();
            assert!(matches!(&error, Error::Broken { invariant, .. } if invariant.contains(expected)), "{error}");
            assert!(registry.poison().reason().is_some_and(|reason| reason.contains(expected)));
            assert!(db.sst_numbers().unwrap().is_empty(), "{source:?}");
        }
    }

    #[test]
    fn a_key_outside_its_bucket_is_corruption() {
        let dir = tempfile::tempdir().unwrap();
        let (db, registry) = open(&dir);
        let bucket = registry.ensure(&db, RANGE).unwrap();
        let (mut key, mut value) = (Vec::new(), Vec::new());
        put_entry_key(7, b"k", &mut key);
        let find = || {
            let probe = Probe { index: 0, digest: 7, key: b"k", column_bits: u64::MAX };
            look_up(&db, &registry.snapshot(), &[probe], |_, _, _| {})
        };
        for (completed_ms, is_inside) in [(5_999, true), (6_000, false)] {
            let completed = CompletedEntry {
                token: 1,
                completed_ms,
                own_window: OwnWindow::NONE,
                fingerprint: None,
                result: StoredResult::None,
            };
            put_value(&Entry::Completed(completed), RANGE.start_ms, &mut value).unwrap();
            db.add_sst(&bucket.family, |sst| sst.put(&key, &value)).unwrap();
            match find() {
                Ok(()) => assert!(is_inside),
                Err(Error::Corrupt { detail, .. }) => assert!(!is_inside && detail.contains("6000"), "{detail}"),
                Err(error) => panic!("{error}"),
            }
        }
    }
}
