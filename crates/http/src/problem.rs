//! The layer's own responses, as `application/problem+json` (RFC 9457).

use std::borrow::Cow;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_LANGUAGE, CONTENT_TYPE, HeaderValue, LINK, RETRY_AFTER};
use http::{Response, StatusCode, Uri};
use serde::Serialize;

/// A reason to reject a request or to withhold its response. No text repeats data of the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Problem {
    KeyMissing,
    KeyMalformed(&'static str),
    KeyTooLong { limit: usize },
    ScopeMissing,
    BodyIncomplete,
    BodyTooLarge { limit: usize },
    KeyReused,
    InProgress { retry_after: Duration },
    Held,
    Superseded,
    StoreUnavailable { retryable: bool },
    OutcomeNotStored,
    HandlerFailed,
    ResponseNotStored { status: Option<StatusCode> },
    ResponseUnreadable,
}

#[derive(Serialize)]
struct Body<'a> {
    r#type: Cow<'a, str>,
    title: &'a str,
    status: u16,
    detail: Cow<'a, str>,
    code: &'a str,
}

impl Problem {
    pub(crate) fn status(self) -> StatusCode {
        match self {
            Self::KeyMissing | Self::KeyMalformed(_) | Self::KeyTooLong { .. } | Self::BodyIncomplete => {
                StatusCode::BAD_REQUEST
            }
            Self::ScopeMissing => StatusCode::FORBIDDEN,
            Self::BodyTooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::KeyReused => StatusCode::UNPROCESSABLE_ENTITY,
            Self::InProgress { .. } | Self::Held | Self::Superseded => StatusCode::CONFLICT,
            Self::StoreUnavailable { .. } | Self::OutcomeNotStored => StatusCode::SERVICE_UNAVAILABLE,
            Self::HandlerFailed | Self::ResponseUnreadable => StatusCode::INTERNAL_SERVER_ERROR,
            // The original status if it is known: after an error, a client may retry with another key.
            Self::ResponseNotStored { status } => status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
        }
    }

    /// A stable, machine-readable identifier.
    fn code(self) -> &'static str {
        match self {
            Self::KeyMissing => "key-missing",
            Self::KeyMalformed(_) => "key-malformed",
            Self::KeyTooLong { .. } => "key-too-long",
            Self::ScopeMissing => "scope-missing",
            Self::BodyIncomplete => "body-incomplete",
            Self::BodyTooLarge { .. } => "body-too-large",
            Self::KeyReused => "key-reused",
            Self::InProgress { .. } => "in-progress",
            Self::Held => "held",
            Self::Superseded => "superseded",
            Self::StoreUnavailable { .. } => "store-unavailable",
            Self::OutcomeNotStored => "outcome-not-stored",
            Self::HandlerFailed => "handler-failed",
            Self::ResponseNotStored { .. } => "response-not-stored",
            Self::ResponseUnreadable => "response-unreadable",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::KeyMissing => "Idempotency-Key is missing",
            Self::KeyMalformed(_) => "Idempotency-Key is malformed",
            Self::KeyTooLong { .. } => "Idempotency-Key is too long",
            Self::ScopeMissing => "Request has no idempotency scope",
            Self::BodyIncomplete => "Request body is incomplete",
            Self::BodyTooLarge { .. } => "Request body is too large",
            Self::KeyReused => "Idempotency-Key is already used",
            Self::InProgress { .. } => "A request is outstanding for this Idempotency-Key",
            Self::Held => "A request with this Idempotency-Key was interrupted",
            Self::Superseded => "Another request with this Idempotency-Key took over",
            Self::StoreUnavailable { .. } => "Idempotency store is unavailable",
            Self::OutcomeNotStored => "Outcome of the request could not be stored",
            Self::HandlerFailed => "Request was interrupted",
            Self::ResponseNotStored { .. } => "Request was already processed, but its response was not stored",
            Self::ResponseUnreadable => "Request was already processed, but its response cannot be read",
        }
    }

    fn detail(self) -> Cow<'static, str> {
        match self {
            Self::KeyMissing => "This operation requires an idempotency key. Send the request again with a key.".into(),
            Self::KeyMalformed(why) => format!(
                "{why} Send a key in double quotes, or an unquoted key of visible ASCII characters without quotes and \
                 commas."
            )
            .into(),
            Self::KeyTooLong { limit } => format!("The maximum key length is {limit} bytes. Send the request again with a shorter key.").into(),
            Self::ScopeMissing => "The service cannot determine which client the key belongs to. Check the credentials of \
                                   the request."
                .into(),
            Self::BodyIncomplete => "The request was not processed. Send it again with the same key.".into(),
            Self::BodyTooLarge { limit } => {
                format!("The request was not processed. The maximum body size is {limit} bytes.").into()
            }
            Self::KeyReused => "The key was used before for a different request. Use a new key for a new request. To retry, \
                                send the original request unchanged."
                .into(),
            Self::InProgress { .. } => "The request is being processed. Retry later with the same key.".into(),
            Self::Held => {
                "The outcome is unknown and requires manual resolution. Do not retry with a different key.".into()
            }
            Self::Superseded => "Retry with the same key to get the response of the other request.".into(),
            Self::StoreUnavailable { .. } => "The request was not processed. Retry later with the same key.".into(),
            Self::OutcomeNotStored | Self::HandlerFailed => {
                "The request may have been processed. Retry later with the same key, not with a different one.".into()
            }
            Self::ResponseNotStored { status: Some(_) } => {
                "The status is the original one. The body was too large to be stored. The request was not processed again."
                    .into()
            }
            Self::ResponseNotStored { status: None } | Self::ResponseUnreadable => {
                "The request was not processed again. Check its outcome before you retry with a different key.".into()
            }
        }
    }

    fn retry_after(self) -> Option<Duration> {
        match self {
            Self::InProgress { retry_after } => Some(retry_after),
            Self::Superseded | Self::StoreUnavailable { retryable: true } => Some(Duration::from_secs(1)),
            _ => None,
        }
    }

    /// Builds the response. `documentation` is the target of `type` and `Link`.
    pub(crate) fn response(self, documentation: Option<&Uri>) -> Response<Bytes> {
        let body = Body {
            r#type: match documentation {
                Some(uri) => format!("{uri}#{}", self.code()).into(),
                None => "about:blank".into(),
            },
            title: self.title(),
            status: self.status().as_u16(),
            detail: self.detail(),
            code: self.code(),
        };
        // Serializing strings and a number cannot fail.
        let body = serde_json::to_vec(&body).unwrap_or_default();
        let mut response = Response::new(Bytes::from(body));
        *response.status_mut() = self.status();
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        headers.insert(CONTENT_LANGUAGE, HeaderValue::from_static("en"));
        if let Some(after) = self.retry_after() {
            // Rounded up to whole seconds, at least 1.
            let seconds = after.as_secs().saturating_add(u64::from(after.subsec_nanos() > 0)).max(1);
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        let link = documentation.map(|uri| format!("<{uri}>; rel=\"describedby\"; type=\"text/html\""));
        if let Some(link) = link.and_then(|link| HeaderValue::try_from(link).ok()) {
            headers.insert(LINK, link);
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_links_its_documentation_and_rounds_retry_after_up() {
        let uri = Uri::from_static("https://developer.example.com/idempotency");
        let response = Problem::InProgress { retry_after: Duration::from_millis(1_001) }.response(Some(&uri));
        assert_eq!(response.status(), StatusCode::CONFLICT);
        assert_eq!(response.headers()[RETRY_AFTER], "2");
        assert_eq!(
            response.headers()[LINK],
            "<https://developer.example.com/idempotency>; rel=\"describedby\"; type=\"text/html\""
        );
        let json: serde_json::Value = serde_json::from_slice(response.body()).unwrap();
        assert_eq!(json["type"], "https://developer.example.com/idempotency#in-progress");
        assert_eq!((json["status"].as_u64(), json["code"].as_str()), (Some(409), Some("in-progress")));
        let immediate = Problem::InProgress { retry_after: Duration::ZERO }.response(None);
        assert_eq!(immediate.headers()[RETRY_AFTER], "1");
        assert!(Problem::Held.response(None).headers().get(RETRY_AFTER).is_none());
    }

    /// One problem for each text.
    fn all() -> Vec<Problem> {
        let status = Some(StatusCode::CREATED);
        vec![
            Problem::KeyMissing,
            Problem::KeyMalformed("The key is empty."),
            Problem::KeyTooLong { limit: 255 },
            Problem::ScopeMissing,
            Problem::BodyIncomplete,
            Problem::BodyTooLarge { limit: 1_024 },
            Problem::KeyReused,
            Problem::InProgress { retry_after: Duration::ZERO },
            Problem::Held,
            Problem::Superseded,
            Problem::StoreUnavailable { retryable: true },
            Problem::OutcomeNotStored,
            Problem::HandlerFailed,
            Problem::ResponseNotStored { status },
            Problem::ResponseNotStored { status: None },
            Problem::ResponseUnreadable,
        ]
    }

    #[test]
    fn every_problem_says_what_the_client_should_do() {
        for problem in all() {
            let (title, detail) = (problem.title(), problem.detail());
            assert!(!title.ends_with('.') && detail.ends_with('.'), "{title}: {detail}");
            // After an unknown outcome, a retry with another key could repeat the effect.
            let retry = match problem {
                Problem::ResponseNotStored { status: Some(_) } => "was not processed again",
                Problem::Held | Problem::ResponseNotStored { .. } | Problem::ResponseUnreadable => {
                    "with a different key"
                }
                Problem::OutcomeNotStored | Problem::HandlerFailed => "with the same key, not with a different one",
                Problem::BodyIncomplete
                | Problem::InProgress { .. }
                | Problem::Superseded
                | Problem::StoreUnavailable { .. } => "with the same key",
                Problem::KeyMissing | Problem::KeyMalformed(_) => "end ",
                Problem::KeyTooLong { .. } | Problem::BodyTooLarge { .. } => "The maximum ",
                Problem::ScopeMissing => "Check the credentials",
                Problem::KeyReused => "Use a new key for a new request",
            };
            assert!(detail.contains(retry), "{title}: {detail}");
        }
        assert_eq!(Problem::ScopeMissing.title(), "Request has no idempotency scope");
        assert_eq!(
            Problem::Held.detail(),
            "The outcome is unknown and requires manual resolution. Do not retry with a different key."
        );
    }
}
