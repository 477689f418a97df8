//! What happened to the entries of one table, the latest of it: for who looks on, and for who asks why a row is (not) held.
//!
//! Hits are not written down. What was taken away always is; loads and the like only while somebody looks on, so that they
//! do not push out what explains.

use std::collections::VecDeque;

use tokio::sync::{Notify, watch};

use crate::{
    change::Change,
    digest::Tenths,
    error::Error,
    sync::{Arc, AtomicU64, Mutex, Ordering, lock},
};

/// Something that happened to the entries of a table, of this node.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum TableEvent<K> {
    /// A load has ended, and its result is held.
    Loaded {
        /// The key.
        key: K,
        /// Whether there is such a row.
        found: bool,
    },
    /// A load has ended that a change had overtaken: its result went to those who had asked before, and is not held.
    Voided {
        /// The key.
        key: K,
    },
    /// A load has ended whose result is not held, because the node was not coherent, or it came from another server.
    Uncached {
        /// The key.
        key: K,
    },
    /// A load has failed.
    Failed {
        /// The key.
        key: K,
        /// Why.
        error: Error,
    },
    /// Somebody has put in a row that he had read himself.
    Put {
        /// The key.
        key: K,
    },
    /// A row was served that may be out of date, to a caller who allows that: in a gap, or because a load failed or took too long.
    HitStale {
        /// The key.
        key: K,
    },
    /// A row has changed, and what was held of it was forgotten.
    Invalidated {
        /// The key.
        key: K,
        /// What told that.
        by: Cause,
    },
    /// An entry was found to be too old.
    Expired {
        /// The key.
        key: K,
    },
    /// An entry had to go for lack of space.
    Evicted {
        /// The key.
        key: K,
    },
    /// Everything was forgotten at once.
    Cleared {
        /// What told that.
        by: Cause,
    },
    /// Nothing that is held is served, because of a gap, doubt about triggers, or because caching was switched off. [`Table::status`](crate::Table::status)
    /// says which.
    Gap,
    /// What is held is served again. After a gap that is nothing, unless all changes come by way of the change log.
    Coherent,
    /// The subscriber was too slow, and missed this many events.
    Lagged(u64),
}

impl<K: PartialEq> TableEvent<K> {
    /// Whether this took away what was held of the key.
    pub(crate) fn ends(&self, key: &K) -> bool {
        match self {
            Self::Invalidated { key: of, .. } | Self::Expired { key: of } | Self::Evicted { key: of } => of == key,
            Self::Cleared { .. } | Self::Gap => true,
            _ => false,
        }
    }
}

/// What made a node forget something.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cause {
    /// A message about this table (`None`: about every table); or a call on this node or another one.
    Change {
        /// The table, or the cache that was named.
        table: Option<std::sync::Arc<str>>,
        /// The transaction that changed the row; `None` if it was a call.
        xid: Option<u64>,
    },
    /// What this node read, or found out: a snapshot of several rows, an audit, triggers in doubt.
    Node,
}

impl Cause {
    pub(crate) fn of(change: Option<&Change>) -> Self {
        match change {
            Some(change) => Self::Change { table: change.table.as_deref().map(Into::into), xid: change.xid },
            None => Self::Node,
        }
    }

    /// The transaction that changed the row, if one did.
    pub(crate) fn xid(&self) -> Option<u64> {
        match self {
            Self::Change { xid, .. } => *xid,
            Self::Node => None,
        }
    }
}

impl std::fmt::Display for Cause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Change { table, xid } => {
                let table = table.as_deref().unwrap_or("every table");
                match xid {
                    Some(xid) => write!(f, "a change of {table} by transaction {xid}"),
                    None => write!(f, "a call that named {table}"),
                }
            }
            Self::Node => f.write_str("what this node found out"),
        }
    }
}

/// The latest events of one table.
pub(crate) struct Journal<K> {
    /// How many are kept for who asks why.
    kept: usize,
    /// How many are kept for who looks on.
    ahead: usize,
    watchers: AtomicU64,
    /// Alone, or under a key's stripe. No code of the user runs under it.
    pages: Mutex<Pages<K>>,
    /// Wakes who looks on.
    news: Notify,
}

struct Pages<K> {
    /// The number of the first one that is kept.
    first: u64,
    events: VecDeque<(Tenths, TableEvent<K>)>,
}

impl<K> Journal<K> {
    pub(crate) fn new(kept: usize, ahead: usize) -> Self {
        let pages = Mutex::new(Pages { first: 0, events: VecDeque::new() });
        Self { kept, ahead: ahead.max(1), watchers: AtomicU64::new(0), pages, news: Notify::new() }
    }

    /// Whether somebody looks on.
    pub(crate) fn is_watched(&self) -> bool {
        self.watchers.load(Ordering::Relaxed) > 0
    }

    /// Writes down what took something away.
    pub(crate) fn note(&self, now: Tenths, event: impl FnOnce() -> TableEvent<K>) {
        let watched = self.is_watched();
        let max = if watched { self.kept.max(self.ahead) } else { self.kept };
        if max == 0 {
            return;
        }
        let page = (now, event());
        let mut pages = lock(&self.pages);
        pages.events.push_back(page);
        let surplus = pages.events.len().saturating_sub(max);
        pages.first += surplus as u64;
        // Keys are the user's: they are dropped after the lock. There is more than one only when who looked on has gone.
        let oldest = if surplus > 0 { pages.events.pop_front() } else { None };
        let dropped: Vec<_> = pages.events.drain(..surplus.saturating_sub(1)).collect();
        drop(pages);
        drop((oldest, dropped));
        if watched {
            self.news.notify_waiters();
        }
    }

    /// Writes down what only matters to who looks on.
    pub(crate) fn tell(&self, now: Tenths, event: impl FnOnce() -> TableEvent<K>) {
        if self.is_watched() {
            self.note(now, event);
        }
    }
}

impl<K: Clone> Journal<K> {
    /// The last of the events that are of this kind.
    pub(crate) fn last(&self, is_it: impl Fn(&TableEvent<K>) -> bool) -> Option<(Tenths, TableEvent<K>)> {
        lock(&self.pages).events.iter().rev().find(|(_, event)| is_it(event)).cloned()
    }

    /// The event with this number, if it has happened; or how many from there on are not kept any more.
    fn at(&self, number: u64) -> Option<Result<TableEvent<K>, u64>> {
        let pages = lock(&self.pages);
        if number < pages.first {
            return Some(Err(pages.first - number));
        }
        let place = usize::try_from(number - pages.first).ok()?;
        pages.events.get(place).map(|(_, event)| Ok(event.clone()))
    }
}

/// A subscription to the [`TableEvent`]s of a table.
pub struct TableEvents<K> {
    journal: Arc<Journal<K>>,
    next: u64,
    stopping: watch::Receiver<bool>,
}

impl<K: Clone> TableEvents<K> {
    pub(crate) fn new(journal: &Arc<Journal<K>>, stopping: watch::Receiver<bool>) -> Self {
        journal.watchers.fetch_add(1, Ordering::Relaxed);
        let pages = lock(&journal.pages);
        let next = pages.first + pages.events.len() as u64;
        drop(pages);
        Self { journal: Arc::clone(journal), next, stopping }
    }

    /// The next event; `None` when the node was shut down and all that came before has been received.
    ///
    /// # Cancel safety
    ///
    /// Cancelling loses no event.
    pub async fn recv(&mut self) -> Option<TableEvent<K>> {
        loop {
            let news = self.journal.news.notified();
            tokio::pin!(news);
            // From here on nothing is missed.
            news.as_mut().enable();
            match self.journal.at(self.next) {
                Some(Ok(event)) => {
                    self.next += 1;
                    return Some(event);
                }
                Some(Err(missed)) => {
                    self.next += missed;
                    return Some(TableEvent::Lagged(missed));
                }
                None if *self.stopping.borrow() => return None,
                None => {}
            }
            tokio::select! {
                () = news => {}
                _ = self.stopping.changed() => {}
            }
        }
    }
}

impl<K> Drop for TableEvents<K> {
    fn drop(&mut self) {
        self.journal.watchers.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<K> std::fmt::Debug for TableEvents<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TableEvents").field("next", &self.next).finish_non_exhaustive()
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    fn evicted(key: i64) -> TableEvent<i64> {
        TableEvent::Evicted { key }
    }

    #[tokio::test]
    async fn who_is_too_slow_is_told_how_much_was_missed() {
        let journal = Arc::new(Journal::new(2, 3));
        journal.note(Tenths::BOOT, || evicted(0));
        let (stop, stopping) = watch::channel(false);
        let mut events = TableEvents::new(&journal, stopping);
        for key in 1..=5 {
            journal.note(Tenths::BOOT, || evicted(key));
        }
        stop.send_replace(true);
        let mut got = Vec::new();
        while let Some(event) = events.recv().await {
            got.push(match event {
                TableEvent::Lagged(missed) => -i64::try_from(missed).expect("few"),
                TableEvent::Evicted { key } => key,
                other => panic!("{other:?}"),
            });
        }
        assert_eq!(got, [-2, 3, 4, 5]);
        drop(events);
        journal.note(Tenths::BOOT, || evicted(6));
        assert_eq!(lock(&journal.pages).events.len(), 2, "without who looks on, less is kept");
        journal.tell(Tenths::BOOT, || evicted(7));
        assert!(journal.last(|event| event.ends(&7)).is_none(), "nobody looks on");
        assert!(journal.last(|event| event.ends(&6)).is_some());
    }

    #[test]
    fn nothing_is_kept_if_that_is_asked_for() {
        let journal = Journal::<i64>::new(0, 10);
        journal.note(Tenths::BOOT, || unreachable!("it is not written down"));
        assert!(lock(&journal.pages).events.is_empty());
    }
}
