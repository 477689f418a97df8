//! The database: rows, transactions that commit step by step, and what they leave for the nodes.
//!
//! ```text
//! Idle → Writing → Queued → Logged → Visible → Done        NOTIFY: one transaction at a time between Queued and Visible (A6)
//! Idle → Writing ─────────→ Logged → Visible → Done        log alone: any number
//! ```

use super::setup::{Setup, Transport, Writer};

pub(super) const KEYS: usize = 2;
pub(super) const WRITERS: usize = 4;

/// What a row contains: which of its writes made it. After a crash numbers are used again, so first by the incarnation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Version {
    pub(super) era: u8,
    pub(super) number: u8,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Stage {
    #[default]
    Idle,
    /// It has its id and its row locks.
    Writing,
    /// Its messages are in the queue; it holds the lock that orders commits.
    Queued,
    /// Its commit record is written.
    Logged,
    Visible,
    /// Listeners were woken, and the client knows.
    Done,
    /// Visible once, and lost.
    Lost,
    /// Ended by a crash.
    Aborted,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Txn {
    pub(super) stage: Stage,
    pub(super) server: u8,
    pub(super) incarnation: u8,
    pub(super) xid: u8,
    /// It sends messages.
    pub(super) notifies: bool,
    pub(super) wrote: [Version; KEYS],
    pub(super) visible_at: u8,
}

/// How far the database was, as a fence's statement tells it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Horizon {
    /// The first id that was not given out.
    pub(super) xmax: u8,
    /// Which of those below had not ended, one bit each.
    pub(super) running: u16,
    pub(super) lsn: u8,
}

/// What the node receives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Message {
    Change {
        txn: u8,
        key: u8,
    },
    All {
        txn: u8,
    },
    /// Stands for what did not fit, or is not known any more.
    Everything,
    Fence {
        nonce: u8,
        horizon: Horizon,
    },
    /// What a poll found stands before this. It is part of this fence.
    Polled {
        nonce: u8,
        horizon: Horizon,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Server {
    pub(super) incarnation: u8,
    pub(super) rows: [Version; KEYS],
    /// The transactions, in the order in which they became visible.
    pub(super) history: Vec<u8>,
    /// NOTIFY's queue, or nothing.
    pub(super) queue: Vec<Message>,
    pub(super) next_xid: u8,
    /// Records written: a transaction's commit, and, where the log is polled, what it wrote.
    pub(super) lsn: u8,
    /// Ids below this one have no rows in the log any more.
    pub(super) log_begins: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct World {
    /// The primary is the last one; another one before it is a primary that was replaced and does not know.
    pub(super) servers: Vec<Server>,
    pub(super) txns: [Txn; WRITERS],
    pub(super) now: u8,
}

impl World {
    pub(super) fn new() -> Self {
        let server = Server {
            incarnation: 0,
            rows: Default::default(),
            history: Vec::new(),
            queue: Vec::new(),
            next_xid: 1,
            lsn: 0,
            log_begins: 1,
        };
        Self { servers: vec![server], txns: Default::default(), now: 0 }
    }

    pub(super) fn primary(&self) -> &Server {
        self.servers.last().expect("there is a primary")
    }

    pub(super) fn primary_id(&self) -> u8 {
        u8::try_from(self.servers.len() - 1).expect("few servers")
    }

    /// Whether somebody holds the lock that orders commits.
    pub(super) fn commit_lock(&self, server: u8) -> bool {
        let holds = |txn: &Txn| txn.notifies && matches!(txn.stage, Stage::Queued | Stage::Logged);
        self.txns.iter().any(|txn| txn.server == server && holds(txn))
    }

    /// Takes a transaction to the next stage at which the scenario stops. Returns whether that could be done.
    pub(super) fn advance(&mut self, setup: &Setup, n: u8) -> bool {
        let writer = setup.writers[usize::from(n)];
        let notifies = setup.transport.notifies(writer.keys);
        loop {
            if !self.step(setup.transport, writer, n) {
                return false;
            }
            let stop = match self.txns[usize::from(n)].stage {
                Stage::Writing => !notifies || setup.begin_step,
                Stage::Queued => notifies,
                Stage::Logged => setup.log_step,
                Stage::Visible => setup.signal_step,
                _ => true,
            };
            if stop {
                return true;
            }
        }
    }

    fn step(&mut self, transport: Transport, writer: Writer, n: u8) -> bool {
        let (id, now) = (self.primary_id(), self.now);
        let notifies = transport.notifies(writer.keys);
        let writes = |key: usize| writer.keys >> key & 1 == 1;
        let stage = self.txns[usize::from(n)].stage;
        let locked = |key: usize| {
            let holds = |txn: &Txn| {
                matches!(txn.stage, Stage::Writing | Stage::Queued | Stage::Logged)
                    && txn.wrote[key] != Version::default()
            };
            self.txns.iter().any(holds)
        };
        match stage {
            Stage::Idle if (0..KEYS).any(|key| writes(key) && locked(key)) => return false,
            Stage::Writing if notifies && self.commit_lock(id) => return false,
            _ => {}
        }
        let server = self.servers.last_mut().expect("there is a primary");
        let txn = &mut self.txns[usize::from(n)];
        txn.stage = match stage {
            Stage::Idle => {
                (txn.server, txn.incarnation, txn.xid) = (id, server.incarnation, server.next_xid);
                server.next_xid += 1;
                server.lsn += u8::from(transport.polls());
                txn.notifies = notifies;
                for key in (0..KEYS).filter(|key| writes(*key)) {
                    let row = server.rows[key];
                    let number = if row.era == server.incarnation { row.number + 1 } else { 1 };
                    txn.wrote[key] = Version { era: server.incarnation, number };
                }
                Stage::Writing
            }
            Stage::Writing => {
                if notifies && writer.all {
                    server.queue.push(Message::All { txn: n });
                } else if notifies {
                    let told = |key: usize| writes(key) && !transport.logs(key);
                    let keys = (0..2).filter(|key| told(usize::from(*key)));
                    server.queue.extend(keys.map(|key| Message::Change { txn: n, key }));
                }
                Stage::Queued
            }
            Stage::Queued => {
                server.lsn += 1;
                Stage::Logged
            }
            Stage::Logged => {
                for key in (0..KEYS).filter(|key| writes(*key)) {
                    server.rows[key] = txn.wrote[key];
                }
                server.history.push(n);
                txn.visible_at = now;
                Stage::Visible
            }
            Stage::Visible => Stage::Done,
            Stage::Done | Stage::Lost | Stage::Aborted => return false,
        };
        true
    }

    /// What a statement can see now.
    pub(super) fn horizon(&self, server: u8) -> Horizon {
        let it = &self.servers[usize::from(server)];
        let mut running = 0;
        for txn in self.txns.iter().filter(|txn| txn.server == server) {
            if matches!(txn.stage, Stage::Writing | Stage::Queued | Stage::Logged) {
                running |= 1 << txn.xid;
            }
        }
        Horizon { xmax: it.next_xid, running, lsn: it.lsn }
    }

    /// How many messages a listener that has read `at` of them is given.
    pub(super) fn deliverable(&self, server: u8, at: u8, only_visible: bool) -> usize {
        let told = |message: &&Message| match message {
            Message::Change { txn, .. } | Message::All { txn } => {
                !only_visible || !matches!(self.txns[usize::from(*txn)].stage, Stage::Queued | Stage::Logged)
            }
            Message::Fence { .. } | Message::Polled { .. } | Message::Everything => true,
        };
        self.servers[usize::from(server)].queue[usize::from(at)..].iter().take_while(told).count()
    }

    /// Where LISTEN takes its place.
    pub(super) fn listen_place(&self, server: u8, at_uncommitted: bool) -> u8 {
        let end = self.servers[usize::from(server)].queue.len();
        let place = if at_uncommitted { self.deliverable(server, 0, true) } else { end };
        u8::try_from(place).expect("a short queue")
    }

    /// Removes the rows of the log whose transactions have all ended.
    pub(super) fn rotate(&mut self) -> bool {
        let horizon = self.horizon(self.primary_id());
        let xmin = (1..horizon.xmax).find(|xid| horizon.running >> xid & 1 == 1).unwrap_or(horizon.xmax);
        let server = self.servers.last_mut().expect("there is a primary");
        let moved = server.log_begins != xmin;
        server.log_begins = xmin;
        moved
    }

    /// The primary crashes, or a standby takes its place: of the visible commits, `keep` have survived.
    pub(super) fn fail(&mut self, keep: u8, stays: bool) {
        let mut next = self.primary().clone();
        let id = self.primary_id();
        let lost = next.history.split_off(usize::from(keep));
        for txn in self.txns.iter_mut().filter(|txn| txn.server == id) {
            if matches!(txn.stage, Stage::Writing | Stage::Queued | Stage::Logged) {
                txn.stage = Stage::Aborted;
            }
        }
        for n in &lost {
            self.txns[usize::from(*n)].stage = Stage::Lost;
        }
        next.incarnation += 1;
        next.rows = Default::default();
        for n in &next.history {
            let wrote = self.txns[usize::from(*n)].wrote;
            for key in (0..KEYS).filter(|key| wrote[*key] != Version::default()) {
                next.rows[key] = wrote[key];
            }
        }
        next.next_xid = 1 + next.history.iter().map(|n| self.txns[usize::from(*n)].xid).max().unwrap_or(0);
        next.log_begins = next.log_begins.min(next.next_xid);
        next.queue.clear();
        if stays {
            let txns = self.txns;
            let aborted = |message: &Message| match message {
                Message::Change { txn, .. } | Message::All { txn } => txns[usize::from(*txn)].stage != Stage::Aborted,
                _ => true,
            };
            self.servers[usize::from(id)].queue.retain(aborted);
        } else {
            self.servers.pop();
        }
        self.servers.push(next);
    }

    /// When this version of a row ceased to be the newest that was visible.
    pub(super) fn replaced_at(&self, key: usize, version: Version) -> Option<u8> {
        let newer = |txn: &&Txn| matches!(txn.stage, Stage::Visible | Stage::Done) && txn.wrote[key] > version;
        self.txns.iter().filter(newer).map(|txn| txn.visible_at).min()
    }

    /// Whether these versions of both rows stood together at some moment of the primary.
    pub(super) fn stood_together(&self, versions: [Version; KEYS]) -> bool {
        let mut rows = [Version::default(); KEYS];
        if rows == versions {
            return true;
        }
        self.primary().history.iter().any(|n| {
            let wrote = self.txns[usize::from(*n)].wrote;
            for key in (0..KEYS).filter(|key| wrote[*key] != Version::default()) {
                rows[key] = wrote[key];
            }
            rows == versions
        })
    }
}
