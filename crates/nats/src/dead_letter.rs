//! The headers of a dead letter of NATS JetStream: a pure function.

use async_nats::header::{NATS_MESSAGE_ID, ParseHeaderValueError};
use async_nats::{HeaderMap, HeaderName, HeaderValue};

/// Header of a dead letter: the id that the message's key was derived from. Empty if it had none.
pub const ID_HEADER: &str = "Onlyonce-Id";
/// Header of a dead letter: the subject of the message.
pub const SUBJECT_HEADER: &str = "Onlyonce-Subject";
/// Header of a dead letter: the reason of the rejection.
pub const REASON_HEADER: &str = "Onlyonce-Reason";
/// Header of a dead letter that would be too large and has no payload: the stream, the sequence number and the payload size of
/// the message.
pub const OMITTED_HEADER: &str = "Onlyonce-Omitted";

/// Prefix of headers that are reserved for the server: directives to it, and its own annotations.
const RESERVED_PREFIX: &str = "Nats-";
/// Prefix that is added to reserved headers in a dead letter.
const MOVED_PREFIX: &str = "Onlyonce-";

/// The position of a rejected message.
pub(crate) struct Source<'a> {
    pub(crate) stream: &'a str,
    pub(crate) sequence: u64,
    pub(crate) subject: &'a str,
}

/// How much a dead letter contains.
#[derive(Clone, Copy)]
pub(crate) enum Detail {
    Full,
    /// Of our headers only the id, which a redrive needs.
    IdOnly,
    /// No payload; it has this many bytes.
    PayloadOmitted(usize),
}

/// The headers of a dead letter. Its `Nats-Msg-Id` differs from that of the message, because the server would drop it as a
/// duplicate if one stream stores both, and is always the same for one message, so that the server drops a second copy.
///
/// Reserved headers get a prefix, because a copy that has them is refused (`Nats-Expected-Stream`), deletes other messages
/// (`Nats-Rollup`), is deleted itself (`Nats-TTL`), or is not stored (`Nats-Schedule`).
pub(crate) fn dead_letter_headers(
    own: &HeaderMap,
    id_header: &HeaderName,
    source: &Source<'_>,
    reason: &str,
    detail: Detail,
) -> Result<HeaderMap, ParseHeaderValueError> {
    let mut headers = HeaderMap::new();
    for (name, values) in own.iter() {
        let name = name.to_string();
        if name.get(..RESERVED_PREFIX.len()).is_some_and(|start| start.eq_ignore_ascii_case(RESERVED_PREFIX)) {
            // The id has a header of its own, and an earlier rejection has moved the original value already.
            let moved = format!("{MOVED_PREFIX}{name}");
            let is_needed = matches!(detail, Detail::Full) && !name.eq_ignore_ascii_case(id_header.as_ref());
            if is_needed && own.get(moved.as_str()).is_none() {
                values.iter().for_each(|value| headers.append(moved.as_str(), value.clone()));
            }
        } else if ![ID_HEADER, SUBJECT_HEADER, REASON_HEADER, OMITTED_HEADER].contains(&name.as_str()) {
            values.iter().for_each(|value| headers.append(name.as_str(), value.clone()));
        }
    }
    let id = own.get(ID_HEADER).or_else(|| own.get(id_header.clone()));
    headers.insert(ID_HEADER, id.cloned().map_or_else(|| "".parse(), Ok)?);
    if !matches!(detail, Detail::IdOnly) {
        headers.insert(SUBJECT_HEADER, source.subject.parse::<HeaderValue>()?);
        headers.insert(REASON_HEADER, reason.parse::<HeaderValue>()?);
    }
    let Source { stream, sequence, .. } = source;
    if let Detail::PayloadOmitted(bytes) = detail {
        headers.insert(OMITTED_HEADER, format!("{stream}/{sequence}, {bytes} bytes").parse::<HeaderValue>()?);
    }
    headers.insert(NATS_MESSAGE_ID, format!("{stream}.{sequence}.dead").parse::<HeaderValue>()?);
    Ok(headers)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: Source<'_> = Source { stream: "ORDERS", sequence: 17, subject: "orders.new" };

    /// All headers that the server documents for publishers, and some that it adds.
    const RESERVED: [&str; 26] = [
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

    fn headers(own: &HeaderMap, detail: Detail) -> HeaderMap {
        dead_letter_headers(own, &NATS_MESSAGE_ID, &SOURCE, "no such order", detail).unwrap()
    }

    fn value<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
        headers.get(name).map(HeaderValue::as_str)
    }

    #[test]
    fn no_reserved_header_is_copied_to_a_dead_letter() {
        let mut own = HeaderMap::new();
        own.insert(NATS_MESSAGE_ID, "order-17");
        own.append("Tenant", "a");
        own.append("Tenant", "b");
        RESERVED.iter().for_each(|name| own.insert(*name, "1"));
        for detail in [Detail::Full, Detail::IdOnly, Detail::PayloadOmitted(9)] {
            let headers = headers(&own, detail);
            let names: Vec<_> = headers.iter().map(|(name, _)| name.to_string()).collect();
            let reserved: Vec<_> = names.iter().filter(|name| name.to_lowercase().starts_with("nats-")).collect();
            assert_eq!(reserved, ["Nats-Msg-Id"], "the id of the copy");
            assert_eq!(value(&headers, "Nats-Msg-Id"), Some("ORDERS.17.dead"));
            assert_eq!(value(&headers, ID_HEADER), Some("order-17"));
            assert_eq!(headers.get_all("Tenant").count(), 2, "headers of the user are kept");
            for name in RESERVED {
                let moved = value(&headers, &format!("Onlyonce-{name}"));
                assert_eq!(moved, matches!(detail, Detail::Full).then_some("1"), "{name}");
            }
        }
    }

    #[test]
    fn with_less_detail_only_the_id_of_our_headers_is_kept() {
        let mut own = HeaderMap::new();
        own.insert("Tenant", "a");
        let full = headers(&own, Detail::Full);
        assert_eq!(value(&full, SUBJECT_HEADER), Some("orders.new"));
        assert_eq!(value(&full, REASON_HEADER), Some("no such order"));
        assert_eq!(value(&full, ID_HEADER), Some(""), "the message has none");
        let id_only = headers(&own, Detail::IdOnly);
        assert_eq!((value(&id_only, SUBJECT_HEADER), value(&id_only, REASON_HEADER)), (None, None));
        assert_eq!(id_only.len(), 3, "{id_only:?}");
        let omitted = headers(&HeaderMap::new(), Detail::PayloadOmitted(2_000_000));
        assert_eq!(value(&omitted, OMITTED_HEADER), Some("ORDERS/17, 2000000 bytes"));
        assert_eq!(value(&omitted, REASON_HEADER), Some("no such order"));
    }

    #[test]
    fn a_second_rejection_keeps_the_original_id_and_replaces_the_reason() {
        let mut own = HeaderMap::new();
        own.insert(NATS_MESSAGE_ID, "order-17");
        own.insert("Nats-TTL", "1h");
        let first = headers(&own, Detail::Full);
        let again = Source { stream: "ORDERS", sequence: 40, subject: "orders.new" };
        let second = dead_letter_headers(&first, &NATS_MESSAGE_ID, &again, "still none", Detail::Full).unwrap();
        assert_eq!((value(&second, ID_HEADER), value(&second, REASON_HEADER)), (Some("order-17"), Some("still none")));
        assert_eq!(value(&second, "Onlyonce-Nats-TTL"), Some("1h"));
        assert_eq!(value(&second, "Nats-Msg-Id"), Some("ORDERS.40.dead"));
        assert_eq!(second.len(), first.len());
    }
}
