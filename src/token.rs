//! Names a transaction that has committed, so that whoever holds the name can ask any node for data that
//! includes it.
//!
//! ```text
//! 1.9c3f2a1b00d4e5f6.751      version of this form . incarnation of the server . pg_current_xact_id()
//! ```
//!
//! The SQL side is `rowcache.token()`.

use std::{fmt, str::FromStr};

use crate::{
    coherence::Incarnation,
    error::{Error, Kind},
};

/// Names a committed transaction: at most 40 characters of `[0-9a-f.]`, fit for a header, a cookie or a log.
///
/// [`Transaction::commit`](crate::Transaction::commit) returns one, and so does `select rowcache.token()`, run by any
/// client inside its transaction, after its writes. Reads with [`AtLeast`](crate::Freshness::AtLeast) on any node then include that
/// transaction. Hand it out only once COMMIT has succeeded: before, it names something that may yet be undone.
///
/// It is not a secret, and not a proof: whoever makes one up makes reads slower, or fail.
///
/// ```
/// let token: rowcache::Token = "1.9c3f2a1b00d4e5f6.751".parse()?;
/// assert_eq!(token.to_string(), "1.9c3f2a1b00d4e5f6.751");
/// # Ok::<(), rowcache::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token {
    /// [`incarnation_id`].
    pub(crate) incarnation: u64,
    /// 0: a transaction that wrote nothing.
    pub(crate) xid: u64,
}

/// A number for one run of one server. Transaction ids mean nothing in another one (X5).
pub(crate) fn incarnation_id(incarnation: Incarnation) -> u64 {
    let (high, low) = incarnation.canary.as_u64_pair();
    high ^ low ^ incarnation.started.cast_unsigned()
}

impl Token {
    /// The transaction's id, `pg_current_xact_id()`; 0 if it wrote nothing.
    #[must_use]
    pub fn xid(&self) -> u64 {
        self.xid
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "1.{:x}.{}", self.incarnation, self.xid)
    }
}

impl FromStr for Token {
    type Err = Error;

    /// # Errors
    ///
    /// [`is_token`](Error::is_token) for anything that no token looks like.
    fn from_str(text: &str) -> Result<Self, Error> {
        let read = || {
            let (incarnation, xid) = text.strip_prefix("1.")?.split_once('.')?;
            // Signs are accepted by the number parsers, and are not part of the form.
            let plain = |part: &str| part.bytes().all(|byte| byte.is_ascii_alphanumeric());
            (plain(incarnation) && plain(xid)).then_some(())?;
            let incarnation = u64::from_str_radix(incarnation, 16).ok()?;
            Some(Self { incarnation, xid: xid.parse().ok()? })
        };
        read().ok_or_else(|| {
            let shown: String = text.chars().take(50).collect();
            Error::new(Kind::Token, format!("`{shown}` is no token of this version of rowcache"))
        })
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_is_read() {
        for token in [
            Token { incarnation: 0, xid: 0 },
            Token { incarnation: u64::MAX, xid: u64::MAX },
            Token { incarnation: 7, xid: 751 },
        ] {
            assert_eq!(token.to_string().parse::<Token>().expect("a token"), token);
            assert!(token.to_string().len() <= 40);
        }
    }

    #[test]
    fn a_run_of_a_server_has_a_number_of_its_own() {
        let id = |high: u64, low: u64, started| {
            incarnation_id(Incarnation { canary: uuid::Uuid::from_u64_pair(high, low), started })
        };
        assert_eq!(id(0b1100, 0b1010, 0b1101), 0b1011);
        assert_ne!(id(7, 1, 5), id(7, 1, 6), "started again");
        assert_eq!(Token { incarnation: 7, xid: 751 }.xid(), 751);
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "",
            "1",
            "1.",
            "1..",
            "1.7",
            "2.7.7",
            "1.7.7.7",
            "1.g.7",
            "1.+7.7",
            "1.7.-7",
            "1.7.7 ",
            "1.11111111111111111.1",
        ] {
            assert!(text.parse::<Token>().is_err_and(|error| error.is_token()), "{text}");
        }
    }
}
