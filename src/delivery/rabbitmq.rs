//! Deliveries of a RabbitMQ queue. Behind the feature `rabbitmq`.
//!
//! `docs/brokers/rabbitmq.md` says which duplicates a queue makes, which key to choose, and what is not done here.

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

use super::message::{Delivery, KeyOrigin, key_of, reason_line};
use super::rabbitmq_copy::copied;
use super::setting::SettingError;
use crate::clock::millis;
use crate::key::Key;

pub use super::rabbitmq_copy::DEAD_WHY;

/// The shortest stay in a retry queue, and the longest: two to the 6th and to the 24th, in milliseconds.
const STAYS_MS: std::ops::RangeInclusive<u64> = 64..=16_777_216;

/// Why the broker did not take an answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// What the client or the broker says.
    #[error(transparent)]
    Broker(#[from] lapin::Error),
    /// The channel of the delivery is closed. The broker delivers again what was not acknowledged by then.
    #[error("the channel is closed: the broker delivers again what was not acknowledged")]
    Closed,
    /// A name of more than 255 bytes, which is the most that the protocol has room for.
    #[error("the queue name {name} is longer than 255 bytes")]
    NameTooLong {
        /// The name.
        name: String,
    },
    /// A setting that does not fit.
    #[error(transparent)]
    Setting(#[from] SettingError),
    /// The copy for the retry queue, or for the dead letters, was refused. The delivery comes back at once.
    #[error("the broker did not confirm the copy in queue {queue}: see that the queue is there and has room")]
    Unconfirmed {
        /// The queue of the copy.
        queue: String,
    },
}

/// Reads a queue. Made by a [`Builder`].
pub struct Consumer {
    queue: Arc<Queue>,
    deliveries: lapin::Consumer,
}

struct Queue {
    name: String,
    channel: Channel,
    retries: Retries,
    dead: Option<String>,
}

/// The settings of a [`Consumer`], all of which have a default. Made by [`Consumer::builder`].
#[must_use = "call `build` to get the consumer"]
pub struct Builder {
    queue: Queue,
    prefetch: u16,
}

impl Builder {
    /// How many deliveries there are at most that are not answered yet, 100 by default, from 1.
    pub fn prefetch(mut self, deliveries: u16) -> Self {
        self.prefetch = deliveries;
        self
    }

    /// Where deliveries stay until they come back, [`Retries::Queues`] by default.
    pub fn retries(mut self, retries: Retries) -> Self {
        self.queue.retries = retries;
        self
    }

    /// The queue for dead letters: a rejected message is copied there with its reason in the header [`DEAD_WHY`], confirmed, and
    /// then acknowledged. Without one, it is rejected, and the broker passes it to the dead letters that the queue was declared
    /// with, which have no room for the reason; **a queue without them loses it**.
    pub fn dead_letters(mut self, queue: &str) -> Self {
        self.queue.dead = Some(queue.to_owned());
        self
    }

    /// The consumer. Takes the channel for itself and turns its publisher confirms on.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] for a prefetch of none, a wait in the process of none, or dead letters that go to the queue itself.
    /// Otherwise what the broker says.
    pub async fn build(self) -> Result<Consumer, Error> {
        let Self { queue, prefetch } = self;
        SettingError::unless(!queue.name.is_empty(), "queue", "empty", "a name")?;
        SettingError::unless(prefetch > 0, "prefetch", prefetch, "at least 1: 0 would be no limit")?;
        let is_wait = queue.retries != Retries::InProcess(Duration::ZERO);
        SettingError::unless(is_wait, "retries", "InProcess(0 s)", "a time longer than none")?;
        if let Some(dead) = &queue.dead {
            let accepted = !dead.is_empty() && *dead != queue.name;
            SettingError::unless(
                accepted,
                "dead_letters",
                format!("{dead:?}"),
                "another queue than that of the consumer",
            )?;
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

/// Where a delivery is until it comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retries {
    /// In a queue of its own for each power of two milliseconds, up to 4.6 hours, named `QUEUE.retry.MS` and declared
    /// at need: a copy is put there and confirmed, and only then the delivery acknowledged. It comes back at most twice
    /// as late as was asked for.
    Queues,
    /// In this process, unacknowledged, for so long at most; then the broker delivers it again. Needs no other queue,
    /// and takes a place of the prefetch meanwhile. Not longer than the broker's `consumer_timeout`, which is half an
    /// hour.
    InProcess(Duration),
}

impl Consumer {
    /// Declares a durable queue whose rejected messages go to a durable queue with `.dead` behind its name. For whoever
    /// has not set them up otherwise: a queue without dead letters loses what is rejected.
    ///
    /// # Errors
    ///
    /// What the broker says, such as that the queue is there with other arguments.
    pub async fn declare(channel: &Channel, queue: &str) -> Result<(), Error> {
        let dead = format!("{queue}.dead");
        channel.queue_declare(short(&dead)?, QueueDeclareOptions::durable(), FieldTable::default()).await?;
        channel.queue_declare(short(queue)?, QueueDeclareOptions::durable(), back_to(&dead)).await?;
        Ok(())
    }

    /// Reads a queue that is there.
    pub fn builder(channel: Channel, queue: &str) -> Builder {
        let queue = Queue { name: queue.to_owned(), channel, retries: Retries::Queues, dead: None };
        Builder { queue, prefetch: 100 }
    }

    /// The next delivery. Waits for it. `None` when the broker has cancelled the consumer.
    ///
    /// # Errors
    ///
    /// What the broker or the connection says. Make a new channel and consumer then.
    pub async fn next(&mut self) -> Result<Option<Message>, Error> {
        let delivery = poll_fn(|context| Pin::new(&mut self.deliveries).poll_next(context)).await.transpose()?;
        Ok(delivery.map(|delivery| Message { queue: Arc::clone(&self.queue), delivery }))
    }
}

/// A message of a queue. One that is dropped without an answer comes back when its channel closes.
pub struct Message {
    queue: Arc<Queue>,
    delivery: lapin::message::Delivery,
}

impl Message {
    /// What the client makes of it: properties, headers, whether it was delivered before.
    #[must_use]
    pub fn delivery(&self) -> &lapin::message::Delivery {
        &self.delivery
    }

    async fn requeue(&self) -> Result<(), Error> {
        taken(self.delivery.nack(BasicNackOptions { requeue: true, ..BasicNackOptions::default() }).await)
    }

    /// Puts a copy into another queue, and acknowledges the delivery when that is confirmed.
    async fn move_to(self, queue: String, why: Option<&str>) -> Result<(), Error> {
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let properties = copied(&self.delivery.properties, why);
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

    /// Its property `message_id`.
    fn key(&self) -> Key<'_> {
        let id = self.delivery.properties.message_id().as_ref().map(|id| id.as_str().as_bytes());
        key_of(id, &self.delivery.data, &self.queue.name)
    }

    fn key_origin(&self) -> KeyOrigin {
        KeyOrigin::of(self.delivery.properties.message_id().as_ref().map(|id| id.as_str().as_bytes()))
    }

    fn id_place(&self) -> String {
        format!("property `message_id` of queue `{}`", self.queue.name)
    }

    /// Its property `timestamp`, which has seconds.
    fn timestamp_ms(&self) -> Option<u64> {
        self.delivery.properties.timestamp().map(|seconds| seconds.saturating_mul(1_000))
    }

    fn payload(&self) -> &[u8] {
        &self.delivery.data
    }

    async fn ack(self) -> Result<(), Error> {
        taken(self.delivery.ack(BasicAckOptions::default()).await)
    }

    async fn retry_after(self, wait: Duration) -> Result<(), Error> {
        if let Retries::InProcess(most) = self.queue.retries {
            tokio::time::sleep(wait.min(most)).await;
            return self.requeue().await;
        }
        let Queue { name, channel, .. } = &*self.queue;
        let stay_ms = stay_ms(wait);
        let retries = format!("{name}.retry.{stay_ms}");
        let mut arguments = back_to(name);
        arguments.insert("x-message-ttl".into(), AMQPValue::LongLongInt(i64::try_from(stay_ms).unwrap_or(i64::MAX)));
        // Each time, so that a queue that somebody has deleted is there again.
        channel.queue_declare(short(&retries)?, QueueDeclareOptions::durable(), arguments).await?;
        self.move_to(retries, None).await
    }

    /// To the queue that was set for dead letters, with the reason; else to those that the queue was declared with.
    async fn reject(self, why: &str) -> Result<(), Error> {
        match self.queue.dead.clone() {
            Some(dead) => self.move_to(dead, Some(&reason_line(why))).await,
            None => taken(self.delivery.reject(BasicRejectOptions { requeue: false }).await),
        }
    }
}

/// Arguments of a queue whose dead letters go to another queue, through no exchange that others may have bound to.
fn back_to(queue: &str) -> FieldTable {
    let mut arguments = FieldTable::default();
    arguments.insert("x-dead-letter-exchange".into(), AMQPValue::LongString("".into()));
    arguments.insert("x-dead-letter-routing-key".into(), AMQPValue::LongString(queue.into()));
    arguments
}

/// As long as was asked for, or up to twice as long. All messages of a queue stay as long, so that none waits behind
/// another.
fn stay_ms(wait: Duration) -> u64 {
    millis(wait).clamp(*STAYS_MS.start(), *STAYS_MS.end()).next_power_of_two()
}

fn short(name: &str) -> Result<ShortString, Error> {
    ShortString::try_new(name).map_err(|_| Error::NameTooLong { name: name.to_owned() })
}

fn taken(answer: lapin::Result<bool>) -> Result<(), Error> {
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
    fn a_stay_is_as_long_as_was_asked_for_or_up_to_twice_as_long() {
        let ms = |wait_ms| stay_ms(Duration::from_millis(wait_ms));
        assert_eq!([0, 64, 65, 1_000, 1_024, 300_000].map(ms), [64, 64, 128, 1_024, 1_024, 524_288]);
        assert_eq!(stay_ms(Duration::MAX), 16_777_216);
    }

    #[test]
    fn a_name_that_the_protocol_has_no_room_for_is_an_error() {
        assert_eq!(short(&"q".repeat(255)).unwrap().as_str().len(), 255);
        assert!(matches!(short(&"q".repeat(256)), Err(Error::NameTooLong { .. })));
    }
}
