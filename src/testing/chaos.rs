//! What can go wrong between a node and its database, by chance.

use std::{ops::RangeInclusive, time::Duration};

use crate::dice::Dice;

/// What goes wrong, and how often: for [`Database::chaos`](super::Database::chaos). Nothing, unless it is said.
///
/// Shares are from 0 to 1. All of it is drawn from the seed: in a runtime of one thread whose time is paused, the same seed makes the
/// same run.
///
/// # What may be lost
///
/// NOTIFY loses no message out of the middle: what Postgres queues reaches a connection in the order of commits, or the connection
/// ends. A cache may rely on that, so that a test kit must not break it: a message that is lost here takes the line with it.
///
/// | what happens | what follows |
/// | --- | --- |
/// | [`break_lines`](Self::break_lines): the line breaks, and what was under way is lost | the node knows at once: [`Event::Gap`](crate::Event::Gap), everything is forgotten, reads go to the database |
/// | [`lose_messages`](Self::lose_messages): a message is lost, and whatever follows on that line | the node's next fence does not come back; at the latest [`Config::staleness_bound`](crate::Config::staleness_bound) after the last one that did, there is a gap. Until then reads may miss the change, and [`barrier`](crate::Node::barrier) does not return `Ok` |
/// | [`lose_fences`](Self::lose_fences): a fence is lost, and nothing else | the same, though nothing was missed |
/// | [`delay_messages`](Self::delay_messages): messages come late, in their order | reads may miss the change until it comes; `barrier` waits for it |
/// | [`duplicate_messages`](Self::duplicate_messages): messages come twice | nothing |
///
/// So under any of it, a read that starts after `barrier` has returned `Ok` sees what was committed before `barrier` was called, and none
/// misses anything that is older than `staleness_bound`.
///
/// ```
/// use std::time::Duration;
/// use rowcache::testing::Chaos;
///
/// let chaos = Chaos::seeded(7)
///     .delay_messages(Duration::ZERO..=Duration::from_millis(20))
///     .duplicate_messages(0.2)
///     .lose_messages(0.01)
///     .fail_loads(0.1);
/// # let _ = chaos;
/// ```
#[derive(Clone, Debug)]
#[must_use = "it is for `Database::chaos`"]
pub struct Chaos {
    pub(super) seed: u64,
    messages: RangeInclusive<Duration>,
    duplicates: f64,
    lost: f64,
    lost_fences: f64,
    breaks: f64,
    loads: RangeInclusive<Duration>,
    failed_loads: f64,
}

impl Chaos {
    /// Nothing goes wrong yet; what will is drawn from this seed.
    pub fn seeded(seed: u64) -> Self {
        let none = || Duration::ZERO..=Duration::ZERO;
        Self {
            seed,
            messages: none(),
            duplicates: 0.0,
            lost: 0.0,
            lost_fences: 0.0,
            breaks: 0.0,
            loads: none(),
            failed_loads: 0.0,
        }
    }

    /// Messages, fences too, take so long. They stay in their order.
    pub fn delay_messages(mut self, between: RangeInclusive<Duration>) -> Self {
        self.messages = between;
        self
    }

    /// This share of messages, fences too, comes twice.
    ///
    /// # Panics
    ///
    /// For what is no share.
    pub fn duplicate_messages(mut self, share: f64) -> Self {
        self.duplicates = checked(share);
        self
    }

    /// This share of messages is lost, with all that follow on the same line, which says nothing of it: as where a
    /// firewall forgets a connection.
    ///
    /// # Panics
    ///
    /// For what is no share.
    pub fn lose_messages(mut self, share: f64) -> Self {
        self.lost = checked(share);
        self
    }

    /// This share of fences is lost, and nothing else.
    ///
    /// # Panics
    ///
    /// For what is no share.
    pub fn lose_fences(mut self, share: f64) -> Self {
        self.lost_fences = checked(share);
        self
    }

    /// With this share of messages the line breaks that should have carried it.
    ///
    /// # Panics
    ///
    /// For what is no share.
    pub fn break_lines(mut self, share: f64) -> Self {
        self.breaks = checked(share);
        self
    }

    /// Loads take so long: one part of it before they read rows, the rest of it after.
    pub fn delay_loads(mut self, between: RangeInclusive<Duration>) -> Self {
        self.loads = between;
        self
    }

    /// This share of loads fails, as if Postgres had ended the connection ([`is_unavailable`](crate::Error::is_unavailable)).
    ///
    /// # Panics
    ///
    /// For what is no share.
    pub fn fail_loads(mut self, share: f64) -> Self {
        self.failed_loads = checked(share);
        self
    }

    /// What becomes of one message on one line.
    pub(super) fn message(&self, is_fence: bool, dice: &mut Dice) -> Fate {
        if dice.chance(self.breaks) {
            Fate::Breaks
        } else if dice.chance(self.lost) {
            Fate::Silences
        } else if is_fence && dice.chance(self.lost_fences) {
            Fate::Lost
        } else {
            let delay = dice.within(&self.messages);
            Fate::Arrives { delay, twice: dice.chance(self.duplicates) }
        }
    }

    pub(super) fn load(&self, dice: &mut Dice) -> SlowLoad {
        let whole = dice.within(&self.loads);
        let before = dice.within(&(Duration::ZERO..=whole));
        SlowLoad { before, after: whole.saturating_sub(before), fails: dice.chance(self.failed_loads) }
    }
}

fn checked(share: f64) -> f64 {
    assert!((0.0..=1.0).contains(&share), "a share is from 0 to 1, not {share}");
    share
}

/// What becomes of a message.
pub(super) enum Fate {
    Arrives {
        delay: Duration,
        twice: bool,
    },
    /// It alone does not.
    Lost,
    /// Neither does anything after it.
    Silences,
    /// The line ends.
    Breaks,
}

/// What becomes of a load.
pub(super) struct SlowLoad {
    pub(super) before: Duration,
    pub(super) after: Duration,
    pub(super) fails: bool,
}

impl Dice {
    fn chance(&mut self, share: f64) -> bool {
        let drawn = u32::try_from(self.roll() >> 32).expect("32 bits are left");
        f64::from(drawn) < share * 2_f64.powi(32)
    }

    fn within(&mut self, range: &RangeInclusive<Duration>) -> Duration {
        let span = u64::try_from(range.end().saturating_sub(*range.start()).as_nanos()).unwrap_or(u64::MAX - 1);
        *range.start() + Duration::from_nanos(self.roll() % (span + 1))
    }
}
