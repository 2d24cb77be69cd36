//! Batches of lines between the reader thread and the store.

use std::convert::Infallible;

use anyhow::Context;
use crossbeam::channel::{Receiver, TryRecvError, select};
use onlyonce::Key;

/// A batch with this many bytes is full, so that long lines do not use unbounded memory.
const FULL_BYTES: usize = 1 << 20;

/// Lines in the order of the input.
#[derive(Default)]
pub(crate) struct Batch {
    bytes: Vec<u8>,
    lines: Vec<Line>,
}

struct Line {
    /// Where the line ends in `Batch::bytes`. It begins where the line before it ends.
    end: usize,
    subject: Subject,
}

/// Whether a line has a key.
pub(crate) enum Subject {
    Key(Key<'static>),
    /// The line must have a key and has none.
    Missing,
    /// The line contains only white space.
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

    /// The total length of all lines.
    pub(crate) fn len_bytes(&self) -> usize {
        self.bytes.len()
    }

    pub(crate) fn keys(&self) -> impl Iterator<Item = &Key<'static>> {
        self.lines.iter().filter_map(|line| if let Subject::Key(key) = &line.subject { Some(key) } else { None })
    }

    /// The lines and their subjects. An error is a bug in this module.
    pub(crate) fn iter(&self) -> impl Iterator<Item = anyhow::Result<(&[u8], &Subject)>> {
        let mut start = 0;
        self.lines.iter().map(move |line| {
            let bytes = self.bytes.get(start..line.end).with_context(|| {
                format!("internal error: a line ends at byte {} of a batch of {}", line.end, self.bytes.len())
            })?;
            start = line.end;
            Ok((bytes, &line.subject))
        })
    }
}

/// What [`Intake::take`] returns.
pub(crate) enum Taken {
    Batch(Batch),
    /// The reader has finished.
    End,
    Interrupted,
}

/// Joins the batches that the reader has ready into one. Under load a batch reaches its limit; a line that arrives alone is
/// a batch of its own.
pub(crate) struct Intake {
    pub(crate) read: Receiver<Batch>,
    /// Disconnected by Ctrl-C.
    pub(crate) interrupt: Receiver<Infallible>,
    pub(crate) limit: usize,
    /// A received batch that did not fit into the last one.
    pub(crate) left_over: Batch,
}

impl Intake {
    pub(crate) fn take(&mut self) -> Taken {
        // Checked here too, because `select!` is not reached while a batch is left over.
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
            Taken::Batch(batch) => batch.iter().map(|line| format!("{} ", line.unwrap().0.escape_ascii())).collect(),
            Taken::End => "end".to_owned(),
            Taken::Interrupted => "interrupted".to_owned(),
        }
    }

    #[test]
    fn ready_lines_are_joined_up_to_the_limit() {
        let (batches, _interrupter, mut intake) = intake(3, &[&["a"], &["b", "c"], &["d", "e"], &["f", "g", "h"]]);
        drop(batches);
        for expected in ["a b c ", "d e ", "f g h ", "end"] {
            assert_eq!(lines(&intake.take()), expected);
        }
    }

    #[test]
    fn a_batch_of_long_lines_is_full_before_the_limit() {
        let large = "x".repeat(FULL_BYTES / 2 + 1);
        let (_batches, _interrupter, mut intake) = intake(100, &[&[&large], &[&large], &["a"]]);
        assert_eq!(lines(&intake.take()).len(), large.len() + 1);
        assert_eq!(lines(&intake.take()).len(), large.len() + 3);
        assert!(batch(&[&large, &large]).is_full(100));
    }

    #[test]
    fn an_interrupt_takes_priority_over_ready_lines() {
        let (_batches, interrupter, mut intake) = intake(1, &[&["a"], &["b"], &["c"]]);
        assert_eq!(lines(&intake.take()), "a ");
        drop(interrupter);
        assert_eq!(lines(&intake.take()), "interrupted");
    }

    #[test]
    fn a_line_out_of_range_is_an_error_and_not_an_empty_line() {
        let mut batch = batch(&["a", "b"]);
        batch.bytes.pop();
        let mut lines = batch.iter();
        assert_eq!(lines.next().unwrap().unwrap().0, b"a");
        let error = lines.next().unwrap().map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("ends at byte 2 of a batch of 1"), "{error}");
    }
}
