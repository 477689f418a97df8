//! The mutants of views.

use super::table::{
    Catcher::{Test, Unit},
    Mutant,
};

pub(super) const MUTANTS: &[Mutant] = &[
    Mutant {
        name: "view-doubt",
        protection: "a cache is in doubt with each of its tables (I3, X21)",
        file: "src/tables.rs",
        text: "        self.tables(by_name).all(|table| table.suspect.is_none())",
        instead: "        self.tables(by_name).any(|table| table.suspect.is_none())",
        catchers: &[Test("views", "a_view_is_in_doubt")],
    },
    Mutant {
        name: "view-resume",
        protection: "only what the log tells all of is served again after a gap (I3)",
        file: "src/tables.rs",
        text: "self.tables(by_name).all(|table| table.trust.via == Via::Log)",
        instead: "self.tables(by_name).any(|table| table.trust.via == Via::Log)",
        catchers: &[Test("log", "a_view_is_resumed_if")],
    },
    Mutant {
        name: "view-unsent",
        protection: "a message without a column that a view depends on evicts all of it (I1)",
        file: "src/tables.rs",
        text: "Column::Sent(name) => change.columns.get(name)?.iter().collect(),",
        instead: "Column::Sent(name) => change.columns.get(name).into_iter().flatten().collect(),",
        catchers: &[Test("views", "one_node_asks_all"), Unit("keys_of_a_view")],
    },
    Mutant {
        name: "view-combinations",
        protection: "values that come apart are combined in all ways (I1)",
        file: "src/tables.rs",
        text: "combined.iter().flat_map(|parts| values.iter().map(move |value| longer(parts, value))).collect();",
        instead: "combined.iter().zip(&values).map(|(parts, value)| longer(parts, value)).collect();",
        catchers: &[Test("views", "keys_of_several"), Unit("keys_of_a_view")],
    },
    Mutant {
        name: "view-too-many",
        protection: "more combinations than can be gone through evict all of a view (I1)",
        file: "src/tables.rs",
        text: "            return None;\n        }\n        let longer",
        instead: "            break;\n        }\n        let longer",
        catchers: &[Unit("keys_of_a_view")],
    },
    Mutant {
        name: "view-any",
        protection: "any change of a table named with `on_any` evicts all of a view (I1)",
        file: "src/tables.rs",
        text: "            (Self::Any, _) | (_, Rows::All) | (Self::Columns(_), Rows::Hashed { .. }) => Touched::All,",
        instead: "            (Self::Any, _) => Touched::Keys((&[]).into()),\n            \
             (_, Rows::All) | (Self::Columns(_), Rows::Hashed { .. }) => Touched::All,",
        catchers: &[Test("views", "each_change_evicts"), Unit("keys_of_a_view")],
    },
    Mutant {
        name: "view-snapshot",
        protection: "all statements of a loader see the database at one moment",
        file: "src/postgres/built.rs",
        text: "begin isolation level repeatable read read only;",
        instead: "begin isolation level read committed read only;",
        catchers: &[Test("views", "what_a_loader_reads")],
    },
    Mutant {
        name: "view-old-snapshot",
        protection: "what may be from a snapshot before the load is not kept (X31)",
        file: "src/postgres/built.rs",
        text: "is distinct from 'true' as dirty",
        instead: "is null as dirty",
        catchers: &[Test("views", "what_may_be_from_an_old")],
    },
    Mutant {
        name: "view-read-only",
        protection: "a loader cannot write (X14)",
        file: "src/postgres/built.rs",
        text: "repeatable read read only;",
        instead: "repeatable read;",
        catchers: &[Test("views", "a_loader_cannot_write")],
    },
    Mutant {
        name: "view-other-tables",
        protection: "a view of the same name and other tables is another view",
        file: "src/node.rs",
        text: "        if !is_new && shared",
        instead: "        if false && !is_new && shared",
        catchers: &[Test("views", "what_cannot_be_watched")],
    },
];
