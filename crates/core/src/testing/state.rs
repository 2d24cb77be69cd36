//! The store itself: one map, and one function a verb. The caller holds the lock. `finishing.rs` has the verbs of leases.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::builder::{Config, MAX_KEY};
use super::entry::{Done, Entry, Holder, Lease, Now, Policy, Processing, window_of};
use super::failure::Failure;
use super::side_writes::StoredSideWrites;
use super::stream_time::{StreamTime, TooFarAhead};
use crate::answer::{Claim, Completed, InProgress, KeyStatus, LeaseState, RecordOutcome, StoredKey, StoredResult};
use crate::attempt::{AttemptInfo, FencingToken, PriorAttempt};
use crate::engine::{Answers, EngineStats, Grant, Limits};
use crate::error::{Error, Result, TimestampError};
use crate::key::Key;
use crate::timestamp::Timestamp;

#[derive(Debug)]
pub(super) struct State {
    pub(super) config: Config,
    pub(super) policy: Policy,
    pub(super) failure: Failure,
    pub(super) side_writes: StoredSideWrites,
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
            side_writes: StoredSideWrites::default(),
            fail_open: 0,
            keys: HashMap::new(),
            stream: config.max_ahead.map(|max_ahead| StreamTime::new(max_ahead, config.window)),
            started: Instant::now(),
            started_at: SystemTime::now().into(),
            last_token: 0,
            config,
        }
    }

    pub(super) fn monotonic_ms(&self) -> u64 {
        millis(self.started.elapsed())
    }

    fn wall_time(&self) -> Timestamp {
        self.started_at.saturating_add(self.started.elapsed())
    }

    pub(super) fn now(&self) -> Now {
        let time = self.stream.as_ref().map_or_else(|| self.wall_time(), StreamTime::now);
        Now { time, monotonic_ms: self.monotonic_ms() }
    }

    pub(super) fn next_token(&mut self) -> FencingToken {
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

    /// Rejects a key that no store can hold. A stored key may be over the limit of today.
    pub(super) fn check_stored_key(&self, key: &Key<'_>) -> Result<()> {
        Ok(key.encode(MAX_KEY, &mut Vec::new())?)
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
        let grant =
            Grant::new(key.clone().with_fingerprint(processing.fingerprint), info, processing.since, now.monotonic_ms);
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

    pub(super) fn processing(&self) -> impl Iterator<Item = (&Key<'static>, &Processing)> {
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
        self.check_stored_key(key)?;
        let now = self.now();
        Ok(match self.keys.get(key) {
            Some(Entry::Completed(done)) => done.is_live(now).then(|| StoredKey::Completed(done.to_completed())),
            Some(Entry::Processing(processing)) => processing
                .state(now, self.policy)
                .map(|state| StoredKey::processing(processing.token, processing.attempt, state)),
            None => None,
        })
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

pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
