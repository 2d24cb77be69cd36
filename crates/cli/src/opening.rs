//! Opens stores, and words the library's errors for users of the command.

use std::path::Path;

use anyhow::{Context, anyhow, ensure};
use onlyonce::{Builder, Error, KeyError, Store, TimestampError};

/// The longest key with its scope: the maximum of the library, so that the command finds the keys of every program.
pub(crate) const KEY_LIMIT: usize = 65_535;

pub(crate) fn builder() -> Builder {
    Store::builder().key_limit(KEY_LIMIT)
}

/// Opens a store that must exist.
pub(crate) fn existing(path: &Path) -> anyhow::Result<Store> {
    let lock = path.join("onlyonce.lock");
    let exists = lock.try_exists().with_context(|| format!("cannot read the directory {}", path.display()))?;
    ensure!(exists, "{} contains no store; `onlyonce filter` creates one", path.display());
    open(builder(), path)
}

pub(crate) fn open(builder: Builder, path: &Path) -> anyhow::Result<Store> {
    builder.open(path).map_err(explain)
}

/// Replaces the names of the library's options and methods by those of the command.
pub(crate) fn explain(error: Error) -> anyhow::Error {
    match error {
        Error::AlreadyOpen { path, .. } => {
            anyhow!("{} is open in another process; wait until that process closes it", path.display())
        }
        Error::Config { option: option @ ("window" | "bucket"), value, bounds } => {
            anyhow!("--{option} is {value}, but it must be {bounds}")
        }
        Error::Key(KeyError::TooLong { len, limit, .. }) => {
            anyhow!("the key and the scope have {len} bytes; the limit is {limit}")
        }
        Error::Timestamp(TimestampError::Missing) => {
            anyhow!("the store runs on stream time, but lines have no timestamp; use another store")
        }
        error => error.into(),
    }
}
