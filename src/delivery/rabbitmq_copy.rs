//! The properties of a copy of a RabbitMQ message: a pure function.

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, ShortString};

/// The header of a dead letter that says why it is one.
pub const DEAD_WHY: &str = "onlyonce-why";
/// What begins the headers that a copy has beside its own.
const ADDED: &str = "onlyonce-";
/// Bytes of properties that fit in the smallest frame that a client and a broker may agree on, which has 4,096.
const FRAME_LEAST: usize = 4_000;

/// The properties of a copy. What is a directive to the broker, or checked against the connection, is moved to a header under
/// another name:
///
/// - `user_id`: the broker closes the channel of a publisher that has another name.
/// - `expiration`: the copy would leave the retry queue too early, and dead letters would expire.
/// - `reply_to`, where it asks for an answer on the publisher's own channel: the broker closes any other one.
/// - the headers `CC` and `BCC`: the copy would be routed to their queues, too.
///
/// What the broker notes about deliveries is left out, for it writes it again. With the `x-death` of an earlier expiry it
/// would take the way back from a retry queue for a cycle, and drop the message.
///
/// A frame must hold all properties. Ours are added where the smallest frame has room for all, or where they are no longer
/// than those that came.
pub(super) fn copied(own: &BasicProperties, why: Option<&str>) -> BasicProperties {
    let text = |text: &str| AMQPValue::LongString(text.into());
    let mut headers = FieldTable::default();
    // The reason first: it is what a person looks for, should there be no room for all.
    let mut ours: Vec<(String, AMQPValue)> = why.map(|why| (DEAD_WHY.to_owned(), text(why))).into_iter().collect();
    for (name, value) in own.headers().iter().flatten() {
        match name.as_str() {
            DEAD_WHY => {}
            "CC" | "BCC" => ours.push((format!("{ADDED}{name}"), value.clone())),
            name if BROKERS.iter().any(|start| name.starts_with(start)) => {}
            _ => {
                headers.insert(name.clone(), value.clone());
            }
        }
    }
    let asks_its_channel = |to: &&ShortString| to.as_str() == DIRECT_REPLY;
    let moved = [
        ("user-id", own.user_id().as_ref()),
        ("expiration", own.expiration().as_ref()),
        ("reply-to", own.reply_to().as_ref().filter(asks_its_channel)),
    ];
    ours.extend(moved.into_iter().filter_map(|(name, value)| Some((format!("{ADDED}{name}"), text(value?.as_str())))));
    let copy = plain(own, own.reply_to().as_ref().filter(|to| !asks_its_channel(to)));
    let room = size(own).max(FRAME_LEAST);
    let mut bytes = size(&copy) + table_size(&headers);
    for (name, value) in ours {
        let larger = bytes + 2 + name.len() + value_size(&value);
        if larger <= room && !headers.contains_key(&name) {
            headers.insert(name.into(), value);
            bytes = larger;
        }
    }
    if headers.inner().is_empty() { copy } else { copy.with_headers(headers) }
}

/// Headers that the broker writes itself, or what they begin with.
const BROKERS: [&str; 5] = ["x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-count"];
/// The queue that stands for the channel of whoever publishes.
const DIRECT_REPLY: &str = "amq.rabbitmq.reply-to";

/// The properties that say nothing to the broker that would be wrong for a copy: its priority and whether it outlives the
/// broker are among them. Without headers.
fn plain(own: &BasicProperties, reply_to: Option<&ShortString>) -> BasicProperties {
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

/// Bytes of properties in a frame, the largest that they can be.
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
    // The flags, the mode, the priority and the time.
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

    const WHY: &str = "no such order";

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

    /// All properties that there are.
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
    fn a_copy_has_no_property_that_the_broker_acts_upon_or_checks() {
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
            (DEAD_WHY, text("an earlier rejection")),
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
        for (why, more) in [(None, &[][..]), (Some(WHY), &[(DEAD_WHY, text(WHY))])] {
            let copy = copied(&own, why);
            assert_eq!(copy.headers().as_ref(), Some(&table(&[&moved[..], more].concat())));
            assert_eq!((copy.user_id(), copy.expiration()), (&None, &None));
            assert_eq!(copy, plain(&kept, kept.reply_to().as_ref()).with_headers(copy.headers().clone().unwrap()));
            assert_eq!(
                (copy.message_id(), copy.timestamp(), copy.kind()),
                (kept.message_id(), kept.timestamp(), kept.kind())
            );
            assert_eq!((copy.delivery_mode(), copy.priority()), (kept.delivery_mode(), kept.priority()));
            assert_eq!((copy.reply_to(), copy.app_id()), (kept.reply_to(), kept.app_id()));
        }
        // A copy of a copy, after it came back, is the same.
        let copy = copied(&own, None);
        assert_eq!(copied(&copy, None), copy);
        assert_eq!(copied(&BasicProperties::default(), None), BasicProperties::default());
    }

    #[test]
    fn a_reply_to_the_publishers_own_channel_is_moved_and_any_other_kept() {
        let own = BasicProperties::default().with_reply_to(DIRECT_REPLY.into());
        let copy = copied(&own, None);
        assert_eq!(copy.reply_to(), &None);
        assert_eq!(copy.headers().as_ref(), Some(&table(&[("onlyonce-reply-to", text(DIRECT_REPLY))])));
        // What the broker makes of it for the consumer may be answered from anywhere.
        let own = BasicProperties::default().with_reply_to("amq.rabbitmq.reply-to.g1h2AA5y".into());
        assert_eq!(copied(&own, None), own);
    }

    #[test]
    fn ours_are_left_out_where_the_smallest_frame_would_have_no_room_and_the_users_never() {
        let headers =
            |bytes: usize| BasicProperties::default().with_headers(table(&[("tenant", text(&"t".repeat(bytes)))]));
        let has = |bytes| copied(&headers(bytes), Some(WHY)).headers().as_ref().unwrap().contains_key(DEAD_WHY);
        assert!(has(10) && has(FRAME_LEAST - 100) && !has(FRAME_LEAST) && !has(100_000));
        let (large, small) = (headers(100_000).with_user_id("shop".into()), headers(10));
        let copy = copied(&large, Some(WHY));
        assert!(size(&copy) <= size(&large) && copy.headers().as_ref().unwrap().contains_key("tenant"));
        assert!(size(&copied(&small, Some(&"w".repeat(1_000)))) <= FRAME_LEAST);
    }
}
