//! A copy of a store's files in memory, and the ways to damage them.

#![allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rand::RngExt;
use rand::rngs::StdRng;

/// The files of a store, by their paths inside it.
#[derive(Clone)]
pub struct Image {
    pub files: BTreeMap<PathBuf, Vec<u8>>,
}

impl Image {
    /// Reads a store's directory as it is.
    pub fn read(root: &Path) -> Self {
        let mut files = BTreeMap::new();
        read_below(root, Path::new(""), &mut files);
        Self { files }
    }

    /// Reads an idle store, once its flushes and compactions have ended.
    pub fn read_at_rest(root: &Path) -> Self {
        let mut before = Self::read(root);
        loop {
            std::thread::sleep(Duration::from_millis(300));
            let now = Self::read(root);
            if now.files == before.files {
                return now;
            }
            before = now;
        }
    }

    /// Writes it to a new directory.
    pub fn write(&self, root: &Path) {
        // A store creates these directories even if they are empty.
        for dir in ["db", "journal", "ssts", "filters"] {
            fs::create_dir_all(root.join(dir)).unwrap();
        }
        for (path, bytes) in &self.files {
            fs::write(root.join(path), bytes).unwrap();
        }
    }

    /// The segments of the journal that were used, the oldest first, as far as they are needed by the newest.
    pub fn segments(&self) -> Vec<Segment> {
        let used = self.files.iter().filter(|(path, _)| kind(path) == "journal");
        let mut segments: Vec<_> = used.filter_map(|(path, bytes)| Segment::read(path, bytes)).collect();
        segments.sort_by_key(|segment| segment.number);
        let mut chain: Vec<Segment> = Vec::new();
        while let Some(segment) = segments.pop() {
            match chain.last() {
                None => chain.push(segment),
                Some(next) if next.previous == segment.number => {
                    let first_lsn = next.first_lsn;
                    chain.push(segment);
                    chain.last_mut().unwrap().fragments.retain(|fragment| fragment.lsn < first_lsn);
                }
                Some(_) => {}
            }
        }
        chain.reverse();
        chain
    }

    /// The lsn of the next fragment of the journal.
    pub fn next_lsn(&self) -> u64 {
        self.segments().last().expect("a segment").next_lsn()
    }

    /// The manifest of the database that was written last.
    pub fn newest_manifest(&self) -> PathBuf {
        self.files.keys().rfind(|path| kind(path) == "MANIFEST").expect("a manifest").clone()
    }
}

fn read_below(root: &Path, inside: &Path, files: &mut BTreeMap<PathBuf, Vec<u8>>) {
    for entry in fs::read_dir(root.join(inside)).unwrap() {
        let entry = entry.unwrap();
        let path = inside.join(entry.file_name());
        if entry.path().is_dir() {
            read_below(root, &path, files);
        } else if !path.to_string_lossy().ends_with(".new") {
            // An open removes a file that a thread of the store is creating.
            match fs::read(entry.path()) {
                Ok(bytes) => drop(files.insert(path, bytes)),
                // A running store removes files that it no longer needs.
                Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{error}"),
            }
        }
    }
}

/// The size of each copy of a segment's header, and the unit of its size.
pub const BLOCK: usize = 4096;
/// Where the fragments of a segment begin.
pub const DATA_START: usize = 2 * BLOCK;

/// A segment of the journal: see `crates/journal/src/segment.rs`. It is read without checksums, so it must be undamaged.
#[derive(Debug, Clone)]
pub struct Segment {
    pub file: PathBuf,
    pub number: u64,
    previous: u64,
    pub first_lsn: u64,
    /// All fragments below were on disk when the segment was begun.
    pub durable_lsn: u64,
    /// The number in the name of the next segment's file.
    next_slot: u32,
    pub fragments: Vec<Fragment>,
}

/// A fragment of a record.
#[derive(Debug, Clone)]
pub struct Fragment {
    pub lsn: u64,
    /// Its bytes in the file.
    pub at: usize,
    pub end: usize,
    /// All fragments below were on disk when it was written.
    pub durable_lsn: u64,
    /// Where the replay begins, if it is the first one of a checkpoint.
    pub replay_from: Option<u64>,
    pub begins_record: bool,
}

impl Segment {
    fn read(file: &Path, bytes: &[u8]) -> Option<Self> {
        let header = bytes.strip_prefix(b"1ONCEJNL")?;
        // After the checksum, the version, and the id of the journal.
        let number = |index: usize| u64::from_le_bytes(header[24 + 8 * index..][..8].try_into().unwrap());
        let (first_lsn, mut at, mut fragments) = (number(2), DATA_START, Vec::new());
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        // What is left of an earlier use of the file has lower lsns, or its fields are elsewhere.
        while at + 16 <= bytes.len() {
            let lsn = first_lsn + fragments.len() as u64;
            let (len, kind, gap) = (word(at + 4) as usize, bytes[at + 8], word(at + 8) >> 8);
            let (kind, part) = (kind & 15, kind >> 4);
            if !(1..=3).contains(&kind) || !(1..=4).contains(&part) || word(at + 12) != lsn as u32 {
                break;
            }
            let end = at + 16 + len;
            let begins_record = part <= 2;
            let payload = bytes.get(at + 16..end)?;
            let replay_from =
                (kind == 2 && begins_record).then(|| u64::from_le_bytes(payload[..8].try_into().unwrap()));
            let durable_lsn = if gap == (1 << 24) - 1 { 0 } else { lsn - u64::from(gap) };
            fragments.push(Fragment { lsn, at, end, durable_lsn, replay_from, begins_record });
            at = end;
        }
        Some(Self {
            file: file.to_owned(),
            number: number(0),
            previous: number(1),
            first_lsn,
            durable_lsn: number(3),
            next_slot: number(5) as u32,
            fragments,
        })
    }

    pub fn next_lsn(&self) -> u64 {
        self.first_lsn + self.fragments.len() as u64
    }

    /// Where its last fragment ends.
    pub fn end(&self) -> usize {
        self.fragments.last().map_or(DATA_START, |fragment| fragment.end)
    }
}

/// What must become of a store whose journal is damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prediction {
    /// It was on disk, and something that is left says so.
    Corrupt,
    /// The fragments from this lsn on are lost without an error: they look like the torn tail of a power cut. If nothing is
    /// lost, it is the lsn after the last fragment.
    EndsAt(u64),
}

/// Predicts what becomes of the damaged journal of this image.
pub fn predict(before: &Image, after: &Image) -> Prediction {
    let segments = before.segments();
    let last = segments.last().unwrap();
    let checkpoints = segments.iter().flat_map(|segment| &segment.fragments);
    let replay_from = checkpoints.filter_map(|fragment| fragment.replay_from).next_back().expect("a checkpoint");
    // Each segment names the next one, which was created before.
    let needed = segments.iter().filter(|segment| segment.next_lsn() > replay_from || segment.number == last.number);
    let mut nexts = needed.map(|segment| segment.file.with_file_name(format!("{:06}.journal", segment.next_slot)));
    let mut is_rejected = nexts.any(|next| !after.files.contains_key(&next));
    for (file, was) in before.files.iter().filter(|(path, _)| kind(path) == "journal") {
        let Some(now) = after.files.get(file) else { continue };
        is_rejected |= now.len() % BLOCK != 0 || now.len() < 64 << 10 || header(was, now) == Header::Damaged;
    }
    let (mut lost, mut stated, mut record) = (last.next_lsn(), 0, 0);
    for segment in &segments {
        // A segment is read from its start, also if the replay begins later in it.
        let is_needed = segment.next_lsn() > replay_from;
        let was = &before.files[&segment.file];
        let now = after.files.get(&segment.file).filter(|now| header(was, now) == Header::Same);
        let Some(now) = now else {
            // Without its header it has nothing, and without the file the chain is broken.
            is_rejected |= is_needed && !after.files.contains_key(&segment.file);
            lost = if is_needed { lost.min(segment.first_lsn) } else { lost };
            continue;
        };
        stated = stated.max(segment.durable_lsn);
        for fragment in &segment.fragments {
            if fragment.begins_record {
                record = fragment.lsn;
            }
            if now.get(fragment.at..fragment.end) == was.get(fragment.at..fragment.end) {
                stated = stated.max(fragment.durable_lsn);
            } else if is_needed {
                lost = lost.min(record);
            }
        }
    }
    if is_rejected || stated > lost { Prediction::Corrupt } else { Prediction::EndsAt(lost) }
}

#[derive(PartialEq, Eq)]
enum Header {
    /// At least one copy is unchanged.
    Same,
    /// It is that of another use of the file, or of none.
    Other,
    Damaged,
}

fn header(was: &[u8], now: &[u8]) -> Header {
    let is_zero = |bytes: Option<&[u8]>| bytes.is_some_and(|bytes| bytes.iter().all(|byte| *byte == 0));
    let copies = [0..BLOCK, BLOCK..DATA_START];
    let is_blank = copies.iter().any(|copy| is_zero(now.get(copy.clone()))) && is_zero(now.get(DATA_START..));
    let mut is_same = copies.iter().map(|copy| now.get(copy.clone()) == was.get(copy.clone()));
    let is_same = if is_zero(Some(was)) { is_blank } else { is_same.any(|same| same) };
    // Damage that is drawn at random leaves one copy as it was.
    let is_other = copies.iter().any(|copy| now.get(copy.start..copy.start + 8) == Some(b"1ONCEJNL"));
    match (is_same, is_blank || is_other) {
        (true, _) => Header::Same,
        (false, true) => Header::Other,
        (false, false) => Header::Damaged,
    }
}

/// A kind of damage to a file.
#[derive(Debug, Clone)]
pub enum Harm {
    Flipped {
        bit: u8,
    },
    CutTail,
    CutOut {
        len: usize,
    },
    Zeroed {
        len: usize,
    },
    Extended {
        len: usize,
        byte: u8,
    },
    /// Replaced by another file of the same kind.
    Replaced {
        by: Source,
    },
    /// Replaced by another one of the same store, which has its content now.
    Swapped {
        with: PathBuf,
    },
    Deleted,
}

/// Where a file comes from that replaces another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The same file in an earlier image of the store.
    Earlier(usize),
    /// Another store.
    Foreign,
}

/// Damage to one file, from byte `at`.
#[derive(Debug, Clone)]
pub struct Damage {
    pub file: PathBuf,
    pub at: usize,
    pub harm: Harm,
}

/// Files that may replace those of a store.
pub struct Others<'a> {
    pub earlier: &'a [Image],
    pub foreign: &'a Image,
}

/// The unit in which a disk loses data.
const SECTOR: usize = 512;

/// The kinds of files, by the start or the end of their names, and the percentage of damages for each: most for the
/// files that answers are read from, and some for every kind, however few files or bytes it has.
pub const KINDS: [(&str, u32); 10] = [
    ("sst", 25),
    ("journal", 26),
    ("MANIFEST", 15),
    ("filter", 12),
    ("CURRENT", 5),
    ("lock", 4),
    ("OPTIONS", 7),
    ("IDENTITY", 2),
    ("LOCK", 2),
    // RocksDB creates its log, and the store never writes to it.
    ("log", 2),
];

/// The kind of a file.
pub fn kind(path: &Path) -> &'static str {
    let name = path.file_name().unwrap().to_str().unwrap();
    let is_it = |kind: &str| match kind.chars().all(char::is_uppercase) {
        true => name.split(['-', '.']).next() == Some(kind),
        false => path.extension().is_some_and(|extension| extension == kind),
    };
    KINDS.iter().map(|(kind, _)| *kind).find(|kind| is_it(kind)).unwrap_or_else(|| panic!("{name} has an unknown kind"))
}

impl Damage {
    /// Random damage to a random file of a random kind.
    pub fn draw(image: &Image, others: &Others<'_>, rng: &mut StdRng) -> Self {
        let mut point = rng.random_range(0..KINDS.iter().map(|(_, share)| share).sum());
        let wanted = KINDS.iter().find(|(_, share)| {
            let is_chosen = point < *share;
            point = point.saturating_sub(*share);
            is_chosen
        });
        let (wanted, _) = wanted.unwrap();
        let files: Vec<_> = image.files.iter().filter(|(path, _)| kind(path) == *wanted).collect();
        let (file, bytes) = files[rng.random_range(0..files.len())];
        // A segment is full of zeros after its last fragment.
        let used = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        let len = if *wanted == "journal" && used > 0 && rng.random_bool(0.9) { used } else { bytes.len() };
        let at = if len == 0 { 0 } else { rng.random_range(0..len) };
        // Half of the places where a segment is cut are ends of blocks: other sizes are rejected at once.
        let at = if *wanted == "journal" && rng.random_bool(0.3) { at / BLOCK * BLOCK } else { at };
        let left = bytes.len() - at;
        let harm = match rng.random_range(0..20) {
            0 => Harm::Deleted,
            1 => Harm::Replaced { by: Source::Earlier(rng.random_range(0..others.earlier.len())) },
            2 => Harm::Replaced { by: Source::Foreign },
            3 if files.len() > 1 => {
                let names: Vec<_> = files.iter().filter(|(other, _)| *other != file).collect();
                Harm::Swapped { with: names[rng.random_range(0..names.len())].0.clone() }
            }
            4 => Harm::Extended {
                len: if rng.random_bool(0.5) { BLOCK * rng.random_range(1..20) } else { rng.random_range(1..5_000) },
                byte: rng.random(),
            },
            _ if bytes.is_empty() => Harm::Deleted,
            5..=12 => Harm::Flipped { bit: rng.random_range(0..8) },
            13..=14 => Harm::CutTail,
            15..=16 => Harm::CutOut { len: rng.random_range(1..=left) },
            _ => return Self { file: file.clone(), at: at / SECTOR * SECTOR, harm: Harm::Zeroed { len: SECTOR } },
        };
        let has_place = matches!(harm, Harm::Flipped { .. } | Harm::CutTail | Harm::CutOut { .. });
        Self { file: file.clone(), at: if has_place { at } else { 0 }, harm }
    }

    /// Damages the file. False if no bytes change, such as zeros over zeros.
    pub fn inflict(&self, image: &mut Image, others: &Others<'_>) -> bool {
        let before = image.files[&self.file].clone();
        let bytes = image.files.get_mut(&self.file).unwrap();
        match &self.harm {
            Harm::Flipped { bit } => bytes[self.at] ^= 1 << bit,
            Harm::CutTail => bytes.truncate(self.at),
            Harm::CutOut { len } => drop(bytes.drain(self.at..self.at + len)),
            Harm::Zeroed { len } => {
                let end = bytes.len().min(self.at + len);
                bytes[self.at..end].fill(0);
            }
            Harm::Extended { len, byte } => bytes.resize(bytes.len() + len, *byte),
            Harm::Replaced { by: Source::Earlier(index) } => match others.earlier[*index].files.get(&self.file) {
                Some(earlier) => bytes.clone_from(earlier),
                None => return false,
            },
            Harm::Replaced { by: Source::Foreign } => {
                let same_name = others.foreign.files.get(&self.file);
                let same_kind = others.foreign.files.iter().rfind(|(path, _)| kind(path) == kind(&self.file));
                match same_name.or(same_kind.map(|(_, foreign)| foreign)) {
                    Some(foreign) => bytes.clone_from(foreign),
                    None => return false,
                }
            }
            Harm::Swapped { with } => {
                let other = image.files.insert(with.clone(), before.clone()).unwrap();
                image.files.insert(self.file.clone(), other);
            }
            Harm::Deleted => return image.files.remove(&self.file).is_some(),
        }
        image.files[&self.file] != before
    }
}
