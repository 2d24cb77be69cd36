//! What a reader of a partitioned log holds of its partitions: what it has read, given out, and may forget.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

/// Records of a partition that are read and not given out, before no more are read.
const WAITING_MOST: usize = 100;

/// The right to answer for a record, as long as its partition is assigned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ticket {
    place: Arc<Place>,
    offset: i64,
    assignment: u64,
}

type Place = (String, i32);

/// The partition is another's by now.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Revoked;

pub(super) struct Partitions<T> {
    by_place: HashMap<Arc<Place>, Partition<T>>,
    /// By the time at which they come back, and the order in which they were sent away.
    returning: BTreeMap<(Instant, u64), (Ticket, T)>,
    /// How many records of a partition are given out at most, from the first that is not settled.
    ahead: usize,
    numbers: u64,
}

struct Partition<T> {
    assignment: u64,
    /// From the first that is not settled: whether it is.
    given: BTreeMap<i64, bool>,
    waiting: VecDeque<Waiting<T>>,
    paused: bool,
}

struct Waiting<T> {
    /// The order of all partitions' records.
    number: u64,
    offset: i64,
    record: T,
}

/// A record to be given out.
pub(super) struct Given<T> {
    pub(super) ticket: Ticket,
    pub(super) record: T,
    /// Its partition was paused, and is to be read again.
    pub(super) resume: bool,
}

impl Ticket {
    pub(super) fn topic(&self) -> &str {
        &self.place.0
    }

    pub(super) fn partition(&self) -> i32 {
        self.place.1
    }
}

impl<T> Partitions<T> {
    pub(super) fn new(ahead: usize) -> Self {
        Self { by_place: HashMap::new(), returning: BTreeMap::new(), ahead, numbers: 0 }
    }

    /// A partition is assigned, or revoked: what is known of it is of an earlier assignment.
    pub(super) fn forget(&mut self, topic: &str, partition: i32) {
        let place = (topic.to_owned(), partition);
        self.by_place.remove(&place);
        self.returning.retain(|_, (ticket, _)| *ticket.place != place);
    }

    /// Takes what was read. True: read no more of this partition for now.
    pub(super) fn read(&mut self, topic: &str, partition: i32, offset: i64, record: T) -> bool {
        let (number, assignment) = (self.number(), self.number());
        let fresh = || Partition { assignment, given: BTreeMap::new(), waiting: VecDeque::new(), paused: false };
        let known = self.by_place.entry(Arc::new((topic.to_owned(), partition))).or_insert_with(fresh);
        known.waiting.push_back(Waiting { number, offset, record });
        let pause = known.waiting.len() >= WAITING_MOST && !known.paused;
        known.paused |= pause;
        pause
    }

    /// What is to be given out next: what comes back by now, and then what was read first.
    pub(super) fn next(&mut self, now: Instant) -> Option<Given<T>> {
        if self.due().is_some_and(|at| at <= now)
            && let Some((_, (ticket, record))) = self.returning.pop_first()
        {
            return Some(Given { ticket, record, resume: false });
        }
        let ahead = self.ahead;
        let free = self.by_place.iter_mut().filter(|(_, partition)| partition.given.len() < ahead);
        let first = free.filter_map(|(place, known)| Some((known.waiting.front()?.number, place, known)));
        let (_, place, known) = first.min_by_key(|(number, ..)| *number)?;
        let Waiting { offset, record, .. } = known.waiting.pop_front()?;
        known.given.insert(offset, false);
        let resume = known.paused && known.waiting.len() <= WAITING_MOST / 2;
        known.paused &= !resume;
        let ticket = Ticket { place: Arc::clone(place), offset, assignment: known.assignment };
        Some(Given { ticket, record, resume })
    }

    /// When the first one comes back that was sent away.
    pub(super) fn due(&self) -> Option<Instant> {
        self.returning.first_key_value().map(|((at, _), _)| *at)
    }

    pub(super) fn holds(&self, ticket: &Ticket) -> bool {
        self.by_place.get(&ticket.place).is_some_and(|known| known.assignment == ticket.assignment)
    }

    /// A record is settled. The last offset of those before which all are, if there are more of them now.
    pub(super) fn settle(&mut self, ticket: &Ticket) -> Result<Option<i64>, Revoked> {
        let known = self.by_place.get_mut(&ticket.place).filter(|known| known.assignment == ticket.assignment);
        let given = &mut known.ok_or(Revoked)?.given;
        if let Some(settled) = given.get_mut(&ticket.offset) {
            *settled = true;
        }
        let mut last = None;
        while let Some(first) = given.first_entry()
            && *first.get()
        {
            last = Some(first.remove_entry().0);
        }
        Ok(last)
    }

    /// A record is to come back, if its partition is still there by then.
    pub(super) fn send_away(&mut self, ticket: Ticket, record: T, until: Instant) {
        if self.holds(&ticket) {
            let number = self.number();
            self.returning.insert((until, number), (ticket, record));
        }
    }

    fn number(&mut self) -> u64 {
        self.numbers = self.numbers.wrapping_add(1);
        self.numbers
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn read(partitions: &mut Partitions<i64>, partition: i32, offsets: std::ops::Range<i64>) {
        for offset in offsets {
            partitions.read("t", partition, offset, offset);
        }
    }

    fn all(partitions: &mut Partitions<i64>) -> Vec<Ticket> {
        std::iter::from_fn(|| partitions.next(Instant::now())).map(|given| given.ticket).collect()
    }

    #[test]
    fn no_offset_passes_one_that_is_not_settled() {
        let mut partitions = Partitions::new(100);
        read(&mut partitions, 0, 10..15);
        let tickets = all(&mut partitions);
        assert_eq!(partitions.settle(&tickets[1]), Ok(None));
        assert_eq!(partitions.settle(&tickets[2]), Ok(None));
        assert_eq!(partitions.settle(&tickets[0]), Ok(Some(12)));
        assert_eq!(partitions.settle(&tickets[4]), Ok(None));
        assert_eq!(partitions.settle(&tickets[3]), Ok(Some(14)));
    }

    #[test]
    fn any_order_of_settling_ends_at_the_last_offset_and_never_goes_back() {
        use rand::seq::SliceRandom;
        use rand::{RngExt, SeedableRng};
        let seed = rand::random();
        println!("seed {seed}");
        let mut random = rand::rngs::StdRng::seed_from_u64(seed);
        for _ in 0..200 {
            let mut partitions = Partitions::new(1_000);
            let mut offset = 0;
            for _ in 0..50 {
                // Offsets have gaps: compacted records, and the marks of transactions.
                offset += random.random_range(1..4);
                partitions.read("t", 0, offset, offset);
            }
            let mut tickets = all(&mut partitions);
            let mut open: std::collections::BTreeSet<i64> = tickets.iter().map(|ticket| ticket.offset).collect();
            tickets.shuffle(&mut random);
            let mut stored = -1;
            for ticket in tickets {
                open.remove(&ticket.offset);
                if let Some(last) = partitions.settle(&ticket).unwrap() {
                    assert!(last > stored);
                    stored = last;
                }
                assert!(open.first().is_none_or(|first| stored < *first), "{stored} passes what is in {open:?}");
            }
            assert_eq!(stored, offset);
        }
    }

    #[test]
    fn what_comes_back_holds_its_place() {
        let mut partitions = Partitions::new(100);
        read(&mut partitions, 0, 0..2);
        let tickets = all(&mut partitions);
        let later = Instant::now() + Duration::from_secs(60);
        partitions.send_away(tickets[0].clone(), 0, later);
        assert_eq!(partitions.settle(&tickets[1]), Ok(None));
        assert!(partitions.next(Instant::now()).is_none());
        assert_eq!(partitions.due(), Some(later));
        assert_eq!(partitions.next(later).unwrap().ticket, tickets[0]);
        assert_eq!(partitions.settle(&tickets[0]), Ok(Some(1)));
    }

    #[test]
    fn a_revoked_partition_forgets_what_was_given_out_and_what_was_to_come_back() {
        let mut partitions = Partitions::new(100);
        read(&mut partitions, 0, 0..3);
        read(&mut partitions, 1, 0..1);
        let tickets = all(&mut partitions);
        let now = Instant::now();
        partitions.send_away(tickets[0].clone(), 0, now);
        partitions.forget("t", 0);
        assert!(partitions.next(now).is_none());
        assert_eq!(partitions.settle(&tickets[1]), Err(Revoked));
        // Assigned again: answers for what was given out before do not count.
        read(&mut partitions, 0, 0..3);
        let again = all(&mut partitions);
        partitions.send_away(tickets[2].clone(), 0, now);
        assert!(partitions.next(now).is_none());
        assert_eq!(partitions.settle(&tickets[0]), Err(Revoked));
        assert_eq!(partitions.settle(&again[0]), Ok(Some(0)));
        assert_eq!(partitions.settle(&tickets[3]), Ok(Some(0)), "the other partition");
    }

    #[test]
    fn with_one_ahead_records_of_a_partition_come_one_after_the_other() {
        let mut partitions = Partitions::new(1);
        read(&mut partitions, 0, 0..3);
        read(&mut partitions, 1, 0..1);
        let first = all(&mut partitions);
        assert_eq!(first.iter().map(Ticket::partition).collect::<Vec<_>>(), [0, 1]);
        let now = Instant::now();
        partitions.send_away(first[0].clone(), 0, now);
        assert_eq!(all(&mut partitions), first[..1]);
        assert_eq!(partitions.settle(&first[0]), Ok(Some(0)));
        assert_eq!(all(&mut partitions)[0].offset, 1);
    }

    #[test]
    fn a_partition_is_read_no_further_than_it_can_wait() {
        let mut partitions = Partitions::new(1);
        let pauses: Vec<i64> = (0..150).filter(|offset| partitions.read("t", 0, *offset, *offset)).collect();
        assert_eq!(pauses, [99]);
        let mut resumed = Vec::new();
        while let Some(given) = partitions.next(Instant::now()) {
            partitions.settle(&given.ticket).unwrap();
            resumed.extend(given.resume.then_some(given.record));
        }
        assert_eq!(resumed, [99], "50 of 150 are left");
    }
}
