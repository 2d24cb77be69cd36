//! Typed results: serde through bincode 2, in its standard configuration.
//!
//! Bincode does not name fields, and a type alone decides how its bytes are read: untagged, internally tagged, flattened and
//! skipped forms can be written and never read. So a result is stored only if it reads back as what it was.

use std::fmt;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// The limit keeps a length that was never written by us from reserving memory for it.
const CONFIG: bincode::config::Configuration<
    bincode::config::LittleEndian,
    bincode::config::Varint,
    bincode::config::Limit<{ 64 << 20 }>,
> = bincode::config::standard().with_limit::<{ 64 << 20 }>();

/// A typed result as bytes. Refused where it could not be read back, or would be read back as another value. One over `limit`
/// is not kept, so that nobody will read it.
pub(crate) fn encode<T: Serialize + DeserializeOwned>(result: &T, limit: usize) -> Result<Vec<u8>, String> {
    let bytes = bincode::serde::encode_to_vec(result, bincode::config::standard())
        .map_err(|error| format!("{error}; {INSTEAD}"))?;
    if bytes.len() > limit {
        return Ok(bytes);
    }
    let read: T = decode(&bytes).map_err(|error| format!("it could not be read back ({error}); {INSTEAD}"))?;
    match (Shown::of(result), Shown::of(&read)) {
        (Some(before), Some(after)) if before == after => Ok(bytes),
        _ => Err(format!("it would be read back as another value; {INSTEAD}")),
    }
}

const INSTEAD: &str = "bincode has no untagged, internally tagged, flattened or skipped forms: encode it yourself, as JSON for \
                       example, and give the bytes to `complete`";

/// A typed result from bytes, all of which must have been used.
pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    match bincode::serde::decode_from_slice(bytes, CONFIG) {
        Ok((result, used)) if used == bytes.len() => Ok(result),
        Ok((_, used)) => Err(format!("{} bytes are left over", bytes.len().saturating_sub(used))),
        Err(error) => Err(error.to_string()),
    }
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
    }

    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    #[serde(tag = "kind", rename_all = "snake_case")]
    enum Internal {
        Charged { cents: u64 },
        Declined,
    }

    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    enum Tagged {
        Charged { id: u64, note: Option<String> },
        Declined,
    }

    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    struct Flattened {
        id: u32,
        #[serde(flatten)]
        rest: BTreeMap<String, u32>,
    }

    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    struct Skipping {
        #[serde(skip_serializing_if = "Option::is_none")]
        first: Option<u8>,
        list: Vec<u8>,
        last: u8,
    }

    fn is_zero(number: &u8) -> bool {
        *number == 0
    }

    fn encode<T: Serialize + DeserializeOwned>(result: &T) -> Result<Vec<u8>, String> {
        super::encode(result, 1 << 20)
    }

    #[test]
    fn a_result_that_is_not_kept_need_not_be_read_back() {
        let long = "x".repeat(2_000);
        assert!(super::encode(&json!(long), 1_000).is_ok());
        assert!(super::encode(&json!(long), 3_000).is_err());
    }

    fn comes_back<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(result: T) {
        let bytes = encode(&result).unwrap_or_else(|detail| panic!("{result:?}: {detail}"));
        assert_eq!(decode::<T>(&bytes), Ok(result));
    }

    #[test]
    fn results_of_every_form_that_bincode_has_come_back() {
        comes_back(("charge-1".to_owned(), 1_200_u64, -1_i64, 'x', true, ()));
        comes_back([f64::MIN, f64::MAX, f64::INFINITY, 5e-324, 0.1 + 0.2, -0.0, 1e16]);
        comes_back((u128::MAX, i128::MIN, u64::MAX, i64::MIN));
        comes_back(String::from("\u{0}\u{1f600}\"\\\u{7f}\u{2028}"));
        comes_back([Tagged::Charged { id: 1, note: None }, Tagged::Declined]);
        comes_back(vec![Some(None::<u8>), Some(Some(1)), None]);
        comes_back(Skipping { first: Some(1), list: vec![2], last: 3 });
        comes_back(vec![Ok(1), Err("no".to_owned())]);
        comes_back(BTreeMap::from([((1_u64, 'a'), [0_u8; 3]), ((2, 'b'), [255; 3])]));
        // Their order is another in each copy.
        comes_back((0..300).map(|i| (i.to_string(), i)).collect::<HashMap<_, _>>());
        comes_back((0..300).collect::<HashSet<u16>>());
        assert!(encode(&f64::NAN).is_ok(), "it is shown as NaN again");
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

    #[test]
    fn results_that_would_not_come_back_are_refused() {
        fn refused<T: Serialize + DeserializeOwned>(result: T) -> String {
            encode(&result).unwrap_err()
        }
        for detail in [
            refused(json!({ "id": 1 })),
            refused(Value::Null),
            refused(Untagged::Number(1)),
            refused(Untagged::Text("x".to_owned())),
            refused(Internal::Charged { cents: 1 }),
            refused(Internal::Declined),
            refused(Flattened { id: 1, rest: BTreeMap::from([("a".to_owned(), 1)]) }),
            refused(Skipping { first: None, list: vec![1], last: 2 }),
        ] {
            assert!(detail.contains("give the bytes to `complete`"), "{detail}");
        }
        // Its bytes are those of another value, and all of them are used.
        #[derive(Serialize, Deserialize)]
        struct Shifting {
            #[serde(skip_serializing_if = "is_zero")]
            first: u8,
            list: Vec<u8>,
            last: u8,
        }
        let shifted = Shifting { first: 0, list: vec![1, 7], last: 9 };
        assert!(refused(shifted).contains("another value"));
        #[derive(Serialize, Deserialize)]
        struct Forgetful {
            #[serde(skip_deserializing)]
            id: u32,
        }
        assert!(!refused(Forgetful { id: 7 }).is_empty());
    }

    #[test]
    fn bytes_of_something_else_are_refused() {
        let bytes = encode(&("charge-1".to_owned(), 1_200_u64)).unwrap();
        assert!(decode::<(String, u64, u64)>(&bytes).is_err());
        assert!(decode::<String>(&bytes).unwrap_err().contains("left over"));
        assert!(decode::<Vec<u8>>(&[0xff; 16]).is_err(), "a length that nobody wrote reserves nothing");
    }
}
