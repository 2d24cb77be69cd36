//! The hot table: the journal's image in memory. Exact, and locked by stripes.
//!
//! It holds every key in flight, and every completed or released key that is not yet in a bucket. A key that is neither here nor
//! in a bucket was never seen, or is forgotten. What was sealed lately stays at hand as long as memory allows: it says
//! nothing that its bucket does not say, but says it without the disk.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crossbeam::utils::CachePadded;

use super::page::{Page, Pending, Tally};
use crate::concurrency::{ArcSwap, AtomicUsize, Mutex, MutexGuard};
use crate::entry::{Entry, Processing};
use crate::invariant::{Invariant, Poison};
use crate::storage::journal::RowNumbers;

/// Many more than there are cores, so that two threads seldom want the same one. Where races are looked for they are to want it.
const STRIPES: usize = if cfg!(any(shuttle, miri)) { 2 } else { 256 };
const STRIPE_BITS: u32 = STRIPES.trailing_zeros();

/// How much the table holds.
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
                // Two's complement: adding a negative number wraps around to the difference.
                let before = count.fetch_add(change as usize, Ordering::Relaxed) as isize;
                // What is taken away was added before, under the same stripe's lock.
                if before.wrapping_add(change) < 0 {
                    below_zero(poison, before, change);
                }
            }
        }
    }
}

#[cold]
#[inline(never)]
fn below_zero(poison: &Poison, before: isize, change: isize) {
    poison.broken(Invariant::CountsNotNegative, format_args!("{before} and {change}"));
}

/// The pages of one stripe.
#[derive(Debug)]
struct Pages {
    /// What changes.
    young: Page,
    /// What is on its way to its bucket.
    sealing: Option<Arc<Page>>,
}

/// What was sealed lately, by stripe, the newest first.
type Recent = Vec<VecDeque<Arc<Page>>>;

/// Keys by digest, in stripes.
pub(crate) struct HotTable {
    stripes: Box<[CachePadded<Mutex<Pages>>]>,
    counts: Counts,
    rows: RowNumbers,
    /// Read without a lock, so that a batch's reads of memory need not wait for each other. Made anew by each seal.
    recent: ArcSwap<Recent>,
    /// The memory that it takes at least, once so much was sealed, and at most a chunk more.
    recent_bytes: usize,
    poison: Arc<Poison>,
}

impl HotTable {
    /// An empty table that keeps about `recent_bytes` of what was sealed.
    pub(crate) fn new(recent_bytes: usize) -> Self {
        let poison = Arc::<Poison>::default();
        let pages = || Pages { young: Page::of(&poison), sealing: None };
        Self {
            stripes: (0..STRIPES).map(|_| CachePadded::new(Mutex::new(pages()))).collect(),
            counts: Counts::default(),
            rows: RowNumbers::of(&poison),
            recent: ArcSwap::from_pointee(vec![VecDeque::new(); STRIPES]),
            recent_bytes,
            poison,
        }
    }

    /// What ends the store, where an invariant of the table is broken.
    pub(crate) fn poison(&self) -> &Arc<Poison> {
        &self.poison
    }

    #[inline]
    fn count(&self, tally: Tally) {
        self.counts.add(tally, &self.poison);
    }

    /// The rows that changes wait for.
    pub(crate) fn rows(&self) -> &RowNumbers {
        &self.rows
    }

    /// Locks the stripe of a digest.
    pub(crate) fn stripe(&self, digest: u64) -> Stripe<'_> {
        #[expect(clippy::indexing_slicing, reason = "as many bits as there are stripes")]
        let pages = self.stripes[stripe_of(digest)].lock();
        Stripe { pages, table: self }
    }

    /// Locks one stripe after the other.
    pub(crate) fn stripes(&self) -> impl Iterator<Item = Stripe<'_>> {
        self.stripes.iter().map(|stripe| Stripe { pages: stripe.lock(), table: self })
    }

    /// Keys that somebody works on, or whose lease has run out in this process.
    pub(crate) fn in_flight(&self) -> usize {
        self.counts.in_flight.load(Ordering::Relaxed)
    }

    /// Keys that wait for a decision because their holder is gone.
    pub(crate) fn held(&self) -> usize {
        self.counts.held.load(Ordering::Relaxed)
    }

    /// Keys that a flush moves to their buckets: completed ones, and those whose attempt has ended.
    pub(crate) fn flushable(&self) -> usize {
        self.counts.flushable.load(Ordering::Relaxed)
    }

    pub(crate) fn flushable_bytes(&self) -> usize {
        self.counts.flushable_bytes.load(Ordering::Relaxed)
    }

    /// Begins to seal the keys whose work has ended by rows below `start`, and hands them out stripe by stripe. What is in flight stays
    /// if `keep` says so. Ended by [`HotTable::publish`] and [`HotTable::retire`], or undone by [`HotTable::restore`].
    pub(super) fn split(&self, start: u64, mut keep: impl FnMut(&[u8], &Processing) -> bool) -> Vec<Arc<Page>> {
        self.stripes()
            .filter_map(|mut stripe| {
                let (sealed, tally) = stripe.pages.young.split(start, &self.rows, &mut keep);
                self.count(tally);
                sealed.flushable().next()?;
                let sealed = Arc::new(sealed);
                stripe.pages.sealing = Some(Arc::clone(&sealed));
                Some(sealed)
            })
            .collect()
    }

    /// Takes back what a seal could not finish.
    pub(super) fn restore(&self) {
        for mut stripe in self.stripes() {
            if let Some(page) = stripe.pages.sealing.take() {
                let tally = stripe.pages.young.absorb(&page);
                self.count(tally);
            }
        }
    }

    /// Puts what is being sealed at hand. Before anybody is told that it leaves the table: an older state of a key that
    /// is still at hand must not be found where the newer one has just gone.
    pub(super) fn publish(&self) {
        let mut recent = Recent::clone(&self.recent.load());
        for (stripe, recent) in self.stripes().zip(&mut recent) {
            if let Some(page) = &stripe.pages.sealing {
                recent.push_front(Arc::clone(page));
            }
        }
        let mut bytes: usize = recent.iter().flatten().map(|page| page.bytes()).sum();
        while recent.iter().any(|pages| !pages.is_empty()) {
            let oldest: usize = recent.iter().filter_map(VecDeque::back).map(|page| page.bytes()).sum();
            // As long as what is left is enough, the oldest chunk goes.
            if bytes - oldest < self.recent_bytes {
                break;
            }
            bytes -= oldest;
            recent.iter_mut().for_each(|pages| drop(pages.pop_back()));
        }
        self.recent.store(Arc::new(recent));
    }

    /// Ends a seal: from here on the buckets answer for what [`HotTable::split`] handed out.
    pub(super) fn retire(&self) {
        for mut stripe in self.stripes() {
            let sealed = stripe.pages.sealing.take();
            drop(stripe);
            if let Some(page) = sealed {
                self.count(Tally::default() - page.tally());
            }
        }
    }

    /// What was sealed lately.
    pub(super) fn recent(&self) -> RecentKeys {
        RecentKeys(self.recent.load_full())
    }

    /// Breaks an invariant: the index of a digest's stripe keeps its entries, and the slots are gone.
    #[cfg(test)]
    pub(crate) fn lose_slots(&self, digest: u64) {
        self.stripe(digest).pages.young.lose_slots();
    }

    /// Lets go of what is at hand of a key's bucket, where the bucket has changed.
    pub(crate) fn forget_recent(&self, digest: u64) {
        self.recent.rcu(|recent| {
            let mut recent = Recent::clone(recent);
            if let Some(pages) = recent.get_mut(stripe_of(digest)) {
                pages.clear();
            }
            recent
        });
    }
}

/// The top bits of a digest, so that one stripe after the other comes in the order of a run.
fn stripe_of(digest: u64) -> usize {
    (digest >> (u64::BITS - STRIPE_BITS)) as usize
}

/// What was sealed lately, as of one moment.
pub(super) struct RecentKeys(Arc<Recent>);

impl RecentKeys {
    /// What a bucket holds of a key, where it came there lately.
    pub(super) fn get(&self, digest: u64, key: &[u8]) -> Option<Entry> {
        self.0.get(stripe_of(digest))?.iter().find_map(|page| page.get_flushed(digest, key))
    }
}

/// A locked stripe.
pub(crate) struct Stripe<'a> {
    pages: MutexGuard<'a, Pages>,
    table: &'a HotTable,
}

impl Stripe<'_> {
    /// What is known of a key that is in no bucket, or not yet known to be.
    pub(crate) fn get(&self, digest: u64, key: &[u8]) -> Option<Entry> {
        let rows = &self.table.rows;
        let pages = &*self.pages;
        // The newer first: a key may have run out, and been claimed again.
        pages.young.get(digest, key, rows).or_else(|| pages.sealing.as_ref()?.get(digest, key, rows))
    }

    /// Puts an entry in the place of whatever was there.
    pub(crate) fn set(&mut self, digest: u64, key: &[u8], entry: Entry<&[u8]>) {
        let tally = self.pages.young.set(digest, key, entry);
        self.table.count(tally);
    }

    /// As [`Stripe::set`], from the moment on at which a row is written.
    pub(crate) fn settle(&mut self, digest: u64, key: &[u8], entry: Entry<&[u8]>, pending: Pending) {
        let tally = self.pages.young.settle(digest, key, entry, pending);
        self.table.count(tally);
    }

    /// Removes a key. Not while a seal is under way.
    pub(crate) fn remove(&mut self, digest: u64, key: &[u8]) {
        let tally = self.pages.young.remove(digest, key);
        self.table.count(tally);
    }

    /// Visits the keys in flight.
    pub(crate) fn in_flight(&self) -> impl Iterator<Item = (u64, &[u8], Processing)> {
        self.pages.young.in_flight(&self.table.rows)
    }

    /// Removes every key for which `keep` says false, of those that can change.
    pub(crate) fn retain(&mut self, keep: impl FnMut(&Entry) -> bool) {
        let tally = self.pages.young.retain(&self.table.rows, keep);
        self.table.count(tally);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;
    use crate::entry::{Done, Holder, Kept};
    use crate::filter::layer::{Columns, Layer};

    const RECENT_BYTES: usize = 1 << 20;

    fn processing(token: u64) -> Entry<&'static [u8]> {
        let holder = Holder::Leased { until_monotonic_ms: 1 };
        Entry::Processing(Processing { token, attempt: 3, since_ms: 0, fingerprint: Some([7; 16]), holder })
    }

    fn completed(token: u64) -> Entry<&'static [u8]> {
        Entry::Completed(Done { token, completed_ms: 0, fingerprint: None, result: Kept::Stored(b"r") })
    }

    fn result(table: &HotTable, digest: u64, key: &[u8]) -> Option<Done> {
        match table.stripe(digest).get(digest, key) {
            Some(Entry::Completed(done)) => Some(done),
            _ => None,
        }
    }

    /// A table of keys `0..count`, of which the even ones are completed.
    fn table(count: u64) -> HotTable {
        let table = HotTable::new(4 * RECENT_BYTES);
        for i in 0..count {
            let digest = i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            table.stripe(digest).set(digest, &i.to_le_bytes(), processing(i));
            if i % 2 == 0 {
                table.stripe(digest).set(digest, &i.to_le_bytes(), completed(i));
            }
        }
        table
    }

    fn each(count: u64) -> impl Iterator<Item = (u64, u64, [u8; 8])> {
        (0..count).map(|i| (i, i.wrapping_mul(0x9e37_79b9_7f4a_7c15), i.to_le_bytes()))
    }

    #[test]
    fn keys_with_one_digest_are_told_apart_by_their_bytes() {
        let table = HotTable::new(RECENT_BYTES);
        table.stripe(5).set(5, b"a", processing(1));
        table.stripe(5).set(5, b"b", completed(2));
        assert_eq!(table.stripe(5).get(5, b"a").as_ref().map(Entry::token), Some(1));
        assert_eq!(table.stripe(5).get(5, b"b").as_ref().map(Entry::token), Some(2));
        assert!(table.stripe(5).get(5, b"c").is_none());
        assert_eq!((table.in_flight(), table.flushable()), (1, 1));
    }

    #[test]
    fn the_counts_follow_every_change() {
        let table = table(1_000);
        assert_eq!((table.in_flight(), table.flushable()), (500, 500));
        assert_eq!(table.flushable_bytes(), 500 * (8 + 1 + crate::state::page::OVERHEAD_BYTES));
        for mut stripe in table.stripes() {
            stripe.retain(|entry| matches!(entry, Entry::Processing(_)));
        }
        let (_, digest, key) = each(1_000).last().unwrap();
        table.stripe(digest).remove(digest, &key);
        assert_eq!((table.in_flight(), table.flushable(), table.flushable_bytes()), (499, 0, 0));
        assert_eq!(table.stripes().map(|stripe| stripe.in_flight().count()).sum::<usize>(), 499);
    }

    #[test]
    fn a_completion_counts_from_the_moment_on_at_which_its_row_is_written() {
        let table = HotTable::new(RECENT_BYTES);
        table.stripe(5).set(5, b"k", processing(1));
        let row = table.rows().begin(|| 9);
        table.stripe(5).settle(5, b"k", completed(1), Pending { row, attempt: 3, holder: Holder::Settling });
        let Some(Entry::Processing(before)) = table.stripe(5).get(5, b"k") else { panic!("its row is open") };
        assert_eq!((before.token, before.attempt, before.holder), (1, 3, Holder::Settling));
        table.rows().finish(row);
        assert_eq!(result(&table, 5, b"k").unwrap().token, 1);
    }

    #[test]
    fn what_a_seal_takes_is_found_until_it_ends_and_what_it_leaves_stays() {
        let table = table(10_000);
        let open = table.rows().begin(|| 7);
        let (digest, key) = (1 << 40, b"behind the cut");
        table.stripe(digest).settle(
            digest,
            key,
            completed(20_000),
            Pending { row: open, attempt: 2, holder: Holder::Recording },
        );
        let mut kept = Vec::new();
        let pages = table.split(7, |key, processing| {
            kept.push((key.to_vec(), processing.holder));
            processing.token != 1
        });
        assert_eq!(kept.len(), 5_001, "asked about every key in flight");
        assert!(kept.contains(&(key.to_vec(), Holder::Recording)), "and about one that is being recorded");
        assert_eq!(pages.iter().flat_map(|page| page.flushable()).count(), 5_000);
        assert_eq!((table.in_flight(), table.flushable()), (4_999, 5_001));
        for (i, digest, key) in each(10_000) {
            let stored = table.stripe(digest).get(digest, &key);
            assert_eq!(stored.map(|entry| entry.token()), (i != 1).then_some(i));
            assert!(table.recent().get(digest, &key).is_none());
        }
        table.rows().finish(open);
        table.publish();
        for (i, digest, key) in each(10_000) {
            assert_eq!(table.stripe(digest).get(digest, &key).is_some(), i != 1, "in both places, or in one");
        }
        table.retire();
        assert_eq!((table.in_flight(), table.flushable()), (4_999, 1));
        assert_eq!(result(&table, digest, key).unwrap().token, 20_000);
        for (i, digest, key) in each(10_000) {
            assert_eq!(table.stripe(digest).get(digest, &key).is_some(), i % 2 == 1 && i != 1);
            assert_eq!(table.recent().get(digest, &key).is_some(), i % 2 == 0, "at hand for now");
        }
    }

    #[test]
    fn what_is_at_hand_of_the_buckets_goes_when_it_is_too_much_the_oldest_first() {
        let table = HotTable::new(RECENT_BYTES);
        for chunk in 0..20_u64 {
            for i in chunk * 1_000..(chunk + 1) * 1_000 {
                let digest = i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                table.stripe(digest).set(digest, &i.to_le_bytes(), completed(i));
            }
            table.split(u64::MAX, |_, _| true);
            table.publish();
            table.retire();
            // A seal that finds nothing must not stand in the way.
            table.split(u64::MAX, |_, _| true);
            table.publish();
            table.retire();
        }
        let recent = |i: u64| {
            let digest = i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            table.recent().get(digest, &i.to_le_bytes()).is_some()
        };
        assert!((0..1_000).all(|i| !recent(i)));
        assert!((19_000..20_000).all(recent));
        let at_hand = (0..20_000).filter(|i| recent(*i)).count();
        assert!((5_000..10_000).contains(&at_hand), "{at_hand} keys in {RECENT_BYTES} bytes");
    }

    #[test]
    fn what_a_failed_seal_left_behind_is_taken_back() {
        let table = table(1_000);
        table.split(u64::MAX, |_, _| true);
        table.restore();
        let (i, digest, key) = each(1_000).nth(500).unwrap();
        assert_eq!(result(&table, digest, &key).unwrap().token, i);
        table.stripe(digest).remove(digest, &key);
        assert!(table.stripe(digest).get(digest, &key).is_none());
        assert_eq!((table.in_flight(), table.flushable()), (500, 499));
        let pages = table.split(u64::MAX, |_, _| true);
        let sealed = pages.iter().flat_map(|page| page.flushable()).count();
        assert_eq!(sealed, 499, "the rest is sealed by the next");
    }

    #[test]
    fn what_a_failed_seal_left_behind_does_not_come_back_over_what_is_newer() {
        let table = HotTable::new(RECENT_BYTES);
        for key in [b"a", b"b", b"c"] {
            table.stripe(5).set(5, key, completed(1));
        }
        table.split(u64::MAX, |_, _| true);
        table.stripe(5).set(5, b"b", processing(2));
        table.stripe(5).set(5, b"c", completed(3));
        assert_eq!((table.in_flight(), table.flushable()), (1, 4), "the older are on their way");
        table.restore();
        assert_eq!((table.in_flight(), table.flushable()), (1, 2));
        assert_eq!(table.flushable_bytes(), 2 * (1 + 1 + crate::state::page::OVERHEAD_BYTES));
        let tokens = [b"a", b"b", b"c"].map(|key| table.stripe(5).get(5, key).unwrap().token());
        assert_eq!(tokens, [1, 2, 3]);
    }

    #[test]
    fn the_newer_state_is_at_hand_before_it_leaves_the_table() {
        let table = HotTable::new(RECENT_BYTES);
        for token in [1, 2] {
            table.stripe(5).set(5, b"k", completed(token));
            table.split(u64::MAX, |_, _| true);
            table.publish();
            assert_eq!(table.recent().get(5, b"k").unwrap().token(), token);
            assert_eq!(result(&table, 5, b"k").unwrap().token, token, "and still in the table");
            table.retire();
        }
    }

    /// As `Engine::decide` and a seal do it, with the filter in the place of the disk.
    #[test]
    fn whoever_looks_for_a_completed_key_finds_it_while_seals_move_it() {
        const KEYS: u64 = if cfg!(miri) { 8 } else { 2_000 };
        let (table, filter) = (HotTable::new(0), Layer::new(Columns::All(2), KEYS));
        let (completed_below, seals) = (AtomicU64::new(0), AtomicU64::new(0));
        let look = |digest: u64, key: &[u8]| {
            loop {
                let before = seals.load(Ordering::Acquire);
                let mut slots = [0];
                filter.slots_of(&[digest], &mut slots);
                let stripe = table.stripe(digest);
                let hot = stripe.get(digest, key);
                if hot.is_some() || seals.load(Ordering::Acquire) == before {
                    return hot.is_some() || slots != [0];
                }
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for (i, digest, key) in each(KEYS) {
                    table.stripe(digest).set(digest, &key, completed(i));
                    completed_below.store(i + 1, Ordering::Release);
                    table.split(u64::MAX, |_, _| true);
                    assert!(filter.insert(1, [digest]));
                    table.publish();
                    seals.fetch_add(1, Ordering::AcqRel);
                    table.retire();
                }
            });
            for _ in 0..2 {
                scope.spawn(|| {
                    while let below = completed_below.load(Ordering::Acquire)
                        && below < KEYS
                    {
                        if let Some((i, digest, key)) = each(below).last() {
                            assert!(look(digest, &key), "key {i} is nowhere");
                        }
                    }
                });
            }
        });
        assert!(each(KEYS).all(|(_, digest, key)| look(digest, &key)));
    }

    #[test]
    fn large_results_count_for_what_is_at_hand() {
        let table = HotTable::new(RECENT_BYTES);
        let bytes = vec![b'x'; 100_000];
        for token in 1..100_u64 {
            let done = Done { token, completed_ms: 5, fingerprint: None, result: Kept::Stored(bytes.as_slice()) };
            table.stripe(token).set(token, b"k", Entry::Completed(done));
            table.split(u64::MAX, |_, _| true);
            table.publish();
            table.retire();
        }
        let at_hand = (1..100).filter(|token| table.recent().get(*token, b"k").is_some()).count();
        assert!((10..=12).contains(&at_hand), "{at_hand} results of 100,000 bytes in {RECENT_BYTES}");
    }

    #[test]
    fn large_results_and_fingerprints_come_back() {
        let table = HotTable::new(RECENT_BYTES);
        for len in [0, 1, 1_024, 1_025, 100_000] {
            let bytes = vec![b'x'; len];
            let result = Kept::Stored(bytes.as_slice());
            let done = Done { token: 1, completed_ms: 5, fingerprint: Some([9; 16]), result };
            table.stripe(len as u64).set(len as u64, b"k", Entry::Completed(done));
            let stored = super::tests::result(&table, len as u64, b"k").unwrap();
            assert_eq!(stored.borrowed(), done_of(&bytes));
        }
        fn done_of(bytes: &[u8]) -> Done<&[u8]> {
            Done { token: 1, completed_ms: 5, fingerprint: Some([9; 16]), result: Kept::Stored(bytes) }
        }
    }

    #[test]
    fn a_count_below_zero_breaks_an_invariant() {
        let table = HotTable::new(0);
        table.stripe(5).set(5, b"a", processing(1));
        table.counts.in_flight.store(0, Ordering::Relaxed);
        table.poison.unbroken().unwrap();
        table.stripe(5).remove(5, b"a");
        let said = table.poison.unbroken().unwrap_err().to_string();
        assert!(said.contains("counts of the hot table are never negative"), "{said}");
    }
}
