//! Files that are written through a mapping.
//!
//! A store to a shared mapping is in the page cache at once, so it survives a crash of the process as a `write` does, and
//! costs a fiftieth of one. Only a window of the file is mapped at a time: a sync write-protects each mapped page that was written,
//! and interrupts the other CPUs for each.
//!
//! This is the only file with `unsafe` code (`docs/decisions/0025-own-journal.md`).
#![allow(unsafe_code, reason = "mapping a file is unsafe: another process could change it")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use memmap2::{MmapMut, MmapOptions};
use parking_lot::Mutex;

use super::layout::{BLOCK, DATA_START};

/// A window ends at a multiple of this, and is at least half as large unless the file ends.
const WINDOW: usize = 256 << 10;
const ZEROS: &[u8; 64 << 10] = &[0; 64 << 10];

/// A file that is written through a mapping.
#[derive(Debug)]
pub(crate) struct MappedFile {
    file: File,
    bytes: usize,
    window: Mutex<Option<Window>>,
}

/// A part of the file. Its pages are cached, and zero from the last write on.
#[derive(Debug)]
struct Window {
    start: usize,
    end: usize,
    /// `None` if it cannot be mapped: then writes are system calls.
    bytes: Option<MmapMut>,
}

impl Window {
    /// The part of the file at these offsets, if all of it is in the window.
    fn get_mut(&mut self, range: &Range<usize>) -> Option<&mut [u8]> {
        self.bytes.as_mut()?.get_mut(range.start.checked_sub(self.start)?..range.end.checked_sub(self.start)?)
    }
}

impl MappedFile {
    /// Fails if the file cannot be mapped.
    pub(crate) fn new(file: &File) -> io::Result<Self> {
        let file = file.try_clone()?;
        let bytes = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        map(&file, 0..bytes.min(BLOCK))?;
        Ok(Self { file, bytes, window: Mutex::new(None) })
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut window = self.window.lock();
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let end = start.checked_add(bytes.len()).ok_or(io::ErrorKind::InvalidInput)?;
        if let Some(mapped) = window.as_mut().and_then(|window| window.get_mut(&(start..end))) {
            mapped.copy_from_slice(bytes);
            return Ok(());
        }
        self.file.write_all_at(bytes, offset)?;
        // A header begins another use of the file. It is always written by the kernel: a kill in the middle of a copy must not
        // leave a part of both of its copies.
        if end <= DATA_START {
            *window = None;
        } else if window.as_ref().is_none_or(|window| end > window.end) {
            // A long record would pay for zeros that the next one overwrites.
            *window = if bytes.len() < WINDOW / 4 { self.open_window(end)? } else { None };
        }
        Ok(())
    }

    /// Maps the part after `written`, after it has filled it with zeros. So its pages are cached without being read from
    /// disk: a read that fails in a store would end the process. It also removes what an earlier use left there.
    #[cold]
    fn open_window(&self, written: usize) -> io::Result<Option<Window>> {
        let start = written / BLOCK * BLOCK;
        let end = (written + WINDOW / 2).next_multiple_of(WINDOW).min(self.bytes);
        if end <= written {
            return Ok(None);
        }
        for zeros in (written..end).step_by(ZEROS.len()) {
            let len = ZEROS.len().min(end - zeros);
            self.file.write_all_at(ZEROS.get(..len).unwrap_or(ZEROS), zeros as u64)?;
        }
        let bytes = map(&self.file, start..end).and_then(prepare).ok();
        Ok(Some(Window { start, end, bytes }))
    }
}

fn map(file: &File, range: Range<usize>) -> io::Result<MmapMut> {
    let mut options = MmapOptions::new();
    options.offset(range.start as u64).len(range.len());
    // SAFETY: the bytes must not change except through this mapping and this file. The file is private to its owner, in
    // a directory that the caller has locked, and nothing keeps a reference into the mapping: bytes are copied to it
    // under a lock. If the file is truncated by another process, a store ends this process by SIGBUS; it does not
    // reach other memory.
    unsafe { options.map_mut(file) }
}

/// Makes all pages writable, which saves a fault for each. Fails where a store would end the process.
#[cfg(target_os = "linux")]
fn prepare(bytes: MmapMut) -> io::Result<MmapMut> {
    match bytes.advise(memmap2::Advice::PopulateWrite) {
        // Kernels before 5.14 do not know it.
        Err(error) if error.kind() != io::ErrorKind::InvalidInput => Err(error),
        _ => Ok(bytes),
    }
}

#[cfg(not(target_os = "linux"))]
fn prepare(bytes: MmapMut) -> io::Result<MmapMut> {
    Ok(bytes)
}
