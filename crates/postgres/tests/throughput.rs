//! Prints rates and latencies, beside the statements that a service would write by hand. Runs only with `--ignored`:
//!
//! `tests/postgres/run --release --test throughput -- --ignored --nocapture`
//!
//! `ONLYONCE_POSTGRES_STANDBY=1` measures with a synchronous standby, `ONLYONCE_REDIS` also Redis servers, by their sockets.

#[path = "common/cluster.rs"]
mod cluster;
mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use cluster::Cluster;
use common::{builder, client, database, drop_schema, new_schema, start};
use onlyonce_core::{Claim, Completion, Engine, Finish, Key};
use onlyonce_postgres::{Durability, PgStore};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio_postgres::Client;

const RESULT: &[u8] = b"receipt-of-thirty-bytes-length";

fn keys(prefix: &str, batch: usize, count: usize) -> Vec<Key<'static>> {
    // Random order, 44 bytes.
    let key = |index: usize| {
        let hash = ((batch * count + index) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Key::from(format!("{prefix}-{hash:016x}-{:016x}", hash.rotate_left(17)))
    };
    (0..count).map(key).collect()
}

/// Claims and completes these keys.
async fn live(store: &PgStore, keys: Vec<Key<'static>>) {
    let claims = store.claim(keys).await.unwrap();
    let grants = claims.into_iter().map(|claim| match claim.unwrap() {
        Claim::Acquired(grant) => (Arc::new(grant), Finish::Complete(Completion::new(RESULT))),
        other => panic!("{other:?}"),
    });
    for answer in store.finish(grants.collect()).await {
        answer.unwrap();
    }
}

fn percentile(times: &mut [Duration], part: f64) -> Duration {
    times.sort_unstable();
    times[((times.len() - 1) as f64 * part) as usize]
}

/// Runs tasks, each of which calls `one` with numbers of its own. Returns calls per second, p50 and p99.
async fn measure<F: Future<Output = ()> + Send + 'static>(
    tasks: usize,
    seconds: u64,
    one: impl Fn(usize, usize) -> F + Clone + Send + 'static,
) -> (f64, Duration, Duration) {
    let begun = Instant::now();
    let mut set = JoinSet::new();
    for task in 0..tasks {
        let one = one.clone();
        set.spawn(async move {
            let mut times = Vec::new();
            while begun.elapsed() < Duration::from_secs(seconds) {
                let call = Instant::now();
                one(task, times.len()).await;
                times.push(call.elapsed());
            }
            times
        });
    }
    let mut times: Vec<Duration> = set.join_all().await.into_iter().flatten().collect();
    let rate = times.len() as f64 / begun.elapsed().as_secs_f64();
    let (p50, p99) = (percentile(&mut times, 0.5), percentile(&mut times, 0.99));
    (rate, p50, p99)
}

/// What a service would write: an insert that wins or not, and an update.
struct ByHand {
    client: Client,
    insert: tokio_postgres::Statement,
    update: tokio_postgres::Statement,
}

impl ByHand {
    async fn new(config: &tokio_postgres::Config, schema: &str) -> Self {
        let client = client(config).await;
        let create = format!(
            "CREATE TABLE IF NOT EXISTS \"{schema}\".by_hand (key text PRIMARY KEY, result bytea, at timestamptz) \
             WITH (fillfactor = 60)"
        );
        client.batch_execute(&create).await.unwrap();
        let insert = format!(
            "INSERT INTO \"{schema}\".by_hand (key, at) VALUES ($1, now()) ON CONFLICT DO NOTHING RETURNING key"
        );
        let update = format!("UPDATE \"{schema}\".by_hand SET result = $2, at = now() WHERE key = $1");
        let (insert, update) = (client.prepare(&insert).await.unwrap(), client.prepare(&update).await.unwrap());
        Self { client, insert, update }
    }

    async fn live(&self, key: &str) {
        assert!(self.client.query_opt(&self.insert, &[&key]).await.unwrap().is_some());
        self.client.execute(&self.update, &[&key, &RESULT]).await.unwrap();
    }
}

/// `SET NX` and `SET` on a Redis server that `ONLYONCE_REDIS` names.
struct Redis(Mutex<BufReader<UnixStream>>);

impl Redis {
    async fn new(socket: &str) -> Self {
        Self(Mutex::new(BufReader::new(UnixStream::connect(socket).await.unwrap())))
    }

    /// Sends commands in one write, and reads their answers.
    async fn commands(&self, keys: &[Key<'static>], value: &[u8], nx: bool) {
        let mut request = Vec::new();
        for key in keys {
            let (count, nx): (_, &[u8]) = if nx { (4, b"$2\r\nNX\r\n") } else { (3, b"") };
            request.extend(format!("*{count}\r\n$3\r\nSET\r\n${}\r\n", key.as_bytes().len()).bytes());
            request.extend(key.as_bytes());
            request.extend(format!("\r\n${}\r\n", value.len()).bytes());
            request.extend([value, b"\r\n", nx].concat());
        }
        let mut stream = self.0.lock().await;
        stream.get_mut().write_all(&request).await.unwrap();
        let mut line = String::new();
        for _ in keys {
            line.clear();
            stream.read_line(&mut line).await.unwrap();
            assert_eq!(line, "+OK\r\n");
        }
    }

    async fn live(&self, keys: &[Key<'static>]) {
        self.commands(keys, b"leased", true).await;
        self.commands(keys, RESULT, false).await;
    }
}

type Figures = (f64, Duration, Duration);

/// A server of the figures' own with a synchronous standby, if `ONLYONCE_POSTGRES_STANDBY` is set.
async fn with_standby() -> Option<(Cluster, Cluster)> {
    std::env::var_os("ONLYONCE_POSTGRES_STANDBY")?;
    let mut primary = Cluster::new("primary");
    primary.start();
    let mut standby = primary.standby("standby");
    standby.start();
    primary.require_standby();
    Some((primary, standby))
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |number| number.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "prints figures"]
async fn rates_and_latencies() {
    let Some(config) = database() else { return };
    let (seconds, rounds) = (number("ONLYONCE_POSTGRES_SECONDS", 3), number("ONLYONCE_POSTGRES_ROUNDS", 5));
    let schema = new_schema();
    let clusters = with_standby().await;
    let (config, durability) = match &clusters {
        Some((primary, _)) => (primary.config(), Durability::Replicated),
        None => (config, Durability::SingleServer),
    };
    let store = start(&config, &builder(&schema).durability(durability).connections(8)).await;
    let mut all: Vec<(String, usize, Vec<Figures>)> = Vec::new();
    for round in 0..rounds {
        let mut add =
            |name: String, keys: usize, figures: Figures| match all.iter_mut().find(|(other, ..)| *other == name) {
                Some((_, _, of_rounds)) => of_rounds.push(figures),
                None => all.push((name, keys, vec![figures])),
            };
        for tasks in [1, 2, 4] {
            let of = store.clone();
            let figures = measure(tasks, seconds, move |task, call| {
                let (store, keys) = (of.clone(), keys(&format!("b{round}-{tasks}-{task}"), call, 500));
                async move { live(&store, keys).await }
            });
            add(format!("claim and complete, batches of 500, {tasks} callers"), 500, figures.await);
        }
        for tasks in [1, 16, 1_000] {
            let of = store.clone();
            let figures = measure(tasks, seconds, move |task, call| {
                let (store, keys) = (of.clone(), keys(&format!("s{round}-{tasks}-{task}"), call, 1));
                async move { live(&store, keys).await }
            });
            add(format!("claim and complete, single, {tasks} callers"), 1, figures.await);
        }
        for connections in [1, 16] {
            let mut clients = Vec::new();
            for _ in 0..connections {
                clients.push(Arc::new(ByHand::new(&config, &schema).await));
            }
            let figures = measure(connections, seconds, move |task, call| {
                let by_hand = Arc::clone(&clients[task]);
                let key = format!("h{round}-{connections}-{task}-{call}-01234567890123456789012345678");
                async move { by_hand.live(&key).await }
            });
            add(format!("insert and update by hand, {connections} connections"), 1, figures.await);
        }
        for socket in std::env::var("ONLYONCE_REDIS").iter().flat_map(|sockets| sockets.split(',')) {
            for (tasks, count) in [(1, 500), (4, 500), (1, 1), (16, 1)] {
                let mut clients = Vec::new();
                for _ in 0..tasks {
                    clients.push(Arc::new(Redis::new(socket).await));
                }
                let figures = measure(tasks, seconds, move |task, call| {
                    let redis = Arc::clone(&clients[task]);
                    let keys = keys(&format!("r{round}-{tasks}-{count}-{task}"), call, count);
                    async move { redis.live(&keys).await }
                });
                let name = format!("Redis {socket}, {tasks} connections with {count} keys at a time");
                add(name, count, figures.await);
            }
        }
        let (of, known) = (store.clone(), keys("b0-1-0", 0, 500));
        let figures = measure(1, seconds, move |_, _| {
            let (store, known) = (of.clone(), known.clone());
            async move { drop(store.claim(known).await.unwrap()) }
        });
        add("claim of completed keys, batches of 500".to_owned(), 500, figures.await);
    }
    println!(
        "medians of {rounds} rounds of {seconds} s, {durability:?}; in parentheses the slowest and the fastest round"
    );
    for (name, keys, mut of_rounds) in all {
        of_rounds.sort_by(|one, other| one.0.total_cmp(&other.0));
        let rate = |index: usize| of_rounds[index].0 * keys as f64;
        let median = of_rounds.len() / 2;
        let (_, p50, p99) = of_rounds[median];
        println!(
            "{name:56} {:>9.0} keys/s ({:.0} to {:.0})  p50 {p50:>9.2?}  p99 {p99:>9.2?}",
            rate(median),
            rate(0),
            rate(of_rounds.len() - 1),
        );
    }
    let size =
        format!("SELECT count(*), pg_total_relation_size('\"{schema}\".keys') / count(*) FROM \"{schema}\".keys");
    let row = client(&config).await.query_one(&size, &[]).await.unwrap();
    println!("{} rows of {} bytes with index", row.get::<_, i64>(0), row.get::<_, i64>(1));
    let hot = format!(
        "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE schemaname = '{schema}' AND relname = 'keys'"
    );
    tokio::time::sleep(Duration::from_secs(2)).await;
    let row = client(&config).await.query_one(&hot, &[]).await.unwrap();
    println!("{} updates, {} of them without an index entry", row.get::<_, i64>(0), row.get::<_, i64>(1));
    drop(store);
    drop_schema(&config, &schema).await;
}
