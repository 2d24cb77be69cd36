//! Wakes a background thread.

use std::sync::OnceLock;

use crossbeam::channel::{Receiver, Sender, bounded};

/// Wakes a background thread, if one was started.
#[derive(Default)]
pub(crate) struct Wake(OnceLock<Sender<()>>);

impl Wake {
    /// What the thread waits for. An engine has one set of threads, so this is called once.
    pub(crate) fn receiver(&self) -> Receiver<()> {
        let (sender, receiver) = bounded(1);
        let _ = self.0.set(sender);
        receiver
    }

    pub(crate) fn wake(&self) {
        if let Some(sender) = self.0.get() {
            // If the channel is full, a wakeup is pending already.
            let _ = sender.try_send(());
        }
    }
}
