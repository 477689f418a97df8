//! Postgres rows, cached inside your service's own process and never silently stale.
//!
//! For services on Postgres, one process per node and many nodes, that read the same rows over and over (users,
//! permissions, sessions, settings, prices) and cannot live with a time-to-live's worth of lies. Writers are
//! *anything*: this service, another one, a cron job, psql.
//!
//! # The promise
//!
//! > Once a node has applied the notification of a commit, no `get` that starts later on that node returns data
//! > from before that commit. While a node is *coherent*, it has applied every commit older than its last fence,
//! > and that fence is at most one *lease* old. When in doubt, it reads Postgres.
//!
//! # Example
//!
//! ```no_run
//! use rowcache::{Node, Table};
//!
//! #[derive(sqlx::FromRow)]
//! struct User {
//!     name: String,
//! }
//!
//! # async fn example() -> rowcache::Result<()> {
//! // Once per database: `rowcache migrate up`, and `rowcache track public.users`.
//! let node = Node::connect("postgres://app:secret@localhost/app").await?;
//! let users: Table<i64, User> = node.table("public.users").await?;
//!
//! if let Some(user) = users.get(&42).await? {
//!     println!("{}", user.name); // from Postgres now, from memory from now on, until somebody changes the row
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # Trade-offs
//!
//! * The listener needs a **direct connection** to the primary (or a pooler in session mode): LISTEN does not
//!   survive transaction pooling. The pool may go through one that keeps track of prepared statements.
//! * Writers pay for the triggers, and transactions that notify **commit one at a time**, in the whole cluster. Right
//!   for tables that are read much more often than written; the README has figures.
//! * The table needs a **key**, made of integers, text, uuids, booleans, bytes, enums, dates, timestamps or numerics ([`Key`] says
//!   which Rust types hold them). A statement that changes very many rows drops the whole table from memory.
//! * A row is cached as the pool's role sees it. Row-level security and views that depend on the time or on the session
//!   are not for sharing.
//! * The lease is checked by a thread of its own, every 10 ms, not by every read. A process that was stopped or
//!   suspended can serve from memory in the instant after it continues, before that thread has run.
//!
//! # How it works
//!
//! A miss reads Postgres, together with whatever else was missed meanwhile. Triggers send the keys of changed rows by
//! NOTIFY; the listener of every node hands them to its applier, which forgets the rows and voids loads that are under
//! way. Once a second each node sends a message to itself, a *fence*, and verifies the triggers: as long as fences come
//! back, everything committed before they were sent has been applied. `docs/design.md` has the definitions, the
//! invariants, and why they hold.
//!
//! # Layout
//!
//! Imports go downward. The core does no I/O and reads no clock; it runs unchanged under a model checker.
//!
//! | module | what it holds |
//! | --- | --- |
//! | `table` | the story of `get` |
//! | `node` | start, open tables, wait, stop |
//! | `open` | opens caches: what they depend on, and what keeps them going |
//! | `view` | entries that are made of several rows |
//! | `memo` | functions whose values are kept |
//! | `preloaded` | small tables, held in whole |
//! | `warm_up` | loads rows before anybody asks for them |
//! | `tier` | rows that nodes share outside of Postgres |
//! | `tags` | what entries of a view depend on that only their loader knows |
//! | `write` | rows that callers have read themselves, or change |
//! | `keeper` | keeps the line to Postgres open: connects, proves, beats, verifies triggers |
//! | `lines` | a node's one or two lines: opens them, and says what their loss means |
//! | `load` | runs loads, in greedy batches |
//! | `audit` | reads rows again that were served, and tells what should not have been |
//! | `answers` | tells other nodes how this one is, and asks them |
//! | `shared` | what a node's tasks share: the applier, the clock, fences |
//! | `postgres/` | the only place with SQL and sockets |
//! | `server`, `source`, `host` | what a node asks of its database and of its process; a simulation can answer, too |
//! | `config`, `settings`, `tls` | how to reach Postgres, and how to behave |
//! | `coherence` | core: may entries be trusted? A state machine |
//! | `tables`, `inbox` | core: who must forget what; what is still to be applied |
//! | `depends` | core: which keys a message makes a cache forget |
//! | `fleet` | core: who else is there: questions, and what is answered |
//! | `relay` | core: of two lines, which one is heard, and when one can take over from the other |
//! | `store`, `fill`, `gate` | core: entries, the loads under way, and what voids them |
//! | `admission` | core: which rows that somebody else has read may be taken |
//! | `hashed` | core: keys that messages do not show |
//! | `change`, `key` | core: messages and keys |
//! | `change_log` | core: where a node is in the change log |
//! | `journal` | core: what happened to the entries of a table |
//! | `digest` | core: what an entry remembers of its row |
//! | `status`, `stats`, `explain`, `error` | what users are told |
//! | `serve/` | the only place with HTTP: the cache for programs in other languages |
//! | `testing` | a database in memory, for users' own tests |
//!
//! # Features
//!
//! | feature | adds |
//! | --- | --- |
//! | (none) | the library |
//! | `serve` | the command `rowcache serve` of the program, the cache over HTTP; with all of `cli` |
//! | `cli` | the program `rowcache`: `migrate`, `track`, `untrack`, `tracked`, `doctor`, `watch`, `nodes`, `demo` |
//! | `chrono` | keys of `date`, `timestamp` and `timestamptz` as types of crate `chrono`; values, too: it turns on sqlx's feature of that name |
//! | `time` | the same as types of crate `time` |
//! | `rust_decimal` | keys of `numeric` as `rust_decimal::Decimal`, and values |
//! | `redis` | a shared tier between the memory of nodes and Postgres: [`Tier`] |
//! | `test-kit` | module `testing`: nodes without Postgres, for the tests of your service |
//! | `verify` | the programs `rowcache-verify`, which shows that the promise holds, and that what shows it can fail, and `rowcache-budget` |

#[cfg(feature = "cli")]
pub mod cli;
#[cfg(feature = "test-kit")]
pub mod testing;
#[cfg(feature = "verify")]
pub mod verify;

mod admission;
mod answers;
mod audit;
mod change;
mod change_log;
mod clock;
mod coherence;
mod config;
mod depends;
#[cfg(any(feature = "test-kit", feature = "verify"))]
mod dice;
mod digest;
mod error;
mod explain;
mod fill;
mod fleet;
mod freshness;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
mod gate;
mod hashed;
mod horizon;
mod host;
mod inbox;
mod journal;
mod keeper;
mod key;
mod lines;
mod load;
#[cfg(all(test, loom_core))]
mod loom_tests;
mod memo;
mod node;
mod open;
mod options;
mod postgres;
mod preloaded;
mod refill;
mod refresh;
mod relay;
#[cfg(feature = "serve")]
pub(crate) mod serve;
mod server;
mod settings;
mod shared;
mod snapshot;
mod source;
mod stats;
mod status;
mod store;
mod sync;
mod table;
mod tables;
mod tags;
mod throttle;
mod tier;
mod tls;
mod token;
mod transaction;
mod values;
mod view;
mod warm_up;
mod write;

pub use change::{Change, RowKey, Rows};
pub use coherence::Reason;
pub use config::Config;
pub use error::{Error, Result};
pub use explain::{Explanation, Held};
pub use fleet::{Fleet, FleetNode, NodeReport, TableReport};
pub use freshness::{Fallback, Freshness};
pub use hashed::KeyHash;
pub use journal::{Cause, TableEvent, TableEvents};
pub use key::{EnumLabel, Key, KeyPart, KeyType};
pub use memo::Memo;
pub use node::Node;
pub use options::{OnChange, TableOptions};
pub use postgres::{
    built::{BoxError, Building},
    install, migrate,
};
pub use preloaded::{AllRows, Preloaded, PreloadedRow};
pub use stats::{Audits, LoadTimes, NodeStats, Stats, TierStats};
pub use status::{Event, Events, Status};
pub use store::Cached;
pub use table::{FromRow, Lookup, Table};
pub use tags::{Tag, Tagged};
pub use tier::Tier;
pub use tls::TlsConfig;
pub use token::Token;
pub use transaction::Transaction;
pub use values::{Codec, Json, Raw, Share, SharedMemo, SharedStats, SharedValue, SharedValues};
pub use view::View;
pub use warm_up::{WarmUp, WarmUpProgress, WarmingUp};
pub use write::{Ticket, Work};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
