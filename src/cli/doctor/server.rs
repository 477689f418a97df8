//! The server: its version, whether it is the primary, and settings that meet the cache.

use jiff::civil::{Date, date};
use serde::Deserialize;

use super::{
    finding::{Finding, Report, Severity},
    session::Session,
};

/// What the other checks need to know.
#[derive(Debug, Deserialize)]
pub(super) struct Server {
    /// As `server_version_num`: 180004.
    pub(super) version: i32,
    version_name: String,
    pub(super) is_standby: bool,
    pub(super) role: String,
    database: String,
    max_prepared: i32,
    fsync: String,
    synchronous_commit: String,
    replication_role: String,
    replication_role_source: String,
}

const SERVER: &str = "select current_setting('server_version_num')::int as version, \
     current_setting('server_version') as version_name, pg_is_in_recovery() as is_standby, \
     session_user as role, current_database() as database, \
     current_setting('max_prepared_transactions')::int as max_prepared, current_setting('fsync') as fsync, \
     current_setting('synchronous_commit') as synchronous_commit, s.setting as replication_role, \
     s.source as replication_role_source from pg_settings s where s.name = 'session_replication_role'";

/// Defaults that are stored for a role, a database, or one in the other.
const DEFAULTS: &str = "select r.rolname as role, d.datname as database, \
     lower(split_part(c.setting, '=', 1)) as name from pg_db_role_setting s \
     left join pg_roles r on r.oid = s.setrole \
     left join pg_database d on d.oid = s.setdatabase \
     cross join unnest(s.setconfig) as c(setting) \
     where (s.setdatabase = 0 or d.datname = current_database()) \
     and c.setting ~* '^(session_replication_role=replica|synchronous_commit=(off|false|no|0))$' order by 3, 1, 2";

#[derive(Deserialize)]
struct Default {
    role: Option<String>,
    database: Option<String>,
    name: String,
}

pub(super) async fn check(control: &Session, report: &mut Report) -> Option<Server> {
    let server: Server = control.ask_one(report, "the server", "select on view pg_settings", SERVER).await?;
    report.push(version(server.version, &server.version_name, jiff::Zoned::now().date()));
    if server.is_standby {
        report.push(
            Finding::error("server.standby", "this server is a standby")
                .why("Postgres allows neither LISTEN nor NOTIFY there, so no node can work with it")
                .cure("name the primary in the database URL"),
        );
    } else {
        report.push(Finding::ok("server.primary", format!("connected as {} to {}", server.role, server.database)));
    }
    let defaults = control
        .ask::<Default>(report, "the defaults of roles and databases", "select on table pg_db_role_setting", DEFAULTS)
        .await;
    settings(&server, &defaults.unwrap_or_default(), report);
    Some(server)
}

fn settings(server: &Server, defaults: &[Default], report: &mut Report) {
    if server.max_prepared > 0 {
        report.push(
            Finding::note(
                "settings.max_prepared_transactions",
                format!("max_prepared_transactions is {}", server.max_prepared),
            )
            .about("max_prepared_transactions")
            .why("Postgres refuses PREPARE TRANSACTION after a change of a table that is told with NOTIFY")
            .cure("tell tables that are written in two-phase commits by way of the change log: rowcache track TABLE --via log"),
        );
    }
    if server.fsync == "off" {
        report.push(
            Finding::note("settings.fsync", "fsync is off")
                .about("fsync")
                .why("a crash of the machine loses commits that nodes saw; a new incarnation makes them forget")
                .cure("fsync = on, wherever data matters"),
        );
    }
    let here = (server.synchronous_commit == "off").then(|| "this session".to_owned());
    let elsewhere = defaults.iter().filter(|default| default.name == "synchronous_commit").map(whom);
    let asynchronous: Vec<_> = elsewhere.chain(here).collect();
    if !asynchronous.is_empty() {
        report.push(
            Finding::note(
                "settings.synchronous_commit",
                format!("synchronous_commit is off ({})", asynchronous.join(", ")),
            )
            .about("synchronous_commit")
            .why("a crash loses commits that nodes saw; a new incarnation makes them forget, so no node serves one"),
        );
    }
    let stored = ["session", "client", "user", "database", "database user"];
    let everywhere = server.replication_role == "replica" && !stored.contains(&&*server.replication_role_source);
    let everywhere = everywhere.then(|| "the whole server".to_owned());
    let replica = defaults.iter().filter(|default| default.name == "session_replication_role").map(whom);
    for whom in replica.chain(everywhere) {
        report.push(
            Finding::note("settings.session_replication_role", format!("session_replication_role is replica for {whom}"))
                .about("session_replication_role")
                .why("the triggers of rowcache fire all the same (ENABLE ALWAYS), but foreign keys and other triggers do not")
                .cure("set it in the sessions that need it, not as a default"),
        );
    }
}

fn whom(default: &Default) -> String {
    match (&default.role, &default.database) {
        (Some(role), Some(database)) => format!("role {role} in database {database}"),
        (Some(role), None) => format!("role {role}"),
        (None, Some(database)) => format!("database {database}"),
        (None, None) => "every role".to_owned(),
    }
}

/// The first minor releases in which VACUUM keeps what unread notifications need.
const NOTIFY_FIXED: [(i32, i32); 5] = [(14, 21), (15, 16), (16, 12), (17, 8), (18, 2)];

/// When the last release of a major version comes out.
const LAST_RELEASE: [(i32, Date); 5] = [
    (14, date(2026, 11, 12)),
    (15, date(2027, 11, 11)),
    (16, date(2028, 11, 9)),
    (17, date(2029, 11, 8)),
    (18, date(2030, 11, 14)),
];

/// What there is to say about a version, on this day.
fn version(number: i32, name: &str, today: Date) -> Finding {
    let (major, minor) = (number / 10_000, number % 10_000);
    let name = format!("PostgreSQL {name}");
    let of = |table: &[(i32, i32)]| table.iter().find(|(of, _)| *of == major).map(|(_, minor)| *minor);
    if major < 14 {
        return Finding::error("server.version_unsupported", format!("{name} is older than rowcache supports"))
            .about("server_version")
            .why("its community support has ended, and rowcache is tested on 15 and newer")
            .cure("upgrade to PostgreSQL 15 or newer");
    }
    if let Some(fixed) = of(&NOTIFY_FIXED).filter(|fixed| minor < *fixed) {
        return Finding::warning("server.notify_bug", format!("{name} has a bug in NOTIFY"))
            .about("server_version")
            .why(
                "VACUUM can remove what unread notifications need (\"could not access status of transaction\"): LISTEN \
                 fails, and who listens already hears nothing more",
            )
            .cure(format!("upgrade to {major}.{fixed} or newer"));
    }
    if let Some((_, last)) = LAST_RELEASE.iter().find(|(of, last)| *of == major && *last < today) {
        return Finding::warning(
            "server.end_of_life",
            format!("{name} had its last release in {}", last.strftime("%B %Y")),
        )
        .about("server_version")
        .why("no bug of it is mended any more")
        .cure("upgrade to a newer major version");
    }
    let severity = if major < 15 { Severity::Note } else { Severity::Ok };
    Finding::new(severity, "server.version", format!("{name} has no bug in NOTIFY that is known here"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_judged_by_their_minor_release_and_by_the_day() {
        let early = date(2026, 3, 1);
        let code = |number, today| {
            let found = serde_json::to_value(version(number, "x", today)).expect("JSON");
            format!("{} {}", found["severity"].as_str().expect("text"), found["code"].as_str().expect("text"))
        };
        assert_eq!(code(90_624, early), "error server.version_unsupported");
        assert_eq!(code(130_023, early), "error server.version_unsupported");
        assert_eq!(code(140_020, early), "warning server.notify_bug");
        assert_eq!(code(140_021, early), "note server.version");
        assert_eq!(code(140_022, date(2026, 11, 13)), "warning server.end_of_life");
        for (bad, good) in [(150_015, 150_016), (160_011, 160_012), (170_007, 170_008), (180_001, 180_002)] {
            assert_eq!(code(bad, early), "warning server.notify_bug");
            assert_eq!(code(good, early), "ok server.version");
        }
        assert_eq!(code(180_004, date(2031, 1, 1)), "warning server.end_of_life");
        assert_eq!(code(190_000, early), "ok server.version");
    }
}
