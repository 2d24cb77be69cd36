//! The live buckets and their filter, as one picture that readers take without a lock.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::range::BucketRange;
use crate::clock::Now;
use crate::codec::{put_entry_key, read_value};
use crate::config::Span;
use crate::entry::Entry;
use crate::filter::matrix::{ColumnId, FilterMatrix, Geometry, MAX_COLUMNS};
use crate::filter::stack::FilterStack;
use crate::invariant::{Invariant, Poison};
use crate::rocks::db::Db;
use crate::testing::failpoint::Failpoint;
use crate::testing::sync_shim::{ArcSwap, AtomicU64, Guard, Mutex};
use onlyonce_core::{Error, Result};

/// A live bucket.
pub(crate) struct Bucket {
    pub(crate) range: BucketRange,
    pub(crate) column_id: ColumnId,
    pub(crate) family: String,
    pub(crate) keys: AtomicU64,
}

/// All that a lookup needs, as of one moment.
#[derive(Clone)]
pub(crate) struct Snapshot {
    /// By slot. As long as the slots that were ever used.
    buckets: Vec<Option<Arc<Bucket>>>,
    /// A bit for each slot with a bucket.
    live: u64,
    /// A bit for each bucket that its filter does not cover yet: always asked on disk (G5).
    unfiltered: u64,
    stack: FilterStack,
}

impl Snapshot {
    /// The slots of the buckets that may hold the key with this digest, a bit each.
    pub(crate) fn candidates(&self, digest: u64) -> u64 {
        (self.stack.column_bits(digest) | self.unfiltered) & self.live
    }

    /// As [`Snapshot::candidates`], for many digests, each in its place.
    pub(crate) fn candidates_of(&self, digests: &[u64], column_bits: &mut [u64]) {
        self.stack.column_bits_of(digests, column_bits);
        for column_bits in column_bits {
            *column_bits = (*column_bits | self.unfiltered) & self.live;
        }
    }

    /// The live buckets, the newest first.
    pub(crate) fn newest_first(&self) -> Vec<Arc<Bucket>> {
        let mut buckets: Vec<Arc<Bucket>> = self.buckets.iter().flatten().cloned().collect();
        buckets.sort_unstable_by_key(|bucket| std::cmp::Reverse(bucket.range));
        buckets
    }

    /// The buckets of a set of slots.
    pub(crate) fn of_columns(&self, column_bits: u64) -> impl Iterator<Item = &Arc<Bucket>> {
        self.buckets.iter().flatten().filter(move |bucket| column_bits & 1 << bucket.column_id != 0)
    }

    /// Whether the bucket is still there.
    pub(crate) fn has(&self, bucket: &Arc<Bucket>) -> bool {
        self.buckets.iter().flatten().any(|other| Arc::ptr_eq(other, bucket))
    }

    /// Whether the filter has a column for the bucket. Without one it is asked on disk for as long as it lives.
    pub(crate) fn has_column(&self, bucket: &Bucket) -> bool {
        self.stack.covers(bucket.column_id)
    }

    pub(crate) fn is_filtered(&self, bucket: &Bucket) -> bool {
        self.unfiltered & 1 << bucket.column_id == 0
    }

    /// The base of the filter, which kept columns fit into.
    pub(crate) fn base(&self) -> Option<&Arc<FilterMatrix>> {
        self.stack.base()
    }

    /// The layer that has all keys of a slot's bucket, if one has and kept columns can come from it.
    pub(crate) fn base_of(&self, column_id: ColumnId) -> Option<&Arc<FilterMatrix>> {
        self.stack.base_of(column_id)
    }

    pub(crate) fn filter_bytes(&self) -> u64 {
        self.stack.bytes()
    }
}

/// The live buckets. Lookups take [`BucketRegistry::snapshot`]; whoever changes something takes `change` first.
pub(crate) struct BucketRegistry {
    snapshot: ArcSwap<Snapshot>,
    change: Mutex<()>,
    /// What the caller expects of a bucket, or 0.
    expected_keys: u64,
    /// Families of buckets that had passed when the store was opened, to be dropped.
    expired: Mutex<Vec<String>>,
    poison: Arc<Poison>,
}

impl BucketRegistry {
    /// Has it end the store where an invariant is broken.
    pub(crate) fn of(self, poison: &Arc<Poison>) -> Self {
        Self { poison: Arc::clone(poison), ..self }
    }

    pub(crate) fn poison(&self) -> &Poison {
        &self.poison
    }

    /// The buckets with these family names, none of them covered by a filter yet. Its base is of `geometry`, if it may
    /// be, and else for buckets of `expected_keys`, or of as many as those that are there.
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
                place: format!("the column family `{}`", family.escape_default()),
                detail: "it is no bucket".to_owned(),
            })?;
            if range.is_live(now, span.window_ms) {
                ranges.push((range, db.estimate_keys(family)?));
            } else {
                expired.push(family.clone());
            }
        }
        // Those of the window, the present one, the next, and two that are not dropped yet; and those of other widths.
        let others = ranges.iter().filter(|(range, _)| range.width_ms != span.bucket_ms).count();
        let needed = span.window_ms.div_ceil(span.bucket_ms).saturating_add(4).saturating_add(others as u64);
        if needed > MAX_COLUMNS as u64 {
            return Err(Error::Config {
                option: "bucket",
                value: format!("{} ms", span.bucket_ms),
                bounds: format!(
                    "wide enough that at most {MAX_COLUMNS} buckets are live: {needed} would be, {others} of them from \
                     openings with another width"
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

    /// The bucket of a slice, created where there is none.
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
                bounds: format!("wide enough that at most {MAX_COLUMNS} buckets are live"),
            });
        };
        Failpoint::BucketBegun.pass();
        db.create_bucket(&bucket.family)?;
        Failpoint::BucketCreated.pass();
        // Most buckets come to what the fullest before them came to.
        let fullest = snapshot.buckets.iter().flatten().map(|bucket| bucket.keys.load(Ordering::Relaxed)).max();
        snapshot.expect(fullest.unwrap_or(0).max(self.expected_keys));
        self.snapshot.store(Arc::new(snapshot));
        Failpoint::BucketRegistered.pass();
        tracing::debug!(bucket = %bucket.range, "bucket created");
        Ok(bucket)
    }

    /// Notes in the filter that the bucket holds the keys with these digests, making room first. Must be called
    /// before anyone relies on the bucket to answer for them.
    pub(crate) fn mark(&self, bucket: &Bucket, digests: &[u64]) {
        bucket.keys.fetch_add(digests.len() as u64, Ordering::Relaxed);
        self.mark_counted(bucket, digests, digests.len() as u64);
    }

    /// As [`BucketRegistry::mark`], for keys that are counted already, of which `expected` are still to come.
    pub(crate) fn mark_counted(&self, bucket: &Bucket, digests: &[u64], expected: u64) {
        // Not only to make room: an empty layer is removed with the next bucket that goes, unless it is seen in use.
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
        // A bucket that the filter has no column for is always asked on disk.
        if !marked && snapshot.stack.covers(bucket.column_id) {
            self.unmarked(bucket.range);
        }
    }

    fn unmarked(&self, of: impl std::fmt::Display) {
        self.poison.broken(Invariant::FilterBits, format_args!("not so for keys of {of}"));
    }

    /// Adds kept columns to a layer of the filter.
    pub(crate) fn add_columns(&self, matrix: &FilterMatrix, shard: usize, columns: &[(ColumnId, Vec<u8>)]) {
        let _change = self.change.lock();
        if !matrix.add_columns(shard, columns) {
            self.unmarked("a filter file");
        }
    }

    /// As [`BucketRegistry::set_filtered`], where a layer got the bucket's column from a file: `keys` keys. Not if the layer
    /// has gone meanwhile.
    pub(crate) fn set_loaded(&self, bucket: &Arc<Bucket>, matrix: &Arc<FilterMatrix>, keys: u64) {
        {
            let _change = self.change.lock();
            if !self.snapshot.load().stack.has(matrix) {
                return;
            }
            // A layer without keys passes for empty, and the number may be RocksDB's guess.
            if !matrix.count(bucket.column_id, keys.max(1)) {
                self.unmarked(bucket.range);
            }
        }
        self.set_filtered(bucket);
    }

    /// From now on the filter answers for the bucket.
    pub(crate) fn set_filtered(&self, bucket: &Arc<Bucket>) {
        let _change = self.change.lock();
        let mut snapshot = Snapshot::clone(&self.snapshot.load());
        if snapshot.has(bucket) && snapshot.stack.covers(bucket.column_id) {
            snapshot.unfiltered &= !(1 << bucket.column_id);
            self.snapshot.store(Arc::new(snapshot));
        }
    }

    /// The layer that a bucket's keys should move to, so that the layers they lie in can go.
    pub(crate) fn target_for(&self, bucket: &Bucket) -> Option<Arc<FilterMatrix>> {
        let keys = bucket.keys.load(Ordering::Relaxed);
        self.snapshot().stack.target_for(bucket.column_id, keys).cloned()
    }

    /// Notes digests of keys that move to a layer.
    pub(crate) fn insert_moved(&self, bucket: &Bucket, target: &FilterMatrix, digests: &[u64]) {
        let _change = self.change.lock();
        if !target.insert(bucket.column_id, digests.iter().copied()) {
            self.unmarked(bucket.range);
        }
    }

    /// All keys of the bucket have moved: its older layers are asked no more.
    pub(crate) fn moved(&self, bucket: &Arc<Bucket>, target: &Arc<FilterMatrix>) {
        let _change = self.change.lock();
        let mut snapshot = Snapshot::clone(&self.snapshot.load());
        if snapshot.has(bucket) && snapshot.stack.has(target) {
            snapshot.stack = snapshot.stack.moved(bucket.column_id, target);
            tracing::debug!(bucket = %bucket.range, bytes = snapshot.stack.bytes(), "filter moved to the newest base");
            self.snapshot.store(Arc::new(snapshot));
        }
    }

    /// Drops the buckets that had passed before this opening, as long as `should_continue` says so.
    pub(crate) fn remove_expired(&self, db: &Db, should_continue: &impl Fn() -> bool) {
        while should_continue() {
            // Not in the loop's condition, which would keep the lock.
            let Some(family) = self.expired.lock().pop() else { return };
            drop_or_leave(db, &family);
        }
    }

    /// Whether a bucket that is about to be dropped has passed indeed.
    fn may_go(&self, range: BucketRange, now: &Now, window_ms: u64) -> bool {
        let is_live = range.is_live(now, window_ms);
        if is_live {
            let detail = format_args!("{range} at {}, with a window of {window_ms} ms", now.time_ms);
            self.poison.broken(Invariant::OnlyExpiredDropped, detail);
        }
        !is_live
    }

    /// Whether buckets are left that had passed before this opening.
    pub(crate) fn has_expired(&self) -> bool {
        !self.expired.lock().is_empty()
    }

    /// Drops a bucket that has passed, and frees its slot.
    pub(crate) fn remove(&self, db: &Db, bucket: &Arc<Bucket>, now: &Now, window_ms: u64) {
        if !self.may_go(bucket.range, now, window_ms) {
            return;
        }
        let _change = self.change.lock();
        let mut snapshot = Snapshot::clone(&self.snapshot.load());
        if !snapshot.has(bucket) {
            // Somebody else has dropped it meanwhile.
            return;
        }
        let bit = 1 << bucket.column_id;
        snapshot.live &= !bit;
        snapshot.unfiltered &= !bit;
        // Nobody asks it from here on. The slot stays taken until its column is clean, for a bit that is left over
        // would be erased again after the next bucket has set it.
        self.snapshot.store(Arc::new(snapshot.clone()));
        drop_or_leave(db, &bucket.family);
        if let Some(index) = snapshot.buckets.get_mut(usize::from(bucket.column_id)) {
            *index = None;
        }
        snapshot.stack = snapshot.stack.without(bucket.column_id);
        self.snapshot.store(Arc::new(snapshot));
        tracing::debug!(bucket = %bucket.range, keys = bucket.keys.load(Ordering::Relaxed), "bucket dropped");
    }
}

/// Drops a bucket that nobody asks any more. RocksDB forgets the handle even where it fails, so that it cannot be tried
/// again: the next open finds the bucket, and that it has passed.
fn drop_or_leave(db: &Db, family: &str) {
    Failpoint::BucketUnlinked.pass();
    if let Err(error) = db.drop_bucket(family) {
        tracing::warn!(%error, family, "a passed bucket could not be dropped: the next open will");
    }
}

impl Snapshot {
    /// Makes the filter's base large enough for buckets of `keys` keys, where the budget allows.
    fn expect(&mut self, keys: u64) {
        if let Some(stack) = self.stack.with_base_for(keys) {
            tracing::debug!(keys, bytes = stack.bytes(), "filter base grown");
            self.stack = stack;
        }
    }

    /// Puts a bucket into the first free slot.
    fn insert(&mut self, range: BucketRange, keys: u64) -> Option<Arc<Bucket>> {
        let free = self.buckets.iter().position(Option::is_none).unwrap_or(self.buckets.len());
        if free >= MAX_COLUMNS {
            return None;
        }
        let column_id = ColumnId::try_from(free).ok()?;
        let bucket = Arc::new(Bucket { range, column_id, family: range.family(), keys: AtomicU64::new(keys) });
        match self.buckets.get_mut(free) {
            Some(index) => *index = Some(Arc::clone(&bucket)),
            None => self.buckets.push(Some(Arc::clone(&bucket))),
        }
        self.live |= 1 << column_id;
        if !self.stack.covers(column_id) {
            // More buckets than the filter has columns for: this one is asked on disk for as long as it lives.
            self.unfiltered |= 1 << column_id;
        }
        Some(bucket)
    }
}

/// A key that the filter could not rule out: its place in the caller's batch, and what to look for where.
pub(crate) struct Probe<'a> {
    pub(crate) index: usize,
    pub(crate) digest: u64,
    pub(crate) key: &'a [u8],
    pub(crate) column_bits: u64,
}

/// Looks the probes up on disk, each in the buckets that may hold it, and hands what is there to `found`. The whole
/// key is compared: a digest alone never finds anything.
pub(crate) fn look_up(
    db: &Db,
    snapshot: &Snapshot,
    probes: &[Probe<'_>],
    mut found: impl FnMut(usize, &Arc<Bucket>, Entry),
) -> Result<()> {
    let asked = probes.iter().fold(0, |column_bits, probe| column_bits | probe.column_bits);
    for bucket in snapshot.of_columns(asked) {
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
        let mut read = |at: usize, value: &[u8]| {
            let entry = read_value(value, bucket.range.start_ms).ok_or_else(|| Error::Corrupt {
                place: format!("a row of the bucket {}", bucket.range),
                detail: "its value is not in a format that this version writes".to_owned(),
            })?;
            let corrupt =
                |detail: String| Error::Corrupt { place: format!("a row of the bucket {}", bucket.range), detail };
            if !bucket.range.contains(entry.time_ms()) {
                return Err(corrupt(format!("its key has the time {}, outside the bucket", entry.time_ms())));
            }
            let probe = here.get(at).ok_or_else(|| corrupt("nobody has asked for it".to_owned()))?;
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
        Db::open(directory, 32 << 20, Duration::ZERO, || Ok(Vec::new())).unwrap()
    }

    fn second(second: u64) -> BucketRange {
        BucketRange { start_ms: second * 1_000, width_ms: 1_000 }
    }

    /// A store of three buckets without their filters, as they are found at open.
    fn three_found(dir: &tempfile::TempDir) -> (Db, BucketRegistry, [Arc<Bucket>; 3]) {
        let (db, _) = open(dir);
        (0..3).for_each(|i| db.create_bucket(&second(i).family()).unwrap());
        db.close().unwrap();
        let (db, families) = open(dir);
        let registry = BucketRegistry::open(&db, &families, SPAN, &Now::default(), 0, 1 << 20, None).unwrap();
        let buckets = [0, 1, 2].map(|i| registry.ensure(&db, second(i)).unwrap());
        (db, registry, buckets)
    }

    /// The seconds of the buckets that may hold a key, asked in either way.
    fn asked(registry: &BucketRegistry, digest: u64) -> Vec<u64> {
        let snapshot = registry.snapshot();
        let (column_bits, mut again) = (snapshot.candidates(digest), [0, 0]);
        snapshot.candidates_of(&[digest, digest], &mut again);
        assert_eq!(again, [column_bits; 2]);
        let mut seconds: Vec<u64> =
            snapshot.of_columns(column_bits).map(|bucket| bucket.range.start_ms / 1_000).collect();
        seconds.sort_unstable();
        assert_eq!(seconds.len() as u32, column_bits.count_ones(), "and no place where there is none");
        seconds
    }

    #[test]
    fn a_bucket_is_asked_on_disk_until_its_filter_is_there_and_by_its_filter_from_then_on() {
        let dir = tempfile::tempdir().unwrap();
        let (_db, registry, buckets) = three_found(&dir);
        // Half of a filter: some keys are in it already.
        registry.mark(&buckets[1], &[77]);
        assert_eq!((asked(&registry, 77), asked(&registry, 78)), (vec![0, 1, 2], vec![0, 1, 2]));
        registry.set_filtered(&buckets[1]);
        assert_eq!((asked(&registry, 77), asked(&registry, 78)), (vec![0, 1, 2], vec![0, 2]));
        registry.set_filtered(&buckets[0]);
        registry.set_filtered(&buckets[2]);
        assert_eq!((asked(&registry, 77), asked(&registry, 78)), (vec![1], vec![]));
    }

    #[test]
    fn a_bucket_that_goes_takes_nothing_of_the_others_and_none_of_the_next_in_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let (db, registry, [first, gone, last]) = three_found(&dir);
        registry.mark(&gone, &[77]);
        registry.remove(&db, &gone, &Now { time_ms: u64::MAX, ..Now::default() }, 0);
        assert_eq!(asked(&registry, 77), [0, 2]);
        let next = registry.ensure(&db, second(3)).unwrap();
        assert_eq!(next.column_id, gone.column_id);
        assert_eq!(asked(&registry, 77), [0, 2], "its filter is new and empty");
        registry.mark(&next, &[99]);
        // Whoever still has the old one in hand.
        registry.remove(&db, &gone, &Now { time_ms: u64::MAX, ..Now::default() }, 0);
        registry.moved(&gone, registry.snapshot().base().unwrap());
        assert_eq!(asked(&registry, 99), [0, 2, 3]);
        registry.set_filtered(&first);
        registry.set_filtered(&last);
        assert_eq!(asked(&registry, 99), [3]);
        let passing = registry.ensure(&db, second(9)).unwrap();
        registry.remove(&db, &passing, &Now { time_ms: u64::MAX, ..Now::default() }, 0);
        assert_eq!((asked(&registry, 99), asked(&registry, 77)), (vec![3], vec![]), "the others keep their filters");
        // A home that has gone meanwhile has nobody's keys.
        let elsewhere = tempfile::tempdir().unwrap();
        let (_db, other, _) = three_found(&elsewhere);
        registry.moved(&next, other.snapshot().base().unwrap());
        assert_eq!(asked(&registry, 99), [3]);
        db.close().unwrap();
        let (db, families) = open(&dir);
        assert_eq!(families, [0, 2, 3].map(|i| second(i).family()));
        let registry = BucketRegistry::open(&db, &families, SPAN, &Now::default(), 0, 1 << 20, None).unwrap();
        let buckets = [0, 2, 3].map(|i| registry.ensure(&db, second(i)).unwrap());
        registry.remove(&db, &buckets[1], &Now { time_ms: u64::MAX, ..Now::default() }, 0);
        let newer = registry.ensure(&db, second(4)).unwrap();
        registry.remove(&db, &newer, &Now { time_ms: u64::MAX, ..Now::default() }, 0);
        registry.set_filtered(&buckets[1]);
        assert_eq!(asked(&registry, 99), [0, 3], "they have no filter yet");
    }

    #[test]
    fn buckets_of_other_widths_count_for_how_many_there_may_be() {
        let dir = tempfile::tempdir().unwrap();
        let (db, _) = open(&dir);
        let others: Vec<String> = (0..13).map(|i| BucketRange { start_ms: i * 500, width_ms: 500 }.family()).collect();
        others.iter().for_each(|family| db.create_bucket(family).unwrap());
        let span = Span { window_ms: 48_000, bucket_ms: 1_000 };
        let open = |families: &[String]| {
            BucketRegistry::open(&db, families, span, &Now::default(), 0, 1 << 20, None).map(|_| ())
        };
        // 48 for the window, four around it, and the others, of which there is room for 12.
        open(&others[..12]).unwrap();
        let refused = open(&others).unwrap_err().to_string();
        assert!(refused.contains("65 would be, 13 of them"), "{refused}");
    }

    #[test]
    fn a_bucket_beyond_the_filters_columns_is_asked_on_disk() {
        let dir = tempfile::tempdir().unwrap();
        let (db, _) = open(&dir);
        let registry = BucketRegistry::open(&db, &[], SPAN, &Now::default(), 0, 1 << 20, None).unwrap();
        // Eight columns; nobody has dropped anything yet.
        for second in 0..12 {
            let bucket = registry.ensure(&db, super::tests::second(second)).unwrap();
            registry.mark(&bucket, &[second * 977]);
            registry.set_filtered(&bucket);
            assert_eq!(registry.snapshot().is_filtered(&bucket), second < 8, "bucket {second}");
            assert_ne!(registry.snapshot().candidates(second * 977) & 1 << bucket.column_id, 0, "bucket {second}");
        }
    }

    #[test]
    fn a_bucket_that_still_counts_is_not_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let (db, registry, [first, ..]) = three_found(&dir);
        // Its newest possible key is of 999.
        let (last_ms, window_ms) = (4_998, SPAN.window_ms);
        let at = |time_ms| Now { time_ms, ..Now::default() };
        registry.remove(&db, &first, &at(last_ms), window_ms);
        assert!(registry.snapshot().has(&first));
        let reason = registry.poison().reason().unwrap();
        assert!(reason.contains("dropped only when all its keys have expired"), "{reason}");
        assert!(reason.contains("bucket-0-1000 at 4998"), "{reason}");
        db.close().unwrap();

        let (db, families) = open(&dir);
        let registry = BucketRegistry::open(&db, &families, SPAN, &at(last_ms + 1), 0, 1 << 20, None).unwrap();
        assert!(registry.has_expired());
        registry.remove_expired(&db, &|| true);
        registry.poison().unbroken().unwrap();
        db.close().unwrap();
        assert_eq!(open(&dir).1.len(), 2, "what had passed at the open was dropped");
    }

    #[test]
    fn a_filter_that_misses_a_bit_poisons_the_store() {
        let dir = tempfile::tempdir().unwrap();
        let (_db, registry, [first, ..]) = three_found(&dir);
        registry.mark(&first, &[1, 2, 3]);
        let base = Arc::clone(registry.snapshot().base().unwrap());
        registry.add_columns(&base, 0, &[(first.column_id, base.column(0, first.column_id).unwrap())]);
        registry.insert_moved(&first, &base, &[4]);
        registry.poison().unbroken().unwrap();
        registry.add_columns(&base, 0, &[(first.column_id, vec![0; 3])]);
        let said = registry.poison().unbroken().unwrap_err().to_string();
        assert!(said.contains("sets all its bits (not so for keys of a filter file)"), "{said}");

        // Slot 64 is none that a layer counts for.
        let outside = Bucket { range: second(9), column_id: 64, family: "none".to_owned(), keys: AtomicU64::new(0) };
        let (_db, registry, _) = three_found(&tempfile::tempdir().unwrap());
        registry.insert_moved(&outside, &base, &[4]);
        assert!(registry.poison().unbroken().is_err());
    }
}
