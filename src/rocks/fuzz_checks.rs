//! What must hold of any bytes in the files of this folder: see `src/fuzz_checks.rs`.

use super::{file_manifest, wal};

/// An inventory is refused, or the same when it is written again; also one whose checksum is right.
pub(crate) fn file_manifest(bytes: &[u8]) {
    let checked = [bytes, format!("crc {:08x}\n", crc32c::crc32c(bytes)).as_bytes()].concat();
    for bytes in [bytes, &checked] {
        if let Some(written) = file_manifest::rewritten(bytes) {
            assert_eq!(written.as_bytes(), bytes);
        }
    }
}

/// A log is whole up to the place where it is torn. The bytes are the log; or, if the first is even, the lengths of its
/// records, and a change behind them.
pub(crate) fn wal(bytes: &[u8]) {
    check_log(bytes);
    let Some((lengths, change)) = bytes
        .split_first()
        .and_then(|(count, rest)| (count % 2 == 0).then(|| rest.split_at_checked(usize::from(*count / 2))).flatten())
    else {
        return;
    };
    let mut whole = Vec::new();
    for length in lengths {
        wal::put_wal_record(&mut whole, &vec![*length; usize::from(*length) * 7]);
    }
    assert_eq!(wal::corrupt_offset(&whole), None);
    if let Some((offset, xor)) = change.split_first_chunk::<2>() {
        let start = usize::from(u16::from_le_bytes(*offset));
        for (byte, xor) in whole.iter_mut().skip(start).zip(xor) {
            *byte ^= xor;
        }
    }
    check_log(&whole);
}

fn check_log(log: &[u8]) {
    if let Some(at) = wal::corrupt_offset(log) {
        let whole = log.get(..at as usize).unwrap_or_else(|| unreachable!("it has no byte {at}"));
        assert_eq!(wal::corrupt_offset(whole), None, "it is cut off where it is torn, and whole then");
    }
}
