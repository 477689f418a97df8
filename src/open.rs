//! How a node opens a cache: what it depends on is looked up, then its store is attached to the tables, and whatever keeps it going starts.
//!
//! A node that was [launched](Node::launch) may have no database yet. Its caches are opened late: the handle is there at once, its gate
//! is closed, and a task looks up what there is to know until that succeeds. Reads that need Postgres wait for the first
//! attempt, so that no load is asked for before the store is attached: neither a change of its tables (I1) nor the hashes of its keys
//! can be missed.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, OnceLock},
    time::Duration,
};

use sqlx::PgConnection;
use tokio::{
    sync::{mpsc::UnboundedReceiver, watch},
    time::{sleep, timeout},
};

use crate::{
    audit::{self, Auditor},
    depends::By,
    digest::Tenths,
    error::{Error, Kind, Result, with_causes},
    hashed::Hashed,
    keeper,
    key::Key,
    node::Node,
    options::{OnChange, TableOptions, Tiering},
    postgres::{
        access::Access,
        catalog::{self, Depends, TrackedTable, Widths},
        rows::{Keeps, Rows},
        server::Postgres,
    },
    refill, refresh,
    shared::Shared,
    source::{Digesting, Listing, Loading, Locking, Source},
    store::{Due, Limits, Reload, Store},
    sync::{Mutex, lock},
    table::{FromRow, Table},
    tables::{Member, On},
    throttle::{Complaint, Throttle},
    tier::Tiered,
};

/// What is needed to look things up. It keeps no node alive.
#[derive(Clone)]
pub(crate) struct Opener {
    shared: Arc<Shared>,
    postgres: Arc<Postgres>,
}

/// What was found out about a cache that is to be opened.
pub(crate) struct Found<K, V> {
    pub(crate) name: String,
    pub(crate) on: Vec<On>,
    pub(crate) hashed: Option<Hashed<K>>,
    /// Its loader says what entries depend on beside their keys.
    pub(crate) is_tagged: bool,
    pub(crate) source: MakeSource<K, V>,
}

pub(crate) type MakeSource<K, V> = Box<dyn FnOnce(Keeps) -> Arc<dyn Source<K, V>> + Send>;

/// A look that is under way.
pub(crate) type Finding<K, V> = Pin<Box<dyn Future<Output = Result<Found<K, V>>> + Send>>;

impl Opener {
    /// A table, by its own key.
    pub(crate) async fn tracked<K: Key>(&self, name: &str) -> Result<TrackedTable> {
        catalog::open::<K>(&self.postgres.pool, self.shared.config.pooler, name).await
    }

    /// The rows of a table by its own key, or of what is read in its place.
    pub(crate) async fn rows<K: Key, V: FromRow>(
        self,
        name: &str,
        from: Option<String>,
        options: TableOptions,
    ) -> Result<Found<K, V>> {
        let tracked = self.tracked::<K>(name).await?;
        let on = On { table: tracked.name.clone(), trust: tracked.trust.clone(), by: By::Key };
        let (name, hashed) = (tracked.name.clone(), tracked.secret.clone().map(Hashed::new));
        let source: MakeSource<K, V> = Box::new(move |keeps| {
            let from = from.as_deref().unwrap_or(&tracked.name);
            Arc::new(Rows::<K, V>::new(self.access(&options), &tracked, from, &[], keeps))
        });
        Ok(Found { name, on: vec![on], hashed, is_tagged: false, source })
    }

    /// A table as one whose key is these columns, how its cache depends on it, and its real key.
    pub(crate) async fn by_columns<K: Key>(
        &self,
        name: &str,
        key_columns: Vec<String>,
    ) -> Result<(TrackedTable, On, Vec<String>)> {
        let Depends { on, types: key_types, key } = self.depend::<K>(name, Some(&key_columns), Widths::Exact).await?;
        let (name, trust) = (on.table.clone(), on.trust.clone());
        Ok((TrackedTable { name, key_columns, key_types, is_keyed: false, trust, secret: None }, on, key))
    }

    /// How a cache under `K` depends on a table.
    pub(crate) async fn depend<K: Key>(
        &self,
        name: &str,
        columns: Option<&[String]>,
        widths: Widths,
    ) -> Result<Depends> {
        catalog::depend::<K>(&self.postgres.pool, self.shared.config.pooler, name, columns, widths).await
    }

    /// How loads ask the pool.
    pub(crate) fn access(&self, options: &TableOptions) -> Access {
        let config = &self.shared.config;
        let judge = Arc::clone(&self.shared);
        Access {
            pool: self.postgres.pool.clone(),
            kept: Arc::clone(&self.postgres.kept),
            pooler: config.pooler,
            timeout: options.load_timeout.unwrap_or(config.load_timeout),
            standby: Arc::clone(&self.postgres.standby),
            // Without a line nobody knows which server is the right one.
            ours: Box::new(move |incarnation| judge.look(|it| !it.has_line() || it.incarnation() == incarnation)),
        }
    }

    /// Makes a cache hear of the changes of what it depends on, if it does not yet. Returns how it loads.
    fn attach<K: Key, V: Send + Sync + 'static>(
        &self,
        cache: &Cache<K, V>,
        found: Found<K, V>,
    ) -> Result<Arc<dyn Source<K, V>>> {
        let Found { name, on, hashed, is_tagged, source } = found;
        let Self { shared, .. } = self;
        let heard = |on: On| {
            let trust = keeper::heard(&shared.config, &on.table, on.trust);
            let trust = trust
                .map_err(|problem| Error::new(Kind::NotTracked, format!("{} cannot be cached: {problem}", on.table)))?;
            Ok(On { trust, ..on })
        };
        let on: Vec<On> = on.into_iter().map(heard).collect::<Result<_>>()?;
        let store = &cache.store;
        // Of the store, whatever the options of this call: whoever loads, its entries must have what it asks them for.
        let snapshots = store.admission().is_some();
        let source = source(Keeps { digests: store.is_audited, lengths: store.weighs_received(), snapshots });
        let source = match &cache.tier {
            Some(_) if hashed.is_some() => {
                let message = format!(
                    "the keys of {name} are secrets, which are hashed in messages, and a tier would show them: leave it out"
                );
                return Err(Error::new(Kind::Config, message));
            }
            Some((tier, form)) => Arc::new(Tiered {
                tier: tier.clone(),
                form: Arc::clone(form),
                behind: source,
                store: Arc::clone(store),
                shared: Arc::clone(shared),
                name: name.as_str().into(),
                complaints: Mutex::default(),
            }),
            None => source,
        };
        let member = Arc::clone(store) as Arc<dyn Member>;
        let mut unattached = lock(&cache.unattached);
        let Some(tasks) = unattached.take() else {
            let wanted: Vec<_> = on.into_iter().map(|on| (on.table, on.by)).collect();
            if shared.tables.dependencies(&member) != wanted {
                let message = format!("{name} was opened before, with other tables or columns: use another name");
                return Err(Error::new(Kind::Config, message));
            }
            return Ok(source);
        };
        store.hash_with(hashed);
        if is_tagged {
            store.tag();
        }
        // What happens before the clock ticks for the first time happens now, too.
        member.tick(Tenths::at(shared.host.now()));
        shared.tables.add_on(&name, on, &member);
        drop(unattached);
        // It may be the first one for which the log is polled between fences.
        shared.wake.notify_one();
        tasks.start(&name, store, &source, shared);
        Ok(source)
    }
}

/// A cache of a node, which all handles of its name and types share.
pub(crate) struct Cache<K: Key, V: Send + Sync + 'static> {
    store: Arc<Store<K, V>>,
    /// Of whoever opened it first.
    tier: Option<Tiering<V>>,
    /// Protects it from being attached twice.
    unattached: Mutex<Option<Tasks<K>>>,
}

impl<K: Key, V: Send + Sync + 'static> Cache<K, V> {
    /// The one of this name, made if there is none yet, for these types.
    fn of(node: &Node, name: &str, options: &TableOptions, limits: Limits) -> Result<Arc<Self>> {
        let (weigh, expiry, tier) = (options.weigh()?, options.expiry()?, options.tiering::<V>()?);
        let is_tiered = tier.is_some();
        let events_max = node.handle.shared.config.events_max;
        let make = || {
            let seed = node.handle.shared.host.random();
            let (reload, due) = Reload::new(options.early(), options.on_change == OnChange::Refresh, seed).unzip();
            let store = Store::<K, V>::new(options.bounds(), limits, None);
            let store = store.audited(options.audit > 0).weighed(weigh).not_found_max(options.not_found_max);
            let store = store.expiring(expiry).reloading(reload).refilling(options.refill).breaking(options.breaker);
            let store = store.journaling(options.history, events_max).admitting(is_tiered);
            let tasks = Tasks { due, refill: options.refill, audit: options.audit };
            Arc::new(Self { store: Arc::new(store), tier, unattached: Mutex::new(Some(tasks)) })
        };
        let cache = node.handle.open::<K, V, _>(name, make);
        if is_tiered && cache.tier.is_none() {
            let message = format!("{name} was opened before, without a `tier`: open it with one each time");
            return Err(Error::new(Kind::Config, message));
        }
        Ok(cache)
    }
}

/// Each call is by itself.
const CALLS: Limits = Limits { runners_max: 64, batch_max: 1 };

/// What keeps a cache going.
struct Tasks<K> {
    due: Option<UnboundedReceiver<Due<K>>>,
    refill: usize,
    audit: u32,
}

impl<K: Key> Tasks<K> {
    fn start<V: Send + Sync + 'static>(
        self,
        name: &str,
        store: &Arc<Store<K, V>>,
        source: &Arc<dyn Source<K, V>>,
        shared: &Arc<Shared>,
    ) {
        let weak = || Arc::downgrade(store);
        if self.refill > 0 {
            tokio::spawn(refill::after_gaps(weak(), Arc::clone(source), Arc::clone(shared), self.refill));
        }
        if let Some(due) = self.due {
            tokio::spawn(refresh::run(due, weak(), Arc::clone(source), Arc::clone(shared)));
        }
        if self.audit > 0 {
            let (source, shared) = (Arc::clone(source), Arc::clone(shared));
            let auditor = Auditor { source, shared, name: name.into(), alarms: Throttle::default() };
            tokio::spawn(audit::watch(weak(), auditor, self.audit));
        }
    }
}

impl Node {
    fn opener(&self) -> Opener {
        Opener { shared: Arc::clone(&self.handle.shared), postgres: Arc::clone(&self.postgres) }
    }

    /// The cache that `find` finds out about, made if there is none yet of its name, for these types. A node that was launched knows it by the
    /// name that is asked for.
    pub(crate) async fn open<K: Key, V: Send + Sync + 'static>(
        &self,
        name: String,
        options: TableOptions,
        find: impl Fn(Opener) -> Finding<K, V> + Send + Sync + 'static,
    ) -> Result<Table<K, V>> {
        options.check()?;
        #[cfg(feature = "test-kit")]
        let find = crate::testing::or_in_memory(&self.handle.shared, &name, &options, find);
        let opener = self.opener();
        if self.is_launched {
            let cache = self.cache(&name, &options)?;
            let late = Arc::new(Late(OnceLock::new()));
            let (say, state) = watch::channel(State::Opening);
            let opening =
                Opening { opener, cache: Arc::clone(&cache), late: Arc::clone(&late), say, name: name.clone() };
            tokio::spawn(opening.open(find));
            return Ok(self.handle_of(&cache, late, &name, &options).pending(Pending(state)));
        }
        let found = find(opener.clone()).await?;
        let name = found.name.clone();
        let cache = self.cache(&name, &options)?;
        let source = opener.attach(&cache, found)?;
        Ok(self.handle_of(&cache, source, &name, &options))
    }

    fn cache<K: Key, V: Send + Sync + 'static>(&self, name: &str, options: &TableOptions) -> Result<Arc<Cache<K, V>>> {
        let config = &self.handle.shared.config;
        let limits = Limits { runners_max: config.loads_max, batch_max: config.load_keys_max };
        Cache::of(self, name, options, limits)
    }

    /// A cache that depends on no table, made if there is none yet of its name, for these types.
    pub(crate) fn open_local<K: Key, V: Send + Sync + 'static>(
        &self,
        name: &str,
        options: &TableOptions,
        source: Arc<dyn Source<K, V>>,
    ) -> Result<Table<K, V>> {
        options.check()?;
        options.check_untiered("functions")?;
        let cache = Cache::of(self, name, options, CALLS)?;
        let make: MakeSource<K, V> = Box::new(|_| source);
        let source = self.opener().attach(
            &cache,
            Found { name: name.into(), on: Vec::new(), hashed: None, is_tagged: false, source: make },
        )?;
        Ok(self.handle_of(&cache, source, name, options))
    }

    fn handle_of<K: Key, V: Send + Sync + 'static>(
        &self,
        cache: &Cache<K, V>,
        source: Arc<dyn Source<K, V>>,
        name: &str,
        options: &TableOptions,
    ) -> Table<K, V> {
        let store = Arc::clone(&cache.store);
        let table = Table::new(Arc::clone(&self.handle), store, source, name, options.fallback);
        table.writing(self.postgres.writes.clone())
    }
}

/// How far a cache that is opened late has come.
#[derive(Clone)]
enum State {
    Opening,
    Open,
    /// So far. Somebody tries again.
    Failed(Error),
}

/// What a handle knows of a cache that may not be open yet.
#[derive(Clone)]
pub(crate) struct Pending(watch::Receiver<State>);

impl Pending {
    /// Returns when the first attempt has ended: whether it is open, and if not, why.
    pub(crate) async fn opened(&self) -> Result<()> {
        self.reaches(|state| !matches!(state, State::Opening)).await
    }

    /// Returns when it is open, however long that takes. `false`: the node stopped first.
    pub(crate) async fn whenever_open(&self) -> bool {
        self.reaches(|state| matches!(state, State::Open)).await.is_ok()
    }

    /// Returns when it is open, or will not be unless somebody does something about it.
    pub(crate) async fn until_open(&self) -> Result<()> {
        self.reaches(|state| match state {
            State::Opening => false,
            State::Open => true,
            State::Failed(why) => !(why.is_unavailable() || why.is_timeout()),
        })
        .await
    }

    async fn reaches(&self, is_it: impl FnMut(&State) -> bool) -> Result<()> {
        let mut states = self.0.clone();
        let state = states.wait_for(is_it).await.map(|state| state.clone());
        match state {
            Ok(State::Open) => Ok(()),
            Ok(State::Failed(why)) => Err(why),
            Ok(State::Opening) | Err(_) => Err(Error::new(Kind::Closed, "the node was shut down")),
        }
    }
}

/// Opens a cache late.
struct Opening<K: Key, V: Send + Sync + 'static> {
    opener: Opener,
    cache: Arc<Cache<K, V>>,
    late: Arc<Late<K, V>>,
    name: String,
    say: watch::Sender<State>,
}

impl<K: Key, V: Send + Sync + 'static> Opening<K, V> {
    /// Tries until it succeeds, the node stops, or nobody has a handle any more.
    async fn open(self, find: impl Fn(Opener) -> Finding<K, V> + Send + Sync) {
        let mut stopping = self.opener.shared.stopping();
        tokio::select! {
            biased;
            _ = stopping.wait_for(|stopping| *stopping) => {}
            () = self.say.closed() => {}
            () = self.try_on(find) => {}
        }
    }

    async fn try_on(&self, find: impl Fn(Opener) -> Finding<K, V>) {
        let name = &self.name;
        let mut pauses = keeper::pauses(&self.opener.shared);
        let mut complaint = Complaint::default();
        loop {
            let why = match self.try_once(&find).await {
                Ok(()) => {
                    tracing::info!(cache = name, "open");
                    self.say.send_replace(State::Open);
                    return;
                }
                Err(why) => why,
            };
            let text = with_causes(&why);
            if complaint.is_news(&text, self.opener.shared.host.now()) {
                tracing::warn!(cache = name, error = text, "cannot be opened yet; will try again");
            }
            self.say.send_replace(State::Failed(why));
            sleep(pauses.next().unwrap_or(keeper::PAUSE_MAX)).await;
        }
    }

    async fn try_once(&self, find: impl Fn(Opener) -> Finding<K, V>) -> Result<()> {
        let limit = self.opener.shared.config.load_timeout;
        let late = |_| {
            let name = &self.name;
            let message = match self.opener.shared.status_reason() {
                Some(why) => format!("{name} could not be looked up within {limit:?} (`load_timeout`): {why}"),
                None => format!("looking up {name} took longer than {limit:?} (`load_timeout`)"),
            };
            Err(Error::new(Kind::Timeout, message))
        };
        let found = timeout(limit, find(self.opener.clone())).await.unwrap_or_else(late)?;
        if found.name != self.name {
            let message = format!(
                "{} is {}: a node that was launched knows a table by its whole name, as in public.users",
                self.name, found.name
            );
            return Err(Error::new(Kind::Config, message));
        }
        let source = self.opener.attach(&self.cache, found)?;
        // Nobody else sets it.
        let _ = self.late.0.set(source);
        Ok(())
    }
}

/// The source of a cache that is opened late. Nothing is asked of it before.
struct Late<K, V>(OnceLock<Arc<dyn Source<K, V>>>);

impl<K, V> Late<K, V> {
    fn source(&self) -> &dyn Source<K, V> {
        &**self.0.get().expect("what is not open yet does not load")
    }
}

impl<K: Send + Sync, V> Source<K, V> for Late<K, V> {
    fn load<'a>(&'a self, keys: &'a [K]) -> Loading<'a, V> {
        self.source().load(keys)
    }

    fn load_at_once<'a>(&'a self, keys: &'a [K]) -> Loading<'a, V> {
        self.source().load_at_once(keys)
    }

    fn digests<'a>(&'a self, keys: &'a [K]) -> Digesting<'a> {
        self.source().digests(keys)
    }

    fn keys<'a>(&'a self, query: &'a str, max: usize, limit: Duration) -> Listing<'a, K> {
        self.source().keys(query, max, limit)
    }

    fn lock<'a>(&'a self, key: &'a K, transaction: &'a mut PgConnection) -> Locking<'a, V> {
        self.source().lock(key, transaction)
    }
}
