//! The session of a process: the connection whose end frees the keys of its worker, and that listens for the ends of leases.
//!
//! A worker is a row of `workers` and an advisory lock. The row names the server's start and is lost in a crash of the server or a
//! failover, because the table is unlogged. So a lock that is free means that the session ended while the server was running.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{interval, sleep, timeout};
use tokio_postgres::Client;

use crate::connector::{Connector, Notifications};
use crate::core::Core;
use crate::error::SetupError;

/// How often a session is seen. An answer that takes as long means that its connection is lost.
const BEAT: Duration = Duration::from_secs(20);

/// Keeps a session until the task is aborted. After the loss of its connection it takes the same worker again, if it can.
pub(crate) async fn keep_session(core: Arc<Core>, connector: Connector, first: Session) {
    let mut session = first;
    loop {
        run_session(&core, session).await;
        tracing::warn!("the session of the store was lost: connecting again");
        // New leases end by their time alone until the worker is registered again.
        core.set_worker(0);
        core.set_listening(false);
        session = reopen(&core, &connector).await;
    }
}

async fn reopen(core: &Core, connector: &Connector) -> Session {
    let mut pause = Duration::from_millis(10);
    loop {
        let limit = connector.limit() + BEAT;
        let opened = timeout(limit, Session::open(core, connector, core.last_worker())).await;
        match opened.unwrap_or_else(|_| Err(SetupError::timed_out())) {
            Ok(session) => return session,
            Err(error) => tracing::debug!(error = %onlyonce_core::chain(&error), "no session: trying again"),
        }
        sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(1));
    }
}

/// A connection that has the lock of its worker.
pub(crate) struct Session {
    client: Client,
    notifications: Notifications,
    id: i32,
}

impl Session {
    /// Connects, and registers a worker: the last one of this process if its lock is free.
    pub(crate) async fn open(core: &Core, connector: &Connector, last: Option<i32>) -> Result<Self, SetupError> {
        let (client, notifications) = connector.connect().await?;
        // The ids of workers need not survive a failover, and must not wait for a standby.
        client.batch_execute("SET synchronous_commit = local").await?;
        client.batch_execute(&format!("LISTEN \"{}\"", core.names.channel())).await?;
        if !core.options.crash_detection {
            return Ok(Self { client, notifications, id: 0 });
        }
        let mut id = None;
        if let Some(last) = last.filter(|last| *last != 0) {
            // The server may need a moment to end the session before.
            for _ in 0..20 {
                if lock(core, &client, last).await? {
                    id = Some(last);
                    break;
                }
                sleep(Duration::from_millis(50)).await;
            }
        }
        let id = match id {
            Some(id) => id,
            None => {
                let next = format!("SELECT nextval('{}')::integer", core.names.of("worker_ids"));
                let id = client.query_one(&next, &[]).await?.try_get(0)?;
                if !lock(core, &client, id).await? {
                    let reason = format!("another session has the lock of worker {id}: connect again");
                    return Err(SetupError::Unsupported { reason });
                }
                id
            }
        };
        client.execute(&register(core), &[&id]).await?;
        core.set_worker(id);
        Ok(Self { client, notifications, id })
    }
}

/// Also registers a worker again whose row was removed: by a clock that was wrong for a moment.
fn register(core: &Core) -> String {
    format!(
        "INSERT INTO {} (id, server_started, seen) VALUES ($1, pg_postmaster_start_time(), now())
         ON CONFLICT (id) DO UPDATE SET server_started = EXCLUDED.server_started, seen = EXCLUDED.seen",
        core.names.of("workers")
    )
}

async fn lock(core: &Core, client: &Client, id: i32) -> Result<bool, tokio_postgres::Error> {
    client.query_one("SELECT pg_try_advisory_lock($1, $2)", &[&core.names.lock_class(), &id]).await?.try_get(0)
}

/// Forwards announcements until the connection ends.
async fn run_session(core: &Core, session: Session) {
    let Session { client, mut notifications, id } = session;
    core.set_listening(true);
    // Announcements of the time before are lost.
    core.waiters.wake_all();
    // A lease that was taken over meanwhile is noticed at once.
    core.kept.renew_all_now();
    let mut beat = interval(BEAT);
    let seen = register(core);
    loop {
        tokio::select! {
            notification = notifications.recv() => match notification {
                Some(token) => {
                    if let Ok(token) = token.parse() {
                        core.waiters.wake(token);
                    }
                }
                None => return,
            },
            _ = beat.tick() => {
                let alive = async {
                    match id {
                        0 => client.batch_execute("").await,
                        id => client.execute(&seen, &[&id]).await.map(drop),
                    }
                };
                if !matches!(timeout(BEAT, alive).await, Ok(Ok(()))) {
                    return;
                }
            }
        }
    }
}
