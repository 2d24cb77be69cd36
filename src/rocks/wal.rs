//! Checks RocksDB's log before RocksDB reads it: unsynced records may be torn, synced ones must be there (G6).
//!
//! RocksDB takes a record with a corrupt length for the end of the log, and skips from a zeroed header to the end of
//! its block: it would silently lose all later records. And it rejects a complete last record with wrong bytes,
//! although that record was never acknowledged. Here a corrupt record or a missing write is corruption if the LSN
//! headers (`lsn.rs`) prove that it had been synced. Otherwise the log is truncated at the corrupt offset. The
//! manifest has the same format without LSN headers: there a corrupt record is corruption if a valid one follows.
//!
//! ```text
//! log    := block (32 KiB)*, the last one shorter
//! block  := piece* | zeros, fewer than a header
//! piece  := masked CRC-32C of kind and payload (4) | payload length (2) | kind (1) | payload
//! record := full piece | first piece, middle piece*, last piece
//! ```

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::path::Path;

use super::lsn::{LsnHeader, missing_before, missing_within, proves_synced, read_headers};
use crate::codec::Reader;
use onlyonce_core::{Error, Result};

const BLOCK: usize = 32 * 1024;
const HEADER: usize = 7;

/// The kinds of pieces: a whole record, or one of several.
const FULL: u8 = 1;
const FIRST: u8 = 2;
const MIDDLE: u8 = 3;
const LAST: u8 = 4;
/// Of the log before this one: its number and its length (8 each), and a sequence number.
const PREDECESSOR: u8 = 130;

/// What a log holds.
#[derive(Debug, Default, PartialEq, Eq)]
struct Contents {
    /// Marks of whole records before the first bad place; of all where there is none.
    before: Vec<LsnHeader>,
    /// Where bytes begin that are no record, or a record of which a piece is missing.
    bad: Option<u64>,
    /// Whether anything good stands behind the bad place.
    has_records_after_corruption: bool,
    /// Marks of whole records behind it.
    after: Vec<LsnHeader>,
    /// How many bytes there are.
    len: u64,
    /// What it says of the log before it.
    predecessor: Option<Predecessor>,
    /// Where it is a manifest: logs, and how much of each was on the disk.
    synced: Vec<(u64, u64)>,
}

/// The log that was written to before another was begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Predecessor {
    number: u64,
    len: u64,
}

impl Predecessor {
    fn read(payload: &[u8]) -> Option<Self> {
        let (number, rest) = payload.split_first_chunk::<8>()?;
        let len = rest.first_chunk::<8>()?;
        Some(Self { number: u64::from_le_bytes(*number), len: u64::from_le_bytes(*len) })
    }
}

/// The number of a log, if it is one.
pub(super) fn number(path: &Path) -> Option<u64> {
    let is_log = path.extension().is_some_and(|extension| extension == "log");
    path.file_stem().filter(|_| is_log).and_then(|stem| stem.to_str()).and_then(|stem| stem.parse().ok())
}

/// Reads every log in the database's directory: refuses one that lacks what was synced, and cuts off from a bad place on
/// what was not. A log that was `closed` has no such place, and none has one in its first bytes that were on the disk as
/// `synced` says. What is left is on the disk when this returns. Where it refuses, nothing has changed.
pub(super) fn check(database: &Path, closed: bool, synced: &BTreeMap<u64, u64>) -> Result<()> {
    let unreadable = |error: std::io::Error| Error::io("reading", database, error);
    let mut logs = Vec::new();
    for entry in std::fs::read_dir(database).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if let Some(number) = number(&path) {
            logs.push((number, path));
        }
    }
    logs.sort_unstable();
    let numbers: Vec<u64> = logs.iter().map(|(number, _)| *number).collect();
    let (mut before, mut after) = (Vec::new(), Vec::new());
    let mut bad: Option<(usize, u64)> = None;
    // Where the marks of each log begin.
    let mut starts = Vec::with_capacity(logs.len());
    let mut older: Option<Predecessor> = None;
    for (log, (number, path)) in logs.iter().enumerate() {
        let contents = read_file(path, Records::Writes)?;
        let least = synced.get(number).copied().unwrap_or_default();
        if let Some(at) = contents.bad.or(Some(contents.len)).filter(|at| *at < least) {
            return Err(corrupt_record(path, at, &format!("the first {least} bytes were already synced")));
        }
        // A log that ended between two records is a bad place as well, at its end.
        if let (Some(older), Some(was)) = (older, contents.predecessor)
            && older.number == was.number
            && older.len < was.len
        {
            bad = bad.or(Some((log - 1, older.len)));
        }
        older = Some(Predecessor { number: *number, len: contents.len });
        starts.push(before.len());
        let so_far = if bad.is_some() { &mut after } else { &mut before };
        so_far.extend(contents.before);
        after.extend(contents.after);
        bad = bad.or(contents.bad.map(|at| (log, at)));
    }
    if let Some((log, at)) = bad {
        let Some((good, newer)) = logs.get(log..).and_then(<[_]>::split_first) else { return Ok(()) };
        let path = &good.1;
        if closed {
            return Err(corrupt_record(path, at, "the log was valid when the store was closed"));
        }
        if missing_before(&numbers, &before, &after).is_some() || proves_synced(&before, &after) {
            return Err(corrupt_record(path, at, "records after it were already synced"));
        }
        tracing::warn!(path = %path.display(), offset = at, "truncating torn WAL tail after unclean shutdown");
        // The newest first: a crash in between leaves nothing behind the bad place.
        for (_, path) in newer.iter().rev() {
            truncate(path, 0)?;
        }
        truncate(path, at)?;
    } else {
        for (log, (number, path)) in logs.iter().enumerate() {
            let start = starts.get(log).copied().unwrap_or_default();
            let end = starts.get(log + 1).copied().unwrap_or(before.len());
            let headers = before.get(start..end).unwrap_or_default();
            if let Some(missing) = missing_within(*number, headers, &before, closed) {
                let detail = format!("write {missing} is missing, but was already synced");
                return Err(Error::Corrupt { place: path.display().to_string(), detail });
            }
        }
    }
    if !closed {
        // A process that was killed has left some of it in memory. A bad place before what is going to be written must be
        // damage, and not what a power cut took from this.
        for (_, path) in &logs {
            File::open(path).and_then(|log| log.sync_all()).map_err(|error| Error::io("syncing", path, error))?;
        }
    }
    Ok(())
}

fn truncate(path: &Path, len: u64) -> Result<()> {
    let log = OpenOptions::new().write(true).open(path);
    log.and_then(|log| log.set_len(len).and_then(|()| log.sync_all()))
        .map_err(|error| Error::io("truncating", path, error))
}

/// Reads a manifest, which has a log's form: refuses one with a hole, or with a bad record before `least`, which was read
/// or written before. What a crash leaves at the end, RocksDB passes over.
/// Gives how much of which log was on the disk when it was noted here: RocksDB would refuse less, after [`check`] has cut.
pub(super) fn check_manifest(path: &Path, least: u64) -> Result<BTreeMap<u64, u64>> {
    match read_file(path, Records::Edits)? {
        Contents { bad: Some(at), .. } if at < least => {
            Err(corrupt_record(path, at, &format!("the first {least} bytes were valid before")))
        }
        Contents { bad: Some(at), has_records_after_corruption: true, .. } => {
            Err(corrupt_record(path, at, "valid records follow"))
        }
        Contents { synced, .. } => Ok(synced.into_iter().collect()),
    }
}

/// Hands out the logs of which a manifest's record says how much was on the disk. `None` where it says something else that
/// cannot be passed over: then it says nothing of logs but which of them are gone.
fn read_synced(record: &[u8], mut found: impl FnMut(u64, u64)) -> Option<()> {
    /// Unknown tags from here on are followed by a length, except for two that RocksDB never writes.
    const SKIPPED: u64 = 1 << 13;
    let mut reader = Reader::new(record);
    while !reader.is_empty() {
        match reader.varint()? {
            // The comparator's name.
            1 => drop(reader.prefixed()?),
            // Numbers: of logs and files, of the last write, of a family.
            2 | 3 | 4 | 9 | 10 | 200 | 203 => drop(reader.varint()?),
            8_196 | 8_197 => return None,
            8_199 => {
                let mut log = Reader::new(reader.prefixed()?);
                let number = log.varint()?;
                if log.varint()? == 2 {
                    found(number, log.varint()?);
                }
            }
            tag if tag & SKIPPED != 0 => drop(reader.prefixed()?),
            _ => return None,
        }
    }
    Some(())
}

fn read_file(path: &Path, records: Records) -> Result<Contents> {
    let mut file = File::open(path).map_err(|error| Error::io("opening", path, error))?;
    read(&mut file, records).map_err(|error| Error::io("reading", path, error))
}

fn corrupt_record(path: &Path, at: u64, reason: &str) -> Error {
    Error::Corrupt {
        place: path.display().to_string(),
        detail: format!("a record is damaged or missing at offset {at}, but {reason}"),
    }
}

fn read(log: &mut impl Read, records: Records) -> std::io::Result<Contents> {
    let mut reading = Reading { records, contents: Contents::default(), begun: None, record: Vec::new() };
    let mut block = Vec::with_capacity(BLOCK);
    let mut start = 0_u64;
    loop {
        block.clear();
        log.by_ref().take(BLOCK as u64).read_to_end(&mut block)?;
        reading.block(start, &block);
        start += block.len() as u64;
        if block.len() < BLOCK {
            reading.contents.len = start;
            return Ok(reading.finish());
        }
    }
}

/// What the records of a file are.
#[derive(Clone, Copy)]
enum Records {
    /// A log's: writes, ours with their marks.
    Writes,
    /// A manifest's: RocksDB's notes of its files.
    Edits,
}

/// A log that is being read.
struct Reading {
    records: Records,
    contents: Contents,
    /// A record that goes on: where it begins, and its bytes so far.
    begun: Option<u64>,
    record: Vec<u8>,
}

impl Reading {
    fn block(&mut self, start: u64, block: &[u8]) {
        let mut offset = 0;
        while let Some(rest) = block.get(offset..).filter(|rest| !rest.is_empty()) {
            if let Some((kind, payload)) = piece(rest) {
                self.piece(start + offset as u64, kind, payload);
                offset += HEADER + payload.len();
                continue;
            }
            // Too short for a header: padding before the next block, or the log's very end.
            if rest.len() < HEADER && rest.iter().all(|byte| *byte == 0) {
                return;
            }
            self.bad(start + offset as u64);
            // Its length is unknown: the next record may begin at any byte.
            offset = (offset + 1..block.len())
                .find(|offset| block.get(*offset..).is_some_and(|rest| piece(rest).is_some()))
                .unwrap_or(block.len());
        }
    }

    fn piece(&mut self, at: u64, kind: u8, payload: &[u8]) {
        // Others tell of the log, and stand between records.
        if !matches!(kind, FULL | FIRST | MIDDLE | LAST) {
            self.contents.has_records_after_corruption |= self.contents.bad.is_some();
            if kind == PREDECESSOR {
                self.contents.predecessor = Predecessor::read(payload);
            }
            return;
        }
        let begins = matches!(kind, FULL | FIRST);
        if begins == self.begun.is_some() {
            // A piece is missing before this one.
            self.bad(at);
        }
        self.contents.has_records_after_corruption |= self.contents.bad.is_some_and(|bad| bad < at);
        if begins {
            self.begun = Some(at);
            self.record.clear();
        }
        if self.begun.is_some() {
            self.record.extend_from_slice(payload);
            if matches!(kind, FULL | LAST) {
                self.begun = None;
                let Contents { before, after, bad, synced, .. } = &mut self.contents;
                let headers = if bad.is_some() { after } else { before };
                // What is neither ours nor of a log, RocksDB knows.
                let _ = match self.records {
                    Records::Writes => read_headers(&self.record, |header| headers.push(header)),
                    Records::Edits => read_synced(&self.record, |log, bytes| synced.push((log, bytes))),
                };
            }
        }
    }

    /// No record is whole that reaches over this place.
    fn bad(&mut self, at: u64) {
        let at = self.begun.take().unwrap_or(at);
        self.contents.bad.get_or_insert(at);
    }

    fn finish(mut self) -> Contents {
        if let Some(at) = self.begun {
            self.bad(at);
        }
        self.contents
    }
}

/// The piece of a record that these bytes begin with, if they do: its kind and its payload.
fn piece(bytes: &[u8]) -> Option<(u8, &[u8])> {
    let (crc, rest) = bytes.split_first_chunk::<4>()?;
    let (len, rest) = rest.split_first_chunk::<2>()?;
    let len = usize::from(u16::from_le_bytes(*len));
    let checked = rest.get(..len + 1)?;
    let (kind, payload) = checked.split_first()?;
    // The others: compression and timestamps. Recycled logs, which are not written, have more.
    if !matches!(*kind, FULL | FIRST | MIDDLE | LAST | 9 | 10 | PREDECESSOR) {
        return None;
    }
    (masked(crc32c::crc32c(checked)) == u32::from_le_bytes(*crc)).then_some((*kind, payload))
}

/// RocksDB's form of a checksum, so that one of data with checksums in it is as good.
fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// Appends a record, in as many pieces as there are blocks that it begins in or reaches.
#[cfg(any(test, fuzzing))]
pub(super) fn put_wal_record(log: &mut Vec<u8>, mut payload: &[u8]) {
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
        put_piece(log, kind, piece);
        if rest.is_empty() {
            return;
        }
        (begun, payload) = (true, rest);
    }
}

#[cfg(any(test, fuzzing))]
fn put_piece(log: &mut Vec<u8>, kind: u8, payload: &[u8]) {
    let checked = [&[kind], payload].concat();
    log.extend_from_slice(&masked(crc32c::crc32c(&checked)).to_le_bytes());
    log.extend_from_slice(&(payload.len() as u16).to_le_bytes());
    log.extend_from_slice(&checked);
}

/// Where the bytes begin that are no record, if there are any.
#[cfg(any(test, fuzzing))]
pub(super) fn corrupt_offset(mut log: &[u8]) -> Option<u64> {
    read(&mut log, Records::Writes).ok()?.bad
}

#[cfg(test)]
mod tests {
    use super::super::lsn::LsnTracker;
    use super::put_wal_record as put;
    use super::*;

    const CLEAN: (Option<u64>, bool) = (None, false);

    fn torn(at: usize) -> (Option<u64>, bool) {
        (Some(at as u64), false)
    }

    fn hole(at: usize) -> (Option<u64>, bool) {
        (Some(at as u64), true)
    }

    /// Where it is bad, and whether something good stands behind that.
    fn end_in(log: &[u8]) -> (Option<u64>, bool) {
        let contents = read(&mut &log[..], Records::Writes).unwrap();
        (contents.bad, contents.has_records_after_corruption)
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
        assert_eq!(end_in(&log), CLEAN);
        for len in 0..log.len() {
            let whole = len / 997 * 997;
            let expected = if len == whole { CLEAN } else { torn(whole) };
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
                let bad = at / 997 * 997;
                let expected = if at < log.len() - 997 { hole(bad) } else { torn(bad) };
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
        assert_eq!(end_in(&log), CLEAN);
        // All of the second block.
        log[BLOCK..2 * BLOCK].fill(0);
        assert_eq!(end_in(&log), hole(BLOCK));
        log[2 * BLOCK..].fill(0);
        assert_eq!(end_in(&log), torn(BLOCK));
    }

    #[test]
    fn a_record_without_one_of_its_pieces_is_bad_from_its_first_on() {
        let mut log = Vec::new();
        put(&mut log, &[1; 93]);
        // Pieces of it begin at 100 and at the two blocks' beginnings behind it.
        put(&mut log, &vec![2; 2 * BLOCK]);
        let long = 100..log.len();
        put(&mut log, &[3; 93]);
        assert_eq!(end_in(&log), CLEAN);
        assert_eq!(end_in(&log[..2 * BLOCK]), torn(long.start), "without its last");
        let mut without_first = log.clone();
        without_first[long.start] ^= 1;
        assert_eq!(end_in(&without_first), hole(long.start));
        let mut without_middle = log.clone();
        without_middle.drain(BLOCK..2 * BLOCK);
        assert_eq!(end_in(&without_middle), CLEAN, "RocksDB finds that its entries are cut short");
        let without_last = [&log[..2 * BLOCK], &log[long.end..]].concat();
        assert_eq!(end_in(&without_last), hole(long.start));
        let first_gone = [&log[..long.start], &vec![0; BLOCK - long.start], &log[BLOCK..]].concat();
        assert_eq!(end_in(&first_gone), hole(long.start));
    }

    /// Logs of a database that was not closed, each of writes with their marks.
    fn check_logs(logs: &[Vec<u8>], closed: bool) -> (Result<()>, Vec<usize>) {
        check_noted(logs, closed, &BTreeMap::new())
    }

    fn check_noted(logs: &[Vec<u8>], closed: bool, synced: &BTreeMap<u64, u64>) -> (Result<()>, Vec<usize>) {
        let dir = tempfile::tempdir().unwrap();
        let path = |log: usize| dir.path().join(format!("{:06}.log", log + 7));
        logs.iter().enumerate().for_each(|(number, log)| std::fs::write(path(number), log).unwrap());
        let checked = check(dir.path(), closed, synced);
        (checked, (0..logs.len()).map(|log| std::fs::metadata(path(log)).unwrap().len() as usize).collect())
    }

    fn lsn(epoch: u64) -> LsnTracker {
        let lsn = LsnTracker::default();
        lsn.begin_epoch(epoch);
        lsn
    }

    fn write(log: &mut Vec<u8>, lsn: &LsnTracker) {
        let header = lsn.begin();
        let mut batch = rocksdb::WriteBatch::default();
        batch.put(b"key", [7; 100]);
        header.put(&mut batch);
        put(log, batch.data());
        lsn.written(&header);
    }

    #[test]
    fn a_bad_place_that_was_not_synced_ends_the_log_and_all_that_came_later() {
        let lsn = lsn(7);
        let (mut older, mut newer) = (Vec::new(), Vec::new());
        (0..5).for_each(|_| write(&mut older, &lsn));
        lsn.synced(lsn.written_lsn());
        write(&mut older, &lsn);
        let synced = older.len() / 6 * 5;
        let at = older.len();
        (0..3).for_each(|_| write(&mut older, &lsn));
        (0..3).for_each(|_| write(&mut newer, &lsn));
        let whole = vec![older.clone(), newer.clone()];
        assert!(matches!(check_logs(&whole, false), (Ok(()), lens) if lens == [older.len(), newer.len()]));

        let bad = |place: usize| {
            let mut older = older.clone();
            older[place + 20] ^= 1;
            check_logs(&[older, newer.clone()], false)
        };
        assert!(matches!(bad(at), (Ok(()), lens) if lens == [at, 0]), "cut off, and the newer log with it");
        let (refused, lens) = bad(synced / 5 * 4);
        assert!(matches!(refused, Err(Error::Corrupt { place, .. }) if place.ends_with("000007.log")));
        assert_eq!(lens, [older.len(), newer.len()], "and nothing is touched");
    }

    #[test]
    fn a_log_that_is_shorter_than_the_next_one_says_ends_there_and_was_not_synced_or_is_corrupt() {
        let lsn = lsn(7);
        let mut older = Vec::new();
        let mut ends = vec![0];
        for number in 0..6 {
            write(&mut older, &lsn);
            ends.push(older.len());
            if number == 2 {
                lsn.synced(lsn.written_lsn());
            }
        }
        let mut newer = Vec::new();
        let predecessor = [7_u64, older.len() as u64, 99].map(u64::to_le_bytes).concat();
        put_piece(&mut newer, PREDECESSOR, &predecessor);
        let header_end = newer.len();
        (0..2).for_each(|_| write(&mut newer, &lsn));
        for newer in [&newer[..header_end], &newer[..]] {
            for end in &ends {
                let (checked, lens) = check_logs(&[older[..*end].to_vec(), newer.to_vec()], false);
                if *end == older.len() {
                    assert!(checked.is_ok() && lens == [older.len(), newer.len()], "whole: {checked:?}, {lens:?}");
                } else if *end < ends[3] {
                    // A later write, if there is one, proves that the third one was synced.
                    let is_proven = newer.len() > header_end;
                    assert_eq!(checked.is_err(), is_proven, "cut at {end} of {}: {checked:?}", older.len());
                } else {
                    assert!(checked.is_ok() && lens == [*end, 0], "cut at {end}: {checked:?}, {lens:?}");
                }
                let (checked, _) = check_logs(&[older[..*end].to_vec(), newer.to_vec()], true);
                assert_eq!(checked.is_ok(), *end == older.len(), "closed, cut at {end}: {checked:?}");
            }
        }
    }

    #[test]
    fn what_the_manifest_knows_to_be_on_the_disk_must_be_there_and_else_nothing_is_cut() {
        let lsn = lsn(7);
        let (mut older, mut newer) = (Vec::new(), Vec::new());
        let mut ends = vec![0];
        for _ in 0..4 {
            write(&mut older, &lsn);
            ends.push(older.len());
        }
        let predecessor = [7_u64, older.len() as u64, 99].map(u64::to_le_bytes).concat();
        put_piece(&mut newer, PREDECESSOR, &predecessor);
        // It was made before the sync that covers it and the older log, and does not know of it.
        write(&mut newer, &lsn);
        let synced = BTreeMap::from([(7, older.len() as u64)]);
        assert!(check_noted(&[older.clone(), newer.clone()], false, &synced).0.is_ok());
        let flipped = |at: usize| {
            let mut log = older.clone();
            log[at] ^= 1;
            log
        };
        let truncate = ends[..4].iter().map(|end| older[..*end].to_vec());
        for damaged in truncate.chain(ends[..4].iter().map(|end| flipped(end + 20))) {
            let lens = [damaged.len(), newer.len()];
            let (refused, left) = check_noted(&[damaged, newer.clone()], false, &synced);
            assert!(matches!(refused, Err(Error::Corrupt { place, .. }) if place.ends_with("000007.log")));
            assert_eq!(left, lens, "and nothing is touched");
        }
    }

    #[test]
    fn a_manifest_says_how_much_of_which_log_was_on_the_disk() {
        let read = |record: &[u8]| {
            let mut found = Vec::new();
            let _ = read_synced(record, |log, bytes| found.push((log, bytes)));
            found
        };
        // Tag 8199, length, log 18, tag 2, 66 bytes, tag 1; the same of log 19 without a length; an identity; a family.
        let record = [
            0x87, 0x40, 4, 18, 2, 66, 1, 0x87, 0x40, 2, 19, 1, 0x81, 0x40, 1, b'x', 0xc8, 0x01, 0, 0x87, 0x40, 4, 20,
            2, 7, 1,
        ];
        assert_eq!(read(&record), [(18, 66), (20, 7)]);
        for len in 0..record.len() {
            assert!(read(&record[..len]).len() <= 2, "cut at {len}");
        }
        assert_eq!(read(&[103, 1, 2, 3, 0x87, 0x40, 4, 18, 2, 66, 1]), [], "a file, of unknown length");
    }

    #[test]
    fn a_write_that_was_synced_and_is_gone_without_a_trace_is_corruption() {
        // Its first log is gone.
        let lsn = lsn(6);
        let mut ends = vec![0];
        let mut log = Vec::new();
        for number in 0..10 {
            write(&mut log, &lsn);
            ends.push(log.len());
            if number == 6 {
                lsn.synced(lsn.written_lsn());
            }
        }
        for gone in 2..10 {
            let without = [&log[..ends[gone]], &log[ends[gone + 1]..]].concat();
            let (checked, _) = check_logs(std::slice::from_ref(&without), false);
            assert_eq!(checked.is_err(), gone <= 6, "without write {gone}: {checked:?}");
            let (checked, _) = check_logs(&[without], true);
            assert_eq!(checked.is_err(), gone < 9, "closed, without write {gone}: {checked:?}");
        }
    }
}
