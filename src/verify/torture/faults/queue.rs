//! Faults of the channel: too many messages, wrong ones, and a listener that does not move on.

use anyhow::Result;
use rand::{Rng as _, rngs::StdRng};

use super::{Done, Shows, hold};
use crate::verify::torture::{
    plan::{Plan, Step},
    table::Place,
    world::World,
    writer::transact,
};

/// Third parties: one holds up the queue, another one fills it, with more than a node lets wait. Among it is a change.
pub(super) async fn flood(world: &mut World, rng: &mut StdRng) -> Result<Done> {
    let (blocker, sender) = (world.client().await?, world.client().await?);
    blocker.batch_execute("listen something; begin; select 1").await?;
    let place = Place::any(rng);
    let mut sent = 0;
    for _ in 0..4 {
        let count = rng.random_range(100..500_u32);
        let mut plan = Plan::of(place, Step::Notify(count));
        plan.steps.extend([(Step::Update(place.draw_some(rng, 12)), false), (Step::Notify(count), false)]);
        // It failed, if somebody waited for the same locks.
        if let Ok(attempt) = transact(&sender, &plan, world.origin).await {
            sent += 2 * count;
            world.timeline.incidents.wrote.push(attempt);
        }
    }
    hold(rng, 100..500).await;
    blocker.batch_execute("rollback; unlisten *").await?;
    Ok(Done::new(format!("{sent} messages"), Shows::Overflow))
}

/// Messages that anybody can send. They can only make a node forget.
pub(super) async fn forge(world: &World, rng: &mut StdRng) -> Result<Done> {
    let client = world.client().await?;
    let channels: Vec<String> = client
        .query(
            "select distinct found[1] from pg_stat_activity, regexp_matches(query, 'rowcache[a-z0-9_-]*', 'g') found
             where query ilike 'listen%'",
            &[],
        )
        .await?
        .iter()
        .filter_map(|row| row.get(0))
        .collect();
    let mut sent = 0;
    for _ in 0..rng.random_range(20..60) {
        let place = Place::any(rng);
        let (table, key, xid) = (place.name, place.draw(rng), rng.random_range(1..700_u32));
        let payload = match rng.random_range(0..8_u32) {
            0 => "nonsense".to_owned(),
            1 => String::new(),
            2 => format!(r#"{{"v":1,"t":"{table}","x":{xid},"k":[{key}]}}"#),
            3 => format!(r#"{{"v":1,"t":"{table}","k":["{key}"]}}"#),
            4 => format!(r#"{{"v":1,"t":"{table}","all":true}}"#),
            5 => format!(r#"{{"v":2,"t":"{table}","x":{xid},"k":[{key}]}}"#),
            6 => r#"{"v":1,"f":"00000000-0000-4000-8000-000000000000","s":"1:9999999999:","l":9999999999}"#.to_owned(),
            _ => format!(r#"{{"v":1,"t":"{table}","k":[{key}],"later":1}}"#),
        };
        let mut targets = vec!["rowcache".to_owned()];
        targets.extend(channels.iter().cloned());
        let channel = &targets[rng.random_range(0..targets.len())];
        // In the name of transactions from before ours: who believed it that one of ours was applied would be checked by a lie.
        sent += client.execute("select pg_notify($1, $2)", &[channel, &payload]).await?;
    }
    hold(rng, 100..400).await;
    Ok(Done::new(format!("{sent} messages on {} channels", channels.len().max(1)), Shows::Unreadable))
}
