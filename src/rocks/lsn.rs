//! LSN headers in the log. Each write has a number, and records which earlier writes were in the log and which of
//! them were synced when it was made. So the next open can distinguish writes that a power cut may have lost from
//! writes that must be there.
//!
//! ```text
//! header := epoch (varint) | number (varint) | number - written_lsn (varint) | number - durable_lsn (varint)
//! ```
//!
//! A header is log data of its write batch: RocksDB writes it to the log and nowhere else.

use std::sync::atomic::Ordering;

use rocksdb::WriteBatch;

use crate::codec::{Reader, put_varint};
use crate::testing::sync_shim::{AtomicU64, Mutex};

/// Sequence number (8) and count (4), before the first entry of a write batch.
const BATCH_HEADER: usize = 12;

/// The LSN header of one write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LsnHeader {
    /// Identifies the open of the database: the number of the log that began with it.
    epoch: u64,
    /// The writes of an epoch are numbered from 0. Their order in the log may differ.
    number: u64,
    /// Every write numbered below this is before this one in the log.
    written_lsn: u64,
    /// Every write numbered below this was synced before.
    durable_lsn: u64,
}

impl LsnHeader {
    pub(super) fn put(&self, batch: &mut WriteBatch) {
        batch.put_log_data(self.bytes());
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(16);
        for value in [self.epoch, self.number, self.number - self.written_lsn, self.number - self.durable_lsn] {
            put_varint(&mut bytes, value);
        }
        bytes
    }

    fn read(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(bytes);
        let (epoch, number) = (reader.varint()?, reader.varint()?);
        let written_lsn = number.checked_sub(reader.varint()?)?;
        let durable_lsn = number.checked_sub(reader.varint()?)?;
        reader.is_empty().then_some(Self { epoch, number, written_lsn, durable_lsn })
    }
}

/// Passes the LSN headers in a log record to `found`. RocksDB puts concurrent batches into one record. `None` if an
/// entry has a kind that the store never writes.
pub(super) fn read_headers(record: &[u8], mut found: impl FnMut(LsnHeader)) -> Option<()> {
    let mut reader = Reader::new(record);
    reader.take(BATCH_HEADER)?;
    while !reader.is_empty() {
        let (in_family, slices) = match reader.byte()? {
            // An LSN header.
            3 => {
                found(LsnHeader::read(reader.prefixed()?)?);
                (false, 0)
            }
            // A put and a delete; the same in a family that is named; a range delete, and one in a named family.
            1 => (false, 2),
            0 => (false, 1),
            5 => (true, 2),
            4 => (true, 1),
            0xf => (false, 2),
            0xe => (true, 2),
            _ => return None,
        };
        if in_family {
            reader.varint()?;
        }
        for _ in 0..slices {
            reader.prefixed()?;
        }
    }
    Some(())
}

/// Numbers the writes of an epoch and tracks which of them are written and synced.
#[derive(Default)]
pub(super) struct LsnTracker {
    writing: Mutex<Writing>,
    durable_lsn: AtomicU64,
}

#[derive(Default)]
struct Writing {
    epoch: u64,
    next: u64,
    /// Numbers of writes in progress, the lowest first; rarely more than there are threads.
    open: Vec<u64>,
}

impl Writing {
    fn written_lsn(&self) -> u64 {
        self.open.first().copied().unwrap_or(self.next)
    }
}

impl LsnTracker {
    /// Starts an epoch with a new, empty log. Must not run concurrently with writes.
    pub(super) fn begin_epoch(&self, log: u64) {
        *self.writing.lock() = Writing { epoch: log, ..Writing::default() };
        self.durable_lsn.store(0, Ordering::Release);
    }

    /// The LSN header of a write that begins.
    pub(super) fn begin(&self) -> LsnHeader {
        let mut writing = self.writing.lock();
        let number = writing.next;
        writing.next += 1;
        writing.open.push(number);
        let (epoch, written_lsn) = (writing.epoch, writing.written_lsn());
        drop(writing);
        // What is synced was written before.
        let durable_lsn = self.durable_lsn.load(Ordering::Acquire).min(written_lsn);
        LsnHeader { epoch, number, written_lsn, durable_lsn }
    }

    /// It is in the log. A write that failed never is: then nothing more is believed of the log.
    pub(super) fn written(&self, header: &LsnHeader) {
        self.writing.lock().open.retain(|number| *number != header.number);
    }

    /// Every write numbered below the answer is in the log: ask before a sync.
    pub(super) fn written_lsn(&self) -> u64 {
        self.writing.lock().written_lsn()
    }

    /// Every write numbered below `number` is on the disk.
    pub(super) fn synced(&self, number: u64) {
        self.durable_lsn.fetch_max(number, Ordering::AcqRel);
    }
}

/// In a log without a bad place: the first write that was on the disk and should stand between two that are there. `all`
/// are the marks of all logs. Of a log that was `closed`, all was on the disk.
///
/// Other logs may be gone, for logs whose rows are all elsewhere are deleted; RocksDB keeps account of that. But between two
/// writes of one log there is nothing but that log: a write that was begun after the first of them was there, and was there
/// before the second, is missing.
pub(super) fn missing_within(log: u64, headers: &[LsnHeader], all: &[LsnHeader], closed: bool) -> Option<u64> {
    epochs(headers).into_iter().find_map(|epoch| {
        let there_before =
            headers.iter().filter(|header| header.epoch == epoch).map(|header| header.written_lsn).max()?;
        let from = from_which_all_is_there(epoch, log, headers, all)?;
        first_absent(epoch, from, there_before.min(durable_lsn(epoch, all, closed)), all)
    })
}

/// The first write that was on the disk and is not `before` a bad place. `after` stands behind it, and `logs` are the
/// numbers of all logs.
pub(super) fn missing_before(logs: &[u64], before: &[LsnHeader], after: &[LsnHeader]) -> Option<u64> {
    let all = [before, after].concat();
    epochs(&all).into_iter().find_map(|epoch| {
        let log = if logs.contains(&epoch) { epoch } else { 0 };
        first_absent(epoch, from_which_all_is_there(epoch, log, &all, &all)?, durable_lsn(epoch, &all, false), before)
    })
}

fn epochs(headers: &[LsnHeader]) -> Vec<u64> {
    let mut epochs: Vec<u64> = headers.iter().map(|header| header.epoch).collect();
    epochs.dedup();
    epochs
}

/// The log that a life began with has all of it; of another it is not known what stood before its first mark, but what was
/// begun after that one was written stands behind it.
fn from_which_all_is_there(epoch: u64, log: u64, headers: &[LsnHeader], all: &[LsnHeader]) -> Option<u64> {
    if log == epoch {
        return Some(0);
    }
    let first = headers.iter().find(|header| header.epoch == epoch)?;
    let begun_later = all.iter().filter(|header| header.epoch == epoch && header.written_lsn > first.number);
    begun_later.map(|header| header.number).min()
}

/// Below which number every write was on the disk when some write was made.
fn durable_lsn(epoch: u64, headers: &[LsnHeader], closed: bool) -> u64 {
    let of_epoch = headers.iter().filter(|header| header.epoch == epoch);
    of_epoch.map(|header| if closed { u64::MAX } else { header.durable_lsn }).max().unwrap_or_default()
}

/// The first number, of those from `from` on and below `to`, that no mark has.
fn first_absent(epoch: u64, from: u64, to: u64, headers: &[LsnHeader]) -> Option<u64> {
    let of_epoch = headers.iter().filter(|header| header.epoch == epoch && header.number >= from);
    let mut numbers: Vec<u64> = of_epoch.map(|header| header.number).collect();
    numbers.sort_unstable();
    let mut expected = from;
    for number in numbers {
        if number > expected {
            break;
        }
        expected = number.saturating_add(1);
    }
    (expected < to).then_some(expected)
}

/// Whether what stands `after` a bad place says that the place was good: something behind it was on the disk, or the
/// store was opened again since, and an open leaves no bad place.
pub(super) fn proves_synced(before: &[LsnHeader], after: &[LsnHeader]) -> bool {
    let Some(last) = after.last() else { return false };
    let first = before.last().or_else(|| after.first());
    if first.is_some_and(|first| first.epoch != last.epoch) {
        return true;
    }
    let headers = before.iter().chain(after).filter(|header| header.epoch == last.epoch);
    let durable_lsn = headers.map(|header| header.durable_lsn).max().unwrap_or_default();
    after.iter().any(|header| header.number < durable_lsn)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;

    fn lsn(epoch: u64) -> LsnTracker {
        let lsn = LsnTracker::default();
        lsn.begin_epoch(epoch);
        lsn
    }

    /// Marks of writes that were made one after the other, with a sync behind each that is named.
    fn one_by_one(count: u64, synced: &[u64]) -> Vec<LsnHeader> {
        let lsn = lsn(7);
        (0..count)
            .map(|number| {
                let header = lsn.begin();
                lsn.written(&header);
                if synced.contains(&number) {
                    lsn.synced(lsn.written_lsn());
                }
                header
            })
            .collect()
    }

    fn missing(before: &[LsnHeader], after: &[LsnHeader]) -> Option<u64> {
        if after.is_empty() { missing_within(8, before, before, false) } else { missing_before(&[8], before, after) }
    }

    proptest! {
        #![proptest_config(ProptestConfig { rng_seed: RngSeed::Fixed(1), ..ProptestConfig::default() })]

        #[test]
        fn a_mark_comes_back_from_among_other_entries(epoch: u64, number: u64, back in 0_u64..1_000, more in 0_u64..1_000) {
            let written_lsn = number.saturating_sub(back);
            let header = LsnHeader { epoch, number, written_lsn, durable_lsn: written_lsn.saturating_sub(more) };
            let mut batch = WriteBatch::default();
            batch.put(b"key", vec![3; 300]);
            batch.delete(b"key");
            batch.delete_range(b"a", b"b");
            header.put(&mut batch);
            let mut found = Vec::new();
            prop_assert_eq!(read_headers(batch.data(), |header| found.push(header)), Some(()));
            prop_assert_eq!(found, [header]);
        }

        #[test]
        fn any_bytes_are_read_without_harm(bytes: Vec<u8>, numbers: Vec<(u64, u64, u64)>) {
            let _ = read_headers(&bytes, drop);
            let header = |(number, written, synced): (u64, u64, u64)| {
                let written_lsn = number.min(written);
                LsnHeader { epoch: synced % 2, number, written_lsn, durable_lsn: written_lsn.min(synced) }
            };
            let headers: Vec<LsnHeader> = numbers.into_iter().map(header).collect();
            let (before, after) = headers.split_at(headers.len() / 2);
            for closed in [false, true] {
                let _ = missing_within(0, before, &headers, closed);
            }
            let _ = (missing_before(&[0], before, after), proves_synced(before, after));
        }
    }

    #[test]
    fn a_mark_is_what_the_format_says() {
        let header = LsnHeader { epoch: 300, number: 5, written_lsn: 4, durable_lsn: 2 };
        assert_eq!(header.bytes(), [0xac, 0x02, 5, 1, 3]);
        assert_eq!(LsnHeader::read(&[0xac, 0x02, 5, 6, 3]), None, "before the first write");
        assert_eq!(LsnHeader::read(&[0xac, 0x02, 5, 1, 3, 0]), None, "too long");
    }

    #[test]
    fn what_was_synced_must_be_there_and_what_was_not_may_be_missing() {
        let headers = one_by_one(10, &[5]);
        assert_eq!(missing(&headers, &[]), None);
        // The second write may have begun before the first one was written, in a log that is missing now.
        for gap in 2..10 {
            let without: Vec<LsnHeader> = headers.iter().copied().filter(|header| header.number != gap).collect();
            assert_eq!(missing(&without, &[]), (gap <= 5).then_some(gap), "without {gap}");
            let (before, after) = headers.split_at(gap as usize);
            // The corrupt record is that of the header at `gap`.
            let is_damage = missing(before, &after[1..]).is_some() || proves_synced(before, &after[1..]);
            // Nothing behind it says how far the log was synced when the last of its writes was made.
            assert_eq!(is_damage, gap <= 5, "bad at {gap}");
        }
        for len in 0..10 {
            let end = &headers[..len];
            assert_eq!((missing(end, &[]), proves_synced(end, &[])), (None, false), "an end after {len}");
        }
    }

    #[test]
    fn of_a_closed_log_all_must_be_there() {
        let headers = one_by_one(10, &[]);
        let without: Vec<LsnHeader> = headers.iter().copied().filter(|header| header.number != 7).collect();
        assert_eq!(missing_within(8, &without, &without, true), Some(7));
        assert_eq!(missing_within(8, &headers, &headers, true), None);
    }

    #[test]
    fn what_came_before_the_oldest_log_is_not_asked_for() {
        let headers = one_by_one(10, &[8]);
        for first in 1..10 {
            assert_eq!(missing(&headers[first..], &[]), None, "from {first} on");
        }
        // Number 3 was on its way to the older log while 4 began this one.
        let lsn = lsn(7);
        let writes: Vec<LsnHeader> = (0..5).map(|_| lsn.begin()).collect();
        writes.iter().for_each(|header| lsn.written(header));
        lsn.synced(lsn.written_lsn());
        let log = [writes[4], lsn.begin()];
        assert_eq!(missing(&log, &[]), None);
    }

    #[test]
    fn a_log_between_two_others_may_be_gone() {
        let headers = one_by_one(9, &[7]);
        let (oldest, newest) = (&headers[..3], &headers[6..]);
        let all = [oldest, newest].concat();
        for (log, headers) in [(7, oldest), (9, newest)] {
            assert_eq!(missing_within(log, headers, &all, false), None);
        }
        let gap: Vec<LsnHeader> = newest.iter().copied().filter(|header| header.number != 7).collect();
        let all = [oldest, &gap].concat();
        assert_eq!(missing_within(9, &gap, &all, false), None, "the second of its log");
        let headers = one_by_one(12, &[10]);
        let newest: Vec<LsnHeader> = headers[6..].iter().copied().filter(|header| header.number != 9).collect();
        assert_eq!(missing_within(9, &newest, &newest, false), Some(9));
    }

    #[test]
    fn of_the_log_that_a_life_began_with_the_first_writes_must_be_there() {
        let headers = one_by_one(10, &[8]);
        for first in 1..10 {
            let missing = missing_within(7, &headers[first..], &headers[first..], false);
            assert_eq!(missing, Some(0), "from {first} on");
            let missing = missing_before(&[6, 7], &headers[..1], &headers[first..]);
            assert_eq!(missing, Some(1), "bad between the first and {first}");
        }
        assert_eq!(missing_within(7, &headers, &headers, false), None);
    }

    #[test]
    fn a_write_that_is_on_its_way_is_not_taken_for_synced() {
        let lsn = lsn(7);
        let (slow, quick) = (lsn.begin(), lsn.begin());
        lsn.written(&quick);
        lsn.synced(lsn.written_lsn());
        let next = lsn.begin();
        assert_eq!((next.written_lsn, next.durable_lsn), (slow.number, slow.number));
        lsn.written(&slow);
        lsn.synced(lsn.written_lsn());
        let last = lsn.begin();
        assert_eq!((last.written_lsn, last.durable_lsn), (next.number, next.number));
    }

    #[test]
    fn a_bad_place_before_a_later_life_is_damage() {
        let (earlier, later) = (one_by_one(3, &[]), lsn(8).begin());
        assert!(proves_synced(&earlier, &[later]));
        assert!(!proves_synced(&earlier[..1], &earlier[2..]));
        assert_eq!(missing(&[&earlier[..], &[later]].concat(), &[]), None, "each life has numbers of its own");
    }
}
