//! A write-ahead journal for one process.
//!
//! A [`Journal`] stores records: byte strings, in order. An append returns when its record survives a crash of the process, or
//! a power cut ([`Durability`]). A [checkpoint](Journal::checkpoint) replaces the records before it. [`Journal::open`] returns
//! the last checkpoint and the records after it.
//!
//! - **Preallocated segments.** A sync of a file that grows also commits the file system's own journal. Segments are written
//!   full of zeros before they are used, and used again after a checkpoint, so that a sync writes the record's block alone. A
//!   full disk is noticed before a record is written.
//! - **Group commit.** Threads that append at the same time share writes and syncs, without a thread of the journal's own.
//! - **No silent gap.** Each record says how far the journal was on disk when it was written. So an open can tell a torn tail,
//!   which a power cut leaves, from damage, which is [`Error::Corrupt`]. See [below](#which-damage-is-noticed).
//! - **A failed sync is final.** All later calls fail until the journal is opened again.
//!
//! What it is not: it has no index and no reads but those of an open, it is no message queue, and it does not lock its
//! directory: two processes that open the same one lose records. Dropping a journal without [`Journal::close`] loses nothing
//! that is acknowledged; it is what a crash does. Unix only.
//!
//! # Example
//!
//! ```
//! use onlyonce_journal::{Access, Directory, Durability, Journal, Options, Recovered};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let dir = tempfile::tempdir()?;
//! let journal = Journal::create(Directory::new(dir.path(), Access::Write)?, &Options::default(), b"nothing yet")?;
//! journal.append(&[b"one"], Durability::Process)?;
//! journal.append(&[b"two, ", b"in parts"], Durability::Disk)?;
//! drop(journal);
//!
//! let mut found = Vec::new();
//! let (journal, _) = Journal::open(Directory::new(dir.path(), Access::Write)?, &Options::default(), |recovered| {
//!     found.push(match recovered {
//!         Recovered::Checkpoint(bytes) | Recovered::Record(bytes) => String::from_utf8_lossy(bytes).into_owned(),
//!     });
//!     Ok(())
//! })?;
//! assert_eq!(found, ["nothing yet", "one", "two, in parts"]);
//! journal.close()?;
//! # Ok(())
//! # }
//! ```
//!
//! # Which damage is noticed
//!
//! - After a [close](Journal::close), any damage to one file: flipped bits, other bytes, another size, a missing file, an earlier
//!   version of it, a file of another journal. The open returns [`Error::Corrupt`], or the damage is where nothing is needed, and
//!   nothing is lost.
//! - In a running journal, or after a crash, the same for everything that was on disk before the last [`Journal::maintain`], as long
//!   as its mark is intact. The mark is in the active segment, after the last record. What destroys records and the mark
//!   after them, such as an earlier version of that file, looks like a torn tail.
//! - Damage to records after the last mark, or after the last record that states them, looks like a torn tail.
//!
//! The error names the first file whose content ends too early, or the file after a missing one.
//!
//! # Assumptions about the disk
//!
//! - What was on disk after a sync stays there, also if a later write to the same block is torn, as long as that write does not
//!   change its bytes. A block that becomes unreadable is damage.
//! - A power cut tears a write at any byte, and may lose any write since the last sync, also if a later one is on disk. Of the
//!   two copies of a segment's header it damages at most one.
//! - A killed process leaves whole pages of the system call that was interrupted, and any bytes of a store to a mapping.
//! - A sync that failed is reported. An open after it reads what the page cache has, which may not be on disk: a journal whose sync
//!   failed should be opened on a repaired disk.

mod error;
#[cfg(all(feature = "testing", any(fuzzing, all(test, not(shuttle)))))]
pub mod fuzz_checks;
mod group_commit;
mod journal;
mod layout;
mod mapped;
mod medium;
#[cfg(all(feature = "testing", test, shuttle))]
mod models;
mod output;
mod record;
mod recovery;
mod segment;
#[cfg(feature = "testing")]
mod simulated;
mod sync;

pub use error::{Error, Result};
pub use group_commit::Durability;
pub use journal::{Journal, MAX_RECORD, Options, Position, Recovery, Stats};
pub use medium::{Access, Directory, DirectoryFile, Medium, MediumFile};
pub use recovery::{Recovered, Report};
#[cfg(feature = "testing")]
pub use simulated::SimulatedDisk;
