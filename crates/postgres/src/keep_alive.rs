//! The handle that keeps a lease, and the task that renews all kept leases of the process.

use std::sync::Arc;
use std::time::Duration;

use onlyonce_core::{BoxFuture, Error, Grant, KeepAlive};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::connection::Source;
use crate::core::Core;
use crate::renewal::renew;

/// Keeps a lease until it is dropped.
pub(crate) struct KeepAliveHandle {
    core: Arc<Core>,
    grant: Arc<Grant>,
    lost: watch::Receiver<Option<Error>>,
}

impl KeepAliveHandle {
    pub(crate) fn start(core: &Arc<Core>, grant: &Arc<Grant>) -> Self {
        Self { core: Arc::clone(core), grant: Arc::clone(grant), lost: core.kept.keep(grant) }
    }
}

impl KeepAlive for KeepAliveHandle {
    fn lost<'a>(&'a mut self) -> BoxFuture<'a, Error> {
        Box::pin(async move {
            // An error means that the lease is not kept any more; what ended it is still there.
            let _ = self.lost.wait_for(Option::is_some).await;
            let lost = self.lost.borrow().clone();
            lost.unwrap_or_else(|| self.grant.superseded())
        })
    }
}

impl Drop for KeepAliveHandle {
    fn drop(&mut self) {
        if self.lost.borrow().is_none() {
            self.core.kept.release(self.grant.token().get());
        }
    }
}

/// Renews the kept leases when a third of their time is over, all of them in one statement.
pub(crate) async fn renew_kept(core: Arc<Core>) {
    let lease_ms = core.options.lease_ms();
    let interval_ms = (lease_ms / 3).max(1);
    loop {
        let wait_ms = match core.kept.oldest_ms() {
            Some(oldest_ms) => oldest_ms.saturating_add(interval_ms).saturating_sub(core.monotonic_ms()),
            None => u64::MAX,
        };
        if wait_ms > 0 {
            // Woken by a new lease, which may be older than the others.
            let changed = core.kept.changed.notified();
            let wait = Duration::from_millis(wait_ms.min(60 * 60 * 1_000));
            if timeout(wait, changed).await.is_ok() {
                continue;
            }
        }
        // Those that are due soon, too, so that their renewals come together from now on.
        let now_ms = core.monotonic_ms();
        let due = core.kept.due(now_ms.saturating_sub(interval_ms / 2));
        if due.is_empty() {
            continue;
        }
        match renew(&core, Source::Reserved, &due).await {
            Ok(answers) => {
                for (grant, answer) in due.iter().zip(answers) {
                    match answer {
                        Ok(()) => core.kept.renewed(grant.token().get(), now_ms),
                        Err(error) => core.kept.end(grant.token().get(), &error),
                    }
                }
            }
            Err(error) => {
                tracing::warn!(error = %error.chain(), leases = due.len(), "leases are not renewed: retrying");
                tokio::time::sleep(Duration::from_millis((interval_ms / 4).clamp(10, 1_000))).await;
            }
        }
    }
}
