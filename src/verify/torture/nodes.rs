//! The node processes, as the run sees them: each behind two proxies, one for its pool and one for its line.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    process::{Child, ChildStdin, ChildStdout, Command},
    sync::{broadcast, mpsc},
    time::timeout,
};

use super::{
    super::{history::NodeId, history::Time, proxy::Proxy, redis::RedisServer},
    wire::{Attempt, Kind, Order, PATIENCE, Quiet, RawNote, RawRead, Setup, Told},
    world::World,
};

/// Reads kept of one episode; more are not checked.
const READS_MAX: usize = 600_000;

/// What was noted in this episode, by whom.
#[derive(Debug, Default)]
pub(super) struct Notes {
    pub(super) reads: Vec<(NodeId, RawRead)>,
    pub(super) notes: Vec<(NodeId, Time, RawNote)>,
    pub(super) attempts: Vec<Attempt>,
    pub(super) wrong: Vec<String>,
}

/// What nodes and writers write their notes into.
#[derive(Clone, Default)]
pub(super) struct Notebook(Arc<Mutex<Notes>>);

impl Notebook {
    pub(super) fn open(&self) -> MutexGuard<'_, Notes> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One node process.
pub(super) struct NodeProcess {
    pub(super) id: NodeId,
    pub(super) pool: Proxy,
    pub(super) listener: Proxy,
    child: Child,
    orders: mpsc::Sender<Order>,
    replies: mpsc::Receiver<Told>,
}

/// All of them.
pub(super) struct Nodes {
    pub(super) all: Vec<NodeProcess>,
    pub(super) notebook: Notebook,
    /// Tokens, and who wrote them.
    tokens: broadcast::Sender<(NodeId, Order)>,
    directory: PathBuf,
    next: NodeId,
    seed: u64,
}

impl Nodes {
    pub(super) async fn start(count: u32, world: &World, directory: &Path, seed: u64) -> Result<Self> {
        let (tokens, _) = broadcast::channel(256);
        let (all, notebook) = Default::default();
        let mut nodes = Self { all, notebook, tokens, directory: directory.to_owned(), next: 0, seed };
        for n in 0..count {
            let node = nodes.launch(world, n).await?;
            nodes.all.push(node);
        }
        Ok(nodes)
    }

    async fn launch(&mut self, world: &World, n: u32) -> Result<NodeProcess> {
        let id = self.next;
        self.next += 1;
        let (pool, listener) = (Proxy::start(world.server.port()).await, Proxy::start(world.server.port()).await);
        let url = world.server.admin_url();
        let setup = Setup {
            id,
            origin: world.origin,
            seed: self.seed ^ u64::from(id) << 32,
            kind: Kind::of(n),
            listens: !world.log_only || n.is_multiple_of(2),
            pool: pool.url(&url),
            listener: listener.url(&url),
            tier: world.redis.as_ref().map(RedisServer::url),
        };
        let log = File::create(self.directory.join(format!("node-{id}.log"))).context("cannot write a node's log")?;
        let mut command = Command::new(std::env::current_exe()?);
        // A group of its own: Ctrl-C is for the run, which ends its nodes.
        command.arg("torture-node").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log).process_group(0);
        let mut child = command.kill_on_drop(true).spawn().context("cannot start a node")?;
        let (input, output) = (child.stdin.take().context("piped")?, child.stdout.take().context("piped")?);
        let ((orders, to_order), (replied, replies)) = (mpsc::channel(64), mpsc::channel(64));
        tokio::spawn(tell(input, setup, to_order, self.tokens.subscribe()));
        tokio::spawn(listen(output, id, self.notebook.clone(), replied, self.tokens.clone()));
        let mut node = NodeProcess { id, pool, listener, child, orders, replies };
        match node.reply().await? {
            Told::Ready => Ok(node),
            other => bail!("node {id} began with {other:?}"),
        }
    }

    /// Kills a node, and starts another one in its place.
    pub(super) async fn replace(&mut self, n: usize, world: &World) -> Result<()> {
        let node = &mut self.all[n];
        node.child.start_kill()?;
        node.child.wait().await?;
        self.all[n] = self.launch(world, u32::try_from(n)?).await?;
        Ok(())
    }

    pub(super) async fn order(&self, order: &Order) -> Result<()> {
        for node in &self.all {
            node.order(order.clone()).await?;
        }
        Ok(())
    }

    /// All stop reading and writing.
    pub(super) async fn stop(&mut self) -> Result<()> {
        self.order(&Order::Stop).await?;
        for node in &mut self.all {
            node.expect_stopped().await?;
        }
        Ok(())
    }

    pub(super) async fn quiet(&mut self) -> Result<Vec<(NodeId, Quiet)>> {
        self.order(&Order::Quiet).await?;
        let mut all = Vec::new();
        for node in &mut self.all {
            match node.reply().await? {
                Told::Quiet(quiet) => all.push((node.id, *quiet)),
                other => bail!("node {} answered {other:?}", node.id),
            }
        }
        Ok(all)
    }

    /// One after the other, as they would overtake each other's loads.
    pub(super) async fn lively(&mut self) -> Result<Vec<String>> {
        let mut all = Vec::new();
        for node in &mut self.all {
            node.order(Order::Lively).await?;
            match node.reply().await? {
                Told::Lively(wrong) => all.extend(wrong.into_iter().map(|wrong| format!("node {}: {wrong}", node.id))),
                other => bail!("node {} answered {other:?}", node.id),
            }
        }
        Ok(all)
    }
}

impl NodeProcess {
    pub(super) async fn order(&self, order: Order) -> Result<()> {
        self.orders.send(order).await.ok().with_context(|| format!("node {} has ended", self.id))
    }

    async fn reply(&mut self) -> Result<Told> {
        // Its own limits are shorter, one after the other.
        let reply = timeout(PATIENCE * 4, self.replies.recv()).await;
        let reply = reply.with_context(|| format!("node {} does not answer", self.id))?;
        reply.with_context(|| format!("node {} has ended", self.id))
    }

    async fn expect_stopped(&mut self) -> Result<()> {
        match self.reply().await? {
            Told::Stopped => Ok(()),
            other => bail!("node {} answered {other:?}", self.id),
        }
    }

    /// Stops the whole process for a while.
    pub(super) async fn freeze(&self, length: Duration) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.child.id().context("it has ended")?)?);
        kill(pid, Signal::SIGSTOP)?;
        tokio::time::sleep(length).await;
        kill(pid, Signal::SIGCONT)?;
        Ok(())
    }
}

async fn tell(
    mut input: ChildStdin,
    setup: Setup,
    mut orders: mpsc::Receiver<Order>,
    mut tokens: broadcast::Receiver<(NodeId, Order)>,
) {
    let mut line = serde_json::to_string(&setup).expect("plain data");
    loop {
        line.push('\n');
        if input.write_all(line.as_bytes()).await.is_err() {
            return;
        }
        let order = loop {
            tokio::select! {
                order = orders.recv() => match order {
                    Some(order) => break order,
                    None => return,
                },
                token = tokens.recv() => match token {
                    Ok((by, order)) if by != setup.id => break order,
                    // A token less is a check less.
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return,
                },
            }
        };
        line = serde_json::to_string(&order).expect("plain data");
    }
}

async fn listen(
    output: ChildStdout,
    id: NodeId,
    notebook: Notebook,
    replies: mpsc::Sender<Told>,
    tokens: broadcast::Sender<(NodeId, Order)>,
) {
    let mut lines = BufReader::with_capacity(1 << 16, output).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        match serde_json::from_str(&line) {
            Ok(Told::Reads(reads)) => {
                let mut notes = notebook.open();
                let room = READS_MAX.saturating_sub(notes.reads.len());
                notes.reads.extend(reads.into_iter().take(room).map(|read| (id, read)));
            }
            Ok(Told::Note(at, note)) => notebook.open().notes.push((id, at, note)),
            Ok(Told::Wrote(attempt)) => {
                if let (Some(token), Some(first)) = (&attempt.token, attempt.rows.first()) {
                    let keys = attempt.rows.iter().map(|row| row.key).collect();
                    let _ = tokens.send((id, Order::Token { token: token.clone(), number: first.number, keys }));
                }
                notebook.open().attempts.push(attempt);
            }
            Ok(Told::Wrong(what)) => notebook.open().wrong.push(what),
            Ok(reply) => {
                if replies.send(reply).await.is_err() {
                    return;
                }
            }
            Err(error) => notebook.open().wrong.push(format!("node {id} said `{line}`: {error}")),
        }
    }
}
