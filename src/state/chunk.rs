//! A chunk: the completed keys of one seal, in the order in which a run wants them.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::page::{DoneKey, Page};
use crate::bucket::seal::{Row, Rows};
use crate::bucket::window::Slice;
use crate::clock::Now;
use crate::error::Result;

/// The pages that a seal took out of the hot table, those of each stripe together, and what counts of them.
pub(super) struct Chunk {
    /// Stripes in the order of their digests.
    stripes: Vec<Vec<Arc<Page>>>,
    now: Now,
    window_ms: u64,
    bucket_ms: u64,
    slices: BTreeMap<Slice, usize>,
}

impl Chunk {
    pub(super) fn new(stripes: Vec<Vec<Arc<Page>>>, now: Now, window_ms: u64, bucket_ms: u64) -> Self {
        let mut chunk = Self { stripes, now, window_ms, bucket_ms, slices: BTreeMap::new() };
        let mut slices: BTreeMap<Slice, usize> = BTreeMap::new();
        for live in chunk.stripes.iter().flatten().flat_map(|page| chunk.live(page)) {
            *slices.entry(chunk.slice(&live)).or_default() += 1;
        }
        chunk.slices = slices;
        chunk
    }

    pub(super) fn len(&self) -> usize {
        self.slices.values().sum()
    }

    fn live<'a>(&self, page: &'a Page) -> impl Iterator<Item = DoneKey<'a>> {
        let (now, window_ms) = (self.now, self.window_ms);
        page.completed().filter(move |completed| completed.done.is_live(now, window_ms))
    }

    fn slice(&self, completed: &DoneKey<'_>) -> Slice {
        Slice::containing(completed.done.completed_ms, self.bucket_ms)
    }
}

impl Rows for Chunk {
    fn slices(&self) -> Vec<(Slice, usize)> {
        self.slices.iter().map(|(slice, keys)| (*slice, *keys)).collect()
    }

    fn visit(&self, slice: Slice, mut visit: impl FnMut(Row<'_>) -> Result<()>) -> Result<()> {
        let mut here: Vec<DoneKey<'_>> = Vec::new();
        // A stripe holds the digests between two bounds, so that sorting each by itself sorts them all.
        for pages in &self.stripes {
            here.clear();
            here.extend(
                pages.iter().flat_map(|page| self.live(page)).filter(|completed| self.slice(completed) == slice),
            );
            // Where a seal has failed, a key may have been completed again since: the last one counts.
            here.sort_unstable_by(|a, b| {
                (a.digest, a.key).cmp(&(b.digest, b.key)).then(b.done.token.cmp(&a.done.token))
            });
            here.dedup_by(|later, first| later.digest == first.digest && later.key == first.key);
            for DoneKey { digest, key, done } in &here {
                visit(Row { digest: *digest, key, done })?;
            }
        }
        Ok(())
    }
}
