//! The checkpoint: what a replay begins with. It stands for all records before it.
//!
//! ```text
//! checkpoint := number of families (varint) | family* | record of the keys in progress, or nothing
//! family     := length (varint) and name | number of SSTs (varint) | (number (varint) | bytes (varint))*
//! ```

use std::collections::BTreeMap;

use crate::codec::{Reader, put_prefixed, put_varint};
use onlyonce_core::{Error, Result};

/// The SSTs of each column family: numbers and sizes in bytes.
pub(crate) type Ssts = BTreeMap<String, Vec<(u64, u64)>>;

/// Encodes a checkpoint of these SSTs and this record of the keys in progress.
pub(crate) fn encode(ssts: &Ssts, record: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    put_varint(&mut out, ssts.len() as u64);
    for (family, files) in ssts {
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

/// Reads a checkpoint: its SSTs, and the record.
pub(crate) fn read(bytes: &[u8]) -> Result<(Ssts, &[u8])> {
    let mut reader = Reader::new(bytes);
    let ssts = read_ssts(&mut reader).ok_or_else(|| Error::Corrupt {
        place: "the journal".to_owned(),
        detail: "its checkpoint has an unknown form".to_owned(),
    })?;
    Ok((ssts, reader.rest()))
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

/// The family whose SST is the last one that a flush adds. It is never dropped, and never empty.
const LAST_FLUSHED: &str = "meta";

/// Compares the SSTs of a checkpoint with those that the database has now. Those that are in both have the same size. The
/// newest one of `meta` is still there, or RocksDB has replaced it: it gives the result of a compaction a higher number. The
/// others are then there as well, or replaced, or their bucket is dropped, because RocksDB's manifest lists them before it.
pub(crate) fn compare(expected: &Ssts, found: &Ssts) -> Result<()> {
    let corrupt = |number: u64, family: &str, detail: String| {
        Err(Error::Corrupt { place: format!("{number:06}.sst of {family}"), detail })
    };
    let of = |family: &str| found.get(family).map_or(&[][..], Vec::as_slice);
    for (family, ssts) in expected {
        for (number, bytes) in ssts {
            if let Some((_, other)) = of(family).iter().find(|(found, other)| found == number && other != bytes) {
                return corrupt(
                    *number,
                    family,
                    format!("it has {other} bytes, and had {bytes} at the last checkpoint"),
                );
            }
        }
    }
    let newest = expected.get(LAST_FLUSHED).into_iter().flatten().map(|(number, _)| *number).max();
    if let Some(newest) = newest.filter(|newest| of(LAST_FLUSHED).iter().all(|(number, _)| number < newest)) {
        let detail = "the database is older than the last checkpoint of the journal, which lists it".to_owned();
        return corrupt(newest, LAST_FLUSHED, detail);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_is_read_back_as_written() {
        let ssts = Ssts::from([("a".to_owned(), vec![(1, 10), (1 << 40, 0)]), ("b".to_owned(), Vec::new())]);
        for record in [&b""[..], b"record"] {
            assert_eq!(read(&encode(&ssts, record)).unwrap(), (ssts.clone(), record));
        }
        for bytes in [&b""[..], &[1], &[1, 1, 255, 0], &[1, 0, 200, 200, 200, 200, 1]] {
            assert!(matches!(read(bytes), Err(Error::Corrupt { .. })), "{bytes:?}");
        }
    }

    #[test]
    fn a_database_that_is_older_than_a_checkpoint_is_corruption_and_a_compacted_one_is_not() {
        let ssts = |meta: &[(u64, u64)], bucket: &[(u64, u64)]| {
            Ssts::from([("meta".to_owned(), meta.to_vec()), ("bucket".to_owned(), bucket.to_vec())])
        };
        let expected = ssts(&[(4, 40), (6, 60)], &[(3, 30), (5, 50)]);
        let compare = |found: &Ssts| compare(&expected, found).map_err(|error| error.to_string());
        for found in [
            expected.clone(),
            ssts(&[(4, 40), (6, 60), (8, 1)], &[(3, 30), (5, 50), (7, 9)]),
            // The result of a compaction, which began before the newest SST.
            ssts(&[(4, 40), (6, 60)], &[(5, 50)]),
            ssts(&[(7, 100)], &[]),
        ] {
            compare(&found).unwrap();
        }
        for (found, what) in [
            (ssts(&[(4, 40)], &[(3, 30), (5, 50)]), "000006.sst of meta"),
            (ssts(&[], &[(3, 30), (5, 50), (9, 90)]), "000006.sst of meta"),
            (Ssts::new(), "000006.sst of meta"),
            (ssts(&[(4, 40), (6, 60)], &[(3, 30), (5, 49)]), "has 49 bytes"),
        ] {
            let error = compare(&found).unwrap_err();
            assert!(error.contains(what), "{error}");
        }
        super::compare(&Ssts::new(), &expected).unwrap();
    }
}
