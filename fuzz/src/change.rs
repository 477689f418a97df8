//! What is written is read again; and with a field or a version that nobody knows, it is a change of the table.

use std::collections::BTreeMap;

use arbitrary::Arbitrary;
use rowcache::{
    KeyPart, Rows,
    fuzzing::{self, Parsed, parse, to_payload},
};
use serde_json::Value;
use uuid::Uuid;

#[derive(Arbitrary, Debug)]
pub struct Input {
    table: Option<String>,
    rows: Form,
    columns: BTreeMap<String, Vec<Part>>,
    xid: Option<u64>,
    damage: Damage,
}

#[derive(Arbitrary, Debug)]
enum Form {
    All,
    Keys(Vec<Vec<Part>>),
    Hashed(String, Vec<[u8; 16]>),
}

#[derive(Arbitrary, Debug)]
pub enum Part {
    Int(i64),
    Text(String),
    Uuid(u128),
}

/// What happens to the message on its way.
#[derive(Arbitrary, Debug)]
enum Damage {
    Field(String, u8),
    Version(u64),
    Without(u8),
}

impl Part {
    pub fn part(&self) -> KeyPart<'static> {
        match self {
            Self::Int(value) => KeyPart::Int(*value),
            Self::Text(text) => KeyPart::Text(text.clone().into()),
            Self::Uuid(value) => KeyPart::Uuid(Uuid::from_u128(*value)),
        }
    }

    /// As it arrives: uuids travel as text.
    pub fn received(&self) -> KeyPart<'static> {
        match self.part() {
            KeyPart::Uuid(uuid) => KeyPart::Text(uuid.to_string().into()),
            part => part,
        }
    }
}

impl Input {
    fn change(&self, part: fn(&Part) -> KeyPart<'static>) -> rowcache::Change {
        let parts = |parts: &Vec<Part>| parts.iter().map(part).collect::<Vec<_>>();
        let rows = match &self.rows {
            Form::All => Rows::All,
            Form::Keys(keys) => {
                let keys = keys.iter().filter(|key| !key.is_empty());
                Rows::Keys(keys.map(|key| fuzzing::row_key(&parts(key))).collect())
            }
            Form::Hashed(secret, hashes) => {
                let hex = |hash: &[u8; 16]| hash.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
                let hash = |hash| fuzzing::hash_from_hex(&hex(hash)).expect("32 digits");
                fuzzing::hashed_rows(secret, hashes.iter().map(hash).collect())
            }
        };
        let columns = self.columns.iter().map(|(column, values)| (column.clone(), parts(values)));
        fuzzing::change(self.table.clone(), rows, columns.collect(), self.xid)
    }
}

pub fn run(input: &Input) {
    let payload = to_payload(&input.change(Part::part));
    match parse(&payload) {
        Parsed::Change(read) if input.table.is_some() || read.rows == Rows::All => {
            assert_eq!(read, input.change(Part::received), "{payload}");
        }
        // Keys of no table are a change of everything.
        Parsed::Unreadable(None) if input.table.is_none() => {}
        _ => panic!("{payload} is read as something else"),
    }

    let mut object: Value = serde_json::from_str(&payload).expect("JSON");
    let fields = object.as_object_mut().expect("an object");
    match &input.damage {
        Damage::Field(name, kind) => {
            if fields.contains_key(name) || ["t", "x", "c", "all", "f"].contains(&name.as_str()) {
                return;
            }
            let value = [Value::from(1), Value::from("a"), Value::from(vec![1]), Value::from(true)];
            fields.insert(name.clone(), value[usize::from(kind % 4)].clone());
        }
        Damage::Version(version) if *version != 1 => drop(fields.insert("v".into(), (*version).into())),
        Damage::Version(_) => return,
        Damage::Without(n) => {
            let needed: Vec<_> =
                ["v", "k", "i", "h", "all"].into_iter().filter(|it| fields.contains_key(*it)).collect();
            fields.remove(needed[usize::from(*n) % needed.len()]);
        }
    }
    match parse(&object.to_string()) {
        Parsed::Unreadable(table) => assert_eq!(table, input.table, "{object}"),
        _ => panic!("{object} is read as if nothing had happened to it"),
    }
}
