//! The pool of a store, and the repetition of statements after failures.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use deadpool::Runtime;
use deadpool::managed::Pool;
use onlyonce_core::{BoxFuture, Cause, Error};
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use crate::caller::{Columns, InTransaction};
use crate::connector::Connector;
use crate::error::{Failure, SetupError, is_connection_lost, unavailable};
use crate::opening::{CONFIRM, Object, Opener, Suspended};
use crate::options::{Durability, Options};
use crate::schema::not_durable;

/// A bound of futures that borrow a connection for `'c`: they may also borrow values that live for `'a`.
pub(crate) type Within<'c, 'a> = [&'c &'a (); 0];

/// Whether a statement of a call may have written although its answer was lost, and when the call began. The later statements of the
/// call share it.
#[derive(Debug)]
pub(crate) struct LostAnswers {
    any: AtomicBool,
    is_rejected: AtomicBool,
    begun: Instant,
}

impl Default for LostAnswers {
    fn default() -> Self {
        Self::since(Instant::now())
    }
}

impl LostAnswers {
    /// For a call that has waited since then.
    pub(crate) fn since(begun: Instant) -> Self {
        Self { any: AtomicBool::new(false), is_rejected: AtomicBool::new(false), begun }
    }

    /// For a part of the call, which is repeated alone.
    pub(crate) fn of_part(&self) -> Self {
        Self { any: AtomicBool::new(self.any()), is_rejected: AtomicBool::new(false), begun: self.begun }
    }

    /// Whether the server rejected a statement for good.
    pub(crate) fn is_rejected(&self) -> bool {
        self.is_rejected.load(Ordering::Relaxed)
    }

    pub(crate) fn any(&self) -> bool {
        self.any.load(Ordering::Relaxed)
    }

    /// The error of a call that failed for this reason.
    pub(crate) fn failed(&self, source: Cause) -> Error {
        if self.any() { Error::WriteFailed { source } } else { Error::Unavailable { source } }
    }
}

/// Which connections a statement uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// Those of all calls.
    Shared,
    /// The one for what must not wait for calls: the renewal of leases, and the floor of the clock.
    Reserved,
}

/// The pools of a store, and what its calls have in common.
pub(crate) struct Database {
    pool: Pool<Opener>,
    reserved: Pool<Opener>,
    retry_for: Duration,
    statement_limit: Duration,
    durability: Durability,
    suspended: Arc<Suspended>,
    /// How many writes have had an unknown outcome. Such a write may become visible although no standby has it.
    unknown_writes: AtomicU64,
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Database").field("pool", &self.pool.status()).finish_non_exhaustive()
    }
}

impl Database {
    pub(crate) fn new(connector: &Connector, options: &Options) -> Result<Self, SetupError> {
        let suspended = Arc::new(Suspended::default());
        let opener = Opener::new(connector, options, &suspended);
        let pool = |connections| {
            Pool::builder(opener.clone())
                .max_size(connections)
                .runtime(Runtime::Tokio1)
                .wait_timeout(Some(options.statement_limit))
                .create_timeout(Some(connector.limit()))
                .build()
                .map_err(|error| SetupError::Server(Cause::new(std::io::ErrorKind::Other, error)))
        };
        Ok(Self {
            pool: pool(options.connections - 1)?,
            reserved: pool(1)?,
            retry_for: options.retry_for,
            statement_limit: options.statement_limit,
            durability: options.durability,
            suspended,
            unknown_writes: AtomicU64::new(0),
        })
    }

    pub(crate) fn retry_for(&self) -> Duration {
        self.retry_for
    }

    /// How long a call waits for the statements of other calls.
    pub(crate) fn queue_limit(&self) -> Duration {
        self.retry_for.max(self.statement_limit)
    }

    /// Rejects calls for this reason from now on. `None`: accepts them again.
    pub(crate) fn suspend(&self, reason: Option<String>) {
        self.suspended.set(reason);
    }

    /// Runs statements on a connection. Repeats them after a failure that a repetition may not have, as long as the option
    /// `retry_for` says. The statements must find out themselves what an earlier repetition has done.
    pub(crate) async fn run<'a, T, F>(&self, statements: F) -> Result<T, Error>
    where
        F: for<'c> Fn(&'c mut Object, Within<'c, 'a>) -> BoxFuture<'c, Result<T, Failure>> + Send + Sync,
        T: Send,
    {
        self.repeat(statements, Source::Shared, &LostAnswers::default()).await
    }

    /// As [`Database::run`], for one of several statements of a call, or a call that has waited.
    pub(crate) async fn run_of_call<'a, T, F>(&self, lost: &LostAnswers, statements: F) -> Result<T, Error>
    where
        F: for<'c> Fn(&'c mut Object, Within<'c, 'a>) -> BoxFuture<'c, Result<T, Failure>> + Send + Sync,
        T: Send,
    {
        self.repeat(statements, Source::Shared, lost).await
    }

    /// As [`Database::run`], without a repetition.
    pub(crate) async fn run_once<'a, T, F>(&self, statements: F) -> Result<T, Error>
    where
        F: for<'c> Fn(&'c mut Object, Within<'c, 'a>) -> BoxFuture<'c, Result<T, Failure>> + Send + Sync,
        T: Send,
    {
        if let Some(source) = self.suspended.reason() {
            return Err(Error::Unavailable { source });
        }
        self.try_once(&statements, Source::Shared, false).await.map_err(unavailable)
    }

    async fn repeat<'a, T, F>(&self, statements: F, source: Source, lost: &LostAnswers) -> Result<T, Error>
    where
        F: for<'c> Fn(&'c mut Object, Within<'c, 'a>) -> BoxFuture<'c, Result<T, Failure>> + Send + Sync,
        T: Send,
    {
        let mut pause = Duration::from_millis(1);
        loop {
            // A failover during the repetitions may lead to a server without a standby.
            if let Some(reason) = self.suspended.reason() {
                return Err(lost.failed(reason));
            }
            let cause = match self.try_once(&statements, source, lost.any()).await {
                Ok(answer) => return Ok(answer),
                Err(Failure::Call(error)) => return Err(error),
                Err(Failure::Rejected(source)) => {
                    lost.is_rejected.store(true, Ordering::Relaxed);
                    return Err(lost.failed(source));
                }
                Err(Failure::NotDone(cause) | Failure::Locked(cause)) => cause,
                Err(Failure::Unknown(cause)) => {
                    lost.any.store(true, Ordering::Relaxed);
                    cause
                }
            };
            if lost.begun.elapsed() + pause >= self.retry_for {
                return Err(lost.failed(cause));
            }
            tracing::debug!(error = %cause, "repeating a statement");
            sleep(pause).await;
            pause = pause.mul_f32(1.5).min(Duration::from_millis(500));
        }
    }

    /// Checks the server of a transaction of the caller. Its commit waits for the standby from now on, and its statements wait for a lock
    /// for three seconds, unless it has a limit of its own. Returns whether [`Database::end_lock_limit`] has a limit to end.
    pub(crate) async fn check_transaction(&self, transaction: &dyn InTransaction) -> Result<bool, Error> {
        if let Some(source) = self.suspended.reason() {
            return Err(Error::Unavailable { source });
        }
        let settings = "SELECT CASE WHEN current_setting('synchronous_commit') IN ('on', 'remote_apply')
                                    THEN current_setting('synchronous_commit')
                                    ELSE set_config('synchronous_commit', 'on', true) END,
                               current_setting('synchronous_standby_names'), current_setting('fsync'),
                               current_setting('full_page_writes'),
                               CASE WHEN current_setting('lock_timeout') = '0'
                                    THEN set_config('lock_timeout', '3s', true) IS NOT NULL
                                    ELSE false END";
        let rows = transaction.query(settings, &[]).await.map_err(unavailable)?;
        let no_row = "the server returned no settings to a transaction: roll it back and retry";
        let row = rows.first().ok_or_else(|| Error::Unavailable { source: no_row.into() })?;
        let text = |column: usize| row.column::<&str>(column).map_err(unavailable);
        let has_limit = row.column(4).map_err(unavailable)?;
        match not_durable(text(0)?, text(1)?, text(2)?, text(3)?, self.durability) {
            Some((reason, remedy)) => {
                self.end_lock_limit(transaction, has_limit).await;
                Err(Error::Unavailable { source: format!("{reason}: {remedy}").into() })
            }
            None => Ok(has_limit),
        }
    }

    /// The caller's own statements wait without a limit again.
    pub(crate) async fn end_lock_limit(&self, transaction: &dyn InTransaction, has_limit: bool) {
        if has_limit {
            // A transaction that has failed rejects it, and ends with its settings.
            let _ = transaction.batch_execute("SET LOCAL lock_timeout = 0").await;
        }
    }

    /// A connection for statements that are not repeated.
    pub(crate) async fn connection(&self) -> Result<Object, Failure> {
        match self.suspended.reason() {
            Some(reason) => Err(Failure::NotDone(reason)),
            None => self.pooled(Source::Shared).await,
        }
    }

    async fn pooled(&self, source: Source) -> Result<Object, Failure> {
        let pool = match source {
            Source::Shared => &self.pool,
            Source::Reserved => &self.reserved,
        };
        Ok(pool.get().await?)
    }

    /// Runs statements within the time limit of a try.
    pub(crate) async fn limited<T>(&self, run: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        let answer = timeout(self.statement_limit, run).await.unwrap_or_else(|_| Err(Failure::timed_out()));
        if let Err(Failure::Unknown(_)) = &answer {
            self.count_unknown_write();
        }
        answer
    }

    /// The rows of one statement, which is prepared once on each connection.
    pub(crate) async fn rows(&self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, Error> {
        self.rows_of_call(&LostAnswers::default(), sql, params).await
    }

    /// As [`Database::rows`], of a statement that changes no key: a lost answer leaves nothing unknown.
    pub(crate) async fn rows_read(&self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, Error> {
        self.rows(sql, params).await.map_err(nothing_written)
    }

    /// As [`Database::rows`], on these connections.
    pub(crate) async fn rows_from(
        &self,
        source: Source,
        sql: &str,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, Error> {
        let lost = LostAnswers::default();
        self.rows_of(source, &lost, sql, params).await
    }

    /// As [`Database::rows`], for one of several statements of a call.
    pub(crate) async fn rows_of_call(
        &self,
        lost: &LostAnswers,
        sql: &str,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, Error> {
        self.rows_of(Source::Shared, lost, sql, params).await
    }

    async fn rows_of(
        &self,
        source: Source,
        lost: &LostAnswers,
        sql: &str,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, Error> {
        let statement = self.repeat(
            move |connection, _| {
                Box::pin(async move {
                    let statement = connection.prepare_cached(sql).await?;
                    Ok(connection.query(&statement, params).await?)
                })
            },
            source,
            lost,
        );
        statement.await
    }

    /// As [`Database::rows_of_call`]. `None` if the statement did nothing, because another transaction has locked a row. A call that may
    /// have written waits on: the other transaction may be its own.
    pub(crate) async fn rows_unless_locked(
        &self,
        lost: &LostAnswers,
        sql: &str,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Option<Vec<Row>>, Error> {
        let statement = self.repeat(
            move |connection, _| {
                Box::pin(async move {
                    let statement = connection.prepare_cached(sql).await?;
                    match connection.query(&statement, params).await.map_err(Failure::from) {
                        Ok(rows) => Ok(Some(rows)),
                        Err(Failure::Locked(_)) if !lost.any() => Ok(None),
                        Err(failure) => Err(failure),
                    }
                })
            },
            Source::Shared,
            lost,
        );
        statement.await
    }

    /// Waits until everything that is visible now is on the standby.
    pub(crate) async fn confirm(&self) -> Result<(), Error> {
        let confirmed = self.run(|connection, _| Box::pin(async move { Ok(connection.batch_execute(CONFIRM).await?) }));
        // It changes no row.
        confirmed.await.map_err(nothing_written)
    }

    /// What a connection found that was opened before the last of them may not be on the standby.
    pub(crate) fn unknown_writes(&self) -> u64 {
        self.unknown_writes.load(Ordering::SeqCst)
    }

    /// Counts a write with an unknown outcome, and closes the idle connections: each new one confirms what is visible.
    fn count_unknown_write(&self) {
        self.unknown_writes.fetch_add(1, Ordering::SeqCst);
        for pool in [&self.pool, &self.reserved] {
            pool.retain(|_, _| false);
            pool.manager().close_confirmed();
        }
    }

    /// Runs statements once. If a write of this process had an unknown outcome meanwhile, or an earlier try of the call had one, what they
    /// find may not be on the standby yet.
    async fn try_once<'a, T, F>(&self, statements: &F, source: Source, is_unknown: bool) -> Result<T, Failure>
    where
        F: for<'c> Fn(&'c mut Object, Within<'c, 'a>) -> BoxFuture<'c, Result<T, Failure>> + Send + Sync,
        T: Send,
    {
        let unknown_before = self.unknown_writes();
        let mut connection = self.pooled(source).await?;
        let confirmed = async {
            let answer = statements(&mut connection, []).await?;
            if is_unknown || self.unknown_writes() != unknown_before {
                connection.batch_execute(CONFIRM).await?;
            }
            Ok(answer)
        };
        let answer = timeout(self.statement_limit, confirmed).await.unwrap_or_else(|_| Err(Failure::timed_out()));
        if let Err(Failure::Unknown(_)) = &answer {
            // The idle connections may have lost their server, too.
            self.count_unknown_write();
        }
        let is_confirmed = answer.is_ok() || self.unknown_writes() == unknown_before;
        if !is_confirmed || answer.as_ref().err().is_some_and(is_connection_lost) {
            // Closes it instead of giving it back.
            drop(Object::take(connection));
        }
        answer
    }
}

/// The error of a call that only reads, and whose answer was lost.
pub(crate) fn nothing_written(error: Error) -> Error {
    match error {
        Error::WriteFailed { source } => Error::Unavailable { source },
        other => other,
    }
}
