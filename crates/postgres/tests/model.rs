//! Random calls get the answers of `MemoryStore`, which decides with the state machine alone.
//!
//! Both stores run on set time, so that their answers agree to the millisecond. Expired rows are removed meanwhile.
//! `ONLYONCE_POSTGRES_SEED` repeats a run, `ONLYONCE_POSTGRES_ROUNDS` sets how many there are.

mod common;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use common::{builder, client, database, drop_schema, new_schema, start};
use onlyonce_core::testing::MemoryStore;
use onlyonce_core::{
    Claim, Completed, Completion, Engine, FencingToken, Finish, Grant, Key, KeyStatus, MessageId, OnInterrupt,
    PriorAttempt, Release, Resolution, Result, StoredKey, Timestamp,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::runtime::Runtime;
use tokio_postgres::{Client, Config};

const KEYS: u32 = 5;
const CALLS: usize = 120;
const WINDOW: Duration = Duration::from_millis(1_000);
const LEASE: Duration = Duration::from_millis(100);
const RESULT_LIMIT: usize = 4;

/// One of the stores, and the names of its tokens: tokens of the two stores differ, and those of one key come in the same order.
struct Side {
    engine: Arc<dyn Engine>,
    base: Timestamp,
    names: HashMap<FencingToken, String>,
    tokens_of: HashMap<String, usize>,
    grants: Vec<Arc<Grant>>,
    messages: Vec<MessageId>,
}

impl Side {
    fn new(engine: Arc<dyn Engine>) -> Self {
        Self {
            engine,
            base: Timestamp::UNIX_EPOCH,
            names: HashMap::new(),
            tokens_of: HashMap::new(),
            grants: Vec::new(),
            messages: Vec::new(),
        }
    }

    fn token(&mut self, key: &Key<'_>, token: FencingToken) -> String {
        let of_key = self.tokens_of.entry(key.to_string()).or_default();
        let name = self.names.entry(token).or_insert_with(|| {
            *of_key += 1;
            format!("{key}#{of_key}")
        });
        name.clone()
    }

    fn time(&self, at: Timestamp) -> u64 {
        at.saturating_since(self.base).as_millis().try_into().unwrap()
    }

    fn completed(&mut self, key: &Key<'_>, completed: &Completed) -> String {
        let (result, token) = (completed.result().map(<[u8]>::to_vec), self.token(key, completed.token()));
        let (at, until) = (self.time(completed.completed_at()), self.time(completed.remembered_until()));
        format!("completed {result:?} {} by {token} at {at} until {until}", completed.is_result_too_large())
    }

    fn claim(&mut self, key: &Key<'_>, answer: Result<Claim<Grant>>) -> String {
        match answer {
            Ok(Claim::Acquired(grant)) => {
                let (token, at) = (self.token(key, grant.token()), self.time(grant.claimed_at));
                let (number, prior) = (grant.attempt.number(), grant.attempt.prior());
                let text =
                    format!("acquired {token} at {at}, {number}, {prior:?}, {:?}", grant.key.payload_fingerprint());
                self.grants.push(Arc::new(grant));
                text
            }
            Ok(Claim::Completed(completed)) => self.completed(key, &completed),
            other => format!("{other:?}"),
        }
    }

    async fn run(&mut self, call: &Call) -> String {
        let engine = Arc::clone(&self.engine);
        match call.clone() {
            Call::Claim(keys) => {
                let answers = engine.claim(keys.clone()).await.unwrap();
                let mut texts = Vec::new();
                // In the order of the keys: a key that occurs twice gets its tokens in this order.
                for (key, answer) in keys.iter().zip(answers) {
                    texts.push(self.claim(key, answer));
                }
                texts.join("; ")
            }
            Call::Record(keys) => format!("{:?}", engine.record(keys).await.unwrap()),
            Call::Check(keys) => {
                let answers = engine.check(keys.clone()).await.unwrap();
                let mut texts = Vec::new();
                for (key, answer) in keys.iter().zip(answers) {
                    texts.push(match answer {
                        Ok(KeyStatus::Completed(completed)) => self.completed(key, &completed),
                        other => format!("{other:?}"),
                    });
                }
                texts.join("; ")
            }
            Call::Inspect(key) => match engine.inspect(key.clone()).await.unwrap() {
                Some(StoredKey::Completed(completed)) => self.completed(&key, &completed),
                Some(StoredKey::Processing { token, attempt, state, .. }) => {
                    format!("processing {} {attempt} {state:?}", self.token(&key, token))
                }
                other => format!("{other:?}"),
            },
            Call::Renew(grants) => {
                let grants = grants.iter().map(|index| Arc::clone(&self.grants[*index])).collect();
                self.errors(engine.renew(grants).await.unwrap())
            }
            Call::Finish(leases) => {
                let leases = leases.iter().map(|(index, finish)| (Arc::clone(&self.grants[*index]), finish.clone()));
                let answers = engine.finish(leases.collect()).await;
                self.errors(answers)
            }
            Call::Abandon(index) => {
                engine.abandon(Arc::clone(&self.grants[index]));
                // Before time passes.
                engine.stats().await.unwrap();
                String::new()
            }
            Call::Held => {
                let mut held: Vec<_> = engine.held().await.unwrap();
                held.sort_by_key(|held| held.key.to_string());
                let text = |held: &onlyonce_core::HeldKey| {
                    // `MemoryStore` counts an expired lease from its last renewal.
                    let since = (held.prior != PriorAttempt::LeaseExpired).then(|| self.time(held.since));
                    (held.key.to_string(), self.token(&held.key, held.token), held.attempt, held.prior, since)
                };
                format!("{:?}", held.iter().map(text).collect::<Vec<_>>())
            }
            Call::Resolve(key, resolution) => format!("{:?}", engine.resolve(key, resolution).await.is_ok()),
            Call::Forget(key) => match engine.forget(key).await {
                Ok(was_there) => format!("{was_there}"),
                Err(error) => format!("{:?}", error.kind()),
            },
            Call::Outbox => {
                let messages = engine.outbox(100).await.unwrap();
                self.messages = messages.iter().map(|message| message.id).collect();
                let offsets = [engine.offset(b"s", 0).await.unwrap(), engine.offset(b"s", 1).await.unwrap()];
                format!("{:?} {offsets:?}", messages.iter().map(|it| (&it.key, &it.payload)).collect::<Vec<_>>())
            }
            Call::RemoveFirst => {
                let first = self.messages.first().copied().into_iter().collect();
                engine.remove_messages(first).await.unwrap();
                String::new()
            }
            Call::Stats => {
                let stats = engine.stats().await.unwrap();
                format!("{}", stats.held)
            }
            Call::RemoveExpired | Call::Advance(_) => String::new(),
        }
    }

    /// Leaves out the leases of keys about which nothing is stored any more. PostgreSQL may have removed their rows, and then rejects
    /// them.
    async fn without_forgotten(&self, call: Call) -> Call {
        let mut kept = Vec::new();
        for grant in &self.grants {
            kept.push(self.engine.inspect(grant.key.clone()).await.unwrap().is_some());
        }
        match call {
            Call::Renew(grants) => Call::Renew(grants.into_iter().filter(|index| kept[*index]).collect()),
            Call::Finish(leases) => Call::Finish(leases.into_iter().filter(|(index, _)| kept[*index]).collect()),
            Call::Abandon(index) if !kept[index] => Call::Stats,
            other => other,
        }
    }

    fn errors(&mut self, answers: Vec<Result<()>>) -> String {
        let text = |answer: Result<()>| match answer {
            Err(onlyonce_core::Error::Superseded { key, token }) => {
                format!("superseded {key} {:?}", self.names.get(&token))
            }
            other => format!("{other:?}"),
        };
        answers.into_iter().map(text).collect::<Vec<_>>().join("; ")
    }
}

#[derive(Debug, Clone)]
enum Call {
    Claim(Vec<Key<'static>>),
    Record(Vec<Key<'static>>),
    Check(Vec<Key<'static>>),
    Inspect(Key<'static>),
    Renew(Vec<usize>),
    Finish(Vec<(usize, Finish)>),
    Abandon(usize),
    Held,
    Resolve(Key<'static>, Resolution),
    Forget(Key<'static>),
    Outbox,
    RemoveFirst,
    Stats,
    /// On PostgreSQL alone.
    RemoveExpired,
    Advance(Duration),
}

fn random_key(rng: &mut StdRng) -> Key<'static> {
    let mut key = Key::from(format!("k{}", rng.random_range(0..KEYS)));
    if rng.random_ratio(1, 3) {
        key = key.fingerprint(format!("{}", rng.random_range(0..2)));
    }
    if rng.random_ratio(1, 4) {
        key = key.window(Duration::from_millis(rng.random_range(1..2_000)));
    }
    key
}

fn random_keys(rng: &mut StdRng) -> Vec<Key<'static>> {
    (0..rng.random_range(1..5)).map(|_| random_key(rng)).collect()
}

/// Gives the keys of a call the timestamps of messages, most of them close to the newest one.
fn with_timestamps(rng: &mut StdRng, newest_ms: &mut u64, call: Call) -> Call {
    let mut at = |key: Key<'static>| {
        let ms = match rng.random_range(0..10) {
            0 => *newest_ms - rng.random_range(0..1_500),
            1 => *newest_ms + rng.random_range(0..400),
            _ => *newest_ms + rng.random_range(0..60) - 20,
        };
        if rng.random_ratio(3, 4) {
            *newest_ms = ms.max(*newest_ms);
        }
        // Without a window of its own: an expired key that is still stored makes the next one of it as late as itself.
        let plain = Key::from(key.as_bytes().to_vec()).with_fingerprint(key.payload_fingerprint().copied());
        plain.at(Timestamp::from_unix_ms(ms))
    };
    match call {
        Call::Claim(keys) => Call::Claim(keys.into_iter().map(&mut at).collect()),
        Call::Record(keys) => Call::Record(keys.into_iter().map(&mut at).collect()),
        Call::Check(keys) => Call::Check(keys.into_iter().map(&mut at).collect()),
        other => other,
    }
}

fn random_finish(rng: &mut StdRng) -> Finish {
    if rng.random_ratio(1, 2) {
        let mut completion = Completion::new("r".repeat(rng.random_range(0..RESULT_LIMIT + 3)));
        if rng.random_ratio(1, 3) {
            completion = completion.offset("s", rng.random_range(0..2), rng.random());
        }
        if rng.random_ratio(1, 3) {
            completion = completion.message("t", format!("{}", rng.random_range(0..100)), "payload");
        }
        return Finish::Complete(completion);
    }
    let mut release =
        Release::after(Duration::from_millis(rng.random_range(0..700) * u64::from(rng.random_ratio(1, 2))));
    release.may_have_happened = rng.random_ratio(1, 3);
    release.reset_attempts = rng.random_ratio(1, 4);
    Finish::Release(release)
}

fn random_call(rng: &mut StdRng, grants: usize) -> Call {
    // The latest grants, most of which are still leases.
    let grant = |rng: &mut StdRng| grants - 1 - rng.random_range(0..grants.min(8));
    match rng.random_range(0..100) {
        0..25 => Call::Claim(random_keys(rng)),
        25..33 => Call::Record(random_keys(rng)),
        33..38 => Call::Check(random_keys(rng)),
        38..44 => Call::Inspect(random_key(rng)),
        44..49 if grants > 0 => Call::Renew((0..rng.random_range(1..4)).map(|_| grant(rng)).collect()),
        49..66 if grants > 0 => {
            Call::Finish((0..rng.random_range(1..4)).map(|_| (grant(rng), random_finish(rng))).collect())
        }
        66..71 if grants > 0 => Call::Abandon(grant(rng)),
        71..73 => Call::Held,
        73..77 => {
            let resolution = match rng.random_ratio(1, 2) {
                true => Resolution::Rerun,
                false => Resolution::Completed("d".repeat(rng.random_range(0..RESULT_LIMIT + 2)).into_bytes()),
            };
            Call::Resolve(random_key(rng), resolution)
        }
        77..81 => Call::Forget(random_key(rng)),
        81..84 => Call::Outbox,
        84..85 => Call::RemoveFirst,
        85..87 => Call::Stats,
        87..90 => Call::RemoveExpired,
        _ => {
            let edges = [1, 50, 99, 100, 101, 499, 500, 999, 1_000, 1_001];
            Call::Advance(Duration::from_millis(edges[rng.random_range(0..edges.len())]))
        }
    }
}

/// Advances both clocks by the same time.
async fn advance(client: &Client, schema: &str, memory: &Runtime, by: Duration) {
    let advance = format!("UPDATE \"{schema}\".meta SET floor_ms = floor_ms + $1");
    client.execute(&advance, &[&i64::try_from(by.as_millis()).unwrap()]).await.unwrap();
    // A runtime does not run inside of another one.
    std::thread::scope(|scope| scope.spawn(|| memory.block_on(tokio::time::advance(by))).join().unwrap());
}

/// The time of the store: when a key was recorded just now.
async fn time_of(engine: &Arc<dyn Engine>) -> Timestamp {
    engine.record(vec!["probe".into()]).await.unwrap().remove(0).unwrap();
    let Some(StoredKey::Completed(completed)) = engine.inspect("probe".into()).await.unwrap() else { panic!() };
    engine.forget("probe".into()).await.unwrap();
    completed.completed_at()
}

async fn run_round(config: &Config, seed: u64, on_interrupt: OnInterrupt, max_ahead: Option<Duration>) {
    let mut rng = StdRng::seed_from_u64(seed);
    let schema = new_schema();
    let options = builder(&schema).window(WINDOW).lease(LEASE).on_interrupt(on_interrupt).result_limit(RESULT_LIMIT);
    let options = match max_ahead {
        Some(max_ahead) => options.stream_time(max_ahead),
        None => options,
    };
    let store = start(config, &options).await;
    let client = client(config).await;
    client.execute(&format!("UPDATE \"{schema}\".meta SET floor_ms = 4000000000000"), &[]).await.unwrap();
    let memory = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let of_memory = {
        let _entered = memory.enter();
        let options = MemoryStore::builder().window(WINDOW).lease(LEASE).on_interrupt(on_interrupt);
        let options = match max_ahead {
            Some(max_ahead) => options.stream_time(max_ahead),
            None => options,
        };
        options.result_limit(RESULT_LIMIT).build().unwrap()
    };
    let (mut ours, mut theirs) = (Side::new(store.clone().into()), Side::new(of_memory.into()));
    if max_ahead.is_none() {
        ours.base = time_of(&ours.engine).await;
        theirs.base = run_in(&memory, time_of(&theirs.engine));
    }
    // On stream time both have the times of the messages, far before the wall clock.
    let mut newest_ms = 1_600_000_000_000;
    let mut log = Vec::new();
    for _ in 0..CALLS {
        let mut call = random_call(&mut rng, theirs.grants.len());
        call = run_in(&memory, theirs.without_forgotten(call));
        if max_ahead.is_some() {
            call = with_timestamps(&mut rng, &mut newest_ms, call);
        }
        if let Call::Advance(by) = call {
            advance(&client, &schema, &memory, by).await;
        }
        if matches!(call, Call::RemoveExpired) {
            store.remove_expired().await.unwrap();
        }
        let actual = ours.run(&call).await;
        let expected = run_in(&memory, theirs.run(&call));
        log.push(format!("{call:?}\n    {actual}"));
        assert_eq!(actual, expected, "seed {seed}, {on_interrupt:?}, {max_ahead:?}, after\n{}", log.join("\n"));
    }
    advance(&client, &schema, &memory, WINDOW * 3).await;
    client.execute(&format!("UPDATE \"{schema}\".meta SET stream_ms = stream_ms + 10000"), &[]).await.unwrap();
    store.remove_expired().await.unwrap();
    let left = format!("SELECT count(*) FROM \"{schema}\".keys WHERE state <> 2 AND state <> 0");
    let left: i64 = client.query_one(&left, &[]).await.unwrap().get(0);
    assert_eq!(left, 0, "expired rows are left, seed {seed}");
    drop((ours, theirs, store));
    drop_schema(config, &schema).await;
    std::thread::spawn(move || drop(memory)).join().unwrap();
}

/// Runs a future on the runtime with paused time.
fn run_in<F: Future + Send>(runtime: &Runtime, future: F) -> F::Output
where
    F::Output: Send,
{
    std::thread::scope(|scope| scope.spawn(|| runtime.block_on(future)).join().unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_calls_get_the_answers_of_the_memory_store() {
    let Some(config) = database() else { return };
    let number = |name: &str| std::env::var(name).ok().map(|value| value.parse::<u64>().unwrap());
    let rounds = number("ONLYONCE_POSTGRES_ROUNDS").unwrap_or(8);
    let first = number("ONLYONCE_POSTGRES_SEED").unwrap_or_else(rand::random);
    for seed in (0..rounds).map(|round| first.wrapping_add(round)) {
        for on_interrupt in [OnInterrupt::Rerun, OnInterrupt::Hold] {
            for max_ahead in [None, Some(Duration::from_millis(100))] {
                run_round(&config, seed, on_interrupt, max_ahead).await;
            }
        }
    }
    println!("{rounds} rounds of {CALLS} calls under each policy, on the clock and on stream time, from seed {first}");
}
