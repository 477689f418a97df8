//! What a node tells: whether it can be trusted, and what happens to it.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::{broadcast, watch};

use crate::{
    change::{Change, RowKey},
    coherence::Reason,
};

/// Whether entries are served from memory.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Status {
    /// Yes. Every change that was visible in Postgres at `as_of` has been applied here.
    Coherent {
        /// When the last fence that came back was sent. At most one lease ago.
        as_of: Instant,
        /// [`Config::staleness_bound`](crate::Config::staleness_bound): no read misses a change that became visible
        /// longer before it began.
        staleness_bound: Duration,
    },
    /// No: nothing is cached, and reads do what the table's [`Fallback`](crate::Fallback) says; by default, they go to
    /// Postgres.
    Bypassed {
        /// Since when.
        since: Instant,
        /// Why.
        why: Reason,
    },
}

impl fmt::Display for Status {
    /// One line, for a log or a status page.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Coherent { as_of, staleness_bound } => write!(
                f,
                "coherent as of {:.1} s ago; reads miss no change older than {:.2} s",
                as_of.elapsed().as_secs_f64(),
                staleness_bound.as_secs_f64()
            ),
            Self::Bypassed { since, why } => {
                write!(f, "not coherent for {:.1} s: {why}", since.elapsed().as_secs_f64())
            }
        }
    }
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
    /// From now on the loss of one line is no gap, until one of the next three says otherwise: [`Handoff`](Self::Handoff),
    /// [`SpareLost`](Self::SpareLost), [`Gap`](Self::Gap). Only with
    /// [`Config::redundant_listener`](crate::Config::redundant_listener).
    Covered,
    /// The line was lost, and the spare one has taken over: nothing was missed, and nothing was forgotten. Changes
    /// since the last fence may be told a second time. How it was lost.
    Handoff(String),
    /// The spare line was lost, and is opened again; until it covers, losing the other one is a gap. How it was lost.
    SpareLost(String),
    /// A row was served from memory that was not what Postgres had, and no change on its way explains it. It has been
    /// forgotten. Only of tables that are audited ([`TableOptions::audit`](crate::TableOptions::audit)). Not in the order of the
    /// others.
    Incoherent {
        /// The table.
        table: String,
        /// The key of the row; `None` if messages show keys of this table as hashes.
        key: Option<RowKey>,
        /// How long the row had been held.
        age: Duration,
    },
    /// The subscriber was too slow, and missed this many events.
    Lagged(u64),
}

/// A subscription to a node's [`Event`]s.
pub struct Events {
    pub(crate) events: broadcast::Receiver<Event>,
    pub(crate) stopping: watch::Receiver<bool>,
}

impl Events {
    /// The next event; `None` when the node was shut down and all that came before has been received.
    ///
    /// # Cancel safety
    ///
    /// Cancelling loses no event.
    pub async fn recv(&mut self) -> Option<Event> {
        let event = tokio::select! {
            biased;
            event = self.events.recv() => event,
            // What was sent before the end is still to be had.
            _ = self.stopping.wait_for(|stopping| *stopping) => match self.events.try_recv() {
                Ok(event) => Ok(event),
                Err(broadcast::error::TryRecvError::Lagged(missed)) => Err(broadcast::error::RecvError::Lagged(missed)),
                Err(_) => return None,
            },
        };
        match event {
            Ok(event) => Some(event),
            Err(broadcast::error::RecvError::Lagged(missed)) => Some(Event::Lagged(missed)),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}
