//! Measures onlyonce and comparable stores on the same keys in one run. README.md describes the workloads.

mod args;
mod child;
mod goals;
mod keys;
mod machine;
mod measure;
mod plot;
mod report;
mod row;
mod subject;
mod subjects;
mod table;
mod workloads;

use std::cell::Cell;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;

use args::{Args, Scale, Workload};
use row::{Circumstances, Row};
use subject::Kind;
use workloads::{Run, checks, day, durable, expiry, growth, inserts, opening};

fn main() -> ExitCode {
    let args = Args::parse();
    let done = match &args.child {
        Some(child) => child.run(),
        None if args.from.is_empty() => measure(&args),
        None => row::read_all(&args.from).and_then(|(circumstances, rows)| show(&args, &circumstances, &rows)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(args: &Args) -> Result<()> {
    let root = args.dir.clone().unwrap_or_else(std::env::temp_dir);
    // Removed on drop, also if a measurement fails.
    let dir = tempfile::Builder::new()
        .prefix("onlyonce-compare-")
        .tempdir_in(&root)
        .with_context(|| format!("cannot create a directory for the data in {}", root.display()))?;
    let interrupted = dir.path().to_owned();
    ctrlc::set_handler(move || {
        subjects::redis::stop_all();
        // Another thread may still write to it, so a rest can remain.
        let _ = std::fs::remove_dir_all(&interrupted);
        std::process::exit(130);
    })?;

    let run = Run {
        scale: Scale::of(args),
        workloads: if args.only.is_empty() { Workload::ALL.to_vec() } else { args.only.clone() },
        subjects: subjects(args),
        dir: dir.path().to_owned(),
        plant_wrong_answer: args.plant_wrong_answer,
        filter_bytes_per_key: Cell::new(checks::FILTER_BYTES_PER_KEY),
    };
    let circumstances = Circumstances {
        machine: machine::description(),
        commit: machine::commit(),
        command: args.command(),
        fsyncs_per_s: machine::fsyncs_per_s(dir.path(), Duration::from_secs(1))?,
        load: machine::load()?,
        rounds: run.scale.rounds,
    };
    if circumstances.load > 0.5 {
        eprintln!("the load average is {}: other processes use this machine", circumstances.load);
    }
    println!("{}\ncommit {}\n{}", circumstances.machine, circumstances.commit, circumstances.command);
    println!("{:.0} fdatasyncs of small appends per second\n", circumstances.fsyncs_per_s);

    let mut rows: Vec<Row> = Vec::new();
    let mut part = |has: bool, rounds: usize, workload: &dyn Fn(&Run) -> Result<Vec<Row>>| -> Result<()> {
        if !has {
            return Ok(());
        }
        let start = Instant::now();
        let mut measured = Vec::new();
        for round in 1..=rounds {
            eprintln!("round {round} of {rounds}");
            measured.extend(workload(&run)?);
        }
        eprintln!("{:.0} s", start.elapsed().as_secs_f64());
        rows.extend(row::medians(measured));
        // After each part, so that a long run that fails keeps its results.
        if let Some(path) = &args.json {
            row::write(path, &circumstances, &rows)?;
        }
        Ok(())
    };
    let rounds = run.scale.rounds;
    let has_ours = run.has_subject(Kind::Onlyonce);
    for (nth, size) in run.scale.sizes.iter().enumerate() {
        let rounds = if nth == 0 { rounds } else { 1 };
        part(run.has(Workload::W1), rounds, &|run| checks::many(run, size))?;
        part(run.has(Workload::W1) || run.has(Workload::W2), rounds, &|run| checks::compared(run, size))?;
        part(run.has(Workload::W3), rounds, &|run| inserts::records(run, size))?;
        part(run.has(Workload::W4) && has_ours, rounds, &|run| inserts::claims_and_completions(run, size))?;
    }
    part(run.has(Workload::W5), rounds, &durable::run)?;
    part(run.has(Workload::W6) && has_ours, 1, &day::run)?;
    part(run.has(Workload::W7), 1, &expiry::run)?;
    part(run.has(Workload::W8) && has_ours, 1, &opening::run)?;
    part(run.has(Workload::W9) && has_ours, 1, &growth::run)?;
    show(args, &circumstances, &rows)
}

/// The requested subjects that are installed.
fn subjects(args: &Args) -> Vec<Kind> {
    let mut kinds = Kind::ALL.to_vec();
    if !args.subjects.is_empty() {
        kinds.retain(|kind| args.subjects.contains(kind));
    }
    if kinds.contains(&Kind::Redis) && !machine::has(subjects::redis::PROGRAM) {
        eprintln!("redis is skipped: {} is not installed", subjects::redis::PROGRAM);
        kinds.retain(|kind| *kind != Kind::Redis);
    }
    kinds
}

fn show(args: &Args, circumstances: &Circumstances, rows: &[Row]) -> Result<()> {
    for workload in Workload::ALL {
        if rows.iter().any(|row| row.workload == workload) {
            println!("{}\n\n{}\n", workload.title(), table::table(workload, rows));
        }
    }
    println!("{}", report::goals_table(rows));
    if let Some(dir) = &args.report {
        report::write(dir, circumstances, rows)?;
        println!("\n{}", dir.join(report::PAGE).display());
    }
    Ok(())
}
