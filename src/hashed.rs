//! Keys that messages do not show: of tables whose keys are secrets, such as session tokens, triggers send keyed hashes.
//!
//! ```text
//! hash  = the first 16 bytes of HMAC-SHA-256(secret, text of the key as `change.rs` writes it)
//! index = hash → key, of every key that has a flight or an entry, and of some that no longer have
//! ```
//!
//! A hash leads to a key only by way of the index. So a key must be in it *before its load starts*, and stay as long as it
//! has a flight or an entry: else a message about it would do nothing (I1). It is noted under its stripe's lock when its
//! flight is made (`Store::ask`), and taken out under the same lock by a sweep that finds neither (`store/sweep.rs`).
//!
//! A message names the secret that made its hashes. Whoever has another one, or none, does not understand it, and forgets
//! the whole table. So nobody is blind because a table's option, or the secret, was changed.

use std::{collections::BTreeMap, fmt, ops::Bound};

use hmac::{Hmac, KeyInit, Mac};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use sha2::{Digest, Sha256};

use crate::{
    change::{Rows, key_text},
    key::Key,
    sync::{Mutex, lock},
};

/// The keyed hash of a key, as messages carry it. Shown as 32 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyHash([u8; 16]);

impl KeyHash {
    /// Reads what [`Display`](fmt::Display) writes, and nothing else.
    pub(crate) fn from_hex(text: &str) -> Option<Self> {
        let digit = |digit: &u8| match digit {
            b'0'..=b'9' => Some(digit - b'0'),
            b'a'..=b'f' => Some(digit - b'a' + 10),
            _ => None,
        };
        let digits: &[u8; 32] = text.as_bytes().try_into().ok()?;
        let mut bytes = [0; 16];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = digit(&pair[0])? << 4 | digit(&pair[1])?;
        }
        Some(Self(bytes))
    }
}

impl fmt::Display for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0, f)
    }
}

impl Serialize for KeyHash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for KeyHash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        Self::from_hex(&text).ok_or_else(|| de::Error::custom("a hash is 32 hexadecimal digits"))
    }
}

fn hex(bytes: &[u8], f: &mut impl fmt::Write) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

/// What turns keys into hashes: one for each database.
#[derive(Clone)]
pub(crate) struct Secret {
    /// Ready to take a message.
    keyed: Hmac<Sha256>,
    id: String,
}

impl Secret {
    pub(crate) fn new(secret: &[u8]) -> Self {
        let keyed = Hmac::new_from_slice(secret).expect("HMAC takes keys of any length");
        let mut id = String::new();
        hex(&Sha256::digest(secret)[..8], &mut id).expect("a string takes all");
        Self { keyed, id }
    }

    /// Follows from the secret, and says nothing about it.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    fn hash<K: Key>(&self, key: &K) -> KeyHash {
        let mut keyed = self.keyed.clone();
        keyed.update(key_text(&key.to_parts()).as_bytes());
        let whole = keyed.finalize().into_bytes();
        let mut hash = [0; 16];
        hash.copy_from_slice(&whole[..16]);
        KeyHash(hash)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secret").field("id", &self.id).finish_non_exhaustive()
    }
}

/// What one cache needs to read messages with hashes.
pub(crate) struct Hashed<K> {
    secret: Secret,
    /// Protects the index. Lock order: a key's stripe, then this. The key's `Clone` runs under it, nothing else of the
    /// user's: a tree that is ordered by hashes compares no keys.
    index: Mutex<Index<K>>,
}

struct Index<K> {
    keys: BTreeMap<KeyHash, K>,
    /// With more keys than this a sweep is worth its while.
    sweep_above: usize,
    sweeping: bool,
}

/// A sweep takes at least so many keys to be worth a task, some 100 kB of them.
const SWEEP_MIN: usize = 1024;

/// Keys that a sweep looks at between two turns of others.
const SWEEP_BATCH: usize = 256;

impl<K: Key> Hashed<K> {
    pub(crate) fn new(secret: Secret) -> Self {
        Self { secret, index: Mutex::new(Index { keys: BTreeMap::new(), sweep_above: SWEEP_MIN, sweeping: false }) }
    }

    pub(crate) fn hash(&self, key: &K) -> KeyHash {
        self.secret.hash(key)
    }

    /// What a message says of this key.
    pub(crate) fn rows(&self, key: &K) -> Rows {
        Rows::Hashed { secret: self.secret.id.clone(), hashes: vec![self.hash(key)] }
    }

    pub(crate) fn is_made_by(&self, secret: &str) -> bool {
        self.secret.id == secret
    }

    /// From here on, messages with this hash are about this key. Called under the key's stripe lock.
    pub(crate) fn note(&self, hash: KeyHash, key: &K) {
        lock(&self.index).keys.entry(hash).or_insert_with(|| key.clone());
    }

    /// The key with this hash, if it was noted.
    pub(crate) fn find(&self, hash: &KeyHash) -> Option<K> {
        lock(&self.index).keys.get(hash).cloned()
    }

    /// Called under the key's stripe lock. What is returned is to be dropped under none.
    pub(crate) fn remove(&self, hash: &KeyHash) -> Option<K> {
        lock(&self.index).keys.remove(hash)
    }

    #[cfg(any(test, fuzzing))]
    pub(crate) fn len(&self) -> usize {
        lock(&self.index).keys.len()
    }

    pub(crate) fn sweep_is_due(&self) -> bool {
        let index = lock(&self.index);
        !index.sweeping && index.keys.len() > index.sweep_above
    }

    /// The right to sweep, until it is dropped; `None` while somebody else has it.
    pub(crate) fn sweep(&self) -> Option<Sweep<'_, K>> {
        let mut index = lock(&self.index);
        if index.sweeping {
            return None;
        }
        index.sweeping = true;
        drop(index);
        Some(Sweep { hashed: self, after: None })
    }
}

/// One way through the index.
pub(crate) struct Sweep<'a, K: Key> {
    hashed: &'a Hashed<K>,
    after: Option<KeyHash>,
}

impl<K: Key> Sweep<'_, K> {
    /// The next few keys. Empty at the end.
    pub(crate) fn next(&mut self) -> Vec<(KeyHash, K)> {
        let from = self.after.map_or(Bound::Unbounded, Bound::Excluded);
        let index = lock(&self.hashed.index);
        let batch = index.keys.range((from, Bound::Unbounded)).take(SWEEP_BATCH);
        let batch: Vec<_> = batch.map(|(hash, key)| (*hash, key.clone())).collect();
        drop(index);
        self.after = batch.last().map(|(hash, _)| *hash).or(self.after);
        batch
    }
}

impl<K: Key> Drop for Sweep<'_, K> {
    fn drop(&mut self) {
        let mut index = lock(&self.hashed.index);
        index.sweeping = false;
        // What is left is what is held, about; so a sweep takes out half of what it looks at, or comes seldom.
        index.sweep_above = (2 * index.keys.len()).max(SWEEP_MIN);
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_those_of_the_rfc() {
        // RFC 4231, test case 2, of which the first 16 bytes count.
        let mut keyed = Secret::new(b"Jefe").keyed;
        keyed.update(b"what do ya want for nothing?");
        let mut text = String::new();
        hex(&keyed.finalize().into_bytes(), &mut text).expect("a string takes all");
        assert_eq!(text, "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
    }

    #[test]
    fn a_hash_reads_what_it_writes() {
        let hash = Secret::new(&[7; 32]).hash(&String::from("tok"));
        assert_eq!(KeyHash::from_hex(&hash.to_string()), Some(hash));
        for text in ["", "0", "00000000000000000000000000000g00", "000000000000000000000000000000AA", "é"] {
            assert_eq!(KeyHash::from_hex(text), None, "{text}");
        }
    }

    #[test]
    fn a_sweep_is_due_when_the_index_has_doubled_since_the_last_one() {
        let hashed = Hashed::new(Secret::new(b"secret"));
        let fill = |to: i64| (0..to).for_each(|key| hashed.note(hashed.hash(&key), &key));
        let smallest = i64::try_from(SWEEP_MIN).expect("small");
        fill(smallest);
        assert!(!hashed.sweep_is_due(), "not worth its while");
        fill(smallest + 1);
        assert!(hashed.sweep_is_due());
        let sweep = hashed.sweep().expect("the first one");
        assert!(!hashed.sweep_is_due() && hashed.sweep().is_none(), "one at a time");
        drop(sweep);
        fill(2 * (smallest + 1));
        assert!(!hashed.sweep_is_due());
        fill(2 * (smallest + 1) + 1);
        assert!(hashed.sweep_is_due());
    }

    #[test]
    fn neither_the_secret_nor_its_state_is_shown() {
        let secret = Secret::new(b"hunter2");
        assert_eq!(format!("{secret:?}"), format!("Secret {{ id: \"{}\", .. }}", secret.id()));
    }
}
