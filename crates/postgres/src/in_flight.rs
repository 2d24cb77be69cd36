//! The leases of this process, which `in_flight_limit` bounds.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

#[derive(Debug)]
pub(crate) struct InFlight {
    limit: usize,
    leases: Mutex<Leases>,
}

#[derive(Debug, Default)]
struct Leases {
    /// When each lease ends, unless it is renewed.
    by_token: HashMap<u64, Instant>,
    /// Leases that calls are about to get.
    reserved: usize,
}

impl InFlight {
    pub(crate) fn new(limit: usize) -> Self {
        Self { limit, leases: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Leases> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    /// Room for as many more leases as the limit allows, `wanted` at most. The caller gives it back with [`InFlight::grant`].
    pub(crate) fn reserve(&self, wanted: usize) -> usize {
        let mut leases = self.lock();
        let room = |leases: &Leases| self.limit.saturating_sub(leases.by_token.len() + leases.reserved);
        if room(&leases) < wanted {
            let now = Instant::now();
            leases.by_token.retain(|_, until| *until > now);
        }
        let reserved = room(&leases).min(wanted);
        leases.reserved += reserved;
        reserved
    }

    /// Ends a reservation, and adds the leases that were granted in it.
    pub(crate) fn grant(&self, reserved: usize, tokens: impl IntoIterator<Item = u64>, lease: Duration) {
        let until = later(lease);
        let mut leases = self.lock();
        leases.reserved = leases.reserved.saturating_sub(reserved);
        leases.by_token.extend(tokens.into_iter().map(|token| (token, until)));
    }

    pub(crate) fn renewed(&self, token: u64, lease: Duration) {
        if let Some(until) = self.lock().by_token.get_mut(&token) {
            *until = later(lease);
        }
    }

    pub(crate) fn ended(&self, token: u64) {
        self.lock().by_token.remove(&token);
    }

    /// The number of leases that have not ended.
    pub(crate) fn count(&self) -> usize {
        let now = Instant::now();
        let mut leases = self.lock();
        leases.by_token.retain(|_, until| *until > now);
        leases.by_token.len() + leases.reserved
    }
}

fn later(lease: Duration) -> Instant {
    const YEAR: Duration = Duration::from_secs(366 * 24 * 60 * 60);
    Instant::now() + lease.min(YEAR)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn leases_take_room_until_they_end() {
        let (in_flight, lease) = (InFlight::new(3), Duration::from_secs(1));
        assert_eq!((in_flight.reserve(2), in_flight.reserve(2)), (2, 1));
        assert_eq!(in_flight.reserve(1), 0);
        in_flight.grant(2, [1, 2], lease);
        in_flight.grant(1, [], lease);
        assert_eq!((in_flight.count(), in_flight.reserve(2)), (2, 1));
        in_flight.grant(1, [3], lease);
        in_flight.ended(3);
        tokio::time::advance(lease / 2).await;
        in_flight.renewed(1, lease);
        tokio::time::advance(lease / 2).await;
        assert_eq!(in_flight.count(), 1, "one expired, one was renewed, one ended");
    }
}
