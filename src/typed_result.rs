//! Typed results: JSON, by serde.
//!
//! JSON names its fields, so that a result can be read by a type that has changed since, by any other program and by an
//! operator; and serde's untagged, flattened and skipped forms need a format of that kind. It has gaps all the same, and so
//! have types whose two halves of serde do not match: a result is stored only if it reads back as what it was.

use std::fmt;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// A typed result as bytes. Refused where it could not be read back, or would be read back as another value.
pub(crate) fn encode<T: Serialize + DeserializeOwned>(result: &T) -> Result<Vec<u8>, String> {
    let bytes = serde_json::to_vec(result).map_err(|error| error.to_string())?;
    let read: T = decode(&bytes).map_err(|error| format!("it could not be read back, {error}"))?;
    match (Shown::of(result), Shown::of(&read)) {
        (Some(before), Some(after)) if before == after => Ok(bytes),
        _ => Err("it would be read back as another value, as JSON has no NaN and no `Some(None)`; \
                  encode it yourself and give the bytes to `complete`"
            .to_owned()),
    }
}

/// A typed result from bytes, all of which must have been used.
pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    serde_json::from_slice(bytes).map_err(|error| error.to_string())
}

/// How often each byte is in what a value shows of itself to serde, as [`fmt::Debug`] would write it. Not their order: a map
/// or a set that was read back has another.
#[derive(PartialEq, Eq)]
struct Shown([u64; 256]);

impl Shown {
    fn of(value: &impl Serialize) -> Option<Self> {
        let mut shown = Self([0; 256]);
        serde_fmt::to_writer(value, &mut shown).ok()?;
        Some(shown)
    }
}

impl fmt::Write for Shown {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if let Some(count) = self.0.get_mut(usize::from(byte)) {
                *count += 1;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashMap, HashSet};

    use serde::Deserialize;
    use serde_json::{Value, json};

    use super::*;

    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    #[serde(untagged)]
    enum Untagged {
        Number(i64),
        Text(String),
        Receipt { id: u64, note: Option<String> },
    }

    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    #[serde(tag = "kind", rename_all = "snake_case")]
    enum Internal {
        Charged { cents: u64 },
        Declined,
    }

    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    #[serde(tag = "kind", content = "of")]
    enum Adjacent {
        Charged(u64, f32),
        Declined,
    }

    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    struct Skipping {
        #[serde(skip_serializing_if = "Option::is_none")]
        first: Option<u32>,
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        list: Vec<u8>,
        second: Option<u32>,
        #[serde(flatten)]
        rest: BTreeMap<String, Value>,
    }

    fn comes_back<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(result: T) {
        let bytes = encode(&result).unwrap_or_else(|detail| panic!("{result:?}: {detail}"));
        assert_eq!(decode::<T>(&bytes), Ok(result));
    }

    #[test]
    fn results_of_every_form_come_back() {
        comes_back(("charge-1".to_owned(), 1_200_u64, -1_i64, 'x', true, ()));
        comes_back([f64::MIN, f64::MAX, f64::MIN_POSITIVE, 5e-324, 0.1 + 0.2, -0.0, 1e16, 123_456_789.123_456_78]);
        comes_back([f32::MIN, f32::MAX, f32::MIN_POSITIVE, 0.1, 1.0e-45, 16_777_217.0]);
        comes_back((u128::MAX, i128::MIN, u64::MAX, i64::MIN));
        comes_back(String::from("\u{0}\u{1f600}\"\\\u{7f}\u{2028}"));
        comes_back(json!({ "id": 1, "list": [null, 1.5, { "deep": "x" }] }));
        comes_back([Untagged::Number(7), Untagged::Text("7".into()), Untagged::Receipt { id: 1, note: None }]);
        comes_back([Internal::Charged { cents: u64::MAX }, Internal::Declined]);
        comes_back([Adjacent::Charged(1, 0.1), Adjacent::Declined]);
        for (first, second) in [(None, Some(5)), (Some(5), None), (None, None), (Some(1), Some(2))] {
            let rest = BTreeMap::from([("more".to_owned(), json!({ "x": 1 }))]);
            comes_back(Skipping { first, list: Vec::new(), second, rest });
        }
        comes_back(vec![Ok(1), Err("no".to_owned())]);
        comes_back(BTreeMap::from([(1_u64, [0_u8; 3]), (2, [255; 3])]));
        // Their order is another in each copy.
        comes_back((0..300).map(|i| (i.to_string(), i)).collect::<HashMap<_, _>>());
        comes_back((0..300).collect::<HashSet<u16>>());
    }

    #[test]
    fn skipped_fields_need_not_come_back() {
        #[derive(Serialize, Deserialize)]
        struct Cached {
            id: u32,
            #[serde(skip)]
            cache: String,
        }
        let bytes = encode(&Cached { id: 7, cache: "of this process".to_owned() }).unwrap();
        let read: Cached = decode(&bytes).unwrap();
        assert_eq!((read.id, read.cache.as_str()), (7, ""));
    }

    /// Its two halves do not match.
    #[derive(Serialize, Deserialize)]
    struct Lopsided {
        #[serde(skip_serializing_if = "Vec::is_empty")]
        list: Vec<u8>,
    }

    #[derive(Serialize, Deserialize)]
    struct Forgetful {
        #[serde(skip_deserializing)]
        id: u32,
    }

    #[test]
    fn results_that_would_not_come_back_are_refused() {
        fn refused<T: Serialize + DeserializeOwned>(result: T) -> String {
            encode(&result).unwrap_err()
        }
        assert!(refused(Lopsided { list: Vec::new() }).contains("missing field `list`"));
        assert!(refused(Forgetful { id: 7 }).contains("another value"));
        assert!(refused(f64::NAN).contains("null"));
        assert!(refused(Some(f64::INFINITY)).contains("another value"));
        assert!(refused(vec![Some(None::<u8>)]).contains("another value"));
        assert!(refused(Some(())).contains("another value"));
        assert!(refused(BTreeMap::from([((1, 2), 3)])).contains("key must be a string"));
        // Serde keeps what it cannot name yet in a form that has no 128-bit numbers.
        #[derive(Serialize, Deserialize)]
        #[serde(untagged)]
        enum Wide {
            Number(u128),
        }
        assert!(!refused(Wide::Number(u128::MAX)).is_empty());
        let mut deep = json!(1);
        for _ in 0..200 {
            deep = json!([deep]);
        }
        assert!(refused(deep).contains("recursion limit"));
    }

    #[test]
    fn bytes_of_something_else_are_refused() {
        let bytes = encode(&("charge-1".to_owned(), 1_200_u64)).unwrap();
        assert!(decode::<(String, u64, u64)>(&bytes).is_err());
        assert!(decode::<String>(&bytes).is_err());
        assert!(decode::<u8>(b"1 2").unwrap_err().contains("trailing"));
    }
}
