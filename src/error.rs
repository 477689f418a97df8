//! The one error type of the library.

use std::{error::Error as StdError, fmt, sync::Arc};

/// What went wrong. One word wide, and cheap to clone: one failed load is handed to every caller who joined it.
///
/// # Introspection is limited
///
/// What a caller can act on has a predicate (`is_…`). The message names the table, key, channel or setting and
/// the cure; the chain of [`source`](StdError::source) holds the driver's error. `Display` does not repeat the
/// source.
#[derive(Clone)]
pub struct Error(Arc<Inner>);

/// The result of everything here that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

struct Inner {
    kind: Kind,
    message: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Closed,
    Config,
    Decode,
    Loader,
    Migrate,
    NotTracked,
    OtherIncarnation,
    Pooler,
    Refused,
    SchemaTooNew,
    SchemaTooOld,
    Standby,
    Table,
    Throttled,
    Timeout,
    Token,
    Unavailable,
    Value,
}

impl Error {
    pub(crate) fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self(Arc::new(Inner { kind, message: message.into(), source: None }))
    }

    pub(crate) fn with(
        kind: Kind,
        message: impl Into<String>,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Self {
        Self(Arc::new(Inner { kind, message: message.into(), source: Some(source.into()) }))
    }

    /// The node was shut down, or the runtime it ran on.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.0.kind == Kind::Closed
    }

    /// A URL or a setting cannot be used; the message names it.
    #[must_use]
    pub fn is_config(&self) -> bool {
        self.0.kind == Kind::Config
    }

    /// A row could not be turned into the value type: its columns have other names or types, or the decoder
    /// panicked.
    #[must_use]
    pub fn is_decode(&self) -> bool {
        self.0.kind == Kind::Decode
    }

    /// The loader of a view failed, or the producer of a value; or it panicked. The source is what it returned.
    #[must_use]
    pub fn is_loader(&self) -> bool {
        self.0.kind == Kind::Loader
    }

    /// A value cannot be shared: it cannot be encoded, or is too large.
    #[must_use]
    pub fn is_value(&self) -> bool {
        self.0.kind == Kind::Value
    }

    /// Whether this says nothing of the row, and another try may succeed.
    pub(crate) fn is_outage(&self) -> bool {
        matches!(self.0.kind, Kind::Unavailable | Kind::Timeout | Kind::Refused | Kind::Loader | Kind::Pooler)
    }

    /// The table has no triggers of ours, or not all of them: `rowcache track <table>` puts them on.
    #[must_use]
    pub fn is_not_tracked(&self) -> bool {
        self.0.kind == Kind::NotTracked
    }

    /// A [`Token`](crate::Token) is of another incarnation of the server than the one that answers: there was a crash, a
    /// failover, a restore or a restart since, or it is of another database. Its transaction may have been lost. Read
    /// again with [`Fenced`](crate::Freshness::Fenced) to see what is there now, and drop the token.
    #[must_use]
    pub fn is_other_incarnation(&self) -> bool {
        self.0.kind == Kind::OtherIncarnation
    }

    /// The LISTEN connection goes through something that swallows notifications, such as a pooler in
    /// transaction mode.
    #[must_use]
    pub fn is_pooler(&self) -> bool {
        self.0.kind == Kind::Pooler
    }

    /// Postgres refused a statement: a right is missing, a lock was not to be had, and the like. The source says what.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        self.0.kind == Kind::Refused
    }

    /// The database's `rowcache` schema is newer than this library can work with.
    #[must_use]
    pub fn is_schema_too_new(&self) -> bool {
        self.0.kind == Kind::SchemaTooNew
    }

    /// The database has no `rowcache` schema, or an older one: `rowcache migrate up`.
    #[must_use]
    pub fn is_schema_too_old(&self) -> bool {
        self.0.kind == Kind::SchemaTooOld
    }

    /// The LISTEN connection reached a standby, where Postgres does not allow LISTEN, or the pool did, where rows lag behind.
    #[must_use]
    pub fn is_standby(&self) -> bool {
        self.0.kind == Kind::Standby
    }

    /// A table cannot be cached or tracked as asked: there is no such table, it has no primary key, or its key has
    /// another type.
    #[must_use]
    pub fn is_table(&self) -> bool {
        self.0.kind == Kind::Table
    }

    /// A miss was refused, because too many keys that do not exist have been asked for lately
    /// ([`TableOptions::not_found_max`](crate::TableOptions::not_found_max)). Worth another try a second later.
    #[must_use]
    pub fn is_throttled(&self) -> bool {
        self.0.kind == Kind::Throttled
    }

    /// Something took longer than its limit: a load, a free connection of the pool, a fence.
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        self.0.kind == Kind::Timeout
    }

    /// A text is no [`Token`](crate::Token), or a token names a transaction that has not ended.
    #[must_use]
    pub fn is_token(&self) -> bool {
        self.0.kind == Kind::Token
    }

    /// Postgres cannot be reached, or ended the connection. Worth another try later.
    #[must_use]
    pub fn is_unavailable(&self) -> bool {
        self.0.kind == Kind::Unavailable
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { kind, message, source } = &*self.0;
        f.debug_struct("Error").field("kind", kind).field("message", message).field("source", source).finish()
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

/// An error with its causes on one line.
pub(crate) fn with_causes(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let next_text = next.to_string();
        if !text.contains(&next_text) {
            text.push_str(": ");
            text.push_str(&next_text);
        }
        cause = next.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_word_and_shareable() {
        fn shareable<T: Send + Sync + Clone + 'static>() {}
        shareable::<Error>();
        assert_eq!(size_of::<Error>(), size_of::<usize>());
    }

    #[test]
    fn the_chain_prints_each_cause_once() {
        let error = Error::with(Kind::Timeout, "load of public.users 7", std::io::Error::other("cause"));
        assert_eq!(error.to_string(), "load of public.users 7");
        assert_eq!(error.source().expect("has a source").to_string(), "cause");
        assert!(error.is_timeout() && !error.is_unavailable());
    }
}
