//! Lines on their way from the input to the store.

use std::convert::Infallible;

use crossbeam::channel::{Receiver, TryRecvError, select};
use onlyonce::Key;

/// Bounds the memory of a batch, whatever its lines are like: with so many bytes it is full.
const FULL_BYTES: usize = 1 << 20;

/// Lines in the order of the input, each with what it is about.
#[derive(Default)]
pub(crate) struct Batch {
    bytes: Vec<u8>,
    lines: Vec<Line>,
}

struct Line {
    end: usize,
    subject: Subject,
}

/// What a line is about.
pub(crate) enum Subject {
    Key(Key<'static>),
    /// It should have a key and has none.
    Missing,
    /// It holds nothing.
    Blank,
}

impl Batch {
    pub(crate) fn push(&mut self, line: &[u8], subject: Subject) {
        self.bytes.extend_from_slice(line);
        self.lines.push(Line { end: self.bytes.len(), subject });
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
        self.lines.iter().filter_map(|line| if let Subject::Key(key) = &line.subject { Some(key) } else { None })
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&[u8], &Subject)> {
        let mut start = 0;
        self.lines.iter().map(move |line| {
            let bytes = self.bytes.get(start..line.end).unwrap_or_default();
            start = line.end;
            (bytes, &line.subject)
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
        // Also where the reader is always ahead, so that there is nothing to wait for.
        if self.interrupt.try_recv() == Err(TryRecvError::Disconnected) {
            return Taken::Interrupted;
        }
        let mut batch = std::mem::take(&mut self.left_over);
        if batch.is_empty() {
            batch = select! {
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

#[cfg(test)]
mod tests {
    use crossbeam::channel::{Sender, bounded};

    use super::*;

    fn batch(lines: &[&str]) -> Batch {
        let mut batch = Batch::default();
        lines.iter().for_each(|line| batch.push(line.as_bytes(), Subject::Missing));
        batch
    }

    fn intake(limit: usize, read: &[&[&str]]) -> (Sender<Batch>, Sender<Infallible>, Intake) {
        let (batches, receiver) = bounded(read.len());
        read.iter().for_each(|lines| batches.send(batch(lines)).unwrap());
        let (interrupter, interrupt) = bounded(0);
        (batches, interrupter, Intake { read: receiver, interrupt, limit, left_over: Batch::default() })
    }

    fn lines(taken: &Taken) -> String {
        match taken {
            Taken::Batch(batch) => batch.iter().map(|(line, _)| format!("{} ", line.escape_ascii())).collect(),
            Taken::End => "end".to_owned(),
            Taken::Interrupted => "interrupted".to_owned(),
        }
    }

    #[test]
    fn what_is_ready_is_one_batch_of_no_more_than_the_limit() {
        let (batches, _interrupter, mut intake) = intake(3, &[&["a"], &["b", "c"], &["d", "e"], &["f", "g", "h"]]);
        drop(batches);
        for expected in ["a b c ", "d e ", "f g h ", "end"] {
            assert_eq!(lines(&intake.take()), expected);
        }
    }

    #[test]
    fn a_batch_of_large_lines_is_full_earlier() {
        let large = "x".repeat(FULL_BYTES / 2 + 1);
        let (_batches, _interrupter, mut intake) = intake(100, &[&[&large], &[&large], &["a"]]);
        assert_eq!(lines(&intake.take()).len(), large.len() + 1);
        assert_eq!(lines(&intake.take()).len(), large.len() + 3);
        assert!(batch(&[&large, &large]).is_full(100));
    }

    #[test]
    fn an_interrupt_comes_first_however_much_is_ready() {
        let (_batches, interrupter, mut intake) = intake(1, &[&["a"], &["b"], &["c"]]);
        assert_eq!(lines(&intake.take()), "a ");
        drop(interrupter);
        assert_eq!(lines(&intake.take()), "interrupted");
    }
}
