use crate::error::{Error, Result};

/// The failure that a test switched on, and how often one was.
#[derive(Debug, Default)]
pub(super) struct Failure {
    mode: Option<Mode>,
    count: u64,
    last: Option<Error>,
}

#[derive(Debug)]
enum Mode {
    /// Calls do nothing.
    Before(Error),
    /// Calls happen, and their answers are lost.
    After(Error),
}

impl Failure {
    pub(super) fn before(&mut self, error: Error) {
        self.count += 1;
        self.last = Some(error.clone());
        self.mode = Some(Mode::Before(error));
    }

    pub(super) fn after(&mut self, error: Error) {
        self.mode = Some(Mode::After(error));
    }

    pub(super) fn recover(&mut self) {
        self.mode = None;
    }

    /// Rejects a call before it does anything.
    pub(super) fn admit(&self) -> Result<()> {
        match &self.mode {
            Some(Mode::Before(error)) => Err(error.clone()),
            Some(Mode::After(_)) | None => Ok(()),
        }
    }

    /// The error that replaces the answer of a call that happened.
    pub(super) fn lost_answer(&self) -> Option<Error> {
        match &self.mode {
            Some(Mode::After(error)) => Some(error.clone()),
            Some(Mode::Before(_)) | None => None,
        }
    }

    /// How often calls began to fail.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// The last failure, if calls began to fail since their count was `count`.
    pub(super) fn since(&self, count: u64) -> Option<Error> {
        (self.count != count).then(|| self.last.clone()).flatten()
    }
}
