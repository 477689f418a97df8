//! Keys of the type of crate `rust_decimal`.

use std::borrow::Cow;

use rust_decimal::Decimal;

use super::{Column, Key, KeyPart, KeyType};

impl Column for Decimal {
    const TYPE: KeyType = KeyType::Numeric;

    fn from_part(part: &KeyPart<'_>) -> Option<Self> {
        let KeyPart::Text(text) = part else { return None };
        // Written again: a number with more digits than fit must not be taken for the one that is next to it.
        Self::from_str_exact(text).ok().filter(|value| canonical(value) == **text)
    }

    fn to_part(&self) -> KeyPart<'_> {
        KeyPart::Text(Cow::Owned(canonical(self)))
    }
}

/// As `trim_scale` writes it: 1.0 and 1.00 are one key, and so are 0 and -0.
fn canonical(value: &Decimal) -> String {
    value.normalize().to_string()
}

single!(Decimal);
