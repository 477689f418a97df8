//! One producer for all: who computes a value, who waits for it, and who gets it.
//!
//! ```text
//! missing ── a run of this key on this node? ── yes ──→ wait for it
//!               └ no: begin one ── take the lease ── somebody has it ──→ wait for a change of the key, and look again
//!                                       └ ours: call the producer, renewing the lease ── store, if the lease is still ours
//! ```
//!
//! Whatever removes the row (a DELETE by anybody, `clear`, a crash of an unlogged table) or writes it ends the lease with it. So a value
//! is stored only if nothing of its key has happened since before its producer began, which is what a ticket is to a load (X2).
//!
//! # Who may get what a run has produced
//!
//! 1. a run begins, and its producer reads the world; then somebody deletes the value, because the world has changed;
//! 2. a caller asks, finds nothing, and joins the run.
//!
//! He must not get it (I2). The store fails then, and those who joined look again; who began the run had asked before 1. And nobody joins a
//! run any more once its value is on its way into the table: the value that is stored was right when they asked.

use std::{
    collections::HashMap,
    future::{Future, pending},
    panic::{AssertUnwindSafe, catch_unwind},
    pin::pin,
    sync::{Arc, Weak},
    time::Duration,
};

use futures_util::FutureExt as _;
use tokio::{
    sync::watch,
    time::{interval_at, sleep, timeout},
};
use uuid::Uuid;

use super::{Core, codec::Codec, stored::SharedValue};
use crate::{
    error::{Error, Kind, Result, with_causes},
    journal::{TableEvent, TableEvents},
    key::Key,
    postgres::{
        built::BoxError,
        rows::panic_message,
        values::{Lives, Taken},
    },
    sync::{Mutex, lock},
    throttle::Complaint,
};

/// How a run has ended.
pub(super) enum Ended<V, C> {
    /// The value is stored.
    Kept(SharedValue<V, C>),
    /// It is not: something has happened to its key meanwhile, or it could not be stored.
    Unkept(SharedValue<V, C>),
    /// Somebody else has stored one.
    Look,
    Failed(Error),
}

impl<V, C> Clone for Ended<V, C> {
    fn clone(&self) -> Self {
        match self {
            Self::Kept(value) => Self::Kept(value.clone()),
            Self::Unkept(value) => Self::Unkept(value.clone()),
            Self::Look => Self::Look,
            Self::Failed(error) => Self::Failed(error.clone()),
        }
    }
}

type Joined<V, C> = watch::Receiver<Option<Ended<V, C>>>;

/// The runs of one node that can be joined, by key.
pub(super) struct Runs<K, V, C>(Mutex<ByKey<K, V, C>>);

/// With the id of each.
type ByKey<K, V, C> = HashMap<K, (Uuid, Joined<V, C>)>;

impl<K, V, C> Default for Runs<K, V, C> {
    fn default() -> Self {
        Self(Mutex::new(HashMap::new()))
    }
}

/// The right to end a run.
pub(super) struct Run<K: Key, V, C> {
    runs: Weak<Runs<K, V, C>>,
    key: K,
    id: Uuid,
    say: watch::Sender<Option<Ended<V, C>>>,
}

impl<K: Key, V, C> Runs<K, V, C> {
    /// The run of this key, or a new one.
    pub(super) fn join(self: &Arc<Self>, key: &K) -> Result<Joined<V, C>, Run<K, V, C>> {
        let mut runs = lock(&self.0);
        if let Some((_, joined)) = runs.get(key) {
            return Ok(joined.clone());
        }
        let (say, joined) = watch::channel(None);
        let id = Uuid::new_v4();
        runs.insert(key.clone(), (id, joined));
        Err(Run { runs: Arc::downgrade(self), key: key.clone(), id, say })
    }
}

impl<K: Key, V, C> Run<K, V, C> {
    /// Nobody joins any more.
    fn close(&self) {
        let Some(runs) = self.runs.upgrade() else { return };
        let mut runs = lock(&runs.0);
        if runs.get(&self.key).is_some_and(|(id, _)| *id == self.id) {
            runs.remove(&self.key);
        }
    }

    fn end(self, ended: Ended<V, C>) {
        self.close();
        self.say.send_replace(Some(ended));
    }
}

impl<K: Key, V, C> Drop for Run<K, V, C> {
    fn drop(&mut self) {
        self.close();
    }
}

/// Returns how it has ended; `None`: with the runtime that it ran on.
pub(super) async fn outcome<V, C>(mut joined: Joined<V, C>) -> Option<Ended<V, C>> {
    joined.wait_for(Option::is_some).await.ok()?.clone()
}

impl<K: Key, V: Send + Sync + Unpin + 'static, C: Codec<V>> Core<K, V, C> {
    /// Runs, in a task of its own. Returns the producer if it was not needed.
    pub(super) async fn run<F, R, E>(
        self: Arc<Self>,
        run: Run<K, V, C>,
        producer: F,
        lives: Lives,
        unreadable: Option<i64>,
    ) -> (Ended<V, C>, Option<F>)
    where
        F: FnOnce() -> R + Send,
        R: Future<Output = Result<V, E>> + Send,
        E: Into<BoxError>,
    {
        match self.acquire(&run, unreadable).await {
            Ok(true) => {
                let ended = self.produce(&run, producer, lives).await;
                run.end(ended.clone());
                (ended, None)
            }
            Ok(false) => {
                run.end(Ended::Look);
                (Ended::Look, Some(producer))
            }
            Err(error) => {
                run.end(Ended::Failed(error.clone()));
                (Ended::Failed(error), None)
            }
        }
    }

    /// Returns with the lease, or (`false`) when there is a value.
    async fn acquire(&self, run: &Run<K, V, C>, unreadable: Option<i64>) -> Result<bool> {
        let key = &run.key;
        // Before anything is looked at: what happens from now on is told.
        let mut events = self.table.subscribe();
        loop {
            let mut limit = LOOK_AGAIN;
            match self.statements.take(&self.writes, key, run.id, self.lease, unreadable).await? {
                Taken::Ours => return Ok(true),
                // Its message may not have come yet.
                Taken::HasValue => self.table.store.invalidate(key),
                Taken::By(remaining) => limit = limit.min(remaining),
            }
            // What is held, if only that there is no value, is taken away when there is one, which is told.
            if self.table.get(key).await?.is_some_and(|stored| stored.unreadable().is_none()) {
                return Ok(false);
            }
            let _ = timeout(limit, change(&mut events, key)).await;
        }
    }

    /// Calls the producer and stores the value. The lease is given back, whatever happens.
    async fn produce<F, R, E>(&self, run: &Run<K, V, C>, producer: F, lives: Lives) -> Ended<V, C>
    where
        F: FnOnce() -> R + Send,
        R: Future<Output = Result<V, E>> + Send,
        E: Into<BoxError>,
    {
        let encoded = self.call(run, producer).await.and_then(|value| Ok((self.encode(&run.key, &value)?, value)));
        let (bytes, value) = match encoded {
            Ok(produced) => produced,
            Err(error) => {
                self.release(run).await;
                return Ended::Failed(error);
            }
        };
        let value = SharedValue::alone(value);
        run.close();
        let stored = self.statements.store(&self.writes, &run.key, run.id, bytes, lives).await;
        // The message comes later: who asks here from now on finds the value.
        self.table.store.invalidate(&run.key);
        match stored {
            Ok(true) => Ended::Kept(value),
            Ok(false) => Ended::Unkept(value),
            Err(error) => {
                tracing::warn!(error = with_causes(&error), "a value was computed that cannot be shared");
                Ended::Unkept(value)
            }
        }
    }

    /// The value that the producer returns, while the lease is renewed.
    async fn call<F, R, E>(&self, run: &Run<K, V, C>, producer: F) -> Result<V>
    where
        F: FnOnce() -> R + Send,
        R: Future<Output = Result<V, E>> + Send,
        E: Into<BoxError>,
    {
        let of = || self.statements.of(&run.key);
        let mut stopping = self.table.shared().stopping();
        // It may panic before it returns a future as well.
        let calling = async { producer().await.map_err(Into::<BoxError>::into) };
        let calling = AssertUnwindSafe(calling).catch_unwind();
        let mut calling = pin!(timeout(self.timeout, calling));
        let mut renewing = pin!(self.keep_lease(run));
        let called = tokio::select! {
            biased;
            called = &mut calling => called,
            () = &mut renewing => unreachable!("it goes on"),
            () = async { drop(stopping.wait_for(|stopping| *stopping).await) } => {
                return Err(Error::new(Kind::Closed, format!("the node was shut down while {} was computed", of())));
            }
        };
        match called {
            Ok(Ok(Ok(value))) => Ok(value),
            Ok(Ok(Err(error))) => Err(Error::with(Kind::Loader, format!("{} could not be computed", of()), error)),
            Ok(Err(panic)) => {
                let why = panic_message(&*panic);
                Err(Error::new(Kind::Loader, format!("{} could not be computed: its producer panicked: {why}", of())))
            }
            Err(_) => {
                let limit = self.timeout;
                Err(Error::new(Kind::Timeout, format!("{} took longer than {limit:?} (`produce_timeout`)", of())))
            }
        }
    }

    /// Until the lease is lost, after which there is nothing to do. Does not return.
    async fn keep_lease(&self, run: &Run<K, V, C>) {
        let pause = self.lease / 3;
        let mut ticks = interval_at(tokio::time::Instant::now() + pause, pause);
        let mut complaint = Complaint::default();
        loop {
            ticks.tick().await;
            match self.statements.renew(&self.writes, &run.key, run.id, self.lease).await {
                Ok(true) => complaint.is_settled(),
                Ok(false) => pending().await,
                Err(error) => {
                    let error = with_causes(&error);
                    if complaint.is_news(&error, self.table.shared().host.now()) {
                        tracing::warn!(
                            error,
                            "cannot renew the lease of a value that is being computed; will try again"
                        );
                    }
                }
            }
        }
    }

    /// So that whoever waits need not wait until it runs out.
    async fn release(&self, run: &Run<K, V, C>) {
        let releasing = self.statements.release(&self.writes, &run.key, run.id);
        if let Ok(Err(error)) = timeout(self.lease, releasing).await {
            let error = with_causes(&error);
            tracing::debug!(error, "cannot give back a lease, which will run out");
        }
    }

    /// The bytes of a value, if it has any, and not too many.
    pub(super) fn encode(&self, key: &K, value: &V) -> Result<Vec<u8>> {
        let of = || self.statements.of(key);
        let cannot = || format!("{} cannot be encoded, and is not stored", of());
        let bytes = match catch_unwind(AssertUnwindSafe(|| C::encode(value))) {
            Ok(encoded) => encoded.map_err(|error| Error::with(Kind::Value, cannot(), error))?,
            Err(panic) => {
                let why = panic_message(&*panic);
                return Err(Error::new(Kind::Value, format!("{}: its codec panicked: {why}", cannot())));
            }
        };
        if bytes.len() > self.bytes_max {
            let (length, max) = (bytes.len(), self.bytes_max);
            let message =
                format!("{} has {length} bytes, and is not stored: more than {max} (`value_bytes_max`)", of());
            return Err(Error::new(Kind::Value, message));
        }
        Ok(bytes)
    }
}

/// While a message may not come, and once more should a change have taken away what nobody held.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Returns when something may have happened to this key.
async fn change<K: Key>(events: &mut TableEvents<K>, key: &K) {
    loop {
        match events.recv().await {
            Some(TableEvent::Lagged(_) | TableEvent::Coherent) => return,
            Some(event) if event.ends(key) => return,
            Some(_) => {}
            // The node is going away.
            None => sleep(LOOK_AGAIN).await,
        }
    }
}
