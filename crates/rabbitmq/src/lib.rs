//! Deliveries of a RabbitMQ queue, for [`onlyonce_delivery`].
//!
//! Part of [onlyonce](https://docs.rs/onlyonce), which re-exports it as `onlyonce::delivery::rabbitmq` behind the feature
//! `rabbitmq`. `docs/brokers/rabbitmq.md` in its repository describes the duplicates, the choice of the key, and the limits
//! of the adapter.
#![cfg_attr(not(test), warn(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_core::Stream;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicNackOptions, BasicPublishOptions, BasicQosOptions, BasicRejectOptions,
    ConfirmSelectOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, Confirmation};
use onlyonce_core::{Key, Timestamp};
use onlyonce_delivery::{Delivery, KeyOrigin, SettingError, key_of, reason_line};

use crate::properties::copy_properties;

mod properties;

pub use lapin;
pub use properties::REASON_HEADER;

/// Bounds of the TTL of a retry queue, in milliseconds: 2^6 to 2^24.
const RETRY_TTL_MS: std::ops::RangeInclusive<u64> = 64..=16_777_216;

/// Errors of the consumer and of answers.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An error of the client or the broker.
    #[error(transparent)]
    Broker(#[from] lapin::Error),
    /// The channel of the delivery is closed. The broker redelivers unacknowledged messages.
    #[error("channel is closed; the broker redelivers unacknowledged messages")]
    Closed,
    /// A queue name of more than 255 bytes, the limit of the protocol.
    #[error("queue name {name} is longer than 255 bytes")]
    NameTooLong {
        /// The name.
        name: String,
    },
    /// An invalid setting.
    #[error(transparent)]
    Setting(#[from] SettingError),
    /// The broker refused the copy for a retry queue or the dead letters. The delivery is redelivered at once.
    #[error("broker did not confirm the copy to queue {queue}; check that the queue exists and is not full")]
    Unconfirmed {
        /// The queue of the copy.
        queue: String,
    },
}

/// Consumes a queue. Made by a [`Builder`].
pub struct Consumer {
    queue: Arc<Queue>,
    deliveries: lapin::Consumer,
}

struct Queue {
    name: String,
    channel: Channel,
    retries: Retries,
    dead_letters: Option<String>,
}

/// Settings of a [`Consumer`], each with a default. Made by [`Consumer::builder`].
#[must_use = "call `build` to get the consumer"]
pub struct Builder {
    queue: Queue,
    prefetch: u16,
}

impl Builder {
    /// The maximum number of unanswered deliveries: 100 by default, at least 1.
    pub fn prefetch(mut self, deliveries: u16) -> Self {
        self.prefetch = deliveries;
        self
    }

    /// Where delayed deliveries wait: [`Retries::Queues`] by default.
    pub fn retries(mut self, retries: Retries) -> Self {
        self.queue.retries = retries;
        self
    }

    /// The queue for dead letters. A rejected message is copied there with the reason in the header [`REASON_HEADER`], and
    /// acknowledged after the broker confirms the copy. Without this setting the broker routes rejected messages to the
    /// dead letter exchange of the queue, without the reason; **a queue without one loses them**.
    pub fn dead_letters(mut self, queue: &str) -> Self {
        self.queue.dead_letters = Some(queue.to_owned());
        self
    }

    /// Builds the consumer, which needs the channel for itself and turns publisher confirms on.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] for a prefetch of 0, a [`Retries::InProcess`] of 0, or dead letters that go to the queue itself.
    /// Otherwise the broker's error.
    pub async fn build(self) -> Result<Consumer, Error> {
        let Self { queue, prefetch } = self;
        SettingError::check(!queue.name.is_empty(), "queue", "empty", "a name")?;
        SettingError::check(prefetch > 0, "prefetch", prefetch, "at least 1: 0 means no limit")?;
        let is_delay = queue.retries != Retries::InProcess(Duration::ZERO);
        SettingError::check(is_delay, "retries", "InProcess(0 s)", "longer than 0")?;
        if let Some(dead) = &queue.dead_letters {
            let is_other = !dead.is_empty() && *dead != queue.name;
            SettingError::check(is_other, "dead_letters", format!("{dead:?}"), "a queue other than the consumed one")?;
            short(dead)?;
        }
        queue.channel.basic_qos(prefetch, BasicQosOptions::default()).await?;
        queue.channel.confirm_select(ConfirmSelectOptions::default()).await?;
        let (tag, options) = (ShortString::default(), BasicConsumeOptions::default());
        let name = short(&queue.name)?;
        let deliveries = queue.channel.basic_consume(name, tag, options, FieldTable::default()).await?;
        Ok(Consumer { queue: Arc::new(queue), deliveries })
    }
}

/// Where delayed deliveries wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Retries {
    /// In retry queues, one per power of two milliseconds up to 4.6 hours, named `QUEUE.retry.MS` and declared on demand.
    /// The delivery is acknowledged after the broker confirms its copy there. The delay is up to twice the requested one.
    Queues,
    /// In this process, unacknowledged, for at most this time; then the broker redelivers. Needs no retry queue, but
    /// occupies the prefetch. Keep it below the broker's `consumer_timeout` of 30 minutes.
    InProcess(Duration),
}

impl Consumer {
    /// Declares a durable queue and a durable dead letter queue `QUEUE.dead` for it. A queue without dead letters loses
    /// rejected messages.
    ///
    /// # Errors
    ///
    /// The broker's error, such as an existing queue with other arguments.
    pub async fn declare(channel: &Channel, queue: &str) -> Result<(), Error> {
        let dead = format!("{queue}.dead");
        channel.queue_declare(short(&dead)?, QueueDeclareOptions::durable(), FieldTable::default()).await?;
        channel.queue_declare(short(queue)?, QueueDeclareOptions::durable(), dead_lettering_to(&dead)).await?;
        Ok(())
    }

    /// Consumes an existing queue.
    pub fn builder(channel: Channel, queue: &str) -> Builder {
        let queue = Queue { name: queue.to_owned(), channel, retries: Retries::Queues, dead_letters: None };
        Builder { queue, prefetch: 100 }
    }

    /// Waits for the next delivery. `None` after the broker has cancelled the consumer.
    ///
    /// # Errors
    ///
    /// Errors of the broker or the connection. Open a new channel and consumer after one.
    pub async fn next(&mut self) -> Result<Option<Message>, Error> {
        let delivery = poll_fn(|context| Pin::new(&mut self.deliveries).poll_next(context)).await.transpose()?;
        Ok(delivery.map(|delivery| Message { queue: Arc::clone(&self.queue), delivery }))
    }
}

/// A message of a queue. If it is dropped without an answer, the broker redelivers it when the channel closes.
pub struct Message {
    queue: Arc<Queue>,
    delivery: lapin::message::Delivery,
}

impl Message {
    /// The client's delivery: properties, headers, redelivered flag.
    #[must_use]
    pub fn delivery(&self) -> &lapin::message::Delivery {
        &self.delivery
    }

    async fn requeue(&self) -> Result<(), Error> {
        check_open(self.delivery.nack(BasicNackOptions { requeue: true, ..BasicNackOptions::default() }).await)
    }

    /// Publishes a copy to another queue, and acknowledges the delivery after the broker confirms the copy.
    async fn move_to(self, queue: String, reason: Option<&str>) -> Result<(), Error> {
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let properties = copy_properties(&self.delivery.properties, reason);
        let channel = &self.queue.channel;
        let confirmed = channel
            .basic_publish(ShortString::default(), short(&queue)?, options, &self.delivery.data, properties)
            .await?
            .await?;
        match confirmed {
            Confirmation::Ack(None) => self.ack().await,
            _ => {
                self.requeue().await?;
                Err(Error::Unconfirmed { queue })
            }
        }
    }
}

impl Delivery for Message {
    type Error = Error;

    /// The property `message_id`.
    fn key(&self) -> Key<'_> {
        let id = self.delivery.properties.message_id().as_ref().map(|id| id.as_str().as_bytes());
        key_of(id, &self.delivery.data, &self.queue.name)
    }

    fn key_origin(&self) -> KeyOrigin {
        KeyOrigin::of(self.delivery.properties.message_id().as_ref().map(|id| id.as_str().as_bytes()))
    }

    fn id_location(&self) -> String {
        format!("property `message_id` of queue `{}`", self.queue.name)
    }

    /// The property `timestamp`, converted from seconds.
    fn timestamp(&self) -> Option<Timestamp> {
        self.delivery.properties.timestamp().map(Timestamp::from_unix_s)
    }

    fn payload(&self) -> &[u8] {
        &self.delivery.data
    }

    async fn ack(self) -> Result<(), Error> {
        check_open(self.delivery.ack(BasicAckOptions::default()).await)
    }

    async fn retry_after(self, delay: Duration) -> Result<(), Error> {
        if let Retries::InProcess(max) = self.queue.retries {
            tokio::time::sleep(delay.min(max)).await;
            return self.requeue().await;
        }
        let Queue { name, channel, .. } = &*self.queue;
        let ttl_ms = retry_ttl_ms(delay);
        let retry_queue = format!("{name}.retry.{ttl_ms}");
        let mut arguments = dead_lettering_to(name);
        arguments.insert("x-message-ttl".into(), AMQPValue::LongLongInt(i64::try_from(ttl_ms).unwrap_or(i64::MAX)));
        // On every retry: an operator may have deleted the queue.
        channel.queue_declare(short(&retry_queue)?, QueueDeclareOptions::durable(), arguments).await?;
        self.move_to(retry_queue, None).await
    }

    /// Copies the message to the configured dead letter queue with the reason; without one, uses the dead letter exchange
    /// of the queue.
    async fn reject(self, reason: &str) -> Result<(), Error> {
        match self.queue.dead_letters.clone() {
            Some(dead) => self.move_to(dead, Some(&reason_line(reason))).await,
            None => check_open(self.delivery.reject(BasicRejectOptions { requeue: false }).await),
        }
    }
}

/// Arguments of a queue whose dead letters go to another queue by the default exchange, to which nothing else can be bound.
fn dead_lettering_to(queue: &str) -> FieldTable {
    let mut arguments = FieldTable::default();
    arguments.insert("x-dead-letter-exchange".into(), AMQPValue::LongString("".into()));
    arguments.insert("x-dead-letter-routing-key".into(), AMQPValue::LongString(queue.into()));
    arguments
}

/// The requested delay or up to twice as long. All messages of a retry queue have the same TTL, so that none waits for
/// another.
fn retry_ttl_ms(delay: Duration) -> u64 {
    let ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
    ms.clamp(*RETRY_TTL_MS.start(), *RETRY_TTL_MS.end()).next_power_of_two()
}

fn short(name: &str) -> Result<ShortString, Error> {
    ShortString::try_new(name).map_err(|_| Error::NameTooLong { name: name.to_owned() })
}

fn check_open(answer: lapin::Result<bool>) -> Result<(), Error> {
    if answer? { Ok(()) } else { Err(Error::Closed) }
}

impl fmt::Debug for Consumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consumer").field("queue", &self.queue.name).finish_non_exhaustive()
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tag = self.delivery.delivery_tag;
        f.debug_struct("Message").field("queue", &self.queue.name).field("tag", &tag).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_retry_ttl_is_the_requested_delay_or_up_to_twice_as_long() {
        let ms = |delay_ms| retry_ttl_ms(Duration::from_millis(delay_ms));
        assert_eq!([0, 64, 65, 1_000, 1_024, 300_000].map(ms), [64, 64, 128, 1_024, 1_024, 524_288]);
        assert_eq!(retry_ttl_ms(Duration::MAX), 16_777_216);
    }

    #[test]
    fn a_queue_name_over_255_bytes_is_an_error() {
        assert_eq!(short(&"q".repeat(255)).unwrap().as_str().len(), 255);
        assert!(matches!(short(&"q".repeat(256)), Err(Error::NameTooLong { .. })));
    }
}
