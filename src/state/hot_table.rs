//! The hot table: the journal's image in memory. Exact, and locked by stripes.
//!
//! It holds every key in flight, and every completed key that is not yet in a bucket. A key that is neither here nor
//! in a bucket was never seen, or is forgotten.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam::utils::CachePadded;
use hashbrown::HashTable;
use hashbrown::hash_table::Entry as Place;
use parking_lot::{Mutex, MutexGuard};

use crate::entry::Entry;

/// Many more than there are cores, so that two threads seldom want the same one.
const STRIPES: usize = 256;

/// What a completed key takes beside its own bytes and its result's: a slot and two allocations, roughly.
const OVERHEAD_BYTES: usize = 160;

/// A key and what is known of it.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) digest: u64,
    pub(crate) key: Arc<[u8]>,
    pub(crate) entry: Entry,
}

impl Slot {
    fn is(&self, digest: u64, key: &[u8]) -> bool {
        self.digest == digest && *self.key == *key
    }
}

/// How much the table holds.
#[derive(Debug, Default)]
struct Counts {
    in_flight: AtomicUsize,
    completed: AtomicUsize,
    completed_bytes: AtomicUsize,
}

impl Counts {
    fn add(&self, slot: &Slot) {
        match &slot.entry {
            Entry::Processing(_) => {
                self.in_flight.fetch_add(1, Ordering::Relaxed);
            }
            Entry::Completed(_) => {
                self.completed.fetch_add(1, Ordering::Relaxed);
                self.completed_bytes.fetch_add(bytes(slot), Ordering::Relaxed);
            }
        }
    }

    fn subtract(&self, slot: &Slot) {
        match &slot.entry {
            Entry::Processing(_) => {
                self.in_flight.fetch_sub(1, Ordering::Relaxed);
            }
            Entry::Completed(_) => {
                self.completed.fetch_sub(1, Ordering::Relaxed);
                self.completed_bytes.fetch_sub(bytes(slot), Ordering::Relaxed);
            }
        }
    }
}

fn bytes(slot: &Slot) -> usize {
    let result = match &slot.entry {
        Entry::Completed(done) => done.result.len(),
        Entry::Processing(_) => 0,
    };
    slot.key.len() + result + OVERHEAD_BYTES
}

/// Keys by digest, in stripes.
pub(crate) struct HotTable {
    stripes: Box<[CachePadded<Mutex<HashTable<Slot>>>]>,
    counts: Counts,
}

impl HotTable {
    pub(crate) fn new() -> Self {
        Self { stripes: (0..STRIPES).map(|_| CachePadded::default()).collect(), counts: Counts::default() }
    }

    /// Locks the stripe of a digest.
    pub(crate) fn stripe(&self, digest: u64) -> Stripe<'_> {
        // The top bits choose the filter's shard and the bottom bits the place in the table.
        let place = (digest >> 32) as usize % STRIPES;
        #[expect(clippy::indexing_slicing, reason = "a remainder of the length")]
        let slots = self.stripes[place].lock();
        Stripe { slots, counts: &self.counts }
    }

    /// Locks one stripe after the other.
    pub(crate) fn stripes(&self) -> impl Iterator<Item = Stripe<'_>> {
        self.stripes.iter().map(|stripe| Stripe { slots: stripe.lock(), counts: &self.counts })
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.counts.in_flight.load(Ordering::Relaxed)
    }

    pub(crate) fn completed(&self) -> usize {
        self.counts.completed.load(Ordering::Relaxed)
    }

    pub(crate) fn completed_bytes(&self) -> usize {
        self.counts.completed_bytes.load(Ordering::Relaxed)
    }
}

/// A locked stripe.
pub(crate) struct Stripe<'a> {
    slots: MutexGuard<'a, HashTable<Slot>>,
    counts: &'a Counts,
}

impl Stripe<'_> {
    pub(crate) fn get(&self, digest: u64, key: &[u8]) -> Option<&Entry> {
        self.slots.find(digest, |slot| slot.is(digest, key)).map(|slot| &slot.entry)
    }

    /// Puts an entry in the place of whatever was there, and gives the key as the table shares it.
    pub(crate) fn set(&mut self, digest: u64, key: &[u8], entry: Entry) -> Arc<[u8]> {
        match self.slots.entry(digest, |slot| slot.is(digest, key), |slot| slot.digest) {
            Place::Occupied(mut place) => {
                let slot = place.get_mut();
                self.counts.subtract(slot);
                slot.entry = entry;
                self.counts.add(slot);
                Arc::clone(&slot.key)
            }
            Place::Vacant(place) => {
                let slot = Slot { digest, key: Arc::from(key), entry };
                self.counts.add(&slot);
                Arc::clone(&place.insert(slot).get().key)
            }
        }
    }

    pub(crate) fn remove(&mut self, digest: u64, key: &[u8]) {
        if let Ok(place) = self.slots.find_entry(digest, |slot| slot.is(digest, key)) {
            self.counts.subtract(place.get());
            place.remove();
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Slot> {
        self.slots.iter()
    }

    /// Removes every slot for which `keep` says false.
    pub(crate) fn retain(&mut self, mut keep: impl FnMut(&Slot) -> bool) {
        let counts = self.counts;
        self.slots.retain(|slot| {
            let stays = keep(slot);
            if !stays {
                counts.subtract(slot);
            }
            stays
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::{Done, Holder, Kept, Processing};

    fn processing(token: u64) -> Entry {
        Entry::Processing(Processing {
            token,
            attempt: 1,
            since_ms: 0,
            fingerprint: None,
            holder: Holder::Leased { until_monotonic_ms: 1 },
        })
    }

    fn completed(token: u64) -> Entry {
        Entry::Completed(Done { token, completed_ms: 0, fingerprint: None, result: Kept::Stored(Arc::from(&b"r"[..])) })
    }

    #[test]
    fn keys_with_one_digest_are_told_apart_by_their_bytes() {
        let table = HotTable::new();
        table.stripe(5).set(5, b"a", processing(1));
        table.stripe(5).set(5, b"b", completed(2));
        assert_eq!(table.stripe(5).get(5, b"a").map(Entry::token), Some(1));
        assert_eq!(table.stripe(5).get(5, b"b").map(Entry::token), Some(2));
        assert!(table.stripe(5).get(5, b"c").is_none());
        assert_eq!((table.in_flight(), table.completed()), (1, 1));
    }

    #[test]
    fn the_counts_follow_every_change() {
        let table = HotTable::new();
        for i in 0..1_000_u64 {
            table.stripe(i << 32).set(i << 32, &i.to_le_bytes(), processing(i));
        }
        for i in 0..600_u64 {
            table.stripe(i << 32).set(i << 32, &i.to_le_bytes(), completed(i));
        }
        assert_eq!((table.in_flight(), table.completed()), (400, 600));
        assert_eq!(table.completed_bytes(), 600 * (8 + 1 + OVERHEAD_BYTES));
        for mut stripe in table.stripes() {
            stripe.retain(|slot| matches!(slot.entry, Entry::Processing(_)));
        }
        table.stripe(999 << 32).remove(999 << 32, &999_u64.to_le_bytes());
        assert_eq!((table.in_flight(), table.completed(), table.completed_bytes()), (399, 0, 0));
        assert_eq!(table.stripes().map(|stripe| stripe.iter().count()).sum::<usize>(), 399);
    }
}
