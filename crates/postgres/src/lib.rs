//! The verbs of [onlyonce](https://docs.rs/onlyonce) on PostgreSQL, for keys that many nodes share.
//!
//! [`PgStore`] is an [`Engine`](onlyonce_core::Engine): the HTTP layer and the delivery processor work over it. [`PgLease`] completes
//! its key in a transaction of the caller, together with the caller's own writes.
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use onlyonce_core::Claim;
//! use onlyonce_postgres::{Durability, PgStore};
//! use tokio_postgres::NoTls;
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let config = "host=localhost user=payments dbname=payments".parse()?;
//! // Accepts a server without a standby, for development.
//! let options = PgStore::builder().durability(Durability::SingleServer);
//! options.migrate(&config, NoTls).await?;
//! let store = options.connect(&config, NoTls).await?;
//! match store.claim_lease("order-4711", Duration::ZERO).await? {
//!     Claim::Acquired(lease) => lease.complete("receipt").await?,
//!     Claim::Completed(first) => println!("duplicate; the first result was {:?}", first.result()),
//!     Claim::InProgress(other) => println!("in progress elsewhere; retry after {:?}", other.retry_after),
//! }
//! # Ok(())
//! # }
//! ```
//!
//! The page `docs/postgres.md` of the repository describes the set-up, durability, failover, sizing, and what is not promised.

#![cfg_attr(docsrs, feature(doc_cfg))]

mod acquire;
mod builder;
mod caller;
mod connection;
mod connector;
mod contended;
mod core;
mod error;
mod failing;
mod finish;
mod in_flight;
mod in_order;
mod keep_alive;
mod kept;
mod lease;
mod maintenance;
mod names;
mod opening;
mod options;
mod queue;
mod reading;
mod relay;
mod renewal;
mod resolve;
mod row;
mod schema;
mod session;
mod side_writes;
mod sql;
#[cfg(feature = "sqlx")]
mod sqlx_client;
mod store;
mod stream_time;
mod waiters;
mod waiting;
mod writing;

pub use builder::PgStoreBuilder;
pub use caller::CallerTransaction;
pub use error::SetupError;
pub use lease::{CompleteError, CompletedIn, PgLease};
pub use options::Durability;
pub use relay::Relayed;
pub use store::PgStore;
/// The client, whose configuration and transactions this crate takes.
pub use tokio_postgres;

/// The examples of the page are compiled.
#[cfg(doctest)]
mod pages {
    #[doc = include_str!("../../../docs/postgres.md")]
    struct Postgres;
}
