//! New connections of the pool. Each is checked, and what is visible on it is confirmed, before a call uses it: its server may have
//! started again, or be another one.
//!
//! A confirmation waits for the standby, and the server does not notice that a connection is closed meanwhile. So a confirmation is
//! never ended early, and few run at a time: while there is no standby, repeated calls would use up the connections of the server.

use std::collections::HashMap;
use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use deadpool::managed::{Manager, Metrics, RecycleError, RecycleResult};
use deadpool_postgres::ClientWrapper;
use onlyonce_core::Cause;
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};

use crate::connector::Connector;
use crate::error::{Failure, cause};
use crate::options::{Durability, Options};
use crate::schema::{DURABILITY_SETTINGS, POOLED, not_durable};

/// A write that changes no row. When it returns, everything that is visible on its connection is on the standby, too: a commit whose
/// wait for the standby was interrupted is visible without being there.
pub(crate) const CONFIRM: &str = "SELECT pg_logical_emit_message(true, 'onlyonce', '')";

/// How many confirmations of this process a server has at a time.
const CONFIRMATIONS: usize = 4;

/// A connection of the pool.
pub(crate) type Object = deadpool::managed::Object<Opener>;

/// Why calls are rejected at the moment.
#[derive(Debug, Default)]
pub(crate) struct Suspended(Mutex<Option<String>>);

impl Suspended {
    pub(crate) fn set(&self, reason: Option<String>) {
        let mut current = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match (&*current, &reason) {
            (None, Some(reason)) => tracing::error!(reason, "the server is not durable: calls are rejected"),
            (Some(_), None) => tracing::info!("the server is durable again: calls are accepted"),
            _ => {}
        }
        *current = reason;
    }

    pub(crate) fn reason(&self) -> Option<Cause> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).as_deref().map(Cause::from)
    }
}

/// Opens the connections of the pool.
#[derive(Clone)]
pub(crate) struct Opener {
    connector: Connector,
    durability: Durability,
    suspended: Arc<Suspended>,
    confirmations: Arc<Confirmations>,
}

impl Opener {
    pub(crate) fn new(connector: &Connector, options: &Options, suspended: &Arc<Suspended>) -> Self {
        Self {
            connector: connector.clone(),
            durability: options.durability,
            suspended: Arc::clone(suspended),
            confirmations: Arc::new(Confirmations::new(options.statement_limit)),
        }
    }

    /// Closes the connections that were confirmed and are not used yet: they may not be confirmed any more.
    pub(crate) fn close_confirmed(&self) {
        self.confirmations.closings.fetch_add(1, Ordering::SeqCst);
        self.confirmations.lock().confirmed.clear();
    }
}

impl Manager for Opener {
    type Type = ClientWrapper;
    type Error = Failure;

    async fn create(&self) -> Result<ClientWrapper, Failure> {
        if let Some(client) = self.confirmations.take_confirmed() {
            return Ok(client);
        }
        let client = self.connector.connect_cached().await.map_err(not_done)?;
        let server = check(&client, self.durability, &self.suspended).await?;
        self.confirmations.confirm(client, server).await
    }

    async fn recycle(&self, client: &mut ClientWrapper, _: &Metrics) -> RecycleResult<Failure> {
        match client.is_closed() {
            true => Err(RecycleError::message("the connection is closed")),
            false => Ok(()),
        }
    }
}

/// A connection that is not opened did nothing.
fn not_done(error: tokio_postgres::Error) -> Failure {
    Failure::NotDone(cause(error))
}

/// Checks the server of a new connection. Returns when it started, which tells it from every other one.
async fn check(client: &ClientWrapper, durability: Durability, suspended: &Suspended) -> Result<String, Failure> {
    let settings = format!(
        "{DURABILITY_SETTINGS}, pg_is_in_recovery(), pg_postmaster_start_time()::text,
         coalesce(current_setting('onlyonce.session', true), '') = 'direct'"
    );
    let row = client.query_one(&settings, &[]).await.map_err(not_done)?;
    let text = |column: usize| row.try_get::<_, &str>(column).map_err(not_done);
    if row.try_get::<_, bool>(4).map_err(not_done)? {
        return Err(Failure::NotDone("the server is a standby: it accepts no writes".into()));
    }
    if !row.try_get::<_, bool>(6).map_err(not_done)? {
        return Err(Failure::NotDone(POOLED.into()));
    }
    if let Some((reason, remedy)) = not_durable(text(0)?, text(1)?, text(2)?, text(3)?, durability) {
        let reason = format!("{reason}: {remedy}");
        suspended.set(Some(reason.clone()));
        return Err(Failure::NotDone(reason.into()));
    }
    Ok(text(5)?.to_owned())
}

fn waits_for_standby() -> Failure {
    let reason = "the server waits for its standby: check that a synchronous standby is connected to it";
    Failure::NotDone(Cause::new(io::ErrorKind::TimedOut, reason))
}

/// The confirmations of new connections.
struct Confirmations {
    /// How long a call waits. When a confirmation has run as long, new ones fail at once if there are as many as there may be.
    limit: Duration,
    state: Mutex<State>,
    /// How often the connections that were confirmed were closed.
    closings: Arc<AtomicU64>,
    /// Notified when a confirmation ends.
    ended: Notify,
}

#[derive(Default)]
struct State {
    /// The server of each confirmation without an answer, and when it began.
    running: HashMap<u64, (String, Instant)>,
    next_number: u64,
    /// Connections whose confirmation ended after the call had failed.
    confirmed: Vec<ClientWrapper>,
    /// They end with the store.
    tasks: JoinSet<()>,
}

impl Confirmations {
    fn new(limit: Duration) -> Self {
        Self { limit, state: Mutex::default(), closings: Arc::default(), ended: Notify::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_confirmed(&self) -> Option<ClientWrapper> {
        let mut state = self.lock();
        while let Some(client) = state.confirmed.pop() {
            if !client.is_closed() {
                return Some(client);
            }
        }
        None
    }

    /// Waits until everything that is visible on the connection is on the standby. After the time limit the wait goes on, and another
    /// call gets the connection. So it does if this future is dropped.
    async fn confirm(self: &Arc<Self>, client: ClientWrapper, server: String) -> Result<ClientWrapper, Failure> {
        let running = loop {
            let mut ended = pin!(self.ended.notified());
            // Before the check, so that it misses no end.
            ended.as_mut().enable();
            let oldest = match self.begin(&server) {
                Ok(running) => break running,
                Err(oldest) => oldest,
            };
            if timeout_at(oldest + self.limit, ended).await.is_err() {
                return Err(waits_for_standby());
            }
        };
        let (sender, answer) = oneshot::channel();
        let (this, closings) = (Arc::downgrade(self), Arc::clone(&self.closings));
        let task = async move {
            let before = closings.load(Ordering::SeqCst);
            let answer = client.batch_execute(CONFIRM).await.map(|()| client).map_err(not_done);
            drop(running);
            if let (Err(Ok(client)), Some(this)) = (sender.send(answer), this.upgrade()) {
                let mut state = this.lock();
                if closings.load(Ordering::SeqCst) == before {
                    state.confirmed.push(client);
                }
            }
        };
        {
            let mut state = self.lock();
            // Removes those that have ended.
            while state.tasks.try_join_next().is_some() {}
            state.tasks.spawn(task);
        }
        match timeout(self.limit, answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(Failure::NotDone("the store is closed".into())),
            Err(_) => Err(waits_for_standby()),
        }
    }

    /// Counts a confirmation. If the server has as many as it may have: when the oldest one began.
    fn begin(self: &Arc<Self>, server: &str) -> Result<Running, Instant> {
        let mut state = self.lock();
        let begun: Vec<Instant> =
            state.running.values().filter(|(of, _)| of == server).map(|(_, begun)| *begun).collect();
        if let Some(oldest) = begun.iter().min().filter(|_| begun.len() >= CONFIRMATIONS) {
            return Err(*oldest);
        }
        let number = state.next_number;
        state.next_number += 1;
        state.running.insert(number, (server.to_owned(), Instant::now()));
        Ok(Running { of: Arc::downgrade(self), number })
    }
}

/// A confirmation without an answer.
struct Running {
    of: Weak<Confirmations>,
    number: u64,
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(of) = self.of.upgrade() {
            of.lock().running.remove(&self.number);
            of.ended.notify_waiters();
        }
    }
}
