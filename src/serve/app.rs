//! What all requests share.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use jiff::Timestamp;
use tokio::sync::{Mutex as AsyncMutex, Semaphore, watch};
use uuid::Uuid;

use super::{
    events::Hub, guard::Guard, metrics::HttpMetrics, operate::FLEET_DEADLINE, problem::Problem, table::Served,
};
use crate::{Fleet, Node};

/// One node and its addresses, before and after it has reached Postgres.
pub(crate) struct App {
    pub(crate) id: Uuid,
    pub(crate) name: String,
    pub(crate) started: Instant,
    pub(crate) started_at: Timestamp,
    /// Where it can be reached; known once it listens.
    pub(crate) address: OnceLock<String>,
    pub(crate) guard: Guard,
    pub(crate) max_keys: usize,
    pub(crate) request_timeout: Duration,
    pub(crate) http: HttpMetrics,
    pub(crate) event_readers: Semaphore,
    pub(crate) event_readers_max: usize,
    /// It is to end: no more than what is under way is answered.
    pub(crate) stopping: watch::Sender<bool>,
    running: OnceLock<Running>,
    /// What is in the way of its start.
    in_the_way: Mutex<String>,
    /// Of the server's notification queue, as the bits of a float; NaN: not known.
    queue_usage: AtomicU64,
    /// What the nodes of the database last said, and when. Protects them from being asked by many at once.
    fleet: AsyncMutex<Option<(Instant, Arc<Fleet>)>>,
}

/// How long it will do: whoever looks on asks every two seconds, and there may be many.
const FLEET_KEPT: Duration = Duration::from_secs(1);

/// What there is once Postgres was reached.
pub(crate) struct Running {
    pub(crate) node: Node,
    pub(crate) tables: BTreeMap<String, Served>,
    pub(crate) hub: Arc<Hub>,
}

/// What bounds requests.
pub(crate) struct Limits {
    pub(crate) max_keys: usize,
    pub(crate) max_event_readers: usize,
    pub(crate) request_timeout: Duration,
}

impl App {
    pub(crate) fn new(name: String, guard: Guard, limits: &Limits) -> Arc<Self> {
        Arc::new(Self {
            id: Uuid::new_v4(),
            name,
            started: Instant::now(),
            started_at: Timestamp::now(),
            address: OnceLock::new(),
            guard,
            max_keys: limits.max_keys,
            request_timeout: limits.request_timeout,
            http: HttpMetrics::default(),
            event_readers: Semaphore::new(limits.max_event_readers),
            event_readers_max: limits.max_event_readers,
            stopping: watch::Sender::new(false),
            running: OnceLock::new(),
            in_the_way: Mutex::new("it has not reached Postgres yet".to_owned()),
            queue_usage: AtomicU64::new(f64::NAN.to_bits()),
            fleet: AsyncMutex::default(),
        })
    }

    /// From now on requests are answered.
    pub(crate) fn run(&self, node: Node, tables: Vec<Served>) {
        let hub = Hub::start(&node, self.id, &tables);
        let tables = tables.into_iter().map(|table| (table.path().to_owned(), table)).collect();
        let _ = self.running.set(Running { node, tables, hub });
    }

    pub(crate) fn is_in_the_way(&self, what: String) {
        *self.in_the_way.lock().unwrap_or_else(PoisonError::into_inner) = what;
    }

    pub(crate) fn is_stopping(&self) -> bool {
        *self.stopping.borrow()
    }

    pub(crate) fn try_running(&self) -> Option<&Running> {
        self.running.get()
    }

    pub(crate) fn running(&self) -> Result<&Running, Problem> {
        self.running.get().ok_or_else(|| {
            let why = self.in_the_way.lock().unwrap_or_else(PoisonError::into_inner).clone();
            Problem::unavailable("starting", format!("the node is starting: {why}"))
        })
    }

    /// The table that a path names.
    pub(crate) fn table(&self, path: &str) -> Result<&Served, Problem> {
        let running = self.running()?;
        let name = percent_encoding::percent_decode_str(path).decode_utf8_lossy();
        running.tables.get(&*name).ok_or_else(|| {
            let served: Vec<_> = running.tables.keys().map(String::as_str).take(20).collect();
            let name: String = name.chars().take(200).collect();
            Problem::not_found(
                "no_such_table",
                format!("`{name}` is not served here; served are: {}", served.join(", ")),
            )
        })
    }

    /// The nodes of the database, as they were a second ago at most.
    pub(crate) async fn fleet(&self) -> Result<Arc<Fleet>, Problem> {
        let node = &self.running()?.node;
        let mut kept = self.fleet.lock().await;
        if let Some((at, fleet)) = &*kept
            && at.elapsed() < FLEET_KEPT
        {
            return Ok(Arc::clone(fleet));
        }
        let fleet = Arc::new(node.fleet(FLEET_DEADLINE).await?);
        *kept = Some((Instant::now(), Arc::clone(&fleet)));
        Ok(fleet)
    }

    /// The share of the server's notification queue that is in use, when it was last asked.
    pub(crate) fn queue_usage(&self) -> Option<f64> {
        Some(f64::from_bits(self.queue_usage.load(Ordering::Relaxed))).filter(|share| !share.is_nan())
    }

    /// Asks for it now and then, for as long as the node runs.
    pub(crate) async fn watch_queue(self: Arc<Self>) {
        let mut stopping = self.stopping.subscribe();
        loop {
            if let Some(running) = self.try_running() {
                let share = running.node.postgres.notification_queue_usage().await.unwrap_or(f64::NAN);
                self.queue_usage.store(share.to_bits(), Ordering::Relaxed);
            }
            tokio::select! {
                () = tokio::time::sleep(Duration::from_secs(10)) => {}
                _ = stopping.wait_for(|it| *it) => return,
            }
        }
    }
}
