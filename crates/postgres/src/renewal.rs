//! Renewals.

use std::collections::HashSet;
use std::sync::Arc;

use onlyonce_core::{Answers, Grant, Result};

use crate::caller::Columns;
use crate::connection::Source;
use crate::core::{Core, encode_granted};
use crate::error::{Failure, unavailable};
use crate::row::{signed, unsigned};

/// Restarts the time of each lease.
pub(crate) async fn renew(core: &Core, source: Source, grants: &[Arc<Grant>]) -> Answers<()> {
    let keys = grants.iter().map(|grant| encode_granted(grant)).collect::<Result<Vec<_>>>()?;
    core.wait_for_abandoned(&keys).await;
    let tokens: Vec<i64> = grants.iter().map(|grant| signed(grant.token().get())).collect();
    let (lease_ms, worker) = (signed(core.options.lease_ms()), core.worker());
    let rows = core.database.rows_from(source, &core.sql.renew, &[&keys, &tokens, &lease_ms, &worker]).await?;
    let renewed = rows.iter().map(|row| Ok((row.column(0)?, row.column(1)?)));
    let renewed = renewed.collect::<Result<HashSet<(Vec<u8>, i64)>, Failure>>().map_err(unavailable)?;
    let answer = |((grant, key), token): ((&Arc<Grant>, &Vec<u8>), &i64)| {
        if !renewed.contains(&(key.clone(), *token)) {
            return Err(grant.superseded());
        }
        core.in_flight.renewed(unsigned(*token), core.options.lease);
        Ok(())
    };
    Ok(grants.iter().zip(&keys).zip(&tokens).map(answer).collect())
}
