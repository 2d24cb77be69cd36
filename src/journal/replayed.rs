//! A replay of the journal: what its records found.

use std::collections::HashMap;

use crate::codec::{Item, read_record};
use onlyonce_core::machine::{CompletedEntry, Event, Holder, OwnWindow, Processing};
use onlyonce_core::{Error, Fingerprint, Result};

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

/// A replay of the journal.
#[derive(Debug, Default)]
pub(crate) struct Replay {
    pub(crate) totals: Totals,
    /// The claims that were not completed yet, by their tokens: completions refer to them.
    claims: HashMap<u64, Claim>,
}

/// What a completion has from its claim.
#[derive(Debug)]
struct Claim {
    key: Box<[u8]>,
    fingerprint: Option<Fingerprint>,
    own_window: OwnWindow,
}

impl Replay {
    /// Reads a record, and passes its events to `apply`. The record of a checkpoint has no number.
    pub(crate) fn add(
        &mut self,
        number: Option<u64>,
        record: &[u8],
        mut apply: impl FnMut(&[u8], Event<&[u8]>),
    ) -> Result<()> {
        // On stream time a key may be newer than its record.
        let mut newest_ms = 0;
        let claims = &mut self.claims;
        let read = read_record(record, |item| match item {
            Item::Event(key, event) => {
                newest_ms = newest_ms.max(event.time_ms());
                if let Event::Claimed(Processing {
                    token,
                    fingerprint,
                    own_window,
                    holder: Holder::Leased { .. },
                    ..
                }) = event
                {
                    claims.insert(token, Claim { key: key.into(), fingerprint, own_window });
                }
                apply(key, event);
            }
            Item::ClaimCompleted { token, completed_ms, result } => {
                newest_ms = newest_ms.max(completed_ms);
                // The claim is missing if a checkpoint has replaced it. Then the completion is in a bucket: a checkpoint has the
                // claims of all keys that a flush has left in the memtable.
                if let Some(Claim { key, fingerprint, own_window }) = claims.remove(&token) {
                    apply(
                        &key,
                        Event::Completed(CompletedEntry { token, completed_ms, fingerprint, own_window, result }),
                    );
                }
            }
        });
        let time_ms = read.ok_or_else(|| Error::Corrupt {
            place: "the journal".to_owned(),
            detail: format!("record {} has an unknown form", number.unwrap_or_default()),
        })?;
        let totals = &mut self.totals;
        totals.records += 1;
        totals.time_ms = totals.time_ms.max(time_ms).max(newest_ms);
        totals.oldest_ms = Some(totals.oldest_ms.map_or(time_ms, |oldest_ms| oldest_ms.min(time_ms)));
        totals.last_number = totals.last_number.max(number.unwrap_or_default());
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
        let (mut replay, mut events) = (Replay::default(), 0);
        // On stream time a record may be older than its keys, and than the record before it.
        for (number, record_ms, completed_ms) in [(Some(4), 500, 900), (Some(7), 700, 600), (None, 100, 100)] {
            let mut record = RecordWriter::new(RecordKind::Completed, record_ms, 0);
            record.completed(b"k", &completed(completed_ms));
            let record = record.finish();
            let apply = |key: &[u8], event: Event<&[u8]>| {
                assert!(key == b"k" && matches!(event, Event::Completed(_)));
                events += 1;
            };
            replay.add(number, &record, apply).unwrap();
        }
        let totals = replay.totals;
        assert_eq!((events, totals.records), (3, 3));
        assert_eq!((totals.time_ms, totals.oldest_ms, totals.last_number), (900, Some(100), 7));
        assert!(matches!(replay.add(None, b"unknown", |_, _| {}), Err(Error::Corrupt { .. })));
    }

    #[test]
    fn a_completion_has_the_key_the_payload_and_the_window_of_its_claim() {
        let own_window = OwnWindow::from_ms(400).unwrap();
        let claim = |token| Processing {
            token,
            attempt: 1,
            since_ms: 90,
            fingerprint: Some([7; 16]),
            own_window,
            holder: Holder::Leased { until_monotonic_ms: 0 },
        };
        let done = |token| CompletedEntry {
            token,
            completed_ms: 100,
            fingerprint: Some([7; 16]),
            own_window,
            result: StoredResult::Bytes(&b"r"[..]),
        };
        let record = |kind, events: &[(&[u8], Event<&[u8]>)]| {
            let mut record = RecordWriter::new(kind, 100, 0);
            events.iter().for_each(|(key, event)| record.event(key, event));
            record.finish()
        };
        let claimed =
            record(RecordKind::Claimed, &[(b"a", Event::Claimed(claim(1))), (b"b", Event::Claimed(claim(2)))]);
        // The claim with token 3 was replaced by a checkpoint.
        let completed = record(
            RecordKind::Completed,
            &[2, 3, 1].map(|token| (&b"not stored"[..], Event::ClaimCompleted(done(token)))),
        );
        let (mut replay, mut keys) = (Replay::default(), Vec::new());
        replay.add(Some(1), &claimed, |_, _| {}).unwrap();
        let apply = |key: &[u8], event: Event<&[u8]>| keys.push((key.to_vec(), event.shared()));
        replay.add(Some(2), &completed, apply).unwrap();
        let expected =
            [(b"b".to_vec(), 2), (b"a".to_vec(), 1)].map(|(key, token)| (key, Event::Completed(done(token)).shared()));
        assert_eq!(keys, expected);
    }
}
