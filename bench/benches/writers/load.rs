//! Writers that write as fast as they can, and nodes that say when they know.

use std::{
    collections::HashMap,
    future::poll_fn,
    hint::black_box,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rand::Rng as _;
use rowcache::{Event, Node, Table};
use rowcache_bench::{ground::Ground, measure::cpu_of_server};
use tokio::{
    task::JoinSet,
    time::{interval, sleep},
};
use tokio_postgres::{AsyncMessage, Client, NoTls};

use crate::setup::{self, Variant};

/// Of so many transactions, the time of one is noted.
const SAMPLE: u64 = 20;

/// For plans to be made and caches to be filled.
const WARM_UP: Duration = Duration::from_millis(250);

/// When transactions were committed, or known.
pub type Noted = Arc<Mutex<Vec<(u64, Instant)>>>;

fn note(noted: &Noted, xid: u64) {
    if xid.is_multiple_of(SAMPLE) {
        noted.lock().unwrap_or_else(PoisonError::into_inner).push((xid, Instant::now()));
    }
}

/// One turn.
#[derive(Clone, Copy)]
pub struct Run {
    pub variant: Variant,
    pub nodes: usize,
    pub writers: usize,
    /// Whether a commit's flush takes a millisecond more.
    pub slow: bool,
    pub rows: usize,
    pub length: Duration,
}

pub struct Outcome {
    pub commits_a_second: f64,
    /// Microseconds of the server's.
    pub cpu_a_commit: f64,
    /// Seconds from when a writer knew that it had committed until a node had applied it; of a sample, over all nodes.
    pub known_after: Vec<f64>,
}

#[derive(sqlx::FromRow)]
pub struct Item {
    #[expect(dead_code, reason = "a value is held, as in a service")]
    name: String,
}

impl Run {
    pub async fn measure(self, ground: &Ground) -> Result<Outcome> {
        setup::tell(ground, self.variant).await?;
        let (committed, known) = (Noted::default(), Noted::default());
        let readers = Readers::new(ground, self.variant, self.nodes, &known).await?;
        let (stop, commits) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut writers = JoinSet::new();
        for _ in 0..self.writers {
            let client = ground.client().await?;
            if self.slow {
                client.batch_execute("set commit_delay = 1000; set commit_siblings = 0").await?;
            }
            writers.spawn(self.write(client, stop.clone(), commits.clone(), committed.clone()));
        }
        sleep(WARM_UP).await;
        let postmaster = ground.postmaster()?;
        let (began, cpu, before) = (Instant::now(), cpu_of_server(postmaster)?, commits.load(Ordering::Relaxed));
        sleep(self.length).await;
        let (took, cpu) = (began.elapsed(), cpu_of_server(postmaster)?.saturating_sub(cpu));
        let made = (commits.load(Ordering::Relaxed) - before) as f64;
        stop.store(true, Ordering::Relaxed);
        while let Some(writer) = writers.join_next().await {
            writer??;
        }
        readers.caught_up(commits.load(Ordering::Relaxed)).await?;
        readers.end().await;
        let committed = std::mem::take(&mut *committed.lock().unwrap_or_else(PoisonError::into_inner));
        let committed: HashMap<u64, Instant> = committed.into_iter().filter(|(_, at)| *at > began).collect();
        let known = std::mem::take(&mut *known.lock().unwrap_or_else(PoisonError::into_inner));
        // By NOTIFY it can be known before the writer knows.
        let after = |(xid, at): (u64, Instant)| Some(at.saturating_duration_since(*committed.get(&xid)?).as_secs_f64());
        Ok(Outcome {
            commits_a_second: made / took.as_secs_f64(),
            cpu_a_commit: cpu.as_secs_f64() * 1e6 / made,
            known_after: known.into_iter().filter_map(after).collect(),
        })
    }

    async fn write(
        self,
        client: Client,
        stop: Arc<AtomicBool>,
        commits: Arc<AtomicU64>,
        committed: Noted,
    ) -> Result<()> {
        let update =
            "update public.item set updated_at = now() where id = $1 returning pg_current_xact_id()::text::bigint";
        let update = client.prepare(update).await?;
        while !stop.load(Ordering::Relaxed) {
            let id = rand::rng().random_range(1..=self.rows as i64);
            let xid = client.query_one(&update, &[&id]).await?.get::<_, i64>(0).cast_unsigned();
            commits.fetch_add(1, Ordering::Relaxed);
            note(&committed, xid);
        }
        Ok(())
    }
}

/// Whoever hears of changes.
pub struct Readers {
    pub nodes: Vec<(Node, Table<i64, Item>)>,
    /// What listeners without a node have heard.
    heard: Arc<AtomicU64>,
    listeners: usize,
    tasks: JoinSet<()>,
}

impl Readers {
    pub async fn new(ground: &Ground, variant: Variant, count: usize, known: &Noted) -> Result<Self> {
        let mut readers = Self { nodes: Vec::new(), heard: Arc::default(), listeners: 0, tasks: JoinSet::new() };
        let mut starting = JoinSet::new();
        for _ in 0..count {
            match variant {
                Variant::None => {}
                Variant::Naive => readers.listen(ground).await?,
                Variant::Log | Variant::Notify | Variant::NotifyAll => {
                    let mut config = ground.config(1)?;
                    config.listen = variant != Variant::Log;
                    starting.spawn(async {
                        let node = Node::start(config).await?;
                        let items: Table<i64, Item> = node.table("public.item").await?;
                        anyhow::Ok((node, items))
                    });
                }
            }
        }
        while let Some(started) = starting.join_next().await {
            let (node, items) = started?.context("a node does not start")?;
            let (mut events, known) = (node.subscribe(), known.clone());
            readers.tasks.spawn(async move {
                while let Some(event) = events.recv().await {
                    if let Event::Change(change) = event {
                        note(&known, change.xid.unwrap_or(1));
                    }
                }
            });
            readers.nodes.push((node, items));
        }
        Ok(readers)
    }

    async fn listen(&mut self, ground: &Ground) -> Result<()> {
        let (client, mut connection) = tokio_postgres::connect(&ground.url(), NoTls).await?;
        let heard = self.heard.clone();
        self.tasks.spawn(async move {
            while let Some(Ok(message)) = poll_fn(|context| connection.poll_message(context)).await {
                let AsyncMessage::Notification(it) = message else { continue };
                // What a cache would do with it. It does not say by which transaction.
                let row: serde_json::Value = serde_json::from_str(it.payload()).unwrap_or_default();
                black_box(row["row"]["id"].as_i64());
                heard.fetch_add(1, Ordering::Relaxed);
            }
        });
        client.batch_execute("listen cache").await?;
        self.tasks.spawn(async move {
            std::future::pending::<()>().await;
            drop(client);
        });
        self.listeners += 1;
        Ok(())
    }

    /// Waits until all have heard of so many commits.
    async fn caught_up(&self, commits: u64) -> Result<()> {
        let began = Instant::now();
        loop {
            let nodes = self.nodes.iter().map(|(_, items)| items.stats());
            // A node that is told too much at a time forgets everything instead.
            let behind = nodes.filter(|stats| stats.invalidations < commits && stats.clears == 0).count();
            let heard = self.heard.load(Ordering::Relaxed);
            if behind == 0 && heard == commits * self.listeners as u64 {
                return Ok(());
            }
            ensure!(
                began.elapsed() < Duration::from_secs(20),
                "{behind} nodes, or listeners, have not heard of all: {heard}"
            );
            sleep(Duration::from_millis(5)).await;
        }
    }

    pub async fn end(self) {
        let mut ending = JoinSet::new();
        for (node, items) in self.nodes {
            drop(items);
            ending.spawn(async move { node.shutdown().await });
        }
        ending.join_all().await;
        // Dropping the tasks ends them.
    }
}

/// What so many nodes cost the server while 100 rows a second are written, or none: percent of one core.
pub async fn cost_of_nodes(
    ground: &Ground,
    variant: Variant,
    nodes: usize,
    writes: bool,
    length: Duration,
) -> Result<f64> {
    setup::tell(ground, variant).await?;
    let readers = Readers::new(ground, variant, nodes, &Noted::default()).await?;
    let client = ground.client().await?;
    let update = client.prepare("update public.item set updated_at = now() where id = $1").await?;
    sleep(WARM_UP).await;
    let postmaster = ground.postmaster()?;
    let (began, cpu) = (Instant::now(), cpu_of_server(postmaster)?);
    let mut tick = interval(Duration::from_millis(10));
    let mut written = 0;
    while began.elapsed() < length {
        tick.tick().await;
        if writes {
            let id = rand::rng().random_range(1..=1000_i64);
            written += client.execute(&update, &[&id]).await?;
        }
    }
    let share = cpu_of_server(postmaster)?.saturating_sub(cpu).as_secs_f64() / began.elapsed().as_secs_f64();
    readers.caught_up(written).await?;
    readers.end().await;
    Ok(share * 100.0)
}
