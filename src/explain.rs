//! Why a row is held, or is not.

use std::{fmt, time::Duration};

use crate::{
    digest::Tenths,
    journal::{TableEvent, TableEvents},
    key::{self, Key},
    status::Status,
    store::Entry,
    table::Table,
    tags::Tag,
};

/// What this node knows of one key: made by [`Table::explain`]. Its [`Display`](fmt::Display) is for people.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Explanation<K> {
    /// The cache, as of [`Table::name`].
    pub table: String,
    /// The key.
    pub key: K,
    /// What is held; `None`: nothing.
    pub held: Option<Held>,
    /// A load is under way.
    pub is_loading: bool,
    /// It is [pinned](Table::pin).
    pub is_pinned: bool,
    /// What it depends on beside its key, if its loader says so.
    pub tags: Vec<Tag>,
    /// Of the table; `None`: it depends on none.
    pub status: Option<Status>,
    /// What last took it away, and how long ago; `None`: nothing among the last
    /// [`history`](crate::TableOptions::history) events that took something away.
    pub last: Option<(Duration, TableEvent<K>)>,
    /// Messages show keys of this table as hashes: it is not printed.
    hides_key: bool,
}

/// What is held of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Held {
    /// A row; or that there is none.
    pub is_row: bool,
    /// Reads are given it.
    pub is_served: bool,
    /// How long ago its load started, in tenths of a second.
    pub age: Duration,
    /// Its load saw only commits that were logged before this position of the server's log; `None` if somebody has put it in.
    pub seen_to: Option<u64>,
    /// A fence has come back since: what the load saw has all been applied here.
    pub is_fenced: bool,
    /// When it expires; `None`: never, or it has.
    pub expires_in: Option<Duration>,
}

impl<K: Key, V: Send + Sync + 'static> Table<K, V> {
    /// Why this row is held, or is not: when it was loaded and what that load saw, or what took it away. Asks nobody, and counts as nothing.
    ///
    /// ```no_run
    /// # fn example(users: rowcache::Table<i64, (i64, String)>) {
    /// println!("{}", users.explain(&42));
    /// // public.users 42 is not held: forgotten 0.3 s ago by a change of public.users by transaction 7731.
    /// # }
    /// ```
    #[must_use]
    pub fn explain(&self, key: &K) -> Explanation<K> {
        let store = &self.store;
        let now = Tenths::at(self.shared().host.now());
        let covered = self.shared().horizon.covered();
        let held = store.look(key).map(|(entry, is_served)| describe(&entry, is_served, now, covered));
        let is_held = held.is_some();
        let last = store.journal.last(|event| event.ends(key));
        Explanation {
            table: self.name().to_owned(),
            key: key.clone(),
            held,
            is_loading: store.is_loading(key),
            is_pinned: store.is_pinned(key),
            tags: if is_held { store.tags_of(key) } else { Vec::new() },
            status: Some(self.status()),
            last: last.map(|(at, event)| (now.since(at), event)),
            hides_key: store.hashed().is_some(),
        }
    }

    /// Follows what happens to the entries of this table on this node, hits apart, from now on. A subscriber who is more than
    /// [`Config::events_max`](crate::Config::events_max) behind is told how much he missed. While there is none, nothing is
    /// written down but what takes entries away.
    ///
    /// ```no_run
    /// # async fn example(users: rowcache::Table<i64, (i64, String)>) {
    /// let mut events = users.subscribe();
    /// while let Some(event) = events.recv().await {
    ///     println!("{event:?}");
    /// }
    /// # }
    /// ```
    #[must_use]
    pub fn subscribe(&self) -> TableEvents<K> {
        TableEvents::new(&self.store.journal, self.shared().stopping())
    }
}

fn describe<V>(entry: &Entry<V>, is_served: bool, now: Tenths, covered: u64) -> Held {
    let lsn = entry.lsn();
    Held {
        is_row: entry.is_row(),
        is_served,
        age: now.since(entry.loaded_at()),
        seen_to: (lsn < u64::MAX).then_some(lsn),
        is_fenced: lsn <= covered,
        expires_in: entry.expires_at().filter(|until| *until > now).map(|until| until.since(now)),
    }
}

impl<K: Key> fmt::Display for Explanation<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = if self.hides_key { "(a secret)".to_owned() } else { key::display(&self.key.to_parts()) };
        write!(f, "{} {key} is ", self.table)?;
        if let Some(held) = &self.held {
            write!(f, "{held}")?;
        } else {
            f.write_str("not held: ")?;
            match &self.last {
                Some((ago, event)) => write!(f, "{} {:.1} s ago", by(event), ago.as_secs_f64())?,
                None => f.write_str("nobody asked for it, or that is too long ago")?,
            }
        }
        if self.is_loading {
            f.write_str("; a load is under way")?;
        }
        if self.is_pinned {
            f.write_str("; pinned")?;
        }
        if !self.tags.is_empty() {
            let tags: Vec<String> = self.tags.iter().map(ToString::to_string).collect();
            write!(f, "; tagged with {}", tags.join(", "))?;
        }
        if let Some(status @ Status::Bypassed { .. }) = &self.status {
            write!(f, "; {status}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = if self.is_row { "held" } else { "held as absent" };
        let served = if self.is_served { "" } else { ", and not served" };
        write!(f, "{what}{served}: ")?;
        match self.seen_to {
            Some(lsn) => {
                write!(
                    f,
                    "loaded {:.1} s ago, up to {:X}/{:X} of the log",
                    self.age.as_secs_f64(),
                    lsn >> 32,
                    lsn & 0xFFFF_FFFF
                )?;
                f.write_str(if self.is_fenced { ", and fenced since" } else { ", and not fenced yet" })?;
            }
            None => write!(f, "put in {:.1} s ago", self.age.as_secs_f64())?,
        }
        match self.expires_in {
            Some(left) => write!(f, "; it expires in {:.0} s", left.as_secs_f64()),
            None => Ok(()),
        }
    }
}

fn by<K>(event: &TableEvent<K>) -> String {
    match event {
        TableEvent::Invalidated { by, .. } => format!("forgotten because of {by}"),
        TableEvent::Cleared { by } => format!("forgotten with all others because of {by}"),
        TableEvent::Expired { .. } => "it expired".into(),
        TableEvent::Evicted { .. } => "evicted for lack of space".into(),
        _ => "forgotten with all others, because of a gap or doubt,".into(),
    }
}
