//! What a node tells: whether it can be trusted, and what happens to it.

use std::{sync::Arc, time::Instant};

use tokio::sync::broadcast;

use crate::{change::Change, coherence::Reason};

/// Whether entries are served from memory.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Status {
    /// Yes. Every change that was visible in Postgres at `as_of` has been applied here.
    Coherent {
        /// When the last fence that came back was sent. At most one lease ago.
        as_of: Instant,
    },
    /// No: every read goes to Postgres, and nothing is cached.
    Bypassed {
        /// Since when.
        since: Instant,
        /// Why.
        why: Reason,
    },
}

/// Something that happened to a node, in the order in which it was applied.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Event {
    /// Rows changed, and have been forgotten.
    Change(Arc<Change>),
    /// A message could not be read. The table it named, or every table, has been forgotten.
    Unreadable {
        /// The table that the message named.
        table: Option<String>,
        /// What is wrong with the message.
        error: String,
    },
    /// Notifications may have been lost: everything was forgotten, and reads go to Postgres.
    Gap(Reason),
    /// Entries are served again.
    Coherent,
    /// The subscriber was too slow, and missed this many events.
    Lagged(u64),
}

/// A subscription to a node's [`Event`]s.
pub struct Events(pub(crate) broadcast::Receiver<Event>);

impl Events {
    /// The next event; `None` when the node has gone.
    ///
    /// # Cancel safety
    ///
    /// Cancelling loses no event.
    pub async fn recv(&mut self) -> Option<Event> {
        match self.0.recv().await {
            Ok(event) => Some(event),
            Err(broadcast::error::RecvError::Lagged(missed)) => Some(Event::Lagged(missed)),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}
