//! Interrupts, closed outputs and kills.

use super::*;

#[test]
fn a_closed_output_ends_the_run_and_unwritten_lines_are_not_recorded() {
    let cli = Cli::new();
    let mut running = Running(cli.command("filter").spawn().unwrap());
    drop(running.0.stdout.take());
    let mut input = running.0.stdin.take().unwrap();
    input.write_all(b"a\nb\n").unwrap();
    // The input stays open, so only the closed output can end the run.
    let finished = running.ended();
    assert_eq!(finished.code, Some(0), "{}", finished.err);
    assert!(finished.summary().starts_with("lines=0 passed=0 "), "{}", finished.err);
    drop(input);
    assert_eq!(cli.passed(&[], "a\nb\n"), "a\nb\n");
}

#[test]
fn a_reader_that_closes_the_output_early_ends_a_long_run() {
    let cli = Cli::new();
    let lines: String = (0..200_000).map(|line| format!("line {line}\n")).collect();
    let input = cli.file("input", lines);
    let mut running = Running(cli.command("filter").arg(&input).spawn().unwrap());
    let mut output = BufReader::new(running.0.stdout.take().unwrap());
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "line 0\n");
    drop(output);
    let finished = running.ended();
    assert_eq!(finished.code, Some(0), "{}", finished.err);
    assert!(!finished.summary().starts_with("lines=200000 "), "{}", finished.err);
}

#[test]
fn a_failing_output_is_an_error_and_nothing_is_recorded() {
    let cli = Cli::new();
    let mut child = cli.command("filter").stdout(File::create("/dev/full").unwrap()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"a\n").unwrap();
    Finished::from(child.wait_with_output().unwrap()).is_error(&["onlyonce: cannot write to standard output"]);
    assert_eq!(cli.passed(&[], "a\n"), "a\n");
}

#[test]
fn an_interrupt_ends_a_run_that_waits_for_input() {
    let cli = Cli::new();
    let mut running = Running(cli.command("filter").spawn().unwrap());
    let mut input = running.0.stdin.take().unwrap();
    let output = running.lines();
    input.write_all(b"a\nb\nno end").unwrap();
    while output.recv_timeout(PATIENCE).unwrap() != "b" {}
    running.interrupt();
    let finished = running.ended();
    assert_eq!(finished.code, Some(130), "{}", finished.err);
    assert!(finished.summary().starts_with("lines=2 passed=2 duplicates=0 "), "{}", finished.err);
    drop(input);
    assert_eq!(cli.passed(&[], "a\nb\nno end"), "no end");
}

#[test]
fn an_interrupt_under_load_repeats_and_loses_no_line() {
    let cli = Cli::new();
    let lines: String = (0..300_000).map(|line| format!("line {line}\n")).collect();
    let input = cli.file("input", &lines);
    let out = cli.dir.path().join("out");
    let mut command = cli.command("filter");
    command.args(["--batch", "50", &input]).stdout(File::create(&out).unwrap());
    let running = Running(command.spawn().unwrap());
    wait_until(|| fs::metadata(&out).unwrap().len() > 0);
    running.interrupt();
    let finished = running.ended();
    assert_eq!(finished.code, Some(130), "{}", finished.err);
    let first = fs::read_to_string(&out).unwrap();
    assert!(finished.summary().starts_with(&format!("lines={} ", first.lines().count())), "{}", finished.err);
    assert_eq!(first + &cli.passed(&[&input], ""), lines);
}

fn wait_until(mut happened: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !happened() {
        assert!(begun.elapsed() < PATIENCE, "the condition does not become true");
        std::thread::yield_now();
    }
}

/// Kills the filter at random moments and runs it again on the same input. Together the outputs contain every line, and each kill
/// repeats at most the last batch before it.
#[test]
fn a_run_after_a_kill_repeats_at_most_one_batch_and_loses_no_line() {
    const BATCH: usize = 40;
    const KILLS: usize = 20;
    const DISTINCT: u32 = 12_000;
    let variable = std::env::var("ONLYONCE_CLI_SEED").ok().map(|seed| seed.parse().unwrap());
    let seed: u64 = variable.unwrap_or_else(|| rand::rng().random());
    eprintln!("ONLYONCE_CLI_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);

    let cli = Cli::new();
    let mut lines = Vec::new();
    for number in 0..DISTINCT {
        lines.push(format!("{{\"id\":{number},\"text\":\"{}\"}}\n", "x".repeat(rng.random_range(0..200))));
        while rng.random_bool(0.2) {
            lines.push(lines[rng.random_range(0..lines.len())].clone());
        }
    }
    let input = cli.file("input", lines.concat());
    let wanted = first_occurrences(&lines.concat());

    // The output of each run, and where each line was written last: the run, and the index in its output.
    let mut outputs: Vec<Vec<String>> = Vec::new();
    let mut written: HashMap<String, (usize, usize)> = HashMap::new();
    let mut first_time = String::new();
    // For each run, the indexes of the lines in its output that a later run repeated.
    let mut again: Vec<Vec<usize>> = vec![Vec::new(); KILLS + 1];
    let mut killed = 0;
    for run in 0..=KILLS {
        let out = cli.dir.path().join("out");
        let mut command = cli.command("filter");
        command.args(["--key", ".id", "--batch", &BATCH.to_string(), &input]).stdout(File::create(&out).unwrap());
        let mut running = Running(command.spawn().unwrap());
        if run < KILLS {
            // Some are killed while they open the store, some right after a write, the others at any moment.
            let bytes = if rng.random_bool(0.2) { 0 } else { rng.random_range(1..70_000) };
            let moment = if rng.random_bool(0.5) { 0 } else { rng.random_range(0..3_000) };
            wait_until(|| fs::metadata(&out).unwrap().len() >= bytes || running.0.try_wait().unwrap().is_some());
            std::thread::sleep(Duration::from_micros(moment));
            running.0.kill().unwrap();
        }
        let finished = running.ended();
        match finished.code {
            None => killed += 1,
            code => assert_eq!(code, Some(0), "seed {seed}: {}", finished.err),
        }

        let mut output = Vec::new();
        for line in fs::read_to_string(&out).unwrap().split_inclusive('\n') {
            if !line.ends_with('\n') {
                // The kill interrupted a write. The batch was not recorded, so a later run writes the whole line.
                break;
            }
            match written.insert(line.to_owned(), (run, output.len())) {
                None => first_time.push_str(line),
                Some((before, place)) => again[before].push(place),
            }
            output.push(line.to_owned());
        }
        outputs.push(output);
    }

    assert!(
        first_time == wanted,
        "seed {seed}: the first occurrences in the outputs are not the lines of the input in their order"
    );
    for (run, (output, again)) in outputs.iter().zip(&again).enumerate() {
        // A repeated line is attributed to the last run that wrote it before. The run that repeats it is not always the next
        // one, which may be killed as well.
        let earliest = output.len().saturating_sub(BATCH);
        let early = again.iter().find(|place| **place < earliest);
        assert_eq!(
            early,
            None,
            "seed {seed}: a line before the last batch of run {run} was repeated, of {} lines",
            output.len()
        );
    }
    assert!(killed > 0, "seed {seed}: every run ended before it could be killed");
    eprintln!("{killed} runs killed, {} lines repeated", again.concat().len());
    assert_eq!(cli.passed(&["--key", ".id", &input], ""), "");
}

#[test]
fn get_finds_a_key_of_any_bytes() {
    let cli = Cli::new();
    Store::open(cli.store()).unwrap().record(Key::from(b"\xff\xfe")).wait().unwrap();
    let output = cli.command("get").arg(OsStr::from_bytes(b"\xff\xfe")).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap()["key"], json!({ "hex": "fffe" }));
}
