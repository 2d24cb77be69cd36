//! What completions take along, into the write of their row.

use crate::error::Result;
use crate::storage::db;
use crate::tx::{MessageId, Tx, message_name};

/// What a completion takes along, and whether its offsets are part of that.
pub(super) type Along<'a> = (&'a Tx, bool);

/// Adds what the completions of row `number` take along.
pub(super) fn put(tx: &mut db::Tx<'_>, number: u64, along: &[Along<'_>]) -> Result<()> {
    let mut place = 0;
    for (along, with_offsets) in along {
        for (name, offset) in along.offsets.iter().filter(|_| *with_offsets) {
            tx.put_meta(name, &offset.to_le_bytes())?;
        }
        for message in &along.messages {
            tx.put_meta(&message_name(MessageId { row: number, place }), message)?;
            place += 1;
        }
    }
    Ok(())
}
