//! `forget`: removes a key from the memtable and from all buckets.
//!
//! It excludes a flush, which could write the key to its bucket after the bucket's entry was deleted. So its record is begun
//! under the shard's lock, and not by a [`Batch`](super::execute::Batch).

use std::sync::Arc;

use super::backpressure::Demand;
use super::core::{Engine, OpenRecord};
use super::execute::apply;
use super::lookup::age;
use super::request::Request;
use crate::buckets::registry::{Probe, look_up};
use crate::codec::{self, RecordKind};
use crate::testing::failpoint::Failpoint;
use onlyonce_core::machine::{self, Entry, Forget, Forgotten, Step};
use onlyonce_core::{Error, FencingToken, Key, Result};

impl Engine {
    /// Removes everything that is stored about a key. Returns whether something was stored that had not expired.
    pub(crate) fn forget(&self, request: &Request) -> Result<bool> {
        // A key may be in many buckets.
        let bytes = request.key_bytes().saturating_mul(self.tables.buckets.snapshot().newest_first().len() + 1);
        self.admit(Demand { items: 1, tokens: 1, bytes, changes_database: true })?;
        let flush_lock = self.tables.flush_lock.lock();
        let key_ref = self.single_key(request)?;
        let (digest, key) = (key_ref.digest, key_ref.key);
        let now = self.now();
        let snapshot = self.tables.buckets.snapshot();
        let probe = Probe { index: 0, digest, key, column_bits: snapshot.candidates(digest) };
        let (mut flushed, mut newest) = (Vec::new(), None::<Entry>);
        look_up(&self.tables.db, &snapshot, &[probe], |_, bucket, entry| {
            newest = newest.take().filter(|newest| age(newest) > age(&entry)).or(Some(entry));
            flushed.push(Arc::clone(bucket));
        })?;

        let mut shard = self.tables.memtable.shard(digest);
        let in_memory = shard.get(digest, key);
        let stored = in_memory.as_ref().or(newest.as_ref());
        let mut open: Option<OpenRecord<'_>> = None;
        // Under the lock: the record's number is above those of the key's earlier records, and its token is below that of the
        // next claim. So a replay removes the old state and keeps a newer one.
        let begin = || {
            open = Some(self.begin_record());
            Ok::<u64, Error>(self.writer.sequence.take())
        };
        let Step { answer, change }: Step<Forgotten, &[u8]> = machine::step(stored, Forget, now, self.policy, begin)?;
        let counted = match answer {
            Forgotten::Removed { counted } => counted,
            Forgotten::InUse { token } => {
                return Err(Error::InUse { key: Key::display_encoded(key), token: FencingToken::new(token) });
            }
            Forgotten::Undecided { token } => {
                return Err(Error::Undecided { key: Key::display_encoded(key), token: FencingToken::new(token) });
            }
        };
        let mut record = self.record_writer(RecordKind::Forgotten, now, key.len() + 16);
        let token = change.event().map_or(0, |event| {
            record.event(key, event);
            event.token()
        });
        apply(&mut shard, digest, key, change, 0);
        drop(shard);
        self.health.check_invariants()?;
        // Nothing is stored.
        let Some(open) = open else { return Ok(false) };
        let mut entry_key = Vec::new();
        codec::put_entry_key(digest, key, &mut entry_key);
        Failpoint::ForgetBegun.pass();
        self.writer.write(self.config.sync_results(), |tx| {
            tx.put_record(open.number(), record.finish());
            flushed.iter().for_each(|bucket| tx.delete_key(&bucket.family, &entry_key));
        })?;
        Failpoint::ForgetWritten.pass();
        let mut shard = self.tables.memtable.shard(digest);
        self.tables.memtable.invalidate_recent(digest);
        if shard.get(digest, key).is_some_and(|entry| entry.token() < token) {
            shard.remove(digest, key);
        }
        drop(shard);
        Failpoint::ForgetRemoved.pass();
        open.finish();
        // Released before the wakeup: a waker runs caller code.
        drop(flush_lock);
        self.waiters.wake([digest]);
        Ok(counted)
    }
}
