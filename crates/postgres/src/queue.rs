//! The queues of a store: calls of concurrent callers become batches.
//!
//! A call is sent to a task of the store and awaited there. So a future that is dropped does not stop a statement half way, and
//! calls that arrive while all batches are in flight make the next batch.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;

/// The most items of a batch. A call with more is a batch of its own.
const BATCH_ITEMS: usize = 500;
/// The most bytes of a batch, which a statement sends within its time limit. A call with more is a batch of its own.
const BATCH_BYTES: usize = 4 << 20;
/// How many calls of one kind wait in a queue. Callers wait for room in it.
pub(crate) const QUEUED_CALLS: usize = 10_000;

/// A call in a queue.
pub(crate) trait Job: Send + 'static {
    fn items(&self) -> usize;

    /// The bytes of its results and messages.
    fn bytes(&self) -> usize {
        0
    }

    /// Whether nobody waits for its answer, and it need not happen.
    fn is_abandoned(&self) -> bool {
        false
    }

    /// When it was queued. `None` if it has no time limit.
    fn queued(&self) -> Option<Instant> {
        None
    }
}

/// When the last of these calls was queued.
pub(crate) fn last_queued<J: Job>(jobs: &[J]) -> Instant {
    jobs.iter().filter_map(Job::queued).max().unwrap_or_else(Instant::now)
}

/// The receiving end of a queue.
pub(crate) trait Queue<J>: Send {
    fn next(&mut self) -> impl Future<Output = Option<J>> + Send;
    fn try_next(&mut self) -> Option<J>;
}

impl<J: Send> Queue<J> for mpsc::Receiver<J> {
    fn next(&mut self) -> impl Future<Output = Option<J>> + Send {
        self.recv()
    }

    fn try_next(&mut self) -> Option<J> {
        self.try_recv().ok()
    }
}

impl<J: Send> Queue<J> for mpsc::UnboundedReceiver<J> {
    fn next(&mut self) -> impl Future<Output = Option<J>> + Send {
        self.recv()
    }

    fn try_next(&mut self) -> Option<J> {
        self.try_recv().ok()
    }
}

/// Runs jobs from a queue in batches, `at_a_time` of them at most, until the queue closes. A job that waited longer than `limit` is
/// rejected. One that is abandoned is dropped.
pub(crate) async fn run_batches<J: Job, F>(
    mut jobs: impl Queue<J>,
    at_a_time: usize,
    limit: Duration,
    reject: impl Fn(J),
    run: impl Fn(Vec<J>) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let admit = |job: J| {
        if job.is_abandoned() {
            return None;
        }
        if job.queued().is_some_and(|queued| queued.elapsed() > limit) {
            reject(job);
            return None;
        }
        Some(job)
    };
    let permits = Arc::new(Semaphore::new(at_a_time));
    let mut next = None;
    loop {
        // First the permit, then the jobs: those that arrive in between are part of the batch.
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        let first = loop {
            let job = match next.take() {
                Some(job) => job,
                None => match jobs.next().await {
                    Some(job) => job,
                    None => return,
                },
            };
            if let Some(job) = admit(job) {
                break job;
            }
        };
        let (mut count, mut bytes) = (first.items(), first.bytes());
        let mut batch = vec![first];
        while count < BATCH_ITEMS && bytes < BATCH_BYTES {
            let Some(job) = jobs.try_next() else { break };
            let Some(job) = admit(job) else { continue };
            count += job.items();
            bytes = bytes.saturating_add(job.bytes());
            if count > BATCH_ITEMS || bytes > BATCH_BYTES {
                next = Some(job);
                break;
            }
            batch.push(job);
        }
        let batch = run(batch);
        tokio::spawn(async move {
            batch.await;
            drop(permit);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Debug, Clone, PartialEq)]
    struct Call {
        items: usize,
        bytes: usize,
        is_abandoned: bool,
        queued: Option<Instant>,
    }

    impl Job for Call {
        fn items(&self) -> usize {
            self.items
        }

        fn bytes(&self) -> usize {
            self.bytes
        }

        fn is_abandoned(&self) -> bool {
            self.is_abandoned
        }

        fn queued(&self) -> Option<Instant> {
            self.queued
        }
    }

    /// The batches of these calls, and how many were rejected.
    async fn batches(calls: Vec<Call>) -> (Vec<Vec<usize>>, usize) {
        let (sender, jobs) = mpsc::unbounded_channel();
        calls.into_iter().for_each(|call| sender.send(call).unwrap());
        drop(sender);
        let (batches, rejected) = (Arc::new(Mutex::new(Vec::new())), Mutex::new(0));
        let log = Arc::clone(&batches);
        let reject = |_| *rejected.lock().unwrap() += 1;
        let run = move |batch: Vec<Call>| {
            log.lock().unwrap().push(batch.iter().map(Call::items).collect());
            std::future::ready(())
        };
        run_batches(jobs, 1, Duration::from_secs(10), reject, run).await;
        (std::mem::take(&mut *batches.lock().unwrap()), rejected.into_inner().unwrap())
    }

    fn of(items: usize) -> Call {
        Call { items, bytes: 0, is_abandoned: false, queued: None }
    }

    #[tokio::test]
    async fn jobs_that_wait_make_one_batch_of_bounded_size() {
        let calls = [1, 200, 200, 200, 900, 1].map(of);
        let expected = vec![vec![1, 200, 200], vec![200], vec![900], vec![1]];
        assert_eq!(batches(calls.into()).await, (expected, 0));
    }

    #[tokio::test]
    async fn a_batch_has_a_bounded_number_of_bytes() {
        let calls = [3, 1, 2, 9, 1].map(|mebibytes| Call { bytes: mebibytes << 20, ..of(mebibytes) });
        assert_eq!(batches(calls.into()).await, (vec![vec![3, 1], vec![2], vec![9], vec![1]], 0));
    }

    #[tokio::test(start_paused = true)]
    async fn a_job_that_nobody_waits_for_or_that_waited_too_long_does_not_run() {
        let queued = Some(Instant::now());
        tokio::time::advance(Duration::from_secs(11)).await;
        let (late, abandoned) = (Call { queued, ..of(2) }, Call { is_abandoned: true, ..of(3) });
        let in_time = Call { queued: Some(Instant::now()), ..of(4) };
        assert_eq!(batches(vec![late, abandoned, of(1), in_time]).await, (vec![vec![1, 4]], 1));
    }
}
