//! What can be switched off: each switch replaces exactly the step that one rule of the design protects, or drops one assumption
//! about Postgres.

/// One rule, or one assumption, without which something goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protection {
    /// An invalidation voids the running load (X1).
    Void,
    /// The gate's word is noted when a load starts (X8).
    WordAtStart,
    /// A verdict and what follows from it are one step under the key's lock (X1).
    OneFinish,
    /// Who asks after an invalidation does not join a load that started before it (I2).
    JoinRule,
    /// Loads of one key never overlap (X2, X3).
    SerialFlights,
    /// Who needs what is current joins no load that began under a closed gate (X4).
    JoinCoherent,
    /// A statement that goes around the store forgets what is held before it answers (X4).
    DirectForgets,
    /// A load that is not kept removes what is held (X4).
    UnkeptRemoves,
    /// A gap shows a new word (X7).
    NewEpoch,
    /// Entries are served only after LISTEN has returned (X7).
    ListenFirst,
    /// A fence goes through the queue; without: `select 1` on the listener (X10).
    FenceInQueue,
    /// Nobody shares a fence that is under way (X9).
    FenceNotShared,
    /// The lease counts from when the fence was sent (K2).
    LeaseFromSend,
    /// The clock counts the time in which the machine was suspended (X19).
    BootClock,
    /// A load of another incarnation is not kept (X6).
    LoadIncarnation,
    /// The position in the log dies with the incarnation (X5).
    PositionIncarnation,
    /// A token carries its incarnation (X5).
    TokenIncarnation,
    /// A token is reached by the snapshot of a fence; without: by a larger transaction id (X13).
    TokenNotLargest,
    /// The same; without: by the first message of the transaction (X29).
    TokenNotFirst,
    /// Rows of one snapshot are not beyond the fence's position (X24).
    SnapshotPosition,
    /// The spare covers after a fence that the primary has received (J1).
    HandoffFence,
    /// What overflows the inbox is replaced by a clear (I6).
    OverflowClears,
    /// That clear stands in front of the fences that wait (I6).
    OverflowInFront,
    /// The log is read from snapshot to snapshot; without: from the last number on.
    LogBySnapshot,
    /// Whoever finds that rows of the log were removed before they were read forgets everything.
    LogHorizon,
    /// After a gap only what the log tells of is served again; anything else begins anew.
    OnlyLogResumes,
    /// A fence counts when its poll was done.
    FencePolls,
    /// And when its message was applied.
    FenceIsTold,
    /// Its mark is what both have seen; without: what the message has.
    MarkOfPoll,
    /// The same; without: what the poll has.
    MarkOfMessage,
    /// A poll covers what is logged before its position, not at it (X24).
    PollBehind,
    /// What a message told must have been seen by the load of a row of a tier (I1).
    TierSlot,
    /// That load came after the floor (X32).
    TierFloor,
    /// The floor is that of the second fence that counts under a word.
    TierSecondFence,
    /// It saw no less than what was handed out before (X33).
    TierGiven,
    /// A row of a tier is of the incarnation that the node listens to (X5).
    TierSeal,
    /// Postgres: delivered implies visible (A7).
    DeliveredVisible,
    /// Postgres: LISTEN takes its place at the first message that is not committed (A8).
    ListenPlace,
}

impl Protection {
    /// What is done in place of the rule.
    pub(super) fn instead(self) -> &'static str {
        match self {
            Self::Void => "an invalidation removes the entry and leaves the running load alone",
            Self::WordAtStart => "the word is noted when the load ends",
            Self::OneFinish => "the verdict is given first, and the row is published later",
            Self::JoinRule => "whoever asks joins the running load, void or not",
            Self::SerialFlights => "a void load is set aside, and the next one starts beside it",
            Self::JoinCoherent => "a fenced read joins any running load",
            Self::DirectForgets => "a read around the store leaves it alone",
            Self::UnkeptRemoves => "a load that is not kept leaves what is held",
            Self::NewEpoch => "after a gap the old word is shown again",
            Self::ListenFirst => "the new word is shown when the loss is noticed",
            Self::FenceInQueue => "the fence is an answer of the listening connection",
            Self::FenceNotShared => "a reader takes the fence that is under way",
            Self::LeaseFromSend => "the lease counts from when the fence was applied",
            Self::BootClock => "the clock stands still while the machine is suspended",
            Self::LoadIncarnation => "loads are kept whatever server they are from",
            Self::PositionIncarnation => "the position in the log is kept across incarnations",
            Self::TokenIncarnation => "a token is a transaction id alone",
            Self::TokenNotLargest => "a token is reached when a larger transaction id was applied",
            Self::TokenNotFirst => "a token is reached when a message of its transaction was applied",
            Self::SnapshotPosition => "held rows are taken as they are",
            Self::HandoffFence => "the spare covers as soon as its LISTEN has returned",
            Self::OverflowClears => "what overflows the inbox is dropped",
            Self::OverflowInFront => "the clear is put behind the fences",
            Self::LogBySnapshot => "the log is read by number",
            Self::LogHorizon => "removed rows of the log are not missed",
            Self::OnlyLogResumes => "after a gap all that was held is served again",
            Self::FencePolls => "a fence counts when its message was applied",
            Self::FenceIsTold => "a fence counts when its poll was done",
            Self::MarkOfPoll => "a fence stands for all that its message saw",
            Self::MarkOfMessage => "a fence stands for all that its poll saw",
            Self::PollBehind => "a poll covers what is logged at its position",
            Self::TierSlot => "messages leave no trace for rows of a tier",
            Self::TierFloor => "rows of a tier are taken from whatever time they are",
            Self::TierSecondFence => "the floor is that of the first fence that counts",
            Self::TierGiven => "what was handed out leaves no trace for rows of a tier",
            Self::TierSeal => "rows of a tier are taken whatever server they are from",
            Self::DeliveredVisible => "messages are delivered before their commit is visible",
            Self::ListenPlace => "LISTEN takes its place at the end of the queue",
        }
    }
}
