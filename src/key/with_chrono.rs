//! Keys of the types of crate `chrono`.

use std::borrow::Cow;

use chrono::{DateTime, NaiveDate, NaiveDateTime, Utc};

use super::{
    Column, Key, KeyPart, KeyType,
    moments::{day, day_text, moment, moment_text},
};

/// 2000-01-01, in days of the common era.
const EPOCH: i32 = 730_120;

impl Column for NaiveDate {
    const TYPE: KeyType = KeyType::Date;

    fn from_part(part: &KeyPart<'_>) -> Option<Self> {
        let KeyPart::Text(text) = part else { return None };
        let days = day(text)?.checked_add(EPOCH.into())?;
        Self::from_num_days_from_ce_opt(days.try_into().ok()?)
    }

    fn to_part(&self) -> KeyPart<'_> {
        let days = chrono::Datelike::num_days_from_ce(self);
        KeyPart::Text(Cow::Owned(day_text(i64::from(days) - i64::from(EPOCH))))
    }
}

impl Column for DateTime<Utc> {
    const TYPE: KeyType = KeyType::Timestamptz;

    fn from_part(part: &KeyPart<'_>) -> Option<Self> {
        let KeyPart::Text(text) = part else { return None };
        let (seconds, nanos) = moment(text)?;
        Self::from_timestamp(seconds, nanos)
    }

    fn to_part(&self) -> KeyPart<'_> {
        KeyPart::Text(Cow::Owned(moment_text(self.timestamp(), self.timestamp_subsec_nanos())))
    }
}

impl Column for NaiveDateTime {
    const TYPE: KeyType = KeyType::Timestamp;

    fn from_part(part: &KeyPart<'_>) -> Option<Self> {
        DateTime::<Utc>::from_part(part).map(|moment| moment.naive_utc())
    }

    fn to_part(&self) -> KeyPart<'_> {
        self.and_utc().to_part().into_owned()
    }
}

single!(NaiveDate, NaiveDateTime, DateTime<Utc>);
