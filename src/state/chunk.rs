//! A chunk: the completed keys of one seal, in the order in which a run wants them.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::page::{Completed, Page};
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

    fn live<'a>(&self, page: &'a Page) -> impl Iterator<Item = Completed<'a>> {
        let (now, window_ms) = (self.now, self.window_ms);
        page.completed().filter(move |completed| is_live(completed.completed_ms(), now, window_ms))
    }

    fn slice(&self, completed: Completed<'_>) -> Slice {
        Slice::containing(completed.completed_ms(), self.bucket_ms)
    }
}

impl Rows for Chunk {
    fn slices(&self) -> Vec<(Slice, usize)> {
        self.slices.iter().map(|(slice, keys)| (*slice, *keys)).collect()
    }

    fn visit(&self, slice: Slice, mut visit: impl FnMut(Row<'_>) -> Result<()>) -> Result<()> {
        let mut here: Vec<(u64, Completed<'_>)> = Vec::new();
        // A stripe holds the digests between two bounds, so that sorting each by itself sorts them all.
        for page in &self.pages {
            here.clear();
            here.extend(
                self.live(page)
                    .filter(|completed| self.slice(*completed) == slice)
                    .map(|completed| (completed.digest(), completed)),
            );
            here.sort_unstable_by(|(a_digest, a), (b_digest, b)| {
                a_digest.cmp(b_digest).then_with(|| a.key().cmp(b.key()))
            });
            for (digest, completed) in &here {
                let done = &completed.done().ok_or_else(|| completed.is_not())?;
                visit(Row { digest: *digest, key: completed.key(), done })?;
            }
        }
        Ok(())
    }
}
