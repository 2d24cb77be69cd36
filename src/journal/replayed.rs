//! What a replay of the journal found.

use crate::codec::read_record;
use onlyonce_core::machine::Event;
use onlyonce_core::{Error, Result};

/// Totals of a replay.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Totals {
    pub(crate) records: u64,
    /// The bytes of all transactions, also of those without keys.
    pub(crate) bytes: u64,
    /// The newest time of all records and keys.
    pub(crate) time_ms: u64,
    /// The time of the oldest record.
    pub(crate) oldest_ms: Option<u64>,
    /// The highest record number.
    pub(crate) last_number: u64,
}

impl Totals {
    /// Reads a record, and passes its events to `apply`. The records of a checkpoint have no number.
    pub(crate) fn add(
        &mut self,
        number: Option<u64>,
        record: &[u8],
        mut apply: impl FnMut(&[u8], Event<&[u8]>),
    ) -> Result<()> {
        // On stream time a key may be newer than its record.
        let mut newest_ms = 0;
        let read = read_record(record, |key, event| {
            newest_ms = newest_ms.max(event.time_ms());
            apply(key, event);
        });
        let time_ms = read.ok_or_else(|| Error::Corrupt {
            place: "the journal".to_owned(),
            detail: format!("record {} has an unknown form", number.unwrap_or_default()),
        })?;
        self.records += 1;
        self.time_ms = self.time_ms.max(time_ms).max(newest_ms);
        self.oldest_ms = Some(self.oldest_ms.map_or(time_ms, |oldest_ms| oldest_ms.min(time_ms)));
        self.last_number = self.last_number.max(number.unwrap_or_default());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{RecordKind, RecordWriter};
    use onlyonce_core::StoredResult;
    use onlyonce_core::machine::{CompletedEntry, OwnWindow};

    #[test]
    fn a_replay_reports_the_totals_and_the_newest_time_of_its_records() {
        let completed = |completed_ms| CompletedEntry {
            token: 1,
            completed_ms,
            own_window: OwnWindow::NONE,
            fingerprint: None,
            result: StoredResult::None,
        };
        let (mut totals, mut events) = (Totals::default(), 0);
        // On stream time a record may be older than its keys, and than the record before it.
        for (number, record_ms, completed_ms) in [(Some(4), 500, 900), (Some(7), 700, 600), (None, 100, 100)] {
            let mut record = RecordWriter::new(RecordKind::Completed, record_ms, 0);
            record.completed(b"k", &completed(completed_ms));
            let record = record.finish();
            let apply = |key: &[u8], event: Event<&[u8]>| {
                assert!(key == b"k" && matches!(event, Event::Completed(_)));
                events += 1;
            };
            totals.add(number, &record, apply).unwrap();
        }
        assert_eq!((events, totals.records), (3, 3));
        assert_eq!((totals.time_ms, totals.oldest_ms, totals.last_number), (900, Some(100), 7));
        assert!(matches!(totals.add(None, b"unknown", |_, _| {}), Err(Error::Corrupt { .. })));
    }
}
