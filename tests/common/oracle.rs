//! Checks the answers of a store that many threads use at the same time, from outside: by tokens, by results, and by
//! the times at which calls start and return. Covers G1, G3 and G4 for concurrent calls.

#![allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use onlyonce::{
    Claim, Clock, Completed, Error, Key, KeyStatus, Lease, ManualClock, PriorAttempt, RecordOutcome, Store,
};

/// A store, and the checks of all its answers.
pub struct Oracle {
    pub store: Store,
    pub clock: ManualClock,
    window_ms: u64,
    lease_ms: u64,
    result_bytes: usize,
    keys: Vec<Mutex<History>>,
    /// The highest token that any call has returned.
    newest_token: AtomicU64,
    pub seen: Seen,
}

/// How often each event happened, so that a test can assert that it happened at all.
#[derive(Debug, Default)]
pub struct Seen {
    pub acquired: AtomicU64,
    pub taken_over: AtomicU64,
    pub dropped: AtomicU64,
    pub released: AtomicU64,
    pub completed: AtomicU64,
    pub superseded: AtomicU64,
    pub recorded: AtomicU64,
    pub forgotten: AtomicU64,
    pub duplicates: AtomicU64,
}

/// A key that this thread has leased.
pub struct Work {
    pub key: usize,
    pub lease: Lease,
}

/// The certain facts about a key.
#[derive(Debug, Default)]
struct History {
    holders: Vec<Holder>,
    /// The known acquisition with the highest token, whether or not it has ended.
    newest: Option<Acquired>,
    /// A completion whose call has returned, without a `forget` that started since.
    done: Option<Done>,
    /// The token and time of an answer `Completed`, without a `forget` that started since.
    answered: Option<(u64, u64)>,
    /// Calls of `forget` that have started, and those that have not returned.
    forgets: u64,
    forgetting: u64,
    /// Completions with this token or a lower one are forgotten.
    dead_token: u64,
}

/// An acquisition that its holder has not started to end.
#[derive(Debug, Clone, Copy)]
struct Holder {
    token: u64,
    /// The lease cannot expire before this time.
    leased_until_ms: u64,
}

#[derive(Debug, Clone, Copy)]
struct Acquired {
    token: u64,
    /// It was acquired before this monotonic time.
    before_ms: u64,
}

#[derive(Debug, Clone, Copy)]
struct Done {
    /// `None` if the key was recorded.
    token: Option<u64>,
    /// It was completed between these two wall times.
    from_ms: u64,
    to_ms: u64,
}

/// The facts at the start of a call.
struct Before {
    wall_ms: u64,
    monotonic_ms: u64,
    newest_token: u64,
    done: Option<Done>,
    holders: Vec<Holder>,
    forgets: u64,
    forgetting: u64,
    dead_token: u64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

pub fn name(key: usize) -> String {
    format!("key-{key}")
}

impl Oracle {
    /// An oracle for `keys` keys of a store with these options.
    pub fn new(
        store: Store,
        clock: ManualClock,
        keys: usize,
        window_ms: u64,
        lease_ms: u64,
        result_bytes: usize,
    ) -> Self {
        let keys = (0..keys).map(|_| Mutex::default()).collect();
        let (newest_token, seen) = (AtomicU64::new(0), Seen::default());
        Self { store, clock, window_ms, lease_ms, result_bytes, keys, newest_token, seen }
    }

    pub fn keys(&self) -> usize {
        self.keys.len()
    }

    /// Every third key has a window of its own.
    fn window_ms(&self, key: usize) -> u64 {
        if key % 3 == 2 { self.window_ms / 2 } else { self.window_ms }
    }

    /// What a call that claims or records the key passes.
    fn with_window(&self, key: usize) -> Key<'static> {
        match self.window_ms(key) {
            ms if ms < self.window_ms => Key::from(name(key)).window(Duration::from_millis(ms)),
            _ => Key::from(name(key)),
        }
    }

    fn history(&self, key: usize) -> MutexGuard<'_, History> {
        self.keys[key].lock().unwrap()
    }

    /// The result of a completion, which contains its key and token.
    fn result(&self, key: usize, token: u64) -> Vec<u8> {
        let mut result = format!("{}:{token}:", name(key)).into_bytes();
        result.resize(result.len().max(self.result_bytes), b'.');
        result
    }

    fn before(&self, key: usize) -> Before {
        let history = self.history(key);
        Before {
            wall_ms: self.clock.wall().as_unix_ms(),
            monotonic_ms: self.clock.monotonic_ms(),
            newest_token: self.newest_token.load(Ordering::SeqCst),
            done: history.done,
            holders: history.holders.clone(),
            forgets: history.forgets,
            forgetting: history.forgetting,
            dead_token: history.dead_token,
        }
    }

    /// The completion that the answer of a call must report, if there is one.
    fn required_completion(&self, key: usize, history: &History, before: &Before) -> Option<Done> {
        let done = before.done.filter(|_| history.forgets == before.forgets)?;
        (self.clock.wall().as_unix_ms() < done.from_ms + self.window_ms(key)).then_some(done)
    }

    fn check_completed(&self, key: usize, before: &Before, answer: &Completed) {
        let mut history = self.history(key);
        let (token, at_ms) = (answer.token().get(), answer.completed_at().as_unix_ms());
        let name = name(key);
        if let Some(result) = answer.result() {
            assert!(result == self.result(key, token), "{name}: the result does not belong to token {token}");
        }
        assert!(token > before.dead_token, "{name}: {token} was returned after it was forgotten");
        assert!(
            at_ms + self.window_ms(key) > before.wall_ms,
            "G4: {name}: {token} of {at_ms} was returned after its window"
        );
        if let Some(done) = self.required_completion(key, &history, before) {
            assert!(done.token.is_none_or(|done| done == token), "G1: {name}: {token} instead of {done:?}");
        }
        // Not if another thread forgets the key at the same time.
        if before.forgetting == 0 && before.forgets == history.forgets {
            if let Some((other, other_ms)) = history.answered {
                let apart_ms = at_ms.abs_diff(other_ms);
                assert!(
                    token == other || apart_ms >= self.window_ms(key),
                    "G3: {name}: completed by {other} and by {token}, {apart_ms} ms apart"
                );
            }
            history.answered = Some((token, at_ms));
        }
        count(&self.seen.duplicates);
    }

    fn check_unfinished(&self, key: usize, before: &Before, answer: &str) {
        let done = self.required_completion(key, &self.history(key), before);
        assert!(done.is_none(), "G1: {} is {answer}, but was completed: {done:?}", name(key));
    }

    fn check_acquired(&self, key: usize, before: &Before, lease: Lease) -> Work {
        self.check_unfinished(key, before, "acquired");
        let (name, token, now_ms) = (name(key), lease.token().get(), self.clock.monotonic_ms());
        assert!(token > before.newest_token, "G3: {name}: {token} after {}", before.newest_token);
        self.newest_token.fetch_max(token, Ordering::SeqCst);
        let ours = Holder { token, leased_until_ms: before.monotonic_ms + self.lease_ms };
        let mut history = self.history(key);
        for other in &history.holders {
            // The earlier lease must have expired when the other was granted, which was before now.
            let earlier = if other.token < token { other } else { &ours };
            assert!(now_ms >= earlier.leased_until_ms, "G3: {name}: two holders, {token} and {}", other.token);
        }
        match history.newest {
            Some(newest) if newest.token > token => {
                assert!(
                    newest.before_ms >= ours.leased_until_ms,
                    "G3: {name}: {token} was taken over during its lease"
                );
            }
            Some(newest) => assert_ne!(newest.token, token, "G3: {name}: the same token twice"),
            None => {}
        }
        if history.newest.is_none_or(|newest| newest.token < token) {
            history.newest = Some(Acquired { token, before_ms: now_ms });
        }
        history.holders.push(ours);
        drop(history);
        assert_eq!(
            lease.attempt().number() == 1,
            lease.attempt().prior().is_none(),
            "{name}: {:?}",
            lease.attempt().prior()
        );
        count(&self.seen.acquired);
        if lease.attempt().prior() == Some(PriorAttempt::LeaseExpired) {
            count(&self.seen.taken_over);
        }
        Work { key, lease }
    }

    fn check_claim(&self, key: usize, before: &Before, claim: Claim) -> Option<Work> {
        match claim {
            Claim::Acquired(lease) => return Some(self.check_acquired(key, before, lease)),
            Claim::Completed(answer) => self.check_completed(key, before, &answer),
            Claim::InProgress(other) => {
                self.check_unfinished(key, before, "in progress");
                assert!(other.retry_after.is_some(), "no key is held here");
            }
        }
        None
    }

    pub fn claim(&self, key: usize) -> Option<Work> {
        let before = self.before(key);
        let claim = self.store.claim(self.with_window(key)).wait().unwrap();
        self.check_claim(key, &before, claim)
    }

    pub fn claim_batch(&self, keys: &BTreeSet<usize>) -> Vec<Work> {
        let before: Vec<Before> = keys.iter().map(|key| self.before(*key)).collect();
        let asked: Vec<Key<'_>> = keys.iter().map(|key| self.with_window(*key)).collect();
        let claims = self.store.claim_batch(&asked).wait().unwrap();
        let judged = keys.iter().zip(&before).zip(claims);
        judged.filter_map(|((key, before), claim)| self.check_claim(*key, before, claim.unwrap())).collect()
    }

    pub fn check(&self, key: usize) {
        let before = self.before(key);
        match self.store.check(name(key)).wait().unwrap() {
            KeyStatus::New => self.check_unfinished(key, &before, "new"),
            KeyStatus::InProgress(_) => self.check_unfinished(key, &before, "in progress"),
            KeyStatus::Completed(answer) => self.check_completed(key, &before, &answer),
        }
    }

    /// Removes the holder: after this other threads may acquire the key.
    fn end_hold(&self, work: &Work) -> Before {
        let before = self.before(work.key);
        let token = work.lease.token().get();
        self.history(work.key).holders.retain(|holder| holder.token != token);
        before
    }

    fn check_end(&self, key: usize, leased_until_ms: u64, outcome: Result<(), Error>) -> bool {
        match outcome {
            Ok(()) => true,
            Err(Error::Superseded { token, .. }) => {
                let now_ms = self.clock.monotonic_ms();
                assert!(now_ms >= leased_until_ms, "G3: {}: {token} was superseded during its lease", name(key));
                count(&self.seen.superseded);
                false
            }
            Err(other) => panic!("{}: {other}", name(key)),
        }
    }

    fn add_completion(&self, key: usize, before: &Before, token: Option<u64>) {
        let done = Done { token, from_ms: before.wall_ms, to_ms: self.clock.wall().as_unix_ms() };
        let mut history = self.history(key);
        if before.forgetting > 0 || history.forgets != before.forgets {
            // It is unknown whether the completion or the `forget` came last.
            return;
        }
        if let Some(other) = history.done {
            let apart = done.to_ms - other.from_ms.min(done.to_ms) >= self.window_ms(key)
                || other.to_ms - done.from_ms.min(other.to_ms) >= self.window_ms(key);
            assert!(apart, "G3: {}: completed twice, {other:?} and {done:?}", name(key));
        }
        if history.done.is_none_or(|other| other.from_ms <= done.from_ms) {
            history.done = Some(done);
        }
    }

    fn leased_until_ms(&self, work: &Work) -> u64 {
        let token = work.lease.token().get();
        let history = self.history(work.key);
        history.holders.iter().find(|holder| holder.token == token).unwrap().leased_until_ms
    }

    pub fn complete(&self, work: Work) -> bool {
        let leased_until_ms = self.leased_until_ms(&work);
        let before = self.end_hold(&work);
        let (key, token) = (work.key, work.lease.token().get());
        let outcome = work.lease.complete(self.result(key, token)).wait().map_err(|error| error.into_parts().0);
        self.check_completion(key, &before, token, leased_until_ms, outcome)
    }

    fn check_completion(
        &self,
        key: usize,
        before: &Before,
        token: u64,
        leased_until_ms: u64,
        outcome: Result<(), Error>,
    ) -> bool {
        let ours = self.check_end(key, leased_until_ms, outcome);
        if ours {
            self.add_completion(key, before, Some(token));
            count(&self.seen.completed);
        }
        ours
    }

    pub fn complete_batch(&self, works: Vec<Work>) {
        let mut begun = Vec::new();
        let mut leases = Vec::new();
        for work in works {
            let (key, token, leased_until_ms) = (work.key, work.lease.token().get(), self.leased_until_ms(&work));
            begun.push((key, token, leased_until_ms, self.end_hold(&work)));
            leases.push((work.lease, self.result(key, token)));
        }
        let outcomes = self.store.complete_batch(leases).wait();
        for ((key, token, leased_until_ms, before), outcome) in begun.into_iter().zip(outcomes) {
            let outcome = outcome.map_err(|error| error.into_parts().0);
            self.check_completion(key, &before, token, leased_until_ms, outcome);
        }
    }

    pub fn release(&self, work: Work) {
        let leased_until_ms = self.leased_until_ms(&work);
        self.end_hold(&work);
        if self.check_end(work.key, leased_until_ms, work.lease.release().wait()) {
            count(&self.seen.released);
        }
    }

    pub fn abandon(&self, work: Work) {
        self.end_hold(&work);
        drop(work.lease);
        count(&self.seen.dropped);
    }

    /// Ends the work in a random way, unless it was taken over.
    pub fn renew(&self, mut work: Work) -> Option<Work> {
        let leased_until_ms = self.leased_until_ms(&work);
        let now_ms = self.clock.monotonic_ms();
        let token = work.lease.token().get();
        if !self.check_end(work.key, leased_until_ms, work.lease.renew()) {
            self.end_hold(&work);
            return None;
        }
        let mut history = self.history(work.key);
        let holder = history.holders.iter_mut().find(|holder| holder.token == token).unwrap();
        holder.leased_until_ms = now_ms + self.lease_ms;
        drop(history);
        Some(work)
    }

    fn check_record(&self, key: usize, before: &Before, recorded: RecordOutcome) {
        match recorded {
            RecordOutcome::First => {
                self.check_unfinished(key, before, "recorded");
                let now_ms = self.clock.monotonic_ms();
                let history = self.history(key);
                for holder in before.holders.iter().filter(|holder| holder.leased_until_ms > now_ms) {
                    let still = history.holders.iter().any(|other| other.token == holder.token);
                    assert!(!still, "G3: {}: recorded while token {} holds it", name(key), holder.token);
                }
                drop(history);
                self.add_completion(key, before, None);
                count(&self.seen.recorded);
            }
            RecordOutcome::Duplicate { in_flight: true } => self.check_unfinished(key, before, "in flight"),
            RecordOutcome::Duplicate { in_flight: false } => count(&self.seen.duplicates),
        }
    }

    pub fn record(&self, key: usize) {
        let before = self.before(key);
        let recorded = self.store.record(self.with_window(key)).wait().unwrap();
        self.check_record(key, &before, recorded);
    }

    pub fn record_batch(&self, keys: &BTreeSet<usize>) {
        let before: Vec<Before> = keys.iter().map(|key| self.before(*key)).collect();
        let asked: Vec<Key<'_>> = keys.iter().map(|key| self.with_window(*key)).collect();
        let recorded = self.store.record_batch(&asked).wait().unwrap();
        for ((key, before), recorded) in keys.iter().zip(&before).zip(recorded) {
            self.check_record(*key, before, recorded.unwrap());
        }
    }

    pub fn forget(&self, key: usize) {
        let mut history = self.history(key);
        let token = history.done.take().and_then(|done| done.token);
        history.answered = None;
        history.forgets += 1;
        history.forgetting += 1;
        drop(history);
        let forgotten = self.store.forget(name(key)).wait();
        let mut history = self.history(key);
        history.forgetting -= 1;
        match forgotten {
            Ok(counted) => {
                history.dead_token = history.dead_token.max(token.unwrap_or(0));
                if counted {
                    count(&self.seen.forgotten);
                }
            }
            Err(Error::InUse { .. }) => {}
            Err(other) => panic!("{}: {other}", name(key)),
        }
    }

    /// Makes one random call of a consumer. `pick` returns a number below its argument.
    pub fn step(&self, pick: &mut dyn FnMut(usize) -> usize, held: &mut Vec<Work>) {
        let keys = self.keys();
        match pick(20) {
            0..=6 => {
                let key = pick(keys);
                held.extend(self.claim(key));
            }
            7..=9 => {
                let keys = (0..=pick(4)).map(|_| pick(keys)).collect();
                held.extend(self.claim_batch(&keys));
            }
            10 | 11 => self.check(pick(keys)),
            12 => self.record(pick(keys)),
            13 => {
                let keys = (0..=pick(4)).map(|_| pick(keys)).collect();
                self.record_batch(&keys);
            }
            14 => self.forget(pick(keys)),
            15 if !held.is_empty() => {
                let work = held.swap_remove(pick(held.len()));
                held.extend(self.renew(work));
            }
            _ => {}
        }
        while !held.is_empty() && (held.len() > 8 || pick(3) > 0) {
            match pick(8) {
                0 => self.release(held.swap_remove(pick(held.len()))),
                1 => self.abandon(held.swap_remove(pick(held.len()))),
                2 | 3 => self.complete_batch(std::mem::take(held)),
                _ => {
                    self.complete(held.swap_remove(pick(held.len())));
                }
            }
        }
    }
}
