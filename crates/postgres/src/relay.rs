//! The relay of the outbox: publishes messages in the order of their key, in several processes at a time, each at least once.
//!
//! A relay has an advisory lock for each key whose messages it publishes, until it has removed them. Locks of rows would not keep the
//! order: of a key whose first message is locked, another relay would take the second one. The locks are those of a session: a
//! transaction that is open during the publication would stop the removal of dead rows in the whole database.

use std::collections::HashSet;

use onlyonce_core::{Error, Message, MessageId, Result};

use crate::core::Core;
use crate::error::{Failure, unavailable};
use crate::opening::{CONFIRM, Object};
use crate::row::signed;
use crate::side_writes::message;
use crate::sql::RELAY_WINDOW;
use crate::store::PgStore;

/// The most messages of a call, because each key needs a lock of the server.
const LIMIT: usize = 1_000;

/// What [`PgStore::relay`] did.
#[derive(Debug)]
#[non_exhaustive]
pub struct Relayed<E> {
    /// How many messages were published and removed.
    pub published: usize,
    /// Messages that were not published. They stay in the outbox, and so do the later messages of their keys.
    pub failed: Vec<(MessageId, E)>,
}

impl PgStore {
    /// Publishes messages of the outbox, at most `limit` and at most 1,000, and removes those that were published.
    ///
    /// Any number of relays run at a time, in any process: each takes keys that no other one has. Messages of one key are published
    /// in the order of their ids, one after the other. Each message is published at least once: twice if the process or its connection
    /// ends between its publication and its removal. Its id is the same then, so that the receiver recognizes it.
    ///
    /// A key whose message failed is left out by the relays of this store for a while, from 50 milliseconds to 10 seconds the more often
    /// it fails, so that failing keys do not keep the others waiting. Of the other keys, the first messages come first, then the second
    /// ones: a key with many messages does not keep the others waiting either.
    ///
    /// A relay has a connection while it publishes. At most a quarter of the store's connections are those of relays: others wait.
    ///
    /// The keys are locked until `publish` has returned for all messages, so that a long publication delays others of the same keys.
    ///
    /// # Errors
    ///
    /// [`Error::Unavailable`] and [`Error::WriteFailed`] if the server cannot be reached or is not durable. Messages may have been
    /// published, and are published again then.
    pub async fn relay<E, F>(&self, limit: usize, mut publish: impl FnMut(Message) -> F) -> Result<Relayed<E>>
    where
        F: Future<Output = std::result::Result<(), E>>,
    {
        let core = self.core();
        let _permit = core.relays.acquire().await.map_err(|_| Error::Closed)?;
        let unknown_writes = core.database.unknown_writes();
        let connection = Some(core.database.connection().await.map_err(unavailable)?);
        let locked = LockedKeys { connection, unknown_writes };
        let messages = lock_messages(core, locked.connection()?, limit.min(LIMIT)).await?;
        let (mut published, mut failed, mut failed_keys) = (Vec::new(), Vec::new(), HashSet::new());
        for message in messages {
            if failed_keys.contains(&message.key) {
                continue;
            }
            let (id, key) = (message.id, message.key.clone());
            match publish(message).await {
                Ok(()) => {
                    core.failing.remove(&key);
                    published.push(id);
                }
                Err(error) => {
                    core.failing.add(&key);
                    failed.push((id, error));
                    failed_keys.insert(key);
                }
            }
        }
        remove(core, locked.connection()?, &published).await?;
        locked.unlock(core).await?;
        Ok(Relayed { published: published.len(), failed })
    }
}

/// A connection with the locks of keys. If it is dropped before they are unlocked, it is closed, which unlocks them.
struct LockedKeys {
    connection: Option<Object>,
    /// How many writes had an unknown outcome before.
    unknown_writes: u64,
}

impl LockedKeys {
    fn connection(&self) -> Result<&Object> {
        self.connection.as_ref().ok_or(Error::Closed)
    }

    async fn unlock(mut self, core: &Core) -> Result<()> {
        let connection = self.connection()?;
        let unlock = async { Ok(connection.batch_execute("SELECT pg_advisory_unlock_all()").await?) };
        core.database.limited(unlock).await.map_err(unavailable)?;
        if core.database.unknown_writes() == self.unknown_writes {
            // Back to the pool.
            drop(self.connection.take());
        }
        Ok(())
    }
}

impl Drop for LockedKeys {
    fn drop(&mut self) {
        drop(self.connection.take().map(Object::take));
    }
}

/// Locks keys, and reads their first messages afterwards: another relay may have removed some before it unlocked a key. They are on the
/// standby when this returns.
async fn lock_messages(core: &Core, connection: &Object, limit: usize) -> Result<Vec<Message>> {
    let left_out = core.failing.keys();
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let locked = async {
        let lock = connection.prepare_cached(&core.sql.lock_message_keys).await?;
        let mut keys: Vec<Vec<u8>> = Vec::new();
        let (mut record, mut index) = (-1_i64, -1_i64);
        // Until it has a key: other relays may have those of many messages.
        while keys.is_empty() {
            let rows = connection.query(&lock, &[&limit, &record, &index, &left_out]).await?;
            let Some(first) = rows.first() else { break };
            (record, index) = (first.try_get(1)?, first.try_get(2)?);
            let is_last = first.try_get::<_, i64>(3)? < RELAY_WINDOW;
            let found = rows.iter().map(|row| row.try_get::<_, Option<Vec<u8>>>(0));
            keys.extend(found.collect::<Result<Vec<_>, _>>()?.into_iter().flatten());
            if is_last {
                break;
            }
        }
        if keys.is_empty() {
            return Ok(Vec::new());
        }
        let read = connection.prepare_cached(&core.sql.messages_of_keys).await?;
        let rows = connection.query(&read, &[&keys, &limit]).await?;
        // A completion may be visible without its standby, and be lost at a failover: its message must not be published before.
        connection.batch_execute(CONFIRM).await?;
        Ok(rows.iter().filter_map(|row| message(row).transpose()).collect::<Result<_, _>>()?)
    };
    core.database.limited(locked).await.map_err(unavailable)
}

async fn remove(core: &Core, connection: &Object, ids: &[MessageId]) -> Result<()> {
    if ids.is_empty() {
        return Ok(());
    }
    let mut ids: Vec<(i64, i64)> = ids.iter().map(|id| (signed(id.record()), i64::from(id.index()))).collect();
    ids.sort_unstable();
    let (records, indexes): (Vec<i64>, Vec<i64>) = ids.into_iter().unzip();
    let removed = async {
        let remove = connection.prepare_cached(&core.sql.remove_messages).await?;
        connection.execute(&remove, &[&records, &indexes]).await?;
        Ok(())
    };
    core.database.limited(removed).await.map_err(|failure| match failure {
        Failure::Unknown(source) => Error::WriteFailed { source },
        other => unavailable(other),
    })
}
