//! Writers that write as fast as they can, and nodes that say when they know.

use std::{
    collections::HashMap,
    future::poll_fn,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use rand::Rng as _;
use tokio::{
    task::JoinSet,
    time::{interval, sleep},
};
use tokio_postgres::{AsyncMessage, NoTls};

use super::{
    cost,
    setup::{Flush, Ground, Variant},
};
use crate::{Config, Event, Node, Table, sync::lock};

/// One turn of a variant.
#[derive(Clone, Copy)]
pub(super) struct Run {
    pub(super) variant: Variant,
    pub(super) flush: Flush,
    pub(super) writers: usize,
    pub(super) nodes: usize,
    pub(super) rows: i64,
}

pub(super) struct Outcome {
    pub(super) commits_a_second: f64,
    /// Microseconds.
    pub(super) cpu_a_commit: f64,
    /// From when a writer knew that it had committed until a node had applied it; of a sample, over all nodes.
    pub(super) known_after_ms: Vec<f64>,
}

/// When transactions were committed, or known: those whose id is a multiple of [`SAMPLE`].
pub(super) type Noted = Arc<Mutex<Vec<(u64, Instant)>>>;

const SAMPLE: u64 = 50;

#[derive(sqlx::FromRow)]
struct Item {
    #[expect(dead_code, reason = "a value is held, as in a service")]
    name: String,
}

impl Run {
    pub(super) async fn measure(self, ground: &Ground, length: Duration) -> Result<Outcome> {
        ground.tell(self.variant).await?;
        let (committed, known) = (Noted::default(), Noted::default());
        let _readers = readers(ground, self.variant, self.nodes, &known).await?;
        let (stop, commits) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut writers = JoinSet::new();
        for _ in 0..self.writers {
            let client = ground.client().await?;
            if let Flush::Slow = self.flush {
                client.batch_execute("set commit_delay = 1000; set commit_siblings = 0").await?;
            }
            let update =
                "update public.item set updated_at = now() where id = $1 returning pg_current_xact_id()::text::bigint";
            let update = client.prepare(update).await?;
            let (stop, commits, committed) = (Arc::clone(&stop), Arc::clone(&commits), Arc::clone(&committed));
            writers.spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let id = rand::rng().random_range(1..=self.rows);
                    let xid = client.query_one(&update, &[&id]).await?.get::<_, i64>(0).cast_unsigned();
                    commits.fetch_add(1, Ordering::Relaxed);
                    if xid % SAMPLE == 0 {
                        lock(&committed).push((xid, Instant::now()));
                    }
                }
                anyhow::Ok(())
            });
        }
        // Plans are made, caches are warm.
        sleep(Duration::from_millis(500)).await;
        let postmaster = ground.postmaster()?;
        let (began, cpu, before) = (Instant::now(), cost::cpu(postmaster)?, commits.load(Ordering::Relaxed));
        sleep(length).await;
        let (took, cpu) = (began.elapsed(), cost::cpu(postmaster)?.saturating_sub(cpu));
        let commits = f64::from(u32::try_from(commits.load(Ordering::Relaxed) - before)?);
        stop.store(true, Ordering::Relaxed);
        while let Some(writer) = writers.join_next().await {
            writer??;
        }
        let committed: HashMap<u64, Instant> = lock(&committed).drain(..).filter(|(_, at)| *at > began).collect();
        let known_after = |(xid, known): &(u64, Instant)| {
            // By NOTIFY it can be known before the writer knows.
            committed.get(xid).map(|at| known.saturating_duration_since(*at).as_secs_f64() * 1e3)
        };
        let known_after_ms = lock(&known).iter().filter_map(known_after).collect();
        Ok(Outcome {
            commits_a_second: commits / took.as_secs_f64(),
            cpu_a_commit: cpu.as_secs_f64() * 1e6 / commits,
            known_after_ms,
        })
    }
}

/// Whoever hears of changes. Dropping it ends it.
pub(super) struct Readers {
    pub(super) nodes: Vec<Node>,
    tasks: JoinSet<()>,
}

pub(super) async fn readers(ground: &Ground, variant: Variant, count: usize, known: &Noted) -> Result<Readers> {
    let mut readers = Readers { nodes: Vec::new(), tasks: JoinSet::new() };
    for _ in 0..count {
        let known = Arc::clone(known);
        match variant {
            Variant::None => {}
            Variant::Naive => {
                let (client, mut connection) = tokio_postgres::connect(&ground.url(), NoTls).await?;
                let listening =
                    tokio::spawn(async move { client.batch_execute("listen cache").await.map(|()| client) });
                readers.tasks.spawn(async move {
                    let _client = listening;
                    while let Some(Ok(message)) = poll_fn(|context| connection.poll_message(context)).await {
                        let AsyncMessage::Notification(it) = message else { continue };
                        // What a cache would do with it. It does not say by which transaction.
                        let row: serde_json::Value = serde_json::from_str(it.payload()).unwrap_or_default();
                        std::hint::black_box(row["row"]["id"].as_i64());
                    }
                });
            }
            Variant::Log | Variant::Notify => {
                let mut config = Config::from_url(&ground.url())?;
                config.listen = variant == Variant::Notify;
                let node = Node::start(config).await.context("a node does not start")?;
                let table: Table<i64, Item> = node.table("public.item").await?;
                let mut events = node.subscribe();
                readers.nodes.push(node);
                readers.tasks.spawn(async move {
                    let _table = table;
                    while let Some(event) = events.recv().await {
                        let Event::Change(change) = event else { continue };
                        if let Some(xid) = change.xid.filter(|xid| xid % SAMPLE == 0) {
                            lock(&known).push((xid, Instant::now()));
                        }
                    }
                });
            }
        }
    }
    Ok(readers)
}

/// What so many nodes cost the server while 100 rows a second are written, or none: percent of one core.
pub(super) async fn cost_of_nodes(
    ground: &Ground,
    variant: Variant,
    nodes: usize,
    writes: bool,
    length: Duration,
) -> Result<f64> {
    ground.tell(variant).await?;
    let readers = readers(ground, variant, nodes, &Noted::default()).await?;
    let client = ground.client().await?;
    let update = client.prepare("update public.item set updated_at = now() where id = $1").await?;
    sleep(Duration::from_millis(500)).await;
    let postmaster = ground.postmaster()?;
    let (began, cpu) = (Instant::now(), cost::cpu(postmaster)?);
    let mut tick = interval(Duration::from_millis(10));
    while began.elapsed() < length {
        tick.tick().await;
        if writes {
            let id = rand::rng().random_range(1..=1000_i64);
            client.execute(&update, &[&id]).await?;
        }
    }
    let share = cost::cpu(postmaster)?.saturating_sub(cpu).as_secs_f64() / began.elapsed().as_secs_f64();
    for node in &readers.nodes {
        node.shutdown().await;
    }
    Ok(share * 100.0)
}
