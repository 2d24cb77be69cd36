//! Offsets and the outbox: reading what completions stored, and removing messages.
//!
//! A message is returned only once its completion is durable. Otherwise a message could be delivered whose work a power cut
//! takes back and the next attempt repeats.

use std::sync::atomic::Ordering;

use super::backpressure::Demand;
use super::core::Engine;
use super::side_writes::{message_id, message_name, offset_name};
use onlyonce_core::{Error, Message, MessageId, NewMessage, Result};

impl Engine {
    /// Returns a partition's offset. Under `Durability::Disk` it is synced first: the caller may commit it to the broker.
    pub(crate) fn offset(&self, stream: &[u8], partition: u32) -> Result<Option<u64>> {
        self.health.ready()?;
        let Some(value) = self.tables.db.meta(&offset_name(stream, partition))? else { return Ok(None) };
        if self.config.sync_results() {
            // An empty write joins the next sync.
            self.writer.write(true, |_| ())?;
        }
        match value.try_into() {
            Ok(offset) => Ok(Some(u64::from_le_bytes(offset))),
            Err(_) => Err(corrupt("an offset is not 8 bytes long")),
        }
    }

    /// Stores a partition's offset without a completion.
    pub(crate) fn set_offset(&self, stream: &[u8], partition: u32, offset: u64) -> Result<()> {
        let name = offset_name(stream, partition);
        self.admit(Demand { items: 1, bytes: name.len(), changes_database: true, ..Demand::default() })?;
        self.writer.write(self.config.sync_results(), |tx| tx.put_meta(&name, &offset.to_le_bytes()))
    }

    /// Returns the oldest messages that are not removed and whose completion is durable.
    pub(crate) fn outbox(&self, limit: usize) -> Result<Vec<Message>> {
        self.health.ready()?;
        self.writer.reserve_tokens(0)?;
        // Records below this number are written with their messages, so no message can appear there any more.
        let finished = self.tables.memtable.records().finished_below(|| self.writer.sequence.take());
        let from = message_name(MessageId::new(self.delivered_below.load(Ordering::Acquire), 0));
        let mut messages = Vec::new();
        self.tables.db.for_each_meta(&from, |name, value| {
            let Some(id) = message_id(name).filter(|_| messages.len() < limit) else { return Ok(false) };
            // The message is written, but its record may not be synced yet.
            if !self.tables.memtable.records().is_finished(id.record()) {
                return Ok(true);
            }
            let Some(message) = NewMessage::decode(value) else {
                return Err(corrupt(&format!("message {id} of the outbox is truncated")));
            };
            messages.push(Message::new(id, message));
            Ok(true)
        })?;
        // The next read skips the tombstones of removed messages.
        if limit > 0 {
            let first = messages.first().map_or(finished, |message| message.id.record().min(finished));
            self.delivered_below.fetch_max(first, Ordering::AcqRel);
        }
        Ok(messages)
    }

    /// Removes messages. Not synced: a message that a power cut brings back is delivered again.
    pub(crate) fn remove_messages(&self, ids: impl IntoIterator<Item = MessageId>) -> Result<()> {
        let ids: Vec<MessageId> = ids.into_iter().collect();
        self.admit(Demand { items: ids.len(), changes_database: true, ..Demand::default() })?;
        self.writer.write(false, |tx| ids.into_iter().for_each(|id| tx.delete_meta(&message_name(id))))
    }
}

fn corrupt(detail: &str) -> Error {
    Error::Corrupt { place: "`meta`".to_owned(), detail: detail.to_owned() }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::side_writes;
    use super::*;
    use crate::config::Options;
    use crate::fs::directory::Directory;

    #[test]
    fn a_message_is_visible_once_its_completion_is_durable() {
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory::acquire(&dir.path().join("store"), Duration::ZERO).unwrap();
        let engine = Engine::open(directory, &Options::default()).unwrap();
        let completion = onlyonce_core::Completion::new("").message("topic", "key", "payload");
        let side_writes = completion.side_writes().unwrap();
        let early = engine.begin_record();
        let open = engine.begin_record();
        for record in [&open, &early] {
            engine.writer.write(false, |tx| side_writes::put(tx, record.number(), &[(side_writes, true)])).unwrap();
        }
        assert!(engine.outbox(10).unwrap().is_empty(), "their records may not be synced");
        let (first, second) = (early.number(), open.number());
        open.finish();
        assert_eq!(engine.outbox(10).unwrap().iter().map(|it| it.id.record()).collect::<Vec<_>>(), [second]);
        early.finish();
        assert_eq!(engine.outbox(10).unwrap().iter().map(|it| it.id.record()).collect::<Vec<_>>(), [first, second]);
        engine.remove_messages([MessageId::new(first, 0)]).unwrap();
        assert_eq!(engine.outbox(10).unwrap().len(), 1);
        let begins = engine.delivered_below.load(Ordering::Acquire);
        assert_eq!(begins, second, "the next read starts after the removed message");
    }
}
