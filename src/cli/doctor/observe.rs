//! What only shows over time: whether a message reaches another session that listens, how long a fence takes, and how
//! many transactions notify.
//!
//! Fences are sent from one session and received by another, which is idle and listens: behind a pooler in transaction
//! mode a session that notifies itself would hear itself.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use serde::Deserialize;
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};
use uuid::Uuid;

use super::{
    finding::{Finding, Report, Severity, some_of},
    seen::{Counts, Seen},
    session::{Refused, Session},
    tables::VIA_LOG,
};
use crate::{Config, change::CHANNEL, cli::report::with_causes, server::Received};

/// Fences while observing.
const FENCES: u32 = 20;

/// A fence of a node that takes longer than its `beat_timeout` (by default this) is a gap.
const FENCE_WITHIN: Duration = Duration::from_secs(3);

/// What is not back after this does not come.
const HEARD_WITHIN: Duration = Duration::from_secs(10);

/// Notifying transactions a second above which they wait for each other: each holds one lock of the whole server while
/// its commit is flushed.
const RATE_MAX: f64 = 300.0;

/// The session that listens.
pub(super) struct Listener {
    session: Session,
    fences: mpsc::Receiver<(Uuid, Instant)>,
    seen: Arc<Mutex<Seen>>,
    channel: String,
    /// The last two of them enclose what is counted.
    probe: Uuid,
    first: Uuid,
    last: Uuid,
}

impl Listener {
    /// Connects. It does not listen yet.
    pub(super) async fn open(config: &Config) -> crate::Result<Self> {
        let [probe, first, last] = [(); 3].map(|()| Uuid::new_v4());
        let seen = Arc::new(Mutex::new(Seen::between(first, last)));
        let (sender, fences) = mpsc::channel(FENCES as usize + 2);
        let counting = Arc::clone(&seen);
        let received = move |received| {
            let mut seen = counting.lock().unwrap_or_else(PoisonError::into_inner);
            match received {
                Received::Change(payload) => seen.message(&payload),
                Received::Question(_) => {}
                Received::Own(payload) => {
                    if let Ok(nonce) = payload.parse::<Uuid>() {
                        let now = Instant::now();
                        seen.fence(nonce, now);
                        // Full only if somebody else sends here; the socket is read on.
                        let _ = sender.try_send((nonce, now));
                    }
                }
            }
        };
        let session = Session::open(config, received).await?;
        let channel = format!("rowcache_doctor_{}", Uuid::new_v4().simple());
        Ok(Self { session, fences, seen, channel, probe, first, last })
    }

    /// Sends a fence, and waits for it.
    async fn fence(&mut self, control: &Session, nonce: Uuid) -> Result<Duration, Late> {
        let sent = Instant::now();
        let millis = FENCE_WITHIN.as_millis();
        let channel = &self.channel;
        let send = format!("set local lock_timeout = {millis}; select pg_catalog.pg_notify('{channel}', '{nonce}')");
        control.run(&send).await.map_err(Late::Unsent)?;
        let back = async {
            while let Some((received, at)) = self.fences.recv().await {
                if received == nonce {
                    return Some(at.duration_since(sent));
                }
            }
            None
        };
        timeout(HEARD_WITHIN, back).await.ok().flatten().ok_or(Late::Unheard)
    }
}

/// Why a fence is not back.
enum Late {
    Unsent(Refused),
    Unheard,
}

/// Whether a pooler gives connections of the server to several clients by turns. Nothing has been left behind on them so
/// far, so that it is safe to look; a LISTEN would stay.
pub(super) async fn shares_connections(control: &Session, listener: &Listener, report: &mut Report) -> bool {
    let mut pids = Vec::new();
    for session in [control, &listener.session, control, &listener.session] {
        match session.run("select pg_catalog.pg_backend_pid()").await {
            Ok(pid) => pids.extend(pid),
            Err(refused) => {
                unsent(control, report, "asking for the process id failed", refused).await;
                return true;
            }
        }
    }
    let shared = pids[0] == pids[1] || pids[0] != pids[2] || pids[1] != pids[3];
    if shared {
        report.push(pooler("two connections took turns on one connection of the server"));
    }
    shared
}

fn pooler(seen: &str) -> Finding {
    Finding::error("pooler.transaction_mode", format!("a pooler in transaction mode is in the path: {seen}"))
        .why("LISTEN succeeds there, and nothing arrives: no node can work through it")
        .cure("give the listener a direct connection to the primary, or a pooler in session mode")
}

/// Observes for `time`. `commands` track each table again.
pub(super) async fn check(
    control: &Session,
    mut listener: Listener,
    report: &mut Report,
    time: Duration,
    commands: &HashMap<String, String>,
) {
    if !proves_delivery(control, &mut listener, report).await {
        return;
    }
    if let Err(refused) = listener.session.run(&format!("listen {CHANNEL}")).await {
        return unsent(control, report, "LISTEN failed", refused).await;
    }
    let logged: HashMap<_, _> = commands.iter().filter(|(_, track)| track.ends_with(VIA_LOG)).collect();
    let log = if logged.is_empty() { None } else { log_position(control, report).await };
    fences(control, &mut listener, report, time).await;
    let counted = listener.seen.lock().unwrap_or_else(PoisonError::into_inner).counted(Instant::now());
    if let Some((counts, time)) = counted {
        traffic(&counts, time, commands, report);
    }
    if let Some((from, since)) = log {
        log_traffic(control, report, from, since, &logged).await;
    }
}

#[derive(Deserialize)]
struct LogPosition {
    xid: i64,
}

const NEEDS_LOG: &str = "select on view rowcache.change_log";

/// Where the change log begins for what is counted.
async fn log_position(control: &Session, report: &mut Report) -> Option<(i64, Instant)> {
    let position = "select pg_snapshot_xmax(pg_current_snapshot())::text::bigint as xid";
    let LogPosition { xid } = control.ask_one(report, "the change log", NEEDS_LOG, position).await?;
    Some((xid, Instant::now()))
}

#[derive(Deserialize)]
struct Logged {
    name: String,
    transactions: u64,
}

/// Transactions a second below which a table that is told by way of the log costs less by NOTIFY. With that, each one costs every
/// node's backend some 15 µs; without, each node polls a hundred times a second while it is written to.
const LOG_RATE_MIN: f64 = 30.0;

/// How many transactions wrote to the change log since `from`.
async fn log_traffic(
    control: &Session,
    report: &mut Report,
    from: i64,
    since: Instant,
    logged: &HashMap<&String, &String>,
) {
    // Text, not JSON: anybody may have put something else there.
    let count = format!(
        "select t.relation as name, count(distinct l.xid) as transactions from rowcache.tracked t \
         left join rowcache.change_log l on l.xid >= '{from}'::xid8 \
           and starts_with(l.message, '{{\"v\":1,\"t\":' || to_json(t.relation)::text || ',') \
         where t.via = 'log' group by 1 order by 2 desc, 1"
    );
    let Some(tables) = control.ask::<Logged>(report, "the change log", NEEDS_LOG, &count).await else { return };
    let seconds = since.elapsed().as_secs_f64().max(0.001);
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    let per_second = |table: &Logged| table.transactions as f64 / seconds;
    let each: Vec<_> = tables.iter().map(|table| format!("{} {:.1}", table.name, per_second(table))).collect();
    let rate: f64 = tables.iter().map(per_second).sum();
    let what = format!("{rate:.1} transactions a second write to the change log ({})", some_of(&each));
    // Tables that are not written to at all at the moment may be later.
    let calm = tables.iter().find(|table| table.transactions > 0 && rate < LOG_RATE_MIN);
    report.push(match calm.and_then(|table| logged.get(&table.name)) {
        None => Finding::ok("log.rate", what).figure("per_second", rate),
        Some(track) => Finding::note("log.rate", what)
            .why("so few are known sooner, and cost the server less, by NOTIFY")
            .cure(format!(
                "if it is never written to more than {LOG_RATE_MIN:.0} times a second, and every node listens: {}",
                track.trim_end_matches(VIA_LOG)
            ))
            .figure("per_second", rate),
    });
}

/// Sends fences for so long, or until one is missing. Fewer where each takes long: the time is kept.
async fn fences(control: &Session, listener: &mut Listener, report: &mut Report, time: Duration) {
    let mut took = Vec::new();
    let began = Instant::now();
    for n in 0..FENCES {
        sleep((time * n / (FENCES - 1)).saturating_sub(began.elapsed())).await;
        let is_last = n + 1 == FENCES || (n > 0 && began.elapsed() >= time);
        let nonce = match n {
            0 => listener.first,
            _ if is_last => listener.last,
            _ => Uuid::new_v4(),
        };
        match listener.fence(control, nonce).await {
            Ok(time) => took.push(time),
            Err(Late::Unsent(refused)) => return unsent(control, report, "a fence could not be sent", refused).await,
            Err(Late::Unheard) => {
                let seconds = HEARD_WITHIN.as_secs();
                return report.push(late(format!("a fence was sent, and was not back within {seconds} s")));
            }
        }
        if is_last {
            break;
        }
    }
    report.push(latency(&mut took));
}

/// Whether a notification reaches the session that listens, while that is idle.
async fn proves_delivery(control: &Session, listener: &mut Listener, report: &mut Report) -> bool {
    let listen = format!("listen \"{}\"", listener.channel);
    if let Err(refused) = listener.session.run(&listen).await {
        unsent(control, report, "LISTEN failed", refused).await;
        return false;
    }
    match listener.fence(control, listener.probe).await {
        Ok(_) => {
            report.push(Finding::ok("listen.arrives", "a notification reaches another session that listens"));
            return true;
        }
        Err(Late::Unsent(refused)) => unsent(control, report, "a fence could not be sent", refused).await,
        Err(Late::Unheard) => {
            report.push(pooler("a notification did not reach the session that listens"));
            // If the pooler takes another connection for this, the registration stays until that one ends.
            let _ = listener.session.run("unlisten *").await;
        }
    }
    false
}

#[derive(Deserialize)]
struct Holder {
    pid: i32,
    waits_for: Option<String>,
}

/// Who holds the lock that every commit with notifications takes: "database 0".
const HOLDER: &str = "select l.pid, a.wait_event as waits_for from pg_locks l left join pg_stat_activity a on a.pid = l.pid \
     where l.locktype = 'object' and l.classid = 'pg_database'::regclass and l.objid = 0 and l.granted";

/// Says why a statement failed that a node needs.
async fn unsent(control: &Session, report: &mut Report, what: &str, refused: Refused) {
    let message = match refused {
        Refused::Right(message) | Refused::Lost(message) | Refused::Other(message) => message,
        Refused::Locked => {
            let holder = control.ask_one::<Holder>(report, "locks", "select on view pg_locks", HOLDER).await;
            let by = holder.map_or_else(String::new, |Holder { pid, waits_for }| {
                let waits = waits_for.map_or_else(String::new, |event| format!(", which waits for {event}"));
                format!(": pid {pid}{waits}")
            });
            let seconds = FENCE_WITHIN.as_secs();
            report.push(
                Finding::error(
                    "fence.blocked",
                    format!("{what} within {seconds} s, behind a commit that does not end{by}"),
                )
                .why("it holds the lock that orders notifications, and every commit that notifies waits for it")
                .cure(
                    "if it waits for SyncRep: bring the synchronous standby back, or change synchronous_standby_names",
                ),
            );
            return;
        }
    };
    report.push(Finding::error("fence.failed", format!("{what}: {message}")).why("nodes need it once a second"));
}

fn late(what: String) -> Finding {
    Finding::error("fence.late", what)
        .why("a node waits 3 s; then it gives its connection up, and reads Postgres until it has another")
        .cure("look at the load of the server and of this machine, and at the network between them")
}

fn latency(took: &mut [Duration]) -> Finding {
    took.sort_unstable();
    let ms = |time: Option<&Duration>| time.map_or(0.0, |time| time.as_secs_f64() * 1000.0);
    let (half, most) = (ms(took.get(took.len() / 2)), ms(took.last()));
    if took.last().is_some_and(|time| *time > FENCE_WITHIN) {
        return late(format!("a fence took {most:.0} ms")).figure("p50_ms", half).figure("max_ms", most);
    }
    let severity = match (half, most) {
        (half, _) if half > 100.0 => Severity::Warning,
        (half, most) if half > 10.0 || most > 100.0 => Severity::Note,
        _ => Severity::Ok,
    };
    let what = format!("a fence takes {half:.1} ms (median of {}), {most:.1} ms at most", took.len());
    let finding = Finding::new(severity, "fence.latency", what).figure("p50_ms", half).figure("max_ms", most);
    match severity {
        Severity::Ok => finding,
        _ => finding
            .why("a fence waits behind commits that notify, and changes reach the nodes as late")
            .cure("make commits faster (disk, synchronous standbys), or let fewer of them notify: rowcache track TABLE --ignore COLUMNS"),
    }
}

fn traffic(counts: &Counts, time: Duration, commands: &HashMap<String, String>, report: &mut Report) {
    let seconds = time.as_secs_f64().max(0.001);
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    let per_second = |count: u64| count as f64 / seconds;
    let mut tables: Vec<_> = counts.tables.iter().collect();
    tables.sort_by_key(|(_, table)| std::cmp::Reverse(table.transactions.count));
    let each: Vec<_> =
        tables.iter().map(|(name, table)| format!("{name} {:.1}", per_second(table.transactions.count))).collect();
    let rate = per_second(counts.transactions.count);
    let which = if each.is_empty() { String::new() } else { format!(" ({})", some_of(&each)) };
    let what = format!("{rate:.1} transactions a second notify{which}");
    report.push(if rate > RATE_MAX {
        let most = tables.first().map_or("TABLE", |(name, _)| name.as_str());
        let track = commands.get(most).map_or_else(|| format!("rowcache track {most}"), Clone::clone);
        Finding::warning("notify.rate", what)
            .why("such commits wait for each other, in the whole server, and wake every listener")
            .cure(format!(
                "tell the table by way of the change log: {track} --via log; or leave out columns that change often: {track} \
                 --ignore COLUMNS"
            ))
            .figure("per_second", rate)
    } else {
        Finding::ok("notify.rate", what).figure("per_second", rate)
    });
    for (name, table) in tables.iter().filter(|(_, table)| table.whole.count > 0) {
        let rate = per_second(table.whole.count);
        let severity = if rate >= 1.0 { Severity::Warning } else { Severity::Note };
        let what = format!("{name}: {} transactions told a change of the whole table", table.whole.count);
        let track = commands.get(*name).map_or_else(|| format!("rowcache track {name}"), Clone::clone);
        report.push(
            Finding::new(severity, "notify.whole_table", what)
                .about(*name)
                .why("every node drops the table from memory each time")
                .cure(format!(
                    "{track} --max-keys N (rows of a statement), or fewer rows per statement, and no TRUNCATE"
                ))
                .figure("per_second", rate),
        );
    }
    if counts.unreadable > 0 {
        let error = counts.first_error.as_deref().unwrap_or("");
        report.push(
            Finding::warning(
                "notify.unreadable",
                format!("{} messages on channel {CHANNEL} cannot be read: {error}", counts.unreadable),
            )
            .about(CHANNEL)
            .why("each makes every node forget a table, or all of them")
            .cure("find out who else sends there, or which release of rowcache does"),
        );
    }
}

/// The listener could not connect, though the control session had.
pub(super) fn no_listener(error: crate::Error) -> Finding {
    let error = with_causes(&error.into());
    Finding::error("connection.second", format!("a second connection failed: {error}"))
        .why("a node needs two for its line, and those of its pool")
        .cure("raise max_connections, or the role's or database's connection limit")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fence_is_judged_by_the_median_and_by_what_a_node_waits_for() {
        let judged = |half: u64, most: u64| {
            let mut took = [half, half, half, most].map(Duration::from_millis);
            let found = serde_json::to_value(latency(&mut took)).expect("JSON");
            format!("{} {}", found["severity"].as_str().expect("text"), found["code"].as_str().expect("text"))
        };
        assert_eq!(judged(1, 5), "ok fence.latency");
        assert_eq!(judged(1, 200), "note fence.latency");
        assert_eq!(judged(20, 30), "note fence.latency");
        assert_eq!(judged(101, 200), "warning fence.latency");
        assert_eq!(judged(1, 3001), "error fence.late");
    }
}
