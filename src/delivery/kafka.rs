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
use rdkafka::message::{Header, Headers, Message as _, OwnedHeaders, OwnedMessage};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::types::RDKafkaRespErr;
use rdkafka::{ClientConfig, ClientContext, Offset, TopicPartitionList};
use tokio::sync::Notify;

use super::message::{Delivery, key_of};
use super::partitions::{Given, Partitions, Revoked, Ticket};
use crate::key::Key;

/// The headers that a dead letter has beside its own: its key's id, where it was (`TOPIC/PARTITION/OFFSET`), and why
/// it is one.
pub const DEAD_ID: &str = "onlyonce-id";
/// See [`DEAD_ID`].
pub const DEAD_FROM: &str = "onlyonce-from";
/// See [`DEAD_ID`].
pub const DEAD_WHY: &str = "onlyonce-why";

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
    /// The partition was taken away while its record was worked on. Whoever has it now gets the record again.
    #[error("the partition is another consumer's by now, which gets the record again")]
    Revoked,
}

impl From<Revoked> for Error {
    fn from(Revoked: Revoked) -> Self {
        Self::Revoked
    }
}

/// Where the idempotency key of a record is. A record that has none there goes by the digest of its key and payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Id {
    /// In this header, the last one of this name.
    Header(String),
    /// It is the record's key. Only where no two records that mean different work share one.
    Key,
    /// It is the record's partition and offset. What the broker delivers twice is one piece of work; what a producer
    /// sends twice is two.
    Position,
}

/// Reads topics as a member of a group, or partitions of one's own choice.
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
    start_from: Mutex<Option<Box<StartFrom>>>,
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
        let start_from = self.start_from.lock();
        let Some(start_from) = &*start_from else { return Ok(()) };
        for (topic, partition) in assigned.to_topic_map().into_keys() {
            if let Some(offset) = start_from(&topic, partition).and_then(|offset| i64::try_from(offset).ok()) {
                assigned.set_partition_offset(&topic, partition, Offset::Offset(offset))?;
            }
        }
        Ok(())
    }
}

impl Consumer {
    /// Joins the group that the configuration names and reads these topics. Records go by the header `id`, or their
    /// digest.
    ///
    /// The configuration is yours, but for `enable.auto.offset.store`, which is off here, and `enable.auto.commit`,
    /// which is on: offsets are stored for the next commit when all before them is settled.
    ///
    /// # Errors
    ///
    /// What the client says of the configuration.
    ///
    /// # Panics
    ///
    /// Outside of a Tokio runtime.
    pub fn subscribe(config: &ClientConfig, topics: &[&str]) -> Result<Self, Error> {
        let made = Self::make(config)?;
        made.shared.consumer.subscribe(topics)?;
        Ok(made)
    }

    /// Reads these partitions, whoever else does, from the offsets in the list; those of [`Offset::Stored`] from what
    /// the group in the configuration has committed. Otherwise as [`subscribe`](Self::subscribe).
    ///
    /// # Errors
    ///
    /// What the client says of the configuration or the list.
    ///
    /// # Panics
    ///
    /// Outside of a Tokio runtime.
    pub fn assign(config: &ClientConfig, partitions: &TopicPartitionList) -> Result<Self, Error> {
        let made = Self::make(config)?;
        made.shared.consumer.assign(partitions)?;
        Ok(made)
    }

    fn make(config: &ClientConfig) -> KafkaResult<Self> {
        let mut config = config.clone();
        config.set("enable.auto.commit", "true").set("enable.auto.offset.store", "false");
        let context = Context { partitions: Mutex::new(Partitions::new(AHEAD)), start_from: Mutex::default() };
        let consumer = config.create_with_context(context)?;
        let shared = Shared { consumer, id: Id::Header("id".to_owned()), dead: None, changed: Notify::new() };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Where the idempotency key is: in the header `id` by default.
    #[must_use]
    pub fn id(self, id: Id) -> Self {
        self.with(|shared| shared.id = id)
    }

    /// The topic for dead letters, and who sends them: a producer with `acks` of `all`, which is its default. Without
    /// one, what is rejected is only left behind in its topic.
    #[must_use]
    pub fn dead_letters(self, producer: FutureProducer, topic: &str) -> Self {
        self.with(|shared| shared.dead = Some((producer, topic.to_owned())))
    }

    /// How many records of a partition are given out at most, counted from the first that is not settled: 1,000 by
    /// default. So many are delivered again after a crash, and lie in memory while one of them waits to come back.
    /// With 1 the records of a partition come one after the other: one that is to come back holds up those behind it.
    #[must_use]
    pub fn ahead(self, records: usize) -> Self {
        self.shared.consumer.context().partitions.lock().set_ahead(records);
        self
    }

    /// Where a partition begins that the group assigns to this consumer, by its topic and number: at this offset,
    /// such as one that a [`Job::tx`](super::Job::tx) has stored; at what the group has committed, where it is `None`.
    /// Called while the group waits.
    ///
    /// Offsets that the work stores are right with [`ahead(1)`](Self::ahead) alone: with more records out, one that is done
    /// says with its offset that those before it are, too, and a restart would leave them out. One that is rejected stores
    /// none, so that a restart may read it again.
    #[must_use]
    pub fn start_from(self, offset: impl Fn(&str, i32) -> Option<u64> + Send + Sync + 'static) -> Self {
        *self.shared.consumer.context().start_from.lock() = Some(Box::new(offset));
        self
    }

    fn with(mut self, change: impl FnOnce(&mut Shared)) -> Self {
        if let Some(shared) = Arc::get_mut(&mut self.shared) {
            change(shared);
        }
        self
    }

    /// The next record: one that comes back, or a new one. Waits for it.
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
                return self.give(given);
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
    answered: bool,
}

impl Message {
    fn new(shared: &Arc<Shared>, ticket: Ticket, record: Arc<OwnedMessage>) -> Self {
        let id = header(&record, DEAD_ID).map(<[u8]>::to_vec).or_else(|| match &shared.id {
            Id::Header(name) => header(&record, name).map(<[u8]>::to_vec),
            Id::Key => record.key().map(<[u8]>::to_vec),
            Id::Position => Some(format!("{}/{}", record.partition(), record.offset()).into_bytes()),
        });
        Self { shared: Arc::clone(shared), ticket, record, id, answered: false }
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

    async fn bury(&self, why: &str) -> Result<(), Error> {
        let Some((producer, topic)) = &self.shared.dead else { return Ok(()) };
        let own = [DEAD_ID, DEAD_FROM, DEAD_WHY];
        let mut headers = OwnedHeaders::new();
        for header in self.record.headers().into_iter().flat_map(Headers::iter) {
            if !own.contains(&header.key) {
                headers = headers.insert(header);
            }
        }
        let from = format!("{}/{}/{}", self.record.topic(), self.record.partition(), self.record.offset());
        headers = headers.insert(Header { key: DEAD_FROM, value: Some(&from) });
        headers = headers.insert(Header { key: DEAD_WHY, value: Some(why) });
        if let Some(id) = &self.id {
            headers = headers.insert(Header { key: DEAD_ID, value: Some(id) });
        }
        let mut letter = FutureRecord::<[u8], [u8]>::to(topic).headers(headers);
        (letter.key, letter.payload) = (self.record.key(), self.record.payload());
        producer.send(letter, ROOM).await.map_err(|(error, _)| error)?;
        Ok(())
    }
}

impl Delivery for Message {
    type Error = Error;

    fn key(&self) -> Key<'_> {
        let all = Key::composite([self.record.key().unwrap_or_default(), self.payload()]);
        key_of(self.id.as_deref(), all.as_bytes(), self.record.topic())
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

fn header<'a>(record: &'a OwnedMessage, name: &str) -> Option<&'a [u8]> {
    let mut found = record.headers()?.iter().filter(|header| header.key == name);
    found.by_ref().filter_map(|header| header.value).last()
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
