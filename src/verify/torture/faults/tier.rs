//! Faults of the tier: it forgets, is gone, hangs, or comes back as it was some time ago.

use anyhow::Result;
use rand::{Rng as _, rngs::StdRng};

use super::{Done, Shows, hold};
use crate::verify::torture::world::World;

pub(super) async fn disturb(world: &mut World, rng: &mut StdRng) -> Result<Done> {
    let now = world.now();
    let Some(redis) = &mut world.redis else { return Ok(Done::new("there is none", Shows::Itself(true))) };
    Ok(match rng.random_range(0..5) {
        0 => {
            redis.ask::<String>(&["FLUSHALL"]).await?;
            Done::new("flushed", Shows::Itself(true))
        }
        1 => {
            redis.kill().await?;
            hold(rng, 300..1500).await;
            redis.run().await?;
            Done::new("killed", Shows::Tier)
        }
        2 => {
            redis.freeze(true)?;
            hold(rng, 300..1500).await;
            redis.freeze(false)?;
            Done::new("stopped for a while", Shows::Tier)
        }
        _ => {
            // What was in it in another episode, perhaps under another server: rows of long ago.
            let old = world.dump.take();
            let (saved_at, dump) = match old {
                Some(old) => old,
                None => (now, redis.save().await?),
            };
            hold(rng, 300..1500).await;
            world.dump = Some((now, redis.save().await?));
            redis.restore(&dump).await?;
            hold(rng, 1200..2000).await;
            Done::new(format!("restored as it was {} ms ago", (now.saturating_sub(saved_at)) / 1_000_000), Shows::Tier)
        }
    })
}
