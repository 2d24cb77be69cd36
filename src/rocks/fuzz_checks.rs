//! Fuzz checks of this folder's file formats: see `src/testing/fuzz_checks.rs`.

use super::{file_manifest, wal};

/// A file manifest is rejected, or is the same after it is encoded again. Also tries the input with a valid checksum.
pub(crate) fn file_manifest(bytes: &[u8]) {
    let checked = [bytes, format!("crc {:08x}\n", crc32c::crc32c(bytes)).as_bytes()].concat();
    for bytes in [bytes, &checked] {
        if let Some(written) = file_manifest::rewritten(bytes) {
            assert_eq!(written.as_bytes(), bytes);
        }
    }
}

/// A log is valid up to its corrupt offset. The input is the log; or, if the first byte is even, the lengths of its
/// records, and a change after them.
pub(crate) fn wal(bytes: &[u8]) {
    check_log(bytes);
    let Some((lengths, change)) = bytes
        .split_first()
        .and_then(|(count, rest)| (count % 2 == 0).then(|| rest.split_at_checked(usize::from(*count / 2))).flatten())
    else {
        return;
    };
    let mut log = Vec::new();
    for length in lengths {
        wal::put_wal_record(&mut log, &vec![*length; usize::from(*length) * 7]);
    }
    assert_eq!(wal::corrupt_offset(&log), None);
    if let Some((offset, xor)) = change.split_first_chunk::<2>() {
        let start = usize::from(u16::from_le_bytes(*offset));
        for (byte, xor) in log.iter_mut().skip(start).zip(xor) {
            *byte ^= xor;
        }
    }
    check_log(&log);
}

fn check_log(log: &[u8]) {
    if let Some(at) = wal::corrupt_offset(log) {
        let valid = log.get(..at as usize).unwrap_or_else(|| unreachable!("the log has no byte {at}"));
        assert_eq!(wal::corrupt_offset(valid), None, "the log is valid up to its corrupt offset");
    }
}
