//! Confirmed forward steps of the wall clock, and the completions that they shift.

/// Maximum number of steps.
const MAX_STEPS: usize = 3;

/// The store's time stepped forward by `by_ms` after the wall clock had been ahead for the confirmation time.
/// Completions of that time, `from_ms..=to_ms`, have a timestamp from before the step and count as completed `by_ms`
/// later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Step {
    pub(crate) from_ms: u64,
    pub(crate) to_ms: u64,
    pub(crate) by_ms: u64,
}

impl Step {
    fn shifts(self, at_ms: u64) -> bool {
        (self.from_ms..=self.to_ms).contains(&at_ms)
    }

    /// One step that covers two, and the time between them.
    fn merged(self, other: Self) -> Self {
        let overlap = self.from_ms <= other.to_ms && other.from_ms <= self.to_ms;
        let by_ms = if overlap { self.by_ms.saturating_add(other.by_ms) } else { self.by_ms.max(other.by_ms) };
        Self { from_ms: self.from_ms.min(other.from_ms), to_ms: self.to_ms.max(other.to_ms), by_ms }
    }
}

/// The steps whose completions are still remembered, the oldest first. Small, because each call copies it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Steps([Step; MAX_STEPS]);

impl Steps {
    /// `None` if there are more than [`MAX_STEPS`].
    pub(crate) fn of(steps: &[Step]) -> Option<Self> {
        let mut all = Self::default();
        all.0.get_mut(..steps.len())?.copy_from_slice(steps);
        Some(all)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = Step> {
        self.0.iter().copied().filter(|step| step.by_ms > 0)
    }

    /// The time that an event at `at_ms` counts as. All matching steps add up: if the clock stepped again before the
    /// first step was confirmed, events between the two are shifted by both.
    #[inline]
    pub(crate) fn counted_ms(&self, at_ms: u64) -> u64 {
        // Fast path: most stores have no steps.
        if self.0[0].by_ms == 0 { at_ms } else { self.shifted_ms(at_ms) }
    }

    fn shifted_ms(&self, at_ms: u64) -> u64 {
        self.iter().filter(|step| step.shifts(at_ms)).fold(at_ms, |ms, step| ms.saturating_add(step.by_ms))
    }

    /// The latest time that an event in `first_ms..=last_ms` can count as.
    pub(crate) fn newest_counted_ms(&self, first_ms: u64, last_ms: u64) -> u64 {
        let ends = self.iter().map(|step| step.to_ms).filter(|to_ms| (first_ms..=last_ms).contains(to_ms));
        ends.chain([last_ms]).map(|ms| self.shifted_ms(ms)).fold(last_ms, u64::max)
    }

    /// The steps without those whose completions have all expired.
    pub(crate) fn pruned(&self, time_ms: u64, window_ms: u64) -> Self {
        self.pruned_before(Step { from_ms: u64::MAX, ..Step::default() }, time_ms, window_ms)
    }

    /// As [`Steps::pruned`], before `next` is added: also keeps a step if `next` shifts some of its completions further.
    pub(crate) fn pruned_before(&self, next: Step, time_ms: u64, window_ms: u64) -> Self {
        let mut pruned = Self::default();
        let newest_ms = |step: &Step| self.newest_counted_ms(step.from_ms, step.to_ms);
        let is_living = |step: &Step| time_ms < newest_ms(step).saturating_add(window_ms);
        let living = self.iter().filter(|step| next.from_ms <= step.to_ms || is_living(step));
        pruned.0.iter_mut().zip(living).for_each(|(entry, step)| *entry = step);
        pruned
    }

    /// The steps with one more. If there is no room, two neighbours are merged into a step of at most `mergeable_ms`,
    /// which remembers some completions for that much longer. `None` if no two steps are that small.
    pub(crate) fn with(&self, step: Step, mergeable_ms: u64) -> Option<Self> {
        let mut steps: Vec<Step> = self.iter().chain([step]).collect();
        if steps.len() > MAX_STEPS {
            let merged_ms = |pair: &[Step]| match *pair {
                [earlier, later] => earlier.merged(later).by_ms,
                _ => u64::MAX,
            };
            let (index, by_ms) = steps.windows(2).map(merged_ms).enumerate().min_by_key(|(_, by_ms)| *by_ms)?;
            if by_ms > mergeable_ms {
                return None;
            }
            let later = steps.remove(index + 1);
            let earlier = steps.get_mut(index)?;
            *earlier = earlier.merged(later);
        }
        Self::of(&steps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(from_ms: u64, to_ms: u64, by_ms: u64) -> Step {
        Step { from_ms, to_ms, by_ms }
    }

    #[test]
    fn a_step_shifts_only_the_completions_in_its_range() {
        let steps = Steps::of(&[step(100, 200, 1_000)]).unwrap();
        for (at_ms, counted_ms) in [(99, 99), (100, 1_100), (200, 1_200), (201, 201)] {
            assert_eq!(steps.counted_ms(at_ms), counted_ms, "{at_ms}");
            assert_eq!(Steps::default().counted_ms(at_ms), at_ms);
        }
        for ((first_ms, last_ms), newest_ms) in
            [((0, 99), 99), ((0, 150), 1_150), ((150, 500), 1_200), ((150, 5_000), 5_000), ((201, 300), 300)]
        {
            assert_eq!(steps.newest_counted_ms(first_ms, last_ms), newest_ms, "{first_ms} to {last_ms}");
        }
        let overlapping = Steps::of(&[step(100, 200, 1_000), step(150, 300, 500)]).unwrap();
        assert_eq!(overlapping.counted_ms(160), 1_660, "both steps shift it");
        assert_eq!((overlapping.counted_ms(140), overlapping.counted_ms(250)), (1_140, 750));
        assert_eq!(overlapping.newest_counted_ms(100, 300), 1_700);
    }

    #[test]
    fn a_step_is_kept_if_the_next_one_shifts_its_completions_further() {
        let steps = Steps::of(&[step(100, 200, 1_000)]).unwrap();
        for (from_ms, expected) in [(150, steps), (200, steps), (201, Steps::default())] {
            assert_eq!(steps.pruned_before(step(from_ms, 300, 9_000), 10_000, 500), expected, "from {from_ms}");
        }
    }

    #[test]
    fn a_step_is_pruned_when_its_last_completion_expires() {
        let steps = Steps::of(&[step(100, 200, 1_000), step(5_000, 5_100, 50)]).unwrap();
        assert_eq!(steps.pruned(6_199, 5_000), steps);
        let left = steps.pruned(6_200, 5_000);
        assert_eq!(left.iter().collect::<Vec<_>>(), [step(5_000, 5_100, 50)]);
        assert_eq!(left.counted_ms(5_050), 5_100, "the remaining step still applies");
        assert_eq!(steps.pruned(u64::MAX, u64::MAX), Steps::default());
    }

    #[test]
    fn a_fourth_step_is_merged_with_a_neighbour_or_rejected() {
        let three = [step(100, 200, 50), step(1_000, 1_100, 70), step(2_000, 2_100, 900)];
        let steps = Steps::of(&three).unwrap();
        let fourth = step(3_000, 3_100, 60);
        assert_eq!(steps.with(fourth, 69), None);
        let merged = steps.with(fourth, 70).unwrap();
        assert_eq!(merged.iter().collect::<Vec<_>>(), [step(100, 1_100, 70), three[2], fourth]);
        let only_one = Steps::default().with(fourth, 0).unwrap();
        assert_eq!(only_one.iter().collect::<Vec<_>>(), [fourth]);
        assert_eq!(Steps::of(&[fourth; 4]), None);
        let nested = Steps::of(&[step(1_000, 1_100, 30), step(1_000, 1_200, 40), three[2]]).unwrap();
        let merged = nested.with(step(9_000, 9_100, 950), 100).unwrap();
        assert_eq!(merged.iter().next(), Some(step(1_000, 1_200, 70)), "overlapping steps add up");
    }
}
