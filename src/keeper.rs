//! Keeps the line open: connects, proves, beats, verifies triggers, polls the change log, and connects again after a gap.
//!
//! The order matters (X7): LISTEN returns, *then* a new epoch begins, *then* a fence comes back, *then* entries
//! are served. Whatever was loaded before LISTEN returned is never served after it.
//!
//! With a spare line the one that is heard may change between any two steps; each asks for it anew.

mod poll;
mod spare;

use std::{iter, sync::Arc, time::Duration};

use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};
use tokio::{sync::oneshot, time::timeout};
use uuid::Uuid;

use crate::{
    coherence::{Boot, Fence, Reason},
    config::Config,
    error::{Error, Kind, Result, with_causes},
    lines::warn_lost,
    relay::LineId,
    server::Line,
    shared::Shared,
    tables::{Trust, Verified, Via},
    throttle::Complaint,
};

use poll::Poller;

/// Runs until the node is stopped. `ready` hears how the first attempt went; if it failed, nothing follows. Without, it is tried again like
/// every other one.
pub(crate) async fn keep(shared: Arc<Shared>, ready: Option<oneshot::Sender<Result<()>>>) {
    let mut stopping = shared.stopping();
    tokio::select! {
        biased;
        () = keep_trying(&shared, ready) => {}
        _ = stopping.wait_for(|stopping| *stopping) => {}
    }
}

async fn keep_trying(shared: &Arc<Shared>, mut ready: Option<oneshot::Sender<Result<()>>>) {
    let limit = open_limit(&shared.config);
    let mut pauses = line_pauses(shared);
    let mut complaint = Complaint::default();
    // Outlives lines: the next one goes on reading where the last one ended.
    let mut poller = Poller::new(&shared.config);
    loop {
        let began = shared.host.now();
        let end = match timeout(limit, open(shared)).await {
            Ok(Ok((id, line))) => hold(shared, id, line, &mut poller, &mut ready).await,
            Ok(Err(error)) => Err(error),
            Err(_) => Err(no_answer(limit)),
        };
        if let Some(ready) = ready.take() {
            // Only a first attempt that failed gets here. Nobody hears it if `start` was cancelled.
            let _ = ready.send(end);
            return;
        }
        match end {
            // It was up for a while, and is lost: the next attempts start afresh.
            Ok(()) => {
                complaint.is_settled();
                if shared.host.now() > began + shared.config.lease {
                    pauses = line_pauses(shared);
                }
            }
            // The attempt ended with the node: that is no failure, and nothing is tried again.
            Err(_) if shared.is_stopping() => return,
            Err(error) => {
                let error = full(&error);
                if complaint.is_news(&error, shared.host.now()) {
                    tracing::warn!(error, "cannot open the LISTEN connection; will try again");
                } else {
                    tracing::debug!(error, "cannot open the LISTEN connection; will try again");
                }
                shared.gap(Reason::ConnectionLost(error));
            }
        }
        tokio::time::sleep(pauses.next().unwrap_or(PAUSE_MAX)).await;
    }
}

/// No pause between two attempts is longer, jitter apart: a server that is starting can refuse one connection per node and second.
pub(crate) const PAUSE_MAX: Duration = Duration::from_secs(1);
const PAUSE_MIN: Duration = Duration::from_millis(20);

/// Pauses between attempts: growing, and with jitter, so that the nodes of a fleet do not come back all at once.
pub(crate) fn pauses(shared: &Shared) -> impl Iterator<Item = Duration> + use<> {
    pauses_growing(shared, 2.0)
}

/// Pauses between attempts to open the line: each is a thirtieth of the time that has been waited for already, so that a node is back
/// soon after its server, however long that took. The first one is as short as a fleet lets it be, whose nodes must not come back all at
/// once: nothing says yet that the server is not there.
fn line_pauses(shared: &Shared) -> impl Iterator<Item = Duration> + use<> {
    iter::once(jitter(shared)).chain(pauses_growing(shared, 1.05))
}

fn pauses_growing(shared: &Shared, factor: f32) -> ExponentialBackoff {
    ExponentialBuilder::default()
        .with_min_delay(PAUSE_MIN)
        .with_factor(factor)
        .with_max_delay(PAUSE_MAX)
        .with_jitter()
        .with_jitter_seed(shared.host.random())
        .without_max_times()
        .build()
}

/// A part of the shortest pause.
fn jitter(shared: &Shared) -> Duration {
    #[expect(clippy::cast_possible_truncation, reason = "any bits of it will do")]
    let fraction = f64::from(shared.host.random() as u32) / f64::from(u32::MAX);
    PAUSE_MIN.mul_f64(fraction)
}

/// How long opening a line may take: three connections, and a few statements on each.
fn open_limit(config: &Config) -> Duration {
    3 * config.beat_timeout.max(Duration::from_secs(1))
}

fn no_answer(limit: Duration) -> Error {
    Error::new(Kind::Unavailable, format!("Postgres did not answer within {limit:?}"))
}

/// Opens a line and makes sure that the pool reaches the same server.
async fn open(shared: &Arc<Shared>) -> Result<(LineId, Arc<dyn Line>)> {
    let (id, line) = shared.open_line().await?;
    shared.server.reaches(line.incarnation()).await?;
    Ok((id, line))
}

/// Keeps the node coherent, with this line and those that take over from it, until there is a gap. An error if the line
/// never proved itself.
async fn hold(
    shared: &Arc<Shared>,
    id: LineId,
    line: Arc<dyn Line>,
    poller: &mut Poller,
    ready: &mut Option<oneshot::Sender<Result<()>>>,
) -> Result<()> {
    let _held = Held(shared);
    shared.lead(id, &line);
    // A line that is lost closes its connections when nobody has it any more.
    drop(line);
    tokio::select! {
        biased;
        end = beat(shared, poller, ready) => end,
        never = spare::keep(shared) => match never {},
    }
}

/// Gives up all lines when it goes.
struct Held<'a>(&'a Shared);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.give_up_lines();
    }
}

/// Sends fences and verifies triggers until there is a gap.
async fn beat(shared: &Shared, poller: &mut Poller, ready: &mut Option<oneshot::Sender<Result<()>>>) -> Result<()> {
    let mut checked = true;
    let mut proved = false;
    loop {
        shared.step(|coherence| coherence.tick(shared.host.now()));
        let now = shared.host.now();
        let (up, has_line) = shared.look(|it| (it.bypassed().is_none(), it.has_line()));
        if up && !proved {
            proved = true;
            tracing::info!("coherent");
            shared.spare_wanted.notify_one();
            if let Some(ready) = ready.take() {
                let _ = ready.send(Ok(()));
            }
        }
        if !has_line {
            return if proved { Ok(()) } else { Err(not_proved(shared)) };
        }
        if shared.lose_the_deaf(now) {
            continue;
        }
        if let Some(fence) = shared.look(|it| it.next_fence(now, Uuid::new_v4())) {
            // Together, so that a fence costs one round trip and not three. What happened to the triggers is found out before
            // anything is trusted: the fence counts only when all is done.
            (checked, (), ()) =
                tokio::join!(check(shared, fence, checked), send(shared, fence), poller.poll(shared, Some(fence)));
            continue;
        }
        let poll_due = poller.due(shared);
        if poll_due.is_some_and(|due| due <= now) {
            poller.poll(shared, None).await;
            continue;
        }
        let due = shared.look(|it| it.fence_due().into_iter().chain(it.fence_deadline()).chain(it.lease_end()).min());
        let due = due.into_iter().chain(shared.deaf_at()).chain(poll_due).min();
        // A deadline has passed only after its moment, at which this would otherwise spin: no timer is finer than this anyway.
        let pause = due.map_or(shared.config.beat, |due: Boot| due.saturating_sub(now).max(Duration::from_millis(1)));
        tokio::select! {
            biased;
            () = shared.wake.notified() => {}
            () = tokio::time::sleep(pause.min(shared.config.beat)) => {}
        }
    }
}

/// The line was given up before its first fence came back.
fn not_proved(shared: &Shared) -> Error {
    match shared.status_reason() {
        Some(Reason::BeatLate) if shared.config.listen => Error::new(
            Kind::Pooler,
            format!(
                "a notification that was sent through the pool did not reach the LISTEN connection within {:?}; if \
                 the listener's address is a pooler in transaction mode (PgBouncer, a `-pooler` host), give the \
                 listener a direct connection; if the two are in different databases of one server, connect both to \
                 the same one",
                shared.config.beat_timeout,
            ),
        ),
        Some(why) => Error::new(Kind::Unavailable, why.to_string()),
        None => Error::new(Kind::Unavailable, "the connection was lost while the node was starting"),
    }
}

/// How long the control connection has for a statement. With a spare that covers, so long that the spare can take over and
/// send a fence before this one is late; longer than a fence waits for its lock, which says nothing about the line.
fn limit(shared: &Shared, covered: bool) -> Duration {
    if covered { shared.config.beat_timeout / 2 } else { shared.config.beat_timeout }
}

/// Sends a fence: the first one through the pool, the others through the control connection.
async fn send(shared: &Shared, fence: Fence) {
    if !shared.config.listen {
        // Its poll is all that it is.
        return;
    }
    let Some((id, line)) = shared.line() else { return };
    let covered = shared.fence_starts(fence);
    let limit = limit(shared, covered);
    let sending = async {
        if fence.probe {
            if shared.server.probe(&shared.own_channel, fence).await? {
                return Ok(true);
            }
            Err(Error::new(Kind::Unavailable, STUCK))
        } else {
            line.send(&shared.own_channel, fence).await
        }
    };
    let lost = match timeout(limit, sending).await {
        Ok(Ok(true)) => return,
        // Late, which the state machine sees by itself.
        Err(_) if !covered => return,
        Ok(Ok(false)) => {
            tracing::warn!("{STUCK}");
            None
        }
        Ok(Err(error)) => Some(full(&error)),
        Err(_) => Some(format!("a fence could not be sent within {limit:?}")),
    };
    if let Some(how) = lost
        && shared.lose(id, how.clone())
        && !fence.probe
    {
        warn_lost(&how);
    }
    // If there is no gap, another one is due at once.
    shared.look(|coherence| coherence.fence_not_sent(fence));
}

const STUCK: &str = "a fence waited too long for the lock that orders commits; is a commit stuck?";

/// Looks at the triggers on behalf of a fence that was sent, or is being sent, and returns whether that was done. A line that
/// does not answer is lost; if the next one does not either (`before` is false), it is not the line's fault, and no line
/// after it may put off the doubt.
async fn check(shared: &Shared, fence: Fence, before: bool) -> bool {
    let Some((id, line)) = shared.line() else { return false };
    let covered = shared.is_covered();
    let limit = limit(shared, covered || !before);
    let error = match timeout(limit, verify(shared, &*line)).await {
        Ok(Ok(())) => {
            shared.step(|coherence| coherence.fence_checked(fence));
            return true;
        }
        // The fence is late then, which the state machine sees by itself.
        Err(_) if !covered && before => return false,
        Err(_) => Error::new(Kind::Timeout, format!("the triggers could not be verified within {limit:?}")),
        Ok(Err(error)) => error,
    };
    let how = full(&error);
    let gap = if before {
        shared.lose(id, how.clone())
    } else {
        shared.gap(Reason::ConnectionLost(how.clone()));
        true
    };
    if gap && error.is_unavailable() && !fence.probe {
        warn_lost(&how);
    } else if gap && !fence.probe {
        tracing::warn!(error = how, "cannot verify the triggers of the cached tables");
    }
    // If there is no gap, another one is due at once.
    shared.look(|coherence| coherence.fence_not_sent(fence));
    false
}

/// Holds the triggers of every open table against what they were. A table whose triggers changed is in doubt
/// until they are found whole again.
async fn verify(shared: &Shared, line: &dyn Line) -> Result<()> {
    let names = shared.tables.names();
    if names.is_empty() {
        return Ok(());
    }
    for (name, fingerprint) in line.fingerprints(&names).await? {
        let Some(cleared) = shared.tables.inspect(&name, fingerprint.as_deref(), shared.host.now()) else { continue };
        shared.reclaim(cleared);
        let whole = line.verify(&name).await?.and_then(|trust| heard(&shared.config, &name, trust));
        match shared.tables.verified(&name, whole) {
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

/// Whether this node hears what the triggers of a table tell; if not, what is in the way and the cure.
pub(crate) fn heard(config: &Config, name: &str, trust: Trust) -> Result<Trust, String> {
    if config.listen || trust.via == Via::Log {
        return Ok(trust);
    }
    Err(format!(
        "its changes are told with NOTIFY, which this node does not hear (`Config::listen`); run: rowcache track {name} --via log"
    ))
}

/// An error with its causes on one line.
fn full(error: &Error) -> String {
    with_causes(error)
}
