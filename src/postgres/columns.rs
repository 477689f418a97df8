//! Key columns: how they stand in a statement, how a key is bound to it, and how one is read from a row.
//!
//! What is bound and read is what the triggers write (`rowcache.key_text`), in another form: the number of days that a `date`
//! is, for one, is what both its text in messages and its binary form are made of. So no setting, and no conversion of a
//! driver, stands between a key and its row.
//!
//! Two types have no such form here, and go as text: `numeric`, and enums. The number of a type that a user has made is known
//! to his database only, its name depends on the search path, and a label that it does not have is an error to Postgres. So a
//! label is looked for among those of the column's type: there is none, then there is no row.

use sqlx::{
    Decode, Encode, Postgres, Row, Type,
    encode::IsNull,
    error::BoxDynError,
    postgres::{
        PgArgumentBuffer, PgArguments, PgHasArrayType, PgRow, PgTypeInfo, PgValueFormat, PgValueRef, types::Oid,
    },
    query::Query,
};
use uuid::Uuid;

use crate::key::{KeyPart, KeyType, bool_text, from_hex, to_hex};

type Statement = Query<'static, Postgres, PgArguments>;

/// A key column of a table `t`, in SQL.
pub(super) struct KeyColumn<'a> {
    pub(super) of: KeyType,
    /// As SQL has them, quoted where needed.
    pub(super) table: &'a str,
    pub(super) name: &'a str,
}

impl KeyColumn<'_> {
    /// Its value, as [`read`] reads it.
    pub(super) fn value(&self) -> String {
        let name = self.name;
        match self.of {
            KeyType::Numeric => format!("pg_catalog.trim_scale(t.{name})::text"),
            KeyType::Enum => format!("t.{name}::text"),
            _ => format!("t.{name}"),
        }
    }

    /// That it is this parameter.
    pub(super) fn is(&self, parameter: usize) -> String {
        self.equals(&format!("${parameter}"))
    }

    /// That it is in this parameter.
    pub(super) fn is_one_of(&self, parameter: usize) -> String {
        let name = self.name;
        match self.of {
            KeyType::Enum => {
                format!("t.{name} = any(array{})", self.labels(&format!("any(${parameter})")))
            }
            _ => format!("t.{name} = any({})", self.elements(parameter)),
        }
    }

    /// That it is an element of a parameter, which [`elements`](Self::elements) has made a column of this name.
    pub(super) fn is_element(&self, element: &str) -> String {
        match self.of {
            KeyType::Numeric => format!("t.{} = {element}", self.name),
            _ => self.equals(element),
        }
    }

    /// The parameter as an array of elements. By way of a sub-select, so that the planner does not see how many: if it saw that there are
    /// fewer than the ten that it assumes of an array that it does not know, it would plan the statement anew for each execution, which takes
    /// longer than to read the rows.
    pub(super) fn elements(&self, parameter: usize) -> String {
        format!("(select ${parameter})::{}[]", self.of.postgres())
    }

    fn equals(&self, value: &str) -> String {
        let name = self.name;
        match self.of {
            KeyType::Numeric => format!("t.{name} = {value}::numeric"),
            KeyType::Enum => format!("t.{name} = {}", self.labels(value)),
            _ => format!("t.{name} = {value}"),
        }
    }

    /// A query for the values of an enum whose labels are these. It names the type by the column, of which it reads no row.
    fn labels(&self, are: &str) -> String {
        format!(
            "(select l.label from (select 1) one left join only {} x on false \
             cross join pg_catalog.unnest(pg_catalog.enum_range(x.{})) l(label) where l.label::text = {are})",
            self.table, self.name
        )
    }
}

/// Binds the value of a key column. One that no row can have is bound as null, which nothing is equal to.
pub(super) fn bind(query: Statement, of: KeyType, part: KeyPart<'_>) -> Statement {
    match of {
        KeyType::Int2 => query.bind(narrow::<i16>(int(&part))),
        KeyType::Int4 => query.bind(narrow::<i32>(int(&part))),
        KeyType::Int8 => query.bind(int(&part)),
        KeyType::Text => query.bind(text(part)),
        KeyType::Uuid => query.bind(uuid(&part)),
        KeyType::Bool => query.bind(parsed(&part, |text| text.parse::<bool>().ok())),
        KeyType::Bytea => query.bind(parsed(&part, from_hex)),
        KeyType::Enum | KeyType::Numeric => query.bind(parsed(&part, own)),
        KeyType::Date => query.bind(parsed(&part, Days::from_text)),
        KeyType::Timestamp => query.bind(parsed(&part, Micros::<false>::from_text)),
        KeyType::Timestamptz => query.bind(parsed(&part, Micros::<true>::from_text)),
    }
}

/// Binds the values that a key column has in several keys.
pub(super) fn bind_all(query: Statement, of: KeyType, parts: &[KeyPart<'_>]) -> Statement {
    fn all<T>(parts: &[KeyPart<'_>], one: impl Fn(&KeyPart<'_>) -> T) -> Vec<T> {
        parts.iter().map(one).collect()
    }
    match of {
        KeyType::Int2 => query.bind(all(parts, |part| narrow::<i16>(int(part)))),
        KeyType::Int4 => query.bind(all(parts, |part| narrow::<i32>(int(part)))),
        KeyType::Int8 => query.bind(all(parts, int)),
        KeyType::Text => query.bind(all(parts, |part| text(part.clone()))),
        KeyType::Uuid => query.bind(all(parts, uuid)),
        KeyType::Bool => query.bind(all(parts, |part| parsed(part, |text| text.parse::<bool>().ok()))),
        KeyType::Bytea => query.bind(all(parts, |part| parsed(part, from_hex))),
        KeyType::Enum | KeyType::Numeric => query.bind(all(parts, |part| parsed(part, own))),
        KeyType::Date => query.bind(all(parts, |part| parsed(part, Days::from_text))),
        KeyType::Timestamp => query.bind(all(parts, |part| parsed(part, Micros::<false>::from_text))),
        KeyType::Timestamptz => query.bind(all(parts, |part| parsed(part, Micros::<true>::from_text))),
    }
}

/// Reads the value of a key column; `None` for null.
pub(super) fn read(row: &PgRow, column: usize, of: KeyType) -> sqlx::Result<Option<KeyPart<'static>>> {
    fn get<'r, T: Decode<'r, Postgres> + Type<Postgres>>(
        row: &'r PgRow,
        column: usize,
        part: impl FnOnce(T) -> KeyPart<'static>,
    ) -> sqlx::Result<Option<KeyPart<'static>>> {
        Ok(row.try_get::<Option<T>, _>(column)?.map(part))
    }
    match of {
        KeyType::Int2 => get(row, column, |it: i16| KeyPart::Int(it.into())),
        KeyType::Int4 => get(row, column, |it: i32| KeyPart::Int(it.into())),
        KeyType::Int8 => get(row, column, KeyPart::Int),
        KeyType::Text | KeyType::Enum | KeyType::Numeric => get(row, column, |it: String| KeyPart::Text(it.into())),
        KeyType::Uuid => get(row, column, KeyPart::Uuid),
        KeyType::Bool => get(row, column, |it: bool| KeyPart::Text(bool_text(it).into())),
        KeyType::Bytea => get(row, column, |it: Vec<u8>| KeyPart::Text(to_hex(&it).into())),
        KeyType::Date => get(row, column, |it: Days| KeyPart::Text(it.text().into())),
        KeyType::Timestamp => get(row, column, |it: Micros<false>| KeyPart::Text(it.text().into())),
        KeyType::Timestamptz => get(row, column, |it: Micros<true>| KeyPart::Text(it.text().into())),
    }
}

/// A `date`, as Postgres holds it.
struct Days(i32);

/// A `timestamp`, or a `timestamptz`, as Postgres holds it.
struct Micros<const ZONED: bool>(i64);

/// Something that Postgres holds as one number, the largest and the smallest of which stand for infinity.
macro_rules! number {
    ($name:ident $(<const $zoned:ident: bool>)?, $number:ty, $type:expr, $array:expr) => {
        impl$(<const $zoned: bool>)? $name$(<$zoned>)? {
            fn from_text(text: &str) -> Option<Self> {
                match text {
                    "infinity" => Some(Self(<$number>::MAX)),
                    "-infinity" => Some(Self(<$number>::MIN)),
                    text => text.parse().ok().map(Self),
                }
            }

            fn text(self) -> String {
                match self.0 {
                    <$number>::MAX => "infinity".to_owned(),
                    <$number>::MIN => "-infinity".to_owned(),
                    number => number.to_string(),
                }
            }
        }

        impl$(<const $zoned: bool>)? Type<Postgres> for $name$(<$zoned>)? {
            fn type_info() -> PgTypeInfo {
                PgTypeInfo::with_oid(Oid($type))
            }
        }

        impl$(<const $zoned: bool>)? PgHasArrayType for $name$(<$zoned>)? {
            fn array_type_info() -> PgTypeInfo {
                PgTypeInfo::with_oid(Oid($array))
            }
        }

        impl$(<const $zoned: bool>)? Encode<'_, Postgres> for $name$(<$zoned>)? {
            fn encode_by_ref(&self, buffer: &mut PgArgumentBuffer) -> Result<IsNull, BoxDynError> {
                buffer.extend(&self.0.to_be_bytes());
                Ok(IsNull::No)
            }
        }

        impl$(<const $zoned: bool>)? Decode<'_, Postgres> for $name$(<$zoned>)? {
            fn decode(value: PgValueRef<'_>) -> Result<Self, BoxDynError> {
                if value.format() != PgValueFormat::Binary {
                    return Err("the answer to a statement with parameters is binary".into());
                }
                Ok(Self(<$number>::from_be_bytes(value.as_bytes()?.try_into()?)))
            }
        }
    };
}
// The numbers of these types are the same in every Postgres.
number!(Days, i32, 1082, 1182);
number!(Micros<const ZONED: bool>, i64, if ZONED { 1184 } else { 1114 }, if ZONED { 1185 } else { 1115 });

const FITS: &str = "a key's parts fit the types it declares";

fn int(part: &KeyPart<'_>) -> i64 {
    match part {
        KeyPart::Int(value) => *value,
        other => unreachable!("an integer key has integer parts, not {other:?}"),
    }
}

fn uuid(part: &KeyPart<'_>) -> Option<Uuid> {
    match part {
        KeyPart::Uuid(value) => Some(*value),
        KeyPart::Text(text) => Uuid::try_parse(text).ok(),
        KeyPart::Int(_) => unreachable!("a uuid key has uuid parts, not {part:?}"),
    }
}

fn text(part: KeyPart<'_>) -> String {
    match part {
        KeyPart::Text(text) => text.into_owned(),
        other => other.to_string(),
    }
}

/// What the text of a key stands for; `None`: no row has it.
fn parsed<T>(part: &KeyPart<'_>, parse: impl Fn(&str) -> Option<T>) -> Option<T> {
    match part {
        part if part.cannot_exist() => None,
        KeyPart::Text(text) => Some(parse(text).expect(FITS)),
        other => unreachable!("{FITS}, not {other:?}"),
    }
}

#[expect(clippy::unnecessary_wraps, reason = "the others parse")]
fn own(text: &str) -> Option<String> {
    Some(text.to_owned())
}

fn narrow<T: TryFrom<i64>>(value: i64) -> T {
    T::try_from(value).ok().expect(FITS)
}
