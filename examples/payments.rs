//! A payment that must be charged once, in three scenarios:
//!
//! 1. The payment is charged, the acknowledgement is lost, and the message is delivered again.
//! 2. Two deliveries of one message arrive at the same time.
//! 3. The process is killed (a child, by SIGKILL) after the charge and before the completion.
//!
//! ```text
//! cargo run --release --example payments [new-directory]
//! ```
//!
//! [`handle`] is the consumer; everything else simulates its environment. The provider does not detect duplicates. It logs
//! all charges in a file, the ledger. After each scenario, the ledger must contain one charge.
//!
//! A kill loses nothing that a call of the store has returned. Under `OnInterrupt::Rerun` a claim is not synced, so a power
//! failure can lose it, and then the next attempt does not know that it must ask the provider. If that matters, open the store
//! with `OnInterrupt::Hold`.

#![allow(clippy::print_stdout, reason = "an example prints its result")]

use std::fmt;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use onlyonce::{Claim, Completion, FencingToken, Key, PriorAttempt, Store};
use serde::{Deserialize, Serialize};

type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

/// A message that the queue delivers at least once.
struct Message {
    order: &'static str,
    cents: u64,
}

type Receipt = String;

/// The outcome of a delivery. Acknowledge all but `Later`.
enum Handled {
    /// This delivery charged the order.
    Charged(Receipt),
    /// An earlier delivery charged the order. This is its receipt.
    Replayed(Receipt),
    /// An interrupted attempt charged the order, according to the provider.
    Recovered(PriorAttempt, Receipt),
    /// Another delivery is in progress.
    Later,
}

/// The consumer: charges an order once, however often its message is delivered.
fn handle(store: &Store, provider: &Provider, message: &Message) -> Result<Handled> {
    // With the fingerprint, the same order with a different amount is an error and not a duplicate.
    let key = Key::from(message.order).scope("charge").fingerprint(message.cents.to_be_bytes());
    let lease = match store.claim(key).wait()? {
        Claim::Acquired(lease) => lease,
        Claim::Completed(first) => {
            return Ok(Handled::Replayed(first.result_as()?.ok_or("the receipt was not stored")?));
        }
        Claim::InProgress(_) => return Ok(Handled::Later),
    };
    // From here on, an early return drops the lease. The next attempt sees the outcome as unknown, and asks the provider.
    if let Some(prior) = lease.attempt().prior().filter(|prior| prior.may_have_happened())
        && let Some(receipt) = provider.charge_of(message.order, lease.token())?
    {
        lease.complete(Completion::encode(&receipt)?).wait()?;
        return Ok(Handled::Recovered(prior, receipt));
    }
    let receipt = provider.charge(message.order, message.cents, lease.token())?;
    lease.complete(Completion::encode(&receipt)?).wait()?;
    Ok(Handled::Charged(receipt))
}

/// A payment provider with a ledger in a file. It does not detect duplicates, but it rejects outdated fencing tokens.
struct Provider {
    ledger: PathBuf,
    /// Called after the charge and before the answer.
    before_answer: fn(),
}

/// A line of the ledger: a charge, or a query for one.
#[derive(Serialize, Deserialize)]
struct Line {
    order: String,
    token: u64,
    charged: Option<(u64, Receipt)>,
}

impl Provider {
    fn charge(&self, order: &str, cents: u64, token: FencingToken) -> Result<Receipt> {
        let token = token.get();
        let receipt = format!("ch_{token:x}");
        self.enter(Line { order: order.to_owned(), token, charged: Some((cents, receipt.clone())) })?;
        (self.before_answer)();
        Ok(receipt)
    }

    /// The receipt of an order, if it is charged. Otherwise a delayed charge with an older token is rejected from now on, so the
    /// answer remains true.
    fn charge_of(&self, order: &str, token: FencingToken) -> Result<Option<Receipt>> {
        let before = self.enter(Line { order: order.to_owned(), token: token.get(), charged: None })?;
        Ok(before.into_iter().find_map(|line| line.charged).map(|(_, receipt)| receipt))
    }

    /// Appends a line and returns the earlier lines of the order. A token older than one of theirs is an error.
    fn enter(&self, line: Line) -> Result<Vec<Line>> {
        let mut file = File::options().create(true).append(true).open(&self.ledger)?;
        file.lock()?;
        let before = self.lines(&line.order)?;
        if before.iter().any(|earlier| earlier.token > line.token) {
            return Err(format!("the provider has seen a newer token than {} for {}", line.token, line.order).into());
        }
        file.write_all(format!("{}\n", serde_json::to_string(&line)?).as_bytes())?;
        Ok(before)
    }

    fn lines(&self, order: &str) -> Result<Vec<Line>> {
        let text = fs::read_to_string(&self.ledger)?;
        let lines: Vec<Line> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        Ok(lines.into_iter().filter(|line| line.order == order).collect())
    }
}

/// Runs the scenarios in a new directory. `child` runs this program again, as the [`doomed_consumer`].
fn story(dir: &Path, child: Command) -> Result<()> {
    fs::create_dir_all(dir)?;
    let provider = Provider { ledger: dir.join("ledger"), before_answer: || thread::sleep(Duration::from_millis(100)) };
    ensure(!provider.ledger.exists(), "the directory contains the ledger of an earlier run: give a new directory")?;
    let store = Store::open(dir.join("store"))?;
    lost_acknowledgement(&store, &provider)?;
    two_at_once(&store, &provider)?;
    store.close().wait()?;
    killed_while_charging(dir, &provider, child)
}

fn lost_acknowledgement(store: &Store, provider: &Provider) -> Result<()> {
    println!("1. The acknowledgement is lost.");
    let message = Message { order: "order-4711", cents: 12_00 };
    let first = handle(store, provider, &message)?;
    println!("   {} is delivered: {first}. The acknowledgement does not reach the queue.", message.order);
    let Handled::Charged(receipt) = first else { return Err("the first delivery should charge".into()) };
    deliver_again(store, provider, &message, &receipt)
}

fn two_at_once(store: &Store, provider: &Provider) -> Result<()> {
    println!("2. Two deliveries arrive at the same time.");
    let message = Message { order: "order-4712", cents: 34_50 };
    let start = Barrier::new(2);
    let deliver = || {
        start.wait();
        handle(store, provider, &message)
    };
    let [one, other] = thread::scope(|scope| {
        let consumers = [scope.spawn(deliver), scope.spawn(deliver)];
        consumers.map(|consumer| consumer.join().map_err(|_| "a consumer panicked"))
    });
    let (one, other) = (one??, other??);
    println!("   {} reaches two consumers. One: {one}. The other: {other}.", message.order);
    let ((Handled::Charged(receipt), _) | (_, Handled::Charged(receipt))) = (one, other) else {
        return Err("one of the two should charge".into());
    };
    deliver_again(store, provider, &message, &receipt)
}

/// The message of the consumer that is killed.
const FATAL: Message = Message { order: "order-4713", cents: 99_00 };
/// The environment variable that turns this program into that consumer. Its value is the directory.
const DOOMED: &str = "PAYMENTS_DOOMED_IN";

fn killed_while_charging(dir: &Path, provider: &Provider, mut child: Command) -> Result<()> {
    println!("3. The process is killed in the middle of a charge.");
    let mut child = child.env(DOOMED, dir).stdout(Stdio::piped()).spawn()?;
    let lines = BufReader::new(child.stdout.take().ok_or("the child has no stdout")?).lines();
    // A test harness may print text before it on the same line.
    let charged = lines.map_while(Result::ok).any(|line| line.ends_with("charged"));
    child.kill()?;
    let end = child.wait()?;
    println!("   {} is delivered to a process that is killed before it completes: {end}.", FATAL.order);
    ensure(charged, "the child ended before it had charged")?;

    let store = Store::open(dir.join("store"))?;
    let recovered = handle(&store, provider, &FATAL)?;
    println!("   The next process opens the store and receives the message: {recovered}.");
    let Handled::Recovered(PriorAttempt::Crashed, receipt) = recovered else {
        return Err("the next process should detect the crash and find the charge".into());
    };
    deliver_again(&store, provider, &FATAL, &receipt)
}

/// The same consumer in a process that is killed before it receives the answer of the provider.
fn doomed_consumer(dir: &Path) -> Result<()> {
    let before_answer = || {
        println!("charged");
        thread::sleep(Duration::from_secs(60));
    };
    handle(&Store::open(dir.join("store"))?, &Provider { ledger: dir.join("ledger"), before_answer }, &FATAL)?;
    Err("this process was not killed in time".into())
}

/// Ends each scenario: another delivery gets the first receipt, and the ledger contains one charge.
fn deliver_again(store: &Store, provider: &Provider, message: &Message, receipt: &str) -> Result<()> {
    let again = handle(store, provider, message)?;
    println!("   It is delivered again: {again}.");
    ensure(matches!(&again, Handled::Replayed(first) if first == receipt), "it should get the first receipt")?;
    let charges = provider.lines(message.order)?.iter().filter(|line| line.charged.is_some()).count();
    println!("   Charges of {} in the ledger: {charges}.\n", message.order);
    ensure(charges == 1, "the order should be charged once")
}

fn ensure(holds: bool, otherwise: &str) -> Result<()> {
    if holds { Ok(()) } else { Err(otherwise.into()) }
}

impl fmt::Display for Handled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Charged(receipt) => write!(f, "charged now, receipt {receipt}"),
            Self::Replayed(receipt) => write!(f, "charged before, receipt {receipt}"),
            Self::Recovered(prior, receipt) => {
                write!(
                    f,
                    "its prior attempt is {prior:?}, so it asked the provider first: charged before, receipt {receipt}"
                )
            }
            Self::Later => f.write_str("in progress, deliver it again later"),
        }
    }
}

fn main() -> Result<()> {
    if let Some(dir) = std::env::var_os(DOOMED) {
        return doomed_consumer(Path::new(&dir));
    }
    let child = Command::new(std::env::current_exe()?);
    match std::env::args_os().nth(1) {
        Some(dir) => story(Path::new(&dir), child),
        None => story(tempfile::tempdir()?.path(), child),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_order_is_charged_once() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "tests::the_child", "--ignored", "--nocapture"]);
        story(dir.path(), child).unwrap();
    }

    /// The child of `each_order_is_charged_once`: the program of a test runs only tests.
    #[test]
    #[ignore = "another test starts and kills it"]
    fn the_child() {
        if let Some(dir) = std::env::var_os(DOOMED) {
            doomed_consumer(Path::new(&dir)).unwrap();
        }
    }

    #[test]
    fn the_provider_charges_twice_and_rejects_only_an_older_token() {
        let dir = tempfile::tempdir().unwrap();
        let provider = Provider { ledger: dir.path().join("ledger"), before_answer: || () };
        let token = FencingToken::new;
        provider.charge("order-1", 100, token(7)).unwrap();
        provider.charge("order-1", 100, token(8)).unwrap();
        assert_eq!(provider.lines("order-1").unwrap().len(), 2);
        assert_eq!(provider.charge_of("order-2", token(9)).unwrap(), None);
        assert!(provider.charge("order-2", 100, token(8)).is_err());
    }
}
