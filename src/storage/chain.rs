//! What the log says of itself. Each write to it has a number, and says which of the writes before it were in the log when
//! it was made, and which of those were on the disk. So the next open can tell what a power cut may have taken from what
//! must be there, wherever in the log it is missing.
//!
//! ```text
//! mark := life (varint) | number (varint) | number - written below (varint) | number - synced below (varint)
//! ```
//!
//! A mark lies in its write batch as log data, which RocksDB writes to the log and nowhere else.

use std::sync::atomic::Ordering;

use rocksdb::WriteBatch;

use crate::codec::{Reader, put_varint};
use crate::concurrency::{AtomicU64, Mutex};

/// Sequence number (8) and count (4), before the first entry of a write batch.
const BATCH_HEADER: usize = 12;

/// What one write says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mark {
    /// The opening of the database in which it was made: the number of the log that was new then.
    life: u64,
    /// The writes of a life are numbered from 0, and may come to the log in another order.
    number: u64,
    /// Every write numbered below this one stands before this one in the log.
    written_below: u64,
    /// Every write numbered below this one was on the disk before.
    synced_below: u64,
}

impl Mark {
    pub(super) fn put(&self, batch: &mut WriteBatch) {
        batch.put_log_data(self.bytes());
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(16);
        for value in [self.life, self.number, self.number - self.written_below, self.number - self.synced_below] {
            put_varint(&mut bytes, value);
        }
        bytes
    }

    fn read(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(bytes);
        let (life, number) = (reader.varint()?, reader.varint()?);
        let written_below = number.checked_sub(reader.varint()?)?;
        let synced_below = number.checked_sub(reader.varint()?)?;
        reader.is_empty().then_some(Self { life, number, written_below, synced_below })
    }
}

/// Hands out the marks of the batches in a record of the log: RocksDB makes one record of what threads write at the same
/// time. `None` where an entry is of no kind that we write.
pub(super) fn read_marks(record: &[u8], mut found: impl FnMut(Mark)) -> Option<()> {
    let mut reader = Reader::new(record);
    reader.take(BATCH_HEADER)?;
    while !reader.is_empty() {
        let (in_family, slices) = match reader.byte()? {
            // A mark.
            3 => {
                found(Mark::read(reader.prefixed()?)?);
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

/// Numbers the writes of a life.
#[derive(Default)]
pub(super) struct Chain {
    writing: Mutex<Writing>,
    synced_below: AtomicU64,
}

#[derive(Default)]
struct Writing {
    life: u64,
    next: u64,
    /// Numbers of writes that are on their way, the lowest first; seldom more than there are threads.
    open: Vec<u64>,
}

impl Writing {
    fn written_below(&self) -> u64 {
        self.open.first().copied().unwrap_or(self.next)
    }
}

impl Chain {
    /// Numbers from 0 on, in a log that nothing was written to. Call it while nobody writes, and before anybody relies on
    /// what is going to be written.
    pub(super) fn begin_life(&self, log: u64) {
        *self.writing.lock() = Writing { life: log, ..Writing::default() };
        self.synced_below.store(0, Ordering::Release);
    }

    /// The mark of a write that is about to be made.
    pub(super) fn begin(&self) -> Mark {
        let mut writing = self.writing.lock();
        let number = writing.next;
        writing.next += 1;
        writing.open.push(number);
        let (life, written_below) = (writing.life, writing.written_below());
        drop(writing);
        // What is synced was written before.
        let synced_below = self.synced_below.load(Ordering::Acquire).min(written_below);
        Mark { life, number, written_below, synced_below }
    }

    /// It is in the log. A write that failed never is: then nothing more is believed of the log.
    pub(super) fn written(&self, mark: &Mark) {
        self.writing.lock().open.retain(|number| *number != mark.number);
    }

    /// Every write numbered below the answer is in the log: ask before a sync.
    pub(super) fn written_below(&self) -> u64 {
        self.writing.lock().written_below()
    }

    /// Every write numbered below `number` is on the disk.
    pub(super) fn synced(&self, number: u64) {
        self.synced_below.fetch_max(number, Ordering::AcqRel);
    }
}

/// In a log without a bad place: the first write that was on the disk and should stand between two that are there. `all`
/// are the marks of all logs. Of a log that was `closed`, all was on the disk.
///
/// Other logs may be gone, for logs whose rows are all elsewhere are deleted; RocksDB keeps account of that. But between two
/// writes of one log there is nothing but that log: a write that was begun after the first of them was there, and was there
/// before the second, is missing.
pub(super) fn missing_within(log: u64, marks: &[Mark], all: &[Mark], closed: bool) -> Option<u64> {
    lives(marks).into_iter().find_map(|life| {
        let there_before = marks.iter().filter(|mark| mark.life == life).map(|mark| mark.written_below).max()?;
        let from = from_which_all_is_there(life, log, marks, all)?;
        first_absent(life, from, there_before.min(synced_below(life, all, closed)), all)
    })
}

/// The first write that was on the disk and is not `before` a bad place. `behind` stands behind it, and `logs` are the
/// numbers of all logs.
pub(super) fn missing_before(logs: &[u64], before: &[Mark], behind: &[Mark]) -> Option<u64> {
    let all = [before, behind].concat();
    lives(&all).into_iter().find_map(|life| {
        let log = if logs.contains(&life) { life } else { 0 };
        first_absent(life, from_which_all_is_there(life, log, &all, &all)?, synced_below(life, &all, false), before)
    })
}

fn lives(marks: &[Mark]) -> Vec<u64> {
    let mut lives: Vec<u64> = marks.iter().map(|mark| mark.life).collect();
    lives.dedup();
    lives
}

/// The log that a life began with has all of it; of another it is not known what stood before its first mark, but what was
/// begun after that one was written stands behind it.
fn from_which_all_is_there(life: u64, log: u64, marks: &[Mark], all: &[Mark]) -> Option<u64> {
    if log == life {
        return Some(0);
    }
    let first = marks.iter().find(|mark| mark.life == life)?;
    let begun_later = all.iter().filter(|mark| mark.life == life && mark.written_below > first.number);
    begun_later.map(|mark| mark.number).min()
}

/// Below which number every write was on the disk when some write was made.
fn synced_below(life: u64, marks: &[Mark], closed: bool) -> u64 {
    let of_life = marks.iter().filter(|mark| mark.life == life);
    of_life.map(|mark| if closed { u64::MAX } else { mark.synced_below }).max().unwrap_or_default()
}

/// The first number, of those from `from` on and below `to`, that no mark has.
fn first_absent(life: u64, from: u64, to: u64, marks: &[Mark]) -> Option<u64> {
    let of_life = marks.iter().filter(|mark| mark.life == life && mark.number >= from);
    let mut numbers: Vec<u64> = of_life.map(|mark| mark.number).collect();
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

/// Whether what stands `behind` a bad place says that the place was good: something behind it was on the disk, or the
/// store was opened again since, and an open leaves no bad place.
pub(super) fn vouched(before: &[Mark], behind: &[Mark]) -> bool {
    let Some(last) = behind.last() else { return false };
    let first = before.last().or_else(|| behind.first());
    if first.is_some_and(|first| first.life != last.life) {
        return true;
    }
    let marks = before.iter().chain(behind).filter(|mark| mark.life == last.life);
    let synced_below = marks.map(|mark| mark.synced_below).max().unwrap_or_default();
    behind.iter().any(|mark| mark.number < synced_below)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;

    fn chain(life: u64) -> Chain {
        let chain = Chain::default();
        chain.begin_life(life);
        chain
    }

    /// Marks of writes that were made one after the other, with a sync behind each that is named.
    fn one_by_one(count: u64, synced: &[u64]) -> Vec<Mark> {
        let chain = chain(7);
        (0..count)
            .map(|number| {
                let mark = chain.begin();
                chain.written(&mark);
                if synced.contains(&number) {
                    chain.synced(chain.written_below());
                }
                mark
            })
            .collect()
    }

    fn missing(before: &[Mark], behind: &[Mark]) -> Option<u64> {
        if behind.is_empty() { missing_within(8, before, before, false) } else { missing_before(&[8], before, behind) }
    }

    proptest! {
        #![proptest_config(ProptestConfig { rng_seed: RngSeed::Fixed(1), ..ProptestConfig::default() })]

        #[test]
        fn a_mark_comes_back_from_among_other_entries(life: u64, number: u64, back in 0_u64..1_000, more in 0_u64..1_000) {
            let written_below = number.saturating_sub(back);
            let mark = Mark { life, number, written_below, synced_below: written_below.saturating_sub(more) };
            let mut batch = WriteBatch::default();
            batch.put(b"key", vec![3; 300]);
            batch.delete(b"key");
            batch.delete_range(b"a", b"b");
            mark.put(&mut batch);
            let mut found = Vec::new();
            prop_assert_eq!(read_marks(batch.data(), |mark| found.push(mark)), Some(()));
            prop_assert_eq!(found, [mark]);
        }

        #[test]
        fn any_bytes_are_read_without_harm(bytes: Vec<u8>, numbers: Vec<(u64, u64, u64)>) {
            let _ = read_marks(&bytes, drop);
            let mark = |(number, written, synced): (u64, u64, u64)| {
                let written_below = number.min(written);
                Mark { life: synced % 2, number, written_below, synced_below: written_below.min(synced) }
            };
            let marks: Vec<Mark> = numbers.into_iter().map(mark).collect();
            let (before, behind) = marks.split_at(marks.len() / 2);
            for closed in [false, true] {
                let _ = missing_within(0, before, &marks, closed);
            }
            let _ = (missing_before(&[0], before, behind), vouched(before, behind));
        }
    }

    #[test]
    fn a_mark_is_what_the_format_says() {
        let mark = Mark { life: 300, number: 5, written_below: 4, synced_below: 2 };
        assert_eq!(mark.bytes(), [0xac, 0x02, 5, 1, 3]);
        assert_eq!(Mark::read(&[0xac, 0x02, 5, 6, 3]), None, "before the first write");
        assert_eq!(Mark::read(&[0xac, 0x02, 5, 1, 3, 0]), None, "too long");
    }

    #[test]
    fn what_was_synced_must_be_there_and_what_was_not_may_be_missing() {
        let marks = one_by_one(10, &[5]);
        assert_eq!(missing(&marks, &[]), None);
        // Of the second write nobody knows whether it was begun before the first was written, in a log that is gone.
        for gap in 2..10 {
            let without: Vec<Mark> = marks.iter().copied().filter(|mark| mark.number != gap).collect();
            assert_eq!(missing(&without, &[]), (gap <= 5).then_some(gap), "without {gap}");
            let (before, behind) = marks.split_at(gap as usize);
            // What the bad place has taken is the mark at `gap`.
            let is_damage = missing(before, &behind[1..]).is_some() || vouched(before, &behind[1..]);
            // Nothing behind it says how far the log was synced when the last of its writes was made.
            assert_eq!(is_damage, gap <= 5, "bad at {gap}");
        }
        for len in 0..10 {
            let end = &marks[..len];
            assert_eq!((missing(end, &[]), vouched(end, &[])), (None, false), "an end after {len}");
        }
    }

    #[test]
    fn of_a_closed_log_all_must_be_there() {
        let marks = one_by_one(10, &[]);
        let without: Vec<Mark> = marks.iter().copied().filter(|mark| mark.number != 7).collect();
        assert_eq!(missing_within(8, &without, &without, true), Some(7));
        assert_eq!(missing_within(8, &marks, &marks, true), None);
    }

    #[test]
    fn what_came_before_the_oldest_log_is_not_asked_for() {
        let marks = one_by_one(10, &[8]);
        for first in 1..10 {
            assert_eq!(missing(&marks[first..], &[]), None, "from {first} on");
        }
        // Number 3 was on its way to the older log while 4 began this one.
        let chain = chain(7);
        let writes: Vec<Mark> = (0..5).map(|_| chain.begin()).collect();
        writes.iter().for_each(|mark| chain.written(mark));
        chain.synced(chain.written_below());
        let log = [writes[4], chain.begin()];
        assert_eq!(missing(&log, &[]), None);
    }

    #[test]
    fn a_log_between_two_others_may_be_gone() {
        let marks = one_by_one(9, &[7]);
        let (oldest, newest) = (&marks[..3], &marks[6..]);
        let all = [oldest, newest].concat();
        for (log, marks) in [(7, oldest), (9, newest)] {
            assert_eq!(missing_within(log, marks, &all, false), None);
        }
        let gap: Vec<Mark> = newest.iter().copied().filter(|mark| mark.number != 7).collect();
        let all = [oldest, &gap].concat();
        assert_eq!(missing_within(9, &gap, &all, false), None, "the second of its log");
        let marks = one_by_one(12, &[10]);
        let newest: Vec<Mark> = marks[6..].iter().copied().filter(|mark| mark.number != 9).collect();
        assert_eq!(missing_within(9, &newest, &newest, false), Some(9));
    }

    #[test]
    fn of_the_log_that_a_life_began_with_the_first_writes_must_be_there() {
        let marks = one_by_one(10, &[8]);
        for first in 1..10 {
            let missing = missing_within(7, &marks[first..], &marks[first..], false);
            assert_eq!(missing, Some(0), "from {first} on");
            let missing = missing_before(&[6, 7], &marks[..1], &marks[first..]);
            assert_eq!(missing, Some(1), "bad between the first and {first}");
        }
        assert_eq!(missing_within(7, &marks, &marks, false), None);
    }

    #[test]
    fn a_write_that_is_on_its_way_is_not_taken_for_synced() {
        let chain = chain(7);
        let (slow, quick) = (chain.begin(), chain.begin());
        chain.written(&quick);
        chain.synced(chain.written_below());
        let next = chain.begin();
        assert_eq!((next.written_below, next.synced_below), (slow.number, slow.number));
        chain.written(&slow);
        chain.synced(chain.written_below());
        let last = chain.begin();
        assert_eq!((last.written_below, last.synced_below), (next.number, next.number));
    }

    #[test]
    fn a_bad_place_before_a_later_life_is_damage() {
        let (earlier, later) = (one_by_one(3, &[]), chain(8).begin());
        assert!(vouched(&earlier, &[later]));
        assert!(!vouched(&earlier[..1], &earlier[2..]));
        assert_eq!(missing(&[&earlier[..], &[later]].concat(), &[]), None, "each life has numbers of its own");
    }
}
