//! Invariants: conditions that hold for any input and any disk content. `docs/invariants.md` lists them.
//!
//! A broken invariant is a bug in this crate or a memory fault. It poisons the store: the call that detects it fails
//! with an error that names it, and later calls fail with `Error::Poisoned`. Nothing panics.

use std::fmt;
use std::sync::OnceLock;

use onlyonce_core::Error;

/// Whether this build runs checks that are too expensive for production: unit tests, debug builds and the feature
/// `__internals`.
pub(crate) const STRICT: bool = cfg!(any(test, debug_assertions, feature = "__internals"));

macro_rules! invariants {
    ($($name:ident: $text:literal,)*) => {
        /// A condition that always holds.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum Invariant {
            $(#[doc = $text] $name,)*
        }

        impl Invariant {
            /// The text in errors and in `docs/invariants.md`.
            pub(crate) const fn text(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }

            /// All invariants.
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

/// Whether and why the store is poisoned. The parts of a store share it, so that each of them can poison the store.
#[derive(Debug, Default)]
pub(crate) struct Poison {
    /// The reason, and the error of later calls.
    cause: OnceLock<(String, Error)>,
    broken: OnceLock<(Invariant, String)>,
}

impl Poison {
    /// Poisons the store because the state of the disk is unknown. False if it was poisoned before.
    pub(crate) fn set(&self, reason: &str) -> bool {
        self.set_with(reason.to_owned(), Error::Poisoned { reason: reason.to_owned() })
    }

    /// As [`Poison::set`], with the error that later calls return.
    pub(crate) fn set_with(&self, reason: String, error: Error) -> bool {
        self.cause.set((reason, error)).is_ok()
    }

    /// Records a broken invariant and poisons the store.
    #[cold]
    #[inline(never)]
    pub(crate) fn broken(&self, invariant: Invariant, detail: fmt::Arguments<'_>) -> Error {
        let detail = detail.to_string();
        let error = Error::Broken { invariant: invariant.text(), detail: detail.clone() };
        if self.set(&format!("broken invariant: {}: {detail}", invariant.text())) {
            tracing::error!(error = error.chain(), "store poisoned: reopen it");
        }
        // Only the first one is reported.
        let _ = self.broken.set((invariant, detail));
        error
    }

    /// Fails if an invariant was broken. Calls check it before they return, because some parts that detect a broken
    /// invariant cannot return an error.
    #[inline]
    pub(crate) fn unbroken(&self) -> Result<(), Error> {
        match self.broken.get() {
            None => Ok(()),
            Some((invariant, detail)) => Err(Error::Broken { invariant: invariant.text(), detail: detail.clone() }),
        }
    }

    /// Why the store is poisoned, if it is.
    #[inline]
    pub(crate) fn reason(&self) -> Option<&str> {
        self.cause.get().map(|(reason, _)| reason.as_str())
    }

    /// The error of calls on a poisoned store.
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
        let text = error.to_string();
        assert!(text.contains("the keys of an SST strictly rise") && text.contains("a after b"), "{text}");
        assert!(text.contains("bug in onlyonce"), "{text}");
        assert!(!poison.set("a write failed"));
        assert_eq!(poison.unbroken().unwrap_err().to_string(), text);
        assert!(poison.reason().is_some_and(|reason| reason.contains("the keys of an SST strictly rise")));

        let poison = Poison::default();
        assert!(poison.set("a write failed"));
        let _ = poison.broken(Invariant::SstSorted, format_args!("later"));
        assert_eq!(poison.reason(), Some("a write failed"));
        assert!(poison.unbroken().is_err(), "the call that detected it fails, too");
    }

    #[test]
    fn the_invariants_page_lists_every_invariant() {
        let page = include_str!("../docs/invariants.md");
        for invariant in Invariant::ALL {
            assert!(page.contains(invariant.text()), "{invariant:?} is not in docs/invariants.md");
        }
    }
}
