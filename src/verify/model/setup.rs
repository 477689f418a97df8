//! The bounds of a scenario, what must hold in it, and what it must reach.

use super::protection::Protection;

/// How changes reach the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transport {
    /// Messages of the writers' transactions.
    Notify,
    /// A table of changes, read by a statement that is the fence as well.
    Log,
    /// Row `a` is of a table that is told by messages, row `b` of one that is told by the log. A fence is a message and a poll.
    Both,
}

impl Transport {
    /// Whether a writer of these keys sends messages.
    pub(super) fn notifies(self, keys: u8) -> bool {
        match self {
            Self::Notify => true,
            Self::Log => false,
            Self::Both => keys & 1 == 1,
        }
    }

    /// Whether changes of this row are written to the log.
    pub(super) fn logs(self, key: usize) -> bool {
        match self {
            Self::Notify => false,
            Self::Log => true,
            Self::Both => key == 1,
        }
    }

    /// Which table this row is of.
    pub(super) fn table(self, key: usize) -> usize {
        if self == Self::Both { key } else { 0 }
    }

    pub(super) fn listens(self) -> bool {
        self != Self::Log
    }

    pub(super) fn polls(self) -> bool {
        self != Self::Notify
    }
}

/// What one writer does: one transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Writer {
    /// The keys that it changes, one bit each.
    pub(super) keys: u8,
    /// It is told by one message for the whole table.
    pub(super) all: bool,
}

pub(super) const A: Writer = Writer { keys: 0b01, all: false };
pub(super) const B: Writer = Writer { keys: 0b10, all: false };
pub(super) const AB: Writer = Writer { keys: 0b11, all: false };
pub(super) const ALL: Writer = Writer { keys: 0b11, all: true };

/// The bounds. Every number is how often the thing happens at most.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a bound of its own")]
pub(super) struct Setup {
    pub(super) transport: Transport,
    pub(super) keys: usize,
    pub(super) writers: &'static [Writer],
    /// Reads that miss.
    pub(super) asks: u8,
    /// Entries are evicted for space, at any time.
    pub(super) evictions: bool,
    /// A transaction takes its id and its locks before it commits.
    pub(super) begin_step: bool,
    /// The commit record is written before the commit is visible.
    pub(super) log_step: bool,
    /// Listeners are woken after the commit is visible.
    pub(super) signal_step: bool,
    /// Fences after the first.
    pub(super) fences: u8,
    /// A fence takes its snapshot before it queues its message.
    pub(super) mark_step: bool,
    /// Connections that break.
    pub(super) drops: u8,
    /// Connections that are opened again, beside those that `drops` and faults of the server ask for.
    pub(super) spares: u8,
    /// Linearizable reads.
    pub(super) fenced: u8,
    /// Reads with a token.
    pub(super) tokens: u8,
    /// Both keys are read together.
    pub(super) together: bool,
    /// Reads around the store.
    pub(super) direct: u8,
    /// Old rows are served in a gap.
    pub(super) stale: bool,
    /// Crashes that may lose commits.
    pub(super) crashes: u8,
    /// Promotions of a standby that may lose commits, while the old primary goes on.
    pub(super) failovers: u8,
    /// Rows of the log are removed.
    pub(super) rotations: u8,
    /// Ticks of the clock; 0: there is no time.
    pub(super) ticks: u8,
    /// The machine is suspended for this many ticks, once.
    pub(super) suspend: u8,
    /// Changes that the inbox holds; 0: any number.
    pub(super) inbox_max: usize,
    /// Rows that other nodes put into a tier, which never loses one; 0: there is none.
    pub(super) puts: u8,
}

/// One key, one writer, two reads.
pub(super) const SMALL: Setup = Setup {
    transport: Transport::Notify,
    keys: 1,
    writers: &[A],
    asks: 2,
    evictions: true,
    begin_step: false,
    log_step: false,
    signal_step: false,
    fences: 0,
    mark_step: false,
    drops: 0,
    spares: 0,
    fenced: 0,
    tokens: 0,
    together: false,
    direct: 0,
    stale: false,
    crashes: 0,
    failovers: 0,
    rotations: 0,
    ticks: 0,
    suspend: 0,
    inbox_max: 0,
    puts: 0,
};

/// After how many ticks entries are not served any more.
pub(super) const LEASE: u8 = 2;
/// After how many ticks a fence is late.
pub(super) const BEAT_TIMEOUT: u8 = 2;

impl Setup {
    /// The bounds in a few words.
    pub(super) fn describe(&self) -> String {
        let writers: Vec<String> = self.writers.iter().map(|writer| writer.describe()).collect();
        let mut parts = vec![format!("writers {}", writers.join(" ")), format!("{} misses", self.asks)];
        let mut count = |n: u8, what: &str| {
            if n > 0 {
                parts.push(format!("{n} {what}"));
            }
        };
        count(self.fences, "fences");
        count(self.drops, "drops");
        count(self.spares, "spares");
        count(self.fenced, "fenced");
        count(self.tokens, "with token");
        count(self.direct, "direct");
        count(u8::from(self.together), "pair");
        count(self.crashes, "crash");
        count(self.failovers, "failover");
        count(self.rotations, "rotation");
        count(self.puts, "puts");
        count(self.ticks, "ticks");
        count(u8::from(self.suspend > 0), "suspend");
        if self.inbox_max > 0 {
            parts.push(format!("inbox {}", self.inbox_max));
        }
        match self.transport {
            Transport::Notify => {}
            Transport::Log => parts.push("log".into()),
            Transport::Both => parts.push("b by log".into()),
        }
        parts.join(", ")
    }
}

impl Writer {
    fn describe(self) -> String {
        let keys: String = (0..2).filter(|key| self.keys >> key & 1 == 1).map(name_of_key).collect();
        if self.all { format!("{keys}*") } else { keys }
    }
}

/// `a` or `b`.
pub(super) fn name_of_key(key: usize) -> &'static str {
    ["a", "b"][key]
}

/// What must always hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Property {
    /// I1: when nothing is left to be applied, every entry that can be served equals its row.
    Covered,
    /// I2: whoever asks after a change was applied gets a load that has it.
    Applied,
    /// I2: reads of one key do not go back in time.
    Monotonic,
    /// I4: a fenced read has all that was visible when it began.
    Fenced,
    /// What is served was current not longer ago than the lease and a tick.
    Lease,
    /// What is held, out of service or not, was current at `as of`.
    Within,
    /// A read with a token has the token's transaction, or fails.
    Token,
    /// Rows that are read together are those of one moment.
    Snapshot,
    /// What is served is of the incarnation that the node listens to.
    Incarnation,
}

impl Property {
    pub(super) const ALL: [Self; 9] = [
        Self::Covered,
        Self::Applied,
        Self::Monotonic,
        Self::Fenced,
        Self::Lease,
        Self::Within,
        Self::Token,
        Self::Snapshot,
        Self::Incarnation,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Covered => "covered",
            Self::Applied => "applied",
            Self::Monotonic => "monotonic",
            Self::Fenced => "fenced",
            Self::Lease => "lease",
            Self::Within => "within",
            Self::Token => "token",
            Self::Snapshot => "snapshot",
            Self::Incarnation => "incarnation",
        }
    }

    pub(super) fn wrong(self) -> &'static str {
        match self {
            Self::Covered => {
                "everything has been applied, and yet an entry is served that is not what the row is (I1): it may stay so for ever"
            }
            Self::Applied => "a read that began after a change was applied returns what was before it (I2)",
            Self::Monotonic => "a read returns an older row than one that ended before it began (I2)",
            Self::Fenced => "a fenced read misses a change that was visible before it began (I4)",
            Self::Lease => "a row is served that was replaced longer ago than the lease",
            Self::Within => "a row passes for as fresh as the last fence, and was replaced before that was sent",
            Self::Token => "a read with a token was answered without the token's transaction",
            Self::Snapshot => "two rows are returned together that no moment of the database shows",
            Self::Incarnation => "an entry is served that is not from the incarnation that the node listens to",
        }
    }
}

/// What a scenario must reach: one that holds because nothing happens in it proves nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fact {
    /// The newest value of a row that was changed is served from memory.
    HitNewest,
    /// A load was void when it ended.
    Voided,
    /// A reader waited for the load after a void one.
    Again,
    /// A reader joined another one's load.
    Joined,
    /// A load ended while the node was not coherent.
    Uncached,
    /// The node was coherent again after a gap.
    Reopened,
    /// A fence came back to a reader who waited for it, and the read was answered.
    FencedRead,
    /// A read was answered on the word of a token.
    TokenRead,
    /// A token's incarnation did not fit.
    TokenRefused,
    /// Two rows were returned together, of which a transaction had changed both.
    TogetherRead,
    /// A read around the store was answered.
    DirectRead,
    /// The spare took over, with something that was kept for it.
    Handoff,
    /// Commits were lost.
    Lost,
    /// A load of another incarnation was refused.
    Stranger,
    /// The inbox overflowed.
    Overflow,
    /// Rows of the log had been removed before they were read.
    Overrun,
    /// A transaction became visible after one with a higher number had been read.
    LateCommitter,
    /// A row was served to the very end of the lease after it was replaced.
    LeaseTight,
    /// An old row could be served in a gap.
    Stale,
    /// The lease ran out, or a fence was late.
    Expired,
    /// The table was cleared by a message.
    Cleared,
    /// A row that a gap had put out of service was served again.
    Resumed,
    /// A row of a tier was taken, and served.
    Taken,
    /// A row of a tier was refused that was not what the row is.
    Refused,
}

/// Which rules are at work.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules(pub(super) &'static [Protection]);

impl Rules {
    pub(super) fn on(self, protection: Protection) -> bool {
        !self.0.contains(&protection)
    }
}
