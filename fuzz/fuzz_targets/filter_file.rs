#![no_main]

use std::path::Path;
use std::sync::LazyLock;

use tempfile::TempDir;

/// In memory if possible: a file on disk is ten times slower.
static DIR: LazyLock<TempDir> = LazyLock::new(|| {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap()
});

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| onlyonce::fuzz_checks::filter_file(&DIR.path().join("bucket.filter"), bytes));
