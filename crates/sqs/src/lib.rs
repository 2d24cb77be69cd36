//! Deliveries of an SQS queue, standard or FIFO, for [`onlyonce_delivery`].
//!
//! Part of [onlyonce](https://docs.rs/onlyonce), which re-exports it as `onlyonce::delivery::sqs` behind the feature
//! `sqs`. `docs/brokers/sqs.md` in its repository describes the duplicates, the choice of the key, and the limits of
//! the adapter.
#![cfg_attr(not(test), warn(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Weak};
use std::time::Duration;

use aws_sdk_sqs::Client;
use aws_sdk_sqs::error::{DisplayErrorContext, ProvideErrorMetadata, SdkError};
use aws_sdk_sqs::operation::change_message_visibility::ChangeMessageVisibilityError;
use aws_sdk_sqs::operation::send_message::{SendMessageError, SendMessageOutput};
use aws_sdk_sqs::types::{
    ChangeMessageVisibilityBatchRequestEntry, Message as SqsMessage, MessageAttributeValue, MessageSystemAttributeName,
};
use onlyonce_core::{Key, Timestamp};
use onlyonce_delivery::{Delivery, KeyOrigin, SettingError, key_of, reason_line};
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::dead_letter::dead_letter_attributes;

mod dead_letter;

pub use aws_sdk_sqs;
#[cfg(feature = "http")]
pub use aws_smithy_http_client;
pub use dead_letter::{ID_ATTRIBUTE, REASON_ATTRIBUTE};

/// Maximum time that a message stays invisible after it was received.
const MAX_VISIBILITY: Duration = Duration::from_secs(43_200);
/// Maximum number of messages per poll.
const MAX_BATCH: i32 = 10;
/// Suffix of the names of FIFO queues.
const FIFO_SUFFIX: &str = ".fifo";
/// Maximum wait of a poll.
const MAX_POLL: Duration = Duration::from_secs(20);

/// Errors of the consumer and of answers.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An error of the client or the service.
    #[error("{}", DisplayErrorContext(&**.0))]
    Service(Box<aws_sdk_sqs::Error>),
    /// The dead letter queue refuses the message even without the attributes of this adapter, for example because its
    /// `MaximumMessageSize` is smaller. The message is not deleted: it stays invisible for up to 12 hours, and is
    /// redelivered until its retention ends or a redrive policy moves it.
    #[error("dead letter queue {queue} refuses the message: {}; give it the size limit of the queue", DisplayErrorContext(&**.error))]
    DeadLetterRefused {
        /// The URL of the dead letter queue.
        queue: String,
        /// The error of the service.
        error: Box<aws_sdk_sqs::Error>,
    },
}

fn failed<E>(error: E) -> Error
where
    aws_sdk_sqs::Error: From<E>,
{
    Error::Service(Box::new(error.into()))
}

/// Polls a queue. Made by a [`Builder`].
pub struct Consumer {
    queue: Arc<Queue>,
    batch: i32,
    poll: Duration,
    ready: VecDeque<Message>,
}

struct Queue {
    client: Client,
    url: String,
    id_attribute: String,
    fallback: Fallback,
    dead_letters: Option<String>,
    visibility: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fallback {
    Digest,
    MessageId,
}

impl Queue {
    /// The last part of the URL.
    fn name(&self) -> &str {
        name_in(&self.url)
    }
}

fn name_in(url: &str) -> &str {
    url.rsplit('/').next().unwrap_or_default()
}

fn is_fifo(url: &str) -> bool {
    url.ends_with(FIFO_SUFFIX)
}

/// Settings of a [`Consumer`], each with a default. Made by [`Consumer::builder`].
#[must_use = "call `build` to get the consumer"]
pub struct Builder {
    queue: Queue,
    batch: usize,
    poll: Duration,
}

impl Builder {
    /// The message attribute with the idempotency key, `id` by default. Messages without it are keyed by their
    /// deduplication id, which every message of a FIFO queue has, otherwise by a digest of their payload.
    pub fn id_attribute(mut self, name: &str) -> Self {
        name.clone_into(&mut self.queue.id_attribute);
        self
    }

    /// Keys messages with neither attribute nor deduplication id by the message id of the service instead of a payload
    /// digest. Then messages with equal content are distinct, and so is a message that the producer sends twice.
    pub fn fall_back_to_message_id(mut self) -> Self {
        self.queue.fallback = Fallback::MessageId;
        self
    }

    /// The URL of the dead letter queue. Without one, rejected messages are deleted.
    pub fn dead_letters(mut self, queue_url: &str) -> Self {
        self.queue.dead_letters = Some(queue_url.to_owned());
        self
    }

    /// The visibility timeout: the time after which a message is redelivered if its consumer crashes. 30 seconds by
    /// default, from 1 to 43,200 seconds, rounded up to whole seconds. It does not limit the work: the visibility of
    /// messages in this process is extended every third of the timeout, up to 12 hours in total.
    pub fn visibility(mut self, visibility: Duration) -> Self {
        self.queue.visibility = visibility;
        self
    }

    /// How long a poll waits for the first message: 20 seconds by default, the maximum, rounded up to whole seconds.
    pub fn poll(mut self, wait: Duration) -> Self {
        self.poll = wait;
        self
    }

    /// The maximum number of messages per poll, from 1 to 10: by default 10 for a standard queue and 1 for a FIFO queue.
    /// With 1, messages of a group are delivered in order, each after the answer to the one before. A larger batch may
    /// contain several messages of one group; if one is delayed, the later ones are already here.
    pub fn batch(mut self, max: usize) -> Self {
        self.batch = max;
        self
    }

    /// Builds the consumer. Sends no request yet.
    ///
    /// # Errors
    ///
    /// For a time or a batch outside of the bounds of the service, a URL without a queue name, an empty attribute name, or
    /// dead letters that go to the queue itself.
    pub fn build(self) -> Result<Consumer, SettingError> {
        let Self { mut queue, batch, poll } = self;
        let has_name = "a URL that ends with a queue name";
        SettingError::check(!queue.name().is_empty(), "queue_url", &queue.url, has_name)?;
        SettingError::check(!queue.id_attribute.is_empty(), "id_attribute", "empty", "a name")?;
        if let Some(dead) = &queue.dead_letters {
            SettingError::check(!name_in(dead).is_empty(), "dead_letters", dead, has_name)?;
            SettingError::check(*dead != queue.url, "dead_letters", dead, "a queue other than the consumed one")?;
        }
        let visibility = queue.visibility;
        let is_valid = !visibility.is_zero() && visibility <= MAX_VISIBILITY;
        SettingError::check(is_valid, "visibility", format!("{visibility:?}"), "from 1 s to 43,200 s")?;
        queue.visibility = Duration::from_secs(u64::from(seconds(visibility).unsigned_abs()));
        SettingError::check(poll <= MAX_POLL, "poll", format!("{poll:?}"), "at most 20 s")?;
        let max = i32::try_from(batch).ok().filter(|max| (1..=MAX_BATCH).contains(max));
        let batch = max.ok_or_else(|| SettingError::new("batch", batch, "from 1 to 10"))?;
        Ok(Consumer { queue: Arc::new(queue), batch, poll, ready: VecDeque::new() })
    }
}

impl Consumer {
    /// Polls the queue with this URL. Credentials, region, retries and the HTTP client are those of `client`. It needs the
    /// permissions to receive, delete and change the visibility of messages, and to send dead letters.
    pub fn builder(client: Client, queue_url: &str) -> Builder {
        let queue = Queue {
            client,
            url: queue_url.to_owned(),
            id_attribute: "id".to_owned(),
            fallback: Fallback::Digest,
            dead_letters: None,
            visibility: Duration::from_secs(30),
        };
        let batch = if is_fifo(queue_url) { 1 } else { MAX_BATCH.unsigned_abs() as usize };
        Builder { queue, batch, poll: MAX_POLL }
    }

    /// Waits for the next message.
    ///
    /// May be cancelled: messages that were received meanwhile are redelivered after the visibility timeout.
    ///
    /// # Errors
    ///
    /// Errors of the client or the service. The next call polls again.
    pub async fn next(&mut self) -> Result<Message, Error> {
        loop {
            if let Some(message) = self.ready.pop_front() {
                return Ok(message);
            }
            let Queue { client, url, visibility, .. } = &*self.queue;
            // The visibility timeout starts between the request and the response: count from the request.
            let requested = Instant::now();
            let received = client
                .receive_message()
                .queue_url(url)
                .max_number_of_messages(self.batch)
                .wait_time_seconds(seconds(self.poll))
                .visibility_timeout(seconds(*visibility))
                .message_attribute_names("All")
                .message_system_attribute_names(MessageSystemAttributeName::MessageDeduplicationId)
                .message_system_attribute_names(MessageSystemAttributeName::MessageGroupId)
                .message_system_attribute_names(MessageSystemAttributeName::SentTimestamp)
                .send()
                .await
                .map_err(failed)?;
            let extending = Arc::new(Mutex::new(()));
            let message = |received: SqsMessage| {
                let Some(handle) = received.receipt_handle() else {
                    tracing::error!(id = received.message_id(), "message without a receipt handle; skipped");
                    return None;
                };
                let (queue, handle) = (Arc::clone(&self.queue), Arc::new(handle.to_owned()));
                Some(Message { queue, requested, extending: Arc::clone(&extending), handle, received })
            };
            self.ready.extend(received.messages.unwrap_or_default().into_iter().filter_map(message));
            if !self.ready.is_empty() {
                let handles = self.ready.iter().map(|message| Arc::downgrade(&message.handle)).collect();
                tokio::spawn(extend_visibility(Arc::clone(&self.queue), extending, handles, requested));
            }
        }
    }
}

/// Extends the visibility of the unanswered messages of a poll until all are answered.
async fn extend_visibility(
    queue: Arc<Queue>,
    extending: Arc<Mutex<()>>,
    handles: Vec<Weak<String>>,
    requested: Instant,
) {
    loop {
        tokio::time::sleep(queue.visibility / 3).await;
        let guard = extending.lock().await;
        let held: Vec<_> = handles.iter().filter_map(Weak::upgrade).collect();
        let visibility = seconds(queue.visibility.min(visibility_left(requested.elapsed())));
        if held.is_empty() || visibility == 0 {
            return;
        }
        let entry = |(index, handle): (usize, &Arc<String>)| {
            let entry = ChangeMessageVisibilityBatchRequestEntry::builder().visibility_timeout(visibility);
            entry.id(index.to_string()).receipt_handle(handle.as_str()).build()
        };
        let entries = held.iter().enumerate().map(entry).collect::<Result<Vec<_>, _>>();
        let request = queue.client.change_message_visibility_batch().queue_url(&queue.url);
        match entries.map(|entries| request.set_entries(Some(entries)).send()) {
            Ok(sent) => match sent.await {
                // An entry fails if its message was redelivered, or deleted under another receipt.
                Ok(extended) => tracing::debug!(failed = extended.failed.len(), "visibility extended"),
                Err(error) => {
                    tracing::warn!(error = %failed(error), "failed to extend visibility; messages may be redelivered");
                }
            },
            Err(error) => tracing::warn!(%error, "failed to extend visibility; messages may be redelivered"),
        }
        // Before the lock: an answer unwraps the last reference to its handle.
        drop(held);
        drop(guard);
    }
}

/// A message of a queue. If it is dropped without an answer, it is redelivered after the visibility timeout.
pub struct Message {
    queue: Arc<Queue>,
    requested: Instant,
    /// Held during an extension: a late extension must not overwrite the delay of an answer.
    extending: Arc<Mutex<()>>,
    handle: Arc<String>,
    received: SqsMessage,
}

impl Message {
    /// The client's message: attributes, message id, receipt handle.
    #[must_use]
    pub fn message(&self) -> &SqsMessage {
        &self.received
    }

    fn system(&self, name: &MessageSystemAttributeName) -> Option<&str> {
        self.received.attributes()?.get(name).map(String::as_str)
    }

    fn attribute(&self, name: &str) -> Option<&[u8]> {
        let value = self.received.message_attributes()?.get(name)?;
        value.string_value().map(str::as_bytes).or_else(|| value.binary_value().map(AsRef::as_ref))
    }

    /// An id that is not an attribute, so that a copy of the message would lose it.
    fn service_id(&self) -> Option<&str> {
        let message_id = || (self.queue.fallback == Fallback::MessageId).then(|| self.received.message_id()).flatten();
        self.system(&MessageSystemAttributeName::MessageDeduplicationId).or_else(message_id)
    }

    fn attribute_id(&self) -> Option<&[u8]> {
        let id = self.attribute(&self.queue.id_attribute).filter(|id| !id.is_empty());
        id.or_else(|| self.attribute(ID_ATTRIBUTE))
    }

    /// Ends the extension of the visibility.
    async fn into_answer(self) -> (Arc<Queue>, String, SqsMessage) {
        let guard = self.extending.lock().await;
        let handle = Arc::unwrap_or_clone(self.handle);
        drop(guard);
        (self.queue, handle, self.received)
    }

    fn id(&self) -> Option<&[u8]> {
        self.attribute_id().or_else(|| self.service_id().map(str::as_bytes))
    }

    /// Sends a copy to the dead letter queue: with our attributes, with fewer of them if the queue refuses that, and at
    /// last as it was received.
    async fn send_dead_letter(&self, dead: &str, reason: &str) -> Result<(), DeadLetterError> {
        let none = HashMap::new();
        let own = self.received.message_attributes().unwrap_or(&none);
        let id = if self.attribute_id().is_none() { self.service_id() } else { None };
        let mut refused = None;
        let mut tried: Option<HashMap<_, _>> = None;
        for (id, reason) in [(id, Some(reason)), (id, None), (None, None)] {
            let attributes = dead_letter_attributes(own, self.payload().len(), id, reason);
            if tried.as_ref() == Some(&attributes) {
                continue;
            }
            match self.send(dead, attributes.clone()).await {
                Err(error) if is_refusal(&error) => refused = Some(Box::new(error.into())),
                sent => return sent.map(drop).map_err(|error| DeadLetterError::Failed(failed(error))),
            }
            tried = Some(attributes);
        }
        refused.map_or(Ok(()), |error| Err(DeadLetterError::Refused(error)))
    }

    async fn send(
        &self,
        dead: &str,
        attributes: HashMap<String, MessageAttributeValue>,
    ) -> Result<SendMessageOutput, SdkError<SendMessageError>> {
        let body = self.received.body().unwrap_or_default();
        let mut copy = self.queue.client.send_message().queue_url(dead).message_body(body);
        copy = copy.set_message_attributes(Some(attributes).filter(|attributes| !attributes.is_empty()));
        if is_fifo(dead) {
            let message_id = self.received.message_id().unwrap_or_default();
            let group = self.system(&MessageSystemAttributeName::MessageGroupId);
            // One deduplication id per rejection: the service drops a copy that is sent twice.
            copy = copy.message_group_id(group.unwrap_or(message_id)).message_deduplication_id(message_id);
        }
        copy.send().await
    }
}

enum DeadLetterError {
    Refused(Box<aws_sdk_sqs::Error>),
    Failed(Error),
}

/// Whether the service refuses the message itself, so that a retry fails as well.
fn is_refusal<E, R>(error: &SdkError<E, R>) -> bool
where
    E: ProvideErrorMetadata,
{
    let code = error.as_service_error().and_then(ProvideErrorMetadata::code).unwrap_or_default();
    REFUSALS.iter().any(|refusal| code.ends_with(refusal))
}

/// Error codes for the format or the size of a message.
const REFUSALS: &[&str] =
    &["InvalidParameterValue", "InvalidAttributeValue", "InvalidMessageContents", "MessageTooLong"];

impl Delivery for Message {
    type Error = Error;

    fn key(&self) -> Key<'_> {
        key_of(self.id(), self.payload(), self.queue.name())
    }

    fn key_origin(&self) -> KeyOrigin {
        let is_set =
            self.attribute_id().is_some() || self.system(&MessageSystemAttributeName::MessageDeduplicationId).is_some();
        match KeyOrigin::of(self.id()) {
            KeyOrigin::Id if !is_set => KeyOrigin::Position,
            origin => origin,
        }
    }

    fn id_location(&self) -> String {
        format!("message attribute `{}` of queue `{}`", self.queue.id_attribute, self.queue.name())
    }

    /// The time at which the message was sent.
    fn timestamp(&self) -> Option<Timestamp> {
        self.system(&MessageSystemAttributeName::SentTimestamp)?.parse().ok().map(Timestamp::from_unix_ms)
    }

    fn payload(&self) -> &[u8] {
        self.received.body().unwrap_or_default().as_bytes()
    }

    async fn ack(self) -> Result<(), Error> {
        let (queue, handle, _) = self.into_answer().await;
        queue.client.delete_message().queue_url(&queue.url).receipt_handle(handle).send().await.map_err(failed)?;
        Ok(())
    }

    /// In whole seconds, rounded up, and no later than 12 hours after the receipt.
    async fn retry_after(self, delay: Duration) -> Result<(), Error> {
        let visibility = seconds(delay.min(visibility_left(self.requested.elapsed())));
        let (queue, handle, _) = self.into_answer().await;
        let change = queue.client.change_message_visibility().queue_url(&queue.url).receipt_handle(handle);
        match change.visibility_timeout(visibility).send().await {
            Err(error) if is_no_longer_in_flight(&error) => Ok(()),
            changed => changed.map(drop).map_err(failed),
        }
    }

    async fn reject(self, reason: &str) -> Result<(), Error> {
        if let Some(queue) = self.queue.dead_letters.clone() {
            match self.send_dead_letter(&queue, &reason_line(reason)).await {
                Ok(()) => {}
                Err(DeadLetterError::Failed(error)) => return Err(error),
                Err(DeadLetterError::Refused(error)) => {
                    // An early redelivery would be refused again.
                    self.retry_after(MAX_VISIBILITY).await?;
                    return Err(Error::DeadLetterRefused { queue, error });
                }
            }
        }
        self.ack().await
    }
}

/// The message was redelivered before the delay was set, and may have been deleted under another receipt.
fn is_no_longer_in_flight<R>(error: &SdkError<ChangeMessageVisibilityError, R>) -> bool {
    let Some(error) = error.as_service_error() else { return false };
    error.is_message_not_inflight()
        || error.is_receipt_handle_is_invalid()
        // The code for a deleted message. The delay itself is within the bounds.
        || error.code() == Some("InvalidParameterValue")
}

/// How much longer a message may stay invisible that was received this long ago. In whole seconds, less one for the
/// request: the service refuses a total over the limit.
fn visibility_left(since: Duration) -> Duration {
    Duration::from_secs(MAX_VISIBILITY.saturating_sub(since).as_secs().saturating_sub(1))
}

/// Whole seconds, rounded up, as the service takes them.
fn seconds(time: Duration) -> i32 {
    let whole = time.as_secs().saturating_add(u64::from(time.subsec_nanos() > 0));
    i32::try_from(whole.min(MAX_VISIBILITY.as_secs())).unwrap_or(i32::MAX)
}

impl fmt::Debug for Consumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consumer").field("queue", &self.queue.url).finish_non_exhaustive()
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let id = self.received.message_id();
        f.debug_struct("Message").field("queue", &self.queue.url).field("id", &id).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_whole_seconds_within_the_bounds_of_the_service() {
        let of_ms = |ms| seconds(Duration::from_millis(ms));
        assert_eq!([0, 1, 999, 1_000, 1_001, 43_200_000, 43_200_001].map(of_ms), [0, 1, 1, 1, 2, 43_200, 43_200]);
        assert_eq!(seconds(Duration::MAX), 43_200);
        let left = |since_ms| seconds(Duration::MAX.min(visibility_left(Duration::from_millis(since_ms))));
        assert_eq!([0, 1, 1_000, 43_199_000, 50_000_000].map(left), [43_199, 43_198, 43_198, 0, 0]);
    }

    fn builder() -> Builder {
        let client = Client::from_conf(aws_sdk_sqs::Config::builder().behavior_version_latest().build());
        Consumer::builder(client, "http://127.0.0.1:1/1/orders")
    }

    #[test]
    fn an_invalid_setting_is_an_error_that_names_it() {
        let named = |builder: Builder| builder.build().err().unwrap().setting;
        assert_eq!(named(builder().visibility(Duration::ZERO)), "visibility");
        assert_eq!(named(builder().visibility(Duration::from_secs(43_201))), "visibility");
        assert_eq!(named(builder().poll(Duration::from_millis(20_001))), "poll");
        assert_eq!(named(builder().batch(0)), "batch");
        assert_eq!(named(builder().batch(11)), "batch");
        assert_eq!(named(builder().id_attribute("")), "id_attribute");
        assert_eq!(named(builder().dead_letters("http://127.0.0.1:1/1/orders")), "dead_letters");
        let built =
            builder().visibility(Duration::from_millis(1_500)).dead_letters("http://127.0.0.1:1/1/dead").build();
        let queue = built.unwrap().queue;
        assert_eq!((queue.visibility.as_secs(), queue.dead_letters.as_deref()), (2, Some("http://127.0.0.1:1/1/dead")));
    }
}
