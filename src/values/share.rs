//! How shared values are opened.

use std::{marker::PhantomData, sync::Arc, time::Duration};

use tokio::sync::mpsc;

use super::{
    Common, Core, Counters, SharedValues,
    codec::{Codec, Json},
    keeper::Keeper,
    stored::{SharedValue, Stored},
};
use crate::{
    error::{Error, Kind, Result},
    key::Key,
    node::Node,
    options::{OnChange, TableOptions},
    postgres::values::{self, Lives, Statements},
};

/// Shared values that are about to be opened: made by [`Node::shared`].
#[must_use = "nothing is shared until it is opened"]
#[derive(Debug)]
pub struct Share<'n, K, V, C = Json> {
    node: &'n Node,
    name: String,
    options: TableOptions,
    lives: Lives,
    lease: Duration,
    timeout: Duration,
    bytes_max: usize,
    logged: bool,
    types: PhantomData<fn(K) -> (V, C)>,
}

impl Node {
    /// Values that are no rows, shared by all nodes: permissions that take half a second to compute, answers of another service, sessions. They
    /// are kept in a table `rowcache.shared_<name>`, and held in the memory of each node that reads them.
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # #[derive(serde::Serialize, serde::Deserialize)] struct Permissions(Vec<String>);
    /// # async fn compute(user: i64) -> std::io::Result<Permissions> { Ok(Permissions(Vec::new())) }
    /// # async fn example(node: rowcache::Node) -> rowcache::Result<()> {
    /// let permissions = node.shared::<i64, Permissions>("permissions").ttl(Duration::from_secs(3600)).open().await?;
    ///
    /// // From memory; or what another node has computed; or computed now, by one node, for all who ask.
    /// let mine = permissions.fetch_or_store(&42, || compute(42)).await?;
    ///
    /// // Computed anew by whoever asks next, on whichever node.
    /// permissions.delete(&42).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// A name has up to 40 lower-case letters, digits and underscores.
    pub fn shared<K: Key, V: Send + Sync + Unpin + 'static>(&self, name: &str) -> Share<'_, K, V> {
        Share {
            node: self,
            name: name.to_owned(),
            options: TableOptions::default(),
            lives: Lives::default(),
            lease: Duration::from_secs(5),
            timeout: Duration::from_secs(30),
            bytes_max: 8 << 20,
            logged: false,
            types: PhantomData,
        }
    }
}

impl<'n, K: Key, V: Send + Sync + Unpin + 'static, C: Codec<V>> Share<'n, K, V, C> {
    /// Values are there for so long after they were written, unless they are written with another life
    /// ([`SharedValues::living`]). Default: until they are deleted.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.lives.ttl = Some(ttl);
        self
    }

    /// Values that no node has used for so long are gone; at least a second. A value that is in use is touched in its table five times in that time, by
    /// each node that uses it. Default: none.
    pub fn idle(mut self, idle: Duration) -> Self {
        self.lives.idle = Some(idle);
        self
    }

    /// A value that changes is read again by nodes that hold it and have used it ([`OnChange::Refresh`]), so that probably nobody
    /// waits for it. Default: it is read by the next one who asks.
    pub fn eager(mut self) -> Self {
        self.options.on_change = OnChange::Refresh;
        self
    }

    /// The table is logged: values survive a crash of the server, and are there on standbys. Writing costs more. Of values that are
    /// shared already, it must be what they are. Default: not; after a crash all values are gone, and are computed anew.
    pub fn logged(mut self) -> Self {
        self.logged = true;
        self
    }

    /// A node that computes a value tells the others every third of this time that it lives; when it has not for so long, another one takes over. At
    /// least a second. Default 5 s.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self
    }

    /// Producers that take longer have failed. Default 30 s.
    pub fn produce_timeout(mut self, limit: Duration) -> Self {
        self.timeout = limit;
        self
    }

    /// Larger values, as bytes, are refused. Default 8 MiB.
    pub fn value_bytes_max(mut self, bytes: usize) -> Self {
        self.bytes_max = bytes;
        self
    }

    /// How they are held in this node's memory. [`lifetime`](TableOptions::lifetime), [`weigher`](TableOptions::weigher),
    /// [`idle`](TableOptions::idle) and [`audit`](TableOptions::audit) are not for values.
    pub fn options(mut self, options: TableOptions) -> Self {
        let on_change = self.options.on_change;
        self.options = options;
        if on_change == OnChange::Refresh {
            self.options.on_change = on_change;
        }
        self
    }

    /// Written and read in this way. Default: [`Json`].
    pub fn codec<D: Codec<V>>(self) -> Share<'n, K, V, D> {
        let Self { node, name, options, lives, lease, timeout, bytes_max, logged, types: _ } = self;
        Share { node, name, options, lives, lease, timeout, bytes_max, logged, types: PhantomData }
    }

    /// Opens them. The table is made if it is not there, which takes the rights of the owner of schema `rowcache`; others have it made once:
    /// `select rowcache.share('permissions', '{bigint}')`, with one type for each part of the key, and
    /// `grant select, insert, update, delete on rowcache.shared_permissions to` the role of the service.
    ///
    /// # Errors
    ///
    /// * [`is_config`](Error::is_config): an option cannot be used, or the name;
    /// * [`is_refused`](Error::is_refused): the table is not there, and this role may not make it;
    /// * [`is_table`](Error::is_table): it has a key of another type, or is logged, or is not;
    /// * those of a statement, as of [`Table::get`](crate::Table::get).
    ///
    /// # Cancel safety
    ///
    /// Cancelling leaves nothing behind but perhaps the table.
    pub async fn open(self) -> Result<SharedValues<K, V, C>> {
        let lives = self.lives;
        let options = self.checked()?;
        let Self { node, name, lease, timeout, bytes_max, logged, .. } = self;
        let shared = &node.handle.shared;
        let pooler = shared.config.pooler;
        let (asked, keeps_by) = (name.clone(), options.clone());
        let writes = node.postgres.writes.clone();
        let table = node
            .open::<K, Stored<V, C>>(values::table_of(&name), options, move |opener| {
                let (name, options, writes) = (asked.clone(), keeps_by.clone(), writes.clone());
                Box::pin(async move {
                    values::make::<K>(&writes, pooler, &name, logged).await?;
                    let table = values::table_of(&name);
                    opener.rows(&table, Some(values::readable::<K>(&table)), options).await
                })
            })
            .await?;
        let statements = Arc::new(Statements::new(&name, pooler));
        let writes = node.postgres.writes.clone();
        let common = node.handle.open::<K, SharedValue<V, C>, _>(table.name(), || {
            let (touches, touched) = mpsc::unbounded_channel();
            let common = Arc::new(Common { runs: Arc::default(), counters: Counters::default(), touches });
            let keeper = Keeper {
                statements: Arc::clone(&statements),
                store: Arc::downgrade(&table.store),
                source: Arc::clone(&table.source),
                writes: writes.clone(),
                shared: Arc::clone(shared),
                common: Arc::downgrade(&common),
            };
            tokio::spawn(keeper.keep(touched));
            common
        });
        let core = Core { table, statements, writes, common, lease, timeout, bytes_max };
        Ok(SharedValues { core: Arc::new(core), lives })
    }

    /// The options of its table, if all can be used.
    fn checked(&self) -> Result<TableOptions> {
        let wrong = |message: String| Err(Error::new(Kind::Config, message));
        let Self { name, options, lives, lease, .. } = self;
        let first = name.bytes().next().is_some_and(|first| first.is_ascii_lowercase());
        let others = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
        if !first || name.len() > 40 || !name.bytes().all(others) {
            return wrong(format!(
                "{name:?} cannot be the name of shared values: up to 40 lower-case letters, digits and underscores, a letter first"
            ));
        }
        let second = Duration::from_secs(1);
        for (what, time) in [("ttl", lives.ttl), ("idle", lives.idle), ("lease", Some(*lease))] {
            if time.is_some_and(|time| time < second) {
                return wrong(format!("`{what}` of shared values is at least a second"));
            }
        }
        options.check_shared()?;
        let ttl = options.ttl;
        let options = options.clone().lifetime(move |stored: &Stored<V, C>| {
            // What ends later than it would be read again anyhow is as all others.
            stored.lives.filter(|lives| ttl.is_none_or(|ttl| *lives < ttl))
        });
        Ok(options)
    }
}
