//! Keys of the outbox whose messages failed: relays leave them out for a while, so that they do not keep other keys waiting.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// How long a key is left out after its first failure in a row, and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// How many keys are left out at a time.
const LEFT_OUT: usize = 10_000;

/// Keys whose messages failed.
#[derive(Debug, Default)]
pub(crate) struct FailingKeys(Mutex<HashMap<Vec<u8>, Failing>>);

#[derive(Debug)]
struct Failing {
    until: Instant,
    pause: Duration,
}

impl FailingKeys {
    fn lock(&self) -> MutexGuard<'_, HashMap<Vec<u8>, Failing>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those that are left out now.
    pub(crate) fn keys(&self) -> Vec<Vec<u8>> {
        let now = Instant::now();
        self.lock().iter().filter(|(_, failing)| now < failing.until).map(|(key, _)| key.clone()).collect()
    }

    pub(crate) fn add(&self, key: &[u8]) {
        let (mut keys, now) = (self.lock(), Instant::now());
        // Keys whose messages others have published meanwhile.
        keys.retain(|_, failing| now < failing.until + LONGEST_PAUSE);
        if keys.len() >= LEFT_OUT && !keys.contains_key(key) {
            return;
        }
        let failing = keys.entry(key.to_vec()).or_insert(Failing { until: now, pause: FIRST_PAUSE / 2 });
        failing.pause = (failing.pause * 2).min(LONGEST_PAUSE);
        failing.until = now + failing.pause;
    }

    pub(crate) fn remove(&self, key: &[u8]) {
        self.lock().remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_key_is_left_out_longer_the_more_often_it_fails() {
        let failing = FailingKeys::default();
        for pause in [50, 100, 200] {
            failing.add(b"k");
            tokio::time::advance(Duration::from_millis(pause - 1)).await;
            assert_eq!(failing.keys(), [b"k".to_vec()], "{pause} ms");
            tokio::time::advance(Duration::from_millis(1)).await;
            assert!(failing.keys().is_empty(), "{pause} ms");
        }
        failing.remove(b"k");
        failing.add(b"k");
        tokio::time::advance(FIRST_PAUSE).await;
        assert!(failing.keys().is_empty());
    }
}
