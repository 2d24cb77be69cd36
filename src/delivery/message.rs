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
    fn timestamp_ms(&self) -> Option<u64> {
        None
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
        }
    }
}
