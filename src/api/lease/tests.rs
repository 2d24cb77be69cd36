use super::*;
use crate::api::operations::only;
use crate::{Claim, Store};

fn store_with_lease(path: &std::path::Path) -> (Store, Lease) {
    let store = Store::open(path).unwrap();
    let Claim::Acquired(lease) = store.claim("k").wait().unwrap() else { panic!("k is new") };
    (store, lease)
}

#[test]
fn a_lease_without_an_answer_fails_and_poisons_the_store() {
    let dir = tempfile::tempdir().unwrap();
    let (store, lease) = store_with_lease(&dir.path().join("store"));
    let shared = Arc::clone(&store.shared);
    let superseded = || Err(lease.grant.superseded());
    let answers = in_order(vec![None, Some(superseded()), None], [Ok(()), Ok(())], &shared, |error| error);
    assert!(matches!(answers[..], [Ok(()), Err(Error::Superseded { .. }), Ok(())]), "{answers:?}");
    assert_eq!(shared.engine().health.poisoned(), None);

    let answers = in_order(vec![None, Some(superseded()), None], [Ok(())], &shared, |error| error);
    let [Ok(()), Err(Error::Superseded { .. }), Err(error @ Error::Broken { .. })] = &answers[..] else {
        panic!("{answers:?}")
    };
    assert_eq!(error.outcome(), Outcome::Unknown);
    let invariant = Invariant::AnswerForEachKey.text();
    assert!(error.to_string().contains(invariant), "{error}");
    let rejected = store.claim("another").wait().unwrap_err();
    assert!(matches!(&rejected, Error::Poisoned { reason } if reason.contains(invariant)), "{rejected}");
    let failed = lease.complete("r").wait().unwrap_err();
    assert!(matches!(failed.error(), Error::Poisoned { .. }), "{failed}");
}

#[test]
fn a_call_with_too_few_or_too_many_answers_fails_and_poisons_the_store() {
    let dir = tempfile::tempdir().unwrap();
    for (answers, keys) in [(vec![1], 2), (vec![1, 2], 1), (vec![], 1)] {
        let (store, _lease) = store_with_lease(&dir.path().join(format!("{}-{keys}", answers.len())));
        let engine = store.shared.engine();
        assert_eq!(engine.health.check_response_count(vec![7; keys], keys).unwrap().len(), keys);
        assert_eq!(engine.health.poisoned(), None);
        let error = engine.health.check_response_count(answers, keys).unwrap_err();
        assert!(matches!(error, Error::Broken { .. }), "{error}");
        assert!(engine.health.poisoned().is_some());
    }
    assert!(matches!(only::<()>(Vec::new()), Err(Error::Broken { .. })));
}
