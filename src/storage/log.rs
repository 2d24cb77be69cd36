//! RocksDB's log, read before RocksDB reads it: a torn end is what a crash leaves, a hole is corruption (G6).
//!
//! RocksDB takes a record with a bad length for the end of the log, and passes over a zeroed header to the end of its
//! block: what follows would be forgotten without a word. And it refuses a last record that is all there with some of its
//! bytes wrong, although nobody was told that it was written. Here a bad record that a good one follows is a hole, and
//! one that none follows is cut off. The manifest has the same form, and the same holes.
//!
//! ```text
//! log    := block (32 KiB)*, the last one shorter
//! block  := record* | zeros, fewer than a header
//! record := masked CRC-32C of type and payload (4) | payload length (2) | type (1) | payload
//! ```

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::path::Path;

use crate::error::{Error, Result};

const BLOCK: usize = 32 * 1024;
const HEADER: usize = 7;

/// What a log is like behind its last good record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// Nothing, or less than a record's header.
    Clean,
    /// Bytes that are no record, from here on.
    Torn { at: u64 },
    /// Bytes that are no record, and good records behind them.
    Hole { at: u64 },
}

/// The number of a log, if it is one.
pub(super) fn number(path: &Path) -> Option<u64> {
    let is_log = path.extension().is_some_and(|extension| extension == "log");
    path.file_stem().filter(|_| is_log).and_then(|stem| stem.to_str()).and_then(|stem| stem.parse().ok())
}

/// Reads every log in the database's directory: refuses a hole, cuts off the torn end of the newest. A log that was
/// `closed` has none.
pub(super) fn check(database: &Path, closed: bool) -> Result<()> {
    let unreadable = |error: std::io::Error| Error::io("cannot read", database, &error);
    let mut logs = Vec::new();
    for entry in std::fs::read_dir(database).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if let Some(number) = number(&path) {
            logs.push((number, path));
        }
    }
    logs.sort_unstable();
    // Behind a newer log that says something, an end is in the middle.
    let mut newer = false;
    for (_, path) in logs.into_iter().rev() {
        match end_of(&path)? {
            End::Clean => {}
            End::Torn { at } if !newer && !closed => {
                tracing::warn!(path = %path.display(), at, "the log ends in half a record, as a crash leaves it: cut off");
                let cut = |file: File| file.set_len(at).and_then(|()| file.sync_all());
                let file = OpenOptions::new().write(true).open(&path);
                file.and_then(cut).map_err(|error| Error::io("cannot cut", &path, &error))?;
            }
            End::Torn { at } if closed => return Err(bad_record(&path, at, "was closed without one")),
            End::Torn { at } => return Err(bad_record(&path, at, "a newer log behind it")),
            End::Hole { at } => return Err(bad_record(&path, at, "good ones behind it")),
        }
        newer |= std::fs::metadata(&path).map_err(unreadable)?.len() > 0;
    }
    Ok(())
}

/// Reads a manifest, which has a log's form: refuses one with a hole, or with a bad record before `least`, which was read
/// or written before. What a crash leaves at the end, RocksDB passes over.
pub(super) fn check_manifest(path: &Path, least: u64) -> Result<()> {
    match end_of(path)? {
        End::Torn { at } if at < least => Err(bad_record(path, at, "was longer before")),
        End::Hole { at } => Err(bad_record(path, at, "good ones behind it")),
        End::Clean | End::Torn { .. } => Ok(()),
    }
}

fn end_of(path: &Path) -> Result<End> {
    let mut file = File::open(path).map_err(|error| Error::io("cannot open", path, &error))?;
    end(&mut file).map_err(|error| Error::io("cannot read", path, &error))
}

fn bad_record(path: &Path, at: u64, and: &str) -> Error {
    Error::Corrupt { place: path.display().to_string(), detail: format!("it has a bad record at byte {at}, and {and}") }
}

fn end(log: &mut impl Read) -> std::io::Result<End> {
    let mut block = Vec::with_capacity(BLOCK);
    let mut start = 0_u64;
    let mut bad = None;
    loop {
        block.clear();
        log.by_ref().take(BLOCK as u64).read_to_end(&mut block)?;
        if let Some(at) = bad {
            if holds_a_record(&block) {
                return Ok(End::Hole { at });
            }
        } else if let Some(offset) = first_bad(&block) {
            let at = start + offset as u64;
            // The bad record's own bytes may hold no record of their own: looking begins behind its first.
            if block.get(offset + 1..).is_some_and(holds_a_record) {
                return Ok(End::Hole { at });
            }
            bad = Some(at);
        }
        if block.len() < BLOCK {
            return Ok(bad.map_or(End::Clean, |at| End::Torn { at }));
        }
        start += BLOCK as u64;
    }
}

/// Where the first bytes of a block lie that are no record.
fn first_bad(block: &[u8]) -> Option<usize> {
    let mut offset = 0;
    while let Some(rest) = block.get(offset..).filter(|rest| !rest.is_empty()) {
        match record(rest) {
            Some(len) => offset += len,
            // Too short for a header: padding before the next block, or the log's very end.
            None if rest.len() < HEADER && rest.iter().all(|byte| *byte == 0) => return None,
            None => return Some(offset),
        }
    }
    None
}

/// Whether a record begins anywhere in these bytes.
fn holds_a_record(bytes: &[u8]) -> bool {
    (0..bytes.len()).any(|offset| bytes.get(offset..).is_some_and(|rest| record(rest).is_some()))
}

/// The length of the record that these bytes begin with, if they do.
fn record(bytes: &[u8]) -> Option<usize> {
    let (crc, rest) = bytes.split_first_chunk::<4>()?;
    let (len, rest) = rest.split_first_chunk::<2>()?;
    let len = usize::from(u16::from_le_bytes(*len));
    let checked = rest.get(..len + 1)?;
    // Full, first, middle, last; compression; timestamps; predecessor. Recycled logs, which are not written, have others.
    if !matches!(checked.first()?, 1..=4 | 9 | 10 | 130) {
        return None;
    }
    (masked(crc32c::crc32c(checked)) == u32::from_le_bytes(*crc)).then_some(HEADER + len)
}

/// RocksDB's form of a checksum, so that one of data with checksums in it is as good.
fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// Appends a record, in as many pieces as there are blocks that it begins in or reaches.
#[cfg(any(test, fuzzing))]
pub(super) fn put_record(log: &mut Vec<u8>, mut payload: &[u8]) {
    const FULL: u8 = 1;
    const FIRST: u8 = 2;
    const MIDDLE: u8 = 3;
    const LAST: u8 = 4;
    let mut begun = false;
    loop {
        let left = BLOCK - log.len() % BLOCK;
        if left < HEADER {
            log.resize(log.len() + left, 0);
            continue;
        }
        let (piece, rest) = payload.split_at(payload.len().min(left - HEADER));
        let kind = match (begun, rest.is_empty()) {
            (false, true) => FULL,
            (false, false) => FIRST,
            (true, false) => MIDDLE,
            (true, true) => LAST,
        };
        let checked = [&[kind], piece].concat();
        log.extend_from_slice(&masked(crc32c::crc32c(&checked)).to_le_bytes());
        log.extend_from_slice(&(piece.len() as u16).to_le_bytes());
        log.extend_from_slice(&checked);
        if rest.is_empty() {
            return;
        }
        (begun, payload) = (true, rest);
    }
}

/// Where the bytes begin that are no record, if there are any.
#[cfg(any(test, fuzzing))]
pub(super) fn bad_place(mut log: &[u8]) -> Option<u64> {
    match end(&mut log) {
        Ok(End::Torn { at } | End::Hole { at }) => Some(at),
        Ok(End::Clean) | Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::put_record as put;
    use super::*;

    fn end_in(log: &[u8]) -> End {
        end(&mut &log[..]).unwrap()
    }

    #[test]
    fn a_log_that_is_cut_anywhere_is_torn_there() {
        let mut log = Vec::new();
        for _ in 0..40 {
            put(&mut log, &[5; 990]);
            if log.len() % BLOCK > BLOCK - 1_000 {
                break;
            }
        }
        assert_eq!(end_in(&log), End::Clean);
        for len in 0..log.len() {
            let whole = len / 997 * 997;
            let expected = match len - whole {
                0 => End::Clean,
                _ => End::Torn { at: whole as u64 },
            };
            assert_eq!(end_in(&log[..len]), expected, "cut at {len}");
        }
    }

    #[test]
    fn a_bad_record_is_a_hole_where_a_good_one_follows_and_the_end_where_none_does() {
        let mut log = Vec::new();
        for i in 0..30 {
            put(&mut log, &[i; 990]);
        }
        for at in (0..log.len()).step_by(13).chain(0..30).chain(log.len() - 997..log.len()) {
            for mask in [1, 0x80] {
                let mut garbled = log.clone();
                garbled[at] ^= mask;
                let bad = (at / 997 * 997) as u64;
                let expected = if at < log.len() - 997 { End::Hole { at: bad } } else { End::Torn { at: bad } };
                assert_eq!(end_in(&garbled), expected, "bit {mask} of byte {at}");
            }
        }
    }

    #[test]
    fn a_hole_is_seen_over_the_ends_of_blocks() {
        let mut block = Vec::new();
        put(&mut block, &vec![1; BLOCK - 2 * HEADER - 100]);
        put(&mut block, &[2; 100]);
        assert_eq!(block.len(), BLOCK);
        let mut log = [block.clone(), block.clone(), block.clone()].concat();
        assert_eq!(end_in(&log), End::Clean);
        // All of the second block.
        log[BLOCK..2 * BLOCK].fill(0);
        assert_eq!(end_in(&log), End::Hole { at: BLOCK as u64 });
        log[2 * BLOCK..].fill(0);
        assert_eq!(end_in(&log), End::Torn { at: BLOCK as u64 });
    }
}
