//! A deterministic simulation: many real nodes in one thread, with a database, a network and a clock that are not real.
//!
//! ```text
//! seed ─→ dice ─→ which task goes on, how long things take, what breaks, who reads and writes what
//!          nodes: the real keeper, lines, relay, inbox, applier, tables, store, loads, freshness
//!          world: servers with transactions, log and queue (`database`), reached by lines (`channel`) and loads (`source`)
//!          ─→ history ─→ the checker of `verify`; and what only a simulation can see (`quiet`, `source`)
//! ```
//!
//! `docs/simulation.md` says what is simulated and what is not.

mod campaign;
mod channel;
mod database;
mod dice;
mod executor;
mod faults;
mod node;
mod quiet;
mod readers;
mod run;
mod shelf;
mod source;
mod trace;
mod transaction;
mod world;

pub use campaign::{Simulate, simulate};

#[cfg(all(test, not(shuttle)))]
mod tests;
