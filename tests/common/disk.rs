//! Temporary file systems that tests fill, damage and cut off: ext4 on a loop device. Needs root, loop devices,
//! mkfs.ext4 and python3 (for one ioctl).

#![allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]

use std::fs::File;
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;

/// EXT4_IOC_SHUTDOWN with EXT4_GOING_FLAGS_NOLOGFLUSH: after it no write reaches the device.
/// It waits for a line on stdin, so that the start of the interpreter does not delay the cut.
const SHUTDOWN: &str = "import fcntl, os, struct, sys; root = os.open(sys.argv[1], os.O_RDONLY); \
    print('armed', flush=True); \
    sys.stdin.readline() and fcntl.ioctl(root, 0x8004587d, struct.pack('I', 2))";

const BLOCK: usize = 4096;

/// A file system in a file, unmounted on drop.
pub struct Disk {
    dir: TempDir,
    pool: Pool,
}

/// Where the file is stored.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pool {
    /// With the other temporary files.
    Shared,
    /// In memory.
    Memory,
    /// In memory, with less space than the file system announces.
    Short,
}

/// Runs a program without output. True if it succeeds.
pub fn run_program(program: &str, args: &[&str]) -> bool {
    Command::new(program).args(args).stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|s| s.success())
}

/// Unmounts a file system. Retries, because a killed child, or a process between fork and exec, can hold its files or
/// the loop device open for a moment.
pub fn unmount(root: &Path) -> bool {
    let root = root.to_str().unwrap();
    (0..500).any(|_| {
        run_program("umount", &[root]) || !run_program("mountpoint", &["-q", root]) || {
            std::thread::sleep(Duration::from_millis(10));
            false
        }
    })
}

impl Disk {
    /// `None` if this machine does not support it.
    pub fn new(mib: u64) -> Option<Self> {
        Self::on(Pool::Shared, mib)?.make(mib)
    }

    /// A disk in memory: its syncs take no time, but order writes as those of a real disk, and do not wait for a busy disk.
    pub fn in_memory(mib: u64) -> Option<Self> {
        Self::on(Pool::Memory, mib)?.make(mib)
    }

    /// A disk that announces `mib`, on a pool of `pool_mib`: once the pool is full, writes to the disk fail at their sync.
    pub fn thin(mib: u64, pool_mib: u64) -> Option<Self> {
        Self::on(Pool::Short, pool_mib)?.make(mib)
    }

    /// A disk in memory with this image.
    pub fn holding(image: &[u8]) -> Option<Self> {
        let disk = Self::on(Pool::Memory, (image.len() >> 20) as u64 + 1)?;
        std::fs::create_dir(disk.root()).unwrap();
        let mut file = File::create(disk.image()).unwrap();
        file.set_len(image.len() as u64).unwrap();
        for (number, block) in image.chunks(BLOCK).enumerate().filter(|(_, block)| block.iter().any(|byte| *byte != 0))
        {
            file.seek(SeekFrom::Start((number * BLOCK) as u64)).unwrap();
            file.write_all(block).unwrap();
        }
        drop(file);
        disk.mount(5).then_some(disk)
    }

    fn on(pool: Pool, pool_mib: u64) -> Option<Self> {
        let disk = Self { dir: tempfile::tempdir().unwrap(), pool };
        std::fs::create_dir(disk.pool()).unwrap();
        let size = format!("size={pool_mib}m");
        let mounted =
            pool == Pool::Shared || run_program("mount", &["-t", "tmpfs", "-o", &size, "tmpfs", disk.pool().to_str()?]);
        mounted.then_some(disk)
    }

    fn make(self, mib: u64) -> Option<Self> {
        let image = File::create(self.image()).unwrap();
        image.set_len(mib << 20).unwrap();
        std::fs::create_dir(self.root()).unwrap();
        let image = self.image();
        let made = run_program("mkfs.ext4", &["-q", "-F", "-b", "4096", image.to_str()?]);
        (made && self.mount(5) && run_program("python3", &["-c", "pass"])).then_some(self)
    }

    /// The directory of the file that holds the file system.
    pub fn pool(&self) -> PathBuf {
        self.dir.path().join("pool")
    }

    fn image(&self) -> PathBuf {
        self.pool().join("image")
    }

    /// Where the file system is mounted.
    pub fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    /// `commit_s`: the interval in which the file system commits its journal.
    pub fn mount(&self, commit_s: u32) -> bool {
        let (image, root) = (self.image(), self.root());
        let options = format!("loop,commit={commit_s}");
        run_program("mount", &["-o", &options, image.to_str().unwrap(), root.to_str().unwrap()])
            && (self.pool != Pool::Short || self.write_page_by_page())
    }

    /// Limits writes to one page each: the loop device reports a partial write to its file as complete (Linux 6.18),
    /// but a page is written completely or fails.
    fn write_page_by_page(&self) -> bool {
        let out = Command::new("losetup").args(["-n", "-O", "NAME", "-j"]).arg(self.image()).output().unwrap();
        let device = String::from_utf8(out.stdout).unwrap();
        let device = device.trim().trim_start_matches("/dev/");
        std::fs::write(format!("/sys/block/{device}/queue/max_sectors_kb"), "4").is_ok()
    }

    /// Makes it read-only, or not.
    pub fn set_read_only(&self, read_only: bool) -> bool {
        let options = if read_only { "remount,ro" } else { "remount,rw" };
        run_program("mount", &["-o", options, self.root().to_str().unwrap()])
    }

    pub fn unmount(&self) -> bool {
        unmount(&self.root())
    }

    /// Checks the unmounted file system, as it must be after an error.
    pub fn repair(&self) {
        let mut check = Command::new("e2fsck");
        let check = check.args(["-f", "-y"]).arg(self.image()).stdout(Stdio::null()).stderr(Stdio::null());
        let code = check.status().unwrap().code();
        // Exit code 1: errors were corrected.
        assert!(matches!(code, Some(0 | 1)), "the file system cannot be repaired: {code:?}");
    }

    /// Prepares a power cut. The file system cannot be unmounted before the cut.
    pub fn arm(&self) -> Cutter {
        let mut process = Command::new("python3")
            .args(["-I", "-S", "-c", SHUTDOWN, self.root().to_str().unwrap()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut armed = String::new();
        BufReader::new(process.stdout.as_mut().unwrap()).read_line(&mut armed).unwrap();
        assert_eq!(armed, "armed\n", "the power cannot be cut");
        Cutter { process }
    }

    /// Cuts the power: after this no write reaches the device.
    pub fn cut(&self) {
        self.arm().cut();
    }
}

/// A prepared power cut.
pub struct Cutter {
    process: Child,
}

impl Cutter {
    /// Cuts the power: after this no write reaches the device.
    pub fn cut(mut self) {
        self.process.stdin.take().unwrap().write_all(b"now\n").unwrap();
        assert!(self.process.wait().unwrap().success(), "the power cannot be cut");
    }
}

impl Drop for Cutter {
    fn drop(&mut self) {
        // Without a line on stdin the process ends without a cut.
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        unmount(&self.root());
        if self.pool != Pool::Shared {
            unmount(&self.pool());
        }
    }
}

/// The disk. If there is none, prints that the test is skipped.
pub fn or_skip(disk: Option<Disk>) -> Option<Disk> {
    if disk.is_none() {
        let why = "needs root, loop devices, mkfs.ext4 and python3";
        assert!(std::env::var_os("ONLYONCE_REQUIRE_POWER_LOSS").is_none(), "tests with disks are required: {why}");
        eprintln!("SKIPPED: {why}");
    }
    disk
}

/// Creates a file that leaves only this much free space in a file system.
pub fn fill(dir: &Path, leave_bytes: u64) -> PathBuf {
    let path = dir.join("filler");
    let free = free_bytes(dir);
    let length = free.saturating_sub(leave_bytes);
    assert!(
        run_program("fallocate", &["-l", &length.max(1).to_string(), path.to_str().unwrap()]),
        "the disk cannot be filled"
    );
    path
}

/// The free bytes that every user may use.
fn free_bytes(dir: &Path) -> u64 {
    let out = Command::new("df").args(["--output=avail", "-B1"]).arg(dir).output().unwrap();
    String::from_utf8(out.stdout).unwrap().lines().nth(1).unwrap().trim().parse().unwrap()
}
