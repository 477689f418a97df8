//! Counts what arrives on the channel between two fences: transactions, whole-table messages, what cannot be read.
//!
//! The messages of one transaction arrive one after another, so that remembering the last transaction is enough to count
//! them all: memory grows with the tables that are named, not with the messages.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use uuid::Uuid;

use crate::{Change, Rows, change::Message};

/// Names beyond these are counted as one table; whoever forges messages can invent any number.
const TABLES_MAX: usize = 1000;

/// What is under way: nothing is counted before the first fence has arrived, nor after the last.
#[derive(Debug)]
pub(super) struct Seen {
    first: Uuid,
    last: Uuid,
    began: Option<Instant>,
    ended: Option<Instant>,
    counts: Counts,
}

/// What has been counted.
#[derive(Clone, Debug, Default)]
pub(super) struct Counts {
    pub(super) transactions: Transactions,
    pub(super) tables: BTreeMap<String, Table>,
    pub(super) unreadable: u64,
    /// Why the first of them could not be read.
    pub(super) first_error: Option<String>,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Table {
    pub(super) transactions: Transactions,
    /// Those that told "all rows", not keys.
    pub(super) whole: Transactions,
}

/// Transactions, told apart by their ids; a message without one is one of its own.
#[derive(Clone, Debug, Default)]
pub(super) struct Transactions {
    pub(super) count: u64,
    last: Option<u64>,
}

impl Transactions {
    fn see(&mut self, xid: Option<u64>) {
        if xid.is_none() || self.last != xid {
            self.count += 1;
            self.last = xid;
        }
    }
}

impl Seen {
    pub(super) fn between(first: Uuid, last: Uuid) -> Self {
        Self { first, last, began: None, ended: None, counts: Counts::default() }
    }

    /// A fence of ours came back.
    pub(super) fn fence(&mut self, nonce: Uuid, at: Instant) {
        if nonce == self.first {
            self.began = Some(at);
        } else if nonce == self.last {
            self.ended = Some(at);
        }
    }

    /// A message of the common channel.
    pub(super) fn message(&mut self, payload: &str) {
        if self.began.is_none() || self.ended.is_some() {
            return;
        }
        match Message::parse(payload) {
            Message::Change(change) => self.counts.change(change),
            // A fence belongs on its node's own channel.
            Message::Fence(..) => self.counts.unreadable("a fence, which has no business on this channel".into()),
            Message::Unreadable { error, .. } => self.counts.unreadable(error),
        }
    }

    /// What was counted, and in how long: up to the last fence, or, if messages arrive faster than they are read so that it
    /// is not back, until now. `None` before the first.
    pub(super) fn counted(&self, now: Instant) -> Option<(Counts, Duration)> {
        Some((self.counts.clone(), self.ended.unwrap_or(now).duration_since(self.began?)))
    }
}

impl Counts {
    fn change(&mut self, change: Change) {
        self.transactions.see(change.xid);
        let mut name = change.table.unwrap_or_else(|| "(every table)".to_owned());
        if self.tables.len() >= TABLES_MAX && !self.tables.contains_key(&name) {
            "(others)".clone_into(&mut name);
        }
        let table = self.tables.entry(name).or_default();
        table.transactions.see(change.xid);
        if change.rows == Rows::All {
            table.whole.see(change.xid);
        }
    }

    fn unreadable(&mut self, error: String) {
        self.unreadable += 1;
        self.first_error.get_or_insert(error);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transactions_are_counted_not_messages_and_only_between_the_fences() {
        let [first, last] = [Uuid::from_u128(1), Uuid::from_u128(2)];
        let mut seen = Seen::between(first, last);
        let start = Instant::now();
        let keys = |table: &str, xid: u64| format!(r#"{{"v":1,"t":"{table}","x":{xid},"k":[1]}}"#);
        seen.message(&keys("a.a", 1));
        assert!(seen.counted(start).is_none());
        seen.fence(first, start);
        for message in [
            keys("a.a", 2),
            keys("a.a", 2),
            keys("a.b", 2),
            keys("a.a", 3),
            r#"{"v":1,"t":"a.a","x":3,"all":true}"#.into(),
            r#"{"v":1,"t":"a.a","all":true}"#.into(),
            "rubbish".into(),
        ] {
            seen.message(&message);
        }
        let later = start + Duration::from_secs(12);
        assert_eq!(seen.counted(later).expect("the first fence is back").1, Duration::from_secs(12));
        seen.fence(last, start + Duration::from_secs(2));
        seen.message(&keys("a.a", 9));
        let (counts, time) = seen.counted(later).expect("both fences are back");
        assert_eq!((time, counts.transactions.count, counts.unreadable), (Duration::from_secs(2), 3, 1));
        let of = |name: &str| (counts.tables[name].transactions.count, counts.tables[name].whole.count);
        assert_eq!((of("a.a"), of("a.b")), ((3, 2), (1, 0)));
    }

    #[test]
    fn invented_tables_take_no_more_memory_than_real_ones() {
        let mut seen = Seen::between(Uuid::from_u128(1), Uuid::from_u128(2));
        seen.fence(Uuid::from_u128(1), Instant::now());
        for n in 0..2 * TABLES_MAX {
            seen.message(&format!(r#"{{"v":1,"t":"x.t{n}","x":{n},"k":[1]}}"#));
        }
        assert_eq!(seen.counts.tables.len(), TABLES_MAX + 1);
    }
}
