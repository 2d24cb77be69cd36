//! Exactly-once processing of deliveries from at-least-once queues: the crate `onlyonce-delivery` and its adapters.

#[doc(inline)]
pub use onlyonce_delivery::*;
#[cfg(feature = "kafka")]
#[doc(inline)]
pub use onlyonce_kafka as kafka;
#[cfg(feature = "nats")]
#[doc(inline)]
pub use onlyonce_nats as nats;
#[cfg(feature = "rabbitmq")]
#[doc(inline)]
pub use onlyonce_rabbitmq as rabbitmq;
#[cfg(feature = "redis-streams")]
#[doc(inline)]
pub use onlyonce_redis_streams as redis_streams;
#[cfg(feature = "sqs")]
#[doc(inline)]
pub use onlyonce_sqs as sqs;
