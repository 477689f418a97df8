//! After a gap, reads again the rows that were used most before it, so that callers do not all have to wait for theirs.
//!
//! The way in is the one of every load: keys are asked for, and published only if nothing happened meanwhile. One statement
//! at a time, whatever the number of rows, so that a fleet whose nodes all come back at once asks its database for no more
//! than one statement per node and table beside what callers want.
//!
//! Keys are sorted. Postgres then reads an index in order, or, as it sees fit, the whole table; either way a batch of the
//! default size costs it little more than the best that it can do.

use std::sync::{Arc, Weak};

use tokio::sync::{oneshot, watch};

use crate::{
    key::Key,
    load,
    shared::{Progress, Shared},
    source::Source,
    store::Store,
};

/// Waits for gaps to end, until the node stops or the cache is gone.
pub(crate) async fn after_gaps<K: Key, V: Send + Sync + 'static>(
    store: Weak<Store<K, V>>,
    source: Arc<dyn Source<K, V>>,
    shared: Arc<Shared>,
    rows_max: usize,
) {
    let (mut progress, mut stopping) = (shared.progress(), shared.stopping());
    let mut opened = progress.borrow_and_update().opened;
    loop {
        // The gap that would end this refill is one after the node became coherent, also if it comes before the first load.
        let gaps = tokio::select! {
            biased;
            now = progress.wait_for(|now| now.opened != opened) => match now {
                Ok(now) => {
                    opened = now.opened;
                    now.gaps
                }
                Err(_) => return,
            },
            _ = stopping.wait_for(|stopping| *stopping) => return,
        };
        let Some(store) = store.upgrade() else { return };
        let (list, listed) = oneshot::channel();
        let held = Arc::clone(&store);
        shared.host.spawn_blocking(Box::new(move || drop(list.send(held.used_before(rows_max)))));
        let Ok(mut keys) = listed.await else { return };
        keys.sort_by_cached_key(|key| key.to_parts().iter().map(|part| part.clone().into_owned()).collect::<Vec<_>>());
        let found = keys.len();
        let refilled = refill(&store, &source, &shared, &progress, gaps, keys).await;
        tracing::debug!(found, refilled, "read again what was used most before the gap");
    }
}

/// Loads these keys in batches, until there is another gap. Returns how many.
async fn refill<K: Key, V: Send + Sync + 'static>(
    store: &Arc<Store<K, V>>,
    source: &Arc<dyn Source<K, V>>,
    shared: &Arc<Shared>,
    progress: &watch::Receiver<Progress>,
    gaps: u64,
    keys: Vec<K>,
) -> usize {
    let mut refilled = 0;
    for batch in keys.chunks(shared.config.load_keys_max) {
        if progress.borrow().gaps != gaps || !store.is_coherent() {
            break;
        }
        refilled += load::ahead(store, source, shared, batch).await.loaded;
    }
    store.counters.refilled.add(refilled as u64);
    refilled
}
