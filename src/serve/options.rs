//! What `rowcache serve` can be told: by flags, by the environment, and by a TOML file; in this order of weight.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    num::{NonZeroU32, NonZeroUsize},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use jiff::SignedDuration;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::table::TableSpec;
use crate::{Config, OnChange, TableOptions, postgres::json_rows::Sent};

pub(crate) const HELP: &str = "\
Examples:
  rowcache serve --table public.users
  rowcache serve --table public.users --table public.sessions:token --listen 127.0.0.1:8080
  rowcache serve --config /etc/rowcache.toml --print-config

  curl -i localhost:8080/v1/public.users/42                  a row as JSON; from memory the second time
  curl -i localhost:8080/v1/public.users?keys=1,2,3          several, by one statement for those not held
  curl -i -H 'Cache-Control: no-cache' localhost:8080/v1/public.users/42
                                                             with every change committed before the request
  curl -N localhost:8080/v1/events                           changes as they arrive
  http://localhost:8080/                                     the same to look at

Each table must be tracked: `rowcache migrate up`, `rowcache track public.users`. What a flag does not say, its environment
variable says; else the file; else the default. Tables are those of the flags, or else of the file:

  [[table]]
  name = \"public.users\"
  exclude = [\"password_hash\"]     # never leaves the database
  capacity = 500000
  stale_if_error = \"30s\"";

/// Flags and environment.
#[expect(clippy::doc_markdown, reason = "it is for `--help`")]
#[derive(clap::Args, Clone, Debug, Default)]
pub(crate) struct Flags {
    /// A TOML file with the same settings, `_` for `-`, and a `[[table]]` for each table.
    #[arg(long, value_name = "FILE", env = "ROWCACHE_CONFIG")]
    config: Option<PathBuf>,
    /// A tracked table whose rows are served: by its key, or after a colon the columns by which rows are asked for
    /// (`public.users:email`). Can be given several times.
    #[arg(long = "table", value_name = "TABLE[:COLUMN,…]")]
    tables: Vec<String>,
    /// Where to listen. Can be given several times. Beyond loopback only with tokens. [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDRESS:PORT", env = "ROWCACHE_LISTEN", value_delimiter = ',')]
    listen: Vec<SocketAddr>,
    /// The name of this node, for people. [default: the host's name]
    #[arg(long, value_name = "NAME", env = "ROWCACHE_NAME")]
    name: Option<String>,
    /// Where others reach this node, as `http://10.0.0.7:8080`: shown in the list of nodes. [default: the first address it listens to]
    #[arg(long, value_name = "URL", env = "ROWCACHE_ADVERTISE")]
    advertise: Option<String>,
    /// A file with the token that readers must send (`Authorization: Bearer …`). Or the token itself in ROWCACHE_READ_TOKEN.
    #[arg(long, value_name = "FILE", env = "ROWCACHE_READ_TOKEN_FILE")]
    read_token_file: Option<PathBuf>,
    /// A file with the token of those who may also invalidate, clear and write. Or the token itself in ROWCACHE_ADMIN_TOKEN.
    #[arg(long, value_name = "FILE", env = "ROWCACHE_ADMIN_TOKEN_FILE")]
    admin_token_file: Option<PathBuf>,
    /// Listen beyond loopback although anybody could then read every row that is served, and clear it.
    #[arg(long, env = "ROWCACHE_INSECURE_NO_TOKENS")]
    insecure_no_tokens: bool,
    /// A PEM file with the certificate, and those that lead to its root: HTTPS instead of HTTP.
    #[arg(long, value_name = "FILE", env = "ROWCACHE_TLS_CERT")]
    tls_cert: Option<PathBuf>,
    /// A PEM file with its private key.
    #[arg(long, value_name = "FILE", env = "ROWCACHE_TLS_KEY")]
    tls_key: Option<PathBuf>,
    /// How the log is written, to stderr: `text` or `json`. What is logged says RUST_LOG. [default: text]
    #[arg(long, value_enum, value_name = "FORMAT", env = "ROWCACHE_LOG_FORMAT")]
    log_format: Option<LogFormat>,
    /// Traces and metrics go there by OTLP over HTTP, as `http://localhost:4318`. [default: nowhere]
    #[arg(long, value_name = "URL", env = "OTEL_EXPORTER_OTLP_ENDPOINT")]
    otlp_endpoint: Option<String>,
    /// How long requests that are under way may take after Ctrl-C. [default: 10s]
    #[arg(long, value_name = "TIME", env = "ROWCACHE_SHUTDOWN_GRACE")]
    shutdown_grace: Option<Span>,
    /// Connections at the same time; further ones wait. [default: 10000]
    #[arg(long, value_name = "N", env = "ROWCACHE_MAX_CONNECTIONS")]
    max_connections: Option<NonZeroUsize>,
    /// Keys in one request. [default: 1000]
    #[arg(long, value_name = "N", env = "ROWCACHE_MAX_KEYS")]
    max_keys: Option<NonZeroUsize>,
    /// Readers of /v1/events at the same time. [default: 256]
    #[arg(long, value_name = "N", env = "ROWCACHE_MAX_EVENT_READERS")]
    max_event_readers: Option<NonZeroUsize>,
    /// A request that takes longer is answered with 503. [default: 10s]
    #[arg(long, value_name = "TIME", env = "ROWCACHE_REQUEST_TIMEOUT")]
    request_timeout: Option<Span>,
    /// Two lines to Postgres, so that losing one of them is no gap.
    #[arg(long, env = "ROWCACHE_REDUNDANT_LISTENER")]
    redundant_listener: bool,
    /// Prints the settings that count, without secrets, as TOML, and ends.
    #[arg(long)]
    pub(crate) print_config: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum LogFormat {
    #[default]
    Text,
    Json,
}

/// A time as people write it: `10s`, `1h 30m`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span(pub(crate) Duration);

impl std::str::FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let span = text.parse::<SignedDuration>().ok().and_then(|span| Duration::try_from(span).ok());
        span.map(Self).ok_or_else(|| format!("`{text}` is no time, such as 500ms, 10s or 1h"))
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

impl Serialize for Span {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let span = SignedDuration::try_from(self.0).map_err(serde::ser::Error::custom)?;
        serializer.collect_str(&format_args!("{span:#}"))
    }
}

/// The file; and, with everything filled in, what counts.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(skip_serializing)]
    database_url: Option<String>,
    listen: Option<Vec<SocketAddr>>,
    name: Option<String>,
    advertise: Option<String>,
    read_token_file: Option<PathBuf>,
    admin_token_file: Option<PathBuf>,
    insecure_no_tokens: Option<bool>,
    tls_cert: Option<PathBuf>,
    tls_key: Option<PathBuf>,
    log_format: Option<LogFormat>,
    otlp_endpoint: Option<String>,
    shutdown_grace: Option<Span>,
    max_connections: Option<NonZeroUsize>,
    max_keys: Option<NonZeroUsize>,
    max_event_readers: Option<NonZeroUsize>,
    request_timeout: Option<Span>,
    redundant_listener: Option<bool>,
    #[serde(default, rename = "table")]
    tables: Vec<TableFile>,
}

/// A `[[table]]`.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct TableFile {
    name: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    by: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    columns: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    exclude: Option<Vec<String>>,
    #[serde(default)]
    writable: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    capacity: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ttl: Option<Span>,
    #[serde(skip_serializing_if = "Option::is_none")]
    idle: Option<Span>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stale_if_error: Option<Span>,
    #[serde(skip_serializing_if = "Option::is_none")]
    not_found_max: Option<NonZeroU32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    refresh: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    refill: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    audit: Option<u32>,
}

/// Who may do what.
#[derive(Clone, Default)]
pub(crate) struct Tokens {
    pub(crate) read: Option<String>,
    pub(crate) admin: Option<String>,
}

/// Everything, checked.
pub(crate) struct Settings {
    pub(crate) node: Config,
    pub(crate) name: String,
    pub(crate) listen: Vec<SocketAddr>,
    pub(crate) advertise: Option<String>,
    pub(crate) tokens: Tokens,
    pub(crate) insecure_no_tokens: bool,
    pub(crate) tls: Option<(PathBuf, PathBuf)>,
    pub(crate) log_format: LogFormat,
    pub(crate) otlp_endpoint: Option<String>,
    pub(crate) shutdown_grace: Duration,
    pub(crate) max_connections: usize,
    pub(crate) max_keys: usize,
    pub(crate) max_event_readers: usize,
    pub(crate) request_timeout: Duration,
    pub(crate) tables: Vec<TableSpec>,
    /// As `--print-config` shows it.
    pub(crate) printed: String,
}

/// Of the environment, and of nowhere else: a command line is there for all to see.
const READ_TOKEN: &str = "ROWCACHE_READ_TOKEN";
const ADMIN_TOKEN: &str = "ROWCACHE_ADMIN_TOKEN";

impl Settings {
    /// What counts. `database_url` is the flag's, or the environment's.
    pub(crate) fn read(flags: &Flags, database_url: Option<String>) -> Result<Self> {
        let file = match &flags.config {
            None => File::default(),
            Some(path) => {
                let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
                toml::from_str(&text).map_err(|error: toml::de::Error| {
                    let line = error.span().map_or(0, |span| text[..span.start].lines().count().max(1));
                    anyhow!("{}, line {line}: {}", path.display(), error.message())
                })?
            }
        };
        let Some(url) = database_url.or_else(|| file.database_url.clone()) else {
            bail!(
                "no database: give --database-url postgres://user@host/database, set DATABASE_URL, or `database_url` in the file"
            );
        };
        let all = filled(flags, file)?;
        let token = |variable: &str, path: &Option<PathBuf>| match path {
            Some(path) => {
                let token = std::fs::read_to_string(path)
                    .with_context(|| format!("cannot read the token in {}", path.display()))?;
                checked(token.trim(), &path.display().to_string()).map(Some)
            }
            None => std::env::var(variable).ok().map(|token| checked(&token, variable)).transpose(),
        };
        let tokens = Tokens {
            read: token(READ_TOKEN, &all.read_token_file)?,
            admin: token(ADMIN_TOKEN, &all.admin_token_file)?,
        };
        let listen = all.listen.clone().unwrap_or_default();
        let open = tokens.read.is_none() || tokens.admin.is_none();
        if open
            && !all.insecure_no_tokens.unwrap_or_default()
            && let Some(far) = listen.iter().find(|it| !it.ip().is_loopback())
        {
            bail!(
                "{far} can be reached from elsewhere, and without tokens anybody could read every row that is served, and clear it: name \
                 --read-token-file and --admin-token-file, or say --insecure-no-tokens"
            );
        }
        let tls = match (&all.tls_cert, &all.tls_key) {
            (None, None) => None,
            (Some(cert), Some(key)) => Some((cert.clone(), key.clone())),
            _ => bail!("--tls-cert and --tls-key belong together"),
        };
        if all.tables.is_empty() {
            bail!("no table to serve: name at least one, as --table public.users, or `[[table]]` in the file");
        }
        let mut node = Config::from_url(&url)?;
        node.redundant_listener = all.redundant_listener.unwrap_or_default();
        Ok(Self {
            node,
            name: all.name.clone().unwrap_or_default(),
            listen,
            advertise: all.advertise.clone(),
            tokens,
            insecure_no_tokens: all.insecure_no_tokens.unwrap_or_default(),
            tls,
            log_format: all.log_format.unwrap_or_default(),
            otlp_endpoint: all.otlp_endpoint.clone(),
            shutdown_grace: all.shutdown_grace.map_or(Duration::ZERO, |span| span.0),
            max_connections: all.max_connections.map_or(1, NonZeroUsize::get),
            max_keys: all.max_keys.map_or(1, NonZeroUsize::get),
            max_event_readers: all.max_event_readers.map_or(1, NonZeroUsize::get),
            request_timeout: all.request_timeout.map_or(Duration::ZERO, |span| span.0),
            tables: all.tables.iter().map(TableFile::spec).collect::<Result<_>>()?,
            printed: toml::to_string_pretty(&all)?,
        })
    }
}

/// The flags, or else the file, or else the defaults.
fn filled(flags: &Flags, file: File) -> Result<File> {
    let listen = Some(flags.listen.clone()).filter(|it| !it.is_empty()).or(file.listen);
    let tables = if flags.tables.is_empty() {
        file.tables
    } else {
        flags.tables.iter().map(|table| TableFile::parse(table)).collect()
    };
    let mut seen = BTreeSet::new();
    for table in &tables {
        if !seen.insert((&table.name, &table.by)) {
            bail!("table {} is named twice", table.name);
        }
    }
    Ok(File {
        database_url: None,
        listen: listen.or_else(|| Some(vec![SocketAddr::from(([127, 0, 0, 1], 8080))])),
        name: flags.name.clone().or(file.name).or_else(|| Some(host_name())),
        advertise: flags.advertise.clone().or(file.advertise),
        read_token_file: flags.read_token_file.clone().or(file.read_token_file),
        admin_token_file: flags.admin_token_file.clone().or(file.admin_token_file),
        insecure_no_tokens: Some(flags.insecure_no_tokens || file.insecure_no_tokens.unwrap_or_default()),
        tls_cert: flags.tls_cert.clone().or(file.tls_cert),
        tls_key: flags.tls_key.clone().or(file.tls_key),
        log_format: flags.log_format.or(file.log_format).or(Some(LogFormat::Text)),
        otlp_endpoint: flags.otlp_endpoint.clone().or(file.otlp_endpoint),
        shutdown_grace: flags.shutdown_grace.or(file.shutdown_grace).or(Some(Span(Duration::from_secs(10)))),
        max_connections: flags.max_connections.or(file.max_connections).or(NonZeroUsize::new(10_000)),
        max_keys: flags.max_keys.or(file.max_keys).or(NonZeroUsize::new(1000)),
        max_event_readers: flags.max_event_readers.or(file.max_event_readers).or(NonZeroUsize::new(256)),
        request_timeout: flags.request_timeout.or(file.request_timeout).or(Some(Span(Duration::from_secs(10)))),
        redundant_listener: Some(flags.redundant_listener || file.redundant_listener.unwrap_or_default()),
        tables,
    })
}

/// A token that can be sent in a header.
fn checked(token: &str, from: &str) -> Result<String> {
    if token.len() < 8 || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        bail!("the token in {from} must have at least 8 characters, all of them visible ones of ASCII");
    }
    Ok(token.to_owned())
}

pub(crate) fn host_name() -> String {
    let name = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    name.filter(|name| !name.is_empty()).unwrap_or_else(|| "rowcache".to_owned())
}

impl TableFile {
    /// `public.users`, or `public.users:email`. A name in double quotes can have a colon.
    fn parse(text: &str) -> Self {
        let split = text.rsplit_once(':').filter(|(_, by)| !by.contains('"'));
        let (name, by) = split.unwrap_or((text, ""));
        let by = by.split(',').filter(|column| !column.is_empty()).map(str::to_owned).collect();
        Self { name: name.to_owned(), by, ..Self::default() }
    }

    fn spec(&self) -> Result<TableSpec> {
        let sent = match (&self.columns, &self.exclude) {
            (None, None) => Sent::All,
            (Some(columns), None) if !columns.is_empty() => Sent::Only(columns.clone()),
            (None, Some(exclude)) => Sent::AllBut(exclude.clone()),
            _ => bail!("table {}: name either `columns`, at least one, or `exclude`", self.name),
        };
        let mut options = TableOptions::default();
        options.capacity = self.capacity.unwrap_or(options.capacity);
        options.bytes = self.bytes;
        options.ttl = self.ttl.map_or(options.ttl, |ttl| Some(ttl.0));
        options.idle = self.idle.map(|idle| idle.0);
        options.stale_if_error = self.stale_if_error.map(|max| max.0);
        options.not_found_max = self.not_found_max;
        options.refill = self.refill.unwrap_or_default();
        options.audit = self.audit.unwrap_or_default();
        if self.refresh.unwrap_or_default() {
            options.on_change = OnChange::Refresh;
        }
        Ok(TableSpec { name: self.name.clone(), by: self.by.clone(), sent, writable: self.writable, options })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const URL: &str = "postgres://app@db/app";

    fn settings(flags: &Flags) -> Result<Settings> {
        Settings::read(flags, Some(URL.to_owned()))
    }

    #[test]
    fn flags_weigh_more_than_the_file_and_that_more_than_defaults() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("rowcache.toml");
        let text = "listen = ['127.0.0.1:1']\nmax_keys = 7\nrequest_timeout = '1m 30s'\n[[table]]\nname = 'public.users'\n\
                    exclude = ['secret']\nttl = '2h'\n[[table]]\nname = 'public.users'\nby = ['email']\n";
        std::fs::write(&path, text).expect("it can be written");
        let mut flags = Flags { config: Some(path.clone()), ..Flags::default() };
        let read = settings(&flags).expect("it can be read");
        assert_eq!((read.listen[0].port(), read.max_keys, read.max_connections), (1, 7, 10_000));
        assert_eq!(read.request_timeout, Duration::from_secs(90));
        assert_eq!((read.tables.len(), &read.tables[0].sent), (2, &Sent::AllBut(vec!["secret".into()])));
        assert_eq!(read.tables[0].options.ttl, Some(Duration::from_hours(2)));
        assert_eq!(read.tables[1].by, ["email"]);
        flags.listen = vec!["127.0.0.1:2".parse().expect("an address")];
        flags.tables = vec!["public.orders:user_id,day".to_owned()];
        let read = settings(&flags).expect("it can be read");
        assert_eq!((read.listen[0].port(), read.tables[0].name.as_str()), (2, "public.orders"));
        assert_eq!(read.tables[0].by, ["user_id", "day"]);
        // What is printed can be read again, and says the same.
        std::fs::write(&path, &read.printed).expect("it can be written");
        let again = settings(&Flags { config: Some(path), ..Flags::default() }).expect("it can be read");
        assert_eq!(again.printed, read.printed);
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        let table = |name: &str| Flags { tables: vec![name.to_owned()], ..Flags::default() };
        let said = |flags: &Flags| settings(flags).err().map(|error| format!("{error:#}")).unwrap_or_default();
        assert!(said(&Flags::default()).contains("no table to serve"));
        let far = Flags { listen: vec!["0.0.0.0:80".parse().expect("an address")], ..table("t") };
        assert!(said(&far).contains("--read-token-file"));
        assert_eq!(said(&Flags { insecure_no_tokens: true, ..far }), "");
        assert!(said(&Flags { tls_cert: Some("x".into()), ..table("t") }).contains("belong together"));
        let twice = Flags { tables: vec!["t".into(), "t".into()], ..Flags::default() };
        assert!(said(&twice).contains("named twice"));
    }

    #[test]
    fn a_name_in_quotes_can_have_a_colon() {
        let parsed = TableFile::parse("public.\"a:b\"");
        assert_eq!((parsed.name.as_str(), parsed.by.len()), ("public.\"a:b\"", 0));
    }
}
