//! A disk in memory that can lose power.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::medium::{BLOCK, Medium, MediumFile};

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
    has_stopped: bool,
    /// The write at which the disk stopped.
    interrupted: Option<(String, usize, Vec<u8>)>,
    /// Files that a power cut may bring back.
    removed: BTreeMap<String, File>,
    is_mapped: bool,
    operations: u64,
    syncs: u64,
    free: Option<u64>,
}

#[derive(Debug, Default, Clone)]
struct File {
    /// What a crash of the process leaves.
    written: Arc<Vec<u8>>,
    /// What is on disk for certain.
    synced: Arc<Vec<u8>>,
    /// The writes since the last sync.
    unsynced: Vec<(usize, Vec<u8>)>,
}

impl SimulatedDisk {
    /// Stops after so many writes, creations, removals and syncs: those that come later return without an effect, as if the
    /// power were off.
    pub fn stop_after(&self, operations: u64) {
        self.state.lock().left = Some(operations);
    }

    /// Makes the operation after so many others fail. A write that fails writes a half.
    pub fn fail_after(&self, operations: u64, kind: io::ErrorKind) {
        self.state.lock().fails_in = Some((operations, kind));
    }

    /// Limits the bytes that files created from now on may have.
    pub fn set_free(&self, bytes: Option<u64>) {
        self.state.lock().free = bytes;
    }

    /// Whether files take writes of any size at any offset, as mapped ones do, or whole blocks.
    pub fn set_mapped(&self, is_mapped: bool) {
        self.state.lock().is_mapped = is_mapped;
    }

    /// Whether an operation came after the disk stopped.
    pub fn has_stopped(&self) -> bool {
        self.state.lock().has_stopped
    }

    /// How many operations there were.
    pub fn operations(&self) -> u64 {
        self.state.lock().operations
    }

    /// How many syncs there were.
    pub fn syncs(&self) -> u64 {
        self.state.lock().syncs
    }

    /// The disk after a crash of the process. What was not synced is still not synced.
    pub fn killed(&self) -> Self {
        let state = self.state.lock();
        let (files, removed, is_mapped) = (state.files.clone(), state.removed.clone(), state.is_mapped);
        Self { state: Arc::new(Mutex::new(State { files, removed, is_mapped, ..State::default() })) }
    }

    /// The disk after a crash of the process in the middle of the write at which the disk stopped, if it did. A kill ends a write
    /// of the kernel between two pages, and a store to a mapping, which a header never is, at any byte.
    pub fn killed_in_a_write(&self, seed: u64) -> Self {
        let image = self.killed();
        if let Some((name, offset, bytes)) = &self.state.lock().interrupted
            && let state = &mut *image.state.lock()
            && let Some(file) = state.files.get_mut(name)
        {
            let unit = if state.is_mapped && *offset > 0 { 1 } else { BLOCK };
            let len = StdRng::seed_from_u64(seed).random_range(0..=bytes.len() / unit) * unit;
            put(&mut file.written, *offset, &bytes[..len]);
            file.unsynced.push((*offset, bytes[..len].to_vec()));
        }
        image
    }

    /// The disk after a power cut: of the writes since the last sync, any sectors are on disk, in any order, and one may be
    /// torn. Removed files may be there again.
    pub fn power_cut(&self, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        // One lock for all: a file that is removed later must not be in the image of an earlier time.
        let state = self.state.lock();
        let mut files = power_cut_files(&state, &mut rng);
        for (name, file) in &state.removed {
            if rng.random_bool(0.5) {
                files.entry(name.clone()).or_insert_with(|| on_disk(Arc::clone(&file.synced)));
            }
        }
        Self { state: Arc::new(Mutex::new(State { files, is_mapped: state.is_mapped, ..State::default() })) }
    }

    /// The disk with one file changed.
    pub fn damaged(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) -> Self {
        let disk = self.killed();
        if let Some(file) = disk.state.lock().files.get_mut(name) {
            change(Arc::make_mut(&mut file.written));
            *file = on_disk(Arc::clone(&file.written));
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
        self.state.lock().files.iter().map(|(name, file)| (name.clone(), file.written.to_vec())).collect()
    }

    /// A disk with these files.
    pub fn with_files(files: impl IntoIterator<Item = (String, Vec<u8>)>) -> Self {
        let files = files.into_iter().map(|(name, content)| (name, on_disk(Arc::new(content)))).collect();
        Self { state: Arc::new(Mutex::new(State { files, ..State::default() })) }
    }
}

fn power_cut_files(state: &State, rng: &mut StdRng) -> BTreeMap<String, File> {
    let keep = [0.0, 0.1, 0.5, 0.9, 1.0][rng.random_range(0..5)];
    let mut tears = 1;
    let mut after = |file: &File| {
        let mut content = Arc::clone(&file.synced);
        for (offset, bytes) in &file.unsynced {
            for (index, sector) in bytes.chunks(SECTOR).enumerate() {
                let at = offset + index * SECTOR;
                let mut len = if rng.random_bool(keep) { sector.len() } else { 0 };
                if tears > 0 && rng.random_bool(0.1) {
                    tears -= 1;
                    len = rng.random_range(0..=sector.len());
                }
                put(&mut content, at, &sector[..len]);
            }
        }
        on_disk(content)
    };
    state.files.iter().map(|(name, file)| (name.clone(), after(file))).collect()
}

fn on_disk(content: Arc<Vec<u8>>) -> File {
    File { synced: Arc::clone(&content), written: content, unsynced: Vec::new() }
}

fn put(content: &mut Arc<Vec<u8>>, offset: usize, bytes: &[u8]) {
    if !bytes.is_empty() {
        Arc::make_mut(content)[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
}

impl State {
    /// Counts an operation. False if the disk has stopped.
    fn begin(&mut self) -> io::Result<bool> {
        if let Some(left) = &mut self.left {
            if *left == 0 {
                self.has_stopped = true;
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
    is_mapped: bool,
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
            state.removed.remove(name);
            state.files.insert(name.to_owned(), on_disk(Arc::new(zeros)));
        } else {
            // Nothing of what happens now is seen again.
            let zeros = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
            state.files.entry(name.to_owned()).or_insert_with(|| on_disk(Arc::new(zeros)));
        }
        Ok(SimulatedFile { name: name.to_owned(), disk: self.clone(), is_mapped: state.is_mapped })
    }

    fn open(&self, name: &str) -> io::Result<SimulatedFile> {
        let state = self.state.lock();
        if !state.files.contains_key(name) {
            return Err(missing());
        }
        Ok(SimulatedFile { name: name.to_owned(), disk: self.clone(), is_mapped: state.is_mapped })
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut state = self.state.lock();
        if state.begin()? {
            let file = state.files.remove(name).ok_or_else(missing)?;
            state.removed.insert(name.to_owned(), file);
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
            let offset = usize::try_from(offset).map_err(io::Error::other)?;
            let had_stopped = state.has_stopped;
            let begun = state.begin();
            if matches!(begun, Ok(false)) {
                if !had_stopped {
                    state.interrupted = Some((name.to_owned(), offset, bytes.to_vec()));
                }
                return Ok(());
            }
            let written = if begun.is_ok() { bytes } else { &bytes[..bytes.len() / 2] };
            let file = state.files.get_mut(name).ok_or_else(missing)?;
            assert!(offset + bytes.len() <= file.written.len(), "a segment never grows");
            put(&mut file.written, offset, written);
            file.unsynced.push((offset, written.to_vec()));
            begun.map(drop)
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.with(|state, name| {
            if state.begin()? {
                state.syncs += 1;
                let file = state.files.get_mut(name).ok_or_else(missing)?;
                for (offset, bytes) in std::mem::take(&mut file.unsynced) {
                    put(&mut file.synced, offset, &bytes);
                }
            }
            Ok(())
        })
    }

    fn unit(&self) -> usize {
        if self.is_mapped { 1 } else { BLOCK }
    }
}
