//! A subject that answers one key wrong. The benchmark must detect it.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;

use crate::keys::Key;
use crate::subject::Subject;

pub struct Liar {
    inner: Box<dyn Subject>,
    has_lied: AtomicBool,
}

impl Liar {
    pub fn new(inner: Box<dyn Subject>) -> Self {
        Self { inner, has_lied: AtomicBool::new(false) }
    }
}

impl Subject for Liar {
    fn insert(&self, keys: &[Key], result: &[u8]) -> Result<usize> {
        let first = self.inner.insert(keys, result)?;
        // Reports the first new key as a duplicate.
        Ok(if first > 0 && !self.has_lied.swap(true, Ordering::Relaxed) { first - 1 } else { first })
    }

    fn check(&self, keys: &[Key]) -> Result<usize> {
        self.inner.check(keys)
    }

    fn next_bucket(&self) -> Result<()> {
        self.inner.next_bucket()
    }

    fn finish_background_work(&self) -> Result<()> {
        self.inner.finish_background_work()
    }

    fn memory_bytes(&self) -> Option<u64> {
        self.inner.memory_bytes()
    }

    fn bytes_written(&self) -> Result<u64> {
        self.inner.bytes_written()
    }

    fn cpu_s(&self) -> Result<f64> {
        self.inner.cpu_s()
    }

    fn close(self: Box<Self>) -> Result<()> {
        self.inner.close()
    }
}
