//! The time range of a bucket, its column family's name, and when it expires.

use std::fmt;

use crate::clock::Now;

/// A time range whose completions are stored in one column family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct BucketRange {
    pub(crate) start_ms: u64,
    pub(crate) width_ms: u64,
}

impl BucketRange {
    /// The range of this width that contains `time_ms`.
    pub(crate) fn containing(time_ms: u64, width_ms: u64) -> Self {
        let width_ms = width_ms.max(1);
        Self { start_ms: time_ms - time_ms % width_ms, width_ms }
    }

    /// The end of the range, exclusive.
    pub(crate) fn end_ms(self) -> u64 {
        self.start_ms.saturating_add(self.width_ms)
    }

    pub(crate) fn contains(self, time_ms: u64) -> bool {
        time_ms.checked_sub(self.start_ms).is_some_and(|since_ms| since_ms < self.width_ms)
    }

    pub(crate) fn next(self) -> Self {
        Self { start_ms: self.end_ms(), width_ms: self.width_ms }
    }

    /// Whether a key completed in this range may still be remembered. Its newest possible key, from `end - 1`, is
    /// remembered until `end - 1 + window`.
    pub(crate) fn is_live(self, now: &Now, window_ms: u64) -> bool {
        now.remembers_any(self.start_ms, self.end_ms() - 1, window_ms)
    }

    /// The column family's name.
    pub(crate) fn family(self) -> String {
        self.to_string()
    }

    /// The range whose column family has this name.
    pub(crate) fn of_family(name: &str) -> Option<Self> {
        let (start, width) = name.strip_prefix("bucket-")?.split_once('-')?;
        let range = Self { start_ms: start.parse().ok()?, width_ms: width.parse().ok()? };
        // Only a name that `family` generates: no signs, no leading zeros, no overflow.
        let is_ours = range.width_ms > 0
            && range.start_ms.checked_add(range.width_ms).is_some()
            && range.start_ms.is_multiple_of(range.width_ms)
            && range.family() == name;
        is_ours.then_some(range)
    }
}

impl fmt::Display for BucketRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bucket-{}-{}", self.start_ms, self.width_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::{Step, Steps};

    fn at(time_ms: u64) -> Now {
        Now { time_ms, ..Now::default() }
    }

    #[test]
    fn a_range_expires_with_its_newest_possible_key() {
        let range = BucketRange::containing(1_234, 100);
        assert_eq!(range, BucketRange { start_ms: 1_200, width_ms: 100 });
        // Completed at 1,299, remembered while now < 1,299 + 500.
        assert!(range.is_live(&at(1_798), 500));
        assert!(!range.is_live(&at(1_799), 500));
        assert!(BucketRange::containing(u64::MAX, 7).is_live(&at(u64::MAX - 1), 500));
    }

    #[test]
    fn a_range_expires_when_it_is_entirely_below_the_retention_floor() {
        let range = BucketRange { start_ms: 1_200, width_ms: 100 };
        let after = |remembers_since_ms| Now { time_ms: 1_300, remembers_since_ms, ..Now::default() };
        assert!(range.is_live(&after(1_299), 500));
        assert!(!range.is_live(&after(1_300), 500), "also after the time went back");
    }

    #[test]
    fn a_range_whose_keys_a_clock_step_shifted_expires_with_the_shifted_keys() {
        let range = BucketRange { start_ms: 1_200, width_ms: 100 };
        let stepped = |from_ms, to_ms| Steps::of(&[Step { from_ms, to_ms, by_ms: 10_000 }]).unwrap();
        for (steps, last_ms) in
            [(stepped(1_299, 1_400), 11_798), (stepped(1_000, 1_210), 11_709), (stepped(1_300, 1_400), 1_798)]
        {
            assert!(range.is_live(&Now { steps, ..at(last_ms) }, 500), "{steps:?}");
            assert!(!range.is_live(&Now { steps, ..at(last_ms + 1) }, 500), "{steps:?}");
        }
    }

    #[test]
    fn only_a_generated_family_name_is_parsed() {
        let range = BucketRange { start_ms: 1_200, width_ms: 100 };
        assert_eq!(range.family(), "bucket-1200-100");
        assert_eq!(BucketRange::of_family("bucket-1200-100"), Some(range));
        for foreign in [
            "bucket-",
            "bucket-1",
            "bucket-1200-0",
            "bucket-0-0",
            "bucket-01200-100",
            "bucket-1201-100",
            "bucket--100-100",
            "bucket-+1200-100",
            "bucket-1200-100-",
            "meta",
            "bucket-18446744073709551615-5",
        ] {
            assert_eq!(BucketRange::of_family(foreign), None, "{foreign}");
        }
    }
}
