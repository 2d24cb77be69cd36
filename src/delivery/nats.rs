//! Deliveries of a NATS JetStream pull consumer. Behind the feature `nats`.
//!
//! `docs/brokers/nats.md` says which duplicates a stream makes, which key to choose, and what is not done here.

use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use async_nats::header::NATS_MESSAGE_ID;
use async_nats::jetstream::consumer::{AckPolicy, PullConsumer, pull};
use async_nats::jetstream::context::{PublishError, PublishErrorKind};
use async_nats::jetstream::stream::RetentionPolicy;
use async_nats::jetstream::{self, AckKind, Context, ErrorCode};
use async_nats::{HeaderMap, HeaderName, HeaderValue};
use futures_core::Stream;

use super::message::{Delivery, KeyOrigin, key_of, reason_line};
use super::nats_letter::{Place, With, letter};
use super::setting::SettingError;
use crate::key::Key;

pub use super::nats_letter::{DEAD_ID, DEAD_OMITTED, DEAD_SUBJECT, DEAD_WHY};

/// How long a message stays away whose dead letter is too large, and that must not be terminated.
const PARKED: Duration = Duration::from_secs(3_600);

/// Why the server did not take an answer, or gave no message.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// What the client or the server says.
    #[error("{0}")]
    Nats(async_nats::Error),
    /// A setting, or the server's consumer, that does not fit.
    #[error(transparent)]
    Setting(#[from] SettingError),
    /// The dead letter is too large for its stream or the server, and terminating the message would lose its payload. It comes
    /// back every hour, until the limit is raised or its stream forgets it.
    #[error(
        "the dead letter of message {sequence} of stream {stream} is too large for subject {subject}: raise the limit"
    )]
    LetterTooLarge {
        /// The message's stream.
        stream: String,
        /// Its number there.
        sequence: u64,
        /// The subject for dead letters.
        subject: String,
    },
}

/// Reads a pull consumer. Made by a [`Builder`].
pub struct Consumer {
    queue: Arc<Queue>,
    messages: pull::Stream,
}

struct Queue {
    context: Context,
    stream: String,
    id_header: HeaderName,
    dead: Option<String>,
    /// Whether the stream keeps a message that was terminated.
    keeps_terminated: bool,
}

/// The settings of a [`Consumer`], all of which have a default. Made by [`Consumer::builder`].
#[must_use = "call `build` to get the consumer"]
pub struct Builder {
    context: Context,
    consumer: PullConsumer,
    id_header: HeaderName,
    dead: Option<String>,
}

impl Builder {
    /// The header that holds the idempotency key, `Nats-Msg-Id` by default. Messages without it go by their payload's
    /// digest.
    pub fn id_header(mut self, header: HeaderName) -> Self {
        self.id_header = header;
        self
    }

    /// The subject for dead letters, which a stream must store. Without one, what is rejected is only terminated: the
    /// server tells `$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED`, and a stream of work queue retention forgets it.
    pub fn dead_letters(mut self, subject: &str) -> Self {
        self.dead = Some(subject.to_owned());
        self
    }

    /// The consumer. Asks for its stream's retention and begins to pull.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] for a server's consumer that does not acknowledge explicitly or has messages without their
    /// payloads, and for a subject that is empty or has a wildcard. Otherwise what the server says.
    pub async fn build(self) -> Result<Consumer, Error> {
        let Self { context, consumer, id_header, dead } = self;
        let info = consumer.cached_info();
        let config = &info.config;
        let is_explicit = config.ack_policy == AckPolicy::Explicit;
        SettingError::unless(is_explicit, "ack_policy", format!("{:?}", config.ack_policy), "explicit")?;
        SettingError::unless(!config.headers_only, "headers_only", true, "false: payloads are needed")?;
        if let Some(dead) = &dead {
            let is_subject = !dead.is_empty() && !dead.contains(|c: char| c.is_whitespace() || c == '*' || c == '>');
            SettingError::unless(is_subject, "dead_letters", format!("{dead:?}"), "a subject without wildcards")?;
        }
        if config.max_deliver > 0 {
            tracing::warn!(
                max_deliver = config.max_deliver,
                "the server gives up a message after so many deliveries, without a dead letter: set max_deliver to -1"
            );
        }
        let stream = info.stream_name.clone();
        // Only to know what a dead letter without its payload would lose.
        let keeps_terminated = match context.get_stream(&stream).await {
            Ok(known) => known.cached_info().config.retention == RetentionPolicy::Limits,
            Err(error) => {
                tracing::warn!(%error, stream, "the retention of the stream is not known, and taken for that of a work queue");
                false
            }
        };
        let messages = consumer.messages().await.map_err(failed)?;
        let queue = Queue { context, stream, id_header, dead, keeps_terminated };
        Ok(Consumer { queue: Arc::new(queue), messages })
    }
}

impl Consumer {
    /// Reads a consumer that is there. It must acknowledge explicitly, and deliver without a limit or more often than
    /// the processor makes attempts.
    pub fn builder(context: Context, consumer: &PullConsumer) -> Builder {
        Builder { context, consumer: consumer.clone(), id_header: NATS_MESSAGE_ID, dead: None }
    }

    /// The next message. Waits for it. `None` when the consumer is gone.
    ///
    /// # Errors
    ///
    /// What the client or the server says; a missed heartbeat mends itself.
    pub async fn next(&mut self) -> Result<Option<Message>, Error> {
        let message = poll_fn(|context| Pin::new(&mut self.messages).poll_next(context)).await;
        let message = message.transpose().map_err(failed)?;
        Ok(message.map(|message| Message { queue: Arc::clone(&self.queue), message }))
    }
}

/// A message of a stream.
pub struct Message {
    queue: Arc<Queue>,
    message: jetstream::Message,
}

impl Message {
    /// What the client makes of it: subject, headers, its number in the stream.
    #[must_use]
    pub fn message(&self) -> &jetstream::Message {
        &self.message
    }

    /// The id that its producer gave it, also where it comes back from the dead letters.
    fn id(&self) -> Option<&HeaderValue> {
        let headers = self.message.headers.as_ref()?;
        headers.get(DEAD_ID).or_else(|| headers.get(self.queue.id_header.clone()))
    }

    /// Publishes its copy: with our headers, with fewer of them where that is too large, and in the end without its payload.
    async fn bury(&self, dead: &str, why: &str) -> Result<(), Error> {
        let info = self.message.info().map_err(Error::Nats)?;
        let place =
            Place { stream: info.stream, sequence: info.stream_sequence, subject: self.message.subject.as_str() };
        let own = self.message.headers.clone().unwrap_or_default();
        for with in [With::All, With::Least] {
            let headers = letter(&own, &self.queue.id_header, &place, why, with).map_err(failed)?;
            match self.publish(dead, headers, true).await {
                Err(error) if is_too_large(&error) => {}
                stored => return stored.map_err(failed),
            }
        }
        let (stream, sequence) = (place.stream, place.sequence);
        if !self.queue.keeps_terminated {
            self.answer(AckKind::Nak(Some(PARKED))).await?;
            return Err(Error::LetterTooLarge { stream: stream.to_owned(), sequence, subject: dead.to_owned() });
        }
        tracing::error!(
            stream,
            sequence,
            "a dead letter is too large and goes without its payload, which stays in the stream"
        );
        let mut id = HeaderMap::new();
        self.id().into_iter().for_each(|value| id.insert(DEAD_ID, value.clone()));
        let omitted = With::Omitted(self.message.payload.len());
        let headers = letter(&id, &self.queue.id_header, &place, why, omitted).map_err(failed)?;
        self.publish(dead, headers, false).await.map_err(failed)
    }

    async fn publish(&self, dead: &str, headers: HeaderMap, with_payload: bool) -> Result<(), PublishError> {
        let payload = if with_payload { self.message.payload.clone() } else { Default::default() };
        self.queue.context.publish_with_headers(dead.to_owned(), headers, payload).await?.await.map(drop)
    }

    /// Waits until the server has taken the answer: one way there and back.
    async fn answer(&self, kind: AckKind) -> Result<(), Error> {
        self.message.double_ack_with(kind).await.map_err(Error::Nats)
    }
}

/// By the client, which knows the server's limit, or by the stream's limit.
fn is_too_large(error: &PublishError) -> bool {
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<jetstream::Error>());
    error.kind() == PublishErrorKind::MaxPayloadExceeded
        || source.is_some_and(|error| error.error_code() == ErrorCode::STREAM_MESSAGE_EXCEEDS_MAXIMUM)
}

impl Delivery for Message {
    type Error = Error;

    fn key(&self) -> Key<'_> {
        key_of(self.id().map(|id| id.as_str().as_bytes()), &self.message.payload, &self.queue.stream)
    }

    fn key_origin(&self) -> KeyOrigin {
        KeyOrigin::of(self.id().map(|id| id.as_str().as_bytes()))
    }

    fn id_place(&self) -> String {
        format!("header `{}` of stream `{}`", self.queue.id_header, self.queue.stream)
    }

    /// When the server has stored it.
    fn timestamp_ms(&self) -> Option<u64> {
        let published = self.message.info().ok()?.published;
        u64::try_from(published.unix_timestamp_nanos() / 1_000_000).ok()
    }

    fn payload(&self) -> &[u8] {
        &self.message.payload
    }

    async fn ack(self) -> Result<(), Error> {
        self.answer(AckKind::Ack).await
    }

    async fn retry_after(self, wait: Duration) -> Result<(), Error> {
        self.answer(AckKind::Nak(Some(wait))).await
    }

    async fn reject(self, why: &str) -> Result<(), Error> {
        if let Some(dead) = &self.queue.dead {
            self.bury(dead, &reason_line(why)).await?;
        }
        self.answer(AckKind::Term).await
    }
}

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::Nats(error.into())
}

impl fmt::Debug for Consumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consumer").field("stream", &self.queue.stream).finish_non_exhaustive()
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Message").field("subject", &self.message.subject).finish_non_exhaustive()
    }
}
