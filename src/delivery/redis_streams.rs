//! Deliveries of a Redis stream, for a consumer group. Behind the feature `redis-streams`.
//!
//! `docs/brokers/redis-streams.md` says which duplicates a stream makes, which key to choose, and what is not done
//! here.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::streams::{StreamAutoClaimOptions, StreamClaimOptions, StreamReadOptions};
use redis::{AsyncCommands, AsyncConnectionConfig, Client, RedisError, RedisResult, Value};

use super::message::{Delivery, KeyOrigin, key_of, reason_line};
use super::redis_reply::{Found, Read, claimed, new};
use super::setting::SettingError;
use crate::clock::millis;
use crate::key::Key;

/// How long an answer of the server may take. A read may take as much longer as it blocks.
const RESPONSE: Duration = Duration::from_secs(5);
/// What begins the fields that a dead letter has beside its own.
const ADDED: &[u8] = b"onlyonce.";
const WHY: &[u8] = b"onlyonce.why";
const FROM: &[u8] = b"onlyonce.from";

/// A member of a consumer group, which reads what is new and claims what others have left lying. Made by a [`Builder`].
pub struct Consumer {
    client: Client,
    queue: Arc<Queue>,
    name: String,
    batch: usize,
    block: Duration,
    connections: Option<Connections>,
    /// Where the next look at pending entries begins.
    cursor: Vec<u8>,
    ready: VecDeque<Entry>,
}

struct Connections {
    /// A read blocks all that comes behind it, so that answers have a connection of their own.
    reads: MultiplexedConnection,
    answers: MultiplexedConnection,
}

struct Queue {
    stream: String,
    group: String,
    dead: String,
    id_field: String,
    payload_field: String,
    idle_ms: usize,
}

/// The settings of a [`Consumer`], all of which have a default. Made by [`Consumer::builder`].
#[must_use = "call `build` to get the consumer"]
pub struct Builder {
    client: Client,
    stream: String,
    group: String,
    name: String,
    dead: Option<String>,
    id_field: String,
    payload_field: String,
    idle: Duration,
    batch: usize,
    block: Duration,
}

impl Builder {
    /// The field that holds the idempotency key, `id` by default. Entries without it go by the digest of their fields.
    pub fn id_field(mut self, field: &str) -> Self {
        field.clone_into(&mut self.id_field);
        self
    }

    /// The field that is [`payload`](Delivery::payload), `payload` by default. [`Entry::field`] gives the others.
    pub fn payload_field(mut self, field: &str) -> Self {
        field.clone_into(&mut self.payload_field);
        self
    }

    /// The stream for dead letters, by default that of the stream with `.dead` behind. On a cluster both must be in one
    /// slot.
    pub fn dead_letters(mut self, stream: &str) -> Self {
        self.dead = Some(stream.to_owned());
        self
    }

    /// After what time without an answer an entry is delivered again, one minute by default. Longer than the work
    /// usually takes, shorter than a crash may hold an entry up. No delivery stays away longer than this.
    pub fn idle(mut self, idle: Duration) -> Self {
        self.idle = idle;
        self
    }

    /// How many entries a read takes at most, 100 by default, and how long it waits for the first, half a second by
    /// default. Whatever is to come back comes back so much later.
    pub fn reads(mut self, batch: usize, block: Duration) -> Self {
        (self.batch, self.block) = (batch, block);
        self
    }

    /// The consumer. Connects to nothing yet.
    ///
    /// # Errors
    ///
    /// A name that is empty, a dead letter stream that is the stream itself, an idle time or a wait below one millisecond,
    /// or a batch of none.
    pub fn build(self) -> Result<Consumer, SettingError> {
        let Self { client, stream, group, name, dead, id_field, payload_field, idle, batch, block } = self;
        let dead = dead.unwrap_or_else(|| format!("{stream}.dead"));
        let names = [
            ("stream", &stream),
            ("group", &group),
            ("name", &name),
            ("dead_letters", &dead),
            ("id_field", &id_field),
            ("payload_field", &payload_field),
        ];
        for (setting, name) in names {
            SettingError::unless(!name.is_empty(), setting, "empty", "a name")?;
        }
        SettingError::unless(dead != stream, "dead_letters", &dead, "another stream than that of the consumer")?;
        let millisecond = Duration::from_millis(1);
        SettingError::unless(idle >= millisecond, "idle", format!("{idle:?}"), "1 ms or longer")?;
        SettingError::unless(block >= millisecond, "reads", format!("{block:?}"), "a wait of 1 ms or longer")?;
        SettingError::unless(batch > 0, "reads", batch, "a batch of at least one entry")?;
        let idle_ms = usize::try_from(millis(idle)).unwrap_or(usize::MAX);
        let queue = Arc::new(Queue { stream, group, dead, id_field, payload_field, idle_ms });
        let (cursor, ready) = (b"0-0".to_vec(), VecDeque::new());
        Ok(Consumer { client, queue, name, batch, block, connections: None, cursor, ready })
    }
}

impl Consumer {
    /// A member of this name, which must differ from that of every other one that runs. Connects at the first
    /// [`next`](Self::next), and makes the stream and the group where they are missing; the group begins with what is
    /// in the stream.
    pub fn builder(client: Client, stream: &str, group: &str, name: &str) -> Builder {
        Builder {
            client,
            stream: stream.to_owned(),
            group: group.to_owned(),
            name: name.to_owned(),
            dead: None,
            id_field: "id".to_owned(),
            payload_field: "payload".to_owned(),
            idle: Duration::from_secs(60),
            batch: 100,
            block: Duration::from_millis(500),
        }
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
            let read = self.read(&mut connections).await?;
            let entry = |read: Read| Entry {
                queue: Arc::clone(&self.queue),
                consumer: self.name.clone(),
                answers: connections.answers.clone(),
                id: read.id,
                fields: read.fields,
            };
            self.ready.extend(read.into_iter().map(entry));
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

    async fn read(&mut self, connections: &mut Connections) -> RedisResult<Vec<Read>> {
        let Queue { stream, group, idle_ms, .. } = &*self.queue;
        let reads = &mut connections.reads;
        let options = StreamAutoClaimOptions::default().count(self.batch);
        // Replies are taken apart here: the client takes one with a field name that is no UTF-8 for no reply at all.
        let reply: Value = reads.xautoclaim_options(stream, group, &self.name, *idle_ms, &self.cursor, options).await?;
        let idle = claimed(reply)?;
        self.cursor = idle.cursor;
        if !idle.entries.is_empty() {
            return self.sorted(idle.entries, connections).await;
        }
        let block_ms = usize::try_from(millis(self.block)).unwrap_or(usize::MAX).max(1);
        let options = StreamReadOptions::default().group(group, &self.name).count(self.batch).block(block_ms);
        let reply: Value = reads.xread_options(&[stream], &[">"], &options).await?;
        self.sorted(new(reply)?, connections).await
    }

    /// The entries that can be handed out. What is left of the others is taken off the list of pending ones: an entry that
    /// was deleted has nothing to deliver, and another shape than that of an entry cannot be stored in a stream.
    async fn sorted(&self, found: Vec<Found>, connections: &mut Connections) -> RedisResult<Vec<Read>> {
        let Queue { stream, group, .. } = &*self.queue;
        let mut good = Vec::with_capacity(found.len());
        for found in found {
            match found {
                Found::Entry(read) => good.push(read),
                Found::Empty(id) => {
                    tracing::warn!(stream, id, "a pending entry is no longer in its stream: acknowledged");
                    let () = connections.answers.xack(stream, group, &[&id]).await?;
                }
                Found::Odd => tracing::error!(stream, "a reply has something in it that is no entry: left out"),
            }
        }
        Ok(good)
    }
}

/// An entry of a stream.
pub struct Entry {
    queue: Arc<Queue>,
    consumer: String,
    answers: MultiplexedConnection,
    id: String,
    /// In the order in which they were added.
    fields: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Entry {
    /// Its number in the stream: not its idempotency key, for a producer that sends again gets another one.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The bytes of a field, the first one of its name. Names may be any bytes.
    #[must_use]
    pub fn field(&self, name: impl AsRef<[u8]>) -> Option<&[u8]> {
        let name = name.as_ref();
        self.fields.iter().find(|(field, _)| field == name).map(|(_, bytes)| &**bytes)
    }

    /// All fields and their values, in the order in which they were added.
    pub fn fields(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.fields.iter().map(|(name, bytes)| (&**name, &**bytes))
    }
}

/// The fields of a dead letter: those of the entry in their order, and ours, which take the place of earlier ones. No field
/// is a directive to Redis.
fn letter<'a>(fields: &'a [(Vec<u8>, Vec<u8>)], from: &'a [u8], why: &'a [u8]) -> Vec<(&'a [u8], &'a [u8])> {
    let own = fields.iter().filter(|(name, _)| !name.starts_with(ADDED));
    own.map(|(name, bytes)| (&**name, &**bytes)).chain([(WHY, why), (FROM, from)]).collect()
}

/// What stands for an entry without an id: its fields, by name, without ours.
fn content(fields: &[(Vec<u8>, Vec<u8>)]) -> Key<'static> {
    let mut own: Vec<_> = fields.iter().filter(|(name, _)| !name.starts_with(ADDED)).collect();
    own.sort();
    Key::composite(own.into_iter().flat_map(|(name, bytes)| [name, bytes]))
}

impl Delivery for Entry {
    type Error = RedisError;

    fn key(&self) -> Key<'_> {
        let id = self.field(&self.queue.id_field);
        key_of(id, content(&self.fields).as_bytes(), &self.queue.stream)
    }

    fn key_origin(&self) -> KeyOrigin {
        KeyOrigin::of(self.field(&self.queue.id_field))
    }

    fn id_place(&self) -> String {
        format!("field `{}` of stream `{}`", self.queue.id_field, self.queue.stream)
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
        let why = reason_line(why);
        let letter = letter(&self.fields, self.id.as_bytes(), why.as_bytes());
        let Queue { stream, group, dead, .. } = &*self.queue;
        // One after the other: in a transaction the acknowledgement would be made, too, where the letter is refused.
        let () = self.answers.xadd(dead, "*", &letter).await?;
        self.answers.xack(stream, group, &[&self.id]).await
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

#[cfg(test)]
mod tests {
    use super::*;

    fn builder() -> Builder {
        Consumer::builder(Client::open("redis://127.0.0.1:1").unwrap(), "orders", "workers", "one")
    }

    #[test]
    fn a_dead_letter_has_all_fields_of_its_entry_in_their_order_and_ours_once() {
        let fields: Vec<(Vec<u8>, Vec<u8>)> = [
            (&b"tag"[..], &b"1"[..]),
            (b"onlyonce.why", b"an earlier rejection"),
            (b"\xff", b"x"),
            (b"onlyonce.from", b"0-1"),
            (b"tag", b"2"),
        ]
        .map(|(name, value)| (name.to_vec(), value.to_vec()))
        .into();
        let expected: [(&[u8], &[u8]); 5] =
            [(b"tag", b"1"), (b"\xff", b"x"), (b"tag", b"2"), (WHY, b"no such order"), (FROM, b"7-0")];
        assert_eq!(letter(&fields, b"7-0", b"no such order"), expected);
        // Back from there it has the key that it had, in whatever order its fields are added.
        let own: Vec<_> = fields.iter().filter(|(name, _)| !name.starts_with(ADDED)).rev().cloned().collect();
        assert_eq!(content(&fields), content(&own));
        assert_ne!(content(&fields), content(&own[1..]));
    }

    #[test]
    fn a_setting_that_cannot_be_is_an_error_that_names_it() {
        let named = |builder: Builder| builder.build().err().unwrap().setting;
        let block = Duration::from_secs(1);
        assert_eq!(named(builder().idle(Duration::ZERO)), "idle");
        assert_eq!(named(builder().reads(0, block)), "reads");
        assert_eq!(named(builder().reads(1, Duration::from_nanos(1))), "reads");
        assert_eq!(named(builder().id_field("")), "id_field");
        assert_eq!(named(builder().dead_letters("orders")), "dead_letters");
        assert_eq!(builder().build().unwrap().queue.dead, "orders.dead");
    }
}
