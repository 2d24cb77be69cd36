//! A transaction: what one call writes, as one record of the journal.

use crate::codec::{Reader, put_prefixed, put_varint};
use crate::rocks::manifest::ManifestState;
use onlyonce_core::{Error, Result};

/// No further changes: the number and the bytes of a record follow, or nothing.
const END: u8 = 0;
const PUT_META: u8 = 1;
const DELETE_META: u8 = 2;
const DELETE_KEY: u8 = 3;

/// The changes of one call. They take effect together or not at all.
#[derive(Debug, Default)]
pub(crate) struct Tx {
    /// The encoded changes of the database.
    changes: Vec<u8>,
    record: Option<(u64, Vec<u8>)>,
}

/// A change of the database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change<'a> {
    PutMeta {
        name: &'a [u8],
        value: &'a [u8],
    },
    DeleteMeta {
        name: &'a [u8],
    },
    /// Deletes a key of a bucket. A dropped bucket has no keys.
    DeleteKey {
        family: &'a str,
        entry_key: &'a [u8],
    },
}

/// About the memory that RocksDB uses for a change besides its bytes.
const CHANGE_BYTES: usize = 64;

impl Change<'_> {
    /// About the memory that it takes in the database until it is flushed.
    pub(super) fn memory(&self) -> usize {
        CHANGE_BYTES
            + match self {
                Self::PutMeta { name, value } => name.len() + value.len(),
                Self::DeleteMeta { name } => name.len(),
                Self::DeleteKey { family: _, entry_key } => entry_key.len(),
            }
    }
}

impl Tx {
    /// Adds the record of the call's keys. A transaction has one at most.
    pub(crate) fn put_record(&mut self, number: u64, record: Vec<u8>) {
        self.record = Some((number, record));
    }

    pub(crate) fn put_meta(&mut self, name: &(impl AsRef<[u8]> + ?Sized), value: &[u8]) {
        self.changes.push(PUT_META);
        put_prefixed(&mut self.changes, name.as_ref());
        put_prefixed(&mut self.changes, value);
    }

    pub(crate) fn delete_meta(&mut self, name: &[u8]) {
        self.changes.push(DELETE_META);
        put_prefixed(&mut self.changes, name);
    }

    /// Deletes a key of a bucket.
    pub(crate) fn delete_key(&mut self, family: &str, entry_key: &[u8]) {
        self.changes.push(DELETE_KEY);
        put_prefixed(&mut self.changes, family.as_bytes());
        put_prefixed(&mut self.changes, entry_key);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.changes.is_empty() && self.record.is_none()
    }

    /// Whether it changes more than keys in the memtable.
    pub(super) fn changes_database(&self) -> bool {
        !self.changes.is_empty()
    }

    /// The size of the record in the journal, without its header.
    pub(crate) fn len(&self) -> usize {
        self.changes.len() + 1 + self.record.as_ref().map_or(0, |(number, record)| varint_len(*number) + record.len())
    }

    /// The encoded parts: its changes with the number of its record, and the record.
    pub(super) fn finish(mut self) -> (Vec<u8>, Vec<u8>) {
        let (number, record) = self.record.unwrap_or_default();
        self.changes.push(END);
        if !record.is_empty() {
            put_varint(&mut self.changes, number);
        }
        (self.changes, record)
    }
}

fn varint_len(value: u64) -> usize {
    (64 - (value | 1).leading_zeros() as usize).div_ceil(7)
}

/// Passes the changes of an encoded transaction to `change`, and returns the number and the bytes of its record.
pub(crate) fn read<'a>(
    bytes: &'a [u8],
    mut change: impl FnMut(Change<'a>) -> Result<()>,
) -> Result<Option<(u64, &'a [u8])>> {
    let mut reader = Reader::new(bytes);
    while let Some(found) = read_change(&mut reader).ok_or_else(unknown)? {
        change(found)?;
    }
    if reader.is_empty() {
        return Ok(None);
    }
    let number = reader.varint().ok_or_else(unknown)?;
    Ok(Some((number, reader.rest())))
}

/// What an encoded transaction puts into the meta entry `name`, if that is the state of a manifest.
pub(super) fn stated_manifest(bytes: &[u8], name: &str) -> Option<ManifestState> {
    let mut reader = Reader::new(bytes);
    let mut stated = None;
    while let Some(Some(change)) = read_change(&mut reader) {
        if let Change::PutMeta { name: put, value } = change
            && put == name.as_bytes()
        {
            stated = value.try_into().ok().map(ManifestState::decode);
        }
    }
    stated
}

/// The next change, or `Some(None)` at their end.
fn read_change<'a>(reader: &mut Reader<'a>) -> Option<Option<Change<'a>>> {
    Some(Some(match reader.byte()? {
        END => return Some(None),
        PUT_META => Change::PutMeta { name: reader.prefixed()?, value: reader.prefixed()? },
        DELETE_META => Change::DeleteMeta { name: reader.prefixed()? },
        DELETE_KEY => {
            Change::DeleteKey { family: std::str::from_utf8(reader.prefixed()?).ok()?, entry_key: reader.prefixed()? }
        }
        _ => return None,
    }))
}

fn unknown() -> Error {
    Error::Corrupt { place: "the journal".to_owned(), detail: "it has a record of an unknown form".to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(tx: Tx) -> Vec<u8> {
        let len = tx.len();
        let (mut bytes, record) = tx.finish();
        bytes.extend(record);
        assert_eq!(bytes.len(), len);
        bytes
    }

    #[test]
    fn a_transaction_is_read_back_as_written() {
        let all = [
            Change::PutMeta { name: b"time", value: b"" },
            Change::DeleteMeta { name: &[2, 0, 255] },
            Change::DeleteKey { family: "bucket-1-2", entry_key: b"key" },
        ];
        for number in [0, 1, 127, 128, 1 << 40, u64::MAX] {
            for (changes, record) in [(&all[..], &b"record"[..]), (&all[1..], b""), (&[], b"r")] {
                let mut tx = Tx::default();
                assert!(tx.is_empty());
                for change in changes {
                    match *change {
                        Change::PutMeta { name, value } => tx.put_meta(name, value),
                        Change::DeleteMeta { name } => tx.delete_meta(name),
                        Change::DeleteKey { family, entry_key } => tx.delete_key(family, entry_key),
                    }
                }
                if !record.is_empty() {
                    tx.put_record(number, record.to_vec());
                }
                assert!(!tx.is_empty());
                let bytes = encoded(tx);
                let mut found = Vec::new();
                let read_record = read(&bytes, |change| {
                    found.push(change);
                    Ok(())
                });
                assert_eq!(read_record.unwrap(), (!record.is_empty()).then_some((number, record)));
                assert_eq!(found, changes);
            }
        }
    }

    #[test]
    fn a_transaction_of_unknown_form_is_corruption() {
        for bytes in [&b""[..], &[9], &[PUT_META, 3, 1], &[DELETE_KEY, 1, 255, 0, END], &[END, 0x80]] {
            assert!(matches!(read(bytes, |_| Ok(())), Err(Error::Corrupt { .. })), "{bytes:?}");
        }
    }
}
