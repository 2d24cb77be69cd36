//! The names of the schema, the tables and the channel. Only validated identifiers enter a statement.

use crate::error::SetupError;

/// The names of one store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Names {
    schema: String,
    prefix: String,
}

impl Names {
    pub(crate) fn new(schema: &str, prefix: &str) -> Result<Self, SetupError> {
        check("schema", schema)?;
        if !prefix.is_empty() {
            check("prefix", prefix)?;
        }
        Ok(Self { schema: schema.to_owned(), prefix: prefix.to_owned() })
    }

    pub(crate) fn schema(&self) -> &str {
        &self.schema
    }

    /// The quoted name of a table, a sequence or an index of the store.
    pub(crate) fn of(&self, object: &str) -> String {
        format!("\"{}\".\"{}{object}\"", self.schema, self.prefix)
    }

    /// The name of an object without its schema.
    pub(crate) fn plain(&self, object: &str) -> String {
        format!("{}{object}", self.prefix)
    }

    /// The channel on which the end of a lease is announced. Names of the server have 63 bytes, and those of the schema and the
    /// prefix may have more together. A store that shares the channel wakes waiters of others, which try again.
    pub(crate) fn channel(&self) -> String {
        format!("onlyonce_{:08x}", self.lock_class())
    }

    /// The names as errors print them.
    pub(crate) fn display(&self) -> String {
        match self.prefix.is_empty() {
            true => format!("schema {}", self.schema),
            false => format!("schema {} with the prefix {}", self.schema, self.prefix),
        }
    }

    /// The first number of the store's advisory locks; the second one is 0 for maintenance, 1 for a migration and the worker's id
    /// otherwise.
    pub(crate) fn lock_class(&self) -> i32 {
        // FNV-1a. Two stores of one database that share a class disturb each other, and neither gives a wrong answer.
        let name = format!("onlyonce {} {}", self.schema, self.prefix);
        let hash = name.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
        hash.cast_signed()
    }
}

fn check(option: &'static str, name: &str) -> Result<(), SetupError> {
    let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    let is_valid = (1..=40).contains(&name.len())
        && name.bytes().all(is_plain)
        && !name.starts_with(|first: char| first.is_ascii_digit());
    if is_valid { Ok(()) } else { Err(SetupError::Name { option, name: name.to_owned() }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_identifiers_are_names() {
        for name in ["onlyonce", "a", "_1", "a_b_2"] {
            assert!(Names::new(name, "").is_ok() && Names::new("s", name).is_ok(), "{name}");
        }
        let long = "a".repeat(41);
        for name in ["1a", "A", "a b", "a\"", "a;drop", "ä", "a.b", long.as_str()] {
            let error = Names::new(name, "").unwrap_err();
            assert!(matches!(error, SetupError::Name { option: "schema", .. }), "{name}");
            assert!(Names::new("s", name).is_err(), "{name}");
        }
        assert!(Names::new("", "").is_err());
    }
}
