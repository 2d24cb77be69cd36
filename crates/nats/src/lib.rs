//! Deliveries of a NATS JetStream pull consumer, for [`onlyonce_delivery`].
//!
//! Part of [onlyonce](https://docs.rs/onlyonce), which re-exports it as `onlyonce::delivery::nats` behind the feature
//! `nats`. `docs/brokers/nats.md` in its repository describes the duplicates, the choice of the key, and the limits of
//! the adapter.
#![cfg_attr(not(test), warn(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

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
use onlyonce_core::{Key, Timestamp};
use onlyonce_delivery::{Delivery, KeyOrigin, SettingError, key_of, reason_line};

use crate::dead_letter::{Detail, Source, dead_letter_headers};

mod dead_letter;

pub use async_nats;
pub use dead_letter::{ID_HEADER, OMITTED_HEADER, REASON_HEADER, SUBJECT_HEADER};

/// Redelivery delay of a message whose dead letter is too large and that must not be terminated.
const TOO_LARGE_DELAY: Duration = Duration::from_secs(3_600);

/// Errors of the consumer and of answers.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An error of the client or the server.
    #[error("{0}")]
    Nats(async_nats::Error),
    /// An invalid setting, here or of the server's consumer.
    #[error(transparent)]
    Setting(#[from] SettingError),
    /// The dead letter is too large for its stream or the server, and terminating the message would lose its payload. The
    /// message is redelivered every hour until the limit is raised or its stream removes it.
    #[error(
        "dead letter of message {sequence} of stream {stream} is too large for subject {subject}; raise the size limit"
    )]
    DeadLetterTooLarge {
        /// The stream of the message.
        stream: String,
        /// The sequence number of the message.
        sequence: u64,
        /// The subject for dead letters.
        subject: String,
    },
}

/// Reads messages of a pull consumer. Made by a [`Builder`].
pub struct Consumer {
    queue: Arc<Queue>,
    messages: pull::Stream,
}

struct Queue {
    context: Context,
    stream: String,
    id_header: HeaderName,
    dead_letters: Option<String>,
    /// Whether the stream retains terminated messages.
    retains_terminated: bool,
}

/// Settings of a [`Consumer`], each with a default. Made by [`Consumer::builder`].
#[must_use = "call `build` to get the consumer"]
pub struct Builder {
    context: Context,
    consumer: PullConsumer,
    id_header: HeaderName,
    dead_letters: Option<String>,
}

impl Builder {
    /// The header with the idempotency key, `Nats-Msg-Id` by default. Messages without it are keyed by a digest of their
    /// payload.
    pub fn id_header(mut self, header: HeaderName) -> Self {
        self.id_header = header;
        self
    }

    /// The subject for dead letters, which a stream must store. Without one, a rejected message is only terminated: the
    /// server publishes `$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED`, and a stream with work queue retention deletes it.
    pub fn dead_letters(mut self, subject: &str) -> Self {
        self.dead_letters = Some(subject.to_owned());
        self
    }

    /// Builds the consumer: queries the retention of its stream and starts to pull.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] if the server's consumer does not use explicit acknowledgements or delivers headers only, and for
    /// a dead letter subject that is empty or has a wildcard. Otherwise the server's error.
    pub async fn build(self) -> Result<Consumer, Error> {
        let Self { context, consumer, id_header, dead_letters } = self;
        let info = consumer.cached_info();
        let config = &info.config;
        let is_explicit = config.ack_policy == AckPolicy::Explicit;
        SettingError::check(is_explicit, "ack_policy", format!("{:?}", config.ack_policy), "explicit")?;
        SettingError::check(!config.headers_only, "headers_only", true, "false: the work needs payloads")?;
        if let Some(dead) = &dead_letters {
            let is_subject = !dead.is_empty() && !dead.contains(|c: char| c.is_whitespace() || c == '*' || c == '>');
            SettingError::check(is_subject, "dead_letters", format!("{dead:?}"), "a subject without wildcards")?;
        }
        if config.max_deliver > 0 {
            tracing::warn!(
                max_deliver = config.max_deliver,
                "the server drops a message after max_deliver deliveries, without a dead letter; set max_deliver to -1"
            );
        }
        let stream = info.stream_name.clone();
        // Decides what happens to a message whose dead letter is too large.
        let retains_terminated = match context.get_stream(&stream).await {
            Ok(stream) => stream.cached_info().config.retention == RetentionPolicy::Limits,
            Err(error) => {
                tracing::warn!(%error, stream, "cannot read the retention of the stream; assuming work queue retention");
                false
            }
        };
        let messages = consumer.messages().await.map_err(failed)?;
        let queue = Queue { context, stream, id_header, dead_letters, retains_terminated };
        Ok(Consumer { queue: Arc::new(queue), messages })
    }
}

impl Consumer {
    /// Reads an existing consumer. It must use explicit acknowledgements, and a `max_deliver` that is unlimited or above
    /// the processor's attempts.
    pub fn builder(context: Context, consumer: &PullConsumer) -> Builder {
        Builder { context, consumer: consumer.clone(), id_header: NATS_MESSAGE_ID, dead_letters: None }
    }

    /// Waits for the next message. `None` after the server has deleted the consumer.
    ///
    /// # Errors
    ///
    /// Errors of the client or the server. After a missed heartbeat the client recovers by itself.
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
    /// The client's message: subject, headers, sequence number.
    #[must_use]
    pub fn message(&self) -> &jetstream::Message {
        &self.message
    }

    /// The id of the producer, also after a redrive from the dead letters.
    fn id(&self) -> Option<&HeaderValue> {
        let headers = self.message.headers.as_ref()?;
        headers.get(ID_HEADER).or_else(|| headers.get(self.queue.id_header.clone()))
    }

    /// Publishes a copy with all our headers, if that is too large with the id alone, and at last without the payload.
    async fn send_dead_letter(&self, subject: &str, reason: &str) -> Result<(), Error> {
        let info = self.message.info().map_err(Error::Nats)?;
        let (stream, sequence) = (info.stream, info.stream_sequence);
        let source = Source { stream, sequence, subject: self.message.subject.as_str() };
        let own = self.message.headers.clone().unwrap_or_default();
        let headers = |own: &HeaderMap, detail| {
            dead_letter_headers(own, &self.queue.id_header, &source, reason, detail).map_err(failed)
        };
        for detail in [Detail::Full, Detail::IdOnly] {
            match self.publish(subject, headers(&own, detail)?, true).await {
                Err(error) if is_too_large(&error) => {}
                stored => return stored.map_err(failed),
            }
        }
        if !self.queue.retains_terminated {
            self.answer(AckKind::Nak(Some(TOO_LARGE_DELAY))).await?;
            let (stream, subject) = (stream.to_owned(), subject.to_owned());
            return Err(Error::DeadLetterTooLarge { stream, sequence, subject });
        }
        tracing::error!(
            stream,
            sequence,
            "dead letter too large: sent without its payload, which remains in the source stream"
        );
        let mut id = HeaderMap::new();
        self.id().into_iter().for_each(|value| id.insert(ID_HEADER, value.clone()));
        let headers = headers(&id, Detail::PayloadOmitted(self.message.payload.len()))?;
        self.publish(subject, headers, false).await.map_err(failed)
    }

    async fn publish(&self, subject: &str, headers: HeaderMap, with_payload: bool) -> Result<(), PublishError> {
        let payload = if with_payload { self.message.payload.clone() } else { Default::default() };
        self.queue.context.publish_with_headers(subject.to_owned(), headers, payload).await?.await.map(drop)
    }

    /// Sends the answer and waits for the server's confirmation: one round trip.
    async fn answer(&self, kind: AckKind) -> Result<(), Error> {
        self.message.double_ack_with(kind).await.map_err(Error::Nats)
    }
}

/// Reported by the client for the server's limit, or by the server for the stream's.
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

    fn id_location(&self) -> String {
        format!("header `{}` of stream `{}`", self.queue.id_header, self.queue.stream)
    }

    /// The time at which the server stored the message.
    fn timestamp(&self) -> Option<Timestamp> {
        let published = self.message.info().ok()?.published;
        u64::try_from(published.unix_timestamp_nanos() / 1_000_000).ok().map(Timestamp::from_unix_ms)
    }

    fn payload(&self) -> &[u8] {
        &self.message.payload
    }

    async fn ack(self) -> Result<(), Error> {
        self.answer(AckKind::Ack).await
    }

    async fn retry_after(self, delay: Duration) -> Result<(), Error> {
        self.answer(AckKind::Nak(Some(delay))).await
    }

    async fn reject(self, reason: &str) -> Result<(), Error> {
        if let Some(subject) = &self.queue.dead_letters {
            self.send_dead_letter(subject, &reason_line(reason)).await?;
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
