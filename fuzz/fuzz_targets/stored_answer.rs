#![no_main]

use onlyonce::http::StoredResponse;

// A stored HTTP response is rejected, or decodes to the same response after it is encoded again. `src/http/stored.rs`
// replays the corpus.
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(answer) = StoredResponse::decode(bytes) else { return };
    let written = answer.encode();
    assert!(written.len() <= bytes.len(), "the input is shorter than its encoding");
    assert_eq!(StoredResponse::decode(&written).ok(), Some(answer));
});
