//! `rowcache doctor`: looks at everything that the cache depends on, and says what is wrong, why it matters, and what
//! cures it.
//!
//! Order: what would make the rest meaningless first (no server, a standby, a pooler), then what stands in the catalogue,
//! then what only shows over time. Nothing is changed, and what the role may not see is a note.

mod activity;
mod finding;
mod observe;
mod roles;
mod schema;
mod secrets;
mod seen;
mod server;
mod session;
mod tables;

use std::{
    collections::HashMap,
    io::{IsTerminal as _, Write as _, stderr},
    process::ExitCode,
    time::Duration,
};

use anyhow::Result;

use self::{
    finding::{Finding, Report},
    observe::Listener,
    session::Session,
};
use super::{
    report::{report, with_causes},
    signals::Signals,
};
use crate::Config;

pub(crate) const HELP: &str = "\
Examples:
  rowcache doctor
  rowcache doctor --seconds 30
  rowcache doctor --json | jq -r '.[] | select(.severity == \"error\") | .code'

Exit status, for CI: 0 nothing worse than a note, 1 warnings, 2 errors (or it could not look),
130 interrupted.

It changes nothing. It listens, and sends some 20 notifications on a channel of its own.
Any role that may connect can run it; what that role may not see is a note that names the
missing right. Asking how full the queue of notifications is makes Postgres clear it up,
if it was stuck.";

const EXIT_WARNING: u8 = 1;
const EXIT_ERROR: u8 = 2;
/// As a shell says that Ctrl-C ended a program.
const EXIT_INTERRUPTED: u8 = 130;

/// Connecting may take longer than a node would wait.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

#[derive(clap::Args)]
pub(crate) struct Options {
    /// As one JSON array of findings, with codes that stay the same.
    #[arg(long)]
    json: bool,
    /// For how long to observe what shows only over time, in seconds.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    /// From when on a transaction counts as long, in seconds; one that idles counts after a fifth of it.
    #[arg(long, value_name = "N", default_value_t = 300)]
    long_transaction: u32,
}

pub(crate) async fn doctor(url: &str, options: &Options) -> Result<ExitCode> {
    let mut signals = Signals::new()?;
    let mut config = match Config::from_url(url) {
        Ok(config) => config,
        Err(error) => {
            report(&error.into());
            return Ok(ExitCode::from(EXIT_ERROR));
        }
    };
    config.beat_timeout = CONNECT_WITHIN;
    let found = tokio::select! {
        found = examine(&config, options) => found,
        () = signals.next() => return Ok(ExitCode::from(EXIT_INTERRUPTED)),
    };
    found.print(options.json)
}

async fn examine(config: &Config, options: &Options) -> Report {
    let mut report = Report::default();
    let progress = Progress::start();
    progress.show("connecting");
    let control = match Session::open(config, |_| {}).await {
        Ok(control) => control,
        Err(error) => {
            report.push(
                Finding::error("connection.failed", with_causes(&error.into()))
                    .cure("check --database-url or DATABASE_URL: is Postgres running there, and are user, password and database right?"),
            );
            return report;
        }
    };
    let Some(server) = server::check(&control, &mut report).await else { return report };
    let mut listener = None;
    if !server.is_standby {
        match Listener::open(config).await {
            Err(error) => report.push(observe::no_listener(error)),
            Ok(opened) if observe::shares_connections(&control, &opened, &mut report).await => {}
            Ok(opened) => listener = Some(opened),
        }
    }
    progress.show("reading the catalogue");
    let has_schema = schema::check(&control, &mut report).await;
    let commands = if has_schema { tables::check(&control, &mut report).await } else { HashMap::new() };
    roles::check(&control, &mut report, has_schema).await;
    activity::check(&control, &mut report, &server, options.long_transaction.into()).await;
    if let Some(listener) = listener.filter(|_| !report.has(session::LOST)) {
        progress.show(&format!("observing for {} s", options.seconds));
        let time = Duration::from_secs(options.seconds);
        observe::check(&control, listener, &mut report, time, &commands).await;
    }
    report
}

/// One line on stderr that says what is being done; only for a person, and gone at the end, also when interrupted.
struct Progress {
    shown: bool,
}

const CLEAR_LINE: &str = "\r\u{1b}[K";

impl Progress {
    fn start() -> Self {
        Self { shown: stderr().is_terminal() }
    }

    fn show(&self, what: &str) {
        if self.shown {
            let _ = write!(stderr(), "{CLEAR_LINE}{what} …"); // nobody left to tell
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown {
            let _ = write!(stderr(), "{CLEAR_LINE}"); // nobody left to tell
        }
    }
}
