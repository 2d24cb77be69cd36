//! The answers that the layer gives itself, as `application/problem+json` (RFC 9457).

use std::borrow::Cow;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_LANGUAGE, CONTENT_TYPE, HeaderValue, LINK, RETRY_AFTER};
use http::{Response, StatusCode, Uri};
use serde::Serialize;

/// What is wrong. None of the texts repeats what a client has sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Problem {
    KeyMissing,
    KeyMalformed(&'static str),
    KeyTooLong { limit: usize },
    ScopeMissing,
    BodyBroken,
    BodyTooLarge { limit: usize },
    KeyReused,
    Outstanding { retry_after: Duration },
    Held,
    Overtaken,
    StoreFailed { retryable: bool },
    AnswerNotStored,
    HandlerFailed,
    AnswerNotKept { status: Option<StatusCode> },
    AnswerUnreadable,
}

#[derive(Serialize)]
struct Json<'a> {
    r#type: Cow<'a, str>,
    title: &'a str,
    status: u16,
    detail: Cow<'a, str>,
    code: &'a str,
}

impl Problem {
    pub(super) fn status(self) -> StatusCode {
        match self {
            Self::KeyMissing | Self::KeyMalformed(_) | Self::KeyTooLong { .. } | Self::BodyBroken => {
                StatusCode::BAD_REQUEST
            }
            Self::ScopeMissing => StatusCode::FORBIDDEN,
            Self::BodyTooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::KeyReused => StatusCode::UNPROCESSABLE_ENTITY,
            Self::Outstanding { .. } | Self::Held | Self::Overtaken => StatusCode::CONFLICT,
            Self::StoreFailed { .. } | Self::AnswerNotStored => StatusCode::SERVICE_UNAVAILABLE,
            Self::HandlerFailed | Self::AnswerUnreadable => StatusCode::INTERNAL_SERVER_ERROR,
            // What is known of the first answer is said: who is told of an error may try again under another key.
            Self::AnswerNotKept { status } => status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
        }
    }

    /// A word for programs, which stays the same.
    fn code(self) -> &'static str {
        match self {
            Self::KeyMissing => "key-missing",
            Self::KeyMalformed(_) => "key-malformed",
            Self::KeyTooLong { .. } => "key-too-long",
            Self::ScopeMissing => "scope-missing",
            Self::BodyBroken => "body-broken",
            Self::BodyTooLarge { .. } => "body-too-large",
            Self::KeyReused => "key-reused",
            Self::Outstanding { .. } => "outstanding",
            Self::Held => "held",
            Self::Overtaken => "overtaken",
            Self::StoreFailed { .. } => "store-failed",
            Self::AnswerNotStored => "answer-not-stored",
            Self::HandlerFailed => "handler-failed",
            Self::AnswerNotKept { .. } => "answer-not-kept",
            Self::AnswerUnreadable => "answer-unreadable",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::KeyMissing => "Idempotency-Key is missing",
            Self::KeyMalformed(_) => "Idempotency-Key is malformed",
            Self::KeyTooLong { .. } => "Idempotency-Key is too long",
            Self::ScopeMissing => "The request belongs to nobody",
            Self::BodyBroken => "The request's body did not arrive",
            Self::BodyTooLarge { .. } => "The request's body is too large",
            Self::KeyReused => "Idempotency-Key is already used",
            Self::Outstanding { .. } => "A request is outstanding for this Idempotency-Key",
            Self::Held => "A request with this Idempotency-Key was interrupted",
            Self::Overtaken => "Another request with this Idempotency-Key has taken over",
            Self::StoreFailed { .. } => "Idempotency keys cannot be checked",
            Self::AnswerNotStored => "The outcome could not be stored",
            Self::HandlerFailed => "The request was interrupted",
            Self::AnswerNotKept { .. } => "The request was done before, and its answer was not kept",
            Self::AnswerUnreadable => "The request was done before, and its answer cannot be read",
        }
    }

    fn detail(self) -> Cow<'static, str> {
        match self {
            Self::KeyMissing => "This operation needs a key, so that it can be retried.".into(),
            Self::KeyMalformed(why) => {
                format!("{why} Send one, in double quotes, or bare in visible ASCII without quotes and commas.").into()
            }
            Self::KeyTooLong { limit } => format!("A key has at most {limit} characters.").into(),
            Self::ScopeMissing => "It is not clear whose key it is.".into(),
            Self::BodyBroken => "Nothing was done. Send the request again with the same key.".into(),
            Self::BodyTooLarge { limit } => format!("Nothing was done. A body has at most {limit} bytes.").into(),
            Self::KeyReused => {
                "The key was first used with another method, path, query or body. Use a new key for a new \
                                request, and the very same request for a retry."
                    .into()
            }
            Self::Outstanding { .. } => "It is being worked on. Send it again later with the same key.".into(),
            Self::Held => "Whether it was done is not known. Its key waits for a decision by the service's operators. \
                           Do not send it with another key before they have told you."
                .into(),
            Self::Overtaken => "Send the request again with the same key to get its answer.".into(),
            Self::StoreFailed { .. } => "Nothing was done. Send the request again later with the same key.".into(),
            Self::AnswerNotStored | Self::HandlerFailed => {
                "It may have been done. Send the request again later with the same key, not with another one.".into()
            }
            Self::AnswerNotKept { status: Some(_) } => {
                "This is its status. Its body was too large to be stored. It was not done again.".into()
            }
            Self::AnswerNotKept { status: None } | Self::AnswerUnreadable => {
                "It was not done again. Ask what came of it before you send it with another key.".into()
            }
        }
    }

    fn retry_after(self) -> Option<Duration> {
        match self {
            Self::Outstanding { retry_after } => Some(retry_after),
            Self::Overtaken | Self::StoreFailed { retryable: true } => Some(Duration::from_secs(1)),
            _ => None,
        }
    }

    /// The answer. `documentation` is what its type and its link point to.
    pub(super) fn response(self, documentation: Option<&Uri>) -> Response<Bytes> {
        let json = Json {
            r#type: match documentation {
                Some(uri) => format!("{uri}#{}", self.code()).into(),
                None => "about:blank".into(),
            },
            title: self.title(),
            status: self.status().as_u16(),
            detail: self.detail(),
            code: self.code(),
        };
        // Strings and a number: it cannot fail. The status would say it all the same.
        let body = serde_json::to_vec(&json).unwrap_or_default();
        let mut response = Response::new(Bytes::from(body));
        *response.status_mut() = self.status();
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        headers.insert(CONTENT_LANGUAGE, HeaderValue::from_static("en"));
        if let Some(after) = self.retry_after() {
            // Whole seconds, and never "at once".
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
    fn a_problem_names_its_documentation_and_rounds_the_wait_up() {
        let uri = Uri::from_static("https://developer.example.com/idempotency");
        let response = Problem::Outstanding { retry_after: Duration::from_millis(1_001) }.response(Some(&uri));
        assert_eq!(response.status(), StatusCode::CONFLICT);
        assert_eq!(response.headers()[RETRY_AFTER], "2");
        assert_eq!(
            response.headers()[LINK],
            "<https://developer.example.com/idempotency>; rel=\"describedby\"; type=\"text/html\""
        );
        let json: serde_json::Value = serde_json::from_slice(response.body()).unwrap();
        assert_eq!(json["type"], "https://developer.example.com/idempotency#outstanding");
        assert_eq!((json["status"].as_u64(), json["code"].as_str()), (Some(409), Some("outstanding")));
        let now = Problem::Outstanding { retry_after: Duration::ZERO }.response(None);
        assert_eq!(now.headers()[RETRY_AFTER], "1");
        assert!(Problem::Held.response(None).headers().get(RETRY_AFTER).is_none());
    }
}
