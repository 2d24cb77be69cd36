//! Lines on their way from the input to the store.

use std::convert::Infallible;

use crossbeam::channel::{Receiver, select_biased};
use onlyonce::Key;

/// Bounds the memory of a batch, whatever its lines are like: with so many bytes it is full.
const FULL_BYTES: usize = 1 << 20;

/// Lines in the order of the input, each with its key if it has one.
#[derive(Default)]
pub(crate) struct Batch {
    bytes: Vec<u8>,
    lines: Vec<Line>,
}

struct Line {
    end: usize,
    key: Option<Key<'static>>,
}

impl Batch {
    pub(crate) fn push(&mut self, line: &[u8], key: Option<Key<'static>>) {
        self.bytes.extend_from_slice(line);
        self.lines.push(Line { end: self.bytes.len(), key });
    }

    pub(crate) fn append(&mut self, other: Self) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&other.bytes);
        self.lines.extend(other.lines.into_iter().map(|line| Line { end: start + line.end, ..line }));
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    pub(crate) fn is_full(&self, limit: usize) -> bool {
        self.lines.len() >= limit || self.bytes.len() >= FULL_BYTES
    }

    fn has_room_for(&self, other: &Self, limit: usize) -> bool {
        self.lines.len() + other.lines.len() <= limit && self.bytes.len() + other.bytes.len() <= FULL_BYTES
    }

    /// Bytes of all lines.
    pub(crate) fn len_bytes(&self) -> usize {
        self.bytes.len()
    }

    pub(crate) fn keys(&self) -> impl Iterator<Item = &Key<'static>> {
        self.lines.iter().filter_map(|line| line.key.as_ref())
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&[u8], Option<&Key<'static>>)> {
        let mut start = 0;
        self.lines.iter().map(move |line| {
            let bytes = self.bytes.get(start..line.end).unwrap_or_default();
            start = line.end;
            (bytes, line.key.as_ref())
        })
    }
}

/// What comes out of an [`Intake`].
pub(crate) enum Taken {
    Batch(Batch),
    /// The reader is done.
    End,
    Interrupted,
}

/// Takes what the reader has ready, and makes one batch of it: under load a batch is as large as it may be, and a line
/// that comes alone goes alone.
pub(crate) struct Intake {
    pub(crate) read: Receiver<Batch>,
    /// Disconnected when the user interrupts.
    pub(crate) interrupt: Receiver<Infallible>,
    pub(crate) limit: usize,
    /// What was received and had no room.
    pub(crate) left_over: Batch,
}

impl Intake {
    pub(crate) fn take(&mut self) -> Taken {
        let mut batch = std::mem::take(&mut self.left_over);
        if batch.is_empty() {
            batch = select_biased! {
                recv(self.interrupt) -> _ => return Taken::Interrupted,
                recv(self.read) -> read => match read {
                    Ok(batch) => batch,
                    Err(_) => return Taken::End,
                },
            };
        }
        while let Ok(next) = self.read.try_recv() {
            if !batch.has_room_for(&next, self.limit) {
                self.left_over = next;
                break;
            }
            batch.append(next);
        }
        Taken::Batch(batch)
    }
}
