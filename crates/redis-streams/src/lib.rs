//! Deliveries of a Redis stream to a consumer group, for [`onlyonce_delivery`].
//!
//! Part of [onlyonce](https://docs.rs/onlyonce), which re-exports it as `onlyonce::delivery::redis_streams` behind the
//! feature `redis-streams`. `docs/brokers/redis-streams.md` in its repository describes the duplicates, the choice of the
//! key, and the limits of the adapter.
#![cfg_attr(not(test), warn(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use onlyonce_core::{Key, Timestamp};
use onlyonce_delivery::{Delivery, KeyOrigin, SettingError, key_of, reason_line};
use redis::aio::MultiplexedConnection;
use redis::streams::{StreamAutoClaimOptions, StreamClaimOptions, StreamReadOptions};
use redis::{AsyncCommands, AsyncConnectionConfig, Client, RedisError, RedisResult, Value};

use crate::reply::{ReplyEntry, StoredEntry, decode_xautoclaim, decode_xreadgroup};

mod reply;

pub use redis;

/// Field of a dead letter: the reason of the rejection.
pub const REASON_FIELD: &str = "onlyonce.reason";
/// Field of a dead letter: the id of the rejected entry in its stream.
pub const SOURCE_FIELD: &str = "onlyonce.source";

/// Timeout of a server reply. A read has the block time in addition.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(5);
/// Prefix of the fields that a dead letter adds.
const PREFIX: &[u8] = b"onlyonce.";

/// A member of a consumer group, which reads new entries and claims idle pending ones. Made by a [`Builder`].
pub struct Consumer {
    client: Client,
    queue: Arc<Queue>,
    name: String,
    batch: usize,
    block: Duration,
    connections: Option<Connections>,
    /// Where the next scan of pending entries starts.
    cursor: Vec<u8>,
    ready: VecDeque<Entry>,
}

struct Connections {
    /// A blocking read delays later commands of its connection, so that answers need one of their own.
    reads: MultiplexedConnection,
    answers: MultiplexedConnection,
}

struct Queue {
    stream: String,
    group: String,
    dead_letters: String,
    id_field: String,
    payload_field: String,
    idle_ms: usize,
}

/// Settings of a [`Consumer`], each with a default. Made by [`Consumer::builder`].
#[must_use = "call `build` to get the consumer"]
pub struct Builder {
    client: Client,
    stream: String,
    group: String,
    name: String,
    dead_letters: Option<String>,
    id_field: String,
    payload_field: String,
    idle: Duration,
    batch: usize,
    block: Duration,
}

impl Builder {
    /// The field with the idempotency key, `id` by default. Entries without it are keyed by a digest of their fields.
    pub fn id_field(mut self, field: &str) -> Self {
        field.clone_into(&mut self.id_field);
        self
    }

    /// The field that is the [`payload`](Delivery::payload), `payload` by default. [`Entry::field`] returns the others.
    pub fn payload_field(mut self, field: &str) -> Self {
        field.clone_into(&mut self.payload_field);
        self
    }

    /// The stream for dead letters, `STREAM.dead` by default. On a cluster both must be in one slot.
    pub fn dead_letters(mut self, stream: &str) -> Self {
        self.dead_letters = Some(stream.to_owned());
        self
    }

    /// The time without an answer after which an entry is delivered again, 1 minute by default. Set it longer than the work
    /// usually takes, and shorter than an entry may wait after a crash. It limits the delay of a retry.
    pub fn idle(mut self, idle: Duration) -> Self {
        self.idle = idle;
        self
    }

    /// The maximum number of entries per read, 100 by default, and how long a read waits for the first one, half a second
    /// by default. Redeliveries are late by up to this wait.
    pub fn reads(mut self, batch: usize, block: Duration) -> Self {
        (self.batch, self.block) = (batch, block);
        self
    }

    /// Builds the consumer. Does not connect yet.
    ///
    /// # Errors
    ///
    /// For an empty name, a dead letter stream that is the stream itself, an idle time or a wait below 1 millisecond, or a
    /// batch of 0.
    pub fn build(self) -> Result<Consumer, SettingError> {
        let Self { client, stream, group, name, dead_letters, id_field, payload_field, idle, batch, block } = self;
        let dead_letters = dead_letters.unwrap_or_else(|| format!("{stream}.dead"));
        let names = [
            ("stream", &stream),
            ("group", &group),
            ("name", &name),
            ("dead_letters", &dead_letters),
            ("id_field", &id_field),
            ("payload_field", &payload_field),
        ];
        for (setting, name) in names {
            SettingError::check(!name.is_empty(), setting, "empty", "a name")?;
        }
        let is_other = dead_letters != stream;
        SettingError::check(is_other, "dead_letters", &dead_letters, "a stream other than the consumed one")?;
        let millisecond = Duration::from_millis(1);
        SettingError::check(idle >= millisecond, "idle", format!("{idle:?}"), "1 ms or longer")?;
        SettingError::check(block >= millisecond, "reads", format!("{block:?}"), "a wait of 1 ms or longer")?;
        SettingError::check(batch > 0, "reads", batch, "a batch of at least 1")?;
        let idle_ms = millis(idle);
        let queue = Arc::new(Queue { stream, group, dead_letters, id_field, payload_field, idle_ms });
        let (cursor, ready) = (b"0-0".to_vec(), VecDeque::new());
        Ok(Consumer { client, queue, name, batch, block, connections: None, cursor, ready })
    }
}

impl Consumer {
    /// A group member of this name, which must be unique among running members. The first [`next`](Self::next) connects,
    /// and creates the stream and the group if they are missing; the new group starts at the first entry of the stream.
    pub fn builder(client: Client, stream: &str, group: &str, name: &str) -> Builder {
        Builder {
            client,
            stream: stream.to_owned(),
            group: group.to_owned(),
            name: name.to_owned(),
            dead_letters: None,
            id_field: "id".to_owned(),
            payload_field: "payload".to_owned(),
            idle: Duration::from_secs(60),
            batch: 100,
            block: Duration::from_millis(500),
        }
    }

    /// Waits for the next entry: an idle pending one or a new one.
    ///
    /// May be cancelled: entries that were read meanwhile are delivered again after the idle time.
    ///
    /// # Errors
    ///
    /// Errors of the server or the connection. The next call reconnects.
    pub async fn next(&mut self) -> RedisResult<Entry> {
        loop {
            if let Some(entry) = self.ready.pop_front() {
                return Ok(entry);
            }
            // Put back after success only, so that an error reconnects.
            let mut connections = match self.connections.take() {
                Some(connections) => connections,
                None => self.connect().await?,
            };
            let read = self.read(&mut connections).await?;
            let entry = |StoredEntry { id, fields }: StoredEntry| Entry {
                queue: Arc::clone(&self.queue),
                consumer: self.name.clone(),
                answers: connections.answers.clone(),
                id,
                fields,
            };
            self.ready.extend(read.into_iter().map(entry));
            self.connections = Some(connections);
        }
    }

    async fn connect(&self) -> RedisResult<Connections> {
        let config = |timeout| AsyncConnectionConfig::new().set_response_timeout(Some(timeout));
        let reads = config(self.block.saturating_add(RESPONSE_TIMEOUT));
        let mut answers = self.client.get_multiplexed_async_connection_with_config(&config(RESPONSE_TIMEOUT)).await?;
        let created: RedisResult<()> = answers.xgroup_create_mkstream(&self.queue.stream, &self.queue.group, "0").await;
        match created {
            Err(error) if error.code() == Some("BUSYGROUP") => {}
            created => created?,
        }
        Ok(Connections { reads: self.client.get_multiplexed_async_connection_with_config(&reads).await?, answers })
    }

    async fn read(&mut self, connections: &mut Connections) -> RedisResult<Vec<StoredEntry>> {
        let Queue { stream, group, idle_ms, .. } = &*self.queue;
        let reads = &mut connections.reads;
        let options = StreamAutoClaimOptions::default().count(self.batch);
        // Decoded here: the client rejects the whole reply if one field name is not UTF-8.
        let reply: Value = reads.xautoclaim_options(stream, group, &self.name, *idle_ms, &self.cursor, options).await?;
        let idle = decode_xautoclaim(reply)?;
        self.cursor = idle.cursor;
        if !idle.entries.is_empty() {
            return self.deliverable(idle.entries, connections).await;
        }
        let block_ms = millis(self.block).max(1);
        let options = StreamReadOptions::default().group(group, &self.name).count(self.batch).block(block_ms);
        let reply: Value = reads.xread_options(&[stream], &[">"], &options).await?;
        self.deliverable(decode_xreadgroup(reply)?, connections).await
    }

    /// Filters the entries that can be delivered. Acknowledges deleted entries, because they have nothing to deliver, and
    /// skips malformed ones.
    async fn deliverable(
        &self,
        entries: Vec<ReplyEntry>,
        connections: &mut Connections,
    ) -> RedisResult<Vec<StoredEntry>> {
        let Queue { stream, group, .. } = &*self.queue;
        let mut stored = Vec::with_capacity(entries.len());
        for entry in entries {
            match entry {
                ReplyEntry::Stored(entry) => stored.push(entry),
                ReplyEntry::Deleted(id) => {
                    tracing::warn!(stream, id, "pending entry was deleted from its stream; acknowledged");
                    let () = connections.answers.xack(stream, group, &[&id]).await?;
                }
                ReplyEntry::Malformed => tracing::error!(stream, "malformed entry in a server reply; skipped"),
            }
        }
        Ok(stored)
    }
}

/// An entry of a stream.
pub struct Entry {
    queue: Arc<Queue>,
    consumer: String,
    answers: MultiplexedConnection,
    id: String,
    /// In the order of `XADD`.
    fields: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Entry {
    /// The id in the stream. Not the idempotency key: a message that the producer sends twice gets two ids.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The value of the first field with this name. Names may be any bytes.
    #[must_use]
    pub fn field(&self, name: impl AsRef<[u8]>) -> Option<&[u8]> {
        let name = name.as_ref();
        self.fields.iter().find(|(field, _)| field == name).map(|(_, bytes)| &**bytes)
    }

    /// All fields and their values, in the order of `XADD`.
    pub fn fields(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.fields.iter().map(|(name, bytes)| (&**name, &**bytes))
    }
}

/// The fields of a dead letter: those of the entry in their order, then ours, which replace earlier ones. No field is a
/// directive to Redis.
fn dead_letter_fields<'a>(
    fields: &'a [(Vec<u8>, Vec<u8>)],
    source: &'a str,
    reason: &'a str,
) -> Vec<(&'a [u8], &'a [u8])> {
    let own = fields.iter().filter(|(name, _)| !name.starts_with(PREFIX)).map(|(name, bytes)| (&**name, &**bytes));
    let ours = [(REASON_FIELD, reason), (SOURCE_FIELD, source)];
    own.chain(ours.map(|(name, value)| (name.as_bytes(), value.as_bytes()))).collect()
}

/// The content of an entry without an id: its fields, sorted by name, without ours.
fn content(fields: &[(Vec<u8>, Vec<u8>)]) -> Key<'static> {
    let mut own: Vec<_> = fields.iter().filter(|(name, _)| !name.starts_with(PREFIX)).collect();
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

    fn id_location(&self) -> String {
        format!("field `{}` of stream `{}`", self.queue.id_field, self.queue.stream)
    }

    /// The time in the entry's id.
    fn timestamp(&self) -> Option<Timestamp> {
        self.id.split('-').next()?.parse().ok().map(Timestamp::from_unix_ms)
    }

    fn payload(&self) -> &[u8] {
        self.field(&self.queue.payload_field).unwrap_or_default()
    }

    async fn ack(mut self) -> RedisResult<()> {
        self.answers.xack(&self.queue.stream, &self.queue.group, &[&self.id]).await
    }

    /// Sets the idle time of the entry so that it exceeds the limit after `delay`.
    async fn retry_after(mut self, delay: Duration) -> RedisResult<()> {
        let Queue { stream, group, idle_ms, .. } = &*self.queue;
        let idle_ms = idle_ms.saturating_sub(millis(delay));
        let options = StreamClaimOptions::default().idle(idle_ms).with_justid();
        self.answers.xclaim_options(stream, group, &self.consumer, 0, &[&self.id], options).await
    }

    async fn reject(mut self, reason: &str) -> RedisResult<()> {
        let reason = reason_line(reason);
        let fields = dead_letter_fields(&self.fields, &self.id, &reason);
        let Queue { stream, group, dead_letters, .. } = &*self.queue;
        // Not a transaction: Redis would run the XACK even if it refuses the XADD.
        let () = self.answers.xadd(dead_letters, "*", &fields).await?;
        self.answers.xack(stream, group, &[&self.id]).await
    }
}

/// Whole milliseconds, as the client takes them.
fn millis(duration: Duration) -> usize {
    usize::try_from(duration.as_millis()).unwrap_or(usize::MAX)
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
            (b"onlyonce.reason", b"an earlier rejection"),
            (b"\xff", b"x"),
            (b"onlyonce.source", b"0-1"),
            (b"tag", b"2"),
        ]
        .map(|(name, value)| (name.to_vec(), value.to_vec()))
        .into();
        let expected: [(&[u8], &[u8]); 5] = [
            (b"tag", b"1"),
            (b"\xff", b"x"),
            (b"tag", b"2"),
            (b"onlyonce.reason", b"no such order"),
            (b"onlyonce.source", b"7-0"),
        ];
        assert_eq!(dead_letter_fields(&fields, "7-0", "no such order"), expected);
        // A redriven letter has the key of its entry, in any order of the fields.
        let own: Vec<_> = fields.iter().filter(|(name, _)| !name.starts_with(PREFIX)).rev().cloned().collect();
        assert_eq!(content(&fields), content(&own));
        assert_ne!(content(&fields), content(&own[1..]));
    }

    #[test]
    fn an_invalid_setting_is_an_error_that_names_it() {
        let named = |builder: Builder| builder.build().err().unwrap().setting;
        let block = Duration::from_secs(1);
        assert_eq!(named(builder().idle(Duration::ZERO)), "idle");
        assert_eq!(named(builder().reads(0, block)), "reads");
        assert_eq!(named(builder().reads(1, Duration::from_nanos(1))), "reads");
        assert_eq!(named(builder().id_field("")), "id_field");
        assert_eq!(named(builder().dead_letters("orders")), "dead_letters");
        assert_eq!(builder().build().unwrap().queue.dead_letters, "orders.dead");
    }
}
