//! The headers of a dead letter of NATS JetStream: a pure function.

use async_nats::header::{NATS_MESSAGE_ID, ParseHeaderValueError};
use async_nats::{HeaderMap, HeaderName, HeaderValue};

/// The headers that a dead letter has beside its own: its key, its subject, and why it is one.
pub const DEAD_ID: &str = "Onlyonce-Id";
/// See [`DEAD_ID`].
pub const DEAD_SUBJECT: &str = "Onlyonce-Subject";
/// See [`DEAD_ID`].
pub const DEAD_WHY: &str = "Onlyonce-Why";
/// Set where a dead letter has no payload because it would be too large: the stream, the message's number in it, and the
/// bytes of its payload.
pub const DEAD_OMITTED: &str = "Onlyonce-Omitted";

/// What the server takes for itself. Most are directives to it, some are its own remarks.
const SERVERS: &str = "Nats-";
/// What the server's headers are called in a dead letter.
const MOVED: &str = "Onlyonce-";
/// Where a message is.
pub(super) struct Place<'a> {
    pub(super) stream: &'a str,
    pub(super) sequence: u64,
    pub(super) subject: &'a str,
}

/// What a dead letter has beside the headers of its message.
#[derive(Clone, Copy)]
pub(super) enum With {
    All,
    /// Only its id, by which it comes back.
    Least,
    /// In place of a payload of so many bytes.
    Omitted(usize),
}

/// The headers of a dead letter. It has an id of its own for the server, or the server would take it for the message itself
/// where one stream stores both; and the same id each time, so that a copy that is made again is dropped.
///
/// The server's headers are moved under another name, for a copy that has them is refused (`Nats-Expected-Stream`), deletes
/// others (`Nats-Rollup`), is itself deleted (`Nats-TTL`), or is not stored at all (`Nats-Schedule`).
pub(super) fn letter(
    own: &HeaderMap,
    id_header: &HeaderName,
    place: &Place<'_>,
    why: &str,
    with: With,
) -> Result<HeaderMap, ParseHeaderValueError> {
    let mut letter = HeaderMap::new();
    for (name, values) in own.iter() {
        let name = name.to_string();
        if name.get(..SERVERS.len()).is_some_and(|start| start.eq_ignore_ascii_case(SERVERS)) {
            // The key's id has a name of its own already, and an earlier rejection has moved the first value.
            let moved = format!("{MOVED}{name}");
            let is_needed = matches!(with, With::All) && !name.eq_ignore_ascii_case(id_header.as_ref());
            if is_needed && own.get(moved.as_str()).is_none() {
                values.iter().for_each(|value| letter.append(moved.as_str(), value.clone()));
            }
        } else if ![DEAD_ID, DEAD_SUBJECT, DEAD_WHY, DEAD_OMITTED].contains(&name.as_str()) {
            values.iter().for_each(|value| letter.append(name.as_str(), value.clone()));
        }
    }
    let id = own.get(DEAD_ID).or_else(|| own.get(id_header.clone()));
    // An empty one says that there was none.
    letter.insert(DEAD_ID, id.cloned().map_or_else(|| "".parse(), Ok)?);
    if !matches!(with, With::Least) {
        letter.insert(DEAD_SUBJECT, place.subject.parse::<HeaderValue>()?);
        letter.insert(DEAD_WHY, why.parse::<HeaderValue>()?);
    }
    let Place { stream, sequence, .. } = place;
    if let With::Omitted(bytes) = with {
        letter.insert(DEAD_OMITTED, format!("{stream}/{sequence}, {bytes} bytes").parse::<HeaderValue>()?);
    }
    letter.insert(NATS_MESSAGE_ID, format!("{stream}.{sequence}.dead").parse::<HeaderValue>()?);
    Ok(letter)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Place<'_> = Place { stream: "ORDERS", sequence: 17, subject: "orders.new" };

    /// Every header that the server documents for publishers, and some that it adds itself.
    const OF_THE_SERVER: [&str; 26] = [
        "Nats-Expected-Stream",
        "Nats-Expected-Last-Msg-Id",
        "Nats-Expected-Last-Sequence",
        "Nats-Expected-Last-Subject-Sequence",
        "Nats-Expected-Last-Subject-Sequence-Subject",
        "Nats-Rollup",
        "Nats-TTL",
        "Nats-Marker-Reason",
        "Nats-Incr",
        "Nats-Counter-Sources",
        "Nats-Batch-Id",
        "Nats-Batch-Sequence",
        "Nats-Batch-Commit",
        "Nats-Schedule",
        "Nats-Schedule-TTL",
        "Nats-Schedule-Target",
        "Nats-Schedule-Source",
        "Nats-Schedule-Rollup",
        "Nats-Scheduler",
        "Nats-Schedule-Next",
        "Nats-Required-Api-Level",
        "Nats-Trace-Only",
        "Nats-Trace-Dest",
        "Nats-Stream-Source",
        "Nats-Subject",
        "nats-ttl",
    ];

    fn made(own: &HeaderMap, with: With) -> HeaderMap {
        letter(own, &NATS_MESSAGE_ID, &PLACE, "no such order", with).unwrap()
    }

    fn value<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
        headers.get(name).map(HeaderValue::as_str)
    }

    #[test]
    fn no_header_of_the_server_is_copied_to_a_dead_letter() {
        let mut own = HeaderMap::new();
        own.insert(NATS_MESSAGE_ID, "order-17");
        own.append("Tenant", "a");
        own.append("Tenant", "b");
        OF_THE_SERVER.iter().for_each(|name| own.insert(*name, "1"));
        for with in [With::All, With::Least, With::Omitted(9)] {
            let letter = made(&own, with);
            let servers: Vec<_> = letter.iter().map(|(name, _)| name.to_string()).collect();
            let servers: Vec<_> = servers.iter().filter(|name| name.to_lowercase().starts_with("nats-")).collect();
            assert_eq!(servers, ["Nats-Msg-Id"], "the copy's own");
            assert_eq!(value(&letter, "Nats-Msg-Id"), Some("ORDERS.17.dead"));
            assert_eq!(value(&letter, DEAD_ID), Some("order-17"));
            assert_eq!(letter.get_all("Tenant").count(), 2, "the user's are kept");
            for name in OF_THE_SERVER {
                let moved = value(&letter, &format!("Onlyonce-{name}"));
                assert_eq!(moved, matches!(with, With::All).then_some("1"), "{name}");
            }
        }
    }

    #[test]
    fn ours_are_left_out_where_there_is_no_room_but_for_the_id() {
        let mut own = HeaderMap::new();
        own.insert("Tenant", "a");
        let all = made(&own, With::All);
        assert_eq!((value(&all, DEAD_SUBJECT), value(&all, DEAD_WHY)), (Some("orders.new"), Some("no such order")));
        assert_eq!(value(&all, DEAD_ID), Some(""), "it had none");
        let least = made(&own, With::Least);
        assert_eq!((value(&least, DEAD_SUBJECT), value(&least, DEAD_WHY)), (None, None));
        assert_eq!(least.len(), 3, "{least:?}");
        let omitted = made(&HeaderMap::new(), With::Omitted(2_000_000));
        assert_eq!(value(&omitted, DEAD_OMITTED), Some("ORDERS/17, 2000000 bytes"));
        assert_eq!(value(&omitted, DEAD_WHY), Some("no such order"));
    }

    #[test]
    fn a_letter_that_is_rejected_again_keeps_its_first_id_and_has_the_new_reason() {
        let mut own = HeaderMap::new();
        own.insert(NATS_MESSAGE_ID, "order-17");
        own.insert("Nats-TTL", "1h");
        let first = made(&own, With::All);
        let again = Place { stream: "ORDERS", sequence: 40, subject: "orders.new" };
        let second = letter(&first, &NATS_MESSAGE_ID, &again, "still none", With::All).unwrap();
        assert_eq!((value(&second, DEAD_ID), value(&second, DEAD_WHY)), (Some("order-17"), Some("still none")));
        assert_eq!(
            (value(&second, "Onlyonce-Nats-TTL"), value(&second, "Nats-Msg-Id")),
            (Some("1h"), Some("ORDERS.40.dead"))
        );
        assert_eq!(second.len(), first.len());
    }
}
