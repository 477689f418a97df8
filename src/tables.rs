//! The tables of one node as the applier sees them: who must forget what, and whose gate shows what.

use std::collections::HashMap;

use crate::{
    change::{Change, RowKey, Rows},
    gate::{Word, Words},
    sync::{Arc, Mutex, lock},
};

/// One cache of rows of a table, whatever its key and value types.
pub(crate) trait Member: Send + Sync {
    /// Forgets these rows. `false` when a key is not of the cache's key type: then all must be forgotten.
    fn invalidate(&self, keys: &[RowKey]) -> bool;

    /// Moves the gate: forgets everything, at once.
    fn show(&self, word: Word);

    /// Frees the memory of entries that the gate has made unreachable. May drop others with them.
    fn reclaim(&self);
}

/// All tables of a node. Every gate of the node is moved in here, under one lock.
#[derive(Default)]
pub(crate) struct Tables(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    words: Words,
    /// The node may serve entries.
    coherent: bool,
    by_name: HashMap<String, Table>,
}

struct Table {
    /// What the triggers looked like when they were last found to be whole.
    fingerprint: String,
    /// Why this table's triggers are in doubt.
    suspect: Option<String>,
    members: Vec<Arc<dyn Member>>,
}

impl Inner {
    fn clear(&mut self, table: Option<&str>) -> Vec<Arc<dyn Member>> {
        let mut cleared = Vec::new();
        for (name, entry) in &self.by_name {
            if table.is_none_or(|table| table == name) {
                let word = self.words.fresh(self.coherent && entry.suspect.is_none());
                for member in &entry.members {
                    member.show(word);
                    cleared.push(Arc::clone(member));
                }
            }
        }
        cleared
    }
}

impl Tables {
    /// Adds a cache of a table whose triggers were found to be whole, with this fingerprint, *before* any load
    /// of the cache starts: every change that such a load could miss is then a message to come (I1).
    pub(crate) fn add(&self, name: &str, fingerprint: &str, member: Arc<dyn Member>) {
        let mut inner = lock(&self.0);
        let table = inner
            .by_name
            .entry(name.to_owned())
            .or_insert_with(|| Table {
                fingerprint: fingerprint.to_owned(),
                suspect: None,
                members: Vec::new(),
            });
        // A fingerprint that differs from the one on record is judged by the next beat, for all members.
        let trusted = table.suspect.is_none();
        table.members.push(Arc::clone(&member));
        let coherent = inner.coherent && trusted;
        let word = inner.words.fresh(coherent);
        member.show(word);
    }

    /// Applies a change that was received: when this returns, no entry that it touched can be served. Returns
    /// the caches that were cleared, whose memory can be reclaimed.
    pub(crate) fn apply(&self, change: &Change) -> Vec<Arc<dyn Member>> {
        let (Some(name), Rows::Keys(keys)) = (&change.table, &change.rows) else {
            return lock(&self.0).clear(change.table.as_deref());
        };
        let members = match lock(&self.0).by_name.get(name) {
            Some(table) => table.members.clone(),
            None => return Vec::new(),
        };
        let understood = members
            .iter()
            .fold(true, |all, member| member.invalidate(keys) && all);
        if understood {
            Vec::new()
        } else {
            lock(&self.0).clear(Some(name))
        }
    }

    /// Forgets a table, or all of them.
    pub(crate) fn clear(&self, table: Option<&str>) -> Vec<Arc<dyn Member>> {
        lock(&self.0).clear(table)
    }

    /// The node became coherent, or ceased to be: entries from before are forgotten either way.
    pub(crate) fn set_coherent(&self, coherent: bool) {
        let mut inner = lock(&self.0);
        inner.coherent = coherent;
        inner.clear(None);
    }

    /// Whether the node was made coherent, and why this table is in doubt, if it is.
    pub(crate) fn suspicion(&self, name: &str) -> Option<String> {
        lock(&self.0)
            .by_name
            .get(name)
            .and_then(|table| table.suspect.clone())
    }

    /// The tables whose triggers must be watched.
    pub(crate) fn names(&self) -> Vec<String> {
        lock(&self.0).by_name.keys().cloned().collect()
    }

    /// Holds a fingerprint against the one on record. On a difference the table is in doubt from here on, and
    /// everything held of it forgotten: triggers may have been off for a while (X21). Returns whether the table
    /// needs to be verified.
    pub(crate) fn inspect(&self, name: &str, fingerprint: Option<&str>) -> bool {
        let mut inner = lock(&self.0);
        let Some(table) = inner.by_name.get_mut(name) else {
            return false;
        };
        if table.suspect.is_none() {
            if fingerprint == Some(table.fingerprint.as_str()) {
                return false;
            }
            table.suspect =
                Some("its triggers or its definition changed; they are being verified".into());
            inner.clear(Some(name));
        }
        true
    }

    /// The outcome of verifying a table in doubt.
    pub(crate) fn verified(&self, name: &str, outcome: Result<String, String>) {
        let mut inner = lock(&self.0);
        let Some(table) = inner.by_name.get_mut(name) else {
            return;
        };
        match outcome {
            Ok(fingerprint) => {
                table.fingerprint = fingerprint;
                table.suspect = None;
                inner.clear(Some(name));
            }
            Err(problem) => table.suspect = Some(problem),
        }
    }
}
