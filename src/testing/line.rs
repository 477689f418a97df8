//! How nodes reach the database: lines, which carry messages in their order, or end.

use std::{collections::VecDeque, future::Future, pin::Pin, sync::Arc, time::Duration};

use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

use super::{
    World,
    world::{Moment, unreachable},
};
use crate::{
    change_log::{Polled, Position},
    coherence::{Fence, Incarnation},
    error::{Error, Kind, Result},
    server::{Answer, Hear, Line, Received, Server},
    sync::{Mutex, lock},
    tables::{Trust, Via},
};

/// A message, and who hears it.
#[derive(Clone)]
pub(super) enum Sent {
    All(String),
    /// The node with this channel.
    Own {
        channel: String,
        payload: String,
    },
}

/// What a line receives.
pub(super) struct Wire {
    own_channel: String,
    inner: Mutex<Inner>,
    /// Wakes who delivers.
    changed: Notify,
}

struct Inner {
    queue: VecDeque<(Option<Instant>, Sent)>,
    /// None: it has ended.
    hear: Option<Arc<dyn Hear>>,
    is_silent: bool,
}

impl Wire {
    fn new(own_channel: &str, hear: Arc<dyn Hear>) -> Self {
        let inner = Inner { queue: VecDeque::new(), hear: Some(hear), is_silent: false };
        Self { own_channel: own_channel.to_owned(), inner: Mutex::new(inner), changed: Notify::new() }
    }

    pub(super) fn hears(&self, sent: &Sent) -> bool {
        let inner = lock(&self.inner);
        let is_for = match sent {
            Sent::All(_) => true,
            Sent::Own { channel, .. } => *channel == self.own_channel,
        };
        is_for && inner.hear.is_some() && !inner.is_silent
    }

    pub(super) fn queue(&self, sent: &Sent, delay: Duration, twice: bool) {
        // Nobody is asked for the time without need: writers may be anywhere.
        let due = (!delay.is_zero()).then(|| Instant::now() + delay);
        let mut inner = lock(&self.inner);
        // Those that are already there go first.
        let due = due.max(inner.queue.back().and_then(|(due, _)| *due));
        for _ in 0..=usize::from(twice) {
            inner.queue.push_back((due, sent.clone()));
        }
        drop(inner);
        self.changed.notify_one();
    }

    /// It carries nothing from now on, and nobody knows.
    pub(super) fn silence(&self) {
        let mut inner = lock(&self.inner);
        inner.is_silent = true;
        inner.queue.clear();
    }

    fn is_open(&self) -> bool {
        lock(&self.inner).hear.is_some()
    }

    /// It breaks, and its node knows.
    pub(super) fn end(&self, how: &str) {
        if let Some(hear) = self.close() {
            hear.lost(how.to_owned());
        }
    }

    fn close(&self) -> Option<Arc<dyn Hear>> {
        let mut inner = lock(&self.inner);
        inner.queue.clear();
        let hear = inner.hear.take();
        drop(inner);
        self.changed.notify_one();
        hear
    }

    /// When the next message is due; `None`: there is none. An error: it has ended.
    fn due(&self) -> Result<Option<Option<Instant>>, Ended> {
        let inner = lock(&self.inner);
        if inner.hear.is_none() { Err(Ended) } else { Ok(inner.queue.front().map(|(due, _)| *due)) }
    }

    fn deliver_one(&self) {
        let mut inner = lock(&self.inner);
        let (Some(hear), Some((_, sent))) = (inner.hear.clone(), inner.queue.pop_front()) else { return };
        drop(inner);
        hear.received(match sent {
            Sent::All(payload) => Received::Change(payload),
            Sent::Own { payload, .. } => Received::Own(payload),
        });
    }

    /// Delivers messages until it ends.
    async fn deliver(self: Arc<Self>, world: Arc<World>) {
        while let Ok(next) = self.due() {
            let Some(due) = next else {
                self.changed.notified().await;
                continue;
            };
            let waits = async {
                if let Some(due) = due {
                    sleep_until(due).await;
                }
                world.messages.pass().await;
            };
            tokio::select! {
                biased;
                // It may have ended, or have fallen silent.
                () = self.changed.notified() => {}
                () = waits => self.deliver_one(),
            }
            // One at a time, as they come from a socket.
            tokio::task::yield_now().await;
        }
    }
}

struct Ended;

/// A line of a node: what it hears, and the session that sends fences.
struct MemoryLine {
    world: Arc<World>,
    wire: Arc<Wire>,
    incarnation: Incarnation,
}

impl Drop for MemoryLine {
    fn drop(&mut self) {
        // Nobody cares any more.
        drop(self.wire.close());
    }
}

/// A node's way to the database.
pub(super) struct MemoryServer(pub(super) Arc<World>);

impl Server for MemoryServer {
    fn open<'a>(&'a self, own_channel: &'a str, hear: Arc<dyn Hear>) -> Answer<'a, Arc<dyn Line>> {
        Box::pin(async move {
            let world = Arc::clone(&self.0);
            let wire = Arc::new(Wire::new(own_channel, hear));
            let incarnation = world.listen(&wire)?;
            tokio::spawn(Arc::clone(&wire).deliver(Arc::clone(&world)));
            Ok(Arc::new(MemoryLine { world, wire, incarnation }) as Arc<dyn Line>)
        })
    }

    fn reaches(&self, listening: Incarnation) -> Answer<'_, ()> {
        Box::pin(async move {
            if self.0.moment()?.incarnation == listening {
                return Ok(());
            }
            Err(unreachable("the test database was restarted"))
        })
    }

    fn probe<'a>(&'a self, own_channel: &'a str, fence: Fence) -> Answer<'a, bool> {
        Box::pin(async move { self.0.fence(own_channel, fence).map(|()| true) })
    }

    fn tell(&self, payload: String, _: Via) -> Answer<'_, ()> {
        Box::pin(async move { self.0.tell(payload) })
    }

    fn close(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(async {})
    }

    fn in_memory(&self) -> Option<Arc<World>> {
        Some(Arc::clone(&self.0))
    }
}

impl MemoryLine {
    fn ask(&self) -> Result<Moment> {
        if self.wire.is_open() { self.world.moment() } else { Err(unreachable("the line has ended")) }
    }
}

impl Line for MemoryLine {
    fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    fn is_open(&self) -> bool {
        self.wire.is_open()
    }

    fn send<'a>(&'a self, own_channel: &'a str, fence: Fence) -> Answer<'a, bool> {
        Box::pin(async move {
            self.ask()?;
            self.world.fence(own_channel, fence).map(|()| true)
        })
    }

    fn fingerprints<'a>(&'a self, names: &'a [String]) -> Answer<'a, Vec<(String, Option<String>)>> {
        Box::pin(async move {
            self.ask()?;
            Ok(names.iter().map(|name| (name.clone(), Some(trust().fingerprint))).collect())
        })
    }

    fn verify<'a>(&'a self, _: &'a str) -> Answer<'a, Result<Trust, String>> {
        Box::pin(async move { self.ask().map(|_| Ok(trust())) })
    }

    fn poll<'a>(&'a self, _: Option<&'a Position>, _: &'a (dyn Fn(String) + Send + Sync)) -> Answer<'a, Polled> {
        Box::pin(async move {
            let Moment { incarnation, snapshot, lsn } = self.ask()?;
            let unread = |text| Error::new(Kind::Unavailable, text);
            Ok(Polled {
                incarnation,
                standby: false,
                snapshot: snapshot.parse().map_err(unread)?,
                // Nothing is told by way of the log, so that it says no less than the fence does; `mark` takes one off.
                lsn: lsn + 1,
                horizon: 0,
                horizon_after: 0,
                read: std::collections::BTreeSet::new(),
                messages: 0,
            })
        })
    }

    fn trim(&self, _: Option<u64>) -> Answer<'_, bool> {
        Box::pin(async { Ok(true) })
    }
}

/// What every table looks like: its triggers are whole.
pub(super) fn trust() -> Trust {
    Trust { fingerprint: "in memory".into(), key: String::new(), via: Via::Notify }
}
