//! Keys of every kind: what is written is read; different keys have different texts and hashes; what does not fit into a
//! key's type is no key.

use arbitrary::Arbitrary;
use rowcache::{
    EnumLabel, Key, KeyPart, Rows,
    fuzzing::{self, Parsed},
};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::change::Part;

#[derive(Arbitrary, Debug)]
pub struct Input {
    secret: Vec<u8>,
    keys: Two,
    strange: Vec<Part>,
    hex: [u8; 32],
}

/// Two keys of one type.
#[derive(Arbitrary, Debug)]
enum Two {
    Int2(i16, i16),
    Int4(i32, i32),
    Int8(i64, i64),
    Text(String, String),
    Uuid(u128, u128),
    Bool(bool, bool),
    Bytes(Vec<u8>, Vec<u8>),
    Label(String, String),
    Texts((String, String), (String, String)),
    Mixed((i64, u128, String), (i64, u128, String)),
    Four((i16, String, i32, String), (i16, String, i32, String)),
}

pub fn run(input: &Input) {
    let uuid = Uuid::from_u128;
    match &input.keys {
        Two::Int2(a, b) => check(a, b, input),
        Two::Int4(a, b) => check(a, b, input),
        Two::Int8(a, b) => check(a, b, input),
        Two::Text(a, b) => check(a, b, input),
        Two::Uuid(a, b) => check(&uuid(*a), &uuid(*b), input),
        Two::Bool(a, b) => check(a, b, input),
        Two::Bytes(a, b) => check(a, b, input),
        Two::Label(a, b) => check(&EnumLabel::from(a.as_str()), &EnumLabel::from(b.as_str()), input),
        Two::Texts(a, b) => check(a, b, input),
        Two::Mixed(a, b) => check(&(a.0, uuid(a.1), a.2.clone()), &(b.0, uuid(b.1), b.2.clone()), input),
        Two::Four(a, b) => check(a, b, input),
    }
    let is_hex = input.hex.iter().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
    if let Ok(text) = std::str::from_utf8(&input.hex) {
        let hash = fuzzing::hash_from_hex(text);
        assert_eq!(hash.is_some(), is_hex, "{text}");
        assert!(hash.is_none_or(|hash| hash.to_string() == text), "{text}");
    }
}

fn check<K: Key>(a: &K, b: &K, input: &Input) {
    let secret = &input.secret;
    for key in [a, b] {
        assert_eq!(K::from_parts(&key.to_parts()).as_ref(), Some(key));
        let rows = Rows::Keys(vec![fuzzing::row_key(&key.to_parts())]);
        let payload = fuzzing::to_payload(&fuzzing::change(Some("t".into()), rows, Default::default(), None));
        let Parsed::Change(change) = fuzzing::parse(&payload) else { panic!("{payload} cannot be read") };
        let Rows::Keys(keys) = change.rows else { panic!("{payload}") };
        assert_eq!(K::from_parts(keys[0].parts()).as_ref(), Some(key), "{payload}");
        let text = fuzzing::key_text(&key.to_parts());
        assert!(payload.contains(&text), "{payload} without {text}");
        let hash = fuzzing::keyed_hash(secret, key).to_string();
        assert_eq!(hash, hmac(secret, text.as_bytes())[..32]);
    }
    assert_eq!(fuzzing::key_text(&a.to_parts()) == fuzzing::key_text(&b.to_parts()), a == b);
    assert_eq!(fuzzing::keyed_hash(secret, a) == fuzzing::keyed_hash(secret, b), a == b);
    strange::<K>(&input.strange);
}

/// Parts that came from anywhere: they are a key if each is of its column's type, and then that key.
fn strange<K: Key>(parts: &[Part]) {
    use rowcache::KeyType::{Bool, Bytea, Enum, Int2, Int4, Int8, Text, Uuid as Id};
    let received: Vec<_> = parts.iter().map(Part::received).collect();
    let types = K::types();
    let fits = |(part, kind): (&KeyPart<'_>, _)| match (part, kind) {
        (KeyPart::Int(n), Int2) => i16::try_from(*n).is_ok(),
        (KeyPart::Int(n), Int4) => i32::try_from(*n).is_ok(),
        (KeyPart::Int(_), Int8) | (KeyPart::Text(_), Text | Enum) => true,
        (KeyPart::Text(text), Bool) => matches!(&**text, "true" | "false"),
        (KeyPart::Text(text), Bytea) => {
            text.len() % 2 == 0 && text.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
        }
        (KeyPart::Text(text), Id) => Uuid::try_parse(text).is_ok(),
        _ => false,
    };
    let expected = received.len() == types.len() && received.iter().zip(types).all(fits);
    let key = K::from_parts(&received);
    assert_eq!(key.is_some(), expected, "{received:?}");
    if let Some(key) = key {
        assert_eq!(K::from_parts(&key.to_parts()), Some(key));
    }
}

/// RFC 2104, once more.
fn hmac(secret: &[u8], message: &[u8]) -> String {
    let mut block = [0_u8; 64];
    if secret.len() > 64 {
        block[..32].copy_from_slice(&Sha256::digest(secret));
    } else {
        block[..secret.len()].copy_from_slice(secret);
    }
    let inner = Sha256::digest([&block.map(|byte| byte ^ 0x36)[..], message].concat());
    let outer = Sha256::digest([&block.map(|byte| byte ^ 0x5c)[..], &inner[..]].concat());
    outer.iter().map(|byte| format!("{byte:02x}")).collect()
}
