use std::fmt;
use std::time::Duration;

use onlyonce_core::{Error, OnInterrupt};
use tokio::time::timeout;
use tokio_postgres::tls::{MakeTlsConnect, TlsConnect};
use tokio_postgres::{Config, Socket};

use crate::connector::Connector;
use crate::error::SetupError;
use crate::names::Names;
use crate::options::{Durability, Options};
use crate::schema;
use crate::store::PgStore;

/// How long the checks of [`PgStoreBuilder::connect`] may take once there is a connection.
const SET_UP_LIMIT: Duration = Duration::from_secs(20);
/// The longest key that fits into an index entry, with its scope and two bytes of encoding.
const MAX_KEY: usize = 2_600;

/// Sets the options of a store on PostgreSQL. Every process that uses a store gives it the same options.
#[derive(Debug, Clone)]
#[must_use = "call `connect` to use the store"]
pub struct PgStoreBuilder {
    options: Options,
}

impl PgStoreBuilder {
    fn new() -> Self {
        Self {
            options: Options {
                schema: "onlyonce".to_owned(),
                prefix: String::new(),
                window: Duration::from_secs(24 * 60 * 60),
                lease: Duration::from_secs(30),
                on_interrupt: OnInterrupt::Rerun,
                result_limit: 1 << 20,
                key_limit: 1_024,
                in_flight_limit: 1_000_000,
                held_limit: 1_000_000,
                durability: Durability::Replicated,
                connections: 8,
                retry_for: Duration::from_secs(10),
                statement_limit: Duration::from_secs(4),
                crash_detection: true,
                max_ahead: None,
            },
        }
    }

    /// The schema of the tables. `onlyonce` by default.
    pub fn schema(mut self, schema: impl Into<String>) -> Self {
        self.options.schema = schema.into();
        self
    }

    /// A prefix of the tables' names, so that several stores share a schema. None by default.
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.options.prefix = prefix.into();
        self
    }

    /// How long a completed key is remembered. 24 hours by default. [`migrate`](Self::migrate) stores it, and
    /// [`connect`](Self::connect) rejects another one.
    pub fn window(mut self, window: Duration) -> Self {
        self.options.window = window;
        self
    }

    /// How long a lease lasts without renewal. 30 seconds by default.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.options.lease = lease;
        self
    }

    /// What happens to a key whose holder vanished. [`OnInterrupt::Rerun`] by default. [`migrate`](Self::migrate) stores it, and
    /// [`connect`](Self::connect) rejects another one.
    ///
    /// [`OnInterrupt::Hold`] needs an index of the open keys, which [`migrate`](Self::migrate) creates. With it, each completion
    /// writes index entries.
    pub fn on_interrupt(mut self, on_interrupt: OnInterrupt) -> Self {
        self.options.on_interrupt = on_interrupt;
        self
    }

    /// The longest result that is stored, in bytes. 1 MiB by default.
    pub fn result_limit(mut self, bytes: usize) -> Self {
        self.options.result_limit = bytes;
        self
    }

    /// The longest key with its scope, in bytes. 1,024 by default, 2,600 at most: an index entry holds the whole key.
    pub fn key_limit(mut self, bytes: usize) -> Self {
        self.options.key_limit = bytes;
        self
    }

    /// How many keys this process may have in progress. A million by default.
    pub fn in_flight_limit(mut self, keys: usize) -> Self {
        self.options.in_flight_limit = keys;
        self
    }

    /// How many keys may be held for resolution, in all processes together. A million by default. Processes may exceed it by the
    /// keys that are held within ten seconds, or within one second if there is room for less than 10,000.
    pub fn held_limit(mut self, keys: usize) -> Self {
        self.options.held_limit = keys;
        self
    }

    /// What must hold before a completion is acknowledged. [`Durability::Replicated`] by default.
    pub fn durability(mut self, durability: Durability) -> Self {
        self.options.durability = durability;
        self
    }

    /// The most connections of this process, besides the one of its session and the one that watches the server's durability. One of
    /// them is for the renewal of leases alone. 8 by default, and at least 4.
    pub fn connections(mut self, connections: usize) -> Self {
        self.options.connections = connections;
        self
    }

    /// How long a call repeats its statements after lost connections, deadlocks and failovers, before it fails, and how long it waits
    /// for the statements of other calls before. 10 seconds by default.
    pub fn retry_for(mut self, duration: Duration) -> Self {
        self.options.retry_for = duration;
        self
    }

    /// How long one try of a call may take at the server, before its connection counts as lost: one statement or one transaction,
    /// with the wait for the standby. 4 seconds by default: a try that gets no answer is repeated within `retry_for`.
    ///
    /// A new connection has this time in addition to the `connect_timeout` of each server in the configuration, which is 5 seconds by
    /// default, and 2 seconds if there are several servers.
    pub fn statement_limit(mut self, limit: Duration) -> Self {
        self.options.statement_limit = limit;
        self
    }

    /// Whether the leases of this process end at once when its session ends, and the next claim reports
    /// [`Crashed`](onlyonce_core::PriorAttempt::Crashed). True by default.
    ///
    /// A session also ends when its connection is reset. The process connects again within moments; a claim in between acquires
    /// a key that its holder is still working on. Turn this off if connections are reset often: then a key of a crashed process
    /// is free when its lease expires.
    pub fn crash_detection(mut self, crash_detection: bool) -> Self {
        self.options.crash_detection = crash_detection;
        self
    }

    /// Runs the store on the timestamps of its messages. One message advances stream time by at most `max_ahead`.
    ///
    /// It is a property of the tables, which [`migrate`](Self::migrate) sets when it creates them. Claims and records wait for each
    /// other on such a store, because each may advance the time of all.
    pub fn stream_time(mut self, max_ahead: Duration) -> Self {
        self.options.max_ahead = Some(max_ahead);
        self
    }

    /// Creates the schema and the tables, or brings them to the version of this crate. Stores the window and what happens to interrupted
    /// keys: to change them, end the processes with the old options first. Otherwise it does nothing if the tables have the version. The
    /// role needs the right to create tables in the schema, or the right to create the schema if it is missing.
    ///
    /// # Errors
    ///
    /// [`SetupError`]: the tables are not a store's, or a newer version of this crate created them.
    pub async fn migrate<T>(&self, config: &Config, tls: T) -> Result<(), SetupError>
    where
        T: MakeTlsConnect<Socket> + Clone + Sync + Send + 'static,
        T::Stream: Sync + Send,
        T::TlsConnect: Sync + Send,
        <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
    {
        let names = self.check()?;
        let connector = Connector::new(config, tls, &names, self.options.statement_limit);
        let connected = timeout(connector.limit(), connector.connect()).await;
        let (mut client, _) = connected.map_err(|_| SetupError::timed_out())??;
        schema::migrate(&mut client, &names, &self.options).await
    }

    /// Connects to the store, and checks the server: its version, that it is a primary, the tables' version, and that an
    /// acknowledged completion is as durable as [`Durability`] says. Calls run on tasks of the current Tokio runtime.
    ///
    /// # Errors
    ///
    /// [`SetupError`] if an option is out of its bounds, a check fails, or the server cannot be reached.
    pub async fn connect<T>(&self, config: &Config, tls: T) -> Result<PgStore, SetupError>
    where
        T: MakeTlsConnect<Socket> + Clone + Sync + Send + 'static,
        T::Stream: Sync + Send,
        T::TlsConnect: Sync + Send,
        <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
    {
        let names = self.check()?;
        let connector = Connector::new(config, tls, &names, self.options.statement_limit);
        let limit = connector.limit() + SET_UP_LIMIT;
        let set_up = async {
            let (mut client, _) = connector.connect().await?;
            schema::check(&mut client, &names, &self.options).await?;
            PgStore::start(self.options.clone(), names, connector).await
        };
        // A server may accept the connection and not answer, and a write of the set-up may wait for a standby that does not come.
        timeout(limit, set_up).await.unwrap_or_else(|_| Err(SetupError::timed_out()))
    }

    /// Checks the options.
    fn check(&self) -> Result<Names, SetupError> {
        const MILLISECOND: Duration = Duration::from_millis(1);
        const YEAR: Duration = Duration::from_secs(365 * 24 * 60 * 60);
        let options = &self.options;
        within("window", options.window, MILLISECOND, YEAR * 10)?;
        within("lease", options.lease, MILLISECOND, YEAR)?;
        within("result_limit", options.result_limit, 0, 64 << 20)?;
        within("key_limit", options.key_limit, 1, MAX_KEY)?;
        within("in_flight_limit", options.in_flight_limit, 1, usize::MAX)?;
        within("held_limit", options.held_limit, 1, usize::MAX)?;
        within("connections", options.connections, 4, 1_000)?;
        within("retry_for", options.retry_for, Duration::ZERO, YEAR)?;
        within("statement_limit", options.statement_limit, MILLISECOND * 100, YEAR)?;
        if let Some(max_ahead) = options.max_ahead {
            within("stream_time", max_ahead, MILLISECOND, options.window)?;
        }
        Names::new(&options.schema, &options.prefix)
    }
}

fn within<T: PartialOrd + fmt::Debug>(option: &'static str, value: T, least: T, most: T) -> Result<(), Error> {
    if (&least..=&most).contains(&&value) {
        return Ok(());
    }
    Err(Error::Config { option, value: format!("{value:?}"), bounds: format!("from {least:?} to {most:?}") })
}

impl PgStore {
    /// Sets the options of a store.
    pub fn builder() -> PgStoreBuilder {
        PgStoreBuilder::new()
    }
}
