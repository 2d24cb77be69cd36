//! Deliveries of a Kafka consumer group, for [`onlyonce_delivery`].
//!
//! Part of [onlyonce](https://docs.rs/onlyonce), which re-exports it as `onlyonce::delivery::kafka` behind the feature
//! `kafka`. `docs/brokers/kafka.md` in its repository describes the duplicates, the choice of the key, and the limits of
//! the adapter.
#![cfg_attr(not(test), warn(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use onlyonce_core::{Key, Timestamp};
use onlyonce_delivery::{Delivery, KeyOrigin, SettingError, key_of, reason_line};
use parking_lot::Mutex;
use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerContext, RebalanceProtocol, StreamConsumer};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::message::{Header, Message as _, OwnedHeaders, OwnedMessage};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::types::{RDKafkaErrorCode, RDKafkaRespErr};
use rdkafka::{ClientConfig, ClientContext, Offset, TopicPartitionList};
use tokio::sync::Notify;

use crate::partitions::{Next, Partitions, Revoked, Ticket};
use crate::record::{Detail, HeaderPair, MAX_SHORT, Rejection, dead_letter_headers, readable_headers, record_id};

mod partitions;
mod record;

pub use rdkafka;
pub use record::{ID_HEADER, IdSource, OMITTED_HEADER, REASON_HEADER, SOURCE_HEADER, TIMESTAMP_HEADER};

const MAX_UNCOMMITTED: usize = 1_000;
/// How long a dead letter waits for space in the producer's queue.
const QUEUE_TIMEOUT: Duration = Duration::from_secs(5);
/// Delay of a record that was dropped without an answer.
const UNANSWERED_DELAY: Duration = Duration::from_secs(1);
/// Longer delays are shortened to this one.
const MAX_DELAY: Duration = Duration::from_secs(86_400);

/// Errors of the consumer and of answers.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An error of the client or the broker.
    #[error(transparent)]
    Kafka(#[from] KafkaError),
    /// An invalid setting.
    #[error(transparent)]
    Setting(#[from] SettingError),
    /// The partition was revoked while its record was in progress. Its new owner gets the record again.
    #[error("partition was revoked while its record was in progress; its new owner gets the record again")]
    Revoked,
}

impl From<Revoked> for Error {
    fn from(Revoked: Revoked) -> Self {
        Self::Revoked
    }
}

/// Reads topics as a member of a group, or explicitly assigned partitions. Made by a [`Builder`].
pub struct Consumer {
    shared: Arc<Shared>,
}

struct Shared {
    consumer: StreamConsumer<Context>,
    id_source: IdSource,
    dead_letters: Option<(FutureProducer, String)>,
    /// A record was delayed or answered, so that another one may be due.
    changed: Notify,
}

type StartFrom = dyn Fn(&str, i32) -> Option<u64> + Send + Sync;

struct Context {
    partitions: Mutex<Partitions<Arc<OwnedMessage>>>,
    start_from: Option<Box<StartFrom>>,
}

impl ClientContext for Context {}

impl ConsumerContext for Context {
    fn rebalance(&self, consumer: &BaseConsumer<Self>, error: RDKafkaRespErr, changed: &mut TopicPartitionList) {
        for (topic, partition) in changed.to_topic_map().into_keys() {
            self.partitions.lock().remove(&topic, partition);
        }
        let cooperative = matches!(consumer.rebalance_protocol(), RebalanceProtocol::Cooperative);
        let rebalanced = match (error, cooperative) {
            (RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS, _) => {
                let positioned = self.set_start(changed);
                let assigned =
                    if cooperative { consumer.incremental_assign(changed) } else { consumer.assign(changed) };
                // An earlier assignment may have left the partitions paused.
                positioned.and(assigned).and_then(|()| consumer.resume(changed))
            }
            (_, true) => consumer.incremental_unassign(changed),
            (_, false) => consumer.unassign(),
        };
        if let Err(error) = rebalanced {
            tracing::error!(%error, "rebalance failed");
        }
    }

    fn commit_callback(&self, committed: KafkaResult<()>, _: &TopicPartitionList) {
        if let Err(error) = committed {
            tracing::warn!(%error, "offset commit failed; records after the last committed offset may be delivered again");
        }
    }
}

impl Context {
    fn set_start(&self, assigned: &mut TopicPartitionList) -> KafkaResult<()> {
        let Some(start_from) = &self.start_from else { return Ok(()) };
        for (topic, partition) in assigned.to_topic_map().into_keys() {
            if let Some(offset) = start_from(&topic, partition).and_then(|offset| i64::try_from(offset).ok()) {
                assigned.set_partition_offset(&topic, partition, Offset::Offset(offset))?;
            }
        }
        Ok(())
    }
}

enum Source {
    Topics(Vec<String>),
    Partitions(TopicPartitionList),
}

/// Settings of a [`Consumer`], each with a default. Made by [`Consumer::subscribe`] or [`Consumer::assign`].
#[must_use = "call `build` to get the consumer"]
pub struct Builder {
    config: ClientConfig,
    source: Source,
    id_source: IdSource,
    dead_letters: Option<(FutureProducer, String)>,
    max_uncommitted: usize,
    start_from: Option<Box<StartFrom>>,
}

impl Builder {
    fn new(config: &ClientConfig, source: Source) -> Self {
        Self {
            config: config.clone(),
            source,
            id_source: IdSource::Header("id".to_owned()),
            dead_letters: None,
            max_uncommitted: MAX_UNCOMMITTED,
            start_from: None,
        }
    }

    /// Where the idempotency key of a record comes from: the header `id` by default.
    pub fn id_source(mut self, source: IdSource) -> Self {
        self.id_source = source;
        self
    }

    /// The topic for dead letters and its producer, which needs `acks=all` (the default). Without a topic, a rejected
    /// record is only skipped. The topic must not be compacted: letters with equal keys would replace each other, and the
    /// broker would refuse a letter without a key.
    pub fn dead_letters(mut self, producer: FutureProducer, topic: &str) -> Self {
        self.dead_letters = Some((producer, topic.to_owned()));
        self
    }

    /// The maximum number of delivered records of a partition, counted from the first unanswered one: 1,000 by default.
    /// This many are delivered again after a crash, and are kept in memory while one of them is delayed. With 1, the
    /// records of a partition are delivered in order: a delayed record delays those after it.
    pub fn max_uncommitted(mut self, records: usize) -> Self {
        self.max_uncommitted = records;
        self
    }

    /// The start offset of a newly assigned partition, by topic and partition number, such as an offset stored by
    /// [`Attempt::side_writes`](onlyonce_delivery::Attempt::side_writes). `None` starts at the group's committed offset.
    /// Called during the rebalance, which waits for it.
    ///
    /// Offsets that the work stores are correct only with [`max_uncommitted(1)`](Self::max_uncommitted): otherwise the
    /// offset of one record also marks unfinished records before it as done, and a restart skips them. A rejected record
    /// stores no offset, so that a restart may read it again.
    pub fn start_from(mut self, offset: impl Fn(&str, i32) -> Option<u64> + Send + Sync + 'static) -> Self {
        self.start_from = Some(Box::new(offset));
        self
    }

    /// Builds the consumer, which starts to connect and to join the group.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] for a configuration that turns `enable.auto.commit` off or `enable.auto.offset.store` on, for an
    /// empty list of topics or partitions, for `max_uncommitted(0)`, and for a dead letter topic that the consumer reads.
    /// Otherwise the client's error.
    ///
    /// # Panics
    ///
    /// Outside of a Tokio runtime.
    pub fn build(self) -> Result<Consumer, Error> {
        self.check()?;
        let Self { mut config, source, id_source, dead_letters, max_uncommitted, start_from } = self;
        config.set("enable.auto.commit", "true").set("enable.auto.offset.store", "false");
        let context = Context { partitions: Mutex::new(Partitions::new(max_uncommitted)), start_from };
        let consumer: StreamConsumer<Context> = config.create_with_context(context)?;
        match &source {
            Source::Topics(topics) => consumer.subscribe(&topics.iter().map(String::as_str).collect::<Vec<_>>())?,
            Source::Partitions(partitions) => consumer.assign(partitions)?,
        }
        Ok(Consumer { shared: Arc::new(Shared { consumer, id_source, dead_letters, changed: Notify::new() }) })
    }

    fn check(&self) -> Result<(), SettingError> {
        // The spellings that the client accepts.
        let is = |key, values: [&str; 3]| {
            self.config.get(key).is_some_and(|set| values.iter().any(|value| set.eq_ignore_ascii_case(value)))
        };
        let (commit, store) = ("enable.auto.commit", "enable.auto.offset.store");
        let (is_off, is_on) = (is(commit, ["false", "f", "0"]), is(store, ["true", "t", "1"]));
        SettingError::check(!is_off, commit, "false", "true: answered offsets are committed in the background")?;
        SettingError::check(
            !is_on,
            store,
            "true",
            "false: an offset is stored after all records up to it are answered",
        )?;
        SettingError::check(self.max_uncommitted > 0, "max_uncommitted", self.max_uncommitted, "at least 1")?;
        let topics: Vec<String> = match &self.source {
            Source::Topics(topics) => topics.clone(),
            Source::Partitions(list) => list.elements().iter().map(|element| element.topic().to_owned()).collect(),
        };
        SettingError::check(!topics.is_empty(), "topics", "empty", "at least one topic or partition")?;
        let Some((_, dead)) = &self.dead_letters else { return Ok(()) };
        let is_other = !dead.is_empty() && !topics.contains(dead);
        SettingError::check(is_other, "dead_letters", format!("{dead:?}"), "a topic that the consumer does not read")
    }
}

impl Consumer {
    /// Joins the group of the configuration and reads these topics. The default key is the header `id`, or a digest of the
    /// record.
    ///
    /// The configuration is used as given, except for `enable.auto.offset.store`, which is turned off, and
    /// `enable.auto.commit`, which is turned on: an offset is stored for the next commit after all records up to it are
    /// answered.
    pub fn subscribe(config: &ClientConfig, topics: &[&str]) -> Builder {
        Builder::new(config, Source::Topics(topics.iter().map(|topic| (*topic).to_owned()).collect()))
    }

    /// Reads these partitions, without group membership, from the offsets in the list; [`Offset::Stored`] stands for the
    /// offset that the group of the configuration has committed. Otherwise as [`subscribe`](Self::subscribe).
    pub fn assign(config: &ClientConfig, partitions: &TopicPartitionList) -> Builder {
        Builder::new(config, Source::Partitions(partitions.clone()))
    }

    /// Waits for the next record: a delayed one that is due, or a new one.
    ///
    /// A record with unreadable headers is not returned: it is rejected, and the next one follows.
    ///
    /// Call it at least every `max.poll.interval.ms`, 5 minutes by default; otherwise the group revokes the partitions.
    /// Cancel-safe: dropping the future loses nothing.
    ///
    /// # Errors
    ///
    /// Errors of the client, such as an unreachable broker. The client keeps retrying; call `next` again.
    pub async fn next(&mut self) -> Result<Message, Error> {
        let Context { partitions, .. } = &**self.shared.consumer.context();
        loop {
            // Poll the broker first: a poll also serves the group.
            let due = partitions.lock().next_due();
            if let Some(record) = self.shared.poll(Duration::ZERO, due).await {
                self.buffer(record?)?;
            }
            let next = partitions.lock().next(Instant::now());
            if let Some(next) = next {
                let message = self.deliver(next)?;
                if message.unreadable_headers == 0 {
                    return Ok(message);
                }
                let reason =
                    format!("{} header names are not UTF-8; these headers are omitted", message.unreadable_headers);
                tracing::error!(position = message.position(), reason, "record with unreadable headers rejected");
                match message.reject(&reason).await {
                    Ok(()) | Err(Error::Revoked) => continue,
                    Err(error) => return Err(error),
                }
            }
            if let Some(record) = self.shared.poll(MAX_DELAY, due).await {
                self.buffer(record?)?;
            }
        }
    }

    fn buffer(&self, record: OwnedMessage) -> KafkaResult<()> {
        let consumer = &self.shared.consumer;
        let (topic, partition, offset) = (record.topic().to_owned(), record.partition(), record.offset());
        let pause = consumer.context().partitions.lock().buffer(&topic, partition, offset, Arc::new(record));
        if pause { consumer.pause(&single(&topic, partition)) } else { Ok(()) }
    }

    fn deliver(&self, next: Next<Arc<OwnedMessage>>) -> Result<Message, Error> {
        let Next { ticket, record, resume } = next;
        let message = Message::new(&self.shared, ticket, record);
        if resume {
            self.shared.consumer.resume(&single(message.ticket.topic(), message.ticket.partition()))?;
        }
        Ok(message)
    }
}

impl Shared {
    /// Waits for a new record. `None` if before that the timeout passes, a delayed record is due, or an answer arrives.
    async fn poll(&self, timeout: Duration, due: Option<Instant>) -> Option<KafkaResult<OwnedMessage>> {
        let end = Instant::now() + timeout;
        let end = due.map_or(end, |due| due.min(end));
        let mut record = pin!(self.consumer.recv());
        let mut changed = pin!(self.changed.notified());
        let mut elapsed = pin!(tokio::time::sleep_until(end.into()));
        poll_fn(|context| {
            if let Poll::Ready(record) = record.as_mut().poll(context) {
                return Poll::Ready(Some(record.map(|record| record.detach())));
            }
            if timeout.is_zero()
                || changed.as_mut().poll(context).is_ready()
                || elapsed.as_mut().poll(context).is_ready()
            {
                return Poll::Ready(None);
            }
            Poll::Pending
        })
        .await
    }

    fn partitions(&self) -> parking_lot::MutexGuard<'_, Partitions<Arc<OwnedMessage>>> {
        self.consumer.context().partitions.lock()
    }

    fn delay(&self, ticket: Ticket, record: Arc<OwnedMessage>, delay: Duration) {
        self.partitions().delay(ticket, record, Instant::now() + delay.min(MAX_DELAY));
        self.changed.notify_one();
    }
}

/// A record of a topic. A record that is dropped without an answer is delivered again after a second. It keeps the
/// consumer's connection open.
pub struct Message {
    shared: Arc<Shared>,
    ticket: Ticket,
    record: Arc<OwnedMessage>,
    id: Option<Vec<u8>>,
    origin: KeyOrigin,
    unreadable_headers: usize,
    answered: bool,
}

impl Message {
    fn new(shared: &Arc<Shared>, ticket: Ticket, record: Arc<OwnedMessage>) -> Self {
        let (headers, unreadable_headers) = record.headers().map(readable_headers).unwrap_or_default();
        let (id, origin) = record_id(&shared.id_source, &record, &headers);
        Self { shared: Arc::clone(shared), ticket, record, id, origin, unreadable_headers, answered: false }
    }

    fn position(&self) -> String {
        format!("{}/{}/{}", self.record.topic(), self.record.partition(), self.record.offset())
    }

    /// The client's record: topic, partition, offset, key and headers.
    #[must_use]
    pub fn record(&self) -> &OwnedMessage {
        &self.record
    }

    /// Marks the record as answered, and stores the offset if it has advanced.
    fn mark_answered(&mut self) -> Result<(), Error> {
        self.answered = true;
        // Held until the client has the offset: otherwise a lower offset could overwrite a higher one.
        let mut partitions = self.shared.partitions();
        if let Some(last) = partitions.answer(&self.ticket)? {
            self.shared.consumer.store_offset(self.ticket.topic(), self.ticket.partition(), last)?;
        }
        drop(partitions);
        self.shared.changed.notify_one();
        Ok(())
    }

    /// Sends a copy with all our headers, if that is too large with the id alone, and at last without the value.
    async fn send_dead_letter(&self, reason: &str) -> Result<(), Error> {
        let Some((producer, topic)) = &self.shared.dead_letters else { return Ok(()) };
        let own = self.record.headers().map(readable_headers).unwrap_or_default().0;
        let (source, timestamp_ms) = (self.position(), self.record.timestamp().to_millis());
        let reason = reason_line(reason);
        let rejection = Rejection { id: self.id.as_deref(), source: &source, timestamp_ms, reason: &reason };
        for detail in [Detail::Full, Detail::IdOnly] {
            let headers = dead_letter_headers(&own, &rejection, detail);
            match send(producer, topic, self.record.key(), self.record.payload(), &headers).await {
                Err(error) if is_too_large(&error) => {}
                sent => return Ok(sent?),
            }
        }
        tracing::error!(source, "dead letter too large: sent without its value, which remains in the source topic");
        let headers = dead_letter_headers(&[], &rejection, Detail::ValueOmitted(self.payload().len()));
        let key = self.record.key().filter(|key| key.len() <= MAX_SHORT);
        // An empty value, not a missing one: that would be a tombstone.
        Ok(send(producer, topic, key, Some(&[]), &headers).await?)
    }
}

async fn send(
    producer: &FutureProducer,
    topic: &str,
    key: Option<&[u8]>,
    payload: Option<&[u8]>,
    headers: &[HeaderPair],
) -> KafkaResult<()> {
    let add = |headers: OwnedHeaders, (key, value): &HeaderPair| headers.insert(Header { key, value: value.as_ref() });
    let headers = headers.iter().fold(OwnedHeaders::new_with_capacity(headers.len()), add);
    let mut record = FutureRecord::<[u8], [u8]>::to(topic).headers(headers);
    (record.key, record.payload) = (key, payload);
    producer.send(record, QUEUE_TIMEOUT).await.map(drop).map_err(|(error, _)| error)
}

/// Reported by the client for its own limit, or by the broker for its own or the topic's.
fn is_too_large(error: &KafkaError) -> bool {
    use RDKafkaErrorCode::{MessageBatchTooLarge, MessageSizeTooLarge};
    matches!(error, KafkaError::MessageProduction(MessageSizeTooLarge | MessageBatchTooLarge))
}

impl Delivery for Message {
    type Error = Error;

    fn key(&self) -> Key<'_> {
        let all = Key::composite([self.record.key().unwrap_or_default(), self.payload()]);
        key_of(self.id.as_deref(), all.as_bytes(), self.record.topic())
    }

    fn key_origin(&self) -> KeyOrigin {
        self.origin
    }

    fn id_location(&self) -> String {
        let topic = self.record.topic();
        match &self.shared.id_source {
            IdSource::Header(name) => format!("header `{name}` of topic `{topic}`"),
            IdSource::Key => format!("the key of records of topic `{topic}`"),
            IdSource::Position => format!("the position in topic `{topic}`"),
        }
    }

    /// The creation time, or the time of the append if the topic is configured so.
    fn timestamp(&self) -> Option<Timestamp> {
        let ms = self.record.timestamp().to_millis()?;
        Some(Timestamp::from_unix_ms(u64::try_from(ms).ok()?))
    }

    fn payload(&self) -> &[u8] {
        self.record.payload().unwrap_or_default()
    }

    /// The client commits the offset in the background after all records up to it are answered.
    async fn ack(mut self) -> Result<(), Error> {
        self.mark_answered()
    }

    /// The record waits in this process. No later offset is committed until it is acknowledged or rejected.
    async fn retry_after(mut self, delay: Duration) -> Result<(), Error> {
        self.answered = true;
        self.shared.delay(self.ticket.clone(), Arc::clone(&self.record), delay);
        Ok(())
    }

    async fn reject(mut self, reason: &str) -> Result<(), Error> {
        // After a revocation, only the new owner of the partition may reject the record.
        if !self.shared.partitions().is_assigned(&self.ticket) {
            return Err(Error::Revoked);
        }
        self.send_dead_letter(reason).await?;
        self.mark_answered()
    }
}

impl Drop for Message {
    fn drop(&mut self) {
        if !self.answered {
            self.shared.delay(self.ticket.clone(), Arc::clone(&self.record), UNANSWERED_DELAY);
        }
    }
}

fn single(topic: &str, partition: i32) -> TopicPartitionList {
    let mut list = TopicPartitionList::with_capacity(1);
    list.add_partition(topic, partition);
    list
}

impl fmt::Debug for Consumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consumer").field("id_source", &self.shared.id_source).finish_non_exhaustive()
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (partition, offset) = (self.record.partition(), self.record.offset());
        let topic = self.record.topic();
        f.debug_struct("Message")
            .field("topic", &topic)
            .field("partition", &partition)
            .field("offset", &offset)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_invalid_setting_is_an_error_that_names_it() {
        let config = |key: &str, value: &str| {
            let mut config = ClientConfig::new();
            config.set("group.id", "g").set(key, value).clone()
        };
        let none = config("client.id", "test");
        let named = |builder: Builder| match builder.build() {
            Err(Error::Setting(error)) => error.setting,
            other => panic!("{:?}", other.map(drop)),
        };
        let of = |config: &ClientConfig| Consumer::subscribe(config, &["orders"]);
        assert_eq!(named(of(&config("enable.auto.commit", "false"))), "enable.auto.commit");
        assert_eq!(named(of(&config("enable.auto.offset.store", "true"))), "enable.auto.offset.store");
        assert_eq!(named(of(&none).max_uncommitted(0)), "max_uncommitted");
        assert_eq!(named(Consumer::subscribe(&none, &[])), "topics");
        assert_eq!(named(Consumer::assign(&none, &TopicPartitionList::new())), "topics");
        let producer: FutureProducer = none.create().unwrap();
        assert_eq!(named(of(&none).dead_letters(producer.clone(), "orders")), "dead_letters");
        assert_eq!(named(of(&none).dead_letters(producer, "")), "dead_letters");
    }
}
