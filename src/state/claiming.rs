//! Claiming and recording keys: a free key gets its place in the hot table before its row is written.

use std::sync::Arc;

use super::answer::{Answer, Claimed, Grant, payload_mismatch, too_old};
use super::engine::Engine;
use super::page::Pending;
use super::request::Request;
use super::transition::{self, Found};
use crate::clock::Now;
use crate::codec::RowKind;
use crate::entry::{Done, Entry, Holder, Kept, Prior, Processing};
use crate::error::{Error, Result};
use crate::key::Fingerprint;
use crate::meter::Call;

impl Engine {
    /// Claims every key that is free. One row, whatever their number.
    pub(crate) fn claim(&self, request: &Arc<Request>) -> Result<Vec<Result<Claimed>>> {
        let _timer = self.meter.call(Call::Claim, request.len());
        self.admit(request.len(), request.key_bytes())?;
        let on_disk = self.on_disk(request)?;
        let now = self.now();
        let until_monotonic_ms = now.monotonic_ms.saturating_add(self.config.lease_ms);
        let open = self.begin_row();
        let mut row = self.row(RowKind::Claimed, now, request.key_bytes() + request.len() * 12);
        let mut claimed = Vec::with_capacity(request.len());
        for asked in request.iter() {
            // What fails here fails for this key alone: those before it have their places already.
            let decided = self.decide(asked, &on_disk, |stripe, stored| {
                let at_ms = request.at_ms(asked.place);
                let now = match at_ms {
                    None => now,
                    Some(at_ms) => self.moment(request, asked, at_ms, now)?,
                };
                match transition::find(stored.as_ref(), asked.payload, at_ms, now, self.policy) {
                    Found::Available { attempt, prior } => {
                        self.admit_in_flight(stored.as_ref())?;
                        let since_ms = time_of(at_ms, now, prior, stored.as_ref());
                        // Under the lock, so that later holders have higher tokens.
                        let token = self.sequence.take();
                        let fingerprint = asked.payload.copied().or_else(|| first_payload(prior, stored.as_ref()));
                        let processing = Processing {
                            token,
                            attempt,
                            since_ms,
                            fingerprint,
                            holder: Holder::Leased { until_monotonic_ms },
                        };
                        row.processing(asked.key, &processing);
                        stripe.set(asked.digest, asked.key, Entry::Processing(processing));
                        Ok(Claimed::Acquired(Grant {
                            request: Arc::clone(request),
                            place: asked.place,
                            token,
                            attempt,
                            prior,
                            fingerprint,
                            at_ms: since_ms,
                            claimed_monotonic_ms: now.monotonic_ms,
                        }))
                    }
                    Found::InProgress { retry_after_ms, attempt } => {
                        Ok(Claimed::InProgress { retry_after_ms, attempt })
                    }
                    Found::Completed(done) => Ok(Claimed::Completed(done.clone())),
                    Found::PayloadMismatch => Err(payload_mismatch(asked)),
                    Found::TooOld => Err(too_old(asked, at_ms, now, self.policy.window_ms)),
                }
            });
            claimed.push(decided.flatten());
        }
        self.append(open, row, self.config.sync_claims())?;
        self.count_claims(&claimed);
        self.answered(claimed, request.len())
    }

    /// Records every key that is free as completed, without a result. One row, whatever their number.
    pub(crate) fn record(&self, request: &Request) -> Result<Vec<Result<Answer>>> {
        let _timer = self.meter.call(Call::Record, request.len());
        self.admit(request.len(), request.key_bytes())?;
        let on_disk = self.on_disk(request)?;
        let now = self.now();
        let open = self.begin_row();
        let mut row = self.row(RowKind::Completed, now, request.key_bytes() + request.len() * 8);
        let mut answers = Vec::with_capacity(request.len());
        for asked in request.iter() {
            let decided = self.decide(asked, &on_disk, |stripe, stored| {
                let at_ms = request.at_ms(asked.place);
                let now = match at_ms {
                    None => now,
                    Some(at_ms) => self.moment(request, asked, at_ms, now)?,
                };
                match transition::find(stored.as_ref(), asked.payload, at_ms, now, self.policy) {
                    Found::Available { attempt, prior } => {
                        let token = self.sequence.take();
                        let fingerprint = asked.payload.copied().or_else(|| first_payload(prior, stored.as_ref()));
                        let completed_ms = time_of(at_ms, now, prior, stored.as_ref());
                        let done = Done { token, completed_ms, fingerprint, result: Kept::Absent };
                        row.completed(asked.key, &done);
                        let pending = Pending { row: open.number(), attempt, holder: Holder::Recording };
                        stripe.settle(asked.digest, asked.key, Entry::Completed(done), pending);
                        Ok(Answer::New)
                    }
                    Found::InProgress { retry_after_ms, attempt } => Ok(Answer::InProgress { retry_after_ms, attempt }),
                    Found::Completed(done) => Ok(Answer::Completed(done.clone())),
                    Found::PayloadMismatch => Err(payload_mismatch(asked)),
                    Found::TooOld => Err(too_old(asked, at_ms, now, self.policy.window_ms)),
                }
            });
            answers.push(decided.flatten());
        }
        self.append(open, row, self.config.sync_results())?;
        self.waiting.wake(request.digests());
        // A key that stands twice in one call was being recorded when it came up again, and is completed by now.
        for (asked, answer) in request.iter().zip(&mut answers) {
            if let Ok(Answer::InProgress { .. }) = answer
                && let Ok(Some(Entry::Completed(done))) = self.decide(asked, &on_disk, |_, stored| stored)
            {
                *answer = Ok(Answer::Completed(done));
            }
        }
        self.count_records(&answers);
        self.wake_if_due();
        self.answered(answers, request.len())
    }

    /// Room for one more key in flight, if it is none yet, and for its decision, should it come to one. Asked under a
    /// stripe's lock: callers in other stripes may overshoot by a key each.
    fn admit_in_flight(&self, stored: Option<&Entry>) -> Result<()> {
        let holder = match stored {
            Some(Entry::Processing(processing)) => Some(processing.holder),
            _ => None,
        };
        let (in_flight, limit) = (self.hot.in_flight(), self.config.in_flight_limit);
        if in_flight >= limit && !matches!(holder, Some(Holder::Leased { .. })) {
            return Err(Error::TooManyInFlight { in_flight, limit });
        }
        let (held, limit) = (self.hot.held(), self.config.held_limit);
        if held >= limit {
            return Err(Error::TooManyHeld { held, limit });
        }
        Ok(())
    }

    fn count_claims(&self, claimed: &[Result<Claimed>]) {
        let (mut acquired, mut reclaimed) = (0, 0);
        for claimed in claimed {
            if let Ok(Claimed::Acquired(grant)) = claimed {
                acquired += 1;
                if let Some(prior) = grant.prior {
                    reclaimed += 1;
                    self.meter.repeated(prior, grant.attempt);
                }
            }
        }
        self.counters.acquired.add(acquired);
        self.counters.reclaimed.add(reclaimed);
        self.count_refusals(claimed.iter().map(|claimed| match claimed {
            Ok(Claimed::Acquired(_)) => Refusal::None,
            Ok(Claimed::InProgress { .. }) => Refusal::InProgress,
            Ok(Claimed::Completed(_)) => Refusal::Duplicate,
            Err(error) => Refusal::of(error),
        }));
    }

    fn count_records(&self, answers: &[Result<Answer>]) {
        let recorded = answers.iter().filter(|answer| matches!(answer, Ok(Answer::New))).count();
        self.counters.recorded.add(recorded as u64);
        self.count_refusals(answers.iter().map(|answer| match answer {
            Ok(Answer::New) => Refusal::None,
            Ok(Answer::InProgress { .. }) => Refusal::InProgress,
            Ok(Answer::Completed(_)) => Refusal::Duplicate,
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

/// The payload that the first attempt came with binds the later ones that bring none.
fn first_payload(prior: Option<Prior>, stored: Option<&Entry>) -> Option<Fingerprint> {
    match (prior, stored) {
        (Some(_), Some(Entry::Processing(processing))) => processing.fingerprint,
        _ => None,
    }
}

/// The time that a key gets: now, or its message's. Another attempt at the same work keeps the later of the two, so that a
/// later state of a key is never in an earlier bucket.
fn time_of(at_ms: Option<u64>, now: Now, prior: Option<Prior>, stored: Option<&Entry>) -> u64 {
    let time_ms = at_ms.unwrap_or(now.time_ms);
    match (prior, stored) {
        (Some(_), Some(Entry::Processing(processing))) => time_ms.max(processing.since_ms),
        _ => time_ms,
    }
}

/// Why a key was not given out, for the counters.
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
            Error::TooOld { .. } => Self::TooOld,
            Error::TooFarAhead { .. } => Self::TooFarAhead,
            _ => Self::None,
        }
    }
}
