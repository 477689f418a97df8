//! What a node asks of the process that it lives in: the time, and somebody who runs its tasks.
//!
//! A trait, so that the same node runs under a clock that is not the machine's (`verify/simulation`).

use std::{future::Future, pin::Pin};

use tokio::runtime::Handle;
use uuid::Uuid;

use crate::{clock, coherence::Boot};

/// A task of a node.
pub(crate) type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Runs a node.
pub(crate) trait Host: Send + Sync {
    /// Time since boot, suspended time included (X19).
    fn now(&self) -> Boot;

    /// Runs a task to its end, unless the host ends first.
    fn spawn(&self, task: Task);

    /// Runs what may keep a thread busy.
    fn spawn_blocking(&self, work: Box<dyn FnOnce() + Send>);

    /// A number that spreads what many nodes would do at the same moment. Nothing secret.
    fn random(&self) -> u64;
}

/// This process, and the tokio runtime that the caller is in.
pub(crate) struct Process;

impl Host for Process {
    fn now(&self) -> Boot {
        clock::now()
    }

    fn spawn(&self, task: Task) {
        tokio::spawn(task);
    }

    fn spawn_blocking(&self, work: Box<dyn FnOnce() + Send>) {
        match Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(work)),
            // A transaction that is dropped after its runtime.
            Err(_) => work(),
        }
    }

    fn random(&self) -> u64 {
        Uuid::new_v4().as_u64_pair().0
    }
}
