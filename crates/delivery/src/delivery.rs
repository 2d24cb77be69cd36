//! The `Delivery` trait: a message of a queue and the answers the queue takes.

use std::future::Future;
use std::time::Duration;

use onlyonce_core::{Key, Timestamp};

/// A message that a queue has delivered and that waits for an answer.
///
/// Each answer consumes the delivery. A delivery that is dropped without an answer is redelivered by the queue's own rule:
/// after a timeout, or when the connection closes.
pub trait Delivery: Sized + Send + Sync {
    /// Error of the queue or its client.
    type Error: std::error::Error + Send + Sync + 'static;

    /// The idempotency key: equal for all deliveries of one piece of work, including messages that the producer sent twice.
    /// Put the queue's name into its scope; otherwise equal ids of two queues on one store collide. With a
    /// [fingerprint](Key::fingerprint) of the payload, a different payload under the same key is rejected; without one it
    /// counts as a duplicate.
    fn key(&self) -> Key<'_>;

    /// The timestamp of the message, if the queue has one. A store on stream time needs it, equal for each delivery of the
    /// message: the processor rejects deliveries without one, and deliveries whose timestamp has a wrong unit
    /// ([`TimestampError::WrongUnit`](onlyonce_core::TimestampError)). A timestamp of the [`key`](Self::key) takes
    /// precedence.
    fn timestamp(&self) -> Option<Timestamp> {
        None
    }

    /// What [`key`](Self::key) was derived from. [`Processor::stats`](crate::Processor::stats) counts duplicates by it, and
    /// [`Processor::require_ids`](crate::Processor::require_ids) rejects [`KeyOrigin::Digest`].
    fn key_origin(&self) -> KeyOrigin {
        KeyOrigin::Id
    }

    /// Where messages of this queue carry their id, for log lines and rejection reasons: "header `id` of topic `orders`".
    fn id_location(&self) -> String {
        "the id of the message".to_owned()
    }

    /// The content of the message.
    fn payload(&self) -> &[u8];

    /// Acknowledges the delivery: the work is done, and the queue may delete the message.
    fn ack(self) -> impl Future<Output = Result<(), Self::Error>> + Send;

    /// Asks the queue to redeliver after about `delay`.
    fn retry_after(self, delay: Duration) -> impl Future<Output = Result<(), Self::Error>> + Send;

    /// Rejects the delivery for good: moves it to the dead letters, with the reason where they can carry it. A queue
    /// without dead letters deletes it.
    fn reject(self, reason: &str) -> impl Future<Output = Result<(), Self::Error>> + Send;

    /// The same delivery under another key, such as a payload field that identifies the work better than the queue's
    /// metadata.
    fn with_key(self, key: impl Into<Key<'static>>) -> WithKey<Self> {
        WithKey { key: key.into(), delivery: self }
    }
}

/// What the key of a delivery was derived from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum KeyOrigin {
    /// An id that the producer set, or a key that the caller chose. Two messages with one id are one piece of work.
    Id,
    /// The position of the message in its queue. Redeliveries are deduplicated; a message that the producer sends twice is
    /// processed twice.
    Position,
    /// A digest of the content, because the message has no id. **Two messages with equal content are one piece of work**,
    /// even if they are two events.
    Digest,
}

impl KeyOrigin {
    /// The origin of [`key_of`] with this id. For adapter authors.
    #[must_use]
    pub fn of(id: Option<&[u8]>) -> Self {
        if id.is_some_and(|id| !id.is_empty()) { Self::Id } else { Self::Digest }
    }
}

/// A delivery with a key that the caller chose. Made by [`Delivery::with_key`].
#[derive(Debug, Clone)]
pub struct WithKey<D> {
    key: Key<'static>,
    delivery: D,
}

impl<D> WithKey<D> {
    /// The wrapped delivery.
    #[must_use]
    pub fn inner(&self) -> &D {
        &self.delivery
    }
}

impl<D: Delivery> Delivery for WithKey<D> {
    type Error = D::Error;

    fn key(&self) -> Key<'_> {
        self.key.clone()
    }

    fn timestamp(&self) -> Option<Timestamp> {
        self.delivery.timestamp()
    }

    fn key_origin(&self) -> KeyOrigin {
        KeyOrigin::Id
    }

    fn id_location(&self) -> String {
        self.delivery.id_location()
    }

    fn payload(&self) -> &[u8] {
        self.delivery.payload()
    }

    fn ack(self) -> impl Future<Output = Result<(), Self::Error>> + Send {
        self.delivery.ack()
    }

    fn retry_after(self, delay: Duration) -> impl Future<Output = Result<(), Self::Error>> + Send {
        self.delivery.retry_after(delay)
    }

    fn reject(self, reason: &str) -> impl Future<Output = Result<(), Self::Error>> + Send {
        self.delivery.reject(reason)
    }
}

/// The key of a message: the producer's id, or a digest of the payload if the id is missing or empty. The scope is the
/// queue's name, of at most 255 bytes. For adapter authors.
#[must_use]
pub fn key_of<'a>(id: Option<&'a [u8]>, payload: &[u8], queue: &'a str) -> Key<'a> {
    id.filter(|id| !id.is_empty()).map_or_else(|| Key::content(payload), Key::from).scope(queue)
}

const MAX_REASON_CHARS: usize = 1_000;

/// Formats a rejection reason for a dead letter: one line without control characters, of at most 1,000 characters. For
/// adapter authors.
#[must_use]
pub fn reason_line(reason: &str) -> String {
    let is_unprintable = |c: char| c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}');
    reason.chars().map(|c| if is_unprintable(c) { ' ' } else { c }).take(MAX_REASON_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_is_the_id_or_the_payload_digest_in_the_scope_of_the_queue() {
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
