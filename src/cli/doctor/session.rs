//! Sessions that ask questions of any server, as any role, and through any pooler.
//!
//! Every question is one message of the simple protocol: no prepared statement, and settings that end with it, so that
//! nothing stays behind on a connection which a pooler then gives to somebody else. Answers come as JSON.

use std::time::Duration;

use serde::de::DeserializeOwned;
use tokio::{task::JoinHandle, time::timeout};
use tokio_postgres::{Client, SimpleQueryMessage, error::SqlState};

use super::finding::{Finding, Report};
use crate::{Config, Result, error::with_causes, postgres::line, server::Received};

/// A catalogue query takes milliseconds; one that waits for a lock is given up by the server.
const PREFIX: &str = "set local search_path = pg_catalog, pg_temp; set local quote_all_identifiers = off; \
     set local lock_timeout = '5s'; set local statement_timeout = '20s'; ";

/// Longer than the server's own limits.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// The code of the finding that nothing can be asked any more.
pub(super) const LOST: &str = "connection.lost";

/// One connection; ends when it is dropped.
pub(super) struct Session {
    client: Client,
    task: JoinHandle<()>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Why there was no answer.
pub(super) enum Refused {
    /// The role lacks a right.
    Right(String),
    /// It waited too long for a lock.
    Locked,
    /// The connection is gone, or the server is silent.
    Lost(String),
    Other(String),
}

impl Session {
    pub(super) async fn open(config: &Config, received: impl Fn(Received) + Send + Sync + 'static) -> Result<Self> {
        let (client, task) = line::connect(config, "doctor", received, |_| {}).await?;
        Ok(Self { client, task })
    }

    /// Runs statements as one transaction; the rows of all of them, first column only.
    pub(super) async fn run(&self, sql: &str) -> std::result::Result<Vec<String>, Refused> {
        let messages = match timeout(ANSWER_WITHIN, self.client.simple_query(sql)).await {
            Err(_) => return Err(Refused::Lost(format!("no answer within {} s", ANSWER_WITHIN.as_secs()))),
            Ok(Err(error)) => return Err(refused(&error)),
            Ok(Ok(messages)) => messages,
        };
        let first = |message| match message {
            SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
            _ => None,
        };
        Ok(messages.into_iter().filter_map(first).collect())
    }

    /// Asks for rows.
    async fn rows<T: DeserializeOwned>(&self, sql: &str) -> std::result::Result<Vec<T>, Refused> {
        let rows = self.run(&format!("{PREFIX}select pg_catalog.row_to_json(q) from ({sql}) q")).await?;
        let read = |row: String| serde_json::from_str(&row).map_err(|error| Refused::Other(format!("{row}: {error}")));
        rows.into_iter().map(read).collect()
    }

    /// Asks for rows. Without an answer, that is a finding: `what` says what could not be looked at, and `needs` which
    /// right that takes.
    pub(super) async fn ask<T: DeserializeOwned>(
        &self,
        report: &mut Report,
        what: &str,
        needs: &str,
        sql: &str,
    ) -> Option<Vec<T>> {
        if report.has(LOST) {
            return None;
        }
        match self.rows(sql).await {
            Ok(rows) => return Some(rows),
            Err(Refused::Right(message)) => report.push(
                Finding::note("rights.missing", format!("cannot look at {what}: {message}"))
                    .about(what)
                    .why(format!("that takes {needs}"))
                    .cure(format!("grant this role {needs}, or run it as one that has it")),
            ),
            Err(Refused::Locked) => report.push(
                Finding::warning("check.locked", format!("cannot look at {what}: it is locked, or takes too long"))
                    .about(what)
                    .cure("run it again when the migration or the long transaction has ended"),
            ),
            Err(Refused::Lost(how)) => report.push(
                Finding::error(LOST, format!("the connection was lost while looking at {what}: {how}"))
                    .why("the rest was not looked at")
                    .cure("run it again"),
            ),
            Err(Refused::Other(message)) => {
                report.push(Finding::warning("check.failed", format!("cannot look at {what}: {message}")).about(what));
            }
        }
        None
    }

    /// As [`ask`](Self::ask), for a question that has one row as its answer.
    pub(super) async fn ask_one<T: DeserializeOwned>(
        &self,
        report: &mut Report,
        what: &str,
        needs: &str,
        sql: &str,
    ) -> Option<T> {
        self.ask(report, what, needs, sql).await?.pop()
    }
}

fn refused(error: &tokio_postgres::Error) -> Refused {
    let message = error.as_db_error().map_or_else(|| with_causes(error), |error| error.message().to_owned());
    match error.code() {
        Some(&SqlState::INSUFFICIENT_PRIVILEGE) => Refused::Right(message),
        Some(&SqlState::LOCK_NOT_AVAILABLE | &SqlState::QUERY_CANCELED) => Refused::Locked,
        Some(code) if !code.code().starts_with("57P") && !code.code().starts_with("08") => Refused::Other(message),
        _ => Refused::Lost(message),
    }
}
