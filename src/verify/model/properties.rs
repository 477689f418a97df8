//! What must hold in every state. What a reader must be given stands where it is answered (`readers.rs`).

use super::{
    node::{Context, Position, State, boot},
    setup::{Fact, LEASE, Property},
    world::{KEYS, Stage, Version},
};

impl State {
    /// Whether nothing is left that the node should apply.
    fn is_drained(&self, context: &Context<'_>) -> bool {
        let (node, world) = (&self.node, &self.world);
        if !node.inbox.is_empty() || !node.is_up() {
            return false;
        }
        let primary = world.primary();
        let is_end = |position: &Position| {
            usize::from(position.commits) == primary.history.len() && position.incarnation == primary.incarnation
        };
        if context.setup.transport.polls() && !node.position.as_ref().is_some_and(is_end) {
            return false;
        }
        if !context.setup.transport.listens() {
            return true;
        }
        let [line, ..] = &node.lines[..] else { return false };
        line.whole
            && usize::from(line.at) == world.servers[usize::from(line.server)].queue.len()
            && !world.commit_lock(line.server)
    }

    /// Looks at everything that could be served now, and takes it for served: whatever a reader could get now, one has
    /// got. That makes every later answer be held against it, and no step of the model is needed for a hit.
    pub(super) fn inspect(&mut self, context: &Context<'_>) {
        let drained = self.is_drained(context);
        for key in 0..context.setup.keys {
            let Some(entry) = self.node.entries[key] else { continue };
            let version = entry.version;
            let held = self.node.held(context.setup, key).is_some();
            if held {
                self.break_if(entry.incarnation != self.node.listens_to(), Property::Incarnation);
                self.break_if(version < self.node.applied[key], Property::Applied);
                self.break_if(version < self.node.returned[key], Property::Monotonic);
                let row = self.row(entry.incarnation, key);
                self.break_if(drained && row.is_some_and(|row| row != version), Property::Covered);
                self.inspect_age(context, key, version);
                self.node.returned[key] = self.node.returned[key].max(version);
                if version > Version::default() && version == self.world.primary().rows[key] {
                    (context.note)(Fact::HitNewest);
                }
            }
            let stale = context.setup.stale && self.node.gate(context, key).is_stale(entry.word);
            if stale {
                (context.note)(Fact::Stale);
                self.break_if(version < self.node.returned[key], Property::Monotonic);
            }
            if context.setup.ticks > 0
                && (held || stale)
                && let Some(at) = self.world.replaced_at(key, version)
            {
                let as_of = self.node.coherence.coherent_as_of().unwrap_or_default();
                self.break_if(boot(at) < as_of, Property::Within);
            }
        }
    }

    /// The row, on the server that an entry is from.
    fn row(&self, incarnation: u8, key: usize) -> Option<Version> {
        self.world.servers.iter().find(|server| server.incarnation == incarnation).map(|server| server.rows[key])
    }

    fn inspect_age(&mut self, context: &Context<'_>, key: usize, version: Version) {
        if context.setup.ticks == 0 {
            return;
        }
        if let Some(at) = self.world.replaced_at(key, version) {
            let age = self.world.now - at;
            self.break_if(age > LEASE + 1, Property::Lease);
            if age == LEASE + 1 {
                (context.note)(Fact::LeaseTight);
            }
        }
    }

    /// A token exists when COMMIT has returned.
    pub(super) fn has_token(&self, txn: usize, signal_step: bool) -> bool {
        match self.world.txns[txn].stage {
            Stage::Done | Stage::Lost => true,
            Stage::Visible => !signal_step,
            _ => false,
        }
    }

    /// Which keys a scenario has.
    pub(super) fn keys(context: &Context<'_>) -> std::ops::Range<usize> {
        0..context.setup.keys.min(KEYS)
    }
}
