//! Keys of types that need no other crate: `bool`, bytes, and the labels of enums.

use std::{borrow::Cow, fmt};

use super::{Column, Key, KeyPart, KeyType};

pub(crate) fn bool_text(value: bool) -> &'static str {
    if value { "true" } else { "false" }
}

impl Column for bool {
    const TYPE: KeyType = KeyType::Bool;

    fn from_part(part: &KeyPart<'_>) -> Option<Self> {
        match part {
            KeyPart::Text(text) => text.parse().ok(),
            _ => None,
        }
    }

    fn to_part(&self) -> KeyPart<'_> {
        KeyPart::Text(Cow::Borrowed(bool_text(*self)))
    }
}

/// Two digits for each byte, as the triggers write it.
pub(crate) fn to_hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |value: u8| char::from(DIGITS[usize::from(value)]);
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

/// Reads what [`to_hex`] writes, and nothing else: two texts are never one key.
pub(crate) fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let pairs = text.as_bytes().chunks(2);
    let byte = |pair: &[u8]| match *pair {
        [high, low] => Some(digit(high)? << 4 | digit(low)?),
        _ => None,
    };
    pairs.map(byte).collect()
}

impl Column for Vec<u8> {
    const TYPE: KeyType = KeyType::Bytea;

    fn from_part(part: &KeyPart<'_>) -> Option<Self> {
        match part {
            KeyPart::Text(text) => from_hex(text),
            _ => None,
        }
    }

    fn to_part(&self) -> KeyPart<'_> {
        KeyPart::Text(Cow::Owned(to_hex(self)))
    }
}

/// The label of a value of an enum type, as a key.
///
/// A `String` is the key of a text column; Postgres does not compare that with an enum. A label that the type does not have is
/// the key of no row.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EnumLabel(pub String);

impl From<&str> for EnumLabel {
    fn from(label: &str) -> Self {
        Self(label.to_owned())
    }
}

impl From<String> for EnumLabel {
    fn from(label: String) -> Self {
        Self(label)
    }
}

impl fmt::Display for EnumLabel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Column for EnumLabel {
    const TYPE: KeyType = KeyType::Enum;

    fn from_part(part: &KeyPart<'_>) -> Option<Self> {
        String::from_part(part).map(Self)
    }

    fn to_part(&self) -> KeyPart<'_> {
        self.0.to_part()
    }
}

single!(bool, Vec<u8>, EnumLabel);
