//! Keeps the line open: connects, proves, beats, verifies triggers, and connects again after a gap.
//!
//! The order matters (X7): LISTEN returns, *then* a new epoch begins, *then* a fence comes back, *then* entries
//! are served. Whatever was loaded before LISTEN returned is never served after it.

use std::{sync::Arc, time::Duration};

use backon::{BackoffBuilder, ExponentialBuilder};
use sqlx::Row;
use tokio::{sync::oneshot, time::timeout};
use uuid::Uuid;

use crate::{
    clock,
    coherence::{Boot, Fence, Incarnation, Reason},
    error::{Error, Kind, Result},
    inbox::Item,
    postgres::{
        database_error, is_connection_error,
        line::{self, FENCE, Line, Received},
    },
    shared::Shared,
    tables::Verified,
};

/// Runs until the node is stopped. `ready` hears how the first attempt went; if it failed, nothing follows.
pub(crate) async fn keep(shared: Arc<Shared>, ready: oneshot::Sender<Result<()>>) {
    let mut stopping = shared.stopping();
    tokio::select! {
        () = keep_trying(&shared, ready) => {}
        _ = stopping.wait_for(|stopping| *stopping) => {}
    }
}

async fn keep_trying(shared: &Arc<Shared>, ready: oneshot::Sender<Result<()>>) {
    // Three connections, and a few statements on each.
    let limit = 3 * shared.config.beat_timeout.max(Duration::from_secs(1));
    let mut ready = Some(ready);
    let mut pauses = pauses();
    loop {
        let began = clock::now();
        let end = match timeout(limit, open(shared)).await {
            Ok(Ok(line)) => hold(shared, &line, &mut ready).await,
            Ok(Err(error)) => Err(error),
            Err(_) => Err(Error::new(Kind::Unavailable, format!("Postgres did not answer within {limit:?}"))),
        };
        if let Some(ready) = ready.take() {
            // Only a first attempt that failed gets here. Nobody hears it if `start` was cancelled.
            let _ = ready.send(end);
            return;
        }
        match end {
            // It was up for a while, and is lost: the next attempts start afresh.
            Ok(()) if clock::now() > began + shared.config.lease => pauses = self::pauses(),
            Ok(()) => {}
            Err(error) => {
                shared.gap(Reason::ConnectionLost(full(&error)));
                tracing::warn!(error = full(&error), "cannot restore the LISTEN connection; will try again");
            }
        }
        tokio::time::sleep(pauses.next().unwrap_or(PAUSE_MAX)).await;
    }
}

/// No pause between two attempts is longer, jitter apart.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Pauses between attempts: growing, and with jitter, so that the nodes of a fleet do not come back all at once.
fn pauses() -> impl Iterator<Item = Duration> {
    ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(20))
        .with_max_delay(PAUSE_MAX)
        .with_jitter()
        .without_max_times()
        .build()
}

/// Opens a line and makes sure that the pool reaches the same server.
async fn open(shared: &Arc<Shared>) -> Result<Line> {
    let (receiver, loser) = (Arc::clone(shared), Arc::clone(shared));
    let received = move |message| {
        let item = match message {
            Received::Change(payload) => Item::Message(payload),
            Received::Own(payload) => Item::Own(payload),
        };
        receiver.inbox.push(item);
    };
    let lost = move |how: String| {
        if loser.is_stopping() {
            return;
        }
        tracing::warn!(%how, "the LISTEN connection was lost; reads go to Postgres until it is back");
        loser.gap(Reason::ConnectionLost(how));
    };
    let line = line::open(&shared.config, &shared.own_channel, received, lost).await?;
    reach_same_server(shared, line.incarnation).await?;
    Ok(line)
}

/// Makes sure that the pool reaches the server that the listener is on. Whatever ended the last line may have ended
/// pooled connections too, or they may still be open to a server that was replaced: each gives way to a new one.
async fn reach_same_server(shared: &Shared, listening: Incarnation) -> Result<()> {
    let failed = |error| database_error("connecting the pool", error);
    let mut outcome = Err(Error::new(
        Kind::Config,
        "the pool and the listener reach different servers or databases: both must reach the same primary",
    ));
    for _ in 0..=shared.pool.size() {
        let mut connection = shared.pool.acquire().await.map_err(failed)?;
        let stamp = sqlx::query("select canary, started from rowcache.stamp").fetch_one(&mut *connection).await;
        match stamp {
            Err(error) if is_connection_error(&error) => outcome = Err(failed(error)),
            Err(error) => return Err(failed(error)),
            Ok(row) => {
                let canary: Option<Uuid> = row.try_get(0).map_err(failed)?;
                let started = row.try_get(1).map_err(failed)?;
                if canary.map(|canary| Incarnation { canary, started }) == Some(listening) {
                    return Ok(());
                }
            }
        }
        drop(connection.detach());
    }
    outcome
}

/// Sends fences and verifies triggers until the line is given up. An error if it never proved itself.
async fn hold(shared: &Shared, line: &Line, ready: &mut Option<oneshot::Sender<Result<()>>>) -> Result<()> {
    shared.look(|coherence| coherence.listening(line.incarnation));
    if !line.is_open() {
        // It ended before the state machine knew of it, which then took no notice.
        shared.gap(Reason::ConnectionLost("closed".into()));
    }
    let mut proved = false;
    loop {
        shared.step(|coherence| coherence.tick(clock::now()));
        let now = clock::now();
        let (up, has_line) = shared.look(|it| (it.bypassed().is_none(), it.has_line()));
        if up && !proved {
            proved = true;
            tracing::info!("coherent");
            if let Some(ready) = ready.take() {
                let _ = ready.send(Ok(()));
            }
        }
        if !has_line {
            return if proved { Ok(()) } else { Err(not_proved(shared)) };
        }
        if let Some(fence) = shared.look(|it| it.next_fence(now, Uuid::new_v4())) {
            // Together, so that a fence costs one round trip and not two. What happened to the triggers is found out before
            // anything is trusted: the fence counts only when both are done.
            tokio::join!(check(shared, line, fence), send(shared, line, fence));
            continue;
        }
        let due = shared.look(|it| it.fence_due().into_iter().chain(it.fence_deadline()).chain(it.lease_end()).min());
        let pause = due.map_or(shared.config.beat, |due: Boot| due.saturating_sub(now));
        tokio::select! {
            () = shared.wake.notified() => {}
            () = tokio::time::sleep(pause.min(shared.config.beat)) => {}
        }
    }
}

/// The line was given up before its first fence came back.
fn not_proved(shared: &Shared) -> Error {
    match shared.status_reason() {
        Some(Reason::BeatLate) => Error::new(
            Kind::Pooler,
            format!(
                "a notification that was sent through the pool did not reach the LISTEN connection within {:?}; if \
                 the listener's address is a pooler in transaction mode (PgBouncer, a `-pooler` host), give the \
                 listener a direct connection",
                shared.config.beat_timeout,
            ),
        ),
        Some(why) => Error::new(Kind::Unavailable, why.to_string()),
        None => Error::new(Kind::Unavailable, "the connection was lost while the node was starting"),
    }
}

/// Sends a fence: the first one through the pool, the others through the control connection.
async fn send(shared: &Shared, line: &Line, fence: Fence) {
    let limit = shared.config.beat_timeout;
    let sending = async {
        if fence.probe {
            let notify = sqlx::query(FENCE).bind(&shared.own_channel).bind(fence.nonce.to_string());
            let sent = notify.execute(&shared.pool).await;
            sent.map(|_| true).map_err(|error| database_error("sending a fence through the pool", error))
        } else {
            line.send(&shared.own_channel, fence).await
        }
    };
    match timeout(limit, sending).await {
        // Sent, or late, which the state machine sees by itself.
        Ok(Ok(true)) | Err(_) => {}
        Ok(Ok(false)) => {
            tracing::warn!("a fence waited too long for the lock that orders commits; is a commit stuck?");
            shared.look(|coherence| coherence.fence_not_sent(fence));
        }
        Ok(Err(error)) => shared.gap(Reason::ConnectionLost(full(&error))),
    }
}

/// Looks at the triggers on behalf of a fence that was sent, or is being sent.
async fn check(shared: &Shared, line: &Line, fence: Fence) {
    match timeout(shared.config.beat_timeout, verify(shared, line)).await {
        Ok(Ok(())) => shared.step(|coherence| coherence.fence_checked(fence)),
        // The fence is late then, which the state machine sees by itself.
        Err(_) => {}
        Ok(Err(error)) => {
            // A connection that ended says so itself.
            if !error.is_unavailable() {
                tracing::warn!(error = full(&error), "cannot verify the triggers of the cached tables");
            }
            shared.gap(Reason::ConnectionLost(full(&error)));
        }
    }
}

/// Holds the triggers of every open table against what they were. A table whose triggers changed is in doubt
/// until they are found whole again.
async fn verify(shared: &Shared, line: &Line) -> Result<()> {
    let names = shared.tables.names();
    if names.is_empty() {
        return Ok(());
    }
    for (name, fingerprint) in line.fingerprints(&names).await? {
        let Some(cleared) = shared.tables.inspect(&name, fingerprint.as_deref(), clock::now()) else { continue };
        Shared::reclaim(cleared);
        match shared.tables.verified(&name, line.describe(&name).await?.whole()) {
            // A TRUNCATE leaves its trace too.
            Verified::Whole => {
                tracing::info!(table = name, "the triggers or the definition of this table changed, and are whole");
            }
            Verified::Broken(problem) => tracing::warn!(
                table = name,
                problem,
                "the triggers or the definition of this table changed; its reads go to Postgres until they are whole"
            ),
            Verified::Known => {}
        }
    }
    Ok(())
}

/// An error with its causes on one line.
fn full(error: &Error) -> String {
    line::with_causes(error)
}
