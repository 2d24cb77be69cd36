//! The store's time without stream time: elapsed time, corrected by the wall clock.
//!
//! [`Course`] implements the rule (decision 16): from readings of the clocks it computes the offset of the store's
//! time to the monotonic clock. [`WallTime`] shares it between threads; a reading that changes nothing takes no lock.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use super::steps::{Step, Steps};
use super::{BootTime, Clock, MAX_WALL_MS, Now, Saved, YEAR, millis};
use crate::config::Span;

/// Largest difference between wall clock and store's time that is not a deviation. Ahead: in total within
/// [`CONFIRMED_AFTER_MS`]; behind: at any moment.
const TOLERANCE_MS: u64 = 1_000;

/// How long every reading must deviate before the store's time follows the wall clock.
const CONFIRMED_AFTER_MS: u64 = 10 * 60 * 1_000;

/// Smaller differences between the boot clock and the monotonic clock are not suspended time: the two are not read at
/// the same moment.
const MIN_SLEEP_MS: u64 = 10;

/// Largest time between the two readings of the monotonic clock that enclose the readings of the other clocks.
const READING_MS: u64 = 10;

/// A difference between the wall clock and the store's time that is not confirmed yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Deviation {
    pub(crate) is_ahead: bool,
    /// The store's time at the first reading.
    pub(crate) since_ms: u64,
    /// The smallest deviation of all readings since `measured_since_ms`.
    pub(crate) least_ms: u64,
    /// The store's time at the first reading that counts for `least_ms`. Later than `since_ms` if there was no room
    /// for a step and the measurement began again.
    pub(crate) measured_since_ms: u64,
    /// The wall clock at that reading.
    pub(crate) first_wall_ms: u64,
    /// The store's time when the wall clock may have stepped ahead a second time. 0 if it has not.
    pub(crate) grown_since_ms: u64,
}

impl Deviation {
    fn begun(is_ahead: bool, by_ms: u64, since_ms: u64, time_ms: u64, wall_ms: u64) -> Self {
        Self {
            is_ahead,
            since_ms,
            least_ms: by_ms,
            measured_since_ms: time_ms,
            first_wall_ms: wall_ms,
            grown_since_ms: 0,
        }
    }

    /// Adds a reading in the same direction.
    fn with(self, by_ms: u64, since_ms: u64) -> Self {
        let grown_since_ms = match self.grown_since_ms {
            // All earlier readings were larger.
            _ if by_ms.saturating_add(TOLERANCE_MS) < self.least_ms => self.since_ms,
            0 if by_ms > self.least_ms.saturating_add(TOLERANCE_MS) => since_ms,
            grown_since_ms => grown_since_ms,
        };
        Self { least_ms: self.least_ms.min(by_ms), grown_since_ms, ..self }
    }
}

/// The state of the clocks that is stored for the next open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct ClockState {
    /// The boot clock at the moment of this state.
    pub(crate) boot: Option<BootTime>,
    /// How far the store's time permanently leads the wall clock, because the retention floor limited a step back.
    pub(crate) lead_ms: u64,
    pub(crate) deviation: Option<Deviation>,
    pub(crate) steps: Steps,
}

/// A reading of all clocks.
#[derive(Debug, Clone, Copy)]
struct Reading {
    wall_ms: u64,
    monotonic_ms: u64,
    boot: Option<BootTime>,
}

impl Reading {
    /// Reads the wall clock first and the monotonic clock last, and repeats if too much time passed in between. In
    /// this order a thread that is descheduled in between sees a wall clock that is too slow, never one that is
    /// ahead.
    fn take(clock: &dyn Clock) -> Self {
        let mut tries = 3;
        loop {
            let before_ms = clock.monotonic_ms();
            let (wall_ms, boot, monotonic_ms) = (wall_ms(clock), clock.boot(), clock.monotonic_ms());
            tries -= 1;
            if tries == 0 || monotonic_ms.saturating_sub(before_ms) <= READING_MS {
                return Self { wall_ms, monotonic_ms, boot };
            }
        }
    }
}

fn wall_ms(clock: &dyn Clock) -> u64 {
    clock.wall().as_unix_ms().min(MAX_WALL_MS)
}

fn time_ms(offset_ms: i64, monotonic_ms: u64) -> u64 {
    (monotonic_ms.min(MAX_WALL_MS) as i64).saturating_add(offset_ms).clamp(0, MAX_WALL_MS as i64) as u64
}

/// How far the wall clock is ahead of its expected value, which is the store's time minus `lead_ms`.
fn ahead_ms(wall_ms: u64, lead_ms: u64, time_ms: u64) -> i64 {
    wall_ms as i64 + lead_ms as i64 - time_ms as i64
}

/// A snapshot of the course, for calls that take no lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Anchor {
    offset_ms: i64,
    lead_ms: u64,
    floor_ms: u64,
    steps: Steps,
    /// A reading changes nothing if the wall clock is ahead by `min_ahead_ms..=max_ahead_ms` and the store's time is
    /// before `until_ms`.
    min_ahead_ms: i64,
    max_ahead_ms: i64,
    until_ms: u64,
}

impl Anchor {
    fn expects(&self, wall_ms: u64, monotonic_ms: u64) -> bool {
        let time_ms = time_ms(self.offset_ms, monotonic_ms);
        let ahead_ms = ahead_ms(wall_ms, self.lead_ms, time_ms);
        self.min_ahead_ms <= ahead_ms && ahead_ms <= self.max_ahead_ms && time_ms < self.until_ms
    }

    fn at(&self, monotonic_ms: u64) -> Now {
        // Clamped, because this reading may be older than a step back to the floor.
        let time_ms = time_ms(self.offset_ms, monotonic_ms).max(self.floor_ms);
        Now { time_ms, monotonic_ms, remembers_since_ms: self.floor_ms, steps: self.steps }
    }
}

/// The store's time and the recent deviation of the wall clock.
#[derive(Debug)]
struct Course {
    span: Span,
    /// The store's time minus the monotonic clock.
    offset_ms: i64,
    lead_ms: u64,
    /// Completions before this are forgotten permanently.
    floor_ms: u64,
    steps: Steps,
    deviation: Option<Deviation>,
    /// The newest time of a key when this process opened the store, or when the store's time last went back.
    newest_ms: u64,
    /// How far the store's time followed the wall clock since `following_since_ms`.
    followed_ms: u64,
    following_since_ms: u64,
    /// The store's time when this process opened the store.
    resumed_ms: u64,
    /// The last comparison of the boot clock and the monotonic clock.
    compared: Option<(BootTime, u64)>,
}

impl Course {
    /// Continues from the stored state. A new store starts with the wall clock.
    fn resume(saved: &Saved, state: &ClockState, span: Span, reading: &Reading) -> Self {
        let elapsed_ms = match (state.boot, reading.boot) {
            (Some(then), Some(now)) if then.id == now.id => now.ms.checked_sub(then.ms),
            _ => None,
        };
        let mut course = Self {
            span,
            offset_ms: 0,
            lead_ms: state.lead_ms,
            floor_ms: saved.floor_ms,
            steps: state.steps,
            deviation: state.deviation,
            newest_ms: saved.newest_ms,
            followed_ms: 0,
            following_since_ms: 0,
            resumed_ms: 0,
            compared: None,
        };
        let resumed_ms = match saved.time_ms {
            0 => reading.wall_ms,
            saved_ms => saved_ms.saturating_add(elapsed_ms.unwrap_or(0)),
        };
        // A small difference is corrected at once: no call has seen a time since the close.
        let wall_ms = reading.wall_ms.saturating_add(state.lead_ms);
        let is_near = wall_ms.abs_diff(resumed_ms) <= TOLERANCE_MS;
        let begins_ms = if is_near { wall_ms.max(saved.time_ms) } else { resumed_ms };
        course.set(begins_ms.max(saved.floor_ms), reading);
        course.resumed_ms = course.time_ms(reading);
        course.observe(reading);
        if elapsed_ms.is_none() {
            course.confirm_by_two_opens(state.deviation, reading);
        }
        course
    }

    fn time_ms(&self, reading: &Reading) -> u64 {
        time_ms(self.offset_ms, reading.monotonic_ms)
    }

    fn set(&mut self, time_ms: u64, reading: &Reading) {
        self.offset_ms = time_ms.min(MAX_WALL_MS) as i64 - reading.monotonic_ms.min(MAX_WALL_MS) as i64;
    }

    /// Applies a reading. True if a change must be saved for the next open.
    fn observe(&mut self, reading: &Reading) -> bool {
        self.add_sleep(reading);
        let time_ms = self.time_ms(reading);
        self.steps = self.steps.pruned(time_ms, self.span.window_ms);
        let ahead_ms = ahead_ms(reading.wall_ms, self.lead_ms, time_ms);
        let (is_ahead, by_ms) = (ahead_ms > 0, ahead_ms.unsigned_abs());
        let tolerated_ms = if is_ahead { self.may_follow_ms(time_ms) } else { TOLERANCE_MS };
        if by_ms <= tolerated_ms {
            if is_ahead {
                self.follow(by_ms, time_ms, reading);
            }
            return self.deviation.take().is_some();
        }
        let before = self.deviation;
        let deviation = match before {
            // A clock that falls further behind is stopped or slow. Its deviation cannot be confirmed.
            Some(known) if known.is_ahead == is_ahead && (is_ahead || by_ms <= known.least_ms + TOLERANCE_MS) => {
                known.with(by_ms, self.since_ms(time_ms))
            }
            _ => {
                // Logged once a direction, because the deviation of a stopped clock begins again and again.
                if before.is_none_or(|known| known.is_ahead != is_ahead) {
                    report_deviation(is_ahead, by_ms);
                }
                Deviation::begun(is_ahead, by_ms, self.since_ms(time_ms), time_ms, reading.wall_ms)
            }
        };
        self.deviation = Some(deviation);
        let measured_ms = time_ms.saturating_sub(deviation.measured_since_ms);
        if measured_ms >= CONFIRMED_AFTER_MS && self.confirm(deviation, by_ms, reading) {
            self.observe_rest(deviation, reading);
            return true;
        }
        before != self.deviation
    }

    /// Applies the reading again after a deviation was confirmed. If the wall clock is still ahead, it stepped a
    /// second time; the next step then also shifts the completions since that second step.
    fn observe_rest(&mut self, confirmed: Deviation, reading: &Reading) {
        self.observe(reading);
        let is_rest = |rest: &&mut Deviation| rest.is_ahead && confirmed.is_ahead && confirmed.grown_since_ms > 0;
        if let Some(rest) = self.deviation.as_mut().filter(is_rest) {
            rest.since_ms = confirmed.grown_since_ms;
        }
    }

    /// The earliest time since when the wall clock may have had its present deviation. It includes completions that
    /// were waiting for a sync when the clock stepped, but none from before this process.
    fn since_ms(&self, time_ms: u64) -> u64 {
        time_ms.saturating_sub(TOLERANCE_MS).max(self.resumed_ms).min(time_ms)
    }

    /// Adds the time that the machine was suspended, during which the monotonic clock stops.
    fn add_sleep(&mut self, reading: &Reading) {
        let Reading { monotonic_ms, boot, .. } = *reading;
        match (self.compared, boot) {
            (Some((then, then_monotonic_ms)), Some(now)) if then.id == now.id => {
                let elapsed_ms = now.ms.saturating_sub(then.ms);
                let slept_ms = elapsed_ms.saturating_sub(monotonic_ms.saturating_sub(then_monotonic_ms));
                if slept_ms >= MIN_SLEEP_MS {
                    self.set(self.time_ms(reading).saturating_add(slept_ms), reading);
                    self.compared = Some((now, monotonic_ms));
                }
            }
            _ => self.compared = boot.map(|boot| (boot, monotonic_ms)),
        }
    }

    /// How far ahead the wall clock may be to be followed at once.
    fn may_follow_ms(&self, time_ms: u64) -> u64 {
        let is_fresh = time_ms.abs_diff(self.following_since_ms) >= CONFIRMED_AFTER_MS;
        if is_fresh { TOLERANCE_MS } else { TOLERANCE_MS.saturating_sub(self.followed_ms) }
    }

    fn follow(&mut self, by_ms: u64, time_ms: u64, reading: &Reading) {
        if time_ms.abs_diff(self.following_since_ms) >= CONFIRMED_AFTER_MS {
            (self.followed_ms, self.following_since_ms) = (0, time_ms);
        }
        self.followed_ms += by_ms;
        self.set(time_ms.saturating_add(by_ms), reading);
    }

    /// Applies a confirmed deviation; `by_ms` is its present size. False if there is no room for another step: then
    /// the measurement begins again.
    fn confirm(&mut self, deviation: Deviation, by_ms: u64, reading: &Reading) -> bool {
        let time_ms = self.time_ms(reading);
        if !deviation.is_ahead {
            self.go_back(deviation.least_ms, time_ms, reading);
        } else if !self.step_forward(deviation, time_ms, reading) {
            self.deviation = Some(Deviation::begun(true, by_ms, deviation.since_ms, time_ms, reading.wall_ms));
            return false;
        }
        self.deviation = None;
        (self.followed_ms, self.following_since_ms) = (0, self.time_ms(reading));
        true
    }

    fn step_forward(&mut self, deviation: Deviation, time_ms: u64, reading: &Reading) -> bool {
        let Some(by_ms) = deviation.least_ms.checked_sub(self.lead_ms).filter(|by_ms| *by_ms > 0) else {
            // The wall clock has come nearer to the store's time, but is still behind it.
            self.lead_ms = self.lead_ms.saturating_sub(deviation.least_ms);
            return true;
        };
        let stepped_ms = time_ms.saturating_add(by_ms).min(MAX_WALL_MS);
        if by_ms > TOLERANCE_MS {
            // `newest_ms` covers work that began before the store's time went back and keeps its later time. The tolerance
            // covers threads that read the clocks before the step and use the reading after it.
            let to_ms = time_ms.max(self.newest_ms).saturating_add(TOLERANCE_MS).min(MAX_WALL_MS);
            let step = Step { from_ms: deviation.since_ms, to_ms, by_ms };
            let others = self.steps.pruned_before(step, stepped_ms, self.span.window_ms);
            let Some(steps) = others.with(step, self.span.bucket_ms) else { return false };
            self.steps = steps;
        }
        self.lead_ms = 0;
        self.set(stepped_ms, reading);
        tracing::info!(by_ms, now_ms = stepped_ms, "stepping the store's time forward to the confirmed wall clock");
        true
    }

    fn go_back(&mut self, by_ms: u64, time_ms: u64, reading: &Reading) {
        let floor_ms = floor_ms(self.floor_ms, time_ms, self.span.window_ms);
        let wall_ms = time_ms.saturating_sub(self.lead_ms).saturating_sub(by_ms);
        let back_to_ms = match self.lead_ms {
            _ if wall_ms >= floor_ms => wall_ms,
            0 => floor_ms.min(time_ms),
            // It already went back to the floor once. Repeated steps back would keep keys from expiring.
            _ => time_ms,
        };
        self.floor_ms = floor_ms;
        self.newest_ms = self.newest_ms.max(time_ms);
        self.lead_ms = back_to_ms.saturating_sub(wall_ms);
        self.resumed_ms = self.resumed_ms.min(back_to_ms);
        self.set(back_to_ms, reading);
        let (back_ms, ahead_ms) = (time_ms - back_to_ms, self.lead_ms);
        if ahead_ms == 0 {
            tracing::warn!(back_ms, "stepping the store's time back to the confirmed wall clock");
        } else {
            tracing::warn!(
                back_ms,
                ahead_ms,
                remembers_since_ms = floor_ms,
                "the wall clock was too far ahead before: the store's time stays ahead of it, and completions before \
                 `remembers_since_ms` are forgotten; only a new store starts with the correct time"
            );
        }
    }

    /// Without a boot clock, confirms a wall clock that was ahead at two opens that are far enough apart by the wall
    /// clock itself. Otherwise short-lived processes could never confirm a deviation.
    fn confirm_by_two_opens(&mut self, stored: Option<Deviation>, reading: &Reading) {
        let (Some(stored), Some(deviation)) = (stored, self.deviation) else { return };
        let is_same = stored.measured_since_ms == deviation.measured_since_ms && deviation.is_ahead;
        let is_far_apart = reading.wall_ms.saturating_sub(deviation.first_wall_ms) >= CONFIRMED_AFTER_MS;
        let by_ms = ahead_ms(reading.wall_ms, self.lead_ms, self.time_ms(reading)).unsigned_abs();
        if is_same && is_far_apart && deviation.least_ms <= millis(YEAR) && self.confirm(deviation, by_ms, reading) {
            self.observe_rest(deviation, reading);
        }
    }

    fn anchor(&self) -> Anchor {
        let unlimited = i64::MAX;
        let (min_ahead_ms, max_ahead_ms, until_ms) = match self.deviation {
            None => (-(TOLERANCE_MS as i64), 0, u64::MAX),
            Some(Deviation { is_ahead, measured_since_ms, least_ms, grown_since_ms, .. }) => {
                // A second step must be noticed when it happens.
                let max_ms =
                    if grown_since_ms == 0 { (least_ms as i64).saturating_add(TOLERANCE_MS as i64) } else { unlimited };
                let least_ms = least_ms as i64;
                let until_ms = measured_since_ms.saturating_add(CONFIRMED_AFTER_MS);
                let behind_ms = -least_ms - TOLERANCE_MS as i64;
                if is_ahead { (least_ms, max_ms, until_ms) } else { (behind_ms, -least_ms, until_ms) }
            }
        };
        let Self { offset_ms, lead_ms, floor_ms, steps, .. } = *self;
        Anchor { offset_ms, lead_ms, floor_ms, steps, min_ahead_ms, max_ahead_ms, until_ms }
    }
}

fn report_deviation(is_ahead: bool, by_ms: u64) {
    let minutes = CONFIRMED_AFTER_MS / 60_000;
    if is_ahead {
        tracing::info!(by_ms, "the wall clock is ahead of the store's time, which follows it after {minutes} minutes");
    } else {
        tracing::warn!(
            by_ms,
            "the wall clock is behind the store's time, which goes back to it after {minutes} minutes"
        );
    }
}

/// The retention floor: everything before it has expired. It never decreases.
pub(super) fn floor_ms(before_ms: u64, time_ms: u64, window_ms: u64) -> u64 {
    before_ms.max(time_ms.saturating_add(1).saturating_sub(window_ms))
}

/// The store's time, shared between threads.
pub(super) struct WallTime {
    clock: Arc<dyn Clock>,
    anchor: ArcSwap<Anchor>,
    course: Mutex<Course>,
    changes: AtomicU64,
}

impl WallTime {
    pub(super) fn resume(clock: Arc<dyn Clock>, saved: &Saved, state: &ClockState, span: Span) -> Self {
        let course = Course::resume(saved, state, span, &Reading::take(&*clock));
        let anchor = ArcSwap::from_pointee(course.anchor());
        Self { clock, anchor, course: Mutex::new(course), changes: AtomicU64::new(0) }
    }

    pub(super) fn now(&self) -> Now {
        let wall_ms = wall_ms(&*self.clock);
        let monotonic_ms = self.clock.monotonic_ms();
        // Loaded after the clocks are read: a reading from after a step must not be combined with the offset from
        // before it.
        let anchor = self.anchor.load();
        if anchor.expects(wall_ms, monotonic_ms) { anchor.at(monotonic_ms) } else { self.observe() }
    }

    /// Reads all clocks and applies the reading.
    pub(super) fn observe(&self) -> Now {
        let mut course = self.course.lock();
        let reading = self.observe_with(&mut course);
        course.anchor().at(reading.monotonic_ms)
    }

    fn observe_with(&self, course: &mut Course) -> Reading {
        let reading = Reading::take(&*self.clock);
        if course.observe(&reading) {
            // Counted before the new anchor is published: a write that depends on the change must not be written
            // without it.
            self.changes.fetch_add(1, Ordering::AcqRel);
        }
        let anchor = course.anchor();
        if **self.anchor.load() != anchor {
            self.anchor.store(Arc::new(anchor));
        }
        reading
    }

    /// A counter of changes that must be saved for the next open.
    pub(super) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// The state to store for the next open.
    pub(super) fn save(&self) -> (Saved, ClockState) {
        let mut course = self.course.lock();
        let reading = self.observe_with(&mut course);
        let time_ms = course.time_ms(&reading);
        let floor_ms = floor_ms(course.floor_ms, time_ms, course.span.window_ms);
        let Course { lead_ms, deviation, steps, .. } = *course;
        (
            Saved { time_ms, floor_ms, newest_ms: course.newest_ms },
            ClockState { boot: reading.boot, lead_ms, deviation, steps },
        )
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::clock::ManualClock;

    const SPAN: Span = Span { window_ms: 3_600_000, bucket_ms: 360_000 };
    const START_MS: u64 = 1_700_000_000_000;

    fn begun(clock: &ManualClock) -> WallTime {
        WallTime::resume(Arc::new(clock.clone()), &Saved::default(), &ClockState::default(), SPAN)
    }

    /// A clock whose reader is descheduled between two readings.
    struct Stuttering {
        inner: ManualClock,
        readings: AtomicU64,
        by_ms: u64,
    }

    impl Clock for Stuttering {
        fn wall(&self) -> onlyonce_core::Timestamp {
            self.inner.wall()
        }

        fn monotonic_ms(&self) -> u64 {
            // The thread is descheduled before every third reading.
            if self.readings.fetch_add(1, Ordering::SeqCst) % 3 == 2 {
                self.inner.advance(Duration::from_millis(self.by_ms));
            }
            self.inner.monotonic_ms()
        }
    }

    #[test]
    fn a_thread_that_is_descheduled_between_two_clock_readings_sees_no_deviation() {
        let inner = ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(START_MS));
        let clock = Arc::new(Stuttering { inner: inner.clone(), readings: AtomicU64::new(0), by_ms: 3_000 });
        let wall = WallTime::resume(clock, &Saved::default(), &ClockState::default(), SPAN);
        for _ in 0..1_000 {
            wall.now();
            let course = wall.course.lock();
            assert_eq!(course.deviation, None);
            assert_eq!(course.offset_ms, START_MS as i64, "the store's time does not move");
        }
    }

    #[test]
    fn the_time_follows_a_drifting_wall_clock() {
        for drift_ppm in [-50_i64, 50, 500] {
            let clock = ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(START_MS));
            let wall = begun(&clock);
            for minute in 1..=7 * 24 * 60_u64 {
                clock.advance(Duration::from_secs(60));
                let drifted_ms = minute as i64 * 60_000 * drift_ppm / 1_000_000;
                clock.set_wall(onlyonce_core::Timestamp::from_unix_ms(
                    (START_MS + minute * 60_000).saturating_add_signed(drifted_ms),
                ));
                let off_ms = wall.now().time_ms.abs_diff(clock.wall().as_unix_ms());
                assert!(off_ms <= 2 * TOLERANCE_MS, "{drift_ppm} ppm, minute {minute}: {off_ms} ms");
            }
        }
    }

    #[test]
    fn the_time_never_goes_back_while_threads_follow_small_steps_concurrently() {
        let clock = ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(START_MS));
        let wall = begun(&clock);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    let mut last_ms = 0;
                    for _ in 0..20_000 {
                        let now_ms = wall.now().time_ms;
                        assert!(now_ms >= last_ms, "{now_ms} after {last_ms}");
                        last_ms = now_ms;
                    }
                });
            }
            for step in 0..5_000_u64 {
                clock.advance(Duration::from_millis(step % 7));
                clock.set_wall(onlyonce_core::Timestamp::from_unix_ms(clock.wall().as_unix_ms() + step % 2));
            }
        });
        assert!(wall.now().time_ms >= START_MS + 5_000 * 3 - 7, "the time advanced");
    }

    /// Arbitrary clock readings.
    fn any_readings() -> impl Strategy<Value = Vec<Reading>> {
        let near = |around_ms: u64| {
            prop_oneof![
                4 => (0_u64..4_000).prop_map(move |ms| around_ms + ms),
                2 => (0_u64..4_000_000).prop_map(move |ms| around_ms + ms),
                1 => any::<u64>(),
            ]
        };
        let boot = prop_oneof![
            2 => Just(None),
            5 => (0_u8..2, near(1_000)).prop_map(|(id, ms)| Some(BootTime { id: [id; 16], ms })),
        ];
        let reading = (near(START_MS), near(0), boot).prop_map(|(wall_ms, monotonic_ms, boot)| Reading {
            wall_ms: wall_ms.min(MAX_WALL_MS),
            monotonic_ms,
            boot,
        });
        proptest::collection::vec(reading, 1..60)
    }

    fn any_saved() -> impl Strategy<Value = (Saved, ClockState)> {
        let ms = || prop_oneof![0..=MAX_WALL_MS, START_MS..START_MS + 10_000_000, Just(0)];
        let deviation = (any::<bool>(), ms(), ms(), ms(), ms(), ms());
        let deviation =
            deviation.prop_map(|(is_ahead, since_ms, least_ms, measured_since_ms, first_wall_ms, grown_since_ms)| {
                Deviation { is_ahead, since_ms, least_ms, measured_since_ms, first_wall_ms, grown_since_ms }
            });
        let step = (ms(), ms(), 1..=MAX_WALL_MS).prop_map(|(from_ms, to_ms, by_ms)| Step { from_ms, to_ms, by_ms });
        let steps = proptest::collection::vec(step, 0..=3);
        let boot = proptest::option::of((0_u8..2, any::<u64>()).prop_map(|(id, ms)| BootTime { id: [id; 16], ms }));
        (ms(), ms(), ms(), boot, ms(), proptest::option::of(deviation), steps).prop_map(
            |(time_ms, floor_ms, newest_ms, boot, lead_ms, deviation, steps)| {
                let steps = Steps::of(&steps).unwrap_or_default();
                let saved = Saved { time_ms, floor_ms: floor_ms.min(time_ms), newest_ms };
                (saved, ClockState { boot, lead_ms, deviation, steps })
            },
        )
    }

    proptest! {
        #[test]
        fn the_time_stays_in_range_and_above_the_floor_for_any_readings(
            (saved, state) in any_saved(), readings in any_readings(),
        ) {
            let mut course = Course::resume(&saved, &state, SPAN, &readings[0]);
            let mut floor = 0;
            for reading in &readings {
                let before_ms = course.time_ms(reading);
                // Simulates a monotonic clock that advances.
                course.set(before_ms.max(course.floor_ms), reading);
                course.observe(reading);
                let time_ms = course.time_ms(reading);
                prop_assert!(time_ms <= MAX_WALL_MS && course.floor_ms <= time_ms && floor <= course.floor_ms);
                floor = course.floor_ms;
                course.observe(reading);
                prop_assert_eq!(course.time_ms(reading), time_ms, "a repeated reading changes nothing");
            }
        }

        #[test]
        fn readings_without_the_lock_change_nothing((saved, state) in any_saved(), readings in any_readings()) {
            let mut course = Course::resume(&saved, &state, SPAN, &readings[0]);
            for reading in &readings {
                let anchor = course.anchor();
                // Calls do not read the boot clock.
                let call_reading = Reading { boot: None, ..*reading };
                let is_expected = anchor.expects(reading.wall_ms, reading.monotonic_ms);
                let (steps, expected) = (course.steps, anchor.at(reading.monotonic_ms));
                let changed = course.observe(&call_reading);
                if is_expected {
                    prop_assert!(!changed);
                    // Expired steps may be pruned at any time.
                    prop_assert_eq!(course.anchor(), Anchor { steps: course.steps, ..anchor });
                    prop_assert_eq!(course.anchor().at(reading.monotonic_ms), Now { steps: course.steps, ..expected });
                    prop_assert!(steps.iter().count() >= course.steps.iter().count());
                }
                course.observe(reading);
            }
        }
    }
}
