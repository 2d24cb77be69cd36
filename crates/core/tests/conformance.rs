//! The conformance suite: `MemoryStore` passes it, and engines that break one rule each fail it.

mod broken;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use broken::{BrokenFactory, RULES, Rule};
use onlyonce_core::BoxFuture;
use onlyonce_core::conformance::{self, Clock, Factory, Outcome, Setup, Subject};
use onlyonce_core::testing::MemoryStore;

/// The store that a check asks for.
fn memory_store(setup: Setup) -> MemoryStore {
    let builder = MemoryStore::builder()
        .window(setup.window)
        .lease(setup.lease)
        .on_interrupt(setup.on_interrupt)
        .result_limit(setup.result_limit)
        .key_limit(setup.key_limit)
        .in_flight_limit(setup.in_flight_limit)
        .held_limit(setup.held_limit);
    let builder = match setup.max_ahead {
        Some(max_ahead) => builder.stream_time(max_ahead),
        None => builder,
    };
    builder.build().unwrap()
}

/// Tokio's time, while it is paused.
struct PausedClock;

impl Clock for PausedClock {
    fn advance(&self, by: Duration) -> BoxFuture<'_, ()> {
        Box::pin(tokio::time::advance(by))
    }
}

struct OnPausedTime;

impl Factory for OnPausedTime {
    fn start(&self, setup: Setup) -> BoxFuture<'_, Option<Subject>> {
        Box::pin(async move { Some(Subject::new(memory_store(setup)).clock(PausedClock)) })
    }
}

struct OnRealTime;

impl Factory for OnRealTime {
    fn start(&self, setup: Setup) -> BoxFuture<'_, Option<Subject>> {
        Box::pin(async move { Some(Subject::new(memory_store(setup)).keep("a temporary directory")) })
    }

    fn time_unit(&self) -> Duration {
        Duration::from_millis(100)
    }

    fn checks_at_a_time(&self) -> usize {
        200
    }
}

#[tokio::test(start_paused = true)]
async fn the_memory_store_passes_on_paused_time() {
    let report = conformance::run(&OnPausedTime).await;
    assert!(report.outcomes.iter().all(|(_, outcome)| *outcome != Outcome::Skipped));
    assert!(report.outcomes.len() > 100, "{} checks are too few", report.outcomes.len());
    report.into_result().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_memory_store_passes_on_real_time_and_several_threads() {
    conformance::run(&OnRealTime).await.into_result().unwrap();
}

/// The names of the checks that an engine fails, without the policy.
async fn failed_checks(rule: Rule) -> BTreeSet<String> {
    let failed = conformance::run(&BrokenFactory(rule)).await.into_result().err();
    failed.into_iter().flat_map(|failed| failed.checks).map(|(name, _)| without_policy(&name)).collect()
}

fn without_policy(name: &str) -> String {
    name.split(' ').next().unwrap_or_default().to_owned()
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_breaks_a_rule_fails_the_check_of_the_rule_and_every_check_can_fail() {
    let outcomes = conformance::run(&OnPausedTime).await.outcomes;
    let mut never_failed: BTreeSet<String> = outcomes.iter().map(|(name, _)| without_policy(name)).collect();
    let mut uncaught = Vec::new();
    for (rule, checks) in RULES {
        let failed = failed_checks(*rule).await;
        uncaught.extend(checks.iter().filter(|check| !failed.contains(**check)).map(|check| (*rule, *check)));
        if !rule.stops_every_call() {
            never_failed.retain(|check| !failed.contains(check));
        }
    }
    assert!(uncaught.is_empty(), "not caught: {uncaught:?}");
    assert!(never_failed.is_empty(), "no broken engine fails these checks: {never_failed:?}");
}

#[tokio::test]
async fn checks_of_options_that_an_engine_does_not_have_are_skipped() {
    struct None;
    impl Factory for None {
        fn start(&self, _: Setup) -> BoxFuture<'_, Option<Subject>> {
            Box::pin(async { Option::None })
        }
    }
    let begun = Instant::now();
    let report = conformance::run(&None).await;
    assert!(report.outcomes.iter().all(|(_, outcome)| *outcome == Outcome::Skipped));
    assert!(begun.elapsed() < Duration::from_secs(10));
    report.into_result().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_failed_check_is_named_with_its_reason_and_the_others_still_run() {
    let report = conformance::run(&BrokenFactory(Rule::ResultsAreEmpty)).await;
    let all = report.outcomes.len();
    let failed = report.into_result().unwrap_err();
    assert_eq!(failed.of, all);
    assert!(failed.checks.len() < all / 4, "{failed}");
    let text = failed.to_string();
    assert!(text.contains("a_completed_key_answers_with_its_result (Rerun): the result: expected"), "{text}");
}
