use std::time::Duration;

use super::memory_store::MemoryStore;
use super::state::State;
use crate::answer::OnInterrupt;
use crate::error::{Error, Result};

/// The longest key with its scope, whatever the limit, in bytes.
pub(super) const MAX_KEY: usize = 65_535;

/// Builds a [`MemoryStore`]. Its defaults and bounds are the local store's.
#[derive(Debug, Clone)]
#[must_use = "call `build` to make the store"]
pub struct MemoryStoreBuilder {
    config: Config,
}

/// The options of a store.
#[derive(Debug, Clone)]
pub(super) struct Config {
    pub(super) window: Duration,
    pub(super) lease: Duration,
    pub(super) on_interrupt: OnInterrupt,
    pub(super) result_limit: usize,
    pub(super) key_limit: usize,
    pub(super) in_flight_limit: usize,
    pub(super) held_limit: usize,
    /// How far ahead of stream time a message may be. `None`: the store runs on its clock.
    pub(super) max_ahead: Option<Duration>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            window: Duration::from_secs(24 * 60 * 60),
            lease: Duration::from_secs(30),
            on_interrupt: OnInterrupt::Rerun,
            result_limit: 1 << 20,
            key_limit: 1_024,
            in_flight_limit: 1_000_000,
            held_limit: 1_000_000,
            max_ahead: None,
        }
    }
}

impl MemoryStoreBuilder {
    pub(super) fn new() -> Self {
        Self { config: Config::default() }
    }

    /// How long a completed key is remembered. 24 hours by default.
    pub fn window(mut self, window: Duration) -> Self {
        self.config.window = window;
        self
    }

    /// How long a lease lasts without renewal. 30 seconds by default.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.config.lease = lease;
        self
    }

    /// What happens to a key whose holder vanished. [`OnInterrupt::Rerun`] by default.
    pub fn on_interrupt(mut self, on_interrupt: OnInterrupt) -> Self {
        self.config.on_interrupt = on_interrupt;
        self
    }

    /// The longest result that is stored, in bytes. 1 MiB by default.
    pub fn result_limit(mut self, bytes: usize) -> Self {
        self.config.result_limit = bytes;
        self
    }

    /// The longest key with its scope, in bytes. 1,024 by default.
    pub fn key_limit(mut self, bytes: usize) -> Self {
        self.config.key_limit = bytes;
        self
    }

    /// How many keys may be in progress. A million by default.
    pub fn in_flight_limit(mut self, keys: usize) -> Self {
        self.config.in_flight_limit = keys;
        self
    }

    /// How many keys may be held for resolution. A million by default.
    pub fn held_limit(mut self, keys: usize) -> Self {
        self.config.held_limit = keys;
        self
    }

    /// Runs the store on the timestamps of its messages. One message advances stream time by at most `max_ahead`.
    pub fn stream_time(mut self, max_ahead: Duration) -> Self {
        self.config.max_ahead = Some(max_ahead);
        self
    }

    /// Makes an empty store.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for an option out of its bounds.
    pub fn build(self) -> Result<MemoryStore> {
        let Config { window, lease, result_limit, key_limit, in_flight_limit, held_limit, max_ahead, .. } = self.config;
        const MILLISECOND: Duration = Duration::from_millis(1);
        const YEAR: Duration = Duration::from_secs(365 * 24 * 60 * 60);
        within("window", window, MILLISECOND, YEAR * 10)?;
        within("lease", lease, MILLISECOND, YEAR)?;
        within("result_limit", result_limit, 0, 64 << 20)?;
        within("key_limit", key_limit, 1, MAX_KEY)?;
        within("in_flight_limit", in_flight_limit, 1, usize::MAX)?;
        within("held_limit", held_limit, 1, usize::MAX)?;
        if let Some(max_ahead) = max_ahead {
            within("stream_time", max_ahead, MILLISECOND, window)?;
        }
        Ok(MemoryStore::of(State::new(self.config)))
    }
}

fn within<T: PartialOrd + std::fmt::Debug>(option: &'static str, value: T, least: T, most: T) -> Result<()> {
    if (&least..=&most).contains(&&value) {
        return Ok(());
    }
    Err(Error::Config { option, value: format!("{value:?}"), bounds: format!("from {least:?} to {most:?}") })
}
