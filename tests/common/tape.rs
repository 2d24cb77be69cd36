//! A disk that records every write and flush in order, and the states in which a power cut can leave it: ext4 on a loop
//! device whose file is served by a FUSE file system in this process.

#![allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, WriteFlags,
};
use rand::RngExt;
use rand::rngs::StdRng;
use tempfile::TempDir;

use crate::disk::{run_program, unmount};

/// The unit that a disk writes atomically.
const SECTOR: usize = 512;
const IMAGE: &str = "image";
const IMAGE_INODE: INodeNo = INodeNo(2);
const FOREVER: Duration = Duration::from_secs(3_600);

/// The writes and flushes of the disk.
pub enum Event {
    Write { offset: usize, bytes: Vec<u8> },
    Flush,
}

#[derive(Default)]
struct Tape {
    image: Vec<u8>,
    events: Vec<Event>,
}

/// The file system with one file, the disk. One thread serves it, so that events have one order.
struct Recorder(Arc<Mutex<Tape>>);

impl Recorder {
    fn attributes(&self, inode: INodeNo) -> FileAttr {
        let is_image = inode == IMAGE_INODE;
        let size = if is_image { self.0.lock().unwrap().image.len() as u64 } else { 0 };
        FileAttr {
            ino: inode,
            size,
            blocks: size / 512,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if is_image { FileType::RegularFile } else { FileType::Directory },
            perm: if is_image { 0o600 } else { 0o700 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for Recorder {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == IMAGE {
            reply.entry(&FOREVER, &self.attributes(IMAGE_INODE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&FOREVER, &self.attributes(inode));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // Without the kernel's cache: writes of the loop device arrive at once and in their order.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let tape = self.0.lock().unwrap();
        let start = (offset as usize).min(tape.image.len());
        let end = (start + size as usize).min(tape.image.len());
        reply.data(&tape.image[start..end]);
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let mut tape = self.0.lock().unwrap();
        let offset = offset as usize;
        let Some(target) = tape.image.get_mut(offset..offset + data.len()) else { return reply.error(Errno::ENOSPC) };
        target.copy_from_slice(data);
        tape.events.push(Event::Write { offset, bytes: data.to_vec() });
        reply.written(data.len() as u32);
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        // A descriptor is closed, which is no event of a disk.
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.0.lock().unwrap().events.push(Event::Flush);
        reply.ok();
    }
}

/// The mounted disk.
pub struct TapedDisk {
    dir: TempDir,
    blank: Vec<u8>,
    tape: Arc<Mutex<Tape>>,
    session: Option<BackgroundSession>,
}

impl TapedDisk {
    /// `None` if this machine does not support it.
    pub fn new(mib: usize, commit_s: u32) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let blank = formatted(&dir.path().join("plain"), mib)?;
        let tape = Arc::new(Mutex::new(Tape { image: blank.clone(), events: Vec::new() }));
        std::fs::create_dir(dir.path().join("fuse")).unwrap();
        std::fs::create_dir(dir.path().join("root")).unwrap();
        let mut disk = Self { dir, blank, tape, session: None };
        let session = fuser::spawn_mount(Recorder(Arc::clone(&disk.tape)), disk.fuse(), &Config::default());
        disk.session = Some(session.ok()?);
        let options = format!("loop,commit={commit_s}");
        let (image, root) = (disk.fuse().join(IMAGE), disk.root());
        run_program("mount", &["-o", &options, image.to_str()?, root.to_str()?]).then_some(disk)
    }

    fn fuse(&self) -> PathBuf {
        self.dir.path().join("fuse")
    }

    /// Where the file system is mounted.
    pub fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    /// A clock that counts the events of the disk.
    pub fn clock(&self) -> impl Fn() -> u64 + Send + 'static {
        let tape = Arc::clone(&self.tape);
        move || tape.lock().unwrap().events.len() as u64
    }

    /// Ends the recording, and unmounts the disk. Later events are not recorded.
    pub fn eject(mut self) -> Recording {
        let events = std::mem::take(&mut self.tape.lock().unwrap().events);
        Recording { blank: std::mem::take(&mut self.blank), events }
    }
}

impl Drop for TapedDisk {
    fn drop(&mut self) {
        unmount(&self.root());
        // Once the loop device has released it.
        let is_unmounted = unmount(&self.fuse());
        if let Some(session) = self.session.take().filter(|_| is_unmounted) {
            let _ = session.umount_and_join();
        }
    }
}

/// An empty ext4 file system without pending background work.
fn formatted(path: &Path, mib: usize) -> Option<Vec<u8>> {
    std::fs::File::create(path).unwrap().set_len((mib as u64) << 20).unwrap();
    let done = "nodiscard,lazy_itable_init=0,lazy_journal_init=0";
    run_program("mkfs.ext4", &["-q", "-F", "-b", "4096", "-J", "size=4", "-E", done, path.to_str()?]).then_some(())?;
    let image = std::fs::read(path).unwrap();
    std::fs::remove_file(path).unwrap();
    Some(image)
}

/// All events of a disk.
pub struct Recording {
    /// The initial contents.
    blank: Vec<u8>,
    pub events: Vec<Event>,
}

/// The state of a disk after a power cut.
pub struct Remains {
    pub image: Vec<u8>,
    /// Writes after the last flush: those that are complete, torn, and lost.
    pub complete: usize,
    pub torn: usize,
    pub lost: usize,
}

/// Replays a recording from its start.
pub struct Player<'a> {
    events: &'a [Event],
    /// All events before this one are on the disk.
    flushed: usize,
    image: Vec<u8>,
}

impl<'a> Player<'a> {
    pub fn new(recording: &'a Recording) -> Self {
        Self { events: &recording.events, flushed: 0, image: recording.blank.clone() }
    }

    /// A possible state after this many events; never fewer than in the call before. All writes up to the last flush
    /// are complete. Of the later ones some are complete, some are lost, and some are torn between two sectors. This
    /// covers reordering: for writes that do not overlap, another order equals the loss of some; and the kernel does
    /// not reorder overlapping writes.
    pub fn cut(&mut self, after: usize, rng: &mut StdRng) -> Remains {
        let before = &self.events[..after];
        let flush = before.iter().rposition(|event| matches!(event, Event::Flush)).unwrap_or(0).max(self.flushed);
        for event in &before[self.flushed..flush] {
            apply(&mut self.image, event, |_| true);
        }
        self.flushed = flush;
        let mut remains = Remains { image: self.image.clone(), complete: 0, torn: 0, lost: 0 };
        // From nearly all writes to nearly none.
        let (there, torn) = (rng.random::<f64>(), rng.random::<f64>() / 2.0);
        for event in &before[flush..] {
            let Event::Write { offset, bytes } = event else { continue };
            let sectors = bytes.len() / SECTOR;
            if sectors > 1 && *offset > 0 && rng.random_bool(torn) {
                remains.torn += 1;
                let at = rng.random_range(1..sectors);
                match rng.random_range(0..3) {
                    0 => apply(&mut remains.image, event, |sector| sector < at),
                    1 => apply(&mut remains.image, event, |sector| sector >= at),
                    _ => apply(&mut remains.image, event, |_| rng.random_bool(there)),
                }
            } else if rng.random_bool(there) {
                remains.complete += 1;
                apply(&mut remains.image, event, |_| true);
            } else {
                remains.lost += 1;
            }
        }
        remains
    }
}

fn apply(image: &mut [u8], event: &Event, mut there: impl FnMut(usize) -> bool) {
    let Event::Write { offset, bytes } = event else { return };
    for (number, sector) in bytes.chunks(SECTOR).enumerate().filter(|(number, _)| there(*number)) {
        let at = offset + number * SECTOR;
        image[at..at + sector.len()].copy_from_slice(sector);
    }
}
