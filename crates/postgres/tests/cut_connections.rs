//! Connections are cut at every message of every verb: each verb succeeds as if nothing had happened, once.

#[path = "common/mod.rs"]
mod common;
#[path = "common/proxy.rs"]
mod proxy;

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::{builder, client, database, drop_schema, new_schema, start};
use onlyonce_core::{
    Claim, Completion, Engine, Error, Finish, Grant, Key, KeyStatus, LeaseState, Message, OnInterrupt, PriorAttempt,
    RecordOutcome, Release, Resolution, StoredKey, Timestamp,
};
use onlyonce_postgres::{PgLease, PgStore, SetupError};
use proxy::{Cut, Proxy};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;
use tokio_postgres::NoTls;

/// A store through the proxy, and one that is connected directly and sees what is stored.
struct Bench {
    cut: PgStore,
    direct: PgStore,
}

impl Bench {
    async fn acquire(&self, key: &str) -> Arc<Grant> {
        match self.direct.claim(vec![Key::from(key.to_owned())]).await.unwrap().remove(0).unwrap() {
            Claim::Acquired(grant) => Arc::new(grant),
            other => panic!("{key}: {other:?}"),
        }
    }

    async fn hold(&self, key: &str) {
        let grant = self.acquire(key).await;
        self.direct.abandon(grant);
    }

    async fn stored(&self, key: &str) -> Option<StoredKey> {
        self.direct.inspect(Key::from(key.to_owned())).await.unwrap()
    }

    async fn result(&self, key: &str) -> Option<Vec<u8>> {
        match self.stored(key).await {
            Some(StoredKey::Completed(completed)) => completed.result().map(<[u8]>::to_vec),
            other => panic!("{key} is not completed: {other:?}"),
        }
    }

    /// How many messages with this key are in the outbox.
    async fn messages(&self, key: &str) -> usize {
        let messages = self.direct.outbox(100_000).await.unwrap();
        messages.iter().filter(|message| message.key == key.as_bytes()).count()
    }
}

fn key(name: &str) -> Key<'static> {
    Key::from(name.to_owned())
}

fn acquired(answer: Claim<Grant>) -> Grant {
    match answer {
        Claim::Acquired(grant) => grant,
        other => panic!("{other:?}"),
    }
}

/// Runs one verb, with its preparation and its checks, while connections are cut at each of its messages in turn.
macro_rules! verbs {
    ($($name:ident($bench:ident, $key:ident) { $($prepare:tt)* } run { $run:expr } check($answer:ident) { $($check:tt)* })*) => {
        $(
            async fn $name($bench: &Bench, proxy: &Proxy, cut: Cut) -> u64 {
                for message in 0.. {
                    let $key = format!("{}-{cut:?}-{message}", stringify!($name));
                    let $key = $key.as_str();
                    $($prepare)*
                    proxy.cut_at(message, cut);
                    let $answer = $run;
                    let (has_cut, _) = proxy.disarm();
                    { $($check)* }
                    if !has_cut {
                        return message;
                    }
                }
                unreachable!()
            }
        )*

        async fn run_all(bench: &Bench, proxy: &Proxy, cut: Cut) -> Vec<(&'static str, u64)> {
            vec![$((stringify!($name), $name(bench, proxy, cut).await)),*]
        }
    };
}

verbs! {
    a_claim(bench, name) {} run {
        bench.cut.claim(vec![key(name)]).await.unwrap().remove(0).unwrap()
    } check(answer) {
        let grant = acquired(answer);
        assert_eq!((grant.attempt.number(), grant.attempt.prior()), (1, None), "{name}");
        let Some(StoredKey::Processing { token, .. }) = bench.stored(name).await else { panic!("{name}") };
        assert_eq!(token, grant.token(), "{name}");
    }
    a_claim_of_a_released_key(bench, name) {
        let grant = bench.acquire(name).await;
        bench.direct.finish(vec![(grant, Finish::Release(Release::default()))]).await.remove(0).unwrap();
    } run {
        bench.cut.claim(vec![key(name)]).await.unwrap().remove(0).unwrap()
    } check(answer) {
        let grant = acquired(answer);
        assert_eq!((grant.attempt.number(), grant.attempt.prior()), (2, Some(PriorAttempt::Released)), "{name}");
        let Some(StoredKey::Processing { token, .. }) = bench.stored(name).await else { panic!("{name}") };
        assert_eq!(token, grant.token(), "{name}");
    }
    a_claim_of_several_keys(bench, name) {
        let names = [format!("{name}b"), format!("{name}a"), format!("{name}c")];
        let held = bench.acquire(&names[2]).await;
    } run {
        bench.cut.claim(names.iter().map(|name| key(name)).collect()).await.unwrap()
    } check(answer) {
        let shape = (&answer[0], &answer[1], &answer[2]);
        assert!(matches!(shape, (Ok(Claim::Acquired(_)), Ok(Claim::Acquired(_)), Ok(Claim::InProgress(_)))), "{shape:?}");
        drop(held);
    }
    a_claim_that_waits(bench, name) {
        let grant = bench.acquire(name).await;
        let direct = bench.direct.clone();
        let release = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(20)).await;
            direct.finish(vec![(grant, Finish::Release(Release::default()))]).await.remove(0)
        });
    } run {
        bench.cut.claim_wait(key(name), Duration::from_secs(20)).await.unwrap()
    } check(answer) {
        release.await.unwrap().unwrap();
        assert_eq!(acquired(answer).attempt.number(), 2, "{name}");
    }
    a_record(bench, name) {} run {
        bench.cut.record(vec![key(name)]).await.unwrap().remove(0).unwrap()
    } check(answer) {
        assert_eq!(answer, RecordOutcome::First, "{name}");
        assert_eq!(bench.result(name).await, None);
    }
    a_check(bench, name) {} run {
        bench.cut.check(vec![key(name)]).await.unwrap().remove(0).unwrap()
    } check(answer) {
        assert_eq!(answer, KeyStatus::New, "{name}");
    }
    a_completion(bench, name) { let grant = bench.acquire(name).await; } run {
        bench.cut.finish(vec![(grant, Finish::Complete(Completion::new("r")))]).await.remove(0)
    } check(answer) {
        answer.unwrap();
        assert_eq!(bench.result(name).await.as_deref(), Some(&b"r"[..]));
    }
    a_completion_with_an_offset_and_a_message(bench, name) {
        let grant = bench.acquire(name).await;
        let completion = Completion::new("r").offset(name, 0, 7).message("t", name, "payload");
    } run {
        bench.cut.finish(vec![(grant, Finish::Complete(completion))]).await.remove(0)
    } check(answer) {
        answer.unwrap();
        assert_eq!(bench.result(name).await.as_deref(), Some(&b"r"[..]));
        assert_eq!(bench.direct.offset(name.as_bytes(), 0).await.unwrap(), Some(7), "{name}");
        assert_eq!(bench.messages(name).await, 1, "{name}");
    }
    a_release(bench, name) { let grant = bench.acquire(name).await; } run {
        bench.cut.finish(vec![(grant, Finish::Release(Release::default()))]).await.remove(0)
    } check(answer) {
        answer.unwrap();
        let state = bench.stored(name).await;
        let free = LeaseState::Free(PriorAttempt::Released);
        assert!(matches!(state, Some(StoredKey::Processing { state, .. }) if state == free), "{name}: {state:?}");
    }
    a_renewal(bench, name) { let grant = bench.acquire(name).await; } run {
        bench.cut.renew(vec![grant]).await.unwrap().remove(0)
    } check(answer) {
        answer.unwrap();
    }
    a_drop(bench, name) { let grant = bench.acquire(name).await; } run {
        { bench.cut.abandon(grant); bench.cut.inspect(key(name)).await.unwrap() }
    } check(answer) {
        let held = LeaseState::Held(PriorAttempt::Dropped);
        assert!(matches!(answer, Some(StoredKey::Processing { state, .. }) if state == held), "{name}: {answer:?}");
    }
    a_list_of_held_keys(bench, name) { bench.hold(name).await; } run {
        { bench.direct.check(vec![key(name)]).await.unwrap(); bench.cut.held().await.unwrap() }
    } check(answer) {
        assert!(answer.iter().any(|held| held.key == key(name)), "{name}");
        bench.direct.resolve(key(name), Resolution::Rerun).await.unwrap();
    }
    a_resolution_to_rerun(bench, name) { bench.hold(name).await; bench.direct.check(vec![key(name)]).await.unwrap(); } run {
        bench.cut.resolve(key(name), Resolution::Rerun).await
    } check(answer) {
        answer.unwrap();
        let state = bench.stored(name).await;
        let free = LeaseState::Free(PriorAttempt::Dropped);
        assert!(matches!(state, Some(StoredKey::Processing { state, .. }) if state == free), "{name}: {state:?}");
    }
    a_resolution_as_completed(bench, name) { bench.hold(name).await; bench.direct.check(vec![key(name)]).await.unwrap(); } run {
        bench.cut.resolve(key(name), Resolution::Completed(b"found".to_vec())).await
    } check(answer) {
        answer.unwrap();
        assert_eq!(bench.result(name).await.as_deref(), Some(&b"found"[..]));
    }
    a_forget(bench, name) { bench.direct.record(vec![key(name)]).await.unwrap().remove(0).unwrap(); } run {
        bench.cut.forget(key(name)).await
    } check(answer) {
        assert!(answer.unwrap(), "{name}");
        assert_eq!(bench.stored(name).await, None, "{name}");
    }
    an_offset(bench, name) {} run {
        bench.cut.set_offset(name.as_bytes(), 3, 9).await
    } check(answer) {
        answer.unwrap();
        assert_eq!(bench.cut.offset(name.as_bytes(), 3).await.unwrap(), Some(9), "{name}");
    }
    a_relay(bench, name) {
        let grant = bench.acquire(name).await;
        let completion = Completion::new("").message("t", name, "");
        bench.direct.finish(vec![(grant, Finish::Complete(completion))]).await.remove(0).unwrap();
        let published = AtomicUsize::new(0);
    } run {
        // It is not repeated: messages that were published may be published again.
        loop {
            let publish = async |message: Message| {
                published.fetch_add(usize::from(message.key == name.as_bytes()), Ordering::SeqCst);
                Ok::<_, Infallible>(())
            };
            let relayed = bench.cut.relay(1_000, publish).await;
            let count = published.load(Ordering::SeqCst);
            if relayed.is_ok() && count > 0 && bench.messages(name).await == 0 {
                break count;
            }
        }
    } check(answer) {
        assert!((1..=2).contains(&answer), "{name} was published {answer} times");
    }
    a_list_of_messages(bench, name) {} run {
        bench.cut.outbox(10).await
    } check(answer) {
        assert!(answer.is_ok(), "{name}: {answer:?}");
    }
    a_count(bench, name) { bench.hold(name).await; bench.direct.check(vec![key(name)]).await.unwrap(); } run {
        bench.cut.stats().await
    } check(answer) {
        assert!(answer.unwrap().held > 0, "{name}");
        bench.direct.resolve(key(name), Resolution::Rerun).await.unwrap();
    }
    a_removal_of_messages(bench, name) {
        let grant = bench.acquire(name).await;
        let completion = Completion::new("").message("t", name, "");
        bench.direct.finish(vec![(grant, Finish::Complete(completion))]).await.remove(0).unwrap();
        let messages = bench.direct.outbox(100_000).await.unwrap();
    } run {
        bench.cut.remove_messages(messages.iter().map(|message| message.id).collect()).await
    } check(answer) {
        answer.unwrap();
        assert_eq!(bench.messages(name).await, 0, "{name}");
    }
}

async fn cut_at_every_message(cut: Cut) {
    let Some(config) = database() else { return };
    let (schema, proxy) = (new_schema(), Proxy::start(&config).await);
    let options = builder(&schema).on_interrupt(OnInterrupt::Hold).connections(4);
    let direct = start(&config, &options).await;
    let through = options.connect(&proxy.config, NoTls).await.unwrap();
    let bench = Bench { cut: through, direct };
    let cuts = run_all(&bench, &proxy, cut).await;
    println!("{cut:?}: {cuts:?}");
    assert!(cuts.iter().all(|(_, cuts)| *cuts >= 4), "a verb has more messages than that");
    drop(bench);
    drop_schema(&config, &schema).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_verb_whose_connection_is_cut_at_any_message_succeeds_once() {
    cut_at_every_message(Cut::One).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_verb_succeeds_once_if_all_connections_are_cut_at_any_of_its_messages() {
    cut_at_every_message(Cut::All).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_on_stream_time_whose_connection_is_cut_succeeds_once() {
    let Some(config) = database() else { return };
    let (schema, proxy) = (new_schema(), Proxy::start(&config).await);
    let options = builder(&schema).connections(4).stream_time(Duration::from_secs(60));
    let direct = start(&config, &options).await;
    let through = options.connect(&proxy.config, NoTls).await.unwrap();
    let at = |name: &str| key(name).at(Timestamp::from_unix_s(1_600_000_000));
    for cut in [Cut::One, Cut::All] {
        for message in 0.. {
            let (claimed, recorded) = (format!("c-{cut:?}-{message}"), format!("r-{cut:?}-{message}"));
            proxy.cut_at(message, cut);
            let claim = through.claim(vec![at(&claimed)]).await.unwrap().remove(0).unwrap();
            let (has_cut, _) = proxy.disarm();
            let grant = acquired(claim);
            assert_eq!((grant.attempt.number(), grant.attempt.prior()), (1, None), "{claimed}");
            let stored = direct.inspect(key(&claimed)).await.unwrap();
            assert!(
                matches!(stored, Some(StoredKey::Processing { token, .. }) if token == grant.token()),
                "{stored:?}"
            );
            proxy.cut_at(message, cut);
            let outcome = through.record(vec![at(&recorded)]).await.unwrap().remove(0).unwrap();
            proxy.disarm();
            assert_eq!(outcome, RecordOutcome::First, "{recorded}");
            if !has_cut {
                assert!(message > 10, "a claim has more messages than {message}");
                break;
            }
        }
    }
    drop((direct, through));
    drop_schema(&config, &schema).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_verb_whose_retries_end_says_whether_it_may_have_happened() {
    let Some(config) = database() else { return };
    let (schema, proxy) = (new_schema(), Proxy::start(&config).await);
    let options = builder(&schema).retry_for(Duration::ZERO);
    let direct = start(&config, &options).await;
    let cut = options.connect(&proxy.config, NoTls).await.unwrap();
    cut.record(vec!["warm".into()]).await.unwrap().remove(0).unwrap();
    let mut unclear = [0, 0];
    for message in 0.. {
        let name = format!("k{message}");
        proxy.cut_at(message, Cut::One);
        let answer = cut.record(vec![key(&name)]).await.unwrap().remove(0);
        let (has_cut, _) = proxy.disarm();
        let is_stored = direct.inspect(key(&name)).await.unwrap().is_some();
        match answer {
            Ok(RecordOutcome::First) => assert!(is_stored, "{name}"),
            Err(Error::WriteFailed { .. }) => unclear[usize::from(is_stored)] += 1,
            Err(Error::Unavailable { .. }) => {
                assert!(!is_stored, "{name} is stored, and the error says that it is not")
            }
            other => panic!("{name}: {other:?}"),
        }
        if !has_cut {
            break;
        }
        // The next cut is one of a connection that is open.
        cut.inspect(key("warm")).await.unwrap_or_default();
    }
    assert!(unclear.iter().all(|count| *count > 0), "unclear, not stored and stored: {unclear:?}");
    // A call that only reads leaves nothing unknown.
    let mut failed = 0;
    for message in 0.. {
        proxy.cut_at(message, Cut::One);
        let answer = cut.check(vec![key("warm")]).await;
        let (has_cut, _) = proxy.disarm();
        match answer {
            Ok(_) => {}
            Err(Error::Unavailable { .. }) => failed += 1,
            Err(other) => panic!("a check fails with {other:?}"),
        }
        if !has_cut {
            break;
        }
        cut.inspect(key("warm")).await.unwrap_or_default();
    }
    assert!(failed > 0, "no check failed");
    drop((cut, direct));
    drop_schema(&config, &schema).await;
}

/// Charges and completes a key in a transaction of the caller, and claims it there if it has no lease.
async fn charge(
    store: &PgStore,
    of_caller: &mut tokio_postgres::Client,
    schema: &str,
    (name, lease): (&str, Option<PgLease>),
) -> Result<(), Box<dyn std::error::Error>> {
    let transaction = of_caller.transaction().await?;
    let lease = match lease {
        Some(lease) => lease,
        None => match store.claim_in(&transaction, key(name)).await? {
            Claim::Acquired(lease) => lease,
            other => panic!("{name}: {other:?}"),
        },
    };
    transaction.execute(&format!("INSERT INTO \"{schema}\".charges VALUES ($1)"), &[&name]).await?;
    let completed = lease.complete_in(&transaction, "r").await?;
    transaction.commit().await?;
    completed.committed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_of_the_caller_whose_connection_is_cut_happens_whole_or_not_at_all() {
    let Some(config) = database() else { return };
    let (schema, proxy, beside) = (new_schema(), Proxy::start(&config).await, client(&config).await);
    let store = start(&config, &builder(&schema)).await;
    beside.batch_execute(&format!("CREATE TABLE \"{schema}\".charges (id text PRIMARY KEY)")).await.unwrap();
    let count = format!("SELECT count(*) FROM \"{schema}\".charges WHERE id = $1");
    for is_claimed_before in [false, true] {
        let (mut failed, mut committed) = (0, 0);
        for message in 0.. {
            let name = format!("k-{is_claimed_before}-{message}");
            let lease = match is_claimed_before {
                true => match store.claim_lease(key(&name), Duration::ZERO).await.unwrap() {
                    Claim::Acquired(lease) => Some(lease),
                    other => panic!("{name}: {other:?}"),
                },
                false => None,
            };
            let mut of_caller = client(&proxy.config).await;
            proxy.cut_at(message, Cut::One);
            // The text of the error: the error itself has the lease.
            let answer =
                charge(&store, &mut of_caller, &schema, (&name, lease)).await.map_err(|error| error.to_string());
            let (has_cut, _) = proxy.disarm();
            // Waits until the server has ended the transaction.
            let is_completed = match store.claim_wait(key(&name), Duration::from_secs(60)).await.unwrap() {
                Claim::Completed(_) => true,
                Claim::Acquired(_) => false,
                other => panic!("{name}: {other:?}"),
            };
            let charges: i64 = beside.query_one(&count, &[&name]).await.unwrap().get(0);
            assert_eq!(charges, i64::from(is_completed), "{name}: the charge and the completion differ: {answer:?}");
            assert!(is_completed || answer.is_err(), "{name} is not completed");
            failed += u32::from(!is_completed);
            committed += u32::from(is_completed && answer.is_err());
            if !has_cut {
                assert!(answer.is_ok(), "{name}: {answer:?}");
                break;
            }
        }
        assert!(failed > 10 && committed > 0, "{failed} rolled back, {committed} committed without an answer");
    }
    drop(store);
    drop_schema(&config, &schema).await;
}

/// The machine of the first server has vanished: nothing answers there, and nothing rejects a connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_reaches_the_second_server_if_the_first_one_does_not_answer() {
    let Some(config) = database() else { return };
    let (schema, proxy) = (new_schema(), Proxy::start(&config).await);
    // The kernel drops connections that nobody accepts once its queue is full.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let silent = socket.listen(1).unwrap();
    let address = silent.local_addr().unwrap();
    let mut queued = Vec::new();
    while let Ok(stream) = timeout(Duration::from_millis(300), TcpStream::connect(address)).await {
        queued.push(stream.unwrap());
        assert!(queued.len() < 100, "the queue is never full");
    }
    let mut servers = tokio_postgres::Config::new();
    servers.user(config.get_user().unwrap()).dbname(config.get_dbname().unwrap());
    servers.host("127.0.0.1").port(address.port());
    servers.host("127.0.0.1").port(proxy.config.get_ports()[0]);
    servers.connect_timeout(Duration::from_secs(3));
    // A statement has less time than the first server takes.
    let options = builder(&schema).statement_limit(Duration::from_secs(2));
    let store = start(&servers, &options).await;
    let grant = acquired(store.claim(vec![key("k")]).await.unwrap().remove(0).unwrap());
    store.finish(vec![(Arc::new(grant), Finish::Complete(Completion::new("r")))]).await.remove(0).unwrap();
    drop((store, queued, silent));
    drop_schema(&config, &schema).await;
}

/// A proxy that removes the settings is a pooler for this purpose.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_without_its_settings_is_rejected() {
    let Some(config) = database() else { return };
    let (schema, proxy) = (new_schema(), Proxy::start(&config).await);
    let options = builder(&schema).retry_for(Duration::from_secs(1)).connections(4);
    options.migrate(&config, NoTls).await.unwrap();
    let before = options.connect(&proxy.config, NoTls).await.unwrap();
    proxy.remove_settings();
    let error = options.connect(&proxy.config, NoTls).await.unwrap_err();
    assert!(matches!(&error, SetupError::Unsupported { reason } if reason.contains("pooler")), "{error}");
    // So is a new connection of a store that was connected before.
    proxy.cut_at(0, Cut::All);
    let error = loop {
        match before.check(vec![key("k")]).await {
            Ok(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            Err(error) => break error,
        }
    };
    assert!(matches!(&error, Error::Unavailable { .. }) && error.chain().contains("pooler"), "{}", error.chain());
    drop(before);
    drop_schema(&config, &schema).await;
}

/// A server that accepts connections and says nothing, such as one whose process is stopped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_set_up_fails_if_the_server_accepts_the_connection_and_does_not_answer() {
    let Some(config) = database() else { return };
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut server = tokio_postgres::Config::new();
    server.user(config.get_user().unwrap()).dbname(config.get_dbname().unwrap());
    server.host("127.0.0.1").port(silent.local_addr().unwrap().port()).connect_timeout(Duration::from_secs(1));
    let options = builder("unused").statement_limit(Duration::from_millis(500));
    // Without limits of its own it waits for good.
    let error = timeout(Duration::from_secs(120), options.migrate(&server, NoTls)).await.unwrap().unwrap_err();
    assert!(matches!(error, SetupError::Server(_)), "{error}");
    let error = timeout(Duration::from_secs(120), options.connect(&server, NoTls)).await.unwrap().unwrap_err();
    assert!(matches!(error, SetupError::Server(_)), "{error}");
}

/// The statement after a write whose answer was lost fails: the call may have happened.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_whose_second_statement_fails_says_that_its_first_one_may_have_happened() {
    let Some(config) = database() else { return };
    let (schema, proxy, beside) = (new_schema(), Proxy::start(&config).await, client(&config).await);
    let options = builder(&schema).retry_for(Duration::from_secs(10));
    let direct = start(&config, &options).await;
    // The role can insert a row, and cannot read it.
    let role = format!(
        "CREATE ROLE {schema} LOGIN; GRANT USAGE ON SCHEMA {schema} TO {schema};
         GRANT ALL ON ALL TABLES IN SCHEMA {schema} TO {schema}; GRANT ALL ON ALL SEQUENCES IN SCHEMA {schema} TO {schema};
         REVOKE ALL ON {schema}.keys FROM {schema}; GRANT INSERT, UPDATE ON {schema}.keys TO {schema};
         GRANT SELECT (key, time_ms, token) ON {schema}.keys TO {schema}"
    );
    beside.batch_execute(&role).await.unwrap();
    let mut as_role = proxy.config.clone();
    as_role.user(&schema);
    let cut = options.connect(&as_role, NoTls).await.unwrap();
    cut.record(vec!["warm".into()]).await.unwrap().remove(0).unwrap();
    let mut unclear = 0;
    for message in 0..12 {
        let name = format!("k{message}");
        proxy.cut_at(message, Cut::One);
        let answer = cut.record(vec![key(&name)]).await.unwrap().remove(0);
        proxy.disarm();
        let is_stored = direct.inspect(key(&name)).await.unwrap().is_some();
        match answer {
            Ok(RecordOutcome::First) => assert!(is_stored, "{name}"),
            Err(Error::WriteFailed { .. }) => {
                assert!(is_stored, "{name}");
                unclear += 1;
            }
            other => panic!("{name}, stored: {is_stored}: {other:?}"),
        }
    }
    assert!(unclear > 0, "no answer of the first statement was lost");
    drop((cut, direct));
    drop_schema(&config, &schema).await;
    beside.batch_execute(&format!("DROP ROLE {schema}")).await.unwrap();
}
