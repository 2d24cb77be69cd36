//! A store whose figures Prometheus can read.
//!
//! ```text
//! cargo run --release --features metrics --example prometheus [address] [new-directory]
//! curl http://127.0.0.1:9184/metrics
//! ```
//!
//! It works on orders of which some come twice and some fail, until it is ended. [`recorder`] is what a service needs.

#![allow(clippy::print_stdout, reason = "an example talks to its reader")]

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder};
use onlyonce::{Claim, Store};

type Failure = Box<dyn std::error::Error>;

/// Seconds: a write to memory is ten microseconds, one that waits for a busy disk a tenth of a second.
const DURATIONS: [f64; 12] = [0.000_01, 0.000_03, 0.000_1, 0.000_3, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 10.0];
const COUNTS: [f64; 9] = [1.0, 2.0, 4.0, 8.0, 16.0, 64.0, 256.0, 1_024.0, 4_096.0];

/// Names with units, as Prometheus wants them, and buckets that fit a store.
fn recorder() -> Result<PrometheusBuilder, BuildError> {
    PrometheusBuilder::new()
        .with_recommended_naming(true)
        .set_buckets_for_metric(Matcher::Suffix("duration".to_owned()), &DURATIONS)?
        .set_buckets_for_metric(Matcher::Suffix("keys".to_owned()), &COUNTS)?
        .set_buckets_for_metric(Matcher::Suffix("attempt".to_owned()), &COUNTS)
}

/// One round of work: every fourth order came before, and every tenth fails.
fn work(store: &Store, round: u64) -> Result<(), Failure> {
    let order = if round % 4 == 3 { round - 3 } else { round };
    match store.claim(format!("order-{order}")).wait()? {
        Claim::Acquired(lease) if round % 10 == 9 => lease.release().wait()?,
        Claim::Acquired(lease) => lease.complete("charged").wait()?,
        Claim::Completed(_) | Claim::InProgress(_) => {}
    }
    Ok(())
}

fn open(path: &Path) -> onlyonce::Result<Store> {
    Store::builder().window(Duration::from_secs(600)).open(path)
}

fn main() -> Result<(), Failure> {
    let mut args = std::env::args().skip(1);
    let address: SocketAddr = args.next().as_deref().unwrap_or("127.0.0.1:9184").parse()?;
    let scratch = tempfile::tempdir()?;
    let path = args.next().map_or_else(|| scratch.path().join("store"), Into::into);
    // Before the store is opened: it looks for a recorder then.
    recorder()?.with_http_listener(address).install()?;
    let store = open(&path)?;
    println!("http://{address}/metrics has the figures of {}", path.display());
    for round in 0.. {
        work(&store, round)?;
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> impl Iterator<Item = &str> {
        let is_word = |c: char| c.is_ascii_lowercase() || c == '_';
        text.split(move |c| !is_word(c)).filter(|word| word.starts_with("onlyonce_"))
    }

    #[test]
    fn every_figure_that_an_alert_looks_at_is_served() {
        let handle = recorder().unwrap().install_recorder().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let store = open(&dir.path().join("store")).unwrap();
        for round in 0..40 {
            work(&store, round).unwrap();
        }
        store.close().wait().unwrap();
        let served = handle.render();
        let alerts = include_str!("../docs/alerts.yml");
        let mut seen = 0;
        for name in names(alerts) {
            seen += 1;
            assert!(names(&served).any(|served| served == name), "{name} is not served:\n{served}");
        }
        assert!(seen >= 12, "the test has lost its eyes: it saw {seen} names");
        assert!(served.contains(r#"outcome="duplicate"} 1"#), "the duplicates are counted:\n{served}");
        let page = include_str!("../docs/metrics.md");
        for alert in alerts.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")) {
            assert!(page.contains(&format!("| `{alert}` |")), "{alert} has no reason in docs/metrics.md");
        }
    }
}
