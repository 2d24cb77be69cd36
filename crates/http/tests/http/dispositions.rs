//! Which responses are stored, and which free the key.

use http::Request;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE};
use http_body_util::BodyExt;
use onlyonce_core::OnInterrupt;
use onlyonce_http::{Disposition, IdempotencyLayer};
use tower_layer::Layer;
use tower_service::Service;

use crate::memory::MemoryServer;
use crate::setup::{KEY, PlainService, full_body};

#[tokio::test]
async fn a_response_that_is_not_stored_runs_again_with_its_prior() {
    let server = MemoryServer::new().await;
    for (path, option, again) in [
        ("/status/200", "", None),
        ("/status/402", "", None),
        ("/status/429", "", Some("prior Some(Released)")),
        ("/status/500", "", Some("prior Some(Dropped)")),
        ("/status/503", "", Some("prior Some(Dropped)")),
        // The handler sets the disposition.
        ("/status/502", "release", Some("prior Some(Released)")),
        ("/status/502", "store", None),
        ("/status/201", "interrupted", Some("prior Some(Dropped)")),
        // With `Retry-After`.
        ("/status/409", "later", Some("prior Some(Dropped)")),
        ("/status/202", "later", None),
        ("/status/429", "store", None),
    ] {
        let request = || server.request(path, Some(&format!("{path} {option}").replace(' ', "-"))).header("x", "y");
        let first = server.send(request(), option).await;
        assert!(first.body.ends_with("attempt 1, prior None"), "{}", first.body);
        let second = server.send(request(), option).await;
        assert_eq!(second.status, first.status);
        match again {
            None => assert!(second.is_replayed() && second.body == first.body, "{path} {option}: {}", second.body),
            Some(prior) => assert!(second.body.ends_with(&format!("attempt 2, {prior}")), "{path}: {}", second.body),
        }
    }
    let stats = server.layer.stats();
    assert_eq!((stats.stored, stats.released, stats.interrupted), (5, 4, 8), "{stats:?}");

    let like_stripe = MemoryServer::with(|builder| builder, |layer| layer.disposition(|_| Disposition::Store)).await;
    like_stripe.post("/status/500", "k").await;
    assert!(like_stripe.post("/status/500", "k").await.is_replayed());
}

#[tokio::test]
async fn a_time_limit_around_the_handler_is_not_replayed() {
    let server = MemoryServer::new().await;
    assert_eq!(server.post("/limited", "k").await.status, 408);
    assert_eq!(server.layer.stats().interrupted, 1);
    server.handlers.finish.send();
    let retry = server.post("/limited", "k").await;
    assert_eq!(retry.text(), (200, "run 2, attempt 2, prior Some(Dropped)"));
    assert!(server.post("/limited", "k").await.is_replayed());

    // Under `Hold` the unknown outcome needs a resolution.
    let held = MemoryServer::with(|builder| builder.on_interrupt(OnInterrupt::Hold), |layer| layer).await;
    assert_eq!(held.post("/limited", "k").await.status, 408);
    assert_eq!(held.post("/limited", "k").await.problem(), (409, "held".to_owned()));
}

#[tokio::test]
async fn a_status_that_is_not_a_result_of_the_work_is_not_replayed() {
    let server = MemoryServer::new().await;
    let not_processed = [307, 308, 401, 405, 407, 411, 412, 413, 414, 415, 417, 421, 423, 426, 428, 429, 431];
    let unknown = [406, 408, 424, 425, 460, 499, 500, 502, 503, 504, 599];
    let of_the_work = [200, 201, 202, 301, 302, 303, 400, 402, 403, 404, 409, 410, 416, 418, 422, 451];
    let all = [(&not_processed[..], "Some(Released)"), (&unknown, "Some(Dropped)"), (&of_the_work, "")];
    for (status, prior) in all.into_iter().flat_map(|(all, prior)| all.iter().map(move |status| (*status, prior))) {
        let path = format!("/status/{status}");
        assert_eq!(server.post(&path, &path).await.status.as_u16(), status);
        let retry = server.post(&path, &path).await;
        assert_eq!(retry.status.as_u16(), status);
        assert_eq!(retry.is_replayed(), prior.is_empty(), "{status}");
        assert!(
            prior.is_empty() || retry.body.ends_with(&format!("attempt 2, prior {prior}")),
            "{status}: {}",
            retry.body
        );
    }
}

#[tokio::test]
async fn a_request_with_corrected_headers_runs() {
    let server = MemoryServer::new().await;
    let order = |key: &'static str| server.request("/orders", Some(key));
    let json = "application/json";
    // 415 of an extractor.
    for kind in [None, Some("text/plain")] {
        let request = kind.into_iter().fold(order("kind"), |request, kind| request.header(CONTENT_TYPE, kind));
        assert_eq!(server.send(request, "{\"cents\":12}").await.status, 415);
    }
    let corrected = server.send(order("kind").header(CONTENT_TYPE, json), "{\"cents\":12}").await;
    assert_eq!(corrected.text(), (201, "run 1, attempt 3, prior Some(Released), 12 cents"));
    assert!(server.send(order("kind").header(CONTENT_TYPE, json), "{\"cents\":12}").await.is_replayed());
    // 401 of an inner layer.
    assert_eq!(server.post("/members", "member").await.status, 401);
    let member = || server.request("/members", Some("member")).header(AUTHORIZATION, "Bearer sk_alice");
    assert_eq!(server.send(member(), "").await.text(), (201, "run 2, attempt 2, prior Some(Released), body of 0"));
    assert!(server.send(member(), "").await.is_replayed());
    // 406 may follow the effect.
    let accept = |kind| order("accept").header(CONTENT_TYPE, json).header(ACCEPT, kind);
    assert_eq!(server.send(accept("image/png"), "{\"cents\":1}").await.status, 406);
    let corrected = server.send(accept(json), "{\"cents\":1}").await;
    assert_eq!(corrected.text(), (201, "run 4, attempt 2, prior Some(Dropped), 1 cents"));
}

#[tokio::test]
async fn with_explicit_begin_an_error_before_begin_releases_the_key() {
    let server = MemoryServer::with(|builder| builder, |layer| layer.explicit_begin()).await;
    let send = async |path: String| {
        let request = server.request(&path, Some(&path)).header(CONTENT_TYPE, "application/json");
        server.send(request, "{\"cents\":1}").await
    };
    for (status, before, after) in [
        (200, None, None),
        (303, None, None),
        (400, Some("Released"), None),
        (403, Some("Released"), None),
        (404, Some("Released"), None),
        (422, Some("Released"), None),
        (503, Some("Released"), Some("Dropped")),
        (504, Some("Released"), Some("Dropped")),
        // After `begin`, no status releases the key.
        (401, Some("Released"), Some("Dropped")),
        (429, Some("Released"), Some("Dropped")),
    ] {
        for (when, prior) in [("before", before), ("begun", after)] {
            let path = format!("/begin/{when}/{status}");
            assert_eq!(send(path.clone()).await.status.as_u16(), status, "{path}");
            let retry = send(path.clone()).await;
            assert_eq!(retry.is_replayed(), prior.is_none(), "{path}");
            let expected = prior.map_or("prior None".to_owned(), |prior| format!("attempt 2, prior Some({prior})"));
            assert!(retry.body.contains(&expected), "{path}: {}", retry.body);
        }
    }
    // The extractor rejects the body before the handler runs.
    let invalid = || server.request("/begin/begun/200", Some("invalid")).header(CONTENT_TYPE, "application/json");
    for _ in 0..2 {
        let rejected = server.send(invalid(), "{").await;
        assert!(rejected.status == 400 && !rejected.is_replayed());
    }

    // Without the option, `begin` only prevents a release by status.
    let server = MemoryServer::new().await;
    for (when, status, prior) in [
        ("before", 401, Some("Released")),
        ("begun", 401, Some("Dropped")),
        ("before", 404, None),
        ("before", 503, Some("Dropped")),
    ] {
        let path = format!("/begin/{when}/{status}");
        let request = || server.request(&path, Some(&path)).header(CONTENT_TYPE, "application/json");
        server.send(request(), "{\"cents\":1}").await;
        let retry = server.send(request(), "{\"cents\":1}").await;
        assert_eq!(retry.is_replayed(), prior.is_none(), "{path}");
        let expected = prior.map_or("prior None".to_owned(), |prior| format!("attempt 2, prior Some({prior})"));
        assert!(retry.body.contains(&expected), "{path}: {}", retry.body);
    }
}

#[tokio::test]
async fn with_explicit_begin_a_service_error_before_begin_releases_the_key() {
    let server = MemoryServer::new().await;
    let layer = IdempotencyLayer::builder(server.store.clone()).shared_scope().explicit_begin();
    let mut service = layer.layer(PlainService { failures: 1, ..PlainService::default() });
    let request = || Request::post("/charges").header(&KEY, "k").body(full_body("same")).unwrap();
    service.call(request()).await.unwrap_err();
    assert_eq!((layer.stats().interrupted, layer.stats().released), (0, 1));
    let retry = service.call(request()).await.unwrap().into_body().collect().await.unwrap().to_bytes();
    assert_eq!(retry, "run 1, prior Some(Released)");
}

#[tokio::test]
async fn a_request_with_a_corrected_body_runs() {
    let server = MemoryServer::with(|builder| builder, |layer| layer.explicit_begin()).await;
    let order = |path| server.request(path, Some(path)).header(CONTENT_TYPE, "application/json");
    // 400, 422 and 413 of extractors.
    for invalid in ["{", "{}", &format!("{{\"cents\":{:>1000}}}", 1)] {
        assert!(server.send(order("/orders"), invalid.to_owned()).await.status.is_client_error());
    }
    let corrected = server.send(order("/orders"), "{\"cents\":12}").await;
    assert_eq!(corrected.status, 201);
    assert!(corrected.body.starts_with("run 1,") && corrected.body.ends_with(" 12 cents"), "{}", corrected.body);
    assert_eq!(server.send(order("/orders"), "{\"cents\":13}").await.problem(), (422, "key-reused".to_owned()));
    // An interrupted key keeps its fingerprint.
    assert_eq!(server.send(order("/begin/begun/503"), "{\"cents\":1}").await.status, 503);
    assert_eq!(server.send(order("/begin/begun/503"), "{\"cents\":2}").await.problem(), (422, "key-reused".to_owned()));
    // Without the option, 413 is released by its status.
    let server = MemoryServer::new().await;
    let order = || server.request("/orders", Some("k")).header(CONTENT_TYPE, "application/json");
    assert_eq!(server.send(order(), format!("{{\"cents\":{:>1000}}}", 1)).await.status, 413);
    assert_eq!(server.send(order(), "{\"cents\":1}").await.status, 201);
}
