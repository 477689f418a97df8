//! Every scenario: what is switched off, within which bounds, and what must come out.

use super::{
    protection::Protection,
    setup::{A, AB, ALL, B, Fact, Property, SMALL, Setup, Transport},
};

/// What must come out.
#[derive(Clone, Copy, Debug)]
pub(super) enum Expect {
    /// All properties hold, and these facts are reached.
    Holds(&'static [Fact]),
    /// This property does not.
    Violates(Property),
}

/// One run of the model.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scenario {
    pub(super) name: &'static str,
    /// The counterexample or the invariant of `docs/design.md`.
    pub(super) of: &'static str,
    pub(super) shows: &'static str,
    pub(super) off: &'static [Protection],
    pub(super) short: Setup,
    pub(super) deep: Setup,
    pub(super) expect: Expect,
}

const fn holds(
    name: &'static str,
    of: &'static str,
    shows: &'static str,
    bounds: [Setup; 2],
    facts: &'static [Fact],
) -> Scenario {
    let [short, deep] = bounds;
    Scenario { name, of, shows, off: &[], short, deep, expect: Expect::Holds(facts) }
}

const fn breaks(
    name: &'static str,
    of: &'static str,
    off: &'static [Protection],
    bounds: Setup,
    property: Property,
) -> Scenario {
    Scenario { name, of, shows: "", off, short: bounds, deep: bounds, expect: Expect::Violates(property) }
}

/// What is switched off is not needed.
const fn without(
    name: &'static str,
    of: &'static str,
    shows: &'static str,
    off: &'static [Protection],
    bounds: [Setup; 2],
    facts: &'static [Fact],
) -> Scenario {
    Scenario { off, ..holds(name, of, shows, bounds, facts) }
}

const LOADS: Setup = Setup { writers: &[A, A], asks: 3, ..SMALL };
const GAP: Setup = Setup { asks: 3, drops: 1, fences: 1, writers: &[A, A], ..SMALL };
const FENCE: Setup = Setup { fences: 2, fenced: 1, asks: 2, writers: &[A, A], signal_step: true, ..SMALL };
const TOKEN: Setup =
    Setup { tokens: 1, fences: 1, asks: 1, keys: 2, begin_step: true, mark_step: true, writers: &[A, B], ..SMALL };
const PAIR: Setup = Setup {
    keys: 2,
    together: true,
    writers: &[AB, AB],
    asks: 3,
    fences: 1,
    log_step: true,
    mark_step: true,
    evictions: false,
    ..SMALL
};
const CLOCK: Setup = Setup { ticks: 5, fences: 4, drops: 1, writers: &[A], asks: 2, evictions: false, ..SMALL };
const CRASH: Setup = Setup { crashes: 1, fences: 1, writers: &[A, A], asks: 2, ..SMALL };
const FAILOVER: Setup = Setup { failovers: 1, fences: 2, writers: &[A, A], asks: 2, ..SMALL };
const SPARE: Setup = Setup { spares: 1, drops: 1, fences: 1, writers: &[A, A], asks: 2, ..SMALL };
const OVERFLOW: Setup = Setup { keys: 2, writers: &[AB, A], inbox_max: 1, asks: 2, fences: 1, fenced: 1, ..SMALL };
const LOG: Setup = Setup { transport: Transport::Log, writers: &[A, A], fences: 3, asks: 2, ..SMALL };
const BOTH: Setup =
    Setup { transport: Transport::Both, keys: 2, writers: &[A, B], fences: 1, asks: 1, evictions: false, ..SMALL };
const STALE: Setup = Setup { stale: true, drops: 1, fences: 1, asks: 3, writers: &[A], evictions: false, ..SMALL };
const TIER: Setup = Setup { puts: 2, writers: &[A, A], asks: 2, fences: 2, begin_step: true, ..SMALL };
const TIER_GAP: Setup = Setup { puts: 1, writers: &[A], asks: 1, fences: 3, drops: 1, begin_step: true, ..SMALL };
const TIER_CLEAR: Setup =
    Setup { puts: 1, writers: &[ALL], asks: 1, fences: 2, mark_step: true, log_step: true, ..SMALL };
const TIER_CRASH: Setup = Setup { puts: 1, crashes: 1, writers: &[A], asks: 1, fences: 3, ..SMALL };

/// All of them, in the order of the table.
pub(super) const SCENARIOS: &[Scenario] = &[
    // Loads.
    holds(
        "loads",
        "I1 I2",
        "loads, joins, invalidations and evictions of one key",
        [Setup { writers: &[A, A, A], asks: 4, ..SMALL }, Setup { writers: &[A, A, A, A], asks: 5, ..SMALL }],
        &[Fact::HitNewest, Fact::Voided, Fact::Again, Fact::Joined],
    ),
    holds(
        "loads-two-keys",
        "I1 I2",
        "the same with two keys, transactions that change both, and one that clears the table",
        [
            Setup { writers: &[AB, ALL, A], asks: 3, keys: 2, ..SMALL },
            Setup { writers: &[AB, ALL, A, B], asks: 4, keys: 2, begin_step: true, ..SMALL },
        ],
        &[Fact::HitNewest, Fact::Voided, Fact::Cleared],
    ),
    holds(
        "loads-direct",
        "X4",
        "reads that go around the store",
        [
            Setup { writers: &[A, A, A], asks: 3, direct: 1, ..SMALL },
            Setup { writers: &[A, A, A, A], asks: 4, direct: 2, begin_step: true, ..SMALL },
        ],
        &[Fact::HitNewest, Fact::Voided, Fact::DirectRead],
    ),
    breaks("no-void", "X1", &[Protection::Void], Setup { writers: &[A], ..SMALL }, Property::Covered),
    breaks("finish-in-two", "X1", &[Protection::OneFinish], Setup { writers: &[A], ..SMALL }, Property::Covered),
    breaks("join-void", "I2", &[Protection::JoinRule], Setup { writers: &[A], ..SMALL }, Property::Applied),
    breaks("overlapping", "X2 X3", &[Protection::SerialFlights], LOADS, Property::Monotonic),
    breaks(
        "direct-leaves",
        "X4",
        &[Protection::DirectForgets],
        Setup { direct: 1, writers: &[A], ..SMALL },
        Property::Monotonic,
    ),
    breaks(
        "early-delivery",
        "A7",
        &[Protection::DeliveredVisible],
        Setup { writers: &[A], ..SMALL },
        Property::Covered,
    ),
    // Gaps.
    holds(
        "gap",
        "I3 X7 X8",
        "connections that break, unnoticed for a while, and new epochs",
        [
            Setup { drops: 1, fences: 1, asks: 3, writers: &[A, A], ..SMALL },
            Setup { drops: 2, fences: 2, asks: 3, writers: &[A, AB, A], keys: 2, ..SMALL },
        ],
        &[Fact::HitNewest, Fact::Reopened, Fact::Voided, Fact::Uncached],
    ),
    breaks("no-new-word", "X7", &[Protection::NewEpoch], GAP, Property::Covered),
    breaks("word-before-listen", "X7", &[Protection::ListenFirst], GAP, Property::Covered),
    breaks("word-at-end", "X8", &[Protection::WordAtStart], GAP, Property::Covered),
    without(
        "listen-at-end",
        "A8",
        "A8 is not needed: the first fence waits behind whoever has queued, and nothing is kept before it",
        &[Protection::ListenPlace],
        [GAP, Setup { drops: 2, fences: 2, log_step: true, begin_step: true, ..GAP }],
        &[Fact::HitNewest, Fact::Reopened],
    ),
    holds(
        "stale",
        "I2 X4",
        "old rows that are served in a gap, and loads beside them",
        [STALE, Setup { drops: 2, fences: 2, writers: &[A, A], ..STALE }],
        &[Fact::Stale, Fact::Uncached, Fact::Reopened],
    ),
    breaks("unkept-leaves", "X4", &[Protection::UnkeptRemoves], STALE, Property::Monotonic),
    holds(
        "overflow",
        "I6",
        "an inbox that overflows, with fences in it",
        [OVERFLOW, Setup { writers: &[AB, A, B], asks: 3, fences: 2, ..OVERFLOW }],
        &[Fact::Overflow, Fact::FencedRead, Fact::HitNewest],
    ),
    breaks("overflow-dropped", "I6", &[Protection::OverflowClears], OVERFLOW, Property::Covered),
    breaks("overflow-behind", "I6", &[Protection::OverflowInFront], OVERFLOW, Property::Fenced),
    // Fences.
    holds(
        "fence",
        "I4 X9 X10",
        "linearizable reads: fences that are shared, while commits are visible before anybody is woken",
        [FENCE, Setup { fences: 3, fenced: 2, asks: 2, writers: &[A, A, A], log_step: true, mark_step: true, ..FENCE }],
        &[Fact::FencedRead, Fact::HitNewest, Fact::Voided],
    ),
    holds(
        "fence-gap",
        "I4 X4",
        "linearizable reads when the connection breaks meanwhile",
        [
            Setup { drops: 1, fences: 2, fenced: 1, asks: 1, writers: &[A, A], ..SMALL },
            Setup { drops: 1, fences: 3, fenced: 2, asks: 2, writers: &[A, A], ..SMALL },
        ],
        &[Fact::FencedRead, Fact::Reopened, Fact::Uncached],
    ),
    breaks("fence-select-1", "X10", &[Protection::FenceInQueue], FENCE, Property::Fenced),
    breaks(
        "fence-shared",
        "X9",
        &[Protection::FenceNotShared],
        Setup { fences: 2, fenced: 1, asks: 1, writers: &[A], ..SMALL },
        Property::Fenced,
    ),
    breaks(
        "join-closed",
        "X4",
        &[Protection::JoinCoherent],
        Setup { drops: 1, fences: 1, fenced: 1, asks: 1, writers: &[A], ..SMALL },
        Property::Fenced,
    ),
    // Time.
    holds(
        "lease",
        "K1",
        "a lease, a clock, and beats that are late or lost",
        [Setup { ticks: 4, fences: 2, drops: 0, asks: 1, ..CLOCK }, Setup { stale: true, ..CLOCK }],
        &[Fact::HitNewest, Fact::LeaseTight, Fact::Expired, Fact::Reopened],
    ),
    holds(
        "lease-suspend",
        "X19",
        "the same, and the machine is suspended once",
        [
            Setup { ticks: 3, suspend: 4, fences: 2, drops: 0, ..CLOCK },
            Setup { ticks: 5, suspend: 4, fences: 4, ..CLOCK },
        ],
        &[Fact::HitNewest, Fact::Expired],
    ),
    breaks(
        "lease-from-return",
        "K2",
        &[Protection::LeaseFromSend],
        Setup { fences: 2, drops: 0, asks: 1, ..CLOCK },
        Property::Lease,
    ),
    breaks(
        "clock-stops",
        "X19",
        &[Protection::BootClock],
        Setup { ticks: 3, suspend: 4, fences: 2, drops: 0, ..CLOCK },
        Property::Lease,
    ),
    // Crashes.
    holds(
        "crash",
        "X5",
        "a crash that loses commits, after which ids and versions come again",
        [CRASH, Setup { crashes: 1, drops: 1, fences: 2, asks: 3, writers: &[A, A, A], ..SMALL }],
        &[Fact::Lost, Fact::Reopened, Fact::HitNewest],
    ),
    holds(
        "failover",
        "X6",
        "a standby takes over, may lack commits, and the old primary goes on answering",
        [FAILOVER, Setup { drops: 1, asks: 3, ..FAILOVER }],
        &[Fact::Stranger, Fact::Reopened, Fact::HitNewest, Fact::Lost],
    ),
    breaks("stranger-kept", "X6", &[Protection::LoadIncarnation], FAILOVER, Property::Covered),
    // Tokens.
    holds(
        "token",
        "X13 X29",
        "reads with tokens, on another node than the writer's",
        [TOKEN, Setup { tokens: 1, fences: 2, asks: 1, writers: &[AB, A, B], ..TOKEN }],
        &[Fact::TokenRead, Fact::HitNewest],
    ),
    holds(
        "token-crash",
        "X5",
        "tokens across a crash that loses their transactions",
        [
            Setup { tokens: 1, crashes: 1, fences: 1, asks: 1, begin_step: true, writers: &[A, A], ..SMALL },
            Setup { tokens: 2, crashes: 1, fences: 2, asks: 2, begin_step: true, writers: &[A, A], ..SMALL },
        ],
        &[Fact::TokenRead, Fact::TokenRefused, Fact::Lost],
    ),
    breaks("token-largest", "X13", &[Protection::TokenNotLargest], TOKEN, Property::Token),
    breaks("token-first", "X29", &[Protection::TokenNotFirst], Setup { writers: &[AB], ..TOKEN }, Property::Token),
    breaks(
        "token-bare",
        "X5",
        &[Protection::TokenIncarnation],
        Setup { tokens: 1, crashes: 1, fences: 2, asks: 1, begin_step: true, writers: &[A, A], ..SMALL },
        Property::Token,
    ),
    // Many rows.
    holds(
        "snapshot",
        "X24",
        "two rows from memory, read as of one moment",
        [PAIR, Setup { writers: &[AB, AB, A], fences: 2, ..PAIR }],
        &[Fact::TogetherRead, Fact::HitNewest],
    ),
    breaks(
        "snapshot-naive",
        "X24",
        &[Protection::SnapshotPosition],
        Setup { writers: &[AB], asks: 2, ..PAIR },
        Property::Snapshot,
    ),
    // Two lines.
    holds(
        "handoff",
        "J2",
        "a second line that takes over",
        [SPARE, Setup { spares: 2, drops: 2, fences: 2, writers: &[A, A], asks: 2, ..SMALL }],
        &[Fact::Handoff, Fact::HitNewest, Fact::Reopened],
    ),
    breaks("covers-at-once", "J1", &[Protection::HandoffFence], SPARE, Property::Covered),
    // The log.
    holds(
        "log",
        "T1–T4",
        "the second transport: late committers, lost polls",
        [
            Setup { drops: 1, fenced: 1, asks: 1, fences: 2, writers: &[A], ..LOG },
            Setup { drops: 1, fenced: 1, writers: &[A, AB, B], keys: 2, ..LOG },
        ],
        &[Fact::HitNewest, Fact::FencedRead, Fact::Voided],
    ),
    holds(
        "log-late",
        "T2",
        "two keys, so that transactions overlap, and one with a lower number commits later",
        [
            Setup { keys: 2, writers: &[A, B], asks: 2, ..LOG },
            Setup { keys: 2, writers: &[A, B, AB], asks: 3, fences: 3, ..LOG },
        ],
        &[Fact::HitNewest, Fact::LateCommitter, Fact::Voided],
    ),
    holds(
        "log-rotation",
        "T4",
        "rows of the log are removed, also before they were read",
        [Setup { rotations: 1, ..LOG }, Setup { rotations: 2, keys: 2, writers: &[A, B, A], ..LOG }],
        &[Fact::HitNewest, Fact::Overrun],
    ),
    holds(
        "log-crash",
        "X5",
        "the log across a crash that loses commits",
        [Setup { crashes: 1, ..LOG }, Setup { crashes: 1, fences: 4, writers: &[A, A, A], ..LOG }],
        &[Fact::HitNewest, Fact::Lost, Fact::Reopened],
    ),
    holds(
        "log-gap",
        "I3",
        "a gap, after which all that was held is served again, less what the log tells of",
        [
            Setup { ticks: 3, fences: 3, writers: &[A, A], ..LOG },
            Setup { ticks: 3, fences: 3, writers: &[A, A, A], crashes: 1, rotations: 1, ..LOG },
        ],
        &[Fact::HitNewest, Fact::Resumed, Fact::Expired],
    ),
    holds(
        "log-snapshot",
        "X24 L2",
        "two rows from memory, read as of one moment, by the positions of polls",
        [
            Setup { transport: Transport::Log, writers: &[AB, A], fences: 2, asks: 2, ..PAIR },
            Setup { transport: Transport::Log, fences: 3, ..PAIR },
        ],
        &[Fact::TogetherRead, Fact::HitNewest],
    ),
    holds(
        "both",
        "I4",
        "one table by messages and one by the log: fences of two parts, fenced reads of either table",
        [Setup { fenced: 1, ..BOTH }, Setup { fences: 2, asks: 2, fenced: 1, ..BOTH }],
        &[Fact::HitNewest, Fact::FencedRead, Fact::Voided],
    ),
    holds(
        "both-gap",
        "I3 X7",
        "a gap: what the log tells of is served again, the rest begins anew",
        [Setup { drops: 1, ..BOTH }, Setup { drops: 1, rotations: 1, asks: 2, ..BOTH }],
        &[Fact::HitNewest, Fact::Resumed, Fact::Reopened],
    ),
    holds(
        "both-token",
        "L1",
        "tokens of transactions that were told one way or the other",
        [
            Setup { tokens: 1, mark_step: true, begin_step: true, ..BOTH },
            Setup { tokens: 1, asks: 2, mark_step: true, begin_step: true, ..BOTH },
        ],
        &[Fact::TokenRead, Fact::HitNewest],
    ),
    breaks("both-all-resume", "X7", &[Protection::OnlyLogResumes], Setup { drops: 1, ..BOTH }, Property::Covered),
    breaks("fence-without-poll", "I4", &[Protection::FencePolls], Setup { fenced: 1, ..BOTH }, Property::Fenced),
    breaks("fence-without-message", "I4", &[Protection::FenceIsTold], Setup { fenced: 1, ..BOTH }, Property::Fenced),
    breaks(
        "mark-of-message",
        "L1",
        &[Protection::MarkOfPoll],
        Setup { tokens: 1, mark_step: true, ..BOTH },
        Property::Token,
    ),
    breaks(
        "mark-of-poll",
        "L1",
        &[Protection::MarkOfMessage],
        Setup { tokens: 1, mark_step: true, ..BOTH },
        Property::Token,
    ),
    breaks(
        "poll-at-position",
        "L2",
        &[Protection::PollBehind],
        Setup { transport: Transport::Log, writers: &[AB], fences: 2, ..PAIR },
        Property::Snapshot,
    ),
    breaks(
        "log-by-number",
        "T2",
        &[Protection::LogBySnapshot],
        Setup { keys: 2, writers: &[A, B], asks: 1, ..LOG },
        Property::Covered,
    ),
    breaks(
        "log-unnoticed-rotation",
        "T4",
        &[Protection::LogHorizon],
        Setup { rotations: 1, writers: &[A], ..LOG },
        Property::Covered,
    ),
    breaks(
        "log-position-kept",
        "X5",
        &[Protection::PositionIncarnation],
        Setup { crashes: 1, fences: 4, ..LOG },
        Property::Covered,
    ),
    // A tier.
    holds(
        "tier",
        "I1 I2 X33",
        "rows that other nodes put into a tier, which gives back any of them at any time",
        [TIER, Setup { puts: 3, asks: 3, writers: &[A, A, A], ..TIER }],
        &[Fact::Taken, Fact::Refused, Fact::HitNewest, Fact::Voided],
    ),
    holds(
        "tier-gap",
        "X32",
        "the same, with a connection that breaks",
        [TIER_GAP, Setup { puts: 2, asks: 3, fences: 4, writers: &[A, A], ..TIER_GAP }],
        &[Fact::Taken, Fact::Refused, Fact::Reopened],
    ),
    holds(
        "tier-clear",
        "I1",
        "the same, with transactions that clear the table, between the snapshot of a fence and its message",
        [TIER_CLEAR, Setup { puts: 2, asks: 2, writers: &[ALL, A], ..TIER_CLEAR }],
        &[Fact::Taken, Fact::Refused, Fact::Cleared],
    ),
    holds(
        "tier-crash",
        "X5",
        "the same, with a crash that loses commits",
        [TIER_CRASH, Setup { puts: 2, writers: &[A, A], fences: 4, ..TIER_CRASH }],
        &[Fact::Taken, Fact::Refused, Fact::Reopened],
    ),
    breaks("tier-no-slot", "I1", &[Protection::TierSlot], TIER, Property::Covered),
    breaks("tier-no-floor", "X32", &[Protection::TierFloor], TIER_GAP, Property::Covered),
    breaks("tier-first-fence", "I1", &[Protection::TierSecondFence], TIER_CLEAR, Property::Covered),
    breaks("tier-no-given", "X33", &[Protection::TierGiven], TIER, Property::Monotonic),
    breaks("tier-no-seal", "X5", &[Protection::TierSeal], TIER_CRASH, Property::Covered),
];
