//! A Kafka broker in memory, in a process that outlives its clients: librdkafka's mock cluster. Prints its address.
//!
//! ```text
//! cargo run --release --features kafka --example kafka_broker
//! ```

#![allow(clippy::print_stdout, reason = "it has nothing else to say")]

use rdkafka::error::KafkaResult;
use rdkafka::mocking::MockCluster;

fn main() -> KafkaResult<()> {
    let cluster = MockCluster::new(1)?;
    println!("{}", cluster.bootstrap_servers());
    loop {
        std::thread::park();
    }
}
