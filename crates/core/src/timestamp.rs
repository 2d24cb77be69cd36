use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A moment in whole milliseconds since the Unix epoch (1970-01-01T00:00:00Z). No time zone, no leap seconds.
///
/// ```
/// use std::time::{Duration, UNIX_EPOCH};
///
/// use onlyonce_core::Timestamp;
///
/// let at = Timestamp::from_unix_ms(1_700_000_000_000);
/// assert_eq!(at, Timestamp::from_unix_s(1_700_000_000));
/// assert_eq!(at, Timestamp::from(UNIX_EPOCH + Duration::from_secs(1_700_000_000)));
/// assert_eq!(at.as_unix_ms(), 1_700_000_000_000);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp(u64);

impl Timestamp {
    /// 1970-01-01T00:00:00Z.
    pub const UNIX_EPOCH: Self = Self(0);

    /// From milliseconds since the Unix epoch, which is what Kafka records carry.
    #[must_use]
    pub const fn from_unix_ms(ms: u64) -> Self {
        Self(ms)
    }

    /// From seconds since the Unix epoch. Saturates after the year 584,556,019.
    #[must_use]
    pub const fn from_unix_s(s: u64) -> Self {
        Self(s.saturating_mul(1_000))
    }

    /// Milliseconds since the Unix epoch.
    #[must_use]
    pub const fn as_unix_ms(self) -> u64 {
        self.0
    }

    /// The moment `duration` later, in whole milliseconds. Saturates.
    #[must_use]
    pub fn saturating_add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)))
    }

    /// How long this moment is after `earlier`. Zero if it is not after it.
    #[must_use]
    pub fn saturating_since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

/// A moment before 1970 becomes 1970. Fractions of a millisecond are dropped.
impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Self {
        let since_epoch = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX))
    }
}

/// Milliseconds since the Unix epoch, as digits.
impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Timestamp({} ms)", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_before_1970_becomes_1970() {
        assert_eq!(Timestamp::from(UNIX_EPOCH - Duration::from_secs(1)), Timestamp::UNIX_EPOCH);
    }

    #[test]
    fn arithmetic_saturates() {
        let last = Timestamp::from_unix_ms(u64::MAX);
        assert_eq!(last.saturating_add(Duration::MAX), last);
        assert_eq!(Timestamp::from_unix_s(u64::MAX), last);
        assert_eq!(Timestamp::UNIX_EPOCH.saturating_since(last), Duration::ZERO);
        assert_eq!(Timestamp::from_unix_ms(7).saturating_since(Timestamp::from_unix_ms(5)), Duration::from_millis(2));
    }
}
