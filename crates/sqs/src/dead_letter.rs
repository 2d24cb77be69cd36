//! The attributes of a dead letter of SQS: a pure function.

use std::collections::HashMap;

use aws_sdk_sqs::types::MessageAttributeValue;

/// Attribute of a dead letter: the id that the message's key was derived from, if it was not an attribute of the message.
pub const ID_ATTRIBUTE: &str = "Onlyonce-Id";
/// Attribute of a dead letter: the reason of the rejection.
pub const REASON_ATTRIBUTE: &str = "Onlyonce-Reason";

/// Maximum number of attributes of a message.
const MAX_ATTRIBUTES: usize = 10;
/// Bytes of a message with its attributes that every queue accepts unless its `MaximumMessageSize` is lowered.
const MAX_MESSAGE_BYTES: usize = 256 * 1_024;

/// The attributes of a dead letter: those of the message, and ours if they fit, the id before the reason. The service accepts
/// ten attributes, and they count towards the size of the message.
pub(crate) fn dead_letter_attributes(
    own: &HashMap<String, MessageAttributeValue>,
    body_bytes: usize,
    id: Option<&str>,
    reason: Option<&str>,
) -> HashMap<String, MessageAttributeValue> {
    let mut attributes = own.clone();
    // The reason of an earlier rejection.
    attributes.remove(REASON_ATTRIBUTE);
    let mut bytes = body_bytes + attributes.iter().map(|(name, value)| attribute_bytes(name, value)).sum::<usize>();
    for (name, value) in [(ID_ATTRIBUTE, id), (REASON_ATTRIBUTE, reason)] {
        let Some(value) = value.and_then(text) else { continue };
        let with_attribute = bytes + attribute_bytes(name, &value);
        let fits = attributes.len() < MAX_ATTRIBUTES && with_attribute <= MAX_MESSAGE_BYTES;
        if attributes.contains_key(name) || fits {
            attributes.insert(name.to_owned(), value);
            bytes = with_attribute;
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

    /// The attributes of ours in the dead letter of a message with text attributes of these names.
    fn ours(own: &[&str], body_bytes: usize, id: Option<&str>) -> Vec<&'static str> {
        let own: HashMap<_, _> = own.iter().map(|name| ((*name).to_owned(), text("value").unwrap())).collect();
        let attributes = dead_letter_attributes(&own, body_bytes, id, Some("no such order"));
        let kept = |(name, value)| name == REASON_ATTRIBUTE || attributes.get(name) == Some(value);
        assert!(own.iter().all(kept), "attributes of the user are kept");
        assert!(attributes.len() <= 10, "{attributes:?}");
        [ID_ATTRIBUTE, REASON_ATTRIBUTE].into_iter().filter(|name| attributes.contains_key(*name)).collect()
    }

    #[test]
    fn a_dead_letter_keeps_the_users_attributes_and_has_ours_if_they_fit() {
        let names = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"];
        assert_eq!(ours(&names[..8], 100, Some("4711")), [ID_ATTRIBUTE, REASON_ATTRIBUTE]);
        assert_eq!(ours(&names[..9], 100, Some("4711")), [ID_ATTRIBUTE]);
        assert_eq!(ours(&names[..9], 100, None), [REASON_ATTRIBUTE]);
        assert!(ours(&names, 100, Some("4711")).is_empty() && ours(&names, 100, None).is_empty());
        // The new reason replaces that of an earlier rejection.
        let again = [&names[..9], &[REASON_ATTRIBUTE]].concat();
        assert_eq!(ours(&again, 100, None), [REASON_ATTRIBUTE]);
        // Attributes count towards the size of the message.
        assert_eq!(ours(&[], MAX_MESSAGE_BYTES - 25, Some("4711")), [ID_ATTRIBUTE]);
        assert!(ours(&[], MAX_MESSAGE_BYTES, Some("4711")).is_empty());
    }
}
