//! Processes that claim overlapping batches, and are killed at random: one holder at a time, no key stuck, no acknowledged completion
//! lost, no error, and a killed holder is reported.
//!
//! Each worker writes what it does to a file of its own, which survives its kill. The parent reads the files afterwards.
//! `ONLYONCE_POSTGRES_SECONDS` sets how long it runs.

mod common;

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::str::FromStr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::{builder, database, drop_schema, new_schema, start};
use onlyonce_core::{Claim, Completion, Engine, Error, Finish, Grant, Key, Release};
use onlyonce_postgres::{PgStore, PgStoreBuilder};
use rand::RngExt;
use rand::seq::SliceRandom;
use tokio_postgres::{Config, NoTls};

const WORKERS: usize = 6;
const TASKS: usize = 3;
/// Longer than a slow machine stops a worker.
const LEASE: Duration = Duration::from_secs(10);
/// How many keys are worked on at a time, and how often a new one begins.
const KEYS: u64 = 150;
const KEY_EVERY: Duration = Duration::from_millis(3);

fn options(schema: &str) -> PgStoreBuilder {
    builder(schema).lease(LEASE).connections(4)
}

fn now() -> u64 {
    u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos()).unwrap()
}

/// A line: what happened, the key, the token, the time, and how the attempt before ended.
#[derive(Clone)]
struct Log(Arc<Mutex<File>>);

impl Log {
    fn line(&self, what: &str, key: &Key<'_>, token: u64, more: &str) {
        let key = String::from_utf8_lossy(key.as_bytes()).into_owned();
        self.0.lock().unwrap().write_all(format!("{what} {key} {token} {} {more}\n", now()).as_bytes()).unwrap();
    }
}

/// One worker. Does nothing in the process of the tests.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn worker_process() {
    let Ok(path) = std::env::var("ONLYONCE_WORKER") else { return };
    let schema = std::env::var("ONLYONCE_WORKER_SCHEMA").unwrap();
    let begun: u64 = std::env::var("ONLYONCE_WORKER_BEGUN").unwrap().parse().unwrap();
    let config = Config::from_str(&std::env::var("ONLYONCE_POSTGRES").unwrap()).unwrap();
    let log = Log(Arc::new(Mutex::new(OpenOptions::new().append(true).create(true).open(path).unwrap())));
    let store = options(&schema).connect(&config, NoTls).await.unwrap();
    let tasks: Vec<_> = (0..TASKS).map(|_| tokio::spawn(work(store.clone(), log.clone(), begun))).collect();
    for task in tasks {
        task.await.unwrap();
    }
}

async fn work(store: PgStore, log: Log, begun: u64) {
    loop {
        let newest = (now() - begun) / u64::try_from(KEY_EVERY.as_nanos()).unwrap();
        let mut keys: Vec<u64> = (newest.saturating_sub(KEYS)..=newest).collect();
        keys.shuffle(&mut rand::rng());
        keys.truncate(rand::rng().random_range(1..20));
        let keys: Vec<Key<'static>> = keys.into_iter().map(|key| Key::from(format!("k{key}"))).collect();
        let answers = match store.claim(keys.clone()).await {
            Ok(answers) => answers,
            Err(error) => return log.line("X", &"claim".into(), 0, &error.chain()),
        };
        let mut acquired = Vec::new();
        for (key, answer) in keys.iter().zip(answers) {
            match answer {
                Ok(Claim::Acquired(grant)) => {
                    log.line("A", key, grant.token().get(), &format!("{:?}", grant.attempt.prior()));
                    acquired.push(Arc::new(grant));
                }
                Ok(Claim::Completed(completed)) => log.line("D", key, completed.token().get(), ""),
                Ok(Claim::InProgress(_)) => {}
                Err(error) => log.line("X", key, 0, &error.chain()),
            }
        }
        let pause = rand::rng().random_range(0..40);
        tokio::time::sleep(Duration::from_millis(pause)).await;
        let (abandoned, finished): (Vec<_>, Vec<_>) =
            acquired.into_iter().partition(|_| rand::rng().random_ratio(1, 20));
        for grant in abandoned {
            log.line("E", &grant.key, grant.token().get(), "drop");
            store.abandon(grant);
        }
        let leases: Vec<(Arc<Grant>, Finish)> = finished.into_iter().map(with_finish).collect();
        for (grant, finish) in &leases {
            let how = if matches!(finish, Finish::Complete(_)) { "complete" } else { "release" };
            log.line("E", &grant.key, grant.token().get(), how);
        }
        let answers = store.finish(leases.clone()).await;
        for ((grant, finish), answer) in leases.iter().zip(answers) {
            match (finish, answer) {
                (Finish::Complete(_), Ok(())) => log.line("C", &grant.key, grant.token().get(), ""),
                (Finish::Release(_), Ok(())) => {}
                (_, Err(Error::Superseded { .. })) => log.line("S", &grant.key, grant.token().get(), ""),
                (_, Err(error)) => log.line("X", &grant.key, grant.token().get(), &error.chain()),
            }
        }
    }
}

fn with_finish(grant: Arc<Grant>) -> (Arc<Grant>, Finish) {
    let finish = match rand::rng().random_ratio(3, 4) {
        true => {
            let token = grant.token().to_string();
            let completion = Completion::new(token.clone());
            // Some completions are transactions.
            Finish::Complete(if rand::rng().random_ratio(1, 4) {
                completion.message("t", token, "")
            } else {
                completion
            })
        }
        false => Finish::Release(Release::default()),
    };
    (grant, finish)
}

struct Worker {
    process: Child,
    name: String,
}

impl Worker {
    fn start(dir: &Path, number: usize, schema: &str, begun: u64) -> Self {
        let name = format!("worker-{number}");
        let process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "worker_process", "--nocapture"])
            .env("ONLYONCE_WORKER", dir.join(&name))
            .env("ONLYONCE_WORKER_SCHEMA", schema)
            .env("ONLYONCE_WORKER_BEGUN", begun.to_string())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self { process, name }
    }

    /// Kills it, and returns when.
    fn kill(mut self) -> (String, u64) {
        let at = now();
        (std::mem::take(&mut self.name), at)
    }
}

/// Also after a failed assertion.
impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What one attempt did, by the files.
#[derive(Debug, Default)]
struct Attempt {
    worker: String,
    acquired: u64,
    prior: String,
    ended: Option<u64>,
    is_acknowledged: bool,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_that_are_killed_hold_keys_one_after_the_other_and_lose_no_completion() {
    let Some(config) = database() else { return };
    let seconds = std::env::var("ONLYONCE_POSTGRES_SECONDS").map_or(12, |seconds| seconds.parse().unwrap());
    let (schema, dir, begun) = (new_schema(), tempfile::tempdir().unwrap(), now());
    let store = start(&config, &options(&schema)).await;
    let mut workers: Vec<_> = (0..WORKERS).map(|number| Worker::start(dir.path(), number, &schema, begun)).collect();
    let mut killed = HashMap::new();
    let mut kills_at_work = 0;
    // On a slow machine it takes longer until enough has happened.
    while now() - begun < seconds * 1_000_000_000 * if kills_at_work > 30 { 1 } else { 5 } {
        let pause = rand::rng().random_range(50..300);
        tokio::time::sleep(Duration::from_millis(pause)).await;
        let victim = rand::rng().random_range(0..workers.len());
        // Some are killed while they start.
        let works = std::fs::metadata(dir.path().join(&workers[victim].name)).is_ok_and(|log| log.len() > 1_000);
        if !works && rand::rng().random_ratio(3, 4) {
            continue;
        }
        kills_at_work += u32::from(works);
        killed.extend([workers.swap_remove(victim).kill()]);
        workers.push(Worker::start(dir.path(), WORKERS + killed.len(), &schema, begun));
    }
    killed.extend(workers.into_iter().map(Worker::kill));

    let mut attempts: BTreeMap<String, BTreeMap<u64, Attempt>> = BTreeMap::new();
    let mut duplicates: Vec<(String, u64)> = Vec::new();
    for worker in killed.keys() {
        let Ok(text) = std::fs::read_to_string(dir.path().join(worker)) else { continue };
        for line in text.lines() {
            let parts: Vec<&str> = line.splitn(5, ' ').collect();
            let [what, key, token, at, more] = parts[..] else { continue };
            let (token, at): (u64, u64) = (token.parse().unwrap(), at.parse().unwrap());
            let of_key = attempts.entry(key.to_owned()).or_default();
            match what {
                "A" => {
                    let attempt = of_key.entry(token).or_default();
                    assert_eq!(attempt.acquired, 0, "token {token} of {key} was given twice");
                    (attempt.worker, attempt.acquired, attempt.prior) = (worker.clone(), at, more.to_owned());
                }
                "E" => of_key.get_mut(&token).unwrap().ended = Some(at),
                "C" => of_key.get_mut(&token).unwrap().is_acknowledged = true,
                "D" => duplicates.push((key.to_owned(), token)),
                "S" => {}
                _ => panic!("a call failed in {worker}: {line}"),
            }
        }
    }
    let (mut acknowledged, mut interrupted, mut waits) = (0, 0, Vec::new());
    for (key, of_key) in &attempts {
        let in_order: Vec<(&u64, &Attempt)> = of_key.iter().collect();
        for pair in in_order.windows(2) {
            let [(token, before), (next_token, after)] = pair else { continue };
            let end = before.ended.unwrap_or(killed[&before.worker]);
            assert!(
                after.acquired >= end,
                "{key} had two holders: {token} {before:?} until {end}, and {next_token} {after:?}"
            );
            if before.ended.is_none() {
                interrupted += 1;
                waits.push((after.acquired - end) / 1_000_000);
                let is_reported = ["Crashed", "LeaseExpired"].iter().any(|prior| after.prior.contains(prior));
                assert!(is_reported, "{key}: {next_token} does not report the killed holder: {after:?}");
            }
        }
        // No key is stuck: each is completed, or free after a lease at the latest.
        let answer = store.claim_wait(Key::from(key.clone()), LEASE * 2).await.unwrap();
        let completed_by: Vec<u64> =
            of_key.iter().filter(|(_, attempt)| attempt.is_acknowledged).map(|(token, _)| *token).collect();
        acknowledged += completed_by.len();
        match &answer {
            Claim::Completed(completed) => {
                let token = completed.token().get();
                assert!(
                    completed_by.iter().all(|by| *by == token),
                    "{key}: {completed_by:?} acknowledged, {token} stored"
                );
                assert_eq!(completed.result(), Some(token.to_string().as_bytes()), "the result of {key}");
            }
            Claim::Acquired(grant) => {
                assert!(completed_by.is_empty(), "{key}: the completion of {completed_by:?} is lost");
                assert!(grant.attempt.prior().is_some(), "{key}: its attempts are forgotten");
            }
            Claim::InProgress(_) => panic!("{key} is stuck"),
        }
        for (_, token) in duplicates.iter().filter(|(of, _)| of == key) {
            let is_it = matches!(&answer, Claim::Completed(completed) if completed.token().get() == *token);
            assert!(is_it, "{key}: a duplicate was answered with {token}, and then {answer:?}");
        }
    }
    waits.sort_unstable();
    let (median, longest) = (waits.get(waits.len() / 2), waits.last());
    println!(
        "{} kills; {} keys, {acknowledged} acknowledged completions, {} duplicates; {interrupted} killed holders were \
         followed, after {median:?} ms in the median and {longest:?} ms at most",
        killed.len(),
        attempts.len(),
        duplicates.len(),
    );
    assert!(acknowledged > 100 && interrupted > 0, "the test did not reach what it tests");
    drop(store);
    drop_schema(&config, &schema).await;
}
