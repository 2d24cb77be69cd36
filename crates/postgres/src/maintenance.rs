//! The background work of a store: the floor of the clock, the check of durability, and the removal of expired rows.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tokio_postgres::Client;

use crate::connection::Source;
use crate::connector::Connector;
use crate::core::Core;
use crate::error::{Failure, unavailable};
use crate::reading;
use crate::row::signed;
use crate::schema::{DURABILITY_SETTINGS, not_durable};

/// How often a store does its part.
const INTERVAL: Duration = Duration::from_secs(1);
/// How often held keys are counted, in intervals, unless there is room for only so many more.
const COUNT_TICKS: u64 = 10;
const NEAR_LIMIT: u64 = 10_000;
/// How many pages a slice has at least, unless a slice of as many fails.
const LEAST_PAGES: i64 = 128;
/// How long slices fail before the removal of all expired rows does.
const LONGEST_SLICE: Duration = Duration::from_secs(60);

/// Counts held keys and removes expired rows, until the task is aborted.
pub(crate) async fn maintain(core: Arc<Core>) {
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut expiry, mut tick) = (Expiry::default(), 0_u64);
    let mut failures = Failures::of("expired keys are not removed");
    loop {
        ticks.tick().await;
        let is_counted = tick.is_multiple_of(COUNT_TICKS) || core.held.room(core.options.held_limit) < NEAR_LIMIT;
        if core.options.holds()
            && is_counted
            && let Ok(held) = reading::count_held(&core).await
        {
            core.held.set(held);
        }
        failures.report(expire_slice(&core, &mut expiry).await);
        tick = tick.wrapping_add(1);
    }
}

/// Raises the floor of the clock each second, until the task is aborted. A slow removal of expired rows does not delay it.
pub(crate) async fn keep_floor(core: Arc<Core>) {
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut failures = Failures::of("the floor of the clock is not raised");
    loop {
        ticks.tick().await;
        failures.report(raise_floor(&core).await);
    }
}

/// Failures of a task that is repeated each second: they are logged when they begin and when they end.
struct Failures {
    what: &'static str,
    are_logged: bool,
}

impl Failures {
    const fn of(what: &'static str) -> Self {
        Self { what, are_logged: false }
    }

    fn report<T>(&mut self, result: onlyonce_core::Result<T>) -> Option<T> {
        match &result {
            Err(error) if !self.are_logged => {
                tracing::warn!(error = %error.chain(), "{}: trying again each second", self.what);
            }
            Ok(_) if self.are_logged => tracing::info!("no longer: {}", self.what),
            _ => {}
        }
        self.are_logged = result.is_err();
        result.ok()
    }
}

/// Checks the durability of the server each second, until the task is aborted. It has a connection of its own, so that it waits for no
/// call, and for no standby.
pub(crate) async fn watch_durability(core: Arc<Core>, connector: Connector) {
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut failures = Failures::of("the durability of the server is not known");
    let mut client = None;
    loop {
        ticks.tick().await;
        let limit = if client.is_some() { core.options.statement_limit } else { connector.limit() };
        let checked = timeout(limit, check_durability(&core, &connector, &mut client)).await;
        let checked = checked.unwrap_or_else(|_| Err(unavailable(Failure::timed_out())));
        if checked.is_err() {
            client = None;
        }
        failures.report(checked);
    }
}

/// Stores the time about once a second, so that it does not go back further when the clock of another server counts.
async fn raise_floor(core: &Core) -> onlyonce_core::Result<()> {
    core.database.rows_from(Source::Reserved, &core.sql.maintain, &[]).await?;
    Ok(())
}

/// Rejects calls while the server does not wait for a standby, which its operator or its failover manager can change at any time.
async fn check_durability(
    core: &Core,
    connector: &Connector,
    client: &mut Option<Client>,
) -> onlyonce_core::Result<()> {
    if client.is_none() {
        *client = Some(connector.connect().await.map_err(unavailable)?.0);
    }
    let Some(client) = client else { return Ok(()) };
    let row = client.query_one(DURABILITY_SETTINGS, &[]).await.map_err(unavailable)?;
    let text = |column: usize| row.try_get::<_, &str>(column).map_err(unavailable);
    let found = not_durable(text(0)?, text(1)?, text(2)?, text(3)?, core.options.durability);
    core.database.suspend(found.map(|(reason, remedy)| format!("{reason}: {remedy}")));
    Ok(())
}

/// Removes the expired rows of all pages.
pub(crate) async fn expire_all(core: &Core) -> onlyonce_core::Result<()> {
    let (mut expiry, mut last_progress) = (Expiry::default(), Instant::now());
    loop {
        match expiry.remove(core, 8_192).await {
            Ok(Slice::Done(_)) => last_progress = Instant::now(),
            Ok(Slice::AtTheEnd) => return Ok(()),
            Err(error) if last_progress.elapsed() >= core.database.retry_for().max(LONGEST_SLICE) => return Err(error),
            Ok(Slice::Locked) | Err(_) => sleep(Duration::from_millis(20)).await,
        }
    }
}

/// Removes the expired rows of the next pages, if no other process does.
///
/// A pass over the table takes an eighth of a window. Answers do not depend on it: a row that has expired does not count.
async fn expire_slice(core: &Core, expiry: &mut Expiry) -> onlyonce_core::Result<()> {
    let ticks_of_a_pass = (signed(core.options.window_ms()) / 8_000).max(1);
    let rows = core.database.rows_read(&core.sql.pages, &[]).await?;
    let pages: i64 = rows.first().map_or(Ok(0), |row| row.try_get(0)).map_err(unavailable)?;
    expiry.remove(core, (pages / ticks_of_a_pass).max(LEAST_PAGES)).await.map(drop)
}

/// How far the removal of expired rows has come.
struct Expiry {
    next_page: i64,
    /// How many pages the next slice may have. Fewer after a failure, which may be that of the time limit.
    most_pages: i64,
}

impl Default for Expiry {
    fn default() -> Self {
        Self { next_page: 0, most_pages: i64::MAX }
    }
}

impl Expiry {
    async fn remove(&mut self, core: &Core, pages: i64) -> onlyonce_core::Result<Slice> {
        let count = pages.min(self.most_pages);
        let slice = expire_pages(core, self.next_page, count).await;
        self.note(count, slice.as_ref().ok());
        slice
    }

    fn note(&mut self, count: i64, slice: Option<&Slice>) {
        match slice {
            Some(Slice::Done(page)) => self.next_page = *page,
            Some(Slice::AtTheEnd) => self.next_page = 0,
            Some(Slice::Locked) => return,
            None => {
                self.most_pages = (count / 2).max(1);
                return;
            }
        }
        self.most_pages = count.saturating_mul(2);
    }
}

enum Slice {
    /// The page after the slice.
    Done(i64),
    AtTheEnd,
    /// Another process removes expired rows.
    Locked,
}

async fn expire_pages(core: &Core, first: i64, count: i64) -> onlyonce_core::Result<Slice> {
    let (class, window_ms) = (core.names.lock_class(), signed(core.options.window_ms()));
    let (last, holds) = (first.saturating_add(count), core.options.holds());
    // A repetition would take as long: the next slice has fewer pages.
    core.database
        .run_once(move |connection, _| {
            Box::pin(async move {
                let pages = connection.prepare_cached(&core.sql.pages).await?;
                let expire = connection.prepare_cached(&core.sql.expire).await?;
                let transaction = connection.transaction().await?;
                let lock = transaction.query_one("SELECT pg_try_advisory_xact_lock($1, 0)", &[&class]).await?;
                if !lock.try_get::<_, bool>(0)? {
                    return Ok(Slice::Locked);
                }
                let pages: i64 = transaction.query_one(&pages, &[]).await?.try_get(0)?;
                transaction.execute(&expire, &[&first, &last, &window_ms, &holds]).await?;
                if last >= pages {
                    // A session is seen far more often than once a day.
                    transaction.batch_execute(&core.sql.remove_workers).await?;
                }
                transaction.commit().await?;
                Ok(if last < pages { Slice::Done(last) } else { Slice::AtTheEnd })
            })
        })
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_that_fails_is_halved_and_grows_again() {
        let mut expiry = Expiry { next_page: 1_000, ..Expiry::default() };
        for (count, slice, expected) in [
            (128, None, (1_000, 64)),
            (64, None, (1_000, 32)),
            (32, Some(Slice::Locked), (1_000, 32)),
            (32, Some(Slice::Done(1_032)), (1_032, 64)),
            (1, None, (1_032, 1)),
            (1, Some(Slice::AtTheEnd), (0, 2)),
        ] {
            expiry.note(count, slice.as_ref());
            assert_eq!((expiry.next_page, expiry.most_pages), expected);
        }
    }
}
