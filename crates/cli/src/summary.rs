//! What `filter` says at its end.

use std::fmt;

use serde::Serialize;

/// `lines` is `passed`, `duplicates` and `blank`, and `missing` where those are left out; where they are passed, `passed`
/// holds them, too.
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
