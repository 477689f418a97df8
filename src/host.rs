//! What a node asks of the process that it lives in: the time, and somebody who runs its tasks.
//!
//! A trait, so that the same node runs under a clock that is not the machine's (`verify/simulation`, `testing/host.rs`).

use std::{future::Future, pin::Pin, time::Instant};

use tokio::runtime::Handle;
use uuid::Uuid;

use crate::{clock, coherence::Boot};

/// A task of a node.
pub(crate) type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Runs a node.
pub(crate) trait Host: Send + Sync {
    /// Time since boot, suspended time included (X19).
    fn now(&self) -> Boot;

    /// A moment of this time on the clock of the standard library, for users.
    fn instant(&self, at: Boot) -> Instant {
        clock::instant(at)
    }

    /// Runs a task to its end, unless the host ends first.
    fn spawn(&self, task: Task);

    /// Runs what may keep a thread busy.
    fn spawn_blocking(&self, work: Box<dyn FnOnce() + Send>);

    /// The name of the machine.
    fn name(&self) -> String {
        String::new()
    }

    /// A number that spreads what many nodes would do at the same moment. Nothing secret.
    fn random(&self) -> u64;
}

/// This process, and the tokio runtime that the node was started in.
pub(crate) struct Process {
    runtime: Handle,
}

impl Process {
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub(crate) fn current() -> Self {
        Self { runtime: Handle::current() }
    }
}

impl Host for Process {
    fn now(&self) -> Boot {
        clock::now()
    }

    fn spawn(&self, task: Task) {
        tokio::spawn(task);
    }

    fn spawn_blocking(&self, work: Box<dyn FnOnce() + Send>) {
        // Whoever asks: the clock thread is in no runtime, and has leases to end. After the runtime, nobody does it.
        drop(self.runtime.spawn_blocking(work));
    }

    fn name(&self) -> String {
        nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    }

    fn random(&self) -> u64 {
        Uuid::new_v4().as_u64_pair().0
    }
}
