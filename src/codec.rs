//! The bytes on disk: journal rows, bucket values, `meta` values, and typed results. Drawn in `docs/format.md`.
//!
//! Every decoder returns `None` for bytes it did not write; none of them panics.

use std::sync::Arc;

use crate::clock::{BootTime, ClockState, Deviation, MAX_WALL_MS, Step, Steps};
use crate::config::{OnInterrupt, Span};
use crate::entry::{Done, Holder, Kept, Prior, Processing};
use crate::key::Fingerprint;

/// The version of everything in this file. A store says which one it was created with.
pub(crate) const FORMAT: u32 = 1;

/// The same with stream time, which a version that knows format 1 alone would take for wall time.
pub(crate) const STREAM_FORMAT: u32 = 2;

// ---------------------------------------------------------------------------------------------------------------
// Primitives
// ---------------------------------------------------------------------------------------------------------------

/// Appends `value` in LEB128: seven bits a byte, the lowest first.
pub(crate) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value as u8) | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Appends a number that may be negative: zigzag, so that small ones stay short.
fn put_signed(out: &mut Vec<u8>, value: i64) {
    put_varint(out, ((value << 1) ^ (value >> 63)) as u64);
}

pub(crate) fn put_prefixed(out: &mut Vec<u8>, bytes: &[u8]) {
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// Reads bytes from the front; `None` where they end too soon.
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(len)?;
        self.0 = tail;
        Some(head)
    }

    pub(crate) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    pub(crate) fn byte(&mut self) -> Option<u8> {
        let (&byte, tail) = self.0.split_first()?;
        self.0 = tail;
        Some(byte)
    }

    pub(crate) fn varint(&mut self) -> Option<u64> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                return None;
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    /// A time that is given by its signed distance before another.
    fn time(&mut self, from_ms: u64) -> Option<u64> {
        let bits = self.varint()?;
        let before = (bits >> 1) as i64 ^ -((bits & 1) as i64);
        if before < 0 { from_ms.checked_add(before.unsigned_abs()) } else { from_ms.checked_sub(before.unsigned_abs()) }
    }

    pub(crate) fn prefixed(&mut self) -> Option<&'a [u8]> {
        let len = usize::try_from(self.varint()?).ok()?;
        self.take(len)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    /// A time that a clock may show, or a distance of two: sums of them stay in range.
    fn clock_ms(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes).filter(|ms| *ms <= MAX_WALL_MS)
    }

    fn fingerprint(&mut self, flags: u8) -> Option<Option<Fingerprint>> {
        if flags & FINGERPRINT == 0 { Some(None) } else { self.array().map(Some) }
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

// What was kept of a result, in two bits.
const KEPT_SHIFT: u32 = 1;
const KEPT_MASK: u8 = 0b0110;
const KEPT_ABSENT: u8 = 0;
const KEPT_STORED: u8 = 1;
const KEPT_OMITTED: u8 = 2;

fn kept_flag<B>(kept: &Kept<B>) -> u8 {
    let bits = match kept {
        Kept::Absent => KEPT_ABSENT,
        Kept::Stored(_) => KEPT_STORED,
        Kept::Omitted => KEPT_OMITTED,
    };
    bits << KEPT_SHIFT
}

fn kept(flags: u8, bytes: &[u8]) -> Option<Kept> {
    match (flags & KEPT_MASK) >> KEPT_SHIFT {
        KEPT_ABSENT if bytes.is_empty() => Some(Kept::Absent),
        KEPT_STORED => Some(Kept::Stored(Arc::from(bytes))),
        KEPT_OMITTED if bytes.is_empty() => Some(Kept::Omitted),
        _ => None,
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Journal rows
// ---------------------------------------------------------------------------------------------------------------

/// ```text
/// row        := format (1) | kind (1) | time in ms (8, little endian) | item*
/// processing := flags (1) | token (varint) | attempt (varint) | age in ms (varint) | [not before, in ms (varint)]
///               | [fingerprint (16)] | key length (varint) | key
/// completed  := flags (1) | token (varint) | [fingerprint (16)] | key length (varint) | key
///               | [result length (varint) | result]
/// forgotten  := token (varint) | key length (varint) | key
/// ```
///
/// In a row of format 2, which a stream store writes, the age is signed (zigzag), and follows the token of `completed`, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RowKind {
    /// Keys that were claimed, or the image of keys in flight that a seal writes at the journal's head.
    Claimed = 1,
    /// Keys that were released, or resolved to run again.
    Settled = 2,
    /// Keys that were completed or recorded.
    Completed = 3,
    /// Keys that were forgotten.
    Forgotten = 4,
}

/// What one item of a journal row says of its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    Claimed(Processing),
    Settled(Processing),
    Completed(Done),
    Forgotten { token: u64 },
}

impl Event {
    /// The time that it gives its key.
    pub(crate) fn time_ms(&self) -> u64 {
        match self {
            Self::Claimed(processing) | Self::Settled(processing) => processing.since_ms,
            Self::Completed(done) => done.completed_ms,
            Self::Forgotten { .. } => 0,
        }
    }
}

const ROW_FORMAT: u8 = 1;
/// Each item has a time of its own.
const STREAM_ROW_FORMAT: u8 = 2;

const HOLDER_SHIFT: u32 = 1;
const HOLDER_MASK: u8 = 0b0000_0110;
const HOLDER_LEASED: u8 = 0;
const HOLDER_INTERRUPTED: u8 = 1;
const HOLDER_OPEN: u8 = 2;
const PRIOR_SHIFT: u32 = 3;
const PRIOR_MASK: u8 = 0b0001_1000;

fn prior_bits(prior: Prior) -> u8 {
    let bits = match prior {
        Prior::Released => 0,
        Prior::LeaseExpired => 1,
        Prior::Dropped => 2,
        Prior::Crashed => 3,
    };
    bits << PRIOR_SHIFT
}

fn prior(flags: u8) -> Prior {
    match (flags & PRIOR_MASK) >> PRIOR_SHIFT {
        0 => Prior::Released,
        1 => Prior::LeaseExpired,
        2 => Prior::Dropped,
        _ => Prior::Crashed,
    }
}

/// Writes one journal row, item by item.
pub(crate) struct RowWriter {
    bytes: Vec<u8>,
    time_ms: u64,
    is_stream: bool,
    items: usize,
}

impl RowWriter {
    pub(crate) fn new(kind: RowKind, time_ms: u64, capacity: usize) -> Self {
        Self::of_format(ROW_FORMAT, kind, time_ms, capacity)
    }

    /// A row whose items have times of their own.
    pub(crate) fn of_messages(kind: RowKind, time_ms: u64, capacity: usize) -> Self {
        Self::of_format(STREAM_ROW_FORMAT, kind, time_ms, capacity)
    }

    fn of_format(format: u8, kind: RowKind, time_ms: u64, capacity: usize) -> Self {
        let mut bytes = Vec::with_capacity(capacity.saturating_add(10));
        bytes.push(format);
        bytes.push(kind as u8);
        bytes.extend_from_slice(&time_ms.to_le_bytes());
        Self { bytes, time_ms, is_stream: format == STREAM_ROW_FORMAT, items: 0 }
    }

    fn age(&mut self, since_ms: u64) {
        if self.is_stream {
            put_signed(&mut self.bytes, self.time_ms.wrapping_sub(since_ms) as i64);
        } else {
            put_varint(&mut self.bytes, self.time_ms.saturating_sub(since_ms));
        }
    }

    /// An item of a `Claimed` or `Settled` row. When a lease runs out is not written: it ends with this process.
    pub(crate) fn processing(&mut self, key: &[u8], processing: &Processing) {
        let mut flags = fingerprint_flag(processing.fingerprint.as_ref());
        let mut not_before = None;
        match processing.holder {
            Holder::Leased { .. } | Holder::Settling => flags |= HOLDER_LEASED << HOLDER_SHIFT,
            Holder::Interrupted(prior) => flags |= HOLDER_INTERRUPTED << HOLDER_SHIFT | prior_bits(prior),
            // Nobody had claimed it, so that nobody's decision is needed should this process die now.
            Holder::Recording => {
                flags |= HOLDER_OPEN << HOLDER_SHIFT | prior_bits(Prior::Crashed);
                not_before = Some(0);
            }
            Holder::Open { prior, not_before_ms } => {
                flags |= HOLDER_OPEN << HOLDER_SHIFT | prior_bits(prior);
                // On stream time a backoff ends with the process.
                not_before = Some(if self.is_stream { 0 } else { not_before_ms });
            }
        }
        self.bytes.push(flags);
        put_varint(&mut self.bytes, processing.token);
        put_varint(&mut self.bytes, u64::from(processing.attempt));
        self.age(processing.since_ms);
        if let Some(not_before_ms) = not_before {
            put_varint(&mut self.bytes, not_before_ms);
        }
        put_fingerprint(&mut self.bytes, processing.fingerprint.as_ref());
        put_prefixed(&mut self.bytes, key);
        self.items += 1;
    }

    /// An item of a `Completed` row. Where its items have no times of their own, the row's time is that of completion.
    pub(crate) fn completed(&mut self, key: &[u8], done: &Done<&[u8]>) {
        let fingerprint = done.fingerprint.as_ref();
        self.bytes.push(fingerprint_flag(fingerprint) | kept_flag(&done.result));
        put_varint(&mut self.bytes, done.token);
        if self.is_stream {
            self.age(done.completed_ms);
        }
        put_fingerprint(&mut self.bytes, fingerprint);
        put_prefixed(&mut self.bytes, key);
        if let Kept::Stored(result) = done.result {
            put_prefixed(&mut self.bytes, result);
        }
        self.items += 1;
    }

    /// An item of a `Forgotten` row: what is known of the key up to `token` is void.
    pub(crate) fn forgotten(&mut self, key: &[u8], token: u64) {
        put_varint(&mut self.bytes, token);
        put_prefixed(&mut self.bytes, key);
        self.items += 1;
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.items == 0
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.bytes
    }
}

/// Reads a journal row: its time, after handing each item's key and event to `visit`. `None` if it is no row.
pub(crate) fn read_row(row: &[u8], mut visit: impl FnMut(&[u8], Event)) -> Option<u64> {
    let mut reader = Reader::new(row);
    let is_stream = match reader.byte()? {
        ROW_FORMAT => false,
        STREAM_ROW_FORMAT => true,
        _ => return None,
    };
    let kind = reader.byte().filter(|kind| (1..=4).contains(kind))?;
    let time_ms = u64::from_le_bytes(reader.array()?);
    while !reader.is_empty() {
        match kind {
            1 => {
                let (key, processing) = read_processing(&mut reader, time_ms, is_stream)?;
                visit(key, Event::Claimed(processing));
            }
            2 => {
                let (key, processing) = read_processing(&mut reader, time_ms, is_stream)?;
                visit(key, Event::Settled(processing));
            }
            3 => {
                let flags = reader.byte()?;
                let token = reader.varint()?;
                let completed_ms = if is_stream { reader.time(time_ms)? } else { time_ms };
                let fingerprint = reader.fingerprint(flags)?;
                let key = reader.prefixed()?;
                let stored = (flags & KEPT_MASK) >> KEPT_SHIFT == KEPT_STORED;
                let result = kept(flags, if stored { reader.prefixed()? } else { &[] })?;
                visit(key, Event::Completed(Done { token, completed_ms, fingerprint, result }));
            }
            4 => {
                let token = reader.varint()?;
                visit(reader.prefixed()?, Event::Forgotten { token });
            }
            _ => return None,
        }
    }
    Some(time_ms)
}

fn read_processing<'a>(reader: &mut Reader<'a>, time_ms: u64, is_stream: bool) -> Option<(&'a [u8], Processing)> {
    let flags = reader.byte()?;
    let token = reader.varint()?;
    let attempt = u32::try_from(reader.varint()?).ok()?;
    let since_ms = if is_stream { reader.time(time_ms)? } else { time_ms.checked_sub(reader.varint()?)? };
    let holder = match (flags & HOLDER_MASK) >> HOLDER_SHIFT {
        HOLDER_LEASED => Holder::Leased { until_monotonic_ms: 0 },
        HOLDER_INTERRUPTED => Holder::Interrupted(prior(flags)),
        HOLDER_OPEN => {
            let not_before_ms = reader.varint()?;
            if is_stream && not_before_ms != 0 {
                return None;
            }
            Holder::Open { prior: prior(flags), not_before_ms }
        }
        _ => return None,
    };
    let fingerprint = reader.fingerprint(flags)?;
    let key = reader.prefixed()?;
    Some((key, Processing { token, attempt, since_ms, fingerprint, holder }))
}

// ---------------------------------------------------------------------------------------------------------------
// Bucket rows
// ---------------------------------------------------------------------------------------------------------------

/// The digest that a bucket's row key begins with, and the encoded key behind it.
pub(crate) fn row_key(digest: u64, key: &[u8], out: &mut Vec<u8>) {
    out.clear();
    out.extend_from_slice(&digest.to_be_bytes());
    out.extend_from_slice(key);
}

/// The digest of a bucket's row key.
pub(crate) fn digest_of_row(row_key: &[u8]) -> Option<u64> {
    Reader::new(row_key).array().map(u64::from_be_bytes)
}

const VALUE_FORMAT: u8 = 0x10;
const VALUE_FORMAT_MASK: u8 = 0xf0;

/// ```text
/// value := format and flags (1) | ms since the bucket's start (varint) | token (varint) | [fingerprint (16)] | result
/// ```
pub(crate) fn put_value(done: &Done<&[u8]>, bucket_start_ms: u64, out: &mut Vec<u8>) {
    out.clear();
    out.push(VALUE_FORMAT | fingerprint_flag(done.fingerprint.as_ref()) | kept_flag(&done.result));
    put_varint(out, done.completed_ms.saturating_sub(bucket_start_ms));
    put_varint(out, done.token);
    put_fingerprint(out, done.fingerprint.as_ref());
    if let Kept::Stored(result) = done.result {
        out.extend_from_slice(result);
    }
}

pub(crate) fn read_value(value: &[u8], bucket_start_ms: u64) -> Option<Done> {
    let mut reader = Reader::new(value);
    let flags = reader.byte()?;
    if flags & VALUE_FORMAT_MASK != VALUE_FORMAT {
        return None;
    }
    let completed_ms = bucket_start_ms.checked_add(reader.varint()?)?;
    let token = reader.varint()?;
    let fingerprint = reader.fingerprint(flags)?;
    let result = kept(flags, reader.rest())?;
    Some(Done { token, completed_ms, fingerprint, result })
}

// ---------------------------------------------------------------------------------------------------------------
// The store's own record of itself
// ---------------------------------------------------------------------------------------------------------------

/// The secret that keys are digested with, written once.
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

/// `clock := flags (1) | [boot id (16) | boot time (8)] | lead (8) | [since (8) | least (8) | measured since (8) | wall then (8)] | step*`,
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
    if let Some(Deviation { since_ms, least_ms, measured_since_ms, first_wall_ms, .. }) = deviation {
        [since_ms, least_ms, measured_since_ms, first_wall_ms]
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
        }),
    };
    let mut steps = Vec::new();
    while !reader.is_empty() {
        let step = Step { from_ms: reader.clock_ms()?, to_ms: reader.clock_ms()?, by_ms: reader.clock_ms()? };
        (step.by_ms > 0).then(|| steps.push(step))?;
    }
    Some(ClockState { boot, lead_ms, deviation, steps: Steps::of(&steps)? })
}

// ---------------------------------------------------------------------------------------------------------------
// Typed results
// ---------------------------------------------------------------------------------------------------------------

/// A typed result as bytes: serde through bincode 2, in its standard configuration.
pub(crate) fn encode_result<T: serde::Serialize>(result: &T) -> Result<Vec<u8>, String> {
    bincode::serde::encode_to_vec(result, bincode::config::standard()).map_err(|error| error.to_string())
}

/// A typed result from bytes, all of which must have been used.
pub(crate) fn decode_result<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    // The limit keeps a length that was never written by us from reserving memory for it.
    let config = bincode::config::standard().with_limit::<{ 64 << 20 }>();
    match bincode::serde::decode_from_slice(bytes, config) {
        Ok((result, used)) if used == bytes.len() => Ok(result),
        Ok((_, used)) => Err(format!("{} bytes are left over", bytes.len().saturating_sub(used))),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_kept() -> impl Strategy<Value = Kept> {
        prop_oneof![
            Just(Kept::Absent),
            Just(Kept::Omitted),
            proptest::collection::vec(any::<u8>(), 0..40).prop_map(|bytes| Kept::Stored(Arc::from(bytes))),
        ]
    }

    fn done(token: u64, result: Kept<&[u8]>) -> Done<&[u8]> {
        Done { token, completed_ms: 50, fingerprint: None, result }
    }

    fn any_prior() -> impl Strategy<Value = Prior> {
        prop_oneof![Just(Prior::Released), Just(Prior::LeaseExpired), Just(Prior::Dropped), Just(Prior::Crashed)]
    }

    fn any_holder() -> impl Strategy<Value = Holder> {
        prop_oneof![
            any_prior().prop_map(Holder::Interrupted),
            (any_prior(), any::<u64>()).prop_map(|(prior, not_before_ms)| Holder::Open { prior, not_before_ms }),
        ]
    }

    proptest! {
        #[test]
        fn a_varint_comes_back(value: u64) {
            let mut bytes = Vec::new();
            put_varint(&mut bytes, value);
            let mut reader = Reader::new(&bytes);
            prop_assert_eq!(reader.varint(), Some(value));
            prop_assert!(reader.is_empty());
        }

        #[test]
        fn a_processing_row_comes_back(
            token: u64, attempt: u32, time_ms in 0_u64..u64::MAX, age_ms in 0_u64..1 << 63, fingerprint: Option<Fingerprint>,
            holder in any_holder(), key in proptest::collection::vec(any::<u8>(), 1..60),
        ) {
            let since_ms = time_ms.saturating_sub(age_ms);
            let processing = Processing { token, attempt, since_ms, fingerprint, holder };
            for mut row in [RowWriter::new(RowKind::Settled, time_ms, 0), RowWriter::of_messages(RowKind::Settled, time_ms, 0)] {
                row.processing(&key, &processing);
                let mut processing = processing.clone();
                if row.is_stream && let Holder::Open { not_before_ms, .. } = &mut processing.holder {
                    *not_before_ms = 0;
                }
                row.processing(&key, &processing);
                let mut seen = 0;
                let read = read_row(&row.finish(), |read_key, event| {
                    assert_eq!((read_key, event), (key.as_slice(), Event::Settled(processing.clone())));
                    seen += 1;
                });
                prop_assert_eq!(read, Some(time_ms));
                prop_assert_eq!(seen, 2);
            }
        }

        #[test]
        fn a_completed_row_and_its_value_come_back(
            token: u64, completed_ms: u64, bucket_age_ms in 0_u64..1 << 40, fingerprint: Option<Fingerprint>,
            result in any_kept(), key in proptest::collection::vec(any::<u8>(), 1..60),
        ) {
            let done = Done { token, completed_ms, fingerprint, result };
            // On stream time a key may be older than its row, and younger.
            let rows = [
                RowWriter::new(RowKind::Completed, completed_ms, 0),
                RowWriter::of_messages(RowKind::Completed, completed_ms.saturating_sub(bucket_age_ms), 0),
                RowWriter::of_messages(RowKind::Completed, completed_ms.saturating_add(bucket_age_ms), 0),
            ];
            for mut row in rows {
                row.completed(&key, &done.borrowed());
                row.completed(&key, &done.borrowed());
                let mut seen = 0;
                read_row(&row.finish(), |read_key, event| {
                    assert_eq!((read_key, event), (key.as_slice(), Event::Completed(done.clone())));
                    seen += 1;
                }).unwrap();
                prop_assert_eq!(seen, 2);
            }

            let start_ms = completed_ms.saturating_sub(bucket_age_ms);
            let mut value = Vec::new();
            put_value(&done.borrowed(), start_ms, &mut value);
            prop_assert_eq!(read_value(&value, start_ms), Some(done));
        }

        #[test]
        fn foreign_bytes_are_refused_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..80), start: u64) {
            let _ = read_row(&bytes, |_, _| {});
            let _ = read_value(&bytes, start);
            let _ = read_span(&bytes);
            let _ = decode_result::<Vec<String>>(&bytes);
        }
    }

    #[test]
    fn a_lease_is_over_when_it_is_read_back() {
        let processing = Processing {
            token: 9,
            attempt: 2,
            since_ms: 40,
            fingerprint: Some([7; 16]),
            holder: Holder::Leased { until_monotonic_ms: 77 },
        };
        let mut row = RowWriter::new(RowKind::Claimed, 50, 0);
        row.processing(b"\x00k", &processing);
        read_row(&row.finish(), |_, event| {
            let expected = Processing { holder: Holder::Leased { until_monotonic_ms: 0 }, ..processing.clone() };
            assert_eq!(event, Event::Claimed(expected));
        })
        .unwrap();
    }

    #[test]
    fn a_key_that_was_being_recorded_is_free_and_crashed_when_it_is_read_back() {
        let recording =
            Processing { token: 9, attempt: 1, since_ms: 40, fingerprint: Some([7; 16]), holder: Holder::Recording };
        let mut row = RowWriter::new(RowKind::Claimed, 50, 0);
        row.processing(b"k", &recording);
        let mut read = Vec::new();
        read_row(&row.finish(), |_, event| read.push(event)).unwrap();
        let holder = Holder::Open { prior: Prior::Crashed, not_before_ms: 0 };
        assert_eq!(read, [Event::Claimed(Processing { holder, ..recording })]);
    }

    #[test]
    fn a_row_is_empty_until_something_is_in_it() {
        let leased = Holder::Leased { until_monotonic_ms: 0 };
        let processing = Processing { token: 1, attempt: 1, since_ms: 0, fingerprint: None, holder: leased };
        let fills: [fn(&mut RowWriter, &Processing); 3] = [
            |row, processing| row.processing(b"k", processing),
            |row, _| row.completed(b"k", &done(1, Kept::Absent)),
            |row, _| row.forgotten(b"k", 1),
        ];
        for (fill, kind) in fills.iter().zip([RowKind::Claimed, RowKind::Completed, RowKind::Forgotten]) {
            let mut row = RowWriter::new(kind, 50, 0);
            let empty = row.len();
            assert!(row.is_empty());
            fill(&mut row, &processing);
            assert!(!row.is_empty() && row.len() > empty);
            let mut keys = 0;
            read_row(&row.finish(), |key, _| keys += usize::from(key == b"k")).unwrap();
            assert_eq!(keys, 1);
        }
    }

    #[test]
    fn a_number_of_more_than_64_bits_is_refused() {
        let of = |last| Reader::new(&[&[0xff; 9][..], &[last]].concat()).varint();
        assert_eq!(of(0x01), Some(u64::MAX));
        for over in [0x02, 0x7f, 0x81, 0xff] {
            assert_eq!(of(over), None, "{over:#x}");
        }
    }

    #[test]
    fn a_value_that_says_it_has_no_result_and_has_one_is_refused() {
        for result in [Kept::Absent, Kept::Omitted] {
            let mut value = Vec::new();
            put_value(&Done { token: 1, completed_ms: 5, fingerprint: None, result }, 0, &mut value);
            assert!(read_value(&value, 0).is_some());
            value.push(b'r');
            assert_eq!(read_value(&value, 0), None, "{result:?}");
        }
    }

    #[test]
    fn a_cut_row_is_refused() {
        let mut row = RowWriter::new(RowKind::Completed, 50, 0);
        let done = Done { fingerprint: Some([5; 16]), ..done(300, Kept::Stored(&b"result"[..])) };
        let mut stream_row = RowWriter::of_messages(RowKind::Completed, 50, 0);
        row.completed(b"\x00key", &done);
        stream_row.completed(b"\x00key", &done);
        for row in [row.finish(), stream_row.finish()] {
            for len in 0..row.len() {
                // A row of a head alone is a row without items.
                assert_eq!(read_row(&row[..len], |_, _| {}).is_some(), len == 10, "cut at {len}");
            }
        }
    }

    #[test]
    fn the_options_of_a_store_come_back_and_others_are_refused() {
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
    fn the_state_of_the_clocks_is_read_back_and_numbers_out_of_range_are_refused() {
        let ahead =
            Deviation { is_ahead: true, since_ms: 5, least_ms: 6, measured_since_ms: 7, first_wall_ms: MAX_WALL_MS };
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

    #[test]
    fn typed_results_come_back_and_others_are_refused() {
        let bytes = encode_result(&("charge-1", 1_200_u64)).unwrap();
        assert_eq!(decode_result::<(String, u64)>(&bytes), Ok(("charge-1".to_owned(), 1_200)));
        assert!(decode_result::<(String, u64, u64)>(&bytes).is_err());
        assert!(decode_result::<String>(&bytes).unwrap_err().contains("left over"));
    }
}
