//! Files that are written through a mapping.
//!
//! A store to a shared mapping is in the page cache at once, so it survives a crash of the process as a `write` does, and
//! costs a fiftieth of one. A sync of a mapped file costs more, because the next store to each page faults: so this is for
//! journals that sync rarely.
//!
//! This is the only file with `unsafe` code (`docs/decisions/0025-own-journal.md`).
#![allow(unsafe_code, reason = "mapping a file is unsafe: another process could change it")]

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use memmap2::MmapMut;
use parking_lot::Mutex;

use super::layout::DATA_START;

/// How many bytes are made ready for stores at a time.
const AHEAD: usize = 64 << 10;
const ZEROS: &[u8; AHEAD] = &[0; AHEAD];

/// A file that is written through a mapping.
#[derive(Debug)]
pub(crate) struct MappedFile {
    file: File,
    mapping: Mutex<Mapping>,
}

#[derive(Debug)]
struct Mapping {
    bytes: MmapMut,
    /// The bytes before this offset are cached, and zero from the last store on.
    ready: usize,
}

impl MappedFile {
    pub(crate) fn new(file: &File) -> io::Result<Self> {
        let file = file.try_clone()?;
        // SAFETY: the bytes must not change except through this mapping and this file. The file is private to its owner, in
        // a directory that the caller has locked, and nothing keeps a reference into the mapping: bytes are copied to it
        // under a lock. If the file is truncated by another process, a store ends this process by SIGBUS; it does not
        // reach other memory.
        let bytes = unsafe { MmapMut::map_mut(&file)? };
        Ok(Self { file, mapping: Mutex::new(Mapping { bytes, ready: 0 }) })
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut mapping = self.mapping.lock();
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let end = start.checked_add(bytes.len()).ok_or(io::ErrorKind::InvalidInput)?;
        if end <= DATA_START {
            // A header begins another use of the file. It is written by the kernel: a kill in the middle of a copy must not
            // leave a part of both of its copies.
            mapping.ready = 0;
            return self.file.write_all_at(bytes, offset);
        }
        if end > mapping.ready {
            return self.write_ahead(&mut mapping, bytes, start, end);
        }
        mapping.bytes.get_mut(start..end).ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(bytes);
        Ok(())
    }

    /// Writes with a system call, and zeros after it. So the pages of the next stores are cached without being read from
    /// disk: a read that fails in a store would end the process. It also removes what an earlier use left there.
    #[cold]
    fn write_ahead(&self, mapping: &mut Mapping, bytes: &[u8], start: usize, end: usize) -> io::Result<()> {
        self.file.write_all_at(bytes, start as u64)?;
        let ready = (end + AHEAD / 2).next_multiple_of(AHEAD).min(mapping.bytes.len());
        if let Some(zeros) = ZEROS.get(..ready.saturating_sub(end)) {
            self.file.write_all_at(zeros, end as u64)?;
        } else {
            self.file.write_all_at(&vec![0; ready - end], end as u64)?;
        }
        mapping.ready = ready;
        Ok(())
    }
}
