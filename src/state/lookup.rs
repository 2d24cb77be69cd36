//! Looking keys up: what the disk knows, what the hot table has, and which of the two counts.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::answer::{Answer, HeldKey, payload_mismatch, too_far_ahead, too_old};
use super::engine::Engine;
use super::hot_table::Stripe;
use super::request::{Asked, Request};
use super::transition::{self, Found, Standing};
use crate::bucket::set::{Probe, View, look_up};
use crate::clock::Now;
use crate::entry::{Entry, Processing};
use crate::error::Result;
use crate::invariant::Invariant;
use crate::meter::Call;

/// What the buckets know of a request's keys, and as of which seal.
pub(super) struct OnDisk {
    seals: u64,
    /// The place of a key in its request, and what was found of it. In the order of the places.
    entries: Vec<(usize, Entry)>,
}

impl OnDisk {
    fn entry(&self, place: usize) -> Option<&Entry> {
        let start = self.entries.partition_point(|(found, _)| *found < place);
        let here = self.entries.iter().skip(start).take_while(|(found, _)| *found == place);
        // A key that was released and completed later, or forgotten and completed again, may be in two buckets.
        here.map(|(_, entry)| entry).max_by_key(|entry| entry.token())
    }
}

impl Engine {
    /// What the buckets know of the keys of a request.
    pub(super) fn on_disk(&self, request: &Request) -> Result<OnDisk> {
        // Before anything is looked at: what changes from here on is noticed.
        let seals = self.seals.load(Ordering::Acquire);
        let view = self.buckets.view();
        let digests: Vec<u64> = request.digests().collect();
        let mut slots = vec![0; digests.len()];
        view.candidates_of(&digests, &mut slots);
        let mut lost = false;
        let asked = slots.iter().enumerate().filter(|(_, slots)| **slots != 0).filter_map(|(place, slots)| {
            let asked = request.get(place);
            lost |= asked.is_none();
            asked.map(|asked| (asked, *slots))
        });
        let found = self.in_buckets(&view, asked)?;
        if lost {
            return Err(
                self.broken(Invariant::KeyInRequest, format_args!("{} digests are of fewer keys", digests.len()))
            );
        }
        self.counters.filter_checks.add(digests.len() as u64);
        Ok(OnDisk { seals, entries: found })
    }

    /// As [`Engine::on_disk`], for one key.
    fn on_disk_again(&self, asked: Asked<'_>) -> Result<OnDisk> {
        let seals = self.seals.load(Ordering::Acquire);
        let view = self.buckets.view();
        let slots = view.candidates(asked.digest);
        let entries = self.in_buckets(&view, (slots != 0).then_some((asked, slots)).into_iter())?;
        Ok(OnDisk { seals, entries })
    }

    /// What the buckets that the filter named know of the keys: from what came there lately, or from the disk.
    fn in_buckets<'a>(
        &self,
        view: &View,
        asked: impl Iterator<Item = (Asked<'a>, u64)>,
    ) -> Result<Vec<(usize, Entry)>> {
        let recent = self.hot.recent();
        let mut found = Vec::new();
        let mut probes = Vec::new();
        let mut hits = 0;
        for (asked, slots) in asked {
            hits += 1;
            // What the hot table has beside that does not count here: a seal may be about to remove it.
            match recent.get(asked.digest, asked.key) {
                Some(entry) => found.push((asked.place, entry)),
                None => probes.push(Probe { place: asked.place, digest: asked.digest, key: asked.key, slots }),
            }
        }
        if hits == 0 {
            return Ok(found);
        }
        look_up(&self.db, view, &probes, |place, _, entry| found.push((place, entry)))?;
        // Sorted, so that [`OnDisk::entry`] finds a key without a walk through all of them.
        found.sort_unstable_by_key(|(place, _)| *place);
        self.counters.filter_hits.add(hits);
        self.counters.filter_false_positives.add(hits.saturating_sub(found.len() as u64));
        Ok(found)
    }

    /// Calls `decide` with the key's locked stripe and what is stored of it, which is the truth as long as the
    /// stripe is locked.
    pub(super) fn decide<R>(
        &self,
        asked: Asked<'_>,
        on_disk: &OnDisk,
        decide: impl FnOnce(&mut Stripe<'_>, Option<Entry>) -> R,
    ) -> Result<R> {
        let mut again;
        let mut on_disk = on_disk;
        self.has_key(asked.key)?;
        loop {
            let mut stripe = self.hot.stripe(asked.digest);
            let hot = stripe.get(asked.digest, asked.key);
            if hot.is_some() || self.seals.load(Ordering::Acquire) == on_disk.seals {
                let stored = hot.or_else(|| on_disk.entry(asked.place).cloned());
                return Ok(decide(&mut stripe, stored));
            }
            // The key may have been completed and sealed since the disk was asked. Ask again.
            drop(stripe);
            again = self.on_disk_again(asked)?;
            on_disk = &again;
        }
    }

    /// What a claim of each key would find. Changes nothing.
    pub(crate) fn check(&self, request: &Request) -> Result<Vec<Result<Answer>>> {
        let _timer = self.meter.call(Call::Check, request.len());
        let now = self.now();
        self.look_at(request, |asked, stored| {
            let at_ms = request.at_ms(asked.place);
            let now = match at_ms.map(|at_ms| (at_ms, self.timeline.foresee(at_ms))) {
                None => now,
                Some((_, Ok(time_ms))) => Now { time_ms, ..now },
                Some((at_ms, Err(leap))) => return Err(too_far_ahead(asked, at_ms, leap)),
            };
            match transition::find(stored.as_ref(), asked.payload, at_ms, now, self.policy) {
                Found::Available { .. } => Ok(Answer::New),
                Found::InProgress { retry_after_ms, attempt } => Ok(Answer::InProgress { retry_after_ms, attempt }),
                Found::Completed(done) => Ok(Answer::Completed(done.clone())),
                Found::PayloadMismatch => Err(payload_mismatch(asked)),
                Found::TooOld => Err(too_old(asked, at_ms, now, self.policy.window_ms)),
            }
        })
    }

    /// What is stored of a key, as long as it counts.
    pub(crate) fn get(&self, request: &Request) -> Result<Vec<Option<Entry>>> {
        let now = self.now();
        self.look_at(request, |_, stored| stored.filter(|entry| self.counts_now(entry, now)))
    }

    /// Whether what is stored of a key counts: it is inside its window, or in flight.
    pub(super) fn counts_now(&self, entry: &Entry, now: Now) -> bool {
        match entry {
            Entry::Completed(done) => done.is_live(now, self.policy.window_ms),
            Entry::Processing(processing) => self.standing_at(processing, now) != Standing::Forgotten,
        }
    }

    /// What `answer` makes of each key and what is stored of it.
    fn look_at<R>(&self, request: &Request, answer: impl Fn(Asked<'_>, Option<Entry>) -> R) -> Result<Vec<R>> {
        let on_disk = self.on_disk(request)?;
        let answers = request.iter().map(|asked| self.decide(asked, &on_disk, |_, stored| answer(asked, stored)));
        let answers = answers.collect::<Result<Vec<R>>>()?;
        self.unbroken()?;
        self.answered(answers, request.len())
    }

    /// Fails where a request has lost a key: an encoded key has at least its first byte.
    #[inline]
    pub(super) fn has_key(&self, key: &[u8]) -> Result<()> {
        if key.is_empty() {
            return Err(self.broken(Invariant::KeyInRequest, format_args!("it has no bytes")));
        }
        Ok(())
    }

    /// How a key that is being processed stands.
    pub(crate) fn standing(&self, processing: &Processing) -> Standing {
        self.standing_at(processing, self.now())
    }

    pub(super) fn standing_at(&self, processing: &Processing, now: Now) -> Standing {
        transition::standing(processing, now, self.policy)
    }

    /// The keys that wait for a decision. Visits the whole hot table.
    pub(crate) fn held(&self) -> Result<Vec<HeldKey>> {
        self.ready()?;
        let now = self.now();
        let mut held = Vec::new();
        for stripe in self.hot.stripes() {
            held.extend(stripe.in_flight().filter_map(|(_, key, processing)| {
                let Standing::Held(prior) = self.standing_at(&processing, now) else { return None };
                Some(HeldKey { key: Arc::from(key), processing, prior })
            }));
        }
        held.sort_by_key(|held: &HeldKey| held.processing.token);
        self.unbroken()?;
        Ok(held)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::answer::{Claimed, Grant, Settlement, Settler};
    use super::*;
    use crate::clock::ManualClock;
    use crate::codec::RowKind;
    use crate::config::Options;
    use crate::entry::{Backoff, Kept, Prior};
    use crate::error::Error;
    use crate::storage::directory::Directory;

    fn engine(dir: &tempfile::TempDir, options: &Options) -> Engine {
        let directory = Directory::acquire(&dir.path().join("store"), Duration::ZERO).unwrap();
        Engine::open(directory, options).unwrap()
    }

    #[test]
    fn each_key_of_a_call_is_found_where_it_lies_and_counted_once() {
        let dir = tempfile::tempdir().unwrap();
        let clock = ManualClock::at(1 << 40);
        let options = Options { clock: Arc::new(clock.clone()), ..Options::default() };
        let engine = engine(&dir, &options);
        // Each in a bucket of its own.
        for key in ["a", "b"] {
            engine.record(&engine.request([key]).unwrap()).unwrap();
            engine.seal().unwrap();
            clock.advance(Duration::from_secs(3_600));
        }
        let before = engine.stats();
        let request = engine.request(["a", "new", "b"]).unwrap();
        for at_hand in [true, false] {
            if !at_hand {
                request.digests().for_each(|digest| engine.hot.forget_recent(digest));
            }
            let on_disk = engine.on_disk(&request).unwrap();
            let found = [0, 1, 2].map(|place| on_disk.entry(place).is_some());
            assert_eq!(found, [true, false, true], "at hand: {at_hand}");
        }
        let after = engine.stats();
        assert_eq!(after.filter_checks - before.filter_checks, 6);
        assert_eq!(after.filter_hits - before.filter_hits, 4);
        assert_eq!(after.filter_false_positives, 0);
    }

    #[test]
    fn what_was_sealed_since_the_disk_was_asked_is_asked_for_once_more() {
        let dir = tempfile::tempdir().unwrap();
        let engine = engine(&dir, &Options::default());
        let request = engine.request(["new", "sealed", "young"]).unwrap();
        let on_disk = engine.on_disk(&request).unwrap();
        engine.record(&engine.request(["sealed"]).unwrap()).unwrap();
        engine.seal().unwrap();
        engine.record(&engine.request(["young"]).unwrap()).unwrap();
        let stored = request.iter().map(|asked| engine.decide(asked, &on_disk, |_, stored| stored).unwrap());
        let stored: Vec<_> = stored.collect();
        assert!(matches!(stored[..], [None, Some(Entry::Completed(_)), Some(Entry::Completed(_))]), "{stored:?}");
    }

    fn assert_broken(engine: &Engine, name: &str, failed: Result<()>, said: &str) {
        let error = failed.expect_err(name);
        assert!(matches!(&error, Error::Broken { invariant, .. } if invariant.contains(said)), "{name}: {error}");
        for refused in [engine.ready(), engine.seal(), engine.held().map(drop)] {
            let error = refused.expect_err(name);
            assert!(matches!(&error, Error::Poisoned { reason } if reason.contains(said)), "{name}: {error}");
        }
    }

    #[test]
    fn a_call_that_meets_a_broken_invariant_fails_and_the_next_is_refused() {
        type Call = fn(&Engine, &Arc<Request>, &Grant) -> Result<()>;
        let calls: [(&str, Call); 9] = [
            ("check", |engine, request, _| engine.check(request).map(drop)),
            ("get", |engine, request, _| engine.get(request).map(drop)),
            ("claim", |engine, request, _| engine.claim(request).map(drop)),
            ("record", |engine, request, _| engine.record(request).map(drop)),
            ("complete", |engine, _, grant| {
                let done = Settlement::Completed(Kept::Absent, None);
                engine.settle(RowKind::Completed, Settler::Holder, vec![(grant, done)]).map(drop)
            }),
            ("release", |engine, _, grant| {
                let open = Settlement::Open { prior: Prior::Released, backoff: Backoff::NONE };
                engine.settle(RowKind::Settled, Settler::Holder, vec![(grant, open)]).map(drop)
            }),
            ("renew", |engine, _, grant| engine.renew(grant).map(drop)),
            ("held", |engine, request, _| engine.held_grant(request).map(drop)),
            ("forget", |engine, request, _| engine.forget(request).map(drop)),
        ];
        for (name, call) in calls {
            let dir = tempfile::tempdir().unwrap();
            let engine = engine(&dir, &Options::default());
            let request = engine.request(["a"]).unwrap();
            let Some(Ok(Claimed::Acquired(grant))) = engine.claim(&request).unwrap().pop() else { panic!("a is new") };
            engine.hot.lose_slots(grant.digest());
            assert_broken(&engine, name, call(&engine, &request, &grant), "points to a slot");
        }
    }

    #[test]
    fn a_seal_of_a_page_in_disorder_moves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let engine = engine(&dir, &Options::default());
        let request = engine.request(["a"]).unwrap();
        engine.record(&request).unwrap();
        engine.hot.lose_slots(request.digests().next().unwrap());
        assert_broken(&engine, "seal", engine.seal(), "points to a slot");
        engine.close().unwrap_err();
        let engine = super::tests::engine(&dir, &Options::default());
        let answer = engine.check(&engine.request(["a"]).unwrap()).unwrap().pop().unwrap();
        assert!(matches!(answer, Ok(Answer::Completed(_))), "the journal has it: {answer:?}");
    }

    #[test]
    fn a_key_without_bytes_is_neither_claimed_nor_settled() {
        let dir = tempfile::tempdir().unwrap();
        let engine = engine(&dir, &Options::default());
        let request = engine.request(["a"]).unwrap();
        let on_disk = engine.on_disk(&request).unwrap();
        let asked = Asked { key: &[], ..request.get(0).unwrap() };
        let decided = engine.decide(asked, &on_disk, |_, stored| stored);
        assert_broken(&engine, "a lookup", decided.map(drop), "within the bytes of its request");

        let dir = tempfile::tempdir().unwrap();
        let engine = super::tests::engine(&dir, &Options::default());
        let request = engine.request(["a"]).unwrap();
        let Some(Ok(Claimed::Acquired(grant))) = engine.claim(&request).unwrap().pop() else { panic!("a is new") };
        let nobodys = Grant { place: 7, ..grant };
        let done = Settlement::Completed(Kept::Absent, None);
        let settled = engine.settle(RowKind::Completed, Settler::Holder, vec![(&nobodys, done)]);
        assert_broken(&engine, "a completion", settled.map(drop), "within the bytes of its request");
    }
}
