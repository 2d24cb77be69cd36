//! The store's time where no message drives it: elapsed time, which the wall clock corrects.
//!
//! [`Course`] is the rule (decision 16): readings of the clocks in, the offset of the store's time to the monotonic clock out. [`WallTime`]
//! lets many threads read it. A reading that changes nothing takes no lock.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use super::steps::{Step, Steps};
use super::{BootTime, Clock, MAX_WALL_MS, Now, Saved, YEAR, millis};
use crate::config::Span;

/// How far the wall clock may be from the store's time without being doubted: ahead, in all of [`CONFIRMED_AFTER_MS`]; behind, at any
/// moment.
const TOLERANCE_MS: u64 = 1_000;

/// For how much elapsed time every reading must deviate before the store's time moves because of them.
const CONFIRMED_AFTER_MS: u64 = 10 * 60 * 1_000;

/// Less of a difference between the boot clock and the monotonic one is no suspended time: they are read one after the other.
const LEAST_SLEEP_MS: u64 = 10;

/// How far apart two readings of the monotonic clock may be that enclose readings of the others.
const READING_MS: u64 = 10;

/// A wall clock that is not where the store's time is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Deviation {
    pub(crate) is_ahead: bool,
    /// The store's time at the first reading.
    pub(crate) since_ms: u64,
    /// The smallest deviation of all readings since `measured_since_ms`.
    pub(crate) least_ms: u64,
    /// The store's time at the first reading that `least_ms` is of. Later than `since_ms` where a step found no room.
    pub(crate) measured_since_ms: u64,
    /// The wall clock at that reading.
    pub(crate) first_wall_ms: u64,
    /// The store's time when the wall clock may have stepped further ahead. 0 if it has not.
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

    /// The same with another reading, in the same direction.
    fn with(self, by_ms: u64, since_ms: u64) -> Self {
        let grown_since_ms = match self.grown_since_ms {
            // All that was read before was more.
            _ if by_ms.saturating_add(TOLERANCE_MS) < self.least_ms => self.since_ms,
            0 if by_ms > self.least_ms.saturating_add(TOLERANCE_MS) => since_ms,
            grown_since_ms => grown_since_ms,
        };
        Self { least_ms: self.least_ms.min(by_ms), grown_since_ms, ..self }
    }
}

/// What the next opening needs to know of the clocks, beside the store's time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct ClockState {
    /// When this was so, by a clock that runs across processes.
    pub(crate) boot: Option<BootTime>,
    /// How far the store's time is ahead of the wall clock for good: it went back as far as it could.
    pub(crate) lead_ms: u64,
    pub(crate) deviation: Option<Deviation>,
    pub(crate) steps: Steps,
}

/// All clocks at one moment.
#[derive(Debug, Clone, Copy)]
struct Reading {
    wall_ms: u64,
    monotonic_ms: u64,
    boot: Option<BootTime>,
}

impl Reading {
    /// The wall clock first and the monotonic one last. A thread that is suspended in between sees the wall clock too far behind, not
    /// too far ahead; and it reads them again.
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

/// How far the wall clock is ahead of where it should be, which is `lead_ms` before the store's time.
fn ahead_ms(wall_ms: u64, lead_ms: u64, time_ms: u64) -> i64 {
    wall_ms as i64 + lead_ms as i64 - time_ms as i64
}

/// What a call needs to know of the course.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Anchor {
    offset_ms: i64,
    lead_ms: u64,
    floor_ms: u64,
    steps: Steps,
    /// A wall clock that is so far ahead, at least and at most, and before this time, changes nothing.
    least_ahead_ms: i64,
    most_ahead_ms: i64,
    until_ms: u64,
}

impl Anchor {
    fn expects(&self, wall_ms: u64, monotonic_ms: u64) -> bool {
        let time_ms = time_ms(self.offset_ms, monotonic_ms);
        let ahead_ms = ahead_ms(wall_ms, self.lead_ms, time_ms);
        self.least_ahead_ms <= ahead_ms && ahead_ms <= self.most_ahead_ms && time_ms < self.until_ms
    }

    fn at(&self, monotonic_ms: u64) -> Now {
        // A reading of before the time went back to the floor is not below it.
        let time_ms = time_ms(self.offset_ms, monotonic_ms).max(self.floor_ms);
        Now { time_ms, monotonic_ms, remembers_since_ms: self.floor_ms, steps: self.steps }
    }
}

/// Where the store's time is, and what the wall clock has said of it.
#[derive(Debug)]
struct Course {
    span: Span,
    /// The store's time, less the monotonic clock.
    offset_ms: i64,
    lead_ms: u64,
    /// What was completed before this is forgotten for good.
    floor_ms: u64,
    steps: Steps,
    deviation: Option<Deviation>,
    /// No key had a later time when this process began, or when the store's time went back since.
    newest_ms: u64,
    /// How far the wall clock was followed since this time.
    followed_ms: u64,
    following_since_ms: u64,
    /// Where this process went on.
    resumed_ms: u64,
    /// When the boot clock and the monotonic one were compared last.
    compared: Option<(BootTime, u64)>,
}

impl Course {
    /// Goes on where another process stopped. A new store begins with the wall clock.
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
        // A small difference is none: nobody has seen a time since.
        let wall_ms = reading.wall_ms.saturating_add(state.lead_ms);
        let is_near = wall_ms.abs_diff(resumed_ms) <= TOLERANCE_MS;
        let begins_ms = if is_near { wall_ms.max(saved.time_ms) } else { resumed_ms };
        course.set(begins_ms.max(saved.floor_ms), reading);
        course.resumed_ms = course.time_ms(reading);
        course.observe(reading);
        if elapsed_ms.is_none() {
            course.confirm_by_two_openings(state.deviation, reading);
        }
        course
    }

    fn time_ms(&self, reading: &Reading) -> u64 {
        time_ms(self.offset_ms, reading.monotonic_ms)
    }

    fn set(&mut self, time_ms: u64, reading: &Reading) {
        self.offset_ms = time_ms.min(MAX_WALL_MS) as i64 - reading.monotonic_ms.min(MAX_WALL_MS) as i64;
    }

    /// Takes a reading into account. Whether the next opening must know of a change.
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
            // A clock that falls further behind stands still, or is slow: it says nothing of what time it is.
            Some(known) if known.is_ahead == is_ahead && (is_ahead || by_ms <= known.least_ms + TOLERANCE_MS) => {
                known.with(by_ms, self.since_ms(time_ms))
            }
            _ => {
                // A clock that stands still begins again and again.
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

    /// Goes on after a deviation was confirmed. Where the wall clock is still ahead, it stepped again meanwhile: the next step
    /// carries along what came after that, too.
    fn observe_rest(&mut self, confirmed: Deviation, reading: &Reading) {
        self.observe(reading);
        let is_rest = |rest: &&mut Deviation| rest.is_ahead && confirmed.is_ahead && confirmed.grown_since_ms > 0;
        if let Some(rest) = self.deviation.as_mut().filter(is_rest) {
            rest.since_ms = confirmed.grown_since_ms;
        }
    }

    /// Since when the wall clock may have been as it is read now. A completion that waited for the disk when the clock stepped is
    /// acknowledged after it; none did before this process began.
    fn since_ms(&self, time_ms: u64) -> u64 {
        time_ms.saturating_sub(TOLERANCE_MS).max(self.resumed_ms).min(time_ms)
    }

    /// Adds the time for which the machine was suspended, and its monotonic clock stood still.
    fn add_sleep(&mut self, reading: &Reading) {
        let Reading { monotonic_ms, boot, .. } = *reading;
        match (self.compared, boot) {
            (Some((then, then_monotonic_ms)), Some(now)) if then.id == now.id => {
                let elapsed_ms = now.ms.saturating_sub(then.ms);
                let slept_ms = elapsed_ms.saturating_sub(monotonic_ms.saturating_sub(then_monotonic_ms));
                if slept_ms >= LEAST_SLEEP_MS {
                    self.set(self.time_ms(reading).saturating_add(slept_ms), reading);
                    self.compared = Some((now, monotonic_ms));
                }
            }
            _ => self.compared = boot.map(|boot| (boot, monotonic_ms)),
        }
    }

    /// How far ahead of the store's time the wall clock may be and is followed at once.
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

    /// Lets the wall clock, which deviates by `by_ms` now, count. False where there is no room for another step: then it must be
    /// confirmed once more, for what it has become by then.
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
            // The wall clock has come nearer, and is still behind.
            self.lead_ms = self.lead_ms.saturating_sub(deviation.least_ms);
            return true;
        };
        let stepped_ms = time_ms.saturating_add(by_ms).min(MAX_WALL_MS);
        if by_ms > TOLERANCE_MS {
            // Work that began before the store's time went back keeps its later time when it ends. And some other thread may have
            // read its clocks a moment ago and use what it read a moment later.
            let to_ms = time_ms.max(self.newest_ms).saturating_add(TOLERANCE_MS).min(MAX_WALL_MS);
            let step = Step { from_ms: deviation.since_ms, to_ms, by_ms };
            let others = self.steps.pruned_before(step, stepped_ms, self.span.window_ms);
            let Some(steps) = others.with(step, self.span.bucket_ms) else { return false };
            self.steps = steps;
        }
        self.lead_ms = 0;
        self.set(stepped_ms, reading);
        tracing::info!(by_ms, now_ms = stepped_ms, "the wall clock is confirmed: the store's time steps forward to it");
        true
    }

    fn go_back(&mut self, by_ms: u64, time_ms: u64, reading: &Reading) {
        let floor_ms = floor_ms(self.floor_ms, time_ms, self.span.window_ms);
        let wall_ms = time_ms.saturating_sub(self.lead_ms).saturating_sub(by_ms);
        let back_to_ms = match self.lead_ms {
            _ if wall_ms >= floor_ms => wall_ms,
            0 => floor_ms.min(time_ms),
            // It has gone back as far as it could before. Again and again would keep keys from expiring.
            _ => time_ms,
        };
        self.floor_ms = floor_ms;
        self.newest_ms = self.newest_ms.max(time_ms);
        self.lead_ms = back_to_ms.saturating_sub(wall_ms);
        self.resumed_ms = self.resumed_ms.min(back_to_ms);
        self.set(back_to_ms, reading);
        let (back_ms, ahead_ms) = (time_ms - back_to_ms, self.lead_ms);
        if ahead_ms == 0 {
            tracing::warn!(back_ms, "the wall clock is confirmed: the store's time goes back to it");
        } else {
            tracing::warn!(
                back_ms,
                ahead_ms,
                remembers_since_ms = floor_ms,
                "the wall clock is confirmed, and was too far ahead before: completions before `remembers_since_ms` were forgotten, and the \
                 store's time stays ahead of the wall clock; only a new store begins with the right time"
            );
        }
    }

    /// Where no clock runs across openings, a wall clock that was ahead at two of them, long enough apart by its own account, is
    /// confirmed: processes may be too short for anything else.
    fn confirm_by_two_openings(&mut self, carried: Option<Deviation>, reading: &Reading) {
        let (Some(carried), Some(deviation)) = (carried, self.deviation) else { return };
        let is_the_same = carried.measured_since_ms == deviation.measured_since_ms && deviation.is_ahead;
        let is_apart = reading.wall_ms.saturating_sub(deviation.first_wall_ms) >= CONFIRMED_AFTER_MS;
        let by_ms = ahead_ms(reading.wall_ms, self.lead_ms, self.time_ms(reading)).unsigned_abs();
        if is_the_same && is_apart && deviation.least_ms <= millis(YEAR) && self.confirm(deviation, by_ms, reading) {
            self.observe_rest(deviation, reading);
        }
    }

    fn anchor(&self) -> Anchor {
        let far = i64::MAX;
        let (least_ahead_ms, most_ahead_ms, until_ms) = match self.deviation {
            None => (-(TOLERANCE_MS as i64), 0, u64::MAX),
            Some(Deviation { is_ahead, measured_since_ms, least_ms, grown_since_ms, .. }) => {
                // A second step is to be noticed when it comes.
                let far = if grown_since_ms == 0 { (least_ms as i64).saturating_add(TOLERANCE_MS as i64) } else { far };
                let least_ms = least_ms as i64;
                let until_ms = measured_since_ms.saturating_add(CONFIRMED_AFTER_MS);
                let behind_ms = -least_ms - TOLERANCE_MS as i64;
                if is_ahead { (least_ms, far, until_ms) } else { (behind_ms, -least_ms, until_ms) }
            }
        };
        let Self { offset_ms, lead_ms, floor_ms, steps, .. } = *self;
        Anchor { offset_ms, lead_ms, floor_ms, steps, least_ahead_ms, most_ahead_ms, until_ms }
    }
}

fn report_deviation(is_ahead: bool, by_ms: u64) {
    let minutes = CONFIRMED_AFTER_MS / 60_000;
    if is_ahead {
        tracing::info!(
            by_ms,
            "the wall clock is ahead of the store's time, which follows if this is so for {minutes} minutes"
        );
    } else {
        tracing::warn!(
            by_ms,
            "the wall clock is behind the store's time, which goes back if this is so for {minutes} minutes"
        );
    }
}

/// The time before which everything is forgotten by now: it only rises.
pub(super) fn floor_ms(before_ms: u64, time_ms: u64, window_ms: u64) -> u64 {
    before_ms.max(time_ms.saturating_add(1).saturating_sub(window_ms))
}

/// The store's time, for many threads.
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
        // After the clocks: a reading of after a step must not be used with the offset of before it.
        let anchor = self.anchor.load();
        if anchor.expects(wall_ms, monotonic_ms) { anchor.at(monotonic_ms) } else { self.observe() }
    }

    /// Looks at all clocks.
    pub(super) fn observe(&self) -> Now {
        let mut course = self.course.lock();
        let reading = self.observe_with(&mut course);
        course.anchor().at(reading.monotonic_ms)
    }

    fn observe_with(&self, course: &mut Course) -> Reading {
        let reading = Reading::take(&*self.clock);
        if course.observe(&reading) {
            // Before anybody can use it: what is written because of the change must not be written without it.
            self.changes.fetch_add(1, Ordering::AcqRel);
        }
        let anchor = course.anchor();
        if **self.anchor.load() != anchor {
            self.anchor.store(Arc::new(anchor));
        }
        reading
    }

    /// How often there was something that the next opening must know of.
    pub(super) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// What the next opening must know.
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

    /// A clock that shows another time each time it is asked.
    struct Stuttering {
        inner: ManualClock,
        asked: AtomicU64,
        by_ms: u64,
    }

    impl Clock for Stuttering {
        fn wall(&self) -> onlyonce_core::Timestamp {
            self.inner.wall()
        }

        fn monotonic_ms(&self) -> u64 {
            // The thread is suspended before every third look at a clock.
            if self.asked.fetch_add(1, Ordering::SeqCst) % 3 == 2 {
                self.inner.advance(Duration::from_millis(self.by_ms));
            }
            self.inner.monotonic_ms()
        }
    }

    #[test]
    fn a_thread_that_is_suspended_between_two_clocks_takes_neither_for_wrong() {
        let inner = ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(START_MS));
        let clock = Arc::new(Stuttering { inner: inner.clone(), asked: AtomicU64::new(0), by_ms: 3_000 });
        let wall = WallTime::resume(clock, &Saved::default(), &ClockState::default(), SPAN);
        for _ in 0..1_000 {
            wall.now();
            let course = wall.course.lock();
            assert_eq!(course.deviation, None);
            assert_eq!(course.offset_ms, START_MS as i64, "nobody is taken along");
        }
    }

    #[test]
    fn a_wall_clock_that_drifts_is_never_far_from_the_time() {
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
    fn the_time_never_goes_back_while_threads_follow_small_steps() {
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
        assert!(wall.now().time_ms >= START_MS + 5_000 * 3 - 7, "it went on");
    }

    /// Moments at which clocks show whatever they like.
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
                // As if the monotonic clock ran on.
                course.set(before_ms.max(course.floor_ms), reading);
                course.observe(reading);
                let time_ms = course.time_ms(reading);
                prop_assert!(time_ms <= MAX_WALL_MS && course.floor_ms <= time_ms && floor <= course.floor_ms);
                floor = course.floor_ms;
                course.observe(reading);
                prop_assert_eq!(course.time_ms(reading), time_ms, "what was seen is seen once");
            }
        }

        #[test]
        fn readings_that_take_no_lock_change_nothing((saved, state) in any_saved(), readings in any_readings()) {
            let mut course = Course::resume(&saved, &state, SPAN, &readings[0]);
            for reading in &readings {
                let anchor = course.anchor();
                // The boot clock is not asked on every call.
                let asked = Reading { boot: None, ..*reading };
                let is_expected = anchor.expects(reading.wall_ms, reading.monotonic_ms);
                let (steps, expected) = (course.steps, anchor.at(reading.monotonic_ms));
                let changed = course.observe(&asked);
                if is_expected {
                    prop_assert!(!changed);
                    // Steps that are obsolete may go at any time.
                    prop_assert_eq!(course.anchor(), Anchor { steps: course.steps, ..anchor });
                    prop_assert_eq!(course.anchor().at(reading.monotonic_ms), Now { steps: course.steps, ..expected });
                    prop_assert!(steps.iter().count() >= course.steps.iter().count());
                }
                course.observe(reading);
            }
        }
    }
}
