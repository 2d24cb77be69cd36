//! What the tests share: a queue, a store on a manual clock, and a processor.

use std::time::Duration;

use onlyonce::delivery::{AckError, Attempt, Failure, KeyOrigin, OnStoreFailure, Outcome, Processor};
use onlyonce::{Builder, Claim, Lease, Store, Timestamp};

use crate::common::Bench;
use crate::queue::{ConnectionLost, Queue, QueueDelivery, WithTimestamp, WithoutId};

pub(crate) const SECOND: Duration = Duration::from_secs(1);
pub(crate) const MAX_RETRY_AFTER: Duration = Duration::from_secs(40);

/// A queue, a store on a manual clock, and a processor with three attempts and backoffs from one second to three.
pub(crate) struct Fixture {
    pub(crate) queue: Queue,
    pub(crate) bench: Bench,
    pub(crate) processor: Processor,
}

impl Fixture {
    pub(crate) fn new() -> Self {
        Self::with(|builder| builder)
    }

    pub(crate) fn with(configure: fn(Builder) -> Builder) -> Self {
        let bench = Bench::with(configure);
        let processor = processor(&bench);
        Self { queue: Queue::default(), bench, processor }
    }

    /// Changes the settings of the processor.
    pub(crate) fn set(&mut self, set: impl FnOnce(Processor) -> Processor) {
        self.processor = set(self.processor.clone());
    }

    pub(crate) fn fail_open(mut self) -> Self {
        self.set(|processor| processor.on_store_failure(OnStoreFailure::FailOpen));
        self
    }

    pub(crate) fn store(&self) -> &Store {
        self.bench.store()
    }

    /// Takes the key "a" over from a holder that is working, by expiring its lease.
    pub(crate) fn take_over(&self) -> Lease {
        loop {
            self.bench.advance_ms(1_000);
            // The keep-alive may renew the lease between the two calls.
            if let Claim::Acquired(lease) = self.store().claim("a").wait().unwrap() {
                return lease;
            }
        }
    }

    /// The process ends, and another one opens the store.
    pub(crate) fn restart(&mut self) {
        self.bench.reopen();
        self.processor = processor(&self.bench);
    }

    /// Processes the next message. `Err` if the queue does not take the answer.
    pub(crate) async fn try_process(
        &self,
        work: impl AsyncFnOnce(&QueueDelivery, &mut Attempt) -> Result<&'static str, Failure>,
    ) -> Result<Outcome, AckError<ConnectionLost>> {
        self.processor.process(self.queue.next(), work).await
    }

    pub(crate) async fn process(
        &self,
        work: impl AsyncFnOnce(&mut Attempt) -> Result<&'static str, Failure>,
    ) -> Outcome {
        self.try_process(async |_, attempt| work(attempt).await).await.unwrap()
    }

    /// Processes the next message, which has this timestamp.
    pub(crate) async fn process_at(&self, at: Option<u64>) -> Outcome {
        let delivery = WithTimestamp(self.queue.next(), at.map(Timestamp::from_unix_ms));
        self.processor.process(delivery, async |_, _| Ok("receipt")).await.unwrap()
    }

    /// Processes the next message, which has no id.
    pub(crate) async fn process_without_id(&self, origin: KeyOrigin) -> Outcome {
        let delivery = WithoutId(self.queue.next(), origin);
        self.processor.process(delivery, async |_, _| Ok("receipt")).await.unwrap()
    }

    pub(crate) async fn assert_next_is_duplicate(&self) {
        let outcome = self.process(async |_| panic!("the work runs twice")).await;
        assert!(matches!(outcome, Outcome::Duplicate(_)), "{outcome:?}");
    }
}

/// A store that is only dropped closes in the background, where the exit of the process could interrupt it.
impl Drop for Fixture {
    fn drop(&mut self) {
        drop(self.store().close().wait());
    }
}

fn processor(bench: &Bench) -> Processor {
    let processor = Processor::new(bench.store().clone());
    processor.attempts(3).backoff(SECOND, 3 * SECOND).max_retry_after(MAX_RETRY_AFTER)
}

/// Work that fails without effect.
pub(crate) async fn decline(_: &mut Attempt) -> Result<&'static str, Failure> {
    Err("the card was declined".into())
}

/// Work that succeeds.
pub(crate) async fn charge(_: &mut Attempt) -> Result<&'static str, Failure> {
    Ok("receipt")
}
