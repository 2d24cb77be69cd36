//! Lines without a key, and lines that are too long.

use super::*;

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
        let finished = cli.filter(&["--key", ".k", "--scope", "s"], &input);
        finished.is_error(&["onlyonce: <stdin>:3: ", why, "--on-missing-key"]);
        assert_eq!(finished.out, "{\"k\":1}\n{\"k\":2}\n", "{line}");
        assert!(finished.summary().starts_with("lines=2 passed=2 "), "{}", finished.err);
        let again = cli.passed(&["--key", ".k", "--scope", "s"], "{\"k\":1}\n{\"k\":2}\n{\"k\":3}\n");
        assert_eq!(again, "{\"k\":3}\n");
    }
}

#[test]
fn line_numbers_start_at_one_in_each_file() {
    let cli = Cli::new();
    let (one, two) = (cli.file("one", "{\"k\":1}\n{\"k\":2}\n"), cli.file("two", "{\"k\":3}\n{}\n"));
    let finished = cli.filter(&["--key", ".k", &one, &two], "");
    finished.is_error(&[&format!("onlyonce: {two}:2: the line has no .k")]);
    assert_eq!(finished.out.lines().count(), 3);
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
        let finished = cli.filter(&["--max-line", "8"], format!("a\n{long}b\n"));
        finished.is_error(&["onlyonce: <stdin>:2: ", "longer than 8 bytes", "--max-line"]);
        assert_eq!(finished.out, "a\n");
        assert_eq!(cli.passed(&["--max-line", "8"], format!("a\n{whole}")), whole);
    }
}

#[test]
fn a_line_larger_than_every_buffer_passes() {
    let cli = Cli::new();
    let lines = format!("{}\nb\n{}\n", "a".repeat(3 << 20), "a".repeat((3 << 20) + 1));
    assert_eq!(cli.passed(&[], lines.repeat(2)), lines);
}
