//! Each `sslmode` against a real server, with both drivers: they must agree, and agree with the table above.

use std::{fs, path::Path};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use sqlx::{ConnectOptions as _, Connection as _};

use crate::{
    cli::temp_server::TempServer,
    settings::{self, Target},
};

/// An authority that can issue certificates.
struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Two authorities need two names: a certificate says only by name who has issued it.
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    /// A certificate for this name, and its key.
    fn issue(&self, name: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        // Postgres takes the user of a client certificate from here.
        params.distinguished_name.push(DnType::CommonName, name);
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }
}

/// A server with a certificate for `localhost`.
async fn server(authority: &Authority) -> TempServer {
    let (certificate, key) = authority.issue("localhost");
    let server = TempServer::options()
        .setting("ssl", "on")
        .setting("ssl_cert_file", "server.crt")
        .setting("ssl_key_file", "server.key")
        .setting("ssl_ca_file", "ca.crt")
        .data_file("server.crt", &certificate)
        .data_file("server.key", &key)
        .data_file("ca.crt", &authority.pem)
        // `postgres` as it likes; `certified` only with TLS and a client certificate of that name.
        .data_file("pg_hba.conf", "host all postgres all trust\nhostssl all certified all cert\n");
    server.start().await.unwrap_or_else(|error| panic!("{error:#}"))
}

/// How a connection went, for both drivers: `Ok(encrypted)`, or why not.
type Outcome = Result<bool, String>;

const ENCRYPTED: &str = "select ssl from pg_stat_ssl where pid = pg_backend_pid()";

async fn pool_outcome(target: &Target) -> Outcome {
    // Each driver tells its errors' causes in its own way; `Debug` has all of them.
    let mut connection = target.pool.connect().await.map_err(|error| format!("{error:?}"))?;
    let encrypted = sqlx::query_scalar(ENCRYPTED).fetch_one(&mut connection).await.unwrap();
    connection.close().await.unwrap();
    Ok(encrypted)
}

async fn listener_outcome(target: &Target) -> Outcome {
    let connected = target.listener.connect(target.tls.connector()).await;
    let (client, connection) = connected.map_err(|error| format!("{error:?}"))?;
    let driver = tokio::spawn(connection);
    let encrypted = client.query_one(ENCRYPTED, &[]).await.unwrap().get(0);
    driver.abort();
    Ok(encrypted)
}

/// The expected result: whether the connection is encrypted, or a part of the error of each driver.
type Expected = Result<bool, &'static str>;

const UNKNOWN: &str = "UnknownIssuer";
const NAME: &str = "NotValidForName";
const REFUSED: &str = "server does not support TLS";

async fn check(url: &str, expected: Expected) {
    let target = settings::parse(url).unwrap_or_else(|error| panic!("{url}: {error}"));
    for (driver, outcome) in [("pool", pool_outcome(&target).await), ("listener", listener_outcome(&target).await)] {
        match (&outcome, expected) {
            (Ok(encrypted), Ok(expected)) if *encrypted == expected => {}
            (Err(error), Err(part)) if error.contains(part) => {}
            _ => panic!("the {driver} on {url}: {outcome:?}, expected {expected:?}"),
        }
    }
}

fn write(dir: &Path, name: &str, contents: &str) -> String {
    let path = dir.join(name);
    fs::write(&path, contents).unwrap();
    path.to_str().unwrap().to_owned()
}

#[tokio::test]
async fn every_mode_means_the_same_for_both_drivers() {
    let (authority, stranger) = (Authority::new("ours"), Authority::new("stranger"));
    let server = server(&authority).await;
    let files = tempfile::tempdir().unwrap();
    let ours = write(files.path(), "ours.pem", &authority.pem);
    let other = write(files.path(), "other.pem", &stranger.pem);
    let both = write(files.path(), "both.pem", &format!("{}{}", stranger.pem, authority.pem));

    let port = server.port();
    // The server has one address and two names, of which its certificate has one.
    for (host, parameters, expected) in [
        ("localhost", "sslmode=disable".to_owned(), Ok(false)),
        ("localhost", String::new(), Ok(true)),
        ("localhost", "sslmode=prefer".to_owned(), Ok(true)),
        ("127.0.0.1", "sslmode=prefer".to_owned(), Ok(true)),
        ("localhost", "sslmode=require".to_owned(), Ok(true)),
        ("127.0.0.1", "sslmode=require".to_owned(), Ok(true)),
        ("localhost", "sslmode=verify-ca".to_owned(), Err(UNKNOWN)),
        ("localhost", format!("sslmode=verify-ca&sslrootcert={ours}"), Ok(true)),
        ("127.0.0.1", format!("sslmode=verify-ca&sslrootcert={ours}"), Ok(true)),
        ("localhost", format!("sslmode=verify-ca&sslrootcert={both}"), Ok(true)),
        ("localhost", format!("sslmode=verify-ca&sslrootcert={other}"), Err(UNKNOWN)),
        ("localhost", "sslmode=verify-full".to_owned(), Err(UNKNOWN)),
        ("localhost", format!("sslmode=verify-full&sslrootcert={ours}"), Ok(true)),
        ("localhost", format!("sslmode=verify-full&sslrootcert={both}"), Ok(true)),
        ("127.0.0.1", format!("sslmode=verify-full&sslrootcert={ours}"), Err(NAME)),
        ("localhost", format!("sslmode=verify-full&sslrootcert={other}"), Err(UNKNOWN)),
    ] {
        check(&format!("postgres://postgres@{host}:{port}/postgres?{parameters}"), expected).await;
    }
}

#[tokio::test]
async fn a_server_without_tls_is_refused_where_tls_was_asked_for() {
    let server = TempServer::options().start().await.unwrap();
    let files = tempfile::tempdir().unwrap();
    let root = write(files.path(), "root.pem", &Authority::new("ours").pem);
    for (parameters, expected) in [
        ("sslmode=disable".to_owned(), Ok(false)),
        ("sslmode=prefer".to_owned(), Ok(false)),
        ("sslmode=require".to_owned(), Err(REFUSED)),
        (format!("sslmode=verify-ca&sslrootcert={root}"), Err(REFUSED)),
        (format!("sslmode=verify-full&sslrootcert={root}"), Err(REFUSED)),
    ] {
        check(&format!("postgres://postgres@localhost:{}/postgres?{parameters}", server.port()), expected).await;
    }
    let socket = server.socket_dir().display().to_string().replace('/', "%2F");
    {
        check(&format!("postgres://postgres@{socket}:{}/postgres", server.port()), Ok(false)).await;
    }
}

#[tokio::test]
async fn client_certificates_are_shown_by_both_drivers() {
    let (authority, stranger) = (Authority::new("ours"), Authority::new("stranger"));
    let server = server(&authority).await;
    let admin = settings::parse(&server.admin_url()).unwrap();
    let mut admin = admin.pool.connect().await.unwrap();
    sqlx::query("create role certified login").execute(&mut admin).await.unwrap();

    let files = tempfile::tempdir().unwrap();
    for (authority, name, expected) in [
        (&authority, "certified", Ok(true)),
        (&authority, "somebody", Err("certificate authentication failed")),
        (&stranger, "certified", Err("")), // the server hangs up, and each driver says so in its own words
    ] {
        let (certificate, key) = authority.issue(name);
        let certificate = write(files.path(), "client.crt", &certificate);
        let key = write(files.path(), "client.key", &key);
        let url = format!("postgres://certified@localhost:{}/postgres?sslmode=require", server.port());
        check(&format!("{url}&sslcert={certificate}&sslkey={key}"), expected).await;
        check(&url, Err("connection requires a valid client certificate")).await;
    }
}

#[test]
fn files_that_hold_no_certificate_are_named() {
    let files = tempfile::tempdir().unwrap();
    let empty = write(files.path(), "empty.pem", "");
    let broken = write(files.path(), "broken.pem", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
    let (certificate, _) = Authority::new("ours").issue("x");
    let certificate = write(files.path(), "x.crt", &certificate);
    let root = "postgres://ada@db?sslmode=verify-full&sslrootcert";
    for (url, part) in [
        (format!("{root}={empty}"), format!("sslrootcert={empty}: there is no certificate")),
        (format!("{root}={broken}"), format!("sslrootcert={broken}: ")),
        (format!("postgres://ada@db?sslcert={certificate}&sslkey={empty}"), format!("sslkey={empty}: ")),
        (format!("postgres://ada@db?sslcert={empty}&sslkey={certificate}"), format!("sslcert={empty}: ")),
    ] {
        let Err(error) = settings::parse(&url) else { panic!("{url} was accepted") };
        assert!(error.to_string().contains(&part), "{error} does not say {part:?}");
    }
}
