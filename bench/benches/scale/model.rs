//! What Postgres pays, as a sum of products.

use rowcache_bench::measure::Spread;

use super::{FEW, LOG_NODES, Load, MANY_NODES, MORE_TABLES, RATE, SOME_NODES};

/// Constants, in seconds of CPU time.
#[derive(Clone, Copy, Debug)]
pub struct Model {
    /// A change that nobody is told of. Not part of what is predicted.
    pub write: f64,
    /// A change that is told by NOTIFY, besides; and for each node, or other session that listens.
    pub notify: f64,
    pub wake: f64,
    pub wake_channel: f64,
    pub wake_database: f64,
    /// A node that listens, each second; and for each further table that it has open. Without what its fence costs by waking others.
    pub beat: f64,
    pub beat_table: f64,
    /// A change that is told by the change log, besides.
    pub log: f64,
    /// A node that polls, each second: at these rates of changes.
    pub polls: [f64; 3],
}

/// The rates of [`Model::polls`].
const RATES: [f64; 3] = [0.0, FEW as f64, RATE as f64];

impl Model {
    /// From what was measured of each of the cases of `FITTED`.
    pub fn fit(load: impl Fn(usize) -> Load) -> Self {
        let cores = |case| load(case).cores;
        let of_change = |case| load(case).cores / load(case).rate;
        let (some, many) = (SOME_NODES as f64, MANY_NODES as f64);
        let write = of_change(0);
        let notify = of_change(1) - write;
        let [wake_channel, wake_database] = [10, 11].map(|case| (of_change(case) - of_change(1)) / many);
        // A fence of each node wakes each, and nobody but its sender is told anything.
        let beat = cores(4) / many - many * wake_channel;
        let idle = |nodes: f64| nodes * beat + nodes * nodes * wake_channel;
        // Least squares, of a line through the change without nodes.
        let point = |nodes: f64, case| (nodes, of_change(case) - idle(nodes) / load(case).rate - write - notify);
        let points = [point(some, 2), point(many, 3)];
        let wake = points.iter().map(|(x, y)| x * y).sum::<f64>() / points.iter().map(|(x, _)| x * x).sum::<f64>();
        let log = of_change(6) - write;
        let polls = [7, 8, 9].map(|case| (cores(case) - load(case).rate * (write + log)) / LOG_NODES as f64);
        Self {
            write,
            notify,
            wake,
            wake_channel,
            wake_database,
            beat,
            beat_table: (cores(5) - cores(4)) / many / MORE_TABLES as f64,
            log,
            polls,
        }
    }

    /// Each constant's median.
    pub fn median(models: &[Self]) -> Self {
        let of = |what: &dyn Fn(&Self) -> f64| Spread::of(models.iter().map(what)).median;
        Self {
            write: of(&|it| it.write),
            notify: of(&|it| it.notify),
            wake: of(&|it| it.wake),
            wake_channel: of(&|it| it.wake_channel),
            wake_database: of(&|it| it.wake_database),
            beat: of(&|it| it.beat),
            beat_table: of(&|it| it.beat_table),
            log: of(&|it| it.log),
            polls: [0, 1, 2].map(|n| of(&|it| it.polls[n])),
        }
    }

    /// The processors that Postgres keeps busy for coherence: of so many nodes, with one table each, at so many changes a second.
    pub fn cores(&self, is_log: bool, nodes: f64, rate: f64) -> f64 {
        if is_log {
            return rate * self.log + nodes * self.polls(rate);
        }
        rate * (self.notify + nodes * self.wake) + nodes * (self.beat + nodes * self.wake_channel)
    }

    /// A node that polls, each second. Between the rates that were measured, and beyond, on straight lines.
    fn polls(&self, rate: f64) -> f64 {
        let n = usize::from(rate >= RATES[1]);
        let slope = (self.polls[n + 1] - self.polls[n]) / (RATES[n + 1] - RATES[n]);
        self.polls[n] + slope * (rate - RATES[n])
    }

    /// The changes a second for which one processor is needed. `None`: the nodes need it without any.
    pub fn most(&self, is_log: bool, nodes: f64) -> Option<f64> {
        let spare = |rate: f64| 1.0 - self.cores(is_log, nodes, rate);
        (spare(0.0) > 0.0).then(|| root(spare))
    }

    /// The changes a second above which the change log takes less than NOTIFY.
    pub fn log_is_cheaper_above(&self, nodes: f64) -> Option<f64> {
        let dearer = |rate: f64| self.cores(true, nodes, rate) - self.cores(false, nodes, rate);
        (dearer(MOST) < 0.0).then(|| root(dearer))
    }
}

/// No server commits more often in a second.
const MOST: f64 = 1e6;

/// Where this falls below zero, at last.
fn root(of: impl Fn(f64) -> f64) -> f64 {
    let (mut low, mut high) = (0.0, MOST);
    for _ in 0..60 {
        let middle = f64::midpoint(low, high);
        if of(middle) > 0.0 { low = middle } else { high = middle }
    }
    low
}
