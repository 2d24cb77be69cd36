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
use aws_sdk_sqs::types::{
    ChangeMessageVisibilityBatchRequestEntry, Message as Received, MessageAttributeValue, MessageSystemAttributeName,
};
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::message::{Delivery, key_of};
use crate::key::Key;

/// The attribute of a dead letter that holds its key's id, where that was no attribute of the message.
pub const DEAD_ID: &str = "Onlyonce-Id";
/// The attribute of a dead letter that says why it is one.
pub const DEAD_WHY: &str = "Onlyonce-Why";

/// A message stays invisible for so long at most, counted from when it was received.
const INVISIBLE_MOST: Duration = Duration::from_secs(43_200);
/// How many messages a poll takes at most.
const BATCH_MOST: i32 = 10;
/// What the name of such a queue ends with.
const FIFO: &str = ".fifo";
/// How many attributes a message may have.
const ATTRIBUTES: usize = 10;
/// Where a message has its reason appended, it is far from the service's limit for a whole message.
const BODY_WITH_WHY: usize = 192 * 1_024;
const WHY_CHARS: usize = 1_000;

/// What the client or the service says.
#[derive(Debug, thiserror::Error)]
#[error("{}", DisplayErrorContext(&**.0))]
pub struct Error(Box<aws_sdk_sqs::Error>);

fn failed<E>(error: E) -> Error
where
    aws_sdk_sqs::Error: From<E>,
{
    Error(Box::new(error.into()))
}

/// Polls a queue.
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
        self.url.rsplit('/').next().unwrap_or_default()
    }

    fn is_fifo(&self) -> bool {
        self.url.ends_with(FIFO)
    }
}

impl Consumer {
    /// Polls the queue with this address. The client is yours: its credentials, region, retries and way to speak HTTP.
    /// It needs the rights to receive, delete and change the visibility of messages, and to send dead letters.
    #[must_use]
    pub fn new(client: Client, queue_url: &str) -> Self {
        let queue = Queue {
            client,
            url: queue_url.to_owned(),
            id_attribute: "id".to_owned(),
            falls_back: Fallback::Digest,
            dead: None,
            visibility: Duration::from_secs(30),
        };
        let batch = if queue.is_fifo() { 1 } else { BATCH_MOST };
        Self { queue: Arc::new(queue), batch, poll: Duration::from_secs(20), ready: VecDeque::new() }
    }

    /// The message attribute that holds the idempotency key, `id` by default. Messages without it go by their
    /// deduplication id, which those of a FIFO queue have, and then by their payload's digest.
    #[must_use]
    pub fn id_attribute(self, name: &str) -> Self {
        self.with(|queue| name.clone_into(&mut queue.id_attribute))
    }

    /// Messages with neither attribute nor deduplication id go by the id that the service gives them, not by their
    /// payload's digest. Then two messages that say the same are two pieces of work, and so is what a producer sends
    /// twice.
    #[must_use]
    pub fn or_message_id(self) -> Self {
        self.with(|queue| queue.falls_back = Fallback::MessageId)
    }

    /// The address of the queue for dead letters. Without one, what is rejected is deleted.
    #[must_use]
    pub fn dead_letters(self, queue_url: &str) -> Self {
        self.with(|queue| queue.dead = Some(queue_url.to_owned()))
    }

    /// After what time a message comes back whose consumer has died, 30 seconds by default, in whole seconds from 1 to
    /// 43,200. It bounds neither the work nor the time for which a message lies here before it: as long as a message is
    /// held in this process, its visibility is extended each third of this time, up to 12 hours in all.
    #[must_use]
    pub fn visibility(self, visibility: Duration) -> Self {
        let whole = Duration::from_secs(u64::from(seconds(visibility).unsigned_abs()));
        self.with(|queue| queue.visibility = whole.max(Duration::from_secs(1)))
    }

    /// How long a poll waits for the first message, 20 seconds by default, which is the most, in whole seconds.
    #[must_use]
    pub fn poll(mut self, wait: Duration) -> Self {
        self.poll = wait.min(Duration::from_secs(20));
        self
    }

    /// How many messages a poll takes at most, from 1 to 10: by default 10 of a standard queue, and 1 of a FIFO queue.
    /// One by one, no message of a group comes before the one before it is settled. In batches they come together:
    /// where one is to come back later, those behind it are already here.
    #[must_use]
    pub fn batch(mut self, most: usize) -> Self {
        self.batch = i32::try_from(most).unwrap_or(BATCH_MOST).clamp(1, BATCH_MOST);
        self
    }

    fn with(mut self, change: impl FnOnce(&mut Queue)) -> Self {
        if let Some(queue) = Arc::get_mut(&mut self.queue) {
            change(queue);
        }
        self
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
            let message = |received: Received| Message {
                queue: Arc::clone(&self.queue),
                asked,
                gate: Arc::clone(&gate),
                handle: Arc::new(received.receipt_handle().unwrap_or_default().to_owned()),
                received,
            };
            self.ready.extend(received.messages.unwrap_or_default().into_iter().map(message));
            if !self.ready.is_empty() {
                let handles = self.ready.iter().map(|message| Arc::downgrade(&message.handle)).collect();
                tokio::spawn(keep(Arc::clone(&self.queue), gate, handles, asked));
            }
        }
    }
}

/// Extends the visibility of those messages of a poll that are not answered yet.
async fn keep(queue: Arc<Queue>, gate: Arc<Mutex<()>>, handles: Vec<Weak<String>>, asked: Instant) {
    let until = asked + INVISIBLE_MOST;
    loop {
        tokio::time::sleep(queue.visibility / 3).await;
        let closed = gate.lock().await;
        let held: Vec<_> = handles.iter().filter_map(Weak::upgrade).collect();
        let visibility = seconds(queue.visibility.min(until - Instant::now()));
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

    /// The attributes of its copy.
    fn letter(&self, why: &str) -> HashMap<String, MessageAttributeValue> {
        let mut attributes = self.received.message_attributes().cloned().unwrap_or_default();
        attributes.remove(DEAD_WHY);
        if self.own_id().is_none()
            && let Some(id) = self.other_id()
        {
            attributes.extend(text(id).map(|id| (DEAD_ID.to_owned(), id)));
        }
        if attributes.len() < ATTRIBUTES && self.payload().len() <= BODY_WITH_WHY {
            let why: String = why.chars().map(printable).take(WHY_CHARS).collect();
            attributes.extend(text(&why).map(|why| (DEAD_WHY.to_owned(), why)));
        }
        attributes
    }
}

impl Delivery for Message {
    type Error = Error;

    fn key(&self) -> Key<'_> {
        let id = self.own_id().or_else(|| self.other_id().map(str::as_bytes));
        key_of(id, self.payload(), self.queue.name())
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
        let visibility = seconds(wait.min(INVISIBLE_MOST.saturating_sub(self.asked.elapsed())));
        let (queue, handle, _) = self.closed().await;
        let change = queue.client.change_message_visibility().queue_url(&queue.url).receipt_handle(handle);
        match change.visibility_timeout(visibility).send().await {
            Err(error) if is_no_longer_here(&error) => Ok(()),
            changed => changed.map(drop).map_err(failed),
        }
    }

    async fn reject(self, why: &str) -> Result<(), Error> {
        if let Some(dead) = &self.queue.dead {
            let mut letter =
                self.queue.client.send_message().queue_url(dead).message_body(self.received.body().unwrap_or_default());
            letter = letter.set_message_attributes(Some(self.letter(why)));
            if dead.ends_with(FIFO) {
                let own = self.received.message_id().unwrap_or_default();
                let group = self.system(&MessageSystemAttributeName::MessageGroupId);
                // Once for each time that it is rejected, however often it is sent for that.
                letter = letter.message_group_id(group.unwrap_or(own)).message_deduplication_id(own);
            }
            letter.send().await.map_err(failed)?;
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

/// Whole seconds, rounded up, as the service takes them.
fn seconds(wait: Duration) -> i32 {
    let whole = wait.as_secs().saturating_add(u64::from(wait.subsec_nanos() > 0));
    i32::try_from(whole.min(INVISIBLE_MOST.as_secs())).unwrap_or(i32::MAX)
}

fn text(value: &str) -> Option<MessageAttributeValue> {
    MessageAttributeValue::builder().data_type("String").string_value(value).build().ok()
}

/// What the service takes in a text.
fn printable(c: char) -> char {
    if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') { ' ' } else { c }
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
    }
}
