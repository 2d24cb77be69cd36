//! What the broker examples share: a shop that charges orders, and the store of its consumer.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use onlyonce::Store;
use onlyonce::delivery::{AckError, Attempt, Failure, Outcome, Processor};

pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Each order is sent twice, as by a producer that did not get an answer.
pub(crate) const ORDERS: usize = 20;
/// Deliveries that are processed at the same time.
pub(crate) const CONCURRENCY: usize = 32;

/// The numbers of the orders, in the order in which the producer sends them.
pub(crate) fn sent_twice() -> impl Iterator<Item = usize> {
    (0..ORDERS).chain(0..ORDERS)
}

/// Charges every time it is called, and declines every seventh charge.
#[derive(Default)]
pub(crate) struct Shop {
    calls: AtomicU32,
    charges: Mutex<BTreeMap<Vec<u8>, u32>>,
}

#[derive(Debug, thiserror::Error)]
#[error("the card was declined")]
struct Declined;

impl Shop {
    /// The work of a delivery: charges the order unless an interrupted attempt has charged it.
    pub(crate) async fn charge_once(&self, order: &[u8], attempt: &Attempt) -> Result<String, Failure> {
        if attempt.may_have_happened()
            && let Some(receipt) = self.receipt(order)
        {
            return Ok(receipt);
        }
        Ok(self.charge(order).await?)
    }

    fn receipt(&self, order: &[u8]) -> Option<String> {
        let charges = self.charges.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        charges.contains_key(order).then(|| "receipt".to_owned())
    }

    async fn charge(&self, order: &[u8]) -> Result<String, Declined> {
        tokio::time::sleep(Duration::from_millis(5)).await;
        if self.calls.fetch_add(1, Ordering::Relaxed) % 7 == 6 {
            return Err(Declined);
        }
        let mut charges = self.charges.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        *charges.entry(order.to_vec()).or_default() += 1;
        Ok("receipt".to_owned())
    }

    /// Checks that each order was charged exactly once.
    pub(crate) fn check(&self) -> Result<(), BoxError> {
        let charges = self.charges.lock().map_err(|_| "a charge panicked")?;
        match charges.iter().find(|(_, times)| **times != 1) {
            Some((order, times)) => Err(format!("{} was charged {times} times", order.escape_ascii()).into()),
            None if charges.len() != ORDERS => Err(format!("{} of {ORDERS} orders were charged", charges.len()).into()),
            None => {
                println!("{ORDERS} orders were sent twice and charged once");
                Ok(())
            }
        }
    }
}

/// A store in the directory of the first argument, or in a temporary one, and its processor.
pub(crate) struct Backend {
    pub(crate) store: Store,
    pub(crate) processor: Processor,
    _temporary: tempfile::TempDir,
}

impl Backend {
    /// A store that remembers for `window`: set it longer than the queue keeps a message.
    pub(crate) fn open(window: Duration) -> Result<Self, BoxError> {
        let temporary = tempfile::tempdir()?;
        let directory = std::env::args_os().nth(1).map_or_else(|| temporary.path().join("store"), Into::into);
        let store = Store::builder().window(window).open(directory)?;
        let processor = Processor::new(store.clone()).backoff(Duration::from_millis(200), Duration::from_secs(60));
        Ok(Self { store, processor, _temporary: temporary })
    }
}

/// Logs the result of a delivery.
pub(crate) fn log<E: std::error::Error>(processed: Result<Outcome, AckError<E>>) {
    match processed {
        Ok(outcome) => println!("{outcome:?}"),
        // The queue redelivers, and the store knows the outcome.
        Err(error) => println!("{error}: {}", error.error),
    }
}
