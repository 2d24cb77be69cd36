//! What the tests of the journal share.
#![allow(dead_code, reason = "each test uses a part")]

use onlyonce_journal::{Durability, Error, Journal, Medium, Options, Recovered, Report, SimulatedDisk};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// The smallest allowed size of a segment.
pub(crate) const SEGMENT: usize = 64 << 10;

/// A number from the environment.
pub(crate) fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|value| value.parse().unwrap())
}

/// A generator with the seed of `ONLYONCE_JOURNAL_SEED` or a new one, which is printed.
pub(crate) fn rng(test: &str) -> StdRng {
    let seed = number("ONLYONCE_JOURNAL_SEED").unwrap_or_else(rand::random);
    eprintln!("{test}: ONLYONCE_JOURNAL_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

/// How many rounds a random test has.
pub(crate) fn rounds(default: u64) -> u64 {
    let debug = if cfg!(debug_assertions) { 10 } else { 1 };
    number("ONLYONCE_JOURNAL_ROUNDS").unwrap_or((default / debug).max(1))
}

/// Small segments, so that tests use many.
pub(crate) fn options(largest: usize, spare: usize) -> Options {
    let mut options = Options::default();
    options.smallest_segment = SEGMENT as u64;
    options.largest_segment = largest as u64;
    options.spare_bytes = spare as u64;
    options
}

pub(crate) fn small() -> Options {
    options(SEGMENT, 2 * SEGMENT)
}

/// What an open returns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Content {
    pub(crate) checkpoint: Vec<u8>,
    pub(crate) records: Vec<Vec<u8>>,
}

impl Content {
    /// A short form for messages.
    pub(crate) fn summary(&self) -> String {
        let records: Vec<_> = self.records.iter().map(|record| brief(record)).collect();
        format!("checkpoint {}, {} records: {}", brief(&self.checkpoint), records.len(), records.join(" "))
    }
}

fn brief(bytes: &[u8]) -> String {
    let id = bytes.first_chunk().map_or(0, |id| u64::from_le_bytes(*id));
    format!("#{id}({})", bytes.len())
}

/// Opens a journal and returns what it has.
pub(crate) fn open<M: Medium>(medium: M, options: &Options) -> Result<(Journal<M>, Content, Report), Error> {
    let mut content = Content { checkpoint: Vec::new(), records: Vec::new() };
    let mut checkpoints = 0;
    let (journal, report) = Journal::open(medium, options, |recovered| {
        match recovered {
            Recovered::Checkpoint(bytes) => {
                content.checkpoint = bytes.to_vec();
                checkpoints += 1;
                assert!(content.records.is_empty(), "the checkpoint comes first");
            }
            Recovered::Record(bytes) => content.records.push(bytes.to_vec()),
        }
        Ok(())
    })?;
    assert_eq!(checkpoints, 1);
    assert_eq!(report.records, content.records.len() as u64);
    assert_eq!(report.bytes, content.records.iter().map(|record| record.len() as u64).sum::<u64>());
    Ok((journal, content, report))
}

/// What an open of this disk returns. The disk does not change.
pub(crate) fn content(disk: &SimulatedDisk) -> Result<Content, Error> {
    open(disk.killed(), &small()).map(|(_, content, _)| content)
}

/// A payload whose bytes are different for each id.
pub(crate) fn payload(id: u64, len: usize) -> Vec<u8> {
    let mut payload: Vec<u8> = id.to_le_bytes().into_iter().chain(std::iter::repeat(id as u8 | 1)).take(len).collect();
    if let Some(last) = payload.last_mut() {
        *last ^= 0x80;
    }
    payload
}

pub(crate) fn durability(rng: &mut StdRng) -> Durability {
    if rng.random_bool(0.4) { Durability::Disk } else { Durability::Process }
}
