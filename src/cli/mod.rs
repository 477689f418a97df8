//! The command line: what `rowcache --help` shows, and who does what was asked.
//!
//! Apart from the throw-away server for the demo, the commands use only what every user of the crate can use.

mod account;
mod commit_time;
mod connect;
mod database;
mod demo;
mod doctor;
pub mod logs;
mod nodes;
mod programs;
mod report;
pub(crate) mod signals;
pub mod temp_server;
mod text;
mod watch;

use std::process::ExitCode;

use anyhow::Result;
use clap::{CommandFactory as _, Parser, Subcommand, ValueEnum, error::ErrorKind};

#[cfg(feature = "serve")]
pub(crate) use nodes::as_json as fleet_as_json;
pub use report::report;
#[cfg(feature = "serve")]
pub(crate) use report::with_causes;

use crate::install::{Level, TrackOptions, Transport};

const STEPS: &str = "\
Steps, on a database of yours:
  export DATABASE_URL=postgres://app@localhost/app
  rowcache migrate up              creates schema `rowcache` (tables of yours are not touched)
  rowcache track public.users      puts triggers on a table
  rowcache watch                   shows every change as it reaches the nodes
  rowcache nodes                   shows which nodes there are, and how they are
Something is not as it should be? `rowcache doctor` says what, and what cures it.

No database at hand? `rowcache demo` brings its own.";

/// Postgres rows, cached inside your service's own process and never silently stale.
#[derive(Parser)]
#[command(version, after_help = STEPS, disable_help_subcommand = true)]
pub struct Cli {
    /// The database: `postgres://user:password@host:5432/database`. Default: the environment's `DATABASE_URL`, except for
    /// `demo`, which writes to a database only if it is told to here.
    #[arg(long, value_name = "URL", global = true)]
    database_url: Option<String>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Creates, shows or removes the database objects of rowcache (schema `rowcache`).
    #[command(subcommand, after_help = "Example:\n  rowcache migrate up")]
    Migrate(Migrate),
    /// Puts triggers on tables, so that every change of a row reaches all nodes. Again with other options: replaces them.
    #[command(
        after_help = "Examples:\n  rowcache track public.users\n  rowcache track public.members --key org_id,user_id\n  \
                      rowcache track public.sessions --hash-keys --ignore last_seen_at\n  \
                      rowcache track public.carts --via log"
    )]
    Track(Track),
    /// Takes the triggers off tables.
    #[command(after_help = "Example:\n  rowcache untrack public.users")]
    Untrack {
        /// As in a query: `users`, or `public.users`.
        #[arg(required = true, value_name = "TABLE")]
        tables: Vec<String>,
    },
    /// Lists the tracked tables, and what is wrong with their triggers.
    #[command(
        after_help = "Examples:\n  rowcache tracked\n  rowcache tracked --json | jq '.[] | select(.problems != [])'"
    )]
    Tracked {
        /// As one JSON array.
        #[arg(long)]
        json: bool,
    },
    /// Shows changes live, one line each: when, table, keys, the writer's transaction, and how long after the commit
    /// this process knew.
    #[command(after_help = WATCH)]
    Watch {
        /// Only these tables. Default: all.
        #[arg(value_name = "TABLE")]
        tables: Vec<String>,
        /// One JSON object per line.
        #[arg(long)]
        json: bool,
    },
    /// Lists the nodes that listen on the database, and how each of them is: it is asked, and says so itself.
    #[command(after_help = nodes::HELP)]
    Nodes(nodes::Options),
    /// Looks for what is wrong: triggers, roles, settings, poolers, open transactions, too many notifications; and says
    /// what cures it.
    #[command(after_help = doctor::HELP)]
    Doctor(doctor::Options),
    /// Serves rows over HTTP: the same cache for programs that are not written in Rust, and a page to look into it.
    #[cfg(feature = "serve")]
    #[command(after_help = crate::serve::options::HELP)]
    Serve(Box<crate::serve::options::Flags>),
    /// Shows it at work: a throw-away database, psql processes that write, nodes that read, and a check of every promise.
    #[command(after_help = demo::HELP)]
    Demo(demo::Options),
}

const WATCH: &str = "\
Examples:
  rowcache watch
  rowcache watch users public.orders
  rowcache watch --json | jq -c 'select(.event == \"change\") | .keys'

The time from commit to here is known if the server has `track_commit_timestamp = on`; otherwise it is `-`.
When the connection is lost, and when it is back, that is a line of its own. Ctrl-C ends.";

#[derive(Subcommand)]
enum Migrate {
    /// Runs the migrations that have not been run. Locks nothing of yours.
    Up,
    /// Takes back the last migrations. Below 2, every table is untracked.
    Down {
        /// How many.
        #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
        steps: u16,
    },
    /// Shows which migrations have been run.
    Status,
    /// Prints the SQL, for your own migration tool. Needs no database.
    #[command(after_help = "Example:\n  rowcache migrate print > migrations/0042_rowcache.sql")]
    Print {
        /// Only this migration.
        #[arg(long, value_name = "N")]
        version: Option<i64>,
        /// What takes it back, last first.
        #[arg(long)]
        down: bool,
    },
}

#[derive(clap::Args)]
struct Track {
    /// As in a query: `users`, or `public.users`.
    #[arg(required = true, value_name = "TABLE")]
    tables: Vec<String>,
    /// The columns that name a row. Default: the primary key.
    #[arg(long, value_name = "COLUMNS", value_delimiter = ',')]
    key: Option<Vec<String>>,
    /// Further columns to send, for caches that depend on them.
    #[arg(long, value_name = "COLUMNS", value_delimiter = ',')]
    columns: Vec<String>,
    /// An UPDATE that changes nothing but these is not sent.
    #[arg(long, value_name = "COLUMNS", value_delimiter = ',')]
    ignore: Vec<String>,
    /// A statement that changes more rows counts as a change of the whole table.
    #[arg(long, value_name = "N", default_value_t = TrackOptions::default().max_keys)]
    max_keys: u32,
    /// Which triggers: `auto` takes statement triggers where they see every write.
    #[arg(long, value_enum, default_value_t = LevelArg::Auto)]
    level: LevelArg,
    /// Send keyed hashes in place of keys: for keys that are secrets. Services need the right to execute
    /// `rowcache.key_secret()`.
    #[arg(long, conflicts_with = "columns")]
    hash_keys: bool,
    /// What carries the messages: `log` for tables that are written by many at once, where commits that notify would have to
    /// queue; nodes then know a few milliseconds later.
    #[arg(long, value_enum, default_value_t = ViaArg::Notify)]
    via: ViaArg,
}

#[derive(Clone, Copy, ValueEnum)]
enum ViaArg {
    Notify,
    Log,
}

#[derive(Clone, Copy, ValueEnum)]
enum LevelArg {
    Auto,
    Statement,
    Row,
}

impl Track {
    fn options(&self) -> TrackOptions {
        TrackOptions {
            key: self.key.clone(),
            columns: self.columns.clone(),
            ignore: self.ignore.clone(),
            max_keys: self.max_keys,
            level: match self.level {
                LevelArg::Auto => Level::Auto,
                LevelArg::Statement => Level::Statement,
                LevelArg::Row => Level::Row,
            },
            hash_keys: self.hash_keys,
            via: match self.via {
                ViaArg::Notify => Transport::Notify,
                ViaArg::Log => Transport::Log,
            },
        }
    }
}

impl Cli {
    /// What is logged unless `RUST_LOG` says otherwise. Commands that show what happens to a node do not need the
    /// library's warnings about it as well. `None`: the command starts its own log.
    #[must_use]
    pub fn log_level(&self) -> Option<&'static str> {
        match self.command {
            #[cfg(feature = "serve")]
            Command::Serve(_) => None,
            Command::Watch { .. } | Command::Demo(_) => Some("error"),
            _ => Some("warn"),
        }
    }

    /// Does what was asked. A missing database URL ends the process: it is a usage error.
    ///
    /// # Errors
    ///
    /// Whatever was in the way; [`report`] says it to the user.
    ///
    /// # Cancel safety
    ///
    /// Dropping it stops and removes whatever was started.
    pub async fn run(self) -> Result<ExitCode> {
        match &self.command {
            Command::Migrate(Migrate::Print { version, down }) => database::print(*version, *down)?,
            Command::Migrate(Migrate::Up) => database::up(&self.url()).await?,
            Command::Migrate(Migrate::Down { steps }) => database::down(&self.url(), (*steps).into()).await?,
            Command::Migrate(Migrate::Status) => database::status(&self.url()).await?,
            Command::Track(track) => database::track(&self.url(), &track.tables, &track.options()).await?,
            Command::Untrack { tables } => database::untrack(&self.url(), tables).await?,
            Command::Tracked { json } => database::tracked(&self.url(), *json).await?,
            Command::Watch { tables, json } => watch::watch(&self.url(), tables, *json).await?,
            Command::Nodes(options) => nodes::nodes(&self.url(), options).await?,
            Command::Doctor(options) => return doctor::doctor(&self.url(), options).await,
            #[cfg(feature = "serve")]
            Command::Serve(flags) => {
                let url = self.database_url.clone().or_else(|| std::env::var("DATABASE_URL").ok());
                return crate::serve::serve(flags, url).await;
            }
            Command::Demo(options) => return demo::demo(self.database_url.as_deref(), options).await,
        }
        Ok(ExitCode::SUCCESS)
    }

    fn url(&self) -> String {
        self.database_url.clone().or_else(|| std::env::var("DATABASE_URL").ok()).unwrap_or_else(|| {
            let missing = "no database: give --database-url postgres://user@host/database, or set DATABASE_URL";
            Self::command().error(ErrorKind::MissingRequiredArgument, missing).exit()
        })
    }
}
