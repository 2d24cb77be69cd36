//! A file system whose operations fail as a test asks for: a FUSE file system in this process, over a directory in memory.
//! Stores to a shared mapping reach it when the kernel writes their pages back, at the latest with the next sync.

#![allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};
use tempfile::TempDir;

use crate::disk::unmount;

/// Attributes and names are looked up each time.
const NEVER: Duration = Duration::ZERO;
const ROOT: INodeNo = INodeNo(1);
const O_TRUNC: i32 = 0o1000;

/// What fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// This operation, with this error.
    Once(i32),
    /// This operation and all later ones.
    Forever(i32),
    /// This operation and all later ones that need space.
    Full,
}

pub const EIO: i32 = 5;
const ENOSPC: i32 = 28;

/// The operations that change files, and which of them fail.
#[derive(Default)]
pub struct Faults {
    /// How many operations there were on files whose paths contain `only`.
    pub operations: u64,
    pub only: &'static str,
    /// How many there were by kind, and the extension of the file.
    pub kinds: BTreeMap<String, u64>,
    pub plan: Option<(u64, Fault)>,
    /// The first operation that failed.
    pub failed: Option<String>,
}

impl Faults {
    fn check(&mut self, operation: &'static str, path: &Path) -> Result<(), Errno> {
        if !path.to_string_lossy().contains(self.only) {
            return Ok(());
        }
        self.operations += 1;
        let ending = path.extension().map_or("", |ending| ending.to_str().unwrap());
        *self.kinds.entry(format!("{operation} {ending}")).or_default() += 1;
        let Some((at, fault)) = self.plan.filter(|(at, _)| self.operations >= *at) else { return Ok(()) };
        let needs_space = matches!(operation, "write" | "create" | "mkdir" | "link" | "rename");
        let errno = match fault {
            Fault::Once(errno) if self.operations == at => errno,
            Fault::Forever(errno) => errno,
            Fault::Full if needs_space => ENOSPC,
            _ => return Ok(()),
        };
        self.failed.get_or_insert_with(|| format!("{operation} of {}", path.display()));
        Err(Errno::from_i32(errno))
    }
}

#[derive(Default)]
struct State {
    paths: HashMap<u64, PathBuf>,
    files: HashMap<u64, (PathBuf, Arc<File>)>,
    next: u64,
}

struct Faulty {
    backing: PathBuf,
    faults: Arc<Mutex<Faults>>,
    state: Mutex<State>,
}

type Answer<T> = Result<T, Errno>;

impl Faulty {
    fn path(&self, inode: INodeNo) -> Answer<PathBuf> {
        if inode == ROOT {
            return Ok(self.backing.clone());
        }
        self.state.lock().unwrap().paths.get(&inode.0).cloned().ok_or(Errno::ENOENT)
    }

    fn child(&self, parent: INodeNo, name: &OsStr) -> Answer<PathBuf> {
        Ok(self.path(parent)?.join(name))
    }

    fn file(&self, handle: FileHandle) -> Answer<(PathBuf, Arc<File>)> {
        self.state.lock().unwrap().files.get(&handle.0).cloned().ok_or(Errno::from_i32(9))
    }

    fn check(&self, operation: &'static str, path: &Path) -> Answer<()> {
        let path = path.strip_prefix(&self.backing).unwrap();
        self.faults.lock().unwrap().check(operation, path)
    }

    fn add(&self, path: &Path, file: File) -> FileHandle {
        let mut state = self.state.lock().unwrap();
        state.next += 1;
        let handle = state.next;
        state.files.insert(handle, (path.to_owned(), Arc::new(file)));
        FileHandle(handle)
    }

    /// The attributes of a path, whose inode is known from now on.
    fn entry(&self, path: &Path) -> Answer<FileAttr> {
        let attributes = attributes(&fs::symlink_metadata(path)?);
        self.state.lock().unwrap().paths.insert(attributes.ino.0, path.to_owned());
        Ok(if path == self.backing { FileAttr { ino: ROOT, ..attributes } } else { attributes })
    }

    fn attributes(&self, inode: INodeNo, handle: Option<FileHandle>) -> Answer<FileAttr> {
        // A deleted file has no path, and another one may have the path that it had.
        let by_path = || -> Answer<FileAttr> { Ok(attributes(&fs::symlink_metadata(self.path(inode)?)?)) };
        let found = by_path().ok().filter(|found: &FileAttr| inode == ROOT || found.ino == inode);
        let open = handle.and_then(|handle| self.file(handle).ok()).or_else(|| {
            let state = self.state.lock().unwrap();
            let mut files = state.files.values();
            files.find(|(_, file)| file.metadata().is_ok_and(|metadata| metadata.ino() == inode.0)).cloned()
        });
        let found = match (found, open) {
            (Some(found), _) => found,
            (None, Some((_, file))) => attributes(&file.metadata()?),
            (None, None) => return Err(Errno::ENOENT),
        };
        Ok(FileAttr { ino: inode, ..found })
    }

    fn resize(&self, inode: INodeNo, handle: Option<FileHandle>, bytes: u64) -> Answer<()> {
        let (path, file) = match handle.map(|handle| self.file(handle)) {
            Some(open) => open?,
            None => {
                let path = self.path(inode)?;
                let file = OpenOptions::new().write(true).open(&path)?;
                (path, Arc::new(file))
            }
        };
        self.check("resize", &path)?;
        Ok(file.set_len(bytes)?)
    }

    fn create_file(&self, path: &Path, mode: u32, flags: i32) -> Answer<(FileAttr, FileHandle)> {
        self.check("create", path)?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(flags & O_TRUNC != 0).mode(mode);
        let file = options.open(path)?;
        Ok((self.entry(path)?, self.add(path, file)))
    }

    fn open_file(&self, path: &Path, flags: OpenFlags) -> Answer<FileHandle> {
        let is_written = flags.0 & 3 != 0;
        if flags.0 & O_TRUNC != 0 {
            self.check("create", path)?;
        }
        let mut options = OpenOptions::new();
        let file = options.read(true).write(is_written).truncate(flags.0 & O_TRUNC != 0).open(path)?;
        Ok(self.add(path, file))
    }

    fn move_file(&self, from: &Path, to: &Path) -> Answer<()> {
        self.check("rename", to)?;
        fs::rename(from, to)?;
        let mut state = self.state.lock().unwrap();
        let moved = |path: &Path| {
            path.strip_prefix(from)
                .ok()
                .map(|rest| if rest.as_os_str().is_empty() { to.to_owned() } else { to.join(rest) })
        };
        for path in state.paths.values_mut() {
            if let Some(new) = moved(path) {
                *path = new;
            }
        }
        for (path, _) in state.files.values_mut() {
            if let Some(new) = moved(path) {
                *path = new;
            }
        }
        Ok(())
    }

    fn remove(&self, path: &Path) -> Answer<()> {
        self.check("unlink", path)?;
        Ok(fs::remove_file(path)?)
    }

    fn make_dir(&self, path: &Path, mode: u32) -> Answer<FileAttr> {
        self.check("mkdir", path)?;
        fs::DirBuilder::new().mode(mode).create(path)?;
        self.entry(path)
    }

    fn link_file(&self, inode: INodeNo, to: &Path) -> Answer<FileAttr> {
        self.check("link", to)?;
        fs::hard_link(self.path(inode)?, to)?;
        self.entry(to)
    }

    fn list(&self, inode: INodeNo) -> Answer<Vec<(u64, FileType, std::ffi::OsString)>> {
        let entries = fs::read_dir(self.path(inode)?)?.map(|entry| {
            let entry = entry?;
            let metadata = entry.metadata()?;
            Ok((metadata.ino(), kind(&metadata), entry.file_name()))
        });
        Ok(entries.collect::<io::Result<_>>()?)
    }

    fn read_file(&self, handle: FileHandle, offset: u64, size: u32) -> Answer<Vec<u8>> {
        let (_, file) = self.file(handle)?;
        let (mut bytes, mut len) = (vec![0; size as usize], 0);
        while len < bytes.len() {
            match file.read_at(&mut bytes[len..], offset + len as u64)? {
                0 => break,
                read => len += read,
            }
        }
        bytes.truncate(len);
        Ok(bytes)
    }

    fn write_file(&self, handle: FileHandle, offset: u64, data: &[u8]) -> Answer<()> {
        let (path, file) = self.file(handle)?;
        self.check("write", &path)?;
        Ok(file.write_all_at(data, offset)?)
    }

    fn sync_file(&self, handle: FileHandle) -> Answer<()> {
        let (path, _) = self.file(handle)?;
        self.check("sync", &path)
    }
}

fn kind(metadata: &fs::Metadata) -> FileType {
    if metadata.is_dir() { FileType::Directory } else { FileType::RegularFile }
}

fn attributes(metadata: &fs::Metadata) -> FileAttr {
    let now = SystemTime::now();
    let changed = metadata.modified().unwrap_or(now);
    FileAttr {
        ino: INodeNo(metadata.ino()),
        size: metadata.len(),
        blocks: metadata.blocks(),
        atime: changed,
        mtime: changed,
        ctime: changed,
        crtime: changed,
        kind: kind(metadata),
        perm: (metadata.permissions().mode() & 0o7777) as u16,
        nlink: metadata.nlink() as u32,
        uid: metadata.uid(),
        gid: metadata.gid(),
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

fn answer_empty(answer: Answer<()>, reply: ReplyEmpty) {
    match answer {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}

fn answer_entry(answer: Answer<FileAttr>, reply: ReplyEntry) {
    match answer {
        Ok(attributes) => reply.entry(&NEVER, &attributes, Generation(0)),
        Err(errno) => reply.error(errno),
    }
}

impl Filesystem for Faulty {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        answer_entry(self.child(parent, name).and_then(|path| self.entry(&path)), reply);
    }

    fn getattr(&self, _: &Request, inode: INodeNo, handle: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(inode, handle) {
            Ok(attributes) => reply.attr(&NEVER, &attributes),
            Err(errno) => reply.error(errno),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        inode: INodeNo,
        mode: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        handle: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let sized = size.map_or(Ok(()), |bytes| self.resize(inode, handle, bytes));
        let set = sized.and_then(|()| {
            mode.map_or(Ok(()), |mode| Ok(fs::set_permissions(self.path(inode)?, fs::Permissions::from_mode(mode))?))
        });
        match set.and_then(|()| self.attributes(inode, handle)) {
            Ok(attributes) => reply.attr(&NEVER, &attributes),
            Err(errno) => reply.error(errno),
        }
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        answer_entry(self.child(parent, name).and_then(|path| self.make_dir(&path, mode & !umask)), reply);
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer_empty(self.child(parent, name).and_then(|path| self.remove(&path)), reply);
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer_empty(self.child(parent, name).and_then(|path| Ok(fs::remove_dir(path)?)), reply);
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        _: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let paths = self.child(parent, name).and_then(|from| Ok((from, self.child(new_parent, new_name)?)));
        answer_empty(paths.and_then(|(from, to)| self.move_file(&from, &to)), reply);
    }

    fn link(&self, _: &Request, inode: INodeNo, new_parent: INodeNo, new_name: &OsStr, reply: ReplyEntry) {
        answer_entry(self.child(new_parent, new_name).and_then(|to| self.link_file(inode, &to)), reply);
    }

    fn open(&self, _: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        match self.path(inode).and_then(|path| self.open_file(&path, flags)) {
            Ok(handle) => reply.opened(handle, FopenFlags::empty()),
            Err(errno) => reply.error(errno),
        }
    }

    fn create(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let created = self.child(parent, name).and_then(|path| self.create_file(&path, mode & !umask, flags));
        match created {
            Ok((attributes, handle)) => {
                reply.created(&NEVER, &attributes, Generation(0), handle, FopenFlags::empty());
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.read_file(handle, offset, size) {
            Ok(bytes) => reply.data(&bytes),
            Err(errno) => reply.error(errno),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.write_file(handle, offset, data) {
            Ok(()) => reply.written(data.len() as u32),
            Err(errno) => reply.error(errno),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.state.lock().unwrap().files.remove(&handle.0);
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, handle: FileHandle, _: bool, reply: ReplyEmpty) {
        answer_empty(self.sync_file(handle), reply);
    }

    fn fsyncdir(&self, _: &Request, inode: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        answer_empty(self.path(inode).and_then(|path| self.check("sync", &path)), reply);
    }

    fn readdir(&self, _: &Request, inode: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        match self.list(inode) {
            Ok(entries) => {
                for (index, (inode, kind, name)) in entries.into_iter().enumerate().skip(offset as usize) {
                    if reply.add(INodeNo(inode), index as u64 + 1, kind, name) {
                        break;
                    }
                }
                reply.ok();
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        reply.statfs(1 << 30, 1 << 29, 1 << 29, 1 << 20, 1 << 19, 4096, 255, 4096);
    }
}

/// The mounted file system.
pub struct FaultyDisk {
    dir: TempDir,
    faults: Arc<Mutex<Faults>>,
    session: Option<BackgroundSession>,
}

impl FaultyDisk {
    /// `None` if this machine does not support it.
    pub fn new() -> Option<Self> {
        let memory = Path::new("/dev/shm");
        let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
        let dir = dir.unwrap();
        for name in ["backing", "root"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let mut disk = Self { dir, faults: Arc::default(), session: None };
        disk.mount().then_some(disk)
    }

    pub fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    pub fn faults(&self) -> std::sync::MutexGuard<'_, Faults> {
        self.faults.lock().unwrap()
    }

    fn mount(&mut self) -> bool {
        let (backing, faults) = (self.dir.path().join("backing"), Arc::clone(&self.faults));
        let mut config = Config::default();
        // A sync waits for the writes of pages that it causes.
        config.n_threads = Some(2);
        let session = fuser::spawn_mount(Faulty { backing, faults, state: Mutex::default() }, self.root(), &config);
        self.session = session.ok();
        self.session.is_some()
    }

    fn unmount(&mut self) {
        let is_unmounted = unmount(&self.root());
        if let Some(session) = self.session.take().filter(|_| is_unmounted) {
            let _ = session.umount_and_join();
        }
    }

    /// Drops what the kernel has cached and could not write.
    pub fn remount(&mut self) {
        self.unmount();
        assert!(self.mount(), "it cannot be mounted again");
    }
}

impl Drop for FaultyDisk {
    fn drop(&mut self) {
        self.unmount();
    }
}
