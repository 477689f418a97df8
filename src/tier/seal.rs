//! What lies in a tier: a row, what its load saw, and a seal.
//!
//! ```text
//! v XMIN ENDED LSN SEAL DIGEST BYTES ROW      three numbers of 16 hexadecimal digits, 16 bytes, 8, 4, and the rest
//! ROW = - | + bytes of the value              there is no such row | as the codec wrote it
//! ```
//!
//! The numbers come first and are text, so that a script of the server can compare them.
//!
//! The *seal* is an HMAC under the canary of the server that was read, over all of this and the name that it lies under. The canary
//! is in the database, and neither in a tier nor in a token. So bytes that were damaged, cut, exchanged between keys, or that are of another
//! server, of a time before a crash, or of a database that was restored are not what they were sealed as. Who can read the canary, and write
//! into the tier, can forge.

use std::str;

use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest as _, Sha256};

use crate::{coherence::Incarnation, digest::Digest, snapshot::Sight, token::incarnation_id};

const NUMBER: usize = 16;
const SEAL: usize = 16;
const FACTS: usize = 1 + 3 * NUMBER;
const BODY: usize = FACTS + SEAL;

/// A row as a tier keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sealed {
    pub(crate) saw: Sight,
    pub(crate) lsn: u64,
    pub(crate) digest: Digest,
    /// Its length as it was received.
    pub(crate) bytes: u32,
    /// `None`: there is no such row.
    pub(crate) row: Option<Vec<u8>>,
}

/// Under which name a tier keeps the row of a key: not shared with other servers, nor with values of another [form](id).
pub(crate) fn name(prefix: &str, server: Incarnation, cache: &str, form: &str, key: &str) -> String {
    format!("{prefix}:{:016x}:{cache}:{form}:{key}", incarnation_id(server))
}

/// A short name for a type of values and its codec.
pub(crate) fn id(form: &str) -> String {
    Sha256::digest(form)[..4].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// As a script compares it.
pub(crate) fn number(number: u64) -> String {
    format!("{number:016x}")
}

fn mac(server: Incarnation) -> Hmac<Sha256> {
    let mut key = server.canary.as_bytes().to_vec();
    key.extend(server.started.to_be_bytes());
    Hmac::new_from_slice(&key).expect("a key of any length")
}

fn seal(server: Incarnation, name: &str, facts: &[u8], body: &[u8]) -> Hmac<Sha256> {
    let mut mac = mac(server);
    mac.update(&(name.len() as u64).to_be_bytes());
    mac.update(name.as_bytes());
    mac.update(facts);
    mac.update(body);
    mac
}

impl Sealed {
    pub(crate) fn seal(&self, server: Incarnation, name: &str) -> Vec<u8> {
        let Sealed { saw, lsn, digest, bytes, row } = self;
        let facts = format!("v{}{}{}", number(saw.xmin), number(saw.ended), number(*lsn));
        let mut body = digest.get().to_be_bytes().to_vec();
        body.extend(bytes.to_be_bytes());
        body.push(if row.is_some() { b'+' } else { b'-' });
        body.extend(row.iter().flatten());
        let tag = seal(server, name, facts.as_bytes(), &body).finalize().into_bytes();
        [facts.as_bytes(), &tag[..SEAL], &body].concat()
    }

    /// `None`: this is not what was sealed under this name, by a node of this server.
    pub(crate) fn open(server: Incarnation, name: &str, found: &[u8]) -> Option<Self> {
        let (facts, rest) = found.split_at_checked(FACTS)?;
        let (tag, body) = rest.split_at_checked(BODY - FACTS)?;
        seal(server, name, facts, body).verify_truncated_left(tag).ok()?;
        // It is whole, so what follows cannot fail.
        let number = |n: usize| {
            let digits = str::from_utf8(&facts[1 + n * NUMBER..][..NUMBER]).ok()?;
            u64::from_str_radix(digits, 16).ok()
        };
        let (digest, rest) = body.split_first_chunk()?;
        let (bytes, rest) = rest.split_first_chunk()?;
        let (is_row, row) = rest.split_first()?;
        Some(Self {
            saw: Sight { xmin: number(0)?, ended: number(1)? },
            lsn: number(2)?,
            digest: Digest::from(u64::from_be_bytes(*digest)),
            bytes: u32::from_be_bytes(*bytes),
            row: (*is_row == b'+').then(|| row.to_vec()),
        })
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn server(n: u128) -> Incarnation {
        Incarnation { canary: Uuid::from_u128(n), started: 7 }
    }

    fn sealed(row: Option<&[u8]>) -> Sealed {
        let saw = Sight { xmin: 0x123, ended: u64::MAX };
        Sealed { saw, lsn: 77, digest: Digest::from(5), bytes: 300, row: row.map(<[u8]>::to_vec) }
    }

    #[test]
    fn what_was_sealed_is_opened_where_it_was_put() {
        for row in [None, Some(&b""[..]), Some(b"{\"name\":\"ada\"}")] {
            let bytes = sealed(row).seal(server(1), "a");
            assert_eq!(Sealed::open(server(1), "a", &bytes), Some(sealed(row)));
            assert_eq!(&bytes[..33], b"v0000000000000123ffffffffffffffff");
            assert_eq!(Sealed::open(server(1), "b", &bytes), None, "of another key");
            assert_eq!(Sealed::open(server(2), "a", &bytes), None, "of another server");
        }
    }

    #[test]
    fn damaged_bytes_are_nothing() {
        let bytes = sealed(Some(b"ada")).seal(server(1), "a");
        for cut in 0..bytes.len() {
            assert_eq!(Sealed::open(server(1), "a", &bytes[..cut]), None);
        }
        for at in 0..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1;
            assert_eq!(Sealed::open(server(1), "a", &bytes), None, "byte {at}");
        }
        assert_eq!(Sealed::open(server(1), "a", &[&bytes[..], b"x"].concat()), None);
    }

    #[test]
    fn names_are_of_one_server_cache_type_and_key() {
        let one = name("rowcache", server(1), "public.users", &id("app::User"), "42");
        assert!(one.starts_with("rowcache:") && one.contains(":public.users:") && one.ends_with(":42"), "{one}");
        assert_ne!(one, name("rowcache", server(2), "public.users", &id("app::User"), "42"));
        assert_ne!(one, name("rowcache", server(1), "public.users", &id("app::Other"), "42"));
    }
}
