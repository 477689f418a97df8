//! The tables of one node as the applier sees them: who must forget what, and whose gate shows what.

use std::collections::BTreeMap;

use crate::{
    change::{Change, RowKey, Rows},
    coherence::Boot,
    digest::Tenths,
    gate::{Before, Word, Words},
    hashed::KeyHash,
    sync::{Arc, Mutex, lock},
};

/// One cache of rows of a table, whatever its key and value types.
pub(crate) trait Member: Send + Sync {
    /// Forgets these rows. `false` when a key is not of the cache's key type: then all must be forgotten.
    fn invalidate(&self, keys: &[RowKey]) -> bool;

    /// Forgets the rows whose keys have these hashes. `false` when they are not under the secret that the cache has.
    fn invalidate_hashed(&self, secret: &str, hashes: &[KeyHash]) -> bool;

    /// Moves the gate: forgets everything, at once.
    fn show(&self, word: Word, before: Before);

    /// Puts what a gap has put out of service back into it. `false`: there is nothing of that kind.
    fn resume(&self) -> bool;

    /// Tells the time. Returns whether [`reclaim`](Self::reclaim) would find what has expired.
    fn tick(&self, now: Tenths) -> bool;

    /// Whether somebody must call [`reclaim`](Self::reclaim): `false` while a call is under way, which then looks once more.
    fn wants_reclaim(&self) -> bool;

    /// Frees the memory of entries that the gate has made unreachable. Takes time with the number of entries.
    fn reclaim(&self);
}

/// What carries the messages of a table: its *transport*.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Via {
    #[default]
    Notify,
    /// The change log.
    Log,
}

/// What a table looked like when its triggers were found to be whole.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Trust {
    /// Changes with everything that could let a write pass unseen.
    pub(crate) fingerprint: String,
    /// The columns of its key, with their types, and how messages show it. The caches of a table were made for one key.
    pub(crate) key: String,
    pub(crate) via: Via,
}

/// All tables of a node. Every gate of the node is moved in here, under one lock.
#[derive(Default)]
pub(crate) struct Tables(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    words: Words,
    /// The node may serve entries.
    coherent: bool,
    /// What time the caches were told.
    ticked: Tenths,
    /// In an order that is the same in each run.
    by_name: BTreeMap<String, Table>,
}

struct Table {
    /// What it looked like when its triggers were last found to be whole.
    trust: Trust,
    /// Since when, and why, this table's triggers are in doubt.
    suspect: Option<(Boot, String)>,
    members: Vec<Arc<dyn Member>>,
}

impl Inner {
    fn clear(&mut self, table: Option<&str>) -> Vec<Arc<dyn Member>> {
        self.turn(table, Before::Forgotten)
    }

    fn turn(&mut self, table: Option<&str>, before: Before) -> Vec<Arc<dyn Member>> {
        let mut cleared = Vec::new();
        for (name, entry) in &self.by_name {
            if table.is_none_or(|table| table == name) {
                let word = self.words.fresh(self.coherent && entry.suspect.is_none());
                for member in &entry.members {
                    member.show(word, before);
                    cleared.push(Arc::clone(member));
                }
            }
        }
        cleared
    }
}

impl Tables {
    /// Adds a cache of a table whose triggers were found to be whole, *before* any load of the cache starts:
    /// every change that such a load could miss is then a message to come (I1).
    pub(crate) fn add(&self, name: &str, trust: Trust, member: &Arc<dyn Member>) {
        let mut inner = lock(&self.0);
        let table =
            inner.by_name.entry(name.to_owned()).or_insert_with(|| Table { trust, suspect: None, members: Vec::new() });
        // If it looks different from what is on record, the next beat puts all its members in doubt.
        let trusted = table.suspect.is_none();
        table.members.push(Arc::clone(member));
        let coherent = inner.coherent && trusted;
        let word = inner.words.fresh(coherent);
        member.show(word, Before::Forgotten);
    }

    /// Applies a change that was received: when this returns, no entry that it touched can be served. Returns
    /// the caches that were cleared, whose memory can be reclaimed.
    pub(crate) fn apply(&self, change: &Change) -> Vec<Arc<dyn Member>> {
        let forget: &dyn Fn(&dyn Member) -> bool = match &change.rows {
            Rows::All => return lock(&self.0).clear(change.table.as_deref()),
            Rows::Keys(keys) => &|member| member.invalidate(keys),
            Rows::Hashed { secret, hashes } => &|member| member.invalidate_hashed(secret, hashes),
        };
        let Some(name) = &change.table else { return lock(&self.0).clear(None) };
        let members = match lock(&self.0).by_name.get(name) {
            Some(table) => table.members.clone(),
            None => return Vec::new(),
        };
        // If one does not understand, all of them are cleared.
        let understood = members.iter().all(|member| forget(&**member));
        if understood { Vec::new() } else { lock(&self.0).clear(Some(name)) }
    }

    /// Forgets a table, or all of them.
    pub(crate) fn clear(&self, table: Option<&str>) -> Vec<Arc<dyn Member>> {
        lock(&self.0).clear(table)
    }

    /// The node became coherent, or ceased to be. Entries from before are not served, except to those who ask for old ones
    /// while it is not.
    ///
    /// And except those of tables that are told by way of the change log. What happened during the gap has been read since, and
    /// applied to what is held, as if there had been no gap: all of that before this, or everything was forgotten
    /// (`Item::Missed`), and with it the word that would be shown again here.
    pub(crate) fn set_coherent(&self, coherent: bool) {
        let mut inner = lock(&self.0);
        inner.coherent = coherent;
        if !coherent {
            inner.turn(None, Before::Stale);
            return;
        }
        let Inner { words, by_name, .. } = &mut *inner;
        for table in by_name.values() {
            let word = words.fresh(table.suspect.is_none());
            let resumes = table.trust.via == Via::Log && table.suspect.is_none();
            for member in &table.members {
                if !(resumes && member.resume()) {
                    member.show(word, Before::Forgotten);
                }
            }
        }
    }

    /// Tells every cache the time. Returns those in which somebody should look for what has expired.
    pub(crate) fn tick(&self, now: Tenths) -> Vec<Arc<dyn Member>> {
        let mut inner = lock(&self.0);
        if inner.ticked == now {
            return Vec::new();
        }
        inner.ticked = now;
        let members = inner.by_name.values().flat_map(|table| &table.members);
        members.filter(|member| member.tick(now)).cloned().collect()
    }

    /// Whether this carries the messages of this table, or of any that is open.
    pub(crate) fn is_told(&self, name: Option<&str>, via: Via) -> bool {
        let inner = lock(&self.0);
        inner.by_name.iter().any(|(table, entry)| name.is_none_or(|name| name == table) && entry.trust.via == via)
    }

    /// Since when, and why, this table is in doubt, if it is.
    pub(crate) fn suspicion(&self, name: &str) -> Option<(Boot, String)> {
        lock(&self.0).by_name.get(name).and_then(|table| table.suspect.clone())
    }

    /// The tables whose triggers must be watched.
    pub(crate) fn names(&self) -> Vec<String> {
        lock(&self.0).by_name.keys().cloned().collect()
    }

    /// Holds a fingerprint against the one on record. On a difference the table is in doubt from here on, and
    /// everything held of it forgotten: triggers may have been off for a while (X21). `Some` when the table
    /// must be verified, with the caches that were cleared.
    pub(crate) fn inspect(&self, name: &str, fingerprint: Option<&str>, now: Boot) -> Option<Vec<Arc<dyn Member>>> {
        let mut inner = lock(&self.0);
        let table = inner.by_name.get_mut(name)?;
        if table.suspect.is_some() {
            return Some(Vec::new());
        }
        if fingerprint == Some(table.trust.fingerprint.as_str()) {
            return None;
        }
        table.suspect = Some((now, "its triggers or its definition changed; they are being verified".into()));
        Some(inner.clear(Some(name)))
    }

    /// The outcome of verifying a table in doubt.
    pub(crate) fn verified(&self, name: &str, outcome: Result<Trust, String>) -> Verified {
        let mut inner = lock(&self.0);
        let Some(table) = inner.by_name.get_mut(name) else { return Verified::Known };
        let problem = match outcome {
            Ok(trust) if trust.key == table.trust.key => {
                table.trust = trust;
                table.suspect = None;
                inner.clear(Some(name));
                return Verified::Whole;
            }
            Ok(trust) => format!("its key was ({}) and is ({}) now; restart the service", table.trust.key, trust.key),
            Err(problem) => problem,
        };
        match &mut table.suspect {
            Some((_, why)) if *why != problem => {
                problem.clone_into(why);
                Verified::Broken(problem)
            }
            _ => Verified::Known,
        }
    }
}

/// What became of a table in doubt.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verified {
    /// It is trusted again.
    Whole,
    /// It stays in doubt, for a reason that was not known before.
    Broken(String),
    /// It stays in doubt.
    Known,
}
