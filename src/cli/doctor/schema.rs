//! Schema `rowcache`: is it there, may this role use it, is it of a version that this program knows, and is it whole.

use std::collections::HashMap;

use serde::Deserialize;

use super::{
    finding::{Finding, Report},
    session::Session,
};
use crate::{migrate, postgres::line::SCHEMA_VERSIONS};

#[derive(Deserialize)]
struct Schema {
    usable: bool,
    has_version: bool,
    has_migrations: bool,
}

const SCHEMA: &str = "select has_schema_privilege(n.oid, 'usage') as usable, \
     exists (select from pg_proc p where p.pronamespace = n.oid and p.proname = 'schema_version') as has_version, \
     exists (select from pg_class c where c.relnamespace = n.oid and c.relname = 'migrations') as has_migrations \
     from pg_namespace n where n.nspname = 'rowcache'";

#[derive(Deserialize)]
struct Version {
    version: i32,
}

#[derive(Deserialize)]
struct Applied {
    version: i64,
    checksum: String,
}

const APPLIED: &str = "select version, encode(checksum, 'hex') as checksum from rowcache.migrations";

/// Whether tables can be asked for.
pub(super) async fn check(control: &Session, report: &mut Report) -> bool {
    let Some(schema) = control.ask::<Schema>(report, "schema rowcache", "select on table pg_namespace", SCHEMA).await
    else {
        return false;
    };
    let Some(schema) = schema.first() else {
        report.push(
            Finding::error("schema.missing", "this database has no schema rowcache")
                .about("rowcache")
                .why("nothing tells the nodes of changes")
                .cure("rowcache migrate up, then: rowcache track TABLE"),
        );
        return false;
    };
    if !schema.usable {
        report.push(
            Finding::note("rights.missing", "this role may not use schema rowcache")
                .about("rowcache")
                .why("tables and functions cannot be looked at, and no node can work as this role")
                .cure("grant usage on schema rowcache to this role, or run it as another one"),
        );
        return false;
    }
    if !schema.has_version {
        report.push(
            Finding::error("schema.incomplete", "schema rowcache lacks the objects of its last migrations")
                .about("rowcache")
                .why("nodes refuse to start")
                .cure("rowcache migrate up"),
        );
    } else if !version(control, report).await {
        return false;
    }
    if schema.has_migrations {
        migrations(control, report).await;
    }
    schema.has_version
}

/// Whether the schema is of a version whose views this program knows.
async fn version(control: &Session, report: &mut Report) -> bool {
    let needs = "execute on function rowcache.schema_version()";
    let ask = "select rowcache.schema_version() as version";
    let Some(Version { version }) = control.ask_one(report, "the version of schema rowcache", needs, ask).await else {
        return true;
    };
    if SCHEMA_VERSIONS.contains(&version) {
        report.push(Finding::ok("schema.version", format!("schema rowcache has version {version}")).about("rowcache"));
        return true;
    }
    let (low, high) = (SCHEMA_VERSIONS.start(), SCHEMA_VERSIONS.end());
    let cure = if version < *low { "rowcache migrate up" } else { "use a newer release of rowcache" };
    report.push(
        Finding::error("schema.version", format!("schema rowcache has version {version}"))
            .about("rowcache")
            .why(format!("this release works with version {low} to {high}: its nodes refuse to start"))
            .cure(cure),
    );
    false
}

async fn migrations(control: &Session, report: &mut Report) {
    let needs = "select on table rowcache.migrations";
    let Some(applied) = control.ask::<Applied>(report, "which migrations have been run", needs, APPLIED).await else {
        return;
    };
    let mut applied: HashMap<_, _> = applied.into_iter().map(|row| (row.version, row.checksum)).collect();
    let mut clean = true;
    for (number, name, checksum) in migrate::known() {
        let finding = match applied.remove(&number) {
            None => Finding::error("migration.missing", format!("migration {number:04}_{name} has not been run"))
                .why("what it makes is missing, or older than this release needs")
                .cure("rowcache migrate up"),
            Some(other) if other != checksum => {
                Finding::warning("migration.altered", format!("migration {number:04}_{name} was run from another file"))
                    .why("this release may expect something else than what is there")
                    .cure("take it back with the release that ran it, then: rowcache migrate up")
            }
            Some(_) => continue,
        };
        clean = false;
        report.push(finding.about(format!("{number:04}_{name}")));
    }
    for number in applied.keys() {
        clean = false;
        report.push(
            Finding::warning(
                "migration.unknown",
                format!("migration {number} was run, and this release does not know it"),
            )
            .about(number.to_string())
            .why("a newer release has been at work here")
            .cure("use that release"),
        );
    }
    if clean {
        report.push(Finding::ok("migrations", "all migrations have been run"));
    }
}
