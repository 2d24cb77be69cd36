//! The checkpoint: what a replay begins with. It replaces all records before it.
//!
//! ```text
//! checkpoint := number of the flush (varint) | state of the manifest (20) or zeros | number of families (varint) | family* | record of the keys in progress, or nothing
//! family     := length (varint) and name | number of SSTs (varint) | (number (varint) | bytes (varint))*
//! ```

use std::collections::BTreeMap;
use std::path::Path;

use crate::codec::{Reader, put_prefixed, put_varint};
use crate::rocks::manifest::ManifestState;
use onlyonce_core::{Error, Result};

/// The SSTs of each column family: numbers and sizes in bytes.
pub(crate) type Ssts = BTreeMap<String, Vec<(u64, u64)>>;

/// What the database has at a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Checkpoint {
    /// The number of its last flush.
    pub(crate) flushes: u64,
    pub(crate) ssts: Ssts,
    /// How much of the manifest lists them. `None` in a new store.
    pub(crate) manifest: Option<ManifestState>,
}

impl Checkpoint {
    /// Encodes it with the record of the keys in progress.
    pub(crate) fn encode(&self, record: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        put_varint(&mut out, self.flushes);
        out.extend_from_slice(&self.manifest.map_or([0; 20], |manifest| manifest.encode()));
        put_varint(&mut out, self.ssts.len() as u64);
        for (family, files) in &self.ssts {
            put_prefixed(&mut out, family.as_bytes());
            put_varint(&mut out, files.len() as u64);
            for (number, bytes) in files {
                put_varint(&mut out, *number);
                put_varint(&mut out, *bytes);
            }
        }
        out.extend_from_slice(record);
        out
    }

    /// Reads a checkpoint, and the record of the keys in progress.
    pub(crate) fn read(bytes: &[u8]) -> Result<(Self, &[u8])> {
        let mut reader = Reader::new(bytes);
        let mut read = || {
            let flushes = reader.varint()?;
            let manifest = ManifestState::decode(reader.take(20)?.first_chunk()?);
            let manifest = (manifest.number > 0).then_some(manifest);
            Some(Self { flushes, manifest, ssts: read_ssts(&mut reader)? })
        };
        let checkpoint = read().ok_or_else(|| Error::Corrupt {
            place: "the journal".to_owned(),
            detail: "its checkpoint has an unknown form".to_owned(),
        })?;
        Ok((checkpoint, reader.rest()))
    }
}

fn read_ssts(reader: &mut Reader<'_>) -> Option<Ssts> {
    let mut ssts = Ssts::new();
    for _ in 0..reader.varint()? {
        let family = std::str::from_utf8(reader.prefixed()?).ok()?.to_owned();
        let files = (0..reader.varint()?).map(|_| Some((reader.varint()?, reader.varint()?))).collect::<Option<_>>()?;
        ssts.insert(family, files);
    }
    Some(ssts)
}

/// Compares a checkpoint with what the database, in this directory, has now: the number of its last flush, and its SSTs. An SST that is in both has
/// the same size. An SST that is missing was merged by a compaction, or its bucket was dropped: RocksDB's manifest lists the SSTs
/// before the number of the flush.
pub(crate) fn compare(database: &Path, checkpoint: &Checkpoint, flushed: u64, found: &Ssts) -> Result<()> {
    let flushes = checkpoint.flushes;
    if flushed < flushes {
        let detail = format!(
            "its MANIFEST file ends at flush {flushed}, and the journal has a checkpoint of flush {flushes}: restore all files of the \
             store from one copy"
        );
        return Err(Error::Corrupt { place: database.display().to_string(), detail });
    }
    for (family, ssts) in &checkpoint.ssts {
        let found = found.get(family).map_or(&[][..], Vec::as_slice);
        for (number, bytes) in ssts {
            if let Some((_, other)) = found.iter().find(|(found, other)| found == number && other != bytes) {
                let detail = format!("it has {other} bytes, and had {bytes} at the last checkpoint");
                return Err(Error::Corrupt { place: format!("{number:06}.sst of {family}"), detail });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_is_read_back_as_written() {
        let ssts = Ssts::from([("a".to_owned(), vec![(1, 10), (1 << 40, 0)]), ("b".to_owned(), Vec::new())]);
        for (record, flushes) in [(&b""[..], 0), (b"record", 300)] {
            let manifest = (flushes > 0).then_some(ManifestState { number: 7, bytes: 1 << 40, crc: u32::MAX });
            let checkpoint = Checkpoint { flushes, ssts: ssts.clone(), manifest };
            assert_eq!(Checkpoint::read(&checkpoint.encode(record)).unwrap(), (checkpoint, record));
        }
        for bytes in [&b""[..], &[1], &[1, 1], &[1, 1, 1, 255, 0], &[1, 1, 0, 200, 200, 200, 200, 1]] {
            assert!(matches!(Checkpoint::read(bytes), Err(Error::Corrupt { .. })), "{bytes:?}");
        }
    }

    #[test]
    fn a_database_that_is_older_than_a_checkpoint_is_corruption_and_a_compacted_one_is_not() {
        let ssts = |bucket: &[(u64, u64)]| Ssts::from([("bucket".to_owned(), bucket.to_vec())]);
        let checkpoint = Checkpoint { flushes: 7, ssts: ssts(&[(3, 30), (5, 50)]), manifest: None };
        let compare = |flushed, found: &Ssts| {
            compare(Path::new("store/db"), &checkpoint, flushed, found).map_err(|error| error.to_string())
        };
        for flushed in [7, 8] {
            for found in [ssts(&[(3, 30), (5, 50), (7, 9)]), ssts(&[(6, 80)]), Ssts::new()] {
                compare(flushed, &found).unwrap();
            }
        }
        assert!(compare(6, &checkpoint.ssts).unwrap_err().contains("checkpoint of flush 7"));
        assert!(compare(7, &ssts(&[(3, 30), (5, 49)])).unwrap_err().contains("000005.sst of bucket"));
    }
}
