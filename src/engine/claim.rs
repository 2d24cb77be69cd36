//! Claims and records: what they ask of the machine, and what they count. `execute.rs` has the order of their effects.

use std::sync::Arc;

use super::backpressure::Demand;
use super::core::Engine;
use super::request::{KeyRef, Request};
use super::response::{Grant, completed, in_progress, payload_mismatch, too_old};
use crate::clock::Now;
use crate::codec::RecordKind;
use crate::metrics::Call;
use onlyonce_core::machine::{self, Acquired, Decision, Entry, Holder};
use onlyonce_core::{Claim, Completed, Error, InProgress, KeyStatus, RecordOutcome, Result, TimestampError};

/// What a call on a key found.
pub(super) enum Found<A> {
    Available(A),
    InProgress(InProgress),
    Completed(Completed),
}

impl Engine {
    /// Claims each key that is free, in one record.
    pub(crate) fn claim(&self, request: &Arc<Request>) -> Result<Vec<Result<Claim<Grant>>>> {
        let _timer = self.metrics.call(Call::Claim, request.len());
        self.admit(Demand::of(request))?;
        let on_disk = self.look_up_on_disk(request)?;
        let now = self.now();
        let until_monotonic_ms = now.monotonic_ms.saturating_add(self.config.lease_ms);
        let mut batch = self.begin(RecordKind::Claimed, now, request.key_bytes() + request.len() * 12);
        // An error is its key's alone: earlier keys of the call are claimed already.
        let claimed = request.iter().map(|key_ref| {
            let at_ms = request.at_ms(key_ref.index);
            let claim = machine::Claim { request: key_ref.key_request(at_ms), until_monotonic_ms };
            let moment = || self.moment_of(request, key_ref, now);
            let admit = |stored: Option<&Entry>| {
                self.admit_in_flight(stored)?;
                // Under the shard's lock, so that a later holder has a higher token.
                Ok(self.writer.sequence.take())
            };
            batch.execute(key_ref, &on_disk, claim, moment, admit, |decision, now| {
                Ok(match self.found(decision, key_ref, at_ms, now)? {
                    Found::Available(acquired) => {
                        let Acquired { token, attempt, prior, since_ms, fingerprint } = acquired;
                        let (request, index) = (Arc::clone(request), key_ref.index);
                        let claimed_monotonic_ms = now.monotonic_ms;
                        Claim::Acquired(Grant {
                            request,
                            index,
                            token,
                            attempt,
                            prior,
                            fingerprint,
                            at_ms: since_ms,
                            claimed_monotonic_ms,
                        })
                    }
                    Found::InProgress(in_progress) => Claim::InProgress(in_progress),
                    Found::Completed(completed) => Claim::Completed(completed),
                })
            })
        });
        let claimed: Vec<_> = claimed.collect();
        batch.commit(&[], self.config.sync_claims())?;
        self.count_claims(&claimed);
        self.health.check_response_count(claimed, request.len())
    }

    /// Records each key that is free as completed, without a result, in one record.
    pub(crate) fn record(&self, request: &Request) -> Result<Vec<Result<RecordOutcome>>> {
        let _timer = self.metrics.call(Call::Record, request.len());
        self.admit(Demand::of(request))?;
        let on_disk = self.look_up_on_disk(request)?;
        let now = self.now();
        let mut batch = self.begin(RecordKind::Completed, now, request.key_bytes() + request.len() * 8);
        let responses = request.iter().map(|key_ref| {
            let at_ms = request.at_ms(key_ref.index);
            let record = machine::Record { request: key_ref.key_request(at_ms) };
            let moment = || self.moment_of(request, key_ref, now);
            batch.execute(
                key_ref,
                &on_disk,
                record,
                moment,
                |_| Ok(self.writer.sequence.take()),
                |decision, now| {
                    Ok(match self.found(decision, key_ref, at_ms, now)? {
                        Found::Available(_) => RecordOutcome::First,
                        Found::InProgress(_) => RecordOutcome::Duplicate { in_flight: true },
                        Found::Completed(_) => RecordOutcome::Duplicate { in_flight: false },
                    })
                },
            )
        });
        let mut responses: Vec<_> = responses.collect();
        batch.commit(&[], self.config.sync_results())?;
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
        self.health.check_response_count(responses, request.len())
    }

    /// Returns the status of each key. Changes nothing.
    pub(crate) fn check(&self, request: &Request) -> Result<Vec<Result<KeyStatus>>> {
        let _timer = self.metrics.call(Call::Check, request.len());
        let now = self.now();
        self.look_up_each(request, |key_ref, stored| {
            let at_ms = request.at_ms(key_ref.index);
            let now = self.foreseen(key_ref, at_ms, now)?;
            let decision = machine::decide(stored.as_ref(), key_ref.key_request(at_ms), now, self.policy);
            Ok(match self.found(decision, key_ref, at_ms, now)? {
                Found::Available(_) => KeyStatus::New,
                Found::InProgress(in_progress) => KeyStatus::InProgress(in_progress),
                Found::Completed(completed) => KeyStatus::Completed(completed),
            })
        })
    }

    /// Converts the decision about a key.
    #[inline]
    fn found<A>(
        &self,
        decision: Decision<'_, A>,
        key_ref: KeyRef<'_>,
        at_ms: Option<u64>,
        now: Now,
    ) -> Result<Found<A>> {
        match decision {
            Decision::Available(available) => Ok(Found::Available(available)),
            Decision::InProgress { retry_after_ms, attempt } => {
                Ok(Found::InProgress(in_progress(retry_after_ms, attempt)))
            }
            Decision::Completed(done) => Ok(Found::Completed(completed(done, &now, self.policy.window_ms))),
            Decision::PayloadMismatch => Err(payload_mismatch(key_ref)),
            Decision::TooOld => Err(too_old(key_ref, at_ms, now, self.policy.window_ms)),
        }
    }

    /// Fails if `in_flight_limit` or `held_limit` is reached. Only the key's shard is locked, so concurrent callers may exceed
    /// the limit by a key each.
    fn admit_in_flight(&self, stored: Option<&Entry>) -> Result<()> {
        let holder = match stored {
            Some(Entry::Processing(processing)) => Some(processing.holder),
            _ => None,
        };
        let (in_flight, limit) = (self.tables.memtable.in_flight(), self.config.in_flight_limit);
        if in_flight >= limit && !matches!(holder, Some(Holder::Leased { .. })) {
            return Err(Error::TooManyInFlight { in_flight, limit });
        }
        let (held, limit) = (self.tables.memtable.held(), self.config.held_limit);
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
