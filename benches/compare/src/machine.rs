//! Figures of the operating system: written bytes, sizes, syncs, CPU time, and the machine.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// The bytes that this process passed to `write` and similar calls. The kernel's count of bytes sent to the device would exclude
/// dirty pages.
pub fn bytes_written() -> Result<u64> {
    field("/proc/self/io", "wchar:")
}

/// The bytes of pages that another process dirtied. Its `write` calls would include answers to clients.
pub fn bytes_dirtied_by(pid: u32) -> Result<u64> {
    field(&format!("/proc/{pid}/io"), "write_bytes:")
}

/// The memory of this process, in bytes.
pub fn resident_bytes() -> Result<u64> {
    Ok(field("/proc/self/status", "VmRSS:")? * 1024)
}

/// The CPU time of a process (`self`, or its id) with all of its threads, in seconds. It does not depend on other load.
pub fn cpu_s(process: &str) -> Result<f64> {
    // Linux shows these in hundredths of a second.
    const TICKS_PER_S: f64 = 100.0;
    let path = format!("/proc/{process}/stat");
    let text = fs::read_to_string(&path).with_context(|| format!("{path} cannot be read"))?;
    // The second field is a name in parentheses that may contain spaces.
    let fields = text.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks: Vec<f64> = fields.split_whitespace().skip(11).take(2).filter_map(|field| field.parse().ok()).collect();
    Ok(ticks.iter().sum::<f64>() / TICKS_PER_S)
}

/// The CPU time of this thread. `None` if the kernel does not report it.
pub fn thread_cpu() -> Option<Duration> {
    let text = fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    Some(Duration::from_nanos(text.split_whitespace().next()?.parse().ok()?))
}

fn field(path: &str, name: &str) -> Result<u64> {
    let text = fs::read_to_string(path).with_context(|| format!("{path} cannot be read"))?;
    let value = text.lines().find_map(|line| line.strip_prefix(name)).and_then(|rest| rest.split_whitespace().next());
    value.and_then(|value| value.parse().ok()).with_context(|| format!("{path} has no {name}"))
}

/// The disk space of a directory. Ignores files that are deleted meanwhile.
pub fn directory_bytes(path: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(path) else { return 0 };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => directory_bytes(&entry.path()),
            Ok(metadata) => metadata.blocks() * 512,
            Err(_) => 0,
        })
        .sum()
}

/// The disk space of the segments of onlyonce's journal in a directory. They are allocated in advance and used again, so that
/// their size does not depend on the number of keys.
pub fn journal_bytes(path: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(path) else { return 0 };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => journal_bytes(&entry.path()),
            Ok(metadata) if entry.path().extension().is_some_and(|extension| extension == "journal") => {
                metadata.blocks() * 512
            }
            _ => 0,
        })
        .sum()
}

/// How many small appends per second the disk can sync, one after the other.
pub fn fsyncs_per_s(dir: &Path, duration: Duration) -> Result<f64> {
    let path = dir.join("fsyncs");
    let mut file = File::create(&path)?;
    let start = Instant::now();
    let mut count = 0;
    while start.elapsed() < duration {
        file.write_all(&[b'x'; 64])?;
        file.sync_data()?;
        count += 1;
    }
    let rate = f64::from(count) / start.elapsed().as_secs_f64();
    fs::remove_file(path)?;
    Ok(rate)
}

/// Makes the kernel write back all dirty pages.
pub fn write_back() -> Result<()> {
    let status = Command::new("sync").status().context("`sync` cannot be run")?;
    ensure!(status.success(), "`sync` fails: {status}");
    Ok(())
}

/// The processor, the number of cores, and the memory.
pub fn description() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map_or("an unnamed processor", |rest| rest.trim_start_matches([' ', '\t', ':']));
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let memory = field("/proc/meminfo", "MemTotal:").unwrap_or(0) as f64 / 1024.0 / 1024.0;
    let system = output("uname", &["-sr"]).unwrap_or_else(|| "an unknown system".to_owned());
    format!("{model}, {cores} cores, {memory:.0} GiB, {system}")
}

/// The load average of the last minute.
pub fn load() -> Result<f64> {
    let text = fs::read_to_string("/proc/loadavg").context("/proc/loadavg cannot be read")?;
    text.split_whitespace().next().and_then(|load| load.parse().ok()).context("/proc/loadavg has no load")
}

/// The commit of the current sources.
pub fn commit() -> String {
    let Some(commit) = git(&["rev-parse", "--short=12", "HEAD"]) else { return "unknown".to_owned() };
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|text| !text.is_empty());
    if changed { format!("{commit}, with changes") } else { commit }
}

fn git(arguments: &[&str]) -> Option<String> {
    output("git", &[&["-C", env!("CARGO_MANIFEST_DIR")], arguments].concat())
}

fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Whether a program is installed.
pub fn has(program: &str) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&paths).any(|path| path.join(program).is_file())
}
