//! The key of a table that is known only when the program runs, and how people write it.
//!
//! In messages a date is a number of days, which nobody would type. Here it is `2026-01-31`. Both forms have one text for each
//! value: two texts that Postgres holds for equal are one key, and so is what comes back from [`AnyKey::text`].

use std::{borrow::Cow, fmt};

use jiff::{
    Timestamp,
    civil::{Date, DateTime, date},
    tz::TimeZone,
};
use uuid::Uuid;

use super::{Key, KeyPart, KeyType, from_hex, to_hex};
use crate::change::RowKey;

/// The key of any table.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct AnyKey(RowKey);

impl Key for AnyKey {
    fn types() -> Vec<KeyType> {
        Vec::new()
    }

    fn fits_any() -> bool {
        true
    }

    fn from_parts(parts: &[KeyPart<'_>]) -> Option<Self> {
        let as_in_messages = |part: &KeyPart<'_>| match part {
            KeyPart::Uuid(uuid) => KeyPart::Text(uuid.to_string().into()),
            part => part.clone().into_owned(),
        };
        let parts: Vec<_> = parts.iter().map(as_in_messages).collect();
        Some(Self(RowKey::new(&parts)))
    }

    fn to_parts(&self) -> Vec<KeyPart<'_>> {
        let borrowed = |part: &'_ KeyPart<'static>| match part {
            KeyPart::Int(value) => KeyPart::Int(*value),
            KeyPart::Text(text) => KeyPart::Text(Cow::Owned(text.to_string())),
            KeyPart::Uuid(uuid) => KeyPart::Uuid(*uuid),
        };
        self.0.parts().iter().map(borrowed).collect()
    }
}

impl AnyKey {
    /// Reads a key of these types, a text for each column. What is wrong otherwise.
    pub(crate) fn parse<T: AsRef<str>>(types: &[KeyType], texts: &[T]) -> Result<Self, String> {
        if texts.len() != types.len() {
            return Err(format!("the key has {} parts, and here are {}", types.len(), texts.len()));
        }
        if let ([of], [text]) = (types, texts) {
            return Ok(Self(RowKey::new(&[part(*of, text.as_ref())?])));
        }
        let parts =
            texts.iter().zip(types).map(|(text, of)| part(*of, text.as_ref())).collect::<Result<Vec<_>, _>>()?;
        Ok(Self(RowKey::new(&parts)))
    }

    /// What [`parse`](Self::parse) reads, a text for each column.
    pub(crate) fn text(&self, types: &[KeyType]) -> Vec<String> {
        texts(&self.0, types)
    }
}

/// The parts of a key, as people write them. One of other types than the message's is shown as it is there.
pub(crate) fn texts(key: &RowKey, types: &[KeyType]) -> Vec<String> {
    let mut types = types.iter();
    key.parts().iter().map(|part| types.next().map_or_else(|| part.to_string(), |of| shown(*of, part))).collect()
}

/// The first day of Postgres.
const EPOCH: Date = date(2000, 1, 1);

fn part(of: KeyType, text: &str) -> Result<KeyPart<'static>, String> {
    let no = |what: &str| Err(format!("`{}` is no {what}", text.chars().take(100).collect::<String>()));
    let int = |min: i64, max: i64| match text.parse::<i64>() {
        Ok(value) if (min..=max).contains(&value) && !text.starts_with('+') => Ok(KeyPart::Int(value)),
        _ => no(of.postgres()),
    };
    let own = |text: String| Ok(KeyPart::Text(text.into()));
    match of {
        KeyType::Int2 => int(i16::MIN.into(), i16::MAX.into()),
        KeyType::Int4 => int(i32::MIN.into(), i32::MAX.into()),
        KeyType::Int8 => int(i64::MIN, i64::MAX),
        KeyType::Text | KeyType::Enum if text.contains('\0') => no("text that Postgres can hold"),
        KeyType::Text | KeyType::Enum => own(text.to_owned()),
        KeyType::Uuid => Uuid::try_parse(text).map_or_else(|_| no("uuid"), |uuid| own(uuid.to_string())),
        KeyType::Bool if matches!(text, "true" | "false") => own(text.to_owned()),
        KeyType::Bool => no("boolean (true or false)"),
        KeyType::Bytea => {
            let digits = text.strip_prefix("\\x").unwrap_or(text).to_ascii_lowercase();
            from_hex(&digits).map_or_else(|| no("bytes in hexadecimal digits"), |bytes| own(to_hex(&bytes)))
        }
        KeyType::Numeric => number(text).map_or_else(|| no("number, such as 12.5"), own),
        KeyType::Date | KeyType::Timestamp | KeyType::Timestamptz if matches!(text, "infinity" | "-infinity") => {
            own(text.to_owned())
        }
        KeyType::Date => match text.parse::<Date>() {
            Ok(day) => own((day - EPOCH).get_days().to_string()),
            Err(_) => no("date, such as 2026-01-31"),
        },
        KeyType::Timestamp => {
            micros(text, |text| text.parse::<DateTime>().ok()?.to_zoned(TimeZone::UTC).ok().map(|at| at.timestamp()))
                .map_or_else(|| no("timestamp to the microsecond, such as 2026-01-31T12:30:00.5"), own)
        }
        KeyType::Timestamptz => micros(text, |text| text.parse().ok())
            .map_or_else(|| no("timestamp to the microsecond with its offset, such as 2026-01-31T12:30:00Z"), own),
    }
}

fn shown(of: KeyType, part: &KeyPart<'_>) -> String {
    let text = part.to_string();
    let at = |text: &str| {
        let micros: i64 = text.parse().ok()?;
        Timestamp::from_microsecond(micros.checked_add(start().as_microsecond())?).ok()
    };
    let read = match of {
        KeyType::Date => text.parse::<i32>().ok().and_then(|days| {
            let days = jiff::Span::new().try_days(days).ok()?;
            EPOCH.checked_add(days).ok().map(|day| day.to_string())
        }),
        KeyType::Timestamp => at(&text).map(|at| at.to_zoned(TimeZone::UTC).datetime().to_string()),
        KeyType::Timestamptz => at(&text).map(|at| at.to_string()),
        _ => None,
    };
    read.unwrap_or(text)
}

/// The moment from which Postgres counts.
fn start() -> Timestamp {
    EPOCH.to_zoned(TimeZone::UTC).map(|at| at.timestamp()).unwrap_or_default()
}

/// Microseconds since the first day of Postgres; `None` also for what is finer.
fn micros(text: &str, read: impl Fn(&str) -> Option<Timestamp>) -> Option<String> {
    let at = read(text)?;
    let is_whole = at.subsec_nanosecond() % 1000 == 0;
    is_whole.then(|| (at.as_microsecond() - start().as_microsecond()).to_string())
}

/// A number as the triggers write it: no exponent, no needless zeros.
fn number(text: &str) -> Option<String> {
    let (sign, digits) = text.strip_prefix('-').map_or(("", text), |digits| ("-", digits));
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let all_digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    // What Postgres can hold: 131072 digits before the point, 16383 after it.
    let fits = whole.len() <= 1000 && fraction.len() <= 1000;
    if whole.is_empty() || digits.ends_with('.') || !all_digits(whole) || !all_digits(fraction) || !fits {
        return None;
    }
    let whole = whole.trim_start_matches('0');
    let fraction = fraction.trim_end_matches('0');
    let whole = if whole.is_empty() { "0" } else { whole };
    Some(match fraction {
        "" if whole == "0" => "0".to_owned(),
        "" => format!("{sign}{whole}"),
        _ => format!("{sign}{whole}.{fraction}"),
    })
}

impl fmt::Display for AnyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    fn parse(of: KeyType, text: &str) -> Option<String> {
        AnyKey::parse(&[of], &[text]).ok().map(|key| key.to_string())
    }

    #[test]
    fn what_people_write_is_what_messages_say() {
        for (of, text, said, shown) in [
            (KeyType::Int2, "-7", "-7", "-7"),
            (KeyType::Int8, "007", "7", "7"),
            (KeyType::Text, "a,b c", "a,b c", "a,b c"),
            (
                KeyType::Uuid,
                "6E1F8B5A2C3D4E5F8A9B0C1D2E3F4A5B",
                "6e1f8b5a-2c3d-4e5f-8a9b-0c1d2e3f4a5b",
                "6e1f8b5a-2c3d-4e5f-8a9b-0c1d2e3f4a5b",
            ),
            (KeyType::Bool, "true", "true", "true"),
            (KeyType::Bytea, "\\xDEad", "dead", "dead"),
            (KeyType::Numeric, "-012.500", "-12.5", "-12.5"),
            (KeyType::Numeric, "-0.0", "0", "0"),
            (KeyType::Date, "2000-01-31", "30", "2000-01-31"),
            (KeyType::Date, "1999-12-31", "-1", "1999-12-31"),
            (KeyType::Date, "infinity", "infinity", "infinity"),
            (KeyType::Timestamp, "2000-01-01T00:00:01.5", "1500000", "2000-01-01T00:00:01.5"),
            (KeyType::Timestamptz, "2000-01-01T01:00:00+01:00", "0", "2000-01-01T00:00:00Z"),
        ] {
            assert_eq!(parse(of, text).as_deref(), Some(said), "{of:?} {text}");
            let key = AnyKey::parse(&[of], &[text]).expect("as before");
            assert_eq!(key.text(&[of]), [shown], "{of:?} {text}");
            assert_eq!(AnyKey::parse(&[of], &key.text(&[of])), Ok(key));
        }
    }

    #[test]
    fn what_no_column_can_hold_is_refused() {
        for (of, text) in [
            (KeyType::Int2, "32768"),
            (KeyType::Int4, "2147483648"),
            (KeyType::Int8, "+1"),
            (KeyType::Int8, ""),
            (KeyType::Int8, "1.0"),
            (KeyType::Text, "\0"),
            (KeyType::Uuid, "7"),
            (KeyType::Bool, "t"),
            (KeyType::Bytea, "abc"),
            (KeyType::Numeric, "1e3"),
            (KeyType::Numeric, "."),
            (KeyType::Numeric, "1."),
            (KeyType::Numeric, "--1"),
            (KeyType::Date, "2000-02-30"),
            (KeyType::Timestamp, "2000-01-01T00:00:00.0000001"),
            (KeyType::Timestamptz, "2000-01-01T00:00:00"),
        ] {
            assert_eq!(parse(of, text), None, "{of:?} {text}");
        }
        assert!(AnyKey::parse(&[KeyType::Int8], &["1", "2"]).is_err());
    }

    #[test]
    fn a_uuid_of_a_row_is_the_one_of_a_message() {
        let uuid = Uuid::from_u128(7);
        let [row, message] =
            [KeyPart::Uuid(uuid), KeyPart::Text(uuid.to_string().into())].map(|part| AnyKey::from_parts(&[part]));
        assert_eq!(row, message);
    }
}
