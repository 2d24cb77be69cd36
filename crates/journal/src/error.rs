//! What can go wrong.

use std::io;
use std::sync::Arc;

/// An error of the journal.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Reading, or preparing a segment, failed. Nothing was appended, and the journal can still be used. A full disk is this
    /// error, with [`io::ErrorKind::StorageFull`] or [`io::ErrorKind::QuotaExceeded`].
    #[error("{action} {place} failed, and nothing was appended")]
    NotWritten {
        /// What was done.
        action: &'static str,
        /// The file or directory.
        place: String,
        /// The cause.
        source: Arc<io::Error>,
    },
    /// A write or a sync failed, so the content of the file is unknown. All later calls fail in the same way, until the
    /// journal is opened again: after a failed sync the kernel may drop the unwritten pages, so that a second sync would
    /// succeed and prove nothing.
    #[error("{action} {place} failed, and what was written is unknown: open the journal again")]
    Unknown {
        /// What was done.
        action: &'static str,
        /// The file.
        place: String,
        /// The cause.
        source: Arc<io::Error>,
    },
    /// There are segments where a journal was to be created.
    #[error("{place} exists: open the journal, or remove its files if its creation was interrupted")]
    Exists {
        /// A segment.
        place: String,
    },
    /// There are no segments where a journal was to be opened.
    #[error("{place} has no journal: create one")]
    Missing {
        /// The directory.
        place: String,
    },
    /// Synced data is damaged or missing. Restore all files of the journal from one copy; do not remove single ones.
    #[error("{place} is corrupt: {detail}")]
    Corrupt {
        /// The file, and the position in it if it is known.
        place: String,
        /// What is wrong.
        detail: String,
    },
    /// An option has a value that is not allowed.
    #[error("option `{option}` is {value}, but must be {bounds}")]
    Option {
        /// The option.
        option: &'static str,
        /// Its value.
        value: u64,
        /// The allowed values.
        bounds: &'static str,
    },
    /// The call does not fit into a record.
    #[error("a record of {bytes} bytes is larger than the limit of {limit}")]
    RecordTooLarge {
        /// The size of the record.
        bytes: usize,
        /// The largest allowed size.
        limit: usize,
    },
    /// The journal is closed.
    #[error("the journal is closed")]
    Closed,
}

/// The result of a call to the journal.
pub type Result<T, E = Error> = std::result::Result<T, E>;

pub(crate) fn not_written(action: &'static str, place: &str, source: io::Error) -> Error {
    Error::NotWritten { action, place: place.to_owned(), source: Arc::new(source) }
}

pub(crate) fn unknown(action: &'static str, place: &str, source: io::Error) -> Error {
    Error::Unknown { action, place: place.to_owned(), source: Arc::new(source) }
}

pub(crate) fn corrupt(place: impl Into<String>, detail: impl Into<String>) -> Error {
    Error::Corrupt { place: place.into(), detail: detail.into() }
}
