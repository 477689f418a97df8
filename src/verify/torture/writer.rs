//! A writer: a connection of its own, and one transaction after the other.

use std::time::Duration;

use anyhow::{Context as _, Result};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tokio::{
    sync::{mpsc, watch},
    time::{sleep, timeout},
};
use tokio_postgres::{
    Client, NoTls, SimpleQueryMessage,
    error::{DbError, Severity},
};

use super::{
    super::history::Time,
    plan::Plan,
    wire::{Attempt, Written, now},
};

/// What writers may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Write on this server, which is in its so-manieth run.
    Open { url: String, run: u32 },
    /// Go on with the connection you have, but open none.
    Closed,
    /// Finish the transaction, and no more.
    Stop,
}

/// Nobody waits longer for a connection; the server may be away.
const CONNECT_WITHIN: Duration = Duration::from_secs(2);

/// Writes until it is told to stop.
pub(super) async fn write(seed: u64, origin: Time, mut phase: watch::Receiver<Phase>, told: mpsc::Sender<Attempt>) {
    let mut rng = StdRng::seed_from_u64(seed);
    loop {
        let open = match phase.wait_for(|phase| *phase != Phase::Closed).await {
            Ok(phase) => phase.clone(),
            Err(_) => return,
        };
        let Phase::Open { url, .. } = &open else { return };
        // Did the server crash meanwhile, it is another one.
        let connected = connect(url, "torture writer").await;
        let Some(client) = connected.ok().filter(|_| *phase.borrow() == open) else {
            sleep(Duration::from_millis(50)).await;
            continue;
        };
        while !matches!(*phase.borrow(), Phase::Stop) {
            // A server that was replaced and runs on is written to as well: nobody has told this client.
            let plan = Plan::draw(&mut rng);
            let attempt = match transact(&client, &plan, origin).await {
                Ok(attempt) => Some(attempt),
                // Nothing of it can ever be seen.
                Err(_) if client.is_closed() => break,
                Err(_) => None,
            };
            if let Some(attempt) = attempt
                && told.send(attempt).await.is_err()
            {
                return;
            }
            if client.is_closed() || moved(&phase.borrow(), url) && rng.random_bool(0.02) {
                break;
            }
            sleep(Duration::from_millis(rng.random_range(0..8))).await;
        }
    }
}

fn moved(phase: &Phase, from: &str) -> bool {
    matches!(phase, Phase::Open { url, .. } if url != from)
}

/// A connection that says who it is.
pub(super) async fn connect(url: &str, name: &str) -> Result<Client> {
    let mut config: tokio_postgres::Config = url.parse()?;
    config.application_name(name);
    let (client, connection) = timeout(CONNECT_WITHIN, config.connect(NoTls)).await.context("no answer")??;
    tokio::spawn(connection);
    Ok(client)
}

/// Carries out one transaction.
///
/// # Errors
///
/// A statement failed, and all was rolled back.
pub(super) async fn transact(client: &Client, plan: &Plan, origin: Time) -> Result<Attempt> {
    client.batch_execute("begin").await?;
    let mut attempt = match statements(client, plan, origin).await {
        Ok(attempt) => attempt,
        Err(error) => {
            client.batch_execute("rollback").await?;
            return Err(error);
        }
    };
    if plan.aborts {
        client.batch_execute("rollback").await?;
        attempt.rolled_back = true;
        return Ok(attempt);
    }
    attempt.sent = now(origin);
    match client.batch_execute("commit").await {
        Ok(()) => attempt.ended = Some(now(origin)),
        Err(error) => {
            // If the connection ended, nobody knows.
            let severity = error.as_db_error().and_then(DbError::parsed_severity);
            attempt.rolled_back = severity == Some(Severity::Error) && !client.is_closed();
        }
    }
    Ok(attempt)
}

async fn statements(client: &Client, plan: &Plan, origin: Time) -> Result<Attempt> {
    let locked = client.simple_query(&plan.lock()).await?;
    let [xid, port] = locked
        .iter()
        .find_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some([number(row.get(0)), number(row.get(1))]),
            _ => None,
        })
        .context("the locks were not answered")?;
    let mut rows = Vec::new();
    for (step, undone) in &plan.steps {
        if *undone {
            client.batch_execute("savepoint s").await?;
        }
        let number_taken = now(origin);
        for message in client.simple_query(&step.sql(plan.place, number_taken, xid)).await? {
            if let SimpleQueryMessage::Row(row) = message {
                let key = row.get(0).and_then(|key| key.parse().ok()).context("a key")?;
                let deletes = row.get(1) == Some("t");
                rows.push(Written { key, number: number_taken, deletes, undone: *undone });
            }
        }
        if *undone {
            client.batch_execute("rollback to savepoint s").await?;
        }
    }
    let port = u16::try_from(port).context("a port")?;
    Ok(Attempt { port, xid, sent: 0, ended: None, rolled_back: false, rows, token: None })
}

fn number(text: Option<&str>) -> u64 {
    text.and_then(|text| text.parse().ok()).unwrap_or_default()
}
