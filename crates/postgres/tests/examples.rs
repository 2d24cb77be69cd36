//! The examples do what they say. `tests/postgres/run` builds them first.

mod common;

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{client, database, drop_schema};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_postgres::Config;
use tokio_postgres::config::Host;

/// The command of an example, with its database.
fn example(name: &str, config: &Config) -> Command {
    let tests = std::env::current_exe().unwrap();
    let path: PathBuf = tests.parent().and_then(|deps| deps.parent()).unwrap().join("examples").join(name);
    assert!(path.exists(), "{name} is not built: run tests/postgres/run");
    let Some(Host::Unix(dir)) = config.get_hosts().first() else { panic!("the server has no Unix socket") };
    let (user, database) = (config.get_user().unwrap(), config.get_dbname().unwrap());
    let mut command = Command::new(path);
    command.env("DATABASE", format!("postgres:///{database}?user={user}&host={}", dir.display()));
    command
}

/// Runs an example twice, and returns what the runs print.
fn runs(name: &str, config: &Config) -> [String; 2] {
    [["order-1", "order-2"], ["order-2", "order-3"]].map(|orders| {
        let output = example(name, config).args(orders).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{name}: {text}{}", String::from_utf8_lossy(&output.stderr));
        text
    })
}

#[tokio::test]
async fn each_order_of_the_examples_is_charged_once() {
    let Some(config) = database() else { return };
    let names = [
        "charges",
        #[cfg(feature = "sqlx")]
        "charges_sqlx",
    ];
    for name in names {
        let [first, second] = runs(name, &config);
        assert!(first.contains("order-1: receipt") && first.contains("order-2: receipt"), "{name}: {first}");
        assert!(second.contains("order-2: was charged before, receipt"), "{name}: {second}");
        assert!(second.contains("order-3: receipt"), "{name}: {second}");
        let count = format!("SELECT count(*) FROM {name}_example.charges");
        assert_eq!(client(&config).await.query_one(&count, &[]).await.unwrap().get::<_, i64>(0), 3, "{name}");
        drop_schema(&config, &format!("{name}_example")).await;
    }
}

struct Replica {
    process: Child,
    address: String,
}

impl Replica {
    fn start(config: &Config) -> Self {
        let mut process = example("http_replicas", config).arg("127.0.0.1:0").stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on ").unwrap_or_else(|| panic!("{line}")).to_owned();
        Self { process, address }
    }

    /// The head and the body of the response about an order.
    async fn charge(&self, order: &str) -> (String, String) {
        timeout(Duration::from_secs(60), self.send(order)).await.unwrap_or_else(|_| panic!("{order} has no response"))
    }

    async fn send(&self, order: &str) -> (String, String) {
        let mut stream = TcpStream::connect(&self.address).await.unwrap();
        let request = format!(
            "POST /charges HTTP/1.1\r\nHost: localhost\r\nIdempotency-Key: \"{order}\"\r\nContent-Length: 4\r\n\
             Connection: close\r\n\r\n1200"
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).await.unwrap();
        let (head, body) = response.split_once("\r\n\r\n").unwrap();
        (head.to_lowercase(), body.to_owned())
    }
}

/// Also after a failed assertion.
impl Drop for Replica {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[tokio::test]
async fn a_retry_at_another_replica_gets_the_first_response() {
    let Some(config) = database() else { return };
    let (first, second) = (Replica::start(&config), Replica::start(&config));
    let (head, body) = first.charge("order-1").await;
    assert!(head.starts_with("http/1.1 200") && !head.contains("idempotent-replayed"), "{head}\n{body}");
    let (head, again) = second.charge("order-1").await;
    assert!(head.starts_with("http/1.1 200") && head.contains("idempotent-replayed: true"), "{head}");
    assert_eq!(body, again);
    // A response does not depend on the replica that stored it.
    drop(first);
    let (head, _) = second.charge("order-1").await;
    assert!(head.contains("idempotent-replayed: true"), "{head}");
    assert!(second.charge("order-2").await.0.starts_with("http/1.1 200"));
    let count = "SELECT count(*) FROM replicas_example.charges";
    assert_eq!(client(&config).await.query_one(count, &[]).await.unwrap().get::<_, i64>(0), 2);
    drop(second);
    drop_schema(&config, "replicas_example").await;
}
