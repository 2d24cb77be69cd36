//! Exports the metrics of a store to Prometheus.
//!
//! ```text
//! cargo run --release --features metrics --example prometheus [address] [new-directory]
//! curl http://127.0.0.1:9184/metrics
//! ```
//!
//! It processes orders, some twice and some with failures, until it is killed. A service needs [`recorder`] only.

#![allow(clippy::print_stdout, reason = "an example prints its result")]

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder};
use onlyonce::{Claim, Store};

type Failure = Box<dyn std::error::Error>;

/// In seconds. A write to memory takes ten microseconds, a write to a busy disk a tenth of a second.
const DURATIONS: [f64; 12] = [0.000_01, 0.000_03, 0.000_1, 0.000_3, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 10.0];
const COUNTS: [f64; 9] = [1.0, 2.0, 4.0, 8.0, 16.0, 64.0, 256.0, 1_024.0, 4_096.0];

/// A recorder with Prometheus names, which include units, and histogram buckets that fit a store.
fn recorder() -> Result<PrometheusBuilder, BuildError> {
    PrometheusBuilder::new()
        .with_recommended_naming(true)
        .set_buckets_for_metric(Matcher::Suffix("duration".to_owned()), &DURATIONS)?
        .set_buckets_for_metric(Matcher::Suffix("keys".to_owned()), &COUNTS)?
        .set_buckets_for_metric(Matcher::Suffix("attempt".to_owned()), &COUNTS)
}

/// One round of work: every fourth order is a duplicate, and every tenth attempt fails.
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
    // Install it first: the store looks for a recorder when it is opened.
    recorder()?.with_http_listener(address).install()?;
    let store = open(&path)?;
    println!("http://{address}/metrics serves the metrics of {}", path.display());
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
    fn every_metric_that_an_alert_uses_is_exported() {
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
            assert!(names(&served).any(|served| served == name), "{name} is not exported:\n{served}");
        }
        assert!(seen >= 12, "only {seen} names were found in the alerts");
        assert!(served.contains(r#"outcome="duplicate"} 1"#), "the duplicates are counted:\n{served}");
        let page = include_str!("../docs/metrics.md");
        for alert in alerts.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")) {
            assert!(page.contains(&format!("| `{alert}` |")), "docs/metrics.md does not explain {alert}");
        }
    }
}
