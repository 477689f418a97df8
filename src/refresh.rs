//! Loads again what is used and about to expire, and what was used and has changed.
//!
//! The way in is the one of every load, so that whatever changes meanwhile voids it. One batch at a time, and a pause before each:
//! however often a row changes, it is read at most once in that time, and a load starts when the changes of one
//! transaction have probably all been applied. What cannot be read is left to whoever asks for it.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use tokio::sync::mpsc::UnboundedReceiver;

use crate::{
    fill::Join,
    key::Key,
    load,
    shared::Shared,
    source::Source,
    store::{Due, Store},
};

/// Between two batches, and between a commit and the load of what it has changed: its message has probably come by then, so that the
/// row is kept.
const PAUSE: Duration = Duration::from_millis(10);

/// Loads the keys that it receives, until the node stops or the cache is gone.
pub(crate) async fn run<K: Key, V: Send + Sync + 'static>(
    mut due: UnboundedReceiver<Due<K>>,
    store: Weak<Store<K, V>>,
    source: Arc<dyn Source<K, V>>,
    shared: Arc<Shared>,
) {
    let mut stopping = shared.stopping();
    while let Some(first) = tokio::select! {
        biased;
        _ = stopping.wait_for(|stopping| *stopping) => None,
        first = due.recv() => first,
    } {
        tokio::time::sleep(PAUSE).await;
        let mut batch = vec![first];
        while batch.len() < shared.config.load_keys_max
            && let Ok(next) = due.try_recv()
        {
            batch.push(next);
        }
        let Some(store) = store.upgrade() else { return };
        let mut wanted = Vec::with_capacity(batch.len());
        let answers: Vec<_> = batch.iter().filter_map(|due| store.reload(due, &mut wanted)).collect();
        load::start(&store, &source, &shared, wanted);
        for answer in answers {
            if answer.await.is_ok_and(|answer| answer.is_ok()) {
                store.counters.refreshed.add(1);
            }
        }
    }
}

/// Loads a key that has just been written, unless somebody does; nobody waits for it.
pub(crate) async fn soon<K: Key, V: Send + Sync + 'static>(
    key: K,
    store: Weak<Store<K, V>>,
    source: Arc<dyn Source<K, V>>,
    shared: Arc<Shared>,
) {
    tokio::time::sleep(PAUSE).await;
    let Some(store) = store.upgrade().filter(|store| store.is_coherent()) else { return };
    let mut wanted = Vec::new();
    drop(store.ask_again(&key, Join::Running, &mut wanted));
    load::start(&store, &source, &shared, wanted);
}
