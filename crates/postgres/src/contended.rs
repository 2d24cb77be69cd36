//! Keys that a transaction of a caller has claimed and not committed. An insertion of such a key waits for the transaction.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::Instant;

/// How long a key is in progress without another try.
const PAUSE: Duration = Duration::from_secs(1);
/// How long a try may take before another call tries as well. It waits for a lock for three seconds.
const TRY: Duration = Duration::from_secs(4);
/// After which time a key that nobody claims is removed.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(crate) struct Contended {
    /// When the next try of each key is due.
    keys: Mutex<HashMap<Vec<u8>, Instant>>,
    /// How many batches with such keys run at a time, apart from the others.
    pub(crate) batches: Semaphore,
}

impl Default for Contended {
    fn default() -> Self {
        Self { keys: Mutex::default(), batches: Semaphore::new(2) }
    }
}

impl Contended {
    fn lock(&self) -> MutexGuard<'_, HashMap<Vec<u8>, Instant>> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn contains(&self, key: &[u8]) -> bool {
        self.lock().contains_key(key)
    }

    /// Whether a call may try to insert the key. `false`: it is in progress.
    pub(crate) fn admits(&self, key: &[u8]) -> bool {
        let (mut keys, now) = (self.lock(), Instant::now());
        let Some(next_try) = keys.get_mut(key) else { return true };
        if now < *next_try {
            return false;
        }
        *next_try = now + TRY;
        true
    }

    /// The insertion of the key waited for a transaction, which has not ended.
    pub(crate) fn add(&self, key: &[u8]) {
        let (mut keys, now) = (self.lock(), Instant::now());
        keys.retain(|_, next_try| now < *next_try + FORGOTTEN_AFTER);
        keys.insert(key.to_vec(), now + PAUSE);
    }

    /// The insertion of these keys did not wait.
    pub(crate) fn remove<'a>(&self, inserted: impl IntoIterator<Item = &'a Vec<u8>>) {
        let mut keys = self.lock();
        if keys.is_empty() {
            return;
        }
        for key in inserted {
            keys.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_call_at_a_time_tries_to_insert_a_contended_key() {
        let contended = Contended::default();
        assert!(contended.admits(b"k") && !contended.contains(b"k"));
        contended.add(b"k");
        assert!(!contended.admits(b"k") && contended.contains(b"k") && contended.admits(b"other"));
        tokio::time::advance(PAUSE).await;
        assert!(contended.admits(b"k") && !contended.admits(b"k"), "two calls try");
        contended.remove([&b"k".to_vec()]);
        assert!(contended.admits(b"k") && contended.admits(b"k"));
    }
}
