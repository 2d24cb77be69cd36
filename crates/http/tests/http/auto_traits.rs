//! The types that servers share between threads.

use onlyonce_http::{Attempt, Body, IdempotencyLayer, IdempotencyLayerBuilder, Idempotent, StoredResponse};

#[test]
fn public_types_are_send_and_sync() {
    fn assert<T: Send + Sync + 'static>() {}
    assert::<Attempt>();
    assert::<Idempotent<()>>();
    assert::<IdempotencyLayer>();
    assert::<IdempotencyLayerBuilder>();
    assert::<StoredResponse>();
    assert::<Body<axum::body::Bytes>>();
}
