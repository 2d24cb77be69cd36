//! Tests that need a process of their own: its memory is measured, or it runs with another mask for new files.

#![allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]

use std::process::{Command, Stdio};

/// Names the test that a child has been made for.
const CHILD: &str = "ONLYONCE_TEST_ALONE";

/// A command that runs this very test again, alone.
pub fn command(test: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(CHILD, test);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    command
}

/// Whether this is the process that [`command`] made for the test.
pub fn is_child(test: &str) -> bool {
    std::env::var(CHILD).is_ok_and(|name| name == test)
}

/// By how many bytes `work` makes the memory of a process grow at most. The process is one of its own: what other tests
/// take meanwhile does not count.
pub fn memory_growth(test: &str, work: impl FnOnce()) -> u64 {
    const SAYS: &str = "memory grew by ";
    if is_child(test) {
        let before = status("VmRSS:");
        work();
        println!("\n{SAYS}{}", status("VmHWM:").saturating_sub(before));
        // The caller judges the figure, and only there.
        std::process::exit(0);
    }
    let output = command(test).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let growth = said.lines().find_map(|line| line.strip_prefix(SAYS)).map(|bytes| bytes.parse().unwrap());
    let growth = growth.unwrap_or_else(|| panic!("{}: {said}", output.status));
    eprintln!("{test}: {} MiB", growth >> 20);
    growth
}

/// A figure of this process, in bytes.
fn status(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).expect(name);
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}
