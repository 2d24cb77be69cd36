//! A Kafka broker in memory, in a process that outlives its clients: librdkafka's mock cluster. Prints its address.
//!
//! ```text
//! cargo run --release --features kafka --example kafka_broker
//! ```

#![allow(clippy::print_stdout, reason = "its address is its only output")]

use onlyonce::delivery::kafka::rdkafka::error::KafkaResult;
use onlyonce::delivery::kafka::rdkafka::mocking::MockCluster;

fn main() -> KafkaResult<()> {
    let cluster = MockCluster::new(1)?;
    println!("{}", cluster.bootstrap_servers());
    loop {
        std::thread::park();
    }
}
