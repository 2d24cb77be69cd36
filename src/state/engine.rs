//! The engine: the only owner of the order of effects.
//!
//! A claim takes its place in the hot table before its row is written, so that nobody else can; a completion takes
//! effect only when its row is written, so that nobody relies on what a crash would undo. No lock is held while the
//! disk is read or written.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::hot_table::{HotTable, Stripe};
use super::request::{Asked, Request};
use super::sequence::Sequence;
use super::transition::{self, Found, Policy, Standing};
use crate::bucket::recovery::{self, Replayed};
use crate::bucket::set::{BucketSet, Probe, look_up};
use crate::clock::{Now, Timeline};
use crate::codec::{self, Event, RowKind, RowWriter};
use crate::config::{Config, Options};
use crate::entry::{Done, Entry, Holder, Kept, Prior, Processing};
use crate::error::{Error, Result};
use crate::key::{Digester, Fingerprint, Key};
use crate::stats::Counters;
use crate::storage::db::{Db, Tx};
use crate::storage::directory::Directory;
use crate::storage::journal::{OpenRow, RowNumbers};

/// Names in `meta`.
pub(super) const FORMAT: &str = "format";
pub(super) const SECRET: &str = "secret";
pub(super) const SPAN: &str = "span";
pub(super) const TOKENS: &str = "tokens";
pub(super) const HIGH_WATER: &str = "high-water";

/// The share of the memory budget that the filters may take.
const FILTER_SHARE: usize = 2;

/// Bytes of keys and results that one call may bring: a row must fit into RocksDB's 32-bit lengths, with room to spare.
const BATCH_BYTES: usize = 1 << 30;

/// How long a call waits for the keeper before it looks again whether sealing still works.
const BACKLOG_WAIT: Duration = Duration::from_millis(100);

/// What a claim, a check or a record was answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    New,
    InProgress { retry_after_ms: Option<u64>, attempt: u32 },
    Completed(Done),
}

/// The right to work on a key.
#[derive(Debug, Clone)]
pub(crate) struct Grant {
    pub(crate) digest: u64,
    pub(crate) key: Arc<[u8]>,
    pub(crate) token: u64,
    pub(crate) attempt: u32,
    pub(crate) prior: Option<Prior>,
    pub(crate) fingerprint: Option<Fingerprint>,
    pub(crate) until_monotonic_ms: u64,
}

/// What a claim was answered.
#[derive(Debug)]
pub(crate) enum Claimed {
    Acquired(Grant),
    InProgress { retry_after_ms: Option<u64>, attempt: u32 },
    Completed(Done),
}

/// A key that waits for a decision.
pub(crate) struct HeldKey {
    pub(crate) key: Arc<[u8]>,
    pub(crate) processing: Processing,
    pub(crate) prior: Prior,
}

/// Who settles a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Settler {
    /// Its holder, however late, unless somebody has taken over.
    Holder,
    /// An operator, as long as the key is held.
    Operator,
}

/// What becomes of a lease.
pub(crate) enum Settlement {
    /// The work is done.
    Completed(Kept),
    /// The work is not done, and free for the next from then on.
    Open { prior: Prior, not_before_ms: u64 },
}

pub(crate) struct Engine {
    pub(super) config: Config,
    pub(super) policy: Policy,
    pub(super) db: Db,
    pub(super) hot: HotTable,
    pub(super) buckets: BucketSet,
    pub(super) sequence: Sequence,
    pub(super) rows: RowNumbers,
    pub(super) timeline: Timeline,
    pub(super) counters: Counters,
    /// Held while sealed keys change their place, and by whoever must not see them do so. The number of the last
    /// image that a seal wrote at the journal's head.
    pub(super) sealing: Mutex<u64>,
    /// Grows before keys that were sealed leave the hot table: what was found absent there before may now be in a
    /// bucket.
    pub(super) seals: AtomicU64,
    pub(super) backlog: Backlog,
    /// Bytes of rows that were written since the last seal, or found at open.
    pub(super) journal_bytes: AtomicU64,
    /// Whether something was written that is not on the disk yet.
    pub(super) unsynced: AtomicBool,
    digester: Digester,
    poison: OnceLock<String>,
    closed: AtomicBool,
}

/// Where calls wait for room in the hot table.
#[derive(Default)]
pub(super) struct Backlog {
    pub(super) failure: Mutex<Option<String>>,
    pub(super) eased: Condvar,
    /// Told when there is enough to seal.
    pub(super) wake: OnceLock<crossbeam::channel::Sender<()>>,
}

/// What the disk knows of a request's keys, and as of which seal.
struct OnDisk {
    seals: u64,
    done: HashMap<usize, Done>,
}

impl Engine {
    /// Opens the store in `directory`, or creates it, and reads the journal back.
    pub(crate) fn open(directory: Directory, options: &Options) -> Result<Self> {
        let path = directory.root().to_owned();
        let seed = || {
            // Before anything is created; what an existing store adds is checked below.
            let config = options.check(None)?;
            let mut secret = codec::Secret::default();
            getrandom::fill(&mut secret).map_err(|error| Error::io("cannot draw a secret for", &path, &error))?;
            Ok(vec![
                (FORMAT, codec::FORMAT.to_le_bytes().to_vec()),
                (SECRET, secret.to_vec()),
                (SPAN, codec::put_span(config.span)),
                (TOKENS, 1_u64.to_le_bytes().to_vec()),
                (HIGH_WATER, 0_u64.to_le_bytes().to_vec()),
            ])
        };
        let (db, families) = Db::open(directory, options.memory_budget, options.lock_wait, seed)?;

        let format = u32::from_le_bytes(meta(&db, FORMAT)?);
        if format != codec::FORMAT {
            return Err(Error::UnsupportedFormat { path, found: format, supported: codec::FORMAT });
        }
        let secret: codec::Secret = meta(&db, SECRET)?;
        let span = meta::<16>(&db, SPAN)?;
        let span = codec::read_span(&span).ok_or_else(|| corrupt_meta(SPAN))?;
        let tokens = u64::from_le_bytes(meta(&db, TOKENS)?);
        let high_water_ms = u64::from_le_bytes(meta(&db, HIGH_WATER)?);
        let config = options.check(Some(span))?;

        let digester = Digester::new(&secret);
        let hot = HotTable::new();
        let replayed = recovery::replay(&db, |key, event| {
            let digest = digester.digest(key);
            apply(&mut hot.stripe(digest), digest, key, event);
        })?;
        if replayed.last_number >= tokens {
            return Err(Error::Corrupt {
                place: "`tokens` in `meta`".to_owned(),
                detail: format!("the journal has row {} where only {tokens} were reserved", replayed.last_number),
            });
        }
        let timeline = Timeline::new(Arc::clone(&options.clock), high_water_ms.max(replayed.time_ms));
        let filter_budget = (config.memory_budget / FILTER_SHARE) as u64;
        let buckets = BucketSet::open(&db, &families, config.span, timeline.now().wall_ms, filter_budget)?;
        let engine = Self {
            policy: Policy { window_ms: config.span.window_ms, on_interrupt: config.on_interrupt },
            config,
            db,
            hot,
            buckets,
            sequence: Sequence::after(tokens),
            rows: RowNumbers::default(),
            timeline,
            counters: Counters::default(),
            sealing: Mutex::new(replayed.last_number),
            seals: AtomicU64::new(0),
            backlog: Backlog::default(),
            journal_bytes: AtomicU64::new(replayed.bytes),
            unsynced: AtomicBool::new(false),
            digester,
            poison: OnceLock::new(),
            closed: AtomicBool::new(false),
        };
        engine.notice_crashes();
        engine.begin(replayed)?;
        Ok(engine)
    }

    /// Whoever held a key when the journal was written died with that process.
    fn notice_crashes(&self) {
        let since_ms = self.timeline.now().wall_ms;
        for mut stripe in self.hot.stripes() {
            let crashed: Vec<_> = stripe
                .iter()
                .filter_map(|slot| match &slot.entry {
                    Entry::Processing(processing) if matches!(processing.holder, Holder::Leased { .. }) => {
                        let holder = Holder::Interrupted(Prior::Crashed);
                        let entry = Entry::Processing(Processing { since_ms, holder, ..processing.clone() });
                        Some((slot.digest, Arc::clone(&slot.key), entry))
                    }
                    _ => None,
                })
                .collect();
            for (digest, key, entry) in crashed {
                stripe.set(digest, &key, entry);
            }
        }
    }

    /// Puts on the disk, before the first answer, what this opening changed: its options and its tokens.
    fn begin(&self, replayed: Replayed) -> Result<()> {
        self.write(true, |tx| tx.put_meta(SPAN, &codec::put_span(self.config.span)))?;
        self.reserve(0)?;
        // Tokens must not begin again where a log is lost.
        self.db.flush_meta()?;
        tracing::info!(
            path = %self.db.directory().root().display(),
            journal_rows = replayed.rows,
            unsealed = self.hot.completed(),
            interrupted = self.hot.in_flight(),
            buckets = self.buckets.view().newest_first().len(),
            "store opened"
        );
        Ok(())
    }

    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    pub(crate) fn now(&self) -> Now {
        self.timeline.now()
    }

    /// Encodes and digests the keys of a call.
    pub(crate) fn request<'k, K: Into<Key<'k>>>(&self, keys: impl IntoIterator<Item = K>) -> Result<Request> {
        self.ready()?;
        Request::new(keys, self.config.key_limit, &self.digester)
    }

    // -----------------------------------------------------------------------------------------------------------
    // Health
    // -----------------------------------------------------------------------------------------------------------

    /// Refuses where the store is closed or poisoned.
    pub(super) fn ready(&self) -> Result<()> {
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::Closed);
        }
        match self.poison.get() {
            None => Ok(()),
            Some(reason) => Err(Error::Poisoned { reason: reason.clone() }),
        }
    }

    pub(crate) fn poisoned(&self) -> Option<&str> {
        self.poison.get().map(String::as_str)
    }

    /// Refuses everything from now on: nobody knows any more what is on the disk.
    pub(super) fn poison(&self, reason: &str) {
        if self.poison.set(reason.to_owned()).is_ok() {
            tracing::error!(reason, "store poisoned: it refuses until it is reopened");
        }
        self.backlog.eased.notify_all();
    }

    /// Writes to the database; poisons the store where the outcome is unknown.
    pub(super) fn write(&self, sync: bool, fill: impl FnOnce(&mut Tx<'_>) -> Result<()>) -> Result<()> {
        self.ready()?;
        self.db.write(sync, fill).inspect_err(|error| {
            if let Error::WriteFailed { detail } = error {
                self.poison(detail);
            }
        })?;
        // Only after the write: whoever syncs takes the mark first, so that no write is left out.
        self.unsynced.fetch_or(!sync, Ordering::Release);
        Ok(())
    }

    /// Makes sure that `count` tokens, and the numbers of some rows, can be taken.
    pub(super) fn reserve(&self, count: usize) -> Result<()> {
        self.sequence
            .ensure(count as u64 + 16, |reserved| self.write(true, |tx| tx.put_meta(TOKENS, &reserved.to_le_bytes())))
    }

    /// Refuses further calls, and closes the database when those under way are done.
    pub(crate) fn close(&self) -> Result<()> {
        if self.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        self.backlog.eased.notify_all();
        let high_water = self.timeline.high_water_ms().to_le_bytes();
        let written = match self.poison.get() {
            None => self.db.write(false, |tx| tx.put_meta(HIGH_WATER, &high_water)),
            Some(reason) => Err(Error::Poisoned { reason: reason.clone() }),
        };
        let closed = self.db.close();
        tracing::info!(path = %self.db.directory().root().display(), "store closed");
        written.and(closed)
    }

    /// Waits while so much is completed and not sealed that memory would overflow.
    fn wait_for_room(&self) -> Result<()> {
        while self.is_backlogged() {
            self.ready()?;
            self.wake_keeper();
            let mut failure = self.backlog.failure.lock();
            if let Some(detail) = failure.as_ref() {
                return Err(Error::SealingFailed { detail: detail.clone() });
            }
            self.backlog.eased.wait_for(&mut failure, BACKLOG_WAIT);
        }
        Ok(())
    }

    fn wake_keeper(&self) {
        if let Some(wake) = self.backlog.wake.get() {
            // A full channel has told it already.
            let _ = wake.try_send(());
        }
    }

    // -----------------------------------------------------------------------------------------------------------
    // Reading
    // -----------------------------------------------------------------------------------------------------------

    /// What the disk knows of the keys.
    fn on_disk<'a>(&self, asked: impl Iterator<Item = Asked<'a>>) -> Result<OnDisk> {
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
    fn decide<R>(
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

    // -----------------------------------------------------------------------------------------------------------
    // Writing
    // -----------------------------------------------------------------------------------------------------------

    /// Room for what a call brings: in memory, in one write, and among the tokens.
    fn admit(&self, keys: usize, bytes: usize) -> Result<()> {
        if bytes > BATCH_BYTES {
            return Err(Error::BatchTooLarge { bytes, limit: BATCH_BYTES });
        }
        self.wait_for_room()?;
        self.reserve(keys)
    }

    /// Room for one more key in flight, if it is none yet. Asked under a stripe's lock: callers in other stripes may
    /// overshoot by a key each.
    fn admit_in_flight(&self, stored: Option<&Entry>) -> Result<()> {
        let (in_flight, limit) = (self.hot.in_flight(), self.config.in_flight_limit);
        if in_flight < limit || matches!(stored, Some(Entry::Processing(_))) {
            return Ok(());
        }
        self.wake_keeper();
        Err(Error::TooManyInFlight { in_flight, limit })
    }

    /// Takes the number of a row that is about to be written. Before what it says can be seen in the hot table: then
    /// the rows of one key stand in the order of its holders, and none of them outlives one that overrules it.
    fn begin_row(&self) -> OpenRow<'_> {
        self.rows.begin(|| self.sequence.take())
    }

    /// Writes a row, and calls `apply` once it is written and before it may be sealed away.
    fn append(&self, open: OpenRow<'_>, row: RowWriter, sync: bool, apply: impl FnOnce()) -> Result<()> {
        if row.is_empty() {
            return Ok(());
        }
        let row = row.finish();
        self.write(sync, |tx| {
            tx.put_row(open.number(), &row);
            Ok(())
        })?;
        self.journal_bytes.fetch_add(row.len() as u64, Ordering::Relaxed);
        apply();
        Ok(())
    }

    /// Claims every key that is free. One row, whatever their number.
    pub(crate) fn claim(&self, request: &Request) -> Result<Vec<Result<Claimed>>> {
        self.admit(request.len(), request.key_bytes())?;
        let on_disk = self.on_disk(request.iter())?;
        let now = self.now();
        let until_monotonic_ms = now.monotonic_ms.saturating_add(self.config.lease_ms);
        let open = self.begin_row();
        let mut row = RowWriter::new(RowKind::Claimed, now.wall_ms, request.key_bytes() + request.len() * 12);
        let mut claimed = Vec::with_capacity(request.len());
        for asked in request.iter() {
            // What fails here fails for this key alone: those before it have their places already.
            let decided = self.decide(asked, &on_disk, |stripe, stored| {
                match transition::find(stored.as_ref(), asked.payload, now, self.policy) {
                    Found::Available { attempt, prior } => {
                        self.admit_in_flight(stored.as_ref())?;
                        // Under the lock, so that later holders have higher tokens.
                        let token = self.sequence.take();
                        let fingerprint = asked.payload.copied().or_else(|| first_payload(prior, stored.as_ref()));
                        let processing = Processing {
                            token,
                            attempt,
                            since_ms: now.wall_ms,
                            fingerprint,
                            holder: Holder::Leased { until_monotonic_ms },
                        };
                        row.processing(asked.key, &processing);
                        let key = stripe.set(asked.digest, asked.key, Entry::Processing(processing));
                        let digest = asked.digest;
                        Ok(Claimed::Acquired(Grant {
                            digest,
                            key,
                            token,
                            attempt,
                            prior,
                            fingerprint,
                            until_monotonic_ms,
                        }))
                    }
                    Found::InProgress { retry_after_ms, attempt } => {
                        Ok(Claimed::InProgress { retry_after_ms, attempt })
                    }
                    Found::Completed(done) => Ok(Claimed::Completed(done.clone())),
                    Found::PayloadMismatch => Err(payload_mismatch(asked)),
                }
            });
            claimed.push(decided.flatten());
        }
        self.append(open, row, self.config.sync_claims(), || {})?;
        self.count_claims(&claimed);
        Ok(claimed)
    }

    /// Records every key that is free as completed, without a result. One row, whatever their number.
    pub(crate) fn record(&self, request: &Request) -> Result<Vec<Result<Answer>>> {
        self.admit(request.len(), request.key_bytes())?;
        let on_disk = self.on_disk(request.iter())?;
        let now = self.now();
        let open = self.begin_row();
        let mut row = RowWriter::new(RowKind::Completed, now.wall_ms, request.key_bytes() + request.len() * 8);
        let mut ours: Vec<Option<(u64, Option<Fingerprint>)>> = Vec::with_capacity(request.len());
        let mut answers = Vec::with_capacity(request.len());
        for asked in request.iter() {
            let decided = self.decide(asked, &on_disk, |stripe, stored| {
                match transition::find(stored.as_ref(), asked.payload, now, self.policy) {
                    Found::Available { attempt, prior } => {
                        let token = self.sequence.take();
                        let fingerprint = asked.payload.copied().or_else(|| first_payload(prior, stored.as_ref()));
                        row.completed(asked.key, token, fingerprint.as_ref(), &Kept::Absent);
                        let holder = Holder::Recording;
                        let since_ms = now.wall_ms;
                        let recording = Processing { token, attempt, since_ms, fingerprint, holder };
                        stripe.set(asked.digest, asked.key, Entry::Processing(recording));
                        (Ok(Answer::New), Some((token, fingerprint)))
                    }
                    Found::InProgress { retry_after_ms, attempt } => {
                        (Ok(Answer::InProgress { retry_after_ms, attempt }), None)
                    }
                    Found::Completed(done) => (Ok(Answer::Completed(done.clone())), None),
                    Found::PayloadMismatch => (Err(payload_mismatch(asked)), None),
                }
            });
            let (answer, token) = decided.unwrap_or_else(|error| (Err(error), None));
            answers.push(answer);
            ours.push(token);
        }
        self.append(open, row, self.config.sync_results(), || {
            for (asked, ours) in request.iter().zip(&ours) {
                let Some((token, fingerprint)) = *ours else { continue };
                let done = Done { token, completed_ms: now.wall_ms, fingerprint, result: Kept::Absent };
                self.hot.stripe(asked.digest).set(asked.digest, asked.key, Entry::Completed(done));
            }
        })?;
        // A key that stands twice in one call was being recorded when it came up again, and is completed by now.
        for (asked, answer) in request.iter().zip(&mut answers) {
            if let Ok(Answer::InProgress { .. }) = answer
                && let Some(Entry::Completed(done)) = self.hot.stripe(asked.digest).get(asked.digest, asked.key)
            {
                *answer = Ok(Answer::Completed(done.clone()));
            }
        }
        self.count_records(&answers);
        self.wake_if_due();
        Ok(answers)
    }

    /// Settles leases. One row a kind of settlement, whatever their number; each answer is its lease's. `Ok(false)`:
    /// superseded.
    pub(crate) fn settle(
        &self,
        kind: RowKind,
        settler: Settler,
        leases: Vec<(&Grant, Settlement)>,
    ) -> Result<Vec<bool>> {
        self.ready()?;
        let bytes: usize = leases
            .iter()
            .map(|(grant, settlement)| {
                let result = if let Settlement::Completed(result) = settlement { result.len() } else { 0 };
                grant.key.len() + result + 16
            })
            .sum();
        self.admit(0, bytes)?;
        let now = self.now();
        let open = self.begin_row();
        let mut row = RowWriter::new(kind, now.wall_ms, bytes);
        let mut accepted = Vec::with_capacity(leases.len());
        let mut settled = Vec::with_capacity(leases.len());
        for (grant, settlement) in leases {
            let mut stripe = self.hot.stripe(grant.digest);
            let stored = stripe.get(grant.digest, &grant.key);
            let may = match (settler, stored) {
                (Settler::Operator, Some(Entry::Processing(processing))) => {
                    matches!(self.standing_at(processing, now), Standing::Held(_))
                }
                _ => true,
            };
            let is_ours = may && transition::may_settle(stored, grant.token);
            accepted.push(is_ours);
            if !is_ours {
                continue;
            }
            let processing = Processing {
                token: grant.token,
                attempt: grant.attempt,
                since_ms: now.wall_ms,
                fingerprint: grant.fingerprint,
                holder: Holder::Settling,
            };
            stripe.set(grant.digest, &grant.key, Entry::Processing(processing.clone()));
            drop(stripe);
            let entry = match settlement {
                Settlement::Completed(result) => {
                    row.completed(&grant.key, grant.token, grant.fingerprint.as_ref(), &result);
                    Entry::Completed(Done {
                        token: grant.token,
                        completed_ms: now.wall_ms,
                        fingerprint: grant.fingerprint,
                        result,
                    })
                }
                Settlement::Open { prior, not_before_ms } => {
                    let open = Processing { holder: Holder::Open { prior, not_before_ms }, ..processing };
                    row.processing(&grant.key, &open);
                    Entry::Processing(open)
                }
            };
            settled.push((grant.digest, Arc::clone(&grant.key), entry));
        }
        let sync = if kind == RowKind::Completed { self.config.sync_results() } else { self.config.sync_claims() };
        let count = settled.len() as u64;
        self.append(open, row, sync, || {
            for (digest, key, entry) in settled {
                self.hot.stripe(digest).set(digest, &key, entry);
            }
        })?;
        match kind {
            RowKind::Completed => self.counters.completed.add(count),
            _ => self.counters.released.add(count),
        }
        self.counters.superseded.add((accepted.len() as u64).saturating_sub(count));
        self.wake_if_due();
        Ok(accepted)
    }

    /// Gives a lease its full time again. `None`: superseded. Costs no write: a lease ends with its process anyway.
    pub(crate) fn renew(&self, grant: &Grant) -> Result<Option<u64>> {
        self.ready()?;
        let now = self.now();
        let until_monotonic_ms = now.monotonic_ms.saturating_add(self.config.lease_ms);
        let renewed = self.change_holder(grant, now, |holder| match holder {
            // It was resolved to run again: the journal says so, and a renewal, which it does not see, cannot undo it.
            Holder::Open { .. } => None,
            _ => Some(Holder::Leased { until_monotonic_ms }),
        });
        if !renewed {
            self.counters.superseded.add(1);
        }
        Ok(renewed.then_some(until_monotonic_ms))
    }

    /// Notes that a lease was dropped without a word. Costs no write.
    pub(crate) fn abandon(&self, grant: &Grant) {
        let now = self.timeline.now();
        self.change_holder(grant, now, |holder| match holder {
            Holder::Leased { .. } => Some(Holder::Interrupted(Prior::Dropped)),
            _ => None,
        });
    }

    fn change_holder(&self, grant: &Grant, now: Now, change: impl FnOnce(Holder) -> Option<Holder>) -> bool {
        let mut stripe = self.hot.stripe(grant.digest);
        let stored = stripe.get(grant.digest, &grant.key);
        let Some(Entry::Processing(processing)) = stored.filter(|_| transition::may_settle(stored, grant.token)) else {
            return false;
        };
        let Some(holder) = change(processing.holder) else { return false };
        let entry = Entry::Processing(Processing { since_ms: now.wall_ms, holder, ..processing.clone() });
        stripe.set(grant.digest, &grant.key, entry);
        true
    }

    /// The grant of a key that is held, as if its holder had come back.
    pub(crate) fn held_grant(&self, request: &Request) -> Result<Option<(Grant, Prior)>> {
        self.ready()?;
        let now = self.now();
        let Some(asked) = request.iter().next() else { return Ok(None) };
        let stripe = self.hot.stripe(asked.digest);
        let Some(Entry::Processing(processing)) = stripe.get(asked.digest, asked.key) else { return Ok(None) };
        let Standing::Held(prior) = self.standing_at(processing, now) else { return Ok(None) };
        let grant = Grant {
            digest: asked.digest,
            key: Arc::from(asked.key),
            token: processing.token,
            attempt: processing.attempt,
            prior: Some(prior),
            fingerprint: processing.fingerprint,
            until_monotonic_ms: 0,
        };
        Ok(Some((grant, prior)))
    }

    /// Removes all that is stored of a key: true if there was something that counted.
    pub(crate) fn forget(&self, request: &Request) -> Result<bool> {
        // A seal under way would bring the key back into its bucket.
        let _sealing = self.sealing.lock();
        self.reserve(1)?;
        let Some(asked) = request.iter().next() else { return Ok(false) };
        let now = self.now();
        let view = self.buckets.view();
        let slots = view.candidates(asked.digest);
        let probe = Probe { place: 0, digest: asked.digest, key: asked.key, slots };
        let (mut sealed, mut counted) = (Vec::new(), false);
        look_up(&self.db, &view, &[probe], |_, bucket, done| {
            counted |= done.is_live(now, self.policy.window_ms);
            sealed.push(Arc::clone(bucket));
        })?;
        let mut stripe = self.hot.stripe(asked.digest);
        let hot = stripe.get(asked.digest, asked.key).cloned();
        match &hot {
            None => {}
            Some(Entry::Completed(done)) => counted |= done.is_live(now, self.policy.window_ms),
            Some(Entry::Processing(processing)) => match self.standing_at(processing, now) {
                Standing::Alive { .. } | Standing::Settling => {
                    return Err(Error::InUse { key: display(asked.key), token: processing.token });
                }
                standing => counted |= standing != Standing::Forgotten,
            },
        }
        if let Some(entry) = &hot {
            // Whoever comes between now and the row sees work that is nearly over.
            let settling = Processing {
                token: entry.token(),
                attempt: 1,
                since_ms: now.wall_ms,
                fingerprint: None,
                holder: Holder::Settling,
            };
            stripe.set(asked.digest, asked.key, Entry::Processing(settling));
        }
        // Under the lock: behind every row of what is forgotten here, and below the token of whoever claims the key next.
        let open = self.begin_row();
        let token = self.sequence.take();
        drop(stripe);
        if hot.is_none() && sealed.is_empty() {
            return Ok(false);
        }
        let mut row = RowWriter::new(RowKind::Forgotten, now.wall_ms, asked.key.len() + 16);
        row.forgotten(asked.key, token);
        let row = row.finish();
        let mut row_key = Vec::new();
        codec::row_key(asked.digest, asked.key, &mut row_key);
        self.write(self.config.sync_results(), |tx| {
            tx.put_row(open.number(), &row);
            for bucket in &sealed {
                tx.delete_key(&bucket.family, &row_key);
            }
            Ok(())
        })?;
        self.journal_bytes.fetch_add(row.len() as u64, Ordering::Relaxed);
        let mut stripe = self.hot.stripe(asked.digest);
        if stripe.get(asked.digest, asked.key).is_some_and(|entry| entry.token() < token) {
            stripe.remove(asked.digest, asked.key);
        }
        Ok(counted)
    }

    // -----------------------------------------------------------------------------------------------------------
    // Counting
    // -----------------------------------------------------------------------------------------------------------

    fn count_claims(&self, claimed: &[Result<Claimed>]) {
        let (mut acquired, mut reclaimed) = (0, 0);
        for claimed in claimed {
            if let Ok(Claimed::Acquired(grant)) = claimed {
                acquired += 1;
                reclaimed += u64::from(grant.prior.is_some());
            }
        }
        self.counters.acquired.add(acquired);
        self.counters.reclaimed.add(reclaimed);
        self.count_refusals(claimed.iter().map(|claimed| match claimed {
            Ok(Claimed::Acquired(_)) => Refusal::None,
            Ok(Claimed::InProgress { .. }) => Refusal::InProgress,
            Ok(Claimed::Completed(_)) => Refusal::Duplicate,
            Err(error) => Refusal::of(error),
        }));
    }

    fn count_records(&self, answers: &[Result<Answer>]) {
        let recorded = answers.iter().filter(|answer| matches!(answer, Ok(Answer::New))).count();
        self.counters.recorded.add(recorded as u64);
        self.count_refusals(answers.iter().map(|answer| match answer {
            Ok(Answer::New) => Refusal::None,
            Ok(Answer::InProgress { .. }) => Refusal::InProgress,
            Ok(Answer::Completed(_)) => Refusal::Duplicate,
            Err(error) => Refusal::of(error),
        }));
    }

    fn count_refusals(&self, refusals: impl Iterator<Item = Refusal>) {
        let (mut duplicates, mut in_progress, mut mismatches) = (0, 0, 0);
        for refusal in refusals {
            match refusal {
                Refusal::Duplicate => duplicates += 1,
                Refusal::InProgress => in_progress += 1,
                Refusal::PayloadMismatch => mismatches += 1,
                Refusal::None => {}
            }
        }
        self.counters.duplicates.add(duplicates);
        self.counters.in_progress.add(in_progress);
        self.counters.payload_mismatches.add(mismatches);
    }

    fn wake_if_due(&self) {
        if self.is_seal_due() {
            self.wake_keeper();
        }
    }
}

/// The payload that the first attempt came with binds the later ones that bring none.
fn first_payload(prior: Option<Prior>, stored: Option<&Entry>) -> Option<Fingerprint> {
    match (prior, stored) {
        (Some(_), Some(Entry::Processing(processing))) => processing.fingerprint,
        _ => None,
    }
}

/// Why a key was not given out, for the counters.
enum Refusal {
    None,
    Duplicate,
    InProgress,
    PayloadMismatch,
}

impl Refusal {
    fn of(error: &Error) -> Self {
        if matches!(error, Error::PayloadMismatch { .. }) { Self::PayloadMismatch } else { Self::None }
    }
}

fn payload_mismatch(asked: Asked<'_>) -> Error {
    Error::PayloadMismatch { key: display(asked.key) }
}

/// A key as people read it.
pub(crate) fn display(encoded: &[u8]) -> String {
    match Key::decode(encoded) {
        Some(key) => key.to_string(),
        None => crate::error::printable(encoded),
    }
}

/// Does to a stripe what an event of the journal says.
fn apply(stripe: &mut Stripe<'_>, digest: u64, key: &[u8], event: Event) {
    let stored = stripe.get(digest, key);
    match event {
        Event::Claimed(processing) if transition::replay_claimed(stored, processing.token) => {
            stripe.set(digest, key, Entry::Processing(processing));
        }
        Event::Settled(processing) if transition::replay_settled(stored, processing.token) => {
            stripe.set(digest, key, Entry::Processing(processing));
        }
        Event::Completed(done) if transition::replay_completed(stored, done.token) => {
            stripe.set(digest, key, Entry::Completed(done));
        }
        Event::Forgotten { token } if transition::replay_forgotten(stored, token) => stripe.remove(digest, key),
        _ => {}
    }
}

fn meta<const N: usize>(db: &Db, name: &'static str) -> Result<[u8; N]> {
    db.meta(name)?.and_then(|value| value.try_into().ok()).ok_or_else(|| corrupt_meta(name))
}

fn corrupt_meta(name: &str) -> Error {
    Error::Corrupt { place: format!("`{name}` in `meta`"), detail: "it is missing or of another form".to_owned() }
}
