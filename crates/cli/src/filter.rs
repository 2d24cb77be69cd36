//! `onlyonce filter`: writes each line whose key is new.

use std::collections::HashSet;
use std::convert::Infallible;
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::{Context, anyhow};
use crossbeam::channel::{Receiver, bounded};
use indicatif::ProgressBar;
use onlyonce::{Durability, KeyStatus, Store};

use crate::args::{self, OnMissingKey};
use crate::batch::{Batch, Intake, Subject, Taken};
use crate::input::{self, Reading};
use crate::line_key::LineKey;
use crate::summary::Summary;
use crate::{INTERRUPTED, opening, progress};

/// The number of batches that the reader may queue.
const READ_AHEAD: usize = 4;

/// Runs the filter and returns the exit code.
pub(crate) fn run(args: &args::Filter, verbose: bool) -> anyhow::Result<u8> {
    let begun = Instant::now();
    let (sources, total_bytes) = input::sources(&args.files)?;
    let interrupt = interrupt()?;
    let store = open(args)?;

    let limit = args.batch as usize;
    let (batches, read) = bounded(READ_AHEAD);
    let scope = args.scope.as_bytes().to_vec().leak();
    let reading = Reading {
        line_key: LineKey { paths: args.keys.clone(), scope },
        on_missing_key: args.on_missing_key,
        max_line: args.max_line,
        batch: limit,
    };
    let reader = std::thread::Builder::new()
        .name("reader".to_owned())
        .spawn(move || reading.read(&sources, &batches))
        .context("cannot start the reader thread")?;

    let mut filter = Filter {
        store: &store,
        pass_missing: args.on_missing_key == OnMissingKey::Pass,
        output: std::io::stdout(),
        synced_output: synced_output(args.durability)?,
        in_line: false,
        summary: Summary::default(),
        progress: progress::bar(total_bytes, verbose)?,
    };
    let ended = filter.drain(Intake { read, interrupt, limit, left_over: Batch::default() }, reader);
    let closed = store.close().wait();

    filter.progress.finish_and_clear();
    let summary = Summary { seconds: begun.elapsed().as_secs_f64(), ..filter.summary };
    let summary = if args.json { serde_json::to_string(&summary)? } else { summary.to_string() };
    // The lines are written and recorded, so a closed standard error is no failure.
    let _ = writeln!(std::io::stderr(), "{summary}");
    let ended = ended?;
    closed?;
    Ok(if ended == Ended::Interrupted { INTERRUPTED } else { 0 })
}

fn open(args: &args::Filter) -> anyhow::Result<Store> {
    let durability = match args.durability {
        args::Durability::Disk => Durability::Disk,
        args::Durability::Process => Durability::Process,
    };
    let mut builder = opening::builder().durability(durability);
    if let Some(window) = args.window {
        builder = builder.window(window);
    }
    if let Some(bucket) = args.bucket {
        builder = builder.bucket(bucket);
    }
    opening::open(builder, &args.store)
}

/// The output, if it is a file that must be synced before the keys are recorded. Otherwise a power failure could lose lines whose
/// keys are on disk. A reader of a pipe must sync its own output.
fn synced_output(durability: args::Durability) -> anyhow::Result<Option<File>> {
    let output = std::io::stdout().as_fd().try_clone_to_owned().context("cannot use standard output")?;
    let output = File::from(output);
    let is_file = output.metadata().context("cannot read the metadata of standard output")?.is_file();
    Ok(Some(output).filter(|_| is_file && durability == args::Durability::Disk))
}

/// A channel that disconnects at the first Ctrl-C. The second one exits immediately, which is as safe as a kill.
fn interrupt() -> anyhow::Result<Receiver<Infallible>> {
    let (sender, receiver) = bounded(0);
    let mut sender = Some(sender);
    ctrlc::set_handler(move || {
        if sender.take().is_none() {
            std::process::exit(i32::from(INTERRUPTED));
        }
    })
    .context("cannot install the handler for Ctrl-C")?;
    Ok(receiver)
}

/// What ended the filter.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ended {
    Input,
    Output,
    Interrupted,
}

struct Filter<'s> {
    store: &'s Store,
    /// Whether lines without a key are written.
    pass_missing: bool,
    output: std::io::Stdout,
    /// See [`synced_output`].
    synced_output: Option<File>,
    /// Whether the last written line has no "\n".
    in_line: bool,
    summary: Summary,
    progress: ProgressBar,
}

impl Filter<'_> {
    fn drain(&mut self, mut intake: Intake, reader: JoinHandle<anyhow::Result<()>>) -> anyhow::Result<Ended> {
        loop {
            match intake.take() {
                Taken::Batch(batch) => {
                    if !self.pass(&batch)? {
                        return Ok(Ended::Output);
                    }
                    self.progress.inc(batch.len_bytes() as u64);
                    if !self.progress.is_hidden() {
                        let Summary { passed, duplicates, .. } = self.summary;
                        self.progress.set_message(format!("{passed} passed, {duplicates} duplicates"));
                    }
                }
                // The reader is not joined: it may wait for input that never arrives, and ends with the process.
                Taken::Interrupted => return Ok(Ended::Interrupted),
                Taken::End => {
                    reader.join().map_err(|_| anyhow!("the reader panicked"))??;
                    return Ok(Ended::Input);
                }
            }
        }
    }

    /// Writes the lines whose keys are new, then records the keys. In the other order, a crash in between would lose lines.
    /// Returns false and records nothing if the reader of the output has closed it.
    fn pass(&mut self, batch: &Batch) -> anyhow::Result<bool> {
        let mut summary = self.summary.clone();
        let mut in_line = self.in_line;
        let mut output = Vec::with_capacity(batch.len_bytes());
        let mut new = HashSet::new();
        let mut statuses = self.store.check_batch(batch.keys()).wait().map_err(opening::explain)?.into_iter();
        for line in batch.iter() {
            let (line, subject) = line?;
            summary.lines += 1;
            let passes = match subject {
                Subject::Blank => {
                    summary.blank += 1;
                    false
                }
                Subject::Missing => {
                    summary.missing += 1;
                    self.pass_missing
                }
                Subject::Key(key) => {
                    let status = statuses.next().context("internal error: the store did not answer every key")?;
                    let status = status.map_err(opening::explain)?;
                    let first = status == KeyStatus::New && new.insert(key);
                    summary.duplicates += u64::from(!first);
                    first
                }
            };
            if passes {
                summary.passed += 1;
                if in_line {
                    output.push(b'\n');
                }
                output.extend_from_slice(line);
                in_line = !line.ends_with(b"\n");
            }
        }
        match self.output.write_all(&output).and_then(|()| self.output.flush()) {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(false),
            written => written.context("cannot write to standard output")?,
        }
        if !new.is_empty() {
            if let Some(output) = &self.synced_output {
                output.sync_data().context("cannot sync standard output")?;
            }
            for recorded in self.store.record_batch(new).wait().map_err(opening::explain)? {
                recorded.map_err(opening::explain)?;
            }
        }
        self.in_line = in_line;
        self.summary = summary;
        Ok(true)
    }
}
