//! A chunk: the keys of one seal, completed or released, in the order in which a run wants them.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::page::{Flushable, Page};
use crate::bucket::seal::{Row, Rows};
use crate::bucket::window::Slice;
use crate::clock::Now;
use crate::entry::is_live;
use crate::error::Result;

/// The pages that a seal took out of the hot table, and what counts of them.
pub(super) struct Chunk {
    /// A page for each stripe that had something to seal, in the order of their digests.
    pages: Vec<Arc<Page>>,
    now: Now,
    window_ms: u64,
    bucket_ms: u64,
    slices: BTreeMap<Slice, usize>,
}

impl Chunk {
    pub(super) fn new(pages: Vec<Arc<Page>>, now: Now, window_ms: u64, bucket_ms: u64) -> Self {
        let mut chunk = Self { pages, now, window_ms, bucket_ms, slices: BTreeMap::new() };
        let mut slices: BTreeMap<Slice, usize> = BTreeMap::new();
        for live in chunk.pages.iter().flat_map(|page| chunk.live(page)) {
            *slices.entry(chunk.slice(live)).or_default() += 1;
        }
        chunk.slices = slices;
        chunk
    }

    pub(super) fn len(&self) -> usize {
        self.slices.values().sum()
    }

    fn live<'a>(&self, page: &'a Page) -> impl Iterator<Item = Flushable<'a>> {
        let (now, window_ms) = (self.now, self.window_ms);
        page.flushable().filter(move |key| is_live(key.time_ms(), now, window_ms))
    }

    fn slice(&self, key: Flushable<'_>) -> Slice {
        Slice::containing(key.time_ms(), self.bucket_ms)
    }
}

impl Rows for Chunk {
    fn slices(&self) -> Vec<(Slice, usize)> {
        self.slices.iter().map(|(slice, keys)| (*slice, *keys)).collect()
    }

    fn visit(&self, slice: Slice, mut visit: impl FnMut(Row<'_>) -> Result<()>) -> Result<()> {
        let mut here: Vec<(u64, Flushable<'_>)> = Vec::new();
        // A stripe holds the digests between two bounds, so that sorting each by itself sorts them all.
        for page in &self.pages {
            here.clear();
            here.extend(self.live(page).filter(|key| self.slice(*key) == slice).map(|key| (key.digest(), key)));
            here.sort_unstable_by(|(a_digest, a), (b_digest, b)| {
                a_digest.cmp(b_digest).then_with(|| a.key().cmp(b.key()))
            });
            for (digest, key) in &here {
                let entry = &key.entry().ok_or_else(|| key.is_not())?;
                visit(Row { digest: *digest, key: key.key(), entry })?;
            }
        }
        Ok(())
    }
}
