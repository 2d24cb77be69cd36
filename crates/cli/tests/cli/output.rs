//! Which lines are written, and how.

use super::*;

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
        let finished = cli.filter(&args, &stdin);
        assert_eq!(
            (finished.code, finished.out.as_str()),
            (Some(0), "{\"k\":1}\n{\"k\":2}\r\n{\"k\":3}\n"),
            "{}",
            finished.err
        );
        assert!(finished.summary().starts_with("lines=4 passed=3 duplicates=1 missing=0 blank=0 "), "{}", finished.err);
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
            let finished = cli.filter(args, &input);
            finished.is_error(&["onlyonce: <stdin>:1: ", "UTF-16", "convert it to UTF-8"]);
            assert_eq!(finished.out, "");
        }
    }
}

#[test]
fn blank_lines_of_json_input_are_dropped_and_counted() {
    for on_missing_key in ["fail", "drop", "pass"] {
        let cli = Cli::new();
        let input = format!("{MARK}\n\n{{\"k\":1}}\r\n\r\n \t \n{{\"k\":1}}\n{{\"k\":2}}\n  ");
        let finished = cli.filter(&["--key", ".k", "--on-missing-key", on_missing_key], input);
        assert_eq!((finished.code, finished.out.as_str()), (Some(0), "{\"k\":1}\r\n{\"k\":2}\n"), "{}", finished.err);
        assert!(finished.summary().starts_with("lines=8 passed=2 duplicates=1 missing=0 blank=5 "), "{}", finished.err);
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
    let finished = cli.filter(&FLIGHT, "");
    assert_eq!((finished.code, finished.out.as_str()), (Some(0), ""));
    assert!(finished.summary().starts_with("lines=0 passed=0 duplicates=0 missing=0 "), "{}", finished.err);
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
