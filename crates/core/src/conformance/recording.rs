use super::bench::{Bench, Setup, Verdict, ensure, ensure_eq, ensure_matches};
use crate::answer::{KeyStatus, RecordOutcome, StoredKey};
use crate::attempt::PriorAttempt;
use crate::key::Key;

const DUPLICATE: RecordOutcome = RecordOutcome::Duplicate { in_flight: false };

pub(super) fn setup(setup: Setup) -> Setup {
    setup
}

pub(super) async fn a_key_is_recorded_once(bench: &Bench) -> Verdict {
    ensure_eq!(bench.record("k").await??, RecordOutcome::First, "the first record");
    ensure_eq!(bench.record("k").await??, DUPLICATE, "the second record");
    let completed = bench.completed("k").await?;
    ensure_eq!(completed.result(), None, "the result of a recorded key");
    ensure!(!completed.is_result_too_large(), "a recorded key has no result that is too large");
    ensure_matches!(bench.check("k").await??, KeyStatus::Completed(_), "a check");
    ensure_matches!(bench.engine.inspect("k".into()).await?, Some(StoredKey::Completed(_)), "what is stored");
    let later = bench.acquire("later").await?;
    ensure!(completed.token() < later.token(), "a record takes a token like a lease");
    Ok(())
}

pub(super) async fn a_key_that_occurs_twice_in_a_batch_is_recorded_once(bench: &Bench) -> Verdict {
    let answers = bench.engine.record(["a", "b", "a"].map(Key::from).to_vec()).await?;
    ensure_matches!(
        &answers[..],
        [Ok(RecordOutcome::First), Ok(RecordOutcome::First), Ok(RecordOutcome::Duplicate { in_flight: false })],
        "the answers"
    );
    Ok(())
}

pub(super) async fn a_leased_key_is_not_recorded(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    ensure_eq!(bench.record("k").await??, RecordOutcome::Duplicate { in_flight: true }, "the record");
    bench.complete(&grant, "r").await??;
    ensure_eq!(bench.record("k").await??, DUPLICATE, "the record after completion");
    ensure_eq!(bench.completed("k").await?.result(), Some(&b"r"[..]), "the result");
    Ok(())
}

pub(super) async fn a_released_key_is_recorded(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    bench.release(&grant).await??;
    let again = bench.acquire_as("k", 2, Some(PriorAttempt::Released)).await?;
    bench.release(&again).await??;
    ensure_eq!(bench.record("k").await??, RecordOutcome::First, "the record");
    ensure_eq!(bench.record("k").await??, DUPLICATE, "the second record");
    Ok(())
}
