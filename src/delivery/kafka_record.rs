//! What a Kafka record says of itself, and what its dead letter says of it: pure functions.

use std::panic::{AssertUnwindSafe, catch_unwind};

use rdkafka::message::{Headers, Message as _, OwnedMessage};

use super::message::KeyOrigin;

/// The headers that a dead letter has beside its own: its key's id, where it was (`TOPIC/PARTITION/OFFSET`), its timestamp in
/// milliseconds, and why it is one.
pub const DEAD_ID: &str = "onlyonce-id";
/// See [`DEAD_ID`].
pub const DEAD_FROM: &str = "onlyonce-from";
/// See [`DEAD_ID`].
pub const DEAD_TIMESTAMP: &str = "onlyonce-timestamp";
/// See [`DEAD_ID`].
pub const DEAD_WHY: &str = "onlyonce-why";
/// Set where a dead letter has neither the headers nor the value of its record, because it would be too large: the bytes of
/// the value. The record is where [`DEAD_FROM`] says, as long as its topic keeps it.
pub const DEAD_OMITTED: &str = "onlyonce-omitted";

/// Bytes of a key or an id that a dead letter without a value has at most.
pub(super) const SHORT: usize = 1_024;

/// Where the idempotency key of a record is. A record that has none there goes by the digest of its key and payload; a
/// tombstone, which is a record with a key and no payload, goes by its [`Position`](Id::Position) then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Id {
    /// In this header, the last one of this name.
    Header(String),
    /// It is the record's key. Only where no two records that mean different work share one. A tombstone goes by its
    /// position, for it has the key of the record that it deletes.
    Key,
    /// It is the record's partition and offset. What the broker delivers twice is one piece of work; what a producer
    /// sends twice is two.
    Position,
}

/// A header's name and value.
pub(super) type Head = (String, Option<Vec<u8>>);

/// The headers whose names are UTF-8, and how many others there are, at which the client panics.
pub(super) fn readable(headers: &impl Headers) -> (Vec<Head>, usize) {
    let head = |place| {
        let header = headers.try_get(place)?;
        Some((header.key.to_owned(), header.value.map(<[u8]>::to_vec)))
    };
    let heads = (0..headers.count()).map(|place| catch_unwind(AssertUnwindSafe(|| head(place))));
    let (mut read, mut unreadable) = (Vec::new(), 0);
    for head in heads {
        match head {
            Ok(head) => read.extend(head),
            Err(_) => unreadable += 1,
        }
    }
    (read, unreadable)
}

/// The id of a record, and what it is.
pub(super) fn identified(id: &Id, record: &OwnedMessage, headers: &[Head]) -> (Option<Vec<u8>>, KeyOrigin) {
    let header = |name: &str| {
        let mut values = headers.iter().filter(|(of, _)| of == name).filter_map(|(_, value)| value.clone());
        values.next_back().filter(|value| !value.is_empty())
    };
    if let Some(first) = header(DEAD_ID) {
        return (Some(first), KeyOrigin::Id);
    }
    let is_tombstone = record.payload().is_none();
    let position = |of: &str| format!("{of}{}/{}", record.partition(), record.offset()).into_bytes();
    let given = match id {
        Id::Header(name) => header(name),
        Id::Key if !is_tombstone => record.key().filter(|key| !key.is_empty()).map(<[u8]>::to_vec),
        Id::Key => None,
        Id::Position => return (Some(position("")), KeyOrigin::Position),
    };
    match given {
        Some(given) => (Some(given), KeyOrigin::Id),
        // A key that was deleted, written and deleted again was deleted twice.
        None if is_tombstone => (Some(position("tombstone/")), KeyOrigin::Position),
        None => (None, KeyOrigin::Digest),
    }
}

/// What a dead letter says of its record.
pub(super) struct Facts<'a> {
    pub(super) id: Option<&'a [u8]>,
    pub(super) place: &'a str,
    pub(super) timestamp_ms: Option<i64>,
    pub(super) why: &'a str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum With {
    All,
    /// Only the id, by which the record comes back.
    Least,
    /// In place of a value of so many bytes.
    Omitted(usize),
}

/// The headers of a dead letter: those of its record in their order, and ours, which take the place of earlier ones. No header
/// is a directive to a broker. The record's timestamp would be one: a topic's retention goes by it, and a broker refuses one
/// that is far from its own clock.
pub(super) fn letter(own: &[Head], facts: &Facts<'_>, with: With) -> Vec<Head> {
    let ours = [DEAD_ID, DEAD_FROM, DEAD_TIMESTAMP, DEAD_WHY, DEAD_OMITTED];
    let mut letter: Vec<Head> = own.iter().filter(|(name, _)| !ours.contains(&name.as_str())).cloned().collect();
    let mut add = |name: &str, value: &[u8]| letter.push((name.to_owned(), Some(value.to_vec())));
    if let Some(id) = facts.id.filter(|id| id.len() <= SHORT || !matches!(with, With::Omitted(_))) {
        add(DEAD_ID, id);
    }
    if with != With::Least {
        add(DEAD_FROM, facts.place.as_bytes());
        facts.timestamp_ms.into_iter().for_each(|at_ms| add(DEAD_TIMESTAMP, at_ms.to_string().as_bytes()));
        add(DEAD_WHY, facts.why.as_bytes());
    }
    if let With::Omitted(bytes) = with {
        add(DEAD_OMITTED, bytes.to_string().as_bytes());
    }
    letter
}

#[cfg(test)]
mod tests {
    use rdkafka::message::Header;

    use super::*;

    fn heads(heads: &[(&str, Option<&str>)]) -> Vec<Head> {
        heads.iter().map(|(name, value)| ((*name).to_owned(), value.map(|value| value.as_bytes().to_vec()))).collect()
    }

    fn record(key: &str, payload: Option<&str>, offset: i64) -> OwnedMessage {
        let (key, payload) = (Some(key.as_bytes().to_vec()), payload.map(|payload| payload.as_bytes().to_vec()));
        OwnedMessage::new(payload, key, "t".to_owned(), rdkafka::Timestamp::NotAvailable, 3, offset, None)
    }

    /// The client's headers, one of which has a name that is no UTF-8.
    struct Odd;

    impl Headers for Odd {
        fn count(&self) -> usize {
            3
        }

        fn try_get(&self, place: usize) -> Option<Header<'_, &[u8]>> {
            match place {
                0 => Some(Header { key: "id", value: Some(b"order-1") }),
                1 => std::panic::resume_unwind(Box::new("its name is not UTF-8")),
                2 => Some(Header { key: "empty", value: None }),
                _ => None,
            }
        }
    }

    #[test]
    fn a_header_that_cannot_be_read_takes_no_other_along() {
        assert_eq!(readable(&Odd), (heads(&[("id", Some("order-1")), ("empty", None)]), 1));
    }

    #[test]
    fn tombstones_are_not_each_others_duplicates_nor_those_of_what_they_delete() {
        let by_header = Id::Header("id".to_owned());
        for id in [&by_header, &Id::Key, &Id::Position] {
            let of = |record: &OwnedMessage| identified(id, record, &[]);
            let (first, again, later) = (record("k", None, 7), record("k", None, 7), record("k", None, 9));
            assert_eq!(of(&first), of(&again), "delivered twice");
            assert_ne!(of(&first).0, of(&later).0, "deleted twice");
            assert_ne!(of(&first).0, of(&record("k", Some("v"), 1)).0);
            assert_eq!(of(&first).1, KeyOrigin::Position);
        }
        let given = heads(&[("id", Some("delete-1"))]);
        assert_eq!(identified(&by_header, &record("k", None, 7), &given), (Some(b"delete-1".to_vec()), KeyOrigin::Id));
        assert_eq!(identified(&by_header, &record("k", Some(""), 7), &[]), (None, KeyOrigin::Digest), "an empty value");
    }

    #[test]
    fn an_id_is_the_last_header_of_its_name_or_that_of_the_dead_letter() {
        let by_header = Id::Header("id".to_owned());
        let record = record("k", Some("v"), 7);
        let of = |given: &[(&str, Option<&str>)]| identified(&by_header, &record, &heads(given)).0;
        assert_eq!(of(&[("id", Some("a")), ("id", None), ("id", Some("b"))]), Some(b"b".to_vec()));
        assert_eq!(of(&[("id", Some("a")), (DEAD_ID, Some("first"))]), Some(b"first".to_vec()));
        assert_eq!(of(&[("id", Some(""))]), None);
        assert_eq!(identified(&Id::Key, &record, &[]), (Some(b"k".to_vec()), KeyOrigin::Id));
    }

    #[test]
    fn a_dead_letter_has_the_headers_of_its_record_and_ours_once_or_less_of_ours() {
        let own = heads(&[
            ("tenant", Some("a")),
            (DEAD_WHY, Some("an earlier one")),
            ("tenant", None),
            (DEAD_OMITTED, Some("1")),
        ]);
        let facts = Facts { id: Some(b"order-1"), place: "t/3/7", timestamp_ms: Some(1_700), why: "no such order" };
        let users = [("tenant", Some("a")), ("tenant", None), (DEAD_ID, Some("order-1"))];
        let ours = [(DEAD_FROM, Some("t/3/7")), (DEAD_TIMESTAMP, Some("1700")), (DEAD_WHY, Some("no such order"))];
        assert_eq!(letter(&own, &facts, With::All), heads(&[&users[..], &ours[..]].concat()));
        assert_eq!(letter(&own, &facts, With::Least), heads(&users));
        let omitted = [&users[2..], &ours[..], &[(DEAD_OMITTED, Some("2000000"))]].concat();
        assert_eq!(letter(&[], &facts, With::Omitted(2_000_000)), heads(&omitted));
        let long = Facts { id: Some(&[b'x'; SHORT + 1]), ..facts };
        assert_eq!(letter(&[], &long, With::Omitted(1)).len(), 4, "without an id that is itself too large");
    }
}
