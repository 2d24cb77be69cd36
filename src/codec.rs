//! Encodings on disk: journal records, bucket entries and `meta` values. `docs/format.md` has the layouts.
//!
//! Every decoder returns `None` for bytes that no encoder writes, and none of them panics.

use crate::clock::{BootTime, ClockState, Deviation, MAX_WALL_MS, Step, Steps};
use crate::config::Span;
use onlyonce_core::machine::{Backoff, CompletedEntry, Entry, Event, Holder, OwnWindow, Processing};
pub(crate) use onlyonce_core::wire::{Reader, put_prefixed, put_varint};
use onlyonce_core::{Fingerprint, OnInterrupt, PriorAttempt, StoredResult};

/// The version of all encodings in this file, stored in each store.
pub(crate) const FORMAT: u32 = 7;

/// The version of stores on stream time, whose times are not comparable to the wall clock.
pub(crate) const STREAM_FORMAT: u32 = 8;

// ---------------------------------------------------------------------------------------------------------------
// Primitives
// ---------------------------------------------------------------------------------------------------------------

/// Appends a signed number, zigzag-encoded.
fn put_signed(out: &mut Vec<u8>, value: i64) {
    put_varint(out, ((value << 1) ^ (value >> 63)) as u64);
}

/// Decoders on top of [`Reader`] that the encodings of this file share.
trait ReadStored {
    /// A time, encoded as `from_ms` minus the time, signed.
    fn time(&mut self, from_ms: u64) -> Option<u64>;
    /// A time or a difference of times, within the range of clocks, so that sums do not overflow.
    fn clock_ms(&mut self) -> Option<u64>;
    fn fingerprint(&mut self, flags: u8) -> Option<Option<Fingerprint>>;
    fn own_window(&mut self, is_present: bool) -> Option<OwnWindow>;
}

impl ReadStored for Reader<'_> {
    fn time(&mut self, from_ms: u64) -> Option<u64> {
        let bits = self.varint()?;
        let before = (bits >> 1) as i64 ^ -((bits & 1) as i64);
        if before < 0 { from_ms.checked_add(before.unsigned_abs()) } else { from_ms.checked_sub(before.unsigned_abs()) }
    }

    fn clock_ms(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes).filter(|ms| *ms <= MAX_WALL_MS)
    }

    fn fingerprint(&mut self, flags: u8) -> Option<Option<Fingerprint>> {
        if flags & FINGERPRINT == 0 { Some(None) } else { self.array().map(Some) }
    }

    fn own_window(&mut self, is_present: bool) -> Option<OwnWindow> {
        if is_present { self.varint().and_then(OwnWindow::from_ms) } else { Some(OwnWindow::NONE) }
    }
}

const FINGERPRINT: u8 = 0b0001;

fn put_fingerprint(out: &mut Vec<u8>, fingerprint: Option<&Fingerprint>) {
    if let Some(fingerprint) = fingerprint {
        out.extend_from_slice(fingerprint);
    }
}

fn fingerprint_flag(fingerprint: Option<&Fingerprint>) -> u8 {
    if fingerprint.is_some() { FINGERPRINT } else { 0 }
}

/// In the flags of a completed key, and of a bucket value.
const OWN_WINDOW: u8 = 0b1000;
/// In the flags of a completed key: its claim has the key.
const OF_CLAIM: u8 = 0b0001_0000;
/// In the flags of a processing key.
const PROCESSING_OWN_WINDOW: u8 = 0b0010_0000;

fn put_own_window(out: &mut Vec<u8>, own_window: OwnWindow) {
    if let Some(ms) = own_window.ms() {
        put_varint(out, ms);
    }
}

fn own_window_flag(own_window: OwnWindow, flag: u8) -> u8 {
    if own_window == OwnWindow::NONE { 0 } else { flag }
}

// Whether a result is stored, in two bits.
const RESULT_SHIFT: u32 = 1;
const RESULT_MASK: u8 = 0b0110;
const RESULT_NONE: u8 = 0;
const RESULT_BYTES: u8 = 1;
const RESULT_TOO_LARGE: u8 = 2;

fn result_flag<B>(stored_result: &StoredResult<B>) -> u8 {
    let bits = match stored_result {
        StoredResult::None => RESULT_NONE,
        StoredResult::Bytes(_) => RESULT_BYTES,
        StoredResult::TooLarge => RESULT_TOO_LARGE,
    };
    bits << RESULT_SHIFT
}

fn stored_result(flags: u8, bytes: &[u8]) -> Option<StoredResult<&[u8]>> {
    match (flags & RESULT_MASK) >> RESULT_SHIFT {
        RESULT_NONE if bytes.is_empty() => Some(StoredResult::None),
        RESULT_BYTES => Some(StoredResult::Bytes(bytes)),
        RESULT_TOO_LARGE if bytes.is_empty() => Some(StoredResult::TooLarge),
        _ => None,
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Journal records
// ---------------------------------------------------------------------------------------------------------------

/// ```text
/// record     := format (1) | kind (1) | time in ms (8, little endian) | item*
/// processing := flags (1) | token (varint) | attempt (varint) | age in ms (zigzag) | [backoff in ms (varint)]
///               | [own window in ms (varint)] | [fingerprint (16)] | key length (varint) | key
/// completed  := flags (1) | token (varint) | age in ms (zigzag) | [own window in ms (varint)] | [fingerprint (16)]
///               | key length (varint) | key | [result length (varint) | result]
///             | flags (1) | token (varint) | age in ms (zigzag) | [result length (varint) | result]
/// forgotten  := token (varint) | key length (varint) | key
/// ```
///
/// The second form of `completed` has the key, the window and the fingerprint of the claim with its token.
///
/// The age is the record's time minus the item's time. It is negative if a message is newer than its record, or if
/// the store's time went back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RecordKind {
    /// Claimed keys, or the keys in progress in a checkpoint.
    Claimed = 1,
    /// Keys that were released or resolved to run again.
    Released = 2,
    /// Keys that were completed or recorded.
    Completed = 3,
    /// Keys that were forgotten.
    Forgotten = 4,
}

const RECORD_FORMAT: u8 = 4;

const HOLDER_SHIFT: u32 = 1;
const HOLDER_MASK: u8 = 0b0000_0110;
const HOLDER_LEASED: u8 = 0;
const HOLDER_INTERRUPTED: u8 = 1;
const HOLDER_RELEASED: u8 = 2;
const PRIOR_SHIFT: u32 = 3;
const PRIOR_MASK: u8 = 0b0001_1000;

fn prior_bits(prior: PriorAttempt) -> u8 {
    let bits = match prior {
        PriorAttempt::Released => 0,
        PriorAttempt::LeaseExpired => 1,
        PriorAttempt::Dropped => 2,
        PriorAttempt::Crashed => 3,
    };
    bits << PRIOR_SHIFT
}

fn prior(flags: u8) -> PriorAttempt {
    match (flags & PRIOR_MASK) >> PRIOR_SHIFT {
        0 => PriorAttempt::Released,
        1 => PriorAttempt::LeaseExpired,
        2 => PriorAttempt::Dropped,
        _ => PriorAttempt::Crashed,
    }
}

/// Encodes a journal record, item by item.
pub(crate) struct RecordWriter {
    bytes: Vec<u8>,
    time_ms: u64,
    items: usize,
}

impl RecordWriter {
    pub(crate) fn new(kind: RecordKind, time_ms: u64, capacity: usize) -> Self {
        let mut bytes = Vec::with_capacity(capacity.saturating_add(10));
        bytes.push(RECORD_FORMAT);
        bytes.push(kind as u8);
        bytes.extend_from_slice(&time_ms.to_le_bytes());
        Self { bytes, time_ms, items: 0 }
    }

    fn age(&mut self, since_ms: u64) {
        put_signed(&mut self.bytes, self.time_ms.wrapping_sub(since_ms) as i64);
    }

    /// Appends an event. All events of a record are of its kind.
    pub(crate) fn event(&mut self, key: &[u8], event: &Event<&[u8]>) {
        match event {
            Event::Claimed(processing) | Event::Released(processing) => self.processing(key, processing),
            Event::Completed(done) => self.completed(key, done),
            Event::ClaimCompleted(done) => self.claim_completed(done),
            Event::Forgotten { token } => self.forgotten(key, *token),
        }
    }

    /// Appends an item of a `Claimed` or `Released` record. The end of the lease is not stored: leases end with their
    /// process.
    pub(crate) fn processing(&mut self, key: &[u8], processing: &Processing) {
        let mut flags = fingerprint_flag(processing.fingerprint.as_ref())
            | own_window_flag(processing.own_window, PROCESSING_OWN_WINDOW);
        let mut backoff_ms = None;
        match processing.holder {
            Holder::Leased { .. } | Holder::Claiming { .. } | Holder::Committing => {
                flags |= HOLDER_LEASED << HOLDER_SHIFT
            }
            Holder::Interrupted(prior) => flags |= HOLDER_INTERRUPTED << HOLDER_SHIFT | prior_bits(prior),
            // Not claimed: if the process dies now, the key is free and needs no resolution.
            Holder::CommittingUnclaimed => {
                flags |= HOLDER_RELEASED << HOLDER_SHIFT | prior_bits(PriorAttempt::Crashed);
                backoff_ms = Some(0);
            }
            Holder::Released { prior, backoff } => {
                flags |= HOLDER_RELEASED << HOLDER_SHIFT | prior_bits(prior);
                backoff_ms = Some(backoff.length_ms);
            }
            // The old holder, which could still complete the key, ends with this process.
            Holder::Resolved(prior) => {
                flags |= HOLDER_RELEASED << HOLDER_SHIFT | prior_bits(prior);
                backoff_ms = Some(0);
            }
        }
        self.bytes.push(flags);
        put_varint(&mut self.bytes, processing.token);
        put_varint(&mut self.bytes, u64::from(processing.attempt));
        self.age(processing.since_ms);
        if let Some(backoff_ms) = backoff_ms {
            put_varint(&mut self.bytes, u64::from(backoff_ms));
        }
        put_own_window(&mut self.bytes, processing.own_window);
        put_fingerprint(&mut self.bytes, processing.fingerprint.as_ref());
        put_prefixed(&mut self.bytes, key);
        self.items += 1;
    }

    /// Appends an item of a `Completed` record.
    pub(crate) fn completed(&mut self, key: &[u8], done: &CompletedEntry<&[u8]>) {
        let fingerprint = done.fingerprint.as_ref();
        let own_window_flag = own_window_flag(done.own_window, OWN_WINDOW);
        self.bytes.push(fingerprint_flag(fingerprint) | result_flag(&done.result) | own_window_flag);
        put_varint(&mut self.bytes, done.token);
        self.age(done.completed_ms);
        put_own_window(&mut self.bytes, done.own_window);
        put_fingerprint(&mut self.bytes, fingerprint);
        put_prefixed(&mut self.bytes, key);
        if let StoredResult::Bytes(result) = done.result {
            put_prefixed(&mut self.bytes, result);
        }
        self.items += 1;
    }

    /// Appends an item of a `Completed` record, for the claim with its token.
    fn claim_completed(&mut self, done: &CompletedEntry<&[u8]>) {
        self.bytes.push(OF_CLAIM | result_flag(&done.result));
        put_varint(&mut self.bytes, done.token);
        self.age(done.completed_ms);
        if let StoredResult::Bytes(result) = done.result {
            put_prefixed(&mut self.bytes, result);
        }
        self.items += 1;
    }

    /// Appends an item of a `Forgotten` record: it voids earlier items of the key with tokens up to `token`.
    pub(crate) fn forgotten(&mut self, key: &[u8], token: u64) {
        put_varint(&mut self.bytes, token);
        put_prefixed(&mut self.bytes, key);
        self.items += 1;
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.items == 0
    }

    /// The bytes so far.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.bytes
    }
}

/// An item of a journal record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Item<'a> {
    /// An event of this key.
    Event(&'a [u8], Event<&'a [u8]>),
    /// The completion of the claim with this token.
    ClaimCompleted { token: u64, completed_ms: u64, result: StoredResult<&'a [u8]> },
}

/// Decodes a journal record: passes each item to `visit` and returns the record's time. `None` if it is not a valid record.
pub(crate) fn read_record<'a>(record: &'a [u8], mut visit: impl FnMut(Item<'a>)) -> Option<u64> {
    let mut reader = Reader::new(record);
    reader.byte().filter(|format| *format == RECORD_FORMAT)?;
    let kind = reader.byte().filter(|kind| (1..=4).contains(kind))?;
    let time_ms = u64::from_le_bytes(reader.array()?);
    while !reader.is_empty() {
        match kind {
            1 => {
                let (key, processing) = read_processing(&mut reader, time_ms)?;
                visit(Item::Event(key, Event::Claimed(processing)));
            }
            2 => {
                let (key, processing) = read_processing(&mut reader, time_ms)?;
                visit(Item::Event(key, Event::Released(processing)));
            }
            3 => {
                let flags = reader.byte()?;
                let token = reader.varint()?;
                let completed_ms = reader.time(time_ms)?;
                let stored = (flags & RESULT_MASK) >> RESULT_SHIFT == RESULT_BYTES;
                if flags & OF_CLAIM != 0 {
                    let result = stored_result(flags, if stored { reader.prefixed()? } else { &[] })?;
                    visit(Item::ClaimCompleted { token, completed_ms, result });
                    continue;
                }
                let own_window = reader.own_window(flags & OWN_WINDOW != 0)?;
                let fingerprint = reader.fingerprint(flags)?;
                let key = reader.prefixed()?;
                let result = stored_result(flags, if stored { reader.prefixed()? } else { &[] })?;
                let done = CompletedEntry { token, completed_ms, fingerprint, own_window, result };
                visit(Item::Event(key, Event::Completed(done)));
            }
            4 => {
                let token = reader.varint()?;
                visit(Item::Event(reader.prefixed()?, Event::Forgotten { token }));
            }
            _ => return None,
        }
    }
    Some(time_ms)
}

fn read_processing<'a>(reader: &mut Reader<'a>, time_ms: u64) -> Option<(&'a [u8], Processing)> {
    let flags = reader.byte()?;
    let token = reader.varint()?;
    let attempt = u32::try_from(reader.varint()?).ok()?;
    let since_ms = reader.time(time_ms)?;
    let holder = match (flags & HOLDER_MASK) >> HOLDER_SHIFT {
        HOLDER_LEASED => Holder::Leased { until_monotonic_ms: 0 },
        HOLDER_INTERRUPTED => Holder::Interrupted(prior(flags)),
        HOLDER_RELEASED => {
            let length_ms = u32::try_from(reader.varint()?).ok()?;
            Holder::Released { prior: prior(flags), backoff: Backoff { until_monotonic_ms: 0, length_ms } }
        }
        _ => return None,
    };
    let own_window = reader.own_window(flags & PROCESSING_OWN_WINDOW != 0)?;
    let fingerprint = reader.fingerprint(flags)?;
    let key = reader.prefixed()?;
    Some((key, Processing { token, attempt, since_ms, fingerprint, own_window, holder }))
}

// ---------------------------------------------------------------------------------------------------------------
// Bucket entries
// ---------------------------------------------------------------------------------------------------------------

/// Encodes the key of a bucket entry: the digest, big endian, then the encoded key.
pub(crate) fn put_entry_key(digest: u64, key: &[u8], out: &mut Vec<u8>) {
    out.clear();
    out.extend_from_slice(&digest.to_be_bytes());
    out.extend_from_slice(key);
}

/// The digest in the key of a bucket entry.
pub(crate) fn digest_of_entry_key(entry_key: &[u8]) -> Option<u64> {
    Reader::new(entry_key).array().map(u64::from_be_bytes)
}

const VALUE_FORMAT: u8 = 0x10;
const VALUE_FORMAT_MASK: u8 = 0xf0;

/// In place of the result flag: an ended attempt (the key was released, or its holder was interrupted).
const ATTEMPT: u8 = 3 << RESULT_SHIFT;
const ATTEMPT_PRIOR_MASK: u8 = 0b0000_0011;

/// ```text
/// value   := format and flags (1) | ms since the bucket's start (varint) | token (varint) | [own window in ms (varint)]
///            | [fingerprint (16)] | result, or attempt
/// attempt := prior (1) | attempt (varint) | backoff in ms (varint)
///            | end of the backoff on the writing process's monotonic clock, in ms (varint)
/// ```
///
/// `None` if the key is in flight: such a key is never written to a bucket.
#[must_use]
pub(crate) fn put_value(entry: &Entry<&[u8]>, bucket_start_ms: u64, out: &mut Vec<u8>) -> Option<()> {
    out.clear();
    let (flags, fingerprint, own_window) = match entry {
        Entry::Completed(done) => (result_flag(&done.result), &done.fingerprint, done.own_window),
        Entry::Processing(processing) => (ATTEMPT, &processing.fingerprint, processing.own_window),
    };
    let flags = flags | own_window_flag(own_window, OWN_WINDOW);
    out.push(VALUE_FORMAT | flags | fingerprint_flag(fingerprint.as_ref()));
    put_varint(out, entry.time_ms().saturating_sub(bucket_start_ms));
    put_varint(out, entry.token());
    put_own_window(out, own_window);
    put_fingerprint(out, fingerprint.as_ref());
    match entry {
        Entry::Completed(CompletedEntry { result: StoredResult::Bytes(result), .. }) => out.extend_from_slice(result),
        Entry::Completed(_) => {}
        Entry::Processing(Processing { attempt, holder: Holder::Released { prior, backoff }, .. }) => {
            out.push(prior_bits(*prior) >> PRIOR_SHIFT);
            put_varint(out, u64::from(*attempt));
            put_varint(out, u64::from(backoff.length_ms));
            put_varint(out, backoff.until_monotonic_ms);
        }
        Entry::Processing(_) => return None,
    }
    Some(())
}

pub(crate) fn read_value(value: &[u8], bucket_start_ms: u64) -> Option<Entry> {
    let mut reader = Reader::new(value);
    let flags = reader.byte()?;
    if flags & VALUE_FORMAT_MASK != VALUE_FORMAT {
        return None;
    }
    let time_ms = bucket_start_ms.checked_add(reader.varint()?)?;
    let token = reader.varint()?;
    let own_window = reader.own_window(flags & OWN_WINDOW != 0)?;
    let fingerprint = reader.fingerprint(flags)?;
    if flags & RESULT_MASK == ATTEMPT {
        let prior_byte = reader.byte().filter(|byte| byte & !ATTEMPT_PRIOR_MASK == 0)?;
        let attempt = u32::try_from(reader.varint()?).ok()?;
        let length_ms = u32::try_from(reader.varint()?).ok()?;
        let backoff = Backoff { until_monotonic_ms: reader.varint()?, length_ms };
        let holder = Holder::Released { prior: prior(prior_byte << PRIOR_SHIFT), backoff };
        let processing = Processing { token, attempt, since_ms: time_ms, fingerprint, own_window, holder };
        return reader.is_empty().then_some(Entry::Processing(processing));
    }
    let result = stored_result(flags, reader.rest())?.to_shared();
    Some(Entry::Completed(CompletedEntry { token, completed_ms: time_ms, fingerprint, own_window, result }))
}

// ---------------------------------------------------------------------------------------------------------------
// Values in `meta`
// ---------------------------------------------------------------------------------------------------------------

/// The secret of the key digests, written when the store is created.
pub(crate) type Secret = [u8; 16];

/// `span := window in ms (8, little endian) | bucket width in ms (8, little endian)`
pub(crate) fn put_span(span: Span) -> Vec<u8> {
    [span.window_ms.to_le_bytes(), span.bucket_ms.to_le_bytes()].concat()
}

pub(crate) fn read_span(bytes: &[u8]) -> Option<Span> {
    let mut reader = Reader::new(bytes);
    let span = Span { window_ms: u64::from_le_bytes(reader.array()?), bucket_ms: u64::from_le_bytes(reader.array()?) };
    (reader.is_empty() && span.window_ms > 0 && span.bucket_ms > 0).then_some(span)
}

/// `on-interrupt := 0 rerun | 1 hold`
pub(crate) fn put_on_interrupt(on_interrupt: OnInterrupt) -> Vec<u8> {
    vec![match on_interrupt {
        OnInterrupt::Rerun => 0,
        OnInterrupt::Hold => 1,
    }]
}

pub(crate) fn read_on_interrupt(bytes: &[u8]) -> Option<OnInterrupt> {
    match bytes {
        [0] => Some(OnInterrupt::Rerun),
        [1] => Some(OnInterrupt::Hold),
        _ => None,
    }
}

const CLOCK_BOOT: u8 = 0b0001;
const CLOCK_DEVIATES: u8 = 0b0010;
const CLOCK_AHEAD: u8 = 0b0100;
const CLOCK_FLAGS: u8 = CLOCK_BOOT | CLOCK_DEVIATES | CLOCK_AHEAD;

/// `clock := flags (1) | [boot id (16) | boot time (8)] | lead (8) | [since (8) | least (8) | measured since (8) | wall then (8) | grown since (8)] | step*`,
/// `step := from (8) | to (8) | by (8)`
pub(crate) fn put_clock(state: &ClockState) -> Vec<u8> {
    let ClockState { boot, lead_ms, deviation, steps } = state;
    let boot_flag = if boot.is_some() { CLOCK_BOOT } else { 0 };
    let deviation_flags = match deviation {
        None => 0,
        Some(deviation) if deviation.is_ahead => CLOCK_DEVIATES | CLOCK_AHEAD,
        Some(_) => CLOCK_DEVIATES,
    };
    let mut out = vec![boot_flag | deviation_flags];
    if let Some(BootTime { id, ms }) = boot {
        out.extend_from_slice(id);
        out.extend_from_slice(&ms.to_le_bytes());
    }
    out.extend_from_slice(&lead_ms.to_le_bytes());
    if let Some(Deviation { since_ms, least_ms, measured_since_ms, first_wall_ms, grown_since_ms, .. }) = deviation {
        [since_ms, least_ms, measured_since_ms, first_wall_ms, grown_since_ms]
            .iter()
            .for_each(|ms| out.extend_from_slice(&ms.to_le_bytes()));
    }
    for Step { from_ms, to_ms, by_ms } in steps.iter() {
        [from_ms, to_ms, by_ms].iter().for_each(|ms| out.extend_from_slice(&ms.to_le_bytes()));
    }
    out
}

pub(crate) fn read_clock(bytes: &[u8]) -> Option<ClockState> {
    let mut reader = Reader::new(bytes);
    let flags = reader.byte()?;
    if flags & !CLOCK_FLAGS != 0 || flags & (CLOCK_DEVIATES | CLOCK_AHEAD) == CLOCK_AHEAD {
        return None;
    }
    let boot = match flags & CLOCK_BOOT {
        0 => None,
        _ => Some(BootTime { id: reader.array()?, ms: u64::from_le_bytes(reader.array()?) }),
    };
    let lead_ms = reader.clock_ms()?;
    let deviation = match flags & CLOCK_DEVIATES {
        0 => None,
        _ => Some(Deviation {
            is_ahead: flags & CLOCK_AHEAD != 0,
            since_ms: reader.clock_ms()?,
            least_ms: reader.clock_ms()?,
            measured_since_ms: reader.clock_ms()?,
            first_wall_ms: reader.clock_ms()?,
            grown_since_ms: reader.clock_ms()?,
        }),
    };
    let mut steps = Vec::new();
    while !reader.is_empty() {
        let step = Step { from_ms: reader.clock_ms()?, to_ms: reader.clock_ms()?, by_ms: reader.clock_ms()? };
        (step.by_ms > 0).then(|| steps.push(step))?;
    }
    Some(ClockState { boot, lead_ms, deviation, steps: Steps::of(&steps)? })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use proptest::prelude::*;

    fn any_result() -> impl Strategy<Value = StoredResult> {
        prop_oneof![
            Just(StoredResult::None),
            Just(StoredResult::TooLarge),
            proptest::collection::vec(any::<u8>(), 0..40).prop_map(|bytes| StoredResult::Bytes(Arc::from(bytes))),
        ]
    }

    fn done(token: u64, result: StoredResult<&[u8]>) -> CompletedEntry<&[u8]> {
        CompletedEntry { token, completed_ms: 50, own_window: OwnWindow::NONE, fingerprint: None, result }
    }

    fn any_window() -> impl Strategy<Value = OwnWindow> {
        prop_oneof![Just(None), (0..1_u64 << 49).prop_map(Some)]
            .prop_map(|ms| ms.and_then(OwnWindow::from_ms).unwrap_or(OwnWindow::NONE))
    }

    fn any_prior() -> impl Strategy<Value = PriorAttempt> {
        prop_oneof![
            Just(PriorAttempt::Released),
            Just(PriorAttempt::LeaseExpired),
            Just(PriorAttempt::Dropped),
            Just(PriorAttempt::Crashed)
        ]
    }

    fn any_holder() -> impl Strategy<Value = Holder> {
        prop_oneof![
            any_prior().prop_map(Holder::Interrupted),
            (any_prior(), any::<u32>()).prop_map(|(prior, length_ms)| Holder::Released {
                prior,
                backoff: Backoff { until_monotonic_ms: 0, length_ms },
            }),
        ]
    }

    proptest! {
        #[test]
        fn a_varint_is_decoded_as_encoded(value: u64) {
            let mut bytes = Vec::new();
            put_varint(&mut bytes, value);
            let mut reader = Reader::new(&bytes);
            prop_assert_eq!(reader.varint(), Some(value));
            prop_assert!(reader.is_empty());
        }

        #[test]
        fn a_released_record_is_decoded_as_encoded(
            token: u64, attempt: u32, time_ms in 0_u64..u64::MAX, age_ms in 0_u64..1 << 63, fingerprint: Option<Fingerprint>, own_window in any_window(),
            holder in any_holder(), key in proptest::collection::vec(any::<u8>(), 1..60),
        ) {
            let since_ms = time_ms.saturating_sub(age_ms);
            let processing = Processing { token, attempt, since_ms, own_window, fingerprint, holder };
            let mut record = RecordWriter::new(RecordKind::Released, time_ms, 0);
            record.processing(&key, &processing);
            record.processing(&key, &processing);
            let mut seen = 0;
            let read = read_record(&record.finish(), |item| {
                assert_eq!(item, Item::Event(&key, Event::Released(processing.clone())));
                seen += 1;
            });
            prop_assert_eq!(read, Some(time_ms));
            prop_assert_eq!(seen, 2);
        }

        #[test]
        fn an_ended_attempt_is_decoded_as_encoded_and_keys_in_flight_are_rejected(
            token: u64, attempt: u32, since_ms: u64, bucket_age_ms in 0_u64..1 << 40, fingerprint: Option<Fingerprint>, own_window in any_window(),
            prior in any_prior(), length_ms: u32, until_monotonic_ms: u64,
        ) {
            let holder = Holder::Released { prior, backoff: Backoff { until_monotonic_ms, length_ms } };
            let entry = |holder| Entry::Processing(Processing { token, attempt, since_ms, own_window, fingerprint, holder });
            let start_ms = since_ms.saturating_sub(bucket_age_ms);
            let mut value = Vec::new();
            put_value(&entry(holder).borrowed(), start_ms, &mut value).unwrap();
            prop_assert_eq!(read_value(&value, start_ms), Some(entry(holder)));
            value.push(0);
            prop_assert_eq!(read_value(&value, start_ms), None);
            for holder in [
                Holder::Leased { until_monotonic_ms }, Holder::Interrupted(prior), Holder::Resolved(prior), Holder::Committing,
                Holder::CommittingUnclaimed,
            ] {
                prop_assert_eq!(put_value(&entry(holder).borrowed(), start_ms, &mut value), None);
            }
        }

        #[test]
        fn a_completed_record_and_its_bucket_value_are_decoded_as_encoded(
            token: u64, completed_ms: u64, bucket_age_ms in 0_u64..1 << 40, fingerprint: Option<Fingerprint>, own_window in any_window(),
            result in any_result(), key in proptest::collection::vec(any::<u8>(), 1..60),
        ) {
            let done = CompletedEntry { token, completed_ms, own_window, fingerprint, result };
            // A key may be older or newer than its record.
            let records = [
                RecordWriter::new(RecordKind::Completed, completed_ms, 0),
                RecordWriter::new(RecordKind::Completed, completed_ms.saturating_sub(bucket_age_ms), 0),
                RecordWriter::new(RecordKind::Completed, completed_ms.saturating_add(bucket_age_ms), 0),
            ];
            for mut record in records {
                record.event(&key, &Event::Completed(done.borrowed()));
                record.event(&key, &Event::ClaimCompleted(done.borrowed()));
                let record = record.finish();
                let mut read = Vec::new();
                read_record(&record, |item| read.push(item)).unwrap();
                let of_claim = Item::ClaimCompleted { token, completed_ms, result: done.result.as_slice() };
                prop_assert_eq!(read, [Item::Event(&key, Event::Completed(done.borrowed())), of_claim]);
            }

            let start_ms = completed_ms.saturating_sub(bucket_age_ms);
            let mut value = Vec::new();
            put_value(&Entry::Completed(done.borrowed()), start_ms, &mut value).unwrap();
            prop_assert_eq!(read_value(&value, start_ms), Some(Entry::Completed(done)));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..80), start: u64) {
            let _ = read_record(&bytes, |_| {});
            let _ = read_value(&bytes, start);
            let _ = read_span(&bytes);
        }
    }

    #[test]
    fn a_replayed_lease_has_expired() {
        let processing = Processing {
            token: 9,
            attempt: 2,
            since_ms: 40,
            own_window: OwnWindow::NONE,
            fingerprint: Some([7; 16]),
            holder: Holder::Leased { until_monotonic_ms: 77 },
        };
        let mut record = RecordWriter::new(RecordKind::Claimed, 50, 0);
        record.processing(b"\x00k", &processing);
        let expected = Processing { holder: Holder::Leased { until_monotonic_ms: 0 }, ..processing };
        read_record(&record.finish(), |item| assert_eq!(item, Item::Event(b"\x00k", Event::Claimed(expected.clone()))))
            .unwrap();
    }

    #[test]
    fn a_replayed_key_of_an_unfinished_record_call_is_free_and_marked_as_crashed() {
        let unclaimed = Processing {
            token: 9,
            attempt: 1,
            since_ms: 40,
            own_window: OwnWindow::NONE,
            fingerprint: Some([7; 16]),
            holder: Holder::CommittingUnclaimed,
        };
        let mut record = RecordWriter::new(RecordKind::Claimed, 50, 0);
        record.processing(b"k", &unclaimed);
        let record = record.finish();
        let mut read = Vec::new();
        read_record(&record, |item| read.push(item)).unwrap();
        let holder = Holder::Released { prior: PriorAttempt::Crashed, backoff: Backoff::NONE };
        assert_eq!(read, [Item::Event(b"k", Event::Claimed(Processing { holder, ..unclaimed }))]);
    }

    #[test]
    fn a_record_is_empty_until_an_item_is_added() {
        let leased = Holder::Leased { until_monotonic_ms: 0 };
        let processing = Processing {
            token: 1,
            attempt: 1,
            since_ms: 0,
            own_window: OwnWindow::NONE,
            fingerprint: None,
            holder: leased,
        };
        let fills: [fn(&mut RecordWriter, &Processing); 3] = [
            |record, processing| record.processing(b"k", processing),
            |record, _| record.completed(b"k", &done(1, StoredResult::None)),
            |record, _| record.forgotten(b"k", 1),
        ];
        for (fill, kind) in fills.iter().zip([RecordKind::Claimed, RecordKind::Completed, RecordKind::Forgotten]) {
            let mut record = RecordWriter::new(kind, 50, 0);
            let empty = record.bytes.len();
            assert!(record.is_empty());
            fill(&mut record, &processing);
            assert!(!record.is_empty() && record.bytes.len() > empty);
            let mut keys = 0;
            read_record(&record.finish(), |item| keys += usize::from(matches!(item, Item::Event(b"k", _)))).unwrap();
            assert_eq!(keys, 1);
        }
    }

    #[test]
    fn a_varint_of_more_than_64_bits_is_rejected() {
        let of = |last| Reader::new(&[&[0xff; 9][..], &[last]].concat()).varint();
        assert_eq!(of(0x01), Some(u64::MAX));
        for over in [0x02, 0x7f, 0x81, 0xff] {
            assert_eq!(of(over), None, "{over:#x}");
        }
    }

    #[test]
    fn a_value_whose_flags_deny_a_result_that_follows_is_rejected() {
        for result in [StoredResult::None, StoredResult::TooLarge] {
            let mut value = Vec::new();
            put_value(
                &Entry::Completed(CompletedEntry {
                    token: 1,
                    completed_ms: 5,
                    own_window: OwnWindow::NONE,
                    fingerprint: None,
                    result,
                }),
                0,
                &mut value,
            )
            .unwrap();
            assert!(read_value(&value, 0).is_some());
            value.push(b'r');
            assert_eq!(read_value(&value, 0), None, "{result:?}");
        }
    }

    #[test]
    fn a_window_longer_than_any_stores_is_rejected() {
        for (ms, is_read) in [(0, true), ((1 << 48) - 2, true), ((1 << 48) - 1, false), (1 << 48, false)] {
            let mut value = vec![VALUE_FORMAT | OWN_WINDOW, 0, 0];
            put_varint(&mut value, ms);
            let Some(Entry::Completed(done)) = read_value(&value, 0) else {
                assert!(!is_read, "{ms} ms");
                continue;
            };
            assert!(is_read && done.own_window.ms() == Some(ms), "{ms} ms");
        }
    }

    #[test]
    fn a_truncated_record_is_rejected() {
        let mut record = RecordWriter::new(RecordKind::Completed, 50, 0);
        let own_window = OwnWindow::from_ms(300).unwrap();
        let done =
            CompletedEntry { fingerprint: Some([5; 16]), own_window, ..done(300, StoredResult::Bytes(&b"result"[..])) };
        record.completed(b"\x00key", &done);
        let record = record.finish();
        for len in 0..record.len() {
            // The header alone is a record without items.
            assert_eq!(read_record(&record[..len], |_| {}).is_some(), len == 10, "truncated at {len}");
        }
    }

    #[test]
    fn stored_options_are_decoded_as_encoded_and_foreign_bytes_are_rejected() {
        let span = Span { window_ms: 7_000, bucket_ms: 500 };
        let bytes = put_span(span);
        assert_eq!(read_span(&bytes), Some(span));
        let no_window = put_span(Span { window_ms: 0, ..span });
        let no_bucket = put_span(Span { bucket_ms: 0, ..span });
        for foreign in [&bytes[..15], &[&bytes[..], &[0]].concat(), &no_window, &no_bucket] {
            assert_eq!(read_span(foreign), None, "{foreign:?}");
        }
        for on_interrupt in [OnInterrupt::Rerun, OnInterrupt::Hold] {
            assert_eq!(read_on_interrupt(&put_on_interrupt(on_interrupt)), Some(on_interrupt));
        }
        assert_eq!((read_on_interrupt(&[2]), read_on_interrupt(&[])), (None, None));
    }

    #[test]
    fn clock_state_is_decoded_as_encoded_and_numbers_out_of_range_are_rejected() {
        let ahead = Deviation {
            is_ahead: true,
            since_ms: 5,
            least_ms: 6,
            measured_since_ms: 7,
            first_wall_ms: MAX_WALL_MS,
            grown_since_ms: 8,
        };
        let boot = Some(BootTime { id: [7; 16], ms: u64::MAX });
        let step = Step { from_ms: 1, to_ms: 2, by_ms: 3 };
        for boot in [None, boot] {
            for deviation in [None, Some(ahead), Some(Deviation { is_ahead: false, ..ahead })] {
                for steps in [&[][..], &[step], &[step; 3]] {
                    let state = ClockState { boot, lead_ms: 4, deviation, steps: Steps::of(steps).unwrap() };
                    let bytes = put_clock(&state);
                    assert_eq!(read_clock(&bytes), Some(state));
                    for foreign in [&bytes[..bytes.len() - 1], &[&bytes[..], &[0]].concat()] {
                        assert_eq!(read_clock(foreign), None, "{foreign:?}");
                    }
                }
            }
        }
        let none = put_clock(&ClockState::default());
        let four_steps = [none.clone(), [1_u64.to_le_bytes(); 12].concat()].concat();
        let no_step = [none.clone(), vec![0; 24]].concat();
        let too_late = put_clock(&ClockState { lead_ms: MAX_WALL_MS + 1, ..ClockState::default() });
        let no_deviation = [&[CLOCK_AHEAD], &none[1..]].concat();
        for foreign in [&[][..], &four_steps, &no_step, &too_late, &no_deviation, &[0xff; 9]] {
            assert_eq!(read_clock(foreign), None, "{foreign:?}");
        }
    }
}
