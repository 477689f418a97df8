//! The database: what is committed, in which order, and what is sent to whom. No time passes in here.
//!
//! A commit is one step under one lock: its rows are visible, and its messages are in the queue of each line. So the order of
//! commits is that of every queue, a fence that is queued later is behind the messages of all that was visible when it was sent
//! (assumptions A6 and A7 of the design), and a load sees what is committed before it, no less and no more.

use std::sync::{Arc, Weak};

use uuid::Uuid;

use super::{
    chaos::{Chaos, Fate, SlowLoad},
    hold::Hold,
    line::{Sent, Wire},
    registry::Registry,
};
use crate::{
    change::{Change, Rows},
    coherence::{Fence, Incarnation},
    dice::Dice,
    error::{Error, Kind, Result},
    source::Stamp,
    sync::{Mutex, lock},
    token::{Token, incarnation_id},
};

/// A database of a test, as its nodes see it.
pub(crate) struct World {
    /// Protects what is committed. Lock order: this, then the rows of one table, or a wire.
    state: Mutex<State>,
    pub(super) registry: Registry,
    pub(super) loads: Hold,
    pub(super) messages: Hold,
}

struct State {
    incarnation: Incarnation,
    /// The next transaction's.
    xid: u64,
    commits: u64,
    /// Somebody answers.
    is_up: bool,
    wires: Vec<Weak<Wire>>,
    chaos: Chaos,
    dice: Dice,
    nodes: u64,
}

/// How far the database is.
pub(super) struct Moment {
    pub(super) incarnation: Incarnation,
    pub(super) snapshot: String,
    pub(super) lsn: u64,
}

impl State {
    /// `pg_current_snapshot()`: nothing runs.
    fn moment(&self) -> Moment {
        let Self { incarnation, xid, commits, .. } = self;
        Moment { incarnation: *incarnation, snapshot: format!("{xid}:{xid}:"), lsn: commits + 1 }
    }

    fn check_up(&self) -> Result<()> {
        if self.is_up { Ok(()) } else { Err(unreachable("the test database is stopped")) }
    }

    /// Queues a message for all lines that hear it. Returns those that it breaks.
    fn send(&mut self, sent: &Sent) -> Vec<Arc<Wire>> {
        let mut broken = Vec::new();
        let Self { wires, chaos, dice, .. } = self;
        wires.retain(|wire| {
            let Some(wire) = wire.upgrade() else { return false };
            if wire.hears(sent) {
                match chaos.message(matches!(sent, Sent::Own { .. }), dice) {
                    Fate::Arrives { delay, twice } => wire.queue(sent, delay, twice),
                    Fate::Lost => {}
                    Fate::Silences => wire.silence(),
                    Fate::Breaks => broken.push(wire),
                }
            }
            true
        });
        broken
    }
}

pub(super) fn unreachable(what: &str) -> Error {
    Error::new(Kind::Unavailable, what)
}

/// Tells the nodes, with no lock held: they do something about it.
fn end(wires: Vec<Arc<Wire>>, how: &str) {
    for wire in wires {
        wire.end(how);
    }
}

const BROKEN: &str = "reset by the test's chaos";

impl World {
    pub(super) fn new() -> Arc<Self> {
        let chaos = Chaos::seeded(0);
        let state = State {
            incarnation: Incarnation { canary: Uuid::new_v4(), started: 1 },
            xid: 700,
            commits: 0,
            is_up: true,
            wires: Vec::new(),
            dice: Dice::new(chaos.seed),
            chaos,
            nodes: 0,
        };
        let (loads, messages) = (Hold::default(), Hold::default());
        Arc::new(Self { state: Mutex::new(state), registry: Registry::default(), loads, messages })
    }

    /// Commits what `work` does to rows, and sends the message that it returns. It is given the transaction's id.
    pub(super) fn commit(&self, work: impl FnOnce(u64) -> Option<Change>) -> Token {
        let mut state = lock(&self.state);
        let xid = state.xid;
        state.xid += 1;
        state.commits += 1;
        let told = work(xid);
        let broken = told.map(|change| state.send(&Sent::All(change.to_message()))).unwrap_or_default();
        let token = Token { incarnation: incarnation_id(state.incarnation), xid };
        drop(state);
        end(broken, BROKEN);
        token
    }

    /// Sends a text to all lines, and changes nothing.
    pub(super) fn tell(&self, payload: String) -> Result<()> {
        let mut state = lock(&self.state);
        state.check_up()?;
        let broken = state.send(&Sent::All(payload));
        drop(state);
        end(broken, BROKEN);
        Ok(())
    }

    /// Sends a fence.
    pub(super) fn fence(&self, channel: &str, fence: Fence) -> Result<()> {
        let mut state = lock(&self.state);
        state.check_up()?;
        let Moment { snapshot, lsn, .. } = state.moment();
        // The grammar of `change.rs`, in the order in which the real statement writes it.
        let payload = format!(r#"{{"v" : 1, "f" : "{}", "s" : "{snapshot}", "l" : {lsn}}}"#, fence.nonce);
        let broken = state.send(&Sent::Own { channel: channel.to_owned(), payload });
        drop(state);
        end(broken, BROKEN);
        Ok(())
    }

    /// LISTEN: takes its place behind all that is committed.
    pub(super) fn listen(&self, wire: &Arc<Wire>) -> Result<Incarnation> {
        let mut state = lock(&self.state);
        state.check_up()?;
        state.wires.push(Arc::downgrade(wire));
        Ok(state.incarnation)
    }

    pub(super) fn moment(&self) -> Result<Moment> {
        let state = lock(&self.state);
        state.check_up()?;
        Ok(state.moment())
    }

    /// Reads rows, as one statement.
    pub(super) fn read<T>(&self, read: impl FnOnce() -> T) -> Result<(T, Stamp)> {
        let state = lock(&self.state);
        state.check_up()?;
        let Moment { incarnation, lsn, .. } = state.moment();
        Ok((read(), Stamp { incarnation: Some(incarnation), dirty: false, lsn, saw: None }))
    }

    pub(super) fn slow_load(&self) -> SlowLoad {
        let State { chaos, dice, .. } = &mut *lock(&self.state);
        chaos.load(dice)
    }

    /// A number of its own for each node.
    pub(super) fn next_node(&self) -> u64 {
        let mut state = lock(&self.state);
        state.nodes += 1;
        state.nodes
    }

    pub(super) fn set_chaos(&self, chaos: Chaos) {
        let mut state = lock(&self.state);
        state.dice = Dice::new(chaos.seed);
        state.chaos = chaos;
    }

    /// From now on the lines that are open carry nothing.
    pub(super) fn silence(&self) {
        let state = lock(&self.state);
        state.wires.iter().filter_map(Weak::upgrade).for_each(|wire| wire.silence());
    }

    /// Ends all lines.
    pub(super) fn disconnect(&self, how: &str) {
        end(self.take_wires(|_| {}), how);
    }

    pub(super) fn stop(&self) {
        end(self.take_wires(|state| state.is_up = false), "the test database was stopped");
    }

    pub(super) fn start(&self) {
        lock(&self.state).is_up = true;
    }

    /// Another run of the server.
    pub(super) fn restart(&self) {
        let wires = self.take_wires(|state| {
            state.incarnation.started += 1;
            state.is_up = true;
        });
        end(wires, "the test database was restarted");
    }

    fn take_wires(&self, and: impl FnOnce(&mut State)) -> Vec<Arc<Wire>> {
        let mut state = lock(&self.state);
        and(&mut state);
        std::mem::take(&mut state.wires).iter().filter_map(Weak::upgrade).collect()
    }
}

/// What changed, for a message.
pub(super) fn change(table: &str, rows: Rows, xid: Option<u64>) -> Change {
    Change { xid, ..Change::requested(table, rows) }
}
