use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use super::builder::MemoryStoreBuilder;
use super::keep_alive::Keeper;
use super::state::State;
use crate::answer::{Claim, HeldKey, KeyStatus, Message, MessageId, RecordOutcome, Resolution, StoredKey};
use crate::engine::{Answers, BoxFuture, Engine, EngineStats, Finish, Grant, KeepAlive, Limits};
use crate::error::{Error, Result};
use crate::key::Key;

/// An engine in memory, for tests. Clones share it.
///
/// Its answers are the local store's, but it survives no crash. It is a map with a lock: nothing is written, no
/// thread runs, and memory grows until it is dropped. Its time is Tokio's: `tokio::time::pause` and `advance` move leases,
/// backoffs and windows. [`Engine::claim_wait`] with a limit needs a Tokio runtime with time enabled.
///
/// ```
/// use onlyonce_core::testing::MemoryStore;
/// use onlyonce_core::{Claim, Completion, Engine, Finish, Key};
/// use std::sync::Arc;
///
/// # let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
/// # runtime.block_on(async {
/// let store = MemoryStore::new();
/// if let Ok(Claim::Acquired(grant)) = store.claim(vec![Key::from("order-1")]).await?.remove(0) {
///     store.finish(vec![(Arc::new(grant), Finish::Complete(Completion::new("charged")))]).await.remove(0)?;
/// }
/// let again = store.claim(vec![Key::from("order-1")]).await?.remove(0)?;
/// assert!(matches!(again, Claim::Completed(first) if first.result() == Some(b"charged")));
/// # Ok::<(), onlyonce_core::Error>(())
/// # })?;
/// # Ok::<(), onlyonce_core::Error>(())
/// ```
#[derive(Clone)]
pub struct MemoryStore {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    /// Notified when a key may have become free or completed, or calls begin to fail.
    changed: Notify,
    keepers: AtomicU64,
}

impl MemoryStore {
    /// An empty store with the default options.
    #[must_use]
    pub fn new() -> Self {
        Self::of(State::new(super::builder::Config::default()))
    }

    /// Sets the options of a store.
    pub fn builder() -> MemoryStoreBuilder {
        MemoryStoreBuilder::new()
    }

    pub(super) fn of(state: State) -> Self {
        let shared = Shared { state: Mutex::new(state), changed: Notify::new(), keepers: AtomicU64::new(0) };
        Self { shared: Arc::new(shared) }
    }

    /// Has every call fail with this error, until [`MemoryStore::recover`]. The calls do nothing, and leases are not renewed.
    /// A dropped lease is still marked as interrupted.
    pub fn fail_with(&self, error: Error) {
        self.change(|state| {
            state.failure.before(error);
            state.stop_renewals();
        });
    }

    /// Has every call happen and its answer be lost, until [`MemoryStore::recover`]: it returns this error. That is how a
    /// write with unknown outcome looks.
    pub fn lose_answers_with(&self, error: Error) {
        self.change(|state| state.failure.after(error));
    }

    /// Has calls succeed again.
    pub fn recover(&self) {
        self.change(|state| state.failure.recover());
    }

    /// Ends the lease of a key at once, and its renewal, as if its holder had hung. The next claim takes the key over. False if
    /// the key has no lease.
    pub fn expire_lease<'k>(&self, key: impl Into<Key<'k>>) -> bool {
        let key = key.into().into_owned();
        self.change(|state| state.expire_lease(&key))
    }

    /// How often [`Engine::count_fail_open`] was called.
    #[must_use]
    pub fn fail_open_count(&self) -> u64 {
        self.lock().fail_open
    }

    /// A panic of a test while it holds the lock changes nothing halfway: each verb changes one entry.
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn next_keeper(&self) -> u64 {
        self.shared.keepers.fetch_add(1, Ordering::Relaxed)
    }

    /// Completes at the next change from now on, also if that comes before it is polled.
    pub(super) fn changed(&self) -> Pin<Box<impl Future<Output = ()> + '_>> {
        let mut changed = Box::pin(self.shared.changed.notified());
        changed.as_mut().enable();
        changed
    }

    /// Changes the state and wakes the waiters.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let changed = change(&mut self.lock());
        self.shared.changed.notify_waiters();
        changed
    }

    /// Runs a call on the state, unless the store fails.
    fn call<T>(&self, call: impl FnOnce(&mut State) -> Result<T>) -> Result<T> {
        let mut state = self.lock();
        state.failure.admit()?;
        let answer = call(&mut state);
        state.failure.lost_answer().map_or(answer, Err)
    }

    /// As [`MemoryStore::call`], for a call that may change what others wait for.
    fn call_and_wake<T>(&self, call: impl FnOnce(&mut State) -> Result<T>) -> Result<T> {
        let answer = self.call(call);
        self.shared.changed.notify_waiters();
        answer
    }

    fn claim_once(&self, key: &Key<'static>) -> Result<Claim<Grant>> {
        let answer = self.call(|state| state.claim_single(key.clone()));
        if matches!(answer, Ok(Claim::Acquired(_))) {
            self.shared.changed.notify_waiters();
        }
        answer
    }
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl From<MemoryStore> for Arc<dyn Engine> {
    fn from(store: MemoryStore) -> Self {
        Arc::new(store)
    }
}

impl std::fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.lock();
        f.debug_struct("MemoryStore").field("keys", &state.keys.len()).field("config", &state.config).finish()
    }
}

impl Engine for MemoryStore {
    fn claim<'a>(&'a self, keys: Vec<Key<'static>>) -> BoxFuture<'a, Answers<Claim<Grant>>> {
        Box::pin(async move { self.call_and_wake(|state| state.claim(keys)) })
    }

    fn claim_wait<'a>(&'a self, key: Key<'static>, limit: Duration) -> BoxFuture<'a, Result<Claim<Grant>>> {
        Box::pin(async move {
            let end = Instant::now().checked_add(limit);
            loop {
                // Listens before it claims, so that it misses no change.
                let changed = self.changed();
                let answer = self.claim_once(&key)?;
                let Claim::InProgress(in_progress) = &answer else { return Ok(answer) };
                let now = Instant::now();
                if end.is_some_and(|end| now >= end) {
                    return Ok(answer);
                }
                let free = in_progress.retry_after.and_then(|left| now.checked_add(left));
                match end.into_iter().chain(free).min() {
                    // It claims again after both.
                    Some(wake) => drop(timeout_at(wake, changed).await),
                    None => changed.await,
                }
            }
        })
    }

    fn record<'a>(&'a self, keys: Vec<Key<'static>>) -> BoxFuture<'a, Answers<RecordOutcome>> {
        Box::pin(async move { self.call_and_wake(|state| state.record(keys)) })
    }

    fn check<'a>(&'a self, keys: Vec<Key<'static>>) -> BoxFuture<'a, Answers<KeyStatus>> {
        Box::pin(async move { self.call(|state| state.check(&keys)) })
    }

    fn inspect<'a>(&'a self, key: Key<'static>) -> BoxFuture<'a, Result<Option<StoredKey>>> {
        Box::pin(async move { self.call(|state| state.inspect(&key)) })
    }

    fn renew<'a>(&'a self, grants: Vec<Arc<Grant>>) -> BoxFuture<'a, Answers<()>> {
        Box::pin(async move { self.call(|state| Ok(grants.iter().map(|grant| state.renew(grant)).collect())) })
    }

    fn keep_alive(&self, grant: &Arc<Grant>) -> Box<dyn KeepAlive> {
        Box::new(Keeper::start(self, grant))
    }

    fn finish<'a>(&'a self, leases: Vec<(Arc<Grant>, Finish)>) -> BoxFuture<'a, Vec<Result<()>>> {
        Box::pin(async move {
            let count = leases.len();
            let answer = self.call_and_wake(|state| Ok(state.finish(leases)));
            answer.unwrap_or_else(|error| vec![Err(error); count])
        })
    }

    fn abandon(&self, grant: Arc<Grant>) {
        self.change(|state| state.abandon(&grant));
    }

    fn held(&self) -> BoxFuture<'_, Result<Vec<HeldKey>>> {
        Box::pin(async move { self.call(|state| Ok(state.held())) })
    }

    fn resolve<'a>(&'a self, key: Key<'static>, resolution: Resolution) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move { self.call_and_wake(|state| state.resolve(&key, resolution)) })
    }

    fn forget<'a>(&'a self, key: Key<'static>) -> BoxFuture<'a, Result<bool>> {
        Box::pin(async move { self.call_and_wake(|state| state.forget(&key)) })
    }

    fn offset<'a>(&'a self, stream: &'a [u8], partition: u32) -> BoxFuture<'a, Result<Option<u64>>> {
        let of = move |state: &mut State| state.side_writes.offsets.get(&(stream.to_vec(), partition)).copied();
        Box::pin(async move { self.call(|state| Ok(of(state))) })
    }

    fn set_offset<'a>(&'a self, stream: &'a [u8], partition: u32, offset: u64) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            self.call(|state| {
                state.side_writes.offsets.insert((stream.to_vec(), partition), offset);
                Ok(())
            })
        })
    }

    fn outbox(&self, limit: usize) -> BoxFuture<'_, Result<Vec<Message>>> {
        Box::pin(async move { self.call(|state| Ok(state.side_writes.outbox(limit))) })
    }

    fn remove_messages(&self, ids: Vec<MessageId>) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.call(|state| {
                state.side_writes.remove_messages(&ids);
                Ok(())
            })
        })
    }

    fn limits(&self) -> Limits {
        self.lock().limits()
    }

    fn stats(&self) -> BoxFuture<'_, Result<EngineStats>> {
        Box::pin(async move { self.call(|state| Ok(state.stats())) })
    }

    fn count_fail_open(&self) {
        self.lock().fail_open += 1;
    }
}
