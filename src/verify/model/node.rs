//! The node: the production's flights, gate, words, state machine and relay, and around them what `store.rs`, `tables.rs` and
//! `shared.rs` do under their locks. Beside it stands what the properties need to remember.

use std::time::Duration;

use uuid::Uuid;

use crate::{
    admission::Admission,
    change::Mark,
    change_log,
    coherence::{Action, Boot, Coherence, Fence, Incarnation, Timing},
    fill::{Flight, Verdict},
    gate::{Before, Gate, Word, Words},
    relay::{LineId, Relay},
    snapshot::Sight as Saw,
};

use super::{
    protection::Protection,
    readers::{Caller, Client},
    setup::{BEAT_TIMEOUT, Fact, LEASE, Property, Rules, Setup, Transport},
    world::{Horizon, KEYS, Message, Version, World},
};

/// The tables that the rows are of, at most.
const TABLES: usize = 2;

/// A row that is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Entry {
    pub(super) word: Word,
    pub(super) version: Version,
    pub(super) incarnation: u8,
    pub(super) lsn: u8,
}

/// What a load's statement saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Sight {
    pub(super) version: Version,
    pub(super) incarnation: u8,
    pub(super) lsn: u8,
    /// If there is a tier.
    pub(super) saw: Option<Saw>,
}

/// A row in the tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Put {
    pub(super) key: usize,
    pub(super) sight: Sight,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Load {
    pub(super) key: usize,
    /// Gaps when it began.
    pub(super) gaps: u64,
    pub(super) seen: Option<Sight>,
    /// Without `JoinRule`: void, and nobody who asks is told.
    pub(super) torn: bool,
    /// Without `OneFinish`: the verdict that was given.
    pub(super) checked: Option<Verdict>,
    /// Without `SerialFlights`: the flight that was set aside.
    pub(super) aside: Option<Flight<Caller>>,
}

/// A LISTEN connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Line {
    pub(super) id: Option<LineId>,
    pub(super) server: u8,
    /// How much of the queue it has read.
    pub(super) at: u8,
    /// It was woken since.
    pub(super) woken: bool,
    /// It was not cut. The node does not know.
    pub(super) whole: bool,
}

/// A fence's statement on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Statement {
    pub(super) fence: Fence,
    pub(super) nonce: u8,
    pub(super) server: u8,
    pub(super) executed: Option<Horizon>,
    /// Its message is in the queue, or it sends none.
    pub(super) told: bool,
    /// Its poll was done, or it polls for nothing.
    pub(super) polled: bool,
}

/// The production's place in the log.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Position {
    pub(super) of: change_log::Position,
    /// Of which incarnation it is, and how many of its commits it saw: for the properties.
    pub(super) incarnation: u8,
    pub(super) commits: u8,
}

#[derive(Clone, Debug, PartialEq, Hash)]
pub(super) struct Node {
    pub(super) gates: [Gate; TABLES],
    pub(super) words: Words,
    pub(super) admission: Admission,
    pub(super) coherence: Coherence,
    pub(super) entries: [Option<Entry>; KEYS],
    pub(super) flights: [Option<Flight<Caller>>; KEYS],
    pub(super) loads: Vec<Load>,
    pub(super) inbox: Vec<Message>,
    /// The one that is heard, and the spare.
    pub(super) lines: Vec<Line>,
    pub(super) relay: Option<Relay<()>>,
    pub(super) statements: Vec<Statement>,
    pub(super) position: Option<Position>,
    /// The number of the last fence that was applied.
    pub(super) released: u64,
    /// The clock's thread has looked since the last tick.
    pub(super) looked: bool,
    pub(super) clock: u8,
    /// Without `NewEpoch`: the word that the last gap found.
    before_gap: Option<Word>,
    /// Without `TokenNotLargest` and `TokenNotFirst`: ids that were applied, one bit each.
    pub(super) applied_ids: u16,
    /// Of each row: the newest version of which a message was applied, and the newest that was returned. Of one incarnation.
    pub(super) applied: [Version; KEYS],
    pub(super) returned: [Version; KEYS],
}

/// How often things may still happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Left {
    pub(super) asks: u8,
    pub(super) fences: u8,
    pub(super) drops: u8,
    pub(super) listens: u8,
    pub(super) spares: u8,
    pub(super) fenced: u8,
    pub(super) tokens: u8,
    pub(super) direct: u8,
    pub(super) crashes: u8,
    pub(super) failovers: u8,
    pub(super) rotations: u8,
    pub(super) suspends: u8,
    pub(super) puts: u8,
}

/// Everything, at one moment.
#[derive(Clone, Debug, PartialEq, Hash)]
pub(super) struct State {
    pub(super) world: World,
    pub(super) node: Node,
    pub(super) clients: Vec<Client>,
    /// Whatever was put into it.
    pub(super) tier: Vec<Put>,
    pub(super) left: Left,
    /// The first property that did not hold.
    pub(super) broken: Option<Property>,
    /// Nothing else is looked for, if there is one.
    watched: Option<Property>,
}

/// What a step may look at and note, beside the state.
pub(super) struct Context<'a> {
    pub(super) setup: &'a Setup,
    pub(super) rules: Rules,
    pub(super) note: &'a dyn Fn(Fact),
}

impl Context<'_> {
    fn tables(&self) -> usize {
        if self.setup.transport == Transport::Both { TABLES } else { 1 }
    }

    /// Whether what is held of a table may be served again after a gap, for what happened meanwhile has been applied.
    fn resumes(&self, table: usize) -> bool {
        self.setup.transport.logs(table) || !self.rules.on(Protection::OnlyLogResumes)
    }
}

pub(super) fn nonce(n: u8) -> Uuid {
    Uuid::from_u128(u128::from(n))
}

pub(super) fn boot(ticks: u8) -> Boot {
    Duration::from_secs(u64::from(ticks))
}

pub(super) fn incarnation(n: u8) -> Incarnation {
    Incarnation { canary: nonce(n), started: 0 }
}

/// In the form in which it stands in a message.
pub(super) fn mark(horizon: Horizon) -> Mark {
    let running: Vec<u8> = (0..16).filter(|xid| horizon.running >> xid & 1 == 1).collect();
    let xmin = running.first().copied().unwrap_or(horizon.xmax);
    let running: Vec<String> = running.iter().map(u8::to_string).collect();
    let text = format!("{xmin}:{}:{}", horizon.xmax, running.join(","));
    Mark { snapshot: text.parse().expect("a snapshot"), lsn: u64::from(horizon.lsn) }
}

impl State {
    /// A node that is coherent, and has loaded nothing.
    pub(super) fn new(setup: &Setup, watched: Option<Property>, context: &Context<'_>) -> Self {
        let seconds = |n: u8| if setup.ticks > 0 { boot(n) } else { Duration::MAX / 4 };
        let timing = Timing {
            beat: if setup.ticks > 0 { boot(1) } else { Duration::ZERO },
            beat_timeout: seconds(BEAT_TIMEOUT),
            lease: seconds(LEASE),
            spacing: Duration::ZERO,
        };
        let mut relay = setup.spares.gt(&0).then(|| Relay::new(1 << 20));
        let id = relay.as_mut().map(Relay::next_id);
        if let Some((relay, id)) = relay.as_mut().zip(id) {
            relay.lead(id, ());
        }
        let line = Line { id, server: 0, at: 0, woken: false, whole: true };
        let node = Node {
            gates: [Gate::closed(), Gate::closed()],
            words: Words::default(),
            admission: Admission::with_slots(1),
            coherence: Coherence::new(timing, Boot::ZERO),
            entries: Default::default(),
            flights: Default::default(),
            loads: Vec::new(),
            inbox: Vec::new(),
            lines: if setup.transport.listens() { vec![line] } else { Vec::new() },
            relay,
            statements: Vec::new(),
            position: None,
            released: 0,
            looked: true,
            clock: 0,
            before_gap: None,
            applied_ids: 0,
            applied: Default::default(),
            returned: Default::default(),
        };
        let left = Left {
            asks: setup.asks,
            fences: setup.fences,
            drops: setup.drops,
            listens: setup.drops + setup.crashes + 2 * setup.failovers + u8::from(setup.ticks > 0),
            spares: setup.spares,
            fenced: setup.fenced,
            tokens: setup.tokens,
            direct: setup.direct,
            crashes: setup.crashes,
            failovers: setup.failovers,
            rotations: setup.rotations,
            suspends: u8::from(setup.suspend > 0),
            puts: setup.puts,
        };
        let mut state =
            Self { world: World::new(), node, clients: Vec::new(), tier: Vec::new(), left, broken: None, watched };
        state.node.coherence.listening(incarnation(0));
        let horizon = state.shown_horizon(context, 0);
        if setup.transport.polls() {
            let (of, _) = change_log::Position::after(None, state.look_at_log());
            state.node.position = Some(Position { of, incarnation: 0, commits: 0 });
        }
        let node = &mut state.node;
        let fence = node.coherence.next_fence(Boot::ZERO, nonce(1)).expect("the first fence is due");
        let mut actions = node.coherence.fence_checked(fence);
        actions.extend(node.coherence.fence_polled(fence, mark(horizon)));
        actions.extend(node.coherence.fence_applied(nonce(1), mark(horizon)));
        node.perform(context, actions);
        state
    }

    /// What a fence tells, without what nobody in this scenario looks at: fewer states.
    pub(super) fn shown_horizon(&self, context: &Context<'_>, server: u8) -> Horizon {
        let all = self.world.horizon(server);
        let tier = context.setup.puts > 0;
        let (tokens, together) = (context.setup.tokens > 0 || tier, context.setup.together || tier);
        Horizon {
            xmax: if tokens { all.xmax } else { 1 },
            running: if tokens { all.running } else { 0 },
            lsn: if together { all.lsn } else { 0 },
        }
    }

    pub(super) fn break_if(&mut self, wrong: bool, property: Property) {
        if wrong && self.broken.is_none() && self.watched.is_none_or(|watched| watched == property) {
            self.broken = Some(property);
        }
    }
}

impl Node {
    /// What `Shared::step` does with what the state machine says.
    pub(super) fn perform(&mut self, context: &Context<'_>, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Advance if context.setup.puts > 0 => self.raise_floor(context),
                Action::Advance => {}
                Action::Open => {
                    if self.before_gap.is_some() || self.words != Words::default() {
                        (context.note)(Fact::Reopened);
                    }
                    for (table, gate) in self.gates.iter().enumerate().take(context.tables()) {
                        let fresh = self.words.fresh(true);
                        if context.resumes(table) && gate.resume() {
                            let is_served = |entry: &Entry| entry.word == gate.word();
                            if self.entries.iter().flatten().any(is_served) {
                                (context.note)(Fact::Resumed);
                            }
                            continue;
                        }
                        // Rule `NewEpoch` or `ListenFirst` is switched off: not the fresh one.
                        gate.show(self.before_gap.unwrap_or(fresh), Before::Forgotten);
                    }
                }
                Action::Close => {
                    if !context.rules.on(Protection::NewEpoch) {
                        self.before_gap = Some(self.gates[0].word());
                    }
                    let word = self.words.fresh(false);
                    for gate in &self.gates {
                        gate.show(word, Before::Stale);
                    }
                    if !context.rules.on(Protection::ListenFirst) {
                        let word = self.words.fresh(true);
                        self.before_gap = Some(word);
                        self.gates[0].show(word, Before::Forgotten);
                    }
                }
                Action::Release(fence) => self.released = fence,
            }
        }
    }

    /// What `Tables::advance` does.
    fn raise_floor(&self, context: &Context<'_>) {
        let (rules, word) = (context.rules, self.gates[0].word());
        let nowhere = || Mark { snapshot: "0:0:".parse().expect("a snapshot"), lsn: 0 };
        let mark = self.coherence.mark().filter(|_| rules.on(Protection::TierFloor)).cloned();
        let mark = mark.unwrap_or_else(nowhere);
        self.admission.advance(word, self.now(), &mark);
        if !rules.on(Protection::TierSecondFence) || !rules.on(Protection::TierFloor) {
            self.admission.advance(word, self.now(), &mark);
        }
    }

    /// What `Tables::clear` does.
    pub(super) fn clear(&mut self) {
        let word = self.words.fresh(self.coherence.bypassed().is_none());
        for gate in &self.gates {
            gate.show(word, Before::Forgotten);
        }
    }

    /// What `Store::invalidate` does under the key's lock.
    pub(super) fn invalidate(&mut self, context: &Context<'_>, key: usize, by: Option<u8>) {
        let rules = context.rules;
        if context.setup.puts > 0 && rules.on(Protection::TierSlot) {
            self.admission.told(&0_i64, by.map(u64::from));
        }
        let running = self.running(key);
        if rules.on(Protection::Void) {
            match running {
                Some(load) if !rules.on(Protection::JoinRule) => self.loads[load].torn = true,
                Some(load) if !rules.on(Protection::SerialFlights) => {
                    let mut flight = self.flights[key].take().expect("a running load has a flight");
                    flight.void();
                    self.loads[load].aside = Some(flight);
                }
                _ => {
                    if let Some(flight) = &mut self.flights[key] {
                        flight.void();
                    }
                }
            }
        }
        self.entries[key] = None;
    }

    /// The running load of the key's flight.
    pub(super) fn running(&self, key: usize) -> Option<usize> {
        self.loads.iter().position(|load| load.key == key && load.aside.is_none())
    }

    /// The word that flights are told.
    pub(super) fn flight_word(&self, context: &Context<'_>, key: usize) -> Word {
        if context.rules.on(Protection::WordAtStart) {
            self.gate(context, key).word()
        } else {
            Words::default().fresh(true)
        }
    }

    /// The gate of the table that this row is of.
    pub(super) fn gate(&self, context: &Context<'_>, key: usize) -> &Gate {
        &self.gates[context.setup.transport.table(key)]
    }

    /// The entry of a key, if it may be served.
    pub(super) fn held(&self, setup: &Setup, key: usize) -> Option<Entry> {
        let gate = &self.gates[setup.transport.table(key)];
        self.entries[key].filter(|entry| entry.word == gate.word())
    }

    pub(super) fn is_up(&self) -> bool {
        self.coherence.bypassed().is_none()
    }

    /// The number of the incarnation that the node listens to.
    pub(super) fn listens_to(&self) -> u8 {
        let canary = self.coherence.incarnation().map_or(0, |it| it.canary.as_u128());
        u8::try_from(canary).expect("few incarnations")
    }

    pub(super) fn now(&self) -> Boot {
        boot(self.clock)
    }
}
