//! What completions took along: offsets are read, messages are read and removed.

use std::sync::atomic::Ordering;

use super::core::Engine;
use super::request::admit_bytes;
use super::side_writes::{message_id, message_name, offset_name};
use onlyonce_core::{Error, Message, MessageId, NewMessage, Result};

impl Engine {
    /// How far a partition was read. As durable as a completion, once it is answered: somebody may commit it elsewhere.
    pub(crate) fn offset(&self, stream: &[u8], partition: u32) -> Result<Option<u64>> {
        self.ready()?;
        let Some(value) = self.db.meta(&offset_name(stream, partition))? else { return Ok(None) };
        if self.config.sync_results() {
            // Nothing but the sync, shared with whoever waits for one.
            self.write(true, |_| Ok(()))?;
        }
        match value.try_into() {
            Ok(offset) => Ok(Some(u64::from_le_bytes(offset))),
            Err(_) => Err(corrupt("an offset has another length than 8")),
        }
    }

    /// Notes how far a partition was read, with no completion.
    pub(crate) fn set_offset(&self, stream: &[u8], partition: u32, offset: u64) -> Result<()> {
        let name = offset_name(stream, partition);
        admit_bytes(name.len())?;
        self.write(self.config.sync_results(), |tx| tx.put_meta(&name, &offset.to_le_bytes()))?;
        self.count_log(name.len());
        Ok(())
    }

    /// The first messages that are not removed and whose completion counts.
    pub(crate) fn outbox(&self, limit: usize) -> Result<Vec<Message>> {
        self.ready()?;
        self.reserve(0)?;
        // Rows below this one are written, and so are their messages: what is not found there never will be.
        let finished = self.memtable.records().finished_below(|| self.sequence.take());
        let from = message_name(MessageId::new(self.delivered_below.load(Ordering::Acquire), 0));
        let mut messages = Vec::new();
        self.db.for_each_meta(&from, |name, value| {
            let Some(id) = message_id(name).filter(|_| messages.len() < limit) else { return Ok(false) };
            // It is written, and may not be synced: a power cut could take it, and the work would be done again.
            if !self.memtable.records().is_finished(id.record()) {
                return Ok(true);
            }
            let Some(message) = NewMessage::decode(value) else {
                return Err(corrupt(&format!("message {id} of the outbox is truncated")));
            };
            messages.push(Message::new(id, message));
            Ok(true)
        })?;
        // The next reading need not step over all that was removed.
        if limit > 0 {
            let first = messages.first().map_or(finished, |message| message.id.record().min(finished));
            self.delivered_below.fetch_max(first, Ordering::AcqRel);
        }
        Ok(messages)
    }

    /// Removes messages. Not synced: what a power cut brings back is delivered again.
    pub(crate) fn remove_messages(&self, ids: impl IntoIterator<Item = MessageId>) -> Result<()> {
        let mut bytes = 0;
        self.write(false, |tx| {
            ids.into_iter().try_for_each(|id| {
                let name = message_name(id);
                bytes += name.len();
                tx.delete_meta(&name)
            })
        })?;
        self.count_log(bytes);
        Ok(())
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
    fn offsets_and_removals_count_for_the_log_that_is_to_be_cut() {
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory::acquire(&dir.path().join("store"), Duration::ZERO).unwrap();
        let engine = Engine::open(directory, &Options::default()).unwrap();
        let counted = || engine.log_bytes.load(Ordering::Relaxed) as usize;
        engine.set_offset(b"stream", 3, 7).unwrap();
        let offset = offset_name(b"stream", 3).len();
        assert_eq!(counted(), offset);
        let ids = [1, 2].map(|index| MessageId::new(1, index));
        engine.remove_messages(ids).unwrap();
        assert_eq!(counted(), offset + ids.map(|id| message_name(id).len()).iter().sum::<usize>());
    }

    #[test]
    fn a_message_comes_up_when_its_completion_counts_and_not_when_it_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory::acquire(&dir.path().join("store"), Duration::ZERO).unwrap();
        let engine = Engine::open(directory, &Options::default()).unwrap();
        let completion = onlyonce_core::Completion::new("").message("topic", "key", "payload");
        let side_writes = completion.side_writes().unwrap();
        let early = engine.begin_record();
        let open = engine.begin_record();
        for record in [&open, &early] {
            engine.write(false, |tx| side_writes::put(tx, record.number(), &[(side_writes, true)])).unwrap();
        }
        assert!(engine.outbox(10).unwrap().is_empty(), "they may not be synced");
        let (first, second) = (early.number(), open.number());
        open.finish();
        assert_eq!(engine.outbox(10).unwrap().iter().map(|it| it.id.record()).collect::<Vec<_>>(), [second]);
        early.finish();
        assert_eq!(engine.outbox(10).unwrap().iter().map(|it| it.id.record()).collect::<Vec<_>>(), [first, second]);
        engine.remove_messages([MessageId::new(first, 0)]).unwrap();
        assert_eq!(engine.outbox(10).unwrap().len(), 1);
        let begins = engine.delivered_below.load(Ordering::Acquire);
        assert_eq!(begins, second, "the next reading need not step over the first");
    }
}
