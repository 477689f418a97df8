//! Tells a counterexample: who does what, what comes of it, and why that is wrong.

use super::{
    node::State,
    readers::Client,
    run::Outcome,
    scenarios::Scenario,
    setup::{Setup, name_of_key},
    steps::Step,
    world::{KEYS, Message, Stage, Version},
};

/// The counterexample, or that there is none.
pub(super) fn tell(scenario: &Scenario, outcome: &Outcome) -> String {
    let Some((property, path)) = &outcome.violated else {
        return format!("{}: every state was looked at, and there is no counterexample.", scenario.name);
    };
    let mut text = format!("{} ({})\n", scenario.name, scenario.of);
    for protection in scenario.off {
        text += &format!("Switched off ({protection:?}): {}.\n", protection.instead());
    }
    text += "The node is coherent, and holds nothing.\n\n";
    let mut number = 0;
    for pair in path.windows(2) {
        let [(before, Some(step)), (after, _)] = pair else { continue };
        number += 1;
        text += &format!(
            "{number:>3}. {}{}\n",
            sentence(&outcome.setup, before, *step, after),
            changes(&outcome.setup, before, after)
        );
    }
    text += &format!("\nWrong: {}.\n", property.wrong());
    if let Some((last, _)) = path.last() {
        for key in 0..outcome.setup.keys {
            let row = last.world.primary().rows[key];
            let held = last
                .node
                .held(&outcome.setup, key)
                .map_or("nothing that is served".into(), |entry| content(entry.version));
            text += &format!("Row {} is {}; the node holds {held}.\n", name_of_key(key), content(row));
        }
    }
    text
}

fn content(version: Version) -> String {
    match version {
        Version { era: 0, number } => format!("v{number}"),
        Version { era, number } => format!("v{number} (after crash {era})"),
    }
}

fn writer(n: u8) -> String {
    format!("W{}", n + 1)
}

fn writes(state: &State, n: u8) -> String {
    let wrote = state.world.txns[usize::from(n)].wrote;
    let keys = (0..KEYS).filter(|key| wrote[*key] != Version::default());
    let texts: Vec<String> = keys.map(|key| format!("{} = {}", name_of_key(key), content(wrote[key]))).collect();
    texts.join(" and ")
}

fn message(message: Message) -> String {
    match message {
        Message::Change { txn, key } => {
            format!("{}'s message about {}", writer(txn), name_of_key(usize::from(key)))
        }
        Message::All { txn } => format!("{}'s message about the whole table", writer(txn)),
        Message::Everything => "\"forget everything\"".into(),
        Message::Fence { nonce, .. } => format!("fence {nonce}"),
        Message::Polled { nonce, .. } => format!("that the log was read for fence {nonce}"),
    }
}

fn loaded(state: &State, n: usize) -> String {
    let load = &state.node.loads[n];
    let seen = load.seen.map_or("nothing yet".into(), |sight| content(sight.version));
    format!("load of {}, which saw {seen}", name_of_key(load.key))
}

fn server(setup: &Setup, state: &State, n: usize) -> &'static str {
    match (setup.failovers, n + 1 < state.world.servers.len()) {
        (0, _) => "the server",
        (_, true) => "the old primary",
        (_, false) => "the primary",
    }
}

fn sentence(setup: &Setup, before: &State, step: Step, after: &State) -> String {
    match step {
        Step::Commit(n) => commit(setup, before, n, after),
        Step::Deliver(n) => {
            let got = after.node.inbox.len() - before.node.inbox.len().min(after.node.inbox.len());
            format!("Line {} receives {got} message(s).", n + 1)
        }
        Step::Apply => format!("The applier applies {}.", message(before.node.inbox[0])),
        Step::Ask { key } => format!("A reader asks for {}, which is not held.", name_of_key(key)),
        Step::Start { key } => format!("A load of {} starts.", name_of_key(key)),
        Step::Read { load, server: n } => {
            let key = before.node.loads[load].key;
            let seen = after.node.loads[load].seen.map_or_else(String::new, |sight| content(sight.version));
            format!("The load's statement reads {} = {seen} on {}.", name_of_key(key), server(setup, before, n))
        }
        Step::Check(n) => format!("The {}, is found good.", loaded(before, n)),
        Step::Finish(n) => format!("The {}, ends.", loaded(before, n)),
        Step::Evict { key } => format!("The entry of {} is evicted for space.", name_of_key(key)),
        Step::SendFence => "The keeper sends a fence.".into(),
        Step::Execute(_) => "The statement of the fence is executed.".into(),
        Step::Poll(_) => {
            let got = after.node.inbox.len() - before.node.inbox.len().min(after.node.inbox.len());
            format!("The node polls the log for the fence, and finds {} message(s).", got.saturating_sub(1))
        }
        Step::QueueFence(_) => "The fence commits, and its message is in the queue.".into(),
        Step::LoseStatement(_) => "The statement of the fence fails; the node sends another one later.".into(),
        Step::Cut(n) => format!("The connection of line {} is cut; the node does not know.", n + 1),
        Step::Notice(n) => format!("The node finds out that line {} is gone.", n + 1),
        Step::Listen { server: n } => format!("LISTEN returns on a new line, on {}.", server(setup, before, n.into())),
        Step::Attach => "LISTEN returns on a second line.".into(),
        Step::Fenced { key } => format!("A fenced read of {} begins.", name_of_key(key)),
        Step::WithToken { key, txn } => format!("A read of {} with {}'s token begins.", name_of_key(key), writer(txn)),
        Step::Proceed(_) => "A read whose fence has come back (or cannot any more) goes on.".into(),
        Step::Pair => "A reader of a and b notes the word, and how far the log is covered.".into(),
        Step::LookUp(n) => match before.clients[n] {
            Client::Pair { first: Some(first), .. } => {
                let second = before.node.entries[1].map_or("nothing".into(), |entry| content(entry.version));
                format!("It finds b = {second}, and returns it with a = {}.", content(first))
            }
            _ => "It looks up a.".into(),
        },
        Step::Direct { key } => {
            format!("A reader's own statement goes around the store, and reads {}.", name_of_key(key))
        }
        Step::EndDirect(n) => match before.clients[n] {
            Client::Direct { key, version, .. } => format!("It returns {} = {}.", name_of_key(key), content(version)),
            _ => "It ends.".into(),
        },
        Step::Crash { keep } => format!("The server crashes and comes back; {keep} of the visible commits survived."),
        Step::Promote { keep } => format!(
            "A standby is promoted, with {keep} of the visible commits; the old primary goes on, and does not know."
        ),
        Step::Rotate => "Rows of the log whose transactions have ended are removed.".into(),
        Step::Tick => format!("A tick passes: it is {} now.", after.world.now),
        Step::Look => "The clock's thread looks.".into(),
        Step::Put { key, server: n } => {
            let seen = after.tier.last().map_or_else(String::new, |put| content(put.sight.version));
            format!(
                "Another node reads {} = {seen} on {}, and puts it into the tier.",
                name_of_key(key),
                server(setup, before, n)
            )
        }
        Step::Take { load, put } => {
            let (key, seen) = (before.node.loads[load].key, before.tier[put].sight.version);
            format!("The tier answers the load: {} = {}.", name_of_key(key), content(seen))
        }
        Step::Suspend => format!("The machine is suspended: it is {} now.", after.world.now),
    }
}

fn commit(setup: &Setup, before: &State, n: u8, after: &State) -> String {
    let who = writer(n);
    let from = before.world.txns[usize::from(n)].stage;
    let what = match after.world.txns[usize::from(n)].stage {
        Stage::Writing => format!("writes {}", writes(after, n)),
        Stage::Queued if from == Stage::Idle => {
            format!("writes {}, and begins to commit: its messages are in the queue", writes(after, n))
        }
        Stage::Queued => "begins to commit: its messages are in the queue".into(),
        Stage::Logged => "has its commit record written".into(),
        Stage::Visible => "is visible".into(),
        Stage::Done if from == Stage::Visible => "wakes the listeners, and its client knows".into(),
        _ => "is visible, and has woken the listeners".into(),
    };
    let xid = after.world.txns[usize::from(n)].xid;
    let id = if from == Stage::Idle && (setup.tokens > 0 || setup.puts > 0 || setup.transport.polls()) {
        format!(" (id {xid})")
    } else {
        String::new()
    };
    format!("{who}{id} {what}.")
}

/// What a reader would notice beside the step itself.
fn changes(setup: &Setup, before: &State, after: &State) -> String {
    let mut text = String::new();
    match (before.node.is_up(), after.node.is_up()) {
        (true, false) => text += " The node closes its gates.",
        (false, true) => text += " The node is coherent again.",
        _ => {}
    }
    for key in 0..KEYS {
        let (was, is) = (before.node.held(setup, key), after.node.held(setup, key));
        match (was, is) {
            (None, Some(entry)) => {
                text += &format!(" {} = {} is held, and served.", name_of_key(key), content(entry.version));
            }
            (Some(_), None) => text += &format!(" Nothing is held of {} any more.", name_of_key(key)),
            _ => {}
        }
        let (was, is) = (before.node.returned[key], after.node.returned[key]);
        if was < is && after.node.held(setup, key).is_none() {
            text += &format!(" Readers are given {} = {}.", name_of_key(key), content(is));
        }
    }
    text
}
