//! Keys and lines of any bytes.

use super::*;

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
