//! Who reads: on every node, at every level of freshness, with tokens of whichever writer.

use std::{sync::Arc, time::Duration};

use tokio::time::timeout;

use super::{
    database::Number,
    node::{Item, SimNode},
    trace::What,
    transaction::any_key,
    world::World,
};
use crate::{
    error::Result,
    freshness::{Fallback, Freshness},
    store::Cached,
    table::Lookup,
    token::Token,
    verify::history::{Key, Mode, Read, Time},
};

/// No read takes longer, whatever happens.
const READ_MAX: Duration = Duration::from_secs(20);

/// One way to read.
#[derive(Clone, Copy, Debug)]
enum Ask {
    Get,
    TryGet,
    Peek,
    Many,
    Snapshot,
    Within(Duration),
    Fenced,
    AtLeast(Token, Number),
    Any,
}

impl Ask {
    fn name(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::TryGet => "try_get",
            Self::Peek => "peek",
            Self::Many => "get_many",
            Self::Snapshot => "snapshot",
            Self::Within(_) => "Within",
            Self::Fenced => "Fenced",
            Self::AtLeast(..) => "AtLeast",
            Self::Any => "Any",
        }
    }

    fn mode(self) -> Mode {
        match self {
            Self::Get | Self::TryGet | Self::Peek | Self::Many | Self::Snapshot => Mode::Coherent,
            Self::Within(limit) => Mode::Within(limit),
            Self::Fenced => Mode::Fenced,
            Self::AtLeast(_, number) => Mode::AtLeast(number),
            Self::Any => Mode::Any,
        }
    }
}

/// Reads until reading ends.
pub(super) async fn read(world: Arc<World>, node: Arc<SimNode>) {
    while world.lock().reading {
        world.pause(12).await;
        let (ask, keys, patience) = plan(&world);
        let before = Standing::of(&world, &node);
        let start = world.stamp();
        world.note(Some(node.id), What::ReadStarts { key: keys[0], mode: ask.name() });
        let limit = patience.unwrap_or(READ_MAX);
        let read = timeout(limit, answer(&node, ask, &keys)).await;
        let end = world.stamp();
        let rows = match read {
            Ok(rows) => rows,
            Err(_) if patience.is_some() => {
                world.count("cancelled caller");
                continue;
            }
            Err(_) => {
                world.found(node.id, keys[0], format!("a {} did not end within {READ_MAX:?}", ask.name()));
                continue;
            }
        };
        let after = Standing::of(&world, &node);
        note(&world, &node, ask, &keys, (start, end), rows, [before, after]);
    }
}

fn plan(world: &World) -> (Ask, Vec<Key>, Option<Duration>) {
    let mut inner = world.lock();
    let inner = &mut *inner;
    let ask = match inner.dice.below(20) {
        0..8 => Ask::Get,
        8 => Ask::TryGet,
        9 => Ask::Peek,
        10 => Ask::Many,
        11..13 => Ask::Snapshot,
        13..15 => Ask::Within(Duration::from_millis(inner.dice.pick(&[0, 5, 50, 150, 400, 900]))),
        15..17 => Ask::Fenced,
        17 => Ask::Any,
        _ => match inner.tokens.len() {
            0 => Ask::Fenced,
            n => {
                let (token, number) = inner.tokens[inner.dice.below(n)];
                Ask::AtLeast(token, number)
            }
        },
    };
    let n = if matches!(ask, Ask::Many | Ask::Snapshot) { inner.dice.between(2, 4) } else { 1 };
    let keys = if let (Ask::AtLeast(_, number), true) = (ask, inner.dice.once_in(2)) {
        // A row that this transaction wrote.
        let write = inner.writes_of.get(&number).and_then(|writes| writes.first());
        let key = write.map(|write| inner.history.writes[*write].key);
        vec![key.unwrap_or_else(|| any_key(inner))]
    } else {
        (0..n).map(|_| any_key(inner)).collect()
    };
    let cancelled = inner.dice.once_in(12).then(|| Duration::from_millis(inner.dice.between(0, 8)));
    (ask, keys, cancelled)
}

async fn answer(node: &SimNode, ask: Ask, keys: &[Key]) -> Result<Option<Vec<Option<Cached<Item>>>>> {
    let table = &node.table;
    let known = |lookup| match lookup {
        Lookup::Row(row) => Some(vec![Some(row)]),
        Lookup::Absent => Some(vec![None]),
        Lookup::Unknown => None,
    };
    let one = |row| Some(vec![row]);
    match ask {
        Ask::Get => table.get(&keys[0]).await.map(one),
        Ask::TryGet => Ok(known(table.try_get(&keys[0]))),
        Ask::Peek => Ok(known(table.peek(&keys[0]))),
        Ask::Many => table.get_many(keys).await.map(Some),
        Ask::Snapshot => table.snapshot(keys).await.map(Some),
        Ask::Within(limit) => table.get_with(&keys[0], Freshness::Within(limit)).await.map(one),
        Ask::Fenced => table.get_with(&keys[0], Freshness::Fenced).await.map(one),
        Ask::AtLeast(token, _) => table.get_with(&keys[0], Freshness::AtLeast(token)).await.map(one),
        Ask::Any => table.get_with(&keys[0], Freshness::Any).await.map(one),
    }
}

/// How a node stands at one moment.
#[derive(Clone, Copy)]
struct Standing {
    serves: bool,
    follows: bool,
    split: bool,
    gaps: u64,
}

impl Standing {
    fn of(world: &World, node: &SimNode) -> Self {
        let mut inner = world.lock();
        Self {
            serves: node.table.store.is_coherent(),
            follows: inner.follows_primary(node),
            split: inner.was_split(world.now()),
            gaps: node.shared.look(|it| it.gaps()),
        }
    }
}

type Rows = Result<Option<Vec<Option<Cached<Item>>>>>;

fn note(
    world: &World,
    node: &SimNode,
    ask: Ask,
    keys: &[Key],
    (start, end): (Time, Time),
    rows: Rows,
    [before, after]: [Standing; 2],
) {
    let failed = rows.is_err();
    let Ok(Some(rows)) = rows else {
        let (key, mode) = (keys[0], ask.name());
        world.note(Some(node.id), What::ReadEnds { key, mode, seen: None, failed });
        return;
    };
    *world.lock().reads.entry(ask.name()).or_default() += 1;
    // While two servers pass for the primary, a node that does not follow the true one, or nobody, cannot know (A2).
    let cannot_know = (before.split || after.split) && !(before.follows && after.follows && before.gaps == after.gaps);
    let old_will_do = matches!(node.setup.fallback, Fallback::ServeStale { .. }) && !before.serves;
    let mode = if old_will_do && ask.mode() == Mode::Coherent { Mode::Any } else { ask.mode() };
    let snapshot = matches!(ask, Ask::Snapshot).then_some(start);
    for (key, row) in keys.iter().zip(rows) {
        let seen = row.as_deref().map(Item::version);
        world.note(Some(node.id), What::ReadEnds { key: *key, mode: ask.name(), seen, failed });
        if cannot_know {
            continue;
        }
        served_what_was_heard(world, node, *key);
        let loaded = row.as_deref().map(Item::loaded);
        let read = Read { node: node.id, key: *key, mode, start, end, seen, loaded, snapshot };
        world.lock().history.reads.push(read);
    }
}

/// What is held was read from the server that the node listens to.
fn served_what_was_heard(world: &World, node: &SimNode, key: Key) {
    let Lookup::Row(held) = node.table.peek(&key) else { return };
    let read = world.lock().servers[held.server()].incarnation;
    if node.shared.look(|it| it.incarnation()) != Some(read) {
        world.found(node.id, key, "an entry is from another server than the one that is listened to");
    }
}
