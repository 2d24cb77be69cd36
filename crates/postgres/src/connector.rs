//! How a connection is opened: its settings, its time limits, and the task that reads from it.

use std::sync::Arc;
use std::time::Duration;

use deadpool_postgres::ClientWrapper;
use onlyonce_core::BoxFuture;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_postgres::config::TargetSessionAttrs;
use tokio_postgres::tls::{MakeTlsConnect, TlsConnect};
use tokio_postgres::{AsyncMessage, Client, Config, Socket};

use crate::names::Names;

/// The notifications of a connection. The channel closes when the connection does.
pub(crate) type Notifications = mpsc::UnboundedReceiver<String>;
/// A client, the notifications of its connection, and the task that reads from it.
type Opened = (Client, Notifications, JoinHandle<()>);
type Connecting = BoxFuture<'static, Result<Opened, tokio_postgres::Error>>;

/// Opens connections with the settings that the statements need.
#[derive(Clone)]
pub(crate) struct Connector {
    connect: Arc<dyn Fn() -> Connecting + Send + Sync>,
    /// How long it takes at most until a connection is ready, if its server answers.
    limit: Duration,
}

impl Connector {
    pub(crate) fn new<T>(config: &Config, tls: T, names: &Names, statement_limit: Duration) -> Self
    where
        T: MakeTlsConnect<Socket> + Clone + Sync + Send + 'static,
        T::Stream: Sync + Send,
        T::TlsConnect: Sync + Send,
        <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
    {
        let config = with_settings(config, names, statement_limit);
        let limit = connect_limit(&config, statement_limit);
        let connect = move || -> Connecting {
            let (config, tls) = (config.clone(), tls.clone());
            Box::pin(async move { connect(&config, tls).await })
        };
        Self { connect: Arc::new(connect), limit }
    }

    pub(crate) async fn connect(&self) -> Result<(Client, Notifications), tokio_postgres::Error> {
        let (client, notifications, _) = (self.connect)().await?;
        Ok((client, notifications))
    }

    /// A connection that prepares each statement once.
    pub(crate) async fn connect_cached(&self) -> Result<ClientWrapper, tokio_postgres::Error> {
        let (client, _, task) = (self.connect)().await?;
        Ok(ClientWrapper::new(client, task))
    }

    /// The time limit of a new connection, with its checks.
    pub(crate) fn limit(&self) -> Duration {
        self.limit
    }
}

/// The servers are tried in order, so that each one that does not answer costs a time limit of the network. The rest is for one that
/// answers: encryption, authentication, the checks of the connection.
fn connect_limit(config: &Config, statement_limit: Duration) -> Duration {
    let servers = config.get_hosts().len().max(config.get_hostaddrs().len()).max(1);
    let of_each = config.get_connect_timeout().copied().unwrap_or_default();
    of_each.saturating_mul(u32::try_from(servers).unwrap_or(u32::MAX)).saturating_add(statement_limit)
}

/// The settings win over those of the role and the database. Of several servers, a connection is one to the primary. Sequential scans
/// are avoided because a plan that was made while the table was small is used until the next `ANALYZE`.
fn with_settings(config: &Config, names: &Names, statement_limit: Duration) -> Config {
    let mut config = config.clone();
    // The server ends a statement before the store closes its connection, which then knows that it did nothing. The wait for a lock ends
    // before the statement does, so that the store knows the reason.
    let timeout_ms = (statement_limit * 9 / 10).as_millis().clamp(1, i32::MAX as u128);
    let lock_timeout_ms = (statement_limit * 3 / 4).as_millis().clamp(1, 3_000);
    let settings = "-c onlyonce.session=direct -c synchronous_commit=on -c enable_seqscan=off -c plan_cache_mode=force_generic_plan \
                    -c jit=off -c idle_session_timeout=0 -c idle_in_transaction_session_timeout=0 \
                    -c default_transaction_isolation=read\\ committed \
                    -c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3 \
                    -c tcp_user_timeout=25s -c client_min_messages=warning -c default_transaction_read_only=off";
    let given = config.get_options().unwrap_or_default();
    config.options(format!("{given} {settings} -c statement_timeout={timeout_ms} -c lock_timeout={lock_timeout_ms}"));
    let has_several_servers = config.get_hosts().len().max(config.get_hostaddrs().len()) > 1;
    if has_several_servers {
        config.target_session_attrs(TargetSessionAttrs::ReadWrite);
    }
    if config.get_application_name().is_none() {
        config.application_name(names.plain("onlyonce"));
    }
    if config.get_connect_timeout().is_none() {
        // The second server is reached soon if the machine of the first one vanished.
        config.connect_timeout(Duration::from_secs(if has_several_servers { 2 } else { 5 }));
    }
    // Both sides notice within about 25 seconds that the other one is gone.
    config.keepalives_idle(Duration::from_secs(10));
    config.keepalives_interval(Duration::from_secs(5)).keepalives_retries(3);
    config.tcp_user_timeout(Duration::from_secs(25));
    config
}

async fn connect<T>(config: &Config, tls: T) -> Result<Opened, tokio_postgres::Error>
where
    T: MakeTlsConnect<Socket>,
    T::Stream: Send + 'static,
{
    let (client, mut connection) = config.connect(tls).await?;
    let (sender, notifications) = mpsc::unbounded_channel();
    let task = tokio::spawn(async move {
        loop {
            match std::future::poll_fn(|context| connection.poll_message(context)).await {
                Some(Ok(AsyncMessage::Notification(notification))) => {
                    // Only a session listens. Without a receiver the connection still answers queries.
                    let _ = sender.send(notification.payload().to_owned());
                }
                // The server has acknowledged a commit without its standby, because the wait was cancelled. Without an answer the call
                // is repeated, and waits for the standby again.
                Some(Ok(AsyncMessage::Notice(notice))) if notice.routine() == Some("SyncRepWaitForLSN") => return,
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return,
            }
        }
    });
    Ok((client, notifications, task))
}
