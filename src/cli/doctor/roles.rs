//! Who else could lead nodes astray: roles that may send messages, write to schema `rowcache`, or replace what is in it.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{
    finding::{Finding, Report, Severity, some_of},
    session::Session,
};

#[derive(Deserialize)]
struct Connecting {
    roles: i64,
}

const CONNECTING: &str = "select count(*) as roles from pg_roles r \
     where r.rolcanlogin and has_database_privilege(r.oid, current_database(), 'connect')";

/// What a role may do to an object; `tracks`: it owns a tracked table, or is a member of the role that does.
#[derive(Deserialize)]
struct May {
    role: String,
    what: What,
    object: String,
    #[serde(default)]
    tracks: bool,
}

#[derive(Clone, Copy, Deserialize, Eq, Ord, PartialEq, PartialOrd)]
#[serde(rename_all = "snake_case")]
enum What {
    CreateInSchema,
    WriteCanary,
    WriteTable,
    OwnFunction,
    AlterTable,
    ReplaceTriggers,
}

/// Roles that log in, are not superusers, and are neither the schema's owner nor members of it.
const SCHEMA: &str = "with strangers as ( \
       select r.oid, r.rolname::text as role, exists ( \
         select from rowcache.tracked t \
         join (pg_class c join pg_namespace s on s.oid = c.relnamespace) \
           on format('%I.%I', s.nspname, c.relname) = t.relation \
         where pg_has_role(r.oid, c.relowner, 'member') \
       ) as tracks \
       from pg_roles r, pg_namespace n \
       where n.nspname = 'rowcache' and r.rolcanlogin and not r.rolsuper and not pg_has_role(r.oid, n.nspowner, 'member') \
     ) \
     select s.role, 'create_in_schema' as what, 'schema rowcache' as object, s.tracks from strangers s \
     where has_schema_privilege(s.oid, 'rowcache', 'create') \
     union all \
     select s.role, case c.relname when 'canary' then 'write_canary' else 'write_table' end, \
       format('rowcache.%I', c.relname), s.tracks \
     from strangers s, pg_class c \
     where c.relnamespace = 'rowcache'::regnamespace and c.relkind in ('r', 'p') \
     and has_table_privilege(s.oid, c.oid, 'insert, update, delete, truncate') \
     union all \
     select distinct o.rolname::text, 'own_function', format('rowcache.%I()', p.proname), false \
     from pg_proc p join pg_namespace n on n.oid = p.pronamespace join pg_roles o on o.oid = p.proowner \
     where n.nspname = 'rowcache' and not o.rolsuper and p.proowner <> n.nspowner and not exists ( \
       select from pg_trigger g join pg_class c on c.oid = g.tgrelid where g.tgfoid = p.oid and c.relowner = p.proowner \
     ) order by 2, 3, 1";

const TABLES: &str = "select r.rolname::text as role, t.relation as object, \
       case when pg_has_role(r.oid, c.relowner, 'member') then 'alter_table' else 'replace_triggers' end as what \
     from rowcache.tracked t \
     join (pg_class c join pg_namespace n on n.oid = c.relnamespace) on format('%I.%I', n.nspname, c.relname) = t.relation \
     join pg_roles r on r.rolcanlogin and not r.rolsuper and r.oid <> c.relowner \
     where pg_has_role(r.oid, c.relowner, 'member') or has_table_privilege(r.oid, c.oid, 'trigger') \
     order by 2, 3, 1";

pub(super) async fn check(control: &Session, report: &mut Report, has_schema: bool) {
    let connecting: Option<Connecting> =
        control.ask_one(report, "the roles", "select on view pg_roles", CONNECTING).await;
    if let Some(Connecting { roles }) = connecting {
        let severity = if roles > 1 { Severity::Note } else { Severity::Ok };
        let (noun, may) = if roles == 1 { ("role", "may") } else { ("roles", "may") };
        report.push(
            Finding::new(
                severity,
                "roles.may_notify",
                format!("{roles} {noun} {may} connect here, hence LISTEN and NOTIFY"),
            )
            .why(
                "a forged message makes nodes load again, which costs time; it never makes them serve what is not true",
            ),
        );
    }
    if !has_schema {
        return;
    }
    let needs = "select on view rowcache.tracked";
    let mut found: BTreeMap<(What, String, bool), Vec<String>> = BTreeMap::new();
    for (what, sql) in [("who may write to schema rowcache", SCHEMA), ("who may alter tracked tables", TABLES)] {
        for may in control.ask::<May>(report, what, needs, sql).await.unwrap_or_default() {
            found.entry((may.what, may.object, may.tracks)).or_default().push(may.role);
        }
    }
    for ((what, object, tracks), roles) in found {
        report.push(finding(what, &object, tracks, &roles));
    }
}

fn finding(what: What, object: &str, tracks: bool, roles: &[String]) -> Finding {
    let who = some_of(roles);
    let noun = if roles.len() == 1 { "role" } else { "roles" };
    let (severity, code, may, why, cure) = match what {
        // Who owns a tracked table and tracks it himself needs these two.
        What::CreateInSchema | What::WriteTable if tracks => (
            Severity::Note,
            "roles.track",
            format!("write to {object}"),
            "that takes part in tracking the tables they own",
            format!("if they are not to track: revoke it from {who}"),
        ),
        What::CreateInSchema => (
            Severity::Warning,
            "roles.create_in_schema",
            format!("create objects in {object}"),
            "an object of theirs could stand in for one of ours",
            format!("revoke create on {object} from {who}"),
        ),
        What::WriteCanary => (
            Severity::Error,
            "roles.write_canary",
            format!("write to {object}"),
            "they could make a server that lost commits look like the one before",
            format!("revoke all on {object} from {who}"),
        ),
        What::WriteTable => (
            Severity::Error,
            "roles.write_schema",
            format!("write to {object}"),
            "they could make a table look tracked that is not",
            format!("revoke all on {object} from {who}"),
        ),
        What::OwnFunction => (
            Severity::Error,
            "roles.own_function",
            format!("replace {object}, which they own"),
            "whoever replaces it decides what nodes are told",
            format!("alter function {object} owner to the owner of schema rowcache, or track the table again"),
        ),
        What::AlterTable => (
            Severity::Warning,
            "roles.alter_table",
            format!("alter {object}, as members of its owner"),
            "they may switch its triggers off; nodes notice within a second",
            format!("take {who} out of the role that owns {object}"),
        ),
        What::ReplaceTriggers => (
            Severity::Warning,
            "roles.replace_triggers",
            format!("replace the triggers of {object}"),
            "privilege TRIGGER is enough for that; nodes notice within a second",
            format!("revoke trigger on {object} from {who}"),
        ),
    };
    Finding::new(severity, code, format!("{noun} {who} may {may}")).about(who).why(why).cure(cure)
}
