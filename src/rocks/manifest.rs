//! A check of RocksDB's manifest before RocksDB reads it.
//!
//! RocksDB reads its manifest as a log. In a log, some types of records are for files that are used again, and RocksDB 11
//! never returns from reading one of them after a record of another type. A single flipped bit makes one of the other.

use std::fs;
use std::path::Path;

use onlyonce_core::{Error, Result};

/// Records do not cross the end of a block.
const BLOCK: usize = 32 << 10;
/// A checksum (4 bytes), the length (2) and the type (1).
const HEADER: usize = 7;
/// The type of a part of a record that is neither the first nor the last. Those of manifests are not higher than the next
/// one, the last part.
const LAST_TYPE: u8 = 4;

/// Rejects a manifest that RocksDB cannot read. RocksDB reports a missing file and any other damage by itself.
pub(super) fn check(database: &Path) -> Result<()> {
    let Ok(current) = fs::read_to_string(database.join("CURRENT")) else { return Ok(()) };
    let path = database.join(current.trim_end());
    let Ok(bytes) = fs::read(&path) else { return Ok(()) };
    match foreign_record(&bytes) {
        None => Ok(()),
        Some(at) => Err(Error::Corrupt {
            place: path.display().to_string(),
            detail: format!("the record at offset {at} has a type that no manifest has"),
        }),
    }
}

fn foreign_record(bytes: &[u8]) -> Option<usize> {
    bytes.chunks(BLOCK).zip((0..).step_by(BLOCK)).find_map(|(block, start)| {
        let mut at = 0;
        while let Some(&[_, _, _, _, low, high, kind]) = block.get(at..)?.first_chunk::<HEADER>() {
            match kind {
                // The rest of the block is empty.
                0 => return None,
                1..=LAST_TYPE => at += HEADER + usize::from(u16::from_le_bytes([low, high])),
                _ => return Some(start + at),
            }
        }
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(kind: u8, len: usize) -> Vec<u8> {
        let mut record = vec![9; HEADER + len];
        record[4..6].copy_from_slice(&(len as u16).to_le_bytes());
        record[6] = kind;
        record
    }

    #[test]
    fn only_types_of_records_that_a_manifest_has_are_accepted() {
        let long = record(2, BLOCK - 107 - HEADER);
        let fine = [record(1, 93), long, record(4, 5), vec![0; 20]].concat();
        assert_eq!(foreign_record(&fine), None);
        assert_eq!(foreign_record(&fine[..fine.len() - 22]), None, "a torn tail");
        for (at, kind) in [(6, 5), (6, 0x81), (106, 6), (BLOCK + 6, 8), (BLOCK + 6, 255)] {
            let mut damaged = fine.clone();
            damaged[at] = kind;
            let start = at - 6;
            assert_eq!(foreign_record(&damaged), Some(start), "type {kind} at {start}");
        }
    }

    #[test]
    fn each_flipped_bit_of_a_manifest_is_an_error_or_harmless_and_the_open_returns() {
        use crate::fs::directory::Directory;
        use crate::rocks::db::Db;
        use std::time::Duration;

        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("store");
        let open = || Db::open(Directory::acquire(&root, Duration::ZERO)?, 32 << 20, Duration::ZERO, || Ok(Vec::new()));
        let (db, _) = open().unwrap();
        db.create_bucket("a bucket").unwrap();
        let database = db.directory().database();
        drop(db);
        let current = fs::read_to_string(database.join("CURRENT")).unwrap();
        let manifest = database.join(current.trim_end());
        let intact = fs::read(&manifest).unwrap();
        let mut at = 0;
        let mut rejected = 0;
        while let Some(header) = intact.get(at..).and_then(|rest| rest.first_chunk::<HEADER>()) {
            for bit in 0..8 {
                let mut damaged = intact.clone();
                damaged[at + 6] ^= 1 << bit;
                fs::write(&manifest, &damaged).unwrap();
                match open() {
                    Err(Error::Corrupt { .. }) => rejected += 1,
                    other => panic!("bit {bit} of the type at {at}: {:?}", other.map(drop)),
                }
            }
            at += HEADER + usize::from(u16::from_le_bytes([header[4], header[5]]));
        }
        assert!(rejected > 8 && at == intact.len(), "{rejected}, {at}");
    }
}
