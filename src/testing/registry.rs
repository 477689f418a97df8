//! What nodes find when they open a cache: by its name and its types, in place of a look into the catalogue.

use std::{
    any::{Any, type_name},
    sync::Arc,
    time::Duration,
};

use tokio::time::{sleep, timeout};

use super::{World, chaos::SlowLoad, world::unreachable};
use crate::{
    depends::By,
    digest::Digest,
    error::{Error, Kind, Result},
    key::Key,
    open::{Finding, Found, MakeSource, Opener},
    options::TableOptions,
    postgres::rows::Keeps,
    shared::Shared,
    source::{Digesting, Digests, Loaded, Loading, Received, Source},
    sync::{Mutex, lock},
    tables::On,
};

use super::line::trust;

/// Reads one key: the value, and the number of its version. Runs while nothing can be committed.
pub(super) type Read<K, V> = Arc<dyn Fn(&K) -> Result<Option<(V, u64)>> + Send + Sync>;

/// The caches that can be opened.
#[derive(Default)]
pub(super) struct Registry(Mutex<Vec<Registered>>);

struct Registered {
    name: String,
    /// What messages name, and how its entries depend on that.
    table: String,
    by: By,
    types: [&'static str; 2],
    /// A [`Read`].
    read: Box<dyn Any + Send + Sync>,
    /// What a test writes to it by.
    rows: Arc<dyn Any + Send + Sync>,
}

impl Registry {
    pub(super) fn add<K: Key, V: Send + Sync + 'static>(
        &self,
        name: &str,
        (table, by): (&str, By),
        read: Read<K, V>,
        rows: Arc<dyn Any + Send + Sync>,
    ) {
        let types = [type_name::<K>(), type_name::<V>()];
        let mut all = lock(&self.0);
        all.retain(|it| it.name != name || !it.is_of::<K, V>());
        let (name, table) = (name.to_owned(), table.to_owned());
        all.push(Registered { name, table, by, types, read: Box::new(read), rows });
    }

    /// What a test writes by, if the name is known; an error if that was made with other types.
    pub(super) fn rows<T: Send + Sync + 'static>(&self, name: &str) -> Result<Option<Arc<T>>, String> {
        let all = lock(&self.0);
        let Some(found) = all.iter().find(|it| it.name == name) else { return Ok(None) };
        let others = || format!("{name} was made before, {}", found.of());
        Arc::clone(&found.rows).downcast().map(Some).map_err(|_| others())
    }

    fn find<K: Key, V: Send + Sync + 'static>(&self, asked: &str) -> Result<(String, On, Read<K, V>)> {
        let name = whole(asked);
        let all = lock(&self.0);
        let mut others = Vec::new();
        for it in all.iter().filter(|it| it.name == name) {
            if let Some(read) = it.read.downcast_ref::<Read<K, V>>() {
                return Ok((name, On { table: it.table.clone(), trust: trust(), by: it.by.clone() }, Arc::clone(read)));
            }
            others.push(it.of());
        }
        if others.is_empty() {
            return Err(unknown(&name, all.iter().map(|it| it.name.as_str())));
        }
        let asked = format!("keys of type {} and values of type {}", type_name::<K>(), type_name::<V>());
        let message = format!("{name} is opened with {asked}, and the test database has it {}", others.join(", or "));
        Err(Error::new(Kind::Table, message))
    }
}

impl Registered {
    fn is_of<K: Key, V: Send + Sync + 'static>(&self) -> bool {
        self.read.is::<Read<K, V>>()
    }

    fn of(&self) -> String {
        format!("with keys of type {} and values of type {}", self.types[0], self.types[1])
    }
}

/// The name with its schema, as Postgres finds it.
pub(super) fn whole(name: &str) -> String {
    let table = name.split('(').next().unwrap_or(name);
    if table.contains('.') || table.starts_with("view:") { name.to_owned() } else { format!("public.{name}") }
}

fn unknown<'a>(name: &str, mut known: impl Iterator<Item = &'a str>) -> Error {
    let table = name.split('(').next().unwrap_or(name);
    if let Some(view) = name.strip_prefix("view:") {
        let message = format!("the test database has no view {view}: make it with `Database::view(\"{view}\")`");
        Error::new(Kind::Table, message)
    } else if table != name && known.any(|it| it == table) {
        let message = format!("the test database has no {name}: make it with `TestTable::by` of {table}");
        Error::new(Kind::NotTracked, message)
    } else {
        let message = format!("the test database has no table {table}: make it with `Database::table(\"{table}\")`");
        Error::new(Kind::Table, message)
    }
}

/// How a node finds out about a cache: in its database in memory, if that is what it has.
pub(crate) fn or_in_memory<K: Key, V: Send + Sync + 'static>(
    shared: &Shared,
    name: &str,
    options: &TableOptions,
    find: impl Fn(Opener) -> Finding<K, V> + Send + Sync + 'static,
) -> impl Fn(Opener) -> Finding<K, V> + Send + Sync + 'static {
    let limit = options.load_timeout.unwrap_or(shared.config.load_timeout);
    let (world, asked) = (shared.server.in_memory(), name.to_owned());
    move |opener| match world.clone() {
        None => find(opener),
        Some(world) => {
            let asked = asked.clone();
            Box::pin(async move {
                world.moment()?;
                let (name, on, read) = world.registry.find::<K, V>(&asked)?;
                let source: MakeSource<K, V> =
                    Box::new(move |keeps| Arc::new(MemorySource { world, read, limit, keeps, of: asked }));
                Ok(Found { name, on: vec![on], hashed: None, is_tagged: false, source })
            })
        }
    }
}

/// Where rows come from.
struct MemorySource<K, V> {
    world: Arc<World>,
    read: Read<K, V>,
    limit: Duration,
    keeps: Keeps,
    /// What is being read, for messages.
    of: String,
}

impl<K: Key, V: Send + Sync + 'static> MemorySource<K, V> {
    async fn in_time<T>(&self, reading: impl Future<Output = Result<T>>) -> Result<T> {
        let Self { limit, of, .. } = self;
        let late =
            |_| Err(Error::new(Kind::Timeout, format!("a load of {of} took longer than {limit:?} (`load_timeout`)")));
        timeout(*limit, reading).await.unwrap_or_else(late)
    }

    async fn statement<T>(&self, read: impl FnOnce() -> T) -> Result<(T, crate::source::Stamp)> {
        let SlowLoad { before, after, fails } = self.world.slow_load();
        pause(before).await;
        let answer = self.world.read(read)?;
        self.world.loads.pass().await;
        pause(after).await;
        if fails {
            return Err(unreachable("the test's chaos lets this load fail"));
        }
        // Who answers has to be there until the answer has arrived.
        if Some(self.world.moment()?.incarnation) != answer.1.incarnation {
            return Err(unreachable("the test database was restarted"));
        }
        Ok(answer)
    }

    fn received(&self, version: Option<u64>) -> Received {
        let digest = if self.keeps.digests { digest(version) } else { Digest::UNKNOWN };
        let bytes = if self.keeps.lengths && version.is_some() { size_of::<V>() } else { 0 };
        Received { digest, bytes: u32::try_from(bytes).unwrap_or(u32::MAX), ..Received::default() }
    }
}

async fn pause(time: Duration) {
    if !time.is_zero() {
        sleep(time).await;
    }
}

/// A row's bytes are not known. Its version is as good: another one of the same content was written, and told, too.
fn digest(version: Option<u64>) -> Digest {
    version.map_or(Digest::ABSENT, |version| Digest::of([Some(&version.to_be_bytes()[..])]))
}

impl<K: Key, V: Send + Sync + 'static> Source<K, V> for MemorySource<K, V> {
    fn load<'a>(&'a self, keys: &'a [K]) -> Loading<'a, V> {
        Box::pin(self.in_time(async move {
            let (read, stamp) = self.statement(|| keys.iter().map(|key| (self.read)(key)).collect::<Vec<_>>()).await?;
            let mut loaded = Loaded { stamp, ..Loaded::none() };
            for row in read {
                let version = row.as_ref().ok().and_then(Option::as_ref).map(|(_, version)| *version);
                loaded.received.push(self.received(version));
                loaded.rows.push(row.map(|row| row.map(|(value, _)| value)));
            }
            Ok(loaded)
        }))
    }

    fn load_at_once<'a>(&'a self, keys: &'a [K]) -> Loading<'a, V> {
        self.load(keys)
    }

    fn digests<'a>(&'a self, keys: &'a [K]) -> Digesting<'a> {
        Box::pin(self.in_time(async move {
            let (rows, stamp) = self
                .statement(|| {
                    let version = |key| (self.read)(key).map(|row| row.map(|(_, version)| version));
                    keys.iter().map(version).collect::<Result<Vec<_>>>()
                })
                .await?;
            Ok(Digests { rows: rows?.into_iter().map(digest).collect(), stamp })
        }))
    }
}

/// Fails on a node without Postgres.
pub(crate) fn check_transacts(shared: &Shared) -> Result<()> {
    if shared.server.in_memory().is_none() {
        return Ok(());
    }
    let message = "a test database in memory has no transactions: `Node::begin`, `Table::update` and `Table::modify` send SQL, and need \
                   Postgres; write with `TestTable::put`";
    Err(Error::new(Kind::Config, message))
}
