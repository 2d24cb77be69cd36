//! What an engine's test provides, and what the checks use.

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use crate::answer::{Claim, Completed, InProgress, KeyStatus, OnInterrupt, RecordOutcome};
use crate::attempt::PriorAttempt;
use crate::completion::Completion;
use crate::engine::{Answers, BoxFuture, Engine, Finish, Grant, Release};
use crate::error::{Error, Result};
use crate::key::Key;

/// Makes the engines that are checked.
pub trait Factory: Sync {
    /// Makes an empty engine with these options. `None` if it does not have them, such as stream time: the check is skipped.
    fn start(&self, setup: Setup) -> BoxFuture<'_, Option<Subject>>;

    /// The unit of the suite's leases and windows. They last 6 units and more, and a check waits for their end. Shorter units
    /// end sooner; longer ones allow for a slower machine. 50 milliseconds by default.
    fn time_unit(&self) -> Duration {
        Duration::from_millis(50)
    }

    /// How many checks run at a time, each on an engine of its own. More than one saves time where checks sleep. They run one
    /// after the other by default.
    fn checks_at_a_time(&self) -> usize {
        1
    }
}

/// The options of an engine that a check needs.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Setup {
    /// How long a completed key is remembered.
    pub window: Duration,
    /// How long a lease lasts without renewal.
    pub lease: Duration,
    /// What happens to a key whose holder vanished.
    pub on_interrupt: OnInterrupt,
    /// The longest result that is stored, in bytes.
    pub result_limit: usize,
    /// The longest key with its scope, in bytes.
    pub key_limit: usize,
    /// How many keys may be in progress.
    pub in_flight_limit: usize,
    /// How many keys may be held for resolution.
    pub held_limit: usize,
    /// How far ahead of stream time a message may be. `None`: the engine runs on its clock.
    pub max_ahead: Option<Duration>,
    pub(super) unit: Duration,
}

impl Setup {
    pub(super) fn of(on_interrupt: OnInterrupt, unit: Duration) -> Self {
        const HOUR: Duration = Duration::from_secs(3_600);
        Self {
            window: HOUR,
            lease: HOUR / 2,
            on_interrupt,
            result_limit: 64,
            key_limit: 1_000,
            in_flight_limit: 1_000,
            held_limit: 1_000,
            max_ahead: None,
            unit,
        }
    }

    pub(super) fn short_lease(self) -> Self {
        Self { lease: self.unit * 6, ..self }
    }
}

/// An engine that is checked.
pub struct Subject {
    engine: Arc<dyn Engine>,
    clock: Option<Arc<dyn Clock>>,
    _kept: Option<Box<dyn Any + Send + Sync>>,
}

impl Subject {
    /// An engine that runs on Tokio's or the system's time.
    pub fn new(engine: impl Into<Arc<dyn Engine>>) -> Self {
        Self { engine: engine.into(), clock: None, _kept: None }
    }

    /// Passes time by a clock that the test sets, and checks windows to the millisecond.
    #[must_use]
    pub fn clock(mut self, clock: impl Clock) -> Self {
        self.clock = Some(Arc::new(clock));
        self
    }

    /// Keeps a value until the check is over, such as a temporary directory.
    #[must_use]
    pub fn keep(mut self, value: impl Any + Send + Sync) -> Self {
        self._kept = Some(Box::new(value));
        self
    }
}

/// A clock that a test sets.
pub trait Clock: Send + Sync + 'static {
    /// Lets this time pass, in whole milliseconds, and no more than it.
    fn advance(&self, by: Duration) -> BoxFuture<'_, ()>;
}

/// Why a check stopped.
#[derive(Debug)]
pub(super) struct Stop(pub(super) String);

pub(super) type Verdict<T = ()> = std::result::Result<T, Stop>;

/// A call failed that must succeed.
impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self(format!("a call failed that must succeed: {}", error.chain()))
    }
}

macro_rules! ensure {
    ($holds:expr, $($message:tt)+) => {
        if !$holds {
            return Err($crate::conformance::bench::Stop(format!($($message)+)));
        }
    };
}

macro_rules! ensure_eq {
    ($actual:expr, $expected:expr, $($what:tt)+) => {
        match (&$actual, &$expected) {
            (actual, expected) => $crate::conformance::bench::ensure!(
                *actual == *expected,
                "{}: expected {expected:?}, got {actual:?}", format_args!($($what)+)
            ),
        }
    };
}

macro_rules! ensure_matches {
    ($actual:expr, $expected:pat $(if $guard:expr)?, $($what:tt)+) => {
        match &$actual {
            $expected $(if $guard)? => {}
            actual => $crate::conformance::bench::ensure!(
                false,
                "{}: expected {}, got {actual:?}",
                format_args!($($what)+), stringify!($expected $(if $guard)?)
            ),
        }
    };
}

pub(super) use {ensure, ensure_eq, ensure_matches};

/// An engine and the calls of the checks.
pub(super) struct Bench {
    pub(super) engine: Arc<dyn Engine>,
    pub(super) setup: Setup,
    subject: Subject,
}

impl Bench {
    pub(super) fn new(subject: Subject, setup: Setup) -> Self {
        Self { engine: Arc::clone(&subject.engine), setup, subject }
    }

    pub(super) fn unit(&self) -> Duration {
        self.setup.unit
    }

    pub(super) fn holds(&self) -> bool {
        self.setup.on_interrupt == OnInterrupt::Hold
    }

    /// True if time passes only by [`Bench::advance`].
    pub(super) fn is_exact(&self) -> bool {
        self.subject.clock.is_some()
    }

    /// Lets time pass for the engine.
    pub(super) async fn advance(&self, by: Duration) {
        match &self.subject.clock {
            Some(clock) => clock.advance(by).await,
            None => tokio::time::sleep(by).await,
        }
    }

    /// Lets every lease expire.
    pub(super) async fn expire_leases(&self) {
        self.advance(self.setup.lease + self.unit()).await;
    }

    /// Gives the engine's threads and tasks time to run.
    pub(super) async fn pause(&self) {
        tokio::time::sleep(self.unit()).await;
    }

    pub(super) async fn claim(&self, key: impl Into<Key<'static>>) -> Verdict<Result<Claim<Grant>>> {
        only(self.engine.claim(vec![key.into()]).await)
    }

    pub(super) async fn check(&self, key: impl Into<Key<'static>>) -> Verdict<Result<KeyStatus>> {
        only(self.engine.check(vec![key.into()]).await)
    }

    pub(super) async fn record(&self, key: impl Into<Key<'static>>) -> Verdict<Result<RecordOutcome>> {
        only(self.engine.record(vec![key.into()]).await)
    }

    pub(super) async fn renew(&self, grant: &Arc<Grant>) -> Verdict<Result<()>> {
        only(self.engine.renew(vec![Arc::clone(grant)]).await)
    }

    pub(super) async fn acquire(&self, key: impl Into<Key<'static>>) -> Verdict<Arc<Grant>> {
        let key = key.into();
        match self.claim(key.clone()).await?? {
            Claim::Acquired(grant) => Ok(Arc::new(grant)),
            other => Err(Stop(format!("{key} must be acquired, the answer is {other:?}"))),
        }
    }

    /// Acquires a key, and checks which attempt it is.
    pub(super) async fn acquire_as(
        &self,
        key: impl Into<Key<'static>>,
        number: u32,
        prior: Option<PriorAttempt>,
    ) -> Verdict<Arc<Grant>> {
        let grant = self.acquire(key).await?;
        let attempt = (grant.attempt.number(), grant.attempt.prior());
        ensure_eq!(attempt, (number, prior), "number and prior of the attempt at {}", grant.key);
        Ok(grant)
    }

    pub(super) async fn in_progress(&self, key: impl Into<Key<'static>>) -> Verdict<InProgress> {
        let key = key.into();
        match self.claim(key.clone()).await?? {
            Claim::InProgress(in_progress) => Ok(in_progress),
            other => Err(Stop(format!("{key} must be in progress, the answer is {other:?}"))),
        }
    }

    pub(super) async fn completed(&self, key: impl Into<Key<'static>>) -> Verdict<Completed> {
        let key = key.into();
        match self.claim(key.clone()).await?? {
            Claim::Completed(completed) => Ok(completed),
            other => Err(Stop(format!("{key} must be completed, the answer is {other:?}"))),
        }
    }

    pub(super) async fn finish(&self, grant: &Arc<Grant>, finish: Finish) -> Verdict<Result<()>> {
        only(Ok(self.engine.finish(vec![(Arc::clone(grant), finish)]).await))
    }

    pub(super) async fn complete(&self, grant: &Arc<Grant>, completion: impl Into<Completion>) -> Verdict<Result<()>> {
        self.finish(grant, Finish::Complete(completion.into())).await
    }

    pub(super) async fn release(&self, grant: &Arc<Grant>) -> Verdict<Result<()>> {
        self.finish(grant, Finish::Release(Release::default())).await
    }

    pub(super) fn abandon(&self, grant: &Arc<Grant>) {
        self.engine.abandon(Arc::clone(grant));
    }

    /// Completes each grant in one call.
    pub(super) async fn complete_all(&self, leases: Vec<(&Arc<Grant>, Completion)>) -> Verdict<Vec<Result<()>>> {
        let count = leases.len();
        let leases =
            leases.into_iter().map(|(grant, completion)| (Arc::clone(grant), Finish::Complete(completion))).collect();
        let answers = self.engine.finish(leases).await;
        ensure_eq!(answers.len(), count, "the number of answers");
        Ok(answers)
    }

    /// The keys of all messages in the outbox, in its order.
    pub(super) async fn outbox_keys(&self) -> Verdict<Vec<String>> {
        let messages = self.engine.outbox(usize::MAX).await?;
        Ok(messages.into_iter().map(|message| String::from_utf8_lossy(&message.key).into_owned()).collect())
    }
}

/// The answer about the only key of a call. An outer error counts as its own.
fn only<T>(answers: Answers<T>) -> Verdict<Result<T>> {
    let mut answers = match answers {
        Ok(answers) => answers,
        Err(error) => return Ok(Err(error)),
    };
    ensure_eq!(answers.len(), 1, "the number of answers");
    answers.pop().ok_or_else(|| Stop("there is no answer".to_owned()))
}

/// The error must be that of a lost lease.
pub(super) fn ensure_superseded<T: std::fmt::Debug>(answer: &Result<T>, grant: &Grant, what: &str) -> Verdict {
    ensure_matches!(answer, Err(Error::Superseded { token, .. }) if *token == grant.token(), "{what}");
    Ok(())
}
