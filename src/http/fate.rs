//! What a handler's answer means for the key of its request.

use http::StatusCode;
use http::header::RETRY_AFTER;
use http::response::Parts;

use super::attempt::Attempt;

/// What happens to a request's key when the handler has answered.
///
/// [`IdempotencyLayer::fate`](super::IdempotencyLayer::fate) decides by the response. A handler that knows better puts a
/// `Fate` among the response's extensions, which overrules everything else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// The work is done, successfully or not: the answer is stored, and every retry gets it.
    Store,
    /// Nothing happened: the key is released, and a retry runs.
    Release,
    /// It is unknown whether anything happened. Under [`OnInterrupt::Rerun`](crate::OnInterrupt::Rerun) a retry runs, and
    /// [`Attempt::may_have_happened`] is true for it; under [`OnInterrupt::Hold`](crate::OnInterrupt::Hold) the key is held.
    Interrupted,
}

/// The default rule. `docs/http.md` has it as a table, with a reason for each status.
pub(super) fn by_default(response: &Parts) -> Fate {
    match by_status(response.status) {
        // A server that asks for a retry does not want it to get the same answer.
        Fate::Store if response.status.is_client_error() && response.headers.contains_key(RETRY_AFTER) => {
            Fate::Interrupted
        }
        fate => fate,
    }
}

/// A status releases the key only where its own specification says that the request was not processed. A status that
/// reports a broken connection, a time limit or the failure of another server may come after the effect, as a 5xx may.
fn by_status(status: StatusCode) -> Fate {
    match status.as_u16() {
        307 | 308 | 401 | 405 | 407 | 411..=415 | 417 | 421 | 423 | 426 | 428 | 429 | 431 => Fate::Release,
        406 | 408 | 424 | 425 | 460 | 499 | 500.. => Fate::Interrupted,
        _ => Fate::Store,
    }
}

/// Whether an error that ends this attempt came before its work.
pub(super) fn is_before_work(explicit_begin: bool, attempt: Option<&Attempt>) -> bool {
    explicit_begin && attempt.is_some_and(|attempt| !attempt.has_begun())
}

/// What an answer means: what the handler says in it, then whether the work had begun, then the rule for responses.
pub(super) fn of(
    response: &Parts,
    attempt: Option<&Attempt>,
    explicit_begin: bool,
    rule: impl Fn(&Parts) -> Fate,
) -> Fate {
    if let Some(said) = response.extensions.get::<Fate>() {
        return *said;
    }
    let is_error = response.status.is_client_error() || response.status.as_u16() >= 500;
    if is_error && is_before_work(explicit_begin, attempt) {
        return Fate::Release;
    }
    match rule(response) {
        // A status cannot say that nothing happened where the handler said that the work began.
        Fate::Release if attempt.is_some_and(Attempt::has_begun) => Fate::Interrupted,
        fate => fate,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_that_says_nothing_about_the_request_is_not_stored_by_default() {
        let with = |wanted| -> Vec<u16> {
            (100..=999).filter(|code| by_status(StatusCode::from_u16(*code).unwrap()) == wanted).collect()
        };
        // Not processed, by the specification of the status.
        let released = [307, 308, 401, 405, 407, 411, 412, 413, 414, 415, 417, 421, 423, 426, 428, 429, 431];
        assert_eq!(with(Fate::Release), released);
        let unknown: Vec<_> = [406, 408, 424, 425, 460, 499].into_iter().chain(500..=999).collect();
        assert_eq!(with(Fate::Interrupted), unknown);
        for stored in [200, 201, 204, 301, 302, 303, 400, 402, 403, 404, 409, 410, 416, 422, 451] {
            assert!(with(Fate::Store).contains(&stored), "{stored}");
        }
    }

    #[test]
    fn an_error_that_asks_for_a_retry_is_not_stored() {
        let of = |status: u16| {
            let response = http::Response::builder().status(status).header(RETRY_AFTER, "1").body(()).unwrap();
            by_default(&response.into_parts().0)
        };
        assert_eq!([409, 403, 404].map(of), [Fate::Interrupted; 3]);
        assert_eq!([202, 301, 303].map(of), [Fate::Store; 3]);
        assert_eq!([429, 413, 503].map(of), [Fate::Release, Fate::Release, Fate::Interrupted]);
    }
}
