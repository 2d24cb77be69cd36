//! The corpus of the fuzzer in `fuzz/`.

use std::path::Path;

use onlyonce_http::StoredResponse;

#[test]
fn corpus_responses_are_rejected_or_survive_a_round_trip() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/stored_response");
    let mut decoded = 0;
    for entry in std::fs::read_dir(corpus).unwrap() {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap();
        let Ok(response) = StoredResponse::decode(&bytes) else { continue };
        assert!(response.encode().len() <= bytes.len());
        assert_eq!(StoredResponse::decode(&response.encode()).unwrap(), response);
        decoded += 1;
    }
    assert!(decoded > 2, "{decoded} responses were decoded");
}
