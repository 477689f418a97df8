//! Keys: how the value of a primary key is written in a message, bound to a query and read from a row.
//!
//! A key is one or more [`KeyPart`]s, one per key column, in key order. The triggers write the same parts
//! into their messages (grammar: `change.rs`), so what a trigger says and what a node computes can be
//! compared without a detour (assumption A4 in `docs/design.md`).

use std::{borrow::Cow, fmt, hash::Hash};

use smallvec::SmallVec;
use uuid::Uuid;

/// A Postgres type that a key column may have.
///
/// In messages, and so in [`KeyPart`]s, integers are integers and all others are text: one text for each value, which does
/// not depend on the settings of whoever wrote the row. An implementation of [`Key`] reads and writes exactly that text.
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
    /// `boolean`, held as `bool`. Text: `true` or `false`.
    Bool,
    /// `bytea`, held as `Vec<u8>`. Text: two lower-case hexadecimal digits for each byte, without a prefix.
    Bytea,
    /// An enum type, held as [`EnumLabel`]. Text: the label.
    Enum,
    /// `date`, held as `chrono::NaiveDate` or `time::Date` (features `chrono` and `time`). Text: days since 2000-01-01, or
    /// `infinity`, or `-infinity`.
    Date,
    /// `timestamp`, held as `chrono::NaiveDateTime` or `time::PrimitiveDateTime` (features `chrono` and `time`). Text:
    /// microseconds since 2000-01-01 00:00:00, or `infinity`, or `-infinity`.
    Timestamp,
    /// `timestamptz`, held as `chrono::DateTime<Utc>` or `time::OffsetDateTime` (features `chrono` and `time`). Text:
    /// microseconds since 2000-01-01 00:00:00 UTC, or `infinity`, or `-infinity`.
    Timestamptz,
    /// `numeric`, held as `rust_decimal::Decimal` (feature `rust_decimal`). Text: the number without exponent and without zeros
    /// at the end of its fraction; or `NaN`, `Infinity`, `-Infinity`.
    Numeric,
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
            "boolean" => Self::Bool,
            "bytea" => Self::Bytea,
            "date" => Self::Date,
            "timestamp without time zone" => Self::Timestamp,
            "timestamp with time zone" => Self::Timestamptz,
            "numeric" => Self::Numeric,
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
            Self::Bool => "bool",
            Self::Bytea => "Vec<u8>",
            Self::Enum => "EnumLabel",
            Self::Date => either("chrono::NaiveDate", "time::Date", "chrono::NaiveDate or time::Date"),
            Self::Timestamp => either(
                "chrono::NaiveDateTime",
                "time::PrimitiveDateTime",
                "chrono::NaiveDateTime or time::PrimitiveDateTime",
            ),
            Self::Timestamptz => {
                either("chrono::DateTime<Utc>", "time::OffsetDateTime", "chrono::DateTime<Utc> or time::OffsetDateTime")
            }
            Self::Numeric => "rust_decimal::Decimal",
        }
    }

    /// The feature without which this library has no Rust type for it.
    pub(crate) fn missing_feature(self) -> Option<&'static str> {
        match self {
            Self::Date | Self::Timestamp | Self::Timestamptz => {
                (!cfg!(any(feature = "chrono", feature = "time"))).then_some("`chrono` or `time`")
            }
            Self::Numeric => (!cfg!(feature = "rust_decimal")).then_some("`rust_decimal`"),
            _ => None,
        }
    }

    /// The name Postgres gives it. An enum type has a name of its own: it is compared by its labels.
    pub(crate) fn postgres(self) -> &'static str {
        match self {
            Self::Int2 => "smallint",
            Self::Int4 => "integer",
            Self::Int8 => "bigint",
            Self::Text | Self::Enum => "text",
            Self::Uuid => "uuid",
            Self::Bool => "boolean",
            Self::Bytea => "bytea",
            Self::Date => "date",
            Self::Timestamp => "timestamp without time zone",
            Self::Timestamptz => "timestamp with time zone",
            Self::Numeric => "numeric",
        }
    }
}

/// The name of the type that is there, or of both where both or none are.
fn either(chrono: &'static str, time: &'static str, both: &'static str) -> &'static str {
    match (cfg!(feature = "chrono"), cfg!(feature = "time")) {
        (true, false) => chrono,
        (false, true) => time,
        _ => both,
    }
}

/// The value of one key column.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum KeyPart<'a> {
    /// A value of one of the three integer types.
    Int(i64),
    /// Text, or the text of any other type, as [`KeyType`] says.
    Text(Cow<'a, str>),
    /// A uuid that was read from a row (in messages it is text).
    Uuid(Uuid),
}

/// The parts of a key, owned. One is by far the most common, and needs no allocation of its own.
pub(crate) type Parts = SmallVec<[KeyPart<'static>; 1]>;

impl KeyPart<'_> {
    /// No row has this value: Postgres stores no text with a zero byte, and refuses every statement that has one. Values of
    /// other types that their columns cannot hold are written with one (`key/moments.rs`).
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

/// The key of a table: one of these types, or a tuple of two to four of them.
///
/// | Postgres | Rust | with feature |
/// | --- | --- | --- |
/// | `smallint`, `integer`, `bigint` | `i16`, `i32`, `i64` | |
/// | `text`, `varchar` | `String` | |
/// | `uuid` | [`Uuid`] | |
/// | `boolean` | `bool` | |
/// | `bytea` | `Vec<u8>` | |
/// | enums | [`EnumLabel`] | |
/// | `date` | `chrono::NaiveDate`, `time::Date` | `chrono`, `time` |
/// | `timestamp` | `chrono::NaiveDateTime`, `time::PrimitiveDateTime` | `chrono`, `time` |
/// | `timestamptz` | `chrono::DateTime<Utc>`, `time::OffsetDateTime` | `chrono`, `time` |
/// | `numeric` | `rust_decimal::Decimal` | `rust_decimal` |
///
/// Domains over these are held as what they are over, but for domains over enums, which Postgres itself cannot compare. Other types are
/// refused when the table is tracked; of those, `char(n)` and `citext` because several texts are one key to them.
///
/// Two keys are the same if Postgres says that they are equal: `1.0` and `1.00` are, and so is one moment with two offsets. A
/// value that no column can hold is the key of no row: times are not rounded, so one with a fraction of a microsecond is never found.
/// Nor can a row be asked for whose key the Rust type cannot hold: `infinity`, `NaN`, a date beyond the range of the
/// type. When such a row changes, the whole table is forgotten, unless its keys are sent as hashes.
///
/// Implement it for a type of your own by handing over to the type inside (by `<Decimal as Key>::from_parts`, where the type has a
/// function of that name):
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
///
/// Or, for what no type inside stands for, by reading and writing the text that [`KeyType`] tells:
///
/// ```
/// use rowcache::{Key, KeyPart, KeyType};
///
/// #[derive(Clone, Debug, PartialEq, Eq, Hash)]
/// enum Mood {
///     Sad,
///     Glad,
/// }
///
/// impl Key for Mood {
///     fn types() -> Vec<KeyType> {
///         vec![KeyType::Enum]
///     }
///     fn from_parts(parts: &[KeyPart<'_>]) -> Option<Self> {
///         match parts {
///             [KeyPart::Text(text)] if text == "sad" => Some(Mood::Sad),
///             [KeyPart::Text(text)] if text == "glad" => Some(Mood::Glad),
///             _ => None,
///         }
///     }
///     fn to_parts(&self) -> Vec<KeyPart<'_>> {
///         vec![KeyPart::Text(match self {
///             Mood::Sad => "sad".into(),
///             Mood::Glad => "glad".into(),
///         })]
///     }
/// }
/// ```
pub trait Key: Clone + Eq + Hash + fmt::Debug + Send + Sync + 'static {
    /// The type of each key column, in key order.
    fn types() -> Vec<KeyType>;

    /// Whether it holds the key of every table, so that [`types`](Self::types) is empty and the table's are taken.
    #[doc(hidden)]
    #[must_use]
    fn fits_any() -> bool {
        false
    }

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

// After the macro that they use.
#[cfg(feature = "serve")]
mod any;
#[cfg(any(feature = "chrono", feature = "time", test))]
mod moments;
mod plain;
#[cfg(feature = "chrono")]
mod with_chrono;
#[cfg(feature = "rust_decimal")]
mod with_decimal;
#[cfg(feature = "time")]
mod with_time;

#[cfg(feature = "serve")]
pub(crate) use any::{AnyKey, texts};
pub use plain::EnumLabel;
pub(crate) use plain::{bool_text, from_hex, to_hex};

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

#[cfg(all(test, not(shuttle)))]
mod tests;
