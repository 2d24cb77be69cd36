//! The tables, their versions, and the checks of a server before it is used.

use tokio_postgres::{Client, Transaction};

use crate::error::SetupError;
use crate::names::Names;
use crate::options::{Durability, Options};

/// The version of the tables that this crate reads and writes.
pub(crate) const VERSION: i32 = 1;

/// The oldest server that is supported.
const OLDEST_SERVER: i32 = 150_000;

/// Each migration leads from the version before it to the next one, beginning at an empty schema.
const MIGRATIONS: &[fn(&Names) -> String] = &[version_1];

/// `keys` has no index besides its primary key, and its rows have room for a second version: then a completion, which changes no
/// indexed column, writes no index entry.
fn version_1(names: &Names) -> String {
    format!(
        r#"
        CREATE TABLE {keys} (
            token bigint NOT NULL,
            call bigint NOT NULL,
            time_ms bigint NOT NULL,
            until_ms bigint NOT NULL,
            worker integer NOT NULL,
            attempt integer NOT NULL,
            state smallint NOT NULL,
            prior smallint NOT NULL,
            waited boolean NOT NULL DEFAULT false,
            key bytea PRIMARY KEY,
            own_window_ms bigint,
            fingerprint bytea,
            result bytea
        ) WITH (fillfactor = 45, autovacuum_vacuum_scale_factor = 0.05);
        ALTER TABLE {keys} ALTER COLUMN result SET STORAGE EXTERNAL;
        CREATE SEQUENCE {tokens} AS bigint;
        CREATE SEQUENCE {worker_ids} AS integer MINVALUE 2 CYCLE;
        CREATE TABLE {offsets} (
            stream bytea NOT NULL,
            partition bigint NOT NULL,
            value bigint NOT NULL,
            PRIMARY KEY (stream, partition)
        ) WITH (fillfactor = 60);
        CREATE TABLE {outbox} (
            record bigint NOT NULL,
            index bigint NOT NULL,
            topic bytea NOT NULL,
            key bytea NOT NULL,
            payload bytea NOT NULL,
            PRIMARY KEY (record, index)
        );
        CREATE UNLOGGED TABLE {workers} (
            id integer PRIMARY KEY,
            server_started timestamptz NOT NULL,
            seen timestamptz NOT NULL
        );
        CREATE TABLE {meta} (
            singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
            version integer NOT NULL,
            floor_ms bigint NOT NULL,
            token_base bigint NOT NULL,
            timeline bigint NOT NULL,
            system_id bigint NOT NULL,
            is_stream boolean NOT NULL DEFAULT false,
            window_ms bigint NOT NULL DEFAULT 0,
            holds boolean NOT NULL DEFAULT false,
            stream_ms bigint NOT NULL DEFAULT 0,
            rejected_ms bigint
        ) WITH (fillfactor = 10);
        INSERT INTO {meta} (version, floor_ms, token_base, timeline, system_id) VALUES (0, 0, 0, {TIMELINE}, {SYSTEM});
        "#,
        keys = names.of("keys"),
        tokens = names.of("tokens"),
        worker_ids = names.of("worker_ids"),
        offsets = names.of("offsets"),
        outbox = names.of("outbox"),
        workers = names.of("workers"),
        meta = names.of("meta"),
    )
}

/// The server's timeline, which grows with each promotion.
pub(crate) const TIMELINE: &str = "('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::bigint";

/// The cluster, which its standbys share, and no other one has.
pub(crate) const SYSTEM: &str = "(SELECT system_identifier FROM pg_control_system())";

/// Creates the tables, or brings them to this version. Under `Hold` it also creates the index of open keys.
pub(crate) async fn migrate(client: &mut Client, names: &Names, options: &Options) -> Result<(), SetupError> {
    let transaction = client.transaction().await?;
    // A migration that another process runs may take longer than a statement.
    transaction.batch_execute("SET LOCAL lock_timeout = 0; SET LOCAL statement_timeout = 0").await?;
    transaction.execute("SELECT pg_advisory_xact_lock($1, 1)", &[&names.lock_class()]).await?;
    let found = match version(&transaction, names).await? {
        Some(found) => found,
        None => {
            if let Some(table) = foreign_table(&transaction, names).await? {
                return Err(SetupError::NotAStore { tables: names.display(), table });
            }
            create_schema(&transaction, names.schema()).await?;
            0
        }
    };
    let Some(missing) = usize::try_from(found).ok().and_then(|done| MIGRATIONS.get(done..)) else {
        return Err(SetupError::UnknownVersion { tables: names.display(), found, known: VERSION });
    };
    for migration in missing {
        transaction.batch_execute(&migration(names)).await?;
    }
    transaction
        .execute(&format!("UPDATE {} SET version = $1 WHERE version < $1", names.of("meta")), &[&VERSION])
        .await?;
    if found == 0 {
        let set = format!("UPDATE {} SET is_stream = $1", names.of("meta"));
        transaction.execute(&set, &[&options.max_ahead.is_some()]).await?;
    }
    // Every process must have these. Their change is a decision, which a call of this function is.
    let set = format!("UPDATE {} SET window_ms = $1, holds = $2", names.of("meta"));
    transaction.execute(&set, &[&window_ms(options), &options.holds()]).await?;
    if options.holds() {
        let (index, keys) = (names.plain("keys_open"), names.of("keys"));
        let create = format!("CREATE INDEX IF NOT EXISTS \"{index}\" ON {keys} (key) WHERE state < 4");
        transaction.batch_execute(&create).await?;
    }
    transaction.commit().await?;
    Ok(())
}

/// Creates the schema if it is missing. `IF NOT EXISTS` needs the right to create it even if it is there.
async fn create_schema(transaction: &Transaction<'_>, schema: &str) -> Result<(), SetupError> {
    let is_missing = "SELECT NOT EXISTS (SELECT FROM pg_namespace WHERE nspname = $1)";
    if transaction.query_one(is_missing, &[&schema]).await?.get(0) {
        // Stores with other prefixes may create it at the same time.
        transaction.batch_execute(&format!("CREATE SCHEMA IF NOT EXISTS \"{schema}\"")).await?;
    }
    Ok(())
}

/// The version of the tables. `None` if there are none.
async fn version(transaction: &Transaction<'_>, names: &Names) -> Result<Option<i32>, SetupError> {
    let meta = names.of("meta");
    let exists: bool = transaction.query_one("SELECT to_regclass($1) IS NOT NULL", &[&meta]).await?.get(0);
    if !exists {
        return Ok(None);
    }
    match transaction.query(&format!("SELECT version FROM {meta}"), &[]).await {
        Ok(rows) => match rows.first() {
            Some(row) => Ok(Some(row.get(0))),
            None => Err(SetupError::NotAStore { tables: names.display(), table: names.plain("meta") }),
        },
        Err(error) if error.code().is_some_and(|code| code.code() == "42703") => {
            Err(SetupError::NotAStore { tables: names.display(), table: names.plain("meta") })
        }
        Err(error) => Err(error.into()),
    }
}

/// A table or sequence that has one of the names, although no store is here.
async fn foreign_table(transaction: &Transaction<'_>, names: &Names) -> Result<Option<String>, SetupError> {
    for object in ["keys", "tokens", "worker_ids", "offsets", "outbox", "workers"] {
        let of = names.of(object);
        let exists: bool = transaction.query_one("SELECT to_regclass($1) IS NOT NULL", &[&of]).await?.get(0);
        if exists {
            return Ok(Some(names.plain(object)));
        }
    }
    Ok(None)
}

/// Checks a server and its tables before the first call.
pub(crate) async fn check(client: &mut Client, names: &Names, options: &Options) -> Result<(), SetupError> {
    let transaction = client.transaction().await?;
    check_server(&transaction).await?;
    check_durability(&transaction, options.durability).await?;
    match version(&transaction, names).await? {
        None | Some(0) => return Err(SetupError::NotMigrated { tables: names.display() }),
        Some(found) if found < VERSION => {
            return Err(SetupError::OldVersion { tables: names.display(), found, known: VERSION });
        }
        Some(found) if found > VERSION => {
            return Err(SetupError::UnknownVersion { tables: names.display(), found, known: VERSION });
        }
        Some(_) => {}
    }
    check_stream_time(&transaction, names, options).await?;
    check_options(&transaction, names, options).await?;
    if options.holds() {
        let index = names.of("keys_open");
        let exists: bool = transaction.query_one("SELECT to_regclass($1) IS NOT NULL", &[&index]).await?.get(0);
        if !exists {
            let tables = format!("{} and `OnInterrupt::Hold`", names.display());
            return Err(SetupError::NotMigrated { tables });
        }
    }
    raise_token_base(&transaction, names).await?;
    transaction.commit().await?;
    Ok(())
}

/// The reason if a connection does not have the settings that it was opened with.
pub(crate) const POOLED: &str = "the server does not have the settings of this connection: connect to it without a pooler that \
                                 shares connections between transactions";

async fn check_server(transaction: &Transaction<'_>) -> Result<(), SetupError> {
    let row = transaction
        .query_one(
            "SELECT current_setting('server_version_num')::int, pg_is_in_recovery(),
                    coalesce(current_setting('onlyonce.session', true), '')",
            &[],
        )
        .await?;
    let (server, is_standby, session): (i32, bool, String) = (row.get(0), row.get(1), row.get(2));
    let reason = if server < OLDEST_SERVER {
        format!("the server has version {server}, and the oldest that is supported is {OLDEST_SERVER}: upgrade it")
    } else if is_standby {
        "the server is a standby: connect to the primary, or set `target_session_attrs` to read-write".to_owned()
    } else if session != "direct" {
        POOLED.to_owned()
    } else {
        return Ok(());
    };
    Err(SetupError::Unsupported { reason })
}

/// The settings that decide whether an acknowledged write can be lost.
pub(crate) const DURABILITY_SETTINGS: &str = "SELECT current_setting('synchronous_commit'), \
     current_setting('synchronous_standby_names'), current_setting('fsync'), current_setting('full_page_writes')";

async fn check_durability(transaction: &Transaction<'_>, durability: Durability) -> Result<(), SetupError> {
    let row = transaction.query_one(DURABILITY_SETTINGS, &[]).await?;
    match not_durable(row.get(0), row.get(1), row.get(2), row.get(3), durability) {
        Some((reason, remedy)) => Err(SetupError::NotDurable { reason, remedy }),
        None => Ok(()),
    }
}

/// The setting under which an acknowledged write can be lost, and what to do about it.
pub(crate) fn not_durable(
    synchronous_commit: &str,
    standbys: &str,
    fsync: &str,
    full_page_writes: &str,
    durability: Durability,
) -> Option<(String, &'static str)> {
    for (setting, value) in [("fsync", fsync), ("full_page_writes", full_page_writes)] {
        if value != "on" {
            return Some((format!("the server has {setting} = {value}"), "set it to on"));
        }
    }
    if !["on", "remote_apply"].contains(&synchronous_commit) {
        return Some((format!("the session has synchronous_commit = {synchronous_commit}"), "set it to on"));
    }
    if standbys.trim().is_empty() && durability == Durability::Replicated {
        return Some((
            "the server has no synchronous standby (synchronous_standby_names is empty)".to_owned(),
            "name one, or accept with `Durability::SingleServer` that a failover loses acknowledged completions",
        ));
    }
    None
}

async fn check_stream_time(transaction: &Transaction<'_>, names: &Names, options: &Options) -> Result<(), SetupError> {
    let is_stream: bool =
        transaction.query_one(&format!("SELECT is_stream FROM {}", names.of("meta")), &[]).await?.get(0);
    if is_stream == options.max_ahead.is_some() {
        return Ok(());
    }
    let (its, option) = if is_stream { ("stream time", "set") } else { ("its clock", "leave out") };
    Err(SetupError::Unsupported { reason: format!("{} runs on {its}: {option} `stream_time`", names.display()) })
}

fn window_ms(options: &Options) -> i64 {
    i64::try_from(options.window_ms()).unwrap_or(i64::MAX)
}

/// A process with a shorter window would remove keys that others need, and one that does not hold keys would run them again.
async fn check_options(transaction: &Transaction<'_>, names: &Names, options: &Options) -> Result<(), SetupError> {
    let stored = format!("SELECT window_ms, holds FROM {}", names.of("meta"));
    let row = transaction.query_one(&stored, &[]).await?;
    let (stored_ms, holds): (i64, bool) = (row.get(0), row.get(1));
    let difference = if stored_ms != window_ms(options) {
        format!("the window of {stored_ms} ms, and this process has one of {} ms: set `window`", options.window_ms())
    } else if holds != options.holds() {
        let name = |holds| if holds { "Hold" } else { "Rerun" };
        format!(
            "`OnInterrupt::{}`, and this process has `OnInterrupt::{}`: set `on_interrupt`",
            name(holds),
            name(options.holds())
        )
    } else {
        return Ok(());
    };
    let reason = format!("{} has {difference}, or change the store with `migrate`", names.display());
    Err(SetupError::Unsupported { reason })
}

/// The base of the tokens of `m`, the row of `meta`, on the server of `t`. It grows in another cluster, and on a timeline that is lower
/// than the last one, so that tokens do not repeat: a cluster that was upgraded, or restored from a dump, begins at the first timeline
/// again, and a dump may be older than the last tokens.
pub(crate) const TOKEN_BASE: &str = "CASE WHEN t.timeline < m.timeline OR t.system_id <> m.system_id
         THEN m.token_base + greatest(m.timeline - t.timeline, 0) + 1 ELSE m.token_base END";

async fn raise_token_base(transaction: &Transaction<'_>, names: &Names) -> Result<(), SetupError> {
    let meta = names.of("meta");
    let raise = format!(
        "WITH t AS MATERIALIZED (SELECT {TIMELINE} AS timeline, {SYSTEM} AS system_id)
         UPDATE {meta} m SET token_base = {TOKEN_BASE}, timeline = t.timeline, system_id = t.system_id
         FROM t WHERE m.timeline <> t.timeline OR m.system_id <> t.system_id"
    );
    transaction.execute(&raise, &[]).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_that_loses_acknowledged_writes_is_named() {
        let named = |commit, standbys, fsync, pages, durability| {
            not_durable(commit, standbys, fsync, pages, durability).map(|(reason, _)| reason)
        };
        use Durability::{Replicated, SingleServer};
        assert_eq!(named("on", "s1", "on", "on", Replicated), None);
        assert_eq!(named("remote_apply", "s1", "on", "on", Replicated), None);
        assert_eq!(named("on", "", "on", "on", SingleServer), None);
        for (commit, standbys, fsync, pages, durability, expected) in [
            ("off", "s1", "on", "on", SingleServer, "synchronous_commit = off"),
            ("local", "s1", "on", "on", Replicated, "synchronous_commit = local"),
            ("remote_write", "s1", "on", "on", Replicated, "synchronous_commit = remote_write"),
            ("on", " ", "on", "on", Replicated, "synchronous_standby_names is empty"),
            ("on", "s1", "off", "on", SingleServer, "fsync = off"),
            ("on", "s1", "on", "off", SingleServer, "full_page_writes = off"),
        ] {
            let reason = named(commit, standbys, fsync, pages, durability).unwrap();
            assert!(reason.contains(expected), "{reason}");
        }
    }
}
