//! Who reads: what each reader must be given, and how reads that ask for more are served (`freshness.rs`, `shared.rs`).
//!
//! A hit is no step of the model: an entry that can be served counts as served at once ([`State::inspect`](super::properties)).

use crate::{
    fill::{Flight, Join},
    gate::Word,
};

use super::{
    node::{Context, State},
    protection::Protection,
    setup::{Fact, Property},
    world::{KEYS, Stage, Version},
};

/// A reader who waits for a load: what was known when the read began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Caller {
    /// The incarnation that the node listened to.
    pub(super) listened_to: u8,
    pub(super) applied: Version,
    pub(super) returned: Version,
    /// Linearizable: what the primary showed, and its incarnation.
    pub(super) visible: Option<(Version, u8)>,
    /// With the token of this transaction.
    pub(super) token: Option<u8>,
}

/// A read of more than one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Client {
    /// Waits for a fence, and then reads.
    Waits { key: usize, caller: Caller, fence: u64, gaps: u64 },
    /// Reads both keys. `first` is what it found of the first one.
    Pair { word: Word, covered: u64, first: Option<Version>, applied: [Version; KEYS] },
    /// Reads around the store, and has seen this.
    Direct { key: usize, caller: Caller, version: Version, incarnation: u8 },
}

impl State {
    pub(super) fn caller(&self, key: usize) -> Caller {
        let node = &self.node;
        Caller {
            listened_to: node.listens_to(),
            applied: node.applied[key],
            returned: node.returned[key],
            visible: None,
            token: None,
        }
    }

    /// A read that found nothing held: what `Store::ask` does under the key's lock.
    pub(super) fn ask(&mut self, context: &Context<'_>, key: usize, caller: Caller, join: Join) {
        let join = if context.rules.on(Protection::JoinCoherent) { join } else { Join::Running };
        let live = self.node.flight_word(context, key);
        match &mut self.node.flights[key] {
            Some(flight) => {
                if flight.ask(caller, live, join) {
                    (context.note)(Fact::Joined);
                }
            }
            none => *none = Some(Flight::new(caller)),
        }
    }

    /// A read ends.
    pub(super) fn answer(&mut self, context: &Context<'_>, key: usize, caller: Caller, got: (Version, u8)) {
        let (version, incarnation) = got;
        if let Some(txn) = caller.token {
            let it = self.world.txns[usize::from(txn)];
            let same = incarnation == it.incarnation;
            if context.rules.on(Protection::TokenIncarnation) && !same {
                (context.note)(Fact::TokenRefused);
                return;
            }
            let missing = if same { version < it.wrote[key] } else { it.stage == Stage::Lost };
            self.break_if(missing, Property::Token);
            (context.note)(Fact::TokenRead);
        }
        if incarnation == caller.listened_to {
            self.break_if(version < caller.applied, Property::Applied);
            self.break_if(version < caller.returned, Property::Monotonic);
        }
        if let Some((visible, of)) = caller.visible
            && of == incarnation
        {
            self.break_if(version < visible, Property::Fenced);
        }
        if incarnation == self.node.listens_to() {
            self.node.returned[key] = self.node.returned[key].max(version);
        }
    }

    /// A read on terms that every running load under an open gate meets: a hit, or a question.
    fn read_current(&mut self, context: &Context<'_>, key: usize, caller: Caller) {
        match self.node.held(context.setup, key) {
            Some(entry) => self.answer(context, key, caller, (entry.version, entry.incarnation)),
            None => self.ask(context, key, caller, Join::Coherent),
        }
    }

    /// Asks for a fence that starts now, and reads when it has come back; at once if none can.
    fn read_behind_fence(&mut self, context: &Context<'_>, key: usize, caller: Caller) {
        let gaps = self.node.coherence.gaps();
        let shared = !context.rules.on(Protection::FenceNotShared) && self.node.coherence.fence_deadline().is_some();
        match self.node.coherence.want_fence() {
            // Under way: its number is one lower.
            Ok(fence) => {
                let fence = if shared { fence - 1 } else { fence };
                self.clients.push(Client::Waits { key, caller, fence, gaps });
            }
            Err(_) => self.read_current(context, key, caller),
        }
    }

    /// `Freshness::Fenced`.
    pub(super) fn begin_fenced(&mut self, context: &Context<'_>, key: usize) {
        let primary = self.world.primary();
        let visible = Some((primary.rows[key], primary.incarnation));
        let caller = Caller { visible, ..self.caller(key) };
        self.read_behind_fence(context, key, caller);
    }

    /// `Freshness::AtLeast`, as `Shared::reach`.
    pub(super) fn begin_token(&mut self, context: &Context<'_>, key: usize, txn: u8) {
        let caller = Caller { token: Some(txn), ..self.caller(key) };
        match self.reached(context, txn) {
            Some(true) => self.read_current(context, key, caller),
            Some(false) => self.read_behind_fence(context, key, caller),
            None => (context.note)(Fact::TokenRefused),
        }
    }

    /// Whether the token's transaction has been applied. `None`: it is of another incarnation.
    fn reached(&self, context: &Context<'_>, txn: u8) -> Option<bool> {
        let (it, node) = (self.world.txns[usize::from(txn)], &self.node);
        if context.rules.on(Protection::TokenIncarnation)
            && node.coherence.has_line()
            && node.listens_to() != it.incarnation
        {
            return None;
        }
        if !context.rules.on(Protection::TokenNotLargest) && node.applied_ids >> it.xid > 0 {
            return Some(true);
        }
        if !context.rules.on(Protection::TokenNotFirst) && node.applied_ids >> it.xid & 1 == 1 {
            return Some(true);
        }
        Some(node.coherence.mark().is_some_and(|mark| mark.snapshot.sees(u64::from(it.xid))))
    }

    /// The fence of a reader has come back, or never will.
    pub(super) fn proceed(&mut self, context: &Context<'_>, n: usize) {
        let Client::Waits { key, caller, gaps, .. } = self.clients.remove(n) else { unreachable!("it waits") };
        let came = self.node.coherence.gaps() == gaps;
        if let Some(txn) = caller.token
            && came
            && self.reached(context, txn) != Some(true)
        {
            // An error: the transaction has not ended, or is of another incarnation.
            (context.note)(Fact::TokenRefused);
            return;
        }
        if came && caller.visible.is_some() {
            (context.note)(Fact::FencedRead);
        }
        self.read_current(context, key, caller);
    }

    /// `Table::held_together`: notes the word, and how far the log is covered.
    pub(super) fn begin_pair(&mut self, context: &Context<'_>) {
        let covered = self.node.coherence.mark().map_or(0, |mark| mark.lsn);
        let (word, applied) = (self.node.gate(context, 0).word(), self.node.applied);
        self.clients.push(Client::Pair { word, covered, first: None, applied });
    }

    /// Looks up the next key of a pair.
    pub(super) fn look_up(&mut self, context: &Context<'_>, n: usize) {
        let Client::Pair { word, covered, first, applied } = self.clients.remove(n) else { unreachable!("a pair") };
        let by_position = context.rules.on(Protection::SnapshotPosition);
        let within =
            |entry: &super::node::Entry| entry.word == word && (!by_position || u64::from(entry.lsn) <= covered);
        let found = self.node.entries[usize::from(first.is_some())].filter(within);
        match (found, first) {
            // Not from memory, then.
            (None, _) => {}
            (Some(entry), None) => {
                self.clients.push(Client::Pair { word, covered, first: Some(entry.version), applied });
            }
            (Some(entry), Some(first)) => {
                let pair = [first, entry.version];
                self.break_if(!self.world.stood_together(pair), Property::Snapshot);
                self.break_if(pair[0] < applied[0] || pair[1] < applied[1], Property::Applied);
                if pair.iter().all(|version| *version > Version::default()) {
                    (context.note)(Fact::TogetherRead);
                }
            }
        }
    }

    /// `Table::load_together`: its statement reads the row.
    pub(super) fn begin_direct(&mut self, key: usize) {
        let (caller, primary) = (self.caller(key), self.world.primary());
        let (version, incarnation) = (primary.rows[key], primary.incarnation);
        self.clients.push(Client::Direct { key, caller, version, incarnation });
    }

    /// And what is held of the row is forgotten before it answers.
    pub(super) fn end_direct(&mut self, context: &Context<'_>, n: usize) {
        let Client::Direct { key, caller, version, incarnation } = self.clients.remove(n) else {
            unreachable!("direct")
        };
        if context.rules.on(Protection::DirectForgets) {
            self.node.invalidate(context, key, None);
        }
        (context.note)(Fact::DirectRead);
        self.answer(context, key, caller, (version, incarnation));
    }
}
