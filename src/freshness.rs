//! Reads that ask for more than the promise, or for less, and what reads do while the node is not coherent.
//!
//! ```text
//! get_with ── terms: wait for a fence or not; may old entries answer; which running loads will do
//!     └ read ── held, and allowed by the terms ──→ the entry
//!          └ else ask the store, as `get` does
//! ```
//!
//! What each level promises is a lemma; `docs/design.md` has the arguments.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::time::{Instant, timeout_at};

#[cfg(feature = "serve")]
use crate::coherence::Boot;
use crate::{
    error::{Error, Kind, Result},
    fill::Join,
    key::Key,
    shared::{Shared, Whose},
    store::{Answer, Asked, Cached, Entry, Rescue},
    table::Table,
    token::{Token, incarnation_id},
};

/// How fresh the data of one read must be. `W` below is any commit that changed the row.
///
/// All but [`Any`](Self::Any) also keep the promise of [`Table::get`]: a `W` that this node has applied is in what a
/// later read returns, and reads of a key, one after the other, do not go back in time (in the exceptional case of reads of
/// old data while the node is not coherent, they do not go back behind what a read from Postgres has returned).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Freshness {
    /// What [`Table::get`] returns: each `W` that became visible more than [the staleness
    /// bound](crate::Config::staleness_bound) before the read began is in the result; in practice, each older than the time a
    /// notification takes.
    ///
    /// *Costs* nothing. *While the node is not coherent:* as the table's [`Fallback`] says.
    #[default]
    Coherent,
    /// Each `W` that became visible more than this long before the read began is in the result. Counted by the clock at the
    /// time of the read, so it holds to the instant, also right after a suspended process went on.
    ///
    /// *Costs* a look at the clock; a fence as of [`Fenced`](Self::Fenced) if the last one is older. *While the node is
    /// not coherent:* what was held when that began answers until it is this old; then Postgres.
    Within(Duration),
    /// Linearizable: each `W` that was visible before the read began is in the result, whoever committed it and wherever.
    ///
    /// *Costs* waiting for a fence that starts after the call: one round trip to Postgres, shared by all who wait, and one
    /// transaction id of the server. It waits behind commits that notify. Triggers are looked at with each fence, so that
    /// this holds even if somebody has just switched them off. *While the node is not coherent*, it reads Postgres, and
    /// never joins a load that began before the call.
    Fenced,
    /// The transaction that the token names is in the result, and all that were visible when it began to be.
    ///
    /// *Costs* nothing if the last fence already saw the transaction; else a fence. *While the node is not coherent*, it
    /// reads Postgres, and never joins a load that began before the call.
    /// [`is_other_incarnation`](Error::is_other_incarnation) if the token is of another incarnation of the server than the
    /// one that answers: the transaction may have been lost. [`is_token`](Error::is_token) if it has not ended; and, for as
    /// long as more than some 500 transactions are writing at the same time, if it began after the oldest of them: their
    /// list does not fit into a message then.
    AtLeast(Token),
    /// Whatever is held, of whatever age, also while the node is not coherent; Postgres if nothing is.
    ///
    /// *Costs* nothing. What was held before a gap is dropped when the node is coherent again.
    Any,
}

/// What reads of a table do while the node is not coherent, or the table's triggers are in doubt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fallback {
    /// Read Postgres, and keep nothing. Loads are shared, and at most [`loads_max`](crate::Config::loads_max) statements run
    /// at a time.
    #[default]
    Bypass,
    /// Rows that were held when the gap began answer until this long after the last fence was sent; what is not held is
    /// read from Postgres and not kept. So a read may miss commits of the last `max`. A table whose triggers are in doubt has no
    /// such rows: nobody knows since when changes were not told.
    ServeStale {
        /// Counted from when the last fence that came back was sent.
        max: Duration,
    },
    /// Reads fail with [`is_unavailable`](Error::is_unavailable), except those with [`Freshness::Any`] of a row that is held.
    /// For services that would rather be down than send their traffic to Postgres.
    Fail,
}

/// How a read was answered.
#[cfg(feature = "serve")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// From memory.
    Held,
    /// From memory, while the node is not coherent.
    Stale,
    /// From memory, as a load failed or took too long.
    Rescued,
    /// By a load.
    Loaded,
    /// By a load that somebody else had asked for.
    Joined,
}

/// What was read, how, and as of when.
#[cfg(feature = "serve")]
pub(crate) struct Traced<V> {
    pub(crate) row: Option<Cached<V>>,
    pub(crate) way: Way,
    /// Everything that was visible then is in it.
    pub(crate) as_of: Boot,
}

/// What a read accepts.
#[derive(Clone, Copy)]
pub(crate) struct Terms {
    /// Entries will do that a gap has put out of service.
    stale: bool,
    join: Join,
    /// What is returned must be of the incarnation of this token.
    of: Option<Token>,
    /// When what is held will do in place of a load. `None`: never.
    rescue: Option<Rescue>,
    /// When callers of such a table no longer wait for one.
    soft: Option<Instant>,
}

impl Terms {
    const COHERENT: Self = Self { stale: false, join: Join::Running, of: None, rescue: None, soft: None };
    const CURRENT: Self = Self { stale: false, join: Join::Coherent, of: None, rescue: None, soft: None };
}

impl<K: Key, V: Send + Sync + 'static> Table<K, V> {
    /// The row with this key, at least as fresh as asked. `None`: there is no such row.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get), and what the level of [`Freshness`] names.
    ///
    /// # Cancel safety
    ///
    /// As [`get`](Self::get).
    pub async fn get_with(&self, key: &K, freshness: Freshness) -> Result<Option<Cached<V>>> {
        let terms = self.terms(freshness).await?;
        self.read(key, terms).await
    }

    /// The rows with these keys, in the order of the keys, each at least as fresh as asked. They share one fence, if one is
    /// needed. Rows may come from different moments; those of [`snapshot`](Self::snapshot) do not.
    ///
    /// # Errors
    ///
    /// Those of [`get_many`](Self::get_many), and what the level of [`Freshness`] names.
    ///
    /// # Cancel safety
    ///
    /// As [`get`](Self::get).
    pub async fn get_many_with(&self, keys: &[K], freshness: Freshness) -> Result<Vec<Option<Cached<V>>>> {
        self.opened().await?;
        let terms = self.terms(freshness).await?;
        let mut wanted = Vec::new();
        let asked: Result<Vec<_>> = keys.iter().map(|key| self.ask(key, terms, &mut wanted)).collect();
        // Also if one of them was refused: what is wanted is queued already.
        self.start_loads(wanted);
        let asked = asked?;
        let mut rows = Vec::with_capacity(keys.len());
        // From the last one, which is answered last: this task is woken once then, and not by each answer.
        for (key, asked) in keys.iter().zip(asked).rev() {
            rows.push(self.accept(key, asked, terms).await?.0);
        }
        rows.reverse();
        Ok(rows)
    }

    /// As [`get_with`](Self::get_with), and how it was answered, and as of when. That moment is noted before what is held is looked at:
    ///
    /// 1. a reader finds the entry;
    /// 2. a change that was visible for seconds is applied, and after it a fence, which was sent a moment ago;
    /// 3. the reader asks how old the last fence is: a moment. But what he has misses a change that is older.
    #[cfg(feature = "serve")]
    pub(crate) async fn trace(&self, key: &K, freshness: Freshness) -> Result<Traced<V>> {
        let terms = self.terms(freshness).await?;
        self.opened().await?;
        let (now, covered) = self.shared().covered();
        let mut wanted = Vec::new();
        let asked = self.ask(key, terms, &mut wanted)?;
        let (way, as_of) = match &asked {
            Asked::Hit(_) => (self.held_way(), covered),
            // It may have begun long ago; what has been applied since did not concern the key.
            Asked::Wait(_) if wanted.is_empty() => (Way::Joined, covered),
            Asked::Wait(_) => (Way::Loaded, now),
        };
        self.start_loads(wanted);
        let (row, is_rescued) = self.accept(key, asked, terms).await?;
        let (way, as_of) = if is_rescued { (Way::Rescued, covered) } else { (way, as_of) };
        Ok(Traced { row, way, as_of })
    }

    /// What a hit is answered with. `None`: it is none.
    #[cfg(feature = "serve")]
    pub(crate) fn held(&self, key: &K) -> Option<Traced<V>> {
        let (_, as_of) = self.shared().covered();
        let entry = self.store.lookup(key)?;
        Some(Traced { row: Cached::new(entry), way: Way::Held, as_of })
    }

    /// What is held, if everything visible so long ago is in it; also while the node is not coherent.
    #[cfg(feature = "serve")]
    pub(crate) fn held_within(&self, key: &K, limit: Duration) -> Option<Traced<V>> {
        let (now, as_of) = self.shared().covered();
        if now.saturating_sub(as_of) > limit {
            return None;
        }
        let entry = self.store.lookup_stale(key)?;
        Some(Traced { row: Cached::new(entry), way: self.held_way(), as_of })
    }

    /// How what is held answers now.
    #[cfg(feature = "serve")]
    fn held_way(&self) -> Way {
        if self.store.is_coherent() { Way::Held } else { Way::Stale }
    }

    /// The rows with these keys, in the order of the keys, all from one snapshot of the database: if a transaction changed
    /// several of them, all of its changes are in the result, or none. As fresh as [`get_many`](Self::get_many).
    ///
    /// From memory if all are held and a fence has come back since they were loaded. Else what is missing is loaded, and a fence
    /// sent. If changes came in between, and while the node is not coherent: one statement for all keys, which keeps nothing.
    ///
    /// # Errors
    ///
    /// Those of [`get_many`](Self::get_many); a key that Postgres cannot take spoils all of them.
    ///
    /// # Cancel safety
    ///
    /// As [`get`](Self::get).
    pub async fn snapshot(&self, keys: &[K]) -> Result<Vec<Option<Cached<V>>>> {
        if let [key] = keys {
            return Ok(vec![self.get(key).await?]);
        }
        self.opened().await?;
        self.refuse_in_doubt()?;
        if let Some(rows) = self.held_together(keys) {
            return Ok(rows);
        }
        if self.store.is_coherent() {
            self.get_many(keys).await?;
            // Loads see more than what was applied before them; a fence that starts now covers them.
            if self.shared().fence().await.is_ok()
                && let Some(rows) = self.held_together(keys)
            {
                return Ok(rows);
            }
        }
        self.load_together(keys).await
    }

    /// What a read of this freshness accepts, once what it must wait for has happened.
    async fn terms(&self, freshness: Freshness) -> Result<Terms> {
        match freshness {
            Freshness::Coherent => Ok(self.coherent_terms()),
            Freshness::Any => Ok(Terms { stale: true, ..self.coherent_terms() }),
            Freshness::Within(limit) => {
                self.refuse_in_doubt()?;
                // The age is looked at before the entry is: in between, entries can only become fresher.
                if self.shared().age() <= limit {
                    return Ok(Terms { stale: true, ..Terms::CURRENT });
                }
                self.fenced_terms().await
            }
            Freshness::Fenced => self.fenced_terms().await,
            Freshness::AtLeast(token) => {
                self.shared().reach(token).await?;
                Ok(Terms { of: Some(token), ..Terms::CURRENT })
            }
        }
    }

    /// What [`get`](Self::get) accepts.
    pub(crate) fn coherent_terms(&self) -> Terms {
        let rescue = self.store.rescue();
        let soft = rescue.and_then(|rescue| rescue.after).map(|after| Instant::now() + after);
        let terms = Terms { rescue, soft, ..Terms::COHERENT };
        match self.fallback {
            Fallback::ServeStale { max } if !self.store.is_coherent() && self.shared().age() <= max => {
                Terms { stale: true, ..terms }
            }
            // With `Fail`, a miss is refused where it would be loaded.
            Fallback::Bypass | Fallback::ServeStale { .. } | Fallback::Fail => terms,
        }
    }

    /// What is held, in place of a load.
    fn rescued(&self, key: &K, terms: Terms) -> Option<Arc<Entry<V>>> {
        let max = terms.rescue?.max;
        self.store.rescued(key, self.shared().age() <= max)
    }

    async fn fenced_terms(&self) -> Result<Terms> {
        // Without a fence: the gate is closed, or about to be, and who asks gets a load that starts after the call.
        let _ = self.shared().fence().await;
        Ok(Terms::CURRENT)
    }

    /// Fails while the node is not coherent, if the table was opened with [`Fallback::Fail`].
    fn refuse_in_doubt(&self) -> Result<()> {
        // Whoever switches caching off wants reads, from Postgres.
        if self.fallback != Fallback::Fail || self.store.is_coherent() || self.shared().tables.off().is_some() {
            return Ok(());
        }
        self.store.counters.declined.add(1);
        Err(Error::new(
            Kind::Unavailable,
            format!("{} is not read while the node is not coherent (`Fallback::Fail`): {}", self.name(), self.status()),
        ))
    }

    /// Fails while too many keys are asked for that do not exist.
    fn refuse_unknown(&self) -> Result<()> {
        if !self.store.refuses_unknown(|| self.shared().host.now()) {
            return Ok(());
        }
        self.store.counters.declined.add(1);
        Err(Error::new(
            Kind::Throttled,
            format!(
                "what is not held of {} is not read now: more of the keys asked for do not exist than `not_found_max` allows",
                self.name()
            ),
        ))
    }

    /// One row on these terms.
    pub(crate) async fn read(&self, key: &K, terms: Terms) -> Result<Option<Cached<V>>> {
        self.opened().await?;
        let mut wanted = Vec::new();
        let asked = self.ask(key, terms, &mut wanted)?;
        self.start_loads(wanted);
        Ok(self.accept(key, asked, terms).await?.0)
    }

    fn ask(&self, key: &K, terms: Terms, wanted: &mut Vec<K>) -> Result<Asked<V>> {
        let held = if terms.stale { self.store.lookup_stale(key) } else { self.store.lookup(key) };
        if let Some(entry) = held {
            return Ok(Asked::Hit(entry));
        }
        self.refuse_in_doubt()?;
        if let Err(error) = self.refuse_unknown() {
            return self.rescued(key, terms).map(Asked::Hit).ok_or(error);
        }
        Ok(self.store.ask(key, terms.join, wanted))
    }

    /// Waits for the answer, and holds it against the terms. Also whether what is held answered because a load failed or took too long.
    async fn accept(&self, key: &K, asked: Asked<V>, terms: Terms) -> Result<(Option<Cached<V>>, bool)> {
        let held = match (&asked, terms.of) {
            // Entries are of the incarnation that the node listens to.
            (Asked::Hit(_), Some(_)) => self.shared().look(|coherence| coherence.incarnation()),
            _ => None,
        };
        let (Answer { entry, read }, is_rescued) = self.answer_or_rescue(key, asked, terms).await?;
        match terms.of {
            Some(token) if held.or(read).map(incarnation_id) != Some(token.incarnation) => {
                Err(Shared::other_incarnation(token))
            }
            _ => Ok((Cached::new(entry), is_rescued)),
        }
    }

    /// The answer; or, if the load fails or takes longer than callers are to wait, what is held, if there is something.
    async fn answer_or_rescue(&self, key: &K, mut asked: Asked<V>, terms: Terms) -> Result<(Answer<V>, bool)> {
        let rescued = || self.rescued(key, terms).map(|entry| (Answer { entry, read: None }, true));
        let outcome = match (&mut asked, terms.soft) {
            (Asked::Wait(answer), Some(soft)) => match timeout_at(soft, answer).await {
                Ok(outcome) => outcome.unwrap_or_else(|_| Err(self.given_up(key))),
                Err(_) => match rescued() {
                    Some(answer) => return Ok(answer),
                    None => self.answer(key, asked).await,
                },
            },
            _ => self.answer(key, asked).await,
        };
        match outcome {
            Err(error) if error.is_outage() => rescued().ok_or(error),
            outcome => outcome.map(|answer| (answer, false)),
        }
    }

    /// The rows, if all are held and are what one snapshot of the database shows.
    ///
    /// 1. The gate's word, and up to where the log is covered, are noted, in this order.
    /// 2. Each entry is looked up. It is under that word, so no gap lies between. What its load saw is covered: it had been
    ///    applied at 1. Nothing that was applied at 1 is missing (I1). So each entry shows just what had been applied at 1.
    fn held_together(&self, keys: &[K]) -> Option<Vec<Option<Cached<V>>>> {
        let word = self.store.word();
        let covered = self.shared().horizon.covered();
        let held = |key| self.store.peek_used(key).filter(|entry| entry.is_within(word, covered)).map(Cached::new);
        let rows = keys.iter().map(held).collect::<Option<_>>()?;
        self.store.counters.hits(keys.len() as u64);
        Some(rows)
    }

    /// All rows with one statement. Nothing is kept, and what was held of these rows is forgotten: it may be older.
    pub(crate) async fn load_together(&self, keys: &[K]) -> Result<Vec<Option<Cached<V>>>> {
        let mut places: HashMap<&K, usize> = HashMap::with_capacity(keys.len());
        let mut unique: Vec<K> = Vec::with_capacity(keys.len());
        for key in keys {
            places.entry(key).or_insert_with(|| {
                unique.push(key.clone());
                unique.len() - 1
            });
        }
        self.refuse_unknown()?;
        self.store.counters.declined.add(keys.len() as u64);
        let shared = self.shared();
        let loaded = {
            let _turn = shared.loads.acquire().await;
            let began = shared.load_begins();
            let loaded = self.source.load_at_once(&unique).await?;
            if shared.whose(loaded.stamp.incarnation, began) == Whose::Foreign {
                return Err(Shared::foreign());
            }
            loaded
        };
        for key in &unique {
            self.store.invalidate(key);
        }
        let mut rows = Vec::with_capacity(unique.len());
        for row in loaded.rows {
            rows.push(Cached::loaded(row?));
        }
        self.store.found_nothing(rows.iter().filter(|row| row.is_none()).count(), shared.host.now());
        Ok(keys.iter().map(|key| rows[places[key]].clone()).collect())
    }
}

impl Shared {
    /// The time now, and the one before which everything visible is known to have been applied.
    #[cfg(feature = "serve")]
    pub(crate) fn covered(&self) -> (Boot, Boot) {
        let now = self.host.now();
        (now, now.saturating_sub(self.horizon.age(now)))
    }

    /// The time since everything visible was last known to have been applied, now.
    pub(crate) fn age(&self) -> Duration {
        self.horizon.age(self.host.now())
    }
}
