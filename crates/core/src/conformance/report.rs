use std::fmt;

/// The outcome of each check.
#[derive(Debug, Clone)]
#[must_use = "call `into_result` to see whether all checks passed"]
pub struct Report {
    /// The name and the outcome of each check, in the order of the suite.
    pub outcomes: Vec<(String, Outcome)>,
}

/// The outcome of a check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The engine did what it must.
    Passed,
    /// The factory has no engine with the setup of this check.
    Skipped,
    /// The engine did something else.
    Failed(String),
}

/// The checks that failed.
#[derive(Clone, thiserror::Error)]
#[non_exhaustive]
pub struct Failed {
    /// The name of each check, and what happened.
    pub checks: Vec<(String, String)>,
    /// The number of checks that ran.
    pub of: usize,
}

impl Report {
    /// An error that lists the checks that failed, if any did.
    ///
    /// # Errors
    ///
    /// [`Failed`] unless all checks passed or were skipped.
    pub fn into_result(self) -> Result<(), Failed> {
        let of = self.outcomes.iter().filter(|(_, outcome)| *outcome != Outcome::Skipped).count();
        let failed = |(name, outcome)| match outcome {
            Outcome::Failed(reason) => Some((name, reason)),
            Outcome::Passed | Outcome::Skipped => None,
        };
        let checks: Vec<_> = self.outcomes.into_iter().filter_map(failed).collect();
        if checks.is_empty() { Ok(()) } else { Err(Failed { checks, of }) }
    }
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} checks failed:", self.checks.len(), self.of)?;
        self.checks.iter().try_for_each(|(name, reason)| write!(f, "\n  {name}: {reason}"))
    }
}

/// As its `Display`: a test that unwraps the result shows the list.
impl fmt::Debug for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
