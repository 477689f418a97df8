//! Connection settings for both drivers from one URL.
//!
//! ```text
//! postgres://user:password@host:port/database?parameter=value&…        or postgresql://
//! ```
//!
//! | part | | |
//! | --- | --- | --- |
//! | user | required | also `?user=` |
//! | password | optional | also `?password=` |
//! | host | required: a name, an address, `[::1]`, or a socket's directory as `%2Frun%2Fpostgresql` | also `?host=` |
//! | port | 5432 | also `?port=` |
//! | database | the user's name | also `?dbname=` |
//! | `sslmode` | `prefer` | see `tls` |
//! | `sslrootcert` | | only with `verify-ca` and `verify-full` |
//! | `sslcert`, `sslkey` | | both or none |
//! | `application_name` | `rowcache` | |
//! | `options` | | `-c name=value` or `--name=value`, several apart by spaces |
//!
//! Every part is percent-decoded; `+` is a plus sign, as in libpq. **Everything else is an error that names the parameter
//! and the cure**: sqlx (the pool) and tokio-postgres (the LISTEN connection) read URLs differently, and a parameter that
//! one of them ignores would let them reach different servers, or reach the same one differently.
//!
//! No environment variable decides anything, and no password file is read. sqlx starts from PG* variables, so that each
//! of its fields is set here, those that the URL leaves out too; where it has no way to set them, the variable is refused.
//!
//! No message contains the password, nor a part of the URL that could be one by a slip of the pen.

use std::path::Path;

use percent_encoding::percent_decode_str;
use sqlx::postgres::{PgConnectOptions, PgSslMode};
use tokio_postgres::config::SslMode;
use url::Url;

use crate::{
    error::{Error, Kind, Result},
    tls::{Files, Mode, Pem, TlsConfig},
};

/// What to connect with. Not `Debug`: sqlx prints passwords.
pub(crate) struct Target {
    pub(crate) pool: PgConnectOptions,
    pub(crate) listener: tokio_postgres::Config,
    pub(crate) tls: TlsConfig,
}

/// Reads a URL; see the module's documentation for what it may hold.
pub(crate) fn parse(url: &str) -> Result<Target> {
    Parts::of(url)?.into_target()
}

const PORT: u16 = 5432;
const APPLICATION_NAME: &str = "rowcache";

fn error(message: impl Into<String>) -> Error {
    Error::new(Kind::Config, message)
}

/// The URL's parts, decoded, and not yet looked at.
#[derive(Default)]
struct Parts {
    user: Option<String>,
    password: Option<String>,
    host: Option<String>,
    port: Option<String>,
    dbname: Option<String>,
    sslmode: Option<String>,
    sslrootcert: Option<String>,
    sslcert: Option<String>,
    sslkey: Option<String>,
    application_name: Option<String>,
    options: Option<String>,
}

impl Parts {
    fn of(text: &str) -> Result<Self> {
        const FORM: &str = "expected postgres://user:password@host:port/database?parameter=value";
        const ENCODE: &str = "in a user name or password write @ as %40, : as %3A, / as %2F, ? as %3F, # as %23";

        let Some((scheme, rest)) = text.split_once("://") else {
            return Err(error(format!("this is not a URL: {FORM}")));
        };
        if !matches!(scheme, "postgres" | "postgresql") {
            return Err(error(format!("the URL does not begin with postgres:// or postgresql://: {FORM}")));
        }
        let authority = rest.split(['/', '?', '#']).next().unwrap_or(rest);
        if authority.rsplit('@').next().is_some_and(|hosts| hosts.contains(',')) {
            return Err(error(SEVERAL_HOSTS));
        }
        // The cause is one of a dozen fixed texts; none quotes the URL.
        let url = Url::parse(text).map_err(|cause| match cause {
            url::ParseError::EmptyHost => error(NO_HOST),
            _ => error(format!("the URL cannot be read ({cause}): {FORM}; {ENCODE}")),
        })?;
        if url.fragment().is_some() || url.path().contains('@') || url.path().trim_start_matches('/').contains('/') {
            return Err(error(format!("the URL has a / or # where none belongs: {FORM}; {ENCODE}")));
        }

        let mut parts = Self::default();
        parts.set("user", url.username())?;
        parts.set("password", url.password().unwrap_or_default())?;
        parts.set("host", url.host_str().unwrap_or_default())?;
        parts.set("port", &url.port().map(|port| port.to_string()).unwrap_or_default())?;
        parts.set("dbname", url.path().trim_start_matches('/'))?;
        if parts.user.is_none() && !url.query().unwrap_or_default().contains("user=") {
            // Before the parameters: without a user the URL may have been cut at a ? in the password.
            return Err(error(format!(
                "the URL names no user, and no other place is looked at for one: {FORM}; {ENCODE}"
            )));
        }
        for pair in url.query().unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let name = decode("the name of a parameter", name)?;
            if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.[]".contains(&byte)) {
                return Err(error(format!("a parameter of the URL has a name that is none: {ENCODE}")));
            }
            if value.is_empty() {
                return Err(error(format!("the parameter `{name}` has no value: leave it out")));
            }
            parts.set(&name, value)?;
        }
        Ok(parts)
    }

    /// Takes one part, still encoded. An empty one is none.
    fn set(&mut self, name: &str, encoded: &str) -> Result<()> {
        let slot = match name {
            "user" => &mut self.user,
            "password" => &mut self.password,
            "host" => &mut self.host,
            "port" => &mut self.port,
            "dbname" => &mut self.dbname,
            "sslmode" => &mut self.sslmode,
            "sslrootcert" => &mut self.sslrootcert,
            "sslcert" => &mut self.sslcert,
            "sslkey" => &mut self.sslkey,
            "application_name" => &mut self.application_name,
            "options" => &mut self.options,
            _ => return Err(error(format!("the parameter `{name}` cannot be used: {}", cure(name)))),
        };
        if encoded.is_empty() {
            return Ok(());
        }
        if slot.is_some() {
            return Err(error(format!("`{name}` is given twice")));
        }
        *slot = Some(decode(name, encoded)?);
        Ok(())
    }

    fn into_target(self) -> Result<Target> {
        let user = self.user.ok_or_else(|| error("`user` is missing"))?;
        let host = self.host.ok_or_else(|| error(NO_HOST))?;
        if host.contains(',') {
            return Err(error(SEVERAL_HOSTS));
        }
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(&host);
        let is_socket = host.starts_with('/');
        let port = match self.port {
            None => PORT,
            Some(text) => text.parse().map_err(|_| error(format!("`port` is not a port number: {text}")))?,
        };
        let database = self.dbname.as_ref().unwrap_or(&user);
        let application_name = self.application_name.as_deref().unwrap_or(APPLICATION_NAME);
        let mode = ssl_mode(self.sslmode.as_deref(), is_socket)?;
        let files = ssl_files(mode, self.sslrootcert, self.sslcert, self.sslkey)?;

        let mut pool = PgConnectOptions::new_without_pgpass();
        if pool.get_options().is_some() {
            return Err(refused("PGOPTIONS")); // could only be added to
        }
        if mode != Mode::Disable && files.client.is_none() {
            // sqlx would offer a certificate that the listener does not have, and cannot be told not to.
            if let Some(name) = ["PGSSLCERT", "PGSSLKEY"].into_iter().find(|name| std::env::var_os(name).is_some()) {
                return Err(refused(name));
            }
        }
        pool = pool.username(&user).password(self.password.as_deref().unwrap_or_default());
        pool = if is_socket { pool.host("localhost").socket(host) } else { pool.host(host) };
        pool = pool.port(port).database(database).application_name(application_name);
        pool = pool.ssl_mode(match mode {
            Mode::Disable => PgSslMode::Disable,
            Mode::Prefer => PgSslMode::Prefer,
            Mode::Require => PgSslMode::Require,
            Mode::VerifyCa => PgSslMode::VerifyCa,
            Mode::VerifyFull => PgSslMode::VerifyFull,
        });
        // Empty when there is none: PGSSLROOTCERT would count otherwise.
        pool = pool.ssl_root_cert_from_pem(files.root.as_ref().map(|pem| pem.bytes.clone()).unwrap_or_default());
        if let Some((certificate, key)) = &files.client {
            pool = pool.ssl_client_cert_from_pem(&certificate.bytes).ssl_client_key_from_pem(&key.bytes);
        }
        if let Some(options) = &self.options {
            pool = pool.options(server_settings(options)?);
        }

        let mut listener = tokio_postgres::Config::new();
        listener.user(&user).dbname(database).host(host).port(port).application_name(application_name);
        if let Some(password) = &self.password {
            listener.password(password);
        }
        // As sqlx has written them down, so that both send the same bytes.
        if let Some(options) = pool.get_options() {
            listener.options(options);
        }
        listener.ssl_mode(match mode {
            Mode::Disable => SslMode::Disable,
            Mode::Prefer => SslMode::Prefer,
            Mode::Require | Mode::VerifyCa | Mode::VerifyFull => SslMode::Require,
        });
        Ok(Target { pool, listener, tls: TlsConfig::for_mode(mode, &files)? })
    }
}

const NO_HOST: &str = "the URL names no host: write localhost, or a socket's directory as %2Fvar%2Frun%2Fpostgresql, \
     or postgres:///database?user=…&host=/var/run/postgresql";
const SEVERAL_HOSTS: &str = "the URL names several hosts, and the pool's driver can use only one: name the primary";

fn decode(what: &str, encoded: &str) -> Result<String> {
    let text = percent_decode_str(encoded).decode_utf8().map_err(|_| error(format!("`{what}` is not UTF-8")))?;
    if text.contains('\0') {
        return Err(error(format!("`{what}` contains a zero byte"))); // it would end the field on the wire
    }
    Ok(text.into_owned())
}

/// What to do about a parameter that only one driver, or none, can honour.
fn cure(name: &str) -> &'static str {
    const APART: &str = "give the pool's and the listener's settings apart, with `Config::new`";
    match name {
        "connect_timeout" => "set `acquire_timeout` of the pool's options and `beat_timeout` of `Config`",
        "hostaddr" => "write the address in place of the host name",
        "ssl-mode" => "write `sslmode`",
        "ssl-root-cert" | "ssl-ca" => "write `sslrootcert`",
        "ssl-cert" => "write `sslcert`",
        "ssl-key" => "write `sslkey`",
        "pgbouncer" => {
            "leave it out; and the listener must not go through a transaction pooler, which swallows notifications"
        }
        "statement-cache-capacity" | "target_session_attrs" | "load_balance_hosts" | "tcp_user_timeout" => APART,
        _ if name.starts_with("keepalives") => APART,
        _ if name.starts_with("options[") => "write `options=-c%20name=value`",
        _ => "leave it out; not both of the drivers understand it",
    }
}

fn ssl_mode(text: Option<&str>, is_socket: bool) -> Result<Mode> {
    let mode = match text {
        None => Mode::Prefer,
        Some("allow") => return Err(error("`sslmode=allow` cannot be used: write `prefer`, or better `verify-full`")),
        Some(text) => Mode::parse(text).ok_or_else(|| {
            error(format!("`sslmode={text}` does not exist: disable, prefer, require, verify-ca or verify-full"))
        })?,
    };
    match mode {
        // Postgres never encrypts them: nobody can listen in.
        Mode::Disable | Mode::Prefer if is_socket => Ok(Mode::Disable),
        _ if is_socket => Err(error(format!("`sslmode={mode}` cannot be used with a unix socket: leave it out"))),
        _ => Ok(mode),
    }
}

fn ssl_files(mode: Mode, root: Option<String>, cert: Option<String>, key: Option<String>) -> Result<Files> {
    let root = match root {
        Some(_) if !mode.verifies() => {
            return Err(error(format!(
                "`sslrootcert` means nothing with `sslmode={mode}`: write `sslmode=verify-full`, or leave it out"
            )));
        }
        Some(path) if path == "system" => {
            return Err(error(
                "`sslrootcert=system` cannot be used: name a file, or leave it out for Mozilla's authorities",
            ));
        }
        Some(path) => Some(Pem::read("sslrootcert", Path::new(&path))?),
        None => None,
    };
    let client = match (cert, key) {
        (None, None) => None,
        (Some(_), Some(_)) if mode == Mode::Disable => {
            return Err(error("`sslcert` and `sslkey` mean nothing without TLS: leave them out, or change `sslmode`"));
        }
        (Some(cert), Some(key)) => {
            Some((Pem::read("sslcert", Path::new(&cert))?, Pem::read("sslkey", Path::new(&key))?))
        }
        (Some(_), None) => return Err(error("`sslcert` is given without `sslkey`")),
        (None, Some(_)) => return Err(error("`sslkey` is given without `sslcert`")),
    };
    Ok(Files { root, client })
}

/// `-c a=b --c-d=e` as names and values. Spaces separate; a backslash takes the next character as it is.
/// Source: libpq's documentation, `options`, and `pg_split_opts` in the server.
fn server_settings(options: &str) -> Result<Vec<(String, String)>> {
    const FORM: &str = "`options` must be `-c name=value` or `--name=value`, several apart by spaces";
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut characters = options.chars();
    while let Some(character) = characters.next() {
        match character {
            character if character.is_ascii_whitespace() => words.extend(word.take()),
            '\\' => word.get_or_insert_default().extend(characters.next()),
            character => word.get_or_insert_default().push(character),
        }
    }
    words.extend(word);

    let mut settings = Vec::new();
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        let setting = match word.strip_prefix("-c").or_else(|| word.strip_prefix("--")) {
            Some("") => words.next().ok_or_else(|| error(FORM))?,
            Some(setting) => setting.to_owned(),
            None => return Err(error(FORM)),
        };
        let (name, value) = setting.split_once('=').ok_or_else(|| error(FORM))?;
        let name = name.replace('-', "_"); // as the server does
        if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.".contains(&byte)) {
            return Err(error(FORM));
        }
        settings.push((name, value.to_owned()));
    }
    Ok(settings)
}

fn refused(variable: &str) -> Error {
    error(format!(
        "the environment variable {variable} is set: it would reach the pool's driver and not the listener's; \
         unset it, and write the setting into the URL"
    ))
}

#[cfg(test)]
mod tests;
