//! What `fuzz/` needs to see of the core. Built only under `cfg(fuzzing)`, which the fuzz build sets; no part of the API.

use std::collections::BTreeMap;

use tokio::sync::oneshot;
use uuid::Uuid;

use crate::{
    change::{Change, Message, RowKey, Rows},
    error::{Error, Kind},
    fill::Join,
    hashed::{Hashed, KeyHash},
    inbox,
    key::{Key, KeyPart},
    relay::{self, LineId, Loss},
    snapshot::Snapshot,
    source::Stamp,
    store::{Asked, Bounds, Limits, Origin, Outcome, Runner, Store},
    sync::Arc,
    tables::{self, Member, Trust},
    token::Token,
};

pub enum Parsed {
    Change(Change),
    Fence(Uuid, u64),
    Unreadable(Option<String>),
}

pub fn parse(payload: &str) -> Parsed {
    match Message::parse(payload) {
        Message::Change(change) => Parsed::Change(change),
        Message::Fence(nonce, mark) => Parsed::Fence(nonce, mark.lsn),
        Message::Unreadable { table, .. } => Parsed::Unreadable(table),
    }
}

pub fn change(
    table: Option<String>,
    rows: Rows,
    columns: BTreeMap<String, Vec<KeyPart<'static>>>,
    xid: Option<u64>,
) -> Change {
    Change { table, rows, columns, xid }
}

pub fn to_payload(change: &Change) -> String {
    change.to_payload()
}

pub fn row_key(parts: &[KeyPart<'_>]) -> RowKey {
    RowKey::new(parts)
}

pub fn key_text(parts: &[KeyPart<'_>]) -> String {
    crate::change::key_text(parts)
}

pub fn hash_from_hex(text: &str) -> Option<KeyHash> {
    KeyHash::from_hex(text)
}

pub fn hashed_rows(secret: &str, hashes: Vec<KeyHash>) -> Rows {
    Rows::Hashed { secret: secret.to_owned(), hashes }
}

pub fn keyed_hash<K: Key>(secret: &[u8], key: &K) -> KeyHash {
    Hashed::new(crate::hashed::Secret::new(secret)).hash(key)
}

/// Which of these transactions a snapshot sees.
pub fn seen(snapshot: &str, xids: &[u64]) -> Option<Vec<bool>> {
    let snapshot: Snapshot = snapshot.parse().ok()?;
    Some(xids.iter().map(|xid| snapshot.sees(*xid)).collect())
}

pub fn token(incarnation: u64, xid: u64) -> Token {
    Token { incarnation, xid }
}

pub fn token_parts(token: Token) -> (u64, u64) {
    (token.incarnation, token.xid)
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    Message(String),
    Own(String),
    Overflow,
}

impl From<inbox::Item> for Item {
    fn from(item: inbox::Item) -> Self {
        match item {
            inbox::Item::Message(payload) => Self::Message(payload),
            inbox::Item::Own(payload) => Self::Own(payload),
            inbox::Item::Overflow => Self::Overflow,
            inbox::Item::Polled(..) | inbox::Item::Missed => unreachable!("no line receives what is polled"),
            inbox::Item::Question(_) => unreachable!("nobody asks"),
        }
    }
}

/// A relay whose lines are numbers.
pub struct Relay(relay::Relay<usize>, Vec<LineId>);

/// What the loss of a line meant.
#[derive(Debug)]
pub enum Lost {
    Nothing,
    Handoff(Vec<Item>),
    Gap,
}

impl Relay {
    pub fn new(bytes_max: usize) -> Self {
        Self(relay::Relay::new(bytes_max), Vec::new())
    }

    /// Returns the new line.
    pub fn open(&mut self, primary: bool) -> usize {
        let (id, line) = (self.0.next_id(), self.1.len());
        self.1.push(id);
        if primary {
            self.0.lead(id, line)
        } else {
            self.0.attach(id, line)
        }
        line
    }

    pub fn give_up_both(&mut self) {
        self.0.clear();
    }

    pub fn fence_sent(&mut self, nonce: Uuid) {
        self.0.fence_sent(nonce, std::time::Duration::ZERO);
    }

    pub fn received(&mut self, line: usize, item: Item) -> Option<Item> {
        let item = match item {
            Item::Message(payload) => inbox::Item::Message(payload),
            Item::Own(payload) => inbox::Item::Own(payload),
            Item::Overflow => inbox::Item::Overflow,
        };
        self.0.received(self.1[line], item).0.map(Item::from)
    }

    pub fn lost(&mut self, line: usize) -> Lost {
        match self.0.lost(self.1[line]) {
            Loss::Late | Loss::Spare(_) => Lost::Nothing,
            Loss::Handoff { items, .. } => Lost::Handoff(items.into_iter().map(Item::from).collect()),
            Loss::Gap => Lost::Gap,
        }
    }

    pub fn is_covered(&self) -> bool {
        self.0.is_covered()
    }
}

/// The tables of a node, of which one, `t`, has caches.
#[derive(Default)]
pub struct Tables(tables::Tables);

impl Tables {
    pub fn add(&self, cache: &Cache, fingerprint: u64) {
        self.0.add("t", trust(fingerprint), &(Arc::clone(&cache.0) as Arc<dyn Member>));
    }

    /// As the applier does.
    pub fn apply(&self, payload: &str) {
        match Message::parse(payload) {
            Message::Change(change) => drop(self.0.apply(&change)),
            Message::Unreadable { table, .. } => drop(self.0.clear(table.as_deref())),
            Message::Fence(..) => {}
        }
    }

    pub fn set_coherent(&self, coherent: bool) {
        self.0.set_coherent(coherent);
    }

    /// Looks at the triggers. Returns whether the table is in doubt.
    pub fn inspect(&self, fingerprint: u64) -> bool {
        self.0.inspect("t", Some(&fingerprint.to_string()), std::time::Duration::ZERO).is_some()
    }

    /// The triggers of a table in doubt were found to be whole, or not.
    pub fn verified(&self, fingerprint: Option<u64>) {
        self.0.verified("t", fingerprint.map(trust).ok_or_else(|| "no trigger".to_owned()));
    }

    pub fn is_in_doubt(&self) -> bool {
        self.0.suspicion("t").is_some()
    }
}

fn trust(fingerprint: u64) -> Trust {
    Trust { fingerprint: fingerprint.to_string(), key: "id".into(), ..Trust::default() }
}

/// The real store of one cache.
pub struct Cache(Arc<Store<i64, u64>>);

/// A load, and what it is to be told.
pub struct Load(Runner<i64, u64>);

/// A caller who waits.
pub struct Wait(oneshot::Receiver<Outcome<u64>>);

pub enum Answer {
    /// The row, or that there is none.
    Row(Option<u64>),
    Failed,
    NotYet,
    /// Nobody will ever answer.
    Forgotten,
}

impl Wait {
    pub fn poll(&mut self) -> Answer {
        match self.0.try_recv() {
            Ok(Ok(answer)) => Answer::Row(answer.entry.row().copied()),
            Ok(Err(_)) => Answer::Failed,
            Err(oneshot::error::TryRecvError::Empty) => Answer::NotYet,
            Err(oneshot::error::TryRecvError::Closed) => Answer::Forgotten,
        }
    }
}

/// What a caller asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mood {
    Coherent,
    Stale,
    Current,
}

impl Cache {
    pub fn new(capacity: usize, runners_max: usize, batch_max: usize, secret: Option<&[u8]>) -> Self {
        let hashed = secret.map(|secret| Hashed::new(crate::hashed::Secret::new(secret)));
        Self(Arc::new(Store::new(Bounds::rows::<i64, u64>(capacity), Limits { runners_max, batch_max }, hashed)))
    }

    /// What a message says of these keys.
    pub fn rows(&self, keys: &[i64]) -> Rows {
        let Some(hashed) = self.0.hashed() else {
            return Rows::Keys(keys.iter().map(|key| RowKey::new(&key.to_parts())).collect());
        };
        let mut rows = hashed.rows(&0);
        if let Rows::Hashed { hashes, .. } = &mut rows {
            *hashes = keys.iter().map(|key| hashed.hash(key)).collect();
        }
        rows
    }

    /// As `Table::get`. Loads that the call made necessary are added.
    pub fn get(&self, key: i64, mood: Mood, loads: &mut Vec<Load>) -> Result<Option<u64>, Wait> {
        let held = if mood == Mood::Stale { self.0.lookup_stale(&key) } else { self.0.lookup(&key) };
        if let Some(entry) = held {
            return Ok(entry.row().copied());
        }
        let mut wanted = Vec::new();
        let join = if mood == Mood::Current { Join::Coherent } else { Join::Running };
        let asked = self.0.ask(&key, join, &mut wanted);
        loads.extend(self.0.enqueue(wanted).into_iter().map(Load));
        match asked {
            Asked::Hit(entry) => Ok(entry.row().copied()),
            Asked::Wait(wait) => Err(Wait(wait)),
        }
    }

    pub fn refill(&self, max: usize, loads: &mut Vec<Load>) {
        let mut wanted = Vec::new();
        for (_, key) in self.0.used_before(max) {
            drop(self.0.ask_again(&key, Join::Running, &mut wanted));
        }
        loads.extend(self.0.enqueue(wanted).into_iter().map(Load));
    }

    pub fn peek(&self, key: i64) -> Option<Option<u64>> {
        self.0.peek(&key).map(|entry| entry.row().copied())
    }

    /// As the first attempt of `Table::snapshot`.
    pub fn snapshot(&self, keys: &[i64], covered: u64) -> Option<Vec<Option<u64>>> {
        let word = self.0.word();
        let row = |key| self.0.peek_used(key).filter(|entry| entry.is_within(word, covered));
        let rows = keys.iter().map(|key| row(key).map(|entry| entry.row().copied()));
        rows.collect::<Option<_>>().filter(|_| word.is_coherent())
    }

    pub fn is_coherent(&self) -> bool {
        self.0.is_coherent()
    }

    pub fn gets(&self) -> u64 {
        self.0.counters.snapshot().gets
    }

    pub fn reclaim(&self) {
        if self.0.wants_reclaim() {
            self.0.reclaim();
        }
    }

    pub fn sweep(&self) {
        self.0.sweep();
    }

    pub fn assert_whole(&self) {
        self.0.assert_whole();
    }

    pub fn assert_at_rest(&self) {
        self.0.assert_at_rest();
    }
}

impl Load {
    pub fn take(&mut self) -> Option<Vec<i64>> {
        self.0.take().map(<[i64]>::to_vec)
    }

    /// `None`: the key's load failed.
    pub fn finish(&mut self, rows: Vec<Option<Option<u64>>>, lsn: u64, ours: bool) {
        let failed = || Error::new(Kind::Timeout, "fuzzed");
        let stamp = Stamp { incarnation: None, dirty: false, lsn, saw: None };
        self.0.finish(rows.into_iter().map(|row| row.ok_or_else(failed)), Origin { stamp, ours, ..Origin::default() });
    }

    pub fn fail(&mut self) {
        self.0.fail(&Error::new(Kind::Timeout, "fuzzed"));
    }
}
