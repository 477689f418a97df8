//! Memoised functions: values that come from anywhere but Postgres, on this node alone.
//!
//! The store, the loads and the options are those of a table. What is different is who may say that a value is wrong: nobody but the
//! service itself, and the clock. So a memo is served whatever becomes of the line to Postgres, and no message clears it.

use std::{future::Future, marker::PhantomData, sync::Arc, time::Duration};

use futures_util::FutureExt as _;
use tokio::time::timeout;

use crate::{
    error::{Error, Kind, Result},
    explain::Explanation,
    journal::TableEvents,
    key::{self, Key},
    node::Node,
    options::TableOptions,
    postgres::{built::BoxError, rows::panic_message},
    source::{Digesting, Loaded, Loading, Source, Stamp},
    stats::Stats,
    store::Cached,
    table::Table,
};

/// A function whose values are kept: made by [`Node::memo`]. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Memo<K: Key, V: Send + Sync + 'static>(Table<K, V>);

impl Node {
    /// A function whose values are kept on this node: exchange rates, the answer of another service, a template that was compiled. It is called
    /// once for all who ask for the same argument at the same time, and for at most 64 arguments at a time. What it returns is
    /// served until it expires ([`TableOptions::ttl`], an hour unless you say otherwise) or is [invalidated](Memo::invalidate) here; so choose
    /// a `ttl` that you can live with. Errors go to those who wait, and are not kept.
    ///
    /// All options of tables count, but [`audit`](TableOptions::audit); [`bytes`](TableOptions::bytes) needs a
    /// [`weigher`](TableOptions::weigher). [`stale_if_error`](TableOptions::stale_if_error) and
    /// [`refresh_ahead`](TableOptions::refresh_ahead) are worth a look.
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # use rowcache::{Node, TableOptions};
    /// # async fn ask_the_bank(currency: &str) -> std::io::Result<f64> { Ok(1.0) }
    /// # async fn example(node: Node) -> rowcache::Result<()> {
    /// let options = TableOptions::default().ttl(Duration::from_secs(60)).refresh_ahead(0.8);
    /// let rates = node.memo("rates", options, |currency: String| async move { ask_the_bank(&currency).await })?;
    /// let rate = *rates.get(&"EUR".to_owned()).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// A name stands for one cache: a second memo of it, with the same types, shares the values of the first.
    ///
    /// # Errors
    ///
    /// [`is_config`](Error::is_config): an option cannot be used.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    #[expect(clippy::needless_pass_by_value, reason = "as whatever takes options")]
    pub fn memo<K, V, F, R, E>(&self, name: &str, options: TableOptions, function: F) -> Result<Memo<K, V>>
    where
        K: Key,
        V: Send + Sync + 'static,
        F: Fn(K) -> R + Send + Sync + 'static,
        R: Future<Output = Result<V, E>> + Send + 'static,
        E: Into<BoxError>,
    {
        options.check_unaudited()?;
        options.check_weighed()?;
        let name = format!("memo:{name}");
        let limit = options.load_timeout.unwrap_or(self.handle.shared.config.load_timeout);
        let source = Function { name: name.clone(), limit, function, types: PhantomData };
        self.open_local(&name, &options, Arc::new(source)).map(Memo)
    }
}

impl<K: Key, V: Send + Sync + 'static> Memo<K, V> {
    /// The value for this argument: what is kept, or else what the function returns.
    ///
    /// # Errors
    ///
    /// [`is_loader`](Error::is_loader): the function failed, which is the source, or panicked; [`is_timeout`](Error::is_timeout): it took
    /// longer than [`load_timeout`](TableOptions::load_timeout); [`is_unavailable`](Error::is_unavailable): it took too long the last few
    /// times, and is not called ([`breaker`](TableOptions::breaker)); [`is_closed`](Error::is_closed) after a shutdown.
    ///
    /// # Cancel safety
    ///
    /// Cancelling harms nobody: the call goes on, and its value is kept.
    #[inline]
    pub async fn get(&self, argument: &K) -> Result<Cached<V>> {
        self.0.get(argument).await?.ok_or_else(|| self.nothing())
    }

    /// The values for these arguments, in their order.
    ///
    /// # Errors
    ///
    /// As [`get`](Self::get): the first error that any of the calls meets.
    ///
    /// # Cancel safety
    ///
    /// As [`get`](Self::get).
    pub async fn get_many(&self, arguments: &[K]) -> Result<Vec<Cached<V>>> {
        let values = self.0.get_many(arguments).await?;
        values.into_iter().map(|value| value.ok_or_else(|| self.nothing())).collect()
    }

    /// Text with a zero byte is no argument of anything: it is refused before the function is called.
    fn nothing(&self) -> Error {
        Error::new(Kind::Loader, format!("{} is not called with text that has a zero byte", self.0.name()))
    }

    /// What is kept for this argument; never calls. Counts as a get.
    #[inline]
    #[must_use]
    pub fn try_get(&self, argument: &K) -> Option<Cached<V>> {
        self.0.try_get(argument).row()
    }

    /// Forgets the value for this argument, on this node. A call that is under way is repeated for who asks from now on.
    pub fn invalidate(&self, argument: &K) {
        self.0.store.invalidate(argument);
    }

    /// Forgets all values, on this node.
    pub fn clear(&self) {
        let shared = self.0.shared();
        shared.reclaim(shared.tables.clear(Some(self.0.name())));
    }

    /// As [`Table::pin`].
    pub fn pin(&self, argument: &K) -> bool {
        self.0.pin(argument)
    }

    /// As [`Table::unpin`].
    pub fn unpin(&self, argument: &K) -> bool {
        self.0.unpin(argument)
    }

    /// As [`Table::stats`].
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.0.stats()
    }

    /// As [`Table::explain`].
    #[must_use]
    pub fn explain(&self, argument: &K) -> Explanation<K> {
        let mut explanation = self.0.explain(argument);
        explanation.status = None;
        explanation
    }

    /// As [`Table::subscribe`].
    #[must_use]
    pub fn subscribe(&self) -> TableEvents<K> {
        self.0.subscribe()
    }

    /// `memo:` and the name that it was given.
    #[must_use]
    pub fn name(&self) -> &str {
        self.0.name()
    }
}

/// Calls a function.
struct Function<K, V, F> {
    name: String,
    limit: Duration,
    function: F,
    types: PhantomData<fn(K) -> V>,
}

impl<K, V, F> Function<K, V, F> {
    async fn call<R, E>(&self, argument: &K) -> Result<V>
    where
        K: Key,
        F: Fn(K) -> R,
        R: Future<Output = Result<V, E>>,
        E: Into<BoxError>,
    {
        let of = || format!("{} {}", self.name, key::display(&argument.to_parts()));
        // It may panic before it returns a future as well.
        let calling = std::panic::AssertUnwindSafe(async { (self.function)(argument.clone()).await }).catch_unwind();
        match timeout(self.limit, calling).await {
            Ok(Ok(Ok(value))) => Ok(value),
            Ok(Ok(Err(error))) => Err(Error::with(Kind::Loader, format!("{} failed", of()), error)),
            Ok(Err(panic)) => Err(Error::new(Kind::Loader, format!("{} panicked: {}", of(), panic_message(&*panic)))),
            Err(_) => {
                let limit = self.limit;
                Err(Error::new(Kind::Timeout, format!("{} took longer than {limit:?} (`load_timeout`)", of())))
            }
        }
    }
}

impl<K, V, F, R, E> Source<K, V> for Function<K, V, F>
where
    K: Key,
    V: Send + 'static,
    F: Fn(K) -> R + Send + Sync,
    R: Future<Output = Result<V, E>> + Send,
    E: Into<BoxError>,
{
    fn is_local(&self) -> bool {
        true
    }

    fn load<'a>(&'a self, arguments: &'a [K]) -> Loading<'a, V> {
        Box::pin(async move {
            // Of no database, so at no position of a log.
            let stamp = Stamp { lsn: u64::MAX, ..Stamp::default() };
            let mut all = Loaded::none();
            for argument in arguments {
                let value = self.call(argument).await?;
                all.push(Ok(Loaded { rows: vec![Ok(Some(value))], received: Vec::new(), stamp }));
            }
            Ok(all)
        })
    }

    fn load_at_once<'a>(&'a self, arguments: &'a [K]) -> Loading<'a, V> {
        self.load(arguments)
    }

    fn digests<'a>(&'a self, _: &'a [K]) -> Digesting<'a> {
        unreachable!("a memo is not audited: there is no row to compare")
    }
}
