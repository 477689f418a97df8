//! Lines and fences: what reaches the node, and what it sends (`lines.rs`, `keeper.rs`, `relay.rs`, `inbox.rs`).

use std::collections::BTreeSet;

use crate::{
    change::Mark,
    change_log::{self, Continuity},
    coherence::Reason,
    inbox::Item,
    relay::Loss,
};

use super::{
    node::{Context, Line, Position, State, Statement, incarnation, mark, nonce},
    protection::Protection,
    setup::{Fact, Transport},
    world::{Horizon, KEYS, Message, Stage, Version},
};

impl State {
    /// The backend of a listener reads the queue, and what it sends is received.
    pub(super) fn deliver(&mut self, context: &Context<'_>, n: usize) {
        let Line { server, at, .. } = self.node.lines[n];
        let count = self.world.deliverable(server, at, context.rules.on(Protection::DeliveredVisible));
        let messages = self.world.servers[usize::from(server)].queue[usize::from(at)..][..count].to_vec();
        for message in messages {
            self.receive(context, n, message);
        }
        let line = &mut self.node.lines[n];
        line.at += u8::try_from(count).expect("a short queue");
        line.woken = false;
    }

    fn receive(&mut self, context: &Context<'_>, n: usize, message: Message) {
        let Some(relay) = &mut self.node.relay else { return self.push(context, message) };
        let id = self.node.lines[n].id.expect("lines of a relay have names");
        if let (Some(item), _) = relay.received(id, to_item(message)) {
            let message = from_item(&item);
            self.push(context, message);
        }
    }

    /// What `Inbox::push` does.
    pub(super) fn push(&mut self, context: &Context<'_>, message: Message) {
        let (inbox, max) = (&mut self.node.inbox, context.setup.inbox_max);
        inbox.push(message);
        let is_fence = |message: &Message| matches!(message, Message::Fence { .. } | Message::Polled { .. });
        if max == 0 || inbox.iter().filter(|it| !is_fence(it)).count() <= max {
            return;
        }
        (context.note)(Fact::Overflow);
        inbox.retain(is_fence);
        if !context.rules.on(Protection::OverflowClears) {
            return;
        }
        let place = if context.rules.on(Protection::OverflowInFront) { 0 } else { inbox.len() };
        inbox.insert(place, Message::Everything);
    }

    /// The applier takes the next message.
    pub(super) fn apply(&mut self, context: &Context<'_>) {
        match self.node.inbox.remove(0) {
            Message::Change { txn, key } => {
                let key = usize::from(key);
                let xid = self.world.txns[usize::from(txn)].xid;
                self.node.invalidate(context, key, Some(xid));
                self.remember(context, txn, Some(key));
            }
            Message::All { txn } => {
                (context.note)(Fact::Cleared);
                self.node.clear();
                self.remember(context, txn, None);
            }
            Message::Everything => self.node.clear(),
            Message::Fence { nonce: sent, horizon } => {
                let node = &mut self.node;
                if !context.rules.on(Protection::LeaseFromSend)
                    && let Some(it) = node.statements.iter().find(|it| it.nonce == sent).map(|it| it.fence)
                {
                    // Stamped anew, as if it had been sent just now.
                    node.coherence.fence_not_sent(it);
                    if let Some(again) = node.coherence.next_fence(node.now(), nonce(sent)) {
                        node.coherence.fence_checked(again);
                    }
                }
                node.statements.retain(|it| it.nonce != sent);
                let told = context.rules.on(Protection::MarkOfMessage);
                let mut actions = Vec::new();
                // Where no table is told by the log, a poll finds nothing.
                if context.setup.transport == Transport::Notify
                    && let Some(fence) = node.coherence.under_way().filter(|it| it.nonce == nonce(sent))
                {
                    actions = node.coherence.fence_polled(fence, mark(horizon));
                }
                let mark = if told { mark(horizon) } else { all_there_is() };
                actions.extend(node.coherence.fence_applied(nonce(sent), mark));
                node.perform(context, actions);
            }
            Message::Polled { nonce: sent, horizon } => self.apply_poll(context, sent, horizon),
        }
    }

    /// What a poll found has been applied.
    fn apply_poll(&mut self, context: &Context<'_>, sent: u8, horizon: Horizon) {
        let rules = context.rules;
        let node = &mut self.node;
        let Some(fence) = node.coherence.under_way().filter(|it| it.nonce == nonce(sent)) else { return };
        let mark = if rules.on(Protection::MarkOfPoll) { mark(horizon) } else { all_there_is() };
        let mut actions = Vec::new();
        if !context.setup.transport.listens() || !rules.on(Protection::FenceIsTold) {
            // There is nothing else that could come back.
            actions = node.coherence.fence_applied(fence.nonce, mark.clone());
        }
        actions.extend(node.coherence.fence_polled(fence, mark));
        node.perform(context, actions);
    }

    /// For the properties: this change has been applied.
    fn remember(&mut self, context: &Context<'_>, txn: u8, key: Option<usize>) {
        let it = self.world.txns[usize::from(txn)];
        if it.incarnation != self.node.listens_to() {
            return;
        }
        for key in (0..KEYS).filter(|it| key.is_none_or(|key| key == *it)) {
            self.node.applied[key] = self.node.applied[key].max(it.wrote[key]);
        }
        let rules = context.rules;
        if !rules.on(Protection::TokenNotLargest) || !rules.on(Protection::TokenNotFirst) {
            self.node.applied_ids |= 1 << it.xid;
        }
    }

    /// Messages may have been lost.
    pub(super) fn gap(&mut self, context: &Context<'_>, why: Reason) {
        let node = &mut self.node;
        let actions = node.coherence.gap(node.now(), why);
        node.perform(context, actions);
        self.give_up_lines();
    }

    pub(super) fn give_up_lines(&mut self) {
        if self.node.coherence.has_line() {
            return;
        }
        // The lines poll as well. What has been sent to the server is executed.
        for statement in &mut self.node.statements {
            statement.polled = true;
        }
        self.node.statements.retain(|it| !it.told);
        self.node.lines.clear();
        if let Some(relay) = &mut self.node.relay {
            relay.clear();
        }
    }

    /// The node finds out that a line was cut.
    pub(super) fn notice(&mut self, context: &Context<'_>, n: usize) {
        let lost = || Reason::ConnectionLost(String::new());
        let line = self.node.lines[n];
        let Some((relay, id)) = self.node.relay.as_mut().zip(line.id) else { return self.gap(context, lost()) };
        match relay.lost(id) {
            Loss::Late => unreachable!("it was not given up"),
            Loss::Spare(()) => drop(self.node.lines.remove(n)),
            Loss::Handoff { items, old: () } => {
                if !items.is_empty() {
                    (context.note)(Fact::Handoff);
                }
                self.node.lines.remove(n);
                for item in items {
                    let message = from_item(&item);
                    self.push(context, message);
                }
            }
            Loss::Gap => self.gap(context, lost()),
        }
    }

    fn new_line(&mut self, context: &Context<'_>, server: u8) -> Line {
        let at = self.world.listen_place(server, context.rules.on(Protection::ListenPlace));
        let id = self.node.relay.as_mut().map(crate::relay::Relay::next_id);
        Line { id, server, at, woken: false, whole: true }
    }

    /// LISTEN has returned on a new line, and with it an epoch begins.
    pub(super) fn listen(&mut self, context: &Context<'_>, server: u8) {
        let next = self.world.servers[usize::from(server)].incarnation;
        let node = &mut self.node;
        let same = node.coherence.incarnation() == Some(incarnation(next));
        if !same {
            (node.applied, node.returned) = Default::default();
        }
        if !context.setup.transport.listens() {
            node.coherence.listening(incarnation(next));
            return;
        }
        let line = self.new_line(context, server);
        let node = &mut self.node;
        if let Some((relay, id)) = node.relay.as_mut().zip(line.id) {
            relay.lead(id, ());
        }
        node.lines = vec![line];
        node.coherence.listening(incarnation(next));
    }

    /// LISTEN has returned on a second line.
    pub(super) fn attach(&mut self, context: &Context<'_>) {
        let primary = self.node.lines[0];
        let line = self.new_line(context, primary.server);
        let (relay, at) = (self.node.relay.as_mut().expect("a relay"), self.node.clock);
        relay.attach(line.id.expect("a name"), ());
        if !context.rules.on(Protection::HandoffFence) {
            // As if a fence had been sent, and the primary had received it.
            let (sent, horizon) = (u8::MAX, Horizon::default());
            relay.fence_sent(nonce(sent), super::node::boot(at));
            relay.received(primary.id.expect("a name"), to_item(Message::Fence { nonce: sent, horizon }));
        }
        self.node.lines.push(line);
        let _ = self.node.coherence.want_fence();
    }

    /// The keeper sends a fence.
    pub(super) fn send_fence(&mut self, context: &Context<'_>) -> bool {
        let n = 2 + context.setup.fences - self.left.fences;
        let node = &mut self.node;
        let Some(fence) = node.coherence.next_fence(node.now(), nonce(n)) else { return false };
        // Triggers are not modelled: they are always found to be whole.
        node.coherence.fence_checked(fence);
        if !context.rules.on(Protection::FencePolls) {
            node.coherence.fence_polled(fence, all_there_is());
        }
        if let Some(relay) = &mut node.relay {
            relay.fence_sent(nonce(n), super::node::boot(node.clock));
        }
        let transport = context.setup.transport;
        let server = node.lines.first().map_or(0, |line| line.server);
        let (told, polled) = (!transport.listens(), !transport.polls());
        node.statements.push(Statement { fence, nonce: n, server, executed: None, told, polled });
        true
    }

    /// The statement of a fence is executed.
    pub(super) fn execute(&mut self, context: &Context<'_>, n: usize) {
        let Statement { server, nonce, .. } = self.node.statements[n];
        let horizon = self.shown_horizon(context, server);
        if context.rules.on(Protection::FenceInQueue) {
            self.node.statements[n].executed = Some(horizon);
            return;
        }
        // The listening connection answers, behind what its backend has been woken for.
        let line = self.node.lines[0];
        if line.woken || !context.setup.signal_step {
            self.deliver(context, 0);
        }
        self.push(context, Message::Fence { nonce, horizon });
        self.told(n);
    }

    fn told(&mut self, n: usize) {
        self.node.statements[n].told = true;
        self.node.statements.retain(|it| !(it.told && it.polled));
    }

    /// The transaction of a fence queues its message, commits, and wakes the listeners.
    pub(super) fn queue_fence(&mut self, context: &Context<'_>, n: usize) {
        let Statement { server, nonce, executed, .. } = self.node.statements[n];
        let horizon = executed.expect("it was executed");
        // Its own record, which is behind its mark.
        self.world.servers[usize::from(server)].lsn += u8::from(context.setup.puts > 0);
        self.world.servers[usize::from(server)].queue.push(Message::Fence { nonce, horizon });
        self.wake(server);
        if context.rules.on(Protection::LeaseFromSend) {
            self.told(n);
        } else {
            self.node.statements[n].server = SENT;
        }
    }

    pub(super) fn wake(&mut self, server: u8) {
        for line in self.node.lines.iter_mut().filter(|line| line.server == server) {
            line.woken = true;
        }
    }

    /// What a poll would find now, its messages apart.
    pub(super) fn look_at_log(&self) -> change_log::Polled {
        let server = self.world.primary();
        let Mark { snapshot, lsn } = mark(self.world.horizon(self.world.primary_id()));
        let horizon = u64::from(server.log_begins);
        change_log::Polled {
            incarnation: incarnation(server.incarnation),
            standby: false,
            snapshot,
            lsn,
            horizon,
            horizon_after: horizon,
            read: BTreeSet::new(),
            messages: 0,
        }
    }

    /// One poll of the log, for a fence: from the last snapshot to the one of this statement.
    pub(super) fn poll(&mut self, context: &Context<'_>, n: usize) {
        let rules = context.rules;
        let sent = self.node.statements[n].nonce;
        self.node.statements[n].polled = true;
        self.node.statements.retain(|it| !(it.told && it.polled));
        let server = self.world.primary();
        let era = server.incarnation;
        if incarnation(era) != self.node.coherence.incarnation().expect("it has been up") {
            return self.gap(context, Reason::OtherServer);
        }
        let commits = u8::try_from(server.history.len()).expect("few commits");
        let mut polled = self.look_at_log();
        let mut mark = polled.mark();
        if !rules.on(Protection::PollBehind) {
            mark.lsn = polled.lsn;
        }
        let last = self.node.position.take();
        if let Some(last) = &last {
            self.read_log(context, &last.of);
            if !rules.on(Protection::PositionIncarnation) {
                polled.incarnation = incarnation(last.incarnation);
            }
        }
        let (mut of, continuity) = change_log::Position::after(last.as_ref().map(|last| &last.of), polled);
        match continuity {
            Continuity::Trimmed if rules.on(Protection::LogHorizon) => {
                (context.note)(Fact::Overrun);
                self.push(context, Message::Everything);
            }
            Continuity::OtherServer => self.push(context, Message::Everything),
            Continuity::Kept | Continuity::Trimmed => {}
        }
        let mut incarnation = era;
        if let Some(last) =
            last.filter(|last| !rules.on(Protection::PositionIncarnation) && last.of.since() > of.since())
        {
            // Positions only go forward, where nobody knows of incarnations.
            (of, incarnation) = (last.of, last.incarnation);
        }
        self.node.position = Some(Position { of, incarnation, commits });
        let lsn = u8::try_from(mark.lsn).expect("few commits");
        let shown = self.shown_horizon(context, self.world.primary_id());
        self.push(context, Message::Polled { nonce: sent, horizon: Horizon { lsn: shown.lsn.min(lsn), ..shown } });
    }

    /// The messages of the transactions that became visible since.
    fn read_log(&mut self, context: &Context<'_>, last: &change_log::Position) {
        let log_begins = self.world.primary().log_begins;
        for txn in self.world.primary().history.clone() {
            let it = self.world.txns[usize::from(txn)];
            let new = if context.rules.on(Protection::LogBySnapshot) {
                u64::from(it.xid) >= last.since() || last.pending().contains(&u64::from(it.xid))
            } else {
                u64::from(it.xid) > largest_read(last)
            };
            if new && it.xid >= log_begins {
                if u64::from(it.xid) < largest_read(last) {
                    (context.note)(Fact::LateCommitter);
                }
                let logged = |key: usize| it.wrote[key] != Version::default() && context.setup.transport.logs(key);
                for key in (0..2).filter(|key| logged(usize::from(*key))) {
                    self.push(context, Message::Change { txn, key });
                }
            }
        }
    }

    /// The statement of a fence fails without harm to the line.
    pub(super) fn lose_statement(&mut self, n: usize) {
        let statement = self.node.statements.remove(n);
        self.node.coherence.fence_not_sent(statement.fence);
    }

    /// The server of the last primary is gone, or another one has taken its place.
    pub(super) fn fail(&mut self, context: &Context<'_>, keep: u8, stays: bool) {
        let server = u8::try_from(self.world.servers.len() - 1).expect("few servers");
        self.world.fail(keep, stays);
        if self.world.txns.iter().any(|txn| txn.stage == Stage::Lost) {
            (context.note)(Fact::Lost);
        }
        if stays {
            return;
        }
        if context.setup.puts > 0 {
            // What was not flushed is written over: positions come again.
            let next = self.world.servers.last_mut().expect("there is a primary");
            next.lsn = u8::try_from(next.history.len()).expect("few commits");
        }
        for line in self.node.lines.iter_mut().filter(|line| line.server == server) {
            line.whole = false;
        }
        if context.setup.transport.listens() {
            self.node.statements.retain(|it| it.server != server);
        }
        while let Some(n) = self.node.statements.iter().position(|it| it.server == server) {
            self.lose_statement(n);
        }
        // Statements under way end with an error.
        self.clients.retain(|client| !matches!(client, super::readers::Client::Direct { .. }));
    }
}

/// Without `LeaseFromSend`: what is left of a statement when its message is in the queue.
pub(super) const SENT: u8 = u8::MAX;

/// The largest id of a transaction that was read.
fn largest_read(last: &change_log::Position) -> u64 {
    (1..last.since()).rev().find(|xid| !last.pending().contains(xid)).unwrap_or(0)
}

/// In place of a mark that is not asked for.
fn all_there_is() -> Mark {
    Mark { snapshot: "200:200:".parse().expect("a snapshot"), lsn: 200 }
}

/// Messages as the relay keeps them.
fn to_item(message: Message) -> Item {
    match message {
        Message::Change { txn, key } => Item::Message(format!("{txn} {key}")),
        Message::All { txn } => Item::Message(txn.to_string()),
        Message::Everything => Item::Overflow,
        Message::Polled { .. } => unreachable!("what is polled does not pass through a relay"),
        Message::Fence { nonce: sent, horizon } => {
            let running = horizon.running;
            let snapshot = format!("1:{}:", horizon.xmax.max(1));
            debug_assert_eq!(running, 0, "scenarios with a relay have no tokens");
            Item::Own(format!(r#"{{"v":1,"f":"{}","s":"{snapshot}","l":{}}}"#, nonce(sent), horizon.lsn))
        }
    }
}

fn from_item(item: &Item) -> Message {
    match item {
        Item::Overflow | Item::Missed => Message::Everything,
        Item::Polled(..) => unreachable!("what is polled does not pass through a relay"),
        Item::Question(_) => unreachable!("nobody asks"),
        // A fence that nobody waits for: the production drops it. There is no fence 0.
        Item::Message(text) if text.starts_with('{') => Message::Fence { nonce: 0, horizon: Horizon::default() },
        Item::Message(text) => {
            let mut numbers = text.split(' ').map(|number| number.parse().expect("a number"));
            let txn = numbers.next().expect("a transaction");
            numbers.next().map_or(Message::All { txn }, |key| Message::Change { txn, key })
        }
        Item::Own(text) => match crate::change::Message::parse(text) {
            crate::change::Message::Fence(sent, mark) => {
                let narrow = |n: u128| u8::try_from(n).expect("few fences");
                let horizon = Horizon { xmax: 1, running: 0, lsn: narrow(mark.lsn.into()) };
                Message::Fence { nonce: narrow(sent.as_u128()), horizon }
            }
            other => unreachable!("only fences are sent on the own channel: {other:?}"),
        },
    }
}
