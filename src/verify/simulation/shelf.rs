//! A tier that keeps all that was ever put into it, and gives back what chance will have it give: of this name or another one, of now or
//! of long ago, whole or damaged, soon, late or never.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use tokio::time::sleep;

use super::{
    node::{Item, TABLE},
    source::SimSource,
    world::World,
};
use crate::{
    shared::Shared,
    source::Source,
    store::Store,
    tier::{Answer, Asked, Form, Found, Settings, Shelf, Tier, Tiered},
    values::Json,
    verify::history::Key,
};

/// Whatever was put under each name, the latest last.
pub(super) type Put = BTreeMap<String, Vec<Vec<u8>>>;

struct SimShelf(Arc<World>);

/// The longest that it takes; some answers take longer, and are failures.
const SLOWEST: u64 = 20;

/// How nodes load, by way of a tier.
pub(super) fn before(
    world: &Arc<World>,
    behind: SimSource,
    store: &Arc<Store<Key, Item>>,
    shared: &Arc<Shared>,
) -> Arc<dyn Source<Key, Item>> {
    Arc::new(Tiered {
        tier: Tier::on(Arc::new(SimShelf(Arc::clone(world)))).patience(Duration::from_millis(SLOWEST)),
        form: Arc::new(Form::of::<Json>()),
        behind: Arc::new(behind),
        store: Arc::clone(store),
        shared: Arc::clone(shared),
        name: TABLE.into(),
        complaints: crate::sync::Mutex::default(),
    })
}

impl SimShelf {
    fn find(&self, asked: &Asked) -> Found {
        let mut inner = self.0.lock();
        let inner = &mut *inner;
        let dice = &mut inner.dice;
        let put = &inner.shelf;
        let of_name = put.get(&asked.name).map_or(&[][..], Vec::as_slice);
        let found = match dice.below(20) {
            0 => return Found::Awaited,
            1 => None,
            // Of any name, at any time.
            2 if !put.is_empty() => {
                let names = put.values().nth(dice.below(put.len())).expect("as many");
                Some(dice.below(names.len())).map(|n| names[n].clone())
            }
            3 => of_name.last().map(|row| {
                let mut row = row.clone();
                let at = dice.below(row.len());
                row[at] ^= 1;
                row
            }),
            4..10 if !of_name.is_empty() => Some(of_name[dice.below(of_name.len())].clone()),
            _ => of_name.last().cloned(),
        };
        found.map_or(Found::Nothing, Found::Bytes)
    }
}

impl Shelf for SimShelf {
    fn take<'a>(&'a self, asked: &'a [Asked], _: &'a Settings) -> Answer<'a, Vec<Found>> {
        Box::pin(async move {
            self.0.pause(SLOWEST / 4).await;
            let fails = self.0.roll(|dice| dice.once_in(50));
            let found = asked.iter().map(|asked| self.find(asked)).collect();
            self.0.pause(SLOWEST / 4).await;
            if fails {
                sleep(Duration::from_millis(SLOWEST)).await;
                return Err("the simulation lets it fail".into());
            }
            Ok(found)
        })
    }

    fn ping(&self) -> Answer<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn put<'a>(&'a self, rows: &'a [(String, Vec<u8>)], _: &'a Settings) -> Answer<'a, ()> {
        Box::pin(async move {
            self.0.pause(SLOWEST).await;
            let mut inner = self.0.lock();
            for (name, row) in rows {
                inner.shelf.entry(name.clone()).or_default().push(row.clone());
            }
            Ok(())
        })
    }
}

impl fmt::Display for SimShelf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a simulated tier")
    }
}
