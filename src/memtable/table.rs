//! The memtable: all shards, and the steps of a flush as readers see them.
//!
//! It has every key in progress, and every completed or released key that is not in a bucket yet. A key that is in neither is
//! new, or forgotten.
//!
//! Order of a flush: [`MemTable::freeze`], write the buckets, [`MemTable::publish`], increment the flush generation,
//! [`MemTable::retire`]. So a key is readable here until it is readable in its bucket. With another order a reader could miss a
//! completed key in both places, and its work would be repeated.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crossbeam::utils::CachePadded;

use super::arena::ShardArena;
use super::recent::{RecentCache, RecentSnapshot};
use super::shard::{Arenas, SHARDS, shard_of};
use super::slot::{Pending, Tally};
use crate::invariant::{Invariant, Poison};
use crate::journal::numbers::RecordNumbers;
use crate::testing::sync_shim::{AtomicUsize, Mutex, MutexGuard};
use onlyonce_core::machine::{Entry, Processing};

/// The counts of all shards.
#[derive(Debug, Default)]
struct Counts {
    in_flight: AtomicUsize,
    held: AtomicUsize,
    flushable: AtomicUsize,
    flushable_bytes: AtomicUsize,
}

impl Counts {
    #[inline]
    fn add(&self, tally: Tally, poison: &Poison) {
        for (count, change) in [
            (&self.in_flight, tally.in_flight),
            (&self.held, tally.held),
            (&self.flushable, tally.flushable),
            (&self.flushable_bytes, tally.flushable_bytes),
        ] {
            if change != 0 {
                // Two's complement: adding a negative number as `usize` wraps to the difference.
                let before = count.fetch_add(change as usize, Ordering::Relaxed) as isize;
                // Each decrement follows its increment, under the lock of the same shard.
                if before.wrapping_add(change) < 0 {
                    report_negative_count(poison, before, change);
                }
            }
        }
    }
}

#[cold]
#[inline(never)]
fn report_negative_count(poison: &Poison, before: isize, change: isize) {
    poison.broken(Invariant::CountsNotNegative, format_args!("{before} changed by {change}"));
}

/// Keys in memory, in shards by digest.
pub(crate) struct MemTable {
    shards: Box<[CachePadded<Mutex<Arenas>>]>,
    counts: Counts,
    records: RecordNumbers,
    recent: RecentCache,
    poison: Arc<Poison>,
}

impl MemTable {
    /// An empty memtable whose recent cache has about `recent_bytes`.
    pub(crate) fn new(recent_bytes: usize) -> Self {
        let poison = Arc::<Poison>::default();
        let arenas = || Arenas { active: ShardArena::of(&poison), frozen: None };
        Self {
            shards: (0..SHARDS).map(|_| CachePadded::new(Mutex::new(arenas()))).collect(),
            counts: Counts::default(),
            records: RecordNumbers::of(&poison),
            recent: RecentCache::new(recent_bytes),
            poison,
        }
    }

    /// Set if an invariant of the memtable is broken.
    pub(crate) fn poison(&self) -> &Arc<Poison> {
        &self.poison
    }

    #[inline]
    fn count(&self, tally: Tally) {
        self.counts.add(tally, &self.poison);
    }

    /// The journal's records: an entry is visible once its record is finished.
    pub(crate) fn records(&self) -> &RecordNumbers {
        &self.records
    }

    /// Locks the shard of a digest.
    pub(crate) fn shard(&self, digest: u64) -> Shard<'_> {
        #[expect(clippy::indexing_slicing, reason = "as many bits as there are shards")]
        let arenas = self.shards[shard_of(digest)].lock();
        Shard { arenas, table: self }
    }

    /// Locks the shards one after the other.
    pub(crate) fn shards(&self) -> impl Iterator<Item = Shard<'_>> {
        self.shards.iter().map(|shard| Shard { arenas: shard.lock(), table: self })
    }

    /// Keys that are leased or committing, including those whose lease has expired in this process.
    pub(crate) fn in_flight(&self) -> usize {
        self.counts.in_flight.load(Ordering::Relaxed)
    }

    /// Keys that are held for resolution.
    pub(crate) fn held(&self) -> usize {
        self.counts.held.load(Ordering::Relaxed)
    }

    /// Keys that a flush moves to their buckets: completed keys, and those whose attempt was released.
    pub(crate) fn flushable(&self) -> usize {
        self.counts.flushable.load(Ordering::Relaxed)
    }

    pub(crate) fn flushable_bytes(&self) -> usize {
        self.counts.flushable_bytes.load(Ordering::Relaxed)
    }

    /// Starts a flush: freezes each shard's flushable keys whose records are below `start`, and returns the frozen arenas in
    /// the order of the shards. Keys in progress stay if `keep` returns true. [`MemTable::publish`] and [`MemTable::retire`]
    /// end the flush, [`MemTable::restore`] undoes it.
    pub(crate) fn freeze(&self, start: u64, mut keep: impl FnMut(&[u8], &Processing) -> bool) -> Vec<Arc<ShardArena>> {
        self.shards()
            .filter_map(|mut shard| {
                let (frozen, tally) = shard.arenas.active.freeze(start, &self.records, &mut keep);
                self.count(tally);
                frozen.flushable().next()?;
                let frozen = Arc::new(frozen);
                shard.arenas.frozen = Some(Arc::clone(&frozen));
                Some(frozen)
            })
            .collect()
    }

    /// Undoes a flush that failed: moves the frozen keys back to the active arenas.
    pub(crate) fn restore(&self) {
        for mut shard in self.shards() {
            if let Some(arena) = shard.arenas.frozen.take() {
                let tally = shard.arenas.active.absorb(&arena);
                self.count(tally);
            }
        }
    }

    /// Publishes the frozen arenas to the recent cache. Call it before the flush generation is incremented: otherwise a reader
    /// could find an older entry of a key in the cache after the newer one was removed from the memtable.
    pub(crate) fn publish(&self) {
        self.recent.publish(self.shards().map(|shard| shard.arenas.frozen.clone()));
    }

    /// Ends a flush: removes the frozen keys, for which the buckets answer from now on.
    pub(crate) fn retire(&self) {
        for mut shard in self.shards() {
            let frozen = shard.arenas.frozen.take();
            drop(shard);
            if let Some(arena) = frozen {
                self.count(Tally::default() - arena.tally());
            }
        }
    }

    /// A snapshot of the recent cache.
    pub(crate) fn recent(&self) -> RecentSnapshot {
        self.recent.snapshot()
    }

    /// Breaks an invariant: removes the slots of a digest's shard and leaves its index.
    #[cfg(test)]
    pub(crate) fn lose_slots(&self, digest: u64) {
        self.shard(digest).arenas.active.lose_slots();
    }

    /// Invalidates the recent cache for a digest's shard, after a key was deleted from its bucket.
    pub(crate) fn invalidate_recent(&self, digest: u64) {
        self.recent.invalidate(digest);
    }
}

/// A locked shard.
pub(crate) struct Shard<'a> {
    arenas: MutexGuard<'a, Arenas>,
    table: &'a MemTable,
}

impl Shard<'_> {
    /// The entry of a key that is in no bucket, or is being flushed to one.
    pub(crate) fn get(&self, digest: u64, key: &[u8]) -> Option<Entry> {
        let records = &self.table.records;
        let arenas = &*self.arenas;
        // The active arena first: a frozen key may have expired and been claimed again.
        arenas.active.get(digest, key, records).or_else(|| arenas.frozen.as_ref()?.get(digest, key, records))
    }

    /// Replaces the entry of a key.
    pub(crate) fn set(&mut self, digest: u64, key: &[u8], entry: Entry<&[u8]>) {
        let tally = self.arenas.active.set(digest, key, entry);
        self.table.count(tally);
    }

    /// As [`Shard::set`], visible once a record is written.
    pub(crate) fn set_pending(&mut self, digest: u64, key: &[u8], entry: Entry<&[u8]>, pending: Pending) {
        let tally = self.arenas.active.set_pending(digest, key, entry, pending);
        self.table.count(tally);
    }

    /// Removes a key. Not during a flush: the frozen arena would still have it.
    pub(crate) fn remove(&mut self, digest: u64, key: &[u8]) {
        let tally = self.arenas.active.remove(digest, key);
        self.table.count(tally);
    }

    /// Iterates over the keys in progress.
    pub(crate) fn in_flight(&self) -> impl Iterator<Item = (u64, &[u8], Processing)> {
        self.arenas.active.in_flight(&self.table.records)
    }

    /// Removes each key of the active arena for which `keep` returns false.
    pub(crate) fn retain(&mut self, keep: impl FnMut(&Entry) -> bool) {
        let tally = self.arenas.active.retain(&self.table.records, keep);
        self.table.count(tally);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;
    use crate::filter::matrix::{Columns, FilterMatrix};
    use onlyonce_core::StoredResult;
    use onlyonce_core::machine::{CompletedEntry, Holder, OwnWindow};

    const RECENT_BYTES: usize = 1 << 20;

    fn processing(token: u64) -> Entry<&'static [u8]> {
        let holder = Holder::Leased { until_monotonic_ms: 1 };
        Entry::Processing(Processing {
            token,
            attempt: 3,
            since_ms: 0,
            own_window: OwnWindow::NONE,
            fingerprint: Some([7; 16]),
            holder,
        })
    }

    fn completed(token: u64) -> Entry<&'static [u8]> {
        Entry::Completed(CompletedEntry {
            token,
            completed_ms: 0,
            own_window: OwnWindow::NONE,
            fingerprint: None,
            result: StoredResult::Bytes(b"r"),
        })
    }

    fn result(table: &MemTable, digest: u64, key: &[u8]) -> Option<CompletedEntry> {
        match table.shard(digest).get(digest, key) {
            Some(Entry::Completed(done)) => Some(done),
            _ => None,
        }
    }

    /// A table of keys `0..count`, of which the even ones are completed.
    fn table(count: u64) -> MemTable {
        let table = MemTable::new(4 * RECENT_BYTES);
        for i in 0..count {
            let digest = i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            table.shard(digest).set(digest, &i.to_le_bytes(), processing(i));
            if i % 2 == 0 {
                table.shard(digest).set(digest, &i.to_le_bytes(), completed(i));
            }
        }
        table
    }

    fn each(count: u64) -> impl Iterator<Item = (u64, u64, [u8; 8])> {
        (0..count).map(|i| (i, i.wrapping_mul(0x9e37_79b9_7f4a_7c15), i.to_le_bytes()))
    }

    #[test]
    fn keys_with_the_same_digest_are_distinguished_by_their_bytes() {
        let table = MemTable::new(RECENT_BYTES);
        table.shard(5).set(5, b"a", processing(1));
        table.shard(5).set(5, b"b", completed(2));
        assert_eq!(table.shard(5).get(5, b"a").as_ref().map(Entry::token), Some(1));
        assert_eq!(table.shard(5).get(5, b"b").as_ref().map(Entry::token), Some(2));
        assert!(table.shard(5).get(5, b"c").is_none());
        assert_eq!((table.in_flight(), table.flushable()), (1, 1));
    }

    #[test]
    fn the_counts_follow_every_change() {
        let table = table(1_000);
        assert_eq!((table.in_flight(), table.flushable()), (500, 500));
        assert_eq!(table.flushable_bytes(), 500 * (8 + 1 + crate::memtable::slot::OVERHEAD_BYTES));
        for mut shard in table.shards() {
            shard.retain(|entry| matches!(entry, Entry::Processing(_)));
        }
        let (_, digest, key) = each(1_000).last().unwrap();
        table.shard(digest).remove(digest, &key);
        assert_eq!((table.in_flight(), table.flushable(), table.flushable_bytes()), (499, 0, 0));
        assert_eq!(table.shards().map(|shard| shard.in_flight().count()).sum::<usize>(), 499);
    }

    #[test]
    fn a_completion_is_visible_once_its_record_is_written() {
        let table = MemTable::new(RECENT_BYTES);
        table.shard(5).set(5, b"k", processing(1));
        let record = table.records().begin(|| 9);
        table.shard(5).set_pending(5, b"k", completed(1), Pending { record, attempt: 3, holder: Holder::Committing });
        let Some(Entry::Processing(before)) = table.shard(5).get(5, b"k") else { panic!("its record is open") };
        assert_eq!((before.token, before.attempt, before.holder), (1, 3, Holder::Committing));
        table.records().finish(record);
        assert_eq!(result(&table, 5, b"k").unwrap().token, 1);
    }

    #[test]
    fn frozen_keys_are_readable_until_the_flush_ends_and_other_keys_stay() {
        let table = table(10_000);
        let open = table.records().begin(|| 7);
        let (digest, key) = (1 << 40, b"after the start");
        table.shard(digest).set_pending(
            digest,
            key,
            completed(20_000),
            Pending { record: open, attempt: 2, holder: Holder::CommittingUnclaimed },
        );
        let mut visited = Vec::new();
        let arenas = table.freeze(7, |key, processing| {
            visited.push((key.to_vec(), processing.holder));
            processing.token != 1
        });
        assert_eq!(visited.len(), 5_001, "every key in progress");
        assert!(visited.contains(&(key.to_vec(), Holder::CommittingUnclaimed)), "including one that is being recorded");
        assert_eq!(arenas.iter().flat_map(|arena| arena.flushable()).count(), 5_000);
        assert_eq!((table.in_flight(), table.flushable()), (4_999, 5_001));
        for (i, digest, key) in each(10_000) {
            let stored = table.shard(digest).get(digest, &key);
            assert_eq!(stored.map(|entry| entry.token()), (i != 1).then_some(i));
            assert!(table.recent().get(digest, &key).is_none());
        }
        table.records().finish(open);
        table.publish();
        for (i, digest, key) in each(10_000) {
            assert_eq!(
                table.shard(digest).get(digest, &key).is_some(),
                i != 1,
                "in the memtable, whether cached or not"
            );
        }
        table.retire();
        assert_eq!((table.in_flight(), table.flushable()), (4_999, 1));
        assert_eq!(result(&table, digest, key).unwrap().token, 20_000);
        for (i, digest, key) in each(10_000) {
            assert_eq!(table.shard(digest).get(digest, &key).is_some(), i % 2 == 1 && i != 1);
            assert_eq!(table.recent().get(digest, &key).is_some(), i % 2 == 0, "flushed keys are cached");
        }
    }

    #[test]
    fn a_flush_passes_on_the_claim_of_a_key_that_is_completed_after_its_start() {
        let table = MemTable::new(RECENT_BYTES);
        table.shard(5).set(5, b"claimed", processing(1));
        for (key, holder) in [(&b"claimed"[..], Holder::Committing), (b"recorded", Holder::CommittingUnclaimed)] {
            let record = table.records().begin(|| if key == b"claimed" { 7 } else { 8 });
            table.shard(5).set_pending(5, key, completed(1), Pending { record, attempt: 3, holder });
            table.records().finish(record);
        }
        let mut visited = Vec::new();
        let arenas = table.freeze(7, |key, processing| {
            visited.push((key.to_vec(), processing.clone()));
            true
        });
        assert!(arenas.is_empty(), "the records are not below the start");
        let [(key, claim)] = &visited[..] else { panic!("{visited:?}") };
        assert_eq!(
            (key.as_slice(), claim.token, claim.attempt, claim.holder),
            (&b"claimed"[..], 1, 3, Holder::Committing)
        );
        assert_eq!(result(&table, 5, b"claimed").unwrap().token, 1, "it stays completed");
    }

    #[test]
    fn the_recent_cache_evicts_the_oldest_flush_first() {
        let table = MemTable::new(RECENT_BYTES);
        for frozen_set in 0..20_u64 {
            for i in frozen_set * 1_000..(frozen_set + 1) * 1_000 {
                let digest = i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                table.shard(digest).set(digest, &i.to_le_bytes(), completed(i));
            }
            table.freeze(u64::MAX, |_, _| true);
            table.publish();
            table.retire();
            // A flush of nothing must not evict anything.
            table.freeze(u64::MAX, |_, _| true);
            table.publish();
            table.retire();
        }
        let recent = |i: u64| {
            let digest = i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            table.recent().get(digest, &i.to_le_bytes()).is_some()
        };
        assert!((0..1_000).all(|i| !recent(i)));
        assert!((19_000..20_000).all(recent));
        let cached = (0..20_000).filter(|i| recent(*i)).count();
        assert!((5_000..10_000).contains(&cached), "{cached} keys in {RECENT_BYTES} bytes");
    }

    #[test]
    fn a_failed_flush_restores_its_keys() {
        let table = table(1_000);
        table.freeze(u64::MAX, |_, _| true);
        table.restore();
        let (i, digest, key) = each(1_000).nth(500).unwrap();
        assert_eq!(result(&table, digest, &key).unwrap().token, i);
        table.shard(digest).remove(digest, &key);
        assert!(table.shard(digest).get(digest, &key).is_none());
        assert_eq!((table.in_flight(), table.flushable()), (500, 499));
        let arenas = table.freeze(u64::MAX, |_, _| true);
        let frozen = arenas.iter().flat_map(|arena| arena.flushable()).count();
        assert_eq!(frozen, 499, "the next flush moves the rest");
    }

    #[test]
    fn a_failed_flush_does_not_restore_over_newer_entries() {
        let table = MemTable::new(RECENT_BYTES);
        for key in [b"a", b"b", b"c"] {
            table.shard(5).set(5, key, completed(1));
        }
        table.freeze(u64::MAX, |_, _| true);
        table.shard(5).set(5, b"b", processing(2));
        table.shard(5).set(5, b"c", completed(3));
        assert_eq!((table.in_flight(), table.flushable()), (1, 4), "the older entries are frozen");
        table.restore();
        assert_eq!((table.in_flight(), table.flushable()), (1, 2));
        assert_eq!(table.flushable_bytes(), 2 * (1 + 1 + crate::memtable::slot::OVERHEAD_BYTES));
        let tokens = [b"a", b"b", b"c"].map(|key| table.shard(5).get(5, key).unwrap().token());
        assert_eq!(tokens, [1, 2, 3]);
    }

    #[test]
    fn a_newer_entry_is_cached_before_the_memtable_drops_it() {
        let table = MemTable::new(RECENT_BYTES);
        for token in [1, 2] {
            table.shard(5).set(5, b"k", completed(token));
            table.freeze(u64::MAX, |_, _| true);
            table.publish();
            assert_eq!(table.recent().get(5, b"k").unwrap().token(), token);
            assert_eq!(result(&table, 5, b"k").unwrap().token, token, "and still in the memtable");
            table.retire();
        }
    }

    /// The same order as `Engine::with_locked_key` and a flush, with the filter in place of the disk.
    #[test]
    fn a_completed_key_is_found_while_flushes_move_it() {
        const KEYS: u64 = if cfg!(miri) { 8 } else { 2_000 };
        let (table, filter) = (MemTable::new(0), FilterMatrix::new(Columns::All(2), KEYS));
        let (completed_below, generation) = (AtomicU64::new(0), AtomicU64::new(0));
        let is_found = |digest: u64, key: &[u8]| {
            loop {
                let before = generation.load(Ordering::Acquire);
                let mut column_bits = [0];
                filter.column_bits_of(&[digest], &mut column_bits);
                let shard = table.shard(digest);
                let in_memory = shard.get(digest, key);
                if in_memory.is_some() || generation.load(Ordering::Acquire) == before {
                    return in_memory.is_some() || column_bits != [0];
                }
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for (i, digest, key) in each(KEYS) {
                    table.shard(digest).set(digest, &key, completed(i));
                    completed_below.store(i + 1, Ordering::Release);
                    table.freeze(u64::MAX, |_, _| true);
                    assert!(filter.insert(1, [digest]));
                    table.publish();
                    generation.fetch_add(1, Ordering::AcqRel);
                    table.retire();
                }
            });
            for _ in 0..2 {
                scope.spawn(|| {
                    while let below = completed_below.load(Ordering::Acquire)
                        && below < KEYS
                    {
                        if let Some((i, digest, key)) = each(below).last() {
                            assert!(is_found(digest, &key), "key {i} is in neither place");
                        }
                    }
                });
            }
        });
        assert!(each(KEYS).all(|(_, digest, key)| is_found(digest, &key)));
    }

    #[test]
    fn large_results_count_towards_the_recent_cache() {
        let table = MemTable::new(RECENT_BYTES);
        let bytes = vec![b'x'; 100_000];
        for token in 1..100_u64 {
            let done = CompletedEntry {
                token,
                completed_ms: 5,
                own_window: OwnWindow::NONE,
                fingerprint: None,
                result: StoredResult::Bytes(bytes.as_slice()),
            };
            table.shard(token).set(token, b"k", Entry::Completed(done));
            table.freeze(u64::MAX, |_, _| true);
            table.publish();
            table.retire();
        }
        let cached = (1..100).filter(|token| table.recent().get(*token, b"k").is_some()).count();
        assert!((10..=12).contains(&cached), "{cached} results of 100,000 bytes in {RECENT_BYTES}");
    }

    #[test]
    fn large_results_and_fingerprints_are_stored_and_returned() {
        let table = MemTable::new(RECENT_BYTES);
        for len in [0, 1, 1_024, 1_025, 100_000] {
            let bytes = vec![b'x'; len];
            let result = StoredResult::Bytes(bytes.as_slice());
            let done = CompletedEntry {
                token: 1,
                completed_ms: 5,
                own_window: OwnWindow::NONE,
                fingerprint: Some([9; 16]),
                result,
            };
            table.shard(len as u64).set(len as u64, b"k", Entry::Completed(done));
            let stored = super::tests::result(&table, len as u64, b"k").unwrap();
            assert_eq!(stored.borrowed(), done_of(&bytes));
        }
        fn done_of(bytes: &[u8]) -> CompletedEntry<&[u8]> {
            CompletedEntry {
                token: 1,
                completed_ms: 5,
                own_window: OwnWindow::NONE,
                fingerprint: Some([9; 16]),
                result: StoredResult::Bytes(bytes),
            }
        }
    }

    #[test]
    fn a_count_below_zero_breaks_an_invariant() {
        let table = MemTable::new(0);
        table.shard(5).set(5, b"a", processing(1));
        table.counts.in_flight.store(0, Ordering::Relaxed);
        table.poison.unbroken().unwrap();
        table.shard(5).remove(5, b"a");
        let message = table.poison.unbroken().unwrap_err().to_string();
        assert!(message.contains(Invariant::CountsNotNegative.text()), "{message}");
    }
}
