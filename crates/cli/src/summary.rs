//! The summary that `filter` prints at its end.

use std::fmt;

use serde::Serialize;

/// `lines` is the sum of `passed`, `duplicates`, `blank` and, if lines without a key are dropped, `missing`. If those are
/// passed, `passed` includes them.
#[derive(Debug, Default, Clone, Serialize)]
pub(crate) struct Summary {
    pub(crate) lines: u64,
    pub(crate) passed: u64,
    pub(crate) duplicates: u64,
    pub(crate) missing: u64,
    pub(crate) blank: u64,
    pub(crate) seconds: f64,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { lines, passed, duplicates, missing, blank, seconds } = self;
        write!(f, "lines={lines} passed={passed} duplicates={duplicates} missing={missing} blank={blank} ")?;
        write!(f, "seconds={seconds:.3}")
    }
}
