//! Every test that `docs/guarantees.md`, `docs/invariants.md` and `SECURITY.md` name is there.

use std::fs;
use std::path::Path;

fn sources(dir: &Path, all: &mut String) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, all);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            all.push_str(&fs::read_to_string(&path).unwrap());
        }
    }
}

#[test]
fn every_test_that_the_guarantees_name_exists() {
    every_test_exists("docs/guarantees.md", 40);
}

#[test]
fn every_test_that_the_security_policy_names_exists() {
    every_test_exists("SECURITY.md", 20);
}

#[test]
fn every_test_that_the_invariants_name_exists() {
    every_test_exists("docs/invariants.md", 10);
}

fn every_test_exists(page: &str, at_least: usize) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(root.join(page)).unwrap();
    let mut library = String::new();
    sources(&root.join("src"), &mut library);
    sources(&root.join("crates"), &mut library);
    let mut named = 0;
    for name in page.split('`').skip(1).step_by(2) {
        let is_word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        let (file, test) = match name.split_once("::") {
            Some((file, test)) if file.chars().all(is_word) && test.chars().all(is_word) => (Some(file), test),
            None if name.matches('_').count() >= 3 && name.chars().all(is_word) => (None, name),
            _ => continue,
        };
        named += 1;
        let definition = format!("fn {test}(");
        match file {
            None => assert!(library.contains(&definition), "no unit test {test}"),
            Some(file) => {
                let places = ["tests", "tests/behaviour", "examples", "crates/cli/tests"]
                    .map(|dir| root.join(dir).join(format!("{file}.rs")));
                let source = places.iter().find_map(|path| fs::read_to_string(path).ok());
                let source = source.unwrap_or_else(|| panic!("no file for {name}"));
                assert!(source.contains(&definition), "no test {name}");
            }
        }
    }
    assert!(named > at_least, "the test has lost its eyes: it saw {named} names");
}
