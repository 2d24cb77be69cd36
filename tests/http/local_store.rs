//! The layer over a store on disk.

use onlyonce::OnStoreFailure;

use crate::local::LocalServer;

#[tokio::test]
async fn side_writes_are_stored_with_the_response_or_not_at_all() {
    let server = LocalServer::new().await;
    for _ in 0..3 {
        assert_eq!(server.post("/order/201", "done").await.status, 201);
    }
    assert_eq!(server.post("/order/500", "failed").await.status, 500);
    let messages = server.store.outbox(10).await.unwrap();
    assert_eq!(messages.len(), 1);
    assert_eq!((&messages[0].topic[..], &messages[0].key[..]), (&b"orders"[..], &b"201"[..]));
}

#[tokio::test]
async fn requests_without_deduplication_count_in_the_stats_of_the_store() {
    let server = LocalServer::with(|builder| builder, |layer| layer.on_store_failure(OnStoreFailure::FailOpen)).await;
    server.store.close().await.unwrap();
    for _ in 0..3 {
        assert_eq!(server.post("/charges", "k").await.status, 201);
    }
    assert_eq!((server.layer.stats().fail_open, server.store.stats().fail_open), (3, 3));
}
