//! The plan of the house: a file uses lower floors and earlier files of its own folder, and only `storage/` knows
//! RocksDB.

use std::fs;
use std::path::{Path, PathBuf};

/// The floors of `src/`, the lowest first; the files of a folder in the order in which they may use each other. Files
/// of the lowest floor are words, which may use each other.
const FLOORS: &[&[&str]] = &[
    &[
        "error",
        "concurrency",
        "clock",
        "key",
        "codec",
        "entry",
        "config",
        "stats",
        "kill_point",
        "tx",
        "meter",
        "invariant",
        "typed_result",
    ],
    &["storage"],
    &["filter"],
    &["bucket"],
    &["state"],
    &["claim", "store", "batch", "internals", "laws", "lib"],
    &["future"],
    &["http"],
    &["delivery"],
];

const ORDER: &[(&str, &[&str])] = &[
    ("clock", &["steps", "wall", "stream"]),
    ("storage", &["options", "journal", "chain", "log", "directory", "inventory", "laws", "run", "sync", "db"]),
    ("filter", &["sizing", "layer", "file", "stack"]),
    ("bucket", &["window", "set", "seal", "rotation", "recovery", "filters"]),
    (
        "state",
        &[
            "transition",
            "waiting",
            "sequence",
            "notes",
            "timekeeping",
            "request",
            "page",
            "hot_table",
            "chunk",
            "answer",
            "along",
            "engine",
            "lookup",
            "claiming",
            "settling",
            "renewal",
            "outbox",
            "upkeep",
            "due",
            "keeper",
        ],
    ),
    ("future", &["committer", "lease", "keep_alive", "store", "once"]),
    (
        "http",
        &[
            "attempt",
            "fate",
            "figures",
            "body",
            "problem",
            "json",
            "fingerprint",
            "stored",
            "guard",
            "key",
            "stream",
            "work",
            "service",
            "layer",
        ],
    ),
    (
        "delivery",
        &[
            "setting",
            "message",
            "work",
            "settled",
            "figures",
            "returning",
            "processor",
            "redis_reply",
            "redis_streams",
            "rabbitmq_copy",
            "rabbitmq",
            "nats_letter",
            "nats",
            "sqs_letter",
            "sqs",
            "partitions",
            "kafka_record",
            "kafka",
        ],
    ),
];

fn floor(module: &str) -> usize {
    FLOORS.iter().position(|floor| floor.contains(&module)).unwrap_or_else(|| panic!("{module} is on no floor"))
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// The paths that a file's `use` lines and inline paths name behind `crate::`, with the code of tests left out.
fn used(source: &str) -> Vec<String> {
    let code = source.split("#[cfg(test)]\nmod tests").next().unwrap();
    let mut used = Vec::new();
    for line in code.lines().map(str::trim_start).filter(|line| !line.starts_with("//")) {
        for rest in line.split("crate::").skip(1) {
            let path: String =
                rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_' || *c == ':' || *c == '{').collect();
            used.push(path);
        }
    }
    used
}

#[test]
fn every_file_uses_lower_floors_and_earlier_files_only() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut edges = 0;
    for path in files(&src) {
        let inside = path.strip_prefix(&src).unwrap();
        let names: Vec<&str> =
            inside.components().map(|part| part.as_os_str().to_str().unwrap().trim_end_matches(".rs")).collect();
        if names == ["lib"] {
            continue;
        }
        let source = fs::read_to_string(&path).unwrap();
        let own = floor(names[0]);
        for used in used(&source) {
            let mut parts = used.split("::");
            let module = parts.next().unwrap();
            if module.starts_with('{') || module.chars().next().is_some_and(char::is_uppercase) {
                continue;
            }
            edges += 1;
            let theirs = floor(module);
            let same_words = own == 0 && theirs == 0;
            let same_folder = names.len() > 1 && module == names[0];
            let earlier_on_top = own == theirs
                && names.len() == 1
                && FLOORS[own].iter().position(|file| *file == module)
                    < FLOORS[own].iter().position(|file| *file == names[0]);
            assert!(
                theirs < own || same_words || same_folder || earlier_on_top,
                "src/{} uses crate::{used}, which is not below it",
                inside.display()
            );
        }
    }
    assert!(edges > 60, "the test has lost its eyes: it saw {edges} uses");
}

#[test]
fn the_files_of_a_folder_use_earlier_ones_only() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for (folder, order) in ORDER {
        let mut there: Vec<String> = files(&src.join(folder))
            .iter()
            .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
            .collect();
        there.retain(|name| name != "mod");
        let mut listed: Vec<&str> = order.to_vec();
        listed.sort_unstable();
        assert_eq!(there, listed, "the files of src/{folder}");
        for (place, file) in order.iter().enumerate() {
            let source = fs::read_to_string(src.join(folder).join(format!("{file}.rs"))).unwrap();
            let code = source.split("#[cfg(test)]\nmod tests").next().unwrap();
            for later in &order[place + 1..] {
                for path in [format!("super::{later}::"), format!("crate::{folder}::{later}::")] {
                    assert!(!code.contains(&path), "src/{folder}/{file}.rs uses {path}, which comes after it");
                }
            }
        }
    }
}

#[test]
fn only_the_storage_folder_names_rocksdb_and_only_the_clock_reads_the_time() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut storage_names_it = false;
    for path in files(&src) {
        let inside = path.strip_prefix(&src).unwrap();
        let source = fs::read_to_string(&path).unwrap();
        if inside.starts_with("storage") {
            storage_names_it |= source.contains("rocksdb::");
        } else {
            assert!(!source.contains("rocksdb::"), "src/{} names rocksdb", inside.display());
        }
        if !inside.starts_with("clock.rs") {
            assert!(!source.contains("SystemTime"), "src/{} reads the wall clock", inside.display());
        }
    }
    assert!(storage_names_it);
}
