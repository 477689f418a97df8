//! Reads again what is used and about to expire, while it is served.
//!
//! The way in is the one of every load, so that whatever changes meanwhile voids it. One batch at a time: however much is due, a
//! table has no more of these loads under way than callers may ask for in one statement.

use std::sync::{Arc, Weak};

use crate::{
    key::Key,
    load,
    shared::Shared,
    source::Source,
    store::{Due, Store},
};

/// Loads the keys that it receives, until the node stops or the cache is gone.
pub(crate) async fn ahead<K: Key, V: Send + Sync + 'static>(
    mut keys: Due<K>,
    store: Weak<Store<K, V>>,
    source: Arc<dyn Source<K, V>>,
    shared: Arc<Shared>,
) {
    let mut stopping = shared.stopping();
    loop {
        let mut batch = Vec::new();
        tokio::select! {
            biased;
            _ = stopping.wait_for(|stopping| *stopping) => return,
            received = keys.recv_many(&mut batch, shared.config.load_keys_max) => {
                if received == 0 {
                    return;
                }
            }
        }
        let Some(store) = store.upgrade() else { return };
        let mut wanted = Vec::with_capacity(batch.len());
        let answers: Vec<_> = batch.iter().filter_map(|key| store.reload(key, &mut wanted)).collect();
        for runner in store.enqueue(wanted) {
            shared.host.spawn(Box::pin(load::run(runner, Arc::clone(&source), Arc::clone(&shared))));
        }
        for answer in answers {
            if answer.await.is_ok_and(|answer| answer.is_ok()) {
                store.counters.refreshed.add(1);
            }
        }
    }
}
