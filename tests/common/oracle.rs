//! What may be true of keys that many threads work on at a time, judged from outside: by tokens, by the results, and by
//! when calls began and returned. G1, G3 and G4 while everything happens at once.

#![allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use onlyonce::{
    Claim, Clock, Completed, Error, Key, KeyStatus, Lease, ManualClock, PriorAttempt, RecordOutcome, Store,
};

/// A store whose every answer is judged.
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

/// How often what was seen, so that a test can tell that it saw anything.
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

/// A key that this thread may work on.
pub struct Work {
    pub key: usize,
    pub lease: Lease,
}

/// What is known for certain of a key.
#[derive(Debug, Default)]
struct History {
    holders: Vec<Holder>,
    /// The acquisition with the highest token that is known, ended or not.
    newest: Option<Acquired>,
    /// A completion whose call has returned, and that nobody has begun to forget since.
    done: Option<Done>,
    /// An answer that said "completed", which nobody has begun to forget since: its token and time.
    answered: Option<(u64, u64)>,
    /// Calls of `forget` that have begun, and those that have not returned yet.
    forgets: u64,
    forgetting: u64,
    /// What was completed with this token, or a lower one, is forgotten.
    dead_token: u64,
}

/// An acquisition whose holder has not begun to end it.
#[derive(Debug, Clone, Copy)]
struct Holder {
    token: u64,
    /// Its lease cannot run out before that.
    alive_until_ms: u64,
}

#[derive(Debug, Clone, Copy)]
struct Acquired {
    token: u64,
    /// It was acquired before that, in monotonic time.
    before_ms: u64,
}

#[derive(Debug, Clone, Copy)]
struct Done {
    /// `None` where it was recorded.
    token: Option<u64>,
    /// Between these two it was completed, in wall time.
    from_ms: u64,
    to_ms: u64,
}

/// What was known when a call began.
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
    /// Judges `keys` keys of a store with these options.
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

    /// The result that a key is completed with says whose it is.
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

    /// The completion that the answer of a call must tell of, if there is one.
    fn must_tell(&self, key: usize, history: &History, before: &Before) -> Option<Done> {
        let done = before.done.filter(|_| history.forgets == before.forgets)?;
        (self.clock.wall().as_unix_ms() < done.from_ms + self.window_ms(key)).then_some(done)
    }

    fn judge_completed(&self, key: usize, before: &Before, answer: &Completed) {
        let mut history = self.history(key);
        let (token, at_ms) = (answer.token().get(), answer.completed_at().as_unix_ms());
        let name = name(key);
        if let Some(result) = answer.result() {
            assert!(result == self.result(key, token), "{name}: the result of {token} is another's");
        }
        assert!(token > before.dead_token, "{name}: {token} was forgotten and came back");
        assert!(at_ms + self.window_ms(key) > before.wall_ms, "G4: {name}: {token} of {at_ms} has run out");
        if let Some(done) = self.must_tell(key, &history, before) {
            assert!(done.token.is_none_or(|known| known == token), "G1: {name}: {token} instead of {done:?}");
        }
        // Not where somebody forgets the key at the same time.
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

    fn judge_unfinished(&self, key: usize, before: &Before, answer: &str) {
        let done = self.must_tell(key, &self.history(key), before);
        assert!(done.is_none(), "G1: {} is {answer} though it was completed: {done:?}", name(key));
    }

    fn judge_acquired(&self, key: usize, before: &Before, lease: Lease) -> Work {
        self.judge_unfinished(key, before, "acquired");
        let (name, token, now_ms) = (name(key), lease.token().get(), self.clock.monotonic_ms());
        assert!(token > before.newest_token, "G3: {name}: {token} after {}", before.newest_token);
        self.newest_token.fetch_max(token, Ordering::SeqCst);
        let ours = Holder { token, alive_until_ms: before.monotonic_ms + self.lease_ms };
        let mut history = self.history(key);
        for other in &history.holders {
            // Whichever came first must have run out when the other came: by now, as far as we know.
            let earlier = if other.token < token { other } else { &ours };
            assert!(now_ms >= earlier.alive_until_ms, "G3: {name}: two holders, {token} and {}", other.token);
        }
        match history.newest {
            Some(newest) if newest.token > token => {
                assert!(newest.before_ms >= ours.alive_until_ms, "G3: {name}: {token} was overtaken in its lease");
            }
            Some(newest) => assert_ne!(newest.token, token, "G3: {name}: one token twice"),
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

    fn judge_claim(&self, key: usize, before: &Before, claim: Claim) -> Option<Work> {
        match claim {
            Claim::Acquired(lease) => return Some(self.judge_acquired(key, before, lease)),
            Claim::Completed(answer) => self.judge_completed(key, before, &answer),
            Claim::InProgress(other) => {
                self.judge_unfinished(key, before, "in progress");
                assert!(other.retry_after.is_some(), "nothing is held");
            }
        }
        None
    }

    pub fn claim(&self, key: usize) -> Option<Work> {
        let before = self.before(key);
        let claim = self.store.claim(self.with_window(key)).wait().unwrap();
        self.judge_claim(key, &before, claim)
    }

    pub fn claim_batch(&self, keys: &BTreeSet<usize>) -> Vec<Work> {
        let before: Vec<Before> = keys.iter().map(|key| self.before(*key)).collect();
        let asked: Vec<Key<'_>> = keys.iter().map(|key| self.with_window(*key)).collect();
        let claims = self.store.claim_batch(&asked).wait().unwrap();
        let judged = keys.iter().zip(&before).zip(claims);
        judged.filter_map(|((key, before), claim)| self.judge_claim(*key, before, claim.unwrap())).collect()
    }

    pub fn check(&self, key: usize) {
        let before = self.before(key);
        match self.store.check(name(key)).wait().unwrap() {
            KeyStatus::New => self.judge_unfinished(key, &before, "new"),
            KeyStatus::InProgress(_) => self.judge_unfinished(key, &before, "in progress"),
            KeyStatus::Completed(answer) => self.judge_completed(key, &before, &answer),
        }
    }

    /// From here on others may come by the key.
    fn let_go(&self, work: &Work) -> Before {
        let before = self.before(work.key);
        let token = work.lease.token().get();
        self.history(work.key).holders.retain(|holder| holder.token != token);
        before
    }

    fn judge_settled(&self, key: usize, alive_until_ms: u64, outcome: Result<(), Error>) -> bool {
        match outcome {
            Ok(()) => true,
            Err(Error::Superseded { token, .. }) => {
                let now_ms = self.clock.monotonic_ms();
                assert!(now_ms >= alive_until_ms, "G3: {}: {token} was superseded in its lease", name(key));
                count(&self.seen.superseded);
                false
            }
            Err(other) => panic!("{}: {other}", name(key)),
        }
    }

    fn note_done(&self, key: usize, before: &Before, token: Option<u64>) {
        let done = Done { token, from_ms: before.wall_ms, to_ms: self.clock.wall().as_unix_ms() };
        let mut history = self.history(key);
        if before.forgetting > 0 || history.forgets != before.forgets {
            // Whether it or the forgetting came last is open.
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

    fn alive_until_ms(&self, work: &Work) -> u64 {
        let token = work.lease.token().get();
        let history = self.history(work.key);
        history.holders.iter().find(|holder| holder.token == token).unwrap().alive_until_ms
    }

    pub fn complete(&self, work: Work) -> bool {
        let alive_until_ms = self.alive_until_ms(&work);
        let before = self.let_go(&work);
        let (key, token) = (work.key, work.lease.token().get());
        let outcome = work.lease.complete(self.result(key, token)).wait().map_err(|error| error.into_parts().0);
        self.judge_completion(key, &before, token, alive_until_ms, outcome)
    }

    fn judge_completion(
        &self,
        key: usize,
        before: &Before,
        token: u64,
        alive_until_ms: u64,
        outcome: Result<(), Error>,
    ) -> bool {
        let ours = self.judge_settled(key, alive_until_ms, outcome);
        if ours {
            self.note_done(key, before, Some(token));
            count(&self.seen.completed);
        }
        ours
    }

    pub fn complete_batch(&self, works: Vec<Work>) {
        let mut begun = Vec::new();
        let mut leases = Vec::new();
        for work in works {
            let (key, token, alive_until_ms) = (work.key, work.lease.token().get(), self.alive_until_ms(&work));
            begun.push((key, token, alive_until_ms, self.let_go(&work)));
            leases.push((work.lease, self.result(key, token)));
        }
        let outcomes = self.store.complete_batch(leases).wait();
        for ((key, token, alive_until_ms, before), outcome) in begun.into_iter().zip(outcomes) {
            let outcome = outcome.map_err(|error| error.into_parts().0);
            self.judge_completion(key, &before, token, alive_until_ms, outcome);
        }
    }

    pub fn release(&self, work: Work) {
        let alive_until_ms = self.alive_until_ms(&work);
        self.let_go(&work);
        if self.judge_settled(work.key, alive_until_ms, work.lease.release().wait()) {
            count(&self.seen.released);
        }
    }

    pub fn abandon(&self, work: Work) {
        self.let_go(&work);
        drop(work.lease);
        count(&self.seen.dropped);
    }

    /// The work itself, unless it was taken over.
    pub fn renew(&self, mut work: Work) -> Option<Work> {
        let alive_until_ms = self.alive_until_ms(&work);
        let now_ms = self.clock.monotonic_ms();
        let token = work.lease.token().get();
        if !self.judge_settled(work.key, alive_until_ms, work.lease.renew()) {
            self.let_go(&work);
            return None;
        }
        let mut history = self.history(work.key);
        let holder = history.holders.iter_mut().find(|holder| holder.token == token).unwrap();
        holder.alive_until_ms = now_ms + self.lease_ms;
        drop(history);
        Some(work)
    }

    fn judge_record(&self, key: usize, before: &Before, recorded: RecordOutcome) {
        match recorded {
            RecordOutcome::First => {
                self.judge_unfinished(key, before, "recorded");
                let now_ms = self.clock.monotonic_ms();
                let history = self.history(key);
                for holder in before.holders.iter().filter(|holder| holder.alive_until_ms > now_ms) {
                    let still = history.holders.iter().any(|other| other.token == holder.token);
                    assert!(!still, "G3: {}: recorded while {} holds it", name(key), holder.token);
                }
                drop(history);
                self.note_done(key, before, None);
                count(&self.seen.recorded);
            }
            RecordOutcome::Duplicate { in_flight: true } => self.judge_unfinished(key, before, "in flight"),
            RecordOutcome::Duplicate { in_flight: false } => count(&self.seen.duplicates),
        }
    }

    pub fn record(&self, key: usize) {
        let before = self.before(key);
        let recorded = self.store.record(self.with_window(key)).wait().unwrap();
        self.judge_record(key, &before, recorded);
    }

    pub fn record_batch(&self, keys: &BTreeSet<usize>) {
        let before: Vec<Before> = keys.iter().map(|key| self.before(*key)).collect();
        let asked: Vec<Key<'_>> = keys.iter().map(|key| self.with_window(*key)).collect();
        let recorded = self.store.record_batch(&asked).wait().unwrap();
        for ((key, before), recorded) in keys.iter().zip(&before).zip(recorded) {
            self.judge_record(*key, before, recorded.unwrap());
        }
    }

    pub fn forget(&self, key: usize) {
        let mut history = self.history(key);
        let known = history.done.take().and_then(|done| done.token);
        history.answered = None;
        history.forgets += 1;
        history.forgetting += 1;
        drop(history);
        let forgotten = self.store.forget(name(key)).wait();
        let mut history = self.history(key);
        history.forgetting -= 1;
        match forgotten {
            Ok(counted) => {
                history.dead_token = history.dead_token.max(known.unwrap_or(0));
                if counted {
                    count(&self.seen.forgotten);
                }
            }
            Err(Error::InUse { .. }) => {}
            Err(other) => panic!("{}: {other}", name(key)),
        }
    }

    /// One random thing that a consumer may do; `pick` chooses a number below the one it is given.
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
