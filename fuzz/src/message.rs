//! Any text as a message. The oracle is a second reader of the grammar (`src/change.rs`), made from untyped JSON:
//! what is in the grammar is read as what it says; what is not makes a node forget the table that it names, or all.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use rowcache::{
    Change, KeyPart, RowKey, Rows,
    fuzzing::{self, Parsed, parse, to_payload},
};
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Value};

pub fn run(payload: &str) {
    let value = serde_json::from_str(payload);
    // A number that is out of all range ends this reader, and not the one that skips it on its way to the table's name.
    let is_whole = value.is_ok();
    let object = match value {
        Ok(Value::Object(object)) => object,
        _ => Map::new(),
    };
    let named = object.get("t").and_then(Value::as_str);
    match (parse(payload), expected(object.clone())) {
        (Parsed::Unreadable(None), None) => {}
        (Parsed::Unreadable(table), None) if is_whole => assert_eq!(table.as_deref(), named, "{payload}"),
        (Parsed::Unreadable(_), None) => {}
        // A name that is there twice is seen by one reader only.
        (Parsed::Unreadable(table), Some(_)) => {
            assert!(names_repeat(payload), "{payload} is in the grammar");
            assert!(table.is_none() || table.as_deref() == named, "{payload}");
        }
        (Parsed::Change(change), Some(expected)) => {
            assert_eq!(change, expected, "{payload}");
            let again = to_payload(&change);
            assert!(
                matches!(parse(&again), Parsed::Change(read) if read == change),
                "{payload} was written as {again}"
            );
        }
        (Parsed::Change(change), None) => {
            assert_eq!(change.rows, Rows::All, "{payload} is not in the grammar");
            assert!(change.table.is_none() || change.table.as_deref() == named, "{payload}");
        }
        (Parsed::Fence(..), expected) => {
            assert!(expected.is_none());
            let names: Vec<_> = object.iter().filter(|(_, value)| !is_nothing(value)).map(|(name, _)| name).collect();
            assert_eq!(names, ["f", "l", "s", "v"], "{payload}");
        }
    }
}

fn is_nothing(value: &Value) -> bool {
    matches!(value, Value::Null | Value::Bool(false))
}

fn expected(mut object: Map<String, Value>) -> Option<Change> {
    for optional in ["t", "x", "k", "i", "h"] {
        if object.get(optional) == Some(&Value::Null) {
            object.remove(optional);
        }
    }
    if object.remove("v")?.as_u64()? != 1 {
        return None;
    }
    let table = object.remove("t").map(|table| table.as_str().map(str::to_owned).ok_or(())).transpose().ok()?;
    let xid = object.remove("x").map(|xid| xid.as_u64().ok_or(())).transpose().ok()?;
    let all = object.remove("all").map_or(Some(false), |all| all.as_bool())?;
    let rows = match (all, &table) {
        (true, _) => Rows::All,
        (false, None) => return None,
        (false, Some(_)) => match (object.remove("k"), object.remove("i"), object.remove("h")) {
            (Some(Value::Array(keys)), None, None) => Rows::Keys(keys.iter().map(key).collect::<Option<_>>()?),
            (None, Some(Value::String(secret)), Some(Value::Array(hashes))) => {
                let hash = |hash: &Value| fuzzing::hash_from_hex(hash.as_str()?);
                fuzzing::hashed_rows(&secret, hashes.iter().map(hash).collect::<Option<_>>()?)
            }
            _ => return None,
        },
    };
    let mut columns = BTreeMap::new();
    if let Some(values) = object.remove("c") {
        let Value::Object(values) = values else { return None };
        for (column, values) in values {
            columns.insert(column, values.as_array()?.iter().map(scalar).collect::<Option<_>>()?);
        }
    }
    object.is_empty().then(|| fuzzing::change(table, rows, columns, xid))
}

fn scalar(value: &Value) -> Option<KeyPart<'static>> {
    match value {
        Value::String(text) => Some(KeyPart::Text(text.clone().into())),
        value => value.as_i64().map(KeyPart::Int),
    }
}

fn key(value: &Value) -> Option<RowKey> {
    match value {
        Value::Array(parts) => {
            let parts: Vec<_> = parts.iter().map(scalar).collect::<Option<_>>()?;
            // A list of one is told apart from its part, and a key has a part.
            (parts.len() >= 2).then(|| fuzzing::row_key(&parts))
        }
        value => scalar(value).map(|part| fuzzing::row_key(&[part])),
    }
}

/// Whether a name stands twice in an object, the outer one or one further down.
fn names_repeat(payload: &str) -> bool {
    serde_json::from_str::<Repeats>(payload).is_ok_and(|it| it.0)
}

/// Any JSON: whether a name stands twice in one of its objects.
struct Repeats(bool);

impl<'de> Deserialize<'de> for Repeats {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = bool;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("anything")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<bool, A::Error> {
                let (mut names, mut repeat) = (BTreeSet::new(), false);
                while let Some((name, inner)) = map.next_entry::<String, Repeats>()? {
                    repeat |= !names.insert(name) | inner.0;
                }
                Ok(repeat)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<bool, A::Error> {
                let mut repeat = false;
                while let Some(inner) = list.next_element::<Repeats>()? {
                    repeat |= inner.0;
                }
                Ok(repeat)
            }

            fn visit_bool<E>(self, _: bool) -> Result<bool, E> {
                Ok(false)
            }

            fn visit_i64<E>(self, _: i64) -> Result<bool, E> {
                Ok(false)
            }

            fn visit_u64<E>(self, _: u64) -> Result<bool, E> {
                Ok(false)
            }

            fn visit_f64<E>(self, _: f64) -> Result<bool, E> {
                Ok(false)
            }

            fn visit_str<E>(self, _: &str) -> Result<bool, E> {
                Ok(false)
            }

            fn visit_unit<E>(self) -> Result<bool, E> {
                Ok(false)
            }
        }

        deserializer.deserialize_any(Any).map(Self)
    }
}
