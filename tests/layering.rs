//! Layering: a file uses lower layers and earlier files of its own folder, and only `rocks/` names RocksDB.

use std::fs;
use std::path::{Path, PathBuf};

/// The layers of `src/`, the lowest first; the files of a folder in the order in which they may use each other. Files
/// of the lowest layer may use each other, and so may those of `api/`, where store, lease and call need each other. A file of
/// `testing/` is a module of its own here.
const LAYERS: &[&[&str]] = &[
    &[
        "testing::sync_shim",
        "testing::failpoint",
        "clock",
        "digest",
        "codec",
        "config",
        "stats",
        "metrics",
        "invariant",
        "wake",
    ],
    &["fs"],
    &["rocks"],
    &["journal"],
    &["filter"],
    &["buckets"],
    &["memtable"],
    &["engine"],
    &["testing::internals", "testing::fuzz_checks", "lib"],
    &["api"],
    &["delivery"],
];

const ORDER: &[(&str, &[&str])] = &[
    ("clock", &["steps", "wall", "stream"]),
    ("fs", &["directory"]),
    ("rocks", &["options", "manifest", "sst", "db"]),
    ("journal", &["numbers", "replayed", "tx", "checkpoint", "medium", "store_journal"]),
    ("filter", &["sizing", "matrix", "file", "stack"]),
    ("buckets", &["range", "registry", "flush", "rotation", "recovery", "filters"]),
    ("memtable", &["slot", "arena", "shard", "recent", "table", "frozen"]),
    (
        "engine",
        &[
            "waiters",
            "backlog",
            "health",
            "sequence",
            "meta_entries",
            "timekeeping",
            "writer",
            "request",
            "response",
            "side_writes",
            "core",
            "backpressure",
            "lookup",
            "execute",
            "open",
            "claim",
            "finish",
            "leases",
            "forget",
            "renewal",
            "outbox",
            "gauges",
            "flush",
            "maintenance",
            "catch_up",
            "close",
            "workers",
            "fixture",
        ],
    ),
];

/// The files of other crates, in the order in which they may use each other.
const CRATES: &[(&str, &[&str])] = &[
    ("crates/core/src/machine", &["moment", "entry", "event", "transition", "finish", "step", "exhaustive"]),
    (
        "crates/journal/src",
        &[
            "error",
            "sync",
            "record",
            "layout",
            "mapped",
            "medium",
            "segment",
            "group_commit",
            "output",
            "recovery",
            "journal",
            "simulated",
            "fuzz_checks",
            "models",
        ],
    ),
    (
        "crates/postgres/src",
        &[
            "error",
            "names",
            "options",
            "schema",
            "sql",
            "caller",
            "sqlx_client",
            "row",
            "connector",
            "opening",
            "connection",
            "waiters",
            "in_flight",
            "kept",
            "queue",
            "contended",
            "failing",
            "core",
            "stream_time",
            "reading",
            "writing",
            "acquire",
            "in_order",
            "side_writes",
            "finish",
            "renewal",
            "resolve",
            "waiting",
            "keep_alive",
            "session",
            "maintenance",
            "store",
            "lease",
            "relay",
            "builder",
        ],
    ),
    (
        "crates/http/src",
        &[
            "attempt",
            "disposition",
            "event",
            "metrics",
            "stats",
            "body",
            "problem",
            "json",
            "fingerprint",
            "stored",
            "context",
            "key",
            "stream",
            "execute",
            "service",
            "layer",
        ],
    ),
];

fn layer(module: &str) -> usize {
    LAYERS.iter().position(|layer| layer.contains(&module)).unwrap_or_else(|| panic!("{module} is in no layer"))
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
fn every_file_uses_lower_layers_and_earlier_files_only() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut edges = 0;
    for path in files(&src) {
        let inside = path.strip_prefix(&src).unwrap();
        let names: Vec<&str> =
            inside.components().map(|part| part.as_os_str().to_str().unwrap().trim_end_matches(".rs")).collect();
        if names == ["lib"] || names == ["testing", "mod"] {
            continue;
        }
        let own_module = if names[0] == "testing" { names.join("::") } else { names[0].to_owned() };
        let source = fs::read_to_string(&path).unwrap();
        let own = layer(&own_module);
        for used in used(&source) {
            let mut parts = used.split("::");
            let module = parts.next().unwrap();
            if module.starts_with('{') || module.chars().next().is_some_and(char::is_uppercase) {
                continue;
            }
            edges += 1;
            let module = match (module, parts.next()) {
                ("testing", Some(file)) => format!("testing::{file}"),
                _ => module.to_owned(),
            };
            let theirs = layer(&module);
            let both_lowest = own == 0 && theirs == 0;
            let same_folder = names.len() > 1 && module == own_module;
            let earlier_in_layer = own == theirs
                && names.len() == 1
                && LAYERS[own].iter().position(|file| *file == module)
                    < LAYERS[own].iter().position(|file| *file == own_module);
            assert!(
                theirs < own || both_lowest || same_folder || earlier_in_layer,
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
fn the_files_of_a_crate_use_earlier_ones_only() {
    for (folder, order) in CRATES {
        let src = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
        let mut there: Vec<String> =
            files(&src).iter().map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned()).collect();
        there.retain(|name| !["lib", "mod", "tests"].contains(&name.as_str()));
        let mut listed: Vec<&str> = order.to_vec();
        listed.sort_unstable();
        assert_eq!(there, listed, "the files of {folder}");
        for (place, file) in order.iter().enumerate() {
            let source = fs::read_to_string(src.join(format!("{file}.rs"))).unwrap();
            for used in used(&source) {
                let module = used.split("::").next().unwrap();
                assert!(!order[place + 1..].contains(&module), "{folder}/{file}.rs uses {used}, which comes after it");
            }
            for later in &order[place + 1..] {
                let is_used = source.contains(&format!("super::{later}::"));
                assert!(!is_used, "{folder}/{file}.rs uses {later}, which comes after it");
            }
        }
    }
}

#[test]
fn only_the_rocks_folder_names_rocksdb_and_only_the_clock_reads_the_time() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut rocks_names_it = false;
    for path in files(&src) {
        let inside = path.strip_prefix(&src).unwrap();
        let source = fs::read_to_string(&path).unwrap();
        if inside.starts_with("rocks") {
            rocks_names_it |= source.contains("rocksdb::");
        } else {
            assert!(!source.contains("rocksdb::"), "src/{} names rocksdb", inside.display());
        }
        if !inside.starts_with("clock.rs") {
            assert!(!source.contains("SystemTime"), "src/{} reads the wall clock", inside.display());
        }
    }
    assert!(rocks_names_it);
}
