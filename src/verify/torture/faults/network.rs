//! Faults of the connections of one node.

use std::time::Duration;

use anyhow::Result;
use rand::{Rng as _, rngs::StdRng};

use super::{Done, Shows, choose, hold};
use crate::verify::{
    proxy::{Close, Direction, Flow},
    torture::nodes::{NodeProcess, Nodes},
};

/// Does something to the pool, the line, or both, of one node.
pub(super) async fn disturb(nodes: &mut Nodes, rng: &mut StdRng) -> Result<Done> {
    let n = rng.random_range(0..nodes.all.len());
    let node = &mut nodes.all[n];
    if rng.random_bool(0.3) {
        return one_line(node, rng).await;
    }
    let (to_pool, to_line) = *choose(&[(true, false), (false, true), (false, true), (true, true)], rng).expect("some");
    let kind = rng.random_range(0..6_u32);
    let name = ["stall", "swallow", "delay", "reset", "refuse", "stall one way"][kind as usize];
    for (proxy, wanted) in [(&mut node.pool, to_pool), (&mut node.listener, to_line)] {
        if !wanted {
            continue;
        }
        match kind {
            0 => proxy.set_both(Flow::Stall),
            1 => proxy.set_both(Flow::Swallow),
            2 => proxy.set(Direction::Down, Flow::Delay(Duration::from_millis(rng.random_range(20..600)))),
            3 => proxy.close_all(Close::Rst).await,
            4 => {
                proxy.refuse().await;
                proxy.close_all(Close::Fin).await;
            }
            _ => proxy.set(if rng.random() { Direction::Up } else { Direction::Down }, Flow::Stall),
        }
    }
    hold(rng, 300..3000).await;
    for proxy in [&mut node.pool, &mut node.listener] {
        if kind == 1 {
            // Bytes are missing for good.
            proxy.close_all(Close::Rst).await;
        }
        proxy.set_both(Flow::Pass);
        proxy.accept().await;
    }
    let to = match (to_pool, to_line) {
        (true, true) => "pool and line",
        (true, false) => "pool",
        _ => "line",
    };
    // A short delay need not be noticed, nor a lost connection of the pool.
    let shows = if to_line && matches!(kind, 1 | 3 | 4) { Shows::Line } else { Shows::Itself(true) };
    Ok(Done::new(format!("{name}, {to} of node {}", node.id), shows))
}

/// One LISTEN connection gets nothing more, and then ends. Of two, the other one has what this one lacks.
async fn one_line(node: &NodeProcess, rng: &mut StdRng) -> Result<Done> {
    let lines: Vec<_> = node.listener.connections().into_iter().filter(|it| it.greeted_with("(listener")).collect();
    let Some(line) = choose(&lines, rng) else {
        return Ok(Done::new("there was no line", Shows::Itself(false)));
    };
    line.set(Direction::Down, Flow::Stall);
    hold(rng, 100..1500).await;
    line.close(Close::Rst).await;
    Ok(Done::new(format!("stall and reset, one line of node {}", node.id), Shows::Line))
}
