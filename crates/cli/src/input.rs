//! Reads lines from files and standard input on a thread of its own, so that reading and parsing overlap with the work of
//! the store.

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;

use anyhow::{Context, bail, ensure};
use crossbeam::channel::Sender;

use crate::args::OnMissingKey;
use crate::batch::{Batch, Subject};
use crate::line_key::LineKey;

/// The byte order mark of UTF-8. It is not part of the text.
const MARK: &[u8] = b"\xef\xbb\xbf";
/// The byte order marks of UTF-16 and UTF-32, where "\n" is more than one byte.
const FOREIGN_MARKS: [&[u8]; 3] = [b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"];

/// The size of the read buffer.
const READ_BYTES: usize = 256 * 1024;

/// An input.
pub(crate) enum Source {
    Stdin,
    File(PathBuf),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdin => f.write_str("<stdin>"),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

impl Source {
    fn open(&self) -> anyhow::Result<Box<dyn Read>> {
        Ok(match self {
            Self::Stdin => Box::new(std::io::stdin().lock()),
            Self::File(path) => Box::new(File::open(path)?),
        })
    }
}

/// The inputs that the arguments name, and their total size if it is known. A missing file is an error here, before anything
/// is read.
pub(crate) fn sources(files: &[PathBuf]) -> anyhow::Result<(Vec<Source>, Option<u64>)> {
    if files.is_empty() {
        return Ok((vec![Source::Stdin], None));
    }
    let mut sources = Vec::new();
    let mut bytes = Some(0);
    for path in files {
        if path.as_os_str() == "-" {
            bytes = None;
            sources.push(Source::Stdin);
            continue;
        }
        let metadata = path.metadata().with_context(|| format!("cannot read {}", path.display()))?;
        ensure!(!metadata.is_dir(), "cannot read {}: it is a directory", path.display());
        bytes = bytes.filter(|_| metadata.is_file()).map(|bytes| bytes + metadata.len());
        sources.push(Source::File(path.clone()));
    }
    Ok((sources, bytes))
}

/// How lines are read and keyed.
pub(crate) struct Reading {
    pub(crate) line_key: LineKey,
    pub(crate) on_missing_key: OnMissingKey,
    pub(crate) max_line: u64,
    pub(crate) batch: usize,
}

impl Reading {
    /// Sends all lines in batches, until the input ends or the receiver is dropped. Lines before an error are sent before the
    /// error is returned.
    pub(crate) fn read(&self, sources: &[Source], batches: &Sender<Batch>) -> anyhow::Result<()> {
        for source in sources {
            let input = source.open().with_context(|| format!("cannot read {source}"))?;
            let mut lines = Lines { input: BufReader::with_capacity(READ_BYTES, input), line: Vec::new(), number: 0 };
            let mut more = true;
            while more {
                let mut batch = Batch::default();
                let filled = self.fill(&mut batch, &mut lines);
                if !batch.is_empty() && batches.send(batch).is_err() {
                    return Ok(());
                }
                more = filled.with_context(|| format!("{source}:{}", lines.number))?;
            }
        }
        Ok(())
    }

    /// Fills a batch with the lines that are buffered, and waits for at most one. Returns false at the end of the input.
    fn fill(&self, batch: &mut Batch, lines: &mut Lines<impl Read>) -> anyhow::Result<bool> {
        while !batch.is_full(self.batch) {
            let Some(line) = lines.next(self.max_line)? else { return Ok(false) };
            // Not only on the first line: `cat` may have joined several files.
            let line = if self.line_key.is_json() { without_mark(line) } else { line };
            let text = line.strip_suffix(b"\n").unwrap_or(line);
            let subject = match self.line_key.of(text) {
                Err(_) if self.line_key.is_json() && is_blank(text) => Subject::Blank,
                Ok(key) => Subject::Key(key),
                Err(why) if self.on_missing_key == OnMissingKey::Fail => {
                    bail!("{why}; to continue after such lines, give `--on-missing-key pass` or `drop`")
                }
                Err(_) => Subject::Missing,
            };
            batch.push(line, subject);
            if !lines.has_next() {
                break;
            }
        }
        Ok(true)
    }
}

fn without_mark(line: &[u8]) -> &[u8] {
    line.strip_prefix(MARK).unwrap_or(line)
}

/// Whether a line contains only the white space of JSON.
fn is_blank(line: &[u8]) -> bool {
    line.iter().all(|byte| matches!(byte, b' ' | b'\t' | b'\r'))
}

/// The lines of one source.
struct Lines<R> {
    input: BufReader<R>,
    line: Vec<u8>,
    /// The number of the last line, from 1.
    number: u64,
}

impl<R: Read> Lines<R> {
    /// The next line, with its "\n" if it has one, and without the byte order mark of the input.
    fn next(&mut self, max_line: u64) -> anyhow::Result<Option<&[u8]>> {
        self.line.clear();
        self.number += 1;
        let most = max_line + 1 + if self.number == 1 { MARK.len() as u64 } else { 0 };
        self.input.by_ref().take(most).read_until(b'\n', &mut self.line)?;
        let mut line = self.line.as_slice();
        if self.number == 1 {
            ensure!(
                !FOREIGN_MARKS.iter().any(|mark| line.starts_with(mark)),
                "the input is UTF-16 or UTF-32; convert it to UTF-8, for example with `iconv -f UTF-16 -t UTF-8`"
            );
            line = without_mark(line);
        }
        ensure!(
            line.strip_suffix(b"\n").unwrap_or(line).len() as u64 <= max_line,
            "the line is longer than {max_line} bytes; raise the limit with `--max-line`"
        );
        Ok((!line.is_empty()).then_some(line))
    }

    /// Whether the next line is buffered.
    fn has_next(&self) -> bool {
        self.input.buffer().contains(&b'\n')
    }
}
