//! Derives from a response what happens to its idempotency key.

use http::StatusCode;
use http::header::RETRY_AFTER;
use http::response::Parts;

use crate::attempt::Attempt;

/// What happens to the idempotency key after the handler has responded.
///
/// [`IdempotencyLayer::disposition`](crate::IdempotencyLayer::disposition) derives it from the response. A handler overrides
/// it by adding a `Disposition` to the extensions of its response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Disposition {
    /// The work is finished, successfully or not. The response is stored, and every retry gets it.
    Store,
    /// The work had no effect. The key is released, and a retry runs the handler.
    Release,
    /// It is unknown whether the work had an effect. Under
    /// [`OnInterrupt::Rerun`](onlyonce_core::OnInterrupt::Rerun) a retry runs the handler, and
    /// [`Attempt::may_have_happened`] is true. Under [`OnInterrupt::Hold`](onlyonce_core::OnInterrupt::Hold) the key is held
    /// for resolution.
    Interrupted,
}

/// The default rule. `docs/http.md` gives the reason for each status.
pub(crate) fn default_rule(response: &Parts) -> Disposition {
    match by_status(response.status) {
        // The server asks for a retry, so the retry must not get this response again.
        Disposition::Store if response.status.is_client_error() && response.headers.contains_key(RETRY_AFTER) => {
            Disposition::Interrupted
        }
        disposition => disposition,
    }
}

/// A status releases the key only if its specification says that the request was not processed. A status about a broken
/// connection, a time limit or a failed upstream server may follow the effect, as a 5xx may.
fn by_status(status: StatusCode) -> Disposition {
    match status.as_u16() {
        307 | 308 | 401 | 405 | 407 | 411..=415 | 417 | 421 | 423 | 426 | 428 | 429 | 431 => Disposition::Release,
        406 | 408 | 424 | 425 | 460 | 499 | 500.. => Disposition::Interrupted,
        _ => Disposition::Store,
    }
}

/// Returns whether an error that ends this attempt occurred before its work began.
pub(crate) fn failed_before_begin(explicit_begin: bool, attempt: Option<&Attempt>) -> bool {
    explicit_begin && attempt.is_some_and(|attempt| !attempt.has_begun())
}

/// Decides by, in this order: the handler's own `Disposition`, whether the work has begun, the rule of the layer.
pub(crate) fn decide(
    response: &Parts,
    attempt: Option<&Attempt>,
    explicit_begin: bool,
    rule: impl Fn(&Parts) -> Disposition,
) -> Disposition {
    if let Some(by_handler) = response.extensions.get::<Disposition>() {
        return *by_handler;
    }
    let is_error = response.status.is_client_error() || response.status.as_u16() >= 500;
    if is_error && failed_before_begin(explicit_begin, attempt) {
        return Disposition::Release;
    }
    match rule(response) {
        // A status cannot prove that nothing happened after the handler has called `begin`.
        Disposition::Release if attempt.is_some_and(Attempt::has_begun) => Disposition::Interrupted,
        disposition => disposition,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_status_of_an_unprocessed_request_releases_the_key() {
        let statuses_with = |wanted| -> Vec<u16> {
            (100..=999).filter(|code| by_status(StatusCode::from_u16(*code).unwrap()) == wanted).collect()
        };
        let released = [307, 308, 401, 405, 407, 411, 412, 413, 414, 415, 417, 421, 423, 426, 428, 429, 431];
        assert_eq!(statuses_with(Disposition::Release), released);
        let unknown: Vec<_> = [406, 408, 424, 425, 460, 499].into_iter().chain(500..=999).collect();
        assert_eq!(statuses_with(Disposition::Interrupted), unknown);
        for stored in [200, 201, 204, 301, 302, 303, 400, 402, 403, 404, 409, 410, 416, 422, 451] {
            assert!(statuses_with(Disposition::Store).contains(&stored), "{stored}");
        }
    }

    #[test]
    fn an_error_with_retry_after_is_not_stored() {
        let rule = |status: u16| {
            let response = http::Response::builder().status(status).header(RETRY_AFTER, "1").body(()).unwrap();
            default_rule(&response.into_parts().0)
        };
        assert_eq!([409, 403, 404].map(rule), [Disposition::Interrupted; 3]);
        assert_eq!([202, 301, 303].map(rule), [Disposition::Store; 3]);
        let expected = [Disposition::Release, Disposition::Release, Disposition::Interrupted];
        assert_eq!([429, 413, 503].map(rule), expected);
    }
}
