//! Loads rows before anybody asks for them: when a service starts, and again from time to time.
//!
//! In the background, and by the way of every load, so that nothing that changes meanwhile is missed. It waits for the node to be coherent
//! and for the table to be open, however long that takes; while Postgres does not answer it tries again; and it ends when rows
//! would have to go for lack of space.

use std::{
    collections::HashSet,
    fs,
    io::{BufRead as _, BufReader, BufWriter, Write as _},
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{
    sync::watch,
    task::{AbortHandle, spawn_blocking},
    time::sleep,
};

use crate::{
    change::RowKey,
    error::{Error, Kind, Result, with_causes},
    keeper,
    key::Key,
    load::{self, Ahead},
    shared::Shared,
    source::Source,
    store::Store,
    table::Table,
    throttle::Complaint,
};

/// Which rows [`Table::warm_up`] loads, those first that are wanted most, and how often.
#[derive(Clone, Debug)]
#[must_use = "it is for `Table::warm_up`"]
pub struct WarmUp<K> {
    from: From<K>,
    max: Option<usize>,
    every: Option<Duration>,
    query_timeout: Duration,
}

#[derive(Clone, Debug)]
enum From<K> {
    Keys(Vec<K>),
    Query(String),
    Dump(PathBuf),
}

impl<K: Key> WarmUp<K> {
    fn new(from: From<K>) -> Self {
        Self { from, max: None, every: None, query_timeout: Duration::from_mins(1) }
    }

    /// The rows with these keys.
    pub fn keys(keys: impl IntoIterator<Item = K>) -> Self {
        Self::new(From::Keys(keys.into_iter().collect()))
    }

    /// The rows whose keys this query returns: the columns of the key, in its order, and nothing else.
    /// `select id from users order by last_seen_at desc`.
    pub fn query(query: impl Into<String>) -> Self {
        Self::new(From::Query(query.into()))
    }

    /// The rows whose keys [`Table::dump`] has written to this file. If there is none, as at the first start, it loads nothing.
    pub fn dump(path: impl Into<PathBuf>) -> Self {
        Self::new(From::Dump(path.into()))
    }

    /// At most so many rows. Default: as many as the table can hold.
    pub fn at_most(mut self, rows: usize) -> Self {
        self.max = Some(rows);
        self
    }

    /// Again, this long after the last time has ended. What is held is not read. Default: once.
    pub fn every(mut self, pause: Duration) -> Self {
        self.every = Some(pause);
        self
    }

    /// How long the query may take. Default one minute.
    pub fn query_timeout(mut self, limit: Duration) -> Self {
        self.query_timeout = limit;
        self
    }
}

/// How far a [`WarmUp`] has come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct WarmUpProgress {
    /// How often it has ended.
    pub rounds: u64,
    /// Keys to be loaded, this time; `None` while that is not known.
    pub keys: Option<usize>,
    /// Of these: rows that have been loaded.
    pub loaded: usize,
    /// Those that were held already.
    pub held: usize,
    /// Those that could not be loaded. They are left to whoever asks for them.
    pub failed: usize,
    /// It ended before its end, because rows would have had to go for lack of space.
    pub is_full: bool,
    /// What went wrong last.
    pub error: Option<String>,
}

/// A [`WarmUp`] under way. It goes on when this is dropped.
#[derive(Debug)]
pub struct WarmingUp {
    progress: watch::Receiver<WarmUpProgress>,
    task: AbortHandle,
}

impl WarmingUp {
    /// How far it has come.
    #[must_use]
    pub fn progress(&self) -> WarmUpProgress {
        self.progress.borrow().clone()
    }

    /// Returns when it has ended for the first time, or was stopped, and what came of it.
    ///
    /// # Cancel safety
    ///
    /// Cancelling stops nothing.
    pub async fn finished(&mut self) -> WarmUpProgress {
        // An error: it has ended without that.
        let _ = self.progress.wait_for(|progress| progress.rounds > 0).await;
        self.progress()
    }

    /// Ends it. Loads under way go on.
    pub fn stop(&self) {
        self.task.abort();
    }
}

impl<K: Key, V: Send + Sync + 'static> Table<K, V> {
    /// Loads rows in the background, before anybody asks for them. It waits until the node is coherent, goes on after gaps,
    /// and fails nobody: not a service whose database is not there yet either ([`Node::launch`](crate::Node::launch)).
    ///
    /// At most [`load_keys_max`](crate::Config::load_keys_max) keys go out at a time, as one statement.
    ///
    /// ```no_run
    /// # use rowcache::{Table, WarmUp};
    /// # fn example(users: Table<i64, (i64, String)>) {
    /// // Those of the last run, until then the latest ones. `users.dump("users.keys").await?` writes them.
    /// users.warm_up(WarmUp::dump("users.keys"));
    /// users.warm_up(WarmUp::query("select id from users order by last_seen_at desc").at_most(10_000));
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    #[expect(clippy::must_use_candidate, reason = "it goes on by itself")]
    pub fn warm_up(&self, what: WarmUp<K>) -> WarmingUp {
        let (say, progress) = watch::channel(WarmUpProgress::default());
        let warmer = Warmer {
            store: Arc::downgrade(&self.store),
            source: Arc::clone(&self.source),
            shared: Arc::clone(self.shared()),
            name: self.name().to_owned(),
            say,
        };
        let pending = self.pending_open();
        let task = tokio::spawn(async move {
            let mut stopping = warmer.shared.stopping();
            tokio::select! {
                biased;
                _ = stopping.wait_for(|stopping| *stopping) => {}
                () = async {
                    if let Some(pending) = pending {
                        pending.whenever_open().await;
                    }
                    warmer.run(what).await;
                } => {}
            }
        });
        WarmingUp { progress, task: task.abort_handle() }
    }

    /// Writes the keys of what is held to a file, those used most first, for [`WarmUp::dump`] at the next start. No values: those
    /// would have to be read again before they could be trusted. The file is there as a whole or not at all, and for
    /// its owner alone. Returns how many.
    ///
    /// # Errors
    ///
    /// [`is_config`](Error::is_config): it cannot be written, or messages show keys of this table as hashes, because they are secrets.
    ///
    /// # Cancel safety
    ///
    /// Cancelling leaves the file as it was, or as it should be, and perhaps a temporary one beside it.
    pub async fn dump(&self, path: impl AsRef<Path>) -> Result<usize> {
        if self.store.hashed().is_some() {
            let message = format!("the keys of {} are secrets, which are not written to files", self.name());
            return Err(Error::new(Kind::Config, message));
        }
        let (store, path, name) = (Arc::clone(&self.store), path.as_ref().to_owned(), self.name().to_owned());
        let written = spawn_blocking(move || {
            let keys = store.used_most();
            write(&path, &name, &keys).map(|()| keys.len()).map_err(|error| {
                Error::with(Kind::Config, format!("the keys of {name} cannot be written to {}", path.display()), error)
            })
        });
        written.await.unwrap_or_else(|_| Err(Error::new(Kind::Closed, "the runtime was shut down")))
    }
}

/// Whoever loads.
struct Warmer<K: Key, V: Send + Sync + 'static> {
    store: Weak<Store<K, V>>,
    source: Arc<dyn Source<K, V>>,
    shared: Arc<Shared>,
    name: String,
    say: watch::Sender<WarmUpProgress>,
}

impl<K: Key, V: Send + Sync + 'static> Warmer<K, V> {
    async fn run(&self, what: WarmUp<K>) {
        loop {
            let rounds = self.say.borrow().rounds;
            self.say.send_replace(WarmUpProgress { rounds, ..WarmUpProgress::default() });
            if self.round(&what).await.is_none() {
                return;
            }
            self.say.send_modify(|it| it.rounds += 1);
            tracing::info!(table = self.name, progress = ?self.say.borrow(), "warmed up");
            match what.every {
                Some(pause) => sleep(pause).await,
                None => return,
            }
        }
    }

    /// `None`: the cache is gone.
    async fn round(&self, what: &WarmUp<K>) -> Option<()> {
        let keys = self.keys(what).await?;
        self.say.send_modify(|it| it.keys = Some(keys.len()));
        let evicted = self.store.upgrade()?.stats().evicted;
        let mut pauses = keeper::pauses(&self.shared);
        let mut batches = keys.chunks(self.shared.config.load_keys_max);
        let mut next = batches.next();
        while let Some(batch) = next {
            let store = self.coherent().await?;
            if store.stats().evicted > evicted {
                self.say.send_modify(|it| it.is_full = true);
                break;
            }
            let Ahead { held, loaded, failed } = load::ahead(&store, &self.source, &self.shared, batch).await;
            match failed {
                Some((_, error)) if is_passing(&error) => {
                    self.say.send_modify(|it| it.error = Some(with_causes(&error)));
                    sleep(pauses.next().unwrap_or(keeper::PAUSE_MAX)).await;
                    continue;
                }
                failed => self.say.send_modify(|it| {
                    it.held += held;
                    it.loaded += loaded;
                    if let Some((count, error)) = failed {
                        it.failed += count;
                        it.error = Some(with_causes(&error));
                    }
                }),
            }
            pauses = keeper::pauses(&self.shared);
            next = batches.next();
        }
        Some(())
    }

    /// Each once, in their order.
    async fn keys(&self, what: &WarmUp<K>) -> Option<Vec<K>> {
        let mut pauses = keeper::pauses(&self.shared);
        let mut complaint = Complaint::default();
        let (keys, max) = loop {
            let max = what.max.unwrap_or(usize::MAX).min(self.coherent().await?.room());
            let listed = match &what.from {
                From::Keys(keys) => Ok(keys.clone()),
                From::Query(query) => self.source.keys(query, max, what.query_timeout).await,
                From::Dump(path) => self.dumped(path).await,
            };
            let error = match listed {
                Ok(keys) => break (keys, max),
                Err(error) => error,
            };
            let text = with_causes(&error);
            self.say.send_modify(|it| it.error = Some(text.clone()));
            if complaint.is_news(&text, self.shared.host.now()) {
                tracing::warn!(table = self.name, error = text, "cannot tell which rows to warm up");
            }
            if !is_passing(&error) {
                return Some(Vec::new());
            }
            sleep(pauses.next().unwrap_or(keeper::PAUSE_MAX)).await;
        };
        let mut seen = HashSet::with_capacity(keys.len().min(max));
        let mut keys: Vec<K> = keys.into_iter().filter(|key| seen.insert(key.clone())).collect();
        keys.truncate(max);
        Some(keys)
    }

    async fn dumped(&self, path: &Path) -> Result<Vec<K>> {
        let (path, name) = (path.to_owned(), self.name.clone());
        let read = spawn_blocking(move || {
            read(&path, &name).map_err(|error| {
                Error::with(Kind::Config, format!("the keys of {name} cannot be read from {}", path.display()), error)
            })
        });
        read.await.unwrap_or_else(|_| Err(Error::new(Kind::Closed, "the runtime was shut down")))
    }

    /// The store, once what is loaded would be kept. `None`: it is gone.
    async fn coherent(&self) -> Option<Arc<Store<K, V>>> {
        loop {
            self.shared.until_coherent().await.ok()?;
            let store = self.store.upgrade()?;
            if store.is_coherent() {
                return Some(store);
            }
            drop(store);
            // Its triggers are in doubt, or caching is switched off, and nobody tells when that ends.
            sleep(self.shared.config.beat).await;
        }
    }
}

/// Whether another try may succeed.
fn is_passing(error: &Error) -> bool {
    error.is_unavailable() || error.is_timeout() || error.is_throttled()
}

/// The first line of a file of keys; the others are keys, as messages show them.
#[derive(Debug, Deserialize, PartialEq, Eq, Serialize)]
struct Head {
    /// The format.
    rowcache_keys: u32,
    table: String,
}

impl Head {
    fn of(table: &str) -> Self {
        Self { rowcache_keys: 1, table: table.to_owned() }
    }
}

fn write<K: Key>(path: &Path, table: &str, keys: &[K]) -> std::io::Result<()> {
    let directory = path.parent().filter(|it| !it.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().ok_or(std::io::ErrorKind::InvalidInput)?;
    let beside = directory.join(format!(".{}.{}", name.to_string_lossy(), std::process::id()));
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = BufWriter::new(options.open(&beside)?);
    serde_json::to_writer(&mut file, &Head::of(table))?;
    for key in keys {
        file.write_all(b"\n")?;
        serde_json::to_writer(&mut file, &RowKey::new(&key.to_parts()))?;
    }
    file.write_all(b"\n")?;
    file.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()?;
    fs::rename(&beside, path)
}

fn read<K: Key>(path: &Path, table: &str) -> std::io::Result<Vec<K>> {
    let wrong = |what: String| std::io::Error::new(std::io::ErrorKind::InvalidData, what);
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut lines = BufReader::new(file).lines();
    let head: Head = serde_json::from_str(&lines.next().unwrap_or_else(|| Ok(String::new()))?)
        .map_err(|_| wrong("it is not a file that `Table::dump` has written".into()))?;
    if head != Head::of(table) {
        return Err(wrong(format!("it has keys of {}, in format {}", head.table, head.rowcache_keys)));
    }
    let key = |line: String| {
        let key: RowKey = serde_json::from_str(&line).map_err(|_| wrong(format!("{line} is no key")))?;
        K::from_parts(key.parts()).ok_or_else(|| wrong(format!("{line} is no key of {table}")))
    };
    lines.map(|line| key(line?)).collect()
}
