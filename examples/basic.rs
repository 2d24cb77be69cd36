//! Charges an order once, however often it is delivered: `cargo run --example basic`
#![allow(clippy::print_stdout, reason = "an example prints")]

use onlyonce::{Claim, Store};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let store = Store::open("basic.store")?;
    for delivery in 1..=2 {
        match store.claim("order-4711").wait()? {
            Claim::Acquired(lease) => {
                if lease.attempt().may_have_happened() {
                    println!("delivery {delivery}: an earlier attempt was interrupted; check for its charge first");
                }
                // If this returned an error, the lease would be dropped: the next claim reports the attempt.
                let receipt = format!("receipt {}", lease.token());
                lease.complete(receipt).wait()?;
                println!("delivery {delivery}: charged");
            }
            Claim::Completed(first) => {
                let receipt = String::from_utf8_lossy(first.result().unwrap_or_default());
                println!("delivery {delivery}: already charged, with {receipt}");
            }
            Claim::InProgress(other) => {
                println!("delivery {delivery}: in progress elsewhere; retry after {:?}", other.retry_after);
            }
        }
    }
    store.close().wait()?;
    Ok(())
}
