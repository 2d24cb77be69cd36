//! Replies of Redis about streams, taken apart entry by entry: one that cannot be read takes no other along.

use std::fmt;

use redis::{RedisError, RedisResult, Value};

/// What a reply says of an entry.
#[derive(Debug, PartialEq)]
pub(super) enum Found {
    Entry(Read),
    /// Its number, without fields: it was deleted.
    Empty(String),
    /// Nothing that names an entry.
    Odd,
}

#[derive(Debug, PartialEq)]
pub(super) struct Read {
    pub(super) id: String,
    /// In the order in which they were added.
    pub(super) fields: Vec<(Vec<u8>, Vec<u8>)>,
}

pub(super) struct Claimed {
    pub(super) cursor: Vec<u8>,
    pub(super) entries: Vec<Found>,
}

/// The reply of `XAUTOCLAIM`: a cursor, and entries, among which those that were deleted are null before Redis 7.
pub(super) fn claimed(reply: Value) -> RedisResult<Claimed> {
    match reply {
        Value::Array(parts) => {
            let mut parts = parts.into_iter();
            match (parts.next(), parts.next()) {
                (Some(Value::BulkString(cursor)), Some(Value::Array(entries))) => {
                    let entries = entries.into_iter().filter(|entry| *entry != Value::Nil).map(entry).collect();
                    Ok(Claimed { cursor, entries })
                }
                other => Err(unexpected("XAUTOCLAIM", &other)),
            }
        }
        other => Err(unexpected("XAUTOCLAIM", &other)),
    }
}

/// The reply of `XREADGROUP` about one stream: an array of pairs, or a map of them under the third version of the protocol.
pub(super) fn new(reply: Value) -> RedisResult<Vec<Found>> {
    let mut found = Vec::new();
    let mut take = |entries: Value| match entries {
        Value::Array(entries) => {
            found.extend(entries.into_iter().map(entry));
            Ok(())
        }
        other => Err(unexpected("XREADGROUP", &other)),
    };
    match reply {
        Value::Nil => {}
        Value::Map(streams) => streams.into_iter().try_for_each(|(_, entries)| take(entries))?,
        Value::Array(streams) => {
            for stream in streams {
                match stream {
                    Value::Array(mut pair) if pair.len() == 2 => take(pair.pop().unwrap_or(Value::Nil))?,
                    other => return Err(unexpected("XREADGROUP", &other)),
                }
            }
        }
        other => return Err(unexpected("XREADGROUP", &other)),
    }
    Ok(found)
}

/// A pair of a number and of fields with their values, in turn. Bytes are taken as they are.
fn entry(entry: Value) -> Found {
    let Value::Array(parts) = entry else { return Found::Odd };
    let mut parts = parts.into_iter();
    let Some(Value::BulkString(id)) = parts.next() else { return Found::Odd };
    // Digits and a hyphen.
    let Ok(id) = String::from_utf8(id) else { return Found::Odd };
    let flat: Vec<Value> = match parts.next() {
        Some(Value::Array(flat)) => flat,
        Some(Value::Map(pairs)) => pairs.into_iter().flat_map(|(name, value)| [name, value]).collect(),
        _ => return Found::Empty(id),
    };
    let mut flat = flat.into_iter();
    let mut fields = Vec::new();
    while let (Some(name), Some(value)) = (flat.next(), flat.next()) {
        let (Some(name), Some(value)) = (bytes(name), bytes(value)) else { return Found::Odd };
        fields.push((name, value));
    }
    if fields.is_empty() { Found::Empty(id) } else { Found::Entry(Read { id, fields }) }
}

fn bytes(value: Value) -> Option<Vec<u8>> {
    match value {
        Value::BulkString(bytes) => Some(bytes),
        Value::SimpleString(text) => Some(text.into_bytes()),
        Value::Int(number) => Some(number.to_string().into_bytes()),
        _ => None,
    }
}

fn unexpected(command: &'static str, reply: &dyn fmt::Debug) -> RedisError {
    let mut shown = format!("{reply:?}");
    shown.truncate(shown.floor_char_boundary(200));
    (redis::ErrorKind::UnexpectedReturnType, "the server's reply has an unexpected form", format!("{command}: {shown}"))
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bulk(bytes: &[u8]) -> Value {
        Value::BulkString(bytes.to_vec())
    }

    fn stored(id: &str, fields: &[&[u8]]) -> Value {
        Value::Array(vec![bulk(id.as_bytes()), Value::Array(fields.iter().map(|bytes| bulk(bytes)).collect())])
    }

    fn read(id: &str, fields: &[(&[u8], &[u8])]) -> Found {
        let fields = fields.iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect();
        Found::Entry(Read { id: id.to_owned(), fields })
    }

    #[test]
    fn an_entry_that_cannot_be_read_takes_no_other_along() {
        let entries = Value::Array(vec![
            stored("1-0", &[b"id", b"a", b"payload", b"12 EUR"]),
            // Names are bytes, and may come twice.
            stored("2-0", &[b"\xff\xfe", b"x", b"tag", b"1", b"tag", b"2"]),
            Value::Nil,
            Value::Array(vec![bulk(b"3-0"), Value::Nil]),
            Value::Int(4),
            stored("5-0", &[b"id", b"b"]),
        ]);
        let expected = [
            read("1-0", &[(b"id", b"a"), (b"payload", b"12 EUR")]),
            read("2-0", &[(b"\xff\xfe", b"x"), (b"tag", b"1"), (b"tag", b"2")]),
            Found::Empty("3-0".to_owned()),
            Found::Odd,
            read("5-0", &[(b"id", b"b")]),
        ];
        let Claimed { cursor, entries: found } =
            claimed(Value::Array(vec![bulk(b"7-0"), entries.clone(), Value::Array(Vec::new())])).unwrap();
        assert_eq!((cursor, &found[..]), (b"7-0".to_vec(), &expected[..]));

        let Value::Array(entries) = entries else { panic!() };
        let entries = Value::Array(entries.into_iter().filter(|entry| *entry != Value::Nil).collect());
        let pair = vec![bulk(b"orders"), entries.clone()];
        assert_eq!(new(Value::Array(vec![Value::Array(pair)])).unwrap(), expected);
        assert_eq!(new(Value::Map(vec![(bulk(b"orders"), entries)])).unwrap(), expected);
        assert_eq!(new(Value::Nil).unwrap(), []);
    }

    #[test]
    fn a_reply_of_another_form_is_an_error_that_names_the_command() {
        for reply in [Value::Nil, Value::Int(1), Value::Array(vec![bulk(b"0-0")])] {
            let error = claimed(reply).err().unwrap().to_string();
            assert!(error.contains("XAUTOCLAIM"), "{error}");
        }
        let error = new(Value::Array(vec![Value::Int(1)])).unwrap_err().to_string();
        assert!(error.contains("XREADGROUP"), "{error}");
    }
}
