#![no_main]

use onlyonce::http::StoredResponse;

// A stored HTTP response is rejected, or survives a round trip. `crates/http/tests/http/corpus.rs` replays the corpus.
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(response) = StoredResponse::decode(bytes) else { return };
    let encoded = response.encode();
    assert!(encoded.len() <= bytes.len(), "the encoding is longer than the input");
    assert_eq!(StoredResponse::decode(&encoded).ok(), Some(response));
});
