//! Keeps a table of shared values in order: tells which are in use, and removes those that have expired.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use sqlx::PgPool;
use tokio::{sync::mpsc, time::sleep};

use super::{Common, Counters, codec::Codec, stored::Stored};
use crate::{
    error::{Error, Result, with_causes},
    key::Key,
    load,
    postgres::values::{self, Statements},
    shared::Shared,
    source::Source,
    store::{Due, Store},
    throttle::Complaint,
};

/// What it needs. It keeps no node alive.
pub(super) struct Keeper<K: Key, V: Send + Sync + 'static, C: 'static> {
    pub(super) statements: Arc<Statements<K>>,
    pub(super) store: Weak<Store<K, Stored<V, C>>>,
    pub(super) source: Arc<dyn Source<K, Stored<V, C>>>,
    pub(super) writes: PgPool,
    pub(super) shared: Arc<Shared>,
    pub(super) common: Weak<Common<K, V, C>>,
}

const SWEEP_PAUSE: Duration = Duration::from_mins(1);

impl<K: Key, V: Send + Sync + Unpin + 'static, C: Codec<V>> Keeper<K, V, C> {
    pub(super) async fn keep(self, touched: mpsc::UnboundedReceiver<K>) {
        let mut stopping = self.shared.stopping();
        tokio::select! {
            biased;
            _ = stopping.wait_for(|stopping| *stopping) => {}
            () = self.tell_use(touched) => {}
            () = self.remove_dead() => {}
        }
    }

    /// Each was used here when a fifth of the time had passed that it may be unused.
    async fn tell_use(&self, mut touched: mpsc::UnboundedReceiver<K>) {
        let mut complaint = Complaint::default();
        while let Some(key) = touched.recv().await {
            if let Err(error) = self.statements.touch(&self.writes, &key).await {
                self.tell(&mut complaint, &error, "cannot tell that a shared value is in use");
            }
            let Some(store) = self.store.upgrade() else { return };
            // For its new end.
            let mut wanted = Vec::new();
            drop(store.reload(&Due::Early(key), &mut wanted));
            load::start(&store, &self.source, &self.shared, wanted);
        }
    }

    async fn remove_dead(&self) {
        let mut complaint = Complaint::default();
        loop {
            // Not all nodes at once.
            #[expect(clippy::cast_possible_truncation, reason = "any bits will do")]
            let draw = f64::from(self.shared.host.random() as u32) / f64::from(u32::MAX);
            sleep(SWEEP_PAUSE.mul_f64(0.5 + draw)).await;
            let Some(common) = self.common.upgrade() else { return };
            if let Err(error) = sweep(&self.statements, &self.writes, &common.counters).await {
                self.tell(&mut complaint, &error, "cannot remove shared values that have expired; will try again");
            }
        }
    }

    fn tell(&self, complaint: &mut Complaint, error: &Error, what: &'static str) {
        let error = with_causes(error);
        if complaint.is_news(&error, self.shared.host.now()) {
            tracing::warn!(table = values::table_of(self.statements.name()), error, "{what}");
        }
    }
}

const SWEPT_AT_ONCE: u64 = 500;

/// Removes what has expired, batch by batch. Returns how many values.
pub(super) async fn sweep<K: Key>(statements: &Statements<K>, writes: &PgPool, counters: &Counters) -> Result<u64> {
    let mut all = 0;
    loop {
        let swept = statements.sweep(writes, SWEPT_AT_ONCE.cast_signed()).await?;
        counters.swept.add(swept);
        all += swept;
        if swept < SWEPT_AT_ONCE {
            return Ok(all);
        }
    }
}
