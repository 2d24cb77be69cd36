//! Offsets and the outbox.

use std::collections::BTreeMap;

use crate::answer::{Message, MessageId};
use crate::completion::SideWrites;

#[derive(Debug, Default)]
pub(super) struct StoredSideWrites {
    pub(super) offsets: BTreeMap<(Vec<u8>, u32), u64>,
    outbox: BTreeMap<MessageId, Message>,
    records: u64,
}

/// The side writes of one call.
#[derive(Debug)]
pub(super) struct Batch {
    record: u64,
    messages: u32,
    stores_offsets: bool,
}

impl Batch {
    /// Stores no more offsets in this call: they would cover a message whose completion was rejected.
    pub(super) fn hold_back_offsets(&mut self) {
        self.stores_offsets = false;
    }
}

impl StoredSideWrites {
    pub(super) fn begin(&mut self) -> Batch {
        self.records += 1;
        Batch { record: self.records, messages: 0, stores_offsets: true }
    }

    pub(super) fn store(&mut self, side_writes: &SideWrites, batch: &mut Batch) {
        for offset in side_writes.offsets.iter().filter(|_| batch.stores_offsets) {
            self.offsets.insert((offset.stream.clone(), offset.partition), offset.offset);
        }
        for message in &side_writes.messages {
            let id = MessageId::new(batch.record, batch.messages);
            batch.messages += 1;
            self.outbox.insert(id, Message::new(id, message.clone()));
        }
    }

    pub(super) fn outbox(&self, limit: usize) -> Vec<Message> {
        self.outbox.values().take(limit).cloned().collect()
    }

    pub(super) fn remove_messages(&mut self, ids: &[MessageId]) {
        for id in ids {
            self.outbox.remove(id);
        }
    }
}
