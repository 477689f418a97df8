//! Two lines of one queue, and which of them is heard: a struct without I/O, fed with what each line receives.
//!
//! The *primary*'s messages go to the inbox as they come. The *spare*'s are kept, and forgotten as soon as a fence
//! shows that the primary has received them too. Applying both would invalidate everything twice, and throw away
//! good loads.
//!
//! The spare **covers** once the primary has received a fence that was sent after the spare's LISTEN had returned.
//! Then the primary can be lost without a gap (lemma *Handoff* of the design): what stands before that fence in the
//! queue was received by the primary, and what stands behind it is received by the spare. To cover as soon as LISTEN
//! has returned would be wrong (J1):
//!
//! 1. a change is committed; its message is on its way to the primary, and late;
//! 2. the spare's LISTEN returns. It takes its place behind the message, for the change is visible (A8);
//! 3. the primary is lost. Nobody has received the message, and nobody will.
//!
//! A message that both lines have received behind the last fence that both have received is applied twice after a
//! handoff, which does no harm (I5). Who the lines are is nothing to this module: `L` is what holds one open.

use std::{collections::VecDeque, time::Duration};

use uuid::Uuid;

use crate::{
    change::Message,
    coherence::Boot,
    inbox::{Item, QUESTIONS_MAX},
};

/// Tells lines apart, those that were given up too: what still arrives from them is nobody's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct LineId(u64);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Relay<L> {
    bytes_max: usize,
    last_id: u64,
    primary: Option<(LineId, L)>,
    spare: Option<Spare<L>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Spare<L> {
    id: LineId,
    line: L,
    covers: bool,
    /// Fences that were sent after this line was attached, and that one of the two still has to receive; oldest first.
    fences: VecDeque<Sent>,
    /// What this line has received since the last fence that both have received. `Item::Own` is one of `fences`, or was.
    kept: VecDeque<Item>,
    bytes: usize,
    /// Of those kept, the questions.
    questions: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Sent {
    nonce: Uuid,
    at: Boot,
    by_primary: bool,
    by_spare: bool,
}

/// What it means that a line is lost.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Loss<L> {
    /// Nothing: it had been given up.
    Late,
    /// There is no spare any more. Nothing else.
    Spare(L),
    /// The spare is the primary now. `items` come next in the inbox, before anything that it receives from here on.
    Handoff {
        /// In the order of the queue.
        items: VecDeque<Item>,
        old: L,
    },
    /// Messages may have been lost.
    Gap,
}

/// More fences are not waited for: the oldest is forgotten, and the lines meet at a later one. More than the default
/// spacing of fences allows within the time after which a line is given up.
const FENCES_MAX: usize = 1024;

impl<L> Relay<L> {
    /// `bytes_max` bounds what is kept of the spare's messages.
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self { bytes_max, last_id: 0, primary: None, spare: None }
    }

    /// A name for a line that is going to be opened.
    pub(crate) fn next_id(&mut self) -> LineId {
        self.last_id += 1;
        LineId(self.last_id)
    }

    /// The first line, whose LISTEN has returned.
    pub(crate) fn lead(&mut self, id: LineId, line: L) {
        self.primary = Some((id, line));
    }

    /// A second line, whose LISTEN has returned. It covers nothing yet.
    pub(crate) fn attach(&mut self, id: LineId, line: L) {
        let (fences, kept) = (VecDeque::new(), VecDeque::new());
        self.spare = Some(Spare { id, line, covers: false, fences, kept, bytes: 0, questions: 0 });
    }

    /// Gives up both lines.
    pub(crate) fn clear(&mut self) -> [Option<L>; 2] {
        [self.primary.take().map(|(_, line)| line), self.spare.take().map(|spare| spare.line)]
    }

    /// The line that is heard.
    pub(crate) fn primary(&self) -> Option<&(LineId, L)> {
        self.primary.as_ref()
    }

    pub(crate) fn has_spare(&self) -> bool {
        self.spare.is_some()
    }

    /// The line that waits.
    pub(crate) fn spare(&self) -> Option<&L> {
        self.spare.as_ref().map(|spare| &spare.line)
    }

    /// Whether the primary can be lost without a gap.
    pub(crate) fn is_covered(&self) -> bool {
        self.spare.as_ref().is_some_and(|spare| spare.covers)
    }

    /// A fence is about to be sent.
    pub(crate) fn fence_sent(&mut self, nonce: Uuid, at: Boot) {
        if let Some(spare) = &mut self.spare {
            if spare.fences.len() == FENCES_MAX {
                spare.fences.pop_front();
            }
            spare.fences.push_back(Sent { nonce, at, by_primary: false, by_spare: false });
        }
    }

    /// Takes what a line has received. Returns what goes to the inbox, and whether the spare covers from now on.
    pub(crate) fn received(&mut self, from: LineId, item: Item) -> (Option<Item>, bool) {
        if self.primary.as_ref().is_some_and(|(id, _)| *id == from) {
            let met = self.spare.as_mut().zip(nonce(&item));
            let covers = met.is_some_and(|(spare, nonce)| spare.primary_received(nonce));
            return (Some(item), covers);
        }
        if let Some(spare) = self.spare.as_mut().filter(|spare| spare.id == from) {
            spare.received(item, self.bytes_max);
        }
        (None, false)
    }

    /// A line is lost, or to be given up.
    pub(crate) fn lost(&mut self, id: LineId) -> Loss<L> {
        if let Some(spare) = self.spare.take_if(|spare| spare.id == id) {
            return Loss::Spare(spare.line);
        }
        let Some(primary) = self.primary.as_mut().filter(|(primary, _)| *primary == id) else { return Loss::Late };
        let Some(spare) = self.spare.take_if(|spare| spare.covers) else { return Loss::Gap };
        let (_, old) = std::mem::replace(primary, (spare.id, spare.line));
        Loss::Handoff { items: spare.kept, old }
    }

    /// The line that will be deaf, and when, unless it receives a fence that the other one has received: the primary
    /// if half of `patience` has passed since it was sent, so that the spare can take over before the fence is late.
    pub(crate) fn deaf(&self, patience: Duration) -> Option<(Boot, LineId)> {
        let (spare, (primary, _)) = self.spare.as_ref().zip(self.primary.as_ref())?;
        let verdict = |fence: &Sent| match (fence.by_primary, fence.by_spare) {
            (false, true) if spare.covers => Some((fence.at + patience / 2, *primary)),
            (true, false) => Some((fence.at + patience, spare.id)),
            _ => None,
        };
        spare.fences.iter().filter_map(verdict).min_by_key(|(at, _)| *at)
    }
}

impl<L> Spare<L> {
    /// The primary has received a fence. Returns whether this line covers from now on.
    fn primary_received(&mut self, fence: Uuid) -> bool {
        let Some(n) = self.fences.iter().position(|sent| sent.nonce == fence) else { return false };
        if self.fences[n].by_spare {
            self.fences.drain(..=n);
            // It is there: only what stands before a fence is ever removed, or replaced.
            let before = self.kept.iter().position(|item| nonce(item) == Some(fence)).map_or(0, |at| at + 1);
            self.kept.drain(..before);
            self.bytes = self.kept.iter().map(weight).sum();
            self.questions = self.kept.iter().filter(|item| matches!(item, Item::Question(_))).count();
        } else {
            self.fences[n].by_primary = true;
        }
        !std::mem::replace(&mut self.covers, true)
    }

    fn received(&mut self, item: Item, bytes_max: usize) {
        let fence = nonce(&item).and_then(|nonce| self.fences.iter().position(|sent| sent.nonce == nonce));
        match fence {
            Some(n) if self.fences[n].by_primary => {
                self.fences.drain(..=n);
                self.kept.clear();
                (self.bytes, self.questions) = (0, 0);
                return;
            }
            Some(n) if !self.fences[n].by_spare => {
                self.fences[n].by_spare = true;
                self.kept.push_back(item);
                return;
            }
            _ => {}
        }
        if matches!(item, Item::Question(_)) {
            // More than that are nobody's: they would make room for nothing but themselves.
            if self.questions < QUESTIONS_MAX {
                self.questions += 1;
                self.kept.push_back(item);
            }
            return;
        }
        // A fence that nobody waits for, or anything else on the node's own channel, is a message like others.
        let item = match item {
            Item::Own(payload) => Item::Message(payload),
            item => item,
        };
        self.bytes += weight(&item);
        self.kept.push_back(item);
        if self.bytes > bytes_max {
            self.overflow();
        }
    }

    /// Replaces all messages by what covers them. In place, on each side of every fence: what stands before a fence
    /// may be forgotten later, and must not cover what stands behind it. Questions are given up.
    fn overflow(&mut self) {
        for item in std::mem::take(&mut self.kept) {
            let waited_for = nonce(&item).is_some_and(|nonce| self.fences.iter().any(|sent| sent.nonce == nonce));
            if waited_for {
                self.kept.push_back(item);
            } else if !matches!(item, Item::Question(_)) && self.kept.back() != Some(&Item::Overflow) {
                self.kept.push_back(Item::Overflow);
            }
        }
        (self.bytes, self.questions) = (0, 0);
    }
}

fn nonce(item: &Item) -> Option<Uuid> {
    let Item::Own(payload) = item else { return None };
    match Message::parse(payload) {
        Message::Fence(nonce, _) => Some(nonce),
        _ => None,
    }
}

fn weight(item: &Item) -> usize {
    match item {
        Item::Message(payload) => payload.len() + size_of::<Item>(),
        // Fences are few (`FENCES_MAX`). What is polled does not come this way.
        Item::Own(_) | Item::Question(_) | Item::Polled(..) | Item::Overflow | Item::Missed => 0,
    }
}

#[cfg(all(test, not(shuttle)))]
#[path = "relay_tests.rs"]
mod tests;
