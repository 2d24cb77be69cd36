//! The journal's files, with a failpoint at each step.

use std::io;

use onlyonce_journal::{Access, Directory, DirectoryFile, Medium, MediumFile};

use crate::testing::failpoint::Failpoint;

pub(super) struct StoreMedium(Directory);

impl StoreMedium {
    pub(super) fn new(path: &std::path::Path, access: Access) -> io::Result<Self> {
        Directory::new(path, access).map(Self)
    }
}

pub(super) struct StoreFile(DirectoryFile);

impl Medium for StoreMedium {
    type File = StoreFile;

    fn names(&self) -> io::Result<Vec<String>> {
        self.0.names()
    }

    fn create(&self, name: &str, bytes: u64) -> io::Result<StoreFile> {
        Failpoint::SegmentBegun.pass();
        let file = self.0.create(name, bytes)?;
        Failpoint::SegmentCreated.pass();
        Ok(StoreFile(file))
    }

    fn open(&self, name: &str) -> io::Result<StoreFile> {
        self.0.open(name).map(StoreFile)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.0.remove(name)
    }

    fn place(&self, name: &str) -> String {
        self.0.place(name)
    }
}

impl MediumFile for StoreFile {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        Failpoint::WriteBegun.pass();
        self.0.write_at(bytes, offset)?;
        Failpoint::WriteDone.pass();
        Ok(())
    }

    fn unit(&self) -> usize {
        self.0.unit()
    }

    fn sync(&self) -> io::Result<()> {
        Failpoint::SyncBegun.pass();
        self.0.sync()?;
        Failpoint::SyncDone.pass();
        Ok(())
    }
}
