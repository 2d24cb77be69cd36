//! Tests that run in a process of their own, because its memory is measured or it has a different umask.

#![allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]

use std::process::{Command, Stdio};

/// The environment variable with the name of the child's test.
const CHILD: &str = "ONLYONCE_TEST_ALONE";

/// A command that runs this test alone in a new process.
pub fn command(test: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(CHILD, test);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    command
}

/// True in the process that [`command`] started for this test.
pub fn is_child(test: &str) -> bool {
    std::env::var(CHILD).is_ok_and(|name| name == test)
}

/// The peak growth of memory during `work`, in bytes. It runs in a new process, so that other tests do not count.
pub fn memory_growth(test: &str, work: impl FnOnce()) -> u64 {
    const PREFIX: &str = "memory grew by ";
    if is_child(test) {
        let before = status("VmRSS:");
        work();
        println!("\n{PREFIX}{}", status("VmHWM:").saturating_sub(before));
        // Only the parent compares the growth with a limit.
        std::process::exit(0);
    }
    let output = command(test).output().unwrap();
    let output_text = String::from_utf8(output.stdout).unwrap();
    let growth = output_text.lines().find_map(|line| line.strip_prefix(PREFIX)).map(|bytes| bytes.parse().unwrap());
    let growth = growth.unwrap_or_else(|| panic!("{}: {output_text}", output.status));
    eprintln!("{test}: {} MiB", growth >> 20);
    growth
}

/// A value of this process's `/proc/self/status`, in bytes.
fn status(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).expect(name);
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}
