//! Redis and Valkey, one server or a cluster.

use std::{fmt, sync::Arc, time::Duration};

use redis::{
    Client, ErrorKind, RedisError, Script, Value,
    aio::{ConnectionLike, ConnectionManager, ConnectionManagerConfig},
    cluster::{ClusterClient, ClusterConfig},
    cluster_async::ClusterConnection,
};
use tokio::{sync::OnceCell, time::timeout};
use url::Url;

use super::{Answer, Asked, Found, Settings, Shelf, Tier, seal::number};
use crate::error::{Error, Kind, Result};

/// For each key: the row, if its load has seen what it must have; else whether somebody is loading it; else nothing, and whoever asks
/// is noted as somebody who loads it. The first argument says for how many milliseconds; then come two numbers for each key.
///
/// The comparison is for those who wait: what is too old must be as good as nothing, or each node would load it. Whether a row may be
/// taken is decided by the node.
const TAKE: &str = "
local found = {}
for n, name in ipairs(KEYS) do
  local row = redis.call('GET', name)
  if row and row:sub(1, 1) == 'v' and row:sub(2, 17) >= ARGV[2 * n] and row:sub(18, 33) >= ARGV[2 * n + 1] then
    found[n] = row
  elseif row == 'l' then
    found[n] = row
  else
    if ARGV[1] ~= '0' then redis.call('SET', name, 'l', 'PX', ARGV[1]) end
    found[n] = false
  end
end
return found";

/// To connect takes longer than to ask. Nobody waits for it.
const CONNECT_MAX: Duration = Duration::from_secs(5);

struct Redis {
    /// Without the password.
    address: String,
    server: Server,
    take: Script,
}

enum Server {
    One(ConnectionManager),
    Cluster(Box<Cluster>),
}

struct Cluster {
    client: ClusterClient,
    connection: OnceCell<ClusterConnection>,
}

impl Cluster {
    async fn connection(&self) -> Result<ClusterConnection, RedisError> {
        let config = ClusterConfig::new().set_connection_timeout(CONNECT_MAX);
        self.connection.get_or_try_init(|| self.client.get_async_connection_with_config(config)).await.cloned()
    }
}

impl Tier {
    /// A Redis or Valkey server, version 6.2 or later: `redis://[user:password@]host[:port][/database]`, or `rediss://` with TLS. Nothing is connected
    /// yet: see [`ready`](Self::ready).
    ///
    /// ```
    /// # fn example() -> rowcache::Result<()> {
    /// use rowcache::Tier;
    ///
    /// let tier = Tier::redis("redis://cache.internal/")?.prefix("shop");
    /// # Ok(())
    /// # }
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async { example().unwrap() });
    /// ```
    ///
    /// # Errors
    ///
    /// [`is_config`](Error::is_config) if it is no such address.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub fn redis(url: &str) -> Result<Self> {
        let config = ConnectionManagerConfig::new()
            .set_connection_timeout(Some(CONNECT_MAX))
            // Ours is shorter.
            .set_response_timeout(None)
            .set_number_of_retries(1);
        let connect = || Client::open(url)?.get_connection_manager_lazy(config);
        let connection = connect().map_err(|error| wrong(url, &error))?;
        Ok(Self::on(Arc::new(Redis::new(shown(url), Server::One(connection)))))
    }

    /// A cluster, of which these are some of the nodes. A batch of keys is as many commands, sent at once.
    ///
    /// # Errors
    ///
    /// As [`redis`](Self::redis).
    pub fn redis_cluster<'a>(urls: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        let urls: Vec<&str> = urls.into_iter().collect();
        let client = ClusterClient::new(urls.clone()).map_err(|error| wrong(&urls.join(" "), &error))?;
        let cluster = Cluster { client, connection: OnceCell::new() };
        let address = urls.iter().map(|url| shown(url)).collect::<Vec<_>>().join(" ");
        Ok(Self::on(Arc::new(Redis::new(address, Server::Cluster(Box::new(cluster))))))
    }

    /// Connects now, and asks the server whether it is there. For logs and health checks: a service need not wait for it.
    ///
    /// # Errors
    ///
    /// [`is_unavailable`](Error::is_unavailable), with the reason.
    pub async fn ready(&self) -> Result<()> {
        self.shelf
            .ping()
            .await
            .map_err(|why| Error::new(Kind::Unavailable, format!("the tier {} does not answer: {why}", self.shelf)))
    }
}

fn wrong(url: &str, error: &RedisError) -> Error {
    Error::new(Kind::Config, format!("`{}` is no address of a Redis server: {error}", shown(url)))
}

/// An address, without its password.
fn shown(url: &str) -> String {
    let Ok(mut parsed) = Url::parse(url) else { return "(not a URL)".into() };
    if parsed.password().is_some() {
        // Only an address without a host has no place for one.
        let _ = parsed.set_password(Some("…"));
    }
    parsed.to_string()
}

impl Redis {
    fn new(address: String, server: Server) -> Self {
        Self { address, server, take: Script::new(TAKE) }
    }

    async fn take(&self, asked: &[Asked], settings: &Settings) -> Result<Vec<Found>, RedisError> {
        let patience = settings.patience.as_millis().to_string();
        let found = match &self.server {
            Server::One(connection) => self.run(&mut connection.clone(), asked, &patience).await?,
            Server::Cluster(cluster) => {
                let connection = cluster.connection().await?;
                let asked = asked.iter().map(|one| {
                    let (mut connection, patience) = (connection.clone(), &patience);
                    async move { self.run(&mut connection, std::slice::from_ref(one), patience).await }
                });
                futures_util::future::try_join_all(asked).await?.concat()
            }
        };
        if found.len() == asked.len() {
            return Ok(found);
        }
        Err((ErrorKind::Parse, "another number of answers than of keys").into())
    }

    /// In one round trip, but for the first time that a server sees the script.
    async fn run(
        &self,
        connection: &mut (impl ConnectionLike + Send),
        asked: &[Asked],
        patience: &str,
    ) -> Result<Vec<Found>, RedisError> {
        let mut script = self.take.prepare_invoke();
        script.arg(patience);
        for Asked { name, needs } in asked {
            script.key(name).arg(number(needs.xmin)).arg(number(needs.ended));
        }
        let found: Vec<Value> = script.invoke_async(connection).await?;
        found
            .into_iter()
            .map(|found| match found {
                Value::Nil => Ok(Found::Nothing),
                Value::BulkString(bytes) if bytes == b"l" => Ok(Found::Awaited),
                Value::BulkString(bytes) => Ok(Found::Bytes(bytes)),
                _ => Err((ErrorKind::Parse, "an answer of another type").into()),
            })
            .collect()
    }

    async fn put(&self, rows: &[(String, Vec<u8>)], settings: &Settings) -> Result<(), RedisError> {
        let ttl = settings.ttl.as_millis().max(1).to_string();
        let set = |name: &str, bytes: &[u8]| {
            let mut command = redis::cmd("SET");
            command.arg(name).arg(bytes).arg("PX").arg(&ttl);
            command
        };
        match &self.server {
            Server::One(connection) => {
                let mut all = redis::pipe();
                for (name, bytes) in rows {
                    all.add_command(set(name, bytes)).ignore();
                }
                all.query_async(&mut connection.clone()).await
            }
            Server::Cluster(cluster) => {
                let connection = cluster.connection().await?;
                let all = rows.iter().map(|(name, bytes)| {
                    let (mut connection, command) = (connection.clone(), set(name, bytes));
                    async move { command.query_async::<()>(&mut connection).await }
                });
                futures_util::future::try_join_all(all).await.map(drop)
            }
        }
    }

    async fn ping(&self) -> Result<(), RedisError> {
        match &self.server {
            Server::One(connection) => redis::cmd("PING").query_async(&mut connection.clone()).await,
            Server::Cluster(cluster) => redis::cmd("PING").query_async(&mut cluster.connection().await?).await,
        }
    }
}

/// Within the time that an answer may take.
async fn within<T>(limit: Duration, asked: impl Future<Output = Result<T, RedisError>>) -> Result<T, String> {
    match timeout(limit, asked).await {
        Ok(answer) => answer.map_err(|error| error.to_string()),
        Err(_) => Err(format!("no answer in {limit:?}")),
    }
}

impl Shelf for Redis {
    fn take<'a>(&'a self, asked: &'a [Asked], settings: &'a Settings) -> Answer<'a, Vec<Found>> {
        Box::pin(within(settings.timeout, self.take(asked, settings)))
    }

    fn put<'a>(&'a self, rows: &'a [(String, Vec<u8>)], settings: &'a Settings) -> Answer<'a, ()> {
        // Nobody waits for it.
        Box::pin(within(settings.timeout.max(Duration::from_secs(1)), self.put(rows, settings)))
    }

    fn ping(&self) -> Answer<'_, ()> {
        Box::pin(within(CONNECT_MAX, self.ping()))
    }
}

impl fmt::Display for Redis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.address)
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[tokio::test]
    async fn addresses_are_checked_and_shown_without_passwords() {
        let tier = Tier::redis("redis://ada:secret@cache.internal:6380/2").expect("an address");
        assert!(format!("{tier:?}").contains("redis://ada:%E2%80%A6@cache.internal:6380/2"), "{tier:?}");
        let error = Tier::redis("cache.internal").expect_err("no address");
        assert!(error.is_config() && error.to_string().contains("no address of a Redis server"), "{error}");
    }
}
