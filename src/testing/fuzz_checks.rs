//! Checks for the fuzzers in `fuzz/`: any bytes are either rejected, or decoded to a value that encodes to an
//! equivalent form. Nothing panics. The tests below replay the committed corpora.

use std::path::Path;
use std::sync::OnceLock;

use crate::buckets::range::BucketRange;
use crate::codec::{self, Item, Reader, RecordKind, RecordWriter};
use crate::digest::Digester;
use crate::filter::file::{self, Covered, FileKey, FilterFile};
use crate::filter::matrix::{Columns, FilterMatrix, SHARDS};
use onlyonce_core::Key;
use onlyonce_core::machine::{CompletedEntry, Event, OwnWindow};

/// A journal record is rejected, or decodes to the same events after it is encoded again.
pub fn journal_record(bytes: &[u8]) {
    let mut items = Vec::new();
    let Some(time_ms) = codec::read_record(bytes, |item| items.push(item)) else { return };
    let kind = match bytes.get(1) {
        Some(1) => RecordKind::Claimed,
        Some(2) => RecordKind::Released,
        Some(3) => RecordKind::Completed,
        Some(4) => RecordKind::Forgotten,
        other => unreachable!("decoded a record of kind {other:?}"),
    };
    let mut record = RecordWriter::new(kind, time_ms, 0);
    for item in &items {
        match item {
            Item::Event(key, event) => record.event(key, event),
            Item::ClaimCompleted { token, completed_ms, result } => {
                let (token, completed_ms, result) = (*token, *completed_ms, *result);
                let own_window = OwnWindow::NONE;
                let done = CompletedEntry { token, completed_ms, fingerprint: None, own_window, result };
                record.event(&[], &Event::ClaimCompleted(done));
            }
        }
    }
    assert_eq!(record.is_empty(), items.is_empty());
    let written = record.finish();
    assert!(written.len() <= bytes.len(), "the input is shorter than its encoding");
    let mut again = Vec::new();
    assert_eq!(codec::read_record(&written, |item| again.push(item)), Some(time_ms));
    assert_eq!(again, items);
}

/// A bucket value is rejected, or decodes to the same entry after it is encoded again. The input begins with the
/// bucket's start.
pub fn bucket_value(bytes: &[u8]) {
    let mut reader = Reader::new(bytes);
    let Some(start_ms) = reader.array().map(u64::from_le_bytes) else { return };
    let value = reader.rest();
    let Some(entry) = codec::read_value(value, start_ms) else { return };
    let mut written = Vec::new();
    codec::put_value(&entry.borrowed(), start_ms, &mut written).expect("a decoded entry can be encoded");
    assert!(written.len() <= value.len(), "the input is shorter than its encoding");
    assert_eq!(codec::read_value(&written, start_ms), Some(entry));
}

/// Meta values, varints, bucket names and typed results are rejected, or are the same after they are encoded again.
pub fn meta_entries(bytes: &[u8]) {
    if let Some(span) = codec::read_span(bytes) {
        assert_eq!(codec::put_span(span), bytes);
    }
    if let Some(on_interrupt) = codec::read_on_interrupt(bytes) {
        assert_eq!(codec::put_on_interrupt(on_interrupt), bytes);
    }
    if let Some(clock) = codec::read_clock(bytes) {
        assert_eq!(codec::put_clock(&clock), bytes);
    }
    let mut reader = Reader::new(bytes);
    if let Some(number) = reader.varint() {
        let mut written = Vec::new();
        codec::put_varint(&mut written, number);
        assert!(written.len() + reader.rest().len() <= bytes.len());
        assert_eq!(Reader::new(&written).varint(), Some(number));
    }
    let name = String::from_utf8_lossy(bytes);
    if let Some(range) = BucketRange::of_family(&name) {
        assert_eq!(range.family(), name);
        assert!(range.start_ms < range.end_ms());
    }
    #[cfg(feature = "bincode")]
    type Typed = (String, Vec<Option<u32>>, std::collections::BTreeMap<u8, Vec<u8>>, Result<(), char>);
    #[cfg(feature = "bincode")]
    if let Ok(Some(result)) = completed(bytes).result_as::<Typed>() {
        let written = onlyonce_core::Completion::encode(&result).unwrap_or_default();
        assert_eq!(completed(written.result()).result_as::<Typed>().ok(), Some(Some(result)));
    }
}

#[cfg(feature = "bincode")]
fn completed(result: &[u8]) -> onlyonce_core::Completed {
    let result = onlyonce_core::StoredResult::Bytes(std::sync::Arc::from(result));
    let (token, time) = (onlyonce_core::FencingToken::new(1), onlyonce_core::Timestamp::UNIX_EPOCH);
    onlyonce_core::Completed::new(result, token, time, time)
}

/// Two keys have the same encoding if and only if they are equal; invalid encodings are rejected; and bucket entries
/// are ordered by digest.
///
/// The input is two keys, each a form (1), and a scope and a body with length prefixes.
pub fn keys(bytes: &[u8]) {
    let mut reader = Reader::new(bytes);
    let (Some(one), Some(other)) = (any_key(&mut reader), any_key(&mut reader)) else { return };
    let encoded = |key: &Key<'_>| {
        let mut encoded = Vec::new();
        key.encode(usize::MAX, &mut encoded).ok().map(|()| encoded)
    };
    if let (Some(first), Some(second)) = (encoded(&one), encoded(&other)) {
        assert_eq!(first == second, one == other, "{one} and {other}");
        assert_eq!(Key::decode(&first).as_ref(), Some(&one));
        let digester = Digester::new(&[9; 16]);
        let entry_key = |encoded: &[u8]| {
            let (mut out, digest) = (Vec::new(), digester.digest(encoded));
            codec::put_entry_key(digest, encoded, &mut out);
            assert_eq!(codec::digest_of_entry_key(&out), Some(digest));
            (digest, out)
        };
        let (first, second) = (entry_key(&first), entry_key(&second));
        if first.0 != second.0 {
            assert_eq!(first.0 < second.0, first.1 < second.1, "entries are ordered by digest");
        }
    }
    // The input as an encoded key, as it may be read from disk.
    if let Some(key) = Key::decode(bytes) {
        assert_eq!(encoded(&key).as_deref(), Some(bytes));
        assert!(!key.to_string().contains(char::is_control));
    }
}

fn any_key(reader: &mut Reader<'_>) -> Option<Key<'static>> {
    let form = reader.byte()?;
    let (scope, body) = (reader.prefixed()?, reader.prefixed()?);
    let key = match form % 3 {
        0 => Key::from(body.to_vec()),
        // Split into two parts at a position that the input selects.
        1 => body
            .split_at_checked(usize::from(form / 3))
            .map_or_else(|| Key::composite([body]), |(one, other)| Key::composite([one, other])),
        _ => Key::content(body),
    };
    Some(key.scope(scope).into_owned())
}

const FILTER_KEY: [u8; 16] = [3; 16];
const BUCKET: &str = "bucket-1700000000000-10000";

/// A changed filter file is rejected, whatever the change, and an unchanged one is accepted.
///
/// Writes to `path`. The input is a list of changes, each a kind (1), a position (2) and length-prefixed bytes; or,
/// if the first byte is 255, a header, which gets a valid checksum.
pub fn filter_file(path: &Path, bytes: &[u8]) {
    static GOOD: OnceLock<Vec<u8>> = OnceLock::new();
    let key = FileKey::new(&FILTER_KEY);
    let good = GOOD.get_or_init(|| {
        let matrix = FilterMatrix::new(Columns::All(32), 300);
        let _ = matrix.insert(7, (0..300_u64).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        let written = file::write(path, &key, BUCKET, &matrix, 7, &Covered { keys: 300, ssts: vec![11, 19] });
        written.and_then(|()| std::fs::read(path)).unwrap_or_default()
    });
    let changed = match bytes.split_first() {
        Some((255, header)) => [header, &key.hash(&[BUCKET.as_bytes(), header]), good].concat(),
        _ => changed(good, bytes),
    };
    if std::fs::write(path, &changed).is_err() {
        return;
    }
    let read = FilterFile::open(path, &key, BUCKET)
        .and_then(|file| (0..SHARDS).map(|shard| file.column(shard)).collect::<std::io::Result<Vec<_>>>());
    assert_eq!(read.is_ok(), changed == *good, "{read:?}");
    assert!(
        !good.is_empty() && FilterFile::open(path, &key, "bucket-0-10000").is_err(),
        "the file is of another bucket"
    );
}

fn changed(good: &[u8], changes: &[u8]) -> Vec<u8> {
    let mut file = good.to_vec();
    let mut reader = Reader::new(changes);
    while let (Some(kind), Some(offset), Some(bytes)) = (reader.byte(), reader.array(), reader.prefixed()) {
        let offset = usize::from(u16::from_le_bytes(offset)).min(file.len());
        let end = (offset + bytes.len()).min(file.len());
        match kind % 3 {
            0 => drop(file.splice(offset..end, bytes.iter().copied())),
            1 => drop(file.splice(offset..offset, bytes.iter().copied())),
            _ => file.truncate(offset),
        }
    }
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a check on the committed corpus of its fuzz target.
    fn replay(target: &str, check: impl Fn(&[u8])) {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
        let mut tried = 0;
        for entry in std::fs::read_dir(corpus).unwrap() {
            let path = entry.unwrap().path();
            eprintln!("{}", path.display());
            check(&std::fs::read(path).unwrap());
            tried += 1;
        }
        assert!(tried > 2, "{target} has {tried} inputs");
    }

    #[test]
    fn the_journal_record_corpus_passes_its_check() {
        replay("journal_record", journal_record);
    }

    #[test]
    fn the_bucket_value_corpus_passes_its_check() {
        replay("bucket_value", bucket_value);
    }

    #[test]
    fn the_meta_entries_corpus_passes_its_check() {
        replay("meta_entries", meta_entries);
    }

    #[test]
    fn the_keys_corpus_passes_its_check() {
        replay("keys", keys);
    }

    #[test]
    fn the_filter_file_corpus_passes_its_check() {
        let dir = tempfile::tempdir().unwrap();
        replay("filter_file", |bytes| filter_file(&dir.path().join("bucket.filter"), bytes));
    }
}
