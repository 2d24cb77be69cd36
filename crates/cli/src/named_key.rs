//! The names of keys: arguments of `get`, and the JSON that it prints and reads.
//!
//! ```text
//! key   := part                                   a plain key
//!        | [part, ...]                            a composite key
//!        | {"content": "<64 hex digits>"}         the BLAKE3 hash of a whole line
//! part  := "text" | {"hex": "<hex digits>"}       the latter if the bytes are not UTF-8
//! scope := part | null
//! ```

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;

use anyhow::{Context, bail, ensure};
use onlyonce::Key;
use serde_json::{Map, Value, json};

use crate::args;

/// A key and its scope.
pub(crate) struct NamedKey {
    name: Name,
    scope: Vec<u8>,
}

enum Name {
    Plain(Vec<u8>),
    Composite(Vec<Vec<u8>>),
    /// The BLAKE3 hash of a whole line.
    Content([u8; 32]),
}

impl NamedKey {
    /// The key that the arguments of `get` name.
    pub(crate) fn of(args: &args::Get) -> anyhow::Result<Self> {
        let scope = args.scope.as_bytes().to_vec();
        match args.keys.as_slice() {
            [line] if args.content => {
                let hash = Key::content(line.as_bytes())
                    .as_bytes()
                    .try_into()
                    .context("internal error: the hash of a line does not have 32 bytes")?;
                Ok(Self { name: Name::Content(hash), scope })
            }
            _ if args.content => bail!("--content takes one KEY, the whole line"),
            [json] if args.json => Self::of_json(json, scope),
            _ if args.json => bail!("--json takes one KEY, as `get` prints it"),
            [key] => Ok(Self { name: Name::Plain(key.as_bytes().to_vec()), scope }),
            parts => {
                let parts = parts.iter().map(|part| part.as_bytes().to_vec()).collect();
                Ok(Self { name: Name::Composite(parts), scope })
            }
        }
    }

    /// Parses an object that `get` printed, or only the value of its member "key".
    fn of_json(text: &OsString, scope: Vec<u8>) -> anyhow::Result<Self> {
        let value: Value = serde_json::from_slice(text.as_bytes()).context("KEY is not JSON")?;
        let printed = value.as_object().filter(|members| members.contains_key("key"));
        let Some(printed) = printed else { return Ok(Self { name: Name::of_json(&value)?, scope }) };
        let name = Name::of_json(printed.get("key").unwrap_or(&Value::Null))?;
        let own = match printed.get("scope") {
            None | Some(Value::Null) => Vec::new(),
            Some(scope) => bytes(scope).context("the scope of KEY")?,
        };
        ensure!(scope.is_empty() || scope == own, "--scope differs from the scope in KEY; leave --scope out");
        Ok(Self { name, scope: own })
    }

    pub(crate) fn key(&self) -> Key<'_> {
        let key = match &self.name {
            Name::Plain(bytes) => Key::from(bytes),
            Name::Composite(parts) => Key::composite(parts),
            Name::Content(hash) => Key::content_hash(*hash),
        };
        key.scope(&self.scope)
    }

    pub(crate) fn has_scope(&self) -> bool {
        !self.scope.is_empty()
    }

    /// The members "key" and "scope" of a JSON object.
    pub(crate) fn members(&self) -> Map<String, Value> {
        let scope = if self.scope.is_empty() { Value::Null } else { part(&self.scope) };
        Map::from_iter([("key".to_owned(), self.name.json()), ("scope".to_owned(), scope)])
    }
}

impl Name {
    fn of_json(value: &Value) -> anyhow::Result<Self> {
        match value {
            Value::Array(parts) => {
                let parts =
                    parts.iter().enumerate().map(|(i, part)| bytes(part).with_context(|| format!("part {i} of KEY")));
                Ok(Self::Composite(parts.collect::<anyhow::Result<_>>()?))
            }
            Value::Object(members) if members.contains_key("content") => {
                let hash = members.get("content").and_then(Value::as_str).and_then(unhex);
                let hash = hash.and_then(|bytes| bytes.try_into().ok());
                Ok(Self::Content(hash.context("the content of KEY is not 64 hex digits")?))
            }
            part => Ok(Self::Plain(bytes(part).context("KEY")?)),
        }
    }

    fn json(&self) -> Value {
        match self {
            Self::Plain(bytes) => part(bytes),
            Self::Composite(parts) => parts.iter().map(|bytes| part(bytes)).collect(),
            Self::Content(hash) => json!({ "content": hex(hash) }),
        }
    }
}

fn part(bytes: &[u8]) -> Value {
    match str::from_utf8(bytes) {
        Ok(text) => text.into(),
        Err(_) => json!({ "hex": hex(bytes) }),
    }
}

fn bytes(part: &Value) -> anyhow::Result<Vec<u8>> {
    match part {
        Value::String(text) => Ok(text.clone().into_bytes()),
        Value::Object(members) => {
            let hex = members.get("hex").and_then(Value::as_str);
            hex.and_then(unhex).context(r#"the bytes are not in the form {"hex": "00ff"}"#)
        }
        // `filter` uses the text of a number as the key, and a JSON number has several texts.
        other => bail!(r#"{other} is not a string; quote it, as in "1""#),
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(digits: &str) -> Option<Vec<u8>> {
    let digits = digits.as_bytes();
    let digit = |byte: &u8| char::from(*byte).to_digit(16);
    digits
        .chunks(2)
        .map(|pair| match pair {
            [high, low] => u8::try_from(digit(high)? * 16 + digit(low)?).ok(),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(text: &str) -> anyhow::Result<NamedKey> {
        NamedKey::of_json(&OsString::from(text), Vec::new())
    }

    fn any_bytes() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![prop::collection::vec(any::<u8>(), 1..20), any::<String>().prop_map(String::into_bytes)]
    }

    proptest! {
        #[test]
        fn every_printed_key_is_parsed_as_the_same_key(
            form in 0..3, parts in prop::collection::vec(any_bytes(), 1..4), scope in any_bytes(), hash: [u8; 32],
        ) {
            let name = match form {
                0 => Name::Plain(parts.concat()),
                1 => Name::Composite(parts),
                _ => Name::Content(hash),
            };
            let named = NamedKey { name, scope };
            let printed = Value::Object(named.members());
            let again = read(&printed.to_string()).unwrap();
            prop_assert_eq!(again.key(), named.key());
            let again = NamedKey { scope: named.scope.clone(), ..read(&printed["key"].to_string()).unwrap() };
            prop_assert_eq!(again.key(), named.key());
        }
    }

    #[test]
    fn an_argument_that_is_not_a_key_is_an_error_with_the_reason() {
        for (text, why) in [
            ("a", "KEY is not JSON"),
            ("1", "KEY: 1 is not a string; quote it"),
            ("null", "KEY: null is not a string"),
            (r#"["a",1]"#, "part 1 of KEY: 1 is not a string"),
            (r#"{"hex":"0"}"#, "KEY: the bytes are not in the form"),
            (r#"{"hex":"0g"}"#, "KEY: the bytes are not in the form"),
            (r#"{"content":"00"}"#, "the content of KEY is not 64 hex digits"),
            (r#"{"key":"a","scope":7}"#, "the scope of KEY: 7 is not a string"),
            (r#"{}"#, "KEY: the bytes are not in the form"),
        ] {
            let error = read(text).map(|_| ()).unwrap_err();
            assert!(format!("{error:#}").starts_with(why), "{text}: {error:#}");
        }
        let other = NamedKey::of_json(&OsString::from(r#"{"key":"a","scope":"s"}"#), b"t".to_vec());
        assert!(other.is_err_and(|error| error.to_string().contains("--scope differs from the scope in KEY")));
    }
}
