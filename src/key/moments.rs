//! Days and moments as the triggers write them: counted from the first day of the year 2000.
//!
//! Postgres holds a `date` as a number of days and a `timestamp` as one of microseconds, and the text of a key is that number.
//! Rust's types hold other moments, too. A key that no column can hold is written with a zero byte, which no key of a
//! row has: two keys never have one text. Rounded, as a driver would do it, they would: an entry that stands for "no such row" would be
//! taken for the one that a message is about, and with hashed keys the wrong one of the two would be forgotten.

/// Seconds from 1970 to 2000.
const EPOCH: i64 = 946_684_800;

/// What a `date` can be, in days: from 4714-11-24 BC to the end of 5874897.
const DAYS: std::ops::Range<i64> = -2_451_545..2_145_031_949;

/// What a `timestamp` can be, in microseconds: from 4714-11-24 BC to the end of 294276.
const MICROS: std::ops::Range<i64> = -211_813_488_000_000_000..9_223_371_331_200_000_000;

/// Stands before what no column can hold.
const NEVER: char = '\0';

/// The text of a day, which is so many days after 2000-01-01.
pub(super) fn day_text(days: i64) -> String {
    if DAYS.contains(&days) { days.to_string() } else { format!("{NEVER}{days}") }
}

/// Reads [`day_text`]. `None` for `infinity`.
pub(super) fn day(text: &str) -> Option<i64> {
    text.strip_prefix(NEVER).unwrap_or(text).parse().ok()
}

/// The text of a moment: seconds since 1970, and nanoseconds after that. A second or more of nanoseconds stands for a leap
/// second, which Postgres does not have.
pub(super) fn moment_text(seconds: i64, nanos: u32) -> String {
    let micros =
        seconds.checked_sub(EPOCH).and_then(|it| it.checked_mul(1_000_000)?.checked_add((nanos / 1000).into()));
    match micros.filter(|micros| MICROS.contains(micros) && nanos.is_multiple_of(1000) && nanos < 1_000_000_000) {
        Some(micros) => micros.to_string(),
        None => format!("{NEVER}{seconds} {nanos}"),
    }
}

/// Reads [`moment_text`]. `None` for `infinity`.
pub(super) fn moment(text: &str) -> Option<(i64, u32)> {
    if let Some(never) = text.strip_prefix(NEVER) {
        let (seconds, nanos) = never.split_once(' ')?;
        return Some((seconds.parse().ok()?, nanos.parse().ok()?));
    }
    let micros: i64 = text.parse().ok()?;
    let nanos = u32::try_from(micros.rem_euclid(1_000_000)).ok()? * 1000;
    Some((micros.div_euclid(1_000_000) + EPOCH, nanos))
}
