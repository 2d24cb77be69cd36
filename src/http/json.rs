//! JSON by its meaning: the canonical form of RFC 8785, where that form is certain not to make two requests one.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::ser::{Serialize, Serializer};

/// The name by which serde_json shows a number to a visitor where some crate of the build has turned on its feature
/// `arbitrary_precision`.
const ARBITRARY: &str = "$serde_json::private::Number";

/// The way from the outermost value to one inside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Path(Vec<String>);

impl Path {
    /// A JSON Pointer (RFC 6901) where the text begins with `/`, else the name of a member of the outermost object.
    pub(super) fn new(text: &str) -> Self {
        match text.strip_prefix('/') {
            Some(pointer) => {
                Self(pointer.split('/').map(|token| token.replace("~1", "/").replace("~0", "~")).collect())
            }
            None => Self(vec![text.to_owned()]),
        }
    }
}

/// The canonical form of a JSON text without some of its members. `None` where it is not JSON, or where the form could be
/// that of a text with another meaning as well: a member that comes twice, or a number that a double does not hold as it
/// is written.
///
/// Time and memory are linear in the text's length, times its depth (128 at most) for what is deep inside.
pub(super) fn canonical(text: &[u8], left_out: &[Path]) -> Option<Vec<u8>> {
    let mut json: Json = serde_json::from_slice(text).ok()?;
    // The parser has said that it is JSON: all that is left is to look at the literals.
    if members_of(text)? != json.members() {
        return None;
    }
    for path in left_out {
        json.remove(&path.0);
    }
    serde_json_canonicalizer::to_vec(&json).ok()
}

/// How many members the objects of a valid JSON text have. `None` where one of its numbers is not exact.
fn members_of(text: &[u8]) -> Option<usize> {
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
                let is_part = |byte: &u8| byte.is_ascii_digit() || matches!(byte, b'+' | b'-' | b'.' | b'e' | b'E');
                let len = rest.iter().position(|byte| !is_part(byte)).unwrap_or(rest.len());
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

/// Whether the shortest way to write the nearest double is this very number: then no other number shares its form.
fn is_exact(literal: &str) -> bool {
    if literal.len() <= 15 && literal.bytes().all(|byte| byte.is_ascii_digit()) {
        return true;
    }
    let Ok(double) = literal.parse::<f64>() else { return false };
    let wanted = Decimal::of(literal);
    // Minus zero is written as zero.
    wanted.as_ref().is_some_and(|number| !number.digits.is_empty() || !number.is_negative)
        && wanted == Decimal::of(&format!("{double:e}"))
}

/// A decimal number, written in one way.
#[derive(PartialEq, Eq)]
struct Decimal {
    is_negative: bool,
    /// Without zeros at either end. Empty for zero.
    digits: String,
    /// The power of ten of the last digit.
    exponent: i64,
}

impl Decimal {
    fn of(literal: &str) -> Option<Self> {
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

/// A JSON value. serde_json's own has members of special meaning in some builds, and takes the last of two that have the
/// same name.
enum Json {
    Null,
    Bool(bool),
    Number(f64),
    Text(String),
    List(Vec<Json>),
    Object(BTreeMap<String, Json>),
}

impl Json {
    fn members(&self) -> usize {
        match self {
            Self::List(values) => values.iter().map(Self::members).sum(),
            Self::Object(members) => members.values().map(|value| 1 + value.members()).sum(),
            Self::Null | Self::Bool(_) | Self::Number(_) | Self::Text(_) => 0,
        }
    }

    /// Removes a member. A list keeps the place of a value that is removed from it, as null.
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
            Self::List(values) => {
                let Some(value) = first.parse::<usize>().ok().and_then(|at| values.get_mut(at)) else { return };
                if rest.is_empty() {
                    *value = Self::Null;
                } else {
                    value.remove(rest);
                }
            }
            Self::Null | Self::Bool(_) | Self::Number(_) | Self::Text(_) => {}
        }
    }
}

impl Serialize for Json {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Null => serializer.serialize_unit(),
            Self::Bool(value) => serializer.serialize_bool(*value),
            Self::Number(value) => serializer.serialize_f64(*value),
            Self::Text(value) => serializer.serialize_str(value),
            Self::List(values) => serializer.collect_seq(values),
            Self::Object(members) => serializer.collect_map(members),
        }
    }
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Values)
    }
}

struct Values;

impl<'de> Visitor<'de> for Values {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON without members of one name")
    }

    fn visit_unit<E>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Json, E> {
        Ok(Json::Bool(value))
    }

    // What a double does not hold was found in the text.
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
        Ok(Json::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Json, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = list.next_element()? {
            values.push(value);
        }
        Ok(Json::List(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Json, A::Error> {
        let mut members = BTreeMap::new();
        while let Some(name) = object.next_key::<String>()? {
            // An object that really has such a member has a colon more in its text, and is found by that.
            if name == ARBITRARY {
                let number = object.next_value::<String>()?.parse().map_err(de::Error::custom)?;
                return Ok(Json::Number(number));
            }
            match members.entry(name) {
                Entry::Vacant(free) => drop(free.insert(object.next_value()?)),
                Entry::Occupied(_) => return Err(de::Error::custom("a member comes twice")),
            }
        }
        Ok(Json::Object(members))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(text: &str) -> Option<String> {
        canonical(text.as_bytes(), &[]).map(|bytes| String::from_utf8(bytes).unwrap())
    }

    #[test]
    fn order_space_escapes_and_the_way_a_number_is_written_mean_nothing() {
        let same = r#"{"a":[1,2.5,100,0.1,-3],"b":{"c":null,"d":"A/é"}}"#;
        assert_eq!(of(same).unwrap(), same);
        for other in [
            r#" {"b": {"d": "\u0041\/\u00e9", "c": null}, "a": [1, 2.5, 100, 0.1, -3]} "#,
            r#"{"a":[1.0,2.50,1e2,1E-1,-3.0e+0],"b":{"c":null,"d":"A/é"}}"#,
        ] {
            assert_eq!(of(other).unwrap(), same, "{other}");
        }
        // Names are sorted by their UTF-16 units.
        assert_eq!(of("{\"\u{e000}\":1,\"\u{10000}\":2}").unwrap(), "{\"\u{10000}\":2,\"\u{e000}\":1}");
    }

    #[test]
    fn what_could_be_another_text_as_well_has_no_canonical_form() {
        for uncertain in [
            // Numbers that a double rounds, and minus zero.
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
            // Members of one name, also where they are written in two ways.
            r#"{"a":1,"a":1}"#,
            r#"{"a":1,"\u0061":2}"#,
            r#"[{"b":{"a":1,"a":2}}]"#,
            // What serde_json means something else by in some builds.
            r#"{"$serde_json::private::Number":"1"}"#,
            // No JSON.
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
            assert_eq!(of(uncertain), None, "{uncertain}");
        }
        assert_eq!(canonical(b"\"\xff\"", &[]), None);
        assert!(of(r#"{"$serde_json::private::RawValue":"1"}"#).unwrap().contains("RawValue"), "a member as any other");
        let nested = |depth| ["[".repeat(depth), "]".repeat(depth)].concat();
        assert!(of(&nested(127)).is_some() && of(&nested(200)).is_none() && of(&nested(1_000_000)).is_none());
        let long = format!("1.{}", "0".repeat(100_000));
        assert_eq!(of(&long).unwrap(), "1");
        assert_eq!(of(&format!("{long}1")), None);
    }

    #[test]
    fn the_largest_and_the_smallest_doubles_are_exact() {
        for exact in ["9007199254740992", "5e-324", "1.7976931348623157e308", "0", "0.0", "-1", "123456789012345"] {
            assert!(is_exact(exact), "{exact}");
        }
        assert_eq!(of("0.30000000000000004").unwrap(), "0.30000000000000004");
        assert_ne!(of("0.30000000000000004"), of("0.3"));
    }

    #[test]
    fn members_are_left_out_by_name_or_pointer_and_no_others() {
        let text = br#"{"id":1,"list":[{"id":2},"x"],"a/b":3,"m~n":4,"in":{"id":5}}"#;
        for (path, left) in [
            ("id", r#"{"a/b":3,"in":{"id":5},"list":[{"id":2},"x"],"m~n":4}"#),
            ("/id", r#"{"a/b":3,"in":{"id":5},"list":[{"id":2},"x"],"m~n":4}"#),
            ("/in/id", r#"{"a/b":3,"id":1,"in":{},"list":[{"id":2},"x"],"m~n":4}"#),
            ("/list/0/id", r#"{"a/b":3,"id":1,"in":{"id":5},"list":[{},"x"],"m~n":4}"#),
            ("/list/0", r#"{"a/b":3,"id":1,"in":{"id":5},"list":[null,"x"],"m~n":4}"#),
            ("/a~1b", r#"{"id":1,"in":{"id":5},"list":[{"id":2},"x"],"m~n":4}"#),
            ("m~n", r#"{"a/b":3,"id":1,"in":{"id":5},"list":[{"id":2},"x"]}"#),
            ("/m~0n", r#"{"a/b":3,"id":1,"in":{"id":5},"list":[{"id":2},"x"]}"#),
        ] {
            let bytes = canonical(text, &[Path::new(path)]).unwrap();
            assert_eq!(String::from_utf8(bytes).unwrap(), left, "{path}");
        }
        let whole = canonical(text, &[]);
        for nothing in ["", "/", "/nothing", "/list/7", "/list/x", "/list/1/id", "/id/x", "in/id"] {
            assert_eq!(canonical(text, &[Path::new(nothing)]), whole, "{nothing}");
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
        fn the_canonical_form_means_what_the_text_means(json in any_json(), pretty: bool) {
            let text = if pretty { serde_json::to_string_pretty(&json) } else { serde_json::to_string(&json) }.unwrap();
            if let Some(form) = of(&text) {
                prop_assert_eq!(of(&form), Some(form.clone()));
                let again: serde_json::Value = serde_json::from_str(&form).unwrap();
                // 1.0 and 1 are one number.
                prop_assert_eq!(of(&again.to_string()), Some(form));
            } else {
                prop_assert!(text.contains("-0.0"), "{}", text);
            }
        }

        #[test]
        fn numbers_share_a_form_only_where_they_are_equal(
            whole in "(0|[1-9][0-9]{0,18})", fraction in "(\\.[0-9]{1,18})?", exponent in "(e-?[0-9]{1,2})?",
            other_fraction in "(\\.[0-9]{1,18})?",
        ) {
            let (one, other) = (format!("{whole}{fraction}{exponent}"), format!("{whole}{other_fraction}{exponent}"));
            if let (Some(one_form), Some(other_form)) = (of(&one), of(&other)) {
                let digits = |fraction: &str| fraction.trim_end_matches('0').trim_start_matches('.').to_owned();
                prop_assert_eq!(one_form == other_form, digits(&fraction) == digits(&other_fraction), "{} {}", one, other);
            }
        }

        #[test]
        fn any_bytes_have_a_form_or_none_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = canonical(&bytes, &[Path::new("/0/a")]);
        }

        #[test]
        fn texts_like_json_have_a_form_or_none_without_a_panic(text in r#"[\[\]{}:,"\\0-9eE+.truefalsn -]{0,40}"#) {
            let _ = canonical(text.as_bytes(), &[Path::new("/0/a")]);
            let _ = members_of(text.as_bytes());
        }
    }
}
