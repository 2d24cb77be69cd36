//! SST writer: writes sorted bucket entries to a file outside the database, which then ingests it.

use std::path::Path;

use rocksdb::SstFileWriter;

use super::failed;
use super::options::Tuning;
use onlyonce_core::{Error, Result};

/// Writes entries to a new file and syncs it. Their keys must strictly increase.
pub(super) fn write(tuning: &Tuning, path: &Path, fill: impl FnOnce(&mut SstWriter<'_>) -> Result<()>) -> Result<()> {
    let options = tuning.bucket();
    let mut sst = SstWriter { writer: SstFileWriter::create(&options), path };
    sst.writer.open(path).map_err(|error| failed("creating", path, &error))?;
    fill(&mut sst)?;
    sst.writer.finish().map_err(|error| failed("writing", path, &error))?;
    // RocksDB's writer tells the operating system to drop the file's pages. Reading it once brings them back for the
    // first lookups.
    std::fs::File::open(path)
        .and_then(|mut sst_file| std::io::copy(&mut sst_file, &mut std::io::sink()))
        .map(|_| ())
        .map_err(|error| Error::io("reading", path.to_owned(), error))
}

/// An SST that is being written.
pub(crate) struct SstWriter<'a> {
    writer: SstFileWriter<'a>,
    path: &'a Path,
}

impl SstWriter<'_> {
    pub(crate) fn put(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        self.writer.put(key, value).map_err(|error| failed("writing", self.path, &error))
    }
}
