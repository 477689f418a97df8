//! A transaction that knows which rows it changes: when its commit returns, this node has forgotten them, and there is a
//! name for it that other nodes can be asked to wait for.
//!
//! The race it closes, for a service that writes and reads its own write on one node:
//!
//! 1. COMMIT returns; the notification is still under way;
//! 2. the service reads the row, and gets the entry from before its own change.
//!
//! Between 1 and the return of [`Transaction::commit`], the rows named to it are invalidated as if the message had
//! come: entries go, and loads that began before are void. A load that begins later sees the commit.

use std::{
    fmt,
    ops::{Deref, DerefMut},
    sync::Arc,
};

use sqlx::{PgConnection, PgPool};

use crate::{
    change::{Change, RowKey, Rows},
    error::{Error, Kind, Result},
    key::Key,
    postgres::{database_error, is_connection_error},
    shared::Handle,
    table::Table,
    token::Token,
};

/// A transaction of Postgres, made by [`Node::begin`](crate::Node::begin), with which `sqlx` queries run:
///
/// ```no_run
/// # async fn example(node: rowcache::Node, users: rowcache::Table<i64, (i64, String)>) -> rowcache::Result<()> {
/// let mut transaction = node.begin().await?;
/// sqlx::query("update users set name = $2 where id = $1").bind(42_i64).bind("Ada").execute(&mut *transaction).await.unwrap();
/// transaction.invalidates(&users, &42);
/// let token = transaction.commit().await?;
/// // `users.get(&42)` on this node now returns the new name. Other nodes, and this one for rows that were not named:
/// users.get_with(&7, rowcache::Freshness::AtLeast(token)).await?;
/// # Ok(())
/// # }
/// ```
///
/// Its connection is not one that loads use, so what is done on it (a `set`, an isolation level) harms no load. Dropping it
/// rolls it back.
pub struct Transaction {
    inner: sqlx::Transaction<'static, sqlx::Postgres>,
    forgets: Forgets,
}

/// What is to be forgotten on this node.
struct Forgets {
    handle: Arc<Handle>,
    changes: Vec<Change>,
}

impl Forgets {
    fn now(&mut self) {
        for change in self.changes.drain(..) {
            let shared = &self.handle.shared;
            shared.reclaim(shared.tables.apply(&change));
        }
    }
}

/// Forgets, at the latest when it is dropped.
struct ForgetsAnyway(Forgets);

impl Drop for ForgetsAnyway {
    fn drop(&mut self) {
        self.0.now();
    }
}

impl Transaction {
    pub(crate) async fn begin(handle: &Arc<Handle>, writes: &PgPool) -> Result<Self> {
        #[cfg(feature = "test-kit")]
        crate::testing::check_transacts(&handle.shared)?;
        let begun = writes.begin().await;
        let inner = begun.map_err(|error| database_error("beginning a transaction", error))?;
        Ok(Self { inner, forgets: Forgets { handle: Arc::clone(handle), changes: Vec::new() } })
    }

    /// Names a row that this transaction changes: forgotten here when [`commit`](Self::commit) returns. For an UPDATE of the key
    /// itself, name the old and the new one. What triggers and foreign keys change along with it has to be named too, or waited
    /// for: with the token, or with [`Freshness::Fenced`](crate::Freshness::Fenced).
    pub fn invalidates<K: Key, V: Send + Sync + 'static>(&mut self, table: &Table<K, V>, key: &K) {
        let rows = Rows::Keys(vec![RowKey::new(&key.to_parts())]);
        self.forgets.changes.push(Change::requested(table.name(), rows));
    }

    /// Names a table of which this transaction changes many rows: all of it is forgotten here when
    /// [`commit`](Self::commit) returns.
    pub fn clears<K: Key, V: Send + Sync + 'static>(&mut self, table: &Table<K, V>) {
        self.forgets.changes.push(Change::requested(table.name(), Rows::All));
    }

    /// Commits, forgets on this node what was named, and returns the token of the transaction. Other nodes learn of it as of
    /// any commit.
    ///
    /// # Errors
    ///
    /// * [`is_refused`](Error::is_refused): Postgres rolled it back (a deferred constraint, a serialization failure, or a
    ///   statement before had failed); nothing has changed;
    /// * [`is_unavailable`](Error::is_unavailable): the connection ended meanwhile. Whether the transaction took effect is
    ///   not known. What was named is forgotten all the same.
    ///
    /// # Cancel safety
    ///
    /// Cancelling leaves open whether it commits. What was named is forgotten all the same.
    pub async fn commit(self) -> Result<Token> {
        let Self { mut inner, forgets } = self;
        let token = sqlx::query_scalar::<_, Option<String>>("select rowcache.token()");
        // Unnamed, so that it works behind any pooler.
        let token = token.persistent(false).fetch_one(&mut *inner).await;
        let token = token.map_err(|error| database_error("committing a transaction", error))?;
        let lost =
            || Error::new(Kind::Unavailable, "the server crashed or was replaced since it was asked last; rolled back");
        let token: Token = token.ok_or_else(lost)?.parse()?;
        let forgets = ForgetsAnyway(forgets);
        let committed = inner.commit().await;
        drop(forgets);
        match committed {
            Ok(()) => Ok(token),
            Err(error) if is_connection_error(&error) => {
                let what = "the connection ended during COMMIT; whether it took effect is not known";
                Err(Error::with(Kind::Unavailable, what, error))
            }
            Err(error) => Err(database_error("committing a transaction", error)),
        }
    }

    /// Rolls it back. So does dropping it, in the background.
    ///
    /// # Errors
    ///
    /// If the connection ended, which has the same effect.
    ///
    /// # Cancel safety
    ///
    /// It is rolled back in any case.
    pub async fn rollback(self) -> Result<()> {
        self.inner.rollback().await.map_err(|error| database_error("rolling back a transaction", error))
    }
}

impl Deref for Transaction {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        &self.inner
    }
}

impl DerefMut for Transaction {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.inner
    }
}

impl fmt::Debug for Transaction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transaction").field("changes", &self.forgets.changes).finish_non_exhaustive()
    }
}
