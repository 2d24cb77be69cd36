//! The local store as an engine of the adapters.

use std::sync::Arc;
use std::time::Duration;

use onlyonce_core::{
    Answers, AttemptInfo, BoxFuture, Claim, Completion, EngineStats, Error, FencingToken, Finish, Grant, HeldKey,
    KeepAlive, Key, KeyStatus, Limits, Message, MessageId, OnInterrupt, RecordOutcome, Release, Resolution, Result,
    StoredKey, Timestamp,
};

use super::awaited::grant_waiting;
use super::lease::{CompleteError, Lease, unanswered};
use super::shared::Shared;
use super::store::Store;
use crate::engine::renewal::Renewal;
use crate::engine::response;

impl From<Store> for Arc<dyn onlyonce_core::Engine> {
    fn from(store: Store) -> Self {
        Arc::new(store)
    }
}

impl onlyonce_core::Engine for Store {
    fn claim<'a>(&'a self, keys: Vec<Key<'static>>) -> BoxFuture<'a, Answers<Claim<Grant>>> {
        Box::pin(async move {
            let request = self.shared.engine().request(&keys)?;
            let answers = self.shared.committer()?.claim(request).await?.take();
            Ok(answers.into_iter().map(|answer| Ok(exported(answer?))).collect())
        })
    }

    fn claim_wait<'a>(&'a self, key: Key<'static>, limit: Duration) -> BoxFuture<'a, Result<Claim<Grant>>> {
        Box::pin(async move {
            let request = self.shared.engine().request(std::iter::once(&key))?;
            Ok(exported(grant_waiting(&self.shared, &request, limit).await?))
        })
    }

    fn record<'a>(&'a self, keys: Vec<Key<'static>>) -> BoxFuture<'a, Answers<RecordOutcome>> {
        self.record_batch(keys).into_future()
    }

    fn check<'a>(&'a self, keys: Vec<Key<'static>>) -> BoxFuture<'a, Answers<KeyStatus>> {
        self.check_batch(keys).into_future()
    }

    fn inspect<'a>(&'a self, key: Key<'static>) -> BoxFuture<'a, Result<Option<StoredKey>>> {
        Store::inspect(self, key).into_future()
    }

    fn renew<'a>(&'a self, grants: Vec<Arc<Grant>>) -> BoxFuture<'a, Answers<()>> {
        Box::pin(async move {
            let renewed = grants.iter().map(|grant| {
                let ours = self.shared.engine().imported(grant)?;
                if self.shared.engine().renew(&ours)? { Ok(()) } else { Err(grant.superseded()) }
            });
            Ok(renewed.collect())
        })
    }

    fn keep_alive(&self, grant: &Arc<Grant>) -> Box<dyn KeepAlive> {
        match self.shared.engine().imported(grant) {
            Ok(ours) => Box::new(Renewing(Renewal::start(self.shared.engine(), &ours))),
            Err(error) => Box::new(NotRenewed(error)),
        }
    }

    fn finish<'a>(&'a self, leases: Vec<(Arc<Grant>, Finish)>) -> BoxFuture<'a, Vec<Result<()>>> {
        Box::pin(async move {
            let mut answers: Vec<Option<Result<()>>> = Vec::new();
            let (mut completions, mut releases) = (Vec::new(), Vec::new());
            // Leases from the start: those that are not queued when this future is dropped are abandoned.
            let lease = |grant| Lease::new(grant, Arc::clone(&self.shared));
            for (index, (grant, finish)) in leases.into_iter().enumerate() {
                answers.push(None);
                match (self.shared.engine().imported(&grant), finish) {
                    (Ok(grant), Finish::Complete(completion)) => completions.push((index, lease(grant), completion)),
                    (Ok(grant), Finish::Release(release)) => releases.push((index, lease(grant), release)),
                    (Err(error), _) => set(&mut answers, index, Err(error)),
                }
            }
            for (index, answer) in complete(&self.shared, completions).await {
                set(&mut answers, index, answer);
            }
            for (index, answer) in release(&self.shared, releases).await {
                set(&mut answers, index, answer);
            }
            let missing = || Err(unanswered(&self.shared));
            answers.into_iter().map(|answer| answer.unwrap_or_else(missing)).collect()
        })
    }

    fn abandon(&self, grant: Arc<Grant>) {
        if let Ok(ours) = self.shared.engine().imported(&grant) {
            self.shared.engine().abandon(&ours);
        }
    }

    fn held(&self) -> BoxFuture<'_, Result<Vec<HeldKey>>> {
        Store::held(self).into_future()
    }

    fn resolve<'a>(&'a self, key: Key<'static>, resolution: Resolution) -> BoxFuture<'a, Result<()>> {
        Store::resolve(self, key, resolution).into_future()
    }

    fn forget<'a>(&'a self, key: Key<'static>) -> BoxFuture<'a, Result<bool>> {
        Store::forget(self, key).into_future()
    }

    fn offset<'a>(&'a self, stream: &'a [u8], partition: u32) -> BoxFuture<'a, Result<Option<u64>>> {
        Store::offset(self, stream, partition).into_future()
    }

    fn set_offset<'a>(&'a self, stream: &'a [u8], partition: u32, offset: u64) -> BoxFuture<'a, Result<()>> {
        Store::set_offset(self, stream, partition, offset).into_future()
    }

    fn outbox(&self, limit: usize) -> BoxFuture<'_, Result<Vec<Message>>> {
        Store::outbox(self, limit).into_future()
    }

    fn remove_messages(&self, ids: Vec<MessageId>) -> BoxFuture<'_, Result<()>> {
        Store::remove_messages(self, ids).into_future()
    }

    fn limits(&self) -> Limits {
        let config = self.shared.engine().config();
        Limits::new(config.result_limit, config.key_limit, config.max_ahead_ms.is_some())
    }

    fn stats(&self) -> BoxFuture<'_, Result<EngineStats>> {
        Box::pin(async move {
            let stats = |handle: &crate::engine::workers::StoreHandle| handle.engine.engine_stats();
            self.shared.committer()?.call(super::call::Queue::Ask, stats).await
        })
    }

    fn count_fail_open(&self) {
        Store::count_fail_open(self);
    }
}

fn set(answers: &mut [Option<Result<()>>], index: usize, answer: Result<()>) {
    if let Some(slot) = answers.get_mut(index) {
        *slot = Some(answer);
    }
}

async fn complete(shared: &Arc<Shared>, completions: Vec<(usize, Lease, Completion)>) -> Vec<(usize, Result<()>)> {
    if completions.is_empty() {
        return Vec::new();
    }
    let mut indexes = Vec::with_capacity(completions.len());
    let leases = completions.into_iter().map(|(index, lease, completion)| {
        indexes.push(index);
        (lease, completion)
    });
    let leases: Vec<_> = leases.collect();
    let completed = match shared.committer() {
        Ok(committer) => committer.complete(leases).await,
        Err(error) => leases
            .into_iter()
            .map(|(lease, completion)| Err(CompleteError::new(error.clone(), completion, Some(lease))))
            .collect(),
    };
    let answers = completed.into_iter().map(|answer| match answer {
        Ok(_) => Ok(()),
        Err(failed) => {
            let (error, _, lease) = failed.into_parts();
            // The caller still has its grant, and abandons it itself.
            lease.into_iter().for_each(Lease::disarm);
            Err(error)
        }
    });
    indexes.into_iter().zip(answers).collect()
}

async fn release(shared: &Arc<Shared>, releases: Vec<(usize, Lease, Release)>) -> Vec<(usize, Result<()>)> {
    let (mut answers, mut indexes, mut leases) = (Vec::new(), Vec::new(), Vec::new());
    for (index, mut lease, release) in releases {
        // Under `Hold` such an attempt holds its key, as if the lease were dropped.
        if release.may_have_happened && shared.engine().config().on_interrupt == OnInterrupt::Hold {
            let is_ours = shared.engine().interrupt(lease.grant());
            let superseded = lease.grant().superseded();
            lease.disarm();
            answers.push((index, is_ours.and_then(|is_ours| if is_ours { Ok(()) } else { Err(superseded) })));
            continue;
        }
        if release.may_have_happened {
            lease.set_may_have_happened();
        }
        if release.reset_attempts {
            lease.reset_attempts();
        }
        indexes.push(index);
        leases.push((lease, release.backoff));
    }
    let released = match (leases.is_empty(), shared.committer()) {
        (true, _) => Vec::new(),
        (false, Ok(committer)) => committer.release(leases).await,
        (false, Err(error)) => vec![Err(error); leases.len()],
    };
    answers.extend(indexes.into_iter().zip(released));
    answers
}

/// A lease as data, for the caller.
fn exported(answer: Claim<response::Grant>) -> Claim<Grant> {
    match answer {
        Claim::Acquired(grant) => {
            let attempt = AttemptInfo::new(FencingToken::new(grant.token), grant.attempt, grant.prior);
            let claimed_at = Timestamp::from_unix_ms(grant.at_ms);
            Claim::Acquired(Grant::new(grant.full_key(), attempt, claimed_at, grant.claimed_monotonic_ms))
        }
        Claim::Completed(completed) => Claim::Completed(completed),
        Claim::InProgress(in_progress) => Claim::InProgress(in_progress),
    }
}

struct Renewing(Renewal);

impl KeepAlive for Renewing {
    fn lost<'a>(&'a mut self) -> BoxFuture<'a, Error> {
        Box::pin(std::future::poll_fn(|context| self.0.poll_lost(context)))
    }
}

struct NotRenewed(Error);

impl KeepAlive for NotRenewed {
    fn lost<'a>(&'a mut self) -> BoxFuture<'a, Error> {
        Box::pin(std::future::ready(self.0.clone()))
    }
}
