use std::{env, process::Command};

use proptest::prelude::*;
use sqlx::postgres::PgSslMode;
use tokio_postgres::config::{Host, SslMode};

use super::{Target, parse};

/// Both drivers' fields side by side: host, port, user, database, application name, options.
fn both(target: &Target) -> [[String; 6]; 2] {
    let Target { pool, listener, .. } = target;
    let socket = pool.get_socket().map(|path| path.display().to_string());
    let host = match listener.get_hosts() {
        [Host::Tcp(host)] => host.clone(),
        [Host::Unix(path)] => path.display().to_string(),
        hosts => panic!("{hosts:?}"),
    };
    let some = |text: Option<&str>| text.unwrap_or_default().to_owned();
    [
        [
            socket.unwrap_or_else(|| pool.get_host().to_owned()),
            pool.get_port().to_string(),
            pool.get_username().to_owned(),
            some(pool.get_database()),
            some(pool.get_application_name()),
            some(pool.get_options()),
        ],
        [
            host,
            listener.get_ports()[0].to_string(),
            some(listener.get_user()),
            some(listener.get_dbname()),
            some(listener.get_application_name()),
            some(listener.get_options()),
        ],
    ]
}

fn good(url: &str) -> Target {
    parse(url).unwrap_or_else(|error| panic!("{url}: {error}"))
}

fn refusal(url: &str) -> String {
    match parse(url) {
        Ok(_) => panic!("{url} was accepted"),
        Err(error) => {
            assert!(error.is_config());
            error.to_string()
        }
    }
}

#[test]
fn both_drivers_get_the_same() {
    for (url, expected) in [
        ("postgres://ada@db", ["db", "5432", "ada", "ada", "rowcache", ""]),
        ("postgresql://ada:pw@db.example:6543/app", ["db.example", "6543", "ada", "app", "rowcache", ""]),
        ("postgres://ada@127.0.0.1/app", ["127.0.0.1", "5432", "ada", "app", "rowcache", ""]),
        ("postgres://ada@[::1]:1/app", ["::1", "1", "ada", "app", "rowcache", ""]),
        ("postgres://a%40b@db/c%2Fd", ["db", "5432", "a@b", "c/d", "rowcache", ""]),
        ("postgres://ada@%2Frun%2Fpg:7/app", ["/run/pg", "7", "ada", "app", "rowcache", ""]),
        ("postgres:///app?user=ada&host=/run/pg&port=7", ["/run/pg", "7", "ada", "app", "rowcache", ""]),
        ("postgres:///?host=db&user=ada&dbname=app", ["db", "5432", "ada", "app", "rowcache", ""]),
        ("postgres://ada@db/app?application_name=a+b%20c", ["db", "5432", "ada", "app", "a+b c", ""]),
        (
            "postgres://ada@db/app?options=-c%20a.b=1%20%20--work-mem=2MB%20-cx=y%5C%20z",
            ["db", "5432", "ada", "app", "rowcache", "-c a.b=1 -c work_mem=2MB -c x=y\\ z"],
        ),
    ] {
        let [pool, listener] = both(&good(url));
        assert_eq!(pool, expected, "the pool, from {url}");
        assert_eq!(listener, expected, "the listener, from {url}");
    }
}

#[test]
fn passwords_are_decoded() {
    for (url, password) in [("postgres://ada:p%40s%2Fs+%25@db", "p@s/s+%"), ("postgres://ada@db?password=p%26q", "p&q")]
    {
        let target = good(url);
        assert_eq!(target.listener.get_password(), Some(password.as_bytes()));
        // sqlx has no getter, only this.
        assert!(format!("{:?}", target.pool).contains(&format!("password: Some({password:?})")));
    }
}

#[test]
fn modes_of_tls() {
    for (parameters, pool, listener) in [
        ("", PgSslMode::Prefer, SslMode::Prefer),
        ("?sslmode=disable", PgSslMode::Disable, SslMode::Disable),
        ("?sslmode=prefer", PgSslMode::Prefer, SslMode::Prefer),
        ("?sslmode=require", PgSslMode::Require, SslMode::Require),
        ("?sslmode=verify-ca", PgSslMode::VerifyCa, SslMode::Require),
        ("?sslmode=verify-full", PgSslMode::VerifyFull, SslMode::Require),
        ("%2Frun%2Fpg", PgSslMode::Disable, SslMode::Disable),
    ] {
        let host = if parameters.starts_with('%') { "" } else { "db" };
        let target = good(&format!("postgres://ada@{host}{parameters}"));
        assert_eq!(format!("{:?}", target.pool.get_ssl_mode()), format!("{pool:?}"), "{parameters}");
        assert_eq!(target.listener.get_ssl_mode(), listener, "{parameters}");
    }
}

#[test]
fn what_cannot_be_honoured_is_named_with_its_cure() {
    for (url, parts) in [
        ("host=db user=ada", &["not a URL", "postgres://user"] as &[_]),
        ("mysql://ada@db/app", &["postgres://"]),
        ("postgres://db/app", &["no user", "no other place"]),
        ("postgres://ada@/app", &["no host", "localhost"]),
        ("postgres://ada@db1,db2/app", &["several hosts", "the primary"]),
        ("postgres://ada@db1:1,db2:2/app", &["several hosts"]),
        ("postgres:///app?user=ada&host=db1,db2", &["several hosts"]),
        ("postgres://ada@db:65536/app", &["invalid port number"]),
        ("postgres:///app?user=ada&host=db&port=x", &["`port`"]),
        ("postgres://ada@db/app/more", &["a / or #"]),
        ("postgres://ada@db/app#more", &["a / or #"]),
        ("postgres://ada@db/app?user=eve", &["`user` is given twice"]),
        ("postgres://ada@db/app?options=-ca=b&options=-cc=d", &["`options` is given twice"]),
        ("postgres://ada@db/app?sslmode", &["`sslmode` has no value"]),
        ("postgres://ada@db/app?sslmode=allow", &["sslmode=allow", "prefer"]),
        ("postgres://ada@db/app?sslmode=on", &["sslmode=on", "verify-full"]),
        ("postgres://ada@%2Frun%2Fpg/app?sslmode=require", &["sslmode=require", "unix socket"]),
        ("postgres://ada@db/app?sslrootcert=/x", &["`sslrootcert` means nothing with `sslmode=prefer`", "verify-full"]),
        ("postgres://ada@db/app?sslmode=verify-full&sslrootcert=system", &["sslrootcert=system", "leave it out"]),
        ("postgres://ada@db/app?sslmode=verify-full&sslrootcert=/does/not/exist", &["sslrootcert=/does/not/exist"]),
        ("postgres://ada@db/app?sslcert=/x", &["without `sslkey`"]),
        ("postgres://ada@db/app?sslkey=/x", &["without `sslcert`"]),
        ("postgres://ada@db/app?sslmode=disable&sslcert=/x&sslkey=/x", &["mean nothing without TLS"]),
        ("postgres://ada@db/app?connect_timeout=3", &["`connect_timeout`", "acquire_timeout", "beat_timeout"]),
        ("postgres://ada@db/app?target_session_attrs=read-write", &["`target_session_attrs`", "Config::new"]),
        ("postgres://ada@db/app?keepalives_idle=3", &["`keepalives_idle`", "Config::new"]),
        ("postgres://ada@db/app?statement-cache-capacity=0", &["`statement-cache-capacity`", "Config::new"]),
        ("postgres://ada@db/app?hostaddr=10.0.0.1", &["`hostaddr`", "in place of the host name"]),
        ("postgres://ada@db/app?pgbouncer=true", &["`pgbouncer`", "transaction pooler"]),
        ("postgres://ada@db/app?options[a]=b", &["`options[a]`", "options=-c%20name=value"]),
        ("postgres://ada@db/app?ssl-mode=require", &["`ssl-mode`", "write `sslmode`"]),
        ("postgres://ada@db/app?channel_binding=require", &["`channel_binding`", "leave it out"]),
        ("postgres://ada@db/app?application_name=%00", &["`application_name`", "zero byte"]),
        ("postgres://ada@db/%ff", &["`dbname` is not UTF-8"]),
        ("postgres://ada@db/app?options=-f", &["`options` must be"]),
        ("postgres://ada@db/app?options=-c", &["`options` must be"]),
        ("postgres://ada@db/app?options=-c+a=b", &["`options` must be"]),
    ] {
        let message = refusal(url);
        for part in parts {
            assert!(message.contains(part), "{url}: {message:?} does not say {part:?}");
        }
    }
}

#[test]
fn a_password_that_broke_the_url_is_not_printed() {
    for url in [
        "postgres://ada:hush/hush@db/app",
        "postgres://ada:1/hush@db/app",
        "postgres://ada:1?hush@db/app",
        "postgres://ada:1#hush@db/app",
        "postgres://ada:hush,hush@db1,db2/app",
        "postgres://ada:hush@db/app?no_such=1",
        "postgres://ada:hush@db:nan/app",
        "postgres://ada:hush%ff@db/app",
        "ada:hush@db/app",
    ] {
        let error = parse(url).err().unwrap_or_else(|| panic!("{url} was accepted"));
        assert!(!format!("{error} {error:?}").contains("hush"), "{error:?}");
    }
}

proptest! {
    /// Whatever the password is made of: it is used, or the error does not show it.
    #[test]
    fn no_password_is_printed(password in "[a-z0-9@:/?#&=%+,.\\[\\] -]{4,12}") {
        if let Err(error) = parse(&format!("postgres://ada:{password}@db/app")) {
            // The messages' own words are no leak.
            let known = refusal("postgres://ada:/@db/app") + &refusal("postgres://ada:1?@db/app");
            let shown = format!("{error} {error:?}");
            prop_assert!(!shown.contains(&password) || known.contains(&password), "{shown}");
        }
    }

    #[test]
    fn any_text_is_an_error_and_no_panic(text in "(postgres://)?[ -~]{0,40}") {
        drop(parse(&text));
    }
}

/// Runs this test again in a process with these variables, as only there they can be set.
fn with_environment(test: &str, variables: &[(&str, &str)]) -> String {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", &format!("settings::tests::{test}"), "--nocapture"]).env(INSIDE, "1");
    let output = command.envs(variables.iter().copied()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

const INSIDE: &str = "ROWCACHE_TEST_ENVIRONMENT";

#[test]
fn the_environment_changes_nothing() {
    let everything = || format!("{:?}", good("postgres://ada@db").pool);
    if env::var_os(INSIDE).is_some() {
        return println!("\nPOOL {}", everything());
    }
    let home = tempfile::tempdir().unwrap();
    let passfile = home.path().join("pgpass");
    std::fs::write(&passfile, "*:*:*:*:evil\n").unwrap();
    std::fs::set_permissions(&passfile, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let variables = ["PGHOST", "PGHOSTADDR", "PGUSER", "PGPASSWORD", "PGDATABASE", "PGAPPNAME", "PGSSLROOTCERT"]
        .map(|v| (v, "evil"));
    let others = [("PGPORT", "1"), ("PGSSLMODE", "disable"), ("PGPASSFILE", passfile.to_str().unwrap())];
    let inside = with_environment("the_environment_changes_nothing", &[&variables[..], &others[..]].concat());
    let inside = inside.lines().find_map(|line| line.strip_prefix("POOL ")).unwrap();
    assert_eq!(inside, everything());
}

#[test]
fn variables_that_sqlx_cannot_be_kept_from_are_refused() {
    if env::var_os(INSIDE).is_some() {
        let plain = parse("postgres://ada@db?sslmode=disable").err().map(|error| error.to_string());
        return println!("\nREFUSED {} PLAIN {}", refusal("postgres://ada@db"), plain.unwrap_or_default());
    }
    for name in ["PGOPTIONS", "PGSSLCERT", "PGSSLKEY"] {
        let said = with_environment("variables_that_sqlx_cannot_be_kept_from_are_refused", &[(name, "-ca=b")]);
        let (refused, plain) =
            said.lines().find(|line| line.starts_with("REFUSED")).unwrap().split_once("PLAIN").unwrap();
        assert!(refused.contains(name), "{refused}");
        assert_eq!(plain.contains(name), name == "PGOPTIONS", "without TLS the certificate does not matter: {plain}");
    }
}
