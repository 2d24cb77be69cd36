//! The id of a Kafka record and the headers of its dead letter: pure functions.

use std::panic::{AssertUnwindSafe, catch_unwind};

use onlyonce_delivery::KeyOrigin;
use rdkafka::message::{Headers, Message as _, OwnedMessage};

/// Header of a dead letter: the id that the record's key was derived from.
pub const ID_HEADER: &str = "onlyonce-id";
/// Header of a dead letter: the position of the record (`TOPIC/PARTITION/OFFSET`).
pub const SOURCE_HEADER: &str = "onlyonce-source";
/// Header of a dead letter: the timestamp of the record, in milliseconds.
pub const TIMESTAMP_HEADER: &str = "onlyonce-timestamp";
/// Header of a dead letter: the reason of the rejection.
pub const REASON_HEADER: &str = "onlyonce-reason";
/// Header of a dead letter that would be too large and has neither the headers nor the value of its record: the size of the
/// value in bytes. The record is at [`SOURCE_HEADER`] as long as its topic retains it.
pub const OMITTED_HEADER: &str = "onlyonce-omitted-bytes";

/// Maximum bytes of the key and the id in a dead letter without a value.
pub(crate) const MAX_SHORT: usize = 1_024;

/// Where the idempotency key of a record comes from. A record without it is keyed by a digest of its key and payload; a
/// tombstone (a record with a key and no payload) by its [`Position`](IdSource::Position).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum IdSource {
    /// The last header of this name.
    Header(String),
    /// The record's key. Use it only if records with equal keys are one piece of work. A tombstone is keyed by its
    /// position, because it has the key of the record that it deletes.
    Key,
    /// The record's partition and offset. Redeliveries are deduplicated; a record that the producer sends twice is
    /// processed twice.
    Position,
}

/// A header's name and value.
pub(crate) type HeaderPair = (String, Option<Vec<u8>>);

/// The headers with UTF-8 names, and the number of the others. The client panics at a name that is not UTF-8.
pub(crate) fn readable_headers(headers: &impl Headers) -> (Vec<HeaderPair>, usize) {
    let read = |index| {
        let header = headers.try_get(index)?;
        Some((header.key.to_owned(), header.value.map(<[u8]>::to_vec)))
    };
    let (mut readable, mut unreadable) = (Vec::new(), 0);
    for index in 0..headers.count() {
        match catch_unwind(AssertUnwindSafe(|| read(index))) {
            Ok(header) => readable.extend(header),
            Err(_) => unreadable += 1,
        }
    }
    (readable, unreadable)
}

/// The id of a record and its origin.
pub(crate) fn record_id(
    source: &IdSource,
    record: &OwnedMessage,
    headers: &[HeaderPair],
) -> (Option<Vec<u8>>, KeyOrigin) {
    let header = |name: &str| {
        let mut values = headers.iter().filter(|(of, _)| of == name).filter_map(|(_, value)| value.clone());
        values.next_back().filter(|value| !value.is_empty())
    };
    if let Some(original) = header(ID_HEADER) {
        return (Some(original), KeyOrigin::Id);
    }
    let is_tombstone = record.payload().is_none();
    let position = |prefix: &str| format!("{prefix}{}/{}", record.partition(), record.offset()).into_bytes();
    let id = match source {
        IdSource::Header(name) => header(name),
        IdSource::Key if !is_tombstone => record.key().filter(|key| !key.is_empty()).map(<[u8]>::to_vec),
        IdSource::Key => None,
        IdSource::Position => return (Some(position("")), KeyOrigin::Position),
    };
    match id {
        Some(id) => (Some(id), KeyOrigin::Id),
        // Two deletions of one key are two pieces of work.
        None if is_tombstone => (Some(position("tombstone/")), KeyOrigin::Position),
        None => (None, KeyOrigin::Digest),
    }
}

/// The facts of a rejected record.
pub(crate) struct Rejection<'a> {
    pub(crate) id: Option<&'a [u8]>,
    pub(crate) source: &'a str,
    pub(crate) timestamp_ms: Option<i64>,
    pub(crate) reason: &'a str,
}

/// How much a dead letter contains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Detail {
    Full,
    /// Of our headers only the id, which a redrive needs.
    IdOnly,
    /// No value; it has this many bytes.
    ValueOmitted(usize),
}

/// The headers of a dead letter: those of the record in their order, then ours, which replace earlier ones. None of them is a
/// directive to a broker. The record's timestamp would be one, because the retention of the topic uses it and a broker refuses
/// a timestamp far from its own clock; so it becomes a header.
pub(crate) fn dead_letter_headers(own: &[HeaderPair], rejection: &Rejection<'_>, detail: Detail) -> Vec<HeaderPair> {
    let ours = [ID_HEADER, SOURCE_HEADER, TIMESTAMP_HEADER, REASON_HEADER, OMITTED_HEADER];
    let mut headers: Vec<HeaderPair> = own.iter().filter(|(name, _)| !ours.contains(&name.as_str())).cloned().collect();
    let mut add = |name: &str, value: &[u8]| headers.push((name.to_owned(), Some(value.to_vec())));
    if let Some(id) = rejection.id.filter(|id| id.len() <= MAX_SHORT || !matches!(detail, Detail::ValueOmitted(_))) {
        add(ID_HEADER, id);
    }
    if detail != Detail::IdOnly {
        add(SOURCE_HEADER, rejection.source.as_bytes());
        rejection.timestamp_ms.into_iter().for_each(|ms| add(TIMESTAMP_HEADER, ms.to_string().as_bytes()));
        add(REASON_HEADER, rejection.reason.as_bytes());
    }
    if let Detail::ValueOmitted(bytes) = detail {
        add(OMITTED_HEADER, bytes.to_string().as_bytes());
    }
    headers
}

#[cfg(test)]
mod tests {
    use rdkafka::message::Header;

    use super::*;

    fn pairs(headers: &[(&str, Option<&str>)]) -> Vec<HeaderPair> {
        let pair = |(name, value): &(&str, Option<&str>)| ((*name).to_owned(), value.map(|value| value.into()));
        headers.iter().map(pair).collect()
    }

    fn record(key: &str, payload: Option<&str>, offset: i64) -> OwnedMessage {
        let (key, payload) = (Some(key.as_bytes().to_vec()), payload.map(|payload| payload.as_bytes().to_vec()));
        OwnedMessage::new(payload, key, "t".to_owned(), rdkafka::Timestamp::NotAvailable, 3, offset, None)
    }

    /// Headers of the client, one of which has a name that is not UTF-8.
    struct WithInvalidName;

    impl Headers for WithInvalidName {
        fn count(&self) -> usize {
            3
        }

        fn try_get(&self, index: usize) -> Option<Header<'_, &[u8]>> {
            match index {
                0 => Some(Header { key: "id", value: Some(b"order-1") }),
                1 => std::panic::resume_unwind(Box::new("its name is not UTF-8")),
                2 => Some(Header { key: "empty", value: None }),
                _ => None,
            }
        }
    }

    #[test]
    fn an_unreadable_header_does_not_hide_the_others() {
        assert_eq!(readable_headers(&WithInvalidName), (pairs(&[("id", Some("order-1")), ("empty", None)]), 1));
    }

    #[test]
    fn tombstones_are_no_duplicates_of_each_other_or_of_the_record_they_delete() {
        let by_header = IdSource::Header("id".to_owned());
        for source in [&by_header, &IdSource::Key, &IdSource::Position] {
            let id = |record: &OwnedMessage| record_id(source, record, &[]);
            let (first, again, later) = (record("k", None, 7), record("k", None, 7), record("k", None, 9));
            assert_eq!(id(&first), id(&again), "delivered twice");
            assert_ne!(id(&first).0, id(&later).0, "deleted twice");
            assert_ne!(id(&first).0, id(&record("k", Some("v"), 1)).0);
            assert_eq!(id(&first).1, KeyOrigin::Position);
        }
        let headers = pairs(&[("id", Some("delete-1"))]);
        assert_eq!(record_id(&by_header, &record("k", None, 7), &headers), (Some(b"delete-1".to_vec()), KeyOrigin::Id));
        assert_eq!(record_id(&by_header, &record("k", Some(""), 7), &[]), (None, KeyOrigin::Digest), "an empty value");
    }

    #[test]
    fn the_id_is_the_last_header_of_its_name_or_the_id_of_the_dead_letter() {
        let by_header = IdSource::Header("id".to_owned());
        let record = record("k", Some("v"), 7);
        let id = |headers: &[(&str, Option<&str>)]| record_id(&by_header, &record, &pairs(headers)).0;
        assert_eq!(id(&[("id", Some("a")), ("id", None), ("id", Some("b"))]), Some(b"b".to_vec()));
        assert_eq!(id(&[("id", Some("a")), (ID_HEADER, Some("first"))]), Some(b"first".to_vec()));
        assert_eq!(id(&[("id", Some(""))]), None);
        assert_eq!(record_id(&IdSource::Key, &record, &[]), (Some(b"k".to_vec()), KeyOrigin::Id));
    }

    #[test]
    fn a_dead_letter_has_the_headers_of_its_record_and_as_many_of_ours_as_its_detail_says() {
        let own = pairs(&[
            ("tenant", Some("a")),
            (REASON_HEADER, Some("an earlier one")),
            ("tenant", None),
            (OMITTED_HEADER, Some("1")),
        ]);
        let rejection =
            Rejection { id: Some(b"order-1"), source: "t/3/7", timestamp_ms: Some(1_700), reason: "no such order" };
        let users = [("tenant", Some("a")), ("tenant", None), (ID_HEADER, Some("order-1"))];
        let ours =
            [(SOURCE_HEADER, Some("t/3/7")), (TIMESTAMP_HEADER, Some("1700")), (REASON_HEADER, Some("no such order"))];
        let full = pairs(&[&users[..], &ours[..]].concat());
        assert_eq!(dead_letter_headers(&own, &rejection, Detail::Full), full);
        assert_eq!(dead_letter_headers(&own, &rejection, Detail::IdOnly), pairs(&users));
        let omitted = [&users[2..], &ours[..], &[(OMITTED_HEADER, Some("2000000"))]].concat();
        assert_eq!(dead_letter_headers(&[], &rejection, Detail::ValueOmitted(2_000_000)), pairs(&omitted));
        let long = Rejection { id: Some(&[b'x'; MAX_SHORT + 1]), ..rejection };
        let headers = dead_letter_headers(&[], &long, Detail::ValueOmitted(1));
        assert_eq!(headers.len(), 4, "without the id, which is itself too large");
    }
}
