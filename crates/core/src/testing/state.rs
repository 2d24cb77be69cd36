//! The store itself: one map, and one function a verb. The caller holds the lock.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::builder::Config;
use super::entry::{Done, Entry, Holder, Lease, Now, Policy, Processing, window_of};
use super::failure::Failure;
use super::side_effects::{Batch, SideEffects};
use super::stream_time::{StreamTime, TooFarAhead};
use crate::answer::{Claim, Completed, HeldKey, InProgress, KeyStatus, LeaseState, RecordOutcome, Resolution};
use crate::answer::{StoredKey, StoredResult};
use crate::attempt::{AttemptInfo, FencingToken, PriorAttempt};
use crate::completion::Completion;
use crate::engine::{Answers, EngineStats, Finish, Grant, Limits, Release};
use crate::error::{Error, Result, TimestampError};
use crate::key::Key;
use crate::timestamp::Timestamp;

#[derive(Debug)]
pub(super) struct State {
    pub(super) config: Config,
    policy: Policy,
    pub(super) failure: Failure,
    pub(super) side_effects: SideEffects,
    pub(super) fail_open: u64,
    pub(super) keys: HashMap<Key<'static>, Entry>,
    stream: Option<StreamTime>,
    started: Instant,
    started_at: Timestamp,
    last_token: u64,
}

/// What a claim, a check or a record finds.
enum Found {
    Available { attempt: u32, prior: Option<PriorAttempt> },
    InProgress(InProgress),
    Completed(Completed),
}

impl State {
    pub(super) fn new(config: Config) -> Self {
        let policy = Policy {
            window: config.window,
            lease: config.lease,
            on_interrupt: config.on_interrupt,
            is_stream: config.max_ahead.is_some(),
        };
        Self {
            policy,
            failure: Failure::default(),
            side_effects: SideEffects::default(),
            fail_open: 0,
            keys: HashMap::new(),
            stream: config.max_ahead.map(|max_ahead| StreamTime::new(max_ahead, config.window)),
            started: Instant::now(),
            started_at: SystemTime::now().into(),
            last_token: 0,
            config,
        }
    }

    fn monotonic_ms(&self) -> u64 {
        millis(self.started.elapsed())
    }

    fn wall_time(&self) -> Timestamp {
        self.started_at.saturating_add(self.started.elapsed())
    }

    pub(super) fn now(&self) -> Now {
        let time = self.stream.as_ref().map_or_else(|| self.wall_time(), StreamTime::now);
        Now { time, monotonic_ms: self.monotonic_ms() }
    }

    fn next_token(&mut self) -> FencingToken {
        self.last_token += 1;
        FencingToken::new(self.last_token)
    }

    /// Rejects all keys of a call if one is not valid.
    fn check_keys(&self, keys: &[Key<'_>]) -> Result<()> {
        for (index, key) in keys.iter().enumerate() {
            self.check_key(key).map_err(|error| if keys.len() > 1 { error.at_index(index) } else { error })?;
            match (key.timestamp(), self.policy.is_stream) {
                (None, true) => return Err(TimestampError::Missing.into()),
                (Some(_), false) => return Err(TimestampError::Unexpected.into()),
                _ => {}
            }
        }
        Ok(())
    }

    fn check_key(&self, key: &Key<'_>) -> Result<()> {
        Ok(key.encode(self.config.key_limit, &mut Vec::new())?)
    }

    /// Advances stream time to the message of a key. `later` are the timestamps that follow it in its call.
    fn advance_to(&mut self, key: &Key<'_>, later: &[Timestamp]) -> Result<Now> {
        let (now, wall) = (self.now(), self.wall_time());
        match (&mut self.stream, key.timestamp()) {
            (Some(stream), Some(at)) => match stream.advance(at, later, wall) {
                Ok(time) => Ok(Now { time, ..now }),
                Err(error) => Err(too_far_ahead(key, at, stream, error)),
            },
            _ => Ok(now),
        }
    }

    fn find(&self, key: &Key<'_>, now: Now) -> Result<Found> {
        let new = || match key.timestamp() {
            Some(at) if at.saturating_add(window_of(key, self.policy.window)) <= now.time => {
                Err(too_old(key, at, now, self.policy.window))
            }
            _ => Ok(Found::Available { attempt: 1, prior: None }),
        };
        let (fingerprint, found) = match self.keys.get(key) {
            None => return new(),
            Some(Entry::Completed(done)) if !done.is_live(now) => return new(),
            Some(Entry::Completed(done)) => (done.fingerprint, Found::Completed(done.to_completed())),
            Some(Entry::Processing(processing)) => {
                let attempt = processing.attempt;
                let found = match processing.state(now, self.policy) {
                    None => return new(),
                    Some(LeaseState::Leased(left) | LeaseState::Backoff(left, _)) => {
                        Found::InProgress(InProgress::new(Some(left), attempt))
                    }
                    Some(LeaseState::Held(_)) => Found::InProgress(InProgress::new(None, attempt)),
                    Some(LeaseState::Free(prior)) => {
                        Found::Available { attempt: attempt.saturating_add(1), prior: Some(prior) }
                    }
                };
                (processing.fingerprint, found)
            }
        };
        match (fingerprint, key.payload_fingerprint()) {
            (Some(first), Some(this)) if first != *this => Err(Error::PayloadMismatch { key: key.to_string() }),
            _ => Ok(found),
        }
    }

    pub(super) fn claim(&mut self, keys: Vec<Key<'static>>) -> Answers<Claim<Grant>> {
        self.check_keys(&keys)?;
        let times = timestamps(&keys);
        let claim = |(index, key)| self.claim_one(key, times.get(index + 1..).unwrap_or_default());
        Ok(keys.into_iter().enumerate().map(claim).collect())
    }

    pub(super) fn claim_single(&mut self, key: Key<'static>) -> Result<Claim<Grant>> {
        self.check_keys(std::slice::from_ref(&key))?;
        self.claim_one(key, &[])
    }

    fn claim_one(&mut self, key: Key<'static>, later: &[Timestamp]) -> Result<Claim<Grant>> {
        let now = self.advance_to(&key, later)?;
        let (attempt, prior) = match self.find(&key, now)? {
            Found::Available { attempt, prior } => (attempt, prior),
            Found::InProgress(in_progress) => return Ok(Claim::InProgress(in_progress)),
            Found::Completed(completed) => return Ok(Claim::Completed(completed)),
        };
        self.admit_one_more(now)?;
        let until_ms = now.monotonic_ms.saturating_add(millis(self.policy.lease));
        let processing = Processing {
            token: self.next_token(),
            attempt,
            since: self.time_of(&key, now, prior),
            fingerprint: self.fingerprint_of(&key, prior),
            window: window_of(&key, self.policy.window),
            holder: Holder::Leased(Lease { until_ms, keepers: Vec::new() }),
        };
        let info = AttemptInfo::new(processing.token, attempt, prior);
        let grant = Grant::new(key.clone(), info, processing.since, now.monotonic_ms);
        self.keys.insert(key, Entry::Processing(processing));
        Ok(Claim::Acquired(grant))
    }

    /// The time that a key gets: now, or its message's. A later attempt at the same work never gets an earlier time.
    fn time_of(&self, key: &Key<'_>, now: Now, prior: Option<PriorAttempt>) -> Timestamp {
        let time = key.timestamp().unwrap_or(now.time);
        match (prior, self.keys.get(key)) {
            (Some(_), Some(Entry::Processing(processing))) => time.max(processing.since),
            _ => time,
        }
    }

    /// The payload that binds the key: this call's, or that of an earlier attempt that may have had its effect.
    fn fingerprint_of(&self, key: &Key<'_>, prior: Option<PriorAttempt>) -> Option<[u8; 16]> {
        key.payload_fingerprint().copied().or_else(|| match (prior, self.keys.get(key)) {
            (Some(_), Some(Entry::Processing(processing))) => processing.fingerprint,
            _ => None,
        })
    }

    fn admit_one_more(&self, now: Now) -> Result<()> {
        let Config { in_flight_limit, held_limit, .. } = self.config;
        if self.keys.len() < in_flight_limit.min(held_limit) {
            return Ok(());
        }
        let (in_flight, held) = self.count(now);
        if in_flight >= in_flight_limit {
            return Err(Error::TooManyInFlight { in_flight, limit: in_flight_limit });
        }
        if held >= held_limit {
            return Err(Error::TooManyHeld { held, limit: held_limit });
        }
        Ok(())
    }

    /// The number of keys in progress and of held keys.
    fn count(&self, now: Now) -> (usize, usize) {
        self.processing().fold((0, 0), |(in_flight, held), (_, processing)| match processing.state(now, self.policy) {
            Some(LeaseState::Leased(_)) => (in_flight + 1, held),
            Some(LeaseState::Held(_)) => (in_flight, held + 1),
            _ => (in_flight, held),
        })
    }

    fn processing(&self) -> impl Iterator<Item = (&Key<'static>, &Processing)> {
        self.keys.iter().filter_map(|(key, entry)| match entry {
            Entry::Processing(processing) => Some((key, processing)),
            Entry::Completed(_) => None,
        })
    }

    pub(super) fn record(&mut self, keys: Vec<Key<'static>>) -> Answers<RecordOutcome> {
        self.check_keys(&keys)?;
        let times = timestamps(&keys);
        let record = |(index, key)| self.record_one(key, times.get(index + 1..).unwrap_or_default());
        Ok(keys.into_iter().enumerate().map(record).collect())
    }

    fn record_one(&mut self, key: Key<'static>, later: &[Timestamp]) -> Result<RecordOutcome> {
        let now = self.advance_to(&key, later)?;
        let prior = match self.find(&key, now)? {
            Found::Available { prior, .. } => prior,
            Found::InProgress(_) => return Ok(RecordOutcome::Duplicate { in_flight: true }),
            Found::Completed(_) => return Ok(RecordOutcome::Duplicate { in_flight: false }),
        };
        let done = Done {
            token: self.next_token(),
            completed_at: self.time_of(&key, now, prior),
            fingerprint: self.fingerprint_of(&key, prior),
            window: window_of(&key, self.policy.window),
            result: StoredResult::None,
        };
        self.keys.insert(key, Entry::Completed(done));
        Ok(RecordOutcome::First)
    }

    pub(super) fn check(&self, keys: &[Key<'static>]) -> Answers<KeyStatus> {
        self.check_keys(keys)?;
        Ok(keys.iter().map(|key| self.check_one(key)).collect())
    }

    fn check_one(&self, key: &Key<'static>) -> Result<KeyStatus> {
        let now = match (&self.stream, key.timestamp()) {
            (Some(stream), Some(at)) => match stream.preview(at, self.wall_time()) {
                Ok(time) => Now { time, ..self.now() },
                Err(error) => return Err(too_far_ahead(key, at, stream, error)),
            },
            _ => self.now(),
        };
        Ok(match self.find(key, now)? {
            Found::Available { .. } => KeyStatus::New,
            Found::InProgress(in_progress) => KeyStatus::InProgress(in_progress),
            Found::Completed(completed) => KeyStatus::Completed(completed),
        })
    }

    pub(super) fn inspect(&self, key: &Key<'_>) -> Result<Option<StoredKey>> {
        self.check_key(key)?;
        let now = self.now();
        Ok(match self.keys.get(key) {
            Some(Entry::Completed(done)) => done.is_live(now).then(|| StoredKey::Completed(done.to_completed())),
            Some(Entry::Processing(processing)) => processing
                .state(now, self.policy)
                .map(|state| StoredKey::processing(processing.token, processing.attempt, state)),
            None => None,
        })
    }

    pub(super) fn renew(&mut self, grant: &Grant) -> Result<()> {
        let until_ms = self.monotonic_ms().saturating_add(millis(self.policy.lease));
        let lease = self.lease_of(grant).ok_or_else(|| grant.superseded())?;
        lease.until_ms = lease.until_ms.max(until_ms);
        Ok(())
    }

    /// The lease of a grant, also if it expired. `None` if it was finished, dropped, taken over or resolved.
    pub(super) fn lease_of(&mut self, grant: &Grant) -> Option<&mut Lease> {
        match self.keys.get_mut(&grant.key) {
            Some(Entry::Processing(Processing { token, holder: Holder::Leased(lease), .. }))
                if *token == grant.token() =>
            {
                Some(lease)
            }
            _ => None,
        }
    }

    pub(super) fn finish(&mut self, leases: Vec<(Arc<Grant>, Finish)>) -> Vec<Result<()>> {
        let mut batch = self.side_effects.begin();
        leases.into_iter().map(|(grant, finish)| self.finish_one(&grant, finish, &mut batch)).collect()
    }

    /// The token decides, never the clock: to reject a late holder that no other has overtaken would only cause a duplicate.
    fn finish_one(&mut self, grant: &Grant, finish: Finish, batch: &mut Batch) -> Result<()> {
        let now = self.now();
        match (self.keys.get(&grant.key), finish) {
            (Some(Entry::Processing(processing)), finish) if processing.token == grant.token() => {
                let processing = processing.clone();
                match finish {
                    Finish::Complete(completion) => self.complete(grant, &processing, completion, now, batch),
                    Finish::Release(release) => self.release(grant, processing, release, now),
                }
                Ok(())
            }
            // Repeated: it is stored already, and so are its side writes.
            (Some(Entry::Completed(done)), Finish::Complete(_)) if done.token == grant.token() && done.is_live(now) => {
                Ok(())
            }
            (_, finish) => {
                if matches!(finish, Finish::Complete(_)) {
                    batch.hold_back_offsets();
                }
                Err(grant.superseded())
            }
        }
    }

    fn complete(&mut self, grant: &Grant, p: &Processing, completion: Completion, now: Now, batch: &mut Batch) {
        if let Some(side_writes) = completion.side_writes() {
            self.side_effects.store(side_writes, batch);
        }
        let done = Done {
            token: p.token,
            completed_at: if self.policy.is_stream { grant.claimed_at } else { now.time.max(grant.claimed_at) },
            fingerprint: p.fingerprint,
            window: p.window,
            result: self.stored_result(completion.into_result()),
        };
        self.keys.insert(grant.key.clone(), Entry::Completed(done));
    }

    fn stored_result(&self, result: Vec<u8>) -> StoredResult {
        match result.len() > self.config.result_limit {
            true => StoredResult::TooLarge,
            false => StoredResult::Bytes(result.into()),
        }
    }

    fn release(&mut self, grant: &Grant, mut processing: Processing, release: Release, now: Now) {
        // This attempt may have had no effect: whether an earlier one had is still open.
        let doubt = grant.attempt.prior().filter(|prior| prior.may_have_happened());
        let prior = doubt.unwrap_or(match release.may_have_happened {
            true => PriorAttempt::Dropped,
            false => PriorAttempt::Released,
        });
        // The attempt that follows must find this one: it is remembered for a window.
        let backoff_ms = millis(release.backoff).min(millis(self.policy.window) / 2);
        let until_ms = if backoff_ms == 0 { 0 } else { now.monotonic_ms.saturating_add(backoff_ms) };
        processing.since = processing.left_at(now, self.policy);
        processing.fingerprint = processing.fingerprint.filter(|_| prior.may_have_happened());
        processing.attempt = if release.reset_attempts { 0 } else { processing.attempt };
        processing.holder = Holder::Open { prior, until_ms };
        self.keys.insert(grant.key.clone(), Entry::Processing(processing));
    }

    pub(super) fn abandon(&mut self, grant: &Grant) {
        let (now, policy) = (self.now(), self.policy);
        if let Some(Entry::Processing(processing)) = self.keys.get_mut(&grant.key)
            && processing.token == grant.token()
        {
            processing.interrupt(now, policy);
        }
    }

    pub(super) fn held(&self) -> Vec<HeldKey> {
        let now = self.now();
        let mut held: Vec<HeldKey> = self
            .processing()
            .filter_map(|(key, it)| match it.state(now, self.policy) {
                Some(LeaseState::Held(prior)) => Some(HeldKey::new(key.clone(), it.token, it.attempt, prior, it.since)),
                _ => None,
            })
            .collect();
        held.sort_by_key(|held| held.token);
        held
    }

    pub(super) fn resolve(&mut self, key: Key<'static>, resolution: Resolution) -> Result<()> {
        self.check_key(&key)?;
        let now = self.now();
        let Some(Entry::Processing(processing)) = self.keys.get(&key) else {
            return Err(Error::NotHeld { key: key.to_string() });
        };
        let Some(LeaseState::Held(prior)) = processing.state(now, self.policy) else {
            return Err(Error::NotHeld { key: key.to_string() });
        };
        let (processing, since) = (processing.clone(), processing.left_at(now, self.policy));
        let entry = match resolution {
            Resolution::Rerun => Entry::Processing(Processing { since, holder: Holder::Resolved(prior), ..processing }),
            // With a token of its own, so that the old holder's late completion fails.
            Resolution::Completed(result) => Entry::Completed(Done {
                token: self.next_token(),
                completed_at: since,
                fingerprint: processing.fingerprint,
                window: processing.window,
                result: self.stored_result(result),
            }),
        };
        self.keys.insert(key, entry);
        Ok(())
    }

    pub(super) fn forget(&mut self, key: &Key<'static>) -> Result<bool> {
        self.check_key(key)?;
        let now = self.now();
        let counted = match self.keys.get(key) {
            None => false,
            Some(Entry::Completed(done)) => done.is_live(now),
            Some(Entry::Processing(processing)) => {
                let token = processing.token;
                match processing.state(now, self.policy) {
                    Some(LeaseState::Leased(_)) => return Err(Error::InUse { key: key.to_string(), token }),
                    Some(LeaseState::Held(_)) => return Err(Error::Undecided { key: key.to_string(), token }),
                    state => state.is_some(),
                }
            }
        };
        self.keys.remove(key);
        Ok(counted)
    }

    /// Ends the lease of a key, and its renewal. False if it has none.
    pub(super) fn expire_lease(&mut self, key: &Key<'static>) -> bool {
        let monotonic_ms = self.monotonic_ms();
        match self.keys.get_mut(key) {
            Some(Entry::Processing(Processing { holder: Holder::Leased(lease), .. })) => {
                *lease = Lease { until_ms: lease.until_ms.min(monotonic_ms), keepers: Vec::new() };
                true
            }
            _ => false,
        }
    }

    /// Ends the renewal of all leases.
    pub(super) fn stop_renewals(&mut self) {
        let until_ms = self.monotonic_ms().saturating_add(millis(self.policy.lease));
        for entry in self.keys.values_mut() {
            if let Entry::Processing(Processing { holder: Holder::Leased(lease), .. }) = entry
                && !lease.keepers.is_empty()
            {
                *lease = Lease { until_ms, keepers: Vec::new() };
            }
        }
    }

    pub(super) fn limits(&self) -> Limits {
        Limits::new(self.config.result_limit, self.config.key_limit, self.policy.is_stream)
    }

    pub(super) fn stats(&self) -> EngineStats {
        let (in_flight, held) = self.count(self.now());
        EngineStats::new(in_flight as u64, held as u64)
    }
}

fn timestamps(keys: &[Key<'_>]) -> Vec<Timestamp> {
    keys.iter().filter_map(Key::timestamp).collect()
}

fn too_old(key: &Key<'_>, at: Timestamp, now: Now, window: Duration) -> Error {
    let window = window_of(key, window);
    // The first millisecond that a window from it on reaches beyond now.
    let remembers_since = now.time.as_unix_ms().saturating_sub(millis(window)).saturating_add(1);
    let remembers_since = Timestamp::from_unix_ms(remembers_since);
    TimestampError::TooOld { key: key.to_string(), at, remembers_since }.into()
}

fn too_far_ahead(key: &Key<'_>, at: Timestamp, stream: &StreamTime, error: TooFarAhead) -> Error {
    let (stream_time, max_ahead) = (stream.now(), stream.max_ahead());
    TimestampError::TooFarAhead { key: key.to_string(), at, stream_time, max_ahead, in_future: error.in_future }.into()
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
