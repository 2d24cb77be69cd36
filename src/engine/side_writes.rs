//! What completions take along, into the write of their row.

use crate::error::Result;
use crate::rocks::db;
use crate::tx::{MessageId, Tx, message_name};

/// What a completion takes along, and whether its offsets are part of that.
pub(super) type SideWrites<'a> = (&'a Tx, bool);

/// Adds what the completions of row `number` take along.
pub(super) fn put(tx: &mut db::Tx<'_>, number: u64, side_writes: &[SideWrites<'_>]) -> Result<()> {
    let mut index = 0;
    for (side_writes, with_offsets) in side_writes {
        for (name, offset) in side_writes.offsets.iter().filter(|_| *with_offsets) {
            tx.put_meta(name, &offset.to_le_bytes())?;
        }
        for message in &side_writes.messages {
            tx.put_meta(&message_name(MessageId { record: number, index }), message)?;
            index += 1;
        }
    }
    Ok(())
}
