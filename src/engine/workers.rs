//! The keeper: the threads behind a store, and their end.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded, never};

use super::core::Engine;
use super::maintenance::MaintenanceState;
use crate::config::Durability;
use crate::testing::sync_shim::Mutex;
use onlyonce_core::{Error, Result};

/// How often the keeper looks whether a bucket has ended or passed.
const TICK: Duration = Duration::from_millis(100);
/// How often it looks whether the filter of an ended bucket is to be kept on disk.
const FILTER_INTERVAL: Duration = Duration::from_secs(1);
/// How long it leaves a failure alone.
const PAUSE: Duration = Duration::from_secs(1);

/// Threads that end when they are told to.
pub(crate) struct BackgroundWorkers {
    /// Dropped to end the threads.
    stop: Mutex<Option<Sender<()>>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl BackgroundWorkers {
    /// Starts the threads of an engine.
    pub(crate) fn start(engine: &Arc<Engine>) -> Result<Self> {
        let (stop, stopped) = bounded(0);
        let (wake, woken) = bounded(1);
        // Set once: an engine has one keeper.
        let _ = engine.backlog.wake.set(wake);
        let workers = Self { stop: Mutex::new(Some(stop)), threads: Mutex::new(Vec::new()) };
        if cfg!(shuttle) {
            // Threads that a model does not know would go when they like.
            return Ok(workers);
        }
        // The rounds begin here, however late the thread does.
        let maintenance_state = engine.catch_up()?;
        workers.spawn(engine, &stopped, "onlyonce-worker", move |engine, stopped| {
            run_workers(engine, maintenance_state, &woken, stopped);
        })?;
        workers.spawn(engine, &stopped, "onlyonce-filter", persist_filters)?;
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
        let path = engine.db.directory().root().to_owned();
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let guard = PoisonOnPanic { engine: &engine, name };
                work(&engine, &stopped);
                drop(guard);
            })
            .map_err(|error| Error::io("cannot start a thread for", path, error))?;
        self.threads.lock().push(thread);
        Ok(())
    }

    /// Ends the threads and waits for them.
    pub(crate) fn stop(&self) {
        drop(self.stop.lock().take());
        for thread in std::mem::take(&mut *self.threads.lock()) {
            // A panic has poisoned the store already.
            let _ = thread.join();
        }
    }
}

/// An engine with its keeper: open until it is closed or dropped.
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

    /// Ends the keeper, waits for the calls under way, and closes.
    pub(crate) fn close(&self) -> Result<()> {
        // Whoever closes second returns when the first has let go of the directory.
        let _closing = self.closing.lock();
        self.workers.stop();
        self.engine.close()
    }
}

impl Drop for StoreHandle {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::warn!(%error, "the store was not closed cleanly; nothing that was acknowledged is lost");
        }
    }
}

/// A store one of whose threads died half way through something must not go on.
pub(crate) struct PoisonOnPanic<'a> {
    pub(crate) engine: &'a Engine,
    pub(crate) name: &'static str,
}

impl Drop for PoisonOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.engine.poison(&format!("the thread {} panicked", self.name));
        }
    }
}

fn is_over(stopped: &Receiver<()>) -> bool {
    matches!(stopped.try_recv(), Err(crossbeam::channel::TryRecvError::Disconnected))
}

fn run_workers(engine: &Engine, mut last: MaintenanceState, woken: &Receiver<()>, stopped: &Receiver<()>) {
    let mut pause = TICK;
    // After a failure nobody may hurry it.
    let quiet = never();
    // Before it may be told to stop: what the open has left would else be left by every process that is short.
    if last.has_leftover_work
        && let Err(error) = engine.run_maintenance(&mut last)
    {
        tracing::warn!(%error, "upkeep failed, and will be tried again");
    }
    loop {
        let woken = if pause == TICK { woken } else { &quiet };
        crossbeam::select! {
            recv(stopped) -> _ => return,
            recv(woken) -> _ => {}
            default(pause) => {}
        }
        engine.export_metrics();
        match engine.run_maintenance(&mut last) {
            Ok(()) => pause = TICK,
            Err(Error::Closed) => return,
            Err(Error::Poisoned { .. } | Error::DirectoryGone { .. } | Error::Broken { .. }) => {
                // What a part of the store noted has woken nobody yet.
                engine.wake_all();
                break;
            }
            Err(error) => {
                tracing::warn!(%error, "upkeep failed, and will be tried again");
                pause = PAUSE;
            }
        }
    }
    // There is nothing to keep any more. Whoever watches is to learn it.
    while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(PAUSE) {
        engine.export_metrics();
    }
}

/// A filter that fails costs time and nothing else: the buckets without one are asked on disk.
fn persist_filters(engine: &Engine, stopped: &Receiver<()>) {
    let should_continue = || !is_over(stopped);
    match engine.restore_filters(&should_continue) {
        Ok(()) | Err(Error::Closed) => {}
        Err(error) => tracing::warn!(%error, "filters could not be rebuilt"),
    }
    while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(FILTER_INTERVAL) {
        match engine.persist_filters(should_continue) {
            Ok(()) | Err(Error::Closed) => {}
            Err(error) => tracing::warn!(%error, "the filter of an ended bucket could not be kept on disk"),
        }
    }
}

fn sync(engine: &Engine, stopped: &Receiver<()>) {
    while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(engine.config().sync_interval) {
        // A failure has poisoned the store.
        if engine.sync().is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;
    use std::time::Instant;

    use super::*;
    use crate::clock::ManualClock;
    use crate::codec::RecordKind;
    use crate::config::Options;
    use crate::engine::response::{FinishKind, FinishedBy};
    use crate::fs::directory::Directory;
    use onlyonce_core::Claim;
    use onlyonce_core::StoredResult;

    fn start(dir: &tempfile::TempDir, options: &Options) -> StoreHandle {
        let directory = Directory::acquire(&dir.path().join("store"), Duration::ZERO).unwrap();
        StoreHandle::start(Engine::open(directory, options).unwrap()).unwrap()
    }

    #[test]
    fn the_threads_of_a_store_end_before_it_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let handle = start(&dir, &Options { durability: Durability::Process, ..Options::default() });
        assert_eq!(Arc::strong_count(&handle.engine), 4, "each of them has it");
        handle.close().unwrap();
        assert_eq!(Arc::strong_count(&handle.engine), 1);
    }

    #[test]
    fn what_an_open_leaves_to_the_keeper_is_done_also_where_the_store_is_closed_at_once() {
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
        assert_eq!(start(&dir, &options).engine.memtable.flushable(), 0);
    }

    #[test]
    fn under_process_what_was_written_is_synced_after_the_interval() {
        let dir = tempfile::tempdir().unwrap();
        let sync_interval = Duration::from_millis(5);
        let handle = start(&dir, &Options { durability: Durability::Process, sync_interval, ..Options::default() });
        let engine = &handle.engine;
        engine.record(&engine.request(["k"]).unwrap()).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while engine.unsynced.load(Ordering::Acquire) {
            assert!(Instant::now() < deadline, "nobody syncs");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_thread_of_the_store_that_panics_poisons_it_and_one_that_ends_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let handle = start(&dir, &Options::default());
        let (_stop, stopped) = bounded(0);
        let ends = |panics: bool| {
            let work = move |_: &Engine, _: &Receiver<()>| assert!(!panics, "the thread panics, as it should");
            handle.workers.spawn(&handle.engine, &stopped, "onlyonce-test", work).unwrap();
            let thread = handle.workers.threads.lock().pop().unwrap();
            assert_eq!(thread.join().is_err(), panics);
            handle.engine.poisoned().map(str::to_owned)
        };
        assert_eq!(ends(false), None);
        assert_eq!(ends(true).as_deref(), Some("the thread onlyonce-test panicked"));
    }

    #[test]
    fn what_takes_long_is_told_when_the_store_ends() {
        let (stop, stopped) = bounded(0);
        assert!(!is_over(&stopped));
        drop(stop);
        assert!(is_over(&stopped));
    }

    #[cfg(feature = "metrics")]
    #[test]
    fn whoever_watches_learns_that_a_store_is_poisoned_and_keeps_learning_it() {
        use metrics_util::debugging::{DebugValue, DebuggingRecorder};

        let recorder = DebuggingRecorder::new();
        let snapshotter = recorder.snapshotter();
        let dir = tempfile::tempdir().unwrap();
        let handle = metrics::with_local_recorder(&recorder, || start(&dir, &Options::default()));
        handle.engine.poison("a test");
        let deadline = Instant::now() + Duration::from_secs(60);
        // Each snapshot begins anew.
        for time in 1..=2 {
            let is_told = || {
                let told = snapshotter.snapshot().into_vec();
                told.into_iter().any(|(key, _, _, value)| {
                    key.key().name() == "onlyonce.poisoned"
                        && matches!(value, DebugValue::Gauge(level) if level.0 == 1.0)
                })
            };
            while !is_told() {
                assert!(Instant::now() < deadline, "time {time}");
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}
