//! Faults of the server: connections that it ends, crashes, standbys.

use std::time::Duration;

use anyhow::{Context as _, Result};
use rand::{Rng as _, rngs::StdRng};
use tokio::time::{sleep, timeout};
use tokio_postgres::Client;

use super::{Done, Shows, choose, hold, process::backends};
use crate::verify::{
    proxy::Close,
    torture::{
        nodes::Nodes,
        plan::{Plan, Step},
        table::{PLACES, Place},
        wire::PATIENCE,
        world::World,
        writer::{connect, transact},
    },
};

pub(super) async fn terminate(world: &World, nodes: &Nodes, rng: &mut StdRng) -> Result<Done> {
    let id = choose(&nodes.all, rng).context("there are nodes")?.id;
    let (like, which, shows) = match rng.random_range(0..4_u32) {
        0 => (format!("torture {id} (listener%"), "listener", Shows::Line),
        1 => (format!("torture {id} (control%"), "control", Shows::Line),
        2 => (format!("torture {id}"), "pool", Shows::Itself(true)),
        _ => ("torture _%(listener%".to_owned(), "all listeners", Shows::Line),
    };
    let sql = "select count(pg_terminate_backend(pid)) from pg_stat_activity where application_name like $1";
    let ended: i64 = world.client().await?.query_one(sql, &[&like]).await?.get(0);
    hold(rng, 100..1500).await;
    let shows = if ended == 0 { Shows::Itself(false) } else { shows };
    Ok(Done::new(format!("{ended} connections, {which} of node {id}"), shows))
}

pub(super) async fn kill_backend(world: &mut World, rng: &mut StdRng) -> Result<Done> {
    let all = backends(world, "torture%", "pid <> pg_backend_pid() and backend_type = 'client backend'").await?;
    let pid = *choose(&all, rng).context("there are connections")?;
    let client = world.client().await?;
    world.close();
    if world.server.kill_backend(pid).is_err() {
        world.open();
        return Ok(Done::new("it had ended", Shows::Itself(false)));
    }
    // This connection ends with all others; the next one is to a server that has recovered. Until then transactions commit,
    // and are lost.
    let over = async {
        while client.batch_execute("select 1").await.is_ok() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, over).await.context("the server does not notice that a process was killed")?;
    world.until_ready().await?;
    world.begin_era();
    world.open();
    Ok(Done::new("", Shows::Line))
}

pub(super) async fn crash(world: &mut World) -> Result<Done> {
    world.close();
    world.crash().await?;
    world.open();
    Ok(Done::new("", Shows::Line))
}

/// A commit that is not acknowledged, and holds the lock that orders notifications.
pub(super) async fn wait_for_standby(world: &mut World, rng: &mut StdRng) -> Result<Done> {
    let admin = world.client().await?;
    admin.batch_execute("alter system set synchronous_standby_names = 'nobody'").await?;
    admin.batch_execute("select pg_reload_conf()").await?;
    let url = world.server.admin_url();
    let (origin, place) = (world.origin, &PLACES[0]);
    let plan = Plan::of(place, Step::Upsert(place.draw_some(rng, 3)));
    let waiting = tokio::spawn(async move {
        let client = connect(&url, "torture waiting").await?;
        client.batch_execute("set synchronous_commit = on").await?;
        transact(&client, &plan, origin).await
    });
    let waits = async {
        while backends(world, "torture waiting", "wait_event = 'SyncRep'").await.is_ok_and(|found| found.is_empty()) {
            sleep(Duration::from_millis(10)).await;
        }
    };
    let waited = timeout(Duration::from_secs(5), waits).await.is_ok();
    hold(rng, 200..2500).await;
    let how = if rng.random() { "pg_cancel_backend" } else { "pg_terminate_backend" };
    let end = format!("select {how}(pid) from pg_stat_activity where application_name = 'torture waiting'");
    admin.batch_execute(&end).await?;
    admin.batch_execute("alter system reset synchronous_standby_names").await?;
    admin.batch_execute("select pg_reload_conf()").await?;
    let attempt = timeout(PATIENCE, waiting).await.context("a cancelled commit does not end")??;
    // It may have been cancelled before its commit.
    world.timeline.incidents.wrote.extend(attempt);
    Ok(Done::new(format!("then {how}"), Shows::Itself(waited)))
}

/// Split brain: the standby lacks the last commits, and the old primary runs on. First the pools move, or first the lines.
pub(super) async fn promote(world: &mut World, nodes: &Nodes, rng: &mut StdRng) -> Result<Done> {
    // Its files are copied while it is stopped, in good order: nothing is lost, but everybody is disconnected.
    world.close();
    world.former = None;
    let mut standby = world.server.standby().await?;
    world.begin_era();
    world.open();
    let follower = connect(&standby.admin_url(), "torture admin").await?;
    caught_up(&follower).await?;
    hold(rng, 200..800).await;
    follower.batch_execute("alter system set primary_conninfo = ''").await?;
    follower.batch_execute("select pg_reload_conf()").await?;
    let cut = async {
        let sql = "select count(*) from pg_stat_wal_receiver";
        while !follower.query_one(sql, &[]).await.is_ok_and(|row| row.get::<_, i64>(0) == 0) {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, cut).await.context("the standby still follows")?;
    // What is committed from here on will be lost.
    let lost = transact(&world.client().await?, &Plan::of(&PLACES[0], Step::Bulk), world.origin).await;
    world.timeline.incidents.wrote.extend(lost);
    hold(rng, 100..400).await;
    let promoted = world.now();
    standby.promote().await?;
    std::mem::swap(&mut world.server, &mut standby);
    world.former = Some(standby);
    world.timeline.begin_era(world.server.port(), promoted);
    world.timeline.incidents.split = Some((promoted, u64::MAX, world.server.port()));
    world.open();
    let new = transact(&world.client().await?, &Plan::of(Place::any(rng), Step::Bulk), world.origin).await;
    world.timeline.incidents.wrote.extend(new);
    let pools_first: bool = rng.random();
    for first in [true, false] {
        for node in &nodes.all {
            let proxy = if pools_first == first { &node.pool } else { &node.listener };
            proxy.retarget(world.server.port());
            proxy.close_all(Close::Rst).await;
        }
        hold(rng, 300..3000).await;
    }
    let until = world.now();
    world.timeline.incidents.split = Some((promoted, until, world.server.port()));
    Ok(Done::new(if pools_first { "pools move first" } else { "lines move first" }, Shows::Line))
}

async fn caught_up(follower: &Client) -> Result<()> {
    let follows = async {
        let sql = "select count(*) from pg_stat_wal_receiver where status = 'streaming'";
        while !follower.query_one(sql, &[]).await.is_ok_and(|row| row.get::<_, i64>(0) > 0) {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, follows).await.context("the standby does not follow")
}
