//! Deliveries of a Kafka consumer group. Behind the feature `kafka`.
//!
//! `docs/brokers/kafka.md` says which duplicates a topic makes, which key to choose, and what is not done here.

use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerContext, RebalanceProtocol, StreamConsumer};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::message::{Header, Message as _, OwnedHeaders, OwnedMessage};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::types::{RDKafkaErrorCode, RDKafkaRespErr};
use rdkafka::{ClientConfig, ClientContext, Offset, TopicPartitionList};
use tokio::sync::Notify;

use super::kafka_record::{Facts, Head, SHORT, With, identified, letter, readable};
use super::message::{Delivery, KeyOrigin, key_of, reason_line};
use super::partitions::{Given, Partitions, Revoked, Ticket};
use super::setting::SettingError;
use crate::key::Key;

pub use super::kafka_record::{DEAD_FROM, DEAD_ID, DEAD_OMITTED, DEAD_TIMESTAMP, DEAD_WHY, Id};

const AHEAD: usize = 1_000;
/// How long a dead letter waits for room in the producer's queue.
const ROOM: Duration = Duration::from_secs(5);
/// After what time a record comes back that was dropped without an answer.
const UNANSWERED: Duration = Duration::from_secs(1);
/// What a wait beyond it counts as.
const AWAY_MOST: Duration = Duration::from_secs(86_400);

/// Why an answer, or the next record, was not to be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// What the client or the broker says.
    #[error(transparent)]
    Kafka(#[from] KafkaError),
    /// A setting that does not fit.
    #[error(transparent)]
    Setting(#[from] SettingError),
    /// The partition was taken away while its record was worked on. Whoever has it now gets the record again.
    #[error("the partition is another consumer's by now, which gets the record again")]
    Revoked,
}

impl From<Revoked> for Error {
    fn from(Revoked: Revoked) -> Self {
        Self::Revoked
    }
}

/// Reads topics as a member of a group, or partitions of one's own choice. Made by a [`Builder`].
pub struct Consumer {
    shared: Arc<Shared>,
}

struct Shared {
    consumer: StreamConsumer<Context>,
    id: Id,
    dead: Option<(FutureProducer, String)>,
    /// A record came back, or made room for the next.
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
            self.partitions.lock().forget(&topic, partition);
        }
        let cooperative = matches!(consumer.rebalance_protocol(), RebalanceProtocol::Cooperative);
        let done = match (error, cooperative) {
            (RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS, _) => {
                let begun = self.set_start(changed);
                let assigned =
                    if cooperative { consumer.incremental_assign(changed) } else { consumer.assign(changed) };
                // An earlier assignment may have left them paused.
                begun.and(assigned).and_then(|()| consumer.resume(changed))
            }
            (_, true) => consumer.incremental_unassign(changed),
            (_, false) => consumer.unassign(),
        };
        if let Err(error) = done {
            tracing::error!(%error, "a rebalance failed");
        }
    }

    fn commit_callback(&self, committed: KafkaResult<()>, _: &TopicPartitionList) {
        if let Err(error) = committed {
            tracing::warn!(%error, "offsets were not committed: what they stand for may be delivered again");
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

/// The settings of a [`Consumer`], all of which have a default. Made by [`Consumer::subscribe`] or [`Consumer::assign`].
#[must_use = "call `build` to get the consumer"]
pub struct Builder {
    config: ClientConfig,
    source: Source,
    id: Id,
    dead: Option<(FutureProducer, String)>,
    ahead: usize,
    start_from: Option<Box<StartFrom>>,
}

impl Builder {
    fn new(config: &ClientConfig, source: Source) -> Self {
        let id = Id::Header("id".to_owned());
        Self { config: config.clone(), source, id, dead: None, ahead: AHEAD, start_from: None }
    }

    /// Where the idempotency key is: in the header `id` by default.
    pub fn id(mut self, id: Id) -> Self {
        self.id = id;
        self
    }

    /// The topic for dead letters, and who sends them: a producer with `acks` of `all`, which is its default. Without
    /// one, what is rejected is only left behind in its topic. The topic must not be compacted: letters with one key would
    /// replace each other, and one without a key would be refused.
    pub fn dead_letters(mut self, producer: FutureProducer, topic: &str) -> Self {
        self.dead = Some((producer, topic.to_owned()));
        self
    }

    /// How many records of a partition are given out at most, counted from the first that is not settled: 1,000 by
    /// default. So many are delivered again after a crash, and lie in memory while one of them waits to come back.
    /// With 1 the records of a partition come one after the other: one that is to come back holds up those behind it.
    pub fn ahead(mut self, records: usize) -> Self {
        self.ahead = records;
        self
    }

    /// Where a partition begins that the group assigns to this consumer, by its topic and number: at this offset,
    /// such as one that a [`Job::tx`](super::Job::tx) has stored; at what the group has committed, where it is `None`.
    /// Called while the group waits.
    ///
    /// Offsets that the work stores are right with [`ahead(1)`](Self::ahead) alone: with more records out, one that is done
    /// says with its offset that those before it are, too, and a restart would leave them out. One that is rejected stores
    /// none, so that a restart may read it again.
    pub fn start_from(mut self, offset: impl Fn(&str, i32) -> Option<u64> + Send + Sync + 'static) -> Self {
        self.start_from = Some(Box::new(offset));
        self
    }

    /// The consumer. Begins to connect, and to join the group.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] for a configuration that turns `enable.auto.commit` off or `enable.auto.offset.store` on, for no
    /// topic or partition, for `ahead(0)`, and for dead letters that go to a topic that is read. Otherwise what the client
    /// says of the configuration or the list.
    ///
    /// # Panics
    ///
    /// Outside of a Tokio runtime.
    pub fn build(self) -> Result<Consumer, Error> {
        self.check()?;
        let Self { mut config, source, id, dead, ahead, start_from } = self;
        config.set("enable.auto.commit", "true").set("enable.auto.offset.store", "false");
        let context = Context { partitions: Mutex::new(Partitions::new(ahead)), start_from };
        let consumer: StreamConsumer<Context> = config.create_with_context(context)?;
        match &source {
            Source::Topics(topics) => consumer.subscribe(&topics.iter().map(String::as_str).collect::<Vec<_>>())?,
            Source::Partitions(partitions) => consumer.assign(partitions)?,
        }
        Ok(Consumer { shared: Arc::new(Shared { consumer, id, dead, changed: Notify::new() }) })
    }

    fn check(&self) -> Result<(), SettingError> {
        // As the client reads them.
        let is = |key, values: [&str; 3]| {
            self.config.get(key).is_some_and(|set| values.iter().any(|value| set.eq_ignore_ascii_case(value)))
        };
        let (commit, store) = ("enable.auto.commit", "enable.auto.offset.store");
        let (is_off, is_on) = (is(commit, ["false", "f", "0"]), is(store, ["true", "t", "1"]));
        SettingError::unless(!is_off, commit, "false", "true: settled offsets are committed in the background")?;
        SettingError::unless(!is_on, store, "true", "false: offsets are stored when all before are settled")?;
        SettingError::unless(self.ahead > 0, "ahead", self.ahead, "at least 1")?;
        let topics: Vec<String> = match &self.source {
            Source::Topics(topics) => topics.clone(),
            Source::Partitions(list) => list.elements().iter().map(|place| place.topic().to_owned()).collect(),
        };
        SettingError::unless(!topics.is_empty(), "topics", "empty", "at least one topic or partition")?;
        let Some((_, dead)) = &self.dead else { return Ok(()) };
        let is_other = !dead.is_empty() && !topics.contains(dead);
        SettingError::unless(is_other, "dead_letters", format!("{dead:?}"), "another topic than those of the consumer")
    }
}

impl Consumer {
    /// Joins the group that the configuration names and reads these topics. Records go by the header `id`, or their
    /// digest.
    ///
    /// The configuration is yours, but for `enable.auto.offset.store`, which is off here, and `enable.auto.commit`,
    /// which is on: offsets are stored for the next commit when all before them is settled.
    pub fn subscribe(config: &ClientConfig, topics: &[&str]) -> Builder {
        Builder::new(config, Source::Topics(topics.iter().map(|topic| (*topic).to_owned()).collect()))
    }

    /// Reads these partitions, whoever else does, from the offsets in the list; those of [`Offset::Stored`] from what
    /// the group in the configuration has committed. Otherwise as [`subscribe`](Self::subscribe).
    pub fn assign(config: &ClientConfig, partitions: &TopicPartitionList) -> Builder {
        Builder::new(config, Source::Partitions(partitions.clone()))
    }

    /// The next record: one that comes back, or a new one. Waits for it.
    ///
    /// A record whose headers cannot be read does not come: it is rejected, and the next one is given.
    ///
    /// To be called at least every `max.poll.interval.ms`, five minutes by default, or the group takes the partitions
    /// away. May be dropped: nothing is lost by it.
    ///
    /// # Errors
    ///
    /// What the client says, such as that no broker is to be reached. It tries on by itself, and so may the caller.
    pub async fn next(&mut self) -> Result<Message, Error> {
        let Context { partitions, .. } = &**self.shared.consumer.context();
        loop {
            // The look at the broker comes first, for it serves the group as well.
            let due = partitions.lock().due();
            if let Some(read) = self.shared.read(Duration::ZERO, due).await {
                self.take(read?)?;
            }
            let given = partitions.lock().next(Instant::now());
            if let Some(given) = given {
                let message = self.give(given)?;
                if message.unreadable == 0 {
                    return Ok(message);
                }
                let headers = message.unreadable;
                let why = format!("{headers} of its headers have a name that is not UTF-8, and are left out here");
                tracing::error!(place = message.place(), why, "a record cannot be read and is rejected");
                match message.reject(&why).await {
                    Ok(()) | Err(Error::Revoked) => continue,
                    Err(error) => return Err(error),
                }
            }
            if let Some(read) = self.shared.read(AWAY_MOST, due).await {
                self.take(read?)?;
            }
        }
    }

    fn take(&self, record: OwnedMessage) -> KafkaResult<()> {
        let consumer = &self.shared.consumer;
        let (topic, partition, offset) = (record.topic().to_owned(), record.partition(), record.offset());
        let full = consumer.context().partitions.lock().read(&topic, partition, offset, Arc::new(record));
        if full { consumer.pause(&only(&topic, partition)) } else { Ok(()) }
    }

    fn give(&self, given: Given<Arc<OwnedMessage>>) -> Result<Message, Error> {
        let Given { ticket, record, resume } = given;
        let message = Message::new(&self.shared, ticket, record);
        if resume {
            self.shared.consumer.resume(&only(message.ticket.topic(), message.ticket.partition()))?;
        }
        Ok(message)
    }
}

impl Shared {
    /// A new record, unless something else comes first: the time is over, one comes back, or there is room again.
    async fn read(&self, most: Duration, due: Option<Instant>) -> Option<KafkaResult<OwnedMessage>> {
        let until = Instant::now() + most;
        let until = due.map_or(until, |due| due.min(until));
        let mut record = pin!(self.consumer.recv());
        let mut changed = pin!(self.changed.notified());
        let mut over = pin!(tokio::time::sleep_until(until.into()));
        poll_fn(|context| {
            if let Poll::Ready(record) = record.as_mut().poll(context) {
                return Poll::Ready(Some(record.map(|record| record.detach())));
            }
            if most.is_zero() || changed.as_mut().poll(context).is_ready() || over.as_mut().poll(context).is_ready() {
                return Poll::Ready(None);
            }
            Poll::Pending
        })
        .await
    }

    fn partitions(&self) -> parking_lot::MutexGuard<'_, Partitions<Arc<OwnedMessage>>> {
        self.consumer.context().partitions.lock()
    }

    fn send_away(&self, ticket: Ticket, record: Arc<OwnedMessage>, wait: Duration) {
        self.partitions().send_away(ticket, record, Instant::now() + wait.min(AWAY_MOST));
        self.changed.notify_one();
    }
}

/// A record of a topic. One that is dropped without an answer comes back after a second. As long as one is there, so is
/// the consumer's connection.
pub struct Message {
    shared: Arc<Shared>,
    ticket: Ticket,
    record: Arc<OwnedMessage>,
    id: Option<Vec<u8>>,
    origin: KeyOrigin,
    /// How many of its headers cannot be read.
    unreadable: usize,
    answered: bool,
}

impl Message {
    fn new(shared: &Arc<Shared>, ticket: Ticket, record: Arc<OwnedMessage>) -> Self {
        let (headers, unreadable) = record.headers().map(readable).unwrap_or_default();
        let (id, origin) = identified(&shared.id, &record, &headers);
        Self { shared: Arc::clone(shared), ticket, record, id, origin, unreadable, answered: false }
    }

    fn place(&self) -> String {
        format!("{}/{}/{}", self.record.topic(), self.record.partition(), self.record.offset())
    }

    /// The record itself: its topic, partition and offset, its key and its headers.
    #[must_use]
    pub fn record(&self) -> &OwnedMessage {
        &self.record
    }

    /// Moves the offset, if this was the first record that was not settled.
    fn settle(&mut self) -> Result<(), Error> {
        self.answered = true;
        // Held until the client has it: of two that move it, the later one must not be the one with the lower offset.
        let mut partitions = self.shared.partitions();
        if let Some(last) = partitions.settle(&self.ticket)? {
            self.shared.consumer.store_offset(self.ticket.topic(), self.ticket.partition(), last)?;
        }
        drop(partitions);
        self.shared.changed.notify_one();
        Ok(())
    }

    /// Sends its copy: with our headers, with fewer of them where that is too large, and in the end without its value.
    async fn bury(&self, why: &str) -> Result<(), Error> {
        let Some((producer, topic)) = &self.shared.dead else { return Ok(()) };
        let own = self.record.headers().map(readable).unwrap_or_default().0;
        let (place, timestamp_ms) = (self.place(), self.record.timestamp().to_millis());
        let facts = Facts { id: self.id.as_deref(), place: &place, timestamp_ms, why: &reason_line(why) };
        for with in [With::All, With::Least] {
            let headers = letter(&own, &facts, with);
            match send(producer, topic, self.record.key(), self.record.payload(), &headers).await {
                Err(error) if is_too_large(&error) => {}
                sent => return Ok(sent?),
            }
        }
        tracing::error!(place, "a dead letter is too large and goes without its value, which stays in its topic");
        let headers = letter(&[], &facts, With::Omitted(self.payload().len()));
        let key = self.record.key().filter(|key| key.len() <= SHORT);
        // An empty value and none are different things: this is no tombstone.
        Ok(send(producer, topic, key, Some(&[]), &headers).await?)
    }
}

async fn send(
    producer: &FutureProducer,
    topic: &str,
    key: Option<&[u8]>,
    payload: Option<&[u8]>,
    headers: &[Head],
) -> KafkaResult<()> {
    let add = |headers: OwnedHeaders, (key, value): &Head| headers.insert(Header { key, value: value.as_ref() });
    let headers = headers.iter().fold(OwnedHeaders::new_with_capacity(headers.len()), add);
    let mut letter = FutureRecord::<[u8], [u8]>::to(topic).headers(headers);
    (letter.key, letter.payload) = (key, payload);
    producer.send(letter, ROOM).await.map(drop).map_err(|(error, _)| error)
}

/// By the client, which knows its own limit, or by the broker or the topic.
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

    fn id_place(&self) -> String {
        let topic = self.record.topic();
        match &self.shared.id {
            Id::Header(name) => format!("header `{name}` of topic `{topic}`"),
            Id::Key => format!("the key of records of topic `{topic}`"),
            Id::Position => format!("the position in topic `{topic}`"),
        }
    }

    /// When it was made, or, if the topic says so, when the broker stored it.
    fn timestamp_ms(&self) -> Option<u64> {
        self.record.timestamp().to_millis().and_then(|ms| u64::try_from(ms).ok())
    }

    fn payload(&self) -> &[u8] {
        self.record.payload().unwrap_or_default()
    }

    /// Its offset is committed with the next commit of the client after all records before it are settled.
    async fn ack(mut self) -> Result<(), Error> {
        self.settle()
    }

    /// It waits in this process. Until it is settled, no offset behind it is committed.
    async fn retry_after(mut self, wait: Duration) -> Result<(), Error> {
        self.answered = true;
        self.shared.send_away(self.ticket.clone(), Arc::clone(&self.record), wait);
        Ok(())
    }

    async fn reject(mut self, why: &str) -> Result<(), Error> {
        // Whoever has the partition now has it to reject.
        if !self.shared.partitions().holds(&self.ticket) {
            return Err(Error::Revoked);
        }
        self.bury(why).await?;
        self.settle()
    }
}

impl Drop for Message {
    fn drop(&mut self) {
        if !self.answered {
            self.shared.send_away(self.ticket.clone(), Arc::clone(&self.record), UNANSWERED);
        }
    }
}

fn only(topic: &str, partition: i32) -> TopicPartitionList {
    let mut list = TopicPartitionList::with_capacity(1);
    list.add_partition(topic, partition);
    list
}

impl fmt::Debug for Consumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consumer").field("id", &self.shared.id).finish_non_exhaustive()
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
    fn a_setting_that_cannot_be_is_an_error_that_names_it() {
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
        assert_eq!(named(of(&none).ahead(0)), "ahead");
        assert_eq!(named(Consumer::subscribe(&none, &[])), "topics");
        assert_eq!(named(Consumer::assign(&none, &TopicPartitionList::new())), "topics");
        let producer: FutureProducer = none.create().unwrap();
        assert_eq!(named(of(&none).dead_letters(producer.clone(), "orders")), "dead_letters");
        assert_eq!(named(of(&none).dead_letters(producer, "")), "dead_letters");
    }
}
