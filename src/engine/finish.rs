//! Completions and releases: what they ask of the machine, and what they count. `execute.rs` has the order of their effects.

use super::backpressure::Demand;
use super::core::Engine;
use super::lookup::DiskLookup;
use super::response::{FinishKind, FinishedBy, Grant};
use crate::codec::RecordKind;
use crate::metrics::Call;
use onlyonce_core::machine::{Complete, Finished, Release};
use onlyonce_core::{Result, SideWrites};

impl Engine {
    /// Finishes leases, in one record. Returns for each lease whether it was accepted; false means superseded. An error
    /// concerns its lease alone.
    ///
    /// A completion that is repeated with the token that completed its key is accepted, and changes nothing.
    pub(crate) fn finish(
        &self,
        kind: RecordKind,
        by: FinishedBy,
        leases: Vec<(&Grant, FinishKind<'_>)>,
    ) -> Result<Vec<Result<bool>>> {
        let completes = kind == RecordKind::Completed;
        let _timer = self.metrics.call(if completes { Call::Complete } else { Call::Release }, leases.len());
        let bytes = leases.iter().map(|(grant, finish_kind)| encoded_len(grant, finish_kind)).sum();
        self.admit(Demand {
            items: leases.len(),
            // A completion by an operator takes a token.
            tokens: if by == FinishedBy::Operator { leases.len() } else { 0 },
            bytes,
            changes_database: leases.iter().any(|(_, finish_kind)| finish_kind.side_writes().is_some()),
        })?;
        let now = self.now();
        let mut batch = self.begin(kind, now, bytes + leases.len() * 16);
        let mut answers: Vec<Result<Finished>> = Vec::with_capacity(leases.len());
        let mut side_writes = Vec::new();
        // Offsets are cumulative: after a rejected lease of its batch, an offset would cover a message that is not processed.
        let mut is_contiguous = true;
        for (grant, finish_kind) in &leases {
            let (key_ref, attempt) = (grant.key_ref(), grant.as_attempt());
            // It is in the memtable, unless the lease was released or superseded, or the call is repeated.
            let on_disk = &DiskLookup::DEFERRED;
            let (moment, token) = (|| Ok(now), |_: Option<&_>| Ok(self.writer.sequence.take()));
            let answer = |finished, _| Ok(finished);
            let finished = match *finish_kind {
                FinishKind::Complete { result, .. } => {
                    let complete = Complete { attempt, by, result };
                    batch.execute(key_ref, on_disk, complete, moment, token, answer)
                }
                FinishKind::Release { prior, backoff } => {
                    let release = Release { attempt, by, prior, backoff };
                    batch.execute(key_ref, on_disk, release, moment, token, answer)
                }
            };
            // The same lease may be completed twice in one call.
            let is_committing = matches!(finished, Ok(Finished::Committing));
            let finished = match is_committing && completes && is_accepted_before(grant, &leases, &answers) {
                true => Ok(Finished::Repeated),
                false => finished,
            };
            let follows = matches!(finish_kind, FinishKind::Complete { follows: true, .. });
            is_contiguous =
                (is_contiguous || !follows) && matches!(finished, Ok(Finished::Accepted | Finished::Repeated));
            if matches!(finished, Ok(Finished::Accepted)) {
                side_writes.extend(finish_kind.side_writes().map(|own| (own, is_contiguous)));
            }
            answers.push(finished);
        }
        let sync = if completes { self.config.sync_results() } else { self.config.sync_claims() };
        batch.commit(&side_writes, sync)?;
        self.waiters.wake(leases.iter().map(|(grant, _)| grant.digest()));
        let accepted = leases.iter().zip(&answers).filter(|(_, answer)| matches!(answer, Ok(Finished::Accepted)));
        let count = accepted.clone().count() as u64;
        if completes {
            self.counters.completed.add(count);
            // One sample a call: a measurement for each key would be too expensive.
            if let (FinishedBy::Holder, Some(((grant, _), _))) = (by, accepted.clone().next()) {
                self.metrics.processed(|| now.monotonic_ms.saturating_sub(grant.claimed_monotonic_ms));
            }
        } else {
            self.counters.released.add(count);
        }
        let responses = answers.into_iter();
        let responses: Vec<Result<bool>> = responses
            .map(|answer| answer.map(|finished| matches!(finished, Finished::Accepted | Finished::Repeated)))
            .collect();
        self.counters.superseded.add(responses.iter().filter(|response| matches!(response, Ok(false))).count() as u64);
        self.wake_if_due();
        self.health.check_response_count(responses, leases.len())
    }
}

/// Whether an earlier lease of the call has the same token and was accepted.
#[cold]
fn is_accepted_before(grant: &Grant, leases: &[(&Grant, FinishKind<'_>)], answers: &[Result<Finished>]) -> bool {
    let mut earlier = leases.iter().zip(answers);
    earlier.any(|((earlier, _), answer)| earlier.token == grant.token && matches!(answer, Ok(Finished::Accepted)))
}

/// The bytes of a finish in its record, without those that every item has.
fn encoded_len(grant: &Grant, finish_kind: &FinishKind<'_>) -> usize {
    let encoded_len = match finish_kind {
        FinishKind::Complete { result, side_writes, .. } => {
            result.len() + side_writes.map_or(0, SideWrites::encoded_len)
        }
        FinishKind::Release { .. } => 0,
    };
    grant.key().len() + encoded_len
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::clock::ManualClock;
    use crate::config::{Durability, Options};
    use crate::engine::fixture::{claim, engine};
    use onlyonce_core::machine::Backoff;
    use onlyonce_core::{Claim, OnInterrupt, PriorAttempt, StoredResult};

    #[test]
    fn completions_are_synced_and_repeatable_work_is_not() {
        for (durability, on_interrupt, started, finished) in [
            (Durability::Disk, OnInterrupt::Rerun, 0, 1),
            (Durability::Disk, OnInterrupt::Hold, 1, 1),
            (Durability::Process, OnInterrupt::Hold, 0, 0),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let engine = engine(&dir, &Options { durability, on_interrupt: Some(on_interrupt), ..Options::default() });
            let syncs_of = |what: &str, expected: u64, call: &dyn Fn()| {
                let before = engine.writer.journal.syncs();
                call();
                assert_eq!(
                    engine.writer.journal.syncs() - before,
                    expected,
                    "{what} under {durability:?} and {on_interrupt:?}"
                );
            };
            syncs_of("a claim", started, &|| drop(claim(&engine, "a")));
            let open = FinishKind::Release { prior: PriorAttempt::Released, backoff: Backoff::NONE };
            let done = FinishKind::Complete { result: StoredResult::None, side_writes: None, follows: false };
            for (what, expected, kind, finish_kind) in [
                ("a release", started, RecordKind::Released, open),
                ("a completion", finished, RecordKind::Completed, done),
            ] {
                let grant = claim(&engine, what);
                syncs_of(what, expected, &|| {
                    let finished = engine.finish(kind, FinishedBy::Holder, vec![(&grant, finish_kind)]).unwrap();
                    assert!(matches!(finished[..], [Ok(true)]), "{finished:?}");
                });
            }
            let request = engine.request(["d"]).unwrap();
            syncs_of("a record", finished, &|| drop(engine.record(&request).unwrap()));
            syncs_of("forgetting", finished, &|| assert!(engine.forget(&request).unwrap()));
            syncs_of("an offset", finished, &|| engine.set_offset(b"s", 0, 1).unwrap());
        }
    }

    #[test]
    fn a_held_key_that_is_renewed_cannot_be_resolved() {
        let dir = tempfile::tempdir().unwrap();
        let clock = ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(1_000_000));
        let options = Options {
            clock: Arc::new(clock.clone()),
            on_interrupt: Some(OnInterrupt::Hold),
            lease: Duration::from_secs(1),
            ..Options::default()
        };
        let engine = engine(&dir, &options);
        let request = engine.request(["k"]).unwrap();
        let Ok(Claim::Acquired(grant)) = engine.claim(&request).unwrap().pop().unwrap() else { panic!("k is new") };
        clock.advance(Duration::from_secs(1));
        let (held, prior) = engine.held_grant(&request).unwrap().unwrap();
        // Between the two steps of a resolution.
        assert!(engine.renew(&grant).unwrap());
        let rerun = vec![(&held, FinishKind::Release { prior, backoff: Backoff::NONE })];
        let resolved = engine.finish(RecordKind::Released, FinishedBy::Operator, rerun).unwrap();
        assert!(matches!(resolved[..], [Ok(false)]), "{resolved:?}");
        assert!(matches!(engine.claim(&request).unwrap().pop(), Some(Ok(Claim::InProgress { .. }))));
    }

    #[test]
    fn the_size_of_a_completion_includes_its_key_result_and_side_writes() {
        let dir = tempfile::tempdir().unwrap();
        let grant = claim(&engine(&dir, &Options::default()), "a key");
        let open = FinishKind::Release { prior: PriorAttempt::Released, backoff: Backoff::NONE };
        let least = grant.key().len();
        assert_eq!(encoded_len(&grant, &open), least);
        assert_eq!(
            encoded_len(
                &grant,
                &FinishKind::Complete { result: StoredResult::Bytes(&[0; 100]), side_writes: None, follows: false }
            ),
            least + 100
        );
        let mut tx = SideWrites::default();
        tx.message("topic", "key", "payload");
        assert!(tx.encoded_len() > 15);
        let both =
            FinishKind::Complete { result: StoredResult::Bytes(&[0; 100]), side_writes: Some(&tx), follows: false };
        assert_eq!(encoded_len(&grant, &both), least + 100 + tx.encoded_len());
    }
}
