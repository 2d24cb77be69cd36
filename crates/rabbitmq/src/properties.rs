//! The properties of a copy of a RabbitMQ message: a pure function.

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, ShortString};

/// Header of a dead letter: the reason of the rejection.
pub const REASON_HEADER: &str = "onlyonce-reason";
/// Prefix of the headers that a copy adds.
const PREFIX: &str = "onlyonce-";
/// Bytes of properties that fit in a frame of 4,096 bytes, the smallest that the protocol allows.
const MIN_FRAME_PROPERTIES: usize = 4_000;

/// The properties of a copy. Properties that are directives to the broker, or that it checks against the connection, become
/// headers with a prefix:
///
/// - `user_id`: the broker closes the channel of a publisher with another user.
/// - `expiration`: the copy would leave the retry queue too early, and dead letters would expire.
/// - `reply_to` with the direct reply-to queue: the broker closes a channel without such a consumer.
/// - the headers `CC` and `BCC`: the broker would route the copy to these queues as well.
///
/// Headers that the broker writes about deliveries are left out. With the `x-death` of an earlier expiry the broker would
/// take the return from a retry queue for a cycle, and drop the message.
///
/// All properties must fit in one frame. Our headers are added if all properties fit in the smallest frame or are no larger
/// than the original ones.
pub(crate) fn copy_properties(own: &BasicProperties, reason: Option<&str>) -> BasicProperties {
    let text = |text: &str| AMQPValue::LongString(text.into());
    let mut headers = FieldTable::default();
    // The reason first: it is the most useful one if not all fit.
    let mut ours: Vec<(String, AMQPValue)> =
        reason.map(|reason| (REASON_HEADER.to_owned(), text(reason))).into_iter().collect();
    for (name, value) in own.headers().iter().flatten() {
        match name.as_str() {
            REASON_HEADER => {}
            "CC" | "BCC" => ours.push((format!("{PREFIX}{name}"), value.clone())),
            name if BROKER_PREFIXES.iter().any(|start| name.starts_with(start)) => {}
            _ => {
                headers.insert(name.clone(), value.clone());
            }
        }
    }
    let is_direct_reply = |to: &&ShortString| to.as_str() == DIRECT_REPLY;
    let moved = [
        ("user-id", own.user_id().as_ref()),
        ("expiration", own.expiration().as_ref()),
        ("reply-to", own.reply_to().as_ref().filter(is_direct_reply)),
    ];
    ours.extend(moved.into_iter().filter_map(|(name, value)| Some((format!("{PREFIX}{name}"), text(value?.as_str())))));
    let copy = plain_properties(own, own.reply_to().as_ref().filter(|to| !is_direct_reply(to)));
    let max_size = size(own).max(MIN_FRAME_PROPERTIES);
    let mut bytes = size(&copy) + table_size(&headers);
    for (name, value) in ours {
        let with_header = bytes + 2 + name.len() + value_size(&value);
        if with_header <= max_size && !headers.contains_key(&name) {
            headers.insert(name.into(), value);
            bytes = with_header;
        }
    }
    if headers.inner().is_empty() { copy } else { copy.with_headers(headers) }
}

/// Prefixes of the headers that the broker writes.
const BROKER_PREFIXES: [&str; 5] =
    ["x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-count"];
/// The pseudo-queue for replies on the publisher's own channel.
const DIRECT_REPLY: &str = "amq.rabbitmq.reply-to";

/// The properties that mean the same for a copy, such as the priority and the delivery mode. Without headers.
fn plain_properties(own: &BasicProperties, reply_to: Option<&ShortString>) -> BasicProperties {
    type Text = (fn(BasicProperties, ShortString) -> BasicProperties, Option<ShortString>);
    let texts: [Text; 8] = [
        (BasicProperties::with_content_type, own.content_type().clone()),
        (BasicProperties::with_content_encoding, own.content_encoding().clone()),
        (BasicProperties::with_correlation_id, own.correlation_id().clone()),
        (BasicProperties::with_message_id, own.message_id().clone()),
        (BasicProperties::with_type, own.kind().clone()),
        (BasicProperties::with_app_id, own.app_id().clone()),
        (BasicProperties::with_cluster_id, own.cluster_id().clone()),
        (BasicProperties::with_reply_to, reply_to.cloned()),
    ];
    let set = |copy: BasicProperties, (with, text): Text| match text {
        Some(text) => with(copy, text),
        None => copy,
    };
    let mut copy = texts.into_iter().fold(BasicProperties::default(), set);
    if let Some(mode) = own.delivery_mode() {
        copy = copy.with_delivery_mode(*mode);
    }
    if let Some(priority) = own.priority() {
        copy = copy.with_priority(*priority);
    }
    if let Some(seconds) = own.timestamp() {
        copy = copy.with_timestamp(*seconds);
    }
    copy
}

/// Upper bound of the size of properties in a frame, in bytes.
fn size(properties: &BasicProperties) -> usize {
    let texts = [
        properties.content_type(),
        properties.content_encoding(),
        properties.correlation_id(),
        properties.reply_to(),
        properties.expiration(),
        properties.message_id(),
        properties.kind(),
        properties.user_id(),
        properties.app_id(),
        properties.cluster_id(),
    ];
    let texts: usize = texts.into_iter().flatten().map(|text| 1 + text.as_str().len()).sum();
    // Flags, delivery mode, priority and timestamp.
    12 + texts + properties.headers().as_ref().map_or(0, table_size)
}

fn table_size(table: &FieldTable) -> usize {
    4 + table.into_iter().map(|(name, value)| 1 + name.as_str().len() + 1 + value_size(value)).sum::<usize>()
}

fn value_size(value: &AMQPValue) -> usize {
    match value {
        AMQPValue::ShortString(text) => 1 + text.as_str().len(),
        AMQPValue::LongString(text) => 4 + text.as_bytes().len(),
        AMQPValue::ByteArray(bytes) => 4 + bytes.len(),
        AMQPValue::FieldTable(table) => table_size(table),
        AMQPValue::FieldArray(values) => 4 + values.as_slice().iter().map(|value| 1 + value_size(value)).sum::<usize>(),
        // Numbers.
        _ => 9,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REASON: &str = "no such order";

    fn text(text: &str) -> AMQPValue {
        AMQPValue::LongString(text.into())
    }

    fn table(entries: &[(&str, AMQPValue)]) -> FieldTable {
        let mut table = FieldTable::default();
        for (name, value) in entries {
            table.insert((*name).into(), value.clone());
        }
        table
    }

    /// Every property is set.
    fn full() -> BasicProperties {
        BasicProperties::default()
            .with_content_type("application/json".into())
            .with_content_encoding("gzip".into())
            .with_delivery_mode(2)
            .with_priority(7)
            .with_correlation_id("c".into())
            .with_reply_to("answers".into())
            .with_expiration("100".into())
            .with_message_id("order-1".into())
            .with_timestamp(1_700_000_000)
            .with_type("order".into())
            .with_user_id("shop".into())
            .with_app_id("web".into())
            .with_cluster_id("one".into())
    }

    #[test]
    fn a_copy_has_no_property_that_the_broker_acts_on_or_checks() {
        let cc = AMQPValue::FieldArray(vec![text("audit")].into());
        let death = AMQPValue::FieldArray(vec![AMQPValue::FieldTable(table(&[("queue", text("orders"))]))].into());
        let own = full().with_headers(table(&[
            ("tenant", text("a")),
            ("x-delay", AMQPValue::LongInt(5)),
            ("CC", cc.clone()),
            ("BCC", cc.clone()),
            ("x-death", death),
            ("x-first-death-queue", text("orders")),
            ("x-first-death-reason", text("expired")),
            ("x-last-death-exchange", text("")),
            ("x-delivery-count", AMQPValue::LongLongInt(3)),
            (REASON_HEADER, text("an earlier rejection")),
        ]));
        let moved = [
            ("tenant", text("a")),
            ("x-delay", AMQPValue::LongInt(5)),
            ("onlyonce-CC", cc.clone()),
            ("onlyonce-BCC", cc),
            ("onlyonce-user-id", text("shop")),
            ("onlyonce-expiration", text("100")),
        ];
        let kept = full();
        for (reason, more) in [(None, &[][..]), (Some(REASON), &[(REASON_HEADER, text(REASON))])] {
            let copy = copy_properties(&own, reason);
            assert_eq!(copy.headers().as_ref(), Some(&table(&[&moved[..], more].concat())));
            assert_eq!((copy.user_id(), copy.expiration()), (&None, &None));
            assert_eq!(
                copy,
                plain_properties(&kept, kept.reply_to().as_ref()).with_headers(copy.headers().clone().unwrap())
            );
            assert_eq!(
                (copy.message_id(), copy.timestamp(), copy.kind()),
                (kept.message_id(), kept.timestamp(), kept.kind())
            );
            assert_eq!((copy.delivery_mode(), copy.priority()), (kept.delivery_mode(), kept.priority()));
            assert_eq!((copy.reply_to(), copy.app_id()), (kept.reply_to(), kept.app_id()));
        }
        // Copying a copy changes nothing.
        let copy = copy_properties(&own, None);
        assert_eq!(copy_properties(&copy, None), copy);
        assert_eq!(copy_properties(&BasicProperties::default(), None), BasicProperties::default());
    }

    #[test]
    fn a_direct_reply_to_is_moved_to_a_header_and_any_other_is_kept() {
        let own = BasicProperties::default().with_reply_to(DIRECT_REPLY.into());
        let copy = copy_properties(&own, None);
        assert_eq!(copy.reply_to(), &None);
        assert_eq!(copy.headers().as_ref(), Some(&table(&[("onlyonce-reply-to", text(DIRECT_REPLY))])));
        // The address that the broker gives to the consumer works from any channel.
        let own = BasicProperties::default().with_reply_to("amq.rabbitmq.reply-to.g1h2AA5y".into());
        assert_eq!(copy_properties(&own, None), own);
    }

    #[test]
    fn our_headers_are_left_out_if_the_smallest_frame_cannot_hold_them_and_the_users_never() {
        let headers =
            |bytes: usize| BasicProperties::default().with_headers(table(&[("tenant", text(&"t".repeat(bytes)))]));
        let has = |bytes| {
            copy_properties(&headers(bytes), Some(REASON)).headers().as_ref().unwrap().contains_key(REASON_HEADER)
        };
        assert!(has(10) && has(MIN_FRAME_PROPERTIES - 100) && !has(MIN_FRAME_PROPERTIES) && !has(100_000));
        let (large, small) = (headers(100_000).with_user_id("shop".into()), headers(10));
        let copy = copy_properties(&large, Some(REASON));
        assert!(size(&copy) <= size(&large) && copy.headers().as_ref().unwrap().contains_key("tenant"));
        assert!(size(&copy_properties(&small, Some(&"w".repeat(1_000)))) <= MIN_FRAME_PROPERTIES);
    }
}
