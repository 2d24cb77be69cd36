//! What a fuzzer checks: an open of files with any content returns an error, or a journal that keeps what is appended.

use super::medium::BLOCK;
use super::record::{self, Fragment, Kind, Part, Salt};
use super::segment::{self, DATA_START, Header, MIN_BYTES};
use super::{Durability, Error, Journal, Options, Recovered, SimulatedDisk};

const SLOTS: usize = 5;

/// Numbers from the fuzzer's bytes, and zeros after their end.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> u8 {
        self.0.split_off_first().copied().unwrap_or(0)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::from(self.byte()) % limit
    }

    fn short(&mut self) -> usize {
        usize::from(u16::from_le_bytes([self.byte(), self.byte()]))
    }

    /// A small number, or rarely one near the largest.
    fn count(&mut self) -> u64 {
        match self.byte() {
            255 => u64::MAX - u64::from(self.byte()),
            254 => (1 << 62) - 1 - u64::from(self.byte()),
            count => count.into(),
        }
    }

    fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at_checked(len).unwrap_or((self.0, &[]));
        self.0 = rest;
        bytes
    }
}

/// Files in which headers and fragments are valid, and anything else is not.
struct Files {
    contents: Vec<Vec<u8>>,
    headers: Vec<Option<Header>>,
    /// Where the next fragment of each file begins, and its lsn.
    ends: Vec<(usize, u64)>,
}

impl Files {
    /// The files of a journal after some calls.
    fn of_a_journal(input: &mut Input<'_>) -> Self {
        let disk = SimulatedDisk::default();
        let options = Options { smallest_segment: MIN_BYTES, largest_segment: MIN_BYTES, ..Options::default() };
        if let Ok(journal) = Journal::create(disk.clone(), &options, b"checkpoint") {
            for _ in 0..input.below(8) {
                let payload = vec![input.byte(); input.short()];
                let durability = if input.below(2) == 0 { Durability::Disk } else { Durability::Process };
                let _ = journal.append(&[&payload], durability);
                let _ = match input.below(8) {
                    0 => journal.checkpoint(journal.position(), &payload),
                    1 => journal.maintain(),
                    2 => journal.close(),
                    _ => Ok(()),
                };
            }
        }
        let mut contents: Vec<_> = disk.files().into_values().collect();
        contents.resize(contents.len().max(SLOTS), vec![0; MIN_BYTES as usize]);
        let headers = contents.iter().map(|content| Header::read(content));
        let headers: Vec<_> = headers.collect();
        let ends = contents.iter().zip(&headers).map(|(content, header)| {
            header.as_ref().map_or((DATA_START, 0), |header| {
                let mut fragments = segment::Fragments::of(content, header);
                fragments.by_ref().for_each(drop);
                (fragments.offset, fragments.lsn)
            })
        });
        let ends = ends.collect();
        Self { contents, headers, ends }
    }

    /// Changes a file as the next bytes of the input say.
    fn change(&mut self, input: &mut Input<'_>) {
        let command = input.byte();
        let slot = usize::from(command >> 4) % self.contents.len();
        let (Some(content), Some(header), Some((end, lsn))) =
            (self.contents.get_mut(slot), self.headers.get_mut(slot), self.ends.get_mut(slot))
        else {
            return;
        };
        match command & 15 {
            // A header, valid but for its numbers.
            0..3 => {
                let new = Header {
                    journal: header.map_or([1; 16], |header| header.journal),
                    number: input.count(),
                    previous: input.count(),
                    first_lsn: input.count(),
                    durable_lsn: input.count(),
                    salt: input.count(),
                    next_slot: input.below(SLOTS + 1) as u32,
                };
                let encoded = new.encoded();
                put(content, if input.below(4) == 0 { BLOCK } else { 0 }, &encoded[..BLOCK]);
                if input.below(4) > 0 {
                    put(content, BLOCK, &encoded[..BLOCK]);
                }
                (*header, *end, *lsn) = (Some(new), DATA_START, new.first_lsn);
            }
            // A valid fragment.
            3..9 => {
                let kind = [Kind::Data, Kind::Checkpoint, Kind::Mark][input.below(3)];
                let part = [Part::Whole, Part::First, Part::Middle, Part::Last][input.below(4)];
                let skipped = if input.below(8) == 0 { input.count() } else { 0 };
                let this = lsn.saturating_add(skipped);
                let fragment = Fragment { kind, part, lsn: this, durable_lsn: this.saturating_sub(input.count()) };
                let mut payload = input.count().to_le_bytes().to_vec();
                payload.resize(if input.below(8) == 0 { input.short() } else { 8 + input.below(40) }, 7);
                let mut bytes = Vec::new();
                let salt = header.map_or(0, |header| header.salt);
                record::put(fragment, &payload, Salt::new(salt), &mut bytes);
                put(content, *end, &bytes);
                (*end, *lsn) = (*end + bytes.len(), this.saturating_add(1));
            }
            9 | 10 => {
                let offset = input.short();
                let len = input.below(64);
                put(content, offset, input.bytes(len));
            }
            11 => content.resize(BLOCK * input.below(40), 0),
            12 => content.resize(input.short() * 3, 9),
            13 => *end = input.short(),
            14 => {
                let other = input.below(self.contents.len());
                self.contents.swap(slot, other);
                self.headers.swap(slot, other);
                self.ends.swap(slot, other);
            }
            _ => {
                let (from, len) = (input.short(), input.short());
                put(content, from, &vec![0; len]);
            }
        }
    }

    fn disk(self) -> SimulatedDisk {
        let named = (0..).map(segment::name).zip(self.contents);
        SimulatedDisk::with_files(named.filter(|(_, content)| !content.is_empty()))
    }
}

/// Writes as much as fits.
fn put(content: &mut [u8], offset: usize, bytes: &[u8]) {
    if let Some(target) = content.get_mut(offset..) {
        let len = bytes.len().min(target.len());
        target[..len].copy_from_slice(&bytes[..len]);
    }
}

type Content = (Vec<u8>, Vec<Vec<u8>>);

fn open(disk: &SimulatedDisk) -> Result<(Journal<SimulatedDisk>, Content), Error> {
    let options = Options { smallest_segment: MIN_BYTES, largest_segment: MIN_BYTES, ..Options::default() };
    let (mut checkpoint, mut records) = (Vec::new(), Vec::new());
    let (journal, report) = Journal::open(disk.clone(), &options, |recovered| {
        match recovered {
            Recovered::Checkpoint(bytes) => checkpoint = bytes.to_vec(),
            Recovered::Record(bytes) => records.push(bytes.to_vec()),
        }
        Ok(())
    })?;
    assert_eq!(report.records, records.len() as u64);
    Ok((journal, (checkpoint, records)))
}

/// Opens files that the input describes. If they are a journal, what is appended to it stays.
pub fn recovery(input: &[u8]) {
    let mut input = Input(input);
    let mut files = Files::of_a_journal(&mut input);
    while !input.0.is_empty() {
        files.change(&mut input);
    }
    let headers = files.contents.iter().flat_map(|content| [content.get(..BLOCK), content.get(BLOCK..DATA_START)]);
    // A journal whose numbers are nearly used up cannot go on.
    let is_used_up =
        headers.flatten().filter_map(Header::read).any(|header| header.number.max(header.first_lsn) > 1 << 60);
    let disk = files.disk();
    let Ok((journal, (checkpoint, mut records))) = open(&disk) else { return };
    if is_used_up {
        return;
    }
    journal.append(&[b"appended"], Durability::Disk).expect("the disk does not fail");
    records.push(b"appended".to_vec());
    let (_, found) = open(&disk.power_cut(1)).expect("the journal was open before");
    assert_eq!(found, (checkpoint, records));
    journal.checkpoint(journal.position(), b"a new checkpoint").expect("the disk does not fail");
    let (_, found) = open(&disk.power_cut(2)).expect("the journal was open before");
    assert_eq!(found, (b"a new checkpoint".to_vec(), Vec::new()));
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, RngExt, SeedableRng};

    #[test]
    fn a_checkpoint_whose_position_is_after_it_never_counts() {
        // A journal with one record, then a whole checkpoint with the lsn 3 and the position 4.
        super::recovery(&[1, 1, 100, 0, 0, 3, 0x03, 1, 0, 5, 1, 4, 1, 2]);
    }

    #[test]
    fn an_open_of_any_files_returns() {
        let rounds = if cfg!(debug_assertions) { 100 } else { 500 };
        for seed in 0..rounds {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut input = vec![0; rng.random_range(0..400)];
            rng.fill_bytes(&mut input);
            super::recovery(&input);
        }
    }
}
