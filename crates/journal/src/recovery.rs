//! Recovery: finds the last checkpoint and the records after it, and tells a torn tail from corruption.
//!
//! A power cut may lose any write that was not synced, and tear it. So the journal ends at the first fragment that is missing
//! or not valid. That is corruption if any fragment or header says that what is missing there was on disk already; otherwise
//! it is a torn tail, and the journal continues in its place.

use std::collections::VecDeque;
use std::sync::Arc;

use super::error::{Error, Result, corrupt, unknown};
use super::medium::{Medium, MediumFile};
use super::output::{Segment, Start};
use super::record::{Fragment, Kind};
use super::segment::{self, Fragments, Header, JournalId, Slot, Use};

/// The bytes before the payload of a checkpoint: the lsn at which the replay begins.
pub(crate) const REPLAY_FROM: usize = 8;

/// What a recovery returns, in this order: one checkpoint, then records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recovered<'a> {
    /// The last checkpoint.
    Checkpoint(&'a [u8]),
    /// A record that was appended at or after the position of the checkpoint.
    Record(&'a [u8]),
}

/// What an open found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Report {
    /// The number of records that were replayed.
    pub records: u64,
    /// The bytes of their payloads.
    pub bytes: u64,
    /// Where a record with several fragments, or a segment, was torn, if one was. A torn record of one fragment leaves no trace
    /// that differs from unused space.
    pub torn: Option<String>,
}

/// A segment that was used, and what it holds.
#[derive(Debug)]
struct Scanned<F> {
    slot: Arc<Slot<F>>,
    header: Header,
    /// Where the last valid fragment ends, and the lsn of the fragment that would follow.
    end: usize,
    next_lsn: u64,
    /// The lsn of each checkpoint's first fragment, and the lsn at which its replay begins.
    checkpoints: Vec<(u64, u64)>,
    /// The highest durable lsn that is stated before and after the end.
    durable_lsn: u64,
}

impl<F> Scanned<F> {
    fn end_place(&self) -> String {
        format!("{} at offset {}", self.slot.place, self.end)
    }
}

/// The segments of a replay, in order, each with the lsn at which its records end.
struct Chain<'s, F> {
    segments: Vec<(&'s Scanned<F>, u64)>,
    replay_from: u64,
    checkpoint: u64,
}

/// Reads a journal, and passes its last checkpoint and the records after it to `visit`.
pub(crate) fn recover<M: Medium>(
    medium: &M,
    mut visit: impl FnMut(Recovered<'_>) -> Result<()>,
) -> Result<(Start<M::File>, Report)> {
    let (scanned, mut spares) = scan(medium)?;
    let Some(any) = scanned.first() else {
        let place = medium.place("");
        let is_missing = spares.is_empty();
        return Err(if is_missing {
            Error::Missing { place }
        } else {
            corrupt(place, "no segment of the journal was ever used")
        });
    };
    let journal = any.header.journal;
    if let Some(other) = scanned.iter().find(|segment| segment.header.journal != journal) {
        return Err(corrupt(&other.slot.place, format!("it and {} are of different journals", any.slot.place)));
    }
    let durable_lsn = scanned.iter().map(|segment| segment.durable_lsn).max().unwrap_or(0);
    let mut found = None;
    for chain in chains(&scanned) {
        // Its checkpoint may be torn: then the one before it counts, whose segments are still there.
        if let Some(end) = check(&chain)? {
            found = Some((chain, end));
            break;
        }
    }
    let Some((chain, end)) = found else { return Err(without_checkpoint(&scanned)) };
    if durable_lsn > end.lsn {
        let detail = format!("record {} is damaged or missing, and a later one says that it was on disk", end.lsn);
        if let Some(segment) = incomplete(&scanned) {
            return Err(corrupt(segment.end_place(), detail));
        }
        let next = medium.place(&segment::name(end.segment.header.next_slot));
        return Err(corrupt(end.place(), format!("{detail}; or it was in {next}")));
    }
    // Each segment names one that was created before it, also if its own records are given up: the end of a record that was on
    // disk may have been in the one that is missing.
    let exists =
        |slot: &u32| scanned.iter().map(|segment| &segment.slot).chain(&spares).any(|existing| existing.slot == *slot);
    if let Some(missing) = chain.segments.iter().map(|(segment, _)| segment.header.next_slot).find(|slot| !exists(slot))
    {
        return Err(corrupt(medium.place(&segment::name(missing)), "the segment is missing"));
    }
    // What begins at the end or after it has nothing that counts, and is given up: the journal continues in its place.
    let kept = || chain.segments.iter().map(|(segment, _)| *segment).filter(|kept| kept.header.first_lsn < end.lsn);
    let previous = kept().next_back().map_or(0, |segment| segment.header.number);
    let next_slot = kept().next_back().map(|segment| segment.header.next_slot);
    let segments: VecDeque<_> =
        kept().map(|kept| Segment { slot: Arc::clone(&kept.slot), first_lsn: kept.header.first_lsn }).collect();
    let is_kept = |slot: u32| segments.iter().any(|segment| segment.slot.slot == slot);
    spares.extend(scanned.iter().map(|segment| Arc::clone(&segment.slot)).filter(|slot| !is_kept(slot.slot)));
    // The chain continues in the slot that its last header names.
    let Some(at) = spares.iter().position(|slot| Some(slot.slot) == next_slot) else {
        let name = medium.place(&segment::name(next_slot.unwrap_or_default()));
        return Err(corrupt(name, "the segment is missing"));
    };
    spares.swap(0, at);
    // Before it is passed on: a killed process may have left it unsynced, and a caller may store what follows from it.
    for segment in &segments {
        segment.slot.file.sync().map_err(|error| unknown("syncing", &segment.slot.place, error))?;
    }
    let mut replay = Replay::default();
    deliver(&chain, end.lsn, &mut replay, &mut visit)?;
    let last_number = scanned.iter().map(|segment| segment.header.number).max().unwrap_or(0);
    let report = Report { records: replay.records, bytes: replay.bytes, torn: end.torn() };
    let (replay_from, next_lsn) = (chain.replay_from, end.lsn);
    Ok((Start { journal, segments, spares, last_number, previous, next_lsn, replay_from }, report))
}

/// The error of a journal that has no complete checkpoint.
fn without_checkpoint<F>(scanned: &[Scanned<F>]) -> Error {
    const DETAIL: &str = "damaged or missing, and the journal has no complete checkpoint";
    if let Some(segment) = incomplete(scanned) {
        return corrupt(segment.end_place(), format!("a record is {DETAIL}"));
    }
    let place = newest(scanned).last().map_or("the journal", |first| &first.slot.place);
    corrupt(place, format!("its first record, or the segment before it, is {DETAIL}"))
}

/// The newest segment and those before it, as far as they are there.
fn newest<F>(scanned: &[Scanned<F>]) -> impl Iterator<Item = &Scanned<F>> {
    std::iter::successors(scanned.last(), move |next| previous(scanned, next))
}

/// The newest segment that ends before it should.
fn incomplete<F>(scanned: &[Scanned<F>]) -> Option<&Scanned<F>> {
    let nexts = newest(scanned).map(|next| next.header.first_lsn);
    let last_end = newest(scanned).next().map(|last| last.durable_lsn);
    let mut ends = last_end.into_iter().chain(nexts);
    newest(scanned).find(|segment| ends.next().is_some_and(|end| segment.next_lsn < end))
}

type Slots<F> = VecDeque<Arc<Slot<F>>>;
type Scan<F> = (Vec<Scanned<F>>, Slots<F>);

/// Reads all slots: those that were used, by number, and those that were not.
fn scan<M: Medium>(medium: &M) -> Result<Scan<M::File>> {
    let names = medium.names().map_err(|error| super::error::not_written("listing", &medium.place(""), error))?;
    let mut slots: Vec<u32> = names.iter().filter_map(|name| segment::slot(name)).collect();
    slots.sort_unstable();
    let (mut scanned, mut blank) = (Vec::new(), VecDeque::new());
    for slot in slots {
        let slot = Arc::new(Slot::open(medium, slot)?);
        match slot.header()? {
            Use::Blank => blank.push_back(slot),
            Use::Used(header) => scanned.push(scan_segment(slot, header)?),
        }
    }
    scanned.sort_by_key(|segment| segment.header.number);
    Ok((scanned, blank))
}

fn scan_segment<F: super::medium::MediumFile>(slot: Arc<Slot<F>>, header: Header) -> Result<Scanned<F>> {
    let content = slot.read(slot.bytes)?;
    let mut fragments = Fragments::of(&content, &header);
    let (mut checkpoints, mut durable_lsn) = (Vec::new(), header.durable_lsn);
    for (fragment, payload) in fragments.by_ref() {
        durable_lsn = durable_lsn.max(fragment.durable_lsn);
        if fragment.kind == Kind::Checkpoint
            && fragment.part.begins()
            && let Some(replay_from) = payload.first_chunk().map(|bytes| u64::from_le_bytes(*bytes))
            && replay_from <= fragment.lsn
        {
            checkpoints.push((fragment.lsn, replay_from));
        }
    }
    durable_lsn = durable_lsn.max(fragments.durable_lsn_after_end());
    let (end, next_lsn) = (fragments.offset, fragments.lsn);
    Ok(Scanned { slot, header, end, next_lsn, checkpoints, durable_lsn })
}

/// The chains that may be the journal, the one with the newest checkpoint first.
///
/// A checkpoint that an open gave up never returns, although its segment may still be there: nothing is written to a segment
/// that was given up, and no later one continues it, because a new number is higher than all that can be read.
fn chains<F>(scanned: &[Scanned<F>]) -> impl Iterator<Item = Chain<'_, F>> {
    scanned.iter().rev().flat_map(move |segment| {
        segment.checkpoints.iter().rev().filter_map(move |(checkpoint, replay_from)| {
            let segments = chain(scanned, segment, *checkpoint, *replay_from)?;
            Some(Chain { segments, replay_from: *replay_from, checkpoint: *checkpoint })
        })
    })
}

/// The segments from the one that has `replay_from` to the end. `None` if one is missing before `at`, or if `at` has no
/// record of `checkpoint` any more because the journal continued before it.
fn chain<'s, F>(
    scanned: &'s [Scanned<F>],
    at: &'s Scanned<F>,
    checkpoint: u64,
    replay_from: u64,
) -> Option<Vec<(&'s Scanned<F>, u64)>> {
    let mut segments = VecDeque::from([at]);
    while let Some(first) = segments.front().filter(|first| first.header.first_lsn > replay_from) {
        segments.push_front(previous(scanned, first)?);
    }
    while let Some(last) = segments.back() {
        let next = scanned.iter().find(|next| {
            next.header.previous == last.header.number
                && next.header.number > last.header.number
                && next.slot.slot == last.header.next_slot
        });
        let Some(next) = next else { break };
        segments.push_back(next);
    }
    let nexts = segments.iter().skip(1).map(|next| next.header.first_lsn).chain([u64::MAX]);
    let ends: Vec<_> = segments.iter().copied().zip(nexts).collect();
    // What a segment has at or after the first lsn of its successor was given up by an open.
    let is_valid = ends.iter().any(|(segment, end)| std::ptr::eq(*segment, at) && checkpoint < *end);
    is_valid.then_some(ends)
}

/// The segment before another one.
fn previous<'s, F>(scanned: &'s [Scanned<F>], next: &Scanned<F>) -> Option<&'s Scanned<F>> {
    scanned.iter().find(|segment| {
        segment.header.number == next.header.previous
            && segment.header.number < next.header.number
            && segment.header.next_slot == next.slot.slot
    })
}

/// Where a chain ends.
#[derive(Debug)]
struct End<'s, F> {
    lsn: u64,
    /// The segment that has the first missing fragment, and where it would be.
    segment: &'s Scanned<F>,
    is_torn: bool,
}

impl<F> End<'_, F> {
    fn place(&self) -> String {
        self.segment.end_place()
    }

    fn torn(&self) -> Option<String> {
        self.is_torn.then(|| self.place())
    }
}

/// Finds the end of a chain: the first fragment that is missing, or the first one of a record that is incomplete. `None` if
/// that is before the end of the checkpoint.
fn check<'s, F: super::medium::MediumFile>(chain: &Chain<'s, F>) -> Result<Option<End<'s, F>>> {
    let mut open = None;
    let mut is_complete = false;
    let mut end = None;
    for (segment, next_first_lsn) in &chain.segments {
        let content = segment.slot.read(segment.end)?;
        let fragments = Fragments::of(&content, &segment.header).map(|(fragment, _)| fragment);
        let mut lsn = segment.header.first_lsn;
        for fragment in fragments.take_while(|fragment| fragment.lsn < *next_first_lsn) {
            lsn = fragment.lsn + 1;
            if fragment.lsn < chain.replay_from {
                continue;
            }
            if !follows(open, fragment) {
                let place = format!("{} at record {}", segment.slot.place, fragment.lsn);
                return Err(corrupt(place, "a part of a record is without the others"));
            }
            open = (!fragment.part.ends()).then_some(if fragment.part.begins() {
                fragment.lsn
            } else {
                open.unwrap_or(0)
            });
            is_complete |= fragment.part.ends() && open.is_none() && chain.checkpoint <= fragment.lsn;
        }
        let is_torn = *next_first_lsn != u64::MAX && lsn < *next_first_lsn;
        end = Some(End { lsn, segment, is_torn });
        if is_torn {
            break;
        }
    }
    let Some(mut end) = end.filter(|_| is_complete) else { return Ok(None) };
    if let Some(first) = open {
        end = End { lsn: first, is_torn: true, ..end };
    }
    Ok(Some(end))
}

/// Whether a fragment may follow: the first one of a record, or another one of the record that is open.
fn follows(open: Option<u64>, fragment: Fragment) -> bool {
    open.is_none() == fragment.part.begins()
}

#[derive(Debug, Default)]
struct Replay {
    records: u64,
    bytes: u64,
    /// The payload of a record with several fragments, as far as it is read.
    payload: Vec<u8>,
}

/// Passes the checkpoint, and then the records from its position up to `end_lsn`, to `visit`.
fn deliver<F: super::medium::MediumFile>(
    chain: &Chain<'_, F>,
    end_lsn: u64,
    replay: &mut Replay,
    visit: &mut impl FnMut(Recovered<'_>) -> Result<()>,
) -> Result<()> {
    each_record(chain, chain.checkpoint, end_lsn, replay, |_, kind, lsn, payload| {
        if kind == Kind::Checkpoint && lsn == chain.checkpoint {
            visit(Recovered::Checkpoint(payload.get(REPLAY_FROM..).unwrap_or_default()))?;
        }
        Ok(lsn < chain.checkpoint)
    })?;
    each_record(chain, chain.replay_from, end_lsn, replay, |replay, kind, _, payload| {
        if kind == Kind::Data {
            replay.0 += 1;
            replay.1 += payload.len() as u64;
            visit(Recovered::Record(payload))?;
        }
        Ok(true)
    })
}

/// Visits the records of the segments from `from_lsn` on, until `visit` returns false. Passes the lsn of a record's first
/// fragment.
fn each_record<F: super::medium::MediumFile>(
    chain: &Chain<'_, F>,
    from_lsn: u64,
    end_lsn: u64,
    replay: &mut Replay,
    mut visit: impl FnMut(&mut (u64, u64), Kind, u64, &[u8]) -> Result<bool>,
) -> Result<()> {
    let mut counts = (replay.records, replay.bytes);
    let mut first_lsn = 0;
    replay.payload.clear();
    'segments: for (segment, next_first_lsn) in &chain.segments {
        if *next_first_lsn <= from_lsn {
            continue;
        }
        let content = segment.slot.read(segment.end)?;
        let fragments = Fragments::of(&content, &segment.header)
            .skip_while(|(next, _)| next.lsn < from_lsn)
            .take_while(|(next, _)| next.lsn < end_lsn.min(*next_first_lsn));
        for (fragment, payload) in fragments {
            let goes_on = if fragment.part.begins() && fragment.part.ends() {
                visit(&mut counts, fragment.kind, fragment.lsn, payload)?
            } else {
                if fragment.part.begins() {
                    replay.payload.clear();
                    first_lsn = fragment.lsn;
                }
                replay.payload.extend_from_slice(payload);
                !fragment.part.ends() || visit(&mut counts, fragment.kind, first_lsn, &replay.payload)?
            };
            if !goes_on {
                break 'segments;
            }
        }
    }
    (replay.records, replay.bytes) = counts;
    Ok(())
}

/// The id of a new journal.
pub(crate) fn new_id() -> Result<JournalId> {
    Ok((u128::from(random()?) << 64 | u128::from(random()?)).to_le_bytes())
}

/// A random number.
pub(crate) fn random() -> Result<u64> {
    let mut number = [0; 8];
    getrandom::fill(&mut number)
        .map_err(|error| super::error::not_written("reading random numbers for", "a journal", error.into()))?;
    Ok(u64::from_le_bytes(number))
}
