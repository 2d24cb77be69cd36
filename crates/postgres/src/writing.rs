//! The statements of claims and records.

use std::collections::HashMap;

use onlyonce_core::machine::KeyRequest;
use onlyonce_core::{Error, Fingerprint, Key, PriorAttempt, Result};
use tokio_postgres::types::ToSql;

use crate::caller::{AnyRow, Columns, InTransaction};
use crate::connection::LostAnswers;
use crate::core::Core;
use crate::error::{Failure, unavailable};
use crate::reading::{CHANGED, Found, decode, key_request};
use crate::row::{Read, encode_prior, signed, unsigned};
use crate::sql::state;

/// What a call does with a key that it acquires.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    Claim,
    Record,
}

/// One key of a call.
#[derive(Debug)]
pub(crate) struct Item {
    pub(crate) key: Key<'static>,
    pub(crate) encoded: Vec<u8>,
    /// The number by which a repetition recognizes the row that an earlier try has written.
    pub(crate) call: i64,
}

impl Item {
    pub(crate) fn request(&self) -> KeyRequest<'_> {
        key_request(&self.key)
    }

    pub(crate) fn own_window_ms(&self) -> Option<i64> {
        self.request().own_window.ms().map(signed)
    }
}

/// Where statements run.
#[derive(Clone, Copy)]
pub(crate) enum Via<'a> {
    /// On a connection of the store, with repetitions.
    Pool(&'a LostAnswers),
    /// In a transaction of the caller.
    Transaction(&'a dyn InTransaction),
}

impl Via<'_> {
    pub(crate) async fn rows(self, core: &Core, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Result<Vec<AnyRow>> {
        match self {
            Self::Pool(lost) => {
                let rows = core.database.rows_of_call(lost, sql, params).await?;
                Ok(rows.into_iter().map(AnyRow::Native).collect())
            }
            Self::Transaction(transaction) => transaction.query(sql, params).await.map_err(unavailable),
        }
    }

    /// As [`Via::rows`]. `None` if another transaction has locked a row. A transaction of the caller fails then.
    async fn rows_unless_locked(
        self,
        core: &Core,
        sql: &str,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Option<Vec<AnyRow>>> {
        match self {
            Self::Pool(lost) => {
                let rows = core.database.rows_unless_locked(lost, sql, params).await?;
                Ok(rows.map(|rows| rows.into_iter().map(AnyRow::Native).collect()))
            }
            Self::Transaction(_) => self.rows(core, sql, params).await.map(Some),
        }
    }

    /// Whether a call may try to insert a key that another transaction has claimed.
    pub(crate) fn admits(self, core: &Core, item: &Item) -> bool {
        matches!(self, Self::Transaction(_)) || core.contended.admits(&item.encoded)
    }

    /// Whether the call may have written although an answer was lost.
    pub(crate) fn may_have_written(self) -> bool {
        matches!(self, Self::Pool(lost) if lost.any())
    }

    /// The error of the call if a part of it failed like this.
    pub(crate) fn failed(self, error: Error) -> Error {
        match (self, error) {
            (Self::Pool(lost), Error::Unavailable { source }) => lost.failed(source),
            (_, error) => error,
        }
    }

    /// The error of a key that changed during every try.
    pub(crate) fn busy(self) -> Error {
        let source = CHANGED.into();
        match self {
            Self::Pool(lost) => lost.failed(source),
            Self::Transaction(_) => Error::Unavailable { source },
        }
    }
}

/// A key whose row is replaced.
pub(crate) struct Replacement<'a> {
    pub(crate) index: usize,
    pub(crate) item: &'a Item,
    pub(crate) version: i64,
    /// The token of the holder before.
    pub(crate) token: u64,
    pub(crate) attempt: u32,
    pub(crate) prior: Option<PriorAttempt>,
    pub(crate) fingerprint: Option<Fingerprint>,
    pub(crate) time_ms: u64,
}

pub(crate) fn encoded<'a>(items: &[&'a Item]) -> Vec<&'a [u8]> {
    items.iter().map(|item| item.encoded.as_slice()).collect()
}

pub(crate) async fn read(core: &Core, via: Via<'_>, items: &[&Item]) -> Result<Found> {
    let rows = via.rows(core, &core.sql.read, &[&encoded(items), &core.worker()]).await?;
    decode(core, &rows).map_err(unavailable)
}

/// Inserts the keys that are absent. If one waits for a transaction of a caller, each is inserted alone, so that the others do not wait.
pub(crate) async fn insert(core: &Core, via: Via<'_>, verb: Verb, items: &[&Item]) -> Result<Found> {
    let mut found = Found::new();
    if items.is_empty() {
        return Ok(found);
    }
    if items.len() > 1
        && let Some(found) = insert_all(core, via, verb, items).await?
    {
        core.contended.remove(found.keys());
        return Ok(found);
    }
    let mut failure = None;
    for item in items {
        let inserted = match &failure {
            // The server will not answer the others either.
            Some(error) => Err(Error::clone(error)),
            None => insert_one(core, via, verb, item).await,
        };
        match inserted {
            Ok(Some(inserted)) => {
                core.contended.remove(inserted.keys());
                found.extend(inserted);
            }
            Ok(None) => {
                core.contended.add(&item.encoded);
                found.insert(item.encoded.clone(), Read::Locked);
            }
            Err(error) => {
                found.insert(item.encoded.clone(), Read::Failed(error.clone()));
                failure = Some(error);
            }
        }
    }
    Ok(found)
}

/// `None` if another transaction has claimed one of the keys, and has not ended.
async fn insert_all(core: &Core, via: Via<'_>, verb: Verb, items: &[&Item]) -> Result<Option<Found>> {
    let fingerprints: Vec<Option<&[u8]>> =
        items.iter().map(|item| item.key.payload_fingerprint().map(|fingerprint| &fingerprint[..])).collect();
    let windows: Vec<Option<i64>> = items.iter().map(|item| item.own_window_ms()).collect();
    let calls: Vec<i64> = items.iter().map(|item| item.call).collect();
    let (state, lease_ms, worker) = written_as(core, verb);
    let params: [&(dyn ToSql + Sync); 7] =
        [&encoded(items), &fingerprints, &windows, &calls, &state, &lease_ms, &worker];
    let rows = via.rows_unless_locked(core, &core.sql.insert, &params).await?;
    rows.map(|rows| decode(core, &rows).map_err(unavailable)).transpose()
}

async fn insert_one(core: &Core, via: Via<'_>, verb: Verb, item: &Item) -> Result<Option<Found>> {
    let (key, own_window_ms) = (item.encoded.as_slice(), item.own_window_ms());
    let fingerprint = item.key.payload_fingerprint().map(|fingerprint| &fingerprint[..]);
    let (state, lease_ms, worker) = written_as(core, verb);
    let params: [&(dyn ToSql + Sync); 7] = [&key, &fingerprint, &own_window_ms, &item.call, &state, &lease_ms, &worker];
    let Some(rows) = via.rows_unless_locked(core, &core.sql.insert_one, &params).await? else { return Ok(None) };
    let Some(row) = rows.first() else { return read(core, via, &[item]).await.map(Some) };
    let inserted = |row: &AnyRow| {
        let (now, token) = (unsigned(row.column(0)?), unsigned(row.column(1)?));
        Ok::<_, Failure>(Read::Inserted { key: item.encoded.clone(), now, token })
    };
    Ok(Some(Found::from([(item.encoded.clone(), inserted(row).map_err(unavailable)?)])))
}

/// Replaces rows that have not changed. Returns the tokens of those that were replaced, and `None` for those that another transaction
/// has locked.
pub(crate) async fn replace(
    core: &Core,
    via: Via<'_>,
    verb: Verb,
    rows: &[Replacement<'_>],
) -> Result<HashMap<Vec<u8>, Option<u64>>> {
    let keys: Vec<&[u8]> = rows.iter().map(|row| row.item.encoded.as_slice()).collect();
    let versions: Vec<i64> = rows.iter().map(|row| row.version).collect();
    let fingerprints: Vec<Option<&[u8]>> =
        rows.iter().map(|row| row.fingerprint.as_ref().map(|fingerprint| &fingerprint[..])).collect();
    let windows: Vec<Option<i64>> = rows.iter().map(|row| row.item.own_window_ms()).collect();
    let attempts: Vec<i32> = rows.iter().map(|row| i32::try_from(row.attempt).unwrap_or(i32::MAX)).collect();
    let priors: Vec<i16> = rows.iter().map(|row| encode_prior(row.prior)).collect();
    let times: Vec<i64> = rows.iter().map(|row| signed(row.time_ms)).collect();
    let calls: Vec<i64> = rows.iter().map(|row| row.item.call).collect();
    let (state, lease_ms, worker) = written_as(core, verb);
    let params: [&(dyn ToSql + Sync); 11] =
        [&keys, &versions, &fingerprints, &windows, &attempts, &priors, &times, &calls, &state, &lease_ms, &worker];
    let rows = via.rows(core, &core.sql.replace, &params).await?;
    let tokens = rows.iter().map(|row| Ok((row.column(0)?, row.column::<Option<i64>>(1)?.map(unsigned))));
    tokens.collect::<Result<_, Failure>>().map_err(unavailable)
}

/// State, lease and worker of the rows that a verb writes.
pub(crate) fn written_as(core: &Core, verb: Verb) -> (i16, i64, i32) {
    match verb {
        Verb::Claim => (state::LEASED, signed(core.options.lease_ms()), core.worker()),
        Verb::Record => (state::COMPLETED_WITHOUT_RESULT, 0, 0),
    }
}
