//! Deliveries of an SQS queue, standard or FIFO. Behind the feature `sqs`.
//!
//! `docs/brokers/sqs.md` says which duplicates a queue makes, which key to choose, and what is not done here.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Weak};
use std::time::Duration;

use aws_sdk_sqs::Client;
use aws_sdk_sqs::error::{DisplayErrorContext, ProvideErrorMetadata, SdkError};
use aws_sdk_sqs::operation::change_message_visibility::ChangeMessageVisibilityError;
use aws_sdk_sqs::operation::send_message::{SendMessageError, SendMessageOutput};
use aws_sdk_sqs::types::{
    ChangeMessageVisibilityBatchRequestEntry, Message as Received, MessageAttributeValue, MessageSystemAttributeName,
};
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::message::{Delivery, KeyOrigin, key_of, reason_line};
use super::setting::SettingError;
use super::sqs_letter::letter;
use crate::key::Key;

pub use super::sqs_letter::{DEAD_ID, DEAD_WHY};

/// A message stays invisible for so long at most, counted from when it was received.
const INVISIBLE_MOST: Duration = Duration::from_secs(43_200);
/// How many messages a poll takes at most.
const BATCH_MOST: i32 = 10;
/// What the name of such a queue ends with.
const FIFO: &str = ".fifo";
/// The longest wait of a poll.
const POLL_MOST: Duration = Duration::from_secs(20);

/// Why the service did not take an answer, or gave no message.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// What the client or the service says.
    #[error("{}", DisplayErrorContext(&**.0))]
    Service(Box<aws_sdk_sqs::Error>),
    /// The queue for dead letters refuses the message even without the attributes of this adapter: the queue takes only
    /// smaller messages, for example. The message was not deleted; it stays invisible for up to 12 hours, and comes back
    /// until its retention is over or a redrive policy moves it.
    #[error("the queue for dead letters {queue} refuses the message: {}; give it the limits of the queue", DisplayErrorContext(&**.error))]
    LetterRefused {
        /// The address of the queue for dead letters.
        queue: String,
        /// What the service says.
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
    falls_back: Fallback,
    dead: Option<String>,
    visibility: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fallback {
    Digest,
    MessageId,
}

impl Queue {
    /// The last part of the address.
    fn name(&self) -> &str {
        name_in(&self.url)
    }
}

fn name_in(url: &str) -> &str {
    url.rsplit('/').next().unwrap_or_default()
}

fn is_fifo(url: &str) -> bool {
    url.ends_with(FIFO)
}

/// The settings of a [`Consumer`], all of which have a default. Made by [`Consumer::builder`].
#[must_use = "call `build` to get the consumer"]
pub struct Builder {
    queue: Queue,
    batch: usize,
    poll: Duration,
}

impl Builder {
    /// The message attribute that holds the idempotency key, `id` by default. Messages without it go by their
    /// deduplication id, which those of a FIFO queue have, and then by their payload's digest.
    pub fn id_attribute(mut self, name: &str) -> Self {
        name.clone_into(&mut self.queue.id_attribute);
        self
    }

    /// Messages with neither attribute nor deduplication id go by the id that the service gives them, not by their
    /// payload's digest. Then two messages that say the same are two pieces of work, and so is what a producer sends
    /// twice.
    pub fn or_message_id(mut self) -> Self {
        self.queue.falls_back = Fallback::MessageId;
        self
    }

    /// The address of the queue for dead letters. Without one, what is rejected is deleted.
    pub fn dead_letters(mut self, queue_url: &str) -> Self {
        self.queue.dead = Some(queue_url.to_owned());
        self
    }

    /// After what time a message comes back whose consumer has died, 30 seconds by default, from 1 to 43,200 seconds; the
    /// service counts whole ones, and a fraction counts as one. It bounds neither the work nor the time for which a message
    /// lies here before it: as long as a message is held in this process, its visibility is extended each third of this
    /// time, up to 12 hours in all.
    pub fn visibility(mut self, visibility: Duration) -> Self {
        self.queue.visibility = visibility;
        self
    }

    /// How long a poll waits for the first message, 20 seconds by default, which is the most; in whole seconds, and a
    /// fraction counts as one.
    pub fn poll(mut self, wait: Duration) -> Self {
        self.poll = wait;
        self
    }

    /// How many messages a poll takes at most, from 1 to 10: by default 10 of a standard queue, and 1 of a FIFO queue.
    /// One by one, no message of a group comes before the one before it is settled. In batches they come together:
    /// where one is to come back later, those behind it are already here.
    pub fn batch(mut self, most: usize) -> Self {
        self.batch = most;
        self
    }

    /// The consumer. Asks the service for nothing yet.
    ///
    /// # Errors
    ///
    /// A time or a batch beyond the bounds of the service, an address without a queue's name, an empty attribute name, or
    /// dead letters that go to the queue itself.
    pub fn build(self) -> Result<Consumer, SettingError> {
        let Self { mut queue, batch, poll } = self;
        SettingError::unless(
            !queue.name().is_empty(),
            "queue_url",
            &queue.url,
            "an address that ends with a queue's name",
        )?;
        SettingError::unless(!queue.id_attribute.is_empty(), "id_attribute", "empty", "a name")?;
        if let Some(dead) = &queue.dead {
            SettingError::unless(
                !name_in(dead).is_empty(),
                "dead_letters",
                dead,
                "an address that ends with a queue's name",
            )?;
            SettingError::unless(*dead != queue.url, "dead_letters", dead, "another queue than that of the consumer")?;
        }
        let visibility = queue.visibility;
        let accepted = !visibility.is_zero() && visibility <= INVISIBLE_MOST;
        SettingError::unless(accepted, "visibility", format!("{visibility:?}"), "from 1 s to 43,200 s")?;
        queue.visibility = Duration::from_secs(u64::from(seconds(visibility).unsigned_abs()));
        SettingError::unless(poll <= POLL_MOST, "poll", format!("{poll:?}"), "20 s at most")?;
        let most = i32::try_from(batch).ok().filter(|most| (1..=BATCH_MOST).contains(most));
        let batch = most.ok_or_else(|| SettingError::new("batch", batch, "from 1 to 10"))?;
        Ok(Consumer { queue: Arc::new(queue), batch, poll, ready: VecDeque::new() })
    }
}

impl Consumer {
    /// Polls the queue with this address. The client is yours: its credentials, region, retries and way to speak HTTP.
    /// It needs the rights to receive, delete and change the visibility of messages, and to send dead letters.
    pub fn builder(client: Client, queue_url: &str) -> Builder {
        let queue = Queue {
            client,
            url: queue_url.to_owned(),
            id_attribute: "id".to_owned(),
            falls_back: Fallback::Digest,
            dead: None,
            visibility: Duration::from_secs(30),
        };
        let batch = if is_fifo(queue_url) { 1 } else { BATCH_MOST.unsigned_abs() as usize };
        Builder { queue, batch, poll: POLL_MOST }
    }

    /// The next message. Waits for it.
    ///
    /// May be dropped: what was received meanwhile comes again when its visibility is over.
    ///
    /// # Errors
    ///
    /// What the client or the service says. The next call tries again.
    pub async fn next(&mut self) -> Result<Message, Error> {
        loop {
            if let Some(message) = self.ready.pop_front() {
                return Ok(message);
            }
            let Queue { client, url, visibility, .. } = &*self.queue;
            // A message is invisible from a moment in between.
            let asked = Instant::now();
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
            let gate = Arc::new(Mutex::new(()));
            let message = |received: Received| {
                let Some(handle) = received.receipt_handle() else {
                    tracing::error!(id = received.message_id(), "a message came without a receipt handle: left out");
                    return None;
                };
                let (queue, handle) = (Arc::clone(&self.queue), Arc::new(handle.to_owned()));
                Some(Message { queue, asked, gate: Arc::clone(&gate), handle, received })
            };
            self.ready.extend(received.messages.unwrap_or_default().into_iter().filter_map(message));
            if !self.ready.is_empty() {
                let handles = self.ready.iter().map(|message| Arc::downgrade(&message.handle)).collect();
                tokio::spawn(keep(Arc::clone(&self.queue), gate, handles, asked));
            }
        }
    }
}

/// Extends the visibility of those messages of a poll that are not answered yet.
async fn keep(queue: Arc<Queue>, gate: Arc<Mutex<()>>, handles: Vec<Weak<String>>, asked: Instant) {
    loop {
        tokio::time::sleep(queue.visibility / 3).await;
        let closed = gate.lock().await;
        let held: Vec<_> = handles.iter().filter_map(Weak::upgrade).collect();
        let visibility = seconds(queue.visibility.min(invisible_rest(asked.elapsed())));
        if held.is_empty() || visibility == 0 {
            return;
        }
        let entry = |(place, handle): (usize, &Arc<String>)| {
            let entry = ChangeMessageVisibilityBatchRequestEntry::builder().visibility_timeout(visibility);
            entry.id(place.to_string()).receipt_handle(handle.as_str()).build()
        };
        let entries = held.iter().enumerate().map(entry).collect::<Result<Vec<_>, _>>();
        let request = queue.client.change_message_visibility_batch().queue_url(&queue.url);
        match entries.map(|entries| request.set_entries(Some(entries)).send()) {
            Ok(sent) => match sent.await {
                // One that is not taken has come back already, or was acknowledged under another receipt.
                Ok(extended) => tracing::debug!(refused = extended.failed.len(), "visibility was extended"),
                Err(error) => {
                    tracing::warn!(error = %failed(error), "visibility was not extended: messages may come twice");
                }
            },
            Err(error) => tracing::warn!(%error, "visibility was not extended: messages may come twice"),
        }
        // Before the gate opens: an answer takes its handle for itself.
        drop(held);
        drop(closed);
    }
}

/// A message of a queue. One that is dropped without an answer comes back when its visibility is over.
pub struct Message {
    queue: Arc<Queue>,
    asked: Instant,
    /// Closed while visibilities are extended, or an answer could be overtaken by what was meant for the time before it.
    gate: Arc<Mutex<()>>,
    handle: Arc<String>,
    received: Received,
}

impl Message {
    /// What the client makes of it: its attributes, its id, its receipt handle.
    #[must_use]
    pub fn message(&self) -> &Received {
        &self.received
    }

    fn system(&self, name: &MessageSystemAttributeName) -> Option<&str> {
        self.received.attributes()?.get(name).map(String::as_str)
    }

    fn attribute(&self, name: &str) -> Option<&[u8]> {
        let value = self.received.message_attributes()?.get(name)?;
        value.string_value().map(str::as_bytes).or_else(|| value.binary_value().map(AsRef::as_ref))
    }

    /// An id that is not among its attributes, and so is lost where it is sent again.
    fn other_id(&self) -> Option<&str> {
        let given = || (self.queue.falls_back == Fallback::MessageId).then(|| self.received.message_id()).flatten();
        self.system(&MessageSystemAttributeName::MessageDeduplicationId).or_else(given)
    }

    fn own_id(&self) -> Option<&[u8]> {
        let own = self.attribute(&self.queue.id_attribute).filter(|id| !id.is_empty());
        own.or_else(|| self.attribute(DEAD_ID))
    }

    /// From here on its visibility is not extended.
    async fn closed(self) -> (Arc<Queue>, String, Received) {
        let closed = self.gate.lock().await;
        let handle = Arc::unwrap_or_clone(self.handle);
        drop(closed);
        (self.queue, handle, self.received)
    }

    fn id(&self) -> Option<&[u8]> {
        self.own_id().or_else(|| self.other_id().map(str::as_bytes))
    }

    /// Sends its copy to the queue for dead letters: with our attributes, with fewer of them where the queue refuses that, and
    /// in the end as it was received.
    async fn bury(&self, dead: &str, why: &str) -> Result<(), Buried> {
        let none = HashMap::new();
        let own = self.received.message_attributes().unwrap_or(&none);
        let id = if self.own_id().is_none() { self.other_id() } else { None };
        let mut refused = None;
        let mut tried: Option<HashMap<_, _>> = None;
        for ours in [(id, Some(why)), (id, None), (None, None)] {
            let attributes = letter(own, self.payload().len(), ours.0, ours.1);
            if tried.as_ref() == Some(&attributes) {
                continue;
            }
            match self.send(dead, attributes.clone()).await {
                Err(error) if is_refusal(&error) => refused = Some(Box::new(error.into())),
                sent => return sent.map(drop).map_err(|error| Buried::Failed(failed(error))),
            }
            tried = Some(attributes);
        }
        refused.map_or(Ok(()), |error| Err(Buried::Refused(error)))
    }

    async fn send(
        &self,
        dead: &str,
        attributes: HashMap<String, MessageAttributeValue>,
    ) -> Result<SendMessageOutput, SdkError<SendMessageError>> {
        let body = self.received.body().unwrap_or_default();
        let mut letter = self.queue.client.send_message().queue_url(dead).message_body(body);
        letter = letter.set_message_attributes(Some(attributes).filter(|attributes| !attributes.is_empty()));
        if is_fifo(dead) {
            let own = self.received.message_id().unwrap_or_default();
            let group = self.system(&MessageSystemAttributeName::MessageGroupId);
            // Once for each time that it is rejected, however often it is sent for that.
            letter = letter.message_group_id(group.unwrap_or(own)).message_deduplication_id(own);
        }
        letter.send().await
    }
}

enum Buried {
    Refused(Box<aws_sdk_sqs::Error>),
    Failed(Error),
}

/// The service does not take a message like this one, however often it is sent.
fn is_refusal<E, R>(error: &SdkError<E, R>) -> bool
where
    E: ProvideErrorMetadata,
{
    let code = error.as_service_error().and_then(ProvideErrorMetadata::code).unwrap_or_default();
    REFUSALS.iter().any(|refusal| code.ends_with(refusal))
}

/// Codes of errors about the form or the size of a message.
const REFUSALS: &[&str] =
    &["InvalidParameterValue", "InvalidAttributeValue", "InvalidMessageContents", "MessageTooLong"];

impl Delivery for Message {
    type Error = Error;

    fn key(&self) -> Key<'_> {
        key_of(self.id(), self.payload(), self.queue.name())
    }

    fn key_origin(&self) -> KeyOrigin {
        let is_given =
            self.own_id().is_some() || self.system(&MessageSystemAttributeName::MessageDeduplicationId).is_some();
        match KeyOrigin::of(self.id()) {
            KeyOrigin::Id if !is_given => KeyOrigin::Position,
            origin => origin,
        }
    }

    fn id_place(&self) -> String {
        format!("message attribute `{}` of queue `{}`", self.queue.id_attribute, self.queue.name())
    }

    /// When it was sent.
    fn timestamp_ms(&self) -> Option<u64> {
        self.system(&MessageSystemAttributeName::SentTimestamp)?.parse().ok()
    }

    fn payload(&self) -> &[u8] {
        self.received.body().unwrap_or_default().as_bytes()
    }

    async fn ack(self) -> Result<(), Error> {
        let (queue, handle, _) = self.closed().await;
        queue.client.delete_message().queue_url(&queue.url).receipt_handle(handle).send().await.map_err(failed)?;
        Ok(())
    }

    /// In whole seconds, rounded up, and not beyond 12 hours after it was received.
    async fn retry_after(self, wait: Duration) -> Result<(), Error> {
        let visibility = seconds(wait.min(invisible_rest(self.asked.elapsed())));
        let (queue, handle, _) = self.closed().await;
        let change = queue.client.change_message_visibility().queue_url(&queue.url).receipt_handle(handle);
        match change.visibility_timeout(visibility).send().await {
            Err(error) if is_no_longer_here(&error) => Ok(()),
            changed => changed.map(drop).map_err(failed),
        }
    }

    async fn reject(self, why: &str) -> Result<(), Error> {
        if let Some(queue) = self.queue.dead.clone() {
            match self.bury(&queue, &reason_line(why)).await {
                Ok(()) => {}
                Err(Buried::Failed(error)) => return Err(error),
                Err(Buried::Refused(error)) => {
                    // It would be refused again at once.
                    self.retry_after(INVISIBLE_MOST).await?;
                    return Err(Error::LetterRefused { queue, error });
                }
            }
        }
        self.ack().await
    }
}

/// It has come back before it was sent away, and may have been acknowledged under another receipt since.
fn is_no_longer_here<R>(error: &SdkError<ChangeMessageVisibilityError, R>) -> bool {
    let Some(error) = error.as_service_error() else { return false };
    error.is_message_not_inflight()
        || error.is_receipt_handle_is_invalid()
        // What the service says of a message that was deleted. The wait was within its bounds.
        || error.code() == Some("InvalidParameterValue")
}

/// How much longer a message may stay invisible that was received so long ago. In whole seconds, one of them for the way to the
/// service, which refuses more than the limit and changes nothing then.
fn invisible_rest(since: Duration) -> Duration {
    Duration::from_secs(INVISIBLE_MOST.saturating_sub(since).as_secs().saturating_sub(1))
}

/// Whole seconds, rounded up, as the service takes them.
fn seconds(wait: Duration) -> i32 {
    let whole = wait.as_secs().saturating_add(u64::from(wait.subsec_nanos() > 0));
    i32::try_from(whole.min(INVISIBLE_MOST.as_secs())).unwrap_or(i32::MAX)
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
    fn waits_are_whole_seconds_within_the_bounds_of_the_service() {
        let of_ms = |ms| seconds(Duration::from_millis(ms));
        assert_eq!([0, 1, 999, 1_000, 1_001, 43_200_000, 43_200_001].map(of_ms), [0, 1, 1, 1, 2, 43_200, 43_200]);
        assert_eq!(seconds(Duration::MAX), 43_200);
        let rest = |since_ms| seconds(Duration::MAX.min(invisible_rest(Duration::from_millis(since_ms))));
        assert_eq!([0, 1, 1_000, 43_199_000, 50_000_000].map(rest), [43_199, 43_198, 43_198, 0, 0]);
    }
    fn builder() -> Builder {
        let client = Client::from_conf(aws_sdk_sqs::Config::builder().behavior_version_latest().build());
        Consumer::builder(client, "http://127.0.0.1:1/1/orders")
    }

    #[test]
    fn a_setting_that_cannot_be_is_an_error_that_names_it() {
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
        assert_eq!((queue.visibility.as_secs(), queue.dead.as_deref()), (2, Some("http://127.0.0.1:1/1/dead")));
    }
}
