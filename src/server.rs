//! What a node asks of its database, rows apart (those are `source.rs`): lines, fences, polls, messages.
//!
//! `postgres/server.rs` answers it with SQL and sockets; `verify/simulation` and `testing` each with a database of their own.

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use uuid::Uuid;

use crate::{
    change_log::{Polled, Position},
    coherence::{Fence, Incarnation},
    error::Result,
    fleet::FleetNode,
    tables::{Trust, Via},
};

/// An answer that takes time.
pub(crate) type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>;

/// A database, by way of two addresses: the pool's and the listener's.
pub(crate) trait Server: Send + Sync {
    /// Connects, listens on the common channel and this one, and returns once LISTEN has returned. From then on `hear` is
    /// told everything that arrives, and once that the line has ended.
    fn open<'a>(&'a self, own_channel: &'a str, hear: Arc<dyn Hear>) -> Answer<'a, Arc<dyn Line>>;

    /// Makes sure that the pool reaches the server that the listener is on.
    fn reaches(&self, listening: Incarnation) -> Answer<'_, ()>;

    /// Sends a fence through the pool. `false`: it waited too long for the lock that orders commits, and was not sent.
    fn probe<'a>(&'a self, own_channel: &'a str, fence: Fence) -> Answer<'a, bool>;

    /// Sends a message to all nodes, through the pool.
    fn tell(&self, payload: String, via: Via) -> Answer<'_, ()>;

    /// Asks all nodes how they are, waits for so long, and returns who there is. `None`: there is nobody to ask.
    fn ask_all(&self, _deadline: Duration) -> Answer<'_, Option<Vec<FleetNode>>> {
        Box::pin(async { Ok(None) })
    }

    /// Answers such a question, through the pool.
    fn answer(&self, _question: Uuid, _payload: String) -> Answer<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    /// Closes all connections but those of lines.
    fn close(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>>;

    /// The database in memory that this is, if it is one of `testing`.
    #[cfg(feature = "test-kit")]
    fn in_memory(&self) -> Option<Arc<crate::testing::World>> {
        None
    }
}

/// Something that a line received.
pub(crate) enum Received {
    /// A message of the channel that all nodes listen to.
    Change(String),
    /// A message of the node's own channel.
    Own(String),
    /// A message of the channel on which all nodes are asked.
    Question(String),
}

/// Who hears a line.
pub(crate) trait Hear: Send + Sync {
    /// A message arrived.
    fn received(&self, message: Received);

    /// The line has ended, and was open before.
    fn lost(&self, how: String);
}

/// The line that coherence hangs on: a session that listens, and one that sends fences. Dropping it closes both.
pub(crate) trait Line: Send + Sync {
    /// The server that it is on.
    fn incarnation(&self) -> Incarnation;

    /// The process id of the server's end of the session that listens, if there is one.
    fn listener(&self) -> Option<i32> {
        None
    }

    /// Whether neither session has ended.
    fn is_open(&self) -> bool;

    /// Sends a fence. `false`: it waited too long for the lock that orders commits, and was not sent.
    fn send<'a>(&'a self, own_channel: &'a str, fence: Fence) -> Answer<'a, bool>;

    /// What the triggers of these tables look like now; `None` for a table that is gone.
    fn fingerprints<'a>(&'a self, names: &'a [String]) -> Answer<'a, Vec<(String, Option<String>)>>;

    /// What a table looks like now, if its triggers are whole; else what is wrong with them.
    fn verify<'a>(&'a self, name: &'a str) -> Answer<'a, Result<Trust, String>>;

    /// Reads the change log from this position on; from nowhere: only where it ends. `read` is given each message, as it comes.
    fn poll<'a>(&'a self, since: Option<&'a Position>, read: &'a (dyn Fn(String) + Send + Sync)) -> Answer<'a, Polled>;

    /// Removes from the change log what is left of transactions from long ago, and of those below `before`. `false`: somebody is
    /// in the way, or there is more; it is to be called again.
    fn trim(&self, before: Option<u64>) -> Answer<'_, bool>;
}
