//! After a gap, reads again the rows that were used most before it, so that callers do not all have to wait for theirs.
//!
//! The way in is the one of every load: keys are asked for, and published only if nothing happened meanwhile. Two statements
//! at a time, whatever the number of rows: one is read while the other is executed, and a fleet whose nodes all come back at once asks
//! its database for no more than that per node and table beside what callers want.
//!
//! The hottest come first, since they are most of what is missed; but some thousands at a time, twice as many each time, and these sorted:
//! Postgres reads an index in order then, and neighbours while they are in its processor's caches. Of those that come late, none is much
//! hotter than another.

use std::sync::{Arc, Weak};

use tokio::sync::{oneshot, watch};

use crate::{
    key::{Key, KeyPart, Parts},
    load,
    shared::{Progress, Shared},
    source::Source,
    store::Store,
    sync::{Mutex, lock},
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
        let (held, sorted) = (Arc::clone(&store), shared.config.load_keys_max.saturating_mul(SORTED));
        shared.host.spawn_blocking(Box::new(move || drop(list.send(in_order(held.used_before(rows_max), sorted)))));
        let Ok(keys) = listed.await else { return };
        let found = keys.len();
        let refilled = refill(&store, &source, &shared, &progress, gaps, &keys).await;
        tracing::debug!(found, refilled, "read again what was used most before the gap");
    }
}

/// So many statements' keys are sorted together at first.
const SORTED: usize = 8;

/// Keys with their heat, the hottest first, as they are asked for: the first `piece` of them sorted, then twice as many, and so on.
fn in_order<K: Key>(mut keys: Vec<(u32, K)>, mut piece: usize) -> Vec<(u32, K)> {
    let mut rest = &mut *keys;
    while !rest.is_empty() {
        let some = rest.split_off_mut(..piece.min(rest.len())).unwrap_or_default();
        some.sort_by_cached_key(|(_, key)| key.to_parts().into_iter().map(KeyPart::into_owned).collect::<Parts>());
        piece = piece.saturating_mul(2);
    }
    keys
}

/// Loads these keys in batches, until there is another gap, which then has them on its list. Returns how many.
async fn refill<K: Key, V: Send + Sync + 'static>(
    store: &Arc<Store<K, V>>,
    source: &Arc<dyn Source<K, V>>,
    shared: &Arc<Shared>,
    progress: &watch::Receiver<Progress>,
    gaps: u64,
    keys: &[(u32, K)],
) -> usize {
    let is_over = || progress.borrow().gaps != gaps || !store.is_coherent();
    let batches = Mutex::new(keys.chunks(shared.config.load_keys_max));
    let next = || lock(&batches).next().filter(|_| !is_over());
    // Two of these: see above.
    let load = async || {
        let mut loaded = 0;
        while let Some(batch) = next() {
            let keys: Vec<K> = batch.iter().map(|(_, key)| key.clone()).collect();
            loaded += load::ahead(store, source, shared, &keys).await.loaded;
        }
        loaded
    };
    let (one, other) = tokio::join!(load(), load());
    let refilled = one + other;
    if is_over() {
        store.lost_again(keys);
    }
    store.counters.refilled.add(refilled as u64);
    refilled
}

#[cfg(test)]
mod tests {
    use super::in_order;

    #[test]
    fn keys_are_sorted_within_pieces_that_grow() {
        let asked = |first| {
            let keys = (0..9_i64).rev().map(|key| (0, key)).collect();
            in_order(keys, first).into_iter().map(|(_, key)| key).collect::<Vec<_>>()
        };
        assert_eq!(asked(1), [8, 6, 7, 2, 3, 4, 5, 0, 1]);
        assert_eq!(asked(4), [5, 6, 7, 8, 0, 1, 2, 3, 4]);
        assert_eq!(asked(usize::MAX), [0, 1, 2, 3, 4, 5, 6, 7, 8]);
    }
}
