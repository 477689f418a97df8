//! Nodes without Postgres, for the tests of your service.
//!
//! A [`Database`] in memory takes the place of Postgres. Its nodes are real [`Node`]s, with the real cache: what is made up is where rows come
//! from, and what carries messages and fences. Your code is given a node, or its tables, and does not notice.
//!
//! ```toml
//! [dev-dependencies]
//! rowcache = { version = "…", features = ["test-kit"] }
//! ```
//!
//! ```
//! use rowcache::{Table, testing::Database};
//!
//! #[derive(Clone, sqlx::FromRow)]
//! struct User {
//!     name: String,
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> rowcache::Result<()> {
//! let db = Database::new();
//! let users = db.table::<i64, User>("public.users");
//! users.put(42, User { name: "Ada".into() });
//!
//! let node = db.node().await; // Several may be had: each is what one process of your service has.
//! let cached: Table<i64, User> = node.table("public.users").await?; // The very call that your service makes.
//! assert_eq!(cached.get(&42).await?.unwrap().name, "Ada");
//!
//! users.put(42, User { name: "Grace".into() }); // A commit of somebody: its message is on its way to all nodes.
//! node.barrier().await?; // In place of a sleep: what was committed before is applied when it returns.
//! assert_eq!(cached.get(&42).await?.unwrap().name, "Grace");
//! # Ok(())
//! # }
//! ```
//!
//! # Races
//!
//! What happens once in a million times can be made to happen. A load is held, after it has read its row and before it answers, until
//! a change has overtaken it:
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> rowcache::Result<()> {
//! # let db = rowcache::testing::Database::new();
//! # let users = db.table::<i64, (String,)>("public.users");
//! # users.put(42, ("Ada".into(),));
//! # let node = db.node().await;
//! # let cached = node.table::<i64, (String,)>("public.users").await?;
//! let held = db.hold_loads();
//! let reader = tokio::spawn({ let cached = cached.clone(); async move { cached.get(&42).await } });
//! held.reached(1).await; // It has read Ada.
//! users.put(42, ("Grace".into(),));
//! node.barrier().await?;
//! held.release();
//!
//! assert_eq!(reader.await.unwrap()?.unwrap().0, "Ada"); // It began before the change was applied.
//! assert_eq!(cached.get(&42).await?.unwrap().0, "Grace"); // Ada was not kept.
//! # Ok(())
//! # }
//! ```
//!
//! [`Database::hold_messages`] does the same with messages, [`Database::disconnect`], [`silence`](Database::silence),
//! [`stop`](Database::stop) and [`restart`](Database::restart) make gaps, and [`Database::chaos`] all of it at random.
//!
//! # Time
//!
//! Nodes go by tokio's time, so that a test can pause it (`#[tokio::test(start_paused = true)]`, tokio's feature `test-util`) and be
//! done at once however long it waits.
//!
//! * `tokio::time::sleep` lets time pass as it does in production: fences are sent, entries expire, and nobody waits. An hour takes some ten
//!   seconds in a debug build, because each node looks at the clock every 10 ms.
//! * `tokio::time::advance` makes one leap, as a process does that was suspended. Over more than a lease, that is a gap. What is due because of
//!   the leap happens as soon as the node's tasks run: wait for [`Node::barrier`], or after a gap for [`Node::until_coherent`].
//!
//! # What it does not show
//!
//! There is no SQL here: queries, the types of columns, [`sqlx::FromRow`], the loaders of views and their tags do not run, and
//! triggers are always whole. [`Node::begin`], [`Table::update`](crate::Table::update) and [`Table::modify`](crate::Table::modify) return an error
//! that says so, and so does a [`WarmUp`](crate::WarmUp) by a query. Keys are shown in messages, never hashed, and all is told by NOTIFY.
//! With [`TableOptions::bytes`](crate::TableOptions::bytes) and no weigher, a row counts as `size_of` its type. Some tests should still run
//! against a real Postgres.

mod chaos;
mod hold;
mod host;
mod line;
mod registry;
mod table;
mod world;

use std::sync::Arc;

use sqlx::postgres::PgConnectOptions;
use tokio::sync::oneshot;

pub use chaos::Chaos;
pub use hold::{HeldLoads, HeldMessages};
pub(crate) use registry::{check_transacts, or_in_memory};
pub use table::TestTable;
pub(crate) use world::World;

use crate::{
    change::{Change, RowKey, Rows},
    config::Config,
    error::{Error, Kind, Result},
    key::Key,
    node::Node,
    postgres::server::Postgres,
    server::Server,
    shared::{Handle, Shared},
    tls::TlsConfig,
};

/// A database in memory, in place of Postgres. Cheap to clone: clones are the same database.
#[derive(Clone)]
pub struct Database {
    world: Arc<World>,
}

/// Settings for [`Database::node_with`]: the defaults, and an address that nobody connects to.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> rowcache::Result<()> {
/// let mut config = rowcache::testing::config();
/// config.lease = std::time::Duration::from_secs(2);
/// let node = rowcache::testing::Database::new().node_with(config).await?;
/// # Ok(())
/// # }
/// ```
#[must_use]
pub fn config() -> Config {
    // No URL: it would be refused where the environment has settings for Postgres.
    let mut listener = tokio_postgres::Config::new();
    listener.host(NOWHERE);
    Config::new(PgConnectOptions::new_without_pgpass().host(NOWHERE), listener, TlsConfig::default())
}

const NOWHERE: &str = "test-kit.invalid";

/// A message of the channel, for [`Database::tell`]: of rows of a table, or of a cache by its name (`view:accounts`).
///
/// ```
/// use rowcache::{Rows, testing};
///
/// let whole_table = testing::change("public.users", Rows::All);
/// let two_rows = testing::change("public.users", Rows::Keys(vec![testing::row_key(&42_i64), testing::row_key(&43_i64)]));
/// # let _ = (whole_table, two_rows);
/// ```
#[must_use]
pub fn change(table: &str, rows: Rows) -> Change {
    Change::requested(table, rows)
}

/// A key as messages show it.
pub fn row_key<K: Key>(key: &K) -> RowKey {
    RowKey::new(&key.to_parts())
}

impl Database {
    /// An empty database.
    #[must_use]
    pub fn new() -> Self {
        Self { world: World::new() }
    }

    /// A tracked table, made if there is none of this name: as `public.users`, or `users`, which is the same. Nodes can open it with these types
    /// from here on.
    ///
    /// # Panics
    ///
    /// If it was made with other types before. [`TestTable::also_as`] lets nodes open it with others.
    #[must_use]
    pub fn table<K: Key, V: Clone + Send + Sync + 'static>(&self, name: &str) -> TestTable<K, V> {
        TestTable::of(&self.world, name)
    }

    /// What the view of this name returns: its entries are put in like rows. The loader that your service opens it with is not called, and
    /// what it depends on counts for nothing: an entry changes when you put another one.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> rowcache::Result<()> {
    /// let db = rowcache::testing::Database::new();
    /// let totals = db.view::<i64, i64>("totals");
    /// totals.put(42, 120);
    ///
    /// let node = db.node().await;
    /// let view = node.view("totals").on("public.orders", ["user_id"]);
    /// let cached = view.open::<i64, i64, _>(|_, _| unreachable!("there is no Postgres")).await?;
    /// assert_eq!(*cached.get(&42).await?.unwrap(), 120);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// If it was made with other types before.
    #[must_use]
    pub fn view<K: Key, V: Clone + Send + Sync + 'static>(&self, name: &str) -> TestTable<K, V> {
        TestTable::of(&self.world, &format!("view:{name}"))
    }

    /// A node with the default settings. It is coherent when this returns.
    ///
    /// # Panics
    ///
    /// If it cannot start: outside of a tokio runtime, and while the database is stopped, or chaos is in the way.
    pub async fn node(&self) -> Node {
        self.node_with(config()).await.expect("the test database answers")
    }

    /// A node with these settings, as [`Node::start`] makes one.
    ///
    /// # Errors
    ///
    /// [`is_config`](Error::is_config): a setting cannot be used; [`is_unavailable`](Error::is_unavailable),
    /// [`is_pooler`](Error::is_pooler): the database is stopped, or chaos is in the way.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub async fn node_with(&self, config: Config) -> Result<Node> {
        let (ready, first_attempt) = oneshot::channel();
        self.run(config, Some(ready))?.started(first_attempt).await
    }

    /// A node as [`Node::launch`] makes one: its start is not waited for, so that the database may be stopped.
    ///
    /// # Errors
    ///
    /// [`is_config`](Error::is_config): a setting cannot be used.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub fn launch(&self, config: Config) -> Result<Node> {
        Ok(Node { is_launched: true, ..self.run(config, None)? })
    }

    fn run(&self, config: Config, ready: Option<oneshot::Sender<Result<()>>>) -> Result<Node> {
        config.check()?;
        if !config.listen {
            let message = "a test database tells all by NOTIFY, which this node does not hear (`Config::listen`)";
            return Err(Error::new(Kind::Config, message));
        }
        // Its pools connect to nobody: nothing asks them.
        let postgres = Arc::new(Postgres::new(config.clone()));
        let server = Arc::new(line::MemoryServer(Arc::clone(&self.world))) as Arc<dyn Server>;
        let host = Arc::new(host::TokioHost::current(self.world.next_node()));
        let shared = Shared::new(config, server, host);
        Ok(Node::of(shared, postgres, ready, Handle::start_in_tokio_time))
    }

    /// Sends this message to all nodes, as the triggers or [`Table::invalidate`](crate::Table::invalidate) do, and changes no row.
    /// [`change`] makes one.
    ///
    /// # Errors
    ///
    /// [`is_unavailable`](Error::is_unavailable): the database is stopped.
    pub fn tell(&self, change: &Change) -> Result<()> {
        self.world.tell(change.to_message())
    }

    /// Sends any text to all nodes, as anybody can do who may connect. What they cannot read makes them forget the table that it names,
    /// or everything.
    ///
    /// # Errors
    ///
    /// [`is_unavailable`](Error::is_unavailable): the database is stopped.
    pub fn tell_text(&self, text: &str) -> Result<()> {
        self.world.tell(text.to_owned())
    }

    /// From now on loads stay under way, once they have read their rows, until the guard is dropped; or until they time out
    /// ([`Config::load_timeout`]).
    pub fn hold_loads(&self) -> HeldLoads {
        HeldLoads::new(&self.world)
    }

    /// From now on messages are not delivered, fences among them, until the guard is dropped. [`Node::barrier`] waits; and after
    /// [`Config::beat_timeout`], or when the lease has run out, there is a gap.
    pub fn hold_messages(&self) -> HeldMessages {
        HeldMessages::new(&self.world)
    }

    /// Ends all lines, with what is under way. The nodes know when this returns, and connect again at once: reads go to the database
    /// until [`Node::until_coherent`] returns.
    pub fn disconnect(&self) {
        self.world.disconnect("disconnected by the test");
    }

    /// The lines that are open carry no message any more, and nobody is told: as where a firewall forgets connections. Nodes serve
    /// what they hold, and may miss changes, until a fence is late or the lease has run out, whichever comes first: at most
    /// [`Config::staleness_bound`] after the last fence that came back. Then they connect again.
    pub fn silence(&self) {
        self.world.silence();
    }

    /// Nobody answers from now on: lines end, loads fail, and nodes try to connect until [`start`](Self::start).
    pub fn stop(&self) {
        self.world.stop();
    }

    /// Answers again.
    pub fn start(&self) {
        self.world.start();
    }

    /// Another run of the server, with the same rows: lines end, and a [`Token`](crate::Token) from before is of another incarnation.
    pub fn restart(&self) {
        self.world.restart();
    }

    /// Lets things go wrong at random from now on, in place of what was said before.
    pub fn chaos(&self, chaos: Chaos) {
        self.world.set_chaos(chaos);
    }

    /// Nothing goes wrong from now on. Lines that are silent stay so.
    pub fn calm(&self) {
        self.chaos(Chaos::seeded(0));
    }
}

impl Default for Database {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Database {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Database").finish_non_exhaustive()
    }
}
