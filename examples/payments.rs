//! A payment that must be charged once: the classic story, in three acts on a real store.
//!
//! 1. A payment is charged, the acknowledgement is lost, and the message comes again.
//! 2. Two deliveries of one message arrive at the same time.
//! 3. The process is killed (a child, by SIGKILL) after the provider has charged and before the store was told.
//!
//! ```text
//! cargo run --release --example payments [new-directory]
//! ```
//!
//! [`handle`] is the consumer one would really write; all else is the stage. The provider would charge an order as
//! often as it is told to and keeps a ledger of it in a file, where after each act one charge must stand.
//!
//! A kill takes nothing that the store was told. A power cut may take a claim, which is not synced under
//! `OnInterrupt::Rerun`, and with it the hint to ask: where that matters open the store with `OnInterrupt::Hold`.

#![allow(clippy::print_stdout, reason = "an example talks to its reader")]

use std::fmt;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use onlyonce::{Claim, Completion, Key, PriorAttempt, Store};
use serde::{Deserialize, Serialize};

type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

/// What the queue delivers, at least once.
struct Message {
    order: &'static str,
    cents: u64,
}

type Receipt = String;

/// What became of a delivery. All but `Later` are to be acknowledged.
enum Handled {
    /// Charged now.
    Charged(Receipt),
    /// Charged by an earlier delivery, whose receipt this is.
    Replayed(Receipt),
    /// Charged by an attempt that was interrupted: the provider said so, when asked.
    Recovered(PriorAttempt, Receipt),
    /// In the hands of another delivery.
    Later,
}

/// The consumer: charges an order once, however often its message comes.
fn handle(store: &Store, provider: &Provider, message: &Message) -> Result<Handled> {
    // By its fingerprint, the same order over another amount is an error and no duplicate.
    let key = Key::from(message.order).scope("charge").fingerprint(message.cents.to_be_bytes());
    let lease = match store.claim(key).wait()? {
        Claim::Acquired(lease) => lease,
        Claim::Completed(first) => return Ok(Handled::Replayed(first.result_as()?.ok_or("the receipt was not kept")?)),
        Claim::InProgress(_) => return Ok(Handled::Later),
    };
    // From here on, a `?` that fails drops the lease: "outcome unknown". The next attempt learns that, and asks.
    if let Some(prior) = lease.attempt().prior().filter(|prior| prior.may_have_happened())
        && let Some(receipt) = provider.charge_of(message.order, lease.token().get())?
    {
        lease.complete(Completion::encode(&receipt).unwrap()).wait()?;
        return Ok(Handled::Recovered(prior, receipt));
    }
    let receipt = provider.charge(message.order, message.cents, lease.token().get())?;
    lease.complete(Completion::encode(&receipt).unwrap()).wait()?;
    Ok(Handled::Charged(receipt))
}

/// A payment provider in a file. It knows nothing of duplicates, but it honours fencing tokens.
struct Provider {
    ledger: PathBuf,
    /// What happens to the answer on its way back, when the charge is done.
    way_back: fn(),
}

/// A line of the ledger: a charge, or a question whether there was one.
#[derive(Serialize, Deserialize)]
struct Line {
    order: String,
    token: u64,
    charged: Option<(u64, Receipt)>,
}

impl Provider {
    fn charge(&self, order: &str, cents: u64, token: u64) -> Result<Receipt> {
        let receipt = format!("ch_{token:x}");
        self.enter(Line { order: order.to_owned(), token, charged: Some((cents, receipt.clone())) })?;
        (self.way_back)();
        Ok(receipt)
    }

    /// The receipt of an order, if it is charged. If not, the answer stays true: the question's token bars any charge
    /// with an older one that is still on its way here.
    fn charge_of(&self, order: &str, token: u64) -> Result<Option<Receipt>> {
        let before = self.enter(Line { order: order.to_owned(), token, charged: None })?;
        Ok(before.into_iter().find_map(|line| line.charged).map(|(_, receipt)| receipt))
    }

    /// Appends a line, unless its token is older than one seen before, and gives the order's earlier lines.
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

/// Plays the acts in a new directory. `child` runs this program again, as the [`doomed_consumer`].
fn story(dir: &Path, child: Command) -> Result<()> {
    fs::create_dir_all(dir)?;
    let provider = Provider { ledger: dir.join("ledger"), way_back: || thread::sleep(Duration::from_millis(100)) };
    ensure(!provider.ledger.exists(), "the story was played in this directory before: give a new one")?;
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
    println!("   {} is delivered: {first}. The queue never hears of it.", message.order);
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

/// The message whose consumer is killed.
const FATAL: Message = Message { order: "order-4713", cents: 99_00 };
/// The variable that makes a run of this program that consumer, and names its directory.
const DOOMED: &str = "PAYMENTS_DOOMED_IN";

fn killed_while_charging(dir: &Path, provider: &Provider, mut child: Command) -> Result<()> {
    println!("3. The process is killed in the middle of a charge.");
    let mut child = child.env(DOOMED, dir).stdout(Stdio::piped()).spawn()?;
    let said = BufReader::new(child.stdout.take().ok_or("the child has no stdout")?).lines();
    // Only the end of a line is the child's own: a test harness around it may have begun the line.
    let charged = said.map_while(Result::ok).any(|line| line.ends_with("charged"));
    child.kill()?;
    let end = child.wait()?;
    println!("   {} is delivered to a process that does not live to complete it: {end}.", FATAL.order);
    ensure(charged, "the child ended before it had charged")?;

    let store = Store::open(dir.join("store"))?;
    let recovered = handle(&store, provider, &FATAL)?;
    println!("   The next process opens the store and gets the message: {recovered}.");
    let Handled::Recovered(PriorAttempt::Crashed, receipt) = recovered else {
        return Err("the next process should learn of the crash, and find the charge".into());
    };
    deliver_again(&store, provider, &FATAL, &receipt)
}

/// The same consumer in a process of its own, which does not live to see the provider's answer.
fn doomed_consumer(dir: &Path) -> Result<()> {
    let way_back = || {
        println!("charged");
        thread::sleep(Duration::from_secs(60));
    };
    handle(&Store::open(dir.join("store"))?, &Provider { ledger: dir.join("ledger"), way_back }, &FATAL)?;
    Err("nobody came to kill this process".into())
}

/// The end of each act: the message comes again and gets the first result, and the ledger holds one charge.
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
                write!(f, "its prior is {prior:?}, so it asks the provider first, who had charged: receipt {receipt}")
            }
            Self::Later => f.write_str("in progress, come again later"),
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
    fn each_order_of_the_story_is_charged_once() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "tests::the_child", "--ignored", "--nocapture"]);
        story(dir.path(), child).unwrap();
    }

    /// In a test this program is the harness, so that its child can only be a test.
    #[test]
    #[ignore = "the story starts and kills it"]
    fn the_child() {
        if let Some(dir) = std::env::var_os(DOOMED) {
            doomed_consumer(Path::new(&dir)).unwrap();
        }
    }

    #[test]
    fn the_provider_would_charge_twice_and_refuses_only_an_older_token() {
        let dir = tempfile::tempdir().unwrap();
        let provider = Provider { ledger: dir.path().join("ledger"), way_back: || () };
        provider.charge("order-1", 100, 7).unwrap();
        provider.charge("order-1", 100, 8).unwrap();
        assert_eq!(provider.lines("order-1").unwrap().len(), 2);
        assert_eq!(provider.charge_of("order-2", 9).unwrap(), None);
        assert!(provider.charge("order-2", 100, 8).is_err());
    }
}
