//! Which entries of a cache depend on which rows, and so which keys a message makes it forget.

use std::{borrow::Cow, collections::BTreeSet, sync::Arc};

use crate::{
    change::{Change, RowKey, Rows},
    hashed::KeyHash,
    key::KeyPart,
    tags::{self, Tag},
};

/// Which entries of a cache depend on a row of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum By {
    /// The one whose key is the row's: of a cache of that table.
    Key,
    /// Those whose key is in these columns, now or before.
    Columns(Vec<Column>),
    /// Those that are tagged with the row.
    Tagged,
    /// All of them.
    Any,
}

/// Where a message has the values of a column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Column {
    /// They are this part of each key.
    Key(usize),
    /// They are sent along under this name.
    Sent(String),
}

/// Which of a change's rows a cache must forget.
pub(crate) enum Touched<'a> {
    Keys(Cow<'a, [RowKey]>),
    Hashed(&'a str, &'a [KeyHash]),
    Tags(Vec<Tag>),
    /// It cannot be told.
    All,
}

/// Keys that are made of one message at most. It has some thousand values; two columns that are not part of the table's key can
/// make a product of that.
const KEYS_MAX: usize = 10_000;

impl By {
    /// Of a change of a table that the cache depends on in this way.
    pub(crate) fn touched<'a>(&self, change: &'a Change) -> Touched<'a> {
        match (self, &change.rows) {
            (Self::Any, _) | (_, Rows::All) | (Self::Columns(_) | Self::Tagged, Rows::Hashed { .. }) => Touched::All,
            (Self::Key, Rows::Keys(keys)) => match tags::named(change) {
                Some(tags) if keys.is_empty() => Touched::Tags(tags),
                _ => Touched::Keys(keys.into()),
            },
            (Self::Tagged, Rows::Keys(keys)) => {
                let table: Arc<str> = change.table.as_deref().unwrap_or_default().into();
                Touched::Tags(keys.iter().map(|key| Tag::of_row(&table, key)).collect())
            }
            (Self::Key, Rows::Hashed { secret, hashes }) => Touched::Hashed(secret, hashes),
            (Self::Columns(columns), Rows::Keys(keys)) => {
                made_of(columns, keys, change).map_or(Touched::All, |keys| Touched::Keys(keys.into()))
            }
        }
    }
}

/// The keys that these columns have in the rows of a change. `None`: that cannot be told, or is too much.
///
/// Values of columns that are not part of the table's key come without a hint of which belong to the same row. So all
/// combinations are taken: more than there are, never less.
fn made_of(columns: &[Column], keys: &[RowKey], change: &Change) -> Option<Vec<RowKey>> {
    let places: Option<Vec<usize>> =
        columns.iter().map(|column| if let Column::Key(place) = column { Some(*place) } else { None }).collect();
    if let Some(places) = places {
        let part = |key: &RowKey, place: usize| key.parts().get(place).cloned();
        let made = |key| places.iter().map(|place| part(key, *place)).collect::<Option<Vec<_>>>();
        return keys.iter().map(|key| made(key).map(|parts| RowKey::new(&parts))).collect();
    }
    let mut combined: Vec<Vec<KeyPart<'static>>> = vec![Vec::new()];
    for column in columns {
        let values: BTreeSet<&KeyPart<'static>> = match column {
            Column::Key(place) => keys.iter().map(|key| key.parts().get(*place)).collect::<Option<_>>()?,
            Column::Sent(name) => change.columns.get(name)?.iter().collect(),
        };
        if combined.len() * values.len() > KEYS_MAX {
            return None;
        }
        let longer = |parts: &Vec<_>, value: &KeyPart<'static>| parts.iter().cloned().chain([value.clone()]).collect();
        combined = combined.iter().flat_map(|parts| values.iter().map(move |value| longer(parts, value))).collect();
    }
    Some(combined.iter().map(|parts| RowKey::new(parts)).collect())
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn ints<const N: usize>(parts: [i64; N]) -> RowKey {
        RowKey::new(&parts.map(KeyPart::Int))
    }

    fn keys(by: &By, change: &Change) -> Option<Vec<RowKey>> {
        match by.touched(change) {
            Touched::Keys(keys) => Some(keys.into_owned()),
            Touched::Hashed(..) | Touched::Tags(_) => panic!("it has keys"),
            Touched::All => None,
        }
    }

    #[test]
    fn keys_of_a_view_are_made_of_what_messages_have() {
        let change = Change {
            table: Some("public.orders".into()),
            rows: Rows::Keys(vec![ints([1, 10]), ints([2, 10]), ints([1, 10])]),
            columns: BTreeMap::from([
                ("user_id".to_owned(), [7, 8].map(KeyPart::Int).to_vec()),
                ("nobody".to_owned(), vec![]),
                ("all".to_owned(), (0..5001).map(KeyPart::Int).collect()),
            ]),
            xid: None,
        };
        let sent = |name: &str| Column::Sent(name.to_owned());
        for (columns, made) in [
            // Pairs that belong together stay together.
            (vec![Column::Key(1), Column::Key(0)], Some(vec![ints([10, 1]), ints([10, 2]), ints([10, 1])])),
            (vec![Column::Key(0)], Some(vec![ints([1]), ints([2]), ints([1])])),
            (vec![sent("user_id")], Some(vec![ints([7]), ints([8])])),
            (vec![Column::Key(0), sent("user_id")], Some(vec![ints([1, 7]), ints([1, 8]), ints([2, 7]), ints([2, 8])])),
            (vec![sent("nobody")], Some(vec![])),
            (vec![sent("user_id"), sent("nobody")], Some(vec![])),
            (vec![sent("all"), sent("nobody")], Some(vec![])),
            (vec![sent("all"), sent("user_id")], None),
            (vec![sent("unsent")], None),
            (vec![Column::Key(2)], None),
            (vec![Column::Key(2), sent("user_id")], None),
        ] {
            assert_eq!(keys(&By::Columns(columns.clone()), &change), made, "{columns:?}");
        }
        assert_eq!(keys(&By::Any, &change), None);
        assert_eq!(keys(&By::Key, &change).map(|keys| keys.len()), Some(3));
        let all = Change { rows: Rows::All, ..change };
        assert_eq!(keys(&By::Columns(vec![sent("user_id")]), &all), None);
    }
}
