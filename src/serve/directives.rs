//! How fresh a request wants its answer, by the standard header `Cache-Control` (RFC 9111) and our token.
//!
//! | request | meaning |
//! | --- | --- |
//! | (nothing) | [`Freshness::Coherent`] |
//! | `no-cache`, or `max-age=0` | every change that was visible when the request came: [`Freshness::Fenced`] |
//! | `max-age=N` | every change that had been visible for N seconds: [`Freshness::Within`] |
//! | `max-stale=N`, `max-stale` | also while the node is not coherent, what misses changes of up to N seconds more than ever; or any |
//! | `only-if-cached` | from memory, or 504 |
//! | `no-store` | from Postgres, and nothing is kept |
//! | `stale-if-error=N` | if Postgres does not answer: what is held, if it misses no change older than N seconds |
//! | `Rowcache-Token: T` | with the transaction that the token names: [`Freshness::AtLeast`] |
//!
//! Unknown directives mean nothing. A number that cannot be read counts as 0, which is the safe side.

use std::time::Duration;

use axum::http::{HeaderMap, HeaderName, header};

use crate::{Error, Freshness, Token};

/// The header with a token, in requests and responses.
pub(crate) const TOKEN: HeaderName = HeaderName::from_static("rowcache-token");

/// What a request accepts.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Directives {
    pub(crate) freshness: Freshness,
    /// Asked for as well, and first.
    pub(crate) token: Option<Token>,
    pub(crate) only_if_cached: bool,
    pub(crate) no_store: bool,
    pub(crate) stale_if_error: Option<Duration>,
}

impl Directives {
    /// Of a request to a node with this bound on staleness.
    pub(crate) fn read(headers: &HeaderMap, bound: Duration) -> Result<Self, Error> {
        let mut read = Self::default();
        let (mut max_age, mut max_stale, mut no_cache) = (None, None, false);
        let values = headers.get_all(header::CACHE_CONTROL).iter().filter_map(|value| value.to_str().ok());
        for directive in values.flat_map(|value| value.split(',')) {
            let (name, value) =
                directive.split_once('=').map_or((directive, None), |(name, value)| (name, Some(value)));
            let seconds = || Duration::from_secs(value.unwrap_or("0").trim().trim_matches('"').parse().unwrap_or(0));
            match name.trim().to_ascii_lowercase().as_str() {
                "no-cache" => no_cache = true,
                "max-age" => max_age = Some(seconds()),
                "max-stale" => max_stale = Some(value.map(|_| seconds())),
                "only-if-cached" => read.only_if_cached = true,
                "no-store" => read.no_store = true,
                "stale-if-error" => read.stale_if_error = Some(seconds()),
                _ => {}
            }
        }
        let pragma =
            headers.get(header::PRAGMA).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"no-cache"));
        no_cache |= pragma && !headers.contains_key(header::CACHE_CONTROL);
        read.token = headers.get(&TOKEN).map(|value| value.to_str().unwrap_or_default().parse()).transpose()?;
        read.freshness = match (max_age, max_stale) {
            _ if no_cache || max_age.is_some_and(|it| it.is_zero()) => Freshness::Fenced,
            (Some(age), None) => Freshness::Within(age),
            (Some(age), Some(Some(more))) => Freshness::Within(age.saturating_add(more)),
            (None, Some(Some(more))) => Freshness::Within(bound.saturating_add(more)),
            (_, Some(None)) => Freshness::Any,
            (None, None) => Freshness::Coherent,
        };
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(lines: &[(&'static str, &str)]) -> Directives {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, value.parse().expect("a header"));
        }
        Directives::read(&headers, Duration::from_secs(5)).expect("it can be read")
    }

    fn freshness(value: &str) -> Freshness {
        read(&[("cache-control", value)]).freshness
    }

    #[test]
    fn standard_directives_mean_levels_of_freshness() {
        let within = |seconds| Freshness::Within(Duration::from_secs(seconds));
        assert_eq!(read(&[]), Directives::default());
        assert_eq!(freshness("no-cache"), Freshness::Fenced);
        assert_eq!(freshness("max-age=0"), Freshness::Fenced);
        assert_eq!(freshness("max-age=nonsense"), Freshness::Fenced);
        assert_eq!(freshness("Max-Age = \"30\" , foo=bar"), within(30));
        assert_eq!(freshness("max-age=30, no-cache"), Freshness::Fenced);
        assert_eq!(freshness("max-stale=10"), within(15));
        assert_eq!(freshness("max-age=1, max-stale=10"), within(11));
        assert_eq!(freshness("max-stale"), Freshness::Any);
        assert_eq!(freshness("max-age=99999999999999999999"), Freshness::Fenced);
        assert_eq!(read(&[("pragma", "no-cache")]).freshness, Freshness::Fenced);
        let both = read(&[("cache-control", "only-if-cached"), ("cache-control", "stale-if-error=60")]);
        assert!(both.only_if_cached && both.stale_if_error == Some(Duration::from_mins(1)));
        assert!(read(&[("cache-control", "no-store")]).no_store);
    }

    #[test]
    fn a_token_asks_for_its_transaction_and_nonsense_is_an_error() {
        let token = "1.7.751";
        let asked = read(&[("rowcache-token", token), ("cache-control", "no-cache")]);
        assert_eq!(
            (asked.token.map(|it| it.to_string()).as_deref(), asked.freshness),
            (Some(token), Freshness::Fenced)
        );
        let mut headers = HeaderMap::new();
        headers.insert(TOKEN, "nonsense".parse().expect("a header"));
        assert!(Directives::read(&headers, Duration::ZERO).is_err_and(|error| error.is_token()));
    }
}
