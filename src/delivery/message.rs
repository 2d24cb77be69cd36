//! What a queue hands over, and what it can be told about it.

use std::future::Future;
use std::time::Duration;

use crate::key::Key;

/// A message that a queue has handed over, and waits to hear about.
///
/// Each answer consumes it. One that is dropped without an answer comes back when its queue thinks so: after a timeout,
/// or when the connection ends.
pub trait Delivery: Sized + Send + Sync {
    /// What the queue may fail with.
    type Error: std::error::Error + Send + Sync + 'static;

    /// The idempotency key: the same for every delivery of the same piece of work, also where its producer has sent it
    /// twice. Put it into the queue's scope, or two queues with one store take their keys for each other's. With a
    /// [fingerprint](Key::fingerprint) of the payload, another payload under the same key is rejected; without one it is
    /// taken for a duplicate.
    fn key(&self) -> Key<'_>;

    /// When the message was made, in milliseconds since the Unix epoch, where the queue says so. A store that runs on
    /// [stream time](crate::Builder::stream_time) goes by it: there it must be the same for each delivery, and a delivery without it is rejected.
    /// So is one whose timestamp is plainly in another unit: [`Error::TimestampUnit`](crate::Error).
    fn timestamp_ms(&self) -> Option<u64> {
        None
    }

    /// What [`key`](Self::key) was made of. [`Processor::stats`](super::Processor::stats) counts duplicates by it, and
    /// [`Processor::require_ids`](super::Processor::require_ids) rejects [`KeyOrigin::Digest`].
    fn key_origin(&self) -> KeyOrigin {
        KeyOrigin::Id
    }

    /// Where the queue's messages have their ids, in words, for the reason of a rejection and for the log:
    /// "header `id` of topic `orders`".
    fn id_place(&self) -> String {
        "the place where its queue has ids".to_owned()
    }

    /// What it says.
    fn payload(&self) -> &[u8];

    /// It is done: the queue need not keep it.
    fn ack(self) -> impl Future<Output = Result<(), Self::Error>> + Send;

    /// Not now: it is to come back when `wait` is over, or about then.
    fn retry_after(self, wait: Duration) -> impl Future<Output = Result<(), Self::Error>> + Send;

    /// Never: it goes to the dead letters, with the reason where they have room for one. Where the queue has none, it
    /// is gone.
    fn reject(self, why: &str) -> impl Future<Output = Result<(), Self::Error>> + Send;

    /// The same delivery under another key, such as a field of the payload that names the work better than what the
    /// queue knows of it.
    fn with_key(self, key: impl Into<Key<'static>>) -> Keyed<Self> {
        Keyed { key: key.into(), delivery: self }
    }
}

/// What the key of a delivery was made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum KeyOrigin {
    /// An id that the producer gave the message, or a key of the caller's choice. Two messages with one id are one piece of
    /// work.
    Id,
    /// The message's place in its queue. What the queue delivers twice is one piece of work; what a producer sends twice is
    /// two.
    Position,
    /// A digest of the message's content, because it has no id. **Two messages with the same content are one piece of work**,
    /// also where they are two events.
    Digest,
}

impl KeyOrigin {
    /// That of [`key_of`] with this id. For authors of adapters.
    #[must_use]
    pub fn of(id: Option<&[u8]>) -> Self {
        if id.is_some_and(|id| !id.is_empty()) { Self::Id } else { Self::Digest }
    }
}

/// A delivery under a key of the caller's choice. Made by [`Delivery::with_key`].
#[derive(Debug, Clone)]
pub struct Keyed<D> {
    key: Key<'static>,
    delivery: D,
}

impl<D> Keyed<D> {
    /// The delivery itself.
    #[must_use]
    pub fn inner(&self) -> &D {
        &self.delivery
    }
}

impl<D: Delivery> Delivery for Keyed<D> {
    type Error = D::Error;

    fn key(&self) -> Key<'_> {
        self.key.clone()
    }

    fn timestamp_ms(&self) -> Option<u64> {
        self.delivery.timestamp_ms()
    }

    fn key_origin(&self) -> KeyOrigin {
        KeyOrigin::Id
    }

    fn id_place(&self) -> String {
        self.delivery.id_place()
    }

    fn payload(&self) -> &[u8] {
        self.delivery.payload()
    }

    fn ack(self) -> impl Future<Output = Result<(), Self::Error>> + Send {
        self.delivery.ack()
    }

    fn retry_after(self, wait: Duration) -> impl Future<Output = Result<(), Self::Error>> + Send {
        self.delivery.retry_after(wait)
    }

    fn reject(self, why: &str) -> impl Future<Output = Result<(), Self::Error>> + Send {
        self.delivery.reject(why)
    }
}

/// The key of a message: the id that its producer gave it, or its payload's digest where that is missing or empty. In
/// the scope of its queue, of at most 255 bytes. For whoever writes an adapter.
#[must_use]
pub fn key_of<'a>(id: Option<&'a [u8]>, payload: &[u8], queue: &'a str) -> Key<'a> {
    id.filter(|id| !id.is_empty()).map_or_else(|| Key::content(payload), Key::from).scope(queue)
}

/// The most characters that a dead letter's reason has.
const REASON_MOST: usize = 1_000;

/// A reason as dead letters take it: one line, without control characters, of at most 1,000 characters. For authors of
/// adapters.
#[must_use]
pub fn reason_line(why: &str) -> String {
    let is_odd = |c: char| c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}');
    why.chars().map(|c| if is_odd(c) { ' ' } else { c }).take(REASON_MOST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_goes_by_its_id_or_by_its_payload_in_the_scope_of_its_queue() {
        let by_id = key_of(Some(b"1"), b"payload", "orders");
        assert_eq!(by_id, Key::from("1").scope("orders"));
        assert_ne!(by_id, key_of(Some(b"1"), b"payload", "refunds"));
        for id in [None, Some(&b""[..])] {
            assert_eq!(key_of(id, b"payload", "orders"), Key::content(b"payload").scope("orders"));
            assert_eq!(KeyOrigin::of(id), KeyOrigin::Digest);
        }
        assert_eq!(KeyOrigin::of(Some(b"1")), KeyOrigin::Id);
    }

    #[test]
    fn a_reason_is_one_short_line() {
        assert_eq!(reason_line("no\r\nsuch\u{0}order\u{ffff}"), "no  such order ");
        assert_eq!(reason_line(&"é".repeat(5_000)).chars().count(), 1_000);
    }
}
