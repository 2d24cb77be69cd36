//! Random operations, compared with a plain map.
//!
//! The model follows the documented state table, not the code: a map from each key to its expected state, and the expected
//! answer of each operation. `ONLYONCE_MODEL_ROUNDS` (default 60) sets the rounds; a failure prints its seed, which
//! `ONLYONCE_MODEL_SEED` repeats alone.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::common::{Bench, START_MS};
use onlyonce::{Claim, Error, Key, KeyStatus, Lease, OnInterrupt, PriorAttempt, RecordOutcome, Resolution, Timestamp};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, RngExt, SeedableRng};

const WINDOW_MS: u64 = 10_000;
const LEASE_MS: u64 = 1_000;
const RESULT_LIMIT: usize = 8;
const STEPS: usize = 400;

#[derive(Debug, Clone, PartialEq)]
enum Known {
    Processing { token: u64, attempt: u32, payload: Option<u8>, window_ms: u64, holder: Holder },
    Completed { at_ms: u64, result: Option<Vec<u8>>, omitted: bool, payload: Option<u8>, window_ms: u64 },
}

#[derive(Debug, Clone, PartialEq)]
enum Holder {
    Leased {
        until_ms: u64,
    },
    /// Interrupted at this time or later; after a restart the store assumes a later time.
    Interrupted {
        priors: Vec<PriorAttempt>,
        since_ms: u64,
    },
    Open {
        prior: Vec<PriorAttempt>,
        since_ms: u64,
        not_before_ms: u64,
    },
}

/// The expected answer to a claim.
#[derive(Debug, PartialEq)]
enum Expected {
    New,
    /// Acquired again; or as new, if no call used the key for a window.
    Again {
        attempt: u32,
        priors: Vec<PriorAttempt>,
        or_new: bool,
    },
    InProgress {
        attempt: u32,
        retry_after_ms: Option<u64>,
    },
    Completed,
    Mismatch,
}

struct Model {
    known: BTreeMap<String, Known>,
    now_ms: u64,
    on_interrupt: OnInterrupt,
    last_token: u64,
}

impl Model {
    fn expect(&self, key: &str, payload: Option<u8>) -> Expected {
        let Some(known) = self.known.get(key) else { return Expected::New };
        let (first, expected) = match known {
            Known::Completed { at_ms, window_ms, .. } if self.now_ms >= at_ms + window_ms => return Expected::New,
            Known::Completed { payload, .. } => (*payload, Expected::Completed),
            Known::Processing { attempt, payload, holder, .. } => {
                let attempt = *attempt;
                let interrupted = |priors: &[PriorAttempt], since_ms: u64| match self.on_interrupt {
                    OnInterrupt::Hold => Expected::InProgress { attempt, retry_after_ms: None },
                    OnInterrupt::Rerun => Expected::Again {
                        attempt: attempt + 1,
                        priors: priors.to_vec(),
                        or_new: self.now_ms >= since_ms + WINDOW_MS,
                    },
                };
                let expected = match holder {
                    Holder::Leased { until_ms } if self.now_ms < *until_ms => {
                        Expected::InProgress { attempt, retry_after_ms: Some(until_ms - self.now_ms) }
                    }
                    Holder::Leased { until_ms } => interrupted(&[PriorAttempt::LeaseExpired], *until_ms),
                    Holder::Interrupted { priors, since_ms } => interrupted(priors, *since_ms),
                    Holder::Open { since_ms, .. } if self.now_ms >= since_ms + WINDOW_MS => return Expected::New,
                    Holder::Open { not_before_ms, .. } if self.now_ms < *not_before_ms => {
                        Expected::InProgress { attempt, retry_after_ms: Some(not_before_ms - self.now_ms) }
                    }
                    Holder::Open { prior, .. } => {
                        Expected::Again { attempt: attempt + 1, priors: prior.clone(), or_new: false }
                    }
                };
                (*payload, expected)
            }
        };
        match (first, payload) {
            (Some(first), Some(this)) if first != this => match expected {
                Expected::Again { or_new: true, .. } => {
                    Expected::Again { attempt: 0, priors: Vec::new(), or_new: true }
                }
                _ => Expected::Mismatch,
            },
            _ => expected,
        }
    }

    fn is_held(&self, key: &str) -> bool {
        matches!(self.expect(key, None), Expected::InProgress { retry_after_ms: None, .. })
    }

    /// True if an attempt may have expired, so that its token may be unknown.
    fn may_be_forgotten(&self, key: &str) -> bool {
        matches!(self.expect(key, None), Expected::Again { or_new: true, .. } | Expected::New)
    }

    /// The store granted the key, as expected.
    fn acquired(&mut self, key: &str, asked: Asked, lease: &Lease) {
        let stored = match self.known.get(key) {
            Some(Known::Processing { payload, .. }) if lease.attempt().prior().is_some() => *payload,
            _ => None,
        };
        self.known.insert(
            key.to_owned(),
            Known::Processing {
                token: lease.token().get(),
                attempt: lease.attempt().number(),
                payload: asked.payload.or(stored),
                window_ms: asked.remembered_ms(),
                holder: Holder::Leased { until_ms: self.now_ms + LEASE_MS },
            },
        );
    }
}

struct HeldKey {
    key: String,
    lease: Lease,
}

struct Round {
    // Before the store's directory, so that they are dropped first: a lease keeps its store open.
    leases: Vec<HeldKey>,
    bench: Bench,
    model: Model,
    rng: StdRng,
}

/// What a call says about its key.
#[derive(Debug, Clone, Copy, Default)]
struct Asked {
    payload: Option<u8>,
    own_window_ms: Option<u64>,
}

impl Asked {
    fn key(self, key: &str) -> Key<'_> {
        let key = match self.payload {
            Some(payload) => Key::from(key).fingerprint([payload]),
            None => Key::from(key),
        };
        match self.own_window_ms {
            Some(ms) => key.window(Duration::from_millis(ms)),
            None => key,
        }
    }

    /// How long the key is remembered once it is completed.
    fn remembered_ms(self) -> u64 {
        self.own_window_ms.map_or(WINDOW_MS, |own_ms| own_ms.min(WINDOW_MS))
    }
}

impl Round {
    fn new(seed: u64) -> Self {
        let on_interrupt = if seed.is_multiple_of(2) { OnInterrupt::Rerun } else { OnInterrupt::Hold };
        let bench = match on_interrupt {
            OnInterrupt::Rerun => Bench::with(|b| b.result_limit(RESULT_LIMIT)),
            OnInterrupt::Hold => Bench::with(|b| b.result_limit(RESULT_LIMIT).on_interrupt(OnInterrupt::Hold)),
        };
        let model = Model { known: BTreeMap::new(), now_ms: START_MS, on_interrupt, last_token: 0 };
        Self { bench, model, leases: Vec::new(), rng: StdRng::seed_from_u64(seed) }
    }

    fn key(&mut self) -> String {
        format!("key-{}", self.rng.random_range(0..12))
    }

    fn asked(&mut self) -> Asked {
        let payload = *[None, None, None, Some(1), Some(1), Some(2)].choose(&mut self.rng).unwrap();
        let own_windows =
            [None, None, None, None, Some(1), Some(2), Some(1_000), Some(3_000), Some(9_999), Some(60_000)];
        Asked { payload, own_window_ms: *own_windows.choose(&mut self.rng).unwrap() }
    }

    fn lease(&mut self) -> Option<HeldKey> {
        if self.leases.is_empty() {
            return None;
        }
        let at = self.rng.random_range(0..self.leases.len());
        Some(self.leases.swap_remove(at))
    }

    fn step(&mut self) {
        match self.rng.random_range(0..100) {
            0..22 => self.claim(),
            22..28 => self.claim_batch(),
            28..38 => self.complete(),
            38..41 => self.complete_batch(),
            41..46 => self.release(),
            46..50 => self.drop_lease(),
            50..55 => self.renew(),
            55..61 => self.record(),
            61..65 => self.record_batch(),
            65..71 => self.check(),
            71..75 => self.forget(),
            75..79 => self.resolve(),
            79..82 => self.held(),
            82..92 => self.advance(),
            92..97 => self.bench.store().flush().unwrap(),
            _ => self.reopen(),
        }
    }

    fn claim(&mut self) {
        let (key, asked) = (self.key(), self.asked());
        let claimed = self.bench.store().claim(asked.key(&key)).wait();
        self.claimed(&key, asked, claimed);
    }

    fn claim_batch(&mut self) {
        let keys: Vec<_> = (0..self.rng.random_range(0..6)).map(|_| (self.key(), self.asked())).collect();
        let requested = keys.iter().map(|(key, asked)| asked.key(key));
        let claimed = self.bench.store().claim_batch(requested).wait().unwrap();
        assert_eq!(claimed.len(), keys.len());
        for ((key, asked), claimed) in keys.iter().zip(claimed) {
            self.claimed(key, *asked, claimed);
        }
    }

    fn claimed(&mut self, key: &str, asked: Asked, claimed: onlyonce::Result<Claim>) {
        let expected = self.model.expect(key, asked.payload);
        match (&expected, claimed) {
            (Expected::New, Ok(Claim::Acquired(lease))) => {
                assert_eq!((lease.attempt().number(), lease.attempt().prior()), (1, None), "{key}");
                self.acquired(key, asked, lease);
            }
            (Expected::Again { attempt, priors, or_new }, Ok(Claim::Acquired(lease))) => {
                let again = lease.attempt().number() == *attempt
                    && lease.attempt().prior().is_some_and(|prior| priors.contains(&prior));
                let new = *or_new && lease.attempt().number() == 1 && lease.attempt().prior().is_none();
                assert!(again || new, "{key}: {lease:?} where {expected:?}");
                self.acquired(key, asked, lease);
            }
            (Expected::InProgress { attempt, retry_after_ms }, Ok(Claim::InProgress(other))) => {
                assert_eq!(other.attempt, *attempt, "{key}");
                assert_eq!(other.retry_after, retry_after_ms.map(Duration::from_millis), "{key}");
            }
            (Expected::Completed, Ok(Claim::Completed(completed))) => self.assert_completed(key, &completed),
            (Expected::Mismatch | Expected::Again { or_new: true, .. }, Err(Error::PayloadMismatch { .. })) => {}
            (_, claimed) => panic!("{key}: {claimed:?} where {expected:?}"),
        }
    }

    fn acquired(&mut self, key: &str, asked: Asked, lease: Lease) {
        assert!(lease.token().get() > self.model.last_token, "tokens increase");
        self.model.last_token = lease.token().get();
        self.model.acquired(key, asked, &lease);
        self.leases.push(HeldKey { key: key.to_owned(), lease });
    }

    fn assert_completed(&self, key: &str, completed: &onlyonce::Completed) {
        let Some(Known::Completed { at_ms, result, omitted, window_ms, .. }) = self.model.known.get(key) else {
            panic!("{key} was not completed")
        };
        assert_eq!(completed.result(), result.as_deref(), "{key}");
        assert_eq!(completed.is_result_too_large(), *omitted, "{key}");
        assert_eq!(completed.completed_at().as_unix_ms(), *at_ms, "{key}");
        assert_eq!(completed.remembered_until().as_unix_ms(), at_ms + window_ms, "{key}");
    }

    fn result(&mut self) -> Vec<u8> {
        let mut result = vec![0; self.rng.random_range(0..RESULT_LIMIT + 3)];
        self.rng.fill_bytes(&mut result);
        result
    }

    /// The expected answer to the end of a lease. `None` if both answers are correct.
    fn settles(&self, held: &HeldKey) -> Option<bool> {
        match self.model.known.get(&held.key) {
            Some(Known::Processing { token, .. }) if *token == held.lease.token().get() => {
                if self.model.may_be_forgotten(&held.key) { None } else { Some(true) }
            }
            _ => Some(false),
        }
    }

    fn completed(
        &mut self,
        key: &str,
        expected: Option<bool>,
        result: &[u8],
        answer: Result<(), onlyonce::CompleteError>,
    ) {
        match answer {
            Ok(()) => {
                assert_ne!(expected, Some(false), "{key} was completed by a superseded lease");
                let (payload, window_ms) = match self.model.known.get(key) {
                    Some(Known::Processing { payload, window_ms, .. }) => (*payload, *window_ms),
                    known => panic!("{key} was completed, and is {known:?}"),
                };
                let omitted = result.len() > RESULT_LIMIT;
                let result = (!omitted).then(|| result.to_vec());
                let at_ms = self.model.now_ms;
                self.model
                    .known
                    .insert(key.to_owned(), Known::Completed { at_ms, result, omitted, payload, window_ms });
            }
            Err(error) => {
                assert_ne!(expected, Some(true), "{key}: {error}");
                assert!(matches!(error.error(), Error::Superseded { .. }), "{error}");
                assert_eq!(error.completion().result(), result, "the error returns the result");
            }
        }
    }

    fn complete(&mut self) {
        let Some(held) = self.lease() else { return };
        let (expected, result) = (self.settles(&held), self.result());
        let answer = held.lease.complete(result.clone()).wait();
        self.completed(&held.key, expected, &result, answer);
    }

    fn complete_batch(&mut self) {
        let mut batch = Vec::new();
        while batch.len() < 4
            && let Some(held) = self.lease()
        {
            let (expected, result) = (self.settles(&held), self.result());
            batch.push((held, expected, result));
        }
        let mut requested = Vec::new();
        let mut leases = Vec::new();
        for (held, expected, result) in batch {
            requested.push((held.key, expected, result.clone()));
            leases.push((held.lease, result));
        }
        let answers = self.bench.store().complete_batch(leases).wait();
        assert_eq!(answers.len(), requested.len());
        for ((key, expected, result), answer) in requested.into_iter().zip(answers) {
            self.completed(&key, expected, &result, answer);
        }
    }

    fn release(&mut self) {
        let Some(held) = self.lease() else { return };
        let expected = self.settles(&held);
        let backoff_ms = *[0, 0, 500, 15_000].choose(&mut self.rng).unwrap();
        let doubt = held.lease.attempt().prior();
        match held.lease.release().after(Duration::from_millis(backoff_ms)).wait() {
            Ok(()) => {
                assert_ne!(expected, Some(false), "{}", held.key);
                let now_ms = self.model.now_ms;
                if let Some(Known::Processing { holder, payload, .. }) = self.model.known.get_mut(&held.key) {
                    // The interrupted state is kept for a window after this.
                    let not_before_ms = now_ms + backoff_ms.min(WINDOW_MS / 2);
                    // An unknown outcome persists across releases, and so does the payload.
                    let prior = doubt.unwrap_or(PriorAttempt::Released);
                    if prior == PriorAttempt::Released {
                        *payload = None;
                    }
                    *holder = Holder::Open { prior: vec![prior], since_ms: now_ms, not_before_ms };
                }
            }
            Err(error) => {
                assert_ne!(expected, Some(true), "{}", held.key);
                assert!(matches!(error, Error::Superseded { .. }), "{error}");
            }
        }
    }

    fn drop_lease(&mut self) {
        let Some(held) = self.lease() else { return };
        let HeldKey { key, lease } = held;
        let token = lease.token().get();
        drop(lease);
        let now_ms = self.model.now_ms;
        if let Some(Known::Processing { token: current, holder, .. }) = self.model.known.get_mut(&key)
            && *current == token
            && let Holder::Leased { until_ms } = *holder
        {
            // A lease that expired a window ago may be forgotten, and its drop has no effect.
            let stale = now_ms >= until_ms + WINDOW_MS;
            let priors = if stale {
                vec![PriorAttempt::Dropped, PriorAttempt::LeaseExpired]
            } else {
                vec![PriorAttempt::Dropped]
            };
            *holder = Holder::Interrupted { priors, since_ms: if stale { until_ms } else { now_ms } };
        }
    }

    fn renew(&mut self) {
        let Some(mut held) = self.lease() else { return };
        let expected = match self.model.known.get(&held.key) {
            // After a resolution to rerun, the lease cannot be renewed, but it can be completed.
            Some(Known::Processing { holder: Holder::Open { .. }, .. }) => Some(false),
            _ => self.settles(&held),
        };
        match held.lease.renew() {
            Ok(()) => {
                assert_ne!(expected, Some(false), "{}", held.key);
                let until_ms = self.model.now_ms + LEASE_MS;
                if let Some(Known::Processing { holder, .. }) = self.model.known.get_mut(&held.key) {
                    *holder = Holder::Leased { until_ms };
                }
            }
            Err(error) => {
                assert_ne!(expected, Some(true), "{}", held.key);
                assert!(matches!(error, Error::Superseded { .. }), "{error}");
            }
        }
        self.leases.push(held);
    }

    fn record(&mut self) {
        let (key, asked) = (self.key(), self.asked());
        self.forget_if_uncertain(&key);
        let recorded = self.bench.store().record(asked.key(&key)).wait();
        self.recorded(&key, asked, recorded);
    }

    fn record_batch(&mut self) {
        let keys: Vec<_> = (0..self.rng.random_range(0..6)).map(|_| (self.key(), self.asked())).collect();
        keys.iter().for_each(|(key, _)| self.forget_if_uncertain(key));
        let requested = keys.iter().map(|(key, asked)| asked.key(key));
        let recorded = self.bench.store().record_batch(requested).wait().unwrap();
        assert_eq!(recorded.len(), keys.len());
        for ((key, asked), recorded) in keys.iter().zip(recorded) {
            self.recorded(key, *asked, recorded);
        }
    }

    /// A record does not tell whether it found an expired attempt, whose payload still counts, or none. Removes such a
    /// key from the model and the store.
    fn forget_if_uncertain(&mut self, key: &str) {
        if let Expected::Again { or_new: true, .. } = self.model.expect(key, None) {
            self.bench.store().forget(key).wait().unwrap();
            self.model.known.remove(key);
        }
    }

    fn recorded(&mut self, key: &str, asked: Asked, recorded: onlyonce::Result<RecordOutcome>) {
        let expected = self.model.expect(key, asked.payload);
        match (&expected, recorded) {
            (Expected::New | Expected::Again { .. }, Ok(RecordOutcome::First)) => {
                let stored = match (&expected, self.model.known.get(key)) {
                    (Expected::Again { .. }, Some(Known::Processing { payload, .. })) => *payload,
                    _ => None,
                };
                let known = Known::Completed {
                    at_ms: self.model.now_ms,
                    result: None,
                    omitted: false,
                    payload: asked.payload.or(stored),
                    window_ms: asked.remembered_ms(),
                };
                self.model.known.insert(key.to_owned(), known);
            }
            (Expected::InProgress { .. }, Ok(RecordOutcome::Duplicate { in_flight: true }))
            | (Expected::Completed, Ok(RecordOutcome::Duplicate { in_flight: false }))
            | (Expected::Mismatch | Expected::Again { or_new: true, .. }, Err(Error::PayloadMismatch { .. })) => {}
            (_, recorded) => panic!("{key}: {recorded:?} where {expected:?}"),
        }
    }

    fn check(&mut self) {
        let (key, asked) = (self.key(), self.asked());
        let expected = self.model.expect(&key, asked.payload);
        match (&expected, self.bench.store().check(asked.key(&key)).wait()) {
            (Expected::New | Expected::Again { .. }, Ok(KeyStatus::New))
            | (Expected::InProgress { .. }, Ok(KeyStatus::InProgress(_)))
            | (Expected::Mismatch | Expected::Again { or_new: true, .. }, Err(Error::PayloadMismatch { .. })) => {}
            (Expected::Completed, Ok(KeyStatus::Completed(completed))) => self.assert_completed(&key, &completed),
            (_, checked) => panic!("{key}: {checked:?} where {expected:?}"),
        }
    }

    fn forget(&mut self) {
        let key = self.key();
        let expected = self.model.expect(&key, None);
        let is_leased = matches!(
            (self.model.known.get(&key), &expected),
            (
                Some(Known::Processing { holder: Holder::Leased { .. }, .. }),
                Expected::InProgress { retry_after_ms: Some(_), .. }
            )
        );
        let held = self.model.is_held(&key);
        match self.bench.store().forget(&key).wait() {
            Ok(there) => {
                assert!(!is_leased && !held, "{key} was forgotten during its lease, or before its resolution");
                match expected {
                    Expected::New => assert!(!there, "{key}"),
                    Expected::Again { or_new: true, .. } => {}
                    _ => assert!(there, "{key}"),
                }
                self.model.known.remove(&key);
            }
            Err(Error::InUse { .. }) => assert!(is_leased, "{key} is not in use"),
            Err(Error::Undecided { .. }) => assert!(held, "{key} is not held"),
            Err(error) => panic!("{key}: {error}"),
        }
    }

    fn resolve(&mut self) {
        let key = self.key();
        let held = self.model.is_held(&key);
        let (resolution, result) = if self.rng.random_bool(0.5) {
            (Resolution::Rerun, None)
        } else {
            let result = self.result();
            (Resolution::Completed(result.clone()), Some(result))
        };
        match self.bench.store().resolve(&key, resolution).wait() {
            Err(Error::NotHeld { .. }) => assert!(!held, "{key} is held"),
            Err(error) => panic!("{key}: {error}"),
            Ok(()) => {
                assert!(held, "{key} is not held");
                match result {
                    Some(result) => self.completed(&key, Some(true), &result, Ok(())),
                    None => {
                        let now_ms = self.model.now_ms;
                        if let Some(Known::Processing { holder, .. }) = self.model.known.get_mut(&key) {
                            let prior = match &holder {
                                Holder::Interrupted { priors, .. } => priors.clone(),
                                _ => vec![PriorAttempt::LeaseExpired],
                            };
                            *holder = Holder::Open { prior, since_ms: now_ms, not_before_ms: 0 };
                        }
                    }
                }
            }
        }
    }

    fn held(&mut self) {
        let held = self.bench.store().held().wait().unwrap();
        let listed: Vec<String> =
            held.iter().map(|held| String::from_utf8(held.key.as_bytes().to_vec()).unwrap()).collect();
        let mut expected: Vec<(u64, &String)> = Vec::new();
        for (key, known) in &self.model.known {
            if let Known::Processing { token, .. } = known
                && self.model.is_held(key)
            {
                expected.push((*token, key));
            }
        }
        expected.sort_unstable();
        assert_eq!(listed, expected.into_iter().map(|(_, key)| key.clone()).collect::<Vec<_>>());
    }

    fn advance(&mut self) {
        if self.rng.random_bool(0.3) {
            self.read_a_wrong_clock();
        }
        let ms = *[1, 10, 400, 999, 1_000, 3_000, 9_999, 25_000].choose(&mut self.rng).unwrap();
        self.bench.advance_ms(ms);
        self.model.now_ms += ms;
    }

    /// Lets the store read a wrong wall clock once, which must have no effect.
    fn read_a_wrong_clock(&mut self) {
        let right_ms = self.model.now_ms;
        let wrong_ms =
            *[0, right_ms - 3_600_000, right_ms + 3_600_000, 4_080_000_000_000].choose(&mut self.rng).unwrap();
        self.bench.clock.set_wall(Timestamp::from_unix_ms(wrong_ms));
        self.bench.store().check("any key").wait().unwrap();
        if self.rng.random_bool(0.2) {
            self.bench.store().flush().unwrap();
        }
        self.bench.clock.set_wall(Timestamp::from_unix_ms(right_ms));
    }

    fn reopen(&mut self) {
        if self.rng.random_bool(0.5) {
            self.leases.clear();
        }
        self.bench.reopen();
        let now_ms = self.model.now_ms;
        for known in self.model.known.values_mut() {
            if let Known::Processing { holder, .. } = known {
                match holder {
                    Holder::Leased { until_ms } => {
                        let since_ms = (*until_ms).min(now_ms);
                        *holder = Holder::Interrupted {
                            priors: vec![PriorAttempt::Crashed, PriorAttempt::Dropped],
                            since_ms,
                        };
                    }
                    // Whether the drop reached the disk depends on the last flush.
                    Holder::Interrupted { priors, .. } => priors.push(PriorAttempt::Crashed),
                    Holder::Open { .. } => {}
                }
            }
        }
        self.leases.clear();
    }

    fn run(&mut self) {
        for _ in 0..STEPS {
            self.step();
        }
        self.reopen();
        for i in 0..12 {
            let key = format!("key-{i}");
            let claimed = self.bench.store().claim(&key).wait();
            self.claimed(&key, Asked::default(), claimed);
        }
    }
}

fn env(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().expect(name))
}

#[test]
fn random_operations_give_the_answers_of_a_plain_map() {
    if let Some(seed) = env("ONLYONCE_MODEL_SEED") {
        return Round::new(seed).run();
    }
    for seed in 0..env("ONLYONCE_MODEL_ROUNDS").unwrap_or(60) {
        let round = std::panic::AssertUnwindSafe(|| Round::new(seed).run());
        if let Err(panic) = std::panic::catch_unwind(round) {
            eprintln!("ONLYONCE_MODEL_SEED={seed} fails");
            std::panic::resume_unwind(panic);
        }
    }
}
