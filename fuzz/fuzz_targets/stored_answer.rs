#![no_main]

use onlyonce::http::StoredResponse;

// A stored HTTP answer is refused, or says the same when it is written again. `src/http/stored.rs` replays the corpus.
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(answer) = StoredResponse::decode(bytes) else { return };
    let written = answer.encode();
    assert!(written.len() <= bytes.len(), "it was shorter than we write it");
    assert_eq!(StoredResponse::decode(&written).ok(), Some(answer));
});
