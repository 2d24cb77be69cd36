//! Opening a store the way the command line does.

use std::path::Path;

use anyhow::{Context, anyhow, ensure};
use onlyonce::{Builder, Error, Store};

/// The longest key, with its scope: all that the library can store, so that every key of every program is found.
pub(crate) const KEY_LIMIT: usize = 65_535;

pub(crate) fn builder() -> Builder {
    Store::builder().key_limit(KEY_LIMIT)
}

/// Opens a store to look into it: where there is none, none is made.
pub(crate) fn existing(path: &Path) -> anyhow::Result<Store> {
    let lock = path.join("onlyonce.lock");
    let there = lock.try_exists().with_context(|| format!("cannot look into {}", path.display()))?;
    ensure!(there, "{} holds no store; `onlyonce filter` makes one", path.display());
    open(builder(), path)
}

/// Opens a store, or says in this program's words why not.
pub(crate) fn open(builder: Builder, path: &Path) -> anyhow::Result<Store> {
    builder.open(path).map_err(|error| match error {
        Error::AlreadyOpen { .. } => anyhow!("another process has {} open: wait for its end", path.display()),
        error => error.into(),
    })
}
