//! Filter files: the filter column of one bucket, persisted so that an open need not read the bucket's keys.
//!
//! ```text
//! file   := header | header hash (16) | (column of a shard | hash (16)) for each of 16 shards
//! header := "ONLYFLT1" | width (4) | lines of a shard (8) | keys (8) | number of SSTs (4) | number of an SST (8)*
//! column := a bit for each row, row after row, the lowest bit of a byte first
//! ```
//!
//! Numbers are little endian and have the same width on every platform. Hashes are BLAKE3, keyed with the store's
//! secret and truncated to 16 bytes. The header hash covers the bucket's name and the header. The hash of a shard
//! covers the header hash, the shard's number (8) and the column. So a file of another store, another bucket or an
//! earlier version of the filter is rejected, and so is a flipped bit.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use super::matrix::{ColumnId, FilterMatrix, Geometry, SHARDS};
use crate::codec::{Reader, Secret};
use crate::testing::failpoint::Failpoint;

const MAGIC: &[u8; 8] = b"ONLYFLT1";
const HASH_BYTES: usize = 16;
/// The extension of a file that is being written.
pub(crate) const NEW: &str = "new";
/// Upper bound for SSTs in a header. Compaction keeps the real number far below.
const MAX_SSTS: u32 = 1 << 16;

type Hash = [u8; HASH_BYTES];

const BAD_HEADER: &str = "the header does not match its checksum";

/// The key of the hashes in a store's filter files.
#[derive(Clone, Copy)]
pub(crate) struct FileKey([u8; blake3::KEY_LEN]);

impl FileKey {
    pub(crate) fn new(secret: &Secret) -> Self {
        Self(blake3::derive_key("onlyonce 2026 filter files", secret))
    }

    /// The hash of a shard's column. The shard's number has 8 bytes on every platform.
    fn column_hash(&self, header_hash: &Hash, shard: usize, column: &[u8]) -> Hash {
        self.hash(&[header_hash, &(shard as u64).to_le_bytes(), column])
    }

    pub(crate) fn hash(&self, parts: &[&[u8]]) -> Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        for part in parts {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        let mut hash = Hash::default();
        hasher.finalize_xof().fill(&mut hash);
        hash
    }
}

/// What a filter file covers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Covered {
    pub(crate) keys: u64,
    /// The numbers of the bucket's SSTs whose keys are in the file.
    pub(crate) ssts: Vec<u64>,
}

impl Geometry {
    /// The length of a file whose header ends at `columns_start`.
    fn file_bytes(self, columns_start: u64) -> Option<u64> {
        self.column_bytes().checked_add(HASH_BYTES as u64)?.checked_mul(SHARDS as u64)?.checked_add(columns_start)
    }
}

impl Covered {
    /// Whether it covers all keys of a bucket with these SSTs.
    pub(crate) fn covers(&self, ssts: &[u64]) -> bool {
        ssts.iter().all(|sst| self.ssts.contains(sst))
    }
}

/// Writes one column of a base matrix atomically: the file is complete or does not exist.
pub(crate) fn write(
    path: &Path,
    key: &FileKey,
    bucket: &str,
    matrix: &FilterMatrix,
    column_id: ColumnId,
    covered: &Covered,
) -> io::Result<()> {
    Failpoint::FilterBegun.pass();
    let Some(geometry) = matrix.geometry() else {
        return Err(io::Error::other("only columns of a base matrix can be persisted"));
    };
    let new = path.with_extension(NEW);
    let file = fs::OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&new)?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let mut header = Vec::new();
    header.extend_from_slice(MAGIC);
    header.extend_from_slice(&geometry.width.to_le_bytes());
    header.extend_from_slice(&geometry.lines_per_shard.to_le_bytes());
    header.extend_from_slice(&covered.keys.to_le_bytes());
    header.extend_from_slice(&(covered.ssts.len() as u32).to_le_bytes());
    for sst in &covered.ssts {
        header.extend_from_slice(&sst.to_le_bytes());
    }
    let header_hash = key.hash(&[bucket.as_bytes(), &header]);
    out.write_all(&header)?;
    out.write_all(&header_hash)?;
    for shard in 0..SHARDS {
        if shard == SHARDS / 2 {
            Failpoint::FilterHalfWritten.pass();
        }
        let column =
            matrix.column(shard, column_id).ok_or_else(|| io::Error::other("the matrix has no such column"))?;
        out.write_all(&column)?;
        out.write_all(&key.column_hash(&header_hash, shard, &column))?;
    }
    out.into_inner().map_err(io::IntoInnerError::into_error)?.sync_data()?;
    Failpoint::FilterWritten.pass();
    fs::rename(&new, path)?;
    Failpoint::FilterRenamed.pass();
    Ok(())
}

/// An open filter file with a valid header.
pub(crate) struct FilterFile {
    file: File,
    key: FileKey,
    header_hash: Hash,
    /// The offset of the first column.
    columns_start: u64,
    pub(crate) geometry: Geometry,
    pub(crate) covered: Covered,
}

impl FilterFile {
    /// Opens the file of a bucket and validates its header and its length.
    pub(crate) fn open(path: &Path, key: &FileKey, bucket: &str) -> io::Result<Self> {
        let mut file = File::open(path)?;
        let mut header = vec![0; MAGIC.len() + 24];
        file.read_exact(&mut header)?;
        let (geometry, keys, ssts) = read_header(&header).ok_or_else(|| damaged(BAD_HEADER))?;
        let fixed = header.len();
        header.resize(fixed + ssts as usize * 8, 0);
        file.read_exact(header.get_mut(fixed..).unwrap_or_default())?;
        let mut header_hash = Hash::default();
        file.read_exact(&mut header_hash)?;
        if header_hash != key.hash(&[bucket.as_bytes(), &header]) || !geometry.is_valid() {
            return Err(damaged(BAD_HEADER));
        }
        let columns_start = (header.len() + HASH_BYTES) as u64;
        if geometry.file_bytes(columns_start) != Some(file.metadata()?.len()) {
            return Err(damaged("the length does not match the header"));
        }
        let ssts = header.get(fixed..).unwrap_or_default().as_chunks().0.iter().copied().map(u64::from_le_bytes);
        let covered = Covered { keys, ssts: ssts.collect() };
        Ok(Self { file, key: *key, header_hash, columns_start, geometry, covered })
    }

    /// Reads the column of a shard and verifies its hash.
    pub(crate) fn column(&self, shard: usize) -> io::Result<Vec<u8>> {
        let len = self.geometry.column_bytes();
        let start = self.columns_start + (len + HASH_BYTES as u64) * shard as u64;
        let mut column = vec![0; usize::try_from(len).map_err(io::Error::other)?];
        self.file.read_exact_at(&mut column, start)?;
        let mut hash = Hash::default();
        self.file.read_exact_at(&mut hash, start + len)?;
        if hash != self.key.column_hash(&self.header_hash, shard, &column) {
            return Err(damaged("a column does not match its checksum"));
        }
        Ok(column)
    }
}

fn read_header(header: &[u8]) -> Option<(Geometry, u64, u32)> {
    let mut reader = Reader::new(header);
    if reader.take(MAGIC.len())? != MAGIC {
        return None;
    }
    let width = u32::from_le_bytes(reader.array()?);
    let lines_per_shard = u64::from_le_bytes(reader.array()?);
    let keys = u64::from_le_bytes(reader.array()?);
    let ssts = u32::from_le_bytes(reader.array()?);
    (ssts <= MAX_SSTS).then_some((Geometry { width, lines_per_shard }, keys, ssts))
}

fn damaged(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filter::matrix::Columns;

    fn key() -> FileKey {
        FileKey::new(&[3; 16])
    }

    fn written(dir: &tempfile::TempDir) -> (std::path::PathBuf, FilterMatrix, Covered) {
        let matrix = FilterMatrix::new(Columns::All(32), 2_000);
        assert!(matrix.insert(7, (0..2_000_u64).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15))));
        let covered = Covered { keys: 2_000, ssts: vec![11, 19] };
        let path = dir.path().join("bucket.filter");
        write(&path, &key(), "bucket", &matrix, 7, &covered).unwrap();
        (path, matrix, covered)
    }

    fn read(path: &Path, key: &FileKey, bucket: &str) -> io::Result<(Covered, Vec<Vec<u8>>)> {
        let file = FilterFile::open(path, key, bucket)?;
        let columns = (0..SHARDS).map(|shard| file.column(shard)).collect::<io::Result<_>>()?;
        Ok((file.covered, columns))
    }

    #[test]
    fn a_filter_file_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let (path, matrix, covered) = written(&dir);
        let (read, columns) = read(&path, &key(), "bucket").unwrap();
        assert_eq!(read, covered);
        assert!(columns.iter().enumerate().all(|(shard, column)| Some(column) == matrix.column(shard, 7).as_ref()));
        assert!(read.covers(&[19]) && read.covers(&[]) && !read.covers(&[11, 20]));
    }

    #[test]
    fn the_hash_of_a_column_has_the_same_bytes_on_every_platform() {
        let expected = key().hash(&[&[9; 16], &[3, 0, 0, 0, 0, 0, 0, 0], b"column"]);
        assert_eq!(key().column_hash(&[9; 16], 3, b"column"), expected);
    }

    #[test]
    fn a_filter_file_that_is_damaged_or_truncated_or_of_another_bucket_is_rejected() {
        let dir = tempfile::tempdir().unwrap();
        let (path, ..) = written(&dir);
        let good = fs::read(&path).unwrap();
        for at in (0..good.len()).step_by(97) {
            let mut damaged = good.clone();
            damaged[at] ^= 1 << (at % 8);
            fs::write(&path, &damaged).unwrap();
            assert!(read(&path, &key(), "bucket").is_err(), "a bit of byte {at} is flipped");
            fs::write(&path, &good[..at]).unwrap();
            assert!(read(&path, &key(), "bucket").is_err(), "truncated at {at}");
        }
        fs::write(&path, &good).unwrap();
        assert!(read(&path, &key(), "other").is_err());
        assert!(read(&path, &FileKey::new(&[4; 16]), "bucket").is_err());
        assert!(read(&path, &key(), "bucket").is_ok());
    }
}
