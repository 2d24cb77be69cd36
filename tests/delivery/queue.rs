//! A queue in memory that redelivers a message until it is acknowledged or rejected.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use onlyonce::delivery::{Delivery, KeyOrigin};
use onlyonce::{Key, Timestamp};

#[derive(Clone, Default)]
pub(crate) struct Queue(Arc<Mutex<Messages>>);

#[derive(Default)]
pub(crate) struct Messages {
    pub(crate) ready: VecDeque<Message>,
    /// With the requested delay.
    pub(crate) delayed: Vec<(Message, Duration)>,
    pub(crate) acknowledged: Vec<Message>,
    /// With the reason.
    pub(crate) dead: Vec<(Message, String)>,
    /// The number of answers that fail from now on.
    failing_answers: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    id: String,
    body: String,
}

pub(crate) struct QueueDelivery {
    queue: Queue,
    /// `None` after an answer.
    message: Option<Message>,
    key: Key<'static>,
    body: String,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("connection lost")]
pub(crate) struct ConnectionLost;

impl Queue {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Messages> {
        self.0.lock().unwrap()
    }

    pub(crate) fn send(&self, id: &str) {
        self.lock().ready.push_back(Message { id: id.to_owned(), body: format!("body of {id}") });
    }

    pub(crate) fn try_next(&self) -> Option<QueueDelivery> {
        let message = self.lock().ready.pop_front()?;
        let (key, body) = (Key::from(message.id.as_str()).into_owned(), message.body.clone());
        Some(QueueDelivery { queue: self.clone(), key, body, message: Some(message) })
    }

    pub(crate) fn next(&self) -> QueueDelivery {
        self.try_next().expect("the queue has no message")
    }

    /// Makes the delayed messages ready, and returns their delays.
    pub(crate) fn redeliver(&self) -> Vec<Duration> {
        let mut messages = self.lock();
        let (delayed, delays): (Vec<_>, Vec<_>) = std::mem::take(&mut messages.delayed).into_iter().unzip();
        messages.ready.extend(delayed);
        delays
    }

    /// Makes the dead letters ready, and returns their reasons.
    pub(crate) fn redrive(&self) -> Vec<String> {
        let mut messages = self.lock();
        let (dead, reasons): (Vec<_>, Vec<_>) = std::mem::take(&mut messages.dead).into_iter().unzip();
        messages.ready.extend(dead);
        reasons
    }

    pub(crate) fn acknowledged(&self) -> usize {
        self.lock().acknowledged.len()
    }

    pub(crate) fn fail_answers(&self, answers: u32) {
        self.lock().failing_answers = answers;
    }
}

impl QueueDelivery {
    fn answer(mut self, apply: impl FnOnce(&mut Messages, Message)) -> Result<(), ConnectionLost> {
        let queue = self.queue.clone();
        let mut messages = queue.lock();
        if messages.failing_answers > 0 {
            messages.failing_answers -= 1;
            drop(messages);
            return Err(ConnectionLost);
        }
        apply(&mut messages, self.message.take().unwrap());
        Ok(())
    }
}

/// An unanswered delivery is redelivered at once.
impl Drop for QueueDelivery {
    fn drop(&mut self) {
        if let Some(message) = self.message.take() {
            self.queue.lock().ready.push_back(message);
        }
    }
}

impl Delivery for QueueDelivery {
    type Error = ConnectionLost;

    fn key(&self) -> Key<'_> {
        self.key.clone()
    }

    fn payload(&self) -> &[u8] {
        self.body.as_bytes()
    }

    async fn ack(self) -> Result<(), ConnectionLost> {
        self.answer(|messages, message| messages.acknowledged.push(message))
    }

    async fn retry_after(self, delay: Duration) -> Result<(), ConnectionLost> {
        self.answer(|messages, message| messages.delayed.push((message, delay)))
    }

    async fn reject(self, reason: &str) -> Result<(), ConnectionLost> {
        self.answer(|messages, message| messages.dead.push((message, reason.to_owned())))
    }
}

/// A delivery of a queue with timestamps.
pub(crate) struct WithTimestamp(pub(crate) QueueDelivery, pub(crate) Option<Timestamp>);

impl Delivery for WithTimestamp {
    type Error = ConnectionLost;

    fn key(&self) -> Key<'_> {
        self.0.key()
    }

    fn timestamp(&self) -> Option<Timestamp> {
        self.1
    }

    fn payload(&self) -> &[u8] {
        self.0.payload()
    }

    async fn ack(self) -> Result<(), ConnectionLost> {
        self.0.ack().await
    }

    async fn retry_after(self, delay: Duration) -> Result<(), ConnectionLost> {
        self.0.retry_after(delay).await
    }

    async fn reject(self, reason: &str) -> Result<(), ConnectionLost> {
        self.0.reject(reason).await
    }
}

/// A delivery without an id, keyed by the digest of its body or by its position in the queue.
pub(crate) struct WithoutId(pub(crate) QueueDelivery, pub(crate) KeyOrigin);

impl Delivery for WithoutId {
    type Error = ConnectionLost;

    fn key(&self) -> Key<'_> {
        match self.1 {
            KeyOrigin::Digest => Key::content(&self.0.body),
            _ => self.0.key(),
        }
    }

    fn key_origin(&self) -> KeyOrigin {
        self.1
    }

    fn id_location(&self) -> String {
        "header `id` of topic `orders`".to_owned()
    }

    fn payload(&self) -> &[u8] {
        self.0.payload()
    }

    async fn ack(self) -> Result<(), ConnectionLost> {
        self.0.ack().await
    }

    async fn retry_after(self, delay: Duration) -> Result<(), ConnectionLost> {
        self.0.retry_after(delay).await
    }

    async fn reject(self, reason: &str) -> Result<(), ConnectionLost> {
        self.0.reject(reason).await
    }
}
