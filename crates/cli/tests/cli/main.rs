//! The command end to end: output, recorded keys, messages, interrupts and kills.

mod endings;
mod hostile_bytes;
mod keys;
mod lookup;
mod messages;
mod missing_keys;
mod output;

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use onlyonce::{Claim, Key, KeyStatus, Store};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use tempfile::TempDir;

const FLIGHT: [&str; 8] = ["--key", ".time_hour", "--key", ".carrier", "--key", ".flight", "--key", ".origin"];

/// The time after which a test stops waiting and fails.
const PATIENCE: Duration = Duration::from_secs(30);

/// A directory in which the command creates its store.
struct Cli {
    dir: TempDir,
}

impl Cli {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    fn file(&self, name: &str, bytes: impl AsRef<[u8]>) -> String {
        let path = self.dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn command(&self, verb: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_onlyonce"));
        command.arg(verb).arg("--store").arg(self.store());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn run(&self, verb: &str, args: &[&str], input: impl AsRef<[u8]>) -> Finished {
        let mut child = self.command(verb).args(args).spawn().unwrap();
        let (mut stdin, input) = (child.stdin.take().unwrap(), input.as_ref().to_vec());
        // On its own thread, because the output must be read meanwhile. The child may exit before it has read everything.
        let feeder = std::thread::spawn(move || drop(stdin.write_all(&input)));
        let output = child.wait_with_output().unwrap();
        feeder.join().unwrap();
        Finished::from(output)
    }

    fn filter(&self, args: &[&str], input: impl AsRef<[u8]>) -> Finished {
        self.run("filter", args, input)
    }

    /// The output of a filter that must succeed.
    fn passed(&self, args: &[&str], input: impl AsRef<[u8]>) -> String {
        let finished = self.filter(args, input);
        assert_eq!(finished.code, Some(0), "{}", finished.err);
        finished.out
    }

    fn get(&self, args: &[&str]) -> Value {
        let finished = self.run("get", args, "");
        assert_eq!(finished.code, Some(0), "{}", finished.err);
        serde_json::from_str(&finished.out).unwrap()
    }

    fn stats(&self) -> Value {
        let finished = self.run("stats", &["--json"], "");
        assert_eq!(finished.code, Some(0), "{}", finished.err);
        serde_json::from_str(&finished.out).unwrap()
    }
}

struct Finished {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Finished {
    /// Asserts exit code 2 and a message that contains all of these parts.
    fn is_error(&self, parts: &[&str]) {
        assert_eq!(self.code, Some(2), "{}", self.err);
        for part in parts {
            assert!(self.err.contains(part), "`{part}` is not in: {}", self.err);
        }
    }

    fn summary(&self) -> &str {
        self.err.lines().find(|line| line.starts_with("lines=")).unwrap_or_else(|| panic!("no summary: {}", self.err))
    }
}

impl From<Output> for Finished {
    fn from(output: Output) -> Self {
        let out = String::from_utf8(output.stdout).unwrap();
        Self { code: output.status.code(), out, err: String::from_utf8(output.stderr).unwrap() }
    }
}

/// A child that is killed when its test ends.
struct Running(Child);

impl Running {
    fn interrupt(&self) {
        let sent = Command::new("kill").args(["-INT", &self.0.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    /// The lines of the output as they arrive, so that a test can wait for one with a time limit.
    fn lines(&mut self) -> Receiver<String> {
        let (sender, lines) = mpsc::channel();
        let output = BufReader::new(self.0.stdout.take().unwrap());
        std::thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        lines
    }

    fn ended(mut self) -> Finished {
        let begun = Instant::now();
        let status = loop {
            match self.0.try_wait().unwrap() {
                Some(status) => break status,
                None if begun.elapsed() > PATIENCE => panic!("the child does not exit"),
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        let (mut out, mut err) = (String::new(), String::new());
        if let Some(mut pipe) = self.0.stdout.take() {
            pipe.read_to_string(&mut out).unwrap();
        }
        self.0.stderr.take().unwrap().read_to_string(&mut err).unwrap();
        Finished { code: status.code(), out, err }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // In a test that passes, the child has exited already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn sample() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/data/flights.ndjson")
}

/// The first occurrence of each line.
fn first_occurrences(lines: &str) -> String {
    let mut seen = HashSet::new();
    lines.split_inclusive('\n').filter(|line| seen.insert(*line)).collect()
}
