//! Deliveries that come back without their work having run: how often, and since when.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::key::Key;

/// Keys that are remembered at a time. Deliveries beyond come back without being counted.
const KEYS_MOST: usize = 65_536;

/// Counts by key, in memory: a process that begins again counts again. One that does not come back for as long as the
/// limit is forgotten.
#[derive(Debug, Default)]
pub(super) struct Returning {
    by_key: Mutex<HashMap<u64, Episode>>,
    hasher: RandomState,
}

#[derive(Debug, Clone, Copy)]
struct Episode {
    first: Instant,
    last: Instant,
    returns: u32,
}

/// How often a delivery was sent away, and for how long that has gone on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Returned {
    pub(super) returns: u32,
    pub(super) over: Duration,
}

impl Returning {
    /// A delivery of this key would be sent away. Where it was sent away that often before, and for so long, it is not
    /// counted again, and what was counted is returned: give it up.
    pub(super) fn is_enough(&self, key: &Key<'_>, returns: u32, limit: Duration, now: Instant) -> Option<Returned> {
        let digest = self.hasher.hash_one(key);
        let mut by_key = self.by_key.lock();
        let is_stale = |episode: &Episode| now.saturating_duration_since(episode.last) > limit.max(STALE_LEAST);
        if by_key.get(&digest).is_some_and(is_stale) {
            by_key.remove(&digest);
        }
        if by_key.len() >= KEYS_MOST && !by_key.contains_key(&digest) {
            by_key.retain(|_, episode| !is_stale(episode));
            if by_key.len() >= KEYS_MOST {
                return None;
            }
        }
        let episode = by_key.entry(digest).or_insert(Episode { first: now, last: now, returns: 0 });
        let over = now.saturating_duration_since(episode.first);
        if episode.returns >= returns && over >= limit {
            let returned = Returned { returns: episode.returns, over };
            by_key.remove(&digest);
            return Some(returned);
        }
        episode.returns = episode.returns.saturating_add(1);
        episode.last = now;
        None
    }

    /// The key's delivery was answered otherwise.
    pub(super) fn forget(&self, key: &Key<'_>) {
        let mut by_key = self.by_key.lock();
        if !by_key.is_empty() {
            by_key.remove(&self.hasher.hash_one(key));
        }
    }
}

/// A queue may take so long to deliver again, however short the limit is.
const STALE_LEAST: Duration = Duration::from_secs(3_600);

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn enough_is_so_many_returns_and_so_long_a_time() {
        let (returning, key) = (Returning::default(), Key::from("a"));
        let mut now = Instant::now();
        let mut ask = |pass: Duration| {
            now += pass;
            returning.is_enough(&key, 3, 10 * MINUTE, now)
        };
        assert_eq!(ask(Duration::ZERO), None);
        // Long enough, and too few.
        assert_eq!(ask(20 * MINUTE), None);
        assert_eq!(ask(MINUTE), None);
        assert_eq!(ask(MINUTE), Some(Returned { returns: 3, over: 22 * MINUTE }));
        // It begins again, for instance when it comes back from the dead letters. Often enough, and too short.
        assert!((0..50).all(|_| ask(Duration::from_secs(10)).is_none()));
    }

    #[test]
    fn an_answer_ends_the_count_and_so_does_a_long_absence() {
        let (returning, key) = (Returning::default(), Key::from("a"));
        let now = Instant::now();
        let ask = |at: Duration| returning.is_enough(&key, 1, MINUTE, now + at).is_some();
        assert!(!ask(Duration::ZERO));
        returning.forget(&key);
        assert!(
            !ask(2 * MINUTE) && !ask(2 * MINUTE + 3_601 * MINUTE / 60 + MINUTE),
            "forgotten, and then too long away"
        );
        assert!(ask(2 * MINUTE + 3_601 * MINUTE / 60 + 3 * MINUTE));
    }

    #[test]
    fn memory_is_bounded() {
        let returning = Returning::default();
        let now = Instant::now();
        for key in 0..KEYS_MOST + 10 {
            assert_eq!(returning.is_enough(&Key::from(key.to_string()), 1, MINUTE, now), None);
        }
        assert_eq!(returning.by_key.lock().len(), KEYS_MOST);
        let later = now + Duration::from_secs(4_000);
        assert_eq!(returning.is_enough(&Key::from("new"), 1, MINUTE, later), None);
        assert_eq!(returning.by_key.lock().len(), 1, "those that never came back are forgotten");
    }
}
