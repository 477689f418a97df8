//! What can happen next, in which states, and what it does: the model as the checker sees it.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use stateright::{Model, Property as Checked};

use super::{
    lines::SENT,
    node::{Context, State},
    protection::Protection,
    readers::Client,
    setup::{Fact, Property, Rules, Setup},
    world::{Stage, Version},
};
use crate::fill::Join;

/// One thing that happens. Numbers are transactions, lines, loads, statements or readers; keys say so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Commit(u8),
    Deliver(usize),
    Apply,
    Ask { key: usize },
    Start { key: usize },
    Read { load: usize, server: usize },
    Check(usize),
    Finish(usize),
    Evict { key: usize },
    SendFence,
    Execute(usize),
    QueueFence(usize),
    Poll(usize),
    LoseStatement(usize),
    Cut(usize),
    Notice(usize),
    Listen { server: u8 },
    Attach,
    Fenced { key: usize },
    WithToken { key: usize, txn: u8 },
    Proceed(usize),
    Pair,
    LookUp(usize),
    Direct { key: usize },
    EndDirect(usize),
    Crash { keep: u8 },
    Promote { keep: u8 },
    Rotate,
    Tick,
    Look,
    Suspend,
    Put { key: usize, server: usize },
    Take { load: usize, put: usize },
}

/// A scenario's model.
pub(super) struct Protocol {
    pub(super) setup: Setup,
    pub(super) rules: Rules,
    /// Nothing else is looked for, if there is one.
    pub(super) watched: Option<Property>,
    /// Facts that some step has brought about, one bit each. Beside the states, so that they do not multiply them.
    pub(super) facts: Arc<AtomicU32>,
}

impl Protocol {
    fn with<T>(&self, with: impl FnOnce(&Context<'_>) -> T) -> T {
        let note = |fact: Fact| {
            self.facts.fetch_or(1 << fact as u32, Ordering::Relaxed);
        };
        with(&Context { setup: &self.setup, rules: self.rules, note: &note })
    }

    fn step(&self, state: &mut State, step: Step, context: &Context<'_>) -> bool {
        match step {
            Step::Commit(n) => {
                if !state.world.advance(&self.setup, n) {
                    return false;
                }
                let txn = state.world.txns[usize::from(n)];
                if txn.stage == Stage::Done {
                    state.wake(txn.server);
                }
            }
            Step::Deliver(line) => state.deliver(context, line),
            Step::Apply => state.apply(context),
            Step::Ask { key } => {
                state.left.asks -= 1;
                let caller = state.caller(key);
                state.ask(context, key, caller, Join::Running);
            }
            Step::Start { key } => state.start(context, key),
            Step::Read { load, server } => state.read(context, load, server),
            Step::Check(load) => state.check(context, load),
            Step::Finish(load) => state.finish(context, load),
            Step::Evict { key } => state.node.entries[key] = None,
            Step::SendFence => {
                if !state.send_fence(context) {
                    return false;
                }
                state.left.fences -= 1;
            }
            Step::Execute(n) => {
                state.execute(context, n);
                let queued = state.node.statements.get(n).is_some_and(|it| it.executed.is_some());
                if queued && !self.setup.mark_step {
                    let server = state.node.statements[n].server;
                    if state.world.commit_lock(server) {
                        return false;
                    }
                    state.queue_fence(context, n);
                }
            }
            Step::QueueFence(n) => state.queue_fence(context, n),
            Step::Poll(n) => state.poll(context, n),
            Step::LoseStatement(n) => {
                state.left.drops -= 1;
                state.lose_statement(n);
            }
            Step::Cut(line) => {
                state.left.drops -= 1;
                state.node.lines[line].whole = false;
            }
            Step::Notice(line) => state.notice(context, line),
            Step::Listen { server } => {
                state.left.listens -= 1;
                state.listen(context, server);
            }
            Step::Attach => {
                state.left.spares -= 1;
                state.attach(context);
            }
            Step::Fenced { key } => {
                state.left.fenced -= 1;
                state.begin_fenced(context, key);
            }
            Step::WithToken { key, txn } => {
                state.left.tokens -= 1;
                state.begin_token(context, key, txn);
            }
            Step::Proceed(n) => state.proceed(context, n),
            Step::Pair => state.begin_pair(context),
            Step::LookUp(n) => state.look_up(context, n),
            Step::Direct { key } => {
                state.left.direct -= 1;
                state.begin_direct(key);
            }
            Step::EndDirect(n) => state.end_direct(context, n),
            Step::Put { key, server } => {
                state.left.puts -= 1;
                state.put(context, key, server);
            }
            Step::Take { load, put } => state.take(context, load, put),
            _ => return self.outside(state, step, context),
        }
        true
    }

    /// What happens to servers and clocks.
    fn outside(&self, state: &mut State, step: Step, context: &Context<'_>) -> bool {
        let up_before = state.node.is_up();
        match step {
            Step::Crash { keep } => {
                state.left.crashes -= 1;
                state.fail(context, keep, false);
            }
            Step::Promote { keep } => {
                state.left.failovers -= 1;
                state.fail(context, keep, true);
            }
            Step::Rotate => {
                state.left.rotations -= 1;
                return state.world.rotate();
            }
            Step::Tick => {
                state.world.now += 1;
                state.node.clock += 1;
                state.node.looked = false;
            }
            Step::Look => {
                let node = &mut state.node;
                node.looked = true;
                let actions = node.coherence.tick(node.now());
                node.perform(context, actions);
                state.give_up_lines();
            }
            Step::Suspend => {
                state.left.suspends -= 1;
                state.world.now += self.setup.suspend;
                if self.rules.on(Protection::BootClock) {
                    state.node.clock += self.setup.suspend;
                }
                // The clock's thread comes first (see *Differences* in the design).
                let node = &mut state.node;
                let actions = node.coherence.tick(node.now());
                node.perform(context, actions);
                state.give_up_lines();
            }
            _ => unreachable!("{step:?} happens to the node"),
        }
        if up_before && !state.node.is_up() {
            (context.note)(Fact::Expired);
        }
        true
    }

    fn database_steps(&self, state: &State, steps: &mut Vec<Step>) {
        let (world, setup) = (&state.world, &self.setup);
        for n in 0..setup.writers.len() {
            // Equal writers begin in order: any other order is the same with other names.
            let waits =
                |before: usize| setup.writers[before] == setup.writers[n] && world.txns[before].stage == Stage::Idle;
            if world.txns[n].stage > Stage::Idle || !(0..n).any(waits) {
                steps.push(Step::Commit(u8::try_from(n).expect("few writers")));
            }
        }
        let commits = u8::try_from(world.primary().history.len()).expect("few commits");
        if state.left.crashes > 0 {
            steps.extend((0..=commits).map(|keep| Step::Crash { keep }));
        }
        if state.left.failovers > 0 {
            steps.extend((0..=commits).map(|keep| Step::Promote { keep }));
        }
        if state.left.rotations > 0 {
            steps.push(Step::Rotate);
        }
        if setup.ticks > world.now && state.node.looked {
            steps.push(Step::Tick);
            if state.left.suspends > 0 {
                steps.push(Step::Suspend);
            }
        }
    }

    fn line_steps(&self, state: &State, steps: &mut Vec<Step>) {
        let (world, node, setup) = (&state.world, &state.node, &self.setup);
        let visible = self.rules.on(Protection::DeliveredVisible);
        let has_line = node.coherence.has_line();
        for (n, line) in node.lines.iter().enumerate() {
            let reads = line.woken || !setup.signal_step;
            if line.whole && reads && (line.woken || world.deliverable(line.server, line.at, visible) > 0) {
                steps.push(Step::Deliver(n));
            }
            if !line.whole {
                steps.push(Step::Notice(n));
            } else if state.left.drops > 0 {
                steps.push(Step::Cut(n));
            }
        }
        if !node.inbox.is_empty() {
            steps.push(Step::Apply);
        }
        if !has_line && state.left.listens > 0 {
            let first = if setup.transport.listens() { 0 } else { world.servers.len() - 1 };
            let servers = first..world.servers.len();
            steps.extend(servers.map(|server| Step::Listen { server: u8::try_from(server).expect("few servers") }));
        }
        if let Some(relay) = &node.relay
            && node.is_up()
            && !relay.has_spare()
            && state.left.spares > 0
            && node.lines.len() == 1
        {
            steps.push(Step::Attach);
        }
        if state.left.fences > 0 && has_line && node.coherence.fence_due().is_some_and(|due| due <= node.now()) {
            steps.push(Step::SendFence);
        }
        for (n, statement) in node.statements.iter().enumerate().filter(|(_, it)| it.server != SENT) {
            if !statement.polled {
                steps.push(Step::Poll(n));
            }
            match statement.executed {
                _ if statement.told => {}
                None => steps.push(Step::Execute(n)),
                Some(_) if !world.commit_lock(statement.server) => steps.push(Step::QueueFence(n)),
                Some(_) => {}
            }
            if setup.transport.polls() && state.left.drops > 0 {
                steps.push(Step::LoseStatement(n));
            }
        }
        if !node.looked {
            steps.push(Step::Look);
        }
    }

    fn reader_steps(&self, state: &State, steps: &mut Vec<Step>, context: &Context<'_>) {
        let (node, setup) = (&state.node, &self.setup);
        for key in State::keys(context) {
            let held = node.held(setup, key).is_some();
            if !held && state.left.asks > 0 {
                steps.push(Step::Ask { key });
            }
            if node.flights[key].is_some() && node.running(key).is_none() {
                steps.push(Step::Start { key });
            }
            if state.left.puts > 0 {
                steps.extend((0..state.world.servers.len()).map(|server| Step::Put { key, server }));
            }
            if setup.evictions && node.entries[key].is_some() {
                steps.push(Step::Evict { key });
            }
            if state.left.fenced > 0 {
                steps.push(Step::Fenced { key });
            }
            if state.left.direct > 0 {
                steps.push(Step::Direct { key });
            }
            if state.left.tokens > 0 {
                let txns = (0..setup.writers.len()).filter(|txn| {
                    let wrote = state.world.txns[*txn].wrote[key] != Version::default();
                    wrote && state.has_token(*txn, setup.signal_step)
                });
                steps.extend(txns.map(|txn| Step::WithToken { key, txn: u8::try_from(txn).expect("few writers") }));
            }
        }
        for (n, load) in node.loads.iter().enumerate() {
            if load.seen.is_none() {
                steps.extend((0..state.world.servers.len()).map(|server| Step::Read { load: n, server }));
                if setup.puts > 0 {
                    steps.extend(state.takes(context, load.key).into_iter().map(|put| Step::Take { load: n, put }));
                }
            } else if !self.rules.on(Protection::OneFinish) && load.checked.is_none() {
                steps.push(Step::Check(n));
            } else {
                steps.push(Step::Finish(n));
            }
        }
        for (n, client) in state.clients.iter().enumerate() {
            match client {
                Client::Waits { fence, gaps, .. } => {
                    if node.released >= *fence || node.coherence.gaps() != *gaps {
                        steps.push(Step::Proceed(n));
                    }
                }
                Client::Pair { .. } => steps.push(Step::LookUp(n)),
                Client::Direct { .. } => steps.push(Step::EndDirect(n)),
            }
        }
        let in_a_pair = |client: &Client| matches!(client, Client::Pair { .. });
        if setup.together && node.held(setup, 0).is_some() && !state.clients.iter().any(in_a_pair) {
            steps.push(Step::Pair);
        }
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        vec![self.with(|context| State::new(&self.setup, self.watched, context))]
    }

    fn actions(&self, state: &State, steps: &mut Vec<Step>) {
        if state.broken.is_some() {
            return;
        }
        self.database_steps(state, steps);
        self.line_steps(state, steps);
        self.with(|context| self.reader_steps(state, steps, context));
    }

    fn next_state(&self, state: &State, step: Step) -> Option<State> {
        let mut next = state.clone();
        let done = self.with(|context| {
            let done = self.step(&mut next, step, context);
            next.inspect(context);
            done
        });
        done.then_some(next)
    }

    fn properties(&self) -> Vec<Checked<Self>> {
        macro_rules! intact {
            ($($property:ident),*) => {
                vec![$(Checked::always(Property::$property.name(), |_, state: &State| {
                    state.broken != Some(Property::$property)
                })),*]
            };
        }
        intact![Covered, Applied, Monotonic, Fenced, Lease, Within, Token, Snapshot, Incarnation]
    }
}
