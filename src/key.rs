//! Keys: how the value of a primary key is written in a message, bound to a query and read from a row.
//!
//! A key is one or more [`KeyPart`]s, one per key column, in key order. The triggers write the same parts
//! into their messages (grammar: `change.rs`), so what a trigger says and what a node computes can be
//! compared without a detour (assumption A4 in `docs/design.md`).

use std::{borrow::Cow, fmt, hash::Hash};

use uuid::Uuid;

/// A Postgres type that a key column may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum KeyType {
    /// `smallint`, held as `i16`.
    Int2,
    /// `integer`, held as `i32`.
    Int4,
    /// `bigint`, held as `i64`.
    Int8,
    /// `text` or `varchar`, held as `String`.
    Text,
    /// `uuid`, held as [`Uuid`].
    Uuid,
}

impl KeyType {
    /// The type whose `format_type` is `name`, if a key column may have it.
    pub(crate) fn from_postgres(name: &str) -> Option<Self> {
        Some(match name {
            "smallint" => Self::Int2,
            "integer" => Self::Int4,
            "bigint" => Self::Int8,
            "text" | "character varying" => Self::Text,
            "uuid" => Self::Uuid,
            _ => return None,
        })
    }

    pub(crate) fn is_int(self) -> bool {
        matches!(self, Self::Int2 | Self::Int4 | Self::Int8)
    }

    /// The Rust type that holds it, for error messages.
    pub(crate) fn rust(self) -> &'static str {
        match self {
            Self::Int2 => "i16",
            Self::Int4 => "i32",
            Self::Int8 => "i64",
            Self::Text => "String",
            Self::Uuid => "Uuid",
        }
    }

    /// The name Postgres gives it.
    pub(crate) fn postgres(self) -> &'static str {
        match self {
            Self::Int2 => "smallint",
            Self::Int4 => "integer",
            Self::Int8 => "bigint",
            Self::Text => "text",
            Self::Uuid => "uuid",
        }
    }
}

/// The value of one key column.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum KeyPart<'a> {
    /// A value of one of the three integer types.
    Int(i64),
    /// Text, or the canonical text of any other type.
    Text(Cow<'a, str>),
    /// A uuid that was read from a row (in messages it is text).
    Uuid(Uuid),
}

impl KeyPart<'_> {
    /// No row has this value: Postgres stores no text with a zero byte, and refuses every statement that has one.
    pub(crate) fn cannot_exist(&self) -> bool {
        matches!(self, Self::Text(text) if text.contains('\0'))
    }

    /// The same part, owning its text.
    #[must_use]
    pub fn into_owned(self) -> KeyPart<'static> {
        match self {
            Self::Int(value) => KeyPart::Int(value),
            Self::Text(value) => KeyPart::Text(Cow::Owned(value.into_owned())),
            Self::Uuid(value) => KeyPart::Uuid(value),
        }
    }
}

impl fmt::Display for KeyPart<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Int(value) => value.fmt(f),
            Self::Text(value) => value.fmt(f),
            Self::Uuid(value) => value.fmt(f),
        }
    }
}

/// The key of a table: `i16`, `i32`, `i64`, `String`, [`Uuid`], or a tuple of two to four of them.
///
/// Implement it for a type of your own by handing over to the type inside:
///
/// ```
/// use rowcache::{Key, KeyPart, KeyType};
///
/// #[derive(Clone, Debug, PartialEq, Eq, Hash)]
/// struct UserId(i64);
///
/// impl Key for UserId {
///     fn types() -> Vec<KeyType> {
///         i64::types()
///     }
///     fn from_parts(parts: &[KeyPart<'_>]) -> Option<Self> {
///         i64::from_parts(parts).map(UserId)
///     }
///     fn to_parts(&self) -> Vec<KeyPart<'_>> {
///         self.0.to_parts()
///     }
/// }
/// ```
pub trait Key: Clone + Eq + Hash + fmt::Debug + Send + Sync + 'static {
    /// The type of each key column, in key order.
    fn types() -> Vec<KeyType>;

    /// Reads a key. `None` when the parts are not of this key's types.
    fn from_parts(parts: &[KeyPart<'_>]) -> Option<Self>;

    /// The value of each key column, in key order.
    fn to_parts(&self) -> Vec<KeyPart<'_>>;
}

/// A Rust type that holds one key column.
trait Column: Sized {
    const TYPE: KeyType;
    fn from_part(part: &KeyPart<'_>) -> Option<Self>;
    fn to_part(&self) -> KeyPart<'_>;
}

macro_rules! integer {
    ($rust:ty, $kind:ident) => {
        impl Column for $rust {
            const TYPE: KeyType = KeyType::$kind;

            fn from_part(part: &KeyPart<'_>) -> Option<Self> {
                match part {
                    KeyPart::Int(value) => (*value).try_into().ok(),
                    _ => None,
                }
            }

            fn to_part(&self) -> KeyPart<'_> {
                KeyPart::Int((*self).into())
            }
        }
    };
}
integer!(i16, Int2);
integer!(i32, Int4);
integer!(i64, Int8);

impl Column for String {
    const TYPE: KeyType = KeyType::Text;

    fn from_part(part: &KeyPart<'_>) -> Option<Self> {
        match part {
            KeyPart::Text(value) => Some(value.clone().into_owned()),
            _ => None,
        }
    }

    fn to_part(&self) -> KeyPart<'_> {
        KeyPart::Text(Cow::Borrowed(self))
    }
}

impl Column for Uuid {
    const TYPE: KeyType = KeyType::Uuid;

    fn from_part(part: &KeyPart<'_>) -> Option<Self> {
        match part {
            KeyPart::Uuid(value) => Some(*value),
            KeyPart::Text(text) => Self::try_parse(text).ok(),
            KeyPart::Int(_) => None,
        }
    }

    fn to_part(&self) -> KeyPart<'_> {
        KeyPart::Uuid(*self)
    }
}

macro_rules! single {
    ($($rust:ty),*) => {$(
        impl Key for $rust {
            fn types() -> Vec<KeyType> {
                vec![<$rust as Column>::TYPE]
            }

            fn from_parts(parts: &[KeyPart<'_>]) -> Option<Self> {
                match parts {
                    [part] => Self::from_part(part),
                    _ => None,
                }
            }

            fn to_parts(&self) -> Vec<KeyPart<'_>> {
                vec![self.to_part()]
            }
        }
    )*};
}
single!(i16, i32, i64, String, Uuid);

macro_rules! tuple {
    ($($name:ident $part:ident),*) => {
        impl<$($name),*> Key for ($($name,)*)
        where
            $($name: Column + Clone + Eq + Hash + fmt::Debug + Send + Sync + 'static),*
        {
            fn types() -> Vec<KeyType> {
                vec![$($name::TYPE),*]
            }

            fn from_parts(parts: &[KeyPart<'_>]) -> Option<Self> {
                match parts {
                    [$($part),*] => Some(($($name::from_part($part)?,)*)),
                    _ => None,
                }
            }

            fn to_parts(&self) -> Vec<KeyPart<'_>> {
                let ($($part,)*) = self;
                vec![$($part.to_part()),*]
            }
        }
    };
}
tuple!(A a, B b);
tuple!(A a, B b, C c);
tuple!(A a, B b, C c, D d);

/// A key as a person writes it: `42`, or `(7, "ada")` for several columns.
pub(crate) fn display(parts: &[KeyPart<'_>]) -> String {
    match parts {
        [part] => part.to_string(),
        parts => {
            let parts: Vec<String> = parts.iter().map(ToString::to_string).collect();
            format!("({})", parts.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip<K: Key>(key: &K) {
        assert_eq!(K::types().len(), key.to_parts().len());
        assert_eq!(K::from_parts(&key.to_parts()).as_ref(), Some(key));
    }

    #[test]
    fn every_key_type_reads_what_it_writes() {
        round_trip(&i16::MIN);
        round_trip(&i32::MAX);
        round_trip(&i64::MIN);
        round_trip(&String::from("Ünï\"code"));
        round_trip(&Uuid::from_u128(7));
        round_trip(&(7_i64, String::from("x")));
        round_trip(&(7_i16, 8_i32, Uuid::nil()));
        round_trip(&(1_i64, 2_i64, 3_i64, String::new()));
    }

    #[test]
    fn parts_of_another_type_or_number_are_refused() {
        assert_eq!(i64::from_parts(&[KeyPart::Text("7".into())]), None);
        assert_eq!(i16::from_parts(&[KeyPart::Int(40_000)]), None);
        assert_eq!(String::from_parts(&[KeyPart::Int(7)]), None);
        assert_eq!(Uuid::from_parts(&[KeyPart::Text("no uuid".into())]), None);
        assert_eq!(i64::from_parts(&[]), None);
        assert_eq!(<(i64, i64)>::from_parts(&[KeyPart::Int(7)]), None);
    }

    #[test]
    fn a_uuid_is_read_from_its_text() {
        let uuid = Uuid::from_u128(0x0123_4567_89ab_cdef);
        assert_eq!(Uuid::from_parts(&[KeyPart::Text(uuid.to_string().into())]), Some(uuid));
    }
}
