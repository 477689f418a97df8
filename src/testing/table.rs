//! A table as somebody else writes to it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use super::{
    World,
    registry::{Read, whole},
    world,
};
use crate::{
    change::{RowKey, Rows},
    depends::{By, Column},
    error::{Error, Kind},
    key::{Key, KeyPart, display},
    sync::{Mutex, lock},
    token::Token,
};

/// A table of a test [`Database`](super::Database), as *somebody* writes to it: another service, a cron job, psql. Made by
/// [`Database::table`](super::Database::table) and [`view`](super::Database::view). Cheap to clone.
///
/// Each write commits at once, and its message is on its way to all nodes when the call returns. It has not arrived: as in production, reads
/// may miss the change until it has, and [`Node::barrier`](crate::Node::barrier) waits for that.
///
/// A stopped database can be written to as well: as by whoever can still reach it.
pub struct TestTable<K: Key, V> {
    world: Arc<World>,
    base: Arc<Base<K, V>>,
}

/// The rows of a table.
struct Base<K, V> {
    name: String,
    /// Code of the user's runs under this lock: `Clone` of rows, and what `by` and `also_as` were given.
    rows: Mutex<Stored<K, V>>,
}

struct Stored<K, V> {
    rows: HashMap<K, Row<V>>,
    versions: u64,
    sends: Vec<Sends<K, V>>,
}

struct Row<V> {
    value: V,
    version: u64,
}

/// Columns that are sent along.
struct Sends<K, V> {
    columns: Vec<String>,
    values: Values<K, V>,
}

/// What a row has in these columns.
type Of<K, V, T> = Arc<dyn Fn(&K, &V) -> Option<T> + Send + Sync>;

/// As it stands in messages.
type Values<K, V> = Of<K, V, Vec<KeyPart<'static>>>;

/// What a message says.
struct Told {
    keys: Vec<RowKey>,
    columns: BTreeMap<String, BTreeSet<KeyPart<'static>>>,
}

impl<K: Key, V> Stored<K, V> {
    fn told(&self) -> Told {
        // Those without a value, too: else it would look as if they were not sent.
        let columns = self.sends.iter().flat_map(|sends| &sends.columns);
        Told { keys: Vec::new(), columns: columns.map(|column| (column.clone(), BTreeSet::new())).collect() }
    }

    fn tell(&self, key: &K, told: &mut Told) {
        let Some(row) = self.rows.get(key) else { return };
        for Sends { columns, values } in &self.sends {
            let values = (values)(key, &row.value).into_iter().flatten();
            for (column, value) in columns.iter().zip(values) {
                told.columns.entry(column.clone()).or_default().insert(value);
            }
        }
    }

    /// Writes a row, or deletes it. Returns what was there before.
    fn set(&mut self, key: &K, value: Option<V>, told: &mut Told) -> Option<Row<V>> {
        told.keys.push(RowKey::new(&key.to_parts()));
        self.tell(key, told);
        self.versions += 1;
        let before = match value {
            Some(value) => self.rows.insert(key.clone(), Row { value, version: self.versions }),
            None => self.rows.remove(key),
        };
        self.tell(key, told);
        before
    }
}

impl<K: Key, V: Clone + Send + Sync + 'static> TestTable<K, V> {
    /// The table of this name, made if there is none.
    pub(super) fn of(world: &Arc<World>, name: &str) -> Self {
        let name = whole(name);
        let known = world.registry.rows::<Base<K, V>>(&name).unwrap_or_else(|others| panic!("{others}"));
        let world = Arc::clone(world);
        if let Some(base) = known {
            return Self { world, base };
        }
        let stored = Stored { rows: HashMap::new(), versions: 0, sends: Vec::new() };
        let base = Arc::new(Base { name: name.clone(), rows: Mutex::new(stored) });
        let table = Self { world, base };
        table.register(V::clone);
        table
    }

    fn register<W: Send + Sync + 'static>(&self, read: impl Fn(&V) -> W + Send + Sync + 'static) {
        let base = Arc::clone(&self.base);
        let read: Read<K, W> =
            Arc::new(move |key| Ok(lock(&base.rows).rows.get(key).map(|row| (read(&row.value), row.version))));
        let name = &self.base.name;
        self.world.registry.add(name, (name, By::Key), read, Arc::clone(&self.base) as _);
    }

    /// Inserts or updates a row.
    pub fn put(&self, key: K, value: V) -> Token {
        self.put_all([(key, value)])
    }

    /// Inserts or updates rows, in one transaction. As in production, a message has only so much space: after a change of some
    /// thousand rows nodes forget the whole table.
    pub fn put_all(&self, rows: impl IntoIterator<Item = (K, V)>) -> Token {
        self.write(rows.into_iter().map(|(key, value)| (key, Some(value))).collect())
    }

    /// Deletes a row.
    pub fn remove(&self, key: &K) -> Token {
        self.write(vec![(key.clone(), None)])
    }

    /// Changes a row, if there is one.
    ///
    /// ```
    /// # let db = rowcache::testing::Database::new();
    /// let carts = db.table::<i64, (i64, i32)>("public.carts");
    /// carts.put(42, (42, 1));
    /// carts.update(&42, |(_, items)| *items += 1);
    /// assert_eq!(carts.get(&42), Some((42, 2)));
    /// ```
    pub fn update(&self, key: &K, change: impl FnOnce(&mut V)) -> Option<Token> {
        let mut value = self.get(key)?;
        change(&mut value);
        Some(self.put(key.clone(), value))
    }

    /// Deletes all rows, and tells so in one message, as TRUNCATE does.
    #[expect(clippy::must_use_candidate, reason = "it is called for what it does")]
    pub fn truncate(&self) -> Token {
        let mut gone = HashMap::new();
        self.world.commit(|xid| {
            gone = std::mem::take(&mut lock(&self.base.rows).rows);
            Some(world::change(&self.base.name, Rows::All, Some(xid)))
        })
    }

    /// Writes a row, or deletes it, and tells nobody: as somebody does who has switched the triggers off. What limits the
    /// damage then is [`ttl`](crate::TableOptions::ttl), and what finds it is [`audit`](crate::TableOptions::audit).
    pub fn put_untold(&self, key: &K, value: impl Into<Option<V>>) {
        let value = value.into();
        let mut before = None;
        self.world.commit(|_| {
            let mut stored = lock(&self.base.rows);
            let mut told = stored.told();
            before = stored.set(key, value, &mut told);
            None
        });
    }

    /// What is in the database now.
    #[must_use]
    pub fn get(&self, key: &K) -> Option<V> {
        lock(&self.base.rows).rows.get(key).map(|row| row.value.clone())
    }

    /// The name of the cache that nodes open.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.base.name
    }

    fn write(&self, rows: Vec<(K, Option<V>)>) -> Token {
        // Dropped when no lock is held.
        let mut before = Vec::with_capacity(rows.len());
        self.world.commit(|xid| {
            let mut stored = lock(&self.base.rows);
            let mut told = stored.told();
            for (key, value) in rows {
                before.push(stored.set(&key, value, &mut told));
            }
            let mut change = world::change(&self.base.name, Rows::Keys(told.keys), Some(xid));
            change.columns =
                told.columns.into_iter().map(|(name, values)| (name, values.into_iter().collect())).collect();
            Some(change)
        })
    }

    /// Lets nodes open the table with another type of values as well, as services do that read it in several ways. `make` must not
    /// use this table.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> rowcache::Result<()> {
    /// # let db = rowcache::testing::Database::new();
    /// let users = db.table::<i64, (i64, String)>("public.users").also_as(|(id, _)| (*id,));
    /// users.put(42, (42, "Ada".into()));
    /// let node = db.node().await;
    /// let ids = node.table::<i64, (i64,)>("public.users").await?;
    /// assert_eq!(*ids.get(&42).await?.unwrap(), (42,));
    /// # Ok(())
    /// # }
    /// ```
    #[must_use = "it is this table"]
    pub fn also_as<W: Send + Sync + 'static>(self, make: impl Fn(&V) -> W + Send + Sync + 'static) -> Self {
        self.register(make);
        self
    }

    /// Lets nodes open the table by other columns than its key, with [`Node::table_by`](crate::Node::table_by) and
    /// [`Node::list_by`](crate::Node::list_by). `values` says what a row has in these columns; `None`: it has NULL in one of
    /// them. It must not use this table.
    ///
    /// As with `rowcache track --columns`, messages have the old and the new values from here on. Lists are in the order of the keys, text
    /// in that of its bytes.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> rowcache::Result<()> {
    /// use rowcache::TableOptions;
    ///
    /// #[derive(Clone, sqlx::FromRow)]
    /// struct Order {
    ///     user_id: i64,
    ///     total: i64,
    /// }
    ///
    /// let db = rowcache::testing::Database::new();
    /// let orders = db.table::<i64, Order>("public.orders").by(["user_id"], |_, order| Some(order.user_id));
    /// orders.put(7, Order { user_id: 42, total: 120 });
    ///
    /// let node = db.node().await;
    /// let by_user = node.list_by::<i64, Order>("public.orders", ["user_id"], TableOptions::default()).await?;
    /// assert_eq!(by_user.get(&42).await?.unwrap()[0].total, 120);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// If there are more or less columns than `B` has parts.
    #[must_use = "it is this table"]
    pub fn by<B: Key>(
        self,
        columns: impl IntoIterator<Item: Into<String>>,
        values: impl Fn(&K, &V) -> Option<B> + Send + Sync + 'static,
    ) -> Self {
        let columns: Vec<String> = columns.into_iter().map(Into::into).collect();
        let parts = B::types().len();
        assert!(columns.len() == parts, "a key of {parts} parts is not in the columns {columns:?}");
        let values: Of<K, V, B> = Arc::new(values);
        let sent = Arc::clone(&values);
        let sent: Values<K, V> = Arc::new(move |key, value| {
            let found = sent(key, value)?;
            Some(found.to_parts().into_iter().map(KeyPart::into_owned).collect())
        });
        lock(&self.base.rows).sends.push(Sends { columns: columns.clone(), values: sent });

        let table = &self.base.name;
        let name = format!("{table}({})", columns.join(","));
        let by = By::Columns(columns.into_iter().map(Column::Sent).collect());
        let (base, matching) = (Arc::clone(&self.base), Arc::clone(&values));
        let one: Read<B, V> = Arc::new(move |key| {
            let mut found = base.matching(|id, value| (matching)(id, value).as_ref() == Some(key));
            match (found.pop(), found.len()) {
                (row, 0) => Ok(row),
                (_, more) => Err(several(&base.name, key, more + 1)),
            }
        });
        self.world.registry.add(&name, (table, by.clone()), one, Arc::clone(&self.base) as _);
        let base = Arc::clone(&self.base);
        let list: Read<B, Vec<V>> = Arc::new(move |key| {
            let found = base.matching(|id, value| (values)(id, value).as_ref() == Some(key));
            let last = found.iter().map(|(_, version)| *version).max();
            Ok(last.map(|version| (found.into_iter().map(|(value, _)| value).collect(), version)))
        });
        self.world.registry.add(&format!("{name}[]"), (table, by), list, Arc::clone(&self.base) as _);
        self
    }
}

fn several<B: Key>(table: &str, key: &B, rows: usize) -> Error {
    let message =
        format!("{rows} rows of {table} have the values {}, and one at most was expected", display(&key.to_parts()));
    Error::new(Kind::Table, message)
}

impl<K: Key, V: Clone> Base<K, V> {
    /// Rows with their versions, in the order of their keys.
    fn matching(&self, is_it: impl Fn(&K, &V) -> bool) -> Vec<(V, u64)> {
        let stored = lock(&self.rows);
        let mut found: Vec<_> = stored.rows.iter().filter(|(key, row)| is_it(key, &row.value)).collect();
        found.sort_by_key(|(key, _)| key.to_parts());
        found.into_iter().map(|(_, row)| (row.value.clone(), row.version)).collect()
    }
}

impl<K: Key, V> Clone for TestTable<K, V> {
    fn clone(&self) -> Self {
        Self { world: Arc::clone(&self.world), base: Arc::clone(&self.base) }
    }
}

impl<K: Key, V> std::fmt::Debug for TestTable<K, V> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TestTable").field("name", &self.base.name).finish_non_exhaustive()
    }
}
