//! Loads entries that a loader of the user's makes, of whatever it reads.
//!
//! The loader runs in a transaction of its own that can only read, and whose statements all see the database at one moment: an
//! entry is never made of rows that were not there at the same time. The transaction begins after the load has, so that whatever
//! changes after its snapshot was taken is told by a message that voids the load.

use std::{
    collections::{BTreeSet, HashMap},
    future::{Future, poll_fn},
    marker::PhantomData,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use sqlx::{AssertSqlSafe, Connection, PgConnection, Row};
use tokio::time::Instant;

use super::rows::{incarnation, panic_message};
use crate::{
    coherence::Incarnation,
    error::{Error, Kind, Result},
    key::{self, Key, KeyType},
    postgres::{
        access::{Access, Attempt, Failed},
        database_error, has_code, is_connection_error, keys,
        line::stamp_view,
    },
    source::{Digesting, Listing, Loaded, Loading, Received, Source, Stamp},
    tags::Tagged,
};

/// What a loader returns: an entry for each key that has one.
pub type Building<'a, K, V> = Pin<Box<dyn Future<Output = Result<HashMap<K, V>, BoxError>> + Send + 'a>>;

/// Whatever went wrong in a loader.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Loads what `load` makes.
pub(crate) struct Built<K, V, F> {
    access: Access,
    name: String,
    load: Arc<F>,
    key_types: Vec<KeyType>,
    /// The tables whose rows entries may be tagged with.
    tagged: BTreeSet<String>,
    types: PhantomData<fn() -> (K, V)>,
}

/// All statements see one snapshot, which the first one after these takes. Should somebody have begun a transaction on this connection
/// before us, what it shows may be older than what is known here; then Postgres refuses to change the isolation, once there is a snapshot. One
/// of these two changes it, whatever it was.
const BEGIN: &str = "begin isolation level read committed read only; set transaction isolation level repeatable read";

/// What Postgres says then.
const ACTIVE_TRANSACTION: &str = "25001";

impl<K, V, F> Built<K, V, F>
where
    K: Key,
    V: Send + 'static,
    F: for<'a> Fn(&'a [K], &'a mut PgConnection) -> Building<'a, K, Tagged<V>> + Send + Sync,
{
    pub(crate) fn new(access: Access, name: &str, load: Arc<F>, tagged: BTreeSet<String>) -> Self {
        Self { access, name: name.to_owned(), load, key_types: K::types(), tagged, types: PhantomData }
    }

    async fn load_together(&self, keys: &[K], deadline: Instant) -> Result<Loaded<V>> {
        let (stamp, mut made) = self.access.attempt(&Once { of: self, keys }, deadline).await?;
        let mut loaded = Loaded { stamp, ..Loaded::none() };
        for key in keys {
            let Tagged { value, tags } = match made.remove(key) {
                Some(Tagged { value, tags }) => Tagged { value: Some(value), tags },
                None => Tagged::new(None),
            };
            if let Some(tag) = tags.iter().find(|tag| tag.table().is_some_and(|table| !self.tagged.contains(table))) {
                let message = format!(
                    "{} is tagged with a row of a table that the view does not name: {tag}; name it with `on_tagged`",
                    self.of(std::slice::from_ref(key))
                );
                return Err(Error::new(Kind::Loader, message));
            }
            loaded.rows.push(Ok(value));
            loaded.received.push(Received { tags, ..Received::default() });
        }
        Ok(loaded)
    }

    fn of(&self, keys: &[K]) -> String {
        match keys {
            [key] => format!("{} {}", self.name, key::display(&key.to_parts())),
            keys => format!("{} entries of {}", keys.len(), self.name),
        }
    }

    async fn stamp(&self, transaction: &mut PgConnection) -> sqlx::Result<Stamp> {
        let view = stamp_view(self.access.standby.load(Ordering::Relaxed));
        let ask = format!("select canary as \"rowcache.canary\", started as \"rowcache.started\", lsn from {view}");
        let row = sqlx::query(AssertSqlSafe(ask)).persistent(!self.access.pooler).fetch_one(transaction).await?;
        let lsn = row.try_get::<i64, _>("lsn")?.cast_unsigned();
        // The view would call each transaction of this isolation dirty. This one can have written nothing, and has a snapshot of its own.
        Ok(Stamp { incarnation: incarnation(&row), dirty: false, lsn, saw: None })
    }

    /// What the loader makes, whatever becomes of it.
    async fn make(&self, keys: &[K], transaction: &mut PgConnection) -> Result<HashMap<K, Tagged<V>>, Failed> {
        let failed =
            |why: &str| Failed::Otherwise(Error::new(Kind::Loader, format!("the loader of {} {why}", self.name)));
        let panicked = |panic: &(dyn std::any::Any + Send)| failed(&format!("panicked: {}", panic_message(panic)));
        // It may panic before it returns a future as well.
        let mut making = Box::pin(async { (self.load)(keys, transaction).await });
        let made = poll_fn(|context| match catch_unwind(AssertUnwindSafe(|| making.as_mut().poll(context))) {
            Ok(poll) => poll.map(Ok),
            Err(panic) => std::task::Poll::Ready(Err(panic)),
        });
        match made.await {
            Ok(Ok(made)) => Ok(made),
            Ok(Err(error)) => Err(match error.downcast::<sqlx::Error>() {
                Ok(error) if is_connection_error(&error) => Failed::Postgres(*error),
                Ok(error) => Failed::Otherwise(self.refused(keys, *error)),
                Err(error) => Failed::Otherwise(Error::with(
                    Kind::Loader,
                    format!("the loader of {} failed for {}", self.name, self.of(keys)),
                    error,
                )),
            }),
            Err(panic) => Err(panicked(&*panic)),
        }
    }

    fn not_begun(&self, keys: &[K], error: sqlx::Error) -> Failed {
        if !has_code(&error, ACTIVE_TRANSACTION) {
            return Failed::Postgres(error);
        }
        let what = "a hook of the pool has left a transaction open, which may not see what this node has seen";
        Failed::Unusable(Error::with(Kind::Refused, format!("loading {} failed: {what}", self.of(keys)), error))
    }

    fn refused(&self, keys: &[K], error: sqlx::Error) -> Error {
        use sqlx::Error::{ColumnDecode, ColumnIndexOutOfBounds, ColumnNotFound, Decode, TypeNotFound};
        match error {
            ColumnDecode { .. }
            | ColumnIndexOutOfBounds { .. }
            | ColumnNotFound(_)
            | Decode(_)
            | TypeNotFound { .. } => {
                Error::with(Kind::Decode, format!("a row could not be decoded while loading {}", self.of(keys)), error)
            }
            error => database_error(&format!("loading {}", self.of(keys)), error),
        }
    }
}

/// One transaction.
struct Once<'a, K, V, F> {
    of: &'a Built<K, V, F>,
    keys: &'a [K],
}

impl<K, V, F> Attempt for Once<'_, K, V, F>
where
    K: Key,
    V: Send + 'static,
    F: for<'a> Fn(&'a [K], &'a mut PgConnection) -> Building<'a, K, Tagged<V>> + Send + Sync,
{
    type Answer = (Stamp, HashMap<K, Tagged<V>>);

    async fn run(&self, connection: &mut PgConnection) -> Result<Self::Answer, Failed> {
        let mut transaction =
            connection.begin_with(BEGIN).await.map_err(|error| self.of.not_begun(self.keys, error))?;
        let stamp = self.of.stamp(&mut transaction).await?;
        let made = self.of.make(self.keys, &mut transaction).await;
        // There is nothing to commit. Should it fail, the connection is closed.
        transaction.rollback().await?;
        Ok((stamp, made?))
    }

    fn of(&self) -> String {
        self.of.of(self.keys)
    }

    fn answered_by((stamp, _): &Self::Answer) -> Option<Incarnation> {
        stamp.incarnation
    }
}

impl<K, V, F> Source<K, V> for Built<K, V, F>
where
    K: Key,
    V: Send + 'static,
    F: for<'a> Fn(&'a [K], &'a mut PgConnection) -> Building<'a, K, Tagged<V>> + Send + Sync,
{
    fn load<'a>(&'a self, keys: &'a [K]) -> Loading<'a, V> {
        Box::pin(async move {
            let deadline = self.access.deadline();
            match self.load_together(keys, deadline).await {
                // One key that fails must not harm those that happen to be loaded with it.
                Err(error) if keys.len() > 1 && (error.is_refused() || error.is_decode() || error.is_loader()) => {
                    let mut all = Loaded::none();
                    for key in keys {
                        all.push(self.load_together(std::slice::from_ref(key), deadline).await);
                    }
                    Ok(all)
                }
                outcome => outcome,
            }
        })
    }

    fn load_at_once<'a>(&'a self, keys: &'a [K]) -> Loading<'a, V> {
        Box::pin(self.load_together(keys, self.access.deadline()))
    }

    fn keys<'a>(&'a self, query: &'a str, max: usize, limit: Duration) -> Listing<'a, K> {
        Box::pin(keys::read(&self.access, &self.name, &self.key_types, query, max, limit))
    }

    fn digests<'a>(&'a self, _keys: &'a [K]) -> Digesting<'a> {
        unreachable!("a view is not audited: there is no row to compare")
    }
}
