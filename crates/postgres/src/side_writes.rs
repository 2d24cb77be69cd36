//! Offsets and the outbox.

use std::collections::BTreeMap;

use onlyonce_core::{Message, MessageId, NewMessage, Result, SideWrites};

use crate::caller::Execute;
use crate::core::Core;
use crate::error::{Failure, unavailable};
use crate::row::{signed, unsigned};

/// The side writes of one transaction.
#[derive(Debug, Default)]
pub(crate) struct Collected {
    /// The last value of each partition.
    offsets: BTreeMap<(Vec<u8>, u32), u64>,
    messages: Vec<NewMessage>,
}

impl Collected {
    pub(crate) fn add(&mut self, side_writes: &SideWrites, with_offsets: bool) {
        for offset in side_writes.offsets.iter().filter(|_| with_offsets) {
            self.offsets.insert((offset.stream.clone(), offset.partition), offset.offset);
        }
        self.messages.extend(side_writes.messages.iter().cloned());
    }

    /// Writes them, in a transaction of the caller.
    pub(crate) async fn write<S: ?Sized + Sync>(
        &self,
        client: &(impl Execute<S> + ?Sized),
        set_offsets: &S,
        add_messages: &S,
    ) -> Result<(), Failure> {
        if !self.offsets.is_empty() {
            let streams: Vec<&[u8]> = self.offsets.keys().map(|(stream, _)| stream.as_slice()).collect();
            let partitions: Vec<i64> = self.offsets.keys().map(|(_, partition)| i64::from(*partition)).collect();
            // All 64 bits: values are never compared.
            let values: Vec<i64> = self.offsets.values().map(|value| value.cast_signed()).collect();
            client.rows(set_offsets, &[&streams, &partitions, &values]).await?;
        }
        if !self.messages.is_empty() {
            let topics: Vec<&[u8]> = self.messages.iter().map(|message| message.topic.as_slice()).collect();
            let keys: Vec<&[u8]> = self.messages.iter().map(|message| message.key.as_slice()).collect();
            let payloads: Vec<&[u8]> = self.messages.iter().map(|message| message.payload.as_slice()).collect();
            client.rows(add_messages, &[&topics, &keys, &payloads]).await?;
        }
        Ok(())
    }
}

pub(crate) async fn offset(core: &Core, stream: &[u8], partition: u32) -> Result<Option<u64>> {
    let rows = core.database.rows_read(&core.sql.offset, &[&stream, &i64::from(partition)]).await?;
    let value = rows.first().map(|row| row.try_get::<_, i64>(0)).transpose().map_err(unavailable)?;
    Ok(value.map(i64::cast_unsigned))
}

pub(crate) async fn set_offset(core: &Core, stream: &[u8], partition: u32, offset: u64) -> Result<()> {
    let (streams, partitions, values) = (vec![stream], vec![i64::from(partition)], vec![offset.cast_signed()]);
    core.database.rows(&core.sql.set_offsets, &[&streams, &partitions, &values]).await?;
    Ok(())
}

pub(crate) async fn outbox(core: &Core, limit: usize) -> Result<Vec<Message>> {
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let rows = core.database.rows_read(&core.sql.outbox, &[&limit]).await?;
    rows.iter().filter_map(|row| message(row).transpose()).collect::<Result<_, _>>().map_err(unavailable)
}

/// A message of the outbox.
pub(crate) fn message(row: &tokio_postgres::Row) -> Result<Option<Message>, tokio_postgres::Error> {
    let (record, index): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
    let id = MessageId::new(unsigned(record), u32::try_from(index).unwrap_or(u32::MAX));
    let mut parts = SideWrites::default();
    parts.message(row.try_get::<_, Vec<u8>>(2)?, row.try_get::<_, Vec<u8>>(3)?, row.try_get::<_, Vec<u8>>(4)?);
    Ok(parts.messages.pop().map(|message| Message::new(id, message)))
}

pub(crate) async fn remove_messages(core: &Core, ids: &[MessageId]) -> Result<()> {
    if ids.is_empty() {
        return Ok(());
    }
    let mut ids: Vec<(i64, i64)> = ids.iter().map(|id| (signed(id.record()), i64::from(id.index()))).collect();
    ids.sort_unstable();
    let (records, indexes): (Vec<i64>, Vec<i64>) = ids.into_iter().unzip();
    core.database.rows(&core.sql.remove_messages, &[&records, &indexes]).await?;
    Ok(())
}
