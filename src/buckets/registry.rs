//! The live buckets and their filter, as an immutable snapshot that readers load without a lock.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::range::BucketRange;
use crate::clock::Now;
use crate::codec::{put_entry_key, read_value};
use crate::config::Span;
use crate::filter::matrix::{ColumnId, FilterMatrix, Geometry, MAX_COLUMNS};
use crate::filter::stack::FilterStack;
use crate::invariant::{Invariant, Poison};
use crate::rocks::db::Db;
use crate::testing::failpoint::Failpoint;
use crate::testing::sync_shim::{ArcSwap, AtomicBool, AtomicU64, Guard, Mutex};
use onlyonce_core::machine::Entry;
use onlyonce_core::{Error, Result};

/// A live bucket.
pub(crate) struct Bucket {
    pub(crate) range: BucketRange,
    pub(crate) column_id: ColumnId,
    pub(crate) family: String,
    pub(crate) keys: AtomicU64,
    /// Whether RocksDB merges its SSTs, because it has ended.
    pub(crate) is_merge_requested: AtomicBool,
}

/// The buckets and the filter at one moment.
#[derive(Clone)]
pub(crate) struct Snapshot {
    /// Indexed by column id.
    buckets: Vec<Option<Arc<Bucket>>>,
    /// One bit for each column id in use.
    live: u64,
    /// One bit for each bucket that the filter does not cover yet. These are always looked up on disk (G5).
    unfiltered: u64,
    stack: FilterStack,
}

impl Snapshot {
    /// The buckets that may hold the key with this digest, one bit for each column id.
    pub(crate) fn candidates(&self, digest: u64) -> u64 {
        (self.stack.column_bits(digest) | self.unfiltered) & self.live
    }

    /// As [`Snapshot::candidates`], for many digests at once.
    pub(crate) fn candidates_of(&self, digests: &[u64], column_bits: &mut [u64]) {
        self.stack.column_bits_of(digests, column_bits);
        for column_bits in column_bits {
            *column_bits = (*column_bits | self.unfiltered) & self.live;
        }
    }

    /// The live buckets, newest first.
    pub(crate) fn newest_first(&self) -> Vec<Arc<Bucket>> {
        let mut buckets: Vec<Arc<Bucket>> = self.buckets.iter().flatten().cloned().collect();
        buckets.sort_unstable_by_key(|bucket| std::cmp::Reverse(bucket.range));
        buckets
    }

    /// The buckets of these column ids.
    pub(crate) fn of_columns(&self, column_bits: u64) -> impl Iterator<Item = &Arc<Bucket>> {
        self.buckets.iter().flatten().filter(move |bucket| column_bits & 1 << bucket.column_id != 0)
    }

    /// Whether the bucket still exists.
    pub(crate) fn has(&self, bucket: &Arc<Bucket>) -> bool {
        self.buckets.iter().flatten().any(|other| Arc::ptr_eq(other, bucket))
    }

    /// Whether the filter has a column for the bucket. A bucket without one is always looked up on disk.
    pub(crate) fn has_column(&self, bucket: &Bucket) -> bool {
        self.stack.covers(bucket.column_id)
    }

    pub(crate) fn is_filtered(&self, bucket: &Bucket) -> bool {
        self.unfiltered & 1 << bucket.column_id == 0
    }

    /// The newest base matrix. Persisted columns are loaded into it.
    pub(crate) fn base(&self) -> Option<&Arc<FilterMatrix>> {
        self.stack.base()
    }

    /// The base matrix that has all keys of the column's bucket, if there is one. Columns are persisted from it.
    pub(crate) fn base_of(&self, column_id: ColumnId) -> Option<&Arc<FilterMatrix>> {
        self.stack.base_of(column_id)
    }

    pub(crate) fn filter_bytes(&self) -> u64 {
        self.stack.bytes()
    }
}

/// The live buckets. Lookups load [`BucketRegistry::snapshot`]; every change holds the lock `change`.
pub(crate) struct BucketRegistry {
    snapshot: ArcSwap<Snapshot>,
    change: Mutex<()>,
    /// Expected number of keys in a bucket, from the options; 0 if unset.
    expected_keys: u64,
    /// Column families of buckets that had expired before the open and are still to be dropped.
    expired: Mutex<Vec<String>>,
    poison: Arc<Poison>,
}

impl BucketRegistry {
    /// Sets the poison that broken invariants are reported to.
    pub(crate) fn of(self, poison: &Arc<Poison>) -> Self {
        Self { poison: Arc::clone(poison), ..self }
    }

    pub(crate) fn poison(&self) -> &Poison {
        &self.poison
    }

    /// Registers the buckets with these family names. None of them is covered by the filter yet. The filter's base
    /// has `geometry` if that fits; otherwise it is sized for `expected_keys` or for the largest existing bucket.
    pub(crate) fn open(
        db: &Db,
        families: &[String],
        span: Span,
        now: &Now,
        expected_keys: u64,
        filter_budget: u64,
        geometry: Option<Geometry>,
    ) -> Result<Self> {
        let mut ranges = Vec::with_capacity(families.len());
        let mut expired = Vec::new();
        for family in families {
            let range = BucketRange::of_family(family).ok_or_else(|| Error::Corrupt {
                place: format!("column family `{}`", family.escape_default()),
                detail: "its name is not that of a bucket".to_owned(),
            })?;
            if range.is_live(now, span.window_ms) {
                ranges.push((range, db.estimate_keys(family)?));
            } else {
                expired.push(family.clone());
            }
        }
        // The window's buckets, the present one, the next one, two that are not dropped yet, and those of other
        // widths.
        let others = ranges.iter().filter(|(range, _)| range.width_ms != span.bucket_ms).count();
        let needed = span.window_ms.div_ceil(span.bucket_ms).saturating_add(4).saturating_add(others as u64);
        if needed > MAX_COLUMNS as u64 {
            return Err(Error::Config {
                option: "bucket",
                value: format!("{} ms", span.bucket_ms),
                bounds: format!(
                    "wide enough for at most {MAX_COLUMNS} live buckets: there would be {needed}, {others} of them with an \
                     earlier width"
                ),
            });
        }
        let keys: Vec<u64> = ranges.iter().map(|(_, keys)| *keys).chain([expected_keys]).collect();
        let stack = FilterStack::new(needed, filter_budget, &keys, geometry);
        let mut snapshot = Snapshot { buckets: Vec::new(), live: 0, unfiltered: 0, stack };
        for (range, keys) in ranges {
            if let Some(bucket) = snapshot.insert(range, keys) {
                snapshot.unfiltered |= 1 << bucket.column_id;
            }
        }
        let expired = Mutex::new(expired);
        let (snapshot, change, poison) = (ArcSwap::from_pointee(snapshot), Mutex::new(()), Arc::default());
        Ok(Self { snapshot, change, expected_keys, expired, poison })
    }

    pub(crate) fn snapshot(&self) -> Guard<Arc<Snapshot>> {
        self.snapshot.load()
    }

    /// The bucket of a range. Creates it if there is none.
    pub(crate) fn ensure(&self, db: &Db, range: BucketRange) -> Result<Arc<Bucket>> {
        let _change = self.change.lock();
        let snapshot = self.snapshot.load();
        if let Some(bucket) = snapshot.buckets.iter().flatten().find(|bucket| bucket.range == range) {
            return Ok(Arc::clone(bucket));
        }
        let mut snapshot = Snapshot::clone(&snapshot);
        let Some(bucket) = snapshot.insert(range, 0) else {
            return Err(Error::Config {
                option: "bucket",
                value: format!("{} ms", range.width_ms),
                bounds: format!("wide enough for at most {MAX_COLUMNS} live buckets"),
            });
        };
        Failpoint::BucketBegun.pass();
        db.create_bucket(&bucket.family)?;
        Failpoint::BucketCreated.pass();
        // Most buckets grow about as large as the largest one before them.
        let largest = snapshot.buckets.iter().flatten().map(|bucket| bucket.keys.load(Ordering::Relaxed)).max();
        snapshot.reserve(largest.unwrap_or(0).max(self.expected_keys));
        self.snapshot.store(Arc::new(snapshot));
        Failpoint::BucketRegistered.pass();
        tracing::debug!(bucket = %bucket.range, "bucket created");
        Ok(bucket)
    }

    /// Inserts these digests into the bucket's filter column, growing the filter first if needed. Must run before the
    /// keys leave the memtable: otherwise a lookup would find them in neither.
    pub(crate) fn mark(&self, bucket: &Bucket, digests: &[u64]) {
        bucket.keys.fetch_add(digests.len() as u64, Ordering::Relaxed);
        self.mark_counted(bucket, digests, digests.len() as u64);
    }

    /// As [`BucketRegistry::mark`], for keys that are already counted. `expected` is the number of keys still to
    /// come, these included.
    pub(crate) fn mark_counted(&self, bucket: &Bucket, digests: &[u64], expected: u64) {
        // Held for the insert, too: a concurrent drop of a bucket frees matrices that are still empty.
        let _change = self.change.lock();
        let snapshot = self.snapshot.load();
        let marked = match snapshot.stack.with_room(bucket.column_id, expected) {
            None => snapshot.stack.insert(bucket.column_id, digests.iter().copied()),
            Some(stack) => {
                tracing::debug!(bucket = %bucket.range, keys = expected, bytes = stack.bytes(), "filter grown");
                let marked = stack.insert(bucket.column_id, digests.iter().copied());
                self.snapshot.store(Arc::new(Snapshot { stack, ..Snapshot::clone(&snapshot) }));
                marked
            }
        };
        // A bucket without a column in the filter is always looked up on disk.
        if !marked && snapshot.stack.covers(bucket.column_id) {
            self.report_missing_bits(bucket.range);
        }
    }

    fn report_missing_bits(&self, of: impl std::fmt::Display) {
        self.poison.broken(Invariant::FilterBits, format_args!("bits are missing for keys of {of}"));
    }

    /// Adds persisted columns to one shard of a filter matrix.
    pub(crate) fn add_columns(&self, matrix: &FilterMatrix, shard: usize, columns: &[(ColumnId, Vec<u8>)]) {
        let _change = self.change.lock();
        if !matrix.add_columns(shard, columns) {
            self.report_missing_bits("a filter file");
        }
    }

    /// As [`BucketRegistry::set_filtered`], after the bucket's column with `keys` keys was loaded from a file into
    /// `matrix`. Does nothing if the matrix was freed concurrently.
    pub(crate) fn set_loaded(&self, bucket: &Arc<Bucket>, matrix: &Arc<FilterMatrix>, keys: u64) {
        {
            let _change = self.change.lock();
            if !self.snapshot.load().stack.has(matrix) {
                return;
            }
            // At least 1: a matrix without keys counts as empty and would be freed, and `keys` may be an estimate of
            // 0.
            if !matrix.count(bucket.column_id, keys.max(1)) {
                self.report_missing_bits(bucket.range);
            }
        }
        self.set_filtered(bucket);
    }

    /// Marks the bucket as covered by the filter. Call it only after all its keys are inserted.
    pub(crate) fn set_filtered(&self, bucket: &Arc<Bucket>) {
        let _change = self.change.lock();
        let mut snapshot = Snapshot::clone(&self.snapshot.load());
        if snapshot.has(bucket) && snapshot.stack.covers(bucket.column_id) {
            snapshot.unfiltered &= !(1 << bucket.column_id);
            self.snapshot.store(Arc::new(snapshot));
        }
    }

    /// The base that a bucket's keys should move to, so that its other matrices can be freed.
    pub(crate) fn target_for(&self, bucket: &Bucket) -> Option<Arc<FilterMatrix>> {
        let keys = bucket.keys.load(Ordering::Relaxed);
        self.snapshot().stack.target_for(bucket.column_id, keys).cloned()
    }

    /// Inserts digests of a bucket that moves to another matrix.
    pub(crate) fn insert_moved(&self, bucket: &Bucket, target: &FilterMatrix, digests: &[u64]) {
        let _change = self.change.lock();
        if !target.insert(bucket.column_id, digests.iter().copied()) {
            self.report_missing_bits(bucket.range);
        }
    }

    /// Stops lookups in the older matrices of a bucket whose keys have all moved to `target`. Does nothing if
    /// the bucket or the target was dropped concurrently.
    pub(crate) fn moved(&self, bucket: &Arc<Bucket>, target: &Arc<FilterMatrix>) {
        let _change = self.change.lock();
        let mut snapshot = Snapshot::clone(&self.snapshot.load());
        if snapshot.has(bucket) && snapshot.stack.has(target) {
            snapshot.stack = snapshot.stack.moved(bucket.column_id, target);
            tracing::debug!(bucket = %bucket.range, bytes = snapshot.stack.bytes(), "filter moved to the newest base");
            self.snapshot.store(Arc::new(snapshot));
        }
    }

    /// Drops the buckets that had expired before this open. Stops when `should_continue` returns false.
    pub(crate) fn remove_expired(&self, db: &Db, should_continue: &impl Fn() -> bool) {
        while should_continue() {
            // Not in the loop's condition, which would hold the lock during the drop.
            let Some(family) = self.expired.lock().pop() else { return };
            drop_or_leave(db, &family);
        }
    }

    /// Checks that a bucket has expired before it is dropped.
    fn may_drop(&self, range: BucketRange, now: &Now, window_ms: u64) -> bool {
        let is_live = range.is_live(now, window_ms);
        if is_live {
            let detail = format_args!("{range} at {}, with a window of {window_ms} ms", now.time_ms);
            self.poison.broken(Invariant::OnlyExpiredDropped, detail);
        }
        !is_live
    }

    /// Whether buckets that had expired before this open are still to be dropped.
    pub(crate) fn has_expired(&self) -> bool {
        !self.expired.lock().is_empty()
    }

    /// Drops an expired bucket and frees its column.
    pub(crate) fn remove(&self, db: &Db, bucket: &Arc<Bucket>, now: &Now, window_ms: u64) {
        if !self.may_drop(bucket.range, now, window_ms) {
            return;
        }
        let _change = self.change.lock();
        let mut snapshot = Snapshot::clone(&self.snapshot.load());
        if !snapshot.has(bucket) {
            // Another thread has dropped it concurrently.
            return;
        }
        let bit = 1 << bucket.column_id;
        snapshot.live &= !bit;
        snapshot.unfiltered &= !bit;
        // From here on no lookup reads the bucket. The column id stays in use until its column is cleared: a new
        // bucket could otherwise set a bit that the clearing then erases.
        self.snapshot.store(Arc::new(snapshot.clone()));
        drop_or_leave(db, &bucket.family);
        if let Some(entry) = snapshot.buckets.get_mut(usize::from(bucket.column_id)) {
            *entry = None;
        }
        snapshot.stack = snapshot.stack.without(bucket.column_id);
        self.snapshot.store(Arc::new(snapshot));
        tracing::debug!(bucket = %bucket.range, keys = bucket.keys.load(Ordering::Relaxed), "bucket dropped");
    }
}

/// Drops the column family of a bucket that is no longer in any snapshot. RocksDB invalidates the handle even if the
/// drop fails, so a retry is impossible; the next open finds the expired bucket and drops it.
fn drop_or_leave(db: &Db, family: &str) {
    Failpoint::BucketUnlinked.pass();
    if let Err(error) = db.drop_bucket(family) {
        tracing::warn!(error = error.chain(), family, "failed to drop an expired bucket; the next open drops it");
    }
}

impl Snapshot {
    /// Grows the filter's base for buckets of `keys` keys, as far as the budget allows.
    fn reserve(&mut self, keys: u64) {
        if let Some(stack) = self.stack.with_base_for(keys) {
            tracing::debug!(keys, bytes = stack.bytes(), "filter base grown");
            self.stack = stack;
        }
    }

    /// Adds a bucket under the first free column id.
    fn insert(&mut self, range: BucketRange, keys: u64) -> Option<Arc<Bucket>> {
        let free = self.buckets.iter().position(Option::is_none).unwrap_or(self.buckets.len());
        if free >= MAX_COLUMNS {
            return None;
        }
        let column_id = ColumnId::try_from(free).ok()?;
        let (keys, is_merge_requested) = (AtomicU64::new(keys), AtomicBool::new(false));
        let bucket = Arc::new(Bucket { range, column_id, family: range.family(), keys, is_merge_requested });
        match self.buckets.get_mut(free) {
            Some(entry) => *entry = Some(Arc::clone(&bucket)),
            None => self.buckets.push(Some(Arc::clone(&bucket))),
        }
        self.live |= 1 << column_id;
        if !self.stack.covers(column_id) {
            // The filter has no column left: this bucket is always looked up on disk.
            self.unfiltered |= 1 << column_id;
        }
        Some(bucket)
    }
}

/// A key that the filter did not rule out: its index in the caller's batch, and the buckets that may hold it.
pub(crate) struct Probe<'a> {
    pub(crate) index: usize,
    pub(crate) digest: u64,
    pub(crate) key: &'a [u8],
    pub(crate) column_bits: u64,
}

/// Looks the probes up on disk, each in the buckets that may hold it, and passes the entries to `found`. Compares
/// whole keys, never digests alone.
pub(crate) fn look_up(
    db: &Db,
    snapshot: &Snapshot,
    probes: &[Probe<'_>],
    mut found: impl FnMut(usize, &Arc<Bucket>, Entry),
) -> Result<()> {
    let all_columns = probes.iter().fold(0, |column_bits, probe| column_bits | probe.column_bits);
    for bucket in snapshot.of_columns(all_columns) {
        let here: Vec<&Probe<'_>> =
            probes.iter().filter(|probe| probe.column_bits & 1 << bucket.column_id != 0).collect();
        let entry_keys: Vec<Vec<u8>> = here
            .iter()
            .map(|probe| {
                let mut entry_key = Vec::with_capacity(probe.key.len() + 8);
                put_entry_key(probe.digest, probe.key, &mut entry_key);
                entry_key
            })
            .collect();
        let mut read = |index: usize, value: &[u8]| {
            let corrupt = |detail: String| Error::Corrupt { place: format!("an entry of {}", bucket.range), detail };
            let entry =
                read_value(value, bucket.range.start_ms).ok_or_else(|| corrupt("unknown value format".to_owned()))?;
            if !bucket.range.contains(entry.time_ms()) {
                return Err(corrupt(format!("its time {} is outside the bucket", entry.time_ms())));
            }
            let probe = here.get(index).ok_or_else(|| corrupt("it was not requested".to_owned()))?;
            found(probe.index, bucket, entry);
            Ok(())
        };
        match entry_keys.as_slice() {
            [entry_key] => db.get(&bucket.family, entry_key, |value| read(0, value))?.transpose()?,
            entry_keys => Some(db.get_many(&bucket.family, entry_keys, read)?),
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::directory::Directory;
    use std::time::Duration;

    const SPAN: Span = Span { window_ms: 4_000, bucket_ms: 1_000 };

    fn open(dir: &tempfile::TempDir) -> (Db, Vec<String>) {
        let directory = Directory::acquire(&dir.path().join("store"), Duration::ZERO).unwrap();
        Db::open(directory, 32 << 20, Duration::ZERO, None, || Ok(Vec::new())).unwrap()
    }

    fn second(second: u64) -> BucketRange {
        BucketRange { start_ms: second * 1_000, width_ms: 1_000 }
    }

    /// A reopened store with three buckets that have no filter yet.
    fn three_reopened(dir: &tempfile::TempDir) -> (Db, BucketRegistry, [Arc<Bucket>; 3]) {
        let (db, _) = open(dir);
        (0..3).for_each(|i| db.create_bucket(&second(i).family()).unwrap());
        db.close();
        let (db, families) = open(dir);
        let registry = BucketRegistry::open(&db, &families, SPAN, &Now::default(), 0, 1 << 20, None).unwrap();
        let buckets = [0, 1, 2].map(|i| registry.ensure(&db, second(i)).unwrap());
        (db, registry, buckets)
    }

    /// The start times, in seconds, of the buckets that may hold a key. Checks that both lookup functions agree.
    fn candidates(registry: &BucketRegistry, digest: u64) -> Vec<u64> {
        let snapshot = registry.snapshot();
        let (column_bits, mut again) = (snapshot.candidates(digest), [0, 0]);
        snapshot.candidates_of(&[digest, digest], &mut again);
        assert_eq!(again, [column_bits; 2]);
        let mut seconds: Vec<u64> =
            snapshot.of_columns(column_bits).map(|bucket| bucket.range.start_ms / 1_000).collect();
        seconds.sort_unstable();
        assert_eq!(seconds.len() as u32, column_bits.count_ones(), "each candidate column has a bucket");
        seconds
    }

    #[test]
    fn a_bucket_is_always_a_candidate_until_its_filter_is_complete() {
        let dir = tempfile::tempdir().unwrap();
        let (_db, registry, buckets) = three_reopened(&dir);
        // An incomplete filter: some keys are in it already.
        registry.mark(&buckets[1], &[77]);
        assert_eq!((candidates(&registry, 77), candidates(&registry, 78)), (vec![0, 1, 2], vec![0, 1, 2]));
        registry.set_filtered(&buckets[1]);
        assert_eq!((candidates(&registry, 77), candidates(&registry, 78)), (vec![0, 1, 2], vec![0, 2]));
        registry.set_filtered(&buckets[0]);
        registry.set_filtered(&buckets[2]);
        assert_eq!((candidates(&registry, 77), candidates(&registry, 78)), (vec![1], vec![]));
    }

    #[test]
    fn a_dropped_bucket_affects_neither_other_buckets_nor_the_next_one_in_its_column() {
        let dir = tempfile::tempdir().unwrap();
        let (db, registry, [first, dropped, last]) = three_reopened(&dir);
        registry.mark(&dropped, &[77]);
        registry.remove(&db, &dropped, &Now { time_ms: u64::MAX, ..Now::default() }, 0);
        assert_eq!(candidates(&registry, 77), [0, 2]);
        let next = registry.ensure(&db, second(3)).unwrap();
        assert_eq!(next.column_id, dropped.column_id);
        assert_eq!(candidates(&registry, 77), [0, 2], "its filter is new and empty");
        registry.mark(&next, &[99]);
        // A thread may still hold the dropped bucket.
        registry.remove(&db, &dropped, &Now { time_ms: u64::MAX, ..Now::default() }, 0);
        registry.moved(&dropped, registry.snapshot().base().unwrap());
        assert_eq!(candidates(&registry, 99), [0, 2, 3]);
        registry.set_filtered(&first);
        registry.set_filtered(&last);
        assert_eq!(candidates(&registry, 99), [3]);
        let another = registry.ensure(&db, second(9)).unwrap();
        registry.remove(&db, &another, &Now { time_ms: u64::MAX, ..Now::default() }, 0);
        assert_eq!(
            (candidates(&registry, 99), candidates(&registry, 77)),
            (vec![3], vec![]),
            "the others keep their filters"
        );
        // A target that is not in the stack (dropped concurrently) changes nothing.
        let elsewhere = tempfile::tempdir().unwrap();
        let (_db, other, _) = three_reopened(&elsewhere);
        registry.moved(&next, other.snapshot().base().unwrap());
        assert_eq!(candidates(&registry, 99), [3]);
        db.close();
        let (db, families) = open(&dir);
        assert_eq!(families, [0, 2, 3].map(|i| second(i).family()));
        let registry = BucketRegistry::open(&db, &families, SPAN, &Now::default(), 0, 1 << 20, None).unwrap();
        let buckets = [0, 2, 3].map(|i| registry.ensure(&db, second(i)).unwrap());
        registry.remove(&db, &buckets[1], &Now { time_ms: u64::MAX, ..Now::default() }, 0);
        let newer = registry.ensure(&db, second(4)).unwrap();
        registry.remove(&db, &newer, &Now { time_ms: u64::MAX, ..Now::default() }, 0);
        registry.set_filtered(&buckets[1]);
        assert_eq!(candidates(&registry, 99), [0, 3], "they have no filter yet");
    }

    #[test]
    fn buckets_of_other_widths_count_towards_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        let (db, _) = open(&dir);
        let others: Vec<String> = (0..13).map(|i| BucketRange { start_ms: i * 500, width_ms: 500 }.family()).collect();
        others.iter().for_each(|family| db.create_bucket(family).unwrap());
        let span = Span { window_ms: 48_000, bucket_ms: 1_000 };
        let open = |families: &[String]| {
            BucketRegistry::open(&db, families, span, &Now::default(), 0, 1 << 20, None).map(|_| ())
        };
        // 48 for the window, 4 around it, and room for 12 others.
        open(&others[..12]).unwrap();
        let error = open(&others).unwrap_err().to_string();
        assert!(error.contains("there would be 65, 13 of them"), "{error}");
    }

    #[test]
    fn a_bucket_without_a_filter_column_is_always_a_candidate() {
        let dir = tempfile::tempdir().unwrap();
        let (db, _) = open(&dir);
        let registry = BucketRegistry::open(&db, &[], SPAN, &Now::default(), 0, 1 << 20, None).unwrap();
        // The filter has eight columns; no bucket is dropped yet.
        for second in 0..12 {
            let bucket = registry.ensure(&db, super::tests::second(second)).unwrap();
            registry.mark(&bucket, &[second * 977]);
            registry.set_filtered(&bucket);
            assert_eq!(registry.snapshot().is_filtered(&bucket), second < 8, "bucket {second}");
            assert_ne!(registry.snapshot().candidates(second * 977) & 1 << bucket.column_id, 0, "bucket {second}");
        }
    }

    #[test]
    fn a_bucket_with_unexpired_keys_is_not_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let (db, registry, [first, ..]) = three_reopened(&dir);
        // Its newest possible key is from 999 ms.
        let (last_ms, window_ms) = (4_998, SPAN.window_ms);
        let at = |time_ms| Now { time_ms, ..Now::default() };
        registry.remove(&db, &first, &at(last_ms), window_ms);
        assert!(registry.snapshot().has(&first));
        let reason = registry.poison().reason().unwrap();
        assert!(reason.contains("dropped only when all its keys have expired"), "{reason}");
        assert!(reason.contains("bucket-0-1000 at 4998"), "{reason}");
        db.close();

        let (db, families) = open(&dir);
        let registry = BucketRegistry::open(&db, &families, SPAN, &at(last_ms + 1), 0, 1 << 20, None).unwrap();
        assert!(registry.has_expired());
        registry.remove_expired(&db, &|| true);
        registry.poison().unbroken().unwrap();
        db.close();
        assert_eq!(open(&dir).1.len(), 2, "the bucket that had expired at the open was dropped");
    }

    #[test]
    fn a_missing_filter_bit_poisons_the_store() {
        let dir = tempfile::tempdir().unwrap();
        let (_db, registry, [first, ..]) = three_reopened(&dir);
        registry.mark(&first, &[1, 2, 3]);
        let base = Arc::clone(registry.snapshot().base().unwrap());
        registry.add_columns(&base, 0, &[(first.column_id, base.column(0, first.column_id).unwrap())]);
        registry.insert_moved(&first, &base, &[4]);
        registry.poison().unbroken().unwrap();
        registry.add_columns(&base, 0, &[(first.column_id, vec![0; 3])]);
        let error = registry.poison().unbroken().unwrap_err().to_string();
        assert!(error.contains("sets all its bits (bits are missing for keys of a filter file)"), "{error}");

        // No matrix counts keys for column id 64.
        let (keys, is_merge_requested) = (AtomicU64::new(0), AtomicBool::new(false));
        let outside = Bucket { range: second(9), column_id: 64, family: "none".to_owned(), keys, is_merge_requested };
        let (_db, registry, _) = three_reopened(&tempfile::tempdir().unwrap());
        registry.insert_moved(&outside, &base, &[4]);
        assert!(registry.poison().unbroken().is_err());
    }
}
