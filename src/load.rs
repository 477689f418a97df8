//! Runs the loads of one table: greedy batches, without a timer.
//!
//! A runner waits for its turn among the node's loads, and then takes whatever has queued up meanwhile as one
//! statement. So a lone miss goes out at once as `= $1`, and under load the statements grow by themselves.

use std::{iter, sync::Arc};

use crate::{
    digest::Tenths,
    key::Key,
    shared::{Shared, Whose},
    source::{Received, Source},
    store::{Origin, Runner},
};

/// Loads until nothing waits. Runs in a task of its own, so that a caller who is cancelled harms nobody.
pub(crate) async fn run<K: Key, V: Send + Sync + 'static>(
    mut runner: Runner<K, V>,
    source: Arc<dyn Source<K, V>>,
    shared: Arc<Shared>,
) {
    loop {
        // Never closed, so never an error; the permit is held until the rows are published.
        // Who would be refused does not wait for one; should he not be after all, that is one load in a second.
        let _turn = if runner.is_refused(shared.host.now()) { None } else { shared.loads.acquire().await.ok() };
        if runner.refuse(shared.host.now()) {
            if runner.has_retired() {
                return;
            }
            continue;
        }
        let began = shared.load_begins();
        let started = shared.host.now();
        let at = Tenths::at(started);
        let Some(keys) = runner.take() else { return };
        let loaded = source.load(keys).await;
        runner.asked(loaded.as_ref().map(|_| ()), started, shared.host.now());
        match loaded {
            Ok(loaded) => {
                let stamp = loaded.stamp;
                let whose = shared.whose(stamp.incarnation, began);
                if whose == Whose::Foreign {
                    runner.fail(&Shared::foreign());
                } else {
                    let ours = whose == Whose::Ours && !stamp.dirty;
                    let received = loaded.received.into_iter().chain(iter::repeat(Received::default()));
                    runner.finish_received(
                        loaded.rows.into_iter().zip(received),
                        Origin { stamp, ours, at, ended: shared.host.now() },
                    );
                }
            }
            Err(error) => runner.fail(&error),
        }
        if let Some(sweep) = runner.sweep() {
            shared.host.spawn_blocking(Box::new(sweep));
        }
    }
}
