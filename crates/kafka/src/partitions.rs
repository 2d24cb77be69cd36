//! Per-partition state of a consumer: buffered records, outstanding records, and the offset that may be committed.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

/// Buffered records of a partition at which its fetching is paused.
const MAX_BUFFERED: usize = 100;

/// The right to answer a record while its partition stays assigned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ticket {
    partition: Arc<PartitionId>,
    offset: i64,
    assignment: u64,
}

/// Topic and partition number.
type PartitionId = (String, i32);

/// The partition was revoked since the record was delivered.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Revoked;

pub(crate) struct Partitions<T> {
    by_id: HashMap<Arc<PartitionId>, Partition<T>>,
    /// Delayed records, ordered by due time and then by the order of their requests.
    delayed: BTreeMap<(Instant, u64), (Ticket, T)>,
    /// Maximum number of delivered records of a partition, counted from the first unanswered one.
    max_uncommitted: usize,
    last_number: u64,
}

struct Partition<T> {
    assignment: u64,
    /// Delivered records from the first unanswered one on, and whether each is answered.
    delivered: BTreeMap<i64, bool>,
    buffered: VecDeque<Buffered<T>>,
    paused: bool,
}

struct Buffered<T> {
    /// Orders the records of all partitions.
    number: u64,
    offset: i64,
    record: T,
}

/// The next record to deliver.
pub(crate) struct Next<T> {
    pub(crate) ticket: Ticket,
    pub(crate) record: T,
    /// Resume fetching the record's partition.
    pub(crate) resume: bool,
}

impl Ticket {
    pub(crate) fn topic(&self) -> &str {
        &self.partition.0
    }

    pub(crate) fn partition(&self) -> i32 {
        self.partition.1
    }
}

impl<T> Partitions<T> {
    pub(crate) fn new(max_uncommitted: usize) -> Self {
        Self { by_id: HashMap::new(), delayed: BTreeMap::new(), max_uncommitted, last_number: 0 }
    }

    /// Drops the state of a partition that is assigned or revoked: it belongs to an earlier assignment.
    pub(crate) fn remove(&mut self, topic: &str, partition: i32) {
        let id = (topic.to_owned(), partition);
        self.by_id.remove(&id);
        self.delayed.retain(|_, (ticket, _)| *ticket.partition != id);
    }

    /// Buffers a fetched record. Returns true if fetching of its partition is to be paused.
    pub(crate) fn buffer(&mut self, topic: &str, partition: i32, offset: i64, record: T) -> bool {
        let (number, assignment) = (self.next_number(), self.next_number());
        let new = || Partition { assignment, delivered: BTreeMap::new(), buffered: VecDeque::new(), paused: false };
        let partition = self.by_id.entry(Arc::new((topic.to_owned(), partition))).or_insert_with(new);
        partition.buffered.push_back(Buffered { number, offset, record });
        let pause = partition.buffered.len() >= MAX_BUFFERED && !partition.paused;
        partition.paused |= pause;
        pause
    }

    /// The next record to deliver: a delayed record that is due, otherwise the record fetched first.
    pub(crate) fn next(&mut self, now: Instant) -> Option<Next<T>> {
        if self.next_due().is_some_and(|due| due <= now)
            && let Some((_, (ticket, record))) = self.delayed.pop_first()
        {
            return Some(Next { ticket, record, resume: false });
        }
        let max_uncommitted = self.max_uncommitted;
        let free = self.by_id.iter_mut().filter(|(_, partition)| partition.delivered.len() < max_uncommitted);
        let first = free.filter_map(|(id, partition)| Some((partition.buffered.front()?.number, id, partition)));
        let (_, id, partition) = first.min_by_key(|(number, ..)| *number)?;
        let Buffered { offset, record, .. } = partition.buffered.pop_front()?;
        partition.delivered.insert(offset, false);
        let resume = partition.paused && partition.buffered.len() <= MAX_BUFFERED / 2;
        partition.paused &= !resume;
        let ticket = Ticket { partition: Arc::clone(id), offset, assignment: partition.assignment };
        Some(Next { ticket, record, resume })
    }

    /// When the first delayed record is due.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.delayed.first_key_value().map(|((due, _), _)| *due)
    }

    pub(crate) fn is_assigned(&self, ticket: &Ticket) -> bool {
        self.by_id.get(&ticket.partition).is_some_and(|partition| partition.assignment == ticket.assignment)
    }

    /// Marks a record as answered. Returns the offset of the last record before the first unanswered one, if it has advanced.
    pub(crate) fn answer(&mut self, ticket: &Ticket) -> Result<Option<i64>, Revoked> {
        let partition = self.by_id.get_mut(&ticket.partition);
        let partition = partition.filter(|partition| partition.assignment == ticket.assignment).ok_or(Revoked)?;
        let delivered = &mut partition.delivered;
        if let Some(is_answered) = delivered.get_mut(&ticket.offset) {
            *is_answered = true;
        }
        let mut last = None;
        while let Some(first) = delivered.first_entry()
            && *first.get()
        {
            last = Some(first.remove_entry().0);
        }
        Ok(last)
    }

    /// Delivers a record again at `due`, if its partition is still assigned then.
    pub(crate) fn delay(&mut self, ticket: Ticket, record: T, due: Instant) {
        if self.is_assigned(&ticket) {
            let number = self.next_number();
            self.delayed.insert((due, number), (ticket, record));
        }
    }

    fn next_number(&mut self) -> u64 {
        self.last_number = self.last_number.wrapping_add(1);
        self.last_number
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn buffer(partitions: &mut Partitions<i64>, partition: i32, offsets: std::ops::Range<i64>) {
        for offset in offsets {
            partitions.buffer("t", partition, offset, offset);
        }
    }

    fn deliver_all(partitions: &mut Partitions<i64>) -> Vec<Ticket> {
        std::iter::from_fn(|| partitions.next(Instant::now())).map(|next| next.ticket).collect()
    }

    #[test]
    fn the_committed_offset_does_not_pass_an_unanswered_record() {
        let mut partitions = Partitions::new(100);
        buffer(&mut partitions, 0, 10..15);
        let tickets = deliver_all(&mut partitions);
        assert_eq!(partitions.answer(&tickets[1]), Ok(None));
        assert_eq!(partitions.answer(&tickets[2]), Ok(None));
        assert_eq!(partitions.answer(&tickets[0]), Ok(Some(12)));
        assert_eq!(partitions.answer(&tickets[4]), Ok(None));
        assert_eq!(partitions.answer(&tickets[3]), Ok(Some(14)));
    }

    #[test]
    fn answers_in_any_order_advance_the_offset_to_the_last_record_and_never_back() {
        use rand::seq::SliceRandom;
        use rand::{RngExt, SeedableRng};
        let seed = rand::random();
        println!("seed {seed}");
        let mut random = rand::rngs::StdRng::seed_from_u64(seed);
        for _ in 0..200 {
            let mut partitions = Partitions::new(1_000);
            let mut offset = 0;
            for _ in 0..50 {
                // Offsets have gaps: compacted records and transaction markers.
                offset += random.random_range(1..4);
                partitions.buffer("t", 0, offset, offset);
            }
            let mut tickets = deliver_all(&mut partitions);
            let mut unanswered: std::collections::BTreeSet<i64> = tickets.iter().map(|ticket| ticket.offset).collect();
            tickets.shuffle(&mut random);
            let mut stored = -1;
            for ticket in tickets {
                unanswered.remove(&ticket.offset);
                if let Some(last) = partitions.answer(&ticket).unwrap() {
                    assert!(last > stored);
                    stored = last;
                }
                assert!(unanswered.first().is_none_or(|first| stored < *first), "{stored} passes {unanswered:?}");
            }
            assert_eq!(stored, offset);
        }
    }

    #[test]
    fn a_delayed_record_keeps_its_position() {
        let mut partitions = Partitions::new(100);
        buffer(&mut partitions, 0, 0..2);
        let tickets = deliver_all(&mut partitions);
        let later = Instant::now() + Duration::from_secs(60);
        partitions.delay(tickets[0].clone(), 0, later);
        assert_eq!(partitions.answer(&tickets[1]), Ok(None));
        assert!(partitions.next(Instant::now()).is_none());
        assert_eq!(partitions.next_due(), Some(later));
        assert_eq!(partitions.next(later).unwrap().ticket, tickets[0]);
        assert_eq!(partitions.answer(&tickets[0]), Ok(Some(1)));
    }

    #[test]
    fn a_revoked_partition_drops_its_delivered_and_delayed_records() {
        let mut partitions = Partitions::new(100);
        buffer(&mut partitions, 0, 0..3);
        buffer(&mut partitions, 1, 0..1);
        let tickets = deliver_all(&mut partitions);
        let now = Instant::now();
        partitions.delay(tickets[0].clone(), 0, now);
        partitions.remove("t", 0);
        assert!(partitions.next(now).is_none());
        assert_eq!(partitions.answer(&tickets[1]), Err(Revoked));
        // After it is assigned again, answers to records of the earlier assignment are refused.
        buffer(&mut partitions, 0, 0..3);
        let again = deliver_all(&mut partitions);
        partitions.delay(tickets[2].clone(), 0, now);
        assert!(partitions.next(now).is_none());
        assert_eq!(partitions.answer(&tickets[0]), Err(Revoked));
        assert_eq!(partitions.answer(&again[0]), Ok(Some(0)));
        assert_eq!(partitions.answer(&tickets[3]), Ok(Some(0)), "the other partition");
    }

    #[test]
    fn with_one_uncommitted_record_a_partition_is_delivered_in_order() {
        let mut partitions = Partitions::new(1);
        buffer(&mut partitions, 0, 0..3);
        buffer(&mut partitions, 1, 0..1);
        let first = deliver_all(&mut partitions);
        assert_eq!(first.iter().map(Ticket::partition).collect::<Vec<_>>(), [0, 1]);
        let now = Instant::now();
        partitions.delay(first[0].clone(), 0, now);
        assert_eq!(deliver_all(&mut partitions), first[..1]);
        assert_eq!(partitions.answer(&first[0]), Ok(Some(0)));
        assert_eq!(deliver_all(&mut partitions)[0].offset, 1);
    }

    #[test]
    fn a_partition_with_a_full_buffer_is_paused_and_resumed_at_half() {
        let mut partitions = Partitions::new(1);
        let pauses: Vec<i64> = (0..150).filter(|offset| partitions.buffer("t", 0, *offset, *offset)).collect();
        assert_eq!(pauses, [99]);
        let mut resumed = Vec::new();
        while let Some(next) = partitions.next(Instant::now()) {
            partitions.answer(&next.ticket).unwrap();
            resumed.extend(next.resume.then_some(next.record));
        }
        assert_eq!(resumed, [99], "50 of 150 are left");
    }
}
