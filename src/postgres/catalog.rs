//! What Postgres knows about a table that is to be cached, asked through `rowcache.describe`.

use std::{collections::BTreeSet, ops::DerefMut};

use sqlx::{FromRow, PgConnection, PgPool};

use crate::{
    depends::{By, Column},
    error::{Error, Kind, Result},
    hashed::Secret,
    key::{Key, KeyType},
    postgres::{database_error, has_code, schema_hint},
    tables::{On, Trust, Via},
};

/// One row of `rowcache.describe`.
#[derive(Clone, Debug, Default, FromRow)]
pub(crate) struct Description {
    /// `schema.table`, quoted where Postgres would quote it; `None` when there is no such table.
    pub(crate) relation: Option<String>,
    /// As in `pg_class`: `r` is a table, `p` a partitioned one.
    pub(crate) relkind: Option<String>,
    pub(crate) key_columns: Vec<String>,
    pub(crate) key_types: Vec<String>,
    /// Which of these are enums. A domain over one is not: Postgres cannot compare its values.
    pub(crate) key_enums: Vec<bool>,
    /// Further columns whose values messages have.
    pub(crate) columns: Vec<String>,
    pub(crate) tracked: bool,
    pub(crate) problems: Vec<String>,
    pub(crate) fingerprint: Option<String>,
    /// The id of the secret with which messages hash its keys; `None`: they show them.
    pub(crate) secret: Option<String>,
    /// What carries its messages: `notify` or `log`.
    pub(crate) via: Option<String>,
}

/// The columns asked for, in the order of [`Description`].
pub(crate) const DESCRIBE: &str = "select relation, relkind::text as relkind, coalesce(key_columns, '{}') as key_columns, \
     coalesce(key_types, '{}') as key_types, \
     array(select exists (select from pg_catalog.pg_attribute a \
         join pg_catalog.pg_type t on t.oid = a.atttypid and t.typtype = 'e' \
         where a.attrelid = pg_catalog.to_regclass(relation) and a.attname = k.name and a.attnum > 0 and not a.attisdropped) \
       from pg_catalog.unnest(key_columns) with ordinality as k(name, position) order by k.position) as key_enums, \
     coalesce(columns, '{}') as columns, tracked, coalesce(problems, '{}') as problems, fingerprint, \
     secret, via from rowcache.describe($1)";

/// A table that can be cached under keys of a certain type.
#[derive(Clone, Debug)]
pub(crate) struct TrackedTable {
    pub(crate) name: String,
    /// Those by which it is cached.
    pub(crate) key_columns: Vec<String>,
    pub(crate) key_types: Vec<KeyType>,
    /// They are its key.
    pub(crate) is_keyed: bool,
    pub(crate) trust: Trust,
    /// With which messages hash its keys.
    pub(crate) secret: Option<Secret>,
}

/// Looks up a table in the catalogue, and whether it can be cached under `K`.
pub(crate) async fn open<K: Key>(pool: &PgPool, pooler: bool, name: &str) -> Result<TrackedTable> {
    look_up::<K>(&mut **asking(pool, pooler, name).await?, pooler, name).await
}

type Asking = Box<dyn DerefMut<Target = PgConnection> + Send>;

/// What several statements can be sent to.
async fn asking(pool: &PgPool, pooler: bool, name: &str) -> Result<Asking> {
    let failed = |error| looking_up(name, error);
    if pooler {
        // What prepares a statement and what executes it must meet the same backend. It changes nothing: there is nothing to commit.
        return Ok(Box::new(pool.begin().await.map_err(failed)?));
    }
    Ok(Box::new(pool.acquire().await.map_err(failed)?))
}

fn looking_up(name: &str, error: sqlx::Error) -> Error {
    schema_hint(&error).unwrap_or_else(|| database_error(&format!("looking up {name}"), error))
}

async fn look_up<K: Key>(asking: &mut PgConnection, pooler: bool, name: &str) -> Result<TrackedTable> {
    let failed = |error| looking_up(name, error);
    let description: Description =
        sqlx::query_as(DESCRIBE).bind(name).persistent(!pooler).fetch_one(&mut *asking).await.map_err(failed)?;
    let id = description.secret.clone();
    let mut table = description.check::<K>(name)?;
    if let Some(id) = id {
        table.secret = Some(key_secret(asking, pooler, &table.name, &id).await?);
    }
    Ok(table)
}

/// What a cache under `K` depends on.
pub(crate) struct Depends {
    pub(crate) on: On,
    /// Of the columns that it depends by.
    pub(crate) types: Vec<KeyType>,
    /// The columns of the table's own key.
    pub(crate) key: Vec<String>,
}

/// What a cache under `K` depends on: this table, by these columns, or by whatever of its rows changes.
pub(crate) async fn depend<K: Key>(
    pool: &PgPool,
    pooler: bool,
    name: &str,
    columns: Option<&[String]>,
    widths: Widths,
) -> Result<Depends> {
    let failed = |error| looking_up(name, error);
    let mut asking = asking(pool, pooler, name).await?;
    let description: Description =
        sqlx::query_as(DESCRIBE).bind(name).persistent(!pooler).fetch_one(&mut **asking).await.map_err(failed)?;
    let fingerprint = description.usable(name)?;
    let relation = description.relation.clone().unwrap_or_default();
    let (by, types) = match columns {
        None => (By::Any, Vec::new()),
        Some(columns) => {
            let types = sqlx::query_as(TYPES).bind(&relation).bind(columns).persistent(!pooler);
            let types: Vec<(String, Option<String>, bool)> = types.fetch_all(&mut **asking).await.map_err(failed)?;
            let (columns, types) = description.columns::<K>(&relation, columns, &types, widths)?;
            (By::Columns(columns), types)
        }
    };
    let trust = Trust { fingerprint, key: description.key_as_sent(), via: description.via() };
    Ok(Depends { on: On { table: relation, trust, by }, types, key: description.key_columns })
}

/// Whether integers of one width are held in those of another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Widths {
    /// No: rows are read with the types of the key.
    Exact,
    /// Yes: a foreign key may be narrower than what it refers to.
    Any,
}

/// The types of columns, in the order in which they are named, and whether they are enums; null: there is no such column.
pub(super) const TYPES: &str = "select c.name, format_type(rowcache.base_type(a.atttypid), null), coalesce(t.typtype = 'e', false) \
     from unnest($2::text[]) with ordinality as c(name, position) \
     left join pg_attribute a on a.attrelid = $1::text::regclass and a.attname = c.name and a.attnum > 0 and not a.attisdropped \
     left join pg_type t on t.oid = a.atttypid \
     order by c.position";

/// Reads the secret that hashes the keys of this table, and of all others of this database with hashed keys.
async fn key_secret(asking: &mut PgConnection, pooler: bool, table: &str, id: &str) -> Result<Secret> {
    let role = sqlx::query_scalar("select quote_ident(current_user)").persistent(!pooler).fetch_one(&mut *asking).await;
    let ask = sqlx::query_scalar("select rowcache.key_secret()").persistent(!pooler);
    let secret: Vec<u8> = match ask.fetch_one(asking).await {
        Ok(secret) => secret,
        Err(error) if has_code(&error, INSUFFICIENT_PRIVILEGE) => {
            let role: String = role.unwrap_or_else(|_| "the pool's role".into());
            let message = format!(
                "the keys of {table} are sent as hashes, and {role} may not read the secret that makes them; run: grant \
                 execute on function rowcache.key_secret() to {role}"
            );
            return Err(Error::with(Kind::Refused, message, error));
        }
        Err(error) => {
            return Err(database_error(&format!("reading the secret that hashes the keys of {table}"), error));
        }
    };
    let secret = Secret::new(&secret);
    if secret.id() == id {
        Ok(secret)
    } else {
        // It was replaced between two statements.
        Err(Error::new(
            Kind::NotTracked,
            format!("the secret that hashes the keys of {table} has changed; track it again"),
        ))
    }
}

const INSUFFICIENT_PRIVILEGE: &str = "42501";

impl Description {
    /// What the table looks like, if its triggers are whole; else what is wrong with them.
    pub(crate) fn whole(self) -> Result<Trust, String> {
        let (key, via) = (self.key_as_sent(), self.via());
        match (self.fingerprint, self.tracked) {
            (None, _) => Err("the table is gone".into()),
            (Some(_), false) => Err("it is not tracked any more".into()),
            (Some(fingerprint), true) if self.problems.is_empty() => Ok(Trust { fingerprint, key, via }),
            (Some(_), true) => Err(self.problems.join("; ")),
        }
    }

    /// The table, if it can be cached under `K`; else what is in the way and the cure.
    fn check<K: Key>(self, name: &str) -> Result<TrackedTable> {
        let fingerprint = self.usable(name)?;
        let relation = self.relation.clone().unwrap_or_default();
        let key_types = check_key::<K>(&relation, &self)?;
        let (key, via) = (self.key_as_sent(), self.via());
        Ok(TrackedTable {
            name: relation,
            key_columns: self.key_columns,
            key_types,
            is_keyed: true,
            trust: Trust { fingerprint, key, via },
            secret: None,
        })
    }

    /// Its fingerprint, if there is such a table and it is tracked as it should be; else what is in the way and the cure.
    fn usable(&self, name: &str) -> Result<String> {
        let Some(relation) = &self.relation else {
            return Err(Error::new(
                Kind::Table,
                format!(
                    "there is no table {name} in this database (a name without its schema is looked up in the search_path)"
                ),
            ));
        };
        if !self.relkind.as_deref().is_some_and(|kind| matches!(kind, "r" | "p")) {
            return Err(Error::new(
                Kind::Table,
                format!("{relation} is not a table, and only tables have triggers; cache the tables it is made of"),
            ));
        }
        if !self.tracked {
            return Err(if self.key_columns.is_empty() {
                Error::new(
                    Kind::Table,
                    format!(
                        "{relation} has no primary key; add one, or name unique columns: rowcache track {relation} --key COLUMN"
                    ),
                )
            } else {
                Error::new(Kind::NotTracked, format!("{relation} is not tracked; run: rowcache track {relation}"))
            });
        }
        if !self.problems.is_empty() {
            return Err(Error::new(
                Kind::NotTracked,
                format!("{relation} is not tracked as it should be: {}", self.problems.join("; ")),
            ));
        }
        let dropped = || Error::new(Kind::Table, format!("{relation} was dropped while it was being looked up"));
        self.fingerprint.clone().ok_or_else(dropped)
    }

    /// Where messages have the values of these columns, and of which types they are, if they make a key of type `K`; else what is in the way
    /// and the cure.
    fn columns<K: Key>(
        &self,
        relation: &str,
        columns: &[String],
        types: &[(String, Option<String>, bool)],
        widths: Widths,
    ) -> Result<(Vec<Column>, Vec<KeyType>)> {
        let table = |message: String| Error::new(Kind::Table, message);
        if let Some((column, ..)) = types.iter().find(|(_, of, _)| of.is_none()) {
            return Err(table(format!("table {relation} has no column {column}")));
        }
        if self.secret.is_some() {
            return Err(table(format!(
                "the keys of {relation} are sent as hashes, so that nothing can depend on its columns; it can on any change of it (`on_any`)"
            )));
        }
        let found: Vec<_> =
            types.iter().map(|(_, of, is_enum)| key_type(of.as_deref().unwrap_or_default(), *is_enum)).collect();
        let fits = |found: &Option<KeyType>, wanted: &KeyType| {
            *found == Some(*wanted) || widths == Widths::Any && wanted.is_int() && found.is_some_and(KeyType::is_int)
        };
        let wanted = wanted::<K>(&found);
        if found.len() != wanted.len() || !found.iter().zip(&wanted).all(|(found, wanted)| fits(found, wanted)) {
            let of: Vec<_> =
                types.iter().map(|(name, of, _)| format!("{name} {}", of.as_deref().unwrap_or_default())).collect();
            return Err(table(format!(
                "({}) of {relation} does not fit a key of type {}; {}",
                of.join(", "),
                rust(&wanted),
                cure(&found)
            )));
        }
        let unsent = |name: &&String| !self.key_columns.contains(name) && !self.columns.contains(name);
        let missing: Vec<&String> = columns.iter().filter(unsent).collect();
        if !missing.is_empty() {
            let all: Vec<&str> = self.columns.iter().chain(missing.iter().copied()).map(String::as_str).collect();
            let names: Vec<&str> = missing.iter().map(|name| name.as_str()).collect();
            return Err(Error::new(
                Kind::NotTracked,
                format!(
                    "messages about {relation} do not have its column {}; run: rowcache track {relation} --columns {}",
                    names.join(", "),
                    all.join(",")
                ),
            ));
        }
        let place = |name: &String| self.key_columns.iter().position(|column| column == name);
        let columns = columns.iter().map(|name| place(name).map_or_else(|| Column::Sent(name.clone()), Column::Key));
        Ok((columns.collect(), wanted))
    }

    fn via(&self) -> Via {
        if self.via.as_deref() == Some("log") { Via::Log } else { Via::Notify }
    }

    /// The key, and whether and how messages hide it.
    fn key_as_sent(&self) -> String {
        let hashed = self.secret.as_ref().map(|id| format!("; sent as hashes under secret {id}"));
        self.key() + &hashed.unwrap_or_default()
    }

    /// The key as `id bigint, code text`.
    fn key(&self) -> String {
        let columns = self.key_columns.iter().zip(&self.key_types);
        columns.map(|(column, of)| format!("{column} {of}")).collect::<Vec<_>>().join(", ")
    }
}

/// The types that `K` holds, of a key with these types.
fn wanted<K: Key>(found: &[Option<KeyType>]) -> Vec<KeyType> {
    if K::fits_any() { found.iter().copied().flatten().collect() } else { K::types() }
}

fn check_key<K: Key>(table: &str, description: &Description) -> Result<Vec<KeyType>> {
    let types = description.key_types.iter().zip(&description.key_enums);
    let known: Vec<_> = types.map(|(name, is_enum)| key_type(name, *is_enum)).collect();
    let wanted = wanted::<K>(&known);
    if known.iter().copied().eq(wanted.iter().copied().map(Some)) {
        return Ok(wanted);
    }
    Err(Error::new(
        Kind::Table,
        format!(
            "the key of {table} is ({}), which does not fit a key of type {}; {}",
            description.key(),
            rust(&wanted),
            cure(&known),
        ),
    ))
}

fn rust(types: &[KeyType]) -> String {
    let names: Vec<_> = types.iter().copied().map(KeyType::rust).collect();
    if let [one] = names[..] { one.to_owned() } else { format!("({})", names.join(", ")) }
}

pub(super) fn key_type(name: &str, is_enum: bool) -> Option<KeyType> {
    if is_enum { Some(KeyType::Enum) } else { KeyType::from_postgres(name) }
}

/// What to use for a key of these types.
fn cure(found: &[Option<KeyType>]) -> String {
    let Some(types) = found.iter().copied().collect::<Option<Vec<_>>>() else {
        return "no key type of this library holds that yet: a key is made of smallint, integer, bigint, text, varchar, uuid, \
                boolean, bytea, enums, date, timestamp, timestamptz and numeric"
            .to_owned();
    };
    let features: BTreeSet<_> = types.iter().copied().filter_map(KeyType::missing_feature).collect();
    let used = format!("use Table<{}, _>", rust(&types));
    if features.is_empty() {
        return used;
    }
    let features = features.into_iter().collect::<Vec<_>>().join(" and ");
    format!("enable feature {features} of rowcache, and {used}")
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn what_is_to_be_used_is_said_with_the_feature_that_it_needs() {
        let dates = |names: &str| {
            let missing = !cfg!(any(feature = "chrono", feature = "time"));
            if missing {
                format!("enable feature `chrono` or `time` of rowcache, and {names}")
            } else {
                names.to_owned()
            }
        };
        let date = KeyType::Date.rust();
        assert_eq!(cure(&[Some(KeyType::Int8)]), "use Table<i64, _>");
        assert_eq!(cure(&[Some(KeyType::Date)]), dates(&format!("use Table<{date}, _>")));
        let both = [Some(KeyType::Date), Some(KeyType::Int2)];
        assert_eq!(cure(&both), dates(&format!("use Table<({date}, i16), _>")));
        assert_eq!(cure(&[Some(KeyType::Enum), Some(KeyType::Bool)]), "use Table<(EnumLabel, bool), _>");
        let decimal = cure(&[Some(KeyType::Numeric)]);
        let feature = "enable feature `rust_decimal` of rowcache, and ";
        assert_eq!(decimal.starts_with(feature), !cfg!(feature = "rust_decimal"), "{decimal}");
        assert!(decimal.ends_with("use Table<rust_decimal::Decimal, _>"), "{decimal}");
        assert!(cure(&[Some(KeyType::Int8), None]).contains("no key type of this library holds that"));
    }
}
