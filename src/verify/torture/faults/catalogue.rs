//! Changes of the tables and their triggers while rows are held and written.

use anyhow::{Context as _, Result};
use rand::{Rng as _, rngs::StdRng};
use tokio_postgres::Client;

use super::{Done, Shows, hold};
use crate::verify::torture::{
    plan::{Plan, Step},
    table::Place,
    world::World,
    writer::transact,
};

/// One change of the catalogue, with a write in the middle of it, which no trigger may tell.
pub(super) async fn change(world: &mut World, rng: &mut StdRng) -> Result<Done> {
    let place = Place::any(rng);
    let name = place.name;
    let track = place.track(world.log_only);
    let client = world.client().await?;
    let what = [
        ("one trigger off and on", format!("alter table {name} disable trigger zz_rowcache_update"), track.clone()),
        ("all triggers off", format!("alter table {name} disable trigger user"), track.clone()),
        ("not tracked for a while", format!("select rowcache.untrack('{name}')"), track),
        (
            "a column came and went",
            format!("alter table {name} add column extra int not null default 7"),
            format!("alter table {name} drop column extra"),
        ),
        (
            "a type changed and changed back",
            format!("alter table {name} alter column pad type varchar(99)"),
            format!("alter table {name} alter column pad type text"),
        ),
        (
            "truncated in replica mode",
            "set session_replication_role = replica".to_owned(),
            "set session_replication_role = default".to_owned(),
        ),
    ];
    let (what, before, after) = &what[rng.random_range(0..what.len())];
    insist(&client, before).await.context("cannot change the table")?;
    let steps =
        [Step::Bulk, Step::Update(place.draw_some(rng, 5)), Step::Delete(place.draw_some(rng, 3)), Step::Truncate];
    for step in &steps[..rng.random_range(1..=steps.len())] {
        if let Ok(attempt) = transact(&client, &Plan::of(place, step.clone()), world.origin).await {
            world.timeline.incidents.wrote.push(attempt);
        }
        hold(rng, 0..400).await;
    }
    insist(&client, after).await.context("cannot change the table back")?;
    Ok(Done::new(format!("{what}, {name}"), Shows::Cleared))
}

/// Tries more than once: writers and loads want the same locks, and a deadlock ends one of them.
async fn insist(client: &Client, sql: &str) -> Result<()> {
    for _ in 0..5 {
        if client.batch_execute(sql).await.is_ok() {
            return Ok(());
        }
    }
    Ok(client.batch_execute(sql).await?)
}
