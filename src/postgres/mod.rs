//! The only place with SQL and sockets.

pub(crate) mod access;
pub(crate) mod built;
pub(crate) mod catalog;
mod columns;
pub(crate) mod fleet;
mod hosts;
pub mod install;
#[cfg(feature = "serve")]
pub(crate) mod json_rows;
pub(crate) mod kept;
mod keys;
pub(crate) mod lent;
pub(crate) mod line;
pub mod migrate;
pub(crate) mod rows;
pub(crate) mod server;
pub(crate) mod values;

use sqlx::postgres::PgDatabaseError;

use crate::error::{Error, Kind};

/// Whether the connection, and not the statement, is what failed.
pub(crate) fn is_connection_error(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_) | sqlx::Error::Protocol(_) | sqlx::Error::WorkerCrashed => true,
        sqlx::Error::Database(error) => error.code().is_some_and(|code| is_shutdown(&code)),
        _ => false,
    }
}

/// `57P01` to `57P05`: the server or an administrator ended the session, or it is not yet up. `08…`: the
/// connection failed.
fn is_shutdown(code: &str) -> bool {
    code.starts_with("57P") || code.starts_with("08")
}

/// An error of the pool's driver. `doing` says what was attempted: "loading public.users 7".
pub(crate) fn database_error(doing: &str, error: sqlx::Error) -> Error {
    if is_foreign_statement(&error) {
        let cure = "the pool goes through a pooler in transaction mode that does not keep track of prepared \
             statements; use one that does (PgBouncer 1.21 or newer with max_prepared_statements), or session mode, or a \
             direct connection";
        return Error::with(Kind::Pooler, format!("{doing} failed: {cure}"), error);
    }
    let kind = match &error {
        sqlx::Error::PoolClosed => Kind::Closed,
        sqlx::Error::PoolTimedOut => Kind::Timeout,
        error if is_connection_error(error) => Kind::Unavailable,
        sqlx::Error::Tls(_) => Kind::Unavailable,
        error if has_code(error, QUERY_CANCELED) => Kind::Timeout,
        error if has_code(error, UNDEFINED_TABLE) => Kind::Table,
        _ => Kind::Refused,
    };
    Error::with(kind, format!("{doing} failed"), error)
}

/// An error of a statement that a person asked for: what Postgres says, and its hint, are the message.
pub(crate) fn refusal(doing: &str, error: sqlx::Error) -> Error {
    if let Some(hint) = schema_hint(&error) {
        return hint;
    }
    let Some(refusal) = error.as_database_error().and_then(|error| error.try_downcast_ref::<PgDatabaseError>()) else {
        return database_error(doing, error);
    };
    let hint = refusal.hint().map(|hint| format!(" ({hint})")).unwrap_or_default();
    Error::new(Kind::Table, format!("{doing}: {}{hint}", refusal.message()))
}

const QUERY_CANCELED: &str = "57014";
const UNDEFINED_TABLE: &str = "42P01";

pub(crate) fn has_code(error: &sqlx::Error, code: &str) -> bool {
    error.as_database_error().and_then(sqlx::error::DatabaseError::code).is_some_and(|it| it == code)
}

/// `42P05`, `26000`: a prepared statement exists that we did not make, or one of ours does not.
fn is_foreign_statement(error: &sqlx::Error) -> bool {
    ["42P05", "26000"].iter().any(|code| has_code(error, code))
}

/// What to say when our own schema is missing or incomplete.
pub(crate) fn schema_hint(error: &sqlx::Error) -> Option<Error> {
    let error = error.as_database_error()?;
    // The statement may also have named something of the user's. Messages name it in every language.
    let ours = ["rowcache.", "\"rowcache\""].iter().any(|name| error.message().contains(name));
    (ours && is_missing(&error.code()?)).then(schema_too_old)
}

/// `3F000` no such schema, `42883` no such function, `42P01` no such table.
fn is_missing(code: &str) -> bool {
    matches!(code, "3F000" | "42883" | "42P01")
}

pub(crate) fn schema_too_old() -> Error {
    Error::new(
        Kind::SchemaTooOld,
        "this database has no schema `rowcache`, or an older one than this library needs; run: rowcache migrate up",
    )
}
