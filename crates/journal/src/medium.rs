//! Where segments are stored: a directory, or a simulated disk in tests.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

pub(crate) use super::layout::BLOCK;
use super::layout::slot;
use super::mapped::MappedFile;

/// A set of named files of fixed sizes.
pub trait Medium: Send + Sync {
    /// A file of this medium.
    type File: MediumFile;

    /// The names of all files.
    ///
    /// # Errors
    ///
    /// If they cannot be read.
    fn names(&self) -> io::Result<Vec<String>>;

    /// Creates a file of this many zero bytes. The file, its blocks and its name are on disk when this returns. If it fails,
    /// or if the process is killed meanwhile, there is no such file.
    ///
    /// # Errors
    ///
    /// If there is no space, or the write or the sync fails.
    fn create(&self, name: &str, bytes: u64) -> io::Result<Self::File>;

    /// Opens a file.
    ///
    /// # Errors
    ///
    /// If it does not exist or cannot be opened.
    fn open(&self, name: &str) -> io::Result<Self::File>;

    /// Removes a file. A power cut may undo it.
    ///
    /// # Errors
    ///
    /// If it cannot be removed.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// How messages name a file.
    fn place(&self, name: &str) -> String;
}

/// A file of a [`Medium`].
#[allow(clippy::len_without_is_empty, reason = "a segment is never empty")]
pub trait MediumFile: Send + Sync {
    /// The size in bytes.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    fn len(&self) -> io::Result<u64>;

    /// Fills `buffer` from this offset on.
    ///
    /// # Errors
    ///
    /// If so many bytes cannot be read.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all bytes at this offset. They survive a crash of the process when this returns.
    ///
    /// # Errors
    ///
    /// If the write fails. Any part of the bytes may be written then.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Writes begin and end at multiples of this. A file that is written with system calls is written in whole blocks: a
    /// write of a part of a block that is not cached would read the block first.
    fn unit(&self) -> usize {
        BLOCK
    }

    /// Waits until all completed writes are on disk.
    ///
    /// # Errors
    ///
    /// If the sync fails. Which writes are on disk is unknown then.
    fn sync(&self) -> io::Result<()>;
}

/// The suffix of a file that is being created.
const NEW: &str = ".new";
/// The size of one write of zeros.
const ZEROS: usize = 1 << 20;

/// A directory of the file system.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    access: Access,
}

/// How files are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// With system calls. Syncs are faster than with `Map`: for journals whose records are synced one by one.
    Write,
    /// Through a mapping, where the system can map the file. Appends are faster than with `Write`, because they need no system call: for journals that are
    /// synced periodically. If the disk cannot read a page of the file again, or another process truncates the file, a store
    /// to it ends this process with `SIGBUS`. Not for file systems that copy on write: they may have no space for a block that
    /// is written again, which is `SIGBUS` as well.
    Map,
}

impl Directory {
    /// Uses this directory, which must exist. Only one process may use it at a time; the caller locks it. Removes files
    /// that were not created completely.
    ///
    /// # Errors
    ///
    /// If the directory cannot be read.
    pub fn new(path: impl Into<PathBuf>, access: Access) -> io::Result<Self> {
        let directory = Self { path: path.into(), access };
        for entry in fs::read_dir(&directory.path)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.strip_suffix(NEW).and_then(slot).is_some() {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(directory)
    }

    fn sync(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()
    }

    fn create_new(&self, path: &Path, bytes: u64) -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
        let zeros = vec![0; ZEROS];
        // Zeros, not `fallocate`: the first write to an allocated but unwritten block changes the file's extents, which a
        // sync would have to commit.
        let mut left = usize::try_from(bytes).map_err(io::Error::other)?;
        while left > 0 {
            let part = zeros.get(..left.min(ZEROS)).unwrap_or(&zeros);
            file.write_all(part)?;
            left -= part.len();
        }
        file.sync_all()
    }
}

/// Frees the space of a file whose creation failed. If that fails as well, the next open frees or uses it.
fn remove_if_possible(path: &Path) {
    let _ = fs::remove_file(path);
}

impl Medium for Directory {
    type File = DirectoryFile;

    fn names(&self) -> io::Result<Vec<String>> {
        let names = fs::read_dir(&self.path)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        names.collect()
    }

    fn create(&self, name: &str, bytes: u64) -> io::Result<DirectoryFile> {
        let (new, path) = (self.path.join(format!("{name}{NEW}")), self.path.join(name));
        self.create_new(&new, bytes).inspect_err(|_| remove_if_possible(&new))?;
        fs::rename(&new, &path).inspect_err(|_| remove_if_possible(&new))?;
        self.sync().and_then(|()| self.open(name)).inspect_err(|_| remove_if_possible(&path))
    }

    fn open(&self, name: &str) -> io::Result<DirectoryFile> {
        let file = OpenOptions::new().read(true).write(true).open(self.path.join(name))?;
        // On other systems a sync of the file need not include stores to a mapping.
        let is_mapped = self.access == Access::Map && cfg!(target_os = "linux") && file.metadata()?.len() > 0;
        // Some file systems have no shared mappings.
        let mapped = if is_mapped { MappedFile::new(&file).ok() } else { None };
        Ok(DirectoryFile(mapped.map_or(Opened::Plain(file), Opened::Mapped)))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.path.join(name))
    }

    fn place(&self, name: &str) -> String {
        self.path.join(name).display().to_string()
    }
}

/// A file of a [`Directory`].
#[derive(Debug)]
pub struct DirectoryFile(Opened);

#[derive(Debug)]
enum Opened {
    Plain(File),
    Mapped(MappedFile),
}

impl DirectoryFile {
    fn file(&self) -> &File {
        match &self.0 {
            Opened::Plain(file) => file,
            Opened::Mapped(mapped) => mapped.file(),
        }
    }
}

impl MediumFile for DirectoryFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.file().metadata()?.len())
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file().read_exact_at(buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        match &self.0 {
            Opened::Plain(file) => file.write_all_at(bytes, offset),
            Opened::Mapped(mapped) => mapped.write_at(bytes, offset),
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.file().sync_data()
    }

    fn unit(&self) -> usize {
        match &self.0 {
            Opened::Plain(_) => BLOCK,
            Opened::Mapped(_) => 1,
        }
    }
}
