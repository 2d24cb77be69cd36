//! Opening a store the way the command line does.

use std::path::Path;

use anyhow::ensure;
use onlyonce::{Builder, Store};

/// The longest key, with its scope: all that the library can store, so that every key of every program is found.
pub(crate) const KEY_LIMIT: usize = 65_535;

pub(crate) fn builder() -> Builder {
    Store::builder().key_limit(KEY_LIMIT)
}

/// Opens a store to look into it: where there is none, none is made.
pub(crate) fn existing(path: &Path) -> anyhow::Result<Store> {
    let database = path.join("db");
    ensure!(
        database.is_dir(),
        "{} holds no store: there is no directory {}; `onlyonce filter` makes one",
        path.display(),
        database.display()
    );
    Ok(builder().open(path)?)
}
