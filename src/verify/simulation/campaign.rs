//! Many seeds, one after the other, and what they add up to.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Args;

use super::{
    faults::Fault,
    run::{self, Outcome, Size},
};
use crate::verify::checker::Report;

/// What to simulate.
#[derive(Args, Clone, Debug)]
pub struct Simulate {
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How many seeds, one after the other.
    #[arg(long, default_value_t = 1, conflicts_with = "minutes")]
    seeds: u64,
    /// Seeds for this long, and at least one.
    #[arg(long)]
    minutes: Option<f64>,
    /// Nodes in each run.
    #[arg(long, default_value_t = 3)]
    nodes: u32,
    /// Steps of each run, after which its faults end.
    #[arg(long, default_value_t = 20_000)]
    steps: u64,
    /// Print everything that happens.
    #[arg(long)]
    trace: bool,
    /// Go on after a violation.
    #[arg(long)]
    keep_going: bool,
}

/// A campaign this long must have seen every fault, every level, and every rule of the checker.
const ALL_SEEN_AFTER: u64 = 300;

/// Levels of freshness, and calls.
const READS: [&str; 9] = ["get", "try_get", "peek", "get_many", "snapshot", "Within", "Fenced", "AtLeast", "Any"];

/// What must have happened, apart from the faults that are listed.
const EVENTS: [&str; 36] = [
    "row taken from the tier",
    "row of the tier that was too old",
    "row of the tier that was none",
    "key that another node was loading",
    "tier that did not answer",
    "row served again after a gap",
    "node that does not listen",
    "poll that found something",
    "gap",
    "handoff",
    "overflow",
    "unreadable message",
    "eviction",
    "voided load",
    "uncached load",
    "joined load",
    "stale hit",
    "refilled row",
    "row read again",
    "expired entry",
    "clear",
    "failed load",
    "slow load",
    "failed connect",
    "stuck commit",
    "cancelled caller",
    "fence that waited too long",
    "load of a replaced server",
    "lost commit",
    "write of one row",
    "write of several rows",
    "savepoint rolled back",
    "transaction rolled back",
    "change of a key",
    "bulk update",
    "truncate",
];

/// What the seeds so far add up to.
#[derive(Default)]
struct Sum {
    seeds: u64,
    steps: u64,
    report: Report,
    counts: BTreeMap<&'static str, u64>,
    reads: BTreeMap<&'static str, u64>,
    violated: u64,
}

impl Sum {
    fn add(&mut self, outcome: Outcome) {
        self.seeds += 1;
        self.steps += outcome.steps;
        self.report.absorb(outcome.report);
        self.violated += u64::from(!outcome.violations.is_empty());
        for (what, n) in outcome.counts {
            *self.counts.entry(what).or_default() += n;
        }
        for (what, n) in outcome.reads {
            *self.reads.entry(what).or_default() += n;
        }
    }

    /// What a campaign of this length must have seen, and has not.
    fn missing(&self) -> Vec<&'static str> {
        if self.seeds < ALL_SEEN_AFTER {
            return Vec::new();
        }
        let faults =
            Fault::ALL.into_iter().map(Fault::name).chain(EVENTS).filter(|name| !self.counts.contains_key(name));
        faults.chain(READS.into_iter().filter(|name| !self.reads.contains_key(name))).collect()
    }

    fn text(&self, took: Duration) -> String {
        let mut text = String::new();
        let seconds = took.as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
        let rate = self.steps as f64 / seconds.max(1e-9);
        let _ = writeln!(text, "seeds      {}", self.seeds);
        let _ = writeln!(text, "steps      {} in {seconds:.1} s, {rate:.0} a second", self.steps);
        let _ = writeln!(text, "reads      {}", listed(&self.reads));
        let _ = writeln!(text, "happened   {}", listed(&self.counts));
        let tried: BTreeMap<_, _> = self.report.tried.iter().map(|(rule, n)| (format!("{rule:?}"), *n)).collect();
        let _ = writeln!(text, "checked    {} reads; {}", self.report.reads, listed(&tried));
        let _ = writeln!(text, "violated   {} seeds", self.violated);
        text
    }
}

fn listed<K: AsRef<str>>(counts: &BTreeMap<K, u64>) -> String {
    counts.iter().map(|(what, n)| format!("{} {n}", what.as_ref())).collect::<Vec<_>>().join(", ")
}

/// Runs a campaign, prints what came of it, and fails if anything was violated or nothing was tried.
#[must_use]
pub fn simulate(what: &Simulate) -> ExitCode {
    let began = Instant::now();
    let size = Size { nodes: what.nodes.max(1), steps: what.steps, traced: what.trace };
    let enough = |seeds: u64| match what.minutes {
        Some(minutes) => began.elapsed().as_secs_f64() >= minutes * 60.0 && seeds > 0,
        None => seeds >= what.seeds,
    };
    let mut sum = Sum::default();
    while !enough(sum.seeds) {
        let seed = what.seed.wrapping_add(sum.seeds);
        let outcome = run::run(seed, size);
        for line in &outcome.trace {
            println!("{line}");
        }
        if let Some(first) = outcome.violations.first() {
            println!("seed {seed}: {} violations, of which this is the first:\n{first}", outcome.violations.len());
            println!("again: rowcache-verify simulate --seed {seed} --nodes {} --steps {}\n", size.nodes, size.steps);
        } else if what.seeds == 1 && what.minutes.is_none() {
            println!("fingerprint {:016x}", outcome.fingerprint);
        }
        sum.add(outcome);
        if sum.violated > 0 && !what.keep_going {
            break;
        }
    }
    print!("{}", sum.text(began.elapsed()));
    let missing = sum.missing();
    if !missing.is_empty() {
        println!("never happened, so that this proves less than it should: {}", missing.join(", "));
    }
    ExitCode::from(u8::from(sum.violated > 0 || !missing.is_empty()))
}
