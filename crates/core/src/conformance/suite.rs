//! The table of the checks, and the loop that runs them.

use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use super::bench::{Bench, Factory, Setup, Stop, Verdict};
use super::report::{Outcome, Report};
use super::{
    claiming, dropping, finishing, forgetting, holding, interrupting, limits, payloads, racing, recording, renewing,
    side_writes, stream_time, waiting, windows,
};
use crate::answer::OnInterrupt::{self, Hold, Rerun};
use crate::engine::BoxFuture;

/// A check that takes longer hangs.
const TIME_LIMIT: Duration = Duration::from_secs(120);

const EITHER: &[OnInterrupt] = &[Rerun, Hold];
const RERUN: &[OnInterrupt] = &[Rerun];
const HOLD: &[OnInterrupt] = &[Hold];

/// A behaviour of every engine.
struct Check {
    /// The behaviour as a sentence.
    name: &'static str,
    /// The policies under which an engine has it.
    policies: &'static [OnInterrupt],
    /// The engine that the check needs.
    setup: fn(Setup) -> Setup,
    run: for<'a> fn(&'a Bench) -> BoxFuture<'a, Verdict>,
}

macro_rules! checks {
    ($($policies:ident $module:ident { $($name:ident),* $(,)? })*) => {
        &[$($(Check {
            name: stringify!($name),
            policies: $policies,
            setup: $module::setup,
            run: |bench| Box::pin($module::$name(bench)),
        }),*),*]
    };
}

#[rustfmt::skip]
const CHECKS: &[Check] = checks! {
    EITHER claiming {
        an_absent_key_is_acquired_as_the_first_attempt,
        a_leased_key_is_in_progress,
        a_key_that_occurs_twice_in_a_batch_is_acquired_once,
        answers_follow_the_order_of_the_keys,
        every_lease_has_a_higher_token_than_the_leases_before_it,
        a_call_without_keys_has_no_answers,
        keys_of_different_scopes_and_forms_are_different,
    }
    EITHER recording {
        a_key_is_recorded_once,
        a_key_that_occurs_twice_in_a_batch_is_recorded_once,
        a_leased_key_is_not_recorded,
        a_released_key_is_recorded,
    }
    EITHER finishing {
        a_completed_key_answers_with_its_result,
        an_empty_result_is_a_result,
        a_result_over_the_limit_is_too_large,
        a_released_key_is_acquired_again,
        a_released_key_is_in_progress_until_its_backoff_is_over,
        a_backoff_of_any_length_is_accepted,
        a_release_can_reset_the_attempts,
        a_late_completion_is_accepted_if_no_claim_came_first,
        a_repeated_completion_succeeds_and_changes_nothing,
        a_repeated_release_changes_nothing,
        a_release_does_not_undo_a_completion,
        a_lease_that_occurs_twice_in_a_call_is_completed_once,
        an_unknown_token_is_superseded_and_changes_nothing,
        a_batch_answers_for_each_lease,
    }
    RERUN finishing {
        a_release_reports_that_the_effect_may_have_happened,
        a_doubt_persists_across_releases,
    }
    RERUN interrupting {
        an_expired_lease_is_taken_over,
        a_lease_that_was_taken_over_is_superseded,
        a_dropped_lease_frees_its_key,
        a_drop_after_a_takeover_changes_nothing,
        a_drop_after_a_completion_changes_nothing,
        a_completion_after_a_drop_is_stored_or_rejected,
        the_end_of_a_lease_ends_a_wait,
        a_completion_and_a_takeover_never_both_win,
    }
    HOLD holding {
        an_interrupted_key_is_held,
        a_release_in_doubt_holds_the_key,
        a_key_resolved_to_rerun_is_acquired_by_the_next_claim,
        a_key_resolved_as_completed_answers_with_its_result,
        only_a_held_key_can_be_resolved,
        a_held_key_can_be_forgotten_only_after_its_resolution,
        a_late_completion_of_a_held_key_is_accepted,
        after_a_resolution_to_rerun_the_old_holder_completes_but_does_not_renew,
        after_a_resolution_as_completed_the_old_holder_is_superseded,
        a_held_key_counts_as_held_and_not_as_in_progress,
    }
    HOLD limits { held_keys_are_limited }
    EITHER limits {
        keys_outside_the_limits_are_rejected,
        calls_about_stored_keys_reject_invalid_keys_and_accept_long_ones,
        an_invalid_key_fails_its_batch_and_changes_nothing,
        keys_in_progress_are_limited,
        the_limits_are_those_of_the_engine,
        stats_count_the_keys_in_progress,
    }
    EITHER forgetting {
        a_forgotten_key_is_new,
        a_leased_key_is_not_forgotten,
    }
    RERUN forgetting { the_holder_of_a_forgotten_key_is_superseded }
    EITHER renewing {
        a_renewed_lease_starts_again,
        an_expired_lease_is_renewed_if_no_claim_came_first,
        a_dropped_lease_is_not_renewed,
        a_kept_lease_does_not_expire,
        a_kept_lease_is_lost_when_it_was_dropped,
        a_renewal_that_is_not_lost_is_pending,
    }
    RERUN renewing {
        a_lease_expires_after_its_renewal_ended,
        a_lease_that_was_taken_over_is_lost,
        a_batch_of_renewals_answers_for_each_lease,
    }
    EITHER payloads {
        another_payload_is_rejected_while_the_key_is_leased_or_completed,
        a_call_without_a_payload_is_not_compared,
        a_release_without_doubt_forgets_the_payload,
    }
    RERUN payloads {
        a_release_in_doubt_keeps_the_payload,
        a_dropped_lease_keeps_its_payload_for_later_attempts,
    }
    HOLD payloads { a_held_key_keeps_its_payload }
    EITHER waiting {
        a_limit_of_zero_does_not_wait,
        a_wait_ends_at_its_limit,
        a_completion_ends_a_wait,
        a_release_ends_a_wait,
        the_end_of_a_backoff_ends_a_wait,
    }
    RERUN waiting { a_drop_ends_a_wait }
    EITHER dropping {
        a_claim_that_was_dropped_gives_its_lease_back,
        a_waiting_claim_that_was_dropped_gives_its_lease_back,
        a_completion_that_was_dropped_happened_or_did_not,
    }
    EITHER racing {
        one_of_racing_claims_acquires_the_key,
        racing_batches_record_each_key_once,
        racing_waiters_hold_the_key_one_after_the_other,
    }
    EITHER side_writes {
        offsets_and_messages_are_stored_with_their_completion,
        an_offset_can_be_stored_without_a_completion,
        messages_are_listed_in_the_order_of_their_completions,
        removed_messages_are_gone_and_unknown_ids_are_ignored,
    }
    RERUN side_writes {
        a_rejected_completion_stores_no_side_writes,
        after_a_rejected_completion_its_call_stores_messages_and_no_offsets,
    }
    EITHER windows {
        a_completed_key_is_forgotten_when_its_window_is_over,
        the_window_begins_with_the_completion,
        a_key_with_a_shorter_window_is_forgotten_earlier,
        a_longer_window_than_the_store_s_has_no_effect,
        a_released_attempt_is_forgotten_after_a_window,
        the_longest_backoff_ends_before_its_attempt_is_forgotten,
        a_completion_repeated_after_its_window_is_superseded,
        an_expired_payload_binds_no_later_call,
    }
    RERUN windows {
        an_interrupted_attempt_is_forgotten_after_a_window,
        an_expired_lease_is_forgotten_after_a_window,
    }
    RERUN stream_time { an_attempt_is_remembered_until_stream_time_is_a_window_past_its_message }
    HOLD windows { a_held_key_is_not_forgotten_by_time }
    EITHER stream_time {
        a_key_needs_the_timestamp_of_its_message,
        a_key_is_remembered_until_stream_time_is_a_window_past_its_message,
        an_unknown_message_older_than_the_window_is_too_old,
        a_message_older_than_the_window_of_its_key_is_too_old,
        a_message_far_ahead_is_rejected_until_a_second_one_confirms_it,
        the_next_message_of_a_batch_confirms_one_that_is_far_ahead,
        a_message_from_the_future_is_rejected_however_often_it_comes,
        a_check_does_not_advance_stream_time,
        a_completion_has_the_timestamp_of_its_message,
    }
    EITHER limits { a_store_on_its_clock_rejects_timestamps }
};

/// Runs all checks, each on an engine of its own.
pub async fn run(factory: &dyn Factory) -> Report {
    let runs: Vec<_> =
        CHECKS.iter().flat_map(|check| check.policies.iter().map(move |policy| (check, *policy))).collect();
    let mut outcomes = Vec::new();
    for runs in runs.chunks(factory.checks_at_a_time().max(1)) {
        let of_runs = runs.iter().map(|(check, policy)| run_one(factory, check, *policy));
        let names = runs.iter().map(|(check, policy)| check.name(*policy));
        outcomes.extend(names.zip(join_all(of_runs).await));
    }
    Report { outcomes }
}

impl Check {
    fn name(&self, policy: OnInterrupt) -> String {
        match self.policies {
            [_] => self.name.to_owned(),
            _ => format!("{} ({policy:?})", self.name),
        }
    }
}

/// The outputs of all futures, which run at the same time on this task.
async fn join_all<F: Future>(futures: impl Iterator<Item = F>) -> Vec<F::Output> {
    let mut futures: Vec<_> = futures.map(Box::pin).collect();
    let mut outputs: Vec<Option<F::Output>> = futures.iter().map(|_| None).collect();
    poll_fn(|context| {
        let mut is_pending = false;
        for (future, output) in futures.iter_mut().zip(&mut outputs) {
            if output.is_none() {
                match future.as_mut().poll(context) {
                    Poll::Ready(ready) => *output = Some(ready),
                    Poll::Pending => is_pending = true,
                }
            }
        }
        if is_pending { Poll::Pending } else { Poll::Ready(()) }
    })
    .await;
    outputs.into_iter().flatten().collect()
}

async fn run_one(factory: &dyn Factory, check: &Check, policy: OnInterrupt) -> Outcome {
    let setup = (check.setup)(Setup::of(policy, factory.time_unit()));
    let Some(subject) = factory.start(setup).await else { return Outcome::Skipped };
    let bench = Bench::new(subject, setup);
    let run = CatchPanic((check.run)(&bench));
    match tokio::time::timeout(TIME_LIMIT, run).await {
        Ok(Ok(())) => Outcome::Passed,
        Ok(Err(Stop(reason))) => Outcome::Failed(reason),
        Err(_) => Outcome::Failed(format!("it did not end within {TIME_LIMIT:?}")),
    }
}

/// Fails a check that panics, so that the others still run.
struct CatchPanic<'a>(BoxFuture<'a, Verdict>);

impl Future for CatchPanic<'_> {
    type Output = Verdict;

    fn poll(mut self: Pin<&mut Self>, context: &mut std::task::Context<'_>) -> Poll<Verdict> {
        let polled = catch_unwind(AssertUnwindSafe(|| self.0.as_mut().poll(context)));
        polled.unwrap_or_else(|_| Poll::Ready(Err(Stop("the engine panicked".to_owned()))))
    }
}
