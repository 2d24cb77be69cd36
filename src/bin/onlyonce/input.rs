//! Lines out of files and standard input. Runs on a thread of its own: it waits for input and parses while the store
//! is at work.

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;

use anyhow::{Context, bail, ensure};
use crossbeam::channel::Sender;

use crate::args::OnMissingKey;
use crate::batch::Batch;
use crate::line_key::LineKey;

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
            let key = match self.line_key.of(line.strip_suffix(b"\n").unwrap_or(line)) {
                Ok(key) => Some(key),
                Err(why) if self.on_missing_key == OnMissingKey::Fail => {
                    bail!("{why} (`--on-missing-key pass` or `drop` would go on)")
                }
                Err(_) => None,
            };
            batch.push(line, key);
            if !lines.has_next() {
                break;
            }
        }
        Ok(true)
    }
}

/// The lines of one source.
struct Lines<R> {
    input: BufReader<R>,
    line: Vec<u8>,
    /// Of the line that was read last, from 1.
    number: u64,
}

impl<R: Read> Lines<R> {
    /// The next line, with its "\n" if it has one.
    fn next(&mut self, max_line: u64) -> anyhow::Result<Option<&[u8]>> {
        self.line.clear();
        self.number += 1;
        let read = self.input.by_ref().take(max_line + 1).read_until(b'\n', &mut self.line)?;
        ensure!(
            self.line.ends_with(b"\n") || read as u64 <= max_line,
            "it is longer than {max_line} bytes (`--max-line` sets the limit)"
        );
        Ok((read > 0).then_some(&self.line))
    }

    /// Whether the next line is here already.
    fn has_next(&self) -> bool {
        self.input.buffer().contains(&b'\n')
    }
}
