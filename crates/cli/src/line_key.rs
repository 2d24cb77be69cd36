//! Derives the key of a line.

use std::fmt;

use onlyonce::Key;

use crate::json_field::{self, FieldPath, NotJson};
use crate::opening::KEY_LIMIT;

/// How a line gets its key.
pub(crate) struct LineKey {
    /// The fields that make the key. If empty, the whole line is the key.
    pub(crate) paths: Vec<FieldPath>,
    /// Leaked, so that keys can borrow it.
    pub(crate) scope: &'static [u8],
}

impl LineKey {
    /// Whether lines are JSON.
    pub(crate) fn is_json(&self) -> bool {
        !self.paths.is_empty()
    }

    /// The key of a line without its "\n".
    pub(crate) fn of(&self, line: &[u8]) -> Result<Key<'static>, NoKey<'_>> {
        let key = if self.is_json() { self.of_fields(line)? } else { Key::content(line) };
        Ok(key.scope(self.scope))
    }

    fn of_fields(&self, line: &[u8]) -> Result<Key<'static>, NoKey<'_>> {
        let found = json_field::find(line, &self.paths).map_err(NoKey::NotJson)?;
        let mut parts = Vec::with_capacity(self.paths.len());
        for (path, value) in self.paths.iter().zip(found) {
            let value = value.ok_or(NoKey::Absent(path))?;
            parts.push(json_field::key_part(value).map_err(|what| NoKey::NotAPart(path, what))?);
        }
        let key = match parts.as_slice() {
            // A single value is a plain key, so that `get` and other programs can look it up.
            [value] => Key::from(String::from(value.as_ref())),
            parts => Key::composite(parts.iter().map(|part| part.as_bytes())),
        };
        match key.as_bytes().len() + self.scope.len() {
            _ if key.as_bytes().is_empty() => Err(NoKey::Empty),
            len if len > KEY_LIMIT => Err(NoKey::TooLong(len)),
            _ => Ok(key),
        }
    }
}

/// Why a line has no key.
pub(crate) enum NoKey<'p> {
    NotJson(NotJson),
    Absent(&'p FieldPath),
    NotAPart(&'p FieldPath, &'static str),
    Empty,
    TooLong(usize),
}

impl fmt::Display for NoKey<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotJson(why) => write!(f, "the line is not JSON: {why}"),
            Self::Absent(path) => write!(f, "the line has no {path}"),
            Self::NotAPart(path, what) => write!(f, "{path} is {what}"),
            Self::Empty => f.write_str("the key is empty"),
            Self::TooLong(len) => write!(f, "the key and the scope have {len} bytes; the limit is {KEY_LIMIT}"),
        }
    }
}
