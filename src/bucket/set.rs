//! The live buckets and their filter, as one picture that readers take without a lock.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::window::Slice;
use crate::clock::Now;
use crate::codec::{read_value, row_key};
use crate::concurrency::{ArcSwap, AtomicU64, Guard, Mutex};
use crate::config::Span;
use crate::entry::Entry;
use crate::error::{Error, Result};
use crate::filter::layer::{Geometry, Layer, SLOTS, Slot};
use crate::filter::stack::Stack;
use crate::invariant::{Invariant, Poison};
use crate::kill_point::KillPoint;
use crate::storage::db::Db;

/// A live bucket.
pub(crate) struct Bucket {
    pub(crate) slice: Slice,
    pub(crate) slot: Slot,
    pub(crate) family: String,
    pub(crate) keys: AtomicU64,
}

/// All that a lookup needs, as of one moment.
#[derive(Clone)]
pub(crate) struct View {
    /// By slot. As long as the slots that were ever used.
    buckets: Vec<Option<Arc<Bucket>>>,
    /// A bit for each slot with a bucket.
    live: u64,
    /// A bit for each bucket that its filter does not cover yet: always asked on disk (G5).
    unfiltered: u64,
    stack: Stack,
}

impl View {
    /// The slots of the buckets that may hold the key with this digest, a bit each.
    pub(crate) fn candidates(&self, digest: u64) -> u64 {
        (self.stack.slots(digest) | self.unfiltered) & self.live
    }

    /// As [`View::candidates`], for many digests, each in its place.
    pub(crate) fn candidates_of(&self, digests: &[u64], slots: &mut [u64]) {
        self.stack.slots_of(digests, slots);
        for slots in slots {
            *slots = (*slots | self.unfiltered) & self.live;
        }
    }

    /// The live buckets, the newest first.
    pub(crate) fn newest_first(&self) -> Vec<Arc<Bucket>> {
        let mut buckets: Vec<Arc<Bucket>> = self.buckets.iter().flatten().cloned().collect();
        buckets.sort_unstable_by_key(|bucket| std::cmp::Reverse(bucket.slice));
        buckets
    }

    /// The buckets of a set of slots.
    pub(crate) fn of_slots(&self, slots: u64) -> impl Iterator<Item = &Arc<Bucket>> {
        self.buckets.iter().flatten().filter(move |bucket| slots & 1 << bucket.slot != 0)
    }

    /// Whether the bucket is still there.
    pub(crate) fn has(&self, bucket: &Arc<Bucket>) -> bool {
        self.buckets.iter().flatten().any(|other| Arc::ptr_eq(other, bucket))
    }

    /// Whether the filter has a column for the bucket. Without one it is asked on disk for as long as it lives.
    pub(crate) fn has_column(&self, bucket: &Bucket) -> bool {
        self.stack.covers(bucket.slot)
    }

    pub(crate) fn is_filtered(&self, bucket: &Bucket) -> bool {
        self.unfiltered & 1 << bucket.slot == 0
    }

    /// The base of the filter, which kept columns fit into.
    pub(crate) fn base(&self) -> Option<&Arc<Layer>> {
        self.stack.base()
    }

    /// The layer that has all keys of a slot's bucket, if one has and kept columns can come from it.
    pub(crate) fn base_of(&self, slot: Slot) -> Option<&Arc<Layer>> {
        self.stack.base_of(slot)
    }

    pub(crate) fn filter_bytes(&self) -> u64 {
        self.stack.bytes()
    }
}

/// The live buckets. Lookups take [`BucketSet::view`]; whoever changes something takes `change` first.
pub(crate) struct BucketSet {
    view: ArcSwap<View>,
    change: Mutex<()>,
    /// What the caller expects of a bucket, or 0.
    expected_keys: u64,
    /// Families of buckets that had passed when the store was opened, to be dropped.
    passed: Mutex<Vec<String>>,
    poison: Arc<Poison>,
}

impl BucketSet {
    /// Has it end the store where an invariant is broken.
    pub(crate) fn of(self, poison: &Arc<Poison>) -> Self {
        Self { poison: Arc::clone(poison), ..self }
    }

    pub(super) fn poison(&self) -> &Poison {
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
        let mut slices = Vec::with_capacity(families.len());
        let mut passed = Vec::new();
        for family in families {
            let slice = Slice::of_family(family).ok_or_else(|| Error::Corrupt {
                place: format!("the column family `{}`", family.escape_default()),
                detail: "it is no bucket".to_owned(),
            })?;
            if slice.is_live(now, span.window_ms) {
                slices.push((slice, db.estimate_keys(family)?));
            } else {
                passed.push(family.clone());
            }
        }
        // Those of the window, the present one, the next, and two that are not dropped yet; and those of other widths.
        let others = slices.iter().filter(|(slice, _)| slice.width_ms != span.bucket_ms).count();
        let needed = span.window_ms.div_ceil(span.bucket_ms).saturating_add(4).saturating_add(others as u64);
        if needed > SLOTS as u64 {
            return Err(Error::Config {
                option: "bucket",
                value: format!("{} ms", span.bucket_ms),
                bounds: format!(
                    "wide enough that at most {SLOTS} buckets are live: {needed} would be, {others} of them from \
                     openings with another width"
                ),
            });
        }
        let keys: Vec<u64> = slices.iter().map(|(_, keys)| *keys).chain([expected_keys]).collect();
        let stack = Stack::new(needed, filter_budget, &keys, geometry);
        let mut view = View { buckets: Vec::new(), live: 0, unfiltered: 0, stack };
        for (slice, keys) in slices {
            if let Some(bucket) = view.insert(slice, keys) {
                view.unfiltered |= 1 << bucket.slot;
            }
        }
        let passed = Mutex::new(passed);
        let (view, change, poison) = (ArcSwap::from_pointee(view), Mutex::new(()), Arc::default());
        Ok(Self { view, change, expected_keys, passed, poison })
    }

    pub(crate) fn view(&self) -> Guard<Arc<View>> {
        self.view.load()
    }

    /// The bucket of a slice, created where there is none.
    pub(crate) fn ensure(&self, db: &Db, slice: Slice) -> Result<Arc<Bucket>> {
        let _change = self.change.lock();
        let view = self.view.load();
        if let Some(bucket) = view.buckets.iter().flatten().find(|bucket| bucket.slice == slice) {
            return Ok(Arc::clone(bucket));
        }
        let mut view = View::clone(&view);
        let Some(bucket) = view.insert(slice, 0) else {
            return Err(Error::Config {
                option: "bucket",
                value: format!("{} ms", slice.width_ms),
                bounds: format!("wide enough that at most {SLOTS} buckets are live"),
            });
        };
        KillPoint::BucketBegun.pass();
        db.create_bucket(&bucket.family)?;
        KillPoint::BucketCreated.pass();
        // Most buckets come to what the fullest before them came to.
        let fullest = view.buckets.iter().flatten().map(|bucket| bucket.keys.load(Ordering::Relaxed)).max();
        view.expect(fullest.unwrap_or(0).max(self.expected_keys));
        self.view.store(Arc::new(view));
        KillPoint::BucketKnown.pass();
        tracing::debug!(bucket = %bucket.slice, "bucket created");
        Ok(bucket)
    }

    /// Notes in the filter that the bucket holds the keys with these digests, making room first. Must be called
    /// before anyone relies on the bucket to answer for them.
    pub(crate) fn mark(&self, bucket: &Bucket, digests: &[u64]) {
        bucket.keys.fetch_add(digests.len() as u64, Ordering::Relaxed);
        self.mark_counted(bucket, digests, digests.len() as u64);
    }

    /// As [`BucketSet::mark`], for keys that are counted already, of which `expected` are still to come.
    pub(crate) fn mark_counted(&self, bucket: &Bucket, digests: &[u64], expected: u64) {
        // Not only to make room: an empty layer is removed with the next bucket that goes, unless it is seen in use.
        let _change = self.change.lock();
        let view = self.view.load();
        let marked = match view.stack.with_room(bucket.slot, expected) {
            None => view.stack.insert(bucket.slot, digests.iter().copied()),
            Some(stack) => {
                tracing::debug!(bucket = %bucket.slice, keys = expected, bytes = stack.bytes(), "filter grown");
                let marked = stack.insert(bucket.slot, digests.iter().copied());
                self.view.store(Arc::new(View { stack, ..View::clone(&view) }));
                marked
            }
        };
        // A bucket that the filter has no column for is always asked on disk.
        if !marked && view.stack.covers(bucket.slot) {
            self.unmarked(bucket.slice);
        }
    }

    fn unmarked(&self, of: impl std::fmt::Display) {
        self.poison.broken(Invariant::FilterBits, format_args!("not so for keys of {of}"));
    }

    /// Adds kept columns to a layer of the filter.
    pub(crate) fn add_columns(&self, layer: &Layer, shard: usize, columns: &[(Slot, Vec<u8>)]) {
        let _change = self.change.lock();
        if !layer.add_columns(shard, columns) {
            self.unmarked("a filter file");
        }
    }

    /// As [`BucketSet::set_filtered`], where a layer got the bucket's column from a file: `keys` keys. Not if the layer
    /// has gone meanwhile.
    pub(crate) fn set_loaded(&self, bucket: &Arc<Bucket>, layer: &Arc<Layer>, keys: u64) {
        {
            let _change = self.change.lock();
            if !self.view.load().stack.has(layer) {
                return;
            }
            // A layer without keys passes for empty, and the number may be RocksDB's guess.
            if !layer.count(bucket.slot, keys.max(1)) {
                self.unmarked(bucket.slice);
            }
        }
        self.set_filtered(bucket);
    }

    /// From now on the filter answers for the bucket.
    pub(crate) fn set_filtered(&self, bucket: &Arc<Bucket>) {
        let _change = self.change.lock();
        let mut view = View::clone(&self.view.load());
        if view.has(bucket) && view.stack.covers(bucket.slot) {
            view.unfiltered &= !(1 << bucket.slot);
            self.view.store(Arc::new(view));
        }
    }

    /// The layer that a bucket's keys should move to, so that the layers they lie in can go.
    pub(crate) fn home_for(&self, bucket: &Bucket) -> Option<Arc<Layer>> {
        let keys = bucket.keys.load(Ordering::Relaxed);
        self.view().stack.home_for(bucket.slot, keys).cloned()
    }

    /// Notes digests of keys that move to a layer.
    pub(crate) fn move_in(&self, bucket: &Bucket, home: &Layer, digests: &[u64]) {
        let _change = self.change.lock();
        if !home.insert(bucket.slot, digests.iter().copied()) {
            self.unmarked(bucket.slice);
        }
    }

    /// All keys of the bucket have moved: its older layers are asked no more.
    pub(crate) fn moved(&self, bucket: &Arc<Bucket>, home: &Arc<Layer>) {
        let _change = self.change.lock();
        let mut view = View::clone(&self.view.load());
        if view.has(bucket) && view.stack.has(home) {
            view.stack = view.stack.moved(bucket.slot, home);
            tracing::debug!(bucket = %bucket.slice, bytes = view.stack.bytes(), "filter moved to the newest base");
            self.view.store(Arc::new(view));
        }
    }

    /// Drops the buckets that had passed before this opening, as long as `go_on` says so.
    pub(crate) fn remove_passed(&self, db: &Db, go_on: &impl Fn() -> bool) {
        while go_on() {
            // Not in the loop's condition, which would keep the lock.
            let Some(family) = self.passed.lock().pop() else { return };
            drop_or_leave(db, &family);
        }
    }

    /// Whether a bucket that is about to be dropped has passed indeed.
    fn may_go(&self, slice: Slice, now: &Now, window_ms: u64) -> bool {
        let is_live = slice.is_live(now, window_ms);
        if is_live {
            let detail = format_args!("{slice} at {}, with a window of {window_ms} ms", now.time_ms);
            self.poison.broken(Invariant::OnlyPassedDropped, detail);
        }
        !is_live
    }

    /// Whether buckets are left that had passed before this opening.
    pub(crate) fn has_passed(&self) -> bool {
        !self.passed.lock().is_empty()
    }

    /// Drops a bucket that has passed, and frees its slot.
    pub(crate) fn remove(&self, db: &Db, bucket: &Arc<Bucket>, now: &Now, window_ms: u64) {
        if !self.may_go(bucket.slice, now, window_ms) {
            return;
        }
        let _change = self.change.lock();
        let mut view = View::clone(&self.view.load());
        if !view.has(bucket) {
            // Somebody else has dropped it meanwhile.
            return;
        }
        let bit = 1 << bucket.slot;
        view.live &= !bit;
        view.unfiltered &= !bit;
        // Nobody asks it from here on. The slot stays taken until its column is clean, for a bit that is left over
        // would be erased again after the next bucket has set it.
        self.view.store(Arc::new(view.clone()));
        drop_or_leave(db, &bucket.family);
        if let Some(place) = view.buckets.get_mut(usize::from(bucket.slot)) {
            *place = None;
        }
        view.stack = view.stack.without(bucket.slot);
        self.view.store(Arc::new(view));
        tracing::debug!(bucket = %bucket.slice, keys = bucket.keys.load(Ordering::Relaxed), "bucket dropped");
    }
}

/// Drops a bucket that nobody asks any more. RocksDB forgets the handle even where it fails, so that it cannot be tried
/// again: the next open finds the bucket, and that it has passed.
fn drop_or_leave(db: &Db, family: &str) {
    KillPoint::BucketLeft.pass();
    if let Err(error) = db.drop_bucket(family) {
        tracing::warn!(%error, family, "a passed bucket could not be dropped: the next open will");
    }
}

impl View {
    /// Makes the filter's base large enough for buckets of `keys` keys, where the budget allows.
    fn expect(&mut self, keys: u64) {
        if let Some(stack) = self.stack.with_base_for(keys) {
            tracing::debug!(keys, bytes = stack.bytes(), "filter base grown");
            self.stack = stack;
        }
    }

    /// Puts a bucket into the first free slot.
    fn insert(&mut self, slice: Slice, keys: u64) -> Option<Arc<Bucket>> {
        let free = self.buckets.iter().position(Option::is_none).unwrap_or(self.buckets.len());
        if free >= SLOTS {
            return None;
        }
        let slot = Slot::try_from(free).ok()?;
        let bucket = Arc::new(Bucket { slice, slot, family: slice.family(), keys: AtomicU64::new(keys) });
        match self.buckets.get_mut(free) {
            Some(place) => *place = Some(Arc::clone(&bucket)),
            None => self.buckets.push(Some(Arc::clone(&bucket))),
        }
        self.live |= 1 << slot;
        if !self.stack.covers(slot) {
            // More buckets than the filter has columns for: this one is asked on disk for as long as it lives.
            self.unfiltered |= 1 << slot;
        }
        Some(bucket)
    }
}

/// A key that the filter could not rule out: its place in the caller's batch, and what to look for where.
pub(crate) struct Probe<'a> {
    pub(crate) place: usize,
    pub(crate) digest: u64,
    pub(crate) key: &'a [u8],
    pub(crate) slots: u64,
}

/// Looks the probes up on disk, each in the buckets that may hold it, and hands what is there to `found`. The whole
/// key is compared: a digest alone never finds anything.
pub(crate) fn look_up(
    db: &Db,
    view: &View,
    probes: &[Probe<'_>],
    mut found: impl FnMut(usize, &Arc<Bucket>, Entry),
) -> Result<()> {
    let asked = probes.iter().fold(0, |slots, probe| slots | probe.slots);
    for bucket in view.of_slots(asked) {
        let here: Vec<&Probe<'_>> = probes.iter().filter(|probe| probe.slots & 1 << bucket.slot != 0).collect();
        let row_keys: Vec<Vec<u8>> = here
            .iter()
            .map(|probe| {
                let mut row = Vec::with_capacity(probe.key.len() + 8);
                row_key(probe.digest, probe.key, &mut row);
                row
            })
            .collect();
        let mut read = |at: usize, value: &[u8]| {
            let entry = read_value(value, bucket.slice.start_ms).ok_or_else(|| Error::Corrupt {
                place: format!("a row of the bucket {}", bucket.slice),
                detail: "its value is not in a format that this version writes".to_owned(),
            })?;
            let corrupt =
                |detail: String| Error::Corrupt { place: format!("a row of the bucket {}", bucket.slice), detail };
            if !bucket.slice.contains(entry.time_ms()) {
                return Err(corrupt(format!("its key has the time {}, outside the bucket", entry.time_ms())));
            }
            let probe = here.get(at).ok_or_else(|| corrupt("nobody has asked for it".to_owned()))?;
            found(probe.place, bucket, entry);
            Ok(())
        };
        match row_keys.as_slice() {
            [row] => db.get(&bucket.family, row, |value| read(0, value))?.transpose()?,
            rows => Some(db.get_many(&bucket.family, rows, read)?),
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::directory::Directory;
    use std::time::Duration;

    const SPAN: Span = Span { window_ms: 4_000, bucket_ms: 1_000 };

    fn open(dir: &tempfile::TempDir) -> (Db, Vec<String>) {
        let directory = Directory::acquire(&dir.path().join("store"), Duration::ZERO).unwrap();
        Db::open(directory, 32 << 20, Duration::ZERO, || Ok(Vec::new())).unwrap()
    }

    fn second(second: u64) -> Slice {
        Slice { start_ms: second * 1_000, width_ms: 1_000 }
    }

    /// A store of three buckets without their filters, as they are found at open.
    fn three_found(dir: &tempfile::TempDir) -> (Db, BucketSet, [Arc<Bucket>; 3]) {
        let (db, _) = open(dir);
        (0..3).for_each(|i| db.create_bucket(&second(i).family()).unwrap());
        db.close().unwrap();
        let (db, families) = open(dir);
        let set = BucketSet::open(&db, &families, SPAN, &Now::default(), 0, 1 << 20, None).unwrap();
        let buckets = [0, 1, 2].map(|i| set.ensure(&db, second(i)).unwrap());
        (db, set, buckets)
    }

    /// The seconds of the buckets that may hold a key, asked in either way.
    fn asked(set: &BucketSet, digest: u64) -> Vec<u64> {
        let view = set.view();
        let (slots, mut again) = (view.candidates(digest), [0, 0]);
        view.candidates_of(&[digest, digest], &mut again);
        assert_eq!(again, [slots; 2]);
        let mut seconds: Vec<u64> = view.of_slots(slots).map(|bucket| bucket.slice.start_ms / 1_000).collect();
        seconds.sort_unstable();
        assert_eq!(seconds.len() as u32, slots.count_ones(), "and no place where there is none");
        seconds
    }

    #[test]
    fn a_bucket_is_asked_on_disk_until_its_filter_is_there_and_by_its_filter_from_then_on() {
        let dir = tempfile::tempdir().unwrap();
        let (_db, set, buckets) = three_found(&dir);
        // Half of a filter: some keys are in it already.
        set.mark(&buckets[1], &[77]);
        assert_eq!((asked(&set, 77), asked(&set, 78)), (vec![0, 1, 2], vec![0, 1, 2]));
        set.set_filtered(&buckets[1]);
        assert_eq!((asked(&set, 77), asked(&set, 78)), (vec![0, 1, 2], vec![0, 2]));
        set.set_filtered(&buckets[0]);
        set.set_filtered(&buckets[2]);
        assert_eq!((asked(&set, 77), asked(&set, 78)), (vec![1], vec![]));
    }

    #[test]
    fn a_bucket_that_goes_takes_nothing_of_the_others_and_none_of_the_next_in_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let (db, set, [first, gone, last]) = three_found(&dir);
        set.mark(&gone, &[77]);
        set.remove(&db, &gone, &Now { time_ms: u64::MAX, ..Now::default() }, 0);
        assert_eq!(asked(&set, 77), [0, 2]);
        let next = set.ensure(&db, second(3)).unwrap();
        assert_eq!(next.slot, gone.slot);
        assert_eq!(asked(&set, 77), [0, 2], "its filter is new and empty");
        set.mark(&next, &[99]);
        // Whoever still has the old one in hand.
        set.remove(&db, &gone, &Now { time_ms: u64::MAX, ..Now::default() }, 0);
        set.moved(&gone, set.view().base().unwrap());
        assert_eq!(asked(&set, 99), [0, 2, 3]);
        set.set_filtered(&first);
        set.set_filtered(&last);
        assert_eq!(asked(&set, 99), [3]);
        let passing = set.ensure(&db, second(9)).unwrap();
        set.remove(&db, &passing, &Now { time_ms: u64::MAX, ..Now::default() }, 0);
        assert_eq!((asked(&set, 99), asked(&set, 77)), (vec![3], vec![]), "the others keep their filters");
        // A home that has gone meanwhile has nobody's keys.
        let elsewhere = tempfile::tempdir().unwrap();
        let (_db, other, _) = three_found(&elsewhere);
        set.moved(&next, other.view().base().unwrap());
        assert_eq!(asked(&set, 99), [3]);
        db.close().unwrap();
        let (db, families) = open(&dir);
        assert_eq!(families, [0, 2, 3].map(|i| second(i).family()));
        let set = BucketSet::open(&db, &families, SPAN, &Now::default(), 0, 1 << 20, None).unwrap();
        let buckets = [0, 2, 3].map(|i| set.ensure(&db, second(i)).unwrap());
        set.remove(&db, &buckets[1], &Now { time_ms: u64::MAX, ..Now::default() }, 0);
        let newer = set.ensure(&db, second(4)).unwrap();
        set.remove(&db, &newer, &Now { time_ms: u64::MAX, ..Now::default() }, 0);
        set.set_filtered(&buckets[1]);
        assert_eq!(asked(&set, 99), [0, 3], "they have no filter yet");
    }

    #[test]
    fn buckets_of_other_widths_count_for_how_many_there_may_be() {
        let dir = tempfile::tempdir().unwrap();
        let (db, _) = open(&dir);
        let others: Vec<String> = (0..13).map(|i| Slice { start_ms: i * 500, width_ms: 500 }.family()).collect();
        others.iter().for_each(|family| db.create_bucket(family).unwrap());
        let span = Span { window_ms: 48_000, bucket_ms: 1_000 };
        let open =
            |families: &[String]| BucketSet::open(&db, families, span, &Now::default(), 0, 1 << 20, None).map(|_| ());
        // 48 for the window, four around it, and the others, of which there is room for 12.
        open(&others[..12]).unwrap();
        let refused = open(&others).unwrap_err().to_string();
        assert!(refused.contains("65 would be, 13 of them"), "{refused}");
    }

    #[test]
    fn a_bucket_beyond_the_filters_columns_is_asked_on_disk() {
        let dir = tempfile::tempdir().unwrap();
        let (db, _) = open(&dir);
        let set = BucketSet::open(&db, &[], SPAN, &Now::default(), 0, 1 << 20, None).unwrap();
        // Eight columns; nobody has dropped anything yet.
        for second in 0..12 {
            let bucket = set.ensure(&db, super::tests::second(second)).unwrap();
            set.mark(&bucket, &[second * 977]);
            set.set_filtered(&bucket);
            assert_eq!(set.view().is_filtered(&bucket), second < 8, "bucket {second}");
            assert_ne!(set.view().candidates(second * 977) & 1 << bucket.slot, 0, "bucket {second}");
        }
    }

    #[test]
    fn a_bucket_that_still_counts_is_not_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let (db, set, [first, ..]) = three_found(&dir);
        // Its newest possible key is of 999.
        let (last_ms, window_ms) = (4_998, SPAN.window_ms);
        let at = |time_ms| Now { time_ms, ..Now::default() };
        set.remove(&db, &first, &at(last_ms), window_ms);
        assert!(set.view().has(&first));
        let reason = set.poison().reason().unwrap();
        assert!(reason.contains("dropped only when all its keys have run out"), "{reason}");
        assert!(reason.contains("bucket-0-1000 at 4998"), "{reason}");
        db.close().unwrap();

        let (db, families) = open(&dir);
        let set = BucketSet::open(&db, &families, SPAN, &at(last_ms + 1), 0, 1 << 20, None).unwrap();
        assert!(set.has_passed());
        set.remove_passed(&db, &|| true);
        set.poison().unbroken().unwrap();
        db.close().unwrap();
        assert_eq!(open(&dir).1.len(), 2, "what had passed at the open was dropped");
    }

    #[test]
    fn a_filter_that_misses_a_bit_poisons_the_store() {
        let dir = tempfile::tempdir().unwrap();
        let (_db, set, [first, ..]) = three_found(&dir);
        set.mark(&first, &[1, 2, 3]);
        let base = Arc::clone(set.view().base().unwrap());
        set.add_columns(&base, 0, &[(first.slot, base.column(0, first.slot).unwrap())]);
        set.move_in(&first, &base, &[4]);
        set.poison().unbroken().unwrap();
        set.add_columns(&base, 0, &[(first.slot, vec![0; 3])]);
        let said = set.poison().unbroken().unwrap_err().to_string();
        assert!(said.contains("sets all its bits (not so for keys of a filter file)"), "{said}");

        // Slot 64 is none that a layer counts for.
        let outside = Bucket { slice: second(9), slot: 64, family: "none".to_owned(), keys: AtomicU64::new(0) };
        let (_db, set, _) = three_found(&tempfile::tempdir().unwrap());
        set.move_in(&outside, &base, &[4]);
        assert!(set.poison().unbroken().is_err());
    }
}
