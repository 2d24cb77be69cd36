//! A server on a socket, and a client.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderName};
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use onlyonce_core::Engine;
use onlyonce_http::{Attempt, IdempotencyLayer, LayerStats};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tower_service::Service;

use crate::handlers::{HandlerState, router};

pub(crate) static KEY: HeaderName = HeaderName::from_static("idempotency-key");
pub(crate) static REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");
pub(crate) static TENANT: HeaderName = HeaderName::from_static("x-tenant");

pub(crate) type HttpClient = Client<HttpConnector, Full<Bytes>>;

/// An operation that takes longer has hung.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(30);

pub(crate) async fn with_timeout<F: Future>(work: F) -> F::Output {
    tokio::time::timeout(TIMEOUT, work).await.expect("timed out")
}

pub(crate) struct TestServer {
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) layer: IdempotencyLayer,
    pub(crate) handlers: Arc<HandlerState>,
    pub(crate) address: SocketAddr,
    pub(crate) client: HttpClient,
}

pub(crate) struct TestResponse {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: String,
}

impl TestResponse {
    pub(crate) fn is_replayed(&self) -> bool {
        self.headers.get(&REPLAYED).is_some_and(|value| value == "true")
    }

    /// Checks the form of a problem and returns its code.
    pub(crate) fn code(&self) -> String {
        assert_eq!(self.headers[CONTENT_TYPE], "application/problem+json");
        let problem: serde_json::Value = serde_json::from_str(&self.body).unwrap();
        assert_eq!(problem["status"].as_u64(), Some(u64::from(self.status.as_u16())));
        for member in ["type", "title", "detail"] {
            assert!(!problem[member].as_str().unwrap().is_empty(), "{problem}");
        }
        problem["code"].as_str().unwrap().to_owned()
    }

    pub(crate) fn problem(&self) -> (u16, String) {
        (self.status.as_u16(), self.code())
    }

    pub(crate) fn text(&self) -> (u16, &str) {
        (self.status.as_u16(), &self.body)
    }
}

impl TestServer {
    /// Starts a server whose layer takes the scope from `x-tenant`.
    pub(crate) async fn start(
        engine: impl Into<Arc<dyn Engine>>,
        layer: impl FnOnce(IdempotencyLayer) -> IdempotencyLayer,
    ) -> Self {
        let engine = engine.into();
        let layer = layer(
            IdempotencyLayer::builder(Arc::clone(&engine))
                .scope(|request| request.headers.get(&TENANT).map(|tenant| tenant.as_bytes().to_vec())),
        );
        let handlers = Arc::<HandlerState>::default();
        let app = router().layer(layer.clone()).with_state(Arc::clone(&handlers));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        let client = Client::builder(TokioExecutor::new()).retry_canceled_requests(false).build_http();
        Self { engine, layer, handlers, address, client }
    }

    /// A POST of tenant `a`.
    pub(crate) fn request(&self, path: &str, key: Option<&str>) -> http::request::Builder {
        let uri = format!("http://{}{path}", self.address);
        let request = Request::builder().method(Method::POST).uri(uri).header(&TENANT, "a");
        match key {
            Some(key) => request.header(&KEY, key),
            None => request,
        }
    }

    pub(crate) async fn send(&self, request: http::request::Builder, body: impl Into<Bytes>) -> TestResponse {
        send(&self.client, request.body(Full::new(body.into())).unwrap()).await.unwrap()
    }

    pub(crate) async fn post(&self, path: &str, key: &str) -> TestResponse {
        self.send(self.request(path, Some(key)), "").await
    }

    /// Sends a POST in a task of its own.
    pub(crate) fn spawn_post(&self, path: &str, key: &str) -> JoinHandle<TestResponse> {
        let (client, request) = (self.client.clone(), self.request(path, Some(key)));
        tokio::spawn(async move { send(&client, request.body(Full::default()).unwrap()).await.unwrap() })
    }

    /// Sends a POST and returns the response when its head has arrived.
    pub(crate) async fn open(
        &self,
        path: &str,
        key: &str,
    ) -> http::Response<impl http_body::Body<Data = Bytes> + Unpin + use<>> {
        let request = self.request(path, Some(key)).body(Full::default()).unwrap();
        with_timeout(self.client.request(request)).await.unwrap()
    }

    /// Waits until a counter of the layer reaches a value.
    pub(crate) async fn wait_for_stat(&self, counter: impl Fn(LayerStats) -> u64, value: u64) {
        let reached = async {
            while counter(self.layer.stats()) < value {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        with_timeout(reached).await;
    }
}

pub(crate) async fn send(
    client: &HttpClient,
    request: Request<Full<Bytes>>,
) -> Result<TestResponse, Box<dyn std::error::Error + Send + Sync>> {
    let (parts, body) = with_timeout(client.request(request)).await?.into_parts();
    let body = String::from_utf8(with_timeout(body.collect()).await?.to_bytes().to_vec())?;
    Ok(TestResponse { status: parts.status, headers: parts.headers, body })
}

/// Returns the next frame of a body, `end` at its end, and `aborted` if it fails.
pub(crate) async fn next_frame(body: &mut (impl http_body::Body<Data = Bytes> + Unpin)) -> String {
    match with_timeout(body.frame()).await {
        Some(Ok(frame)) => String::from_utf8(frame.into_data().unwrap_or_default().to_vec()).unwrap(),
        Some(Err(_)) => "aborted".to_owned(),
        None => "end".to_owned(),
    }
}

pub(crate) fn full_body(text: &'static str) -> Full<Bytes> {
    Full::new(Bytes::from(text))
}

/// A tower service without axum.
#[derive(Clone, Default)]
pub(crate) struct PlainService {
    pub(crate) runs: Arc<std::sync::atomic::AtomicUsize>,
    /// The number of first runs that fail.
    pub(crate) failures: usize,
}

impl<B> Service<Request<onlyonce_http::Body<B>>> for PlainService {
    type Response = http::Response<Full<Bytes>>;
    type Error = std::io::Error;
    type Future = std::future::Ready<Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<onlyonce_http::Body<B>>) -> Self::Future {
        let run = self.runs.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        if run < self.failures {
            return std::future::ready(Err(std::io::Error::other("a failure that the test wants")));
        }
        let attempt = request.extensions().get::<Attempt>().unwrap();
        let body = format!("run {run}, prior {:?}", attempt.info().prior());
        std::future::ready(Ok(http::Response::new(Full::new(Bytes::from(body)))))
    }
}
