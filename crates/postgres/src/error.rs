//! Errors: those of the set-up, and what a failure of the server means for a call.

use std::io;

use deadpool::managed::{PoolError, TimeoutType};
use onlyonce_core::{Cause, Error};
use tokio_postgres::error::{Severity, SqlState};

/// Why a store was not set up or not connected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SetupError {
    /// An option is out of its bounds. Nothing was connected.
    #[error(transparent)]
    Option(#[from] Error),
    /// A name is not an identifier. Nothing was connected.
    #[error("{option} is {name:?}, but it must be 1 to 40 of a-z, 0-9 and _, and must not begin with a digit")]
    Name {
        /// The builder's method that set it.
        option: &'static str,
        /// The name that was given.
        name: String,
    },
    /// The schema has no tables of a store.
    #[error("{tables} has no tables of a store: call `migrate` first")]
    NotMigrated {
        /// The schema and the prefix.
        tables: String,
    },
    /// The schema has tables with the names of a store and no version. Nothing was changed.
    #[error("{tables} has the table {table}, which no store created: choose another schema or prefix")]
    NotAStore {
        /// The schema and the prefix.
        tables: String,
        /// The table.
        table: String,
    },
    /// Another version of this crate created the tables. Nothing was changed.
    #[error("{tables} has version {found}, and this crate knows versions up to {known}: use a newer version of it")]
    UnknownVersion {
        /// The schema and the prefix.
        tables: String,
        /// The version of the tables.
        found: i32,
        /// The latest version that this crate knows.
        known: i32,
    },
    /// An older version of this crate created the tables.
    #[error("{tables} has version {found}, and this crate needs {known}: call `migrate` first")]
    OldVersion {
        /// The schema and the prefix.
        tables: String,
        /// The version of the tables.
        found: i32,
        /// The version that this crate needs.
        known: i32,
    },
    /// The server would acknowledge completions that a failover or a power cut can lose.
    #[error("{reason}: {remedy}")]
    NotDurable {
        /// The setting that is not durable.
        reason: String,
        /// What to do about it.
        remedy: &'static str,
    },
    /// The connection is not a session of one server process, or the server is too old.
    #[error("{reason}")]
    Unsupported {
        /// What is not supported, and what to do.
        reason: String,
    },
    /// The server cannot be reached, or rejected a statement.
    #[error("the server cannot be reached, or rejected a statement of the set-up: see the source of this error")]
    Server(#[source] Cause),
}

impl SetupError {
    pub(crate) fn timed_out() -> Self {
        let reason = "no server of the configuration answered within the time limit: check its address, and that its standby is connected";
        Self::Server(Cause::new(io::ErrorKind::TimedOut, reason))
    }
}

impl From<tokio_postgres::Error> for SetupError {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Server(cause(error))
    }
}

/// What a failure of a statement means.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The statement did nothing. A repetition can succeed.
    NotDone(Cause),
    /// The statement did nothing, because another transaction has locked a row for longer than it waits. A repetition can succeed.
    Locked(Cause),
    /// The connection was lost at an unknown point. A repetition finds out.
    Unknown(Cause),
    /// The statement did nothing, and a repetition fails in the same way.
    Rejected(Cause),
    /// The call fails with this error.
    Call(Error),
}

impl Failure {
    /// No answer within the time limit of a statement.
    pub(crate) fn timed_out() -> Self {
        let reason = "the server did not answer within `statement_limit`: check its load and its standby";
        Self::Unknown(Cause::new(io::ErrorKind::TimedOut, reason))
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Call(error)
    }
}

impl From<tokio_postgres::Error> for Failure {
    fn from(error: tokio_postgres::Error) -> Self {
        // Without a code the error is not one of the server: the statement may have happened.
        let Some(code) = error.code().cloned() else { return Self::Unknown(cause(error)) };
        // The end of a session. A commit that waits for its standby may survive it.
        let ends_session = is_fatal(&error) || ["08", "57P"].iter().any(|class| code.code().starts_with(class));
        if code == SqlState::T_R_STATEMENT_COMPLETION_UNKNOWN || (ends_session && code != SqlState::CANNOT_CONNECT_NOW)
        {
            return Self::Unknown(cause(error));
        }
        if code == SqlState::LOCK_NOT_AVAILABLE {
            return Self::Locked(cause(error));
        }
        let retried = [
            SqlState::T_R_SERIALIZATION_FAILURE,
            SqlState::T_R_DEADLOCK_DETECTED,
            // It took longer than it may, or an operator cancelled it.
            SqlState::QUERY_CANCELED,
            SqlState::CANNOT_CONNECT_NOW,
            SqlState::TOO_MANY_CONNECTIONS,
            // The server is a standby now.
            SqlState::READ_ONLY_SQL_TRANSACTION,
            // The server's timeline is lower than the last one: the base of the tokens grows within a second.
            SqlState::NOT_NULL_VIOLATION,
            // A pooler between here and the server replaced the session.
            SqlState::INVALID_SQL_STATEMENT_NAME,
            // A migration changed a table.
            SqlState::FEATURE_NOT_SUPPORTED,
        ];
        if retried.contains(&code) { Self::NotDone(cause(error)) } else { Self::Rejected(cause(error)) }
    }
}

impl From<PoolError<Failure>> for Failure {
    fn from(error: PoolError<Failure>) -> Self {
        let reason = match error {
            PoolError::Backend(failure) => return failure,
            PoolError::Timeout(TimeoutType::Wait) => {
                "all connections of the store are in use: end long calls, or raise `connections`"
            }
            PoolError::Timeout(_) => "no server of the configuration accepted a connection within the time limit",
            _ => "the store is closed",
        };
        Self::NotDone(Cause::new(io::ErrorKind::NotConnected, reason))
    }
}

/// The error of a failure that is not repeated: the call did nothing.
pub(crate) fn unavailable(failure: impl Into<Failure>) -> Error {
    match failure.into() {
        Failure::Call(error) => error,
        Failure::NotDone(source) | Failure::Locked(source) | Failure::Unknown(source) | Failure::Rejected(source) => {
            Error::Unavailable { source }
        }
    }
}

/// True if the connection must not be used again.
pub(crate) fn is_connection_lost(failure: &Failure) -> bool {
    match failure {
        Failure::Unknown(_) => true,
        Failure::NotDone(cause) => {
            let code = cause.get_ref().downcast_ref::<tokio_postgres::Error>().and_then(tokio_postgres::Error::code);
            let stale = [
                SqlState::READ_ONLY_SQL_TRANSACTION,
                SqlState::INVALID_SQL_STATEMENT_NAME,
                SqlState::FEATURE_NOT_SUPPORTED,
            ];
            code.is_some_and(|code| stale.contains(code))
        }
        Failure::Locked(_) | Failure::Rejected(_) | Failure::Call(_) => false,
    }
}

/// True if the server ended the session.
fn is_fatal(error: &tokio_postgres::Error) -> bool {
    error.as_db_error().is_some_and(|error| match error.parsed_severity() {
        Some(severity) => matches!(severity, Severity::Fatal | Severity::Panic),
        None => ["FATAL", "PANIC"].contains(&error.severity()),
    })
}

/// The error of the server or the connection, with the kind of I/O error that it means.
pub(crate) fn cause(error: tokio_postgres::Error) -> Cause {
    Cause::new(kind_of(error.code()), error)
}

/// Without a code the error is one of the connection.
pub(crate) fn kind_of(code: Option<&SqlState>) -> io::ErrorKind {
    match code {
        Some(code) if [SqlState::DISK_FULL, SqlState::OUT_OF_MEMORY].contains(code) => io::ErrorKind::StorageFull,
        Some(_) => io::ErrorKind::Other,
        None => io::ErrorKind::NotConnected,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio_postgres::{Config, NoTls};

    /// The error of a statement that a server answers like this.
    async fn error_of(severity: &str, code: &str) -> tokio_postgres::Error {
        let (client, mut server) = tokio::io::duplex(1_024);
        let fields = format!("S{severity}\0V{severity}\0C{code}\0Mtext\0\0");
        let length = u32::try_from(fields.len() + 4).unwrap().to_be_bytes();
        tokio::spawn(async move {
            let mut buffer = [0; 1_024];
            assert!(server.read(&mut buffer).await.unwrap() > 0, "no startup message");
            server.write_all(b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05I").await.unwrap();
            assert!(server.read(&mut buffer).await.unwrap() > 0, "no statement");
            server.write_all(&[b"E", &length[..], fields.as_bytes()].concat()).await.unwrap();
        });
        let (client, connection) = Config::new().user("u").connect_raw(client, NoTls).await.unwrap();
        tokio::spawn(connection);
        client.batch_execute("SELECT").await.unwrap_err()
    }

    #[tokio::test]
    async fn a_statement_may_have_happened_if_the_server_ended_its_session() {
        for (severity, code) in [("FATAL", "25P03"), ("FATAL", "40001"), ("PANIC", "58030"), ("FATAL", "57P01")] {
            let failure = Failure::from(error_of(severity, code).await);
            assert!(matches!(failure, Failure::Unknown(_)), "{severity} {code}: {failure:?}");
        }
        assert!(matches!(Failure::from(error_of("ERROR", "40001").await), Failure::NotDone(_)));
        assert!(matches!(Failure::from(error_of("ERROR", "57014").await), Failure::NotDone(_)));
        assert!(matches!(Failure::from(error_of("ERROR", "55P03").await), Failure::Locked(_)));
        assert!(matches!(Failure::from(error_of("ERROR", "23514").await), Failure::Rejected(_)));
    }
}
