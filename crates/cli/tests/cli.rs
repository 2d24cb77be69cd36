//! The command end to end: output, recorded keys, messages, interrupts and kills.

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

    fn run(&self, verb: &str, args: &[&str], input: impl AsRef<[u8]>) -> Ran {
        let mut child = self.command(verb).args(args).spawn().unwrap();
        let (mut stdin, input) = (child.stdin.take().unwrap(), input.as_ref().to_vec());
        // On its own thread, because the output must be read meanwhile. The child may exit before it has read everything.
        let feeder = std::thread::spawn(move || drop(stdin.write_all(&input)));
        let output = child.wait_with_output().unwrap();
        feeder.join().unwrap();
        Ran::from(output)
    }

    fn filter(&self, args: &[&str], input: impl AsRef<[u8]>) -> Ran {
        self.run("filter", args, input)
    }

    /// The output of a filter that must succeed.
    fn passed(&self, args: &[&str], input: impl AsRef<[u8]>) -> String {
        let ran = self.filter(args, input);
        assert_eq!(ran.code, Some(0), "{}", ran.err);
        ran.out
    }

    fn get(&self, args: &[&str]) -> Value {
        let ran = self.run("get", args, "");
        assert_eq!(ran.code, Some(0), "{}", ran.err);
        serde_json::from_str(&ran.out).unwrap()
    }

    fn stats(&self) -> Value {
        let ran = self.run("stats", &["--json"], "");
        assert_eq!(ran.code, Some(0), "{}", ran.err);
        serde_json::from_str(&ran.out).unwrap()
    }
}

struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Ran {
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

impl From<Output> for Ran {
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

    fn ended(mut self) -> Ran {
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
        Ran { code: status.code(), out, err }
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

// ---------------------------------------------------------------------------------------------------------------
// Output
// ---------------------------------------------------------------------------------------------------------------

#[test]
fn the_sample_passes_as_its_distinct_lines_in_order_and_only_once() {
    let cli = Cli::new();
    let sample = sample();
    let lines = fs::read_to_string(&sample).unwrap();
    let args = [&FLIGHT[..], &[sample.to_str().unwrap()]].concat();

    let first = cli.filter(&args, "");
    assert_eq!(first.code, Some(0), "{}", first.err);
    assert_eq!(first.out, first_occurrences(&lines));
    assert_eq!((lines.lines().count(), first.out.lines().count()), (5_200, 4_892), "as in the README of the sample");
    assert!(
        first.summary().starts_with("lines=5200 passed=4892 duplicates=308 missing=0 blank=0 seconds="),
        "{}",
        first.err
    );

    let second = cli.filter(&args, "");
    assert_eq!((second.code, second.out.as_str()), (Some(0), ""));
    assert!(second.summary().starts_with("lines=5200 passed=0 duplicates=5200 missing=0 "), "{}", second.err);
}

#[test]
fn without_a_key_option_the_whole_line_is_the_key() {
    let cli = Cli::new();
    assert_eq!(cli.passed(&[], "b\na\n\nb\na \n\na\n"), "b\na\n\na \n");
    assert_eq!(cli.passed(&["--content"], "\nc\na\na "), "c\n");
    assert_eq!(cli.passed(&[], "{\"a\":1}\n{\"a\": 1}\n"), "{\"a\":1}\n{\"a\": 1}\n");
}

#[test]
fn bytes_that_are_not_utf_8_pass_unchanged() {
    let cli = Cli::new();
    let mut child = cli.command("filter").spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"\xff\x00\n\xfe\n\xff\x00\n").unwrap();
    assert_eq!(child.wait_with_output().unwrap().stdout, b"\xff\x00\n\xfe\n");
}

#[test]
fn a_last_line_without_a_newline_gets_none() {
    let cli = Cli::new();
    assert_eq!(cli.passed(&[], "a\nb"), "a\nb");
    assert_eq!(cli.passed(&[], "c\nb\na"), "c\n", "the key of a line does not include its newline");
}

#[test]
fn carriage_returns_are_part_of_the_line() {
    let cli = Cli::new();
    assert_eq!(cli.passed(&[], "a\r\nb\r\na\r\n"), "a\r\nb\r\n");
    assert_eq!(cli.passed(&["--key", ".k"], "{\"k\":1}\r\n{\"k\":1}\n"), "{\"k\":1}\r\n", "JSON ignores them");
}

const MARK: &str = "\u{feff}";

#[test]
fn a_byte_order_mark_at_the_start_of_an_input_is_removed() {
    let cli = Cli::new();
    let (one, two) =
        (cli.file("one", format!("{MARK}{{\"k\":1}}\n")), cli.file("two", format!("{MARK}{{\"k\":2}}\r\n")));
    let stdin = format!("{MARK}{{\"k\":3}}\n{{\"k\":1}}");
    for on_missing_key in ["fail", "drop", "pass"] {
        let cli = Cli::new();
        let args = ["--key", ".k", "--on-missing-key", on_missing_key, &one, &two, "-"];
        let ran = cli.filter(&args, &stdin);
        assert_eq!((ran.code, ran.out.as_str()), (Some(0), "{\"k\":1}\n{\"k\":2}\r\n{\"k\":3}\n"), "{}", ran.err);
        assert!(ran.summary().starts_with("lines=4 passed=3 duplicates=1 missing=0 blank=0 "), "{}", ran.err);
    }
    // As `cat` joins files.
    let joined = format!("{MARK}{{\"k\":1}}\n{MARK}{{\"k\":2}}\n{{\"k\":2}}\n");
    assert_eq!(Cli::new().passed(&["--key", ".k"], joined), "{\"k\":1}\n{\"k\":2}\n");
}

#[test]
fn a_byte_order_mark_is_not_part_of_a_line_that_is_its_own_key() {
    let cli = Cli::new();
    assert_eq!(cli.passed(&["--max-line", "2"], format!("{MARK}ab\nb\nab\n")), "ab\nb\n");
    // After the first line of an input it is part of the line.
    assert_eq!(cli.passed(&[], format!("{MARK}ab\n{MARK}ab\n")), format!("{MARK}ab\n"));
    assert_eq!(Cli::new().passed(&[], MARK), "", "a mark alone is not a line");
    Cli::new().filter(&["--max-line", "2"], format!("{MARK}abc")).is_error(&["<stdin>:1: ", "longer than 2 bytes"]);
}

#[test]
fn utf_16_input_is_an_error_that_names_the_encoding() {
    let mark_and_text = |big: bool| -> Vec<u8> {
        let units = "\u{feff}{\"k\":1}\n".encode_utf16();
        units.flat_map(|unit| if big { unit.to_be_bytes() } else { unit.to_le_bytes() }).collect()
    };
    for input in [mark_and_text(true), mark_and_text(false), b"\0\0\xfe\xff\0\0\0a".to_vec()] {
        for args in [&["--key", ".k"][..], &["--key", ".k", "--on-missing-key", "drop"], &[]] {
            let cli = Cli::new();
            let ran = cli.filter(args, &input);
            ran.is_error(&["onlyonce: <stdin>:1: ", "UTF-16", "convert it to UTF-8"]);
            assert_eq!(ran.out, "");
        }
    }
}

#[test]
fn blank_lines_of_json_input_are_dropped_and_counted() {
    for on_missing_key in ["fail", "drop", "pass"] {
        let cli = Cli::new();
        let input = format!("{MARK}\n\n{{\"k\":1}}\r\n\r\n \t \n{{\"k\":1}}\n{{\"k\":2}}\n  ");
        let ran = cli.filter(&["--key", ".k", "--on-missing-key", on_missing_key], input);
        assert_eq!((ran.code, ran.out.as_str()), (Some(0), "{\"k\":1}\r\n{\"k\":2}\n"), "{}", ran.err);
        assert!(ran.summary().starts_with("lines=8 passed=2 duplicates=1 missing=0 blank=5 "), "{}", ran.err);
    }
    // They count for line numbers. Without --key they are lines.
    Cli::new().filter(&["--key", ".k"], "\n\nno json\n").is_error(&["<stdin>:3: "]);
    assert_eq!(Cli::new().passed(&[], "\n\na\n \n"), "\na\n \n");
}

#[test]
fn several_files_are_one_stream_of_whole_lines() {
    let cli = Cli::new();
    let (one, two) = (cli.file("one", "a\nb"), cli.file("two", "c\na\nd"));
    assert_eq!(cli.passed(&[&one, "-", &two], "e\nb\n"), "a\nb\ne\nc\nd");
}

#[test]
fn an_empty_input_is_not_an_error() {
    let cli = Cli::new();
    let ran = cli.filter(&FLIGHT, "");
    assert_eq!((ran.code, ran.out.as_str()), (Some(0), ""));
    assert!(ran.summary().starts_with("lines=0 passed=0 duplicates=0 missing=0 "), "{}", ran.err);
}

#[test]
fn the_batch_size_does_not_change_the_output() {
    let lines = fs::read_to_string(sample()).unwrap();
    for batch in ["1", "7", "100000"] {
        let args = [&FLIGHT[..], &["--durability", "process", "--batch", batch]].concat();
        assert_eq!(Cli::new().passed(&args, &lines), first_occurrences(&lines), "--batch {batch}");
    }
}

#[test]
fn a_line_is_written_before_the_next_one_arrives() {
    let cli = Cli::new();
    let mut running = Running(cli.command("filter").spawn().unwrap());
    let mut input = running.0.stdin.take().unwrap();
    let output = running.lines();
    for line in ["a", "b", "c"] {
        writeln!(input, "{line}").unwrap();
        assert_eq!(output.recv_timeout(PATIENCE).unwrap(), line);
    }
    drop(input);
    assert_eq!(running.ended().code, Some(0));
}

// ---------------------------------------------------------------------------------------------------------------
// Keys
// ---------------------------------------------------------------------------------------------------------------

#[test]
fn equal_keys_in_different_scopes_are_different_keys() {
    let cli = Cli::new();
    assert_eq!(cli.passed(&["--scope", "one"], "a\n"), "a\n");
    assert_eq!(cli.passed(&["--scope", "two"], "a\n"), "a\n");
    assert_eq!(cli.passed(&[], "a\n"), "a\n");
    assert_eq!(cli.passed(&["--scope", "two"], "a\n"), "");
}

#[test]
fn the_parts_of_a_composite_key_are_kept_apart() {
    let cli = Cli::new();
    let lines = "{\"a\":\"ab\",\"b\":\"c\"}\n{\"a\":\"a\",\"b\":\"bc\"}\n{\"b\":\"\",\"a\":\"abc\"}\n";
    assert_eq!(cli.passed(&["--key", ".a", "--key", ".b"], lines.repeat(2)), lines);
}

#[test]
fn a_key_is_selected_by_its_path_in_any_line() {
    let cli = Cli::new();
    let lines = [
        r#"{"id":"other","user":{"id":7,"name":"}{"},"tags":["x",{"n":1}]}"#,
        r#" { "tags" : [ "y" , { "n" : 1 } ] , "user" : { "name" : "\"" , "id" : 7 } } "#,
        r#"{"user":{"id":7},"tags":[0,{"n":2}]}"#,
        r#"{"\u0075ser":{"id":"7"},"tags":[0,{"n":1}]}"#,
    ];
    let passed = cli.passed(&["--key", ".user.id", "--key", ".tags.1.n"], lines.join("\n"));
    assert_eq!(passed, [lines[0], lines[2]].join("\n") + "\n");
    for path in [".\"a.b\"", ".[\"a.b\"]"] {
        let cli = Cli::new();
        assert_eq!(cli.passed(&["--key", path], "{\"a.b\":1}\n{\"a\":{\"b\":2},\"a.b\":1}\n"), "{\"a.b\":1}\n");
    }
    for path in [".items[1].id", ".items.1.id", ".[\"items\"][1][\"id\"]"] {
        let lines = "{\"items\":[{\"id\":1},{\"id\":2}]}\n{\"items\":[{\"id\":3},{\"id\":2}]}\n";
        assert_eq!(Cli::new().passed(&["--key", path], lines), "{\"items\":[{\"id\":1},{\"id\":2}]}\n", "{path}");
    }
}

#[test]
fn numbers_that_differ_in_one_digit_are_two_keys() {
    let cli = Cli::new();
    let lines = "{\"n\":18446744073709551617}\n{\"n\":18446744073709551618}\n{\"n\":0.12345678901234567891}\n\
                 {\"n\":0.12345678901234567892}\n{\"n\":1}\n{\"n\":1.0}\n";
    assert_eq!(cli.passed(&["--key", ".n"], lines), lines);
    assert_eq!(
        cli.passed(&["--key", ".n"], "{\"n\":\"1\"}\n"),
        "",
        "a string and a number with the same characters are one key"
    );
}

// ---------------------------------------------------------------------------------------------------------------
// Lines without a key
// ---------------------------------------------------------------------------------------------------------------

#[test]
fn a_line_without_a_key_ends_the_run_with_its_number_after_all_earlier_lines_are_recorded() {
    let reasons = [
        ("no json", "not JSON"),
        ("{\"k\":1", "not JSON"),
        ("{\"k\":1} 2", "not JSON"),
        ("\u{a0}", "not JSON"),
        ("{\"l\":1}", "the line has no .k"),
        ("[{\"k\":1}]", "the line has no .k"),
        ("{\"k\":null}", ": .k is null"),
        ("{\"k\":{}}", ": .k is an object"),
        ("{\"k\":[1]}", ": .k is an array"),
        ("{\"k\":\"\\ud800\"}", "broken escape"),
        ("{\"k\":\"\"}", "the key is empty"),
        (&format!("{{\"k\":\"{}\"}}", "k".repeat(65_535)), "65536 bytes"),
    ];
    for (line, why) in reasons {
        let cli = Cli::new();
        let input = format!("{{\"k\":1}}\n{{\"k\":2}}\n{line}\n{{\"k\":3}}\n");
        let ran = cli.filter(&["--key", ".k", "--scope", "s"], &input);
        ran.is_error(&["onlyonce: <stdin>:3: ", why, "--on-missing-key"]);
        assert_eq!(ran.out, "{\"k\":1}\n{\"k\":2}\n", "{line}");
        assert!(ran.summary().starts_with("lines=2 passed=2 "), "{}", ran.err);
        let again = cli.passed(&["--key", ".k", "--scope", "s"], "{\"k\":1}\n{\"k\":2}\n{\"k\":3}\n");
        assert_eq!(again, "{\"k\":3}\n");
    }
}

#[test]
fn line_numbers_start_at_one_in_each_file() {
    let cli = Cli::new();
    let (one, two) = (cli.file("one", "{\"k\":1}\n{\"k\":2}\n"), cli.file("two", "{\"k\":3}\n{}\n"));
    let ran = cli.filter(&["--key", ".k", &one, &two], "");
    ran.is_error(&[&format!("onlyonce: {two}:2: the line has no .k")]);
    assert_eq!(ran.out.lines().count(), 3);
}

#[test]
fn lines_without_a_key_pass_every_time_or_are_dropped() {
    let cli = Cli::new();
    let input = "{\"k\":1}\nno json\n{\"k\":1}\n{}\nno json\n{\"k\":2}";
    let keyed = ["--key", ".k", "--on-missing-key"];

    let dropped = cli.filter(&[&keyed[..], &["drop"]].concat(), input);
    assert_eq!((dropped.code, dropped.out.as_str()), (Some(0), "{\"k\":1}\n{\"k\":2}"));
    assert!(dropped.summary().starts_with("lines=6 passed=2 duplicates=1 missing=3 "), "{}", dropped.err);

    let passed = cli.filter(&[&keyed[..], &["pass"]].concat(), input);
    assert_eq!((passed.code, passed.out.as_str()), (Some(0), "no json\n{}\nno json\n"));
    assert!(passed.summary().starts_with("lines=6 passed=3 duplicates=3 missing=3 "), "{}", passed.err);
}

#[test]
fn a_line_that_is_not_utf_8_is_not_json() {
    let cli = Cli::new();
    cli.filter(&["--key", ".k"], b"{\"k\":\"\xff\"}\n").is_error(&["<stdin>:1: ", "not JSON", "UTF-8"]);
}

#[test]
fn a_line_over_the_limit_ends_the_run_with_its_number_after_all_earlier_lines_are_recorded() {
    for (long, whole) in
        [("123456789\n", "12345678\n"), ("123456789", "12345678"), ("1234567890123456789\n", "12345678\n")]
    {
        let cli = Cli::new();
        let ran = cli.filter(&["--max-line", "8"], format!("a\n{long}b\n"));
        ran.is_error(&["onlyonce: <stdin>:2: ", "longer than 8 bytes", "--max-line"]);
        assert_eq!(ran.out, "a\n");
        assert_eq!(cli.passed(&["--max-line", "8"], format!("a\n{whole}")), whole);
    }
}

#[test]
fn a_line_larger_than_every_buffer_passes() {
    let cli = Cli::new();
    let lines = format!("{}\nb\n{}\n", "a".repeat(3 << 20), "a".repeat((3 << 20) + 1));
    assert_eq!(cli.passed(&[], lines.repeat(2)), lines);
}

// ---------------------------------------------------------------------------------------------------------------
// Messages
// ---------------------------------------------------------------------------------------------------------------

#[test]
fn the_summary_is_one_line_of_names_and_numbers() {
    let ran = Cli::new().filter(&[], "a\nb\na\n");
    let line = ran.err.strip_suffix('\n').unwrap();
    let (counts, seconds) = line.split_once(" seconds=").unwrap();
    assert_eq!(counts, "lines=3 passed=2 duplicates=1 missing=0 blank=0");
    assert!((0.0..30.0).contains(&seconds.parse::<f64>().unwrap()), "{line}");
}

#[test]
fn the_summary_is_a_json_object_with_the_option_json() {
    let ran = Cli::new().filter(&["--json", "--key", ".k", "--on-missing-key", "drop"], "{\"k\":1}\n{\"k\":1}\n{}\n");
    let mut summary: Value = serde_json::from_str(&ran.err).unwrap();
    let seconds = summary.as_object_mut().unwrap().remove("seconds").unwrap();
    assert!(seconds.as_f64().unwrap() > 0.0);
    assert_eq!(summary, json!({ "lines": 3, "passed": 1, "duplicates": 1, "missing": 1, "blank": 0 }));
}

#[test]
fn verbose_logs_what_the_store_does_and_changes_nothing_else() {
    let cli = Cli::new();
    let ran = cli.filter(&["-v"], "a\n");
    assert_eq!((ran.code, ran.out.as_str()), (Some(0), "a\n"));
    assert!(ran.err.contains("store opened"), "{}", ran.err);
    assert!(!cli.filter(&[], "a\n").err.contains("store opened"));
}

#[test]
fn bad_usage_is_an_error_that_names_the_option_and_creates_no_store() {
    let cli = Cli::new();
    let scope = "s".repeat(256);
    for (args, says) in [
        (&["--key", "id"][..], "a field begins with a dot"),
        (&["--key", ".a..b"], "the name of the field is missing"),
        (&["--key", ".a[x].b"], "at [x].b, byte 2: brackets contain an array index"),
        (&["--key", ".\"a"], "not a quoted name"),
        (&["--key", ".a", "--content"], "cannot be used with"),
        (&["--batch", "0"], "0 is not in 1..="),
        (&["--window", "soon"], "--window"),
        (&["--window", "0s"], "onlyonce: --window is 0ns, but it must be from 1ms"),
        (&["--window", "100y"], "onlyonce: --window is "),
        (&["--bucket", "25h"], "onlyonce: --bucket is "),
        (&["--window", "30d", "--bucket", "1h"], "onlyonce: --bucket is "),
        (&["--durability", "none"], "disk, process"),
        (&["--on-missing-key", "skip"], "fail, pass, drop"),
        (&["--scope", &scope], "the scope has 256 bytes; the limit is 255"),
        (&["--colour"], "--colour"),
        (&["no/such/file"], "no/such/file"),
        (&["/"], "it is a directory"),
    ] {
        let ran = cli.filter(args, "a\n");
        ran.is_error(&[says]);
        assert_eq!(ran.out, "", "{args:?}");
        assert!(!cli.store().join("db").exists(), "{args:?}");
    }
}

#[test]
fn a_foreign_directory_and_a_store_in_use_are_errors() {
    let cli = Cli::new();
    fs::create_dir(cli.store()).unwrap();
    fs::write(cli.store().join("diary"), "").unwrap();
    cli.filter(&[], "a\n").is_error(&["onlyonce: ", "is not an onlyonce store", "diary"]);
    fs::remove_file(cli.store().join("diary")).unwrap();

    let store = Store::open(cli.store()).unwrap();
    for verb in ["filter", "stats"] {
        cli.run(verb, &[], "").is_error(&["onlyonce: ", "is open in another process"]);
    }
    store.close().wait().unwrap();
    assert_eq!(cli.passed(&[], "a\n"), "a\n");
}

// ---------------------------------------------------------------------------------------------------------------
// get and stats
// ---------------------------------------------------------------------------------------------------------------

#[test]
fn get_finds_a_key_by_the_values_that_filter_made_it_of() {
    let cli = Cli::new();
    let sample = sample();
    cli.passed(&[&FLIGHT[..], &[sample.to_str().unwrap()]].concat(), "");
    let flight = cli.get(&["2013-01-01T10:00:00Z", "UA", "1545", "EWR"]);
    assert_eq!(flight["state"], "completed");
    assert_eq!(flight["result_form"], "none");
    assert_eq!(flight["result"], Value::Null);
    assert!(flight["completed_at_ms"].as_u64().unwrap() > 1_700_000_000_000);
    assert!(flight["completed_at"].as_str().unwrap().ends_with('Z'));
    let day_ms = 24 * 60 * 60 * 1_000;
    assert_eq!(flight["remembered_until_ms"], flight["completed_at_ms"].as_u64().unwrap() + day_ms);
    assert!(flight["token"].as_u64().unwrap() > 0);

    cli.passed(&["--key", ".k", "--scope", "s"], "{\"k\":\"A\\u00e9\"}\n{\"k\":-1.50}\n");
    assert_eq!(cli.get(&["--scope", "s", "Aé"])["state"], "completed");
    assert_eq!(cli.get(&["--scope", "s", "--", "-1.50"])["state"], "completed");

    cli.passed(&["--content"], "a whole line\n");
    assert_eq!(cli.get(&["--content", "a whole line"])["state"], "completed");

    // The arguments, and the options that the message suggests.
    let absents = [
        (&["Aé"][..], &["--content", "--scope"][..]),
        (&["--scope", "s", "--", "-1.5"], &["--content"]),
        (&["a whole line"], &["--content", "--scope"]),
        (&["--content", "a whole line\n"], &["--scope"]),
        (&["--content", "--scope", "s", "a"], &[]),
        (&["--json", "{\"key\":\"a\",\"scope\":\"s\"}"], &[]),
        (&["UA", "1545"], &["--content", "--scope"]),
    ];
    for (absent, suggested) in absents {
        let ran = cli.run("get", absent, "");
        assert_eq!((ran.code, ran.out.as_str()), (Some(1), ""), "{absent:?}");
        assert!(ran.err.starts_with("onlyonce: no entry for "), "{}", ran.err);
        for option in ["--content", "--scope"] {
            assert_eq!(ran.err.contains(option), suggested.contains(&option), "{absent:?}: {}", ran.err);
        }
    }
}

#[test]
fn get_prints_the_entries_of_other_programs() {
    let cli = Cli::new();
    let store = Store::builder().result_limit(8).open(cli.store()).unwrap();
    let lease = |key: &str| match store.claim(key).wait().unwrap() {
        Claim::Acquired(lease) => lease,
        other => panic!("{other:?}"),
    };
    lease("text").complete("charged").wait().unwrap();
    lease("bytes").complete(vec![0xff, 0x00]).wait().unwrap();
    lease("long").complete("123456789").wait().unwrap();
    let long_key = "k".repeat(1_000);
    store.record(Key::from(&long_key)).wait().unwrap();
    let crashed = lease("crashed");
    lease("released").release().after(Duration::from_secs(600)).wait().unwrap();
    store.close().wait().unwrap();
    drop(crashed);

    let result = |key| {
        let stored = cli.get(&[key]);
        (stored["result_form"].clone(), stored["result"].clone())
    };
    assert_eq!(result("text"), (json!("text"), json!("charged")));
    assert_eq!(result("bytes"), (json!("hex"), json!("ff00")));
    assert_eq!(result("long"), (json!("too_large"), Value::Null));
    assert_eq!(result(&long_key), (json!("none"), Value::Null));

    let crashed = cli.get(&["crashed"]);
    assert_eq!((&crashed["key"], &crashed["scope"]), (&json!("crashed"), &Value::Null));
    assert_eq!((&crashed["state"], &crashed["attempt"]), (&json!("processing"), &json!(1)));
    assert_eq!((&crashed["lease"], &crashed["prior"]), (&json!("free"), &json!("crashed")));
    let released = cli.get(&["released"]);
    assert_eq!((&released["lease"], &released["prior"]), (&json!("backoff"), &json!("released")));
    assert!((1..=600_000).contains(&released["remaining_ms"].as_u64().unwrap()), "{released}");

    // A key that another program completed is a duplicate.
    assert_eq!(cli.passed(&["--key", ".k"], "{\"k\":\"text\"}\n{\"k\":\"new\"}\n"), "{\"k\":\"new\"}\n");
}

#[test]
fn get_accepts_the_keys_that_it_prints() {
    let cli = Cli::new();
    let store = Store::open(cli.store()).unwrap();
    let parts: [&[u8]; 4] = [b"1", b"x\"),(\"", b"", b"\xff\0"];
    let content = Key::content("a whole line");
    let hash: String = content.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    let keys = [
        (Key::from("k"), json!("k")),
        (Key::from("(\"1\", \"x\") in \"t1\""), json!("(\"1\", \"x\") in \"t1\"")),
        (Key::from("[\"1\"]"), json!("[\"1\"]")),
        (Key::from("\u{1b}[2J\n\0"), json!("\u{1b}[2J\n\0")),
        (Key::from(b"\xff\0"), json!({ "hex": "ff00" })),
        (Key::composite(["1", "x"]), json!(["1", "x"])),
        (Key::composite(["1"]), json!(["1"])),
        (Key::composite(parts), json!(["1", "x\"),(\"", "", { "hex": "ff00" }])),
        (content, json!({ "content": hash })),
    ];
    let scopes: [(&[u8], Value); 3] = [(b"", Value::Null), (b"t1", json!("t1")), (b"\xff", json!({ "hex": "ff" }))];
    for (key, _) in &keys {
        for (scope, _) in &scopes {
            store.record(key.clone().scope(*scope)).wait().unwrap();
        }
    }
    store.close().wait().unwrap();
    let mut tokens = HashSet::new();
    for (key, json) in &keys {
        for (scope, scope_json) in &scopes {
            let named = json!({ "key": json, "scope": scope_json });
            let printed = cli.get(&["--json", &named.to_string()]);
            assert_eq!((&printed["key"], &printed["scope"]), (json, scope_json), "{key}");
            assert!(tokens.insert(printed["token"].as_u64().unwrap()), "each entry has a token of its own");
            assert_eq!(cli.get(&["--json", &printed.to_string()]), printed);
            if let Ok(scope) = str::from_utf8(scope) {
                assert_eq!(cli.get(&["--json", "--scope", scope, &json.to_string()]), printed);
            }
        }
    }
    assert_eq!(cli.get(&["--scope", "t1", "1", "x"])["key"], json!(["1", "x"]));
    assert_eq!(cli.get(&["--content", "a whole line"])["key"], json!({ "content": hash }));
    assert_eq!(cli.run("get", &["--json", "[\"1x\"]"], "").code, Some(1));
}

#[test]
fn errors_of_the_library_name_no_option_or_method_of_the_library() {
    let cli = Cli::new();
    Store::builder().stream_time(Duration::from_secs(1)).open(cli.store()).unwrap().close().wait().unwrap();
    let stream_time = cli.filter(&[], "a\n");
    stream_time.is_error(&["onlyonce: the store runs on stream time, but lines have no timestamp"]);
    assert_eq!(stream_time.out, "");

    let long = "k".repeat(65_536);
    let too_long = cli.run("get", &[&long], "");
    too_long.is_error(&["onlyonce: the key and the scope have 65536 bytes; the limit is 65535"]);
    assert!(!too_long.err.contains("key_limit"), "{}", too_long.err);
}

#[test]
fn get_and_stats_create_no_store() {
    let cli = Cli::new();
    for (verb, args) in [("get", &["k"][..]), ("stats", &[]), ("stats", &["--json"])] {
        cli.run(verb, args, "").is_error(&["onlyonce: ", cli.store().to_str().unwrap(), "contains no store"]);
        assert!(!cli.store().exists());
    }
    fs::create_dir(cli.store()).unwrap();
    cli.run("stats", &[], "").is_error(&["contains no store"]);
    assert_eq!(fs::read_dir(cli.store()).unwrap().count(), 0);
}

#[test]
fn bad_usage_of_get_is_an_error() {
    let cli = Cli::new();
    cli.passed(&[], "a\n");
    cli.run("get", &[], "").is_error(&["KEY"]);
    cli.run("get", &["--content", "a", "b"], "").is_error(&["one KEY"]);
    cli.run("get", &[""], "").is_error(&["the key is empty"]);
    cli.run("get", &["--json", "a"], "").is_error(&["KEY is not JSON"]);
    cli.run("get", &["--json", "[\"a\", 1]"], "").is_error(&["part 1 of KEY: 1 is not a string"]);
    cli.run("get", &["--json", "\"a\"", "\"b\""], "").is_error(&["one KEY"]);
    cli.run("get", &["--json", "--content", "a"], "").is_error(&["cannot be used with"]);
    for verb in ["get", "stats", "filter"] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_onlyonce"));
        command.args([verb, "--store", ""]).args((verb == "get").then_some("k")).stdin(Stdio::null());
        Ran::from(command.output().unwrap()).is_error(&["--store <DIR>"]);
    }
}

#[test]
fn stats_prints_the_number_of_keys_and_the_size() {
    let cli = Cli::new();
    cli.passed(&["--window", "2h"], "a\nb\nc\n");
    let store = Store::open(cli.store()).unwrap();
    store.flush().unwrap();
    store.record("d").wait().unwrap();
    drop(store.claim("e").wait().unwrap());
    store.close().wait().unwrap();

    let stats = cli.stats();
    assert_eq!(stats["window_ms"], 7_200_000);
    assert_eq!((&stats["in_flight"], &stats["unflushed"], &stats["flushed"]), (&json!(0), &json!(2), &json!(3)));
    assert!(stats["disk_bytes"].as_u64().unwrap() > 0);
    assert!(stats["now_ms"].as_u64().unwrap() > stats["remembers_since_ms"].as_u64().unwrap());
    let buckets = stats["buckets"].as_array().unwrap();
    for bucket in buckets {
        assert_eq!(bucket["end_ms"].as_u64().unwrap() - bucket["start_ms"].as_u64().unwrap(), 300_000);
    }
    assert_eq!(buckets.iter().map(|bucket| bucket["keys"].as_u64().unwrap()).sum::<u64>(), 3);

    let ran = cli.run("stats", &[], "");
    assert_eq!(ran.code, Some(0));
    assert!(ran.out.starts_with("window           2h\n"), "{}", ran.out);
    for name in ["remembers since", "in flight", "unflushed keys", "flushed keys", "on disk", "buckets"] {
        let line = ran.out.lines().find(|line| line.starts_with(name)).unwrap();
        assert_eq!(line.find(|char: char| !char.is_ascii_lowercase() && char != ' '), Some(17), "{line}");
    }
}

#[test]
fn a_key_expires_with_the_window_and_the_store_keeps_its_window() {
    let cli = Cli::new();
    let args = ["--window", "100ms", "--bucket", "20ms"];
    assert_eq!(cli.passed(&args, "a\n"), "a\n");
    std::thread::sleep(Duration::from_millis(150));
    assert_eq!(cli.passed(&[], "a\n"), "a\n");
    assert_eq!(cli.stats()["window_ms"], 100);
    assert_eq!(cli.passed(&["--window", "1h"], "b\n"), "b\n");
    assert_eq!(cli.passed(&[], "b\n"), "");
}

// ---------------------------------------------------------------------------------------------------------------
// Interrupts, closed outputs and kills
// ---------------------------------------------------------------------------------------------------------------

#[test]
fn a_closed_output_ends_the_run_and_unwritten_lines_are_not_recorded() {
    let cli = Cli::new();
    let mut running = Running(cli.command("filter").spawn().unwrap());
    drop(running.0.stdout.take());
    let mut input = running.0.stdin.take().unwrap();
    input.write_all(b"a\nb\n").unwrap();
    // The input stays open, so only the closed output can end the run.
    let ran = running.ended();
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    assert!(ran.summary().starts_with("lines=0 passed=0 "), "{}", ran.err);
    drop(input);
    assert_eq!(cli.passed(&[], "a\nb\n"), "a\nb\n");
}

#[test]
fn a_reader_that_closes_the_output_early_ends_a_long_run() {
    let cli = Cli::new();
    let lines: String = (0..200_000).map(|line| format!("line {line}\n")).collect();
    let input = cli.file("input", lines);
    let mut running = Running(cli.command("filter").arg(&input).spawn().unwrap());
    let mut output = BufReader::new(running.0.stdout.take().unwrap());
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "line 0\n");
    drop(output);
    let ran = running.ended();
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    assert!(!ran.summary().starts_with("lines=200000 "), "{}", ran.err);
}

#[test]
fn a_failing_output_is_an_error_and_nothing_is_recorded() {
    let cli = Cli::new();
    let mut child = cli.command("filter").stdout(File::create("/dev/full").unwrap()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"a\n").unwrap();
    Ran::from(child.wait_with_output().unwrap()).is_error(&["onlyonce: cannot write to standard output"]);
    assert_eq!(cli.passed(&[], "a\n"), "a\n");
}

#[test]
fn an_interrupt_ends_a_run_that_waits_for_input() {
    let cli = Cli::new();
    let mut running = Running(cli.command("filter").spawn().unwrap());
    let mut input = running.0.stdin.take().unwrap();
    let output = running.lines();
    input.write_all(b"a\nb\nno end").unwrap();
    while output.recv_timeout(PATIENCE).unwrap() != "b" {}
    running.interrupt();
    let ran = running.ended();
    assert_eq!(ran.code, Some(130), "{}", ran.err);
    assert!(ran.summary().starts_with("lines=2 passed=2 duplicates=0 "), "{}", ran.err);
    drop(input);
    assert_eq!(cli.passed(&[], "a\nb\nno end"), "no end");
}

#[test]
fn an_interrupt_under_load_repeats_and_loses_no_line() {
    let cli = Cli::new();
    let lines: String = (0..300_000).map(|line| format!("line {line}\n")).collect();
    let input = cli.file("input", &lines);
    let out = cli.dir.path().join("out");
    let mut command = cli.command("filter");
    command.args(["--batch", "50", &input]).stdout(File::create(&out).unwrap());
    let running = Running(command.spawn().unwrap());
    wait_until(|| fs::metadata(&out).unwrap().len() > 0);
    running.interrupt();
    let ran = running.ended();
    assert_eq!(ran.code, Some(130), "{}", ran.err);
    let first = fs::read_to_string(&out).unwrap();
    assert!(ran.summary().starts_with(&format!("lines={} ", first.lines().count())), "{}", ran.err);
    assert_eq!(first + &cli.passed(&[&input], ""), lines);
}

fn wait_until(mut happened: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !happened() {
        assert!(begun.elapsed() < PATIENCE, "the condition does not become true");
        std::thread::yield_now();
    }
}

/// Kills the filter at random moments and runs it again on the same input. Together the outputs contain every line, and each kill
/// repeats at most the last batch before it.
#[test]
fn a_run_after_a_kill_repeats_at_most_one_batch_and_loses_no_line() {
    const BATCH: usize = 40;
    const KILLS: usize = 20;
    const DISTINCT: u32 = 12_000;
    let variable = std::env::var("ONLYONCE_CLI_SEED").ok().map(|seed| seed.parse().unwrap());
    let seed: u64 = variable.unwrap_or_else(|| rand::rng().random());
    eprintln!("ONLYONCE_CLI_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);

    let cli = Cli::new();
    let mut lines = Vec::new();
    for number in 0..DISTINCT {
        lines.push(format!("{{\"id\":{number},\"text\":\"{}\"}}\n", "x".repeat(rng.random_range(0..200))));
        while rng.random_bool(0.2) {
            lines.push(lines[rng.random_range(0..lines.len())].clone());
        }
    }
    let input = cli.file("input", lines.concat());
    let wanted = first_occurrences(&lines.concat());

    // The output of each run, and where each line was written last: the run, and the index in its output.
    let mut outputs: Vec<Vec<String>> = Vec::new();
    let mut written: HashMap<String, (usize, usize)> = HashMap::new();
    let mut first_time = String::new();
    // For each run, the indexes of the lines in its output that a later run repeated.
    let mut again: Vec<Vec<usize>> = vec![Vec::new(); KILLS + 1];
    let mut killed = 0;
    for run in 0..=KILLS {
        let out = cli.dir.path().join("out");
        let mut command = cli.command("filter");
        command.args(["--key", ".id", "--batch", &BATCH.to_string(), &input]).stdout(File::create(&out).unwrap());
        let mut running = Running(command.spawn().unwrap());
        if run < KILLS {
            // Some are killed while they open the store, some right after a write, the others at any moment.
            let bytes = if rng.random_bool(0.2) { 0 } else { rng.random_range(1..70_000) };
            let moment = if rng.random_bool(0.5) { 0 } else { rng.random_range(0..3_000) };
            wait_until(|| fs::metadata(&out).unwrap().len() >= bytes || running.0.try_wait().unwrap().is_some());
            std::thread::sleep(Duration::from_micros(moment));
            running.0.kill().unwrap();
        }
        let ran = running.ended();
        match ran.code {
            None => killed += 1,
            code => assert_eq!(code, Some(0), "seed {seed}: {}", ran.err),
        }

        let mut output = Vec::new();
        for line in fs::read_to_string(&out).unwrap().split_inclusive('\n') {
            if !line.ends_with('\n') {
                // The kill interrupted a write. The batch was not recorded, so a later run writes the whole line.
                break;
            }
            match written.insert(line.to_owned(), (run, output.len())) {
                None => first_time.push_str(line),
                Some((before, place)) => again[before].push(place),
            }
            output.push(line.to_owned());
        }
        outputs.push(output);
    }

    assert!(
        first_time == wanted,
        "seed {seed}: the first occurrences in the outputs are not the lines of the input in their order"
    );
    for (run, (output, again)) in outputs.iter().zip(&again).enumerate() {
        // A repeated line is attributed to the last run that wrote it before. The run that repeats it is not always the next
        // one, which may be killed as well.
        let earliest = output.len().saturating_sub(BATCH);
        let early = again.iter().find(|place| **place < earliest);
        assert_eq!(
            early,
            None,
            "seed {seed}: a line before the last batch of run {run} was repeated, of {} lines",
            output.len()
        );
    }
    assert!(killed > 0, "seed {seed}: every run ended before it could be killed");
    eprintln!("{killed} runs killed, {} lines repeated", again.concat().len());
    assert_eq!(cli.passed(&["--key", ".id", &input], ""), "");
}

#[test]
fn get_finds_a_key_of_any_bytes() {
    let cli = Cli::new();
    Store::open(cli.store()).unwrap().record(Key::from(b"\xff\xfe")).wait().unwrap();
    let output = cli.command("get").arg(OsStr::from_bytes(b"\xff\xfe")).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap()["key"], json!({ "hex": "fffe" }));
}

// ---------------------------------------------------------------------------------------------------------------
// Hostile bytes
// ---------------------------------------------------------------------------------------------------------------

/// Bytes that break programs which treat keys as text or as C strings.
const HOSTILE: [&[u8]; 16] = [
    b"\0",
    b"\0\0",
    b"a\0",
    b"\0a",
    b"a\0b",
    b"\xff",
    b"\xff\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\xc3\x28",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"\x80\x01a",
    b"\n",
    b"\x1b[2J\x07",
    b"\xc2\x9b31m",
    b"\xe2\x80\xae",
    b"' OR 1=1; --",
];

/// The only line of an output. Fails if it contains a control character, which a terminal would act on.
fn printable(bytes: &[u8]) -> &str {
    let line = str::from_utf8(bytes).unwrap().strip_suffix('\n').unwrap();
    assert!(!line.contains(char::is_control), "{line:?}");
    line
}

#[test]
fn lines_of_any_bytes_pass_once_and_unchanged() {
    let cli = Cli::new();
    let lines: Vec<u8> =
        HOSTILE.iter().filter(|line| **line != b"\n").flat_map(|line| [*line, b"\n"].concat()).collect();
    let input = cli.file("input", &lines);
    for expected in [lines, Vec::new()] {
        let output = cli.command("filter").arg(&input).output().unwrap();
        assert_eq!((output.status.code(), output.stdout), (Some(0), expected));
    }
}

#[test]
fn the_output_of_get_holds_no_control_characters() {
    let cli = Cli::new();
    // An argument of a process cannot contain NUL.
    for bytes in HOSTILE.iter().filter(|bytes| !bytes.contains(&0)) {
        let store = Store::open(cli.store()).unwrap();
        let Claim::Acquired(lease) = store.claim(Key::from(*bytes).scope(*bytes)).wait().unwrap() else {
            panic!("the key is new")
        };
        // JSON does not escape DEL and the C1 control characters. A result may contain NUL.
        let result = ["\0\u{7f}\u{80}\u{9b}31m\u{1b}[2J".as_bytes(), bytes].concat();
        lease.complete(result.clone()).wait().unwrap();
        store.close().wait().unwrap();

        let mut get = cli.command("get");
        get.arg("--scope").arg(OsStr::from_bytes(bytes)).arg("--").arg(OsStr::from_bytes(bytes));
        let output = get.output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
        let printed: Value = serde_json::from_str(printable(&output.stdout)).unwrap();
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let named = str::from_utf8(bytes).map_or_else(|_| json!({ "hex": hex }), Into::into);
        assert_eq!((&printed["key"], &printed["scope"]), (&named, &named));
        match str::from_utf8(&result) {
            Ok(text) => assert_eq!((&printed["result_form"], &printed["result"]), (&json!("text"), &json!(text))),
            Err(_) => assert_eq!(printed["result_form"], "hex"),
        }

        let absent = cli.command("get").arg("--").arg(OsStr::from_bytes(&[*bytes, b"!"].concat())).output().unwrap();
        assert_eq!(absent.status.code(), Some(1));
        printable(&absent.stderr);
    }
}

#[test]
fn a_json_escape_in_a_key_is_its_character() {
    let cli = Cli::new();
    let lines = "{\"k\":\"a\\u0000b\"}\n{\"k\":\"a\\u0000b\",\"more\":1}\n{\"k\":\"a\"}\n{\"k\":\"\\u009b31m\"}\n";
    assert_eq!(cli.passed(&["--key", ".k", "--scope", "s"], lines).lines().count(), 3);
    let store = Store::open(cli.store()).unwrap();
    for key in ["a\0b", "a", "\u{9b}31m"] {
        assert!(matches!(store.check(Key::from(key).scope("s")).wait().unwrap(), KeyStatus::Completed(_)), "{key:?}");
        assert_eq!(store.check(key).wait().unwrap(), KeyStatus::New, "{key:?} without its scope");
    }
}
