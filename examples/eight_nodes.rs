//! Eight nodes, a thousand callers, and a function that takes 600 ms: how often does it run?
//!
//! ```text
//! cargo run --release --features cli --example eight_nodes
//! ```
//!
//! It starts a throw-away Postgres, and each node in a runtime of its own, with connections of its own, as eight processes would be. It
//! ends with status 1 if anything came out otherwise than it says.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use rowcache::{Node, SharedValues, cli::temp_server::TempServer, migrate};
use tokio::{
    runtime::{Builder, Runtime},
    sync::watch,
};

type Permissions = SharedValues<i64, Vec<String>>;
type AnyError = Box<dyn std::error::Error + Send + Sync>;

const NODES: usize = 8;
const CALLERS: usize = 1000;

/// The backend that needs its time, and how often it was asked.
#[derive(Clone, Default)]
struct Backend {
    runs: watch::Sender<u32>,
}

impl Backend {
    async fn permissions_of(self, user: i64) -> Vec<String> {
        self.runs.send_modify(|runs| *runs += 1);
        let run = *self.runs.borrow();
        tokio::time::sleep(Duration::from_millis(600)).await;
        vec![format!("what {user} may, as of run {run}")]
    }

    fn runs(&self) -> u32 {
        *self.runs.borrow()
    }

    /// Returns when it runs once more than so often.
    async fn runs_again(&self, before: u32) {
        let _ = self.runs.subscribe().wait_for(|runs| *runs > before).await;
    }
}

struct Fleet {
    /// Where the audience sits.
    outside: Runtime,
    nodes: Vec<(Runtime, Node, Permissions)>,
    backend: Backend,
}

impl Fleet {
    fn start(outside: Runtime, url: &str) -> Result<Self, AnyError> {
        let mut nodes = Vec::new();
        for _ in 0..NODES {
            let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
            let node = runtime.block_on(Node::connect(url))?;
            let open = node.shared("permissions").lease(Duration::from_secs(1)).open();
            let permissions = runtime.block_on(open)?;
            nodes.push((runtime, node, permissions));
        }
        Ok(Self { outside, nodes, backend: Backend::default() })
    }

    /// All nodes know of what has been written.
    fn settle(&self) -> Result<(), AnyError> {
        for (runtime, node, _) in &self.nodes {
            runtime.block_on(node.barrier())?;
        }
        Ok(())
    }

    /// Callers on all nodes ask for the same user at the same time. Returns what they were told, each answer once.
    fn ask(&self, user: i64) -> Result<Vec<String>, AnyError> {
        let callers: Vec<_> = (0..CALLERS)
            .map(|n| {
                let (runtime, _, permissions) = &self.nodes[n % self.nodes.len()];
                let (permissions, backend) = (permissions.clone(), self.backend.clone());
                runtime
                    .spawn(async move { permissions.get_or_store(&user, move || backend.permissions_of(user)).await })
            })
            .collect();
        let mut told = Vec::new();
        for caller in callers {
            told.push(self.outside.block_on(caller)??.join(", "));
        }
        told.sort();
        told.dedup();
        Ok(told)
    }

    /// Says what came of it, beside what should have.
    fn scene(
        &self,
        what: &str,
        runs: u32,
        play: impl FnOnce(&Self) -> Result<Vec<String>, AnyError>,
    ) -> Result<bool, AnyError> {
        let (before, began) = (self.backend.runs(), Instant::now());
        let told = play(self)?;
        let ran = self.backend.runs() - before;
        println!(
            "{what}\n    {ran} run(s) in {:.1} s; all {CALLERS} callers were told: {}",
            began.elapsed().as_secs_f64(),
            told.join(" | ")
        );
        let good = ran == runs && told.len() == 1;
        if !good {
            println!("    it should have been {runs}, and one answer for all");
        }
        Ok(good)
    }
}

fn main() -> Result<ExitCode, AnyError> {
    let outside = Runtime::new()?;
    let server = outside.block_on(async {
        let server = TempServer::options().setting("max_connections", "300").start().await?;
        let pool = sqlx::PgPool::connect(&server.admin_url()).await?;
        migrate::up(&pool).await?;
        anyhow::Ok(server)
    })?;
    println!("PostgreSQL {}, {NODES} nodes, {CALLERS} callers at the same time", server.version());
    let mut fleet = Fleet::start(outside, &server.admin_url())?;
    let mut good = fleet.scene("nobody has computed it yet", 1, |fleet| fleet.ask(42))?;
    good &= fleet.scene("all have it in memory", 0, |fleet| fleet.ask(42))?;
    good &= fleet.scene(
        "a node deletes it while another one computes it anew: that one's result is not kept",
        2,
        |fleet| {
            let (before, (runtime, _, permissions)) = (fleet.backend.runs(), &fleet.nodes[0]);
            runtime.block_on(permissions.delete(&42))?;
            let (early, backend) = (permissions.clone(), fleet.backend.clone());
            let early = runtime.spawn(async move { early.get_or_store(&42, move || backend.permissions_of(42)).await });
            fleet.outside.block_on(fleet.backend.runs_again(before));
            let (runtime, _, permissions) = &fleet.nodes[1];
            runtime.block_on(permissions.delete(&42))?;
            fleet.settle()?;
            let told = fleet.ask(42);
            fleet.outside.block_on(early)??;
            told
        },
    )?;
    let (lost, _node, permissions) = fleet.nodes.remove(0);
    let backend = fleet.backend.clone();
    good &= fleet.scene("the node that computes is lost: another one takes over", 2, |fleet| {
        let before = fleet.backend.runs();
        lost.block_on(permissions.delete(&42))?;
        lost.spawn(async move { permissions.get_or_store(&42, move || backend.permissions_of(42)).await });
        fleet.outside.block_on(fleet.backend.runs_again(before));
        lost.shutdown_background();
        fleet.settle()?;
        fleet.ask(42)
    })?;
    drop(fleet);
    println!("{}", if good { "as it should be" } else { "NOT as it should be" });
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
