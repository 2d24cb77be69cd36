//! A disk in memory that can lose power.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::medium::{Medium, MediumFile};

const SECTOR: usize = 512;

/// A disk in memory. It fails or stops at a chosen operation, and makes images of what a crash would leave.
#[derive(Debug, Clone, Default)]
pub struct SimulatedDisk {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    files: BTreeMap<String, File>,
    /// How many more operations there are before the disk stops.
    left: Option<u64>,
    /// The operation that fails, counted down.
    fails_in: Option<(u64, io::ErrorKind)>,
    operations: u64,
    syncs: u64,
    free: Option<u64>,
}

#[derive(Debug, Default, Clone)]
struct File {
    /// What a crash of the process leaves.
    written: Vec<u8>,
    /// What is on disk for certain.
    synced: Vec<u8>,
    /// The writes since the last sync.
    unsynced: Vec<(usize, Vec<u8>)>,
}

impl SimulatedDisk {
    /// Stops after so many writes, creations and syncs: those that come later return without an effect, as if the power
    /// were off.
    pub fn stop_after(&self, operations: u64) {
        self.state.lock().left = Some(operations);
    }

    /// Makes the operation after so many others fail.
    pub fn fail_after(&self, operations: u64, kind: io::ErrorKind) {
        self.state.lock().fails_in = Some((operations, kind));
    }

    /// Limits the bytes that files created from now on may have.
    pub fn set_free(&self, bytes: Option<u64>) {
        self.state.lock().free = bytes;
    }

    /// How many operations there were.
    pub fn operations(&self) -> u64 {
        self.state.lock().operations
    }

    /// How many syncs there were.
    pub fn syncs(&self) -> u64 {
        self.state.lock().syncs
    }

    /// The disk after a crash of the process.
    pub fn killed(&self) -> Self {
        self.image(|file| file.written.clone())
    }

    /// The disk after a power cut: of the writes since the last sync, any sectors are on disk, in any order, and one may be
    /// torn.
    pub fn power_cut(&self, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let keep = [0.0, 0.1, 0.5, 0.9, 1.0][rng.random_range(0..5)];
        let mut tears = 1;
        self.image(|file| {
            let mut content = file.synced.clone();
            for (offset, bytes) in &file.unsynced {
                for (index, sector) in bytes.chunks(SECTOR).enumerate() {
                    let at = offset + index * SECTOR;
                    let mut len = if rng.random_bool(keep) { sector.len() } else { 0 };
                    if tears > 0 && rng.random_bool(0.1) {
                        tears -= 1;
                        len = rng.random_range(0..=sector.len());
                    }
                    content[at..at + len].copy_from_slice(&sector[..len]);
                }
            }
            content
        })
    }

    /// The disk with one file changed.
    pub fn damaged(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) -> Self {
        let disk = self.killed();
        if let Some(file) = disk.state.lock().files.get_mut(name) {
            change(&mut file.written);
            file.synced.clone_from(&file.written);
        }
        disk
    }

    /// The disk without a file.
    pub fn without(&self, name: &str) -> Self {
        let disk = self.killed();
        disk.state.lock().files.remove(name);
        disk
    }

    /// The contents of all files.
    pub fn files(&self) -> BTreeMap<String, Vec<u8>> {
        self.state.lock().files.iter().map(|(name, file)| (name.clone(), file.written.clone())).collect()
    }

    /// A disk with these files.
    pub fn with_files(files: impl IntoIterator<Item = (String, Vec<u8>)>) -> Self {
        let files = files.into_iter().map(|(name, content)| (name, on_disk(content))).collect();
        Self { state: Arc::new(Mutex::new(State { files, ..State::default() })) }
    }

    fn image(&self, mut content: impl FnMut(&File) -> Vec<u8>) -> Self {
        let state = self.state.lock();
        Self::with_files(state.files.iter().map(|(name, file)| (name.clone(), content(file))))
    }
}

fn on_disk(content: Vec<u8>) -> File {
    File { synced: content.clone(), written: content, unsynced: Vec::new() }
}

impl State {
    /// Counts an operation. False if the disk has stopped.
    fn begin(&mut self) -> io::Result<bool> {
        if let Some(left) = &mut self.left {
            if *left == 0 {
                return Ok(false);
            }
            *left -= 1;
        }
        self.operations += 1;
        match &mut self.fails_in {
            Some((0, kind)) => {
                let kind = *kind;
                self.fails_in = None;
                return Err(kind.into());
            }
            Some((operations, _)) => *operations -= 1,
            None => {}
        }
        Ok(true)
    }
}

/// A file of a [`SimulatedDisk`].
#[derive(Debug)]
pub struct SimulatedFile {
    name: String,
    disk: SimulatedDisk,
}

impl SimulatedFile {
    fn with<R>(&self, act: impl FnOnce(&mut State, &str) -> io::Result<R>) -> io::Result<R> {
        act(&mut self.disk.state.lock(), &self.name)
    }
}

fn missing() -> io::Error {
    io::ErrorKind::NotFound.into()
}

impl Medium for SimulatedDisk {
    type File = SimulatedFile;

    fn names(&self) -> io::Result<Vec<String>> {
        Ok(self.state.lock().files.keys().cloned().collect())
    }

    fn create(&self, name: &str, bytes: u64) -> io::Result<SimulatedFile> {
        let mut state = self.state.lock();
        if state.begin()? {
            if let Some(free) = &mut state.free {
                *free = free.checked_sub(bytes).ok_or(io::ErrorKind::StorageFull)?;
            }
            assert!(!state.files.contains_key(name), "{name} exists");
            let zeros = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
            state.files.insert(name.to_owned(), on_disk(zeros));
        } else {
            // Nothing of what happens now is seen again.
            let zeros = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
            state.files.entry(name.to_owned()).or_insert_with(|| on_disk(zeros));
        }
        Ok(SimulatedFile { name: name.to_owned(), disk: self.clone() })
    }

    fn open(&self, name: &str) -> io::Result<SimulatedFile> {
        if !self.state.lock().files.contains_key(name) {
            return Err(missing());
        }
        Ok(SimulatedFile { name: name.to_owned(), disk: self.clone() })
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut state = self.state.lock();
        if state.begin()? {
            state.files.remove(name).ok_or_else(missing)?;
        }
        Ok(())
    }

    fn place(&self, name: &str) -> String {
        name.to_owned()
    }
}

impl MediumFile for SimulatedFile {
    fn len(&self) -> io::Result<u64> {
        self.with(|state, name| Ok(state.files.get(name).ok_or_else(missing)?.written.len() as u64))
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.with(|state, name| {
            let file = state.files.get(name).ok_or_else(missing)?;
            let offset = usize::try_from(offset).map_err(io::Error::other)?;
            let content = file.written.get(offset..offset + buffer.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
            buffer.copy_from_slice(content);
            Ok(())
        })
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.with(|state, name| {
            if state.begin()? {
                let offset = usize::try_from(offset).map_err(io::Error::other)?;
                let file = state.files.get_mut(name).ok_or_else(missing)?;
                assert!(offset + bytes.len() <= file.written.len(), "a segment never grows");
                file.written[offset..offset + bytes.len()].copy_from_slice(bytes);
                file.unsynced.push((offset, bytes.to_vec()));
            }
            Ok(())
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.with(|state, name| {
            if state.begin()? {
                state.syncs += 1;
                let file = state.files.get_mut(name).ok_or_else(missing)?;
                file.synced.clone_from(&file.written);
                file.unsynced.clear();
            }
            Ok(())
        })
    }
}
