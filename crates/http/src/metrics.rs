//! Exports the counters of all layers to the `metrics` facade.

use metrics::{Unit, counter, describe_counter};

use crate::event::Event;

const REQUESTS: &str = "onlyonce.http.requests";
const STREAMS: &str = "onlyonce.http.streams";
const BODIES_NOT_STORED: &str = "onlyonce.http.bodies_not_stored";

pub(crate) fn describe() {
    describe_counter!(REQUESTS, Unit::Count, "Guarded requests, by outcome");
    describe_counter!(STREAMS, Unit::Count, "Responses that were forwarded as a stream");
    describe_counter!(BODIES_NOT_STORED, Unit::Count, "Responses stored without their body, which was too large");
}

pub(crate) fn count(event: Event) {
    let outcome = match event {
        // Its outcome is counted when it is known.
        Event::Executed => return,
        Event::Streamed => return counter!(STREAMS).increment(1),
        Event::BodyNotStored => return counter!(BODIES_NOT_STORED).increment(1),
        Event::Stored => "stored",
        Event::Released => "released",
        Event::Interrupted => "interrupted",
        Event::Replayed => "replayed",
        Event::InProgress => "in_progress",
        Event::PayloadMismatch => "payload_mismatch",
        Event::Rejected => "rejected",
        Event::FailClosed => "fail_closed",
        Event::FailOpen => "fail_open",
    };
    counter!(REQUESTS, "outcome" => outcome).increment(1);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use metrics_util::debugging::{DebugValue, DebuggingRecorder};

    use super::*;
    use crate::stats::Counters;

    #[test]
    fn each_outcome_has_a_label_of_its_own() {
        let outcomes = [
            Event::Stored,
            Event::Released,
            Event::Interrupted,
            Event::Replayed,
            Event::InProgress,
            Event::PayloadMismatch,
            Event::Rejected,
            Event::FailClosed,
            Event::FailOpen,
        ];
        let others = [Event::Executed, Event::Streamed, Event::BodyNotStored];
        let recorder = DebuggingRecorder::new();
        metrics::with_local_recorder(&recorder, || {
            let counters = Counters::new();
            outcomes.into_iter().chain(others).for_each(|event| counters.count(event));
        });
        let mut exported = BTreeSet::new();
        for (key, _, description, value) in recorder.snapshotter().snapshot().into_vec() {
            assert_eq!(value, DebugValue::Counter(1));
            assert!(description.is_some(), "{key:?}");
            let label = key.key().labels().next().map(|label| label.value().to_owned());
            assert!(exported.insert((key.key().name().to_owned(), label)));
        }
        assert_eq!(exported.iter().filter(|(name, label)| name == REQUESTS && label.is_some()).count(), outcomes.len());
        assert_eq!(exported.len(), outcomes.len() + 2, "{exported:?}");
    }
}
