//! Tags: what an entry of a view depends on that its loader only finds out while it loads.
//!
//! ```text
//! loader   view:pages 7  →  value, tagged with row 3 of public.plans, and with "prices"
//! changes  public.plans 3        ──→ forgets view:pages 7, and voids its load if it has read the old row
//!          invalidate_tag("prices") ──→ the same, on all nodes
//! ```
//!
//! `store/tags.rs` says why no change is missed.

use std::sync::Arc;

use crate::{
    change::{Change, RowKey, Rows, key_text},
    error::Result,
    key::{Key, KeyPart},
    table::Table,
};

/// Something that an entry of a view depends on: a row of a table, or whatever a name stands for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Tag {
    /// The table; `None`: it is a name.
    table: Option<Arc<str>>,
    /// The key of the row, or the name.
    text: Arc<str>,
}

impl Tag {
    /// The row of this table with this key, whether there is one or not. The table is named as in
    /// [`View::on_tagged`](crate::View::on_tagged), and the key is the one that it is tracked by.
    pub fn row<K: Key>(table: &str, key: &K) -> Self {
        Self { table: Some(table.into()), text: key_text(&key.to_parts()).into() }
    }

    /// Whatever this name stands for: [`Table::invalidate_tag`] says when it has changed.
    #[must_use]
    pub fn named(name: &str) -> Self {
        Self { table: None, text: name.into() }
    }

    /// The row that a message is about.
    pub(crate) fn of_row(table: &Arc<str>, key: &RowKey) -> Self {
        Self { table: Some(Arc::clone(table)), text: key_text(key.parts()).into() }
    }

    /// The table whose row it is.
    pub(crate) fn table(&self) -> Option<&str> {
        self.table.as_deref()
    }
}

impl std::fmt::Display for Tag {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.table {
            Some(table) => write!(f, "{table} {}", self.text),
            None => f.write_str(&self.text),
        }
    }
}

/// What a loader returns of one key: a value, and what it depends on beside its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tagged<V> {
    /// The value.
    pub value: V,
    /// What it depends on. Each costs some hundred bytes, and is not weighed.
    pub tags: Vec<Tag>,
}

impl<V> Tagged<V> {
    /// A value that depends on nothing else yet.
    pub fn new(value: V) -> Self {
        Self { value, tags: Vec::new() }
    }

    /// It depends on this as well.
    #[must_use]
    pub fn tag(mut self, tag: Tag) -> Self {
        self.tags.push(tag);
        self
    }
}

/// Under which messages have the names of tags, beside no keys at all.
const NAMES: &str = "#tag";

/// The names of tags that a message about a view has.
pub(crate) fn named(change: &Change) -> Option<Vec<Tag>> {
    let names = change.columns.get(NAMES)?;
    Some(names.iter().map(|name| Tag::named(&name.to_string())).collect())
}

impl<K: Key, V: Send + Sync + 'static> Table<K, V> {
    /// Forgets the entries of this view that are tagged with this name: on this node before the first await, on all nodes by
    /// notification. For [`View::open_tagged`](crate::View::open_tagged); other caches have no such entries.
    ///
    /// # Errors
    ///
    /// As of [`invalidate`](Self::invalidate).
    ///
    /// # Cancel safety
    ///
    /// As of [`invalidate`](Self::invalidate).
    pub async fn invalidate_tag(&self, name: &str) -> Result<()> {
        self.opened().await?;
        let mut change = Change::requested(self.name(), Rows::Keys(Vec::new()));
        change.columns.insert(NAMES.to_owned(), vec![KeyPart::Text(name.to_owned().into())]);
        let shared = self.shared();
        shared.reclaim(shared.tables.apply(&change));
        shared.broadcast(&change).await
    }
}
