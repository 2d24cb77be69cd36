//! The statements of one store.
//!
//! Each statement reads the server's clock once. A statement that locks several rows locks them in the order of their keys, so
//! that calls with overlapping keys do not deadlock. Whether a key is available is decided by the state machine and not here: a
//! statement inserts an absent key, or replaces a row that has not changed since it was read (`xmin`).

use crate::names::Names;
use crate::schema::{SYSTEM, TIMELINE, TOKEN_BASE};

/// The states of a row.
pub(crate) mod state {
    pub(crate) const LEASED: i16 = 0;
    pub(crate) const RELEASED: i16 = 1;
    pub(crate) const INTERRUPTED: i16 = 2;
    pub(crate) const RESOLVED: i16 = 3;
    pub(crate) const COMPLETED: i16 = 4;
    pub(crate) const COMPLETED_WITHOUT_RESULT: i16 = 5;
    pub(crate) const COMPLETED_TOO_LARGE: i16 = 6;
}

/// The longest result that is read with its row, in bytes. Longer ones are read one after the other, if they are needed: those of a
/// batch together would take longer than a statement may.
pub(crate) const INLINE_RESULT: i32 = 16 << 10;

/// How many messages a relay reads at a time to find keys.
pub(crate) const RELAY_WINDOW: i64 = 10_000;

#[derive(Debug)]
pub(crate) struct Statements {
    /// $1 keys, $2 fingerprints, $3 own windows, $4 calls, $5 state, $6 lease in ms, $7 worker.
    pub(crate) insert: String,
    /// $1 key, $2 fingerprint, $3 own window, $4 call, $5 state, $6 lease in ms, $7 worker.
    pub(crate) insert_one: String,
    /// $1 keys, $2 worker.
    pub(crate) read: String,
    /// $1 key, $2 version.
    pub(crate) result: String,
    /// $1 keys, $2 versions, $3 fingerprints, $4 own windows, $5 attempts, $6 priors, $7 times, $8 calls, $9 state,
    /// $10 lease in ms, $11 worker.
    pub(crate) replace: String,
    /// $1 keys, $2 tokens, $3 states, $4 results, $5 backoffs in ms, $6 priors, $7 fingerprints, $8 attempts,
    /// $9 whether only a lease is finished.
    pub(crate) finish: String,
    /// $1 keys, $2 tokens, $3 lease in ms, $4 worker.
    pub(crate) renew: String,
    /// $1 key, $2 token.
    pub(crate) wait: String,
    /// $1 key, $2 version, $3 call, $4 state, $5 time, $6 result, $7 whether it takes a new token, $8 prior, $9 its token before.
    pub(crate) resolve: String,
    /// $1 key, $2 version.
    pub(crate) forget: String,
    /// $1 worker.
    pub(crate) held: String,
    /// $1 worker, $2 limit.
    pub(crate) count_held: String,
    /// $1 stream, $2 partition.
    pub(crate) offset: String,
    /// $1 streams, $2 partitions, $3 values.
    pub(crate) set_offsets: String,
    /// $1 topics, $2 keys, $3 payloads.
    pub(crate) add_messages: String,
    /// $1 limit.
    pub(crate) outbox: String,
    /// $1 records, $2 indexes.
    pub(crate) remove_messages: String,
    /// $1 limit, $2 record, $3 index, $4 keys that are left out.
    pub(crate) lock_message_keys: String,
    /// $1 keys, $2 limit.
    pub(crate) messages_of_keys: String,
    pub(crate) stream_time: String,
    pub(crate) lock_stream_time: String,
    /// $1 stream time, $2 the last timestamp that was rejected.
    pub(crate) set_stream_time: String,
    /// $1 keys.
    pub(crate) lock: String,
    /// $1 how many.
    pub(crate) take_tokens: String,
    /// $1 keys, $2 tokens, $3 calls, $4 times, $5 own windows, $6 attempts, $7 priors, $8 fingerprints, $9 state, $10 lease in ms,
    /// $11 worker.
    pub(crate) write: String,
    pub(crate) maintain: String,
    pub(crate) remove_workers: String,
    pub(crate) pages: String,
    /// $1 first page, $2 last page, $3 window in ms, $4 whether keys are held.
    pub(crate) expire: String,
}

impl Statements {
    pub(crate) fn new(names: &Names, is_stream: bool) -> Self {
        let [keys, tokens, offsets, outbox, workers, meta] =
            ["keys", "tokens", "offsets", "outbox", "workers", "meta"].map(|object| names.of(object));
        let (class, channel) = (names.lock_class(), names.channel());
        // The store's time, and the high part of its tokens. There is none, and the statement fails, while the server's timeline
        // is lower than one that was seen: the base must grow first.
        let wall = "floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint";
        // On stream time, `time` is the newest timestamp of a message, and leases run on `now`.
        let time = if is_stream { "m.stream_ms" } else { "c.now" };
        let clock = format!(
            "SELECT c.now, {time} AS time,
                    CASE WHEN l.timeline >= m.timeline THEN (m.token_base + l.timeline) << 47 END AS high
             FROM {meta} m, LATERAL (SELECT greatest({wall}, m.floor_ms) AS now OFFSET 0) c,
                  (SELECT {TIMELINE} AS timeline OFFSET 0) l"
        );
        let now = format!(
            "SELECT c.now, {time} AS time
             FROM {meta} m, LATERAL (SELECT greatest({wall}, m.floor_ms) AS now OFFSET 0) c"
        );
        // A key has the time of its message, whatever happens to it.
        let next_time = if is_stream { "k.time_ms" } else { "greatest(k.time_ms, t.now)" };
        let lease_is_over = match is_stream {
            true => "k.until_ms <= t.now AND k.time_ms + o.window_ms <= t.time",
            false => "k.until_ms + o.window_ms <= t.now",
        };
        let token = format!("t.high | nextval('{tokens}')");
        // Whether no session has the lock of a worker. The lock is released at once: a transaction of a caller would keep it.
        let is_unlocked = |worker: &str| {
            format!(
                "CASE WHEN pg_try_advisory_lock_shared({class}, {worker}) THEN pg_advisory_unlock_shared({class}, {worker})
                 ELSE false END"
            )
        };
        // True if the row is leased by a worker whose session has ended while the server was running.
        let is_dead = |worker: &str| {
            format!(
                "CASE WHEN k.state = 0 AND k.worker NOT IN (0, {worker}) THEN
                    CASE WHEN EXISTS (
                        SELECT 1 FROM {workers} w WHERE w.id = k.worker AND w.server_started = pg_postmaster_start_time()
                    ) THEN {} ELSE false END
                ELSE false END",
                is_unlocked("k.worker")
            )
        };
        // True of the keys that are held under `Hold`. The first condition is that of the index.
        let may_be_held = |worker: &str| {
            format!("k.state < 4 AND (k.state = 2 OR (k.state = 0 AND (k.until_ms <= t.now OR {})))", is_dead(worker))
        };
        // The worker of new leases. 0 if its session has ended, which this process has not noticed: a lease does not begin as one
        // of a crashed worker.
        let live_worker = |worker: &str| {
            format!("SELECT CASE WHEN {worker} = 0 THEN 0 WHEN {} THEN 0 ELSE {worker} END AS id", is_unlocked(worker))
        };
        let columns = |worker: &str| {
            format!(
                "k.key, t.now, k.xmin::text::bigint, k.token, k.call, k.time_ms, k.until_ms, k.own_window_ms, k.attempt,
                 k.state, k.prior, k.fingerprint, CASE WHEN octet_length(k.result) <= {INLINE_RESULT} THEN k.result END, {}, t.time,
                 octet_length(k.result)",
                is_dead(worker)
            )
        };
        let announce = format!("CASE WHEN u.waited THEN pg_notify('{channel}', u.token::text) END");
        Self {
            // The insert leaves out the keys that are there: it would wait for transactions that change their rows. `OFFSET 0` makes
            // each key a lookup in the index, whatever the statistics say.
            insert: format!(
                "WITH t AS MATERIALIZED ({clock}), w AS MATERIALIZED ({}),
                 i AS MATERIALIZED (
                     SELECT * FROM unnest($1::bytea[], $2::bytea[], $3::bigint[], $4::bigint[])
                         AS i(key, fingerprint, own, call)
                 ),
                 a AS (
                     INSERT INTO {keys} AS k (key, token, call, time_ms, until_ms, own_window_ms, worker, attempt, state,
                                              prior, fingerprint)
                     SELECT i.key, {token}, i.call, t.now, t.now + $6::bigint, i.own, w.id, 1, $5::smallint, 0,
                            i.fingerprint
                     FROM i, t, w WHERE NOT EXISTS (SELECT FROM {keys} k WHERE k.key = i.key OFFSET 0) ORDER BY i.key
                     ON CONFLICT (key) DO NOTHING
                     RETURNING key, time_ms, token
                 )
                 SELECT a.key, a.time_ms, NULL::bigint, a.token, NULL::bigint, NULL::bigint, NULL::bigint, NULL::bigint,
                        NULL::integer, NULL::smallint, NULL::smallint, NULL::bytea, NULL::bytea, NULL::boolean, NULL::bigint,
                        NULL::integer FROM a
                 UNION ALL
                 SELECT {} FROM t, i, LATERAL (SELECT k.*, k.xmin FROM {keys} k WHERE k.key = i.key OFFSET 0) k",
                live_worker("$7::integer"),
                columns("$7::integer")
            ),
            // Without the row that is there, which costs more than the rest: few single keys are there.
            insert_one: format!(
                "INSERT INTO {keys} AS k (key, token, call, time_ms, until_ms, own_window_ms, worker, attempt, state, prior,
                                          fingerprint)
                 SELECT $1::bytea, {token}, $4::bigint, t.now, t.now + $6::bigint, $3::bigint, w.id, 1, $5::smallint, 0, $2::bytea
                 FROM ({clock} OFFSET 0) t, ({}) w
                 WHERE NOT EXISTS (SELECT FROM {keys} k WHERE k.key = $1::bytea OFFSET 0)
                 ON CONFLICT (key) DO NOTHING
                 RETURNING time_ms, token",
                live_worker("$7::integer")
            ),
            read: format!(
                "WITH t AS MATERIALIZED ({now})
                 SELECT {} FROM t, unnest($1::bytea[]) AS i(key),
                     LATERAL (SELECT k.*, k.xmin FROM {keys} k WHERE k.key = i.key OFFSET 0) k",
                columns("$2::integer")
            ),
            result: format!("SELECT k.result FROM {keys} k WHERE k.key = $1 AND k.xmin::text::bigint = $2"),
            // Also returns the rows that it did not change because another transaction has locked them.
            replace: format!(
                "WITH t AS MATERIALIZED ({clock}), w AS MATERIALIZED ({}),
                 i AS MATERIALIZED (
                     SELECT * FROM unnest($1::bytea[], $2::bigint[], $3::bytea[], $4::bigint[], $5::integer[], $6::smallint[],
                                          $7::bigint[], $8::bigint[])
                         AS i(key, version, fingerprint, own, attempt, prior, time_ms, call)
                 ),
                 l AS MATERIALIZED (
                     SELECT i.* FROM i JOIN {keys} k ON k.key = i.key AND k.xmin::text::bigint = i.version
                     ORDER BY k.key FOR UPDATE OF k SKIP LOCKED
                 ),
                 u AS (
                     UPDATE {keys} k SET token = {token}, call = l.call, time_ms = l.time_ms, until_ms = t.now + $10::bigint,
                         own_window_ms = l.own, worker = w.id, attempt = l.attempt, state = $9::smallint, prior = l.prior,
                         waited = false, fingerprint = l.fingerprint, result = NULL
                     FROM l, t, w WHERE k.key = l.key AND k.xmin::text::bigint = l.version
                     RETURNING k.key, k.token
                 )
                 SELECT u.key, u.token FROM u
                 UNION ALL
                 SELECT i.key, NULL::bigint FROM i,
                     LATERAL (SELECT FROM {keys} k WHERE k.key = i.key AND k.xmin::text::bigint = i.version OFFSET 0) k
                 WHERE i.key NOT IN (SELECT l.key FROM l)",
                live_worker("$11::integer")
            ),
            finish: format!(
                "WITH t AS MATERIALIZED ({now}),
                 l AS MATERIALIZED (
                     SELECT i.* FROM unnest($1::bytea[], $2::bigint[], $3::smallint[], $4::bytea[], $5::bigint[], $6::smallint[],
                                            $7::bytea[], $8::integer[], $9::boolean[])
                         AS i(key, token, state, result, backoff, prior, fingerprint, attempt, is_lease)
                     JOIN {keys} k ON k.key = i.key AND k.token = i.token
                         AND CASE WHEN i.is_lease THEN k.state = 0 ELSE k.state < 4 END
                     ORDER BY k.key FOR UPDATE OF k
                 ),
                 u AS (
                     UPDATE {keys} k SET state = l.state, time_ms = {next_time},
                         until_ms = CASE WHEN l.backoff > 0 THEN t.now + l.backoff ELSE 0 END, worker = 0, prior = l.prior,
                         attempt = l.attempt,
                         fingerprint = l.fingerprint, result = l.result
                     FROM l, t WHERE k.key = l.key AND k.token = l.token AND k.state < 4
                     RETURNING k.key, k.token, k.waited
                 )
                 SELECT u.key, {announce}::text FROM u"
            ),
            renew: format!(
                "WITH t AS MATERIALIZED ({now}), w AS MATERIALIZED ({}),
                 l AS MATERIALIZED (
                     SELECT i.* FROM unnest($1::bytea[], $2::bigint[]) AS i(key, token)
                     JOIN {keys} k ON k.key = i.key AND k.token = i.token AND k.state = 0
                     ORDER BY k.key FOR UPDATE OF k
                 )
                 UPDATE {keys} k SET until_ms = greatest(k.until_ms, t.now + $3::bigint), worker = w.id
                 FROM l, t, w WHERE k.key = l.key AND k.token = l.token AND k.state = 0
                 RETURNING k.key, k.token",
                live_worker("$4::integer")
            ),
            wait: format!("UPDATE {keys} SET waited = true WHERE key = $1 AND token = $2 AND state < 4 AND NOT waited"),
            resolve: format!(
                "WITH t AS MATERIALIZED ({clock}),
                 u AS (
                     UPDATE {keys} k SET token = CASE WHEN $7::boolean THEN {token} ELSE k.token END, call = $3::bigint,
                         state = $4::smallint, time_ms = greatest(k.time_ms, $5::bigint), until_ms = 0, worker = 0,
                         result = $6::bytea, prior = $8::smallint
                     FROM t WHERE k.key = $1::bytea AND k.xmin::text::bigint = $2::bigint
                     RETURNING $9::bigint AS token, k.waited AS waited
                 )
                 SELECT {announce}::text FROM u"
            ),
            forget: format!("DELETE FROM {keys} WHERE key = $1 AND xmin::text::bigint = $2 RETURNING key"),
            held: format!(
                "WITH t AS MATERIALIZED ({now})
                 SELECT {} FROM t, {keys} k WHERE {} ORDER BY k.token",
                columns("$1::integer"),
                may_be_held("$1::integer")
            ),
            count_held: format!(
                "WITH t AS MATERIALIZED ({now})
                 SELECT count(*) FROM (
                     SELECT 1 FROM t, {keys} k WHERE {} LIMIT $2::bigint
                 ) AS held",
                may_be_held("$1::integer")
            ),
            offset: format!("SELECT value FROM {offsets} WHERE stream = $1 AND partition = $2"),
            set_offsets: format!(
                "INSERT INTO {offsets} AS o (stream, partition, value)
                 SELECT * FROM unnest($1::bytea[], $2::bigint[], $3::bigint[]) AS i(stream, partition, value)
                 ORDER BY i.stream, i.partition
                 ON CONFLICT (stream, partition) DO UPDATE SET value = EXCLUDED.value"
            ),
            add_messages: format!(
                "WITH t AS MATERIALIZED ({clock}), r AS MATERIALIZED (SELECT {token} AS record FROM t)
                 INSERT INTO {outbox} (record, index, topic, key, payload)
                 SELECT r.record, i.n - 1, i.topic, i.key, i.payload
                 FROM r, unnest($1::bytea[], $2::bytea[], $3::bytea[]) WITH ORDINALITY AS i(topic, key, payload, n)"
            ),
            outbox: format!("SELECT record, index, topic, key, payload FROM {outbox} ORDER BY record, index LIMIT $1"),
            remove_messages: format!(
                "DELETE FROM {outbox} o USING unnest($1::bigint[], $2::bigint[]) AS i(record, index)
                 WHERE o.record = i.record AND o.index = i.index"
            ),
            // Of the next messages, tries the lock of each key once, in the order of their first messages, until it has enough. Also
            // returns the last message, from which the next call goes on. Other locks of the store have two numbers.
            lock_message_keys: format!(
                "WITH w AS MATERIALIZED (
                     SELECT o.key, o.record, o.index FROM {outbox} o
                     WHERE (o.record, o.index) > ($2::bigint, $3::bigint) AND o.key NOT IN (SELECT unnest($4::bytea[]))
                     ORDER BY o.record, o.index LIMIT {RELAY_WINDOW}
                 ),
                 d AS MATERIALIZED (
                     SELECT n.key FROM (
                         SELECT w.key, row_number() OVER (ORDER BY w.record, w.index) AS number FROM w
                     ) n GROUP BY n.key ORDER BY min(n.number)
                 ),
                 l AS MATERIALIZED (
                     SELECT d.key FROM d WHERE pg_try_advisory_lock(hashtextextended(encode(d.key, 'hex'), {class})) LIMIT $1
                 )
                 SELECT l.key, e.record, e.index, (SELECT count(*) FROM w)
                 FROM (SELECT w.record, w.index FROM w ORDER BY w.record DESC, w.index DESC LIMIT 1) e LEFT JOIN l ON true"
            ),
            // The first message of each key comes before the second one of any.
            messages_of_keys: format!(
                "SELECT o.record, o.index, o.topic, o.key, o.payload FROM (
                     SELECT w.record, w.index, row_number() OVER (PARTITION BY w.key ORDER BY w.record, w.index) AS number FROM (
                         SELECT o.key, o.record, o.index FROM {outbox} o WHERE o.key IN (SELECT unnest($1::bytea[]))
                         ORDER BY o.record, o.index LIMIT {RELAY_WINDOW}
                     ) w
                     ORDER BY number, w.record, w.index LIMIT $2
                 ) n JOIN {outbox} o ON o.record = n.record AND o.index = n.index
                 ORDER BY n.number, o.record, o.index"
            ),
            stream_time: format!("SELECT m.stream_ms, m.rejected_ms, {wall} FROM {meta} m"),
            lock_stream_time: format!("SELECT m.stream_ms, m.rejected_ms, {wall} FROM {meta} m FOR UPDATE"),
            set_stream_time: format!("UPDATE {meta} SET stream_ms = $1, rejected_ms = $2"),
            lock: format!(
                "SELECT k.key FROM unnest($1::bytea[]) AS i(key) JOIN {keys} k ON k.key = i.key
                 ORDER BY k.key FOR UPDATE OF k SKIP LOCKED"
            ),
            take_tokens: format!(
                "WITH t AS MATERIALIZED ({clock}) SELECT {token}, t.now FROM t, generate_series(1, $1::bigint)"
            ),
            write: format!(
                "WITH t AS MATERIALIZED ({now}), w AS MATERIALIZED ({})
                 INSERT INTO {keys} (key, token, call, time_ms, until_ms, own_window_ms, worker, attempt, state, prior, fingerprint)
                 SELECT i.key, i.token, i.call, i.time_ms, t.now + $10::bigint, i.own, w.id, i.attempt, $9::smallint, i.prior,
                        i.fingerprint
                 FROM t, w, unnest($1::bytea[], $2::bigint[], $3::bigint[], $4::bigint[], $5::bigint[], $6::integer[],
                                   $7::smallint[], $8::bytea[])
                     AS i(key, token, call, time_ms, own, attempt, prior, fingerprint)
                 ORDER BY i.key
                 ON CONFLICT (key) DO UPDATE SET token = EXCLUDED.token, call = EXCLUDED.call, time_ms = EXCLUDED.time_ms,
                     until_ms = EXCLUDED.until_ms, own_window_ms = EXCLUDED.own_window_ms, worker = EXCLUDED.worker,
                     attempt = EXCLUDED.attempt, state = EXCLUDED.state, prior = EXCLUDED.prior, waited = false,
                     fingerprint = EXCLUDED.fingerprint, result = NULL",
                live_worker("$11::integer")
            ),
            maintain: format!(
                "WITH t AS MATERIALIZED (
                     SELECT {wall} AS now, {TIMELINE} AS timeline, {SYSTEM} AS system_id
                 )
                 UPDATE {meta} m SET floor_ms = greatest(m.floor_ms, t.now),
                     token_base = {TOKEN_BASE},
                     timeline = t.timeline, system_id = t.system_id
                 FROM t WHERE m.floor_ms < t.now - 1000 OR m.timeline <> t.timeline OR m.system_id <> t.system_id"
            ),
            remove_workers: format!("DELETE FROM {workers} WHERE seen < now() - interval '1 day'"),
            pages: format!("SELECT (pg_relation_size('{keys}') / current_setting('block_size')::bigint)::bigint"),
            // With the options of the store if they changed since this process was connected.
            expire: format!(
                "WITH t AS MATERIALIZED ({now}),
                 o AS MATERIALIZED (
                     SELECT greatest(m.window_ms, $3::bigint) AS window_ms, m.holds OR $4::boolean AS holds FROM {meta} m
                 ),
                 l AS MATERIALIZED (
                     SELECT k.ctid FROM {keys} k, t, o
                     WHERE k.ctid >= format('(%s,0)', $1::bigint)::tid AND k.ctid < format('(%s,0)', $2::bigint)::tid
                         AND CASE
                             WHEN k.state >= 4 THEN k.time_ms + least(k.own_window_ms, o.window_ms) <= t.time
                             WHEN k.state IN (1, 3) THEN k.time_ms + o.window_ms <= t.time
                             WHEN k.state = 2 THEN NOT o.holds AND k.time_ms + o.window_ms <= t.time
                             ELSE NOT o.holds AND {lease_is_over}
                         END
                     FOR UPDATE OF k SKIP LOCKED
                 )
                 DELETE FROM {keys} k USING l WHERE k.ctid = l.ctid"
            ),
        }
    }
}
