//! The lines that several child processes reported about one store, and the comparison with the store's contents. It returns
//! which acknowledged completions are missing; the test decides which of them may be.

#![allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]

use std::collections::BTreeMap;

use onlyonce::{Claim, KeyStatus, Store};

use crate::torture::{Line, Messages, check_side_writes, messages, name, window_ms};

/// A completion that was started.
#[derive(Debug)]
struct Attempt {
    result: String,
    begun: usize,
    done: Option<Done>,
}

/// It was acknowledged, to its caller or by the answer of a check.
#[derive(Debug, Clone, Copy)]
struct Done {
    line: usize,
    started_ms: u64,
    ended_ms: u64,
}

/// All completed keys of a store, with their results and times.
#[derive(Debug, Clone)]
pub struct Contents {
    now_ms: u64,
    completed: BTreeMap<String, (String, u64)>,
    /// The last token that the store granted.
    token: u64,
    in_progress: Vec<String>,
    messages: Messages,
    /// Stored completions without their offset or message.
    missing_side_writes: Vec<String>,
}

impl Contents {
    /// The contents of a store that does not exist yet.
    pub fn nothing() -> Self {
        Self {
            now_ms: 1_700_000_000_000,
            completed: BTreeMap::new(),
            token: 0,
            in_progress: Vec::new(),
            messages: Messages::new(),
            missing_side_writes: Vec::new(),
        }
    }
}

/// The lines of several processes, one process after the other.
pub struct RunLog {
    pub lines: Vec<Line>,
    run_starts: Vec<usize>,
    attempts: BTreeMap<String, Vec<Attempt>>,
    /// The contents of the store before the first line.
    before: Contents,
}

/// The difference between the contents of a store and the reports.
#[derive(Debug, Default)]
pub struct Verdict {
    /// Contradictions that no loss of recent writes explains.
    pub violations: Vec<String>,
    /// The lines that acknowledged completions which are missing.
    pub missing: Vec<usize>,
    /// Those of `missing` that were acknowledged before the start of a completion that is stored.
    pub gaps: Vec<usize>,
    /// Acknowledged completions that are stored.
    pub present: usize,
}

impl RunLog {
    /// Starts from a store with these contents, all of which are on the disk.
    pub fn after(before: Contents) -> Self {
        Self { lines: Vec::new(), run_starts: Vec::new(), attempts: BTreeMap::new(), before }
    }

    /// Adds the lines of one process.
    pub fn add(&mut self, lines: Vec<Line>) {
        self.run_starts.push(self.lines.len());
        let first = self.lines.len();
        for (place, line) in lines.iter().enumerate() {
            self.apply(first + place, &line.text);
        }
        self.lines.extend(lines);
    }

    fn apply(&mut self, line: usize, text: &str) {
        let words: Vec<&str> = text.split(' ').collect();
        let (key, result, done) = match words.as_slice() {
            ["opening" | "open" | "pulse"] | ["got" | "left" | "clock", ..] => return,
            ["try", key, result] => {
                let attempt = Attempt { result: (*result).to_owned(), begun: line, done: None };
                return self.attempts.entry((*key).to_owned()).or_default().push(attempt);
            }
            ["done", key, result, started, ended] => {
                let (started_ms, ended_ms) = (started.parse().unwrap(), ended.parse().unwrap());
                (key, result, Done { line, started_ms, ended_ms })
            }
            ["dup", key, result, at] => {
                let at_ms = at.parse().unwrap();
                (key, result, Done { line, started_ms: at_ms, ended_ms: at_ms })
            }
            _ => panic!("the child reported {text:?}"),
        };
        let attempts = self.attempts.get_mut(*key).into_iter().flatten();
        // A completion without an attempt in these lines was started before them, and is on the disk.
        if let Some(attempt) = attempts.into_iter().find(|attempt| attempt.result == *result && attempt.done.is_none())
        {
            attempt.done = Some(done);
        }
    }

    /// The index of the process that reported a line.
    pub fn run_of(&self, line: usize) -> usize {
        self.run_starts.partition_point(|first| *first <= line) - 1
    }

    /// All reports about the key of a line, and its state in the store.
    pub fn key_history(&self, line: usize, contents: &Contents) -> String {
        let key = self.lines[line].text.split(' ').nth(1).unwrap();
        let mut key_history = format!("{key}: before: {:?}\n", self.before.completed.get(key));
        for (place, line) in self.lines.iter().enumerate() {
            if line.text == "open" || line.text.split(' ').nth(1) == Some(key) {
                key_history +=
                    &format!("line {place} of process {}, at {}: {}\n", self.run_of(place), line.at, line.text);
            }
        }
        key_history + &format!("at {}: {:?}", contents.now_ms, contents.completed.get(key))
    }

    /// The latest time and the highest token in the lines that `count`.
    pub fn latest(&self, count: impl Fn(&Line) -> bool) -> (u64, u64) {
        let (mut time_ms, mut token) = (self.before.now_ms, self.before.token);
        for line in self.lines.iter().filter(|line| count(line)) {
            let words: Vec<&str> = line.text.split(' ').collect();
            let at = match words.as_slice() {
                ["got", _, number, _, at] => {
                    token = token.max(number.parse().unwrap());
                    at
                }
                ["done", _, _, _, at] | ["dup", _, _, at] | ["clock", at] => at,
                _ => continue,
            };
            time_ms = time_ms.max(at.parse().unwrap());
        }
        (time_ms, token)
    }

    /// How many completions the lines that `count` acknowledge, each once.
    pub fn acknowledged(&self, count: impl Fn(&Line) -> bool) -> usize {
        self.attempts().filter(|(_, attempt)| attempt.done.is_some_and(|done| count(&self.lines[done.line]))).count()
    }

    /// Looks up every reported key in a store.
    pub fn find(&self, store: &Store) -> Contents {
        let mut contents =
            Contents { now_ms: store.stats().now.as_unix_ms(), messages: messages(store), ..Contents::nothing() };
        let keys: Vec<&String> = self.attempts.keys().chain(self.before.completed.keys()).collect();
        // The first keys are looked up while the filter is rebuilt, the last ones with the filter.
        let checks = keys.chunks(1_000).flat_map(|keys| store.check_batch(keys.iter().copied()).wait().unwrap());
        for (key, check) in keys.iter().zip(checks) {
            match check.unwrap() {
                KeyStatus::Completed(first) => {
                    contents
                        .missing_side_writes
                        .extend(check_side_writes(store, &contents.messages, key, &first).err());
                    let first = (name(first.result()), first.completed_at().as_unix_ms());
                    contents.completed.insert((*key).clone(), first);
                }
                KeyStatus::New => {}
                KeyStatus::InProgress(_) => contents.in_progress.push((*key).clone()),
            }
        }
        let Claim::Acquired(lease) = store.claim("a key without a report").wait().unwrap() else {
            panic!("G2: a key is blocked")
        };
        contents.token = lease.token().get();
        lease.release().wait().unwrap();
        contents
    }

    /// Compares the contents of a store with the reports. `token`: the highest token that must not be granted again.
    pub fn judge(&self, contents: &Contents, token: u64) -> Verdict {
        let mut verdict = Verdict { violations: contents.missing_side_writes.clone(), ..Verdict::default() };
        let is_live = |key: &str, completed_ms: u64| contents.now_ms < completed_ms + window_ms(key);
        for key in &contents.in_progress {
            verdict.violations.push(format!("G2: {key} is blocked by an ended process"));
        }
        if contents.token <= token {
            verdict.violations.push(format!("G3: token {} after {token}", contents.token));
        }
        for (key, first) in &self.before.completed {
            if is_live(key, first.1) && contents.completed.get(key) != Some(first) {
                verdict
                    .violations
                    .push(format!("G1: {key} was on the disk: {first:?}, {:?}", contents.completed.get(key)));
            }
        }
        for (key, first) in &contents.completed {
            let tried = self.attempts.get(key).into_iter().flatten().any(|attempt| attempt.result == first.0);
            if !tried && self.before.completed.get(key) != Some(first) {
                verdict.violations.push(format!("G2: {key} was never completed: {first:?}"));
            }
            if !is_live(key, first.1) {
                verdict
                    .violations
                    .push(format!("G4: {key} is remembered after its window: {first:?} at {}", contents.now_ms));
            }
        }
        // For each process, the line that started the last completion which is stored.
        let mut last = vec![0; self.run_starts.len()];
        for (key, attempt) in self.attempts() {
            match (contents.completed.get(key), attempt.done) {
                (Some((result, at_ms)), done) if *result == attempt.result => {
                    let run = self.run_of(attempt.begun);
                    last[run] = last[run].max(attempt.begun);
                    verdict.present += usize::from(done.is_some());
                    if done.is_some_and(|done| !(done.started_ms..=done.ended_ms).contains(at_ms)) {
                        verdict.violations.push(format!("G1: {key} has a different time: {attempt:?}, {at_ms}"));
                    }
                }
                (_, Some(done)) if is_live(key, done.started_ms) => {
                    if contents.messages.contains(&(key.clone(), attempt.result.clone())) {
                        verdict.violations.push(format!("G1: {key} has a message, but is not completed: {attempt:?}"));
                    }
                    verdict.missing.push(done.line);
                }
                _ => {}
            }
        }
        verdict.missing.sort_unstable();
        let gaps = verdict.missing.iter().filter(|line| **line < last[self.run_of(**line)]);
        verdict.gaps = gaps.copied().collect();
        verdict
    }

    fn attempts(&self) -> impl Iterator<Item = (&String, &Attempt)> {
        self.attempts.iter().flat_map(|(key, attempts)| attempts.iter().map(move |attempt| (key, attempt)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::torture::WINDOW_MS;

    fn run_log(run_starts: &[&[&str]]) -> RunLog {
        let mut run_log = RunLog::after(Contents::nothing());
        for lines in run_starts {
            run_log.add(lines.iter().map(|text| Line { text: (*text).to_owned(), at: 0 }).collect());
        }
        run_log
    }

    fn contents(now_ms: u64, completed: &[(&str, &str, u64)]) -> Contents {
        let completed = completed.iter().map(|(key, result, at)| ((*key).to_owned(), ((*result).to_owned(), *at)));
        Contents { now_ms, completed: completed.collect(), token: 100, ..Contents::nothing() }
    }

    const TWO: &[&str] = &["try a r1", "done a r1 10 12", "try b r2", "try c r3", "done b r2 11 13", "done c r3 12 13"];

    #[test]
    fn a_missing_suffix_is_accepted_and_a_gap_is_reported() {
        let run_log = run_log(&[TWO]);
        let complete = run_log.judge(&contents(20, &[("a", "r1", 11), ("b", "r2", 12), ("c", "r3", 12)]), 99);
        assert!(complete.violations.is_empty() && complete.missing.is_empty() && complete.present == 3, "{complete:?}");
        let suffix = run_log.judge(&contents(20, &[("a", "r1", 11), ("c", "r3", 12)]), 99);
        assert!(suffix.violations.is_empty() && suffix.missing == [4], "{suffix:?}");
        assert!(suffix.gaps.is_empty(), "b and c were concurrent: {suffix:?}");
        let gap = run_log.judge(&contents(20, &[("b", "r2", 12)]), 99);
        assert_eq!((gap.missing, gap.gaps), (vec![1, 5], vec![1]));
        let expired = run_log.judge(&contents(20 + WINDOW_MS, &[]), 99);
        assert!(expired.missing.is_empty(), "{expired:?}");
    }

    #[test]
    fn a_later_process_can_repeat_a_lost_completion() {
        let run_log = run_log(&[&TWO[..2], &["try a r4", "done a r4 15 15"]]);
        let again = run_log.judge(&contents(20, &[("a", "r4", 15)]), 99);
        assert_eq!((again.missing, again.gaps.len(), again.present), (vec![1], 0, 1));
    }

    #[test]
    fn contradictions_are_violations() {
        let run_log = run_log(&[TWO]);
        for (what, contents) in [
            ("never started", contents(20, &[("d", "r9", 12)])),
            ("a different result", contents(20, &[("a", "r9", 11)])),
            ("a different time", contents(20, &[("a", "r1", 13)])),
            ("after its window", contents(11 + WINDOW_MS, &[("a", "r1", 11)])),
            ("a repeated token", Contents { token: 99, ..contents(20, &[]) }),
            ("without its message", Contents { missing_side_writes: vec!["a".to_owned()], ..contents(20, &[]) }),
            ("a message without its completion", {
                let messages = [("a".to_owned(), "r1".to_owned())].into();
                Contents { messages, ..contents(20, &[]) }
            }),
            ("blocked", Contents { in_progress: vec!["a".to_owned()], ..contents(20, &[]) }),
        ] {
            assert_eq!(run_log.judge(&contents, 99).violations.len(), 1, "{what}");
        }
        let later = RunLog::after(contents(20, &[("a", "r1", 11)]));
        assert_eq!(later.judge(&contents(20, &[]), 99).violations.len(), 1, "a completion that was on the disk");
        assert_eq!(later.judge(&contents(11 + WINDOW_MS, &[]), 99).violations.len(), 0);
    }
}
