//! Keys of the types of crate `time`.

use std::borrow::Cow;

use time::{Date, OffsetDateTime, PrimitiveDateTime};

use super::{
    Column, Key, KeyPart, KeyType,
    moments::{day, day_text, moment, moment_text},
};

/// 2000-01-01, as a Julian day.
const EPOCH: i32 = 2_451_545;

impl Column for Date {
    const TYPE: KeyType = KeyType::Date;

    fn from_part(part: &KeyPart<'_>) -> Option<Self> {
        let KeyPart::Text(text) = part else { return None };
        let days = day(text)?.checked_add(EPOCH.into())?;
        Self::from_julian_day(days.try_into().ok()?).ok()
    }

    fn to_part(&self) -> KeyPart<'_> {
        KeyPart::Text(Cow::Owned(day_text(i64::from(self.to_julian_day()) - i64::from(EPOCH))))
    }
}

/// One moment is one key, whatever its offset; to Rust as to Postgres. Keys that are read have none.
impl Column for OffsetDateTime {
    const TYPE: KeyType = KeyType::Timestamptz;

    fn from_part(part: &KeyPart<'_>) -> Option<Self> {
        let KeyPart::Text(text) = part else { return None };
        let (seconds, nanos) = moment(text)?;
        Self::from_unix_timestamp(seconds).ok()?.replace_nanosecond(nanos).ok()
    }

    fn to_part(&self) -> KeyPart<'_> {
        KeyPart::Text(Cow::Owned(moment_text(self.unix_timestamp(), self.nanosecond())))
    }
}

impl Column for PrimitiveDateTime {
    const TYPE: KeyType = KeyType::Timestamp;

    fn from_part(part: &KeyPart<'_>) -> Option<Self> {
        OffsetDateTime::from_part(part).map(|moment| Self::new(moment.date(), moment.time()))
    }

    fn to_part(&self) -> KeyPart<'_> {
        self.assume_utc().to_part().into_owned()
    }
}

single!(Date, PrimitiveDateTime, OffsetDateTime);
