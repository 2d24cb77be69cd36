//! moka: a concurrent cache in memory. It loses everything at a restart.

use std::time::Duration;

use anyhow::Result;
use moka::sync::Cache;

use crate::keys::Key;
use crate::subject::{Setup, Subject};

pub struct Moka {
    cache: Cache<Key, Box<[u8]>>,
}

impl Moka {
    pub fn new(setup: &Setup) -> Self {
        let cache = Cache::builder()
            .max_capacity(setup.keys * 2 + 1_000_000)
            .time_to_live(Duration::from_secs(24 * 60 * 60))
            .build();
        Self { cache }
    }
}

impl Subject for Moka {
    fn insert(&self, keys: &[Key], result: &[u8]) -> Result<usize> {
        let fresh = |key: &&Key| self.cache.entry(**key).or_insert_with(|| result.into()).is_fresh();
        Ok(keys.iter().filter(fresh).count())
    }

    fn check(&self, keys: &[Key]) -> Result<usize> {
        Ok(keys.iter().filter(|key| self.cache.get(*key).is_some()).count())
    }

    fn finish_background_work(&self) -> Result<()> {
        self.cache.run_pending_tasks();
        Ok(())
    }
}
