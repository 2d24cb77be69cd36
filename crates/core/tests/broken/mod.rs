//! Engines that break one rule each.

mod rules;

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use onlyonce_core::conformance::{Factory, Setup, Subject};
use onlyonce_core::testing::MemoryStore;
use onlyonce_core::{
    Answers, AttemptInfo, BoxFuture, Claim, Completion, Engine, EngineStats, Error, FencingToken, Finish, Grant,
    HeldKey, KeepAlive, Key, KeyStatus, Limits, Message, MessageId, OnInterrupt, RecordOutcome, Release, Resolution,
    Result, SideWrites, StoredKey, Timestamp,
};

pub(crate) use self::rules::{RULES, Rule};
use crate::PausedClock;

pub(crate) struct BrokenFactory(pub(crate) Rule);

impl Factory for BrokenFactory {
    fn start(&self, mut setup: Setup) -> BoxFuture<'_, Option<Subject>> {
        let rule = self.0;
        let millisecond = Duration::from_millis(1);
        match rule {
            Rule::WindowsNeverEnd => setup.window = Duration::from_secs(1 << 28),
            Rule::WindowsAreHalved => setup.window /= 2,
            Rule::WindowsAreAMillisecondLonger => setup.window += millisecond,
            Rule::WindowsAreAMillisecondShorter => setup.window -= millisecond,
            Rule::StreamTimeIsMissing => setup.max_ahead = None,
            Rule::StraysAdvanceStreamTime => setup.max_ahead = setup.max_ahead.map(|_| setup.window),
            Rule::HeldKeysAreFreed => setup.on_interrupt = OnInterrupt::Rerun,
            Rule::LimitsAreIgnored => {
                setup.in_flight_limit = 1_000;
                setup.held_limit = 1_000;
                setup.result_limit = 1_000;
                setup.key_limit = 10_000;
            }
            _ => {}
        }
        let inner = crate::memory_store(setup);
        Box::pin(
            async move { Some(Subject::new(Arc::new(Broken { inner, rule }) as Arc<dyn Engine>).clock(PausedClock)) },
        )
    }
}

/// The key without payload, timestamp and window; as it is, if it is not valid.
fn bare(key: &Key<'static>) -> Key<'static> {
    let mut encoded = Vec::new();
    let encoded = key.encode(usize::MAX, &mut encoded).map(|()| encoded);
    encoded.ok().and_then(|encoded| Key::decode(&encoded)).unwrap_or_else(|| key.clone())
}

struct Broken {
    inner: MemoryStore,
    rule: Rule,
}

impl Broken {
    fn is(&self, rule: Rule) -> bool {
        self.rule == rule
    }

    fn key(&self, key: Key<'static>) -> Key<'static> {
        match self.rule {
            Rule::OwnWindowsAreIgnored => key.window(Duration::MAX),
            Rule::PayloadsAreIgnored if key.payload_fingerprint().is_some() => bare(&key),
            Rule::TimestampsAreIgnored if !self.inner.limits().is_stream_time => bare(&key),
            _ => key,
        }
    }

    fn keys(&self, keys: Vec<Key<'static>>) -> Vec<Key<'static>> {
        keys.into_iter().map(|key| self.key(key)).collect()
    }

    fn grant(&self, grant: Grant) -> Grant {
        let attempt = grant.attempt;
        let (mut token, mut number) = (attempt.token(), attempt.number());
        match self.rule {
            Rule::TokensAreReused => token = FencingToken::new(1),
            Rule::AttemptsAreNotCounted => number = 1,
            _ => return grant,
        }
        let attempt = AttemptInfo::new(token, number, attempt.prior());
        Grant::new(grant.key, attempt, grant.claimed_at, grant.granted_at_ms)
    }

    fn claimed(&self, key: Key<'static>, claim: Claim<Grant>) -> Claim<Grant> {
        match claim {
            Claim::Acquired(grant) => Claim::Acquired(self.grant(grant)),
            Claim::InProgress(_) if self.is(Rule::ALeasedKeyIsAcquired) => {
                let attempt = AttemptInfo::new(FencingToken::new(1 << 40), 1, None);
                Claim::Acquired(Grant::new(key, attempt, Timestamp::UNIX_EPOCH, 0))
            }
            other => other,
        }
    }

    async fn claim_all(&self, keys: Vec<Key<'static>>) -> Answers<Claim<Grant>> {
        let keys = self.keys(keys);
        if keys.is_empty() && self.is(Rule::CallsWithoutKeysFail) {
            return Err(Error::Closed);
        }
        let answers = match self.rule {
            Rule::InvalidKeysFailAlone => {
                let mut answers = Vec::new();
                for key in &keys {
                    let one = self.inner.claim(vec![key.clone()]).await;
                    answers.push(one.and_then(|mut one| one.remove(0)));
                }
                answers
            }
            _ => self.inner.claim(keys.clone()).await?,
        };
        if self.is(Rule::DroppedClaimsKeepTheirLease) {
            tokio::task::yield_now().await;
        }
        let claimed = |(key, claim): (_, Result<Claim<Grant>>)| claim.map(|claim| self.claimed(key, claim));
        let mut answers: Vec<_> = keys.into_iter().zip(answers).map(claimed).collect();
        if self.is(Rule::AnswersAreReversed) {
            answers.reverse();
        }
        Ok(answers)
    }

    async fn finish_one(&self, grant: Arc<Grant>, finish: Finish) -> Result<()> {
        let is_free = || async {
            !matches!(
                self.inner.inspect(grant.key.clone()).await,
                Ok(Some(StoredKey::Processing { state: onlyonce_core::LeaseState::Leased(_), .. }))
            )
        };
        match (self.rule, &finish) {
            (Rule::LateCompletionsAreRejected, Finish::Complete(_)) if is_free().await => {
                return Err(grant.superseded());
            }
            (Rule::RepeatedCompletionsAreRejected, Finish::Complete(_)) => {
                if let Ok(Some(StoredKey::Completed(_))) = self.inner.inspect(grant.key.clone()).await {
                    return Err(grant.superseded());
                }
            }
            (Rule::RepeatedCompletionsStoreSideWrites, Finish::Complete(completion)) => {
                if let Ok(Some(StoredKey::Completed(_))) = self.inner.inspect(grant.key.clone()).await {
                    self.store(completion.side_writes().cloned()).await?;
                }
            }
            (Rule::SideWritesComeFirst, Finish::Complete(completion)) => {
                self.store(completion.side_writes().cloned()).await?;
                tokio::task::yield_now().await;
            }
            (Rule::EmptyResultsAreLeftOut, Finish::Complete(completion)) if completion.result().is_empty() => {
                let released = vec![(Arc::clone(&grant), Finish::Release(Release::default()))];
                self.inner.finish(released).await.remove(0)?;
                self.inner.record(vec![grant.key.clone()]).await?.remove(0)?;
                return Ok(());
            }
            (Rule::OffsetsNeverGoBack, Finish::Complete(completion)) => {
                for offset in completion.side_writes().iter().flat_map(|it| &it.offsets) {
                    let before = self.inner.offset(&offset.stream, offset.partition).await?;
                    if before > Some(offset.offset) {
                        return Ok(());
                    }
                }
            }
            _ => {}
        }
        let side_writes = match &finish {
            Finish::Complete(completion) => completion.side_writes().cloned(),
            Finish::Release(_) => None,
        };
        let finish = match finish {
            Finish::Complete(completion) if self.is(Rule::ResultsAreEmpty) => {
                let side_writes = completion.side_writes().cloned().unwrap_or_default();
                Finish::Complete(Completion::new("").with_side_writes(side_writes))
            }
            Finish::Release(mut release) => {
                match self.rule {
                    Rule::ReleasesForgetTheDoubt => release.may_have_happened = false,
                    Rule::ReleasesKeepTheAttempts => release.reset_attempts = false,
                    Rule::BackoffsAreIgnored => release.backoff = Duration::ZERO,
                    _ => {}
                }
                Finish::Release(release)
            }
            other => other,
        };
        let answer = self.inner.finish(vec![(Arc::clone(&grant), finish)]).await.remove(0);
        match (self.rule, &answer) {
            (Rule::LateFinishersSucceed, Err(Error::Superseded { .. })) => Ok(()),
            (Rule::MessagesOfARejectionAreStored, Err(Error::Superseded { .. })) => {
                self.store(side_writes).await?;
                answer
            }
            _ => answer,
        }
    }

    /// Stores side writes with a key of the broken engine's own.
    async fn store(&self, side_writes: Option<SideWrites>) -> Result<()> {
        let key = Key::from("of the broken engine");
        let claim = self.inner.claim(vec![key.clone()]).await?.remove(0)?;
        if let (Claim::Acquired(other), Some(side_writes)) = (claim, side_writes) {
            let completion = Completion::new("").with_side_writes(side_writes);
            self.inner.finish(vec![(Arc::new(other), Finish::Complete(completion))]).await.remove(0)?;
        }
        self.inner.forget(key).await?;
        Ok(())
    }

    /// True if the rule changes how single leases are finished.
    fn finishes_one_by_one(&self) -> bool {
        matches!(
            self.rule,
            Rule::OffsetsAreStoredAfterARejection
                | Rule::MessagesOfARejectionAreStored
                | Rule::LateFinishersSucceed
                | Rule::LateCompletionsAreRejected
                | Rule::RepeatedCompletionsAreRejected
                | Rule::RepeatedCompletionsStoreSideWrites
                | Rule::OffsetsNeverGoBack
                | Rule::ResultsAreEmpty
                | Rule::EmptyResultsAreLeftOut
                | Rule::SideWritesComeFirst
                | Rule::ReleasesForgetTheDoubt
                | Rule::ReleasesKeepTheAttempts
                | Rule::BackoffsAreIgnored
        )
    }
}

/// Renews nothing, and never reports a loss.
struct Idle;

impl KeepAlive for Idle {
    fn lost<'a>(&'a mut self) -> BoxFuture<'a, Error> {
        Box::pin(pending())
    }
}

/// Renews a lease, and never reports a loss.
struct Silent {
    _inner: Box<dyn KeepAlive>,
}

impl KeepAlive for Silent {
    fn lost<'a>(&'a mut self) -> BoxFuture<'a, Error> {
        Box::pin(pending())
    }
}

/// Renews a lease, and reports a loss at once.
struct Hasty(Arc<Grant>);

impl KeepAlive for Hasty {
    fn lost<'a>(&'a mut self) -> BoxFuture<'a, Error> {
        Box::pin(std::future::ready(self.0.superseded()))
    }
}

impl Engine for Broken {
    fn claim<'a>(&'a self, keys: Vec<Key<'static>>) -> BoxFuture<'a, Answers<Claim<Grant>>> {
        Box::pin(self.claim_all(keys))
    }

    fn claim_wait<'a>(&'a self, key: Key<'static>, limit: Duration) -> BoxFuture<'a, Result<Claim<Grant>>> {
        Box::pin(async move {
            let key = self.key(key);
            let limit = if self.is(Rule::WaitsDoNotWait) { Duration::ZERO } else { limit };
            if self.is(Rule::WaitsDoNotEndEarly) {
                tokio::time::sleep(limit).await;
            }
            let claim = self.inner.claim_wait(key.clone(), limit).await?;
            Ok(self.claimed(key, claim))
        })
    }

    fn record<'a>(&'a self, keys: Vec<Key<'static>>) -> BoxFuture<'a, Answers<RecordOutcome>> {
        Box::pin(async move {
            match self.rule {
                Rule::CallsPanic => panic!("this engine panics, as it should"),
                Rule::CallsHang => pending().await,
                _ => {}
            }
            let keys = self.keys(keys);
            let is_batch = keys.len() > 1;
            let answers = self.inner.record(keys).await?;
            let broken = |answer| match answer {
                Ok(RecordOutcome::Duplicate { in_flight: true }) if self.is(Rule::RecordsOfLeasedKeysSucceed) => {
                    Ok(RecordOutcome::First)
                }
                Ok(_) if is_batch && self.is(Rule::DuplicatesInABatchAreRecorded) => Ok(RecordOutcome::First),
                other => other,
            };
            Ok(answers.into_iter().map(broken).collect())
        })
    }

    fn check<'a>(&'a self, keys: Vec<Key<'static>>) -> BoxFuture<'a, Answers<KeyStatus>> {
        Box::pin(async move {
            let keys = self.keys(keys);
            let answers = self.inner.check(keys.clone()).await?;
            if self.is(Rule::ChecksClaim) {
                self.inner.claim(keys).await?;
            }
            Ok(answers)
        })
    }

    fn inspect<'a>(&'a self, key: Key<'static>) -> BoxFuture<'a, Result<Option<StoredKey>>> {
        let limit = self.inner.limits().key_bytes;
        Box::pin(async move {
            if self.is(Rule::LongStoredKeysAreRejected) {
                key.encode(limit, &mut Vec::new())?;
            }
            self.inner.inspect(key).await
        })
    }

    fn renew<'a>(&'a self, grants: Vec<Arc<Grant>>) -> BoxFuture<'a, Answers<()>> {
        Box::pin(async move {
            let answers = self.inner.renew(grants).await?;
            if self.is(Rule::RenewalsOfDroppedLeasesSucceed) {
                return Ok(answers.into_iter().map(|_| Ok(())).collect());
            }
            Ok(answers)
        })
    }

    fn keep_alive(&self, grant: &Arc<Grant>) -> Box<dyn KeepAlive> {
        match self.rule {
            Rule::LeasesAreNotKept => Box::new(Idle),
            Rule::LossesAreReportedAtOnce => Box::new(Hasty(Arc::clone(grant))),
            Rule::LossesAreNotReported => Box::new(Silent { _inner: self.inner.keep_alive(grant) }),
            _ => self.inner.keep_alive(grant),
        }
    }

    fn finish<'a>(&'a self, leases: Vec<(Arc<Grant>, Finish)>) -> BoxFuture<'a, Vec<Result<()>>> {
        if !self.finishes_one_by_one() {
            return self.inner.finish(leases);
        }
        Box::pin(async move {
            let mut answers = Vec::new();
            for (grant, finish) in leases {
                answers.push(self.finish_one(grant, finish).await);
            }
            answers
        })
    }

    fn abandon(&self, grant: Arc<Grant>) {
        match self.rule {
            Rule::DropsAreIgnored => {}
            Rule::DropsEndOtherLeases => {
                // The next token is that of the holder that took over.
                for token in grant.token().get()..grant.token().get() + 2 {
                    let attempt = AttemptInfo::new(FencingToken::new(token), 1, None);
                    self.inner.abandon(Arc::new(Grant::new(grant.key.clone(), attempt, grant.claimed_at, 0)));
                }
            }
            _ => self.inner.abandon(grant),
        }
    }

    fn held(&self) -> BoxFuture<'_, Result<Vec<HeldKey>>> {
        Box::pin(async move {
            let mut held = self.inner.held().await?;
            if self.is(Rule::HeldKeysAreListedInReverse) {
                held.reverse();
            }
            Ok(held)
        })
    }

    fn resolve<'a>(&'a self, key: Key<'static>, resolution: Resolution) -> BoxFuture<'a, Result<()>> {
        self.inner.resolve(key, resolution)
    }

    fn forget<'a>(&'a self, key: Key<'static>) -> BoxFuture<'a, Result<bool>> {
        Box::pin(async move {
            match self.rule {
                Rule::HeldKeysAreForgotten => {
                    // Fails for keys that are not held.
                    drop(self.inner.resolve(key.clone(), Resolution::Rerun).await);
                }
                Rule::LeasedKeysAreForgotten => {
                    self.inner.expire_lease(&key);
                    drop(self.inner.resolve(key.clone(), Resolution::Rerun).await);
                }
                _ => {}
            }
            self.inner.forget(key).await
        })
    }

    fn offset<'a>(&'a self, stream: &'a [u8], partition: u32) -> BoxFuture<'a, Result<Option<u64>>> {
        self.inner.offset(stream, partition)
    }

    fn set_offset<'a>(&'a self, stream: &'a [u8], partition: u32, offset: u64) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let before = self.inner.offset(stream, partition).await?;
            if self.is(Rule::OffsetsNeverGoBack) && before > Some(offset) {
                return Ok(());
            }
            self.inner.set_offset(stream, partition, offset).await
        })
    }

    fn outbox(&self, limit: usize) -> BoxFuture<'_, Result<Vec<Message>>> {
        Box::pin(async move {
            let mut messages = self.inner.outbox(limit).await?;
            if self.is(Rule::MessagesAreListedInReverse) {
                messages.reverse();
            }
            Ok(messages)
        })
    }

    fn remove_messages(&self, ids: Vec<MessageId>) -> BoxFuture<'_, Result<()>> {
        match self.rule {
            Rule::MessagesAreNotRemoved => Box::pin(async { Ok(()) }),
            _ => self.inner.remove_messages(ids),
        }
    }

    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn stats(&self) -> BoxFuture<'_, Result<EngineStats>> {
        match self.rule {
            Rule::StatsAreZero => Box::pin(async { Ok(EngineStats::default()) }),
            _ => self.inner.stats(),
        }
    }
}
