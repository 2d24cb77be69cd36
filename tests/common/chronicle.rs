//! What processes said of one store, line by line, and what of it the store must know afterwards. It says which
//! acknowledged completions are missing; how many lines of them may be is for the test to decide.

#![allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]

use std::collections::BTreeMap;

use onlyonce::{Claim, KeyStatus, Store};

use crate::torture::{Line, Messages, WINDOW_MS, has_come_along, messages, name};

/// A completion that was begun.
#[derive(Debug)]
struct Attempt {
    result: String,
    begun: usize,
    done: Option<Done>,
}

/// It was acknowledged, to the one who made it or to somebody who asked.
#[derive(Debug, Clone, Copy)]
struct Done {
    line: usize,
    started_ms: u64,
    ended_ms: u64,
}

/// All completed keys of a store, with their results and times.
#[derive(Debug, Clone)]
pub struct Found {
    now_ms: u64,
    completed: BTreeMap<String, (String, u64)>,
    /// What the store handed out last.
    token: u64,
    in_progress: Vec<String>,
    messages: Messages,
    /// What is not there that came with what is there.
    torn_apart: Vec<String>,
}

impl Found {
    /// What a store has that is not there yet.
    pub fn nothing() -> Self {
        Self {
            now_ms: 1_700_000_000_000,
            completed: BTreeMap::new(),
            token: 0,
            in_progress: Vec::new(),
            messages: Messages::new(),
            torn_apart: Vec::new(),
        }
    }
}

/// The lines of one process after the other.
pub struct Chronicle {
    pub lines: Vec<Line>,
    lives: Vec<usize>,
    attempts: BTreeMap<String, Vec<Attempt>>,
    /// What the store had when these lines began.
    before: Found,
}

/// What a store says, beside what was said of it.
#[derive(Debug, Default)]
pub struct Verdict {
    /// What can be true of no store that works, whatever was lost.
    pub wrong: Vec<String>,
    /// Of acknowledged completions that are not there, the lines that acknowledged them.
    pub missing: Vec<usize>,
    /// Of those, the ones that were acknowledged before a completion was begun which is there.
    pub overtaken: Vec<usize>,
    /// Acknowledged completions that are there.
    pub there: usize,
}

impl Chronicle {
    /// Goes on from a store whose keys are these, and known to be on the disk.
    pub fn after(before: Found) -> Self {
        Self { lines: Vec::new(), lives: Vec::new(), attempts: BTreeMap::new(), before }
    }

    /// Adds all that one process said.
    pub fn add(&mut self, lines: Vec<Line>) {
        self.lives.push(self.lines.len());
        let first = self.lines.len();
        for (place, line) in lines.iter().enumerate() {
            self.hear(first + place, &line.text);
        }
        self.lines.extend(lines);
    }

    fn hear(&mut self, line: usize, text: &str) {
        let words: Vec<&str> = text.split(' ').collect();
        let (key, result, done) = match words.as_slice() {
            ["opening" | "open" | "pulse"] | ["got" | "left", ..] => return,
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
            _ => panic!("the child said {text:?}"),
        };
        let attempts = self.attempts.get_mut(*key).into_iter().flatten();
        // One that was begun before these lines is known to be on the disk.
        if let Some(attempt) = attempts.into_iter().find(|attempt| attempt.result == *result && attempt.done.is_none())
        {
            attempt.done = Some(done);
        }
    }

    /// The life in which a line was said.
    pub fn life(&self, line: usize) -> usize {
        self.lives.partition_point(|first| *first <= line) - 1
    }

    /// All that was said of the key of a line, and what the store has of it.
    pub fn story(&self, line: usize, found: &Found) -> String {
        let key = self.lines[line].text.split(' ').nth(1).unwrap();
        let mut story = format!("{key}: before: {:?}\n", self.before.completed.get(key));
        for (place, line) in self.lines.iter().enumerate() {
            if line.text == "open" || line.text.split(' ').nth(1) == Some(key) {
                story += &format!("line {place} of life {}, at {}: {}\n", self.life(place), line.at, line.text);
            }
        }
        story + &format!("at {}: {:?}", found.now_ms, found.completed.get(key))
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
                ["done", _, _, _, at] | ["dup", _, _, at] => at,
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

    /// Asks a store for every key that was ever spoken of.
    pub fn find(&self, store: &Store) -> Found {
        let mut found = Found { now_ms: store.stats().now.as_unix_ms(), messages: messages(store), ..Found::nothing() };
        let keys: Vec<&String> = self.attempts.keys().chain(self.before.completed.keys()).collect();
        // The first of them are asked while the filter is being rebuilt, the last by the filter.
        let checks = keys.chunks(1_000).flat_map(|keys| store.check_batch(keys.iter().copied()).wait().unwrap());
        for (key, check) in keys.iter().zip(checks) {
            match check.unwrap() {
                KeyStatus::Completed(first) => {
                    found.torn_apart.extend(has_come_along(store, &found.messages, key, &first).err());
                    let first = (name(first.result()), first.completed_at().as_unix_ms());
                    found.completed.insert((*key).clone(), first);
                }
                KeyStatus::New => {}
                KeyStatus::InProgress(_) => found.in_progress.push((*key).clone()),
            }
        }
        let Claim::Acquired(lease) = store.claim("nobody spoke of this").wait().unwrap() else {
            panic!("G2: a key is blocked")
        };
        found.token = lease.token().get();
        lease.release().wait().unwrap();
        found
    }

    /// Compares what a store has with what was said. `token`: the highest that must not be given again.
    pub fn judge(&self, found: &Found, token: u64) -> Verdict {
        let mut verdict = Verdict { wrong: found.torn_apart.clone(), ..Verdict::default() };
        let is_live = |completed_ms: u64| found.now_ms < completed_ms + WINDOW_MS;
        for key in &found.in_progress {
            verdict.wrong.push(format!("G2: {key} is blocked by the dead"));
        }
        if found.token <= token {
            verdict.wrong.push(format!("G3: token {} after {token}", found.token));
        }
        for (key, first) in &self.before.completed {
            if is_live(first.1) && found.completed.get(key) != Some(first) {
                verdict.wrong.push(format!("G1: {key} was on the disk: {first:?}, {:?}", found.completed.get(key)));
            }
        }
        for (key, first) in &found.completed {
            let tried = self.attempts.get(key).into_iter().flatten().any(|attempt| attempt.result == first.0);
            if !tried && self.before.completed.get(key) != Some(first) {
                verdict.wrong.push(format!("G2: {key} was never completed: {first:?}"));
            }
            if !is_live(first.1) {
                verdict.wrong.push(format!("G4: {key} is remembered too long: {first:?} at {}", found.now_ms));
            }
        }
        // The last completion of each life that is there, by the line that began it.
        let mut last = vec![0; self.lives.len()];
        for (key, attempt) in self.attempts() {
            match (found.completed.get(key), attempt.done) {
                (Some((result, at_ms)), done) if *result == attempt.result => {
                    let life = self.life(attempt.begun);
                    last[life] = last[life].max(attempt.begun);
                    verdict.there += usize::from(done.is_some());
                    if done.is_some_and(|done| !(done.started_ms..=done.ended_ms).contains(at_ms)) {
                        verdict.wrong.push(format!("G1: {key} has another time: {attempt:?}, {at_ms}"));
                    }
                }
                (_, Some(done)) if is_live(done.started_ms) => {
                    if found.messages.contains(&(key.clone(), attempt.result.clone())) {
                        verdict.wrong.push(format!("G1: {key} has left a message, and is not completed: {attempt:?}"));
                    }
                    verdict.missing.push(done.line);
                }
                _ => {}
            }
        }
        verdict.missing.sort_unstable();
        let overtaken = verdict.missing.iter().filter(|line| **line < last[self.life(**line)]);
        verdict.overtaken = overtaken.copied().collect();
        verdict
    }

    fn attempts(&self) -> impl Iterator<Item = (&String, &Attempt)> {
        self.attempts.iter().flat_map(|(key, attempts)| attempts.iter().map(move |attempt| (key, attempt)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chronicle(lives: &[&[&str]]) -> Chronicle {
        let mut chronicle = Chronicle::after(Found::nothing());
        for lines in lives {
            chronicle.add(lines.iter().map(|text| Line { text: (*text).to_owned(), at: 0 }).collect());
        }
        chronicle
    }

    fn found(now_ms: u64, completed: &[(&str, &str, u64)]) -> Found {
        let completed = completed.iter().map(|(key, result, at)| ((*key).to_owned(), ((*result).to_owned(), *at)));
        Found { now_ms, completed: completed.collect(), token: 100, ..Found::nothing() }
    }

    const TWO: &[&str] = &["try a r1", "done a r1 10 12", "try b r2", "try c r3", "done b r2 11 13", "done c r3 12 13"];

    #[test]
    fn a_suffix_may_be_missing_and_a_gap_is_seen() {
        let chronicle = chronicle(&[TWO]);
        let whole = chronicle.judge(&found(20, &[("a", "r1", 11), ("b", "r2", 12), ("c", "r3", 12)]), 99);
        assert!(whole.wrong.is_empty() && whole.missing.is_empty() && whole.there == 3, "{whole:?}");
        let suffix = chronicle.judge(&found(20, &[("a", "r1", 11), ("c", "r3", 12)]), 99);
        assert!(suffix.wrong.is_empty() && suffix.missing == [4], "{suffix:?}");
        assert!(suffix.overtaken.is_empty(), "b and c were under way together: {suffix:?}");
        let gap = chronicle.judge(&found(20, &[("b", "r2", 12)]), 99);
        assert_eq!((gap.missing, gap.overtaken), (vec![1, 5], vec![1]));
        let expired = chronicle.judge(&found(20 + WINDOW_MS, &[]), 99);
        assert!(expired.missing.is_empty(), "{expired:?}");
    }

    #[test]
    fn what_one_life_lost_the_next_may_do_again() {
        let chronicle = chronicle(&[&TWO[..2], &["try a r4", "done a r4 15 15"]]);
        let again = chronicle.judge(&found(20, &[("a", "r4", 15)]), 99);
        assert_eq!((again.missing, again.overtaken.len(), again.there), (vec![1], 0, 1));
    }

    #[test]
    fn what_no_store_may_say_is_wrong() {
        let chronicle = chronicle(&[TWO]);
        for (what, found) in [
            ("never begun", found(20, &[("d", "r9", 12)])),
            ("another result", found(20, &[("a", "r9", 11)])),
            ("another time", found(20, &[("a", "r1", 13)])),
            ("too long", found(11 + WINDOW_MS, &[("a", "r1", 11)])),
            ("a token again", Found { token: 99, ..found(20, &[]) }),
            ("torn apart", Found { torn_apart: vec!["a".to_owned()], ..found(20, &[]) }),
            ("a message alone", {
                let messages = [("a".to_owned(), "r1".to_owned())].into();
                Found { messages, ..found(20, &[]) }
            }),
            ("blocked", Found { in_progress: vec!["a".to_owned()], ..found(20, &[]) }),
        ] {
            assert_eq!(chronicle.judge(&found, 99).wrong.len(), 1, "{what}");
        }
        let later = Chronicle::after(found(20, &[("a", "r1", 11)]));
        assert_eq!(later.judge(&found(20, &[]), 99).wrong.len(), 1, "what was on the disk once");
        assert_eq!(later.judge(&found(11 + WINDOW_MS, &[]), 99).wrong.len(), 0);
    }
}
