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
        for dir in ["db", "ssts", "filters"] {
            fs::create_dir_all(root.join(dir)).unwrap();
        }
        for (path, bytes) in &self.files {
            fs::write(root.join(path), bytes).unwrap();
        }
    }

    /// The logs, the oldest first.
    pub fn logs(&self) -> Vec<PathBuf> {
        self.files.keys().filter(|path| path.extension().is_some_and(|extension| extension == "log")).cloned().collect()
    }

    /// The newest file with this ending.
    pub fn newest(&self, ending: &str) -> PathBuf {
        self.files.keys().rfind(|path| path.to_string_lossy().ends_with(ending)).expect(ending).clone()
    }
}

fn read_below(root: &Path, inside: &Path, files: &mut BTreeMap<PathBuf, Vec<u8>>) {
    for entry in fs::read_dir(root.join(inside)).unwrap() {
        let entry = entry.unwrap();
        let path = inside.join(entry.file_name());
        if entry.path().is_dir() {
            read_below(root, &path, files);
        } else {
            match fs::read(entry.path()) {
                Ok(bytes) => drop(files.insert(path, bytes)),
                // A running store removes files that it no longer needs.
                Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{error}"),
            }
        }
    }
}

/// A kind of damage to a file.
#[derive(Debug, Clone)]
pub enum Harm {
    Flipped { bit: u8 },
    CutTail,
    CutOut { len: usize },
    Zeroed { len: usize },
    Deleted,
}

/// Damage to one file, from byte `at`.
#[derive(Debug, Clone)]
pub struct Damage {
    pub file: PathBuf,
    pub at: usize,
    pub harm: Harm,
}

/// The unit in which a disk loses data.
const SECTOR: usize = 512;

/// The kinds of files, by the start or the end of their names, and the percentage of damages for each: most for the
/// files that answers are read from, and some for every kind, however few files or bytes it has.
pub const KINDS: [(&str, u32); 10] = [
    ("sst", 25),
    ("log", 20),
    ("MANIFEST", 15),
    ("filter", 12),
    ("files", 8),
    ("CURRENT", 5),
    ("lock", 4),
    ("OPTIONS", 7),
    ("IDENTITY", 2),
    ("LOCK", 2),
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
    pub fn draw(image: &Image, rng: &mut StdRng) -> Self {
        let mut point = rng.random_range(0..KINDS.iter().map(|(_, share)| share).sum());
        let wanted = KINDS.iter().find(|(_, share)| {
            let is_chosen = point < *share;
            point = point.saturating_sub(*share);
            is_chosen
        });
        let (wanted, _) = wanted.unwrap();
        let files: Vec<_> = image.files.iter().filter(|(path, _)| kind(path) == *wanted).collect();
        let (file, bytes) = files[rng.random_range(0..files.len())];
        let at = if bytes.is_empty() { 0 } else { rng.random_range(0..bytes.len()) };
        let left = bytes.len() - at;
        let harm = match rng.random_range(0..16) {
            0 => Harm::Deleted,
            _ if bytes.is_empty() => Harm::Deleted,
            1..=8 => Harm::Flipped { bit: rng.random_range(0..8) },
            9..=10 => Harm::CutTail,
            11..=12 => Harm::CutOut { len: rng.random_range(1..=left) },
            _ => return Self { file: file.clone(), at: at / SECTOR * SECTOR, harm: Harm::Zeroed { len: SECTOR } },
        };
        let at = if matches!(harm, Harm::Deleted) { 0 } else { at };
        Self { file: file.clone(), at, harm }
    }

    /// Damages the file. False if its bytes do not change, such as zeros over zeros.
    pub fn inflict(&self, image: &mut Image) -> bool {
        if matches!(self.harm, Harm::Deleted) {
            return image.files.remove(&self.file).is_some();
        }
        let bytes = image.files.get_mut(&self.file).unwrap();
        let before = bytes.clone();
        match self.harm {
            Harm::Flipped { bit } => bytes[self.at] ^= 1 << bit,
            Harm::CutTail => bytes.truncate(self.at),
            Harm::CutOut { len } => drop(bytes.drain(self.at..self.at + len)),
            Harm::Zeroed { len } => {
                let end = bytes.len().min(self.at + len);
                bytes[self.at..end].fill(0);
            }
            Harm::Deleted => {}
        }
        *bytes != before
    }
}
