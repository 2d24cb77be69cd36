//! How lines get their keys.

use super::*;

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
