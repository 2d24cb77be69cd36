//! Checks of RocksDB's manifest before RocksDB reads it.
//!
//! RocksDB reads its manifest as a log. In a log, some types of records are for files that are used again, and RocksDB 11
//! never returns from reading one of them after a record of another type. A single flipped bit makes one of the other.
//!
//! Each record has a checksum, but none says that another one exists. Without some of its records RocksDB would open a database
//! that lacks their SSTs, and delete these. So the journal has the length of the manifest and its checksum. RocksDB only appends
//! to a manifest, and begins a new one at each open.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use onlyonce_core::{Error, Result};

const CURRENT: &str = "CURRENT";
/// How often a manifest that has been replaced is looked for again.
const RETRIES: usize = 10;
/// Records do not cross the end of a block.
const BLOCK: usize = 32 << 10;
/// A checksum (4 bytes), the length (2) and the type (1).
const HEADER: usize = 7;
/// The type of a part of a record that is neither the first nor the last. Those of manifests are not higher than the next
/// one, the last part.
const LAST_TYPE: u8 = 4;

/// The start of a manifest that was on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ManifestState {
    /// The number in its name.
    pub(crate) number: u64,
    pub(crate) bytes: u64,
    /// The CRC-32C of these bytes.
    pub(crate) crc: u32,
}

impl ManifestState {
    pub(crate) fn encode(&self) -> [u8; 20] {
        let mut encoded = [0; 20];
        let fields =
            self.number.to_le_bytes().into_iter().chain(self.bytes.to_le_bytes()).chain(self.crc.to_le_bytes());
        encoded.iter_mut().zip(fields).for_each(|(byte, field)| *byte = field);
        encoded
    }

    pub(crate) fn decode(encoded: &[u8; 20]) -> Self {
        let [number, bytes] = [0, 8]
            .map(|at| encoded.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |it| u64::from_le_bytes(*it)));
        let crc = encoded.last_chunk().map_or(0, |it| u32::from_le_bytes(*it));
        Self { number, bytes, crc }
    }

    /// The present state of the database's manifest. It is on disk when this returns. The bytes of `last`, an earlier state, are
    /// not read again.
    pub(super) fn read(database: &Path, last: Option<Self>) -> Result<Self> {
        // RocksDB removes a manifest when it has begun the next one.
        for _ in 0..RETRIES {
            let (name, number) = current(database)?;
            let path = database.join(name);
            match extend(&path, last.filter(|last| last.number == number), number) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                read => {
                    let (state, file) = read.map_err(|error| Error::io("reading", path, error))?;
                    // A failed sync is final: what is in memory may be lost, and a second sync would succeed.
                    return file
                        .sync_data()
                        .map(|()| state)
                        .map_err(|error| Error::WriteFailed { source: error.into() });
                }
            }
        }
        Err(corrupt(&database.join(CURRENT), "it names a MANIFEST file that does not exist"))
    }
}

/// Reads what follows `last`. RocksDB may be writing the last record.
fn extend(path: &Path, last: Option<ManifestState>, number: u64) -> io::Result<(ManifestState, File)> {
    let last = last.unwrap_or(ManifestState { number, bytes: 0, crc: 0 });
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(last.bytes))?;
    let mut added = Vec::new();
    file.read_to_end(&mut added)?;
    let state =
        ManifestState { number, bytes: last.bytes + added.len() as u64, crc: crc32c::crc32c_append(last.crc, &added) };
    Ok((state, file))
}

/// The name and the number of the present manifest.
fn current(database: &Path) -> Result<(String, u64)> {
    let path = database.join(CURRENT);
    let name = fs::read_to_string(&path).map_err(|error| Error::io("reading", &path, error))?;
    let name = name.trim_end();
    let number = name.strip_prefix("MANIFEST-").and_then(|number| number.parse().ok());
    Ok((name.to_owned(), number.ok_or_else(|| corrupt(&path, "it names no MANIFEST file"))?))
}

/// Fails if the file is missing that names the manifest: without it there is no database.
pub(crate) fn require(database: &Path) -> Result<()> {
    let path = database.join(CURRENT);
    if matches!(path.try_exists(), Ok(false)) { Err(corrupt(&path, "the file is missing")) } else { Ok(()) }
}

/// Rejects a manifest that RocksDB cannot read, and one that lacks bytes of the state that the journal has. RocksDB reports a
/// missing manifest and any other damage by itself.
pub(super) fn check(database: &Path, stated: Option<ManifestState>) -> Result<()> {
    let Ok((name, number)) = current(database) else { return Ok(()) };
    let path = database.join(name);
    let Ok(bytes) = fs::read(&path) else { return Ok(()) };
    if let Some(at) = foreign_record(&bytes) {
        return Err(corrupt(&path, format!("the record at offset {at} has a type that no manifest has")));
    }
    // A process that was killed in its open has begun another one, and stated nothing about it.
    let Some(stated) = stated.filter(|stated| stated.number == number) else { return Ok(()) };
    let start = usize::try_from(stated.bytes).ok().and_then(|len| bytes.get(..len));
    match start.map(crc32c::crc32c) {
        Some(crc) if crc == stated.crc => Ok(()),
        Some(_) => Err(corrupt(&path, format!("its first {} bytes are not those that were synced", stated.bytes))),
        None => Err(corrupt(&path, format!("it has {} bytes, and {} were synced", bytes.len(), stated.bytes))),
    }
}

fn corrupt(path: &Path, detail: impl Into<String>) -> Error {
    Error::Corrupt { place: path.display().to_string(), detail: detail.into() }
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
        let open =
            || Db::open(Directory::acquire(&root, Duration::ZERO)?, 32 << 20, Duration::ZERO, None, || Ok(Vec::new()));
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
