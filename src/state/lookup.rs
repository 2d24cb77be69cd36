//! Looking keys up: what the disk knows, what the hot table has, and which of the two counts.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::answer::{Answer, HeldKey, payload_mismatch};
use super::engine::Engine;
use super::hot_table::Stripe;
use super::request::{Asked, Request};
use super::transition::{self, Found, Standing};
use crate::bucket::set::{Probe, look_up};
use crate::clock::Now;
use crate::entry::{Done, Entry, Processing};
use crate::error::Result;

/// What the disk knows of a request's keys, and as of which seal.
pub(super) struct OnDisk {
    seals: u64,
    done: HashMap<usize, Done>,
}

impl Engine {
    /// What the disk knows of the keys.
    pub(super) fn on_disk<'a>(&self, asked: impl Iterator<Item = Asked<'a>>) -> Result<OnDisk> {
        // Before anything is looked at: what changes from here on is noticed.
        let seals = self.seals.load(Ordering::Acquire);
        let view = self.buckets.view();
        let mut checks = 0;
        let mut probes = Vec::new();
        for asked in asked {
            checks += 1;
            let slots = view.candidates(asked.digest);
            // Also where the hot table has the key now: a seal may be about to remove it.
            if slots != 0 {
                probes.push(Probe { place: asked.place, digest: asked.digest, key: asked.key, slots });
            }
        }
        self.counters.filter_checks.add(checks);
        let mut done = HashMap::new();
        if !probes.is_empty() {
            look_up(&self.db, &view, &probes, |place, _, found: Done| {
                // A key that was completed, forgotten and completed again may lie in two buckets.
                let newer = done.get(&place).is_none_or(|other: &Done| other.token < found.token);
                if newer {
                    done.insert(place, found);
                }
            })?;
            self.counters.filter_hits.add(probes.len() as u64);
            self.counters.filter_false_positives.add(probes.len().saturating_sub(done.len()) as u64);
        }
        Ok(OnDisk { seals, done })
    }

    /// Calls `decide` with the key's locked stripe and what is stored of it, which is the truth as long as the
    /// stripe is locked.
    pub(super) fn decide<R>(
        &self,
        asked: Asked<'_>,
        on_disk: &OnDisk,
        decide: impl FnOnce(&mut Stripe<'_>, Option<Entry>) -> R,
    ) -> Result<R> {
        let mut again;
        let mut on_disk = on_disk;
        loop {
            let mut stripe = self.hot.stripe(asked.digest);
            let hot = stripe.get(asked.digest, asked.key).cloned();
            if hot.is_some() || self.seals.load(Ordering::Acquire) == on_disk.seals {
                let stored = hot.or_else(|| on_disk.done.get(&asked.place).cloned().map(Entry::Completed));
                return Ok(decide(&mut stripe, stored));
            }
            // The key may have been completed and sealed since the disk was asked. Ask again.
            drop(stripe);
            again = self.on_disk(std::iter::once(asked))?;
            on_disk = &again;
        }
    }

    /// What a claim of each key would find. Changes nothing.
    pub(crate) fn check(&self, request: &Request) -> Result<Vec<Result<Answer>>> {
        let now = self.now();
        let on_disk = self.on_disk(request.iter())?;
        request
            .iter()
            .map(|asked| {
                self.decide(asked, &on_disk, |_, stored| {
                    match transition::find(stored.as_ref(), asked.payload, now, self.policy) {
                        Found::Available { .. } => Ok(Answer::New),
                        Found::InProgress { retry_after_ms, attempt } => {
                            Ok(Answer::InProgress { retry_after_ms, attempt })
                        }
                        Found::Completed(done) => Ok(Answer::Completed(done.clone())),
                        Found::PayloadMismatch => Err(payload_mismatch(asked)),
                    }
                })
            })
            .collect()
    }

    /// What is stored of a key, as long as it counts.
    pub(crate) fn get(&self, request: &Request) -> Result<Vec<Option<Entry>>> {
        let now = self.now();
        let on_disk = self.on_disk(request.iter())?;
        request
            .iter()
            .map(|asked| {
                self.decide(asked, &on_disk, |_, stored| {
                    stored.filter(|entry| match entry {
                        Entry::Completed(done) => done.is_live(now, self.policy.window_ms),
                        Entry::Processing(processing) => self.standing_at(processing, now) != Standing::Forgotten,
                    })
                })
            })
            .collect()
    }

    /// How a key that is being processed stands.
    pub(crate) fn standing(&self, processing: &Processing) -> Standing {
        self.standing_at(processing, self.now())
    }

    pub(super) fn standing_at(&self, processing: &Processing, now: Now) -> Standing {
        transition::standing(processing, now, self.policy)
    }

    /// The keys that wait for a decision. Visits the whole hot table.
    pub(crate) fn held(&self) -> Result<Vec<HeldKey>> {
        self.ready()?;
        let now = self.now();
        let mut held = Vec::new();
        for stripe in self.hot.stripes() {
            for slot in stripe.iter() {
                if let Entry::Processing(processing) = &slot.entry
                    && let Standing::Held(prior) = self.standing_at(processing, now)
                {
                    held.push(HeldKey { key: Arc::clone(&slot.key), processing: processing.clone(), prior });
                }
            }
        }
        held.sort_by_key(|held: &HeldKey| held.processing.token);
        Ok(held)
    }
}
