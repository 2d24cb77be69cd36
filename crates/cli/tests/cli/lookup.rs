//! `get` and `stats`.

use super::*;

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
        let finished = cli.run("get", absent, "");
        assert_eq!((finished.code, finished.out.as_str()), (Some(1), ""), "{absent:?}");
        assert!(finished.err.starts_with("onlyonce: no entry for "), "{}", finished.err);
        for option in ["--content", "--scope"] {
            assert_eq!(finished.err.contains(option), suggested.contains(&option), "{absent:?}: {}", finished.err);
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
        Finished::from(command.output().unwrap()).is_error(&["--store <DIR>"]);
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

    let finished = cli.run("stats", &[], "");
    assert_eq!(finished.code, Some(0));
    assert!(finished.out.starts_with("window           2h\n"), "{}", finished.out);
    for name in ["remembers since", "in flight", "unflushed keys", "flushed keys", "on disk", "buckets"] {
        let line = finished.out.lines().find(|line| line.starts_with(name)).unwrap();
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
