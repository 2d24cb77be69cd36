//! The journal's files, with a failpoint at each step. A sync also checks that the store was not deleted.

use std::io;
use std::path::Path;
use std::sync::Arc;

use onlyonce_journal::{Access, DirectoryFile, Medium, MediumFile};

use crate::fs::directory::Directory;
use crate::testing::failpoint::Failpoint;

pub(super) struct StoreMedium {
    segments: onlyonce_journal::Directory,
    /// `None` while the store is created.
    store: Option<Arc<Directory>>,
}

impl StoreMedium {
    pub(super) fn new(path: &Path, access: Access, store: Option<Arc<Directory>>) -> io::Result<Self> {
        Ok(Self { segments: onlyonce_journal::Directory::new(path, access)?, store })
    }

    fn file(&self, file: DirectoryFile) -> StoreFile {
        StoreFile { file, store: self.store.clone() }
    }
}

pub(super) struct StoreFile {
    file: DirectoryFile,
    store: Option<Arc<Directory>>,
}

impl Medium for StoreMedium {
    type File = StoreFile;

    fn names(&self) -> io::Result<Vec<String>> {
        self.segments.names()
    }

    fn create(&self, name: &str, bytes: u64) -> io::Result<StoreFile> {
        Failpoint::SegmentBegun.pass();
        let file = self.segments.create(name, bytes)?;
        Failpoint::SegmentCreated.pass();
        Ok(self.file(file))
    }

    fn open(&self, name: &str) -> io::Result<StoreFile> {
        self.segments.open(name).map(|file| self.file(file))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.segments.remove(name)
    }

    fn place(&self, name: &str) -> String {
        self.segments.place(name)
    }
}

impl MediumFile for StoreFile {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_at(buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        Failpoint::WriteBegun.pass();
        self.file.write_at(bytes, offset)?;
        Failpoint::WriteDone.pass();
        Ok(())
    }

    fn unit(&self) -> usize {
        self.file.unit()
    }

    fn sync(&self) -> io::Result<()> {
        Failpoint::SyncBegun.pass();
        self.file.sync()?;
        Failpoint::SyncDone.pass();
        // A sync of a deleted file succeeds.
        match self.store.as_ref().and_then(|store| store.deleted()) {
            Some(path) => Err(io::Error::new(io::ErrorKind::NotFound, format!("{} was deleted", path.display()))),
            None => Ok(()),
        }
    }
}
