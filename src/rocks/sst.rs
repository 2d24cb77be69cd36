//! Runs: sorted files of completed keys, written beside the database and handed to it whole.

use std::path::Path;

use rocksdb::SstFileWriter;

use super::failed;
use super::options::Tuning;
use onlyonce_core::{Error, Result};

/// Writes the rows, which must come in the order of their keys and without doubles, to a new file, and syncs it.
pub(super) fn write(tuning: &Tuning, path: &Path, fill: impl FnOnce(&mut SstWriter<'_>) -> Result<()>) -> Result<()> {
    let options = tuning.bucket();
    let mut sst = SstWriter { writer: SstFileWriter::create(&options), path };
    sst.writer.open(path).map_err(|error| failed("cannot create", path, &error))?;
    fill(&mut sst)?;
    sst.writer.finish().map_err(|error| failed("cannot write", path, &error))?;
    // The writer tells the operating system to drop what it wrote. Read once, the run's first questions find it in
    // memory.
    std::fs::File::open(path)
        .and_then(|mut sst_file| std::io::copy(&mut sst_file, &mut std::io::sink()))
        .map(|_| ())
        .map_err(|error| Error::io("cannot read", path.to_owned(), error))
}

/// Where the rows of a run go.
pub(crate) struct SstWriter<'a> {
    writer: SstFileWriter<'a>,
    path: &'a Path,
}

impl SstWriter<'_> {
    pub(crate) fn put(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        self.writer.put(key, value).map_err(|error| failed("cannot write", self.path, &error))
    }
}
