//! The tracked tables: whether every write is told (as `rowcache.problems` sees it), and what else is unwise about them.

use std::collections::{BTreeMap, HashMap};

use serde::Deserialize;

use super::{
    finding::{Finding, Report},
    secrets::looks_secret,
    session::Session,
};

/// A column that goes out in messages.
#[derive(Clone, Deserialize)]
struct Sent {
    name: String,
    of: String,
}

#[derive(Clone, Deserialize)]
struct Tracked {
    name: String,
    hashed: bool,
    problems: Vec<String>,
    persistence: Option<String>,
    row_security: Option<bool>,
    /// Quoted where needed, with commas.
    key: String,
    key_columns: Vec<String>,
    columns: Vec<String>,
    ignored: Vec<String>,
    max_keys: u32,
    level: String,
    via: String,
    key_is_unique: bool,
    sent: Vec<Sent>,
}

/// The class is looked up by name, not by `to_regclass`: that fails on a schema that the role may not use. Whether keys are
/// sent as hashes, and what carries the messages, are columns of the view in schemas that can do that.
const TRACKED: &str = "select t.relation as name, \
     coalesce((to_jsonb(t) ->> 'hash_keys')::boolean, false) as hashed, coalesce(to_jsonb(t) ->> 'via', 'notify') as via, \
     t.key_columns, t.columns, t.ignored, t.max_keys, t.level, t.problems, c.relpersistence as persistence, c.relrowsecurity as row_security, \
     coalesce((select string_agg(quote_ident(k), ', ') from unnest(t.key_columns) k), '') as key, \
     exists ( \
       select from pg_index i \
       where i.indrelid = c.oid and i.indisunique and i.indisvalid and i.indpred is null and i.indexprs is null \
       and not exists ( \
         select from unnest(i.indkey::int2[]) with ordinality as k(attnum, position) \
         join pg_attribute a on a.attrelid = c.oid and a.attnum = k.attnum \
         where k.position <= i.indnkeyatts and a.attname <> all (t.key_columns::name[]) \
       ) \
     ) as key_is_unique, \
     coalesce(( \
       select json_agg(json_build_object('name', a.attname, 'of', format_type(a.atttypid, a.atttypmod)) order by a.attnum) \
       from pg_attribute a \
       where a.attrelid = c.oid and a.attnum > 0 and a.attname::text = any (t.key_columns || t.columns) \
     ), '[]') as sent \
     from rowcache.tracked t \
     left join (pg_class c join pg_namespace n on n.oid = c.relnamespace) \
       on format('%I.%I', n.nspname, c.relname) = t.relation \
     order by 1";

#[derive(Deserialize)]
struct Leftover {
    name: String,
}

/// Triggers of rowcache on tables that are not tracked, nor a part of one that is. The view knows tables by the names under
/// which they were tracked; `described` also knows those that were renamed, but takes longer.
const LEFTOVERS: &str = "with recursive up(table_oid, ancestor) as ( \
       select distinct g.tgrelid, g.tgrelid from pg_trigger g \
       join pg_proc p on p.oid = g.tgfoid join pg_namespace f on f.oid = p.pronamespace \
       where f.nspname = 'rowcache' and g.tgname like 'zz\\_rowcache\\_%' and g.tgparentid = 0 \
       union select u.table_oid, i.inhparent from up u join pg_inherits i on i.inhrelid = u.ancestor \
     ) \
     select format('%I.%I', n.nspname, c.relname) as name \
     from pg_class c join pg_namespace n on n.oid = c.relnamespace \
     where c.oid in (select u.table_oid from up u) and case \
       when exists ( \
         select from up u join pg_class a on a.oid = u.ancestor join pg_namespace s on s.oid = a.relnamespace \
         join rowcache.tracked t on t.relation = format('%I.%I', s.nspname, a.relname) \
         where u.table_oid = c.oid \
       ) then false \
       else not exists ( \
         select from up u cross join lateral rowcache.described(u.ancestor::regclass, '') d \
         where u.table_oid = c.oid and d.tracked \
       ) \
     end order by 1";

/// At the end of a command that tracks a table.
pub(super) const VIA_LOG: &str = " --via log";

/// Returns the command that tracks each table again, by name, without its `--max-keys`.
pub(super) async fn check(control: &Session, report: &mut Report) -> HashMap<String, String> {
    let needs = "select on view rowcache.tracked";
    let Some(tables) = control.ask::<Tracked>(report, "the tracked tables", needs, TRACKED).await else {
        return HashMap::new();
    };
    if tables.is_empty() {
        report.push(
            Finding::note("tables.none", "no table is tracked")
                .why("nothing can be cached")
                .cure("rowcache track TABLE"),
        );
    }
    for table in &tables {
        problems(table, report);
        unwise(table, report);
    }
    let whole = tables.iter().filter(|table| table.problems.is_empty()).count();
    if whole > 0 {
        report.push(Finding::ok(
            "tables.whole",
            format!("{whole} of {} tracked tables have whole triggers", tables.len()),
        ));
    }
    for Leftover { name } in
        control.ask(report, "triggers that were left behind", needs, LEFTOVERS).await.unwrap_or_default()
    {
        report.push(
            Finding::note("trigger.leftover", format!("{name} is not tracked, and has triggers of rowcache"))
                .about(&*name)
                .why("it was part of a tracked table once; its writers send messages for nothing")
                .cure(format!("rowcache untrack {name}")),
        );
    }
    tables.iter().map(|table| (table.name.clone(), table.track_command())).collect()
}

impl Tracked {
    /// Tracks it again as it is tracked now, but for its `--max-keys`.
    fn track_command(&self) -> String {
        let mut command = format!("rowcache track {}", shell(&self.name));
        for (option, columns) in [("key", &self.key_columns), ("columns", &self.columns), ("ignore", &self.ignored)] {
            if !columns.is_empty() {
                command += &format!(" --{option} {}", shell(&columns.join(",")));
            }
        }
        if self.level == "row" {
            command += " --level row";
        }
        if self.hashed {
            command += " --hash-keys";
        }
        if self.via == "log" {
            command += VIA_LOG;
        }
        command
    }

    fn track_command_in_full(&self) -> String {
        format!("{} --max-keys {}", self.track_command(), self.max_keys)
    }

    /// Tracks it again without sending this column in clear. Further columns and hashes of keys exclude each other.
    fn track_command_without(&self, column: &str) -> String {
        let hashed = self.key_columns.iter().any(|key| key == column);
        Self { columns: Vec::new(), hashed, ..self.clone() }.track_command_in_full()
    }
}

/// As one word of a shell's command line.
fn shell(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_.,".contains(c);
    if word.chars().all(plain) { word.to_owned() } else { format!("'{}'", word.replace('\'', "'\\''")) }
}

/// What `rowcache.problems` says. Many partitions with one fault and one cure are one finding.
fn problems(table: &Tracked, report: &mut Report) {
    let mut alike: BTreeMap<(&str, &str), Vec<&str>> = BTreeMap::new();
    for problem in &table.problems {
        // Each line ends with the statement that cures it.
        let (what, _) = problem.rsplit_once(": select ").unwrap_or((problem, ""));
        let cure = problem[what.len()..].trim_start_matches(": ");
        alike.entry((code(what), cure)).or_default().push(what);
    }
    for ((code, cure), whats) in alike {
        let more = match whats.len() - 1 {
            0 => String::new(),
            n => format!(" (and {n} more like it)"),
        };
        let name = if whats[0].contains(&table.name) { String::new() } else { format!("{}: ", table.name) };
        let mut finding = Finding::error(code, format!("{name}{}{more}", whats[0])).about(&*table.name);
        if !cure.is_empty() {
            finding = finding.cure(cure);
        }
        report.push(finding.why("writes can go unseen, so that nodes do not serve it from memory"));
    }
}

/// Which fault a line of `rowcache.problems` is about.
fn code(problem: &str) -> &'static str {
    const CODES: [(&str, &str); 10] = [
        (" is gone", "table.gone"),
        ("needs row triggers", "table.needs_row_triggers"),
        (" was tracked as ", "table.renamed"),
        ("can no longer be tracked", "table.untrackable"),
        ("is not what track() makes", "function.drifted"),
        ("is missing", "trigger.missing"),
        ("calls another function", "trigger.replaced"),
        ("is not as track() makes it", "trigger.replaced"),
        ("is disabled", "trigger.disabled"),
        ("is not enabled ALWAYS", "trigger.not_always"),
    ];
    CODES.iter().find(|(part, _)| problem.contains(part)).map_or("table.problem", |(_, code)| code)
}

fn unwise(table: &Tracked, report: &mut Report) {
    let name = &table.name;
    if table.persistence.as_deref() == Some("u") {
        report.push(
            Finding::note("table.unlogged", format!("{name} is unlogged"))
                .about(name)
                .why("a crash or a failover empties it; nodes forget its rows then, as a new incarnation begins")
                .cure(format!("if its rows are to survive: alter table {name} set logged")),
        );
    }
    if table.row_security == Some(true) {
        report.push(
            Finding::warning("table.row_security", format!("{name} has row-level security"))
                .about(name)
                .why("rows are cached as the role of the node's pool sees them, and given to every caller")
                .cure(format!("check that every caller may see what that role sees, or: rowcache untrack {name}")),
        );
    }
    if table.persistence.is_some() && !table.key_is_unique {
        let key = &table.key;
        report.push(
            Finding::warning("table.key_not_unique", format!("{name}: no unique index makes its key ({key}) unique"))
                .about(name)
                .why("a key that two rows have cannot be loaded, and a load by key may read the whole table")
                .cure(format!("create unique index concurrently on {name} ({key})")),
        );
    }
    let secret = |sent: &&Sent| looks_secret(&sent.name, &sent.of);
    for Sent { name: column, of } in table.sent.iter().filter(secret).filter(|_| !table.hashed) {
        report.push(
            Finding::warning(
                "key.secret",
                format!("{name}: column {column} ({of}) looks like a secret, and is sent in clear"),
            )
            .about(name)
            .why("every role that may connect may LISTEN, and read it")
            .cure(table.track_command_without(column)),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_that_tracks_it_again_keeps_its_options() {
        let table = serde_json::json!({
            "name": "public.\"Users\"", "hashed": false, "problems": [], "persistence": "p", "row_security": false, "key": "",
            "key_columns": ["org", "it's"], "columns": ["a"], "ignored": ["b", "c"], "max_keys": 7, "level": "row", "via": "log",
            "key_is_unique": true, "sent": [],
        });
        let table: Tracked = serde_json::from_value(table).expect("a table");
        assert_eq!(
            table.track_command_in_full(),
            r#"rowcache track 'public."Users"' --key 'org,it'\''s' --columns a --ignore b,c --level row --via log --max-keys 7"#
        );
        let rest = "--ignore b,c --level row";
        let via = VIA_LOG;
        let without = r#"rowcache track 'public."Users"' --key 'org,it'\''s' "#;
        assert_eq!(table.track_command_without("a"), format!("{without}{rest}{via} --max-keys 7"));
        assert_eq!(table.track_command_without("org"), format!("{without}{rest} --hash-keys{via} --max-keys 7"));
    }
}
