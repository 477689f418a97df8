//! The tables of one node as the applier sees them: who must forget what, and whose gate shows what.

use std::collections::BTreeMap;

use crate::{
    change::{Change, Mark, RowKey, Rows},
    coherence::Boot,
    depends::{By, Touched},
    digest::Tenths,
    gate::{Before, Word, Words},
    hashed::KeyHash,
    stats::Stats,
    sync::{Arc, Mutex, lock},
    tags::Tag,
};

/// One cache, of the rows of a table or of a view, whatever its key and value types.
pub(crate) trait Member: Send + Sync {
    /// Forgets these rows, which have changed. `false` when a key is not of the cache's key type: then all must be forgotten.
    fn invalidate(&self, keys: &[RowKey], by: &Change) -> bool;

    /// Forgets the rows whose keys have these hashes. `false` when they are not under the secret that the cache has.
    fn invalidate_hashed(&self, secret: &str, hashes: &[KeyHash], by: &Change) -> bool;

    /// Forgets the entries that have these tags.
    fn invalidate_tags(&self, tags: &[Tag], by: &Change);

    /// Moves the gate: forgets everything, at once.
    fn show(&self, word: Word, before: Before);

    /// Writes down that the gate was moved, and why. `None`: not by a message.
    fn note_turn(&self, _from: Word, _by: Option<&Change>) {}

    /// What the gate shows.
    fn shown(&self) -> Word;

    /// Puts what a gap has put out of service back into it. `false`: there is nothing of that kind.
    fn resume(&self) -> bool;

    /// A fence counts that was sent then, when the database was so far. The gate stands still meanwhile.
    fn advance(&self, _sent: Boot, _mark: &Mark) {}

    /// What it holds, and what it has counted.
    fn figures(&self) -> Stats {
        Stats::default()
    }

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

/// A table that a cache depends on, with what it looked like when its triggers were found to be whole.
#[derive(Clone, Debug)]
pub(crate) struct On {
    pub(crate) table: String,
    pub(crate) trust: Trust,
    pub(crate) by: By,
}

/// All tables of a node, and the caches that depend on them. Every gate of the node is moved in here, under one lock.
#[derive(Default)]
pub(crate) struct Tables(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    words: Words,
    /// The node may serve entries.
    coherent: bool,
    /// Since when it does not all the same, because somebody has switched that off.
    off: Option<Boot>,
    /// It has been shut down.
    shut: bool,
    /// What time the caches were told.
    ticked: Tenths,
    /// In an order that is the same in each run.
    by_name: BTreeMap<String, Table>,
    caches: Vec<Cache>,
}

struct Table {
    /// What it looked like when its triggers were last found to be whole.
    trust: Trust,
    /// Since when, and why, this table's triggers are in doubt.
    suspect: Option<(Boot, String)>,
}

/// A cache, and what it depends on.
struct Cache {
    /// Of its table, or its own: messages name it, too.
    name: String,
    on: Vec<(String, By)>,
    member: Arc<dyn Member>,
}

/// Which caches serve.
#[derive(Clone, Copy)]
struct Serves {
    tables: bool,
    local: bool,
}

impl Serves {
    fn of(self, cache: &Cache) -> bool {
        if cache.is_local() { self.local } else { self.tables }
    }
}

impl Cache {
    /// It depends on no table: only the service itself knows when what it holds is wrong.
    fn is_local(&self) -> bool {
        self.on.is_empty()
    }

    /// How it depends on a table, each time that it does; or on what is said of itself.
    fn depends<'a>(&'a self, table: &'a str) -> impl Iterator<Item = &'a By> {
        let own = (self.name == table && self.on.iter().all(|(on, _)| on != table)).then_some(&By::Key);
        own.into_iter().chain(self.on.iter().filter(move |(on, _)| on == table).map(|(_, by)| by))
    }

    /// The tables that it depends on.
    fn tables<'a>(&'a self, by_name: &'a BTreeMap<String, Table>) -> impl Iterator<Item = &'a Table> {
        self.on.iter().map(|(table, _)| &by_name[table])
    }

    /// Whether none of them is in doubt: not only the one because of which its gate is moved.
    fn is_trusted(&self, by_name: &BTreeMap<String, Table>) -> bool {
        self.tables(by_name).all(|table| table.suspect.is_none())
    }

    /// Whether all that changes them comes by way of the change log, and nothing is in doubt.
    fn is_told_again(&self, by_name: &BTreeMap<String, Table>) -> bool {
        self.is_trusted(by_name) && self.tables(by_name).all(|table| table.trust.via == Via::Log)
    }
}

impl Inner {
    /// Whether caches that depend on tables serve, those that depend on none, or both.
    fn serves(&self) -> Serves {
        let on = self.off.is_none() && !self.shut;
        Serves { tables: self.coherent && on, local: on }
    }

    /// Forgets what depends on a table, or on any.
    fn clear(&mut self, table: Option<&str>, by: Option<&Change>) -> Vec<Arc<dyn Member>> {
        let is_told = |cache: &Cache| match table {
            Some(table) => cache.depends(table).next().is_some(),
            None => !cache.is_local(),
        };
        self.turn(is_told, Before::Forgotten, by)
    }

    fn turn(&mut self, which: impl Fn(&Cache) -> bool, before: Before, by: Option<&Change>) -> Vec<Arc<dyn Member>> {
        let mut turned = Vec::new();
        let serves = self.serves();
        let Self { words, by_name, caches, .. } = self;
        for cache in caches.iter().filter(|cache| which(cache)) {
            let word = words.fresh(serves.of(cache) && cache.is_trusted(by_name));
            let from = cache.member.shown();
            cache.member.show(word, before);
            cache.member.note_turn(from, by);
            turned.push(Arc::clone(&cache.member));
        }
        turned
    }
}

impl Inner {
    /// The table of this name; or those that the cache of this name depends on.
    fn tables_of<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (&'a str, &'a Table)> {
        let itself = self.by_name.get_key_value(name);
        let cache = self.caches.iter().find(|cache| itself.is_none() && cache.name == name);
        let others =
            cache.into_iter().flat_map(|cache| &cache.on).filter_map(|(table, _)| self.by_name.get_key_value(table));
        itself.into_iter().chain(others).map(|(name, table)| (name.as_str(), table))
    }
}

impl Tables {
    /// Adds a cache of a table whose triggers were found to be whole. See [`add_on`](Self::add_on).
    #[cfg(any(test, fuzzing, feature = "verify"))]
    pub(crate) fn add(&self, name: &str, trust: Trust, member: &Arc<dyn Member>) {
        self.add_on(name, vec![On { table: name.to_owned(), trust, by: By::Key }], member);
    }

    /// Adds a cache that depends on tables whose triggers were found to be whole, *before* any load of the cache starts:
    /// every change that such a load could miss is then a message to come (I1).
    pub(crate) fn add_on(&self, name: &str, on: Vec<On>, member: &Arc<dyn Member>) {
        let mut inner = lock(&self.0);
        let mut depends = Vec::new();
        for On { table, trust, by } in on {
            // If it looks different from what is on record, the next beat puts all that depends on it in doubt.
            inner.by_name.entry(table.clone()).or_insert_with(|| Table { trust, suspect: None });
            depends.push((table, by));
        }
        let cache = Cache { name: name.to_owned(), on: depends, member: Arc::clone(member) };
        let coherent = inner.serves().of(&cache) && cache.is_trusted(&inner.by_name);
        let word = inner.words.fresh(coherent);
        member.show(word, Before::Forgotten);
        inner.caches.push(cache);
    }

    /// What a cache was added on.
    pub(crate) fn dependencies(&self, member: &Arc<dyn Member>) -> Vec<(String, By)> {
        let inner = lock(&self.0);
        let cache = inner.caches.iter().find(|cache| Arc::ptr_eq(&cache.member, member));
        cache.map(|cache| cache.on.clone()).unwrap_or_default()
    }

    /// Applies a change that was received: when this returns, no entry that it touched can be served. Returns
    /// the caches that were cleared, whose memory can be reclaimed.
    pub(crate) fn apply(&self, change: &Change) -> Vec<Arc<dyn Member>> {
        let (Some(name), false) = (&change.table, change.rows == Rows::All) else {
            return lock(&self.0).clear(change.table.as_deref(), Some(change));
        };
        let told: Vec<(Arc<dyn Member>, By)> = {
            let inner = lock(&self.0);
            let by = |cache: &Cache| {
                cache.depends(name).cloned().map(|by| (Arc::clone(&cache.member), by)).collect::<Vec<_>>()
            };
            inner.caches.iter().flat_map(by).collect()
        };
        // Who does not understand forgets everything.
        let mut lost: Vec<Arc<dyn Member>> = Vec::new();
        for (member, by) in told {
            let understood = match by.touched(change) {
                Touched::Keys(keys) => member.invalidate(&keys, change),
                Touched::Hashed(secret, hashes) => member.invalidate_hashed(secret, hashes, change),
                Touched::Tags(tags) => {
                    member.invalidate_tags(&tags, change);
                    true
                }
                Touched::All => false,
            };
            if !understood {
                lost.push(member);
            }
        }
        if lost.is_empty() {
            return lost;
        }
        let is_lost = |cache: &Cache| lost.iter().any(|member| Arc::ptr_eq(member, &cache.member));
        lock(&self.0).turn(is_lost, Before::Forgotten, Some(change))
    }

    /// Forgets a table, or all of them.
    pub(crate) fn clear(&self, table: Option<&str>) -> Vec<Arc<dyn Member>> {
        lock(&self.0).clear(table, None)
    }

    /// The node became coherent, or ceased to be. Entries from before are not served, except to those who ask for old ones
    /// while it is not.
    ///
    /// And except those of caches that are told by way of the change log alone. What happened during the gap has been read since, and
    /// applied to what is held, as if there had been no gap: all of that before this, or everything was forgotten
    /// (`Item::Missed`), and with it the word that would be shown again here.
    pub(crate) fn set_coherent(&self, coherent: bool) {
        let mut inner = lock(&self.0);
        inner.coherent = coherent;
        if inner.off.is_some() {
            // Nothing is held, nothing is served, and nothing resumed.
            return;
        }
        if !coherent {
            inner.turn(|cache| !cache.is_local(), Before::Stale, None);
            return;
        }
        let Inner { words, by_name, caches, .. } = &mut *inner;
        for cache in caches.iter().filter(|cache| !cache.is_local()) {
            let (resumes, from) = (cache.is_told_again(by_name), cache.member.shown());
            if !(resumes && cache.member.resume()) {
                cache.member.show(words.fresh(cache.is_trusted(by_name)), Before::Forgotten);
            }
            cache.member.note_turn(from, None);
        }
    }

    /// Serves nothing and keeps nothing, from now on; or no longer so (`None`). Messages go on to be applied. Returns the caches that
    /// were cleared.
    pub(crate) fn switch_off(&self, off: Option<Boot>) -> Vec<Arc<dyn Member>> {
        let mut inner = lock(&self.0);
        if inner.off.is_some() == off.is_some() {
            return Vec::new();
        }
        inner.off = off;
        inner.turn(|_| true, Before::Forgotten, None)
    }

    /// Serves nothing any more, not even what is old.
    pub(crate) fn shut(&self) {
        let mut inner = lock(&self.0);
        inner.shut = true;
        inner.turn(|_| true, Before::Forgotten, None);
    }

    /// Since when it has been switched off.
    pub(crate) fn off(&self) -> Option<Boot> {
        lock(&self.0).off
    }

    /// A fence counts.
    pub(crate) fn advance(&self, sent: Boot, mark: &Mark) {
        let inner = lock(&self.0);
        inner.caches.iter().for_each(|cache| cache.member.advance(sent, mark));
    }

    /// What each cache has counted, and whether it serves.
    pub(crate) fn figures(&self) -> Vec<(String, bool, Stats)> {
        let caches: Vec<_> = {
            let inner = lock(&self.0);
            inner.caches.iter().map(|cache| (cache.name.clone(), Arc::clone(&cache.member))).collect()
        };
        caches.into_iter().map(|(name, it)| (name, it.shown().is_coherent(), it.figures())).collect()
    }

    /// Tells every cache the time. Returns those in which somebody should look for what has expired.
    pub(crate) fn tick(&self, now: Tenths) -> Vec<Arc<dyn Member>> {
        let mut inner = lock(&self.0);
        if inner.ticked == now {
            return Vec::new();
        }
        inner.ticked = now;
        let members = inner.caches.iter().map(|cache| &cache.member);
        members.filter(|member| member.tick(now)).cloned().collect()
    }

    /// Whether this carries the messages of this table, of one that the cache of this name depends on, or of any that is open.
    pub(crate) fn is_told(&self, name: Option<&str>, via: Via) -> bool {
        let inner = lock(&self.0);
        let Some(name) = name else { return inner.by_name.values().any(|table| table.trust.via == via) };
        inner.tables_of(name).any(|(_, table)| table.trust.via == via)
    }

    /// Since when, and why, this table is in doubt, if it is; or one that the cache of this name depends on.
    pub(crate) fn suspicion(&self, name: &str) -> Option<(Boot, String)> {
        let inner = lock(&self.0);
        inner.tables_of(name).find_map(|(table, entry)| {
            let (since, why) = entry.suspect.clone()?;
            Some((since, if table == name { why } else { format!("{table}: {why}") }))
        })
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
        Some(inner.clear(Some(name), None))
    }

    /// The outcome of verifying a table in doubt.
    pub(crate) fn verified(&self, name: &str, outcome: Result<Trust, String>) -> Verified {
        let mut inner = lock(&self.0);
        let Some(table) = inner.by_name.get_mut(name) else { return Verified::Known };
        let problem = match outcome {
            Ok(trust) if trust.key == table.trust.key => {
                table.trust = trust;
                table.suspect = None;
                inner.clear(Some(name), None);
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

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use crate::store::{Bounds, Limits, Store};

    #[test]
    fn what_is_switched_off_stays_off_whatever_the_line_does() {
        let tables = Tables::default();
        let limits = Limits { runners_max: 1, batch_max: 1 };
        let open = |name: &str| {
            let store = Arc::new(Store::<i64, u8>::new(Bounds::rows::<i64, u8>(8), limits, None));
            tables.add(name, Trust { via: Via::Log, ..Trust::default() }, &(Arc::clone(&store) as Arc<dyn Member>));
            store
        };
        let store = open("t");
        tables.set_coherent(true);
        assert!(store.is_coherent());
        assert_eq!(tables.switch_off(Some(Boot::ZERO)).len(), 1);
        assert!(tables.switch_off(Some(Boot::ZERO)).is_empty(), "it is off already");
        for line in [false, true] {
            tables.set_coherent(line);
            assert!(!store.is_coherent() && !open("u").is_coherent());
        }
        tables.clear(None);
        assert!(!store.is_coherent());
        tables.switch_off(None);
        assert!(store.is_coherent());
    }
}
