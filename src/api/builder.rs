use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use onlyonce_core::{OnInterrupt, Result};

use super::shared::Shared;
use super::store::Store;
use crate::clock::Clock;
use crate::config::{Durability, Options};
use crate::engine::core::Engine;
use crate::engine::workers::StoreHandle;
use crate::fs::directory::Directory;

/// The options of a store. Made by [`Store::builder`].
#[derive(Clone)]
#[must_use = "a builder does nothing before `open`"]
pub struct Builder {
    options: Options,
}

impl Builder {
    pub(crate) fn new() -> Self {
        Self { options: Options::default() }
    }

    /// How long a completed key is remembered. From 1 ms to 10 years. The default is the window of the last open, 24 hours for
    /// a new store. Shrinking the window deletes expired keys permanently: a wider window later does not restore them
    /// ([`Stats::remembers_since`](crate::Stats::remembers_since)).
    pub fn window(mut self, window: Duration) -> Self {
        self.options.window = Some(window);
        self
    }

    /// The width of a time bucket: the unit in which completed keys are stored and dropped. The default is a 24th of the
    /// window; at most 48 buckets cover it. Storage outlives the window by at most one bucket; answers do not.
    pub fn bucket(mut self, width: Duration) -> Self {
        self.options.bucket = Some(width);
        self
    }

    /// How long a lease lasts unless it is renewed. From 1 ms to a year, 30 seconds by default.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.options.lease = lease;
        self
    }

    /// How long after its claim a lease is renewed in the background: by [`Store::run`],
    /// [`Lease::keep_alive`](crate::Lease::keep_alive), and the layers for requests and deliveries. After that the lease
    /// expires; the next claim acquires the key with prior [`LeaseExpired`](crate::PriorAttempt::LeaseExpired), or the key is
    /// held. The work itself is not stopped.
    ///
    /// From 1 ms to a year. Without it there is no limit: work that never ends keeps its key until its process exits.
    /// [`Lease::renew`](crate::Lease::renew) is not limited.
    pub fn renew_for(mut self, limit: Duration) -> Self {
        self.options.renew_for = Some(limit);
        self
    }

    /// How durable a call is when it returns. [`Durability::Disk`] by default.
    pub fn durability(mut self, durability: Durability) -> Self {
        self.options.durability = durability;
        self
    }

    /// How often the journal is synced under [`Durability::Process`]: the most that a power cut can lose. From 1 ms to an hour,
    /// 1 second by default.
    pub fn sync_interval(mut self, interval: Duration) -> Self {
        self.options.sync_interval = interval;
        self
    }

    /// What happens to a key whose lease expires or is dropped, or whose process crashes. The default is that of the last open,
    /// [`OnInterrupt::Rerun`] for a new store.
    pub fn on_interrupt(mut self, on_interrupt: OnInterrupt) -> Self {
        self.options.on_interrupt = Some(on_interrupt);
        self
    }

    /// Creates a store on stream time: the timestamps of messages ([`Key::at`](crate::Key::at)) drive its windows, and no clock
    /// ages a key. A backlog after an outage, or a replay of last year, then finds its duplicates.
    ///
    /// A message can be at most `max_ahead` ahead of stream time; one that is further ahead needs a second one to confirm it
    /// ([`TimestampError::TooFarAhead`](crate::TimestampError::TooFarAhead)). From 1 ms to the window, which is a good choice.
    /// The time source is fixed at creation: opening with a different one is an error. `max_ahead` defaults to the stored value.
    pub fn stream_time(mut self, max_ahead: Duration) -> Self {
        self.options.stream_time = Some(max_ahead);
        self
    }

    /// Bytes of memory for filters (7/16 at most), unflushed keys (flushed at an eighth; callers wait at a quarter), recently
    /// flushed keys (a sixteenth) and cached blocks (a quarter). From 32 MiB to 16 TiB, 256 MiB by default. Keys in progress are
    /// extra: see [`Builder::in_flight_limit`]. So are the offsets and messages since the last flush.
    pub fn memory_budget(mut self, bytes: usize) -> Self {
        self.options.memory_budget = bytes;
        self
    }

    /// The expected number of completed keys a second, averaged over a bucket. It sizes the filters of the first buckets. Without
    /// it they start small and grow by matrices, each of which makes a check slower, until a bucket has ended. A wrong estimate
    /// costs memory or time, never an answer. 0 (unknown) by default.
    pub fn expected_rate(mut self, keys_per_s: u64) -> Self {
        self.options.expected_rate = keys_per_s;
        self
    }

    /// The longest result that is stored, in bytes. Of a longer one, only the completion is stored. At most 64 MiB, 1 MiB by
    /// default.
    pub fn result_limit(mut self, bytes: usize) -> Self {
        self.options.result_limit = bytes;
        self
    }

    /// The longest key, with its scope, in bytes. From 1 to 65,535, 1,024 by default. Longer keys of earlier opens can still be
    /// inspected, resolved and forgotten.
    pub fn key_limit(mut self, bytes: usize) -> Self {
        self.options.key_limit = bytes;
        self
    }

    /// How many keys can be in progress: leased, or with an expired lease whose process is running. Each takes about 250 bytes of
    /// memory, and up to six times its key's length during a flush: keep the limit low if untrusted callers choose long keys.
    /// 1,000,000 by default. A claim over it fails with [`Error::TooManyInFlight`](crate::Error::TooManyInFlight). Released and
    /// dropped keys do not count.
    pub fn in_flight_limit(mut self, keys: usize) -> Self {
        self.options.in_flight_limit = keys;
        self
    }

    /// How many keys can be held for resolution under [`OnInterrupt::Hold`]. Each takes about 250 bytes of memory until
    /// [`Store::resolve`]. 1,000,000 by default. A claim over it fails with [`Error::TooManyHeld`](crate::Error::TooManyHeld).
    pub fn held_limit(mut self, keys: usize) -> Self {
        self.options.held_limit = keys;
        self
    }

    /// Disk space of unused journal segments, in bytes, which are kept because to write over them is faster than to allocate new
    /// ones. At most 1 TiB, 64 MiB by default; two segments are always kept. The largest segments have an eighth of it, but
    /// at least 1 MiB and at most 8 MiB. Segments in use are extra: they have what was written since the last flush.
    pub fn spare_segments(mut self, bytes: u64) -> Self {
        self.options.spare_segments = bytes;
        self
    }

    /// How many awaited calls each of the store's two queues holds; a batch is one call. If a queue is full, `.await` waits for
    /// room. From 1 to 1,000,000, 1,024 by default. More than the number of concurrent tasks has no effect; fewer make smaller
    /// commit groups.
    #[cfg(feature = "tokio")]
    #[cfg_attr(docsrs, doc(cfg(feature = "tokio")))]
    pub fn queue_limit(mut self, calls: usize) -> Self {
        self.options.queue_limit = calls;
        self
    }

    /// How long to wait for another process to release the directory: a killed process holds its locks for some milliseconds. Up
    /// to an hour, 1 second by default.
    pub fn lock_wait(mut self, wait: Duration) -> Self {
        self.options.lock_wait = wait;
        self
    }

    /// Where the time comes from: the system by default, a [`ManualClock`](crate::ManualClock) in tests. The store's time runs on
    /// the monotonic clock. A wall clock that differs from it by more than a second counts once every reading of 10 minutes agrees.
    pub fn clock(mut self, clock: impl Clock) -> Self {
        self.options.clock = Arc::new(clock);
        self
    }

    /// Whether [`Builder::open`] creates a store if the directory is missing or empty. True by default. With `false` it fails with
    /// [`Error::NotFound`](crate::Error::NotFound) instead.
    pub fn create(mut self, create: bool) -> Self {
        self.options.create = create;
        self
    }

    /// Opens the store in a directory, or creates it with permissions for its owner alone. Blocks: replays the journal, and
    /// rebuilds the filters in the background, during which the store answers.
    ///
    /// # Errors
    ///
    /// [`Error::Config`](crate::Error::Config) for an option out of its bounds; [`Error::AlreadyOpen`](crate::Error::AlreadyOpen),
    /// [`Error::NotFound`](crate::Error::NotFound), [`Error::NotAStore`](crate::Error::NotAStore),
    /// [`Error::UnsupportedFormat`](crate::Error::UnsupportedFormat) and [`Error::Corrupt`](crate::Error::Corrupt) for the
    /// directory. None of them loses anything.
    pub fn open(self, path: impl AsRef<Path>) -> Result<Store> {
        self.options.check_bounds()?;
        if !self.options.create {
            Directory::require_store(path.as_ref())?;
        }
        let directory = Directory::acquire(path.as_ref(), self.options.lock_wait)?;
        let engine = Engine::open(directory, &self.options)?;
        Ok(Store { shared: Shared::new(StoreHandle::start(engine)?) })
    }
}

impl std::fmt::Debug for Builder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Builder")
            .field("window", &self.options.window)
            .field("bucket", &self.options.bucket)
            .field("lease", &self.options.lease)
            .field("durability", &self.options.durability)
            .field("on_interrupt", &self.options.on_interrupt)
            .field("stream_time", &self.options.stream_time)
            .field("memory_budget", &self.options.memory_budget)
            .finish_non_exhaustive()
    }
}
