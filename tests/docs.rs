//! The documentation names tests that exist, its links lead to files, and its index lists every page.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Component, Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The files with this extension in a directory and in those below it.
fn files(dir: &str, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut left = vec![root().join(dir)];
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display())) {
            let path = entry.unwrap().path();
            if path.is_dir() {
                left.push(path);
            } else if path.extension().is_some_and(|found| found == extension) {
                found.push(path);
            }
        }
    }
    found
}

#[test]
fn every_test_that_the_guarantees_name_exists() {
    every_named_test_exists("docs/guarantees.md", 150);
}

#[test]
fn every_test_that_the_security_policy_names_exists() {
    every_named_test_exists("SECURITY.md", 20);
}

#[test]
fn every_test_that_the_invariants_name_exists() {
    every_named_test_exists("docs/invariants.md", 10);
}

/// A page names a test of `tests/`, `examples/` or a crate as `file::test` or `folder::test`, and a unit test by its name alone.
fn every_named_test_exists(page: &str, at_least: usize) {
    let sources: BTreeMap<PathBuf, String> = ["src", "crates", "tests", "examples"]
        .into_iter()
        .flat_map(|dir| files(dir, "rs"))
        .map(|path| (path.strip_prefix(root()).unwrap().to_owned(), read(&path)))
        .collect();
    let is_of = |path: &Path, file: &str| {
        let is_named = |part: Component| Path::new(part.as_os_str()).file_stem().is_some_and(|stem| stem == file);
        path.components().any(is_named)
    };
    let is_word = |text: &str| text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    let (mut named, mut missing) = (0, Vec::new());
    for name in read(&root().join(page)).split('`').skip(1).step_by(2) {
        let (file, test) = match name.split_once("::") {
            Some((file, test)) if is_word(file) && is_word(test) => (Some(file), test),
            None if name.matches('_').count() >= 3 && is_word(name) => (None, name),
            _ => continue,
        };
        named += 1;
        let definition = format!("fn {test}(");
        let mut places = sources.iter().filter(|(path, _)| file.is_none_or(|file| is_of(path, file)));
        if !places.any(|(_, source)| source.contains(&definition)) {
            missing.push(name.to_owned());
        }
    }
    assert!(missing.is_empty(), "{page} names tests that do not exist: {missing:#?}");
    assert!(named >= at_least, "{page} names only {named} tests that this test recognizes");
}

#[test]
fn every_link_leads_to_a_file_and_a_heading() {
    let mut pages = files("docs", "md");
    pages.extend(["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"].map(|page| root().join(page)));
    let (mut links, mut broken) = (0, Vec::new());
    for page in &pages {
        for link in read(page).split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.contains("://") {
                continue;
            }
            links += 1;
            let (file, heading) = link.split_once('#').map_or((link, None), |(file, heading)| (file, Some(heading)));
            let target = if file.is_empty() { page.clone() } else { page.parent().unwrap().join(file) };
            let has_heading =
                |heading: &str| read(&target).lines().any(|line| line.starts_with('#') && anchor(line) == heading);
            if !target.exists() || heading.is_some_and(|heading| !has_heading(heading)) {
                broken.push(format!("{}: {link}", page.display()));
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
    assert!(links > 100, "only {links} links were found");
}

/// The anchor of a heading, as GitHub makes it.
fn anchor(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    text.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c)).map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn every_file_that_the_architecture_names_exists() {
    let sources: Vec<_> = ["src", "crates", "tests"].into_iter().flat_map(|dir| files(dir, "rs")).collect();
    let page = read(&root().join("docs/architecture.md"));
    let named: Vec<_> = page.split('`').skip(1).step_by(2).filter(|name| name.ends_with(".rs")).collect();
    let missing: Vec<_> = named.iter().filter(|name| !sources.iter().any(|path| path.ends_with(name))).collect();
    assert!(missing.is_empty(), "docs/architecture.md names files that do not exist: {missing:?}");
    assert!(named.len() > 50, "docs/architecture.md names only {} files", named.len());
}

#[test]
fn the_index_lists_every_page() {
    let index = read(&root().join("docs/README.md"));
    let missing: Vec<_> = files("docs", "md")
        .into_iter()
        .map(|page| page.strip_prefix(root().join("docs")).unwrap().to_owned())
        .filter(|page| !page.starts_with("decisions") && page != Path::new("README.md"))
        .filter(|page| !index.contains(&format!("({})", page.display())))
        .collect();
    assert!(missing.is_empty(), "docs/README.md does not list {missing:?}");
}

#[test]
fn the_readme_is_short() {
    let lines = read(&root().join("README.md")).lines().count();
    assert!(lines <= 150, "README.md has {lines} lines: move a part of it to docs/");
}
