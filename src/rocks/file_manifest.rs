//! The file manifest: lists the files that the database's directory must contain at the next open.
//!
//! RocksDB does not notice a truncated manifest or a missing log, and would silently lose their content. So the store
//! writes down RocksDB's manifest, its length and the newest log at open, after every flush and every few megabytes;
//! and at close every file with its length. At open, less than that is corruption (G6). More was written since.
//!
//! ```text
//! manifest NUMBER BYTES     RocksDB's manifest has at least this number and length
//! log NUMBER                a log with at least this number exists
//! file NAME BYTES           a file and its length; only while the store is closed
//! crc CRC-32C of the lines above, hexadecimal
//! ```

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::wal;
use crate::fs::directory::sync_dir;
use crate::testing::failpoint::Failpoint;
use onlyonce_core::{Error, Result};

/// The files in use when the file manifest was written.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct FileManifest {
    manifest: (u64, u64),
    log: u64,
    files: Vec<(String, u64)>,
}

/// Rejects a database that lacks files or bytes of the file manifest, or whose logs or RocksDB manifest have a
/// corrupt record before their end. Without a file manifest only the records are checked.
pub(super) fn check(manifest_file: &Path, database: &Path) -> Result<()> {
    let current = database.join("CURRENT");
    let Some(number) = current_manifest(&current)? else {
        return Err(corrupt(&current, "the file is missing".to_owned()));
    };
    let manifest = manifest_path(database, number);
    let Some(bytes) = length(&manifest)? else {
        return Err(corrupt(&current, format!("it names {}, which is missing", name(&manifest))));
    };
    let noted = read(manifest_file)?.unwrap_or_default();
    let (noted_number, noted_bytes) = noted.manifest;
    if number < noted_number {
        let detail = format!("it names {}, but a later manifest was in use", name(&manifest));
        return Err(corrupt(&current, detail));
    }
    let least = if number == noted_number { noted_bytes } else { 0 };
    if bytes < least {
        return Err(corrupt(&manifest, format!("it has {bytes} bytes, expected at least {least}")));
    }
    let synced = wal::check_manifest(&manifest, least)?;
    if newest_log(database)? < Some(noted.log) {
        return Err(corrupt(
            &database.join(log_name(noted.log)),
            "the file is missing, and there is no later log".to_owned(),
        ));
    }
    let closed = !noted.files.is_empty();
    for (name, bytes) in noted.files {
        let path = database.join(name);
        match length(&path)? {
            Some(found) if found == bytes => {}
            Some(found) => return Err(corrupt(&path, format!("it has {found} bytes, expected {bytes}"))),
            None => return Err(corrupt(&path, "the file is missing".to_owned())),
        }
    }
    wal::check(database, closed, &synced)
}

/// Marks the store as open, by removing the file list: from now on files may change.
pub(super) fn reopen(manifest_file: &Path) -> Result<()> {
    match read(manifest_file)? {
        Some(noted) if !noted.files.is_empty() => {
            write_file(manifest_file, &FileManifest { files: Vec::new(), ..noted })
        }
        _ => Ok(()),
    }
}

/// Writes the file manifest, with every file and its length if the store is `closed`.
pub(super) fn write(manifest_file: &Path, database: &Path, closed: bool) -> Result<()> {
    let cannot_read = |error: std::io::Error| Error::io("reading", database, error);
    let (Some(number), Some(log)) = (current_manifest(&database.join("CURRENT"))?, newest_log(database)?) else {
        return Ok(());
    };
    let manifest = manifest_path(database, number);
    let Some(bytes) = length(&manifest)? else {
        // RocksDB has replaced it concurrently. The next file manifest will list the new one.
        return Ok(());
    };
    // The listed bytes of the manifest and the log's directory entry must survive a power cut.
    File::open(&manifest).and_then(|file| file.sync_all()).map_err(|error| Error::io("syncing", &manifest, error))?;
    sync_dir(database)?;
    let mut files = Vec::new();
    if closed {
        for entry in fs::read_dir(database).map_err(cannot_read)? {
            let entry = entry.map_err(cannot_read)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.ends_with(".sst") || name.ends_with(".log") || name.starts_with("MANIFEST-") {
                files.push((name, entry.metadata().map_err(cannot_read)?.len()));
            }
        }
        files.sort();
    }
    write_file(manifest_file, &FileManifest { manifest: (number, bytes), log, files })
}

fn write_file(manifest_file: &Path, file_manifest: &FileManifest) -> Result<()> {
    let new = manifest_file.with_extension("new");
    let cannot_write = |error: std::io::Error| Error::io("writing", &new, error);
    let mut file =
        File::options().create(true).write(true).truncate(true).mode(0o600).open(&new).map_err(cannot_write)?;
    file.write_all(file_manifest.encode().as_bytes()).and_then(|()| file.sync_all()).map_err(cannot_write)?;
    Failpoint::ManifestWritten.pass();
    fs::rename(&new, manifest_file).map_err(|error| Error::io("renaming", &new, error))?;
    Failpoint::ManifestRenamed.pass();
    manifest_file.parent().map_or(Ok(()), sync_dir)
}

fn read(manifest_file: &Path) -> Result<Option<FileManifest>> {
    match fs::read(manifest_file) {
        Ok(bytes) => match FileManifest::decode(&bytes) {
            Some(file_manifest) => Ok(Some(file_manifest)),
            None => Err(corrupt(manifest_file, "it does not match its checksum".to_owned())),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("reading", manifest_file, error)),
    }
}

/// Decodes and encodes a file manifest.
#[cfg(any(test, fuzzing))]
pub(super) fn rewritten(bytes: &[u8]) -> Option<String> {
    FileManifest::decode(bytes).map(|file_manifest| file_manifest.encode())
}

impl FileManifest {
    fn encode(&self) -> String {
        let (number, bytes) = self.manifest;
        let mut lines = format!("manifest {number} {bytes}\nlog {}\n", self.log);
        for (name, bytes) in &self.files {
            lines.push_str(&format!("file {name} {bytes}\n"));
        }
        let crc = crc32c::crc32c(lines.as_bytes());
        lines.push_str(&format!("crc {crc:08x}\n"));
        lines
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(bytes).ok()?;
        let mut file_manifest = Self::default();
        for line in text.lines() {
            match line.split(' ').collect::<Vec<_>>().as_slice() {
                ["manifest", number, bytes] => file_manifest.manifest = (number.parse().ok()?, bytes.parse().ok()?),
                ["log", number] => file_manifest.log = number.parse().ok()?,
                ["file", name, bytes] => file_manifest.files.push(((*name).to_owned(), bytes.parse().ok()?)),
                ["crc", _] => {}
                _ => return None,
            }
        }
        // Comparing the encoding also verifies the checksum.
        (file_manifest.encode() == text).then_some(file_manifest)
    }
}

/// The number of RocksDB's current manifest. `None` if the file `CURRENT` is missing.
fn current_manifest(current: &Path) -> Result<Option<u64>> {
    match fs::read_to_string(current) {
        Ok(text) => {
            let number = text.strip_prefix("MANIFEST-").and_then(|rest| rest.trim_end().parse().ok());
            let number = number.filter(|number| text == format!("{}\n", manifest_name(*number)));
            Ok(Some(number.ok_or_else(|| corrupt(current, "it does not name a manifest".to_owned()))?))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
            Err(corrupt(current, "it does not name a manifest".to_owned()))
        }
        Err(error) => Err(Error::io("reading", current, error)),
    }
}

/// The highest number of a log.
pub(super) fn newest_log(database: &Path) -> Result<Option<u64>> {
    let unreadable = |error: std::io::Error| Error::io("reading", database, error);
    let mut newest = None;
    for entry in fs::read_dir(database).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        newest = newest.max(wal::number(&path));
    }
    Ok(newest)
}

/// The length of a file, if it exists.
fn length(path: &Path) -> Result<Option<u64>> {
    match fs::metadata(path) {
        Ok(metadata) => Ok(Some(metadata.len())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("looking up", path, error)),
    }
}

fn manifest_path(database: &Path, number: u64) -> PathBuf {
    database.join(manifest_name(number))
}

fn manifest_name(number: u64) -> String {
    format!("MANIFEST-{number:06}")
}

fn log_name(number: u64) -> String {
    format!("{number:06}.log")
}

fn name(path: &Path) -> std::borrow::Cow<'_, str> {
    path.file_name().unwrap_or_default().to_string_lossy()
}

fn corrupt(path: &Path, detail: String) -> Error {
    Error::Corrupt { place: path.display().to_string(), detail }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_manifest_is_decoded_as_encoded_and_a_damaged_one_is_rejected() {
        let file_manifest =
            FileManifest { manifest: (56, 1_816), log: 59, files: vec![("000017.sst".to_owned(), 10_111)] };
        let text = file_manifest.encode().into_bytes();
        assert_eq!(FileManifest::decode(&text), Some(file_manifest));
        for at in 0..text.len() {
            for bit in 0..8 {
                let mut garbled = text.clone();
                garbled[at] ^= 1 << bit;
                assert_eq!(FileManifest::decode(&garbled), None, "bit {bit} of byte {at}");
            }
            assert_eq!(FileManifest::decode(&text[..at]), None, "cut at {at}");
        }
    }
}
