//! The background threads of a store, and how they start and end.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded, never};

use super::core::Engine;
use super::maintenance::MaintenanceState;
use crate::config::Durability;
use crate::testing::sync_shim::Mutex;
use onlyonce_core::{Error, Result};

/// The interval between rounds of maintenance.
const TICK: Duration = Duration::from_millis(100);
/// The interval between checks for ended buckets.
const ENDED_INTERVAL: Duration = Duration::from_secs(1);
/// The backoff after a failed round of maintenance.
const FAILURE_BACKOFF: Duration = Duration::from_secs(1);

/// The threads of a store, until they are stopped.
pub(crate) struct BackgroundWorkers {
    /// Dropped to stop the threads.
    stop: Mutex<Option<Sender<()>>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl BackgroundWorkers {
    /// Starts the threads of an engine.
    pub(crate) fn start(engine: &Arc<Engine>) -> Result<Self> {
        let (stop, stopped) = bounded(0);
        let (flush_needed, segment_needed) =
            (engine.backlog.flush_needed.receiver(), engine.writer.journal.segment_needed.receiver());
        let workers = Self { stop: Mutex::new(Some(stop)), threads: Mutex::new(Vec::new()) };
        if cfg!(shuttle) {
            // The model checker cannot schedule these threads.
            return Ok(workers);
        }
        // Before the threads start: a bucket that ends until the first round counts as ended, however late the thread runs.
        let maintenance_state = engine.catch_up()?;
        workers.spawn(engine, &stopped, "onlyonce-worker", move |engine, stopped| {
            run_workers(engine, maintenance_state, &flush_needed, stopped);
        })?;
        workers.spawn(engine, &stopped, "onlyonce-filter", maintain_ended_buckets)?;
        workers.spawn(engine, &stopped, "onlyonce-journal", move |engine, stopped| {
            prepare_segments(engine, &segment_needed, stopped);
        })?;
        if engine.config().durability == Durability::Process {
            workers.spawn(engine, &stopped, "onlyonce-sync", sync)?;
        }
        Ok(workers)
    }

    fn spawn(
        &self,
        engine: &Arc<Engine>,
        stopped: &Receiver<()>,
        name: &'static str,
        work: impl FnOnce(&Engine, &Receiver<()>) + Send + 'static,
    ) -> Result<()> {
        let (engine, stopped) = (Arc::clone(engine), stopped.clone());
        let path = engine.tables.db.directory().root().to_owned();
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let guard = PoisonOnPanic { engine: &engine, name };
                work(&engine, &stopped);
                drop(guard);
            })
            .map_err(|error| Error::io("starting a thread for", path, error))?;
        self.threads.lock().push(thread);
        Ok(())
    }

    /// Stops the threads and waits for them.
    pub(crate) fn stop(&self) {
        drop(self.stop.lock().take());
        for thread in std::mem::take(&mut *self.threads.lock()) {
            // A panic has poisoned the store already.
            let _ = thread.join();
        }
    }
}

/// An engine with its background threads, open until it is closed or dropped.
pub(crate) struct StoreHandle {
    pub(crate) engine: Arc<Engine>,
    workers: BackgroundWorkers,
    closing: Mutex<()>,
}

impl StoreHandle {
    pub(crate) fn start(engine: Engine) -> Result<Self> {
        let engine = Arc::new(engine);
        let workers = BackgroundWorkers::start(&engine)?;
        Ok(Self { engine, workers, closing: Mutex::new(()) })
    }

    /// Stops the threads, waits for running calls, and closes the engine.
    pub(crate) fn close(&self) -> Result<()> {
        // A second, concurrent close returns after the first has released the directory.
        let _closing = self.closing.lock();
        self.workers.stop();
        self.engine.close()
    }
}

impl Drop for StoreHandle {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::warn!(error = error.chain(), "failed to close the store cleanly; no acknowledged write is lost");
        }
    }
}

/// Poisons the store if its thread panics: a state that the thread left half changed must not be used.
pub(crate) struct PoisonOnPanic<'a> {
    pub(crate) engine: &'a Engine,
    pub(crate) name: &'static str,
}

impl Drop for PoisonOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.engine.health.poison(&format!("the thread {} panicked", self.name));
        }
    }
}

fn is_stopped(stopped: &Receiver<()>) -> bool {
    matches!(stopped.try_recv(), Err(crossbeam::channel::TryRecvError::Disconnected))
}

fn run_workers(engine: &Engine, mut state: MaintenanceState, woken: &Receiver<()>, stopped: &Receiver<()>) {
    let mut pause = TICK;
    // Replaces the wakeups during the backoff after a failure.
    let no_wakeups = never();
    // Before the thread can be stopped: otherwise processes that run briefly would leave this work to each other forever.
    if state.has_leftover_work
        && let Err(error) = engine.run_maintenance(&mut state)
    {
        tracing::warn!(error = error.chain(), "maintenance failed; it will be retried");
    }
    loop {
        let woken = if pause == TICK { woken } else { &no_wakeups };
        crossbeam::select! {
            recv(stopped) -> _ => return,
            recv(woken) -> _ => {}
            default(pause) => {}
        }
        engine.export_metrics();
        match engine.run_maintenance(&mut state) {
            Ok(()) => pause = TICK,
            Err(Error::Closed) => return,
            Err(Error::Poisoned { .. } | Error::DirectoryGone { .. } | Error::Broken { .. }) => {
                // A part of the store may have set the poison without waking the waiting calls.
                engine.health.wake_all();
                break;
            }
            Err(error) => {
                tracing::warn!(error = error.chain(), "maintenance failed; it will be retried");
                pause = FAILURE_BACKOFF;
            }
        }
    }
    // Maintenance has ended, but the metrics must continue to report that the store is poisoned.
    while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(FAILURE_BACKOFF) {
        engine.export_metrics();
    }
}

/// Restores filters at open. Then merges the SSTs of ended buckets and persists their filters. An error costs only time: buckets
/// without a filter are read on disk.
fn maintain_ended_buckets(engine: &Engine, stopped: &Receiver<()>) {
    let should_continue = || !is_stopped(stopped);
    let warn = |outcome: Result<()>, failure: &str| match outcome {
        // A poison was logged when it was set.
        Ok(()) | Err(Error::Closed | Error::Poisoned { .. } | Error::DirectoryGone { .. } | Error::Broken { .. }) => {}
        Err(error) => tracing::warn!(error = error.chain(), "{failure}"),
    };
    warn(engine.restore_filters(&should_continue), "failed to restore filters; lookups read the disk more often");
    while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(ENDED_INTERVAL) {
        warn(engine.merge_ended(), "failed to merge the SSTs of an ended bucket; lookups in it take longer");
        let persisted = engine.persist_filters(should_continue);
        warn(persisted, "failed to persist the filter of an ended bucket; it will be retried");
    }
}

/// Prepares the journal's segments. In a thread of its own: a flush can take longer than a segment lasts.
fn prepare_segments(engine: &Engine, segment_needed: &Receiver<()>, stopped: &Receiver<()>) {
    // The first round is at once. A failed one is not repeated before its backoff, however often the thread is woken.
    let (mut pause, no_wakeups) = (Duration::ZERO, never());
    loop {
        let segment_needed = if pause == FAILURE_BACKOFF { &no_wakeups } else { segment_needed };
        crossbeam::select! {
            recv(stopped) -> _ => return,
            recv(segment_needed) -> _ => {}
            default(pause) => {}
        }
        match engine.writer.prepare_segment() {
            Ok(()) => pause = TICK,
            Err(Error::Closed | Error::Poisoned { .. } | Error::DirectoryGone { .. } | Error::Broken { .. }) => return,
            Err(error) => {
                tracing::warn!(error = error.chain(), "failed to prepare a segment of the journal; it will be retried");
                pause = FAILURE_BACKOFF;
            }
        }
    }
}

fn sync(engine: &Engine, stopped: &Receiver<()>) {
    while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(engine.config().sync_interval) {
        // The error has poisoned the store.
        if engine.writer.sync_if_needed().is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::clock::ManualClock;
    use crate::codec::RecordKind;
    use crate::config::Options;
    use crate::engine::fixture::short_windows;
    use crate::engine::response::{FinishKind, FinishedBy};
    use crate::fs::directory::Directory;
    use onlyonce_core::Claim;
    use onlyonce_core::StoredResult;

    fn start(dir: &tempfile::TempDir, options: &Options) -> StoreHandle {
        let directory = Directory::acquire(&dir.path().join("store"), Duration::ZERO).unwrap();
        StoreHandle::start(Engine::open(directory, options).unwrap()).unwrap()
    }

    #[test]
    fn the_background_threads_end_before_the_store_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let handle = start(&dir, &Options { durability: Durability::Process, ..Options::default() });
        assert_eq!(Arc::strong_count(&handle.engine), 5, "one for each thread, and the handle");
        handle.close().unwrap();
        assert_eq!(Arc::strong_count(&handle.engine), 1);
    }

    #[test]
    fn work_that_an_open_leaves_is_done_even_if_the_store_is_closed_at_once() {
        let (dir, clock) =
            (tempfile::tempdir().unwrap(), ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(1_000_000)));
        let options = Options { clock: Arc::new(clock.clone()), result_limit: 4 << 20, ..Options::default() };
        let handle = start(&dir, &options);
        let large = vec![7; 3 << 20];
        for key in ["a", "b", "c"] {
            let request = handle.engine.request([key]).unwrap();
            let Some(Ok(Claim::Acquired(grant))) = handle.engine.claim(&request).unwrap().pop() else {
                panic!("{key} is new")
            };
            let done = vec![(
                &grant,
                FinishKind::Complete { result: StoredResult::Bytes(&large), side_writes: None, follows: false },
            )];
            let finished = handle.engine.finish(RecordKind::Completed, FinishedBy::Holder, done).unwrap();
            assert!(matches!(finished[..], [Ok(true)]), "{finished:?}");
        }
        handle.close().unwrap();
        clock.advance(Duration::from_secs(3 * 60 * 60));
        start(&dir, &options).close().unwrap();
        assert_eq!(start(&dir, &options).engine.tables.memtable.flushable(), 0);
    }

    #[test]
    fn the_ssts_of_an_ended_bucket_are_merged() {
        let dir = tempfile::tempdir().unwrap();
        let clock = ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(1_000_000));
        let handle = start(&dir, &short_windows(&clock));
        let engine = &handle.engine;
        for round in 0..4 {
            // Their digests span the whole range, so that no two SSTs are one sorted run.
            engine.record(&engine.request((0..100).map(|key| format!("{round} {key}"))).unwrap()).unwrap();
            engine.flush().unwrap();
        }
        let family = &engine.tables.buckets.snapshot().newest_first()[0].family.clone();
        let runs = || engine.tables.db.sorted_runs(family).unwrap();
        assert_eq!(runs(), 4);
        clock.advance(Duration::from_secs(1));
        let deadline = Instant::now() + Duration::from_secs(60);
        while runs() > 1 {
            assert!(Instant::now() < deadline, "{} runs are left", runs());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn under_process_durability_a_write_is_synced_after_the_interval() {
        let dir = tempfile::tempdir().unwrap();
        let sync_interval = Duration::from_millis(5);
        let handle = start(&dir, &Options { durability: Durability::Process, sync_interval, ..Options::default() });
        let engine = &handle.engine;
        engine.record(&engine.request(["k"]).unwrap()).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while engine.writer.is_unsynced() {
            assert!(Instant::now() < deadline, "the journal is not synced");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_background_thread_that_panics_poisons_the_store() {
        let dir = tempfile::tempdir().unwrap();
        let handle = start(&dir, &Options::default());
        let (_stop, stopped) = bounded(0);
        let ends = |panics: bool| {
            let work = move |_: &Engine, _: &Receiver<()>| assert!(!panics, "the thread panics, as it should");
            handle.workers.spawn(&handle.engine, &stopped, "onlyonce-test", work).unwrap();
            let thread = handle.workers.threads.lock().pop().unwrap();
            assert_eq!(thread.join().is_err(), panics);
            handle.engine.health.poisoned().map(str::to_owned)
        };
        assert_eq!(ends(false), None);
        assert_eq!(ends(true).as_deref(), Some("the thread onlyonce-test panicked"));
    }

    #[test]
    fn a_long_task_can_check_whether_the_store_is_stopped() {
        let (stop, stopped) = bounded(0);
        assert!(!is_stopped(&stopped));
        drop(stop);
        assert!(is_stopped(&stopped));
    }

    #[cfg(feature = "metrics")]
    #[test]
    fn the_metrics_report_a_poisoned_store_until_it_is_closed() {
        use metrics_util::debugging::{DebugValue, DebuggingRecorder};

        let recorder = DebuggingRecorder::new();
        let snapshotter = recorder.snapshotter();
        let dir = tempfile::tempdir().unwrap();
        let handle = metrics::with_local_recorder(&recorder, || start(&dir, &Options::default()));
        handle.engine.health.poison("a test");
        let deadline = Instant::now() + Duration::from_secs(60);
        // Each snapshot resets the gauges.
        for time in 1..=2 {
            let is_reported = || {
                let reported = snapshotter.snapshot().into_vec();
                reported.into_iter().any(|(key, _, _, value)| {
                    key.key().name() == "onlyonce.poisoned"
                        && matches!(value, DebugValue::Gauge(level) if level.0 == 1.0)
                })
            };
            while !is_reported() {
                assert!(Instant::now() < deadline, "time {time}");
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}
