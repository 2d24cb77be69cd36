//! Lookups: a key's entry on disk, its entry in the memtable, and which of the two counts.
//!
//! Order: the flush generation is read first, then the buckets, then the memtable under the shard's lock. The memtable
//! overrules the disk. If the memtable has no entry and the generation has changed, the disk is read again. Otherwise a key
//! that was flushed between the two reads would be missed in both, and claimed a second time.

use std::sync::atomic::Ordering;

use super::core::Engine;
use super::request::{KeyRef, Request};
use super::response::completed;
use crate::buckets::registry::{Probe, Snapshot, look_up};
use crate::clock::Now;
use crate::invariant::Invariant;
use crate::memtable::table::Shard;
use onlyonce_core::machine::{self, Entry, LeaseState, Processing};
use onlyonce_core::{Error, FencingToken, HeldKey, Key, Result, StoredKey, Timestamp};

/// The entries that the buckets have for a request's keys, as of a flush generation.
pub(super) struct DiskLookup {
    flush_generation: u64,
    /// The index of a key in its request, and an entry that was found for it. Sorted by index.
    entries: Vec<(usize, Entry)>,
}

/// Orders the entries of a key that is in several buckets: it was claimed again after a release, or forgotten, or completed by the
/// token that had released it.
pub(super) fn age(entry: &Entry) -> (u64, bool) {
    (entry.token(), matches!(entry, Entry::Completed(_)))
}

impl DiskLookup {
    /// No lookup yet: a key that the memtable does not have is looked up when it is needed.
    pub(super) const DEFERRED: Self = Self { flush_generation: u64::MAX, entries: Vec::new() };

    fn entry(&self, index: usize) -> Option<&Entry> {
        let start = self.entries.partition_point(|(found, _)| *found < index);
        let entries = self.entries.iter().skip(start).take_while(|(found, _)| *found == index);
        entries.map(|(_, entry)| entry).max_by_key(|entry| age(entry))
    }
}

impl Engine {
    /// Looks the keys of a request up in the recent cache and the buckets.
    pub(super) fn look_up_on_disk(&self, request: &Request) -> Result<DiskLookup> {
        if let Some(key_ref) = request.only() {
            self.counters.filter_checks.add(1);
            return self.look_up_key_on_disk(key_ref);
        }
        // First, so that a flush that ends during the lookup is noticed.
        let flush_generation = self.tables.flush_generation.load(Ordering::Acquire);
        let snapshot = self.tables.buckets.snapshot();
        let digests: Vec<u64> = request.digests().collect();
        let mut column_bits = vec![0; digests.len()];
        snapshot.candidates_of(&digests, &mut column_bits);
        let mut is_missing = false;
        let key_refs = column_bits.iter().enumerate().filter(|(_, column_bits)| **column_bits != 0).filter_map(
            |(index, column_bits)| {
                let key_ref = request.get(index);
                is_missing |= key_ref.is_none();
                key_ref.map(|key_ref| (key_ref, *column_bits))
            },
        );
        let entries = self.look_up_in_buckets(&snapshot, key_refs)?;
        if is_missing {
            return Err(self
                .health
                .broken(Invariant::KeyInRequest, format_args!("{} digests, but fewer keys", digests.len())));
        }
        self.counters.filter_checks.add(digests.len() as u64);
        Ok(DiskLookup { flush_generation, entries })
    }

    /// As [`Engine::look_up_on_disk`], for one key: without the memory that a batch needs.
    pub(super) fn look_up_key_on_disk(&self, key_ref: KeyRef<'_>) -> Result<DiskLookup> {
        let flush_generation = self.tables.flush_generation.load(Ordering::Acquire);
        let snapshot = self.tables.buckets.snapshot();
        let column_bits = snapshot.candidates(key_ref.digest);
        let entries =
            self.look_up_in_buckets(&snapshot, (column_bits != 0).then_some((key_ref, column_bits)).into_iter())?;
        Ok(DiskLookup { flush_generation, entries })
    }

    /// Looks keys up in the buckets that the filter returned: in the recent cache, then on disk.
    fn look_up_in_buckets<'a>(
        &self,
        snapshot: &Snapshot,
        key_refs: impl Iterator<Item = (KeyRef<'a>, u64)>,
    ) -> Result<Vec<(usize, Entry)>> {
        let recent = self.tables.memtable.recent();
        let mut found = Vec::new();
        let mut probes = Vec::new();
        let mut hits = 0;
        for (key_ref, column_bits) in key_refs {
            hits += 1;
            // The memtable is not read here: a flush may remove its entry before the shard is locked.
            match recent.get(key_ref.digest, key_ref.key) {
                Some(entry) => found.push((key_ref.index, entry)),
                None => {
                    probes.push(Probe { index: key_ref.index, digest: key_ref.digest, key: key_ref.key, column_bits })
                }
            }
        }
        if hits == 0 {
            return Ok(found);
        }
        look_up(&self.tables.db, snapshot, &probes, |index, _, entry| found.push((index, entry)))?;
        // Sorted for the binary search in `DiskLookup::entry`.
        found.sort_unstable_by_key(|(index, _)| *index);
        self.counters.filter_hits.add(hits);
        self.counters.filter_false_positives.add(hits.saturating_sub(found.len() as u64));
        Ok(found)
    }

    /// Calls `decide` with the key's locked shard and its entry. The entry cannot change while the shard is locked.
    pub(super) fn with_locked_key<R>(
        &self,
        key_ref: KeyRef<'_>,
        on_disk: &DiskLookup,
        decide: impl FnOnce(&mut Shard<'_>, Option<Entry>) -> R,
    ) -> Result<R> {
        let mut again;
        let mut on_disk = on_disk;
        self.require_key(key_ref.key)?;
        loop {
            let mut shard = self.tables.memtable.shard(key_ref.digest);
            let in_memory = shard.get(key_ref.digest, key_ref.key);
            if in_memory.is_some() || self.tables.flush_generation.load(Ordering::Acquire) == on_disk.flush_generation {
                let stored = in_memory.or_else(|| on_disk.entry(key_ref.index).cloned());
                return Ok(decide(&mut shard, stored));
            }
            // A flush may have moved the key to its bucket since the disk was read.
            drop(shard);
            again = self.look_up_key_on_disk(key_ref)?;
            on_disk = &again;
        }
    }

    /// Returns the entry of a request's key, unless it has expired.
    pub(crate) fn inspect(&self, request: &Request) -> Result<Option<StoredKey>> {
        let now = self.now();
        let found = self.look_up_each(request, |_, stored| stored.filter(|entry| self.is_live_at(entry, now)))?;
        Ok(found.into_iter().next().flatten().map(|entry| match entry {
            Entry::Completed(done) => StoredKey::Completed(completed(&done, &now, self.policy.window_ms)),
            Entry::Processing(processing) => StoredKey::processing(
                FencingToken::new(processing.token),
                processing.attempt,
                self.lease_state_at(&processing, now).into(),
            ),
        }))
    }

    /// Whether an entry counts: it is within its window, or in progress.
    pub(super) fn is_live_at(&self, entry: &Entry, now: Now) -> bool {
        machine::counts(entry, now, self.policy)
    }

    /// Looks each key up and maps it and its entry to a response.
    pub(super) fn look_up_each<R>(
        &self,
        request: &Request,
        response: impl Fn(KeyRef<'_>, Option<Entry>) -> R,
    ) -> Result<Vec<R>> {
        // Again: the store may have been closed or poisoned since the call was made.
        self.health.ready()?;
        let on_disk = self.look_up_on_disk(request)?;
        let responses = request
            .iter()
            .map(|key_ref| self.with_locked_key(key_ref, &on_disk, |_, stored| response(key_ref, stored)));
        let responses = responses.collect::<Result<Vec<R>>>()?;
        self.health.check_invariants()?;
        self.health.check_response_count(responses, request.len())
    }

    /// The key of a request that has one.
    pub(super) fn single_key<'r>(&self, request: &'r Request) -> Result<KeyRef<'r>> {
        let none = || self.health.broken(Invariant::KeyInRequest, format_args!("the request has no key"));
        let key_ref = request.iter().next().ok_or_else(none)?;
        self.require_key(key_ref.key)?;
        Ok(key_ref)
    }

    /// Fails if a key has no bytes: an encoded key has at least one, so the request was damaged.
    #[inline]
    pub(super) fn require_key(&self, key: &[u8]) -> Result<()> {
        if key.is_empty() {
            return Err(self.health.broken(Invariant::KeyInRequest, format_args!("a key has no bytes")));
        }
        Ok(())
    }

    pub(super) fn lease_state_at(&self, processing: &Processing, now: Now) -> LeaseState {
        machine::lease_state(processing, now, self.policy)
    }

    /// The keys that are held for resolution, the oldest claim first. Visits the whole memtable.
    pub(crate) fn held(&self) -> Result<Vec<HeldKey>> {
        self.health.ready()?;
        let now = self.now();
        let mut held = Vec::new();
        for shard in self.tables.memtable.shards() {
            held.extend(shard.in_flight().filter_map(|(_, key, processing)| {
                let LeaseState::Held(prior) = self.lease_state_at(&processing, now) else { return None };
                Some((Box::<[u8]>::from(key), processing, prior))
            }));
        }
        held.sort_by_key(|(_, processing, _)| processing.token);
        self.health.check_invariants()?;
        held.into_iter()
            .map(|(key, Processing { token, attempt, since_ms, .. }, prior)| {
                let key = Key::decode(&key).ok_or_else(|| Error::Corrupt {
                    place: "a key in the journal".to_owned(),
                    detail: format!("{} is not an encoded key", key.escape_ascii()),
                })?;
                Ok(HeldKey::new(key, FencingToken::new(token), attempt, prior, Timestamp::from_unix_ms(since_ms)))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::super::response::{FinishKind, FinishedBy, Grant};
    use super::*;
    use crate::clock::ManualClock;
    use crate::codec::RecordKind;
    use crate::config::Options;
    use crate::engine::fixture::{claim, engine};
    use onlyonce_core::Claim;
    use onlyonce_core::Error;
    use onlyonce_core::KeyStatus;
    use onlyonce_core::machine::{Backoff, CompletedEntry, Holder, OwnWindow};
    use onlyonce_core::{PriorAttempt, StoredResult};

    #[test]
    fn each_key_of_a_call_is_found_in_its_bucket_and_counted_once() {
        let dir = tempfile::tempdir().unwrap();
        let clock = ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(1 << 40));
        let options = Options { clock: Arc::new(clock.clone()), ..Options::default() };
        let engine = engine(&dir, &options);
        // Each key is in a bucket of its own.
        for key in ["a", "b"] {
            engine.record(&engine.request([key]).unwrap()).unwrap();
            engine.flush().unwrap();
            clock.advance(Duration::from_secs(3_600));
        }
        let before = engine.stats();
        let request = engine.request(["a", "new", "b"]).unwrap();
        for cached in [true, false] {
            if !cached {
                request.digests().for_each(|digest| engine.tables.memtable.invalidate_recent(digest));
            }
            let on_disk = engine.look_up_on_disk(&request).unwrap();
            let found = [0, 1, 2].map(|index| on_disk.entry(index).is_some());
            assert_eq!(found, [true, false, true], "cached: {cached}");
        }
        let after = engine.stats();
        assert_eq!(after.filter_checks - before.filter_checks, 6);
        assert_eq!(after.filter_hits - before.filter_hits, 4);
        assert_eq!(after.filter_false_positives, 0);
    }

    #[test]
    fn a_late_completion_overrules_the_release_of_its_token_in_another_bucket() {
        let (token, own_window) = (7, OwnWindow::NONE);
        let holder = Holder::Released { prior: PriorAttempt::Released, backoff: Backoff::NONE };
        let released = Processing { token, attempt: 1, since_ms: 1, fingerprint: None, own_window, holder };
        let result = StoredResult::None;
        let completed = CompletedEntry { token, completed_ms: 2, fingerprint: None, own_window, result };
        let both = [Entry::Processing(released), Entry::Completed(completed)];
        for entries in [[0, 1], [1, 0]] {
            let entries = entries.map(|of: usize| (0, both[of].clone())).to_vec();
            let on_disk = DiskLookup { flush_generation: 0, entries };
            assert!(matches!(on_disk.entry(0), Some(Entry::Completed(_))));
        }
    }

    #[test]
    fn a_late_completion_of_a_flushed_release_is_kept_over_a_reopen() {
        let dir = tempfile::tempdir().unwrap();
        let clock = ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(1 << 40));
        let options = Options { clock: Arc::new(clock.clone()), ..Options::default() };
        let late = engine(&dir, &options);
        let request = late.request(["k"]).unwrap();
        let grant = claim(&late, "k");
        let open = FinishKind::Release { prior: PriorAttempt::Released, backoff: Backoff::NONE };
        late.finish(RecordKind::Released, FinishedBy::Holder, vec![(&grant, open)]).unwrap();
        late.flush().unwrap();
        clock.advance(Duration::from_secs(3_600));
        let done = FinishKind::Complete { result: StoredResult::Bytes(b"r"), side_writes: None, follows: false };
        let finished = late.finish(RecordKind::Completed, FinishedBy::Holder, vec![(&grant, done)]).unwrap();
        assert!(matches!(finished[..], [Ok(true)]), "no later holder has the key: {finished:?}");
        late.close().unwrap();
        drop(late);
        for flush_first in [false, true] {
            let again = engine(&dir, &options);
            if flush_first {
                again.flush().unwrap();
                again.tables.memtable.invalidate_recent(request.digests().next().unwrap());
            }
            let claimed = again.claim(&again.request(["k"]).unwrap()).unwrap().pop().unwrap();
            assert!(matches!(claimed, Ok(Claim::Completed(_))), "{claimed:?}");
            again.close().unwrap();
        }
    }

    #[test]
    fn keys_that_were_flushed_after_the_lookup_are_looked_up_again() {
        let dir = tempfile::tempdir().unwrap();
        let engine = engine(&dir, &Options::default());
        let request = engine.request(["new", "flushed", "active"]).unwrap();
        let on_disk = engine.look_up_on_disk(&request).unwrap();
        engine.record(&engine.request(["flushed"]).unwrap()).unwrap();
        engine.flush().unwrap();
        engine.record(&engine.request(["active"]).unwrap()).unwrap();
        let stored =
            request.iter().map(|key_ref| engine.with_locked_key(key_ref, &on_disk, |_, stored| stored).unwrap());
        let stored: Vec<_> = stored.collect();
        assert!(matches!(stored[..], [None, Some(Entry::Completed(_)), Some(Entry::Completed(_))]), "{stored:?}");
    }

    fn assert_broken(engine: &Engine, name: &str, failed: Result<()>, text: &str) {
        let error = failed.expect_err(name);
        assert!(matches!(&error, Error::Broken { invariant, .. } if invariant.contains(text)), "{name}: {error}");
        for refused in [engine.health.ready(), engine.flush(), engine.held().map(drop)] {
            let error = refused.expect_err(name);
            assert!(matches!(&error, Error::Poisoned { reason } if reason.contains(text)), "{name}: {error}");
        }
    }

    #[test]
    fn a_call_that_finds_a_broken_invariant_fails_and_later_calls_fail_too() {
        type Call = fn(&Engine, &Arc<Request>, &Grant) -> Result<()>;
        let calls: [(&str, Call); 9] = [
            ("check", |engine, request, _| engine.check(request).map(drop)),
            ("inspect", |engine, request, _| engine.inspect(request).map(drop)),
            ("claim", |engine, request, _| engine.claim(request).map(drop)),
            ("record", |engine, request, _| engine.record(request).map(drop)),
            ("complete", |engine, _, grant| {
                let done = FinishKind::Complete { result: StoredResult::None, side_writes: None, follows: false };
                engine.finish(RecordKind::Completed, FinishedBy::Holder, vec![(grant, done)]).map(drop)
            }),
            ("release", |engine, _, grant| {
                let open = FinishKind::Release { prior: PriorAttempt::Released, backoff: Backoff::NONE };
                engine.finish(RecordKind::Released, FinishedBy::Holder, vec![(grant, open)]).map(drop)
            }),
            ("renew", |engine, _, grant| engine.renew(grant).map(drop)),
            ("held", |engine, request, _| engine.held_grant(request).map(drop)),
            ("forget", |engine, request, _| engine.forget(request).map(drop)),
        ];
        for (name, call) in calls {
            let dir = tempfile::tempdir().unwrap();
            let engine = engine(&dir, &Options::default());
            let request = engine.request(["a"]).unwrap();
            let Some(Ok(Claim::Acquired(grant))) = engine.claim(&request).unwrap().pop() else { panic!("a is new") };
            engine.tables.memtable.lose_slots(grant.digest());
            assert_broken(&engine, name, call(&engine, &request, &grant), Invariant::IndexedSlot.text());
        }
    }

    #[test]
    fn a_flush_of_a_broken_arena_moves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let engine = engine(&dir, &Options::default());
        let request = engine.request(["a"]).unwrap();
        engine.record(&request).unwrap();
        engine.tables.memtable.lose_slots(request.digests().next().unwrap());
        assert_broken(&engine, "flush", engine.flush(), Invariant::IndexedSlot.text());
        engine.close().unwrap_err();
        let engine = super::tests::engine(&dir, &Options::default());
        let response = engine.check(&engine.request(["a"]).unwrap()).unwrap().pop().unwrap();
        assert!(matches!(response, Ok(KeyStatus::Completed(_))), "the journal has it: {response:?}");
    }

    #[test]
    fn a_key_without_bytes_is_neither_claimed_nor_finished() {
        let dir = tempfile::tempdir().unwrap();
        let engine = engine(&dir, &Options::default());
        let request = engine.request(["a"]).unwrap();
        let on_disk = engine.look_up_on_disk(&request).unwrap();
        let key_ref = KeyRef { key: &[], ..request.get(0).unwrap() };
        let decided = engine.with_locked_key(key_ref, &on_disk, |_, stored| stored);
        assert_broken(&engine, "a lookup", decided.map(drop), Invariant::KeyInRequest.text());

        let dir = tempfile::tempdir().unwrap();
        let engine = super::tests::engine(&dir, &Options::default());
        let request = engine.request(["a"]).unwrap();
        let Some(Ok(Claim::Acquired(grant))) = engine.claim(&request).unwrap().pop() else { panic!("a is new") };
        let damaged = Grant { index: 7, ..grant };
        let done = FinishKind::Complete { result: StoredResult::None, side_writes: None, follows: false };
        let finished = engine.finish(RecordKind::Completed, FinishedBy::Holder, vec![(&damaged, done)]);
        assert_broken(&engine, "a completion", finished.map(drop), Invariant::KeyInRequest.text());
    }
}
