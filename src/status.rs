//! What a node tells: whether it can be trusted, and what happens to it.

use std::{sync::Arc, time::Instant};

use tokio::sync::{broadcast, watch};

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
    /// From now on the loss of one line is no gap, until one of the next three says otherwise: [`Handoff`](Self::Handoff),
    /// [`SpareLost`](Self::SpareLost), [`Gap`](Self::Gap). Only with
    /// [`Config::redundant_listener`](crate::Config::redundant_listener).
    Covered,
    /// The line was lost, and the spare one has taken over: nothing was missed, and nothing was forgotten. Changes
    /// since the last fence may be told a second time. How it was lost.
    Handoff(String),
    /// The spare line was lost, and is opened again; until it covers, losing the other one is a gap. How it was lost.
    SpareLost(String),
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
