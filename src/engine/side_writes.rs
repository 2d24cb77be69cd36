//! Side writes of completions: the keys of offsets and messages in `meta`, and how they are written.
//!
//! They are part of the write of their completion. In a write of their own, a crash could leave one without the other.

use onlyonce_core::{MessageId, SideWrites};

use crate::codec::put_varint;
use crate::journal::tx::Tx;

const OFFSET: u8 = 1;
const MESSAGE: u8 = 2;

/// The side writes of a completion, and whether its offsets are stored.
pub(super) type Admitted<'a> = (&'a SideWrites, bool);

/// Adds the side writes of the completions of a record to its transaction.
pub(super) fn put(tx: &mut Tx, record: u64, side_writes: &[Admitted<'_>]) {
    let mut index = 0;
    for (side_writes, with_offsets) in side_writes {
        for offset in side_writes.offsets.iter().filter(|_| *with_offsets) {
            let name = offset_name(&offset.stream, offset.partition);
            tx.put_meta(&name, &offset.offset.to_le_bytes());
        }
        for message in &side_writes.messages {
            tx.put_meta(&message_name(MessageId::new(record, index)), &message.encode());
            index += 1;
        }
    }
}

/// The meta key of a partition's offset.
pub(super) fn offset_name(stream: &[u8], partition: u32) -> Vec<u8> {
    let mut name = vec![OFFSET];
    put_varint(&mut name, partition.into());
    name.extend_from_slice(stream);
    name
}

/// The meta key of a message. Message keys sort as their ids.
pub(super) fn message_name(id: MessageId) -> [u8; 13] {
    let mut name = [MESSAGE; 13];
    let (_, rest) = name.split_at_mut(1);
    let (record, index) = rest.split_at_mut(8);
    record.copy_from_slice(&id.record().to_be_bytes());
    index.copy_from_slice(&id.index().to_be_bytes());
    name
}

/// The id of the message with this meta key. `None` if it is not a message's key.
pub(super) fn message_id(name: &[u8]) -> Option<MessageId> {
    let name: &[u8; 12] = name.strip_prefix(&[MESSAGE])?.try_into().ok()?;
    let (record, index) = name.split_at(8);
    Some(MessageId::new(u64::from_be_bytes(record.try_into().ok()?), u32::from_be_bytes(index.try_into().ok()?)))
}
