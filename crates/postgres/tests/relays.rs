//! Relays of the outbox, of several stores in one process: messages of a key are published in order, each at least once, and none is lost
//! if a relay is dropped, which closes its connection.

mod common;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{builder, database, drop_schema, new_schema, start};
use onlyonce_core::{Claim, Completion, Engine, Finish, Key, MessageId};
use onlyonce_postgres::PgStore;
use rand::RngExt;
use tokio_postgres::NoTls;

const KEYS: usize = 30;
const MESSAGES: usize = 20;

/// Completes the orders of one key one after the other, each with a message.
async fn complete_orders(store: PgStore, key: usize) {
    for number in 0..MESSAGES {
        let order = Key::from(format!("order-{key}-{number}"));
        let Claim::Acquired(grant) = store.claim(vec![order]).await.unwrap().remove(0).unwrap() else { panic!() };
        let completion = Completion::new("r").message("orders", format!("key-{key}"), number.to_string());
        store.finish(vec![(Arc::new(grant), Finish::Complete(completion))]).await.remove(0).unwrap();
    }
}

type Messages = Vec<(MessageId, usize)>;

/// What was published: the messages of each key in order, with their ids.
#[derive(Default)]
struct Published {
    of_keys: Mutex<HashMap<Vec<u8>, Messages>>,
    /// The keys of which a message is being published.
    at_work: Mutex<HashSet<Vec<u8>>>,
    most_relays: AtomicUsize,
    is_over: AtomicBool,
}

/// A message that is being published, by the only relay of its key. Also dropped with a relay that dies.
struct AtWork<'a>(&'a Published, Vec<u8>);

impl<'a> AtWork<'a> {
    fn new(published: &'a Published, key: &[u8]) -> Self {
        let mut at_work = published.at_work.lock().unwrap();
        let is_alone = at_work.insert(key.to_vec());
        let relays = at_work.len();
        drop(at_work);
        assert!(is_alone, "two relays publish messages of {}", key.escape_ascii());
        published.most_relays.fetch_max(relays, Ordering::SeqCst);
        Self(published, key.to_vec())
    }
}

impl Drop for AtWork<'_> {
    fn drop(&mut self) {
        self.0.at_work.lock().unwrap().remove(&self.1);
    }
}

async fn relay(store: PgStore, published: Arc<Published>) {
    while !published.is_over.load(Ordering::SeqCst) {
        let publish = async |message: onlyonce_core::Message| {
            let _at_work = AtWork::new(&published, &message.key);
            let pause = rand::rng().random_range(0..3);
            tokio::time::sleep(Duration::from_millis(pause)).await;
            if rand::rng().random_ratio(1, 20) {
                return Err("the broker rejects it");
            }
            let number = String::from_utf8(message.payload).unwrap().parse().unwrap();
            published.of_keys.lock().unwrap().entry(message.key).or_default().push((message.id, number));
            Ok(())
        };
        let limit = Duration::from_millis(rand::rng().random_range(20..400));
        // Some relays die while they publish: their connection ends with their locks.
        if let Ok(relayed) = tokio::time::timeout(limit, store.relay(15, publish)).await
            && relayed.unwrap().published == 0
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_whose_messages_fail_do_not_keep_other_keys_waiting() {
    let Some(config) = database() else { return };
    let schema = new_schema();
    let store = start(&config, &builder(&schema)).await;
    // The first messages are those of failing keys, and more than a relay takes.
    for key in ["failing-a", "failing-b", "failing-a", "failing-b", "good"] {
        let order = Key::from(format!("order-{key}-{}", store.outbox(100).await.unwrap().len()));
        let Claim::Acquired(grant) = store.claim(vec![order]).await.unwrap().remove(0).unwrap() else { panic!() };
        let completion = Completion::new("r").message("orders", key, "");
        store.finish(vec![(Arc::new(grant), Finish::Complete(completion))]).await.remove(0).unwrap();
    }
    let begun = std::time::Instant::now();
    let (mut published, mut failed) = (Vec::new(), 0);
    while published.is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(60), "the message of the good key is not published");
        let messages = Mutex::new(Vec::new());
        let publish = async |message: onlyonce_core::Message| {
            if message.key.starts_with(b"failing") {
                return Err("the broker rejects it");
            }
            messages.lock().unwrap().push(message.key);
            Ok(())
        };
        failed += store.relay(2, publish).await.unwrap().failed.len();
        published = messages.into_inner().unwrap();
    }
    assert_eq!(published, [b"good".to_vec()]);
    assert!(failed >= 2 && store.outbox(100).await.unwrap().len() == 4);
    drop(store);
    drop_schema(&config, &schema).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn relays_publish_the_messages_of_a_key_in_order_and_lose_none() {
    let Some(config) = database() else { return };
    let (schema, published) = (new_schema(), Arc::new(Published::default()));
    let first = start(&config, &builder(&schema)).await;
    let second = builder(&schema).connect(&config, NoTls).await.unwrap();
    let orders: Vec<_> = (0..KEYS).map(|key| tokio::spawn(complete_orders(first.clone(), key))).collect();
    let relays: Vec<_> = [&first, &first, &second, &second]
        .map(|store| tokio::spawn(relay(store.clone(), Arc::clone(&published))))
        .into();
    for orders in orders {
        orders.await.unwrap();
    }
    let begun = std::time::Instant::now();
    while !first.outbox(1).await.unwrap().is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(60), "messages stay in the outbox");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    published.is_over.store(true, Ordering::SeqCst);
    for relay in relays {
        relay.await.unwrap();
    }
    let of_keys = std::mem::take(&mut *published.of_keys.lock().unwrap());
    assert_eq!(of_keys.len(), KEYS);
    let mut repeated = 0;
    for (key, messages) in &of_keys {
        let mut ids: HashMap<usize, MessageId> = HashMap::new();
        for (id, number) in messages {
            // A message comes after all messages before it, and has the same id each time.
            assert!(*number <= ids.len(), "{number} of {} is published too early: {messages:?}", key.escape_ascii());
            repeated += usize::from(*number < ids.len());
            assert_eq!(ids.entry(*number).or_insert(*id), id, "{number} of {}", key.escape_ascii());
        }
        assert_eq!(ids.len(), MESSAGES, "messages of {} are lost", key.escape_ascii());
    }
    let most = published.most_relays.load(Ordering::SeqCst);
    println!("{} messages, {repeated} of them again, by up to {most} relays at a time", KEYS * MESSAGES);
    assert!(most > 1, "one relay at a time published");
    drop((first, second));
    drop_schema(&config, &schema).await;
}
