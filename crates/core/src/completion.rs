use std::fmt;

use crate::error::printable;
use crate::wire::{Reader, put_prefixed};

/// What completes a lease: its result, and the offsets and messages that are stored in the same write.
///
/// All of it is stored, or nothing. Text and bytes convert into a completion without side writes, so that
/// `lease.complete("charged")` works.
///
/// ```
/// use onlyonce_core::Completion;
///
/// let completion =
///     Completion::new("charged").offset("orders", 0, 4712).message("charges", "order-4711", "12 EUR");
/// assert_eq!(completion.result(), b"charged");
/// assert_eq!(Completion::from("charged").result(), b"charged");
/// ```
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Completion {
    result: Vec<u8>,
    // Rarely set, and then on the heap: batches move many completions.
    side_writes: Option<Box<SideWrites>>,
}

/// Consumer offsets and outbox messages that are written together with a completion.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SideWrites {
    /// Offsets, in the order in which they were added. The last one of a partition is the one that counts.
    pub offsets: Vec<Offset>,
    /// Messages, in the order in which they were added.
    pub messages: Vec<NewMessage>,
}

/// How far a partition of a stream was read.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Offset {
    /// The stream, such as a topic's name.
    pub stream: Vec<u8>,
    /// The partition.
    pub partition: u32,
    /// The next offset to read.
    pub offset: u64,
}

/// A message for the outbox that has no id yet.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct NewMessage {
    /// The topic to publish it to.
    pub topic: Vec<u8>,
    /// Its key there.
    pub key: Vec<u8>,
    /// Its payload.
    pub payload: Vec<u8>,
}

/// Results and payloads may be long, and may be secrets: `Debug` prints their lengths.
impl fmt::Debug for Completion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Completion")
            .field("result_len", &self.result.len())
            .field("side_writes", &self.side_writes)
            .finish()
    }
}

impl fmt::Debug for NewMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewMessage")
            .field("topic", &printable(&self.topic))
            .field("key", &printable(&self.key))
            .field("payload_len", &self.payload.len())
            .finish()
    }
}

impl Completion {
    /// A completion with this result. An empty result is a result.
    #[must_use]
    #[inline]
    pub fn new(result: impl Into<Vec<u8>>) -> Self {
        Self { result: result.into(), side_writes: None }
    }

    /// Also stores how far a partition of a stream was read: `offset` is the next one to read.
    ///
    /// Offsets are cumulative. Do not store an offset past a message whose key is still in progress. If leases of one
    /// partition are completed out of order, the last write counts, not the highest.
    #[must_use]
    pub fn offset(mut self, stream: impl Into<Vec<u8>>, partition: u32, offset: u64) -> Self {
        self.side_writes_mut().offsets.push(Offset { stream: stream.into(), partition, offset });
        self
    }

    /// Also puts a message into the outbox. A publisher reads it from there and removes it.
    #[must_use]
    pub fn message(mut self, topic: impl Into<Vec<u8>>, key: impl Into<Vec<u8>>, payload: impl Into<Vec<u8>>) -> Self {
        let message = NewMessage { topic: topic.into(), key: key.into(), payload: payload.into() };
        self.side_writes_mut().messages.push(message);
        self
    }

    /// Replaces the side writes.
    #[must_use]
    pub fn with_side_writes(mut self, side_writes: SideWrites) -> Self {
        self.side_writes = (!side_writes.is_empty()).then(|| Box::new(side_writes));
        self
    }

    /// The result.
    #[must_use]
    #[inline]
    pub fn result(&self) -> &[u8] {
        &self.result
    }

    /// The offsets and messages. `None` if there are none.
    #[must_use]
    #[inline]
    pub fn side_writes(&self) -> Option<&SideWrites> {
        self.side_writes.as_deref().filter(|side_writes| !side_writes.is_empty())
    }

    /// The same, to change them.
    pub fn side_writes_mut(&mut self) -> &mut SideWrites {
        self.side_writes.get_or_insert_default()
    }

    /// The result alone.
    #[must_use]
    #[inline]
    pub fn into_result(self) -> Vec<u8> {
        self.result
    }

    /// About how many bytes it adds to a write.
    #[must_use]
    #[inline]
    pub fn encoded_len(&self) -> usize {
        self.result.len() + self.side_writes().map_or(0, SideWrites::encoded_len)
    }
}

impl SideWrites {
    /// Adds an offset, as [`Completion::offset`].
    pub fn offset(&mut self, stream: impl Into<Vec<u8>>, partition: u32, offset: u64) -> &mut Self {
        self.offsets.push(Offset { stream: stream.into(), partition, offset });
        self
    }

    /// Adds a message, as [`Completion::message`].
    pub fn message(
        &mut self,
        topic: impl Into<Vec<u8>>,
        key: impl Into<Vec<u8>>,
        payload: impl Into<Vec<u8>>,
    ) -> &mut Self {
        self.messages.push(NewMessage { topic: topic.into(), key: key.into(), payload: payload.into() });
        self
    }

    /// True if there is nothing to write.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.offsets.is_empty() && self.messages.is_empty()
    }

    /// About how many bytes they add to a write.
    #[must_use]
    #[inline]
    pub fn encoded_len(&self) -> usize {
        let offsets = self.offsets.iter().map(|offset| offset.stream.len() + 22);
        let messages = self.messages.iter().map(|m| m.topic.len() + m.key.len() + m.payload.len() + 40);
        offsets.chain(messages).sum()
    }
}

impl NewMessage {
    /// The bytes that an engine stores for it.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.topic.len() + self.key.len() + self.payload.len() + 8);
        put_prefixed(&mut bytes, &self.topic);
        put_prefixed(&mut bytes, &self.key);
        bytes.extend_from_slice(&self.payload);
        bytes
    }

    /// The message that these bytes encode. `None` if they are no message.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(bytes);
        let (topic, key) = (reader.prefixed()?.to_vec(), reader.prefixed()?.to_vec());
        Some(Self { topic, key, payload: reader.rest().to_vec() })
    }
}

impl From<Vec<u8>> for Completion {
    #[inline]
    fn from(result: Vec<u8>) -> Self {
        Self::new(result)
    }
}

impl From<String> for Completion {
    #[inline]
    fn from(result: String) -> Self {
        Self::new(result)
    }
}

impl From<&str> for Completion {
    #[inline]
    fn from(result: &str) -> Self {
        Self::new(result)
    }
}

impl From<&[u8]> for Completion {
    #[inline]
    fn from(result: &[u8]) -> Self {
        Self::new(result)
    }
}

impl<const N: usize> From<&[u8; N]> for Completion {
    #[inline]
    fn from(result: &[u8; N]) -> Self {
        Self::new(result.to_vec())
    }
}

impl<const N: usize> From<[u8; N]> for Completion {
    #[inline]
    fn from(result: [u8; N]) -> Self {
        Self::new(result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_decoded_from_its_bytes() {
        let completion = Completion::new("").message("topic", "", "payload");
        let message = &completion.side_writes().unwrap().messages[0];
        assert_eq!(NewMessage::decode(&message.encode()).as_ref(), Some(message));
        for torn in [&b""[..], b"\x05topi", b"\x00", b"\x00\x02k"] {
            assert_eq!(NewMessage::decode(torn), None, "{torn:?}");
        }
    }

    #[test]
    fn a_completion_without_side_writes_has_none() {
        assert_eq!(Completion::new("r").side_writes(), None);
        assert_eq!(Completion::new("r").with_side_writes(SideWrites::default()).side_writes(), None);
        assert_eq!(Completion::new("r").encoded_len(), 1);
    }
}
