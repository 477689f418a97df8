//! One message of the channel: what it says, and how it is read and written. Total on any bytes.
//!
//! ```text
//! change   = {"v":1,"t":RELATION,"x":XID,"k":[KEY,…]}                            these rows
//!          | {"v":1,"t":RELATION,"x":XID,"k":[KEY,…],"c":{COLUMN:[SCALAR,…],…}}  and these values of further columns
//!          | {"v":1,"t":RELATION,"x":XID,"i":SECRET,"h":[HASH,…]}                these rows, whose keys are secrets
//!          | {"v":1,"t":RELATION,"x":XID,"all":true}                             the whole table
//!          | {"v":1,"x":XID,"all":true}                                          every table
//! fence    = {"v":1,"f":NONCE,"s":SNAPSHOT,"l":LSN}  only on the node's own channel
//! KEY      = SCALAR | [SCALAR,SCALAR,…]           one key column | several, in key order
//! SCALAR   = integer | string                     canonical text of every type but the integers
//! HASH     = 32 hex digits                        of the text of a KEY, under the secret whose id is SECRET
//! RELATION = schema.table, quoted where Postgres would quote it | the name of a cache that is no table: view:NAME, schema.table(COLUMN)
//! SNAPSHOT = pg_current_snapshot(), and LSN the position in the log, of the transaction that sent the fence
//! XID      = the writer's pg_current_xact_id(); absent when no transaction's trigger sent it
//! ```
//!
//! An UPDATE that changes a key names the old and the new one. The SQL side is `migrations/`; both sides are
//! held together by `tests/triggers.rs`. A message must stay below 8000 bytes (NOTIFY), which the triggers
//! see to. Messages can only remove knowledge (I5), so reading errs towards *more*: what cannot be read
//! counts as a change of the whole table it names, and of every table where it names none.

use std::{borrow::Cow, collections::BTreeMap, fmt};

use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{SeqAccess, Visitor},
    ser::SerializeSeq,
};
use smallvec::smallvec;
use uuid::Uuid;

use crate::{
    hashed::KeyHash,
    key::{KeyPart, Parts},
    snapshot::Snapshot,
};

/// The channel on which the triggers of every tracked table send.
pub(crate) const CHANNEL: &str = "rowcache";

/// The version of the grammar above.
const VERSION: u64 = 1;

/// What one message of the channel says: rows changed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Change {
    /// The table, as `schema.table`; `None` means every table. A cache that is no table, of which somebody asks all nodes to forget
    /// something, has a name of its own (`view:accounts`, `public.users(email)`).
    pub table: Option<String>,
    /// The rows.
    pub rows: Rows,
    /// Old and new values of the further columns that the table was tracked with.
    pub columns: BTreeMap<String, Vec<KeyPart<'static>>>,
    /// The writer's transaction id (`pg_current_xact_id()`), if a trigger sent the message.
    pub xid: Option<u64>,
}

/// The rows that a [`Change`] is about.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Rows {
    /// Every row: a TRUNCATE, a statement that changed too many, or a message that could not be read.
    All,
    /// The rows with these keys, before and after the change.
    Keys(Vec<RowKey>),
    /// The rows whose keys have these hashes, before and after the change: of a table that was tracked with
    /// [`hash_keys`](crate::install::TrackOptions::hash_keys).
    #[non_exhaustive]
    Hashed {
        /// The id of the secret that made the hashes.
        secret: String,
        /// One for each key.
        hashes: Vec<KeyHash>,
    },
}

/// A key as a message carries it: one part per key column. Shown in the same way, so that a date is a number of days
/// ([`KeyType`](crate::KeyType)).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RowKey(Parts);

impl RowKey {
    /// The value of each key column, in key order.
    #[must_use]
    pub fn parts(&self) -> &[KeyPart<'static>] {
        &self.0
    }

    /// The key with these parts.
    pub(crate) fn new(parts: &[KeyPart<'_>]) -> Self {
        Self(parts.iter().map(|part| part.clone().into_owned()).collect())
    }
}

impl fmt::Display for RowKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&crate::key::display(self.parts()))
    }
}

/// A message, read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    Change(Change),
    Fence(Uuid, Mark),
    /// Not ours, damaged, forged, or of a later version: stands for a change of the whole table, or of all.
    Unreadable {
        table: Option<String>,
        error: String,
    },
}

/// How far the database was when a fence was sent.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Mark {
    /// All that it sees had queued their messages before the fence.
    pub(crate) snapshot: Snapshot,
    /// All whose commit was logged before this position had queued their messages before the fence.
    pub(crate) lsn: u64,
}

impl Mark {
    /// What both have reached.
    ///
    /// 1. A fence asks the server to notify, and polls the log, at the same time. The poll takes its snapshot;
    /// 2. a writer of a table that is told by way of the log commits;
    /// 3. the notification is sent, and *its* snapshot sees that commit, which nobody has read.
    ///
    /// Or the other way round. So neither of the two says what has been applied.
    pub(crate) fn common(&self, other: &Self) -> Self {
        Self { snapshot: self.snapshot.common(&other.snapshot), lsn: self.lsn.min(other.lsn) }
    }
}

/// The wire form of all messages. Unknown fields make a message unreadable: a later version may mean more.
#[derive(Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Wire<'a> {
    v: u64,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    t: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    x: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    k: Option<Vec<RowKey>>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    c: BTreeMap<String, Vec<RowKey>>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    i: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    h: Option<Vec<KeyHash>>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    all: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    f: Option<Uuid>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    s: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    l: Option<u64>,
}

impl Message {
    /// Reads a message of any content.
    pub(crate) fn parse(payload: &str) -> Self {
        // Serde reads a struct from a list as well, field by field. No list is in the grammar, and none names a table.
        if !payload.trim_ascii_start().starts_with('{') {
            return Self::Unreadable { table: None, error: "not a JSON object".into() };
        }
        Self::read(payload).unwrap_or_else(|error| Self::Unreadable { table: named_table(payload), error })
    }

    fn read(payload: &str) -> Result<Self, String> {
        let wire: Wire = serde_json::from_str(payload).map_err(|error| error.to_string())?;
        if wire.v != VERSION {
            return Err(format!("version {} is not {VERSION}", wire.v));
        }
        // Nothing is left over: a field that stands where the grammar has none may mean more than the others say.
        let fence = (wire.f, wire.s, wire.l);
        let rows = match (wire.t.is_some(), wire.all, wire.k, wire.i, wire.h, fence) {
            (false, false, None, None, None, (Some(nonce), Some(snapshot), Some(lsn)))
                if wire.x.is_none() && wire.c.is_empty() =>
            {
                return Ok(Self::Fence(nonce, Mark { snapshot: snapshot.parse()?, lsn }));
            }
            (_, true, None, None, None, (None, None, None)) => Rows::All,
            (true, false, Some(keys), None, None, (None, None, None)) => Rows::Keys(keys),
            (true, false, None, Some(secret), Some(hashes), (None, None, None)) => {
                Rows::Hashed { secret: secret.into_owned(), hashes }
            }
            _ => return Err("neither keys of a table, nor a whole table, nor a fence".into()),
        };
        let columns = wire
            .c
            .into_iter()
            .map(|(column, values)| {
                let scalar =
                    |value: RowKey| value.0.into_inner().map(|[part]| part).map_err(|_| "a column's value is a list");
                let values = values.into_iter().map(scalar);
                Ok((column, values.collect::<Result<_, _>>()?))
            })
            .collect::<Result<_, &str>>()?;
        Ok(Self::Change(Change { table: wire.t.map(Cow::into_owned), rows, columns, xid: wire.x }))
    }
}

/// The table that a damaged message still names, if any.
fn named_table(payload: &str) -> Option<String> {
    #[derive(Deserialize)]
    struct Named {
        t: String,
    }
    serde_json::from_str::<Named>(payload).ok().map(|named| named.t)
}

impl Change {
    /// A message that no transaction's trigger sent: somebody asked for the invalidation.
    pub(crate) fn requested(table: &str, rows: Rows) -> Self {
        Self { table: Some(table.to_owned()), rows, columns: BTreeMap::new(), xid: None }
    }

    /// The wire form, short enough for NOTIFY: with too many keys, it is the whole table.
    pub(crate) fn to_message(&self) -> String {
        /// NOTIFY refuses payloads of 8000 bytes or more.
        const PAYLOAD_MAX: usize = 7999;
        let payload = self.to_payload();
        if payload.len() <= PAYLOAD_MAX {
            return payload;
        }
        Self { rows: Rows::All, columns: BTreeMap::new(), ..self.clone() }.to_payload()
    }

    /// The wire form. A change without keys of a table that it does not name is written as "every table".
    pub(crate) fn to_payload(&self) -> String {
        let mut wire = Wire { v: VERSION, t: self.table.as_deref().map(Cow::Borrowed), x: self.xid, ..Wire::default() };
        match &self.rows {
            Rows::All => wire.all = true,
            Rows::Keys(keys) => wire.k = Some(keys.clone()),
            Rows::Hashed { secret, hashes } => {
                (wire.i, wire.h) = (Some(secret.as_str().into()), Some(hashes.clone()));
            }
        }
        let columns = self.columns.iter().map(|(column, values)| {
            let values = values.iter().map(|part| RowKey::new(std::slice::from_ref(part)));
            (column.clone(), values.collect())
        });
        wire.c = columns.collect();
        write(&wire)
    }
}

/// The text of a key as it stands in messages.
pub(crate) fn key_text(parts: &[KeyPart<'_>]) -> String {
    let text = if let [part] = parts { serde_json::to_string(part) } else { serde_json::to_string(parts) };
    text.expect("strings, integers and lists of them can always be written")
}

fn write(wire: &Wire<'_>) -> String {
    serde_json::to_string(wire).expect("strings, integers and lists of them can always be written")
}

impl Serialize for RowKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.parts() {
            [part] => part.serialize(serializer),
            parts => {
                let mut list = serializer.serialize_seq(Some(parts.len()))?;
                for part in parts {
                    list.serialize_element(part)?;
                }
                list.end()
            }
        }
    }
}

impl Serialize for KeyPart<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            KeyPart::Int(value) => serializer.serialize_i64(*value),
            KeyPart::Text(value) => serializer.serialize_str(value),
            KeyPart::Uuid(value) => serializer.collect_str(value),
        }
    }
}

impl<'de> Deserialize<'de> for RowKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Key;

        impl<'de> Visitor<'de> for Key {
            type Value = RowKey;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an integer, a string, or a list of two or more")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<RowKey, A::Error> {
                let mut parts = Parts::new();
                while let Some(part) = list.next_element()? {
                    parts.push(part);
                }
                if parts.len() < 2 {
                    return Err(serde::de::Error::invalid_length(parts.len(), &self));
                }
                Ok(RowKey(parts))
            }

            fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<RowKey, E> {
                Scalar.visit_i64(value).map(one)
            }

            fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<RowKey, E> {
                Scalar.visit_u64(value).map(one)
            }

            fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<RowKey, E> {
                Scalar.visit_str(value).map(one)
            }
        }

        deserializer.deserialize_any(Key)
    }
}

fn one(part: KeyPart<'static>) -> RowKey {
    RowKey(smallvec![part])
}

impl<'de> Deserialize<'de> for KeyPart<'static> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Scalar)
    }
}

struct Scalar;

impl Visitor<'_> for Scalar {
    type Value = KeyPart<'static>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an integer or a string")
    }

    fn visit_i64<E>(self, value: i64) -> Result<Self::Value, E> {
        Ok(KeyPart::Int(value))
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Self::Value, E> {
        value.try_into().map(KeyPart::Int).map_err(|_| E::custom("integer above 2^63 - 1"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Self::Value, E> {
        Ok(KeyPart::Text(Cow::Owned(value.to_owned())))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn change(table: &str, rows: Rows, xid: u64) -> Message {
        let table = Some(table.to_owned());
        Message::Change(Change { table, rows, columns: BTreeMap::new(), xid: Some(xid) })
    }

    #[test]
    fn the_grammar_by_example() {
        let keys = |keys: &[&[KeyPart]]| Rows::Keys(keys.iter().map(|key| RowKey::new(key)).collect());
        let cases = [
            (
                r#"{"v":1,"t":"public.users","x":789,"k":[42,-7]}"#,
                change("public.users", keys(&[&[KeyPart::Int(42)], &[KeyPart::Int(-7)]]), 789),
            ),
            (
                r#"{"v":1,"t":"public.sessions","x":790,"k":["tok\"en"]}"#,
                change("public.sessions", keys(&[&[KeyPart::Text("tok\"en".into())]]), 790),
            ),
            (
                r#"{"v":1,"t":"a.b","x":1,"k":[[7,"ada"]]}"#,
                change("a.b", keys(&[&[KeyPart::Int(7), KeyPart::Text("ada".into())]]), 1),
            ),
            (r#"{"v":1,"t":"a.b","x":1,"all":true}"#, change("a.b", Rows::All, 1)),
            (
                r#"{"v":1,"t":"a.b","x":1,"i":"0011","h":["000102030405060708090a0b0c0d0eff"]}"#,
                change(
                    "a.b",
                    Rows::Hashed {
                        secret: "0011".into(),
                        hashes: vec![KeyHash::from_hex("000102030405060708090a0b0c0d0eff").expect("a hash")],
                    },
                    1,
                ),
            ),
            (
                r#"{"v" : 1, "f" : "00000000-0000-0000-0000-000000000007", "s" : "10:20:10,12", "l" : 4711}"#,
                Message::Fence(
                    Uuid::from_u128(7),
                    Mark { snapshot: "10:20:10,12".parse().expect("a snapshot"), lsn: 4711 },
                ),
            ),
        ];
        for (payload, expected) in cases {
            assert_eq!(Message::parse(payload), expected, "{payload}");
            if let Message::Change(change) = &expected {
                assert_eq!(change.to_payload(), payload);
            }
        }
    }

    #[test]
    fn every_table() {
        let Message::Change(change) = Message::parse(r#"{"v":1,"all":true}"#) else { panic!() };
        assert_eq!((change.table, change.rows, change.xid), (None, Rows::All, None));
    }

    #[test]
    fn further_columns() {
        let payload = r#"{"v":1,"t":"public.orders","x":3,"k":[7],"c":{"user_id":[41,42]}}"#;
        let Message::Change(change) = Message::parse(payload) else { panic!() };
        assert_eq!(change.columns["user_id"], [KeyPart::Int(41), KeyPart::Int(42)]);
        assert_eq!(change.to_payload(), payload);
    }

    #[test]
    fn a_key_has_parts_and_a_text() {
        let one = RowKey::new(&[KeyPart::Int(7)]);
        assert_eq!((one.parts(), one.to_string().as_str()), (&[KeyPart::Int(7)][..], "7"));
        let parts = [KeyPart::Int(7), KeyPart::Text("ada".into())];
        let two = RowKey::new(&parts);
        assert_eq!((two.parts(), two.to_string().as_str()), (&parts[..], "(7, ada)"));
    }

    #[test]
    fn what_cannot_be_read_flushes_the_table_it_names_or_every_table() {
        let flushed = |payload| match Message::parse(payload) {
            Message::Unreadable { table, .. } => table,
            read => panic!("{payload} was read as {read:?}"),
        };
        for nameless in [
            "",
            "null",
            "[]",
            r#"["a.b"]"#,
            r#"[1,"a.b",7,[1],{},null,null,false,null,null,null]"#,
            "garbage",
            "{}",
            r#"{"v":1}"#,
            r#"{"v":1,"k":[1]}"#,
            "{\"v\":1,\"t\":\"a.b\"",
            r#"{"v":1,"f":"00000000-0000-0000-0000-000000000007"}"#,
            r#"{"v":1,"f":"00000000-0000-0000-0000-000000000007","s":"1:x:","l":1}"#,
            r#"{"v":1,"f":"00000000-0000-0000-0000-000000000007","s":"1:1:","l":1,"x":1}"#,
            r#"{"v":1,"f":"00000000-0000-0000-0000-000000000007","s":"1:1:","l":1,"c":{"x":[1]}}"#,
        ] {
            assert_eq!(flushed(nameless), None, "{nameless}");
        }
        for named in [
            r#"{"v":2,"t":"a.b","x":1,"k":[1]}"#,
            r#"{"v":1,"t":"a.b"}"#,
            r#"{"v":1,"t":"a.b","k":[1],"all":true}"#,
            r#"{"v":1,"t":"a.b","k":[1],"later":true}"#,
            r#"{"v":1,"t":"a.b","k":[1.5]}"#,
            r#"{"v":1,"t":"a.b","k":[[[1]]]}"#,
            r#"{"v":1,"t":"a.b","k":[[]]}"#,
            r#"{"v":1,"t":"a.b","k":[["one"]]}"#,
            r#"{"v":1,"t":"a.b","k":[18446744073709551615]}"#,
            r#"{"v":1,"t":"a.b","k":7}"#,
            r#"{"v":1,"t":"a.b","h":["000102030405060708090a0b0c0d0eff"]}"#,
            r#"{"v":1,"t":"a.b","i":"0011","h":["0001"]}"#,
            r#"{"v":1,"t":"a.b","k":[1],"i":"0011"}"#,
            r#"{"v":1,"t":"a.b","k":[1],"h":["000102030405060708090a0b0c0d0eff"]}"#,
            r#"{"v":1,"t":"a.b","k":[1],"l":7}"#,
            r#"{"v":1,"t":"a.b","i":"0011","h":["000102030405060708090a0b0c0d0e+f"]}"#,
            r#"{"v":1,"t":"a.b","i":"0011","h":[7]}"#,
            r#"{"v":1,"t":"a.b","i":"0011","h":["000102030405060708090a0b0c0d0eff"],"k":[1]}"#,
            r#"{"v":1,"t":"a.b","k":[1],"c":{"x":[[1]]}}"#,
            r#"{"v":1,"t":"a.b","f":"00000000-0000-0000-0000-000000000007","s":"1:1:","l":1}"#,
        ] {
            assert_eq!(flushed(named).as_deref(), Some("a.b"), "{named}");
        }
    }

    fn part() -> impl Strategy<Value = KeyPart<'static>> {
        prop_oneof![
            any::<i64>().prop_map(KeyPart::Int),
            any::<String>().prop_map(|text| KeyPart::Text(Cow::Owned(text))),
        ]
    }

    proptest! {
        #[test]
        fn any_text_is_a_message_or_unreadable(text in any::<String>()) {
            Message::parse(&text);
        }

        #[test]
        fn any_damage_to_a_message_is_survived(at in 0_usize..60, byte in any::<char>()) {
            let mut payload = r#"{"v":1,"t":"public.users","x":789,"k":[42,[1,"a"]]}"#.to_owned();
            let at = at.min(payload.len());
            payload.insert(at, byte);
            Message::parse(&payload);
            payload.truncate(at);
            Message::parse(&payload);
        }

        #[test]
        fn what_is_written_is_read(
            table in any::<String>(),
            keys in proptest::collection::vec(proptest::collection::vec(part(), 1..4), 0..5),
            xid in any::<Option<u64>>(),
        ) {
            let rows = Rows::Keys(keys.iter().map(|parts| RowKey::new(parts)).collect());
            let change = Change { table: Some(table), rows, columns: BTreeMap::new(), xid };
            prop_assert_eq!(Message::parse(&change.to_payload()), Message::Change(change));
        }
    }
}
