//! The attributes of a dead letter of SQS: a pure function.

use std::collections::HashMap;

use aws_sdk_sqs::types::MessageAttributeValue;

/// The attribute of a dead letter that holds its key's id, where that was no attribute of the message.
pub const DEAD_ID: &str = "Onlyonce-Id";
/// The attribute of a dead letter that says why it is one.
pub const DEAD_WHY: &str = "Onlyonce-Why";

/// How many attributes a message may have.
const ATTRIBUTES: usize = 10;
/// Bytes of a message with its attributes that every queue takes which nobody has made narrower.
const MESSAGE_BYTES: usize = 256 * 1_024;
/// The attributes of a dead letter: those of the message, and ours as far as there is room for them, the id before the
/// reason. The service takes ten, and counts them to the size of the message.
pub(super) fn letter(
    own: &HashMap<String, MessageAttributeValue>,
    body_bytes: usize,
    id: Option<&str>,
    why: Option<&str>,
) -> HashMap<String, MessageAttributeValue> {
    let mut attributes = own.clone();
    // That of an earlier rejection.
    attributes.remove(DEAD_WHY);
    let mut bytes = body_bytes + attributes.iter().map(|(name, value)| attribute_bytes(name, value)).sum::<usize>();
    for (name, value) in [(DEAD_ID, id), (DEAD_WHY, why)] {
        let Some(value) = value.and_then(text) else { continue };
        let larger = bytes + attribute_bytes(name, &value);
        if attributes.contains_key(name) || (attributes.len() < ATTRIBUTES && larger <= MESSAGE_BYTES) {
            attributes.insert(name.to_owned(), value);
            bytes = larger;
        }
    }
    attributes
}

fn attribute_bytes(name: &str, value: &MessageAttributeValue) -> usize {
    let string = value.string_value().map_or(0, str::len);
    let binary = value.binary_value().map_or(0, |bytes| bytes.as_ref().len());
    name.len() + value.data_type().len() + string + binary
}

fn text(value: &str) -> Option<MessageAttributeValue> {
    MessageAttributeValue::builder().data_type("String").string_value(value).build().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One with text attributes of these names, and what is beside them in its letter.
    fn ours(own: &[&str], body_bytes: usize, id: Option<&str>) -> Vec<&'static str> {
        let own: HashMap<_, _> = own.iter().map(|name| ((*name).to_owned(), text("value").unwrap())).collect();
        let letter = letter(&own, body_bytes, id, Some("no such order"));
        assert!(
            own.iter().all(|(name, value)| name == DEAD_WHY || letter.get(name) == Some(value)),
            "the user's are kept"
        );
        assert!(letter.len() <= 10, "{letter:?}");
        [DEAD_ID, DEAD_WHY].into_iter().filter(|name| letter.contains_key(*name)).collect()
    }

    #[test]
    fn a_dead_letter_has_our_attributes_as_far_as_there_is_room_and_the_users_always() {
        let names = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"];
        assert_eq!(ours(&names[..8], 100, Some("4711")), [DEAD_ID, DEAD_WHY]);
        assert_eq!(ours(&names[..9], 100, Some("4711")), [DEAD_ID]);
        assert_eq!(ours(&names[..9], 100, None), [DEAD_WHY]);
        assert!(ours(&names, 100, Some("4711")).is_empty() && ours(&names, 100, None).is_empty());
        // One that was rejected before gives its place to the new reason.
        let again = [&names[..9], &[DEAD_WHY]].concat();
        assert_eq!(ours(&again, 100, None), [DEAD_WHY]);
        // The attributes count to the size of the message.
        assert_eq!(ours(&[], MESSAGE_BYTES - 25, Some("4711")), [DEAD_ID]);
        assert!(ours(&[], MESSAGE_BYTES, Some("4711")).is_empty());
    }
}
