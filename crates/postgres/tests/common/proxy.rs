//! A proxy between a store and the server, which cuts connections at a message that the test chooses.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, UnixStream};
use tokio::sync::watch;
use tokio_postgres::Config;
use tokio_postgres::config::Host;

/// What a proxy cuts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cut {
    /// The connection of the message.
    One,
    /// All connections, as the end of the server does.
    All,
}

#[derive(Debug, Default)]
struct Plan {
    /// How many messages pass before the cut, in both directions and on all connections.
    left: Option<(u64, Option<Cut>)>,
    passed: u64,
}

#[derive(Clone)]
pub(crate) struct Proxy {
    plan: Arc<Mutex<Plan>>,
    /// Grows when all connections are cut.
    generation: watch::Sender<u64>,
    /// Whether it removes the settings of a new connection, as a pooler does that shares connections.
    removes_settings: Arc<AtomicBool>,
    pub(crate) config: Config,
}

impl Proxy {
    /// Starts a proxy to the server of `config`.
    pub(crate) async fn start(config: &Config) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let Some(Host::Unix(dir)) = config.get_hosts().first() else { panic!("the server has no Unix socket") };
        let socket = dir.join(".s.PGSQL.5432");
        let mut proxied = Config::new();
        proxied.host("127.0.0.1").port(port).user(config.get_user().unwrap()).dbname(config.get_dbname().unwrap());
        let generation = watch::channel(0).0;
        let proxy = Self { plan: Arc::default(), generation, removes_settings: Arc::default(), config: proxied };
        tokio::spawn(proxy.clone().accept(listener, socket));
        proxy
    }

    /// Removes the settings of new connections from now on.
    pub(crate) fn remove_settings(&self) {
        self.removes_settings.store(true, Ordering::SeqCst);
    }

    /// Cuts before the message with this number, from 0.
    pub(crate) fn cut_at(&self, message: u64, cut: Cut) {
        *self.plan.lock().unwrap() = Plan { left: Some((message, Some(cut))), passed: 0 };
    }

    /// Returns whether it cut, and how many messages passed.
    pub(crate) fn disarm(&self) -> (bool, u64) {
        let mut plan = self.plan.lock().unwrap();
        let has_cut = plan.left.take().is_some_and(|(_, cut)| cut.is_none());
        (has_cut, plan.passed)
    }

    async fn accept(self, listener: TcpListener, socket: PathBuf) {
        while let Ok((client, _)) = listener.accept().await {
            let Ok(server) = UnixStream::connect(&socket).await else { continue };
            client.set_nodelay(true).unwrap();
            let proxy = self.clone();
            tokio::spawn(async move {
                let mut generation = proxy.generation.subscribe();
                generation.mark_unchanged();
                let (from_client, to_client) = client.into_split();
                let (from_server, to_server) = server.into_split();
                // The first end closes both directions.
                tokio::select! {
                    () = proxy.forward(from_client, to_server, true) => {}
                    () = proxy.forward(from_server, to_client, false) => {}
                    _ = generation.changed() => {}
                }
            });
        }
    }

    /// Forwards messages until the end or a cut.
    async fn forward(&self, mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, begins_untyped: bool) {
        let mut is_untyped = begins_untyped;
        loop {
            let Ok(mut message) = read_message(&mut from, is_untyped).await else { return };
            if is_untyped && self.removes_settings.load(Ordering::SeqCst) {
                message = without_options(&message);
            }
            is_untyped = false;
            if self.is_cut() || to.write_all(&message).await.is_err() {
                return;
            }
        }
    }

    fn is_cut(&self) -> bool {
        let mut plan = self.plan.lock().unwrap();
        let Some((left, cut)) = &mut plan.left else { return false };
        if *left > 0 {
            *left -= 1;
            plan.passed += 1;
            return false;
        }
        let Some(cut) = cut.take() else { return false };
        if cut == Cut::All {
            self.generation.send_modify(|generation| *generation += 1);
        }
        true
    }
}

/// The first message of a client, without the parameter `options`: a length, a version, and names and values that end with a zero.
fn without_options(message: &[u8]) -> Vec<u8> {
    let mut parts = message[8..].split(|byte| *byte == 0);
    let mut kept = message[4..8].to_vec();
    while let (Some(name), Some(value)) = (parts.next(), parts.next()) {
        if !name.is_empty() && name != b"options" {
            kept.extend([name, b"\0", value, b"\0"].concat());
        }
    }
    kept.push(0);
    let length = u32::try_from(kept.len() + 4).unwrap();
    [&length.to_be_bytes()[..], &kept].concat()
}

/// One message of the protocol: a type, unless it is the first of a client, a length, and the rest.
async fn read_message(from: &mut (impl AsyncRead + Unpin), is_untyped: bool) -> std::io::Result<Vec<u8>> {
    let mut message = vec![0; if is_untyped { 4 } else { 5 }];
    from.read_exact(&mut message).await?;
    let length = message.last_chunk::<4>().map_or(0, |length| u32::from_be_bytes(*length)) as usize;
    let begin = message.len();
    message.resize(begin + length - 4, 0);
    from.read_exact(&mut message[begin..]).await?;
    Ok(message)
}
