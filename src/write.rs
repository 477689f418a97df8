//! Writing through the cache: rows that callers have read, or change.
//!
//! ```text
//! ticket ── the caller reads the row ──→ put       kept, unless anything happened to the key meanwhile
//! update ── begin ─ the caller writes ─ commit ──→ forgotten here, and read again a moment later, once its message has come
//! modify ── begin ─ lock the key ─ read the row ─ the caller writes ─ commit ──→ as update
//! ```

use std::{future::Future, pin::Pin, sync::Arc};

use sqlx::PgPool;

use crate::{
    digest::Tenths,
    error::{Error, Kind, Result},
    key::Key,
    refresh,
    source::Stamp,
    store::{Drawn, Origin},
    table::Table,
    token::Token,
    transaction::Transaction,
};

/// The right to put a row that you have read yourself into the cache: made by [`Table::ticket`], before the row is read.
#[must_use = "a row is put in with `put`"]
pub struct Ticket<K: Key, V: Send + Sync + 'static> {
    table: Table<K, V>,
    key: K,
    drawn: Option<Drawn>,
    at: Tenths,
}

/// What a caller does in a transaction.
pub type Work<'t, T, E> = Pin<Box<dyn Future<Output = Result<T, E>> + Send + 't>>;

impl<K: Key, V: Send + Sync + 'static> Table<K, V> {
    /// A ticket for this key, for a row that you are about to read by a query of your own:
    ///
    /// ```no_run
    /// # async fn example(pool: sqlx::PgPool, users: rowcache::Table<i64, (i64, String)>) -> Result<(), sqlx::Error> {
    /// let ticket = users.ticket(&42);
    /// let user: Option<(i64, String)> =
    ///     sqlx::query_as("select id, name from users where id = 42").fetch_optional(&pool).await?;
    /// ticket.put(user);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// The query must be sent after this call, to the primary that the node listens to, outside of a transaction that has begun before;
    /// and the row must be all that [`get`](Self::get) would return.
    pub fn ticket(&self, key: &K) -> Ticket<K, V> {
        let at = Tenths::at(self.shared().host.now());
        Ticket { table: self.clone(), key: key.clone(), drawn: Some(self.store.draw(key)), at }
    }

    /// Changes a row: does `work` in a transaction, commits it, and forgets the row, on this node before it returns. A moment later the
    /// row is read again, so that the next [`get`](Self::get) probably need not. Returns what `work` returned, and the token of
    /// the transaction, for other nodes ([`Freshness::AtLeast`](crate::Freshness::AtLeast)).
    ///
    /// ```no_run
    /// # async fn example(users: rowcache::Table<i64, (i64, String)>) -> anyhow::Result<()> {
    /// let (changed, token) = users
    ///     .update(&42, |transaction| {
    ///         Box::pin(async move {
    ///             let update = sqlx::query("update users set name = 'Ada' where id = 42");
    ///             anyhow::Ok(update.execute(&mut **transaction).await?.rows_affected())
    ///         })
    ///     })
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// What `work` needs it takes along: clones, not references.
    ///
    /// # Errors
    ///
    /// What `work` returns: it is rolled back then; and those of [`Node::begin`](crate::Node::begin) and
    /// [`Transaction::commit`].
    ///
    /// # Cancel safety
    ///
    /// Cancelling rolls back; during the commit it leaves open whether it takes effect, and the row is forgotten all the same.
    pub async fn update<T, E: From<Error>>(
        &self,
        key: &K,
        work: impl for<'t> FnOnce(&'t mut Transaction) -> Work<'t, T, E>,
    ) -> Result<(T, Token), E> {
        let mut transaction = self.begin().await?;
        let done = work(&mut transaction).await?;
        Ok((done, self.commit(key, transaction).await?))
    }

    /// Changes a row by what it was: as [`update`](Self::update), and `work` is given the row as it is in the database, which nobody else
    /// changes before the transaction ends. Calls for the same key, on any node, come one after the other, also where there is no row.
    ///
    /// ```no_run
    /// # async fn example(carts: rowcache::Table<i64, (i64, i32)>) -> anyhow::Result<()> {
    /// carts
    ///     .modify(&42, |cart, transaction| {
    ///         Box::pin(async move {
    ///             let items = cart.map_or(0, |(_, items)| items);
    ///             let upsert = "insert into carts values (42, $1) on conflict (id) do update set items = $1";
    ///             sqlx::query(upsert).bind(items + 1).execute(&mut **transaction).await?;
    ///             anyhow::Ok(())
    ///         })
    ///     })
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`update`](Self::update), and of reading the row. [`is_config`](Error::is_config): this is no table of rows by
    /// their key.
    ///
    /// # Cancel safety
    ///
    /// As of [`update`](Self::update).
    pub async fn modify<T, E: From<Error>>(
        &self,
        key: &K,
        work: impl for<'t> FnOnce(Option<V>, &'t mut Transaction) -> Work<'t, T, E>,
    ) -> Result<(T, Token), E> {
        let mut transaction = self.begin().await?;
        let row = self.source.lock(key, &mut transaction).await?;
        let done = work(row, &mut transaction).await?;
        Ok((done, self.commit(key, transaction).await?))
    }

    pub(crate) async fn begin(&self) -> Result<Transaction> {
        self.opened().await?;
        let none = || Error::new(Kind::Config, format!("{} has no pool to write by", self.name()));
        Transaction::begin(self.handle(), self.writes.as_ref().ok_or_else(none)?).await
    }

    pub(crate) async fn commit(&self, key: &K, mut transaction: Transaction) -> Result<Token> {
        transaction.invalidates(self, key);
        let token = transaction.commit().await?;
        // Not the handle: a node lives no longer for this.
        let (store, source) = (Arc::downgrade(&self.store), Arc::clone(&self.source));
        let again = refresh::soon(key.clone(), store, source, Arc::clone(self.shared()));
        self.shared().host.spawn(Box::pin(again));
        Ok(token)
    }
}

impl<K: Key, V: Send + Sync + 'static> Table<K, V> {
    pub(crate) fn writing(mut self, writes: PgPool) -> Self {
        self.writes = Some(writes);
        self
    }
}

impl<K: Key, V: Send + Sync + 'static> Ticket<K, V> {
    /// Keeps the row, or that there is none, if nothing has happened to its key since the ticket was made: no change was applied, no load of it has
    /// ended or is under way, no later ticket was made, and the node was coherent all the time. Returns whether it was kept; if not, nothing is lost but
    /// that. Never for a table that is audited, or bounded by [`bytes`](crate::TableOptions::bytes) without a weigher.
    pub fn put(mut self, row: impl Into<Option<V>>) -> bool {
        let Some(drawn) = self.drawn.take() else { return false };
        // At which position of the log it was read is not known: no snapshot can be made with it.
        let stamp = Stamp { lsn: u64::MAX, ..Stamp::default() };
        let origin = Origin { stamp, at: self.at, ..Origin::default() };
        self.table.store.put(&self.key, drawn, row.into(), origin)
    }
}

impl<K: Key, V: Send + Sync + 'static> Drop for Ticket<K, V> {
    fn drop(&mut self) {
        if let Some(drawn) = self.drawn {
            self.table.store.give_ticket_back(&self.key, drawn);
        }
    }
}

impl<K: Key, V: Send + Sync + 'static> std::fmt::Debug for Ticket<K, V> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ticket").field("table", &self.table.name()).finish_non_exhaustive()
    }
}
