//! Closing a store.

use super::core::Engine;
use super::meta_entries::TOKENS;
use crate::testing::failpoint::Failpoint;
use onlyonce_core::Result;

impl Engine {
    /// Rejects further calls, and closes the database when the running calls have ended.
    pub(crate) fn close(&self) -> Result<()> {
        if !self.health.close() {
            return Ok(());
        }
        Failpoint::CloseBegun.pass();
        self.metrics.end(&self.counters, || self.gauges());
        let written = self.health.unpoisoned().and_then(|()| self.writer.write_last_time());
        Failpoint::CloseTimeWritten.pass();
        // Otherwise processes that run briefly would accumulate small SSTs over restarts.
        let compacted = if self.health.poisoned().is_none() { self.wait_for_compactions() } else { Ok(()) };
        if let Err(error) = compacted {
            tracing::warn!(error = error.chain(), "failed to wait for compactions; small SSTs may accumulate");
        }
        // Unused tokens are returned. Otherwise every open would use up 2^32 of them, and consumers may store tokens in 53
        // bits. The running calls have ended by then, so no token from this one on is in use.
        let closed = self.writer.journal.close_with(|tx| {
            if self.health.poisoned().is_none() {
                tx.put_meta(TOKENS, &self.writer.sequence.next_unused().to_le_bytes());
            }
        });
        self.tables.db.close();
        tracing::info!(path = %self.path().display(), "store closed");
        written.and(closed)
    }
}
