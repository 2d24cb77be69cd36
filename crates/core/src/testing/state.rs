//! The store itself: one map, and one function a verb. The caller holds the lock. `finishing.rs` has the verbs of leases.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::builder::{Config, MAX_KEY};
use super::entry::{Stored, completed, key_request};
use super::failure::Failure;
use super::side_writes::StoredSideWrites;
use super::stream_time::{StreamTime, TooFarAhead};
use crate::answer::{Claim, Completed, InProgress, KeyStatus, RecordOutcome, StoredKey};
use crate::attempt::{AttemptInfo, FencingToken};
use crate::engine::{Answers, EngineStats, Grant, Limits};
use crate::error::{Error, Result, TimestampError};
use crate::key::Key;
use crate::machine::{
    self, Acquired, Change, Decision, Entry, LeaseState, Op, Opened, PlainMoment, Policy, Record, millis,
};
use crate::timestamp::Timestamp;

#[derive(Debug)]
pub(super) struct State {
    pub(super) config: Config,
    pub(super) policy: Policy,
    pub(super) lease_ms: u64,
    pub(super) failure: Failure,
    pub(super) side_writes: StoredSideWrites,
    pub(super) fail_open: u64,
    pub(super) keys: HashMap<Key<'static>, Stored>,
    stream: Option<StreamTime>,
    started: Instant,
    started_at: Timestamp,
    last_token: u64,
}

/// What a claim, a check or a record finds.
enum Found<A> {
    Available(A),
    InProgress(InProgress),
    Completed(Completed),
}

impl State {
    pub(super) fn new(config: Config) -> Self {
        let policy = Policy {
            window_ms: millis(config.window),
            on_interrupt: config.on_interrupt,
            is_stream: config.max_ahead.is_some(),
            opened: Opened::at(PlainMoment::default()),
            first_token: 1,
        };
        Self {
            policy,
            lease_ms: millis(config.lease),
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

    pub(super) fn now(&self) -> PlainMoment {
        let time = self.stream.as_ref().map_or_else(|| self.wall_time(), StreamTime::now);
        PlainMoment { time_ms: time.as_unix_ms(), monotonic_ms: self.monotonic_ms() }
    }

    pub(super) fn next_token(&mut self) -> u64 {
        self.last_token += 1;
        self.last_token
    }

    /// The entry of a key at this moment.
    pub(super) fn stored(&self, key: &Key<'_>, now: PlainMoment) -> Option<Entry> {
        self.keys.get(key).map(|stored| stored.at(now, self.lease_ms))
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
    fn advance_to(&mut self, key: &Key<'_>, later: &[Timestamp]) -> Result<PlainMoment> {
        let (now, wall) = (self.now(), self.wall_time());
        match (&mut self.stream, key.timestamp()) {
            (Some(stream), Some(at)) => match stream.advance(at, later, wall) {
                Ok(time) => Ok(PlainMoment { time_ms: time.as_unix_ms(), ..now }),
                Err(error) => Err(too_far_ahead(key, at, stream, error)),
            },
            _ => Ok(now),
        }
    }

    /// Executes an operation on a key. Every change takes effect at once: nothing is written.
    pub(super) fn execute<O: Op, R>(
        &mut self,
        key: &Key<'static>,
        op: O,
        now: PlainMoment,
        answer: impl FnOnce(&Self, O::Answer<'_>) -> Result<R>,
    ) -> Result<R> {
        self.execute_admitted(key, op, now, |_| Ok(()), answer)
    }

    /// As [`State::execute`]. An error of `admit` ends an operation that would begin an attempt.
    fn execute_admitted<O: Op, R>(
        &mut self,
        key: &Key<'static>,
        op: O,
        now: PlainMoment,
        admit: impl FnOnce(&mut Self) -> Result<()>,
        answer: impl FnOnce(&Self, O::Answer<'_>) -> Result<R>,
    ) -> Result<R> {
        let (stored, policy) = (self.stored(key, now), self.policy);
        let step = machine::step(stored.as_ref(), op, now, policy, || admit(self).map(|()| self.next_token()))?;
        let answer = answer(self, step.answer);
        match step.change {
            Change::None => {}
            // Whatever renews the lease goes on.
            Change::InMemory(processing) => {
                if let Some(stored) = self.keys.get_mut(key) {
                    stored.entry = Entry::Processing(processing);
                }
            }
            Change::Immediate(event) | Change::OnceWritten { event, .. } => match event.into_entry() {
                Some(entry) => drop(self.keys.insert(key.clone(), Stored::new(entry))),
                None => drop(self.keys.remove(key)),
            },
        }
        answer
    }

    fn found<A>(&self, key: &Key<'_>, decision: Decision<'_, A>, now: PlainMoment) -> Result<Found<A>> {
        match decision {
            Decision::Available(available) => Ok(Found::Available(available)),
            Decision::InProgress { retry_after_ms, attempt } => {
                Ok(Found::InProgress(InProgress::new(retry_after_ms.map(Duration::from_millis), attempt)))
            }
            Decision::Completed(done) => Ok(Found::Completed(completed(done, self.policy.window_ms))),
            Decision::PayloadMismatch => Err(Error::PayloadMismatch { key: key.to_string() }),
            Decision::TooOld => Err(too_old(key, now, self.policy.window_ms)),
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
        let until_monotonic_ms = now.monotonic_ms.saturating_add(self.lease_ms);
        let claim = machine::Claim { request: key_request(&key), until_monotonic_ms };
        let admit = |state: &mut Self| state.admit_one_more(now);
        self.execute_admitted(&key, claim, now, admit, |state, decision| {
            Ok(match state.found(&key, decision, now)? {
                Found::Available(acquired) => Claim::Acquired(grant(key.clone(), &acquired, now)),
                Found::InProgress(in_progress) => Claim::InProgress(in_progress),
                Found::Completed(completed) => Claim::Completed(completed),
            })
        })
    }

    fn admit_one_more(&self, now: PlainMoment) -> Result<()> {
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
    fn count(&self, now: PlainMoment) -> (usize, usize) {
        self.keys.values().fold((0, 0), |(in_flight, held), stored| match self.lease_state(stored, now) {
            Some(LeaseState::Active { .. }) => (in_flight + 1, held),
            Some(LeaseState::Held(_)) => (in_flight, held + 1),
            _ => (in_flight, held),
        })
    }

    /// The state of a claimed key.
    fn lease_state(&self, stored: &Stored, now: PlainMoment) -> Option<LeaseState> {
        match stored.at(now, self.lease_ms) {
            Entry::Processing(processing) => Some(machine::lease_state(&processing, now, self.policy)),
            Entry::Completed(_) => None,
        }
    }

    pub(super) fn record(&mut self, keys: Vec<Key<'static>>) -> Answers<RecordOutcome> {
        self.check_keys(&keys)?;
        let times = timestamps(&keys);
        let record = |(index, key)| self.record_one(key, times.get(index + 1..).unwrap_or_default());
        Ok(keys.into_iter().enumerate().map(record).collect())
    }

    fn record_one(&mut self, key: Key<'static>, later: &[Timestamp]) -> Result<RecordOutcome> {
        let now = self.advance_to(&key, later)?;
        self.execute(&key, Record { request: key_request(&key) }, now, |state, decision| {
            Ok(match state.found(&key, decision, now)? {
                Found::Available(_) => RecordOutcome::First,
                Found::InProgress(_) => RecordOutcome::Duplicate { in_flight: true },
                Found::Completed(_) => RecordOutcome::Duplicate { in_flight: false },
            })
        })
    }

    pub(super) fn check(&self, keys: &[Key<'static>]) -> Answers<KeyStatus> {
        self.check_keys(keys)?;
        Ok(keys.iter().map(|key| self.check_one(key)).collect())
    }

    fn check_one(&self, key: &Key<'static>) -> Result<KeyStatus> {
        let now = match (&self.stream, key.timestamp()) {
            (Some(stream), Some(at)) => match stream.preview(at, self.wall_time()) {
                Ok(time) => PlainMoment { time_ms: time.as_unix_ms(), ..self.now() },
                Err(error) => return Err(too_far_ahead(key, at, stream, error)),
            },
            _ => self.now(),
        };
        let stored = self.stored(key, now);
        let decision = machine::decide(stored.as_ref(), key_request(key), now, self.policy);
        Ok(match self.found(key, decision, now)? {
            Found::Available(_) => KeyStatus::New,
            Found::InProgress(in_progress) => KeyStatus::InProgress(in_progress),
            Found::Completed(completed) => KeyStatus::Completed(completed),
        })
    }

    pub(super) fn inspect(&self, key: &Key<'_>) -> Result<Option<StoredKey>> {
        self.check_stored_key(key)?;
        let now = self.now();
        let counting = self.stored(key, now).filter(|entry| machine::counts(entry, now, self.policy));
        Ok(counting.map(|entry| match entry {
            Entry::Completed(done) => StoredKey::Completed(completed(&done, self.policy.window_ms)),
            Entry::Processing(processing) => StoredKey::processing(
                FencingToken::new(processing.token),
                processing.attempt,
                machine::lease_state(&processing, now, self.policy).into(),
            ),
        }))
    }

    pub(super) fn limits(&self) -> Limits {
        Limits::new(self.config.result_limit, self.config.key_limit, self.policy.is_stream)
    }

    pub(super) fn stats(&self) -> EngineStats {
        let (in_flight, held) = self.count(self.now());
        EngineStats::new(in_flight as u64, held as u64)
    }
}

/// The grant of a claim that acquired the key.
fn grant(key: Key<'static>, acquired: &Acquired, now: PlainMoment) -> Grant {
    let info = AttemptInfo::new(FencingToken::new(acquired.token), acquired.attempt, acquired.prior);
    let claimed_at = Timestamp::from_unix_ms(acquired.since_ms);
    Grant::new(key.with_fingerprint(acquired.fingerprint), info, claimed_at, now.monotonic_ms)
}

fn timestamps(keys: &[Key<'_>]) -> Vec<Timestamp> {
    keys.iter().filter_map(Key::timestamp).collect()
}

fn too_old(key: &Key<'_>, now: PlainMoment, window_ms: u64) -> Error {
    let window_ms = key_request(key).own_window.within(window_ms);
    // The first millisecond that a window from it on reaches beyond now.
    let remembers_since = Timestamp::from_unix_ms(now.time_ms.saturating_sub(window_ms).saturating_add(1));
    TimestampError::TooOld { key: key.to_string(), at: key.timestamp().unwrap_or_default(), remembers_since }.into()
}

fn too_far_ahead(key: &Key<'_>, at: Timestamp, stream: &StreamTime, error: TooFarAhead) -> Error {
    let (stream_time, max_ahead) = (stream.now(), stream.max_ahead());
    TimestampError::TooFarAhead { key: key.to_string(), at, stream_time, max_ahead, in_future: error.in_future }.into()
}
