//! Decoding of stream replies of Redis, entry by entry: a malformed entry does not hide the others.

use std::fmt;

use redis::{RedisError, RedisResult, Value};

/// An entry in a reply.
#[derive(Debug, PartialEq)]
pub(crate) enum ReplyEntry {
    Stored(StoredEntry),
    /// The id of an entry that was deleted from the stream.
    Deleted(String),
    Malformed,
}

#[derive(Debug, PartialEq)]
pub(crate) struct StoredEntry {
    pub(crate) id: String,
    /// In the order of `XADD`.
    pub(crate) fields: Vec<(Vec<u8>, Vec<u8>)>,
}

pub(crate) struct AutoClaimReply {
    pub(crate) cursor: Vec<u8>,
    pub(crate) entries: Vec<ReplyEntry>,
}

/// Decodes the reply of `XAUTOCLAIM`: a cursor and entries. Before Redis 7 deleted entries are null.
pub(crate) fn decode_xautoclaim(reply: Value) -> RedisResult<AutoClaimReply> {
    let Value::Array(parts) = reply else { return Err(unexpected("XAUTOCLAIM", &reply)) };
    let mut parts = parts.into_iter();
    match (parts.next(), parts.next()) {
        (Some(Value::BulkString(cursor)), Some(Value::Array(entries))) => {
            let entries = entries.into_iter().filter(|entry| *entry != Value::Nil).map(decode_entry).collect();
            Ok(AutoClaimReply { cursor, entries })
        }
        other => Err(unexpected("XAUTOCLAIM", &other)),
    }
}

/// Decodes the reply of `XREADGROUP` for one stream: an array of pairs, or a map with RESP3.
pub(crate) fn decode_xreadgroup(reply: Value) -> RedisResult<Vec<ReplyEntry>> {
    let mut decoded = Vec::new();
    let mut decode = |entries: Value| match entries {
        Value::Array(entries) => {
            decoded.extend(entries.into_iter().map(decode_entry));
            Ok(())
        }
        other => Err(unexpected("XREADGROUP", &other)),
    };
    match reply {
        Value::Nil => {}
        Value::Map(streams) => streams.into_iter().try_for_each(|(_, entries)| decode(entries))?,
        Value::Array(streams) => {
            for stream in streams {
                match stream {
                    Value::Array(mut pair) if pair.len() == 2 => decode(pair.pop().unwrap_or(Value::Nil))?,
                    other => return Err(unexpected("XREADGROUP", &other)),
                }
            }
        }
        other => return Err(unexpected("XREADGROUP", &other)),
    }
    Ok(decoded)
}

/// An entry is a pair of its id and alternating field names and values, which may be any bytes.
fn decode_entry(entry: Value) -> ReplyEntry {
    let Value::Array(parts) = entry else { return ReplyEntry::Malformed };
    let mut parts = parts.into_iter();
    let Some(Value::BulkString(id)) = parts.next() else { return ReplyEntry::Malformed };
    let Ok(id) = String::from_utf8(id) else { return ReplyEntry::Malformed };
    let flat: Vec<Value> = match parts.next() {
        Some(Value::Array(flat)) => flat,
        Some(Value::Map(pairs)) => pairs.into_iter().flat_map(|(name, value)| [name, value]).collect(),
        _ => return ReplyEntry::Deleted(id),
    };
    let mut flat = flat.into_iter();
    let mut fields = Vec::new();
    while let (Some(name), Some(value)) = (flat.next(), flat.next()) {
        let (Some(name), Some(value)) = (bytes(name), bytes(value)) else { return ReplyEntry::Malformed };
        fields.push((name, value));
    }
    if fields.is_empty() { ReplyEntry::Deleted(id) } else { ReplyEntry::Stored(StoredEntry { id, fields }) }
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
    (redis::ErrorKind::UnexpectedReturnType, "unexpected shape of a server reply", format!("{command}: {shown}")).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bulk(bytes: &[u8]) -> Value {
        Value::BulkString(bytes.to_vec())
    }

    fn value(id: &str, fields: &[&[u8]]) -> Value {
        Value::Array(vec![bulk(id.as_bytes()), Value::Array(fields.iter().map(|bytes| bulk(bytes)).collect())])
    }

    fn stored(id: &str, fields: &[(&[u8], &[u8])]) -> ReplyEntry {
        let fields = fields.iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect();
        ReplyEntry::Stored(StoredEntry { id: id.to_owned(), fields })
    }

    #[test]
    fn a_malformed_entry_does_not_hide_the_others() {
        let entries = Value::Array(vec![
            value("1-0", &[b"id", b"a", b"payload", b"12 EUR"]),
            // Field names are bytes, and may repeat.
            value("2-0", &[b"\xff\xfe", b"x", b"tag", b"1", b"tag", b"2"]),
            Value::Nil,
            Value::Array(vec![bulk(b"3-0"), Value::Nil]),
            Value::Int(4),
            value("5-0", &[b"id", b"b"]),
        ]);
        let expected = [
            stored("1-0", &[(b"id", b"a"), (b"payload", b"12 EUR")]),
            stored("2-0", &[(b"\xff\xfe", b"x"), (b"tag", b"1"), (b"tag", b"2")]),
            ReplyEntry::Deleted("3-0".to_owned()),
            ReplyEntry::Malformed,
            stored("5-0", &[(b"id", b"b")]),
        ];
        let reply = Value::Array(vec![bulk(b"7-0"), entries.clone(), Value::Array(Vec::new())]);
        let AutoClaimReply { cursor, entries: decoded } = decode_xautoclaim(reply).unwrap();
        assert_eq!((cursor, &decoded[..]), (b"7-0".to_vec(), &expected[..]));

        let Value::Array(entries) = entries else { panic!() };
        let entries = Value::Array(entries.into_iter().filter(|entry| *entry != Value::Nil).collect());
        let pair = vec![bulk(b"orders"), entries.clone()];
        assert_eq!(decode_xreadgroup(Value::Array(vec![Value::Array(pair)])).unwrap(), expected);
        assert_eq!(decode_xreadgroup(Value::Map(vec![(bulk(b"orders"), entries)])).unwrap(), expected);
        assert_eq!(decode_xreadgroup(Value::Nil).unwrap(), []);
    }

    #[test]
    fn a_reply_of_another_shape_is_an_error_that_names_the_command() {
        for reply in [Value::Nil, Value::Int(1), Value::Array(vec![bulk(b"0-0")])] {
            let error = decode_xautoclaim(reply).err().unwrap().to_string();
            assert!(error.contains("XAUTOCLAIM"), "{error}");
        }
        let error = decode_xreadgroup(Value::Array(vec![Value::Int(1)])).unwrap_err().to_string();
        assert!(error.contains("XREADGROUP"), "{error}");
    }
}
