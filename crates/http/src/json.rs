//! Canonical JSON (RFC 8785), only for texts whose canonical form is unambiguous.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::ser::{Serialize, Serializer};

/// The member name under which serde_json passes numbers to a visitor if some crate enables its feature
/// `arbitrary_precision`.
const ARBITRARY_PRECISION: &str = "$serde_json::private::Number";

/// The path from the outermost value to a nested one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MemberPath(Vec<String>);

impl MemberPath {
    /// Parses a JSON Pointer (RFC 6901) if the text begins with `/`. Other texts name a member of the outermost object.
    pub(crate) fn new(text: &str) -> Self {
        match text.strip_prefix('/') {
            Some(pointer) => {
                Self(pointer.split('/').map(|token| token.replace("~1", "/").replace("~0", "~")).collect())
            }
            None => Self(vec![text.to_owned()]),
        }
    }
}

/// Returns the canonical form of a JSON text without the ignored members. Returns `None` for invalid JSON, and for a text
/// whose canonical form could equal that of a different text: because of a duplicate member, or a number that a double does
/// not represent exactly.
///
/// Time and memory are linear in the length of the text, times the nesting depth (at most 128).
pub(crate) fn canonical(text: &[u8], ignored: &[MemberPath]) -> Option<Vec<u8>> {
    let mut json: Json = serde_json::from_slice(text).ok()?;
    // The text is valid JSON here, so a scan for literals suffices.
    if exact_member_count(text)? != json.member_count() {
        return None;
    }
    for path in ignored {
        json.remove(&path.0);
    }
    serde_json_canonicalizer::to_vec(&json).ok()
}

/// Counts the members of all objects in a valid JSON text, duplicates included. Returns `None` if a number is not exact.
fn exact_member_count(text: &[u8]) -> Option<usize> {
    let (mut members, mut at) = (0, 0);
    while let Some(byte) = text.get(at) {
        at += 1;
        match byte {
            b'"' => {
                while *text.get(at)? != b'"' {
                    at += if text.get(at) == Some(&b'\\') { 2 } else { 1 };
                }
                at += 1;
            }
            b':' => members += 1,
            b'-' | b'0'..=b'9' => {
                let rest = text.get(at - 1..)?;
                let is_number_byte =
                    |byte: &u8| byte.is_ascii_digit() || matches!(byte, b'+' | b'-' | b'.' | b'e' | b'E');
                let len = rest.iter().position(|byte| !is_number_byte(byte)).unwrap_or(rest.len());
                if !is_exact(std::str::from_utf8(rest.get(..len)?).ok()?) {
                    return None;
                }
                at += len - 1;
            }
            _ => {}
        }
    }
    Some(members)
}

/// Returns whether the canonical notation of the nearest double equals this number. Then no other number has the same
/// canonical form. Where two decimals of the same length are equally near, other libraries may choose another one.
fn is_exact(literal: &str) -> bool {
    if literal.len() <= 15 && literal.bytes().all(|byte| byte.is_ascii_digit()) {
        return true;
    }
    let Ok(double) = literal.parse::<f64>() else { return false };
    let decimal = Decimal::parse(literal);
    // The canonical form of minus zero is zero.
    decimal.as_ref().is_some_and(|number| !number.digits.is_empty() || !number.is_negative)
        && serde_json_canonicalizer::to_string(&double).is_ok_and(|canonical| decimal == Decimal::parse(&canonical))
}

/// A decimal number in normalized notation.
#[derive(PartialEq, Eq)]
struct Decimal {
    is_negative: bool,
    /// Without leading and trailing zeros. Empty for zero.
    digits: String,
    /// The power of ten of the last digit.
    exponent: i64,
}

impl Decimal {
    fn parse(literal: &str) -> Option<Self> {
        let is_negative = literal.starts_with('-');
        let (mantissa, exponent) =
            literal.trim_start_matches('-').split_once(['e', 'E']).unwrap_or((literal.trim_start_matches('-'), "0"));
        let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
        let all = [whole, fraction].concat();
        let digits = all.trim_start_matches('0');
        let digits_len = digits.len();
        let digits = digits.trim_end_matches('0').to_owned();
        if digits.is_empty() {
            return Some(Self { is_negative, digits, exponent: 0 });
        }
        let exponent = exponent.parse::<i64>().ok()?;
        let exponent = exponent.checked_sub(i64::try_from(fraction.len()).ok()?)?;
        let exponent = exponent.checked_add(i64::try_from(digits_len - digits.len()).ok()?)?;
        Some(Self { is_negative, digits, exponent })
    }
}

/// A JSON value. `serde_json::Value` treats some member names specially in some builds, and keeps only the last of duplicate
/// members.
enum Json {
    Null,
    Bool(bool),
    Number(f64),
    String(String),
    Array(Vec<Json>),
    Object(BTreeMap<String, Json>),
}

impl Json {
    fn member_count(&self) -> usize {
        match self {
            Self::Array(values) => values.iter().map(Self::member_count).sum(),
            Self::Object(members) => members.values().map(|value| 1 + value.member_count()).sum(),
            Self::Null | Self::Bool(_) | Self::Number(_) | Self::String(_) => 0,
        }
    }

    /// Removes a member. A removed array element becomes null.
    fn remove(&mut self, path: &[String]) {
        let Some((first, rest)) = path.split_first() else { return };
        match self {
            Self::Object(members) if rest.is_empty() => {
                members.remove(first);
            }
            Self::Object(members) => {
                if let Some(value) = members.get_mut(first) {
                    value.remove(rest);
                }
            }
            Self::Array(values) => {
                let Some(value) = first.parse::<usize>().ok().and_then(|at| values.get_mut(at)) else { return };
                if rest.is_empty() {
                    *value = Self::Null;
                } else {
                    value.remove(rest);
                }
            }
            Self::Null | Self::Bool(_) | Self::Number(_) | Self::String(_) => {}
        }
    }
}

impl Serialize for Json {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Null => serializer.serialize_unit(),
            Self::Bool(value) => serializer.serialize_bool(*value),
            Self::Number(value) => serializer.serialize_f64(*value),
            Self::String(value) => serializer.serialize_str(value),
            Self::Array(values) => serializer.collect_seq(values),
            Self::Object(members) => serializer.collect_map(members),
        }
    }
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(JsonVisitor)
    }
}

struct JsonVisitor;

impl<'de> Visitor<'de> for JsonVisitor {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON without duplicate members")
    }

    fn visit_unit<E>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Json, E> {
        Ok(Json::Bool(value))
    }

    // `exact_member_count` rejects integers that a double does not represent exactly.
    #[allow(clippy::cast_precision_loss)]
    fn visit_u64<E>(self, value: u64) -> Result<Json, E> {
        Ok(Json::Number(value as f64))
    }

    #[allow(clippy::cast_precision_loss)]
    fn visit_i64<E>(self, value: i64) -> Result<Json, E> {
        Ok(Json::Number(value as f64))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Json, E> {
        Ok(Json::Number(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Json, E> {
        Ok(Json::String(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Json, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = list.next_element()? {
            values.push(value);
        }
        Ok(Json::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Json, A::Error> {
        let mut members = BTreeMap::new();
        while let Some(name) = object.next_key::<String>()? {
            // A real member of this name makes the member counts differ, so `canonical` rejects the text.
            if name == ARBITRARY_PRECISION {
                let number = object.next_value::<String>()?.parse().map_err(de::Error::custom)?;
                return Ok(Json::Number(number));
            }
            match members.entry(name) {
                Entry::Vacant(free) => drop(free.insert(object.next_value()?)),
                Entry::Occupied(_) => return Err(de::Error::custom("duplicate member")),
            }
        }
        Ok(Json::Object(members))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn canonical_text(text: &str) -> Option<String> {
        canonical(text.as_bytes(), &[]).map(|bytes| String::from_utf8(bytes).unwrap())
    }

    #[test]
    fn order_whitespace_escapes_and_number_notation_do_not_change_the_canonical_form() {
        let expected = r#"{"a":[1,2.5,100,0.1,-3],"b":{"c":null,"d":"A/é"}}"#;
        assert_eq!(canonical_text(expected).unwrap(), expected);
        for other in [
            r#" {"b": {"d": "\u0041\/\u00e9", "c": null}, "a": [1, 2.5, 100, 0.1, -3]} "#,
            r#"{"a":[1.0,2.50,1e2,1E-1,-3.0e+0],"b":{"c":null,"d":"A/é"}}"#,
        ] {
            assert_eq!(canonical_text(other).unwrap(), expected, "{other}");
        }
        // Names are sorted by UTF-16 code units.
        assert_eq!(canonical_text("{\"\u{e000}\":1,\"\u{10000}\":2}").unwrap(), "{\"\u{10000}\":2,\"\u{e000}\":1}");
    }

    #[test]
    fn an_ambiguous_or_invalid_text_has_no_canonical_form() {
        for rejected in [
            // Numbers that a double does not represent exactly, and minus zero.
            "9007199254740993",
            "18446744073709551615",
            "[1, 123456789012345678]",
            "0.1000000000000000055",
            "1e-400",
            "1e400",
            "1e99999999999999999999",
            "0.1e-9223372036854775808",
            "-0",
            "-0.0e5",
            // Duplicate members, also with different escapes.
            r#"{"a":1,"a":1}"#,
            r#"{"a":1,"\u0061":2}"#,
            r#"[{"b":{"a":1,"a":2}}]"#,
            // A name with a special meaning to serde_json in some builds.
            r#"{"$serde_json::private::Number":"1"}"#,
            // Invalid JSON.
            "",
            " ",
            "{",
            "{'a':1}",
            "[1,]",
            "01",
            "NaN",
            "\"\\ud800\"",
            "{} {}",
            "\u{feff}{}",
        ] {
            assert_eq!(canonical_text(rejected), None, "{rejected}");
        }
        assert_eq!(canonical(b"\"\xff\"", &[]), None);
        assert!(
            canonical_text(r#"{"$serde_json::private::RawValue":"1"}"#).unwrap().contains("RawValue"),
            "an ordinary member"
        );
        let nested = |depth| ["[".repeat(depth), "]".repeat(depth)].concat();
        assert!(
            canonical_text(&nested(127)).is_some()
                && canonical_text(&nested(200)).is_none()
                && canonical_text(&nested(1_000_000)).is_none()
        );
        let long = format!("1.{}", "0".repeat(100_000));
        assert_eq!(canonical_text(&long).unwrap(), "1");
        assert_eq!(canonical_text(&format!("{long}1")), None);
    }

    #[test]
    fn the_largest_and_the_smallest_doubles_are_exact() {
        for exact in ["9007199254740992", "5e-324", "1.7976931348623157e308", "0", "0.0", "-1", "123456789012345"] {
            assert!(is_exact(exact), "{exact}");
        }
        // As far from the double as 631172890748395.3, and the even one of the two.
        let even = "-631172890748395.2";
        assert_eq!(canonical_text(even).as_deref(), Some(even));
        assert_eq!(canonical_text("-631172890748395.3"), None);
        assert_eq!(canonical_text("0.30000000000000004").unwrap(), "0.30000000000000004");
        assert_ne!(canonical_text("0.30000000000000004"), canonical_text("0.3"));
    }

    #[test]
    fn ignored_members_are_removed_by_name_or_pointer() {
        let text = br#"{"id":1,"list":[{"id":2},"x"],"a/b":3,"m~n":4,"in":{"id":5}}"#;
        for (path, expected) in [
            ("id", r#"{"a/b":3,"in":{"id":5},"list":[{"id":2},"x"],"m~n":4}"#),
            ("/id", r#"{"a/b":3,"in":{"id":5},"list":[{"id":2},"x"],"m~n":4}"#),
            ("/in/id", r#"{"a/b":3,"id":1,"in":{},"list":[{"id":2},"x"],"m~n":4}"#),
            ("/list/0/id", r#"{"a/b":3,"id":1,"in":{"id":5},"list":[{},"x"],"m~n":4}"#),
            ("/list/0", r#"{"a/b":3,"id":1,"in":{"id":5},"list":[null,"x"],"m~n":4}"#),
            ("/a~1b", r#"{"id":1,"in":{"id":5},"list":[{"id":2},"x"],"m~n":4}"#),
            ("m~n", r#"{"a/b":3,"id":1,"in":{"id":5},"list":[{"id":2},"x"]}"#),
            ("/m~0n", r#"{"a/b":3,"id":1,"in":{"id":5},"list":[{"id":2},"x"]}"#),
        ] {
            let bytes = canonical(text, &[MemberPath::new(path)]).unwrap();
            assert_eq!(String::from_utf8(bytes).unwrap(), expected, "{path}");
        }
        let whole = canonical(text, &[]);
        for missing in ["", "/", "/nothing", "/list/7", "/list/x", "/list/1/id", "/id/x", "in/id"] {
            assert_eq!(canonical(text, &[MemberPath::new(missing)]), whole, "{missing}");
        }
    }

    fn any_json() -> impl Strategy<Value = serde_json::Value> {
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<bool>().prop_map(Into::into),
            any::<i32>().prop_map(Into::into),
            any::<f64>().prop_map(Into::into),
            ".{0,4}".prop_map(Into::into),
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Into::into),
                proptest::collection::vec((".{0,2}", inner), 0..4)
                    .prop_map(|members| serde_json::Value::Object(members.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn the_canonical_form_is_idempotent_and_keeps_the_value(json in any_json(), pretty: bool) {
            let text = if pretty { serde_json::to_string_pretty(&json) } else { serde_json::to_string(&json) }.unwrap();
            if let Some(form) = canonical_text(&text) {
                prop_assert_eq!(canonical_text(&form), Some(form.clone()));
                let again: serde_json::Value = serde_json::from_str(&form).unwrap();
                // 1.0 and 1 are equal.
                prop_assert_eq!(canonical_text(&again.to_string()), Some(form));
            } else {
                prop_assert!(text.contains("-0.0"), "{}", text);
            }
        }

        #[test]
        fn numbers_have_the_same_canonical_form_only_if_they_are_equal(
            whole in "(0|[1-9][0-9]{0,18})", fraction in "(\\.[0-9]{1,18})?", exponent in "(e-?[0-9]{1,2})?",
            other_fraction in "(\\.[0-9]{1,18})?",
        ) {
            let (one, other) = (format!("{whole}{fraction}{exponent}"), format!("{whole}{other_fraction}{exponent}"));
            if let (Some(one_form), Some(other_form)) = (canonical_text(&one), canonical_text(&other)) {
                let digits = |fraction: &str| fraction.trim_end_matches('0').trim_start_matches('.').to_owned();
                prop_assert_eq!(one_form == other_form, digits(&fraction) == digits(&other_fraction), "{} {}", one, other);
            }
        }

        #[test]
        fn arbitrary_bytes_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = canonical(&bytes, &[MemberPath::new("/0/a")]);
        }

        #[test]
        fn json_like_texts_do_not_panic(text in r#"[\[\]{}:,"\\0-9eE+.truefalsn -]{0,40}"#) {
            let _ = canonical(text.as_bytes(), &[MemberPath::new("/0/a")]);
            let _ = exact_member_count(text.as_bytes());
        }
    }
}
