//! The process of a test's node: its time is tokio's, so that a test can let it stand still.

use std::time::{Duration, Instant as StdInstant};

use tokio::{runtime::Handle, time::Instant};

use crate::{
    coherence::Boot,
    dice::Dice,
    host::{Host, Task},
    sync::{Mutex, lock},
};

/// When a node starts: nothing has happened at zero.
const START: Boot = Duration::from_hours(1);

pub(super) struct TokioHost {
    runtime: Handle,
    started: Instant,
    dice: Mutex<Dice>,
}

impl TokioHost {
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub(super) fn current(seed: u64) -> Self {
        Self { runtime: Handle::current(), started: Instant::now(), dice: Mutex::new(Dice::new(seed)) }
    }
}

impl Host for TokioHost {
    fn now(&self) -> Boot {
        // Whoever asks: a thread outside of the runtime has another idea of the time.
        let _inside = self.runtime.enter();
        START + self.started.elapsed()
    }

    fn instant(&self, at: Boot) -> StdInstant {
        (self.started + at.saturating_sub(START)).into_std()
    }

    fn spawn(&self, task: Task) {
        self.runtime.spawn(task);
    }

    fn spawn_blocking(&self, work: Box<dyn FnOnce() + Send>) {
        // There is little of it in a test, and a thread would make its order a matter of chance.
        self.runtime.spawn(async move { work() });
    }

    fn random(&self) -> u64 {
        lock(&self.dice).roll()
    }
}
