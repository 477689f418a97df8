//! How nodes reach the servers, loads apart: lines that can be slow, silent or cut; fences; messages.

use std::{
    collections::BTreeSet,
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::oneshot,
    time::{sleep, timeout},
};

use super::{
    node::{BEAT_TIMEOUT, KEY, fingerprint},
    world::World,
};
use crate::{
    change_log::{Polled, Position},
    coherence::{Fence, Incarnation},
    error::{Error, Kind, Result},
    server::{Answer, Hear, Line, Received, Server},
    tables::{Trust, Via},
    verify::history::NodeId,
};

/// A node's way to the servers.
pub(super) struct SimServer {
    world: Arc<World>,
    node: NodeId,
    listens: bool,
}

/// A line of a node.
pub(super) struct SimLine {
    world: Arc<World>,
    server: usize,
    incarnation: Incarnation,
    pub(super) wire: Arc<Wire>,
}

/// The network between a node and a server, as far as one line is concerned.
#[derive(Default)]
pub(super) struct Wire {
    /// Nothing passes any more.
    cut: AtomicBool,
    /// The node knows.
    ended: AtomicBool,
    /// LISTEN and the control connection are there.
    open: AtomicBool,
    /// Nothing passes before this time since the run began, in milliseconds.
    held_until: AtomicU64,
}

impl Wire {
    fn is_cut(&self) -> bool {
        self.cut.load(Ordering::Relaxed)
    }

    pub(super) fn hold(&self, until: u64) {
        self.held_until.fetch_max(until, Ordering::Relaxed);
    }

    pub(super) fn cut(&self) {
        self.cut.store(true, Ordering::Relaxed);
    }

    async fn pass(&self, world: &World) {
        let until = Duration::from_millis(self.held_until.load(Ordering::Relaxed));
        let wait = until.saturating_sub(world.now());
        if !wait.is_zero() {
            sleep(wait).await;
        }
    }
}

fn unreachable(what: &str) -> Error {
    Error::new(Kind::Unavailable, what)
}

impl SimServer {
    pub(super) fn new(world: &Arc<World>, node: NodeId, listens: bool) -> Self {
        Self { world: Arc::clone(world), node, listens }
    }

    /// Connects to where the listener's address leads.
    async fn connect(&self) -> Result<usize> {
        let world = &self.world;
        world.statement().await;
        let mut inner = world.lock();
        let at = inner.listener_at;
        let fails = inner.weather.connect_fails;
        if !inner.servers[at].alive || inner.servers[at].refuses || (fails != u64::MAX && inner.dice.once_in(fails)) {
            *inner.counts.entry("failed connect").or_default() += 1;
            return Err(unreachable("connection refused"));
        }
        Ok(at)
    }
}

impl Server for SimServer {
    fn open<'a>(&'a self, own_channel: &'a str, hear: Arc<dyn Hear>) -> Answer<'a, Arc<dyn Line>> {
        Box::pin(async move {
            let world = &self.world;
            let server = self.connect().await?;
            let incarnation = world.lock().servers[server].incarnation;
            world.statement().await;
            // LISTEN takes its place.
            let wire = Arc::new(Wire::default());
            let at = {
                let inner = world.lock();
                if !inner.servers[server].alive {
                    return Err(unreachable("the server ended"));
                }
                inner.servers[server].listen_at()
            };
            let line = SimLine { world: Arc::clone(world), server, incarnation, wire: Arc::clone(&wire) };
            if self.listens {
                let listening = listen(Arc::clone(world), Arc::clone(&wire), server, at, own_channel.to_owned(), hear);
                world.spawn(Some(self.node), listening);
            }
            world.statement().await;
            // The control connection.
            if self.connect().await? != server || wire.ended.load(Ordering::Relaxed) {
                return Err(unreachable("a connection ended while the line was being opened"));
            }
            world.statement().await;
            wire.open.store(true, Ordering::Relaxed);
            if wire.ended.load(Ordering::Relaxed) {
                return Err(unreachable("a connection ended while the line was being opened"));
            }
            let line = Arc::new(line);
            world.lock().lines.push((self.node, Arc::downgrade(&line.wire)));
            Ok(line as Arc<dyn Line>)
        })
    }

    fn reaches(&self, listening: Incarnation) -> Answer<'_, ()> {
        Box::pin(async move {
            self.world.statement().await;
            let reached = {
                let inner = self.world.lock();
                let server = &inner.servers[inner.pool_at];
                (server.alive && !server.refuses).then_some(server.incarnation)
            };
            self.world.statement().await;
            match reached {
                Some(reached) if reached == listening => Ok(()),
                Some(_) => Err(Error::new(Kind::Config, "the pool and the listener reach different servers")),
                None => Err(unreachable("the pool cannot connect")),
            }
        })
    }

    fn probe<'a>(&'a self, own_channel: &'a str, fence: Fence) -> Answer<'a, bool> {
        let at = self.world.lock().pool_at;
        Box::pin(send(Arc::clone(&self.world), at, None, own_channel.to_owned(), fence))
    }

    fn tell(&self, payload: String, via: Via) -> Answer<'_, ()> {
        let at = self.world.lock().pool_at;
        let world = Arc::clone(&self.world);
        Box::pin(async move {
            match via {
                Via::Notify => {
                    let sent = super::transaction::notify(world, at, None, move |_| payload, None);
                    in_the_server(&self.world, sent).await.map(|_| ())
                }
                Via::Log => in_the_server(&self.world, super::transaction::log(world, at, payload)).await,
            }
        })
    }

    fn close(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(async {})
    }
}

/// What a server does goes on when nobody waits for the answer any more.
async fn in_the_server<T: Send + 'static>(
    world: &World,
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    let (tell, told) = oneshot::channel();
    world.spawn(None, async move { drop(tell.send(work.await)) });
    told.await.unwrap_or_else(|_| Err(unreachable("the connection ended")))
}

/// Sends a fence.
async fn send(
    world: Arc<World>,
    server: usize,
    wire: Option<Arc<Wire>>,
    own_channel: String,
    fence: Fence,
) -> Result<bool> {
    world.statement().await;
    if let Some(wire) = &wire {
        wire.pass(&world).await;
        if wire.is_cut() {
            // Nobody answers.
            sleep(10 * BEAT_TIMEOUT).await;
            return Err(unreachable("the connection ended"));
        }
    }
    // The grammar of `change.rs`, in the order in which the real statement writes it.
    let payload = move |(snapshot, lsn): (String, u64)| {
        format!(r#"{{"v" : 1, "f" : "{}", "s" : "{snapshot}", "l" : {lsn}}}"#, fence.nonce)
    };
    let limit = BEAT_TIMEOUT / 3;
    let work = super::transaction::notify(Arc::clone(&world), server, Some(own_channel), payload, Some(limit));
    let sent = in_the_server(&world, work).await?;
    world.statement().await;
    if let Some(wire) = &wire {
        wire.pass(&world).await;
    }
    Ok(sent)
}

impl Line for SimLine {
    fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    fn is_open(&self) -> bool {
        !self.wire.ended.load(Ordering::Relaxed)
    }

    fn send<'a>(&'a self, own_channel: &'a str, fence: Fence) -> Answer<'a, bool> {
        let wire = Some(Arc::clone(&self.wire));
        Box::pin(send(Arc::clone(&self.world), self.server, wire, own_channel.to_owned(), fence))
    }

    fn fingerprints<'a>(&'a self, names: &'a [String]) -> Answer<'a, Vec<(String, Option<String>)>> {
        Box::pin(async move {
            let catalogue = self.ask(|server| server.catalogue).await?;
            Ok(names.iter().map(|name| (name.clone(), Some(fingerprint(catalogue)))).collect())
        })
    }

    fn verify<'a>(&'a self, _: &'a str) -> Answer<'a, Result<Trust, String>> {
        Box::pin(async move {
            let (catalogue, on) = self.ask(|server| (server.catalogue, server.triggers_on)).await?;
            let trust = Trust { fingerprint: fingerprint(catalogue), key: KEY.into(), via: self.world.via() };
            Ok(if on { Ok(trust) } else { Err("its triggers are off".into()) })
        })
    }

    fn poll<'a>(&'a self, since: Option<&'a Position>, read: &'a (dyn Fn(String) + Send + Sync)) -> Answer<'a, Polled> {
        Box::pin(async move {
            let by_log = self.world.via() == Via::Log;
            let look = |server: &super::database::Server| {
                let found = since.map(|since| server.logged_since(since)).unwrap_or_default();
                (server.snapshot(), server.lsn(), server.log_horizon, found)
            };
            let (snapshot, lsn, horizon, mut found) = self.ask(look).await?;
            let messages = found.len();
            if messages > 0 {
                self.world.count("poll that found something");
            }
            let later = found.split_off(messages / 2);
            for (_, message) in found {
                read(message);
            }
            // What is removed now has not been read.
            let left = |server: &super::database::Server| {
                let later: Vec<_> = later.into_iter().filter(|(xid, _)| !server.is_trimmed(*xid)).collect();
                (later, server.log_horizon)
            };
            let (later, horizon_after) = self.ask(left).await?;
            for (_, message) in later {
                read(message);
            }
            Ok(Polled {
                incarnation: self.incarnation,
                standby: false,
                snapshot: snapshot.parse().expect("a snapshot"),
                // Without the log further than what the server says, for `mark` takes one off.
                lsn: lsn + u64::from(!by_log),
                horizon,
                horizon_after,
                read: BTreeSet::new(),
                messages,
            })
        })
    }

    fn trim(&self, _: Option<u64>) -> Answer<'_, bool> {
        Box::pin(async { Ok(true) })
    }
}

impl SimLine {
    /// Asks the server something, over the control connection.
    async fn ask<T>(&self, ask: impl FnOnce(&super::database::Server) -> T) -> Result<T> {
        let world = &self.world;
        world.statement().await;
        self.wire.pass(world).await;
        if self.wire.is_cut() {
            sleep(10 * BEAT_TIMEOUT).await;
        }
        let answer = {
            let inner = world.lock();
            let server = &inner.servers[self.server];
            if !server.alive || self.wire.is_cut() {
                return Err(unreachable("the connection ended"));
            }
            ask(server)
        };
        world.statement().await;
        Ok(answer)
    }
}

impl Drop for SimLine {
    fn drop(&mut self) {
        // Nobody cares any more.
        self.wire.ended.store(true, Ordering::Relaxed);
        self.wire.cut();
    }
}

/// A LISTEN connection: takes what can be sent, and hands it over after a while.
async fn listen(
    world: Arc<World>,
    wire: Arc<Wire>,
    server: usize,
    mut at: usize,
    own_channel: String,
    hear: Arc<dyn Hear>,
) {
    let locks = world.lock().servers[server].locks.clone();
    loop {
        let changed = locks.changed.notified();
        let (batch, alive) = {
            let inner = world.lock();
            let server = &inner.servers[server];
            let batch = server.to_send(at);
            at += batch.len();
            let ours = |it: &&super::database::Message| it.channel.as_ref().is_none_or(|of| *of == own_channel);
            (batch.iter().filter(ours).cloned().collect::<Vec<_>>(), server.alive)
        };
        if wire.ended.load(Ordering::Relaxed) {
            return;
        }
        if !alive || wire.is_cut() {
            break;
        }
        if batch.is_empty() {
            // Woken by what is sent; and a cut is looked for now and then.
            let _ = timeout(Duration::from_millis(200), changed).await;
            continue;
        }
        let most = world.lock().weather.delay;
        world.pause(most).await;
        wire.pass(&world).await;
        for message in batch {
            if wire.is_cut() || wire.ended.load(Ordering::Relaxed) {
                break;
            }
            hear.received(match message.channel {
                Some(_) => Received::Own(message.payload),
                None => Received::Change(message.payload),
            });
            if world.roll(|dice| dice.once_in(4)) {
                tokio::task::yield_now().await;
            }
        }
    }
    // How long it takes until this end knows.
    let late = world.roll(|dice| if dice.once_in(3) { dice.between(0, 2000) } else { dice.between(0, 5) });
    sleep(Duration::from_millis(late)).await;
    if !wire.ended.swap(true, Ordering::Relaxed) && wire.open.load(Ordering::Relaxed) {
        hear.lost("reset by the simulation".into());
    }
}
