//! Views: entries that are made of several rows.
//!
//! ```text
//! public.users   id = 7          ──→ ┐
//! public.orders  user_id 7 → 8   ──→ ├ view:accounts   forgets 7 and 8, and voids their loads
//! public.plans   any row         ──→ ┘                 forgets everything
//! ```
//!
//! A view says which columns decide what its entries are made of. Messages have the old and the new values of these columns, so
//! that a change names exactly the entries that it can be part of, as it does for a table by its key. Nothing else is needed: the
//! store, the loads and the gate are those of a table.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use sqlx::PgConnection;

use crate::{
    depends::By,
    error::{Error, Kind, Result},
    key::Key,
    node::Node,
    open::{Found, MakeSource},
    options::TableOptions,
    postgres::{
        built::{Building, Built},
        catalog::Widths,
    },
    table::Table,
    tags::Tagged,
};

/// A view that is about to be opened: made by [`Node::view`].
///
/// # What must be said
///
/// An entry must depend on nothing but rows that have its key in one of the columns named with [`on`](Self::on), and rows of
/// tables named with [`on_any`](Self::on_any). A loader that joins orders to users by `orders.user_id = users.id` is
/// `.on("public.users", ["id"]).on("public.orders", ["user_id"])`. Nobody can check that. What is not named can change without the
/// entry being evicted, for as long as its [`ttl`](TableOptions::ttl) lasts: another table, a column that a table was told to
/// `--ignore`, and what is in no table, such as `now()`, the role or a setting.
///
/// A row that leads to the entry only by way of another table has no column with its key: the lines of an order know the order,
/// not the user. Give them one (`user_id`, kept by a foreign key), make the lines of an order a view of their own, or use `on_any`.
///
/// If a table ceases to send a column, its changes evict everything.
///
/// # The loader
///
/// It is given up to [`load_keys_max`](crate::Config::load_keys_max) keys at a time, and a connection in a transaction that only reads,
/// in which all statements see the database at one moment; it returns a value for each key that has one. It must read by this
/// connection alone. If it fails for several keys, it is asked for each by itself, so that one bad row harms nobody else.
/// With [`Config::pooler`](crate::Config::pooler), its queries must be [`persistent(false)`](sqlx::query::Query::persistent).
///
/// A load costs two round trips more than its own statements. [`Node::table_by`] and [`Node::list_by`] do without.
#[must_use = "a view does nothing until it is opened"]
#[derive(Debug)]
pub struct View<'n> {
    node: &'n Node,
    name: String,
    on: Vec<(String, Which)>,
    options: TableOptions,
}

/// Which entries depend on a row.
#[derive(Clone, Debug)]
enum Which {
    InColumns(Vec<String>),
    Tagged,
    All,
}

impl<'n> View<'n> {
    pub(crate) fn new(node: &'n Node, name: &str) -> Self {
        Self { node, name: name.to_owned(), on: Vec::new(), options: TableOptions::default() }
    }

    /// An entry depends on the rows of this table that have its key in these columns, in the order of the key. They
    /// are columns of the key that the table is tracked by, or sent along: `rowcache track public.orders --columns user_id`. Several tables
    /// can be named, and one table several times: a letter belongs to whom it is from, and to whom it is for.
    ///
    /// Of several columns that are sent along, messages do not say which values belong to the same row. A statement that changes many
    /// rows then evicts entries for all combinations.
    pub fn on(mut self, table: &str, columns: impl IntoIterator<Item: Into<String>>) -> Self {
        self.on.push((table.to_owned(), Which::InColumns(columns.into_iter().map(Into::into).collect())));
        self
    }

    /// All entries depend on each row of this table: any change of it evicts them all. For small tables that hardly ever change.
    pub fn on_any(mut self, table: &str) -> Self {
        self.on.push((table.to_owned(), Which::All));
        self
    }

    /// Entries depend on those rows of this table that the loader tags them with, by their key: for what it only finds out while it loads, as
    /// the plan that a user happens to have. Only with [`open_tagged`](Self::open_tagged). The table is named in whole, as in `public.plans`. If its
    /// keys are sent as hashes, any change evicts all entries.
    pub fn on_tagged(mut self, table: &str) -> Self {
        self.on.push((table.to_owned(), Which::Tagged));
        self
    }

    /// With these options; [`audit`](TableOptions::audit) is not for views, and [`bytes`](TableOptions::bytes) needs a
    /// [`weigher`](TableOptions::weigher).
    pub fn options(mut self, options: TableOptions) -> Self {
        self.options = options;
        self
    }

    /// Opens it. Opening a view of the same name, with the same types, again returns the same cache; loads of each handle go
    /// by its own loader.
    ///
    /// # Errors
    ///
    /// * [`is_config`](Error::is_config): it depends on no table; it was opened with other tables or columns before; or an
    ///   option cannot be used;
    /// * [`is_not_tracked`](Error::is_not_tracked): a table is not tracked, or does not send a column; the message says
    ///   how it would;
    /// * [`is_table`](Error::is_table): there is no such table or column, or `K` does not fit;
    /// * those of a statement, as of [`Table::get`].
    ///
    /// Reads fail as those of a table, and with [`is_loader`](Error::is_loader) where the loader fails.
    ///
    /// # Cancel safety
    ///
    /// Cancelling leaves nothing behind.
    pub async fn open<K, V, F>(self, load: F) -> Result<Table<K, V>>
    where
        K: Key,
        V: Send + Sync + 'static,
        F: for<'a> Fn(&'a [K], &'a mut PgConnection) -> Building<'a, K, V> + Send + Sync + 'static,
    {
        if let Some((table, _)) = self.on.iter().find(|(_, which)| matches!(which, Which::Tagged)) {
            let message =
                format!("view:{} is to be tagged with rows of {table}: open it with `open_tagged`", self.name);
            return Err(Error::new(Kind::Config, message));
        }
        self.open_with(false, untagged(load)).await
    }

    /// As [`open`](Self::open), and the loader says what else each entry depends on: rows of tables named with
    /// [`on_tagged`](Self::on_tagged), and names, for [`Table::invalidate_tag`]. A change of any of it evicts just the entries that have it.
    ///
    /// Only entries have tags: a key for which the loader returns nothing depends on what [`on`](Self::on) and [`on_any`](Self::on_any)
    /// name. A row must be tagged also if it was looked for in vain; and it is its key that counts, so that what was found by
    /// another column may be found elsewhere later: name such tables with `on_any`.
    ///
    /// ```no_run
    /// # use rowcache::{Table, Tag, Tagged};
    /// # async fn example(node: rowcache::Node) -> rowcache::Result<()> {
    /// let prices: Table<i64, i64> = node
    ///     .view("prices")
    ///     .on("public.users", ["id"])
    ///     .on_tagged("public.plans")
    ///     .open_tagged(|users, db| {
    ///         Box::pin(async move {
    ///             let query = "select u.id, p.id, p.price from users u join plans p on p.id = u.plan_id where u.id = any($1)";
    ///             let rows: Vec<(i64, i64, i64)> = sqlx::query_as(query).bind(users).fetch_all(db).await?;
    ///             let price = |(user, plan, price)| (user, Tagged::new(price).tag(Tag::row("public.plans", &plan)));
    ///             Ok(rows.into_iter().map(price).collect())
    ///         })
    ///     })
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As of [`open`](Self::open). Reads fail with [`is_loader`](Error::is_loader) where an entry is tagged with a row of a table that is
    /// not named.
    ///
    /// # Cancel safety
    ///
    /// As of [`open`](Self::open).
    pub async fn open_tagged<K, V, F>(self, load: F) -> Result<Table<K, V>>
    where
        K: Key,
        V: Send + Sync + 'static,
        F: for<'a> Fn(&'a [K], &'a mut PgConnection) -> Building<'a, K, Tagged<V>> + Send + Sync + 'static,
    {
        self.open_with(true, load).await
    }

    async fn open_with<K, V, F>(self, is_tagged: bool, load: F) -> Result<Table<K, V>>
    where
        K: Key,
        V: Send + Sync + 'static,
        F: for<'a> Fn(&'a [K], &'a mut PgConnection) -> Building<'a, K, Tagged<V>> + Send + Sync + 'static,
    {
        self.options.check_unaudited()?;
        self.options.check_untiered("views")?;
        self.options.check_weighed()?;
        let name = format!("view:{}", self.name);
        if self.on.is_empty() {
            let message = format!("{name} depends on no table: name those that it is made of, with `on` and `on_any`");
            return Err(Error::new(Kind::Config, message));
        }
        let Self { node, on: tables, options, .. } = self;
        let (load, keeps_by, asked) = (Arc::new(load), options.clone(), name.clone());
        node.open(name, options, move |opener| {
            let (tables, load, options, name) = (tables.clone(), Arc::clone(&load), keeps_by.clone(), asked.clone());
            Box::pin(async move {
                let mut on = Vec::with_capacity(tables.len());
                let mut tagged = BTreeSet::new();
                for (table, which) in &tables {
                    let columns = if let Which::InColumns(columns) = which { Some(&columns[..]) } else { None };
                    let mut depends = opener.depend::<K>(table, columns, Widths::Any).await?.on;
                    if let Which::Tagged = which {
                        depends.by = By::Tagged;
                        if depends.table != *table {
                            let message = format!("{table} is {}: tags need its whole name", depends.table);
                            return Err(Error::new(Kind::Config, message));
                        }
                        tagged.insert(table.clone());
                    }
                    on.push(depends);
                }
                let source = Built::new(opener.access(&options), &name, load, tagged);
                let source: MakeSource<K, V> = Box::new(move |_| Arc::new(source));
                Ok(Found { name, on, hashed: None, is_tagged, source })
            })
        })
        .await
    }
}

/// The same loader, of values without tags.
fn untagged<K, V, F>(
    load: F,
) -> impl for<'a> Fn(&'a [K], &'a mut PgConnection) -> Building<'a, K, Tagged<V>> + Send + Sync + 'static
where
    K: Key,
    V: Send + Sync + 'static,
    F: for<'a> Fn(&'a [K], &'a mut PgConnection) -> Building<'a, K, V> + Send + Sync + 'static,
{
    move |keys, db| {
        // It may panic before it returns a future, which must be awaited to be noticed.
        let loading = load(keys, db);
        Box::pin(async move {
            let values = loading.await?;
            Ok(values.into_iter().map(|(key, value)| (key, Tagged::new(value))).collect::<HashMap<_, _>>())
        })
    }
}
