//! Segments: preallocated files that are used again when their records are not needed any more.
//!
//! ```text
//! segment := header (4096) | header (4096) | fragment* | anything
//! header  := "1ONCEJNL" | crc (4) | version (4) | journal (16) | number (8) | previous (8) | first lsn (8)
//!          | durable lsn (8) | salt (8) | next slot (4) | zeros
//!   crc   := CRC-32C of all fields after it
//! ```
//!
//! A *slot* is the number in a file's name. A *number* is given to a segment each time its file is used. The fragments of a
//! segment end at the first one that is not valid under the segment's salt, so that remains of an earlier use, which have
//! another salt, end it too.
//!
//! The header is there twice, in two blocks, so that damage to one block cannot make a whole segment disappear. It names the
//! slot of the next segment, which exists before this one is used: so a missing last segment is noticed.

use parking_lot::Mutex;

use super::error::{Result, corrupt, not_written};
pub(crate) use super::layout::{DATA_START, name, slot};
use super::medium::{BLOCK, Medium, MediumFile};
use super::record::{self, Fragment, Salt};

/// The smallest size of a segment.
pub(crate) const MIN_BYTES: u64 = 64 << 10;
/// The largest size of a segment.
pub(crate) const MAX_BYTES: u64 = 1 << 30;
/// Numbers and lsns are lower: no journal reaches it, so that a higher one is damage, and sums never overflow.
const MAX_COUNT: u64 = 1 << 62;

const MAGIC: &[u8; 8] = b"1ONCEJNL";
const VERSION: u32 = 1;
/// The size of the fields after the checksum.
const FIELDS: usize = 4 + 16 + 5 * 8 + 4;
/// A search for fragments computes checksums over at most this many times the size of a segment.
const SCAN_EFFORT: usize = 16;

/// The random id of a journal. All its segments have it.
pub(crate) type JournalId = [u8; 16];

/// The header of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) journal: JournalId,
    /// Higher than that of every segment before it.
    pub(crate) number: u64,
    /// The number of the segment before it.
    pub(crate) previous: u64,
    pub(crate) first_lsn: u64,
    /// All fragments with a lower lsn were on disk when this header was written.
    pub(crate) durable_lsn: u64,
    pub(crate) salt: u64,
    /// The slot of the next segment.
    pub(crate) next_slot: u32,
}

impl Header {
    /// Both copies of the header, as they are written.
    pub(crate) fn encoded(&self) -> Vec<u8> {
        let mut fields = Vec::with_capacity(FIELDS);
        fields.extend_from_slice(&VERSION.to_le_bytes());
        fields.extend_from_slice(&self.journal);
        for field in [self.number, self.previous, self.first_lsn, self.durable_lsn, self.salt] {
            fields.extend_from_slice(&field.to_le_bytes());
        }
        fields.extend_from_slice(&self.next_slot.to_le_bytes());
        let mut block = Vec::with_capacity(BLOCK);
        block.extend_from_slice(MAGIC);
        block.extend_from_slice(&crc32c::crc32c(&fields).to_le_bytes());
        block.extend_from_slice(&fields);
        block.resize(BLOCK, 0);
        block.repeat(2)
    }

    pub(crate) fn read(block: &[u8]) -> Option<Self> {
        let (crc, fields) = block.strip_prefix(MAGIC)?.split_first_chunk()?;
        let fields = fields.get(..FIELDS)?;
        let (version, rest) = fields.split_first_chunk()?;
        if crc32c::crc32c(fields) != u32::from_le_bytes(*crc) || u32::from_le_bytes(*version) != VERSION {
            return None;
        }
        let (journal, rest) = rest.split_first_chunk()?;
        let word = |index: usize| rest.get(index * 8..)?.first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
        let header = Self {
            journal: *journal,
            number: word(0)?,
            previous: word(1)?,
            first_lsn: word(2)?,
            durable_lsn: word(3)?,
            salt: word(4)?,
            next_slot: rest.get(40..)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))?,
        };
        let counts = [header.number, header.previous, header.first_lsn, header.durable_lsn];
        let is_plausible = counts.iter().all(|count| *count < MAX_COUNT)
            && header.previous < header.number
            && header.durable_lsn <= header.first_lsn;
        is_plausible.then_some(header)
    }
}

/// The file of a slot.
#[derive(Debug)]
pub(crate) struct Slot<F> {
    pub(crate) slot: u32,
    pub(crate) bytes: usize,
    pub(crate) file: F,
    /// How messages name it.
    pub(crate) place: String,
    /// What its next header depends on.
    pub(crate) past: Mutex<Past>,
}

/// What a slot has from before.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Past {
    /// It never had a segment.
    pub(crate) is_blank: bool,
    /// Where the copy of the header is that is not valid, if the other one is.
    pub(crate) bad_copy: Option<usize>,
}

/// What the header of a slot says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Use {
    /// The slot was never used.
    Blank,
    Used(Header),
}

impl<F: MediumFile> Slot<F> {
    pub(crate) fn create<M: Medium<File = F>>(medium: &M, slot: u32, bytes: usize) -> Result<Self> {
        let (name, place) = (name(slot), medium.place(&name(slot)));
        let file = medium.create(&name, bytes as u64).map_err(|error| not_written("creating", &place, error))?;
        let past = Mutex::new(Past { is_blank: true, bad_copy: None });
        Ok(Self { slot, bytes, file, place, past })
    }

    pub(crate) fn open<M: Medium<File = F>>(medium: &M, slot: u32) -> Result<Self> {
        let (name, place) = (name(slot), medium.place(&name(slot)));
        let opened = medium.open(&name).and_then(|file| Ok((file.len()?, file)));
        let (bytes, file) = opened.map_err(|error| not_written("opening", &place, error))?;
        if !(MIN_BYTES..=MAX_BYTES).contains(&bytes) || bytes % BLOCK as u64 != 0 {
            return Err(corrupt(place, format!("{bytes} bytes is no size of a segment")));
        }
        Ok(Self { slot, bytes: bytes as usize, file, place, past: Mutex::default() })
    }

    pub(crate) fn read(&self, bytes: usize) -> Result<Vec<u8>> {
        let mut content = vec![0; bytes];
        self.file.read_at(&mut content, 0).map_err(|error| not_written("reading", &self.place, error))?;
        Ok(content)
    }

    /// Reads the header, from whichever copy is valid.
    pub(crate) fn header(&self) -> Result<Use> {
        let content = self.read(DATA_START)?;
        let (first, second) = content.split_at(BLOCK);
        // A power cut may leave one copy of an earlier use. The newer one is right if it was synced, and if not, both are.
        let found = match (Header::read(first), Header::read(second)) {
            (Some(first), Some(second)) => {
                return Ok(Use::Used(if first.number < second.number { second } else { first }));
            }
            (Some(header), None) => (Use::Used(header), Some(BLOCK)),
            (None, Some(header)) => (Use::Used(header), Some(0)),
            (None, None) if self.was_never_used(first, second)? => {
                (Use::Blank, [first, second].iter().position(|copy| !is_zero(copy)).map(|copy| copy * BLOCK))
            }
            (None, None) => return Err(corrupt(&self.place, "neither copy of its header is valid")),
        };
        *self.past.lock() = Past { is_blank: found.0 == Use::Blank, bad_copy: found.1 };
        Ok(found.0)
    }

    /// Whether a slot without a valid header never had a record: it has zeros, but for one copy of its first header, which a
    /// power cut may have torn. A slot's first header is on disk before its first record is written.
    fn was_never_used(&self, first: &[u8], second: &[u8]) -> Result<bool> {
        Ok((is_zero(first) || is_zero(second)) && self.read(self.bytes)?.get(DATA_START..).is_some_and(is_zero))
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

/// The fragments of a segment, in order.
pub(crate) struct Fragments<'a> {
    content: &'a [u8],
    salt: Salt,
    /// Where the next fragment begins.
    pub(crate) offset: usize,
    /// The lsn of the next fragment.
    pub(crate) lsn: u64,
}

impl<'a> Fragments<'a> {
    pub(crate) fn of(content: &'a [u8], header: &Header) -> Self {
        Self { content, salt: Salt::new(header.salt), offset: DATA_START, lsn: header.first_lsn }
    }

    /// The highest durable lsn that any fragment after the last valid one states.
    pub(crate) fn durable_lsn_after_end(&self) -> u64 {
        let most = (self.content.len() / record::HEADER) as u64;
        // A payload may be full of bytes that look like fragments, each with a checksum of its own to compute.
        let mut left = SCAN_EFFORT * self.content.len();
        let mut durable_lsn = 0;
        let mut at = self.offset;
        while let Some(rest) = self.content.get(at..) {
            let Some(skipped) = record::next_possible(rest) else { break };
            at += skipped;
            let Some(rest) = rest.get(skipped..) else { break };
            let Some(len) = record::may_follow(rest, self.lsn, most) else {
                at += 1;
                continue;
            };
            let Some(now_left) = left.checked_sub(len) else { break };
            left = now_left;
            match record::read_after(rest, self.lsn, self.salt) {
                Some((fragment, payload)) => {
                    durable_lsn = durable_lsn.max(fragment.durable_lsn);
                    at += record::HEADER + payload.len();
                }
                None => at += 1,
            }
        }
        durable_lsn
    }
}

impl<'a> Iterator for Fragments<'a> {
    type Item = (Fragment, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (fragment, payload) = record::read(self.content.get(self.offset..)?, self.lsn, self.salt)?;
        self.offset += record::HEADER + payload.len();
        self.lsn += 1;
        Some((fragment, payload))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Kind, Part};

    const HEADER: Header = Header {
        journal: [5; 16],
        number: 9,
        previous: 7,
        first_lsn: 100,
        durable_lsn: 99,
        salt: 0x1234_5678_9abc_def0,
        next_slot: 3,
    };

    fn put(lsn: u64, durable_lsn: u64, content: &mut Vec<u8>) {
        let fragment = Fragment { kind: Kind::Data, part: Part::Whole, lsn, durable_lsn };
        record::put(fragment, &[lsn as u8; 30], Salt::new(HEADER.salt), content);
    }

    #[test]
    fn a_header_is_read_from_either_copy_and_a_damaged_one_is_rejected() {
        let encoded = HEADER.encoded();
        assert_eq!(encoded.len(), DATA_START);
        assert_eq!(Header::read(&encoded), Some(HEADER));
        assert_eq!(Header::read(&encoded[BLOCK..]), Some(HEADER));
        for at in 0..MAGIC.len() + 4 + FIELDS {
            let mut damaged = encoded.clone();
            damaged[at] ^= 4;
            assert_eq!(Header::read(&damaged), None, "byte {at}");
        }
    }

    #[test]
    fn a_slot_is_named_by_its_number_alone() {
        for (text, expected) in [
            ("000000.journal", Some(0)),
            ("000012.journal", Some(12)),
            ("4294967295.journal", Some(u32::MAX)),
            ("12.journal", None),
            ("+00012.journal", None),
            ("000012.journal.new", None),
            ("journal", None),
        ] {
            assert_eq!(slot(text), expected, "{text}");
        }
    }

    #[test]
    fn fragments_end_at_the_first_invalid_one_and_later_ones_are_evidence() {
        let mut content = HEADER.encoded();
        (100..105).for_each(|lsn| put(lsn, lsn - 1, &mut content));
        content.resize(content.len() + 500, 0);
        let mut fragments = Fragments::of(&content, &HEADER);
        assert_eq!(fragments.by_ref().map(|(fragment, _)| fragment.lsn).collect::<Vec<_>>(), [100, 101, 102, 103, 104]);
        assert_eq!((fragments.lsn, fragments.durable_lsn_after_end()), (105, 0));

        let damaged_at = DATA_START + 46 + 20;
        content[damaged_at] ^= 1;
        let mut fragments = Fragments::of(&content, &HEADER);
        assert_eq!(fragments.by_ref().count(), 1);
        assert_eq!((fragments.lsn, fragments.durable_lsn_after_end()), (101, 103));
        let other = Header { salt: 1, ..HEADER };
        let mut fragments = Fragments::of(&content, &other);
        assert_eq!((fragments.by_ref().count(), fragments.durable_lsn_after_end()), (0, 0), "remains of another use");
    }

    #[test]
    fn a_header_with_counts_that_no_journal_has_is_rejected() {
        for header in [
            Header { number: MAX_COUNT, ..HEADER },
            Header { previous: 9, ..HEADER },
            Header { first_lsn: u64::MAX, ..HEADER },
            Header { durable_lsn: 101, ..HEADER },
        ] {
            assert_eq!(Header::read(&header.encoded()), None);
        }
        assert!(Header::read(&Header { first_lsn: MAX_COUNT - 1, ..HEADER }.encoded()).is_some());
    }

    #[test]
    fn a_search_through_bytes_that_look_like_fragments_ends_soon() {
        let mut content = HEADER.encoded();
        let mut fake = Vec::new();
        let fragment = Fragment { kind: Kind::Data, part: Part::Whole, lsn: 101, durable_lsn: 101 };
        record::put(fragment, b"", Salt::new(0), &mut fake);
        fake[4..8].copy_from_slice(&(3_u32 << 20).to_le_bytes());
        content.extend(fake.repeat((6 << 20) / fake.len()));
        let start = std::time::Instant::now();
        assert_eq!(Fragments::of(&content, &HEADER).durable_lsn_after_end(), 0);
        // 200,000 checksums of 3 MiB each would take minutes.
        assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
    }
}
