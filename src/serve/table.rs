//! A table as it is served: rows as JSON, by keys that come as text.

use std::sync::Arc;

use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};

use crate::{
    Node, Table, TableOptions, Token,
    coherence::Boot,
    depends::By,
    error::{Error, Kind, Result},
    hashed::Hashed,
    key::{AnyKey, KeyType},
    open::{Finding, Found, MakeSource, Opener},
    postgres::{
        json_rows::{self, JsonRow, Sent},
        rows::Rows,
    },
    tables::On,
};

/// Which table is to be served, and how.
#[derive(Clone, Debug)]
pub(crate) struct TableSpec {
    /// As in a query: `users`, or `public.users`.
    pub(crate) name: String,
    /// The columns by which rows are asked for; empty: the key.
    pub(crate) by: Vec<String>,
    pub(crate) sent: Sent,
    pub(crate) writable: bool,
    pub(crate) options: TableOptions,
}

/// A table that is served. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Served(Arc<Inner>);

struct Inner {
    path: String,
    relation: String,
    key: Vec<(String, KeyType)>,
    /// Those of the key: each request asks for them.
    types: Vec<KeyType>,
    sent: Sent,
    writable: bool,
    table: Table<AnyKey, JsonRow>,
    node: Node,
}

impl Served {
    /// Opens it.
    pub(crate) async fn open(node: &Node, spec: TableSpec) -> Result<Self> {
        let looked = json_rows::look(&node.postgres.pool, &spec.name, &spec.by, &spec.sent).await?;
        let relation = looked.relation.clone();
        let columns = spec.by.join(",");
        let (path, name) = match &spec.by[..] {
            [] => (relation.clone(), relation.clone()),
            _ => (format!("{relation}:{columns}"), format!("{relation}({columns})")),
        };
        let wanted = TableSpec { name: relation.clone(), ..spec.clone() };
        let find = move |opener| -> Finding<AnyKey, JsonRow> { Box::pin(find(opener, wanted.clone())) };
        let table = node.open(name, spec.options, find).await?;
        let Some(key) = looked.key() else {
            return Err(Error::new(Kind::Table, format!("the key of {relation} has a type that no key can have")));
        };
        Ok(Self(Arc::new(Inner {
            path,
            relation,
            types: key.iter().map(|(_, of)| *of).collect(),
            key,
            sent: spec.sent,
            writable: spec.writable,
            table,
            node: node.clone(),
        })))
    }

    /// What stands for it in a path: `public.users`, or `public.sessions:token`.
    pub(crate) fn path(&self) -> &str {
        &self.0.path
    }

    /// The table's name in messages.
    pub(crate) fn relation(&self) -> &str {
        &self.0.relation
    }

    pub(crate) fn table(&self) -> &Table<AnyKey, JsonRow> {
        &self.0.table
    }

    /// The columns of a key, and their types.
    pub(crate) fn key(&self) -> &[(String, KeyType)] {
        &self.0.key
    }

    /// Keys of it are the ones of the table.
    pub(crate) fn is_keyed(&self) -> bool {
        self.0.path == self.0.relation
    }

    pub(crate) fn sent(&self) -> &Sent {
        &self.0.sent
    }

    pub(crate) fn is_writable(&self) -> bool {
        self.0.writable
    }

    pub(crate) fn types(&self) -> &[KeyType] {
        &self.0.types
    }

    /// Reads a key as it stands in a path or a query: percent-encoded, the parts of a key of several columns apart by commas.
    pub(crate) fn read_key(&self, raw: &str) -> Result<AnyKey, String> {
        let decode = |part| {
            let text = percent_encoding::percent_decode_str(part).decode_utf8();
            text.map_err(|_| "it is not UTF-8".to_owned())
        };
        if self.types().len() == 1 {
            return AnyKey::parse(self.types(), &[decode(raw)?]);
        }
        let parts = raw.split(',').map(decode).collect::<Result<Vec<_>, _>>()?;
        AnyKey::parse(self.types(), &parts)
    }

    /// A key as [`read_key`](Self::read_key) reads it.
    pub(crate) fn show_key(&self, key: &AnyKey) -> String {
        joined(&key.text(self.types()))
    }

    /// Sets columns of a row, in a transaction of its own. `None`: there is no such row.
    pub(crate) async fn update(
        &self,
        key: &AnyKey,
        columns: &serde_json::Map<String, serde_json::Value>,
    ) -> Result<Option<Token>> {
        let Inner { relation, key: by, table, node, .. } = &*self.0;
        let mut transaction = node.begin().await?;
        if !json_rows::update(&mut transaction, relation, by, key, columns).await? {
            return Ok(None);
        }
        transaction.invalidates(table, key);
        transaction.commit().await.map(Some)
    }

    /// The time, by the clock of its node.
    pub(crate) fn now(&self) -> Boot {
        self.0.table.shared().host.now()
    }
}

/// What is cached of a table, as [`Node::table`] or [`Node::table_by`] would, but for what is read of it.
async fn find(opener: Opener, spec: TableSpec) -> Result<Found<AnyKey, JsonRow>> {
    let TableSpec { name, by, sent, options, .. } = spec;
    let (tracked, on, hashed, name) = if by.is_empty() {
        let tracked = opener.tracked::<AnyKey>(&name).await?;
        let on = On { table: tracked.name.clone(), trust: tracked.trust.clone(), by: By::Key };
        let (name, hashed) = (tracked.name.clone(), tracked.secret.clone().map(Hashed::new));
        (tracked, on, hashed, name)
    } else {
        let (tracked, on, _) = opener.by_columns::<AnyKey>(&name, by).await?;
        let name = format!("{}({})", tracked.name, tracked.key_columns.join(","));
        (tracked, on, None, name)
    };
    let from = json_rows::query(&tracked.name, &tracked.key_columns, &sent);
    let source: MakeSource<AnyKey, JsonRow> = Box::new(move |keeps| {
        Arc::new(Rows::<AnyKey, JsonRow>::new(opener.access(&options), &tracked, &from, &[], keeps))
    });
    Ok(Found { name, on: vec![on], hashed, is_tagged: false, source })
}

/// What cannot stand in a segment of a path, or would end it.
const ENCODED: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'"')
    .add(b'#')
    .add(b'%')
    .add(b'/')
    .add(b'<')
    .add(b'>')
    .add(b'?')
    .add(b'\\')
    .add(b'`')
    .add(b'{')
    .add(b'}');

/// As [`ENCODED`], of a part of several.
const ENCODED_PART: &AsciiSet = &ENCODED.add(b',');

/// Parts of a key, as a path has them.
pub(crate) fn joined(parts: &[String]) -> String {
    let set = if parts.len() > 1 { ENCODED_PART } else { ENCODED };
    let parts: Vec<String> = parts.iter().map(|part| utf8_percent_encode(part, set).to_string()).collect();
    parts.join(",")
}
