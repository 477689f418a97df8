//! What goes on at the server: how full the queue of notifications is and who holds it back, transactions that stay open,
//! and who listens.

use serde::Deserialize;

use super::{
    finding::{Finding, Report, Severity, age, some_of},
    server::Server,
    session::Session,
};

/// Who may see other roles' sessions.
const SEES_ALL: &str = "membership in pg_read_all_stats";

/// Asking also moves the queue's tail on: a queue that was full, and stays so after its blocker is gone, is repaired by
/// it.
const QUEUE: &str = "select pg_notification_queue_usage() as usage";

#[derive(Deserialize)]
struct Queue {
    usage: f64,
}

#[derive(Deserialize)]
struct Client {
    pid: i32,
    role: Option<String>,
    application: Option<String>,
    database: Option<String>,
    here: bool,
    state: State,
    /// What is known of the channels is the statement that it executed last.
    listens: Option<Channel>,
    transaction_seconds: Option<f64>,
    idle_seconds: Option<f64>,
}

#[derive(Deserialize, Eq, PartialEq)]
#[serde(rename_all = "snake_case")]
enum State {
    /// Not shown to roles that may not see it.
    Hidden,
    IdleInTransaction,
    /// It does not read what it is sent.
    Stuck,
    Other,
}

#[derive(Deserialize, Eq, PartialEq)]
#[serde(rename_all = "snake_case")]
enum Channel {
    Ours,
    Another,
}

const CLIENTS: &str = "select a.pid, a.usename::text as role, a.application_name as application, a.datname::text as database, \
     coalesce(a.datname = current_database(), false) as here, \
     case when a.query = '<insufficient privilege>' then 'hidden' \
       when a.state like 'idle in transaction%' then 'idle_in_transaction' \
       when a.wait_event = 'ClientWrite' then 'stuck' else 'other' end as state, \
     case when a.query ~* '^\\s*listen\\s+\"?rowcache\\M' then 'ours' \
       when a.query ~* '^\\s*listen\\M' then 'another' end as listens, \
     extract(epoch from clock_timestamp() - a.xact_start)::float8 as transaction_seconds, \
     extract(epoch from clock_timestamp() - a.state_change)::float8 as idle_seconds \
     from pg_stat_activity a \
     where (a.backend_type = 'client backend' or a.query = '<insufficient privilege>' and a.datid is not null) \
     and a.pid <> pg_backend_pid() \
     and coalesce(a.application_name, '') not like '%(doctor)' order by a.xact_start, a.pid";

#[derive(Deserialize)]
struct Prepared {
    name: String,
    owner: String,
    database: String,
    seconds: f64,
}

const PREPARED: &str = "select gid as name, owner::text, database::text, \
     extract(epoch from clock_timestamp() - prepared)::float8 as seconds from pg_prepared_xacts order by prepared";

/// `long_seconds`: from when on a transaction is long.
pub(super) async fn check(control: &Session, report: &mut Report, server: &Server, long_seconds: f64) {
    let clients = control.ask::<Client>(report, "the sessions", SEES_ALL, CLIENTS).await.unwrap_or_default();
    let hidden = clients.iter().filter(|client| client.state == State::Hidden).count();
    if hidden > 0 {
        report.push(
            Finding::note(
                "rights.missing",
                format!("{hidden} sessions of other roles are hidden from role {}", server.role),
            )
            .about("pg_stat_activity")
            .why("they may listen, or have a transaction open, and are not looked at")
            .cure(format!("grant pg_read_all_stats to {}", server.role)),
        );
    }
    if !server.is_standby {
        queue(control, report, &clients).await;
    }
    transactions(&clients, long_seconds, report);
    let prepared =
        control.ask::<Prepared>(report, "prepared transactions", "select on view pg_prepared_xacts", PREPARED).await;
    for left in prepared.unwrap_or_default() {
        report.push(prepared_transaction(&left, long_seconds));
    }
    listeners(&clients, server, report);
}

async fn queue(control: &Session, report: &mut Report, clients: &[Client]) {
    let Some(Queue { usage }) = control
        .ask_one(report, "the queue of notifications", "execute on function pg_notification_queue_usage()", QUEUE)
        .await
    else {
        return;
    };
    let percent = usage * 100.0;
    let what = format!("the queue of notifications is {percent:.1} % full");
    let severity = queue_severity(usage);
    let mut finding = Finding::new(severity, "queue.usage", what).figure("percent", percent);
    if severity > Severity::Ok {
        let (mut held, mut pids) = (Vec::new(), Vec::new());
        for client in clients {
            let how = match client.state {
                State::Stuck => "does not read what it is sent",
                State::IdleInTransaction => "is idle in a transaction",
                State::Hidden | State::Other => continue,
            };
            held.push(format!("{} {how}", client.name()));
            pids.push(client.pid.to_string());
        }
        finding = finding.why(match held.len() {
            0 => {
                "when it is full, every commit that notifies fails; no session that is visible holds it back".to_owned()
            }
            _ => format!("when it is full, every commit that notifies fails; perhaps held back by: {}", some_of(&held)),
        });
        if let Some(oldest) = pids.first() {
            finding = finding.cure(format!("select pg_terminate_backend({oldest})"));
        }
    }
    report.push(finding);
}

fn queue_severity(usage: f64) -> Severity {
    match usage {
        usage if usage > 0.5 => Severity::Error,
        usage if usage > 0.1 => Severity::Warning,
        usage if usage > 0.01 => Severity::Note,
        _ => Severity::Ok,
    }
}

impl Client {
    fn name(&self) -> String {
        let or_none = |text: &Option<String>| text.clone().unwrap_or_default();
        let mut name = format!("pid {} ({}@{}", self.pid, or_none(&self.role), or_none(&self.database));
        if let Some(application) = self.application.as_deref().filter(|name| !name.is_empty()) {
            name = format!("{name}, {application}");
        }
        name + ")"
    }
}

fn transactions(clients: &[Client], long_seconds: f64, report: &mut Report) {
    let mut clean = true;
    for client in clients {
        let Some(open) = client.transaction_seconds else { continue };
        // A fifth: who idles should not, who works may take longer.
        let idle = client.idle_seconds.filter(|_| client.state == State::IdleInTransaction);
        let (code, what) = match idle {
            Some(idle) if idle >= long_seconds / 5.0 => (
                "transaction.idle",
                format!("{} is idle in a transaction since {} (open for {})", client.name(), age(idle), age(open)),
            ),
            _ if open >= long_seconds => {
                ("transaction.long", format!("{} has a transaction open for {}", client.name(), age(open)))
            }
            _ => continue,
        };
        clean = false;
        report.push(
            Finding::warning(code, what)
                .about(client.pid.to_string())
                .why("if it listens, the queue fills behind it; `rowcache track` waits for it if it has written")
                .cure(format!("select pg_terminate_backend({}), or idle_in_transaction_session_timeout", client.pid)),
        );
    }
    if clean {
        report.push(Finding::ok("transactions", format!("no transaction is open for {} or longer", age(long_seconds))));
    }
}

fn prepared_transaction(left: &Prepared, long_seconds: f64) -> Finding {
    let severity = if left.seconds >= long_seconds { Severity::Warning } else { Severity::Note };
    let Prepared { name, owner, database, seconds } = left;
    let what = format!("transaction '{name}' of {owner} in database {database} is prepared since {}", age(*seconds));
    Finding::new(severity, "transaction.prepared", what)
        .about(name)
        .why("it keeps its locks until somebody ends it, and `rowcache track` waits for those; it changed no tracked table")
        .cure(format!("in database {database}: rollback prepared '{}'", name.replace('\'', "''")))
}

fn listeners(clients: &[Client], server: &Server, report: &mut Report) {
    let here = || clients.iter().filter(|client| client.here);
    let ours = here().filter(|client| client.listens == Some(Channel::Ours)).count();
    let noun = if ours == 1 { "session listens" } else { "sessions listen" };
    report.push(Finding::ok("listeners.ours", format!("{ours} {noun} for rowcache, by the last statement")));
    let others: Vec<_> = here().filter(|client| client.listens == Some(Channel::Another)).map(Client::name).collect();
    if !others.is_empty() && server.version < 190_000 {
        report.push(
            Finding::note("listeners.others", format!("{} listen on other channels: {}", others.len(), some_of(&others)))
                .why("before PostgreSQL 19 every commit that notifies wakes all listeners of the database, some 15 us of CPU each")
                .cure("share one listener per process, or listen in another database"),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_full_is_too_full() {
        let cases = [(0.0, Severity::Ok), (0.01, Severity::Ok), (0.02, Severity::Note), (0.11, Severity::Warning)];
        for (usage, severity) in cases.into_iter().chain([(0.51, Severity::Error), (1.0, Severity::Error)]) {
            assert_eq!(queue_severity(usage), severity, "{usage}");
        }
    }
}
