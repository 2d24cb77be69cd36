//! Deliveries of a Redis stream, for a consumer group. Behind the feature `redis-streams`.
//!
//! `docs/brokers/redis-streams.md` says which duplicates a stream makes, which key to choose, and what is not done
//! here.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::streams::{
    StreamAutoClaimOptions, StreamAutoClaimReply, StreamClaimOptions, StreamId, StreamReadOptions, StreamReadReply,
};
use redis::{AsyncCommands, AsyncConnectionConfig, Client, RedisError, RedisResult, Value};

use super::message::{Delivery, key_of};
use crate::clock::millis;
use crate::key::Key;

/// How long an answer of the server may take. A read may take as much longer as it blocks.
const RESPONSE: Duration = Duration::from_secs(5);
/// What begins the fields that a dead letter has beside its own.
const ADDED: &str = "onlyonce.";

/// A member of a consumer group, which reads what is new and claims what others have left lying.
pub struct Consumer {
    client: Client,
    queue: Arc<Queue>,
    name: String,
    batch: usize,
    block: Duration,
    connections: Option<Connections>,
    /// Where the next look at pending entries begins.
    cursor: String,
    ready: VecDeque<Entry>,
}

struct Connections {
    /// A read blocks all that comes behind it, so that answers have a connection of their own.
    reads: MultiplexedConnection,
    answers: MultiplexedConnection,
}

#[derive(Clone)]
struct Queue {
    stream: String,
    group: String,
    dead: String,
    id_field: String,
    payload_field: String,
    idle_ms: usize,
}

impl Consumer {
    /// A member of this name, which must differ from that of every other one that runs. Connects at the first
    /// [`next`](Self::next), and makes the stream and the group where they are missing; the group begins with what is
    /// in the stream.
    #[must_use]
    pub fn new(client: Client, stream: &str, group: &str, name: &str) -> Self {
        let queue = Queue {
            stream: stream.to_owned(),
            group: group.to_owned(),
            dead: format!("{stream}.dead"),
            id_field: "id".to_owned(),
            payload_field: "payload".to_owned(),
            idle_ms: 60_000,
        };
        Self {
            client,
            queue: Arc::new(queue),
            name: name.to_owned(),
            batch: 100,
            block: Duration::from_millis(500),
            connections: None,
            cursor: "0-0".to_owned(),
            ready: VecDeque::new(),
        }
    }

    /// The field that holds the idempotency key, `id` by default. Entries without it go by the digest of their fields.
    #[must_use]
    pub fn id_field(self, field: &str) -> Self {
        self.with(|queue| field.clone_into(&mut queue.id_field))
    }

    /// The field that is [`payload`](Delivery::payload), `payload` by default. [`Entry::field`] gives the others.
    #[must_use]
    pub fn payload_field(self, field: &str) -> Self {
        self.with(|queue| field.clone_into(&mut queue.payload_field))
    }

    /// The stream for dead letters, by default that of the stream with `.dead` behind. On a cluster both must be in one
    /// slot.
    #[must_use]
    pub fn dead_letters(self, stream: &str) -> Self {
        self.with(|queue| stream.clone_into(&mut queue.dead))
    }

    /// After what time without an answer an entry is delivered again, one minute by default. Longer than the work
    /// usually takes, shorter than a crash may hold an entry up. No delivery stays away longer than this.
    #[must_use]
    pub fn idle(self, idle: Duration) -> Self {
        self.with(|queue| queue.idle_ms = usize::try_from(millis(idle)).unwrap_or(usize::MAX))
    }

    /// How many entries a read takes at most, 100 by default, and how long it waits for the first, half a second by
    /// default. Whatever is to come back comes back so much later.
    #[must_use]
    pub fn reads(mut self, batch: usize, block: Duration) -> Self {
        (self.batch, self.block) = (batch.max(1), block);
        self
    }

    fn with(mut self, change: impl FnOnce(&mut Queue)) -> Self {
        change(Arc::make_mut(&mut self.queue));
        self
    }

    /// The next entry: one that lay idle, or a new one. Waits for it.
    ///
    /// May be dropped: what was read meanwhile comes again after the idle time.
    ///
    /// # Errors
    ///
    /// What the server or the connection says. The next call connects anew.
    pub async fn next(&mut self) -> RedisResult<Entry> {
        loop {
            if let Some(entry) = self.ready.pop_front() {
                return Ok(entry);
            }
            // Put back only where all went well.
            let mut connections = match self.connections.take() {
                Some(connections) => connections,
                None => self.connect().await?,
            };
            let entries = self.read(&mut connections.reads).await?;
            let entry = |entry: StreamId| Entry::new(entry, &self.queue, &self.name, &connections.answers);
            self.ready.extend(entries.into_iter().map(entry));
            self.connections = Some(connections);
        }
    }

    async fn connect(&self) -> RedisResult<Connections> {
        let config = |wait| AsyncConnectionConfig::new().set_response_timeout(Some(wait));
        let reads = config(self.block.saturating_add(RESPONSE));
        let mut answers = self.client.get_multiplexed_async_connection_with_config(&config(RESPONSE)).await?;
        let made: RedisResult<()> = answers.xgroup_create_mkstream(&self.queue.stream, &self.queue.group, "0").await;
        match made {
            Err(error) if error.code() == Some("BUSYGROUP") => {}
            made => made?,
        }
        Ok(Connections { reads: self.client.get_multiplexed_async_connection_with_config(&reads).await?, answers })
    }

    async fn read(&mut self, reads: &mut MultiplexedConnection) -> RedisResult<Vec<StreamId>> {
        let Queue { stream, group, idle_ms, .. } = &*self.queue;
        let options = StreamAutoClaimOptions::default().count(self.batch);
        let idle: StreamAutoClaimReply =
            reads.xautoclaim_options(stream, group, &self.name, *idle_ms, &self.cursor, options).await?;
        self.cursor = idle.next_stream_id;
        if !idle.claimed.is_empty() {
            return Ok(idle.claimed);
        }
        let block_ms = usize::try_from(millis(self.block)).unwrap_or(usize::MAX).max(1);
        let options = StreamReadOptions::default().group(group, &self.name).count(self.batch).block(block_ms);
        let new: Option<StreamReadReply> = reads.xread_options(&[stream], &[">"], &options).await?;
        Ok(new.into_iter().flat_map(|new| new.keys).flat_map(|key| key.ids).collect())
    }
}

/// An entry of a stream.
pub struct Entry {
    queue: Arc<Queue>,
    consumer: String,
    answers: MultiplexedConnection,
    id: String,
    /// In the order of their names.
    fields: Vec<(String, Vec<u8>)>,
}

impl Entry {
    fn new(entry: StreamId, queue: &Arc<Queue>, consumer: &str, answers: &MultiplexedConnection) -> Self {
        let bytes = |(name, value)| match value {
            Value::BulkString(bytes) => Some((name, bytes)),
            _ => None,
        };
        let mut fields: Vec<_> = entry.map.into_iter().filter_map(bytes).collect();
        fields.sort();
        let (queue, answers) = (Arc::clone(queue), answers.clone());
        Self { queue, consumer: consumer.to_owned(), answers, id: entry.id, fields }
    }

    /// Its number in the stream: not its idempotency key, for a producer that sends again gets another one.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The bytes of a field.
    #[must_use]
    pub fn field(&self, name: &str) -> Option<&[u8]> {
        self.fields.iter().find(|(field, _)| field == name).map(|(_, bytes)| &**bytes)
    }
}

impl Delivery for Entry {
    type Error = RedisError;

    fn key(&self) -> Key<'_> {
        let own = self.fields.iter().filter(|(name, _)| !name.starts_with(ADDED));
        let all = Key::composite(own.flat_map(|(name, bytes)| [name.as_bytes(), bytes]));
        key_of(self.field(&self.queue.id_field), all.as_bytes(), &self.queue.stream)
    }

    fn timestamp_ms(&self) -> Option<u64> {
        self.id.split('-').next()?.parse().ok()
    }

    fn payload(&self) -> &[u8] {
        self.field(&self.queue.payload_field).unwrap_or_default()
    }

    async fn ack(mut self) -> RedisResult<()> {
        self.answers.xack(&self.queue.stream, &self.queue.group, &[&self.id]).await
    }

    /// The entry is given so much idle time that this wait is what is left of it.
    async fn retry_after(mut self, wait: Duration) -> RedisResult<()> {
        let Queue { stream, group, idle_ms, .. } = &*self.queue;
        let idle_ms = idle_ms.saturating_sub(usize::try_from(millis(wait)).unwrap_or(usize::MAX));
        let options = StreamClaimOptions::default().idle(idle_ms).with_justid();
        self.answers.xclaim_options(stream, group, &self.consumer, 0, &[&self.id], options).await
    }

    async fn reject(mut self, why: &str) -> RedisResult<()> {
        let (why_field, from_field) = (format!("{ADDED}why"), format!("{ADDED}from"));
        let mut letter: Vec<(&str, &[u8])> =
            self.fields.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
        letter.retain(|(name, _)| !name.starts_with(ADDED));
        letter.extend([(why_field.as_str(), why.as_bytes()), (from_field.as_str(), self.id.as_bytes())]);
        let Queue { stream, group, dead, .. } = &*self.queue;
        let mut both = redis::pipe();
        both.atomic().xadd(dead, "*", &letter).ignore().xack(stream, group, &[&self.id]).ignore();
        both.query_async(&mut self.answers).await
    }
}

impl fmt::Debug for Consumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consumer").field("stream", &self.queue.stream).field("name", &self.name).finish_non_exhaustive()
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry").field("stream", &self.queue.stream).field("id", &self.id).finish_non_exhaustive()
    }
}
