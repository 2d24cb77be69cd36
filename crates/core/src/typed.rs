//! Typed results: serde through bincode 2, in its standard configuration.
//!
//! bincode stores no field names: the type alone decides how its bytes are read. Untagged, internally tagged, flattened and
//! skipped fields can be written and never read. A result is therefore read back before it is stored.

use std::fmt;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::completion::Completion;
use crate::error::{Result, ResultError};

/// The longest result of any engine, in bytes. The decoder's limit keeps a corrupt length from reserving memory.
pub(crate) const MAX_RESULT: usize = 64 << 20;

const CONFIG: bincode::config::Configuration<
    bincode::config::LittleEndian,
    bincode::config::Varint,
    bincode::config::Limit<MAX_RESULT>,
> = bincode::config::standard().with_limit::<MAX_RESULT>();

const INSTEAD: &str = "bincode has no untagged, internally tagged, flattened or skipped fields: encode the result yourself, \
                       for example as JSON, and complete with the bytes";

impl Completion {
    /// A completion whose result is encoded by serde and bincode 2. Decode it with
    /// [`Completed::result_as`](crate::Completed::result_as).
    ///
    /// The result is decoded once and compared, so that everything stored can be read. That costs two encodings and a
    /// decoding. To store other formats, encode the result yourself and use [`Completion::new`].
    ///
    /// bincode 2 is unmaintained since RUSTSEC-2025-0141; its format is specified and stays readable.
    ///
    /// # Errors
    ///
    /// [`ResultError::Encode`] if the result would not be decoded as the same value: `serde_json::Value`, untagged,
    /// internally tagged and flattened types, skipped fields, or more than 64 MiB. Encode before you call `complete` on the lease:
    /// in `lease.complete(Completion::encode(&result)?)` an error drops the lease.
    pub fn encode<T: Serialize + DeserializeOwned>(result: &T) -> Result<Self> {
        encode(result).map(Self::new).map_err(|detail| ResultError::Encode { detail }.into())
    }
}

fn encode<T: Serialize + DeserializeOwned>(result: &T) -> Result<Vec<u8>, String> {
    let bytes = bincode::serde::encode_to_vec(result, bincode::config::standard())
        .map_err(|error| format!("{error}; {INSTEAD}"))?;
    let read: T = read(&bytes).map_err(|error| format!("it could not be read back ({error}); {INSTEAD}"))?;
    match (Profile::of(result), Profile::of(&read)) {
        (Some(before), Some(after)) if before == after => Ok(bytes),
        _ => Err(format!("it would be read back as a different value; {INSTEAD}")),
    }
}

/// Decodes a typed result. All bytes must be used.
pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    read(bytes).map_err(|detail| ResultError::Decode { detail }.into())
}

fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    match bincode::serde::decode_from_slice(bytes, CONFIG) {
        Ok((result, used)) if used == bytes.len() => Ok(result),
        Ok((_, used)) => Err(format!("{} bytes are left over", bytes.len().saturating_sub(used))),
        Err(error) => Err(error.to_string()),
    }
}

/// The number of times that each byte occurs in a value's serde output, written as [`fmt::Debug`] would. The order is ignored:
/// a map or set that was read back iterates in a different order.
#[derive(PartialEq, Eq)]
struct Profile([u64; 256]);

impl Profile {
    fn of(value: &impl Serialize) -> Option<Self> {
        let mut profile = Self([0; 256]);
        serde_fmt::to_writer(value, &mut profile).ok()?;
        Some(profile)
    }
}

impl fmt::Write for Profile {
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

    fn round_trips<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(result: T) {
        let bytes = encode(&result).unwrap_or_else(|detail| panic!("{result:?}: {detail}"));
        assert_eq!(decode::<T>(&bytes).unwrap(), result);
    }

    #[test]
    fn results_of_every_form_that_bincode_supports_round_trip() {
        round_trips(("charge-1".to_owned(), 1_200_u64, -1_i64, 'x', true, ()));
        round_trips([f64::MIN, f64::MAX, f64::INFINITY, 5e-324, 0.1 + 0.2, -0.0, 1e16]);
        round_trips((u128::MAX, i128::MIN, u64::MAX, i64::MIN));
        round_trips(String::from("\u{0}\u{1f600}\"\\\u{7f}\u{2028}"));
        round_trips([Tagged::Charged { id: 1, note: None }, Tagged::Declined]);
        round_trips(vec![Some(None::<u8>), Some(Some(1)), None]);
        round_trips(Skipping { first: Some(1), list: vec![2], last: 3 });
        round_trips(vec![Ok(1), Err("no".to_owned())]);
        round_trips(BTreeMap::from([((1_u64, 'a'), [0_u8; 3]), ((2, 'b'), [255; 3])]));
        // Each copy iterates in a different order.
        round_trips((0..300).map(|i| (i.to_string(), i)).collect::<HashMap<_, _>>());
        round_trips((0..300).collect::<HashSet<u16>>());
        assert!(encode(&f64::NAN).is_ok(), "NaN is read back as NaN");
    }

    #[test]
    fn fields_that_serde_skips_both_ways_are_accepted() {
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
    fn results_that_do_not_round_trip_are_rejected() {
        fn rejected<T: Serialize + DeserializeOwned>(result: T) -> String {
            encode(&result).unwrap_err()
        }
        for detail in [
            rejected(json!({ "id": 1 })),
            rejected(Value::Null),
            rejected(Untagged::Number(1)),
            rejected(Untagged::Text("x".to_owned())),
            rejected(Internal::Charged { cents: 1 }),
            rejected(Internal::Declined),
            rejected(Flattened { id: 1, rest: BTreeMap::from([("a".to_owned(), 1)]) }),
            rejected(Skipping { first: None, list: vec![1], last: 2 }),
        ] {
            assert!(detail.contains("complete with the bytes"), "{detail}");
        }
        // Its bytes decode as a different value without a byte left over.
        #[derive(Serialize, Deserialize)]
        struct Shifting {
            #[serde(skip_serializing_if = "is_zero")]
            first: u8,
            list: Vec<u8>,
            last: u8,
        }
        let shifted = Shifting { first: 0, list: vec![1, 7], last: 9 };
        assert!(rejected(shifted).contains("different value"));
        #[derive(Serialize, Deserialize)]
        struct Forgetful {
            #[serde(skip_deserializing)]
            id: u32,
        }
        assert!(!rejected(Forgetful { id: 7 }).is_empty());
    }

    #[test]
    fn bytes_of_something_else_are_rejected() {
        let bytes = encode(&("charge-1".to_owned(), 1_200_u64)).unwrap();
        assert!(decode::<(String, u64, u64)>(&bytes).is_err());
        assert!(decode::<String>(&bytes).unwrap_err().to_string().contains("left over"));
        assert!(decode::<Vec<u8>>(&[0xff; 16]).is_err(), "a corrupt length reserves no memory");
    }
}
