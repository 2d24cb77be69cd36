//! The summary, the log and errors of usage.

use super::*;

#[test]
fn the_summary_is_one_line_of_names_and_numbers() {
    let finished = Cli::new().filter(&[], "a\nb\na\n");
    let line = finished.err.strip_suffix('\n').unwrap();
    let (counts, seconds) = line.split_once(" seconds=").unwrap();
    assert_eq!(counts, "lines=3 passed=2 duplicates=1 missing=0 blank=0");
    assert!((0.0..30.0).contains(&seconds.parse::<f64>().unwrap()), "{line}");
}

#[test]
fn the_summary_is_a_json_object_with_the_option_json() {
    let finished =
        Cli::new().filter(&["--json", "--key", ".k", "--on-missing-key", "drop"], "{\"k\":1}\n{\"k\":1}\n{}\n");
    let mut summary: Value = serde_json::from_str(&finished.err).unwrap();
    let seconds = summary.as_object_mut().unwrap().remove("seconds").unwrap();
    assert!(seconds.as_f64().unwrap() > 0.0);
    assert_eq!(summary, json!({ "lines": 3, "passed": 1, "duplicates": 1, "missing": 1, "blank": 0 }));
}

#[test]
fn verbose_logs_what_the_store_does_and_changes_nothing_else() {
    let cli = Cli::new();
    let finished = cli.filter(&["-v"], "a\n");
    assert_eq!((finished.code, finished.out.as_str()), (Some(0), "a\n"));
    assert!(finished.err.contains("store opened"), "{}", finished.err);
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
        let finished = cli.filter(args, "a\n");
        finished.is_error(&[says]);
        assert_eq!(finished.out, "", "{args:?}");
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
