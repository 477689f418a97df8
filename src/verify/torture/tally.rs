//! What a run amounts to: the closing table, and whether anything was left untried.

use std::collections::BTreeMap;

use super::{
    super::{checker::Report, history::Outcome, history::Write, redis::RedisServer},
    faults::Fault,
    nodes::Notes,
    wire::{Asked, Counts},
};

#[derive(Default)]
pub(super) struct Tally {
    pub(super) report: Report,
    pub(super) episodes: u64,
    pub(super) reads: BTreeMap<&'static str, u64>,
    pub(super) committed: u64,
    pub(super) rolled_back: u64,
    pub(super) lost: u64,
    pub(super) deletions: u64,
    /// How often each fault was survived, and how often it could be seen.
    pub(super) faults: BTreeMap<Fault, (u64, u64)>,
    pub(super) counts: Counts,
    pub(super) lines_lost: u64,
    /// Of one node, in bytes.
    pub(super) memory_max: u64,
    pub(super) recovery_max: std::time::Duration,
    /// What broke no rule of the checker's, and must not be all the same.
    pub(super) wrong: u64,
}

impl Tally {
    pub(super) fn note_reads(&mut self, notes: &Notes) {
        for (_, read) in &notes.reads {
            *self.reads.entry(name(read.asked)).or_default() += 1;
        }
    }

    pub(super) fn note_writes(&mut self, writes: &[Write]) {
        for write in writes.iter().filter(|write| write.ended > 0) {
            match write.outcome {
                Outcome::Committed => self.committed += 1,
                Outcome::RolledBack => self.rolled_back += 1,
                Outcome::Lost { .. } => self.lost += 1,
            }
            self.deletions += u64::from(write.deletes && write.outcome == Outcome::Committed);
        }
    }

    pub(super) fn violations(&self) -> u64 {
        self.report.violated + self.wrong
    }

    /// What never happened, so that nothing was shown about it.
    pub(super) fn untried(&self) -> Vec<String> {
        let counts = &self.counts;
        let tokens = ["at-least", "own"].iter().map(|name| self.reads.get(name).copied().unwrap_or_default()).min();
        let needs_gap = self
            .faults
            .keys()
            .any(|fault| matches!(fault, Fault::KillBackend | Fault::Crash | Fault::Promote | Fault::FreezeListener));
        let mut missing: Vec<String> = [
            ("hits", counts.hits),
            ("evictions", counts.evicted),
            ("voided loads", counts.voided),
            ("fences", counts.fences),
            ("reads of tokens", tokens.unwrap_or_default()),
            ("gaps", if needs_gap { counts.gaps } else { 1 }),
            ("loads around the cache", if needs_gap { counts.uncached } else { 1 }),
            ("old rows", if needs_gap { counts.stale } else { 1 }),
            ("rows of the tier that were taken", if RedisServer::is_installed() { counts.tier_hits } else { 1 }),
            ("deletions", self.deletions),
            ("rolled back writes", self.rolled_back),
        ]
        .into_iter()
        .filter(|(_, count)| *count == 0)
        .map(|(what, _)| format!("there were no {what}"))
        .collect();
        // Once may be bad luck.
        let unseen = self.faults.iter().filter(|(_, (survived, seen))| *survived > 2 && *seen == 0);
        missing.extend(unseen.map(|(fault, (survived, _))| format!("`{fault}` left no mark, {survived} times")));
        missing
    }

    /// The closing table.
    pub(super) fn table(&self) -> String {
        let mut text = String::new();
        let counts = &self.counts;
        let mut line = |what: &str, value: String| text += &format!("{what:<16} {value}\n");
        let list = |map: &BTreeMap<&str, u64>| {
            map.iter().map(|(name, n)| format!("{name} {n}")).collect::<Vec<_>>().join(", ")
        };
        line("reads checked", format!("{}: {}", self.report.reads, list(&self.reads)));
        let (committed, deletions, back, lost) = (self.committed, self.deletions, self.rolled_back, self.lost);
        line(
            "writes",
            format!("{committed} committed ({deletions} deletions), {back} rolled back, {lost} lost in crashes"),
        );
        line(
            "nodes",
            format!(
                "{} hits, {} old rows, {} loads ({} voided, {} not kept, {} failed), {} evicted, {} fences",
                counts.hits,
                counts.stale,
                counts.loads,
                counts.voided,
                counts.uncached,
                counts.failed,
                counts.evicted,
                counts.fences
            ),
        );
        line(
            "",
            format!(
                "{} gaps, {} lines lost or replaced; at most {:.1} s to be coherent again; at most {} MiB",
                counts.gaps,
                self.lines_lost,
                self.recovery_max.as_secs_f64(),
                self.memory_max >> 20
            ),
        );
        line(
            "tier",
            format!(
                "{} rows taken, {} not there or too old, {} asked for in vain",
                counts.tier_hits, counts.tier_refused, counts.tier_failed
            ),
        );
        for (fault, (survived, seen)) in &self.faults {
            line("fault", format!("{fault:<16} {survived:>4} times, seen {seen}"));
        }
        let rules = self.report.tried.iter().map(|(rule, n)| format!("{rule:?} {n}")).collect::<Vec<_>>();
        line("rules tried", rules.join(", "));
        line("violations", self.violations().to_string());
        text
    }
}

fn name(asked: Asked) -> &'static str {
    match asked {
        Asked::Get => "get",
        Asked::GetMany => "get_many",
        Asked::TryGet => "try_get",
        Asked::Snapshot => "snapshot",
        Asked::Within(_) => "within",
        Asked::Fenced => "fenced",
        Asked::Barrier => "after a barrier",
        Asked::AtLeast(_) => "at-least",
        Asked::Own(_) => "own",
        Asked::Any => "any",
        Asked::Stale => "serve-stale",
    }
}
