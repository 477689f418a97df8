//! One key's way into the cache: who asked for it, which load answers them, and whether that load's result may
//! still be published. Pure: `store.rs` keeps one [`Flight`] per key under a lock and does what it says.
//!
//! ```text
//!            ask                    start                     finish
//!   (none) ───────→ Queued ───────────────→ Running ─────────────────────→ (none)
//!                     ↑                     │ void: an invalidation came     │
//!                     └─────────────────────┴────────── somebody asked after it
//! ```
//!
//! Rules, and the counterexample that each answers (numbers: `docs/design.md`):
//!
//! * A running load's result is published only if nothing invalidated the key since the load *started*, and the
//!   gate of the table has not moved since (X1, X8).
//! * Who asks after an invalidation never gets the result of a load that started before it (I2).
//! * Loads of one key never overlap: who asks after an invalidation waits for the running load to end, and then
//!   gets one that starts after that (X2, X3, X26). A load is never torn down for being overtaken, so a hot key
//!   under constant load is cached again one load later (X28).
//! * While the gate is closed no message tells that a running load is out of date. Who needs what is current *now* says so
//!   ([`Join::Coherent`]), and waits for the next load (X4).

use smallvec::{SmallVec, smallvec};

use crate::gate::Word;

/// The load of one key, from the first caller who asks until nobody waits any more. `W` is a waiting caller.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Flight<W> {
    state: State,
    waiting: Waiting<W>,
    /// Came too late for the running load.
    next: Waiting<W>,
}

/// Most loads have one caller, who needs no list.
pub(crate) type Waiting<W> = SmallVec<[W; 1]>;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum State {
    /// Not started: whatever is invalidated now, the load will see.
    Queued,
    Running {
        /// The gate when the load started.
        word: Word,
        /// The key was invalidated since.
        void: bool,
    },
}

/// Which running load will do for a caller. One that was invalidated never does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Join {
    /// Any.
    Running,
    /// One that began while the gate was open. While it is closed: only one that starts later.
    Coherent,
}

/// What a finished load's result may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Verdict {
    /// Publish it: the node was coherent when the load started, and nothing has happened since.
    Publish,
    /// The key was invalidated, or all of its table.
    Voided,
    /// The node was not coherent when the load started.
    Uncached,
}

/// What remains to be done when a load has finished.
pub(crate) struct Landing<W> {
    /// Callers who get this load's result.
    pub(crate) waiting: Waiting<W>,
    /// The key must be loaded again, for callers who came too late for this one.
    pub(crate) again: bool,
}

impl<W> Flight<W> {
    /// The first caller asks.
    pub(crate) fn new(caller: W) -> Self {
        Self { state: State::Queued, waiting: smallvec![caller], next: Waiting::new() }
    }

    /// One more caller asks. `live` is the gate now. Returns whether the caller joined others (else it leads
    /// the next load).
    pub(crate) fn ask(&mut self, caller: W, live: Word, join: Join) -> bool {
        let will_do = |word: Word| word == live && (join == Join::Running || word.is_coherent());
        let seats = match self.state {
            State::Queued => &mut self.waiting,
            State::Running { word, void } if !void && will_do(word) => &mut self.waiting,
            State::Running { .. } => &mut self.next,
        };
        seats.push(caller);
        seats.len() > 1
    }

    /// The load is about to read the database. `live` must be read under the key's lock, before the query is
    /// sent: a change whose message is applied from here on may be missing from what the query sees.
    pub(crate) fn start(&mut self, live: Word) {
        debug_assert!(matches!(self.state, State::Queued), "loads of one key do not overlap");
        self.state = State::Running { word: live, void: false };
    }

    /// The key was invalidated. Returns whether that tore up a running load's ticket.
    pub(crate) fn void(&mut self) {
        if let State::Running { void, .. } = &mut self.state {
            *void = true;
        }
    }

    /// What the running load's result may be used for, if it arrives now.
    pub(crate) fn verdict(&self, live: Word) -> Verdict {
        match self.state {
            State::Queued => unreachable!("only a started load finishes"),
            State::Running { word, .. } if !word.is_coherent() => Verdict::Uncached,
            State::Running { word, void: false } if word == live => Verdict::Publish,
            State::Running { .. } => Verdict::Voided,
        }
    }

    /// The result of the running load will not do for those callers: they get the next one.
    pub(crate) fn defer(&mut self, which: impl Fn(&W) -> bool) {
        let (late, kept) = std::mem::take(&mut self.waiting).into_iter().partition::<Waiting<W>, _>(which);
        self.waiting = kept;
        self.next.extend(late);
    }

    #[cfg(any(all(test, shuttle), fuzzing))]
    pub(crate) fn is_running(&self) -> bool {
        matches!(self.state, State::Running { .. })
    }

    /// The running load has ended, however it ended.
    pub(crate) fn finish(&mut self) -> Landing<W> {
        let waiting = std::mem::replace(&mut self.waiting, std::mem::take(&mut self.next));
        self.state = State::Queued;
        Landing { waiting, again: !self.waiting.is_empty() }
    }
}
