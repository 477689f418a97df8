//! What is written is read, and only that.

use proptest::prelude::*;

use super::*;
use crate::change::{Message, key_text};

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

fn text<K: Key>(key: &K) -> String {
    match &key.to_parts()[..] {
        [KeyPart::Text(text)] => text.clone().into_owned(),
        other => panic!("one text, not {other:?}"),
    }
}

fn from_text<K: Key>(text: &str) -> Option<K> {
    K::from_parts(&[KeyPart::Text(text.into())])
}

/// Also by way of a message; and two keys have one text if they are one key, which hashed keys rely on.
fn one_text_for_each<K: Key>(a: &K, b: &K) -> Result<(), TestCaseError> {
    for key in [a, b] {
        prop_assert_eq!(K::from_parts(&key.to_parts()), Some(key.clone()));
        let message = format!(r#"{{"v":1,"t":"a.b","k":[{}]}}"#, key_text(&key.to_parts()));
        let Message::Change(change) = Message::parse(&message) else { panic!("{message} cannot be read") };
        let crate::Rows::Keys(keys) = change.rows else { panic!("{message} has a key") };
        prop_assert_eq!(K::from_parts(keys[0].parts()), Some(key.clone()));
    }
    prop_assert_eq!(key_text(&a.to_parts()) == key_text(&b.to_parts()), a == b, "{:?} {:?}", a, b);
    Ok(())
}

#[test]
fn bools_bytes_and_labels() {
    assert_eq!((text(&true), text(&false)), ("true".into(), "false".into()));
    assert_eq!(text(&vec![0_u8, 255, 0x5c]), "00ff5c");
    assert_eq!(
        (text(&Vec::<u8>::new()), from_text(""), text(&EnumLabel::from("sad"))),
        (String::new(), Some(vec![]), "sad".into())
    );
    for wrong in ["t", "TRUE", "1", ""] {
        assert_eq!(from_text::<bool>(wrong), None, "{wrong}");
    }
    for wrong in ["0", "0g", "AA", "\\x00", "é"] {
        assert_eq!(from_text::<Vec<u8>>(wrong), None, "{wrong}");
    }
    assert_eq!(bool::from_parts(&[KeyPart::Int(1)]), None);
    round_trip(&(true, vec![7_u8], EnumLabel::from("it's \"fine\""), 7_i64));
}

#[test]
fn days_and_moments_that_no_column_holds_have_texts_of_their_own() {
    use super::moments::{day, day_text, moment, moment_text};
    let never = |text: &str| KeyPart::Text(text.into()).cannot_exist();
    for (days, held) in
        [(0, true), (-2_451_545, true), (-2_451_546, false), (2_145_031_948, true), (2_145_031_949, false)]
    {
        let text = day_text(days);
        assert_eq!((never(&text), day(&text)), (!held, Some(days)));
    }
    for (seconds, nanos, held) in [
        (946_684_800, 0, true),
        (946_684_800, 1_000, true),
        (946_684_800, 1, false),
        (946_684_799, 999_999_000, true),
        (946_684_799, 1_000_000_000, false),
        (-210_866_803_200, 0, true),
        (-210_866_803_201, 999_999_000, false),
        (9_224_318_015_999, 999_999_000, true),
        (9_224_318_016_000, 0, false),
        (i64::MAX, 0, false),
        (i64::MIN, 0, false),
    ] {
        let text = moment_text(seconds, nanos);
        assert_eq!((never(&text), moment(&text)), (!held, Some((seconds, nanos))), "{seconds} {nanos}");
    }
    assert_eq!((moment_text(946_684_799, 999_999_000), moment_text(946_684_800, 0)), ("-1".into(), "0".into()));
    for wrong in ["infinity", "-infinity", "", "1.5", "\0", "\x001"] {
        assert_eq!(moment(wrong), None, "{wrong:?}");
    }
    assert_eq!(day("infinity"), None);
}

#[cfg(feature = "chrono")]
#[test]
fn moments_of_chrono() {
    use chrono::{DateTime, NaiveDate, NaiveDateTime, Utc};
    let date = |y, m, d| NaiveDate::from_ymd_opt(y, m, d).expect("a date");
    let at = |days: NaiveDate, nanos| days.and_hms_nano_opt(23, 59, 59, nanos).expect("a time");
    assert_eq!((text(&date(2000, 1, 1)), text(&date(1999, 12, 31))), ("0".into(), "-1".into()));
    assert_eq!(text(&date(2026, 7, 4)), "9681");
    assert_eq!(text(&at(date(1999, 12, 31), 999_999_000)), "-1");
    assert_eq!(text(&at(date(1999, 12, 31), 999_999_000).and_utc()), "-1");
    for day in
        [NaiveDate::MIN, NaiveDate::MAX, date(0, 2, 29), date(-4713, 11, 24), date(-4713, 11, 23), date(12_345, 6, 7)]
    {
        round_trip(&day);
        round_trip(&at(day, 999_999_999));
        // A leap second, which is not the second after it.
        round_trip(&at(day, 1_500_000_000).and_utc());
    }
    assert_ne!(
        text(&at(date(1999, 12, 31), 1_000_000_000)),
        text(&date(2000, 1, 1).and_hms_opt(0, 0, 0).expect("a time"))
    );
    for beyond in ["infinity", "-infinity", "2145031948"] {
        assert_eq!(from_text::<NaiveDate>(beyond), None, "{beyond}");
    }
    for beyond in ["infinity", "-infinity", "9223371331199999999"] {
        assert_eq!(from_text::<NaiveDateTime>(beyond), None, "{beyond}");
        assert_eq!(from_text::<DateTime<Utc>>(beyond), None, "{beyond}");
    }
}

#[cfg(feature = "time")]
#[test]
fn moments_of_time() {
    use time::{Date, Duration, OffsetDateTime, PrimitiveDateTime, Time, UtcOffset};
    let epoch = Date::from_calendar_date(2000, time::Month::January, 1).expect("a date");
    let last = Time::from_hms_nano(23, 59, 59, 999_999_999).expect("a time");
    assert_eq!((text(&epoch), text(&(epoch - Duration::DAY))), ("0".into(), "-1".into()));
    for day in [Date::MIN, Date::MAX, epoch] {
        round_trip(&day);
        round_trip(&PrimitiveDateTime::new(day, Time::MIDNIGHT));
        round_trip(&PrimitiveDateTime::new(day, last));
        round_trip(&PrimitiveDateTime::new(day, last).assume_utc());
    }
    let moment = PrimitiveDateTime::new(epoch, Time::MIDNIGHT).assume_utc() - Duration::MICROSECOND;
    let elsewhere = moment.to_offset(UtcOffset::from_hms(-4, -30, 0).expect("an offset"));
    assert_eq!((text(&moment), text(&elsewhere)), ("-1".into(), "-1".into()));
    assert_eq!((from_text("-1"), moment == elsewhere), (Some(moment), true));
    for beyond in ["infinity", "-infinity", "9223371331199999999"] {
        assert_eq!(from_text::<OffsetDateTime>(beyond), None, "{beyond}");
    }
    assert_eq!(from_text::<Date>("2145031948"), None);
}

#[cfg(feature = "rust_decimal")]
#[test]
fn decimals() {
    use rust_decimal::Decimal;
    for (value, expected) in [
        ("1.500", "1.5"),
        ("100", "100"),
        ("-0.00", "0"),
        ("-0", "0"),
        ("0.0000000000000000000000000001", "0.0000000000000000000000000001"),
        ("79228162514264337593543950335", "79228162514264337593543950335"),
        ("-7.9228162514264337593543950335", "-7.9228162514264337593543950335"),
    ] {
        let value: Decimal = value.parse().expect("a decimal");
        assert_eq!(text(&value), expected);
        assert_eq!(from_text(expected), Some(value));
    }
    for beyond in [
        "NaN",
        "Infinity",
        "-Infinity",
        "79228162514264337593543950336",
        "0.00000000000000000000000000001",
        "0.12345678901234567890123456789",
        "1.50",
        "1e3",
        "",
    ] {
        assert_eq!(from_text::<Decimal>(beyond), None, "{beyond}");
    }
}

proptest! {
    #[test]
    fn bytes_have_one_text_each(a in any::<Vec<u8>>(), b in any::<Vec<u8>>()) {
        one_text_for_each(&a, &b)?;
    }

    #[test]
    fn moments_have_one_text_each(a in moment(), b in moment(), near in -3_i64..3) {
        let both = [a, (b.0, b.1), (a.0 + near, a.1), (a.0, a.1 / 1000 * 1000)];
        for b in both {
            let text = super::moments::moment_text;
            prop_assert_eq!(super::moments::moment(&text(a.0, a.1)), Some(a));
            prop_assert_eq!(text(a.0, a.1) == text(b.0, b.1), a == b);
            #[cfg(feature = "chrono")]
            if let (Some(a), Some(b)) = (chrono::DateTime::from_timestamp(a.0, a.1), chrono::DateTime::from_timestamp(b.0, b.1)) {
                one_text_for_each(&a, &b)?;
                one_text_for_each(&a.naive_utc(), &b.naive_utc())?;
                one_text_for_each(&a.date_naive(), &b.date_naive())?;
            }
            #[cfg(feature = "time")]
            {
                let at = |(seconds, nanos)| time::OffsetDateTime::from_unix_timestamp(seconds).ok()?.replace_nanosecond(nanos).ok();
                if let (Some(a), Some(b)) = (at(a), at(b)) {
                    one_text_for_each(&a, &b)?;
                    one_text_for_each(&a.date(), &b.date())?;
                }
            }
        }
    }

    #[cfg(feature = "rust_decimal")]
    #[test]
    fn decimals_have_one_text_each(a in decimal(), b in decimal()) {
        one_text_for_each(&a, &b)?;
        let mut longer = a;
        longer.rescale(28);
        one_text_for_each(&a, &longer)?;
    }
}

/// Around the bounds of what Postgres and the crates can hold, also with leap seconds.
fn moment() -> impl Strategy<Value = (i64, u32)> {
    let seconds = prop_oneof![
        -9_000_000_000_000_i64..9_300_000_000_000,
        -210_866_803_300_i64..-210_866_803_100,
        9_224_318_015_900_i64..9_224_318_016_100,
        946_684_700_i64..946_684_900,
    ];
    let nanos = prop_oneof![0_u32..2_000_000_000, (0_u32..2_000_000).prop_map(|micros| micros * 1000)];
    (seconds, nanos)
}

#[cfg(feature = "rust_decimal")]
fn decimal() -> impl Strategy<Value = rust_decimal::Decimal> {
    let number = prop_oneof![-(1_i128 << 96) + 1..1_i128 << 96, -1000_i128..1000];
    (number, 0_u32..=28).prop_map(|(number, scale)| rust_decimal::Decimal::from_i128_with_scale(number, scale))
}
