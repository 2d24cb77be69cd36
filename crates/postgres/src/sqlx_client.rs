//! Transactions of `sqlx`. The statements are the same; their parameters and columns keep the encoding of `tokio-postgres`.

use onlyonce_core::{BoxFuture, Cause};
use sqlx::encode::{Encode, IsNull};
use sqlx::error::BoxDynError;
use sqlx::postgres::{PgArgumentBuffer, PgArguments, PgConnection, PgRow, PgTypeInfo, Postgres};
use sqlx::{Arguments, AssertSqlSafe, Either, Executor, Row, SqlSafeStr, Statement, TypeInfo, ValueRef};
use tokio::sync::Mutex;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::private::BytesMut;
use tokio_postgres::types::{FromSql, IsNull as IsNullParam, ToSql, Type};

use crate::caller::{AnyRow, CallerTransaction, Columns, InTransaction, Params, sealed};
use crate::error::{Failure, kind_of};

#[cfg_attr(docsrs, doc(cfg(feature = "sqlx")))]
impl<'t> CallerTransaction<'t> for &'t mut sqlx::Transaction<'_, Postgres> {}

impl<'t> sealed::IntoExecutor<'t> for &'t mut sqlx::Transaction<'_, Postgres> {
    fn into_executor(self) -> sealed::Executor<'t> {
        sealed::Executor(Box::new(Connection(Mutex::new(&mut **self))))
    }
}

/// The connection of a transaction.
struct Connection<'t>(Mutex<&'t mut PgConnection>);

impl InTransaction for Connection<'_> {
    fn query<'a>(&'a self, sql: &'a str, params: Params<'a>) -> BoxFuture<'a, Result<Vec<AnyRow>, Failure>> {
        Box::pin(async move {
            let mut connection = self.0.lock().await;
            // The connection caches it.
            let statement = (&mut **connection).prepare(AssertSqlSafe(sql).into_sql_str()).await.map_err(failure)?;
            let mut arguments = PgArguments::default();
            if let Some(Either::Left(infos)) = statement.parameters() {
                for (param, info) in params.iter().zip(infos) {
                    arguments.add(encode(*param, info).map_err(rejected)?).map_err(rejected)?;
                }
            }
            let rows = statement.query_with(arguments).fetch_all(&mut **connection).await.map_err(failure)?;
            Ok(rows.into_iter().map(AnyRow::Sqlx).collect())
        })
    }

    fn batch_execute<'a>(&'a self, sql: &'a str) -> BoxFuture<'a, Result<(), Failure>> {
        Box::pin(async move {
            let mut connection = self.0.lock().await;
            sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut **connection).await.map_err(failure)?;
            Ok(())
        })
    }
}

/// An encoded parameter. `None` is NULL.
struct Param {
    bytes: Option<BytesMut>,
    info: PgTypeInfo,
}

fn encode(param: &(dyn ToSql + Sync), info: &PgTypeInfo) -> Result<Param, BoxDynError> {
    let mut bytes = BytesMut::new();
    let is_null = param.to_sql_checked(&type_of(info)?, &mut bytes)?;
    let bytes = if matches!(is_null, IsNullParam::Yes) { None } else { Some(bytes) };
    Ok(Param { bytes, info: info.clone() })
}

impl sqlx::Type<Postgres> for Param {
    fn type_info() -> PgTypeInfo {
        <[u8] as sqlx::Type<Postgres>>::type_info()
    }
}

impl Encode<'_, Postgres> for Param {
    fn encode_by_ref(&self, buffer: &mut PgArgumentBuffer) -> Result<IsNull, BoxDynError> {
        let Some(bytes) = &self.bytes else { return Ok(IsNull::Yes) };
        buffer.extend_from_slice(bytes);
        Ok(IsNull::No)
    }

    fn produces(&self) -> Option<PgTypeInfo> {
        Some(self.info.clone())
    }
}

impl Columns for PgRow {
    fn column<'a, T: FromSql<'a>>(&'a self, index: usize) -> Result<T, Failure> {
        let value = self.try_get_raw(index).map_err(failure)?;
        let of = type_of(&value.type_info()).map_err(rejected)?;
        if !T::accepts(&of) {
            return Err(rejected(format!("column {index} has the type {of}").into()));
        }
        match value.is_null() {
            true => T::from_sql_null(&of).map_err(rejected),
            false => T::from_sql(&of, value.as_bytes().map_err(rejected)?).map_err(rejected),
        }
    }
}

/// The statements have types that are built in.
fn type_of(info: &PgTypeInfo) -> Result<Type, BoxDynError> {
    let of = info.oid().and_then(|oid| Type::from_oid(oid.0));
    of.ok_or_else(|| format!("the type {} is not known", info.name()).into())
}

fn rejected(error: BoxDynError) -> Failure {
    Failure::Rejected(Cause::new(std::io::ErrorKind::Other, error))
}

/// In a transaction of the caller nothing is repeated.
fn failure(error: sqlx::Error) -> Failure {
    let code = error.as_database_error().and_then(|error| error.code()).map(|code| SqlState::from_code(&code));
    Failure::Rejected(Cause::new(kind_of(code.as_ref()), error))
}
