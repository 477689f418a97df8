//! Readers: on every node a few tasks that get rows, some much more often than others (Zipf).
//!
//! A get that hits takes nanoseconds, so they come in bursts with pauses between: enough to be a load, and little enough
//! that the machine stays usable. Keys are asked for by the dozen, as one asks for a page of rows, so that a cold cache
//! fills in few statements; a burst with many misses is cut short.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use rand::{SeedableRng as _, distr::Distribution as _, rngs::StdRng};
use rand_distr::Zipf;
use tokio::{
    sync::{mpsc, watch},
    time::{MissedTickBehavior, interval},
};

use super::{
    checker::Read,
    nodes::DemoNode,
    world::{EXPONENT, key},
};

/// Reader tasks per node.
pub(super) const PER_NODE: usize = 2;

/// Gets in a burst, and how often there is one: 25,000 gets a second and task, once the cache is warm.
const BURST: usize = 500;
const BURST_EVERY: Duration = Duration::from_millis(20);

/// Keys asked for at a time.
const PAGE: usize = 50;

/// A burst ends after this long, so that a cold cache does not keep Postgres busier than anything else here.
const BURST_MAX: Duration = Duration::from_millis(4);

/// Per burst: keys that changed and have not been read since, and keys as they come, that are read for the checker if
/// they have changed lately.
const CHECKED_UNREAD: usize = 16;
const CHECKED_ANY: usize = 4;

/// Gets rows until `stop` says so.
pub(super) async fn read(node: Arc<DemoNode>, rows: u64, reads: mpsc::Sender<Read>, mut stop: watch::Receiver<bool>) {
    #[expect(clippy::cast_precision_loss, reason = "a number of rows far below 2^52")]
    let popularity = Zipf::new(rows as f64, EXPONENT).expect("there are rows, and the exponent is positive");
    let mut rng = StdRng::from_os_rng();
    let mut ticks = interval(BURST_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
        let started = Instant::now();
        let keys = (0..BURST).map(|_| key(popularity.sample(&mut rng))).collect::<Vec<_>>();
        checked(&node, &keys[..CHECKED_ANY], &reads).await;
        for page in keys[CHECKED_ANY..].chunks(PAGE) {
            // A failed load is counted by the node, and shows in its status; the reader goes on.
            let _ = node.users.get_many(page).await;
            if started.elapsed() > BURST_MAX {
                break;
            }
        }
    }
}

/// Gets keys, and hands what it got to the checker where a change of the key had been applied before.
async fn checked(node: &DemoNode, some: &[i64], reads: &mpsc::Sender<Read>) {
    let noted: Vec<(i64, Option<u64>)> = {
        let mut applied = node.applied();
        let unread = applied.take_unread(CHECKED_UNREAD);
        unread.into_iter().chain(some.iter().copied()).map(|key| (key, applied.xid(key))).collect()
    };
    for (key, applied) in noted {
        let Ok(row) = node.users.get(&key).await else { continue };
        if let Some(applied) = applied {
            let version = row.map(|row| row.version);
            // A full queue means a check less.
            let _ = reads.try_send(Read { node: node.index, key, applied, version });
        }
    }
}
