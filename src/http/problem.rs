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
            // The status of the first answer, where it is known: a client that gets an error may retry with another key.
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
            Self::ScopeMissing => "Request has no idempotency scope",
            Self::BodyBroken => "Request body is incomplete",
            Self::BodyTooLarge { .. } => "Request body is too large",
            Self::KeyReused => "Idempotency-Key is already used",
            Self::Outstanding { .. } => "A request is outstanding for this Idempotency-Key",
            Self::Held => "A request with this Idempotency-Key was interrupted",
            Self::Overtaken => "Another request with this Idempotency-Key took over",
            Self::StoreFailed { .. } => "Idempotency keys cannot be checked",
            Self::AnswerNotStored => "The outcome could not be stored",
            Self::HandlerFailed => "The request was interrupted",
            Self::AnswerNotKept { .. } => "The request was processed before, and its answer was not kept",
            Self::AnswerUnreadable => "The request was processed before, and its answer cannot be read",
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
            Self::KeyTooLong { limit } => format!("A key has at most {limit} bytes.").into(),
            Self::ScopeMissing => "The service cannot determine which client the key belongs to. Check the credentials of \
                                   the request."
                .into(),
            Self::BodyBroken => "The request was not processed. Send it again with the same key.".into(),
            Self::BodyTooLarge { limit } => {
                format!("The request was not processed. A request body has at most {limit} bytes.").into()
            }
            Self::KeyReused => "The key was used before for a different request. Use a new key for a new request. To retry, \
                                send the original request unchanged."
                .into(),
            Self::Outstanding { .. } => "The request is being processed. Retry later with the same key.".into(),
            Self::Held => {
                "The outcome is unknown and requires manual resolution. Do not retry with a different key.".into()
            }
            Self::Overtaken => "Retry with the same key to get the answer of the other request.".into(),
            Self::StoreFailed { .. } => "The request was not processed. Retry later with the same key.".into(),
            Self::AnswerNotStored | Self::HandlerFailed => {
                "The request may have been processed. Retry later with the same key, not with a different one.".into()
            }
            Self::AnswerNotKept { status: Some(_) } => {
                "The status is the original one. The body was too large to be stored. The request was not processed again."
                    .into()
            }
            Self::AnswerNotKept { status: None } | Self::AnswerUnreadable => {
                "The request was not processed again. Find out its outcome before you retry with a different key.".into()
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

    /// Every text that a client can get.
    fn all() -> Vec<Problem> {
        let status = Some(StatusCode::CREATED);
        vec![
            Problem::KeyMissing,
            Problem::KeyMalformed("The key is empty."),
            Problem::KeyTooLong { limit: 255 },
            Problem::ScopeMissing,
            Problem::BodyBroken,
            Problem::BodyTooLarge { limit: 1_024 },
            Problem::KeyReused,
            Problem::Outstanding { retry_after: Duration::ZERO },
            Problem::Held,
            Problem::Overtaken,
            Problem::StoreFailed { retryable: true },
            Problem::AnswerNotStored,
            Problem::HandlerFailed,
            Problem::AnswerNotKept { status },
            Problem::AnswerNotKept { status: None },
            Problem::AnswerUnreadable,
        ]
    }

    #[test]
    fn what_clients_read_is_plain_and_says_what_to_do() {
        let unclear = ["told", "tell", "nobody", "somebody", "whoever", "waits for a decision", "behind", "goes"];
        for problem in all() {
            let (title, detail) = (problem.title(), problem.detail());
            for words in unclear {
                assert!(!title.contains(words) && !detail.contains(words), "{words}: {title}: {detail}");
            }
            // A title names the matter, a detail is made of whole sentences.
            assert!(!title.ends_with('.') && detail.ends_with('.'), "{title}: {detail}");
            // What may have been done must not be done again under another key.
            let retry = match problem {
                Problem::AnswerNotKept { status: Some(_) } => "was not processed again",
                Problem::Held | Problem::AnswerNotKept { .. } | Problem::AnswerUnreadable => "with a different key",
                Problem::AnswerNotStored | Problem::HandlerFailed => "with the same key, not with a different one",
                Problem::BodyBroken
                | Problem::Outstanding { .. }
                | Problem::Overtaken
                | Problem::StoreFailed { .. } => "with the same key",
                Problem::KeyMissing | Problem::KeyMalformed(_) => "end ",
                Problem::KeyTooLong { .. } | Problem::BodyTooLarge { .. } => " at most ",
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
