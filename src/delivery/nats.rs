//! Deliveries of a NATS JetStream pull consumer. Behind the feature `nats`.
//!
//! `docs/brokers/nats.md` says which duplicates a stream makes, which key to choose, and what is not done here.

use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use async_nats::header::NATS_MESSAGE_ID;
use async_nats::jetstream::consumer::{PullConsumer, pull};
use async_nats::jetstream::{self, AckKind, Context};
use async_nats::{HeaderMap, HeaderName, HeaderValue};
use futures_core::Stream;

use super::message::{Delivery, key_of};
use crate::key::Key;

/// The headers that a dead letter has beside its own: its key, its subject, and why it is one.
pub const DEAD_ID: &str = "Onlyonce-Id";
/// See [`DEAD_ID`].
pub const DEAD_SUBJECT: &str = "Onlyonce-Subject";
/// See [`DEAD_ID`].
pub const DEAD_WHY: &str = "Onlyonce-Why";

/// What the client or the server says.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Error(async_nats::Error);

/// Reads a pull consumer.
pub struct Consumer {
    queue: Arc<Queue>,
    messages: pull::Stream,
}

#[derive(Clone)]
struct Queue {
    context: Context,
    stream: String,
    id_header: HeaderName,
    dead: Option<String>,
}

impl Consumer {
    /// Reads a consumer that is there. It must acknowledge explicitly, and deliver without a limit or more often than
    /// the processor makes attempts.
    ///
    /// # Errors
    ///
    /// What the server says.
    pub async fn new(context: Context, consumer: &PullConsumer) -> Result<Self, Error> {
        let messages = consumer.messages().await.map_err(failed)?;
        let stream = consumer.cached_info().stream_name.clone();
        let queue = Queue { context, stream, id_header: NATS_MESSAGE_ID, dead: None };
        Ok(Self { queue: Arc::new(queue), messages })
    }

    /// The header that holds the idempotency key, `Nats-Msg-Id` by default. Messages without it go by their payload's
    /// digest.
    #[must_use]
    pub fn id_header(self, header: HeaderName) -> Self {
        self.with(|queue| queue.id_header = header)
    }

    /// The subject for dead letters, which a stream must store. Without one, what is rejected is only terminated: the
    /// server tells `$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED`, and a stream of work queue retention forgets it.
    #[must_use]
    pub fn dead_letters(self, subject: &str) -> Self {
        self.with(|queue| queue.dead = Some(subject.to_owned()))
    }

    fn with(mut self, change: impl FnOnce(&mut Queue)) -> Self {
        change(Arc::make_mut(&mut self.queue));
        self
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

    /// The headers of its copy. Under an id of its own, or the server would take it for the message itself where one stream
    /// stores both, and the same id each time, so that a copy that is made again is dropped.
    fn dead_letter(&self, why: &str) -> Result<HeaderMap, Error> {
        let value = |text: &str| text.parse::<HeaderValue>().map_err(failed);
        let mut headers = self.message.headers.clone().unwrap_or_default();
        // An empty one says that there was none.
        headers.insert(DEAD_ID, self.id().cloned().map_or_else(|| value(""), Ok)?);
        headers.insert(DEAD_SUBJECT, value(self.message.subject.as_str())?);
        headers.insert(DEAD_WHY, value(&why.replace(char::is_control, " "))?);
        let info = self.message.info().map_err(Error)?;
        headers.insert(NATS_MESSAGE_ID, value(&format!("{}.{}.dead", info.stream, info.stream_sequence))?);
        Ok(headers)
    }

    /// Waits until the server has taken the answer: one way there and back.
    async fn answer(&self, kind: AckKind) -> Result<(), Error> {
        self.message.double_ack_with(kind).await.map_err(Error)
    }
}

impl Delivery for Message {
    type Error = Error;

    fn key(&self) -> Key<'_> {
        key_of(self.id().map(|id| id.as_str().as_bytes()), &self.message.payload, &self.queue.stream)
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
            let (headers, payload) = (self.dead_letter(why)?, self.message.payload.clone());
            let stored = self.queue.context.publish_with_headers(dead.clone(), headers, payload).await;
            stored.map_err(failed)?.await.map_err(failed)?;
        }
        self.answer(AckKind::Term).await
    }
}

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error(error.into())
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
