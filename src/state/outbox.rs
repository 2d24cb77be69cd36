//! What completions took along: offsets are read, messages are read and removed.

use std::sync::atomic::Ordering;

use super::engine::Engine;
use crate::codec::Reader;
use crate::error::{Error, Result};
use crate::tx::{Message, MessageId, message_id, message_name, offset_name};

impl Engine {
    /// How far a partition was read.
    pub(crate) fn offset(&self, stream: &[u8], partition: u32) -> Result<Option<u64>> {
        self.ready()?;
        let Some(value) = self.db.meta_row(&offset_name(stream, partition))? else { return Ok(None) };
        match value.try_into() {
            Ok(offset) => Ok(Some(u64::from_le_bytes(offset))),
            Err(_) => Err(corrupt("an offset has another length than 8")),
        }
    }

    /// The first messages that are not removed.
    pub(crate) fn outbox(&self, limit: usize) -> Result<Vec<Message>> {
        self.ready()?;
        // Rows below this one are written, and so are their messages: what is not found there never will be.
        let settled = self.hot.rows().settled_below(|| self.sequence.take());
        let from = message_name(MessageId { row: self.delivered_below.load(Ordering::Acquire), place: 0 });
        let mut messages = Vec::new();
        self.db.for_each_meta(&from, |name, value| {
            let Some(id) = message_id(name).filter(|_| messages.len() < limit) else { return Ok(false) };
            let mut reader = Reader::new(value);
            let (Some(topic), Some(key)) = (reader.prefixed(), reader.prefixed()) else {
                return Err(corrupt("a message of the outbox ends too soon"));
            };
            messages.push(Message { id, topic: topic.to_vec(), key: key.to_vec(), bytes: reader.rest().to_vec() });
            Ok(true)
        })?;
        // The next reading need not step over all that was removed.
        if limit > 0 {
            let first = messages.first().map_or(settled, |message| message.id.row.min(settled));
            self.delivered_below.fetch_max(first, Ordering::AcqRel);
        }
        Ok(messages)
    }

    /// Removes messages. Not synced: what a power cut brings back is delivered again.
    pub(crate) fn delivered(&self, ids: impl IntoIterator<Item = MessageId>) -> Result<()> {
        self.write(false, |tx| ids.into_iter().try_for_each(|id| tx.delete_meta_row(&message_name(id))))
    }
}

fn corrupt(detail: &str) -> Error {
    Error::Corrupt { place: "`meta`".to_owned(), detail: detail.to_owned() }
}
