//! Claims and records: the order of their effects.
//!
//! 1. Look the keys up on disk, without a lock.
//! 2. Take a record number.
//! 3. For each key: lock its shard, decide, take a token, change the memtable, unlock.
//! 4. Write the record, with one sync if the configuration requires it.
//!
//! A claimed key is visible as leased in step 3, before its record is written. Otherwise a concurrent claim could acquire the
//! same key. A recorded key is visible as committing in step 3, and as completed only after step 4. Otherwise a caller could
//! skip its work because of a record that a crash takes back.

use std::sync::Arc;

use super::core::Engine;
use super::request::Request;
use super::response::{Grant, completed, in_progress, payload_mismatch, too_old};
use super::transition::{self, Decision};
use crate::clock::Now;
use crate::codec::RecordKind;
use crate::entry::{CompletedEntry, Entry, Holder, Processing};
use crate::memtable::slot::Pending;
use crate::metrics::Call;
use onlyonce_core::Fingerprint;
use onlyonce_core::{Claim, Error, RecordOutcome, Result, TimestampError};
use onlyonce_core::{PriorAttempt, StoredResult};

impl Engine {
    /// Claims each key that is free, in one record.
    pub(crate) fn claim(&self, request: &Arc<Request>) -> Result<Vec<Result<Claim<Grant>>>> {
        let _timer = self.metrics.call(Call::Claim, request.len());
        self.admit(request.len(), request.key_bytes())?;
        let on_disk = self.look_up_on_disk(request)?;
        let now = self.now();
        let until_monotonic_ms = now.monotonic_ms.saturating_add(self.config.lease_ms);
        let open = self.begin_record();
        let mut record = self.record_writer(RecordKind::Claimed, now, request.key_bytes() + request.len() * 12);
        let mut claimed = Vec::with_capacity(request.len());
        for key_ref in request.iter() {
            // An error is this key's alone: earlier keys of the call are claimed already.
            let decided = self.with_locked_key(key_ref, &on_disk, |shard, stored| {
                let at_ms = request.at_ms(key_ref.index);
                let now = match at_ms {
                    None => now,
                    Some(at_ms) => self.moment(request, key_ref, at_ms, now)?,
                };
                match transition::decide(stored.as_ref(), key_ref.payload, at_ms, now, self.policy) {
                    Decision::Available { attempt, prior } => {
                        self.admit_in_flight(stored.as_ref())?;
                        let since_ms = time_of(at_ms, now, prior, stored.as_ref());
                        // Under the shard's lock, so that a later holder has a higher token.
                        let token = self.sequence.take();
                        let fingerprint = key_ref.payload.copied().or_else(|| first_payload(prior, stored.as_ref()));
                        let processing = Processing {
                            token,
                            attempt,
                            since_ms,
                            fingerprint,
                            holder: Holder::Leased { until_monotonic_ms },
                        };
                        record.processing(key_ref.key, &processing);
                        shard.set(key_ref.digest, key_ref.key, Entry::Processing(processing));
                        Ok(Claim::Acquired(Grant {
                            request: Arc::clone(request),
                            index: key_ref.index,
                            token,
                            attempt,
                            prior,
                            fingerprint,
                            at_ms: since_ms,
                            claimed_monotonic_ms: now.monotonic_ms,
                        }))
                    }
                    Decision::InProgress { retry_after_ms, attempt } => {
                        Ok(Claim::InProgress(in_progress(retry_after_ms, attempt)))
                    }
                    Decision::Completed(done) => Ok(Claim::Completed(completed(done, &now, self.policy.window_ms))),
                    Decision::PayloadMismatch => Err(payload_mismatch(key_ref)),
                    Decision::TooOld => Err(too_old(key_ref, at_ms, now, self.policy.window_ms)),
                }
            });
            claimed.push(decided.flatten());
        }
        self.append(open, record, self.config.sync_claims())?;
        self.count_claims(&claimed);
        self.check_response_count(claimed, request.len())
    }

    /// Records each key that is free as completed, without a result, in one record.
    pub(crate) fn record(&self, request: &Request) -> Result<Vec<Result<RecordOutcome>>> {
        let _timer = self.metrics.call(Call::Record, request.len());
        self.admit(request.len(), request.key_bytes())?;
        let on_disk = self.look_up_on_disk(request)?;
        let now = self.now();
        let open = self.begin_record();
        let mut record = self.record_writer(RecordKind::Completed, now, request.key_bytes() + request.len() * 8);
        let mut responses = Vec::with_capacity(request.len());
        for key_ref in request.iter() {
            let decided = self.with_locked_key(key_ref, &on_disk, |shard, stored| {
                let at_ms = request.at_ms(key_ref.index);
                let now = match at_ms {
                    None => now,
                    Some(at_ms) => self.moment(request, key_ref, at_ms, now)?,
                };
                match transition::decide(stored.as_ref(), key_ref.payload, at_ms, now, self.policy) {
                    Decision::Available { attempt, prior } => {
                        let token = self.sequence.take();
                        let fingerprint = key_ref.payload.copied().or_else(|| first_payload(prior, stored.as_ref()));
                        let completed_ms = time_of(at_ms, now, prior, stored.as_ref());
                        let done = CompletedEntry { token, completed_ms, fingerprint, result: StoredResult::None };
                        record.completed(key_ref.key, &done);
                        let pending = Pending { record: open.number(), attempt, holder: Holder::CommittingUnclaimed };
                        shard.set_pending(key_ref.digest, key_ref.key, Entry::Completed(done), pending);
                        Ok(RecordOutcome::First)
                    }
                    Decision::InProgress { .. } => Ok(RecordOutcome::Duplicate { in_flight: true }),
                    Decision::Completed(_) => Ok(RecordOutcome::Duplicate { in_flight: false }),
                    Decision::PayloadMismatch => Err(payload_mismatch(key_ref)),
                    Decision::TooOld => Err(too_old(key_ref, at_ms, now, self.policy.window_ms)),
                }
            });
            responses.push(decided.flatten());
        }
        self.append(open, record, self.config.sync_results())?;
        self.waiters.wake(request.digests());
        // A key that occurs twice in one call was committing at its second occurrence. It is completed now.
        for (key_ref, response) in request.iter().zip(&mut responses) {
            if let Ok(RecordOutcome::Duplicate { in_flight }) = response
                && *in_flight
                && let Ok(Some(Entry::Completed(_))) = self.with_locked_key(key_ref, &on_disk, |_, stored| stored)
            {
                *in_flight = false;
            }
        }
        self.count_records(&responses);
        self.wake_if_due();
        self.check_response_count(responses, request.len())
    }

    /// Fails if `in_flight_limit` or `held_limit` is reached. Only the key's shard is locked, so concurrent callers may exceed
    /// the limit by a key each.
    fn admit_in_flight(&self, stored: Option<&Entry>) -> Result<()> {
        let holder = match stored {
            Some(Entry::Processing(processing)) => Some(processing.holder),
            _ => None,
        };
        let (in_flight, limit) = (self.memtable.in_flight(), self.config.in_flight_limit);
        if in_flight >= limit && !matches!(holder, Some(Holder::Leased { .. })) {
            return Err(Error::TooManyInFlight { in_flight, limit });
        }
        let (held, limit) = (self.memtable.held(), self.config.held_limit);
        if held >= limit {
            return Err(Error::TooManyHeld { held, limit });
        }
        Ok(())
    }

    fn count_claims(&self, claimed: &[Result<Claim<Grant>>]) {
        let (mut acquired, mut reclaimed) = (0, 0);
        for claimed in claimed {
            if let Ok(Claim::Acquired(grant)) = claimed {
                acquired += 1;
                if let Some(prior) = grant.prior {
                    reclaimed += 1;
                    self.metrics.repeated(prior, grant.attempt);
                }
            }
        }
        self.counters.acquired.add(acquired);
        self.counters.reclaimed.add(reclaimed);
        self.count_refusals(claimed.iter().map(|claimed| match claimed {
            Ok(Claim::Acquired(_)) => Refusal::None,
            Ok(Claim::InProgress(_)) => Refusal::InProgress,
            Ok(Claim::Completed(_)) => Refusal::Duplicate,
            Err(error) => Refusal::of(error),
        }));
    }

    fn count_records(&self, responses: &[Result<RecordOutcome>]) {
        let recorded = responses.iter().filter(|response| matches!(response, Ok(RecordOutcome::First))).count();
        self.counters.recorded.add(recorded as u64);
        self.count_refusals(responses.iter().map(|response| match response {
            Ok(RecordOutcome::First) => Refusal::None,
            Ok(RecordOutcome::Duplicate { in_flight: true }) => Refusal::InProgress,
            Ok(RecordOutcome::Duplicate { in_flight: false }) => Refusal::Duplicate,
            Err(error) => Refusal::of(error),
        }));
    }

    fn count_refusals(&self, refusals: impl Iterator<Item = Refusal>) {
        let (mut duplicates, mut in_progress, mut mismatches, mut too_old, mut too_far_ahead) = (0, 0, 0, 0, 0);
        for refusal in refusals {
            match refusal {
                Refusal::Duplicate => duplicates += 1,
                Refusal::InProgress => in_progress += 1,
                Refusal::PayloadMismatch => mismatches += 1,
                Refusal::TooOld => too_old += 1,
                Refusal::TooFarAhead => too_far_ahead += 1,
                Refusal::None => {}
            }
        }
        self.counters.duplicates.add(duplicates);
        self.counters.in_progress.add(in_progress);
        self.counters.payload_mismatches.add(mismatches);
        self.counters.too_old.add(too_old);
        self.counters.too_far_ahead.add(too_far_ahead);
    }
}

/// The payload fingerprint of an earlier attempt, for a later attempt that has none.
fn first_payload(prior: Option<PriorAttempt>, stored: Option<&Entry>) -> Option<Fingerprint> {
    match (prior, stored) {
        (Some(_), Some(Entry::Processing(processing))) => processing.fingerprint,
        _ => None,
    }
}

/// A key's time: now, or its message's timestamp. A repeated attempt keeps the later time. Otherwise a later state of a key
/// could be in an earlier bucket, which is dropped first.
fn time_of(at_ms: Option<u64>, now: Now, prior: Option<PriorAttempt>, stored: Option<&Entry>) -> u64 {
    let time_ms = at_ms.unwrap_or(now.time_ms);
    match (prior, stored) {
        (Some(_), Some(Entry::Processing(processing))) => time_ms.max(processing.since_ms),
        _ => time_ms,
    }
}

/// Why a key was not acquired, for the counters.
enum Refusal {
    None,
    Duplicate,
    InProgress,
    PayloadMismatch,
    TooOld,
    TooFarAhead,
}

impl Refusal {
    fn of(error: &Error) -> Self {
        match error {
            Error::PayloadMismatch { .. } => Self::PayloadMismatch,
            Error::Timestamp(TimestampError::TooOld { .. }) => Self::TooOld,
            Error::Timestamp(TimestampError::TooFarAhead { .. }) => Self::TooFarAhead,
            _ => Self::None,
        }
    }
}
