//! How a node opens a cache: what it depends on, its store, how it loads, and what keeps it going.

use std::sync::Arc;

use crate::{
    audit::{self, Auditor},
    error::{Error, Kind, Result},
    hashed::Hashed,
    keeper,
    key::Key,
    node::Node,
    options::{OnChange, TableOptions},
    postgres::{
        access::Access,
        catalog::{self, TrackedTable, Widths},
        rows::Keeps,
    },
    refill, refresh,
    source::Source,
    store::{Limits, Reload, Store},
    table::Table,
    tables::{Member, On},
    throttle::Throttle,
};

impl Node {
    /// A table as one whose key is these columns, how its cache depends on it, and its real key.
    pub(crate) async fn by_columns<K: Key>(
        &self,
        name: &str,
        columns: impl IntoIterator<Item: Into<String>>,
    ) -> Result<(TrackedTable, On, Vec<String>)> {
        let key_columns: Vec<String> = columns.into_iter().map(Into::into).collect();
        let (on, order) = self.depend::<K>(name, Some(&key_columns), Widths::Exact).await?;
        let (name, trust) = (on.table.clone(), on.trust.clone());
        Ok((TrackedTable { name, key_columns, is_keyed: false, trust, secret: None }, on, order))
    }

    /// How a cache under `K` depends on a table, and the columns of the table's key.
    pub(crate) async fn depend<K: Key>(
        &self,
        name: &str,
        columns: Option<&[String]>,
        widths: Widths,
    ) -> Result<(On, Vec<String>)> {
        catalog::depend::<K>(&self.postgres.pool, self.handle.shared.config.pooler, name, columns, widths).await
    }

    /// How loads ask the pool.
    pub(crate) fn access(&self, options: &TableOptions) -> Access {
        let config = &self.handle.shared.config;
        let judge = Arc::clone(&self.handle.shared);
        Access {
            pool: self.postgres.pool.clone(),
            pooler: config.pooler,
            timeout: options.load_timeout.unwrap_or(config.load_timeout),
            standby: Arc::clone(&self.postgres.standby),
            // Without a line nobody knows which server is the right one.
            ours: Box::new(move |incarnation| judge.look(|it| !it.has_line() || it.incarnation() == incarnation)),
        }
    }

    /// The cache of this name, and what keeps it going, made if there is none yet for these types.
    pub(crate) fn cache<K: Key, V: Send + Sync + 'static>(
        &self,
        name: &str,
        on: Vec<On>,
        hashed: Option<Hashed<K>>,
        options: &TableOptions,
        source: impl FnOnce(Keeps) -> Arc<dyn Source<K, V>>,
    ) -> Result<Table<K, V>> {
        options.check()?;
        let shared = &self.handle.shared;
        let heard = |on: On| {
            let trust = keeper::heard(&shared.config, &on.table, on.trust);
            let trust = trust
                .map_err(|problem| Error::new(Kind::NotTracked, format!("{} cannot be cached: {problem}", on.table)))?;
            Ok(On { trust, ..on })
        };
        let on: Vec<On> = on.into_iter().map(heard).collect::<Result<_>>()?;
        let weigh = options.weigh()?;
        let expiry = options.expiry()?;
        let (reload, due) = Reload::new(options.refresh_ahead, options.on_change == OnChange::Refresh).unzip();
        let mut is_new = false;
        let wanted: Vec<_> = on.iter().map(|on| (on.table.clone(), on.by.clone())).collect();
        let store = self.handle.open::<K, V, _>(name, || {
            is_new = true;
            let config = &shared.config;
            let limits = Limits { runners_max: config.loads_max, batch_max: config.load_keys_max };
            let store = Store::<K, V>::new(options.bounds(), limits, hashed);
            let store = store.audited(options.audit > 0).weighed(weigh).not_found_max(options.not_found_max);
            let store = Arc::new(store.expiring(expiry).reloading(reload).breaking(options.breaker));
            shared.tables.add_on(name, on, &(Arc::clone(&store) as Arc<dyn Member>));
            // It may be the first one for which the log is polled between fences.
            shared.wake.notify_one();
            store
        });
        if !is_new && shared.tables.dependencies(&(Arc::clone(&store) as Arc<dyn Member>)) != wanted {
            let message = format!("{name} was opened before, with other tables or columns: use another name");
            return Err(Error::new(Kind::Config, message));
        }
        // Of the store, whatever the options of this call: whoever loads, its entries must have what it asks them for.
        let keeps = Keeps { digests: store.is_audited, lengths: store.weighs_received() };
        let table = Table::new(Arc::clone(&self.handle), store, source(keeps), name, options.fallback);
        let table = table.writing(self.postgres.writes.clone());
        if is_new && options.refill > 0 {
            let store = Arc::downgrade(&table.store);
            let refill = refill::after_gaps(store, Arc::clone(&table.source), Arc::clone(shared), options.refill);
            tokio::spawn(refill);
        }
        if let Some(due) = due.filter(|_| is_new) {
            let (store, source) = (Arc::downgrade(&table.store), Arc::clone(&table.source));
            tokio::spawn(refresh::run(due, store, source, Arc::clone(shared)));
        }
        if is_new && options.audit > 0 {
            let (source, shared) = (Arc::clone(&table.source), Arc::clone(shared));
            let auditor = Auditor { source, shared, name: name.into(), alarms: Throttle::default() };
            tokio::spawn(audit::watch(Arc::downgrade(&table.store), auditor, options.audit));
        }
        Ok(table)
    }
}
