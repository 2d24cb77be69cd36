//! Invariants: what holds whatever a caller passes and whatever is on the disk. `docs/invariants.md` lists them.
//!
//! A broken one is a bug in this crate, or memory that changed by itself. It poisons the store, so that no call succeeds
//! on top of it, and the call that met it fails with an error that names it. Nothing panics.

use std::fmt;
use std::sync::OnceLock;

use onlyonce_core::Error;

/// Whether this build checks what would cost too much in production: unit tests, debug builds and the feature
/// `internals`.
pub(crate) const STRICT: bool = cfg!(any(test, debug_assertions, feature = "internals"));

macro_rules! invariants {
    ($($name:ident: $text:literal,)*) => {
        /// What must hold.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum Invariant {
            $(#[doc = $text] $name,)*
        }

        impl Invariant {
            /// What it says, as errors and `docs/invariants.md` have it.
            pub(crate) const fn text(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }

            /// All of them.
            #[cfg(test)]
            pub(crate) const ALL: &[Self] = &[$(Self::$name,)*];
        }
    };
}

invariants! {
    // Calls.
    AnswerForEachKey: "each key of a call has exactly one answer",
    KeyInRequest: "a key lies within the bytes of its request and is not empty",
    // Memtable.
    IndexedSlot: "each entry of an arena's index points to a slot that holds a key",
    KeyInArena: "the key and the result of a slot lie within the bytes of their arena",
    CountsNotNegative: "the counts of the memtable are never negative",
    OnlyEndedFlushed: "a frozen set holds completed keys and ended attempts only",
    // Journal.
    RecordNumbersRise: "the numbers of journal records strictly rise",
    RecordFinishedOnce: "a journal record is finished once, and records below the finished number are finished",
    NumberReserved: "a token or record number is reserved on disk before it is used",
    // Buckets.
    SstSorted: "the keys of an SST strictly rise",
    KeyInRange: "the keys of an SST have their time within the range of its bucket",
    SstComplete: "an SST has all keys that were counted for it",
    OnlyExpiredDropped: "a bucket is dropped only when all its keys have expired",
    // Filter.
    FilterBits: "marking a key in the filter sets all its bits",
}

/// Why a store refuses, once it does. Shared by its parts, so that each can end it.
#[derive(Debug, Default)]
pub(crate) struct Poison {
    /// The reason, and what later calls fail with.
    cause: OnceLock<(String, Error)>,
    broken: OnceLock<(Invariant, String)>,
}

impl Poison {
    /// Has the store refuse: nobody knows any more what is on the disk. False if it refused already.
    pub(crate) fn set(&self, reason: &str) -> bool {
        self.set_with(reason.to_owned(), Error::Poisoned { reason: reason.to_owned() })
    }

    /// As [`Poison::set`], where later calls fail with an error of its own.
    pub(crate) fn set_with(&self, reason: String, error: Error) -> bool {
        self.cause.set((reason, error)).is_ok()
    }

    /// Notes a broken invariant, and has the store refuse.
    #[cold]
    #[inline(never)]
    pub(crate) fn broken(&self, invariant: Invariant, detail: fmt::Arguments<'_>) -> Error {
        let detail = detail.to_string();
        let error = Error::Broken { invariant: invariant.text(), detail: detail.clone() };
        if self.set(&format!("broken invariant: {}: {detail}", invariant.text())) {
            tracing::error!(%error, "store poisoned: it refuses until it is reopened");
        }
        // The first one is what is told.
        let _ = self.broken.set((invariant, detail));
        error
    }

    /// Fails where an invariant was broken. Asked before a call answers, for the parts that note it and have no error to
    /// return.
    #[inline]
    pub(crate) fn unbroken(&self) -> Result<(), Error> {
        match self.broken.get() {
            None => Ok(()),
            Some((invariant, detail)) => Err(Error::Broken { invariant: invariant.text(), detail: detail.clone() }),
        }
    }

    /// Why the store refuses, if it does.
    #[inline]
    pub(crate) fn reason(&self) -> Option<&str> {
        self.cause.get().map(|(reason, _)| reason.as_str())
    }

    /// What a call fails with once the store refuses.
    pub(crate) fn error(&self) -> Option<Error> {
        self.cause.get().map(|(_, error)| error.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use onlyonce_core::Outcome;

    #[test]
    fn the_first_reason_stays_and_a_broken_invariant_is_named() {
        let poison = Poison::default();
        assert!(poison.unbroken().is_ok() && poison.reason().is_none());
        let error = poison.broken(Invariant::SstSorted, format_args!("a after b"));
        assert_eq!((error.outcome(), error.is_retryable()), (Outcome::Unknown, false));
        let said = error.to_string();
        assert!(said.contains("the keys of an SST strictly rise") && said.contains("a after b"), "{said}");
        assert!(said.contains("bug in onlyonce"), "{said}");
        assert!(!poison.set("a write failed"));
        assert_eq!(poison.unbroken().unwrap_err().to_string(), said);
        assert!(poison.reason().is_some_and(|reason| reason.contains("the keys of an SST strictly rise")));

        let poison = Poison::default();
        assert!(poison.set("a write failed"));
        let _ = poison.broken(Invariant::SstSorted, format_args!("later"));
        assert_eq!(poison.reason(), Some("a write failed"));
        assert!(poison.unbroken().is_err(), "a call that met it fails all the same");
    }

    #[test]
    fn every_invariant_is_on_its_page() {
        let page = include_str!("../docs/invariants.md");
        for invariant in Invariant::ALL {
            assert!(page.contains(invariant.text()), "{invariant:?} is not in docs/invariants.md");
        }
    }
}
