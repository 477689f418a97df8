//! Transactions, step by step: locks, writes, messages queued, commit record, visible, confirmed. Anything can happen between
//! two steps.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::time::{sleep, timeout};

use super::{
    database::{Commit, Message, Number, key},
    node::{TABLE, secret},
    trace::What,
    world::{NUMBER, World},
};
use crate::{
    change::{Change, RowKey, Rows},
    error::{Error, Kind, Result},
    hashed::Hashed,
    key::KeyPart,
    tables::Via,
    token::{Token, incarnation_id},
    verify::history::{Key, Outcome, Time, Version, Write},
};

/// What a transaction does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plan {
    /// Changes, inserts or deletes these many rows, one after the other.
    Rows(usize),
    /// As `Rows`, and then undoes the later half.
    Savepoint(usize),
    /// As `Rows`, and then undoes all.
    Rollback(usize),
    /// Changes the key of a row.
    Move,
    /// One statement for all rows, which is one message.
    Bulk,
    Truncate,
}

impl Plan {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Rows(1) => "write of one row",
            Self::Rows(_) => "write of several rows",
            Self::Savepoint(_) => "savepoint rolled back",
            Self::Rollback(_) => "transaction rolled back",
            Self::Move => "change of a key",
            Self::Bulk => "bulk update",
            Self::Truncate => "truncate",
        }
    }
}

fn gone() -> Error {
    Error::new(Kind::Unavailable, "the server ended")
}

/// A transaction that does nothing but notify. `false`: it waited too long for the lock that orders commits.
pub(super) async fn notify(
    world: Arc<World>,
    server: usize,
    channel: Option<String>,
    payload: impl FnOnce((String, u64)) -> String,
    limit: Option<Duration>,
) -> Result<bool> {
    let (locks, payload) = {
        let mut inner = world.lock();
        let server = &mut inner.servers[server];
        if !server.alive {
            return Err(gone());
        }
        (server.locks.clone(), payload((server.snapshot(), server.lsn())))
    };
    world.pause(1).await;
    let lock = locks.commit.lock_owned();
    let held = match limit {
        Some(limit) => {
            let Ok(held) = timeout(limit, lock).await else {
                world.count("fence that waited too long");
                return Ok(false);
            };
            held
        }
        None => lock.await,
    };
    let (number, xid) = {
        let mut inner = world.lock();
        let number = inner.number();
        let server = &mut inner.servers[server];
        let xid = server.begin();
        server.queue.push(Message { channel, payload, by: number });
        (number, xid)
    };
    world.pause(1).await;
    let mut inner = world.lock();
    let server = &mut inner.servers[server];
    if !server.alive {
        return Err(gone());
    }
    server.show(number, xid, &[]);
    drop(held);
    Ok(true)
}

/// A transaction that does nothing but put a message into the change log.
pub(super) async fn log(world: Arc<World>, server: usize, payload: String) -> Result<()> {
    let (number, xid) = {
        let mut inner = world.lock();
        let number = inner.number();
        let server = &mut inner.servers[server];
        if !server.alive {
            return Err(gone());
        }
        (number, server.begin())
    };
    world.pause(1).await;
    {
        let mut inner = world.lock();
        let server = &mut inner.servers[server];
        if !server.alive {
            return Err(gone());
        }
        server.record(Commit { by: number, xid, rows: Vec::new(), flushed: true, messages: vec![payload] });
    }
    world.pause(1).await;
    let mut inner = world.lock();
    let server = &mut inner.servers[server];
    if !server.alive {
        return Err(gone());
    }
    server.show(number, xid, &[]);
    Ok(())
}

/// What a transaction has done so far.
struct Work {
    number: Number,
    xid: u64,
    server: usize,
    era: u32,
    /// What is there afterwards; what it wrote before is overwritten.
    rows: BTreeMap<Key, Option<Version>>,
    /// Each write: the key, the version, and whether it counts.
    writes: Vec<(Key, Version, bool, bool)>,
    messages: Vec<String>,
}

/// Runs a transaction on a server. Returns once it was confirmed, or has failed.
pub(super) async fn run(world: Arc<World>, server: usize, plan: Plan) {
    let locks = world.lock().servers[server].locks.clone();
    // TRUNCATE has the table alone.
    let (_shared, _alone) = match plan {
        Plan::Truncate => (None, Some(Arc::clone(&locks.table).write_owned().await)),
        _ => (Some(Arc::clone(&locks.table).read_owned().await), None),
    };
    let (mut work, keys) = {
        let mut inner = world.lock();
        if !inner.servers[server].alive {
            return;
        }
        let number = inner.number();
        let keys = keys(&mut inner, plan);
        let it = &mut inner.servers[server];
        let (xid, era) = (it.begin(), it.era);
        let (rows, writes, messages) = (BTreeMap::new(), Vec::new(), Vec::new());
        (Work { number, xid, server, era, rows, writes, messages }, keys)
    };
    let mut held = Vec::new();
    let undone_from = if let Plan::Savepoint(_) = plan { keys.len() / 2 } else { usize::MAX };
    if matches!(plan, Plan::Bulk | Plan::Truncate | Plan::Move) {
        for key in &keys {
            held.push(Arc::clone(&locks.rows[place(*key)]).lock_owned().await);
        }
        work.statement(&world, plan, &keys);
    } else {
        for (n, key) in keys.iter().enumerate() {
            held.push(Arc::clone(&locks.rows[place(*key)]).lock_owned().await);
            work.write(&world, *key, n >= undone_from);
            world.pause(3).await;
        }
    }
    world.count(plan.name());
    let rolls_back = matches!(plan, Plan::Rollback(_));
    if rolls_back || !world.lock().servers[server].alive {
        world.pause(3).await;
        work.ends(&world, Outcome::RolledBack);
        return;
    }
    work.commit(&world, locks.commit).await;
    drop(held);
}

/// The rows that a plan is about, in the order in which all writers lock them.
fn keys(inner: &mut super::world::Inner, plan: Plan) -> Vec<Key> {
    let all = inner.keys;
    let mut keys: Vec<Key> = match plan {
        Plan::Rows(n) | Plan::Savepoint(n) | Plan::Rollback(n) => (0..n).map(|_| any_key(inner)).collect(),
        Plan::Move => (0..2).map(|_| any_key(inner)).collect(),
        Plan::Bulk | Plan::Truncate => (0..all).map(key).collect(),
    };
    keys.sort_unstable();
    keys.dedup();
    keys
}

/// Some keys are hot.
pub(super) fn any_key(inner: &mut super::world::Inner) -> Key {
    let all = inner.keys;
    let of = if inner.dice.once_in(2) { all.min(3) } else { all };
    key(inner.dice.below(of))
}

fn place(key: Key) -> usize {
    usize::try_from(key).expect("made of one")
}

impl Work {
    /// What is there for this transaction.
    fn sees(&self, inner: &super::world::Inner, key: Key) -> Option<Version> {
        self.rows.get(&key).copied().unwrap_or_else(|| inner.servers[self.server].rows.get(&key).copied())
    }

    /// Changes one row. `undone`: this will be rolled back to a savepoint.
    fn write(&mut self, world: &World, key: Key, undone: bool) {
        let mut inner = world.lock();
        let deletes = self.sees(&inner, key).is_some() && inner.dice.once_in(4);
        self.put(&mut inner, key, deletes, undone);
        if !undone {
            self.tell(&inner, Some(&[key]));
        }
    }

    /// One statement about several rows.
    fn statement(&mut self, world: &World, plan: Plan, keys: &[Key]) {
        let mut inner = world.lock();
        if let (Plan::Move, [a, b]) = (plan, keys) {
            let (from, to) = match (self.sees(&inner, *a), self.sees(&inner, *b)) {
                (Some(_), None) => (*a, *b),
                (None, Some(_)) => (*b, *a),
                // There is nowhere to go.
                _ => return,
            };
            self.put(&mut inner, from, true, false);
            self.put(&mut inner, to, false, false);
            self.tell(&inner, Some(&[from, to]));
            return;
        }
        let there: Vec<_> = keys.iter().copied().filter(|key| self.sees(&inner, *key).is_some()).collect();
        for key in there {
            self.put(&mut inner, key, plan == Plan::Truncate, false);
        }
        self.tell(&inner, None);
    }

    fn put(&mut self, inner: &mut super::world::Inner, key: Key, deletes: bool, undone: bool) {
        let number = inner.versions.entry(key).or_default();
        *number += 1;
        let version = Version { era: self.era, number: *number };
        if !undone {
            self.rows.insert(key, (!deletes).then_some(version));
        }
        self.writes.push((key, version, deletes, undone));
    }

    /// The trigger, if it is on.
    fn tell(&mut self, inner: &super::world::Inner, keys: Option<&[Key]>) {
        if !inner.servers[self.server].triggers_on {
            return;
        }
        let hashed = (!inner.hashes.is_empty()).then(|| Hashed::<Key>::new(secret()));
        let rows = match (keys, hashed) {
            (None, _) => Rows::All,
            (Some(keys), None) => Rows::Keys(keys.iter().map(|key| RowKey::new(&[KeyPart::Int(*key)])).collect()),
            (Some(keys), Some(hashed)) => match hashed.rows(&keys[0]) {
                Rows::Hashed { secret, .. } => {
                    Rows::Hashed { secret, hashes: keys.iter().map(|key| hashed.hash(key)).collect() }
                }
                other => other,
            },
        };
        let change = Change {
            table: Some(TABLE.into()),
            rows,
            columns: [(NUMBER.to_owned(), vec![KeyPart::Int(self.number.cast_signed())])].into(),
            xid: Some(self.xid),
        };
        self.messages.push(change.to_payload());
    }

    /// Notes all writes, now that they are about to count.
    fn noted(&self, world: &World, sent: Time, outcome: Outcome) {
        let mut inner = world.lock();
        for (key, version, deletes, undone) in &self.writes {
            let outcome = if *undone { Outcome::RolledBack } else { outcome };
            let (key, version, deletes) = (*key, *version, *deletes);
            if !undone {
                let at = inner.history.writes.len();
                inner.writes_of.entry(self.number).or_default().push(at);
            }
            inner.history.writes.push(Write {
                key,
                version,
                deletes,
                xid: self.number,
                sent,
                ended: Time::MAX,
                outcome,
            });
        }
    }

    /// Ends without effect.
    fn ends(&self, world: &World, outcome: Outcome) {
        let at = world.stamp();
        self.noted(world, at, outcome);
        world.lock().servers[self.server].forget(self.xid);
    }

    async fn commit(&self, world: &Arc<World>, lock: Arc<tokio::sync::Mutex<()>>) {
        let sent = world.stamp();
        let notifies = !self.messages.is_empty() && world.via() == Via::Notify;
        let queued = if notifies { Some(lock.lock_owned().await) } else { None };
        if !world.lock().servers[self.server].alive {
            return self.ends(world, Outcome::RolledBack);
        }
        // Noted before anybody can see it.
        self.noted(world, sent, Outcome::Committed);
        if notifies {
            let mut inner = world.lock();
            let messages = self.messages.iter().map(|payload| Message {
                channel: None,
                payload: payload.clone(),
                by: self.number,
            });
            let messages: Vec<_> = messages.collect();
            inner.servers[self.server].queue.extend(messages);
        }
        world.pause(1).await;
        let rows: Vec<_> = self.rows.iter().map(|(key, version)| (*key, *version)).collect();
        let stuck = {
            let mut inner = world.lock();
            let inner = &mut *inner;
            let flushed = !inner.dice.once_in(inner.weather.asynchronous);
            let server = &mut inner.servers[self.server];
            if !server.alive {
                inner.outcome(self.number, Outcome::RolledBack);
                return;
            }
            let messages = if notifies { Vec::new() } else { self.messages.clone() };
            server.record(Commit { by: self.number, xid: self.xid, rows: rows.clone(), flushed, messages });
            if self.server != inner.primary {
                // Whatever a replaced server does is lost with it.
                let with = inner.servers[self.server].era;
                inner.outcome(self.number, Outcome::Lost { with });
            }
            let stuck = inner.weather.stuck;
            stuck != u64::MAX && inner.dice.once_in(stuck)
        };
        world.pause(1).await;
        if stuck {
            world.count("stuck commit");
            let millis = world.roll(|dice| dice.between(50, 700));
            sleep(Duration::from_millis(millis)).await;
        }
        let token = {
            let mut inner = world.lock();
            let inner = &mut *inner;
            let server = &mut inner.servers[self.server];
            if !server.alive {
                // The log says what became of it: `faults.rs`.
                return;
            }
            server.show(self.number, self.xid, &rows);
            Token { incarnation: incarnation_id(server.incarnation), xid: self.xid }
        };
        drop(queued);
        let keys = rows.iter().map(|(key, _)| *key).collect();
        world.note(None, What::Commits { transaction: self.number, keys, server: self.server });
        world.statement().await;
        self.confirmed(world, token);
    }

    /// COMMIT has returned.
    fn confirmed(&self, world: &World, token: Token) {
        let ended = world.stamp();
        let mut inner = world.lock();
        let inner = &mut *inner;
        for write in inner.writes_of.get(&self.number).into_iter().flatten() {
            inner.history.writes[*write].ended = ended;
        }
        inner.tokens.push((token, self.number));
        if inner.tokens.len() > 16 {
            inner.tokens.remove(0);
        }
    }
}
