//! Runs the loads of one table: greedy batches, without a timer.
//!
//! A runner waits for its turn among the node's loads, and then takes whatever has queued up meanwhile as one
//! statement. So a lone miss goes out at once as `= $1`, and under load the statements grow by themselves.

use std::sync::Arc;

use crate::{
    key::Key,
    shared::Shared,
    source::Source,
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
        let _turn = shared.loads.acquire().await;
        let gaps = shared.look(|coherence| coherence.gaps());
        let Some(keys) = runner.take() else { return };
        match source.load(keys).await {
            Ok(loaded) => {
                let stamp = loaded.stamp;
                let ours = shared.is_ours(stamp.incarnation, gaps) && !stamp.dirty;
                runner.finish(loaded.rows, Origin { stamp, ours });
            }
            Err(error) => runner.fail(&error),
        }
        if let Some(sweep) = runner.sweep() {
            shared.host.spawn_blocking(Box::new(sweep));
        }
    }
}
