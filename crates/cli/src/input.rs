//! Lines out of files and standard input. Runs on a thread of its own: it waits for input and parses while the store
//! is at work.

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;

use anyhow::{Context, bail, ensure};
use crossbeam::channel::Sender;

use crate::args::OnMissingKey;
use crate::batch::{Batch, Subject};
use crate::line_key::LineKey;

/// The byte order mark of UTF-8. It is no part of the text that it stands before.
const MARK: &[u8] = b"\xef\xbb\xbf";
/// Those of UTF-16 and UTF-32, in which a "\n" is more than one byte.
const FOREIGN_MARKS: [&[u8]; 3] = [b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"];

/// How much is read at a time. A pipe gives a quarter of it.
const READ_BYTES: usize = 256 * 1024;

/// Where lines come from.
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

/// The sources that the arguments name, and how many bytes they have in all where that is known. A file that is not
/// there is found out here, before anything is read.
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

/// How input becomes batches.
pub(crate) struct Reading {
    pub(crate) line_key: LineKey,
    pub(crate) on_missing_key: OnMissingKey,
    pub(crate) max_line: u64,
    pub(crate) batch: usize,
}

impl Reading {
    /// Sends all lines, in batches that are no larger than allowed, until they end or nobody takes them. All that
    /// comes before an error is sent before it is returned.
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

    /// Fills a batch with the lines that are there without waiting, one at least. False where the input ends.
    fn fill(&self, batch: &mut Batch, lines: &mut Lines<impl Read>) -> anyhow::Result<bool> {
        while !batch.is_full(self.batch) {
            let Some(line) = lines.next(self.max_line)? else { return Ok(false) };
            // Also within an input, which may be of several that `cat` has put together.
            let line = if self.line_key.is_json() { without_mark(line) } else { line };
            let text = line.strip_suffix(b"\n").unwrap_or(line);
            let subject = match self.line_key.of(text) {
                Err(_) if self.line_key.is_json() && is_blank(text) => Subject::Blank,
                Ok(key) => Subject::Key(key),
                Err(why) if self.on_missing_key == OnMissingKey::Fail => {
                    bail!("{why} (`--on-missing-key pass` or `drop` would go on)")
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

/// Whether a line holds nothing but what JSON calls white space.
fn is_blank(line: &[u8]) -> bool {
    line.iter().all(|byte| matches!(byte, b' ' | b'\t' | b'\r'))
}

/// The lines of one source.
struct Lines<R> {
    input: BufReader<R>,
    line: Vec<u8>,
    /// Of the line that was read last, from 1.
    number: u64,
}

impl<R: Read> Lines<R> {
    /// The next line, with its "\n" if it has one, and without the byte order mark of its input.
    fn next(&mut self, max_line: u64) -> anyhow::Result<Option<&[u8]>> {
        self.line.clear();
        self.number += 1;
        let most = max_line + 1 + if self.number == 1 { MARK.len() as u64 } else { 0 };
        self.input.by_ref().take(most).read_until(b'\n', &mut self.line)?;
        let mut line = self.line.as_slice();
        if self.number == 1 {
            ensure!(
                !FOREIGN_MARKS.iter().any(|mark| line.starts_with(mark)),
                "it is text in UTF-16 or UTF-32: convert it to UTF-8, as with `iconv -f UTF-16 -t UTF-8`"
            );
            line = without_mark(line);
        }
        ensure!(
            line.strip_suffix(b"\n").unwrap_or(line).len() as u64 <= max_line,
            "it is longer than {max_line} bytes (`--max-line` sets the limit)"
        );
        Ok((!line.is_empty()).then_some(line))
    }

    /// Whether the next line is here already.
    fn has_next(&self) -> bool {
        self.input.buffer().contains(&b'\n')
    }
}
