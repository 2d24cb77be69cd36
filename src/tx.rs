//! What is written together with a completion: consumer offsets, and messages to be sent.

use crate::codec::{put_prefixed, put_varint};

/// What a completion takes along: it is stored in the same write, or, where the completion is refused, not at all.
///
/// Filled by [`Lease::complete_with`](crate::Lease::complete_with) and
/// [`Store::complete_batch_with`](crate::Store::complete_batch_with).
#[derive(Debug, Default)]
pub struct Tx {
    /// Whether its offsets count only where the lease before it in its batch is completed.
    pub(crate) follows: bool,
    /// Offsets, under the bytes that name them.
    pub(crate) offsets: Vec<(Vec<u8>, u64)>,
    /// Messages, as stored.
    pub(crate) messages: Vec<Vec<u8>>,
}

impl Tx {
    /// Notes how far a partition of a stream was read. Read it back with [`Store::offset`](crate::Store::offset). The last one
    /// that is written counts: where several leases of a partition are completed out of order, it is not the highest. An
    /// offset says that all before it is done, and nobody but you knows: set none while an earlier message of the
    /// partition is not completed.
    pub fn set_offset(&mut self, stream: impl AsRef<[u8]>, partition: u32, offset: u64) {
        self.offsets.push((offset_name(stream.as_ref(), partition), offset));
    }

    /// Puts a message into the outbox. Whoever publishes reads it from [`Store::outbox`](crate::Store::outbox) and removes it
    /// with [`Store::delivered`](crate::Store::delivered).
    pub fn enqueue(&mut self, topic: impl AsRef<[u8]>, key: impl AsRef<[u8]>, bytes: impl AsRef<[u8]>) {
        let (topic, key, bytes) = (topic.as_ref(), key.as_ref(), bytes.as_ref());
        let mut message = Vec::with_capacity(topic.len() + key.len() + bytes.len() + 8);
        put_prefixed(&mut message, topic);
        put_prefixed(&mut message, key);
        message.extend_from_slice(bytes);
        self.messages.push(message);
    }

    /// Bytes that it adds to a write, about.
    pub(crate) fn len(&self) -> usize {
        let offsets: usize = self.offsets.iter().map(|(name, _)| name.len() + 16).sum();
        offsets + self.messages.iter().map(|message| message.len() + 32).sum::<usize>()
    }
}

/// A message of the outbox, from [`Store::outbox`](crate::Store::outbox).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Message {
    /// What to remove it by. Given once in the life of a store: pass it on as the message's idempotency key, beside a name of
    /// your own for the store. Other stores give the same ids, and so does a store that was restored from a copy or begun
    /// anew: give it another name then.
    pub id: MessageId,
    /// Where it is to go.
    pub topic: Vec<u8>,
    /// Its key there.
    pub key: Vec<u8>,
    /// What it says.
    pub bytes: Vec<u8>,
}

/// The number of a message in its outbox. Grows in the order in which completions began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MessageId {
    pub(crate) record: u64,
    pub(crate) index: u32,
}

impl std::fmt::Display for MessageId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.record, self.index)
    }
}

const OFFSET: u8 = 1;
const MESSAGE: u8 = 2;

pub(crate) fn offset_name(stream: &[u8], partition: u32) -> Vec<u8> {
    let mut name = vec![OFFSET];
    put_varint(&mut name, partition.into());
    name.extend_from_slice(stream);
    name
}

pub(crate) fn message_name(id: MessageId) -> [u8; 13] {
    let mut name = [MESSAGE; 13];
    let (_, rest) = name.split_at_mut(1);
    let (record, index) = rest.split_at_mut(8);
    record.copy_from_slice(&id.record.to_be_bytes());
    index.copy_from_slice(&id.index.to_be_bytes());
    name
}

/// The message that this name and value are of. `None` where the name is another's.
pub(crate) fn message_id(name: &[u8]) -> Option<MessageId> {
    let name: &[u8; 12] = name.strip_prefix(&[MESSAGE])?.try_into().ok()?;
    let (record, index) = name.split_at(8);
    Some(MessageId {
        record: u64::from_be_bytes(record.try_into().ok()?),
        index: u32::from_be_bytes(index.try_into().ok()?),
    })
}
