//! Where statements of a call run: on a connection of the store, or in a transaction of the caller, which has the client library of its
//! choice.

use onlyonce_core::BoxFuture;
use tokio_postgres::types::{FromSql, ToSql};
use tokio_postgres::{GenericClient, Row, Statement, Transaction};

use crate::error::Failure;

/// A transaction of the caller, which [`PgLease::complete_in`](crate::PgLease::complete_in) and
/// [`PgStore::claim_in`](crate::PgStore::claim_in) write in: `&tokio_postgres::Transaction`, or with the feature `sqlx`
/// `&mut sqlx::Transaction<'_, Postgres>`.
pub trait CallerTransaction<'t>: sealed::IntoExecutor<'t> {}

pub(crate) mod sealed {
    /// Only the types of this crate implement it.
    pub trait IntoExecutor<'t>: Send {
        #[doc(hidden)]
        fn into_executor(self) -> Executor<'t>;
    }

    /// Runs statements in the transaction.
    #[doc(hidden)]
    pub struct Executor<'t>(pub(crate) Box<dyn super::InTransaction + 't>);
}

impl<'t> CallerTransaction<'t> for &'t Transaction<'_> {}

impl<'t> sealed::IntoExecutor<'t> for &'t Transaction<'_> {
    fn into_executor(self) -> sealed::Executor<'t> {
        sealed::Executor(Box::new(self))
    }
}

pub(crate) type Params<'a> = &'a [&'a (dyn ToSql + Sync)];

/// Statements by their text, in a transaction of the caller.
pub(crate) trait InTransaction: Send + Sync {
    fn query<'a>(&'a self, sql: &'a str, params: Params<'a>) -> BoxFuture<'a, Result<Vec<AnyRow>, Failure>>;
    fn batch_execute<'a>(&'a self, sql: &'a str) -> BoxFuture<'a, Result<(), Failure>>;
}

impl InTransaction for &Transaction<'_> {
    fn query<'a>(&'a self, sql: &'a str, params: Params<'a>) -> BoxFuture<'a, Result<Vec<AnyRow>, Failure>> {
        Box::pin(async move {
            let rows = Transaction::query(self, sql, params).await?;
            Ok(rows.into_iter().map(AnyRow::Native).collect())
        })
    }

    fn batch_execute<'a>(&'a self, sql: &'a str) -> BoxFuture<'a, Result<(), Failure>> {
        Box::pin(async move { Ok(Transaction::batch_execute(self, sql).await?) })
    }
}

/// Runs statements of this form: prepared ones, or their text.
pub(crate) trait Execute<S: ?Sized>: Sync {
    fn rows(&self, statement: &S, params: Params<'_>) -> impl Future<Output = Result<Vec<AnyRow>, Failure>> + Send;
}

/// A connection of the store.
pub(crate) struct Pooled<'a, C>(pub(crate) &'a C);

impl<C: GenericClient + Sync> Execute<Statement> for Pooled<'_, C> {
    async fn rows(&self, statement: &Statement, params: Params<'_>) -> Result<Vec<AnyRow>, Failure> {
        let rows = self.0.query(statement, params).await?;
        Ok(rows.into_iter().map(AnyRow::Native).collect())
    }
}

impl Execute<str> for dyn InTransaction + '_ {
    async fn rows(&self, statement: &str, params: Params<'_>) -> Result<Vec<AnyRow>, Failure> {
        self.query(statement, params).await
    }
}

/// The columns of a row, in the binary format of the server.
pub(crate) trait Columns {
    fn column<'a, T: FromSql<'a>>(&'a self, index: usize) -> Result<T, Failure>;
}

impl Columns for Row {
    fn column<'a, T: FromSql<'a>>(&'a self, index: usize) -> Result<T, Failure> {
        Ok(self.try_get(index)?)
    }
}

/// A row of either client.
pub(crate) enum AnyRow {
    Native(Row),
    #[cfg(feature = "sqlx")]
    Sqlx(sqlx::postgres::PgRow),
}

impl Columns for AnyRow {
    fn column<'a, T: FromSql<'a>>(&'a self, index: usize) -> Result<T, Failure> {
        match self {
            Self::Native(row) => row.column(index),
            #[cfg(feature = "sqlx")]
            Self::Sqlx(row) => row.column(index),
        }
    }
}
