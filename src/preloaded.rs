//! Small tables, held in whole: countries, prices, settings.
//!
//! All rows are one entry of a view that depends on any row of the table. So they are of one moment, and what is promised of entries is promised
//! of them: after a change was applied, nobody gets the rows of before. A task reads them again some 10 ms after a change, so
//! that probably nobody waits.

use std::{
    collections::HashMap,
    fmt,
    hash::Hash,
    ops::Deref,
    sync::{Arc, Weak},
    time::Duration,
};

use sqlx::AssertSqlSafe;
use tokio::time::sleep;

use crate::{
    error::{Error, Kind, Result},
    journal::{TableEvent, TableEvents},
    load,
    node::Node,
    options::TableOptions,
    shared::Shared,
    source::Source,
    stats::Stats,
    status::Status,
    store::{Cached, Store},
    table::{FromRow, Table},
};

/// All rows of a small table, in memory. Cheap to clone. Made by [`Node::preloaded`].
pub struct Preloaded<K, V>
where
    K: Send + Sync + 'static,
    V: Send + Sync + 'static,
{
    table: Table<i16, AllRows<K, V>>,
}

/// All rows of a table, as they were at one moment.
#[derive(Debug)]
pub struct AllRows<K, V> {
    rows: Vec<V>,
    places: HashMap<K, usize>,
}

/// One of the rows: a shared pointer to all of them.
pub struct PreloadedRow<K, V>
where
    K: Send + Sync + 'static,
    V: Send + Sync + 'static,
{
    all: Cached<AllRows<K, V>>,
    place: usize,
}

/// The key of the only entry.
const ALL: i16 = 0;

/// Between a change and the load after it: others may come along.
const PAUSE: Duration = Duration::from_millis(10);

impl Node {
    /// A small table, held in whole, and found by what `key` makes of a row. Any change of it makes the node read all of it again, in the
    /// background: so it is for what has up to some thousands of rows, and hardly ever changes.
    ///
    /// It is read once before this returns (not by a node that was [launched](Self::launch)). `options` are those of one entry, but for
    /// [`capacity`](TableOptions::capacity): the most rows that the table may have.
    ///
    /// ```no_run
    /// use rowcache::{Preloaded, TableOptions};
    ///
    /// #[derive(sqlx::FromRow)]
    /// struct Country {
    ///     code: String,
    ///     name: String,
    /// }
    ///
    /// # async fn example(node: rowcache::Node) -> rowcache::Result<()> {
    /// let countries: Preloaded<String, Country> =
    ///     node.preloaded("public.countries", |country: &Country| country.code.clone(), TableOptions::default()).await?;
    ///
    /// if let Some(country) = countries.get("NO").await? {
    ///     println!("{}", country.name);
    /// }
    /// for country in countries.all().await?.iter() {
    ///     println!("{}", country.name); // all of them, as they were at one moment
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`View::open`](crate::View::open), and those of the first load: [`is_loader`](Error::is_loader) if there are more rows than `capacity`, or if two
    /// have the same key.
    ///
    /// # Cancel safety
    ///
    /// Cancelling leaves nothing behind.
    pub async fn preloaded<K, V>(
        &self,
        table: &str,
        key: impl Fn(&V) -> K + Send + Sync + 'static,
        options: TableOptions,
    ) -> Result<Preloaded<K, V>>
    where
        K: Eq + Hash + fmt::Debug + Send + Sync + 'static,
        V: FromRow,
    {
        let (name, max, persistent) = (table.to_owned(), options.capacity, !self.handle.shared.config.pooler);
        let key = Arc::new(key);
        let view = self.view(&format!("all of {table}")).on_any(table).options(options.capacity(1));
        let table = view
            .open(move |_, db| {
                let (name, key) = (name.clone(), Arc::clone(&key));
                Box::pin(async move {
                    let query = format!("select * from {name} limit {}", max.saturating_add(1));
                    let rows = sqlx::query_as(AssertSqlSafe(query)).persistent(persistent).fetch_all(db).await?;
                    Ok(HashMap::from([(ALL, AllRows::new(&name, rows, &*key, max)?)]))
                })
            })
            .await?;
        let events = table.subscribe();
        let (store, source, shared) =
            (Arc::downgrade(&table.store), Arc::clone(&table.source), Arc::clone(table.shared()));
        tokio::spawn(keep(events, store, source, shared));
        let preloaded = Preloaded { table };
        if !self.is_launched {
            preloaded.all().await?;
        }
        Ok(preloaded)
    }
}

/// Reads all rows again when they have changed, until the node stops or the cache is gone.
async fn keep<V: Send + Sync + 'static>(
    mut events: TableEvents<i16>,
    store: Weak<Store<i16, V>>,
    source: Arc<dyn Source<i16, V>>,
    shared: Arc<Shared>,
) {
    while let Some(event) = events.recv().await {
        let is_gone = match event {
            TableEvent::Loaded { .. }
            | TableEvent::Voided { .. }
            | TableEvent::Uncached { .. }
            | TableEvent::Failed { .. }
            | TableEvent::Put { .. }
            | TableEvent::HitStale { .. }
            | TableEvent::Gap => false,
            // And what was missed.
            _ => true,
        };
        if !is_gone {
            continue;
        }
        sleep(PAUSE).await;
        let Some(store) = store.upgrade() else { return };
        if store.is_coherent() {
            // Should it fail, whoever asks next tries again.
            load::ahead(&store, &source, &shared, &[ALL]).await;
        }
    }
}

impl<K: Eq + Hash + fmt::Debug, V> AllRows<K, V> {
    fn new(table: &str, rows: Vec<V>, key: impl Fn(&V) -> K, max: usize) -> Result<Self> {
        let wrong = |message: String| Err(Error::new(Kind::Loader, message));
        if rows.len() > max {
            return wrong(format!("{table} has more than {max} rows (`capacity`): it is not held in whole"));
        }
        let mut places = HashMap::with_capacity(rows.len());
        for (place, row) in rows.iter().enumerate() {
            let key = key(row);
            if places.contains_key(&key) {
                return wrong(format!("two rows of {table} have the key {key:?}"));
            }
            places.insert(key, place);
        }
        Ok(Self { rows, places })
    }
}

impl<K: Eq + Hash, V> AllRows<K, V> {
    /// The row with this key.
    pub fn get<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: std::borrow::Borrow<Q>,
    {
        self.places.get(key).map(|place| &self.rows[*place])
    }

    /// All rows, in no order.
    pub fn iter(&self) -> std::slice::Iter<'_, V> {
        self.rows.iter()
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
}

impl<'a, K: Eq + Hash, V> IntoIterator for &'a AllRows<K, V> {
    type Item = &'a V;
    type IntoIter = std::slice::Iter<'a, V>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl<K: Eq + Hash + Send + Sync + 'static, V: Send + Sync + 'static> Preloaded<K, V> {
    /// The row with this key; `None`: there is none. From memory, but for the moment after a change.
    ///
    /// # Errors
    ///
    /// As [`Table::get`], if the rows are not held: after a change, and before they were read again.
    ///
    /// # Cancel safety
    ///
    /// As [`Table::get`].
    pub async fn get<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> Result<Option<PreloadedRow<K, V>>>
    where
        K: std::borrow::Borrow<Q>,
    {
        let all = self.all().await?;
        let place = all.places.get(key).copied();
        Ok(place.map(|place| PreloadedRow { all, place }))
    }

    /// All rows, as they were at one moment.
    ///
    /// # Errors
    ///
    /// As [`get`](Self::get).
    ///
    /// # Cancel safety
    ///
    /// As [`get`](Self::get).
    pub async fn all(&self) -> Result<Cached<AllRows<K, V>>> {
        let all = self.table.get(&ALL).await?;
        all.ok_or_else(|| Error::new(Kind::Loader, format!("{} has no entry", self.table.name())))
    }

    /// As [`Table::stats`]: all rows are one entry.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.table.stats()
    }

    /// As [`Table::status`].
    #[must_use]
    pub fn status(&self) -> Status {
        self.table.status()
    }
}

impl<K: Send + Sync + 'static, V: Send + Sync + 'static> Clone for Preloaded<K, V> {
    fn clone(&self) -> Self {
        Self { table: self.table.clone() }
    }
}

impl<K: Send + Sync + 'static, V: Send + Sync + 'static> fmt::Debug for Preloaded<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Preloaded").field(&self.table.name()).finish()
    }
}

impl<K: Send + Sync + 'static, V: Send + Sync + 'static> Deref for PreloadedRow<K, V> {
    type Target = V;

    fn deref(&self) -> &V {
        &self.all.rows[self.place]
    }
}

impl<K: Send + Sync + 'static, V: fmt::Debug + Send + Sync + 'static> fmt::Debug for PreloadedRow<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}
