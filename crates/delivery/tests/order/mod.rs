//! A delivery that records the answers to it.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use onlyonce_core::Key;
use onlyonce_delivery::{Delivery, KeyOrigin};

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    Ack,
    RetryAfter(Duration),
    Reject(String),
}

#[derive(Debug)]
pub(crate) struct Order {
    id: &'static str,
    origin: KeyOrigin,
    fails_answers: bool,
    reject_time: Duration,
    answers: Arc<Mutex<Vec<Answer>>>,
}

#[derive(Debug, thiserror::Error)]
#[error("connection lost")]
pub(crate) struct ConnectionLost;

impl Order {
    pub(crate) fn new(id: &'static str) -> Self {
        let (origin, reject_time) = (KeyOrigin::Id, Duration::ZERO);
        Self { id, origin, fails_answers: false, reject_time, answers: Arc::default() }
    }

    pub(crate) fn origin(self, origin: KeyOrigin) -> Self {
        Self { origin, ..self }
    }

    /// The queue takes no answer.
    pub(crate) fn failing_answers(self) -> Self {
        Self { fails_answers: true, ..self }
    }

    pub(crate) fn slow_to_reject(self, reject_time: Duration) -> Self {
        Self { reject_time, ..self }
    }

    pub(crate) fn answers(&self) -> Arc<Mutex<Vec<Answer>>> {
        Arc::clone(&self.answers)
    }

    fn answer(self, answer: Answer) -> Result<(), ConnectionLost> {
        if self.fails_answers {
            return Err(ConnectionLost);
        }
        self.answers.lock().unwrap().push(answer);
        Ok(())
    }
}

impl Delivery for Order {
    type Error = ConnectionLost;

    fn key(&self) -> Key<'_> {
        Key::from(self.id)
    }

    fn key_origin(&self) -> KeyOrigin {
        self.origin
    }

    fn id_location(&self) -> String {
        "header `id` of topic `orders`".to_owned()
    }

    fn payload(&self) -> &[u8] {
        self.id.as_bytes()
    }

    async fn ack(self) -> Result<(), ConnectionLost> {
        self.answer(Answer::Ack)
    }

    async fn retry_after(self, delay: Duration) -> Result<(), ConnectionLost> {
        self.answer(Answer::RetryAfter(delay))
    }

    async fn reject(self, reason: &str) -> Result<(), ConnectionLost> {
        tokio::time::sleep(self.reject_time).await;
        self.answer(Answer::Reject(reason.to_owned()))
    }
}
