//! Faults of the channel: too many messages, wrong ones, and a listener that does not move on.

use anyhow::Result;
use rand::{Rng as _, rngs::StdRng};

use super::{Done, Shows, hold};
use crate::verify::torture::{table::Place, world::World};

/// Third parties: one holds up the queue, another one fills it. What is sent cannot be read by a node, and is more than it lets wait.
pub(super) async fn flood(world: &World, rng: &mut StdRng) -> Result<Done> {
    let (blocker, sender) = (world.client().await?, world.client().await?);
    blocker.batch_execute("listen something; begin; select 1").await?;
    let count = rng.random_range(200..1500_u32);
    let channel = if rng.random_bool(0.8) { "rowcache" } else { "of_others" };
    sender
        .batch_execute(&format!(
            "do $$ begin for n in 1..{count} loop perform pg_notify('{channel}', repeat('x', 7900) || n); end loop; end $$"
        ))
        .await?;
    hold(rng, 200..800).await;
    blocker.batch_execute("rollback; unlisten *").await?;
    let shows = if channel == "rowcache" { Shows::Unreadable } else { Shows::Itself(true) };
    Done::new(format!("{count} messages on `{channel}`"), shows)
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
    Done::new(format!("{sent} messages on {} channels", channels.len().max(1)), Shows::Unreadable)
}
