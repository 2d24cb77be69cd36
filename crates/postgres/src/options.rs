use std::fmt;
use std::time::Duration;

use onlyonce_core::OnInterrupt;
use onlyonce_core::machine::{Opened, Policy};

/// What must hold before a completion is acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// It is on the disks of the primary and of a synchronous standby. A server without one is rejected.
    #[default]
    Replicated,
    /// It is on the disk of one server. A failover to an asynchronous standby, and the loss of that disk, lose acknowledged
    /// completions: their work runs again, and nothing reports it. Leases and tokens may be granted twice.
    SingleServer,
}

#[derive(Clone)]
pub(crate) struct Options {
    pub(crate) schema: String,
    pub(crate) prefix: String,
    pub(crate) window: Duration,
    pub(crate) lease: Duration,
    pub(crate) on_interrupt: OnInterrupt,
    pub(crate) result_limit: usize,
    pub(crate) key_limit: usize,
    pub(crate) in_flight_limit: usize,
    pub(crate) held_limit: usize,
    pub(crate) durability: Durability,
    pub(crate) connections: usize,
    pub(crate) retry_for: Duration,
    pub(crate) statement_limit: Duration,
    pub(crate) crash_detection: bool,
    /// How far ahead of stream time a message may be. `None`: the store runs on its clock.
    pub(crate) max_ahead: Option<Duration>,
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("schema", &self.schema)
            .field("prefix", &self.prefix)
            .field("window", &self.window)
            .field("lease", &self.lease)
            .field("on_interrupt", &self.on_interrupt)
            .field("durability", &self.durability)
            .finish_non_exhaustive()
    }
}

impl Options {
    pub(crate) fn window_ms(&self) -> u64 {
        millis(self.window)
    }

    pub(crate) fn lease_ms(&self) -> u64 {
        millis(self.lease)
    }

    pub(crate) fn holds(&self) -> bool {
        self.on_interrupt == OnInterrupt::Hold
    }

    /// The options of the state machine. Leases and backoffs run on the store's time, which all processes share.
    pub(crate) fn policy(&self) -> Policy {
        Policy {
            window_ms: self.window_ms(),
            on_interrupt: self.on_interrupt,
            is_stream: self.max_ahead.is_some(),
            opened: Opened { time_ms: 0, monotonic_ms: 0 },
            first_token: 0,
        }
    }
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
