//! Whether the node may trust its entries: a state machine without I/O, fed with events and the time.
//!
//! ```text
//!           listening               the first fence is applied
//!   Down ─────────────→ Probing ───────────────────────────────→ Up
//!     ↑                    │ gap                                  │ gap
//!     └────────────────────┴──────────────────────────────────────┘
//! ```
//!
//! A **fence** is a message that the node sends to itself. Messages arrive in commit order, so when a fence has
//! been *applied*, everything that was visible when it was *sent* has been applied too (I4). From it follow the
//! lease (`coherent_as_of` is when the last applied fence was sent; entries are served for at most
//! [`Timing::lease`] from then on) and `barrier`.
//!
//! A fence has three parts, and counts when all of them are done. Its message was applied; what a poll of the change log found
//! that began after the fence was sent was applied; and the triggers of all tables were found to be what they were, by a look
//! that began after it was sent. So whatever is visible at that moment was told, one way or the other, or its table is in doubt.
//!
//! At most one fence is under way and one is wanted. Who asks for a fence gets one that *starts* later, never
//! one that is under way already (X9).
//!
//! The caller owns the clock: it must count the time in which the machine was suspended (X19).

use std::{fmt, time::Duration};

use uuid::Uuid;

use crate::change::Mark;

/// Time since boot, suspended time included.
pub(crate) type Boot = Duration;

/// One run of one server without lost commits.
///
/// The canary row is emptied by a crash, on a promoted standby and in a restored backup; the start time tells
/// apart servers that share a copied canary. Source: `tests/upstream.rs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Incarnation {
    pub(crate) canary: Uuid,
    /// When the server was started, in microseconds since 1970.
    pub(crate) started: i64,
}

/// How often, how long, how late.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Timing {
    /// A fence is sent this long after the last one.
    pub(crate) beat: Duration,
    /// A fence that takes longer than this is a gap.
    pub(crate) beat_timeout: Duration,
    /// Entries are served until this long after the last applied fence was sent.
    pub(crate) lease: Duration,
    /// Fences are at least this far apart: each takes one transaction id.
    pub(crate) spacing: Duration,
}

/// Why a node is not coherent.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// The node has not been coherent yet.
    Starting,
    /// The LISTEN connection ended.
    ConnectionLost(String),
    /// A fence did not come back in time: something between the commit and this node is stuck.
    BeatLate,
    /// The last fence is older than the lease.
    LeaseExpired,
    /// A load read another server than the one the node listens to: a failover under way, a split brain, or
    /// two URLs that do not belong together.
    OtherServer,
    /// This table's triggers are not as they should be.
    Triggers(String),
    /// Somebody has switched caching off ([`Node::set_caching`](crate::Node::set_caching)).
    SwitchedOff,
    /// The node was shut down.
    ShutDown,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Starting => f.write_str("starting"),
            Self::ConnectionLost(error) => write!(f, "the LISTEN connection was lost: {error}"),
            Self::BeatLate => f.write_str("a fence did not come back in time"),
            Self::LeaseExpired => f.write_str("the lease ran out"),
            Self::OtherServer => f.write_str("loads reach another server than the LISTEN connection"),
            Self::Triggers(problem) => f.write_str(problem),
            Self::SwitchedOff => f.write_str("caching is switched off"),
            Self::ShutDown => f.write_str("shut down"),
        }
    }
}

/// What the caller must do, at once and in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Everything visible at `coherent_as_of` has been applied, and `mark` is what that was.
    Advance,
    /// Forget everything, and serve entries from now on.
    Open,
    /// Forget everything, and serve none.
    Close,
    /// Tell everybody who waits for the fence of this number, or an earlier one, that it was applied.
    Release(u64),
}

/// A fence to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Fence {
    pub(crate) number: u64,
    pub(crate) nonce: Uuid,
    /// Nothing is trusted before this one has come back. It goes through the pool, which proves that pool and
    /// listener reach the same database and that nothing between swallows notifications (X23).
    pub(crate) probe: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Coherence {
    timing: Timing,
    line: Line,
    incarnation: Option<Incarnation>,
    /// Grows with every gap: who waits for a fence across one must be told.
    gaps: u64,
    /// The number of the last fence that was started.
    started: u64,
    /// The highest number that somebody waits for.
    wanted: u64,
    under_way: Option<UnderWay>,
    last_sent_at: Option<Boot>,
    /// Everything visible before this moment has been applied. Outlives a gap: then it says how old the entries are
    /// that were held when it began.
    coherent_as_of: Option<Boot>,
    /// How far the database was at that moment; `None` in a gap.
    mark: Option<Mark>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct UnderWay {
    fence: Fence,
    sent_at: Boot,
    /// The triggers have been looked at since it was sent.
    checked: bool,
    /// Its message was applied.
    applied: Option<Mark>,
    /// What its poll found was applied.
    polled: Option<Mark>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Line {
    /// Not listening.
    Down { since: Boot, reason: Reason },
    /// Listening; the first fence has not come back.
    Probing { since: Boot, reason: Reason },
    /// Coherent.
    Up,
}

impl Coherence {
    pub(crate) fn new(timing: Timing, now: Boot) -> Self {
        Self {
            timing,
            line: Line::Down { since: now, reason: Reason::Starting },
            incarnation: None,
            gaps: 0,
            started: 0,
            wanted: 0,
            under_way: None,
            last_sent_at: None,
            coherent_as_of: None,
            mark: None,
        }
    }

    /// LISTEN has returned on a new connection to this incarnation of the server. Loads that start from here on
    /// miss nothing: a change they do not see commits later, and its message will come. (X7: not earlier.)
    pub(crate) fn listening(&mut self, incarnation: Incarnation) {
        if let Line::Down { since, reason } = &self.line
            && !self.is_shut_down()
        {
            let (since, reason) = (*since, reason.clone());
            self.line = Line::Probing { since, reason };
            self.incarnation = Some(incarnation);
            self.under_way = None;
            self.last_sent_at = None;
        }
    }

    /// The fence to send now, if one is due. Its time starts here, before it is sent: counting from its return
    /// would let a late message pass for a fresh one (K2).
    pub(crate) fn next_fence(&mut self, now: Boot, nonce: Uuid) -> Option<Fence> {
        let probe = match self.line {
            Line::Down { .. } => return None,
            Line::Probing { .. } => true,
            Line::Up => false,
        };
        if now < self.fence_due()? {
            return None;
        }
        self.started += 1;
        self.wanted = self.wanted.max(self.started);
        let fence = Fence { number: self.started, nonce, probe };
        self.under_way = Some(UnderWay { fence, sent_at: now, checked: false, applied: None, polled: None });
        self.last_sent_at = Some(now);
        Some(fence)
    }

    /// When the next fence is to be sent; `None` while there is no line, or while one is under way.
    pub(crate) fn fence_due(&self) -> Option<Boot> {
        if matches!(self.line, Line::Down { .. }) || self.under_way.is_some() {
            return None;
        }
        let Some(last) = self.last_sent_at else {
            return Some(Boot::ZERO);
        };
        let pause =
            if self.wanted > self.started { self.timing.spacing.min(self.timing.beat) } else { self.timing.beat };
        Some(last + pause)
    }

    /// Sending failed without harm to the line, for instance because it waited too long for a lock. Another
    /// fence is due soon; those who wait for this one are released by that.
    pub(crate) fn fence_not_sent(&mut self, fence: Fence) {
        if self.under_way.take_if(|it| it.fence == fence).is_some() {
            self.wanted = self.started + 1;
        }
    }

    /// A fence's message was applied: everything before it in the channel has been. Strangers' fences, and those from
    /// before a gap, count for nothing (I5).
    pub(crate) fn fence_applied(&mut self, nonce: Uuid, mark: Mark) -> Vec<Action> {
        if let Some(it) = self.under_way.as_mut().filter(|it| it.fence.nonce == nonce) {
            it.applied = Some(mark);
        }
        self.complete()
    }

    /// All that was in the change log when this fence's poll looked has been applied.
    pub(crate) fn fence_polled(&mut self, fence: Fence, mark: Mark) -> Vec<Action> {
        if let Some(it) = self.under_way.as_mut().filter(|it| it.fence == fence) {
            it.polled = Some(mark);
        }
        self.complete()
    }

    /// The triggers of all tables were looked at, by a look that began after this fence was sent, and tables that
    /// are not as they were are in doubt.
    pub(crate) fn fence_checked(&mut self, fence: Fence) -> Vec<Action> {
        if let Some(it) = self.under_way.as_mut().filter(|it| it.fence == fence) {
            it.checked = true;
        }
        self.complete()
    }

    fn complete(&mut self) -> Vec<Action> {
        let Some(UnderWay { fence, sent_at, applied: Some(told), polled: Some(read), .. }) =
            self.under_way.take_if(|it| it.checked && it.applied.is_some() && it.polled.is_some())
        else {
            return Vec::new();
        };
        self.coherent_as_of = Some(sent_at);
        self.mark = Some(told.common(&read));
        let mut actions = Vec::new();
        if matches!(self.line, Line::Probing { .. }) {
            self.line = Line::Up;
            actions.push(Action::Open);
        }
        // After the gates have moved: entries from before the gap must not pass for as fresh as this.
        actions.extend([Action::Advance, Action::Release(fence.number)]);
        actions
    }

    /// The fence that has been sent, and does not count yet.
    #[cfg(feature = "verify")]
    pub(crate) fn under_way(&self) -> Option<Fence> {
        self.under_way.as_ref().map(|it| it.fence)
    }

    /// Asks for a fence that starts after this call. Returns its number, or why none can come back now.
    pub(crate) fn want_fence(&mut self) -> Result<u64, Reason> {
        let next = self.next_number()?;
        self.wanted = self.wanted.max(next);
        Ok(next)
    }

    /// The number of the first fence that starts after this call, whoever wants it, or why none can come back now.
    pub(crate) fn next_number(&self) -> Result<u64, Reason> {
        match &self.line {
            Line::Up => Ok(self.started + 1),
            Line::Down { reason, .. } | Line::Probing { reason, .. } => Err(reason.clone()),
        }
    }

    /// Notifications may have been lost, or may be late: trust nothing until a new line has proved itself.
    pub(crate) fn gap(&mut self, now: Boot, reason: Reason) -> Vec<Action> {
        if self.is_shut_down() {
            return Vec::new();
        }
        let was_up = matches!(self.line, Line::Up);
        self.line = match &self.line {
            Line::Up => Line::Down { since: now, reason },
            Line::Down { since, .. } | Line::Probing { since, .. } => Line::Down { since: *since, reason },
        };
        self.gaps += 1;
        self.under_way = None;
        self.mark = None;
        if was_up { vec![Action::Close] } else { Vec::new() }
    }

    /// A node that was shut down stays so.
    fn is_shut_down(&self) -> bool {
        matches!(self.line, Line::Down { reason: Reason::ShutDown, .. })
    }

    /// Lets time pass: a late fence and an expired lease are gaps.
    pub(crate) fn tick(&mut self, now: Boot) -> Vec<Action> {
        if matches!(self.line, Line::Down { .. }) {
            return Vec::new();
        }
        let late = |it: &UnderWay| now > it.sent_at + self.timing.beat_timeout;
        if self.under_way.as_ref().is_some_and(late) {
            return self.gap(now, Reason::BeatLate);
        }
        if matches!(self.line, Line::Up) && self.lease_end().is_some_and(|end| now > end) {
            return self.gap(now, Reason::LeaseExpired);
        }
        Vec::new()
    }

    /// When entries cease to be served unless another fence is applied; `None` while none are served.
    pub(crate) fn lease_end(&self) -> Option<Boot> {
        match self.line {
            Line::Up => self.coherent_as_of.map(|as_of| as_of + self.timing.lease),
            _ => None,
        }
    }

    /// When the fence under way is too late.
    pub(crate) fn fence_deadline(&self) -> Option<Boot> {
        self.under_way.as_ref().map(|it| it.sent_at + self.timing.beat_timeout)
    }

    /// Since when, and why, the node has not been coherent; `None` while it is.
    pub(crate) fn bypassed(&self) -> Option<(Boot, &Reason)> {
        match &self.line {
            Line::Up => None,
            Line::Down { since, reason } | Line::Probing { since, reason } => Some((*since, reason)),
        }
    }

    /// Whether there is a LISTEN connection, proved or not.
    pub(crate) fn has_line(&self) -> bool {
        !matches!(self.line, Line::Down { .. })
    }

    /// The server that the node listens to, or last listened to.
    pub(crate) fn incarnation(&self) -> Option<Incarnation> {
        self.incarnation
    }

    pub(crate) fn gaps(&self) -> u64 {
        self.gaps
    }

    /// What was visible at `coherent_as_of`; `None` in a gap.
    pub(crate) fn mark(&self) -> Option<&Mark> {
        self.mark.as_ref()
    }

    /// Everything visible before this moment had been applied when the node was last coherent.
    pub(crate) fn coherent_as_of(&self) -> Option<Boot> {
        self.coherent_as_of
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMING: Timing = Timing {
        beat: Duration::from_secs(1),
        beat_timeout: Duration::from_secs(3),
        lease: Duration::from_secs(5),
        spacing: Duration::from_millis(5),
    };

    fn at(seconds: f64) -> Boot {
        Duration::from_secs_f64(1000.0 + seconds)
    }

    fn mark() -> Mark {
        Mark { snapshot: "10:10:".parse().expect("a snapshot"), lsn: 7 }
    }

    /// The fence comes back, the log was read, and the triggers are as they were.
    fn back(node: &mut Coherence, fence: Fence) -> Vec<Action> {
        assert_eq!(node.fence_checked(fence), [], "not applied yet");
        assert_eq!(node.fence_polled(fence, mark()), [], "not applied yet");
        node.fence_applied(fence.nonce, mark())
    }

    fn incarnation(n: u128) -> Incarnation {
        Incarnation { canary: Uuid::from_u128(n), started: 7 }
    }

    /// A node that is up since `at(0.0)`.
    fn up() -> Coherence {
        let mut node = Coherence::new(TIMING, at(-1.0));
        node.listening(incarnation(1));
        let probe = node.next_fence(at(0.0), Uuid::from_u128(1)).expect("a probe is due at once");
        assert!(probe.probe);
        assert_eq!(back(&mut node, probe), [Action::Open, Action::Advance, Action::Release(1)]);
        node
    }

    fn fence(node: &mut Coherence, now: Boot) -> Fence {
        node.next_fence(now, Uuid::new_v4()).expect("a fence is due")
    }

    #[test]
    fn nothing_is_served_before_the_first_fence_came_back() {
        let mut node = Coherence::new(TIMING, at(0.0));
        assert_eq!(node.bypassed(), Some((at(0.0), &Reason::Starting)));
        assert_eq!(node.next_fence(at(0.0), Uuid::nil()), None, "no fence without a line");
        assert!(!node.has_line());
        node.listening(incarnation(1));
        assert!(node.bypassed().is_some() && node.has_line() && node.mark().is_none());
        assert_eq!(node.want_fence(), Err(Reason::Starting));
        let probe = fence(&mut node, at(0.1));
        assert_eq!(back(&mut node, probe), [Action::Open, Action::Advance, Action::Release(1)]);
        assert_eq!(node.bypassed(), None);
        assert_eq!(node.mark(), Some(&mark()));
    }

    #[test]
    fn a_fence_is_due_a_beat_after_the_last_or_soon_when_somebody_waits() {
        let mut node = up();
        assert_eq!(node.fence_due(), Some(at(0.0) + TIMING.beat));
        let beat = fence(&mut node, at(1.0));
        assert_eq!(node.fence_due(), None, "one at a time");
        assert_eq!(node.next_fence(at(9.0), Uuid::new_v4()), None);
        node.fence_not_sent(beat);
        assert_eq!(node.fence_due(), Some(at(1.0) + TIMING.spacing), "somebody may have waited for that one");
        let again = fence(&mut node, at(1.0) + TIMING.spacing);
        back(&mut node, again);
        assert_eq!(node.fence_due(), Some(at(1.0) + TIMING.spacing + TIMING.beat));
        node.gap(at(2.0), Reason::BeatLate);
        assert_eq!(node.fence_due(), None, "no line");
    }

    #[test]
    fn x9_a_fence_that_has_started_is_not_shared() {
        let mut node = up();
        let running = fence(&mut node, at(1.0));
        let mine = node.want_fence().expect("up");
        assert_eq!(mine, running.number + 1);
        assert_eq!(node.want_fence(), Ok(mine), "those who wait share the next one");
        assert_eq!(back(&mut node, running), [Action::Advance, Action::Release(running.number)]);
        assert_eq!(node.fence_due(), Some(at(1.0) + TIMING.spacing), "it is due before the beat");
        let next = fence(&mut node, at(1.1));
        assert_eq!(back(&mut node, next), [Action::Advance, Action::Release(mine)]);
    }

    #[test]
    fn k2_the_lease_counts_from_when_the_fence_was_sent() {
        let mut node = up();
        let beat = fence(&mut node, at(1.0));
        back(&mut node, beat);
        assert_eq!(node.coherent_as_of(), Some(at(1.0)));
        assert_eq!(node.lease_end(), Some(at(6.0)));
        let _under_way = fence(&mut node, at(2.0));
        assert_eq!(node.lease_end(), Some(at(6.0)), "a fence that is under way proves nothing");
        assert_eq!(node.fence_deadline(), Some(at(5.0)));
        assert_eq!(node.tick(at(5.0)), [], "who wakes at the deadline is not past it");
        assert_eq!(node.tick(at(5.1)), [Action::Close], "three seconds after it was sent it is late");
        assert!(matches!(node.bypassed(), Some((_, Reason::BeatLate))));
        assert_eq!(node.fence_deadline(), None);
    }

    #[test]
    fn a_fence_counts_when_it_was_applied_and_polled_and_the_triggers_were_looked_at() {
        let mut node = up();
        for (n, order) in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]].iter().enumerate() {
            let now = 1.0 + f64::from(u8::try_from(n).expect("few"));
            let beat = fence(&mut node, at(now));
            let outcomes = order.map(|part| match part {
                0 => node.fence_applied(beat.nonce, mark()),
                1 => node.fence_polled(beat, mark()),
                _ => node.fence_checked(beat),
            });
            let whole = vec![Action::Advance, Action::Release(beat.number)];
            assert_eq!(outcomes, [vec![], vec![], whole], "{order:?}: what one way did not tell another one may");
            assert_eq!(node.coherent_as_of(), Some(at(now)));
        }
        let late = fence(&mut node, at(7.0));
        node.fence_applied(late.nonce, mark());
        node.fence_polled(late, mark());
        assert_eq!(node.coherent_as_of(), Some(at(6.0)));
        assert_eq!(node.tick(at(10.1)), [Action::Close], "a look that takes too long is as bad as a late fence");
        assert_eq!(node.mark(), None);
        assert_eq!(node.coherent_as_of(), Some(at(6.0)), "so old is what was held");
    }

    #[test]
    fn what_a_fence_saw_is_what_both_its_message_and_its_poll_saw() {
        let seen = |text: &str, lsn| Mark { snapshot: text.parse().expect("a snapshot"), lsn };
        for (told, read) in [("7:9:7", "7:8:"), ("7:8:", "7:9:7")] {
            let mut node = up();
            let beat = fence(&mut node, at(1.0));
            node.fence_checked(beat);
            node.fence_applied(beat.nonce, seen(told, 5));
            node.fence_polled(beat, seen(read, 6));
            let mark = node.mark().expect("it counts");
            assert_eq!((mark.lsn, mark.snapshot.sees(6), mark.snapshot.sees(7)), (5, true, false));
            assert!(!mark.snapshot.sees(8), "one of the two did not see it");
        }
    }

    #[test]
    fn polls_of_other_fences_count_for_nothing() {
        let mut node = up();
        let lost = fence(&mut node, at(1.0));
        node.fence_not_sent(lost);
        let beat = fence(&mut node, at(1.1));
        node.fence_checked(beat);
        node.fence_applied(beat.nonce, mark());
        assert_eq!(node.fence_polled(lost, mark()), []);
        assert_eq!(node.coherent_as_of(), Some(at(0.0)));
    }

    #[test]
    fn the_lease_runs_out_when_no_fence_can_be_sent() {
        let mut node = up();
        for tenth in 10..=50 {
            if let Some(fence) = node.next_fence(at(f64::from(tenth) / 10.0), Uuid::new_v4()) {
                node.fence_not_sent(fence);
            }
            assert_eq!(node.tick(at(f64::from(tenth) / 10.0)), []);
        }
        assert_eq!(node.tick(at(5.1)), [Action::Close]);
        assert_eq!(node.bypassed(), Some((at(5.1), &Reason::LeaseExpired)));
    }

    #[test]
    fn x19_a_suspended_node_wakes_up_in_doubt() {
        let mut node = up();
        assert_eq!(node.tick(at(36_000.0)), [Action::Close]);
    }

    #[test]
    fn fences_of_strangers_and_of_lost_lines_count_for_nothing() {
        let mut node = up();
        let stranger = Uuid::from_u128(99);
        assert_eq!(node.fence_applied(stranger, mark()), []);
        let lost = fence(&mut node, at(1.0));
        assert_eq!(node.fence_checked(lost), []);
        assert_eq!(node.fence_applied(stranger, mark()), [], "in the place of one that is under way");
        assert_eq!(node.gap(at(1.5), Reason::BeatLate), [Action::Close]);
        assert_eq!(node.fence_applied(lost.nonce, mark()), []);
        node.listening(incarnation(1));
        assert_eq!(node.fence_applied(lost.nonce, mark()), [], "also when there is a line again");
        let probe = fence(&mut node, at(2.0));
        assert!(probe.probe, "a new line proves itself anew");
        assert_eq!(back(&mut node, probe), [Action::Open, Action::Advance, Action::Release(probe.number)]);
    }

    #[test]
    fn a_gap_keeps_its_beginning_until_it_ends() {
        let mut node = up();
        node.gap(at(1.0), Reason::ConnectionLost("reset".into()));
        node.listening(incarnation(2));
        assert_eq!(node.gap(at(2.0), Reason::BeatLate), [], "nothing was served");
        assert_eq!(node.bypassed(), Some((at(1.0), &Reason::BeatLate)));
        assert_eq!(node.gaps(), 2);
        assert_eq!(node.incarnation(), Some(incarnation(2)));
    }

    #[test]
    fn a_node_that_was_shut_down_stays_so() {
        let mut node = up();
        assert_eq!(node.gap(at(1.0), Reason::ShutDown), [Action::Close]);
        assert_eq!(node.gap(at(2.0), Reason::BeatLate), []);
        node.listening(incarnation(1));
        assert_eq!(node.bypassed(), Some((at(1.0), &Reason::ShutDown)));
        assert_eq!(node.next_fence(at(3.0), Uuid::nil()), None);
    }

    #[test]
    fn a_fence_that_could_not_be_sent_is_replaced() {
        let mut node = up();
        let mine = node.want_fence().expect("up");
        let first = fence(&mut node, at(1.0));
        node.fence_not_sent(first);
        let second = fence(&mut node, at(2.0));
        let released = back(&mut node, second);
        assert!(matches!(released[..], [Action::Advance, Action::Release(number)] if number >= mine));
    }
}
