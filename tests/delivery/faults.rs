//! Random faults of the queue, the work and the process.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

use onlyonce::delivery::{Attempt, Delivery, Failure};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::fixture::{Fixture, SECOND};
use crate::queue::QueueDelivery;

const MESSAGES: usize = 60;

/// The effects by payload.
type Ledger = Mutex<HashMap<Vec<u8>, u32>>;

/// How an attempt ends.
#[derive(Clone, Copy)]
struct Fault {
    kind: u32,
    /// The work hangs after its effect.
    hangs: bool,
}

impl Fault {
    async fn work(self, ledger: &Ledger, delivery: &QueueDelivery, attempt: &Attempt) -> Result<&'static str, Failure> {
        let charge = || *ledger.lock().unwrap().entry(delivery.payload().to_vec()).or_default() += 1;
        let is_charged = attempt.may_have_happened() && ledger.lock().unwrap().contains_key(delivery.payload());
        match self.kind {
            _ if is_charged => {}
            0 | 1 => return Err("declined".into()),
            2 => return Err(Failure::unknown("not sent")),
            3 => {
                charge();
                return Err(Failure::unknown("sent, no answer"));
            }
            4 => {
                charge();
                panic!("after the charge");
            }
            5 => return Err(Failure::permanent("no such account")),
            _ => charge(),
        }
        if self.hangs {
            std::future::pending::<()>().await;
        }
        Ok("receipt")
    }
}

#[tokio::test]
async fn every_effect_happens_once_under_random_faults() {
    let seed = std::env::var("ONLYONCE_SEED").ok().map_or_else(rand::random, |seed| seed.parse().unwrap());
    println!("ONLYONCE_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut fixture = Fixture::with(|builder| builder.window(100_000 * SECOND).bucket(10_000 * SECOND));
    for message in 0..MESSAGES {
        (0..random.random_range(1..4)).for_each(|_| fixture.queue.send(&format!("order-{message}")));
    }
    let sent = fixture.queue.lock().ready.len();
    let ledger = Ledger::default();
    let (mut steps, mut redriven) = (0, 0);
    while fixture.queue.acknowledged() < sent {
        steps += 1;
        assert!(steps < 20_000, "the queue is not drained");
        let step = random.random_range(0..100);
        if step < 3 {
            fixture.restart();
        }
        if fixture.queue.lock().ready.is_empty() {
            fixture.bench.advance_ms(40_000);
            fixture.queue.redeliver();
            redriven += fixture.queue.redrive().len();
            continue;
        }
        fixture.queue.fail_answers(u32::from(step % 5 == 0));
        let fault = Fault { kind: random.random_range(0..8), hangs: random.random_bool(0.1) };
        let process = fixture.try_process(async |delivery, attempt| fault.work(&ledger, delivery, attempt).await);
        // Dropping the future drops its delivery and its lease.
        let timeout = Duration::from_millis(if fault.hangs { 5 } else { 10_000 });
        let _ = tokio::time::timeout(timeout, process).await;
    }
    fixture.queue.fail_answers(0);
    let ledger = ledger.into_inner().unwrap();
    assert_eq!(ledger.len(), MESSAGES);
    assert!(ledger.values().all(|charges| *charges == 1), "{ledger:?}");
    let messages = fixture.queue.lock();
    assert!(messages.ready.is_empty() && messages.delayed.is_empty() && messages.dead.is_empty());
    assert!(redriven > 0, "no message was redriven");
    println!("{steps} deliveries of {sent} messages, {redriven} redriven");
}
